//! What guest writes touched since somebody last asked: marked by any number of threads without a
//! lock, drained into bitmaps by whoever needs to know.
//!
//! ```text
//!  level 2 │1 0 0 …│                                one word at the top: zero says clean
//!           │                                            ▲ mark goes up: leaf bit,
//!           ▼ bit i: row i below may hold something      │ then each summary bit above it
//!  level 1 │0 1 0 …│0 0 0 …│ …                           │
//!             │                                          │ drain goes down: clear a summary,
//!             ▼                                          ▼ look at what is below it, swap it out; fence
//!  leaf    │0 0 0 …│0 1 1 …│0 0 0 …│ …│  │ …             one bit per granule, 64 bits per word, 8 words a row
//!          └─────────── row 0 ────────┘
//! ```
//!
//! A summary bit stands for a row of eight words, which is as much memory as processors fetch at once. So there are few
//! levels, and of the marks of a row only the first writes above it.
//!
//! # Invariants
//!
//! What every mark and every drain must keep to:
//!
//! 1. A mark that leaves a leaf word as it is has looked at it after a sequentially consistent fence. (One that writes to
//!    all of its leaf words needs no fence: what it writes goes with what was written before it.)
//! 2. A mark sets the leaf bit first, then the summary bit above it, and so on to the top.
//! 3. A mark looks at every level, also when it found the bit below set.
//! 4. A drain clears a summary bit first and looks at the words below it afterwards.
//! 5. Words change by read-modify-write only. That, and each look that something is left out for, is
//!    sequentially consistent.
//! 6. A drain ends with a sequentially consistent fence. Data is read after it.
//! 7. Whoever waits for a mark arms the wake-up, passes such a fence, and looks at the top. A mark that has
//!    set a bit, and a drain that gives back what it took, looks at the wake-up after that, both
//!    sequentially consistent.
//!
//! What follows from them, and what [`DirtyLog::check_invariants`] looks at while nobody marks or
//! drains: above every word that is not zero there is a path of set bits to the top (a set bit above
//! a row that is zero may be left over, and costs one look); no bit past the last granule is set.
//!
//! # Why nothing is lost
//!
//! The promise: when a mark has returned, a drain that comes after it hands out its granules, unless
//! a drain already did which then reads the data that was marked.
//!
//! *The bit is found.* A drain clears a summary bit and then looks at the words below (4). A mark sets its bit in one of
//! them, or finds it set by another mark, and then looks at the summary (2, 3). All four are in one order (5). Either
//! the drain's look comes after the bit was set: then it sees the bit, and swaps the word out. Or it comes before: then
//! so does the clearing, and the mark's look at the summary, which comes still later, sees the bit cleared and
//! sets it again. The same holds for a summary word and the one above it. Going up is what makes
//! this work: with the summary set first, a drain takes it, finds the leaf still empty, and the
//! leaf bit that is set next has nothing above it. So does looking at every level: the thread that set
//! the leaf bit may not have come to the summary yet, and the mark that found the bit set must not
//! return before somebody did.
//!
//! A drain need not swap words that are 0: that they are, is an answer that marks know of by the order of these four.
//!
//! *The data is seen.* A mark that writes to a leaf word comes before the swap that takes what it has written, and with it
//! all that was done before the mark. But marks that find everything set only load, and a load orders nothing: the
//! guest's data may still be in the store buffer of its CPU when a drain takes the bit, and the drain's
//! owner reads the old data. Nobody marks again. The two fences (1, 6) exclude it: a mark whose load
//! comes before the drain's swap has its fence before the drain's fence, and what was written before
//! the first is read after the second. If the load comes after the swap, it finds the bit cleared. (Whether it is set is
//! looked at before the fence, too, which tells only whether it is worth one: a fence takes as long as a write.)
//!
//! *Two drains at once* are sound and lose nothing: a bit goes to the one whose swap took it. But one
//! may return before the other has handed out what it took, so whoever wants to know everything up to
//! now drains under a lock.
//!
//! *The waiting are woken.* Of two who each write and then look at what the other writes (7), one sees the
//! other. A mark that sets no bit need not look: another mark, which set what it found
//! set, looks after that, or a drain is about to take what both have marked.
//!
//! Nothing on this way is shared but the words themselves: no counter, and no write at all when all
//! bits are set already. So a guest that writes the same place again and again, from all its queues,
//! keeps the cache lines shared.

