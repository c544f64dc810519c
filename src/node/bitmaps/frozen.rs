//! Bitmaps that are read by several, without a lock.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::entry::{Intent, Usage};
use super::{BitmapError, Bitmaps};
use crate::bitmap::{HBitmap, Status};
use crate::node::Inner;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc as NodeArc;
use crate::units::ByteRange;

/// A bitmap that nobody changes, shared by all who read it: for exports, and for backups that are done
/// from outside.
///
/// Made by [`Bitmaps::freeze`]. Clones are handles to the same bits. It dereferences to the [`HBitmap`],
/// and reading takes no lock. The bitmap is in use until the last handle is dropped, which takes the
/// node's lock.
#[derive(Clone)]
pub struct FrozenBitmap {
    shared: Arc<Shared>,
}

struct Shared {
    node: NodeArc<Inner>,
    id: u64,
    /// `None` once it is given back.
    map: Option<Arc<HBitmap>>,
}

impl Bitmaps<'_> {
    /// Keeps a bitmap that does not record from being changed, and gives it out for reading.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy) (for more handles clone the
    /// first), [`Inconsistent`](BitmapError::Inconsistent), [`Recording`](BitmapError::Recording).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::Status;
    /// use blockjob::{BitmapError, BitmapOptions, Node};
    ///
    /// let node = Node::new(1 << 20);
    /// node.bitmaps().add_disabled("monday", BitmapOptions::default())?;
    /// let frozen = node.bitmaps().freeze("monday")?;
    /// assert!(frozen.extents(4096..8192).eq([Status::Clean((4096..8192).into())]));
    /// assert!(matches!(node.bitmaps().clear("monday"), Err(BitmapError::Busy { .. })));
    /// drop(frozen);
    /// node.bitmaps().clear("monday")?;
    /// # Ok::<(), BitmapError>(())
    /// ```
    pub fn freeze(&self, name: &str) -> Result<FrozenBitmap, BitmapError> {
        let mut list = self.inner().lock_drained();
        let (id, named) = list.find_mut(name)?;
        let idle = named.idle(Intent::Use)?;
        if idle.usage.is_enabled() {
            let name = name.to_owned();
            return Err(BitmapError::Recording { name });
        }
        if !is_broken(Sabotage::FreezeWithoutHolding) {
            *idle.usage = Usage::Frozen;
        }
        let map = Some(Arc::clone(idle.map));
        Ok(FrozenBitmap {
            shared: Arc::new(Shared {
                node: NodeArc::clone(self.inner()),
                id,
                map,
            }),
        })
    }
}

impl FrozenBitmap {
    /// All bytes of `range` up to the end of the disk, in runs that are dirty or clean, ascending and as
    /// long as can be.
    pub fn extents(&self, range: impl Into<ByteRange>) -> impl Iterator<Item = Status> + '_ {
        let mut rest = range.into().intersection((0..self.len()).into());
        std::iter::from_fn(move || {
            // An empty rest is the end.
            let status = self.status(rest).ok()?;
            rest = (status.range().end()..rest.end()).into();
            Some(status)
        })
    }
}

impl Deref for FrozenBitmap {
    type Target = HBitmap;

    fn deref(&self) -> &HBitmap {
        let map = self.shared.map.as_deref();
        map.expect("it is given back when the last handle is dropped")
    }
}

impl fmt::Debug for FrozenBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Before anybody can find the bitmap idle, which then may change it.
        self.map = None;
        self.node.list.lock().owned_mut(self.id).thaw();
    }
}
