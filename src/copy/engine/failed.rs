//! What failed, what was lost, and what is given up: how it gets dirty again.

use std::time::Duration;

use super::running::Out;
use super::{Engine, make_dirty};
use crate::bitmap::HBitmap;
use crate::copy::claims::{Claim, ClaimState};
use crate::copy::{Op, OpKind};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

impl Engine {
    /// Whether ranges wait for the target to settle, and it was not asked to.
    pub(crate) fn wants_settle(&self) -> bool {
        !self.is_settling && self.has_lost()
    }

    /// The request to settle, if ranges wait for one.
    pub(crate) fn settle(&mut self, dirty: Option<&mut HBitmap>) -> Option<Op> {
        if let Some(buffer) = self.buffer.as_mut().filter(|buffer| buffer.wants_settle()) {
            buffer.settle();
            return Some(self.hand_out_aside(OpKind::SettleSaved));
        }
        if let (true, Some(dirty)) = (is_broken(Sabotage::DoNotSettle), dirty) {
            self.settled(dirty);
        }
        if !self.wants_settle() {
            return None;
        }
        self.is_settling = true;
        Some(self.hand_out(OpKind::Settle))
    }

    /// Ends the waiting of what was to be tried again by `now`.
    pub(crate) fn unpark(&mut self, now: Duration) {
        if self.claims.parked() == 0 {
            return;
        }
        let due: Vec<u64> = self
            .parked()
            .filter(|&(_, until)| until <= now)
            .map(|(start, _)| start)
            .collect();
        for start in due {
            self.claims.remove(start);
        }
    }

    /// When the first of what is to be tried again is due.
    pub(crate) fn next_retry(&self) -> Option<Duration> {
        if self.claims.parked() == 0 {
            return None;
        }
        self.parked().map(|(_, until)| until).min()
    }

    /// Leaves a failed range alone until then.
    pub(crate) fn retry_at(&mut self, range: ByteRange, until: Duration) {
        self.claims
            .set_state(range.start(), ClaimState::Parked { until });
    }

    /// Ends the claim of a failed range: it may be tried at once.
    pub(crate) fn release(&mut self, range: ByteRange) {
        self.claims.remove(range.start());
    }

    /// Everything handed out is lost: who worked on it was dropped. Returns what belonged to no claim,
    /// and must be asked for again.
    pub(crate) fn lose_running(&mut self) -> Vec<OpKind> {
        let all = self.running.take_all();
        all.into_iter().filter_map(|out| self.lose(out)).collect()
    }

    /// That operation alone is lost. Returns it if it belonged to no claim, and must be asked for again.
    pub(crate) fn lose_one(&mut self, op: &Op) -> Option<OpKind> {
        let out = self.running.take_back(op)?;
        // A device that is asked already settles what it had when it was asked: it is asked once more.
        if !is_broken(Sabotage::SettledBefore) {
            for settling in self.running.take_settling() {
                self.lose(settling);
            }
        }
        self.lose(out)
    }

    fn lose(&mut self, Out { id, kind, .. }: Out) -> Option<OpKind> {
        match kind {
            OpKind::Status(range) if self.is_claimed_by(range, id) => {
                self.claims.set_state(range.start(), ClaimState::Look);
                self.ready.push_front(range.start());
            }
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::CopyOffloaded(range)
            | OpKind::Zero(range, _)
            | OpKind::Discard(range)
            | OpKind::CopySaved(range)
            | OpKind::CopySavedCompressed(range) => {
                self.claims.set_state(range.start(), ClaimState::Lost);
                self.note_torn(range);
            }
            // What only reads has no effect that could come later.
            OpKind::Compare(range, _) => self.not_compared(range),
            OpKind::Flush => {
                self.has_unflushed = true;
                return Some(kind);
            }
            OpKind::Status(_) if self.lose_question(id) => {}
            OpKind::Status(_) => return Some(kind),
            // Should it still come to the buffer, it is what belongs there: the guest is held back.
            OpKind::Save(range) => {
                if let Some(buffer) = &mut self.buffer {
                    buffer.stop(range);
                    buffer.lose();
                }
            }
            OpKind::DiscardSaved(range) => {
                if let Some(buffer) = &mut self.buffer {
                    buffer.discard_again(range);
                    buffer.lose();
                }
            }
            OpKind::SettleSaved => {
                if let Some(buffer) = &mut self.buffer {
                    buffer.lose();
                }
            }
            OpKind::GiveUp(_) => self.has_lost_discard = true,
            OpKind::Settle => self.is_settling = false,
            // Perhaps nobody has told the target.
            OpKind::CancelInFlight => return Some(kind),
            OpKind::DiscardSource(_) => {}
        }
        None
    }

