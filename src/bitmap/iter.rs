//! Walking over what is dirty: a cursor for a map that changes meanwhile, iterators for one that
//! does not.

use std::cmp::Ordering;
use std::iter::FusedIterator;
use std::ops::Range;

use multiversion::multiversion;

use super::HBitmap;
use super::summary::{Blocks, Pair};
use super::word::{BLOCK, bit, bits_from, bits_to, lowest, word_of};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// A place in a bitmap that may change between two steps.
///
/// It borrows nothing and copies nothing of the map: it is the offset where the search goes on, so
/// every step sees the map as it is then (rule 8 of [the module](super)). A cursor that kept the word
/// it is in would save a load per step, and miss what is set in that word meanwhile.
///
/// What is set behind the cursor waits for the next pass. A cursor that came to the end of the map
/// stays there.
///
/// # Examples
///
/// Copy until nothing is dirty, although the guest keeps writing:
///
/// ```
/// use blockjob::{Granularity, HBitmap};
///
/// let mut dirty = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
/// dirty.set(0..3 << 16)?;
/// let mut guest_writes = vec![0..512, 5 << 16..6 << 16];
///
/// let mut copied = Vec::new();
/// let mut cursor = dirty.cursor(0);
/// while !dirty.is_clean() {
///     let Some(start) = cursor.next(&dirty) else {
///         cursor = dirty.cursor(0);
///         continue;
///     };
///     dirty.reset(start..start + (1 << 16))?;
///     copied.push(start >> 16);
///     if let Some(range) = guest_writes.pop() {
///         dirty.set(range)?;
///     }
/// }
/// assert_eq!(copied, [0, 1, 2, 5, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// No granule from the one of this offset on was yielded yet. [`ENDED`] after the last.
    next: u64,
}

/// An offset that no map has.
const ENDED: u64 = u64::MAX;

impl Cursor {
    /// Offset of the first byte of the next dirty granule, or `None` once there is none.
    ///
    /// `bitmap` should be the one that made the cursor. With another the answers are those for that
    /// other map, and still come to an end.
    #[inline]
    pub fn next(&mut self, bitmap: &HBitmap) -> Option<u64> {
        let granularity = bitmap.granularity;
        let found = if self.next < bitmap.len {
            bitmap.next_set(granularity.granule_of(self.next))
        } else {
            None
        };
        let start = found.map(|granule| granularity.start_of(granule));
        // 2^63 at most, as the granule starts within the map.
        let ended = if is_broken(Sabotage::ForgetEnd) {
            self.next
        } else {
            ENDED
        };
        self.next = start.map_or(ended, |start| start + granularity.bytes());
        start
    }
}

/// Offsets of the first bytes of dirty granules, ascending. Made by [`HBitmap::iter`] and
/// [`HBitmap::iter_in`].
#[derive(Clone, Debug)]
pub struct Iter<'a> {
    /// What is walked over.
    bitmap: &'a HBitmap,
    /// The blocks of 64 words to come.
    blocks: Blocks<'a>,
    /// The block that is walked over, and what is known of it.
    block: (usize, Pair),
    /// Its words that have dirty granules and were not looked at yet.
    rest: u64,
    /// The word that `bits` are from.
    word: usize,
    /// What of that word was not yielded yet.
    bits: u64,
    /// The last word to look at, and which bits of it.
    last: (usize, u64),
}

impl<'a> Iter<'a> {
    /// Over the dirty ones of `granules`, which are some of the map.
    fn new(bitmap: &'a HBitmap, granules: Range<u64>) -> Self {
        let first = word_of(granules.start);
        let nothing = Pair { mixed: 0, full: 0 };
        let mut iter = Self {
            bitmap,
            blocks: bitmap.summary.blocks_from(first / 64 + 1),
            block: (first / 64, nothing),
            rest: 0,
            word: first,
            bits: 0,
            last: (0, 0),
        };
        if !granules.is_empty() {
            let pair = bitmap.summary.block(first / 64).unwrap_or(nothing);
            iter.last = (word_of(granules.end - 1), bits_to(granules.end - 1));
            iter.block.1 = pair;
            iter.rest = pair.any() & bits_from(first as u64) & !bit(first as u64);
            iter.bits = iter.bits_of(first) & bits_from(granules.start);
        }
        iter
    }

