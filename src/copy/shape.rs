//! How a job cuts its work: what is claimed at once, what is copied at once, and what goes as zeroes.
//!
//! ```text
//! granules   │▓│ │▓│▓│▓│ │ │ │▓│            dirty
//! blocks     │▓▓▓│▓▓▓│▓▓▓│   │▓▓▓│          widened to the alignment of both devices
//! claim          ├───────────┤              a run of dirty blocks, cut at what is claimed already
//! pieces         ├──copy─┤zero┤             by what the source holds, and no longer than the limits
//! ```

use crate::bitmap::HBitmap;
use crate::copy::limits::Ends;
use crate::copy::{Content, Extent, OpKind, RangeLimits, Unmap};
use crate::units::{ByteRange, Granularity};

/// The shortest that a copy is made, unless a device takes less.
const CHUNK_MIN: u64 = 512;

/// The fixed numbers of one job.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// What it was made for.
    pub(crate) ends: Ends,
    /// Length of the disk.
    pub(crate) len: u64,
    pub(crate) granularity: Granularity,
    /// Claims start and end at multiples of this, or at the end of the disk: the largest of the
    /// granularity and the alignments.
    pub(crate) block: u64,
    /// The same for a claim that touches a cluster of the target that must be written whole.
    pub(crate) cluster: Option<u64>,
    /// The longest copy.
    pub(crate) chunk_max: u64,
    /// The longest claim.
    pub(crate) run_max: u64,
    /// What a write is aligned to that is not to fill a cluster.
    write_align: u64,
    /// What zero writes must look like.
    zeroes: Option<RangeLimits>,
    /// The same for discards.
    discard: Option<RangeLimits>,
    pub(crate) unmap: Unmap,
    /// Whether only what the topmost layer of the source holds is copied.
    pub(crate) only_top: bool,
    /// Whether zeroes cost the target about nothing, and so count nothing against the speed limit.
    pub(crate) cheap_zeroes: bool,
}

/// Why a job cannot be cut so that both devices take it.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShapeError {
    /// The shortest transfer that one device takes, or a cluster of the target that must be written whole,
    /// is longer than the longest that the other takes.
    #[error("{piece} bytes must be transferred at once, but {max} bytes is the most")]
    PieceTooLong {
        /// What must be transferred at once.
        piece: u64,
        /// The longest transfer.
        max: u64,
    },
}

impl Shape {
    pub(crate) fn new(
        ends: &Ends,
        granularity: Granularity,
        chunk_max: u64,
        buf_size: u64,
        workers: usize,
        unmap: Unmap,
    ) -> Result<Self, ShapeError> {
        let align = ends.request_align();
        let block = granularity.bytes().max(align);
        let filled = ends.target.cluster.filter(|_| ends.target.fills_clusters);
        let write_align = align.max(filled.map_or(1, u64::from));
        let cluster = filled
            .map(|cluster| u64::from(cluster).max(block))
            .filter(|&cluster| cluster > granularity.bytes());
        let most = align_down(ends.max_transfer(), align);
        // Tiny numbers are legal, and mean: as little as makes sense.
        let buf_size = buf_size.max(granularity.bytes());
        let chunk_max = chunk_max.max(CHUNK_MIN);
        // Both a cluster and one aligned request go out in one piece, whatever the buffer size says.
        let piece = cluster.unwrap_or(align);
        if piece > most {
            return Err(ShapeError::PieceTooLong { piece, max: most });
        }
        let chunk_max = align_down(chunk_max.min(buf_size).min(most), piece).max(piece);
        let claim_unit = cluster.unwrap_or(block);
        // No more than what keeps all workers busy: what is claimed early is copied again if the guest
        // writes to it meanwhile.
        let run_max = buf_size.min(chunk_max.saturating_mul(workers as u64));
        let run_max = align_down(run_max, claim_unit).max(claim_unit);
        let limits = |limits: RangeLimits| {
            let request_align = u32::try_from(align).expect("that of a device");
            RangeLimits {
                align: limits.align.max(request_align),
                max: align_down(limits.max, align.max(limits.align.into())),
            }
        };
        Ok(Self {
            ends: *ends,
            len: ends.target.len,
            granularity,
            write_align,
            block,
            cluster,
            chunk_max,
            run_max,
            zeroes: ends.target.write_zeroes.map(limits),
            discard: ends.target.discard.map(limits),
            unmap,
            only_top: false,
            cheap_zeroes: ends.target.cheap_zeroes && unmap == Unmap::Allowed,
        })
    }

