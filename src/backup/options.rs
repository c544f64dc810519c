//! How a backup is made, and what can be wrong with that.

use std::time::Duration;

use crate::copy::{CopyBy, Limits, LimitsError, ShapeError, Side, Unmap};
use crate::job::{BitmapMode, JobOptions, JobOptionsError};

/// The unit in which a backup saves what a guest is about to overwrite, unless told otherwise: 64 KiB.
const CLUSTER_DEFAULT: u64 = 64 << 10;
/// The smallest: 4 KiB.
pub(super) const CLUSTER_MIN: u64 = 4 << 10;
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
    /// What is dirty in [a bitmap](field@BackupOptions::bitmap) at the instant.
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

/// A device, fast and near, in which a backup saves what the guest is about to overwrite, so that the guest
/// waits for it and not for the target. What is saved is copied to the target in the background and then
/// discarded.
///
/// As the target it is to settle where a driver was dropped with requests in flight. Once it has failed to take
/// something it is left alone for a while: 10 ms, twice as long with each failure up to 5 s, and for want of space
/// no longer than until some is given back.
///
/// Each cluster is saved at its own offset: a sparse file as long as the disk will do. Whoever drives the job
/// has the device: see [`Driver::with_buffer`](crate::driver::Driver::with_buffer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupBuffer {
    /// What the device is and can do. Without [`discard`](Limits::discard) of single clusters its space is never
    /// given back.
    pub limits: Limits,
    /// Bytes that may be in use at the same time. Default no limit, but that of the device.
    pub bytes_max: u64,
    /// What is done when there is no space. Default wait.
    pub on_full: OnBufferFull,
}

/// What is done when something is to be saved and the buffer has no space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnBufferFull {
    /// The guest waits until it is on the target, or there is space, for
    /// [`cbw_timeout`](BackupOptions::cbw_timeout) at the most.
    #[default]
    Wait,
    /// As [`on_cbw_error`](BackupOptions::on_cbw_error) says, at once.
    Break,
}

