//! Copies a disk as it was at one instant, while the guest goes on to write to it.
//!
//! ```text
//!                    at that instant                          by the machine
//! cluster   not wanted ◀───────── dirty ──claim──▶ in flight ──────▶ on the target
//!               │                   ▲                  │                  │
//!               │                   └── failed, lost ──┘                  │
//!               ▼                                                         ▼
//! guest      writes            waits: its clusters are saved next       writes
//!
//! Created ─▶ Attaching ─▶ Copying ─▶ Copied ─▶ Concluded
//!            the instant     │         waits for its group, and to be finalized
//!                            └─▶ Ending: an error, or a cancel
//! ```
//!
//! One machinery, that of [the copying jobs](crate::copy), does the background copying and what guests wait
//! for. That goes ahead of everything else, and is not kept back by the limits of the rest.
//!
//! Invariants, beside those of the machinery:
//!
//! 1. What is to be copied is fixed, complete, and held back from guests, before any guest write can come that
//!    is later than the instant.
//! 2. A guest write goes on only when nothing of its clusters is dirty or in flight, or was never wanted. So
//!    what the source holds there when it is read is what it held at the instant.
//! 3. What cannot be saved, or not in time, has one of two ends: the guest's write fails, or the backup does.
//!    Never does it succeed with something that is later than the instant.
//! 4. When the job is over the bitmap holds what its mode says, and never less than what the target lacks:
//!
//!    | mode | success | failure, cancel, or that of another of the group |
//!    |---|---|---|
//!    | on-success | written since the instant | what it held, and written since |
//!    | always | written since | not on the target, and written since |
//!    | never | what it held, and written since | the same |
//!
//!    What is not flushed is not on the target: it is flushed once more at a failure, and if that fails, too,
//!    all of it is missing.
//! 5. The job is done when all that was wanted is on the target and flushed.
//! 6. The instant is held on to while the job is paused, slow, or waits for others. It ends with the job.
//! 7. The source is never written.

mod end;
mod guest;
mod options;
mod pace;
mod start;
mod view;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::bitmap::HBitmap;
use crate::copy::{
    Budget, Buffer, CopyBy, Done, Ends, Engine, Limits, LimitsError, Op, OpId, OpKind, Outcome,
    Shape, ShapeError, Side,
};
use crate::job::{
    AtStart, Backoff, Begun, ErrorAction, Job, JobKind, OnError, Progress, RateLimit, Stage, Start,
    Status, Verb,
};
use crate::machine::sealed::Sealed;
use crate::machine::{Machine, Step};
use crate::node::{JobClaim, Locked, Node, Quiesce};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

use guest::Waiting;
pub use options::{BackupBuffer, BackupError, BackupOptions, BackupSync, OnBufferFull, OnCbwError};
use pace::Pace;
use start::{Armed, Instant};
pub use view::{FrozenRead, FrozenView, ViewError};

/// The shortest that the guest may be held: with none at all the instant would be tried for ever.
const HOLD_MIN: Duration = Duration::from_millis(1);