    /// `range` rounded outward to multiples of `align`, but not past the end of the disk.
    pub(crate) fn widen(&self, range: ByteRange, align: u64) -> ByteRange {
        let end = align_up(range.end(), align).min(self.len);
        (align_down(range.start(), align)..end).into()
    }

    /// Whether a write of `range` never has the target fill more than that.
    pub(crate) fn fills_nothing_else(&self, range: ByteRange) -> bool {
        self.widen(range, self.write_align) == range
    }

    /// Rounds all that is dirty outward to what is written at once, clusters if they must be written whole.
    ///
    /// For those who go on where another has stopped: that one may have written what is clean together with
    /// what is dirty, and stopped in the midst of it.
    pub(crate) fn widen_all(&self, dirty: &mut HBitmap) {
        let align = self.block.max(self.cluster.unwrap_or(1));
        if align == self.granularity.bytes() {
            return;
        }
        let mut from = 0;
        while let Some(run) = dirty.next_dirty_area(from..self.len, u64::MAX) {
            let wide = self.widen(run, align);
            dirty.set(wide).expect("within the disk");
            from = wide.end();
        }
    }

    /// What `range` covers of blocks of `align` bytes as a whole; the end of the disk ends one.
    pub(crate) fn whole_blocks(&self, range: ByteRange, align: u64) -> ByteRange {
        let start = align_up(range.start(), align);
        let end = match range.end() >= self.len {
            true => self.len,
            false => align_down(range.end(), align),
        };
        (start..end.max(start)).into()
    }

    /// What claims in `range` are to be aligned to: clusters, if one of those touched was not written
    /// whole yet.
    pub(crate) fn claim_align(&self, range: ByteRange, filled: Option<&HBitmap>) -> u64 {
        match (self.cluster, filled) {
            (Some(cluster), Some(filled)) => {
                let clusters = self.widen(range, cluster);
                let all_filled = filled.all_dirty_in(clusters);
                if all_filled { self.block } else { cluster }
            }
            _ => self.block,
        }
    }

    /// The first piece of a claimed range, which is aligned to `align`, when this is at its start.
    pub(crate) fn piece(&self, claimed: ByteRange, align: u64, extent: Extent) -> OpKind {
        let known = claimed.start().saturating_add(extent.len);
        let wish = match extent.content {
            Content::Data => None,
            Content::Zero => self.zeroes.map(|limits| (limits, false)),
            Content::Undefined => self
                .discard
                .map(|limits| (limits, true))
                .or(self.zeroes.map(|limits| (limits, false))),
        };
        let Some((RangeLimits { align: own, max }, is_discard)) = wish else {
            return self.copy(claimed, align_up(known, align), align);
        };
        let granule = u64::from(own).max(align);
        let start = claimed.start();
        let end = self.end_without_data(claimed, known, granule, align_down(max, granule));
        if !start.is_multiple_of(granule) || end <= start {
            // What cannot go without data goes as data, up to where the next try may succeed.
            let boundary = align_up(start + 1, granule).min(align_up(known, align));
            return self.copy(claimed, boundary, align);
        }
        let range = (start..end).into();
        if is_discard {
            OpKind::Discard(range)
        } else {
            OpKind::Zero(range, self.unmap)
        }
    }

