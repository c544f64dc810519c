//! Active commit: what the layers above a base hold is brought into the base, while the guest writes to the
//! topmost.
//!
//! ```text
//!  guest ─▶ top     ├──▓──────▓▓──┤ ─┐ source: all layers, read through;
//!           middle  ├────▓▓───────┤ ─┤ "in top" is what one of these holds
//!           base    ├─────────────┤ ◀┘ target
//! ```
//!
//! It is a mirror in all but these: nothing is written where the base shows, so that the guest reads the same all
//! the while; there is one error policy, for both ends are parts of one disk; and writes are copied in the
//! background only.

use std::time::Duration;

use crate::copy::{Limits, Side};
use crate::job::{JobKind, JobOptions, JobOptionsError, Verb};
use crate::mirror::{Mirror, MirrorError, MirrorOptions, MirrorSync, Task};
use crate::node::Node;
use crate::units::Granularity;

/// How an [active commit](Mirror::commit) is made. It is a mirror with less to choose.
///
/// # Examples
///
/// ```
/// use blockjob::{CommitOptions, OnError};
///
/// let mut options = CommitOptions::default();
/// options.job.id = Some("commit-vda".to_owned());
/// // Both or none: the base and what is above it are parts of one disk.
/// options.job.on_source_error = OnError::Stop;
/// options.job.on_target_error = OnError::Stop;
/// assert_eq!(options.workers, 16);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommitOptions {
    /// What every job has. Both error policies must be the same, and stay so.
    pub job: JobOptions,
    /// As [of a mirror](MirrorOptions::granularity).
    pub granularity: Option<Granularity>,
    /// As [of a mirror](MirrorOptions::workers).
    pub workers: usize,
    /// As [of a mirror](MirrorOptions::chunk_max).
    pub chunk_max: u64,
    /// As [of a mirror](MirrorOptions::buf_size).
    pub buf_size: u64,
    /// As [of a mirror](MirrorOptions::downtime_max).
    pub downtime_max: Duration,
    /// As [of a mirror](MirrorOptions::hold_max).
    pub hold_max: Duration,
}

impl Default for CommitOptions {
    fn default() -> Self {
        let MirrorOptions {
            job,
            granularity,
            workers,
            chunk_max,
            buf_size,
            downtime_max,
            hold_max,
            ..
        } = MirrorOptions::default();
        Self {
            job,
            granularity,
            workers,
            chunk_max,
            buf_size,
            downtime_max,
            hold_max,
        }
    }
}

impl From<CommitOptions> for MirrorOptions {
    fn from(options: CommitOptions) -> Self {
        let CommitOptions {
            job,
            granularity,
            workers,
            chunk_max,
            buf_size,
            downtime_max,
            hold_max,
        } = options;
        Self {
            job,
            sync: MirrorSync::Top,
            granularity,
            workers,
            chunk_max,
            buf_size,
            downtime_max,
            hold_max,
            ..Self::default()
        }
    }
}

impl Mirror {
    /// What active commits can do.
    pub(crate) const COMMIT: JobKind = JobKind {
        name: "commit",
        verbs: &Verb::ALL,
        policies: Self::KIND.policies,
        options: &[
            "granularity",
            "workers",
            "chunk_max",
            "buf_size",
            "downtime_max",
            "hold_max",
        ],
        changes: &["on_source_error", "on_target_error"],
    };

