//! Bitmaps whose bits belong to an operation for a while.

use std::fmt;
use std::mem;

use super::entry::{Content, Intent, Named, Successor, Usage, unshared};
use super::journal::fit;
use super::{BitmapError, Bitmaps, List, Locked, SnapshotOf};
use crate::bitmap::HBitmap;
use crate::node::{Inner, JobBitmapGuard, Node, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;

/// What a claimed bitmap is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimFor {
    /// The operation goes by it and leaves it as it is: it may be read-only. However the claim ends, all bits are kept.
    Reading,
    /// The operation changes it, or abdicates when it succeeds.
    Change,
}

/// How a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimEnd {
    /// The successor takes the place of the bitmap.
    Abdicate,
    /// Both become one again.
    Reclaim,
    /// What an operation has left over becomes the bitmap, and of what was recorded meanwhile nothing else.
    Left,
}

impl ClaimEnd {
    /// The bits of what is read-only, or was to be read only, stay: too much is dirty then, never too little.
    fn of(self, claimed_for: ClaimFor, named: &Named) -> Self {
        match claimed_for {
            ClaimFor::Change if !named.is_readonly() => self,
            ClaimFor::Change | ClaimFor::Reading => ClaimEnd::Reclaim,
        }
    }
}

/// That the bits of a bitmap belong to an operation, a backup as a rule, while an anonymous *successor*
/// records in its place.
///
/// Made by [`Bitmaps::claim`]. It ends in one of two ways: [`abdicate`](Self::abdicate) when the
/// operation has dealt with what was dirty, or [`reclaim`](Self::reclaim), and so when it is dropped, when
/// it has not.
///
/// # Examples
///
/// ```
/// use blockjob::{BitmapOptions, ClaimFor, Node, SnapshotOf};
///
/// let node = Node::new(1 << 20);
/// let bitmaps = node.bitmaps();
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// bitmaps.add(&guard, "daily", BitmapOptions::default())?;
/// drop(guard);
/// let write = |at| node.begin_write((at..at + 1).into()).go().expect("nobody quiesces it").finish(());
///
/// write(0);
/// let claim = bitmaps.claim("daily", ClaimFor::Change)?;
/// write(1 << 19);
/// assert_eq!(claim.snapshot(SnapshotOf::Bitmap)?.dirty_bytes(), 65536);
/// drop(claim); // the backup has failed
/// assert_eq!(bitmaps.query("daily")?.dirty_bytes, 2 * 65536);
///
/// let claim = bitmaps.claim("daily", ClaimFor::Change)?;
/// write(0);
/// claim.abdicate(); // the backup has all that was written before it
/// assert_eq!(bitmaps.query("daily")?.dirty_bytes, 65536);
/// # Ok::<(), blockjob::BitmapError>(())
/// ```
#[must_use = "the claim is given up when this is dropped"]
pub struct BitmapClaim {
    /// `None` once it has ended.
    node: Option<Arc<Inner>>,
    id: u64,
    claimed_for: ClaimFor,
}

impl Bitmaps<'_> {
    /// Takes the bits of a bitmap, which do not change by guest writes from now on, and has a clean
    /// successor record in its place if it did.
    ///
    /// That is one instant for all writes, but not one without writes in flight: such a write is on the
    /// disk by then or not, and recorded by the successor. Where that matters the node is quiesced.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly) if it is for change,
    /// [`Inconsistent`](BitmapError::Inconsistent), [`OutOfMemory`](BitmapError::OutOfMemory).
    pub fn claim(&self, name: &str, claim: ClaimFor) -> Result<BitmapClaim, BitmapError> {
        Locked::new([self.node]).claim((self.node, name), claim, None)
    }
}

impl Locked<'_> {
    /// As [`Bitmaps::claim`]. For the successor `spare` may be taken.
    pub(crate) fn claim(
        &mut self,
        (node, name): (&Node, &str),
        claim: ClaimFor,
        spare: Option<HBitmap>,
    ) -> Result<BitmapClaim, BitmapError> {
        let (id, named) = self.list(node).find_mut(name)?;
        let idle = named.idle(match claim {
            ClaimFor::Reading => Intent::Use,
            ClaimFor::Change => Intent::Change,
        })?;
        let map = fit(spare, node, idle.map.granularity())?;
        let is_enabled = idle.usage.is_enabled();
        *idle.usage = Usage::Claimed(Successor {
            map,
            is_enabled,
            then: None,
        });
        Ok(BitmapClaim {
            node: Some(Arc::clone(node.inner())),
            id,
            claimed_for: claim,
        })
    }

    /// The claimed bits.
    pub(crate) fn claimed(&mut self, node: &Node, claim: &BitmapClaim) -> &HBitmap {
        self.list(node).job_map(claim.id)
    }

    /// An independent copy of them.
    pub(crate) fn copy_of_claimed(
        &mut self,
        node: &Node,
        claim: &BitmapClaim,
    ) -> Result<HBitmap, BitmapError> {
        let named = self.list(node).owned(claim.id);
        named.snapshot(SnapshotOf::Bitmap)
    }

    /// As [`BitmapClaim::reclaim`].
    pub(crate) fn reclaim(&mut self, node: &Node, mut claim: BitmapClaim) {
        claim.node = None;
        let _unused = self
            .list(node)
            .owned_mut(claim.id)
            .end_claim(ClaimEnd::Reclaim);
    }
}

