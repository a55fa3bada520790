//! A file of panels: a header, one checksum per chunk, and the memory as it lies.
//!
//! | bytes | what |
//! | --- | --- |
//! | 16 | [`MAGIC`] |
//! | 32 | the key |
//! | 8 | bytes of panels, N |
//! | 8 each | crc64 of every [`CHUNK`] of the panels |
//! | 8 | crc64 of all of the above |
//! | N | the panels |
//!
//! Read, not mapped: see `docs/adr/0005-panels-are-read-not-mapped.md`.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, OnceLock, PoisonError},
};

use super::{ReadError, checksum};
use crate::{
    parallel,
    progress::{LoadStage, Report, StageProgress},
};

/// Format and version of the file.
const MAGIC: &[u8; 16] = b"baton panels v1\n";
/// What one thread reads and verifies while it lies in its cache.
pub(super) const CHUNK: usize = 1 << 20;

/// Everything before the panels, but for its own checksum.
fn header(key: &blake3::Hash, bytes: usize, sums: &[u64]) -> Vec<u8> {
    let mut header = Vec::with_capacity(header_bytes(bytes));
    header.extend(MAGIC);
    header.extend(key.as_bytes());
    header.extend((bytes as u64).to_le_bytes());
    header.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
    header
}

/// Bytes before the panels.
fn header_bytes(bytes: usize) -> usize {
    MAGIC.len() + blake3::OUT_LEN + 8 + bytes.div_ceil(CHUNK) * 8 + 8
}

/// Reads `memory`'s length of panels on `threads` threads and verifies each chunk in `memory`.
pub(super) fn read(
    file: &mut File,
    key: &blake3::Hash,
    memory: &mut [u8],
    threads: usize,
    report: Report<'_>,
) -> Result<(), ReadError> {
    let start = header_bytes(memory.len());
    if file.metadata()?.len() != (start + memory.len()) as u64 {
        return Err(ReadError::Damaged("its length"));
    }
    let mut head = vec![0; start];
    file.read_exact_at(&mut head, 0)?;
    let (sums, sum) = head[header(key, 0, &[]).len()..].split_at(memory.len().div_ceil(CHUNK) * 8);
    let sums: Vec<u64> = sums.as_chunks().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
    let expected = header(key, memory.len(), &sums);
    if head[..expected.len()] != expected || sum != checksum(&[&expected]).to_le_bytes() {
        return Err(ReadError::Damaged("its header"));
    }

    let progress = StageProgress::begin(LoadStage::ReadingCache, memory.len() as u64, report);
    let failed = OnceLock::new();
    let file = &*file;
    let chunks = memory.chunks_mut(CHUNK).zip(sums).enumerate();
    parallel::for_each(chunks, threads, |(index, (chunk, sum))| {
        if failed.get().is_some() {
            return;
        }
        let read = file.read_exact_at(chunk, (start + index * CHUNK) as u64);
        let verified = match read {
            Ok(()) if checksum(&[chunk]) == sum => Ok(()),
            Ok(()) => Err(ReadError::Damaged("a checksum of its panels")),
            // Cut off meanwhile, or unreadable.
            Err(error) => Err(error.into()),
        };
        match verified {
            Ok(()) => progress.add(chunk.len()),
            Err(error) => drop(failed.set(error)),
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// Writes `memory` on `threads` threads.
pub(super) fn write(
    file: &mut File,
    key: &blake3::Hash,
    memory: &[u8],
    threads: usize,
    report: Report<'_>,
) -> io::Result<()> {
    let start = header_bytes(memory.len());
    let progress = StageProgress::begin(LoadStage::WritingCache, memory.len() as u64, report);
    let sums = Mutex::new(vec![0; memory.len().div_ceil(CHUNK)]);
    let failed = OnceLock::new();
    let out = &*file;
    parallel::for_each(memory.chunks(CHUNK).enumerate(), threads, |(index, chunk)| {
        if failed.get().is_some() {
            return;
        }
        match out.write_all_at(chunk, (start + index * CHUNK) as u64) {
            Ok(()) => {
                sums.lock().unwrap_or_else(PoisonError::into_inner)[index] = checksum(&[chunk]);
                progress.add(chunk.len());
            }
            Err(error) => drop(failed.set(error)),
        }
    });
    if let Some(error) = failed.into_inner() {
        return Err(error);
    }
    let mut header = header(
        key,
        memory.len(),
        &sums.into_inner().unwrap_or_else(PoisonError::into_inner),
    );
    header.extend(checksum(&[&header]).to_le_bytes());
    file.write_all_at(&header, 0)
}
