//! Errors, pause and speed.

use super::*;

#[test]
fn a_fault_at_any_operation_under_any_policy_loses_nothing() {
    for policy in [
        OnError::Report,
        OnError::Ignore,
        OnError::Stop,
        OnError::Enospc,
    ] {
        for side in [Side::Source, Side::Target] {
            for is_for_ever in [false, true] {
                for index in 0..12 {
                    fault_at(index, policy, side, is_for_ever);
                }
            }
        }
    }
}

fn fault_at(index: usize, policy: OnError, side: Side, is_for_ever: bool) {
    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let mut options = single(with_bitmap(BackupSync::Full, BitmapMode::Always));
    options.job.on_source_error = policy;
    options.job.on_target_error = policy;
    let mut hand = Hand::on(&node, options);
    hand.fault = Some(Box::new(move |count, kind| {
        let is_hit = match is_for_ever {
            true => count >= index,
            false => count == index,
        };
        let is_there = match side {
            Side::Source => matches!(kind, OpKind::Copy(_)),
            Side::Target | Side::Buffer => kind.writes_target() || kind == OpKind::Flush,
        };
        (is_hit && is_there).then_some((side, ErrorKind::Other))
    }));
    hand.job.start().unwrap();
    let what = format!("{index}, {policy:?}, {side:?}, {is_for_ever}");
    let end = 60_000 * MS;
    let rest = hand.drive_until(end);
    let errors = hand.errors();
    match policy {
        _ if errors == 0 => rest.done().expect("nothing has failed"),
        OnError::Report | OnError::Enospc | OnError::Auto => {
            assert!(is_failed(&rest.done(), side), "{what}");
            assert_eq!(errors, 1, "nothing new is begun after it");
            // The rest is in the bitmap, and the next one copies it: all, if the target does not flush.
            let is_flushed = !is_for_ever || side == Side::Source;
            for unit in 0..4 {
                let is_there = is_flushed && hand.copied.contains(&cluster(unit));
                assert_eq!(dirty(&node).contains(&unit), !is_there, "{what}");
            }
            return;
        }
        OnError::Ignore if is_for_ever => {
            let until = rest.wait().expect("it tries again");
            assert!(
                until > end && until <= end + 5000 * MS,
                "with a delay of 5 s by now"
            );
            // About 22 tries in this time, of a look and a copy of each of four clusters.
            assert!(hand.answered < 250, "{}: {what}", hand.answered);
            hand.fault = None;
            hand.drive().done().expect("the fault is gone");
        }
        OnError::Ignore => {
            rest.done().expect("it was tried again");
            assert!(hand.now >= 10 * MS, "after a delay");
        }
        OnError::Stop => {
            let _ = rest.wait();
            assert_eq!(hand.job.query().status, Status::Paused, "{what}");
            let answered = hand.answered;
            hand.now = 2 * end;
            let _ = hand.drive_now();
            assert_eq!(hand.answered, answered, "it stands still");
            hand.fault = None;
            hand.job.resume().unwrap();
            hand.drive().done().expect("the fault is gone");
        }
    }
    assert_eq!(hand.target, hand.source, "{what}");
    assert_eq!(dirty(&node), [0; 0], "{what}");
    let copied: u64 = hand.copied.iter().map(|range| range.len()).sum();
    assert_eq!(copied, LEN, "nothing twice: {what}");
}