impl BackupBuffer {
    /// A buffer without a limit of its own.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            bytes_max: u64::MAX,
            on_full: OnBufferFull::default(),
        }
    }

    /// The longest piece that it takes, in whole clusters, and the other devices, too: those take `chunk_max`.
    pub(super) fn piece_max(&self, cluster: u64, chunk_max: u64) -> Result<u64, BackupError> {
        let most = chunk_max.min(self.limits.max_transfer.into()) & !(cluster - 1);
        let align = self.limits.request_align;
        if most == 0 || u64::from(align) > cluster {
            let chunk_max = u32::try_from(chunk_max).unwrap_or(u32::MAX);
            let max_transfer = self.limits.max_transfer.min(chunk_max);
            return Err(BackupError::BufferUnfit {
                cluster,
                align,
                max_transfer,
            });
        }
        Ok(most)
    }

    /// How much can be discarded at once, in whole clusters.
    pub(super) fn discard_max(&self, cluster: u64) -> Option<u64> {
        let discard = self.limits.discard?;
        let max = discard.max & !(cluster - 1);
        (u64::from(discard.align) <= cluster && max > 0).then_some(max)
    }
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
    ///
    /// A bitmap knows only what was written while it [recorded](crate::BitmapInfo::is_recording): by one that was
    /// disabled since the last backup too little is copied, and nobody is told.
    ///
    /// From the instant until the job is over a [snapshot](crate::Bitmaps::snapshot) of
    /// [the bitmap alone](crate::SnapshotOf::Bitmap) is what is copied, in whole clusters: start the job by a
    /// [`Transaction`](crate::Transaction), and take it after the commit, before the job is driven. Or let the
    /// transaction merge the bitmap into one that does not record, as `examples/incremental_backup.rs` does. A
    /// snapshot from before the start lacks what is written between the two.
    pub bitmap: Option<String>,
    /// What becomes of the bitmap. Left out, it is [`BitmapMode::OnSuccess`] for sync incremental; all others
    /// must say so. When the job is over it holds
    ///
    /// | mode | after success | after a failure or a cancel, also of another of the group |
    /// |---|---|---|
    /// | on-success | what was written since the instant | what it held, and what was written since |
    /// | always | what was written since | what is not on the target, and what was written since |
    /// | never | what it held, and what was written since | the same |
    ///
    /// One that is read-only by then holds what it did and what was written since, whatever the mode.
    pub bitmap_mode: Option<BitmapMode>,
    /// Operations in the background at the same time, 1 to 1024. Default 16.
    pub workers: usize,
    /// The longest copy in bytes; at least one cluster. A guest write may have to wait for one that is under way. Default 1 MiB.
    pub chunk_max: u64,
    /// Bytes held in buffers at the same time in the background; at least one chunk. What guests wait for
    /// has 64 chunks of its own. Default 16 MiB.
    pub buf_size: u64,
    /// The least to save at once before the guest overwrites part of it: 0 for 64 KiB, or a power of two from
    /// 4 KiB to 2 GiB. A *cluster* is the largest of this, the target's cluster, and what both devices transfer
    /// at least. Default 0.
    ///
    /// A guest write waits for whole clusters, so with small ones it waits for less. Each costs two bits of memory,
    /// one more with a buffer or sync top, and they are looked through while the guest is held for the instant.
    pub min_cluster_size: u64,
    /// Where to save what the guest is about to overwrite, for a target that is slow. Default none.
    pub buffer: Option<BackupBuffer>,
    /// Whether the disk as it was at the instant can be [read](crate::Backup::view) while the job runs. Not
    /// together with a buffer. A reader for which a guest write waits longer than
    /// [`cbw_timeout`](Self::cbw_timeout) loses the view, if it is not for it that the guest's write is to fail:
    /// the backup goes on, but one with sync none, which is for readers, fails. Default no.
    pub view: bool,
    /// Whether the source is told what is safely on the target and will not be read again: for a source that
    /// is a copy, to give back its space. Not for a disk that a guest writes to: what it has written there by then
    /// may be discarded with it. Default no.
    pub discard_source: bool,
    /// Whether the target is to compress what it is given, one cluster at a time. Zeroes are written as such.
    /// Default no.
    pub compress: bool,
    /// Whether the target is to fetch data from the source by itself, if it can. Once that has failed it is read
    /// and written instead. Not together with `compress`. Default no.
    pub offload: bool,
    /// Whether areas that read as zeroes may lose their storage on the target. Default yes.
    pub unmap: Unmap,
    /// What is done when something cannot be saved in time.
    pub on_cbw_error: OnCbwError,
    /// How long one guest write may wait for what it overwrites to be saved, from when the machine learns of
    /// it. `None` for ever. Only a machine that is driven looks at the time: while nobody polls it, or a device does
    /// its work inside of a poll, guest writes wait for longer. Default 20 s.
    pub cbw_timeout: Option<Duration>,
    /// How long the guest is held at the most for its own writes in flight to settle, when the job starts by
    /// itself. Then it goes on, and it is tried again after as long a time. As
    /// [`cbw_timeout`](Self::cbw_timeout), only while the job is driven. At least 1 ms. Default 5 s.
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
            buffer: None,
            view: false,
            discard_source: false,
            compress: false,
            offload: false,
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
    /// Sync none copies nothing in the background that would empty a buffer.
    #[error("sync none has no use for a buffer")]
    NoneWithBuffer,
    /// A view is read from the source and the target, and not from a buffer.
    #[error("with a buffer there is no view")]
    ViewWithBuffer,
    /// The target cannot compress.
    #[error("the target cannot compress")]
    CannotCompress,
    /// What is copied by the target itself is not compressed.
    #[error("what is offloaded cannot be compressed")]
    CompressOffloaded,
    /// Sync full and top do not look at the bitmap, so it would have no effect.
    #[error("a bitmap with mode never has no effect on this sync mode")]
    NoEffect,
    /// A cluster cannot be brought to the buffer, and from there to the target, at once.
    #[error(
        "clusters of {cluster} bytes do not fit a buffer with requests of {align} to {max_transfer} bytes"
    )]
    BufferUnfit {
        /// The cluster size in bytes.
        cluster: u64,
        /// What its requests are aligned to, in bytes.
        align: u32,
        /// The longest request in bytes that all devices take.
        max_transfer: u32,
    },
    /// Not one cluster can be saved in a buffer of that size.
    #[error("a buffer of at most {bytes_max} bytes has no space for a cluster of {cluster} bytes")]
    BufferTooSmall {
        /// As in [`BackupBuffer::bytes_max`].
        bytes_max: u64,
        /// The cluster size in bytes.
        cluster: u64,
    },
    /// Not a number of workers.
    #[error("{0} workers are not between 1 and 1024")]
    Workers(usize),
    /// Copies, or buffers, of no bytes.
    #[error("{0} must not be 0")]
    Zero(&'static str),
    /// Not a cluster size.
    #[error("a cluster size of {0} bytes is no power of two from 4 KiB to 2 GiB")]
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

    /// By what way data comes to the target.
    pub(super) fn copy_by(&self, target: &Limits) -> Result<CopyBy, BackupError> {
        match (self.compress, self.offload) {
            (true, true) => Err(BackupError::CompressOffloaded),
            (true, false) if !target.compresses => Err(BackupError::CannotCompress),
            (true, false) => Ok(CopyBy::Compressing),
            (false, true) if target.copies_from_source => Ok(CopyBy::Offloading),
            (false, _) => Ok(CopyBy::Buffer),
        }
    }

    /// The unit in which it saves, for a target with such clusters and devices that transfer in such units.
    /// A copy is never widened past it, or it would bring what a guest has written since.
    pub(super) fn cluster(&self, target: Option<u32>, align: u64) -> Result<u64, BackupError> {
        let wish = self.min_cluster_size;
        let least = match wish {
            0 => CLUSTER_DEFAULT,
            wish => wish,
        };
        if !least.is_power_of_two() || !(CLUSTER_MIN..=CLUSTER_MAX).contains(&least) {
            return Err(BackupError::ClusterSize(wish));
        }
        let cluster = least.max(target.map_or(0, u64::from)).max(align);
        match cluster > CLUSTER_MAX {
            true => Err(BackupError::ClusterSize(cluster)),
            false => Ok(cluster),
        }
    }
}
