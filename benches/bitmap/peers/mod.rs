//! What is compared: each map by the calls that its own documentation would have one take, the fastest
//! where there are several.
//!
//! They do not promise the same. `fixedbitset`, `bitvec` and `croaring` are not asked whether a call
//! changed something, as that takes them longer, and `fixedbitset`, `bitvec` and `hibitset` do not know
//! how many bits are set.

use std::ops::Range;

use blockjob::{ByteRange, Granularity, HBitmap};
use hibitset::{BitSet, BitSetLike};

use super::maps::{Runs, dirty};

mod compressed;
mod flat;

/// One of the maps. Granules are counted; where a map is of bytes, a granule has [`GRANULE`] of them.
pub(crate) trait Peer: Clone + PartialEq {
    const NAME: &'static str;
    /// Most granules it can have.
    const GRANULES_MAX: u64 = u32::MAX as u64;

    fn new(granules: u64) -> Self;
    /// In the form that suits the content best.
    fn from_words(words: &[u64]) -> Self;
    /// The same where a granule is sixteen times as long.
    fn coarse_from_words(words: &[u64]) -> Self {
        Self::from_words(words)
    }

    /// Makes it as `other` is, which is as long, without giving memory back.
    fn restore(&mut self, other: &Self) {
        self.clone_from(other);
    }

    /// What positions count for each granule.
    fn unit(&self) -> u64 {
        1
    }

    fn set(&mut self, granule: u64) -> bool;
    fn reset(&mut self, granule: u64) -> bool;
    fn set_range(&mut self, granules: Range<u64>) -> bool;
    fn reset_range(&mut self, granules: Range<u64>) -> bool;

    /// The sum of the positions of all bits, each of which is looked at.
    fn sum_bits(&self) -> u64;
    fn runs(&self) -> Runs;

    fn merge(&mut self, other: &Self) -> bool;
    /// Merges a map that has sixteen times the granules.
    fn merge_finer(&mut self, other: &Self) -> bool;
}

/// A map that can be written as bytes and read again.
pub(crate) trait Stored: Peer {
    /// Replaces what is in `bytes`, which may be as long already.
    fn store(&self, bytes: &mut Vec<u8>);
    fn load(bytes: &[u8]) -> Self;
}

/// Bytes of a granule.
const GRANULE: u64 = 1 << 16;

#[inline]
fn bytes(granules: Range<u64>) -> ByteRange {
    (granules.start * GRANULE..granules.end * GRANULE).into()
}

fn hbitmap(granules: u64, unit: u64) -> HBitmap {
    let granularity = Granularity::from_bytes(unit).expect("a power of two");
    HBitmap::new(granules * unit, granularity).expect("it is small enough")
}

fn hbitmap_from_words(words: &[u64], unit: u64) -> HBitmap {
    let granularity = Granularity::from_bytes(unit).expect("a power of two");
    HBitmap::from_words(words.len() as u64 * 64 * unit, granularity, words)
        .expect("as many as it has")
}

impl Peer for HBitmap {
    const NAME: &'static str = "blockjob";
    const GRANULES_MAX: u64 = HBitmap::GRANULES_MAX;

    fn new(granules: u64) -> Self {
        hbitmap(granules, GRANULE)
    }

    fn from_words(words: &[u64]) -> Self {
        hbitmap_from_words(words, GRANULE)
    }

    fn coarse_from_words(words: &[u64]) -> Self {
        hbitmap_from_words(words, 16 * GRANULE)
    }

    fn restore(&mut self, other: &Self) {
        let is_full = other.count() == other.granules();
        if !other.is_clean() && !is_full {
            return self.clone_from(other);
        }
        // What is uniform is cloned without its words, which then were new memory in each pass. The others have
        // just copied all of theirs: to have ours in the caches, too, they are written.
        let words = vec![1; self.word_count()];
        self.import_words(0, &words).expect("as many as it has");
        if is_full {
            self.set_all();
        } else {
            self.reset_all();
        }
    }

    fn unit(&self) -> u64 {
        self.granularity().bytes()
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        self.set_at(granule * GRANULE).expect("in bounds")
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        HBitmap::reset(self, bytes(granule..granule + 1)).expect("in bounds and aligned")
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        HBitmap::set(self, bytes(granules)).expect("in bounds")
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        HBitmap::reset(self, bytes(granules)).expect("in bounds and aligned")
    }

    fn sum_bits(&self) -> u64 {
        self.iter().fold(0, u64::wrapping_add)
    }

    fn runs(&self) -> Runs {
        let runs = HBitmap::runs(self);
        runs.fold(Runs::default(), |runs, run| runs.and(run.into()))
    }

    fn merge(&mut self, other: &Self) -> bool {
        self.merge_from(other).expect("of equal length")
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        self.merge_from(other).expect("of equal length")
    }
}

impl Stored for HBitmap {
    fn store(&self, bytes: &mut Vec<u8>) {
        let len = self.serialized_len(0..self.len()).expect("all of it");
        bytes.resize(len, 0);
        self.serialize_part(0..self.len(), bytes)
            .expect("as long as it takes");
    }

    fn load(bytes: &[u8]) -> Self {
        let mut map = hbitmap(bytes.len() as u64 * 8, GRANULE);
        map.deserialize_part(0..map.len(), bytes)
            .expect("as long as it takes");
        map
    }
}

impl Peer for BitSet {
    const NAME: &'static str = "hibitset";
    const GRANULES_MAX: u64 = 1 << 24;

    fn new(granules: u64) -> Self {
        BitSet::with_capacity(granules as u32 - 1)
    }

    fn from_words(words: &[u64]) -> Self {
        let mut map = <Self as Peer>::new(words.len() as u64 * 64);
        dirty(words).for_each(|granule| {
            map.add(granule as u32);
        });
        map
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        !self.add(granule as u32)
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        self.remove(granule as u32)
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        granules.fold(false, |any, granule| any | self.set(granule))
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        granules.fold(false, |any, granule| any | self.reset(granule))
    }

    fn sum_bits(&self) -> u64 {
        (self.iter().map(u64::from)).fold(0, u64::wrapping_add)
    }

    fn runs(&self) -> Runs {
        Runs::joining(self.iter().map(u64::from))
    }

    fn merge(&mut self, other: &Self) -> bool {
        *self |= other;
        false
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        other.iter().for_each(|granule| {
            self.add(granule / 16);
        });
        false
    }
}
