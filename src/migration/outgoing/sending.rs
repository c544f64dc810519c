//! One bitmap of a source, and which of its chunks are to be sent.

use super::super::error::SetupError;
use super::super::mapping::BitmapId;
use super::super::setup::Selected;
use super::super::wire::Shape;
use crate::bitmap::HBitmap;
use crate::node::BitmapHold;
use crate::units::ByteRange;

/// One bitmap.
pub(super) struct Sending {
    pub(super) id: BitmapId,
    pub(super) node: usize,
    pub(super) wire: (String, String),
    pub(super) shape: Shape,
    pub(super) is_enabled: bool,
    pub(super) is_persistent: bool,
    pub(super) hold: Option<BitmapHold>,
    pub(super) walk: Walk,
    pub(super) is_announced: bool,
    pub(super) is_complete: bool,
    /// What of the node's writes was known when the guest stood still.
    pub(super) writes_found: u64,
    pub(super) sent: u64,
}

/// Which chunks are to be sent.
pub(super) enum Walk {
    /// Those from here on; `None` when all were.
    Once(Option<u64>),
    /// Those that have changed, looked for from here on.
    Changes {
        from: u64,
        /// A disk without a byte has no chunk that could change, and one that must be sent.
        owes_empty: bool,
    },
}

impl Sending {
    pub(super) fn new(selected: Selected, is_tracked: bool) -> Result<Self, SetupError> {
        let Selected {
            id,
            hold,
            node,
            wire,
            shape,
            is_enabled,
            is_persistent,
        } = selected;
        let walk = if is_tracked {
            let chunk = shape.tracked_chunk() / shape.align() * 8;
            hold.track_changes(chunk)
                .map_err(|error| SetupError::Bitmap {
                    bitmap: id.clone(),
                    error,
                })?;
            Walk::Changes {
                from: 0,
                owes_empty: shape.len == 0,
            }
        } else {
            Walk::Once(Some(0))
        };
        Ok(Self {
            id,
            node,
            wire,
            shape,
            is_enabled,
            is_persistent,
            hold: Some(hold),
            walk,
            is_announced: false,
            is_complete: false,
            writes_found: 0,
            sent: 0,
        })
    }

    pub(super) fn wire(&self) -> (&str, &str) {
        (&self.wire.0, &self.wire.1)
    }

    pub(super) fn hold(&self) -> &BitmapHold {
        self.hold.as_ref().expect("it is not over")
    }

    /// Serialized bytes that are to be sent.
    pub(super) fn left(&self) -> u64 {
        match (&self.walk, &self.hold) {
            (_, None) | (Walk::Once(None), _) => 0,
            (Walk::Once(Some(from)), _) => self.shape.bytes_of((*from..self.shape.len).into()),
            (Walk::Changes { .. }, Some(hold)) => {
                let held = hold.lock();
                let changed = held.changes().map_or(0, HBitmap::count);
                let chunk = self.shape.tracked_chunk() / self.shape.align() * 8;
                changed.saturating_mul(chunk).min(self.shape.bytes())
            }
        }
    }

    /// What is to be sent again.
    pub(super) fn mark(&mut self, range: ByteRange) {
        if let Walk::Changes { owes_empty, .. } = &mut self.walk {
            *owes_empty |= self.shape.len == 0;
            if let Some(hold) = &self.hold {
                hold.lock().mark_changed(range);
            }
        }
    }
}

impl Walk {
    /// Where chunks were read since the start was passed.
    pub(super) fn read(&self, shape: Shape) -> ByteRange {
        match *self {
            Walk::Once(from) => (0..from.unwrap_or(shape.len)).into(),
            Walk::Changes { from, .. } => (0..from).into(),
        }
    }

    /// Whether it goes by which chunks have changed.
    pub(super) fn is_tracked(&self) -> bool {
        matches!(self, Walk::Changes { .. })
    }

    /// Whether any chunk is to be sent.
    pub(super) fn is_left(&self, changes: Option<&HBitmap>) -> bool {
        match *self {
            Walk::Once(from) => from.is_some(),
            Walk::Changes { owes_empty, .. } => {
                owes_empty || changes.is_some_and(|changes| !changes.is_clean())
            }
        }
    }

    /// The chunks that come next, so many or fewer, if those are one after the other.
    pub(super) fn ahead(&self, shape: Shape, chunks: usize) -> ByteRange {
        match *self {
            Walk::Once(Some(from)) => {
                let len = shape.chunk().saturating_mul(chunks as u64);
                (from..from.saturating_add(len).min(shape.len)).into()
            }
            Walk::Once(None) | Walk::Changes { .. } => (0..0).into(),
        }
    }

    /// The chunk that comes next. `None` at the end, after which it is looked for from the start.
    #[inline]
    pub(super) fn next(&mut self, shape: Shape, changes: Option<&HBitmap>) -> Option<ByteRange> {
        match self {
            Walk::Once(from) => {
                let range = shape.chunk_at((*from)?, shape.chunk());
                *from = (range.end() < shape.len).then_some(range.end());
                Some(range)
            }
            Walk::Changes { from, owes_empty } => {
                if std::mem::take(owes_empty) {
                    return Some((0..0).into());
                }
                let changes = changes?;
                let Some(start) = changes.next_dirty(*from..shape.len) else {
                    *from = 0;
                    return None;
                };
                let start = changes.granularity().align_down(start);
                let range = shape.chunk_at(start, shape.tracked_chunk());
                *from = range.end();
                Some(range)
            }
        }
    }
}
