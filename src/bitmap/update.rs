//! Setting and resetting: words first, and upwards only from words that stop or start being zero.
//!
//! ```text
//! set    words 3..6 ──▶ was one of them zero?           yes ──▶ summary bits 3..6 ──▶ …
//!
//! reset  word 3     ──▶ zero now? each edge for itself  no        its bit above stays
//!        word 4     ──▶ zero for certain                    ──▶ summary bit 4     ──▶ …
//!        word 5     ──▶ zero now? each edge for itself  yes ──▶ summary bit 5     ──▶ …
//! ```

use std::ops::Range;

use super::HBitmap;
use super::word::{Cut, bit, word_of, words_of};
use crate::units::{ByteRange, Granularity};

/// Why a range or an offset does not fit the bitmap. The bitmap is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// It ends past the bitmap.
    #[error("bytes {range} end past a bitmap of {len} bytes")]
    OutOfBounds {
        /// What was asked for.
        range: ByteRange,
        /// Bytes of the bitmap.
        len: u64,
    },
    /// It begins or ends amid a granule, and clearing the granule would forget its other bytes.
    #[error("bytes {range} begin or end amid a granule of {granularity}")]
    Unaligned {
        /// What was asked for.
        range: ByteRange,
        /// What its ends must be multiples of.
        granularity: Granularity,
    },
    /// It has no byte, so there is nothing to tell of.
    #[error("no byte at {offset} was asked about")]
    Empty {
        /// Where the range begins and ends.
        offset: u64,
    },
}

