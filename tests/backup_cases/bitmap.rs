//! What the bitmap holds at each end.

use super::*;

const MODES: [BitmapMode; 3] = [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always];

/// What the table says, for F = clusters 0 to 2, and N and U as given.
fn table(mode: BitmapMode, is_good: bool, since: &[u64], left: &[u64]) -> Vec<u64> {
    let held: &[u64] = match (mode, is_good) {
        (BitmapMode::OnSuccess, true) => &[],
        (BitmapMode::Always, _) => left,
        (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => &[0, 1, 2],
    };
    let mut all: Vec<u64> = held.iter().chain(since).copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// A backup of clusters 0 to 2, of which 0 is on the target; the guest has written 3 since the instant.
fn half_way(mode: BitmapMode) -> Hand {
    let mut hand = Hand::begun(single(with_bitmap(BackupSync::Bitmap, mode)), &[0, 1, 2]);
    hand.look();
    hand.answer(hand.find(0));
    let _ = hand.take_all();
    hand.look();
    hand.write(cluster(3), 0x33);
    hand
}

fn check_bitmap(hand: &Hand, expected: &[u64]) {
    assert_eq!(dirty(&hand.node), expected);
    assert!(!is_busy(&hand.node));
    assert!(hand.node.bitmaps().query(NAME).unwrap().is_recording);
}

#[test]
fn the_bitmap_after_a_success() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.drive().done().unwrap();
        check_bitmap(&hand, &table(mode, true, &[3], &[]));
    }
}

#[test]
fn the_bitmap_after_a_failure_at_once() {
    for mode in MODES {
        let mut hand = Hand::begun(with_bitmap(BackupSync::Bitmap, mode), &[0, 1, 2]);
        hand.fault = Some(Box::new(|_, kind| {
            matches!(kind, OpKind::Copy(_)).then_some((Side::Source, ErrorKind::Other))
        }));
        assert!(is_failed(&hand.drive().done(), Side::Source));
        check_bitmap(&hand, &table(mode, false, &[], &[0, 1, 2]));
    }
}

#[test]
fn the_bitmap_after_a_failure_half_way_and_what_the_next_backup_copies() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.fail(hand.find(CLUSTER), Side::Target, ErrorKind::StorageFull);
        assert!(is_failed(&hand.drive().done(), Side::Target));
        let expected = table(mode, false, &[3], &[1, 2]);
        check_bitmap(&hand, &expected);
        let mut next = Hand::on(
            &hand.node,
            with_bitmap(BackupSync::Bitmap, BitmapMode::Always),
        );
        (next.source, next.target) = (hand.source.clone(), hand.target.clone());
        next.job.start().unwrap();
        next.drive().done().unwrap();
        let copied: u64 = next.copied.iter().map(|range| range.len()).sum();
        let rest: u64 = expected.iter().map(|&index| cluster(index).len()).sum();
        assert_eq!(copied, rest, "the rest and nothing else");
        assert_eq!(next.target, next.source, "{mode:?}");
    }
}

#[test]
fn the_bitmap_after_a_cancel_that_came_before_the_start() {
    for mode in MODES {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut hand = Hand::on(&node, with_bitmap(BackupSync::Bitmap, mode));
        hand.write(0..3 * CLUSTER, 1);
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &[0, 1, 2]);
    }
}

#[test]
fn the_bitmap_after_a_cancel_before_anything_was_copied() {
    for sync in [BackupSync::Bitmap, BackupSync::Full] {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut hand = Hand::on(&node, with_bitmap(sync, BitmapMode::Always));
        hand.write(cluster(1), 1);
        let mut list = Transaction::new();
        list.start(&hand.job);
        prepare(list).unwrap().commit();
        // Its machine has not come by yet.
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        match sync {
            BackupSync::Full => check_bitmap(&hand, &[0, 1, 2, 3]),
            _ => check_bitmap(&hand, &[1]),
        }
    }
}

