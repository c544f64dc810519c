//! One disk: the gate that every guest write passes, and the bitmaps that record what was written.
//!
//! ```text
//!  guest ─▶ begin_write ─▶ Go(ticket) ─▶ the VMM's own write ─▶ ticket.finish(result)
//!               │                                                    │
//!               └▶ Wait(pending): the node is quiesced               └▶ log ─ ─ drained into ─▶ bitmaps
//! ```
//!
//! This layer knows no jobs, no devices and no executor. It can be used without the rest: to hold a
//! guest's writes for a moment, or to know what was written.
//!
//! Invariants, beside those of the gate:
//!
//! 1. A write is recorded after it settled and before it counts as finished, whether it succeeded or
//!    not: a failed write may have landed in part. A ticket that is dropped records, too.
//! 2. Whether and where a write is recorded is fixed when it begins. Recording therefore starts, and
//!    moves to another log, only while the node is quiesced: [`Node::track`] wants the guard.
//! 3. One log at a time is written to. Its granularity is that of the finest bitmap or finer.
//! 4. Whoever looks at a bitmap drains the log into **every** bitmap first, under one lock. So a
//!    guest write costs the same with one bitmap or ten.

mod gate;

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::mem;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use std::collections::BTreeMap;

use crate::bitmap::{CreateError, HBitmap, RangeError};
use crate::log::{DirtyLog, DirtyLogError};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::{Arc, Mutex, MutexGuard};
use crate::units::{ByteRange, Granularity};

#[cfg(loom)]
#[doc(hidden)]
pub use gate::GateRule;
#[cfg(not(loom))]
use gate::GateRule;
use gate::{Entry, Gate, LaneCounter, Rules, WaiterId};

/// The finest granularity that a node records in: 512 bytes.
const LOG_EXPONENT_MIN: u8 = 9;
/// The coarsest granularity that a node records in: 2 GiB.
const LOG_EXPONENT_MAX: u8 = 31;
const LOGS: usize = (LOG_EXPONENT_MAX - LOG_EXPONENT_MIN) as usize + 1;

/// One disk of a virtual machine, as the guest sees it.
///
/// A handle; clones stand for the same disk. The guest's path calls [`begin_write`](Self::begin_write)
/// before each write, write-zeroes or discard, and tells the ticket when it has settled. Reads and
/// flushes do not pass.
///
/// While nothing is attached and the node is not quiesced, a write takes no lock, allocates nothing
/// and makes no system call.
///
/// # Examples
///
/// ```
/// use blockjob::{Begin, Granularity, Node};
///
/// let node = Node::new(1 << 30);
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// let bitmap = node.track(&guard, Granularity::DEFAULT)?;
/// drop(guard);
///
/// let Begin::Go(ticket) = node.begin_write((4096..8192).into()) else {
///     unreachable!("nobody quiesces the node");
/// };
/// let written: std::io::Result<()> = Ok(()); // what the VMM's own write came to
/// ticket.finish(written)?;
/// assert_eq!(bitmap.lock().next_dirty(0..1 << 30), Some(0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Node {
    /// Where writes are counted that come through the node itself. Leads to the shared state, too.
    lane: Arc<Lane>,
}

/// Where the writes of one queue are counted. It has no methods of its own.
pub struct Lane {
    counter: LaneCounter,
    node: Arc<Inner>,
}

struct Inner {
    len: u64,
    gate: Gate,
    /// One place per granularity, filled when it is first needed. A log that was outgrown stays: its
    /// memory is that of one more bitmap of its granularity.
    logs: [OnceLock<DirtyLog>; LOGS],
    bitmaps: Mutex<Bitmaps>,
}

struct Bitmaps {
    by_id: BTreeMap<u64, HBitmap>,
    next_id: u64,
    /// The log that writes are recorded in, if any.
    recording: Option<usize>,
    /// The logs there are, so that draining does not look for them in every place.
    logs: Vec<usize>,
    /// Whether a job has taken the node.
    is_claimed: bool,
}

/// What became of the wish to write.
#[must_use = "a write that was let in keeps the node from being quiesced until its ticket is gone"]
pub enum Begin<L: Way> {
    /// Write now, and finish the ticket when the write has settled.
    Go(Ticket<L>),
    /// The node is quiesced: do not write yet.
    Wait(PendingWrite<L>),
}