    /// What of a word of the block is to be yielded.
    #[inline(always)]
    fn bits_of(&self, word: usize) -> u64 {
        let (block, pair) = self.block;
        let bits = self.bitmap.word_of_block(block, pair, word % 64);
        match word.cmp(&self.last.0) {
            Ordering::Less => bits,
            Ordering::Equal => bits & self.last.1,
            Ordering::Greater => 0,
        }
    }

    /// Goes to the next word that has dirty granules, if there is one.
    // Called, it would take what an iterator knows through memory, and a walk over what is sparse 1.2 times as long.
    #[inline(always)]
    fn next_word(&mut self) -> Option<()> {
        if self.rest == 0 {
            self.block = self.blocks.next()?;
            self.rest = self.block.1.any();
        }
        self.word = lowest(self.block.0, self.rest) as usize;
        self.rest &= self.rest - 1;
        if self.word > self.last.0 {
            return None;
        }
        self.bits = self.bits_of(self.word);
        Some(())
    }
}

/// So many bits of a word are taken one by one.
const FEW: usize = 4;

impl Iterator for Iter<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        while self.bits == 0 {
            self.next_word()?;
        }
        let granule = lowest(self.word, self.bits);
        self.bits &= self.bits - 1;
        Some(self.bitmap.granularity.start_of(granule))
    }

    #[inline]
    fn fold<B, F: FnMut(B, u64) -> B>(self, init: B, f: F) -> B {
        fold_granules(self, init, f)
    }
}

/// All that is left of an iterator. Made several times over, for what processors have: the work is finding ones.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn fold_granules<B, F: FnMut(B, u64) -> B>(mut iter: Iter<'_>, init: B, mut f: F) -> B {
    let granularity = iter.bitmap.granularity;
    // A product is faster than a shift by something that is not a constant.
    let bytes = granularity.bytes();
    let mut result = init;
    loop {
        // The offset of the word's first granule, and from there on bit by bit. A full word is a loop
        // that needs no bits.
        let start = granularity.start_of(iter.word as u64 * 64);
        if iter.bits == !0 {
            for at in 0..64 {
                result = f(result, start + at * bytes);
            }
        } else {
            let mut bits = iter.bits;
            let mut take = |result: B| {
                let at = u64::from(bits.trailing_zeros());
                bits &= bits.wrapping_sub(1);
                (f(result, start + at * bytes), bits)
            };
            // A few one by one, as they are in a sparse map, and more of them in eights, as such a loop is unrolled.
            let mut rest = iter.bits;
            for _ in 0..FEW {
                if rest == 0 {
                    break;
                }
                (result, rest) = take(result);
            }
            if rest != 0 {
                for _ in 0..rest.count_ones() / 8 {
                    for _ in 0..8 {
                        (result, rest) = take(result);
                    }
                }
                while rest != 0 {
                    (result, rest) = take(result);
                }
            }
        }
        if iter.next_word().is_none() {
            return result;
        }
    }
}

impl FusedIterator for Iter<'_> {}

/// Runs of dirty granules, as long as can be, ascending.
#[derive(Clone, Debug)]
pub(super) struct GranuleRuns<'a> {
    bitmap: &'a HBitmap,
    /// The word that `bits` are from.
    word: usize,
    /// What of that word was not yielded yet.
    bits: u64,
    /// Where to stop.
    end: u64,
}

impl<'a> GranuleRuns<'a> {
    /// Over the dirty ones of `granules`, which are some of the map.
    pub(super) fn new(bitmap: &'a HBitmap, granules: Range<u64>) -> Self {
        let word = word_of(granules.start);
        let is_empty = granules.is_empty();
        Self {
            bitmap,
            word,
            bits: if is_empty {
                0
            } else {
                bitmap.word(word) & bits_from(granules.start)
            },
            end: if is_empty { 0 } else { granules.end },
        }
    }
}