mod drain;
mod wake;

use std::fmt;
use std::ops::Range;
use std::task::{Poll, Waker};

use crate::memory;
use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::units::{ByteRange, Granularity};

pub use drain::DirtyWord;
use wake::WakeUp;

/// Bits of a word, as a power of two. Loom explores every interleaving, so its words and rows are tiny: with
/// two bits a word and two words a row, 32 granules have three levels.
const WORD_SHIFT: u32 = if cfg!(loom) { 1 } else { 6 };

/// Words of a row, as a power of two.
const ROW_SHIFT: u32 = if cfg!(loom) { 1 } else { 3 };

/// Bits of a word.
const WORD_BITS: u64 = 1 << WORD_SHIFT;

/// How a word is looked at, and written to: in the one order of invariant 5. Loom takes an access of that order for a
/// fence, which is more than it is: a rule that needs one were not missed. So it is given less, and a fence of its own
/// between a write and a look that must not change places.
const LOOK: Ordering = if cfg!(loom) {
    Ordering::Acquire
} else {
    Ordering::SeqCst
};
const WRITE: Ordering = if cfg!(loom) {
    Ordering::AcqRel
} else {
    Ordering::SeqCst
};

/// Longest disk: what fits an `i64`, as offsets of files do.
const LEN_MAX: u64 = i64::MAX as u64;

/// Most granules. On small machines the leaf words must fit the address space.
const GRANULES_MAX: u64 = if usize::BITS >= 64 { 1 << 41 } else { 1 << 33 };

/// Levels of a log of [`GRANULES_MAX`] granules.
const LEVELS_MAX: usize = 1 + GRANULES_MAX.ilog2().div_ceil(WORD_SHIFT + ROW_SHIFT) as usize;

/// A set of granules that any number of threads add to without a lock, and that is emptied by
/// draining.
///
/// Guest write paths share it and call [`mark`](Self::mark) when a write has settled. Whoever needs
/// to know what was written [drains](Self::drain) it, into as many bitmaps as are recording. Both
/// work through `&self`.
///
/// Memory is one bit per granule and an additional 1/511 for the summaries: 2 MiB for 1 TiB at 64 KiB.
/// Where the allocator hands out zero pages, those that no mark has touched cost nothing.
///
/// # Examples
///
/// A guest writes through two queues, then a job looks:
///
/// ```
/// use blockjob::{ByteRange, DirtyLog, Granularity};
///
/// let log = DirtyLog::new(1 << 40, Granularity::DEFAULT)?;
/// std::thread::scope(|queues| {
///     queues.spawn(|| log.mark((4096..8192).into()));
///     queues.spawn(|| log.mark((100_000..200_000).into()));
/// });
///
/// let mut dirty = Vec::new();
/// log.drain_ranges(|range| dirty.push(range));
/// assert_eq!(dirty, [ByteRange::from(0..4 * 65536)]);
/// assert!(log.is_clean());
/// # Ok::<(), blockjob::DirtyLogError>(())
/// ```
pub struct DirtyLog {
    /// Bytes of the disk.
    len: u64,
    granularity: Granularity,
    /// The words of all levels, those of the leaf level first.
    words: Box<[AtomicU64]>,
    /// Where in `words` each level begins; behind the last level, where it ends.
    starts: [usize; LEVELS_MAX + 1],
    /// Index of the level that has one word. Zero if the leaf level has.
    top: usize,
    /// Who wants to know of the next mark.
    wake_up: WakeUp,
    /// The invariant that a loom test wants to see missed.
    #[cfg(loom)]
    broken: Option<Rule>,
}

