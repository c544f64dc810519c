//! The instant from which on a mirror records: the bits of the named bitmap are claimed, and writes go to the
//! job's own bitmap.
//!
//! How it comes to that, and is undone, is [common to jobs](crate::job).

use crate::bitmap::HBitmap;
use crate::copy::Shape;
use crate::job::{Beginning, BitmapMode, StartError};
use crate::node::{BitmapClaim, JobBitmap, Locked, Node, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};

/// What a mirror is to begin with.
pub(super) struct Instant {
    pub(super) node: Node,
    pub(super) bitmap: Option<(String, BitmapMode)>,
    /// Whether the scan looks at what the named bitmap has, so that it is not all to be copied.
    pub(super) is_scanned: bool,
    pub(super) shape: Shape,
}

/// What it takes.
pub(super) struct Idle {
    /// What becomes the bitmap, clean, and made beforehand, so that want of memory comes up before the start.
    pub(super) empty: HBitmap,
    /// What a checkpoint says is left.
    pub(super) left: Option<HBitmap>,
}

/// What has begun.
pub(super) struct Armed {
    pub(super) bitmap: JobBitmap,
    pub(super) claim: Option<BitmapClaim>,
    /// What of the named bitmap is to be looked at.
    pub(super) wanted: Option<HBitmap>,
    left: Option<HBitmap>,
}

impl Instant {
    fn claim(
        &self,
        locked: &mut Locked<'_>,
        spare: Option<HBitmap>,
    ) -> Result<(Option<BitmapClaim>, Option<HBitmap>), StartError> {
        let Some((name, mode)) = &self.bitmap else {
            return Ok((None, None));
        };
        let claim = locked.claim((&self.node, name), mode.claim_for(), spare);
        let claim = claim.map_err(StartError::Bitmap)?;
        if !self.is_scanned {
            return Ok((Some(claim), None));
        }
        match locked.copy_of_claimed(&self.node, &claim) {
            Ok(wanted) => Ok((Some(claim), Some(wanted))),
            Err(error) => {
                locked.reclaim(&self.node, claim);
                Err(StartError::Bitmap(error))
            }
        }
    }
}

impl Beginning for Instant {
    type Idle = Idle;
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
        idle: Idle,
    ) -> Result<Armed, (StartError, Idle)> {
        let (claim, wanted) = match self.claim(locked, spare) {
            Ok(claimed) => claimed,
            Err(error) => return Err((error, idle)),
        };
        let Idle {
            empty: mut dirty,
            left,
        } = idle;
        if let (Some(claim), None) = (&claim, &wanted)
            && !is_broken(Sabotage::ForgetClaimed)
        {
            let bits = locked.claimed(&self.node, claim);
            dirty.merge_from(bits).expect("it is as long");
        }
        if let Some(left) = &left {
            dirty.merge_from(left).expect("its length was checked");
            self.shape.widen_all(&mut dirty);
        }
        match locked.track(&self.node, guard, dirty) {
            Ok(bitmap) => Ok(Armed {
                bitmap,
                claim,
                wanted,
                left,
            }),
            Err((error, mut empty)) => {
                empty.reset_all();
                if let Some(claim) = claim {
                    locked.reclaim(&self.node, claim);
                }
                Err((StartError::Track(error), Idle { empty, left }))
            }
        }
    }

    fn undo(&self, locked: &mut Locked<'_>, armed: Armed) -> Idle {
        let mut empty = locked.untrack(&self.node, armed.bitmap);
        empty.reset_all();
        if let Some(claim) = armed.claim {
            locked.reclaim(&self.node, claim);
        }
        let left = armed.left;
        Idle { empty, left }
    }
}
