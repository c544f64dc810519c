//! Mirrors that go by a named bitmap, and those that go on from a checkpoint.

use std::io::ErrorKind;
use std::time::Duration;

use blockjob::bitmap::stored::DecodeError;
use blockjob::{
    BitmapError, BitmapMode, BitmapState, Cancel, ChangedSince, Checkpoint, CheckpointError,
    CheckpointId, CheckpointPhase, ClaimFor, Content, Event, Granularity, HBitmap, JobError,
    JobGroup, Limits, Mirror, MirrorError, MirrorOptions, MirrorSync, Node, OnError, OpKind,
    RangeLimits, Resume, ResumeError, Side, SnapshotOf, Warning,
};

use crate::machine::{KIB, Machine, Rest, named, options};
use crate::{LEN, is_status, zeroing};

const MODES: [BitmapMode; 3] = [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always];

const ID: CheckpointId = CheckpointId {
    source: [1; 16],
    target: [2; 16],
    generation: 5,
};

/// Options of a mirror by the bitmap `b`, copying granule by granule.
fn by_bitmap(mode: BitmapMode) -> MirrorOptions {
    let mut options = options();
    options.chunk_max = 4 * KIB;
    options.bitmap = Some("b".to_owned());
    options.bitmap_mode = Some(mode);
    options
}

/// A node with a bitmap `b` that records in granules of 4 KiB, with these dirty.
fn node_with(granules: &[u64]) -> Node {
    let node = Node::new(LEN);
    let mut bits = HBitmap::new(LEN, Granularity::from_bytes(4 * KIB).unwrap()).unwrap();
    for &granule in granules {
        bits.set(granule * 4 * KIB..(granule + 1) * 4 * KIB)
            .unwrap();
    }
    let mut state = BitmapState::new("b", bits);
    state.is_enabled = true;
    let guard = node.quiesce().try_guard().unwrap();
    node.bitmaps().import_state(&guard, vec![state]).unwrap();
    drop(guard);
    node
}

/// A mirror whose target is a copy of the source but for what is dirty.
fn machine_with(granules: &[u64], options: MirrorOptions, target: Limits) -> Machine {
    let node = node_with(granules);
    let mirror = Mirror::new(&node, Limits::new(LEN), target, options).unwrap();
    let mut machine = Machine::of(node, mirror, target);
    copy_but(&mut machine, granules);
    machine
}

fn copy_but(machine: &mut Machine, granules: &[u64]) {
    machine.target = machine.source.clone();
    for &granule in granules {
        let at = (granule * 4 * KIB) as usize;
        machine.target[at..at + 4096].fill(0xaa);
    }
}

fn started(granules: &[u64], mode: BitmapMode) -> Machine {
    let machine = machine_with(granules, by_bitmap(mode), Limits::new(LEN));
    machine.job.start().unwrap();
    machine
}

/// Granules that are dirty in `b`, by number.
fn dirty(node: &Node) -> Vec<u64> {
    let bits = node.bitmaps().snapshot("b", SnapshotOf::Bitmap).unwrap();
    bits.iter().map(|at| at / (4 * KIB)).collect()
}

fn copies(machine: &Machine) -> Vec<u64> {
    let copies = machine.asked.iter().filter_map(|kind| match kind {
        OpKind::Copy(range) => Some(range.start() / (4 * KIB)),
        _ => None,
    });
    let mut copies: Vec<u64> = copies.collect();
    // In what order is not the matter here; that nothing comes twice is.
    copies.sort_unstable();
    copies
}

fn write(machine: &mut Machine, granule: u64) {
    let at = granule * 4 * KIB;
    machine.guest_write(at..at + 10, 0x77);
}

