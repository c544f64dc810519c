//! What a local buffer holds for a job whose target is slow.
//!
//! ```text
//!            a guest is about to overwrite it           in the background, then discarded here
//! source ──────────────────────────────────▶ buffer ─────────────────────────────────────▶ target
//! ```
//!
//! 1. A range is put into the buffer only while the guest is held back from it, so what is read is what is to
//!    be copied; and it counts as saved only if it is still wanted when it is there.
//! 2. What is saved is dirty, or in flight: it is to come to the target, and from the buffer only.
//! 3. What was saved while it was being copied from the source is copied again, from the buffer: the guest may
//!    have gone on before the source was read.
//! 4. Space is used from before something is put in until after it was discarded.
//! 5. A request that was lost may still change the buffer: it is to settle before the last of it is discarded, and
//!    before the job is over.

use std::time::Duration;

use crate::bitmap::{CreateError, HBitmap};
use crate::node::NotSaved;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// See the module.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// What is in it and not on the target.
    saved: HBitmap,
    /// What is being put in.
    saving: Vec<ByteRange>,
    /// What is in it and not needed any more.
    unneeded: Vec<ByteRange>,
    /// What may be in it, at least in part, and does not count: putting it in has failed, or was lost.
    strays: Vec<ByteRange>,
    /// Bytes being discarded.
    discarding: u64,
    /// The longest piece that is put in at once.
    piece_max: u64,
    bytes_max: u64,
    bytes_peak: u64,
    /// Whether it is to settle: a request to it was lost, and may still change it.
    unsettled: Option<Unsettled>,
    /// Set while it is left alone, for it has failed to take something.
    rest: Option<Rest>,
}

/// How far it is with settling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unsettled {
    /// It is to be asked.
    Ask,
    /// It was asked.
    Asked,
}

/// Why nothing is put in for a while.
#[derive(Clone, Copy, Debug)]
struct Rest {
    /// What guests are told. For want of space it ends when some is given back, too.
    why: NotSaved,
    until: Duration,
}

/// What can be put in for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// This, which is not in it and not on its way.
    For(ByteRange),
    /// Nothing is missing.
    NotNeeded,
    /// There is no space, or it has failed just now.
    None(NotSaved),
}

