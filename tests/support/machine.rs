//! A mirror driven by hand over two vectors of bytes, in virtual time: the test decides when each
//! operation is answered, and how.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};
use std::time::Duration;

use blockjob::{
    Begin, ByteRange, Cancel, Change, CompareBy, Content, Event, Extent, IfZero, Job, JobError,
    JobOptions, Limits, Mirror, MirrorOptions, Node, OnError, Op, OpKind, Outcome, Side, Step,
    Switch, SwitchBack, Verb, VerbError,
};

/// What is known of the source per block of so many bytes.
pub(crate) const BLOCK: u64 = 512;
pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const MS: Duration = Duration::from_millis(1);

/// More turns than any of these tests needs.
const TURNS_MAX: usize = 100_000;

/// Decides whether an operation fails, from how many were answered before it and what it is.
pub(crate) type Fault = Box<dyn FnMut(usize, OpKind) -> Option<(Side, io::ErrorKind)>>;

/// A waker that counts its calls.
#[derive(Default)]
pub(crate) struct Count(AtomicUsize);

impl Count {
    pub(crate) fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }

    pub(crate) fn wake_once(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// An operation that was handed out.
pub(crate) struct Out {
    pub(crate) op: Op,
    /// For a copy whose read is over: what was read.
    data: Option<Vec<u8>>,
}

impl Out {
    pub(crate) fn kind(&self) -> OpKind {
        self.op.kind()
    }
}

/// Asks a job for something, by force or in some way if there are several.
pub(crate) fn ask(job: &Job, verb: Verb) -> Result<(), VerbError> {
    match verb {
        Verb::Start => job.start(),
        Verb::Cancel => job.cancel(Cancel::Force),
        Verb::Pause => job.pause(),
        Verb::Resume => job.resume(),
        Verb::SetSpeed => job.set_speed(1 << 40),
        Verb::Change => job.change(Change {
            on_source_error: Some(OnError::Stop),
            on_target_error: None,
            ..Change::default()
        }),
        Verb::Complete => job.complete(),
        Verb::Finalize => job.finalize(),
        Verb::Dismiss => job.dismiss(),
    }
}

/// Whether that test fails; it says so to nobody.
pub(crate) fn fails(test: fn()) -> bool {
    let hook = std::panic::take_hook();
    let here = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() != here {
            hook(info);
        }
    }));
    std::panic::catch_unwind(test).is_err()
}

/// What the machine says when it has nothing more to hand out.
#[derive(Debug)]
pub(crate) enum Rest {
    Wait(Option<Duration>),
    Switch(Switch),
    SwitchBack(SwitchBack),
    Done(Result<(), JobError>),
}

impl Rest {
    pub(crate) fn wait(self) -> Option<Duration> {
        match self {
            Rest::Wait(until) => until,
            rest => panic!("waits, but {rest:?}"),
        }
    }

    pub(crate) fn switch(self) -> Switch {
        match self {
            Rest::Switch(switch) => switch,
            rest => panic!("switches, but {rest:?}"),
        }
    }

    pub(crate) fn back(self) -> SwitchBack {
        match self {
            Rest::SwitchBack(back) => back,
            rest => panic!("switches back, but {rest:?}"),
        }
    }

    pub(crate) fn done(self) -> Result<(), JobError> {
        match self {
            Rest::Done(result) => result,
            rest => panic!("is over, but {rest:?}"),
        }
    }
}

