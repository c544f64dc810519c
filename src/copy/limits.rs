//! What a device can do, as its owner tells it.

use crate::copy::{CompareBy, Side};
use crate::units::ByteRange;

/// What a device is and can do, told once, before a job starts.
///
/// Start from [`Limits::new`] and change what differs. The length and all alignments are bytes; an
/// alignment is a power of two. The end of the disk is always a legal end of a request, also when the
/// length is no multiple of the alignment: the device deals with that.
///
/// # Examples
///
/// ```
/// use blockjob::{Limits, RangeLimits};
///
/// let mut limits = Limits::new(10 << 30);
/// limits.request_align = 4096; // opened with O_DIRECT
/// limits.mem_align = 4096;
/// limits.write_zeroes = Some(RangeLimits { align: 4096, max: 1 << 30 });
/// assert!(limits.check().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Length of the disk.
    pub len: u64,
    /// Offsets and lengths of reads and writes are multiples of this. Default 1.
    pub request_align: u32,
    /// Buffers start at a multiple of this. Default 1.
    pub mem_align: u32,
    /// The longest read or write. Default 1 GiB.
    pub max_transfer: u32,
    /// Whether and how ranges can be made to read as zeroes without sending the zeroes. Default none.
    pub write_zeroes: Option<RangeLimits>,
    /// Whether [`write_zeroes`](Self::write_zeroes) that may unmap takes about the same time for a
    /// large range as for a small one. Default no.
    pub cheap_zeroes: bool,
    /// Whether and how ranges can be discarded. Default none.
    pub discard: Option<RangeLimits>,
    /// In what units storage is handed out, if known: a job's granularity follows it. Default none.
    pub cluster: Option<u32>,
    /// Whether a write to a part of a cluster that has no storage yet fills the rest of the cluster with
    /// something that is not the content of the disk, as an overlay does whose base is not the one it will
    /// have later. The first write to each [`cluster`](Self::cluster) is then made to cover all of it.
    /// Default no.
    pub fills_clusters: bool,
    /// Whether a target can write [compressed](crate::io::WriteAt::write_compressed_at). Default no.
    pub compresses: bool,
    /// Whether a target can [copy from the source](crate::io::WriteAt::copy_from_source) by itself. Default no.
    pub copies_from_source: bool,
    /// Whether and how what a target holds can be compared with the source. Default not.
    pub compare: Option<CompareBy>,
    /// Names the storage, if there is a name: two devices with the same one are the same storage, and
    /// one is not copied onto the other. A [`Driver`](crate::driver::Driver) that was given source and target the other
    /// way round knows it by this alone. Default none.
    pub identity: Option<u128>,
}

/// What a request that carries no data must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Offsets and lengths are multiples of this.
    pub align: u32,
    /// The longest request.
    pub max: u64,
}

impl RangeLimits {
    /// Whether a device of `len` bytes takes `range` in one request.
    pub(crate) fn takes(self, range: ByteRange, len: u64) -> bool {
        let align = u64::from(self.align);
        let ends_well = range.end().is_multiple_of(align) || range.end() == len;
        range.start().is_multiple_of(align) && ends_well && range.len() <= self.max
    }
}

/// What is wrong with what a device says of itself.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the {field} of the device is {value}, which cannot be")]
#[non_exhaustive]
pub struct LimitsError {
    /// The field of [`Limits`].
    pub field: &'static str,
    /// Its value.
    pub value: u64,
}

impl Limits {
    /// A device of `len` bytes that reads and writes anything anywhere, and can do nothing else.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            len,
            request_align: 1,
            mem_align: 1,
            max_transfer: 1 << 30,
            write_zeroes: None,
            cheap_zeroes: false,
            discard: None,
            cluster: None,
            fills_clusters: false,
            compresses: false,
            copies_from_source: false,
            compare: None,
            identity: None,
        }
    }

    /// Whether all of it makes sense.
    ///
    /// # Errors
    ///
    /// The first field that does not.
    pub fn check(&self) -> Result<(), LimitsError> {
        let power_of_two = |field, value: u32| {
            if value.is_power_of_two() {
                return Ok(());
            }
            Err(LimitsError {
                field,
                value: value.into(),
            })
        };
        let holds_one = |field, max: u64, align: u32| {
            if max >= u64::from(align) {
                return Ok(());
            }
            Err(LimitsError { field, value: max })
        };
        if self.len > i64::MAX as u64 {
            return Err(LimitsError {
                field: "len",
                value: self.len,
            });
        }
        power_of_two("request_align", self.request_align)?;
        power_of_two("mem_align", self.mem_align)?;
        holds_one("max_transfer", self.max_transfer.into(), self.request_align)?;
        if let Some(zeroes) = self.write_zeroes {
            power_of_two("write_zeroes.align", zeroes.align)?;
            holds_one("write_zeroes.max", zeroes.max, zeroes.align)?;
        }
        if let Some(discard) = self.discard {
            power_of_two("discard.align", discard.align)?;
            holds_one("discard.max", discard.max, discard.align)?;
        }
        if let Some(cluster) = self.cluster {
            power_of_two("cluster", cluster)?;
        }
        if self.fills_clusters && self.cluster.is_none() {
            return Err(LimitsError {
                field: "cluster",
                value: 0,
            });
        }
        Ok(())
    }
}

/// The limits of both ends, checked on their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) source: Limits,
    pub(crate) target: Limits,
}

impl Ends {
    pub(crate) fn check(source: Limits, target: Limits) -> Result<Self, (Side, LimitsError)> {
        source.check().map_err(|error| (Side::Source, error))?;
        target.check().map_err(|error| (Side::Target, error))?;
        Ok(Self { source, target })
    }

    /// The one that cannot be what these were told of, if a driver's devices have such limits.
    pub(crate) fn mistaken(&self, source: &Limits, target: &Limits) -> Option<Side> {
        let is_mistaken = |found: &Limits, meant: &Limits, other: &Limits| {
            let differs = meant
                .identity
                .is_some_and(|meant| found.identity != Some(meant));
            let is_other = found.identity == other.identity;
            found.len < meant.len || found.identity.is_some() && (differs || is_other)
        };
        if is_mistaken(source, &self.source, &self.target) {
            return Some(Side::Source);
        }
        is_mistaken(target, &self.target, &self.source).then_some(Side::Target)
    }

    /// What each transfer between the two is a multiple of.
    pub(crate) fn request_align(&self) -> u64 {
        self.source
            .request_align
            .max(self.target.request_align)
            .into()
    }

    /// The longest transfer that both take.
    pub(crate) fn max_transfer(&self) -> u64 {
        self.source
            .max_transfer
            .min(self.target.max_transfer)
            .into()
    }
}
