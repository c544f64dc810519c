//! Combining two bitmaps of equal length: block by block of 64 words where they have one granularity,
//! else word by word [as the other looks](super::rescale) at the granularity of the first.
//!
//! ```text
//! 64 KiB   ░░██░░░░░░░░      other, finer
//! 128 KiB  ░░░░░░░░████      self
//! union    ████░░░░████      outward: never loses a dirty byte
//!
//! 64 KiB   ░░██████░░██      other, finer
//! 128 KiB  ████████████      self
//! subtract ████░░░░████      inward: clears only what `other` has all of
//! ```
//!
//! That one map is combined with itself, or the result overwritten while an operand is read, is ruled
//! out by the borrows.

use multiversion::multiversion;

use super::rescale::{Piece, Rounding};
use super::summary::{Class, Pair};
use super::word::{clear, ones};
use super::{CreateError, HBitmap};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::Granularity;

/// Why two bitmaps cannot be combined. Both are as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// They are not equally long.
    #[error("a bitmap of {other_len} bytes does not fit one of {len} bytes")]
    LengthMismatch {
        /// Bytes of the bitmap that the method was called on.
        len: u64,
        /// Bytes of the other one.
        other_len: u64,
    },
}

/// Why a union could not be made. Both operands are as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnionError {
    /// The operands do not fit together.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The result cannot be created.
    #[error(transparent)]
    Create(#[from] CreateError),
}

