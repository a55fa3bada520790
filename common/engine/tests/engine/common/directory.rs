//! The tiny model directories of `tests/goldens`, and altered copies of them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tempfile::TempDir;

/// A directory of `tests/goldens/tiny`, or a file there.
pub(crate) fn tiny_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens/tiny")
        .join(name)
}

/// A copy that a test may change.
pub(crate) struct Copy(TempDir);

impl Copy {
    pub(crate) fn of(name: &str) -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        for entry in fs::read_dir(tiny_path(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.file(entry.file_name().to_str().unwrap())).unwrap();
        }
        copy
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Changes the object in a JSON file.
    pub(crate) fn edit(self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) -> Self {
        let mut json: Map<String, Value> = serde_json::from_slice(&fs::read(self.file(name)).unwrap()).unwrap();
        change(&mut json);
        fs::write(self.file(name), serde_json::to_vec(&json).unwrap()).unwrap();
        self
    }

    /// Sets keys of `config.json`.
    pub(crate) fn with<const N: usize>(self, keys: [(&str, Value); N]) -> Self {
        self.edit("config.json", |config| {
            config.extend(keys.map(|(key, value)| (key.to_owned(), value)));
        })
    }

    /// Takes a key out of `config.json`.
    pub(crate) fn without(self, key: &str) -> Self {
        self.edit("config.json", |config| {
            config.remove(key).expect("a key that is there");
        })
    }

    /// Changes the bytes of a file.
    pub(crate) fn damage(self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.file(name)).unwrap();
        change(&mut bytes);
        fs::write(self.file(name), bytes).unwrap();
        self
    }
}
