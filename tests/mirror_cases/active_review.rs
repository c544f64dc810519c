//! Active writes beside usual ones, and those that give up: what both sides may forget.

use std::io::ErrorKind;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::migration::{
    IncomingMigration, IncomingOptions, Mode, Next, OutgoingMigration, OutgoingOptions, StreamKind,
};
use blockjob::{
    Adaptive, Begin, BitmapMigration, BitmapOptions, ByteRange, Change, CheckpointId, CopyMode,
    Granularity, Lane, Limits, Mirror, MirrorOptions, MirrorSync, Node, OnError, OpKind, Outcome,
    PendingWrite, Side, SnapshotOf, Step, TargetWrite, Ticket,
};

use crate::machine::{Count, KIB, MIB, MS, Machine, bytes};
use crate::{LEN, single};

const GRANULE: u64 = 4 * KIB;

type Write = Ticket<Arc<Lane>>;

fn active() -> MirrorOptions {
    let mut options = single();
    options.copy_mode = CopyMode::WriteBlocking;
    options
}

fn go(machine: &Machine, range: impl Into<ByteRange>) -> Write {
    let begun = machine.node.begin_write_owned(range.into());
    begun.go().expect("nothing is in its way")
}

fn wait(machine: &Machine, range: impl Into<ByteRange>) -> PendingWrite<Arc<Lane>> {
    match machine.node.begin_write_owned(range.into()) {
        Begin::Wait(pending) => pending,
        other => panic!("{other:?}"),
    }
}

fn change(machine: &Machine, mode: CopyMode) {
    let change = Change {
        copy_mode: Some(mode),
        ..Change::default()
    };
    machine.job.change(change).unwrap();
}

/// The guest's data of a write, which it keeps: the source may hold other data by then.
fn to_target(machine: &mut Machine, half: TargetWrite<Arc<Lane>>, byte: u8) {
    machine.target[bytes(half.range())].fill(byte);
    machine.is_unflushed = true;
    half.finish(Ok(()));
}

#[test]
fn a_usual_write_that_ends_beside_an_active_one_is_not_forgotten() {
    // The usual one begins before writes are active, or when they are not any more.
    for is_first in [true, false] {
        let (from, to) = match is_first {
            true => (CopyMode::Background, CopyMode::WriteBlocking),
            false => (CopyMode::WriteBlocking, CopyMode::Background),
        };
        let mut options = single();
        options.copy_mode = from;
        let mut machine = Machine::ready(LEN, options);
        let first = go(&machine, 0..GRANULE);
        change(&machine, to);
        let _ = machine.take_all();
        let second = go(&machine, 0..GRANULE);
        assert!(first.is_active() != is_first && second.is_active() == is_first);
        let (usual, active) = match is_first {
            true => (first, second),
            false => (second, first),
        };
        machine.guest_lands(0..GRANULE, 0xac);
        machine.guest_lands(0..GRANULE, 0x05);
        usual.finish(());
        if let Some(half) = active.source_written(true) {
            to_target(&mut machine, half, 0xac);
        }
        let _ = machine.drive();
        assert!(machine.is_equal(), "usual one first: {is_first}");
    }
}

/// Of an adaptive mirror a write waits for the job only so long. Then it goes as a usual one, beside active ones.
#[test]
fn a_write_that_has_waited_too_long_goes_alone_and_is_copied_again() {
    let mut machine = Machine::ready(LEN, active());
    // So it is write-blocking from its first window on.
    machine.now += 200 * MS;
    let _ = machine.take_all();
    let adaptive = Adaptive::default();
    change(&machine, CopyMode::Adaptive(adaptive));
    // Something that the job is copying.
    let skipped = go(&machine, 0..GRANULE);
    machine.guest_lands(0..GRANULE, 1);
    skipped.source_written(true).unwrap().skip();
    machine.now += 20 * MS;
    let _ = machine.take_all();
    assert_eq!(machine.kinds(), [OpKind::Status((0..GRANULE).into())]);
    let mut wide = wait(&machine, 0..2 * GRANULE);
    assert!(wide.try_begin().is_none());
    let until = machine
        .take_all()
        .wait()
        .expect("it does not wait for ever");
    assert!(until <= machine.now + 2 * adaptive.latency_max);
    machine.now += 2 * adaptive.latency_max - MS;
    let _ = machine.take_all();
    assert!(wide.try_begin().is_none());
    machine.now += MS;
    let _ = machine.take_all();

    // One that began before it, and ends after it.
    let active = go(&machine, GRANULE..2 * GRANULE);
    let alone = wide.try_begin().expect("it waits no more").unwrap();
    assert!(active.is_active() && !alone.is_active());
    machine.guest_lands(GRANULE..2 * GRANULE, 0xac);
    machine.guest_lands(0..2 * GRANULE, 0x05);
    alone.finish(());
    if let Some(half) = active.source_written(true) {
        to_target(&mut machine, half, 0xac);
    }
    let left = machine.mirror().left_dirty().unwrap();
    assert!(left.all_dirty_in(0..2 * GRANULE), "{left:?}");
    let _ = machine.drive();
    assert!(machine.is_equal());
}

