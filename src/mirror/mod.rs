//! Copies a disk while the guest writes to it, until both are equal, and switches at that instant.
//!
//! ```text
//! Created ─▶ Attaching ─▶ Scanning ─▶ Copying ─▶ InSync ───────────────────────────────┐
//!            guest held   what is     until      guest writes keep being copied        │
//!            until its    there?      nothing                                          ▼
//!            writes in                is left,   ┌─ Open ─▶ Flushing ─▶ Closing ─▶ Quiet ─▶ Switching
//!            flight have              flushed    │  ▲                   guest held,  rest      the caller
//!            settled: from                       │  └── an error ───────until all────copied────switches
//!            here on all                         │      or a pause       has settled  flushed      │
//!            is recorded                         └── dropped by the caller ◀───────────────────────┤
//!                                                                                                  ▼
//! from everywhere: an error or a cancel ─▶ Ending ─────────────────────────────────────────▶ Concluded
//! ```
//!
//! Invariants, beside those of [the copy machinery](crate::copy):
//!
//! 1. Recording starts before anything is asked of the source, with no guest write in flight. So each
//!    write is either on the source before the first look at it, or recorded. The machine sees to that, or the
//!    transaction that starts the job, which undoes it if another of its acts fails.
//! 2. Ranges are zeroed for the scan only where nothing else is in flight, and copying starts when that
//!    is over: a guest write after the look is recorded, and copied after the zeroes.
//! 3. Ready is told once, at a moment when nothing was dirty and nothing in flight, after a flush of
//!    what was written until then.
//! 4. The switch is handed out only while the guest is held, nothing is dirty, no claim is left, and
//!    the target was flushed after its last write. The guest is held until the switch is gone.
//! 5. While the switch is out, nothing is copied. If it was used, nothing is copied ever after: the guest
//!    writes to the target now.
//! 6. The source is never written.
//! 7. The bits of the named bitmap that the job goes by are claimed at the moment that recording starts. What
//!    was written up to the moment of the switch belongs to them, and is told apart while the guest is held;
//!    what is written later does not. When the job fails, they get what the target may lack in the same step
//!    in which recording stops.
//! 8. A checkpoint has what is dirty, claimed, and not scanned yet. It is gone on from only with the disks and
//!    the generation that it was taken of.
//! 9. Writes are [active](crate::node) ones from the end of the scan on: what is between its question and its
//!    zeroes would be lost. What they have under way counts as left when the job ends, and what they have written
//!    as not flushed.
//! 10. The target is told to be actively synced only when nothing is dirty or claimed and no write is under way
//!     that is not active.
//! 11. A [commit](Mirror::commit) writes to the base only where a layer above it holds something: what the guest
//!     reads never changes by it.
//! 12. Ready is told only when nothing of the target is doubtful that may be missing there. A verification that is
//!     not over when the end is asked for is cut short, and what it has found is copied.
//!
//! # One target per pass
//!
//! A mirror has one target, and a node one job at a time. Several targets from one pass over the source would save
//! reads of the source, and nothing else: each target needs its own map of what is dirty, its own claims, for a
//! write to one may be in flight while that to another has failed, its own flushes, errors, policy, and moment at
//! which it is ready. That is a mirror of its own per target, all but the buffer; and a buffer that several writes
//! share goes back when the slowest has ended, so that all copy at its speed. What a caller can do: run one mirror
//! after the other, the second by a [named bitmap](MirrorOptions::bitmap) or from the first target; or give the
//! mirror a target device that writes to several, and fails when one does.

