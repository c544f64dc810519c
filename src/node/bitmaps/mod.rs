//! The bitmaps of a node that have a name: what may be asked of them, who has one, who records.
//!
//! ```text
//!          add                          claim
//!  none ────────▶ idle ─────────────────────────────▶ claimed    its bits belong to an operation,
//!    ▲            ▲ │ ◀───────── reclaim: both ───────┘          and a successor records
//!    │   remove   │ │ ◀── abdicate: the successor ────┘
//!    ├────────────┼─┤         freeze
//!    │            │ ├───────────────────────────────▶ frozen     read by several without a lock
//!    │            │ │ ◀── the last has let go ────────┘
//!    │            │ │  hold, open transaction, resize
//!    │            │ └───────────────────────────────▶ held       recording or not, as before
//!    │            └──────────────────────────────────┘
//!    ├─── remove ── inconsistent ◀── import of a copy that was not closed
//!    │
//!    └─── given up ── arriving ───── its bits are here ──▶ idle     the bits are on their way from another host
//! ```
//!
//! Invariants:
//!
//! 1. Every call drains the node's log into all bitmaps that record, and does its work under the same
//!    hold of the lock. That is its moment: a write whose ticket was finished before is recorded as
//!    things were, a later one as they are then.
//! 2. A bitmap belongs to one node for life and is as long as its disk. Its name, of 1 to 1023 bytes, is
//!    the only one of its kind on the node, also of those that an open transaction may give back, and the
//!    order of all is that of their creation. Granules are 512 bytes to 2 GiB.
//! 3. The node records exactly while a bitmap does, in granules no coarser than those of any. So disabling
//!    the last recorder frees the guest of all that recording costs.
//! 4. A bitmap is idle, in use (held, frozen, claimed or arriving) or inconsistent. Only an idle one is
//!    changed by a verb. Of what is arriving nobody can see a bit. What is frozen does not record, and neither does what is claimed: its successor may. A
//!    successor has no name and is as long and as fine. What is inconsistent is persistent and does not
//!    record; it can be looked at and removed.
//! 5. What hinders a verb, as the table of [`Bitmaps`] says, is looked at in the order: in use, read-only, inconsistent. A verb that is
//!    refused has changed nothing, and a merge has looked at all sources before it touches the target.
//! 6. A claim ends once: the successor takes the place, name and flags of the bitmap, or both become one.
//!    Dropping it is the latter, which cannot fail: its memory is there from the start.
//! 7. While a bitmap of the node is read-only, no write is let in: it could not be recorded.
//! 8. The locks of several nodes are taken in one order, each once, so two that merge in opposite
//!    directions cannot wait for each other.

mod arrival;
mod claim;
mod entry;
mod error;
mod frozen;
mod hold;
mod info;
mod journal;
mod list;
mod merge;
mod options;
mod resized;
mod stored;

use std::fmt;

use super::record::{LOG_EXPONENT_MAX, LOG_EXPONENT_MIN};
use super::{Inner, Node, QuiesceGuard};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;
use crate::units::Granularity;

pub(crate) use arrival::{BitmapArrival, Released};
pub(crate) use claim::ClaimEnd;
pub use claim::{BitmapClaim, ClaimFor};
pub(super) use entry::Body;
pub use entry::BusyWith;
use entry::Intent;
pub use error::{BitmapError, CannotPersist};
pub use frozen::FrozenBitmap;
pub use hold::BitmapHold;
pub use info::{BitmapInfo, DirtyRuns, SnapshotOf};
pub(crate) use journal::Journal;
pub(super) use list::List;
use list::Plan;
pub(crate) use merge::Locked;
pub use options::{BitmapOptions, BitmapStorage};
pub use stored::{BitmapExport, BitmapState};

/// The longest name, in bytes.
const NAME_BYTES_MAX: usize = 1023;

