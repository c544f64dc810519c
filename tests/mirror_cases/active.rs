//! Write-blocking mode: guest writes that go to the target as well, and what they meet there.

use std::io::ErrorKind;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::{
    Begin, BitmapMode, BitmapState, ByteRange, Cancel, Change, Content, CopyMode, Granularity,
    HBitmap, JobError, Lane, Limits, Mirror, MirrorOptions, Node, OnError, OpKind, PendingWrite,
    Side, SnapshotOf, Status, TargetWrite, Ticket,
};

use crate::machine::{Count, KIB, MS, Machine, bytes, error};
use crate::{LEN, is_status, single, zeroing};

const GRANULE: u64 = 4 * KIB;

/// An owned guest write.
type Write = Ticket<Arc<Lane>>;
type Half = TargetWrite<Arc<Lane>>;

fn active() -> MirrorOptions {
    let mut options = single();
    options.copy_mode = CopyMode::WriteBlocking;
    options.workers = 2; // two granules are claimed at once
    options
}

fn ready() -> Machine {
    Machine::ready(LEN, active())
}

fn begin(machine: &Machine, range: impl Into<ByteRange>) -> Begin<Arc<Lane>> {
    machine.node.begin_write_owned(range.into())
}

/// A write that is let in at once.
fn go(machine: &Machine, range: impl Into<ByteRange>) -> Write {
    begin(machine, range).go().expect("nothing is in its way")
}

/// One that must wait.
fn wait(machine: &Machine, range: impl Into<ByteRange>) -> PendingWrite<Arc<Lane>> {
    match begin(machine, range) {
        Begin::Wait(pending) => pending,
        other => panic!("{other:?}"),
    }
}

/// The first half: the source has it.
fn to_source(machine: &mut Machine, write: Write, byte: u8) -> Option<Half> {
    machine.guest_lands(write.range(), byte);
    write.source_written(true)
}

/// The second half: the target has it.
fn to_target(machine: &mut Machine, half: Half) {
    let range = half.range();
    let data = machine.source[bytes(range)].to_vec();
    machine.target[bytes(range)].copy_from_slice(&data);
    machine.is_unflushed = true;
    half.finish(Ok(()));
}

/// All of a write. Which part of it went to the target.
fn write(machine: &mut Machine, range: impl Into<ByteRange>, byte: u8) -> Option<ByteRange> {
    let write = go(machine, range);
    let half = to_source(machine, write, byte)?;
    let range = half.range();
    to_target(machine, half);
    Some(range)
}

fn change(machine: &Machine, mode: CopyMode) {
    let change = Change {
        copy_mode: Some(mode),
        ..Change::default()
    };
    machine.job.change(change).unwrap();
}

/// Granules that are dirty or in flight, by number.
fn left(machine: &mut Machine) -> Vec<u64> {
    let left = machine.mirror().left_dirty().expect("the scan is over");
    left.iter().map(|at| at / GRANULE).collect()
}

fn is_synced(machine: &mut Machine) -> bool {
    let _ = machine.take_all();
    let is_synced = machine.mirror().is_actively_synced();
    assert_eq!(
        machine.job.query().mirror.unwrap().is_actively_synced,
        is_synced
    );
    is_synced
}

// What goes where

#[test]
fn an_active_write_is_on_both_disks_when_the_guest_is_told_and_nothing_is_left() {
    let mut machine = ready();
    assert!(is_synced(&mut machine));
    let copied = machine.copied;
    let done = machine.job.query().progress.current;
    // Whole granules, a part of one, and across the edge of two.
    for range in [0..8 * KIB, 513..514, 9 * KIB..17 * KIB] {
        let range = ByteRange::from(range);
        let written = write(&mut machine, range, 0x31);
        assert_eq!(written, Some(range));
    }
    assert!(machine.is_equal());
    assert!(is_synced(&mut machine));
    assert!(machine.out.is_empty() && left(&mut machine).is_empty());
    assert_eq!(machine.copied, copied, "nothing of it is copied again");
    let now = machine.job.query().progress.current;
    assert_eq!(now - done, 8 * KIB + 1 + 8 * KIB, "it counts as done");
}

