//! How a mirror is made, and what can be wrong with that.

use std::time::Duration;

use crate::copy::{LimitsError, ShapeError, Side, Unmap};
use crate::job::{BitmapMode, JobOptions, JobOptionsError};
use crate::mirror::{Adaptive, Convergence, ResumeError};
use crate::units::Granularity;

/// The finest granularity of a mirror.
pub(super) const GRANULARITY_MIN: u64 = 512;
/// The coarsest granularity of a mirror.
pub(super) const GRANULARITY_MAX: u64 = 64 << 20;

/// What a mirror copies at first.
///
/// # Examples
///
/// A source of three layers that is mirrored above its base: it says of each range which layers hold it.
///
/// ```
/// use blockjob::{ByteRange, Content, Extent};
///
/// /// From the top down, what each layer holds.
/// const LAYERS: [&[(u64, u64)]; 3] = [&[(0, 4096)], &[(4096, 8192)], &[(0, 65536)]];
/// /// How many of them are above the base.
/// const ABOVE: usize = 2;
///
/// fn block_status(range: ByteRange) -> Extent {
///     let holds = |layer: &[(u64, u64)], at| layer.iter().any(|&(start, end)| (start..end).contains(&at));
///     let in_top = |at| LAYERS[..ABOVE].iter().any(|layer| holds(layer, at));
///     let is_so = in_top(range.start());
///     let len = (range.start()..range.end()).take_while(|&at| in_top(at) == is_so).count() as u64;
///     Extent { len, content: Content::Data, in_top: is_so }
/// }
///
/// // Sync top copies what the two upper ones hold, in one step; the target lies on the base.
/// let extent = block_status((0..65536).into());
/// assert!(extent.in_top && extent.len == 8192);
/// assert!(!block_status((8192..65536).into()).in_top);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MirrorSync {
    /// The whole disk, through all its layers. What the target held before does not matter.
    #[default]
    Full,
    /// What the topmost layer holds. The target shows the layers below by itself.
    ///
    /// Which layers that are is for the source to say, by [`Extent::in_top`](crate::Extent::in_top): one that answers
    /// it with "held by any layer above the base" has the chain above the base copied in one step, onto a target
    /// that lies on the base. Reads give all layers together in either case.
    Top,
    /// Nothing: only what is written from now on.
    None,
}

/// How what the guest writes while a mirror runs comes to the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CopyMode {
    /// The job copies it later. The guest waits for nothing.
    #[default]
    Background,
    /// Its own write goes on to the target before the guest is told: so what is left to copy only gets less, however
    /// much the guest writes. It costs the guest the time of the target's write, and where the job is
    /// copying just now the time of that. It takes whoever issues the writes:
    /// [`Ticket::source_written`](crate::node::Ticket::source_written), or a
    /// [`GuestDisk`](crate::io::GuestDisk) that [knows the target](crate::io::GuestDisk::copy_to). Else what is written is
    /// copied later.
    ///
    /// What the guest flushes is flushed on the source. The target is flushed before the job is ready and at its end.
    ///
    /// Of what was discarded on the source and is written in part since, the target has that part only: what
    /// surrounds it is undefined on both.
    WriteBlocking,
    /// The first, and the second for as long as the guest writes more than can be copied. With that an
    /// [event](crate::Event::Outpaced) tells that it does, for those who can slow the guest down.
    Adaptive(Adaptive),
}

/// What a job says of itself that is a mirror.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MirrorInfo {
    /// How what the guest writes comes to the target.
    pub copy_mode: CopyMode,
    /// Whether the writes that begin now go to the target at once.
    pub is_write_blocking: bool,
    /// Whether the target had all that the guest was told to be written, when the job was driven last:
    /// [`Mirror::is_actively_synced`](crate::Mirror::is_actively_synced).
    pub is_actively_synced: bool,
    /// Whether it gains on the guest, by what was seen in the last window: a second, or what an
    /// [adaptive](CopyMode::Adaptive) mirror was told. `None` until the first is over.
    pub convergence: Option<Convergence>,
}

