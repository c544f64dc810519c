//! How a mirror starts: what it records, what the target held before, and what is refused.

use std::io::ErrorKind;

use blockjob::{
    Content, Granularity, Limits, Mirror, MirrorError, MirrorOptions, MirrorSync, Node, OnError,
    OpKind, RangeLimits, ShapeError, Side, Status, Unmap,
};

use crate::machine::{KIB, MIB, MS, Machine, options};
use crate::{LEN, complete, is_status, single, zeroing};

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