#[test]
fn what_active_writes_have_written_is_flushed_before_the_switch() {
    let mut machine = ready();
    let write = go(&machine, 0..GRANULE);
    let half = to_source(&mut machine, write, 0x77).unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive_now();
    to_target(&mut machine, half);
    let switch = machine.drive().switch(); // looks for the flush
    assert!(machine.is_equal());
    switch.commit();
    let write = go(&machine, 0..1);
    assert!(!write.is_active(), "the target is the guest's disk now");
    write.cancel();
    machine.drive().done().unwrap();
}

#[test]
fn a_part_of_a_dirty_granule_does_not_go_to_the_target() {
    let mut machine = Machine::started(LEN, active());
    let _ = machine.take_all();
    // The first granules are in flight, the last ones are dirty.
    let dirty = LEN - 4 * GRANULE;
    assert!(left(&mut machine).contains(&(dirty / GRANULE)));
    assert_eq!(write(&mut machine, dirty + 1..dirty + 2, 0x11), None);
    // Head and tail are left out, what is covered whole is not, and is clean from then on.
    let range = dirty + GRANULE + 100..dirty + 3 * GRANULE + 100;
    let written = write(&mut machine, range, 0x12);
    assert_eq!(
        written,
        Some((dirty + 2 * GRANULE..dirty + 3 * GRANULE).into())
    );
    let left = left(&mut machine);
    let of = |granule: u64| left.contains(&(dirty / GRANULE + granule));
    assert_eq!([of(0), of(1), of(2), of(3)], [true, true, false, true]);
    let _ = machine.drive();
    assert!(machine.is_equal());
}

#[test]
fn a_part_of_a_clean_granule_goes_there_and_the_other_part_does_not() {
    let mut machine = ready();
    // One granule is dirty, for its write has failed on the target.
    let write = go(&machine, 0..GRANULE);
    let half = to_source(&mut machine, write, 1).unwrap();
    half.finish(Err(error(ErrorKind::Other)));
    assert_eq!(left(&mut machine), [0]);
    let range = GRANULE - 10..GRANULE + 10;
    let written = self::write(&mut machine, range, 2);
    assert_eq!(written, Some((GRANULE..GRANULE + 10).into()));
    assert_eq!(left(&mut machine), [0]);
}

#[test]
fn the_end_of_a_disk_that_ends_within_a_granule() {
    let len = 5 * GRANULE + 777;
    let mut machine = Machine::ready(len, active());
    let last = 5 * GRANULE..len;
    assert_eq!(write(&mut machine, last.clone(), 9), Some(last.into()));
    assert_eq!(
        write(&mut machine, len - 1..len, 8),
        Some((len - 1..len).into())
    );
    // Dirty, and then covered whole up to the end.
    let write = go(&machine, len - 5..len);
    let half = to_source(&mut machine, write, 7).unwrap();
    half.skip();
    assert_eq!(left(&mut machine), [5]);
    let range = ByteRange::from(5 * GRANULE - 1..len);
    assert_eq!(self::write(&mut machine, range, 6), Some(range));
    assert!(left(&mut machine).is_empty() && machine.is_equal());
}

#[test]
fn what_the_target_cannot_take_as_it_is_is_copied_later() {
    let mut target = Limits::new(LEN);
    target.request_align = 512;
    let mut machine = Machine::with_limits(Limits::new(LEN), target, active());
    machine.job.start().unwrap();
    let _ = machine.drive();
    let written = write(&mut machine, 100..2048, 1);
    assert_eq!(written, Some((512..2048).into()));
    assert_eq!(left(&mut machine), [0]);
    assert_eq!(write(&mut machine, GRANULE + 1..GRANULE + 500, 2), None);
    let _ = machine.drive();
    assert!(machine.is_equal());

    // A part of a cluster would have the rest of it filled with what does not belong there.
    target.cluster = Some(2048);
    target.fills_clusters = true;
    let mut machine = Machine::with_limits(Limits::new(LEN), target, active());
    machine.job.start().unwrap();
    let _ = machine.drive();
    let written = write(&mut machine, 512..4096 + 512, 3);
    assert_eq!(written, Some((2048..4096).into()));
    let _ = machine.drive();
    assert!(machine.is_equal());
}

