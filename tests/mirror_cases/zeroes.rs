//! Zeroes that need not be written, and data that turns out to be zeroes.

use std::io::ErrorKind;

use blockjob::{
    BitmapMode, Content, IfZero, Limits, Mirror, MirrorError, MirrorOptions, MirrorSync, Node,
    OpKind, RangeLimits, Side, Status, TargetHolds, Unmap,
};

use crate::machine::{KIB, Machine, options};
use crate::{LEN, complete, single, zeroing};

/// A machine whose target holds zeroes, and is said to.
fn zeroed(target: Limits, mut options: MirrorOptions) -> Machine {
    options.target_holds = TargetHolds::Zeroes;
    let mut machine = Machine::with_limits(Limits::new(LEN), target, options);
    machine.target.fill(0);
    machine
}

fn writes(machine: &mut Machine) -> Vec<OpKind> {
    let mut writes = std::mem::take(&mut machine.asked);
    writes.retain(|kind| kind.writes_target());
    writes
}

#[test]
fn a_target_that_holds_zeroes_gets_data_only() {
    let cheap = zeroing(LEN, 4096, true);
    let dear = zeroing(LEN, 4096, false);
    for target in [cheap, dear, Limits::new(LEN)] {
        let mut machine = zeroed(target, options());
        machine.lay(0..24 * KIB, Content::Zero, true);
        machine.lay(30 * KIB..LEN, Content::Zero, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, Status::Ready);
        // Whole granules of 4 KiB, around the data.
        let range = (24 * KIB..32 * KIB).into();
        assert_eq!(writes(&mut machine), [OpKind::Copy(range)], "{target:?}");
        let progress = machine.job.query().progress;
        assert_eq!(
            progress.current,
            8 * KIB,
            "what need not be done is no progress"
        );
        assert!(machine.is_equal());
        complete(&mut machine);
    }
}

