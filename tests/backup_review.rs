//! Backups at their edges: each of these once went wrong.

#![allow(clippy::disallowed_methods, reason = "a test has a watchdog")]

#[path = "backup_review/buffers.rs"]
mod buffers;
#[path = "backup_review/offload.rs"]
mod offload;
#[cfg(debug_assertions)]
#[path = "backup_review/torn.rs"]
mod torn;
#[path = "backup_review/views.rs"]
mod views;

use std::sync::{Arc, mpsc};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use blockjob::{
    Backup, BackupBuffer, BackupError, BackupOptions, BackupSync, Begin, BitmapMode, BitmapOptions,
    ByteRange, Cancel, Content, Event, Extent, Grown, JobError, Lane, Limits, Mirror,
    MirrorOptions, Node, NotSaved, OnBufferFull, OnCbwError, OnError, Op, OpKind, Outcome,
    PendingWrite, RangeLimits, ShapeError, Side, SnapshotOf, Status, Step, Transaction, ViewError,
    WriteRefused,
};
use parking_lot::Mutex;

const CLUSTER: u64 = 64 << 10;
const SECOND: Duration = Duration::from_secs(1);

/// A backup driven by hand: the test answers each operation when it likes.
struct Rig {
    node: Node,
    backup: Backup,
    now: Duration,
    out: Vec<Op>,
    /// Everything that was ever handed out.
    asked: Vec<OpKind>,
}

/// What a backup is made of.
struct Parts {
    options: BackupOptions,
    source: Limits,
    target: Limits,
}

fn parts(len: u64) -> Parts {
    let mut options = BackupOptions::default();
    options.job.id = Some("backup".to_owned());
    options.cbw_timeout = Some(SECOND);
    let limits = Limits::new(len);
    Parts {
        options,
        source: limits,
        target: limits,
    }
}

fn all_discards() -> Option<RangeLimits> {
    Some(RangeLimits {
        align: 1,
        max: u64::MAX,
    })
}

fn buffer(len: u64) -> BackupBuffer {
    let mut limits = Limits::new(len);
    limits.discard = all_discards();
    BackupBuffer::new(limits)
}

fn cluster(index: u64) -> ByteRange {
    (index * CLUSTER..(index + 1) * CLUSTER).into()
}

impl Rig {
    fn made(node: &Node, parts: Parts) -> Self {
        let Parts {
            options,
            source,
            target,
        } = parts;
        Self {
            node: node.clone(),
            backup: Backup::new(node, source, target, options).unwrap(),
            now: Duration::ZERO,
            out: Vec::new(),
            asked: Vec::new(),
        }
    }

    fn started(len: u64, change: impl FnOnce(&mut Parts)) -> Self {
        let mut parts = parts(len);
        change(&mut parts);
        let rig = Self::made(&Node::new(len), parts);
        rig.backup.job().start().unwrap();
        rig
    }

    /// Takes all there is to be done, and answers none of it.
    fn rest(&mut self) -> Step {
        loop {
            match self.backup.poll(self.now, Waker::noop()) {
                Step::Op(op) => {
                    self.asked.push(op.kind());
                    self.out.push(op);
                }
                step => {
                    self.backup.check_invariants();
                    return step;
                }
            }
        }
    }

    fn until(&mut self) -> Option<Duration> {
        match self.rest() {
            Step::Wait { until } => until,
            step => panic!("waits, but {step:?}"),
        }
    }

    /// Answers the first that is out and such as that.
    fn answer(&mut self, is: impl Fn(OpKind) -> bool, outcome: Option<Outcome>) -> OpKind {
        let found = self.out.iter().position(|op| is(op.kind()));
        let op = self.out.remove(found.expect("one such as that is out"));
        let kind = op.kind();
        let outcome = outcome.unwrap_or(match kind {
            OpKind::Status(range) => Outcome::Status(Extent::data(range.len())),
            _ => Outcome::Done,
        });
        self.backup.op_done(self.now, op, outcome);
        kind
    }

    /// Answers all such as that, also those that come of it.
    fn answer_all(&mut self, is: impl Fn(OpKind) -> bool) -> Step {
        loop {
            let step = self.rest();
            if !self.out.iter().any(|op| is(op.kind())) {
                return step;
            }
            self.answer(&is, None);
        }
    }

