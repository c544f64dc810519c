//! What tests with real disks need: a clock, an NBD client, and QEMU's programs.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "tests have threads and time; the rule is for the library"
)]

pub(crate) mod guest;
pub(crate) mod nbd;
pub(crate) mod qemu;

use std::time::Duration;

use blockjob::driver::Clock;
use tokio::time::Instant;

/// The time since it was made.
#[derive(Debug)]
pub(crate) struct RealTime(Instant);

impl RealTime {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for RealTime {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        tokio::time::sleep_until(self.0 + at).await;
    }
}
