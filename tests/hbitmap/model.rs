//! Random operations of all kinds on a map and its twin.

use std::fmt::Debug;
use std::ops::Range;

use blockjob::HBitmap;
use blockjob::bitmap::TrackedBitmap;
use proptest::prelude::*;

use crate::twin::*;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Set(Range<u64>),
    SetAt(u64),
    Reset(Range<u64>),
    ResetInner(Range<u64>),
    SetAll,
    ResetAll,
    /// To so many granules and bytes more or less.
    Truncate(u64, i64),
    Merge(Other),
    Subtract(Other),
    Retain(Other),
    CopyFrom(Other),
    /// Some words of this kind, as words.
    Import(Range<usize>, Kind),
    /// The same as the bytes of a part.
    Load(Range<usize>, Kind),
    LoadZeroes(Range<usize>),
    LoadOnes(Range<usize>),
    Ask(Range<u64>, u64),
    /// A map that was like this becomes a clone, and is used from then on.
    CloneFrom(Other),
    /// Full words are written.
    Write,
}

/// A map of the same length to be made.
#[derive(Clone, Debug)]
pub(crate) struct Other {
    exponent: u8,
    /// What is set, as parts of 2^16 of its length, and what of that is reset again.
    steps: Vec<(bool, Range<u64>)>,
}

impl Other {
    fn twin(&self, len: u64) -> Twin {
        let mut twin = Twin::new(len, self.exponent);
        for (value, part) in &self.steps {
            let at = |part: u64| ((u128::from(len) * u128::from(part)) >> 16) as u64;
            let range = at(part.start)..at(part.end);
            let _ = if *value {
                twin.set(range)
            } else {
                twin.reset_inner(range)
            };
        }
        twin
    }
}

/// What words to load look like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Random(u64),
    Sparse(u64),
    /// Mostly words that are clean or dirty.
    Uniform(u64),
    Dirty,
    Clean,
}

impl Kind {
    pub(crate) fn words(self, count: usize) -> Vec<u64> {
        let word = |at: usize| {
            let random = |seed: u64| {
                let mixed = (seed ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                (mixed ^ mixed >> 29)
                    .wrapping_mul(0xbf58_476d_1ce4_e5b9)
                    .rotate_left(31)
            };
            match self {
                Kind::Random(seed) => random(seed),
                Kind::Sparse(seed) => match random(seed) {
                    word if word % 5 == 0 => 1 << (word >> 58),
                    _ => 0,
                },
                Kind::Uniform(seed) => match random(seed) % 200 {
                    0 => random(seed),
                    // In stretches, of which some are as long as several blocks.
                    _ => 0u64.wrapping_sub(random((seed >> 8) ^ (at as u64 / 150)) % 2),
                },
                Kind::Dirty => !0,
                Kind::Clean => 0,
            }
        };
        (0..count).map(word).collect()
    }
}

// --- What to do --------------------------------------------------------------------------------

fn ops(len: u64, exponent: u8) -> impl Strategy<Value = Op> {
    let range = || ranges(len, exponent);
    let bytes_max = prop_oneof![
        Just(u64::MAX),
        0u64..10,
        Just(1 << exponent),
        Just(100 << exponent)
    ];
    let grown = (prop::sample::select(&COUNTS), -2i64..=2);
    prop_oneof![
        12 => range().prop_map(Op::Set),
        3 => offsets(len, exponent).prop_map(Op::SetAt),
        10 => range().prop_map(Op::Reset),
        6 => range().prop_map(Op::ResetInner),
        2 => Just(Op::SetAll),
        2 => Just(Op::ResetAll),
        3 => grown.prop_map(|(granules, by)| Op::Truncate(granules, by)),
        3 => others(exponent).prop_map(Op::Merge),
        3 => others(exponent).prop_map(Op::Subtract),
        3 => others(exponent).prop_map(Op::Retain),
        2 => others(exponent).prop_map(Op::CopyFrom),
        3 => (words(len, exponent), kinds()).prop_map(|(words, kind)| Op::Import(words, kind)),
        4 => (words(len, exponent), kinds()).prop_map(|(words, kind)| Op::Load(words, kind)),
        1 => words(len, exponent).prop_map(Op::LoadZeroes),
        1 => words(len, exponent).prop_map(Op::LoadOnes),
        16 => (range(), bytes_max).prop_map(|(range, bytes_max)| Op::Ask(range, bytes_max)),
        1 => others(exponent).prop_map(Op::CloneFrom),
        1 => Just(Op::Write),
    ]
}

/// Maps to combine with, hardly finer so that the twin stays small, and as often equally fine.
fn others(exponent: u8) -> impl Strategy<Value = Other> {
    let exponents = prop_oneof![3 => Just(0i8), 1 => -2i8..=1, 1 => 1i8..=9];
    let exponents = exponents.prop_map(move |by| exponent.saturating_add_signed(by));
    let part = (0u64..=1 << 16, 0u64..=1 << 16).prop_map(|(a, b)| a.min(b)..a.max(b));
    let short = (0u64..1 << 16, 0u64..300);
    let short = short.prop_map(|(start, len)| start..(start + len).min(1 << 16));
    let whole = Just(0..1 << 16);
    let step = (
        any::<bool>(),
        prop_oneof![3 => part, 5 => short, 1 => whole],
    );
    let steps = prop_oneof![1 => prop::collection::vec(step.clone(), 0..3), 2 => prop::collection::vec(step, 0..60)];
    (exponents, steps).prop_map(|(exponent, steps)| Other { exponent, steps })
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => any::<u64>().prop_map(Kind::Random),
        3 => any::<u64>().prop_map(Kind::Sparse),
        3 => any::<u64>().prop_map(Kind::Uniform),
        1 => Just(Kind::Dirty),
        1 => Just(Kind::Clean),
    ]
}

