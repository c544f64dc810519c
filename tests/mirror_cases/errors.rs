//! What fails, what is lost, and what is answered wrongly.

use std::io::ErrorKind;
use std::task::Waker;
use std::time::Duration;

use blockjob::{
    Cancel, Content, Event, JobError, Limits, Mirror, Node, OnError, OpKind, Outcome, RangeLimits,
    Side, Status,
};

use crate::machine::{KIB, MS, Machine, Rest, is_final, options};
use crate::{LEN, complete, single, zeroing};

// Errors

/// A small disk with some of everything, its errors, and what the user does about them.
fn run_with_faults(
    policy: OnError,
    side: Side,
    mut fails: impl FnMut(usize, OpKind) -> bool + 'static,
) -> (Machine, Result<(), JobError>) {
    let mut target = zeroing(24 * KIB + 7, 4096, true);
    target.discard = Some(RangeLimits {
        align: 4096,
        max: 1 << 20,
    });
    let mut options = single();
    options.workers = 3;
    options.job.on_source_error = policy;
    options.job.on_target_error = policy;
    let mut machine = Machine::with_limits(Limits::new(24 * KIB + 7), target, options);
    machine.lay(4 * KIB..13 * KIB, Content::Zero, false);
    machine.fault = Some(Box::new(move |count, kind| {
        let is_possible = match side {
            Side::Source => matches!(kind, OpKind::Copy(_) | OpKind::Status(_)),
            Side::Target | Side::Buffer => kind.writes_target() || kind == OpKind::Flush,
        };
        (is_possible && fails(count, kind)).then_some((side, ErrorKind::StorageFull))
    }));
    machine.job.start().unwrap();
    let mut wrote = 0;
    for _ in 0..1000 {
        match machine.drive() {
            Rest::Wait(_) => {
                let status = machine.job.query().status;
                match status {
                    Status::Paused | Status::Standby => machine.job.resume().unwrap(),
                    Status::Ready if wrote < 3 => {
                        assert!(
                            machine.is_equal(),
                            "in step, but not equal: {policy:?} {side}"
                        );
                        machine.guest_write(wrote * 5000..wrote * 5000 + 700, 0xcc);
                        machine.now += 20 * MS;
                        wrote += 1;
                    }
                    _ => {
                        let _ = machine.job.complete();
                    }
                }
            }
            Rest::Switch(switch) => {
                assert!(machine.is_equal(), "{policy:?} {side}");
                switch.commit();
            }
            Rest::SwitchBack(_) => unreachable!("it is in no group"),
            Rest::Done(result) => return (machine, result),
        }
    }
    panic!("no end: {:?}", machine.job.query());
}

#[test]
fn an_error_at_every_operation_loses_nothing() {
    for policy in [
        OnError::Report,
        OnError::Ignore,
        OnError::Stop,
        OnError::Enospc,
    ] {
        for side in [Side::Source, Side::Target] {
            let mut hits = 0;
            for index in 0..60 {
                let (mut machine, result) =
                    run_with_faults(policy, side, move |count, _| count == index);
                let was_hit = machine.names().contains(&"ERROR".to_owned());
                hits += usize::from(was_hit);
                if was_hit && policy == OnError::Report {
                    let error = result.expect_err("it is reported");
                    let JobError::Io { side: failed, .. } = &error else {
                        panic!("{error}");
                    };
                    assert_eq!(*failed, side);
                } else {
                    result.expect("nothing keeps it");
                    assert!(machine.is_equal());
                }
                let finals = machine.events().iter().filter(|event| is_final(event));
                assert_eq!(finals.count(), 1);
            }
            assert!(hits >= 5, "{policy:?} {side}: {hits} errors only");
        }
    }
}

#[test]
fn an_error_at_every_other_operation_loses_nothing() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Enospc] {
        for side in [Side::Source, Side::Target] {
            for rest in 0..2 {
                let mut count = 0;
                let (machine, result) = run_with_faults(policy, side, move |_, _| {
                    count += 1;
                    count % 2 == rest
                });
                result.expect("nothing keeps it");
                assert!(machine.is_equal());
            }
        }
    }
}

