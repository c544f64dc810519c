//! Sizes, setting and resetting, case by case.

use std::ops::Range;

use blockjob::HBitmap;
use blockjob::bitmap::{CreateError, RangeError};

use crate::twin::*;

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
pub(crate) fn limits_are_checked_before_memory_is_asked_for() {
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
pub(crate) fn reset_never_rounds_outward() {
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
pub(crate) fn set_may_end_in_the_partial_last_granule_but_not_past_it() {
    let mut map = map(1000, 4);
    assert_eq!(map.set(999..1008), Ok(true));
    assert_eq!(map.dirty_bytes(), 16);
    assert_eq!(map.dirty_bytes_in_len(), 8);
    assert_eq!(runs(&map), [992..1000]);
    assert!(matches!(
        map.set(500..1009),
        Err(RangeError::OutOfBounds { .. })
    ));
    assert_eq!(runs(&map), [992..1000], "as before");
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
