//! Being let in, waiting to be let in, and saying that a write has settled.

use std::fmt;
use std::future::Future;
use std::io;
use std::mem;
use std::ops::Deref;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::Lane;
use super::gate::{Entry, Turned, WaiterId};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;
use crate::units::ByteRange;

/// What became of the wish to write.
///
/// # Examples
///
/// A thread that serves a queue without futures. A write that has to wait is kept, and the thread goes on with
/// others: if it blocked, and were the one that finishes tickets given out before, the node would wait for them and
/// it for the node.
///
/// ```
/// use std::io;
/// use std::task::{Poll, Waker};
/// use blockjob::{Begin, ByteRange, Node};
///
/// # fn write(_: ByteRange) -> io::Result<()> { Ok(()) }
/// let node = Node::new(1 << 20);
/// let waker = Waker::noop(); // in earnest one that wakes this thread, by an eventfd say
/// let (mut waiting, mut told) = (Vec::new(), Vec::new()); // requests kept, and what the guest was told
///
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// match node.begin_write((0..4096).into()) {
///     Begin::Go(ticket) => {
///         let result = write(ticket.range());
///         told.push(ticket.finish(result));
///     }
///     Begin::Wait(pending) => waiting.push(pending),
///     Begin::Refused(refused) => told.push(Err(refused.into())),
/// }
/// drop(guard);
///
/// // In each turn of the thread's loop, and once more before it sleeps:
/// waiting.retain_mut(|pending| {
///     let Poll::Ready(begun) = pending.poll_begin(waker) else { return true };
///     told.push(match begun {
///         Ok(ticket) => {
///             let result = write(ticket.range());
///             ticket.finish(result)
///         }
///         Err(refused) => Err(refused.into()),
///     });
///     false
/// });
/// assert!(waiting.is_empty() && told.len() == 1 && told[0].is_ok());
/// ```
#[must_use = "a write that was let in keeps the node from being quiesced until its ticket is gone"]
pub enum Begin<L: Way> {
    /// Write now, and finish the ticket when the write has settled.
    Go(Ticket<L>),
    /// The node is quiesced, or a backup must save first what would be overwritten, or a write-blocking mirror
    /// is copying what is there: do not write yet.
    Wait(PendingWrite<L>),
    /// Do not write. Tell the guest that its write has failed.
    Refused(WriteRefused),
}

/// Why a write is not let in. Nothing was written, and nothing is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteRefused {
    /// A bitmap of the node is [read-only](crate::Bitmaps::mark_readonly) and could not record it.
    #[error("a dirty bitmap of the disk is read-only, and so is the disk")]
    ReadOnly,
    /// A backup could not save what would be overwritten, and it, not the write, is to be kept whole.
    #[error("what the write would overwrite was not saved: {0}")]
    NotSaved(NotSaved),
}

/// Why something was not saved before it would be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotSaved {
    /// Copying it has failed.
    #[error("copying it has failed")]
    Failed,
    /// The place to save it in is full.
    #[error("there is no space to save it")]
    Full,
    /// It took longer than the guest may have to wait.
    #[error("it took too long")]
    TimedOut,
}

/// The kind tells what to say to the guest: permission denied for a disk that is read-only, timed out, or
/// other.
impl From<WriteRefused> for io::Error {
    fn from(refused: WriteRefused) -> Self {
        let kind = match refused {
            WriteRefused::ReadOnly => io::ErrorKind::PermissionDenied,
            WriteRefused::NotSaved(NotSaved::TimedOut) => io::ErrorKind::TimedOut,
            WriteRefused::NotSaved(NotSaved::Failed | NotSaved::Full) => io::ErrorKind::Other,
        };
        Self::new(kind, refused)
    }
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

/// The second half of a write that goes to a mirror's target as well: the source has it.
///
/// Dropping it without [`finish`](Self::finish) says that nothing which belongs to the write will change the
/// target any more, and that the target may not have it: the mirror copies it later.
#[must_use = "dropping it says that the target does not have the write"]
pub struct TargetWrite<L: Way> {
    /// `None` once the write has left.
    lane: Option<L>,
    /// Of the whole write.
    whole: ByteRange,
    range: ByteRange,
    entry: Entry,
}

/// A [`Ticket`] that borrows nothing, for those who keep it beside a request in flight.
pub type OwnedTicket = Ticket<Arc<Lane>>;

/// How a ticket leads to its [`Lane`]: `&Lane`, or `Arc<Lane>` for one that borrows nothing.
pub trait Way: Deref<Target = Lane> + Clone + Unpin {}

impl<L: Deref<Target = Lane> + Clone + Unpin> Way for L {}

/// A write that waits until the node is no longer quiesced, and what it would overwrite is saved.
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

impl<L: Way> Ticket<L> {
    #[inline]
    fn new(lane: L, range: ByteRange, entry: Entry) -> Self {
        if let (true, Some(log)) = (is_broken(Sabotage::RecordAtBegin), entry.log()) {
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
            lane.give_back(self.range, self.entry);
        }
    }

