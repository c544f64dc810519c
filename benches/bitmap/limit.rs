//! A flat map with loops as fast as they come in safe Rust: what is below no map's time, as long as it
//! has to look at every word.
//!
//! It does what the bench asks of all of them and what [`HBitmap`](blockjob::HBitmap) promises beyond:
//! it knows how many bits are set, and says whether a call changed one. It has no summary, so where
//! little is dirty a map that has one is faster.

use std::ops::Range;

use multiversion::multiversion;

use super::maps::Runs;

#[derive(Clone, PartialEq)]
pub(crate) struct Flat {
    count: u64,
    pub(crate) words: Vec<u64>,
}

impl Flat {
    pub(crate) fn new(granules: u64) -> Self {
        Self::from_words(vec![0; (granules / 64) as usize], 0)
    }

    pub(crate) fn from_words(words: Vec<u64>, count: u64) -> Self {
        Self { count, words }
    }

    #[inline]
    pub(crate) fn set(&mut self, granule: u64) -> bool {
        let word = &mut self.words[(granule / 64) as usize];
        let bit = 1 << (granule % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(is_new);
        is_new
    }

    #[inline]
    pub(crate) fn reset(&mut self, granule: u64) -> bool {
        let word = &mut self.words[(granule / 64) as usize];
        let bit = 1 << (granule % 64);
        let was_set = *word & bit != 0;
        *word &= !bit;
        self.count -= u64::from(was_set);
        was_set
    }

    #[inline]
    pub(crate) fn set_range(&mut self, granules: Range<u64>) -> bool {
        let added = fill(&mut self.words, granules);
        self.count += added;
        added > 0
    }

    #[inline]
    pub(crate) fn reset_range(&mut self, granules: Range<u64>) -> bool {
        let removed = clear(&mut self.words, granules);
        self.count -= removed;
        removed > 0
    }

    pub(crate) fn sum_bits(&self) -> u64 {
        sum_bits(&self.words)
    }

    pub(crate) fn runs(&self) -> Runs {
        runs(&self.words)
    }

    pub(crate) fn merge(&mut self, other: &Self) -> bool {
        let added = merge(&mut self.words, &other.words);
        self.count += added;
        added > 0
    }

    pub(crate) fn merge_finer(&mut self, other: &Self) -> bool {
        let added = merge_finer(&mut self.words, &other.words);
        self.count += added;
        added > 0
    }
}

/// The first word of a range and the last, and which bits of them are in it. One word for both if it
/// is in one.
#[inline(always)]
fn ends(granules: &Range<u64>) -> ((usize, u64), (usize, u64)) {
    let (first, last) = (granules.start, granules.end - 1);
    let head = u64::MAX << (first % 64);
    let tail = u64::MAX >> (63 - last % 64);
    (((first / 64) as usize, head), ((last / 64) as usize, tail))
}

/// Sets bits, and says how many were not.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn fill(words: &mut [u64], granules: Range<u64>) -> u64 {
    let ((first, head), (last, tail)) = ends(&granules);
    if first == last {
        let (word, mask) = (&mut words[first], head & tail);
        let added = mask & !*word;
        *word |= mask;
        return u64::from(added.count_ones());
    }
    let words = &mut words[first..=last];
    let [first, body @ .., last] = words else {
        unreachable!("two words at least");
    };
    let mut added = u64::from((head & !*first).count_ones() + (tail & !*last).count_ones());
    *first |= head;
    *last |= tail;
    for word in body {
        added += u64::from(word.count_zeros());
        *word = !0;
    }
    added
}

/// Resets bits, and says how many were set.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn clear(words: &mut [u64], granules: Range<u64>) -> u64 {
    let ((first, head), (last, tail)) = ends(&granules);
    if first == last {
        let (word, mask) = (&mut words[first], head & tail);
        let removed = mask & *word;
        *word &= !mask;
        return u64::from(removed.count_ones());
    }
    let words = &mut words[first..=last];
    let [first, body @ .., last] = words else {
        unreachable!("two words at least");
    };
    let mut removed = u64::from((head & *first).count_ones() + (tail & *last).count_ones());
    *first &= !head;
    *last &= !tail;
    for word in body {
        removed += u64::from(word.count_ones());
        *word = 0;
    }
    removed
}

