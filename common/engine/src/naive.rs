//! The oracle of the whole: keeps no KV, and recomputes everything over all tokens at every step, in plain scalar loops over its own copy of the weights.
//!
//! It follows the CPU backend's numerics contract and none of its layout: no panels, no tiles of rows, no pool, no threads. Its tokens and
//! log-probabilities are bit-equal to the engine's, and the time that it takes is what the KV saves.

mod matrix;

use std::path::Path;

use baton_gguf::dequantize;
use baton_kv::TokenId;
use baton_scheduler::Sample;

use crate::{
    ConfigError, ModelConfig,
    checkpoint::Checkpoint,
    cpu::math::{LANES, exp, from_bf16, power, sin_cos, to_bf16, tree_sum},
    open::OpenError,
    sampler::{Drawn, SampleError, SamplerScratch, draw},
};

use matrix::Matrix;

/// Tokens of a KV tile: the softmax is corrected after each.
const TILE: usize = 32;
/// Tokens of a partition: a softmax of its own, merged with the others' in order.
const PARTITION: usize = 256;

/// A model in plain arrays.
pub struct NaiveModel {
    config: ModelConfig,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Option<Matrix>,
}

struct Layer {
    attention_norm: Vec<f32>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    attention_output: Matrix,
    /// Of queries, keys and values.
    biases: Option<[Vec<f32>; 3]>,
    /// Of single heads of queries and keys.
    head_norms: Option<[Vec<f32>; 2]>,
    feed_forward_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl NaiveModel {
    /// Reads a model file.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let checkpoint = Checkpoint::open(path)?;
        let config = ModelConfig::of(&checkpoint)?;
        Ok(Self {
            embedding: matrix(&checkpoint, "token_embd.weight")?,
            layers: (0..config.layers)
                .map(|layer| Layer::read(&checkpoint, &config, layer))
                .collect::<Result<_, _>>()?,
            norm: vector(&checkpoint, "output_norm.weight")?,
            output: (!config.tied_embedding)
                .then(|| matrix(&checkpoint, "output.weight"))
                .transpose()?,
            config,
        })
    }

    /// The token that follows `tokens` (at least one; the last `sample.index` are the output).
    pub fn next(
        &self,
        tokens: &[TokenId],
        sample: &Sample,
        scratch: &mut SamplerScratch,
    ) -> Result<Drawn, SampleError> {
        let history = sample.params.history(tokens, tokens.len() - sample.index as usize);
        draw(&self.logits(tokens), sample, history, scratch)
    }

    /// The logits after `tokens`, one per token of the vocabulary.
    pub fn logits(&self, tokens: &[TokenId]) -> Vec<f32> {
        let mut rows: Vec<Vec<f32>> = tokens.iter().map(|&token| self.embedding.row(token as usize)).collect();
        for layer in &self.layers {
            self.attend(layer, &mut rows);
            self.feed_forward(layer, &mut rows);
        }
        let last = self.rms_norm(rows.last().expect("at least one token"), &self.norm);
        self.output.as_ref().unwrap_or(&self.embedding).times(&last)
    }

    fn attend(&self, layer: &Layer, rows: &mut [Vec<f32>]) {
        let shape = &self.config.attention;
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, row) in rows.iter().enumerate() {
            let normed = self.rms_norm(row, &layer.attention_norm);
            let [mut q, mut k, mut v] = [&layer.q, &layer.k, &layer.v].map(|matrix| matrix.times(&normed));
            if let Some([q_bias, k_bias, v_bias]) = &layer.biases {
                add(&mut q, q_bias);
                add(&mut k, k_bias);
                add(&mut v, v_bias);
            }
            for (x, which) in [(&mut q, 0), (&mut k, 1)] {
                for head in x.chunks_exact_mut(shape.head_dim) {
                    if let Some(norms) = &layer.head_norms {
                        let normed = self.rms_norm(head, &norms[which]);
                        head.copy_from_slice(&normed);
                    }
                    self.rotate(head, position);
                }
            }
            queries.push(q);
            keys.push(rounded(k));
            values.push(rounded(v));
        }
        for (position, row) in rows.iter_mut().enumerate() {
            let mut attended = Vec::new();
            for head in 0..shape.heads {
                let query = part(&queries[position], head, shape.head_dim);
                let kv_head = head / (shape.heads / shape.kv_heads);
                let first = shape.first_seen(position);
                let past = |all: &[Vec<f32>]| -> Vec<Vec<f32>> {
                    all[first..=position]
                        .iter()
                        .map(|row| part(row, kv_head, shape.head_dim).to_vec())
                        .collect()
                };
                attended.extend(attention(query, &past(&keys), &past(&values), first));
            }
            add(row, &layer.attention_output.times(&attended));
        }
    }

    fn feed_forward(&self, layer: &Layer, rows: &mut [Vec<f32>]) {
        for row in rows {
            let normed = self.rms_norm(row, &layer.feed_forward_norm);
            let (gate, up) = (layer.gate.times(&normed), layer.up.times(&normed));
            let activated: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| g / (1.0 + exp(-g)) * u).collect();
            add(row, &layer.down.times(&activated));
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut squares = [0.0f32; LANES];
        for (i, &x) in x.iter().enumerate() {
            squares[i % LANES] = x.mul_add(x, squares[i % LANES]);
        }
        let mean = tree_sum(squares) / x.len() as f32;
        let inverse = 1.0 / (mean + self.config.epsilon).sqrt();
        x.iter().zip(weight).map(|(&x, &weight)| x * inverse * weight).collect()
    }

    fn rotate(&self, head: &mut [f32], position: usize) {
        let shape = &self.config.attention;
        let pairs = shape.rope_dim / 2;
        for pair in 0..pairs {
            let frequency = power(shape.rope_base, -2.0 * pair as f64 / shape.rope_dim as f64);
            let frequency = self
                .config
                .rope_factors
                .get(pair)
                .map_or(frequency, |factor| frequency / factor);
            let (sine, cosine) = sin_cos(position as f64 * frequency);
            let (sine, cosine) = (sine as f32, cosine as f32);
            let (i, j) = if shape.rope_interleaved {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + pairs)
            };
            let (a, b) = (head[i], head[j]);
            head[i] = a * cosine - b * sine;
            head[j] = a * sine + b * cosine;
        }
    }
}