impl Buffer {
    pub(crate) fn new(
        len: u64,
        cluster: Granularity,
        piece_max: u64,
        bytes_max: u64,
    ) -> Result<Self, CreateError> {
        let mut saved = HBitmap::new(len, cluster)?;
        // A guest must not wait, or fail, for want of memory.
        saved.reserve()?;
        Ok(Self {
            saved,
            saving: Vec::new(),
            unneeded: Vec::new(),
            strays: Vec::new(),
            discarding: 0,
            piece_max,
            bytes_max,
            bytes_peak: 0,
            unsettled: None,
            rest: None,
        })
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> u64 {
        let moving = self.saving.iter().chain(&self.unneeded);
        let moving: u64 = moving.map(|range| range.len()).sum();
        self.saved.dirty_bytes_in_len() + moving + self.discarding
    }

    pub(crate) fn bytes_peak(&self) -> u64 {
        self.bytes_peak
    }

    /// The first piece of `range`, which is made of whole clusters, that is to be put in: `is_wanted` says
    /// whether a cluster is still to be copied.
    pub(crate) fn room(&self, range: ByteRange, is_wanted: impl Fn(ByteRange) -> bool) -> Room {
        let cluster = self.saved.granularity().bytes();
        let mut found: Option<ByteRange> = None;
        let mut rest = range;
        while !rest.is_empty() {
            let (this, behind) = rest.split_at(rest.start().saturating_add(cluster));
            rest = behind;
            let is_missing = is_wanted(this) && !self.has(this) && !self.is_saving(this);
            let whole = found.map_or(this, |found| (found.start()..this.end()).into());
            if is_missing && whole.len() <= self.piece_max.max(cluster) {
                found = Some(whole);
            } else if found.is_some() {
                break;
            }
        }
        match (found, self.rest) {
            (None, _) => Room::NotNeeded,
            (Some(_), Some(rest)) => Room::None(rest.why),
            (Some(piece), None) if self.bytes() + piece.len() > self.bytes_max => {
                Room::None(NotSaved::Full)
            }
            (Some(piece), None) => Room::For(piece),
        }
    }

    /// Whether something of `range` is saved.
    pub(crate) fn has(&self, range: ByteRange) -> bool {
        self.saved.any_dirty_in(range)
    }

    fn is_saving(&self, range: ByteRange) -> bool {
        self.saving.iter().any(|saving| saving.overlaps(range))
    }

    /// Whether the start of `range` is saved, and how far it goes on like that.
    pub(crate) fn same(&self, range: ByteRange) -> (bool, ByteRange) {
        let area = self.saved.next_dirty_area(range, range.len());
        match area {
            None => (false, range),
            Some(area) if area.start() > range.start() => (false, range.split_at(area.start()).0),
            Some(area) => (true, range.split_at(area.end()).0),
        }
    }

    pub(crate) fn piece_max(&self) -> u64 {
        self.piece_max
    }

    pub(crate) fn begin(&mut self, range: ByteRange) {
        self.saving.push(range);
        self.bytes_peak = self.bytes_peak.max(self.bytes());
    }

    /// It is in the buffer, and saved where that is still wanted.
    pub(crate) fn put_in(&mut self, range: ByteRange, is_wanted: impl Fn(ByteRange) -> bool) {
        self.end_saving(range);
        let cluster = self.saved.granularity().bytes();
        let mut rest = range;
        while !rest.is_empty() {
            let (this, behind) = rest.split_at(rest.start().saturating_add(cluster));
            rest = behind;
            if is_wanted(this) {
                self.saved.set(this).expect("within the disk");
            } else {
                self.unneeded.push(this);
            }
        }
    }

    /// It is not being put in any more.
    pub(crate) fn end_saving(&mut self, range: ByteRange) {
        self.saving.retain(|saving| *saving != range);
    }

    /// It was not put in, or nobody knows.
    pub(crate) fn stop(&mut self, range: ByteRange) {
        self.end_saving(range);
        if !self.strays.contains(&range) {
            self.strays.push(range);
        }
    }

    /// It has failed to take something, and is left alone until then.
    pub(crate) fn leave_alone(&mut self, why: NotSaved, until: Duration) {
        self.rest = Some(Rest { why, until });
    }

    /// When it is tried again, if it is left alone.
    pub(crate) fn next_try(&self) -> Option<Duration> {
        self.rest.map(|rest| rest.until)
    }

    /// Whether it is to be tried again just now.
    pub(crate) fn try_again(&mut self, now: Duration) -> bool {
        let is_due = self.rest.is_some_and(|rest| rest.until <= now);
        if is_due {
            self.rest = None;
        }
        is_due
    }

    /// The first run of what is saved from `start` on.
    pub(crate) fn next_saved(&self, start: u64) -> Option<ByteRange> {
        if self.saved.is_clean() {
            return None;
        }
        let rest = start.min(self.saved.len())..self.saved.len();
        self.saved.next_dirty_area(rest, self.piece_max)
    }

    /// What is saved in `range`, piece by piece.
    pub(crate) fn saved_in(&self, range: ByteRange) -> Vec<ByteRange> {
        self.saved.runs_in(range, range.len()).collect()
    }

    /// It is on the target: its space can be given back.
    pub(crate) fn is_copied(&mut self, range: ByteRange) {
        self.saved.reset(range).expect("made of whole clusters");
        self.unneeded.push(range);
    }

    /// What is to be discarded next, at most `max` bytes, if the buffer can discard. `is_over` says that nothing is
    /// left to be copied.
    pub(crate) fn next_unneeded(&mut self, max: u64, is_over: bool) -> Option<ByteRange> {
        if is_over && self.saving.is_empty() && self.is_settled() {
            // Not before: the same clusters might be put in once more, or one that was lost still lands.
            self.unneeded.append(&mut self.strays);
        }
        let range = self.unneeded.pop()?;
        let (range, rest) = range.split_at(range.start().saturating_add(max));
        if !rest.is_empty() {
            self.unneeded.push(rest);
        }
        self.discarding += range.len();
        Some(range)
    }

    /// A request to it was lost.
    pub(crate) fn lose(&mut self) {
        if !is_broken(Sabotage::DoNotSettleBuffer) {
            self.unsettled = Some(Unsettled::Ask);
        }
    }

    /// Whether it is to be asked to settle.
    pub(crate) fn wants_settle(&self) -> bool {
        self.unsettled == Some(Unsettled::Ask)
    }

    /// It is asked to settle.
    pub(crate) fn settle(&mut self) {
        self.unsettled = Some(Unsettled::Asked);
    }

    /// It has settled.
    pub(crate) fn settled(&mut self) {
        self.unsettled = None;
    }

    /// Whether nothing that was lost can change it any more.
    pub(crate) fn is_settled(&self) -> bool {
        self.unsettled.is_none()
    }

    /// Nobody knows whether it was discarded.
    pub(crate) fn discard_again(&mut self, range: ByteRange) {
        self.discarding -= range.len();
        self.unneeded.push(range);
    }

    /// It was discarded. What could not be is never told here, and its space stays in use.
    pub(crate) fn discarded(&mut self, range: ByteRange) {
        self.discarding -= range.len();
        self.rest = self.rest.filter(|rest| rest.why != NotSaved::Full);
    }
}
