//! One disk: the gate that every guest write passes, and the bitmaps that record what was written.
//!
//! ```text
//!  guest ─▶ begin_write ─▶ Go(ticket) ─▶ the VMM's own write ─▶ ticket.finish(result)
//!               │                                                    │
//!               ├▶ Wait(pending): the node is quiesced, or           └▶ log ─ ─ drained into ─▶ bitmaps
//!               │  a job must save first what is there
//!               └▶ Refused: a bitmap is read-only and could not record it, or that job has given up
//! ```
//!
//! This layer knows no jobs, no devices and no executor. It can be used without the rest: to hold a
//! guest's writes for a moment, or to know what was written.
//!
//! | file | what |
//! |---|---|
//! | `gate` | letting writes in, holding them, refusing them |
//! | `hold` | holding back single writes, until what they would overwrite is saved |
//! | `active` | writes that go to a mirror's target as well, and what they must not meet |
//! | `lane`, `ticket`, `quiesce` | what callers have of it |
//! | `record`, `growing` | from the end of a write to the bitmaps |
//! | `job_bitmap` | bitmaps of jobs, without a name |
//! | `bitmaps` | those with a name, and all that may be asked of them |
//! | `resize` | a disk that changes its length |
//!
//! Invariants, beside those of the gate:
//!
//! 1. A write is recorded after it settled and before it counts as finished, whether it succeeded or
//!    not: a failed write may have landed in part. A ticket that is dropped records, too.
//! 2. Whether and where a write is recorded is fixed when it begins. Recording therefore starts, and
//!    moves to another log, only while the node is quiesced: [`Node::track`], [`Bitmaps::add`] and
//!    [`Bitmaps::enable`] want the guard.
//! 3. One log at a time is written to. Its granularity is that of the finest bitmap or finer.
//! 4. Whoever looks at a bitmap drains the log into **every** bitmap that records first, under one lock. So
//!    a guest write costs the same with one bitmap or ten.
//! 5. The length of the disk changes only while the node is quiesced. Bitmaps and the log that is written
//!    to are as long, or longer.

mod active;
mod bitmaps;
mod gate;
mod growing;
mod hold;
mod job_bitmap;
mod lane;
mod quiesce;
mod ranges;
mod record;
mod resize;
mod ticket;

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use crate::sync::{Arc, Mutex};
use crate::units::ByteRange;

pub(crate) use active::{ActiveClaims, ActiveLock, ActiveWrites};
use bitmaps::List;
pub(crate) use bitmaps::{BitmapArrival, ClaimEnd, Journal, Locked, Released};
pub use bitmaps::{
    BitmapClaim, BitmapError, BitmapExport, BitmapHold, BitmapInfo, BitmapOptions, BitmapState,
    BitmapStorage, Bitmaps, BusyWith, CannotPersist, ClaimFor, DirtyRuns, FrozenBitmap, SnapshotOf,
};
#[cfg(loom)]
#[doc(hidden)]
pub use gate::GateRule;
use gate::{Gate, Rules};
use growing::GrowingLog;
pub(crate) use hold::{HoldError, WaitingWrite, WriteHold};
pub(crate) use job_bitmap::JobClaim;
pub use job_bitmap::{JobBitmap, JobBitmapGuard, TrackError};
pub use lane::{GuestQueue, Lane};
pub use quiesce::{Quiesce, QuiesceGuard};
use record::LOGS;
pub use resize::{Grown, Resize};
pub use ticket::{
    Begin, BeginFuture, NotSaved, OwnedTicket, PendingWrite, TargetWrite, Ticket, Way, WriteRefused,
};

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

struct Inner {
    /// Changes only while no write is inside, and is ordered by what sees to that.
    len: AtomicU64,
    gate: Gate,
    /// One place per granularity, filled when it is first needed. A log that was outgrown stays: its
    /// memory is that of one more bitmap of its granularity.
    logs: [OnceLock<Box<GrowingLog>>; LOGS],
    /// All bitmaps, of jobs and with a name.
    list: Mutex<List>,
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
            len: AtomicU64::new(len),
            gate: Gate::new(rules),
            logs: std::array::from_fn(|_| OnceLock::new()),
            list: Mutex::new(List::default()),
        });
        Self {
            lane: Lane::of(node, true),
        }
    }

    /// Length of the disk in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a disk is no collection")]
    pub fn len(&self) -> u64 {
        self.inner().len()
    }

    /// Asks to write, write zeroes to, or discard `range`.
    ///
    /// While a bitmap of the node is [read-only](Bitmaps::mark_readonly) it is refused. While a backup
    /// runs it may have to wait until what it would overwrite is saved.
    ///
    /// What lies past [the end](Self::len) of the disk is not recorded, also if the disk grows later: a guest is
    /// told of a new length after the [resize](Self::resize) was committed. Only writes that do not overlap may
    /// be ordered freely by the VMM; the node does not order them either.
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
        GuestQueue::new(Lane::of(Arc::clone(self.inner()), false))
    }

    /// Closes the gate at once, and waits for the writes in flight.
    ///
    /// Several may hold the node quiesced; it opens when the last has let go. A job of the node goes on
    /// meanwhile, for it only reads the disk: to stop one there is [`Job::hold`](crate::Job::hold).
    pub fn quiesce(&self) -> Quiesce {
        Quiesce::new(Arc::clone(self.inner()))
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

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
