//! Guest writes against whoever closes the gate, watches for writes or starts to record them, in every
//! interleaving and with every stale load the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_gate`
//!
//! What is judged is what jobs rely on:
//!
//! ```text
//! under the guard   no write is half done, each is there or has not begun, and what is there is
//!                   recorded
//! waiting           nobody sleeps on when what he waits for has come: such a model deadlocks
//! track             a write is on the disk when recording starts, or is recorded
//! read-only         a write is recorded before the bitmap is read-only, or refused
//! bitmaps           a write is in one of two bitmaps that take turns, and in both that overlap
//! resize            a write is recorded also where the disk has just grown to
//! backup            a write goes on once what was there is saved, not before, and it does go on
//! mirror            no usual write is under way once the target is actively synced; and whether one that waits
//!                   is an active write or not, it goes on when writes are usual ones again
//! ```
//!
//! Each rule of the gate is also broken on purpose, in a scenario that passes when it is kept.
#![cfg(loom)]

use std::future::poll_fn;
use std::sync::atomic::AtomicBool;
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use blockjob::{
    Backup, BackupOptions, BackupSync, Begin, BitmapOptions, BitmapStorage, ByteRange, Change,
    ClaimFor, CopyMode, GateRule, Granularity, Grown, JobBitmap, Limits, Mirror, MirrorOptions,
    Node, OpKind, Outcome, QuiesceGuard, SnapshotOf, Step, Transaction, Way,
};
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// Nothing is written yet.
const OLD: u64 = 0;
/// A write is on its way to the disk.
const TORN: u64 = 1;
/// A write has settled.
const NEW: u64 = 2;

/// The finest granularity that a node records in.
const GRANULE: u64 = 512;

/// A disk of a few granules behind the gate of a node.
struct Disk {
    node: Node,
    /// One per granule.
    data: Vec<AtomicU64>,
}

impl Disk {
    fn new(granules: u64, broken: Option<GateRule>) -> Arc<Self> {
        let len = granules * GRANULE;
        Arc::new(Self {
            node: match broken {
                Some(rule) => Node::breaking(len, rule),
                None => Node::new(len),
            },
            data: (0..granules).map(|_| AtomicU64::new(OLD)).collect(),
        })
    }

    /// Records from the start on.
    fn track(&self) -> JobBitmap {
        let guard = self.node.quiesce().try_guard().expect("nobody writes yet");
        self.track_under(&guard)
    }

    fn track_under(&self, guard: &QuiesceGuard) -> JobBitmap {
        let granularity = Granularity::from_bytes(GRANULE).unwrap();
        self.node.track(guard, granularity).unwrap()
    }

    /// What a guest does: waits to be let in, writes and says so.
    fn write<L: Way>(&self, begin: Begin<L>) {
        let ticket = block_on(begin.into_future()).unwrap();
        let granule = &self.data[(ticket.range().start() / GRANULE) as usize];
        granule.store(TORN, Relaxed);
        granule.store(NEW, Relaxed);
        ticket.finish(());
    }

    /// As [`write`](Self::write) of the first granule, and whether it was let in.
    fn try_write(&self, path: Path) -> bool {
        let queue = self.node.queue();
        let begin = match path {
            Path::Node => self.node.begin_write(at(0)),
            Path::Queue => queue.begin_write(at(0)),
        };
        let Ok(ticket) = block_on(begin.into_future()) else {
            return false;
        };
        self.data[0].store(TORN, Relaxed);
        self.data[0].store(NEW, Relaxed);
        ticket.finish(());
        true
    }

    /// Adds a bitmap that records from the start on.
    fn add(&self, name: &str, is_persistent: bool) {
        let guard = self.node.quiesce().try_guard().expect("nobody writes yet");
        let bitmaps = self.node.bitmaps();
        bitmaps.add(&guard, name, options(is_persistent)).unwrap();
    }

