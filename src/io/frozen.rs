//! A disk as it was at the instant of a backup, as a device to be read.

use std::io;

use crate::backup::{FrozenView, ViewError};
use crate::copy::Side;
use crate::io::{
    AlignedBuf, BlockDevice, BufResult, BufferPool, Extent, HeapPool, Limits, ReadAt, WrongLength,
};
use crate::units::ByteRange;

/// A disk as it was at the instant of a backup, while the guest writes on: a [`FrozenView`] over the two
/// devices that hold it. What is saved is read from the target of the backup, everything else from its source.
///
/// It can be the source of another job, on a [`Node`](crate::Node) of its own which no guest writes to: with
/// [`discard_source`](crate::BackupOptions::discard_source) that gives back what it has copied. To compare a backup
/// of that instant with it, while the guest writes on, run a [`Mirror`](crate::Mirror) from this to the backup, with
/// [sync none](crate::MirrorSync::None), and [`verify`](crate::Job::verify) once it is ready: what differs is told
/// and mended.
///
/// # Errors
///
/// Reads fail with [`ViewError`] in an [`io::Error`]: of the kind permission denied where there is nothing to
/// be read, else other. They never return what is later than the instant.
#[derive(Debug)]
pub struct FrozenDisk<S, T, P = HeapPool> {
    view: FrozenView,
    source: S,
    target: T,
    pool: P,
}

impl<S, T> FrozenDisk<S, T, HeapPool>
where
    S: BlockDevice<Buf = AlignedBuf>,
    T: BlockDevice<Buf = AlignedBuf>,
{
    /// The disk of `view`, which is that of a backup from `source` to `target`.
    pub fn new(view: FrozenView, source: S, target: T) -> Self {
        let align = source.limits().mem_align.max(target.limits().mem_align);
        let pool = HeapPool::new(align as usize);
        Self::with_pool(view, source, target, pool)
    }
}

impl<S, T, P> FrozenDisk<S, T, P> {
    /// The same, with the caller's own buffers for reads of which parts are on both devices.
    pub fn with_pool(view: FrozenView, source: S, target: T, pool: P) -> Self {
        Self {
            view,
            source,
            target,
            pool,
        }
    }

    /// The view.
    #[must_use]
    pub fn view(&self) -> &FrozenView {
        &self.view
    }
}

impl<S, T, P> BlockDevice for FrozenDisk<S, T, P>
where
    S: BlockDevice,
    T: BlockDevice<Buf = S::Buf>,
{
    type Buf = S::Buf;

    /// Those of a source that takes what both devices take.
    fn limits(&self) -> Limits {
        let (source, target) = (self.source.limits(), self.target.limits());
        let mut limits = Limits::new(self.view.len());
        limits.request_align = source.request_align.max(target.request_align);
        limits.mem_align = source.mem_align.max(target.mem_align);
        limits.max_transfer = source.max_transfer.min(target.max_transfer);
        limits
    }
}

impl<S, T, P> FrozenDisk<S, T, P>
where
    S: ReadAt,
    T: ReadAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
{
    async fn read_piece(&self, (piece, side): (ByteRange, Side), buf: S::Buf) -> BufResult<S::Buf> {
        let (read, buf) = match side {
            Side::Target => self.target.read_at(piece.start(), buf).await,
            Side::Source | Side::Buffer => self.source.read_at(piece.start(), buf).await,
        };
        (WrongLength::check(read, &buf, piece), buf)
    }

    async fn read_pieces(
        &self,
        offset: u64,
        mut buf: S::Buf,
        pieces: &[(ByteRange, Side)],
    ) -> BufResult<S::Buf> {
        for &piece in pieces {
            let range = piece.0;
            let len = usize::try_from(range.len()).expect("part of a buffer");
            let part = match self.pool.take(len) {
                Ok(part) => part,
                Err(error) => return (Err(error), buf),
            };
            let (read, part) = self.read_piece(piece, part).await;
            let at = usize::try_from(range.start() - offset).expect("part of a buffer");
            if read.is_ok() {
                buf.as_mut()[at..at + len].copy_from_slice(part.as_ref());
            }
            self.pool.put(part);
            if read.is_err() {
                return (read, buf);
            }
        }
        (Ok(()), buf)
    }
}

impl<S, T, P> ReadAt for FrozenDisk<S, T, P>
where
    S: ReadAt,
    T: ReadAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
{
    async fn read_at(&self, offset: u64, buf: S::Buf) -> BufResult<S::Buf> {
        let Some(range) = ByteRange::at(offset, buf.as_ref().len() as u64) else {
            return (Err(io::ErrorKind::InvalidInput.into()), buf);
        };
        let read = match self.view.begin_read(range) {
            Ok(read) => read,
            Err(error) => return (Err(error.into()), buf),
        };
        let (result, buf) = match *read.pieces() {
            [] => (Ok(()), buf),
            [piece] => self.read_piece(piece, buf).await,
            ref pieces => self.read_pieces(offset, buf, pieces).await,
        };
        // A read that failed says nothing, whatever else has happened.
        let result = result.and_then(|()| Ok(read.finish()?));
        (result, buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let read = self.view.begin_read(range)?;
        let Some(&(piece, side)) = read.pieces().first() else {
            return Ok(Extent::data(0));
        };
        let status = match side {
            Side::Target => self.target.block_status(piece).await,
            Side::Source | Side::Buffer => self.source.block_status(piece).await,
        }?;
        read.finish()?;
        let mut extent = status.or_data(piece);
        extent.len = extent.len.min(piece.len());
        extent.in_top |= side == Side::Target;
        Ok(extent)
    }

    fn discard_read(&self, range: ByteRange) {
        // What cannot be given up stays, which costs space and nothing else.
        let _ = self.view.give_up(range);
    }
}

impl From<ViewError> for io::Error {
    fn from(error: ViewError) -> Self {
        let kind = match error {
            ViewError::NoAccess(_) => io::ErrorKind::PermissionDenied,
            ViewError::NotBegun | ViewError::Over | ViewError::NotForReaders => {
                io::ErrorKind::Other
            }
        };
        Self::new(kind, error)
    }
}
