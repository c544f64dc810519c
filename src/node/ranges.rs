//! Ranges of a disk that do not overlap.

use std::collections::BTreeMap;

use crate::units::ByteRange;

/// Ranges that do not overlap.
#[derive(Clone, Default)]
pub(super) struct RangeSet {
    /// Where each starts, and where it ends.
    by_start: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Puts one in that overlaps none of them.
    pub(super) fn insert(&mut self, range: ByteRange) {
        if !range.is_empty() {
            self.by_start.insert(range.start(), range.end());
        }
    }

    /// The first that overlaps `range`, as a whole.
    pub(super) fn first_in(&self, range: ByteRange) -> Option<ByteRange> {
        let before = self.by_start.range(..=range.start()).next_back();
        let after = self
            .by_start
            .range(range.start()..range.end().max(range.start()))
            .next();
        before
            .into_iter()
            .chain(after)
            .map(|(&start, &end)| ByteRange::from(start..end))
            .find(|known| known.overlaps(range))
    }

    /// Takes `range` out, of whatever it is a part.
    pub(super) fn remove(&mut self, range: ByteRange) {
        while let Some(known) = self.first_in(range) {
            self.by_start.remove(&known.start());
            self.insert(known.split_at(range.start()).0);
            self.insert(known.split_at(range.end()).1);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.by_start
            .iter()
            .map(|(&start, &end)| (start..end).into())
    }
}
