//! What a tracked bitmap says has changed, against its own bytes before and after.

use std::ops::Range;

use blockjob::bitmap::{CreateError, RangeError, TrackedBitmap};
use blockjob::{ByteRange, Granularity, HBitmap};
use proptest::prelude::*;

use crate::model::{Op, scenarios, step};
use crate::twin::*;

fn tracked(len: u64, exponent: u8, chunk_len: u64) -> TrackedBitmap {
    let tracked = TrackedBitmap::new(map(len, exponent), chunk_len);
    assert!(tracked.changes().is_clean());
    tracked
}

/// All chunks of a map, and the bytes of each.
fn chunks(map: &TrackedBitmap) -> Vec<(ByteRange, Vec<u8>)> {
    let len = map.bitmap().len();
    let chunk = map.changes().granularity().bytes();
    let chunk_at = |at: u64| ByteRange::from(at * chunk..len.min((at + 1).saturating_mul(chunk)));
    let count = map.changes().granules();
    (0..count)
        .map(|at| {
            let range = chunk_at(at);
            let mut bytes = vec![0; map.bitmap().serialized_len(range).unwrap()];
            map.bitmap().serialize_part(range, &mut bytes).unwrap();
            (range, bytes)
        })
        .collect()
}

fn changed(map: &TrackedBitmap) -> Vec<ByteRange> {
    map.changes().check_invariants();
    assert_eq!(map.changes().len(), map.bitmap().len());
    let chunks = map.changes().iter();
    let chunk = map.changes().granularity().bytes();
    let len = map.bitmap().len();
    chunks
        .map(|start| (start..len.min(start.saturating_add(chunk))).into())
        .collect()
}

/// Each chunk is marked if its bytes differ from what they were, and only then. Truncating may mark more.
pub(crate) fn check_each_change(len: u64, exponent: u8, chunk_len: u64, ops: &[Op]) {
    let mut map = tracked(len, exponent, chunk_len);
    let mut twin = Twin::new(len, exponent);
    for op in ops {
        map.take_changes();
        let before = chunks(&map);
        step(&mut map, &mut twin, op);
        let differs = |(at, now): (usize, &(ByteRange, Vec<u8>))| {
            (before.get(at) != Some(now)).then_some(now.0)
        };
        let after = chunks(&map);
        let differing: Vec<_> = after.iter().enumerate().filter_map(differs).collect();
        let marked = changed(&map);
        if matches!(op, Op::Truncate(..)) {
            // Where only bytes were won or lost in the last granule, nothing has changed.
            let has_same_bytes = |range: &ByteRange| {
                let bytes = |chunks: &[(ByteRange, Vec<u8>)]| {
                    let chunk = chunks.iter().find(|chunk| chunk.0.start() == range.start());
                    chunk.map(|chunk| chunk.1.clone())
                };
                bytes(&before) == bytes(&after)
            };
            for range in differing {
                assert!(
                    marked.contains(&range) || has_same_bytes(&range),
                    "{op:?}: {range}"
                );
            }
            assert!(marked.len() <= after.len().saturating_sub(before.len()) + 1);
        } else {
            assert_eq!(marked, differing, "{op:?}");
        }
    }
}

/// Whoever sends what is marked, now and then, has the same map in the end.
fn check_sending(len: u64, exponent: u8, chunk_len: u64, ops: &[Op], seed: u64) {
    let mut map = tracked(len, exponent, chunk_len);
    let mut sent = map.bitmap().clone();
    let mut twin = Twin::new(len, exponent);
    for (at, op) in ops.iter().enumerate() {
        step(&mut map, &mut twin, op);
        sent.truncate(map.bitmap().len()).unwrap();
        if seed >> (at % 64) & 1 == 1 {
            send(&mut map, &mut sent);
            assert_eq!(&sent, map.bitmap());
        }
    }
    send(&mut map, &mut sent);
    assert_eq!(&sent, map.bitmap());
}

