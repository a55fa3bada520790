//! Tensors and their types.

/// How a tensor's numbers are stored. Names are the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    /// A type whose layout this reader does not know: its number in the file.
    Other(u32),
}

impl TensorType {
    /// The type with this number in the file.
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => TensorType::F32,
            1 => TensorType::F16,
            2 => TensorType::Q4_0,
            3 => TensorType::Q4_1,
            6 => TensorType::Q5_0,
            7 => TensorType::Q5_1,
            8 => TensorType::Q8_0,
            12 => TensorType::Q4K,
            13 => TensorType::Q5K,
            14 => TensorType::Q6K,
            30 => TensorType::Bf16,
            other => TensorType::Other(other),
        }
    }

    /// The type's number in the file.
    pub fn number(self) -> u32 {
        match self {
            TensorType::F32 => 0,
            TensorType::F16 => 1,
            TensorType::Q4_0 => 2,
            TensorType::Q4_1 => 3,
            TensorType::Q5_0 => 6,
            TensorType::Q5_1 => 7,
            TensorType::Q8_0 => 8,
            TensorType::Q4K => 12,
            TensorType::Q5K => 13,
            TensorType::Q6K => 14,
            TensorType::Bf16 => 30,
            TensorType::Other(number) => number,
        }
    }

    /// (numbers, bytes) of one block; `None` for [`TensorType::Other`].
    pub fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            TensorType::F32 => (1, 4),
            TensorType::F16 | TensorType::Bf16 => (1, 2),
            TensorType::Q4_0 => (32, 18),
            TensorType::Q4_1 => (32, 20),
            TensorType::Q5_0 => (32, 22),
            TensorType::Q5_1 => (32, 24),
            TensorType::Q8_0 => (32, 34),
            TensorType::Q4K => (256, 144),
            TensorType::Q5K => (256, 176),
            TensorType::Q6K => (256, 210),
            TensorType::Other(_) => return None,
        })
    }

    /// Bytes of a row of `columns` numbers; `None` if the type is unknown, the row is not whole blocks, or the size overflows.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let (numbers, bytes) = self.block()?;
        if !columns.is_multiple_of(numbers) {
            return None;
        }
        (columns / numbers).checked_mul(bytes)
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TensorType::Bf16 => f.write_str("BF16"),
            TensorType::Q4K => f.write_str("Q4_K"),
            TensorType::Q5K => f.write_str("Q5_K"),
            TensorType::Q6K => f.write_str("Q6_K"),
            TensorType::Other(number) => write!(f, "type {number}"),
            known => write!(f, "{known:?}"),
        }
    }
}

/// Where a tensor lies. Shape `[rows, columns]`, columns contiguous; dimensions beyond the second count as rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// The tensor's name, unique in the file.
    pub name: String,
    /// Rows (n); 1 for a vector.
    pub rows: usize,
    /// Columns (k), contiguous.
    pub columns: usize,
    /// How its numbers are stored.
    pub dtype: TensorType,
    /// First byte, counted from the start of the file.
    pub start: usize,
    /// Bytes; 0 for [`TensorType::Other`], whose size this reader does not know.
    pub len: usize,
}

/// A tensor's bytes, borrowed from the file's map. Shape `[rows, columns]`, columns contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Rows (n); 1 for a vector.
    pub rows: usize,
    /// Columns (k), contiguous.
    pub columns: usize,
    /// How its numbers are stored.
    pub dtype: TensorType,
    /// `rows` rows of [`TensorType::row_bytes`] bytes; empty for [`TensorType::Other`].
    pub bytes: &'a [u8],
}