    /// Whether anything is in a bitmap.
    fn dirty(&self, name: &str) -> bool {
        self.node.bitmaps().query(name).unwrap().dirty_bytes > 0
    }

    fn read(&self) -> Vec<u64> {
        self.data
            .iter()
            .map(|granule| granule.load(Relaxed))
            .collect()
    }

    /// What the owner of a guard relies on.
    fn check_quiet(&self, bitmap: Option<&JobBitmap>) {
        let data = self.read();
        assert!(!data.contains(&TORN), "a write was in flight");
        if let Some(bitmap) = bitmap {
            assert_recorded(&data, bitmap);
        }
        assert_eq!(data, self.read(), "a write was in flight");
    }
}

/// What a bitmap of a disk of few granules is made with.
fn options(is_persistent: bool) -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(GRANULE);
    options.persistent = is_persistent;
    options
}

/// That exactly the granules written are recorded.
fn assert_recorded(data: &[u64], bitmap: &JobBitmap) {
    let is_dirty = |granule| bitmap.lock().any_dirty_in(at(granule));
    let recorded: Vec<_> = (0..data.len() as u64).map(is_dirty).collect();
    let written: Vec<_> = data.iter().map(|data| *data == NEW).collect();
    assert_eq!(recorded, written, "what is written is what is recorded");
}

/// One granule.
fn at(granule: u64) -> ByteRange {
    (granule * GRANULE..(granule + 1) * GRANULE).into()
}

/// Every schedule with at most three switches away from a thread that could have gone on, or two where
/// three threads meet, unless `LOOM_MAX_PREEMPTIONS` says otherwise. The broken gates below are found out
/// with two.
fn explore(threads: usize, scenario: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    let preemptions = if threads > 2 { 2 } else { 3 };
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(scenario);
}

/// How a guest comes to the gate.
#[derive(Clone, Copy)]
enum Path {
    /// By the node's own lane, which all share.
    Node,
    /// By a queue of its own.
    Queue,
}

/// Starts guests that write one granule each.
fn start_guests(disk: &Arc<Disk>, guests: &[Path]) -> Vec<thread::JoinHandle<()>> {
    let start = |(granule, path): (usize, &Path)| {
        let range = at(granule as u64);
        let disk = disk.clone();
        match path {
            Path::Node => thread::spawn(move || disk.write(disk.node.begin_write(range))),
            Path::Queue => {
                let queue = disk.node.queue();
                thread::spawn(move || disk.write(queue.begin_write(range)))
            }
        }
    };
    guests.iter().enumerate().map(start).collect()
}

fn join(threads: Vec<thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().unwrap();
    }
}

/// The gate is closed while guests write. Somebody who sleeps for ever is a deadlock of the model: the
/// closer waits for the guests inside, guests that come late wait for the guard to go.
fn quiesce(guests: &'static [Path], broken: Option<GateRule>) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(guests.len() as u64, broken);
        let guests = start_guests(&disk, guests);
        let guard = block_on(disk.node.quiesce());
        disk.check_quiet(None);
        drop(guard);
        join(guests);
        assert!(disk.read().iter().all(|data| *data == NEW));
    });
}

/// As [`quiesce`], and the guest's writes are recorded.
fn quiesce_recording(guests: &'static [Path], broken: Option<GateRule>) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, broken);
        let bitmap = disk.track();
        let guests = start_guests(&disk, guests);
        let guard = block_on(disk.node.quiesce());
        disk.check_quiet(Some(&bitmap));
        drop(guard);
        join(guests);
        disk.check_quiet(Some(&bitmap));
    });
}

/// Recording starts while a guest writes. The guest's write is seen by who reads the disk after that,
/// or recorded, or both.
fn track(guests: &'static [Path], broken: Option<GateRule>) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, broken);
        let guests = start_guests(&disk, guests);
        let guard = block_on(disk.node.quiesce());
        let bitmap = disk.track_under(&guard);
        drop(guard);
        let copied = disk.read();
        join(guests);
        let is_recorded = !bitmap.lock().is_clean();
        assert!(copied == [NEW] || is_recorded, "lost a write");
    });
}