    fn done(&mut self) -> Result<(), JobError> {
        match self.answer_all(|_| true) {
            Step::Done(result) => result,
            step => panic!("is over, but {step:?}"),
        }
    }

    fn write(&self, range: ByteRange) -> PendingWrite<Arc<Lane>> {
        match self.node.begin_write_owned(range) {
            Begin::Wait(pending) => pending,
            begin => panic!("is held back, but {begin:?}"),
        }
    }

    fn has_out(&self, is: impl Fn(OpKind) -> bool) -> bool {
        self.out.iter().any(|op| is(op.kind()))
    }
}

fn failed(side: Side) -> Option<Outcome> {
    let error = std::io::Error::other("on purpose");
    Some(Outcome::Failed { side, error })
}

fn not_saved(pending: &mut PendingWrite<Arc<Lane>>) -> Option<NotSaved> {
    match pending.try_begin()? {
        Err(WriteRefused::NotSaved(why)) => Some(why),
        other => panic!("is refused, but {other:?}"),
    }
}

/// Calls a function once, and nobody after that.
struct Once(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Wake for Once {
    fn wake(self: Arc<Self>) {
        let act = self.0.lock().take();
        if let Some(act) = act {
            act();
        }
    }
}

#[test]
fn what_is_left_of_an_old_hold_does_not_end_the_next() {
    let mut rig = Rig::started(16 * CLUSTER, |parts| {
        parts.options.sync = BackupSync::None;
        parts.options.view = true;
    });
    rig.until();
    let view = rig.backup.view().unwrap();
    let read = view.begin_read((0..4096).into()).unwrap();
    let node = rig.node.clone();
    let mut guest = rig.write((0..512).into());
    let _ = rig.answer_all(|_| true);
    let Rig { backup, .. } = rig;
    let next: Arc<Mutex<Option<Rig>>> = Arc::default();
    let (place, same) = (Arc::clone(&next), node.clone());
    let act = move || {
        drop(backup);
        let mut rig = Rig::made(&same, parts(16 * CLUSTER));
        rig.backup.job().start().unwrap();
        rig.until();
        *place.lock() = Some(rig);
    };
    let waker = Waker::from(Arc::new(Once(Mutex::new(Some(Box::new(act))))));
    assert!(guest.poll_begin(&waker).is_pending(), "it is being read");
    // Lets the guest go on, whose waker ends this backup and begins another: as another thread might.
    let _ = read.finish();
    assert!(next.lock().is_some());
    for range in [cluster(0), cluster(9)] {
        let begin = node.begin_write(range);
        assert!(matches!(begin, Begin::Wait(_)), "{begin:?} of {range}");
    }
}

#[test]
fn a_write_that_waits_for_a_reader_has_a_deadline_also_when_all_is_copied() {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.view = true;
        parts.options.on_cbw_error = OnCbwError::BreakGuestWrite;
        parts.options.job.auto_finalize = false;
    });
    rig.until();
    let view = rig.backup.view().unwrap();
    let read = view.begin_read((0..4096).into()).unwrap();
    let _ = rig.answer_all(|_| true);
    assert_eq!(rig.backup.job().query().status, Status::Pending);
    let mut guest = rig.write((0..512).into());
    let deadline = rig.now + SECOND;
    assert_eq!(rig.until(), Some(deadline));
    rig.now = deadline;
    rig.until();
    assert_eq!(not_saved(&mut guest), Some(NotSaved::TimedOut));
    read.finish().unwrap();
    rig.backup.job().finalize().unwrap();
    rig.done().unwrap();
}

#[test]
fn a_reader_that_is_late_breaks_the_view_and_not_what_is_copied() {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.view = true;
        parts.options.job.auto_finalize = false;
    });
    rig.until();
    let view = rig.backup.view().unwrap();
    let read = view.begin_read((0..4096).into()).unwrap();
    let _ = rig.answer_all(|_| true);
    let mut guest = rig.write((0..512).into());
    let deadline = rig.until().unwrap();
    assert!(guest.try_begin().is_none());
    rig.now = deadline;
    rig.until();
    assert!(matches!(guest.try_begin(), Some(Ok(_))));
    assert_eq!(read.finish(), Err(ViewError::Over));
    rig.backup.job().finalize().unwrap();
    rig.done().unwrap();
}