#[test]
fn a_target_that_holds_anything_is_zeroed() {
    for target in [
        zeroing(LEN, 512, true),
        zeroing(LEN, 512, false),
        Limits::new(LEN),
    ] {
        let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
        machine.lay(0..32 * KIB, Content::Zero, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        assert!(machine.is_equal(), "it held 0xaa");
    }
}

#[test]
fn zeroes_are_written_once_until_something_else_is_written_there() {
    let target = zeroing(LEN, 512, false);
    let mut machine = Machine::with_limits(Limits::new(LEN), target, single());
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    let first = writes(&mut machine);
    assert!(
        first.iter().all(|kind| matches!(kind, OpKind::Zero(..))),
        "{first:?}"
    );

    // The guest zeroes what reads as zeroes: there is nothing to do, and it counts as done.
    let done = machine.job.query().progress.current;
    machine.guest_write(0..8 * KIB, 0);
    machine.lay(0..8 * KIB, Content::Zero, true);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    assert_eq!(writes(&mut machine), []);
    assert_eq!(machine.job.query().progress.current, done + 8 * KIB);

    // It writes data, and then zeroes: these are written.
    machine.guest_write(4 * KIB..8 * KIB, 5);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    let granule = (4 * KIB..8 * KIB).into();
    assert_eq!(writes(&mut machine), [OpKind::Copy(granule)]);
    machine.guest_write(0..12 * KIB, 0);
    machine.lay(0..12 * KIB, Content::Zero, true);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    assert_eq!(
        writes(&mut machine),
        [OpKind::Zero(granule, Unmap::Allowed)]
    );
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn what_a_failed_write_has_left_is_not_taken_for_zeroes() {
    let target = zeroing(LEN, 512, false);
    let mut options = single();
    options.job.on_target_error = blockjob::OnError::Ignore;
    let mut machine = zeroed(target, options);
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    machine.guest_write(0..4 * KIB, 7);
    machine.now += 20 * crate::MS;
    while machine
        .find(|kind| matches!(kind, OpKind::Copy(_)))
        .is_none()
    {
        let _ = machine.take_all();
        if let Some(status) = machine.find(crate::is_status) {
            machine.answer(status);
        }
    }
    // Half of it lands, and the guest makes it zero before it is tried again.
    machine.target[..2048].fill(7);
    machine.fail(0, Side::Target, ErrorKind::Other);
    machine.guest_write(0..4 * KIB, 0);
    machine.lay(0..4 * KIB, Content::Zero, true);
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn data_that_is_zero_goes_as_zeroes_where_the_target_takes_them() {
    let mut target = zeroing(LEN, 8192, false);
    target.write_zeroes = Some(RangeLimits {
        align: 8192,
        max: 8192,
    });
    let mut options = options();
    options.detect_zeroes = true;
    options.chunk_max = 8 * KIB;
    options.unmap = Unmap::Forbidden;
    let mut machine = Machine::with_limits(Limits::new(LEN), target, options);
    // The source does not know of it.
    machine.source[16 << 10..40 << 10].fill(0);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    let copies = writes(&mut machine);
    assert_eq!(copies.len(), 8);
    for (index, kind) in copies.into_iter().enumerate() {
        let start = index as u64 * 8 * KIB;
        let if_zero = IfZero::Write(Unmap::Forbidden);
        assert_eq!(
            kind,
            OpKind::CopyDetecting((start..start + 8 * KIB).into(), if_zero)
        );
    }
    assert!(machine.is_equal());
    assert_eq!(machine.job.query().progress.current, LEN);

    // What was found to be zero need not be written again, and other ranges go as data.
    machine.guest_write(16 * KIB..28 * KIB, 0);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    let expected = [
        OpKind::CopyDetecting((16 * KIB..24 * KIB).into(), IfZero::Leave),
        OpKind::CopyDetecting((24 * KIB..28 * KIB).into(), IfZero::Leave),
    ];
    assert_eq!(writes(&mut machine), expected);
    machine.guest_write(0..4 * KIB, 0);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    assert_eq!(
        writes(&mut machine),
        [OpKind::Copy((0..4 * KIB).into())],
        "too short for zeroes"
    );
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn what_a_target_holds_is_told_only_of_a_full_mirror_that_starts_anew() {
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    let make = |options| Mirror::new(&node, limits, limits, options).map(drop);
    for sync in [MirrorSync::Top, MirrorSync::None] {
        let mut options = options();
        options.target_holds = TargetHolds::Zeroes;
        options.sync = sync;
        assert_eq!(make(options), Err(MirrorError::TargetHolds));
    }
    let mut options = options();
    options.target_holds = TargetHolds::Zeroes;
    options.bitmap = Some("b".to_owned());
    options.bitmap_mode = Some(BitmapMode::Always);
    assert_eq!(make(options), Err(MirrorError::TargetHolds));
}

#[test]
fn zeroes_that_do_not_come_about_are_not_trusted() {
    let mut options = single();
    options.job.on_target_error = blockjob::OnError::Ignore;
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 512, false), options);
    machine.lay(0..LEN, Content::Zero, true);
    machine.fault = Some(Box::new(|count, kind| {
        let fails = count < 40 && matches!(kind, OpKind::Zero(..));
        fails.then_some((Side::Target, ErrorKind::Other))
    }));
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[test]
fn no_part_of_a_cluster_that_is_filled_is_left_as_it_is() {
    let mut target = zeroing(LEN, 4096, false);
    target.cluster = Some(4096);
    target.fills_clusters = true;
    target.max_transfer = 512;
    let mut options = single();
    options.detect_zeroes = true;
    let mut machine = zeroed(target, options);
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(writes(&mut machine), []);
    // The source tells of data, and a part of that is zeroes. When the rest is written the target fills the cluster.
    machine.guest_write(4 * KIB..8 * KIB, 0);
    machine.guest_write(5 * KIB..8 * KIB, 7);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    let written = writes(&mut machine);
    assert_eq!(written.len(), 8, "{written:?}");
    let is_left = |kind: &OpKind| matches!(kind, OpKind::CopyDetecting(_, IfZero::Leave));
    assert!(!written.iter().any(is_left), "{written:?}");
    complete(&mut machine);
}

#[test]
fn what_is_doubtful_is_zeroed_although_it_was_known_to_be_zero() {
    let mut target = zeroing(LEN, 512, false);
    target.compare = Some(blockjob::CompareBy::Reading);
    let mut machine = Machine::with_limits(Limits::new(LEN), target, single());
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    machine.target[5000] = 1;
    machine.job.verify().unwrap();
    // What it writes needs no comparing, for it is copied: so it must be.
    machine.guest_write(4 * KIB..8 * KIB, 0);
    machine.lay(4 * KIB..8 * KIB, Content::Zero, true);
    machine.now += 20 * crate::MS;
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    complete(&mut machine);
}

#[cfg(debug_assertions)]
#[test]
fn these_tests_notice_zeroes_that_are_trusted_too_soon() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    let broken: [(Sabotage, fn()); 5] = [
        (
            Sabotage::KeepZeroes,
            zeroes_are_written_once_until_something_else_is_written_there,
        ),
        (
            Sabotage::KeepZeroesOfFailed,
            what_a_failed_write_has_left_is_not_taken_for_zeroes,
        ),
        (
            Sabotage::TrustZeroesAtOnce,
            zeroes_that_do_not_come_about_are_not_trusted,
        ),
        (
            Sabotage::LeaveParts,
            no_part_of_a_cluster_that_is_filled_is_left_as_it_is,
        ),
        (
            Sabotage::TrustDoubtful,
            what_is_doubtful_is_zeroed_although_it_was_known_to_be_zero,
        ),
    ];
    for (sabotage, test) in broken {
        break_on_this_thread(Some(sabotage));
        let is_noticed = crate::machine::fails(test);
        break_on_this_thread(None);
        assert!(is_noticed, "{sabotage:?}");
    }
}
