//! Parts of a map as bytes and back, in the form that QEMU sends and stores.
//!
//! ```text
//! granules   0 1 2 3 4 5 6 7   8 9 …                            64 …
//! bytes      │ lowest bit first │                               │
//!            └── byte 0 ────────┴── byte 1 ─ … ─ byte 7 ────────┴── byte 8 …
//!            └── a part begins and ends here ───────────────────┴── … or ends with the map ──┘
//! ```
//!
//! 1. Granule *i* of a part is bit `i mod 8`, the lowest first, of byte `i / 8`, whatever the machine. A part
//!    has whole words of 8 bytes; bits past the last granule are 0.
//! 2. A part begins at a multiple of [`part_align`](HBitmap::part_align) bytes of the disk. It ends at one,
//!    or in the last granule.
//! 3. Loading replaces what the map had in that part, and nothing else. Parts may come in any order, some
//!    never, some twice, as bytes, as zeroes or as ones. Bits past the last granule are dropped.
//! 4. After every part the map is as sound as any: summaries and count are kept with the words, nothing is
//!    left to be finished, and nothing can be asked too early. That more parts are to come, and the map is
//!    not yet what it should be, is for the one to know who loads it.
//! 5. Whatever the bytes and ranges are, an error leaves the map, or the buffer, as it was.
//!
//! A clean or dirty stretch is neither read nor written when it is part of a map; its bytes are filled.

use std::hint::black_box;
use std::ops::Range;

use super::word::{bits_from, bits_to};
use super::words::Span;
use super::{CreateError, HBitmap};
use crate::units::{ByteRange, Granularity};

/// Why there is no such part. The bitmap, or the buffer, is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PartError {
    /// 64 granules have more bytes than 64 bits count: parts have no ends.
    #[error("a bitmap of granularity {granularity} has no parts")]
    TooCoarse {
        /// Above 2^57 bytes.
        granularity: Granularity,
    },
    /// It ends past the bitmap.
    #[error("bytes {range} end past a bitmap of {len} bytes")]
    OutOfBounds {
        /// What was asked for.
        range: ByteRange,
        /// Bytes of the bitmap.
        len: u64,
    },
    /// It begins or ends amid a word.
    #[error("bytes {range} do not begin and end at multiples of {align}")]
    Unaligned {
        /// What was asked for.
        range: ByteRange,
        /// What its ends must be multiples of, but for an end in the last granule.
        align: u64,
    },
    /// The buffer is not as long as the part.
    #[error("a part of {expected} bytes does not fit a buffer of {found} bytes")]
    Length {
        /// See [`HBitmap::serialized_len`].
        expected: usize,
        /// Bytes of the buffer.
        found: usize,
    },
}

/// Why a part was not loaded. The bitmap is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no such part.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The map had no memory yet, and gets none.
    #[error(transparent)]
    Create(#[from] CreateError),
}

impl HBitmap {
    /// Bytes of the disk that 64 granules stand for: where parts begin and end. `None` if 64 bits do not
    /// count so many, which is so for granularities above 2^57; such a map has no parts.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// assert_eq!(map.part_align(), Some(4 << 20));
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    #[must_use]
    pub const fn part_align(&self) -> Option<u64> {
        64u64.checked_mul(self.granularity.bytes())
    }

