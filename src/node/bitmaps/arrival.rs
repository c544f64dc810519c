//! Bitmaps that come from another host.
//!
//! ```text
//! receive ─▶ arriving ──────────────── guest starts ─────────────▶ arriving, recording
//!              │ deliver                                             │ deliver: the bits and what was written
//!              ▼                                                     ▼
//!            delivered ─────────────── guest starts ────────────▶ idle: enabled, or not, as it was there
//!              └─ not to record: idle at once
//! ```
//!
//! 1. The bits are put together elsewhere, and come into the list of the node as a whole. So there is no
//!    bitmap with half of them, whatever becomes of the stream.
//! 2. What is written after the guest has started is in the map from the first write on; the bits that are
//!    delivered are added to it.
//! 3. Dropping an arrival removes the bitmap, unless it was released.

use std::fmt;
use std::mem;

use super::entry::{Content, Usage, unshared};
use super::list::Plan;
use super::{BitmapError, BitmapOptions, Bitmaps};
use crate::bitmap::HBitmap;
use crate::node::{Inner, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;

/// A bitmap that is on its way to a node.
pub(crate) struct BitmapArrival {
    /// `None` once it was released.
    node: Option<Arc<Inner>>,
    id: u64,
}

impl Bitmaps<'_> {
    /// Takes the name for a bitmap that comes from another host. It may be persistent whatever storage there
    /// is. The disk must have that length still: from now on it keeps it.
    pub(crate) fn receive(
        &self,
        name: &str,
        len: u64,
        options: &BitmapOptions,
    ) -> Result<BitmapArrival, BitmapError> {
        let plan = Plan::new(name, options)?;
        let mut list = self.inner().lock_drained();
        list.check_new_name(plan.name, plan.granularity, false, 0)?;
        list.check_not_resizing()?;
        let expected = self.inner().len();
        if len != expected {
            let name = name.to_owned();
            return Err(BitmapError::SizeMismatch {
                name,
                len,
                expected,
            });
        }
        let map = self.inner().new_map(plan.granularity)?;
        let id = list.push_named(&plan, map, false);
        if !is_broken(Sabotage::ArriveIdle) {
            list.owned_mut(id)
                .set_usage(Usage::Arriving { is_enabled: false });
        }
        Ok(BitmapArrival {
            node: Some(Arc::clone(self.inner())),
            id,
        })
    }
}

impl BitmapArrival {
    /// Records from now on. The guard must be that of the node.
    pub(crate) fn record(&self, guard: &QuiesceGuard) -> Result<(), BitmapError> {
        let node = self.node();
        assert!(guard.is_of_inner(node), "the guard was looked for");
        let mut list = node.lock_drained();
        let granularity = list.owned(self.id).granularity();
        node.start_recording(&mut list, granularity)?;
        if !is_broken(Sabotage::StartUnrecorded) {
            list.owned_mut(self.id)
                .set_usage(Usage::Arriving { is_enabled: true });
        }
        Ok(())
    }

    /// Puts in the bits, which are those of a map as long and as fine, beside what was recorded. Nobody sees
    /// them before it is released.
    pub(crate) fn deliver(&self, mut bits: HBitmap) {
        let mut list = self.node().lock_drained();
        let Content::Known { map, .. } = &mut list.owned_mut(self.id).content else {
            unreachable!("what arrives is not inconsistent")
        };
        let map = unshared(map);
        if !is_broken(Sabotage::DeliverOverWrites) {
            bits.merge_from(map).expect("it is as long");
        }
        let unused = mem::replace(map, bits);
        drop(list);
        drop(unused);
    }

    /// The bitmap is the node's, and goes on recording if it does.
    pub(crate) fn release(&mut self) {
        if let Some(node) = self.node.take() {
            let mut list = node.lock_drained();
            let named = list.owned_mut(self.id);
            let is_enabled = named.is_recording();
            named.set_usage(Usage::Idle { is_enabled });
        }
    }

    /// The same for a bitmap that does not record, until the guest starts: it can be had, and
    /// [taken away](Released::take_away) again.
    pub(crate) fn release_early(&mut self) -> Option<Released> {
        let node = Arc::clone(self.node.as_ref()?);
        self.release();
        Some(Released { node, id: self.id })
    }

    fn node(&self) -> &Arc<Inner> {
        self.node.as_ref().expect("what releases it forgets it")
    }
}

/// A bitmap that came as a whole before the guest runs here.
pub(crate) struct Released {
    node: Arc<Inner>,
    id: u64,
}

impl Released {
    /// Removes it, unless it is not there any more or somebody has it; says whether it is gone.
    pub(crate) fn take_away(self) -> bool {
        let mut list = self.node.lock_drained();
        let is_free = list
            .entries
            .iter()
            .filter(|entry| entry.id == self.id)
            .filter_map(|entry| entry.named())
            .all(|named| named.busy_with().is_none());
        let removed = is_free.then(|| list.remove(self.id));
        self.node.stop_if_unused(&mut list);
        self.node.refuse_if_readonly(&list);
        drop(list);
        drop(removed);
        is_free
    }
}

impl Drop for BitmapArrival {
    fn drop(&mut self) {
        let Some(node) = self.node.take() else {
            return;
        };
        if is_broken(Sabotage::KeepPartial) {
            let mut list = node.lock_drained();
            let is_enabled = list.owned(self.id).is_recording();
            list.owned_mut(self.id)
                .set_usage(Usage::Idle { is_enabled });
            return;
        }
        let mut list = node.lock_drained();
        let removed = list.remove(self.id);
        node.stop_if_unused(&mut list);
        node.refuse_if_readonly(&list);
        drop(list);
        drop(removed);
    }
}

impl fmt::Debug for BitmapArrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapArrival")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Released {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Released")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl super::entry::Named {
    fn set_usage(&mut self, to: Usage) {
        if let Content::Known { usage, .. } = &mut self.content {
            *usage = to;
        }
    }
}
