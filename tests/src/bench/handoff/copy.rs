//! One copy from one process's pool into another's: what shared memory allows, and what is left of it with the checksum.

use std::{fs::File, os::fd::OwnedFd};

use baton_kv::ChecksumState;
use memmap2::{Advice, MmapMut};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::{
    super::seconds,
    payload::Payload,
    runs::{Run, Runs},
};

/// Copies `bytes`, block by block in permuted order, from a file of memory into memory of its own, on one thread. With `sums` each copy is summed where it
/// then lies.
pub fn one_copy(bytes: usize, block_bytes: usize, sums: bool, repeats: usize) -> anyhow::Result<Runs> {
    let file = File::from(memory_file(bytes)?);
    // SAFETY: nobody else has the file.
    #[allow(unsafe_code)]
    let mut from = unsafe { MmapMut::map_mut(&file)? };
    let _ = from.advise(Advice::HugePage);
    from.fill(1);
    let mut to = MmapMut::map_anon(bytes)?;
    let _ = to.advise(Advice::HugePage);
    let places = Payload::paged(block_bytes, bytes).places();
    Runs::measure(repeats, || {
        let seconds = seconds(|| {
            for (to, place) in to.chunks_exact_mut(block_bytes).zip(&places) {
                to.copy_from_slice(&from[place.0 as usize * block_bytes..][..block_bytes]);
                if sums {
                    let mut state = ChecksumState::default();
                    state.update(to);
                    std::hint::black_box(state.finish());
                }
            }
        });
        Ok(Run {
            bytes: bytes as f64,
            seconds,
            cpu_s: None,
        })
    })
}

fn memory_file(bytes: usize) -> anyhow::Result<OwnedFd> {
    let file = memfd_create("baton-bench", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes as u64)?;
    Ok(file)
}
