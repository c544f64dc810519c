//! Hierarchical bitmap: which bytes of a disk are dirty, found fast even when they are few.
//!
//! One bit stands for a granule of a power of two of bytes. Above the bits are summaries, so that a
//! search skips 64, 64², 64³ … clean granules with one look. This layer knows bytes, granules and
//! words; it knows no disk, no job and no lock.
//!
//! ```text
//! summary    mixed 1 0 1 0…   full 0 0 0 1…     of words: two bits for each; above them more of the same
//!                  │   │             │
//! words        0100… 0000 0110…      0000       not 0: so it is; 0: empty or full, as the summary says
//!
//! granules     1          129,130    192…255    a bit each; the last may be partial
//! ```
//!
//! What always holds, and is checked by the tests after every step:
//!
//! 1. There is a word for every 64 granules, and at least one; a pair of summary words for every 64 words
//!    and, further up, for every 64 pairs, until one pair is left. Or, in a map that was never dirty, there
//!    is no memory at all.
//! 2. A pair says of each of its 64 children whether it is empty, mixed or full. *Full* means that all that
//!    64 whole granules (64 words, 64 pairs) can hold is 1. All pairs are true, and a word that is not 0 is
//!    what its pair says. One that is 0 may be empty or full: a run is filled without writing it.
//! 3. Bits past the last granule are 0. Otherwise they would be found, counted, and come
//!    alive when the map grows. (The word that the map ends amid is therefore never full.)
//! 4. `count` is the number of dirty granules.
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
//!    bytes, and a difference or an intersection may keep some, for the reasons of rule 5.
//! 10. What is clean, or dirty, as a whole costs next to nothing: it is neither read nor written, and its
//!     memory was perhaps never touched. (Only what is dirty and becomes clean is read, and the words of a
//!     block of 64 that has a mixed one; by a clone, and when a map without memory is loaded as a whole, those of 4 KiB
//!     of words that have one.) Setting or resetting one granule touches one word and its pair, and those
//!     above only when the pair's words stop or start being alike. Finding the next dirty or clean granule takes
//!     one step per level, at most six up and six down. [All costs](cost) are on a page of their own.
//! 11. A map has at most `2^63 - 1` bytes and [`GRANULES_MAX`](HBitmap::GRANULES_MAX) granules, which is
//!     checked before memory is asked for. A map of no bytes is legal, and always clean.
//! 12. A map takes its memory when its first granule gets dirty, all at once. As with any collection the
//!     process ends when it is refused; [`reserve`](HBitmap::reserve) asks beforehand, and can be told no.
//!     Nothing else allocates, but for [`truncate`](HBitmap::truncate) and what makes a new map.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;

use crate::memory::{self, OutOfMemory};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::Granularity;
use summary::Summary;

#[doc = include_str!("cost.md")]
pub mod cost {}
#[cfg(feature = "sha2")]
mod hash;
mod iter;
mod merge;
mod ones;
mod rescale;
mod resize;
mod search;
mod serial;
pub mod stored;
mod summary;
mod tracked;
mod update;
mod word;
mod words;

pub use iter::{Cursor, Iter, Runs};
pub use merge::{MergeError, UnionError};
pub use search::Status;
pub use serial::{LoadError, PartError};
pub(crate) use tracked::Changes;
pub use tracked::TrackedBitmap;
pub use update::RangeError;
pub use words::WordsError;

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
pub struct HBitmap {
    /// Bytes, exactly as asked for; the last granule may reach past them.
    len: u64,
    /// Bytes a bit stands for.
    granularity: Granularity,
    /// Dirty granules (invariant 4).
    count: u64,
    /// A bit for every granule, 1 if it is dirty; but a word that is 0 is full if the summary says so.
    words: Vec<u64>,
    /// Which words are empty, mixed and full. Without memory exactly when `words` is.
    summary: Summary,
}