/// Words, also some that are not there.
fn words(len: u64, exponent: u8) -> impl Strategy<Value = Range<usize>> {
    let count = (len >> exponent).div_ceil(64) as usize;
    let edge = prop_oneof![
        2 => 0..=count,
        2 => prop::sample::select(vec![0, 1, 63, 64, 65, 128, 4095, 4096]),
        2 => Just(count),
        1 => count..=count + 1,
    ];
    (edge.clone(), edge).prop_map(|(a, b)| a.min(b)..a.max(b))
}

pub(crate) fn scenarios() -> impl Strategy<Value = (u64, u8, Vec<Op>)> {
    sizes(&COUNTS).prop_flat_map(|(len, exponent)| {
        (
            Just(len),
            Just(exponent),
            prop::collection::vec(ops(len, exponent), 1..40),
        )
    })
}

// --- Doing it ----------------------------------------------------------------------------------

/// What both kinds of bitmaps can do.
pub(crate) trait Subject: Clone + Debug + PartialEq {
    fn bitmap(&self) -> &HBitmap;
    /// Does it if it changes a map, and says whether it did; nothing if it failed.
    fn change(&mut self, op: &Op) -> Option<bool>;
}

macro_rules! change {
    ($map:expr, $bitmap:expr, $op:expr) => {{
        let (len, granularity) = ($bitmap.len(), $bitmap.granularity());
        let other = |other: &Other| map_like(&other.twin(len));
        // Beyond the last word there is nothing to begin with.
        let part = |words: &Range<usize>| {
            let align = granularity.bytes() * 64;
            let end = (words.end as u64 * align).min(len.next_multiple_of(granularity.bytes()));
            words.start as u64 * align..end.max(words.start as u64 * align)
        };
        match $op {
            Op::Set(range) => $map.set(range.clone()).ok(),
            Op::SetAt(offset) => $map.set_at(*offset).ok(),
            Op::Reset(range) => $map.reset(range.clone()).ok(),
            Op::ResetInner(range) => $map.reset_inner(range.clone()).ok(),
            Op::SetAll => Some($map.set_all()),
            Op::ResetAll => Some($map.reset_all()),
            Op::Truncate(granules, by) => {
                let len = (granules << granularity.exponent()).saturating_add_signed(*by);
                $map.truncate(len).ok().map(|()| false)
            }
            Op::Merge(with) => $map.merge_from(&other(with)).ok(),
            Op::Subtract(with) => $map.subtract(&other(with)).ok(),
            Op::Retain(with) => $map.retain(&other(with)).ok(),
            Op::CopyFrom(with) => $map.copy_from(&other(with)).ok().map(|()| false),
            Op::Import(words, kind) => $map
                .import_words(words.start, &kind.words(words.len()))
                .ok(),
            Op::Load(words, kind) => {
                let words_of_kind = kind.words(words.len());
                let bytes: Vec<u8> = words_of_kind
                    .iter()
                    .flat_map(|word| word.to_le_bytes())
                    .collect();
                $map.deserialize_part(part(words), &bytes).ok()
            }
            Op::LoadZeroes(words) => $map.deserialize_zeroes(part(words)).ok(),
            Op::LoadOnes(words) => $map.deserialize_ones(part(words)).ok(),
            Op::Ask(..) | Op::CloneFrom(_) | Op::Write => Some(false),
        }
    }};
}

impl Subject for HBitmap {
    fn bitmap(&self) -> &HBitmap {
        self
    }

    fn change(&mut self, op: &Op) -> Option<bool> {
        change!(self, self, op)
    }
}

