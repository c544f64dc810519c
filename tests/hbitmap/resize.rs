//! Growing and shrinking, by less than a granule up to several levels.

use blockjob::HBitmap;
use blockjob::bitmap::CreateError;

use crate::twin::*;

/// Truncates maps with something at both ends, with all and with nothing, and asks about both ends.
fn resized(exponent: u8, from: u64, to: u64) {
    let granule = 1 << exponent;
    let around = |at: u64| at.saturating_sub(3 * granule)..at;
    let patterns = [
        vec![around(from), around(to.min(from))],
        vec![0..from],
        vec![],
        vec![0..from.min(1), from.saturating_sub(1)..from],
        vec![to.min(from)..from],
        vec![0..to.min(from)],
    ];
    // The twin of a large map is slow.
    let is_large = from.max(to) >> exponent > 3 * L2;
    for pattern in patterns.into_iter().take(if is_large { 2 } else { 6 }) {
        let mut map = map_of(from, exponent, &pattern);
        let mut twin = Twin::new(from, exponent);
        for range in &pattern {
            twin.set(range.clone());
        }
        map.truncate(to).unwrap();
        twin.truncate(to);
        assert_same(&map, &twin);
        for at in [0, from, to] {
            for start in [at.saturating_sub(granule), at.saturating_sub(1), at] {
                for end in [to, from, u64::MAX] {
                    assert_same_answers(&map, &twin, start..end.max(start), granule);
                }
            }
        }

        // What is new takes bits like the rest, and going back forgets them.
        assert_eq!(map.set(0..to).ok(), twin.set(0..to));
        assert_same(&map, &twin);
        map.truncate(from).unwrap();
        twin.truncate(from);
        assert_same(&map, &twin);
        if let Some(last) = from.checked_sub(1) {
            assert_eq!(map.set_at(last).ok(), twin.set(last..from));
            assert_same(&map, &twin);
        }
    }
}

const EXPONENTS: [u8; 4] = [0, 1, 4, 16];

/// Granules and bytes at which a granule, a word, a block or a level begins.
const SIZES: [u64; 6] = [1, L1, L1 * 3, L2, L2 * 2 + L1, L3];

#[test]
fn truncate_nop() {
    for exponent in EXPONENTS {
        for size in SIZES {
            resized(exponent, size << exponent, size << exponent);
        }
    }
    resized(0, 0, 0);
}

#[test]
fn truncate_grow_and_shrink_negligible() {
    for exponent in EXPONENTS.into_iter().filter(|exponent| *exponent > 0) {
        for size in SIZES {
            let (whole, partial) = (size << exponent, (size << exponent) - 1);
            resized(exponent, partial, whole);
            resized(exponent, whole, partial);
            let mut map = map_of(partial, exponent, &[partial - 1..partial]);
            map.truncate(whole).unwrap();
            assert!(
                map.all_dirty_in(partial - 1..whole),
                "the granule has grown"
            );
        }
    }
}

#[test]
fn truncate_grow_and_shrink_tiny() {
    for exponent in EXPONENTS.into_iter().filter(|exponent| *exponent > 0) {
        for size in SIZES {
            let (whole, more) = (size << exponent, (size << exponent) + 1);
            resized(exponent, whole, more);
            resized(exponent, more, whole);
            resized(exponent, whole - 1, more);
            resized(exponent, more, whole - 1);
        }
    }
}

#[test]
fn truncate_grow_and_shrink_small() {
    for exponent in EXPONENTS {
        for size in SIZES {
            resized(exponent, size << exponent, (size + 31) << exponent);
            resized(exponent, (size + 31) << exponent, size << exponent);
        }
    }
}

#[test]
fn truncate_grow_and_shrink_medium() {
    for exponent in EXPONENTS {
        for size in SIZES {
            resized(exponent, (size + 40) << exponent, (size + 90) << exponent);
            resized(exponent, (size + 90) << exponent, (size + 40) << exponent);
        }
    }
}

#[test]
fn truncate_grow_and_shrink_large() {
    for exponent in EXPONENTS {
        for size in SIZES {
            for by in [L1 * 8, L2, L3 + 1] {
                // The largest differ from each other in nothing but the time they take.
                if size + by > L3 + L2 && exponent % 16 != 0 {
                    continue;
                }
                resized(exponent, size << exponent, (size + by) << exponent);
                resized(exponent, (size + by) << exponent, size << exponent);
            }
        }
    }
}

#[test]
fn truncate_to_nothing_and_from_nothing() {
    for exponent in EXPONENTS {
        for size in [1, L1, L2 + 1] {
            resized(exponent, size << exponent, 0);
            resized(exponent, 0, size << exponent);
        }
    }
}

#[test]
fn truncate_shrinks_and_grows_and_has_forgotten() {
    let mut map = map_of(1 << 20, 4, &[0..1 << 20]);
    map.truncate(500_000).unwrap();
    map.truncate(1 << 20).unwrap();
    assert_eq!(runs(&map), [0..500_000]);
}

#[test]
fn truncate_beyond_the_limits_changes_nothing() {
    for map in [map(1000, 0), map_of(1000, 0, &[0..1, 900..1000])] {
        let mut same = map.clone();
        let len = HBitmap::LEN_MAX + 1;
        assert_eq!(same.truncate(len), Err(CreateError::TooLong { len }));
        let granules = HBitmap::GRANULES_MAX + 1;
        assert_eq!(
            same.truncate(granules),
            Err(CreateError::TooManyGranules { granules })
        );
        assert_eq!(same, map);
        same.check_invariants();
    }
}

#[test]
#[cfg(target_pointer_width = "64")]
fn truncate_without_memory_changes_nothing() {
    let granules = HBitmap::GRANULES_MAX;
    let error = CreateError::OutOfMemory { granules };
    if map(granules, 0).reserve() != Err(error) {
        eprintln!("SKIPPED: this machine grants memory that it does not have");
        return;
    }
    let mut map = map_of(1000, 0, &[0..1, 900..1000]);
    let before = map.clone();
    assert_eq!(map.truncate(granules), Err(error));
    assert_eq!(map, before);
    map.check_invariants();
}

#[test]
fn truncate_of_a_clean_map_takes_no_memory() {
    let mut map = map(0, 0);
    map.truncate(HBitmap::GRANULES_MAX).unwrap();
    assert_eq!(map.granules(), HBitmap::GRANULES_MAX);
    assert_eq!(map.next_dirty(0..u64::MAX), None);
    assert_eq!(map.next_clean(1 << 33..u64::MAX), Some(1 << 33));
    map.truncate(100).unwrap();
    map.set_all();
    assert_eq!(runs(&map), [0..100]);
}