/// What the target holds before a mirror starts.
///
/// # Examples
///
/// A target that was made just now, and reads as zeroes. Of a source that holds 64 KiB of data, only these are
/// written.
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Content, Extent, Limits, Mirror, MirrorOptions, Node, OpKind, Outcome, Step, TargetHolds};
///
/// let mut options = MirrorOptions::default();
/// options.target_holds = TargetHolds::Zeroes;
/// let limits = Limits::new(1 << 30); // neither can write zeroes but as data
/// let mut mirror = Mirror::new(&Node::new(1 << 30), limits, limits, options)?;
/// mirror.job().start()?;
///
/// let mut copied = 0;
/// while let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
///     let outcome = match op.kind() {
///         OpKind::Status(range) => {
///             let is_data = range.start() < 65536;
///             let len = if is_data { 65536 } else { range.len() };
///             let content = if is_data { Content::Data } else { Content::Zero };
///             Outcome::Status(Extent { len, content, in_top: true })
///         }
///         OpKind::Copy(range) => {
///             copied += range.len(); // the bytes are imagined: a real copy comes first
///             Outcome::Done
///         }
///         OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
///         kind => unreachable!("{kind:?}"),
///     };
///     mirror.op_done(Duration::ZERO, op, outcome);
/// }
/// assert_eq!(copied, 65536);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TargetHolds {
    /// Anything: where it is to read as zeroes, it is written to.
    #[default]
    Anything,
    /// Zeroes, all over. Where the source reads as zeroes nothing is written, and no storage made. If that is not
    /// true, the target is not a copy at the end, and nobody is told.
    Zeroes,
    /// An older copy of the disk, and nobody knows what has changed since. All of it is compared, by what
    /// [`Limits::compare`](crate::Limits::compare) of the target says, and only what differs is copied, or cannot be
    /// read there. The job is ready when all was compared and copied. What differs is told as by a
    /// [verification](crate::Job::verify).
    OlderCopy,
}

/// How a mirror is made.
///
/// # Examples
///
/// ```
/// use blockjob::{Granularity, MirrorOptions, MirrorSync};
///
/// let mut options = MirrorOptions::default();
/// options.sync = MirrorSync::Top;
/// options.granularity = Granularity::from_bytes(4096);
/// options.job.speed = 50 << 20;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MirrorOptions {
    /// What every job has.
    pub job: JobOptions,
    /// What is copied at first.
    pub sync: MirrorSync,
    /// The named bitmap of the node that it goes by: with sync full, what is dirty in it is copied at first, for
    /// the target holds the rest already; with sync top, what the topmost layer holds of that. All that is
    /// written while the job runs is copied as well. It must exist when the job is made; its bits are taken
    /// when recording starts, with the guest held. It knows only what was written while it
    /// [recorded](crate::BitmapInfo::is_recording): by one that was disabled since the target was a copy too
    /// little is copied, and nobody is told. Default none.
    pub bitmap: Option<String>,
    /// What becomes of the bitmap; must be told with one. When the job succeeds, it has what was written since
    /// the instant of its end, but with [`BitmapMode::Never`]: then it keeps what was dirty, and has
    /// all that was written while the job ran. So it does when the job does not succeed, but with
    /// [`BitmapMode::Always`]: then it has what the target may lack, and what was written since. A machine
    /// that is dropped before its end does not succeed. A bitmap that does not record keeps to that, and has
    /// nothing of what was written. A job that ends before recording has started leaves the bitmap as it is.
    ///
    /// With a target that has its clusters [filled](crate::Limits::fills_clusters), what lies in one cluster with
    /// what is dirty may be damaged there when the job fails. Only [`BitmapMode::Always`] says so; another mirror
    /// by the same bitmap writes it again in any case.
    pub bitmap_mode: Option<BitmapMode>,
    /// How what the guest writes meanwhile comes to the target. It may be [changed](crate::Job::change) while the job
    /// runs.
    pub copy_mode: CopyMode,
    /// In what units dirty data is tracked: 512 bytes to 64 MiB. Default: the target's cluster size, but
    /// at least 4 KiB and at most 64 KiB; 64 KiB if it has none. With a bitmap its granularity counts, and with a
    /// checkpoint the finer of both; an [event](crate::Event::Warning) tells if another was asked for.
    pub granularity: Option<Granularity>,
    /// Operations in flight at the same time, 1 to 1024. Default 16.
    pub workers: usize,
    /// The longest copy in bytes; rounded down to what both devices take, but at least 512. Default
    /// 1 MiB.
    pub chunk_max: u64,
    /// Bytes held in buffers at the same time; at least one granule, and one chunk. Default 16 MiB.
    pub buf_size: u64,
    /// Whether areas that read as zeroes may lose their storage on the target. Default yes.
    pub unmap: Unmap,
    /// What the target holds before. Other than [`TargetHolds::Anything`] only with sync full, without a bitmap,
    /// and not when it goes on from a checkpoint. Default that.
    pub target_holds: TargetHolds,
    /// Whether data that was read is looked at, and written as zeroes where it is nothing else. That is
    /// [`OpKind::CopyDetecting`](crate::OpKind::CopyDetecting), for copies that lie and are cut as the target
    /// wants its [zero writes](crate::Limits::write_zeroes); others are copied unlooked at. Counts as copied data
    /// against the speed limit. Default no.
    pub detect_zeroes: bool,
    /// How long the guest may be held while the last dirty data is copied, by the rate seen of late. The
    /// end of the job waits until it takes no longer. Default 50 ms.
    pub downtime_max: Duration,
    /// How long the guest is held at the most, whatever hangs: one of its own writes when the job starts, a
    /// device, the last flush or another job of its group when it ends. Then the guest goes on, which
    /// [`Event::HeldInVain`](crate::Event::HeldInVain) tells, and it is
    /// tried again after as long a time. Who has the switch is not hurried. Only a machine that is driven looks at the
    /// time: while nobody polls it, or a device does its work inside of a poll, the guest is held for longer. At
    /// least 1 ms; `Duration::MAX` for no bound. Default 5 s.
    pub hold_max: Duration,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self {
            job: JobOptions::default(),
            sync: MirrorSync::default(),
            bitmap: None,
            bitmap_mode: None,
            copy_mode: CopyMode::default(),
            granularity: None,
            workers: 16,
            chunk_max: 1 << 20,
            buf_size: 16 << 20,
            unmap: Unmap::Allowed,
            target_holds: TargetHolds::Anything,
            detect_zeroes: false,
            downtime_max: Duration::from_millis(50),
            hold_max: Duration::from_secs(5),
        }
    }
}

