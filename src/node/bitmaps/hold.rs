//! Bitmaps that are given to somebody else while they go on recording.

use std::fmt;

use super::entry::{Content, Intent, Usage};
use super::{BitmapError, BitmapInfo, Bitmaps, BusyWith, List};
use crate::bitmap::{Changes, HBitmap};
use crate::node::Inner;
use crate::sync::{Arc, MutexGuard};
use crate::units::ByteRange;

/// That a bitmap is kept as it is, but for what it records, and is left out of
/// [exports](Bitmaps::export_state): somebody is about to have it elsewhere, after a migration as a rule.
///
/// Made by [`Bitmaps::hold`]. Dropping it undoes it; [`hand_over`](Self::hand_over) is for when the other
/// side has the bitmap.
#[must_use = "the bitmap is free again when this is dropped"]
pub struct BitmapHold {
    /// `None` once it has ended.
    node: Option<Arc<Inner>>,
    id: u64,
}

impl Bitmaps<'_> {
    /// Keeps a bitmap from every verb, and out of exports. It records or not, as before.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly), [`Inconsistent`](BitmapError::Inconsistent).
    pub fn hold(&self, name: &str) -> Result<BitmapHold, BitmapError> {
        let mut list = self.inner().lock_drained();
        let (id, named) = list.find_mut(name)?;
        named.idle(Intent::Change)?;
        named.hold(BusyWith::Holder);
        Ok(BitmapHold {
            node: Some(Arc::clone(self.inner())),
            id,
        })
    }

    /// Stores again, with the next export, what was [handed over](BitmapHold::hand_over) and is this
    /// node's again: the other side has given up. What is held once more is left out until that ends.
    pub fn take_back(&self) {
        let mut list = self.inner().lock_drained();
        for entry in &mut list.entries {
            if let Some(named) = entry.named_mut() {
                named.hand_over(false);
            }
        }
    }
}

impl BitmapHold {
    /// A copy of the bits as they are now.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](BitmapError::OutOfMemory).
    pub fn snapshot(&self) -> Result<HBitmap, BitmapError> {
        super::copy_of(self.node().lock_drained().owned(self.id).map()?)
    }

    /// What it is. Of that only the bits, and whether it is read-only, change while it is held.
    pub(crate) fn info(&self) -> BitmapInfo {
        self.node().lock_drained().owned(self.id).info()
    }

    /// Notes from now on which chunks of so many serialized bytes guest writes change. All have, at first.
    pub(crate) fn track_changes(&self, chunk_len: u64) -> Result<(), BitmapError> {
        let mut list = self.node().lock_drained();
        let named = list.owned_mut(self.id);
        let map = named.map()?;
        let mut changes = Changes::new(map, chunk_len);
        let (len, granularity) = (map.len(), map.granularity());
        changes
            .chunks_mut()
            .reserve()
            .map_err(|error| BitmapError::create(error, len, granularity))?;
        changes.chunks_mut().set_all();
        if let Content::Known {
            usage: Usage::Held { changes: held, .. },
            ..
        } = &mut named.content
        {
            *held = Some(Box::new(changes));
        }
        Ok(())
    }

    /// The bits, with everything in them that was written until now.
    pub(crate) fn lock(&self) -> HeldBitmap<'_> {
        HeldBitmap {
            list: self.node().lock_drained(),
            id: self.id,
        }
    }

    fn node(&self) -> &Arc<Inner> {
        self.node.as_ref().expect("what ends it consumes it")
    }

    /// The other side has the bitmap. It is free again here, and left out of exports until it is
    /// [taken back](Bitmaps::take_back): what the other side records this one does not know.
    pub fn hand_over(mut self) {
        if let Some(node) = &self.node {
            node.list.lock().owned_mut(self.id).hand_over(true);
        }
        self.end();
    }

    fn end(&mut self) {
        if let Some(node) = self.node.take() {
            node.list.lock().owned_mut(self.id).let_go();
        }
    }
}

/// A held bitmap under the node's lock.
pub(crate) struct HeldBitmap<'a> {
    list: MutexGuard<'a, List>,
    id: u64,
}

impl HeldBitmap<'_> {
    /// The bits.
    pub(crate) fn map(&self) -> &HBitmap {
        let map = self.list.owned(self.id).map();
        map.expect("what is inconsistent is not held")
    }

    /// How often something was found that was written to the node: differs from what it was if something
    /// was written since. Writes to a node without any recording bitmap leave no trace.
    pub(crate) fn writes_found(&self) -> u64 {
        self.list.found
    }

    /// Which chunks have changed, if that is noted.
    pub(crate) fn changes(&self) -> Option<&HBitmap> {
        match &self.list.owned(self.id).content {
            Content::Known {
                usage: Usage::Held { changes, .. },
                ..
            } => changes.as_ref().map(|changes| changes.chunks()),
            Content::Known { .. } | Content::Inconsistent { .. } => None,
        }
    }

    /// The bits, and which chunks have changed, if that is noted.
    pub(crate) fn bits_and_changes(&mut self) -> (&HBitmap, Option<&mut HBitmap>) {
        match &mut self.list.owned_mut(self.id).content {
            Content::Known {
                map,
                usage: Usage::Held { changes, .. },
                ..
            } => (map, changes.as_mut().map(|changes| changes.chunks_mut())),
            Content::Known { .. } | Content::Inconsistent { .. } => unreachable!("it is held"),
        }
    }

    /// The chunks that `range` touches are to be looked at again.
    pub(crate) fn mark_changed(&mut self, range: ByteRange) {
        if let Some(chunks) = self.chunks_mut() {
            let range = range.intersection((0..chunks.len()).into());
            chunks.set(range).expect("it does not pass the end");
        }
    }

    fn chunks_mut(&mut self) -> Option<&mut HBitmap> {
        match &mut self.list.owned_mut(self.id).content {
            Content::Known {
                usage: Usage::Held { changes, .. },
                ..
            } => changes.as_mut().map(|changes| changes.chunks_mut()),
            Content::Known { .. } | Content::Inconsistent { .. } => None,
        }
    }
}

impl Drop for BitmapHold {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for BitmapHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapHold")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
