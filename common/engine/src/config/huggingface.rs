//! What a Hugging Face `config.json` says of its model, in the spelling of transformers 4 or 5.

use std::f64::consts::PI;

use baton_kv::TokenId;
use serde_json::{Map, Value};

use super::{Architecture, ConfigError, MAX_CONTEXT, MAX_HEAD_DIM, MAX_LAYERS, MAX_WIDTH, ModelConfig};
use crate::{cpu::math::power, ops::AttentionShape};

/// The keys of one JSON object, or none.
#[derive(Clone, Copy)]
struct Keys<'a>(Option<&'a Map<String, Value>>);

pub(super) fn read(config: &Map<String, Value>) -> Result<ModelConfig, ConfigError> {
    let keys = Keys(Some(config));
    let architecture = Architecture::by_name(keys.text("model_type")?.ok_or_else(|| missing("model_type"))?)?;
    keys.refuse_what_is_not_built(architecture)?;
    let embedding = keys.required("hidden_size", MAX_WIDTH)?;
    let rope = keys.rope()?;
    let attention = keys.attention(architecture, embedding, rope)?;
    Ok(ModelConfig {
        architecture,
        layers: keys.required("num_hidden_layers", MAX_LAYERS)?,
        embedding,
        feed_forward: keys.required("intermediate_size", MAX_WIDTH)?,
        vocabulary: keys.required("vocab_size", TokenId::MAX as usize)?,
        context_length: keys.required("max_position_embeddings", MAX_CONTEXT)?,
        rope_factors: keys.rope_factors(rope, &attention)?,
        attention,
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
        epsilon: keys.number("rms_norm_eps")?.ok_or_else(|| missing("rms_norm_eps"))? as f32,
        tied_embedding: keys.flag("tie_word_embeddings")?.unwrap_or(false),
    })
}

fn missing(key: &str) -> ConfigError {
    ConfigError::Inconsistent(format!("config.json has no '{key}'"))
}

