//! Tiny models of random weights, in any storage type.

use std::path::PathBuf;

use baton_gguf::{GgufWriter, TensorType};
use half::{bf16, f16};

/// Shape of a tiny model.
#[derive(Clone, Debug)]
pub(crate) struct Tiny {
    pub(crate) layers: usize,
    pub(crate) embedding: usize,
    pub(crate) feed_forward: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope_dim: usize,
    pub(crate) vocabulary: usize,
    pub(crate) context: usize,
    /// Storage type of the matrices; of the `i`-th matrix, `types[i % len]`.
    pub(crate) types: Vec<TensorType>,
    pub(crate) tied: bool,
    pub(crate) seed: u64,
    pub(crate) architecture: &'static str,
    /// Sliding window, tokens.
    pub(crate) window: Option<u32>,
    /// With RoPE factors.
    pub(crate) rope_factors: bool,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            layers: 2,
            embedding: 64,
            feed_forward: 96,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            rope_dim: 16,
            vocabulary: 203,
            context: 512,
            types: vec![TensorType::Q4_1],
            tied: true,
            seed: 1,
            architecture: "llama",
            window: None,
            rope_factors: false,
        }
    }
}

/// One tensor to be written.
pub(crate) struct TinyTensor {
    pub(crate) name: String,
    pub(crate) dimensions: Vec<u64>,
    pub(crate) dtype: TensorType,
    pub(crate) bytes: Vec<u8>,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// In [−1, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

impl Tiny {
    /// Wide enough for whole blocks of every type.
    pub(crate) fn of(types: &[TensorType]) -> Self {
        let base = Self {
            types: types.to_vec(),
            ..Self::default()
        };
        if types
            .iter()
            .all(|dtype| dtype.block().is_some_and(|(numbers, _)| numbers <= 32))
        {
            return base;
        }
        Self {
            embedding: 256,
            feed_forward: 256,
            heads: 8,
            head_dim: 32,
            rope_dim: 32,
            ..base
        }
    }

    /// All metadata that the model needs.
    pub(crate) fn metadata(&self) -> GgufWriter {
        let key = |key: &str| format!("{}.{key}", self.architecture);
        let writer = GgufWriter::new()
            .string("general.architecture", self.architecture)
            .u32(&key("block_count"), self.layers as u32)
            .u32(&key("context_length"), self.context as u32)
            .u32(&key("embedding_length"), self.embedding as u32)
            .u32(&key("feed_forward_length"), self.feed_forward as u32)
            .u32(&key("attention.head_count"), self.heads as u32)
            .u32(&key("attention.head_count_kv"), self.kv_heads as u32)
            .u32(&key("attention.key_length"), self.head_dim as u32)
            .u32(&key("attention.value_length"), self.head_dim as u32)
            .u32(&key("rope.dimension_count"), self.rope_dim as u32)
            .f32(&key("rope.freq_base"), 10_000.0)
            .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .u32("tokenizer.ggml.eos_token_id", 2);
        match self.window {
            Some(window) => writer.u32(&key("attention.sliding_window"), window),
            None => writer,
        }
    }

