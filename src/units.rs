//! Bytes, granules and the ways of rounding between them.
//!
//! ```text
//! bytes     0        64K       128K      192K      256K
//!           ├─────────┼─────────┼─────────┼─────────┤
//! granules  │    0    │    1    │    2    │    3    │      granularity 64 KiB
//!                 ▲───── 40K..150K ─────▲
//! outward   ├─────────────────────────────┤                0..3  every granule touched
//! inward              ├─────────┤                          1..2  every granule covered
//! ```
//!
//! All rounding of the crate is here, so that it can be read in one place: marking something dirty
//! rounds **outward** (too much is copied twice, too little is lost), marking something clean rounds
//! **inward** (a granule copied by half is still dirty).

use std::fmt;
use std::ops::Range;

/// A half-open range of byte offsets, `start..end` with `start <= end`.
///
/// # Examples
///
/// ```
/// use blockjob::ByteRange;
///
/// let range = ByteRange::from(4096..8192);
/// assert_eq!(range.len(), 4096);
/// assert!(range.overlaps((8191..8192).into()));
/// assert!(!range.overlaps((8192..9000).into()));
/// assert_eq!(ByteRange::at(u64::MAX, 2), None, "does not fit in 64 bits");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    /// Never below `start`.
    end: u64,
}

impl ByteRange {
    /// The `len` bytes from `start` on, or `None` if they end past `u64::MAX`.
    #[must_use]
    pub const fn at(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// First byte of the range.
    #[must_use]
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The byte after the last one of the range.
    #[must_use]
    #[inline]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes.
    #[must_use]
    #[inline]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range has no byte.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `offset` lies in the range.
    #[must_use]
    #[inline]
    pub const fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end
    }

    /// Whether every byte of `other` lies in the range. An empty `other` must lie between the ends.
    #[must_use]
    #[inline]
    pub const fn contains_range(self, other: ByteRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two ranges share a byte.
    #[must_use]
    #[inline]
    pub const fn overlaps(self, other: ByteRange) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// The bytes both ranges have; an empty range if there are none.
    #[must_use]
    #[inline]
    pub fn intersection(self, other: ByteRange) -> ByteRange {
        ByteRange::from(self.start.max(other.start)..self.end.min(other.end))
    }

    /// Splits at `offset`, which is clamped to the range: the bytes before it, and the rest.
    #[must_use]
    pub fn split_at(self, offset: u64) -> (ByteRange, ByteRange) {
        let at = offset.clamp(self.start, self.end);
        ((self.start..at).into(), (at..self.end).into())
    }
}

/// As everywhere in Rust, a range whose start lies past its end is empty; it becomes the empty range
/// at its start.
impl From<Range<u64>> for ByteRange {
    #[inline]
    fn from(range: Range<u64>) -> Self {
        Self {
            start: range.start,
            end: range.end.max(range.start),
        }
    }
}

impl From<ByteRange> for Range<u64> {
    fn from(range: ByteRange) -> Self {
        range.start..range.end
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// How many bytes one bit of a bitmap stands for: a power of two, kept as its exponent.
///
/// # Examples
///
/// ```
/// use blockjob::Granularity;
///
/// let granularity = Granularity::from_bytes(65536).unwrap();
/// assert_eq!(granularity.exponent(), 16);
/// assert_eq!(granularity, Granularity::DEFAULT);
/// assert_eq!(Granularity::from_bytes(65535), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granularity(u8);

impl Granularity {
    /// 64 KiB, what a dirty bitmap has if nobody says otherwise.
    pub const DEFAULT: Granularity = Granularity(16);

    /// `2^exponent` bytes, or `None` for an exponent above 63.
    #[must_use]
    pub const fn from_exponent(exponent: u8) -> Option<Self> {
        if exponent < 64 {
            Some(Self(exponent))
        } else {
            None
        }
    }

    /// `bytes`, or `None` unless that is a power of two.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() {
            Some(Self(bytes.trailing_zeros() as u8))
        } else {
            None
        }
    }

    /// Bytes per granule.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The exponent of two: 16 for 64 KiB.
    #[must_use]
    #[inline]
    pub const fn exponent(self) -> u8 {
        self.0
    }

