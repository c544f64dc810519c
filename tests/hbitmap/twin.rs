//! The naive twin of a bitmap: one `bool` a granule, and every answer by looking at all of them.

use std::ops::Range;

use blockjob::bitmap::{RangeError, Status};
use blockjob::{ByteRange, Granularity, HBitmap};
use proptest::prelude::*;

pub(crate) const EXPONENTS: [u8; 5] = [0, 1, 4, 7, 16];

/// Granule counts at which a level gains a word or a map gains a level.
pub(crate) const COUNTS: [u64; 16] = [
    0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 5000, 262_143, 262_144, 262_145,
];

pub(crate) fn granularity(exponent: u8) -> Granularity {
    Granularity::from_exponent(exponent).unwrap()
}

/// A clean map.
pub(crate) fn map(len: u64, exponent: u8) -> HBitmap {
    let map = HBitmap::new(len, granularity(exponent)).unwrap();
    map.check_invariants();
    map
}

/// A map with something in it.
pub(crate) fn map_of(len: u64, exponent: u8, dirty: &[Range<u64>]) -> HBitmap {
    let mut map = map(len, exponent);
    for range in dirty {
        map.set(range.clone()).unwrap();
    }
    map.check_invariants();
    map
}

pub(crate) fn runs(map: &HBitmap) -> Vec<Range<u64>> {
    map.runs().map(Range::from).collect()
}

#[derive(Clone, Debug)]
pub(crate) struct Twin {
    pub(crate) len: u64,
    pub(crate) granularity: Granularity,
    pub(crate) dirty: Vec<bool>,
}

impl Twin {
    pub(crate) fn new(len: u64, exponent: u8) -> Self {
        let granularity = granularity(exponent);
        let granules = len.div_ceil(granularity.bytes());
        Self {
            len,
            granularity,
            dirty: vec![false; granules as usize],
        }
    }

    /// The bytes of a granule, the partial last one cut off.
    pub(crate) fn bytes_of(&self, granule: usize) -> Range<u64> {
        let start = granule as u64 * self.granularity.bytes();
        start..self.len.min(start + self.granularity.bytes())
    }

    pub(crate) fn has_byte(&self, offset: u64) -> bool {
        self.dirty[(offset / self.granularity.bytes()) as usize]
    }

    /// Where the last granule would end if it were whole.
    pub(crate) fn rounded_len(&self) -> u64 {
        self.dirty.len() as u64 * self.granularity.bytes()
    }

    pub(crate) fn touched(&self, range: &Range<u64>) -> Range<usize> {
        let bytes = self.granularity.bytes();
        (range.start / bytes) as usize..range.end.div_ceil(bytes) as usize
    }

    pub(crate) fn covered(&self, range: &Range<u64>) -> Range<usize> {
        let bytes = self.granularity.bytes();
        let first = range.start.div_ceil(bytes) as usize;
        let end = if range.end >= self.len {
            self.dirty.len()
        } else {
            (range.end / bytes) as usize
        };
        first..end.max(first)
    }

    /// Writes granules, and says whether that changed one.
    pub(crate) fn fill(&mut self, granules: Range<usize>, value: bool) -> bool {
        let granules = &mut self.dirty[granules];
        let changed = granules.iter().any(|dirty| *dirty != value);
        granules.fill(value);
        changed
    }

    pub(crate) fn set(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let fits = range.end <= self.rounded_len();
        fits.then(|| self.fill(self.touched(&range), true))
    }

    pub(crate) fn reset(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let bytes = self.granularity.bytes();
        let is_aligned = range.start.is_multiple_of(bytes)
            && (range.end.is_multiple_of(bytes) || range.end == self.len);
        let fits = is_aligned && range.end <= self.rounded_len();
        fits.then(|| self.fill(self.touched(&range), false))
    }

    pub(crate) fn reset_inner(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let fits = range.end <= self.rounded_len();
        fits.then(|| self.fill(self.covered(&range), false))
    }

    pub(crate) fn starts(&self) -> impl Iterator<Item = u64> {
        let bytes = self.granularity.bytes();
        let dirty = self.dirty.iter().enumerate().filter(|(_, dirty)| **dirty);
        dirty.map(move |(granule, _)| granule as u64 * bytes)
    }

    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for start in self.starts() {
            let end = self.len.min(start + self.granularity.bytes());
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }

    /// First byte of the range that is in the given state; a granule at a time.
    pub(crate) fn next(&self, range: Range<u64>, value: bool) -> Option<u64> {
        let end = range.end.min(self.len);
        let mut at = range.start;
        while at < end {
            if self.has_byte(at) == value {
                return Some(at);
            }
            at = self.bytes_of((at / self.granularity.bytes()) as usize).end;
        }
        None
    }