    fn end_without_data(&self, claimed: ByteRange, known: u64, granule: u64, max: u64) -> u64 {
        let end = known
            .min(claimed.end())
            .min(claimed.start().saturating_add(max));
        if end == self.len {
            end
        } else {
            align_down(end, granule)
        }
    }

    fn copy(&self, claimed: ByteRange, end: u64, align: u64) -> OpKind {
        // A block longer than a chunk is copied in several pieces; its claim ends with the last.
        let chunk = if align < self.chunk_max {
            align_down(self.chunk_max, align)
        } else {
            self.chunk_max
        };
        let end = end
            .min(claimed.end())
            .min(claimed.start().saturating_add(chunk));
        OpKind::Copy((claimed.start()..end).into())
    }

    /// How much of a zero area can be zeroed, from its start on: what lies before and behind it must be
    /// copied. `None` if the target cannot.
    pub(crate) fn zeroable(&self, area: ByteRange) -> Option<ByteRange> {
        let (align, _) = self.scan_zeroes()?;
        let start = align_up(area.start(), align);
        let end = match area.end() == self.len {
            true => area.end(),
            false => align_down(area.end(), align),
        };
        let inner = ByteRange::from(start..end);
        (!inner.is_empty()).then_some(inner)
    }

    /// What a write to the target must be aligned to, if it is not to fill a cluster. Small clusters are filled by
    /// what the job copies, and not by what a guest writes.
    pub(crate) fn write_align(&self) -> u64 {
        self.write_align
    }

    /// Whether the target can write zeroes at all.
    pub(crate) fn can_zero(&self) -> bool {
        self.zeroes.is_some()
    }

    /// Whether the target can make `range` read as zeroes at once.
    pub(crate) fn takes_zeroes(&self, range: ByteRange) -> bool {
        self.zeroes
            .is_some_and(|zeroes| zeroes.takes(range, self.len))
    }

    /// What discards are aligned to and how long they may be, if the target can discard.
    pub(crate) fn discard_limits(&self) -> Option<(u64, u64)> {
        let discard = self.discard.filter(|discard| discard.max > 0)?;
        Some((discard.align.into(), discard.max))
    }

    /// What zero writes of the scan are aligned to and how long they may be, if the target can write
    /// them: whole clusters, for none was written yet.
    pub(crate) fn scan_zeroes(&self) -> Option<(u64, u64)> {
        let RangeLimits { align, max } = self.zeroes?;
        let align = u64::from(align).max(self.cluster.unwrap_or(1));
        let max = align_down(max, align);
        (max > 0).then_some((align, max))
    }
}

fn align_down(offset: u64, align: u64) -> u64 {
    offset & !(align - 1)
}

