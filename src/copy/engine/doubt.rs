//! Comparing what is believed to be equal, while nothing else is to do.

use super::{Done, Engine, make_dirty};
use crate::bitmap::HBitmap;
use crate::copy::claims::{Claim, ClaimState};
use crate::copy::doubts::Doubts;
use crate::copy::{CompareBy, Content, Extent, Op, OpId, OpKind};
use crate::node::ActiveClaims;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// How many ranges may wait to be asked about before more are compared.
const ASK_MAX: usize = 1024;

impl Engine {
    /// With a target that can be compared.
    pub(crate) fn with_doubts(
        mut self,
        by: Option<CompareBy>,
    ) -> Result<Self, crate::bitmap::CreateError> {
        let Some(by) = by else {
            return Ok(self);
        };
        let (len, granularity) = (self.shape.len, self.shape.granularity);
        self.doubts = Some(Doubts::new(len, granularity, by)?);
        self.written = Some(HBitmap::new(len, granularity)?);
        let most = OpKind::Compare((0..self.shape.chunk_max).into(), by).buffered_bytes();
        self.buf_size = self.buf_size.max(most);
        Ok(self)
    }

    /// All is to be compared. `is_lacking` says that the target may lack any of it.
    pub(crate) fn doubt_all(&mut self, is_lacking: bool) {
        let Some(doubts) = &mut self.doubts else {
            return;
        };
        doubts.map.set_all();
        doubts.is_lacking = is_lacking;
        doubts.is_on = true;
        doubts.cursor = 0;
    }

    /// Whether something is doubtful, or being compared, or not told yet.
    pub(crate) fn has_doubts(&self) -> bool {
        self.doubts
            .as_ref()
            .is_some_and(|doubts| !doubts.is_settled())
    }

    /// Whether nothing else is left of the comparing than what is to be confirmed.
    pub(crate) fn has_only_suspects(&self) -> bool {
        self.doubts.as_ref().is_some_and(|doubts| {
            let is_rest_done = doubts.map.is_clean()
                && doubts.claims == 0
                && doubts.to_ask.is_empty()
                && doubts.asking.is_empty();
            is_rest_done && !doubts.suspects.is_clean()
        })
    }

    pub(crate) fn has_suspects(&self) -> bool {
        self.doubts
            .as_ref()
            .is_some_and(|doubts| !doubts.suspects.is_clean())
    }

    /// Bytes that are to be compared or confirmed; not those in flight.
    pub(crate) fn doubtful_bytes(&self) -> u64 {
        self.doubts.as_ref().map_or(0, |doubts| {
            doubts.map.dirty_bytes_in_len() + doubts.open.dirty_bytes_in_len()
        })
    }

    /// Bytes that are claimed to be compared, and not to be copied.
    pub(crate) fn comparing_bytes(&self) -> u64 {
        self.doubts
            .as_ref()
            .map_or(0, |doubts| doubts.claimed_bytes)
    }

    /// Whether the target may lack something that is not dirty.
    pub(crate) fn may_lack_doubtful(&self) -> bool {
        self.doubts.as_ref().is_some_and(|doubts| {
            !doubts.open.is_clean() || (doubts.is_lacking && !doubts.map.is_clean())
        })
    }

    /// What the target may lack of what is not dirty.
    pub(super) fn add_doubtful(&self, left: &mut HBitmap) {
        let Some(doubts) = &self.doubts else {
            return;
        };
        left.merge_from(&doubts.open).expect("it is as long");
        if doubts.is_lacking {
            left.merge_from(&doubts.map).expect("it is as long");
        }
    }