/// A bitmap becomes read-only while a guest writes: the write is in it by then, or refused.
fn mark_readonly(guests: &'static [Path], broken: Option<GateRule>) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, broken);
        let bitmaps = disk.node.bitmaps();
        bitmaps.set_storage(Some(BitmapStorage::default()));
        disk.add("a", true);
        let guests: Vec<_> = guests
            .iter()
            .map(|path| {
                let (disk, path) = (disk.clone(), *path);
                thread::spawn(move || disk.try_write(path))
            })
            .collect();
        let guard = block_on(disk.node.quiesce());
        bitmaps.mark_readonly(&guard, "a").unwrap();
        let (data, dirty) = (disk.read(), disk.dirty("a"));
        assert_eq!(data == [NEW], dirty, "what is written is what is recorded");
        drop(guard);
        let written = guests.into_iter().map(|guest| guest.join().unwrap());
        let written: Vec<_> = written.collect();
        assert_eq!(written.contains(&true), dirty, "a write was let in");
        assert_eq!(
            (disk.read(), disk.dirty("a")),
            (data, dirty),
            "a write was let in"
        );
    });
}

/// One bitmap is put off and another one put on, under the guard and in either order, while a guest writes.
fn take_turns(guests: &'static [Path], is_first_added: bool) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, None);
        disk.add("old", false);
        let guests = start_guests(&disk, guests);
        let mut list = Transaction::new();
        if is_first_added {
            list.add(&disk.node, "new", options(false));
        }
        list.disable(&disk.node, "old");
        if !is_first_added {
            list.add(&disk.node, "new", options(false));
        }
        let prepared = block_on(list.prepare()).unwrap();
        let (data, dirty) = (disk.read(), disk.dirty("old"));
        assert!(!data.contains(&TORN), "a write was in flight");
        assert_eq!(data == [NEW], dirty, "what is written is what is recorded");
        prepared.commit();
        join(guests);
        assert_eq!(disk.dirty("old"), dirty, "it does not record");
        assert_ne!(disk.dirty("new"), dirty, "a write is in one of them");
    });
}

/// A bitmap is claimed, and given back, while a guest writes and nobody holds it.
fn claim(guests: &'static [Path]) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, None);
        disk.add("a", false);
        let guests = start_guests(&disk, guests);
        let claim = disk.node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        let claimed = !claim.snapshot(SnapshotOf::Bitmap).unwrap().is_clean();
        // What is in the claimed bits is on the disk.
        assert!(
            !claimed || disk.read() == [NEW],
            "recorded before it settled"
        );
        drop(claim);
        join(guests);
        assert!(disk.dirty("a"), "lost a write");
    });
}

/// The disk grows while a guest writes to where it was, and then writes to where it is.
fn resize(guests: &'static [Path]) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, None);
        disk.add("a", false);
        let guests = start_guests(&disk, guests);
        let guard = block_on(disk.node.quiesce());
        let resize = disk
            .node
            .resize(&guard, 200 * GRANULE, Grown::Clean)
            .unwrap();
        resize.commit();
        drop(guard);
        let queue = disk.node.queue();
        let late = thread::spawn(move || {
            let ticket = queue.begin_write(at(199)).go();
            ticket.expect("nobody holds the node").finish(());
        });
        join(guests);
        late.join().unwrap();
        let bits = disk
            .node
            .bitmaps()
            .snapshot("a", SnapshotOf::Bitmap)
            .unwrap();
        assert!(bits.iter().eq([0, 199 * GRANULE]), "lost a write");
    });
}

