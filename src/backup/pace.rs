//! How much is copied in the background at the same time while guests wait for the target, too.
//!
//! ```text
//! a guest's copy goes out     with half as much in the background from then on
//! it was soon there           as much as before
//! it took long                it stays like that, unless that took as long with twice as much: then it is the
//!                             target, and not what stands in line there, and it is as much as before that
//! something was copied        a little more
//! ```
//!
//! A target does what it is given in turn, so what is in flight ahead of a guest's copy is what that waits for.

use std::time::Duration;

use crate::copy::OpId;

/// What a guest may wait for a copy without anything being done about it.
const SOON: Duration = Duration::from_millis(5);

/// How many bytes are copied for each that is copied more at the same time.
const BYTES_PER_BYTE: u64 = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes in flight in the background, at most.
    bytes: u64,
    least: u64,
    most: u64,
    /// The copy for a guest that is watched, when it went out, and what there was before.
    watched: Option<(OpId, Duration, u64)>,
    /// How long the last one took, if that was long.
    before: Option<Duration>,
}

impl Pace {
    pub(super) fn new(least: u64, most: u64) -> Self {
        let most = most.max(least);
        Self {
            bytes: most,
            least,
            most,
            watched: None,
            before: None,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A copy to the target goes out for a guest, behind so many bytes.
    pub(super) fn begin(&mut self, id: OpId, now: Duration, ahead: u64) {
        if self.watched.is_none() && ahead > 0 {
            self.watched = Some((id, now, self.bytes));
            self.bytes = (ahead / 2).clamp(self.least, self.bytes);
        }
    }

    /// It is over, if it is the one that is watched.
    pub(super) fn end(&mut self, id: OpId, now: Duration) {
        let Some((_, since, bytes)) = self.watched.take_if(|(watched, ..)| *watched == id) else {
            return;
        };
        let took = now.saturating_sub(since);
        let was_before = self.before.replace(took);
        if took <= SOON {
            self.before = None;
            self.bytes = bytes;
        } else if was_before.is_some_and(|before| took > before / 4 * 3) {
            self.bytes = bytes.saturating_mul(2).min(self.most);
        }
    }

    /// Nothing is out any more.
    pub(super) fn lose(&mut self) {
        self.watched = None;
    }

    /// So much was copied in the background.
    pub(super) fn copied(&mut self, bytes: u64) {
        if self.watched.is_none() {
            let more = self.bytes.saturating_add(bytes / BYTES_PER_BYTE);
            self.bytes = more.min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::{Op, OpKind};

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    /// Copies for guests, one after the other, to a target of which each takes that long behind so many bytes.
    fn after(copies: usize, took: impl Fn(u64) -> Duration) -> Pace {
        let mut pace = Pace::new(64 * KIB, 16 * MIB);
        let mut now = Duration::ZERO;
        for _ in 0..copies {
            let id = Op::new(OpKind::Flush).id();
            let ahead = pace.bytes();
            pace.begin(id, now, ahead);
            now += took(ahead);
            pace.end(id, now);
            pace.copied(64 * KIB);
        }
        pace
    }

    #[test]
    fn behind_a_line_that_is_long_little_is_put_in_it() {
        let rate = 40 * MIB;
        let wait = |ahead: u64| Duration::from_secs_f64((ahead + 64 * KIB) as f64 / rate as f64);
        for copies in 12..200 {
            let bytes = after(copies, wait).bytes();
            assert!(wait(bytes) < 3 * SOON, "{bytes} after {copies}");
        }
    }

    #[test]
    fn a_target_that_is_fast_or_far_away_gets_as_much_as_ever() {
        for time in [Duration::from_millis(1), Duration::from_millis(50)] {
            for copies in 10..200 {
                let bytes = after(copies, |_| time).bytes();
                assert!(bytes >= 4 * MIB, "{bytes} after {copies} of {time:?}");
            }
        }
    }

    #[test]
    fn when_guests_do_not_wait_any_more_it_is_as_much_as_before() {
        let mut pace = after(40, |ahead| Duration::from_micros(ahead / 40));
        assert!(pace.bytes() < MIB);
        pace.copied(15 * BYTES_PER_BYTE * MIB);
        pace.copied(BYTES_PER_BYTE * MIB);
        assert_eq!(pace.bytes(), 16 * MIB);
    }
}
