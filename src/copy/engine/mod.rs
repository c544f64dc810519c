//! The machinery of every copying job: claims dirty ranges, looks at them, cuts them into operations,
//! and sees to it that nothing gets lost on the way.
//!
//! ```text
//!  dirty ──claim──▶ look ──status──▶ planned ──hand out──▶ running ──done──▶ on the target
//!    ▲                │                 │                     ├──failed──▶ parked ─┐
//!    │                │                 │                     └──lost────▶ settle ─┤
//!    └────────────────┴─given up────────┴──────────────────────────────────────────┘
//! ```
//!
//! Invariants; the tests break each of them on purpose and must notice:
//!
//! 1. A claim clears the dirty bits *before* the source is asked or read. A guest write that settles
//!    later sets them again, and the range is copied again.
//! 2. The search for what is free, the clearing of its bits and the claim are one step, with the node
//!    locked.
//! 3. No two claims overlap, so no two writes to the target do.
//! 4. A range is widened *before* it is compared with the claims, and claimed as it was widened.
//! 5. What failed is dirty again before its claim ends, and before anybody is told.
//! 6. A range whose operation was lost stays claimed until the target has settled, and is dirty again
//!    then: the write may still land.
//! 7. What was claimed and never handed out is dirty again when the job gives up.
//! 8. What the target holds is promised only when no claim is left: not by a clean bitmap alone.
//! 9. What was not written to the end is written again, also where only what is in the top layer is copied and
//!    the source says by then that this is not.
//! 10. What a guest waits for goes ahead of everything else, and is not kept back by what the rest has of
//!     workers and buffers.

mod claim;
mod doubt;
mod failed;
mod running;
mod urgent;
mod zeroes;

use std::collections::VecDeque;
use std::io;

use crate::bitmap::HBitmap;
use crate::copy::claims::{Claim, ClaimState, Claims};
use crate::copy::doubts::Doubts;
use crate::copy::{Buffer, Extent, IfZero, Op, OpId, OpKind, Outcome, Shape, Side, Zeroes};
use crate::node::{ActiveClaims, NotSaved};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

use running::{Out, Rank, Running};

/// Ranges that failed and wait to be tried again, at most: so many areas may be bad before others have to
/// wait, and so often is a device asked in vain that is dead.
const PARKED_MAX: usize = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    shape: Shape,
    /// The longest claim just now: longer where there is no data, so that holes are passed in few steps.
    run_max: u64,
    /// Operations at the same time, at most.
    workers: usize,
    /// Bytes held in buffers at the same time, at most.
    buf_size: u64,
    /// The same for now, so that guests need not wait for them.
    background_max: u64,
    claims: Claims,
    /// Where the claims start that wait to be looked at or handed out, in that order.
    ready: VecDeque<u64>,
    /// Everything handed out and not reported back.
    running: Running,
    /// Where the search for dirty ranges goes on.
    cursor: u64,
    /// For a target whose clusters must be written whole at first: those that were.
    filled: Option<HBitmap>,
    /// Where a write to the target has failed, or was lost, if only what is in the top layer is copied.
    torn: Option<HBitmap>,
    copy_by: CopyBy,
    /// What is known to read as zeroes on the target, where zeroes are not cheap.
    zeroes: Option<Zeroes>,
    /// What is to be compared, if the target can be.
    doubts: Option<Doubts>,
    /// To note in what active writes have written to, until there are any, if something depends on that.
    written: Option<HBitmap>,
    /// Whether data that is read is looked at for being zeroes.
    detects_zeroes: bool,
    /// A place for what the guest is about to overwrite, if there is one.
    buffer: Option<Buffer>,
    /// The first block that could not be claimed for an active write, when a claim was tried last.
    blocked: Option<ByteRange>,
    /// Whether the guest is held: then nobody waits whom the job has given way to.
    is_guest_held: bool,
    /// Whether a request to settle is out.
    is_settling: bool,
    /// Whether a discard of the target was lost, which belongs to no claim and may still land.
    has_lost_discard: bool,
    /// Whether a write has ended since the last flush that succeeded was handed out.
    has_unflushed: bool,
}

/// By what way data comes to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyBy {
    /// It is read, and written.
    Buffer,
    /// The same, and the target compresses it.
    Compressing,
    /// The target fetches it, until that fails for the first time.
    Offloading,
}

