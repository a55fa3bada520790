//! Time as the pure code sees it: a number that the driver passes in.

/// Microseconds on the driver's monotonic clock, from an arbitrary start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This time plus `ms` milliseconds, saturating.
    pub fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000)))
    }

    /// Whole milliseconds from `self` until `later`; 0 when `later` has passed.
    pub fn ms_until(self, later: Self) -> u64 {
        later.0.saturating_sub(self.0) / 1_000
    }
}
