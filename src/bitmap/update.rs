//! Setting and resetting: granules of a word, of a block, and of many blocks.
//!
//! ```text
//! of a word       the word and its pair are written, and nobody else is told while the block stays mixed
//! a few           the same of two words at once, which may be one
//! of a block      edge words │ words between, at once   ──▶ the pair, once
//! of many         first block │ whole blocks, of which only mixed ones are read │ last   ──▶ those above, once
//! ```
//!
//! A clean run that is set is not written but for its edges: that it is full is what the pair says. A run
//! that is reset has to be, as some of its words may have been written, and a word that is not 0 would not be
//! empty; in whole blocks it is looked at first, as perhaps none was, and their memory never touched.

use std::ops::Range;

use multiversion::multiversion;

use super::HBitmap;
use super::summary::Class;
use super::word::{BLOCK, bit, bits_from, bits_to, clear, word_of};
use crate::sabotage::{Sabotage, is_broken};
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
    // Where it is not inlined, its result goes through memory.
    #[inline(always)]
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
        Ok(if last - first < 64 {
            set_few(self, first, last)
        } else {
            self.set_run(first..last + 1)
        })
    }

    /// As [`set`](Self::set), for a range that ends past [`len`](Self::len), or is empty.
    #[cold]
    #[inline(never)]
    fn set_at_the_end(&mut self, range: ByteRange) -> Result<bool, RangeError> {
        if is_broken(Sabotage::SetAndRefuse) {
            self.set_run(self.granularity.outward(self.clip(range)));
        }
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
    #[inline(always)]
    pub fn reset(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        let granularity = self.granularity;
        let is_cut = (range.start() | range.end()) & (granularity.bytes() - 1) != 0;
        if is_cut || range.is_empty() || range.end() > self.len {
            return self.reset_at_the_end(range);
        }
        let first = granularity.granule_of(range.start());
        let last = granularity.granule_of(range.end() - 1);
        Ok(if first == last {
            self.reset_one(first)
        } else if last - first < 64 {
            reset_few(self, first, last)
        } else {
            self.reset_run(first..last + 1)
        })
    }

    /// As [`reset`](Self::reset), for a range that ends in the partial last granule, or past it, is empty, or cuts a
    /// granule.
    #[cold]
    #[inline(never)]
    fn reset_at_the_end(&mut self, range: ByteRange) -> Result<bool, RangeError> {
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
        if !(is_uncut || range.is_empty() || is_broken(Sabotage::RoundReset)) {
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
        let is_new = self.set_bits(word_of(granule), bit(granule)) != 0;
        self.count += u64::from(is_new);
        is_new
    }

    /// Resets one granule.
    #[inline]
    fn reset_one(&mut self, granule: u64) -> bool {
        let was_dirty = self.reset_bits(word_of(granule), bit(granule)) != 0;
        self.count -= u64::from(was_dirty);
        was_dirty
    }

    /// Sets the granules `mask` of one word. There must be one.
    #[inline]
    pub(super) fn set_in_word(&mut self, at: usize, mask: u64) -> bool {
        let changed = self.set_bits(at, mask);
        self.count += u64::from(changed.count_ones());
        changed != 0
    }

    /// Resets the granules `mask` of one word. There must be one.
    #[inline]
    pub(super) fn reset_in_word(&mut self, at: usize, mask: u64) -> bool {
        let changed = self.reset_bits(at, mask);
        self.count -= u64::from(changed.count_ones());
        changed != 0
    }

    /// Sets the granules `mask` of one word, and says which were clean. They are not counted.
    ///
    /// Word and pair are both written, whatever they held. A branch on whether the word was 0 would save the pair
    /// where it was not; but it is hard to predict, and is found out only when the word has come from far memory,
    /// while nothing after it goes on. What others have to learn of is left to [`change_and_tell`](Self::change_and_tell), from its beginning:
    /// a call amid of what is done here would make all of it longer.
    #[inline]
    fn set_bits(&mut self, at: usize, mask: u64) -> u64 {
        let stored = self.summary.block_mut(at / 64);
        let (Some(stored), Some(word)) = (stored, self.words.get_mut(at)) else {
            return self.set_first_bits(at, mask);
        };
        let pair = stored.get();
        if pair.full & bit(at as u64) != 0 {
            return 0;
        }
        let before = *word;
        let after = before | mask;
        if pair.mixed == 0 || after == !0 {
            return self.change_and_tell::<true>(at, mask);
        }
        *word = after;
        stored.mix_lacking(bit(at as u64), pair);
        mask & !before
    }

    /// As [`set_bits`](Self::set_bits), of a map that has no memory yet.
    #[cold]
    #[inline(never)]
    fn set_first_bits(&mut self, at: usize, mask: u64) -> u64 {
        self.take_memory();
        self.change_and_tell::<true>(at, mask)
    }

    /// Resets the granules `mask` of one word, and says which were dirty. They are not counted.
    #[inline]
    fn reset_bits(&mut self, at: usize, mask: u64) -> u64 {
        let stored = self.summary.block_mut(at / 64);
        let (Some(stored), Some(word)) = (stored, self.words.get_mut(at)) else {
            return 0;
        };
        let pair = stored.get();
        let before = *word | pair.filling(at);
        let after = before & !mask;
        if pair.mixed == 0 || after == 0 {
            return self.change_and_tell::<false>(at, mask);
        }
        *word = after;
        stored.mix(bit(at as u64), pair);
        mask & before
    }

    /// Makes the granules `mask` of a word dirty, or clean, and says which were not. Only what changes is written: the
    /// memory may not have been touched. There must be memory.
    #[inline(never)]
    fn change_and_tell<const DIRTY: bool>(&mut self, at: usize, mask: u64) -> u64 {
        let pair = self.summary.block(at / 64);
        let before = self.words[at] | pair.map_or(0, |pair| pair.filling(at));
        let after = changed::<DIRTY>(before, mask);
        if after != before {
            self.words[at] = after;
            self.summary.mark(at, Class::of(after));
        }
        before ^ after
    }

    /// A word that was said to be mixed may be empty, or full.
    #[inline(never)]
    fn settle(&mut self, at: usize, holds: u64) {
        self.summary.mark(at, Class::of(holds));
    }

    /// As [`change_few`], for any number.
    fn change_many<const DIRTY: bool>(&mut self, granules: Range<u64>) -> bool {
        if DIRTY {
            self.set_run(granules)
        } else {
            self.reset_run(granules)
        }
    }

    /// Sets a run of granules.
    pub(super) fn set_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() {
            return false;
        }
        if self.words.is_empty() {
            self.take_memory();
        }
        let added = self.change_run::<true>(&granules, set_in_block, set_blocks);
        self.count += added;
        added > 0
    }

    /// Resets a run of granules.
    pub(super) fn reset_run(&mut self, granules: Range<u64>) -> bool {
        if granules.is_empty() || self.is_clean() {
            return false;
        }
        let removed = self.change_run::<false>(&granules, reset_in_block, reset_blocks);
        self.count -= removed;
        removed > 0
    }

    /// Makes a run of granules, of which there must be one, dirty or clean, and says how many were not: the
    /// parts in the first block and in the last, and the whole blocks between. There must be memory.
    #[inline]
    fn change_run<const DIRTY: bool>(
        &mut self,
        granules: &Range<u64>,
        change_in_block: fn(&mut HBitmap, Range<u64>) -> u64,
        change_blocks: fn(&mut HBitmap, Range<usize>) -> u64,
    ) -> u64 {
        let (first, last) = (granules.start / BLOCK, (granules.end - 1) / BLOCK);
        if first == last {
            return change_in_block(self, granules.clone());
        }
        let head = change_in_block(self, granules.start..(first + 1) * BLOCK);
        let tail = change_in_block(self, last * BLOCK..granules.end);
        // No more blocks than words, which a `usize` counts.
        let body = (first + 1) as usize..last as usize;
        if body.is_empty() {
            return head + tail;
        }
        let between = change_blocks(self, body.clone());
        self.summary.mark_blocks(body, Class::filled::<DIRTY>());
        head + tail + between
    }
}