impl BitmapClaim {
    /// The successor takes the place of the bitmap, under its name, with its flags and at its place in
    /// the order; the claimed bits are gone. For an operation that has dealt with them.
    ///
    /// Those of a claim for [`Reading`](ClaimFor::Reading), and of a bitmap that is read-only by now, are kept: this is
    /// [`reclaim`](Self::reclaim) then. Too much is dirty afterwards, never too little.
    pub fn abdicate(mut self) {
        self.end(ClaimEnd::Abdicate);
    }

    /// The bitmap has back its bits and what was recorded meanwhile, and records if its successor did.
    /// Never fails. Dropping the claim does the same.
    pub fn reclaim(mut self) {
        self.end(ClaimEnd::Reclaim);
    }

    /// Has the successor record from now on. It does already if the bitmap did when it was claimed; no
    /// error then.
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard, [`TooLarge`](BitmapError::TooLarge) and
    /// [`OutOfMemory`](BitmapError::OutOfMemory) of the log.
    pub fn enable_successor(&self, guard: &QuiesceGuard) -> Result<(), BitmapError> {
        if !guard.is_of_inner(self.node()) {
            return Err(BitmapError::OtherNode);
        }
        let mut list = self.node().lock_drained();
        let granularity = list.owned(self.id).granularity();
        self.node().start_recording(&mut list, granularity)?;
        list.owned_mut(self.id).successor_mut().is_enabled = true;
        Ok(())
    }

    /// A copy of the claimed bits, alone or with those of the successor at this moment.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](BitmapError::OutOfMemory).
    pub fn snapshot(&self, of: SnapshotOf) -> Result<HBitmap, BitmapError> {
        self.node().lock_drained().owned(self.id).snapshot(of)
    }

    /// The claimed bits, to change them: those of a backup that keeps what it has copied, say.
    ///
    /// # Errors
    ///
    /// [`ReadOnly`](BitmapError::ReadOnly), also if the claim is for [`Reading`](ClaimFor::Reading).
    pub fn lock(&self) -> Result<JobBitmapGuard<'_>, BitmapError> {
        let list = self.node().lock_drained();
        let named = list.owned(self.id);
        if named.is_readonly() || self.claimed_for == ClaimFor::Reading {
            return Err(named.readonly());
        }
        Ok(JobBitmapGuard::new(list, self.id))
    }

    /// What was recorded until now belongs to the claimed bits: what the successor has from here on was
    /// written later.
    pub(crate) fn fold(&self) {
        let mut list = self.node().lock_drained();
        let Content::Known { map, usage } = &mut list.owned_mut(self.id).content else {
            unreachable!("an inconsistent bitmap is not claimed")
        };
        let Usage::Claimed(successor) = usage else {
            unreachable!("it has a successor for as long as it is claimed")
        };
        if !successor.map.is_clean() {
            unshared(map)
                .merge_from(&successor.map)
                .expect("it is as long");
            successor.map.reset_all();
        }
    }

    /// Ends it under the lock of its node. Gives back the map that is not needed any more.
    pub(in crate::node) fn end_in(
        mut self,
        list: &mut List,
        end: ClaimEnd,
        left: &HBitmap,
    ) -> HBitmap {
        self.node = None;
        let named = list.owned_mut(self.id);
        let end = end.of(self.claimed_for, named);
        if end == ClaimEnd::Left {
            let Content::Known { map, .. } = &mut named.content else {
                unreachable!("an inconsistent bitmap is not claimed")
            };
            let map = unshared(map);
            map.reset_all();
            map.merge_from(left).expect("it is as long");
        }
        named.end_claim(end)
    }

    fn node(&self) -> &Arc<Inner> {
        self.node.as_ref().expect("what ends it consumes it")
    }

    fn end(&mut self, end: ClaimEnd) {
        let Some(node) = self.node.take() else {
            return;
        };
        let mut list = node.lock_drained();
        let named = list.owned_mut(self.id);
        let unused = named.end_claim(end.of(self.claimed_for, named));
        drop(list);
        drop(unused);
    }
}

impl Drop for BitmapClaim {
    fn drop(&mut self) {
        self.end(ClaimEnd::Reclaim);
    }
}

impl fmt::Debug for BitmapClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapClaim")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Named {
    fn successor_mut(&mut self) -> &mut Successor {
        match &mut self.content {
            Content::Known {
                usage: Usage::Claimed(successor),
                ..
            } => successor,
            Content::Known { .. } | Content::Inconsistent { .. } => {
                unreachable!("it has a successor for as long as it is claimed")
            }
        }
    }

    /// Gives back the map that is not needed any more, for the caller to drop outside of the lock.
    fn end_claim(&mut self, end: ClaimEnd) -> HBitmap {
        let Content::Known { map, usage } = &mut self.content else {
            unreachable!("an inconsistent bitmap is not claimed")
        };
        let idle = Usage::Idle { is_enabled: false };
        let Usage::Claimed(successor) = mem::replace(usage, idle) else {
            unreachable!("it has a successor for as long as it is claimed")
        };
        let is_enabled = successor.is_enabled && !is_broken(Sabotage::EndDisabled);
        *usage = match successor.then {
            None => Usage::Idle { is_enabled },
            Some(by) => Usage::Held {
                is_enabled,
                by,
                changes: None,
            },
        };
        let map = unshared(map);
        match end {
            ClaimEnd::Abdicate => {
                if is_broken(Sabotage::AbdicateForgetsFlags) {
                    self.stored = self.stored.map(|_| super::entry::Stored::default());
                }
                mem::replace(map, successor.map)
            }
            ClaimEnd::Reclaim => {
                if !is_broken(Sabotage::ReclaimForgetsSuccessor) {
                    map.merge_from(&successor.map).expect("it is as long");
                }
                successor.map
            }
            ClaimEnd::Left => successor.map,
        }
    }
}
