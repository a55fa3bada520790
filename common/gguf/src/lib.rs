//! Reads GGUF model files: metadata and tensors, memory-mapped. Knows the format and nothing of models.
//!
//! **Architecture invariants**
//! - A file is hostile until read: every count, length and offset is checked before it is used, and memory is bounded by what the file
//!   really holds ([`limits`]). A corrupt or truncated file is a [`GgufError`], never a panic.
//! - Tensor bytes are never copied: a [`Tensor`] borrows the map.
//!
//! Deliberately absent: big-endian files, version 1, nested arrays, split files, and the meaning of any key but `general.alignment`.

mod bytes;
mod dequantize;
mod error;
mod file;
pub mod limits;
mod name;
mod parse;
mod quants;
mod tensor;
mod value;
mod writer;

pub use bytes::open_regular;
pub use dequantize::{DequantizeError, dequantize};
pub use error::GgufError;
pub use file::Gguf;
pub use name::{directory_name, model_name};
pub use quants::{GROUP, QuantGroup, unpack};
pub use tensor::{Tensor, TensorEntry, TensorType};
pub use value::{Array, Value};
pub use writer::GgufWriter;

#[cfg(test)]
mod tests;
