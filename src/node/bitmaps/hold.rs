//! Bitmaps that are given to somebody else while they go on recording.

use std::fmt;

use super::entry::Intent;
use super::{BitmapError, Bitmaps, BusyWith};
use crate::bitmap::HBitmap;
use crate::node::Inner;
use crate::sync::Arc;

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
        let node = self.node.as_ref().expect("what ends it consumes it");
        super::copy_of(node.lock_drained().owned(self.id).map()?)
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
