//! What the target may still lack, and what becomes of that: of the named bitmap that the job goes by, and of
//! checkpoints.

use crate::bitmap::HBitmap;
use crate::job::BitmapMode;
use crate::mirror::checkpoint::{Checkpoint, CheckpointId, CheckpointPhase};
use crate::mirror::{Mirror, MirrorSync, Phase};
use crate::node::{ActiveWrites, BitmapClaim, ClaimEnd};
use crate::sabotage::{Sabotage, is_broken};

/// The named bitmap that a job goes by.
#[derive(Debug)]
pub(super) struct ByBitmap {
    pub(super) name: String,
    pub(super) mode: BitmapMode,
    /// From the moment on that writes are recorded.
    pub(super) claim: Option<BitmapClaim>,
    /// For sync top, as long as the source is scanned: what the bitmap says is to be looked at.
    pub(super) wanted: Option<HBitmap>,
}

/// What the target may have lacked when the job ended.
#[derive(Debug)]
pub(super) struct Left {
    dirty: HBitmap,
    scanned: u64,
    phase: CheckpointPhase,
}

impl ByBitmap {
    /// The guest is held and the target has all that it wrote: from here on is later.
    fn note_instant(&self) {
        if self.mode == BitmapMode::Never || is_broken(Sabotage::KeepWritesOfJob) {
            return;
        }
        if let Some(claim) = &self.claim {
            claim.fold();
        }
    }

    fn end(&self, is_success: bool) -> ClaimEnd {
        match (self.mode, is_success) {
            (BitmapMode::Never, _) => ClaimEnd::Reclaim,
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => ClaimEnd::Abdicate,
            (BitmapMode::OnSuccess, false) if is_broken(Sabotage::CleanAfterFailure) => {
                ClaimEnd::Abdicate
            }
            (BitmapMode::OnSuccess, false) => ClaimEnd::Reclaim,
            (BitmapMode::Always, false) => ClaimEnd::Left,
        }
    }
}

impl Mirror {
    /// What it has still to do, for a mirror that [goes on](Self::resume) from there: with what was known to
    /// be on the target at this moment left out, and what is in flight not. It may be asked while the job runs
    /// and when it has failed or was cancelled, until this is dropped.
    ///
    /// `None` before recording has started and the machine was polled since, for then nothing is done yet, and when
    /// the job has succeeded. A [commit](Self::commit) has none.
    ///
    /// # What the caller must see to
    ///
    /// 1. What is written to the source after this moment is known to nobody but the job. To go on after that,
    ///    have a named bitmap record from *before* it: clear one, and then ask.
    /// 2. The target has what is left out once its writes are durable. If it may forget what was not flushed,
    ///    flush it after this and before the bytes are stored.
    /// 3. An older checkpoint is as good as long as the bitmap covers the time since. With another
    ///    bitmap, or a cleared one, belongs another generation.
    ///
    /// Memory: a copy of the job's bitmap, and the bytes: at most 1/4 more than it when each chunk of 4096
    /// granules has both dirty and clean ones, a few bytes when few have.
    #[must_use]
    pub fn checkpoint(&self, id: CheckpointId) -> Option<Vec<u8>> {
        if self.engine.shape().only_top {
            return None;
        }
        let of = |left: HBitmap, scanned, phase| Checkpoint {
            id,
            sync: self.sync,
            phase,
            scanned,
            left,
        };
        if matches!(self.phase, Phase::Concluded) {
            if !matches!(self.job.result(), Some(Err(_))) {
                return None;
            }
            let left = self.at_end.as_ref()?;
            return Some(of(left.dirty.clone(), left.scanned, left.phase).encode());
        }
        let mut left = HBitmap::clone(&*self.bitmap.as_ref()?.lock());
        if !is_broken(Sabotage::CheckpointForgetsClaims) {
            self.engine.add_claimed(&mut left);
        }
        if let Some(writes) = &self.active.writes {
            writes.claims().add_to(&mut left);
        }
        let scanned = self.add_unscanned(&mut left);
        Some(of(left, scanned, self.checkpoint_phase()).encode())
    }

