//! Words of 64 granules, in and out. All forms that a map has outside of itself are made of them.
//!
//! ```text
//! summary   mixed 1 1 0 0 1 …  full 0 0 1 1 0 …
//! words           01…  1…  0  0  10…
//!                 └──────┘ └──┘ └─────           what a word says is so: copied
//!                          └──┘                  full, or clean far and wide: filled, and not read
//! ```
//!
//! 1. Word *n* has granules `64 n` to `64 n + 63`, the first of them in its lowest bit.
//! 2. Words put in replace what the map had there. Bits past its last granule are dropped.
//! 3. After each call the map is as sound as any: nothing is left to be finished.
//! 4. Words that are 0 and meet clean granules are not written, and take no memory.

use std::ops::Range;

use multiversion::multiversion;

use super::ones::Ones;
use super::summary::{Class, Pair, Summary};
use super::word::{PAGE, bits_from, bits_to, ones};
use super::{CreateError, HBitmap};
use crate::memory::{self, OutOfMemory};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::Granularity;

/// Why words could not be put in or taken out. The bitmap, or what was to be filled, is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WordsError {
    /// There are fewer words in the map, or more than were given for all of it.
    #[error("{count} words from word {first} on are not those of a bitmap of {expected} words")]
    OutOfBounds {
        /// Index of the first word.
        first: usize,
        /// Words given, or asked for.
        count: usize,
        /// Words of the map.
        expected: usize,
    },
    /// The map cannot be created, or has no memory for its bits.
    #[error(transparent)]
    Create(#[from] CreateError),
}

impl HBitmap {
    /// Words that it takes to hold a bit for every granule; none for a map of no bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(65 << 16, Granularity::DEFAULT)?;
    /// assert_eq!(map.word_count(), 2);
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    #[must_use]
    pub const fn word_count(&self) -> usize {
        // A bitmap of more words than a `usize` counts is refused when it is created.
        self.granules().div_ceil(64) as usize
    }

    /// Copies words to `out`, from word `first` on and as many as fit. Bits past the last granule are 0.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](WordsError::OutOfBounds) if the map has fewer. `out` is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(100 << 16, Granularity::DEFAULT)?;
    /// map.set(65 << 16..100 << 16)?;
    /// let mut words = [0; 2];
    /// map.export_words(0, &mut words)?;
    /// assert_eq!(words, [0, 0xf_ffff_fffe]);
    /// assert!(map.export_words(1, &mut words).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn export_words(&self, first: usize, out: &mut [u64]) -> Result<(), WordsError> {
        let words = self.check_words(first, out.len())?;
        let mut rest = out;
        for span in self.spans(words) {
            let (out, after) = rest.split_at_mut(span.len());
            rest = after;
            match span {
                Span::Clean(_) => out.fill(0),
                Span::Dirty(_) => out.fill(!0),
                Span::Words(words) => out.copy_from_slice(words),
            }
        }
        Ok(())
    }

    /// Replaces words of the map, from word `first` on, and says whether that changed a granule. Bits past
    /// the last granule are dropped.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](WordsError::OutOfBounds) if the map has fewer, [`Create`](WordsError::Create) if it
    /// has no memory yet and gets none. The map is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(100 << 16, Granularity::DEFAULT)?;
    /// map.set(0..1)?;
    /// assert!(map.import_words(1, &[!0])?);
    /// assert_eq!(map.count(), 1 + 36, "28 bits were past the end");
    /// assert!(!map.import_words(0, &[1])?, "it was so before");
    /// assert!(map.import_words(1, &[0, 0]).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn import_words(&mut self, first: usize, words: &[u64]) -> Result<bool, WordsError> {
        self.check_words(first, words.len())?;
        Ok(self.replace_words(first, words)?)
    }

    /// A map of `len` bytes with these words, of which there must be [`word_count`](Self::word_count).
    ///
    /// # Errors
    ///
    /// [`Create`](WordsError::Create) as [`new`](Self::new), or if there is no memory;
    /// [`OutOfBounds`](WordsError::OutOfBounds) if there are not as many words as the map has.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::from_words(100 << 16, Granularity::DEFAULT, &[0b1001, 0])?;
    /// assert!(map.iter().eq([0, 3 << 16]));
    /// assert!(HBitmap::from_words(100 << 16, Granularity::DEFAULT, &[0]).is_err());
    /// # Ok::<(), blockjob::bitmap::WordsError>(())
    /// ```
    pub fn from_words(
        len: u64,
        granularity: Granularity,
        words: &[u64],
    ) -> Result<HBitmap, WordsError> {
        let mut map = HBitmap::new(len, granularity)?;
        if words.len() != map.word_count() {
            return Err(WordsError::OutOfBounds {
                first: 0,
                count: words.len(),
                expected: map.word_count(),
            });
        }
        map.replace_words(0, words)?;
        Ok(map)
    }

    /// All granules as a slice of bits, in a crate whose adapters and algorithms know them.
    ///
    /// Writes the words that are full and were not written yet, hence `&mut`; nothing else changes.
    /// Takes the memory of the map if it has none: see [`reserve`](Self::reserve).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(100 << 16, Granularity::DEFAULT)?;
    /// map.set(0..80 << 16)?;
    /// let bits = map.bits();
    /// assert_eq!(bits.len(), 100);
    /// assert_eq!(bits.leading_ones(), 80);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(all(feature = "bitvec", target_pointer_width = "64"))]
    #[cfg_attr(docsrs, doc(cfg(feature = "bitvec")))]
    pub fn bits(&mut self) -> &bitvec::slice::BitSlice<u64, bitvec::order::Lsb0> {
        if self.words.is_empty() {
            self.take_memory();
        }
        for (block, pair) in self.summary.blocks_from(0) {
            for at in ones(pair.full) {
                self.words[block * 64 + at] = !0;
            }
        }
        &bitvec::view::BitView::view_bits(&self.words[..])[..self.granules() as usize]
    }

    /// The words from `first` on are words of the map.
    pub(super) fn check_words(
        &self,
        first: usize,
        count: usize,
    ) -> Result<Range<usize>, WordsError> {
        let expected = self.word_count();
        match first.checked_add(count) {
            Some(end) if end <= expected => Ok(first..end),
            _ => Err(WordsError::OutOfBounds {
                first,
                count,
                expected,
            }),
        }
    }

    /// Some words of the map in ascending order, those alike that lie together as one.
    pub(super) fn spans(&self, words: Range<usize>) -> Spans<'_> {
        Spans { map: self, words }
    }

    /// Replaces words of the map, which must be there, and says whether that changed a granule.
    ///
    /// If there is no memory, nothing has changed: it is missing from the start or not at all.
    pub(super) fn replace_words<W: Word>(
        &mut self,
        first: usize,
        words: &[W],
    ) -> Result<bool, CreateError> {
        if self.words.is_empty()
            && first == 0
            && words.len() == self.word_count()
            && !words.is_empty()
        {
            return load_words(self, words);
        }
        replace_words(self, first, words)
    }
}

