//! The instant that is backed up: what is to be copied is fixed, and the guest's writes are held back.
//!
//! ```text
//!          arm            commit             the machine comes by
//!  Idle ────────▶ Armed ──────────▶ Committed ──────────────────────▶ Taken
//!    ▲               │                 │
//!    └──── disarm ───┴─────────────────┘
//! ```
//!
//! 1. Arming happens while the guest is held, by a transaction or by the machine: the bitmap is claimed, what
//!    is to be copied is complete, and only then can a guest write see that it is held back.
//! 2. What arming has done is undone by disarming, in full, and by nobody once the machine has it. The machine
//!    does not take what a transaction may still undo.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::backup::BackupSync;
use crate::bitmap::HBitmap;
use crate::job::{AtStart, Begun, BitmapMode};
use crate::node::{
    BitmapClaim, BitmapError, ClaimFor, HoldError, Locked, Node, QuiesceGuard, WriteHold,
};
use crate::sabotage::{Sabotage, is_broken};

/// What a backup is to begin with.
pub(super) struct Start {
    node: Node,
    sync: BackupSync,
    bitmap: Option<(String, BitmapMode)>,
    state: Mutex<State>,
}

enum State {
    /// With the map of what is to be copied, empty as yet.
    Idle(HBitmap),
    Armed(Armed),
    Committed(Armed),
    Taken,
}

/// What has begun.
pub(super) struct Armed {
    /// What is to be copied, in clusters.
    pub(super) dirty: HBitmap,
    pub(super) claim: Option<BitmapClaim>,
    /// `None` once the instant is lost.
    pub(super) hold: Option<Arc<WriteHold>>,
}

impl Start {
    pub(super) fn new(
        node: &Node,
        sync: BackupSync,
        bitmap: Option<(String, BitmapMode)>,
        empty: HBitmap,
    ) -> Self {
        Self {
            node: node.clone(),
            sync,
            bitmap,
            state: Mutex::new(State::Idle(empty)),
        }
    }

    /// What was begun with, if it was. Nobody undoes it any more.
    pub(super) fn take(&self) -> Option<Armed> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Committed(armed) => Some(armed),
            other => {
                *state = other;
                None
            }
        }
    }

    /// As [`take`](Self::take), for a machine that is dropped: whoever would undo it finds nothing. What a
    /// transaction may still undo is undone: the job has not begun.
    pub(super) fn take_at_drop(&self) -> Option<Armed> {
        let state = std::mem::replace(&mut *self.state.lock(), State::Taken);
        match state {
            State::Committed(armed) => Some(armed),
            State::Armed(Armed { claim, hold, .. }) => {
                if let Some(claim) = claim {
                    claim.reclaim();
                }
                drop(hold);
                None
            }
            State::Idle(_) | State::Taken => None,
        }
    }

    /// Whether a transaction has begun it that may still undo it.
    pub(super) fn is_open(&self) -> bool {
        matches!(*self.state.lock(), State::Armed(_))
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

    fn begin(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
        dirty: &mut HBitmap,
    ) -> Result<(Option<BitmapClaim>, WriteHold), BitmapError> {
        let claim = match &self.bitmap {
            None => None,
            Some((name, mode)) => {
                let claim_for = match mode {
                    BitmapMode::Never => ClaimFor::Reading,
                    BitmapMode::OnSuccess | BitmapMode::Always => ClaimFor::Change,
                };
                Some(locked.claim((&self.node, name), claim_for, spare)?)
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

impl AtStart for Start {
    fn node(&self) -> &Node {
        &self.node
    }

    fn spare(&self) -> Option<HBitmap> {
        let (name, _) = self.bitmap.as_ref()?;
        self.node.spare_for(name)
    }

    fn arm(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
    ) -> Result<Begun, BitmapError> {
        let mut state = self.state.lock();
        let mut dirty = match std::mem::replace(&mut *state, State::Taken) {
            State::Idle(dirty) => dirty,
            other => {
                // Somebody was faster, at an instant at which the guest was held as well.
                *state = other;
                return Ok(Begun::Before);
            }
        };
        match self.begin(locked, guard, spare, &mut dirty) {
            Ok((claim, hold)) => {
                *state = State::Armed(Armed {
                    dirty,
                    claim,
                    hold: Some(Arc::new(hold)),
                });
                Ok(Begun::Here)
            }
            Err(error) => {
                *state = State::Idle(dirty);
                Err(error)
            }
        }
    }

    fn commit(&self) {
        let mut state = self.state.lock();
        *state = match std::mem::replace(&mut *state, State::Taken) {
            State::Armed(armed) => State::Committed(armed),
            other => other,
        };
    }

    fn disarm(&self, locked: &mut Locked<'_>) {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Armed(armed) | State::Committed(armed) => {
                let Armed {
                    mut dirty,
                    claim,
                    hold,
                } = armed;
                dirty.reset_all();
                *state = State::Idle(dirty);
                if let Some(claim) = claim {
                    locked.reclaim(&self.node, claim);
                }
                drop(state);
                drop(hold);
            }
            other => *state = other,
        }
    }
}