#[test]
fn only_what_is_dirty_in_the_bitmap_and_what_is_written_is_copied() {
    for mode in MODES {
        let mut machine = started(&[1, 2, 9], mode);
        let _ = machine.drive().wait();
        assert_eq!(copies(&machine), [1, 2, 9], "{mode:?}");
        assert!(machine.is_equal());
        write(&mut machine, 5);
        machine.job.complete().unwrap();
        machine.drive().switch().commit();
        machine.drive().done().unwrap();
        assert_eq!(copies(&machine), [1, 2, 5, 9]);
        assert!(machine.is_equal());
    }
}

#[test]
fn what_was_written_between_making_and_starting_is_copied() {
    let mut machine = machine_with(&[1], by_bitmap(BitmapMode::OnSuccess), Limits::new(LEN));
    write(&mut machine, 3);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(copies(&machine), [1, 3]);
    assert!(machine.is_equal());
}

#[test]
fn after_success_the_bitmap_has_what_its_mode_says() {
    for mode in MODES {
        for soft in [false, true] {
            let mut machine = started(&[1, 2], mode);
            let _ = machine.drive().wait();
            write(&mut machine, 5);
            if soft {
                machine.job.cancel(Cancel::Soft).unwrap();
                machine.drive().done().unwrap();
                write(&mut machine, 7);
            } else {
                machine.job.complete().unwrap();
                let switch = machine.drive().switch();
                assert!(machine.node.bitmaps().query("b").unwrap().is_busy());
                switch.commit();
                // The guest goes on before the job is asked again.
                write(&mut machine, 7);
                machine.drive().done().unwrap();
            }
            let expected: &[u64] = match mode {
                BitmapMode::Never => &[1, 2, 5, 7],
                BitmapMode::OnSuccess | BitmapMode::Always => &[7],
            };
            assert_eq!(dirty(&machine.node), expected, "{mode:?}, {soft}");
            write(&mut machine, 11);
            assert!(dirty(&machine.node).contains(&11), "it records");
        }
    }
}

#[test]
fn a_switch_that_is_dropped_takes_nothing_from_the_bitmap() {
    for mode in MODES {
        let mut machine = started(&[1, 2], mode);
        let _ = machine.drive().wait();
        machine.job.complete().unwrap();
        drop(machine.drive().switch());
        write(&mut machine, 5);
        let _ = machine.drive();
        machine.job.cancel(Cancel::Force).unwrap();
        assert!(machine.drive().done().is_err());
        let expected: &[u64] = match mode {
            BitmapMode::Never | BitmapMode::OnSuccess => &[1, 2, 5],
            // All of it was copied again by then, or not.
            BitmapMode::Always => &[],
        };
        assert_eq!(dirty(&machine.node), expected, "{mode:?}");
    }
}

/// With one copy done, one that failed and is to be tried again, one in flight and others not begun. And the
/// granule that is done.
fn half_way(mode: BitmapMode) -> (Machine, u64) {
    let mut options = by_bitmap(mode);
    options.workers = 2;
    options.job.on_target_error = OnError::Ignore;
    let mut machine = machine_with(&[1, 3, 5, 7, 9], options, Limits::new(LEN));
    machine.job.start().unwrap();
    let is_copy = |kind| matches!(kind, OpKind::Copy(_));
    let mut has_failed = false;
    loop {
        let _ = machine.take_all();
        match machine.find(is_copy) {
            Some(copy) if machine.copied == 0 => machine.answer(copy),
            Some(copy) if !has_failed => {
                machine.fail(copy, Side::Target, ErrorKind::Other);
                has_failed = true;
            }
            Some(_) => break,
            None => machine.answer(machine.find(is_status).expect("a look or a copy is out")),
        }
    }
    let at = |granule: u64| (granule * 4 * KIB) as usize;
    let is_done = |granule: &u64| machine.source[at(*granule)] == machine.target[at(*granule)];
    let done = [1, 3, 5, 7, 9].into_iter().find(is_done).unwrap();
    (machine, done)
}

fn but(done: u64, granules: &[u64]) -> Vec<u64> {
    let rest = granules.iter().copied().filter(|&granule| granule != done);
    rest.collect()
}