/// A write that was let in and has not settled.
///
/// Dropping it without [`finish`](Self::finish) counts as a write that may have happened: it is
/// recorded. For a write that was never issued there is [`cancel`](Self::cancel).
#[must_use = "dropping the ticket says that the write has settled"]
pub struct Ticket<L: Way> {
    /// `None` once the write has left.
    lane: Option<L>,
    range: ByteRange,
    entry: Entry,
}

/// A [`Ticket`] that borrows nothing, for those who keep it beside a request in flight.
pub type OwnedTicket = Ticket<Arc<Lane>>;

/// How a ticket leads to its [`Lane`]: `&Lane`, or `Arc<Lane>` for one that borrows nothing.
pub trait Way: Deref<Target = Lane> + Clone + Unpin {}

impl<L: Deref<Target = Lane> + Clone + Unpin> Way for L {}

/// A write that waits until the node is no longer quiesced.
///
/// Ask with [`try_begin`](Self::try_begin), have any waker called with
/// [`poll_begin`](Self::poll_begin), or await it. Dropping it gives the write up.
#[must_use]
pub struct PendingWrite<L: Way> {
    lane: L,
    range: ByteRange,
    id: Option<WaiterId>,
}

/// Waits for [`Begin`]; made by its `IntoFuture`.
#[must_use]
pub struct BeginFuture<L: Way>(Option<Begin<L>>);

/// The way into a [`Node`] of one guest queue, which has its own cache lines to count its writes on.
///
/// Two queues do not slow each other down. A queue may move between threads but is used by one at a
/// time; its tickets may finish, and its writes that wait may begin, on any thread.
pub struct GuestQueue {
    lane: Arc<Lane>,
    _used_by_one_thread: PhantomData<std::cell::Cell<()>>,
}

/// Closes a node's gate and waits until the writes in flight have settled.
///
/// The gate is closed from the call of [`Node::quiesce`] on. Dropping this opens it again.
#[must_use = "the node is open again when this is dropped"]
pub struct Quiesce {
    /// `None` once a guard was given.
    node: Option<Arc<Inner>>,
    id: WaiterId,
}

/// While it lives no guest write is in flight, and none can begin.
#[must_use = "the node is open again when this is dropped"]
pub struct QuiesceGuard {
    node: Arc<Inner>,
}

/// A bitmap without a name, of one owner, that records what is written to a node.
///
/// It is detached when it is dropped.
pub struct JobBitmap {
    node: Arc<Inner>,
    id: u64,
    waiter: WaiterId,
}

/// A [`JobBitmap`] under the node's lock, with everything in it that was written before it was taken.
pub struct JobBitmapGuard<'a> {
    bitmaps: MutexGuard<'a, Bitmaps>,
    id: u64,
}

/// That a job works on the node; gone when dropped.
#[derive(Debug)]
pub(crate) struct JobClaim {
    node: Arc<Inner>,
}

/// Why recording could not start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// The guard quiesces another node.
    #[error("the guard is that of another node")]
    OtherNode,
    /// Recording is done in granules of 512 bytes to 2 GiB.
    #[error("granularity {0} is not between 512 B and 2 GiB")]
    Granularity(Granularity),
    /// The bitmap would be too large.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The log would be too large.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
}

