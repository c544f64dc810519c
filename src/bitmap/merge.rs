//! Combining two bitmaps of equal length: word by word where they have one granularity, run by run
//! where they do not.
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

use super::{CreateError, HBitmap};
use crate::units::{ByteRange, Granularity};

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
        if self.granularity == other.granularity {
            for word in other.nonzero_words() {
                self.set_in_word(word, other.words[word]);
            }
        } else {
            let mut rest = ByteRange::from(0..self.len);
            while let Some(run) = other.next_dirty_area(rest, u64::MAX) {
                self.set_run(self.granularity.outward(run));
                // A finer map may have more runs in the granule that this one ended in.
                rest = (self.granularity.align_up(run.end())..self.len).into();
            }
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
        if self.granularity == other.granularity {
            for word in other.nonzero_words() {
                self.reset_in_word(word, other.words[word]);
            }
        } else {
            // The runs are as long as can be, so a granule that `other` has all of lies in one.
            for run in other.runs() {
                self.reset_run(self.granularity.inward(run, self.len));
            }
        }
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
            let mut words = other.nonzero_words();
            return Ok(words.any(|word| self.words[word] & other.words[word] != 0));
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
        if self.len == other.len {
            return Ok(());
        }
        Err(MergeError::LengthMismatch {
            len: self.len,
            other_len: other.len,
        })
    }

    /// Indices of the words that are not zero, ascending.
    fn nonzero_words(&self) -> impl Iterator<Item = usize> {
        std::iter::successors(self.next_word(0), |word| self.next_word(word + 1))
    }
}