/// A job sleeps until something is dirty while a guest writes.
fn watch(guests: &'static [Path], broken: Option<GateRule>) {
    explore(1 + guests.len(), move || {
        let disk = Disk::new(1, broken);
        let bitmap = disk.track();
        let guests = start_guests(&disk, guests);
        block_on(poll_fn(|cx| {
            if bitmap.poll_dirty(cx.waker()).is_pending() {
                return Poll::Pending;
            }
            // It may be a false alarm, if a mark met a drain.
            match bitmap.lock().is_clean() {
                true => bitmap.poll_dirty(cx.waker()),
                false => Poll::Ready(()),
            }
        }));
        join(guests);
        assert_recorded(&disk.read(), &bitmap);
    });
}

/// A write that was asked for under the guard waits while the guard goes.
fn wait() {
    explore(2, move || {
        let disk = Disk::new(1, None);
        let guard = disk.node.quiesce().try_guard().expect("nobody writes yet");
        let begin = disk.node.begin_write_owned(at(0));
        assert!(matches!(begin, Begin::Wait(_)));
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || disk.write(begin))
        };
        disk.check_quiet(None);
        drop(guard);
        guest.join().unwrap();
    });
}

/// A backup of the disk whose instant is over. With sync none it copies only what a guest waits for.
fn backup(disk: &Disk, sync: BackupSync) -> Backup {
    let mut options = BackupOptions::default();
    options.sync = sync;
    options.cbw_timeout = None;
    // So that it does not end, and with that wake everybody.
    options.job.auto_finalize = false;
    let limits = Limits::new(disk.node.len());
    let mut backup = Backup::new(&disk.node, limits, limits, options).unwrap();
    let mut list = Transaction::new();
    list.start(backup.job());
    list.prepare()
        .try_prepared()
        .expect("nobody writes yet")
        .unwrap()
        .commit();
    if sync == BackupSync::None {
        let step = backup.poll(Duration::ZERO, Waker::noop());
        assert!(matches!(step, Step::Wait { .. }), "{step:?}");
    }
    backup
}

/// Runs it until the only cluster is saved: what is read then must be old.
async fn save(disk: &Disk, backup: &mut Backup) {
    let mut is_saved = false;
    poll_fn(|cx| {
        loop {
            match backup.poll(Duration::ZERO, cx.waker()) {
                Step::Op(op) => {
                    if matches!(op.kind(), OpKind::Copy(_)) {
                        assert_eq!(disk.read(), [OLD], "let in before it is saved");
                        is_saved = true;
                    }
                    backup.op_done(Duration::ZERO, op, Outcome::Done);
                }
                Step::Wait { .. } if !is_saved => return Poll::Pending,
                _ => return Poll::Ready(()),
            }
        }
    })
    .await;
}

/// A guest writes to what is to be saved first. Whoever sleeps on, the guest or the job, is a deadlock.
fn hold_back(path: Path, sync: BackupSync) {
    explore(2, move || {
        let disk = Disk::new(1, None);
        let mut backup = backup(&disk, sync);
        let guests = start_guests(&disk, &[path][..]);
        block_on(save(&disk, &mut backup));
        join(guests);
        assert_eq!(disk.read(), [NEW]);
    });
}

/// As [`hold_back`], but the guest asks once only: it is let in or woken. As with [`ask_once`], no deadlock.
fn hold_back_once(broken: Option<GateRule>) {
    explore(2, move || {
        let disk = Disk::new(1, broken);
        let mut backup = backup(&disk, BackupSync::Full);
        let alarm = std::sync::Arc::new(Alarm::default());
        let waker = Waker::from(alarm.clone());
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || match disk.node.begin_write_owned(at(0)) {
                Begin::Wait(mut pending) => match pending.poll_begin(&waker) {
                    Poll::Ready(ticket) => {
                        ticket.unwrap().cancel();
                        (true, None)
                    }
                    Poll::Pending => (false, Some(pending)),
                },
                Begin::Go(ticket) => {
                    ticket.cancel();
                    (true, None)
                }
                Begin::Refused(_) => unreachable!("no bitmap is read-only"),
            })
        };
        block_on(save(&disk, &mut backup));
        let (is_in, pending) = guest.join().unwrap();
        let is_woken = alarm.0.load(Relaxed);
        drop((pending, backup));
        assert!(is_in || is_woken, "nobody woke the write");
    });
}

