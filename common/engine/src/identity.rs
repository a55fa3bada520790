//! What the KV of a model file means: the digest that two engines must share.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use baton_kv::{IdentityBuilder, KvDtype, KvIdentity};

use crate::{ModelConfig, checkpoint::Checkpoint};

/// The kernels' family, its version, the KV tile, and the virtual lanes. Every change of a result's bits needs a new one.
pub const NUMERICS_CLASS: &str = "cpu-int-v1 tile32 lanes16";

/// The identity of this model's KV, as computed by the CPU's integer path. Reads all weights, on `threads` threads; `hashed` is told the bytes that are done.
pub(crate) fn of_model(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    threads: usize,
    hashed: &(dyn Fn(u64) + Sync),
) -> KvIdentity {
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
        .field("weights", weights(checkpoint, threads, hashed).as_bytes())
        .field("kv_dtype", dtype.as_bytes())
        .field("numerics", NUMERICS_CLASS.as_bytes())
        .finish()
}

/// blake3 over every tensor's name, shape, type and blake3, in order of names: tensors are hashed side by side.
fn weights(checkpoint: &Checkpoint, threads: usize, hashed: &(dyn Fn(u64) + Sync)) -> blake3::Hash {
    let mut entries = checkpoint.tensors();
    entries.sort_unstable_by(|a, b| a.name.cmp(b.name));
    let digests = Mutex::new((vec![None; entries.len()], 0));
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((index, entry)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, entries.get(i)?)))
        {
            let digest = blake3::hash(entry.bytes);
            let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
            digests.0[index] = Some(digest);
            digests.1 += entry.bytes.len() as u64;
            hashed(digests.1);
        }
    };
    thread::scope(|scope| {
        (1..threads.min(entries.len())).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    let (digests, _) = digests.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut hasher = blake3::Hasher::new();
    for (entry, digest) in entries.iter().zip(digests) {
        let digest = digest.expect("every tensor was hashed");
        for number in [
            entry.name.len(),
            entry.rows,
            entry.columns,
            entry.dtype.number() as usize,
        ] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.update(entry.name.as_bytes());
        hasher.update(digest.as_bytes());
    }
    hasher.finalize()
}