    /// Bytes of the disk that `serialized` bytes of a part tell of, rounded **down** to whole words of 8
    /// bytes. `u64::MAX` if 64 bits do not count so many.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// let chunk = map.coverage(1024);
    /// assert_eq!(chunk, 8192 << 16);
    /// assert_eq!(map.serialized_len(chunk..2 * chunk)?, 1024);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub const fn coverage(&self, serialized: u64) -> u64 {
        match (serialized / 8, self.part_align()) {
            (0, _) => 0,
            (words, Some(align)) => words.saturating_mul(align),
            (_, None) => u64::MAX,
        }
    }

    /// Bytes that the part of `range` has: 8 for every 64 granules or fewer that it touches, and none if it
    /// is empty.
    ///
    /// # Errors
    ///
    /// [`TooCoarse`](PartError::TooCoarse), [`OutOfBounds`](PartError::OutOfBounds),
    /// [`Unaligned`](PartError::Unaligned).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new((65 << 16) - 512, Granularity::DEFAULT)?;
    /// assert_eq!(map.serialized_len(0..64 << 16)?, 8);
    /// assert_eq!(map.serialized_len(0..map.len())?, 16);
    /// assert!(map.serialized_len(0..63 << 16).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn serialized_len(&self, range: impl Into<ByteRange>) -> Result<usize, PartError> {
        Ok(self.part(range.into())?.len() * 8)
    }

    /// Writes the part of `range` to `out`, which must be [as long](Self::serialized_len).
    ///
    /// # Errors
    ///
    /// See [`PartError`]. `out` is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(128 << 16, Granularity::DEFAULT)?;
    /// map.set(64 << 16..65 << 16)?;
    /// map.set(73 << 16..76 << 16)?;
    /// let mut part = [0; 8];
    /// map.serialize_part(64 << 16..128 << 16, &mut part)?;
    /// assert_eq!(part, [1, 0b1110, 0, 0, 0, 0, 0, 0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn serialize_part(
        &self,
        range: impl Into<ByteRange>,
        out: &mut [u8],
    ) -> Result<(), PartError> {
        let words = self.part_of_len(range.into(), out.len())?;
        self.write_words(words, out);
        Ok(())
    }

    /// Replaces the part of `range` by what [`serialize_part`](Self::serialize_part) wrote, on this machine
    /// or another, and says whether that changed a granule.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]. Nothing else can be wrong with `bytes` but that there are too few or too many: bits
    /// past the last granule are dropped. The map is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(65 << 16, Granularity::DEFAULT)?;
    /// map.deserialize_part(64 << 16..map.len(), &[0xff; 8])?;
    /// assert_eq!(map.count(), 1);
    /// assert!(map.deserialize_part(0..map.len(), &[0; 8]).is_err(), "it has 16 bytes");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn deserialize_part(
        &mut self,
        range: impl Into<ByteRange>,
        bytes: &[u8],
    ) -> Result<bool, LoadError> {
        let words = self.part_of_len(range.into(), bytes.len())?;
        Ok(self.replace_words::<[u8; 8]>(words.start, bytemuck::cast_slice(bytes))?)
    }

    /// As [`deserialize_part`](Self::deserialize_part) of zero bytes, which are not needed: makes the granules
    /// of `range` clean.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]. The map is then as before.
    pub fn deserialize_zeroes(&mut self, range: impl Into<ByteRange>) -> Result<bool, LoadError> {
        let words = self.part(range.into())?;
        Ok(self.reset_run(self.granules_of(&words)))
    }

    /// As [`deserialize_part`](Self::deserialize_part) of bytes that are all ones, which are not needed: makes
    /// the granules of `range` dirty.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]. The map is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(100 << 16, Granularity::DEFAULT)?;
    /// map.deserialize_ones(0..map.len())?;
    /// assert_eq!(map.count(), 100);
    /// map.deserialize_zeroes(0..64 << 16)?;
    /// assert_eq!(map.count(), 36);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn deserialize_ones(&mut self, range: impl Into<ByteRange>) -> Result<bool, LoadError> {
        let words = self.part(range.into())?;
        if words.is_empty() {
            return Ok(false);
        }
        self.reserve()?;
        Ok(self.set_run(self.granules_of(&words)))
    }

    /// The part of `range`, for who wants to know of it first.
    pub(crate) fn part_of(&self, range: ByteRange) -> Result<Part<'_>, PartError> {
        Ok(Part {
            words: self.part(range)?,
            map: self,
        })
    }

    /// The words of a part.
    pub(super) fn part(&self, range: ByteRange) -> Result<Range<usize>, PartError> {
        let granularity = self.granularity;
        let Some(align) = self.part_align() else {
            return Err(PartError::TooCoarse { granularity });
        };
        if range.is_empty() {
            return Ok(0..0);
        }
        if range.end() > granularity.align_up(self.len) {
            return Err(PartError::OutOfBounds {
                range,
                len: self.len,
            });
        }
        let granules = granularity.outward(range);
        // A power of two: to divide would take longer than all else here.
        let is_aligned = |at: u64| at & (align - 1) == 0;
        let ends_well = is_aligned(range.end()) || granules.end == self.granules();
        if !is_aligned(range.start()) || !ends_well {
            return Err(PartError::Unaligned { range, align });
        }
        // A map has no more words than a `usize` counts.
        Ok((granules.start / 64) as usize..granules.end.div_ceil(64) as usize)
    }

    /// The words of a part that has so many bytes.
    pub(super) fn part_of_len(
        &self,
        range: ByteRange,
        found: usize,
    ) -> Result<Range<usize>, PartError> {
        let words = self.part(range)?;
        let expected = words.len() * 8;
        if found != expected {
            return Err(PartError::Length { expected, found });
        }
        Ok(words)
    }

    /// The granules of some words of the map.
    pub(super) fn granules_of(&self, words: &Range<usize>) -> Range<u64> {
        words.start as u64 * 64..self.granules().min(words.end as u64 * 64)
    }

    /// Writes words of the map, which must be there, to as many bytes.
    pub(super) fn write_words(&self, words: Range<usize>, out: &mut [u8]) {
        let mut rest = out;
        for span in self.spans(words) {
            let (out, after) = rest.split_at_mut(span.len() * 8);
            rest = after;
            match span {
                Span::Clean(_) => out.fill(0),
                Span::Dirty(_) => out.fill(0xff),
                Span::Words(words) => write_le(words, out),
            }
        }
    }
}

