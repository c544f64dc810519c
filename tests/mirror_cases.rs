//! The mirror, case by case, driven by hand: orders of events in which mirrors have lost data, stood
//! still, or gone on when they must not.

#[path = "mirror_cases/active.rs"]
mod active;
#[path = "mirror_cases/active_review.rs"]
mod active_review;
#[path = "mirror_cases/adaptive.rs"]
mod adaptive;
#[path = "mirror_cases/bitmaps.rs"]
mod bitmaps;
#[path = "mirror_cases/layers.rs"]
mod layers;
#[path = "support/machine.rs"]
mod machine;
#[path = "mirror_cases/verify.rs"]
mod verify;
#[path = "mirror_cases/zeroes.rs"]
mod zeroes;

use std::io::ErrorKind;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::{
    Begin, Cancel, Content, Event, Granularity, JobError, Limits, Mirror, MirrorError,
    MirrorOptions, MirrorSync, Node, OnError, OpKind, Outcome, RangeLimits, ShapeError, Side,
    Status, Unmap,
};

use machine::{KIB, MIB, MS, Machine, Rest, is_final, options};

const LEN: u64 = 64 * KIB;

fn is_status(kind: OpKind) -> bool {
    matches!(kind, OpKind::Status(_))
}

/// A target that makes zeroes and discards.
fn zeroing(len: u64, align: u32, is_cheap: bool) -> Limits {
    let mut limits = Limits::new(len);
    limits.write_zeroes = Some(RangeLimits {
        align,
        max: 1 << 30,
    });
    limits.cheap_zeroes = is_cheap;
    limits
}

/// Granules of 4 KiB, copied one by one.
fn single() -> MirrorOptions {
    let mut options = options();
    options.chunk_max = 4 * KIB;
    options
}

/// Drives a job that is ready, or will be, to its end by a switch.
fn complete(machine: &mut Machine) {
    let _ = machine.drive().wait();
    machine.job.complete().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
}

// Tracking

#[test]
fn a_guest_write_in_flight_at_the_start_is_not_lost() {
    let mut machine = Machine::new(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..4096).into()).go().expect("open");
    machine.job.start().unwrap();
    assert_eq!(machine.take_all().wait(), Some(machine.now + 5000 * MS));
    assert!(machine.asked.is_empty(), "nothing is looked at before");
    assert!(machine.is_guest_held());
    machine.guest_lands(0..4096, 0x99);
    // Who tries at the gate wakes the job, too: it looks again.
    let _ = machine.take_all().wait();
    machine.woken.take();
    ticket.finish(());
    assert!(machine.woken.take() > 0, "its end wakes the job");
    let _ = machine.drive().wait();
    assert!(!machine.is_guest_held());
    assert!(machine.is_equal());
}

#[test]
fn a_guest_write_to_an_area_that_was_scanned_already_is_copied() {
    for sync in [MirrorSync::Full, MirrorSync::Top] {
        let mut options = single();
        options.sync = sync;
        let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, true), options);
        machine.target.fill(0);
        machine.lay(0..LEN / 2, Content::Zero, false);
        machine.job.start().unwrap();
        let _ = machine.take_all();
        machine.answer(machine.find(is_status).expect("the first look"));
        // The look at the second half is held, and so are the zeroes of the first.
        let _ = machine.take_all();
        machine.guest_write(0..4096, 0x42);
        machine.guest_write(LEN / 2..LEN / 2 + 1, 0x43);
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, Status::Ready);
        assert!(machine.is_equal(), "{sync:?}");
    }
}

