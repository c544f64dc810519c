//! Backups, case by case, driven by hand: rules of the arguments, the instant, the end of the bitmap, and
//! orders of events in which a guest would wait for ever, or an image would get what is later than the instant.

#[path = "backup_cases/arguments.rs"]
mod arguments;
#[path = "backup_cases/bitmap.rs"]
mod bitmap;
#[path = "backup_cases/errors.rs"]
mod errors;
#[path = "backup_cases/instant.rs"]
mod instant;
#[path = "backup_cases/top.rs"]
mod top;
#[path = "backup_cases/waiting.rs"]
mod waiting;

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

fn prepare(list: Transaction) -> Result<Prepared, TransactionError> {
    list.prepare()
        .try_prepared()
        .expect("no write is in flight")
}