    /// Whether the write is to go to a mirror's target as well, before the guest is told. It is one that began
    /// while a [write-blocking](crate::CopyMode::WriteBlocking) mirror copies.
    ///
    /// Then the data must not change until both have it: if the guest could still do that, take a copy of it
    /// before the write to the source. Issue that, and then call [`source_written`](Self::source_written). To
    /// call [`finish`](Self::finish) instead is as good for the data: the mirror copies it later.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.entry.is_active()
    }

    /// The write has settled on the source, well or not. What of it is to go to the mirror's target now, if
    /// anything; if nothing, this is [`finish`](Self::finish).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::Node;
    ///
    /// # fn write_to_source() -> std::io::Result<()> { Ok(()) }
    /// # fn write_to_target(_: blockjob::ByteRange) -> std::io::Result<()> { Ok(()) }
    /// let node = Node::new(1 << 20);
    /// let ticket = node.begin_write((0..4096).into()).go().expect("nobody quiesces the node");
    /// let result = write_to_source();
    /// if let Some(write) = ticket.source_written(result.is_ok()) {
    ///     let result = write_to_target(write.range()); // the same operation, on that part of it
    ///     write.finish(result);
    /// }
    /// // Now tell the guest `result`: that of the source.
    /// # assert!(result.is_ok());
    /// ```
    #[inline]
    pub fn source_written(mut self, has_succeeded: bool) -> Option<TargetWrite<L>> {
        if !self.entry.is_active() {
            self.finish(());
            return None;
        }
        let lane = self.lane.take()?;
        let (range, entry) = (self.range, self.entry);
        mem::forget(self);
        TargetWrite::new(lane, range, entry, has_succeeded)
    }
}

impl<L: Way> TargetWrite<L> {
    #[cold]
    fn new(lane: L, range: ByteRange, mut entry: Entry, has_succeeded: bool) -> Option<Self> {
        if is_broken(Sabotage::EndClaimEarly) {
            lane.node.gate.actives.end(range);
            entry = entry.usual();
        }
        let part = match has_succeeded {
            true => lane.node.part_for_target(range),
            false => None,
        };
        if !has_succeeded && is_broken(Sabotage::ForgetFailedSource) {
            lane.give_back(range, entry);
            return None;
        }
        let Some(part) = part else {
            lane.settle(range, entry);
            return None;
        };
        Some(Self {
            lane: Some(lane),
            whole: range,
            range: part,
            entry,
        })
    }

    /// What is to be written to the target: the write, or a part of it. The rest is copied later.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The write has settled on the target, well or not. It does not matter to the guest: if it has failed, the
    /// mirror is told, and does what [its policy](crate::JobOptions::on_target_error) says.
    pub fn finish(mut self, result: io::Result<()>) {
        let Some(lane) = self.lane.take() else {
            return;
        };
        let is_good = result.is_ok() || is_broken(Sabotage::ForgetFailedTarget);
        lane.node.target_done(self.range, Some(result));
        match is_good {
            true => {
                lane.node.record_active(self.whole);
                lane.give_back(self.whole, self.entry);
            }
            false => lane.settle(self.whole, self.entry),
        }
    }

    /// The write was not issued to the target and will not be: the mirror copies it later.
    pub fn skip(self) {
        drop(self);
    }
}

impl<L: Way> Drop for TargetWrite<L> {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            lane.node.target_done(self.range, None);
            lane.settle(self.whole, self.entry);
        }
    }
}