fn align_up(offset: u64, align: u64) -> u64 {
    match offset.checked_add(align - 1) {
        Some(sum) => align_down(sum, align),
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::Limits;

    const KIB: u64 = 1024;

    fn shape(target: impl FnOnce(&mut Limits)) -> Shape {
        let source = Limits::new(1000 * KIB + 1);
        let mut limits = source;
        target(&mut limits);
        let ends = Ends::check(source, limits).unwrap();
        let granularity = Granularity::from_bytes(4 * KIB).unwrap();
        Shape::new(&ends, granularity, 64 * KIB, 1 << 20, 4, Unmap::Allowed).unwrap()
    }

    fn zeroes(align: u32, max: u64) -> Option<RangeLimits> {
        Some(RangeLimits { align, max })
    }

    /// All pieces of a claim, when the source says the same of all of it.
    fn pieces(shape: &Shape, claim: ByteRange, align: u64, content: Content) -> Vec<OpKind> {
        let mut rest = claim;
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let extent = Extent {
                len: rest.len(),
                content,
                in_top: true,
            };
            let piece = shape.piece(rest, align, extent);
            rest = rest.split_at(piece.range().unwrap().end()).1;
            pieces.push(piece);
        }
        pieces
    }

    #[test]
    fn data_is_cut_at_the_longest_copy() {
        let shape = shape(|_| {});
        assert_eq!(shape.run_max, 256 * KIB, "what keeps four workers busy");
        let cut = pieces(&shape, (0..130 * KIB).into(), 4 * KIB, Content::Data);
        let lens: Vec<u64> = cut
            .iter()
            .map(|op| op.range().unwrap().len() / KIB)
            .collect();
        assert_eq!(lens, [64, 64, 2]);
    }

    #[test]
    fn zeroes_go_as_zeroes_where_they_are_aligned_and_as_data_elsewhere() {
        let shape = shape(|limits| limits.write_zeroes = zeroes(16 << 10, 1 << 30));
        let claim = (8 * KIB..72 * KIB).into();
        let cut = pieces(&shape, claim, 4 * KIB, Content::Zero);
        assert_eq!(
            cut,
            [
                OpKind::Copy((8 * KIB..16 * KIB).into()),
                OpKind::Zero((16 * KIB..64 * KIB).into(), Unmap::Allowed),
                OpKind::Copy((64 * KIB..72 * KIB).into()),
            ]
        );
        let end = ByteRange::from(992 * KIB..1000 * KIB + 1);
        let cut = pieces(&shape, end, 4 * KIB, Content::Zero);
        assert_eq!(
            cut,
            [OpKind::Zero(end, Unmap::Allowed)],
            "the end of the disk is aligned"
        );
    }

    #[test]
    fn what_is_undefined_is_discarded_or_zeroed_or_copied() {
        let claim = ByteRange::from(0..8 * KIB);
        let none = shape(|_| {});
        let zeroing = shape(|limits| limits.write_zeroes = zeroes(512, 1 << 30));
        let discarding = shape(|limits| limits.discard = zeroes(512, 1 << 30));
        let cut = |shape| pieces(shape, claim, 4 * KIB, Content::Undefined);
        assert_eq!(cut(&none), [OpKind::Copy(claim)]);
        assert_eq!(cut(&zeroing), [OpKind::Zero(claim, Unmap::Allowed)]);
        assert_eq!(cut(&discarding), [OpKind::Discard(claim)]);
    }

    #[test]
    fn zeroes_are_never_longer_than_the_target_takes() {
        let short = shape(|limits| limits.write_zeroes = zeroes(512, 10_000));
        for op in pieces(&short, (0..200 * KIB).into(), 4 * KIB, Content::Zero) {
            assert!(op.range().unwrap().len() <= 10_000 && !matches!(op, OpKind::Copy(_)));
        }
        // Whole clusters must be written at first, and one is longer than a zero write may be.
        let clustered = shape(|limits| {
            limits.write_zeroes = zeroes(512, 4096);
            limits.cluster = Some(16 << 10);
            limits.fills_clusters = true;
        });
        assert_eq!(clustered.scan_zeroes(), None);
        let cut = pieces(&clustered, (0..32 * KIB).into(), 16 * KIB, Content::Zero);
        assert!(
            cut.iter().all(|op| matches!(op, OpKind::Copy(_))),
            "{cut:?}"
        );
    }

    #[test]
    fn a_piece_that_one_device_must_write_and_the_other_cannot_is_refused() {
        let source = Limits::new(1 << 20);
        let mut target = source;
        target.max_transfer = 4096;
        target.cluster = Some(8192);
        target.fills_clusters = true;
        let ends = Ends::check(source, target).unwrap();
        let granularity = Granularity::from_bytes(512).unwrap();
        let refused = Shape::new(&ends, granularity, 1 << 20, 1 << 20, 16, Unmap::Allowed);
        let too_long = ShapeError::PieceTooLong {
            piece: 8192,
            max: 4096,
        };
        assert_eq!(refused.unwrap_err(), too_long);
    }
}
