//! Finding dirty and clean bytes.
//!
//! ```text
//! summary[1]      ┌──▶ next bit that is 1 ──┐         up while the rest of the word is zero,
//! summary[0]   ───┘                         └──┐      down to the lowest bit of what is found
//! words      from                              └──▶ found
//! ```
//!
//! Clean granules are searched for in the lowest level only, a word at a time: what is above knows of
//! zero words, not of full ones.

use std::ops::Range;

use super::HBitmap;
use super::update::RangeError;
use super::word::{bit, bits_from, lowest, word_of};
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
        if offset >= self.len {
            return Err(RangeError::OutOfBounds {
                range: (offset..offset.saturating_add(1)).into(),
                len: self.len,
            });
        }
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
        range.intersection((0..self.len).into())
    }

    /// Whether a granule, which must be one of the map, is dirty.
    #[inline]
    pub(super) fn has(&self, granule: u64) -> bool {
        self.words[word_of(granule)] & bit(granule) != 0
    }

    /// The first dirty granule at or after `from`.
    #[inline]
    pub(super) fn next_set(&self, from: u64) -> Option<u64> {
        let word = word_of(from);
        let bits = self.words.get(word)? & bits_from(from);
        if bits != 0 {
            return Some(lowest(word, bits));
        }
        let word = self.next_word(word + 1)?;
        Some(lowest(word, self.words[word]))
    }

    /// The first word at or after `from` that is not zero.
    pub(super) fn next_word(&self, from: usize) -> Option<usize> {
        let mut index = from as u64;
        for (height, level) in self.summary.iter().enumerate() {
            let word = word_of(index);
            let bits = level.get(word)? & bits_from(index);
            if bits != 0 {
                let found = lowest(word, bits);
                let below = self.summary[..height].iter().rev();
                let down =
                    |found: u64, level: &Vec<u64>| lowest(found as usize, level[found as usize]);
                return Some(below.fold(found, down) as usize);
            }
            index = word as u64 + 1;
        }
        None
    }

    /// The first clean granule at or after the first of `granules`, which must be some of the map. It
    /// is not looked for past the word of the last one, and may lie past that.
    #[inline]
    fn next_unset(&self, granules: Range<u64>) -> Option<u64> {
        let first = word_of(granules.start);
        let bits = !self.words[first] & bits_from(granules.start);
        if bits != 0 {
            return Some(lowest(first, bits));
        }
        let rest = &self.words[first + 1..=word_of(granules.end - 1)];
        let full = rest.iter().position(|word| *word != !0)?;
        Some(lowest(first + 1 + full, !rest[full]))
    }
}
