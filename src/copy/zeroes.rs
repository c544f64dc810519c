//! What is known to read as zeroes on the target, so that zeroes are not written there once more.
//!
//! 1. Before anything else than zeroes is handed out for a range, that range is known no more: also what fails,
//!    or is lost, may have landed.
//! 2. A range is known only once a write of zeroes was reported done, with nothing else in flight there: its
//!    claim sees to that.
//! 3. Granules are known as a whole, or not at all.
//! 4. Of a cluster that the target fills when a part of it is written, no part is left as it is while another is
//!    written.

use crate::bitmap::{CreateError, HBitmap};
use crate::units::{ByteRange, Granularity};

/// See the module.
#[derive(Debug)]
pub(crate) struct Zeroes {
    known: HBitmap,
}

impl Zeroes {
    /// Nothing is known yet; or, if `is_all`, that the target reads as zeroes everywhere.
    pub(crate) fn new(
        len: u64,
        granularity: Granularity,
        is_all: bool,
    ) -> Result<Self, CreateError> {
        let mut known = HBitmap::new(len, granularity)?;
        // A job that runs must not fail for want of memory.
        known.reserve()?;
        if is_all {
            known.set_all();
        }
        Ok(Self { known })
    }

    /// Zeroes were written.
    pub(crate) fn learn(&mut self, range: ByteRange) {
        let granularity = self.known.granularity();
        let whole = granularity.inward(range, self.known.len());
        let start = granularity.start_of(whole.start);
        let end = granularity.start_of(whole.end).min(self.known.len());
        self.known
            .set(start..end.max(start))
            .expect("within the disk");
    }

    /// Something else is about to be written, or may have been.
    pub(crate) fn forget(&mut self, range: ByteRange) {
        let granularity = self.known.granularity();
        let start = granularity.align_down(range.start());
        let end = granularity.align_up(range.end());
        self.known.reset_inner(start..end).expect("within the disk");
    }

    /// Whether all of `range` is known.
    pub(crate) fn has_all(&self, range: ByteRange) -> bool {
        self.known.all_dirty_in(range)
    }

    /// The first part of `range` that is known.
    pub(crate) fn first_in(&self, range: ByteRange) -> Option<ByteRange> {
        self.known.next_dirty_area(range, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_are_known_as_a_whole_or_not_at_all() {
        let granularity = Granularity::from_bytes(4096).unwrap();
        let mut zeroes = Zeroes::new(10_000, granularity, false).unwrap();
        zeroes.learn((1..8191).into());
        assert_eq!(zeroes.first_in((0..10_000).into()), None);
        zeroes.learn((1..10_000).into());
        let known = ByteRange::from(4096..10_000);
        assert_eq!(
            zeroes.first_in((0..10_000).into()),
            Some(known),
            "the end of the disk ends one"
        );
        assert!(zeroes.has_all((5000..9000).into()) && !zeroes.has_all((4000..5000).into()));
        zeroes.forget((9999..10_000).into());
        assert_eq!(
            zeroes.first_in((0..10_000).into()),
            Some((4096..8192).into())
        );
        zeroes.forget((8191..8193).into());
        assert_eq!(zeroes.first_in((0..10_000).into()), None);

        let all = Zeroes::new(10_000, granularity, true).unwrap();
        assert!(all.has_all((0..10_000).into()));
    }
}