/// A mirror of the disk that is ready.
fn mirror(disk: &Disk, copy_mode: CopyMode) -> Mirror {
    let mut options = MirrorOptions::default();
    options.sync = blockjob::MirrorSync::None;
    options.granularity = Granularity::from_bytes(GRANULE);
    options.copy_mode = copy_mode;
    let limits = Limits::new(disk.node.len());
    let mut mirror = Mirror::new(&disk.node, limits, limits, options).unwrap();
    mirror.job().start().unwrap();
    while let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
        mirror.op_done(Duration::ZERO, op, Outcome::Done);
    }
    mirror
}

fn change_to(mirror: &mut Mirror, copy_mode: CopyMode) {
    let change = Change {
        copy_mode: Some(copy_mode),
        ..Change::default()
    };
    mirror.job().change(change).unwrap();
    let _ = mirror.poll(Duration::ZERO, Waker::noop());
}

/// Writes are active ones from some moment on, while a guest writes.
fn begin_active(path: Path) {
    explore(2, move || {
        let disk = Disk::new(1, None);
        let mut mirror = mirror(&disk, CopyMode::Background);
        let queue = disk.node.queue();
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || {
                let begin = match path {
                    Path::Node => disk.node.begin_write_owned(at(0)),
                    Path::Queue => queue.begin_write_owned(at(0)),
                };
                let ticket = block_on(begin.into_future()).unwrap();
                if ticket.is_active() {
                    ticket.cancel();
                    return;
                }
                disk.data[0].store(TORN, Relaxed);
                disk.data[0].store(NEW, Relaxed);
                ticket.finish(());
            })
        };
        change_to(&mut mirror, CopyMode::WriteBlocking);
        if mirror.is_actively_synced() {
            let before = disk.read();
            assert!(before != [TORN], "a usual write is under way");
            guest.join().unwrap();
            assert_eq!(disk.read(), before, "a usual write was under way");
            return;
        }
        guest.join().unwrap();
    });
}

/// Writes are usual ones from some moment on, while a guest waits for an active one that does not end.
fn stop_active(drops: bool) {
    explore(2, move || {
        let disk = Disk::new(1, None);
        let mut mirror = mirror(&disk, CopyMode::WriteBlocking);
        let first = disk.node.begin_write_owned(at(0)).go().unwrap();
        assert!(first.is_active());
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || {
                disk.write(disk.node.begin_write(at(0)));
                // What was made dirty beside it stays so, whatever becomes of the first.
                if let Some(half) = first.source_written(true) {
                    half.finish(Ok(()));
                }
            })
        };
        if drops {
            drop(mirror);
            guest.join().unwrap();
        } else {
            change_to(&mut mirror, CopyMode::Background);
            guest.join().unwrap();
            let left = mirror.left_dirty().unwrap();
            assert!(left.any_dirty_in(at(0)));
        }
        assert_eq!(disk.read(), [NEW]);
    });
}

/// A guest was held back, and waits: it is not inside.
fn held_is_not_inside(broken: Option<GateRule>) {
    explore(2, move || {
        let disk = Disk::new(1, broken);
        let backup = backup(&disk, BackupSync::None);
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || disk.node.begin_write_owned(at(0)))
        };
        let begin = guest.join().unwrap();
        let is_held = matches!(begin, Begin::Wait(_));
        let is_quiet = disk.node.quiesce().try_guard().is_ok();
        drop((begin, backup));
        assert!(is_held, "let in before it is saved");
        assert!(is_quiet, "it is inside");
    });
}

