//! Drawing tokens: a row of logits is one thread's, and where there are fewer rows than threads, all share the passes over the vocabulary.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering::Relaxed;

use super::{
    alloc::{Aligned, OutOfMemory},
    ops::CpuOps,
};
use crate::{
    ops::Buffer,
    sampler::{self, RUN, Spread},
};

/// What threads find of the logits that they share: of each row a maximum per thread, and a sum per run.
pub(super) struct SharedRows {
    threads: usize,
    runs: usize,
    numbers: Aligned<f64>,
}

impl SharedRows {
    /// For rows of at most `widest` logits.
    pub(super) fn new(threads: usize, widest: usize) -> Result<Self, OutOfMemory> {
        let runs = widest.div_ceil(RUN);
        Ok(Self {
            threads,
            runs,
            numbers: Aligned::zeroed((threads - 1).saturating_mul(threads + runs))?,
        })
    }

    /// Where number `index` of a row lies: maxima, then sums.
    fn place(&self, row: usize, index: usize) -> *mut f64 {
        assert!(
            row + 1 < self.threads && index < self.threads + self.runs,
            "number outside a shared row"
        );
        // SAFETY: within the allocation.
        unsafe { self.numbers.as_ptr().add(row * (self.threads + self.runs) + index) }
    }

    /// # Safety
    /// Nobody else reads or writes that number meanwhile.
    unsafe fn put(&self, row: usize, index: usize, number: f64) {
        // SAFETY: the caller's promise.
        unsafe { self.place(row, index).write(number) };
    }

    /// # Safety
    /// Nobody writes these numbers meanwhile.
    unsafe fn get(&self, row: usize, indices: std::ops::Range<usize>) -> impl Iterator<Item = f64> {
        // SAFETY: the caller's promise.
        indices.map(move |index| unsafe { self.place(row, index).read() })
    }
}

impl CpuOps<'_> {
    /// [`Ops::sample`](crate::ops::Ops::sample).
    pub(super) fn draw(&mut self, logits: Buffer) {
        let core = self.core;
        let sampling = &self.places.sampling;
        let shared = sampling.len() < self.member.threads();
        if shared {
            self.share_rows(logits, sampling.len());
        }
        for row in self.member.share(sampling.len()) {
            let span = &self.plan.spans[sampling[row].1];
            let Some(sample) = &span.sample else { continue };
            // SAFETY: nobody writes logits in this phase.
            let logits = unsafe { core.arena.row(logits, row) };
            let spread = if shared {
                self.spread_of(row, logits.len())
            } else {
                Spread::of(logits)
            };
            let history = self.plan.history(sample);
            let drawn = spread
                .and_then(|spread| sampler::draw_within(logits, spread, sample, history, &mut self.scratch.sampler));
            let Ok(drawn) = drawn else {
                core.not_finite.store(true, Relaxed);
                continue;
            };
            assert!(row < core.sampled.len(), "sampling row outside its memory");
            // SAFETY: within the allocation, and in this thread's share.
            unsafe { core.sampled.as_ptr().add(row).write(drawn.of(span.sequence)) };
        }
        self.member.barrier();
    }

    /// Each thread goes over its runs of every row.
    fn share_rows(&self, logits: Buffer, rows: usize) {
        let (core, member) = (self.core, self.member);
        let width = core.arena.width(logits);
        let runs = member.share(width.div_ceil(RUN));
        let own = runs.start * RUN..width.min(runs.end * RUN);
        for row in 0..rows {
            // SAFETY: nobody writes logits in this phase; the number is this thread's.
            unsafe {
                let max = sampler::highest(&core.arena.row(logits, row)[own.clone()]);
                core.shared_rows.put(row, member.index(), f64::from(max));
            }
        }
        member.barrier();
        for row in 0..rows {
            let max = self.max_of(row);
            for run in runs.clone() {
                // SAFETY: as above.
                unsafe {
                    let logits = &core.arena.row(logits, row)[run * RUN..width.min((run + 1) * RUN)];
                    let sum = sampler::run_sum(logits, max);
                    core.shared_rows.put(row, member.threads() + run, sum);
                }
            }
        }
        member.barrier();
    }

    /// The highest logit of a shared row; NaN if one is.
    fn max_of(&self, row: usize) -> f32 {
        // SAFETY: maxima were written before the last barrier but one, or the last.
        let maxima = unsafe { self.core.shared_rows.get(row, 0..self.member.threads()) };
        maxima.fold(f32::NEG_INFINITY, |max, x| sampler::higher(max, x as f32))
    }

    fn spread_of(&self, row: usize, width: usize) -> Result<Spread, sampler::SampleError> {
        let sums = self.member.threads()..self.member.threads() + width.div_ceil(RUN);
        // SAFETY: sums were written before the last barrier.
        let sum = unsafe { self.core.shared_rows.get(row, sums) }.fold(0.0, |sum, run| sum + run);
        Spread::new(self.max_of(row), sum)
    }
}