mod active;
mod adaptive;
mod checkpoint;
mod commit;
mod copying;
mod end;
mod instant;
mod left;
mod options;
mod pace;
mod progress;
mod start;
mod switch;
mod verify;

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use crate::bitmap::HBitmap;
use crate::copy::{Done, Ends, Engine, Limits, Op, OpId, OpKind, Outcome, Shape, Side, Zeroes};
use crate::job::{
    AtStart, Backoff, Cancel, ErrorAction, Job, JobKind, OnError, Progress, RateLimit, Stage,
    Start, Status, Verb, Warning,
};
use crate::machine::sealed::Sealed;
use crate::machine::{Machine, Step};
use crate::node::{JobBitmap, JobBitmapGuard, JobClaim, Node, Quiesce};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

use active::Active;
pub use adaptive::{Adaptive, Convergence};

pub use checkpoint::{
    ChangedSince, Checkpoint, CheckpointError, CheckpointId, CheckpointPhase, Resume, ResumeError,
};
pub use commit::CommitOptions;
use end::End;
use instant::{Idle, Instant};
use left::{ByBitmap, Left};
pub use options::{CopyMode, MirrorError, MirrorInfo, MirrorOptions, MirrorSync, TargetHolds};
use options::{GRANULARITY_MAX, GRANULARITY_MIN, default_granularity};
use pace::Pace;
pub use switch::{Switch, SwitchBack};
use verify::Verify;

/// The shortest that the guest may be held: with none at all the end would be tried for ever.
const HOLD_MIN: Duration = Duration::from_millis(1);

/// The machine of one mirror job: says what to do, is told what came of it, and does nothing itself.
///
/// # Examples
///
/// The whole loop, by hand. The [driver](crate::driver) and the [queue](crate::queue) do this for you.
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Content, Extent, Limits, Mirror, MirrorOptions, Node, OpKind, Outcome, Status, Step};
///
/// let mut source = vec![7u8; 1 << 20];
/// let mut target = vec![0u8; 1 << 20];
/// let node = Node::new(1 << 20);
/// let limits = Limits::new(1 << 20);
/// let mut mirror = Mirror::new(&node, limits, limits, MirrorOptions::default())?;
/// let job = mirror.job().clone();
/// job.start()?;
///
/// let now = Duration::ZERO; // from the caller's clock
/// loop {
///     match mirror.poll(now, Waker::noop()) {
///         Step::Op(op) => {
///             let outcome = match op.kind() {
///                 OpKind::Copy(range) => {
///                     let bytes = range.start() as usize..range.end() as usize;
///                     target[bytes.clone()].copy_from_slice(&source[bytes]);
///                     Outcome::Done
///                 }
///                 OpKind::Status(range) => Outcome::Status(Extent {
///                     len: range.len(),
///                     content: Content::Data,
///                     in_top: true,
///                 }),
///                 OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
///                 kind => unreachable!("{kind:?}"),
///             };
///             mirror.op_done(now, op, outcome);
///         }
///         // Nothing is left to copy: the job is ready.
///         Step::Wait { .. } => job.complete()?,
///         Step::Switch(switch) => {
///             source = target.clone(); // the guest's disk is the target from here on
///             switch.commit();
///         }
///         Step::SwitchBack(_) => unreachable!("this job is in no group"),
///         Step::Done(result) => break result?,
///     }
/// }
/// assert!(source == target && job.query().status == Status::Null);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Mirror {
    job: Job,
    node: Node,
    sync: MirrorSync,
    target_holds: TargetHolds,
    downtime_max: Duration,
    hold_max: Duration,
    engine: Engine,
    rate: RateLimit,
    backoff: Backoff,
    phase: Phase,
    /// What happens at the instant of the start.
    start: Arc<Start<Instant>>,
    /// For a job that goes on from a checkpoint: where the scan does.
    resumed: Option<u64>,
    /// The named bitmap that it goes by.
    by: Option<ByBitmap>,
    /// Present from the moment that writes are recorded until the job is over.
    bitmap: Option<JobBitmap>,
    /// Given back when the job is over.
    claim: Option<JobClaim>,
    /// Bytes brought to the target, without the zeroes of the scan.
    done_bytes: u64,
    pace: Pace,
    /// When a guest write that comes while nothing is to do may wake the job again.
    batch_until: Duration,
    /// Whether the guest was held in vain the last time.
    was_held_in_vain: bool,
    /// Before then no flush, and no question of the scan, is tried again after a failure.
    retry_at: Duration,
    /// What the target may have lacked when the job ended, if it did not succeed.
    at_end: Option<Left>,
    active: Active,
    verify: Verify,
    /// When the time of grace ends for operations in flight.
    grace_until: Option<Duration>,
}

