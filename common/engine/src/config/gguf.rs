//! What a GGUF file's metadata says of its model.

use baton_gguf::{Gguf, Value, dequantize};

use super::{Architecture, ConfigError, MAX_CONTEXT, MAX_HEAD_DIM, MAX_LAYERS, MAX_WIDTH, ModelConfig};
use crate::ops::AttentionShape;

/// The tensor of Llama 3's RoPE factors.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The metadata of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: Architecture,
}

pub(super) fn read(gguf: &Gguf) -> Result<ModelConfig, ConfigError> {
    let architecture = gguf.string("general.architecture")?;
    let keys = Keys {
        gguf,
        architecture: match Architecture::by_name(architecture)? {
            // GGUF calls Mistral `llama`.
            Architecture::Mistral => {
                return Err(ConfigError::Unsupported(format!("the architecture '{architecture}'")));
            }
            known => known,
        },
    };
    keys.refuse_what_is_not_built()?;
    let embedding = keys.required("embedding_length", MAX_WIDTH)?;
    let heads = keys.required("attention.head_count", MAX_WIDTH)?;
    let attention = keys.attention(embedding, heads)?;
    Ok(ModelConfig {
        architecture: keys.architecture,
        layers: keys.required("block_count", MAX_LAYERS)?,
        embedding,
        feed_forward: keys.required("feed_forward_length", MAX_WIDTH)?,
        vocabulary: keys.vocabulary()?,
        context_length: keys.required("context_length", MAX_CONTEXT)?,
        rope_factors: rope_factors(gguf)?,
        attention,
        qkv_bias: keys.architecture == Architecture::Qwen2,
        qk_norm: keys.architecture == Architecture::Qwen3,
        epsilon: keys.positive("attention.layer_norm_rms_epsilon")?,
        tied_embedding: gguf.tensor("output.weight").is_none(),
    })
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.gguf.metadata(&self.name(key))
    }

    /// A required count in `1..=limit`.
    fn required(&self, key: &str, limit: usize) -> Result<usize, ConfigError> {
        let name = self.name(key);
        let value = self.gguf.u64(&name)?;
        match usize::try_from(value) {
            Ok(value) if (1..=limit).contains(&value) => Ok(value),
            _ => Err(ConfigError::Inconsistent(format!(
                "{name} is {value}, outside 1..={limit}"
            ))),
        }
    }

    fn optional(&self, key: &str, limit: usize) -> Result<Option<usize>, ConfigError> {
        self.get(key).map(|_| self.required(key, limit)).transpose()
    }

    fn positive(&self, key: &str) -> Result<f32, ConfigError> {
        let name = self.name(key);
        let value = self.gguf.f32(&name)?;
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(ConfigError::Inconsistent(format!("{name} is {value}")))
    }

    fn attention(&self, embedding: usize, heads: usize) -> Result<AttentionShape, ConfigError> {
        let kv_heads = self.optional("attention.head_count_kv", MAX_WIDTH)?.unwrap_or(heads);
        let head_dim = match self.optional("attention.key_length", MAX_HEAD_DIM)? {
            Some(length) => length,
            None if embedding.is_multiple_of(heads) => embedding / heads,
            None => {
                return Err(ConfigError::Inconsistent(format!(
                    "{embedding} columns do not divide into {heads} heads"
                )));
            }
        };
        let value_dim = self
            .optional("attention.value_length", MAX_HEAD_DIM)?
            .unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(ConfigError::Unsupported(format!(
                "keys of {head_dim} with values of {value_dim} elements"
            )));
        }
        let rope_base = match self.get("rope.freq_base") {
            Some(_) => self.positive("rope.freq_base")?.into(),
            None => 10_000.0,
        };
        let window = match self.get("attention.sliding_window").and_then(Value::as_u64) {
            Some(0) | None => None,
            Some(window) => Some(usize::try_from(window).unwrap_or(usize::MAX)),
        };
        Ok(AttentionShape {
            heads,
            kv_heads,
            head_dim,
            rope_dim: self.optional("rope.dimension_count", MAX_HEAD_DIM)?.unwrap_or(head_dim),
            rope_base,
            // Converters permute the rows of q and k of Llama alone, so that a pair lies side by side.
            rope_interleaved: self.architecture == Architecture::Llama,
            window,
        })
    }

    fn vocabulary(&self) -> Result<usize, ConfigError> {
        let rows = self
            .gguf
            .tensor("token_embd.weight")
            .ok_or_else(|| ConfigError::MissingTensor("token_embd.weight".into()))?
            .rows;
        match self.optional("vocab_size", usize::MAX)? {
            Some(said) if said != rows => Err(ConfigError::Inconsistent(format!(
                "{rows} embeddings for a vocabulary of {said} tokens"
            ))),
            _ => Ok(rows),
        }
    }

    fn refuse_what_is_not_built(&self) -> Result<(), ConfigError> {
        let refuse = |what: String| Err(ConfigError::Unsupported(what));
        if let Some(scaling) = self.get("rope.scaling.type").and_then(Value::as_str)
            && scaling != "none"
        {
            return refuse(format!("the RoPE scaling '{scaling}'"));
        }
        for key in ["rope.scale_linear", "rope.scaling.factor"] {
            if let Some(factor) = self.get(key).and_then(Value::as_f32)
                && factor != 1.0
            {
                return refuse(format!("a RoPE scaling factor of {factor}"));
            }
        }
        let positive = |key| self.get(key).and_then(Value::as_u64).is_some_and(|count| count > 0);
        if positive("expert_count") {
            return refuse("a mixture of experts".to_owned());
        }
        // Qwen's windows begin at a certain layer.
        if positive("attention.sliding_window") && self.architecture != Architecture::Llama {
            return refuse("a sliding attention window on some layers".to_owned());
        }
        Ok(())
    }
}

fn rope_factors(gguf: &Gguf) -> Result<Vec<f64>, ConfigError> {
    let Some(tensor) = gguf.tensor(ROPE_FACTORS) else {
        return Ok(Vec::new());
    };
    if tensor.rows != 1 || tensor.columns > MAX_HEAD_DIM {
        return Err(ConfigError::Inconsistent(format!(
            "'{ROPE_FACTORS}' has {} rows of {}",
            tensor.rows, tensor.columns
        )));
    }
    let mut factors = vec![0.0f32; tensor.columns];
    dequantize(&tensor, 0, &mut factors).map_err(|error| ConfigError::Unsupported(error.to_string()))?;
    Ok(factors.into_iter().map(f64::from).collect())
}
