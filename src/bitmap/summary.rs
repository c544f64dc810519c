//! What is known of the words below without reading them: whether they are empty, full, or mixed.
//!
//! ```text
//! upper[0]   pair 0  mixed 1 0 0…           full 0 1 0…       of 64 pairs each
//!                          │ └── none of 64 pairs: empty            │
//!                          ▼                                        ▼
//! lowest     pair 0  mixed 0 1 1 0…         full 1 0 0 0…     pair 1  full 1 1 1…
//!                                                │            of 64 words each
//! words               0  01… 1…  0               └─ full although it is 0: nobody had to write it
//! ```
//!
//! A pair has two bits for each of 64 children, at most one of which is 1. A child is *full* if all that
//! it can ever hold is 1, so one that would reach past the end of the map is never full. What a pair
//! says of its children follows from the children alone, on every level; only a word at the bottom may
//! be 0 although it is full.

use std::ops::Range;

use super::word::{Cut, bit, bits_from, lowest, word_of, words_for};
use crate::memory::{self, OutOfMemory};

/// What a word, or all that a pair stands for, holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// No bit.
    Empty,
    /// Some bits.
    Mixed,
    /// Every bit.
    Full,
}

impl Class {
    /// The class of a word.
    #[inline]
    pub(super) const fn of(word: u64) -> Self {
        match word {
            0 => Class::Empty,
            u64::MAX => Class::Full,
            _ => Class::Mixed,
        }
    }

    /// A word that is all dirty, or all clean.
    #[inline]
    pub(super) const fn filled_word<const DIRTY: bool>() -> u64 {
        if DIRTY { !0 } else { 0 }
    }

    /// The class of what is all dirty, or all clean.
    #[inline]
    pub(super) const fn filled<const DIRTY: bool>() -> Self {
        if DIRTY { Class::Full } else { Class::Empty }
    }
}

/// What 64 children hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// Children with some bits.
    pub(super) mixed: u64,
    /// Children with all bits.
    pub(super) full: u64,
}

impl Pair {
    /// Children with at least one bit.
    #[inline]
    pub(super) const fn any(self) -> u64 {
        self.mixed | self.full
    }

    /// Children that lack a bit.
    #[inline]
    pub(super) const fn lacking(self) -> u64 {
        !self.full
    }

    /// Whether all 64 children are empty, or all full.
    #[inline]
    const fn is_uniform(self) -> bool {
        (self.full == !0) | (self.any() == 0)
    }

    /// The class of all 64 children together.
    #[inline]
    pub(super) const fn class(self) -> Class {
        if self.full == !0 {
            Class::Full
        } else if self.any() == 0 {
            Class::Empty
        } else {
            Class::Mixed
        }
    }

    /// All ones if a word of the block is full, else 0: with it a word is known that was not written.
    #[inline]
    pub(super) const fn filling(self, word: usize) -> u64 {
        (self.full >> (word % 64) & 1).wrapping_neg()
    }

    /// With one word of the block in the class of what it holds now.
    #[inline]
    pub(super) const fn with_word(self, word: usize, holds: u64) -> Self {
        let at = word % 64;
        let is_full = holds == !0;
        let is_mixed = holds != 0 && !is_full;
        Self {
            mixed: self.mixed & !(1 << at) | (is_mixed as u64) << at,
            full: self.full & !(1 << at) | (is_full as u64) << at,
        }
    }

    /// With `children` in another class.
    #[inline]
    pub(super) const fn with(self, children: u64, class: Class) -> Self {
        let rest = Self {
            mixed: self.mixed & !children,
            full: self.full & !children,
        };
        match class {
            Class::Empty => rest,
            Class::Mixed => Self {
                mixed: rest.mixed | children,
                ..rest
            },
            Class::Full => Self {
                full: rest.full | children,
                ..rest
            },
        }
    }
}

/// How a [`Pair`] is stored: as numbers, so that a level can be zeroed memory that nobody touched.
type Stored = [u64; 2];

