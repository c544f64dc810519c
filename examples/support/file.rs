//! A disk image file as a device, served by a small pool of threads.
//!
//! ```text
//!  future ──▶ request ──▶ pool ──▶ pread, pwrite, fallocate, lseek, fdatasync
//!    ▲                      │
//!    └───── completion ◀────┘   kept by the pool alone once the future is dropped
//! ```
//!
//! 1. A request is outstanding from before a thread can see it until its system call has returned,
//!    whether anybody still waits for it or not. That is what `settle` looks at.
//! 2. A request is answered exactly once, also when its thread panics: then whoever awaits it panics.
//! 3. No waker is called under a lock.
//! 4. The last request in is the first one served, so that what was just read is written while a cache
//!    still has it, and the fewest buffers are about: a copy takes a fifth less time than in the order
//!    of arrival. Every so often the oldest is served instead, so that none starves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::future::{Future, poll_fn};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};

use blockjob::io::{AlignedBuf, BlockDevice, BufResult, CompareBy, ReadAt, WriteAt};
use blockjob::{ByteRange, Content, Extent, Limits, RangeLimits, Unmap};
use parking_lot::{Condvar, Mutex};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// The longest request that carries no data: also where the file system cannot do it and zeroes are
/// written by hand, a request ends within a moment.
const RANGE_MAX: u64 = 1 << 30;

/// Every so-manieth turn is that of the oldest request.
const FAIR_TURN: u64 = 64;

/// A regular file of fixed length.
#[derive(Debug)]
pub(crate) struct FileDevice {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    limits: Limits,
    known_data: Arc<KnownData>,
}

type Work = Box<dyn FnOnce(&File) + Send>;

#[derive(Debug)]
struct Pool {
    file: File,
    state: Mutex<State>,
    /// There is a request, or the device is being dropped.
    has_work: Condvar,
}

#[derive(Default)]
struct State {
    /// Requests that no thread has taken yet, the oldest in front.
    queue: VecDeque<(u64, Work)>,
    /// How many were taken.
    taken: u64,
    /// Requests that may still touch the file.
    outstanding: BTreeSet<u64>,
    next_id: u64,
    /// Who waits for all requests before a certain one.
    settlers: BTreeMap<u64, Vec<Waker>>,
    is_closing: bool,
}