#[test]
fn a_paused_job_holds_on_to_the_instant() {
    for steps in 0..8 {
        let mut hand = Hand::started(single(options(BackupSync::Full)));
        let _ = hand.take_all();
        for _ in 0..steps {
            if !hand.out.is_empty() {
                hand.answer(0);
            }
            let _ = hand.take_all();
        }
        let t0 = hand.source.clone();
        let before = hand.kinds();
        hand.job.pause().unwrap();
        let _ = hand.take_all();
        assert_eq!(hand.kinds(), before, "nothing new is begun");
        let is_busy = !hand.out.is_empty();
        let expected = match is_busy {
            true => Status::Running,
            false => Status::Paused,
        };
        assert_eq!(
            hand.job.query().status,
            expected,
            "paused once nothing is in flight"
        );
        let _ = hand.drive_now().wait();
        assert_eq!(hand.job.query().status, Status::Paused);
        let copied = hand.copied.len();
        let at = 3 * CLUSTER..3 * CLUSTER + 1;
        if !hand.try_write(at.clone(), 0x44) {
            let mut pending = hand.wait_with(at.clone());
            let _ = hand.drive_now().wait();
            pending.try_begin().expect("it is saved").unwrap().cancel();
            hand.write(at, 0x44);
            assert_eq!(hand.copied.len(), copied + 1, "that one and no other");
        }
        assert_eq!(hand.job.query().status, Status::Paused);
        hand.job.resume().unwrap();
        hand.drive().done().unwrap();
        assert_eq!(hand.target, t0);
        let copied: u64 = hand.copied.iter().map(|range| range.len()).sum();
        assert_eq!(copied, LEN, "nothing is copied twice");
    }
}

#[test]
fn the_speed_limit_holds_the_background_and_ends_when_it_is_taken_away() {
    let mut options = single(options(BackupSync::Full));
    options.job.speed = CLUSTER;
    let mut hand = Hand::started(options);
    let _ = hand.drive_until(1500 * MS);
    assert!(hand.copied.len() <= 3, "{:?}", hand.copied);
    assert!(hand.copied.len() >= 2, "{:?}", hand.copied);
    hand.woken.take();
    hand.job.set_speed(0).unwrap();
    assert!(hand.woken.take() > 0);
    hand.drive_now().done().unwrap();
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_cancel_waits_for_what_is_in_flight_and_lets_guests_go_at_once() {
    let mut hand = Hand::started(options(BackupSync::Full));
    let _ = hand.take_all();
    hand.look();
    let mut pending = hand.wait_with(0..1);
    let _ = hand.take_all();
    hand.job.cancel(Cancel::Soft).unwrap();
    let _ = hand.take_all();
    pending
        .try_begin()
        .expect("the guest goes on")
        .unwrap()
        .finish(());
    assert!(hand.kinds().contains(&OpKind::CancelInFlight));
    let is_over = |hand: &Hand| hand.job.query().status >= Status::Concluded;
    while !hand.out.is_empty() {
        assert!(!is_over(&hand), "something is in flight");
        hand.answer(0);
        let _ = hand.take_all();
    }
    assert!(is_over(&hand));
    assert!(is_cancelled(&hand.drive().done()));
}

#[test]
fn the_source_is_read_only_what_the_target_gets_is_flushed() {
    let mut hand = Hand::started(single(options(BackupSync::Full)));
    let mut last = None;
    loop {
        let rest = hand.take_all();
        if hand.out.is_empty() {
            rest.done().unwrap();
            break;
        }
        last = Some(hand.kinds()[0]);
        if matches!(last, Some(OpKind::Copy(_))) {
            hand.read(0);
        }
        hand.answer(0);
    }
    assert_eq!(last, Some(OpKind::Flush));
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_target_is_told_once_more_to_give_up_if_that_was_lost() {
    let is_cancel = |out: &Out| out.op.kind() == OpKind::CancelInFlight;
    for are_all_lost in [false, true] {
        let mut hand = Hand::started(options(BackupSync::Full));
        let _ = hand.take_all();
        hand.look();
        hand.job.cancel(Cancel::Force).unwrap();
        let _ = hand.take_all();
        let index = hand.out.iter().position(is_cancel).expect("it is told");
        let lost = hand.out.remove(index).op;
        match are_all_lost {
            false => hand.backup().op_lost(lost),
            true => {
                hand.out.clear();
                hand.backup().ops_lost();
            }
        }
        let _ = hand.take_all();
        assert!(hand.out.iter().any(is_cancel), "{:?}", hand.kinds());
        assert!(is_cancelled(&hand.drive().done()));
    }
}