/// Words that are looked at together, so that nothing is done for those that are all clean. With fewer
/// the looks cost more than they save where half is dirty, with more there are fewer to skip.
const BLOCK: usize = 32;

/// Whether all words of a block are `word`.
#[inline(always)]
fn is_all(block: &[u64], word: u64) -> bool {
    block.iter().fold(0, |all, other| all | (other ^ word)) == 0
}

#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn sum_bits(words: &[u64]) -> u64 {
    let mut sum = 0_u64;
    let mut first = 0;
    let mut take = |bit: u64| sum = sum.wrapping_add(bit);
    for block in words.chunks_exact(BLOCK) {
        if is_all(block, 0) {
            first += 64 * BLOCK as u64;
            continue;
        }
        for (index, word) in block.iter().enumerate() {
            let first = first + 64 * index as u64;
            let mut bits = *word;
            if bits == 0 {
                continue;
            }
            if bits == !0 {
                (first..first + 64).for_each(&mut take);
                continue;
            }
            // A loop whose length is known for a while is unrolled.
            for _ in 0..bits.count_ones() / 8 {
                for _ in 0..8 {
                    take(first + u64::from(bits.trailing_zeros()));
                    bits &= bits.wrapping_sub(1);
                }
            }
            while bits != 0 {
                take(first + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
        first += 64 * BLOCK as u64;
    }
    sum
}

#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn runs(words: &[u64]) -> Runs {
    let mut runs = Runs::default();
    // The word before, and where the run began that goes on at its end.
    let (mut before, mut start) = (0_u64, 0);
    let mut first = 0;
    for block in words.chunks_exact(BLOCK) {
        if is_all(block, 0_u64.wrapping_sub(before >> 63)) {
            first += 64 * BLOCK as u64;
            continue;
        }
        for word in block {
            let shifted = (word << 1) | (before >> 63);
            let (mut starts, mut ends) = (word & !shifted, !word & shifted);
            if before >> 63 == 1 && ends != 0 {
                runs = runs.and(start..first + u64::from(ends.trailing_zeros()));
                ends &= ends - 1;
            }
            before = *word;
            while ends != 0 {
                start = first + u64::from(starts.trailing_zeros());
                runs = runs.and(start..first + u64::from(ends.trailing_zeros()));
                starts &= starts - 1;
                ends &= ends - 1;
            }
            if starts != 0 {
                start = first + u64::from(starts.trailing_zeros());
            }
            first += 64;
        }
    }
    if before >> 63 == 1 {
        runs = runs.and(start..first);
    }
    runs
}

#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn merge(into: &mut [u64], from: &[u64]) -> u64 {
    let mut added = 0;
    for (into, from) in into.chunks_exact_mut(BLOCK).zip(from.chunks_exact(BLOCK)) {
        if is_all(from, 0) {
            continue;
        }
        // To store only where something changes takes longer.
        for (into, from) in into.iter_mut().zip(from) {
            added += u64::from((from & !*into).count_ones());
            *into |= from;
        }
    }
    added
}

#[multiversion(targets("x86_64+avx2+bmi1+bmi2+popcnt"))]
fn merge_finer(into: &mut [u64], from: &[u64]) -> u64 {
    const HIGH: u64 = 0x8000_8000_8000_8000;
    let mut added = 0;
    for (into, from) in into.iter_mut().zip(from.chunks_exact(16)) {
        // Four words at a time, the bits of which lie 16 apart at first: those of the first word in
        // the lowest of each 16, those of the second four bits above.
        let mut spread = [0; 4];
        for index in 0..4 {
            for (four, spread) in spread.iter_mut().enumerate() {
                let word = from[4 * four + index];
                let any = (((word & !HIGH) + !HIGH) | word) & HIGH;
                *spread |= (any >> 15) << (4 * index);
            }
        }
        let mut coarse = 0;
        for (four, spread) in spread.into_iter().enumerate() {
            let folded = spread | (spread >> 30);
            coarse |= ((folded | (folded >> 15)) & 0xffff) << (16 * four);
        }
        added += u64::from((coarse & !*into).count_ones());
        *into |= coarse;
    }
    added
}