    /// An active commit: brings what the layers above `base` hold into it, and switches the guest to it. `source` is
    /// the whole disk as `node`'s guest reads it, all layers together. It does nothing until
    /// [`Job::start`](crate::Job::start).
    ///
    /// It is a mirror to a layer of its own source. The source tells by [`Extent::in_top`](crate::Extent::in_top)
    /// what *any* layer above the base holds, and only that is written, rounded outward to granules with what the
    /// base has. So the guest reads the same all the while, and a commit that fails, or is cancelled by force, has
    /// lost nothing: the layers above hold what they held. When it is ready a soft cancel leaves a base that is the
    /// disk as of that instant, with the guest still on top of it; [`Job::complete`](crate::Job::complete) hands
    /// out the [`Switch`](crate::Switch) by which the base becomes the guest's disk. To have it complete by itself,
    /// ask for that when [`Event::Ready`](crate::Event::Ready) comes.
    ///
    /// # What the caller must see to
    ///
    /// 1. The base is as long as the disk before this is called: if it is shorter it is grown, and what is new reads
    ///    as zeroes, as what lies past its end has before. It is never made shorter. A base that is longer stays so,
    ///    and only as much as the disk has is written; the [node](crate::Node::resize) is for the caller to resize
    ///    once the guest is on it.
    /// 2. The base can be written from before the start until the job is over. When that is without a committed
    ///    switch, whatever the result, or when the machine is dropped, nothing is in flight, but for what
    ///    [was abandoned](crate::JobError::Cancelled): make it read-only again.
    /// 3. The layers between stay as they are until then.
    /// 4. What a layer above the base holds it does not give up for zeroes that the guest writes, so that the
    ///    base shows there. For a discard it may.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new). [`Lengths`](MirrorError::Lengths) if the base is shorter than the disk, or if it
    /// is longer and the disk ends where a request to the base must not: the end is a multiple of all its
    /// alignments, for it is not the base's own. [`JobOptionsError::TwoPolicies`] if the policies differ.
    ///
    /// # Examples
    ///
    /// The top holds one granule of four.
    ///
    /// ```
    /// use std::task::Waker;
    /// use std::time::Duration;
    /// use blockjob::{
    ///     CommitOptions, Content, Extent, Limits, Mirror, Node, OpKind, Outcome, Status, Step,
    /// };
    ///
    /// const G: u64 = 1 << 16;
    /// let (mut base, top) = (vec![1u8; 4 * G as usize], vec![2u8; G as usize]);
    /// let held = G..2 * G; // by the top
    /// let limits = Limits::new(4 * G);
    /// let mut commit = Mirror::commit(&Node::new(4 * G), limits, limits, CommitOptions::default())?;
    /// let job = commit.job().clone();
    /// assert_eq!(job.query().kind, "commit");
    /// job.start()?;
    /// loop {
    ///     match commit.poll(Duration::ZERO, Waker::noop()) {
    ///         Step::Op(op) => {
    ///             let outcome = match op.kind() {
    ///                 OpKind::Status(range) => {
    ///                     let in_top = held.contains(&range.start());
    ///                     let end = [held.start, held.end, range.end()];
    ///                     let end = end.into_iter().find(|&end| end > range.start()).unwrap();
    ///                     Outcome::Status(Extent { len: end - range.start(), content: Content::Data, in_top })
    ///                 }
    ///                 OpKind::Copy(range) => {
    ///                     assert!(range.start() == held.start && range.end() == held.end, "nothing else");
    ///                     base[G as usize..2 * G as usize].copy_from_slice(&top);
    ///                     Outcome::Done
    ///                 }
    ///                 OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
    ///                 kind => unreachable!("{kind:?}"),
    ///             };
    ///             commit.op_done(Duration::ZERO, op, outcome);
    ///         }
    ///         Step::Wait { .. } => job.complete()?,
    ///         Step::Switch(switch) => switch.commit(), // the guest is on the base
    ///         Step::SwitchBack(_) => unreachable!("this job is in no group"),
    ///         Step::Done(result) => break result?,
    ///     }
    /// }
    /// assert!(base[..G as usize] == [1; G as usize] && base[G as usize..2 * G as usize] == top);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn commit(
        node: &Node,
        source: Limits,
        base: Limits,
        options: CommitOptions,
    ) -> Result<Self, MirrorError> {
        if options.job.on_source_error != options.job.on_target_error {
            return Err(JobOptionsError::TwoPolicies.into());
        }
        let mut base = base;
        base.check().map_err(|error| MirrorError::Limits {
            side: Side::Target,
            error,
        })?;
        if base.len > node.len() && node.len().is_multiple_of(end_align(&base)) {
            base.len = node.len();
        }
        Self::make(node, source, base, options.into(), Task::Commit)
    }
}

/// What requests to a device must end at, unless that is its own end.
fn end_align(limits: &Limits) -> u64 {
    let ranges = [limits.write_zeroes, limits.discard];
    let aligns = ranges.into_iter().flatten().map(|range| range.align);
    let align = aligns.fold(limits.request_align, u32::max);
    let cluster = limits.cluster.filter(|_| limits.fills_clusters);
    align.max(cluster.unwrap_or(1)).into()
}
