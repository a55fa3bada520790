//! An open GGUF file.

use std::{collections::HashMap, path::Path};

use crate::{
    GgufError,
    bytes::Bytes,
    parse::{self, Parsed},
    tensor::{Tensor, TensorEntry},
    value::{Array, Value},
};

/// An open GGUF file: its metadata in memory, its tensors in the map.
pub struct Gguf {
    bytes: Bytes,
    version: u32,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Maps and checks a file. Reads the header only; tensor bytes are paged in when used.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        Self::from_source(Bytes::map(path)?)
    }

    /// The same over bytes in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf, GgufError> {
        Self::from_source(Bytes::Owned(bytes))
    }

    fn from_source(bytes: Bytes) -> Result<Gguf, GgufError> {
        let Parsed {
            version,
            metadata,
            tensors,
        } = parse::parse(&bytes)?;
        let by_name = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.clone(), index))
            .collect();
        Ok(Gguf {
            bytes,
            version,
            metadata,
            tensors,
            by_name,
        })
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The whole file, for hashing.
    pub fn bytes_all(&self) -> &[u8] {
        &self.bytes
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let entry = &self.tensors[*self.by_name.get(name)?];
        Some(Tensor {
            name: &entry.name,
            rows: entry.rows,
            columns: entry.columns,
            dtype: entry.dtype,
            bytes: &self.bytes[entry.start..entry.start + entry.len],
        })
    }

    /// A metadata value by its key.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata, in no order.
    pub fn metadata_all(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A required integer of any width that fits.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.typed(key, "a 32-bit unsigned integer", |value| {
            value.as_u64().and_then(|v| v.try_into().ok())
        })
    }

    /// A required integer of any width that fits.
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        self.typed(key, "an unsigned integer", Value::as_u64)
    }

    /// A required floating-point number.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.typed(key, "a floating-point number", Value::as_f32)
    }

    /// A required boolean.
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// A required string.
    pub fn string(&self, key: &str) -> Result<&str, GgufError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A required array of any element type.
    pub fn array(&self, key: &str) -> Result<&Array, GgufError> {
        self.typed(key, "an array", Value::as_array)
    }

    /// A required array of strings.
    pub fn array_string(&self, key: &str) -> Result<&[String], GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// A required array of 32-bit integers (signed in the file or not), none negative.
    pub fn array_u32(&self, key: &str) -> Result<Vec<u32>, GgufError> {
        self.typed(key, "an array of 32-bit unsigned integers", |value| match value {
            Value::Array(Array::U32(numbers)) => Some(numbers.clone()),
            Value::Array(Array::I32(numbers)) => numbers.iter().map(|&n| n.try_into().ok()).collect(),
            _ => None,
        })
    }

    /// A required array of single-precision numbers.
    pub fn array_f32(&self, key: &str) -> Result<&[f32], GgufError> {
        self.typed(key, "an array of floating-point numbers", |value| match value {
            Value::Array(Array::F32(numbers)) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, GgufError> {
        let value = self.metadata.get(key).ok_or_else(|| GgufError::Missing(key.into()))?;
        convert(value).ok_or_else(|| GgufError::WrongType {
            key: key.into(),
            expected,
            found: value.describe(),
        })
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("bytes", &self.bytes.len())
            .field("metadata", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}
