//! What a model file says of its decoder, checked.

use std::collections::HashSet;

use baton_gguf::{Array, Gguf, GgufError, Tensor, Value};
use baton_kv::TokenId;

use crate::ops::AttentionShape;

/// Why a readable model file cannot be run. The file must change, or Baton.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A metadata key is missing or has another type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// Numbers that no model can have.
    #[error("the model file is inconsistent: {0}")]
    Inconsistent(String),
    /// A tensor that the architecture needs is not there.
    #[error("the model file has no tensor '{0}'")]
    MissingTensor(String),
    /// A tensor with another shape than the metadata asks for.
    #[error("tensor '{name}' is {found:?} where the metadata asks for {expected:?} (rows, columns)")]
    Shape {
        /// The tensor.
        name: String,
        /// Rows and columns that the metadata asks for.
        expected: (usize, usize),
        /// Rows and columns that it has.
        found: (usize, usize),
    },
    /// Something that a correct answer needs and that is not built.
    #[error("the model needs {0}, which is not built")]
    Unsupported(String),
}

/// Layers at most: the deepest models have some hundred.
const MAX_LAYERS: usize = 1024;
/// Width at most (embedding, feed-forward, heads × head): the widest have below 2^17.
const MAX_WIDTH: usize = 1 << 20;
/// Context at most, so that positions and token counts fit everywhere.
const MAX_CONTEXT: usize = 1 << 24;
/// The longest head that the kernels are made for.
const MAX_HEAD_DIM: usize = 512;

/// A Llama decoder's shape.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// Layers.
    pub layers: usize,
    /// Width of the residual.
    pub embedding: usize,
    /// Width of the feed-forward block.
    pub feed_forward: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Longest context that the model was made for, tokens.
    pub context_length: usize,
    /// Heads and RoPE.
    pub attention: AttentionShape,
    /// Added to the mean square in every norm.
    pub epsilon: f32,
    /// The output matrix is the embedding's.
    pub tied_embedding: bool,
    /// Tokens that end an answer.
    pub eos_ids: Vec<TokenId>,
}

impl ModelConfig {
    /// Reads and checks the metadata of architecture `llama`, and that every tensor is there, has its shape, and is used.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ConfigError> {
        let architecture = gguf.string("general.architecture")?;
        if architecture != "llama" {
            return Err(ConfigError::Unsupported(format!("the architecture '{architecture}'")));
        }
        refuse_what_is_not_built(gguf)?;
        let layers = bounded(gguf, "llama.block_count", MAX_LAYERS)?;
        let embedding = bounded(gguf, "llama.embedding_length", MAX_WIDTH)?;
        let heads = bounded(gguf, "llama.attention.head_count", MAX_WIDTH)?;
        let config = Self {
            layers,
            embedding,
            feed_forward: bounded(gguf, "llama.feed_forward_length", MAX_WIDTH)?,
            vocabulary: vocabulary(gguf)?,
            context_length: bounded(gguf, "llama.context_length", MAX_CONTEXT)?,
            attention: attention(gguf, embedding, heads)?,
            epsilon: positive(gguf, "llama.attention.layer_norm_rms_epsilon")?,
            tied_embedding: gguf.tensor("output.weight").is_none(),
            eos_ids: eos_ids(gguf),
        };
        config.check_tensors(gguf)?;
        Ok(config)
    }

    /// Names and shapes (rows, columns) of all tensors.
    pub fn tensors(&self) -> Vec<(String, usize, usize)> {
        let shape = &self.attention;
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), self.vocabulary, self.embedding),
            ("output_norm.weight".to_owned(), 1, self.embedding),
        ];
        if !self.tied_embedding {
            tensors.push(("output.weight".to_owned(), self.vocabulary, self.embedding));
        }
        for layer in 0..self.layers {
            for (part, rows, columns) in [
                ("attn_norm", 1, self.embedding),
                ("attn_q", q, self.embedding),
                ("attn_k", kv, self.embedding),
                ("attn_v", kv, self.embedding),
                ("attn_output", self.embedding, q),
                ("ffn_norm", 1, self.embedding),
                ("ffn_gate", self.feed_forward, self.embedding),
                ("ffn_up", self.feed_forward, self.embedding),
                ("ffn_down", self.embedding, self.feed_forward),
            ] {
                tensors.push((format!("blk.{layer}.{part}.weight"), rows, columns));
            }
        }
        tensors
    }

    fn check_tensors(&self, gguf: &Gguf) -> Result<(), ConfigError> {
        let tensors = self.tensors();
        for (name, rows, columns) in &tensors {
            let tensor = tensor(gguf, name)?;
            let (expected, found) = ((*rows, *columns), (tensor.rows, tensor.columns));
            if expected != found {
                return Err(ConfigError::Shape {
                    name: name.clone(),
                    expected,
                    found,
                });
            }
        }
        // A tensor that is not used (a bias, a norm of queries, RoPE factors, an adapter) would change the answer.
        let known: HashSet<&str> = tensors.iter().map(|(name, ..)| name.as_str()).collect();
        match gguf.tensors().iter().find(|entry| !known.contains(entry.name.as_str())) {
            Some(entry) => Err(ConfigError::Unsupported(format!("the tensor '{}'", entry.name))),
            None => Ok(()),
        }
    }
}

/// A tensor that must be there.
pub(crate) fn tensor<'a>(gguf: &'a Gguf, name: &str) -> Result<Tensor<'a>, ConfigError> {
    gguf.tensor(name)
        .ok_or_else(|| ConfigError::MissingTensor(name.to_owned()))
}