/// A word as it comes from outside.
pub(super) trait Word: Copy {
    /// The same as a number.
    fn get(self) -> u64;

    /// As many words, as numbers.
    fn copy(from: &[Self], to: &mut [u64]);

    /// The same, to the end of a vector, whose memory is written once.
    fn append(from: &[Self], to: &mut Vec<u64>);
}

impl Word for u64 {
    #[inline]
    fn get(self) -> u64 {
        self
    }

    #[inline]
    fn copy(from: &[u64], to: &mut [u64]) {
        to.copy_from_slice(from);
    }

    #[inline]
    fn append(from: &[u64], to: &mut Vec<u64>) {
        to.extend_from_slice(from);
    }
}

/// In little-endian order.
impl Word for [u8; 8] {
    #[inline]
    fn get(self) -> u64 {
        u64::from_le_bytes(self)
    }

    #[inline]
    fn copy(from: &[[u8; 8]], to: &mut [u64]) {
        if cfg!(target_endian = "little") {
            bytemuck::cast_slice_mut(to).copy_from_slice(from);
        } else {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.get();
            }
        }
    }

    #[inline]
    fn append(from: &[[u8; 8]], to: &mut Vec<u64>) {
        to.extend(from.iter().map(|word| word.get()));
    }
}

/// Words that are alike, or follow each other in memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Span<'a> {
    /// So many words without a bit.
    Clean(usize),
    /// So many words with all bits.
    Dirty(usize),
    /// Words as they are in memory: none of them is full although it is 0.
    Words(&'a [u64]),
}

impl Span<'_> {
    /// Number of words; never 0.
    #[inline]
    pub(super) const fn len(&self) -> usize {
        match self {
            Span::Clean(len) | Span::Dirty(len) => *len,
            Span::Words(words) => words.len(),
        }
    }
}

/// Made by [`HBitmap::spans`].
#[derive(Debug)]
pub(super) struct Spans<'a> {
    map: &'a HBitmap,
    /// What was not handed out yet.
    words: Range<usize>,
}

