//! Backups, case by case, driven by hand: rules of the arguments, the instant, the end of the bitmap, and
//! orders of events in which a guest would wait for ever, or an image would get what is later than the instant.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use blockjob::{
    ActionError, Backup, BackupError, BackupOptions, BackupSync, Begin, BitmapError, BitmapMode,
    BitmapOptions, ByteRange, Cancel, ClaimFor, Content, Event, Extent, Granularity, Job, JobError,
    JobGroup, Lane, Limits, Node, NotSaved, OnCbwError, OnError, Op, OpKind, Outcome, PendingWrite,
    Prepared, Side, SnapshotOf, Status, Step, Transaction, TransactionError, VerbError,
    WriteRefused,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const MS: Duration = Duration::from_millis(1);
const CLUSTER: u64 = 64 * KIB;
/// Four clusters, the last of them short.
const LEN: u64 = 3 * CLUSTER + 1000;
const NAME: &str = "daily";
const TURNS_MAX: usize = 100_000;

#[derive(Default)]
struct Count(AtomicUsize);

impl Count {
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Out {
    op: Op,
    /// For a copy whose read is over: what was read.
    data: Option<Vec<u8>>,
}

#[derive(Debug)]
enum Rest {
    Wait(Option<Duration>),
    Done(Result<(), JobError>),
}

impl Rest {
    fn wait(self) -> Option<Duration> {
        match self {
            Rest::Wait(until) => until,
            Rest::Done(result) => panic!("waits, but it is over: {result:?}"),
        }
    }

    fn done(self) -> Result<(), JobError> {
        match self {
            Rest::Done(result) => result,
            Rest::Wait(until) => panic!("is over, but it waits until {until:?}"),
        }
    }
}

type Fault = Box<dyn FnMut(usize, OpKind) -> Option<(Side, ErrorKind)>>;
type Pending = PendingWrite<Arc<Lane>>;

/// A backup over two vectors of bytes, in virtual time: the test decides when each operation is answered.
struct Hand {
    node: Node,
    job: Job,
    backup: Option<Backup>,
    source: Vec<u8>,
    target: Vec<u8>,
    /// By 4 KiB of the source: whether its topmost layer has them.
    in_top: Vec<bool>,
    now: Duration,
    woken: Arc<Count>,
    out: Vec<Out>,
    fault: Option<Fault>,
    answered: usize,
    /// Every copy that has come to the target.
    copied: Vec<ByteRange>,
    events: Vec<Event>,
}

fn options(sync: BackupSync) -> BackupOptions {
    let mut options = BackupOptions::default();
    options.job.id = Some("b0".to_owned());
    options.sync = sync;
    options
}

/// With the bitmap, in that mode.
fn with_bitmap(sync: BackupSync, mode: BitmapMode) -> BackupOptions {
    let mut options = options(sync);
    options.bitmap = Some(NAME.to_owned());
    options.bitmap_mode = Some(mode);
    options
}

/// One operation at a time, of one cluster.
fn single(mut options: BackupOptions) -> BackupOptions {
    options.workers = 1;
    options.chunk_max = CLUSTER;
    options.buf_size = CLUSTER;
    options
}

fn add_bitmap(node: &Node, granularity: u64) {
    let guard = node.quiesce().try_guard().expect("no write is in flight");
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(granularity);
    node.bitmaps()
        .add(&guard, NAME, options)
        .expect("a new name");
}

fn cluster(index: u64) -> ByteRange {
    (index * CLUSTER..((index + 1) * CLUSTER).min(LEN)).into()
}

fn bytes(range: ByteRange) -> std::ops::Range<usize> {
    range.start() as usize..range.end() as usize
}

/// Which clusters are dirty in the bitmap.
fn dirty(node: &Node) -> Vec<u64> {
    let bits = node
        .bitmaps()
        .snapshot(NAME, SnapshotOf::Bitmap)
        .expect("it is there");
    let clusters = 0..node.len().div_ceil(CLUSTER);
    clusters
        .filter(|&index| bits.any_dirty_in(cluster(index)))
        .collect()
}

fn is_busy(node: &Node) -> bool {
    node.bitmaps().query(NAME).expect("it is there").is_busy()
}

impl Hand {
    fn new(options: BackupOptions) -> Self {
        Self::on(&Node::new(LEN), options)
    }

    fn on(node: &Node, options: BackupOptions) -> Self {
        let limits = Limits::new(node.len());
        Self::with_limits(node, limits, limits, options)
    }

    /// The source holds what differs from block to block, the target 0xaa.
    fn with_limits(node: &Node, source: Limits, target: Limits, options: BackupOptions) -> Self {
        let backup = Backup::new(node, source, target, options).expect("good options");
        Self {
            node: node.clone(),
            job: backup.job().clone(),
            backup: Some(backup),
            source: (0..node.len())
                .map(|at| 1 + (at / 512 % 99) as u8)
                .collect(),
            target: vec![0xaa; node.len() as usize],
            in_top: vec![true; node.len().div_ceil(4 * KIB) as usize],
            now: Duration::ZERO,
            woken: Arc::new(Count::default()),
            out: Vec::new(),
            fault: None,
            answered: 0,
            copied: Vec::new(),
            events: Vec::new(),
        }
    }

    fn started(options: BackupOptions) -> Self {
        let hand = Self::new(options);
        hand.job.start().expect("it is new");
        hand
    }

    /// With a bitmap in which the clusters given are dirty, and whose instant is over.
    fn begun(options: BackupOptions, written: &[u64]) -> Self {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut hand = Self::on(&node, options);
        for &index in written {
            hand.write(cluster(index), 0x11);
        }
        hand.job.start().expect("it is new");
        let _ = hand.take_all();
        hand
    }

    fn backup(&mut self) -> &mut Backup {
        self.backup.as_mut().expect("it was not dropped")
    }

    /// A whole guest write, if it need not wait.
    fn try_write(&mut self, range: impl Into<ByteRange>, byte: u8) -> bool {
        let range = range.into();
        let node = self.node.clone();
        let Begin::Go(ticket) = node.begin_write(range) else {
            return false;
        };
        self.lands(range, byte);
        ticket.finish(true)
    }

    fn write(&mut self, range: impl Into<ByteRange>, byte: u8) {
        assert!(self.try_write(range, byte), "the guest has to wait");
    }

    fn lands(&mut self, range: ByteRange, byte: u8) {
        let end = range.end().min(self.node.len());
        let range = ByteRange::from(range.start().min(end)..end);
        self.source[bytes(range)].fill(byte);
        for index in range.start() / (4 * KIB)..range.end().div_ceil(4 * KIB) {
            self.in_top[index as usize] = true;
        }
    }

    /// A guest write that has to wait.
    fn wait_with(&self, range: impl Into<ByteRange>) -> Pending {
        match self.node.begin_write_owned(range.into()) {
            Begin::Wait(pending) => pending,
            begin => panic!("it has to wait, but {begin:?}"),
        }
    }

    fn poll(&mut self) -> Option<Rest> {
        let (now, waker) = (self.now, Waker::from(Arc::clone(&self.woken)));
        let step = self.backup().poll(now, &waker);
        self.backup().check_invariants();
        match step {
            Step::Op(op) => {
                self.out.push(Out { op, data: None });
                None
            }
            Step::Wait { until } => {
                assert!(
                    until.is_none_or(|until| until > now),
                    "a time that has come"
                );
                Some(Rest::Wait(until))
            }
            Step::Done(result) => Some(Rest::Done(result)),
            step => panic!("a backup never switches: {step:?}"),
        }
    }