impl<L: Way> fmt::Debug for TargetWrite<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetWrite")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl<L: Way> Drop for Ticket<L> {
    fn drop(&mut self) {
        if is_broken(Sabotage::ForgetDropped) {
            self.entry = self.entry.unrecorded();
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
    pub(super) fn new(lane: L, range: ByteRange) -> Self {
        match lane.node.gate.try_enter(&lane.counter, range) {
            Ok(entry) => Begin::Go(Ticket::new(lane, range, entry)),
            Err(turned) => Self::turned(lane, range, turned),
        }
    }

    #[cold]
    fn turned(lane: L, range: ByteRange, turned: Turned) -> Self {
        let mut pending = PendingWrite {
            lane,
            range,
            id: None,
        };
        if matches!(turned, Turned::Held | Turned::InTheWay) {
            // The job that it waits for is to know at once.
            return match pending.ask(None) {
                Some(Ok(ticket)) => Begin::Go(ticket),
                Some(Err(refused)) => Begin::Refused(refused),
                None => Begin::Wait(pending),
            };
        }
        match turned {
            Turned::Closed | Turned::Held | Turned::InTheWay => Begin::Wait(pending),
            Turned::Refused => Begin::Refused(WriteRefused::ReadOnly),
            Turned::NotSaved(why) => Begin::Refused(WriteRefused::NotSaved(why)),
        }
    }

    /// The ticket, if the write was let in at once. With `None` the write must not be issued: it had to wait, or
    /// was refused, and is given up with this. Who serves a guest [matches](Begin) instead: of what must wait the
    /// guest is to hear later, of what is refused that it has failed.
    #[must_use]
    pub fn go(self) -> Option<Ticket<L>> {
        match self {
            Begin::Go(ticket) => Some(ticket),
            Begin::Wait(_) | Begin::Refused(_) => None,
        }
    }
}

impl<L: Way> fmt::Debug for Begin<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Begin::Go(ticket) => ticket.fmt(f),
            Begin::Wait(pending) => pending.fmt(f),
            Begin::Refused(refused) => refused.fmt(f),
        }
    }
}

/// Awaiting waits until the node is open.
///
/// # Errors
///
/// [`WriteRefused`].
///
/// # Cancel safety
///
/// Dropping the future gives the write up; nothing is recorded.
impl<L: Way> IntoFuture for Begin<L> {
    type Output = Result<Ticket<L>, WriteRefused>;
    type IntoFuture = BeginFuture<L>;

    fn into_future(self) -> BeginFuture<L> {
        BeginFuture(Some(self))
    }
}

impl<L: Way> Future for BeginFuture<L> {
    type Output = Result<Ticket<L>, WriteRefused>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.0.take().expect("not polled after it was ready") {
            Begin::Go(ticket) => Poll::Ready(Ok(ticket)),
            Begin::Refused(refused) => Poll::Ready(Err(refused)),
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

    /// The ticket, or that there will be none, if the write need not wait any more.
    pub fn try_begin(&mut self) -> Option<Result<Ticket<L>, WriteRefused>> {
        self.ask(None)
    }

    /// As [`try_begin`](Self::try_begin); if it must wait, `waker` is called when it is worth asking
    /// again. The waker of the last call counts.
    pub fn poll_begin(&mut self, waker: &Waker) -> Poll<Result<Ticket<L>, WriteRefused>> {
        self.ask(Some(waker)).map_or(Poll::Pending, Poll::Ready)
    }

    fn ask(&mut self, waker: Option<&Waker>) -> Option<Result<Ticket<L>, WriteRefused>> {
        let gate = &self.lane.node.gate;
        let id = *self.id.get_or_insert_with(|| gate.new_waiter());
        match gate.enter_or_wait(&self.lane.counter, id, self.range, waker) {
            Ok(entry) => Some(Ok(Ticket::new(self.lane.clone(), self.range, entry))),
            Err(Turned::Closed | Turned::Held | Turned::InTheWay) => None,
            Err(Turned::Refused) => Some(Err(WriteRefused::ReadOnly)),
            Err(Turned::NotSaved(why)) => Some(Err(WriteRefused::NotSaved(why))),
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