/// What may be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// What costs nothing against the speed limit, and is claimed already.
    Free,
    /// What is claimed already.
    Copy,
    /// Everything; what is dirty may be claimed.
    Claim,
}

/// What can be done for a guest that waits.
#[derive(Debug)]
pub(crate) enum Urgent {
    /// This.
    Op(Op),
    /// Nothing more just now: all is on its way, or too much is for guests already.
    Wait,
    /// There is no space in the buffer, or it has failed just now, or there is no buffer.
    NoRoom(NotSaved),
}

/// What became of an operation that was reported back.
#[derive(Debug)]
pub(crate) enum Done {
    /// Nothing that anybody waits for.
    Nothing,
    /// Its range is on the target.
    Range(ByteRange),
    /// It was compared.
    Compared(ByteRange),
    /// It is in the buffer, and so what the guest may overwrite.
    Saved(ByteRange),
    /// The source's topmost layer holds nothing there, and so nothing is to be copied.
    Skipped(ByteRange),
    /// The target is flushed.
    Flushed,
    /// A request for the source's status that was not one of the engine's own.
    Status(ByteRange, Extent),
    /// It failed. Its range, if it has one, is dirty again and still claimed: it is to be given to
    /// [`Engine::retry_at`] or to [`Engine::release`].
    Failed {
        side: Side,
        kind: OpKind,
        error: io::Error,
        /// Whether a guest waits for it.
        is_urgent: bool,
    },
}

impl Engine {
    pub(crate) fn new(
        shape: Shape,
        workers: usize,
        buf_size: u64,
    ) -> Result<Self, crate::bitmap::CreateError> {
        let filled = shape
            .cluster
            .map(|cluster| {
                let granularity = Granularity::from_bytes(cluster).expect("a power of two");
                HBitmap::new(shape.len, granularity)
            })
            .transpose()?;
        let torn = match shape.only_top {
            true => {
                let mut torn = HBitmap::new(shape.len, shape.granularity)?;
                // What has failed must not be forgotten for want of memory.
                torn.reserve()?;
                Some(torn)
            }
            false => None,
        };
        Ok(Self {
            torn,
            buf_size: buf_size.max(shape.chunk_max),
            background_max: u64::MAX,
            run_max: shape.run_max,
            shape,
            workers,
            claims: Claims::default(),
            ready: VecDeque::new(),
            running: Running::default(),
            cursor: 0,
            filled,
            copy_by: CopyBy::Buffer,
            zeroes: None,
            written: None,
            doubts: None,
            detects_zeroes: false,
            buffer: None,
            blocked: None,
            is_guest_held: false,
            is_settling: false,
            has_lost_discard: false,
            has_unflushed: false,
        })
    }

    /// With a place to put what guests wait for.
    pub(crate) fn with_buffer(mut self, buffer: Option<Buffer>) -> Self {
        self.buffer = buffer;
        self
    }

    pub(crate) fn copying_by(mut self, copy_by: CopyBy) -> Self {
        self.copy_by = copy_by;
        self
    }

    /// Guest writes may be active ones from now on: nothing is claimed that they are writing, and they see what is.
    pub(crate) fn show_claims(&mut self, actives: ActiveClaims) {
        self.claims.show_to(actives, self.written.take());
    }

    /// The most that is under way to the target at once, unless that is narrowed.
    pub(crate) fn in_flight_max(&self) -> u64 {
        let workers = u64::try_from(self.workers).unwrap_or(u64::MAX);
        self.buf_size
            .min(self.shape.chunk_max.saturating_mul(workers))
    }

    /// Whether no more is in flight in the background than is to be.
    pub(crate) fn is_narrow(&self) -> bool {
        self.background_bytes() <= self.background_max.max(self.shape.chunk_max)
    }

    /// Whether the guest is held, for what is claimed next.
    pub(crate) fn hold_guest(&mut self, is_held: bool) {
        self.is_guest_held = is_held;
    }

    /// The target was written to by somebody else.
    pub(crate) fn note_unflushed(&mut self) {
        self.has_unflushed = true;
    }

    /// What is asked for when that is planned.
    fn by(&self, kind: OpKind) -> OpKind {
        match (kind, self.copy_by) {
            (OpKind::Copy(range), CopyBy::Compressing) => OpKind::CopyCompressed(range),
            (OpKind::CopySaved(range), CopyBy::Compressing) => OpKind::CopySavedCompressed(range),
            (OpKind::Copy(range), CopyBy::Offloading) => OpKind::CopyOffloaded(range),
            (OpKind::Copy(range), CopyBy::Buffer) if self.detects_zeroes => self.detecting(range),
            _ => kind,
        }
    }