/// The named dirty bitmaps of a [`Node`], for whoever manages them.
///
/// Made by [`Node::bitmaps`]. A bitmap is known by its node and its name. Each call sees everything that
/// was written until then: a write whose ticket was finished before the call is in it. None waits for
/// anything but the lock of the nodes concerned, which guest writes do not take.
///
/// Where recording begins, a [`QuiesceGuard`] is wanted: a write in flight would go unrecorded.
///
/// What hinders a verb, of which the first is told; an empty field is a yes:
///
/// | verb | idle | in use | read-only | inconsistent |
/// |---|---|---|---|---|
/// | add, or rename to, this name | exists | exists | exists | exists |
/// | remove | | busy | read-only | |
/// | clear, rename, merge into | | busy | read-only | inconsistent |
/// | enable, disable, merge from | | busy | | inconsistent |
/// | freeze, claim for reading | | busy | | inconsistent |
/// | claim for change, hold | | busy | read-only | inconsistent |
/// | runs, snapshot | | | | inconsistent |
/// | query, with the digest or without | | | | |
/// | resize of the disk | | busy | read-only | |
/// | export of all | stored | busy, if it would be stored | left as stored | left as stored |
///
/// # Examples
///
/// The start of an incremental backup: what was written until now is looked at, what is written from now
/// on goes to another bitmap.
///
/// ```
/// use blockjob::{BitmapOptions, Node};
///
/// let node = Node::new(1 << 30);
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// node.bitmaps().add(&guard, "monday", BitmapOptions::default())?;
/// drop(guard);
/// node.begin_write((0..4096).into()).go().expect("nobody quiesces the node").finish(());
///
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// node.bitmaps().add(&guard, "tuesday", BitmapOptions::default())?;
/// node.bitmaps().disable("monday")?;
/// drop(guard);
/// node.begin_write((1 << 20..2 << 20).into()).go().expect("nobody quiesces the node").finish(());
///
/// let info = node.bitmaps().query("monday")?;
/// assert_eq!((info.dirty_bytes, info.is_recording), (65536, false));
/// assert_eq!(node.bitmaps().query("tuesday")?.dirty_bytes, 1 << 20);
/// # Ok::<(), blockjob::BitmapError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Bitmaps<'a> {
    node: &'a Node,
}

impl Node {
    /// The bitmaps of this node that have a name.
    #[must_use]
    pub fn bitmaps(&self) -> Bitmaps<'_> {
        Bitmaps { node: self }
    }
}

impl Bitmaps<'_> {
    /// Makes a clean bitmap that records every write that begins from now on.
    ///
    /// # Errors
    ///
    /// The first of these that applies: [`NameEmpty`](BitmapError::NameEmpty),
    /// [`OtherNode`](BitmapError::OtherNode) of the guard,
    /// [`BadGranularity`](BitmapError::BadGranularity), [`CannotPersist`](BitmapError::CannotPersist),
    /// [`NameExists`](BitmapError::NameExists), [`Busy`](BitmapError::Busy) if an open transaction may have to
    /// give the name back, [`NameTooLong`](BitmapError::NameTooLong), [`NodeBusy`](BitmapError::NodeBusy) while the disk is being resized,
    /// [`TooLarge`](BitmapError::TooLarge), [`OutOfMemory`](BitmapError::OutOfMemory).
    pub fn add(
        &self,
        guard: &QuiesceGuard,
        name: &str,
        options: BitmapOptions,
    ) -> Result<(), BitmapError> {
        if name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        self.check_guard(guard)?;
        let plan = Plan::new(name, &options)?;
        let mut list = self.inner().lock_drained();
        list.check_plan(&plan)?;
        let map = self.inner().new_map(plan.granularity)?;
        self.inner().start_recording(&mut list, plan.granularity)?;
        list.push_named(&plan, map, true);
        Ok(())
    }

    /// Makes a clean bitmap that does not record, until it is [enabled](Self::enable).
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add), which see for the order.
    pub fn add_disabled(&self, name: &str, options: BitmapOptions) -> Result<(), BitmapError> {
        let plan = Plan::new(name, &options)?;
        let mut list = self.inner().lock_drained();
        list.check_plan(&plan)?;
        let map = self.inner().new_map(plan.granularity)?;
        list.push_named(&plan, map, false);
        Ok(())
    }

    /// Forgets a bitmap. If it is persistent, the next [export](Self::export_state) is without it.
    ///
    /// A write in flight is not recorded in it any more. If another bitmap is to take over,
    /// [add](Self::add) or [enable](Self::enable) that first, or do both in one
    /// [`Transaction`](crate::Transaction).
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly).
    pub fn remove(&self, name: &str) -> Result<(), BitmapError> {
        let mut list = self.inner().lock_drained();
        let (id, named) = list.find_mut(name)?;
        named.check_idle(Intent::Change)?;
        let removed = list.remove(id);
        self.inner().stop_if_unused(&mut list);
        drop(list);
        drop(removed);
        Ok(())
    }

    /// Makes everything clean in one step. It goes on recording if it does: a write in flight is recorded once it
    /// has settled.
    ///
    /// What is recorded between a [snapshot](Self::snapshot) and this is in neither. To take bits and begin
    /// anew use [`claim`](Self::claim); or merge them into another bitmap and clear this one in one
    /// [`Transaction`](crate::Transaction).
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly), [`Inconsistent`](BitmapError::Inconsistent).
    pub fn clear(&self, name: &str) -> Result<(), BitmapError> {
        let mut list = self.inner().lock_drained();
        let (_, named) = list.find_mut(name)?;
        entry::unshared(named.idle(Intent::Change)?.map).reset_all();
        Ok(())
    }

    /// Records every write that begins from now on, beside what the bitmap holds. No error if it does so
    /// already.
    ///
    /// What is written while a bitmap is disabled it does not know of, and nobody is told: what is copied
    /// by it alone is incomplete.
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard, [`NotFound`](BitmapError::NotFound),
    /// [`Busy`](BitmapError::Busy), [`Inconsistent`](BitmapError::Inconsistent),
    /// [`TooLarge`](BitmapError::TooLarge) and [`OutOfMemory`](BitmapError::OutOfMemory) of the log.
    pub fn enable(&self, guard: &QuiesceGuard, name: &str) -> Result<(), BitmapError> {
        self.check_guard(guard)?;
        let mut list = self.inner().lock_drained();
        let granularity = list.find(name)?.idle_map()?.granularity();
        self.inner().start_recording(&mut list, granularity)?;
        list.set_enabled(name, true)?;
        Ok(())
    }

    /// Stops recording; the bits stay. A write in flight is not recorded any more. No error if the bitmap
    /// does not record.
    ///
    /// If another bitmap is to take over, [add](Self::add) or [enable](Self::enable) that first, under the same
    /// [`QuiesceGuard`] if the two are not to overlap, or do both in one [`Transaction`](crate::Transaction). Done
    /// afterwards, a write that is in flight in between is in neither.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`Inconsistent`](BitmapError::Inconsistent).
    pub fn disable(&self, name: &str) -> Result<(), BitmapError> {
        let mut list = if is_broken(Sabotage::VerbWithoutDrain) {
            self.inner().list.lock()
        } else {
            self.inner().lock_drained()
        };
        list.set_enabled(name, false)?;
        self.inner().stop_if_unused(&mut list);
        Ok(())
    }

    /// Gives a bitmap another name. A stored copy follows with the next export.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly), [`Inconsistent`](BitmapError::Inconsistent); of the new name
    /// [`NameEmpty`](BitmapError::NameEmpty) before these, and then
    /// [`CannotPersist`](BitmapError::CannotPersist), [`NameExists`](BitmapError::NameExists) (also for
    /// the one that it has), [`Busy`](BitmapError::Busy) if an open transaction may have to give it back,
    /// [`NameTooLong`](BitmapError::NameTooLong).
    pub fn rename(&self, name: &str, new_name: &str) -> Result<(), BitmapError> {
        let mut list = self.inner().lock_drained();
        list.rename(name, new_name)?;
        Ok(())
    }

    /// What storage the node has for persistent bitmaps; none until this is called. Bitmaps that there are
    /// stay as they are.
    pub fn set_storage(&self, storage: Option<BitmapStorage>) {
        self.inner().lock_drained().storage = storage;
    }

    /// Panics unless the numbered invariants of the module hold. For tests: takes as long as reading all
    /// bitmaps.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        let list = self.inner().lock_drained();
        list.check_invariants(self.node.len());
        self.inner().check_recording(&list);
    }

    fn inner(&self) -> &Arc<Inner> {
        self.node.inner()
    }

    fn check_guard(&self, guard: &QuiesceGuard) -> Result<(), BitmapError> {
        if guard.is_of(self.node) {
            return Ok(());
        }
        Err(BitmapError::OtherNode)
    }
}

