//! Taking what was marked out of a log, and where it goes.

use std::ops::Range;

use super::{DirtyLog, LOOK, ROW_SHIFT, Rule, WORD_SHIFT, WRITE};
use crate::bitmap::{HBitmap, MergeError};
use crate::sync::atomic::{Ordering, fence};
use crate::units::ByteRange;

impl DirtyLog {
    /// Takes what was marked out of the log and hands it to `sink`, in ascending order, 64 granules at
    /// a time.
    ///
    /// It visits only what was touched since the last drain, and its neighbours, and every word at most once, so it ends
    /// also while others keep marking. What they mark meanwhile is handed out now or the next time.
    /// Drains may overlap: every mark goes to one of them. Who must know of all marks up to now drains
    /// under a lock, else another drain may still be handing some out.
    ///
    /// Read the data of the disk after the drain has returned, not from within `sink`: it ends with
    /// the full memory barrier that is the counterpart to the one of [`mark`](Self::mark).
    ///
    /// # Panics
    ///
    /// Only when `sink` does. Then everything that `sink` has not returned for is marked again.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{DirtyLog, DirtyWord, Granularity};
    ///
    /// let log = DirtyLog::new(1 << 30, Granularity::DEFAULT)?;
    /// log.mark((66 * 65536..68 * 65536).into());
    ///
    /// let mut words = Vec::new();
    /// log.drain(|word| words.push(word));
    /// assert_eq!(words, [DirtyWord { first_granule: 64, bits: 0b1100 }]);
    ///
    /// log.drain(|_| unreachable!("a mark is handed out once"));
    /// # Ok::<(), blockjob::DirtyLogError>(())
    /// ```
    pub fn drain(&self, mut sink: impl FnMut(DirtyWord)) {
        if !self.is_clean() {
            self.drain_row(self.top, 0, &mut sink);
        }
        if self.keeps(Rule::FenceAfterDrain) {
            fence(Ordering::SeqCst);
        }
    }

    /// [Drains](Self::drain) the log as ranges of bytes, ascending, none touching the next. They begin
    /// and end at granule boundaries or at the end of the disk.
    ///
    /// # Panics
    ///
    /// Only when `sink` does. Then everything that `sink` has not returned for is marked again.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{ByteRange, DirtyLog, Granularity};
    ///
    /// let log = DirtyLog::new(1000, Granularity::from_bytes(1).unwrap())?;
    /// log.mark((10..20).into());
    /// log.mark((60..200).into());
    /// log.mark((999..1000).into());
    ///
    /// let mut dirty = Vec::new();
    /// log.drain_ranges(|range| dirty.push(range));
    /// assert_eq!(dirty, [10..20, 60..200, 999..1000].map(ByteRange::from));
    /// # Ok::<(), blockjob::DirtyLogError>(())
    /// ```
    pub fn drain_ranges(&self, sink: impl FnMut(ByteRange)) {
        let mut joined = Joined {
            log: self,
            run: 0..0,
            sink,
        };
        self.drain(|word| word.runs().for_each(|run| joined.push(run)));
        joined.hand_out();
    }

