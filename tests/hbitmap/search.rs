//! Queries, for all ranges of small maps and at the boundaries of large ones.

use std::ops::Range;

use blockjob::bitmap::Status;
use blockjob::{ByteRange, HBitmap};

use crate::twin::*;

/// Every start and end of a map of three words, for patterns of all kinds.
#[test]
pub(crate) fn queries_agree_for_every_range_of_three_words() {
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
