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