/// The node is quiesced while a guest waits for something that nobody saves.
fn quiesce_beside_a_held_write() {
    explore(2, move || {
        let disk = Disk::new(1, None);
        let backup = backup(&disk, BackupSync::None);
        let guests = start_guests(&disk, &[Path::Queue]);
        let guard = block_on(disk.node.quiesce());
        assert_eq!(disk.read(), [OLD], "let in before it is saved");
        drop(guard);
        // With the job goes what it holds back.
        drop(backup);
        join(guests);
        assert_eq!(disk.read(), [NEW]);
    });
}

/// Whether it was woken. Looked at when all threads are joined, so loom need not see it.
#[derive(Default)]
struct Alarm(AtomicBool);

impl Wake for Alarm {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

/// As [`wait`], but the write asks once only: it is let in or woken. Loom cannot take down a model in
/// which the last to fall asleep has destructors that lock, so this one does not deadlock.
fn ask_once(broken: Option<GateRule>) {
    explore(2, move || {
        let disk = Disk::new(1, broken);
        let guard = disk.node.quiesce().try_guard().expect("nobody writes yet");
        let Begin::Wait(mut pending) = disk.node.begin_write_owned(at(0)) else {
            unreachable!("the gate is closed");
        };
        let alarm = std::sync::Arc::new(Alarm::default());
        let waker = Waker::from(alarm.clone());
        let guest = thread::spawn(move || {
            let is_in = pending.poll_begin(&waker).is_ready();
            (is_in, pending)
        });
        drop(guard);
        let (is_in, pending) = guest.join().unwrap();
        drop(pending);
        assert!(is_in || alarm.0.load(Relaxed), "nobody woke the write");
    });
}

#[test]
fn under_the_guard_no_write_of_the_node_is_in_flight() {
    quiesce(&[Path::Node], None);
}

#[test]
fn under_the_guard_no_write_of_a_queue_is_in_flight() {
    quiesce(&[Path::Queue], None);
}

#[test]
fn under_the_guard_no_write_of_two_is_in_flight() {
    quiesce(&[Path::Node, Path::Node], None);
}

#[test]
fn under_the_guard_no_write_of_two_lanes_is_in_flight() {
    quiesce(&[Path::Node, Path::Queue], None);
}

#[test]
fn what_is_written_under_the_guard_is_recorded() {
    quiesce_recording(&[Path::Node], None);
}

#[test]
fn what_a_queue_has_written_under_the_guard_is_recorded() {
    quiesce_recording(&[Path::Queue], None);
}

#[test]
fn a_write_is_there_when_recording_starts_or_is_recorded() {
    track(&[Path::Node], None);
}

#[test]
fn a_write_of_a_queue_is_there_when_recording_starts_or_is_recorded() {
    track(&[Path::Queue], None);
}

#[test]
fn a_write_is_recorded_before_a_bitmap_is_read_only_or_refused() {
    mark_readonly(&[Path::Node], None);
    mark_readonly(&[Path::Queue], None);
}

#[test]
fn a_write_is_in_one_of_two_bitmaps_that_take_turns() {
    take_turns(&[Path::Queue], true);
    take_turns(&[Path::Queue], false);
    take_turns(&[Path::Node], false);
}

#[test]
fn a_write_is_in_a_bitmap_that_is_claimed_and_given_back() {
    claim(&[Path::Queue]);
}

#[test]
fn a_write_is_recorded_wherever_the_disk_has_grown_to() {
    resize(&[Path::Queue]);
}

#[test]
fn a_write_that_waits_is_woken_when_the_guard_goes() {
    wait();
    ask_once(None);
}

#[test]
fn a_write_that_is_held_back_goes_on_when_its_cluster_is_saved() {
    for path in [Path::Node, Path::Queue] {
        hold_back(path, BackupSync::None);
    }
    hold_back(Path::Queue, BackupSync::Full);
    hold_back_once(None);
}

#[test]
fn a_write_that_is_held_back_does_not_keep_the_node_from_being_quiesced() {
    quiesce_beside_a_held_write();
    held_is_not_inside(None);
}

#[test]
fn no_usual_write_is_under_way_when_the_target_is_actively_synced() {
    for path in [Path::Node, Path::Queue] {
        begin_active(path);
    }
}

#[test]
fn a_write_that_waits_goes_on_when_writes_are_usual_ones_again() {
    for drops in [false, true] {
        stop_active(drops);
    }
}

#[test]
fn who_watches_is_woken_by_a_write_of_the_node() {
    watch(&[Path::Node], None);
}

#[test]
fn who_watches_is_woken_by_a_write_of_a_queue() {
    watch(&[Path::Queue], None);
}

#[test]
fn who_watches_is_not_kept_from_waking_by_another_who_looks() {
    explore(3, || {
        let disk = Disk::new(1, None);
        let (sleeper, other) = (disk.track(), disk.track());
        let looking = thread::spawn(move || other.lock().is_clean());
        let guests = start_guests(&disk, &[Path::Queue]);
        block_on(poll_fn(|cx| sleeper.poll_dirty(cx.waker())));
        looking.join().unwrap();
        join(guests);
        assert_recorded(&disk.read(), &sleeper);
    });
}

#[test]
fn two_who_close_the_gate_hold_it_together() {
    explore(3, || {
        let disk = Disk::new(1, None);
        let guests = start_guests(&disk, &[Path::Queue]);
        let other = {
            let disk = disk.clone();
            thread::spawn(move || {
                let guard = block_on(disk.node.quiesce());
                disk.check_quiet(None);
                drop(guard);
            })
        };
        let guard = block_on(disk.node.quiesce());
        disk.check_quiet(None);
        drop(guard);
        other.join().unwrap();
        join(guests);
        assert_eq!(disk.read(), [NEW]);
    });
}

#[test]
fn a_closer_that_gives_up_lets_waiting_writes_in() {
    explore(2, || {
        let disk = Disk::new(1, None);
        let guests = start_guests(&disk, &[Path::Queue]);
        if let Ok(guard) = disk.node.quiesce().try_guard() {
            disk.check_quiet(None);
            drop(guard);
        }
        join(guests);
        assert_eq!(disk.read(), [NEW]);
    });
}

#[test]
fn a_waiting_write_dropped_while_the_gate_opens_is_nowhere() {
    explore(3, || {
        let disk = Disk::new(2, None);
        let guard = disk.node.quiesce().try_guard().expect("nobody writes yet");
        let Begin::Wait(mut dropped) = disk.node.begin_write_owned(at(0)) else {
            unreachable!("the gate is closed");
        };
        let kept = disk.node.begin_write_owned(at(1));
        let dropper = thread::spawn(move || {
            block_on(poll_fn(|cx| {
                // Whether it is let in or not, the ticket goes, and the one who waits with it.
                if let Poll::Ready(Ok(ticket)) = dropped.poll_begin(cx.waker()) {
                    ticket.cancel();
                }
                Poll::Ready(())
            }));
            drop(dropped);
        });
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || disk.write(kept))
        };
        drop(guard);
        dropper.join().unwrap();
        guest.join().unwrap();
        assert_eq!(disk.read(), [OLD, NEW]);
        assert!(disk.node.quiesce().try_guard().is_ok(), "nobody is inside");
    });
}

