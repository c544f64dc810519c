//! What a mirror costs beside the transfers themselves.
//!
//! ```text
//! engine/copy         memory to memory on one thread, in steps of 1 MiB, all of it data; a table
//!   memcpy            source to target: the least that can be done
//!   read_write        source to buffer to target: what devices of pread and pwrite have to do
//!   mirror            a mirror over such devices, from start to switch
//!   mirror_by_handle  a mirror whose buffers are handles of the source's memory: one copy
//! engine/granule/…    devices that move nothing; every second granule of 64 KiB is dirty, so each is
//!                     claimed, asked about and copied on its own: two operations
//!   machine           the bare machine, sixteen operations out at a time
//!   driver            the driver, with futures that are ready at once, or when polled again
//!   queue             the completion queue, as the machine
//! engine/hole/…       1 TiB without any data, from start to ready
//! ```
//!
//! Afterwards it prints what a mirror takes of memory, as the kernel counts it for a process that does
//! nothing else.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time"
)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::process::Command;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, BufferPool, HeapPool, ReadAt, WriteAt};
use blockjob::queue::{Answer, Next, Queue, Request, Work};
use blockjob::{
    ByteRange, Content, Extent, Limits, Mirror, MirrorOptions, MirrorSync, Node, Op, OpKind,
    Outcome, RangeLimits, Status, Step, Unmap,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

/// Names the child process that reports its memory; its value is the length of the disk.
const CHILD: &str = "BLOCKJOB_BENCH_MEMORY";

/// A clock that is set by hand: nothing here is to wait for time.
#[derive(Default)]
struct SetClock(Cell<Duration>);

impl SetClock {
    fn advance(&self) {
        self.0.set(self.0.get() + Duration::from_secs(1));
    }
}

impl Clock for SetClock {
    fn now(&self) -> Duration {
        self.0.get()
    }

    async fn sleep_until(&self, at: Duration) {
        self.0.set(self.0.get().max(at));
    }
}

/// Answers requests only once nothing else can be done, as a device does that is slower than the driver.
#[derive(Default)]
struct Latch {
    round: Cell<u64>,
    wakers: RefCell<Vec<Waker>>,
}

impl Latch {
    async fn wait(&self) {
        let round = self.round.get();
        poll_fn(|cx| {
            if self.round.get() > round {
                return Poll::Ready(());
            }
            self.wakers.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Answers everything. Whether there was something.
    fn open(&self) -> bool {
        self.round.set(self.round.get() + 1);
        let wakers = self.wakers.take();
        let is_some = !wakers.is_empty();
        wakers.into_iter().for_each(Waker::wake);
        is_some
    }
}

/// A disk in memory that can be written.
struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn len(&self) -> u64 {
        self.0.borrow().len() as u64
    }
}

fn bytes(offset: u64, len: usize) -> Range<usize> {
    offset as usize..offset as usize + len
}

fn data(range: ByteRange) -> Extent {
    Extent {
        len: range.len(),
        content: Content::Data,
        in_top: true,
    }
}

/// Offers its bytes by copying them, as files do.
struct Copying<'a>(&'a [u8]);

impl BlockDevice for Copying<'_> {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        Limits::new(self.0.len() as u64)
    }
}

impl ReadAt for Copying<'_> {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let into = buf.as_mut();
        into.copy_from_slice(&self.0[bytes(offset, into.len())]);
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(data(range))
    }
}

/// A part of a disk's memory. What a program with mapped disks hands on instead of bytes; its own would
/// be an address and a length.
struct Handle {
    disk: Option<Rc<Vec<u8>>>,
    start: usize,
    len: usize,
    /// The bytes, once somebody wants to change them.
    own: Vec<u8>,
}

impl AsRef<[u8]> for Handle {
    fn as_ref(&self) -> &[u8] {
        match &self.disk {
            Some(disk) => &disk[self.start..self.start + self.len],
            None => &self.own,
        }
    }
}

impl AsMut<[u8]> for Handle {
    fn as_mut(&mut self) -> &mut [u8] {
        self.own = self.as_ref().to_vec();
        self.own.resize(self.len, 0);
        self.disk = None;
        &mut self.own
    }
}