#[test]
fn after_a_failure_the_bitmap_has_what_its_mode_says() {
    for mode in MODES {
        for how in ["cancel", "error", "drop"] {
            let (mut machine, done) = half_way(mode);
            write(&mut machine, 12);
            let mut left = machine.mirror().left_dirty().unwrap();
            let numbers =
                |map: &HBitmap| -> Vec<u64> { map.iter().map(|at| at / (4 * KIB)).collect() };
            assert_eq!(numbers(&left), but(done, &[1, 3, 5, 7, 9, 12]));
            match how {
                "cancel" => {
                    // The copy in flight lands before the end.
                    machine.job.cancel(Cancel::Force).unwrap();
                    assert!(machine.drive().done().is_err());
                    left = machine.mirror().left_dirty().unwrap();
                    assert_eq!(numbers(&left).len(), 4);
                }
                "error" => {
                    let report = Some(OnError::Report);
                    let change = blockjob::Change {
                        on_source_error: report,
                        on_target_error: report,
                        ..blockjob::Change::default()
                    };
                    machine.job.change(change).unwrap();
                    let at = machine.find(OpKind::writes_target).unwrap();
                    machine.fail(at, Side::Target, ErrorKind::Other);
                    assert!(machine.drive().done().is_err());
                }
                _ => machine.drop_mirror(),
            }
            let expected = match mode {
                BitmapMode::Never | BitmapMode::OnSuccess => vec![1, 3, 5, 7, 9, 12],
                BitmapMode::Always => numbers(&left),
            };
            assert_eq!(dirty(&machine.node), expected, "{mode:?}, {how}");
            write(&mut machine, 2);
            assert!(dirty(&machine.node).contains(&2), "it records again");
            assert!(!machine.node.bitmaps().query("b").unwrap().is_busy());
        }
    }
}

#[test]
fn a_failed_mirror_with_mode_always_is_gone_on_with_by_the_bitmap_alone() {
    let (mut machine, done) = half_way(BitmapMode::Always);
    machine.drop_mirror();
    let left = dirty(&machine.node);
    assert_eq!(left, but(done, &[1, 3, 5, 7, 9]));
    let options = by_bitmap(BitmapMode::Always);
    let limits = Limits::new(LEN);
    let mirror = Mirror::new(&machine.node, limits, limits, options).unwrap();
    let mut next = Machine::of(machine.node.clone(), mirror, limits);
    next.source.clone_from(&machine.source);
    next.target.clone_from(&machine.target);
    next.job.start().unwrap();
    let _ = next.drive().wait();
    assert_eq!(copies(&next), left);
    assert!(next.is_equal());
}

#[test]
fn with_the_group_of_one_that_fails_the_bitmap_is_as_after_a_failure() {
    for mode in MODES {
        let group = JobGroup::new();
        let mut options = by_bitmap(mode);
        options.job.group = Some(group.clone());
        let mut machine = machine_with(&[1], options, Limits::new(LEN));
        let mut other = MirrorOptions::default();
        other.job = named();
        other.job.group = Some(group);
        let mut other = Machine::new(LEN, other);
        for machine in [&machine, &other] {
            machine.job.start().unwrap();
        }
        let _ = machine.drive().wait();
        write(&mut machine, 4);
        other.drop_mirror();
        assert!(machine.drive().done().is_err());
        let expected: &[u64] = match mode {
            BitmapMode::Never | BitmapMode::OnSuccess => &[1, 4],
            BitmapMode::Always => &[4],
        };
        assert_eq!(dirty(&machine.node), expected, "{mode:?}");
    }
}

