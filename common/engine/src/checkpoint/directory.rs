//! A model directory as Hugging Face lays it out: `config.json`, and weights in `model.safetensors` or in shards that
//! `model.safetensors.index.json` lists.
#![allow(unsafe_code)]

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use baton_gguf::{Tensor, TensorType, open_regular};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

use crate::open::OpenError;

/// Bytes of `config.json` at most: real ones have a few KiB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Bytes of an index at most: those of the largest models have some MiB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Shards at most: the largest models have below two hundred.
const MAX_SHARDS: usize = 4096;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// An open directory: its weights stay in the maps.
pub(crate) struct Directory {
    /// `config.json`.
    pub(crate) config: Map<String, Value>,
    /// Of each map.
    files: Vec<PathBuf>,
    maps: Vec<Mmap>,
    /// By the names that the files give them.
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
struct Entry {
    map: usize,
    start: usize,
    len: usize,
    rows: usize,
    columns: usize,
    dtype: TensorType,
}

impl Directory {
    /// Maps all files of weights and checks their headers, and that each shard holds what the index says.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let mut directory = Self {
            config: read_json(&path.join("config.json"), MAX_CONFIG_BYTES)?,
            files: Vec::new(),
            maps: Vec::new(),
            entries: BTreeMap::new(),
        };
        let (whole, index) = (
            path.join("model.safetensors"),
            path.join("model.safetensors.index.json"),
        );
        // As transformers does: where there is one file of all weights, no index is looked at.
        if whole.exists() || !index.exists() {
            directory.add(&whole)?;
        } else {
            for (shard, tensors) in shards(&index)? {
                directory.add(&path.join(&shard))?;
                let map = directory.maps.len() - 1;
                for name in tensors {
                    if directory.entries.get(&name).is_none_or(|entry| entry.map != map) {
                        return Err(corrupt(&index, format!("tensor '{name}' is not in '{shard}'")));
                    }
                }
            }
        }
        directory.leave_out_copies()?;
        Ok(directory)
    }

    /// Maps one file of weights and takes in its tensors.
    fn add(&mut self, path: &Path) -> Result<(), OpenError> {
        let file = open_regular(path).map_err(|reason| not_found(path, reason))?;
        // SAFETY: the map is private and read-only. Model files are replaced by rename, never written in place; a process that truncates one under
        // us gets us killed (SIGBUS), it cannot make us read outside the map.
        let map = unsafe { Mmap::map(&file) }.map_err(|reason| not_found(path, reason))?;
        // Refuses headers that do not fit, and offsets that overlap, leave holes, or do not end with the file.
        let tensors = SafeTensors::deserialize(&map).map_err(|error| corrupt(path, error))?;
        let start = map.as_ptr() as usize;
        for (name, view) in tensors.iter() {
            // Old files keep RoPE's frequencies, which follow from its base.
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let unsupported = |what: String| OpenError::Unsupported(format!("tensor '{name}' {what}"));
            let (rows, columns) = match *view.shape() {
                [columns] => (1, columns),
                [rows, columns] => (rows, columns),
                ref shape => return Err(unsupported(format!("of shape {shape:?}"))),
            };
            let dtype = match view.dtype() {
                Dtype::F32 => TensorType::F32,
                Dtype::F16 => TensorType::F16,
                Dtype::BF16 => TensorType::Bf16,
                other => return Err(unsupported(format!("stored as {other}"))),
            };
            let entry = Entry {
                map: self.maps.len(),
                start: view.data().as_ptr() as usize - start,
                len: view.data().len(),
                rows,
                columns,
                dtype,
            };
            if self.entries.insert(name.to_owned(), entry).is_some() {
                return Err(corrupt(path, format!("tensor '{name}' is in another file, too")));
            }
        }
        self.files.push(path.to_owned());
        self.maps.push(map);
        Ok(())
    }

    /// Some files hold a tied head all the same. One that differs would change the answer, whichever was used.
    fn leave_out_copies(&mut self) -> Result<(), OpenError> {
        if self.config.get("tie_word_embeddings") != Some(&Value::Bool(true)) {
            return Ok(());
        }
        if let (Some(head), Some(embedding)) = (self.get(HEAD), self.get(EMBEDDING))
            && head.bytes != embedding.bytes
        {
            return Err(OpenError::Corrupt(format!(
                "config.json ties '{HEAD}' to '{EMBEDDING}', from which it differs"
            )));
        }
        self.entries.remove(HEAD);
        Ok(())
    }

    /// The files of weights.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// A tensor by its own name.
    fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.entries
            .get_key_value(name)
            .map(|(name, entry)| self.view(name, entry))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &Entry) -> Tensor<'a> {
        Tensor {
            name,
            rows: entry.rows,
            columns: entry.columns,
            dtype: entry.dtype,
            bytes: &self.maps[entry.map][entry.start..][..entry.len],
        }
    }

    /// A tensor by GGUF's name for it.
    pub(crate) fn tensor(&self, gguf_name: &str) -> Option<Tensor<'_>> {
        self.get(&own_name(gguf_name))
    }

    /// All tensors that the model uses or should not have, under their own names.
    pub(crate) fn tensors(&self) -> Vec<Tensor<'_>> {
        self.entries
            .iter()
            .map(|(name, entry)| self.view(name, entry))
            .collect()
    }

    /// Bytes of all files of weights.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.maps.iter().map(|map| map.len() as u64).sum()
    }
}

/// Hugging Face's name of the tensor that GGUF calls `name`.
pub(crate) fn own_name(name: &str) -> Cow<'_, str> {
    match name {
        "token_embd.weight" => return EMBEDDING.into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return HEAD.into(),
        _ => {}
    }
    let of_layer = || {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let part = match part {
            "attn_norm" => "input_layernorm",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "attn_output" => "self_attn.o_proj",
            "ffn_norm" => "post_attention_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            _ => return None,
        };
        Some(format!("model.layers.{layer}.{part}.{kind}"))
    };
    of_layer().map_or(name.into(), Cow::Owned)
}

/// What an index lists: files of its own directory, and the tensors in each.
fn shards(index: &Path) -> Result<BTreeMap<String, Vec<String>>, OpenError> {
    let mut json = read_json(index, MAX_INDEX_BYTES)?;
    let Some(Value::Object(map)) = json.remove("weight_map") else {
        return Err(corrupt(index, "has no 'weight_map'"));
    };
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let Value::String(file) = file else {
            return Err(corrupt(index, format!("the file of '{tensor}' is {file}")));
        };
        if !is_file_name(&file) {
            return Err(corrupt(index, format!("'{file}' is no file of this directory")));
        }
        shards.entry(file).or_default().push(tensor);
    }
    if !(1..=MAX_SHARDS).contains(&shards.len()) {
        return Err(corrupt(index, format!("lists {} files", shards.len())));
    }
    Ok(shards)
}

/// One plain name: no way out of the directory.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(first)) if first == name)
        && components.next().is_none()
        && !name.contains(['\\', '\0'])
}

/// The object in a JSON file of at most `limit` bytes.
fn read_json(path: &Path, limit: u64) -> Result<Map<String, Value>, OpenError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        open_regular(path)?.take(limit + 1).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|reason| not_found(path, reason))?;
    if text.len() as u64 > limit {
        return Err(corrupt(path, format!("is longer than {limit} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| corrupt(path, error))
}

fn corrupt(path: &Path, what: impl std::fmt::Display) -> OpenError {
    OpenError::Corrupt(format!("{}: {what}", path.display()))
}

fn not_found(path: &Path, reason: io::Error) -> OpenError {
    OpenError::NotFound {
        path: path.to_owned(),
        reason,
    }
}
