//! What a model file holds, for `baton model info`.

use std::{collections::BTreeMap, fmt, path::Path};

use baton_kv::KvIdentity;

use crate::{
    ModelConfig, identity,
    open::{BLOCK_TOKENS, OpenError, parameters, read},
};

/// A model file, read and checked.
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
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of KV per token.
    pub kv_token_bytes: usize,
    /// What its KV means.
    pub identity: KvIdentity,
}

impl ModelSummary {
    /// Reads the whole file, on `threads` threads.
    pub fn of_file(path: &Path, threads: usize) -> Result<Self, OpenError> {
        let gguf = read(path)?;
        let config = ModelConfig::from_gguf(&gguf)?;
        let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for tensor in gguf.tensors() {
            let (tensors, bytes) = types.entry(tensor.dtype.to_string()).or_default();
            *tensors += 1;
            *bytes += tensor.len as u64;
        }
        Ok(Self {
            name: baton_gguf::model_name(&gguf, path),
            types,
            parameters: parameters(&gguf),
            file_bytes: gguf.bytes_all().len() as u64,
            kv_token_bytes: config.layout(BLOCK_TOKENS).token_bytes(),
            identity: identity::of_file(&gguf, &config, threads, &|_| {}),
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
            ("architecture", "llama".to_owned()),
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
            ("RoPE base", shape.rope_base.to_string()),
            (
                "vocabulary",
                format!(
                    "{}{}",
                    config.vocabulary,
                    if config.tied_embedding { " (tied)" } else { "" }
                ),
            ),
            ("context", format!("{} tokens", config.context_length)),
            ("ends with", format!("{:?}", config.eos_ids)),
            ("KV per token", format!("{} bytes", self.kv_token_bytes)),
            ("KV identity", self.identity.to_string()),
        ];
        lines
            .iter()
            .try_for_each(|(label, value)| writeln!(f, "{label:<14}{value}"))
    }
}