    /// What the target may lack, from the moment on that the scan is over: what is dirty or claimed.
    /// For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn left_dirty(&self) -> Option<HBitmap> {
        if let Phase::Concluded = self.phase {
            let left = self.at_end.as_ref()?;
            let is_known = left.phase != CheckpointPhase::Scanning;
            return is_known.then(|| left.dirty.clone());
        }
        if self.unscanned().is_some() {
            return None;
        }
        let mut left = HBitmap::clone(&*self.bitmap.as_ref()?.lock());
        self.engine.add_claimed(&mut left);
        if let Some(writes) = &self.active.writes {
            writes.claims().add_to(&mut left);
        }
        Some(left)
    }

    /// From where on it is not known what is to be copied, if there is such a place.
    pub(super) fn unscanned(&self) -> Option<u64> {
        match self.phase {
            Phase::Created | Phase::Attaching { .. } => Some(0),
            Phase::Scanning { next, .. } => Some(next),
            Phase::Ending { unscanned, .. } => unscanned,
            Phase::Copying { .. } | Phase::InSync(_) | Phase::Concluded => None,
        }
    }

    fn checkpoint_phase(&self) -> CheckpointPhase {
        match self.phase {
            Phase::InSync(_) => CheckpointPhase::Ready,
            _ if self.unscanned().is_some() => CheckpointPhase::Scanning,
            _ => CheckpointPhase::Copying,
        }
    }

    /// What was not scanned yet is to be copied, if the bitmap can tell, or else to be scanned from the
    /// returned place on.
    fn add_unscanned(&self, left: &mut HBitmap) -> u64 {
        let len = self.engine.shape().len;
        let Some(from) = self.unscanned() else {
            return len;
        };
        let wanted = self.by.as_ref().and_then(|by| by.wanted.as_ref());
        match (self.sync, wanted) {
            (MirrorSync::Top, None) => return from,
            (MirrorSync::Top, Some(wanted)) => {
                for run in wanted.runs_in(from..len, u64::MAX) {
                    left.set(run).expect("within the disk");
                }
            }
            (MirrorSync::Full | MirrorSync::None, _) => {
                left.set(from..len).expect("within the disk");
            }
        }
        len
    }

    /// The guest is held, and both disks are equal.
    pub(super) fn note_instant(&self) {
        if let Some(by) = &self.by {
            by.note_instant();
        }
    }

    /// Stops to record, with nothing between that and the end of the named bitmap's claim.
    pub(super) fn stop_recording(&mut self, is_success: bool) {
        let Some(bitmap) = self.bitmap.take() else {
            return;
        };
        let by = self.by.as_mut();
        let claim = by.and_then(|by| Some((by.claim.take()?, by.end(is_success))));
        let is_told_by_bitmap = matches!(claim, Some((_, ClaimEnd::Left)));
        if is_success
            && is_broken(Sabotage::InstantAtEnd)
            && let Some((claim, _)) = &claim
        {
            claim.fold();
        }
        // Those under way go nowhere any more; what of them is at the target counts as left.
        let writes = self.active.writes.take();
        let active = writes.as_ref().map(ActiveWrites::claims);
        self.active.left_at_target = writes.map_or(0, ActiveWrites::end);
        let mut scanned = 0;
        let dirty = bitmap.detach(claim, |left| {
            if let (Some(active), false) = (&active, is_broken(Sabotage::LeaveOutActives)) {
                active.add_to(left);
            }
            if !is_broken(Sabotage::ForgetInFlight) {
                self.engine.add_claimed(left);
            }
            scanned = self.add_unscanned(left);
            let len = left.len();
            if is_told_by_bitmap && scanned < len {
                // A bitmap cannot say that something is to be looked at.
                left.set(scanned..len).expect("within the disk");
                scanned = len;
            }
        });
        // Only what did not succeed is gone on from.
        if !is_success || cfg!(debug_assertions) {
            let phase = self.checkpoint_phase();
            self.at_end = Some(Left {
                dirty,
                scanned,
                phase,
            });
        }
    }
}