impl From<Stored> for Pair {
    #[inline]
    fn from([mixed, full]: Stored) -> Self {
        Self { mixed, full }
    }
}

impl From<Pair> for Stored {
    #[inline]
    fn from(pair: Pair) -> Self {
        [pair.mixed, pair.full]
    }
}

/// The pair of 64 words, changed in place. Its two words are read and written one by one: read as one, soon after they
/// were written, they would be waited for.
pub(super) struct BlockMut<'a>(&'a mut Stored);

impl BlockMut<'_> {
    /// What they hold.
    #[inline]
    pub(super) const fn get(&self) -> Pair {
        Pair {
            mixed: self.0[0],
            full: self.0[1],
        }
    }

    /// Makes words of the block, none of which is full, mixed ones. It is known what it was.
    #[inline]
    pub(super) const fn mix_lacking(self, words: u64, before: Pair) {
        self.0[0] = before.mixed | words;
    }

    /// Makes words of the block, whatever they are, mixed ones.
    #[inline]
    pub(super) const fn mix(self, words: u64, before: Pair) {
        self.0[0] = before.mixed | words;
        self.0[1] = before.full & !words;
    }
}

/// All pairs of a map, on as many levels as it takes to come to one.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    /// One for 64 words each. Empty in a map without memory.
    lowest: Vec<Stored>,
    /// The levels above, up to the one with a single pair.
    upper: Vec<Vec<Stored>>,
}

impl Summary {
    /// That of so many empty words, at least one.
    pub(super) fn new(words: u64) -> Result<Self, OutOfMemory> {
        let mut levels = level_lens(words).map(memory::zeroed);
        let lowest = levels.next().expect("there is a lowest level")?;
        // Collected, they could not be told no.
        let mut upper = Vec::new();
        let reserved = upper.try_reserve_exact(level_lens(words).count() - 1);
        reserved.map_err(|_| OutOfMemory)?;
        for level in levels {
            upper.push(level?);
        }
        Ok(Self { lowest, upper })
    }

    /// As many pairs as fit of another summary, and empty ones for the rest.
    pub(super) fn take_over(&mut self, other: &Self) {
        let both = self.lowest.len().min(other.lowest.len());
        self.lowest[..both].copy_from_slice(&other.lowest[..both]);
        self.rebuild();
    }

    /// Stores what 64 words hold. Nobody is told: [`rebuild`](Self::rebuild) follows.
    #[inline]
    pub(super) fn put(&mut self, block: usize, pair: Pair) {
        self.lowest[block] = pair.into();
    }

    /// Whether of each so many blocks one has a mixed word.
    pub(super) fn is_mixed_in_each(&self, blocks: usize) -> bool {
        let mut pages = self.lowest.chunks(blocks);
        pages.all(|page| page.iter().any(|pair| pair[0] != 0))
    }

    /// Computes the upper levels from the lowest.
    pub(super) fn rebuild(&mut self) {
        let mut below = &self.lowest;
        for level in &mut self.upper {
            for (above, children) in level.iter_mut().zip(below.chunks(64)) {
                *above = [0, 0];
                for (child, pair) in children.iter().enumerate() {
                    let class = Pair::from(*pair).class();
                    *above = Pair::from(*above).with(bit(child as u64), class).into();
                }
            }
            below = level;
        }
    }

    /// Number of pairs of the lowest level.
    #[inline]
    pub(super) fn block_count(&self) -> usize {
        self.lowest.len()
    }

    /// What is known of 64 words; nothing is there in a map without memory, or past the end.
    #[inline]
    pub(super) fn block(&self, block: usize) -> Option<Pair> {
        self.lowest.get(block).copied().map(Pair::from)
    }

    /// What a word holds. All are empty in a map without memory.
    #[inline]
    pub(super) fn class_of(&self, word: usize) -> Class {
        let Some(pair) = self.block(word / 64) else {
            return Class::Empty;
        };
        if pair.mixed & bit(word as u64) != 0 {
            Class::Mixed
        } else if pair.full & bit(word as u64) != 0 {
            Class::Full
        } else {
            Class::Empty
        }
    }

