//! A mirror over completion queues, as VMMs without async functions have them: requests go in with a
//! number, completions come out with that number and a result, and an eventfd tells when.
//!
//! ```text
//! cargo run --example completion_queue
//!
//!  guest's thread ─▶ gate ─▶ its own rings ──▶ source, after the switch target
//!  mirror's thread ─▶ Queue ─▶ its own rings ─▶ source and target
//! ```
//!
//! There is no future here and no executor. A waker is an eventfd, too, so that each thread waits in
//! one place for everything.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock"
)]

#[path = "support/mod.rs"]
mod support;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Poll, Wake, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockjob::io::{AlignedBuf, HeapPool};
use blockjob::queue::{Answer, Next, Queue, Request, Work};
use blockjob::{
    Begin, ByteRange, Content, Event, Extent, GuestQueue, Job, Lane, Limits, Mirror, MirrorOptions,
    Node, OwnedTicket, PendingWrite, RangeLimits, Side, Switch,
};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use support::guest::Random;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const BLOCK: u64 = 4096;
/// No multiple of anything.
const LEN: u64 = (16 << 20) + 777;
/// Writes that the guest has in flight.
const DEPTH: usize = 8;

/// A disk's queue in the style of cloud-hypervisor's `AsyncIo`. A VMM has such a trait already.
///
/// The memory of a request stays with the queue while it is in flight, and is taken back after it.
trait AsyncIo {
    /// Readable when something has completed.
    fn notifier(&self) -> BorrowedFd<'_>;
    fn submit_read(&mut self, offset: u64, buf: AlignedBuf, user_data: u64) -> io::Result<()>;
    fn submit_write(&mut self, offset: u64, buf: AlignedBuf, user_data: u64) -> io::Result<()>;
    fn submit_write_zeroes(&mut self, range: ByteRange, user_data: u64) -> io::Result<()>;
    fn submit_fsync(&mut self, user_data: u64) -> io::Result<()>;
    /// Bytes transferred, or an error number below 0.
    fn next_completed(&mut self) -> Option<(u64, i32)>;
    fn take_buffer(&mut self, user_data: u64) -> Option<AlignedBuf>;
}

fn main() -> Result<(), Failure> {
    let disks = [Disk::new(1), Disk::new(2)];
    let node = Node::new(LEN);
    let current = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let start = Instant::now();

    let mut options = MirrorOptions::default();
    options.job.id = Some("queue".to_owned());
    let mirror = Mirror::new(&node, disks[0].limits(), disks[1].limits(), options)?;
    let job = mirror.job().clone();
    job.start()?;
    let switch = |switch: Switch| {
        assert!(
            *disks[0].0.lock() == *disks[1].0.lock(),
            "equal at the switch"
        );
        current.store(1, Ordering::SeqCst);
        switch.commit();
    };

    let written = thread::scope(|scope| {
        let stop = StopOnDrop(&stop);
        let guest = scope.spawn(|| {
            let mut guest = Guest::new(&node, &disks, &current)?;
            while !stop.0.load(Ordering::Relaxed) {
                guest.turn()?;
            }
            guest.finish()
        });
        scope.spawn(|| complete_when_ready(&job));
        let mut ends = Ends::new(&disks)?;
        ends.run(Queue::new(mirror, HeapPool::new(512)), start, switch)?;
        // The guest goes on with its new disk.
        thread::sleep(Duration::from_millis(100));
        drop(stop);
        guest.join().expect("the guest's thread does not panic")
    })?;

    let mut expected = vec![1; LEN as usize];
    for (block, byte) in &written.last {
        expected[(block * BLOCK) as usize..][..BLOCK as usize].fill(*byte);
    }
    assert!(*disks[1].0.lock() == expected, "no write was lost");
    assert!(written.after_switch > 0, "the guest went on");
    println!(
        "OK: equal at the switch; {} writes, {} of them to the new disk, {} waited; none was lost",
        written.writes, written.after_switch, written.waited,
    );
    Ok(())
}

/// Lets the guest write for a while once the job is ready, then asks for its end.
fn complete_when_ready(job: &Job) {
    let woken = Arc::new(EventFd::new().expect("an eventfd"));
    let waker = Waker::from(Arc::clone(&woken));
    loop {
        match job.poll_event(&waker) {
            Poll::Ready(Event::Ready { .. }) => {
                thread::sleep(Duration::from_millis(200));
                job.complete()
                    .expect("it is ready, and nobody else asks anything");
            }
            Poll::Ready(Event::Completed { .. } | Event::Cancelled { .. }) => return,
            Poll::Ready(_) => {}
            Poll::Pending => wait_for(&[woken.as_fd()], None).expect("poll"),
        }
    }
}

