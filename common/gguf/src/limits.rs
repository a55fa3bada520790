//! The most that a file may ask of its reader.

/// Dimensions of a tensor: what the format's own reader allows.
pub const MAX_DIMENSIONS: u32 = 4;
/// Bytes of a key or of a tensor's name: the format allows keys of 65,535 bytes.
pub const MAX_NAME_BYTES: u64 = 65_535;
/// Bytes of one metadata string: chat templates are the longest, some hundred KiB.
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// Elements of one metadata array: vocabularies and merges have some hundred thousand.
pub const MAX_ARRAY_LEN: u64 = 8 << 20;
/// Metadata entries: real files have below a hundred.
pub const MAX_METADATA_ENTRIES: u64 = 65_536;
/// Tensors: the largest models have some thousand.
pub const MAX_TENSORS: u64 = 1 << 20;
/// Bytes of the header, all metadata and all tensor descriptions: bounds what is held outside the map to a few times this.
pub const MAX_HEADER_BYTES: usize = 256 << 20;
/// Alignment of tensor data: 32 by default.
pub const MAX_ALIGNMENT: u32 = 1 << 20;
