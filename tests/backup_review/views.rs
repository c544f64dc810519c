//! What readers of the frozen view see, and what they keep guests from.

use super::*;
use std::io;
use std::panic::catch_unwind;

use blockjob::io::{AlignedBuf, BlockDevice, BufResult, BufferPool, FrozenDisk, HeapPool, ReadAt};
use blockjob::{FrozenRead, FrozenView, OwnedTicket};
use futures_util::FutureExt;

/// Two clusters, of which each is one number.
type Disk = [u64; 2];

const T0: Disk = [10, 20];

/// A guest that writes once.
enum Guest {
    Before,
    Waits(PendingWrite<Arc<Lane>>),
    Writes(OwnedTicket),
    Done,
}

/// A reader that reads once.
struct Reader {
    range: ByteRange,
    read: Option<FrozenRead>,
    seen: Disk,
    /// Pieces read of those there are.
    pieces: usize,
    is_done: bool,
}

/// A world of two clusters whose actors take their steps in an order that is given.
struct Steps {
    rig: Rig,
    view: FrozenView,
    source: Disk,
    target: Disk,
    /// What the copies that are out have read.
    copied: Vec<(ByteRange, Disk)>,
    guest: Guest,
    writes: ByteRange,
    readers: Vec<Reader>,
    /// Whether the guest's time may come to an end.
    has_clock: bool,
    /// Reads that have succeeded.
    succeeded: usize,
}

/// What takes a step.
#[derive(Clone, Copy, Debug)]
enum Actor {
    Guest,
    /// The copy that is at this place among those that are out.
    Copy(usize),
    Reader(usize),
    Clock,
}

/// What is gone through.
#[derive(Clone)]
struct Plan {
    writes: ByteRange,
    reads: Vec<ByteRange>,
    chunk_max: u64,
    has_clock: bool,
}

fn indices(range: ByteRange) -> std::ops::Range<usize> {
    (range.start() / CLUSTER) as usize..range.end().div_ceil(CLUSTER) as usize
}

impl Steps {
    fn new(plan: &Plan) -> Self {
        let mut rig = Rig::started(2 * CLUSTER, |parts| {
            parts.options.sync = BackupSync::None;
            parts.options.view = true;
            parts.options.chunk_max = plan.chunk_max;
        });
        rig.until();
        let view = rig.backup.view().unwrap();
        let reader = |&range: &ByteRange| Reader {
            range,
            read: None,
            seen: [0; 2],
            pieces: 0,
            is_done: false,
        };
        Self {
            rig,
            view,
            source: T0,
            target: [0; 2],
            copied: Vec::new(),
            guest: Guest::Before,
            writes: plan.writes,
            readers: plan.reads.iter().map(reader).collect(),
            has_clock: plan.has_clock,
            succeeded: 0,
        }
    }

    /// Everybody who has something left to do.
    fn actors(&self) -> Vec<Actor> {
        let mut actors = Vec::new();
        if !matches!(self.guest, Guest::Done) {
            actors.push(Actor::Guest);
        }
        actors.extend((0..self.rig.out.len()).map(Actor::Copy));
        let readers = (0..self.readers.len()).filter(|&index| !self.readers[index].is_done);
        actors.extend(readers.map(Actor::Reader));
        if self.has_clock && matches!(self.guest, Guest::Waits(_)) {
            actors.push(Actor::Clock);
        }
        actors
    }

    /// Whether it could take its next step.
    fn step(&mut self, actor: Actor) -> bool {
        let could = match actor {
            Actor::Guest => self.step_guest(),
            Actor::Copy(index) => {
                self.step_copy(index);
                true
            }
            Actor::Reader(index) => {
                self.step_reader(index);
                true
            }
            Actor::Clock => {
                self.has_clock = false;
                self.rig.now += SECOND;
                true
            }
        };
        // What the source is asked is answered at once.
        let _ = self
            .rig
            .answer_all(|kind| matches!(kind, OpKind::Status(_)));
        could
    }

