//! A log of writes for a disk that may grow.
//!
//! ```text
//! disk    0 ─────────── len           0 ─────────────────────── len
//! log     ├─ first ────────┤    ─▶    ├─ first ────────┼─ next ────────────────────────────┤
//! ```
//!
//! 1. A log covers the disk, and may go on past its end. Nothing is marked there; what is drained of the
//!    last granule ends with the disk.
//! 2. Pieces are never moved or given back, so that a write which looks for its piece needs no lock. Each is
//!    at least as long as all before it, so there are few, and pages that no mark has touched cost nothing.
//! 3. All pieces but the last end where a granule does: no granule lies in two.

use std::sync::OnceLock;

use crate::log::{DirtyLog, DirtyLogError};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// Longest disk that can be recorded.
const LEN_MAX: u64 = i64::MAX as u64;

/// A [`DirtyLog`], and what it was prolonged by.
pub(super) struct GrowingLog {
    /// Offset on the disk of the first byte of `log`.
    start: u64,
    log: DirtyLog,
    /// What follows it.
    next: OnceLock<Box<GrowingLog>>,
}

impl GrowingLog {
    /// A clean log that covers `len` bytes.
    pub(super) fn new(len: u64, granularity: Granularity) -> Result<Self, DirtyLogError> {
        Self::piece(0, len, granularity)
    }

    /// A piece up to `end`, and to the end of the granule there.
    fn piece(start: u64, end: u64, granularity: Granularity) -> Result<Self, DirtyLogError> {
        // A disk that is too long is refused by the log.
        let end = granularity.align_up(end).min(LEN_MAX.max(end));
        Ok(Self {
            start,
            log: DirtyLog::new(end - start, granularity)?,
            next: OnceLock::new(),
        })
    }

    /// The first byte that it does not cover.
    fn end(&self) -> u64 {
        self.start + self.log.len()
    }

    /// Covers `len` bytes from now on. Not for two threads at once. On error nothing has changed.
    pub(super) fn grow_to(&self, len: u64) -> Result<(), DirtyLogError> {
        let mut last = self;
        while let Some(next) = last.next.get() {
            last = next;
        }
        let end = last.end();
        if len <= end || is_broken(Sabotage::LogStaysShort) {
            return Ok(());
        }
        if len > LEN_MAX {
            return Err(DirtyLogError::TooLong { len });
        }
        let granularity = self.log.granularity();
        let twice = end.saturating_mul(2).clamp(len, LEN_MAX);
        let piece =
            Self::piece(end, twice, granularity).or_else(|_| Self::piece(end, len, granularity))?;
        let is_first = last.next.set(Box::new(piece)).is_ok();
        assert!(is_first, "one at a time makes a log grow");
        Ok(())
    }

    /// As [`DirtyLog::mark`].
    #[inline]
    pub(super) fn mark(&self, range: ByteRange) {
        self.log.mark(range);
        if range.end() > self.log.len() {
            self.mark_further(range);
        }
    }

    /// Marks what lies past the first piece.
    #[cold]
    fn mark_further(&self, range: ByteRange) {
        for piece in self.pieces().skip(1) {
            let within = |offset: u64| offset.saturating_sub(piece.start);
            piece
                .log
                .mark((within(range.start())..within(range.end())).into());
        }
    }

    /// As [`DirtyLog::is_clean`].
    pub(super) fn is_clean(&self) -> bool {
        self.pieces().all(|piece| piece.log.is_clean())
    }

    /// As [`DirtyLog::drain_ranges`], of the first `len` bytes. Others are thrown away.
    pub(super) fn drain_ranges(&self, len: u64, mut sink: impl FnMut(ByteRange)) {
        for piece in self.pieces() {
            piece.log.drain_ranges(|range| {
                let start = piece.start + range.start();
                let end = (piece.start + range.end()).min(len);
                if start < end {
                    sink((start..end).into());
                }
            });
        }
    }

    fn pieces(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |piece| piece.next.get().map(Box::as_ref))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const G: u64 = 512;

    fn log(len: u64) -> GrowingLog {
        GrowingLog::new(len, Granularity::from_bytes(G).unwrap()).unwrap()
    }

    fn drained(log: &GrowingLog, len: u64) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        log.drain_ranges(len, |range| ranges.push(range));
        assert!(log.is_clean());
        ranges
    }

    #[test]
    fn a_mark_across_pieces_is_in_all_of_them() {
        let log = log(1000);
        for len in [1001, 1024, 5000, 5000, 3000, 100_000] {
            log.grow_to(len).unwrap();
        }
        assert_eq!(log.pieces().count(), 3);
        log.mark((600..90_000).into());
        log.mark((99_999..u64::MAX).into());
        let bounds = [512..1024, 1024..5120, 5120..90_112, 99_840..100_000];
        assert_eq!(drained(&log, 100_000), bounds.map(ByteRange::from));
        for (at, len) in [(0, 1000), (1024, 1025), (5119, 6000), (5120, 6000)] {
            log.mark((at..at + 1).into());
            let granule = at / G * G;
            let expected = ByteRange::from(granule..(granule + G).min(len));
            assert_eq!(drained(&log, len), [expected]);
        }
    }

    #[test]
    fn what_lies_past_the_disk_is_thrown_away() {
        let log = log(1000);
        log.grow_to(2000).unwrap();
        log.mark((1000..4000).into());
        assert!(!log.is_clean());
        assert_eq!(drained(&log, 1000), [(512..1000).into()]);
        log.mark((2048..4000).into());
        assert_eq!(drained(&log, 1000), []);
    }

    #[test]
    fn it_grows_from_nothing_and_to_the_longest() {
        let longest = Granularity::from_bytes(1 << 31).unwrap();
        let log = GrowingLog::new(0, longest).unwrap();
        for len in [1, 1 << 40, LEN_MAX - 1, LEN_MAX] {
            log.grow_to(len).unwrap();
            assert!(log.pieces().last().unwrap().end() >= len);
        }
        assert!(log.pieces().count() <= 4);
        let error = log.grow_to(LEN_MAX + 1).unwrap_err();
        assert_eq!(error, DirtyLogError::TooLong { len: LEN_MAX + 1 });
        log.mark((LEN_MAX - 1..u64::MAX).into());
        let last = LEN_MAX >> 31 << 31;
        assert_eq!(drained(&log, LEN_MAX), [(last..LEN_MAX).into()]);
    }
}