/// Why a bitmap could not be created, or could not take its memory.
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
    /// [`TooLong`](CreateError::TooLong) and [`TooManyGranules`](CreateError::TooManyGranules). No memory
    /// is asked for yet: see [`reserve`](Self::reserve).
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
        if granules > Self::GRANULES_MAX && !is_broken(Sabotage::ForgetMost) {
            return Err(CreateError::TooManyGranules { granules });
        }
        let mut map = Self {
            len,
            granularity,
            count: 0,
            words: Vec::new(),
            summary: Summary::default(),
        };
        if is_broken(Sabotage::TakeMemoryAtOnce) {
            map.reserve()?;
        }
        Ok(map)
    }

    /// Takes the memory that a map else takes when its first granule gets dirty.
    ///
    /// From then on no mutator but [`truncate`](Self::truncate) asks for memory, so none can be refused it. What is made a
    /// [clone](Clone) of a clean map has none, be it by `clone_from`, and is to be asked again.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](CreateError::OutOfMemory). (An operating system that overcommits may grant memory
    /// which it does not have.)
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// map.reserve()?;
    /// assert!(map.is_clean());
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    pub fn reserve(&mut self) -> Result<(), CreateError> {
        if self.words.is_empty() {
            (self.words, self.summary) = new_storage(self.granules())?;
        }
        Ok(())
    }

    /// The memory is needed now (rule 12).
    #[cold]
    #[inline(never)]
    fn take_memory(&mut self) {
        if self.reserve().is_err() {
            let words = usize::try_from(self.granules() / 64).unwrap_or(usize::MAX);
            handle_alloc_error(Layout::array::<u64>(words).unwrap_or(Layout::new::<u64>()));
        }
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
        let expected = word::words_for(self.granules());
        let is_bare = self.words.is_empty() && self.count == 0;
        assert!(
            self.words.len() as u64 == expected || is_bare,
            "1: number of words"
        );
        if is_bare {
            assert_eq!(self.summary.block_count(), 0, "1: a summary of nothing");
            return;
        }
        self.summary.check(&self.words);

        let used = match self.granules() % 64 {
            0 if self.granules() > 0 => !0,
            used => !(!0 << used),
        };
        let last = self.words.len() - 1;
        assert_eq!(self.word(last) & !used, 0, "3: bits past the last granule");

        let ones = (0..self.words.len()).map(|word| u64::from(self.word(word).count_ones()));
        assert_eq!(self.count, ones.sum::<u64>(), "4: count");
    }
}

/// A clean map has no memory, whatever it was cloned from.
impl Clone for HBitmap {
    fn clone(&self) -> Self {
        let mut clone = Self {
            len: self.len,
            granularity: self.granularity,
            count: 0,
            words: Vec::new(),
            summary: Summary::default(),
        };
        clone.clone_from(self);
        clone
    }

    fn clone_from(&mut self, other: &Self) {
        let is_alike = self.words.len() == other.words.len();
        self.len = other.len;
        self.granularity = other.granularity;
        self.count = other.count;
        if !is_alike || other.is_clean() {
            self.words = Vec::new();
            self.summary = Summary::default();
        }
        if other.is_clean() {
            return;
        }
        if self.words.is_empty() && other.summary.is_mixed_in_each(word::PAGE / 64) {
            // There is no page of it that need not be written: so it is not zeroed before.
            self.words = other.words.clone();
            self.summary = other.summary.clone();
            return;
        }
        if self.words.is_empty() {
            self.take_memory();
        }
        for (block, words) in self.words.chunks_mut(64).enumerate() {
            // What is uniform needs no word, but what an earlier map left there must go.
            let has_some = other
                .summary
                .block(block)
                .is_some_and(|pair| pair.mixed != 0);
            let had_some = self
                .summary
                .block(block)
                .is_some_and(|pair| pair.any() != 0);
            if has_some {
                words.copy_from_slice(&other.words[block * 64..][..words.len()]);
            } else if had_some {
                word::clear(words);
            }
        }
        self.summary.take_over(&other.summary);
    }
}

/// Equal are maps of the same length and granularity with the same dirty granules.
impl PartialEq for HBitmap {
    fn eq(&self, other: &Self) -> bool {
        let is_alike = self.len == other.len
            && self.granularity == other.granularity
            && self.count == other.count;
        if !is_alike || self.is_clean() {
            return is_alike;
        }
        (0..self.summary.block_count()).all(|block| {
            let pair = self.summary.block(block);
            let (ours, theirs) = (&self.words[block * 64..], &other.words[block * 64..]);
            pair == other.summary.block(block)
                && pair.is_some_and(|pair| match pair.mixed {
                    u64::MAX => ours[..64] == theirs[..64],
                    mixed => word::ones(mixed).all(|at| ours[at] == theirs[at]),
                })
        })
    }
}

impl Eq for HBitmap {}

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

/// Zeroed memory for so many granules.
fn new_storage(granules: u64) -> Result<(Vec<u64>, Summary), CreateError> {
    let words = word::words_for(granules);
    let storage = || Ok((memory::zeroed(words)?, Summary::new(words)?));
    storage().map_err(|OutOfMemory| CreateError::OutOfMemory { granules })
}

/// Breaks each invariant in turn and sees to it that the check notices. What is above the words is broken
/// in the module of the summary.
#[cfg(test)]
mod sabotage {
    use super::summary::Class;
    use super::*;

    /// 200 granules, of which 60 to 69 are dirty.
    fn map() -> HBitmap {
        let mut map = HBitmap::new(200, Granularity::from_bytes(1).unwrap()).unwrap();
        map.set(60..70).unwrap();
        map.check_invariants();
        map
    }