#[test]
fn nothing_is_copied_before_the_zeroes_of_the_scan_have_landed() {
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, true), single());
    machine.lay(0..LEN / 2, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    machine.guest_write(0..1, 0x55);
    while let Some(look) = machine.find(is_status) {
        machine.answer(look);
        let _ = machine.take_all();
    }
    assert!(
        machine
            .find(|kind| matches!(kind, OpKind::Zero(..)))
            .is_some()
    );
    assert!(
        machine
            .find(|kind| matches!(kind, OpKind::Copy(_)))
            .is_none(),
        "{:?}",
        machine.kinds()
    );
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

// What the target held before

#[test]
fn what_the_target_held_before_does_not_matter() {
    for (name, target) in [
        ("cheap zeroes", zeroing(LEN + 100, 1, true)),
        ("cheap zeroes of 8 KiB", zeroing(LEN + 100, 8192, true)),
        ("zeroes", zeroing(LEN + 100, 512, false)),
        ("no zeroes", Limits::new(LEN + 100)),
    ] {
        for unmap in [Unmap::Allowed, Unmap::Forbidden] {
            let mut options = single();
            options.unmap = unmap;
            let mut machine = Machine::with_limits(Limits::new(LEN + 100), target, options);
            machine.lay(512..20 * KIB, Content::Zero, false);
            machine.lay(30 * KIB..LEN + 100, Content::Zero, false);
            machine.job.start().unwrap();
            let _ = machine.drive().wait();
            assert!(machine.is_equal(), "{name}, {unmap:?}");
            let zeroes = machine
                .asked
                .iter()
                .filter(|kind| matches!(kind, OpKind::Zero(..)))
                .count();
            assert_eq!(zeroes > 0, name != "no zeroes", "{name}");
        }
    }
}

#[test]
fn zeroes_that_fail_are_tried_again_and_not_counted_as_done() {
    let mut options = single();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, true), options);
    machine.lay(0..LEN / 2, Content::Zero, false);
    let mut failures = 0;
    machine.fault = Some(Box::new(move |_, kind| {
        let fails = matches!(kind, OpKind::Zero(..)) && failures < 5;
        failures += usize::from(fails);
        fails.then_some((Side::Target, ErrorKind::Other))
    }));
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(machine.is_equal());
}

#[test]
fn the_zeroes_of_the_scan_are_no_progress() {
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, true), single());
    machine.lay(0..LEN / 2, Content::Zero, false);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    let progress = machine.job.query().progress;
    assert_eq!((progress.current, progress.total), (LEN / 2, LEN / 2));
}

#[test]
fn top_copies_what_the_top_layer_holds_and_none_copies_nothing() {
    for (sync, copied) in [(MirrorSync::Top, 3 * 4096), (MirrorSync::None, 0)] {
        let mut options = single();
        options.sync = sync;
        let mut machine = Machine::new(LEN, options);
        machine.lay(0..LEN, Content::Data, false);
        machine.lay(5 * 4096..8 * 4096, Content::Data, true);
        machine.target.copy_from_slice(&machine.source.clone());
        machine.target[5 * 4096..5 * 4096 + copied].fill(0xaa);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        assert_eq!(machine.copied, copied as u64, "{sync:?}");
        assert!(machine.is_equal());
        machine.guest_write(100..5000, 0x31);
        complete(&mut machine);
        assert_eq!(machine.copied, copied as u64 + 2 * 4096);
        assert!(machine.is_equal());
    }
}

// Zero areas

