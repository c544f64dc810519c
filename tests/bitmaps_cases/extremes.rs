//! Disks and granularities at their limits.

use super::*;
use blockjob::{Grown, Transaction};

#[test]
fn names_may_have_any_bytes() {
    let node = Node::new(LEN);
    let bitmaps = node.bitmaps();
    let names = ["\0", "a\0b", "a", " ", "\u{10ffff}", "\n", "../a", "日本"];
    for name in names {
        bitmaps
            .add_disabled(name, BitmapOptions::default())
            .unwrap();
    }
    bitmaps.remove("a").unwrap();
    assert!(bitmaps.query("a\0b").is_ok(), "bytes count, not a prefix");
    let long = "x".repeat(1 << 20);
    let missing = |answer: Result<(), BitmapError>| {
        assert!(matches!(answer, Err(BitmapError::NotFound { .. })));
    };
    for name in ["", "a", &long] {
        missing(bitmaps.remove(name));
        missing(bitmaps.rename(name, "b"));
        missing(bitmaps.merge("\0", &[(&node, name)]));
        missing(bitmaps.freeze(name).map(drop));
    }
    let too_long = BitmapError::NameTooLong { bytes: long.len() };
    let add = bitmaps.add_disabled(&long, BitmapOptions::default());
    assert_eq!(add, Err(too_long.clone()));
    assert_eq!(bitmaps.rename("\0", &long), Err(too_long.clone()));
    let bits = HBitmap::new(LEN, Granularity::DEFAULT).unwrap();
    let guard = quiesced(&node);
    let import = bitmaps.import_state(&guard, vec![BitmapState::new(&*long, bits)]);
    assert_eq!(import, Err(too_long.clone()));
    let mut list = Transaction::new();
    list.rename(&node, "\0", &long);
    let error = list.prepare().try_prepared().unwrap().unwrap_err();
    assert_eq!(error.why, too_long.into());
    assert_eq!(bitmaps.query_all().len(), names.len() - 1);
}

#[test]
fn ranges_may_lie_anywhere() {
    let node = node_with(&["a"]);
    write(&node, LEN - 1..u64::MAX);
    write(&node, u64::MAX..u64::MAX);
    let page = |range: std::ops::Range<u64>, runs_max| node.bitmaps().runs("a", range, runs_max);
    let all = page(0..u64::MAX, usize::MAX).unwrap();
    assert_eq!((all.runs, all.next), (ranges([LEN - G..LEN]), None));
    let none = page(0..LEN, 0).unwrap();
    assert_eq!((none.runs, none.next), (vec![], Some(0)), "there is more");
    let past = |offset| BitmapError::OutOfRange { offset, len: LEN };
    assert_eq!(page(LEN..u64::MAX, 1).unwrap().next, None);
    assert_eq!(page(LEN + 1..u64::MAX, 1), Err(past(LEN + 1)));
    assert_eq!(page(u64::MAX..u64::MAX, 1), Err(past(u64::MAX)));
    let reversed = std::ops::Range { start: LEN, end: 0 };
    assert_eq!(page(reversed, 1).unwrap().runs, []);

    let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
    let mut bits = claim.lock().unwrap();
    assert!(bits.set((LEN..u64::MAX).into()).is_err());
    assert!(bits.reset((0..u64::MAX).into()).is_err());
    assert!(bits.reset_inner((u64::MAX - 1..u64::MAX).into()).is_err());
    drop(bits);
    drop(claim);
    node.bitmaps().disable("a").unwrap();
    let frozen = node.bitmaps().freeze("a").unwrap();
    assert_eq!(frozen.extents(0..u64::MAX).count(), 2);
    assert_eq!(frozen.extents(LEN..u64::MAX).count(), 0);
    assert_eq!(frozen.extents(u64::MAX..u64::MAX).count(), 0);
}

#[test]
fn a_disk_of_no_bytes_has_bitmaps_like_any_other() {
    let (node, other) = (Node::new(0), Node::new(0));
    let bitmaps = node.bitmaps();
    bitmaps
        .add(&quiesced(&node), "a", of_granularity(512))
        .unwrap();
    let coarse = of_granularity(1 << 31);
    other.bitmaps().add(&quiesced(&other), "b", coarse).unwrap();
    write(&node, 0..0);
    write(&node, 0..u64::MAX);
    bitmaps.merge("a", &[(&other, "b")]).unwrap();
    bitmaps.claim("a", ClaimFor::Change).unwrap().abdicate();
    bitmaps.clear("a").unwrap();
    let info = bitmaps.query("a").unwrap();
    assert_eq!((info.len, info.dirty_bytes), (0, 0));
    assert_eq!(runs(&node, "a"), []);
    bitmaps.disable("a").unwrap();
    let frozen = bitmaps.freeze("a").unwrap();
    assert_eq!(frozen.extents(0..u64::MAX).count(), 0);
    drop(frozen);
    bitmaps.enable(&quiesced(&node), "a").unwrap();
    let mut list = Transaction::new();
    list.add(&node, "c", coarse)
        .merge(&node, "c", &[(&node, "a")])
        .remove(&node, "a");
    let prepared = list.prepare().try_prepared().unwrap();
    prepared.unwrap().commit();
    let guard = quiesced(&node);
    node.resize(&guard, 5, Grown::Dirty).unwrap().commit();
    drop(guard);
    assert_eq!(runs(&node, "c"), ranges([0..5]));
    bitmaps.check_invariants();
}

#[test]
fn a_disk_too_long_for_bitmaps_has_none() {
    for len in [1 << 63, u64::MAX] {
        let node = Node::new(len);
        let bitmaps = node.bitmaps();
        for granule in [512, 1 << 31] {
            let granularity = granularity(granule);
            let too_large = BitmapError::TooLarge { len, granularity };
            let guard = quiesced(&node);
            let options = of_granularity(granule);
            assert_eq!(bitmaps.add(&guard, "a", options), Err(too_large.clone()));
            let mut list = Transaction::new();
            list.add_disabled(&node, "a", options);
            let error = list.prepare().try_prepared().unwrap().unwrap_err();
            assert_eq!(error.why, too_large.into());
        }
        write(&node, 0..len);
        assert!(bitmaps.query_all().is_empty());
        bitmaps.check_invariants();
        let guard = quiesced(&node);
        node.resize(&guard, LEN, Grown::Dirty).unwrap().commit();
        let added = bitmaps.add(&guard, "a", BitmapOptions::default());
        assert_eq!(added, Ok(()));
    }
}