    #[test]
    #[should_panic(expected = "1: number of words")]
    fn invariant_1_a_word_too_many() {
        let mut map = map();
        map.words.push(0);
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "1: a summary of nothing")]
    fn invariant_1_a_summary_without_words() {
        let mut map = map();
        map.reset(60..70).unwrap();
        map.words.clear();
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "2: word 0 of block 0 is not what is told")]
    fn invariant_2_a_full_word_said_to_be_mixed() {
        let mut map = map();
        map.words[0] = !0;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "2: word 2 of block 0 is not what is told")]
    fn invariant_2_a_dirty_word_hidden() {
        let mut map = map();
        map.words[2] = 1;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "3: bits past")]
    fn invariant_3_a_bit_past_the_end() {
        let mut map = map();
        map.words[3] = 1 << 8;
        map.summary.mark(3, Class::Mixed);
        map.count += 1;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "3: bits past")]
    fn invariant_3_the_last_word_said_to_be_full() {
        let mut map = map();
        map.summary.mark(3, Class::Full);
        map.count += 64;
        map.check_invariants();
    }

    #[test]
    #[should_panic(expected = "4: count")]
    fn invariant_4_a_granule_not_counted() {
        let mut map = map();
        map.count -= 1;
        map.check_invariants();
    }

    /// Words whose blocks are uniform, and so are those in the same page of memory.
    const UNIFORM: std::ops::Range<usize> = word::PAGE..2 * word::PAGE;
    /// Granules of three pages of words.
    const WIDE: u64 = 3 * 64 * word::PAGE as u64;

    /// Three pages, of which the first and the last have a mixed word each.
    fn wide() -> HBitmap {
        let mut map = HBitmap::new(WIDE, Granularity::from_bytes(1).unwrap()).unwrap();
        map.set(5..6).unwrap();
        map.set(WIDE - 7..WIDE - 6).unwrap();
        map
    }

    fn what_is_filled_is_not_written() {
        let mut map = wide();
        map.set_all();
        assert!(map.words[UNIFORM].iter().all(|word| *word == 0), "written");
        map.check_invariants();
        let mut map = wide();
        map.set(100..WIDE - 100).unwrap();
        assert!(map.words[UNIFORM].iter().all(|word| *word == 0), "written");
        map.check_invariants();
    }

    #[test]
    fn invariant_10_what_is_filled_is_not_written() {
        what_is_filled_is_not_written();
        #[cfg(debug_assertions)]
        {
            use crate::sabotage::break_on_this_thread;
            break_on_this_thread(Some(Sabotage::WriteFull));
            let found = std::panic::catch_unwind(what_is_filled_is_not_written);
            break_on_this_thread(None);
            assert!(found.is_err(), "goes unnoticed");
        }
    }

    /// Words of a uniform block that hold what nobody may ever see.
    #[test]
    fn invariant_10_what_is_uniform_is_not_read() {
        for is_full in [false, true] {
            let mut map = wide();
            if is_full {
                map.set(WIDE / 3..WIDE / 3 * 2).unwrap();
            }
            let sound = map.clone();
            let words = &mut map.words[UNIFORM];
            words.iter_mut().step_by(3).for_each(|word| *word = 0xabcd);

            // In one go: a step of a search looks at the word that it comes to.
            let runs = |map: &HBitmap| {
                let mut runs = Vec::new();
                map.runs().for_each(|run| runs.push(run));
                runs
            };
            assert!(map.iter().eq(&sound));
            assert_eq!(runs(&map), runs(&sound));
            assert_eq!(map, sound);
            assert_eq!(map.clone().words, sound.words);
            let mut some = vec![7; map.word_count()];
            let mut expected = some.clone();
            map.export_words(0, &mut some).unwrap();
            sound.export_words(0, &mut expected).unwrap();
            assert_eq!(some, expected);
            let mut merged = wide();
            merged.merge_from(&map).unwrap();
            assert_eq!(merged, sound);
            let mut rest = sound.clone();
            rest.subtract(&map).unwrap();
            assert!(rest.is_clean());
        }
    }

    #[test]
    fn a_full_word_may_be_written_or_not() {
        let mut written = map();
        let mut untouched = map();
        written.set(130..131).unwrap();
        for map in [&mut written, &mut untouched] {
            map.set(70..200).unwrap();
            map.check_invariants();
        }
        assert_ne!(written.words, untouched.words);
        assert_eq!(written, untouched);
        assert_eq!(written.clone(), untouched);
        for map in [&mut written, &mut untouched] {
            map.reset(150..151).unwrap();
            map.check_invariants();
        }
        assert_eq!(written.words, untouched.words);
    }
}