#[test]
fn a_flush_that_fails_once_delays_ready() {
    for policy in [OnError::Ignore, OnError::Stop] {
        let mut options = options();
        options.job.on_target_error = policy;
        let mut machine = Machine::started(LEN, options);
        let mut failed = false;
        machine.fault = Some(Box::new(move |_, kind| {
            let fails = kind == OpKind::Flush && !failed;
            failed |= fails;
            fails.then_some((Side::Target, ErrorKind::Other))
        }));
        if policy == OnError::Stop {
            let _ = machine.drive().wait();
            assert_eq!(machine.job.query().status, Status::Paused);
            machine.job.resume().unwrap();
        }
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, Status::Ready);
        assert!(!machine.is_unflushed);
    }
}

#[test]
fn a_flush_that_always_fails_never_makes_ready_and_a_cancel_ends_it() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Report] {
        let mut options = options();
        options.job.on_target_error = policy;
        let mut machine = Machine::started(LEN, options);
        machine.fault = Some(Box::new(|_, kind| {
            (kind == OpKind::Flush).then_some((Side::Target, ErrorKind::Other))
        }));
        let rest = machine.drive_until(Duration::from_secs(100));
        assert!(!machine.names().contains(&"READY".to_owned()));
        if policy == OnError::Report {
            rest.done().unwrap_err();
            continue;
        }
        let flushes = machine
            .asked
            .iter()
            .filter(|kind| **kind == OpKind::Flush)
            .count();
        assert!(flushes < 40, "{flushes} flushes hammer the target");
        machine.job.cancel(Cancel::Force).unwrap();
        machine.drive().done().unwrap_err();
    }
}

#[test]
fn a_dead_target_does_not_hold_the_guest_during_a_soft_cancel() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Report] {
        for forever in [false, true] {
            let mut options = options();
            options.job.on_target_error = policy;
            let mut machine = Machine::ready(LEN, options);
            machine.guest_write(0..1, 0xfd);
            machine.job.cancel(Cancel::Soft).unwrap();
            let mut failures = 0;
            machine.fault = Some(Box::new(move |_, kind| {
                let fails = kind == OpKind::Flush && (forever || failures == 0);
                failures += 1;
                fails.then_some((Side::Target, ErrorKind::Other))
            }));
            let end = Duration::from_secs(60);
            let mut rest = machine.drive_until(end);
            if policy == OnError::Report {
                if forever {
                    rest.done().unwrap_err();
                }
                continue;
            }
            if forever {
                assert!(matches!(rest, Rest::Wait(_)));
                assert!(!machine.is_guest_held(), "{policy:?}");
                if policy == OnError::Stop {
                    assert_eq!(machine.job.query().status, Status::Standby);
                }
                machine.job.cancel(Cancel::Force).unwrap();
                machine.drive().done().unwrap_err();
                assert!(!machine.is_guest_held());
            } else {
                if policy == OnError::Stop && matches!(rest, Rest::Wait(_)) {
                    machine.job.resume().unwrap();
                    rest = machine.drive();
                }
                rest.done().unwrap();
                assert!(machine.is_equal());
            }
        }
    }
}

