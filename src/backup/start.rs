//! The instant that is backed up: what is to be copied is fixed, and the guest's writes are held back.
//!
//! The bitmap is claimed, what is to be copied is complete, and only then can a guest write see that it is held
//! back. How it comes to that, and is undone, is [common to jobs](crate::job).

use std::sync::Arc;

use crate::backup::BackupSync;
use crate::bitmap::HBitmap;
use crate::job::{Beginning, BitmapMode, StartError};
use crate::node::{BitmapClaim, BitmapError, HoldError, Locked, Node, QuiesceGuard, WriteHold};
use crate::sabotage::{Sabotage, is_broken};

/// What a backup is to begin with.
pub(super) struct Instant {
    node: Node,
    sync: BackupSync,
    bitmap: Option<(String, BitmapMode)>,
}

/// What has begun.
pub(super) struct Armed {
    /// What is to be copied, in clusters.
    pub(super) dirty: HBitmap,
    pub(super) claim: Option<BitmapClaim>,
    /// `None` once the instant is lost.
    pub(super) hold: Option<Arc<WriteHold>>,
}

impl Instant {
    pub(super) fn new(node: &Node, sync: BackupSync, bitmap: Option<(String, BitmapMode)>) -> Self {
        Self {
            node: node.clone(),
            sync,
            bitmap,
        }
    }

    pub(super) fn mode(&self) -> Option<BitmapMode> {
        self.bitmap.as_ref().map(|&(_, mode)| mode)
    }

    /// Adds to `dirty` all that was to be copied.
    pub(super) fn add_wanted(&self, claim: &BitmapClaim, dirty: &mut HBitmap) {
        let bits = match self.sync {
            BackupSync::Bitmap | BackupSync::Incremental => claim.lock().ok(),
            BackupSync::Full | BackupSync::Top | BackupSync::None => None,
        };
        match bits {
            Some(bits) => dirty.merge_from(&bits).expect("they are as long"),
            None => dirty.set_all(),
        };
    }

    fn hold_back(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
        dirty: &mut HBitmap,
    ) -> Result<(Option<BitmapClaim>, WriteHold), BitmapError> {
        let claim = match &self.bitmap {
            None => None,
            Some((name, mode)) => {
                Some(locked.claim((&self.node, name), mode.claim_for(), spare)?)
            }
        };
        if is_broken(Sabotage::HoldBeforeContent) {
            // As if a guest write could come in between.
            dirty.reset_all();
        } else {
            match (self.sync, &claim) {
                (BackupSync::Bitmap | BackupSync::Incremental, Some(claim)) => {
                    let bits = locked.claimed(&self.node, claim);
                    dirty.merge_from(bits).expect("they are as long");
                }
                _ => {
                    dirty.set_all();
                }
            }
        }
        match WriteHold::new(&self.node, guard, dirty) {
            Ok(hold) => {
                if is_broken(Sabotage::HoldBeforeContent) {
                    dirty.set_all();
                }
                Ok((claim, hold))
            }
            Err(HoldError::OutOfMemory) => {
                dirty.reset_all();
                if let Some(claim) = claim {
                    locked.reclaim(&self.node, claim);
                }
                Err(BitmapError::OutOfMemory {
                    len: dirty.len(),
                    granularity: dirty.granularity(),
                })
            }
        }
    }
}

impl Beginning for Instant {
    /// The map of what is to be copied, empty as yet.
    type Idle = HBitmap;
    type Armed = Armed;

    fn node(&self) -> &Node {
        &self.node
    }

    fn bitmap(&self) -> Option<&str> {
        self.bitmap.as_ref().map(|(name, _)| &**name)
    }

    fn begin(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
        mut dirty: HBitmap,
    ) -> Result<Armed, (StartError, HBitmap)> {
        match self.hold_back(locked, guard, spare, &mut dirty) {
            Ok((claim, hold)) => Ok(Armed {
                dirty,
                claim,
                hold: Some(Arc::new(hold)),
            }),
            Err(error) => Err((StartError::Bitmap(error), dirty)),
        }
    }

    fn undo(&self, locked: &mut Locked<'_>, armed: Armed) -> HBitmap {
        let Armed {
            mut dirty,
            claim,
            hold,
        } = armed;
        dirty.reset_all();
        if let Some(claim) = claim {
            locked.reclaim(&self.node, claim);
        }
        drop(hold);
        dirty
    }
}
