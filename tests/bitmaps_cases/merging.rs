//! Bitmaps merged into others, also of other disks.

use super::*;

#[test]
fn granules_of_the_target_are_dirty_that_a_source_touches() {
    let node = Node::new(LEN);
    let guard = quiesced(&node);
    node.bitmaps()
        .add(&guard, "fine", of_granularity(512))
        .unwrap();
    node.bitmaps()
        .add_disabled("coarse", of_granularity(G))
        .unwrap();
    node.bitmaps()
        .add_disabled("back", of_granularity(512))
        .unwrap();
    drop(guard);
    write(&node, G - 1..G + 1);
    let bitmaps = node.bitmaps();
    bitmaps.merge("coarse", &[(&node, "fine")]).unwrap();
    assert_eq!(runs(&node, "coarse"), ranges([0..2 * G]));
    bitmaps.merge("back", &[(&node, "coarse")]).unwrap();
    assert_eq!(runs(&node, "back"), ranges([0..2 * G]));
    assert_eq!(
        runs(&node, "fine"),
        ranges([G - 512..G + 512]),
        "it is as it was"
    );
    assert!(!bitmaps.query("back").unwrap().is_recording);
    bitmaps
        .merge("fine", &[(&node, "fine"), (&node, "fine")])
        .unwrap();
    assert_eq!(runs(&node, "fine"), ranges([G - 512..G + 512]));
}

#[test]
fn nothing_is_merged_if_one_source_is_bad() {
    let node = node_with(&["target", "good"]);
    let longer = Node::new(LEN + 1);
    longer
        .bitmaps()
        .add_disabled("a", BitmapOptions::default())
        .unwrap();
    write(&node, 0..1);
    node.bitmaps().clear("target").unwrap();
    let merge = |sources: &[(&Node, &str)]| node.bitmaps().merge("target", sources);
    let name = "target".to_owned();
    assert_eq!(merge(&[]), Err(BitmapError::NoSources { name }));
    let mismatch = BitmapError::SizeMismatch {
        name: "a".to_owned(),
        len: LEN + 1,
        expected: LEN,
    };
    assert_eq!(merge(&[(&node, "good"), (&longer, "a")]), Err(mismatch));
    assert_eq!(runs(&node, "target"), []);
    merge(&[(&node, "good")]).unwrap();
    assert_eq!(runs(&node, "target"), ranges([0..G]));
}

/// `a` of one node into that of the other, and the other way round, at the same time.
fn merge_both_ways() {
    let nodes = [node_with(&["a", "b"]), node_with(&["a", "b"])];
    let [one, other] = &nodes;
    let merge = |into: &Node, from: &Node| {
        for _ in 0..2000 {
            into.bitmaps()
                .merge("a", &[(from, "b"), (into, "b"), (from, "a")])
                .unwrap();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| merge(one, other));
        scope.spawn(|| merge(other, one));
        for granule in 0..16 {
            write(one, granule * G..granule * G + 1);
            write(other, granule * G..granule * G + 1);
        }
    });
    let sources = [(other, "a")];
    one.bitmaps().merge("a", &sources).unwrap();
    assert_eq!(runs(one, "a"), ranges([0..LEN]));
}

#[test]
fn opposite_merges_do_not_wait_for_each_other() {
    in_time(merge_both_ways);
}

/// Locks taken in another order are noticed: two that merge in opposite directions stand still.
#[cfg(debug_assertions)]
#[test]
fn what_is_locked_as_it_is_named_stands_still() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    let nodes = [node_with(&["a"]), node_with(&["a"])];
    let merges = Arc::new(AtomicU64::new(0));
    for (into, from) in [(0, 1), (1, 0)] {
        let (nodes, merges) = (nodes.clone(), Arc::clone(&merges));
        // They are never joined.
        thread::spawn(move || {
            break_on_this_thread(Some(Sabotage::LockAsNamed));
            loop {
                nodes[into]
                    .bitmaps()
                    .merge("a", &[(&nodes[from], "a")])
                    .unwrap();
                merges.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let stands_still = (0..60).any(|_| {
        let before = merges.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(500));
        merges.load(Ordering::Relaxed) == before
    });
    assert!(stands_still);
}