/// The rings of a mirror: all that turns its requests into those of [`AsyncIo`].
struct Ends {
    source: Box<dyn AsyncIo>,
    target: Box<dyn AsyncIo>,
    disk: Disk,
    woken: Arc<EventFd>,
    /// What is in flight on the target, to know when it has settled.
    writing: usize,
    settling: Vec<u64>,
}

impl Ends {
    fn new(disks: &[Disk; 2]) -> io::Result<Self> {
        Ok(Self {
            source: Box::new(disks[0].ring()?),
            target: Box::new(disks[1].ring()?),
            disk: disks[0].clone(),
            woken: Arc::new(EventFd::new()?),
            writing: 0,
            settling: Vec::new(),
        })
    }

    /// Runs the job to its end.
    fn run(
        &mut self,
        mut queue: Queue<HeapPool>,
        start: Instant,
        mut switch: impl FnMut(Switch),
    ) -> Result<(), Failure> {
        let waker = Waker::from(Arc::clone(&self.woken));
        loop {
            match queue.next(start.elapsed(), &waker) {
                Next::Submit(request) => {
                    let id = request.id;
                    if let Some(answer) = self.submit(request)? {
                        queue.completed(start.elapsed(), id, answer);
                    }
                }
                Next::Wait { until } => {
                    let fds = [
                        self.source.notifier(),
                        self.target.notifier(),
                        self.woken.as_fd(),
                    ];
                    let timeout = until.map(|until| until.saturating_sub(start.elapsed()));
                    wait_for(&fds, timeout)?;
                    while let Some((id, answer)) = self.next_completed() {
                        queue.completed(start.elapsed(), id, answer);
                    }
                }
                Next::Switch(now) => switch(now),
                Next::SwitchBack(_) => unreachable!("this job is in no group"),
                Next::Done(result) => return Ok(result?),
            }
        }
    }

    /// Submits a request, or answers it if that needs no ring.
    fn submit(&mut self, request: Request<AlignedBuf>) -> io::Result<Option<Answer<AlignedBuf>>> {
        let Request { id, side, work } = request;
        let ring = match side {
            Side::Source => &mut self.source,
            Side::Target | Side::Buffer => &mut self.target,
        };
        match work {
            Work::Read { offset, buf } => ring.submit_read(offset, buf, id)?,
            Work::Write { offset, buf } => ring.submit_write(offset, buf, id)?,
            // This disk cannot discard otherwise.
            Work::WriteZeroes(range, _) | Work::Discard(range) => {
                ring.submit_write_zeroes(range, id)?;
            }
            Work::Flush => ring.submit_fsync(id)?,
            Work::Status(range) => return Ok(Some(Answer::Status(Ok(self.disk.status(range))))),
            Work::Settle if self.writing > 0 => {
                self.settling.push(id);
                return Ok(None);
            }
            // What is on a ring is finished soon anyway.
            Work::Settle | Work::CancelInFlight => return Ok(Some(Answer::Plain(Ok(())))),
            Work::WriteCompressed { .. } | Work::CopyFromSource(_) | Work::Compare { .. } => {
                unreachable!("this disk offers none of these")
            }
        }
        self.writing += usize::from(side == Side::Target);
        Ok(None)
    }

    fn next_completed(&mut self) -> Option<(u64, Answer<AlignedBuf>)> {
        if let Some((id, result)) = self.source.next_completed() {
            return Some((id, answer(&mut *self.source, id, result)));
        }
        if let Some((id, result)) = self.target.next_completed() {
            self.writing -= 1;
            return Some((id, answer(&mut *self.target, id, result)));
        }
        if self.writing == 0 {
            return Some((self.settling.pop()?, Answer::Plain(Ok(()))));
        }
        None
    }
}

/// What the numbers of a completion mean.
fn answer(ring: &mut dyn AsyncIo, id: u64, result: i32) -> Answer<AlignedBuf> {
    let done = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
    let Some(buf) = ring.take_buffer(id) else {
        return Answer::Plain(done.map(drop));
    };
    let done = done.and_then(|bytes| match bytes == buf.as_ref().len() {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    });
    Answer::Transfer(done, buf)
}

/// The guest's queue: keeps some writes in flight, each with its ticket.
struct Guest<'a> {
    /// Its way through the gate, with a counter of its own.
    queue: GuestQueue,
    /// One on each disk.
    rings: [Ring; 2],
    current: &'a AtomicUsize,
    in_flight: BTreeMap<u64, InFlight>,
    waiting: Option<Waiting>,
    woken: Arc<EventFd>,
    waker: Waker,
    random: Random,
    written: Written,
}

struct InFlight {
    ticket: OwnedTicket,
    block: u64,
    byte: u8,
}

