//! A bitmap that knows which of its own parts have changed: what a migration has to send again.
//!
//! ```text
//!              set, reset, merge, load, truncate …
//!                │
//!                ▼
//! bitmap     0110… 0000… │ 1111… 0000… │ 0000… 0010… │ …      a bit for each granule
//!                        │             │             │        cut into chunks of so many serialized bytes
//! changes         1      │      0      │      1      │ …      a bit for each chunk: differs from what was sent?
//! ```
//!
//! 1. A chunk is marked when a granule of it changes, whether it gets dirty or clean and whatever else is in
//!    its word, by whichever method of [`TrackedBitmap`]. There is no other way to the bitmap.
//! 2. A call that changes no granule of a chunk does not mark it. So a long range of which all but one
//!    granule was dirty marks one chunk. (Only [`truncate`](TrackedBitmap::truncate) may mark one too many.)
//! 3. What is new after growing is marked, and so is the chunk that the map now ends in, as it has another
//!    length. What is cut off has no chunk any more.
//! 4. A call that fails has changed and marked nothing.
//! 5. The chunks are the granules of a bitmap of the same length: whoever clears the mark of a chunk, and then
//!    serializes it, misses no change.

use std::ops::Range;

use super::rescale::{Piece, Rounding};
use super::word::{bits_from, bits_to, lowest};
use super::words::Word;
use super::{CreateError, HBitmap, LoadError, MergeError, RangeError, WordsError};
use crate::log::DirtyWord;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// A bitmap, and which of its chunks changed. [`changes`](Self::changes) are a bitmap themselves, of which a
/// granule is a chunk, so that they are searched, walked and counted like any other.
///
/// # Examples
///
/// Send all, then what has changed since:
///
/// ```
/// use blockjob::bitmap::TrackedBitmap;
/// use blockjob::{ByteRange, Granularity, HBitmap};
///
/// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// let mut map = TrackedBitmap::new(map, 1024);
/// let mut sent = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// let mut send = |part: ByteRange, map: &HBitmap| {
///     let mut bytes = vec![0; map.serialized_len(part)?];
///     map.serialize_part(part, &mut bytes)?;
///     sent.deserialize_part(part, &bytes)?;
///     Ok::<_, Box<dyn std::error::Error>>(bytes.len())
/// };
///
/// map.set(0..1 << 39)?;
/// map.take_changes();
/// let all = ByteRange::from(0..map.bitmap().len());
/// assert_eq!(send(all, map.bitmap())?, 2 << 20);
///
/// // The guest goes on writing, and something is copied.
/// map.set(700 << 30..(700 << 30) + 1)?;
/// map.reset(0..64 << 10)?;
/// for part in map.take_changes().runs() {
///     assert_eq!(send(part, map.bitmap())?, 1024);
/// }
/// assert_eq!(&sent, map.bitmap());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedBitmap {
    /// What is tracked.
    bitmap: HBitmap,
    /// What has changed of it.
    changes: Changes,
}

impl TrackedBitmap {
    /// Tracks `bitmap` in chunks of `chunk_len` serialized bytes, rounded **up** to a power of two, and 8 at
    /// least. None has changed yet.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::TrackedBitmap;
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// let chunk = map.coverage(1024);
    /// let tracked = TrackedBitmap::new(map, 1000);
    /// assert_eq!(tracked.changes().granularity().bytes(), chunk);
    /// assert!(tracked.changes().is_clean());
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    #[must_use]
    pub fn new(bitmap: HBitmap, chunk_len: u64) -> Self {
        let changes = Changes::new(&bitmap, chunk_len);
        Self { bitmap, changes }
    }

    /// The bitmap itself, to ask and to serialize.
    #[must_use]
    pub const fn bitmap(&self) -> &HBitmap {
        &self.bitmap
    }

    /// The bitmap, not tracked any more.
    #[must_use]
    pub fn into_bitmap(self) -> HBitmap {
        self.bitmap
    }

    /// Which chunks have changed since they were taken or cleared. A granule of this bitmap is a chunk: its
    /// bytes are those of the disk that the chunk tells of, and are a part to
    /// [serialize](HBitmap::serialize_part) as they are.
    #[must_use]
    pub const fn changes(&self) -> &HBitmap {
        &self.changes.chunks
    }

    /// Which chunks have changed, and from now on none has. The next change asks for memory, unless it is
    /// [reserved](Self::reserve) again.
    pub fn take_changes(&mut self) -> HBitmap {
        let (len, granularity) = (self.changes.chunks.len, self.changes.chunks.granularity);
        let none = HBitmap::new(len, granularity).expect("there is one of this size");
        std::mem::replace(&mut self.changes.chunks, none)
    }

