//! The moment that is backed up, by itself and in transactions.

use super::*;

/// Two disks with bitmaps, and a backup of each.
fn two(mode: BitmapMode) -> [Hand; 2] {
    [0, 1].map(|index| {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.id = Some(format!("b{index}"));
        let mut hand = Hand::on(&node, options);
        hand.write(cluster(1), 0x11);
        hand
    })
}

fn start_both(hands: &[Hand; 2]) -> Prepared {
    let mut list = Transaction::new();
    list.start(&hands[0].job).start(&hands[1].job);
    prepare(list).expect("they are new")
}

#[test]
fn a_transaction_gives_several_disks_one_instant() {
    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    for hand in &mut hands {
        assert!(is_busy(&hand.node));
        assert_eq!(
            hand.take_all().wait(),
            None,
            "nothing is done before it is decided"
        );
        assert!(!hand.try_write(cluster(0), 0x22), "guests wait until it is");
    }
    prepared.commit();
    let t0 = [hands[0].source.clone(), hands[1].source.clone()];
    for hand in &mut hands {
        assert_eq!(hand.job.query().status, Status::Running);
        // Before any machine has come by: what is wanted is held back, the rest is not.
        assert!(!hand.try_write(cluster(1), 0x22));
        hand.write(cluster(0), 0x22);
    }
    for (hand, t0) in hands.iter_mut().zip(t0) {
        hand.drive().done().unwrap();
        assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
        assert_eq!(hand.copied, [cluster(1)]);
        assert_eq!(dirty(&hand.node), [0], "written since");
    }
}

#[test]
fn a_transaction_can_make_the_bitmap_that_its_backup_goes_by() {
    let node = Node::new(LEN);
    let mut hand = Hand::on(&node, with_bitmap(BackupSync::Full, BitmapMode::OnSuccess));
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(CLUSTER);
    let mut list = Transaction::new();
    list.add(&node, NAME, options).start(&hand.job);
    prepare(list).expect("a new name").commit();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(cluster(2));
    hand.drive().done().unwrap();
    let ticket = pending.try_begin().expect("it is saved").unwrap();
    hand.lands(cluster(2), 0x22);
    ticket.finish(());
    assert_eq!(hand.target, t0);
    assert_eq!(dirty(&node), [2], "the chain begins here");
}

#[test]
fn a_transaction_can_disable_the_bitmap_that_its_backup_goes_by() {
    let mut hand = two(BitmapMode::Always).into_iter().next().unwrap();
    let mut list = Transaction::new();
    list.disable(&hand.node, NAME).start(&hand.job);
    prepare(list).unwrap().commit();
    hand.write(cluster(3), 0x22);
    hand.drive().done().unwrap();
    assert_eq!(hand.copied, [cluster(1)]);
    assert_eq!(dirty(&hand.node), [0; 0], "it does not record");
    assert!(!hand.node.bitmaps().query(NAME).unwrap().is_recording);
}

#[test]
fn a_transaction_that_is_dropped_or_fails_leaves_no_trace() {
    for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
        let mut hands = two(mode);
        drop(start_both(&hands));
        let mut list = Transaction::new();
        list.start(&hands[0].job).start(&hands[1].job).abort();
        assert_eq!(prepare(list).unwrap_err().why, ActionError::Aborted);
        for hand in &mut hands {
            assert_eq!(hand.job.query().status, Status::Created);
            assert!(!is_busy(&hand.node));
            assert_eq!(dirty(&hand.node), [1]);
            hand.write(cluster(1), 0x33);
            assert_eq!(hand.take_all().wait(), None);
        }
        // And they can be started still.
        start_both(&hands).commit();
        for hand in &mut hands {
            hand.drive().done().unwrap();
            assert_eq!(hand.copied, [cluster(1)]);
            assert_eq!(hand.target[bytes(cluster(1))], [0x33; CLUSTER as usize]);
        }
    }
}

#[test]
fn a_bitmap_that_one_lacks_undoes_the_start_of_all() {
    let mut hands = two(BitmapMode::Always);
    hands[1].node.bitmaps().remove(NAME).unwrap();
    let mut list = Transaction::new();
    list.start(&hands[0].job).start(&hands[1].job);
    let error = prepare(list).unwrap_err();
    assert_eq!(error.index, 1);
    assert!(
        matches!(error.why, ActionError::Bitmap(BitmapError::NotFound { .. })),
        "{error}"
    );
    assert!(!is_busy(&hands[0].node));
    hands[0].write(cluster(1), 0x22);
}

#[test]
fn a_list_starts_a_job_once() {
    let [hand, _] = two(BitmapMode::Always);
    let mut list = Transaction::new();
    list.start(&hand.job).start(&hand.job);
    assert_eq!(prepare(list).unwrap_err().why, ActionError::StartedBefore);
    assert!(!is_busy(&hand.node));
    hand.job.start().unwrap();
    let mut list = Transaction::new();
    list.start(&hand.job);
    let why = prepare(list).unwrap_err().why;
    assert!(
        matches!(why, ActionError::Job(VerbError::NotAllowed { .. })),
        "{why}"
    );
}

