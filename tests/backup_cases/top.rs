//! Backups of the top layer, and for guests only.

use super::*;

#[test]
fn only_what_the_top_layer_holds_is_copied_and_protected() {
    let mut hand = Hand::new(single(options(BackupSync::Top)));
    hand.in_top.fill(false);
    // A part of cluster 1 is allocated, and so all of it counts.
    hand.in_top[18] = true;
    hand.job.start().unwrap();
    let _ = hand.take_all();
    // Not looked at yet: it waits for the look, and for that only.
    let mut pending = hand.wait_with(2 * CLUSTER + 5..2 * CLUSTER + 6);
    let _ = hand.take_all();
    let look = hand.find(2 * CLUSTER);
    assert!(matches!(hand.kinds()[look], OpKind::Status(_)));
    hand.answer(look);
    let ticket = pending
        .try_begin()
        .expect("nothing is to be saved")
        .unwrap();
    hand.lands(ticket.range(), 0x99);
    ticket.finish(());
    let t0 = hand.source.clone();
    hand.drive().done().unwrap();
    assert!(
        hand.copied.iter().all(|range| range.start() / CLUSTER == 1),
        "{:?}",
        hand.copied
    );
    assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
    assert!(
        hand.target[bytes(cluster(2))]
            .iter()
            .all(|&byte| byte == 0xaa)
    );
}

#[test]
fn a_cluster_copied_in_parts_of_which_the_last_are_not_allocated_is_copied_whole() {
    let node = Node::new(LEN);
    let mut source = Limits::new(LEN);
    source.max_transfer = 8 << 10;
    let mut hand = Hand::with_limits(&node, source, Limits::new(LEN), options(BackupSync::Top));
    hand.in_top.fill(false);
    hand.in_top[..2].fill(true);
    hand.job.start().unwrap();
    hand.drive().done().unwrap();
    assert_eq!(
        hand.target[bytes(cluster(0))],
        hand.source[bytes(cluster(0))]
    );
    assert!(
        hand.target[bytes(cluster(1))]
            .iter()
            .all(|&byte| byte == 0xaa)
    );
}

#[test]
fn not_knowing_what_is_allocated_is_an_error_of_sync_top() {
    for (sync, is_error) in [(BackupSync::Full, false), (BackupSync::Top, true)] {
        let mut hand = Hand::started(options(sync));
        hand.fault = Some(Box::new(|_, kind| {
            matches!(kind, OpKind::Status(_)).then_some((Side::Source, ErrorKind::Other))
        }));
        let result = hand.drive().done();
        assert_eq!(
            is_failed(&result, Side::Source),
            is_error,
            "{sync:?}: {result:?}"
        );
    }
}

#[test]
fn sync_none_copies_what_guests_overwrite_and_ends_by_a_cancel() {
    let mut hand = Hand::started(options(BackupSync::None));
    assert_eq!(hand.drive().wait(), None);
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(CLUSTER..CLUSTER + 1);
    assert_eq!(hand.drive().wait(), None);
    pending.try_begin().expect("it is saved").unwrap().cancel();
    assert_eq!(hand.copied, [cluster(1)]);
    assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
    hand.job.cancel(Cancel::Soft).unwrap();
    assert!(is_cancelled(&hand.drive().done()));
    hand.write(0..LEN, 1);
}