    pub(crate) fn next_area(&self, range: Range<u64>, bytes_max: u64) -> Option<ByteRange> {
        let start = self.next(range.clone(), true)?;
        let end = range.end.min(self.len);
        let end = self.next(start..end, false).unwrap_or(end);
        let end = end.min(start.saturating_add(bytes_max));
        (start < end).then(|| (start..end).into())
    }

    /// Whether every byte of a range, which must end in the map, is dirty.
    fn has_all_of(&self, range: Range<u64>) -> bool {
        self.next(range, false).is_none()
    }

    pub(crate) fn merge_from(&mut self, other: &Twin) {
        for run in other.runs() {
            self.set(run);
        }
    }

    /// Clears granules that `other` has all of, or nothing of.
    fn clear_where(&mut self, mut is_to_clear: impl FnMut(Range<u64>) -> bool) {
        for granule in 0..self.dirty.len() {
            if self.dirty[granule] && is_to_clear(self.bytes_of(granule)) {
                self.dirty[granule] = false;
            }
        }
    }

    pub(crate) fn subtract(&mut self, other: &Twin) {
        self.clear_where(|bytes| other.has_all_of(bytes));
    }

    pub(crate) fn retain(&mut self, other: &Twin) {
        self.clear_where(|bytes| other.next(bytes, true).is_none());
    }

    pub(crate) fn copy_from(&mut self, other: &Twin) {
        self.dirty.fill(false);
        self.merge_from(other);
    }

    pub(crate) fn intersects(&self, other: &Twin) -> bool {
        self.runs()
            .into_iter()
            .any(|run| other.next(run, true).is_some())
    }

    pub(crate) fn truncate(&mut self, len: u64) {
        self.len = len;
        let granules = len.div_ceil(self.granularity.bytes()) as usize;
        self.dirty.resize(granules, false);
    }

    pub(crate) fn word_count(&self) -> usize {
        self.dirty.len().div_ceil(64)
    }

    /// Bits of 64 granules each, the last ones 0 where there are none.
    pub(crate) fn words(&self) -> Vec<u64> {
        let word = |granules: &[bool]| {
            let bits = granules.iter().enumerate();
            bits.fold(0, |word, (at, dirty)| word | u64::from(*dirty) << at)
        };
        self.dirty.chunks(64).map(word).collect()
    }

    pub(crate) fn import_words(&mut self, first: usize, words: &[u64]) {
        for (granule, dirty) in self.dirty.iter_mut().enumerate().skip(first * 64) {
            if let Some(word) = words.get(granule / 64 - first) {
                *dirty = word >> (granule % 64) & 1 == 1;
            }
        }
    }

    /// The bytes that some words stand for, as far as there are any.
    pub(crate) fn bytes_of_words(&self, words: Range<usize>) -> Range<u64> {
        let bytes = 64 * self.granularity.bytes();
        let end = (words.end as u64 * bytes).min(self.len);
        (words.start as u64 * bytes).min(end)..end
    }
}

/// The whole content is the same, and the map is sound.
pub(crate) fn assert_same(map: &HBitmap, twin: &Twin) {
    map.check_invariants();
    assert!(map.iter().eq(twin.starts()), "iteration");
    let count = twin.dirty.iter().filter(|dirty| **dirty).count() as u64;
    assert_eq!(map.count(), count);
    assert_eq!(map.is_clean(), count == 0);
    assert_eq!(map.dirty_bytes(), count * twin.granularity.bytes());
    let runs = twin.runs();
    let bytes: u64 = runs.iter().map(|run| run.end - run.start).sum();
    assert_eq!(map.dirty_bytes_in_len(), bytes);
    assert!(map.runs().map(Range::from).eq(runs), "runs");
}

/// Every query says of a range what the twin says.
pub(crate) fn assert_same_answers(map: &HBitmap, twin: &Twin, range: Range<u64>, bytes_max: u64) {
    let dirty = twin.next(range.clone(), true);
    let clean = twin.next(range.clone(), false);
    assert_eq!(map.next_dirty(range.clone()), dirty);
    assert_eq!(map.next_clean(range.clone()), clean);
    assert_eq!(map.any_dirty_in(range.clone()), dirty.is_some());
    assert_eq!(map.all_dirty_in(range.clone()), clean.is_none());
    let area = twin.next_area(range.clone(), bytes_max);
    assert_eq!(map.next_dirty_area(range.clone(), bytes_max), area);
    assert_same_walks(map, range.clone(), bytes_max);
    match map.is_dirty(range.start) {
        Ok(dirty) => assert_eq!(dirty, twin.has_byte(range.start)),
        Err(_) => assert!(range.start >= twin.len),
    }
    match map.status(range.clone()) {
        Ok(Status::Dirty(run)) => {
            assert_eq!(dirty, Some(range.start));
            assert_eq!(run, (range.start..clean.unwrap_or(range.end)).into());
        }
        Ok(Status::Clean(run)) => {
            assert_eq!(clean, Some(range.start));
            assert_eq!(run, (range.start..dirty.unwrap_or(range.end)).into());
        }
        Err(RangeError::Empty { .. }) => assert!(range.is_empty()),
        Err(_) => assert!(range.end > twin.len),
    }
}

