//! The traits that a caller implements for his devices, and what helps with them.
//!
//! Buffers are owned: they go in with a request and always come back with its answer, on success and
//! on failure. That is what `io_uring`, thread pools and completion queues need, and it keeps a future
//! that is dropped half-way memory-safe. No future is asked to be `Send`: for concrete devices the
//! compiler sees through the generic driver, so a driver over devices whose futures are `Send` can be
//! spawned on a multi-threaded runtime, and one over others runs on a local executor.
//!
//! What a dropped future may still do is the device's to say: see [`WriteAt::settle`].

mod buf;
mod dynamic;
mod frozen;
mod guest;

use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

pub use crate::copy::{CompareBy, Content, Extent, Limits, RangeLimits, Unmap};
use crate::units::ByteRange;

pub use buf::{AlignedBuf, BufferPool, HeapPool, WrongLength};
pub use dynamic::{DynReadAt, DynWriteAt, LocalBoxFuture};
pub use frozen::FrozenDisk;
pub use guest::{Copies, CopiesTo, GuestDisk, NoCopies};

/// What came of a request, and its buffer back.
pub type BufResult<B> = (io::Result<()>, B);

/// What source and target have in common.
pub trait BlockDevice {
    /// The buffers it reads into and writes from. A copy hands the buffer that was read into on to be
    /// written, so both ends of a job have the same.
    type Buf: AsRef<[u8]> + AsMut<[u8]>;

    /// What the device is and can do. Asked once per job; must not change while one runs.
    fn limits(&self) -> Limits;
}

/// A device that can be read: a source.
pub trait ReadAt: BlockDevice {
    /// Reads as many bytes from `offset` on as the buffer is long: all of them, or an error. A buffer as long as
    /// that comes back; if not, the read is taken for failed with [`WrongLength`].
    ///
    /// # Cancel safety
    ///
    /// A read whose future was dropped may go on; its buffer is then lost to the caller.
    fn read_at(&self, offset: u64, buf: Self::Buf) -> impl Future<Output = BufResult<Self::Buf>>;

    /// What is at the start of `range`, and how far it goes on like that.
    ///
    /// A device that does not know answers [`Content::Data`] for the whole range. It should answer fast,
    /// with less than it could find out if need be.
    fn block_status(&self, range: ByteRange) -> impl Future<Output = io::Result<Extent>>;

    /// A job with [`discard_source`](crate::BackupOptions::discard_source) has `range` on its target and will
    /// not read it again. A device that can give space back does so; others do nothing, as this does.
    fn discard_read(&self, _range: ByteRange) {}
}

/// A device that can be written: a target.
pub trait WriteAt: BlockDevice {
    /// Writes the whole buffer from `offset` on: all of it, or an error, after which any part may have
    /// been written.
    fn write_at(&self, offset: u64, buf: Self::Buf) -> impl Future<Output = BufResult<Self::Buf>>;

    /// As [`write_at`](Self::write_at), compressed. Only called if [`Limits::compresses`] says so, with one
    /// cluster of the job at a time. A device that does not is not asked; this fails.
    fn write_compressed_at(
        &self,
        _offset: u64,
        buf: Self::Buf,
    ) -> impl Future<Output = BufResult<Self::Buf>> {
        async { (Err(io::ErrorKind::Unsupported.into()), buf) }
    }