    fn step_guest(&mut self) -> bool {
        match std::mem::replace(&mut self.guest, Guest::Done) {
            Guest::Before => {
                self.guest = match self.rig.node.begin_write_owned(self.writes) {
                    Begin::Go(ticket) => Guest::Writes(ticket),
                    Begin::Wait(pending) => Guest::Waits(pending),
                    Begin::Refused(_) => unreachable!("nobody refuses it"),
                };
            }
            Guest::Waits(mut pending) => match pending.try_begin() {
                None => {
                    self.guest = Guest::Waits(pending);
                    return false;
                }
                Some(ticket) => self.guest = Guest::Writes(ticket.expect("nobody refuses it")),
            },
            Guest::Writes(ticket) => {
                let touched = indices(self.writes);
                for reader in &self.readers {
                    let pieces = reader.read.iter().flat_map(|read| read.pieces());
                    let mut pieces = pieces.filter(|(_, side)| *side == Side::Source);
                    let is_over = self.view.accessible().is_err();
                    let is_read = pieces.any(|&(piece, _)| piece.overlaps(self.writes));
                    assert!(is_over || !is_read, "written while it is read");
                }
                self.source[touched].fill(99);
                ticket.finish(());
            }
            Guest::Done => unreachable!("it has nothing left to do"),
        }
        true
    }

    /// Reads the source, or writes the target.
    fn step_copy(&mut self, index: usize) {
        let kind = self.rig.out[index].kind();
        let OpKind::Copy(range) = kind else {
            self.rig.answer(|other| other == kind, None);
            return;
        };
        let read = self.copied.iter().position(|(copied, _)| *copied == range);
        let Some(read) = read else {
            self.copied.push((range, self.source));
            return;
        };
        let (_, data) = self.copied.remove(read);
        self.target[indices(range)].copy_from_slice(&data[indices(range)]);
        self.rig.answer(|other| other == kind, None);
    }

    /// Begins, reads a piece, or ends.
    fn step_reader(&mut self, index: usize) {
        let reader = &mut self.readers[index];
        let Some(read) = &reader.read else {
            match self.view.begin_read(reader.range) {
                Ok(read) => reader.read = Some(read),
                Err(error) => {
                    assert_eq!(error, ViewError::Over);
                    reader.is_done = true;
                }
            }
            return;
        };
        if let Some(&(piece, side)) = read.pieces().get(reader.pieces) {
            let from = match side {
                Side::Target => self.target,
                Side::Source | Side::Buffer => self.source,
            };
            reader.seen[indices(piece)].copy_from_slice(&from[indices(piece)]);
            reader.pieces += 1;
            return;
        }
        reader.is_done = true;
        let read = reader.read.take().expect("as seen");
        if read.finish().is_ok() {
            let read = indices(reader.range);
            assert_eq!(reader.seen[read.clone()], T0[read], "that is new data");
            self.succeeded += 1;
        }
    }
}

/// Goes through all orders in which the actors of `plan` can take their steps; how many there are, and how many
/// reads have succeeded in all of them.
fn go_through(plan: &Plan) -> (usize, usize) {
    let (mut orders, mut succeeded) = (0, 0);
    // The actor of each step, by its place among those who had something to do; and how many those were.
    let mut order: Vec<(usize, usize)> = Vec::new();
    loop {
        let mut steps = Steps::new(plan);
        let mut depth = 0;
        let is_whole = loop {
            let actors = steps.actors();
            if actors.is_empty() {
                break true;
            }
            if depth == order.len() {
                order.push((0, actors.len()));
            }
            if !steps.step(actors[order[depth].0]) {
                // A guest that waits: somebody else is to go on, or it hangs.
                let is_alone = actors.len() == 1;
                assert!(!is_alone, "a guest waits for nobody: {order:?}");
                break false;
            }
            depth += 1;
        };
        if is_whole {
            orders += 1;
            succeeded += steps.succeeded;
        }
        // The next order: another actor at the last step that has one.
        order.truncate(depth + usize::from(!is_whole));
        while order
            .pop_if(|(place, count)| *place + 1 == *count)
            .is_some()
        {}
        let Some((place, _)) = order.last_mut() else {
            return (orders, succeeded);
        };
        *place += 1;
    }
}