    pub(crate) fn buffer_mut(&mut self) -> Option<&mut Buffer> {
        self.buffer.as_mut()
    }

    pub(crate) fn buffer(&self) -> Option<&Buffer> {
        self.buffer.as_ref()
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Whether nothing is handed out and nothing can still change the target.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && !self.has_lost() && self.is_buffer_settled()
    }

    /// Whether nothing that was lost can change the buffer any more.
    pub(crate) fn is_buffer_settled(&self) -> bool {
        self.buffer.as_ref().is_none_or(Buffer::is_settled)
    }

    /// Operations that may still change the target: not reported back, or lost.
    pub(crate) fn unsettled(&self) -> usize {
        let running = self.running.iter();
        let running =
            running.filter(|out| out.kind.writes_target() || matches!(out.kind, OpKind::GiveUp(_)));
        running.count() + self.claims.lost() + usize::from(self.has_lost_discard)
    }

    /// Whether no range is in flight, planned, or waiting to be tried again.
    pub(crate) fn has_no_claims(&self) -> bool {
        self.claims.is_empty()
    }

    /// Bytes in flight or planned. What waits to be tried again is dirty, and counted there.
    pub(crate) fn claimed_bytes(&self) -> u64 {
        self.claims.bytes() - self.claims.parked_bytes()
    }

