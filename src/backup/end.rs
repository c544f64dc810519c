//! How a backup comes to its end, and what becomes of its bitmap.

use std::time::Duration;

use crate::backup::{Armed, Backup, Phase, Turn};
use crate::bitmap::HBitmap;
use crate::copy::OpKind;
use crate::job::{Asked, BitmapMode, Cancel, Stage, Vote};
use crate::machine::Step;
use crate::node::BitmapClaim;
use crate::sabotage::{Sabotage, is_broken};

impl Backup {
    /// All is on the target: waits for the others of its group, and to be finalized.
    pub(super) fn finish(&mut self, asked: Asked) -> Turn {
        if asked.ends_by_finalize && !asked.status.is_completed() {
            self.job.done();
            return Turn::Again;
        }
        if asked.ends_by_finalize && !asked.is_finalizing {
            return self.wait_for_others();
        }
        match asked.stage {
            Stage::None => {
                self.job.near();
                Turn::Again
            }
            // It has no switch, and so votes as soon as all are prepared.
            Stage::Closing | Stage::Prepared(_) if self.job.prepared(Vote::AtOnce) => Turn::Again,
            Stage::Near
            | Stage::Closing
            | Stage::Prepared(_)
            | Stage::Granted
            | Stage::Held
            | Stage::Voted
            | Stage::Committed
            | Stage::Stale
            | Stage::Back => self.wait_for_others(),
        }
    }

    /// Guests may wait still for those who read the view.
    fn wait_for_others(&self) -> Turn {
        let until = self.next_for_guests();
        Turn::Step(Step::Wait { until })
    }

    /// The instant is lost, so that guests need not wait for it any more.
    pub(super) fn begin_ending(&mut self, now: Duration, cancel: Option<Cancel>) {
        if let Some(armed) = &mut self.armed {
            self.engine.give_up_planned(&mut armed.dirty);
        }
        if cancel.is_some() {
            let grace = self.job.cancel_grace();
            self.grace_until = grace.map(|grace| now.saturating_add(grace));
        }
        self.waiting.clear();
        // In this order: no read succeeds after a guest write that it was not protected from.
        if let Some(view) = &self.view {
            view.end();
        }
        if let Some(hold) = self.armed.as_mut().and_then(|armed| armed.hold.take()) {
            // Readers may have it still.
            hold.end();
        }
        self.phase = Phase::Ending {
            has_cancelled: false,
            has_flushed: false,
        };
    }

    /// Waits for what is in flight, and is over.
    pub(super) fn end(&mut self, now: Duration, cancel: Option<Cancel>) -> Turn {
        let counts_copied = self.counts_copied();
        let Phase::Ending {
            has_cancelled,
            has_flushed,
        } = &mut self.phase
        else {
            unreachable!("called in this phase only");
        };
        if self.engine.is_idle() {
            let wants_flush = counts_copied && self.engine.has_unflushed();
            if wants_flush && !std::mem::replace(has_flushed, true) {
                return Turn::Step(Step::Op(self.engine.hand_out(OpKind::Flush)));
            }
            return self.conclude(Some(0), false);
        }
        if cancel.is_some() {
            if !std::mem::replace(has_cancelled, true) {
                if self.grace_until.is_none() {
                    let grace = self.job.cancel_grace();
                    self.grace_until = grace.map(|grace| now.saturating_add(grace));
                }
                return Turn::Step(Step::Op(self.engine.hand_out(OpKind::CancelInFlight)));
            }
            if self.grace_until.is_some_and(|until| now >= until) {
                let abandoned = self.engine.unsettled();
                return self.conclude(Some(abandoned), false);
            }
        }
        let times = [self.grace_until, self.settle_at()];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    /// Whether a bitmap is to say at a failure what was copied.
    fn counts_copied(&self) -> bool {
        let claim = self.armed.as_ref().and_then(|armed| armed.claim.as_ref());
        claim.is_some() && self.start.beginning().mode() == Some(BitmapMode::Always)
    }

    pub(super) fn conclude(&mut self, abandoned: Option<usize>, is_success: bool) -> Turn {
        self.release(is_success);
        let result = self.job.conclude(abandoned);
        Turn::Step(Step::Done(result))
    }

    /// Gives back everything that is held: the bitmap, then the guest.
    pub(super) fn release(&mut self, is_success: bool) {
        self.publish();
        let armed = self.armed.take().or_else(|| self.start.take_at_drop());
        if let Some(Armed {
            mut dirty,
            claim,
            hold,
        }) = armed
        {
            if !is_broken(Sabotage::ForgetInFlight) {
                self.engine.add_claimed(&mut dirty);
            }
            let is_flushed = !(self.engine.has_unflushed() || self.engine.is_flushing());
            if let (Some(claim), Some(mode)) = (claim, self.start.beginning().mode()) {
                if !(is_success || is_flushed || is_broken(Sabotage::TrustUnflushed)) {
                    self.start.beginning().add_wanted(&claim, &mut dirty);
                }
                end_bitmap(claim, mode, is_success, &dirty);
            }
            if let Some(view) = &self.view {
                view.end();
            }
            if let Some(hold) = hold {
                hold.end();
            }
        }
        self.waiting.clear();
        self.phase = Phase::Concluded;
        self.claim = None;
        let _ = self.engine.lose_running();
    }
}

/// What becomes of the bitmap; `left` is what the target may lack.
fn end_bitmap(claim: BitmapClaim, mode: BitmapMode, is_success: bool, left: &HBitmap) {
    match (mode, is_success || is_broken(Sabotage::CleanAfterFailure)) {
        (BitmapMode::OnSuccess, true) => claim.abdicate(),
        (BitmapMode::Always, _) => {
            if let Ok(mut bits) = claim.lock() {
                bits.reset_all();
                bits.merge_from(left).expect("it is as long");
            }
            claim.reclaim();
        }
        (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => claim.reclaim(),
    }
}

/// A machine that is dropped ends its job: with success if that was decided already, else with
/// [`JobError::Dropped`](crate::JobError::Dropped). Its bitmap then keeps all that the mode leaves in it after
/// a failure, also if the others of its group come to succeed: that is too much, never too little.
impl Drop for Backup {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Concluded) {
            return;
        }
        let asked = self.job.asked(std::task::Waker::noop());
        self.release(asked.stage == Stage::Committed);
        self.job.machine_dropped();
    }
}
