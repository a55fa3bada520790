//! What one core encrypts, with the cipher and the library that TLS uses here: no TLS stream is faster.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::super::{median, seconds};

/// A TLS record at most.
const RECORD_BYTES: usize = 16 << 10;
const RECORDS: usize = 16_384;

/// GB/s of AES-256-GCM over records of 16 KiB, on one thread.
pub fn gbps() -> anyhow::Result<f64> {
    let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| anyhow::anyhow!("not a key"))?;
    let key = LessSafeKey::new(key);
    let mut record = vec![1; RECORD_BYTES];
    let mut run = || -> anyhow::Result<f64> {
        let mut sealed = Ok(());
        let seconds = seconds(|| {
            sealed = (0..RECORDS).try_for_each(|at| {
                let mut nonce = [0; 12];
                nonce[..8].copy_from_slice(&(at as u64).to_le_bytes());
                let nonce = Nonce::assume_unique_for_key(nonce);
                key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut record)
                    .map(|tag| _ = std::hint::black_box(tag))
            });
        });
        sealed.map_err(|_| anyhow::anyhow!("it does not encrypt"))?;
        Ok((RECORD_BYTES * RECORDS) as f64 / 1e9 / seconds)
    };
    run()?;
    Ok(median((0..5).map(|_| run()).collect::<anyhow::Result<_>>()?))
}
