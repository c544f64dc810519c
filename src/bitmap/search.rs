//! Finding dirty and clean bytes.
//!
//! ```text
//! upper      ┌──▶ next child that counts ──┐     up while the rest of the pair has none,
//! lowest  ───┘                             └──┐  down to the first child of what is found
//! words      from                             └──▶ found
//! ```
//!
//! Children that count are those with a bit if dirty granules are looked for, and those that lack one if
//! clean ones are.

use std::ops::Range;

use super::HBitmap;
use super::summary::{Class, Pair};
use super::update::RangeError;
use super::word::{bit, bits_from, bits_to, lowest, ones, word_of};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// What [`HBitmap::status`] found at the beginning of a range, and how far it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Every byte of this, never empty, range is dirty.
    Dirty(ByteRange),
    /// Every byte of this, never empty, range is clean.
    Clean(ByteRange),
}

impl Status {
    /// The bytes that share the state.
    #[must_use]
    pub const fn range(self) -> ByteRange {
        match self {
            Status::Dirty(range) | Status::Clean(range) => range,
        }
    }

    /// Whether they are dirty.
    #[must_use]
    pub const fn is_dirty(self) -> bool {
        match self {
            Status::Dirty(_) => true,
            Status::Clean(_) => false,
        }
    }
}

impl HBitmap {
    /// Whether the granule that the byte at `offset` lies in is dirty.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](RangeError::OutOfBounds) unless `offset` is below [`len`](Self::len), also
    /// where it lies in the last granule.
    #[inline]
    pub fn is_dirty(&self, offset: u64) -> Result<bool, RangeError> {
        self.check_offset(offset)?;
        Ok(self.has(self.granularity.granule_of(offset)))
    }