#[derive(Debug)]
enum Phase {
    /// Not started, or not begun with.
    Created,
    /// The guest's writes in flight are to settle, so that recording starts at a sharp moment.
    Attaching { quiesce: Quiesce, since: Duration },
    /// Asking what the source holds, from `next` on. `asked` is out.
    Scanning { next: u64, asked: Option<OpId> },
    /// Copying until nothing is left. `flush` is out.
    Copying { flush: Option<OpId> },
    /// The target was in step once.
    InSync(End),
    /// It will not succeed. What is in flight is waited for.
    Ending {
        /// Whether the target was asked to give up what it cannot finish.
        has_cancelled: bool,
        /// From where on it is not known what the target lacks, if there is such a place.
        unscanned: Option<u64>,
    },
    /// Over.
    Concluded,
}

/// What a machine is made for.
enum Task {
    /// A mirror, that goes on from a checkpoint if there is one.
    Mirror(Option<Checkpoint>),
    /// An active commit.
    Commit,
}

/// What one turn of the machine came to.
enum Turn {
    /// Something has changed: look again.
    Again,
    Step(Step),
}

impl Mirror {
    /// What mirrors can do.
    pub(crate) const KIND: JobKind = JobKind {
        name: "mirror",
        verbs: &Verb::ALL,
        policies: &[
            OnError::Report,
            OnError::Ignore,
            OnError::Enospc,
            OnError::Auto,
            OnError::Stop,
        ],
        options: &[
            "sync",
            "bitmap",
            "bitmap_mode",
            "copy_mode",
            "granularity",
            "workers",
            "chunk_max",
            "buf_size",
            "unmap",
            "target_holds",
            "detect_zeroes",
            "downtime_max",
            "hold_max",
        ],
        changes: &["on_source_error", "on_target_error", "copy_mode"],
    };

