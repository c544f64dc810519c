//! How fast a job may copy: a rate limit in slices of 100 ms.
//!
//! ```text
//! quota per slice = speed / 10
//!
//! slice │▓▓▓▓▓▓    │          accounted < quota: go on
//!       │▓▓▓▓▓▓▓▓▓▓│▓▓▓▓      accounted ≥ quota: this slice is stretched to accounted / quota slices,
//!       └──────────┴────┘     and who asks waits for its end; then accounting starts empty
//! ```
//!
//! 1. A request may overshoot its quota; it pays by waiting afterwards.
//! 2. An idle job saves up nothing beyond one slice.
//! 3. A change of speed turns what is owed into time, at most one slice of it: bytes accounted under a
//!    high limit are never divided by a low one.

use std::time::Duration;

const SLICE: Duration = Duration::from_millis(100);
const SLICES_PER_SECOND: u64 = 10;

/// Accounts for bytes and says how long to wait.
#[derive(Clone, Debug)]
pub(crate) struct RateLimit {
    /// Bytes per second; 0 for no limit.
    speed: u64,
    /// When the current slice ends, if it is not stretched.
    slice_end: Duration,
    /// Bytes accounted to the current slice.
    accounted: u64,
}

impl RateLimit {
    pub(crate) fn new(speed: u64) -> Self {
        Self {
            speed,
            slice_end: Duration::ZERO,
            accounted: 0,
        }
    }

    pub(crate) fn speed(&self) -> u64 {
        self.speed
    }

    pub(crate) fn set_speed(&mut self, now: Duration, speed: u64) {
        if speed == self.speed {
            return;
        }
        let owed = self.free_at(now).saturating_sub(now).min(SLICE);
        self.speed = speed;
        // A full slice that ends when the debt is paid.
        self.accounted = if owed.is_zero() { 0 } else { self.quota() };
        self.slice_end = if owed.is_zero() {
            now.saturating_add(SLICE)
        } else {
            now.saturating_add(owed)
        };
    }

    /// When the next request may go out; `now` or earlier if it may at once.
    pub(crate) fn free_at(&mut self, now: Duration) -> Duration {
        if self.speed == 0 {
            return now;
        }
        let end = self.stretched_end();
        if now >= end {
            self.accounted = 0;
            self.slice_end = now.saturating_add(SLICE);
            return now;
        }
        if self.accounted < self.quota() {
            return now;
        }
        end
    }

    pub(crate) fn account(&mut self, bytes: u64) {
        if self.speed != 0 {
            self.accounted = self.accounted.saturating_add(bytes);
        }
    }

    fn quota(&self) -> u64 {
        (self.speed / SLICES_PER_SECOND).max(1)
    }

    /// The end of the current slice, stretched by what was accounted beyond its quota.
    fn stretched_end(&self) -> Duration {
        let quota = self.quota();
        let beyond = self.accounted.saturating_sub(quota);
        let nanos = u128::from(beyond) * SLICE.as_nanos() / u128::from(quota);
        let stretch = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.slice_end.saturating_add(stretch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends requests of `size` as fast as the limit lets it; the bytes sent by `until`.
    fn sent(limit: &mut RateLimit, size: u64, from: Duration, until: Duration) -> u64 {
        let (mut now, mut total) = (from, 0);
        while now < until {
            let free = limit.free_at(now);
            if free > now {
                now = free;
                continue;
            }
            limit.account(size);
            total += size;
        }
        total
    }

    #[test]
    fn the_rate_holds_over_many_slices_for_small_and_large_requests() {
        for size in [1_000, 7_777, 100_000, 2_500_000] {
            let mut limit = RateLimit::new(1_000_000);
            let total = sent(&mut limit, size, Duration::ZERO, Duration::from_secs(20));
            let (low, high) = (19_800_000, 20_200_000 + 2 * size);
            assert!(
                (low..=high).contains(&total),
                "{total} bytes in requests of {size}"
            );
        }
    }

    #[test]
    fn without_a_limit_nothing_waits_and_nothing_is_owed() {
        let mut limit = RateLimit::new(0);
        limit.account(u64::MAX);
        assert_eq!(limit.free_at(5 * MS), 5 * MS);
        limit.set_speed(5 * MS, 10);
        assert_eq!(limit.free_at(5 * MS), 5 * MS);
    }

    #[test]
    fn idle_time_saves_up_no_more_than_a_slice() {
        let mut limit = RateLimit::new(1_000_000);
        limit.account(10);
        let later = Duration::from_secs(3600);
        let total = sent(&mut limit, 10_000, later, later + 1000 * MS);
        assert!(total <= 1_100_000, "{total}");
    }

    #[test]
    fn lowering_the_speed_owes_at_most_one_slice() {
        let mut limit = RateLimit::new(1_000_000_000);
        assert_eq!(limit.free_at(MS), MS);
        limit.account(150_000_000);
        limit.set_speed(2 * MS, 1_000);
        assert!(limit.free_at(2 * MS) <= 102 * MS);
    }

    #[test]
    fn raising_the_speed_shortens_what_is_owed() {
        let mut limit = RateLimit::new(1);
        limit.free_at(MS);
        limit.account(1_000_000);
        assert!(limit.free_at(MS) > Duration::from_secs(90_000));
        limit.set_speed(MS, 1_000_000_000);
        assert!(limit.free_at(MS) <= 101 * MS);
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let mut late = RateLimit::new(1);
        late.free_at(Duration::MAX);
        late.account(1 << 40);
        late.set_speed(Duration::MAX, 2);
        assert_eq!(late.free_at(Duration::MAX), Duration::MAX);
        let mut limit = RateLimit::new(1);
        limit.free_at(MS);
        limit.account(u64::MAX);
        limit.account(u64::MAX);
        assert!(limit.free_at(MS) > Duration::from_secs(1 << 32));
        limit.set_speed(MS, u64::MAX);
        assert!(limit.free_at(MS) <= 101 * MS);
    }
}