fn attention(gguf: &Gguf, embedding: usize, heads: usize) -> Result<AttentionShape, ConfigError> {
    let kv_heads = optional(gguf, "llama.attention.head_count_kv", MAX_WIDTH)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigError::Inconsistent(format!(
            "{heads} heads do not divide into {kv_heads} KV heads"
        )));
    }
    let head_dim = match optional(gguf, "llama.attention.key_length", MAX_HEAD_DIM)? {
        Some(length) => length,
        None if embedding.is_multiple_of(heads) => embedding / heads,
        None => {
            return Err(ConfigError::Inconsistent(format!(
                "{embedding} columns do not divide into {heads} heads"
            )));
        }
    };
    let value_dim = optional(gguf, "llama.attention.value_length", MAX_HEAD_DIM)?.unwrap_or(head_dim);
    if value_dim != head_dim {
        return Err(ConfigError::Unsupported(format!(
            "keys of {head_dim} with values of {value_dim} elements"
        )));
    }
    let rope_dim = optional(gguf, "llama.rope.dimension_count", MAX_HEAD_DIM)?.unwrap_or(head_dim);
    if head_dim % 2 != 0 || rope_dim % 2 != 0 || rope_dim > head_dim || head_dim > MAX_HEAD_DIM {
        return Err(ConfigError::Inconsistent(format!(
            "heads of {head_dim} elements, of which {rope_dim} are rotated"
        )));
    }
    if heads * head_dim > MAX_WIDTH {
        return Err(ConfigError::Inconsistent(format!(
            "{heads} heads of {head_dim} elements"
        )));
    }
    let rope_base = match gguf.metadata("llama.rope.freq_base") {
        Some(_) => positive(gguf, "llama.rope.freq_base")?.into(),
        None => 10_000.0,
    };
    // Converters permute the rows of q and k of this architecture, so that a pair lies side by side.
    Ok(AttentionShape {
        heads,
        kv_heads,
        head_dim,
        rope_dim,
        rope_base,
        rope_interleaved: true,
    })
}

fn vocabulary(gguf: &Gguf) -> Result<usize, ConfigError> {
    let rows = tensor(gguf, "token_embd.weight")?.rows;
    if rows >= TokenId::MAX as usize {
        return Err(ConfigError::Inconsistent(format!("a vocabulary of {rows} tokens")));
    }
    match optional(gguf, "llama.vocab_size", usize::MAX)? {
        Some(said) if said != rows => Err(ConfigError::Inconsistent(format!(
            "{rows} embeddings for a vocabulary of {said} tokens"
        ))),
        _ => Ok(rows),
    }
}

fn refuse_what_is_not_built(gguf: &Gguf) -> Result<(), ConfigError> {
    let refuse = |what: String| Err(ConfigError::Unsupported(what));
    if let Some(scaling) = gguf.metadata("llama.rope.scaling.type").and_then(Value::as_str)
        && scaling != "none"
    {
        return refuse(format!("the RoPE scaling '{scaling}'"));
    }
    for key in ["llama.rope.scale_linear", "llama.rope.scaling.factor"] {
        if let Some(factor) = gguf.metadata(key).and_then(Value::as_f32)
            && factor != 1.0
        {
            return refuse(format!("a RoPE scaling factor of {factor}"));
        }
    }
    if gguf.tensor("rope_freqs.weight").is_some() {
        return refuse("RoPE frequency factors".to_owned());
    }
    let positive = |key| {
        gguf.metadata(key)
            .and_then(Value::as_u64)
            .is_some_and(|count| count > 0)
    };
    if positive("llama.expert_count") {
        return refuse("a mixture of experts".to_owned());
    }
    if positive("llama.attention.sliding_window") {
        return refuse("a sliding attention window".to_owned());
    }
    Ok(())
}

/// A required count in `1..=limit`.
fn bounded(gguf: &Gguf, key: &str, limit: usize) -> Result<usize, ConfigError> {
    let value = gguf.u64(key)?;
    match usize::try_from(value) {
        Ok(value) if (1..=limit).contains(&value) => Ok(value),
        _ => Err(ConfigError::Inconsistent(format!(
            "{key} is {value}, outside 1..={limit}"
        ))),
    }
}

fn optional(gguf: &Gguf, key: &str, limit: usize) -> Result<Option<usize>, ConfigError> {
    gguf.metadata(key).map(|_| bounded(gguf, key, limit)).transpose()
}

fn positive(gguf: &Gguf, key: &str) -> Result<f32, ConfigError> {
    let value = gguf.f32(key)?;
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(ConfigError::Inconsistent(format!("{key} is {value}")))
}

/// Control tokens that end a turn or a text in the model families in use, by their text; files often name only one of them.
const END_TEXTS: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
];
/// `tokenizer.ggml.token_type` of a control token.
const CONTROL: i32 = 3;

fn eos_ids(gguf: &Gguf) -> Vec<TokenId> {
    let named = ["eos", "eot", "eom"]
        .iter()
        .filter_map(|which| gguf.u32(&format!("tokenizer.ggml.{which}_token_id")).ok());
    let texts = gguf.array_string("tokenizer.ggml.tokens").unwrap_or_default();
    let types: &[i32] = match gguf.metadata("tokenizer.ggml.token_type").and_then(Value::as_array) {
        Some(Array::I32(types)) => types,
        _ => &[],
    };
    let by_text = (0..)
        .zip(texts.iter().zip(types))
        .filter(|(_, (text, kind))| **kind == CONTROL && END_TEXTS.contains(&text.as_str()))
        .map(|(id, _)| id);
    let mut ids: Vec<TokenId> = named.chain(by_text).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
