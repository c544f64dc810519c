//! The disk as it was at the instant, for others to read while the backup goes on.
//!
//! ```text
//!                 on the target?
//! read ─▶ begin ───yes──▶ read the target ──────────────▶ finish
//!            └─────no───▶ read the source; its clusters ─▶ finish ─▶ what was saved meanwhile may be
//!                         stay held back from guests                overwritten now
//! ```
//!
//! Invariants:
//!
//! 1. While a read of the source is under way, no guest write gets into its clusters: also not if they were
//!    saved meanwhile.
//! 2. The view ends before the first guest write that it was not protected from goes on, and a read that was
//!    under way then fails: it is looked at once more when it has ended. Is it only for a reader that a guest
//!    waits for too long, then the view ends alone, and the backup goes on.
//! 3. What was given up cannot be read, and is neither saved nor held back any more.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::bitmap::HBitmap;
use crate::copy::Side;
use crate::node::WriteHold;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// A handle to the frozen view of a [`Backup`](crate::Backup): which device holds what of the disk as it was,
/// and for how long.
///
/// For devices with futures there is [`FrozenDisk`](crate::io::FrozenDisk), which does all of this.
///
/// # Examples
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Backup, BackupOptions, BackupSync, Limits, Node, Side};
///
/// let node = Node::new(1 << 20);
/// let mut options = BackupOptions::default();
/// options.sync = BackupSync::None;
/// options.view = true;
/// let limits = Limits::new(1 << 20);
/// let mut backup = Backup::new(&node, limits, limits, options)?;
/// let view = backup.view().expect("it was asked for");
/// backup.job().start()?;
/// backup.poll(Duration::ZERO, Waker::noop());
///
/// let read = view.begin_read((0..4096).into())?;
/// assert_eq!(read.pieces(), [((0..4096).into(), Side::Source)]);
/// // ... read it from there ...
/// read.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct FrozenView {
    shared: Arc<Shared>,
}

struct Shared {
    len: u64,
    /// Whether what a reader does not need can be given up.
    is_for_readers: bool,
    state: Mutex<State>,
}

enum State {
    /// The instant is still to come.
    Before,
    Open(Box<Open>),
    Over,
}

struct Open {
    /// What may be read.
    access: HBitmap,
    /// What is on the target.
    saved: HBitmap,
    /// What is being read from the source.
    reads: BTreeMap<u64, Vec<ByteRange>>,
    next_read: u64,
    /// What was saved while it was read.
    kept: Vec<ByteRange>,
    /// What was given up, for the machine to deal with.
    given_up: Vec<ByteRange>,
    hold: Arc<WriteHold>,
}

/// Why the view cannot be read, or why what was read is not to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The backup has not begun.
    #[error("the backup has not begun")]
    NotBegun,
    /// The backup is over, or it has failed, or a guest has waited for a reader for too long: what was read may
    /// have been overwritten.
    #[error("the view is over")]
    Over,
    /// Something in the range is past the end of the disk, was not to be backed up, or was given up.
    #[error("there is nothing to be read in {0}")]
    NoAccess(ByteRange),
    /// It is not for its readers to give up what the backup copies.
    #[error("the backup copies more than its readers ask for")]
    NotForReaders,
}

/// A read of the view under way.
///
/// What it reads of the source is held back from guests until this is finished, or dropped.
#[must_use = "the guest waits while this lives"]
pub struct FrozenRead {
    view: FrozenView,
    id: u64,
    range: ByteRange,
    pieces: Vec<(ByteRange, Side)>,
}

