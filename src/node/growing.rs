//! A log of writes for a disk that may grow.
//!
//! ```text
//! disk    0 ─────────── len           0 ─────────────────────── len
//! log     ├─ first ────────┤    ─▶    ├─ first ────────┼─ next ────────────────────────────┤
//! ```
//!
//! 1. A log covers the disk, and may go on past its end. Nothing is marked there.
//! 2. Pieces are never moved or given back, so that a write which looks for its piece needs no lock. Each is
//!    at least as long as all before it, so there are few, and pages that no mark has touched cost nothing.
//! 3. All pieces but the last have whole words: what a word of one stands for is a word of a bitmap as well.

use std::sync::OnceLock;

use crate::bitmap::HBitmap;
use crate::log::{DirtyLog, DirtyLogError, DirtyWord};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// Longest disk that can be recorded.
const LEN_MAX: u64 = i64::MAX as u64;

/// What a log is drained into.
pub(super) trait Record {
    /// Makes dirty what a log of that granularity has marked.
    fn set_word(&mut self, granularity: Granularity, word: DirtyWord);
}

impl Record for &mut HBitmap {
    fn set_word(&mut self, granularity: Granularity, word: DirtyWord) {
        HBitmap::set_word(self, granularity, word);
    }
}

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

    /// A piece up to `end`, and to the end of the 64 granules there.
    fn piece(start: u64, end: u64, granularity: Granularity) -> Result<Self, DirtyLogError> {
        // A disk that is too long is refused by the log.
        let word =
            Granularity::from_exponent(granularity.exponent() + 6).expect("it is at most 31");
        let end = word.align_up(end).min(LEN_MAX.max(end));
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

    /// Whether it covers `len` bytes.
    pub(super) fn covers(&self, len: u64) -> bool {
        self.pieces().last().is_some_and(|last| len <= last.end())
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

    /// As [`DirtyLog::drain_into`], for bitmaps as long as the disk.
    pub(super) fn drain_into(&self, bitmaps: &mut [impl Record]) {
        let granularity = self.log.granularity();
        for piece in self.pieces() {
            let first = granularity.granule_of(piece.start);
            piece.log.drain(|mut word| {
                word.first_granule += first;
                for bitmap in bitmaps.iter_mut() {
                    bitmap.set_word(granularity, word);
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
        let mut bitmap = HBitmap::new(len, log.log.granularity()).unwrap();
        log.drain_into(&mut [&mut bitmap]);
        bitmap.check_invariants();
        assert!(log.is_clean());
        bitmap.runs().collect()
    }

    #[test]
    fn a_mark_across_pieces_is_in_all_of_them() {
        let word = 64 * G;
        let log = log(1000);
        for len in [1001, word, word + 1, word + 1, 3000, 100_000, 100 * word] {
            log.grow_to(len).unwrap();
        }
        let ends: Vec<_> = log.pieces().map(GrowingLog::end).collect();
        assert_eq!(ends, [word, 2 * word, 4 * word, 100 * word]);
        let len = 99 * word + 7;
        log.mark((word - 1..4 * word + 1).into());
        log.mark((len - 1..len).into());
        let bounds = [word - G..4 * word + G, len - 7..len];
        assert_eq!(drained(&log, len), bounds.map(ByteRange::from));
        for at in ends[..3].iter().flat_map(|end| [end - 1, *end]) {
            log.mark((at..at + 1).into());
            let granule = at / G * G;
            assert_eq!(drained(&log, len), [(granule..granule + G).into()]);
        }
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
        log.mark((LEN_MAX - 1..LEN_MAX).into());
        assert!(!log.is_clean());
    }
}