impl Iterator for GranuleRuns<'_> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        if self.bits == 0 {
            self.word = self.bitmap.next_dirty_word(self.word + 1)?;
            self.bits = self.bitmap.word(self.word);
        }
        let start = lowest(self.word, self.bits);
        if start >= self.end {
            return None;
        }
        // With all bits below the run filled in, the lowest 0 is the one after it.
        let mut gaps = !(self.bits | (self.bits - 1));
        if gaps == 0 {
            // It goes on into the next words, down to the first that lacks a bit.
            (self.word, self.bits) = self.bitmap.next_lacking_word(self.word + 1);
            gaps = !self.bits;
        }
        let end = gaps.trailing_zeros();
        self.bits = self.bits >> end << end;
        Some(start..lowest(self.word, gaps).min(self.end))
    }

    /// Block by block and word by word. Full words in a row are passed at once, and full blocks in a row.
    #[inline]
    fn fold<B, F: FnMut(B, Range<u64>) -> B>(self, init: B, mut f: F) -> B {
        let Self {
            bitmap,
            word,
            bits,
            end,
        } = self;
        let kept = |base: u64, bits: u64| match end.saturating_sub(base) {
            64.. => bits,
            0 => 0,
            left => bits & bits_to(left - 1),
        };
        let mut open = 0..0;
        // The first word is known in part only: its bits are what is left of it.
        let base = word as u64 * 64;
        let mut result = runs_of_word(init, &mut f, &mut open, base, kept(base, bits));
        let first = (word + 1) / 64;
        let mut blocks = bitmap.summary.blocks_from(first);
        while let Some((block, pair)) = blocks.next() {
            let base = block as u64 * BLOCK;
            if base >= end {
                break;
            }
            let mut rest = pair.any();
            if block == first {
                rest &= bits_from(word as u64 + 1);
            } else if pair.full == !0 {
                // There may be thousands of them.
                let lacking = bitmap.summary.next_lacking(block * 64);
                let after = lacking.unwrap_or(bitmap.words.len()) / 64;
                result = go_on(result, &mut f, &mut open, base..after as u64 * BLOCK);
                blocks = bitmap.summary.blocks_from(after);
                continue;
            }
            while rest != 0 {
                let at = rest.trailing_zeros();
                let base = base + u64::from(at) * 64;
                if base >= end {
                    break;
                }
                let full = (pair.full >> at).trailing_ones();
                if full > 0 {
                    rest &= (!0_u64).checked_shl(at + full).unwrap_or(0);
                    let words = base..base + u64::from(full) * 64;
                    result = go_on(result, &mut f, &mut open, words);
                    continue;
                }
                rest &= rest - 1;
                let bits = kept(base, bitmap.word_of_block(block, pair, at as usize));
                result = runs_of_word(result, &mut f, &mut open, base, bits);
            }
        }
        open.end = open.end.min(end);
        if open.is_empty() {
            return result;
        }
        f(result, open)
    }
}

/// Hands on the runs of a word that begins with granule `base`. `open` is the run before it, if one has come to the end
/// of a word, and afterwards the one that has come to the end of this.
#[inline(always)]
fn runs_of_word<B>(
    mut result: B,
    f: &mut impl FnMut(B, Range<u64>) -> B,
    open: &mut Range<u64>,
    base: u64,
    bits: u64,
) -> B {
    let goes_on = !open.is_empty() && open.end == base;
    // Every 1 begins or ends a run, in turn.
    let mut edges = bits ^ (bits << 1 | u64::from(goes_on));
    if !open.is_empty() {
        if goes_on {
            if edges == 0 {
                open.end += 64;
                return result;
            }
            open.end += u64::from(edges.trailing_zeros());
            edges &= edges - 1;
        }
        result = f(result, open.clone());
        *open = 0..0;
    }
    while edges != 0 {
        let start = base + u64::from(edges.trailing_zeros());
        edges &= edges - 1;
        if edges == 0 {
            *open = start..base + 64;
            break;
        }
        let to = base + u64::from(edges.trailing_zeros());
        edges &= edges - 1;
        result = f(result, start..to);
    }
    result
}

/// As [`runs_of_word`], for full words.
#[inline(always)]
fn go_on<B>(
    result: B,
    f: &mut impl FnMut(B, Range<u64>) -> B,
    open: &mut Range<u64>,
    words: Range<u64>,
) -> B {
    if open.end == words.start && !open.is_empty() {
        open.end = words.end;
        return result;
    }
    let before = std::mem::replace(open, words);
    if before.is_empty() {
        return result;
    }
    f(result, before)
}

