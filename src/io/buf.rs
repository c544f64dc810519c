//! Buffers for a copy, and where they come from.

use std::collections::TryReserveError;
use std::fmt;
use std::io;

use parking_lot::Mutex;

use crate::units::ByteRange;

/// Where a driver takes its buffers from.
///
/// A device with buffers of its own (registered with a ring, mapped for a peer) brings a pool of them;
/// for others there is [`HeapPool`].
pub trait BufferPool {
    /// The buffers, as the devices want them.
    type Buf;

    /// A buffer of exactly `len` bytes, of any content.
    ///
    /// # Errors
    ///
    /// If there is none to be had. The copy that wanted it fails with this error, on the target's
    /// side.
    fn take(&self, len: usize) -> io::Result<Self::Buf>;

    /// Gives a buffer back. A buffer whose request was abandoned does not come back.
    fn put(&self, buf: Self::Buf);
}

impl<P: BufferPool + ?Sized> BufferPool for &P {
    type Buf = P::Buf;

    fn take(&self, len: usize) -> io::Result<P::Buf> {
        (**self).take(len)
    }

    fn put(&self, buf: P::Buf) {
        (**self).put(buf);
    }
}

/// A device has given back a buffer of another length than it was lent, so that it cannot have read what it was
/// asked for. It comes in an [`io::Error`] of the kind [invalid data](io::ErrorKind::InvalidData), and a job goes by
/// its policy for errors of that device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} bytes were to be read, and a buffer of {given} came back")]
pub struct WrongLength {
    /// How many bytes were to be read.
    pub asked: u64,
    /// How long the buffer is that came back.
    pub given: u64,
}

impl WrongLength {
    /// What came of a read of `range`, with which `buf` came back.
    pub(crate) fn check(
        read: io::Result<()>,
        buf: &impl AsRef<[u8]>,
        range: ByteRange,
    ) -> io::Result<()> {
        let (asked, given) = (range.len(), buf.as_ref().len() as u64);
        match read {
            Ok(()) if given != asked => {
                let wrong = WrongLength { asked, given };
                Err(io::Error::new(io::ErrorKind::InvalidData, wrong))
            }
            read => read,
        }
    }
}

/// Bytes on the heap that start at a chosen alignment.
///
/// # Examples
///
/// ```
/// use blockjob::io::AlignedBuf;
///
/// let buf = AlignedBuf::new(1000, 4096)?;
/// assert_eq!(buf.as_ref().len(), 1000);
/// assert_eq!(buf.as_ref().as_ptr().align_offset(4096), 0);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct AlignedBuf {
    /// Longer than the buffer by up to one alignment. It never moves, for it never grows.
    bytes: Box<[u8]>,
    /// Where in `bytes` the buffer starts.
    start: usize,
    len: usize,
    /// The longest it can be.
    capacity: usize,
}

impl AlignedBuf {
    /// `len` zero bytes whose address is a multiple of `align`, a power of two.
    ///
    /// # Errors
    ///
    /// If there is no memory, or `align` is no power of two.
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        if !align.is_power_of_two() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the alignment is not a power of two",
            ));
        }
        let out_of_memory =
            |error: TryReserveError| io::Error::new(io::ErrorKind::OutOfMemory, error);
        let total = len
            .checked_add(align - 1)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(total).map_err(out_of_memory)?;
        bytes.resize(total, 0);
        let bytes = bytes.into_boxed_slice();
        let start = bytes.as_ptr().align_offset(align);
        Ok(Self {
            bytes,
            start,
            len,
            capacity: len,
        })
    }
}

impl AsRef<[u8]> for AlignedBuf {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl AsMut<[u8]> for AlignedBuf {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A pool of [`AlignedBuf`]s on the heap. The last one given back is the next one given out, for it is
/// the one that the processor's caches still know.
///
/// It holds at most as many buffers as were out at the same time; a buffer that is too small for what is
/// asked for is let go. So a mirror leaves no more behind than its workers times its longest copy.
pub struct HeapPool {
    align: usize,
    free: Mutex<Vec<AlignedBuf>>,
}

impl HeapPool {
    /// Buffers aligned to `mem_align` bytes: the larger [`mem_align`](crate::Limits::mem_align) of the
    /// two devices.
    #[must_use]
    pub fn new(mem_align: usize) -> Self {
        Self {
            align: mem_align,
            free: Mutex::new(Vec::new()),
        }
    }
}

impl BufferPool for HeapPool {
    type Buf = AlignedBuf;

    fn take(&self, len: usize) -> io::Result<AlignedBuf> {
        if let Some(mut buf) = self.free.lock().pop()
            && len <= buf.capacity
        {
            buf.len = len;
            return Ok(buf);
        }
        // None is free, or it is too small and goes, so that the pool grows into the sizes asked for.
        AlignedBuf::new(len, self.align)
    }

    fn put(&self, buf: AlignedBuf) {
        self.free.lock().push(buf);
    }
}

impl fmt::Debug for HeapPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeapPool")
            .field("align", &self.align)
            .field("free", &self.free.lock().len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_back_is_the_next_one_out_and_is_cut_to_length() {
        let pool = HeapPool::new(512);
        let big = pool.take(4096).unwrap();
        let address = big.as_ref().as_ptr();
        pool.put(big);
        let small = pool.take(100).unwrap();
        assert_eq!(small.as_ref().as_ptr(), address);
        assert_eq!(small.as_ref().len(), 100);
        pool.put(small);
        assert_eq!(pool.take(4096).unwrap().as_ref().len(), 4096);
    }

    #[test]
    fn a_pool_gives_larger_buffers_than_it_has() {
        let pool = HeapPool::new(512);
        pool.put(pool.take(10).unwrap());
        assert_eq!(pool.take(1000).unwrap().as_ref().len(), 1000);
    }

    #[test]
    fn a_bad_alignment_or_length_is_an_error() {
        assert!(AlignedBuf::new(10, 3).is_err());
        assert!(AlignedBuf::new(usize::MAX, 4096).is_err());
        assert!(AlignedBuf::new(0, 4096).unwrap().as_ref().is_empty());
    }
}
