//! A disk that grows or shrinks, and its bitmaps with it.
//!
//! 1. All bitmaps of the disk have its new length, or none has: memory for all is there before the first
//!    changes. Nothing is resized that somebody has, or that is read-only.
//! 2. What is new is dirty in every bitmap that records, unless the caller knows that it reads as it did.
//!    A disk that shrinks forgets what was dirty past its end; if it grows again, it reads differently
//!    there than the last backup says, and nobody would copy it.
//! 3. The guest is held from the look at the bitmaps until all have the new length, so each write is recorded
//!    in maps and logs that cover it.

use std::fmt;
use std::marker::PhantomData;

use super::bitmaps::BitmapError;
use super::{Inner, Node, QuiesceGuard};
use crate::bitmap::HBitmap;
use crate::sync::Arc;

/// What becomes of bytes that a disk gains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grown {
    /// They are dirty in every bitmap that records: nobody knows how they read.
    Dirty,
    /// They are clean: they read as zeroes, and so does what they are compared with. If anything was written there
    /// before the commit, that is lost to the bitmaps.
    Clean,
}

/// That a disk may have another length, with all that it takes at hand. The disk of the VMM can be resized
/// now; then [`commit`](Self::commit). Dropped, nothing has changed.
#[must_use = "nothing changes unless it is committed"]
pub struct Resize<'a> {
    /// `None` once it is decided.
    node: Option<Arc<Inner>>,
    len: u64,
    /// The bitmaps as they will be.
    maps: Vec<(u64, HBitmap)>,
    _guard: PhantomData<&'a QuiesceGuard>,
}

impl Node {
    /// Prepares to make the disk one of `len` bytes, and all its bitmaps with it.
    ///
    /// Granules that lie past the new end as a whole are forgotten; one that the end cuts stays as it is.
    /// What is gained is clean in bitmaps that do not record, and as `grown` says in those that do, rounded
    /// **outward** to granules. Until it is decided the bitmaps are in use, and no job can have the disk.
    ///
    /// Writes past the end are not recorded. So the disk of the VMM is made longer, then the resize is committed,
    /// and only then is the guest told. What was written there before the commit is in no bitmap with
    /// [`Grown::Clean`].
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard; [`NodeBusy`](BitmapError::NodeBusy) if a job works
    /// on the disk, a [`JobBitmap`](crate::JobBitmap) records what is written to it or it is being resized;
    /// [`Busy`](BitmapError::Busy) and then [`ReadOnly`](BitmapError::ReadOnly) of any bitmap;
    /// [`TooLarge`](BitmapError::TooLarge), [`OutOfMemory`](BitmapError::OutOfMemory).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Grown, Node};
    ///
    /// let node = Node::new(1 << 20);
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// node.bitmaps().add(&guard, "daily", BitmapOptions::default())?;
    ///
    /// let resize = node.resize(&guard, 3 << 20, Grown::Dirty)?;
    /// let truncated: std::io::Result<()> = Ok(()); // what the VMM's own truncate came to
    /// truncated.expect("else the resize is dropped");
    /// resize.commit();
    /// drop(guard);
    /// assert_eq!(node.len(), 3 << 20);
    /// assert_eq!(node.bitmaps().query("daily")?.dirty_bytes, 2 << 20);
    /// # Ok::<(), blockjob::BitmapError>(())
    /// ```
    pub fn resize<'a>(
        &self,
        guard: &'a QuiesceGuard,
        len: u64,
        grown: Grown,
    ) -> Result<Resize<'a>, BitmapError> {
        if !guard.is_of(self) {
            return Err(BitmapError::OtherNode);
        }
        let node = self.inner();
        let mut list = node.lock_drained();
        list.check_resize()?;
        let maps = list.resized(len, grown)?;
        if let Some((log, granularity)) = list.recording.zip(list.finest()) {
            let log = node.logs[log].get().expect("writes are recorded in it");
            log.grow_to(len)
                .map_err(|error| BitmapError::log(error, len, granularity))?;
        }
        list.hold_all();
        Ok(Resize {
            node: Some(Arc::clone(node)),
            len,
            maps,
            _guard: PhantomData,
        })
    }
}

impl Resize<'_> {
    /// The length that the disk will have, in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a disk is no collection")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The disk has its new length. Cannot fail.
    pub fn commit(mut self) {
        if let Some(node) = self.node.take() {
            let mut list = node.lock_drained();
            node.set_len(self.len);
            let unused = list.put_resized(self.len, std::mem::take(&mut self.maps));
            list.let_go_all();
            drop(list);
            drop(unused);
        }
    }
}

impl Drop for Resize<'_> {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            node.list.lock().let_go_all();
        }
    }
}

impl fmt::Debug for Resize<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resize")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