pub(crate) struct Machine {
    pub(crate) node: Node,
    pub(crate) job: Job,
    mirror: Option<Mirror>,
    pub(crate) source: Vec<u8>,
    pub(crate) target: Vec<u8>,
    /// Content of the source, and whether its topmost layer holds it.
    blocks: Vec<(Content, bool)>,
    pub(crate) now: Duration,
    pub(crate) woken: Arc<Count>,
    waker: Waker,
    /// In the order in which they were handed out.
    pub(crate) out: Vec<Out>,
    pub(crate) fault: Option<Fault>,
    answered: usize,
    /// Everything that was ever handed out.
    pub(crate) asked: Vec<OpKind>,
    pub(crate) out_max: usize,
    pub(crate) buffered_max: u64,
    /// Bytes copied as data.
    pub(crate) copied: u64,
    /// Whether something was written to the target since the last good flush was asked for.
    pub(crate) is_unflushed: bool,
    /// For a target that fills the rest of a cluster at the first write to it.
    cluster: Option<u64>,
    allocated: BTreeSet<u64>,
    pub(crate) events: Vec<Event>,
    current: u64,
}

/// Options of a job with a name, in granules of 4 KiB.
pub(crate) fn options() -> MirrorOptions {
    let mut options = MirrorOptions::default();
    options.job = named();
    options.granularity = blockjob::Granularity::from_bytes(4 * KIB);
    options
}

pub(crate) fn named() -> JobOptions {
    let mut options = JobOptions::default();
    options.id = Some("m0".to_owned());
    options
}

pub(crate) fn error(kind: io::ErrorKind) -> io::Error {
    io::Error::from(kind)
}

impl Machine {
    pub(crate) fn new(len: u64, options: MirrorOptions) -> Self {
        Self::with_limits(Limits::new(len), Limits::new(len), options)
    }

    /// The source holds data that differs from block to block, the target 0xaa.
    pub(crate) fn with_limits(source: Limits, target: Limits, options: MirrorOptions) -> Self {
        let node = Node::new(source.len);
        let mirror = Mirror::new(&node, source, target, options).expect("good options");
        Self::of(node, mirror, target)
    }