    /// From now on no chunk of `range` has changed; says whether one had. For a part that is about to be
    /// read.
    ///
    /// # Errors
    ///
    /// As [`HBitmap::reset`] of [`changes`](Self::changes): a chunk cannot be cleared in part.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::TrackedBitmap;
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// let mut map = TrackedBitmap::new(map, 1024);
    /// map.set(0..1)?;
    /// let chunk = map.changes().granularity().bytes();
    /// assert!(map.clear_changes(0..1).is_err());
    /// assert!(map.clear_changes(0..chunk)?);
    /// assert!(map.changes().is_clean());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clear_changes(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        self.changes.chunks.reset(range)
    }

    /// Marks every chunk that `range` touches, and says whether one was not: for what was taken and could
    /// not be sent.
    ///
    /// # Errors
    ///
    /// As [`HBitmap::set`] of [`changes`](Self::changes).
    pub fn mark_changed(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        self.changes.chunks.set(range)
    }

    /// As [`HBitmap::reserve`], for the bitmap and its changes. Changes that are [taken](Self::take_changes) take their
    /// memory with them.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](CreateError::OutOfMemory).
    pub fn reserve(&mut self) -> Result<(), CreateError> {
        self.bitmap.reserve()?;
        self.changes.chunks.reserve()
    }

    /// See [`HBitmap::set`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn set(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        self.bitmap.check_bounds(range)?;
        Ok(self.set_run(self.bitmap.granularity.outward(range)))
    }

    /// See [`HBitmap::set_at`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn set_at(&mut self, offset: u64) -> Result<bool, RangeError> {
        let has_changed = self.bitmap.set_at(offset)?;
        if has_changed {
            let granule = self.bitmap.granularity.granule_of(offset);
            self.changes.mark(granule..granule + 1);
        }
        Ok(has_changed)
    }

    /// See [`HBitmap::reset`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn reset(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let granules = self.bitmap.uncut(range.into())?;
        Ok(self.reset_run(granules))
    }

    /// See [`HBitmap::reset_inner`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn reset_inner(&mut self, range: impl Into<ByteRange>) -> Result<bool, RangeError> {
        let range = range.into();
        self.bitmap.check_bounds(range)?;
        Ok(self.reset_run(self.bitmap.granularity.inward(range, self.bitmap.len)))
    }

    /// See [`HBitmap::set_all`].
    pub fn set_all(&mut self) -> bool {
        self.set_run(0..self.bitmap.granules())
    }

    /// See [`HBitmap::reset_all`].
    pub fn reset_all(&mut self) -> bool {
        self.reset_run(0..self.bitmap.granules())
    }

    /// See [`HBitmap::merge_from`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn merge_from(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.bitmap.check_as_long_as(other.len)?;
        let (map, changes) = (&self.bitmap, &mut self.changes);
        other.rescaled(map.granularity, Rounding::Outward, |piece| match piece {
            Piece::Word(at, bits) => changes.mark_word_if(at, bits & !map.word(at) != 0),
            Piece::Run(granules) => changes.will_set(map, granules),
        });
        self.bitmap.merge_from(other)
    }

    /// See [`HBitmap::subtract`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn subtract(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.bitmap.check_as_long_as(other.len)?;
        let (map, changes) = (&self.bitmap, &mut self.changes);
        other.rescaled(map.granularity, Rounding::Inward, |piece| match piece {
            Piece::Word(at, bits) => changes.mark_word_if(at, bits & map.word(at) != 0),
            Piece::Run(granules) => changes.will_reset(map, granules),
        });
        self.bitmap.subtract(other)
    }

    /// See [`HBitmap::retain`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn retain(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.bitmap.check_as_long_as(other.len)?;
        let (map, changes) = (&self.bitmap, &mut self.changes);
        let mut will_reset = |gap: Range<u64>| {
            changes.will_reset(map, map.granularity.inward(gap.into(), map.len));
        };
        let mut from = 0;
        for run in other.runs() {
            will_reset(from..run.start());
            from = run.end();
        }
        will_reset(from..map.len);
        self.bitmap.retain(other)
    }

    /// See [`HBitmap::copy_from`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn copy_from(&mut self, other: &HBitmap) -> Result<(), MergeError> {
        self.bitmap.check_as_long_as(other.len)?;
        let (map, changes) = (&self.bitmap, &mut self.changes);
        let mut from = 0;
        other.rescaled(map.granularity, Rounding::Outward, |piece| {
            let granules = match &piece {
                Piece::Word(at, bits) => {
                    let past_last = 64 - u64::from(bits.leading_zeros());
                    lowest(*at, *bits)..*at as u64 * 64 + past_last
                }
                Piece::Run(granules) => granules.clone(),
            };
            changes.will_reset(map, from..granules.start);
            from = granules.end;
            match piece {
                Piece::Word(at, bits) => {
                    let between = bits_from(granules.start) & bits_to(granules.end - 1);
                    changes.mark_word_if(at, (bits ^ map.word(at)) & between != 0);
                }
                Piece::Run(granules) => changes.will_set(map, granules),
            }
        });
        changes.will_reset(map, from..map.granules());
        self.bitmap.copy_from(other)
    }

    /// See [`HBitmap::deserialize_part`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn deserialize_part(
        &mut self,
        range: impl Into<ByteRange>,
        bytes: &[u8],
    ) -> Result<bool, LoadError> {
        let words = self.bitmap.part_of_len(range.into(), bytes.len())?;
        Ok(self.replace_words::<[u8; 8]>(words.start, bytemuck::cast_slice(bytes))?)
    }

    /// See [`HBitmap::deserialize_zeroes`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn deserialize_zeroes(&mut self, range: impl Into<ByteRange>) -> Result<bool, LoadError> {
        let words = self.bitmap.part(range.into())?;
        if words.is_empty() || self.bitmap.is_clean() {
            return Ok(false);
        }
        self.changes.chunks.reserve()?;
        Ok(self.reset_run(self.bitmap.granules_of(&words)))
    }

    /// See [`HBitmap::deserialize_ones`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn deserialize_ones(&mut self, range: impl Into<ByteRange>) -> Result<bool, LoadError> {
        let words = self.bitmap.part(range.into())?;
        if words.is_empty() {
            return Ok(false);
        }
        self.reserve()?;
        Ok(self.set_run(self.bitmap.granules_of(&words)))
    }

    /// See [`HBitmap::import_words`].
    ///
    /// # Errors
    ///
    /// The same.
    pub fn import_words(&mut self, first: usize, words: &[u64]) -> Result<bool, WordsError> {
        self.bitmap.check_words(first, words.len())?;
        Ok(self.replace_words(first, words)?)
    }

    /// See [`HBitmap::truncate`]. The new length is that of the changes as well.
    ///
    /// # Errors
    ///
    /// The same.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::TrackedBitmap;
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// let mut map = TrackedBitmap::new(map, 1024);
    /// map.truncate((1 << 40) + 512)?;
    /// assert!(map.changes().runs().eq([(1 << 40..(1 << 40) + 512).into()]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn truncate(&mut self, len: u64) -> Result<(), CreateError> {
        let before = &self.changes.chunks;
        let mut chunks = HBitmap::new(before.len, before.granularity)?;
        if !before.is_clean() {
            chunks.reserve()?;
            chunks.clone_from(before);
        }
        chunks.truncate(len)?;
        chunks.reserve()?;
        let before = self.bitmap.granules();
        self.bitmap.truncate(len)?;
        let after = self.bitmap.granules();

        self.changes.chunks = chunks;
        if is_broken(Sabotage::ForgetTruncated) {
        } else if after > before {
            self.changes.mark(before..after);
        } else if after < before && after > 0 {
            self.changes.mark(after - 1..after);
        }
        Ok(())
    }

    /// Sets a run of granules of the map.
    fn set_run(&mut self, granules: Range<u64>) -> bool {
        self.changes.will_set(&self.bitmap, granules.clone());
        self.bitmap.set_run(granules)
    }

    /// Resets a run of granules of the map.
    fn reset_run(&mut self, granules: Range<u64>) -> bool {
        self.changes.will_reset(&self.bitmap, granules.clone());
        self.bitmap.reset_run(granules)
    }

    /// Replaces words of the map, which must be there, chunk by chunk.
    fn replace_words<W: Word>(&mut self, first: usize, words: &[W]) -> Result<bool, CreateError> {
        if words.is_empty() || self.bitmap.is_clean() && words.iter().all(|word| word.get() == 0) {
            return Ok(false);
        }
        // What else may be refused is so before anything has changed.
        self.changes.chunks.reserve()?;
        let mut has_changed = false;
        let mut at = first;
        let mut rest = words;
        while !rest.is_empty() {
            let chunk = self.changes.words_from(at).min(rest.len());
            let (words, after) = rest.split_at(chunk);
            if self.bitmap.replace_words(at, words)? {
                self.changes.mark_word_if(at, true);
                has_changed = true;
            }
            at += chunk;
            rest = after;
        }
        Ok(has_changed)
    }
}

