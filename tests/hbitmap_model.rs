//! `HBitmap` against a naive twin: one `bool` a granule, and every answer by looking at all of them.

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

use std::ops::Range;

use blockjob::bitmap::{CreateError, MergeError, RangeError, Status, UnionError};
use blockjob::{ByteRange, Granularity, HBitmap};
use proptest::prelude::*;

const EXPONENTS: [u8; 5] = [0, 1, 4, 7, 16];

/// Granule counts at which a level gains a word or a map gains a level.
const COUNTS: [u64; 16] = [
    0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 5000, 262_143, 262_144, 262_145,
];

fn granularity(exponent: u8) -> Granularity {
    Granularity::from_exponent(exponent).unwrap()
}

/// A clean map.
fn map(len: u64, exponent: u8) -> HBitmap {
    let map = HBitmap::new(len, granularity(exponent)).unwrap();
    map.check_invariants();
    map
}

/// A map with something in it.
fn map_of(len: u64, exponent: u8, dirty: &[Range<u64>]) -> HBitmap {
    let mut map = map(len, exponent);
    for range in dirty {
        map.set(range.clone()).unwrap();
    }
    map.check_invariants();
    map
}

fn runs(map: &HBitmap) -> Vec<Range<u64>> {
    map.runs().map(Range::from).collect()
}

#[derive(Clone, Debug)]
struct Twin {
    len: u64,
    granularity: Granularity,
    dirty: Vec<bool>,
}

impl Twin {
    fn new(len: u64, exponent: u8) -> Self {
        let granularity = granularity(exponent);
        let granules = len.div_ceil(granularity.bytes());
        Self {
            len,
            granularity,
            dirty: vec![false; granules as usize],
        }
    }

    /// The bytes of a granule, the partial last one cut off.
    fn bytes_of(&self, granule: usize) -> Range<u64> {
        let start = granule as u64 * self.granularity.bytes();
        start..self.len.min(start + self.granularity.bytes())
    }

    fn has_byte(&self, offset: u64) -> bool {
        self.dirty[(offset / self.granularity.bytes()) as usize]
    }

    /// Where the last granule would end if it were whole.
    fn rounded_len(&self) -> u64 {
        self.dirty.len() as u64 * self.granularity.bytes()
    }

    fn touched(&self, range: &Range<u64>) -> Range<usize> {
        let bytes = self.granularity.bytes();
        (range.start / bytes) as usize..range.end.div_ceil(bytes) as usize
    }

