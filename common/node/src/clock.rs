//! The monotonic clock, as the pure crates see it.

use std::{sync::OnceLock, time::Duration};

use baton_kv::Time;
use tokio::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

fn start() -> Instant {
    *START.get_or_init(Instant::now)
}

/// Now: microseconds since the first call in this process.
pub fn now() -> Time {
    Time(u64::try_from(start().elapsed().as_micros()).unwrap_or(u64::MAX))
}

/// `time` as an instant that tokio's timers take.
pub fn instant(time: Time) -> Instant {
    // A year is as good as never, and cannot overflow.
    const FAR: u64 = 365 * 24 * 3_600 * 1_000_000;
    start() + Duration::from_micros(time.0.min(FAR))
}

/// Sleeps until `time`. Cancel-safe.
pub async fn sleep_until(time: Time) {
    tokio::time::sleep_until(instant(time)).await;
}

/// Milliseconds from `earlier` to `later`, with fractions; 0 when `later` is the earlier one.
pub fn ms_between(earlier: Time, later: Time) -> f64 {
    later.0.saturating_sub(earlier.0) as f64 / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_forward_and_maps_to_instants() {
        let first = now();
        let second = now();
        assert!(second >= first);
        assert_eq!(instant(first.after_ms(5)) - instant(first), Duration::from_millis(5));
        assert_eq!(ms_between(Time(1_000), Time(3_500)), 2.5);
        assert_eq!(ms_between(Time(3_500), Time(1_000)), 0.0);
        // Far times do not overflow.
        assert!(instant(Time(u64::MAX)) > Instant::now());
    }
}
