//! How fast data was copied of late: by that it is guessed how long the guest would have to be held.

use std::time::Duration;

/// How fast data was copied of late.
#[derive(Debug, Default)]
pub(super) struct Pace {
    window_end: Duration,
    /// Bytes copied in the current window.
    bytes: u64,
    /// Bytes per window, the best of late.
    rate: u64,
}

impl Pace {
    const WINDOW: Duration = Duration::from_millis(100);

    pub(super) fn add(&mut self, now: Duration, bytes: u64) {
        if now >= self.window_end {
            // A window with little to do says little of the speed, so the best is forgotten slowly.
            self.rate = self.bytes.max(self.rate - self.rate / 4);
            self.bytes = 0;
            self.window_end = now.saturating_add(Self::WINDOW);
        }
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// What can be copied in that time.
    pub(super) fn bytes_in(&self, time: Duration) -> u64 {
        let rate = u128::from(self.rate.max(self.bytes));
        let bytes = rate.saturating_mul(time.as_nanos()) / Self::WINDOW.as_nanos();
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}