impl HBitmap {
    /// What is dirty in `a` or in `b`, as a new map of the given granularity, which may differ from
    /// that of both. Rounds **outward**.
    ///
    /// # Errors
    ///
    /// [`UnionError::Merge`] if they are not equally long, [`UnionError::Create`] if the granularity
    /// is too fine for their length.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut monday = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let mut tuesday = HBitmap::new(1 << 20, Granularity::from_bytes(4096).unwrap())?;
    /// monday.set(0..1)?;
    /// tuesday.set(65_536..65_537)?;
    /// let both = HBitmap::union(&monday, &tuesday, tuesday.granularity())?;
    /// assert!(both.runs().eq([(0..69_632).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn union(
        a: &HBitmap,
        b: &HBitmap,
        granularity: Granularity,
    ) -> Result<HBitmap, UnionError> {
        a.check_len(b)?;
        let mut union = HBitmap::new(a.len, granularity)?;
        union.merge_from(a)?;
        union.merge_from(b)?;
        Ok(union)
    }

    /// Makes dirty what is dirty in `other`, and says whether something was not before. Rounds
    /// **outward** if `other` is finer.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch); the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut coarse = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let mut fine = HBitmap::new(1 << 20, Granularity::from_bytes(512).unwrap())?;
    /// fine.set(65_000..65_536)?;
    /// assert!(coarse.merge_from(&fine)?);
    /// assert!(coarse.runs().eq([(0..65_536).into()]));
    /// assert!(!coarse.merge_from(&fine)?, "nothing new");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge_from(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.check_len(other)?;
        let before = self.count;
        if other.is_clean() || self.count == self.granules() {
            return Ok(false);
        }
        if other.count == other.granules() {
            return Ok(self.set_all());
        }
        if self.words.is_empty() {
            self.take_memory();
        }
        if self.granularity == other.granularity {
            union_blocks(self, other);
        } else {
            other.rescaled(self.granularity, Rounding::Outward, |piece| match piece {
                Piece::Word(word, bits) => drop(self.set_in_word(word, bits)),
                Piece::Run(granules) => drop(self.set_run(granules)),
            });
        }
        Ok(self.count > before)
    }

    /// Makes clean what is dirty in `other`, and says whether something of it was dirty. A granule
    /// that `other` has only a part of stays dirty: rounds **inward**.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch); the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut coarse = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let mut fine = HBitmap::new(1 << 20, Granularity::from_bytes(512).unwrap())?;
    /// coarse.set(0..131_072)?;
    /// fine.set(512..131_072)?;
    /// assert!(coarse.subtract(&fine)?);
    /// assert!(coarse.runs().eq([(0..65_536).into()]), "512 bytes of it are still to be copied");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn subtract(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.check_len(other)?;
        let before = self.count;
        if other.is_clean() || self.is_clean() {
            return Ok(false);
        }
        if self.granularity == other.granularity {
            subtract_blocks(self, other);
        } else {
            let rounding = if is_broken(Sabotage::SubtractParts) {
                Rounding::Outward
            } else {
                Rounding::Inward
            };
            other.rescaled(self.granularity, rounding, |piece| match piece {
                Piece::Word(word, bits) => drop(self.reset_in_word(word, bits)),
                Piece::Run(granules) => drop(self.reset_run(granules)),
            });
        }
        Ok(self.count < before)
    }

    /// Makes clean what is clean in `other`, and says whether something of it was dirty. A granule that
    /// is dirty in `other` only in part stays as it is.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch); the bitmap is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut coarse = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let mut fine = HBitmap::new(1 << 20, Granularity::from_bytes(512).unwrap())?;
    /// coarse.set(0..131_072)?;
    /// fine.set(65_536..66_048)?;
    /// assert!(coarse.retain(&fine)?);
    /// assert!(coarse.runs().eq([(65_536..131_072).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn retain(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.check_len(other)?;
        let before = self.count;
        if other.is_clean() {
            return Ok(self.reset_all());
        }
        // What lies between the runs of the other is cleared, as far as no granule of ours is cut.
        let mut from = 0;
        for run in other.runs() {
            self.reset_run(
                self.granularity
                    .inward((from..run.start()).into(), self.len),
            );
            from = run.end();
        }
        self.reset_run(self.granularity.inward((from..self.len).into(), self.len));
        Ok(self.count < before)
    }

    /// Makes dirty what is dirty in `other` and clean all else. Keeps its own granularity, and rounds
    /// **outward** if `other` is finer.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch); the bitmap is then as before.
    pub fn copy_from(&mut self, other: &HBitmap) -> Result<(), MergeError> {
        self.check_len(other)?;
        if self.granularity == other.granularity && !other.is_clean() {
            self.clone_from(other);
            return Ok(());
        }
        self.reset_all();
        self.merge_from(other)?;
        Ok(())
    }

    /// Whether a byte is dirty in both. Nothing is rounded.
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](MergeError::LengthMismatch).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut coarse = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let mut fine = HBitmap::new(1 << 20, Granularity::from_bytes(512).unwrap())?;
    /// coarse.set(65_536..131_072)?;
    /// fine.set(65_535..65_536)?;
    /// assert!(!coarse.intersects(&fine)?);
    /// fine.set(65_536..65_537)?;
    /// assert!(coarse.intersects(&fine)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn intersects(&self, other: &HBitmap) -> Result<bool, MergeError> {
        self.check_len(other)?;
        if self.granularity == other.granularity {
            let mut words = other.dirty_words();
            return Ok(words.any(|(at, bits)| self.word(at) & bits != 0));
        }
        // Each skips to where the other goes on, until both are at the same byte.
        let mut from = 0;
        while let Some(here) = self.next_dirty(from..self.len) {
            match other.next_dirty(here..self.len) {
                None => break,
                Some(there) if there == here => return Ok(true),
                Some(there) => from = there,
            }
        }
        Ok(false)
    }

    /// The two maps are equally long.
    fn check_len(&self, other: &HBitmap) -> Result<(), MergeError> {
        self.check_as_long_as(other.len)
    }

    /// The map is so long.
    pub(crate) fn check_as_long_as(&self, other_len: u64) -> Result<(), MergeError> {
        if self.len == other_len {
            return Ok(());
        }
        Err(MergeError::LengthMismatch {
            len: self.len,
            other_len,
        })
    }
}

