//! Targets that are compared with their source: older copies, and such as something has damaged.

use std::io::ErrorKind;

use blockjob::{
    Adaptive, Cancel, Checkpoint, CheckpointId, CommitOptions, CompareBy, Content, CopyMode, Event,
    Granularity, Limits, Mirror, MirrorError, MirrorOptions, Node, OnError, OpKind, Side, Status,
    TargetHolds, VerbError, Verified,
};

use crate::machine::{KIB, Machine, options};
use crate::{LEN, complete, is_status, single, zeroing};

fn comparable(len: u64) -> Limits {
    let mut limits = Limits::new(len);
    limits.compare = Some(CompareBy::Reading);
    limits
}

/// An older copy that differs in these granules of 4 KiB.
fn older(granules: &[u64]) -> Machine {
    let mut options = options();
    options.target_holds = TargetHolds::OlderCopy;
    let mut machine = Machine::with_limits(Limits::new(LEN), comparable(LEN), options);
    machine.target = machine.source.clone();
    damage(&mut machine, granules);
    machine
}

/// A mirror in step whose target is damaged in these granules.
fn damaged(granules: &[u64]) -> Machine {
    damaged_with(options(), granules)
}

fn damaged_with(options: MirrorOptions, granules: &[u64]) -> Machine {
    let mut machine = Machine::with_limits(Limits::new(LEN), comparable(LEN), options);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    damage(&mut machine, granules);
    machine.asked.clear();
    machine.new_names();
    // It does not wait for more guest writes any more.
    machine.now += 20 * crate::MS;
    machine
}

/// One byte of each.
fn damage(machine: &mut Machine, granules: &[u64]) {
    for granule in granules {
        machine.target[(granule * 4 * KIB + 100) as usize] ^= 0xff;
    }
}

fn copies(machine: &Machine) -> Vec<u64> {
    let starts = machine.asked.iter().filter_map(|kind| match kind {
        OpKind::Copy(range) => Some((range.start()..range.end()).step_by(4096)),
        _ => None,
    });
    let mut granules: Vec<u64> = starts.flatten().map(|start| start / 4096).collect();
    granules.sort_unstable();
    granules
}

fn is_compare(kind: OpKind) -> bool {
    matches!(kind, OpKind::Compare(..))
}

#[test]
fn of_an_older_copy_only_what_differs_is_copied() {
    let mut machine = older(&[3, 4, 9]);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert_eq!(copies(&machine), [3, 4, 9]);
    assert!(machine.is_equal());
    let found = machine.job.query().verification.unwrap();
    assert_eq!(
        (found.state, found.compared, found.differing),
        (Verified::Whole, LEN, 12 * KIB)
    );
    let names = machine.new_names();
    let at = |name: &str| names.iter().position(|known| known == name).unwrap();
    assert!(
        at("DIFFERS") < at("VERIFIED") && at("VERIFIED") < at("READY"),
        "{names:?}"
    );
    complete(&mut machine);
}

#[test]
fn a_verification_tells_what_differs_and_mends_it() {
    let mut machine = damaged(&[0, 1, 7, 15]);
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(copies(&machine), [0, 1, 7, 15]);
    let differing = machine.mirror().differing().unwrap().clone();
    let granules: Vec<u64> = differing.iter().map(|start| start / 4096).collect();
    assert_eq!(granules, [0, 1, 7, 15]);
    let told: Vec<(u64, u64, u64)> = machine
        .events()
        .iter()
        .filter_map(|event| match event {
            Event::Differs(found) => Some((
                found.range.start() / 4096,
                found.range.end() / 4096,
                found.bytes / 4096,
            )),
            _ => None,
        })
        .collect();
    assert_eq!(told, [(0, 2, 2), (7, 8, 1), (15, 16, 1)]);
    assert_eq!(machine.job.query().status, Status::Ready, "it stays so");

    // Once more, and nothing is found.
    machine.asked.clear();
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    let found = machine.job.query().verification.unwrap();
    assert_eq!((found.compared, found.differing), (LEN, 0));
    assert!(copies(&machine).is_empty());
    assert!(machine.mirror().differing().unwrap().is_clean());
    complete(&mut machine);
}