impl<'a> Iterator for Spans<'a> {
    type Item = Span<'a>;

    #[inline]
    fn next(&mut self) -> Option<Span<'a>> {
        if self.words.is_empty() {
            return None;
        }
        let (map, at) = (self.map, self.words.start);
        let ahead = bits_from(at as u64);
        let pair = map.summary.block(at / 64);
        let (any, full) = pair.map_or((0, 0), |pair| (pair.any() & ahead, pair.full & ahead));
        let (end, is_uniform) = if any == 0 {
            (map.summary.next_any(at).unwrap_or(usize::MAX), true)
        } else if full & bits_to(at as u64) != 0 {
            (map.summary.next_lacking(at).unwrap_or(usize::MAX), true)
        } else if full != 0 && !is_broken(Sabotage::ForgetFullWords) {
            (at / 64 * 64 + full.trailing_zeros() as usize, false)
        } else {
            // On and on, as long as blocks have something and nothing in them is full.
            let mut block = at / 64 + 1;
            while block * 64 < self.words.end {
                match map.summary.block(block) {
                    Some(Pair {
                        mixed: 1..,
                        full: 0,
                    }) => block += 1,
                    _ => break,
                }
            }
            (block * 64, false)
        };
        let end = end.min(self.words.end);
        self.words.start = end;
        Some(match is_uniform {
            false => Span::Words(&map.words[at..end]),
            true if any == 0 => Span::Clean(end - at),
            true => Span::Dirty(end - at),
        })
    }
}

/// Puts all of its words into a map that has no memory yet.
///
/// If a page of it is uniform, that is left as it comes from the allocator, which has zeroes nobody has touched; else all is
/// written once, and not zeroed before. Which of the two is known before memory is asked for: what is given back comes
/// again when zeroes are asked for, and then all of them have to be written.
#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn load_words<W: Word>(map: &mut HBitmap, words: &[W]) -> Result<bool, CreateError> {
    let granules = map.granules();
    let no_memory = |OutOfMemory| CreateError::OutOfMemory { granules };
    let (last, past_end) = map.last_word();
    if words[last].get() & kept(past_end) == 0 && words[..last].iter().all(|word| word.get() == 0) {
        return Ok(false);
    }
    let mut summary = Summary::new(words.len() as u64).map_err(no_memory)?;
    let mut ones = Ones::default();
    // A block is copied while it is in the nearest cache.
    let blocks = words.chunks(64).enumerate();
    map.words = if is_mixed_in_each_page(words) {
        let mut all = Vec::new();
        let reserved = all.try_reserve_exact(words.len());
        reserved.map_err(|_| no_memory(OutOfMemory))?;
        for (block, given) in blocks {
            let pair = tally_block(block, given, (last, past_end), &mut ones);
            summary.put(block, pair);
            W::append(given, &mut all);
        }
        all
    } else {
        let mut some = memory::zeroed(words.len() as u64).map_err(no_memory)?;
        for ((block, given), to) in blocks.zip(some.chunks_mut(64)) {
            let pair = tally_block(block, given, (last, past_end), &mut ones);
            summary.put(block, pair);
            if pair.mixed != 0 {
                W::copy(given, to);
            }
        }
        some
    };
    if map.words[last] & !kept(past_end) != 0 {
        map.words[last] &= kept(past_end);
    }
    summary.rebuild();
    map.summary = summary;
    map.count = if is_broken(Sabotage::ForgetCount) {
        0
    } else {
        ones.total()
    };
    Ok(true)
}

/// Looks at all words of a page before its first mixed one. Bits past the end count, too: that of the last page may be the
/// other answer than the summary's, and what comes of it is as right.
#[inline(always)]
fn is_mixed_in_each_page<W: Word>(words: &[W]) -> bool {
    let is_mixed = |word: &W| !matches!(word.get(), 0 | u64::MAX);
    words.chunks(PAGE).all(|page| page.iter().any(is_mixed))
}

/// What the words of a block hold, the last of which may have bits that are past the end. Counts their ones.
#[inline(always)]
fn tally_block<W: Word>(
    block: usize,
    words: &[W],
    (last, past_end): (usize, u64),
    ones: &mut Ones,
) -> Pair {
    match <&[W; 64]>::try_from(words) {
        Ok(words) if block < last / 64 => {
            ones.add(|at| words[at].get());
            classes(words)
        }
        _ => {
            let mut kept_words = [0; 64];
            W::copy(words, &mut kept_words[..words.len()]);
            kept_words[last % 64] &= kept(past_end);
            ones.add(|at| kept_words[at]);
            classes(&kept_words)
        }
    }
}