#[test]
fn a_bitmap_that_does_not_record_still_does_not() {
    for mode in MODES {
        let node = node_with(&[1, 2]);
        node.bitmaps().disable("b").unwrap();
        let limits = Limits::new(LEN);
        let mirror = Mirror::new(&node, limits, limits, by_bitmap(mode)).unwrap();
        let mut machine = Machine::of(node, mirror, limits);
        copy_but(&mut machine, &[1, 2]);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        write(&mut machine, 5);
        machine.job.complete().unwrap();
        machine.drive().switch().commit();
        write(&mut machine, 7);
        machine.drive().done().unwrap();
        let expected: &[u64] = match mode {
            BitmapMode::Never => &[1, 2],
            BitmapMode::OnSuccess | BitmapMode::Always => &[],
        };
        assert_eq!(dirty(&machine.node), expected, "{mode:?}");
        assert!(!machine.node.bitmaps().query("b").unwrap().is_recording);
    }
}

#[test]
fn with_sync_top_what_is_both_dirty_and_in_the_top_layer_is_copied() {
    let mut options = by_bitmap(BitmapMode::OnSuccess);
    options.sync = MirrorSync::Top;
    let mut machine = machine_with(&[1, 2, 9], options, Limits::new(LEN));
    machine.target = machine.source.clone();
    machine.target[4096..3 * 4096].fill(0xaa);
    machine.lay(9 * 4 * KIB..LEN, Content::Data, false);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    // A write to what is not dirty, while the source is asked.
    write(&mut machine, 14);
    let _ = machine.drive().wait();
    assert_eq!(copies(&machine), [1, 2, 14]);
    assert!(machine.is_equal());
    let asked = machine.asked.iter().filter(|&&kind| is_status(kind));
    let asked = asked
        .filter_map(|kind| kind.range())
        .map(|range| range.start());
    assert_eq!(
        asked.clone().min(),
        Some(4 * KIB),
        "what is clean is not asked about"
    );
}

#[test]
fn the_granularity_of_the_bitmap_counts_and_another_is_warned_of() {
    let mut options = by_bitmap(BitmapMode::Never);
    for (asked, is_warned) in [(None, false), (Some(4 * KIB), false), (Some(512), true)] {
        options.granularity = asked.and_then(Granularity::from_bytes);
        let mut machine = machine_with(&[1], options.clone(), Limits::new(LEN));
        assert_eq!(machine.mirror().granularity().bytes(), 4 * KIB);
        let mut warnings = machine.events().iter().filter_map(|event| match event {
            Event::Warning(warning) => Some(*warning),
            _ => None,
        });
        let expected = is_warned.then(|| Warning::Granularity {
            asked: Granularity::from_bytes(512).unwrap(),
            used: Granularity::from_bytes(4 * KIB).unwrap(),
        });
        assert_eq!(warnings.next(), expected);
        assert_eq!(warnings.next(), None);
    }
}

#[test]
fn a_bitmap_that_cannot_be_had_is_an_error() {
    let limits = Limits::new(LEN);
    let make = |node: &Node, options| Mirror::new(node, limits, limits, options).map(drop);
    let node = node_with(&[]);
    let good = by_bitmap(BitmapMode::Always);

    let mut options = good.clone();
    options.bitmap = Some("c".to_owned());
    let name = "c".to_owned();
    assert_eq!(
        make(&node, options),
        Err(MirrorError::Named(BitmapError::NotFound { name }))
    );
    let mut options = good.clone();
    options.bitmap_mode = None;
    assert_eq!(make(&node, options), Err(MirrorError::ModeNeeded));
    let mut options = good.clone();
    options.bitmap = None;
    assert_eq!(make(&node, options), Err(MirrorError::ModeWithoutBitmap));
    let mut options = good.clone();
    options.sync = MirrorSync::None;
    assert_eq!(make(&node, options), Err(MirrorError::NoneWithBitmap));
    assert_eq!(make(&node, good.clone()), Ok(()), "no trace of the others");

    // In use by the time at which the job starts.
    let claim = node.bitmaps().claim("b", ClaimFor::Change).unwrap();
    let mirror = Mirror::new(&node, limits, limits, good).unwrap();
    let mut machine = Machine::of(node, mirror, limits);
    machine.job.start().unwrap();
    let error = machine.drive().done().unwrap_err();
    let JobError::Bitmap(error) = error else {
        panic!("{error}");
    };
    assert!(matches!(*error, BitmapError::Busy { .. }), "{error}");
    assert!(machine.asked.is_empty(), "nothing was done");
    drop(claim);
    assert!(!machine.node.bitmaps().query("b").unwrap().is_busy());
}

