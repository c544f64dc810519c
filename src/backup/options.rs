//! How a backup is made, and what can be wrong with that.

use std::time::Duration;

use crate::copy::{LimitsError, ShapeError, Side, Unmap};
use crate::job::{BitmapMode, JobOptions, JobOptionsError};

/// The smallest unit in which a backup saves what a guest is about to overwrite: 64 KiB.
pub(super) const CLUSTER_MIN: u64 = 64 << 10;
/// The largest: 2 GiB.
pub(super) const CLUSTER_MAX: u64 = 2 << 30;

/// What a backup copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackupSync {
    /// The whole disk, through all its layers.
    #[default]
    Full,
    /// What the topmost layer holds. The target shows the layers below by itself.
    Top,
    /// Only what the guest is about to overwrite, for those who read the rest from the disk itself. It goes
    /// on until it is cancelled.
    None,
    /// What is dirty in a bitmap.
    Bitmap,
    /// As [`Bitmap`](Self::Bitmap), with [`BitmapMode::OnSuccess`].
    Incremental,
}

/// What is done when something cannot be saved before the guest overwrites it, or not in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnCbwError {
    /// The guest goes on unharmed, and the backup fails.
    #[default]
    BreakSnapshot,
    /// The guest's write fails, and the backup goes on. The guest may try again.
    BreakGuestWrite,
}

/// How a backup is made.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use blockjob::{BackupOptions, BackupSync};
///
/// let mut options = BackupOptions::default();
/// options.sync = BackupSync::Incremental;
/// options.bitmap = Some("daily".to_owned());
/// options.cbw_timeout = Some(Duration::from_secs(1));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupOptions {
    /// What every job has. The error policies are those of background copying; for what guests wait for
    /// there is [`on_cbw_error`](Self::on_cbw_error). The speed limit does not hold up what guests wait for,
    /// but counts it.
    pub job: JobOptions,
    /// What is copied.
    pub sync: BackupSync,
    /// The named bitmap of the node that it goes by, or, with sync full and top, the one that is to say
    /// what is left to copy. Default none.
    pub bitmap: Option<String>,
    /// What becomes of the bitmap. Left out, it is [`BitmapMode::OnSuccess`] for sync incremental; all others
    /// must say so.
    pub bitmap_mode: Option<BitmapMode>,
    /// Operations in the background at the same time, 1 to 1024. Default 16.
    pub workers: usize,
    /// The longest copy in bytes; at least one cluster. Default 1 MiB.
    pub chunk_max: u64,
    /// Bytes held in buffers at the same time in the background; at least one chunk. What guests wait for
    /// has 64 chunks of its own. Default 16 MiB.
    pub buf_size: u64,
    /// The least to save at once before the guest overwrites part of it: 0, or a power of two up to 2 GiB.
    /// A *cluster* is the largest of this, the target's cluster, what both devices transfer at least, and
    /// 64 KiB. Default 0.
    pub min_cluster_size: u64,
    /// Whether areas that read as zeroes may lose their storage on the target. Default yes.
    pub unmap: Unmap,
    /// What is done when something cannot be saved in time.
    pub on_cbw_error: OnCbwError,
    /// How long one guest write may wait for what it overwrites to be saved, from when the machine learns of
    /// it. `None` for ever. Default 20 s.
    pub cbw_timeout: Option<Duration>,
    /// How long the guest is held at the most for its own writes in flight to settle, when the job starts by
    /// itself. Then it goes on, and it is tried again after as long a time. At least 1 ms. Default 5 s.
    pub hold_max: Duration,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            job: JobOptions::default(),
            sync: BackupSync::default(),
            bitmap: None,
            bitmap_mode: None,
            workers: 16,
            chunk_max: 1 << 20,
            buf_size: 16 << 20,
            min_cluster_size: 0,
            unmap: Unmap::Allowed,
            on_cbw_error: OnCbwError::default(),
            cbw_timeout: Some(Duration::from_secs(20)),
            hold_max: Duration::from_secs(5),
        }
    }
}