    /// Copies `range` from the source of the job, by a way that only the two devices know of: within a file
    /// system, say, or a storage array. Only called if [`Limits::copies_from_source`] says so. Should it fail,
    /// the job reads and writes instead, from then on. A device that cannot is not asked; this fails.
    fn copy_from_source(&self, _range: ByteRange) -> impl Future<Output = io::Result<()>> {
        async { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// Reads from a target as [`ReadAt::read_at`] does from a source, to compare what it holds. Only called if
    /// [`Limits::compare`] says [`CompareBy::Reading`]. A device that can be read has it do the same as its
    /// `read_at`; one that does not is not asked; this fails.
    fn read_back(
        &self,
        _offset: u64,
        buf: Self::Buf,
    ) -> impl Future<Output = BufResult<Self::Buf>> {
        async { (Err(io::ErrorKind::Unsupported.into()), buf) }
    }

    /// Tells what of the target, from `offset` on, does not hold the bytes of the buffer: ranges of the disk, as
    /// fine as it knows, and none if all is the same. Only called if [`Limits::compare`] says
    /// [`CompareBy::Device`]. A target that is far away may send hashes for that. One that does not is not asked;
    /// this fails.
    fn compare_at(
        &self,
        _offset: u64,
        buf: Self::Buf,
    ) -> impl Future<Output = (io::Result<Vec<ByteRange>>, Self::Buf)> {
        async { (Err(io::ErrorKind::Unsupported.into()), buf) }
    }

    /// Makes `range` read as zeroes. Only called if [`Limits::write_zeroes`] says how.
    fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> impl Future<Output = io::Result<()>>;

    /// Gives `range` back; what it reads as afterwards is undefined. Only called if [`Limits::discard`]
    /// says how.
    fn discard(&self, range: ByteRange) -> impl Future<Output = io::Result<()>>;

    /// Makes durable everything whose request was answered before.
    fn flush(&self) -> impl Future<Output = io::Result<()>>;

    /// Returns when no request made earlier can still change the device, also one whose future was
    /// dropped.
    ///
    /// A device that does its work within `poll`, so that a dropped future has stopped, is settled at
    /// once. One that hands requests to a thread, a ring or a peer waits for them here.
    fn settle(&self) -> impl Future<Output = ()>;

    /// Gives up requests that cannot be finished soon, such as those that wait for a connection: they
    /// answer with an error. Called when a job is cancelled by force. A device that has no such
    /// requests does nothing.
    fn cancel_in_flight(&self) {}
}

macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<D: BlockDevice + ?Sized> BlockDevice for $pointer {
            type Buf = D::Buf;

            fn limits(&self) -> Limits {
                (**self).limits()
            }
        }

        impl<D: ReadAt + ?Sized> ReadAt for $pointer {
            fn read_at(
                &self,
                offset: u64,
                buf: Self::Buf,
            ) -> impl Future<Output = BufResult<Self::Buf>> {
                (**self).read_at(offset, buf)
            }

            fn block_status(&self, range: ByteRange) -> impl Future<Output = io::Result<Extent>> {
                (**self).block_status(range)
            }

            fn discard_read(&self, range: ByteRange) {
                (**self).discard_read(range);
            }
        }

        impl<D: WriteAt + ?Sized> WriteAt for $pointer {
            fn write_at(
                &self,
                offset: u64,
                buf: Self::Buf,
            ) -> impl Future<Output = BufResult<Self::Buf>> {
                (**self).write_at(offset, buf)
            }

            fn write_compressed_at(
                &self,
                offset: u64,
                buf: Self::Buf,
            ) -> impl Future<Output = BufResult<Self::Buf>> {
                (**self).write_compressed_at(offset, buf)
            }

            fn copy_from_source(&self, range: ByteRange) -> impl Future<Output = io::Result<()>> {
                (**self).copy_from_source(range)
            }

            fn read_back(
                &self,
                offset: u64,
                buf: Self::Buf,
            ) -> impl Future<Output = BufResult<Self::Buf>> {
                (**self).read_back(offset, buf)
            }

            fn compare_at(
                &self,
                offset: u64,
                buf: Self::Buf,
            ) -> impl Future<Output = (io::Result<Vec<ByteRange>>, Self::Buf)> {
                (**self).compare_at(offset, buf)
            }

            fn write_zeroes(
                &self,
                range: ByteRange,
                unmap: Unmap,
            ) -> impl Future<Output = io::Result<()>> {
                (**self).write_zeroes(range, unmap)
            }

            fn discard(&self, range: ByteRange) -> impl Future<Output = io::Result<()>> {
                (**self).discard(range)
            }

            fn flush(&self) -> impl Future<Output = io::Result<()>> {
                (**self).flush()
            }

            fn settle(&self) -> impl Future<Output = ()> {
                (**self).settle()
            }

            fn cancel_in_flight(&self) {
                (**self).cancel_in_flight();
            }
        }
    )*};
}

forward!(&D, Box<D>, Arc<D>, Rc<D>);
