//! From dirty to planned: finding what is free, claiming it, and what the source says of it.

use super::{Done, Engine, make_dirty};
use crate::bitmap::HBitmap;
use crate::copy::claims::{Claim, ClaimState};
use crate::copy::{Content, Extent, OpId, OpKind};
use crate::node::ActiveClaims;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// How many areas of the buffer are looked at for one that is not in flight, before others have their turn.
const SAVED_TRIES: usize = 64;

/// How much is asked about at once where the source turned out to hold no data.
const LOOK_MAX: u64 = 8 << 30;

impl Engine {
    /// Claims an area that is not dirty and makes the target read as zeroes there. Nothing may be in
    /// flight in it.
    pub(crate) fn plan_zeroes(&mut self, area: ByteRange) {
        let (_, max) = self.shape.scan_zeroes().expect("asked before");
        let mut rest = area;
        while !rest.is_empty() {
            let (range, behind) = rest.split_at(rest.start().saturating_add(max));
            self.plan(
                range,
                self.shape.block,
                OpKind::Zero(range, self.shape.unmap),
            );
            rest = behind;
        }
    }

    /// Finds the next dirty run that is free, clears its bits and claims it.
    pub(super) fn claim(&mut self, dirty: &mut HBitmap) -> bool {
        let start_of_search = self.cursor;
        self.blocked = None;
        let found = self.claim_in((start_of_search..self.shape.len).into(), dirty)
            || self.claim_in((0..start_of_search).into(), dirty);
        if let (false, Some(actives)) = (found, self.claims.actives()) {
            // All that is dirty is written to just now. With guests that never pause it would stay dirty.
            actives.lock().wish_for(self.blocked);
        }
        found
    }

    /// What is in the buffer goes first, also before what was claimed already, so that there is space for more.
    pub(super) fn claim_saved(&mut self, dirty: &mut HBitmap) -> bool {
        let mut after = 0;
        for _ in 0..SAVED_TRIES {
            let Some(run) = self
                .buffer
                .as_ref()
                .and_then(|buffer| buffer.next_saved(after))
            else {
                return false;
            };
            if let Some((free, _)) = self.claim_free(run, self.run_max, dirty) {
                self.ready.push_front(free.start());
                return true;
            }
            after = run.end();
        }
        false
    }

    pub(super) fn claim_in(&mut self, search: ByteRange, dirty: &mut HBitmap) -> bool {
        let Some((free, _)) = self.claim_free(search, self.run_max, dirty) else {
            return false;
        };
        self.ready.push_back(free.start());
        self.cursor = if free.end() >= self.shape.len {
            0
        } else {
            free.end()
        };
        true
    }

    /// Claims the first run of `search` that is dirty and free, and clears its bits.
    pub(super) fn claim_free(
        &mut self,
        mut search: ByteRange,
        run_max: u64,
        dirty: &mut HBitmap,
    ) -> Option<(ByteRange, ClaimState)> {
        let actives = self.claims.actives().cloned();
        let mut lock = actives.as_ref().map(ActiveClaims::lock);
        while let Some(run) = dirty.next_dirty_area(search, run_max) {
            let align = self.shape.claim_align(run, self.filled.as_ref());
            let wish = self.shape.widen(run, align);
            // `run_max` is a multiple of the alignment, but the run may straddle one more.
            let first_block = wish.split_at(wish.start() + align).0;
            let most = first_block.end().max(wish.start().saturating_add(run_max));
            let wish = wish.split_at(most).0;
            let compared = match is_broken(Sabotage::WidenAfterCheck) {
                true => run,
                false => wish,
            };
            let claimed = self
                .claims
                .first_in(compared)
                .filter(|_| !is_broken(Sabotage::ClaimTwice));
            let active = lock.as_ref();
            let active = active.and_then(|lock| lock.first_in(wish, !self.is_guest_held));
            if active.is_some_and(|active| active.overlaps(first_block)) {
                self.blocked.get_or_insert(first_block);
            }
            let taken = claimed.into_iter().chain(active);
            let free = match taken.min_by_key(|taken| taken.start()) {
                Some(claimed) => {
                    if claimed.overlaps(first_block) {
                        // Somebody is at it: it stays dirty and is offered later.
                        // The whole block is passed over: it is claimed as one.
                        let next = claimed.end().max(first_block.end());
                        search = search.split_at(next).1;
                        continue;
                    }
                    wish.split_at(claimed.start() & !(align - 1)).0
                }
                None => wish,
            };
            // What is saved is no longer to be read from the source.
            let (free, state) = match &self.buffer {
                None => (free, ClaimState::Look),
                Some(buffer) => match buffer.same(free) {
                    (false, free) => (free, ClaimState::Look),
                    (true, _) if is_broken(Sabotage::CopyOverwritten) => (free, ClaimState::Look),
                    (true, saved) => {
                        let end = saved.start().saturating_add(buffer.piece_max());
                        let piece = saved.split_at(end).0;
                        (piece, ClaimState::Planned(OpKind::CopySaved(piece)))
                    }
                },
            };
            let is_late =
                is_broken(Sabotage::ClearAfterLook) || is_broken(Sabotage::ClearAfterCopy);
            if !is_late {
                dirty
                    .reset(free)
                    .expect("aligned to the granularity, or ends with the disk");
            }
            if let Some(doubts) = &mut self.doubts {
                let is_doubtful = doubts.is_doubtful(free);
                doubts.forget(free);
                if is_doubtful && !is_broken(Sabotage::TrustDoubtful) {
                    // Zeroes that were written there once may not be there any more.
                    self.target_changes(free);
                }
            }
            let claim = Claim {
                range: free,
                align,
                state,
            };
            self.claims.insert_under(claim, lock.as_mut());
            return Some((free, state));
        }
        None
    }

