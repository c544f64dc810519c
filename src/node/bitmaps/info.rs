//! Looking at bitmaps: what there is to know of one, what is dirty in it, and a copy of it.

use super::{BitmapError, Bitmaps, BusyWith};
use crate::bitmap::HBitmap;
use crate::units::{ByteRange, Granularity};

/// Everything there is to know of a named bitmap at one moment, but for what is dirty in it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk.
    pub len: u64,
    /// How many bytes a bit stands for.
    pub granularity: Granularity,
    /// Bytes of all dirty granules, above `len` when all are dirty and the last is partial. While the
    /// bitmap is claimed, those of its frozen bits. 0 if it is inconsistent.
    pub dirty_bytes: u64,
    /// While it is claimed: the same of its successor.
    pub successor_dirty_bytes: Option<u64>,
    /// Whether guest writes are recorded, be it in its successor.
    pub is_recording: bool,
    /// The operation that has it to itself, if one has.
    pub busy_with: Option<BusyWith>,
    /// Whether it is saved with the image.
    pub is_persistent: bool,
    /// Whether its storage cannot be written to, and so neither the disk.
    pub is_readonly: bool,
    /// Whether its stored copy was not closed, so that nobody knows what is dirty.
    pub is_inconsistent: bool,
    /// [`HBitmap::digest`] of what `dirty_bytes` counts. Only if it was
    /// [asked for](Bitmaps::query_with_digest), and not of one that is inconsistent.
    #[cfg(feature = "sha2")]
    #[cfg_attr(docsrs, doc(cfg(feature = "sha2")))]
    pub digest: Option<[u8; 32]>,
}

impl BitmapInfo {
    /// Whether an operation has it to itself.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy_with.is_some()
    }
}

/// Dirty ranges of a bitmap, as many as were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirtyRuns {
    /// Ascending, none touching the next, as long as can be within what was asked for.
    pub runs: Vec<ByteRange>,
    /// Where to go on, if there may be more.
    pub next: Option<u64>,
}

/// What a snapshot of a claimed bitmap is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOf {
    /// The bitmap's own bits: those of a claimed one do not change.
    Bitmap,
    /// Those, and what was recorded since it was claimed.
    WithSuccessor,
}

impl Bitmaps<'_> {
    /// What there is to know of one bitmap.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound).
    pub fn query(&self, name: &str) -> Result<BitmapInfo, BitmapError> {
        Ok(self.inner().lock_drained().find(name)?.info())
    }

    /// The same, and the digest of its bits at that moment, whoever has them: for comparing bitmaps across
    /// machines. The node's lock is held while the bits are copied, not while they are digested.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`OutOfMemory`](BitmapError::OutOfMemory).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Node};
    ///
    /// let disks = [Node::new(1 << 30), Node::new(1 << 30)];
    /// for disk in &disks {
    ///     disk.bitmaps().add_disabled("monday", BitmapOptions::default())?;
    /// }
    /// let [one, other] = disks.each_ref().map(|disk| disk.bitmaps().query_with_digest("monday"));
    /// assert!(one?.digest.is_some_and(|digest| other.unwrap().digest == Some(digest)));
    /// # Ok::<(), blockjob::BitmapError>(())
    /// ```
    #[cfg(feature = "sha2")]
    #[cfg_attr(docsrs, doc(cfg(feature = "sha2")))]
    pub fn query_with_digest(&self, name: &str) -> Result<BitmapInfo, BitmapError> {
        let list = self.inner().lock_drained();
        let named = list.find(name)?;
        let mut info = named.info();
        let copy = match named.map() {
            Ok(map) => Some(super::copy_of(map)?),
            Err(_) => None,
        };
        drop(list);
        info.digest = copy.map(|copy| copy.digest());
        Ok(info)
    }

    /// What there is to know of all, at one moment and in the order in which they were made.
    #[must_use]
    pub fn query_all(&self) -> Vec<BitmapInfo> {
        let list = self.inner().lock_drained();
        list.entries().map(super::entry::Named::info).collect()
    }

    /// The first `runs_max` dirty ranges within `range`. They begin and end at granule boundaries, or
    /// where `range` or the disk does.
    ///
    /// One call is consistent in itself. A series of calls that belong together is for a bitmap that
    /// does not change: a [frozen](Self::freeze) one, or a [snapshot](Self::snapshot).
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Inconsistent`](BitmapError::Inconsistent), and
    /// [`OutOfRange`](BitmapError::OutOfRange) if `range` begins past the end.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Node};
    ///
    /// let node = Node::new(1 << 30);
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// node.bitmaps().add(&guard, "monday", BitmapOptions::default())?;
    /// drop(guard);
    /// for at in [0, 10 << 20, 20 << 20] {
    ///     node.begin_write((at..at + 512).into()).go().expect("nobody quiesces it").finish(());
    /// }
    ///
    /// let page = node.bitmaps().runs("monday", 4096..1 << 30, 2)?;
    /// assert_eq!(page.runs, [(4096..65536).into(), (10 << 20..(10 << 20) + 65536).into()]);
    /// let page = node.bitmaps().runs("monday", page.next.unwrap()..1 << 30, 2)?;
    /// assert_eq!((page.runs.len(), page.next), (1, None));
    /// # Ok::<(), blockjob::BitmapError>(())
    /// ```
    pub fn runs(
        &self,
        name: &str,
        range: impl Into<ByteRange>,
        runs_max: usize,
    ) -> Result<DirtyRuns, BitmapError> {
        let range = range.into();
        let list = self.inner().lock_drained();
        let map = list.find(name)?.map()?;
        if range.start() > map.len() {
            return Err(BitmapError::OutOfRange {
                offset: range.start(),
                len: map.len(),
            });
        }
        let mut found = map.runs_in(range, u64::MAX);
        let runs: Vec<_> = found.by_ref().take(runs_max).collect();
        let end = runs.last().map_or(range.start(), |run| run.end());
        let is_more = found.next().is_some();
        Ok(DirtyRuns {
            runs,
            next: is_more.then_some(end),
        })
    }

    /// A copy of the bits at this moment. It belongs to the caller and holds nothing.
    ///
    /// A write in flight is not in it. Do not [clear](Self::clear) the bitmap by what was copied: a write that is
    /// recorded between the two is in neither. [`claim`](Self::claim) takes the bits and has a successor record.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`Inconsistent`](BitmapError::Inconsistent),
    /// [`OutOfMemory`](BitmapError::OutOfMemory).
    pub fn snapshot(&self, name: &str, of: SnapshotOf) -> Result<HBitmap, BitmapError> {
        self.inner().lock_drained().find(name)?.snapshot(of)
    }
}
