//! Two maps and what becomes of them together.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "one of the tests is about time"
)]

use std::time::{Duration, Instant};

use blockjob::HBitmap;
use blockjob::bitmap::{CreateError, MergeError, UnionError};
use proptest::prelude::*;

use crate::twin::*;

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

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn merge_commutes_associates_and_is_idempotent(
        (a, b) in pairs(),
        c in prop::collection::vec((0u64..9000, 0u64..400), 0..10),
    ) {
        // The third in the granularity of the first; all three of one length.
        let (len, exponent) = (a.len, a.granularity.exponent());
        let c = c.into_iter().map(|(start, bytes)| start.min(len)..(start + bytes).min(len));
        let c = map_of(len, exponent, &c.collect::<Vec<_>>());
        let (a, b) = (map_like(&a), map_like(&b));
        let union = |a: &HBitmap, b: &HBitmap| HBitmap::union(a, b, granularity(exponent)).unwrap();
        prop_assert_eq!(union(&a, &b), union(&b, &a));
        prop_assert_eq!(union(&union(&a, &b), &c), union(&a, &union(&b, &c)));
        prop_assert_eq!(&union(&a, &a), &a);
        let both = union(&a, &b);
        prop_assert_eq!(union(&both, &b), both);
    }

    #[test]
    fn what_is_subtracted_and_what_is_retained_make_the_whole((a, b) in pairs()) {
        let exponent = a.granularity.exponent();
        let (whole, b) = (map_like(&a), map_like(&b));
        let (mut without, mut common) = (whole.clone(), whole.clone());
        without.subtract(&b).unwrap();
        common.retain(&b).unwrap();
        let union = HBitmap::union(&without, &common, granularity(exponent)).unwrap();
        prop_assert_eq!(&union, &whole);
        let bytes = |start: u64| start..whole.len().min(start + whole.granularity().bytes());
        prop_assert!(without.iter().all(|start| !b.all_dirty_in(bytes(start))));
        prop_assert!(common.iter().all(|start| b.any_dirty_in(bytes(start))));
    }
}

/// The least there can be in common, where a search that skips a byte too many misses it.
#[test]
pub(crate) fn subtract_keeps_what_the_other_has_a_part_of() {
    let mut coarse = map_of(1 << 20, 12, &[0..1 << 20]);
    let fine = map_of(1 << 20, 9, &[0..8192, 12_288..16_384 - 512]);
    assert_eq!(coarse.subtract(&fine), Ok(true));
    assert_eq!(runs(&coarse), [8192..1 << 20]);
}

/// Two full maps are merged, and all of a map is set, walked and reset, without a look at each granule; where each
/// word has something, without one at each granule but at each word. The shortest of a few passes is taken, as
/// others use the machine, too.
#[test]
fn whole_maps_of_1_tib_take_milliseconds() {
    fn shortest(mut pass: impl FnMut()) -> Duration {
        let passes = (0..5).map(|_| {
            let began = Instant::now();
            pass();
            began.elapsed()
        });
        passes.min().expect("there are some")
    }
    const LEN: u64 = 1 << 40;
    const AT_MOST: Duration = Duration::from_millis(10);

    let full = map_of(LEN, 16, &[0..LEN]);
    let mut into = full.clone();
    assert!(shortest(|| assert_eq!(into.merge_from(&full), Ok(false))) < AT_MOST);
    let all = shortest(|| {
        into.reset_all();
        assert_eq!(into.set(0..LEN), Ok(true));
        assert_eq!(into.runs().count(), 1);
        into.reset_all();
        assert_eq!(into.merge_from(&full), Ok(true));
    });
    assert!(all < AT_MOST, "{all:?}");

    let words = |pattern: u64| vec![pattern; 1 << 18];
    let odd = HBitmap::from_words(LEN, granularity(16), &words(0xaaaa)).unwrap();
    let mut even = HBitmap::from_words(LEN, granularity(16), &words(0x5555)).unwrap();
    let merged = shortest(|| assert!(even.merge_from(&odd).is_ok()));
    assert!(merged < AT_MOST, "{merged:?}");
    assert_eq!(even.count(), (1 << 18) * 16);
}

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
