//! Why a file cannot be read, or a key not used.

/// Why a GGUF file cannot be read, or a metadata key not be used. No retry helps: the file must change.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be opened or mapped.
    #[error("cannot open the model file: {0}")]
    Io(#[from] std::io::Error),
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file")]
    Magic,
    /// A version other than 2 and 3, or a big-endian file.
    #[error("GGUF version {0} is not supported (2 and 3, little endian, are)")]
    Version(u32),
    /// The file ends before what it announces.
    #[error("the file ends within {what} (at byte {at})")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where the file was being read.
        at: usize,
    },
    /// A count or length above its limit.
    #[error("{what} is {value}, above the limit of {limit}")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// What the file says.
        value: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Bytes that must be text are not UTF-8.
    #[error("{what} is not UTF-8 (at byte {at})")]
    Utf8 {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        at: usize,
    },
    /// A metadata type that the format does not have, or an array of arrays.
    #[error("metadata key '{key}' has type {found}, which is not supported")]
    ValueType {
        /// The key.
        key: String,
        /// The type's number.
        found: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata key '{key}' holds a boolean that is neither 0 nor 1")]
    Bool {
        /// The key.
        key: String,
    },
    /// A key or tensor name that occurs twice.
    #[error("{what} '{name}' occurs twice")]
    Duplicate {
        /// `metadata key` or `tensor`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// `general.alignment` is zero, not a power of two, or absurd.
    #[error("alignment {0} is not a power of two within reason")]
    Alignment(u64),
    /// A tensor's shape is empty, overflows, or does not divide into its type's blocks.
    #[error("tensor '{name}' has an impossible shape: {reason}")]
    Shape {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A tensor's bytes are misaligned, overlap another's, or lie outside the file.
    #[error("tensor '{name}' lies at offset {offset}: {reason}")]
    Placement {
        /// The tensor.
        name: String,
        /// Its offset within the tensor data.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key that the reader needs is missing.
    #[error("metadata key '{0}' is missing")]
    Missing(String),
    /// A key has another type than the reader needs, or a number outside its range.
    #[error("metadata key '{key}' is {found}, not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What the reader asked for.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
}

impl GgufError {
    /// A stable code for logs and clients.
    pub fn code(&self) -> &'static str {
        match self {
            GgufError::Io(_) => "model_file_unreadable",
            GgufError::Magic | GgufError::Version(_) => "model_format_unsupported",
            GgufError::Missing(_) | GgufError::WrongType { .. } => "model_metadata_unusable",
            _ => "model_file_corrupt",
        }
    }
}