    /// Number of granules that `len` bytes from offset 0 touch; the last one may be partial.
    #[must_use]
    #[inline]
    pub const fn granules_in(self, len: u64) -> u64 {
        (len >> self.0) + (len & (self.bytes() - 1) != 0) as u64
    }

    /// Index of the granule that `offset` lies in.
    #[inline]
    pub(crate) const fn granule_of(self, offset: u64) -> u64 {
        offset >> self.0
    }

    /// First byte of a granule. The index must be that of a granule that starts below 2^64.
    #[inline]
    pub(crate) const fn start_of(self, granule: u64) -> u64 {
        granule << self.0
    }

    /// Every granule that `range` touches; none for an empty range.
    #[inline]
    pub(crate) fn outward(self, range: ByteRange) -> Range<u64> {
        let first = self.granule_of(range.start);
        if range.is_empty() {
            return first..first;
        }
        first..self.granule_of(range.end - 1) + 1
    }

    /// Every granule that `range` covers from its first to its last byte. For a bitmap of `len` bytes
    /// the last granule counts as covered when `range` reaches `len`.
    #[inline]
    pub(crate) fn inward(self, range: ByteRange, len: u64) -> Range<u64> {
        let first = self.granules_in(range.start);
        let end = if range.end >= len {
            self.granules_in(len)
        } else {
            self.granule_of(range.end)
        };
        first..end.max(first)
    }

    /// The largest multiple of the granularity that is not above `offset`.
    #[inline]
    pub(crate) const fn align_down(self, offset: u64) -> u64 {
        offset & !(self.bytes() - 1)
    }

    /// The smallest multiple of the granularity that is not below `offset`, or `u64::MAX` if there
    /// is none.
    #[inline]
    pub(crate) const fn align_up(self, offset: u64) -> u64 {
        match offset.checked_add(self.bytes() - 1) {
            Some(sum) => self.align_down(sum),
            None => u64::MAX,
        }
    }

    /// Whether `offset` is a multiple of the granularity.
    #[inline]
    pub(crate) const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.bytes() - 1) == 0
    }
}

impl fmt::Debug for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Granularity({self})")
    }
}

/// `512 B`, `64 KiB`, `2 GiB`.
impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][usize::from(self.0 / 10)];
        write!(f, "{} {unit}", 1u64 << (self.0 % 10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granularity(bytes: u64) -> Granularity {
        Granularity::from_bytes(bytes).unwrap()
    }

    #[test]
    fn outward_takes_every_granule_touched() {
        let g = granularity(64);
        assert_eq!(g.outward((0..0).into()), 0..0);
        assert_eq!(g.outward((63..65).into()), 0..2);
        assert_eq!(g.outward((64..128).into()), 1..2);
        assert_eq!(g.outward((u64::MAX - 1..u64::MAX).into()).count(), 1);
    }

    #[test]
    fn inward_takes_only_granules_covered_but_for_the_partial_last() {
        let g = granularity(64);
        assert_eq!(g.inward((0..64).into(), 1000), 0..1);
        assert_eq!(g.inward((1..128).into(), 1000), 1..2);
        assert_eq!(g.inward((1..127).into(), 1000), 1..1);
        assert_eq!(g.inward((70..80).into(), 1000).count(), 0);
        assert_eq!(g.inward((960..1000).into(), 1000), 15..16);
        assert_eq!(g.inward((961..1000).into(), 1000).count(), 0);
    }

    #[test]
    fn rounding_never_overflows() {
        let g = Granularity::from_exponent(63).unwrap();
        assert_eq!(g.align_up(1), 1 << 63);
        assert_eq!(g.align_up(u64::MAX), u64::MAX);
        assert_eq!(g.granules_in(u64::MAX), 2);
        assert_eq!(Granularity::from_exponent(64), None);
        assert_eq!(Granularity::from_bytes(0), None);
    }

    #[test]
    fn reversed_ranges_are_empty() {
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is tested")]
        let range = ByteRange::from(9..3);
        assert!(range.is_empty());
        assert_eq!(range.start(), 9);
        assert!(!range.overlaps((0..100).into()));
    }

    #[test]
    fn sizes_print_with_their_unit() {
        assert_eq!(granularity(512).to_string(), "512 B");
        assert_eq!(Granularity::DEFAULT.to_string(), "64 KiB");
        assert_eq!(granularity(1 << 63).to_string(), "8 EiB");
    }
}
