//! What a bitmap is made with, and what storage takes.

use super::error::CannotPersist;
use crate::units::Granularity;

/// The bounds of a granularity that nobody has asked for.
const DEFAULT_MIN: u64 = 4 << 10;
const DEFAULT_MAX: u64 = 64 << 10;

/// What a bitmap is made with.
///
/// # Examples
///
/// ```
/// use blockjob::{BitmapOptions, Granularity};
///
/// let mut options = BitmapOptions::default();
/// assert_eq!(options.granularity(), Granularity::DEFAULT);
/// options.cluster = Some(16 << 10);
/// assert_eq!(options.granularity(), Granularity::from_bytes(16 << 10).unwrap());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapOptions {
    /// How many bytes a bit stands for, 512 bytes to 2 GiB. Default by `cluster`.
    pub granularity: Option<Granularity>,
    /// The unit in which the image of the disk hands out storage, in bytes. It is the granularity if
    /// none is given, within 4 KiB and 64 KiB and rounded **down** to a power of two. Default none,
    /// and so 64 KiB.
    pub cluster: Option<u64>,
    /// Whether it is to be saved with the image. Default no.
    pub persistent: bool,
}

impl BitmapOptions {
    /// The granularity that a bitmap made with them has.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        let default = || match self.cluster {
            None | Some(0) => Granularity::DEFAULT,
            Some(cluster) => {
                let bytes = cluster.clamp(DEFAULT_MIN, DEFAULT_MAX);
                Granularity::from_bytes(1 << bytes.ilog2()).expect("it is a power of two")
            }
        };
        self.granularity.unwrap_or_else(default)
    }
}

/// What the storage of a node's bitmaps takes: the directory of an image, say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapStorage {
    /// How many bitmaps. Default any number.
    pub bitmaps_max: usize,
    /// How long their names may be, in bytes. Default 1023, as long as any is.
    pub name_bytes_max: usize,
    /// The finest granularity. Default 512 bytes, as fine as any is.
    pub granularity_min: Granularity,
}

impl Default for BitmapStorage {
    fn default() -> Self {
        Self {
            bitmaps_max: usize::MAX,
            name_bytes_max: super::NAME_BYTES_MAX,
            granularity_min: Granularity::from_exponent(crate::node::record::LOG_EXPONENT_MIN)
                .expect("it is below 64"),
        }
    }
}

impl BitmapStorage {
    /// Whether it takes one more, besides `others`.
    pub(super) fn check(
        &self,
        name: &str,
        granularity: Granularity,
        others: usize,
    ) -> Result<(), CannotPersist> {
        if others >= self.bitmaps_max {
            let max = self.bitmaps_max;
            return Err(CannotPersist::TooMany { max });
        }
        if name.len() > self.name_bytes_max {
            let max = self.name_bytes_max;
            return Err(CannotPersist::NameTooLong { max });
        }
        if granularity < self.granularity_min {
            let min = self.granularity_min;
            return Err(CannotPersist::TooFine { min });
        }
        Ok(())
    }
}
