//! Zeroes: those that need not be written, and those that show only when the data was read.

use super::Engine;
use crate::bitmap::{CreateError, HBitmap};
use crate::copy::{Content, IfZero, OpKind, Zeroes};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

impl Engine {
    /// With what is known to read as zeroes on the target.
    pub(crate) fn with_zeroes(mut self, zeroes: Option<Zeroes>) -> Result<Self, CreateError> {
        if zeroes.is_some() {
            self.written = Some(HBitmap::new(self.shape.len, self.shape.granularity)?);
        }
        self.zeroes = zeroes;
        Ok(self)
    }

    /// Active writes have gone to the target without being handed out here. What is known of what is claimed now
    /// is true from here on.
    pub(super) fn hear_of_writes(&mut self) {
        if self.zeroes.is_none() && self.doubts.is_none() {
            return;
        }
        let Some(actives) = self.claims.actives() else {
            return;
        };
        let written = actives.lock().take_written();
        if is_broken(Sabotage::IgnoreActiveWrites) {
            return;
        }
        for range in written {
            if let (Some(doubts), false) = (&mut self.doubts, is_broken(Sabotage::KeepSuspicion)) {
                doubts.look_again(range);
            }
            self.target_changes(range);
        }
    }

    /// With a look at all data that is read, if that is asked for.
    pub(crate) fn detecting_zeroes(mut self, detects: bool) -> Self {
        self.detects_zeroes = detects;
        self
    }

    /// How a range is copied whose data is to be looked at.
    pub(super) fn detecting(&self, range: ByteRange) -> OpKind {
        let is_zero = self
            .zeroes
            .as_ref()
            .is_some_and(|known| known.has_all(range));
        // What is written beside it may fill the rest of a cluster with something else.
        let is_whole = self.shape.fills_nothing_else(range) || is_broken(Sabotage::LeaveParts);
        if is_zero && is_whole {
            return OpKind::CopyDetecting(range, IfZero::Leave);
        }
        match self.shape.takes_zeroes(range) {
            true => OpKind::CopyDetecting(range, IfZero::Write(self.shape.unmap)),
            false => OpKind::Copy(range),
        }
    }

    /// Of `known`, of which all is like its start, what needs no zeroes, for the target reads so already: from
    /// its start on, in whole blocks. And up to where the answer counts.
    pub(super) fn zero_already(
        &self,
        known: ByteRange,
        align: u64,
        content: Content,
    ) -> (ByteRange, u64) {
        let none = (known.start()..known.start()).into();
        let zeroes = self.zeroes.as_ref().filter(|_| content != Content::Data);
        let Some(area) = zeroes.and_then(|zeroes| zeroes.first_in(known)) else {
            return (none, known.end());
        };
        let whole = self.shape.whole_blocks(area, align);
        if whole.is_empty() {
            (none, known.end())
        } else if whole.start() == known.start() {
            (whole, whole.end())
        } else {
            (none, whole.start())
        }
    }

    /// Whether the target is known to read as zeroes at the start of `area`, and how far that is so.
    pub(crate) fn zeroes_at(&self, area: ByteRange) -> (bool, ByteRange) {
        let known = self
            .zeroes
            .as_ref()
            .and_then(|zeroes| zeroes.first_in(area));
        match known {
            None => (false, area),
            Some(known) if known.start() > area.start() => (false, area.split_at(known.start()).0),
            Some(known) => (true, known),
        }
    }

    /// An operation is about to be handed out.
    pub(super) fn note_zeroes(&mut self, kind: OpKind) {
        if let (OpKind::Zero(range, _), true) = (kind, is_broken(Sabotage::TrustZeroesAtOnce)) {
            self.note_zeroed(range);
        }
        let is_late = is_broken(Sabotage::KeepZeroes) || is_broken(Sabotage::KeepZeroesOfFailed);
        if !is_late {
            self.forget_zeroes(kind);
        }
    }

    /// It was done.
    pub(super) fn note_written(&mut self, kind: OpKind) {
        match kind {
            OpKind::Zero(range, _) => self.note_zeroed(range),
            _ if is_broken(Sabotage::KeepZeroesOfFailed) => self.forget_zeroes(kind),
            _ => {}
        }
    }

    /// The target reads as zeroes there.
    pub(super) fn note_zeroed(&mut self, range: ByteRange) {
        if let Some(zeroes) = &mut self.zeroes {
            zeroes.learn(range);
        }
    }

    fn forget_zeroes(&mut self, kind: OpKind) {
        if !kind.writes_target() || matches!(kind, OpKind::Zero(..)) {
            return;
        }
        self.target_changes(kind.range().expect("a write has a range"));
    }

    /// Something is about to change the target there, and what is not known.
    pub(crate) fn target_changes(&mut self, range: ByteRange) {
        if let Some(zeroes) = &mut self.zeroes {
            zeroes.forget(range);
        }
    }
}