/// Why a [`DirtyLog`] cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// The disk is longer than 2^63 - 1 bytes.
    #[error("a disk of {len} bytes is too long for a dirty log")]
    TooLong {
        /// Bytes asked for.
        len: u64,
    },
    /// The disk has more granules than a log can hold: 2^41, or 2^33 where pointers have 32 bits.
    #[error("{granules} granules are too many for a dirty log; take a coarser granularity")]
    TooManyGranules {
        /// Granules of the disk.
        granules: u64,
    },
    /// The allocator has no memory for the bits.
    #[error("no memory for a dirty log of {granules} granules")]
    OutOfMemory {
        /// Granules of the disk.
        granules: u64,
    },
}

impl DirtyLog {
    /// A clean log for a disk of `len` bytes. A `len` of zero is legal.
    ///
    /// # Errors
    ///
    /// When `len` is above 2^63 - 1, or is more than 2^41 granules, both checked before memory is asked
    /// for; and when there is none.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{DirtyLog, DirtyLogError, Granularity};
    ///
    /// assert!(DirtyLog::new(0, Granularity::DEFAULT)?.is_clean());
    ///
    /// let bytewise = Granularity::from_bytes(1).unwrap();
    /// assert_eq!(
    ///     DirtyLog::new(1 << 50, bytewise).unwrap_err(),
    ///     DirtyLogError::TooManyGranules { granules: 1 << 50 },
    /// );
    /// # Ok::<(), DirtyLogError>(())
    /// ```
    pub fn new(len: u64, granularity: Granularity) -> Result<Self, DirtyLogError> {
        if len > LEN_MAX {
            return Err(DirtyLogError::TooLong { len });
        }
        let granules = granularity.granules_in(len);
        if granules > GRANULES_MAX {
            return Err(DirtyLogError::TooManyGranules { granules });
        }

        let mut starts = [0; LEVELS_MAX + 1];
        let mut top = 0;
        let mut words = words_for(granules).max(1);
        starts[1] = words as usize;
        while words > 1 {
            words = words_for(rows_for(words));
            top += 1;
            starts[top + 1] = starts[top] + words as usize;
        }

        Ok(Self {
            len,
            granularity,
            words: zeroed(starts[top + 1]).ok_or(DirtyLogError::OutOfMemory { granules })?,
            starts,
            top,
            wake_up: WakeUp::new(),
            #[cfg(loom)]
            broken: None,
        })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the disk has no byte, and so can never be dirty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that one bit stands for.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Marks every granule that `range` touches. What lies past the end of the disk is ignored.
    ///
    /// Call it when a guest write has settled, whatever its result: a failed write may have changed
    /// something too. Marking before would let a drain take the mark, and its owner read the disk,
    /// while the old data is still there.
    ///
    /// It waits for nobody, but for the moment it takes to fetch the waker of who waits in
    /// [`poll_dirty`](Self::poll_dirty), which it then calls. Data which the caller wrote to memory itself is not
    /// overtaken by the mark: it writes bits that are not set yet, and passes a full memory barrier before it
    /// believes that one is. A long range takes a step per 64 granules.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{ByteRange, DirtyLog, Granularity};
    ///
    /// let log = DirtyLog::new(100_000, Granularity::DEFAULT)?;
    /// log.mark((0..0).into());
    /// log.mark((100_000..200_000).into());
    /// assert!(log.is_clean(), "nothing, and nothing within the disk");
    ///
    /// log.mark((70_000..u64::MAX).into());
    /// let mut dirty = Vec::new();
    /// log.drain_ranges(|range| dirty.push(range));
    /// assert_eq!(dirty, [ByteRange::from(65536..100_000)]);
    /// # Ok::<(), blockjob::DirtyLogError>(())
    /// ```
    #[inline]
    pub fn mark(&self, range: ByteRange) {
        if range.is_empty() || range.end() > self.len {
            return self.mark_at_the_end(range);
        }
        let first = self.granularity.granule_of(range.start());
        let last = self.granularity.granule_of(range.end() - 1);
        let index = first >> WORD_SHIFT;
        let ones = u64::MAX >> (u64::from(u64::BITS) - 1 - (last - first) % WORD_BITS);
        let mask = ones << (first & (WORD_BITS - 1));
        if index != last >> WORD_SHIFT || !self.keeps_order() {
            return self.mark_words(first..last + 1);
        }
        let (words, starts) = (&*self.words, &self.starts[1..self.top + 1]);
        let leaf = &words[index as usize];
        let mut has_set = false;
        // Whether that is so, is only asked for what to do: the answer orders nothing.
        let mut is_set = !leaf.load(Ordering::Relaxed) & mask == 0;
        if is_set {
            if self.keeps(Rule::FenceBeforeLook) {
                fence(Ordering::SeqCst);
            }
            is_set = !leaf.load(self.order(LOOK)) & mask == 0;
        }
        if !is_set {
            leaf.fetch_or(mask, self.order(WRITE));
            has_set = true;
        }
        let mut row = index >> ROW_SHIFT;
        for start in starts {
            let bit = row & (WORD_BITS - 1);
            let word = &words[start + (row >> WORD_SHIFT) as usize];
            if self.look(word) >> bit & 1 == 0 {
                word.fetch_or(1 << bit, self.order(WRITE));
                has_set = true;
            }
            row >>= WORD_SHIFT + ROW_SHIFT;
        }
        if has_set {
            self.wake_up.marked();
        }
    }

    /// As [`mark`](Self::mark), for a range that ends past the disk, or is empty.
    #[cold]
    #[inline(never)]
    fn mark_at_the_end(&self, range: ByteRange) {
        let clipped = range.intersection((0..self.len).into());
        if !clipped.is_empty() {
            self.mark(clipped);
        }
    }

    /// As [`mark`](Self::mark), for granules of several words.
    #[inline(never)]
    fn mark_words(&self, granules: Range<u64>) {
        if self.keeps(Rule::FenceBeforeLook) {
            fence(Ordering::SeqCst);
        }
        self.set(0, granules);
    }

    /// Ready as soon as there is something to drain; until then the waker is called when there is. The
    /// waker of the last call counts, and is called once.
    ///
    /// It costs those who mark one load; and none where they find granules of one word marked already. What
    /// a drain gives back when its sink panics wakes like a mark.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::task::{Poll, Waker};
    /// use blockjob::{DirtyLog, Granularity};
    ///
    /// let log = DirtyLog::new(1 << 30, Granularity::DEFAULT)?;
    /// assert!(log.poll_dirty(Waker::noop()).is_pending());
    /// log.mark((0..512).into());
    /// assert_eq!(log.poll_dirty(Waker::noop()), Poll::Ready(()));
    /// # Ok::<(), blockjob::DirtyLogError>(())
    /// ```
    pub fn poll_dirty(&self, waker: &Waker) -> Poll<()> {
        if self.is_clean() {
            self.wake_up.arm(waker);
            // A mark that came before the arming has told nobody.
            if !self.keeps(Rule::LookAfterArming) || self.is_clean() {
                return Poll::Pending;
            }
            self.wake_up.disarm();
        }
        Poll::Ready(())
    }

    /// Whether there is nothing to drain. It looks at one word, however long the disk is.
    ///
    /// `true` says that every mark which happened before this call has been taken by a drain (which
    /// may still be handing it out, if it runs on another thread). `false` may be a false alarm when a
    /// mark met a drain; the next drain settles it.
    #[must_use]
    #[inline]
    pub fn is_clean(&self) -> bool {
        self.word(self.top, 0).load(Ordering::Acquire) == 0
    }

    /// Asserts what must hold while no mark and no drain is under way, in the order of the module's
    /// documentation.
    ///
    /// # Panics
    ///
    /// When one of the invariants does not hold.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        for level in 0..self.top {
            for index in 0..self.words_of(level) {
                let row = index >> ROW_SHIFT;
                let (parent, bit) = (row >> WORD_SHIFT, row & (WORD_BITS - 1));
                assert!(
                    self.word(level, index).load(Ordering::Relaxed) == 0
                        || self.word(level + 1, parent).load(Ordering::Relaxed) >> bit & 1 == 1,
                    "level {level} word {index} holds something that no drain finds",
                );
            }
        }
        let mut bits = self.granularity.granules_in(self.len);
        for level in 0..=self.top {
            let last = self.words_of(level) - 1;
            let beyond = mask(last, &(bits..u64::MAX));
            assert_eq!(
                self.word(level, last).load(Ordering::Relaxed) & beyond,
                0,
                "level {level} holds something past the end",
            );
            bits = rows_for(self.words_of(level));
        }
    }

    /// Sets `bits` of a level, and then what is above them, up to the top, and wakes who waits. All that
    /// marks do, and how a drain that cannot go on gives back what it took: who armed the wake-up while
    /// that was in its hands found nothing, and a mark of the same granules finds all set and tells nobody.
    #[inline(never)]
    fn set(&self, level: usize, bits: Range<u64>) {
        #[cfg(loom)]
        if self.set_breaking_a_rule(level, bits.clone()) {
            return;
        }
        let (mut first, mut last) = (bits.start, bits.end - 1);
        for level in level..=self.top {
            self.set_level(level, first..last + 1);
            first >>= WORD_SHIFT + ROW_SHIFT;
            last >>= WORD_SHIFT + ROW_SHIFT;
        }
        self.wake_up.marked();
    }

    /// Sets `bits` of one level, word by word, and writes only to words that lack some of them.
    #[inline]
    fn set_level(&self, level: usize, bits: Range<u64>) {
        let (first, last) = (bits.start >> WORD_SHIFT, (bits.end - 1) >> WORD_SHIFT);
        self.set_in_word(level, first, mask(first, &bits));
        if first == last {
            return;
        }
        for index in first + 1..last {
            self.set_in_word(level, index, u64::MAX >> (64 - WORD_BITS));
        }
        self.set_in_word(level, last, mask(last, &bits));
    }

    #[inline]
    fn set_in_word(&self, level: usize, index: u64, mask: u64) {
        let word = self.word(level, index);
        let has = match level {
            // Nothing of a level below was written before: what comes first here is the fence of rule 1, or loom would
            // not see that it is missing.
            0 => word.load(self.order(LOOK)),
            _ => self.look(word),
        };
        if has & mask != mask {
            if !self.keeps(Rule::ChangedAtOnce) {
                return word.store(has | mask, Ordering::Release);
            }
            word.fetch_or(mask, self.order(WRITE));
        }
    }

    /// What a word has, after all that this thread has done before (invariant 5).
    #[inline]
    fn look(&self, word: &AtomicU64) -> u64 {
        // See `LOOK`: what processors do for the load and the write before it, loom does for a fence between them.
        #[cfg(loom)]
        if self.keeps(Rule::OneOrder) {
            fence(Ordering::SeqCst);
        }
        word.load(self.order(LOOK))
    }

    #[inline]
    fn word(&self, level: usize, index: u64) -> &AtomicU64 {
        &self.words[self.starts[level] + index as usize]
    }

    /// How many words a level has.
    fn words_of(&self, level: usize) -> u64 {
        (self.starts[level + 1] - self.starts[level]) as u64
    }

    /// Whether `rule` is kept. Only loom tests ever break one, to see that they would notice.
    #[cfg(not(loom))]
    #[inline]
    const fn keeps(&self, _rule: Rule) -> bool {
        true
    }

    /// Whether a mark changes words, and goes through the levels, as it should.
    #[inline]
    fn keeps_order(&self) -> bool {
        self.keeps(Rule::LeafFirst)
            && self.keeps(Rule::EveryLevel)
            && self.keeps(Rule::ChangedAtOnce)
    }

    /// `kept`, unless a loom test breaks that rule.
    #[inline]
    fn order(&self, kept: Ordering) -> Ordering {
        if self.keeps(Rule::OneOrder) {
            kept
        } else {
            Ordering::Relaxed
        }
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog")
            .field("len", &self.len)
            .field("granularity", &self.granularity)
            .field("is_clean", &self.is_clean())
            .finish_non_exhaustive()
    }
}

