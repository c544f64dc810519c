//! A device for a guest whose path is async: writes pass the node's gate on their way.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::{Mutex, RwLock};

use crate::copy::{Extent, Limits, RangeLimits, Unmap};
use crate::io::{BlockDevice, BufResult, BufferPool, ReadAt, WriteAt};
use crate::node::{Lane, Node, OwnedTicket, QuiesceGuard, TargetWrite, WriteRefused};
// Not that of the devices where loom looks at the gate.
use crate::sync::Arc as LaneArc;
use crate::units::ByteRange;

/// A guest's disk: a device behind the gate of a [`Node`], which can be exchanged for another while
/// the node is quiesced.
///
/// Writes, write-zeroes and discards wait while the node is quiesced and are recorded when they have
/// settled; each picks the device after it was let in, so that one that waited for a switch goes to the
/// new device only. While the node refuses them they fail with `PermissionDenied`, and nothing is written. Reads and flushes go straight to the device.
///
/// Made [with a pool](Self::with_pool) it can take part in a [write-blocking](crate::CopyMode::WriteBlocking)
/// mirror: see [`copy_to`](Self::copy_to).
///
/// # Cancel safety
///
/// A write whose future is dropped may still reach the device. It counts as in flight until the device
/// has settled: the next write through this disk sees to that, one that waits to be let in, or
/// [`settle`](WriteAt::settle). Until then the node cannot be quiesced.
/// Let the disk [`settle`](WriteAt::settle) before it is dropped: dropping it says that all has settled.
#[derive(Debug)]
pub struct GuestDisk<D, C = NoCopies> {
    node: Node,
    device: RwLock<Arc<D>>,
    copies: C,
    abandoned: Mutex<Abandoned<D>>,
}

/// Writes whose futures were dropped while a device may still be at work on them.
#[derive(Debug)]
struct Abandoned<D> {
    unsettled: Vec<Unsettled<D>>,
    /// Writes that wait to be let in, maybe for one that comes here.
    waiting: BTreeMap<u64, Waker>,
    next_id: u64,
}

/// A [`GuestDisk`] that never copies what is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCopies;

/// A [`GuestDisk`] that copies what is written to the target of a mirror, if it has one, with buffers of that pool.
#[derive(Debug)]
pub struct CopiesTo<D, P> {
    target: RwLock<Option<Arc<D>>>,
    pool: P,
}

/// What a [`GuestDisk`] knows of a mirror's target: [`NoCopies`], or [`CopiesTo`].
pub trait Copies<D: BlockDevice>: sealed::Sealed {
    /// The target, if there is one.
    #[doc(hidden)]
    fn target(&self) -> Option<Arc<D>>;

    /// A buffer.
    #[doc(hidden)]
    fn take(&self, len: usize) -> io::Result<D::Buf>;

    /// Gives it back.
    #[doc(hidden)]
    fn put(&self, buf: D::Buf);
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::NoCopies {}
    impl<D, P> Sealed for super::CopiesTo<D, P> {}
}

impl<D: BlockDevice> Copies<D> for NoCopies {
    fn target(&self) -> Option<Arc<D>> {
        None
    }

    fn take(&self, _len: usize) -> io::Result<D::Buf> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn put(&self, _buf: D::Buf) {}
}

impl<D: BlockDevice, P: BufferPool<Buf = D::Buf>> Copies<D> for CopiesTo<D, P> {
    fn target(&self) -> Option<Arc<D>> {
        self.target.read().clone()
    }

    fn take(&self, len: usize) -> io::Result<D::Buf> {
        self.pool.take(len)
    }

    fn put(&self, buf: D::Buf) {
        self.pool.put(buf);
    }
}

/// A write that may still change a device.
#[derive(Debug)]
enum Unsettled<D> {
    /// The disk's own.
    Source(OwnedTicket),
    /// The target of a mirror.
    Target(TargetWrite<LaneArc<Lane>>, Arc<D>),
}