#[test]
fn what_is_not_aligned_to_the_target_goes_as_data() {
    for align in [4 * KIB, 16 * KIB] {
        let target = zeroing(LEN, align as u32, false);
        let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
        machine.lay(3 * KIB..60 * KIB + 512, Content::Zero, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        assert!(machine.is_equal());
        let mut zeroed = 0;
        for kind in &machine.asked {
            if let OpKind::Zero(range, _) = kind {
                assert_eq!((range.start() % align, range.end() % align), (0, 0));
                zeroed += range.len();
            }
        }
        let inner = 60 * KIB / align * align - (3 * KIB).next_multiple_of(align);
        assert_eq!(zeroed, inner);
    }
}

#[test]
fn what_is_undefined_is_discarded_or_made_zero() {
    for can_discard in [true, false] {
        let mut target = zeroing(LEN, 4096, false);
        if can_discard {
            target.discard = Some(RangeLimits {
                align: 8192,
                max: 1 << 30,
            });
        }
        let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
        machine.lay(4 * KIB..LEN / 2, Content::Undefined, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        let discards = machine
            .asked
            .iter()
            .filter(|kind| matches!(kind, OpKind::Discard(_)))
            .count();
        assert_eq!(discards > 0, can_discard);
        assert_eq!(machine.target[..4096], machine.source[..4096]);
        assert_eq!(machine.target[32768..], machine.source[32768..]);
        // A guest write there is copied like any other.
        machine.guest_write(9 * KIB..10 * KIB, 0x66);
        complete(&mut machine);
        assert_eq!(machine.target[9216..10240], machine.source[9216..10240]);
    }
}

#[test]
fn a_look_that_fails_is_taken_for_data() {
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, false), options());
    machine.lay(0..LEN, Content::Zero, true);
    machine.fault = Some(Box::new(|_, kind| {
        is_status(kind).then_some((Side::Source, ErrorKind::Other))
    }));
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(machine.copied, LEN);
    assert!(!machine.names().contains(&"ERROR".to_owned()));
}

// Order of clearing, looking, reading, writing

#[test]
fn a_guest_write_after_the_read_is_copied_again() {
    let mut machine = Machine::started(LEN, single());
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let copy = machine.find_copy(0);
    machine.read(copy);
    machine.guest_write(10..20, 0xfe);
    let _ = machine.take_all();
    assert_eq!(
        machine
            .kinds()
            .iter()
            .filter(
                |kind| kind.writes_target() && kind.range().is_some_and(|range| range.contains(0))
            )
            .count(),
        1,
        "not while the first copy is out"
    );
    machine.answer(copy);
    assert_ne!(machine.target[10], 0xfe, "what was read is older");
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(machine.copied, LEN + 4096);
}

#[test]
fn a_guest_write_between_look_and_copy_is_copied() {
    // What read as zeroes when it was looked at is written before the zeroes are.
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, false), single());
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    machine.answer(0);
    machine.guest_write(0..512, 0x12);
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn a_range_is_never_written_twice_at_the_same_time() {
    // The harness compares all that is out; here a range is dirtied again and again meanwhile.
    let mut machine = Machine::started(LEN, single());
    for turn in 0..200u64 {
        let _ = machine.take_all();
        machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
        if !machine.out.is_empty() {
            let last = machine.out.len() - 1;
            machine.answer(last);
        }
    }
    complete(&mut machine);
    assert!(machine.is_equal());
}

// Clusters

#[test]
fn two_dirty_chunks_of_one_cluster_and_a_slow_first_write() {
    let len = 2 * MIB;
    let mut target = Limits::new(len);
    target.cluster = Some(MIB as u32);
    target.fills_clusters = true;
    let mut options = options();
    options.granularity = Granularity::from_bytes(64 * KIB);
    options.sync = MirrorSync::None;
    let mut machine = Machine::with_limits(Limits::new(len), target, options);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    machine.target.fill(0);
    machine.source.fill(0);
    machine.guest_write(0..100, 1);
    machine.now += 100 * MS;
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let first = machine.find_copy(0);
    assert_eq!(
        machine.kinds()[first],
        OpKind::Copy((0..MIB).into()),
        "the first write covers the cluster"
    );
    machine.read(first);
    // Meanwhile the guest writes to another chunk of the cluster, and again to the same.
    machine.guest_write(512 * KIB..512 * KIB + 10, 2);
    machine.guest_write(0..50, 3);
    machine.now += 100 * MS;
    let _ = machine.take_all();
    assert_eq!(machine.out.len(), 1, "the cluster is taken");
    machine.answer(0);
    complete(&mut machine);
    assert!(machine.is_equal());
    let pieces: Vec<_> = machine
        .asked
        .iter()
        .filter_map(|kind| match kind {
            OpKind::Copy(range) => Some(range.len()),
            _ => None,
        })
        .collect();
    assert_eq!(
        pieces,
        [MIB, 64 * KIB, 64 * KIB],
        "later writes need not cover it"
    );
}

