//! What guests wait for, and what nobody waits for: the operations that are no workers.

use super::running::Rank;
use super::{Engine, Urgent, make_dirty};
use crate::bitmap::HBitmap;
use crate::copy::buffer::Room;
use crate::copy::claims::{Claim, ClaimState};
use crate::copy::{Op, OpKind};
use crate::node::NotSaved;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// Operations at the same time, at most, for guests that wait.
const URGENT_MAX: usize = 64;

/// Operations at the same time, at most, that nobody waits for.
const ASIDE_MAX: usize = 64;

impl Engine {
    /// The next operation that puts into the buffer, or discards there.
    pub(crate) fn next_of_buffer(&mut self, dirty: &HBitmap, range: ByteRange) -> Urgent {
        if self.running.urgent() >= URGENT_MAX {
            return Urgent::Wait;
        }
        let claims = &self.claims;
        let is_wanted = |range| dirty.any_dirty_in(range) || claims.first_in(range).is_some();
        let Some(buffer) = &mut self.buffer else {
            return Urgent::NoRoom(NotSaved::Full);
        };
        match buffer.room(range, is_wanted) {
            Room::NotNeeded => Urgent::Wait,
            Room::None(why) => Urgent::NoRoom(why),
            Room::For(piece) => {
                buffer.begin(piece);
                let op = self.running.hand_out(OpKind::Save(piece), Rank::Urgent);
                Urgent::Op(op)
            }
        }
    }

    /// Whether something is being put into the buffer, or discarded there or on the source.
    pub(crate) fn is_giving_back(&self) -> bool {
        self.running.iter().any(|out| {
            matches!(
                out.kind,
                OpKind::Save(_) | OpKind::DiscardSaved(_) | OpKind::DiscardSource(_)
            )
        })
    }

    /// Whether there may be one more operation that nobody waits for.
    pub(crate) fn has_room_aside(&self) -> bool {
        self.running.aside() < ASIDE_MAX
    }

    /// The next range of the buffer that can be given back, of at most `max` bytes.
    pub(crate) fn next_discard(&mut self, dirty: &HBitmap, max: u64) -> Option<Op> {
        if !self.has_room_aside() {
            return None;
        }
        let is_over = dirty.is_clean() && self.claims.is_empty();
        let range = self.buffer.as_mut()?.next_unneeded(max, is_over)?;
        Some(self.hand_out_aside(OpKind::DiscardSaved(range)))
    }

    /// The next operation for a range that a guest waits for; `None` if all of it is in flight, or on the
    /// target, or too much is on its way for guests already. Of a long copy that is planned, only what the guest
    /// waits for.
    pub(crate) fn next_urgent(&mut self, dirty: &mut HBitmap, range: ByteRange) -> Option<Op> {
        if self.running.urgent() >= URGENT_MAX && !is_broken(Sabotage::LimitUrgent) {
            return None;
        }
        if is_broken(Sabotage::LimitUrgent) && !self.has_free_worker() {
            return None;
        }
        let parked: Vec<u64> = self
            .claims
            .overlapping(range)
            .filter(|claim| matches!(claim.state, ClaimState::Parked { .. }))
            .map(|claim| claim.range.start())
            .collect();
        for start in parked {
            self.claims.remove(start);
        }
        let is_waiting =
            |claim: &&Claim| matches!(claim.state, ClaimState::Look | ClaimState::Planned(_));
        let waiting = self.claims.overlapping(range).find(is_waiting).copied();
        let (claimed, state) = match waiting {
            Some(claim) => {
                let claim = self.take_for(range, claim);
                self.claims.put(claim);
                (claim.range, claim.state)
            }
            None => {
                let wish = self.shape.widen(range, self.shape.block);
                self.claim_free(wish, self.shape.run_max, dirty)?
            }
        };
        let kind = match state {
            ClaimState::Planned(kind) => self.by(kind),
            _ => OpKind::Status(claimed),
        };
        let op = self.running.hand_out(kind, Rank::Urgent);
        self.claims
            .set_state(claimed.start(), ClaimState::Running(op.id()));
        Some(op)
    }

    /// Hands out what nobody waits for. It counts neither as a worker nor as what guests wait for.
    pub(crate) fn hand_out_aside(&mut self, kind: OpKind) -> Op {
        self.running.hand_out(kind, Rank::Aside)
    }

    /// `range`, which is made of whole clusters, is not wanted any more. `false` if something of it is in
    /// flight: then it is to be asked again later.
    pub(crate) fn forget(&mut self, dirty: &mut HBitmap, range: ByteRange) -> bool {
        let is_running =
            |claim: &Claim| matches!(claim.state, ClaimState::Running(_) | ClaimState::Lost);
        let planned: Vec<ByteRange> = self
            .claims
            .overlapping(range)
            .filter(|claim| !is_running(claim))
            .map(|claim| claim.range)
            .collect();
        for claimed in planned {
            self.claims.remove(claimed.start());
            self.ready.retain(|&ready| ready != claimed.start());
            make_dirty(dirty, claimed);
        }
        dirty.reset(range).expect("made of whole clusters");
        self.claims.first_in(range).is_none()
    }
}