fn plans() -> Vec<(Plan, bool)> {
    let both = ByteRange::from(0..2 * CLUSTER);
    let plan = |writes, reads: &[ByteRange], chunk_max, has_clock| Plan {
        writes,
        reads: reads.to_vec(),
        chunk_max,
        has_clock,
    };
    vec![
        (plan(cluster(0), &[both, cluster(0)], CLUSTER, false), true),
        (plan(both, &[both, cluster(1)], 2 * CLUSTER, false), true),
        (plan(both, &[both], CLUSTER, false), true),
        (plan(cluster(0), &[both], CLUSTER, true), false),
    ]
}

#[test]
fn in_every_order_of_steps_readers_see_the_instant() {
    for (index, (plan, must_succeed)) in plans().into_iter().enumerate() {
        let (orders, succeeded) = go_through(&plan);
        println!("{index}: {orders} orders, {succeeded} reads");
        assert!(orders > 300, "{orders} of {index}");
        match must_succeed {
            true => assert_eq!(succeeded, orders * plan.reads.len(), "without an error"),
            false => assert!(0 < succeeded && succeeded < orders, "some come too late"),
        }
    }
}

#[cfg(debug_assertions)]
#[test]
fn in_some_order_of_steps_a_broken_view_shows() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};
    for sabotage in [Sabotage::ReleaseWhileRead, Sabotage::TrustBrokenView] {
        break_on_this_thread(Some(sabotage));
        let go_through_all = || {
            for (plan, _) in plans() {
                let _ = go_through(&plan);
            }
        };
        let result = catch_unwind(go_through_all);
        break_on_this_thread(None);
        assert!(result.is_err(), "{sabotage:?} is not noticed");
    }
}

#[test]
fn a_reader_of_another_cluster_delays_nobody() {
    let mut rig = fleecing(4, |_| {});
    let view = rig.backup.view().unwrap();
    let _read = view.begin_read(cluster(2)).unwrap();
    let mut guest = rig.write(cluster(1));
    let _ = rig.answer_all(|_| true);
    assert!(matches!(guest.try_begin(), Some(Ok(_))));
}

#[test]
fn a_read_that_is_dropped_half_way_lets_guests_go_on() {
    let mut rig = fleecing(4, |_| {});
    let view = rig.backup.view().unwrap();
    let read = view.begin_read((0..2 * CLUSTER).into()).unwrap();
    let mut guest = rig.write(cluster(1));
    let _ = rig.answer_all(|_| true);
    let flag = Arc::new(Mutex::new(false));
    let woken = Arc::clone(&flag);
    let act = Box::new(move || *woken.lock() = true);
    let waker = Waker::from(Arc::new(Once(Mutex::new(Some(act)))));
    assert!(guest.poll_begin(&waker).is_pending(), "it is being read");
    drop(read);
    assert!(*flag.lock(), "nobody tells the guest");
    assert!(matches!(guest.try_begin(), Some(Ok(_))));
}

/// A backup for readers, of so many clusters.
fn fleecing(clusters: u64, change: impl FnOnce(&mut Parts)) -> Rig {
    let mut rig = Rig::started(clusters * CLUSTER, |parts| {
        parts.options.sync = BackupSync::None;
        parts.options.view = true;
        parts.target.discard = all_discards();
        change(parts);
    });
    rig.until();
    rig
}

/// A device that is one byte all over, and says that of itself.
struct Plain {
    len: u64,
    byte: u8,
    extent: Extent,
}