#[test]
fn a_write_past_the_end_of_the_disk_is_none_of_the_targets() {
    let mut machine = ready();
    let write = go(&machine, LEN + 5..LEN + 10);
    assert!(write.source_written(true).is_none());
    let write = go(&machine, LEN - 1..LEN + 10);
    machine.guest_lands(LEN - 1..LEN, 3);
    let half = write.source_written(true).unwrap();
    assert_eq!(half.range(), (LEN - 1..LEN).into());
    to_target(&mut machine, half);
    assert!(machine.is_equal() && is_synced(&mut machine));
}

// Who waits for whom

#[test]
fn a_write_waits_for_what_is_being_copied_and_a_copy_for_a_write() {
    let mut machine = Machine::started(LEN, active());
    let _ = machine.take_all();
    while let Some(look) = machine.find(is_status) {
        machine.answer(look);
        let _ = machine.take_all();
    }
    let copy = machine.find_copy(0);
    machine.read(copy);
    let mut pending = wait(&machine, 100..200);
    let woken = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(pending.poll_begin(&waker).is_pending());
    let _ = machine.take_all();
    assert_eq!(woken.take(), 0);
    machine.answer(copy);
    assert_eq!(woken.take(), 1, "as soon as the copy is over");
    let Poll::Ready(Ok(write)) = pending.poll_begin(&waker) else {
        panic!("nothing is in its way any more");
    };
    let half = to_source(&mut machine, write, 0x21).unwrap();
    to_target(&mut machine, half);

    // And what a guest writes just now is not claimed.
    let dirty = LEN - GRANULE;
    let write = go(&machine, dirty..dirty + 1);
    let _ = machine.take_all();
    let mut copied = 0;
    while !machine.out.is_empty() {
        machine.answer_all();
        let _ = machine.take_all();
        copied += 1;
    }
    assert!(copied > 0 && left(&mut machine) == [dirty / GRANULE]);
    assert_eq!(machine.job.query().status, Status::Running);
    assert!(to_source(&mut machine, write, 0x22).is_none());
    let _ = machine.drive();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(machine.is_equal());
}

#[test]
fn writes_that_overlap_come_to_both_disks_in_the_same_order() {
    let mut machine = ready();
    let first = go(&machine, 0..1000);
    let mut second = wait(&machine, 500..1500);
    let apart = go(&machine, 1500..1600);
    let half = to_source(&mut machine, first, 1).unwrap();
    assert!(second.try_begin().is_none(), "until the target has it, too");
    to_target(&mut machine, half);
    let second = second.try_begin().unwrap().unwrap();
    let half = to_source(&mut machine, second, 2).unwrap();
    to_target(&mut machine, half);
    let half = to_source(&mut machine, apart, 3).unwrap();
    to_target(&mut machine, half);
    assert!(machine.is_equal() && left(&mut machine).is_empty());
}

#[test]
fn four_writes_that_wait_for_each_other_all_end() {
    let mut machine = ready();
    let a = go(&machine, 1000..2000);
    let mut b = wait(&machine, 500..1500);
    let mut c = wait(&machine, 1500..2500);
    let d = go(&machine, 400..600);
    let e = go(&machine, 2400..2600);
    let half = to_source(&mut machine, a, 1).unwrap();
    to_target(&mut machine, half);
    for pending in [&mut b, &mut c] {
        assert!(pending.try_begin().is_none(), "d and e are under way");
    }
    for write in [d, e] {
        let half = to_source(&mut machine, write, 2).unwrap();
        to_target(&mut machine, half);
    }
    for mut pending in [b, c] {
        let write = pending.try_begin().expect("nobody is left").unwrap();
        let half = to_source(&mut machine, write, 3).unwrap();
        to_target(&mut machine, half);
    }
    assert!(machine.is_equal() && is_synced(&mut machine));
}