impl Node {
    /// A disk of `len` bytes. The length need not be a multiple of anything.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self::with_rules(len, Rules::default())
    }

    /// As [`new`](Self::new), with one invariant of the gate broken.
    #[cfg(loom)]
    #[doc(hidden)]
    #[must_use]
    pub fn breaking(len: u64, rule: GateRule) -> Self {
        let broken = Some(rule);
        Self::with_rules(len, Rules { broken })
    }

    fn with_rules(len: u64, rules: Rules) -> Self {
        let node = Arc::new(Inner {
            len,
            gate: Gate::new(rules),
            logs: std::array::from_fn(|_| OnceLock::new()),
            bitmaps: Mutex::new(Bitmaps {
                by_id: BTreeMap::new(),
                next_id: 0,
                recording: None,
                logs: Vec::new(),
                is_claimed: false,
            }),
        });
        Self {
            lane: Lane::of(node, true),
        }
    }

    /// Length of the disk in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a disk is no collection")]
    pub fn len(&self) -> u64 {
        self.inner().len
    }

    /// Asks to write, write zeroes to, or discard `range`.
    ///
    /// What lies past the end of the disk is not recorded. Only writes that do not overlap may be
    /// ordered freely by the VMM; the node does not order them either.
    ///
    /// Any number of threads may call this; they share one counter. A [`GuestQueue`] per thread is
    /// faster.
    #[inline]
    pub fn begin_write(&self, range: ByteRange) -> Begin<&Lane> {
        Begin::new(&self.lane, range)
    }

    /// As [`begin_write`](Self::begin_write), with a ticket that borrows nothing. It costs one more
    /// reference count.
    pub fn begin_write_owned(&self, range: ByteRange) -> Begin<Arc<Lane>> {
        Begin::new(Arc::clone(&self.lane), range)
    }

    /// A way in for one guest queue.
    #[must_use]
    pub fn queue(&self) -> GuestQueue {
        GuestQueue {
            lane: Lane::of(Arc::clone(self.inner()), false),
            _used_by_one_thread: PhantomData,
        }
    }

    /// Closes the gate at once, and waits for the writes in flight.
    ///
    /// Several may hold the node quiesced; it opens when the last has let go. A job of the node goes on
    /// meanwhile, for it only reads the disk: to stop one there is [`Job::hold`](crate::Job::hold).
    pub fn quiesce(&self) -> Quiesce {
        let node = Arc::clone(self.inner());
        node.gate.close();
        let id = node.gate.new_waiter();
        Quiesce {
            node: Some(node),
            id,
        }
    }

    /// Starts to record in a new, clean bitmap every write that begins from now on.
    ///
    /// The guard makes the moment sharp: no write is in flight, so each is either settled before, or
    /// recorded.
    ///
    /// # Errors
    ///
    /// If the guard is that of another node, or the bitmap cannot be made. Nothing has changed then.
    pub fn track(
        &self,
        guard: &QuiesceGuard,
        granularity: Granularity,
    ) -> Result<JobBitmap, TrackError> {
        if !guard.is_of(self) {
            return Err(TrackError::OtherNode);
        }
        if !(LOG_EXPONENT_MIN..=LOG_EXPONENT_MAX).contains(&granularity.exponent()) {
            return Err(TrackError::Granularity(granularity));
        }
        let mut bitmap = HBitmap::new(self.len(), granularity)?;
        // A guest write must not be lost for want of memory.
        bitmap.reserve()?;
        Inner::track(self.inner(), bitmap)
    }

    /// As [`track`](Self::track), into a clean bitmap that was made for this node before.
    pub(crate) fn track_into(
        &self,
        guard: &QuiesceGuard,
        bitmap: HBitmap,
    ) -> Result<JobBitmap, TrackError> {
        assert!(guard.is_of(self), "a job quiesces its own node");
        let exponent = bitmap.granularity().exponent();
        assert!(
            (LOG_EXPONENT_MIN..=LOG_EXPONENT_MAX).contains(&exponent),
            "a job has checked its granularity"
        );
        Inner::track(self.inner(), bitmap)
    }

    /// For sabotage: records from now on, whatever is in flight.
    pub(crate) fn track_unquiesced(&self, bitmap: HBitmap) -> Option<JobBitmap> {
        Inner::track(self.inner(), bitmap).ok()
    }

    /// Takes the node for a job, unless another has it.
    pub(crate) fn claim_for_job(&self) -> Option<JobClaim> {
        let node = Arc::clone(self.inner());
        let mut bitmaps = node.bitmaps.lock();
        if mem::replace(&mut bitmaps.is_claimed, true) {
            return None;
        }
        drop(bitmaps);
        Some(JobClaim { node })
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.lane.node
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn track(node: &Arc<Self>, bitmap: HBitmap) -> Result<JobBitmap, TrackError> {
        let mut bitmaps = node.bitmaps.lock();
        // What is in a log now was written before: it is not for the new bitmap.
        node.drain_into(&mut bitmaps);
        let finest = bitmaps
            .by_id
            .values()
            .map(HBitmap::granularity)
            .fold(bitmap.granularity(), Granularity::min);
        let log = usize::from(finest.exponent() - LOG_EXPONENT_MIN);
        node.log_or_new(&mut bitmaps, log, finest)?;
        node.gate.record_in(Some(log));
        bitmaps.recording = Some(log);

        bitmaps.next_id += 1;
        let id = bitmaps.next_id;
        bitmaps.by_id.insert(id, bitmap);
        drop(bitmaps);
        Ok(JobBitmap {
            node: Arc::clone(node),
            id,
            waiter: node.gate.new_waiter(),
        })
    }

    fn log_or_new(
        &self,
        bitmaps: &mut Bitmaps,
        log: usize,
        granularity: Granularity,
    ) -> Result<(), DirtyLogError> {
        if self.logs[log].get().is_none() {
            let made = DirtyLog::new(self.len, granularity)?;
            // Under the lock of the bitmaps, so nobody was faster.
            assert!(self.logs[log].set(made).is_ok(), "one log per granularity");
            bitmaps.logs.push(log);
        }
        Ok(())
    }

    /// Records a write that has settled. Not inlined: callers have the short way of a node without a
    /// job in their own code, and no more.
    #[inline(never)]
    fn record(&self, log: u8, range: ByteRange) {
        if let Some(log) = self.logs[usize::from(log)].get() {
            log.mark(range);
        }
    }

    /// Moves what was recorded into the bitmaps. With none left it is thrown away.
    fn drain_into(&self, bitmaps: &mut Bitmaps) {
        // A write that began before the last change of logs may still be inside only if recording
        // stopped since: then nobody is owed its mark. So the current log is all there is.
        for log in bitmaps.logs.iter().filter_map(|&log| self.logs[log].get()) {
            if log.is_clean() {
                continue;
            }
            log.drain_ranges(|range| {
                for bitmap in bitmaps.by_id.values_mut() {
                    bitmap
                        .set(range)
                        .expect("the log has the length of the node, and so have its bitmaps");
                }
            });
        }
    }

    fn has_recorded(&self) -> bool {
        self.logs
            .iter()
            .filter_map(OnceLock::get)
            .any(|log| !log.is_clean())
    }
}