/// The machine of one backup job: says what to do, is told what came of it, and does nothing itself.
///
/// The instant that is backed up is that at which the job starts: by [`Job::start`], as soon as the guest's
/// writes in flight have settled, or by a [`Transaction`](crate::Transaction), which gives several disks the
/// same one. What an incremental one copies is told by [`BackupOptions::bitmap`](field@BackupOptions::bitmap).
///
/// # Examples
///
/// An incremental backup, by hand. The [driver](crate::driver) and the [queue](crate::queue) do this for you.
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Backup, BackupOptions, BackupSync, Begin, BitmapOptions, Content, Extent, Limits, Node};
/// use blockjob::{OpKind, Outcome, Step};
///
/// let node = Node::new(1 << 20);
/// let guard = node.quiesce().try_guard().expect("no write is in flight");
/// node.bitmaps().add(&guard, "daily", BitmapOptions::default())?;
/// drop(guard);
/// let mut disk = vec![0u8; 1 << 20];
/// let mut write = |disk: &mut [u8], at: usize, byte| {
///     let Begin::Go(ticket) = node.begin_write((at as u64..at as u64 + 1).into()) else { return false };
///     disk[at] = byte;
///     ticket.finish(true)
/// };
/// assert!(write(&mut disk, 70_000, 1));
///
/// let mut options = BackupOptions::default();
/// options.sync = BackupSync::Incremental;
/// options.bitmap = Some("daily".to_owned());
/// let limits = Limits::new(1 << 20);
/// let mut backup = Backup::new(&node, limits, limits, options)?;
/// backup.job().start()?;
///
/// let now = Duration::ZERO; // from the caller's clock
/// let (mut image, mut copied) = (vec![0u8; 1 << 20], 0);
/// loop {
///     match backup.poll(now, Waker::noop()) {
///         Step::Op(op) => {
///             // This byte is not saved yet, so the guest has to wait with it; not with another.
///             assert!(copied > 0 || !write(&mut disk, 70_000, 2));
///             let outcome = match op.kind() {
///                 OpKind::Copy(range) => {
///                     let bytes = range.start() as usize..range.end() as usize;
///                     image[bytes.clone()].copy_from_slice(&disk[bytes]);
///                     copied += range.len();
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
///             backup.op_done(now, op, outcome);
///         }
///         Step::Done(result) => break result?,
///         _ => unreachable!("all is done at once"),
///     }
/// }
/// assert_eq!((copied, image[70_000]), (65536, 1));
/// assert!(write(&mut disk, 70_000, 2));
/// assert_eq!(node.bitmaps().query("daily")?.dirty_bytes, 65536, "written since the instant");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Backup {
    job: Job,
    node: Node,
    options: Kept,
    start: Arc<Start<Instant>>,
    engine: Engine,
    /// What began at the instant; `None` before it, and when the job is over.
    armed: Option<Armed>,
    /// Guest writes that wait.
    waiting: Vec<Waiting>,
    /// Whether something has happened since that those may go on with.
    look_again: bool,
    rate: RateLimit,
    pace: Pace,
    backoff: Backoff,
    buffer_backoff: Backoff,
    phase: Phase,
    /// For others to read, if that was asked for.
    view: Option<FrozenView>,
    /// What readers have given up, and was in flight then.
    given_up: Vec<ByteRange>,
    /// What the target is to discard, for nobody will read it.
    unneeded: Vec<ByteRange>,
    /// What the source may discard.
    is_read: Vec<ByteRange>,
    /// Given back when the job is over.
    claim: Option<JobClaim>,
    /// Bytes brought to the target.
    done_bytes: u64,
    /// Whether the guest was held in vain already.
    was_held_in_vain: bool,
    /// Before then no flush and no settling is tried again after a failure, nor the start.
    retry_at: Duration,
    /// When the time of grace ends for operations in flight.
    grace_until: Option<Duration>,
}

/// The options that are looked at while it runs.
struct Kept {
    sync: BackupSync,
    on_cbw_error: OnCbwError,
    on_full: OnBufferFull,
    /// How much of the buffer can be discarded at once, if that can discard what it takes.
    discard_saved_max: Option<u64>,
    discard_source: bool,
    cbw_timeout: Option<Duration>,
    hold_max: Duration,
}

enum Phase {
    /// Not started, or not begun with.
    Created,
    /// The guest's writes in flight are to settle: that is the instant.
    Attaching { quiesce: Quiesce, since: Duration },
    /// `flush` is out.
    Copying { flush: Option<OpId> },
    /// All is on the target, and flushed.
    Copied,
    /// It will not succeed. What is in flight is waited for.
    Ending {
        /// Whether the target was asked to give up what it cannot finish.
        has_cancelled: bool,
        /// Whether it was asked to flush what a bitmap with mode always will take for copied.
        has_flushed: bool,
    },
    /// Over.
    Concluded,
}

/// What one turn of the machine came to.
enum Turn {
    /// Something has changed: look again.
    Again,
    Step(Step),
}

