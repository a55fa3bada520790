//! Rows of a tensor as f32: the plain scalar definition of each storage type.

use half::{bf16, f16};

use crate::{
    quants::{GROUP, QuantGroup, unpack},
    tensor::{Tensor, TensorType},
};

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

/// Expands one row into `out[columns]`. Quantised values are scale times quant, with a minimum added or subtracted, each operation rounded to f32.
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
        TensorType::Other(_) => return Err(unsupported()),
        dtype => {
            let groups = out.as_chunks_mut().0;
            unpack(dtype, bytes, |index, group| expand(dtype, group, &mut groups[index]));
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

/// Each operation is rounded to f32; but for the last addition or subtraction of a minimum, all are exact.
fn expand(dtype: TensorType, group: &QuantGroup, out: &mut [f32; GROUP]) {
    let offset = dtype.quant_offset().unwrap_or_default();
    let (scale, min) = (group.scale.to_f32(), group.min.to_f32());
    let [first, second] = group.factors.map(f32::from);
    for (i, (out, &quant)) in out.iter_mut().zip(&group.quants).enumerate() {
        let quant = (i32::from(quant) - offset) as f32;
        *out = match dtype {
            TensorType::Q4_1 | TensorType::Q5_1 => quant * scale + min,
            TensorType::Q4K | TensorType::Q5K => quant * (scale * first) - min * second,
            TensorType::Q6K => quant * (scale * if i < GROUP / 2 { first } else { second }),
            _ => quant * scale,
        };
    }
}