impl FileDevice {
    /// `file` as a device, served by `threads` threads. For a target it must be open for writing.
    pub(crate) fn new(file: File, threads: usize) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let ranges = RangeLimits {
            align: 1,
            max: RANGE_MAX,
        };
        let mut limits = Limits::new(metadata.len());
        limits.write_zeroes = Some(ranges);
        limits.cheap_zeroes = true;
        limits.discard = Some(ranges);
        limits.compare = Some(CompareBy::Reading);
        limits.identity = Some(u128::from(metadata.dev()) << 64 | u128::from(metadata.ino()));
        let mut device = Self {
            pool: Arc::new(Pool {
                file,
                state: Mutex::new(State::default()),
                has_work: Condvar::new(),
            }),
            threads: Vec::new(),
            limits,
            known_data: Arc::default(),
        };
        for _ in 0..threads.max(1) {
            let pool = Arc::clone(&device.pool);
            let thread = thread::Builder::new()
                .name("file".to_owned())
                .spawn(move || pool.serve())?;
            // If the next one cannot be started, dropping the device ends those that run.
            device.threads.push(thread);
        }
        Ok(device)
    }

    /// The file itself, for a guest whose path is synchronous.
    pub(crate) fn file(&self) -> &File {
        &self.pool.file
    }

    /// Runs `work` on a thread of the pool.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> R + Send + 'static,
    ) -> R {
        let completion = Arc::new(Completion::default());
        let answer = Arc::clone(&completion);
        let work: Work = Box::new(move |file| {
            answer.set(catch_unwind(AssertUnwindSafe(|| work(file))));
        });
        self.pool.push(work);
        match poll_fn(|cx| completion.poll(cx)).await {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Drop for FileDevice {
    fn drop(&mut self) {
        self.pool.state.lock().is_closing = true;
        self.pool.has_work.notify_all();
        for thread in self.threads.drain(..) {
            // A request that panicked has told whoever awaits it.
            let _ = thread.join();
        }
    }
}

impl BlockDevice for FileDevice {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl ReadAt for FileDevice {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.call(move |file| (file.read_exact_at(buf.as_mut(), offset), buf))
            .await
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        if let Some(extent) = self.known_data.recall(range) {
            return Ok(extent);
        }
        let known_data = Arc::clone(&self.known_data);
        self.call(move |file| known_data.ask(file, range)).await
    }
}

impl WriteAt for FileDevice {
    async fn read_back(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.call(move |file| (file.write_all_at(buf.as_ref(), offset), buf))
            .await
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        self.known_data.forget();
        self.call(move |file| write_zeroes(file, range, unmap))
            .await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.known_data.forget();
        self.call(move |file| punch_hole(file, range)).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.call(File::sync_data).await
    }

    fn settle(&self) -> impl Future<Output = ()> {
        // Later requests may come and go: they are not waited for.
        let until = self.pool.state.lock().next_id;
        poll_fn(move |cx| self.pool.poll_settled(until, cx))
    }
}

/// Makes the range read as zeroes, without holding up other users of the file.
pub(crate) fn write_zeroes(file: &File, range: ByteRange, unmap: Unmap) -> io::Result<()> {
    let mode = match unmap {
        Unmap::Allowed => FallocateFlags::PUNCH_HOLE,
        Unmap::Forbidden => FallocateFlags::ZERO_RANGE,
    };
    match change_storage(file, range, mode) {
        Err(Errno::OPNOTSUPP) => write_zeroes_by_hand(file, range),
        result => Ok(result?),
    }
}

/// Gives the storage of the range back; it reads as zeroes afterwards.
pub(crate) fn punch_hole(file: &File, range: ByteRange) -> io::Result<()> {
    write_zeroes(file, range, Unmap::Allowed)
}

fn change_storage(file: &File, range: ByteRange, mode: FallocateFlags) -> Result<(), Errno> {
    if range.is_empty() {
        return Ok(());
    }
    let mode = mode | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| fallocate(file, mode, range.start(), range.len()))
}

fn write_zeroes_by_hand(file: &File, range: ByteRange) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = range.start();
    while at < range.end() {
        let len = (range.end() - at).min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// The last area of a file that was seen to hold data.
///
/// To tell where data ends, a file system walks over all of it, and a mirror asks about each part that
/// it copies: without a memory, a large file costs more time for these walks than for its bytes. What
/// became a hole since is still told as data, which is read as zeroes and thus copied rightly.
#[derive(Debug, Default)]
pub(crate) struct KnownData(Mutex<(u64, u64)>);

impl KnownData {
    /// What is at the start of the range, if that is known.
    pub(crate) fn recall(&self, range: ByteRange) -> Option<Extent> {
        let (start, end) = *self.0.lock();
        (start..end)
            .contains(&range.start())
            .then(|| extent(range, end, Content::Data))
    }

    pub(crate) fn forget(&self) {
        *self.0.lock() = (0, 0);
    }

    /// Whether the file has data or a hole at the start of the range, and up to where.
    pub(crate) fn ask(&self, file: &File, range: ByteRange) -> io::Result<Extent> {
        match seek(file, SeekFrom::Data(range.start())) {
            Ok(data) if data > range.start() => return Ok(extent(range, data, Content::Zero)),
            Ok(_) => {}
            // No data from here to the end of the file.
            Err(Errno::NXIO) => return Ok(extent(range, range.end(), Content::Zero)),
            // This file system does not tell.
            Err(Errno::INVAL) => return Ok(extent(range, range.end(), Content::Data)),
            Err(error) => return Err(error.into()),
        }
        // A hole that was just made at the start must not give an extent of no bytes.
        let hole = seek(file, SeekFrom::Hole(range.start()))?.max(range.start() + 1);
        *self.0.lock() = (range.start(), hole);
        Ok(extent(range, hole, Content::Data))
    }
}

fn extent(range: ByteRange, end: u64, content: Content) -> Extent {
    Extent {
        len: end.min(range.end()) - range.start(),
        content,
        in_top: true,
    }
}

impl Pool {
    fn push(&self, work: Work) {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.outstanding.insert(id);
        state.queue.push_back((id, work));
        drop(state);
        self.has_work.notify_one();
    }

    /// What each thread does until the device is dropped and nothing is left.
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some((id, work)) = state.take() {
                drop(state);
                work(&self.file);
                self.settled(id);
                state = self.state.lock();
            } else if state.is_closing {
                return;
            } else {
                self.has_work.wait(&mut state);
            }
        }
    }

    fn settled(&self, id: u64) {
        let wakers = {
            let mut state = self.state.lock();
            state.outstanding.remove(&id);
            let first = state.first_outstanding();
            let still_waiting = state.settlers.split_off(&first.saturating_add(1));
            std::mem::replace(&mut state.settlers, still_waiting)
        };
        wakers.into_values().flatten().for_each(Waker::wake);
    }

    fn poll_settled(&self, until: u64, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.first_outstanding() >= until {
            return Poll::Ready(());
        }
        let wakers = state.settlers.entry(until).or_default();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl State {
    fn take(&mut self) -> Option<(u64, Work)> {
        self.taken += 1;
        if self.taken.is_multiple_of(FAIR_TURN) {
            self.queue.pop_front()
        } else {
            self.queue.pop_back()
        }
    }

    /// Every request before this one has settled.
    fn first_outstanding(&self) -> u64 {
        self.outstanding.first().copied().unwrap_or(u64::MAX)
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("outstanding", &self.outstanding)
            .finish_non_exhaustive()
    }
}

/// One answer, from the thread that gives it to the task that awaits it.
struct Completion<R>(Mutex<Slot<R>>);

enum Slot<R> {
    Empty(Option<Waker>),
    Full(thread::Result<R>),
    Taken,
}

impl<R> Default for Completion<R> {
    fn default() -> Self {
        Self(Mutex::new(Slot::Empty(None)))
    }
}

impl<R> Completion<R> {
    fn set(&self, answer: thread::Result<R>) {
        let slot = std::mem::replace(&mut *self.0.lock(), Slot::Full(answer));
        if let Slot::Empty(Some(waker)) = slot {
            waker.wake();
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<thread::Result<R>> {
        let mut slot = self.0.lock();
        match std::mem::replace(&mut *slot, Slot::Taken) {
            Slot::Full(answer) => Poll::Ready(answer),
            Slot::Empty(_) => {
                *slot = Slot::Empty(Some(cx.waker().clone()));
                Poll::Pending
            }
            Slot::Taken => unreachable!("a future is not polled after it was ready"),
        }
    }
}
