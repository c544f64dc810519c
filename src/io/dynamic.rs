//! Object-safe twins of the device traits, for those who mix device types in one program.

use std::future::Future;
use std::io;
use std::pin::Pin;

use crate::copy::{Extent, Limits, Unmap};
use crate::io::{BlockDevice, BufResult, ReadAt, WriteAt};
use crate::units::ByteRange;

/// A boxed future that need not be `Send`.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// [`ReadAt`] as a trait object: every `ReadAt` is one, and `dyn DynReadAt<B>` is a `ReadAt` again.
///
/// Each request costs one allocation. Whether the future is `Send` is lost on the way: to mix device
/// types on a multi-threaded runtime, make an `enum` of them instead.
///
/// # Examples
///
/// ```
/// use blockjob::io::{AlignedBuf, DynReadAt, ReadAt};
///
/// type AnySource = Box<dyn DynReadAt<AlignedBuf>>;
/// fn is_a_source<S: ReadAt>() {}
/// is_a_source::<AnySource>();
/// ```
pub trait DynReadAt<B> {
    /// As [`BlockDevice::limits`].
    fn dyn_limits(&self) -> Limits;
    /// As [`ReadAt::read_at`].
    fn dyn_read_at(&self, offset: u64, buf: B) -> LocalBoxFuture<'_, BufResult<B>>;
    /// As [`ReadAt::block_status`].
    fn dyn_block_status(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<Extent>>;
    /// As [`ReadAt::discard_read`].
    fn dyn_discard_read(&self, range: ByteRange);
}

/// [`WriteAt`] as a trait object: every `WriteAt` is one, and `dyn DynWriteAt<B>` is a `WriteAt`
/// again. What is said of [`DynReadAt`] holds here, too.
pub trait DynWriteAt<B> {
    /// As [`BlockDevice::limits`].
    fn dyn_limits(&self) -> Limits;
    /// As [`WriteAt::write_at`].
    fn dyn_write_at(&self, offset: u64, buf: B) -> LocalBoxFuture<'_, BufResult<B>>;
    /// As [`WriteAt::write_compressed_at`].
    fn dyn_write_compressed_at(&self, offset: u64, buf: B) -> LocalBoxFuture<'_, BufResult<B>>;
    /// As [`WriteAt::copy_from_source`].
    fn dyn_copy_from_source(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<()>>;
    /// As [`WriteAt::read_back`].
    fn dyn_read_back(&self, offset: u64, buf: B) -> LocalBoxFuture<'_, BufResult<B>>;
    /// As [`WriteAt::compare_at`].
    fn dyn_compare_at(
        &self,
        offset: u64,
        buf: B,
    ) -> LocalBoxFuture<'_, (io::Result<Vec<ByteRange>>, B)>;
    /// As [`WriteAt::write_zeroes`].
    fn dyn_write_zeroes(
        &self,
        range: ByteRange,
        unmap: Unmap,
    ) -> LocalBoxFuture<'_, io::Result<()>>;
    /// As [`WriteAt::discard`].
    fn dyn_discard(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<()>>;
    /// As [`WriteAt::flush`].
    fn dyn_flush(&self) -> LocalBoxFuture<'_, io::Result<()>>;
    /// As [`WriteAt::settle`].
    fn dyn_settle(&self) -> LocalBoxFuture<'_, ()>;
    /// As [`WriteAt::cancel_in_flight`].
    fn dyn_cancel_in_flight(&self);
}

impl<D: ReadAt> DynReadAt<D::Buf> for D {
    fn dyn_limits(&self) -> Limits {
        self.limits()
    }

    fn dyn_read_at(&self, offset: u64, buf: D::Buf) -> LocalBoxFuture<'_, BufResult<D::Buf>> {
        Box::pin(self.read_at(offset, buf))
    }

    fn dyn_block_status(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<Extent>> {
        Box::pin(self.block_status(range))
    }

    fn dyn_discard_read(&self, range: ByteRange) {
        self.discard_read(range);
    }
}

impl<D: WriteAt> DynWriteAt<D::Buf> for D {
    fn dyn_limits(&self) -> Limits {
        self.limits()
    }

    fn dyn_write_at(&self, offset: u64, buf: D::Buf) -> LocalBoxFuture<'_, BufResult<D::Buf>> {
        Box::pin(self.write_at(offset, buf))
    }

    fn dyn_write_compressed_at(
        &self,
        offset: u64,
        buf: D::Buf,
    ) -> LocalBoxFuture<'_, BufResult<D::Buf>> {
        Box::pin(self.write_compressed_at(offset, buf))
    }