    /// The target may hold a part of what was to be written there.
    pub(super) fn note_torn(&mut self, range: ByteRange) {
        if let Some(torn) = self
            .torn
            .as_mut()
            .filter(|_| !is_broken(Sabotage::SkipTorn))
        {
            torn.set(range).expect("within the disk");
        }
    }

    /// Gives up what was not handed out yet, and what waits to be tried again: it is dirty again.
    pub(crate) fn give_up_planned(&mut self, dirty: &mut HBitmap) {
        self.give_up_compares();
        for start in std::mem::take(&mut self.ready) {
            let claim = self.claims.remove(start);
            if !is_broken(Sabotage::ForgetPlanned) {
                make_dirty(dirty, claim.range);
            }
        }
        self.unpark(Duration::MAX);
    }

    pub(super) fn settled(&mut self, dirty: &mut HBitmap) {
        self.is_settling = false;
        self.has_lost_discard = false;
        let lost: Vec<ByteRange> = self
            .claims
            .iter()
            .filter(|claim| claim.state == ClaimState::Lost)
            .map(|claim| claim.range)
            .collect();
        for range in lost {
            make_dirty(dirty, range);
            self.claims.remove(range.start());
        }
    }

    pub(crate) fn has_lost(&self) -> bool {
        self.claims.lost() > 0 || self.has_lost_discard
    }

    pub(super) fn parked(&self) -> impl Iterator<Item = (u64, Duration)> {
        self.claims.iter().filter_map(|claim| match claim.state {
            ClaimState::Parked { until } => Some((claim.range.start(), until)),
            _ => None,
        })
    }

    /// Everything that is claimed is added to `dirty`: together, what the target may lack.
    pub(crate) fn add_claimed(&self, dirty: &mut HBitmap) {
        for claim in self.claims.iter() {
            dirty.set(claim.range).expect("within the disk");
        }
        self.add_doubtful(dirty);
    }

    /// Whether something of `range` is claimed, and will not get on by itself: it is neither in flight nor lost.
    pub(crate) fn has_idle_claim(&self, range: ByteRange) -> bool {
        self.claims.overlapping(range).any(is_idle)
    }

    /// Ends the claims in `range` that are [idle](Self::has_idle_claim): it is dirty again. Of a long copy the rest
    /// stays claimed.
    pub(crate) fn give_way(&mut self, dirty: &mut HBitmap, range: ByteRange) {
        self.give_up_compares();
        let idle = self
            .claims
            .overlapping(range)
            .filter(|claim| is_idle(claim));
        let idle: Vec<Claim> = idle.copied().collect();
        for claim in idle {
            let given = self.take_for(range, claim).range;
            make_dirty(dirty, given);
            self.claims.free(given);
        }
    }

    /// Takes an idle claim out, to be given up or put back in. Of a long copy only the blocks that `range` touches:
    /// the rest stays planned.
    pub(super) fn take_for(&mut self, range: ByteRange, claim: Claim) -> Claim {
        let all = claim.range;
        self.claims.take(all.start());
        self.ready.retain(|&ready| ready != all.start());
        if !matches!(claim.state, ClaimState::Planned(OpKind::Copy(_))) {
            return claim;
        }
        let part = |range| Claim {
            range,
            state: ClaimState::Planned(OpKind::Copy(range)),
            ..claim
        };
        let taken = all.intersection(self.shape.widen(range, claim.align));
        for kept in [all.split_at(taken.start()).0, all.split_at(taken.end()).1] {
            if !kept.is_empty() {
                self.plan_again(part(kept));
            }
        }
        part(taken)
    }

    /// A part of what was planned before.
    fn plan_again(&mut self, claim: Claim) {
        self.ready.push_back(claim.range.start());
        self.claims.put(claim);
    }
}

fn is_idle(claim: &Claim) -> bool {
    !matches!(claim.state, ClaimState::Running(_) | ClaimState::Lost)
}
