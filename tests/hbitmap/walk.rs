//! Iterating, also while the map changes.

use blockjob::{Granularity, HBitmap};
use proptest::prelude::*;

use crate::model::{Op, scenarios};
use crate::twin::*;

fn collect(map: &HBitmap, first: u64) -> Vec<u64> {
    let mut cursor = map.cursor(first);
    std::iter::from_fn(|| cursor.next(map)).collect()
}

#[test]
fn iter_of_a_clean_map_ends_at_once() {
    assert!(collect(&map(L3, 0), 0).is_empty());
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
    assert!(collect(&map, L3).is_empty());
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
pub(crate) fn iter_sees_what_is_set_ahead_also_in_the_word_it_is_in() {
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
    map.set(L3 - 1..L3).unwrap();
    assert_eq!(cursor.next(&map), None, "it has ended");
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
                _ => {}
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

/// The largest map that there can be, or that the machine has memory for. Only a few pages are touched.
#[test]
#[cfg(target_pointer_width = "64")]
fn the_largest_map_is_walked_by_what_is_dirty() {
    let (mut map, len) = (35..=41)
        .rev()
        .map(|log2| (map(1 << log2, 0), 1u64 << log2))
        .find_map(|(mut map, len)| map.reserve().ok().map(|()| (map, len)))
        .expect("4 GiB of address space");
    let starts = [0, 63, L3, len / 2 - 1, len / 2, len - L2 - 1, len - 1];
    for start in starts {
        assert_eq!(map.set_at(start), Ok(true));
    }
    assert_eq!(map.count(), starts.len() as u64);
    assert!(map.iter().eq(starts));
    assert_eq!(collect(&map, 64), starts[2..]);
    assert_eq!(map.next_dirty(L3 + 1..len), Some(len / 2 - 1));
    assert_eq!(map.next_clean(len / 2 - 1..len), Some(len / 2 + 1));
    assert_eq!(map.status(64..len).unwrap().range(), (64..L3).into());
    let mut part = [0; 1024];
    map.serialize_part(len - 8192..len, &mut part).unwrap();
    assert_eq!(part[511..513], [0x80, 0]);
    assert_eq!((part[1022], part[1023]), (0, 0x80));
    assert_eq!(map.deserialize_zeroes(len - 8192..len), Ok(true));
    for start in &starts[..5] {
        assert_eq!(map.reset(*start..start + 1), Ok(true));
    }
    assert!(map.is_clean());
    assert_eq!(map.next_dirty(0..len), None);
}