#[test]
fn the_last_cluster_may_be_short() {
    let len = MIB + 70_001;
    let mut target = Limits::new(len);
    target.cluster = Some(MIB as u32);
    target.fills_clusters = true;
    let mut options = options();
    options.sync = MirrorSync::None;
    let mut machine = Machine::with_limits(Limits::new(len), target, options);
    machine.target.copy_from_slice(&machine.source.clone());
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    machine.guest_write(len - 1..len, 9);
    machine.guest_write(MIB - 1..MIB, 9);
    complete(&mut machine);
    assert!(machine.is_equal());
}

// Convergence

#[test]
fn ready_is_reached_while_the_guest_writes_now_and_then() {
    let mut options = single();
    options.workers = 2;
    let mut machine = Machine::started(LEN, options);
    for turn in 0..1000u64 {
        let _ = machine.take_all();
        if machine.job.query().status == Status::Ready {
            let _ = machine.drive().wait();
            assert!(machine.is_equal());
            return;
        }
        if turn % 7 == 0 {
            machine.guest_write((turn * 577) % LEN..(turn * 577) % LEN + 1, turn as u8);
        }
        machine.answer(0);
        machine.now += MS;
    }
    panic!("not ready: {:?}", machine.job.query());
}

#[test]
fn complete_comes_to_an_end_while_the_guest_never_ceases_to_write() {
    let mut machine = Machine::ready(LEN, single());
    machine.guest_write(0..1, 0xfe);
    machine.now += 100 * MS;
    let _ = machine.drive().wait();
    machine.job.complete().unwrap();
    // A copy ends during each flush, so there is always something that was not flushed yet.
    for turn in 0..1000u64 {
        if machine.is_guest_held() {
            machine.drive().switch().commit();
            machine.drive().done().unwrap();
            assert!(machine.is_equal());
            return;
        }
        machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
        machine.now += MS;
        let _ = machine.take_all();
        // What was handed out last is answered first, and a flush takes three times as long.
        while let Some(index) = machine.find(|kind| kind != OpKind::Flush) {
            machine.answer(index);
            let _ = machine.take_all();
        }
        if turn % 3 == 2 {
            machine.answer_all();
        }
    }
    panic!("no end: {:?}", machine.job.query());
}

#[test]
fn the_guest_is_not_held_while_more_is_left_than_can_be_copied_in_time() {
    // 4 KiB per 10 ms are seen, so 20 ms are good for 8 KiB.
    let mut options = single();
    options.workers = 1;
    options.downtime_max = 20 * MS;
    let mut machine = Machine::started(LEN, options);
    while machine.job.query().status != Status::Ready {
        let rest = machine.take_all();
        if machine.out.is_empty() {
            let _ = rest.wait();
            machine.now += 10 * MS;
        }
        while !machine.out.is_empty() {
            if matches!(machine.kinds()[0], OpKind::Copy(_)) {
                machine.now += 10 * MS;
            }
            machine.answer(0);
        }
    }
    machine.guest_write(0..LEN, 1);
    machine.job.complete().unwrap();
    let switch = loop {
        let left = LEN - (machine.copied - LEN);
        let rest = machine.take_all();
        if machine.is_guest_held() {
            assert!(left <= 8 * KIB, "held with {left} bytes left");
            break match rest {
                Rest::Switch(switch) => switch,
                _ => machine.drive().switch(),
            };
        }
        machine.now += 10 * MS;
        machine.answer(0);
    };
    switch.commit();
    machine.drive().done().unwrap();
    assert!(machine.is_equal());
}

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

// The end