/// Why a backup could not be made. Nothing has changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackupError {
    /// The options of the job are wrong.
    #[error(transparent)]
    Job(#[from] JobOptionsError),
    /// What a device says of itself is wrong.
    #[error("{side}: {error}")]
    Limits {
        /// The device.
        side: Side,
        /// What is wrong.
        error: LimitsError,
    },
    /// The devices and the node are not equally long.
    #[error(
        "different sizes: the disk has {node} bytes, the source {source_len}, the target {target}"
    )]
    Lengths {
        /// Length of the node in bytes.
        node: u64,
        /// Length of the source in bytes.
        source_len: u64,
        /// Length of the target in bytes.
        target: u64,
    },
    /// Source and target are the same storage.
    #[error("source and target are the same storage")]
    SameStorage,
    /// Sync bitmap and incremental go by a bitmap.
    #[error("this sync mode needs a bitmap")]
    BitmapNeeded,
    /// A bitmap was named, and not what is to become of it.
    #[error("a bitmap needs a bitmap mode")]
    ModeNeeded,
    /// A bitmap mode without a bitmap.
    #[error("a bitmap mode needs a bitmap")]
    ModeWithoutBitmap,
    /// Sync incremental has a bitmap mode of its own.
    #[error("sync incremental is with bitmap mode on-success, not {0:?}")]
    NotIncremental(BitmapMode),
    /// Sync none never comes to the end at which something would become of a bitmap.
    #[error("sync none goes by no bitmap")]
    NoneWithBitmap,
    /// Sync full and top do not look at the bitmap, so it would have no effect.
    #[error("a bitmap with mode never has no effect on this sync mode")]
    NoEffect,
    /// Not a number of workers.
    #[error("{0} workers are not between 1 and 1024")]
    Workers(usize),
    /// Copies, or buffers, of no bytes.
    #[error("{0} must not be 0")]
    Zero(&'static str),
    /// Not a cluster size.
    #[error("a cluster size of {0} bytes is no power of two, or above 2 GiB")]
    ClusterSize(u64),
    /// The longest copy would be shorter than what must be saved at once.
    #[error("copies of at most {chunk_max} bytes are shorter than a cluster of {cluster} bytes")]
    ChunkTooShort {
        /// As in the options.
        chunk_max: u64,
        /// The cluster size in bytes.
        cluster: u64,
    },
    /// The devices cannot work together.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The disk is too large.
    #[error(transparent)]
    Bitmap(#[from] crate::bitmap::CreateError),
    /// Another job works on the node.
    #[error("another job works on the disk")]
    NodeBusy,
}

impl BackupOptions {
    /// What becomes of which bitmap, if the two go together.
    pub(super) fn bitmap(&self) -> Result<Option<(String, BitmapMode)>, BackupError> {
        let needs_one = matches!(self.sync, BackupSync::Bitmap | BackupSync::Incremental);
        let Some(name) = self.bitmap.clone() else {
            return match (needs_one, self.bitmap_mode) {
                (true, _) => Err(BackupError::BitmapNeeded),
                (false, Some(_)) => Err(BackupError::ModeWithoutBitmap),
                (false, None) => Ok(None),
            };
        };
        let mode = match (self.sync, self.bitmap_mode) {
            (BackupSync::None, _) => return Err(BackupError::NoneWithBitmap),
            (BackupSync::Incremental, None) => BitmapMode::OnSuccess,
            (BackupSync::Incremental, Some(mode)) if mode != BitmapMode::OnSuccess => {
                return Err(BackupError::NotIncremental(mode));
            }
            (_, None) => return Err(BackupError::ModeNeeded),
            (BackupSync::Full | BackupSync::Top, Some(BitmapMode::Never)) => {
                return Err(BackupError::NoEffect);
            }
            (_, Some(mode)) => mode,
        };
        Ok(Some((name, mode)))
    }

    /// The unit in which it saves, for a target with such clusters and devices that transfer in such units.
    /// A copy is never widened past it, or it would bring what a guest has written since.
    pub(super) fn cluster(&self, target: Option<u32>, align: u64) -> Result<u64, BackupError> {
        let wish = self.min_cluster_size;
        if wish != 0 && (!wish.is_power_of_two() || wish > CLUSTER_MAX) {
            return Err(BackupError::ClusterSize(wish));
        }
        let cluster = wish.max(CLUSTER_MIN).max(target.map_or(0, u64::from));
        let cluster = cluster.max(align);
        match cluster > CLUSTER_MAX {
            true => Err(BackupError::ClusterSize(cluster)),
            false => Ok(cluster),
        }
    }
}