    /// Takes everything that is handed out, without an answer.
    fn take_all(&mut self) -> Rest {
        for _ in 0..TURNS_MAX {
            if let Some(rest) = self.poll() {
                return rest;
            }
        }
        panic!("it never stops handing out: {:?}", self.job.query());
    }

    /// Answers whatever is handed out, and lets the time come that it waits for.
    fn drive(&mut self) -> Rest {
        self.drive_until(Duration::MAX)
    }

    fn drive_now(&mut self) -> Rest {
        self.drive_until(self.now)
    }

    fn drive_until(&mut self, end: Duration) -> Rest {
        for _ in 0..TURNS_MAX {
            let rest = self.take_all();
            if !self.out.is_empty() {
                while !self.out.is_empty() {
                    self.answer(0);
                }
                continue;
            }
            match rest {
                Rest::Wait(Some(until)) if until <= end => self.now = until,
                rest => return rest,
            }
        }
        panic!("it never comes to rest: {:?}", self.job.query());
    }

    fn kinds(&self) -> Vec<OpKind> {
        self.out.iter().map(|out| out.op.kind()).collect()
    }

    /// The operation that is out and touches that byte.
    fn find(&self, at: u64) -> usize {
        let is_there = |kind: &OpKind| kind.range().is_some_and(|range| range.contains(at));
        let found = self.kinds().iter().position(is_there);
        found.unwrap_or_else(|| panic!("nothing at {at}: {:?}", self.kinds()))
    }

    fn is_out(&self, at: u64) -> bool {
        let is_there = |kind: &OpKind| kind.range().is_some_and(|range| range.contains(at));
        self.kinds().iter().any(is_there)
    }

    /// Answers all looks, so that copies are out, for what is handed out up to here.
    fn look(&mut self) {
        let is_look = |kind: &OpKind| matches!(kind, OpKind::Status(_));
        while let Some(index) = self.kinds().iter().position(is_look) {
            self.answer(index);
            let _ = self.take_all();
        }
    }

    fn read(&mut self, index: usize) {
        let range = self.out[index].op.kind().range().expect("a copy");
        self.out[index].data = Some(self.source[bytes(range)].to_vec());
    }

    fn answer(&mut self, index: usize) {
        let kind = self.out[index].op.kind();
        let count = self.answered;
        self.answered += 1;
        let fault = self.fault.as_mut().and_then(|fault| fault(count, kind));
        if let Some((side, kind)) = fault {
            return self.fail(index, side, kind);
        }
        let Out { op, data } = self.out.remove(index);
        let outcome = match kind {
            OpKind::Copy(range) => {
                let data = data.unwrap_or_else(|| self.source[bytes(range)].to_vec());
                self.target[bytes(range)].copy_from_slice(&data);
                self.copied.push(range);
                Outcome::Done
            }
            OpKind::Status(range) => Outcome::Status(self.status(range)),
            OpKind::Zero(..) | OpKind::Discard(_) => unreachable!("these disks hold data only"),
            OpKind::CopyCompressed(_)
            | OpKind::CopyOffloaded(_)
            | OpKind::Save(_)
            | OpKind::CopySaved(_)
            | OpKind::CopySavedCompressed(_)
            | OpKind::CopyDetecting(..)
            | OpKind::Compare(..)
            | OpKind::DiscardSaved(_)
            | OpKind::SettleSaved
            | OpKind::GiveUp(_)
            | OpKind::DiscardSource(_) => unreachable!("none of these was asked for"),
            OpKind::Flush | OpKind::Settle | OpKind::CancelInFlight => Outcome::Done,
        };
        self.report(op, outcome);
    }

    fn fail(&mut self, index: usize, side: Side, kind: ErrorKind) {
        let op = self.out.remove(index).op;
        let error = io::Error::from(kind);
        self.report(op, Outcome::Failed { side, error });
    }

    fn report(&mut self, op: Op, outcome: Outcome) {
        let now = self.now;
        self.backup().op_done(now, op, outcome);
        self.backup().check_invariants();
    }

    fn status(&self, range: ByteRange) -> Extent {
        let first = range.start() / (4 * KIB);
        let in_top = self.in_top[first as usize];
        let mut end = first + 1;
        while end * 4 * KIB < range.end() && self.in_top[end as usize] == in_top {
            end += 1;
        }
        Extent {
            len: (end * 4 * KIB).min(range.end()) - range.start(),
            content: Content::Data,
            in_top,
        }
    }

    fn events(&mut self) -> &[Event] {
        while let Some(event) = self.job.next_event() {
            self.events.push(event);
        }
        &self.events
    }