#[test]
fn a_guest_write_is_not_kept_back_by_discards() {
    let mut rig = Rig::started(100 * CLUSTER, |parts| {
        parts.options.discard_source = true;
        parts.options.chunk_max = CLUSTER;
        parts.options.workers = 1;
    });
    for _ in 0..80 {
        let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
        rig.answer(|kind| matches!(kind, OpKind::Copy(_)), None);
    }
    let _ = rig.rest();
    let is_discard = |kind| matches!(kind, OpKind::DiscardSource(_));
    assert!(rig.has_out(is_discard));
    let _guest = rig.write(cluster(99));
    let _ = rig.rest();
    let is_of_guest = |kind: OpKind| kind.range() == Some(cluster(99));
    assert!(rig.has_out(is_of_guest), "the guest waits for discards");
    rig.done().unwrap();
    let discarded = rig.asked.iter().filter(|&&kind| is_discard(kind));
    assert_eq!(discarded.count(), 100);
}

#[test]
fn discards_at_the_same_time_are_bounded() {
    let mut rig = Rig::started(200 * CLUSTER, |parts| {
        parts.options.discard_source = true;
        parts.options.chunk_max = CLUSTER;
    });
    let is_discard = |kind: OpKind| matches!(kind, OpKind::DiscardSource(_));
    let _ = rig.answer_all(|kind| !is_discard(kind));
    assert!(rig.out.len() <= 64, "{} are out", rig.out.len());
    rig.done().unwrap();
}

#[test]
fn a_backup_is_over_when_its_source_has_discarded() {
    let mut rig = Rig::started(2 * CLUSTER, |parts| {
        parts.options.discard_source = true;
    });
    let is_discard = |kind: OpKind| matches!(kind, OpKind::DiscardSource(_));
    let step = rig.answer_all(|kind| !is_discard(kind));
    assert!(matches!(step, Step::Wait { .. }), "{step:?}");
    rig.done().unwrap();
}

#[test]
fn a_write_past_the_end_of_the_disk_waits_no_longer_than_its_cluster() {
    let len = CLUSTER + 1000;
    let past = ByteRange::from(CLUSTER + 2000..CLUSTER + 3000);
    let flag = Arc::new(Mutex::new(false));
    let woken = Arc::clone(&flag);
    let mut rig = Rig::started(len, |_| {});
    rig.until();
    let mut guest = rig.write(past);
    let act = Box::new(move || *woken.lock() = true);
    let waker = Waker::from(Arc::new(Once(Mutex::new(Some(act)))));
    assert!(guest.poll_begin(&waker).is_pending());
    while !matches!(rig.rest(), Step::Wait { .. }) || rig.backup.left_dirty().is_some() {
        rig.answer(|_| true, None);
        if rig
            .backup
            .left_dirty()
            .is_some_and(|left| !left.any_dirty_in(cluster(1)))
        {
            break;
        }
    }
    assert!(*flag.lock(), "nobody has told it");
    assert!(matches!(
        guest.poll_begin(Waker::noop()),
        Poll::Ready(Ok(_))
    ));

    let mut rig = Rig::started(len, |parts| {
        parts.options.on_cbw_error = OnCbwError::BreakGuestWrite;
        parts.options.sync = BackupSync::None;
    });
    rig.until();
    let mut guest = rig.write(past);
    let _ = rig.rest();
    rig.answer(|_| true, None);
    let _ = rig.rest();
    rig.answer(|kind| matches!(kind, OpKind::Copy(_)), failed(Side::Target));
    assert_eq!(not_saved(&mut guest), Some(NotSaved::Failed));
}

