//! What a disk's change of length is to its bitmaps.

use super::entry::{Body, Content, Intent};
use super::{BitmapError, BusyWith, List, copy_of};
use crate::bitmap::HBitmap;
use crate::node::Grown;
use crate::sabotage::{Sabotage, is_broken};

impl List {
    /// Whether a bitmap that is made now will be as long as the disk.
    pub(in crate::node) fn check_not_resizing(&self) -> Result<(), BitmapError> {
        match self.taken {
            Some(with @ BusyWith::Resize) => Err(BitmapError::NodeBusy { with }),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether nothing hinders a change of length: operations first, then read-only bitmaps.
    pub(in crate::node) fn check_resize(&self) -> Result<(), BitmapError> {
        if let Some(with) = self.taken {
            return Err(BitmapError::NodeBusy { with });
        }
        let is_of_job = |body: &Body| matches!(body, Body::Job(_));
        if self.entries.iter().any(|entry| is_of_job(&entry.body)) {
            let with = BusyWith::Job;
            return Err(BitmapError::NodeBusy { with });
        }
        if is_broken(Sabotage::ResizeInUse) {
            return Ok(());
        }
        for intent in [Intent::Use, Intent::Change] {
            self.entries()
                .try_for_each(|named| named.check_idle(intent))?;
        }
        Ok(())
    }

    /// All maps as they would be with another length.
    pub(in crate::node) fn resized(
        &self,
        len: u64,
        grown: Grown,
    ) -> Result<Vec<(u64, HBitmap)>, BitmapError> {
        let mut resized = Vec::new();
        for entry in &self.entries {
            let Some(Ok(map)) = entry.named().map(|named| named.map()) else {
                continue;
            };
            let mut copy = copy_of(map)?;
            copy.truncate(len)
                .and_then(|()| copy.reserve())
                .map_err(|error| BitmapError::create(error, len, map.granularity()))?;
            let is_dirty = entry.recorded_in().is_some()
                && grown == Grown::Dirty
                && !is_broken(Sabotage::GrowClean);
            if is_dirty {
                copy.set(map.len()..len).expect("it is as long");
            }
            resized.push((entry.id, copy));
        }
        Ok(resized)
    }

    /// Puts in the maps of [`resized`](Self::resized) and gives back those that were there.
    pub(in crate::node) fn put_resized(
        &mut self,
        new_len: u64,
        maps: Vec<(u64, HBitmap)>,
    ) -> Vec<HBitmap> {
        for entry in &mut self.entries {
            if let Some(named) = entry.named_mut()
                && let Content::Inconsistent { len, .. } = &mut named.content
            {
                *len = new_len;
            }
        }
        let put = |(id, map)| std::mem::replace(self.owned_mut(id).map_mut(), map);
        maps.into_iter().map(put).collect()
    }

    /// The disk is being resized: it and its bitmaps are in use.
    pub(in crate::node) fn hold_all(&mut self) {
        self.taken = Some(BusyWith::Resize);
        for entry in &mut self.entries {
            if let Some(named) = entry.named_mut() {
                named.hold(BusyWith::Resize);
            }
        }
    }

    /// It is no more.
    pub(in crate::node) fn let_go_all(&mut self) {
        self.taken = None;
        for entry in &mut self.entries {
            if let Some(named) = entry.named_mut() {
                named.let_go();
            }
        }
    }
}
