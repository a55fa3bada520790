//! What a node reports of its load, and how fast it has been lately.

use std::time::Duration;

use baton_kv::PoolCounts;
use baton_scheduler::{SchedulerLoad, StepPlan};

use crate::metrics::StepKind;

/// A node's load at one moment.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// The pool's blocks.
    pub pool: PoolCounts,
    /// The scheduler's queues.
    pub scheduler: SchedulerLoad,
    /// Sequences and reservations whose streams live.
    pub sequences: usize,
    /// Live handoffs into this node.
    pub handoffs: usize,
    /// Push streams that fill them.
    pub streams: usize,
    /// Holds on blocks that are being read by pushes.
    pub held_reads: usize,
    /// Moving average; 0 when not known yet.
    pub prefill_tokens_per_s: f64,
    /// Moving average; 0 when not known yet.
    pub decode_step_ms: f64,
}

impl Load {
    /// Nothing runs, waits, fills or reads.
    pub fn is_idle(&self) -> bool {
        let Self {
            scheduler,
            sequences,
            handoffs,
            held_reads,
            ..
        } = self;
        scheduler.waiting + scheduler.running + sequences + handoffs + held_reads == 0
    }
}

/// Weight of the newest step in a moving average: about the last ten steps count.
const NEWEST: f64 = 0.2;

/// Moving averages over steps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rates {
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_step_ms: f64,
}

impl Rates {
    /// Takes in a step of `prefill_rows` and `decode_rows`. In a mixed step, prefill counts for the time beyond a usual decode step.
    pub(crate) fn observe(&mut self, prefill_rows: usize, decode_rows: usize, duration: Duration) {
        let ms = duration.as_secs_f64() * 1_000.0;
        if prefill_rows == 0 {
            blend(&mut self.decode_step_ms, ms);
            return;
        }
        let decode_ms = if decode_rows == 0 { 0.0 } else { self.decode_step_ms };
        let prefill_ms = ms - decode_ms;
        if prefill_ms > 0.0 {
            blend(
                &mut self.prefill_tokens_per_s,
                prefill_rows as f64 * 1_000.0 / prefill_ms,
            );
        }
    }
}

fn blend(average: &mut f64, newest: f64) {
    *average = if *average == 0.0 {
        newest
    } else {
        *average + NEWEST * (newest - *average)
    };
}

/// What is in a step: its kind, prefill rows and decode rows.
pub(crate) fn step_rows(plan: &StepPlan) -> (StepKind, usize, usize) {
    let decode = plan
        .spans
        .iter()
        .filter(|span| span.rows.len() == 1 && span.sample.as_ref().is_some_and(|sample| sample.index > 0))
        .count();
    let prefill = plan.rows() - decode;
    let kind = match (prefill, decode) {
        (_, 0) => StepKind::Prefill,
        (0, _) => StepKind::Decode,
        _ => StepKind::Mixed,
    };
    (kind, prefill, decode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_step_gives_prefill_the_time_beyond_a_decode_step() {
        let mut rates = Rates::default();
        rates.observe(0, 4, Duration::from_millis(10));
        assert_eq!(rates.decode_step_ms, 10.0);
        rates.observe(100, 4, Duration::from_millis(30));
        assert!((rates.prefill_tokens_per_s - 5_000.0).abs() < 1e-6, "{rates:?}");
        assert_eq!(
            rates.decode_step_ms, 10.0,
            "a mixed step says nothing about decode steps"
        );
        rates.observe(0, 4, Duration::from_millis(20));
        assert!((rates.decode_step_ms - 12.0).abs() < 1e-6, "{rates:?}");
    }
}