impl<D> Default for Abandoned<D> {
    fn default() -> Self {
        Self {
            unsettled: Vec::new(),
            waiting: BTreeMap::new(),
            next_id: 0,
        }
    }
}

/// A write in flight; hands over to the disk what is unsettled when it is dropped half-way.
struct InFlight<'a, D, C> {
    disk: &'a GuestDisk<D, C>,
    unsettled: Option<Unsettled<D>>,
}

impl<D> GuestDisk<D> {
    /// The disk of `node`, on `device`.
    pub fn new(node: Node, device: Arc<D>) -> Self {
        Self {
            node,
            device: RwLock::new(device),
            copies: NoCopies,
            abandoned: Mutex::default(),
        }
    }
}

impl<D: BlockDevice, P: BufferPool<Buf = D::Buf>> GuestDisk<D, CopiesTo<D, P>> {
    /// As [`new`](GuestDisk::new), for a disk that is to take part in write-blocking mirrors. The buffers of `pool`
    /// must be such as the disk and every target take.
    pub fn with_pool(node: Node, device: Arc<D>, pool: P) -> Self {
        Self {
            node,
            device: RwLock::new(device),
            copies: CopiesTo {
                target: RwLock::new(None),
                pool,
            },
            abandoned: Mutex::default(),
        }
    }

    /// Where active writes go as well, as long as the node has a
    /// [write-blocking](crate::CopyMode::WriteBlocking) mirror. It is that mirror's target, to be told before the mirror
    /// starts; `None` when it is over. What a write finds no target for, no buffer, or no way to ask the target
    /// for, the mirror copies later.
    ///
    /// Of an active write a copy is taken before it is written anywhere, and both devices are given that: the guest
    /// may change its memory meanwhile, and they must not differ.
    ///
    /// A discard is copied later in any case: what it leaves behind only the disk can tell.
    pub fn copy_to(&self, target: Option<Arc<D>>) {
        let before = std::mem::replace(&mut *self.copies.target.write(), target);
        drop(before);
    }
}

impl<D, C> GuestDisk<D, C> {
    /// The node whose gate writes pass.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Those writes may still change a device. One that waits to be let in settles them, if one does.
    fn abandon(&self, unsettled: &mut Vec<Unsettled<D>>) {
        if unsettled.is_empty() {
            return;
        }
        let mut abandoned = self.abandoned.lock();
        abandoned.unsettled.append(unsettled);
        let wakers = std::mem::take(&mut abandoned.waiting);
        drop(abandoned);
        wakers.into_values().for_each(Waker::wake);
    }

    /// The device it is on now.
    #[must_use]
    pub fn device(&self) -> Arc<D> {
        Arc::clone(&self.device.read())
    }

    /// Exchanges the device for another and returns the old one. The guard says that no write is in
    /// flight on the old one.
    ///
    /// # Errors
    ///
    /// `device` back, if the guard is that of another node.
    pub fn replace(&self, guard: &QuiesceGuard, device: Arc<D>) -> Result<Arc<D>, Arc<D>> {
        if !guard.is_of(&self.node) {
            return Err(device);
        }
        Ok(std::mem::replace(&mut *self.device.write(), device))
    }
}

