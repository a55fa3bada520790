//! Who takes part in the next step.
//!
//! A thread that has lost its core costs the others the time that they wait for it, where it adds a share of the work. Going without it is cheaper once
//! that time is more than what it adds, and then it stands aside: as if the team had a thread less. It is tried again after a while, longer each time.
//! Nothing of this changes a result, as results do not depend on the number of threads.

use std::time::Duration;

/// Longest that a thread stands aside: how late a core that is free again is noticed. A trial that fails costs some milliseconds.
const LONGEST: Duration = Duration::from_secs(1);

/// The team's threads. Thread 0, the caller, always takes part.
#[derive(Debug)]
pub(super) struct Attendance {
    threads: Vec<Standing>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Standing {
    /// Left of the time that it stands aside.
    aside: Duration,
    /// How long it stood aside, less the time that it has taken part since.
    distrust: Duration,
}

impl Attendance {
    /// All take part.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            threads: vec![Standing::default(); threads],
        }
    }

    /// Those that take part, ascending.
    pub(super) fn present(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.threads.len()).filter(|&thread| thread == 0 || self.threads[thread].aside.is_zero())
    }

    /// Time has passed.
    pub(super) fn pass(&mut self, time: Duration) {
        for standing in &mut self.threads {
            let left = if standing.aside.is_zero() {
                &mut standing.distrust
            } else {
                &mut standing.aside
            };
            *left = left.saturating_sub(time);
        }
    }

    /// After a step of those present, for `waited(thread)` of which others waited for that thread: at most one more stands aside.
    ///
    /// With w waited for one of n threads, the work took `step - w`, and would take n / (n - 1) of that without the thread: less than `step` if
    /// w · n > `step`.
    pub(super) fn judge(&mut self, step: Duration, waited: impl Fn(usize) -> Duration) {
        let present = self.present().count();
        let last = self.present().next_back().unwrap_or(0);
        let worst = self.present().map(|thread| (waited(thread), thread)).max();
        let (waited, worst) = worst.unwrap_or_default();
        let distrust = (2 * (self.threads[worst].distrust + waited)).min(LONGEST);
        self.pass(step);
        if present > 1 && waited * present as u32 > step {
            self.threads[worst].distrust = distrust;
            // The caller must run: another leaves it a core to move to.
            let leaver = if worst == 0 { last } else { worst };
            self.threads[leaver].aside = distrust;
        }
    }
}

#[cfg(test)]
mod tests;