    /// The next thing to do for the comparing. To be asked for when nothing dirty can be claimed.
    pub(crate) fn next_compare(&mut self, dirty: &HBitmap) -> Option<Op> {
        if !self.has_free_worker() || !self.ready.is_empty() {
            return None;
        }
        self.hear_of_writes();
        let doubts = self.doubts.as_mut()?;
        if let Some(range) = doubts.next_to_ask() {
            let op = self.hand_out(OpKind::Status(range));
            let doubts = self.doubts.as_mut().expect("there are some");
            doubts.asking.insert(op.id(), range);
            return Some(op);
        }
        if doubts.to_ask.len() >= ASK_MAX || doubts.map.is_clean() {
            return None;
        }
        let (by, start_of_search) = (doubts.by, doubts.cursor.min(self.shape.len));
        doubts.blocked = None;
        let chunk_max = self.compare_max(by);
        let most = OpKind::Compare((0..chunk_max).into(), by).buffered_bytes();
        let running = self.running.buffered_bytes();
        let is_narrow = running == 0 || running + most <= self.background_max;
        if running + most > self.buf_size || !is_narrow {
            return None;
        }
        let free = self
            .claim_doubtful((start_of_search..self.shape.len).into(), chunk_max, dirty)
            .or_else(|| self.claim_doubtful((0..start_of_search).into(), chunk_max, dirty));
        let Some(free) = free else {
            let blocked = self.doubts.as_ref().and_then(|doubts| doubts.blocked);
            if let (None, Some(_), Some(actives)) = (self.blocked, blocked, self.claims.actives()) {
                // As for what is dirty: writes that never pause are not to keep it from being looked at.
                actives.lock().wish_for(blocked);
            }
            return None;
        };
        let (first, mut rest) = free.split_at(free.start().saturating_add(chunk_max));
        let op = self.hand_out(OpKind::Compare(first, by));
        self.claims.put(Claim {
            range: first,
            align: self.shape.block,
            state: ClaimState::Running(op.id()),
        });
        let mut pieces = 1;
        while !rest.is_empty() {
            let piece;
            (piece, rest) = rest.split_at(rest.start().saturating_add(chunk_max));
            self.claims.put(Claim {
                range: piece,
                align: self.shape.block,
                state: ClaimState::Planned(OpKind::Compare(piece, by)),
            });
            self.ready.push_back(piece.start());
            pieces += 1;
        }
        let doubts = self.doubts.as_mut().expect("there are some");
        doubts.claims += pieces;
        doubts.claimed_bytes += free.len();
        Some(op)
    }

    /// The longest comparison, as much as may be under way just now.
    fn compare_max(&self, by: CompareBy) -> u64 {
        let buffers = OpKind::Compare((0..1).into(), by).buffered_bytes();
        let block = self.shape.block;
        let most = ((self.background_max / buffers) & !(block - 1)).max(block);
        self.shape.chunk_max.min(most)
    }

    /// Ends the doubt of the first run of `search` that is free and not dirty, and shows active writes that it is
    /// claimed. It is to be put into the claims.
    fn claim_doubtful(
        &mut self,
        mut search: ByteRange,
        chunk_max: u64,
        dirty: &HBitmap,
    ) -> Option<ByteRange> {
        // A cluster that may have to be copied as a whole is looked at as a whole, too.
        let block = self.shape.cluster.unwrap_or(1).max(self.shape.block);
        let actives = self.claims.actives().cloned();
        let mut lock = actives.as_ref().map(ActiveClaims::lock);
        let doubts = self.doubts.as_mut()?;
        let most = (chunk_max & !(block - 1)).max(block);
        while let Some(run) = doubts.map.next_dirty_area(search, most) {
            let wish = self.shape.widen(run, block);
            let first_block = wish.split_at(wish.start() + block).0;
            let wish = wish.split_at(wish.start().saturating_add(most)).0;
            let claimed = self.claims.first_in(wish);
            let active = lock
                .as_ref()
                .and_then(|lock| lock.first_in(wish, !self.is_guest_held));
            if active.is_some_and(|active| active.overlaps(first_block)) {
                doubts.blocked.get_or_insert(first_block);
            }
            // What is dirty will be copied, and needs no comparing.
            let written = dirty.next_dirty_area(wish, u64::MAX);
            let taken = claimed.into_iter().chain(active).chain(written);
            let free = match taken.min_by_key(|taken| taken.start()) {
                Some(taken) if taken.overlaps(first_block) => {
                    search = search.split_at(taken.end().max(first_block.end())).1;
                    continue;
                }
                Some(taken) => wish.split_at(taken.start() & !(block - 1)).0,
                None => wish,
            };
            doubts.map.reset(free).expect("made of whole blocks");
            doubts.cursor = free.end();
            if let Some(lock) = &mut lock {
                lock.claim(free);
            }
            return Some(free);
        }
        None
    }

