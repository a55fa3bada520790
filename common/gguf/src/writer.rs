//! Writes GGUF files: tiny ones in memory, so that tests can make models; large ones tensor by tensor.

use std::io;

use crate::{
    tensor::TensorType,
    value::{Array, Value},
};

const ALIGNMENT: usize = 32;

/// Builds a version 3 file in memory. It checks nothing: tests use it to make broken files, too.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufWriter {
    /// A file with no metadata and no tensor.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata value.
    pub fn value(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a 32-bit unsigned integer.
    pub fn u32(self, key: &str, value: u32) -> Self {
        self.value(key, Value::U32(value))
    }

    /// Adds a single-precision number.
    pub fn f32(self, key: &str, value: f32) -> Self {
        self.value(key, Value::F32(value))
    }

    /// Adds a string.
    pub fn string(self, key: &str, value: &str) -> Self {
        self.value(key, Value::String(value.into()))
    }

    /// Adds an array of strings.
    pub fn strings<S: AsRef<str>>(self, key: &str, values: &[S]) -> Self {
        let values = values.iter().map(|value| value.as_ref().to_owned()).collect();
        self.value(key, Value::Array(Array::String(values)))
    }

    /// Adds a tensor. `dimensions` are in the file's order: columns (contiguous) first, then rows.
    pub fn tensor(mut self, name: &str, dimensions: &[u64], dtype: TensorType, bytes: Vec<u8>) -> Self {
        self.tensors
            .push((name.into(), dimensions.into(), dtype.number(), bytes));
        self
    }

    /// Adds an F32 tensor of shape `[rows, columns]`; a vector if `rows` is 1.
    pub fn tensor_f32(self, name: &str, rows: u64, columns: u64, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let dimensions: &[u64] = if rows == 1 { &[columns] } else { &[columns, rows] };
        self.tensor(name, dimensions, TensorType::F32, bytes)
    }

    /// The file's bytes.
    pub fn finish(self) -> Vec<u8> {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, dimensions, dtype, bytes)| (name.as_str(), dimensions.as_slice(), *dtype, bytes.len()));
        let mut out = self.head(tensors);
        for (_, _, _, bytes) in &self.tensors {
            out.extend(bytes);
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        }
        out
    }

    /// Writes a file of this metadata and `tensors` (name, columns, rows, type; no tensor was added before), of which one at a time is in memory:
    /// `bytes` gives the named one's, of the length that it is told.
    ///
    /// # Panics
    /// When a row is not whole blocks of its type, or `bytes` gives another length.
    pub fn stream(
        self,
        out: &mut impl io::Write,
        tensors: &[(String, u64, u64, TensorType)],
        mut bytes: impl FnMut(&str, usize) -> Vec<u8>,
    ) -> io::Result<()> {
        assert!(
            self.tensors.is_empty(),
            "tensors in memory beside those that are streamed"
        );
        let len = |&(_, columns, rows, dtype): &(String, u64, u64, TensorType)| {
            dtype.row_bytes(columns as usize).expect("whole blocks") * rows as usize
        };
        let dimensions: Vec<[u64; 2]> = tensors.iter().map(|tensor| [tensor.1, tensor.2]).collect();
        let entries = tensors.iter().zip(&dimensions).map(|(tensor, dimensions)| {
            let dimensions = if tensor.2 == 1 {
                &dimensions[..1]
            } else {
                &dimensions[..]
            };
            (tensor.0.as_str(), dimensions, tensor.3.number(), len(tensor))
        });
        out.write_all(&self.head(entries))?;
        for tensor in tensors {
            let mut bytes = bytes(&tensor.0, len(tensor));
            assert_eq!(bytes.len(), len(tensor), "bytes of {}", tensor.0);
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    /// All before the first tensor's bytes; `tensors` are (name, dimensions, number of the type, bytes).
    fn head<'a>(&self, tensors: impl ExactSizeIterator<Item = (&'a str, &'a [u64], u32, usize)>) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0;
        for (name, dimensions, dtype, len) in tensors {
            put_string(&mut out, name);
            out.extend((dimensions.len() as u32).to_le_bytes());
            out.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
            out.extend(dtype.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += len.next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut scalar = |number: u32, bytes: &[u8]| {
        out.extend(number.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(v) => scalar(0, &v.to_le_bytes()),
        Value::I8(v) => scalar(1, &v.to_le_bytes()),
        Value::U16(v) => scalar(2, &v.to_le_bytes()),
        Value::I16(v) => scalar(3, &v.to_le_bytes()),
        Value::U32(v) => scalar(4, &v.to_le_bytes()),
        Value::I32(v) => scalar(5, &v.to_le_bytes()),
        Value::F32(v) => scalar(6, &v.to_le_bytes()),
        Value::Bool(v) => scalar(7, &[u8::from(*v)]),
        Value::U64(v) => scalar(10, &v.to_le_bytes()),
        Value::I64(v) => scalar(11, &v.to_le_bytes()),
        Value::F64(v) => scalar(12, &v.to_le_bytes()),
        Value::String(v) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, v);
        }
        Value::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let len = (array.len() as u64).to_le_bytes();
    let mut numbers = |number: u32, bytes: Vec<u8>| {
        out.extend(number.to_le_bytes());
        out.extend(len);
        out.extend(bytes);
    };
    match array {
        Array::U8(v) => numbers(0, v.clone()),
        Array::I8(v) => numbers(1, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::U16(v) => numbers(2, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::I16(v) => numbers(3, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::U32(v) => numbers(4, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::I32(v) => numbers(5, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::F32(v) => numbers(6, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::Bool(v) => numbers(7, v.iter().map(|&v| u8::from(v)).collect()),
        Array::U64(v) => numbers(10, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::I64(v) => numbers(11, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::F64(v) => numbers(12, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Array::String(v) => {
            let mut bytes = Vec::new();
            v.iter().for_each(|text| put_string(&mut bytes, text));
            numbers(8, bytes);
        }
    }
}