impl Subject for TrackedBitmap {
    fn bitmap(&self) -> &HBitmap {
        self.bitmap()
    }

    fn change(&mut self, op: &Op) -> Option<bool> {
        change!(self, self.bitmap(), op)
    }
}

/// Does it to the twin, and says whether it can be done.
fn change_twin(twin: &mut Twin, op: &Op) -> bool {
    let len = twin.len;
    let is_there = |twin: &Twin, words: &Range<usize>| words.end <= twin.word_count();
    match op {
        Op::Set(range) => return twin.set(range.clone()).is_some(),
        Op::SetAt(offset) => return *offset < len && twin.set(*offset..offset + 1).is_some(),
        Op::Reset(range) => return twin.reset(range.clone()).is_some(),
        Op::ResetInner(range) => return twin.reset_inner(range.clone()).is_some(),
        Op::SetAll => twin.dirty.fill(true),
        Op::ResetAll => twin.dirty.fill(false),
        Op::Truncate(granules, by) => {
            twin.truncate((granules << twin.granularity.exponent()).saturating_add_signed(*by));
        }
        Op::Merge(other) => twin.merge_from(&other.twin(len)),
        Op::Subtract(other) => twin.subtract(&other.twin(len)),
        Op::Retain(other) => twin.retain(&other.twin(len)),
        Op::CopyFrom(other) => twin.copy_from(&other.twin(len)),
        Op::Import(words, kind) if is_there(twin, words) => {
            twin.import_words(words.start, &kind.words(words.len()));
        }
        // An empty part is one wherever it is.
        Op::Load(words, kind) if words.is_empty() || is_there(twin, words) => {
            twin.import_words(words.start, &kind.words(words.len()));
        }
        Op::LoadZeroes(words) => twin.import_words(words.start, &vec![0; words.len()]),
        Op::LoadOnes(words) => twin.import_words(words.start, &vec![!0; words.len()]),
        Op::Import(..) | Op::Load(..) => return false,
        Op::Ask(..) | Op::CloneFrom(_) | Op::Write => {}
    }
    true
}

/// Does it to both, and sees to it that it comes to the same.
pub(crate) fn step(subject: &mut impl Subject, twin: &mut Twin, op: &Op) {
    let (before, twin_before) = (subject.clone(), twin.clone());
    let answer = subject.change(op);
    assert_eq!(answer.is_some(), change_twin(twin, op), "possible: {op:?}");
    match op {
        Op::Truncate(..) | Op::CopyFrom(_) => {}
        _ => {
            let has_changed = twin.dirty != twin_before.dirty;
            assert_eq!(answer.unwrap_or(false), has_changed, "answer to {op:?}");
        }
    }
    if answer.is_none() {
        assert_eq!(*subject, before, "an error changes nothing: {op:?}");
    }
    assert_same(subject.bitmap(), twin);
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn random_operations_do_what_the_twin_does((len, exponent, ops) in scenarios()) {
        let mut map = map(len, exponent);
        let mut twin = Twin::new(len, exponent);
        for op in ops {
            step(&mut map, &mut twin, &op);
            match &op {
                Op::Ask(range, bytes_max) => {
                    assert_same_answers(&map, &twin, range.clone(), *bytes_max);
                }
                Op::Merge(other) => {
                    let other = other.twin(twin.len);
                    prop_assert_eq!(map.intersects(&map_like(&other)), Ok(twin.intersects(&other)));
                }
                Op::CloneFrom(other) => {
                    let mut used = map_like(&other.twin(twin.len));
                    used.clone_from(&map);
                    prop_assert_eq!(&used, &map);
                    map = used;
                    assert_same(&map, &twin);
                }
                #[cfg(feature = "bitvec")]
                Op::Write => {
                    let granules = twin.dirty.iter();
                    prop_assert!(map.bits().iter().by_vals().eq(granules.copied()));
                    assert_same(&map, &twin);
                }
                _ => {}
            }
            let mut words = vec![0x55; twin.word_count()];
            map.export_words(0, &mut words).unwrap();
            prop_assert_eq!(words, twin.words());
        }
    }

    #[test]
    fn equal_content_is_equal_however_it_came_about((len, exponent, ops) in scenarios()) {
        let mut map = map(len, exponent);
        for op in ops {
            map.change(&op);
        }
        let (len, exponent) = (map.len(), map.granularity().exponent());
        prop_assert_eq!(&map, &map_of(len, exponent, &runs(&map)));
        prop_assert_eq!(&map, &map.clone());
        map.reset_all();
        prop_assert_eq!(map, HBitmap::new(len, granularity(exponent)).unwrap());
    }
}
