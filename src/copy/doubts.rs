//! What a job is to compare, and what it has found to differ.
//!
//! ```text
//!            claim            compared: the same
//! doubtful ─────────▶ reading ───────────────────▶ known to be equal
//!    ▲                  │ │
//!    └─ failed, lost ───┘ └─ differs ─▶ defined there? ─▶ suspect ─▶ no guest write since? ─▶ told, and dirty
//! ```
//!
//! 1. A doubt ends when its range is claimed. If the comparing fails, is lost, or is given up, it is doubtful
//!    again before the claim ends; but if the target cannot be read and may lack it, it is dirty.
//! 2. What differs is told only if no guest write has to do with it: one that was under way while it was read, or
//!    came later. That shows only once all writes have settled that were under way: then they are recorded.
//! 3. What differs stays known from the answer on until it is dirty, and is dirty before it is told.
//! 4. What is dirty anyway needs no comparing: the claim of a copy ends doubt and suspicion in its range. It is
//!    copied by nothing that was known of the target before. What an active write has changed of a suspect is
//!    doubtful again.

use std::collections::{BTreeMap, VecDeque};

use crate::bitmap::{CreateError, HBitmap};
use crate::copy::{CompareBy, OpId};
use crate::units::{ByteRange, Granularity};

/// See the module.
#[derive(Debug)]
pub(crate) struct Doubts {
    pub(super) by: CompareBy,
    /// Whether what is doubtful may be missing on the target, and is not just to be looked at once more.
    pub(super) is_lacking: bool,
    /// Whether somebody wants to know; else what turns out to differ is dirty at once.
    pub(super) is_on: bool,
    pub(super) map: HBitmap,
    /// Granules of which something differs, until it is known what becomes of that.
    pub(super) open: HBitmap,
    /// Those of them that hold defined content.
    pub(super) suspects: HBitmap,
    /// What of them is to be asked about, byte by byte.
    pub(super) to_ask: VecDeque<ByteRange>,
    pub(super) asking: BTreeMap<OpId, ByteRange>,
    /// Where the search goes on.
    pub(super) cursor: u64,
    /// Claims that are there to compare.
    pub(super) claims: usize,
    /// Sum of their lengths.
    pub(super) claimed_bytes: u64,
    /// The first block that could not be claimed for an active write, when that was tried last.
    pub(super) blocked: Option<ByteRange>,
}

impl Doubts {
    pub(crate) fn new(
        len: u64,
        granularity: Granularity,
        by: CompareBy,
    ) -> Result<Self, CreateError> {
        Ok(Self {
            by,
            is_lacking: false,
            is_on: false,
            map: HBitmap::new(len, granularity)?,
            open: HBitmap::new(len, granularity)?,
            suspects: HBitmap::new(len, granularity)?,
            to_ask: VecDeque::new(),
            asking: BTreeMap::new(),
            cursor: 0,
            claims: 0,
            claimed_bytes: 0,
            blocked: None,
        })
    }

    /// Whether there is anything that is not decided.
    pub(super) fn is_settled(&self) -> bool {
        self.map.is_clean() && self.is_told()
    }

    /// The same, but for what was not looked at yet.
    fn is_told(&self) -> bool {
        self.claims == 0
            && self.to_ask.is_empty()
            && self.asking.is_empty()
            && self.suspects.is_clean()
    }

    /// Whether something of `range` is not known to be equal.
    pub(super) fn is_doubtful(&self, range: ByteRange) -> bool {
        self.map.any_dirty_in(range) || self.open.any_dirty_in(range)
    }

    pub(super) fn doubt(&mut self, range: ByteRange) {
        self.map.set(range).expect("within the disk");
    }

    /// It is being copied: nothing of it is of interest any more.
    pub(super) fn forget(&mut self, range: ByteRange) {
        for map in [&mut self.map, &mut self.open, &mut self.suspects] {
            if !map.is_clean() {
                map.reset_inner(range).expect("within the disk");
            }
        }
    }

    /// An active write has changed it on both disks, or a part of it.
    pub(super) fn look_again(&mut self, range: ByteRange) {
        if self.open.is_clean() {
            return;
        }
        let open: Vec<ByteRange> = self.open.runs_in(range, u64::MAX).collect();
        let granularity = self.open.granularity();
        let len = self.open.len();
        for part in open {
            let start = granularity.align_down(part.start());
            let whole = ByteRange::from(start..granularity.align_up(part.end()).min(len));
            self.forget(whole);
            self.doubt(whole);
        }
    }

    /// The next range to be asked about, if something of it is open still.
    pub(super) fn next_to_ask(&mut self) -> Option<ByteRange> {
        while let Some(range) = self.to_ask.pop_front() {
            if self.open.any_dirty_in(range) {
                return Some(range);
            }
        }
        None
    }

    /// That range holds defined content, and differs.
    pub(super) fn suspect(&mut self, range: ByteRange) {
        let open: Vec<ByteRange> = self.open.runs_in(range, u64::MAX).collect();
        for part in open {
            self.suspects.set(part).expect("within the disk");
        }
    }
}