impl Backup {
    /// What backups can do.
    pub(crate) const KIND: JobKind = JobKind {
        name: "backup",
        verbs: &[
            Verb::Start,
            Verb::Cancel,
            Verb::Pause,
            Verb::Resume,
            Verb::SetSpeed,
            Verb::Change,
            Verb::Finalize,
            Verb::Dismiss,
        ],
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
            "workers",
            "chunk_max",
            "buf_size",
            "min_cluster_size",
            "buffer",
            "view",
            "discard_source",
            "compress",
            "offload",
            "unmap",
            "on_cbw_error",
            "cbw_timeout",
            "hold_max",
        ],
        changes: &["on_source_error", "on_target_error"],
    };

    /// A backup of `node` from the device that holds it to another, as told by their limits. It does nothing
    /// until [`Job::start`].
    ///
    /// Whether the bitmap can be had shows when it starts: a transaction may make it first.
    ///
    /// # Errors
    ///
    /// If the three are not equally long, options are out of range or do not go together, the devices cannot
    /// work together, or another job works on the node.
    pub fn new(
        node: &Node,
        source: Limits,
        target: Limits,
        options: BackupOptions,
    ) -> Result<Self, BackupError> {
        let bitmap = options.bitmap()?;
        let ends = Ends::check(source, target)
            .map_err(|(side, error)| BackupError::Limits { side, error })?;
        // From here on it is not resized.
        let claim = node.claim_for_job().ok_or(BackupError::NodeBusy)?;
        if source.len != node.len() || target.len != node.len() {
            return Err(BackupError::Lengths {
                node: node.len(),
                source_len: source.len,
                target: target.len,
            });
        }
        if source.identity.is_some() && source.identity == target.identity {
            return Err(BackupError::SameStorage);
        }
        if !(1..=1024).contains(&options.workers) {
            return Err(BackupError::Workers(options.workers));
        }
        if options.buf_size == 0 {
            return Err(BackupError::Zero("buf_size"));
        }
        let cluster = options.cluster(target.cluster, ends.request_align())?;
        let chunk_max = options.chunk_max;
        if chunk_max < cluster {
            return Err(BackupError::ChunkTooShort { chunk_max, cluster });
        }
        let copy_by = options.copy_by(&target)?;
        let chunk_max = match copy_by {
            CopyBy::Compressing => cluster,
            CopyBy::Buffer | CopyBy::Offloading => chunk_max,
        };
        let granularity = Granularity::from_bytes(cluster).expect("a power of two");
        let mut shape = Shape::new(
            &ends,
            granularity,
            chunk_max,
            options.buf_size,
            options.workers,
            options.unmap,
        )?;
        if copy_by == CopyBy::Compressing && shape.chunk_max < cluster {
            return Err(BackupError::Shape(ShapeError::PieceTooLong {
                piece: cluster,
                max: shape.chunk_max,
            }));
        }
        shape.only_top = options.sync == BackupSync::Top;
        let mut empty = HBitmap::new(node.len(), granularity)?;
        empty.reserve()?;
        let buffer = match &options.buffer {
            None => None,
            Some(_) if options.sync == BackupSync::None => {
                return Err(BackupError::NoneWithBuffer);
            }
            Some(_) if options.view => return Err(BackupError::ViewWithBuffer),
            Some(buffer) => {
                check_buffer(buffer, node.len(), [&source, &target])?;
                let bytes_max = buffer.bytes_max;
                if bytes_max < cluster {
                    return Err(BackupError::BufferTooSmall { bytes_max, cluster });
                }
                let piece_max = buffer.piece_max(cluster, shape.chunk_max)?;
                Some(Buffer::new(
                    node.len(),
                    granularity,
                    piece_max,
                    buffer.bytes_max,
                )?)
            }
        };
        let engine = Engine::new(shape, options.workers, options.buf_size)?
            .with_buffer(buffer)
            .copying_by(copy_by);
        let pace = Pace::new(cluster, options.buf_size);
        let speed = options.job.speed;
        let instant = Instant::new(node, options.sync, bitmap);
        let start = Arc::new(Start::new(instant, empty));
        let at_start: Arc<dyn AtStart> = Arc::clone(&start) as _;
        // The last step that can fail: there is no trace of a job that could not be made.
        let job = Job::new(Self::KIND.name, options.job, Some(at_start))?;
        Ok(Self {
            job,
            node: node.clone(),
            options: Kept {
                sync: options.sync,
                on_cbw_error: options.on_cbw_error,
                on_full: options
                    .buffer
                    .map_or(OnBufferFull::Wait, |buffer| buffer.on_full),
                discard_saved_max: options
                    .buffer
                    .and_then(|buffer| buffer.discard_max(cluster)),
                discard_source: options.discard_source,
                cbw_timeout: options.cbw_timeout,
                hold_max: options.hold_max.max(HOLD_MIN),
            },
            start,
            engine,
            armed: None,
            waiting: Vec::new(),
            look_again: false,
            rate: RateLimit::new(speed),
            pace,
            backoff: Backoff::new(),
            buffer_backoff: Backoff::new(),
            phase: Phase::Created,
            view: options
                .view
                .then(|| FrozenView::new(node.len(), options.sync == BackupSync::None)),
            given_up: Vec::new(),
            unneeded: Vec::new(),
            is_read: Vec::new(),
            claim: Some(claim),
            done_bytes: 0,
            was_held_in_vain: false,
            retry_at: Duration::ZERO,
            grace_until: None,
        })
    }

    /// The handle for those who control the job and watch it.
    #[must_use]
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// The unit in which it saves what the guest is about to overwrite.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.engine.shape().granularity.bytes()
    }

    /// The disk as it was at the instant, if [`BackupOptions::view`] says so. It can be read from then on until
    /// the job is over. Before the machine was polled once after the instant, also after the commit of a
    /// [`Transaction`](crate::Transaction), [`begin_read`](FrozenView::begin_read) gives
    /// [`NotBegun`](ViewError::NotBegun).
    #[must_use]
    pub fn view(&self) -> Option<FrozenView> {
        self.view.clone()
    }

    /// Bytes of the [buffer](BackupOptions::buffer) that are in use, and the most that ever were.
    #[must_use]
    pub fn buffer_bytes(&self) -> (u64, u64) {
        let buffer = self.engine.buffer();
        buffer.map_or((0, 0), |buffer| (buffer.bytes(), buffer.bytes_peak()))
    }

    /// What to do next. `now` is the time since any fixed moment and never falls. `waker` is called when
    /// it is worth asking again after [`Step::Wait`]. Never a switch.
    pub fn poll(&mut self, now: Duration, waker: &Waker) -> Step {
        loop {
            let Turn::Step(step) = self.turn(now, waker) else {
                continue;
            };
            if !matches!(step, Step::Op(_)) {
                self.publish();
            }
            return step;
        }
    }

    /// Takes back an operation that was done, or was tried. [`Outcome::Done`] says that all it asks for is done,
    /// so each [`OpKind`] must have been acted on. One that was given up before is ignored.
    pub fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome) {
        let id = op.id();
        let dirty = self.armed.as_mut().map(|armed| &mut armed.dirty);
        let done = self.engine.done(op, outcome, dirty);
        self.pace.end(id, now);
        self.look_again = true;
        match done {
            None | Some(Done::Nothing | Done::Compared(_) | Done::Status(..)) => {}
            Some(Done::Range(range)) => {
                self.backoff.reset();
                self.pace.copied(range.len());
                self.done_bytes = self.done_bytes.saturating_add(range.len());
                self.saved(range);
                self.forget_late(range);
                if self.options.discard_source {
                    self.is_read.push(range);
                }
            }
            Some(Done::Skipped(range)) => {
                self.saved(range);
                self.forget_late(range);
            }
            Some(Done::Saved(range)) => {
                self.buffer_backoff.reset();
                self.saved(range);
            }
            Some(Done::Flushed) => {
                self.backoff.reset();
                if matches!(self.phase, Phase::Copying { flush } if flush == Some(id)) {
                    self.phase = Phase::Copied;
                }
            }
            Some(Done::Failed {
                side,
                kind,
                error,
                is_urgent,
            }) => self.failed(now, side, kind, error, is_urgent),
        }
        self.publish();
    }

    /// The next operation that a guest write waits for, if there is one: as [`poll`](Self::poll), but nothing else
    /// is handed out. For a thread that does no more than this for a guest, beside another that drives the job.
    pub fn poll_urgent(&mut self, now: Duration, waker: &Waker) -> Option<Op> {
        // What was lost is settled first, by who drives the job.
        match self.settle_at() {
            None => self.serve_guests(now, waker),
            Some(_) => None,
        }
    }

    /// Says that this operation is lost, because what worked on it was dropped, while others work on. What the
    /// target may still be doing is waited for before the same range is written again.
    pub fn op_lost(&mut self, op: Op) {
        self.pace.lose();
        if let Some(kind) = self.engine.lose_one(&op) {
            self.forget_question(kind);
        }
        self.look_again = true;
        self.publish();
    }

    /// Says that every operation handed out and not reported is lost, because what worked on them was
    /// dropped. What the target may still be doing is waited for before the same range is written again.
    /// Guest writes that wait for such a range do so until the job is driven again.
    pub fn ops_lost(&mut self) {
        self.pace.lose();
        for kind in self.engine.lose_running() {
            self.forget_question(kind);
        }
        self.let_go();
        self.look_again = true;
        self.publish();
    }

    /// Says that nobody drives the job any more, but what was handed out goes on: a guest that is held for the
    /// instant goes on, too, until the job is driven again.
    pub fn let_go(&mut self) {
        if matches!(self.phase, Phase::Attaching { .. }) {
            self.phase = Phase::Created;
        }
    }

    /// No answer will come to that: it is asked once more.
    fn forget_question(&mut self, kind: OpKind) {
        match (&mut self.phase, kind) {
            (Phase::Copying { flush }, OpKind::Flush) => *flush = None,
            (Phase::Ending { has_cancelled, .. }, OpKind::CancelInFlight) => *has_cancelled = false,
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
        if asked.stage == Stage::Committed {
            return self.conclude(None, true);
        }
        if let Some(op) = self.settle(now) {
            return Turn::Step(Step::Op(op));
        }
        let must_end = asked.cancel.is_some() || asked.has_failed;
        if must_end && !matches!(self.phase, Phase::Ending { .. }) {
            self.begin_ending(now, asked.cancel);
        }
        if matches!(self.phase, Phase::Ending { .. }) {
            return self.end(now, asked.cancel);
        }
        if asked.status == Status::Created {
            return Turn::Step(Step::Wait { until: None });
        }
        if self.armed.is_none() {
            if self.start.is_open() {
                // It is started by a transaction, and by somebody else before that is decided.
                return Turn::Step(Step::Wait { until: None });
            }
            self.armed = self.start.take();
            if let Some(Armed {
                dirty,
                hold: Some(hold),
                ..
            }) = &self.armed
            {
                if let Some(view) = &self.view {
                    view.begin(dirty.clone(), Arc::clone(hold));
                }
                self.phase = Phase::Copying { flush: None };
            }
        }
        // Guests come first, and do not care whether the job is paused.
        if let Some(op) = self.serve_guests(now, waker) {
            return Turn::Step(Step::Op(op));
        }
        if let Some(op) = self.give_back() {
            return Turn::Step(Step::Op(op));
        }
        if self.is_too_late(now) || matches!(self.phase, Phase::Ending { .. }) {
            return Turn::Again;
        }
        // A job that is paused at once has its instant all the same.
        let is_before = matches!(self.phase, Phase::Created | Phase::Attaching { .. });
        if asked.is_paused && !is_before {
            return self.pause(asked.status);
        }
        if asked.is_paused && asked.status == Status::Running {
            self.job.go_to(Status::Paused);
        }
        if !asked.is_paused && asked.status == Status::Paused {
            self.job.go_to(Status::Running);
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
            Phase::Created if now < self.retry_at => Turn::Step(Step::Wait {
                until: Some(self.retry_at),
            }),
            Phase::Created => {
                self.phase = Phase::Attaching {
                    quiesce: self.node.quiesce(),
                    since: now,
                };
                Turn::Again
            }
            Phase::Attaching { .. } => self.attach(now, waker),
            Phase::Copying { .. } => self.copy(now),
            Phase::Copied => self.finish(asked),
            Phase::Ending { .. } | Phase::Concluded => unreachable!("handled above"),
        }
    }

    /// Makes the instant, with the guest held for it.
    fn attach(&mut self, now: Duration, waker: &Waker) -> Turn {
        let Phase::Attaching { quiesce, since } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        let until = since.checked_add(self.options.hold_max);
        let Poll::Ready(guard) = Pin::new(quiesce).poll(&mut Context::from_waker(waker)) else {
            if until.is_some_and(|until| now >= until) {
                // A guest write hangs. Others go on, and it is tried again later.
                self.phase = Phase::Created;
                self.retry_at = now.saturating_add(self.options.hold_max);
                if !std::mem::replace(&mut self.was_held_in_vain, true) {
                    self.job.held_in_vain();
                }
                return Turn::Again;
            }
            return Turn::Step(Step::Wait { until });
        };
        let spare = self.start.spare();
        let armed = self
            .start
            .arm(&mut Locked::new([&self.node]), &guard, spare);
        self.phase = Phase::Created;
        match armed {
            // Somebody else may have begun it at this instant, and may undo it.
            Ok(Begun::Here) => self.start.commit(),
            Ok(Begun::Before) => {}
            Err(error) => self.job.fail(error.into()),
        }
        drop(guard);
        Turn::Again
    }

    /// Copies until nothing is left, and flushes.
    fn copy(&mut self, now: Duration) -> Turn {
        let is_background = self.options.sync != BackupSync::None;
        let armed = self.armed.as_mut().expect("the instant is over");
        if is_background {
            let budget = match self.rate.free_at(now) > now {
                true => Budget::Free,
                false => Budget::Claim,
            };
            self.engine.limit_background(self.pace.bytes());
            if let Some(op) = self.engine.next(&mut armed.dirty, budget) {
                self.rate.account(self.engine.cost(op.kind()));
                return Turn::Step(Step::Op(op));
            }
            if let Some(max) = self.options.discard_saved_max
                && let Some(op) = self.engine.next_discard(&armed.dirty, max)
            {
                return Turn::Step(Step::Op(op));
            }
            // Nothing is left behind in the buffer, and nothing more comes to a device when the job is over.
            let is_copied = armed.dirty.is_clean()
                && self.engine.has_no_claims()
                && self.is_read.is_empty()
                && !self.engine.is_giving_back()
                && self.engine.is_buffer_settled();
            let Phase::Copying { flush } = &mut self.phase else {
                unreachable!("called in this phase only");
            };
            if is_copied && flush.is_none() && now >= self.retry_at {
                if !self.engine.has_unflushed() || is_broken(Sabotage::EndWithoutFlush) {
                    self.phase = Phase::Copied;
                    return Turn::Again;
                }
                let op = self.engine.hand_out(OpKind::Flush);
                *flush = Some(op.id());
                return Turn::Step(Step::Op(op));
            }
        }
        self.wait(now)
    }

    /// What to wait for when nothing can be handed out.
    fn wait(&mut self, now: Duration) -> Turn {
        let armed = self.armed.as_ref().expect("the instant is over");
        let has_work = self.engine.planned() > 0 || !armed.dirty.is_clean();
        let free_at = self.rate.free_at(now);
        let limited = (has_work && free_at > now).then_some(free_at);
        let retry = Some(self.retry_at).filter(|&at| at > now);
        let times = [
            limited,
            retry,
            self.engine.next_retry(),
            self.next_for_guests(),
        ];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    /// Stands still, but for guests, once nothing else is in flight.
    fn pause(&mut self, status: Status) -> Turn {
        if self.engine.is_idle_but_urgent() && status == Status::Running {
            self.job.go_to(Status::Paused);
        }
        if let (true, Some(armed)) = (is_broken(Sabotage::LetGoWhilePaused), &mut self.armed) {
            armed.hold = None;
            self.waiting.clear();
        }
        let times = [self.settle_at(), self.next_for_guests()];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    fn settle(&mut self, now: Duration) -> Option<Op> {
        if now < self.retry_at {
            return None;
        }
        let dirty = self.armed.as_mut().map(|armed| &mut armed.dirty);
        self.engine.settle(dirty)
    }

    /// When the target, or the buffer, is asked again to settle, if it has failed to.
    fn settle_at(&self) -> Option<Duration> {
        let buffer = self.engine.buffer();
        let wants_settle = self.engine.wants_settle() || buffer.is_some_and(Buffer::wants_settle);
        wants_settle.then_some(self.retry_at)
    }

    fn failed(
        &mut self,
        now: Duration,
        side: Side,
        kind: OpKind,
        error: std::io::Error,
        is_urgent: bool,
    ) {
        let is_save = matches!(kind, OpKind::Save(_));
        if is_save && side == Side::Buffer {
            return self.buffer_failed(now, kind, error);
        }
        if kind == OpKind::SettleSaved {
            // Whatever becomes of the job, that is needed.
            self.retry_at = self.backoff.until(now);
            return self.job.guest_copy_failed(side, kind, error, false);
        }
        if is_save && !self.is_waited_for(kind) {
            // Nothing is missing.
            return;
        }
        let claimed = kind.range().filter(|_| !is_save);
        if let (Phase::Copying { flush }, OpKind::Flush) = (&mut self.phase, kind) {
            *flush = None;
        }
        let is_ending = matches!(self.phase, Phase::Ending { .. });
        if is_urgent && !is_ending && self.is_waited_for(kind) {
            if let Some(range) = claimed {
                self.engine.release(range);
            }
            return self.guest_copy_failed(now, side, kind, error);
        }
        let action = self.job.device_failed(side, kind, error);
        match (action, claimed) {
            (ErrorAction::Ignore, Some(range)) => {
                self.engine.retry_at(range, self.backoff.until(now));
            }
            (ErrorAction::Ignore, None) => self.retry_at = self.backoff.until(now),
            (ErrorAction::Report | ErrorAction::Stop, Some(range)) => self.engine.release(range),
            // Whatever becomes of the job, that is needed.
            (ErrorAction::Report | ErrorAction::Stop, None) if kind == OpKind::Settle => {
                self.retry_at = self.backoff.until(now);
            }
            (ErrorAction::Report | ErrorAction::Stop, None) => {}
        }
        if action == ErrorAction::Report && !is_ending {
            self.begin_ending(now, None);
        }
    }

    fn publish(&self) {
        if matches!(self.phase, Phase::Concluded) {
            return;
        }
        let dirty = self.armed.as_ref().map(|armed| &armed.dirty);
        let left = dirty.map_or(0, HBitmap::dirty_bytes_in_len);
        let left = left.saturating_add(self.engine.claimed_bytes());
        let progress = Progress {
            current: self.done_bytes,
            total: self.done_bytes.saturating_add(left),
        };
        self.job.publish(progress, !self.engine.is_idle());
    }

    /// What the target may lack: what is dirty or claimed. For tests; `None` outside of the time between the
    /// instant and the end.
    #[doc(hidden)]
    #[must_use]
    pub fn left_dirty(&self) -> Option<HBitmap> {
        let mut left = self.armed.as_ref()?.dirty.clone();
        self.engine.add_claimed(&mut left);
        Some(left)
    }

    /// Whether everything that must always hold does. For tests.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        self.engine.check_invariants();
        let Some(armed) = &self.armed else {
            return;
        };
        armed.dirty.check_invariants();
        let left = self.left_dirty().expect("it is armed");
        for run in left.runs() {
            let mut rest = run;
            while !rest.is_empty() {
                let (cluster, behind) = rest.split_at(rest.start() + self.cluster_size());
                let is_saved = self
                    .engine
                    .buffer()
                    .is_some_and(|buffer| buffer.has(cluster));
                let is_held = armed.hold.as_ref().is_none_or(|hold| hold.holds(cluster));
                let is_held = is_held || is_saved;
                assert!(is_held, "2: a guest may overwrite {cluster:?}");
                rest = behind;
            }
        }
    }
}

fn check_buffer(buffer: &BackupBuffer, len: u64, others: [&Limits; 2]) -> Result<(), BackupError> {
    let side = Side::Buffer;
    let limits = &buffer.limits;
    let checked = limits.check();
    checked.map_err(|error| BackupError::Limits { side, error })?;
    if limits.len < len {
        let error = LimitsError {
            field: "len",
            value: limits.len,
        };
        return Err(BackupError::Limits { side, error });
    }
    let is_same = |other: &&Limits| limits.identity.is_some() && limits.identity == other.identity;
    match others.iter().any(is_same) {
        true => Err(BackupError::SameStorage),
        false => Ok(()),
    }
}

impl Sealed for Backup {
    fn is_driven_over(&mut self, source: &Limits, target: &Limits) {
        let mistaken = self.engine.shape().ends.mistaken(source, target);
        if let Some(side) = mistaken {
            self.job.fail_for(side);
        }
    }
}

impl Machine for Backup {
    fn poll(&mut self, now: Duration, waker: &Waker) -> Step {
        Backup::poll(self, now, waker)
    }

    fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome) {
        Backup::op_done(self, now, op, outcome);
    }

    fn op_lost(&mut self, op: Op) {
        Backup::op_lost(self, op);
    }

    fn ops_lost(&mut self) {
        Backup::ops_lost(self);
    }

    fn let_go(&mut self) {
        Backup::let_go(self);
    }
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backup")
            .field("job", &self.job)
            .finish_non_exhaustive()
    }
}