/// A write of a queue that had to wait begins on whatever thread polls it, while the queue is in use on
/// another. Whoever closes the gate then must find the one that is still inside.
fn late_write_of_a_queue(broken: Option<GateRule>) {
    explore(2, move || {
        let disk = Disk::new(2, broken);
        let queue = disk.node.queue();
        let guard = disk.node.quiesce().try_guard().expect("nobody writes yet");
        let late = queue.begin_write_owned(at(0));
        assert!(matches!(late, Begin::Wait(_)));
        drop(guard);
        let guest = {
            let disk = disk.clone();
            thread::spawn(move || disk.write(late))
        };
        let ticket = queue.begin_write(at(1)).go().expect("the gate is open");
        guest.join().unwrap();
        assert!(
            disk.node.quiesce().try_guard().is_err(),
            "a write was in flight"
        );
        ticket.finish(());
        assert!(disk.node.quiesce().try_guard().is_ok(), "nobody is inside");
    });
}

/// Somebody is turned away while the counters are looked at, and somebody else is inside.
fn turned_away(broken: Option<GateRule>) {
    explore(2, move || {
        let disk = Disk::new(1, broken);
        let inside = disk.node.begin_write(at(0)).go().expect("the gate is open");
        let quiesce = disk.node.quiesce();
        let newcomer = {
            let disk = disk.clone();
            thread::spawn(move || assert!(disk.node.begin_write(at(0)).go().is_none()))
        };
        let quiesce = quiesce.try_guard().expect_err("a write was in flight");
        newcomer.join().unwrap();
        inside.finish(());
        assert!(quiesce.try_guard().is_ok(), "nobody is inside");
    });
}