    /// Offset of the first dirty byte in `range`.
    ///
    /// That is where `range` begins when that lies in a dirty granule, and not where the granule
    /// begins. Bytes from [`len`](Self::len) on are not looked at.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set(65536..131_072)?;
    /// assert_eq!(map.next_dirty(0..1 << 20), Some(65536));
    /// assert_eq!(map.next_dirty(70_000..u64::MAX), Some(70_000));
    /// assert_eq!(map.next_dirty(0..65536), None);
    /// assert_eq!(map.next_clean(65536..1 << 20), Some(131_072));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn next_dirty(&self, range: impl Into<ByteRange>) -> Option<u64> {
        let range = self.clip(range.into());
        if range.is_empty() {
            return None;
        }
        let granule = self.next_set(self.granularity.granule_of(range.start()))?;
        let offset = self.granularity.start_of(granule).max(range.start());
        range.contains(offset).then_some(offset)
    }

    /// Offset of the first clean byte in `range`: where `range` begins when that lies in a clean
    /// granule. Bytes from [`len`](Self::len) on are not looked at.
    #[must_use]
    pub fn next_clean(&self, range: impl Into<ByteRange>) -> Option<u64> {
        let range = self.clip(range.into());
        if range.is_empty() {
            return None;
        }
        let granule = self.next_unset(self.granularity.outward(range))?;
        let offset = self.granularity.start_of(granule).max(range.start());
        range.contains(offset).then_some(offset)
    }

    /// The first bytes in `range` that are dirty, as far as they go, but no more than `bytes_max`.
    ///
    /// The answer begins or ends amid a granule where `range`, `bytes_max` or [`len`](Self::len) cuts
    /// one. It is never empty: with a `bytes_max` of 0 there is no answer. [`runs_in`](Self::runs_in)
    /// goes on from there.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set(65536..262_144)?;
    /// assert_eq!(map.next_dirty_area(0..1 << 20, u64::MAX), Some((65536..262_144).into()));
    /// assert_eq!(map.next_dirty_area(0..1 << 20, 4096), Some((65536..69_632).into()));
    /// assert_eq!(map.next_dirty_area(100_000..200_000, u64::MAX), Some((100_000..200_000).into()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn next_dirty_area(
        &self,
        range: impl Into<ByteRange>,
        bytes_max: u64,
    ) -> Option<ByteRange> {
        let range = self.clip(range.into());
        if range.is_empty() || bytes_max == 0 {
            return None;
        }
        let granularity = self.granularity;
        let granule = self.next_set(granularity.granule_of(range.start()))?;
        let start = granularity.start_of(granule).max(range.start());
        if start >= range.end() {
            return None;
        }
        let area = ByteRange::from(start..range.end().min(start.saturating_add(bytes_max)));
        let next_clean = self.next_unset(granularity.outward(area));
        let end = next_clean.map_or(area.end(), |granule| granularity.start_of(granule));
        Some((start..end.min(area.end())).into())
    }

    /// Whether the first byte of `range` is dirty, and how far in `range` that goes.
    ///
    /// # Errors
    ///
    /// [`Empty`](RangeError::Empty), or [`OutOfBounds`](RangeError::OutOfBounds) if `range` ends past
    /// [`len`](Self::len).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::Status;
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// map.set(65536..131_072)?;
    /// assert_eq!(map.status(0..1 << 20)?, Status::Clean((0..65536).into()));
    /// assert_eq!(map.status(65536..1 << 20)?, Status::Dirty((65536..131_072).into()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn status(&self, range: impl Into<ByteRange>) -> Result<Status, RangeError> {
        let range = range.into();
        if range.is_empty() {
            return Err(RangeError::Empty {
                offset: range.start(),
            });
        }
        if range.end() > self.len {
            return Err(RangeError::OutOfBounds {
                range,
                len: self.len,
            });
        }
        let to = |end: Option<u64>| (range.start()..end.unwrap_or(range.end())).into();
        Ok(if self.has(self.granularity.granule_of(range.start())) {
            Status::Dirty(to(self.next_clean(range)))
        } else {
            Status::Clean(to(self.next_dirty(range)))
        })
    }

    /// Whether a byte of `range` is dirty. Bytes from [`len`](Self::len) on are not looked at.
    #[must_use]
    pub fn any_dirty_in(&self, range: impl Into<ByteRange>) -> bool {
        self.next_dirty(range).is_some()
    }

    /// Whether no byte of `range` is clean; so it is for an empty range. Bytes from
    /// [`len`](Self::len) on are not looked at.
    #[must_use]
    pub fn all_dirty_in(&self, range: impl Into<ByteRange>) -> bool {
        self.next_clean(range).is_none()
    }

    /// What of `range` lies in the map.
    #[inline]
    pub(super) fn clip(&self, range: ByteRange) -> ByteRange {
        let end = if is_broken(Sabotage::AskPastEnd) {
            self.granularity.align_up(self.len)
        } else {
            self.len
        };
        range.intersection((0..end).into())
    }

    /// What a word has; nothing, if it is not there.
    #[inline]
    pub(super) fn word(&self, at: usize) -> u64 {
        match self.words.get(at) {
            None => 0,
            Some(0) if self.summary.class_of(at) == Class::Full => !0,
            Some(word) => *word,
        }
    }

    /// The first word at or after `from` that has a dirty granule.
    #[inline]
    pub(super) fn next_dirty_word(&self, from: usize) -> Option<usize> {
        // In a map that is neither very clean nor very dirty it is the next one.
        if self.words.get(from).is_some_and(|word| *word != 0) {
            return Some(from);
        }
        self.summary.next_any(from)
    }

    /// The first word at or after `from` that has a clean granule, and what it has; the one past the end,
    /// and nothing, if there is none.
    #[inline]
    pub(super) fn next_lacking_word(&self, from: usize) -> (usize, u64) {
        if let Some(word) = self.words.get(from)
            && *word != 0
            && *word != !0
        {
            return (from, *word);
        }
        let at = self.summary.next_lacking(from).unwrap_or(self.words.len());
        (at, self.word(at))
    }

    /// The words that have a dirty granule, ascending, and what they have.
    #[inline]
    pub(super) fn dirty_words(&self) -> impl Iterator<Item = (usize, u64)> {
        let blocks = self.summary.blocks_from(0);
        blocks.flat_map(move |(block, pair)| {
            ones(pair.any()).map(move |at| (block * 64 + at, self.word_of_block(block, pair, at)))
        })
    }

    /// What a word of a block has of which the pair is known.
    #[inline]
    pub(super) fn word_of_block(&self, block: usize, pair: Pair, at: usize) -> u64 {
        if pair.mixed & bit(at as u64) != 0 {
            self.words.get(block * 64 + at).copied().unwrap_or(0)
        } else {
            (pair.full >> at & 1).wrapping_neg()
        }
    }

    /// What the words of a block have; nothing, where they are not there.
    #[inline]
    pub(super) fn copy_block(&self, block: usize, to: &mut [u64; 64]) {
        let words = self.words.get(block * 64..).unwrap_or_default();
        match words.first_chunk::<64>() {
            Some(words) => *to = *words,
            None => {
                to.fill(0);
                to[..words.len()].copy_from_slice(words);
            }
        }
        let full = self.summary.block(block).map_or(0, |pair| pair.full);
        for at in ones(full) {
            to[at] = !0;
        }
    }

    /// The last word of the map, and those of its bits that are past the end.
    #[inline]
    pub(super) fn last_word(&self) -> (usize, u64) {
        match self.granules() {
            0 => (0, !0),
            granules => (word_of(granules - 1), !bits_to(granules - 1)),
        }
    }

    /// Whether a granule, which must be one of the map, is dirty.
    #[inline]
    pub(super) fn has(&self, granule: u64) -> bool {
        self.word(word_of(granule)) & bit(granule) != 0
    }

    /// The first dirty granule at or after `from`.
    #[inline]
    pub(super) fn next_set(&self, from: u64) -> Option<u64> {
        let at = word_of(from);
        let bits = self.word(at) & bits_from(from);
        if bits != 0 {
            return Some(lowest(at, bits));
        }
        let at = self.next_dirty_word(at + 1)?;
        Some(lowest(at, self.word(at)))
    }

    /// The first clean granule at or after the first of `granules`, which must be some of the map. It may
    /// lie past the last of them, and past the end of the map.
    #[inline]
    pub(super) fn next_unset(&self, granules: Range<u64>) -> Option<u64> {
        let at = word_of(granules.start);
        let bits = !self.word(at) & bits_from(granules.start);
        if bits != 0 {
            return Some(lowest(at, bits));
        }
        if at == word_of(granules.end - 1) {
            return None;
        }
        let at = self.summary.next_lacking(at + 1)?;
        Some(lowest(at, !self.word(at)))
    }
}