#[test]
fn active_writes_are_trusted_once_no_usual_one_is_left() {
    let mut machine = Machine::ready(LEN, single());
    let usual = go(&machine, 0..1);
    change(&machine, CopyMode::WriteBlocking);
    let _ = machine.take_all();
    usual.cancel();
    let _ = machine.take_all();
    // Dirty, for it has never come to the target.
    let skipped = go(&machine, 0..GRANULE);
    machine.guest_lands(0..GRANULE, 1);
    skipped.source_written(true).unwrap().skip();
    let write = go(&machine, 0..GRANULE);
    machine.guest_lands(0..GRANULE, 2);
    let half = write.source_written(true).unwrap();
    to_target(&mut machine, half, 2);
    let left = machine.mirror().left_dirty().unwrap();
    assert!(left.is_clean() && machine.is_equal());
}

#[test]
fn a_job_is_told_when_a_write_that_it_has_given_way_to_gives_up() {
    let mut options = active();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = Machine::started(LEN, options);
    machine.fault = Some(Box::new(|_, kind| {
        let is_first = kind.range().is_some_and(|range| range.start() == 0);
        let fails = matches!(kind, OpKind::Copy(_)) && is_first;
        fails.then_some((Side::Target, ErrorKind::Other))
    }));
    let _ = machine.drive_now();
    machine.fault = None;
    // What waits to be tried again is left to the write.
    let mut pending = wait(&machine, 0..1);
    let woken = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(pending.poll_begin(&waker).is_pending());
    let _ = machine.take_all();
    assert_eq!(woken.take(), 1);
    machine.now += 1000 * MS;
    let until = machine.take_all().wait();
    assert_eq!(until, None, "it waits for the write alone");
    let _ = machine.woken.take();
    drop(pending);
    assert!(machine.woken.take() > 0, "there is work again");
    let _ = machine.drive();
    assert!(machine.is_equal());
}

#[test]
fn what_has_ended_after_a_job_is_not_told_to_the_next() {
    let mut machine = Machine::ready(LEN, active());
    let write = go(&machine, 0..GRANULE);
    machine.guest_lands(0..GRANULE, 3);
    let half = write.source_written(true).unwrap();
    machine.drop_mirror();
    half.finish(Ok(()));
    let limits = Limits::new(LEN);
    let mirror = Mirror::new(&machine.node, limits, limits, active()).unwrap();
    let mut next = Machine::of(machine.node.clone(), mirror, limits);
    next.job.start().unwrap();
    let _ = next.drive();
    assert_eq!(next.job.query().progress.current, LEN);
}

#[test]
fn writes_anywhere_at_all_are_taken() {
    let mut machine = Machine::started(LEN, active());
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all();
    let ranges = [
        0..u64::MAX,
        LEN - 1..u64::MAX,
        LEN..u64::MAX,
        LEN + 1..LEN + 2,
        u64::MAX - 1..u64::MAX,
        u64::MAX..u64::MAX,
        0..0,
        LEN..LEN,
    ];
    for range in ranges {
        let range = ByteRange::from(range);
        let mut begun = machine.node.begin_write_owned(range);
        let id = CheckpointId::default();
        for _ in 0..100 {
            let _ = machine.take_all();
            let _ = machine.mirror().checkpoint(id).unwrap();
            begun = match begun {
                Begin::Wait(mut pending) => match pending.poll_begin(Waker::noop()) {
                    Poll::Ready(write) => Begin::Go(write.unwrap()),
                    Poll::Pending => Begin::Wait(pending),
                },
                other => other,
            };
            if let Begin::Go(_) = &begun {
                break;
            }
            machine.answer_all();
        }
        let write = begun.go().expect("nothing is in its way for ever");
        let _ = machine.take_all();
        let _ = machine.mirror().checkpoint(id).unwrap();
        let inside = range.intersection((0..LEN).into());
        if !inside.is_empty() {
            machine.guest_lands(inside, 9);
        }
        if let Some(half) = write.source_written(true) {
            to_target(&mut machine, half, 9);
        }
        let _ = machine.take_all();
    }
    let _ = machine.drive();
    assert!(machine.is_equal());
}