#[test]
fn the_matrix_of_cancels() {
    for how in [Cancel::Soft, Cancel::Force] {
        for is_ready in [false, true] {
            let mut machine = Machine::started(LEN, options());
            if is_ready {
                let _ = machine.drive().wait();
                machine.guest_write(0..5000, 0x31);
            } else {
                let _ = machine.take_all();
            }
            machine.job.cancel(how).unwrap();
            let result = machine.drive().done();
            let is_orderly = is_ready && how == Cancel::Soft;
            assert_eq!(result.is_ok(), is_orderly);
            assert!(!machine.is_guest_held());
            if is_orderly {
                assert!(machine.is_equal() && !machine.is_unflushed);
            }
            let last = machine.events().iter().find(|event| is_final(event));
            let is_cancelled = matches!(last, Some(Event::Cancelled { .. }));
            assert_eq!(is_cancelled, !is_orderly);
            // The guest goes on, and nobody records it.
            machine.guest_write(0..1, 1);
        }
    }
}

#[test]
fn a_guest_write_that_waits_at_the_gate_lands_on_the_new_disk_only() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    let node = machine.node.clone();
    let Begin::Wait(mut pending) = node.begin_write((0..1).into()) else {
        panic!("the guest is held");
    };
    assert!(pending.try_begin().is_none());
    assert!(pending.poll_begin(&machine.waker()).is_pending());
    machine.woken.take();
    let old = machine.source.clone();
    assert!(machine.is_equal());
    switch.commit();
    assert!(machine.woken.take() > 0, "who waits is woken");
    let Poll::Ready(Ok(ticket)) = pending.poll_begin(Waker::noop()) else {
        panic!("the guest goes on");
    };
    machine.target[0] = 0xf1;
    ticket.finish(());
    let count = machine.asked.len();
    machine.drive().done().unwrap();
    assert_eq!(machine.asked.len(), count, "nothing is copied over it");
    assert_eq!((machine.target[0], machine.source), (0xf1, old));
}

#[test]
fn a_guest_write_before_the_last_look_is_on_the_target_at_the_switch() {
    let mut machine = Machine::ready(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..4096).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all().wait();
    assert!(machine.is_guest_held(), "it waits for the write");
    let _ = machine.take_all().wait();
    machine.guest_lands(0..4096, 0x61);
    machine.woken.take();
    ticket.finish(());
    assert!(machine.woken.take() > 0);
    let switch = machine.drive().switch();
    assert!(machine.is_equal());
    switch.commit();
    machine.drive().done().unwrap();
}

#[test]
fn a_switch_that_is_dropped_leaves_the_guest_on_the_source() {
    let mut machine = Machine::ready(LEN, options());
    for round in 0..3 {
        machine.job.complete().unwrap();
        let switch = machine.drive().switch();
        assert!(machine.is_guest_held() && machine.is_equal());
        machine.woken.take();
        drop(switch);
        assert!(machine.woken.take() > 0, "the machine goes on");
        machine.guest_write(round * 100..round * 100 + 50, round as u8 + 100);
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, Status::Ready);
        assert!(machine.is_equal());
    }
    complete(&mut machine);
}

#[test]
fn a_pause_lets_a_held_guest_go() {
    let mut machine = Machine::ready(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..1).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive_now();
    assert!(machine.is_guest_held());
    machine.job.pause().unwrap();
    let _ = machine.drive();
    assert!(!machine.is_guest_held());
    assert_eq!(machine.job.query().status, Status::Standby);
    ticket.finish(());
    machine.job.resume().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
}

// Start errors

