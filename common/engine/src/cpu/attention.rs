//! Attention of a few query heads over one KV tile of 32 tokens, read as bf16 where it lies in the pool.
//!
//! Queries are multiplied by `1 / sqrt(head_dim)` first. Then, per query and tile, over the tokens that it sees there:
//! - `score[t] = q · k[t]`: fma in ascending dimension;
//! - online softmax: `m' = max(m, scores)`, `correction = exp(m - m')`, `p[t] = exp(score[t] - m')`, and in lane l of 16
//!   `sums[l] = fma(sums[l], correction, p[2l] + p[2l + 1])`;
//! - per dimension: `acc *= correction`, then `acc = fma(p[t], v[t], acc)` in ascending token. (Where another query of the step sees a token, `p[t]` is 0: of finite
//!   values that changes at most the sign of a zero, which no later operation tells apart.)
//!
//! Tiles are taken in ascending order within a *partition* of 256 tokens, at whose start a query begins anew; partitions are then merged in ascending order
//! ([`merge`]). So threads may share one long sequence, and still nothing but the tokens' positions decides the order of additions: a decode row and the same row
//! of a prefill are bit-equal. At the end `out = acc * (1 / tree(sums))`.
//!
//! Source of the online softmax: Milakov and Gimelshein, 2018; of the partitions: Flash-Decoding (Dao et al., 2023), here of one fixed length.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    alloc::{Aligned, OutOfMemory},
    isa::Isa,
    math::{self, LANES},
    rows::for_each_isa,
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Tokens of a KV tile.
pub(super) const TILE: usize = 32;
/// Tokens of a partition.
pub(super) const PARTITION: usize = 256;
/// Most queries of a step: their scores stay in registers.
pub(super) const STEP_QUERIES: usize = 12;

/// Softmax so far, of one query.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Running {
    pub(super) sums: [f32; LANES],
    /// −∞ before the first token.
    pub(super) max: f32,
}

impl Running {
    pub(super) const START: Self = Self {
        sums: [0.0; LANES],
        max: f32::NEG_INFINITY,
    };
}

/// Softmax and accumulators of a piece of work: of some queries, `[queries][head_dim]`.
pub(super) struct State {
    pub(super) running: Vec<Running>,
    pub(super) acc: Aligned<f32>,
}

impl State {
    /// For at most `queries` queries.
    pub(super) fn new(queries: usize, head_dim: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            running: vec![Running::START; queries],
            acc: Aligned::zeroed(queries * head_dim)?,
        })
    }

    /// Nothing seen yet.
    pub(super) fn start(&mut self, queries: usize, head_dim: usize) {
        self.running[..queries].fill(Running::START);
        self.acc.as_mut_slice()[..queries * head_dim].fill(0.0);
    }

    /// Takes in the next partition.
    pub(super) fn merge(&mut self, isa: Isa, later: &Self, queries: usize) {
        let running = &mut self.running[..queries];
        merge(
            isa,
            running,
            self.acc.as_mut_slice(),
            &later.running,
            later.acc.as_slice(),
        );
    }
}

/// States of partitions that different threads computed, a slot each.
pub(super) struct Partials {
    running: Aligned<Running>,
    acc: Aligned<f32>,
    /// Of a slot.
    queries: usize,
    slots: usize,
}

/// Bytes of all slots at most. Pages are taken from the system when first written.
pub(crate) const PARTIAL_BYTES: usize = 16 << 20;

impl Partials {
    /// Slots for at most `queries` queries, as many as fit.
    pub(super) fn new(queries: usize, head_dim: usize) -> Result<Self, OutOfMemory> {
        let slot_bytes = queries * (size_of::<Running>() + head_dim * size_of::<f32>());
        let slots = PARTIAL_BYTES / slot_bytes.max(1);
        Ok(Self {
            running: Aligned::zeroed(slots * queries)?,
            acc: Aligned::zeroed(slots * queries * head_dim)?,
            queries,
            slots,
        })
    }

    /// Whether there are that many slots.
    pub(super) fn has(&self, slots: usize) -> bool {
        slots <= self.slots
    }

    /// Where a slot's state lies.
    fn slot(&self, slot: usize, queries: usize, head_dim: usize) -> (*mut Running, *mut f32) {
        assert!(
            slot < self.slots && queries <= self.queries,
            "partial outside its memory"
        );
        // SAFETY: within both allocations.
        unsafe {
            (
                self.running.as_ptr().add(slot * self.queries),
                self.acc.as_ptr().add(slot * self.queries * head_dim),
            )
        }
    }

    /// # Safety
    /// Nobody else reads or writes the slot meanwhile.
    pub(super) unsafe fn put(&self, slot: usize, state: &State, queries: usize, head_dim: usize) {
        let (running, acc) = self.slot(slot, queries, head_dim);
        // SAFETY: a slot has room for `queries` queries; the caller excludes everyone else.
        unsafe {
            running.copy_from_nonoverlapping(state.running[..queries].as_ptr(), queries);
            acc.copy_from_nonoverlapping(state.acc.as_slice()[..queries * head_dim].as_ptr(), queries * head_dim);
        }
    }