impl HBitmap {
    /// Makes every granule that `range` touches dirty, and says whether one was not before.
    ///
    /// `range` is rounded **outward** to granules. It may end past [`len`](Self::len) as long as it
    /// ends in the last granule. An empty range changes nothing.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](RangeError::OutOfBounds); the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// assert!(map.set(65535..65537)?, "one byte in each of two granules");
    /// assert_eq!(map.dirty_bytes(), 2 << 16);
    /// assert!(!map.set(0..4096)?, "it was dirty");
    /// assert!(map.set(0..2 << 20).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn set(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        let granules = self.granularity.outward(range);
        // Nearly every guest write is this.
        if granules.end - granules.start == 1 && range.end() <= self.len {
            return Ok(self.set_one(granules.start));
        }
        self.check_bounds(range)?;
        Ok(self.set_run(granules))
    }

    /// Makes the granules of `range` clean, and says whether one was dirty before.
    ///
    /// Nothing is rounded: `range` must begin at a multiple of the granularity, and end at one or at
    /// [`len`](Self::len). A granule of which only a part was copied is still dirty; where that is to
    /// be sorted out here, use [`reset_inner`](Self::reset_inner). An empty range changes nothing.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](RangeError::OutOfBounds) if it ends past the last granule,
    /// [`Unaligned`](RangeError::Unaligned) if it cuts one; the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new((1 << 20) + 512, Granularity::DEFAULT)?;
    /// map.set_all();
    /// assert!(map.reset(0..4096).is_err());
    /// assert!(map.reset(0..128 << 10)?);
    /// assert!(map.reset(1 << 20..map.len())?, "the last granule is partial");
    /// assert_eq!(map.count(), 14);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn reset(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        if range.is_empty() {
            return Ok(false);
        }
        self.check_bounds(range)?;
        let granularity = self.granularity;
        let is_end_aligned = granularity.is_aligned(range.end()) || range.end() == self.len;
        if !(granularity.is_aligned(range.start()) && is_end_aligned) {
            return Err(RangeError::Unaligned { range, granularity });
        }
        let granules = granularity.outward(range);
        if granules.end - granules.start == 1 {
            return Ok(self.reset_one(granules.start));
        }
        Ok(self.reset_run(granules))
    }

    /// Makes every granule that lies in `range` as a whole clean, and says whether one was dirty.
    ///
    /// `range` is rounded **inward** to granules; those that it only touches stay as they are. The
    /// partial last granule counts as covered when `range` reaches [`len`](Self::len).
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](RangeError::OutOfBounds); the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set_all();
    /// assert!(!map.reset_inner(0..65535)?);
    /// assert!(map.reset_inner(1..200_000)?);
    /// assert!(map.runs().eq([(0..65536).into(), (196_608..1 << 20).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reset_inner(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        self.check_bounds(range)?;
        Ok(self.reset_run(self.granularity.inward(range, self.len)))
    }

    /// Makes every granule dirty, and says whether one was not before.
    pub fn set_all(&mut self) -> bool {
        self.set_run(0..self.granules())
    }

    /// Makes every granule clean, and says whether one was not before. Takes time for what was dirty
    /// only.
    pub fn reset_all(&mut self) -> bool {
        self.reset_run(0..self.granules())
    }

    /// `range` ends in the last granule at the latest, or is empty.
    #[inline]
    fn check_bounds(&self, range: ByteRange) -> Result<(), RangeError> {
        if range.is_empty() || range.end() <= self.granularity.align_up(self.len) {
            return Ok(());
        }
        Err(RangeError::OutOfBounds {
            range,
            len: self.len,
        })
    }

    /// Sets one granule.
    #[inline]
    fn set_one(&mut self, granule: u64) -> bool {
        let word = &mut self.words[word_of(granule)];
        let before = *word;
        *word = before | bit(granule);
        // Added, not branched on: whether a granule was dirty is hard to predict.
        let is_new = before & bit(granule) == 0;
        self.count += u64::from(is_new);
        if before == 0 {
            self.raise(word_of(granule));
        }
        is_new
    }

    /// Resets one granule.
    #[inline]
    fn reset_one(&mut self, granule: u64) -> bool {
        let word = &mut self.words[word_of(granule)];
        if *word & bit(granule) == 0 {
            // Not written to: it may never have been touched (rule 10).
            return false;
        }
        *word &= !bit(granule);
        let is_zero = *word == 0;
        self.count -= 1;
        if is_zero {
            self.lower(word_of(granule)..word_of(granule) + 1);
        }
        true
    }

    /// Sets a run of granules.
    pub(super) fn set_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() {
            return false;
        }
        let cut = Cut::of(&granules);
        if cut.is_one_word() {
            return self.set_in_word(cut.head.0, cut.head.1);
        }
        let filled = fill(&mut self.words, &granules);
        self.count += filled.added;

        // All words of the run are non-zero now. If one was zero before, the bits above are due.
        let mut has_woken = filled.has_woken;
        let mut run = granules;
        for level in &mut self.summary {
            if !has_woken {
                break;
            }
            run = words_of(&run);
            has_woken = fill(level, &run).has_woken;
        }
        filled.added > 0
    }

    /// Resets a run of granules.
    pub(super) fn reset_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() || self.is_clean() {
            return false;
        }
        let cut = Cut::of(&granules);
        if cut.is_one_word() {
            return self.reset_in_word(cut.head.0, cut.head.1);
        }
        let before = self.count;
        self.reset_in_word(cut.head.0, cut.head.1);
        self.reset_words(cut.body);
        self.reset_in_word(cut.tail.0, cut.tail.1);
        self.count < before
    }

    /// Sets the granules `mask` of one word.
    #[inline]
    pub(super) fn set_in_word(&mut self, word: usize, mask: u64) -> bool {
        let before = self.words[word];
        let after = before | mask;
        if after == before {
            return false;
        }
        self.words[word] = after;
        self.count += u64::from((after ^ before).count_ones());
        if before == 0 {
            self.raise(word);
        }
        true
    }

    /// Resets the granules `mask` of one word.
    #[inline]
    pub(super) fn reset_in_word(&mut self, word: usize, mask: u64) -> bool {
        let before = self.words[word];
        let after = before & !mask;
        if after == before {
            return false;
        }
        self.words[word] = after;
        self.count -= u64::from((after ^ before).count_ones());
        if after == 0 {
            self.lower(word..word + 1);
        }
        true
    }

    /// Resets whole words, in blocks of those that share a word above: blocks without a dirty granule
    /// are skipped unread (rule 10), the others are short enough to clear without looking.
    fn reset_words(&mut self, words: Range<usize>) {
        let mut from = words.start;
        while let Some(first) = self.next_word(from) {
            if first >= words.end {
                break;
            }
            let block = first..words.end.min((first | 63) + 1);
            for word in &mut self.words[block.clone()] {
                self.count -= u64::from(word.count_ones());
                *word = 0;
            }
            from = block.end;
            self.lower(block);
        }
    }

    /// Tells the summaries that `word` is not zero any more.
    #[inline(never)]
    fn raise(&mut self, word: usize) {
        let mut index = word as u64;
        for level in &mut self.summary {
            let above = &mut level[word_of(index)];
            let before = *above;
            *above |= bit(index);
            if before != 0 {
                break;
            }
            index = word_of(index) as u64;
        }
    }

    /// Tells the summaries that `words` are zero now. They must share one word above.
    #[inline(never)]
    fn lower(&mut self, words: Range<usize>) {
        let Cut { head, .. } = Cut::of(&(words.start as u64..words.end as u64));
        let (mut index, mut mask) = head;
        for level in &mut self.summary {
            level[index] &= !mask;
            if level[index] != 0 {
                break;
            }
            mask = bit(index as u64);
            index = word_of(index as u64);
        }
    }
}

/// What [`fill`] did.
struct Filled {
    /// Bits that were 0.
    added: u64,
    /// Whether a word was zero.
    has_woken: bool,
}

/// Sets a run of bits in one level.
fn fill(level: &mut [u64], run: &Range<u64>) -> Filled {
    let cut = Cut::of(run);
    let mut added = 0;
    let mut has_woken = false;
    // In a run of one word the tail has no bit, and finds a word that the head made non-zero.
    for (word, mask) in [cut.head, cut.tail] {
        let before = level[word];
        level[word] = before | mask;
        added += u64::from((mask & !before).count_ones());
        has_woken |= before == 0;
    }
    for word in &mut level[cut.body] {
        added += u64::from(word.count_zeros());
        has_woken |= *word == 0;
        *word = !0;
    }
    Filled { added, has_woken }
}
