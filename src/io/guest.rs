//! A device for a guest whose path is async: writes pass the node's gate on their way.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::copy::{Extent, Limits, Unmap};
use crate::io::{BlockDevice, BufResult, ReadAt, WriteAt};
use crate::node::{Node, OwnedTicket, QuiesceGuard, WriteRefused};
use crate::units::ByteRange;

/// A guest's disk: a device behind the gate of a [`Node`], which can be exchanged for another while
/// the node is quiesced.
///
/// Writes, write-zeroes and discards wait while the node is quiesced and are recorded when they have
/// settled; each picks the device after it was let in, so that one that waited for a switch goes to the
/// new device only. While the node refuses them they fail with `PermissionDenied`, and nothing is written. Reads and flushes go straight to the device.
///
/// # Cancel safety
///
/// A write whose future is dropped may still reach the device. It counts as in flight until the device
/// has settled: the next write through this disk sees to that, or [`settle`](WriteAt::settle). Until
/// then the node cannot be quiesced.
/// Let the disk [`settle`](WriteAt::settle) before it is dropped: dropping it says that all has settled.
#[derive(Debug)]
pub struct GuestDisk<D> {
    node: Node,
    device: RwLock<Arc<D>>,
    /// Writes whose futures were dropped while the device may still be at work on them.
    abandoned: Mutex<Vec<OwnedTicket>>,
}

/// A write in flight; hands its ticket over to the disk when it is dropped half-way.
struct InFlight<'a, D> {
    disk: &'a GuestDisk<D>,
    ticket: Option<OwnedTicket>,
}

impl<D> GuestDisk<D> {
    /// The disk of `node`, on `device`.
    pub fn new(node: Node, device: Arc<D>) -> Self {
        Self {
            node,
            device: RwLock::new(device),
            abandoned: Mutex::new(Vec::new()),
        }
    }

    /// The node whose gate writes pass.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
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

impl<D: WriteAt> GuestDisk<D> {
    /// Waits until a write is let in. The device is to be chosen after that.
    async fn begin(&self, range: ByteRange) -> Result<InFlight<'_, D>, WriteRefused> {
        self.settle_abandoned().await;
        let ticket = self.node.begin_write_owned(range).await?;
        Ok(InFlight {
            disk: self,
            ticket: Some(ticket),
        })
    }

    async fn settle_abandoned(&self) {
        if self.abandoned.lock().is_empty() {
            return;
        }
        // Only those that are here now: one abandoned while we wait is not covered by this settle. If
        // this future is dropped, too, they go back.
        let mut taken = Abandoned {
            disk: self,
            tickets: std::mem::take(&mut *self.abandoned.lock()),
        };
        self.device().settle().await;
        taken.tickets.clear();
    }
}

impl<D> InFlight<'_, D> {
    /// The write has settled.
    fn finish<R>(mut self, result: R) -> R {
        let ticket = self.ticket.take();
        let ticket = ticket.expect("only dropping takes it otherwise");
        ticket.finish(result)
    }
}

struct Abandoned<'a, D> {
    disk: &'a GuestDisk<D>,
    tickets: Vec<OwnedTicket>,
}

impl<D> Drop for Abandoned<'_, D> {
    fn drop(&mut self) {
        self.disk.abandoned.lock().append(&mut self.tickets);
    }
}

impl<D> Drop for InFlight<'_, D> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.disk.abandoned.lock().push(ticket);
        }
    }
}

impl<D: BlockDevice> BlockDevice for GuestDisk<D> {
    type Buf = D::Buf;

    fn limits(&self) -> Limits {
        self.device().limits()
    }
}

impl<D: ReadAt> ReadAt for GuestDisk<D> {
    async fn read_at(&self, offset: u64, buf: D::Buf) -> BufResult<D::Buf> {
        self.device().read_at(offset, buf).await
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.device().block_status(range).await
    }
}

impl<D: WriteAt> WriteAt for GuestDisk<D> {
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
        in_flight.finish(self.device().write_at(offset, buf).await)
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        let in_flight = self.begin(range).await?;
        in_flight.finish(self.device().write_zeroes(range, unmap).await)
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
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