/// The granules of the last word that are there.
fn kept(past_end: u64) -> u64 {
    if is_broken(Sabotage::KeepPadding) {
        !0
    } else {
        !past_end
    }
}

/// See [`HBitmap::replace_words`]. Made several times over, for what processors have: the work is
/// counting ones and looking for words that are uniform.
#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn replace_words<W: Word>(
    map: &mut HBitmap,
    first: usize,
    words: &[W],
) -> Result<bool, CreateError> {
    let (last, past_end) = map.last_word();
    let mut is_changed = false;
    let mut rest = words;
    let mut at = first;
    while !rest.is_empty() {
        let (given, after) = rest.split_at(rest.len().min(64 - at % 64));
        rest = after;
        let (block, within) = (at / 64, at % 64..at % 64 + given.len());
        at += given.len();
        is_changed |= match <&[W; 64]>::try_from(given) {
            Ok(given) if at <= last => replace_in_block(map, block, within, given)?,
            _ => {
                let mut new = [0; 64];
                W::copy(given, &mut new[within.clone()]);
                if at > last && !is_broken(Sabotage::KeepPadding) {
                    new[last % 64] &= !past_end;
                }
                replace_in_block(map, block, within, &new)?
            }
        };
    }
    Ok(is_changed)
}

/// Replaces some words of a block by those at the same place in `new`, which is 0 elsewhere.
#[inline(always)]
fn replace_in_block<W: Word>(
    map: &mut HBitmap,
    block: usize,
    within: Range<usize>,
    new: &[W; 64],
) -> Result<bool, CreateError> {
    let (count, classes) = tally(new);
    if map.words.is_empty() {
        if count == 0 {
            return Ok(false);
        }
        map.reserve()?;
    }
    let Some(before) = map.summary.block(block) else {
        return Ok(false);
    };
    let words = &mut map.words[block * 64..][within.clone()];
    let given = &new[within.clone()];
    let added = if is_broken(Sabotage::ForgetCount) {
        0
    } else {
        count
    };
    if before.any() == 0 {
        // All that is there is 0. What is uniform needs no word, and its memory was perhaps never touched.
        if classes.mixed != 0 {
            W::copy(given, words);
        }
        if count != 0 {
            map.count += added;
            map.summary.set_block(block, classes);
        }
        return Ok(count != 0);
    }

    let there = bits_from(within.start as u64) & bits_to(within.end as u64 - 1);
    let kept = before.with(there, Class::Empty);
    let after = Pair {
        mixed: kept.mixed | classes.mixed,
        full: kept.full | classes.full,
    };
    let mixed = before.mixed & there;
    let mut removed = u64::from((before.full & there).count_ones()) * 64;
    let mut is_changed = after != before;
    if mixed == !0 {
        for (word, given) in words.iter().zip(given) {
            removed += u64::from(word.count_ones());
            is_changed |= *word != given.get();
        }
    } else {
        for at in ones(mixed >> within.start) {
            removed += u64::from(words[at].count_ones());
            is_changed |= words[at] != given[at].get();
        }
    }
    if !is_changed {
        return Ok(false);
    }
    W::copy(given, words);
    map.count = map.count - removed + added;
    if after != before {
        map.summary.set_block(block, after);
    }
    Ok(true)
}

/// Number of ones, and the classes, of 64 words.
#[inline(always)]
fn tally<W: Word>(words: &[W; 64]) -> (u64, Pair) {
    let count = words.iter().map(|word| u64::from(word.get().count_ones()));
    let count = count.sum();
    match count {
        0 => (0, Pair { mixed: 0, full: 0 }),
        _ => (count, classes(words)),
    }
}

/// The classes of 64 words.
#[inline(always)]
fn classes<W: Word>(words: &[W; 64]) -> Pair {
    // True of each word that is uniform, and of hardly any other: one comparison instead of two.
    let is_uniform = |word: u64| word == word.rotate_left(32);
    if !words
        .iter()
        .fold(false, |any, word| any | is_uniform(word.get()))
    {
        return Pair { mixed: !0, full: 0 };
    }
    let (mut empty, mut full) = (0, 0);
    for (at, word) in words.iter().enumerate() {
        let word = word.get();
        empty |= u64::from(word == 0) << at;
        full |= u64::from(word == !0) << at;
    }
    let mixed = !(empty | full);
    Pair { mixed, full }
}