    fn covered(&self, range: &Range<u64>) -> Range<usize> {
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
    fn fill(&mut self, granules: Range<usize>, value: bool) -> bool {
        let granules = &mut self.dirty[granules];
        let changed = granules.iter().any(|dirty| *dirty != value);
        granules.fill(value);
        changed
    }

    fn set(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let fits = range.end <= self.rounded_len();
        fits.then(|| self.fill(self.touched(&range), true))
    }

    fn reset(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let bytes = self.granularity.bytes();
        let is_aligned =
            range.start % bytes == 0 && (range.end % bytes == 0 || range.end == self.len);
        let fits = is_aligned && range.end <= self.rounded_len();
        fits.then(|| self.fill(self.touched(&range), false))
    }

    fn reset_inner(&mut self, range: Range<u64>) -> Option<bool> {
        if range.is_empty() {
            return Some(false);
        }
        let fits = range.end <= self.rounded_len();
        fits.then(|| self.fill(self.covered(&range), false))
    }

    fn starts(&self) -> impl Iterator<Item = u64> {
        let bytes = self.granularity.bytes();
        let dirty = self.dirty.iter().enumerate().filter(|(_, dirty)| **dirty);
        dirty.map(move |(granule, _)| granule as u64 * bytes)
    }

    fn runs(&self) -> Vec<Range<u64>> {
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
    fn next(&self, range: Range<u64>, value: bool) -> Option<u64> {
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

    fn next_area(&self, range: Range<u64>, bytes_max: u64) -> Option<ByteRange> {
        let start = self.next(range.clone(), true)?;
        let end = range.end.min(self.len);
        let end = self.next(start..end, false).unwrap_or(end);
        let end = end.min(start.saturating_add(bytes_max));
        (start < end).then(|| (start..end).into())
    }
}

/// The whole content is the same, and the map is sound.
fn assert_same(map: &HBitmap, twin: &Twin) {
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
fn assert_same_answers(map: &HBitmap, twin: &Twin, range: Range<u64>, bytes_max: u64) {
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
fn assert_same_walks(map: &HBitmap, range: Range<u64>, bytes_max: u64) {
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

// --- Random operations on both -----------------------------------------------------------------

#[derive(Clone, Debug)]
enum Op {
    Set(Range<u64>),
    Reset(Range<u64>),
    ResetInner(Range<u64>),
    SetAll,
    ResetAll,
    Ask(Range<u64>, u64),
}

/// Sizes: granules from the table, less a part of the last one.
fn sizes(counts: &'static [u64]) -> impl Strategy<Value = (u64, u8)> {
    let exponents = prop::sample::select(EXPONENTS.to_vec());
    (prop::sample::select(counts), exponents, any::<u64>()).prop_map(|(granules, exponent, cut)| {
        let len = granules << exponent;
        (len.saturating_sub(cut % (1 << exponent)), exponent)
    })
}

/// Offsets near granule boundaries, near word boundaries of each level, and near the end.
fn offsets(len: u64, exponent: u8) -> impl Strategy<Value = u64> {
    let granules = (len >> exponent) + 1;
    let near = prop::sample::select(vec![0, 64, 128, 4096, 8192, 262_144, granules]);
    let near = (near, -2i64..=2).prop_map(|(at, by)| u64::saturating_add_signed(at, by));
    let granule = prop_oneof![2 => near, 3 => 0..=granules, 1 => 0..=granules.min(200)];
    let within = prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just((1 << exponent) - 1)];
    let inside = (granule, within).prop_map(move |(granule, by)| (granule << exponent) + by);
    prop_oneof![12 => inside, 2 => Just(len), 1 => len..=len + (2 << exponent)]
}

fn ranges(len: u64, exponent: u8) -> impl Strategy<Value = Range<u64>> {
    let any_two = (offsets(len, exponent), offsets(len, exponent));
    let any_two = any_two.prop_map(|(a, b)| a.min(b)..a.max(b));
    let short = (offsets(len, exponent), 0u64..5);
    let short = short.prop_map(move |(start, granules)| start..start + (granules << exponent));
    let byte = offsets(len, exponent).prop_map(|start| start..start + 1);
    prop_oneof![4 => any_two, 3 => short, 1 => byte]
}

fn ops(len: u64, exponent: u8) -> impl Strategy<Value = Op> {
    let range = || ranges(len, exponent);
    let bytes_max = prop_oneof![
        Just(u64::MAX),
        0u64..10,
        Just(1 << exponent),
        Just(100 << exponent)
    ];
    prop_oneof![
        6 => range().prop_map(Op::Set),
        5 => range().prop_map(Op::Reset),
        3 => range().prop_map(Op::ResetInner),
        1 => Just(Op::SetAll),
        1 => Just(Op::ResetAll),
        8 => (range(), bytes_max).prop_map(|(range, bytes_max)| Op::Ask(range, bytes_max)),
    ]
}

fn scenarios() -> impl Strategy<Value = (u64, u8, Vec<Op>)> {
    sizes(&COUNTS).prop_flat_map(|(len, exponent)| {
        (
            Just(len),
            Just(exponent),
            prop::collection::vec(ops(len, exponent), 1..40),
        )
    })
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn random_operations_do_what_the_twin_does((len, exponent, ops) in scenarios()) {
        let mut map = map(len, exponent);
        let mut twin = Twin::new(len, exponent);
        for op in ops {
            let before = map.clone();
            let (answer, expected) = match op.clone() {
                Op::Set(range) => (map.set(range.clone()).ok(), twin.set(range)),
                Op::Reset(range) => (map.reset(range.clone()).ok(), twin.reset(range)),
                Op::ResetInner(range) => {
                    (map.reset_inner(range.clone()).ok(), twin.reset_inner(range))
                }
                Op::SetAll => (Some(map.set_all()), Some(twin.fill(0..twin.dirty.len(), true))),
                Op::ResetAll => (Some(map.reset_all()), Some(twin.fill(0..twin.dirty.len(), false))),
                Op::Ask(range, bytes_max) => {
                    assert_same_answers(&map, &twin, range, bytes_max);
                    continue;
                }
            };
            prop_assert_eq!(answer, expected, "{:?}", op);
            prop_assert_eq!(answer == Some(true), map != before, "changed by {:?}", op);
            assert_same(&map, &twin);
        }
    }

    #[test]
    fn equal_content_is_equal_however_it_came_about((len, exponent, ops) in scenarios()) {
        let mut map = map(len, exponent);
        for op in ops {
            if let Op::Set(range) | Op::ResetInner(range) = op {
                let _ = map.set(range.clone());
                let _ = map.reset_inner(range.start + (3 << exponent)..range.end);
            }
        }
        prop_assert_eq!(&map, &map_of(len, exponent, &runs(&map)));
        map.reset_all();
        prop_assert_eq!(map, HBitmap::new(len, granularity(exponent)).unwrap());
    }
}

// --- Queries, exhaustively ---------------------------------------------------------------------

/// Every start and end of a map of three words, for patterns of all kinds.
#[test]
fn queries_agree_for_every_range_of_three_words() {
    for exponent in 0..=4u8 {
        let bytes = 1u64 << exponent;
        let len = 190 * bytes - bytes / 2;
        let patterns: [&[Range<u64>]; 6] = [
            &[],
            &[0..190],
            &[0..1, 62..65, 126..129, 189..190],
            &[1..189],
            &[60..70, 100..101, 128..190],
            &[0..64, 128..130, 140..141, 150..151],
        ];
        for pattern in patterns {
            let mut map = map(len, exponent);
            let mut dirty = vec![false; len as usize];
            for run in pattern {
                let range = run.start * bytes..(run.end * bytes).min(len);
                map.set(range.clone()).unwrap();
                dirty[range.start as usize..range.end as usize].fill(true);
            }
            assert_every_range(&map, &dirty);
        }
    }
}

fn assert_every_range(map: &HBitmap, dirty: &[bool]) {
    // For each offset the first one from there on that is dirty, and that is clean; `len` if none.
    let len = dirty.len() as u64;
    let firsts = |value: bool| {
        let mut firsts = vec![len; dirty.len() + 1];
        for at in (0..dirty.len()).rev() {
            firsts[at] = if dirty[at] == value {
                at as u64
            } else {
                firsts[at + 1]
            };
        }
        firsts
    };
    let (next_dirty, next_clean) = (firsts(true), firsts(false));
    for start in 0..=len {
        let (first_dirty, first_clean) = (next_dirty[start as usize], next_clean[start as usize]);
        let area_end = next_clean[first_dirty as usize];
        for end in start..=len + 2 {
            let found = |first: u64| (first < end.min(len)).then_some(first);
            assert_eq!(map.next_dirty(start..end), found(first_dirty));
            assert_eq!(map.next_clean(start..end), found(first_clean));
            for bytes_max in [1, 33, u64::MAX] {
                let area_end = first_dirty.saturating_add(bytes_max).min(area_end).min(end);
                let expected = found(first_dirty).map(|start| (start..area_end).into());
                assert_eq!(map.next_dirty_area(start..end, bytes_max), expected);
            }
            let status = map.status(start..end).ok();
            let expected = (start < end && end <= len).then(|| match dirty[start as usize] {
                true => Status::Dirty((start..first_clean.min(end)).into()),
                false => Status::Clean((start..first_dirty.min(end)).into()),
            });
            assert_eq!(status, expected);
        }
        let is_dirty = map.is_dirty(start).ok();
        assert_eq!(is_dirty, dirty.get(start as usize).copied());
    }
}

/// Statuses put end to end, runs, and single bytes are three ways to say the same.
#[test]
fn all_queries_describe_one_set() {
    for exponent in EXPONENTS {
        let len = (500 << exponent) - (1 << exponent) / 2;
        let map = map_of(
            len,
            exponent,
            &[3 << exponent..70 << exponent, len - 1..len],
        );
        let mut from_status = Vec::new();
        let mut at = 0;
        while at < len {
            let status = map.status(at..len).unwrap();
            assert_eq!(map.is_dirty(at), Ok(status.is_dirty()));
            if status.is_dirty() {
                from_status.push(Range::from(status.range()));
            }
            at = status.range().end();
        }
        assert_eq!(from_status, runs(&map));
        assert!(runs(&map).iter().all(|run| map.all_dirty_in(run.clone())));
    }
}

// --- Size --------------------------------------------------------------------------------------

#[test]
fn size_0_is_legal_and_always_clean() {
    for exponent in [0, 4, 16, 63] {
        let mut map = map(0, exponent);
        assert_eq!((map.len(), map.granules(), map.count()), (0, 0, 0));
        assert!(!map.set_all() && !map.reset_all() && map.is_clean());
        assert_eq!(map.set(0..0), Ok(false));
        assert!(map.set(0..1).is_err() && map.reset(0..1).is_err());
        assert!(map.reset_inner(0..1).is_err() && map.is_dirty(0).is_err());
        assert_eq!((map.iter().next(), map.runs().next()), (None, None));
        assert_eq!((map.next_dirty(0..9), map.next_clean(0..9)), (None, None));
        assert_eq!(map.next_dirty_area(0..u64::MAX, u64::MAX), None);
        assert_eq!(map.cursor(0).next(&map), None);
        assert_eq!(map.dirty_bytes_in_len(), 0);
        let other = map.clone();
        assert_eq!(map.merge_from(&other), Ok(false));
        assert_eq!(map.subtract(&other), Ok(false));
        assert_eq!(map.intersects(&other), Ok(false));
        map.check_invariants();
    }
}

#[test]
fn size_unaligned_has_its_first_and_very_last_granule() {
    for granules in COUNTS.into_iter().filter(|granules| *granules > 1) {
        let mut map = map(granules, 0);
        map.set(0..1).unwrap();
        map.set(granules - 1..granules).unwrap();
        map.check_invariants();
        assert!(map.iter().eq([0, granules - 1]));
        let mut cursor = map.cursor(0);
        assert_eq!(cursor.next(&map), Some(0));
        assert_eq!(cursor.next(&map), Some(granules - 1));
        assert_eq!(cursor.next(&map), None);
    }
}

#[test]
fn limits_are_checked_before_memory_is_asked_for() {
    let too_long = HBitmap::LEN_MAX + 1;
    assert_eq!(
        HBitmap::new(too_long, granularity(63)),
        Err(CreateError::TooLong { len: too_long })
    );
    let max = HBitmap::GRANULES_MAX;
    for exponent in [0, 1, 16] {
        assert_eq!(
            HBitmap::new((max << exponent) + 1, granularity(exponent)),
            Err(CreateError::TooManyGranules { granules: max + 1 })
        );
    }
    assert!(HBitmap::new(HBitmap::LEN_MAX, granularity(0)).is_err());

    let mut coarsest = map(HBitmap::LEN_MAX, 63);
    assert_eq!(coarsest.granules(), 1);
    coarsest.set_all();
    assert_eq!(coarsest.dirty_bytes(), 1 << 63);
    assert_eq!(coarsest.dirty_bytes_in_len(), HBitmap::LEN_MAX);
    assert_eq!(runs(&coarsest), [0..HBitmap::LEN_MAX]);
    assert_eq!(coarsest.cursor(7).next(&coarsest), Some(0));
    assert_eq!(coarsest.set(0..1 << 63), Ok(false));
    assert_eq!(coarsest.reset(0..HBitmap::LEN_MAX), Ok(true));
}

#[test]
fn arguments_at_the_end_of_u64_are_errors_and_not_panics() {
    for exponent in EXPONENTS {
        let mut map = map_of(1000 << exponent, exponent, &[0..5]);
        let before = map.clone();
        for start in [0, 1, map.len() - 1, map.len(), 1 << 63, u64::MAX - 1] {
            let range = start..u64::MAX;
            assert!(matches!(
                map.set(range.clone()),
                Err(RangeError::OutOfBounds { .. })
            ));
            assert!(map.reset(range.clone()).is_err());
            assert!(map.reset_inner(range.clone()).is_err());
            assert!(map.status(range.clone()).is_err());
            let _ = (map.next_dirty(range.clone()), map.next_clean(range.clone()));
            let _ = (
                map.next_dirty_area(range.clone(), 0),
                map.runs_in(range, u64::MAX).count(),
            );
        }
        let end = u64::MAX..u64::MAX;
        assert_eq!(map.set(end.clone()), Ok(false));
        assert_eq!(map.reset(end.clone()), Ok(false));
        assert_eq!(map.reset_inner(end.clone()), Ok(false));
        assert_eq!(map.status(end), Err(RangeError::Empty { offset: u64::MAX }));
        assert!(map.is_dirty(map.len()).is_err() && map.is_dirty(u64::MAX).is_err());
        assert_eq!(map.cursor(u64::MAX).next(&map), None);
        assert_eq!(map, before);
    }
}

// --- Set, reset, get ---------------------------------------------------------------------------

/// Runs steps on a map and its twin at several sizes, and compares after each.
fn shadowed(granules: u64, steps: &[(bool, Range<u64>)]) {
    for exponent in EXPONENTS {
        let mut map = map(granules << exponent, exponent);
        let mut twin = Twin::new(granules << exponent, exponent);
        for (value, run) in steps {
            let range = run.start << exponent..run.end << exponent;
            if *value {
                assert_eq!(map.set(range.clone()).ok(), twin.set(range));
            } else {
                assert_eq!(map.reset(range.clone()).ok(), twin.reset(range));
            }
            assert_same(&map, &twin);
        }
    }
}

const L1: u64 = 64;
const L2: u64 = 64 * 64;
const L3: u64 = 64 * 64 * 64;

#[test]
fn set_all_granules() {
    for granules in COUNTS {
        shadowed(granules, &[(true, 0..granules)]);
        let mut map = map(granules, 0);
        assert_eq!(map.set_all(), granules > 0);
        assert!(!map.set_all());
        assert_eq!(map, map_of(granules, 0, &[0..granules]));
    }
}

#[test]
fn set_one_granule() {
    for at in [0, 1, 63, 64, L2 - 1, L2, L3 - 1] {
        shadowed(L3, &[(true, at..at + 1)]);
    }
}

#[test]
fn set_two_granules_across_a_word() {
    for boundary in [L1, L2, L3 / 2] {
        shadowed(L3, &[(true, boundary - 1..boundary + 1)]);
    }
}

#[test]
fn set_across_words_and_levels() {
    shadowed(
        L3,
        &[
            (true, L1 - 1..L1 + 5),
            (true, L2 - 9..L2 + L1 + 2),
            (true, 3 * L2..L3),
        ],
    );
}

#[test]
fn set_twice_changes_nothing() {
    let mut map = map_of(L2, 0, &[L1 - 1..3 * L1]);
    assert_eq!(map.set(L1 - 1..3 * L1), Ok(false));
    assert_eq!(map.set(L1..L1 + 1), Ok(false));
    assert_eq!(map.count(), 2 * L1 + 1);
}

#[test]
fn set_overlapping_counts_each_granule_once() {
    shadowed(
        L3,
        &[
            (true, L1 - 1..L1 * 2 + 2),
            (true, L1 * 2 - 1..L1 * 4 + 1),
            (true, L2 - 1..L2 + L1 * 2 + 1),
            (true, L2 - L1 * 8 + 1..L2 - L1 * 8 + 1 + L1 * 40),
            (true, 0..L3 - L1 * 3 - 1),
            (true, L3 - L1..L3),
        ],
    );
}

#[test]
fn reset_of_what_is_clean_changes_nothing() {
    shadowed(L3, &[(false, 0..1), (false, 0..L3), (false, L3 - 1..L3)]);
    assert_eq!(map(L2, 0).reset(0..L2), Ok(false));
}

#[test]
fn reset_across_words_and_levels_between_sets() {
    shadowed(
        L3,
        &[
            (true, L1 - 1..L1 * 2 + 2),
            (false, L1..L1 * 2),
            (true, 0..L3),
            (false, L1 * 2 - 1..L2),
            (false, L2..L2 * 3 + 7),
            (true, L2 * 2..L2 * 2 + 1),
            (false, 0..L3 - 1),
            (false, L3 - 1..L3),
        ],
    );
}

#[test]
fn reset_all_after_many_patterns() {
    let patterns = [0..1, L1 - 1..L1 + 1, 0..L2, L2 - 1..L3, 0..L3];
    let mut map = map(L3, 0);
    for pattern in patterns {
        map.set(pattern).unwrap();
        assert!(map.reset_all());
        map.check_invariants();
        assert!(map.is_clean() && map.iter().next().is_none());
        assert!(!map.reset_all());
    }
}

/// The two edge words are judged each for itself: granules they keep must still be found.
#[test]
fn reset_keeps_what_is_left_in_the_edge_words() {
    let mut map = map_of(4096, 0, &[60..200]);
    assert_eq!(map.reset(64..192), Ok(true));
    map.check_invariants();
    assert!(map.iter().eq((60..64).chain(192..200)));
    assert_eq!(map.reset(60..64), Ok(true));
    assert_eq!(map.next_dirty(0..4096), Some(192));
}

#[test]
fn reset_never_rounds_outward() {
    let mut map = map_of((1 << 20) + 512, 16, &[0..128 << 10]);
    let before = map.clone();
    for range in [
        4096..65536 + 4096,
        0..4096,
        65535..131_072,
        0..131_073,
        1 << 20..(1 << 20) + 511,
    ] {
        assert!(matches!(
            map.reset(range),
            Err(RangeError::Unaligned { .. })
        ));
    }
    assert!(matches!(
        map.reset(0..18 << 16),
        Err(RangeError::OutOfBounds { .. })
    ));
    assert_eq!(map, before);

    map.set_all();
    assert_eq!(
        map.reset(1 << 20..map.len()),
        Ok(true),
        "to the end of a partial granule"
    );
    map.set_all();
    assert_eq!(
        map.reset(1 << 20..17 << 16),
        Ok(true),
        "to where it would end"
    );
    assert_eq!(map.count(), 16);
}

#[test]
fn set_may_end_in_the_partial_last_granule_but_not_past_it() {
    let mut map = map(1000, 4);
    assert_eq!(map.set(999..1008), Ok(true));
    assert_eq!(map.dirty_bytes(), 16);
    assert_eq!(map.dirty_bytes_in_len(), 8);
    assert_eq!(runs(&map), [992..1000]);
    assert!(matches!(
        map.set(999..1009),
        Err(RangeError::OutOfBounds { .. })
    ));
    assert_eq!(map.reset_inner(992..1008), Ok(true));
    assert!(map.is_clean());
}

#[test]
fn get_agrees_with_every_byte() {
    for exponent in [0, 1, 4] {
        let len = (L2 << exponent) - 1;
        let mut map = map(len, exponent);
        let mut twin = Twin::new(len, exponent);
        for range in [0..1, 10..11, 400..900, len - 70..len] {
            map.set(range.clone()).unwrap();
            twin.set(range);
            for offset in 0..len {
                assert_eq!(map.is_dirty(offset), Ok(twin.has_byte(offset)));
            }
        }
        map.set_all();
        assert!((0..len).all(|offset| map.is_dirty(offset) == Ok(true)));
    }
}

#[test]
fn granularity_counts_whole_granules() {
    let mut map = map(L1, 1);
    for (range, bytes) in [
        (0..1, 2),
        (2..3, 4),
        (0..3, 4),
        (0..4, 4),
        (6..7, 6),
        (4..5, 8),
    ] {
        map.set(range).unwrap();
        assert_eq!(map.dirty_bytes(), bytes);
    }
    map.reset(0..2).unwrap();
    assert_eq!(map.dirty_bytes(), 6);
    assert_eq!(runs(&map), [2..8]);
}

// --- Searching ---------------------------------------------------------------------------------

fn next_x(exponent: u8) {
    let len = L3 << exponent;
    let mut map = map(len, exponent);
    let mut twin = Twin::new(len, exponent);
    let boundaries = [
        0,
        1,
        L1 - 1,
        L1,
        L2 - 1,
        L2,
        L2 + L1 * 5,
        L3 / 2,
        L3 - 1,
        L3,
    ];
    let offsets = boundaries.map(|granule| granule << exponent);
    let steps = [
        0..0,
        0..1,
        L1 - 1..L1 + 2,
        L2..L2 + 1,
        L2 + 5..L2 + L1 * 2,
        L3 - 5..L3,
        0..L3,
    ];
    for step in steps {
        let range = step.start << exponent..step.end << exponent;
        map.set(range.clone()).unwrap();
        twin.set(range);
        for start in offsets {
            for end in offsets.into_iter().chain([start + 1, u64::MAX]) {
                for bytes_max in [0, 1, 17, 64 << exponent, u64::MAX] {
                    assert_same_answers(&map, &twin, start..end.max(start), bytes_max);
                }
                assert_same_answers(
                    &map,
                    &twin,
                    start + 1..end.saturating_sub(1).max(start + 1),
                    9,
                );
            }
        }
    }
}

#[test]
fn next_x_0() {
    next_x(0);
}

#[test]
fn next_x_1() {
    next_x(1);
}

#[test]
fn next_x_4() {
    next_x(4);
}

#[test]
fn next_dirty_area_is_cut_by_the_range_and_by_its_length() {
    let map = map_of(1000, 4, &[160..320, 992..1000]);
    let area =
        |range: Range<u64>, bytes_max| map.next_dirty_area(range, bytes_max).map(Range::from);
    assert_eq!(area(0..1000, u64::MAX), Some(160..320));
    assert_eq!(
        area(170..1000, u64::MAX),
        Some(170..320),
        "begins amid a granule"
    );
    assert_eq!(
        area(0..165, u64::MAX),
        Some(160..165),
        "ends amid a granule"
    );
    assert_eq!(area(0..1000, 7), Some(160..167));
    assert_eq!(
        area(320..u64::MAX, u64::MAX),
        Some(992..1000),
        "ends with the map"
    );
    assert_eq!(area(0..160, u64::MAX), None);
    assert_eq!(area(200..200, u64::MAX), None, "an empty range has no area");
    assert_eq!(area(0..1000, 0), None, "an area of no bytes is none");
}

#[test]
fn runs_are_cut_to_operations() {
    let map = map_of(1 << 20, 16, &[0..300_000]);
    let sizes: Vec<_> = map
        .runs_in(1000..u64::MAX, 1 << 17)
        .map(ByteRange::len)
        .collect();
    assert_eq!(sizes, [1 << 17, 1 << 17, 327_680 - 1000 - (2 << 17)]);
    assert_eq!(map.runs_in(0..1 << 20, 0).count(), 0);
}

// --- Iterating, also while the map changes -----------------------------------------------------

fn collect(map: &HBitmap, first: u64) -> Vec<u64> {
    let mut cursor = map.cursor(first);
    std::iter::from_fn(|| cursor.next(map)).collect()
}

#[test]
fn iter_of_a_clean_map_ends_at_once() {
    assert_eq!(collect(&map(L3, 0), 0), []);
    assert_eq!(map(L3, 0).iter().next(), None);
}

#[test]
fn iter_from_any_start_yields_the_tail() {
    let map = map_of(L3, 0, &[0..L3]);
    for boundary in [1, L1, L1 * 2, L2, L2 + L1 - 1, L3 / 2, L3 - L1 + 1] {
        for first in [boundary - 1, boundary, boundary + 1] {
            assert!(collect(&map, first).into_iter().eq(first..L3));
        }
    }
    assert_eq!(collect(&map, L3 - 1), [L3 - 1]);
    assert_eq!(collect(&map, L3), []);
}

#[test]
fn iter_begins_with_the_start_of_the_granule() {
    let len = 131_072 << 7;
    let map = map_of(len, 7, &[1000..1001, len - 1..len]);
    let (first, last) = (1000 & !127, len - 128);
    assert_eq!(collect(&map, 0), [first, last]);
    assert_eq!(
        collect(&map, 1023),
        [first, last],
        "below where it was asked to begin"
    );
    assert_eq!(collect(&map, 1024), [last]);
    assert_eq!(collect(&map, len - 1), [last]);
}

#[test]
fn iter_ends_when_all_is_reset_between_two_steps() {
    let mut map = map_of(L3, 0, &[0..L3]);
    let mut cursor = map.cursor(L1 - 1);
    assert_eq!(cursor.next(&map), Some(L1 - 1));
    map.reset_all();
    assert_eq!(cursor.next(&map), None);
    map.set_all();
    assert_eq!(cursor.next(&map), None, "once ended it stays so");
    assert_eq!(map.cursor(0).next(&map), Some(0));
}

#[test]
fn iter_sees_what_is_set_ahead_also_in_the_word_it_is_in() {
    let mut map = map_of(L3, 0, &[5..6]);
    let mut cursor = map.cursor(0);
    assert_eq!(cursor.next(&map), Some(5));
    map.set(7..8).unwrap();
    map.set(4..6).unwrap();
    assert_eq!(cursor.next(&map), Some(7), "but not what is set behind");
    map.set(L2 * 3..L2 * 3 + 1).unwrap();
    assert_eq!(cursor.next(&map), Some(L2 * 3));
    assert_eq!(cursor.next(&map), None);
    assert_eq!(map.count(), 4);
}

proptest! {
    #![proptest_config(cases(100))]

    /// At each step the cursor yields exactly the next granule that is dirty at that moment.
    #[test]
    fn iter_follows_the_map_as_it_changes(
        (len, exponent, ops) in scenarios(),
        first in any::<prop::sample::Index>(),
    ) {
        let mut map = map(len, exponent);
        let mut twin = Twin::new(len, exponent);
        map.set(0..len / 2).unwrap();
        twin.set(0..len / 2);
        let first = first.index(len as usize + 1) as u64;
        let mut cursor = map.cursor(first);
        let mut from = first & !((1 << exponent) - 1);
        let mut has_ended = false;
        for op in ops.into_iter().cycle().take(100) {
            let expected = twin.next(from..len, true).filter(|_| !has_ended && first < len);
            prop_assert_eq!(cursor.next(&map), expected);
            match expected {
                Some(start) => from = start + (1 << exponent),
                None => has_ended = true,
            }
            match op {
                Op::Set(range) => assert_eq!(map.set(range.clone()).ok(), twin.set(range)),
                Op::Reset(range) | Op::ResetInner(range) | Op::Ask(range, _) => {
                    assert_eq!(map.reset_inner(range.clone()).ok(), twin.reset_inner(range));
                }
                Op::SetAll | Op::ResetAll => {}
            }
        }
    }
}

/// A map far too large to walk word by word: 2^30 granules, hardly any dirty.
#[test]
fn a_huge_sparse_map_is_walked_by_what_is_dirty() {
    let len = 64u64 << 40;
    let mut map = HBitmap::new(len, Granularity::DEFAULT).unwrap();
    assert_eq!(map.granules(), 1 << 30);
    assert_eq!(map.next_dirty(0..len), None);

    let starts: Vec<u64> = (0..1000)
        .map(|n| (n * 1_073_741 % (1 << 30)) << 16)
        .collect();
    for start in &starts {
        assert_eq!(map.set(*start..start + 1), Ok(true));
    }
    assert!(map.iter().eq(starts.iter().copied()));
    assert_eq!(collect(&map, 0), starts);
    assert_eq!(map.runs().count(), 1000);

    let mut copy = HBitmap::new(len, Granularity::from_exponent(20).unwrap()).unwrap();
    assert_eq!(copy.merge_from(&map), Ok(true));
    assert_eq!(copy.count(), 1000);
    assert_eq!(map.subtract(&copy), Ok(true));
    assert!(map.is_clean());
    assert!(copy.reset_all());
    copy.check_invariants();
}

/// The largest map there can be. Whether it is granted is up to the machine; it must not abort.
#[test]
#[cfg(target_pointer_width = "64")]
fn the_largest_map_is_created_or_refused() {
    match HBitmap::new(HBitmap::GRANULES_MAX, granularity(0)) {
        Ok(map) => assert_eq!(map.next_dirty(0..map.len()), None),
        Err(error) => assert_eq!(error, CreateError::OutOfMemory { granules: 1 << 41 }),
    }
}

// --- Combining two maps ------------------------------------------------------------------------

/// Two maps of one length, at any two granularities, with their dirty bytes.
fn pairs() -> impl Strategy<Value = (Twin, Twin)> {
    let len = prop_oneof![0u64..300, 3000u64..9000, Just(65536 * 3 + 5), Just(1 << 18)];
    let exponents = (
        0u8..=8,
        prop_oneof![0u8..=8, Just(12), Just(16)],
        any::<bool>(),
    );
    (len, exponents).prop_flat_map(|(len, (a, b, is_swapped))| {
        let (a, b) = if is_swapped { (b, a) } else { (a, b) };
        (twins(len, a), twins(len, b))
    })
}

fn twins(len: u64, exponent: u8) -> impl Strategy<Value = Twin> {
    let range = (0..=len, 0..=len).prop_map(|(a, b)| a.min(b)..a.max(b));
    let short =
        (0..=len, 0u64..400).prop_map(move |(start, bytes)| start..(start + bytes).min(len));
    let steps = prop::collection::vec((any::<bool>(), prop_oneof![range, short]), 0..40);
    steps.prop_map(move |steps| {
        let mut twin = Twin::new(len, exponent);
        for (value, range) in steps {
            let _ = if value {
                twin.set(range)
            } else {
                twin.reset_inner(range)
            };
        }
        twin
    })
}

fn map_like(twin: &Twin) -> HBitmap {
    map_of(twin.len, twin.granularity.exponent(), &twin.runs())
}

fn union_of(len: u64, exponent: u8, operands: [&Twin; 2]) -> Twin {
    let mut union = Twin::new(len, exponent);
    for run in operands.into_iter().flat_map(Twin::runs) {
        union.set(run);
    }
    union
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn merge_is_the_union_rounded_outward((a, b) in pairs(), exponent in 0u8..=12) {
        let (map_a, map_b) = (map_like(&a), map_like(&b));

        let union = HBitmap::union(&map_a, &map_b, granularity(exponent)).unwrap();
        assert_same(&union, &union_of(a.len, exponent, [&a, &b]));
        prop_assert_eq!(&union, &HBitmap::union(&map_b, &map_a, granularity(exponent)).unwrap());
        for run in map_a.runs().chain(map_b.runs()) {
            prop_assert!(union.all_dirty_in(run), "lost {}", run);
        }

        let mut merged = map_a.clone();
        let changed = merged.merge_from(&map_b).unwrap();
        assert_same(&merged, &union_of(a.len, a.granularity.exponent(), [&a, &b]));
        prop_assert_eq!(changed, merged != map_a);
        prop_assert_eq!(merged.merge_from(&map_b), Ok(false));
        prop_assert_eq!(map_b, map_like(&b));
    }

    #[test]
    fn subtract_clears_only_granules_that_the_other_has_all_of((a, b) in pairs()) {
        let (before, other) = (map_like(&a), map_like(&b));
        let mut difference = before.clone();
        let changed = difference.subtract(&other).unwrap();
        let mut expected = a.clone();
        for granule in 0..a.dirty.len() {
            if a.bytes_of(granule).all(|offset| b.has_byte(offset)) {
                expected.dirty[granule] = false;
            }
        }
        assert_same(&difference, &expected);
        prop_assert_eq!(changed, difference != before);
    }

    #[test]
    fn copy_from_takes_all_and_keeps_nothing((a, b) in pairs()) {
        let mut copy = map_like(&a);
        copy.copy_from(&map_like(&b)).unwrap();
        let nothing = Twin::new(a.len, 0);
        assert_same(&copy, &union_of(a.len, a.granularity.exponent(), [&b, &nothing]));
    }

    #[test]
    fn intersects_if_a_byte_is_dirty_in_both((a, b) in pairs()) {
        let expected = (0..a.len).any(|offset| a.has_byte(offset) && b.has_byte(offset));
        let (a, b) = (map_like(&a), map_like(&b));
        prop_assert_eq!(a.intersects(&b), Ok(expected));
        prop_assert_eq!(b.intersects(&a), Ok(expected));
    }
}

/// The least there can be in common, where a search that skips a byte too many misses it.
#[test]
fn intersects_in_a_single_byte() {
    for offset in [16, 17, 20, 31] {
        let (coarse, fine) = (
            map_of(1000, 4, &[16..32]),
            map_of(1000, 0, &[offset..offset + 1]),
        );
        assert_eq!(coarse.intersects(&fine), Ok(true), "{offset}");
        assert_eq!(fine.intersects(&coarse), Ok(true), "{offset}");
    }
    let (coarse, around) = (
        map_of(1000, 4, &[16..32]),
        map_of(1000, 0, &[0..16, 32..1000]),
    );
    assert_eq!(coarse.intersects(&around), Ok(false));
    assert_eq!(around.intersects(&coarse), Ok(false));
}

/// Operands that agree with each other but not with the result are combined all the same.
#[test]
fn union_of_two_granularities_in_a_third() {
    let a = map_of(1 << 20, 16, &[0..1]);
    let b = map_of(1 << 20, 16, &[1 << 19..(1 << 19) + 1]);
    let union = HBitmap::union(&a, &b, granularity(12)).unwrap();
    assert_eq!(runs(&union), [0..1 << 16, 1 << 19..(1 << 19) + (1 << 16)]);
    assert_eq!(union.count(), 32);
    union.check_invariants();
}

#[test]
fn maps_of_different_length_are_not_combined() {
    // As many granules, and still not as many bytes.
    let (mut a, b) = (map_of(1000, 4, &[0..100]), map_of(1001, 4, &[500..600]));
    let before = a.clone();
    let error = MergeError::LengthMismatch {
        len: 1000,
        other_len: 1001,
    };
    assert_eq!(a.merge_from(&b), Err(error));
    assert_eq!(a.subtract(&b), Err(error));
    assert_eq!(a.copy_from(&b), Err(error));
    assert_eq!(a.intersects(&b), Err(error));
    assert_eq!(
        HBitmap::union(&a, &b, granularity(4)),
        Err(UnionError::Merge(error))
    );
    assert_eq!(a, before);

    let huge = HBitmap::new(1 << 50, granularity(30)).unwrap();
    let error = CreateError::TooManyGranules { granules: 1 << 50 };
    assert_eq!(
        HBitmap::union(&huge, &huge, granularity(0)),
        Err(UnionError::Create(error))
    );
}

#[test]
fn debug_is_short() {
    let map = map_of(1 << 40, 16, &[0..1 << 40]);
    let expected = "HBitmap { len: 1099511627776, granularity: Granularity(64 KiB), \
                    dirty_bytes: 1099511627776 }";
    assert_eq!(format!("{map:?}"), expected);
}