#[test]
fn what_the_guest_is_just_writing_is_no_difference() {
    let mut machine = damaged(&[9]);
    let node = machine.node.clone();
    let ticket = node
        .begin_write((8 * KIB..12 * KIB).into())
        .go()
        .expect("open");
    machine.guest_lands(8 * KIB..12 * KIB, 0x42);
    machine.job.verify().unwrap();
    let _ = machine.drive_now().wait();
    // It was compared, and the job waits for the write to settle before it says anything.
    assert_eq!(machine.job.query().verification.unwrap().compared, LEN);
    assert_eq!(machine.new_names(), Vec::<String>::new());
    assert!(copies(&machine).is_empty());
    let left = machine.mirror().left_dirty().unwrap();
    assert!(
        left.is_dirty(9 * 4096).unwrap(),
        "what is suspected counts as missing"
    );
    ticket.finish(());
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    assert_eq!(machine.new_names(), ["DIFFERS", "VERIFIED"]);
    assert_eq!(machine.job.query().verification.unwrap().differing, 4 * KIB);
    assert_eq!(copies(&machine), [2, 9]);
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn a_guest_that_hangs_does_not_hold_others() {
    let mut machine = damaged(&[9]);
    let node = machine.node.clone();
    let ticket = node.begin_write((0..4 * KIB).into()).go().expect("open");
    machine.job.verify().unwrap();
    let until = machine.drive_now().wait();
    assert!(until.is_some() && machine.is_guest_held());
    machine.now = until.unwrap();
    let _ = machine.drive_now().wait();
    assert!(!machine.is_guest_held(), "others go on after five seconds");
    ticket.cancel();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn what_is_undefined_is_no_difference() {
    let mut machine = damaged(&[2, 5]);
    machine.lay(8 * KIB..12 * KIB, Content::Undefined, true);
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(copies(&machine), [5]);
    assert_eq!(machine.job.query().verification.unwrap().differing, 4 * KIB);
}

#[test]
fn the_end_waits_for_no_verification() {
    for is_found in [false, true] {
        let mut machine = damaged(&[2]);
        machine.job.verify().unwrap();
        if is_found {
            // Compared, and not told: it is copied before the switch.
            let _ = machine.take_all();
            machine.answer_all();
        }
        machine.job.complete().unwrap();
        assert_eq!(machine.job.verify().unwrap_err(), VerbError::CannotVerify);
        let switch = machine.drive().switch();
        assert_eq!(machine.is_equal(), is_found);
        switch.commit();
        machine.drive().done().unwrap();
        let state = machine.job.query().verification.map(|found| found.state);
        assert_eq!(
            state,
            is_found.then_some(Verified::Cut),
            "not begun, or cut short"
        );
    }
}

#[test]
fn reads_that_fail_go_by_the_policies() {
    for side in [Side::Source, Side::Target] {
        let mut options = options();
        options.target_holds = TargetHolds::OlderCopy;
        options.job.on_source_error = OnError::Stop;
        options.job.on_target_error = OnError::Ignore;
        let mut machine = Machine::with_limits(Limits::new(LEN), comparable(LEN), options);
        machine.target = machine.source.clone();
        damage(&mut machine, &[6]);
        machine.fault = Some(Box::new(move |count, kind| {
            let fails = count < 3 && is_compare(kind);
            fails.then_some((side, ErrorKind::Other))
        }));
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        if side == Side::Source {
            assert_eq!(machine.job.query().status, Status::Paused);
            let left = machine.mirror().left_dirty().unwrap();
            assert!(left.all_dirty_in(0..LEN), "nothing is known of it yet");
            machine.fault = None;
            machine.job.resume().unwrap();
            let _ = machine.drive().wait();
        }
        assert_eq!(machine.job.query().status, Status::Ready);
        let is_copied = copies(&machine) == (0..LEN / (4 * KIB)).collect::<Vec<_>>();
        match side {
            Side::Target => assert!(is_copied, "it could not be compared"),
            _ => assert_eq!(copies(&machine), [6]),
        }
        assert!(machine.is_equal());
    }
}

/// A disk that cannot read a sector can often write it.
#[test]
fn what_a_target_can_never_read_is_copied() {
    let mut options = single();
    options.target_holds = TargetHolds::OlderCopy;
    options.job.on_target_error = OnError::Ignore;
    let mut machine = Machine::with_limits(Limits::new(LEN), comparable(LEN), options);
    machine.target = machine.source.clone();
    damage(&mut machine, &[3, 6]);
    machine.fault = Some(Box::new(|_, kind| {
        let is_bad = is_compare(kind) && kind.range().unwrap().contains(12 * KIB);
        is_bad.then_some((Side::Target, ErrorKind::Other))
    }));
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert_eq!(copies(&machine), [3, 6]);
    assert!(machine.is_equal());
}

#[test]
fn comparing_keeps_to_the_buffers_and_waits_for_copies() {
    let mut options = single();
    options.buf_size = 1;
    options.target_holds = TargetHolds::OlderCopy;
    let mut machine = Machine::with_limits(Limits::new(LEN), comparable(LEN), options);
    machine.target = machine.source.clone();
    machine.job.start().unwrap();
    let _ = machine.take_all();
    assert_eq!(
        machine.buffered_max,
        8 * KIB,
        "one at a time, by two buffers"
    );
    // What the guest writes goes first.
    machine.guest_write(40 * KIB..44 * KIB, 3);
    machine.answer(0);
    machine.asked.clear();
    let _ = machine.take_all();
    let written = (40 * KIB..44 * KIB).into();
    assert_eq!(machine.asked[0], OpKind::Status(written));
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    let found = machine.job.query().verification.unwrap();
    assert_eq!(
        found.compared,
        LEN - 4 * KIB,
        "what was copied need not be compared"
    );
}

#[test]
fn a_checkpoint_has_what_was_not_compared_yet() {
    let mut machine = older(&[12]);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    machine.answer(0);
    machine.job.pause().unwrap();
    let id = CheckpointId::default();
    let bytes = machine.mirror().checkpoint(id).unwrap();
    let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
    assert!(checkpoint.left().is_dirty(12 * 4096).unwrap());
    // Of one in step only what was found counts.
    let mut machine = damaged(&[1]);
    machine.job.verify().unwrap();
    let _ = machine.take_all();
    machine.mirror().ops_lost();
    let left = machine.mirror().left_dirty().unwrap();
    assert!(left.is_clean());
}

#[test]
fn differences_that_nobody_takes_are_told_less_exactly_and_none_is_forgotten() {
    let len = 1024 * KIB;
    let mut machine = Machine::with_limits(Limits::new(len), comparable(len), options());
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    let granules: Vec<u64> = (0..200).step_by(2).collect();
    damage(&mut machine, &granules);
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    let found: Vec<_> = machine
        .events()
        .iter()
        .filter_map(|event| match event {
            Event::Differs(found) => Some(*found),
            _ => None,
        })
        .collect();
    assert_eq!(found.len(), 64);
    assert_eq!(
        found.iter().map(|found| found.bytes).sum::<u64>(),
        100 * 4096
    );
    assert_eq!(found[63].range, (126 * 4096..199 * 4096).into());
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let machine = Machine::ready(LEN, options());
    assert_eq!(
        machine.job.verify(),
        Err(VerbError::CannotVerify),
        "no way to compare"
    );
    machine.job.cancel(Cancel::Force).unwrap();
    let machine = Machine::started(LEN, options());
    assert_eq!(
        machine.job.verify(),
        Err(VerbError::CannotVerify),
        "not ready"
    );

    let mut options = options();
    options.target_holds = TargetHolds::OlderCopy;
    let limits = Limits::new(LEN);
    let refused = Mirror::new(&Node::new(LEN), limits, limits, options).map(drop);
    assert_eq!(refused, Err(MirrorError::CannotCompare));
}

#[test]
fn a_speed_limit_and_a_pause_count_for_comparing() {
    let mut machine = damaged_with(single(), &[3]);
    machine.job.set_speed(LEN).unwrap();
    machine.job.verify().unwrap();
    let start = machine.now;
    let _ = machine.drive_until(start + 200 * crate::MS).wait();
    let compared = machine.job.query().verification.unwrap().compared;
    assert!(compared > 0 && compared < LEN, "{compared}");
    machine.job.pause().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Standby);
    machine.job.resume().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert!(machine.now >= start + 500 * crate::MS);
    assert!(machine.asked.iter().copied().any(is_status));
}

/// A mirror in step, of nothing but zeroes, that knows of its target that it reads so; which is damaged.
fn damaged_zeroes(detect_zeroes: bool, granule: u64) -> Machine {
    let mut target = zeroing(LEN, 512, false);
    target.compare = Some(CompareBy::Reading);
    let mut options = single();
    options.detect_zeroes = detect_zeroes;
    let mut machine = Machine::with_limits(Limits::new(LEN), target, options);
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    damage(&mut machine, &[granule]);
    machine.now += 20 * crate::MS;
    machine
}

#[test]
fn what_was_known_to_be_zero_is_not_trusted_while_it_is_doubtful() {
    for detect_zeroes in [false, true] {
        for compared in [false, true] {
            let mut machine = damaged_zeroes(detect_zeroes, 3);
            machine.job.verify().unwrap();
            let node = machine.node.clone();
            let written = (12 * KIB..16 * KIB).into();
            let ticket = node.begin_write(written).go().unwrap();
            if compared {
                // It is known to differ, and not told as long as that write is under way.
                let _ = machine.drive_now().wait();
            }
            machine.guest_lands(written, 0);
            if !detect_zeroes {
                machine.lay(written, Content::Zero, true);
            }
            ticket.finish(());
            let _ = machine.drive().wait();
            assert!(machine.is_equal(), "{detect_zeroes}, {compared}");
            let found = machine.job.query().verification.unwrap();
            assert_eq!(found.state, Verified::Whole);
            complete(&mut machine);
        }
    }
}

/// Of a guest that writes nothing a job is never told to be behind, whatever it compares.
#[test]
fn what_is_compared_is_neither_copied_nor_left() {
    let len = 4096 * KIB;
    let mut options = single();
    options.target_holds = TargetHolds::OlderCopy;
    options.workers = 2;
    let mut adaptive = Adaptive::default();
    adaptive.window = 10 * crate::MS;
    options.copy_mode = CopyMode::Adaptive(adaptive);
    let mut machine = Machine::with_limits(Limits::new(len), comparable(len), options);
    machine.target = machine.source.clone();
    machine.job.start().unwrap();
    let mut seen = 0;
    while machine.job.query().status == Status::Running {
        let _ = machine.take_all();
        machine.now += crate::MS;
        if !machine.out.is_empty() {
            machine.answer(0);
        }
        let info = machine.job.query().mirror.unwrap();
        assert!(!info.is_write_blocking, "the guest is not behind");
        if let Some(convergence) = info.convergence {
            seen += 1;
            assert_eq!((convergence.copy_rate, convergence.dirty_rate), (0, 0));
            assert!(convergence.ready_in.is_some());
        }
    }
    assert!(seen > 100);
    assert!(
        !machine
            .events()
            .iter()
            .any(|event| matches!(event, Event::Outpaced(_)))
    );
}

/// An active write waits at the target for what is under way before it: that is little, whatever it is for.
#[test]
fn comparing_leaves_room_for_active_writes() {
    let len = 4096 * KIB;
    let mut options = options();
    options.copy_mode = CopyMode::WriteBlocking;
    options.chunk_max = 512 * KIB;
    options.workers = 4;
    let mut machine = Machine::with_limits(Limits::new(len), comparable(len), options);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    let copied_at_once = machine.buffered_max;
    machine.buffered_max = 0;
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.job.query().verification.unwrap().compared == len);
    assert!(
        machine.buffered_max <= copied_at_once,
        "{} and {copied_at_once}",
        machine.buffered_max
    );
}