    fn errors(&mut self) -> usize {
        let is_error = |event: &&Event| matches!(event, Event::Error(_));
        self.events().iter().filter(is_error).count()
    }
}

fn is_failed(result: &Result<(), JobError>, at: Side) -> bool {
    matches!(result, Err(JobError::Io { side, .. }) if *side == at)
}

fn is_cancelled(result: &Result<(), JobError>) -> bool {
    matches!(result, Err(JobError::Cancelled { .. }))
}

fn not_saved(refused: Poll<Result<blockjob::OwnedTicket, WriteRefused>>) -> NotSaved {
    match refused {
        Poll::Ready(Err(WriteRefused::NotSaved(why))) => why,
        other => panic!("it is refused, but {other:?}"),
    }
}

// Arguments

#[test]
fn every_combination_of_sync_bitmap_and_mode_is_right_or_has_its_own_error() {
    use BackupSync::{Bitmap, Full, Incremental, None as Nothing, Top};
    use BitmapMode::{Always, Never, OnSuccess};
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    for sync in [Full, Top, Nothing, Bitmap, Incremental] {
        for has_bitmap in [false, true] {
            for mode in [None, Some(Never), Some(OnSuccess), Some(Always)] {
                let expected = match (sync, has_bitmap, mode) {
                    (Bitmap | Incremental, false, _) => Err(BackupError::BitmapNeeded),
                    (_, false, Some(_)) => Err(BackupError::ModeWithoutBitmap),
                    (Full | Top | Nothing, false, None) => Ok(()),
                    (Nothing, true, _) => Err(BackupError::NoneWithBitmap),
                    (Incremental, true, None | Some(OnSuccess)) => Ok(()),
                    (Incremental, true, Some(mode)) => Err(BackupError::NotIncremental(mode)),
                    (Full | Top | Bitmap, true, None) => Err(BackupError::ModeNeeded),
                    (Full | Top, true, Some(Never)) => Err(BackupError::NoEffect),
                    (Full | Top | Bitmap, true, Some(_)) => Ok(()),
                };
                let mut options = options(sync);
                options.bitmap = has_bitmap.then(|| NAME.to_owned());
                options.bitmap_mode = mode;
                let made = Backup::new(&node, limits, limits, options).map(drop);
                assert_eq!(made, expected, "{sync:?}, {has_bitmap}, {mode:?}");
            }
        }
    }
}

#[test]
fn the_cluster_is_the_largest_that_anybody_wants() {
    let node = Node::new(16 * MIB);
    let size = |cluster: Option<u32>, align: u32, wish: u64| {
        let mut limits = Limits::new(node.len());
        (limits.cluster, limits.request_align) = (cluster, align);
        let mut options = options(BackupSync::Full);
        options.min_cluster_size = wish;
        options.chunk_max = 4 * MIB;
        let source = Limits::new(node.len());
        Backup::new(&node, source, limits, options).map(|backup| backup.cluster_size())
    };
    for cluster in [None, Some(512), Some(64 << 10)] {
        assert_eq!(size(cluster, 1, 0), Ok(64 * KIB), "{cluster:?}");
        assert_eq!(size(cluster, 1, 64 * KIB), Ok(64 * KIB));
        assert_eq!(size(cluster, 1, 2 * MIB), Ok(2 * MIB));
    }
    for cluster in [None, Some(512), Some(4 << 10)] {
        assert_eq!(size(cluster, 1, 4 * KIB), Ok(4 * KIB), "{cluster:?}");
    }
    assert_eq!(size(Some(64 << 10), 1, 4 * KIB), Ok(64 * KIB));
    assert_eq!(size(Some(1 << 20), 1, 0), Ok(MIB));
    assert_eq!(size(Some(1 << 20), 1, 64 * KIB), Ok(MIB));
    assert_eq!(
        size(None, 128 << 10, 0),
        Ok(128 * KIB),
        "nothing shorter can be copied"
    );
    for wish in [1, 3, 2 * KIB, 65 * KIB, 4 << 30, u64::MAX] {
        assert_eq!(size(None, 1, wish), Err(BackupError::ClusterSize(wish)));
    }
    let too_short = BackupError::ChunkTooShort {
        chunk_max: 4 * MIB,
        cluster: 8 * MIB,
    };
    assert_eq!(size(None, 1, 8 * MIB), Err(too_short));
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_done() {
    let node = Node::new(LEN);
    let good = Limits::new(LEN);
    let try_with = |change: &dyn Fn(&mut Limits, &mut Limits, &mut BackupOptions)| {
        let (mut source, mut target, mut options) = (good, good, options(BackupSync::Full));
        change(&mut source, &mut target, &mut options);
        Backup::new(&node, source, target, options).map(drop)
    };
    let lengths = |source_len, target| BackupError::Lengths {
        node: LEN,
        source_len,
        target,
    };
    assert_eq!(
        try_with(&|source, _, _| source.len += 1),
        Err(lengths(LEN + 1, LEN))
    );
    assert_eq!(
        try_with(&|_, target, _| target.len -= 1),
        Err(lengths(LEN, LEN - 1))
    );
    assert!(matches!(
        try_with(&|source, _, _| source.len = u64::MAX),
        Err(BackupError::Limits {
            side: Side::Source,
            ..
        })
    ));
    assert_eq!(
        try_with(&|source, target, _| (source.identity, target.identity) = (Some(7), Some(7))),
        Err(BackupError::SameStorage)
    );
    for workers in [0, 1025, usize::MAX] {
        assert_eq!(
            try_with(&|_, _, o| o.workers = workers),
            Err(BackupError::Workers(workers))
        );
    }
    assert_eq!(
        try_with(&|_, _, o| o.buf_size = 0),
        Err(BackupError::Zero("buf_size"))
    );
    assert!(matches!(
        try_with(&|_, _, o| o.chunk_max = CLUSTER - 1),
        Err(BackupError::ChunkTooShort { .. })
    ));
    let other = Hand::on(&node, options(BackupSync::Full));
    assert_eq!(try_with(&|_, _, _| ()), Err(BackupError::NodeBusy));
    drop(other);
    assert_eq!(try_with(&|_, _, _| ()), Ok(()));
}

#[test]
fn a_bitmap_that_cannot_be_had_fails_the_job_when_it_starts() {
    let mut hand = Hand::started(with_bitmap(BackupSync::Bitmap, BitmapMode::Always));
    let result = hand.drive().done();
    let Err(JobError::Bitmap(error)) = result else {
        panic!("there is none, but {result:?}");
    };
    assert!(
        matches!(&*error, BitmapError::NotFound { name } if name == NAME),
        "{error:?}"
    );
    hand.write(0..LEN, 1);

    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let claim = node.bitmaps().claim(NAME, ClaimFor::Reading).unwrap();
    let mut hand = Hand::on(
        &node,
        with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess),
    );
    hand.job.start().unwrap();
    assert!(matches!(hand.drive().done(), Err(JobError::Bitmap(_))));
    drop(claim);
    assert!(!is_busy(&node));
}

// The instant

/// Two disks with bitmaps, and a backup of each.
fn two(mode: BitmapMode) -> [Hand; 2] {
    [0, 1].map(|index| {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.id = Some(format!("b{index}"));
        let mut hand = Hand::on(&node, options);
        hand.write(cluster(1), 0x11);
        hand
    })
}

fn prepare(list: Transaction) -> Result<Prepared, TransactionError> {
    list.prepare()
        .try_prepared()
        .expect("no write is in flight")
}

fn start_both(hands: &[Hand; 2]) -> Prepared {
    let mut list = Transaction::new();
    list.start(&hands[0].job).start(&hands[1].job);
    prepare(list).expect("they are new")
}

#[test]
fn a_transaction_gives_several_disks_one_instant() {
    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    for hand in &mut hands {
        assert!(is_busy(&hand.node));
        assert_eq!(
            hand.take_all().wait(),
            None,
            "nothing is done before it is decided"
        );
        assert!(!hand.try_write(cluster(0), 0x22), "guests wait until it is");
    }
    prepared.commit();
    let t0 = [hands[0].source.clone(), hands[1].source.clone()];
    for hand in &mut hands {
        assert_eq!(hand.job.query().status, Status::Running);
        // Before any machine has come by: what is wanted is held back, the rest is not.
        assert!(!hand.try_write(cluster(1), 0x22));
        hand.write(cluster(0), 0x22);
    }
    for (hand, t0) in hands.iter_mut().zip(t0) {
        hand.drive().done().unwrap();
        assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
        assert_eq!(hand.copied, [cluster(1)]);
        assert_eq!(dirty(&hand.node), [0], "written since");
    }
}

#[test]
fn a_transaction_can_make_the_bitmap_that_its_backup_goes_by() {
    let node = Node::new(LEN);
    let mut hand = Hand::on(&node, with_bitmap(BackupSync::Full, BitmapMode::OnSuccess));
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(CLUSTER);
    let mut list = Transaction::new();
    list.add(&node, NAME, options).start(&hand.job);
    prepare(list).expect("a new name").commit();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(cluster(2));
    hand.drive().done().unwrap();
    let ticket = pending.try_begin().expect("it is saved").unwrap();
    hand.lands(cluster(2), 0x22);
    ticket.finish(());
    assert_eq!(hand.target, t0);
    assert_eq!(dirty(&node), [2], "the chain begins here");
}

#[test]
fn a_transaction_can_disable_the_bitmap_that_its_backup_goes_by() {
    let mut hand = two(BitmapMode::Always).into_iter().next().unwrap();
    let mut list = Transaction::new();
    list.disable(&hand.node, NAME).start(&hand.job);
    prepare(list).unwrap().commit();
    hand.write(cluster(3), 0x22);
    hand.drive().done().unwrap();
    assert_eq!(hand.copied, [cluster(1)]);
    assert_eq!(dirty(&hand.node), [0; 0], "it does not record");
    assert!(!hand.node.bitmaps().query(NAME).unwrap().is_recording);
}

#[test]
fn a_transaction_that_is_dropped_or_fails_leaves_no_trace() {
    for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
        let mut hands = two(mode);
        drop(start_both(&hands));
        let mut list = Transaction::new();
        list.start(&hands[0].job).start(&hands[1].job).abort();
        assert_eq!(prepare(list).unwrap_err().why, ActionError::Aborted);
        for hand in &mut hands {
            assert_eq!(hand.job.query().status, Status::Created);
            assert!(!is_busy(&hand.node));
            assert_eq!(dirty(&hand.node), [1]);
            hand.write(cluster(1), 0x33);
            assert_eq!(hand.take_all().wait(), None);
        }
        // And they can be started still.
        start_both(&hands).commit();
        for hand in &mut hands {
            hand.drive().done().unwrap();
            assert_eq!(hand.copied, [cluster(1)]);
            assert_eq!(hand.target[bytes(cluster(1))], [0x33; CLUSTER as usize]);
        }
    }
}