/// What has changed of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// The chunks, as granules of a map of the same length.
    chunks: HBitmap,
    /// A chunk has two to the power of this granules of the map, or is the whole map.
    shift: u8,
}

impl Changes {
    /// None yet, in chunks of `chunk_len` serialized bytes, as [`TrackedBitmap::new`] rounds them.
    pub(crate) fn new(map: &HBitmap, chunk_len: u64) -> Self {
        // No map has 2^63 bytes, so a chunk of that many, or more, is the whole of it.
        let log2 = |bytes: u64| 64 - bytes.saturating_sub(1).leading_zeros();
        let granules = 3 + log2(chunk_len.max(8));
        let exponent = 63.min(granules + u32::from(map.granularity.exponent()));
        let granularity = Granularity::from_exponent(exponent as u8).expect("it is below 64");
        Self {
            shift: granularity.exponent() - map.granularity.exponent(),
            chunks: HBitmap::new(map.len, granularity)
                .expect("there are no more chunks than granules"),
        }
    }

    /// The chunks, as granules of a map of the same length.
    pub(crate) fn chunks(&self) -> &HBitmap {
        &self.chunks
    }

    /// The same, to mark or to clear some.
    pub(crate) fn chunks_mut(&mut self) -> &mut HBitmap {
        &mut self.chunks
    }