    /// A mirror of `node` from the device that holds it now to another, as told by their limits. It
    /// does nothing until [`Job::start`].
    ///
    /// # Errors
    ///
    /// If the three are not equally long, an option is out of range, the devices cannot work together,
    /// the bitmap does not exist, or another job works on the node.
    ///
    /// # Examples
    ///
    /// The target is an older copy of the disk, and a bitmap says what has changed since. Only that is copied.
    ///
    /// ```
    /// use blockjob::{BitmapMode, BitmapOptions, Limits, Mirror, MirrorOptions, Node};
    ///
    /// let node = Node::new(1 << 20);
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// node.bitmaps().add(&guard, "since the copy", BitmapOptions::default())?;
    /// drop(guard);
    ///
    /// let mut options = MirrorOptions::default();
    /// options.bitmap = Some("since the copy".to_owned());
    /// options.bitmap_mode = Some(BitmapMode::Always); // if it fails, another can go on
    /// let limits = Limits::new(1 << 20);
    /// let mirror = Mirror::new(&node, limits, limits, options)?;
    /// assert_eq!(mirror.granularity().bytes(), 65536, "that of the bitmap");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        node: &Node,
        source: Limits,
        target: Limits,
        options: MirrorOptions,
    ) -> Result<Self, MirrorError> {
        if options.bitmap.is_some() && options.sync == MirrorSync::None {
            return Err(MirrorError::NoneWithBitmap);
        }
        Self::make(node, source, target, options, Task::Mirror(None))
    }

    /// A mirror that goes on where another has stopped, with the same target, in another process as a rule.
    /// It copies what was left, and what is dirty in [the bitmap](MirrorOptions::bitmap), which is to have all
    /// that was written since. What the bitmap has of what was confirmed before is copied again.
    ///
    /// Nothing that was requested for the target before may be able to change it any more.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), but for sync none, which may have a bitmap here; and
    /// [`Resume`](MirrorError::Resume) if the checkpoint is not of these disks, this generation, or this sync
    /// mode.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::task::Waker;
    /// use std::time::Duration;
    /// use blockjob::{
    ///     ChangedSince, Checkpoint, CheckpointId, Content, Extent, Limits, Mirror, MirrorOptions, Node, OpKind,
    ///     Outcome, Resume, Step,
    /// };
    ///
    /// /// Copies up to so many times, and says what it has copied.
    /// fn copy(mirror: &mut Mirror, most: usize) -> Vec<u64> {
    ///     let mut copied = Vec::new();
    ///     while copied.len() < most {
    ///         let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) else { break };
    ///         let outcome = match op.kind() {
    ///             OpKind::Status(range) => Outcome::Status(Extent {
    ///                 len: range.len(),
    ///                 content: Content::Data,
    ///                 in_top: true,
    ///             }),
    ///             OpKind::Copy(range) => {
    ///                 copied.push(range.start()); // the bytes are imagined: a real copy comes first
    ///                 Outcome::Done
    ///             }
    ///             OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
    ///             kind => unreachable!("{kind:?}"),
    ///         };
    ///         mirror.op_done(Duration::ZERO, op, outcome);
    ///     }
    ///     copied
    /// }
    ///
    /// let limits = Limits::new(1 << 20);
    /// let mut options = MirrorOptions::default();
    /// options.chunk_max = 256 << 10;
    /// let id = CheckpointId { source: [1; 16], target: [2; 16], generation: 7 };
    ///
    /// let node = Node::new(1 << 20);
    /// let mut mirror = Mirror::new(&node, limits, limits, options.clone())?;
    /// mirror.job().start()?;
    /// assert_eq!(copy(&mut mirror, 3), [0, 256 << 10, 512 << 10]);
    /// let bytes = mirror.checkpoint(id).expect("it has begun");
    /// drop((mirror, node)); // the process ends; nobody has written to the disk since
    ///
    /// let node = Node::new(1 << 20);
    /// let resume = Resume {
    ///     checkpoint: Checkpoint::decode(&bytes, 1 << 20)?,
    ///     id,
    ///     changed: ChangedSince::Nothing,
    /// };
    /// let mut mirror = Mirror::resume(&node, limits, limits, options, resume)?;
    /// mirror.job().start()?;
    /// assert_eq!(copy(&mut mirror, 9), [768 << 10], "nothing is copied twice");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resume(
        node: &Node,
        source: Limits,
        target: Limits,
        options: MirrorOptions,
        resume: Resume,
    ) -> Result<Self, MirrorError> {
        resume.check(node.len(), options.sync)?;
        if resume.changed == ChangedSince::InBitmap && options.bitmap.is_none() {
            return Err(ResumeError::BitmapNeeded.into());
        }
        let task = Task::Mirror(Some(resume.checkpoint));
        Self::make(node, source, target, options, task)
    }

    fn make(
        node: &Node,
        source: Limits,
        target: Limits,
        options: MirrorOptions,
        task: Task,
    ) -> Result<Self, MirrorError> {
        let (kind, checkpoint, copy_mode) = match task {
            Task::Mirror(checkpoint) => (Self::KIND, checkpoint, Some(options.copy_mode)),
            Task::Commit => (Self::COMMIT, None, None),
        };
        let ends = Ends::check(source, target)
            .map_err(|(side, error)| MirrorError::Limits { side, error })?;
        if source.len != node.len() || target.len != node.len() {
            return Err(MirrorError::Lengths {
                node: node.len(),
                source_len: source.len,
                target: target.len,
            });
        }
        if source.identity.is_some() && source.identity == target.identity {
            return Err(MirrorError::SameStorage);
        }
        let by = match (options.bitmap, options.bitmap_mode) {
            (None, None) => None,
            (None, Some(_)) => return Err(MirrorError::ModeWithoutBitmap),
            (Some(_), None) => return Err(MirrorError::ModeNeeded),
            (Some(name), Some(mode)) => Some(ByBitmap {
                name,
                mode,
                claim: None,
                wanted: None,
            }),
        };
        let starts_anew = by.is_none() && checkpoint.is_none() && options.sync == MirrorSync::Full;
        if options.target_holds != TargetHolds::Anything && !starts_anew {
            return Err(MirrorError::TargetHolds);
        }
        if options.target_holds == TargetHolds::OlderCopy && target.compare.is_none() {
            return Err(MirrorError::CannotCompare);
        }
        let of_bitmap = match &by {
            Some(by) => Some(node.bitmaps().query(&by.name)?.granularity),
            None => None,
        };
        // The finer of both: with the other a granule that is dirty in part would be copied whole.
        let of_checkpoint = checkpoint.as_ref().map(Checkpoint::granularity);
        let prescribed = of_bitmap.into_iter().chain(of_checkpoint).min();
        let granularity = prescribed
            .or(options.granularity)
            .unwrap_or_else(|| default_granularity(target.cluster));
        if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity.bytes()) {
            return Err(MirrorError::Granularity(granularity));
        }
        if !(1..=1024).contains(&options.workers) {
            return Err(MirrorError::Workers(options.workers));
        }
        if options.chunk_max == 0 {
            return Err(MirrorError::Zero("chunk_max"));
        }
        if options.buf_size == 0 {
            return Err(MirrorError::Zero("buf_size"));
        }
        let mut shape = Shape::new(
            &ends,
            granularity,
            options.chunk_max,
            options.buf_size,
            options.workers,
            options.unmap,
        )?;
        // Where the base shows there is nothing to commit.
        shape.only_top = copy_mode.is_none() && !is_broken(Sabotage::CommitBelow);
        let mut empty = HBitmap::new(node.len(), granularity)?;
        empty.reserve()?;
        let (resumed, left) = checkpoint
            .map(|checkpoint| (checkpoint.scanned, checkpoint.left))
            .unzip();
        let instant = Instant {
            node: node.clone(),
            bitmap: by.as_ref().map(|by| (by.name.clone(), by.mode)),
            is_scanned: options.sync == MirrorSync::Top && resumed.is_none(),
            shape: shape.clone(),
        };
        let is_zero = options.target_holds == TargetHolds::Zeroes;
        let can_learn = shape.can_zero() && !shape.cheap_zeroes;
        let zeroes = (is_zero || can_learn)
            .then(|| Zeroes::new(node.len(), granularity, is_zero))
            .transpose()?;
        let engine = Engine::new(shape, options.workers, options.buf_size)?
            .with_zeroes(zeroes)?
            .with_doubts(target.compare)?
            .detecting_zeroes(options.detect_zeroes);
        let speed = options.job.speed;
        let claim = node.claim_for_job().ok_or(MirrorError::NodeBusy)?;
        let start = Arc::new(Start::new(instant, Idle { empty, left }));
        let at_start: Arc<dyn AtStart> = Arc::clone(&start) as _;
        // The last step that can fail: there is no trace of a job that could not be made.
        let job = Job::new(kind.name, options.job, Some(at_start))?;
        job.be_mirror(copy_mode);
        job.set_can_verify(target.compare.is_some());
        if let Some(asked) = options.granularity.filter(|&asked| asked != granularity) {
            let used = granularity;
            job.warn(Warning::Granularity { asked, used });
        }
        Ok(Self {
            job,
            node: node.clone(),
            sync: options.sync,
            target_holds: options.target_holds,
            downtime_max: options.downtime_max,
            hold_max: options.hold_max.max(HOLD_MIN),
            engine,
            rate: RateLimit::new(speed),
            backoff: Backoff::new(),
            phase: Phase::Created,
            start,
            resumed,
            by,
            bitmap: None,
            claim: Some(claim),
            done_bytes: 0,
            pace: Pace::default(),
            batch_until: Duration::ZERO,
            was_held_in_vain: false,
            retry_at: Duration::ZERO,
            at_end: None,
            active: Active::default(),
            verify: Verify::default(),
            grace_until: None,
        })
    }

    /// The handle for those who control the job and watch it.
    #[must_use]
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// What dirty data is tracked in.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.engine.shape().granularity
    }

    /// What to do next. `now` is the time since any fixed moment and never falls. `waker` is called when
    /// it is worth asking again after [`Step::Wait`].
    pub fn poll(&mut self, now: Duration, waker: &Waker) -> Step {
        loop {
            let Turn::Step(step) = self.turn(now, waker) else {
                continue;
            };
            let step = self.give_way(now, self.job.copy_mode(), step);
            self.wake_guests();
            if !matches!(step, Step::Op(_)) {
                self.publish();
            }
            return step;
        }
    }

    /// Takes back an operation that was done, or was tried. [`Outcome::Done`] says that all it asks for is done,
    /// so each [`OpKind`] must have been acted on. One that was given up before is ignored.
    pub fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome) {
        let (id, kind) = (op.id(), op.kind());
        let is_data = matches!(outcome, Outcome::Done) && kind.buffered_bytes() > 0;
        let mut dirty = self.bitmap.as_ref().map(JobBitmap::lock);
        let map = dirty.as_mut().map(JobBitmapGuard::bitmap_mut);
        let done = self.engine.done(op, outcome, map);
        let dirty_bytes = dirty.map_or(0, |dirty| dirty.dirty_bytes_in_len());
        match done {
            None | Some(Done::Nothing | Done::Saved(_)) => {}
            // It was dirty, and the target holds it already.
            Some(Done::Skipped(range)) => {
                self.done_bytes = self.done_bytes.saturating_add(range.len());
            }
            Some(Done::Compared(range)) => self.compared(range.len()),
            Some(Done::Range(range)) => {
                self.range_done(range);
                // Zeroes go much faster, and say nothing of how long data takes.
                if is_data && !matches!(self.phase, Phase::Scanning { .. }) {
                    self.pace.add(now, range.len());
                }
            }
            Some(Done::Flushed) => self.flushed(id),
            Some(Done::Status(range, extent)) => self.scanned(range, extent),
            Some(Done::Failed {
                side, kind, error, ..
            }) => {
                let claimed = self.engine.claimed_range(kind, id);
                self.failed(now, (side, kind, error), claimed);
            }
        }
        self.publish_with(dirty_bytes);
        self.wake_guests();
    }

    /// Says that this operation is lost, because what worked on it was dropped, while others work on. What the
    /// target may still be doing is waited for before the same range is written again.
    pub fn op_lost(&mut self, op: Op) {
        if let Some(kind) = self.engine.lose_one(&op) {
            self.forget_question(kind);
        }
        // The guest does not wait for what must be done once more.
        self.let_guest_go();
        self.publish();
        self.wake_guests();
    }

    /// Says that every operation handed out and not reported is lost, because what worked on them was
    /// dropped. What the target may still be doing is waited for before the same range is written again.
    ///
    /// A guest that is held for the end of the job goes on, until the job is driven again; so do writes that wait for
    /// something to be copied.
    pub fn ops_lost(&mut self) {
        for kind in self.engine.lose_running() {
            self.forget_question(kind);
        }
        self.let_go();
    }

    /// Says that nobody drives the job any more, but what was handed out goes on. Guests go on, too, as with
    /// [`ops_lost`](Self::ops_lost).
    pub fn let_go(&mut self) {
        self.let_guest_go();
        if !is_broken(Sabotage::WaitForNobody) {
            self.stop_active_writes();
        }
        self.publish();
        self.wake_guests();
    }

    /// No answer will come to that: it is asked once more.
    fn forget_question(&mut self, kind: OpKind) {
        match &mut self.phase {
            Phase::Scanning { asked, .. } if kind != OpKind::Flush => *asked = None,
            Phase::Copying { flush } if kind == OpKind::Flush => *flush = None,
            Phase::Ending { has_cancelled, .. } if kind == OpKind::CancelInFlight => {
                *has_cancelled = false;
            }
            _ => {}
        }
    }

    fn turn(&mut self, now: Duration, waker: &Waker) -> Turn {
        if matches!(self.phase, Phase::Concluded) {
            let result = self.job.result().expect("it is over");
            return Turn::Step(Step::Done(result));
        }
        let asked = self.job.asked(waker);
        if matches!(asked.status, Status::Concluded | Status::Null) {
            // Cancelled before it was started.
            self.release(false);
            return Turn::Again;
        }
        self.steer_active_writes(now, asked.copy_mode, waker);
        // A lost range may still change: nothing goes on before that is cleared up, except around it.
        if let Some(op) = self.settle(now) {
            return Turn::Step(Step::Op(op));
        }
        match asked.stage {
            // Others decide, and nothing is copied meanwhile.
            Stage::Held | Stage::Stale => return Turn::Step(Step::Wait { until: None }),
            Stage::Voted => return self.wait_for_votes(now),
            Stage::Granted => return self.hand_out_switch(),
            Stage::Back => return self.hand_out_switch_back(),
            Stage::Committed if self.gave_switch() && is_broken(Sabotage::CopyAfterSwitch) => {
                self.job.forget_commit();
                self.phase = Phase::InSync(End::Open);
                return Turn::Again;
            }
            Stage::Committed => return self.conclude(None, true),
            Stage::None | Stage::Near | Stage::Closing | Stage::Prepared(_) => {}
        }
        if self.gave_switch() {
            // It was dropped.
            self.phase = Phase::InSync(End::Open);
        }
        if asked.status != Status::Created {
            self.take_begun();
        }
        let must_end = asked.cancel == Some(Cancel::Force) || asked.has_failed;
        if must_end && !matches!(self.phase, Phase::Ending { .. }) {
            self.begin_ending(now, asked.cancel);
        }
        if matches!(self.phase, Phase::Ending { .. }) {
            return self.end(now, asked.cancel);
        }
        if asked.status == Status::Created {
            return Turn::Step(Step::Wait { until: None });
        }
        if self.bitmap.is_none() && self.start.is_open() {
            // It is started by a transaction, and by somebody else before that is decided.
            return Turn::Step(Step::Wait { until: None });
        }
        if asked.is_paused {
            return self.pause(asked.status);
        }
        match asked.status {
            Status::Paused => self.job.go_to(Status::Running),
            Status::Standby => self.job.go_to(Status::Ready),
            _ => {}
        }
        if asked.speed != self.rate.speed() {
            self.rate.set_speed(now, asked.speed);
        }
        if asked.retry_now {
            self.job.retries_made();
            self.engine.unpark(Duration::MAX);
            self.backoff.reset();
            self.retry_at = now;
        }
        self.engine.unpark(now);
        match self.phase {
            Phase::Created => {
                if now < self.retry_at {
                    return Turn::Step(Step::Wait {
                        until: Some(self.retry_at),
                    });
                }
                self.phase = Phase::Attaching {
                    quiesce: self.node.quiesce(),
                    since: now,
                };
                Turn::Again
            }
            Phase::Attaching { .. } => self.attach(now, waker),
            Phase::Scanning { .. } => self.scan(now),
            Phase::Copying { .. } => self.copy(now, waker),
            Phase::InSync(_) => self.keep_in_sync(now, waker, asked),
            Phase::Ending { .. } | Phase::Concluded => unreachable!("handled above"),
        }
    }

    fn settle(&mut self, now: Duration) -> Option<Op> {
        if !self.engine.wants_settle() || now < self.retry_at {
            return None;
        }
        let mut dirty = self.bitmap.as_ref().map(JobBitmap::lock);
        self.engine
            .settle(dirty.as_mut().map(JobBitmapGuard::bitmap_mut))
    }

    fn flushed(&mut self, id: OpId) {
        self.backoff.reset();
        match &mut self.phase {
            Phase::Copying { flush } if *flush == Some(id) => {
                // Everything was copied when the flush went out: that is the moment told of.
                let done = self.done_bytes;
                let progress = Progress {
                    current: done,
                    total: done,
                };
                self.phase = Phase::InSync(End::Open);
                self.job.become_ready(progress);
            }
            Phase::InSync(end @ End::Flushing) => *end = End::Flushed,
            _ => {}
        }
    }

    fn failed(
        &mut self,
        now: Duration,
        (side, kind, error): (Side, OpKind, std::io::Error),
        claimed: Option<ByteRange>,
    ) {
        // The guest does not wait for a device that fails.
        match &mut self.phase {
            Phase::Copying { flush } if kind == OpKind::Flush => *flush = None,
            Phase::Scanning { asked, .. } if matches!(kind, OpKind::Status(_)) => *asked = None,
            _ => self.let_guest_go(),
        }
        let action = self.job.device_failed(side, kind, error);
        match (action, claimed) {
            (ErrorAction::Ignore, Some(range)) => {
                self.engine.retry_at(range, self.backoff.until(now));
            }
            (ErrorAction::Ignore, None) => {
                self.retry_at = self.backoff.until(now);
            }
            (ErrorAction::Report | ErrorAction::Stop, Some(range)) => self.engine.release(range),
            // Whatever becomes of the job, that is needed.
            (ErrorAction::Report | ErrorAction::Stop, None) if kind == OpKind::Settle => {
                self.retry_at = self.backoff.until(now);
            }
            (ErrorAction::Report | ErrorAction::Stop, None) => {}
        }
        let is_ending = matches!(self.phase, Phase::Ending { .. });
        if action == ErrorAction::Report && !is_ending {
            // Nothing is begun, and nothing told, after that.
            self.begin_ending(now, None);
        }
    }

    /// Stands still once nothing is in flight.
    fn pause(&mut self, status: Status) -> Turn {
        self.let_guest_go();
        if self.engine.is_idle() {
            match status {
                Status::Running => self.job.go_to(Status::Paused),
                Status::Ready => self.job.go_to(Status::Standby),
                _ => {}
            }
        }
        Turn::Step(Step::Wait {
            until: self.settle_at(),
        })
    }

    /// When the target is asked again to settle, if it has failed to.
    fn settle_at(&self) -> Option<Duration> {
        self.engine.wants_settle().then_some(self.retry_at)
    }
}

impl Sealed for Mirror {
    fn is_driven_over(&mut self, source: &Limits, target: &Limits) {
        let mistaken = self.engine.shape().ends.mistaken(source, target);
        if let Some(side) = mistaken {
            self.job.fail_for(side);
        }
    }
}

impl Machine for Mirror {
    fn poll(&mut self, now: Duration, waker: &Waker) -> Step {
        Mirror::poll(self, now, waker)
    }

    fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome) {
        Mirror::op_done(self, now, op, outcome);
    }

    fn op_lost(&mut self, op: Op) {
        Mirror::op_lost(self, op);
    }

    fn ops_lost(&mut self) {
        Mirror::ops_lost(self);
    }

    fn let_go(&mut self) {
        Mirror::let_go(self);
    }
}