    /// Stores what 64 words hold, and tells those above if that is of another class.
    #[inline]
    pub(super) fn set_block(&mut self, block: usize, pair: Pair) {
        let before = Pair::from(self.lowest[block]).class();
        self.lowest[block] = pair.into();
        if pair.class() != before {
            self.tell(1, block, pair.class());
        }
    }

    /// The same where it is known what they held, and that is another pair.
    #[inline]
    pub(super) fn change_block(&mut self, block: usize, before: Pair, after: Pair) {
        self.lowest[block] = after.into();
        if before.is_uniform() | after.is_uniform() && after.class() != before.class() {
            self.tell(1, block, after.class());
        }
    }

    /// One word is of another class now than it was.
    #[inline]
    pub(super) fn mark(&mut self, word: usize, class: Class) {
        let stored = &mut self.lowest[word / 64];
        let before = Pair::from(*stored);
        let after = before.with(bit(word as u64), class);
        *stored = after.into();
        // A block that was mixed and still is tells nobody. One that is uniform before or after has changed
        // its class, as no single word takes it from empty to full.
        if before.is_uniform() || after.is_uniform() {
            self.tell(1, word / 64, after.class());
        }
    }

    /// What is known of 64 words, to be changed in place; nothing in a map without memory. As long as one of them
    /// is mixed, nobody above has to learn of what else they are.
    #[inline]
    pub(super) fn block_mut(&mut self, block: usize) -> Option<BlockMut<'_>> {
        self.lowest.get_mut(block).map(BlockMut)
    }

    /// A block has a mixed word now, and had none: those above it that had none either learn of it.
    #[inline]
    pub(super) fn mix_above(&mut self, block: usize) {
        self.tell_mixed(1, block);
    }

    /// All of these blocks, of which there must be one, are of one class now: empty or full.
    pub(super) fn mark_blocks(&mut self, blocks: Range<usize>, class: Class) {
        let whole = Pair { mixed: 0, full: 0 }.with(!0, class);
        self.lowest[blocks.clone()].fill(whole.into());
        self.tell_run(blocks, class);
    }

    /// All of these blocks are of one class now.
    fn tell_run(&mut self, blocks: Range<usize>, class: Class) {
        let mut run = blocks;
        for height in 1..=self.upper.len() {
            let Cut { head, body, tail } = Cut::of(&(run.start as u64..run.end as u64));
            for (index, children) in [head, tail] {
                let pair = &mut self.upper[height - 1][index];
                let before = Pair::from(*pair);
                let after = before.with(children, class);
                *pair = after.into();
                if after.class() != before.class() {
                    self.tell(height + 1, index, after.class());
                }
            }
            if body.is_empty() {
                return;
            }
            let whole = Pair { mixed: 0, full: 0 }.with(!0, class);
            self.upper[height - 1][body.clone()].fill(whole.into());
            run = body;
        }
    }

    /// The first word at or after `from` that is not empty.
    #[inline(never)]
    pub(super) fn next_any(&self, from: usize) -> Option<usize> {
        self.next(from, Pair::any)
    }

    /// The first word at or after `from` that is not full.
    #[inline(never)]
    pub(super) fn next_lacking(&self, from: usize) -> Option<usize> {
        self.next(from, Pair::lacking)
    }

    /// The blocks from `first` on that are not empty.
    #[inline]
    pub(super) fn blocks_from(&self, first: usize) -> Blocks<'_> {
        let group = first / 64;
        Blocks {
            summary: self,
            group,
            rest: self.group(group) & bits_from(first as u64),
        }
    }

    /// Which of 64 neighbouring blocks are not empty.
    #[inline]
    fn group(&self, group: usize) -> u64 {
        match self.upper.first() {
            Some(level) => level.get(group).map_or(0, |pair| Pair::from(*pair).any()),
            // There is one block, or none.
            None => u64::from(group == 0 && self.block(0).is_some_and(|pair| pair.any() != 0)),
        }
    }

    /// The first word at or after `from` that `pick` has in its pair, and in all above.
    #[inline]
    fn next(&self, from: usize, pick: impl Fn(Pair) -> u64) -> Option<usize> {
        self.next_above(0, from, pick)
    }

    /// The same for children of the pairs of another level.
    #[inline]
    fn next_above(
        &self,
        lowest_height: usize,
        from: usize,
        pick: impl Fn(Pair) -> u64,
    ) -> Option<usize> {
        let mut index = from as u64;
        let mut height = lowest_height;
        // Up, while there is nothing to the right below the same pair.
        let mut found = loop {
            let at = word_of(index);
            let bits = pick((*self.level(height)?.get(at)?).into()) & bits_from(index);
            if bits != 0 {
                break lowest(at, bits) as usize;
            }
            index = at as u64 + 1;
            height += 1;
        };
        // Down to the first. A child past the end is not full either, but not there.
        for height in (lowest_height..height).rev() {
            let pair = *self.level(height)?.get(found)?;
            found = lowest(found, pick(pair.into())) as usize;
        }
        Some(found)
    }

    /// One child of a pair on level `height`, above the lowest, is of another class now; and so on up.
    #[inline]
    fn tell(&mut self, height: usize, child: usize, class: Class) {
        match class {
            Class::Mixed => self.tell_mixed(height, child),
            class => self.tell_uniform(height, child, class),
        }
    }

    /// It is mixed now.
    #[inline(never)]
    fn tell_mixed(&mut self, height: usize, child: usize) {
        let mut child = child as u64;
        for level in self.upper.iter_mut().skip(height - 1) {
            let stored = &mut level[word_of(child)];
            // A pair that had another mixed child is known to be mixed.
            let was_mixed = stored[0] != 0;
            stored[0] |= bit(child);
            stored[1] &= !bit(child);
            if was_mixed {
                return;
            }
            child /= 64;
        }
    }

    /// It is empty, or full, now.
    #[inline(never)]
    fn tell_uniform(&mut self, height: usize, child: usize, class: Class) {
        let (mut child, mut class) = (child, class);
        for level in self.upper.iter_mut().skip(height - 1) {
            let index = word_of(child as u64);
            let before = Pair::from(level[index]);
            let after = before.with(bit(child as u64), class);
            level[index] = after.into();
            if after.class() == before.class() {
                return;
            }
            (child, class) = (index, after.class());
        }
    }

    #[inline]
    fn level(&self, height: usize) -> Option<&[Stored]> {
        match height {
            0 => Some(&self.lowest),
            _ => self.upper.get(height - 1).map(Vec::as_slice),
        }
    }

    /// Panics unless the pairs say what `words` has, and each other. For tests.
    pub(super) fn check(&self, words: &[u64]) {
        let lens = std::iter::once(&self.lowest).chain(&self.upper);
        let expected = level_lens(words.len() as u64);
        assert!(
            lens.map(|level| level.len() as u64).eq(expected),
            "1: shape of the levels"
        );
        for (block, words) in words.chunks(64).enumerate() {
            let pair = Pair::from(self.lowest[block]);
            assert_eq!(
                pair.mixed & pair.full,
                0,
                "2: mixed and full in block {block}"
            );
            let there = !0 >> (64 - words.len());
            assert_eq!(
                pair.any() & !there,
                0,
                "2: words of block {block} that are not there"
            );
            for (at, word) in words.iter().enumerate() {
                let told = [pair.mixed, pair.full].map(|children| children & bit(at as u64) != 0);
                let is_so = match Class::of(*word) {
                    Class::Empty => [[false, false], [false, true]].contains(&told),
                    Class::Mixed => told == [true, false],
                    Class::Full => told == [false, true],
                };
                assert!(
                    is_so,
                    "2: word {at} of block {block} is not what is told of it"
                );
            }
        }
        let mut rebuilt = self.clone();
        rebuilt.rebuild();
        assert_eq!(rebuilt.upper, self.upper, "2: what upper levels say");
    }
}

