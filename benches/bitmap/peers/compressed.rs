//! Maps that choose a form for every 65,536 granules: a list, runs, or a bit for each.

use std::ops::Range;

use croaring::{Bitmap, Portable};
use roaring::RoaringBitmap;

use super::flat::store_words;
use super::{Peer, Stored};
use crate::maps::{Joiner, Runs};

impl Peer for RoaringBitmap {
    const NAME: &'static str = "roaring";

    fn new(_granules: u64) -> Self {
        RoaringBitmap::new()
    }

    fn from_words(words: &[u64]) -> Self {
        let mut bytes = Vec::new();
        store_words(words, &mut bytes);
        let mut map = RoaringBitmap::from_lsb0_bytes(0, &bytes);
        map.optimize();
        map
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        self.insert(granule as u32)
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        self.remove(granule as u32)
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        self.insert_range(granules.start as u32..granules.end as u32) > 0
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        self.remove_range(granules.start as u32..granules.end as u32) > 0
    }

    fn sum_bits(&self) -> u64 {
        (self.iter().map(u64::from)).fold(0, u64::wrapping_add)
    }

    fn runs(&self) -> Runs {
        let mut bits = self.iter();
        let runs = std::iter::from_fn(|| bits.next_range());
        runs.fold(Runs::default(), |runs, run| {
            runs.and(u64::from(*run.start())..u64::from(*run.end()) + 1)
        })
    }

    fn merge(&mut self, other: &Self) -> bool {
        *self |= other;
        false
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        let mut coarse = RoaringBitmap::new();
        let mut bits = other.iter();
        while let Some(run) = bits.next_range() {
            coarse.insert_range(run.start() / 16..=run.end() / 16);
        }
        *self |= coarse;
        false
    }
}

impl Stored for RoaringBitmap {
    fn store(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        self.serialize_into(bytes).expect("a vector takes all");
    }

    fn load(bytes: &[u8]) -> Self {
        RoaringBitmap::deserialize_from(bytes).expect("it was stored")
    }
}

/// Positions that are taken from a map at once.
const MANY: usize = 1024;

impl Peer for Bitmap {
    const NAME: &'static str = "croaring";

    fn new(_granules: u64) -> Self {
        Bitmap::new()
    }

    fn from_words(words: &[u64]) -> Self {
        let mut bytes = Vec::new();
        // Both have one format.
        RoaringBitmap::from_words(words).store(&mut bytes);
        Self::load(&bytes)
    }

    #[inline]
    fn set(&mut self, granule: u64) -> bool {
        self.add(granule as u32);
        false
    }

    #[inline]
    fn reset(&mut self, granule: u64) -> bool {
        Bitmap::remove(self, granule as u32);
        false
    }

    #[inline]
    fn set_range(&mut self, granules: Range<u64>) -> bool {
        self.add_range(granules.start as u32..granules.end as u32);
        false
    }

    #[inline]
    fn reset_range(&mut self, granules: Range<u64>) -> bool {
        self.remove_range(granules.start as u32..granules.end as u32);
        false
    }

    fn sum_bits(&self) -> u64 {
        let mut sum = 0;
        for_each_many(self, |many| {
            sum = many
                .iter()
                .fold(sum, |sum: u64, bit| sum.wrapping_add(u64::from(*bit)));
        });
        sum
    }

    fn runs(&self) -> Runs {
        let mut runs = Runs::default();
        let mut joiner = Joiner::new(|run| runs = runs.and(run));
        for_each_many(self, |many| {
            many.iter().for_each(|bit| joiner.push(u64::from(*bit)));
        });
        joiner.end();
        runs
    }

    fn merge(&mut self, other: &Self) -> bool {
        self.or_inplace(other);
        false
    }

    fn merge_finer(&mut self, other: &Self) -> bool {
        let mut coarse = Bitmap::new();
        for_each_many(other, |many| {
            many.iter_mut().for_each(|bit| *bit /= 16);
            coarse.add_many(many);
        });
        self.or_inplace(&coarse);
        false
    }
}

fn for_each_many(map: &Bitmap, mut take: impl FnMut(&mut [u32])) {
    let mut cursor = map.cursor();
    let mut many = [0; MANY];
    loop {
        match cursor.read_many(&mut many) {
            0 => return,
            count => take(&mut many[..count]),
        }
    }
}

impl Stored for Bitmap {
    fn store(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        let stored = self.serialize_into_vec::<Portable>(bytes);
        assert!(!stored.is_empty());
    }

    fn load(bytes: &[u8]) -> Self {
        Bitmap::try_deserialize::<Portable>(bytes).expect("it was stored")
    }
}