/// Has `pending` overtaken by narrow writes, of which one is always under way, until one of them must wait behind it.
fn overtake(
    machine: &mut Machine,
    pending: &mut PendingWrite<Arc<Lane>>,
) -> (Write, PendingWrite<Arc<Lane>>) {
    let mut under_way = go(machine, 0..500);
    for count in 1..100 {
        let next = (count % 2) * 500;
        match begin(machine, next..next + 500) {
            Begin::Go(write) => {
                let half = to_source(machine, std::mem::replace(&mut under_way, write), 1).unwrap();
                to_target(machine, half);
                assert!(pending.try_begin().is_none());
            }
            Begin::Wait(behind) => return (under_way, behind),
            Begin::Refused(why) => panic!("{why}"),
        }
    }
    panic!("it waits for ever");
}

#[test]
fn a_wide_write_has_its_turn() {
    let mut machine = ready();
    let first = go(&machine, 1000..1500);
    let mut wide = wait(&machine, 0..2 * GRANULE);
    let (last, mut behind) = overtake(&mut machine, &mut wide);
    let apart = go(&machine, 2 * GRANULE..3 * GRANULE);
    let woken = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(wide.poll_begin(&waker).is_pending());
    assert!(behind.poll_begin(&waker).is_pending());
    for write in [first, last] {
        let half = to_source(&mut machine, write, 2).unwrap();
        to_target(&mut machine, half);
    }
    assert!(woken.take() > 0);
    assert!(behind.try_begin().is_none(), "the other is before it");
    let write = wide.try_begin().expect("it is its turn").unwrap();
    assert!(behind.try_begin().is_none(), "until that is on both disks");
    let half = to_source(&mut machine, write, 3).unwrap();
    to_target(&mut machine, half);
    let write = behind.try_begin().expect("nobody is left").unwrap();
    for (write, byte) in [(write, 4), (apart, 5)] {
        let half = to_source(&mut machine, write, byte).unwrap();
        to_target(&mut machine, half);
    }
    assert!(machine.is_equal() && is_synced(&mut machine));
}

#[test]
fn who_waits_behind_one_that_gives_up_is_woken() {
    let mut machine = ready();
    let first = go(&machine, 1000..1500);
    let mut wide = wait(&machine, 0..2 * GRANULE);
    let (last, mut behind) = overtake(&mut machine, &mut wide);
    let half = to_source(&mut machine, last, 2).unwrap();
    to_target(&mut machine, half);
    let woken = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(behind.poll_begin(&waker).is_pending());
    drop(wide);
    assert_eq!(woken.take(), 1);
    let write = behind.try_begin().expect("nothing is in its way").unwrap();
    for (write, byte) in [(first, 1), (write, 3)] {
        let half = to_source(&mut machine, write, byte).unwrap();
        to_target(&mut machine, half);
    }
    assert!(machine.is_equal());
}

#[test]
fn a_granule_that_is_always_written_to_gets_copied_all_the_same() {
    let mut options = active();
    options.workers = 1;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    // Two writers on one granule, each to its half, of which one is always under way.
    let hot = LEN - GRANULE;
    let halves = [hot..hot + 512, hot + 512..hot + 1024];
    let mut under_way = [None, None];
    let mut waits = [None, None];
    let mut turns = 0;
    while machine.job.query().status != Status::Ready {
        turns += 1;
        assert!(turns < 1000, "never ready: {:?}", left(&mut machine));
        let index = turns % 2;
        if let Some(write) = under_way[index].take()
            && let Some(half) = to_source(&mut machine, write, turns as u8)
        {
            to_target(&mut machine, half);
        }
        let begun = match waits[index].take() {
            None => begin(&machine, halves[index].clone()),
            Some(pending) => Begin::Wait(pending),
        };
        match begun {
            Begin::Go(write) => under_way[index] = Some(write),
            Begin::Wait(mut pending) => match pending.try_begin() {
                Some(write) => under_way[index] = Some(write.unwrap()),
                None => waits[index] = Some(pending),
            },
            Begin::Refused(refused) => panic!("{refused}"),
        }
        let _ = machine.take_all();
        if !machine.out.is_empty() {
            machine.answer(0);
        }
    }
    assert!(turns > 20);
}