/// Bytes of memory that a map takes for so many granules, when it takes some.
pub(super) fn memory_for(granules: u64) -> u64 {
    let words = words_for(granules);
    words * 8 + level_lens(words).sum::<u64>() * size_of::<Stored>() as u64
}

/// Blocks of 64 words that are not empty, ascending, with what is known of them.
#[derive(Clone, Debug)]
pub(super) struct Blocks<'a> {
    summary: &'a Summary,
    /// 64 blocks, of which `rest` are to come.
    group: usize,
    rest: u64,
}

impl Iterator for Blocks<'_> {
    type Item = (usize, Pair);

    // What it gives goes through memory where it is called, in three words, and is waited for where it is read as two.
    #[inline(always)]
    fn next(&mut self) -> Option<(usize, Pair)> {
        if self.rest == 0 {
            let next = self.group + 1;
            if self.summary.group(next) == 0 {
                // Children of the pairs two levels up are groups.
                self.group = self.summary.next_above(2, next, Pair::any)?;
            } else {
                self.group = next;
            }
            self.rest = self.summary.group(self.group);
        }
        let block = lowest(self.group, self.rest) as usize;
        self.rest &= self.rest - 1;
        Some((block, self.summary.block(block)?))
    }
}

/// How many pairs each level has above so many words.
fn level_lens(words: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(words_for(words)), |below| {
        (*below > 1).then(|| words_for(*below))
    })
}