#[test]
fn a_bitmap_that_one_lacks_undoes_the_start_of_all() {
    let mut hands = two(BitmapMode::Always);
    hands[1].node.bitmaps().remove(NAME).unwrap();
    let mut list = Transaction::new();
    list.start(&hands[0].job).start(&hands[1].job);
    let error = prepare(list).unwrap_err();
    assert_eq!(error.index, 1);
    assert!(
        matches!(error.why, ActionError::Bitmap(BitmapError::NotFound { .. })),
        "{error}"
    );
    assert!(!is_busy(&hands[0].node));
    hands[0].write(cluster(1), 0x22);
}

#[test]
fn a_list_starts_a_job_once() {
    let [hand, _] = two(BitmapMode::Always);
    let mut list = Transaction::new();
    list.start(&hand.job).start(&hand.job);
    assert_eq!(prepare(list).unwrap_err().why, ActionError::StartedBefore);
    assert!(!is_busy(&hand.node));
    hand.job.start().unwrap();
    let mut list = Transaction::new();
    list.start(&hand.job);
    let why = prepare(list).unwrap_err().why;
    assert!(
        matches!(why, ActionError::Job(VerbError::NotAllowed { .. })),
        "{why}"
    );
}

#[test]
fn a_job_cancelled_while_a_transaction_has_it_prepared_has_never_begun() {
    for (is_polled, is_committed) in [(false, false), (false, true), (true, false), (true, true)] {
        for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
            let mut hands = two(mode);
            let prepared = start_both(&hands);
            hands[0].job.cancel(Cancel::Force).unwrap();
            if is_polled {
                assert!(is_cancelled(&hands[0].take_all().done()));
            }
            match is_committed {
                true => prepared.commit(),
                false => drop(prepared),
            }
            assert!(!is_busy(&hands[0].node), "{is_polled}, {is_committed}");
            assert_eq!(dirty(&hands[0].node), [1]);
            hands[0].write(cluster(1), 0x22);
            assert!(is_cancelled(&hands[0].take_all().done()));
            assert_eq!(
                is_busy(&hands[1].node),
                is_committed,
                "the other is not concerned"
            );
        }
    }
}

#[test]
fn a_machine_dropped_while_a_transaction_has_it_prepared_has_never_begun() {
    for is_committed in [false, true] {
        for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
            let node = Node::new(LEN);
            add_bitmap(&node, CLUSTER);
            let sync = match mode {
                BitmapMode::Never => BackupSync::Bitmap,
                BitmapMode::OnSuccess | BitmapMode::Always => BackupSync::Full,
            };
            let mut hand = Hand::on(&node, with_bitmap(sync, mode));
            hand.write(cluster(1), 0x11);
            let mut list = Transaction::new();
            list.start(&hand.job);
            let prepared = prepare(list).unwrap();
            hand.backup = None;
            match is_committed {
                true => prepared.commit(),
                false => drop(prepared),
            }
            assert!(!is_busy(&node));
            assert_eq!(dirty(&node), [1], "{mode:?}, {is_committed}");
            hand.write(cluster(1), 0x22);
            Hand::on(&node, options(BackupSync::Full));
        }
    }
}

#[test]
fn a_job_started_by_hand_while_a_transaction_has_it_prepared_has_its_instant() {
    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    hands[0].job.start().unwrap();
    assert_eq!(
        hands[0].take_all().wait(),
        None,
        "it waits for what is decided"
    );
    let t0 = hands[0].source.clone();
    hands[0].woken.take();
    prepared.commit();
    assert!(hands[0].woken.take() > 0);
    // It holds on to the instant of the other, for that is what its user wants.
    assert!(!hands[0].try_write(cluster(1), 0x22));
    hands[0].drive().done().unwrap();
    assert_eq!(hands[0].target[bytes(cluster(1))], t0[bytes(cluster(1))]);

    let mut hands = two(BitmapMode::OnSuccess);
    let prepared = start_both(&hands);
    hands[0].job.start().unwrap();
    let _ = hands[0].take_all();
    hands[0].woken.take();
    drop(prepared);
    assert!(hands[0].woken.take() > 0, "it makes an instant of its own");
    hands[0].write(cluster(1), 0x44);
    hands[0].drive().done().unwrap();
    assert_eq!(hands[0].target[bytes(cluster(1))], [0x44; CLUSTER as usize]);
}

#[test]
fn a_guest_write_in_flight_at_the_start_is_before_the_instant() {
    let mut hand = Hand::new(options(BackupSync::Full));
    let node = hand.node.clone();
    let ticket = node.begin_write(cluster(0)).go().expect("open");
    hand.job.start().unwrap();
    assert_eq!(hand.take_all().wait(), Some(5000 * MS));
    assert!(hand.out.is_empty());
    hand.lands(cluster(0), 0x77);
    hand.woken.take();
    ticket.finish(());
    assert!(hand.woken.take() > 0);
    hand.drive().done().unwrap();
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_guest_write_that_hangs_holds_others_no_longer_than_hold_max() {
    let mut hand = Hand::new(options(BackupSync::Full));
    let node = hand.node.clone();
    let ticket = node.begin_write(cluster(0)).go().expect("open");
    hand.job.start().unwrap();
    let _ = hand.take_all();
    assert!(!hand.try_write(cluster(1), 1));
    hand.now = 5000 * MS;
    assert_eq!(hand.take_all().wait(), Some(10_000 * MS));
    hand.write(cluster(1), 1);
    hand.now = 10_000 * MS;
    let _ = hand.take_all();
    assert!(!hand.try_write(cluster(1), 1), "it is tried again");
    ticket.finish(());
    hand.drive().done().unwrap();
    assert_eq!(hand.target, hand.source);
}

// What becomes of the bitmap

const MODES: [BitmapMode; 3] = [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always];

/// What the table says, for F = clusters 0 to 2, and N and U as given.
fn table(mode: BitmapMode, is_good: bool, since: &[u64], left: &[u64]) -> Vec<u64> {
    let held: &[u64] = match (mode, is_good) {
        (BitmapMode::OnSuccess, true) => &[],
        (BitmapMode::Always, _) => left,
        (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => &[0, 1, 2],
    };
    let mut all: Vec<u64> = held.iter().chain(since).copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// A backup of clusters 0 to 2, of which 0 is on the target; the guest has written 3 since the instant.
fn half_way(mode: BitmapMode) -> Hand {
    let mut hand = Hand::begun(single(with_bitmap(BackupSync::Bitmap, mode)), &[0, 1, 2]);
    hand.look();
    hand.answer(hand.find(0));
    let _ = hand.take_all();
    hand.look();
    hand.write(cluster(3), 0x33);
    hand
}

fn check_bitmap(hand: &Hand, expected: &[u64]) {
    assert_eq!(dirty(&hand.node), expected);
    assert!(!is_busy(&hand.node));
    assert!(hand.node.bitmaps().query(NAME).unwrap().is_recording);
}

#[test]
fn the_bitmap_after_a_success() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.drive().done().unwrap();
        check_bitmap(&hand, &table(mode, true, &[3], &[]));
    }
}

#[test]
fn the_bitmap_after_a_failure_at_once() {
    for mode in MODES {
        let mut hand = Hand::begun(with_bitmap(BackupSync::Bitmap, mode), &[0, 1, 2]);
        hand.fault = Some(Box::new(|_, kind| {
            matches!(kind, OpKind::Copy(_)).then_some((Side::Source, ErrorKind::Other))
        }));
        assert!(is_failed(&hand.drive().done(), Side::Source));
        check_bitmap(&hand, &table(mode, false, &[], &[0, 1, 2]));
    }
}

#[test]
fn the_bitmap_after_a_failure_half_way_and_what_the_next_backup_copies() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.fail(hand.find(CLUSTER), Side::Target, ErrorKind::StorageFull);
        assert!(is_failed(&hand.drive().done(), Side::Target));
        let expected = table(mode, false, &[3], &[1, 2]);
        check_bitmap(&hand, &expected);
        let mut next = Hand::on(
            &hand.node,
            with_bitmap(BackupSync::Bitmap, BitmapMode::Always),
        );
        (next.source, next.target) = (hand.source.clone(), hand.target.clone());
        next.job.start().unwrap();
        next.drive().done().unwrap();
        let copied: u64 = next.copied.iter().map(|range| range.len()).sum();
        let rest: u64 = expected.iter().map(|&index| cluster(index).len()).sum();
        assert_eq!(copied, rest, "the rest and nothing else");
        assert_eq!(next.target, next.source, "{mode:?}");
    }
}