    /// The claim of a comparison is over, whatever came of it.
    fn end_comparing(&mut self, range: ByteRange) {
        self.claims.remove(range.start());
        if let Some(doubts) = &mut self.doubts {
            doubts.claims -= 1;
            doubts.claimed_bytes -= range.len();
        }
    }

    /// It was compared.
    pub(super) fn compared(
        &mut self,
        range: ByteRange,
        differing: Vec<ByteRange>,
        dirty: &mut HBitmap,
    ) -> Done {
        let doubts = self.doubts.as_mut().expect("it was compared");
        let differing = differing.into_iter().map(|part| part.intersection(range));
        let mut is_equal = true;
        for part in differing.filter(|part| !part.is_empty()) {
            is_equal = false;
            if doubts.is_on {
                doubts.open.set(part).expect("within the disk");
                doubts.to_ask.push_back(part);
            } else {
                make_dirty(dirty, part);
            }
        }
        if !is_equal {
            self.target_changes(range);
        }
        self.end_comparing(range);
        Done::Compared(range)
    }

    /// The target cannot be read there. If it may lack it, it is copied: what cannot be read can often be written.
    pub(super) fn cannot_compare(&mut self, range: ByteRange, dirty: &mut HBitmap) {
        let may_lack = self.doubts.as_ref().is_some_and(|doubts| doubts.is_lacking);
        if !may_lack || is_broken(Sabotage::ForgetDoubt) {
            return self.not_compared(range);
        }
        make_dirty(dirty, range);
        self.end_comparing(range);
    }

    /// It was not compared.
    pub(super) fn not_compared(&mut self, range: ByteRange) {
        if let Some(doubts) = &mut self.doubts
            && doubts.is_on
            && !is_broken(Sabotage::ForgetDoubt)
        {
            doubts.doubt(range);
        }
        self.end_comparing(range);
    }

    /// Whether that answer is one about what differs; if so, it is taken.
    pub(super) fn heard_of_doubt(&mut self, id: OpId, extent: Option<Extent>) -> bool {
        let Some(doubts) = &mut self.doubts else {
            return false;
        };
        let Some(range) = doubts.asking.remove(&id) else {
            return false;
        };
        let extent = extent.unwrap_or(Extent::data(range.len())).or_data(range);
        let (known, rest) = range.split_at(range.start().saturating_add(extent.len));
        if extent.content != Content::Undefined {
            doubts.suspect(known);
        }
        if !rest.is_empty() && doubts.is_on {
            doubts.to_ask.push_front(rest);
        }
        self.close_doubts();
        true
    }

    /// A question that is lost is asked again. Whether it is one about what differs.
    pub(super) fn lose_question(&mut self, id: OpId) -> bool {
        let Some(doubts) = &mut self.doubts else {
            return false;
        };
        let Some(range) = doubts.asking.remove(&id) else {
            return false;
        };
        if doubts.is_on {
            doubts.to_ask.push_back(range);
        }
        true
    }

    /// What was not defined is not open any more.
    fn close_doubts(&mut self) {
        let Some(doubts) = &mut self.doubts else {
            return;
        };
        if doubts.to_ask.is_empty() && doubts.asking.is_empty() && doubts.suspects.is_clean() {
            doubts.open.reset_all();
        }
    }