impl Lane {
    fn of(node: Arc<Inner>, shared: bool) -> Arc<Self> {
        Arc::new(Self {
            counter: node.gate.add_lane(shared),
            node,
        })
    }

    /// Records a write and counts it out.
    #[inline]
    fn settle(&self, range: ByteRange, entry: Entry) {
        let leaves_early = !self.node.gate.rules.keeps(GateRule::RecordThenLeave);
        if leaves_early {
            self.node.gate.leave(&self.counter);
        }
        if let Some(log) = entry.log.filter(|_| !is_broken(Sabotage::RecordAtBegin)) {
            self.node.record(log, range);
        }
        if !leaves_early {
            self.node.gate.leave(&self.counter);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.node.gate.remove_lane(&self.counter);
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").finish_non_exhaustive()
    }
}

impl GuestQueue {
    /// As [`Node::begin_write`].
    #[inline]
    pub fn begin_write(&self, range: ByteRange) -> Begin<&Lane> {
        Begin::new(&self.lane, range)
    }

    /// As [`Node::begin_write_owned`].
    pub fn begin_write_owned(&self, range: ByteRange) -> Begin<Arc<Lane>> {
        Begin::new(Arc::clone(&self.lane), range)
    }
}

impl fmt::Debug for GuestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestQueue").finish_non_exhaustive()
    }
}

impl<L: Way> Ticket<L> {
    #[inline]
    fn new(lane: L, range: ByteRange, entry: Entry) -> Self {
        if let (true, Some(log)) = (is_broken(Sabotage::RecordAtBegin), entry.log) {
            lane.node.record(log, range);
        }
        Self {
            lane: Some(lane),
            range,
            entry,
        }
    }

    /// What is written.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The write has settled: nothing that belongs to it will change the disk any more.
    ///
    /// Takes what the write came to, and hands it back as it is. A failed write is recorded like any
    /// other, for part of it may have landed. Call this before the guest is told.
    #[inline]
    pub fn finish<R>(mut self, result: R) -> R {
        let lane = self.lane.take();
        let (range, entry) = (self.range, self.entry);
        // Nothing is left in it to drop. With the drop, also the one of unwinding, goes what would keep
        // the ticket in memory rather than in registers.
        mem::forget(self);
        if let Some(lane) = lane {
            lane.settle(range, entry);
        }
        result
    }

    /// The write was not issued and will not be: nothing is recorded.
    pub fn cancel(mut self) {
        if let Some(lane) = self.lane.take() {
            lane.node.gate.leave(&lane.counter);
        }
    }
}

