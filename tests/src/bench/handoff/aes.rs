//! What one core encrypts, with the library that TLS uses here: no TLS stream is faster.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};

use super::super::{median, seconds};

/// A TLS record at most.
const RECORD_BYTES: usize = 16 << 10;
const RECORDS: usize = 16_384;

/// Ciphers: the one that our ends agree on, and the one that others often do.
#[derive(Clone, Copy, Debug)]
pub enum Cipher {
    /// AES-128-GCM.
    Aes128,
    /// AES-256-GCM.
    Aes256,
}

/// GB/s over records of 16 KiB, on one thread.
pub fn gbps(cipher: Cipher) -> anyhow::Result<f64> {
    let (algorithm, key): (&Algorithm, &[u8]) = match cipher {
        Cipher::Aes128 => (&AES_128_GCM, &[7; 16]),
        Cipher::Aes256 => (&AES_256_GCM, &[7; 32]),
    };
    let key = UnboundKey::new(algorithm, key).map_err(|_| anyhow::anyhow!("not a key"))?;
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