impl<'a> Keys<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.0?.get(key)
    }

    /// What `convert` makes of a value that is there and not null.
    fn typed<T>(self, key: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(ConfigError::Inconsistent(format!("config.json: '{key}' is {value}"))),
        }
    }

    /// A count in `1..=limit`.
    fn count(self, key: &str, limit: usize) -> Result<Option<usize>, ConfigError> {
        self.typed(key, |value| {
            let count = usize::try_from(value.as_u64()?).ok()?;
            (1..=limit).contains(&count).then_some(count)
        })
    }

    fn required(self, key: &str, limit: usize) -> Result<usize, ConfigError> {
        self.count(key, limit)?.ok_or_else(|| missing(key))
    }

    /// A number above zero, as an f32, too.
    fn number(self, key: &str) -> Result<Option<f64>, ConfigError> {
        let sound = |x: &f64| (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(x);
        self.typed(key, |value| value.as_f64().filter(sound))
    }

    fn flag(self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, Value::as_bool)
    }

    fn text(self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, Value::as_str)
    }

    /// How positions are rotated: `rope_scaling` (transformers 4, only where scaled) goes before `rope_parameters` (5).
    fn rope(self) -> Result<Keys<'a>, ConfigError> {
        let object = |key| Ok::<_, ConfigError>(self.typed(key, Value::as_object)?.filter(|rope| !rope.is_empty()));
        let rope = object("rope_scaling")?.or(object("rope_parameters")?);
        if rope.is_some_and(|rope| rope.values().any(Value::is_object)) {
            return Err(ConfigError::Unsupported(
                "RoPE of its own for each type of layer".into(),
            ));
        }
        Ok(Keys(rope))
    }

    fn attention(
        self,
        architecture: Architecture,
        embedding: usize,
        rope: Keys<'_>,
    ) -> Result<AttentionShape, ConfigError> {
        let heads = self.required("num_attention_heads", MAX_WIDTH)?;
        let head_dim = match self.count("head_dim", MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            // Its default is no quotient.
            None if architecture == Architecture::Qwen3 => return Err(missing("head_dim")),
            None if embedding.is_multiple_of(heads) => embedding / heads,
            None => {
                return Err(ConfigError::Inconsistent(format!(
                    "{embedding} columns do not divide into {heads} heads"
                )));
            }
        };
        let kv_heads = match self.count("num_key_value_heads", MAX_WIDTH)? {
            Some(kv_heads) => kv_heads,
            // Files from before grouped heads.
            None if architecture == Architecture::Llama => heads,
            None => return Err(missing("num_key_value_heads")),
        };
        let rope_base = match rope.number("rope_theta")? {
            Some(base) => base,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let window = match architecture {
            // Null: none. Not said: transformers' default.
            Architecture::Mistral if self.get("sliding_window").is_none() => Some(4096),
            Architecture::Mistral => self.count("sliding_window", usize::MAX)?,
            _ => None,
        };
        Ok(AttentionShape {
            heads,
            kv_heads,
            head_dim,
            rope_dim: head_dim,
            rope_base,
            rope_interleaved: false,
            window,
        })
    }

    fn rope_factors(self, rope: Keys<'_>, shape: &AttentionShape) -> Result<Vec<f64>, ConfigError> {
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let required = |key: &str| rope.number(key)?.ok_or_else(|| missing(key));
        let pairs = 0..shape.rope_dim / 2;
        match kind {
            "default" => Ok(Vec::new()),
            "linear" => {
                let factor = required("factor")?;
                Ok(pairs.map(|_| factor).collect())
            }
            "llama3" => {
                let scaling = Llama3 {
                    factor: required("factor")?,
                    low: required("low_freq_factor")?,
                    high: required("high_freq_factor")?,
                    trained: match self.number("original_max_position_embeddings")? {
                        Some(trained) => trained,
                        None => required("original_max_position_embeddings")?,
                    },
                };
                if scaling.low >= scaling.high {
                    return Err(ConfigError::Inconsistent(format!(
                        "RoPE's low frequency factor {} is not below its high {}",
                        scaling.low, scaling.high
                    )));
                }
                let frequency = |pair| power(shape.rope_base, -2.0 * pair as f64 / shape.rope_dim as f64);
                Ok(pairs.map(|pair| scaling.of_wave(2.0 * PI / frequency(pair))).collect())
            }
            other => Err(ConfigError::Unsupported(format!("the RoPE scaling '{other}'"))),
        }
    }

    fn refuse_what_is_not_built(self, architecture: Architecture) -> Result<(), ConfigError> {
        let refuse = |what: &str| Err(ConfigError::Unsupported(what.to_owned()));
        if self.typed("quantization_config", Some)?.is_some() {
            return refuse("a quantisation of its own ('quantization_config')");
        }
        if let Some(activation) = self.text("hidden_act")?
            && activation != "silu"
        {
            return refuse(&format!("the activation '{activation}'"));
        }
        // Qwen2 has its biases whatever is said; elsewhere the output would have one, too.
        if architecture != Architecture::Qwen2 && self.flag("attention_bias")? == Some(true) {
            return refuse("biases in attention ('attention_bias')");
        }
        if self.flag("mlp_bias")? == Some(true) {
            return refuse("biases in the feed-forward block ('mlp_bias')");
        }
        for keys in [self, self.rope()?] {
            if keys.number("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
                return refuse("heads that are rotated in part ('partial_rotary_factor')");
            }
        }
        let full = |kind: &Value| kind == "full_attention";
        let types = self.typed("layer_types", Value::as_array)?;
        let by_layer = match architecture {
            Architecture::Mistral => types.is_some(),
            _ => types.is_some_and(|types| !types.iter().all(full)) || self.flag("use_sliding_window")? == Some(true),
        };
        if by_layer {
            return refuse("a sliding attention window on some layers");
        }
        Ok(())
    }
}

/// Llama 3's scaling of RoPE (transformers, `_compute_llama3_parameters`): long waves are slowed down, short ones are not, those between in part.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    /// Tokens of the context that the model was trained with before.
    trained: f64,
}

impl Llama3 {
    /// What the frequency of a wave of so many tokens is divided by.
    fn of_wave(&self, wave: f64) -> f64 {
        if wave < self.trained / self.high {
            1.0
        } else if wave > self.trained / self.low {
            self.factor
        } else {
            let short = (self.trained / wave - self.low) / (self.high - self.low);
            1.0 / ((1.0 - short) / self.factor + short)
        }
    }
}