#[test]
fn what_is_wrong_at_the_start_is_told_and_changes_nothing() {
    type Spoil = fn(&mut Limits, &mut Limits, &mut MirrorOptions);
    let node = Node::new(LEN);
    let refused = |spoil: Spoil| {
        let (mut source, mut target) = (Limits::new(LEN), Limits::new(LEN));
        let mut options = options();
        spoil(&mut source, &mut target, &mut options);
        let error = Mirror::new(&node, source, target, options).unwrap_err();
        // The node is free and nothing is recorded: another mirror can be made, and is dropped.
        let limits = Limits::new(LEN);
        Mirror::new(&node, limits, limits, MirrorOptions::default()).expect("as before");
        assert!(node.begin_write((0..1).into()).go().is_some());
        assert!(!error.to_string().is_empty());
        error
    };

    let error = refused(|_, target, _| target.len += 1);
    assert_eq!(
        error,
        MirrorError::Lengths {
            node: LEN,
            source_len: LEN,
            target: LEN + 1
        }
    );
    assert!(error.to_string().contains("different sizes"), "{error}");
    assert!(matches!(
        refused(|source, _, _| source.len -= 1),
        MirrorError::Lengths { .. }
    ));
    assert!(matches!(
        refused(|source, target, _| {
            source.len = 5;
            target.len = 5;
        }),
        MirrorError::Lengths { node: LEN, .. }
    ));
    assert_eq!(
        refused(|source, target, _| {
            source.identity = Some(7);
            target.identity = Some(7);
        }),
        MirrorError::SameStorage
    );
    for bytes in [128 << 20, 256] {
        let granularity = Granularity::from_bytes(bytes);
        let Some(granularity) = granularity else {
            continue; // not one at all
        };
        let mut options = options();
        options.granularity = Some(granularity);
        let limits = Limits::new(LEN);
        assert_eq!(
            Mirror::new(&node, limits, limits, options).unwrap_err(),
            MirrorError::Granularity(granularity)
        );
    }
    assert_eq!(
        refused(|_, _, options| options.workers = 0),
        MirrorError::Workers(0)
    );
    assert_eq!(
        refused(|_, _, options| options.workers = 1025),
        MirrorError::Workers(1025)
    );
    assert_eq!(
        refused(|_, _, options| options.chunk_max = 0),
        MirrorError::Zero("chunk_max")
    );
    assert_eq!(
        refused(|_, _, options| options.buf_size = 0),
        MirrorError::Zero("buf_size")
    );
    assert_eq!(
        refused(|_, target, _| {
            target.cluster = Some(MIB as u32);
            target.fills_clusters = true;
            target.max_transfer = 512 << 10;
        }),
        MirrorError::Shape(ShapeError::PieceTooLong {
            piece: MIB,
            max: 512 << 10
        })
    );
    let bad_limits: [(&str, Spoil); 7] = [
        ("request_align", |source, _, _| source.request_align = 3),
        ("mem_align", |source, _, _| source.mem_align = 0),
        ("max_transfer", |source, _, _| source.max_transfer = 0),
        ("write_zeroes.align", |source, _, _| {
            source.write_zeroes = Some(RangeLimits { align: 0, max: 1 });
        }),
        ("discard.max", |source, _, _| {
            source.discard = Some(RangeLimits { align: 8, max: 7 });
        }),
        ("cluster", |source, _, _| source.cluster = Some(100)),
        ("cluster", |source, _, _| source.fills_clusters = true),
    ];
    for (field, spoil) in bad_limits {
        let MirrorError::Limits { side, error } = refused(spoil) else {
            panic!("{field}");
        };
        assert_eq!((side, error.field), (Side::Source, field));
    }

    let limits = Limits::new(LEN);
    let first = Mirror::new(&node, limits, limits, MirrorOptions::default()).unwrap();
    let second = Mirror::new(&node, limits, limits, MirrorOptions::default()).unwrap_err();
    assert_eq!(second, MirrorError::NodeBusy);
    drop(first);
}

// Sizes

