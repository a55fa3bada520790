//! What a model file or directory holds, for `baton model info`.

use std::{collections::BTreeMap, fmt, path::Path};

use baton_kv::KvIdentity;

use crate::{
    ModelConfig,
    checkpoint::Checkpoint,
    identity,
    open::{BLOCK_TOKENS, OpenError},
};

/// A model file or directory, read and checked.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelSummary {
    /// Name as clients use it.
    pub name: String,
    /// Shapes and limits.
    pub config: ModelConfig,
    /// Storage type → (tensors, bytes).
    pub types: BTreeMap<String, (usize, u64)>,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Bytes of all files of weights.
    pub file_bytes: u64,
    /// Bytes of KV per token.
    pub kv_token_bytes: usize,
    /// What its KV means.
    pub identity: KvIdentity,
}

impl ModelSummary {
    /// Reads all weights, on `threads` threads.
    pub fn of_file(path: &Path, threads: usize) -> Result<Self, OpenError> {
        let checkpoint = Checkpoint::open(path)?;
        let config = ModelConfig::of(&checkpoint)?;
        let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for tensor in checkpoint.tensors() {
            let (tensors, bytes) = types.entry(tensor.dtype.to_string()).or_default();
            *tensors += 1;
            *bytes += tensor.bytes.len() as u64;
        }
        Ok(Self {
            name: checkpoint.model_name(path),
            types,
            parameters: checkpoint.parameters(),
            file_bytes: checkpoint.file_bytes(),
            kv_token_bytes: config.layout(BLOCK_TOKENS).token_bytes(),
            identity: identity::of_model(
                &config,
                &checkpoint.tensors(),
                &identity::weights(&checkpoint, threads, &|_| {}),
            ),
            config,
        })
    }
}

/// One line per fact: a label, padded, and its value.
impl fmt::Display for ModelSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        let shape = &config.attention;
        let types: Vec<String> = self
            .types
            .iter()
            .map(|(name, (tensors, bytes))| format!("{name} × {tensors} ({} MB)", bytes / 1_000_000))
            .collect();
        let lines = [
            ("name", self.name.clone()),
            ("architecture", config.architecture.name().to_owned()),
            ("parameters", format!("{:.1} M", self.parameters as f64 / 1e6)),
            ("file", format!("{} MB", self.file_bytes / 1_000_000)),
            ("tensors", types.join(", ")),
            ("layers", config.layers.to_string()),
            ("embedding", config.embedding.to_string()),
            ("feed forward", config.feed_forward.to_string()),
            (
                "heads",
                format!("{} ({} KV) of {}", shape.heads, shape.kv_heads, shape.head_dim),
            ),
            (
                "RoPE base",
                format!(
                    "{}{}",
                    shape.rope_base,
                    if config.rope_factors.is_empty() {
                        ""
                    } else {
                        " (scaled)"
                    }
                ),
            ),
            (
                "window",
                shape
                    .window
                    .map_or("none".to_owned(), |window| format!("{window} tokens")),
            ),
            (
                "vocabulary",
                format!(
                    "{}{}",
                    config.vocabulary,
                    if config.tied_embedding { " (tied)" } else { "" }
                ),
            ),
            ("context", format!("{} tokens", config.context_length)),
            ("KV per token", format!("{} bytes", self.kv_token_bytes)),
            ("KV identity", self.identity.to_string()),
        ];
        lines
            .iter()
            .try_for_each(|(label, value)| writeln!(f, "{label:<14}{value}"))
    }
}
