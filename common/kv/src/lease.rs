//! A lease is remaining time: the grantor's clock rules, and the grantee counts from when it *sent* its request,
//! so that the grantee always believes the lease to end no later than the grantor does.

use crate::Time;

/// A right that ends by itself. Extended by the later of two ends, never shortened, never past the deadline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    ends: Time,
    deadline: Time,
}

impl Lease {
    /// A lease of `ms` milliseconds from `now`, capped at the request's `deadline`.
    pub fn grant(now: Time, ms: u64, deadline: Time) -> Self {
        Self {
            ends: now.after_ms(ms).min(deadline),
            deadline,
        }
    }

    /// Extends to `ms` from `now` (never shortens, never past the deadline). False, and unchanged, once ended.
    pub fn renew(&mut self, now: Time, ms: u64) -> bool {
        if self.ended(now) {
            return false;
        }
        self.ends = self.ends.max(now.after_ms(ms)).min(self.deadline);
        true
    }

    /// Whether it has ended at `now`.
    pub fn ended(&self, now: Time) -> bool {
        now >= self.ends
    }

    /// When it ends.
    pub fn ends(&self) -> Time {
        self.ends
    }

    /// What goes on the wire: milliseconds that remain.
    pub fn remaining_ms(&self, now: Time) -> u64 {
        now.ms_until(self.ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_ms(ms: u64) -> Time {
        Time(ms * 1_000)
    }

    #[test]
    fn a_renewal_never_shortens_nor_passes_the_deadline_nor_revives() {
        /// A lease of 100 ms, granted at 0 and renewed once.
        fn check(deadline_ms: u64, renewed_ms: u64, ms: u64, renewed: bool, ends_ms: u64) {
            let mut lease = Lease::grant(at_ms(0), 100, at_ms(deadline_ms));
            assert_eq!(lease.renew(at_ms(renewed_ms), ms), renewed);
            assert_eq!(lease.ends(), at_ms(ends_ms));
            assert!(!lease.ended(Time(ends_ms * 1_000 - 1)) && lease.ended(at_ms(ends_ms)));
        }
        check(1_000, 50, 100, true, 150);
        check(1_000, 50, 10, true, 100);
        check(120, 50, 100, true, 120);
        check(60, 50, 100, true, 60);
        check(1_000, 50, u64::MAX, true, 1_000);
        check(1_000, 100, 100, false, 100);
        check(60, 60, 100, false, 60);
    }

    #[test]
    fn the_grantee_never_believes_in_more_than_the_grantor() {
        for sent in [0, 1, 999, 1_001] {
            // Granted 3 µs after the request was sent.
            let lease = Lease::grant(Time(sent + 3), 20, at_ms(15));
            let granted_at = Time(sent + 3);
            let believed = Time(sent).after_ms(lease.remaining_ms(granted_at));
            assert!(believed <= lease.ends());
        }
    }
}