/// Iterators say the same step by step and in one go, which is code of its own, and what the areas say.
pub(crate) fn assert_same_walks(map: &HBitmap, range: Range<u64>, bytes_max: u64) {
    let granularity = map.granularity().bytes();
    let granules = |runs: &[ByteRange]| {
        let starts = runs.iter().flat_map(|run| {
            (run.start() / granularity..=(run.end() - 1) / granularity).map(|at| at * granularity)
        });
        starts.collect::<Vec<_>>()
    };
    for bytes_max in [bytes_max, u64::MAX] {
        let mut areas = Vec::new();
        let mut from = range.start;
        while let Some(area) = map.next_dirty_area(from..range.end, bytes_max) {
            areas.push(area);
            from = area.end();
            // Many short ones say no more.
            if areas.len() == 300 {
                break;
            }
        }
        let by_steps = |runs: &mut dyn Iterator<Item = ByteRange>| {
            std::iter::from_fn(|| runs.next())
                .take(300)
                .collect::<Vec<_>>()
        };
        assert_eq!(by_steps(&mut map.runs_in(range.clone(), bytes_max)), areas);
        if areas.len() < 300 {
            let mut in_one_go = Vec::new();
            let runs = map.runs_in(range.clone(), bytes_max);
            runs.for_each(|run| in_one_go.push(run));
            assert_eq!(in_one_go, areas);
            let mut rest = map.runs_in(range.clone(), bytes_max);
            let first = rest.next();
            assert!(
                rest.fold(first.is_none(), |_, run| areas.last() == Some(&run)) || areas.len() == 1
            );
            if bytes_max == u64::MAX {
                let mut starts = Vec::new();
                map.iter_in(range.clone())
                    .for_each(|start| starts.push(start));
                assert_eq!(starts, granules(&areas));
                assert!(std::iter::zip(map.iter_in(range.clone()), &starts).all(|(a, b)| a == *b));
                let mut steps = map.iter_in(range.clone());
                assert_eq!(std::iter::from_fn(|| steps.next()).count(), starts.len());
            }
        }
    }
}
/// Sizes: granules from the table, less a part of the last one.
pub(crate) fn sizes(counts: &'static [u64]) -> impl Strategy<Value = (u64, u8)> {
    let exponents = prop::sample::select(EXPONENTS.to_vec());
    (prop::sample::select(counts), exponents, any::<u64>()).prop_map(|(granules, exponent, cut)| {
        let len = granules << exponent;
        (len.saturating_sub(cut % (1 << exponent)), exponent)
    })
}

/// Offsets near granule boundaries, near word boundaries of each level, and near the end.
pub(crate) fn offsets(len: u64, exponent: u8) -> impl Strategy<Value = u64> {
    let granules = (len >> exponent) + 1;
    let near = prop::sample::select(vec![0, 64, 128, 4096, 8192, 262_144, granules]);
    let near = (near, -2i64..=2).prop_map(|(at, by)| u64::saturating_add_signed(at, by));
    let granule = prop_oneof![2 => near, 3 => 0..=granules, 1 => 0..=granules.min(200)];
    let within = prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just((1 << exponent) - 1)];
    let inside = (granule, within).prop_map(move |(granule, by)| (granule << exponent) + by);
    prop_oneof![12 => inside, 2 => Just(len), 1 => len..=len + (2 << exponent)]
}

pub(crate) fn ranges(len: u64, exponent: u8) -> impl Strategy<Value = Range<u64>> {
    let any_two = (offsets(len, exponent), offsets(len, exponent));
    let any_two = any_two.prop_map(|(a, b)| a.min(b)..a.max(b));
    let short = (offsets(len, exponent), 0u64..5);
    let short = short.prop_map(move |(start, granules)| start..start + (granules << exponent));
    let byte = offsets(len, exponent).prop_map(|start| start..start + 1);
    prop_oneof![4 => any_two, 3 => short, 1 => byte]
}

/// So many cases, or as many as `PROPTEST_CASES` says.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default.cases,
        None => cases,
    };
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..default
    }
}

pub(crate) const L1: u64 = 64;
pub(crate) const L2: u64 = 64 * 64;
pub(crate) const L3: u64 = 64 * 64 * 64;

pub(crate) fn map_like(twin: &Twin) -> HBitmap {
    map_of(twin.len, twin.granularity.exponent(), &twin.runs())
}
