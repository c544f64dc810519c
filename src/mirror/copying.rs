//! What a mirror copies next, how fast, and what it waits for when there is nothing to do.

use std::task::Waker;
use std::time::Duration;

use crate::copy::{Budget, Op, OpKind};
use crate::machine::Step;
use crate::mirror::{End, Mirror, Phase, Turn};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// While in step, a guest write wakes the job at most this often; what is written between is copied
/// together.
const BATCH: Duration = Duration::from_millis(10);

/// What the copy machinery may hand out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Copying {
    /// Only what is planned already and costs nothing.
    No,
    /// What is claimed already, as the speed limit allows.
    Claimed,
    /// What the speed limit allows.
    Limited,
    /// Everything: the guest waits.
    Unlimited,
}

impl Mirror {
    /// Copies until nothing is left, flushes, and is ready.
    pub(super) fn copy(&mut self, now: Duration, waker: &Waker) -> Turn {
        self.confirm(now, waker);
        if let Some(op) = self.next_op(now, Copying::Limited) {
            return Turn::Step(Step::Op(op));
        }
        let is_settled = self.is_in_step() && !self.is_in_doubt();
        let may_flush = is_settled && self.next_retry(now).is_none();
        let Phase::Copying { flush } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        if may_flush && is_broken(Sabotage::ReadyWithoutFlush) {
            let id = *flush.get_or_insert_with(|| Op::new(OpKind::Flush).id());
            self.flushed(id);
            return Turn::Again;
        }
        if may_flush && flush.is_none() {
            let op = self.engine.hand_out(OpKind::Flush);
            *flush = Some(op.id());
            return Turn::Step(Step::Op(op));
        }
        self.wait(now, waker, Copying::Limited)
    }

    /// The next operation of the copy machinery.
    pub(super) fn next_op(&mut self, now: Duration, copying: Copying) -> Option<Op> {
        let budget = match copying {
            Copying::Unlimited => Budget::Claim,
            Copying::No => Budget::Free,
            Copying::Claimed | Copying::Limited if self.rate.free_at(now) > now => Budget::Free,
            Copying::Claimed => Budget::Copy,
            Copying::Limited => Budget::Claim,
        };
        let bitmap = self.bitmap.as_ref()?;
        self.engine.hold_guest(copying == Copying::Unlimited);
        let op = self.engine.next(bitmap.lock().bitmap_mut(), budget);
        let Some(op) = op else {
            let may_compare = copying == Copying::Limited && budget == Budget::Claim;
            return may_compare.then(|| self.next_compare(now))?;
        };
        self.rate.account(self.engine.cost(op.kind()));
        Some(op)
    }

    /// What to wait for when nothing can be handed out.
    pub(super) fn wait(&mut self, now: Duration, waker: &Waker, copying: Copying) -> Turn {
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before copying");
        let has_work =
            self.engine.planned() > 0 || self.engine.has_doubts() || !bitmap.lock().is_clean();
        let free_at = self.rate.free_at(now);
        let until = match copying {
            Copying::No | Copying::Claimed => Some(self.batch_until),
            Copying::Limited if has_work && free_at > now => Some(free_at),
            Copying::Limited | Copying::Unlimited if self.engine.has_free_worker() => {
                // First armed, then looked once more: a guest write that came since the last look
                // would wake nobody. What is in flight, or waits to be tried again, keeps nobody from
                // that.
                bitmap.wake_at_write(waker);
                if let Some(op) = self.next_op(now, copying) {
                    return Turn::Step(Step::Op(op));
                }
                if matches!(self.phase, Phase::InSync(End::Open)) {
                    // The next guest write wakes us; those that follow it are left alone for a while.
                    self.batch_until = now.saturating_add(BATCH);
                }
                None
            }
            Copying::Limited | Copying::Unlimited => None,
        };
        let times = [
            until,
            self.next_retry(now),
            self.held_until(),
            self.confirm_until(),
        ];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    pub(super) fn range_done(&mut self, range: ByteRange) {
        self.backoff.reset();
        if matches!(self.phase, Phase::Scanning { .. }) {
            return;
        }
        self.done_bytes = self.done_bytes.saturating_add(range.len());
    }

    /// When the first of what failed is tried again, if that is not now.
    pub(super) fn next_retry(&self, now: Duration) -> Option<Duration> {
        let unclaimed = Some(self.retry_at).filter(|&at| at > now);
        unclaimed.into_iter().chain(self.engine.next_retry()).min()
    }
}