#[test]
fn odd_sizes_are_copied_to_the_last_byte() {
    let sizes = [
        0, 1, 511, 512, 513, 4095, 4096, 4097, 65_535, 65_536, 65_537, 100_001,
    ];
    for len in sizes {
        for (source_align, target_align) in [(1, 1), (512, 4096), (4096, 1)] {
            let mut source = Limits::new(len);
            source.request_align = source_align;
            let mut target = zeroing(len, 4096, len % 2 == 0);
            target.request_align = target_align;
            let mut machine = Machine::with_limits(source, target, single());
            machine.lay(0..len / 3 / 512 * 512, Content::Zero, true);
            machine.job.start().unwrap();
            let _ = machine.drive().wait();
            assert!(machine.is_equal(), "{len}");
            if len > 0 {
                machine.guest_write(len - 1..len, 0xf0);
                machine.guest_write(0..1, 0xf0);
            }
            complete(&mut machine);
            assert!(machine.is_equal(), "{len}");
            let progress = machine.job.query().progress;
            assert_eq!(progress.current, progress.total);
            let align = u64::from(source_align.max(target_align));
            for kind in &machine.asked {
                if let OpKind::Copy(range) = kind {
                    assert_eq!(range.start() % align, 0);
                    assert!(range.end() % align == 0 || range.end() == len);
                }
            }
        }
    }
}

// Waking and batching

#[test]
fn a_guest_write_wakes_the_job_and_those_that_follow_are_batched() {
    let mut options = single();
    options.job.auto_finalize = false;
    for is_pending in [false, true] {
        let mut machine = Machine::ready(LEN, options.clone());
        if is_pending {
            machine.job.complete().unwrap();
            let _ = machine.drive().wait();
            assert_eq!(machine.job.query().status, Status::Pending);
        }
        machine.now += Duration::from_secs(1);
        let start = machine.now;
        let mut wakes = 0;
        machine.woken.take();
        // A write each 100 µs for 100 ms, with the machine asked whenever it wants to be.
        let mut due = None;
        for turn in 0..1000u64 {
            machine.now = start + Duration::from_micros(turn * 100);
            machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
            if machine.woken.take() > 0 || due.is_some_and(|due| due <= machine.now) {
                wakes += 1;
                let now = machine.now;
                due = machine.drive_until(now).wait();
            }
        }
        assert!((5..=21).contains(&wakes), "{wakes} wake-ups in 100 ms");
        let _ = machine.drive().wait();
        assert!(machine.is_equal());
    }
}

#[test]
fn a_job_with_nothing_to_do_sleeps_until_it_is_woken() {
    let mut machine = Machine::ready(LEN, options());
    machine.now += Duration::from_secs(10);
    assert_eq!(machine.take_all().wait(), None);
    assert_eq!(machine.woken.take(), 0);
    machine.now += Duration::from_secs(10);
    machine.guest_write(0..1, 5);
    assert!(machine.woken.take() > 0);
}

// Limits on what is out

#[test]
fn neither_buffers_nor_operations_go_beyond_their_limits() {
    for workers in [1, 3, 16] {
        for buf_size in [1, 4 * KIB, 20 * KIB, MIB] {
            for chunk_max in [1, 4 * KIB, 16 * KIB, 1 << 40] {
                let mut options = options();
                options.workers = workers;
                options.buf_size = buf_size;
                options.chunk_max = chunk_max;
                let mut machine = Machine::started(256 * KIB, options);
                let mut turn = 0;
                while machine.job.query().status != Status::Ready {
                    let _ = machine.take_all();
                    turn += 1;
                    let index = turn * 7 % machine.out.len();
                    machine.answer(index);
                }
                assert!(machine.is_equal());
                assert!(machine.out_max <= workers, "{} out", machine.out_max);
                let most = buf_size.max(4 * KIB);
                assert!(
                    machine.buffered_max <= most,
                    "{} bytes in buffers of {buf_size}",
                    machine.buffered_max
                );
            }
        }
    }
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
        machine.guest_lands(0..1, 0xfa);
        hanging.finish(());
        if is_start {
            let _ = machine.drive().wait();
            assert_eq!(machine.job.query().status, Status::Ready);
            machine.job.complete().unwrap();
        }
        machine.drive().switch().commit();
        machine.drive().done().unwrap();
        assert!(machine.is_equal());
    }
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