impl Layer {
    fn read(checkpoint: &Checkpoint, config: &ModelConfig, layer: usize) -> Result<Self, ConfigError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let head_norm = |part: &str| vector(checkpoint, &name(part));
        let bias = |part: &str| vector(checkpoint, &format!("blk.{layer}.{part}.bias"));
        Ok(Self {
            attention_norm: vector(checkpoint, &name("attn_norm"))?,
            q: matrix(checkpoint, &name("attn_q"))?,
            k: matrix(checkpoint, &name("attn_k"))?,
            v: matrix(checkpoint, &name("attn_v"))?,
            attention_output: matrix(checkpoint, &name("attn_output"))?,
            biases: config
                .qkv_bias
                .then(|| Ok::<_, ConfigError>([bias("attn_q")?, bias("attn_k")?, bias("attn_v")?]))
                .transpose()?,
            head_norms: config
                .qk_norm
                .then(|| Ok::<_, ConfigError>([head_norm("attn_q_norm")?, head_norm("attn_k_norm")?]))
                .transpose()?,
            feed_forward_norm: vector(checkpoint, &name("ffn_norm"))?,
            gate: matrix(checkpoint, &name("ffn_gate"))?,
            up: matrix(checkpoint, &name("ffn_up"))?,
            down: matrix(checkpoint, &name("ffn_down"))?,
        })
    }
}

fn matrix(checkpoint: &Checkpoint, name: &str) -> Result<Matrix, ConfigError> {
    Matrix::read(&checkpoint.required(name)?)
}

fn vector(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, ConfigError> {
    let tensor = checkpoint.required(name)?;
    let mut out = vec![0.0; tensor.columns];
    dequantize(&tensor, 0, &mut out).map_err(|error| ConfigError::Unsupported(error.to_string()))?;
    Ok(out)
}

/// Softmax over the past, partition by partition. All `[head_dim]`. Keys and values are those from position `first` on; partitions and tiles lie at multiples
/// of their sizes.
fn attention(query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], first: usize) -> Vec<f32> {
    let scale = 1.0 / (query.len() as f32).sqrt();
    let query: Vec<f32> = query.iter().map(|x| x * scale).collect();
    let mut total = Softmax::new(query.len());
    let end = first + keys.len();
    let mut position = first;
    while position < end {
        let partition_end = end.min((position / PARTITION + 1) * PARTITION);
        let mut part = Softmax::new(query.len());
        while position < partition_end {
            let tile_end = partition_end.min((position / TILE + 1) * TILE);
            let seen = position - first..tile_end - first;
            part.take(&query, &keys[seen.clone()], &values[seen], position % TILE);
            position = tile_end;
        }
        total = if total.max == f32::NEG_INFINITY {
            part
        } else {
            total.merge(&part)
        };
    }
    let inverse = 1.0 / tree_sum(total.sums);
    total.out.iter().map(|out| out * inverse).collect()
}

/// A softmax so far: its maximum, its sum in lanes, and the weighted values.
struct Softmax {
    max: f32,
    sums: [f32; LANES],
    out: Vec<f32>,
}

impl Softmax {
    fn new(head_dim: usize) -> Self {
        Self {
            max: f32::NEG_INFINITY,
            sums: [0.0; LANES],
            out: vec![0.0; head_dim],
        }
    }

    /// Some tokens of a tile, of which the first is the tile's token `at`.
    fn take(&mut self, query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], at: usize) {
        let dot = |key: &Vec<f32>| query.iter().zip(key).fold(0.0f32, |sum, (q, k)| q.mul_add(*k, sum));
        let scores: Vec<f32> = keys.iter().map(dot).collect();
        let before = self.max;
        self.max = scores
            .iter()
            .fold(before, |max, &score| if score > max { score } else { max });
        let correction = exp(before - self.max);
        let mut weights = [0.0; TILE];
        for (weight, &score) in weights[at..].iter_mut().zip(&scores) {
            *weight = exp(score - self.max);
        }
        for (sum, pair) in self.sums.iter_mut().zip(weights.as_chunks::<2>().0) {
            *sum = sum.mul_add(correction, pair[0] + pair[1]);
        }
        self.out.iter_mut().for_each(|out| *out *= correction);
        for (value, weight) in values.iter().zip(&weights[at..]) {
            for (out, &value) in self.out.iter_mut().zip(value) {
                *out = weight.mul_add(value, *out);
            }
        }
    }

    /// With the partition that comes next.
    fn merge(mut self, later: &Self) -> Self {
        let max = if later.max > self.max { later.max } else { self.max };
        let (own, others) = (exp(self.max - max), exp(later.max - max));
        let numbers = self.sums.iter_mut().chain(&mut self.out);
        for (x, y) in numbers.zip(later.sums.iter().chain(&later.out)) {
            *x = y.mul_add(others, *x * own);
        }
        self.max = max;
        self
    }
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

fn part(row: &[f32], index: usize, len: usize) -> &[f32] {
    &row[index * len..][..len]
}

/// As the pool would give it back.
fn rounded(row: Vec<f32>) -> Vec<f32> {
    row.into_iter().map(|x| from_bf16(to_bf16(x))).collect()
}