/// Makes `map` the union of both, which have the same granules and memory.
///
/// Made several times over, for what processors have: the work is counting ones.
#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn union_blocks(map: &mut HBitmap, other: &HBitmap) {
    for (block, theirs) in other.summary.blocks_from(0) {
        let Some(mine) = map.summary.block(block) else {
            break;
        };
        let (words, added) = (&mut map.words[block * 64..], &other.words[block * 64..]);
        let mut after = Pair {
            mixed: (mine.mixed | theirs.mixed) & !theirs.full & !mine.full,
            full: mine.full | theirs.full,
        };
        let mut count = 0;
        if let (true, Some((words, _)), Some((added, _))) = (
            mine.mixed & theirs.mixed == !0,
            words.split_first_chunk_mut::<64>(),
            added.split_first_chunk::<64>(),
        ) {
            // All 64 words are mixed in both: without a question the compiler makes wide instructions.
            for (word, added) in words.iter_mut().zip(added) {
                count += u64::from((added & !*word).count_ones());
                *word |= added;
            }
            if words.iter().fold(false, |any, word| any | (*word == !0)) {
                after = classes(words);
            }
        } else {
            // A word that is full here stays as it is. One that only becomes full is counted as 64, less
            // what it had.
            for at in ones(theirs.mixed & !mine.any()) {
                words[at] = added[at];
                count += u64::from(added[at].count_ones());
            }
            for at in ones(theirs.mixed & mine.mixed) {
                count += u64::from((added[at] & !words[at]).count_ones());
                words[at] |= added[at];
                if words[at] == !0 {
                    after = after.with(1 << at, Class::Full);
                }
            }
            let filled = theirs.full & !mine.full;
            count += u64::from(filled.count_ones()) * 64;
            for at in ones(filled & mine.mixed) {
                count -= u64::from(words[at].count_ones());
                words[at] = !0;
            }
        }
        map.count += count;
        if after != mine {
            map.summary.set_block(block, after);
        }
    }
}

/// Takes from `map` what `other` has, which has the same granules. Both have memory.
#[multiversion(targets(
    "x86_64+avx512vl+avx512vpopcntdq+bmi1+bmi2+popcnt",
    "x86_64+avx2+bmi1+bmi2+popcnt"
))]
fn subtract_blocks(map: &mut HBitmap, other: &HBitmap) {
    for (block, theirs) in other.summary.blocks_from(0) {
        let Some(mine) = map.summary.block(block) else {
            break;
        };
        let (words, taken) = (&mut map.words[block * 64..], &other.words[block * 64..]);
        let mut after = mine.with(theirs.full, Class::Empty);
        let mut count = 0;
        if let (true, Some((words, _)), Some((taken, _))) = (
            mine.mixed & theirs.mixed == !0,
            words.split_first_chunk_mut::<64>(),
            taken.split_first_chunk::<64>(),
        ) {
            let mut has_empty = false;
            for (word, taken) in words.iter_mut().zip(taken) {
                count += u64::from((*word & taken).count_ones());
                *word &= !taken;
                has_empty |= *word == 0;
            }
            if has_empty {
                after = classes(words);
            }
        } else {
            for at in ones(theirs.mixed & mine.full) {
                words[at] = !taken[at];
                count += u64::from(taken[at].count_ones());
                after = after.with(1 << at, Class::Mixed);
            }
            for at in ones(theirs.mixed & mine.mixed) {
                count += u64::from((words[at] & taken[at]).count_ones());
                words[at] &= !taken[at];
                if words[at] == 0 {
                    after = after.with(1 << at, Class::Empty);
                }
            }
            for at in ones(theirs.full & mine.full) {
                count += 64;
                clear(&mut words[at..=at]);
            }
            for at in ones(theirs.full & mine.mixed) {
                count += u64::from(words[at].count_ones());
                words[at] = 0;
            }
        }
        map.count -= count;
        if after != mine {
            map.summary.set_block(block, after);
        }
    }
}

/// The classes of 64 words.
pub(super) fn classes(words: &[u64; 64]) -> Pair {
    let mut pair = Pair { mixed: 0, full: 0 };
    for (at, word) in words.iter().enumerate() {
        pair = pair.with(1 << at, Class::of(*word));
    }
    pair
}