#[test]
fn the_bitmap_after_a_cancel_that_came_before_the_start() {
    for mode in MODES {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut hand = Hand::on(&node, with_bitmap(BackupSync::Bitmap, mode));
        hand.write(0..3 * CLUSTER, 1);
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &[0, 1, 2]);
    }
}

#[test]
fn the_bitmap_after_a_cancel_before_anything_was_copied() {
    for sync in [BackupSync::Bitmap, BackupSync::Full] {
        let node = Node::new(LEN);
        add_bitmap(&node, CLUSTER);
        let mut hand = Hand::on(&node, with_bitmap(sync, BitmapMode::Always));
        hand.write(cluster(1), 1);
        let mut list = Transaction::new();
        list.start(&hand.job);
        prepare(list).unwrap().commit();
        // Its machine has not come by yet.
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        match sync {
            BackupSync::Full => check_bitmap(&hand, &[0, 1, 2, 3]),
            _ => check_bitmap(&hand, &[1]),
        }
    }
}

#[test]
fn the_bitmap_after_a_cancel_while_it_runs_is_paused_or_pending() {
    for mode in MODES {
        let mut hand = half_way(mode);
        hand.job.cancel(Cancel::Soft).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[1, 2]));

        let mut hand = half_way(mode);
        hand.job.pause().unwrap();
        let _ = hand.drive().wait();
        assert_eq!(hand.job.query().status, Status::Paused);
        hand.job.cancel(Cancel::Force).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[2]));

        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.auto_finalize = false;
        let mut hand = Hand::begun(options, &[0, 1, 2]);
        let _ = hand.drive().wait();
        assert_eq!(hand.job.query().status, Status::Pending);
        assert!(is_busy(&hand.node));
        hand.write(cluster(3), 1);
        hand.job.cancel(Cancel::Force).unwrap();
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[3], &[]));
    }
}

#[test]
fn the_bitmap_after_another_of_the_group_has_failed() {
    for mode in MODES {
        let group = JobGroup::new();
        let mut options = with_bitmap(BackupSync::Bitmap, mode);
        options.job.group = Some(group.clone());
        let mut hand = Hand::begun(options, &[0, 1, 2]);
        let mut other = self::options(BackupSync::Full);
        (other.job.group, other.job.id) = (Some(group), Some("b1".to_owned()));
        let mut other = Hand::started(other);
        let _ = hand.drive().wait();
        assert_eq!(
            hand.job.query().status,
            Status::Waiting,
            "all of it is copied"
        );
        let _ = other.take_all();
        other.look();
        other.fail(0, Side::Target, ErrorKind::Other);
        assert!(is_failed(&other.drive().done(), Side::Target));
        assert!(is_cancelled(&hand.drive().done()));
        check_bitmap(&hand, &table(mode, false, &[], &[]));
    }
}

#[test]
fn the_bitmap_after_the_machine_was_dropped() {
    for mode in MODES {
        let mut hand = half_way(mode);
        let mut pending = hand.wait_with(cluster(2));
        hand.backup = None;
        assert!(matches!(hand.job.query().error, Some(JobError::Dropped)));
        let ticket = pending.try_begin().expect("nobody holds it back").unwrap();
        hand.lands(cluster(2), 0x22);
        ticket.finish(());
        // Nothing is flushed any more, so all that was copied counts as missing.
        check_bitmap(&hand, &table(mode, false, &[2, 3], &[0, 1, 2]));
    }
}

#[test]
fn what_lands_after_the_instant_was_lost_is_missing_also_if_the_bitmap_records_no_more() {
    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let mut hand = Hand::on(&node, with_bitmap(BackupSync::Bitmap, BitmapMode::Always));
    hand.write(0..2 * CLUSTER, 0x11);
    node.bitmaps().disable(NAME).unwrap();
    hand.job.start().unwrap();
    let _ = hand.take_all();
    hand.look();
    assert!(
        matches!(hand.kinds()[..], [OpKind::Copy(_)]),
        "{:?}",
        hand.kinds()
    );
    hand.job.cancel(Cancel::Force).unwrap();
    let _ = hand.take_all();
    // The guest goes on, and then the copy reads.
    hand.write(cluster(0), 0x99);
    let copy = hand.find(0);
    hand.answer(copy);
    assert!(is_cancelled(&hand.drive().done()));
    assert_eq!(hand.target[0], 0x99, "that is not what was to be backed up");
    assert_eq!(dirty(&node), [0, 1]);
}

#[test]
fn clusters_are_rounded_outward_in_a_finer_and_in_a_coarser_bitmap() {
    for granularity in [512, CLUSTER, 2 * CLUSTER] {
        let node = Node::new(LEN);
        add_bitmap(&node, granularity);
        let mut hand = Hand::on(
            &node,
            single(with_bitmap(BackupSync::Bitmap, BitmapMode::Always)),
        );
        hand.write(CLUSTER + 1000..CLUSTER + 1001, 0x11);
        hand.job.start().unwrap();
        let _ = hand.take_all();
        hand.look();
        hand.fail(0, Side::Target, ErrorKind::Other);
        assert!(is_failed(&hand.drive().done(), Side::Target));
        match granularity > CLUSTER {
            true => check_bitmap(&hand, &[0, 1]),
            false => check_bitmap(&hand, &[1]),
        }
        let bytes = node.bitmaps().query(NAME).unwrap().dirty_bytes;
        assert_eq!(bytes, granularity.max(CLUSTER), "whole clusters");
    }
}

// Guests that wait

#[test]
fn a_guest_goes_on_when_its_clusters_are_on_the_target_and_not_before() {
    let mut hand = Hand::started(single(options(BackupSync::Full)));
    let _ = hand.take_all();
    let count = Arc::new(Count::default());
    let mut pending = hand.wait_with(CLUSTER - 1..2 * CLUSTER + 1);
    assert!(hand.woken.take() > 0, "the job is told at once");
    assert!(
        pending
            .poll_begin(&Waker::from(Arc::clone(&count)))
            .is_pending()
    );
    let t0 = hand.source.clone();
    for index in [0, 1, 2] {
        assert!(
            pending.try_begin().is_none(),
            "cluster {index} is not saved"
        );
        let _ = hand.take_all();
        hand.look();
        let copy = hand.find(index * CLUSTER);
        hand.answer(copy);
    }
    assert!(count.take() > 0);
    let ticket = pending.try_begin().expect("all of it is saved").unwrap();
    hand.lands(ticket.range(), 0x66);
    ticket.finish(());
    hand.drive().done().unwrap();
    assert_eq!(hand.target, t0);
}