#[test]
fn the_bitmap_of_a_job_that_is_never_started_is_left_alone() {
    let machine = machine_with(&[1], by_bitmap(BitmapMode::Always), Limits::new(LEN));
    assert!(!machine.node.bitmaps().query("b").unwrap().is_busy());
    machine.job.cancel(Cancel::Force).unwrap();
    assert_eq!(dirty(&machine.node), [1]);
}

// Checkpoints

/// Another process: the bitmap `b` has what was written since, the disks are what they are.
fn resumed(before: &Machine, bytes: &[u8], since: &[u64], options: MirrorOptions) -> Machine {
    let node = node_with(since);
    let limits = Limits::new(LEN);
    let resume = Resume {
        checkpoint: Checkpoint::decode(bytes, 1 << 20).unwrap(),
        id: ID,
        changed: ChangedSince::InBitmap,
    };
    let mirror = Mirror::resume(&node, limits, limits, options, resume).unwrap();
    let mut next = Machine::of(node, mirror, limits);
    next.source.clone_from(&before.source);
    next.target.clone_from(&before.target);
    next.job.start().unwrap();
    next
}

fn plain() -> MirrorOptions {
    let mut options = options();
    options.chunk_max = 4 * KIB;
    options.workers = 4;
    options
}

#[test]
fn a_mirror_goes_on_with_what_was_left_and_what_was_written_since() {
    let mut machine = Machine::started(LEN, plain());
    let _ = machine.take_all();
    for _ in 0..6 {
        machine.answer(0);
        let _ = machine.take_all();
    }
    let confirmed = machine.copied / (4 * KIB);
    assert!((1..10).contains(&confirmed), "{confirmed}");
    let left = machine.mirror().left_dirty().unwrap();
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    // What lands later is not known to whoever goes on.
    machine.answer_all();
    write(&mut machine, 0);
    machine.drop_mirror();

    let mut next = resumed(&machine, &bytes, &[0], by_bitmap(BitmapMode::Always));
    let _ = next.drive().wait();
    let mut expected: Vec<u64> = left.iter().map(|at| at / (4 * KIB)).collect();
    assert_eq!(expected.len() as u64, LEN / (4 * KIB) - confirmed);
    expected.push(0);
    expected.sort_unstable();
    assert_eq!(copies(&next), expected, "and nothing else");
    assert!(next.is_equal());
    next.job.complete().unwrap();
    next.drive().switch().commit();
    next.drive().done().unwrap();
    assert_eq!(dirty(&next.node), [0; 0]);
}

#[test]
fn a_mirror_that_has_failed_still_tells_what_was_left_and_one_that_succeeded_does_not() {
    let mut machine = Machine::new(LEN, plain());
    assert_eq!(machine.mirror().checkpoint(ID), None, "nothing has begun");
    machine.job.start().unwrap();
    let _ = machine.take_all();
    for _ in 0..6 {
        machine.answer(0);
        let _ = machine.take_all();
    }
    machine.job.cancel(Cancel::Force).unwrap();
    assert!(machine.drive().done().is_err());
    let copied = machine.copied;
    assert!(copied > 0);
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
    assert_eq!(checkpoint.left().dirty_bytes(), LEN - copied);
    assert_eq!((checkpoint.id(), checkpoint.len()), (ID, LEN));
    assert_eq!(checkpoint.phase(), CheckpointPhase::Copying);
    let mut next = resumed(&machine, &bytes, &[], by_bitmap(BitmapMode::Never));
    let _ = next.drive().wait();
    assert_eq!(next.copied, LEN - copied);
    assert!(next.is_equal());

    let bytes = next.mirror().checkpoint(ID).unwrap();
    let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
    assert_eq!(checkpoint.phase(), CheckpointPhase::Ready);
    assert!(checkpoint.left().is_clean());
    next.job.cancel(Cancel::Soft).unwrap();
    next.drive().done().unwrap();
    assert_eq!(next.mirror().checkpoint(ID), None);
}

