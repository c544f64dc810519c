//! The bitmaps of jobs, and that a job works on a node.

use std::fmt;
use std::ops::Deref;
use std::task::{Poll, Waker};

use super::bitmaps::{BitmapClaim, Body, BusyWith, ClaimEnd, List, Locked};
use super::gate::{GateRule, WaiterId};
use super::record::{LOG_EXPONENT_MAX, LOG_EXPONENT_MIN};
use super::{Inner, Node, QuiesceGuard};
use crate::bitmap::{CreateError, HBitmap, MergeError, RangeError};
use crate::log::DirtyLogError;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::{Arc, MutexGuard};
use crate::units::{ByteRange, Granularity};

/// A bitmap without a name, of one owner, that records what is written to a node.
///
/// It is detached when it is dropped.
pub struct JobBitmap {
    /// `None` once it is detached.
    node: Option<Arc<Inner>>,
    id: u64,
    waiter: WaiterId,
}

/// A [`JobBitmap`] under the node's lock, with everything in it that was written before it was taken; or the
/// bits of a [`BitmapClaim`].
///
/// Nothing else may be asked of the node on this thread while it lives, but for guest writes that do not go to a
/// mirror's target as well.
pub struct JobBitmapGuard<'a> {
    list: MutexGuard<'a, List>,
    id: u64,
}

/// That a job works on the node; gone when dropped.
#[derive(Debug)]
pub(crate) struct JobClaim {
    node: Arc<Inner>,
}

/// Why recording could not start.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// The guard quiesces another node.
    #[error("the guard is that of another node")]
    OtherNode,
    /// The disk is being resized, or was since the bitmap was made.
    #[error("the disk is being resized")]
    Resized,
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
        // What is in a log now was written before: it is not for the new bitmap.
        let mut list = self.inner().lock_drained();
        Inner::track(self.inner(), &mut list, bitmap).map_err(|(error, _)| error)
    }

    /// Takes the node for a job, unless another has it.
    pub(crate) fn claim_for_job(&self) -> Option<JobClaim> {
        let node = Arc::clone(self.inner());
        let mut list = node.list.lock();
        if list.taken.is_some() {
            return None;
        }
        list.taken = Some(BusyWith::Job);
        drop(list);
        Some(JobClaim { node })
    }
}

impl Inner {
    /// The node is quiesced and drained. On error nothing has changed, and the bitmap is given back.
    fn track(
        node: &Arc<Self>,
        list: &mut List,
        bitmap: HBitmap,
    ) -> Result<JobBitmap, (TrackError, HBitmap)> {
        if list.check_not_resizing().is_err() || bitmap.len() != node.len() {
            return Err((TrackError::Resized, bitmap));
        }
        if let Err(error) = node.record_in(list, bitmap.granularity()) {
            return Err((error.into(), bitmap));
        }
        let id = list.push(Body::Job(bitmap));
        Ok(JobBitmap {
            node: Some(Arc::clone(node)),
            id,
            waiter: node.gate.new_waiter(),
        })
    }
}

impl Locked<'_> {
    /// As [`Node::track`], into a bitmap that was made for this node before, and has its memory. On error
    /// nothing has changed, and it is given back.
    pub(crate) fn track(
        &mut self,
        node: &Node,
        guard: &QuiesceGuard,
        bitmap: HBitmap,
    ) -> Result<JobBitmap, (TrackError, HBitmap)> {
        let is_quiesced = guard.is_of(node) || is_broken(Sabotage::AttachWithoutQuiesce);
        assert!(is_quiesced, "a job quiesces its own node");
        let exponent = bitmap.granularity().exponent();
        assert!(
            (LOG_EXPONENT_MIN..=LOG_EXPONENT_MAX).contains(&exponent),
            "a job has checked its granularity"
        );
        Inner::track(node.inner(), self.list(node), bitmap)
    }

    /// As if it had never recorded. The bitmap is given back.
    pub(crate) fn untrack(&mut self, node: &Node, mut tracked: JobBitmap) -> HBitmap {
        let inner = tracked.node.take().expect("not detached before");
        inner.gate.disarm(tracked.waiter);
        let list = self.list(node);
        let removed = list.remove(tracked.id).expect("its owner has it");
        inner.stop_if_unused(list);
        let Body::Job(bitmap) = removed.body else {
            unreachable!("it has no name");
        };
        bitmap
    }
}