    /// Whether the target was written to since the last flush was handed out. While one
    /// [is out](Self::is_flushing), nothing is flushed yet.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.has_unflushed
    }

    pub(crate) fn is_flushing(&self) -> bool {
        self.running.iter().any(|out| out.kind == OpKind::Flush)
    }

    pub(crate) fn has_free_worker(&self) -> bool {
        self.running.workers() < self.workers
    }

    /// Whether nothing is in flight but what guests wait for, or nobody does.
    pub(crate) fn is_idle_but_urgent(&self) -> bool {
        self.running.workers() == 0 && !self.has_lost()
    }

    /// Hands out an operation that belongs to no claim.
    pub(crate) fn hand_out(&mut self, kind: OpKind) -> Op {
        if kind == OpKind::Flush {
            // What is written from here on is not covered by it.
            self.has_unflushed = false;
        }
        self.note_zeroes(kind);
        self.running.hand_out(kind, Rank::Worker)
    }

    /// The next operation, if there is work and room for it.
    pub(crate) fn next(&mut self, dirty: &mut HBitmap, budget: Budget) -> Option<Op> {
        if !self.has_free_worker() {
            return None;
        }
        self.hear_of_writes();
        let may_claim =
            budget == Budget::Claim && self.claims.parked() < PARKED_MAX && !self.looks_far_ahead();
        let has_saved = may_claim && !self.is_saved_next() && self.claim_saved(dirty);
        if self.ready.is_empty() && !has_saved && !(may_claim && self.claim(dirty)) {
            return None;
        }
        let start = *self.ready.front().expect("claimed just now");
        if self.background_max < self.shape.chunk_max {
            self.cut_short(start);
        }
        let claim = self
            .claims
            .get(start)
            .expect("what is in the queue is claimed");
        let kind = match claim.state {
            ClaimState::Look => OpKind::Status(claim.range),
            ClaimState::Planned(kind) => self.by(kind),
            ClaimState::Running(_) | ClaimState::Parked { .. } | ClaimState::Lost => {
                unreachable!("only what waits to be handed out is in the queue")
            }
        };
        let is_free = self.cost(kind) == 0;
        let buffered = self.running.buffered_bytes() + kind.buffered_bytes();
        let moving = self.running.moving_bytes();
        let is_narrow = moving == 0 || moving + kind.moving_bytes() <= self.background_max;
        let fits = buffered <= self.buf_size && is_narrow;
        if !(fits && (budget != Budget::Free || is_free)) {
            return None;
        }
        self.ready.pop_front();
        if is_broken(Sabotage::ClearAfterLook) && kind.writes_target() {
            make_clean(dirty, self.shape.granularity, kind);
        }
        let op = self.hand_out(kind);
        self.claims.set_state(start, ClaimState::Running(op.id()));
        Some(op)
    }

    /// Whether what is to be handed out next comes from the buffer.
    fn is_saved_next(&self) -> bool {
        let next = self.ready.front().and_then(|&start| self.claims.get(start));
        next.is_some_and(|claim| matches!(claim.state, ClaimState::Planned(OpKind::CopySaved(_))))
    }

    /// For now no more is in flight in the background than that, or than the least that is copied at once.
    pub(crate) fn limit_background(&mut self, bytes: u64) {
        self.background_max = bytes;
    }

    /// Bytes in flight in the background.
    pub(crate) fn background_bytes(&self) -> u64 {
        self.running.moving_bytes()
    }

    /// Cuts what is planned so that it is in flight for no longer than guests may wait. The rest stays planned.
    fn cut_short(&mut self, start: u64) {
        let claim = *self
            .claims
            .get(start)
            .expect("what is in the queue is claimed");
        let (range, align) = (claim.range, claim.align);
        let cut = |make: fn(ByteRange) -> OpKind| {
            let most = (self.background_max & !(align - 1)).max(align);
            let (first, rest) = range.split_at(range.start().saturating_add(most));
            (!rest.is_empty()).then(|| (make(first), make(rest)))
        };
        let pieces = match claim.state {
            ClaimState::Planned(OpKind::Copy(_)) => cut(OpKind::Copy),
            ClaimState::Planned(OpKind::CopySaved(_)) => cut(OpKind::CopySaved),
            _ => None,
        };
        let Some((first, rest)) = pieces else {
            return;
        };
        self.claims.take(start);
        self.ready.pop_front();
        for kind in [rest, first] {
            let range = kind.range().expect("a copy has a range");
            let state = ClaimState::Planned(kind);
            self.claims.put(Claim {
                range,
                align,
                state,
            });
            self.ready.push_front(range.start());
        }
    }

    /// Whether more is being asked about than is copied soon. A source may have to search long for where data
    /// ends, and what it has found for one request then serves those that come later.
    fn looks_far_ahead(&self) -> bool {
        self.running.looked_at_bytes() >= self.buf_size.saturating_mul(2)
    }

    /// How a range of the target can be discarded: what it is aligned to and how long it may be.
    pub(crate) fn discard_limits(&self) -> Option<(u64, u64)> {
        self.shape.discard_limits()
    }

    /// Whether nothing of `range` is left to do, or being done.
    pub(crate) fn is_done(&self, dirty: &HBitmap, range: ByteRange) -> bool {
        !dirty.any_dirty_in(range) && self.claims.first_in(range).is_none()
    }

    /// What an operation counts against the speed limit.
    pub(crate) fn cost(&self, kind: OpKind) -> u64 {
        match kind {
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::CopyOffloaded(range)
            | OpKind::Compare(range, _) => range.len(),
            OpKind::CopySaved(range) | OpKind::CopySavedCompressed(range) | OpKind::Save(range) => {
                range.len()
            }
            OpKind::Zero(range, _) | OpKind::Discard(range) if !self.shape.cheap_zeroes => {
                range.len()
            }
            _ => 0,
        }
    }

    /// Operations planned and not handed out.
    pub(crate) fn planned(&self) -> usize {
        self.ready.len()
    }

    /// Takes an operation back. One that is not known, because it was given up before, is ignored:
    /// `None`.
    pub(crate) fn done(
        &mut self,
        op: Op,
        outcome: Outcome,
        mut dirty: Option<&mut HBitmap>,
    ) -> Option<Done> {
        let Out { kind, rank, .. } = self.running.take_back(&op)?;
        self.hear_of_writes();
        let is_urgent = rank == Rank::Urgent;
        // When it ends, not when it goes out: a flush that went out in between does not cover it.
        self.has_unflushed |= kind.writes_target();
        if let OpKind::Status(_) = kind {
            let extent = match outcome {
                Outcome::Status(extent) => Some(extent),
                _ => None,
            };
            if self.heard_of_doubt(op.id(), extent) {
                return Some(Done::Nothing);
            }
        }
        Some(match (kind, outcome) {
            (OpKind::Compare(range, _), Outcome::Compared(differing)) => {
                let dirty = dirty.expect("a range was claimed, so there is a bitmap");
                self.compared(range, differing, dirty)
            }
            (OpKind::Compare(range, _), outcome) => {
                let (side, error) = match outcome {
                    Outcome::Failed { side, error } => (side, error),
                    _ => (Side::Target, wrong_answer()),
                };
                match dirty {
                    Some(dirty) if side == Side::Target => self.cannot_compare(range, dirty),
                    _ => self.not_compared(range),
                }
                Done::Failed {
                    side,
                    kind,
                    error,
                    is_urgent,
                }
            }
            (OpKind::Status(range), Outcome::Status(extent)) => {
                self.looked(range, extent, op.id(), dirty)
            }
            (
                OpKind::Status(range),
                Outcome::Failed { .. } | Outcome::Done | Outcome::Zeroes | Outcome::Compared(_),
            ) if !self.shape.only_top && self.is_claimed_by(range, op.id()) => {
                // Not knowing what is there is no error: it is copied as data.
                let extent = Extent::data(range.len());
                self.looked(range, extent, op.id(), dirty)
            }
            (
                OpKind::CopyOffloaded(range),
                Outcome::Failed { .. }
                | Outcome::Status(_)
                | Outcome::Zeroes
                | Outcome::Compared(_),
            ) => {
                // The target may hold anything there now; it is written again, also if that is only tried later.
                self.note_torn(range);
                self.copy_by = CopyBy::Buffer;
                self.claims
                    .set_state(range.start(), ClaimState::Planned(OpKind::Copy(range)));
                self.ready.push_front(range.start());
                Done::Nothing
            }
            (
                OpKind::Copy(range)
                | OpKind::CopyDetecting(range, _)
                | OpKind::CopyCompressed(range)
                | OpKind::CopyOffloaded(range)
                | OpKind::Zero(range, _),
                Outcome::Done,
            ) => {
                self.fill(range);
                self.note_written(kind);
                if is_broken(Sabotage::ClearAfterCopy) {
                    let dirty = dirty.as_mut().expect("there is a bitmap");
                    make_clean(dirty, self.shape.granularity, kind);
                }
                self.landed(range, dirty)
            }
            (OpKind::CopyDetecting(range, if_zero), Outcome::Zeroes) => {
                if let IfZero::Write(_) = if_zero {
                    self.fill(range);
                }
                self.note_zeroed(range);
                self.landed(range, dirty)
            }
            (OpKind::Discard(range), Outcome::Done) => self.landed(range, dirty),
            (OpKind::CopySaved(range) | OpKind::CopySavedCompressed(range), Outcome::Done) => {
                self.fill(range);
                if let Some(buffer) = &mut self.buffer {
                    buffer.is_copied(range);
                }
                self.landed(range, dirty)
            }
            (OpKind::Save(range), Outcome::Done) => {
                let dirty = dirty.expect("a guest waits, so there is a bitmap");
                let claims = &self.claims;
                let is_wanted = |range| {
                    dirty.any_dirty_in(range)
                        || claims.first_in(range).is_some()
                        || is_broken(Sabotage::SaveUnwanted)
                };
                if let Some(buffer) = &mut self.buffer {
                    buffer.put_in(range, is_wanted);
                }
                Done::Saved(range)
            }
            (OpKind::Save(range), outcome) => {
                let (side, error) = match outcome {
                    Outcome::Failed { side, error } => (side, error),
                    Outcome::Done | Outcome::Zeroes | Outcome::Status(_) | Outcome::Compared(_) => {
                        (Side::Buffer, wrong_answer())
                    }
                };
                if let Some(buffer) = &mut self.buffer {
                    match side {
                        Side::Buffer => buffer.stop(range),
                        Side::Source | Side::Target => buffer.end_saving(range),
                    }
                }
                Done::Failed {
                    side,
                    kind,
                    error,
                    is_urgent,
                }
            }
            (OpKind::DiscardSaved(range), outcome) => {
                if let (Some(buffer), Outcome::Done) = (&mut self.buffer, outcome) {
                    buffer.discarded(range);
                }
                Done::Nothing
            }
            (OpKind::SettleSaved, Outcome::Done) => {
                if let Some(buffer) = &mut self.buffer {
                    buffer.settled();
                }
                Done::Nothing
            }
            (OpKind::SettleSaved, outcome) => {
                // Then it is not settled.
                if let Some(buffer) = &mut self.buffer {
                    buffer.lose();
                }
                Done::Failed {
                    side: Side::Buffer,
                    kind,
                    error: match outcome {
                        Outcome::Failed { error, .. } => error,
                        Outcome::Done
                        | Outcome::Zeroes
                        | Outcome::Status(_)
                        | Outcome::Compared(_) => wrong_answer(),
                    },
                    is_urgent,
                }
            }
            (OpKind::Flush, Outcome::Done) => Done::Flushed,
            (OpKind::Settle, Outcome::Done) => {
                let dirty = dirty.expect("a range was claimed, so there is a bitmap");
                self.settled(dirty);
                Done::Nothing
            }
            (OpKind::CancelInFlight | OpKind::GiveUp(_) | OpKind::DiscardSource(_), _) => {
                Done::Nothing
            }
            (OpKind::Settle, outcome) => {
                // Then it is not settled.
                self.is_settling = false;
                Done::Failed {
                    side: Side::Target,
                    kind,
                    error: match outcome {
                        Outcome::Failed { error, .. } => error,
                        Outcome::Done
                        | Outcome::Zeroes
                        | Outcome::Status(_)
                        | Outcome::Compared(_) => wrong_answer(),
                    },
                    is_urgent,
                }
            }
            (kind, Outcome::Failed { side, error }) => {
                self.has_unflushed |= kind == OpKind::Flush;
                if let Some(range) = self.claimed_range(kind, op.id()) {
                    let dirty = dirty.expect("a range was claimed, so there is a bitmap");
                    if !is_broken(Sabotage::ForgetFailed) {
                        make_dirty(dirty, range);
                    }
                    if side != Side::Source {
                        self.note_torn(range);
                    }
                }
                Done::Failed {
                    side,
                    kind,
                    error,
                    is_urgent,
                }
            }
            (kind, Outcome::Status(_) | Outcome::Done | Outcome::Zeroes | Outcome::Compared(_)) => {
                // An answer to another question. It may not have been done.
                self.has_unflushed |= kind == OpKind::Flush;
                if let Some(range) = self.claimed_range(kind, op.id()) {
                    let dirty = dirty.expect("a range was claimed, so there is a bitmap");
                    make_dirty(dirty, range);
                    self.note_torn(range);
                }
                Done::Failed {
                    side: if kind.writes_target() {
                        Side::Target
                    } else {
                        Side::Source
                    },
                    kind,
                    error: wrong_answer(),
                    is_urgent,
                }
            }
        })
    }

    /// The range that is claimed for an operation.
    pub(crate) fn claimed_range(&self, kind: OpKind, id: OpId) -> Option<ByteRange> {
        let range = kind.range()?;
        (kind.writes_target() || self.is_claimed_by(range, id)).then_some(range)
    }

    /// The list of the module, as far as it can be seen from one moment.
    pub(crate) fn check_invariants(&self) {
        let mut end = 0;
        let mut bytes = 0;
        for claim in self.claims.iter() {
            assert!(claim.range.start() >= end, "3: claims overlap");
            assert!(!claim.range.is_empty() && claim.range.end() <= self.shape.len);
            end = claim.range.end();
            bytes += claim.range.len();
            match claim.state {
                ClaimState::Look | ClaimState::Planned(_) => {
                    assert!(self.ready.contains(&claim.range.start()), "7: forgotten");
                }
                ClaimState::Running(id) => {
                    let mut running = self.running.iter();
                    let out = running.find(|out| out.id == id).expect("it is out");
                    assert_eq!(out.kind.range(), Some(claim.range));
                }
                ClaimState::Parked { .. } | ClaimState::Lost => {}
            }
        }
        assert_eq!(bytes, self.claims.bytes());
        for &Out { id, kind, .. } in self.running.iter() {
            if kind.writes_target() {
                let range = kind.range().expect("a write has a range");
                assert!(self.is_claimed_by(range, id), "3: a write without a claim");
            }
        }
        self.running.check_invariants();
        assert!(self.running.buffered_bytes() <= self.buf_size);
    }

    fn is_claimed_by(&self, range: ByteRange, id: OpId) -> bool {
        self.claims
            .get(range.start())
            .is_some_and(|claim| claim.state == ClaimState::Running(id))
    }
}

fn wrong_answer() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "the answer does not belong to the operation",
    )
}

/// For sabotage: clears the bits of an operation when it is too late.
fn make_clean(dirty: &mut HBitmap, granularity: Granularity, kind: OpKind) {
    let range = kind.range().expect("it has a range");
    let start = granularity.align_down(range.start());
    let end = granularity.align_up(range.end());
    dirty.reset_inner(start..end).expect("within the disk");
}

fn make_dirty(dirty: &mut HBitmap, range: ByteRange) {
    dirty.set(range).expect("within the disk");
}