impl BlockDevice for Plain {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        Limits::new(self.len)
    }
}

impl ReadAt for Plain {
    async fn read_at(&self, _: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        buf.as_mut().fill(self.byte);
        (Ok(()), buf)
    }

    async fn block_status(&self, _: ByteRange) -> io::Result<Extent> {
        Ok(self.extent)
    }
}

/// The frozen disk over a source that reads as zeroes of a lower layer, and a target of data.
fn frozen(rig: &Rig) -> FrozenDisk<Plain, Plain> {
    let len = rig.node.len();
    let source = Plain {
        len,
        byte: 0,
        extent: Extent {
            len: u64::MAX,
            content: Content::Zero,
            in_top: false,
        },
    };
    let target = Plain {
        len,
        byte: 7,
        extent: Extent {
            in_top: false,
            ..Extent::data(u64::MAX)
        },
    };
    FrozenDisk::new(rig.backup.view().unwrap(), source, target)
}

fn status(disk: &FrozenDisk<Plain, Plain>, range: ByteRange) -> io::Result<Extent> {
    disk.block_status(range).now_or_never().expect("at once")
}

fn read(disk: &FrozenDisk<Plain, Plain>, range: ByteRange) -> io::Result<Vec<u8>> {
    let buf = HeapPool::new(1).take(range.len() as usize).unwrap();
    let (result, buf) = disk
        .read_at(range.start(), buf)
        .now_or_never()
        .expect("at once");
    result.map(|()| buf.as_ref().to_vec())
}

/// Has a guest write to these clusters, so that they are saved.
fn overwrite(rig: &mut Rig, range: ByteRange) {
    let mut guest = rig.write(range);
    let _ = rig.answer_all(|_| true);
    guest.try_begin().expect("it is saved").unwrap().finish(());
}

#[test]
fn the_status_of_a_view_is_that_of_where_it_is_read_and_stops_at_edges() {
    let mut rig = fleecing(8, |_| {});
    overwrite(&mut rig, (2 * CLUSTER..4 * CLUSTER).into());
    let disk = frozen(&rig);
    let (mut at, mut runs) = (0, Vec::new());
    while at < 8 * CLUSTER {
        let range = ByteRange::from(at..8 * CLUSTER);
        let extent = status(&disk, range).unwrap();
        runs.push((at / CLUSTER, extent.content, extent.in_top));
        let run = range.split_at(at + extent.len).0;
        let is_zero = read(&disk, run).unwrap().iter().all(|&byte| byte == 0);
        assert_eq!(extent.content == Content::Zero, is_zero, "at {run}");
        at = run.end();
    }
    let (zero, data) = (Content::Zero, Content::Data);
    let expected = [(0, zero, false), (2, data, true), (4, zero, false)];
    assert_eq!(runs, expected, "what is saved counts as in the top layer");
    assert_eq!(at, 8 * CLUSTER, "together they cover the disk");
    // Also from within a cluster.
    let within = status(&disk, (CLUSTER + 512..3 * CLUSTER).into()).unwrap();
    assert_eq!((within.content, within.len), (zero, CLUSTER - 512));
}

#[test]
fn a_view_tells_nothing_of_what_cannot_be_read() {
    let mut rig = fleecing(8, |_| {});
    let view = rig.backup.view().unwrap();
    let disk = frozen(&rig);
    view.give_up(cluster(6)).unwrap();
    rig.until();
    for range in [cluster(6), (5 * CLUSTER..7 * CLUSTER).into()] {
        let refused = status(&disk, range).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{range}");
        let refused = read(&disk, range).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{range}");
    }
    let past = (7 * CLUSTER..9 * CLUSTER).into();
    assert!(status(&disk, past).is_err() && read(&disk, past).is_err());
    assert!(status(&disk, cluster(5)).is_ok() && read(&disk, cluster(5)).is_ok());
    rig.backup.job().cancel(Cancel::Force).unwrap();
    assert!(rig.done().is_err());
    assert!(status(&disk, cluster(5)).is_err() && read(&disk, cluster(5)).is_err());
}