/// Sets a run of granules, given by its first and its last, and says whether one was clean.
#[multiversion(targets("x86_64+bmi1+bmi2+popcnt"))]
fn set_few(map: &mut HBitmap, first: u64, last: u64) -> bool {
    change_few::<true>(map, first, last)
}

/// As [`set_few`], but resets them.
#[multiversion(targets("x86_64+bmi1+bmi2+popcnt"))]
fn reset_few(map: &mut HBitmap, first: u64, last: u64) -> bool {
    change_few::<false>(map, first, last)
}

/// Up to 64 granules, nearly always of one block, lie in a word or two. Which it is, is hard to predict, so there is no
/// branch for it: if it is one, the same is written to it twice.
#[inline(always)]
fn change_few<const DIRTY: bool>(map: &mut HBitmap, first: u64, last: u64) -> bool {
    let (a, b) = (word_of(first), word_of(last));
    let words = &mut *map.words;
    let (true, Some(stored)) = (
        a / 64 == b / 64 && a < words.len() && b < words.len(),
        map.summary.block_mut(a / 64),
    ) else {
        return map.change_many::<DIRTY>(first..last + 1);
    };
    let touched = bit(a as u64) | bit(b as u64);
    let pair = stored.get();
    if DIRTY && pair.full & touched != 0 {
        return map.change_many::<DIRTY>(first..last + 1);
    }
    if !DIRTY && pair.any() == 0 {
        return false;
    }
    let is_one = a == b;
    let (head, tail) = (bits_from(first), bits_to(last));
    let head = if is_one { head & tail } else { head };
    let (mut one, mut two) = (words[a], words[b]);
    if !DIRTY {
        one |= pair.filling(a);
        two |= pair.filling(b);
    }
    let after_one = changed::<DIRTY>(one, head);
    let after_two = if is_one {
        after_one
    } else {
        changed::<DIRTY>(two, tail)
    };
    words[a] = after_one;
    words[b] = after_two;
    stored.mix(touched, pair);
    let uniform = Class::filled_word::<DIRTY>();
    if pair.mixed == 0 {
        map.summary.mix_above(a / 64);
    }
    if after_one == uniform || after_two == uniform {
        map.settle(a, after_one);
        map.settle(b, after_two);
    }
    // The second word has bits below those of the first, if it is another.
    let second = if is_one { 0 } else { two ^ after_two };
    let changed = (one ^ after_one) | second;
    let count = u64::from(changed.count_ones());
    if DIRTY {
        map.count += count;
    } else {
        map.count -= count;
    }
    changed != 0
}

