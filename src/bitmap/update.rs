//! Setting and resetting: the edges of a run word by word, what is between by its summary alone.
//!
//! ```text
//! set     word 3      ──▶ read, written                   ──▶ full now? then its pair learns that
//!         words 4…99  ──▶ the mixed ones counted, filled  ──▶ all full, says their summary
//!         word 100    ──▶ read, written                   ──▶ full now? …
//! ```
//!
//! Words between the edges that are empty or full are not touched, but for a reset, which has to look at
//! the full ones: some were written, and a word that is not 0 would not be empty.

use std::ops::Range;

use multiversion::multiversion;

use super::HBitmap;
use super::summary::Class;
use super::word::{Cut, bit, bits_from, bits_to, clear, ones, word_of};
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
        if range.is_empty() || range.end() > self.len {
            return self.set_at_the_end(range);
        }
        let first = self.granularity.granule_of(range.start());
        let last = self.granularity.granule_of(range.end() - 1);
        // Nearly every guest write is one of these.
        if first == last {
            return Ok(self.set_one(first));
        }
        if word_of(first) == word_of(last) {
            let mask = bits_from(first) & bits_to(last);
            return Ok(self.set_in_word(word_of(first), mask));
        }
        Ok(self.set_run(first..last + 1))
    }

    /// As [`set`](Self::set), for a range that ends past [`len`](Self::len), or is empty.
    #[cold]
    #[inline(never)]
    fn set_at_the_end(&mut self, range: ByteRange) -> Result<bool, RangeError> {
        self.check_bounds(range)?;
        Ok(self.set_run(self.granularity.outward(range)))
    }

    /// Makes the granule that the byte at `offset` lies in dirty, and says whether it was not before.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](RangeError::OutOfBounds) unless `offset` is below [`len`](Self::len); the bitmap is
    /// then as before.
    #[inline]
    pub fn set_at(&mut self, offset: u64) -> Result<bool, RangeError> {
        self.check_offset(offset)?;
        Ok(self.set_one(self.granularity.granule_of(offset)))
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
        let granularity = self.granularity;
        let is_whole = range.len() == granularity.bytes() && granularity.is_aligned(range.start());
        if is_whole && range.end() <= self.len {
            return Ok(self.reset_one(granularity.granule_of(range.start())));
        }
        Ok(self.reset_run(self.uncut(range)?))
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

    /// Makes every granule clean, and says whether one was not before.
    pub fn reset_all(&mut self) -> bool {
        self.reset_run(0..self.granules())
    }

    /// `offset` is that of a byte of the map.
    #[inline]
    pub(super) fn check_offset(&self, offset: u64) -> Result<(), RangeError> {
        if offset < self.len {
            return Ok(());
        }
        Err(RangeError::OutOfBounds {
            range: (offset..offset.saturating_add(1)).into(),
            len: self.len,
        })
    }

    /// The granules of `range`, which must not cut one.
    pub(super) fn uncut(&self, range: ByteRange) -> Result<Range<u64>, RangeError> {
        let granularity = self.granularity;
        self.check_bounds(range)?;
        let is_end_aligned = granularity.is_aligned(range.end()) || range.end() == self.len;
        let is_uncut = granularity.is_aligned(range.start()) && is_end_aligned;
        if !(is_uncut || range.is_empty()) {
            return Err(RangeError::Unaligned { range, granularity });
        }
        Ok(granularity.outward(range))
    }

    /// `range` ends in the last granule at the latest, or is empty.
    pub(super) fn check_bounds(&self, range: ByteRange) -> Result<(), RangeError> {
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
        let at = word_of(granule);
        let word = self.words.get_mut(at).filter(|word| **word != 0);
        let Some(word) = word else {
            return self.set_one_in_zero_word(at, bit(granule));
        };
        let before = *word;
        let after = before | bit(granule);
        let is_new = before & bit(granule) == 0;
        *word = after;
        // Added, not branched on: whether a granule was dirty is hard to predict.
        self.count += u64::from(is_new);
        if after == !0 {
            self.fill_up(at, before);
        }
        is_new
    }

    /// Resets one granule.
    #[inline]
    fn reset_one(&mut self, granule: u64) -> bool {
        let at = word_of(granule);
        let word = self.words.get_mut(at);
        let Some(word) = word.filter(|word| !matches!(**word, 0 | u64::MAX)) else {
            return self.reset_one_in_uniform_word(at, bit(granule));
        };
        let before = *word;
        let after = before & !bit(granule);
        let was_dirty = before & bit(granule) != 0;
        *word = after;
        self.count -= u64::from(was_dirty);
        if after == 0 {
            self.run_dry(at);
        }
        was_dirty
    }

    /// Sets the granules `mask` of one word. There must be one.
    #[inline]
    pub(super) fn set_in_word(&mut self, at: usize, mask: u64) -> bool {
        let word = self.words.get_mut(at).filter(|word| **word != 0);
        let Some(word) = word else {
            return self.set_in_zero_word(at, mask);
        };
        let before = *word;
        let after = before | mask;
        if after == before {
            return false;
        }
        *word = after;
        self.count += u64::from((after ^ before).count_ones());
        if after == !0 {
            self.fill_up(at, before);
        }
        true
    }

    /// Resets the granules `mask` of one word. There must be one.
    #[inline]
    pub(super) fn reset_in_word(&mut self, at: usize, mask: u64) -> bool {
        let word = self.words.get_mut(at);
        let Some(word) = word.filter(|word| !matches!(**word, 0 | u64::MAX)) else {
            return self.reset_in_uniform_word(at, mask);
        };
        let before = *word;
        let after = before & !mask;
        if after == before {
            return false;
        }
        *word = after;
        self.count -= u64::from((after ^ before).count_ones());
        if after == 0 {
            self.run_dry(at);
        }
        true
    }

    /// A word has become full, if it was not before.
    #[inline(never)]
    fn fill_up(&mut self, at: usize, before: u64) {
        if before != !0 {
            self.summary.mark(at, Class::Full);
        }
    }

    /// A word has become empty.
    #[inline(never)]
    fn run_dry(&mut self, at: usize) {
        self.summary.mark(at, Class::Empty);
    }

    /// As [`set_in_word`](Self::set_in_word), for a word that is 0: empty, full, or not there yet.
    #[inline(never)]
    fn set_in_zero_word(&mut self, at: usize, mask: u64) -> bool {
        if self.summary.class_of(at) == Class::Full {
            return false;
        }
        if self.words.is_empty() {
            self.take_memory();
        }
        self.words[at] = mask;
        self.count += u64::from(mask.count_ones());
        self.summary.mark(at, Class::of(mask));
        true
    }

    /// The same for one granule. It is short where its block stays mixed, as nearly all do.
    #[inline(never)]
    fn set_one_in_zero_word(&mut self, at: usize, bit: u64) -> bool {
        match (self.summary.mix(at, Class::Empty), self.words.get_mut(at)) {
            (true, Some(word)) => {
                *word = bit;
                self.count += 1;
                true
            }
            _ => self.set_in_zero_word(at, bit),
        }
    }

    /// As [`reset_in_word`](Self::reset_in_word), for a word that is empty or full.
    #[inline(never)]
    fn reset_in_uniform_word(&mut self, at: usize, mask: u64) -> bool {
        if self.summary.class_of(at) != Class::Full {
            return false;
        }
        self.words[at] = !mask;
        self.count -= u64::from(mask.count_ones());
        self.summary.mark(at, Class::of(!mask));
        true
    }

    /// The same for one granule. It is short where its block stays mixed, as nearly all do.
    #[inline(never)]
    fn reset_one_in_uniform_word(&mut self, at: usize, bit: u64) -> bool {
        match (self.summary.mix(at, Class::Full), self.words.get_mut(at)) {
            (true, Some(word)) => {
                *word = !bit;
                self.count -= 1;
                true
            }
            _ => self.reset_in_uniform_word(at, bit),
        }
    }

    /// Sets a run of granules.
    pub(super) fn set_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() {
            return false;
        }
        let Cut { head, body, tail } = Cut::of(&granules);
        if head.0 == tail.0 {
            return self.set_in_word(head.0, head.1);
        }
        // Both edges are looked at, so neither is left out when the other has answered.
        let mut has_changed = self.set_in_word(head.0, head.1);
        has_changed |= self.set_in_word(tail.0, tail.1);
        if !body.is_empty() {
            let added = body.len() as u64 * 64 - self.make_uniform(&body, Class::Full);
            self.count += added;
            has_changed |= added > 0;
        }
        has_changed
    }

    /// Resets a run of granules.
    pub(super) fn reset_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() || self.is_clean() {
            return false;
        }
        let Cut { head, body, tail } = Cut::of(&granules);
        if head.0 == tail.0 {
            return self.reset_in_word(head.0, head.1);
        }
        let mut has_changed = self.reset_in_word(head.0, head.1);
        has_changed |= self.reset_in_word(tail.0, tail.1);
        if !body.is_empty() {
            let removed = self.make_uniform(&body, Class::Empty);
            self.count -= removed;
            has_changed |= removed > 0;
        }
        has_changed
    }

    /// Makes words empty or full, and says how many ones they had.
    fn make_uniform(&mut self, words: &Range<usize>, class: Class) -> u64 {
        let (first, last) = (words.start / 64, (words.end - 1) / 64);
        let is_short = last - first < 4;
        let mut ones = 0;
        for block in first..=last {
            let within = words.start.max(block * 64)..words.end.min(block * 64 + 64);
            ones += self.make_uniform_in_block(within.clone(), class);
            if is_short {
                self.summary.mark_in_block(within, class);
            }
        }
        if !is_short {
            self.summary.mark_run(words, class);
        }
        ones
    }

    /// As [`make_uniform`](Self::make_uniform) for words of one block, but for the summary.
    #[inline]
    fn make_uniform_in_block(&mut self, words: Range<usize>, class: Class) -> u64 {
        let mask = bits_from(words.start as u64) & bits_to(words.end as u64 - 1);
        let Some(pair) = self.summary.block(words.start / 64) else {
            return 0;
        };
        let full = u64::from((pair.full & mask).count_ones()) * 64;
        // A word that is not 0 must be right.
        let right = if class == Class::Full { !0 } else { 0 };
        if pair.mixed & mask == mask {
            let words = &mut self.words[words];
            let ones = count_ones(words);
            words.fill(right);
            return ones;
        }
        if pair.mixed & mask == 0 {
            if full > 0 && right == 0 {
                clear(&mut self.words[words]);
            }
            return full;
        }
        let first = words.start / 64 * 64;
        let mut mixed = 0;
        for at in ones(pair.any() & mask) {
            let word = &mut self.words[first + at];
            if pair.mixed & bit(at as u64) != 0 {
                mixed += u64::from(word.count_ones());
            }
            if *word != 0 {
                *word = right;
            }
        }
        full + mixed
    }
}

/// Ones of some words. Made several times over, for what processors have.
#[multiversion(targets = "simd")]
fn count_ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}