/// Words that hold `bits` bits.
const fn words_for(bits: u64) -> u64 {
    bits.div_ceil(WORD_BITS)
}

/// Rows that hold so many words.
const fn rows_for(words: u64) -> u64 {
    words.div_ceil(1 << ROW_SHIFT)
}

/// Those of `bits` that lie in the word `index`, as bits of that word.
#[inline]
fn mask(index: u64, bits: &Range<u64>) -> u64 {
    let first = index << WORD_SHIFT;
    let start = bits.start.clamp(first, first + WORD_BITS) - first;
    let end = bits.end.clamp(first, first + WORD_BITS) - first;
    if start >= end {
        return 0;
    }
    (u64::MAX >> (64 - (end - start))) << start
}

/// Zeroed words. The detour makes the allocator provide the zeros, where storing them one by one would
/// touch every page; the conversion is in place and compiles to nothing, as long as the compiler sees all
/// of it at once: collected into a box right away, it becomes a call with a loop in it that does.
fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    let zeros: Vec<u64> = memory::zeroed(count as u64).ok()?;
    let words: Vec<AtomicU64> = zeros.into_iter().map(AtomicU64::new).collect();
    Some(words.into_boxed_slice())
}

/// The invariants of this module, in their order, for loom tests to break one by one.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(loom), expect(unreachable_pub, reason = "only loom tests name it"))]
pub enum Rule {
    /// Broken, a mark looks at leaf words without a fence before.
    FenceBeforeLook,
    /// Broken, a mark goes from the top down.
    LeafFirst,
    /// Broken, a mark returns when it finds its first leaf word as it wants it.
    EveryLevel,
    /// Broken, a drain clears a summary after it swapped out what is below.
    ClearedFirst,
    /// Broken, a mark reads a word, and then writes it.
    ChangedAtOnce,
    /// Broken, everything is relaxed.
    OneOrder,
    /// Broken, a drain ends without a fence.
    FenceAfterDrain,
    /// Broken, who waits does not look again once the wake-up is armed.
    LookAfterArming,
}

/// What only loom tests need.
#[cfg(loom)]
impl DirtyLog {
    /// The log with one invariant broken.
    #[doc(hidden)]
    #[must_use]
    pub fn breaking(self, rule: Rule) -> Self {
        Self {
            broken: Some(rule),
            ..self
        }
    }

    fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// Stands in for [`set`](Self::set) where the rule to break is about what it does.
    fn set_breaking_a_rule(&self, level: usize, bits: Range<u64>) -> bool {
        match self.broken {
            Some(Rule::LeafFirst) => {
                for level_above in (level..=self.top).rev() {
                    let shift = (WORD_SHIFT + ROW_SHIFT) * (level_above - level) as u32;
                    let last = (bits.end - 1) >> shift;
                    self.set_level(level_above, bits.start >> shift..last + 1);
                }
                true
            }
            Some(Rule::EveryLevel) => {
                let index = bits.start >> WORD_SHIFT;
                let mask = mask(index, &bits);
                self.word(level, index).load(Ordering::Acquire) & mask == mask
            }
            _ => false,
        }
    }
}
