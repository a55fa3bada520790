//! The blocks of the quantised types, taken apart into groups of 32 numbers.
//!
//! Source of the layouts: GGML (`ggml-quants.c`), and the `gguf` Python package, against which the tests compare.

use half::f16;

use crate::tensor::TensorType;

/// Numbers of a group.
pub const GROUP: usize = 32;

/// 32 consecutive numbers as a quantised type stores them. Number `i` is `scale · (quants[i] − offset)`, and `+ min` or `− min` where the type has
/// one; the K types multiply `scale` and `min` by small integers first. See [`dequantize`](crate::dequantize).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QuantGroup {
    /// The block's scale.
    pub scale: f16,
    /// The block's minimum; zero where the type has none.
    pub min: f16,
    /// Q4_K, Q5_K: what multiplies scale and minimum, 0..=63. Q6_K: what multiplies the scale, of the first and the second 16 numbers. Else ones.
    pub factors: [i8; 2],
    /// Unsigned: 4 bits, 5 bits (Q5), 6 bits (Q6), or 8 bits (Q8_0, 128 added).
    pub quants: [u8; GROUP],
}

impl TensorType {
    /// What is subtracted from a group's unsigned quants to make them signed; `None` for types that are not quantised, or unknown.
    pub fn quant_offset(self) -> Option<i32> {
        Some(match self {
            TensorType::Q4_0 => 8,
            TensorType::Q5_0 => 16,
            TensorType::Q8_0 => 128,
            TensorType::Q6K => 32,
            TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4K | TensorType::Q5K => 0,
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Other(_) => return None,
        })
    }
}

/// Takes a row (whole blocks) of a quantised type apart and calls `each` with every group's index and content, in order; `false`, and no call, for a type
/// that is not quantised. Bytes beyond the last whole block are ignored.
pub fn unpack(dtype: TensorType, row: &[u8], mut each: impl FnMut(usize, &QuantGroup)) -> bool {
    match dtype {
        TensorType::Q4_0 => small::<18>(row, 1, each, |b| nibbles(&b[2..])),
        TensorType::Q4_1 => small::<20>(row, 2, each, |b| nibbles(&b[4..])),
        TensorType::Q5_0 => small::<22>(row, 1, each, |b| fifth_bits(&b[2..6], nibbles(&b[6..]))),
        TensorType::Q5_1 => small::<24>(row, 2, each, |b| fifth_bits(&b[4..8], nibbles(&b[8..]))),
        TensorType::Q8_0 => small::<34>(row, 1, each, |b| std::array::from_fn(|i| b[2 + i] ^ 0x80)),
        TensorType::Q4K => super_blocks::<144>(row, |index, block| q4_k(block, None, &block[16..], index, &mut each)),
        TensorType::Q5K => super_blocks::<176>(row, |index, block| {
            q4_k(block, Some(&block[16..48]), &block[48..], index, &mut each)
        }),
        TensorType::Q6K => super_blocks::<210>(row, |index, block| q6_k(block, index, &mut each)),
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Other(_) => return false,
    }
    true
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// Blocks of one group: `halves` f16, then quants.
fn small<const BYTES: usize>(
    row: &[u8],
    halves: usize,
    mut each: impl FnMut(usize, &QuantGroup),
    quants: impl Fn(&[u8; BYTES]) -> [u8; GROUP],
) {
    for (index, block) in row.as_chunks::<BYTES>().0.iter().enumerate() {
        let group = QuantGroup {
            scale: half_at(block, 0),
            min: if halves > 1 { half_at(block, 2) } else { f16::ZERO },
            factors: [1, 1],
            quants: quants(block),
        };
        each(index, &group);
    }
}

/// 16 bytes: the first 16 numbers are the low nibbles, the other 16 the high ones.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// 4 bytes: bit `i` is number `i`'s fifth.
fn fifth_bits(bits: &[u8], mut quants: [u8; GROUP]) -> [u8; GROUP] {
    for (i, quant) in quants.iter_mut().enumerate() {
        *quant |= (bits[i / 8] >> (i % 8) & 1) << 4;
    }
    quants
}

/// Calls `each` with the index of each block's first group, and the block.
fn super_blocks<const BYTES: usize>(row: &[u8], mut each: impl FnMut(usize, &[u8])) {
    for (index, block) in row.as_chunks::<BYTES>().0.iter().enumerate() {
        each(index * 8, block);
    }
}

/// Q4_K, and with fifth bits Q5_K: scale, minimum, 12 bytes of six-bit factors. Each 32 bytes of nibbles are two groups: low, then high.
fn q4_k(block: &[u8], fifths: Option<&[u8]>, bytes: &[u8], first: usize, each: &mut impl FnMut(usize, &QuantGroup)) {
    for group in 0..8 {
        let bytes = &bytes[group / 2 * 32..][..32];
        let mut quants: [u8; GROUP] =
            std::array::from_fn(|i| if group % 2 == 0 { bytes[i] & 15 } else { bytes[i] >> 4 });
        if let Some(fifths) = fifths {
            for (quant, bits) in quants.iter_mut().zip(fifths) {
                *quant |= (bits >> group & 1) << 4;
            }
        }
        let group_of_row = QuantGroup {
            scale: half_at(block, 0),
            min: half_at(block, 2),
            factors: six_bits(&block[4..16], group).map(|factor| factor as i8),
            quants,
        };
        each(first + group, &group_of_row);
    }
}

/// Factors of scale and minimum of group `j`, below 64.
fn six_bits(packed: &[u8], j: usize) -> [u8; 2] {
    if j < 4 {
        [packed[j] & 63, packed[j + 4] & 63]
    } else {
        [
            packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4,
            packed[j + 4] >> 4 | (packed[j] >> 6) << 4,
        ]
    }
}

/// 128 bytes of nibbles, 64 bytes of two more bits, 16 signed factors, scale. Each half of the block is four groups.
fn q6_k(block: &[u8], first: usize, each: &mut impl FnMut(usize, &QuantGroup)) {
    for group in 0..8 {
        let (half, part) = (group / 4, group % 4);
        let low = &block[half * 64 + part % 2 * 32..][..32];
        let high = &block[128 + half * 32..][..32];
        let group_of_row = QuantGroup {
            scale: half_at(block, 208),
            min: f16::ZERO,
            factors: [0, 1].map(|i| block[192 + 2 * group + i] as i8),
            quants: std::array::from_fn(|i| {
                let nibble = if part < 2 { low[i] & 15 } else { low[i] >> 4 };
                nibble | (high[i] >> (2 * part) & 3) << 4
            }),
        };
        each(first + group, &group_of_row);
    }
}