#[test]
fn a_mirror_that_goes_on_flushes_what_was_written_before() {
    let mut machine = Machine::started(LEN, plain());
    while machine.copied < LEN {
        let _ = machine.take_all();
        machine.answer(0);
    }
    assert!(machine.is_unflushed);
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    machine.drop_mirror();
    let mut next = resumed(&machine, &bytes, &[], by_bitmap(BitmapMode::Never));
    next.is_unflushed = true;
    next.job.start().unwrap_err();
    let _ = next.drive().wait();
    assert!(!next.is_unflushed, "there was nothing to copy");
    assert_eq!(next.copied, 0);
}

#[test]
fn a_scan_goes_on_where_it_was() {
    for sync in [MirrorSync::Full, MirrorSync::Top] {
        let mut first = plain();
        first.sync = sync;
        let target = match sync {
            MirrorSync::Full => zeroing(LEN, 1, true),
            _ => Limits::new(LEN),
        };
        let mut machine = Machine::with_limits(Limits::new(LEN), target, first.clone());
        let layers = [(0, true), (4, false), (8, true), (12, false)];
        machine.target = machine.source.clone();
        for (granule, in_top) in layers {
            let range = granule * 4 * KIB..(granule + 4) * 4 * KIB;
            machine.lay(range.clone(), Content::Data, in_top);
            if in_top || sync == MirrorSync::Full {
                machine.target[range.start as usize..range.end as usize].fill(0xaa);
            }
        }
        machine.job.start().unwrap();
        let _ = machine.take_all();
        machine.answer(0);
        let _ = machine.take_all();
        let bytes = machine.mirror().checkpoint(ID).unwrap();
        let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
        assert_eq!(checkpoint.phase(), CheckpointPhase::Scanning);
        assert_eq!(checkpoint.sync(), sync);
        write(&mut machine, 6);
        machine.drop_mirror();
        let mut options = by_bitmap(BitmapMode::Always);
        options.sync = sync;
        let mut next = resumed(&machine, &bytes, &[6], options);
        for (granule, in_top) in layers {
            let range = granule * 4 * KIB..(granule + 4) * 4 * KIB;
            next.lay(range, Content::Data, in_top);
        }
        let _ = next.drive().wait();
        assert!(next.is_equal(), "{sync:?}");
        let expected: Vec<u64> = match sync {
            MirrorSync::Top => vec![0, 1, 2, 3, 6, 8, 9, 10, 11],
            _ => (0..16).collect(),
        };
        assert_eq!(copies(&next), expected, "{sync:?}");
    }
}

#[test]
fn sync_none_goes_on_as_well() {
    let mut first = plain();
    first.sync = MirrorSync::None;
    let mut machine = Machine::new(LEN, first);
    machine.target = machine.source.clone();
    machine.job.start().unwrap();
    let _ = machine.take_all();
    write(&mut machine, 3);
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    write(&mut machine, 4);
    machine.drop_mirror();
    let mut options = by_bitmap(BitmapMode::Always);
    options.sync = MirrorSync::None;
    let mut next = resumed(&machine, &bytes, &[4], options);
    let _ = next.drive().wait();
    assert_eq!(copies(&next), [3, 4]);
    assert!(next.is_equal());
}