    /// The source has told what is at the start of a range.
    pub(super) fn looked(
        &mut self,
        range: ByteRange,
        extent: Extent,
        id: OpId,
        dirty: Option<&mut HBitmap>,
    ) -> Done {
        if !self.is_claimed_by(range, id) {
            return Done::Status(range, extent);
        }
        let align = self.claims.get(range.start()).expect("as seen").align;
        let extent = extent.or_data(range);
        if let Some(kind) = self.whole_piece(range, align, extent) {
            // The usual, in one step.
            self.run_max = self.shape.run_max;
            self.claims
                .set_state(range.start(), ClaimState::Planned(kind));
            self.ready.push_front(range.start());
            return Done::Nothing;
        }
        self.claims.take(range.start());
        let known_end = range.start().saturating_add(extent.len).min(range.end());
        let (skipped, known_end) = self.skippable((range.start()..known_end).into(), align, extent);
        if let Some(buffer) = &mut self.buffer {
            // Saved while the source was asked.
            for saved in buffer.saved_in(skipped) {
                buffer.is_copied(saved);
            }
        }
        let is_data = extent.content == Content::Data && skipped.is_empty();
        self.run_max = match is_data {
            true => self.shape.run_max,
            false if known_end == range.end() => self.run_max.saturating_mul(2).min(LOOK_MAX),
            false => self.run_max,
        };
        let (mut range, mut known_end) = (range, known_end);
        if let (true, Some(dirty)) = (is_data, dirty) {
            // A claim that was made long to pass a hole is not to keep so much data from being written anew.
            let (kept, behind) = range.split_at(range.start().saturating_add(self.shape.run_max));
            if !behind.is_empty() {
                make_dirty(dirty, behind);
                self.claims.free(behind);
                self.cursor = behind.start();
                (range, known_end) = (kept, known_end.min(kept.end()));
            }
        }
        let mut rest = range.split_at(skipped.end()).1;
        let mut pieces = Vec::new();
        while rest.start() < known_end {
            let extent = Extent {
                len: known_end - rest.start(),
                ..extent
            };
            let kind = self.shape.piece(rest, align, extent);
            let piece = kind.range().expect("a piece has a range");
            pieces.push((piece, ClaimState::Planned(kind)));
            rest = rest.split_at(piece.end()).1;
        }
        if !rest.is_empty() {
            pieces.push((rest, ClaimState::Look));
        }
        // In front of what was claimed later, so that what is being worked on gets done.
        for (range, state) in pieces.into_iter().rev() {
            self.claims.put(Claim {
                range,
                align,
                state,
            });
            self.ready.push_front(range.start());
        }
        match skipped.is_empty() {
            true => Done::Nothing,
            false => {
                self.claims.free(skipped);
                Done::Skipped(skipped)
            }
        }
    }

    /// What is to be done with all of `range`, if it is data and goes in one piece.
    fn whole_piece(&self, range: ByteRange, align: u64, extent: Extent) -> Option<OpKind> {
        let is_known = extent.content == Content::Data && extent.len >= range.len();
        let is_wanted = extent.in_top || !self.shape.only_top;
        if !(is_known && is_wanted && range.len() <= self.shape.run_max) {
            return None;
        }
        let kind = self.shape.piece(range, align, extent);
        (kind.range() == Some(range)).then_some(kind)
    }

    /// What of `known` is not to be copied, from its start on, and up to where the source's answer is used.
    /// Where something of a block was copied already, the rest of it is, too.
    pub(super) fn skippable(
        &self,
        known: ByteRange,
        align: u64,
        extent: Extent,
    ) -> (ByteRange, u64) {
        let none = (known.start()..known.start()).into();
        if !self.shape.only_top || extent.in_top {
            return self.zero_already(known, align, extent.content);
        }
        let torn = self.torn.as_ref();
        let torn = torn.and_then(|torn| torn.next_dirty_area(known, known.len()));
        let known = match torn {
            Some(torn) if torn.start() <= known.start() => {
                return (none, known.end().min(torn.end()));
            }
            Some(torn) => known.split_at(torn.start()).0,
            None => known,
        };
        let whole = self.shape.whole_blocks(known, align);
        match whole.start() > known.start() {
            true => (none, known.end().min(whole.start())),
            false => (whole, known.end()),
        }
    }

    pub(super) fn plan(&mut self, range: ByteRange, align: u64, kind: OpKind) {
        self.claims.insert(Claim {
            range,
            align,
            state: ClaimState::Planned(kind),
        });
        self.ready.push_back(range.start());
    }

    pub(super) fn landed(&mut self, range: ByteRange, dirty: Option<&mut HBitmap>) -> Done {
        self.claims.remove(range.start());
        if let (Some(buffer), Some(dirty)) = (&self.buffer, dirty) {
            // Saved meanwhile: maybe before the source was read, and overwritten by then.
            for saved in buffer.saved_in(range) {
                if !is_broken(Sabotage::TrustOvertaken) {
                    make_dirty(dirty, saved);
                }
            }
        }
        Done::Range(range)
    }

    pub(super) fn fill(&mut self, range: ByteRange) {
        if let Some(filled) = &mut self.filled {
            let whole = filled.granularity().inward(range, self.shape.len);
            let granularity = filled.granularity();
            let start = granularity.start_of(whole.start);
            let end = granularity.start_of(whole.end).min(self.shape.len);
            filled.set(start..end).expect("within the disk");
        }
    }
}