fn send(map: &mut TrackedBitmap, sent: &mut HBitmap) {
    while let Some(start) = map.changes().next_dirty(0..u64::MAX) {
        let end = map.bitmap().len();
        let chunk = map.changes().granularity().bytes();
        let range = start..end.min(start.saturating_add(chunk));
        assert_eq!(map.clear_changes(range.clone()), Ok(true));
        let mut bytes = vec![0; map.bitmap().serialized_len(range.clone()).unwrap()];
        map.bitmap()
            .serialize_part(range.clone(), &mut bytes)
            .unwrap();
        sent.deserialize_part(range, &bytes).unwrap();
    }
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn every_change_is_marked_and_nothing_else(
        (len, exponent, ops) in scenarios(),
        chunk_len in prop::sample::select(vec![8u64, 16, 64, 512, 1024, 1 << 20]),
    ) {
        check_each_change(len, exponent, chunk_len, &ops);
    }

    #[test]
    fn what_is_marked_is_enough_to_send(
        (len, exponent, ops) in scenarios(),
        chunk_len in prop::sample::select(vec![8u64, 64, 1024]),
        seed in any::<u64>(),
    ) {
        check_sending(len, exponent, chunk_len, &ops, seed);
    }
}

// --- By example --------------------------------------------------------------------------------

#[test]
fn chunks_have_the_bytes_asked_for() {
    for (chunk_len, expected) in [(0, 8), (1, 8), (8, 8), (9, 16), (1000, 1024), (1024, 1024)] {
        let map = tracked(1 << 40, 16, chunk_len);
        let chunk = map.changes().granularity().bytes();
        assert_eq!(chunk, map.bitmap().coverage(expected));
    }
    let coarsest = Granularity::from_exponent(63).unwrap();
    let coarse = HBitmap::LEN_MAX;
    for (len, exponent, chunk_len) in [
        (1 << 40, 16, u64::MAX),
        (1 << 40, 16, 1 << 62),
        (coarse, 57, 8),
        (coarse, 57, 1024),
        (coarse, 63, 8),
    ] {
        let mut map = tracked(len, exponent, chunk_len);
        assert_eq!(map.changes().granularity(), coarsest);
        assert_eq!(map.changes().granules(), 1, "the whole map is one chunk");
        assert_eq!(map.set_at(len - 1), Ok(true));
        assert_eq!(map.take_changes().count(), 1);
        let last = map.bitmap().word_count() - 1;
        assert_eq!(map.import_words(last, &[0]), Ok(true));
        assert_eq!(map.changes().count(), 1);
    }
}

/// What changes within a word counts, and in a word amid a long run.
#[test]
pub(crate) fn a_bit_is_enough_in_both_directions() {
    let mut map = tracked(L3, 0, 8);
    const NONE: [u64; 0] = [];
    let mut marks = |change: &dyn Fn(&mut TrackedBitmap) -> bool| {
        map.take_changes();
        change(&mut map);
        map.changes()
            .iter()
            .map(|start| start / 64)
            .collect::<Vec<_>>()
    };
    assert_eq!(marks(&|map| map.set(70..75).unwrap()), [1]);
    assert_eq!(marks(&|map| map.set(70..75).unwrap()), NONE);
    assert_eq!(
        marks(&|map| map.reset(71..72).unwrap()),
        [1],
        "the word keeps granules"
    );
    assert_eq!(
        marks(&|map| map.set(0..256).unwrap()),
        [0, 1, 2, 3],
        "and fills a word that had some"
    );
    assert_eq!(marks(&|map| map.reset(200..201).unwrap()), [3]);
    assert_eq!(
        marks(&|map| map.set(0..256).unwrap()),
        [3],
        "all but one were dirty"
    );
    assert_eq!(marks(&|map| map.reset(500..L3).unwrap()), NONE);
    assert_eq!(marks(&|map| map.reset_all()), [0, 1, 2, 3]);
    assert_eq!(marks(&|map| map.set_at(L3 - 1).unwrap()), [L3 / 64 - 1]);
    assert_eq!(marks(&|map| map.set_all()).len(), 4096);
    assert_eq!(marks(&|map| map.set_all()), NONE);
    assert_eq!(marks(&|map| map.reset_inner(L2 + 1..L2 + 2).unwrap()), [64]);
    assert_eq!(marks(&|map| map.set(0..L3).unwrap()), [64]);
}