#[test]
fn what_is_skipped_when_the_guest_was_let_go_counts_as_missing() {
    let len = 4 * CLUSTER;
    let node = Node::new(len);
    node.bitmaps()
        .add_disabled("left", BitmapOptions::default())
        .unwrap();
    let mut parts = parts(len);
    parts.options.sync = BackupSync::Top;
    parts.options.bitmap = Some("left".to_owned());
    parts.options.bitmap_mode = Some(BitmapMode::Always);
    let mut rig = Rig::made(&node, parts);
    rig.backup.job().start().unwrap();
    let _ = rig.rest();
    rig.backup.job().cancel(Cancel::Force).unwrap();
    let _ = rig.rest();
    // The guest has discarded it all since it was let go, and so the source has nothing there.
    let nothing = Extent {
        len,
        content: Content::Zero,
        in_top: false,
    };
    rig.answer(
        |kind| matches!(kind, OpKind::Status(_)),
        Some(Outcome::Status(nothing)),
    );
    rig.done().unwrap_err();
    assert_eq!(node.bitmaps().query("left").unwrap().dirty_bytes, len);
}

#[test]
fn a_job_that_one_transaction_begins_is_not_begun_or_undone_by_another() {
    let rig = Rig::made(&Node::new(4 * CLUSTER), parts(4 * CLUSTER));
    let mut rig = rig;
    let mut first = Transaction::new();
    first.start(rig.backup.job());
    let first = first.prepare().try_prepared().unwrap().unwrap();
    let mut second = Transaction::new();
    second.start(rig.backup.job());
    let second = second.prepare().try_prepared().unwrap();
    assert!(second.is_err(), "its instant would not be that of the job");
    drop(second);
    first.commit();
    // The instant was before the first write that comes now.
    let mut guest = rig.write(cluster(0));
    assert!(guest.try_begin().is_none());
    rig.done().unwrap();
}

#[test]
fn compressing_needs_a_whole_cluster_at_once() {
    let len = 4 * CLUSTER;
    let mut parts = parts(len);
    parts.options.compress = true;
    parts.target.compresses = true;
    parts.target.max_transfer = 4096;
    let error = Backup::new(&Node::new(len), parts.source, parts.target, parts.options);
    let too_long = ShapeError::PieceTooLong {
        piece: CLUSTER,
        max: 4096,
    };
    assert_eq!(error.err(), Some(BackupError::Shape(too_long)));
}

#[test]
fn behind_a_hole_no_more_is_claimed_than_ever() {
    const MIB: u64 = 1 << 20;
    let len = 256 * MIB;
    let node = Node::new(len);
    let mut options = MirrorOptions::default();
    options.job.id = Some("mirror".to_owned());
    options.workers = 2;
    let limits = Limits::new(len);
    let mut target = limits;
    target.write_zeroes = all_discards();
    let mut mirror = Mirror::new(&node, limits, target, options).unwrap();
    mirror.job().start().unwrap();
    let last = ByteRange::from(len - 4 * MIB..len - 3 * MIB);
    let mut copies_of_last = 0;
    let mut has_written = false;
    for _ in 0..100_000 {
        match mirror.poll(Duration::ZERO, Waker::noop()) {
            Step::Op(op) => {
                let outcome = match op.kind() {
                    OpKind::Status(range) => {
                        let is_hole = range.start() < len / 2;
                        let known = range.split_at(if is_hole { len / 2 } else { len }).0;
                        let mut extent = Extent::data(known.len());
                        if is_hole {
                            extent.content = Content::Zero;
                        }
                        Outcome::Status(extent)
                    }
                    OpKind::Copy(range) => {
                        if !has_written {
                            // Long before its turn comes.
                            has_written = true;
                            node.begin_write(last).go().unwrap().finish(());
                        }
                        copies_of_last += usize::from(range.overlaps(last));
                        Outcome::Done
                    }
                    _ => Outcome::Done,
                };
                mirror.op_done(Duration::ZERO, op, outcome);
            }
            Step::Wait { .. } => break,
            step => panic!("waits, but {step:?}"),
        }
    }
    assert_eq!(mirror.job().query().status, Status::Ready);
    assert_eq!(copies_of_last, 1, "it was claimed before it was written");
}