#[test]
fn what_is_claimed_and_does_not_get_on_is_left_to_a_guest() {
    // Claimed, and the speed limit lets nothing go out.
    let mut options = active();
    options.job.speed = 1;
    options.chunk_max = 16 * KIB;
    options.workers = 16;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all();
    let mut pending = wait(&machine, 0..LEN);
    while !machine.out.is_empty() {
        machine.answer_all();
        let _ = machine.take_all();
    }
    let write = pending.try_begin().expect("the job has given way").unwrap();
    let half = to_source(&mut machine, write, 5).unwrap();
    to_target(&mut machine, half);
    assert!(left(&mut machine).is_empty() && machine.is_equal());

    // Failed, and to be tried again later; and then paused.
    for pauses in [false, true] {
        let mut options = active();
        options.job.on_target_error = match pauses {
            true => OnError::Stop,
            false => OnError::Ignore,
        };
        let mut machine = Machine::started(LEN, options);
        machine.fault = Some(Box::new(|_, kind| {
            let is_first = kind.range().is_some_and(|range| range.start() == 0);
            let fails = matches!(kind, OpKind::Copy(_)) && is_first;
            fails.then_some((Side::Target, ErrorKind::Other))
        }));
        let _ = machine.drive_now();
        assert!(left(&mut machine).contains(&0));
        let is_paused = machine.job.query().status == Status::Paused;
        assert_eq!(is_paused, pauses);
        let write = match begin(&machine, 0..GRANULE) {
            Begin::Go(write) => write,
            Begin::Wait(mut pending) => {
                let _ = machine.take_all();
                pending.try_begin().expect("it has given way").unwrap()
            }
            Begin::Refused(refused) => panic!("{refused}"),
        };
        let half = to_source(&mut machine, write, 6).unwrap();
        to_target(&mut machine, half);
        assert!(!left(&mut machine).contains(&0));
    }
}

#[test]
fn nobody_waits_for_a_job_that_nobody_drives() {
    for drops in [false, true] {
        let mut machine = Machine::started(LEN, active());
        let _ = machine.take_all();
        machine.answer_all();
        let _ = machine.take_all();
        let mut pending = wait(&machine, 0..1);
        let woken = Arc::new(Count::default());
        assert!(
            pending
                .poll_begin(&Waker::from(Arc::clone(&woken)))
                .is_pending()
        );
        match drops {
            true => machine.drop_mirror(),
            false => machine.mirror().ops_lost(),
        }
        assert_eq!(woken.take(), 1);
        let write = pending.try_begin().expect("as a usual one").unwrap();
        assert!(!write.is_active());
        machine.guest_lands(0..1, 0x55);
        write.finish(());
        if drops {
            continue;
        }
        machine.out.clear();
        let _ = machine.drive();
        assert_eq!(machine.job.query().status, Status::Ready);
        assert!(machine.is_equal() && is_synced(&mut machine));
        assert!(go(&machine, 0..1).is_active(), "it is driven again");
    }
}