#[test]
fn who_is_turned_away_hides_nobody_who_is_inside() {
    turned_away(None);
}

#[test]
fn a_late_write_of_a_queue_begins_on_another_thread() {
    late_write_of_a_queue(None);
}

/// Every rule broken, in their order.
mod sabotage {
    use super::*;

    #[test]
    #[should_panic(expected = "what is written is what is recorded")]
    fn recorded_after_leaving() {
        quiesce_recording(&[Path::Node], Some(GateRule::RecordThenLeave));
    }

    #[test]
    #[should_panic(expected = "a write was in flight")]
    fn looked_at_the_flag_before_counting() {
        quiesce(&[Path::Queue], Some(GateRule::CountThenLook));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn looked_at_the_flag_before_counting_when_recording_starts() {
        track(&[Path::Node], Some(GateRule::CountThenLook));
    }

    #[test]
    #[should_panic(expected = "a write was let in")]
    fn looked_at_the_flag_before_counting_when_writes_are_refused() {
        mark_readonly(&[Path::Queue], Some(GateRule::CountThenLook));
    }

    #[test]
    #[should_panic(expected = "a write was in flight")]
    fn no_barrier_after_the_plain_store() {
        quiesce(&[Path::Queue], Some(GateRule::BarrierAfterCount));
    }

    #[test]
    #[should_panic(expected = "a write was in flight")]
    fn no_barrier_before_the_counters_are_summed() {
        quiesce(&[Path::Queue], Some(GateRule::BarrierBeforeSum));
    }

    #[test]
    #[should_panic(expected = "a write was in flight")]
    fn late_writes_counted_with_the_others() {
        late_write_of_a_queue(Some(GateRule::LateApart));
    }

    #[test]
    #[should_panic(expected = "a write was in flight")]
    fn begun_looked_at_before_finished() {
        turned_away(Some(GateRule::FinishedFirst));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn no_look_after_leaving() {
        quiesce(&[Path::Queue], Some(GateRule::LeaveThenLook));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn no_barrier_after_leaving() {
        quiesce(&[Path::Queue], Some(GateRule::BarrierAfterLeave));
    }

    #[test]
    #[should_panic(expected = "nobody woke the write")]
    fn waker_put_down_when_the_gate_is_open_again() {
        ask_once(Some(GateRule::WaitWhileClosed));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn armed_without_looking_again() {
        watch(&[Path::Queue], Some(GateRule::ArmThenLook));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn no_barrier_after_arming() {
        watch(&[Path::Queue], Some(GateRule::BarrierAfterArm));
    }

    #[test]
    #[should_panic(expected = "it is inside")]
    fn held_writes_stay_counted() {
        held_is_not_inside(Some(GateRule::LeaveWhenHeld));
    }

    #[test]
    #[should_panic(expected = "nobody woke the write")]
    fn woken_before_the_bits_are_down() {
        hold_back_once(Some(GateRule::ReleaseThenWake));
    }
}