    /// [Drains](Self::drain) the log into all of some bitmaps, each of a granularity of its own. A bitmap
    /// that is coarser than the log gets the whole granule dirty.
    ///
    /// Bitmaps that were not [reserved](HBitmap::reserve) may take their memory here.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch) if one is not as long as the log. Nothing was drained
    /// then.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{DirtyLog, Granularity, HBitmap};
    ///
    /// let log = DirtyLog::new(1 << 30, Granularity::from_bytes(4096).unwrap())?;
    /// let mut backup = HBitmap::new(1 << 30, Granularity::DEFAULT)?;
    /// let mut mirror = HBitmap::new(1 << 30, log.granularity())?;
    /// log.mark((4096..8192).into());
    ///
    /// log.drain_into(&mut [&mut backup, &mut mirror])?;
    /// assert!(log.is_clean());
    /// assert!(backup.runs().eq([(0..65536).into()]));
    /// assert!(mirror.runs().eq([(4096..8192).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn drain_into(&self, bitmaps: &mut [&mut HBitmap]) -> Result<(), MergeError> {
        for bitmap in bitmaps.iter() {
            bitmap.check_as_long_as(self.len)?;
        }
        self.drain(|word| {
            for bitmap in bitmaps.iter_mut() {
                bitmap.set_word(self.granularity, word);
            }
        });
        Ok(())
    }

    /// Drains the words of one row and all that is below them.
    ///
    /// All of them are looked at first. That a word has something is as likely as not where marks are many and
    /// anywhere, and a look that nothing depends on is cheaper than a guess that is wrong.
    fn drain_row<F: FnMut(DirtyWord)>(&self, level: usize, row: u64, sink: &mut F) {
        let first = self.starts[level] + ((row as usize) << ROW_SHIFT);
        let end = self.starts[level + 1].min(first + (1 << ROW_SHIFT));
        let mut found = 0_u32;
        for (at, word) in self.words[first..end].iter().enumerate() {
            found |= u32::from(self.look(word) != 0) << at;
        }
        while found != 0 {
            let at = u64::from(found.trailing_zeros());
            found &= found - 1;
            let mut taken = self.take(level, (row << ROW_SHIFT) + at);
            if level == 0 {
                if taken.bits != 0 {
                    sink(taken.word());
                }
                taken.bits = 0;
            }
            while taken.bits != 0 {
                let below = taken.word().first_granule + u64::from(taken.bits.trailing_zeros());
                self.drain_row(level - 1, below, sink);
                taken.bits &= taken.bits - 1;
            }
            if level > 0 && !self.keeps(Rule::ClearedFirst) {
                self.word(level, (row << ROW_SHIFT) + at).swap(0, WRITE);
            }
        }
    }

    /// Swaps a word out.
    #[inline]
    fn take(&self, level: usize, index: u64) -> Taken<'_> {
        let word = self.word(level, index);
        let bits = if level > 0 && !self.keeps(Rule::ClearedFirst) {
            word.load(LOOK)
        } else {
            word.swap(0, self.order(WRITE))
        };
        Taken {
            log: self,
            level,
            index,
            bits,
        }
    }

    /// The bytes of a run of granules, but for what the last one has past the end of the disk.
    fn bytes_of(&self, granules: &Range<u64>) -> ByteRange {
        let end = self.granularity.start_of(granules.end).min(self.len);
        (self.granularity.start_of(granules.start)..end).into()
    }
}

/// Up to 64 neighbouring granules, as a [drain](DirtyLog::drain) hands them out.
///
/// # Examples
///
/// ```
/// use blockjob::DirtyWord;
///
/// let word = DirtyWord { first_granule: 128, bits: 0b1100_0001 };
/// assert_eq!(word.runs().collect::<Vec<_>>(), [128..129, 134..136]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyWord {
    /// The granule of the lowest bit, a multiple of 64.
    pub first_granule: u64,
    /// Bit *i* is set when granule `first_granule + i` was marked. Never zero in a drain.
    pub bits: u64,
}

impl DirtyWord {
    /// The granules that were marked, as ranges of granule indices, ascending, none touching the next.
    pub fn runs(self) -> impl Iterator<Item = Range<u64>> {
        let DirtyWord {
            first_granule,
            mut bits,
        } = self;
        std::iter::from_fn(move || {
            if bits == 0 {
                return None;
            }
            let lowest = bits.trailing_zeros();
            let count = (bits >> lowest).trailing_ones();
            // The carry runs through the lowest run of ones and leaves zeros behind.
            bits &= bits.wrapping_add(1 << lowest);
            let start = first_granule + u64::from(lowest);
            Some(start..start + u64::from(count))
        })
    }
}

/// Part of a word that was swapped out and is not dealt with yet. Dropped with bits in it, which is
/// when `sink` panics, it gives them back: what is in hand has nothing above it (invariant 4), and
/// would never be found again.
struct Taken<'a> {
    log: &'a DirtyLog,
    level: usize,
    index: u64,
    bits: u64,
}

impl Taken<'_> {
    /// The bits with their place in the level, which on the leaf level is the granule.
    fn word(&self) -> DirtyWord {
        DirtyWord {
            first_granule: self.index << WORD_SHIFT,
            bits: self.bits,
        }
    }
}

impl Drop for Taken<'_> {
    #[inline]
    fn drop(&mut self) {
        for run in self.word().runs() {
            self.log.set(self.level, run);
        }
    }
}

/// Runs of granules on their way to `sink`, joined where one word's last meets the next word's first.
struct Joined<'a, F: FnMut(ByteRange)> {
    log: &'a DirtyLog,
    /// Taken out of the log and not handed out yet; given back when `sink` panics.
    run: Range<u64>,
    sink: F,
}

impl<F: FnMut(ByteRange)> Joined<'_, F> {
    fn push(&mut self, run: Range<u64>) {
        if self.run.end != run.start {
            self.hand_out();
            self.run.start = run.start;
        }
        self.run.end = run.end;
    }

    fn hand_out(&mut self) {
        if !self.run.is_empty() {
            (self.sink)(self.log.bytes_of(&self.run));
            self.run = 0..0;
        }
    }
}

impl<F: FnMut(ByteRange)> Drop for Joined<'_, F> {
    fn drop(&mut self) {
        if !self.run.is_empty() {
            self.log.set(0, self.run.clone());
        }
    }
}