#[test]
fn a_write_that_waits_while_the_guest_is_held_does_not_keep_the_job_from_its_end() {
    let mut machine = ready();
    // Usual writes leave something dirty that the job copies with the guest held.
    machine.guest_write(0..GRANULE, 0x61);
    machine.job.complete().unwrap();
    let _ = machine.take_all();
    let mut pending = wait(&machine, 0..1);
    assert!(pending.try_begin().is_none());
    let switch = machine.drive().switch();
    switch.commit();
    machine.drive().done().unwrap();
    assert!(pending.try_begin().expect("the gate is open").is_ok());
}

#[test]
fn a_write_that_gives_up_is_in_nobodys_way() {
    let mut machine = ready();
    let first = go(&machine, 0..1000);
    drop(wait(&machine, 0..2000));
    first.cancel();
    assert!(left(&mut machine).is_empty(), "it was never issued");
    let second = go(&machine, 0..1000);
    drop(second);
    assert_eq!(left(&mut machine), [0], "it may have been");
    let _ = machine.drive();
    assert!(is_synced(&mut machine));
}

// What goes wrong

#[test]
fn a_write_that_the_source_has_failed_is_copied_later() {
    let mut machine = ready();
    let write = go(&machine, 0..2 * GRANULE);
    machine.guest_lands(0..GRANULE, 0x13); // a part of it
    assert!(write.source_written(false).is_none());
    assert_eq!(left(&mut machine), [0, 1]);
    assert!(!is_synced(&mut machine));
    let _ = machine.drive();
    assert!(machine.is_equal() && is_synced(&mut machine));
}

#[test]
fn a_target_that_fails_does_not_fail_the_guest() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Report] {
        let mut options = active();
        options.job.on_target_error = policy;
        let mut machine = Machine::ready(LEN, options);
        machine.new_names();
        let write = go(&machine, 0..100);
        let half = to_source(&mut machine, write, 0x14).unwrap();
        half.finish(Err(error(ErrorKind::StorageFull)));
        assert_eq!(left(&mut machine), [0]);
        assert!(machine.woken.take() > 0, "the job is told");
        let rest = machine.drive();
        let names = machine.new_names();
        assert_eq!(names[0], "ERROR");
        match policy {
            OnError::Report => {
                assert!(rest.done().is_err());
                assert!(!go(&machine, 0..100).is_active());
            }
            OnError::Stop => {
                assert_eq!(names[1], "standby");
                assert!(!machine.mirror().is_actively_synced());
                assert!(go(&machine, 8 * KIB..9 * KIB).is_active(), "as before");
                machine.job.resume().unwrap();
                let _ = machine.drive();
                assert!(machine.is_equal());
            }
            _ => assert!(machine.is_equal() && is_synced(&mut machine)),
        }
    }
}

#[test]
fn what_is_under_way_when_the_job_fails_is_told_to_be_missing() {
    // The bitmap does not record: what it does not get at the end it never gets.
    let node = Node::new(LEN);
    let granularity = Granularity::from_bytes(GRANULE).unwrap();
    let state = BitmapState::new("b", HBitmap::new(LEN, granularity).unwrap());
    let guard = node.quiesce().try_guard().unwrap();
    node.bitmaps().import_state(&guard, vec![state]).unwrap();
    drop(guard);
    let mut options = active();
    options.bitmap = Some("b".to_owned());
    options.bitmap_mode = Some(BitmapMode::Always);
    let limits = Limits::new(LEN);
    let mirror = Mirror::new(&node, limits, limits, options).unwrap();
    let mut machine = Machine::of(node.clone(), mirror, limits);
    machine.target = machine.source.clone();
    machine.job.start().unwrap();
    let _ = machine.drive();
    let write = go(&machine, GRANULE..2 * GRANULE);
    let half = to_source(&mut machine, write, 0x15).unwrap();
    // What is not at the target never comes there.
    let other = go(&machine, 3 * GRANULE..4 * GRANULE);
    machine.job.cancel(Cancel::Force).unwrap();
    let ended = machine.drive().done();
    assert!(
        matches!(ended, Err(JobError::Cancelled { abandoned: 1 })),
        "{ended:?}: it may still come to the target"
    );
    half.finish(Err(error(ErrorKind::Other)));
    assert!(to_source(&mut machine, other, 0x16).is_none());
    let bits = node.bitmaps().snapshot("b", SnapshotOf::Bitmap).unwrap();
    assert!(bits.iter().eq([GRANULE, 3 * GRANULE]), "{bits:?}");
}