/// A word of which `mask` is made dirty, or clean.
#[inline(always)]
const fn changed<const DIRTY: bool>(word: u64, mask: u64) -> u64 {
    if DIRTY { word | mask } else { word & !mask }
}

/// Makes all of some words 0, or all of them full, and says how many ones the mixed ones had: those of a word
/// that was full before, written or not, are known to the caller.
#[inline(always)]
fn replace(words: &mut [u64], word: u64) -> u64 {
    let mut ones = 0;
    for at in words {
        // 64 becomes 0, and nothing else does.
        ones += u64::from(at.count_ones() & 63);
        *at = word;
    }
    ones
}

/// Makes granules of one block, of which there must be one, dirty, and says how many were not. Their number is
/// not kept. There must be memory.
#[multiversion(targets("x86_64+bmi1+bmi2+popcnt"))]
fn set_in_block(map: &mut HBitmap, granules: Range<u64>) -> u64 {
    change_in_block::<true>(map, granules)
}

/// As [`set_in_block`], but clean.
#[multiversion(targets("x86_64+bmi1+bmi2+popcnt"))]
fn reset_in_block(map: &mut HBitmap, granules: Range<u64>) -> u64 {
    change_in_block::<false>(map, granules)
}

/// The edges word by word, what is between at once, and the pair of the block once for all of them.
#[inline(always)]
fn change_in_block<const DIRTY: bool>(map: &mut HBitmap, granules: Range<u64>) -> u64 {
    let (first, last) = (granules.start, granules.end - 1);
    let (a, b) = (word_of(first), word_of(last));
    let (Some(stored), Some(words)) = (map.summary.block_mut(a / 64), map.words.get_mut(a..=b))
    else {
        return 0;
    };
    let pair = stored.get();
    let touched = bits_from(a as u64) & bits_to(b as u64);
    // What is so already is not written: its memory may never have been touched.
    let others = if DIRTY { !pair.full } else { pair.any() };
    if others & touched == 0 {
        return 0;
    }
    let mut after = pair.with(touched, Class::filled::<DIRTY>());
    let mut count = 0;
    let mut edge = |word: &mut u64, at: usize, mask: u64| {
        let before = *word | pair.filling(at);
        *word = changed::<DIRTY>(before, mask);
        count += u64::from((*word ^ before).count_ones());
        *word
    };
    match words {
        [one] => {
            let holds = edge(one, a, bits_from(first) & bits_to(last));
            after = pair.with_word(a, holds);
        }
        [one, body @ .., two] => {
            let holds = edge(one, a, bits_from(first));
            after = after.with_word(a, holds);
            let holds = edge(two, b, bits_to(last));
            after = after.with_word(b, holds);
            let between = touched & !bit(a as u64) & !bit(b as u64);
            let full = u64::from((pair.full & between).count_ones()) * 64;
            let mut ones = full;
            if pair.mixed & between != 0 {
                ones += replace(body, changed::<DIRTY>(0, !0));
            } else if full > 0 && !DIRTY {
                // Not looked at before: their memory is that of the edges, or next to it.
                body.fill(0);
            }
            count += if DIRTY {
                body.len() as u64 * 64 - ones
            } else {
                ones
            };
        }
        [] => {}
    }
    map.summary.change_block(a / 64, pair, after);
    count
}

#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn set_blocks(map: &mut HBitmap, blocks: Range<usize>) -> u64 {
    fill_blocks::<true>(map, blocks)
}

#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn reset_blocks(map: &mut HBitmap, blocks: Range<usize>) -> u64 {
    fill_blocks::<false>(map, blocks)
}

/// Makes the words of whole blocks what they must be when all is dirty, or clean, and says how many granules
/// were not. The summary is not told.
#[inline(always)]
fn fill_blocks<const DIRTY: bool>(map: &mut HBitmap, blocks: Range<usize>) -> u64 {
    let all = blocks.len() as u64 * BLOCK;
    let mut ones = 0;
    // Of what is clean there may be thousands of blocks, which take nothing.
    let dirty = map.summary.blocks_from(blocks.start);
    for (block, pair) in dirty.take_while(|(block, _)| *block < blocks.end) {
        ones += u64::from(pair.full.count_ones()) * 64;
        if pair.mixed != 0 {
            ones += replace(&mut map.words[block * 64..][..64], changed::<DIRTY>(0, !0));
        } else if !DIRTY {
            clear(&mut map.words[block * 64..][..64]);
        }
    }
    if DIRTY && is_broken(Sabotage::WriteFull) {
        map.words[blocks.start * 64..blocks.end * 64].fill(!0);
    }
    if DIRTY { all - ones } else { ones }
}
