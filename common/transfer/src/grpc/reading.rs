//! The KV of a frame, read from the node's pool.
#![allow(unsafe_code)]

use std::sync::Arc;

use baton_kv::{BlockId, Checksum, ChecksumState, KvLayout, KvMemory, KvMemoryError};
use bytes::Bytes;

use super::{Hold, read_ahead::Share};
use crate::RunToSend;

/// A layer of a block that is smaller is copied together with others: each part that is sent costs a system call.
const SENT_WHERE_IT_LIES_BYTES: usize = 64 << 10;

/// What is kept until the last byte has left: the blocks' holds, and the share of the node's memory.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) memory: Arc<dyn KvMemory>,
    pub(super) _holds: Arc<Vec<Hold>>,
    pub(super) share: Arc<Share>,
}

/// Payload of a run.
pub(super) fn run_bytes(layout: &KvLayout, run: &RunToSend) -> usize {
    run.layers.len() * (layout.valid_bytes(run.valid_tokens) / layout.layers)
}

/// The runs' bytes in parts, each run `[layer][k|v][head][token < valid_tokens][dim]`, and the checksum of each run. Layers of whole blocks are not copied,
/// where they are large and lie together.
pub(super) fn read_runs(kept: &Kept, runs: &[RunToSend]) -> Result<(Vec<Bytes>, Vec<Checksum>), KvMemoryError> {
    let memory = &*kept.memory;
    let layout = memory.layout();
    let mut parts = Vec::new();
    let mut copied = Vec::new();
    let mut sums = Vec::with_capacity(runs.len());
    for (index, run) in runs.iter().enumerate() {
        let piece_bytes = layout.valid_bytes(run.valid_tokens) / layout.layers;
        let whole = run.valid_tokens == layout.block_tokens;
        let mut sum = ChecksumState::default();
        for layer in run.layers.clone() {
            if whole
                && piece_bytes >= SENT_WHERE_IT_LIES_BYTES
                && let Some(part) = Whole::new(kept, layer, run.block)
            {
                if !copied.is_empty() {
                    parts.push(keep(std::mem::take(&mut copied), kept));
                }
                sum.update(part.as_ref());
                parts.push(Bytes::from_owner(part));
                continue;
            }
            if copied.capacity() == 0 {
                copied.reserve_exact(runs[index..].iter().map(|run| run_bytes(layout, run)).sum());
            }
            let start = copied.len();
            // SAFETY: the push holds the block, so that nobody writes it.
            match unsafe { memory.whole(layer, run.block) }.filter(|_| whole) {
                Some(piece) => copied.extend_from_slice(piece),
                None => {
                    copied.resize(start + piece_bytes, 0);
                    memory.read(layer, run.block, run.valid_tokens, &mut copied[start..])?;
                }
            }
            sum.update(&copied[start..]);
        }
        sums.push(sum.finish());
    }
    if !copied.is_empty() {
        parts.push(keep(copied, kept));
    }
    Ok((parts, sums))
}

/// The checksum of each run, where it lies.
pub(super) fn sum_runs(memory: &dyn KvMemory, runs: &[RunToSend]) -> Result<Vec<Checksum>, KvMemoryError> {
    let mut scratch = Vec::new();
    let sum =
        |run: &RunToSend| Checksum::of_layers(memory, run.layers.clone(), run.block, run.valid_tokens, &mut scratch);
    runs.iter().map(sum).collect()
}

fn keep(data: Vec<u8>, kept: &Kept) -> Bytes {
    kept.share.clone().keep(data)
}

/// One layer of a whole block, where it lies.
struct Whole {
    kept: Kept,
    layer: usize,
    block: BlockId,
}

impl Whole {
    /// `None` where the memory has no such place.
    fn new(kept: &Kept, layer: usize, block: BlockId) -> Option<Self> {
        // SAFETY: the push holds the block, so that nobody writes it.
        unsafe { kept.memory.whole(layer, block) }?;
        let kept = kept.clone();
        Some(Self { kept, layer, block })
    }
}

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the holds keep the block from being written as long as this lives.
        unsafe { self.kept.memory.whole(self.layer, self.block) }.unwrap_or_default()
    }
}