    /// All writes have settled that were under way when the suspects were read, and are in `dirty`: what of them is
    /// not, differs. It is dirty from now on, and returned to be told.
    pub(crate) fn confirm(&mut self, dirty: &mut HBitmap) -> Vec<ByteRange> {
        self.hear_of_writes();
        let Some(doubts) = &mut self.doubts else {
            return Vec::new();
        };
        if !is_broken(Sabotage::TellRaces) {
            doubts.suspects.subtract(dirty).expect("it is as long");
        }
        let mut differing: Vec<ByteRange> = Vec::new();
        let runs: Vec<ByteRange> = doubts.suspects.runs().collect();
        let align = self.shape.cluster.unwrap_or(1).max(self.shape.block);
        let asked = doubts.to_ask.iter().chain(doubts.asking.values()).copied();
        let compared = self.claims.iter().filter_map(|claim| match claim.state {
            ClaimState::Planned(OpKind::Compare(range, _)) => Some(range),
            _ => None,
        });
        let running = self.running.iter().filter_map(|out| match out.kind {
            OpKind::Compare(range, _) => Some(range),
            _ => None,
        });
        let undecided = joined(asked.chain(compared).chain(running).collect());
        for mut rest in runs {
            while !rest.is_empty() {
                let unit = self.shape.widen(rest.split_at(rest.start() + 1).0, align);
                let part;
                (part, rest) = rest.split_at(unit.end());
                // What is copied at once is told at once, or some of it would be mended unseen.
                if has_any(&undecided, unit) || doubts.map.any_dirty_in(unit) {
                    continue;
                }
                match differing.last_mut() {
                    Some(last) if last.end() == part.start() => {
                        *last = (last.start()..part.end()).into();
                    }
                    _ => differing.push(part),
                }
            }
        }
        for &range in &differing {
            if !is_broken(Sabotage::TellOnly) {
                make_dirty(dirty, range);
            }
            doubts.open.reset(range).expect("made of granules");
            doubts.suspects.reset(range).expect("made of granules");
        }
        self.close_doubts();
        differing
    }

    /// Nobody wants to know any more: what is known to differ, or may, is copied, and nothing more is compared.
    pub(crate) fn stop_comparing(&mut self, dirty: &mut HBitmap) {
        let Some(doubts) = &mut self.doubts else {
            return;
        };
        if !doubts.is_on {
            return;
        }
        doubts.is_on = false;
        doubts.map.reset_all();
        doubts.suspects.reset_all();
        doubts.to_ask.clear();
        let open: Vec<ByteRange> = doubts.open.runs().collect();
        doubts.open.reset_all();
        for range in open {
            make_dirty(dirty, range);
        }
        self.give_up_compares();
    }

    /// Comparisons that were planned are not made. What they were for is doubtful again, if that is of interest.
    pub(super) fn give_up_compares(&mut self) {
        let is_compare =
            |claim: &&Claim| matches!(claim.state, ClaimState::Planned(OpKind::Compare(..)));
        let planned: Vec<ByteRange> = self
            .claims
            .iter()
            .filter(is_compare)
            .map(|claim| claim.range)
            .collect();
        for range in planned {
            self.ready.retain(|&ready| ready != range.start());
            self.not_compared(range);
        }
    }

    /// All was compared, and told.
    pub(crate) fn end_doubts(&mut self) {
        if let Some(doubts) = &mut self.doubts {
            doubts.is_on = false;
            doubts.is_lacking = false;
            doubts.open.reset_all();
        }
    }
}

/// In their order, those that touch as one.
fn joined(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    ranges.sort_unstable_by_key(|range| range.start());
    let mut joined: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end() >= range.start() => {
                *last = (last.start()..last.end().max(range.end())).into();
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// Whether one of those that were [joined] overlaps `range`.
fn has_any(joined: &[ByteRange], range: ByteRange) -> bool {
    let next = joined.partition_point(|known| known.end() <= range.start());
    joined.get(next).is_some_and(|known| known.overlaps(range))
}