// When

#[test]
fn writes_are_usual_ones_until_the_scan_is_over() {
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, true), active());
    machine.lay(0..LEN / 2, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    // The source has said what is there, and the zeroes are not planned yet.
    let write = go(&machine, 0..GRANULE);
    let half = to_source(&mut machine, write, 0x71);
    if let Some(half) = half {
        to_target(&mut machine, half);
    }
    let look = machine.out.remove(0);
    let blocks = blockjob::Extent {
        len: LEN / 2,
        content: Content::Zero,
        in_top: true,
    };
    machine.report(look.op, blockjob::Outcome::Status(blocks));
    let _ = machine.drive();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(machine.is_equal());
    assert!(go(&machine, 0..GRANULE).is_active());
}

#[test]
fn the_mode_counts_from_the_beginning_of_a_write() {
    let mut machine = Machine::ready(LEN, single());
    assert!(!is_synced(&mut machine), "that is for the other mode");
    let usual = go(&machine, 0..100);
    assert!(!usual.is_active());
    change(&machine, CopyMode::WriteBlocking);
    assert!(
        !is_synced(&mut machine),
        "the target will not have that one"
    );
    assert_eq!(
        machine.job.query().mirror.unwrap().copy_mode,
        CopyMode::WriteBlocking
    );
    let late = go(&machine, GRANULE..GRANULE + 100);
    assert!(late.is_active());
    assert!(to_source(&mut machine, usual, 1).is_none());
    assert_eq!(
        left(&mut machine),
        [0, 1],
        "one copied later, one under way"
    );
    let _ = machine.drive();
    assert!(is_synced(&mut machine));

    change(&machine, CopyMode::Background);
    assert!(!is_synced(&mut machine));
    let half = to_source(&mut machine, late, 2).expect("it is what it was");
    to_target(&mut machine, half);
    assert!(!go(&machine, 0..100).is_active());
    let _ = machine.drive();
    assert!(machine.is_equal());
    change(&machine, CopyMode::Background); // as it is already
}

#[test]
fn to_finish_an_active_write_without_the_target_is_as_good_for_the_data() {
    let mut machine = ready();
    let write = go(&machine, 0..100);
    machine.guest_lands(0..100, 4);
    write.finish(());
    assert_eq!(left(&mut machine), [0]);
    assert!(!machine.mirror().is_actively_synced());
    let _ = machine.drive();
    assert!(machine.is_equal() && is_synced(&mut machine));
}

#[test]
fn active_writes_are_recorded_in_all_other_bitmaps() {
    let mut machine = ready();
    let bits = |machine: &Machine| {
        let bits = machine.node.bitmaps().snapshot("all", SnapshotOf::Bitmap);
        bits.unwrap()
            .iter()
            .map(|at| at / GRANULE)
            .collect::<Vec<_>>()
    };
    let guard = machine.node.quiesce().try_guard().unwrap();
    let mut options = blockjob::BitmapOptions::default();
    options.granularity = Granularity::from_bytes(GRANULE);
    machine.node.bitmaps().add(&guard, "all", options).unwrap();
    drop(guard);
    assert!(write(&mut machine, 100..GRANULE + 1, 1).is_some());
    assert_eq!(bits(&machine), [0, 1]);
    assert!(left(&mut machine).is_empty());
    let frozen = machine.node.bitmaps().query("all").unwrap();
    assert!(frozen.is_recording);
    // One that records in coarser granules than the job.
    drop(machine.node.bitmaps().disable("all"));
    assert!(write(&mut machine, LEN - 1..LEN, 1).is_some());
    assert_eq!(bits(&machine), [0, 1]);
}

