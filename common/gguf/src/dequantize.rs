//! Rows of a tensor as f32: the plain scalar definition of each storage type.

use half::{bf16, f16};

use crate::tensor::{Tensor, TensorType};

/// Why a row cannot be expanded.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DequantizeError {
    /// The storage type is not built yet.
    #[error("tensor '{name}' is stored as {dtype}, which is not supported yet")]
    Unsupported {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: TensorType,
    },
    /// The row does not exist.
    #[error("tensor '{name}' has {rows} rows, no row {row}")]
    Row {
        /// The tensor.
        name: String,
        /// The row asked for.
        row: usize,
        /// How many it has.
        rows: usize,
    },
    /// The output has another length than the row.
    #[error("tensor '{name}' has {columns} columns, not {len}")]
    Columns {
        /// The tensor.
        name: String,
        /// How many it has.
        columns: usize,
        /// The output's length.
        len: usize,
    },
}

/// Expands one row into `out[columns]`. Quantised values are `d * q` or `d * q + m`, each operation rounded to f32.
pub fn dequantize(tensor: &Tensor<'_>, row: usize, out: &mut [f32]) -> Result<(), DequantizeError> {
    let unsupported = || DequantizeError::Unsupported {
        name: tensor.name.into(),
        dtype: tensor.dtype,
    };
    if row >= tensor.rows {
        return Err(DequantizeError::Row {
            name: tensor.name.into(),
            row,
            rows: tensor.rows,
        });
    }
    if out.len() != tensor.columns {
        return Err(DequantizeError::Columns {
            name: tensor.name.into(),
            columns: tensor.columns,
            len: out.len(),
        });
    }
    let row_bytes = tensor.dtype.row_bytes(tensor.columns).ok_or_else(unsupported)?;
    let bytes = &tensor.bytes[row * row_bytes..][..row_bytes];
    match tensor.dtype {
        TensorType::F32 => each(bytes, out, |b: [u8; 4], o: &mut [f32; 1]| o[0] = f32::from_le_bytes(b)),
        TensorType::F16 => each(bytes, out, |b: [u8; 2], o: &mut [f32; 1]| {
            o[0] = f16::from_le_bytes(b).to_f32()
        }),
        TensorType::Bf16 => each(bytes, out, |b: [u8; 2], o: &mut [f32; 1]| {
            o[0] = bf16::from_le_bytes(b).to_f32()
        }),
        TensorType::Q4_0 => each(bytes, out, |b: [u8; 18], o: &mut [f32; 32]| {
            let d = half_at(&b, 0);
            for (i, &pair) in b[2..].iter().enumerate() {
                o[i] = (f32::from(pair & 15) - 8.0) * d;
                o[i + 16] = (f32::from(pair >> 4) - 8.0) * d;
            }
        }),
        TensorType::Q4_1 => each(bytes, out, |b: [u8; 20], o: &mut [f32; 32]| {
            let (d, m) = (half_at(&b, 0), half_at(&b, 2));
            for (i, &pair) in b[4..].iter().enumerate() {
                o[i] = f32::from(pair & 15) * d + m;
                o[i + 16] = f32::from(pair >> 4) * d + m;
            }
        }),
        TensorType::Q8_0 => each(bytes, out, |b: [u8; 34], o: &mut [f32; 32]| {
            let d = half_at(&b, 0);
            for (o, &q) in o.iter_mut().zip(&b[2..]) {
                *o = f32::from(q as i8) * d;
            }
        }),
        TensorType::Q5_0
        | TensorType::Q5_1
        | TensorType::Q4K
        | TensorType::Q5K
        | TensorType::Q6K
        | TensorType::Other(_) => {
            return Err(unsupported());
        }
    }
    Ok(())
}

/// Runs `block` over each block of `BYTES` bytes and its `NUMBERS` numbers.
fn each<const BYTES: usize, const NUMBERS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn([u8; BYTES], &mut [f32; NUMBERS]),
) {
    for (&bytes, out) in bytes
        .as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<NUMBERS>().0)
    {
        block(bytes, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