    /// As [`HBitmap::set_word`] of `map`, of which these are the changes.
    pub(crate) fn set_word(
        &mut self,
        map: &mut HBitmap,
        granularity: Granularity,
        word: DirtyWord,
    ) {
        if !is_broken(Sabotage::ForgetRecorded) {
            for run in word.runs() {
                let end = granularity.start_of(run.end).min(map.len);
                let run = ByteRange::from(granularity.start_of(run.start)..end);
                self.will_set(map, map.granularity.outward(run));
            }
        }
        map.set_word(granularity, word);
    }

    /// These granules of the map, if there are any, have changed.
    fn mark(&mut self, granules: Range<u64>) {
        if !granules.is_empty() {
            let last = (granules.end - 1) >> self.shift;
            self.chunks.set_run(granules.start >> self.shift..last + 1);
        }
    }

    /// A word of the map has changed, or not.
    fn mark_word_if(&mut self, at: usize, has_changed: bool) {
        if has_changed && !is_broken(Sabotage::ForgetMerged) {
            self.mark(at as u64 * 64..at as u64 * 64 + 1);
        }
    }

    /// As [`HBitmap::set`] of `map`, of which these are the changes, within the disk.
    pub(crate) fn set(&mut self, map: &mut HBitmap, range: ByteRange) {
        let granules = map.granularity.outward(range);
        self.will_set(map, granules.clone());
        map.set_run(granules);
    }

    /// These granules of `map` are about to be set.
    fn will_set(&mut self, map: &HBitmap, granules: Range<u64>) {
        self.mark_runs(
            granules,
            |run| map.next_unset(run),
            |run| map.next_set(run.start),
        );
    }

    /// These granules of `map` are about to be reset.
    fn will_reset(&mut self, map: &HBitmap, granules: Range<u64>) {
        if !map.is_clean() && !is_broken(Sabotage::ForgetReset) {
            self.mark_runs(
                granules,
                |run| map.next_set(run.start),
                |run| map.next_unset(run),
            );
        }
    }

    /// Marks run after run: `first` finds where one begins in those granules, or past them, and `end` where
    /// it ends.
    fn mark_runs(
        &mut self,
        granules: Range<u64>,
        first: impl Fn(Range<u64>) -> Option<u64>,
        end: impl Fn(Range<u64>) -> Option<u64>,
    ) {
        let mut from = granules.start;
        while from < granules.end {
            let start = first(from..granules.end).unwrap_or(granules.end);
            if start >= granules.end {
                break;
            }
            let end = end(start..granules.end).unwrap_or(granules.end);
            let end = end.min(granules.end);
            self.mark(start..end);
            // What is marked needs not be looked at again.
            from = (((end - 1) >> self.shift) + 1) << self.shift;
        }
    }

    /// Words from `at` on that are of one chunk.
    fn words_from(&self, at: usize) -> usize {
        let words = 1usize.checked_shl(u32::from(self.shift.saturating_sub(6)));
        words.map_or(usize::MAX, |words| words - at % words)
    }
}
