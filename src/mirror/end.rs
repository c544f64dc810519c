//! How a mirror in step keeps in step, and how it comes to its end.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::copy::OpKind;
use crate::job::{Asked, Cancel, Stage, Status, Vote};
use crate::machine::Step;
use crate::mirror::copying::Copying;
use crate::mirror::{Mirror, Phase, Switch, SwitchBack, Turn};
use crate::node::{Quiesce, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};

/// How far the end of a job in step has come.
#[derive(Debug)]
pub(super) enum End {
    /// The guest writes; the end was not asked for, or too much is left.
    Open,
    /// Flushing what was written until now, so that little is left to flush while the guest is held.
    Flushing,
    /// That was done. What was copied meanwhile is not flushed, and is not to be: with a guest that never
    /// stops there is always something, and the end would never come.
    Flushed,
    /// The guest is held, and its writes in flight are to settle.
    Closing { quiesce: Quiesce, since: Duration },
    /// The guest is held. The rest is copied, then flushed.
    Quiet {
        guard: QuiesceGuard,
        since: Duration,
    },
    /// The caller has the switch, or it is committed and those of others of the group are not yet.
    Switching { since: Duration },
}

impl Mirror {
    /// Keeps the target in step, and comes to the end when that is asked for.
    pub(super) fn keep_in_sync(&mut self, now: Duration, waker: &Waker, asked: Asked) -> Turn {
        let wants_end = asked.cancel.is_some() || asked.is_completing;
        let is_done = asked.status.is_completed();
        let may_end = match asked.ends_by_finalize {
            true => asked.is_finalizing,
            false => wants_end,
        };
        let is_held = self.is_guest_held();
        if is_held && !asked.stage.may_hold() {
            // Another of the group has let its guest go.
            self.let_guest_go();
            return Turn::Again;
        }
        // A job that waits for others, or to be finalized, may do so for long.
        let is_ending = may_end || (wants_end && !is_done);
        if is_ending {
            self.cut_verification();
        } else {
            self.verify_if_asked(&asked);
            self.confirm(now, waker);
        }
        let is_busy = is_ending || self.verify.is_running();
        let is_batching = !is_busy && now < self.batch_until;
        let copying = match (is_held, is_batching) {
            (true, _) => Copying::Unlimited,
            (false, true) => Copying::Claimed,
            (false, false) => Copying::Limited,
        };
        if let Some(op) = self.next_op(now, copying) {
            return Turn::Step(Step::Op(op));
        }
        // The guest is not held while something that failed waits to be tried again, nor while more is left
        // than can be copied in the time that it may be held.
        let is_near =
            self.next_retry(now).is_none() && self.left() <= self.pace.bytes_in(self.downtime_max);
        if wants_end && asked.ends_by_finalize && !is_done && is_near {
            self.job.done();
            return Turn::Again;
        }
        if !is_held && !is_near && matches!(asked.stage, Stage::Near | Stage::Closing) {
            // Not any more: the guest has written.
            self.let_guest_go();
            return Turn::Again;
        }
        if self.held_until().is_some_and(|until| now >= until) {
            // Something hangs. The guest goes on, for at least as long as it was held.
            self.let_guest_go();
            self.held_in_vain(now);
            return Turn::Again;
        }
        let is_in_step = self.is_in_step();
        let Phase::InSync(end) = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        match end {
            // One from before a pause may still be out: another would only be in its way.
            End::Open | End::Quiet { .. } if self.engine.is_flushing() => {
                self.wait(now, waker, copying)
            }
            End::Open if may_end && is_near && self.engine.has_unflushed() => {
                *end = End::Flushing;
                Turn::Step(Step::Op(self.engine.hand_out(OpKind::Flush)))
            }
            End::Flushed if asked.stage == Stage::Closing => {
                *end = End::Closing {
                    quiesce: self.node.quiesce(),
                    since: now,
                };
                Turn::Again
            }
            End::Open | End::Flushed if may_end && is_near && asked.stage == Stage::None => {
                *end = End::Flushed;
                self.job.near();
                Turn::Again
            }
            End::Open | End::Flushing | End::Flushed => self.wait(now, waker, copying),
            End::Closing { quiesce, since } => {
                let polled = Pin::new(quiesce).poll(&mut Context::from_waker(waker));
                let Poll::Ready(guard) = polled else {
                    return self.wait(now, waker, copying);
                };
                *end = End::Quiet {
                    guard,
                    since: *since,
                };
                Turn::Again
            }
            End::Quiet { .. } => {
                if !is_in_step && !is_broken(Sabotage::SwitchWithoutRecheck) {
                    return self.wait(now, waker, copying);
                }
                if self.engine.has_unflushed() && !is_broken(Sabotage::SwitchWithoutFlush) {
                    return Turn::Step(Step::Op(self.engine.hand_out(OpKind::Flush)));
                }
                self.finish(now, waker, asked)
            }
            End::Switching { .. } => unreachable!("handled before"),
        }
    }

    /// What the guest was held for did not come. It goes on for as long as it was held.
    pub(super) fn held_in_vain(&mut self, now: Duration) {
        self.retry_at = now.saturating_add(self.hold_max);
        if !std::mem::replace(&mut self.was_held_in_vain, true) {
            self.job.held_in_vain();
        }
    }