/// Why a mirror could not be made. Nothing has changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MirrorError {
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
    /// A bitmap was named, and not what is to become of it.
    #[error("a bitmap needs a bitmap mode")]
    ModeNeeded,
    /// A bitmap mode without a bitmap.
    #[error("a bitmap mode needs a bitmap")]
    ModeWithoutBitmap,
    /// Sync none copies all that is written, and nothing else that a bitmap could tell.
    #[error("sync none goes by no bitmap")]
    NoneWithBitmap,
    /// Of a target that is copied to by a bitmap, or from a checkpoint on, or for which only a part is copied at
    /// first, it cannot be said what all of it holds.
    #[error("what the target holds can be told only of a full mirror that starts anew")]
    TargetHolds,
    /// What an older copy lacks cannot be found out.
    #[error("the target cannot be compared with the source")]
    CannotCompare,
    /// The bitmap does not exist.
    #[error(transparent)]
    Named(#[from] crate::node::BitmapError),
    /// The checkpoint is not one to go on from.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// Not a granularity for a mirror.
    #[error("granularity {0} is not between 512 B and 64 MiB")]
    Granularity(Granularity),
    /// Not a number of workers.
    #[error("{0} workers are not between 1 and 1024")]
    Workers(usize),
    /// Copies of no bytes.
    #[error("{0} must not be 0")]
    Zero(&'static str),
    /// The devices cannot work together.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The disk is too large for the granularity.
    #[error(transparent)]
    Bitmap(#[from] crate::bitmap::CreateError),
    /// Another job works on the node.
    #[error("another job works on the disk")]
    NodeBusy,
}

/// The cluster size of the target, within reason.
pub(super) fn default_granularity(cluster: Option<u32>) -> Granularity {
    let Some(cluster) = cluster else {
        return Granularity::DEFAULT;
    };
    let bytes = u64::from(cluster).clamp(4 << 10, 64 << 10);
    Granularity::from_bytes(bytes).expect("clusters are powers of two, and so are the bounds")
}