#[test]
fn a_commit_is_verified_where_the_base_shows_as_well() {
    let node = Node::new(LEN);
    // It is longer than the disk.
    let base = comparable(LEN + 8 * KIB);
    let mut options = CommitOptions::default();
    options.job = crate::machine::named();
    options.granularity = Granularity::from_bytes(4 * KIB);
    let commit = Mirror::commit(&node, Limits::new(LEN), base, options).unwrap();
    let mut machine = Machine::of(node, commit, base);
    machine.target = machine.source.clone();
    machine.lay(0..LEN, Content::Data, false);
    machine.lay(8 * KIB..16 * KIB, Content::Data, true);
    machine.target[8 * 1024..16 * 1024].fill(0xaa);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(machine.is_equal());
    assert_eq!(copies(&machine), [2, 3]);

    // What is damaged where the base shows is what the guest reads: only what is above is another thing.
    machine.asked.clear();
    damage(&mut machine, &[3, 9]);
    machine.source[9 * 4096 + 100] ^= 0xff;
    machine.now += 20 * crate::MS;
    machine.job.verify().unwrap();
    let _ = machine.drive().wait();
    let found = machine.job.query().verification.unwrap();
    assert_eq!(
        (found.state, found.compared, found.differing),
        (Verified::Whole, LEN, 4 * KIB)
    );
    assert_eq!(copies(&machine), [3]);
    assert!(machine.is_equal());
    complete(&mut machine);
}