impl<D: WriteAt, C: Copies<D>> GuestDisk<D, C> {
    /// Waits until a write is let in. The device is to be chosen after that.
    async fn begin(&self, range: ByteRange) -> Result<InFlight<'_, D, C>, WriteRefused> {
        self.settle_abandoned().await;
        let mut begun = pin!(self.node.begin_write_owned(range).into_future());
        let mut waits = Waits {
            disk: self,
            id: None,
        };
        let ticket = loop {
            let ticket = poll_fn(|cx| match begun.as_mut().poll(cx) {
                Poll::Ready(ticket) => Poll::Ready(Some(ticket)),
                // Nobody else may ever settle what it waits for.
                Poll::Pending if waits.must_settle(cx.waker()) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            })
            .await;
            match ticket {
                Some(ticket) => break ticket?,
                None => self.settle_abandoned().await,
            }
        };
        Ok(InFlight {
            disk: self,
            unsettled: Some(Unsettled::Source(ticket)),
        })
    }

    async fn settle_abandoned(&self) {
        if self.abandoned.lock().unsettled.is_empty() {
            return;
        }
        // Only those that are here now: one abandoned while we wait is not covered by this settle. If
        // this future is dropped, too, they go back.
        let mut taken = Taken {
            disk: self,
            unsettled: std::mem::take(&mut self.abandoned.lock().unsettled),
        };
        self.device().settle().await;
        let mut settled: Option<Arc<D>> = None;
        for unsettled in &taken.unsettled {
            let Unsettled::Target(_, target) = unsettled else {
                continue;
            };
            // As a rule they are all of one.
            if !settled
                .as_ref()
                .is_some_and(|known| Arc::ptr_eq(known, target))
            {
                target.settle().await;
                settled = Some(Arc::clone(target));
            }
        }
        taken.unsettled.clear();
    }

    /// An active write: a copy of the data goes to the disk, and then to the target.
    async fn write_both(
        &self,
        mut in_flight: InFlight<'_, D, C>,
        target: Arc<D>,
        range: ByteRange,
        copy: D::Buf,
    ) -> io::Result<()> {
        let (result, copy) = self.device().write_at(range.start(), copy).await;
        let Some(part) = in_flight.source_written(&result, &target) else {
            self.copies.put(copy);
            return result;
        };
        // A device that gives back another length has given back something else than the copy.
        let is_whole = copy.as_ref().len() as u64 == range.len();
        let fits = is_whole && part.len() <= u64::from(target.limits().max_transfer);
        let data = match part == range || !fits {
            true => Some(copy),
            false => {
                let start = (part.start() - range.start()) as usize;
                let data = self.copy_of(&copy.as_ref()[start..start + part.len() as usize]);
                self.copies.put(copy);
                data
            }
        };
        match data {
            Some(data) if fits => {
                let (at_target, data) = target.write_at(part.start(), data).await;
                in_flight.target_written(at_target);
                self.copies.put(data);
            }
            Some(data) => {
                self.copies.put(data);
                in_flight.skip_target();
            }
            None => in_flight.skip_target(),
        }
        result
    }

    /// The same in a buffer of the pool, if that has one.
    fn copy_of(&self, data: &[u8]) -> Option<D::Buf> {
        let mut copy = self.copies.take(data.len()).ok()?;
        if copy.as_ref().len() != data.len() {
            self.copies.put(copy);
            return None;
        }
        copy.as_mut().copy_from_slice(data);
        Some(copy)
    }
}

impl<D, C> InFlight<'_, D, C> {
    /// The write has settled.
    fn finish<R>(mut self, result: R) -> R {
        match self.unsettled.take() {
            Some(Unsettled::Source(ticket)) => ticket.finish(result),
            Some(Unsettled::Target(..)) | None => {
                unreachable!("only dropping takes it otherwise")
            }
        }
    }

    fn is_active(&self) -> bool {
        matches!(&self.unsettled, Some(Unsettled::Source(ticket)) if ticket.is_active())
    }

    /// The write has settled on the disk. What of it the target is to get, if anything.
    fn source_written(&mut self, result: &io::Result<()>, target: &Arc<D>) -> Option<ByteRange> {
        let Some(Unsettled::Source(ticket)) = self.unsettled.take() else {
            return None;
        };
        let write = ticket.source_written(result.is_ok())?;
        let part = write.range();
        self.unsettled = Some(Unsettled::Target(write, Arc::clone(target)));
        Some(part)
    }

    fn target_written(mut self, result: io::Result<()>) {
        if let Some(Unsettled::Target(write, _)) = self.unsettled.take() {
            write.finish(result);
        }
    }

    fn skip_target(mut self) {
        if let Some(Unsettled::Target(write, _)) = self.unsettled.take() {
            write.skip();
        }
    }
}

/// What is being settled.
struct Taken<'a, D, C> {
    disk: &'a GuestDisk<D, C>,
    unsettled: Vec<Unsettled<D>>,
}