#[test]
fn a_write_that_fails_while_the_guest_is_held_lets_it_go() {
    let mut options = single();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = Machine::ready(LEN, options);
    let node = machine.node.clone();
    let ticket = node.begin_write((0..1).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive_now();
    assert!(machine.is_guest_held());
    machine.guest_lands(0..1, 0xfc);
    ticket.finish(());
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    assert!(machine.is_guest_held(), "the rest is copied");
    let copy = machine.find_copy(0);
    machine.fail(copy, Side::Target, ErrorKind::Other);
    let _ = machine.take_all();
    assert!(!machine.is_guest_held(), "while it waits to be tried again");
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    assert!(machine.is_equal());
}

// Lost operations

#[test]
fn a_lost_range_is_written_again_only_after_the_target_has_settled() {
    let mut machine = Machine::started(LEN, single());
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    assert_eq!(machine.out.len(), 16);
    // One has read old data, and still writes when nobody waits for it any more.
    let stale = machine.source[..4096].to_vec();
    machine.guest_write(0..4096, 0xf5);
    let lost = std::mem::take(&mut machine.out);
    machine.mirror().ops_lost();
    let _ = machine.take_all();
    assert_eq!(machine.kinds(), [OpKind::Settle], "all of it was lost");
    machine.target[..4096].copy_from_slice(&stale);
    machine.answer(0);
    // A report that comes later all the same is ignored.
    for out in lost {
        machine.report(out.op, Outcome::Done);
    }
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn other_ranges_go_on_while_lost_ones_settle() {
    let mut machine = Machine::ready(LEN, single());
    machine.now += Duration::from_secs(1);
    machine.guest_write(0..1, 0xf5);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    machine.out.clear();
    machine.mirror().ops_lost();
    machine.guest_write(8192..8193, 0xf6);
    machine.guest_write(0..1, 0xf7);
    machine.now += Duration::from_secs(1);
    let _ = machine.take_all();
    while let Some(other) = machine.find(|kind| kind != OpKind::Settle) {
        machine.answer(other);
        let _ = machine.take_all();
    }
    assert_eq!(machine.target[8192], 0xf6);
    assert_ne!(machine.target[0], 0xf7);
    // Asked for once, and once more if that is lost, too.
    assert_eq!(machine.kinds(), [OpKind::Settle]);
    machine.out.clear();
    machine.mirror().ops_lost();
    let _ = machine.take_all();
    assert_eq!(machine.kinds(), [OpKind::Settle]);
    complete(&mut machine);
    assert!(machine.is_equal());
}

#[test]
fn a_held_guest_goes_on_when_the_driver_is_gone() {
    let mut machine = Machine::ready(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..1).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive_now();
    assert!(machine.is_guest_held());
    machine.mirror().ops_lost();
    assert!(!machine.is_guest_held());
    ticket.finish(());
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
}

#[test]
fn lost_flushes_and_looks_are_made_again() {
    let mut target = zeroing(LEN, 1, true);
    target.identity = Some(1);
    let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
    machine.lay(0..LEN / 2, Content::Zero, true);
    machine.job.start().unwrap();
    // Each operation is lost the first time that it goes out.
    let mut lost = std::collections::BTreeSet::new();
    let mut turns = 0;
    while machine.job.query().status != Status::Ready {
        turns += 1;
        assert!(turns < 1000);
        let _ = machine.take_all();
        let kinds = format!("{:?}", machine.kinds());
        if lost.insert(kinds) {
            machine.out.clear();
            machine.mirror().ops_lost();
        } else {
            machine.answer_all();
        }
    }
    assert!(lost.len() > 3);
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn a_cancel_after_a_loss_waits_for_the_target_to_settle() {
    let mut machine = Machine::started(LEN, single());
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    machine.out.clear();
    machine.mirror().ops_lost();
    machine.job.cancel(Cancel::Force).unwrap();
    let _ = machine.take_all().wait();
    assert!(machine.find(|kind| kind == OpKind::Settle).is_some());
    machine.drive().done().unwrap_err();
}

#[test]
fn an_answer_to_another_question_is_an_error() {
    let mut options = options();
    options.job.on_source_error = OnError::Ignore;
    options.job.on_target_error = OnError::Ignore;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let out = machine.out.remove(0);
    assert!(matches!(out.kind(), OpKind::Copy(_)));
    let extent = machine.status((0..LEN).into());
    machine.report(out.op, Outcome::Status(extent));
    assert_eq!(machine.job.query().progress.current, 0);
    assert!(machine.names().contains(&"ERROR".to_owned()));
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    // A flush that is answered like that was none, either.
    machine.guest_write(0..1, 0xf8);
    machine.job.complete().unwrap();
    let mut answers = 0;
    let switch = loop {
        match machine.take_all() {
            Rest::Switch(switch) => break switch,
            rest if machine.out.is_empty() => machine.now = rest.wait().expect("a retry"),
            _ => {}
        }
        while !machine.out.is_empty() {
            if machine.kinds()[0] == OpKind::Flush && answers < 2 {
                answers += 1;
                let out = machine.out.remove(0);
                machine.report(out.op, Outcome::Status(extent));
                continue;
            }
            machine.answer(0);
        }
    };
    assert_eq!(answers, 2);
    switch.commit();
}

#[test]
fn an_operation_of_another_job_is_ignored() {
    let mut first = Machine::started(LEN, single());
    let mut second = Machine::started(LEN, single());
    let _ = first.take_all();
    let _ = second.take_all();
    let out = first.out.remove(0);
    let before = format!("{:?}", second.job.query());
    second.report(out.op, Outcome::Done);
    assert_eq!(format!("{:?}", second.job.query()), before);
    let _ = second.drive().wait();
    assert!(second.is_equal());
}

#[test]
fn a_guest_that_may_not_be_held_at_all_is_held_for_as_little_as_can_be() {
    let mut options = options();
    options.hold_max = Duration::ZERO;
    options.downtime_max = Duration::ZERO;
    let mut machine = Machine::ready(LEN, options);
    machine.guest_write(0..1, 0xf9);
    complete(&mut machine);
    assert!(machine.is_equal());
}

#[test]
fn a_guest_write_that_hangs_does_not_hold_the_others_for_long() {
    for is_start in [true, false] {
        let mut options = options();
        options.hold_max = 300 * MS;
        options.job.id = Some("m".to_owned());
        let mut machine = if is_start {
            Machine::new(LEN, options)
        } else {
            Machine::ready(LEN, options)
        };
        let node = machine.node.clone();
        let hanging = node.begin_write((0..1).into()).go().unwrap();
        match is_start {
            true => machine.job.start().unwrap(),
            false => machine.job.complete().unwrap(),
        }
        let start = machine.now;
        let until = machine.drive_now().wait();
        assert_eq!(until, Some(start + 300 * MS));
        assert!(machine.is_guest_held());
        machine.now = start + 300 * MS;
        let until = machine.drive_now().wait().expect("it is tried again");
        assert!(!machine.is_guest_held());
        machine.guest_write(4096..4097, 0xfb);
        machine.now = until;
        let _ = machine.drive_now();
        assert!(machine.is_guest_held(), "tried again");
        assert_eq!(times_held_in_vain(&machine.job), 1);
        machine.now += 300 * MS;
        let until = machine.drive_now().wait().expect("and again");
        machine.now = until;
        let _ = machine.drive_now();
        assert_eq!(times_held_in_vain(&machine.job), 0, "it was told");
        machine.guest_lands(0..1, 0xfa);
        hanging.finish(());
        if is_start {
            let _ = machine.drive().wait();
            assert_eq!(machine.job.query().status, Status::Ready);
            machine.job.complete().unwrap();
        }
        // The end is another matter than the start.
        let again = node.begin_write((0..1).into()).go().filter(|_| is_start);
        if let Some(hanging) = again {
            let _ = machine.drive_now();
            machine.now += 300 * MS;
            let until = machine.drive_now().wait().expect("it is tried again");
            machine.guest_lands(0..1, 0xfc);
            hanging.finish(());
            machine.now = until;
        }
        machine.drive().switch().commit();
        machine.drive().done().unwrap();
        assert_eq!(times_held_in_vain(&machine.job), usize::from(is_start));
        assert!(machine.is_equal());
    }
}

/// Of the events since they were last taken.
fn times_held_in_vain(job: &blockjob::Job) -> usize {
    let events = std::iter::from_fn(|| job.next_event());
    events
        .filter(|event| matches!(event, Event::HeldInVain))
        .count()
}

#[test]
fn a_target_that_fails_to_settle_has_the_scan_ask_nothing_twice() {
    let zero = |len| {
        Outcome::Status(blockjob::Extent {
            len,
            content: Content::Zero,
            in_top: true,
        })
    };
    let node = Node::new(1 << 20);
    let source = Limits::new(1 << 20);
    let mut target = source;
    target.write_zeroes = Some(RangeLimits {
        align: 4096,
        max: 1 << 20,
    });
    target.cheap_zeroes = true;
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    let mut mirror = Mirror::new(&node, source, target, options).unwrap();
    mirror.job().start().unwrap();
    let mut now = Duration::ZERO;
    let ask_at = |mirror: &mut Mirror, now| match mirror.poll(now, Waker::noop()) {
        blockjob::Step::Op(op) => Some(op),
        _ => None,
    };

    let look = ask_at(&mut mirror, now).unwrap();
    mirror.op_done(now, look, zero(4096));
    let lost = ask_at(&mut mirror, now).unwrap();
    assert!(matches!(lost.kind(), OpKind::Zero(..)));
    drop(lost);
    mirror.ops_lost();
    let settle = ask_at(&mut mirror, now).unwrap();
    assert_eq!(settle.kind(), OpKind::Settle);
    let look = ask_at(&mut mirror, now).unwrap();
    assert!(matches!(look.kind(), OpKind::Status(_)));
    let failed = Outcome::Failed {
        side: Side::Target,
        error: ErrorKind::TimedOut.into(),
    };
    mirror.op_done(now, settle, failed);
    now += Duration::from_secs(1);
    let settle = ask_at(&mut mirror, now).unwrap();
    assert_eq!(settle.kind(), OpKind::Settle, "again, after a while");
    assert!(
        ask_at(&mut mirror, now).is_none(),
        "the first question is still out"
    );
    mirror.op_done(now, look, zero(1 << 20));
    mirror.op_done(now, settle, Outcome::Done);
    mirror.check_invariants();
}
