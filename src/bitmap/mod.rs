//! Hierarchical bitmap: which bytes of a disk are dirty, found fast even when they are few.
//!
//! One bit stands for a granule of a power of two of bytes. Above the bits are summaries, so that a
//! search skips 64, 64², 64³ … clean granules with one look. This layer knows bytes, granules and
//! words; it knows no disk, no job and no lock.
//!
//! ```text
//! summary[1]   word 0  10…                                   one word
//!                      │└────────────┐
//! summary[0]   word 0  101…   word 1 000…                    bit N: is word N below not zero?
//!                      ││└─────────────────────────┐
//!                      │└────────────┐             │
//! words        word 0  0100…  word 1 0000…  word 2 1000…  …
//!                       │                          │
//! granules              1                         128        a bit each; the last may be partial
//! ```
//!
//! What always holds, and is checked by the tests after every step:
//!
//! 1. Every level has as many words as the one below needs bits, and at least one. The lowest level
//!    is `words`, with a bit for each granule of `len`; the highest has one word. There is at least
//!    one summary.
//! 2. Bit *N* of a summary is 1 exactly if word *N* of the level below is not zero. A 0 too many hides
//!    dirty granules from every search; a 1 too many sends a search where there is nothing.
//! 3. Bits past the last granule are 0. Otherwise they would be found, counted, and come alive when
//!    the map grows.
//! 4. `count` is the number of ones in `words`.
//!
//! What the operations promise:
//!
//! 5. Setting rounds outward, resetting never does: [`reset`](HBitmap::reset) refuses a range that
//!    cuts a granule, [`reset_inner`](HBitmap::reset_inner) rounds inward. Whoever copied half a
//!    granule and cleared all of it has lost the other half.
//! 6. No argument makes a call panic, and a call that fails has changed nothing. An empty range is
//!    accepted anywhere by what sets and resets, and changes nothing.
//! 7. Every offset and length is in bytes. A byte is as dirty as its granule. Queries end at `len`,
//!    also where the last granule goes on, and all of them tell of the same set of bytes.
//! 8. A [`Cursor`] yields strictly ascending granules while the map changes under it: never one that
//!    was reset before the cursor came to it, always one that was set before. Once ended it stays
//!    so. It does not see what is set behind it, so the end of a pass does not mean that the map is
//!    clean: ask [`is_clean`](HBitmap::is_clean), and start over.
//! 9. Combining maps never loses a dirty byte. Between different granularities a union may gain
//!    bytes and a difference may keep some, for the reasons of rule 5.
//! 10. Setting or resetting one granule touches one word, and those above it only when that word
//!     stops or starts being zero. Finding the next dirty granule takes one step per level, at most
//!     seven up and seven down. Searching and resetting skip what is clean in blocks of 64 words
//!     without reading them; a new map (but not a clone) has not touched its memory at all, so that
//!     64 TiB at 64 KiB take no more than what gets dirty.
//! 11. A map has at most `2^63 - 1` bytes and [`GRANULES_MAX`](HBitmap::GRANULES_MAX) granules, which
//!     is checked before memory is asked for. A map of no bytes is legal, and always clean.
//!
//! The lowest level is a field of its own because nearly every call ends there. There is no sentinel
//! bit above: a search is told by the end of the top word that there is nothing more.

use std::fmt;

use crate::memory::zeroed_words;
use crate::units::Granularity;

mod iter;
mod merge;
mod search;
mod update;
mod word;

pub use iter::{Cursor, Iter, Runs};
pub use merge::{MergeError, UnionError};
pub use search::Status;
pub use update::RangeError;

/// Which granules of `len` bytes are dirty.
///
/// A plain value: it is cloned, compared and sent, and holds no lock. Ranges are half-open and in
/// bytes; the [module documentation](self) has the rules that hold for all operations.
///
/// # Examples
///
/// ```
/// use blockjob::{Granularity, HBitmap};
///
/// // A disk of 1 GiB and a bit, tracked in granules of 64 KiB.
/// let mut dirty = HBitmap::new((1 << 30) + 512, Granularity::DEFAULT)?;
/// assert_eq!(dirty.granules(), 16385);
///
/// // The guest writes 4 KiB across a granule boundary: both granules are dirty.
/// dirty.set(63 << 10..67 << 10)?;
/// assert_eq!(dirty.count(), 2);
/// assert!(dirty.runs().eq([(0..128 << 10).into()]));
///
/// // One of them is copied.
/// dirty.reset(0..64 << 10)?;
/// assert_eq!(dirty.next_dirty(0..dirty.len()), Some(64 << 10));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
// Cheap fields first: that is the order in which maps are compared.
#[derive(Clone, PartialEq, Eq)]
pub struct HBitmap {
    /// Bytes, exactly as asked for; the last granule may reach past them.
    len: u64,
    /// Bytes a bit stands for.
    granularity: Granularity,
    /// Dirty granules (invariant 4).
    count: u64,
    /// A bit for every granule, 1 if it is dirty.
    words: Vec<u64>,
    /// What is not zero in the level below, from the one right above `words` to the top.
    summary: Vec<Vec<u64>>,
}