struct Waiting {
    pending: PendingWrite<Arc<Lane>>,
    block: u64,
}

/// What the guest knows that it wrote.
#[derive(Default)]
struct Written {
    last: BTreeMap<u64, u8>,
    writes: u64,
    waited: u64,
    after_switch: u64,
}

impl<'a> Guest<'a> {
    fn new(node: &Node, disks: &[Disk; 2], current: &'a AtomicUsize) -> io::Result<Self> {
        let woken = Arc::new(EventFd::new()?);
        Ok(Self {
            queue: node.queue(),
            rings: [disks[0].ring()?, disks[1].ring()?],
            current,
            in_flight: BTreeMap::new(),
            waiting: None,
            waker: Waker::from(Arc::clone(&woken)),
            woken,
            random: Random::new(1),
            written: Written::default(),
        })
    }

    /// Submits what may be submitted, waits until something has happened, and reaps.
    fn turn(&mut self) -> io::Result<()> {
        while self.waiting.is_none() && self.in_flight.len() < DEPTH {
            self.begin()?;
        }
        self.wait_and_reap()
    }

    fn begin(&mut self) -> io::Result<()> {
        let block = self.random.below(LEN / BLOCK);
        if self.in_flight.values().any(|write| write.block == block) {
            return Ok(()); // As a guest does not write twice to the same place at the same time.
        }
        match self
            .queue
            .begin_write_owned((block * BLOCK..(block + 1) * BLOCK).into())
        {
            Begin::Go(ticket) => self.submit(ticket, block)?,
            Begin::Wait(pending) => {
                self.written.waited += 1;
                self.waiting = Some(Waiting { pending, block });
            }
            Begin::Refused(refused) => return Err(refused.into()),
        }
        Ok(())
    }

    fn submit(&mut self, ticket: OwnedTicket, block: u64) -> io::Result<()> {
        // With the ticket in hand, and not before, it is certain which disk is the guest's.
        let disk = self.current.load(Ordering::SeqCst);
        let id = self.written.writes;
        let byte = (id % 253) as u8;
        let mut buf = AlignedBuf::new(BLOCK as usize, 512)?;
        buf.as_mut().fill(byte);
        self.rings[disk].submit_write(block * BLOCK, buf, id)?;
        self.in_flight.insert(
            id,
            InFlight {
                ticket,
                block,
                byte,
            },
        );
        self.written.writes += 1;
        self.written.after_switch += disk as u64;
        Ok(())
    }

