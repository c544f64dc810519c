//! What is in flight, and what is about to be: the one record of it.
//!
//! 1. No two claims overlap. So two operations never write the same byte of the target at the same time,
//!    when either could land last and the older might win.
//! 2. A claim is taken only together with the dirty bits in it, in one step under the node's lock.
//! 3. A claim ends only when its range is on the target, or dirty again.
//! 4. Where guest writes may be active ones they see every claim, from before its bits are clear to its end.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::bitmap::HBitmap;
use crate::copy::{OpId, OpKind};
use crate::node::{ActiveClaims, ActiveLock};
use crate::units::ByteRange;

/// What a claimed range is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimState {
    /// To be asked what the source holds there.
    Look,
    /// To be handed out.
    Planned(OpKind),
    /// To be reported back.
    Running(OpId),
    /// To be tried again: it failed, is dirty again, and is left alone until then.
    Parked { until: Duration },
    /// For the target to settle: who worked on it is gone, and it may still change.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) range: ByteRange,
    /// What it is aligned to.
    pub(crate) align: u64,
    pub(crate) state: ClaimState,
}

/// Claims by where they start.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_start: BTreeMap<u64, Claim>,
    /// Sum of their lengths.
    bytes: u64,
    /// How many are parked.
    parked: usize,
    /// How many are lost.
    lost: usize,
    /// Where active writes see them.
    actives: Option<ActiveClaims>,
}

impl Claims {
    /// From now on active writes see the claims, and claims must not meet active writes.
    /// What those write to the target is noted in `written`, if it is there.
    pub(crate) fn show_to(&mut self, actives: ActiveClaims, written: Option<HBitmap>) {
        let mut lock = actives.lock();
        for claim in self.by_start.values() {
            lock.claim(claim.range);
        }
        if let Some(map) = written {
            lock.note_written(map);
        }
        drop(lock);
        self.actives = Some(actives);
    }

    /// Where active writes see them.
    pub(crate) fn actives(&self) -> Option<&ActiveClaims> {
        self.actives.as_ref()
    }

    /// The first claim that overlaps `range`.
    pub(crate) fn first_in(&self, range: ByteRange) -> Option<ByteRange> {
        let before = self.by_start.range(..=range.start()).next_back();
        let after = self.by_start.range(range.start()..range.end()).next();
        before
            .into_iter()
            .chain(after)
            .map(|(_, claim)| claim.range)
            .find(|claimed| claimed.overlaps(range))
    }

    /// All claims that overlap `range`, in their order.
    pub(crate) fn overlapping(&self, range: ByteRange) -> impl Iterator<Item = &Claim> {
        let before = self.by_start.range(..range.start()).next_back();
        let within = self
            .by_start
            .range(range.start()..range.end().max(range.start()));
        before
            .into_iter()
            .chain(within)
            .map(|(_, claim)| claim)
            .filter(move |claim| claim.range.overlaps(range))
    }

    pub(crate) fn insert(&mut self, claim: Claim) {
        if let Some(actives) = &self.actives {
            actives.lock().claim(claim.range);
        }
        self.put(claim);
    }

    /// As [`insert`](Self::insert), by one who has looked for active writes under that lock.
    pub(crate) fn insert_under(&mut self, claim: Claim, lock: Option<&mut ActiveLock<'_>>) {
        if let Some(lock) = lock {
            lock.claim(claim.range);
        }
        self.put(claim);
    }

    /// Puts in a part of what was [taken](Self::take) out.
    pub(crate) fn put(&mut self, claim: Claim) {
        assert!(
            self.first_in(claim.range).is_none(),
            "{:?} is claimed already",
            claim.range
        );
        self.bytes += claim.range.len();
        self.count(claim.state, 1);
        self.by_start.insert(claim.range.start(), claim);
    }

    pub(crate) fn remove(&mut self, start: u64) -> Claim {
        let claim = self.take(start);
        self.free(claim.range);
        claim
    }

    /// Takes a claim out, to put parts of it back in. What is not put back is to be [freed](Self::free).
    pub(crate) fn take(&mut self, start: u64) -> Claim {
        let claim = self.by_start.remove(&start).expect("a claim starts there");
        self.bytes -= claim.range.len();
        self.count(claim.state, -1);
        claim
    }

    /// Active writes may have that range.
    pub(crate) fn free(&self, range: ByteRange) {
        if let Some(actives) = &self.actives {
            actives.lock().release(range);
        }
    }

    pub(crate) fn set_state(&mut self, start: u64, state: ClaimState) {
        let claim = self.by_start.get_mut(&start).expect("a claim starts there");
        let before = std::mem::replace(&mut claim.state, state);
        self.count(before, -1);
        self.count(state, 1);
    }

    pub(crate) fn get(&self, start: u64) -> Option<&Claim> {
        self.by_start.get(&start)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Claim> {
        self.by_start.values()
    }

    /// How many wait to be tried again.
    pub(crate) fn parked(&self) -> usize {
        self.parked
    }

    /// Sum of the lengths of those that wait to be tried again.
    pub(crate) fn parked_bytes(&self) -> u64 {
        if self.parked == 0 {
            return 0;
        }
        self.iter()
            .filter(|claim| matches!(claim.state, ClaimState::Parked { .. }))
            .map(|claim| claim.range.len())
            .sum()
    }

    /// How many wait for the target to settle.
    pub(crate) fn lost(&self) -> usize {
        self.lost
    }

    fn count(&mut self, state: ClaimState, change: isize) {
        let count = match state {
            ClaimState::Parked { .. } => &mut self.parked,
            ClaimState::Lost => &mut self.lost,
            ClaimState::Look | ClaimState::Planned(_) | ClaimState::Running(_) => return,
        };
        *count = count
            .checked_add_signed(change)
            .expect("counted when it came");
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    /// Sum of the lengths of all claims.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