#[test]
fn the_bitmap_after_a_cancel_while_it_runs_is_paused_or_pending() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[1, 2]));

        let mut hand = half_way(mode);
        hand.job.pause().unwrap();
        let _ = hand.drive().wait();
        assert_eq!(hand.job.query().status, Status::Paused);
        hand.job.cancel(Cancel::Force).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[2]));

        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.auto_finalize = false;
        let mut hand = Hand::begun(options, &[0, 1, 2]);
        let _ = hand.drive().wait();
        assert_eq!(hand.job.query().status, Status::Pending);
        assert!(is_busy(&hand.node));
        hand.write(cluster(3), 1);
        hand.job.cancel(Cancel::Force).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[]));
    }
}

#[test]
fn the_bitmap_after_another_of_the_group_has_failed() {
    for mode in MODES {
        let group = JobGroup::new();
        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.group = Some(group.clone());
        let mut hand = Hand::begun(options, &[0, 1, 2]);
        let mut other = self::options(BackupSync::Full);
        (other.job.group, other.job.id) = (Some(group), Some("b1".to_owned()));
        let mut other = Hand::started(other);
        let _ = hand.drive().wait();
        assert_eq!(
            hand.job.query().status,
            Status::Waiting,
            "all of it is copied"
        );
        let _ = other.take_all();
        other.look();
        other.fail(0, Side::Target, ErrorKind::Other);
        assert!(is_failed(&other.drive().done(), Side::Target));
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[], &[]));
    }
}

#[test]
fn the_bitmap_after_the_machine_was_dropped() {
    for mode in MODES {
        let mut hand = half_way(mode);
        let mut pending = hand.wait_with(cluster(2));
        hand.backup = None;
        assert!(matches!(hand.job.query().error, Some(JobError::Dropped)));
        let ticket = pending.try_begin().expect("nobody holds it back").unwrap();
        hand.lands(cluster(2), 0x22);
        ticket.finish(());
        // Nothing is flushed any more, so all that was copied counts as missing.
        check_bitmap(&hand, &table(mode, false, &[2, 3], &[0, 1, 2]));
    }
}

#[test]
fn what_lands_after_the_instant_was_lost_is_missing_also_if_the_bitmap_records_no_more() {
    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let mut hand = Hand::on(&node, with_bitmap(BackupSync::Bitmap, BitmapMode::Always));
    hand.write(0..2 * CLUSTER, 0x11);
    node.bitmaps().disable(NAME).unwrap();
    hand.job.start().unwrap();
    let _ = hand.take_all();
    hand.look();
    assert!(
        matches!(hand.kinds()[..], [OpKind::Copy(_)]),
        "{:?}",
        hand.kinds()
    );
    hand.job.cancel(Cancel::Force).unwrap();
    let _ = hand.take_all();
    // The guest goes on, and then the copy reads.
    hand.write(cluster(0), 0x99);
    let copy = hand.find(0);
    hand.answer(copy);
    assert!(is_cancelled(&hand.drive().done()));
    assert_eq!(hand.target[0], 0x99, "that is not what was to be backed up");
    assert_eq!(dirty(&node), [0, 1]);
}

#[test]
fn clusters_are_rounded_outward_in_a_finer_and_in_a_coarser_bitmap() {
    for granularity in [512, CLUSTER, 2 * CLUSTER] {
        let node = Node::new(LEN);
        add_bitmap(&node, granularity);
        let mut hand = Hand::on(
            &node,
            single(with_bitmap(BackupSync::Bitmap, BitmapMode::Always)),
        );
        hand.write(CLUSTER + 1000..CLUSTER + 1001, 0x11);
        hand.job.start().unwrap();
        let _ = hand.take_all();
        hand.look();
        hand.fail(0, Side::Target, ErrorKind::Other);
        assert!(is_failed(&hand.drive().done(), Side::Target));
        match granularity > CLUSTER {
            true => check_bitmap(&hand, &[0, 1]),
            false => check_bitmap(&hand, &[1]),
        }
        let bytes = node.bitmaps().query(NAME).unwrap().dirty_bytes;
        assert_eq!(bytes, granularity.max(CLUSTER), "whole clusters");
    }
}