#[test]
fn what_of_a_range_given_up_the_target_can_discard_is_discarded() {
    let len = 16 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        parts.options.sync = BackupSync::None;
        parts.options.view = true;
        parts.target.discard = Some(RangeLimits {
            align: 2 * CLUSTER as u32,
            max: 4 * CLUSTER,
        });
    });
    rig.until();
    let view = rig.backup.view().unwrap();
    for range in [
        CLUSTER..9 * CLUSTER,
        10 * CLUSTER..11 * CLUSTER,
        11 * CLUSTER..14 * CLUSTER,
    ] {
        view.give_up(range.into()).unwrap();
    }
    rig.until();
    let mut given_up: Vec<_> = rig.asked.iter().filter_map(|kind| kind.range()).collect();
    given_up.sort_by_key(|range| range.start());
    let whole = [2..6, 6..8, 12..14];
    let whole = whole.map(|it| ByteRange::from(it.start * CLUSTER..it.end * CLUSTER));
    assert_eq!(given_up, whole);
}

#[test]
fn what_was_begun_for_a_guest_that_has_left_breaks_nothing() {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.sync = BackupSync::None;
        parts.options.job.on_target_error = OnError::Ignore;
    });
    rig.until();
    let guest = rig.write(cluster(2));
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    drop(guest);
    rig.answer(|kind| matches!(kind, OpKind::Copy(_)), failed(Side::Target));
    rig.until();
    assert_eq!(rig.backup.job().query().status, Status::Running);
    // It is not forgotten for that.
    let _guest = rig.write(cluster(2));
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    assert!(rig.has_out(|kind| kind == OpKind::Copy(cluster(2))));
}

#[test]
fn a_target_settles_before_the_end_when_a_discard_of_it_was_lost() {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.sync = BackupSync::None;
        parts.options.view = true;
        parts.target.discard = all_discards();
    });
    rig.until();
    rig.backup.view().unwrap().give_up(cluster(1)).unwrap();
    rig.until();
    assert!(rig.has_out(|kind| kind == OpKind::GiveUp(cluster(1))));
    rig.out.clear();
    rig.backup.ops_lost();
    rig.backup.job().cancel(Cancel::Force).unwrap();
    let step = rig.rest();
    assert!(rig.has_out(|kind| kind == OpKind::Settle), "{step:?}");
    assert!(rig.done().is_err());
}

/// The granules that are dirty after a backup of clusters 0 to 3 with mode always that fails when one is copied,
/// and of which the flush comes to `flush`.
fn left_after_failure(sync: BackupSync, flush: Option<Outcome>) -> Vec<u64> {
    let len = 8 * CLUSTER;
    let node = Node::new(len);
    let guard = node.quiesce().try_guard().unwrap();
    let mut options = BitmapOptions::default();
    options.granularity = Some(blockjob::Granularity::from_bytes(CLUSTER).unwrap());
    node.bitmaps().add(&guard, "daily", options).unwrap();
    drop(guard);
    let written = node.begin_write((0..4 * CLUSTER).into()).go().unwrap();
    written.finish(());
    let mut parts = parts(len);
    parts.options.sync = sync;
    parts.options.bitmap = Some("daily".to_owned());
    parts.options.bitmap_mode = Some(BitmapMode::Always);
    parts.options.workers = 1;
    parts.options.chunk_max = CLUSTER;
    let mut rig = Rig::made(&node, parts);
    rig.backup.job().start().unwrap();
    for outcome in [None, failed(Side::Target)] {
        let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
        rig.answer(|kind| matches!(kind, OpKind::Copy(_)), outcome);
    }
    let _ = rig.rest();
    rig.answer(|kind| kind == OpKind::Flush, flush);
    assert!(rig.done().is_err());
    let bits = node
        .bitmaps()
        .snapshot("daily", SnapshotOf::Bitmap)
        .unwrap();
    (0..8)
        .filter(|&index| bits.any_dirty_in(cluster(index)))
        .collect()
}

#[test]
fn what_was_copied_and_not_flushed_is_missing_after_a_failure() {
    let left = |flush| left_after_failure(BackupSync::Bitmap, flush);
    assert_eq!(left(None), [1, 2, 3], "it is flushed");
    assert_eq!(left(failed(Side::Target)), [0, 1, 2, 3]);
    let all: Vec<u64> = (0..8).collect();
    let left = |flush| left_after_failure(BackupSync::Full, flush);
    assert_eq!(left(None), all[1..]);
    assert_eq!(left(failed(Side::Target)), all);
}