    fn dyn_copy_from_source(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<()>> {
        Box::pin(self.copy_from_source(range))
    }

    fn dyn_read_back(&self, offset: u64, buf: D::Buf) -> LocalBoxFuture<'_, BufResult<D::Buf>> {
        Box::pin(self.read_back(offset, buf))
    }

    fn dyn_compare_at(
        &self,
        offset: u64,
        buf: D::Buf,
    ) -> LocalBoxFuture<'_, (io::Result<Vec<ByteRange>>, D::Buf)> {
        Box::pin(self.compare_at(offset, buf))
    }

    fn dyn_write_zeroes(
        &self,
        range: ByteRange,
        unmap: Unmap,
    ) -> LocalBoxFuture<'_, io::Result<()>> {
        Box::pin(self.write_zeroes(range, unmap))
    }

    fn dyn_discard(&self, range: ByteRange) -> LocalBoxFuture<'_, io::Result<()>> {
        Box::pin(self.discard(range))
    }

    fn dyn_flush(&self) -> LocalBoxFuture<'_, io::Result<()>> {
        Box::pin(self.flush())
    }

    fn dyn_settle(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(self.settle())
    }

    fn dyn_cancel_in_flight(&self) {
        self.cancel_in_flight();
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> BlockDevice for dyn DynReadAt<B> + '_ {
    type Buf = B;

    fn limits(&self) -> Limits {
        self.dyn_limits()
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> ReadAt for dyn DynReadAt<B> + '_ {
    fn read_at(&self, offset: u64, buf: B) -> impl Future<Output = BufResult<B>> {
        self.dyn_read_at(offset, buf)
    }

    fn block_status(&self, range: ByteRange) -> impl Future<Output = io::Result<Extent>> {
        self.dyn_block_status(range)
    }

    fn discard_read(&self, range: ByteRange) {
        self.dyn_discard_read(range);
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> BlockDevice for dyn DynWriteAt<B> + '_ {
    type Buf = B;

    fn limits(&self) -> Limits {
        self.dyn_limits()
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> WriteAt for dyn DynWriteAt<B> + '_ {
    fn write_at(&self, offset: u64, buf: B) -> impl Future<Output = BufResult<B>> {
        self.dyn_write_at(offset, buf)
    }

    fn write_compressed_at(&self, offset: u64, buf: B) -> impl Future<Output = BufResult<B>> {
        self.dyn_write_compressed_at(offset, buf)
    }

    fn copy_from_source(&self, range: ByteRange) -> impl Future<Output = io::Result<()>> {
        self.dyn_copy_from_source(range)
    }

    fn read_back(&self, offset: u64, buf: B) -> impl Future<Output = BufResult<B>> {
        self.dyn_read_back(offset, buf)
    }

    fn compare_at(
        &self,
        offset: u64,
        buf: B,
    ) -> impl Future<Output = (io::Result<Vec<ByteRange>>, B)> {
        self.dyn_compare_at(offset, buf)
    }

    fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> impl Future<Output = io::Result<()>> {
        self.dyn_write_zeroes(range, unmap)
    }

    fn discard(&self, range: ByteRange) -> impl Future<Output = io::Result<()>> {
        self.dyn_discard(range)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> {
        self.dyn_flush()
    }

    fn settle(&self) -> impl Future<Output = ()> {
        self.dyn_settle()
    }

    fn cancel_in_flight(&self) {
        self.dyn_cancel_in_flight();
    }
}