impl fmt::Debug for Bitmaps<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bitmaps")
            .field("node", self.node)
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// A clean map for this node.
    fn new_map(&self, granularity: Granularity) -> Result<HBitmap, BitmapError> {
        reserved(self.len(), granularity)
    }

    /// As [`record_in`](Self::record_in), with the error of a verb.
    fn start_recording(
        &self,
        list: &mut List,
        granularity: Granularity,
    ) -> Result<(), BitmapError> {
        self.record_in(list, granularity)
            .map_err(|error| BitmapError::log(error, self.len(), granularity))
    }
}

/// An independent copy of `map`.
fn copy_of(map: &HBitmap) -> Result<HBitmap, BitmapError> {
    let copy = reserved(map.len(), map.granularity())?;
    Ok(copy_into(copy, map))
}

/// What is in `map`, in the memory of one that is as long and as fine, and clean.
fn copy_into(mut clean: HBitmap, map: &HBitmap) -> HBitmap {
    // A copy of a map that has nothing has no memory, and so would give up its own.
    if !map.is_clean() {
        clean.clone_from(map);
    }
    clean
}

/// A clean map that has its memory: neither a guest write nor a bit that is put back is to be lost for want of
/// it, and a verb is to be told no before it begins.
fn reserved(len: u64, granularity: Granularity) -> Result<HBitmap, BitmapError> {
    let create = || {
        let mut map = HBitmap::new(len, granularity)?;
        map.reserve()?;
        Ok(map)
    };
    create().map_err(|error| BitmapError::create(error, len, granularity))
}

/// Whether a node can record in such granules.
fn is_recordable(granularity: Granularity) -> bool {
    (LOG_EXPONENT_MIN..=LOG_EXPONENT_MAX).contains(&granularity.exponent())
}
