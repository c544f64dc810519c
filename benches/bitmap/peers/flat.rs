//! Maps that have a word for 64 granules, and nothing above.

use std::ops::Range;

use bitvec::vec::BitVec;
use fixedbitset::FixedBitSet;

use super::{Peer, Stored};
use crate::limit::Flat;
use crate::maps::{Runs, dirty};

impl Peer for Flat {
    const NAME: &'static str = "limit";

    fn new(granules: u64) -> Self {
        Flat::new(granules)
    }

    fn from_words(words: &[u64]) -> Self {
        Flat::from_words(words.to_vec(), dirty(words).count() as u64)
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        Flat::set(self, granule)
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        Flat::reset(self, granule)
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        Flat::set_range(self, granules)
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        Flat::reset_range(self, granules)
    }

    fn sum_bits(&self) -> u64 {
        Flat::sum_bits(self)
    }

    fn runs(&self) -> Runs {
        Flat::runs(self)
    }

    fn merge(&mut self, other: &Self) -> bool {
        Flat::merge(self, other)
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        Flat::merge_finer(self, other)
    }
}

impl Stored for Flat {
    fn store(&self, bytes: &mut Vec<u8>) {
        store_words(&self.words, bytes);
    }

    fn load(bytes: &[u8]) -> Self {
        // Nobody counts: to copy the bytes is the least that can be done.
        Flat::from_words(loaded_words(bytes), 0)
    }
}

impl Peer for FixedBitSet {
    const NAME: &'static str = "fixedbitset";

    fn new(granules: u64) -> Self {
        FixedBitSet::with_capacity(granules as usize)
    }

    fn from_words(words: &[u64]) -> Self {
        let blocks = words.iter().map(|word| *word as usize);
        FixedBitSet::with_capacity_and_blocks(words.len() * 64, blocks)
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        self.insert(granule as usize);
        false
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        self.remove(granule as usize);
        false
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        self.insert_range(granules.start as usize..granules.end as usize);
        false
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        self.remove_range(granules.start as usize..granules.end as usize);
        false
    }

    fn sum_bits(&self) -> u64 {
        self.ones().fold(0, |sum, bit| sum.wrapping_add(bit as u64))
    }

    fn runs(&self) -> Runs {
        Runs::joining(self.ones().map(|bit| bit as u64))
    }

    fn merge(&mut self, other: &Self) -> bool {
        self.union_with(other);
        false
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        other.ones().for_each(|bit| self.insert(bit / 16));
        false
    }
}

impl Stored for FixedBitSet {
    fn store(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        let words = self.as_slice().iter();
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
    }

    fn load(bytes: &[u8]) -> Self {
        let words = bytes.chunks_exact(size_of::<usize>());
        let words = words.map(|word| usize::from_le_bytes(word.try_into().expect("its length")));
        FixedBitSet::with_capacity_and_blocks(bytes.len() * 8, words)
    }
}

impl Peer for BitVec<u64> {
    const NAME: &'static str = "bitvec";

    fn new(granules: u64) -> Self {
        BitVec::repeat(false, granules as usize)
    }

    fn from_words(words: &[u64]) -> Self {
        BitVec::from_slice(words)
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        self.as_mut_bitslice().set(granule as usize, true);
        false
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        self.as_mut_bitslice().set(granule as usize, false);
        false
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        self[granules.start as usize..granules.end as usize].fill(true);
        false
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        self[granules.start as usize..granules.end as usize].fill(false);
        false
    }

    fn sum_bits(&self) -> u64 {
        self.iter_ones()
            .fold(0, |sum, bit| sum.wrapping_add(bit as u64))
    }

    fn runs(&self) -> Runs {
        Runs::joining(self.iter_ones().map(|bit| bit as u64))
    }

    fn merge(&mut self, other: &Self) -> bool {
        *self |= other;
        false
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        other
            .iter_ones()
            .for_each(|bit| self.as_mut_bitslice().set(bit / 16, true));
        false
    }
}

impl Stored for BitVec<u64> {
    fn store(&self, bytes: &mut Vec<u8>) {
        store_words(self.as_raw_slice(), bytes);
    }

    fn load(bytes: &[u8]) -> Self {
        BitVec::from_vec(loaded_words(bytes))
    }
}

/// Compiles to a copy where bytes have this order anyway.
pub(crate) fn store_words(words: &[u64], bytes: &mut Vec<u8>) {
    bytes.resize(words.len() * 8, 0);
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

fn loaded_words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("its length")));
    words.collect()
}