#[test]
fn a_job_cancelled_while_a_transaction_has_it_prepared_has_never_begun() {
    for (is_polled, is_committed) in [(false, false), (false, true), (true, false), (true, true)] {
        for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
            let mut hands = two(mode);
            let prepared = start_both(&hands);
            hands[0].job.cancel(Cancel::Force).unwrap();
            if is_polled {
                assert!(is_cancelled(&hands[0].take_all().done()));
            }
            match is_committed {
                true => prepared.commit(),
                false => drop(prepared),
            }
            assert!(!is_busy(&hands[0].node), "{is_polled}, {is_committed}");
            assert_eq!(dirty(&hands[0].node), [1]);
            hands[0].write(cluster(1), 0x22);
            assert!(is_cancelled(&hands[0].take_all().done()));
            assert_eq!(
                is_busy(&hands[1].node),
                is_committed,
                "the other is not concerned"
            );
        }
    }
}

#[test]
fn a_machine_dropped_while_a_transaction_has_it_prepared_has_never_begun() {
    for is_committed in [false, true] {
        for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
            let node = Node::new(LEN);
            add_bitmap(&node, CLUSTER);
            let sync = match mode {
                BitmapMode::Never => BackupSync::Bitmap,
                BitmapMode::OnSuccess | BitmapMode::Always => BackupSync::Full,
            };
            let mut hand = Hand::on(&node, with_bitmap(sync, mode));
            hand.write(cluster(1), 0x11);
            let mut list = Transaction::new();
            list.start(&hand.job);
            let prepared = prepare(list).unwrap();
            hand.backup = None;
            match is_committed {
                true => prepared.commit(),
                false => drop(prepared),
            }
            assert!(!is_busy(&node));
            assert_eq!(dirty(&node), [1], "{mode:?}, {is_committed}");
            hand.write(cluster(1), 0x22);
            Hand::on(&node, options(BackupSync::Full));
        }
    }
}

#[test]
fn a_job_started_by_hand_while_a_transaction_has_it_prepared_has_its_instant() {
    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    hands[0].job.start().unwrap();
    assert_eq!(
        hands[0].take_all().wait(),
        None,
        "it waits for what is decided"
    );
    let t0 = hands[0].source.clone();
    hands[0].woken.take();
    prepared.commit();
    assert!(hands[0].woken.take() > 0);
    // It holds on to the instant of the other, for that is what its user wants.
    assert!(!hands[0].try_write(cluster(1), 0x22));
    hands[0].drive().done().unwrap();
    assert_eq!(hands[0].target[bytes(cluster(1))], t0[bytes(cluster(1))]);

    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    hands[0].job.start().unwrap();
    let _ = hands[0].take_all();
    hands[0].woken.take();
    drop(prepared);
    assert!(hands[0].woken.take() > 0, "it makes an instant of its own");
    hands[0].write(cluster(1), 0x44);
    hands[0].drive().done().unwrap();
    assert_eq!(hands[0].target[bytes(cluster(1))], [0x44; CLUSTER as usize]);
}

#[test]
fn a_guest_write_in_flight_at_the_start_is_before_the_instant() {
    let mut hand = Hand::new(options(BackupSync::Full));
    let node = hand.node.clone();
    let ticket = node.begin_write(cluster(0)).go().expect("open");
    hand.job.start().unwrap();
    assert_eq!(hand.take_all().wait(), Some(5000 * MS));
    assert!(hand.out.is_empty());
    hand.lands(cluster(0), 0x77);
    hand.woken.take();
    ticket.finish(());
    assert!(hand.woken.take() > 0);
    hand.drive().done().unwrap();
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_guest_write_that_hangs_holds_others_no_longer_than_hold_max() {
    let mut named = options(BackupSync::Full);
    named.job.id = Some("b".to_owned());
    let mut hand = Hand::new(named);
    let node = hand.node.clone();
    let ticket = node.begin_write(cluster(0)).go().expect("open");
    hand.job.start().unwrap();
    let _ = hand.take_all();
    assert!(!hand.try_write(cluster(1), 1));
    hand.now = 5000 * MS;
    assert_eq!(hand.take_all().wait(), Some(10_000 * MS));
    hand.write(cluster(1), 1);
    hand.now = 10_000 * MS;
    let _ = hand.take_all();
    assert!(!hand.try_write(cluster(1), 1), "it is tried again");
    hand.now = 15_000 * MS;
    let _ = hand.take_all();
    ticket.finish(());
    hand.now = 20_000 * MS;
    hand.drive().done().unwrap();
    assert_eq!(hand.target, hand.source);
    let events = std::iter::from_fn(|| hand.job.next_event());
    let in_vain = events.filter(|event| matches!(event, Event::HeldInVain));
    assert_eq!(in_vain.count(), 1, "of several in a row the first is told");
}