#[test]
fn the_endless_load_of_a_guest_on_half_of_the_disk_does_not_keep_it_from_ready() {
    let mut machine = Machine::started(LEN, active());
    let mut remaining = u64::MAX;
    let mut at = 0;
    let mut pending: Option<PendingWrite<Arc<Lane>>> = None;
    for _ in 0..10_000 {
        let _ = machine.take_all();
        if machine.job.query().status == Status::Ready {
            break;
        }
        // Three writes for each copy.
        for _ in 0..3 {
            at = (at + 777) % (LEN / 2);
            let begun = match pending.take() {
                Some(pending) => Begin::Wait(pending),
                None => begin(&machine, at..at + 600),
            };
            let write = match begun {
                Begin::Go(write) => write,
                Begin::Wait(mut waiting) => match waiting.try_begin() {
                    Some(write) => write.unwrap(),
                    None => {
                        pending = Some(waiting);
                        continue;
                    }
                },
                Begin::Refused(refused) => panic!("{refused}"),
            };
            if let Some(half) = to_source(&mut machine, write, at as u8) {
                to_target(&mut machine, half);
            }
        }
        if !machine.out.is_empty() {
            machine.answer(0);
        }
        let progress = machine.job.query().progress;
        let now = progress.total - progress.current;
        assert!(now <= remaining, "what is left only gets less");
        remaining = now;
    }
    assert_eq!(machine.job.query().status, Status::Ready);
    drop(pending);
    let _ = machine.drive();
    assert!(machine.is_equal());
}

#[test]
fn time_is_not_needed_to_let_a_guest_go_on() {
    // A job that waits for a time, and a guest that waits for the job.
    let mut options = active();
    options.job.speed = 1;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer_all();
    let until = machine.take_all().wait();
    assert!(until.is_some_and(|until| until > Duration::ZERO) || !machine.out.is_empty());
    machine.now += MS;
    assert!(begin(&machine, LEN - 1..LEN).go().is_some());
}

/// What each invariant is for: broken, the test named beside it fails.
#[cfg(debug_assertions)]
#[test]
fn every_broken_invariant_is_noticed() {
    use crate::machine::fails;
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    let broken: [(Sabotage, fn()); 12] = [
        (Sabotage::OvertakeForEver, a_wide_write_has_its_turn),
        (
            Sabotage::WriteOverClaims,
            a_write_waits_for_what_is_being_copied_and_a_copy_for_a_write,
        ),
        (
            Sabotage::ClaimOverWrites,
            a_write_waits_for_what_is_being_copied_and_a_copy_for_a_write,
        ),
        (
            Sabotage::OverlapActives,
            writes_that_overlap_come_to_both_disks_in_the_same_order,
        ),
        (
            Sabotage::EndClaimEarly,
            writes_that_overlap_come_to_both_disks_in_the_same_order,
        ),
        (
            Sabotage::WishForNothing,
            a_granule_that_is_always_written_to_gets_copied_all_the_same,
        ),
        (
            Sabotage::WriteIntoDirty,
            a_part_of_a_dirty_granule_does_not_go_to_the_target,
        ),
        (
            Sabotage::RecordNoActives,
            active_writes_are_recorded_in_all_other_bitmaps,
        ),
        (
            Sabotage::WaitForNobody,
            nobody_waits_for_a_job_that_nobody_drives,
        ),
        (
            Sabotage::ActiveWhileScanning,
            writes_are_usual_ones_until_the_scan_is_over,
        ),
        (
            Sabotage::LeaveOutActives,
            what_is_under_way_when_the_job_fails_is_told_to_be_missing,
        ),
        (
            Sabotage::TrustTheMode,
            the_mode_counts_from_the_beginning_of_a_write,
        ),
    ];
    for (sabotage, test) in broken {
        break_on_this_thread(Some(sabotage));
        let is_noticed = fails(test);
        break_on_this_thread(None);
        assert!(is_noticed, "{sabotage:?}");
    }
}