/// Why a bitmap could not be created. Nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// More bytes than [`HBitmap::LEN_MAX`].
    #[error("a bitmap of {len} bytes is longer than 2^63 - 1 bytes")]
    TooLong {
        /// Bytes asked for.
        len: u64,
    },
    /// More granules than [`HBitmap::GRANULES_MAX`]; a coarser granularity helps.
    #[error(
        "a bitmap of {granules} granules is larger than {} granules",
        HBitmap::GRANULES_MAX
    )]
    TooManyGranules {
        /// Granules needed for the bytes asked for.
        granules: u64,
    },
    /// The allocator has no memory for the bits.
    #[error("no memory for a bitmap of {granules} granules")]
    OutOfMemory {
        /// Granules needed for the bytes asked for.
        granules: u64,
    },
}

impl HBitmap {
    /// Most bytes a bitmap can have.
    pub const LEN_MAX: u64 = i64::MAX as u64;

    /// Most granules a bitmap can have: 2^41 where a pointer has 64 bits, otherwise 2^34.
    pub const GRANULES_MAX: u64 = if cfg!(target_pointer_width = "64") {
        1 << 41
    } else {
        1 << 34
    };

    /// A clean bitmap of `len` bytes, which need not be a multiple of `granularity`.
    ///
    /// # Errors
    ///
    /// [`TooLong`](CreateError::TooLong) and [`TooManyGranules`](CreateError::TooManyGranules) before
    /// any memory is asked for, [`OutOfMemory`](CreateError::OutOfMemory) if there is none. (An
    /// operating system that overcommits may grant memory which it does not have.)
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::CreateError;
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(64 << 40, Granularity::DEFAULT)?;
    /// assert!(map.is_clean());
    ///
    /// let bytes = Granularity::from_bytes(1).unwrap();
    /// assert!(matches!(HBitmap::new(64 << 40, bytes), Err(CreateError::TooManyGranules { .. })));
    /// # Ok::<(), CreateError>(())
    /// ```
    pub fn new(len: u64, granularity: Granularity) -> Result<HBitmap, CreateError> {
        if len > Self::LEN_MAX {
            return Err(CreateError::TooLong { len });
        }
        let granules = granularity.granules_in(len);
        if granules > Self::GRANULES_MAX {
            return Err(CreateError::TooManyGranules { granules });
        }
        let mut levels = level_lens(granules).map(|words| {
            // On a 32-bit host a level can be longer than a `usize` says.
            let words = usize::try_from(words).ok();
            words
                .and_then(zeroed_words)
                .ok_or(CreateError::OutOfMemory { granules })
        });
        Ok(Self {
            len,
            granularity,
            count: 0,
            words: levels.next().expect("there is a lowest level")?,
            summary: levels.collect::<Result<_, _>>()?,
        })
    }

