//! What a revision of a model consists of.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::Deserialize;

use super::name::is_part;

pub(super) const CONFIG: &str = "config.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What a model may do without.
pub(super) const OPTIONAL: [&str; 3] = ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];

/// Bytes of an index of shards: the largest have a few million.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// What a hub says of a revision.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub(super) sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Sibling {
    pub(super) rfilename: String,
    pub(super) size: Option<u64>,
    pub(super) lfs: Option<Lfs>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Lfs {
    pub(super) sha256: Option<String>,
}

/// The part of an index that is needed.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Listing {
    pub(super) fn find(&self, file: &str) -> Option<&Sibling> {
        self.siblings.iter().find(|sibling| sibling.rfilename == file)
    }

    pub(super) fn ggufs(&self) -> Vec<String> {
        let names = self.siblings.iter().map(|sibling| &sibling.rfilename);
        names.filter(|name| name.ends_with(".gguf")).cloned().collect()
    }
}

/// The files of weights that a snapshot should have.
pub(super) fn weights(snapshot: &Path) -> Result<Vec<String>, String> {
    let path = snapshot.join(INDEX);
    let Ok(file) = File::open(&path) else {
        return Ok(vec![WEIGHTS.to_owned()]);
    };
    let index: Index = serde_json::from_reader(io::BufReader::new(file.take(MAX_INDEX_BYTES)))
        .map_err(|error| format!("{INDEX}: {error}"))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    match shards.iter().find(|shard| !is_part(shard)) {
        Some(shard) => Err(format!("{INDEX} names {shard:?}")),
        None => Ok(shards),
    }
}