/// Hands out parts of a memory that nobody has read into yet.
struct Handles(Rc<Vec<u8>>);

impl Handles {
    fn new() -> Self {
        Self(Rc::new(vec![0; 1 << 20]))
    }
}

impl BufferPool for Handles {
    type Buf = Handle;

    fn take(&self, len: usize) -> io::Result<Handle> {
        assert!(len <= self.0.len(), "no copy is longer");
        Ok(Handle {
            disk: Some(Rc::clone(&self.0)),
            start: 0,
            len,
            own: Vec::new(),
        })
    }

    fn put(&self, _: Handle) {}
}

/// Lends its bytes.
struct Lending(Rc<Vec<u8>>);

impl BlockDevice for Lending {
    type Buf = Handle;

    fn limits(&self) -> Limits {
        Limits::new(self.0.len() as u64)
    }
}

impl ReadAt for Lending {
    async fn read_at(&self, offset: u64, mut buf: Handle) -> BufResult<Handle> {
        buf.disk = Some(Rc::clone(&self.0));
        buf.start = offset as usize;
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(data(range))
    }
}

/// Where either is copied to.
struct Target<'a, B> {
    disk: &'a Memory,
    _buf: std::marker::PhantomData<B>,
}

impl<'a, B> Target<'a, B> {
    fn new(disk: &'a Memory) -> Self {
        Self {
            disk,
            _buf: std::marker::PhantomData,
        }
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> BlockDevice for Target<'_, B> {
    type Buf = B;

    fn limits(&self) -> Limits {
        Limits::new(self.disk.len())
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> WriteAt for Target<'_, B> {
    async fn write_at(&self, offset: u64, buf: B) -> BufResult<B> {
        let from = buf.as_ref();
        self.disk.0.borrow_mut()[bytes(offset, from.len())].copy_from_slice(from);
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

/// A device that moves nothing.
#[derive(Clone, Copy)]
struct Null<'a> {
    len: u64,
    content: Content,
    /// What requests wait for, if they do.
    latch: Option<&'a Latch>,
}

impl Null<'_> {
    fn limits(self) -> Limits {
        let mut limits = Limits::new(self.len);
        limits.write_zeroes = Some(RangeLimits {
            align: 4096,
            max: 1 << 30,
        });
        limits.cheap_zeroes = self.content == Content::Zero;
        limits
    }

    async fn serve(self) {
        if let Some(latch) = self.latch {
            latch.wait().await;
        }
    }
}

/// [`Null`], and what it hands out as buffers.
struct NullDevice<'a, B> {
    null: Null<'a>,
    _buf: std::marker::PhantomData<B>,
}

impl<'a, B> NullDevice<'a, B> {
    fn new(null: Null<'a>) -> Self {
        Self {
            null,
            _buf: std::marker::PhantomData,
        }
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> BlockDevice for NullDevice<'_, B> {
    type Buf = B;

    fn limits(&self) -> Limits {
        self.null.limits()
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> ReadAt for NullDevice<'_, B> {
    async fn read_at(&self, _: u64, buf: B) -> BufResult<B> {
        self.null.serve().await;
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent {
            content: self.null.content,
            ..data(range)
        })
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> WriteAt for NullDevice<'_, B> {
    async fn write_at(&self, _: u64, buf: B) -> BufResult<B> {
        self.null.serve().await;
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        self.null.serve().await;
        Ok(())
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

/// Runs a driver until `until` is true while there is nothing to do.
fn drive<S, T, P>(
    driver: &Driver<S, T, P, &SetClock>,
    mirror: &mut Mirror,
    latch: Option<&Latch>,
    mut until: impl FnMut() -> bool,
) -> Option<Driven>
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
{
    let mut run = pin!(driver.run(mirror));
    loop {
        match run.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(driven) => return Some(driven),
            Poll::Pending if latch.is_some_and(Latch::open) => {}
            Poll::Pending if until() => return None,
            Poll::Pending => {}
        }
    }
}

/// A whole mirror, with the switch.
fn mirror_once<S, T, P>(driver: &Driver<S, T, P, &SetClock>, source: Limits, target: Limits)
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
{
    let node = Node::new(source.len);
    let mut mirror =
        Mirror::new(&node, source, target, MirrorOptions::default()).expect("legal options");
    let job = mirror.job().clone();
    job.start().expect("a new job");
    let is_ready = || job.query().status == Status::Ready;
    assert!(drive(driver, &mut mirror, None, is_ready).is_none());
    job.complete().expect("it is ready");
    match drive(driver, &mut mirror, None, || false) {
        Some(Driven::Switch(switch)) => switch.commit(),
        other => panic!("no switch: {other:?}"),
    }
    match drive(driver, &mut mirror, None, || false) {
        Some(Driven::Done(result)) => result.expect("no device fails"),
        other => panic!("not done: {other:?}"),
    }
}

/// Ways to copy, one after the other, and again: what else the machine does hits them alike.
fn copy(len: u64, rounds: usize) {
    let source = Rc::new(vec![0x5a; len as usize]);
    let target = Memory(RefCell::new(vec![0xa5; len as usize]));
    let limits = Limits::new(len);
    let clock = SetClock::default();
    let copying = Driver::new(Copying(&source), Target::new(&target), &clock);
    let lending = Driver::with_pool(
        Lending(Rc::clone(&source)),
        Target::new(&target),
        Handles::new(),
        &clock,
    );
    let mut buf = vec![0; MIB as usize];
    let steps = || {
        (0..len)
            .step_by(MIB as usize)
            .map(|start| bytes(start, MIB as usize))
    };

    let mut ways: [(&str, &mut dyn FnMut()); 4] = [
        ("memcpy", &mut || {
            let mut target = target.0.borrow_mut();
            steps().for_each(|step| target[step.clone()].copy_from_slice(&source[step]));
        }),
        ("read_write", &mut || {
            let mut target = target.0.borrow_mut();
            steps().for_each(|step| {
                buf.copy_from_slice(&source[step.clone()]);
                target[step].copy_from_slice(black_box(&buf));
            });
        }),
        ("mirror", &mut || mirror_once(&copying, limits, limits)),
        ("mirror_by_handle", &mut || {
            mirror_once(&lending, limits, limits);
        }),
    ];
    let mut times = [const { Vec::new() }; 4];
    for round in 0..=rounds {
        for ((_, way), times) in ways.iter_mut().zip(&mut times) {
            target.0.borrow_mut().fill(0);
            let began = Instant::now();
            way();
            // The first round finds caches and page tables as nobody else does.
            if round > 0 {
                times.push(began.elapsed().as_secs_f64());
            }
            assert!(*source == *target.0.borrow());
        }
    }
    println!("engine/copy of {} MiB, {rounds} rounds", len / MIB);
    println!("                  median GiB/s  (slowest .. fastest)   of memcpy, per round");
    let memcpy = times[0].clone();
    for ((name, _), times) in ways.iter().zip(&times) {
        let gib = len as f64 / (1u64 << 30) as f64;
        let rates = sorted(times.iter().map(|time| gib / time));
        let ratios = sorted(memcpy.iter().zip(times).map(|(memcpy, time)| memcpy / time));
        println!(
            "{name:17} {:8.2}      ({:5.2} .. {:5.2})       {:.2}",
            rates[rounds / 2],
            rates[0],
            rates[rounds - 1],
            ratios[rounds / 2],
        );
    }
    println!();
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// A mirror in step, over devices that move nothing.
fn in_step(len: u64) -> (Node, Mirror) {
    let node = Node::new(len);
    let limits = Limits::new(len);
    let mut options = MirrorOptions::default();
    options.sync = MirrorSync::None;
    let mut mirror = Mirror::new(&node, limits, limits, options).expect("legal options");
    mirror.job().start().expect("a new job");
    run_machine(&mut mirror, Duration::ZERO);
    assert_eq!(mirror.job().query().status, Status::Ready);
    (node, mirror)
}

/// Runs the machine until it has nothing to do, with as many operations out as it gives.
fn run_machine(mirror: &mut Mirror, now: Duration) {
    let mut out = VecDeque::new();
    loop {
        match mirror.poll(now, Waker::noop()) {
            Step::Op(op) => out.push_back(op),
            Step::Wait { .. } => {
                if out.is_empty() {
                    return;
                }
                for op in out.drain(..) {
                    let outcome = outcome(&op);
                    mirror.op_done(now, op, outcome);
                }
            }
            Step::Switch(_) | Step::SwitchBack(_) | Step::Done(_) => {
                unreachable!("nobody asks for the end")
            }
        }
    }
}

fn outcome(op: &Op) -> Outcome {
    match op.kind() {
        OpKind::Status(range) => Outcome::Status(data(range)),
        _ => Outcome::Done,
    }
}

fn run_queue<P: BufferPool<Buf: AsRef<[u8]>>>(queue: &mut Queue<P>, now: Duration) {
    let mut out = VecDeque::new();
    loop {
        match queue.next(now, Waker::noop()) {
            Next::Submit(request) => out.push_back(request),
            Next::Wait { .. } => {
                if out.is_empty() {
                    return;
                }
                for Request { id, work, .. } in out.drain(..) {
                    let answer = match work {
                        Work::Read { buf, .. } | Work::Write { buf, .. } => {
                            Answer::Transfer(Ok(()), buf)
                        }
                        Work::Status(range) => Answer::Status(Ok(data(range))),
                        _ => Answer::Plain(Ok(())),
                    };
                    queue.completed(now, id, answer);
                }
            }
            Next::Switch(_) | Next::SwitchBack(_) | Next::Done(_) => {
                unreachable!("nobody asks for the end")
            }
        }
    }
}

/// Runs `work` on `iters` granules, in turns of all that are marked at once.
fn per_granule(node: &Node, granules: u64, iters: u64, mut work: impl FnMut()) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = iters;
    while left > 0 {
        let count = left.min(granules);
        left -= count;
        for index in 0..count {
            let start = 2 * index * GRANULE;
            let ticket = node.begin_write((start..start + 512).into()).go();
            ticket.expect("nobody holds the node").finish(());
        }
        let began = Instant::now();
        work();
        total += began.elapsed();
    }
    total
}

fn granule(group: &mut BenchmarkGroup<'_, WallTime>, granules: u64) {
    let len = 2 * granules * GRANULE;
    let done = |mirror: &Mirror| mirror.job().query().progress.current;
    group.bench_function("machine", |bencher| {
        let (node, mut mirror) = in_step(len);
        let clock = SetClock::default();
        bencher.iter_custom(|iters| {
            let before = done(&mirror);
            let time = per_granule(&node, granules, iters, || {
                clock.advance();
                run_machine(&mut mirror, clock.now());
            });
            assert_eq!(done(&mirror) - before, iters * GRANULE);
            time
        });
    });
    let latch = Latch::default();
    for (name, latch) in [("driver/ready", None), ("driver/pending", Some(&latch))] {
        group.bench_function(name, |bencher| {
            let (node, mut mirror) = in_step(len);
            let clock = SetClock::default();
            let null = Null {
                len,
                content: Content::Data,
                latch,
            };
            let (source, target) = (NullDevice::new(null), NullDevice::new(null));
            let driver = Driver::with_pool(source, target, Handles::new(), &clock);
            let job = mirror.job().clone();
            bencher.iter_custom(|iters| {
                let before = job.query().progress.current;
                let time = per_granule(&node, granules, iters, || {
                    clock.advance();
                    let is_done = || {
                        let progress = job.query().progress;
                        progress.current == progress.total
                    };
                    assert!(drive(&driver, &mut mirror, latch, is_done).is_none());
                });
                assert_eq!(job.query().progress.current - before, iters * GRANULE);
                time
            });
        });
    }
    group.bench_function("queue", |bencher| {
        let (node, mirror) = in_step(len);
        let clock = SetClock::default();
        let mut queue = Queue::new(mirror, Handles::new());
        bencher.iter_custom(|iters| {
            let before = done(queue.machine());
            let time = per_granule(&node, granules, iters, || {
                clock.advance();
                run_queue(&mut queue, clock.now());
            });
            assert_eq!(done(queue.machine()) - before, iters * GRANULE);
            time
        });
    });
}

fn hole(group: &mut BenchmarkGroup<'_, WallTime>) {
    let null = Null {
        len: TIB,
        content: Content::Zero,
        latch: None,
    };
    for (name, sync) in [("full", MirrorSync::Full), ("none", MirrorSync::None)] {
        group.bench_function(name, |bencher| {
            let clock = SetClock::default();
            let (source, target) = (NullDevice::new(null), NullDevice::new(null));
            let driver = Driver::with_pool(source, target, Handles::new(), &clock);
            bencher.iter(|| {
                let node = Node::new(TIB);
                let mut options = MirrorOptions::default();
                options.sync = sync;
                let mut mirror = Mirror::new(&node, null.limits(), null.limits(), options)
                    .expect("legal options");
                let job = mirror.job().clone();
                job.start().expect("a new job");
                let is_ready = || job.query().status == Status::Ready;
                assert!(drive(&driver, &mut mirror, None, is_ready).is_none());
            });
        });
    }
}

/// In the child: a mirror of `len` bytes of data, all of it dirty twice over, with as much in flight as
/// may be. Prints by how much the process grew, in KiB.
fn report_memory(len: u64) {
    let before = resident_kib("VmHWM:");
    let latch = Latch::default();
    let null = Null {
        len,
        content: Content::Data,
        latch: Some(&latch),
    };
    let clock = SetClock::default();
    let (source, target) = (NullDevice::new(null), NullDevice::new(null));
    let driver = Driver::with_pool(source, target, HeapPool::new(4096), &clock);
    let node = Node::new(len);
    let mut mirror = Mirror::new(
        &node,
        null.limits(),
        null.limits(),
        MirrorOptions::default(),
    )
    .expect("legal options");
    let job = mirror.job().clone();
    job.start().expect("a new job");
    let is_ready = || job.query().status == Status::Ready;
    assert!(drive(&driver, &mut mirror, Some(&latch), is_ready).is_none());
    // Each page of the log is touched, too.
    let ticket = node.begin_write((0..len).into()).go();
    ticket.expect("nobody holds the node").finish(());
    clock.advance();
    let is_in_step = || job.query().progress.current == 2 * len;
    assert!(drive(&driver, &mut mirror, Some(&latch), is_in_step).is_none());
    println!("{}", resident_kib("VmHWM:") - before);
}

fn resident_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// The children report in turn, so that none sees the memory of another.
fn memory(lens: &[u64]) {
    let program = std::env::current_exe().expect("it runs");
    println!(
        "\npeak memory of a mirror with 16 operations of 1 MiB in flight, all data, all dirty twice"
    );
    println!("disk        measured   bitmap + log + buffers");
    for &len in lens {
        let output = Command::new(&program)
            .env(CHILD, len.to_string())
            .output()
            .expect("it can be started");
        assert!(output.status.success(), "the child failed: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        let kib: u64 = text.trim().parse().expect("a number");
        let expected = (2 * (len / GRANULE / 8) + 16 * MIB) >> 10;
        println!("{:>5} GiB {kib:>8} KiB {expected:>8} KiB", len >> 30);
    }
}

fn main() {
    if let Some(len) = std::env::var_os(CHILD) {
        let len = len.to_str().and_then(|len| len.parse().ok());
        report_memory(len.expect("a length in bytes"));
        return;
    }
    let is_test = std::env::args().any(|arg| arg == "--test");
    // Who asks for certain rows is not kept waiting by those that are not criterion's.
    let is_whole = std::env::args().skip(1).all(|arg| arg.starts_with("--"));
    if is_test {
        copy(16 * MIB, 1);
    } else if is_whole {
        copy(1 << 30, 9);
    }
    let mut criterion = Criterion::default().configure_from_args();

    let mut group = criterion.benchmark_group("engine/granule");
    group.throughput(Throughput::Elements(1)).sample_size(20);
    group.measurement_time(Duration::from_secs(2));
    granule(&mut group, if is_test { 100 } else { 1 << 18 });
    group.finish();

    let mut group = criterion.benchmark_group("engine/hole");
    group.sample_size(20);
    group.measurement_time(Duration::from_secs(2));
    hole(&mut group);
    group.finish();

    criterion.final_summary();
    if is_test {
        memory(&[1 << 30]);
    } else if is_whole {
        memory(&[1 << 30, 64 << 30, TIB]);
    }
}