    /// Number of bytes, as given when the bitmap was created. Bytes, not dirty ones: see
    /// [`is_clean`](Self::is_clean) and [`dirty_bytes`](Self::dirty_bytes) for those.
    #[must_use]
    #[inline]
    #[expect(
        clippy::len_without_is_empty,
        reason = "it would be taken for `is_clean`"
    )]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// How many bytes one bit stands for.
    #[must_use]
    #[inline]
    pub const fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Number of granules, the partial last one included.
    #[must_use]
    #[inline]
    pub const fn granules(&self) -> u64 {
        self.granularity.granules_in(self.len)
    }

    /// Whether no granule is dirty. Takes no search.
    #[must_use]
    #[inline]
    pub const fn is_clean(&self) -> bool {
        self.count == 0
    }

    /// Number of dirty granules. Takes no search.
    #[must_use]
    #[inline]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Bytes of all dirty granules. Above [`len`](Self::len) when all are dirty and the last is
    /// partial, as that one counts in full; [`dirty_bytes_in_len`](Self::dirty_bytes_in_len) differs.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1000, Granularity::from_bytes(512).unwrap())?;
    /// map.set_all();
    /// assert_eq!(map.count(), 2);
    /// assert_eq!(map.dirty_bytes(), 1024);
    /// assert_eq!(map.dirty_bytes_in_len(), 1000);
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    #[must_use]
    #[inline]
    pub const fn dirty_bytes(&self) -> u64 {
        // Reaches 2^63 at most, as no map is longer than that less one.
        self.granularity.start_of(self.count)
    }

    /// Bytes before [`len`](Self::len) that are dirty: what is left to copy.
    #[must_use]
    pub fn dirty_bytes_in_len(&self) -> u64 {
        let past_len = self.granularity.align_up(self.len) - self.len;
        let is_last_dirty = self.len > 0 && self.has(self.granules() - 1);
        self.dirty_bytes() - if is_last_dirty { past_len } else { 0 }
    }

    /// Panics unless the numbered invariants of the module hold. For tests: takes as long as reading
    /// the whole map.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        let levels = || std::iter::once(&self.words).chain(&self.summary);

        let lens = levels().map(|level| level.len() as u64);
        assert!(
            lens.eq(level_lens(self.granules())),
            "1: shape of the levels"
        );

        for (below, summary) in levels().zip(&self.summary) {
            for (at, bits) in summary.iter().enumerate() {
                let block = below.iter().skip(at * 64).take(64).enumerate();
                let expected = block.fold(0, |bits, (n, word)| bits | u64::from(*word != 0) << n);
                assert_eq!(*bits, expected, "2: summary of words from {}", at * 64);
            }
        }

        let used = match self.granules() {
            0 => 0,
            granules => word::bits_to(granules - 1),
        };
        let last = self.words[self.words.len() - 1];
        assert_eq!(last & !used, 0, "3: bits past the last granule");

        let ones = self.words.iter().map(|word| u64::from(word.count_ones()));
        assert_eq!(self.count, ones.sum::<u64>(), "4: count");
    }
}

/// Length, granularity and dirty bytes; not the bits.
impl fmt::Debug for HBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HBitmap")
            .field("len", &self.len)
            .field("granularity", &self.granularity)
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}

/// How many words each level of a map of so many granules has, from the lowest up (invariant 1).
fn level_lens(granules: u64) -> impl Iterator<Item = u64> {
    let lowest = word::words_for(granules);
    let summaries = std::iter::successors(Some(word::words_for(lowest)), |below| {
        (*below > 1).then(|| word::words_for(*below))
    });
    std::iter::once(lowest).chain(summaries)
}

/// Breaks each invariant in turn and sees to it that the check notices.
#[cfg(test)]
mod sabotage {
    use super::*;

    /// 200 granules, of which 60 to 69 are dirty.
    fn map() -> HBitmap {
        let mut map = HBitmap::new(200, Granularity::from_bytes(1).unwrap()).unwrap();
        map.set(60..70).unwrap();
        map.check_invariants();
        map
    }

    #[test]
    #[should_panic(expected = "1: shape")]
    fn invariant_1_a_word_too_many() {
        let mut map = map();
        map.words.push(0);
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "1: shape")]
    fn invariant_1_a_level_too_many() {
        let mut map = map();
        map.summary.push(vec![1]);
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "2: summary")]
    fn invariant_2_a_dirty_word_hidden() {
        let mut map = map();
        map.summary[0][0] &= !2;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "2: summary")]
    fn invariant_2_a_clean_word_announced() {
        let mut map = map();
        map.summary[0][0] |= 4;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "2: summary")]
    fn invariant_2_a_word_announced_that_is_not_there() {
        let mut map = map();
        map.summary[0][0] |= 1 << 63;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "3: bits past")]
    fn invariant_3_a_bit_past_the_end() {
        let mut map = map();
        map.words[3] |= 1 << 8;
        map.summary[0][0] |= 8;
        map.count += 1;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "4: count")]
    fn invariant_4_a_granule_not_counted() {
        let mut map = map();
        map.count -= 1;
        map.check_invariants();
    }

    #[test]
    fn levels_shrink_to_one_word() {
        let lens = |granules| level_lens(granules).collect::<Vec<_>>();
        assert_eq!(lens(0), [1, 1]);
        assert_eq!(lens(64), [1, 1]);
        assert_eq!(lens(65), [2, 1]);
        assert_eq!(lens(64 * 64 + 1), [65, 2, 1]);
        assert_eq!(lens(1 << 41).len(), 7);
    }
}