#[test]
fn a_guest_that_waits_for_a_background_copy_that_fails_has_its_own_try() {
    for policy in [OnError::Ignore, OnError::Stop] {
        for on_cbw_error in [OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite] {
            let mut options = options(BackupSync::Full);
            options.job.on_target_error = policy;
            options.on_cbw_error = on_cbw_error;
            let mut hand = Hand::started(options);
            let _ = hand.take_all();
            hand.look();
            let mut pending = hand.wait_with(0..1);
            let _ = hand.take_all();
            hand.fail(hand.find(0), Side::Target, ErrorKind::Other);
            let _ = hand.take_all();
            assert!(
                hand.is_out(0),
                "it is tried at once, without a delay: {:?}",
                hand.kinds()
            );
            let t0 = hand.source.clone();
            while pending
                .try_begin()
                .is_none_or(|begun| begun.map(|t| t.cancel()).is_err())
            {
                let at = hand.find(0);
                hand.answer(at);
                let _ = hand.take_all();
            }
            hand.write(0..1, 0x55);
            let _ = hand.job.resume();
            hand.drive().done().unwrap();
            assert_eq!(hand.target, t0);
        }
    }
}

#[test]
fn what_a_guest_waits_for_is_copied_beside_all_limits() {
    limits_do_not_hold_up_guests();
    #[cfg(debug_assertions)]
    {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        break_on_this_thread(Some(Sabotage::LimitUrgent));
        let is_noticed = std::panic::catch_unwind(limits_do_not_hold_up_guests).is_err();
        break_on_this_thread(None);
        std::panic::set_hook(hook);
        assert!(is_noticed, "a guest that waits for a worker is not noticed");
    }
}

fn limits_do_not_hold_up_guests() {
    let mut options = single(options(BackupSync::Full));
    options.job.speed = 1;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    // The one worker has the one buffer, and the speed is used up for hours.
    assert!(matches!(hand.kinds()[..], [OpKind::Copy(_)]));
    let mut pending: Vec<Pending> = [1, 2, 3].map(|index| hand.wait_with(cluster(index))).into();
    let _ = hand.take_all();
    hand.look();
    for index in [1, 2, 3] {
        assert!(
            hand.is_out(index * CLUSTER),
            "cluster {index}: {:?}",
            hand.kinds()
        );
        hand.answer(hand.find(index * CLUSTER));
    }
    for pending in &mut pending {
        pending.try_begin().expect("it is saved").unwrap().cancel();
    }
    assert_eq!(hand.now, Duration::ZERO);
    assert!(hand.is_out(0), "the background still has its own");
}

#[test]
fn a_burst_of_guests_comes_through_by_and_by() {
    let len = 200 * CLUSTER;
    let node = Node::new(len);
    let mut hand = Hand::on(&node, options(BackupSync::None));
    hand.job.start().unwrap();
    let _ = hand.take_all();
    let at = |index: u64| ByteRange::from(index * CLUSTER..index * CLUSTER + 1);
    let mut pending: Vec<Pending> = (0..200).map(|index| hand.wait_with(at(index))).collect();
    let _ = hand.take_all();
    assert_eq!(hand.out.len(), 64, "and no more at the same time");
    let _ = hand.drive_now().wait();
    for pending in &mut pending {
        pending.try_begin().expect("it is saved").unwrap().cancel();
    }
    assert_eq!(hand.copied.len(), 200);
}

#[test]
fn a_guest_whose_deadline_has_come_goes_on_and_the_backup_fails() {
    let mut options = options(BackupSync::Full);
    options.cbw_timeout = Some(100 * MS);
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    hand.now = 7 * MS;
    let mut pending = hand.wait_with(0..512);
    let mut other = hand.wait_with(cluster(3));
    assert_eq!(hand.take_all().wait(), Some(107 * MS));
    hand.now = 107 * MS - Duration::from_nanos(1);
    let _ = hand.take_all();
    assert!(pending.try_begin().is_none());
    hand.now = 107 * MS;
    let _ = hand.take_all();
    for pending in [&mut pending, &mut other] {
        pending
            .try_begin()
            .expect("guests go on")
            .unwrap()
            .finish(());
    }
    let result = hand.drive().done();
    let Err(JobError::NotSaved { range, why }) = result else {
        panic!("it is too slow, but {result:?}");
    };
    assert_eq!((range, why), ((0..512).into(), NotSaved::TimedOut));
}

#[test]
fn a_guest_whose_deadline_has_come_is_refused_and_may_try_again() {
    let mut options = options(BackupSync::Full);
    options.cbw_timeout = Some(100 * MS);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.now = 100 * MS;
    let _ = hand.take_all();
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::TimedOut
    );
    let error = io::Error::from(WriteRefused::NotSaved(NotSaved::TimedOut));
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    // The copy goes on by itself, and once it is there the guest need not wait.
    let mut again = hand.wait_with(0..512);
    assert_eq!(
        hand.take_all().wait(),
        Some(200 * MS),
        "with a deadline of its own"
    );
    hand.answer(hand.find(0));
    again.try_begin().expect("it is saved").unwrap().cancel();
    hand.write(0..512, 0x88);
    hand.drive().done().unwrap();
    assert_eq!(hand.target, t0);
}

#[test]
fn a_guest_for_which_copying_fails_is_refused_and_may_try_again() {
    let mut options = options(BackupSync::None);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.look();
    hand.fail(hand.find(0), Side::Target, ErrorKind::Other);
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::Failed
    );
    assert_eq!(hand.drive_now().wait(), None, "nobody waits any more");
    assert_eq!(hand.job.query().status, Status::Running);
    assert_eq!(hand.errors(), 1);
    let mut again = hand.wait_with(0..512);
    let _ = hand.drive_now();
    again.try_begin().expect("it is saved").unwrap().cancel();
    hand.write(0..512, 0x77);
    assert_eq!(hand.target[bytes(cluster(0))], t0[bytes(cluster(0))]);
}

#[test]
fn a_guest_that_waits_for_one_part_of_a_cluster_is_refused_when_another_part_fails() {
    let node = Node::new(LEN);
    let mut target = Limits::new(LEN);
    target.max_transfer = 16 << 10;
    let mut options = options(BackupSync::None);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    options.cbw_timeout = None;
    let mut hand = Hand::with_limits(&node, Limits::new(LEN), target, options);
    hand.job.start().unwrap();
    let _ = hand.take_all();
    let mut pending = hand.wait_with(0..512);
    // The last quarter can never be written: it must not be tried for ever.
    hand.fault = Some(Box::new(|_, kind| match kind {
        OpKind::Copy(range) if range.contains(48 * KIB) => Some((Side::Target, ErrorKind::Other)),
        _ => None,
    }));
    let _ = hand.drive_now().wait();
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::Failed
    );
}

#[test]
fn a_guest_for_which_copying_fails_goes_on_and_the_backup_fails() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Report] {
        let mut options = options(BackupSync::None);
        options.job.on_source_error = policy;
        let mut hand = Hand::started(options);
        let _ = hand.take_all();
        let mut pending = hand.wait_with(0..512);
        let _ = hand.take_all();
        hand.look();
        hand.fail(hand.find(0), Side::Source, ErrorKind::Other);
        let _ = hand.take_all();
        pending
            .try_begin()
            .expect("the guest goes on")
            .unwrap()
            .finish(());
        assert!(
            is_failed(&hand.drive().done(), Side::Source),
            "whatever {policy:?}"
        );
    }
}