    /// All tensors, in the file's order.
    pub(crate) fn tensors(&self) -> Vec<TinyTensor> {
        let mut random = Random(self.seed);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut shapes = vec![("token_embd.weight".to_owned(), self.vocabulary, self.embedding)];
        for layer in 0..self.layers {
            for (part, rows, columns) in [
                ("attn_norm.weight", 1, self.embedding),
                ("attn_q.weight", q, self.embedding),
                ("attn_k.weight", kv, self.embedding),
                ("attn_v.weight", kv, self.embedding),
                ("attn_output.weight", self.embedding, q),
                ("ffn_norm.weight", 1, self.embedding),
                ("ffn_gate.weight", self.feed_forward, self.embedding),
                ("ffn_up.weight", self.feed_forward, self.embedding),
                ("ffn_down.weight", self.embedding, self.feed_forward),
            ] {
                shapes.push((format!("blk.{layer}.{part}"), rows, columns));
            }
            let vectors: &[(&str, usize)] = match self.architecture {
                "qwen2" => &[("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)],
                "qwen3" => &[
                    ("attn_q_norm.weight", self.head_dim),
                    ("attn_k_norm.weight", self.head_dim),
                ],
                _ => &[],
            };
            for (part, columns) in vectors {
                shapes.push((format!("blk.{layer}.{part}"), 1, *columns));
            }
        }
        shapes.push(("output_norm.weight".to_owned(), 1, self.embedding));
        if !self.tied {
            shapes.push(("output.weight".to_owned(), self.vocabulary, self.embedding));
        }
        if self.rope_factors {
            shapes.push(("rope_freqs.weight".to_owned(), 1, self.rope_dim / 2));
        }
        let mut matrices = 0;
        let tensor = |(name, rows, columns): (String, usize, usize)| {
            let (dimensions, dtype) = if rows == 1 {
                (vec![columns as u64], TensorType::F32)
            } else {
                matrices += 1;
                (
                    vec![columns as u64, rows as u64],
                    self.types[(matrices - 1) % self.types.len()],
                )
            };
            let bytes = if rows == 1 {
                (0..columns)
                    .flat_map(|_| (1.0 + 0.3 * random.unit()).to_le_bytes())
                    .collect()
            } else {
                numbers(&mut random, dtype, rows * columns)
            };
            TinyTensor {
                name,
                dimensions,
                dtype,
                bytes,
            }
        };
        shapes.into_iter().map(tensor).collect()
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        write(self.metadata(), self.tensors())
    }

    /// The file, in `folder`.
    pub(crate) fn file(&self, folder: &tempfile::TempDir) -> PathBuf {
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

pub(crate) fn write(metadata: GgufWriter, tensors: Vec<TinyTensor>) -> Vec<u8> {
    let add = |writer: GgufWriter, tensor: TinyTensor| {
        writer.tensor(&tensor.name, &tensor.dimensions, tensor.dtype, tensor.bytes)
    };
    tensors.into_iter().fold(metadata, add).finish()
}

/// Random numbers of roughly unit variance over 64 columns.
fn numbers(random: &mut Random, dtype: TensorType, count: usize) -> Vec<u8> {
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    let mut bytes = Vec::new();
    match dtype {
        TensorType::F32 => (0..count).for_each(|_| bytes.extend((0.3 * random.unit()).to_le_bytes())),
        TensorType::F16 => (0..count).for_each(|_| bytes.extend(half(0.3 * random.unit()))),
        TensorType::Bf16 => (0..count).for_each(|_| bytes.extend(bf16::from_f32(0.3 * random.unit()).to_le_bytes())),
        _ => {
            // Where scale and minimum lie in a block, and how large they are.
            let (scale, min) = match dtype {
                TensorType::Q4_0 => ((0, 0.03), None),
                TensorType::Q4_1 => ((0, 0.03), Some((2, -0.22))),
                TensorType::Q5_0 => ((0, 0.015), None),
                TensorType::Q5_1 => ((0, 0.015), Some((2, -0.22))),
                TensorType::Q8_0 => ((0, 0.002), None),
                // Multiplied by random integers of six bits, or seven and a sign.
                TensorType::Q4K => ((0, 0.001), Some((2, 0.007))),
                TensorType::Q5K => ((0, 0.0005), Some((2, 0.007))),
                TensorType::Q6K => ((208, 0.0001), None),
                other => unreachable!("{other} is not written"),
            };
            let (numbers, block) = dtype.block().unwrap();
            for _ in 0..count / numbers {
                let start = bytes.len();
                bytes.extend((0..block).map(|_| random.next() as u8));
                for (at, size) in [Some(scale), min].into_iter().flatten() {
                    bytes[start + at..][..2].copy_from_slice(&half(size * (1.2 + random.unit())));
                }
            }
        }
    }
    bytes
}