impl<D, C> Drop for Taken<'_, D, C> {
    fn drop(&mut self) {
        self.disk.abandon(&mut self.unsettled);
    }
}

impl<D, C> Drop for InFlight<'_, D, C> {
    fn drop(&mut self) {
        if let Some(unsettled) = self.unsettled.take() {
            self.disk.abandon(&mut vec![unsettled]);
        }
    }
}

/// A write that waits to be let in.
struct Waits<'a, D, C> {
    disk: &'a GuestDisk<D, C>,
    id: Option<u64>,
}

impl<D, C> Waits<'_, D, C> {
    /// Whether something is there to be settled. If not, `waker` is called when something is.
    fn must_settle(&mut self, waker: &Waker) -> bool {
        // Foreign code, both the making and the dropping of it.
        let waker = waker.clone();
        let mut abandoned = self.disk.abandoned.lock();
        if !abandoned.unsettled.is_empty() {
            return true;
        }
        let next_id = &mut abandoned.next_id;
        let id = *self.id.get_or_insert_with(|| {
            *next_id += 1;
            *next_id
        });
        let unused = abandoned.waiting.insert(id, waker);
        drop(abandoned);
        drop(unused);
        false
    }
}

impl<D, C> Drop for Waits<'_, D, C> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let unused = self.disk.abandoned.lock().waiting.remove(&id);
            drop(unused);
        }
    }
}

impl<D: BlockDevice, C> BlockDevice for GuestDisk<D, C> {
    type Buf = D::Buf;

    fn limits(&self) -> Limits {
        self.device().limits()
    }
}

impl<D: ReadAt, C> ReadAt for GuestDisk<D, C> {
    async fn read_at(&self, offset: u64, buf: D::Buf) -> BufResult<D::Buf> {
        self.device().read_at(offset, buf).await
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.device().block_status(range).await
    }
}

impl<D: WriteAt, C: Copies<D>> WriteAt for GuestDisk<D, C> {
    async fn write_at(&self, offset: u64, buf: D::Buf) -> BufResult<D::Buf> {
        let len = buf.as_ref().len() as u64;
        let Some(range) = ByteRange::at(offset, len) else {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the write ends past 2^64");
            return (Err(error), buf);
        };
        let in_flight = match self.begin(range).await {
            Ok(in_flight) => in_flight,
            Err(refused) => return (Err(refused.into()), buf),
        };
        let target = in_flight
            .is_active()
            .then(|| self.copies.target())
            .flatten();
        let copy = target.and_then(|target| Some((target, self.copy_of(buf.as_ref())?)));
        let Some((target, copy)) = copy else {
            return in_flight.finish(self.device().write_at(offset, buf).await);
        };
        let result = self.write_both(in_flight, target, range, copy).await;
        (result, buf)
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        let mut in_flight = self.begin(range).await?;
        let target = in_flight
            .is_active()
            .then(|| self.copies.target())
            .flatten();
        let result = self.device().write_zeroes(range, unmap).await;
        let Some(target) = target else {
            return in_flight.finish(result);
        };
        if let Some(part) = in_flight.source_written(&result, &target) {
            let limits = target.limits();
            let takes = |zeroes: RangeLimits| zeroes.takes(part, limits.len);
            match limits.write_zeroes.is_some_and(takes) {
                true => in_flight.target_written(target.write_zeroes(part, unmap).await),
                false => in_flight.skip_target(),
            }
        }
        result
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        // What was discarded may read as anything now, or as zeroes, or as before. The mirror asks the disk
        // later, and has the target read alike.
        let in_flight = self.begin(range).await?;
        in_flight.finish(self.device().discard(range).await)
    }

    async fn flush(&self) -> io::Result<()> {
        self.device().flush().await
    }

    async fn settle(&self) {
        self.settle_abandoned().await;
        self.device().settle().await;
    }

    fn cancel_in_flight(&self) {
        self.device().cancel_in_flight();
    }
}