#[test]
fn a_guest_that_gives_up_is_forgotten() {
    let mut options = options(BackupSync::None);
    options.cbw_timeout = Some(100 * MS);
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    let pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    drop(pending);
    hand.now = 200 * MS;
    let _ = hand.drive_now().wait();
    assert_eq!(hand.job.query().status, Status::Running, "nobody was late");
}

#[test]
fn a_guest_let_go_by_one_backup_is_known_to_the_next() {
    let node = Node::new(LEN);
    let mut first = Hand::on(&node, options(BackupSync::None));
    first.job.start().unwrap();
    let _ = first.take_all();
    let mut pending = first.wait_with(0..512);
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    assert!(pending.poll_begin(&waker).is_pending());
    first.backup = None;
    assert!(count.take() > 0);
    // Before it comes by again another backup has begun.
    let mut second = Hand::on(&node, options(BackupSync::None));
    second.job.start().unwrap();
    let _ = second.take_all();
    second.woken.take();
    assert!(pending.poll_begin(&waker).is_pending());
    assert!(second.woken.take() > 0, "it is told");
    let _ = second.drive_now();
    assert!(count.take() > 0);
    pending
        .try_begin()
        .expect("it is saved")
        .unwrap()
        .finish(());
}

#[test]
fn a_driver_that_is_dropped_keeps_guests_waiting_until_another_comes() {
    let mut hand = Hand::started(options(BackupSync::Full));
    let _ = hand.take_all();
    hand.look();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.out.clear();
    hand.backup().ops_lost();
    assert!(pending.try_begin().is_none());
    let _ = hand.take_all();
    assert_eq!(
        hand.kinds(),
        [OpKind::Settle],
        "the lost copy may still land"
    );
    assert!(!hand.is_out(0));
    hand.drive().done().unwrap();
    pending.try_begin().expect("it is saved").unwrap().cancel();
    assert_eq!(hand.target, t0);
}

#[test]
fn writes_of_any_length_and_place_are_dealt_with() {
    let mut hand = Hand::started(options(BackupSync::None));
    let _ = hand.take_all();
    hand.write(0..0, 1);
    hand.write(CLUSTER..CLUSTER, 1);
    hand.write(LEN..LEN, 1);
    // What is past the end of the disk touches no cluster, though it is in the reach of the last one.
    hand.write(4 * CLUSTER..5 * CLUSTER, 1);
    hand.write(u64::MAX - 1..u64::MAX, 1);
    let t0 = hand.source.clone();
    for range in [LEN - 1..LEN + 1, 0..u64::MAX, LEN - 1..LEN, 0..LEN] {
        let mut pending = hand.wait_with(range.clone());
        assert!(pending.try_begin().is_none());
        if range == (0..LEN) {
            let _ = hand.drive_now();
            pending.try_begin().expect("it is saved").unwrap().cancel();
        }
    }
    assert_eq!(hand.target, t0);
    hand.write(0..u64::MAX, 1);
}

#[test]
fn disks_of_odd_lengths_are_copied_to_the_last_byte() {
    for len in [
        0,
        1,
        CLUSTER - 1,
        CLUSTER,
        CLUSTER + 1,
        64 * CLUSTER - 1,
        64 * CLUSTER + 1,
    ] {
        for sync in [BackupSync::Full, BackupSync::Top] {
            let mut hand = Hand::on(&Node::new(len), options(sync));
            hand.job.start().unwrap();
            hand.drive().done().unwrap();
            assert_eq!(hand.target, hand.source);
            assert_eq!(hand.job.query().progress.total, len);
        }
    }
}

#[test]
fn a_clean_bitmap_is_a_backup_of_nothing() {
    let mut hand = Hand::begun(with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess), &[]);
    hand.drive().done().unwrap();
    assert_eq!(hand.copied, []);
    hand.write(0..LEN, 1);
}

// Sync top and none

#[test]
fn only_what_the_top_layer_holds_is_copied_and_protected() {
    let mut hand = Hand::new(single(options(BackupSync::Top)));
    hand.in_top.fill(false);
    // A part of cluster 1 is allocated, and so all of it counts.
    hand.in_top[18] = true;
    hand.job.start().unwrap();
    let _ = hand.take_all();
    // Not looked at yet: it waits for the look, and for that only.
    let mut pending = hand.wait_with(2 * CLUSTER + 5..2 * CLUSTER + 6);
    let _ = hand.take_all();
    let look = hand.find(2 * CLUSTER);
    assert!(matches!(hand.kinds()[look], OpKind::Status(_)));
    hand.answer(look);
    let ticket = pending
        .try_begin()
        .expect("nothing is to be saved")
        .unwrap();
    hand.lands(ticket.range(), 0x99);
    ticket.finish(());
    let t0 = hand.source.clone();
    hand.drive().done().unwrap();
    assert!(
        hand.copied.iter().all(|range| range.start() / CLUSTER == 1),
        "{:?}",
        hand.copied
    );
    assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
    assert!(
        hand.target[bytes(cluster(2))]
            .iter()
            .all(|&byte| byte == 0xaa)
    );
}

#[test]
fn a_cluster_copied_in_parts_of_which_the_last_are_not_allocated_is_copied_whole() {
    let node = Node::new(LEN);
    let mut source = Limits::new(LEN);
    source.max_transfer = 8 << 10;
    let mut hand = Hand::with_limits(&node, source, Limits::new(LEN), options(BackupSync::Top));
    hand.in_top.fill(false);
    hand.in_top[..2].fill(true);
    hand.job.start().unwrap();
    hand.drive().done().unwrap();
    assert_eq!(
        hand.target[bytes(cluster(0))],
        hand.source[bytes(cluster(0))]
    );
    assert!(
        hand.target[bytes(cluster(1))]
            .iter()
            .all(|&byte| byte == 0xaa)
    );
}

#[test]
fn not_knowing_what_is_allocated_is_an_error_of_sync_top() {
    for (sync, is_error) in [(BackupSync::Full, false), (BackupSync::Top, true)] {
        let mut hand = Hand::started(options(sync));
        hand.fault = Some(Box::new(|_, kind| {
            matches!(kind, OpKind::Status(_)).then_some((Side::Source, ErrorKind::Other))
        }));
        let result = hand.drive().done();
        assert_eq!(
            is_failed(&result, Side::Source),
            is_error,
            "{sync:?}: {result:?}"
        );
    }
}

#[test]
fn sync_none_copies_what_guests_overwrite_and_ends_by_a_cancel() {
    let mut hand = Hand::started(options(BackupSync::None));
    assert_eq!(hand.drive().wait(), None);
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(CLUSTER..CLUSTER + 1);
    assert_eq!(hand.drive().wait(), None);
    pending.try_begin().expect("it is saved").unwrap().cancel();
    assert_eq!(hand.copied, [cluster(1)]);
    assert_eq!(hand.target[bytes(cluster(1))], t0[bytes(cluster(1))]);
    hand.job.cancel(Cancel::Soft).unwrap();
    assert!(is_cancelled(&hand.drive().done()));
    hand.write(0..LEN, 1);
}

// Errors, pause, speed

#[test]
fn a_fault_at_any_operation_under_any_policy_loses_nothing() {
    for policy in [
        OnError::Report,
        OnError::Ignore,
        OnError::Stop,
        OnError::Enospc,
    ] {
        for side in [Side::Source, Side::Target] {
            for is_for_ever in [false, true] {
                for index in 0..12 {
                    fault_at(index, policy, side, is_for_ever);
                }
            }
        }
    }
}