/// Breaks what the levels say in turn and sees to it that the check notices.
#[cfg(test)]
mod sabotage {
    use super::*;

    /// 100 words, of which the first is mixed and the third full.
    fn summary() -> (Summary, Vec<u64>) {
        let mut words = vec![0; 100];
        words[0] = 5;
        let mut summary = Summary::new(100).unwrap();
        summary.mark(0, Class::Mixed);
        summary.mark(2, Class::Full);
        summary.check(&words);
        (summary, words)
    }

    #[test]
    #[should_panic(expected = "1: shape")]
    fn invariant_1_a_pair_too_many() {
        let (mut summary, words) = summary();
        summary.lowest.push([0, 0]);
        summary.check(&words);
    }

    #[test]
    #[should_panic(expected = "1: shape")]
    fn invariant_1_a_level_too_many() {
        let (mut summary, words) = summary();
        summary.upper.push(vec![[0, 0]]);
        summary.check(&words);
    }

    #[test]
    #[should_panic(expected = "2: mixed and full")]
    fn invariant_2_both_mixed_and_full() {
        let (mut summary, words) = summary();
        summary.lowest[0][1] |= 1;
        summary.check(&words);
    }

    #[test]
    #[should_panic(expected = "2: word 1 of block 0")]
    fn invariant_2_an_empty_word_said_to_be_mixed() {
        let (mut summary, words) = summary();
        summary.lowest[0][0] |= 2;
        summary.check(&words);
    }

    #[test]
    #[should_panic(expected = "2: words of block 1")]
    fn invariant_2_a_word_that_is_not_there() {
        let (mut summary, words) = summary();
        summary.lowest[1][1] |= 1 << 40;
        summary.check(&words);
    }

    #[test]
    #[should_panic(expected = "2: what upper")]
    fn invariant_2_a_block_hidden_from_searches() {
        let (mut summary, words) = summary();
        summary.upper[0][0] = [0, 0];
        summary.check(&words);
    }

    #[test]
    fn levels_shrink_to_one_pair() {
        let lens = |words| level_lens(words).collect::<Vec<_>>();
        assert_eq!(lens(1), [1]);
        assert_eq!(lens(64), [1]);
        assert_eq!(lens(65), [2, 1]);
        assert_eq!(lens(64 * 64 + 1), [65, 2, 1]);
        assert_eq!(lens(1 << 35).len(), 6);
    }
}