    pub(crate) fn of(node: Node, mirror: Mirror, target: Limits) -> Self {
        let len = node.len() as usize;
        let woken = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&woken));
        Self {
            job: mirror.job().clone(),
            mirror: Some(mirror),
            source: (0..len)
                .map(|at| 1 + (at / BLOCK as usize % 255) as u8)
                .collect(),
            target: vec![0xaa; len],
            blocks: vec![(Content::Data, true); node.len().div_ceil(BLOCK) as usize],
            node,
            now: Duration::ZERO,
            woken,
            waker,
            out: Vec::new(),
            fault: None,
            answered: 0,
            asked: Vec::new(),
            out_max: 0,
            buffered_max: 0,
            copied: 0,
            is_unflushed: false,
            cluster: target
                .cluster
                .filter(|_| target.fills_clusters)
                .map(u64::from),
            allocated: BTreeSet::new(),
            events: Vec::new(),
            current: 0,
        }
    }

    /// A machine whose job was started.
    pub(crate) fn started(len: u64, options: MirrorOptions) -> Self {
        let machine = Self::new(len, options);
        machine.job.start().expect("it is new");
        machine
    }

    /// A machine whose job is ready, with the disks equal.
    pub(crate) fn ready(len: u64, options: MirrorOptions) -> Self {
        let mut machine = Self::started(len, options);
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, blockjob::Status::Ready);
        assert!(machine.is_equal());
        machine
    }

    pub(crate) fn mirror(&mut self) -> &mut Mirror {
        self.mirror.as_mut().expect("it was not dropped")
    }

    pub(crate) fn has_mirror(&self) -> bool {
        self.mirror.is_some()
    }

    pub(crate) fn drop_mirror(&mut self) {
        self.mirror = None;
    }

    pub(crate) fn is_equal(&self) -> bool {
        self.source == self.target
    }

    /// Says what the source has in `range`, which is made of whole blocks.
    pub(crate) fn lay(&mut self, range: impl Into<ByteRange>, content: Content, in_top: bool) {
        let range = range.into();
        for index in range.start() / BLOCK..range.end().div_ceil(BLOCK) {
            self.blocks[index as usize] = (content, in_top);
        }
        if content == Content::Zero {
            self.source[bytes(range)].fill(0);
        }
    }

    /// A whole guest write, from the gate to the answer.
    pub(crate) fn guest_write(&mut self, range: impl Into<ByteRange>, byte: u8) {
        let range = range.into();
        let node = self.node.clone();
        let Begin::Go(ticket) = node.begin_write(range) else {
            panic!("the guest is held");
        };
        self.guest_lands(range, byte);
        ticket.finish(());
    }

    /// The data of a guest write reaches the source.
    pub(crate) fn guest_lands(&mut self, range: impl Into<ByteRange>, byte: u8) {
        let range = range.into();
        self.source[bytes(range)].fill(byte);
        for index in range.start() / BLOCK..range.end().div_ceil(BLOCK) {
            self.blocks[index as usize] = (Content::Data, true);
        }
    }

    pub(crate) fn is_guest_held(&self) -> bool {
        match self.node.begin_write((0..1).into()) {
            Begin::Go(ticket) => {
                ticket.cancel();
                false
            }
            Begin::Wait(_) => true,
            Begin::Refused(_) => unreachable!("no bitmap is read-only"),
        }
    }

    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Asks once. What is handed out is added to `out`: then `None`.
    pub(crate) fn poll(&mut self) -> Option<Rest> {
        let (now, waker) = (self.now, self.waker.clone());
        let step = self.mirror().poll(now, &waker);
        self.check();
        match step {
            Step::Op(op) => {
                self.note(op.kind());
                self.out.push(Out { op, data: None });
                self.out_max = self.out_max.max(self.out.len());
                let buffered: u64 = self.out.iter().map(|out| buffered(out.kind())).sum();
                self.buffered_max = self.buffered_max.max(buffered);
                None
            }
            Step::Wait { until } => {
                assert!(
                    until.is_none_or(|until| until > now),
                    "waits for a time that has come"
                );
                Some(Rest::Wait(until))
            }
            Step::Switch(switch) => {
                assert!(!self.is_unflushed, "switches without a flush");
                assert!(
                    self.out.iter().all(|out| !out.kind().writes_target()),
                    "switches with a write out"
                );
                Some(Rest::Switch(switch))
            }
            Step::SwitchBack(back) => Some(Rest::SwitchBack(back)),
            Step::Done(result) => Some(Rest::Done(result)),
        }
    }

    /// Takes everything that the machine hands out without an answer.
    pub(crate) fn take_all(&mut self) -> Rest {
        for _ in 0..TURNS_MAX {
            if let Some(rest) = self.poll() {
                return rest;
            }
        }
        panic!("it never stops handing out: {:?}", self.job.query());
    }

    /// Answers whatever is handed out, and lets the time come that it waits for, until it waits for
    /// something else.
    pub(crate) fn drive(&mut self) -> Rest {
        self.drive_until(Duration::MAX)
    }

    /// The same, with the time standing still.
    pub(crate) fn drive_now(&mut self) -> Rest {
        self.drive_until(self.now)
    }

    /// The same, but time does not go past `end`.
    pub(crate) fn drive_until(&mut self, end: Duration) -> Rest {
        for _ in 0..TURNS_MAX {
            let rest = self.take_all();
            if !self.out.is_empty() {
                self.answer_all();
                continue;
            }
            match rest {
                Rest::Wait(Some(until)) if until <= end => self.now = until,
                rest => return rest,
            }
        }
        panic!("it never comes to rest: {:?}", self.job.query());
    }

    pub(crate) fn answer_all(&mut self) {
        while !self.out.is_empty() {
            self.answer(0);
        }
    }

    /// Where the first operation is that `is_wanted`.
    pub(crate) fn find(&self, is_wanted: impl Fn(OpKind) -> bool) -> Option<usize> {
        self.out.iter().position(|out| is_wanted(out.kind()))
    }

    /// The first copy that is out and touches that byte.
    pub(crate) fn find_copy(&self, at: u64) -> usize {
        self.find(|kind| matches!(kind, OpKind::Copy(range) if range.contains(at)))
            .unwrap_or_else(|| panic!("no copy at {at}: {:?}", self.kinds()))
    }

    pub(crate) fn kinds(&self) -> Vec<OpKind> {
        self.out.iter().map(Out::kind).collect()
    }

    /// The first half of a copy.
    pub(crate) fn read(&mut self, index: usize) {
        let OpKind::Copy(range) = self.out[index].kind() else {
            panic!("only copies read");
        };
        self.out[index].data = Some(self.source[bytes(range)].to_vec());
    }

    /// Does what is left to do of an operation, unless the plan of faults says no, and reports it.
    pub(crate) fn answer(&mut self, index: usize) {
        let kind = self.out[index].kind();
        let count = self.answered;
        self.answered += 1;
        let fault = self.fault.as_mut().and_then(|fault| fault(count, kind));
        if let Some((side, kind)) = fault {
            self.fail(index, side, kind);
            return;
        }
        let out = self.out.remove(index);
        let outcome = self.perform(kind, out.data);
        self.report(out.op, outcome);
    }

    /// Reports an operation that changed nothing as failed.
    pub(crate) fn fail(&mut self, index: usize, side: Side, kind: io::ErrorKind) {
        let out = self.out.remove(index);
        let outcome = Outcome::Failed {
            side,
            error: error(kind),
        };
        self.report(out.op, outcome);
    }

    /// Reports an operation, also one that it knows nothing of any more.
    pub(crate) fn report(&mut self, op: Op, outcome: Outcome) {
        let now = self.now;
        self.mirror().op_done(now, op, outcome);
        self.check();
    }

    pub(crate) fn perform(&mut self, kind: OpKind, data: Option<Vec<u8>>) -> Outcome {
        match kind {
            OpKind::Copy(range) => {
                let data = data.unwrap_or_else(|| self.source[bytes(range)].to_vec());
                self.fill_clusters(range);
                self.target[bytes(range)].copy_from_slice(&data);
                self.copied += range.len();
                self.is_unflushed = true;
            }
            OpKind::Zero(range, _) => {
                self.fill_clusters(range);
                self.target[bytes(range)].fill(0);
                self.is_unflushed = true;
            }
            OpKind::Discard(range) => {
                self.target[bytes(range)].fill(0xdd);
                self.is_unflushed = true;
            }
            OpKind::Status(range) => return Outcome::Status(self.status(range)),
            OpKind::Compare(range, _) => return Outcome::Compared(self.differing(range)),
            // What is written while a flush is out is not covered by it; these tests write before.
            OpKind::Flush => self.is_unflushed = false,
            OpKind::Settle | OpKind::CancelInFlight => {}
            OpKind::CopyDetecting(range, if_zero) => {
                let data = data.unwrap_or_else(|| self.source[bytes(range)].to_vec());
                self.fill_clusters(range);
                self.copied += range.len();
                let is_zero = data.iter().all(|&byte| byte == 0);
                if let (true, IfZero::Leave) = (is_zero, if_zero) {
                    let target = &self.target[bytes(range)];
                    assert!(target.iter().all(|&byte| byte == 0), "{range} is not zero");
                    return Outcome::Zeroes;
                }
                self.target[bytes(range)].copy_from_slice(&data);
                self.is_unflushed = true;
                if is_zero {
                    return Outcome::Zeroes;
                }
            }
            OpKind::CopyCompressed(_)
            | OpKind::CopyOffloaded(_)
            | OpKind::Save(_)
            | OpKind::CopySaved(_)
            | OpKind::CopySavedCompressed(_)
            | OpKind::DiscardSaved(_)
            | OpKind::SettleSaved
            | OpKind::GiveUp(_)
            | OpKind::DiscardSource(_) => {
                unreachable!("a mirror asks for none of these")
            }
        }
        Outcome::Done
    }

    /// The bytes in which the disks differ.
    pub(crate) fn differing(&self, range: ByteRange) -> Vec<ByteRange> {
        let differs = |&at: &u64| self.source[at as usize] != self.target[at as usize];
        let bytes = (range.start()..range.end()).filter(differs);
        bytes.map(|at| (at..at + 1).into()).collect()
    }

    pub(crate) fn status(&self, range: ByteRange) -> Extent {
        let first = range.start() / BLOCK;
        let (content, in_top) = self.blocks[first as usize];
        let mut end = first + 1;
        while end * BLOCK < range.end() && self.blocks[end as usize] == (content, in_top) {
            end += 1;
        }
        Extent {
            len: end * BLOCK - range.start(),
            content,
            in_top,
        }
    }

    fn fill_clusters(&mut self, range: ByteRange) {
        let Some(size) = self.cluster else { return };
        for cluster in range.start() / size..range.end().div_ceil(size) {
            if self.allocated.insert(cluster) {
                let end = ((cluster + 1) * size).min(self.node.len());
                self.target[bytes((cluster * size..end).into())].fill(0xee);
            }
        }
    }

    fn note(&mut self, kind: OpKind) {
        self.asked.push(kind);
        let Some(range) = kind.range() else { return };
        assert!(range.end() <= self.node.len() && !range.is_empty());
        if !kind.writes_target() {
            return;
        }
        for other in &self.out {
            let is_apart = !other.kind().writes_target()
                || !other
                    .kind()
                    .range()
                    .is_some_and(|other| other.overlaps(range));
            assert!(is_apart, "{kind:?} while {:?} is out", other.kind());
        }
    }

    /// What must hold whenever the machine has returned.
    fn check(&mut self) {
        self.mirror().check_invariants();
        let info = self.job.query();
        assert!(
            info.progress.current >= self.current,
            "progress went back: {info:?}"
        );
        assert!(info.progress.total >= info.progress.current, "{info:?}");
        self.current = info.progress.current;
    }

    /// Everything told so far.
    pub(crate) fn events(&mut self) -> &[Event] {
        while let Some(event) = self.job.next_event() {
            self.events.push(event);
        }
        &self.events
    }

    /// The same, in short.
    pub(crate) fn names(&mut self) -> Vec<String> {
        self.events().iter().map(name).collect()
    }

    /// What was told since this was asked the last time.
    pub(crate) fn new_names(&mut self) -> Vec<String> {
        let names = self.names();
        self.events.clear();
        names
    }
}