impl FusedIterator for GranuleRuns<'_> {}

/// Dirty byte ranges, ascending. Made by [`HBitmap::runs`] and [`HBitmap::runs_in`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// Where runs come from.
    runs: GranuleRuns<'a>,
    /// What they are cut to.
    range: ByteRange,
    /// Most bytes an answer may have.
    bytes_max: u64,
    /// What was too much for the last answer.
    rest: ByteRange,
}

impl Iterator for Runs<'_> {
    type Item = ByteRange;

    #[inline]
    fn next(&mut self) -> Option<ByteRange> {
        if self.rest.is_empty() {
            let run = self.runs.next()?;
            let bytes = self.runs.bitmap.granularity.bytes();
            let start = (run.start * bytes).max(self.range.start());
            let end = (run.end * bytes).min(self.range.end());
            self.rest = ByteRange::from(start..end);
        }
        let run = self.rest;
        if run.len() <= self.bytes_max {
            self.rest = ByteRange::from(run.end()..run.end());
            return Some(run);
        }
        let (run, rest) = run.split_at(run.start() + self.bytes_max);
        self.rest = rest;
        Some(run)
    }

    #[inline]
    fn fold<B, F: FnMut(B, ByteRange) -> B>(mut self, init: B, mut f: F) -> B {
        let mut result = init;
        if self.bytes_max < self.range.len() || !self.rest.is_empty() {
            for run in self.by_ref() {
                result = f(result, run);
            }
            return result;
        }
        let (bytes, range) = (self.runs.bitmap.granularity.bytes(), self.range);
        self.runs.fold(result, |result, run| {
            let start = (run.start * bytes).max(range.start());
            let end = (run.end * bytes).min(range.end());
            f(result, ByteRange::from(start..end))
        })
    }
}

impl FusedIterator for Runs<'_> {}

impl<'a> IntoIterator for &'a HBitmap {
    type Item = u64;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl HBitmap {
    /// A cursor that begins with the granule the byte at `first` lies in. If that granule is dirty,
    /// the first answer is its start and thus may lie below `first`. From [`len`](Self::len) on there
    /// is nothing to find.
    #[must_use]
    #[inline]
    pub const fn cursor(&self, first: u64) -> Cursor {
        Cursor { next: first }
    }

    /// The offset of the first byte of every dirty granule, ascending.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set(70_000..140_000)?;
    /// map.set(1_000_000..1_000_001)?;
    /// assert!(map.iter().eq([65536, 131_072, 983_040]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn iter(&self) -> Iter<'_> {
        Iter::new(self, 0..self.granules())
    }

    /// As [`iter`](Self::iter), of the dirty granules that `range` touches: the first answer may lie below
    /// the range. Bytes from [`len`](Self::len) on are not looked at.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set_all();
    /// assert!(map.iter_in(70_000..131_073).eq([65536, 131_072]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn iter_in(&self, range: impl Into<ByteRange>) -> Iter<'_> {
        Iter::new(self, self.granularity.outward(self.clip(range.into())))
    }

    /// The dirty bytes in ranges as long as can be, ascending; between two of them is a clean
    /// granule, and the last ends at [`len`](Self::len) at the latest.
    #[inline]
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(0..self.len, u64::MAX)
    }

    /// The dirty bytes of `range` in ranges of up to `bytes_max` bytes, ascending; none if `bytes_max`
    /// is 0. Bytes from [`len`](Self::len) on are not looked at.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set(0..196_608)?;
    /// let operations = map.runs_in(4096..u64::MAX, 131_072);
    /// assert!(operations.eq([(4096..135_168).into(), (135_168..196_608).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn runs_in(&self, range: impl Into<ByteRange>, bytes_max: u64) -> Runs<'_> {
        let range = match bytes_max {
            0 => ByteRange::from(0..0),
            _ => self.clip(range.into()),
        };
        Runs {
            runs: GranuleRuns::new(self, self.granularity.outward(range)),
            range,
            bytes_max,
            rest: (0..0).into(),
        }
    }
}
