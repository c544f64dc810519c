//! Why a verb was refused.

use super::BusyWith;
use crate::bitmap::CreateError;
use crate::log::DirtyLogError;
use crate::units::Granularity;

/// Why a bitmap cannot be had, or made. Nothing has changed.
///
/// The states that hinder are looked at in one order, and the first that does is told: in use, read-only,
/// inconsistent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The guard quiesces another node.
    #[error("the guard is that of another node")]
    OtherNode,
    /// The empty string is no name.
    #[error("a bitmap's name must not be empty")]
    NameEmpty,
    /// Names have up to 1023 bytes.
    #[error("a bitmap's name of {bytes} bytes is longer than 1023 bytes")]
    NameTooLong {
        /// Bytes, not characters, of the name.
        bytes: usize,
    },
    /// The node has a bitmap of that name.
    #[error("there is a bitmap {name:?} already")]
    NameExists {
        /// The name.
        name: String,
    },
    /// The node has no bitmap of that name.
    #[error("there is no bitmap {name:?}")]
    NotFound {
        /// The name.
        name: String,
    },
    /// Recording is done in granules of 512 bytes to 2 GiB.
    #[error("granularity {0} is not between 512 B and 2 GiB")]
    BadGranularity(Granularity),
    /// The disk is too long, or too long for the granularity.
    #[error("a disk of {len} bytes is too long for a bitmap with a granularity of {granularity}")]
    TooLarge {
        /// Bytes of the disk.
        len: u64,
        /// What it was to be recorded in.
        granularity: Granularity,
    },
    /// The allocator has no memory for the bits.
    #[error("no memory for a bitmap of {len} bytes with a granularity of {granularity}")]
    OutOfMemory {
        /// Bytes of the disk.
        len: u64,
        /// What it was to be recorded in.
        granularity: Granularity,
    },
    /// An operation has the bitmap to itself.
    #[error("bitmap {name:?} is in use by {with}")]
    Busy {
        /// The bitmap.
        name: String,
        /// The operation.
        with: BusyWith,
    },
    /// The storage that keeps the bitmap is read-only, and so its bits must not change.
    #[error("bitmap {name:?} is read-only")]
    ReadOnly {
        /// The bitmap.
        name: String,
    },
    /// Its stored copy was not closed, so that nobody knows what is dirty.
    #[error(
        "bitmap {name:?} was not closed and knows nothing: it can only be removed, and what it was \
         for begins anew with a full backup"
    )]
    Inconsistent {
        /// The bitmap.
        name: String,
    },
    /// It records, and what is read by several must not change.
    #[error("bitmap {name:?} records what is written: disable it first")]
    Recording {
        /// The bitmap.
        name: String,
    },
    /// Two bitmaps are not equally long, or a bitmap is not as long as the disk.
    #[error("bitmap {name:?} has {len} bytes and does not fit {expected} bytes")]
    SizeMismatch {
        /// The bitmap that does not fit.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// What it should be.
        expected: u64,
    },
    /// A merge of nothing.
    #[error("nothing is given to merge into bitmap {name:?}")]
    NoSources {
        /// The target.
        name: String,
    },
    /// The storage of the node's bitmaps does not take it.
    #[error("bitmap {name:?} cannot be persistent: {why}")]
    CannotPersist {
        /// The bitmap.
        name: String,
        /// What hinders.
        why: CannotPersist,
    },
    /// Only what is stored can be read-only or left out when it is stored.
    #[error("bitmap {name:?} is not persistent")]
    NotPersistent {
        /// The bitmap.
        name: String,
    },
    /// The range begins past the end of the bitmap.
    #[error("offset {offset} lies past a bitmap of {len} bytes")]
    OutOfRange {
        /// Where the range begins.
        offset: u64,
        /// Bytes of the bitmap.
        len: u64,
    },
    /// A job works on the disk, or its length is being changed.
    #[error("the disk is in use by {with}")]
    NodeBusy {
        /// The operation.
        with: BusyWith,
    },
}

/// Why storage does not take one more bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CannotPersist {
    /// The node was told of none.
    #[error("the disk has no storage for bitmaps")]
    NoStorage,
    /// There are as many as it takes.
    #[error("the storage takes no more than {max} bitmaps")]
    TooMany {
        /// As many.
        max: usize,
    },
    /// The name is too long for it.
    #[error("the storage takes no names longer than {max} bytes")]
    NameTooLong {
        /// Bytes it takes.
        max: usize,
    },
    /// The granularity is too fine for it.
    #[error("the storage takes no granularity finer than {min}")]
    TooFine {
        /// The finest that it takes.
        min: Granularity,
    },
}

impl BitmapError {
    pub(super) fn not_found(name: &str) -> Self {
        let name = name.to_owned();
        Self::NotFound { name }
    }

    pub(crate) fn create(error: CreateError, len: u64, granularity: Granularity) -> Self {
        match error {
            CreateError::TooLong { .. } | CreateError::TooManyGranules { .. } => {
                Self::TooLarge { len, granularity }
            }
            CreateError::OutOfMemory { .. } => Self::OutOfMemory { len, granularity },
        }
    }

    pub(in crate::node) fn log(error: DirtyLogError, len: u64, granularity: Granularity) -> Self {
        match error {
            DirtyLogError::TooLong { .. } | DirtyLogError::TooManyGranules { .. } => {
                Self::TooLarge { len, granularity }
            }
            DirtyLogError::OutOfMemory { .. } => Self::OutOfMemory { len, granularity },
        }
    }
}
