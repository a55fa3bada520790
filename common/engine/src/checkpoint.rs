//! Where a model's tensors come from, under one set of names: GGUF's.

mod directory;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use baton_gguf::{Gguf, Tensor};

use crate::{ConfigError, open::OpenError};

pub(crate) use directory::Directory;

/// An open model.
pub(crate) enum Checkpoint {
    /// A GGUF file.
    Gguf(Gguf),
    /// A Hugging Face directory.
    Directory(Directory),
}

impl Checkpoint {
    /// Maps a model and checks its structure.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        if path.is_dir() {
            return Directory::open(path).map(Self::Directory);
        }
        Gguf::open(path)
            .map(Self::Gguf)
            .map_err(|error| OpenError::from_gguf(path, error))
    }

    /// A tensor by GGUF's name for it; the tensor itself has the name that the model's file gives it.
    pub(crate) fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        match self {
            Self::Gguf(gguf) => gguf.tensor(name),
            Self::Directory(directory) => directory.tensor(name),
        }
    }

    /// A tensor that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<Tensor<'_>, ConfigError> {
        self.tensor(name)
            .ok_or_else(|| ConfigError::MissingTensor(self.own_name(name).into_owned()))
    }

    /// The model's own name for the tensor that GGUF calls `name`.
    pub(crate) fn own_name<'n>(&self, name: &'n str) -> Cow<'n, str> {
        match self {
            Self::Gguf(_) => name.into(),
            Self::Directory(_) => directory::own_name(name),
        }
    }

    /// All tensors, under their own names, in no order.
    pub(crate) fn tensors(&self) -> Vec<Tensor<'_>> {
        match self {
            Self::Gguf(gguf) => gguf
                .tensors()
                .iter()
                .filter_map(|entry| gguf.tensor(&entry.name))
                .collect(),
            Self::Directory(directory) => directory.tensors(),
        }
    }

    /// Numbers in all tensors.
    pub(crate) fn parameters(&self) -> u64 {
        let numbers = |tensor: &Tensor<'_>| tensor.rows as u64 * tensor.columns as u64;
        self.tensors().iter().map(numbers).sum()
    }

    /// Bytes of all files of weights.
    pub(crate) fn file_bytes(&self) -> u64 {
        match self {
            Self::Gguf(gguf) => gguf.bytes_all().len() as u64,
            Self::Directory(directory) => directory.file_bytes(),
        }
    }

    /// The files that hold the weights, when `path` was opened.
    pub(crate) fn weight_files(&self, path: &Path) -> Vec<PathBuf> {
        match self {
            Self::Gguf(_) => vec![path.to_owned()],
            Self::Directory(directory) => directory.files().to_vec(),
        }
    }

    /// What clients call the model.
    pub(crate) fn model_name(&self, path: &Path) -> String {
        match self {
            Self::Gguf(gguf) => baton_gguf::model_name(gguf, path),
            Self::Directory(_) => baton_gguf::directory_name(path),
        }
    }
}