/// Statuses in small letters, everything else in large ones.
pub(crate) fn name(event: &Event) -> String {
    match event {
        Event::Status(status) => status.to_string(),
        Event::Ready { .. } => "READY".to_owned(),
        Event::Pending => "PENDING".to_owned(),
        Event::Differs(_) => "DIFFERS".to_owned(),
        Event::Verified(_) => "VERIFIED".to_owned(),
        Event::Error(_) => "ERROR".to_owned(),
        Event::Completed { error: None, .. } => "COMPLETED".to_owned(),
        Event::Completed { .. } => "COMPLETED with an error".to_owned(),
        Event::Cancelled { .. } => "CANCELLED".to_owned(),
        Event::HeldInVain => "HELD IN VAIN".to_owned(),
        other => panic!("an event that these tests do not know: {other:?}"),
    }
}

pub(crate) fn is_final(event: &Event) -> bool {
    matches!(event, Event::Completed { .. } | Event::Cancelled { .. })
}

pub(crate) fn buffered(kind: OpKind) -> u64 {
    match kind {
        OpKind::Copy(range) | OpKind::CopyDetecting(range, _) => range.len(),
        OpKind::Compare(range, CompareBy::Reading) => 2 * range.len(),
        OpKind::Compare(range, CompareBy::Device) => range.len(),
        _ => 0,
    }
}

pub(crate) fn bytes(range: ByteRange) -> std::ops::Range<usize> {
    range.start() as usize..range.end() as usize
}
