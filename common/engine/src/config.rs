//! What a model file says of its decoder, checked.

mod gguf;
mod huggingface;

use std::{borrow::Cow, collections::HashSet, path::Path};

use baton_gguf::GgufError;
use baton_kv::TokenId;

use crate::{OpenError, checkpoint::Checkpoint, ops::AttentionShape};

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

/// The families whose decoders are switches of the one decoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, and Mistral where its file calls it so.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Biases on queries, keys and values.
    Qwen2,
    /// Norms on the heads of queries and keys.
    Qwen3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// As GGUF's `general.architecture` and Hugging Face's `model_type` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn by_name(name: &str) -> Result<Self, ConfigError> {
        Self::ALL
            .into_iter()
            .find(|architecture| architecture.name() == name)
            .ok_or_else(|| ConfigError::Unsupported(format!("the architecture '{name}'")))
    }
}

/// A decoder's shape and switches.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
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
    /// What the frequency of each rotated pair is divided by; empty: by nothing.
    pub rope_factors: Vec<f64>,
    /// Biases are added to queries, keys and values.
    pub qkv_bias: bool,
    /// Each head of queries and keys is normed before it is rotated.
    pub qk_norm: bool,
    /// Added to the mean square in every norm.
    pub epsilon: f32,
    /// The output matrix is the embedding's.
    pub tied_embedding: bool,
}

impl ModelConfig {
    /// Reads and checks what a checkpoint says of its model, and that every tensor is there, has its shape, and is used.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Self, ConfigError> {
        let config = match checkpoint {
            Checkpoint::Gguf(gguf) => gguf::read(gguf)?,
            Checkpoint::Directory(directory) => huggingface::read(&directory.config)?,
        };
        config.check_shape()?;
        config.check_tensors(checkpoint)?;
        Ok(config)
    }

    /// The same from a model's path, and its name as clients use it; reads no weights.
    pub fn open(path: &Path) -> Result<(String, Self), OpenError> {
        let checkpoint = Checkpoint::open(path)?;
        Ok((checkpoint.model_name(path), Self::of(&checkpoint)?))
    }

    /// Names (GGUF's) and shapes (rows, columns) of all tensors.
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
        let mut parts = vec![
            ("attn_norm.weight", 1, self.embedding),
            ("attn_q.weight", q, self.embedding),
            ("attn_k.weight", kv, self.embedding),
            ("attn_v.weight", kv, self.embedding),
            ("attn_output.weight", self.embedding, q),
            ("ffn_norm.weight", 1, self.embedding),
            ("ffn_gate.weight", self.feed_forward, self.embedding),
            ("ffn_up.weight", self.feed_forward, self.embedding),
            ("ffn_down.weight", self.embedding, self.feed_forward),
        ];
        if self.qkv_bias {
            parts.extend([("attn_q.bias", 1, q), ("attn_k.bias", 1, kv), ("attn_v.bias", 1, kv)]);
        }
        if self.qk_norm {
            parts.extend([
                ("attn_q_norm.weight", 1, shape.head_dim),
                ("attn_k_norm.weight", 1, shape.head_dim),
            ]);
        }
        for layer in 0..self.layers {
            let named = |&(part, rows, columns): &(&str, usize, usize)| (format!("blk.{layer}.{part}"), rows, columns);
            tensors.extend(parts.iter().map(named));
        }
        tensors
    }

    /// What holds of every source.
    fn check_shape(&self) -> Result<(), ConfigError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            rope_dim,
            ..
        } = self.attention;
        let inconsistent = |what: String| Err(ConfigError::Inconsistent(what));
        if !heads.is_multiple_of(kv_heads) {
            return inconsistent(format!("{heads} heads do not divide into {kv_heads} KV heads"));
        }
        if head_dim % 2 != 0 || rope_dim % 2 != 0 || rope_dim > head_dim || head_dim > MAX_HEAD_DIM {
            return inconsistent(format!("heads of {head_dim} elements, of which {rope_dim} are rotated"));
        }
        if heads * head_dim > MAX_WIDTH {
            return inconsistent(format!("{heads} heads of {head_dim} elements"));
        }
        if self.vocabulary >= TokenId::MAX as usize {
            return inconsistent(format!("a vocabulary of {} tokens", self.vocabulary));
        }
        let factors = &self.rope_factors;
        let sound = |factor: &f64| (1e-6..=1e6).contains(factor);
        if !factors.is_empty() && (factors.len() != rope_dim / 2 || !factors.iter().all(sound)) {
            return inconsistent(format!(
                "{} RoPE factors for {rope_dim} rotated elements",
                factors.len()
            ));
        }
        Ok(())
    }

    fn check_tensors(&self, checkpoint: &Checkpoint) -> Result<(), ConfigError> {
        let tensors = self.tensors();
        for (name, rows, columns) in &tensors {
            let tensor = checkpoint.required(name)?;
            let (expected, found) = ((*rows, *columns), (tensor.rows, tensor.columns));
            if expected != found {
                return Err(ConfigError::Shape {
                    name: tensor.name.to_owned(),
                    expected,
                    found,
                });
            }
        }
        // A tensor that is not used (another bias, an adapter) would change the answer. The RoPE factors were read with the metadata.
        let known: HashSet<Cow<'_, str>> = tensors
            .iter()
            .map(|(name, ..)| checkpoint.own_name(name))
            .chain(matches!(checkpoint, Checkpoint::Gguf(_)).then(|| gguf::ROPE_FACTORS.into()))
            .collect();
        match checkpoint.tensors().iter().find(|tensor| !known.contains(tensor.name)) {
            Some(tensor) => Err(ConfigError::Unsupported(format!("the tensor '{}'", tensor.name))),
            None => Ok(()),
        }
    }
}