#[test]
fn changes_are_taken_cleared_and_put_back() {
    let mut map = tracked(1 << 30, 16, 64);
    let chunk = map.changes().granularity().bytes();
    map.set(0..2 * chunk + 1).unwrap();
    assert_eq!(map.changes().count(), 3);
    assert_eq!(map.clear_changes(chunk..2 * chunk), Ok(true));
    assert_eq!(map.clear_changes(chunk..2 * chunk), Ok(false));
    assert!(matches!(
        map.clear_changes(0..chunk + 1),
        Err(RangeError::Unaligned { .. })
    ));
    assert!(map.mark_changed(0..u64::MAX).is_err());
    let taken = map.take_changes();
    assert!(taken.iter().eq([0, 2 * chunk]));
    assert!(map.changes().is_clean());
    assert_eq!(
        map.mark_changed(2 * chunk..2 * chunk + 1),
        Ok(true),
        "it could not be sent"
    );
    assert!(map.changes().iter().eq([2 * chunk]));
    assert_eq!(map.into_bitmap().count(), 2 * (chunk >> 16) + 1);
}

#[test]
fn errors_mark_nothing() {
    let mut map = tracked(1 << 20, 4, 8);
    map.set(0..1 << 19).unwrap();
    map.take_changes();
    let before = map.clone();
    let other = map_of((1 << 20) + 1, 4, &[0..1 << 20]);
    assert!(map.set(0..1 << 21).is_err());
    assert!(map.set_at(1 << 20).is_err());
    assert!(map.reset(0..1001).is_err());
    assert!(map.reset(0..1 << 21).is_err());
    assert!(map.reset_inner(0..1 << 21).is_err());
    assert!(map.merge_from(&other).is_err());
    assert!(map.subtract(&other).is_err());
    assert!(map.retain(&other).is_err());
    assert!(map.copy_from(&other).is_err());
    assert!(map.deserialize_part(0..1 << 20, &[0; 8]).is_err());
    assert!(map.deserialize_zeroes(0..1001).is_err());
    assert!(map.deserialize_ones(0..1 << 21).is_err());
    assert!(map.import_words(1 << 10, &[0]).is_err());
    assert!(map.truncate(u64::MAX).is_err());
    assert_eq!(map, before);
}

/// Long runs over what is uniform take a few steps and not one per chunk.
#[test]
fn long_runs_of_large_maps_are_quick() {
    let len = 1u64 << 38;
    let mut map = tracked(len, 8, 8);
    for _ in 0..10 {
        assert!(map.set_all());
        assert_eq!(map.take_changes().count(), len >> 14);
        assert!(!map.set_all());
        assert!(map.reset(0..1 << 8).unwrap());
        assert!(map.set_all());
        assert_eq!(map.take_changes().count(), 1);
        assert!(map.reset_all());
        assert!(!map.reset_all());
        assert_eq!(map.take_changes().count(), len >> 14);
    }
}

#[test]
#[cfg(target_pointer_width = "64")]
fn growing_without_memory_changes_nothing() {
    let granules = HBitmap::GRANULES_MAX;
    let error = CreateError::OutOfMemory { granules };
    if map(granules, 0).reserve() != Err(error) {
        eprintln!("SKIPPED: this machine grants memory that it does not have");
        return;
    }
    let mut map = tracked(1000, 0, 8);
    map.set(5..6).unwrap();
    let before = map.clone();
    assert_eq!(map.truncate(granules), Err(error));
    assert_eq!(map, before);
    assert_eq!(map.deserialize_ones(0..1000), Ok(true));
    let grown: Range<u64> = 960..1100;
    map.take_changes();
    map.truncate(1100).unwrap();
    assert_eq!(runs(map.changes()), [grown]);
}