impl FrozenView {
    pub(super) fn new(len: u64, is_for_readers: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                len,
                is_for_readers,
                state: Mutex::new(State::Before),
            }),
        }
    }

    /// Length of the disk in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a disk is no collection")]
    pub fn len(&self) -> u64 {
        self.shared.len
    }

    /// Begins to read `range`, and says from which device each piece of it is to be read.
    ///
    /// # Errors
    ///
    /// If the backup has not begun or is over, or something in the range cannot be read.
    pub fn begin_read(&self, range: ByteRange) -> Result<FrozenRead, ViewError> {
        let mut state = self.shared.state.lock();
        let open = state.open()?;
        if range.end() > self.shared.len || !open.access.all_dirty_in(range) {
            return Err(ViewError::NoAccess(range));
        }
        let mut pieces = Vec::new();
        let mut at = range.start();
        for saved in open.saved.runs_in(range, range.len().max(1)) {
            let saved = saved.intersection(range);
            if saved.start() > at {
                pieces.push(((at..saved.start()).into(), Side::Source));
            }
            pieces.push((saved, Side::Target));
            at = saved.end();
        }
        if at < range.end() {
            pieces.push(((at..range.end()).into(), Side::Source));
        }
        let from_source = pieces.iter().filter(|(_, side)| *side == Side::Source);
        let from_source = from_source.map(|&(piece, _)| piece).collect();
        let id = open.next_read;
        open.next_read += 1;
        open.reads.insert(id, from_source);
        drop(state);
        Ok(FrozenRead {
            view: self.clone(),
            id,
            range,
            pieces,
        })
    }

    /// What can be read, in whole clusters; what is dirty.
    ///
    /// # Errors
    ///
    /// If the backup has not begun or is over.
    pub fn accessible(&self) -> Result<HBitmap, ViewError> {
        Ok(self.shared.state.lock().open()?.access.clone())
    }

    /// The reader has what it needs of `range`, which is rounded **inward** to clusters: it cannot be read any
    /// more, guests may overwrite it, and its space on the target is given back. Returns what was given up.
    ///
    /// # Errors
    ///
    /// If the backup has not begun or is over, or is not one with [`BackupSync::None`](crate::BackupSync::None).
    pub fn give_up(&self, range: ByteRange) -> Result<ByteRange, ViewError> {
        if !self.shared.is_for_readers {
            return Err(ViewError::NotForReaders);
        }
        let mut state = self.shared.state.lock();
        let len = self.shared.len;
        let open = state.open()?;
        let granularity = open.access.granularity();
        let whole = granularity.inward(range.intersection((0..len).into()), len);
        let start = granularity.start_of(whole.start).min(len);
        let end = granularity.start_of(whole.end).min(len);
        let whole = ByteRange::from(start..end);
        if !whole.is_empty() {
            open.access.reset(whole).expect("made of whole clusters");
            open.given_up.push(whole);
            let hold = Arc::clone(&open.hold);
            drop(state);
            hold.wake_job();
        }
        Ok(whole)
    }

    /// The instant is here.
    pub(super) fn begin(&self, access: HBitmap, hold: Arc<WriteHold>) {
        let mut saved = access.clone();
        saved.reset_all();
        *self.shared.state.lock() = State::Open(Box::new(Open {
            access,
            saved,
            reads: BTreeMap::new(),
            next_read: 0,
            kept: Vec::new(),
            given_up: Vec::new(),
            hold,
        }));
    }

    /// `range`, which is made of whole clusters, is on the target: guests may overwrite it once nobody reads it
    /// from the source.
    ///
    /// `false` if the view is over: then nobody reads it.
    pub(super) fn saved(&self, range: ByteRange) -> bool {
        let mut state = self.shared.state.lock();
        let Ok(open) = state.open() else {
            return false;
        };
        open.saved.set(range).expect("within the disk");
        open.kept.push(range);
        let free = open.take_free();
        drop(state);
        free.release();
        true
    }

    /// What was given up since this was asked last.
    pub(super) fn take_given_up(&self) -> Vec<ByteRange> {
        let mut state = self.shared.state.lock();
        match state.open() {
            Ok(open) => std::mem::take(&mut open.given_up),
            Err(_) => Vec::new(),
        }
    }

    /// From now on nothing can be read, and what is being read is not to be used.
    ///
    /// Returns what is saved, and was being read.
    pub(super) fn end(&self) -> Vec<ByteRange> {
        let before = std::mem::replace(&mut *self.shared.state.lock(), State::Over);
        match before {
            State::Open(open) => open.kept,
            State::Before | State::Over => Vec::new(),
        }
    }

    fn end_read(&self, id: u64, range: ByteRange) -> Result<(), ViewError> {
        let mut state = self.shared.state.lock();
        let open = match state.open() {
            Err(_) if is_broken(Sabotage::TrustBrokenView) => return Ok(()),
            open => open?,
        };
        open.reads.remove(&id);
        let is_accessible = open.access.all_dirty_in(range);
        let free = open.take_free();
        drop(state);
        free.release();
        match is_accessible {
            true => Ok(()),
            false => Err(ViewError::NoAccess(range)),
        }
    }
}

impl State {
    fn open(&mut self) -> Result<&mut Open, ViewError> {
        match self {
            State::Before => Err(ViewError::NotBegun),
            State::Open(open) => Ok(open),
            State::Over => Err(ViewError::Over),
        }
    }
}

impl Open {
    /// What is saved and not being read.
    fn take_free(&mut self) -> Free {
        let reads = &self.reads;
        let is_read = |range: &ByteRange| {
            let mut pieces = reads.values().flatten();
            pieces.any(|piece| piece.overlaps(*range)) && !is_broken(Sabotage::ReleaseWhileRead)
        };
        let (kept, free) = std::mem::take(&mut self.kept)
            .into_iter()
            .partition(is_read);
        self.kept = kept;
        Free {
            ranges: free,
            hold: Arc::clone(&self.hold),
        }
    }
}

/// What guests may overwrite: told to them without a lock.
#[must_use]
struct Free {
    ranges: Vec<ByteRange>,
    hold: Arc<WriteHold>,
}

impl Free {
    fn release(self) {
        for range in self.ranges {
            self.hold.release(range);
        }
    }
}

impl FrozenRead {
    /// The pieces of the range in order, and where to read each: the source, or the target.
    #[must_use]
    pub fn pieces(&self) -> &[(ByteRange, Side)] {
        &self.pieces
    }

    /// All is read. What was read may be used only if this succeeds.
    ///
    /// # Errors
    ///
    /// If the backup has failed or ended meanwhile, or some of it was given up.
    pub fn finish(self) -> Result<(), ViewError> {
        // Dropping it ends it once more, which does no harm.
        self.view.end_read(self.id, self.range)
    }
}

impl Drop for FrozenRead {
    fn drop(&mut self) {
        let _ = self.view.end_read(self.id, self.range);
    }
}

impl fmt::Debug for FrozenView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrozenView")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for FrozenRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrozenRead")
            .field("pieces", &self.pieces)
            .finish_non_exhaustive()
    }
}
