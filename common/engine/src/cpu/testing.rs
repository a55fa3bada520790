//! Random inputs for the tests of the backend.

use baton_gguf::{Tensor, TensorType};
use half::f16;

use super::Isa;

/// xorshift64*: the same numbers in every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In −1..1.
    pub(super) fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(super) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// A tensor that owns its bytes.
pub(super) struct OwnedTensor {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) dtype: TensorType,
    pub(super) bytes: Vec<u8>,
}

impl OwnedTensor {
    pub(super) fn random(dtype: TensorType, rows: usize, columns: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (numbers, block) = dtype.block().unwrap();
        let mut bytes = Vec::new();
        for _ in 0..rows * columns / numbers {
            let scale = |random: &mut Random, by: f32| f16::from_f32(random.float() * by).to_le_bytes();
            match dtype {
                TensorType::F32 => bytes.extend(random.float().to_le_bytes()),
                TensorType::F16 => bytes.extend(scale(&mut random, 1.0)),
                TensorType::Bf16 => bytes.extend(half::bf16::from_f32(random.float()).to_le_bytes()),
                _ => {
                    let start = bytes.len();
                    bytes.extend((0..block).map(|_| {
                        // Every eighth byte is an extreme: quants of −128 and 127, nibbles of 0 and 15.
                        let bits = random.bits();
                        match bits >> 60 {
                            0 => 0x80,
                            1 => 0xff,
                            _ => (bits >> 32) as u8,
                        }
                    }));
                    // The K types' scales are multiplied by integers of 6 and 7 bits.
                    let (at, by, min) = match dtype {
                        TensorType::Q4_1 | TensorType::Q5_1 => (0, 0.1, 0.8),
                        TensorType::Q4K | TensorType::Q5K => (0, 0.003, 0.02),
                        TensorType::Q6K => (208, 0.002, 0.0),
                        _ => (0, 0.1, 0.0),
                    };
                    bytes[start + at..][..2].copy_from_slice(&scale(&mut random, by));
                    if min > 0.0 {
                        bytes[start + 2..][..2].copy_from_slice(&scale(&mut random, min));
                    }
                }
            }
        }
        Self {
            rows,
            columns,
            dtype,
            bytes,
        }
    }

    pub(super) fn floats(rows: usize, columns: usize, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            rows,
            columns,
            dtype: TensorType::F32,
            bytes,
        }
    }

    pub(super) fn tensor(&self) -> Tensor<'_> {
        Tensor {
            name: "test",
            rows: self.rows,
            columns: self.columns,
            dtype: self.dtype,
            bytes: &self.bytes,
        }
    }

    /// Row `row` by the format's own definition.
    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.columns];
        baton_gguf::dequantize(&self.tensor(), row, &mut out).unwrap();
        out
    }
}

pub(super) const TYPES: [TensorType; 11] = [
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q4K,
    TensorType::Q5K,
    TensorType::Q6K,
    TensorType::F16,
    TensorType::Bf16,
    TensorType::F32,
];

/// `columns`, or for types of longer blocks as many blocks.
pub(super) fn whole_blocks(dtype: TensorType, columns: usize) -> usize {
    match dtype.block().unwrap().0 {
        1 | 32 => columns,
        numbers => columns.div_ceil(32) * numbers,
    }
}

/// The instruction sets of this CPU.
pub(super) fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// Bits, so that equality means equality.
pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