#[test]
fn only_what_the_bitmap_has_can_be_read_and_is_protected() {
    let node = Node::new(8 * CLUSTER);
    let guard = node.quiesce().try_guard().unwrap();
    let mut options = BitmapOptions::default();
    options.granularity = blockjob::Granularity::from_bytes(512);
    node.bitmaps().add(&guard, "daily", options).unwrap();
    drop(guard);
    // One byte: its cluster is what can be read.
    let written = node.begin_write((3 * CLUSTER + 5..3 * CLUSTER + 6).into());
    written.go().unwrap().finish(());
    let mut parts = parts(8 * CLUSTER);
    parts.options.sync = BackupSync::Bitmap;
    parts.options.bitmap = Some("daily".to_owned());
    parts.options.bitmap_mode = Some(BitmapMode::Never);
    parts.options.view = true;
    let mut rig = Rig::made(&node, parts);
    rig.backup.job().start().unwrap();
    rig.until();
    let disk = frozen(&rig);
    assert!(read(&disk, cluster(3)).is_ok());
    for range in [cluster(2), (3 * CLUSTER..4 * CLUSTER + 1).into()] {
        let refused = read(&disk, range).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{range}");
    }
    let out = rig.out.len();
    let elsewhere = node.begin_write(cluster(4)).go().expect("it is not held");
    elsewhere.finish(());
    rig.until();
    assert_eq!(rig.out.len(), out, "and nothing is copied for it");
    assert!(node.begin_write(cluster(3)).go().is_none());
}

#[test]
fn what_a_reader_has_given_up_is_not_copied_for_guests() {
    let mut rig = fleecing(8, |_| {});
    let view = rig.backup.view().unwrap();
    // Less than a cluster: nothing.
    let part = (CLUSTER + 1..3 * CLUSTER - 1).into();
    assert!(view.give_up(part).unwrap().is_empty());
    assert!(view.begin_read(part).is_ok());
    let part = (CLUSTER + 1..4 * CLUSTER + 1).into();
    let whole = ByteRange::from(2 * CLUSTER..4 * CLUSTER);
    assert_eq!(view.give_up(part), Ok(whole), "rounded inward");
    assert!(view.begin_read(cluster(1)).is_ok() && view.begin_read(cluster(4)).is_ok());
    let _ = rig.answer_all(|_| true);
    let asked = rig.asked.len();
    let guest = rig.node.begin_write(whole).go();
    guest.expect("nobody wants it any more").finish(());
    rig.until();
    assert_eq!(rig.asked.len(), asked);
}

#[test]
fn what_is_given_up_while_it_is_copied_is_discarded_after_that() {
    let mut rig = fleecing(4, |_| {});
    let view = rig.backup.view().unwrap();
    let mut guest = rig.write(cluster(1));
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    let copy = OpKind::Copy(cluster(1));
    assert!(rig.has_out(|kind| kind == copy));
    assert!(rig.out.iter().all(Op::is_urgent), "the guest waits for it");
    view.give_up(cluster(1)).unwrap();
    rig.until();
    let give_up = OpKind::GiveUp(cluster(1));
    assert!(!rig.has_out(|kind| kind == give_up), "it would come before");
    rig.answer(|kind| kind == copy, None);
    rig.until();
    assert!(rig.has_out(|kind| kind == give_up));
    assert!(matches!(guest.try_begin(), Some(Ok(_))));
}

#[cfg(debug_assertions)]
#[test]
fn a_hold_that_ends_late_is_noticed_when_it_lets_go_of_the_next() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};
    break_on_this_thread(Some(Sabotage::LetGoLate));
    let result = catch_unwind(what_is_left_of_an_old_hold_does_not_end_the_next);
    break_on_this_thread(None);
    assert!(result.is_err(), "not noticed");
}
