//! What a job does when a device fails, and how long it waits before it tries again.

use std::io;
use std::time::Duration;

/// What a job does when one of its devices fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// Fail with that error.
    #[default]
    Report,
    /// Try again later, after a delay that grows from 10 ms to 5 s. The job never succeeds with
    /// something left out.
    Ignore,
    /// [`Stop`](Self::Stop) if the device is out of space, else [`Report`](Self::Report).
    Enospc,
    /// What suits the type of job: the same as [`Enospc`](Self::Enospc), for all there are.
    Auto,
    /// Pause, as if the user had asked for it; try again when the user resumes.
    Stop,
}

/// What is done about one error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// It is tried again.
    Ignore,
    /// The job is paused.
    Stop,
}

/// Whether an error has stopped the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IoStatus {
    /// No.
    #[default]
    Ok,
    /// Yes.
    Failed,
    /// Yes: there was no space left.
    NoSpace,
}

impl OnError {
    pub(crate) fn action(self, error: &io::Error) -> ErrorAction {
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if is_no_space(error) => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
        }
    }
}

pub(crate) fn is_no_space(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::StorageFull
}

/// Delays between tries, so that a dead device is not hammered.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    next: Duration,
    /// When the current delay ends.
    until: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const LAST: Duration = Duration::from_secs(5);

    pub(crate) fn new() -> Self {
        Self {
            next: Self::FIRST,
            until: Duration::ZERO,
        }
    }

    /// When to try again what has just failed. What fails before that time is tried again then, too:
    /// one bad moment that hits many requests counts once.
    pub(crate) fn until(&mut self, now: Duration) -> Duration {
        if now >= self.until {
            self.until = now.saturating_add(self.next);
            self.next = (self.next * 2).min(Self::LAST);
        }
        self.until
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enospc_stops_for_space_only() {
        let full = io::Error::from_raw_os_error(28);
        let other = io::Error::from_raw_os_error(5);
        assert_eq!(OnError::Enospc.action(&full), ErrorAction::Stop);
        assert_eq!(OnError::Enospc.action(&other), ErrorAction::Report);
        assert_eq!(OnError::Stop.action(&other), ErrorAction::Stop);
        assert_eq!(OnError::default().action(&full), ErrorAction::Report);
    }

    #[test]
    fn delays_double_up_to_five_seconds() {
        let mut backoff = Backoff::new();
        let mut now = Duration::ZERO;
        let delays: Vec<u128> = (0..11)
            .map(|_| {
                let until = backoff.until(now);
                let delay = until - std::mem::replace(&mut now, until);
                delay.as_millis()
            })
            .collect();
        assert_eq!(
            delays,
            [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000]
        );
        backoff.reset();
        assert_eq!((backoff.until(now) - now).as_millis(), 10);
    }

    #[test]
    fn failures_at_about_the_same_time_share_a_delay() {
        let mut backoff = Backoff::new();
        let now = Duration::from_secs(1);
        let until = backoff.until(now);
        for _ in 0..16 {
            assert_eq!(backoff.until(now + Duration::from_millis(9)), until);
        }
        assert_eq!((backoff.until(until) - until).as_millis(), 20);
    }
}