#[test]
fn the_finer_granularity_of_bitmap_and_checkpoint_counts() {
    let mut machine = Machine::started(LEN, {
        let mut options = plain();
        options.granularity = Granularity::from_bytes(512);
        options.chunk_max = 512;
        options
    });
    let _ = machine.take_all();
    for _ in 0..9 {
        machine.answer(0);
        let _ = machine.take_all();
    }
    let copied = machine.copied;
    assert!(!copied.is_multiple_of(4 * KIB), "{copied}");
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    machine.drop_mirror();
    let mut options = by_bitmap(BitmapMode::Always);
    options.granularity = None;
    let mut next = resumed(&machine, &bytes, &[], options);
    assert_eq!(next.mirror().granularity().bytes(), 512);
    let _ = next.drive().wait();
    assert_eq!(next.copied, LEN - copied);
}

#[test]
fn a_checkpoint_of_something_else_is_refused() {
    let mut machine = Machine::started(LEN, plain());
    let _ = machine.take_all();
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
    let try_with = |len, id, sync, bitmap: bool, changed| {
        let node = Node::new(len);
        let mut options = MirrorOptions::default();
        options.sync = sync;
        if bitmap {
            options.bitmap = Some("b".to_owned());
        }
        let checkpoint = checkpoint.clone();
        let resume = Resume {
            checkpoint,
            id,
            changed,
        };
        let limits = Limits::new(len);
        Mirror::resume(&node, limits, limits, options, resume).map(drop)
    };
    let (full, nothing) = (MirrorSync::Full, ChangedSince::Nothing);
    let mut id = ID;
    id.source = [9; 16];
    let refused = |error: ResumeError| Err(MirrorError::Resume(error));
    assert_eq!(
        try_with(LEN, id, full, false, nothing),
        refused(ResumeError::OtherSource)
    );
    let mut id = ID;
    id.target = [9; 16];
    assert_eq!(
        try_with(LEN, id, full, false, nothing),
        refused(ResumeError::OtherTarget)
    );
    let mut id = ID;
    id.generation = 6;
    let other = ResumeError::OtherGeneration {
        expected: 6,
        found: 5,
    };
    assert_eq!(try_with(LEN, id, full, false, nothing), refused(other));
    let other = ResumeError::OtherLength {
        expected: LEN + 1,
        found: LEN,
    };
    assert_eq!(try_with(LEN + 1, ID, full, false, nothing), refused(other));
    let other = ResumeError::OtherSync {
        asked: MirrorSync::Top,
        found: full,
    };
    assert_eq!(
        try_with(LEN, ID, MirrorSync::Top, false, nothing),
        refused(other)
    );
    let in_bitmap = ChangedSince::InBitmap;
    assert_eq!(
        try_with(LEN, ID, full, false, in_bitmap),
        refused(ResumeError::BitmapNeeded)
    );
    assert_eq!(try_with(LEN, ID, full, false, nothing), Ok(()));
}

/// A checkpoint with something of everything in it.
fn sample() -> Vec<u8> {
    let mut machine = Machine::started(LEN, plain());
    let _ = machine.take_all();
    for _ in 0..6 {
        machine.answer(0);
        let _ = machine.take_all();
    }
    machine.mirror().checkpoint(ID).unwrap()
}

#[test]
fn a_checkpoint_is_these_bytes() {
    let mut options = plain();
    options.sync = MirrorSync::None;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    write(&mut machine, 3);
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    let mut expected = b"BJMIRROR\x01\x00\x03\x02".to_vec();
    expected.extend_from_slice(&bytes[12..16]);
    expected.extend_from_slice(&[2; 16]);
    expected.extend_from_slice(&LEN.to_le_bytes());
    assert_eq!(bytes[..40], expected);
    let mut left = HBitmap::new(LEN, Granularity::from_bytes(4 * KIB).unwrap()).unwrap();
    left.set(3 * 4 * KIB..4 * 4 * KIB).unwrap();
    let label = blockjob::bitmap::stored::Label {
        identity: [1; 16],
        generation: 5,
    };
    assert_eq!(bytes[40..], blockjob::bitmap::stored::encode(&left, label));
    let mut crc = crc32fast::Hasher::new();
    for part in [&bytes[..12], &bytes[16..104]] {
        crc.update(part);
    }
    assert_eq!(bytes[12..16], crc.finalize().to_le_bytes());
}