/// What there is to send, until one end waits for something else.
fn pump(from: &mut OutgoingMigration, to: &mut IncomingMigration) -> u64 {
    let before = from.bytes_sent();
    let mut bytes = vec![0; 1 << 16];
    loop {
        let next = from.next_bytes(Duration::ZERO, &mut bytes).unwrap();
        if let Next::Bytes(count) = next {
            to.feed(&bytes[..count]).unwrap();
        }
        let answer = to.next_bytes(&mut bytes);
        from.feed(&bytes[..answer]).unwrap();
        if answer == 0 && !matches!(next, Next::Bytes(_)) {
            return from.bytes_sent() - before;
        }
    }
}

#[test]
fn an_active_write_is_sent_by_a_migration_of_bitmaps_that_runs_meanwhile() {
    // Bits of less than a MiB are not sent before the guest stands still.
    let len = 4096 * MIB;
    let (node, there) = (Node::new(len), Node::new(len));
    let mut bitmap = BitmapOptions::default();
    bitmap.granularity = Granularity::from_bytes(512);
    let guard = node.quiesce().try_guard().unwrap();
    node.bitmaps().add(&guard, "all", bitmap).unwrap();
    drop(guard);
    let (mut options, limits) = (active(), Limits::new(len));
    options.sync = MirrorSync::None;
    let mut mirror = Mirror::new(&node, limits, limits, options).unwrap();
    mirror.job().start().unwrap();
    while let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
        mirror.op_done(Duration::ZERO, op, Outcome::Done);
    }
    assert!(mirror.is_actively_synced());

    let stream = StreamKind::Native { session: [7; 16] };
    let mut options = OutgoingOptions::default();
    (options.stream, options.mode) = (stream, Mode::Live);
    let here = BitmapMigration::new().with_node("disk", &node);
    let mut from = here.outgoing(options).unwrap();
    let mut options = IncomingOptions::default();
    options.stream = stream;
    let to = BitmapMigration::new().with_node("disk", &there);
    let mut to = to.incoming(options);
    assert!(pump(&mut from, &mut to) > 0);
    assert_eq!(pump(&mut from, &mut to), 0, "all is there");

    let written = (2048 * MIB..2048 * MIB + 4 * KIB).into();
    let write = node.begin_write_owned(written).go().unwrap();
    let half = write.source_written(true).unwrap();
    half.finish(Ok(()));
    assert!(
        mirror.left_dirty().unwrap().is_clean(),
        "nothing is to be copied"
    );
    let sent = pump(&mut from, &mut to);
    assert!(
        (1..4096).contains(&sent),
        "the chunk that has changed: {sent}"
    );
    let guard = node.quiesce().try_guard().unwrap();
    from.stop(&[&guard]).unwrap();
    let _ = pump(&mut from, &mut to);
    to.guest_starts(&[&there.quiesce().try_guard().unwrap()])
        .unwrap();
    let bits = there.bitmaps().snapshot("all", SnapshotOf::Bitmap).unwrap();
    assert!(bits.runs().eq([written]), "{bits:?}");
}

/// What each invariant is for: broken, the test named beside it fails.
#[cfg(debug_assertions)]
#[test]
fn a_broken_invariant_is_noticed() {
    use crate::machine::fails;
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    break_on_this_thread(Some(Sabotage::CleanBesideOthers));
    let noticed = [
        fails(a_usual_write_that_ends_beside_an_active_one_is_not_forgotten),
        fails(a_write_that_has_waited_too_long_goes_alone_and_is_copied_again),
    ];
    break_on_this_thread(Some(Sabotage::RecordNoActives));
    let is_recorded = !fails(an_active_write_is_sent_by_a_migration_of_bitmaps_that_runs_meanwhile);
    break_on_this_thread(None);
    assert_eq!(noticed, [true, true]);
    assert!(!is_recorded);
}
