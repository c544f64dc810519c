//! What stands in a stream, whichever of the two it is: no node is known here.

pub(super) mod native;
pub(super) mod qemu;
pub(super) mod reader;
pub(super) mod sections;
pub(super) mod writer;

use crate::units::{ByteRange, Granularity};

/// Bytes of a sector, the unit of places on a disk in QEMU's stream.
pub(super) const SECTOR: u64 = 512;

/// Serialized bytes of a chunk.
pub(super) const CHUNK: u64 = 1024;

/// A bitmap's length and granularity, and how it is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes of the disk.
    pub(super) len: u64,
    pub(super) granularity: Granularity,
}

impl Shape {
    /// Where the last sector of the disk ends, which may be partial.
    pub(super) fn end(self) -> u64 {
        let end = self.len.checked_next_multiple_of(SECTOR);
        end.unwrap_or(u64::MAX)
    }

    /// Bytes of the disk that 64 granules have: what chunks begin at multiples of.
    pub(super) fn align(self) -> u64 {
        // At most 2^37: a node records in granules of 2 GiB at most.
        64 * self.granularity.bytes()
    }

    /// Bytes of the disk that a chunk tells of: 8192 granules, or as many as 32 bits count the sectors of.
    pub(super) fn chunk(self) -> u64 {
        let align = self.align();
        let most = u64::from(u32::MAX) * SECTOR;
        // Powers of two: this is asked for each chunk, and to divide would be what takes longest.
        (CHUNK / 8 * align).min(most & !(align - 1))
    }

    /// The same as a power of two: a chunk of which it is noted whether it has changed.
    pub(super) fn tracked_chunk(self) -> u64 {
        1 << self.chunk().ilog2()
    }

    /// Serialized bytes of all.
    pub(super) fn bytes(self) -> u64 {
        self.granularity.granules_in(self.len).div_ceil(64) * 8
    }

    /// Serialized bytes of a range that begins at a multiple of [`align`](Self::align).
    pub(super) fn bytes_of(self, range: ByteRange) -> u64 {
        self.granularity.granules_in(range.len()).div_ceil(64) * 8
    }

    /// The chunk of `chunk` bytes, or the rest, from `start` on.
    pub(super) fn chunk_at(self, start: u64, chunk: u64) -> ByteRange {
        (start..start.saturating_add(chunk).min(self.len)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(len: u64, exponent: u8) -> Shape {
        let granularity = Granularity::from_exponent(exponent).unwrap();
        Shape { len, granularity }
    }

    #[test]
    fn chunks_have_8192_granules_unless_their_sectors_do_not_fit_32_bits() {
        assert_eq!(shape(1 << 40, 9).chunk(), 4 << 20);
        assert_eq!(shape(1 << 40, 16).chunk(), 512 << 20);
        assert_eq!(shape(1 << 50, 27).chunk(), 1 << 40);
        for exponent in 9..=31 {
            let shape = shape(1 << 50, exponent);
            assert!(shape.chunk() / SECTOR < 1 << 32);
            assert_eq!(shape.chunk() % shape.align(), 0);
            assert!(shape.tracked_chunk() <= shape.chunk());
            assert_eq!(shape.tracked_chunk() % shape.align(), 0);
        }
        // 2^32 sectors and more would be 8192 granules here: the largest multiple of 64 granules below.
        assert_eq!(shape(1 << 50, 28).chunk() / SECTOR, (1 << 32) - (1 << 25));
        assert_eq!(shape(1 << 50, 31).chunk() / SECTOR, 15 << 28);
    }
}
