//! Bitmaps in use by a job.

use super::*;

#[test]
fn what_is_claimed_stays_and_its_successor_records() {
    let node = node_with(&["a"]);
    write(&node, 0..1);
    let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
    write(&node, G..G + 1);
    let info = node.bitmaps().query("a").unwrap();
    assert_eq!((info.dirty_bytes, info.successor_dirty_bytes), (G, Some(G)));
    assert_eq!(
        (info.busy_with, info.is_recording),
        (Some(BusyWith::Job), true)
    );
    assert_eq!(
        node.bitmaps().query_all().len(),
        1,
        "a successor has no name"
    );
    let both = node
        .bitmaps()
        .snapshot("a", SnapshotOf::WithSuccessor)
        .unwrap();
    assert_eq!(both.dirty_bytes(), 2 * G);
    assert_eq!(claim.snapshot(SnapshotOf::WithSuccessor).unwrap(), both);
    claim.abdicate();
    assert_eq!(runs(&node, "a"), ranges([G..2 * G]));
    write(&node, 2 * G..2 * G + 1);
    assert_eq!(runs(&node, "a"), ranges([G..3 * G]));
}

#[test]
fn whatever_becomes_of_a_claim_the_flags_are_as_before() {
    check_flags();
    #[cfg(debug_assertions)]
    {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        break_on_this_thread(Some(Sabotage::AbdicateForgetsFlags));
        let found = std::panic::catch_unwind(check_flags);
        break_on_this_thread(None);
        assert!(found.is_err(), "goes unnoticed");
    }
}

fn check_flags() {
    for is_enabled in [false, true] {
        for is_success in [false, true] {
            let node = Node::new(LEN);
            node.bitmaps().set_storage(Some(BitmapStorage::default()));
            node.bitmaps()
                .add(&quiesced(&node), "a", persistent())
                .unwrap();
            if !is_enabled {
                node.bitmaps().disable("a").unwrap();
            }
            node.bitmaps().hold("a").unwrap().hand_over();
            let before = node.bitmaps().query("a").unwrap();
            let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
            if is_success {
                claim.abdicate();
            } else {
                claim.reclaim();
            }
            assert_eq!(node.bitmaps().query("a").unwrap(), before);
            let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
            assert_eq!(export.to_keep, ["a"], "it was handed over");
        }
    }
}

#[test]
fn a_successor_may_record_later_than_it_was_made() {
    let node = node_with(&["a"]);
    node.bitmaps().disable("a").unwrap();
    let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
    write(&node, 0..1);
    let wrong = quiesced(&Node::new(LEN));
    assert_eq!(claim.enable_successor(&wrong), Err(BitmapError::OtherNode));
    for _ in 0..2 {
        claim.enable_successor(&quiesced(&node)).unwrap();
        assert!(node.bitmaps().query("a").unwrap().is_recording);
    }
    write(&node, G..G + 1);
    claim.reclaim();
    assert!(node.bitmaps().query("a").unwrap().is_recording);
    assert_eq!(runs(&node, "a"), ranges([G..2 * G]));
}

#[test]
fn an_owner_gives_back_other_bits_than_it_took() {
    let node = node_with(&["a"]);
    write(&node, 0..4 * G);
    let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
    write(&node, 8 * G..8 * G + 1);
    // A backup that keeps what it has copied: all but this is on its target.
    let mut left = HBitmap::new(LEN, granularity(2 * G)).unwrap();
    left.set(2 * G..2 * G + 1).unwrap();
    claim.lock().unwrap().copy_from(&left).unwrap();
    claim.lock().unwrap().merge_from(&left).unwrap();
    drop(claim);
    assert_eq!(runs(&node, "a"), ranges([2 * G..4 * G, 8 * G..9 * G]));
}

/// Who wanted to read them only has not dealt with them, whatever it says; and what is read-only does not change.
#[test]
fn bits_that_are_not_to_change_outlast_every_claim() {
    for (claimed_for, is_readonly) in [
        (ClaimFor::Reading, false),
        (ClaimFor::Reading, true),
        (ClaimFor::Change, true),
    ] {
        let node = Node::new(LEN);
        let bitmaps = node.bitmaps();
        bitmaps.set_storage(Some(BitmapStorage::default()));
        bitmaps.add(&quiesced(&node), "a", persistent()).unwrap();
        write(&node, 0..1);
        let claim = bitmaps.claim("a", claimed_for).unwrap();
        if is_readonly {
            bitmaps.mark_readonly(&quiesced(&node), "a").unwrap();
        } else {
            write(&node, G..G + 1);
        }
        let name = "a".to_owned();
        assert_eq!(claim.lock().err(), Some(BitmapError::ReadOnly { name }));
        claim.abdicate();
        let dirty = if is_readonly { G } else { 2 * G };
        assert_eq!(runs(&node, "a"), ranges([0..dirty]));
        assert_eq!(bitmaps.query("a").unwrap().busy_with, None);
    }
}

#[test]
fn what_is_held_of_a_bitmap_outlives_the_node() {
    let node = node_with(&["a", "b", "c"]);
    node.bitmaps().disable("b").unwrap();
    write(&node, 0..1);
    let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
    let frozen = node.bitmaps().freeze("b").unwrap();
    let hold = node.bitmaps().hold("c").unwrap();
    drop(node);
    assert_eq!(claim.snapshot(SnapshotOf::Bitmap).unwrap().dirty_bytes(), G);
    assert!(frozen.is_clean());
    assert_eq!(hold.snapshot().unwrap().dirty_bytes(), G);
    claim.abdicate();
    drop(frozen);
    hold.hand_over();
}

#[test]
fn handles_go_to_other_threads() {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<FrozenBitmap>();
    is_send_and_sync::<blockjob::BitmapClaim>();
    is_send_and_sync::<blockjob::BitmapHold>();
    is_send_and_sync::<blockjob::Bitmaps<'_>>();
    is_send_and_sync::<blockjob::Transaction>();
    is_send_and_sync::<blockjob::Preparing>();
    is_send_and_sync::<blockjob::Prepared>();
}