impl JobBitmap {
    /// The bitmap as it is now: everything recorded so far is moved into it first.
    ///
    /// Where this thread has a guard of the node already, this never returns. A guard that is not bound to a name
    /// lives until the end of its statement: two calls in one expression are a deadlock.
    #[must_use]
    pub fn lock(&self) -> JobBitmapGuard<'_> {
        JobBitmapGuard::new(self.node().lock_drained(), self.id)
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    fn node(&self) -> &Arc<Inner> {
        self.node.as_ref().expect("what detaches it consumes it")
    }

    /// Stops to record, and ends the claim of a named bitmap at the same moment: no write is between the
    /// two. `complete` is given what was recorded, to add what else is left; that is what the claimed bitmap
    /// gets if it [is to](ClaimEnd::Left), and what is returned.
    pub(crate) fn detach(
        mut self,
        claim: Option<(BitmapClaim, ClaimEnd)>,
        complete: impl FnOnce(&mut HBitmap),
    ) -> HBitmap {
        let node = self.node.take().expect("not detached before");
        node.gate.disarm(self.waiter);
        let mut list = node.lock_drained();
        let removed = list.remove(self.id).expect("its owner has it");
        let Body::Job(mut left) = removed.body else {
            unreachable!("it has no name");
        };
        complete(&mut left);
        let unused = claim.map(|(claim, end)| claim.end_in(&mut list, end, &left));
        node.stop_if_unused(&mut list);
        drop(list);
        drop(unused);
        left
    }

    /// Has `waker` called by the next write that settles. What settled before must be looked for
    /// afterwards.
    pub(crate) fn wake_at_write(&self, waker: &Waker) {
        self.node().gate.arm(self.waiter, waker);
    }

    /// Whether something is dirty. If not, `waker` is called when something was written.
    pub fn poll_dirty(&self, waker: &Waker) -> Poll<()> {
        let gate = &self.node().gate;
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
        self.node().has_recorded() || !self.lock().is_clean()
    }
}

impl Drop for JobBitmap {
    fn drop(&mut self) {
        let Some(node) = self.node.take() else {
            return;
        };
        node.gate.disarm(self.waiter);
        let mut list = node.list.lock();
        let removed = list.remove(self.id);
        node.stop_if_unused(&mut list);
        drop(list);
        drop(removed);
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

impl<'a> JobBitmapGuard<'a> {
    pub(super) fn new(list: MutexGuard<'a, List>, id: u64) -> Self {
        Self { list, id }
    }

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

    /// As [`HBitmap::merge_from`].
    ///
    /// # Errors
    ///
    /// As [`HBitmap::merge_from`].
    pub fn merge_from(&mut self, other: &HBitmap) -> Result<bool, MergeError> {
        self.bitmap_mut().merge_from(other)
    }

    /// As [`HBitmap::copy_from`].
    ///
    /// # Errors
    ///
    /// As [`HBitmap::copy_from`].
    pub fn copy_from(&mut self, other: &HBitmap) -> Result<(), MergeError> {
        self.bitmap_mut().copy_from(other)
    }

    /// The bitmap itself, for those who change it in ways of their own.
    pub(crate) fn bitmap_mut(&mut self) -> &mut HBitmap {
        self.list.job_map_mut(self.id)
    }
}

impl Deref for JobBitmapGuard<'_> {
    type Target = HBitmap;

    fn deref(&self) -> &HBitmap {
        self.list.job_map(self.id)
    }
}

impl fmt::Debug for JobBitmapGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Drop for JobClaim {
    fn drop(&mut self) {
        self.node.list.lock().taken = None;
    }
}