fn fault_at(index: usize, policy: OnError, side: Side, is_for_ever: bool) {
    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let mut options = single(with_bitmap(BackupSync::Full, BitmapMode::Always));
    options.job.on_source_error = policy;
    options.job.on_target_error = policy;
    let mut hand = Hand::on(&node, options);
    hand.fault = Some(Box::new(move |count, kind| {
        let is_hit = match is_for_ever {
            true => count >= index,
            false => count == index,
        };
        let is_there = match side {
            Side::Source => matches!(kind, OpKind::Copy(_)),
            Side::Target | Side::Buffer => kind.writes_target() || kind == OpKind::Flush,
        };
        (is_hit && is_there).then_some((side, ErrorKind::Other))
    }));
    hand.job.start().unwrap();
    let what = format!("{index}, {policy:?}, {side:?}, {is_for_ever}");
    let end = 60_000 * MS;
    let rest = hand.drive_until(end);
    let errors = hand.errors();
    match policy {
        _ if errors == 0 => rest.done().expect("nothing has failed"),
        OnError::Report | OnError::Enospc | OnError::Auto => {
            assert!(is_failed(&rest.done(), side), "{what}");
            assert_eq!(errors, 1, "nothing new is begun after it");
            // The rest is in the bitmap, and the next one copies it: all, if the target does not flush.
            let is_flushed = !is_for_ever || side == Side::Source;
            for unit in 0..4 {
                let is_there = is_flushed && hand.copied.contains(&cluster(unit));
                assert_eq!(dirty(&node).contains(&unit), !is_there, "{what}");
            }
            return;
        }
        OnError::Ignore if is_for_ever => {
            let until = rest.wait().expect("it tries again");
            assert!(
                until > end && until <= end + 5000 * MS,
                "with a delay of 5 s by now"
            );
            // About 22 tries in this time, of a look and a copy of each of four clusters.
            assert!(hand.answered < 250, "{}: {what}", hand.answered);
            hand.fault = None;
            hand.drive().done().expect("the fault is gone");
        }
        OnError::Ignore => {
            rest.done().expect("it was tried again");
            assert!(hand.now >= 10 * MS, "after a delay");
        }
        OnError::Stop => {
            let _ = rest.wait();
            assert_eq!(hand.job.query().status, Status::Paused, "{what}");
            let answered = hand.answered;
            hand.now = 2 * end;
            let _ = hand.drive_now();
            assert_eq!(hand.answered, answered, "it stands still");
            hand.fault = None;
            hand.job.resume().unwrap();
            hand.drive().done().expect("the fault is gone");
        }
    }
    assert_eq!(hand.target, hand.source, "{what}");
    assert_eq!(dirty(&node), [0; 0], "{what}");
    let copied: u64 = hand.copied.iter().map(|range| range.len()).sum();
    assert_eq!(copied, LEN, "nothing twice: {what}");
}

#[test]
fn a_paused_job_holds_on_to_the_instant() {
    for steps in 0..8 {
        let mut hand = Hand::started(single(options(BackupSync::Full)));
        let _ = hand.take_all();
        for _ in 0..steps {
            if !hand.out.is_empty() {
                hand.answer(0);
            }
            let _ = hand.take_all();
        }
        let t0 = hand.source.clone();
        let before = hand.kinds();
        hand.job.pause().unwrap();
        let _ = hand.take_all();
        assert_eq!(hand.kinds(), before, "nothing new is begun");
        let is_busy = !hand.out.is_empty();
        let expected = match is_busy {
            true => Status::Running,
            false => Status::Paused,
        };
        assert_eq!(
            hand.job.query().status,
            expected,
            "paused once nothing is in flight"
        );
        let _ = hand.drive_now().wait();
        assert_eq!(hand.job.query().status, Status::Paused);
        let copied = hand.copied.len();
        let at = 3 * CLUSTER..3 * CLUSTER + 1;
        if !hand.try_write(at.clone(), 0x44) {
            let mut pending = hand.wait_with(at.clone());
            let _ = hand.drive_now().wait();
            pending.try_begin().expect("it is saved").unwrap().cancel();
            hand.write(at, 0x44);
            assert_eq!(hand.copied.len(), copied + 1, "that one and no other");
        }
        assert_eq!(hand.job.query().status, Status::Paused);
        hand.job.resume().unwrap();
        hand.drive().done().unwrap();
        assert_eq!(hand.target, t0);
        let copied: u64 = hand.copied.iter().map(|range| range.len()).sum();
        assert_eq!(copied, LEN, "nothing is copied twice");
    }
}

#[test]
fn the_speed_limit_holds_the_background_and_ends_when_it_is_taken_away() {
    let mut options = single(options(BackupSync::Full));
    options.job.speed = CLUSTER;
    let mut hand = Hand::started(options);
    let _ = hand.drive_until(1500 * MS);
    assert!(hand.copied.len() <= 3, "{:?}", hand.copied);
    assert!(hand.copied.len() >= 2, "{:?}", hand.copied);
    hand.woken.take();
    hand.job.set_speed(0).unwrap();
    assert!(hand.woken.take() > 0);
    hand.drive_now().done().unwrap();
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_cancel_waits_for_what_is_in_flight_and_lets_guests_go_at_once() {
    let mut hand = Hand::started(options(BackupSync::Full));
    let _ = hand.take_all();
    hand.look();
    let mut pending = hand.wait_with(0..1);
    let _ = hand.take_all();
    hand.job.cancel(Cancel::Soft).unwrap();
    let _ = hand.take_all();
    pending
        .try_begin()
        .expect("the guest goes on")
        .unwrap()
        .finish(());
    assert!(hand.kinds().contains(&OpKind::CancelInFlight));
    let is_over = |hand: &Hand| hand.job.query().status >= Status::Concluded;
    while !hand.out.is_empty() {
        assert!(!is_over(&hand), "something is in flight");
        hand.answer(0);
        let _ = hand.take_all();
    }
    assert!(is_over(&hand));
    assert!(is_cancelled(&hand.drive().done()));
}

#[test]
fn the_source_is_read_only_what_the_target_gets_is_flushed() {
    let mut hand = Hand::started(single(options(BackupSync::Full)));
    let mut last = None;
    loop {
        let rest = hand.take_all();
        if hand.out.is_empty() {
            rest.done().unwrap();
            break;
        }
        last = Some(hand.kinds()[0]);
        if matches!(last, Some(OpKind::Copy(_))) {
            hand.read(0);
        }
        hand.answer(0);
    }
    assert_eq!(last, Some(OpKind::Flush));
    assert_eq!(hand.target, hand.source);
}

#[test]
fn a_target_is_told_once_more_to_give_up_if_that_was_lost() {
    let is_cancel = |out: &Out| out.op.kind() == OpKind::CancelInFlight;
    for are_all_lost in [false, true] {
        let mut hand = Hand::started(options(BackupSync::Full));
        let _ = hand.take_all();
        hand.look();
        hand.job.cancel(Cancel::Force).unwrap();
        let _ = hand.take_all();
        let index = hand.out.iter().position(is_cancel).expect("it is told");
        let lost = hand.out.remove(index).op;
        match are_all_lost {
            false => hand.backup().op_lost(lost),
            true => {
                hand.out.clear();
                hand.backup().ops_lost();
            }
        }
        let _ = hand.take_all();
        assert!(hand.out.iter().any(is_cancel), "{:?}", hand.kinds());
        assert!(is_cancelled(&hand.drive().done()));
    }
}