impl<L: Way> Drop for Ticket<L> {
    fn drop(&mut self) {
        if is_broken(Sabotage::ForgetDropped) {
            self.entry.log = None;
        }
        if let Some(lane) = self.lane.take() {
            lane.settle(self.range, self.entry);
        }
    }
}

impl<L: Way> fmt::Debug for Ticket<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl<L: Way> Begin<L> {
    #[inline]
    fn new(lane: L, range: ByteRange) -> Self {
        match lane.node.gate.try_enter(&lane.counter) {
            Some(entry) => Begin::Go(Ticket::new(lane, range, entry)),
            None => Begin::Wait(PendingWrite {
                lane,
                range,
                id: None,
            }),
        }
    }

    /// The ticket, if the write was let in at once.
    #[must_use]
    pub fn go(self) -> Option<Ticket<L>> {
        match self {
            Begin::Go(ticket) => Some(ticket),
            Begin::Wait(_) => None,
        }
    }
}

impl<L: Way> fmt::Debug for Begin<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Begin::Go(ticket) => ticket.fmt(f),
            Begin::Wait(pending) => pending.fmt(f),
        }
    }
}

/// Awaiting waits until the node is open.
///
/// # Cancel safety
///
/// Dropping the future gives the write up; nothing is recorded.
impl<L: Way> IntoFuture for Begin<L> {
    type Output = Ticket<L>;
    type IntoFuture = BeginFuture<L>;

    fn into_future(self) -> BeginFuture<L> {
        BeginFuture(Some(self))
    }
}

impl<L: Way> Future for BeginFuture<L> {
    type Output = Ticket<L>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.0.take().expect("not polled after it was ready") {
            Begin::Go(ticket) => Poll::Ready(ticket),
            Begin::Wait(mut pending) => {
                let poll = pending.poll_begin(cx.waker());
                if poll.is_pending() {
                    self.0 = Some(Begin::Wait(pending));
                }
                poll
            }
        }
    }
}

impl<L: Way> Drop for BeginFuture<L> {
    fn drop(&mut self) {
        // A ticket that nobody was given: nothing was written.
        if let Some(Begin::Go(ticket)) = self.0.take() {
            ticket.cancel();
        }
    }
}

impl<L: Way> PendingWrite<L> {
    /// What is to be written.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The ticket, if the node is open by now.
    pub fn try_begin(&mut self) -> Option<Ticket<L>> {
        let entry = self.lane.node.gate.try_enter_late(&self.lane.counter)?;
        Some(Ticket::new(self.lane.clone(), self.range, entry))
    }

    /// The ticket if the node is open by now; else `waker` is called when it is worth asking again.
    /// The waker of the last call counts.
    pub fn poll_begin(&mut self, waker: &Waker) -> Poll<Ticket<L>> {
        let gate = &self.lane.node.gate;
        let id = *self.id.get_or_insert_with(|| gate.new_waiter());
        match gate.enter_or_wait(&self.lane.counter, id, waker) {
            Some(entry) => Poll::Ready(Ticket::new(self.lane.clone(), self.range, entry)),
            None => Poll::Pending,
        }
    }
}

impl<L: Way> Drop for PendingWrite<L> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.lane.node.gate.forget_writer(id);
        }
    }
}

impl<L: Way> fmt::Debug for PendingWrite<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingWrite")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl Quiesce {
    /// The guard, if no write is in flight any more; else this again, with the gate still closed.
    ///
    /// # Errors
    ///
    /// `self`, if a write is still in flight.
    pub fn try_guard(mut self) -> Result<QuiesceGuard, Self> {
        match self.poll_guard(None) {
            Poll::Ready(guard) => Ok(guard),
            Poll::Pending => Err(self),
        }
    }

    /// The guard if no write is in flight any more; else the waker, if one is given, is called when it
    /// is worth asking again. Not to be called again once the guard was given.
    ///
    /// # Panics
    ///
    /// If the guard was given already.
    pub fn poll_guard(&mut self, waker: Option<&Waker>) -> Poll<QuiesceGuard> {
        let node = self.node.as_ref().expect("the guard was not given yet");
        if !node.gate.is_quiet(self.id, waker) {
            return Poll::Pending;
        }
        // The gate stays closed: the guard opens it in our place.
        let node = self.node.take().expect("taken just now");
        Poll::Ready(QuiesceGuard { node })
    }
}

