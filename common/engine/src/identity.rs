//! What the KV of a model file means: the digest that two engines must share.

use baton_gguf::{Tensor, TensorType};
use baton_kv::{IdentityBuilder, KvDtype, KvIdentity};

use crate::{
    ModelConfig,
    checkpoint::Checkpoint,
    parallel,
    progress::{LoadStage, Report, StageProgress},
};

/// The kernels' family, its version, the KV tile, attention's partition, and the virtual lanes. Every change of a result's bits needs a new one.
pub const NUMERICS_CLASS: &str = "cpu-int-v2 tile32 partition256 lanes16";

/// What is added to it for models with matrices of bf16, whose products are defined apart. They alone change with it.
pub const BF16_CLASS: &str = "bf16-v1";

/// How [`weights`] makes its digest. Every change needs a new one: digests of files are remembered.
pub(crate) const WEIGHTS_DIGEST: &str = "blake3 of names, shapes, types and blake3s v1";

/// The numerics of a model with these tensors.
fn numerics(tensors: &[Tensor<'_>]) -> String {
    let bf16 = |tensor: &Tensor<'_>| tensor.dtype == TensorType::Bf16 && tensor.rows > 1;
    if tensors.iter().any(bf16) {
        format!("{NUMERICS_CLASS} {BF16_CLASS}")
    } else {
        NUMERICS_CLASS.into()
    }
}

/// The identity of the KV of a model of these `tensors`, whose digest is `weights`, as computed by the CPU backend.
pub(crate) fn of_model(config: &ModelConfig, tensors: &[Tensor<'_>], weights: &blake3::Hash) -> KvIdentity {
    let shape = &config.attention;
    let number = |value: usize| (value as u64).to_le_bytes();
    let dtype = match KvDtype::Bf16 {
        KvDtype::Bf16 => "bf16",
    };
    let factors: Vec<u8> = config
        .rope_factors
        .iter()
        .flat_map(|factor| factor.to_bits().to_le_bytes())
        .collect();
    IdentityBuilder::new()
        .field("architecture", config.architecture.name().as_bytes())
        .field("layers", &number(config.layers))
        .field("heads", &number(shape.heads))
        .field("kv_heads", &number(shape.kv_heads))
        .field("head_dim", &number(shape.head_dim))
        .field("rope_dim", &number(shape.rope_dim))
        .field("rope_base", &shape.rope_base.to_bits().to_le_bytes())
        .field("rope_interleaved", &[u8::from(shape.rope_interleaved)])
        .field("rope_factors", &factors)
        .field("window", &number(shape.window.unwrap_or(0)))
        .field("qkv_bias", &[u8::from(config.qkv_bias)])
        .field("qk_norm", &[u8::from(config.qk_norm)])
        .field("epsilon", &config.epsilon.to_bits().to_le_bytes())
        .field("weights", weights.as_bytes())
        .field("kv_dtype", dtype.as_bytes())
        .field("numerics", numerics(tensors).as_bytes())
        .finish()
}

/// What [`weights`] depends on beside the bytes: how it is made, and which tensors there are.
pub(crate) fn outline(checkpoint: &Checkpoint) -> blake3::Hash {
    let mut entries = checkpoint.tensors();
    entries.sort_unstable_by(|a, b| a.name.cmp(b.name));
    let mut hasher = blake3::Hasher::new();
    hasher.update(WEIGHTS_DIGEST.as_bytes());
    entries.iter().for_each(|entry| outline_of(entry, &mut hasher));
    hasher.finalize()
}

fn outline_of(tensor: &Tensor<'_>, hasher: &mut blake3::Hasher) {
    for number in [
        tensor.name.len(),
        tensor.rows,
        tensor.columns,
        tensor.dtype.number() as usize,
    ] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    hasher.update(tensor.name.as_bytes());
}

/// blake3 over every tensor's name, shape, type and blake3, in order of names: tensors are hashed side by side, on `threads` threads.
pub(crate) fn weights(checkpoint: &Checkpoint, threads: usize, report: Report<'_>) -> blake3::Hash {
    let mut entries = checkpoint.tensors();
    entries.sort_unstable_by(|a, b| a.name.cmp(b.name));
    let total = entries.iter().map(|entry| entry.bytes.len() as u64).sum();
    let progress = StageProgress::begin(LoadStage::Hashing, total, report);
    let mut digests = vec![None; entries.len()];
    parallel::for_each(entries.iter().zip(&mut digests), threads, |(entry, digest)| {
        *digest = Some(blake3::hash(entry.bytes));
        progress.add(entry.bytes.len());
    });
    let mut hasher = blake3::Hasher::new();
    for (entry, digest) in entries.iter().zip(digests) {
        let digest = digest.expect("every tensor was hashed");
        outline_of(entry, &mut hasher);
        hasher.update(digest.as_bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use baton_gguf::{Gguf, GgufWriter};

    use super::*;

    #[test]
    fn only_matrices_of_bf16_are_of_its_class() {
        let tensor = |rows, dtype| Tensor {
            name: "t",
            rows,
            columns: 32,
            dtype,
            bytes: &[],
        };
        let [matrix, vector] = [2, 1].map(|rows| tensor(rows, TensorType::Bf16));
        let other = tensor(2, TensorType::F16);
        assert_eq!(numerics(&[other, vector]), NUMERICS_CLASS);
        assert_eq!(numerics(&[other, matrix]), format!("{NUMERICS_CLASS} {BF16_CLASS}"));
    }

    /// Whoever changes how the digest is made must name the new way, or digests made in the old one would be remembered.
    #[test]
    fn digests_are_those_of_their_scheme() {
        let file = GgufWriter::new()
            .tensor_f32("b", 2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            .tensor_f32("a", 1, 2, &[7.0, 8.0])
            .finish();
        let checkpoint = Checkpoint::Gguf(Gguf::from_bytes(file).unwrap());
        assert_eq!(
            (WEIGHTS_DIGEST, weights(&checkpoint, 2, &|_| {}).to_hex().as_str()),
            (
                "blake3 of names, shapes, types and blake3s v1",
                "eeebd47c73bc1a90313b1a469518fc39ae003943f351e1b87fe385ed3cd7e762"
            )
        );
    }
}