    /// Whoever holds the node waits for our writes in flight. So a write that waits at the gate must
    /// not keep us from reaping: the gate's waker and the rings are waited for together.
    fn wait_and_reap(&mut self) -> io::Result<()> {
        if let Some(mut waiting) = self.waiting.take() {
            match waiting.pending.poll_begin(&self.waker) {
                Poll::Ready(begun) => self.submit(begun?, waiting.block)?,
                Poll::Pending => self.waiting = Some(waiting),
            }
        }
        let [old, new] = &self.rings;
        wait_for(&[old.notifier(), new.notifier(), self.woken.as_fd()], None)?;
        for ring in &mut self.rings {
            while let Some((id, result)) = ring.next_completed() {
                let answer = answer(ring, id, result);
                let write = self.in_flight.remove(&id).expect("it was submitted");
                let Answer::Transfer(result, _) = write.ticket.finish(answer) else {
                    unreachable!("a write has a buffer");
                };
                result?;
                self.written.last.insert(write.block, write.byte);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Written, Failure> {
        while self.waiting.is_some() || !self.in_flight.is_empty() {
            self.wait_and_reap()?;
        }
        Ok(self.written)
    }
}

/// A disk in memory.
#[derive(Clone)]
struct Disk(Arc<Mutex<Vec<u8>>>);

impl Disk {
    fn new(byte: u8) -> Self {
        Self(Arc::new(Mutex::new(vec![byte; LEN as usize])))
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::new(LEN);
        limits.write_zeroes = Some(RangeLimits {
            align: 1,
            max: 1 << 20,
        });
        limits
    }

    /// Whether the start of the range is zero, and how far.
    fn status(&self, range: ByteRange) -> Extent {
        let bytes = self.0.lock();
        let bytes = &bytes[range.start() as usize..range.end() as usize];
        let is_zero = bytes[0] == 0;
        let len = bytes.iter().take_while(|&&byte| (byte == 0) == is_zero);
        Extent {
            len: len.count() as u64,
            content: if is_zero {
                Content::Zero
            } else {
                Content::Data
            },
            in_top: true,
        }
    }

    fn ring(&self) -> io::Result<Ring> {
        let shared = Arc::new(Shared {
            state: Mutex::new(RingState::default()),
            has_work: Condvar::new(),
            done: EventFd::new()?,
        });
        let thread = thread::Builder::new().spawn({
            let (shared, disk) = (Arc::clone(&shared), self.clone());
            move || shared.serve(&disk)
        })?;
        Ok(Ring {
            shared,
            thread: Some(thread),
        })
    }
}

/// A queue on a disk, with a thread that completes what is in flight in any order.
struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<RingState>,
    has_work: Condvar,
    done: EventFd,
}

#[derive(Default)]
struct RingState {
    submitted: Vec<Submission>,
    completed: VecDeque<(u64, i32)>,
    /// Buffers of requests that have completed.
    buffers: BTreeMap<u64, AlignedBuf>,
    is_closing: bool,
}

struct Submission {
    user_data: u64,
    what: What,
}

enum What {
    Read(u64, AlignedBuf),
    Write(u64, AlignedBuf),
    Zero(ByteRange),
    Sync,
}

impl Ring {
    fn submit(&self, user_data: u64, what: What) -> io::Result<()> {
        let submission = Submission { user_data, what };
        self.shared.state.lock().submitted.push(submission);
        self.shared.has_work.notify_one();
        Ok(())
    }
}

impl AsyncIo for Ring {
    fn notifier(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }

    fn submit_read(&mut self, offset: u64, buf: AlignedBuf, user_data: u64) -> io::Result<()> {
        self.submit(user_data, What::Read(offset, buf))
    }

    fn submit_write(&mut self, offset: u64, buf: AlignedBuf, user_data: u64) -> io::Result<()> {
        self.submit(user_data, What::Write(offset, buf))
    }

    fn submit_write_zeroes(&mut self, range: ByteRange, user_data: u64) -> io::Result<()> {
        self.submit(user_data, What::Zero(range))
    }

    fn submit_fsync(&mut self, user_data: u64) -> io::Result<()> {
        self.submit(user_data, What::Sync)
    }

    fn next_completed(&mut self) -> Option<(u64, i32)> {
        self.shared.state.lock().completed.pop_front()
    }

    fn take_buffer(&mut self, user_data: u64) -> Option<AlignedBuf> {
        self.shared.state.lock().buffers.remove(&user_data)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.state.lock().is_closing = true;
        self.shared.has_work.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self, disk: &Disk) {
        let mut random = Random::new(7);
        let mut state = self.state.lock();
        loop {
            let pending = state.submitted.len() as u64;
            if pending > 0 {
                let index = random.below(pending) as usize;
                let submission = state.submitted.swap_remove(index);
                drop(state);
                let (result, buf) = submission.what.perform(disk);
                state = self.state.lock();
                state.completed.push_back((submission.user_data, result));
                state
                    .buffers
                    .extend(buf.map(|buf| (submission.user_data, buf)));
                self.done.wake_by_ref();
            } else if state.is_closing {
                return;
            } else {
                self.has_work.wait(&mut state);
            }
        }
    }
}

impl What {
    /// The number of bytes, and the buffer if there is one.
    fn perform(self, disk: &Disk) -> (i32, Option<AlignedBuf>) {
        let mut bytes = disk.0.lock();
        match self {
            What::Read(offset, mut buf) => {
                let len = buf.as_ref().len();
                buf.as_mut()
                    .copy_from_slice(&bytes[offset as usize..][..len]);
                (len as i32, Some(buf))
            }
            What::Write(offset, buf) => {
                let len = buf.as_ref().len();
                bytes[offset as usize..][..len].copy_from_slice(buf.as_ref());
                (len as i32, Some(buf))
            }
            What::Zero(range) => {
                bytes[range.start() as usize..range.end() as usize].fill(0);
                (0, None)
            }
            What::Sync => (0, None),
        }
    }
}

/// A counter of the kernel that can be waited for; also a waker.
struct EventFd(OwnedFd);

impl EventFd {
    fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(0, flags)?))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn wake_by_ref(&self) {
        // It fails only when the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Wake for EventFd {
    fn wake(self: Arc<Self>) {
        EventFd::wake_by_ref(&self);
    }
}

/// Waits until one of them is readable or the time is over, and resets those that are. Who waits looks
/// at everything afterwards, so nothing is overlooked.
fn wait_for(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let timeout = timeout.map(Timespec::try_from).transpose();
    let timeout = timeout.map_err(|_| io::ErrorKind::InvalidInput)?;
    rustix::io::retry_on_intr(|| poll(&mut polled, timeout.as_ref()))?;
    for (fd, polled) in fds.iter().zip(&polled) {
        if polled.revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
    }
    Ok(())
}

/// Ends the guest's thread also when something goes wrong.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