    /// # Safety
    /// Nobody writes the slot meanwhile.
    pub(super) unsafe fn get(&self, slot: usize, state: &mut State, queries: usize, head_dim: usize) {
        let (running, acc) = self.slot(slot, queries, head_dim);
        let into = &mut state.acc.as_mut_slice()[..queries * head_dim];
        // SAFETY: as in `put`; the caller excludes writers.
        unsafe {
            running.copy_to_nonoverlapping(state.running[..queries].as_mut_ptr(), queries);
            acc.copy_to_nonoverlapping(into.as_mut_ptr(), queries * head_dim);
        }
    }
}

/// Some queries against one tile.
#[derive(Clone)]
pub(super) struct TileStep {
    /// Number d of query q lies at `d * stride + q`.
    pub(super) queries: *const f32,
    pub(super) stride: usize,
    /// 1..=[`STEP_QUERIES`].
    pub(super) count: usize,
    /// Multiple of 16.
    pub(super) head_dim: usize,
    /// `[head_dim][TILE]` of bf16.
    pub(super) keys: *const u16,
    /// `[TILE][head_dim]` of bf16.
    pub(super) values: *const u16,
    /// Bit t is set where query q sees token t of the tile; each of the first `count` sees at least one. Tokens that none sees have no effect: their keys are
    /// read, their values are not.
    pub(super) seen: [u32; STEP_QUERIES],
    /// Keys and values of tiles that will be wanted soon: the next one, and one further on. May be null.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) ahead: [[*const u16; 2]; 2],
    /// `[count]`.
    pub(super) running: *mut Running,
    /// `[count][head_dim]`, dimensions in the order of [`place`].
    pub(super) acc: *mut f32,
}

impl TileStep {
    /// From the first to the last token that any query sees.
    #[inline(always)]
    fn tokens(&self) -> Range<usize> {
        let any = self.seen[..self.count].iter().fold(0, |any, seen| any | seen);
        any.trailing_zeros() as usize..TILE - any.leading_zeros() as usize
    }
}

/// Bits `range` (of 0..32).
pub(super) fn bits_of(range: Range<usize>) -> u32 {
    let below = |end: usize| ((1u64 << end) - 1) as u32;
    below(range.end) & !below(range.start)
}

/// Takes one tile into `running` and `acc`.
///
/// # Safety
/// The CPU has the instruction set, and the step's pointers are valid for the shapes named in [`TileStep`].
pub(super) type StepFn = unsafe fn(&TileStep);

pub(super) fn step_fn(isa: Isa) -> StepFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => avx512::step,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::step,
        _ => portable::step,
    }
}

/// Where an accumulator has dimension `d`: of 32 dimensions the even ones, then the odd ones, as two bf16 in one word come apart. A last 16 stay in order.
#[inline(always)]
pub(super) fn place(d: usize, head_dim: usize) -> usize {
    if d < head_dim / 32 * 32 {
        d / 32 * 32 + d % 2 * 16 + d % 32 / 2
    } else {
        d
    }
}

for_each_isa! {
    /// Takes later partitions' softmaxes and accumulators into earlier ones': `m = max(a.m, b.m)`, and with each side's `correction = exp(its m - m)`
    /// `x = fma(b.x, b's correction, a.x * a's correction)` for every number. A side that has seen nothing leaves the other as it is.
    merge = merge_body(running: &mut [Running], acc: &mut [f32], later: &[Running], later_acc: &[f32])
}

#[inline(always)]
fn merge_body(running: &mut [Running], acc: &mut [f32], later: &[Running], later_acc: &[f32]) {
    let head_dim = acc.len() / later.len();
    let accs = acc.chunks_exact_mut(head_dim).zip(later_acc.chunks_exact(head_dim));
    for ((running, later), (acc, later_acc)) in running.iter_mut().zip(later).zip(accs) {
        if later.max == f32::NEG_INFINITY {
            continue;
        }
        if running.max == f32::NEG_INFINITY {
            *running = *later;
            acc.copy_from_slice(later_acc);
            continue;
        }
        let max = if later.max > running.max {
            later.max
        } else {
            running.max
        };
        let corrections = [math::exp(running.max - max), math::exp(later.max - max)];
        let take = |x: &mut f32, later: f32| *x = later.mul_add(corrections[1], *x * corrections[0]);
        running.max = max;
        running.sums.iter_mut().zip(later.sums).for_each(|(x, y)| take(x, y));
        acc.iter_mut().zip(later_acc).for_each(|(x, &y)| take(x, y));
    }
}

/// Divides by the sum and puts the dimensions in order.
pub(super) fn finish(running: &Running, acc: &[f32], out: &mut [f32]) {
    let inverse = 1.0 / math::tree_sum(running.sums);
    let head_dim = out.len();
    let pairs = head_dim / 32 * 32;
    for (out, acc) in out[..pairs].chunks_exact_mut(32).zip(acc[..pairs].chunks_exact(32)) {
        let (even, odd) = acc.split_at(16);
        for ((pair, even), odd) in out.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
            *pair = [even * inverse, odd * inverse];
        }
    }
    for (out, acc) in out[pairs..].iter_mut().zip(&acc[pairs..]) {
        *out = acc * inverse;
    }
}

#[cfg(test)]
mod tests;