impl Future for Quiesce {
    type Output = QuiesceGuard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<QuiesceGuard> {
        self.poll_guard(Some(cx.waker()))
    }
}

impl Drop for Quiesce {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            node.gate.forget_quiescer(self.id);
            node.gate.open();
        }
    }
}

impl fmt::Debug for Quiesce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quiesce").finish_non_exhaustive()
    }
}

impl Drop for QuiesceGuard {
    fn drop(&mut self) {
        self.node.gate.open();
    }
}

impl QuiesceGuard {
    /// Whether it quiesces `node`.
    #[must_use]
    pub fn is_of(&self, node: &Node) -> bool {
        Arc::ptr_eq(&self.node, node.inner())
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for QuiesceGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuiesceGuard").finish_non_exhaustive()
    }
}

impl JobBitmap {
    /// The bitmap as it is now: everything recorded so far is moved into it first.
    #[must_use]
    pub fn lock(&self) -> JobBitmapGuard<'_> {
        let mut bitmaps = self.node.bitmaps.lock();
        self.node.drain_into(&mut bitmaps);
        JobBitmapGuard {
            bitmaps,
            id: self.id,
        }
    }

    /// Has `waker` called by the next write that settles. What settled before must be looked for
    /// afterwards.
    pub(crate) fn wake_at_write(&self, waker: &Waker) {
        self.node.gate.arm(self.waiter, waker);
    }

    /// Whether something is dirty. If not, `waker` is called when something was written.
    pub fn poll_dirty(&self, waker: &Waker) -> Poll<()> {
        let gate = &self.node.gate;
        let is_dirty = if gate.rules.keeps(GateRule::ArmThenLook) {
            gate.arm(self.waiter, waker);
            self.is_dirty()
        } else {
            let is_dirty = self.is_dirty();
            gate.arm(self.waiter, waker);
            is_dirty
        };
        if is_dirty {
            gate.disarm(self.waiter);
            return Poll::Ready(());
        }
        Poll::Pending
    }

    fn is_dirty(&self) -> bool {
        self.node.has_recorded() || !self.lock().is_clean()
    }
}

impl Drop for JobBitmap {
    fn drop(&mut self) {
        self.node.gate.disarm(self.waiter);
        let mut bitmaps = self.node.bitmaps.lock();
        bitmaps.by_id.remove(&self.id);
        if bitmaps.by_id.is_empty() {
            bitmaps.recording = None;
            self.node.gate.record_in(None);
        }
    }
}

/// Does not look into the bitmap: that takes the node's lock.
impl fmt::Debug for JobBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobBitmap")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl JobBitmapGuard<'_> {
    /// As [`HBitmap::set`].
    ///
    /// # Errors
    ///
    /// As [`HBitmap::set`].
    pub fn set(&mut self, range: ByteRange) -> Result<bool, RangeError> {
        self.bitmap_mut().set(range)
    }

    /// As [`HBitmap::reset`].
    ///
    /// # Errors
    ///
    /// As [`HBitmap::reset`].
    pub fn reset(&mut self, range: ByteRange) -> Result<bool, RangeError> {
        self.bitmap_mut().reset(range)
    }

    /// As [`HBitmap::reset_inner`].
    ///
    /// # Errors
    ///
    /// As [`HBitmap::reset_inner`].
    pub fn reset_inner(&mut self, range: ByteRange) -> Result<bool, RangeError> {
        self.bitmap_mut().reset_inner(range)
    }

    /// As [`HBitmap::reset_all`].
    pub fn reset_all(&mut self) -> bool {
        self.bitmap_mut().reset_all()
    }

    /// As [`HBitmap::set_all`].
    pub fn set_all(&mut self) -> bool {
        self.bitmap_mut().set_all()
    }

    fn bitmap_mut(&mut self) -> &mut HBitmap {
        self.bitmaps
            .by_id
            .get_mut(&self.id)
            .expect("it is removed when the owner is dropped")
    }
}

impl Deref for JobBitmapGuard<'_> {
    type Target = HBitmap;

    fn deref(&self) -> &HBitmap {
        &self.bitmaps.by_id[&self.id]
    }
}

impl fmt::Debug for JobBitmapGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Drop for JobClaim {
    fn drop(&mut self) {
        self.node.bitmaps.lock().is_claimed = false;
    }
}