#[test]
fn any_damage_of_a_checkpoint_is_found() {
    let good = sample();
    let whole = Checkpoint::decode(&good, 1 << 20).unwrap();
    for at in 0..good.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            let error = Checkpoint::decode(&bytes, 1 << 20).expect_err("it is damaged");
            match at {
                0..8 => assert_eq!(error, CheckpointError::NotACheckpoint),
                8..10 => assert!(matches!(error, CheckpointError::Version { .. })),
                10..104 => assert_eq!(error, CheckpointError::Damaged, "{at}"),
                _ => assert!(matches!(error, CheckpointError::Bitmap(_)), "{at}"),
            }
        }
        let error = Checkpoint::decode(&good[..at], 1 << 20).expect_err("it is cut off");
        match at {
            0..104 => assert_eq!(error, CheckpointError::Truncated),
            _ => assert!(matches!(
                error,
                CheckpointError::Bitmap(DecodeError::Truncated { .. })
            )),
        }
    }
    let mut bytes = good.clone();
    bytes.push(0);
    let trailing = DecodeError::Trailing { bytes: 1 };
    assert_eq!(
        Checkpoint::decode(&bytes, 1 << 20),
        Err(CheckpointError::Bitmap(trailing))
    );
    // The header of one and the records of another do not go together.
    let other = {
        let mut machine = Machine::started(LEN, plain());
        let _ = machine.take_all();
        machine.mirror().checkpoint(ID).unwrap()
    };
    let mixed = [&good[..40], &other[40..]].concat();
    assert!(mixed == good || Checkpoint::decode(&mixed, 1 << 20).is_err());
    assert_eq!(Checkpoint::decode(&good, 1 << 20).unwrap(), whole);
}

#[test]
fn headers_of_checkpoints_that_lie_are_refused_before_memory_is_taken() {
    let good = sample();
    let with_crc = |mut bytes: Vec<u8>| {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..12]);
        crc.update(&bytes[16..104]);
        bytes[12..16].copy_from_slice(&crc.finalize().to_le_bytes());
        bytes
    };
    for (at, byte) in [(10, 0), (10, 4), (11, 0), (11, 4), (32, 1), (39, 0xff)] {
        let mut bytes = good.clone();
        bytes[at] = byte;
        assert_eq!(
            Checkpoint::decode(&with_crc(bytes), 1 << 20),
            Err(CheckpointError::Invalid),
            "{at}: {byte}"
        );
    }
    // A disk that would need 256 MiB of memory, said so by a file that is right in itself.
    let huge = HBitmap::new(1 << 40, Granularity::from_bytes(512).unwrap()).unwrap();
    let mut bytes = good[..40].to_vec();
    bytes[32..40].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let label = blockjob::bitmap::stored::Label::default();
    bytes.extend(blockjob::bitmap::stored::encode(&huge, label));
    let error = Checkpoint::decode(&with_crc(bytes), 1 << 20).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Bitmap(DecodeError::TooLarge { .. })),
        "{error}"
    );
}

#[test]
fn zeroes_of_the_scan_in_flight_are_left() {
    let mut options = plain();
    options.workers = 1;
    let mut target = zeroing(LEN, 1, true);
    target.write_zeroes = Some(RangeLimits {
        align: 1,
        max: 4 * KIB,
    });
    let mut machine = Machine::with_limits(Limits::new(LEN), target, options);
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    machine.answer(0);
    let rest = machine.take_all();
    assert!(matches!(rest, Rest::Wait(_)));
    let bytes = machine.mirror().checkpoint(ID).unwrap();
    let checkpoint = Checkpoint::decode(&bytes, 1 << 20).unwrap();
    assert_eq!(checkpoint.left().dirty_bytes(), LEN - 4 * KIB);
    assert!(machine.now < Duration::from_secs(1));
}
