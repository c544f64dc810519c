//! Walking over what is dirty: a cursor for a map that changes meanwhile, iterators for one that
//! does not.

use std::iter::FusedIterator;

use super::HBitmap;
use super::word::lowest;
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
        self.next = start.map_or(ENDED, |start| start + granularity.bytes());
        start
    }
}

/// Offsets of the first bytes of all dirty granules, ascending. Made by [`HBitmap::iter`].
#[derive(Clone, Debug)]
pub struct Iter<'a> {
    /// What is walked over.
    bitmap: &'a HBitmap,
    /// Index of the word that `bits` are from.
    word: usize,
    /// What of that word was not yielded yet.
    bits: u64,
}

impl Iterator for Iter<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        if self.bits == 0 {
            self.word = self.bitmap.next_word(self.word + 1)?;
            self.bits = self.bitmap.words[self.word];
        }
        let granule = lowest(self.word, self.bits);
        self.bits &= self.bits - 1;
        Some(self.bitmap.granularity.start_of(granule))
    }
}

impl FusedIterator for Iter<'_> {}

/// Dirty byte ranges, ascending. Made by [`HBitmap::runs`] and [`HBitmap::runs_in`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// What is walked over.
    bitmap: &'a HBitmap,
    /// What was not looked at yet.
    rest: ByteRange,
    /// Most bytes a run may have.
    bytes_max: u64,
}

impl Iterator for Runs<'_> {
    type Item = ByteRange;

    #[inline]
    fn next(&mut self) -> Option<ByteRange> {
        let run = self.bitmap.next_dirty_area(self.rest, self.bytes_max)?;
        self.rest = (run.end()..self.rest.end()).into();
        Some(run)
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
        Iter {
            bitmap: self,
            word: 0,
            bits: self.words[0],
        }
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
        Runs {
            bitmap: self,
            rest: self.clip(range.into()),
            bytes_max,
        }
    }
}