/// Words of a cache line, where it has 64 bytes. Where it has more, some are read from twice.
const WORDS_PER_LINE: usize = 8;

/// A part of a map that is there.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    map: &'a HBitmap,
    words: Range<usize>,
}

impl Part<'_> {
    /// Its bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.words.len() * 8
    }

    /// Whether it has no dirty granule. No word is read for that.
    #[inline]
    pub(crate) fn is_clean(&self) -> bool {
        let mut at = self.words.start;
        while at < self.words.end {
            let end = (at / 64 * 64 + 64).min(self.words.end);
            let wanted = bits_from(at as u64) & bits_to(end as u64 - 1);
            let pair = self.map.summary.block(at / 64);
            if pair.is_some_and(|pair| pair.any() & wanted != 0) {
                return false;
            }
            at = end;
        }
        true
    }

    /// Has all cache lines of its words fetched, by reading from each. A short copy waits for one line after the other:
    /// where they are not in the cache it takes up to three times as long as one of what was fetched before.
    pub(crate) fn fetch(&self) {
        for span in self.map.spans(self.words.clone()) {
            if let Span::Words(words) = span {
                let lines = words.chunks(WORDS_PER_LINE);
                black_box(lines.fold(0, |any, line| any | line[0]));
            }
        }
    }

    /// As [`HBitmap::serialize_part`], to the end of a vector, whose memory is written once.
    pub(crate) fn append_to(&self, out: &mut Vec<u8>) {
        out.reserve(self.len());
        for span in self.map.spans(self.words.clone()) {
            let end = out.len() + span.len() * 8;
            match span {
                Span::Clean(_) => out.resize(end, 0),
                Span::Dirty(_) => out.resize(end, 0xff),
                Span::Words(words) if cfg!(target_endian = "little") => {
                    out.extend_from_slice(bytemuck::cast_slice(words));
                }
                Span::Words(words) => out.extend(words.iter().flat_map(|word| word.to_le_bytes())),
            }
        }
    }
}

/// Words in little-endian order.
pub(super) fn write_le(words: &[u64], out: &mut [u8]) {
    if cfg!(target_endian = "little") {
        out.copy_from_slice(bytemuck::cast_slice(words));
    } else {
        for (out, word) in out.chunks_exact_mut(8).zip(words) {
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}
