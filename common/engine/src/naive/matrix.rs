//! Matrices as plain arrays, with the numerics contract's int8 and bf16 activations.

use baton_gguf::{GROUP, QuantGroup, Tensor, TensorType, dequantize, unpack};

use crate::{
    ConfigError,
    cpu::math::{from_bf16, to_bf16},
};

/// A matrix `[n, k]`.
pub(super) struct Matrix {
    k: usize,
    numbers: Numbers,
}

enum Numbers {
    Floats(Vec<f32>),
    /// bf16, widened.
    Bf16(Vec<f32>),
    /// `quants [n, k]`, `groups [n, k / 32]`: a number is `scale · quant + min`, or `scale · factor of its half · quant`.
    Quantised {
        quants: Vec<i8>,
        groups: Vec<WeightGroup>,
    },
}

#[derive(Clone, Copy)]
struct WeightGroup {
    scale: f32,
    /// Only of types that have one.
    min: Option<f32>,
    /// Only of Q6_K: integers for either half of the group.
    factors: Option<[i32; 2]>,
}

impl WeightGroup {
    /// From the file's f16 and integers; every product is exact.
    fn of(dtype: TensorType, group: &QuantGroup) -> Self {
        let (scale, min) = (group.scale.to_f32(), group.min.to_f32());
        let [first, second] = group.factors.map(f32::from);
        let (scale, min) = match dtype {
            TensorType::Q4_1 | TensorType::Q5_1 => (scale, Some(min)),
            TensorType::Q4K | TensorType::Q5K => (scale * first, Some(-(min * second))),
            _ => (scale, None),
        };
        Self {
            scale,
            min,
            factors: (dtype == TensorType::Q6K).then(|| group.factors.map(i32::from)),
        }
    }
}

impl Matrix {
    pub(super) fn read(tensor: &Tensor<'_>) -> Result<Self, ConfigError> {
        let k = tensor.columns;
        let Some(offset) = tensor.dtype.quant_offset() else {
            return Self::floats(tensor);
        };
        let mut quants = Vec::with_capacity(tensor.rows * k);
        let mut groups = Vec::with_capacity(tensor.rows * k / GROUP);
        // Rows are whole blocks, so that a tensor's groups are its rows' groups.
        unpack(tensor.dtype, tensor.bytes, |_, group| {
            quants.extend(group.quants.map(|quant| (i32::from(quant) - offset) as i8));
            groups.push(WeightGroup::of(tensor.dtype, group));
        });
        Ok(Self {
            k,
            numbers: Numbers::Quantised { quants, groups },
        })
    }

    fn floats(tensor: &Tensor<'_>) -> Result<Self, ConfigError> {
        let mut floats = vec![0.0; tensor.rows * tensor.columns];
        for (row, out) in floats.chunks_exact_mut(tensor.columns).enumerate() {
            dequantize(tensor, row, out).map_err(|error| ConfigError::Unsupported(error.to_string()))?;
        }
        let numbers = if tensor.dtype == TensorType::Bf16 {
            Numbers::Bf16(floats.into_iter().map(|weight| without_tiny(weight, -40)).collect())
        } else {
            Numbers::Floats(floats)
        };
        Ok(Self {
            k: tensor.columns,
            numbers,
        })
    }

    /// Row `index`, dequantised.
    pub(super) fn row(&self, index: usize) -> Vec<f32> {
        let range = index * self.k..(index + 1) * self.k;
        match &self.numbers {
            Numbers::Floats(floats) | Numbers::Bf16(floats) => floats[range].to_vec(),
            Numbers::Quantised { quants, groups } => {
                let groups = &groups[index * self.k / GROUP..];
                let number = |(i, &quant): (usize, &i8)| {
                    let group = groups[i / GROUP];
                    let factor = group.factors.map_or(1, |factors| factors[i % GROUP / (GROUP / 2)]);
                    let scaled = f32::from(quant) * (group.scale * factor as f32);
                    group.min.map_or(scaled, |min| scaled + min)
                };
                quants[range].iter().enumerate().map(number).collect()
            }
        }
    }

    /// The matrix times `x [k]`. Quantised: x becomes int8 per group of 32, and each group adds one exact integer product. bf16: x becomes bf16, and of each
    /// pair of columns the second is added first.
    pub(super) fn times(&self, x: &[f32]) -> Vec<f32> {
        match &self.numbers {
            Numbers::Floats(floats) => floats
                .chunks_exact(self.k)
                .map(|row| {
                    row.iter()
                        .zip(x)
                        .fold(0.0f32, |sum, (&weight, &x)| weight.mul_add(x, sum))
                })
                .collect(),
            Numbers::Bf16(weights) => {
                let x: Vec<f32> = x.iter().map(|&x| without_tiny(from_bf16(to_bf16(x)), -60)).collect();
                let add = |sum: f32, (weight, x): (&[f32], &[f32])| {
                    let products = weight.iter().zip(x).rev();
                    products.fold(sum, |sum, (&weight, &x)| weight.mul_add(x, sum))
                };
                let row = |row: &[f32]| row.chunks(2).zip(x.chunks(2)).fold(0.0, add);
                weights.chunks_exact(self.k).map(row).collect()
            }
            Numbers::Quantised { quants, groups } => {
                let x: Vec<Activations> = x.chunks_exact(GROUP).map(Activations::of).collect();
                let rows = quants.chunks_exact(self.k).zip(groups.chunks_exact(self.k / GROUP));
                rows.map(|(quants, groups)| product(quants, groups, &x)).collect()
            }
        }
    }
}

/// 0 instead of a number below 2^`exponent`.
fn without_tiny(x: f32, exponent: i32) -> f32 {
    if x.abs() < 2f32.powi(exponent) { 0.0 } else { x }
}

fn product(quants: &[i8], groups: &[WeightGroup], x: &[Activations]) -> f32 {
    let mut sum = 0.0f32;
    for ((quants, group), x) in quants.as_chunks::<GROUP>().0.iter().zip(groups).zip(x) {
        let [first, second] = group.factors.unwrap_or([1, 1]);
        let mut dot = 0i32;
        for (i, (&quant, &x)) in quants.iter().zip(&x.quants).enumerate() {
            let factor = if i < GROUP / 2 { first } else { second };
            dot += factor * i32::from(quant) * i32::from(x);
        }
        sum = (group.scale * x.scale).mul_add(dot as f32, sum);
        if let Some(min) = group.min {
            sum = min.mul_add(x.scaled_sum, sum);
        }
    }
    sum
}

/// 32 activations: `scale · quant`.
struct Activations {
    quants: [i16; GROUP],
    scale: f32,
    scaled_sum: f32,
}

impl Activations {
    fn of(x: &[f32]) -> Self {
        let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // Too small for its inverse: all zero.
        let (scale, inverse) = if max < 1e-30 {
            (0.0, 0.0)
        } else {
            (max / 127.0, 127.0 / max)
        };
        let mut quants = [0; GROUP];
        for (quant, &x) in quants.iter_mut().zip(x) {
            *quant = (x * inverse).round_ties_even() as i16;
        }
        let sum: i16 = quants.iter().sum();
        Self {
            quants,
            scale,
            scaled_sum: scale * f32::from(sum),
        }
    }
}