#[test]
fn a_disk_that_is_resized_while_a_backup_is_made_is_as_long_as_that_takes_it_for() {
    // Long enough that it takes some time to make one.
    let lens = [1 << 40, (1 << 40) + CLUSTER];
    let node = Node::new(lens[0]);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                turn += 1;
                let guard = node.quiesce().try_guard().unwrap();
                if let Ok(resize) = node.resize(&guard, lens[turn % 2], Grown::Dirty) {
                    resize.commit();
                }
                drop(guard);
            }
        });
        let mut made = 0;
        while made < 2_000 {
            let limits = Limits::new(lens[0]);
            let backup = Backup::new(&node, limits, limits, BackupOptions::default());
            if let Ok(backup) = backup {
                made += 1;
                let len = node.len();
                if len != lens[0] {
                    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("{len} bytes after {made} were made");
                }
                drop(backup);
            }
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_job_that_is_paused_before_it_is_driven_has_its_instant() {
    let mut rig = Rig::started(4 * CLUSTER, |_| {});
    rig.backup.job().pause().unwrap();
    rig.until();
    assert_eq!(rig.backup.job().query().status, Status::Paused);
    let mut guest = rig.write(cluster(1));
    assert!(!rig.has_out(|kind| matches!(kind, OpKind::Copy(_))));
    // What it waits for is saved all the same, and nothing else.
    let _ = rig.answer_all(|_| true);
    assert!(matches!(guest.try_begin(), Some(Ok(_))));
    let copied = |rig: &Rig| {
        let copies = rig.asked.iter();
        copies
            .filter(|kind| matches!(kind, OpKind::Copy(_)))
            .count()
    };
    assert_eq!(copied(&rig), 1);
    rig.backup.job().resume().unwrap();
    rig.done().unwrap();
}

#[test]
fn a_job_that_is_paused_while_a_guest_write_hangs_stands_still_and_has_its_instant_later() {
    let mut parts = parts(4 * CLUSTER);
    parts.options.hold_max = SECOND;
    let node = Node::new(4 * CLUSTER);
    let hanging = node.begin_write_owned(cluster(0)).go().unwrap();
    let mut rig = Rig::made(&node, parts);
    rig.backup.job().start().unwrap();
    assert_eq!(rig.until(), Some(SECOND));
    rig.backup.job().pause().unwrap();
    assert_eq!(rig.until(), Some(SECOND), "it is held no longer for that");
    assert_eq!(rig.backup.job().query().status, Status::Paused);
    hanging.finish(());
    rig.until();
    let _guest = rig.write(cluster(1));
    rig.backup.job().resume().unwrap();
    rig.done().unwrap();
}

#[test]
fn guests_that_wait_long_for_the_target_have_less_in_front_of_them() {
    let len = 256 << 20;
    let mut rig = Rig::started(len, |parts| parts.options.cbw_timeout = None);
    let is_status = |kind: OpKind| matches!(kind, OpKind::Status(_));
    let is_copy = |kind: OpKind| matches!(kind, OpKind::Copy(_));
    // A target that does 40 MiB in a second, one copy after the other.
    let time = |bytes: u64| SECOND * u32::try_from(bytes / CLUSTER).unwrap() / 640;
    let mut waits = Vec::new();
    for index in 0..16 {
        let _ = rig.answer_all(is_status);
        let guest = rig.write(cluster(4095 - index));
        let _ = rig.answer_all(is_status);
        // The copy for the guest was handed out last, and is done last.
        let since = rig.now;
        while rig.has_out(|kind| kind == OpKind::Copy(cluster(4095 - index))) {
            let bytes = rig.out[0].kind().range().unwrap().len();
            rig.now += time(bytes);
            rig.answer(is_copy, None);
        }
        drop(guest);
        waits.push(rig.now - since);
    }
    assert!(waits[0] > SECOND / 3, "{waits:?}");
    assert!(
        waits[12..].iter().all(|&wait| wait < SECOND / 50),
        "{waits:?}"
    );
    rig.done().unwrap();
}