    /// Until when the guest is held at the most, if it is.
    pub(super) fn held_until(&self) -> Option<Duration> {
        match self.phase {
            Phase::Attaching { since, .. }
            | Phase::InSync(
                End::Closing { since, .. } | End::Quiet { since, .. } | End::Switching { since },
            ) => since.checked_add(self.hold_max),
            _ => None,
        }
    }

    fn is_guest_held(&self) -> bool {
        matches!(
            self.phase,
            Phase::InSync(End::Closing { .. } | End::Quiet { .. })
        )
    }

    /// Whether the switch was handed out.
    pub(super) fn gave_switch(&self) -> bool {
        matches!(self.phase, Phase::InSync(End::Switching { .. }))
    }

    /// The guest is held, both disks are equal and flushed.
    fn finish(&mut self, now: Duration, waker: &Waker, asked: Asked) -> Turn {
        self.note_instant();
        // A soft cancel: the target is a copy of this instant, and the guest stays where it is.
        let vote = match asked.cancel {
            Some(_) => Vote::AtOnce,
            None => Vote::BySwitch,
        };
        match self.job.prepared(vote) {
            true => Turn::Again,
            // The others of the group are not, or it was cancelled or paused since we asked.
            false => self.wait(now, waker, Copying::Unlimited),
        }
    }

    pub(super) fn hand_out_switch(&mut self) -> Turn {
        if !self.job.take_switch() {
            return Turn::Again;
        }
        let end = std::mem::replace(&mut self.phase, Phase::Created);
        let Phase::InSync(End::Quiet { guard, since }) = end else {
            unreachable!("granted to one whose guest is held only");
        };
        self.phase = Phase::InSync(End::Switching { since });
        self.was_held_in_vain = false;
        Turn::Step(Step::Switch(Switch::new(self.job.clone(), since, guard)))
    }

    /// It has voted, and others have not. While they hang the guest does not wait for them longer than for
    /// anything else.
    pub(super) fn wait_for_votes(&mut self, now: Duration) -> Turn {
        let until = self.held_until();
        if until.is_some_and(|until| now >= until) {
            self.job.give_up();
            self.held_in_vain(now);
            return Turn::Again;
        }
        Turn::Step(Step::Wait { until })
    }

    pub(super) fn hand_out_switch_back(&mut self) -> Turn {
        Turn::Step(match self.job.take_back() {
            Some(guard) => Step::SwitchBack(SwitchBack::new(self.job.clone(), guard)),
            None => Step::Wait { until: None },
        })
    }

    /// A job that does not get on does not hold the guest, and neither do others of its group. What it was
    /// about to do starts anew.
    pub(super) fn let_guest_go(&mut self) {
        self.verify.let_guest_go();
        match &mut self.phase {
            Phase::Attaching { .. } => self.phase = Phase::Created,
            Phase::InSync(
                end @ (End::Flushing | End::Flushed | End::Closing { .. } | End::Quiet { .. }),
            ) => {
                self.job.let_go();
                *end = End::Open;
            }
            _ => {}
        }
    }

    pub(super) fn begin_ending(&mut self, now: Duration, cancel: Option<Cancel>) {
        self.forget_verification();
        self.stop_active_writes();
        if let Some(bitmap) = &self.bitmap {
            self.engine.give_up_planned(bitmap.lock().bitmap_mut());
        }
        if cancel == Some(Cancel::Force) {
            let grace = self.job.cancel_grace();
            self.grace_until = grace.map(|grace| now.saturating_add(grace));
        }
        self.phase = Phase::Ending {
            has_cancelled: false,
            unscanned: self.unscanned(),
        };
    }

    /// Waits for what is in flight, and is over.
    pub(super) fn end(&mut self, now: Duration, cancel: Option<Cancel>) -> Turn {
        if self.engine.is_idle() {
            return self.conclude(Some(0), false);
        }
        let Phase::Ending { has_cancelled, .. } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        if cancel == Some(Cancel::Force) {
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

    pub(super) fn conclude(&mut self, abandoned: Option<usize>, is_success: bool) -> Turn {
        self.release(is_success);
        // Those are the guest's, and nobody waits for them.
        let writes = usize::try_from(self.active.left_at_target).unwrap_or(usize::MAX);
        let abandoned = abandoned.map(|own| own.saturating_add(writes));
        let result = self.job.conclude(abandoned);
        Turn::Step(Step::Done(result))
    }

    /// Gives back everything that is held: the bitmap, then the guest.
    pub(super) fn release(&mut self, is_success: bool) {
        self.forget_verification();
        self.publish();
        if let Some(armed) = self.start.take_at_drop() {
            // Cancelled just as it was started.
            self.start.undo(armed);
        }
        self.stop_recording(is_success);
        // A guest that was held goes on with this.
        self.phase = Phase::Concluded;
        self.by = None;
        self.claim = None;
        let _ = self.engine.lose_running();
    }
}

/// A machine that is dropped ends its job: with success if the switch was used, else with
/// [`JobError::Dropped`](crate::JobError::Dropped). Its named bitmap then keeps all that the mode leaves in it
/// after a failure, unless success was decided already: with others of its group that may still be too much,
/// never too little.
impl Drop for Mirror {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Concluded) {
            return;
        }
        let asked = self.job.asked(Waker::noop());
        let is_success = asked.stage == Stage::Committed;
        if !matches!(
            asked.status,
            Status::Created | Status::Concluded | Status::Null
        ) {
            self.take_begun();
        }
        self.let_guest_go();
        self.release(is_success);
        self.job.machine_dropped();
    }
}
