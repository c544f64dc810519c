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
//!    write is either on the source before the first look at it, or recorded.
//! 2. Ranges are zeroed for the scan only where nothing else is in flight, and copying starts when that
//!    is over: a guest write after the look is recorded, and copied after the zeroes.
//! 3. Ready is told once, at a moment when nothing was dirty and nothing in flight, after a flush of
//!    what was written until then.
//! 4. The switch is handed out only while the guest is held, nothing is dirty, no claim is left, and
//!    the target was flushed after its last write. The guest is held until the switch is gone.
//! 5. While the switch is out, nothing is copied. If it was used, nothing is copied ever after: the guest
//!    writes to the target now.
//! 6. The source is never written.

mod options;
mod pace;
mod switch;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::bitmap::HBitmap;
use crate::copy::{
    Budget, Content, Done, Ends, Engine, Extent, Limits, Op, OpId, OpKind, Outcome, Shape, Side,
};
use crate::job::{
    Asked, Backoff, Cancel, ErrorAction, Job, JobError, Progress, RateLimit, Status, SwitchState,
};
use crate::node::{JobBitmap, JobClaim, Node, Quiesce, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

use options::{GRANULARITY_MAX, GRANULARITY_MIN, default_granularity};
pub use options::{MirrorError, MirrorOptions, MirrorSync};
use pace::Pace;
pub use switch::Switch;

/// How much of the source is asked about at once while it is scanned.
const SCAN_MAX: u64 = 8 << 30;
/// The shortest that the guest may be held: with none at all the end would be tried for ever.
const HOLD_MIN: Duration = Duration::from_millis(1);
/// How many zero writes are planned at once while the source is scanned.
const SCAN_ZEROES: u64 = 64;
/// While in step, a guest write wakes the job at most this often; what is written between is copied
/// together.
const BATCH: Duration = Duration::from_millis(10);

/// What the machine wants next.
#[derive(Debug)]
#[must_use]
pub enum Step {
    /// Do this, and report it with [`Mirror::op_done`]. There may be more to do at once: ask again.
    Op(Op),
    /// Nothing to do until an operation is reported, the waker is called, or that time has come.
    Wait {
        /// Time at which to ask again, even if nothing happened.
        until: Option<Duration>,
    },
    /// Switch now, or drop it.
    Switch(Switch),
    /// The job is over.
    Done(Result<(), JobError>),
}

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
///                 _ => Outcome::Done,
///             };
///             mirror.op_done(now, op, outcome);
///         }
///         // Nothing is left to copy: the job is ready.
///         Step::Wait { .. } => job.complete()?,
///         Step::Switch(switch) => {
///             source = target.clone(); // the guest's disk is the target from here on
///             switch.commit();
///         }
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
    downtime_max: Duration,
    hold_max: Duration,
    engine: Engine,
    rate: RateLimit,
    backoff: Backoff,
    phase: Phase,
    /// What becomes the bitmap, made beforehand, so that want of memory comes up before the start.
    clean: Option<HBitmap>,
    /// Present from the moment that writes are recorded until the job is over.
    bitmap: Option<JobBitmap>,
    /// Given back when the job is over.
    claim: Option<JobClaim>,
    /// Bytes brought to the target, without the zeroes of the scan.
    done_bytes: u64,
    pace: Pace,
    /// When a guest write that comes while nothing is to do may wake the job again.
    batch_until: Duration,
    /// Before then no flush, and no question of the scan, is tried again after a failure.
    retry_at: Duration,
    /// For tests: what the target may have lacked when the job ended.
    left_at_end: Option<HBitmap>,
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
        /// Whether all that the target lacks is known.
        was_scanned: bool,
    },
    /// Over.
    Concluded,
}

/// How far the end of a job in step has come.
#[derive(Debug)]
enum End {
    /// The guest writes; the end was not asked for, or too much is left.
    Open,
    /// Flushing what was written until now, so that little is left to flush while the guest is held.
    Flushing,
    /// That was done. What was copied meanwhile is not flushed, and is not to be: with a guest that never
    /// stops there is always something, and the end would never come.
    Flushed,
    /// The guest is held, and its writes in flight are to settle.
    Closing { quiesce: Quiesce, since: Duration },
    /// The guest is held. The rest is copied, then flushed.
    Quiet {
        guard: QuiesceGuard,
        since: Duration,
    },
    /// The caller has the switch.
    Switching,
}

/// What one turn of the machine came to.
enum Turn {
    /// Something has changed: look again.
    Again,
    Step(Step),
}

impl Mirror {
    /// A mirror of `node` from the device that holds it now to another, as told by their limits. It
    /// does nothing until [`Job::start`].
    ///
    /// # Errors
    ///
    /// If the three are not equally long, an option is out of range, the devices cannot work together,
    /// or another job works on the node.
    pub fn new(
        node: &Node,
        source: Limits,
        target: Limits,
        options: MirrorOptions,
    ) -> Result<Self, MirrorError> {
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
        let granularity = options
            .granularity
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
        let shape = Shape::new(
            &ends,
            granularity,
            options.chunk_max,
            options.buf_size,
            options.workers,
            options.unmap,
        )?;
        let mut clean = HBitmap::new(node.len(), granularity)?;
        clean.reserve()?;
        let engine = Engine::new(shape, options.workers, options.buf_size)?;
        let speed = options.job.speed;
        let job = Job::new("mirror", options.job)?;
        let claim = node.claim_for_job().ok_or(MirrorError::NodeBusy)?;
        Ok(Self {
            job,
            node: node.clone(),
            sync: options.sync,
            downtime_max: options.downtime_max,
            hold_max: options.hold_max.max(HOLD_MIN),
            engine,
            rate: RateLimit::new(speed),
            backoff: Backoff::new(),
            phase: Phase::Created,
            clean: Some(clean),
            bitmap: None,
            claim: Some(claim),
            done_bytes: 0,
            pace: Pace::default(),
            batch_until: Duration::ZERO,
            retry_at: Duration::ZERO,
            left_at_end: None,
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
            if !matches!(step, Step::Op(_)) {
                self.publish();
            }
            return step;
        }
    }

    /// Takes back an operation that was done, or was tried. One that was given up before is ignored.
    pub fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome) {
        let (id, kind) = (op.id(), op.kind());
        let mut dirty = self.bitmap.as_ref().map(JobBitmap::lock);
        let done = self.engine.done(op, outcome, dirty.as_mut());
        let dirty_bytes = dirty.map_or(0, |dirty| dirty.dirty_bytes_in_len());
        match done {
            None | Some(Done::Nothing) => {}
            Some(Done::Range(range)) => self.range_done(now, kind, range),
            Some(Done::Flushed) => self.flushed(id),
            Some(Done::Status(range, extent)) => self.scanned(range, extent),
            Some(Done::Failed { side, kind, error }) => self.failed(now, side, kind, error),
        }
        self.publish_with(dirty_bytes);
    }

    /// Says that every operation handed out and not reported is lost, because what worked on them was
    /// dropped. What the target may still be doing is waited for before the same range is written again.
    ///
    /// A guest that is held for the end of the job goes on, until the job is driven again.
    pub fn ops_lost(&mut self) {
        for kind in self.engine.lose_running() {
            match &mut self.phase {
                Phase::Scanning { asked, .. } if kind != OpKind::Flush => *asked = None,
                Phase::Copying { flush } if kind == OpKind::Flush => *flush = None,
                _ => {}
            }
        }
        self.let_guest_go();
        self.publish();
    }

    fn turn(&mut self, now: Duration, waker: &Waker) -> Turn {
        if matches!(self.phase, Phase::Concluded) {
            let result = self.job.result().expect("it is over");
            return Turn::Step(Step::Done(result));
        }
        let asked = self.job.asked(waker);
        // A lost range may still change: nothing goes on before that is cleared up, except around it.
        if let Some(op) = self.settle(now) {
            return Turn::Step(Step::Op(op));
        }
        match asked.switch {
            SwitchState::Held => return Turn::Step(Step::Wait { until: None }),
            SwitchState::Committed if !is_broken(Sabotage::CopyAfterSwitch) => {
                return self.conclude(None);
            }
            SwitchState::Committed | SwitchState::Declined => {
                self.job.set_switch(SwitchState::None);
                self.phase = Phase::InSync(End::Open);
                return Turn::Again;
            }
            SwitchState::None => {}
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
        self.engine.settle(dirty.as_mut())
    }

    /// Starts to record, with the guest held for that moment.
    fn attach(&mut self, now: Duration, waker: &Waker) -> Turn {
        if is_broken(Sabotage::AttachWithoutQuiesce) {
            let clean = self.clean.take().expect("attached once");
            self.bitmap = self.node.track_unquiesced(clean);
            self.phase = self.first_look();
            return Turn::Again;
        }
        let until = self.held_until();
        let Phase::Attaching { quiesce, .. } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        let Poll::Ready(guard) = Pin::new(quiesce).poll(&mut Context::from_waker(waker)) else {
            if until.is_some_and(|until| now >= until) {
                // A guest write hangs. Others go on, and it is tried again later.
                self.let_guest_go();
                self.retry_at = now.saturating_add(self.hold_max);
                return Turn::Again;
            }
            return Turn::Step(Step::Wait { until });
        };
        let clean = self.clean.take().expect("attached once");
        match self.node.track_into(&guard, clean) {
            Ok(bitmap) => self.bitmap = Some(bitmap),
            Err(error) => self.job.fail(JobError::Track(Arc::new(error))),
        }
        self.phase = self.first_look();
        Turn::Again
    }

    fn first_look(&mut self) -> Phase {
        let shape = self.engine.shape();
        match self.sync {
            MirrorSync::None => Phase::Copying { flush: None },
            // The target can be made zero for next to nothing where the source is.
            MirrorSync::Full if shape.cheap_zeroes && shape.scan_zeroes().is_some() => {
                Phase::Scanning {
                    next: 0,
                    asked: None,
                }
            }
            // The zeroes must be written anyway: the copying does that on its way.
            MirrorSync::Full => {
                if let Some(bitmap) = &self.bitmap {
                    bitmap.lock().set_all();
                }
                Phase::Copying { flush: None }
            }
            MirrorSync::Top => Phase::Scanning {
                next: 0,
                asked: None,
            },
        }
    }

    /// Asks what the source holds, and zeroes the target on the way.
    fn scan(&mut self, now: Duration) -> Turn {
        let copying = match is_broken(Sabotage::CopyWhileScanning) {
            true => Copying::Unlimited,
            false => Copying::No,
        };
        if let Some(op) = self.next_op(now, copying) {
            return Turn::Step(Step::Op(op));
        }
        let retry = self.next_retry(now);
        let Phase::Scanning { next, asked } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        let len = self.engine.shape().len;
        if *next < len {
            if asked.is_some() || self.engine.planned() > 0 {
                return Turn::Step(Step::Wait { until: None });
            }
            if retry.is_some() {
                return Turn::Step(Step::Wait { until: retry });
            }
            let end = next.saturating_add(SCAN_MAX).min(len);
            let op = self.engine.hand_out(OpKind::Status((*next..end).into()));
            *asked = Some(op.id());
            return Turn::Step(Step::Op(op));
        }
        if self.engine.has_no_claims() {
            self.phase = Phase::Copying { flush: None };
            return Turn::Again;
        }
        Turn::Step(Step::Wait { until: retry })
    }

    /// When the first of what failed is tried again, if that is not now.
    fn next_retry(&self, now: Duration) -> Option<Duration> {
        let unclaimed = Some(self.retry_at).filter(|&at| at > now);
        unclaimed.into_iter().chain(self.engine.next_retry()).min()
    }

    /// The source has told what is at the start of what is left to scan.
    fn scanned(&mut self, range: ByteRange, extent: Extent) {
        let Phase::Scanning { next, asked } = &mut self.phase else {
            return;
        };
        *asked = None;
        let extent = extent.or_data(range);
        let mut area = range.split_at(range.start().saturating_add(extent.len)).0;
        let is_zero = extent.content != Content::Data;
        let shape = self.engine.shape();
        let most = shape
            .scan_zeroes()
            .map_or(0, |(_, max)| max.saturating_mul(SCAN_ZEROES));
        let zeroed = match self.sync {
            MirrorSync::Top if !extent.in_top => {
                *next = area.end();
                return;
            }
            MirrorSync::Full if is_zero => shape.zeroable(area),
            MirrorSync::Full | MirrorSync::Top | MirrorSync::None => None,
        };
        if let Some(zeroed) = zeroed {
            // The rest is asked for again when these are written.
            let end = zeroed.end().min(zeroed.start().saturating_add(most));
            area = area
                .split_at(if end < zeroed.end() { end } else { area.end() })
                .0;
        }
        *next = area.end();
        let zeroed = zeroed.map(|zeroed| zeroed.intersection(area));
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before the scan");
        let mut dirty = bitmap.lock();
        match zeroed {
            Some(zeroed) => {
                for edge in [area.start()..zeroed.start(), zeroed.end()..area.end()] {
                    dirty.set(edge.into()).expect("within the disk");
                }
                drop(dirty);
                self.engine.plan_zeroes(zeroed);
            }
            None => {
                dirty.set(area).expect("within the disk");
            }
        }
    }

    /// Copies until nothing is left, flushes, and is ready.
    fn copy(&mut self, now: Duration, waker: &Waker) -> Turn {
        if let Some(op) = self.next_op(now, Copying::Limited) {
            return Turn::Step(Step::Op(op));
        }
        let may_flush = self.is_in_step() && self.next_retry(now).is_none();
        let Phase::Copying { flush } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        if may_flush && is_broken(Sabotage::ReadyWithoutFlush) {
            let id = *flush.get_or_insert_with(|| Op::new(OpKind::Flush).id());
            self.flushed(id);
            return Turn::Again;
        }
        if may_flush && flush.is_none() {
            let op = self.engine.hand_out(OpKind::Flush);
            *flush = Some(op.id());
            return Turn::Step(Step::Op(op));
        }
        self.wait(now, waker, Copying::Limited)
    }

    /// Keeps the target in step, and comes to the end when that is asked for.
    fn keep_in_sync(&mut self, now: Duration, waker: &Waker, asked: Asked) -> Turn {
        let wants_end = asked.cancel.is_some() || asked.is_completing;
        let is_pending = asked.status == Status::Pending;
        let waits_to_be_finalized = wants_end && !asked.auto_finalize && !is_pending;
        let may_end = match is_pending {
            true => asked.is_finalizing,
            false => wants_end && asked.auto_finalize,
        };
        let is_held = matches!(
            self.phase,
            Phase::InSync(End::Closing { .. } | End::Quiet { .. })
        );
        // A job that waits to be finalized may do so for long.
        let is_ending = may_end || (wants_end && !is_pending);
        let is_batching = !is_ending && now < self.batch_until;
        let copying = match (is_held, is_batching) {
            (true, _) => Copying::Unlimited,
            (false, true) => Copying::Claimed,
            (false, false) => Copying::Limited,
        };
        if let Some(op) = self.next_op(now, copying) {
            return Turn::Step(Step::Op(op));
        }
        // The guest is not held while something that failed waits to be tried again, nor while more is left
        // than can be copied in the time that it may be held.
        let is_near =
            self.next_retry(now).is_none() && self.left() <= self.pace.bytes_in(self.downtime_max);
        if waits_to_be_finalized && is_near {
            self.job.become_pending();
            return Turn::Again;
        }
        if self.held_until().is_some_and(|until| now >= until) {
            // Something hangs. The guest goes on, for at least as long as it was held.
            self.let_guest_go();
            self.retry_at = now.saturating_add(self.hold_max);
            return Turn::Again;
        }
        let is_in_step = self.is_in_step();
        let Phase::InSync(end) = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        match end {
            // One from before a pause may still be out: another would only be in its way.
            End::Open | End::Quiet { .. } if self.engine.is_flushing() => {
                self.wait(now, waker, copying)
            }
            End::Open if may_end && is_near && self.engine.has_unflushed() => {
                *end = End::Flushing;
                Turn::Step(Step::Op(self.engine.hand_out(OpKind::Flush)))
            }
            End::Open | End::Flushed if may_end && is_near => {
                *end = End::Closing {
                    quiesce: self.node.quiesce(),
                    since: now,
                };
                Turn::Again
            }
            End::Open | End::Flushing | End::Flushed => self.wait(now, waker, copying),
            End::Closing { quiesce, since } => {
                let polled = Pin::new(quiesce).poll(&mut Context::from_waker(waker));
                let Poll::Ready(guard) = polled else {
                    return self.wait(now, waker, copying);
                };
                *end = End::Quiet {
                    guard,
                    since: *since,
                };
                Turn::Again
            }
            End::Quiet { .. } => {
                if !is_in_step && !is_broken(Sabotage::SwitchWithoutRecheck) {
                    return self.wait(now, waker, copying);
                }
                if self.engine.has_unflushed() && !is_broken(Sabotage::SwitchWithoutFlush) {
                    return Turn::Step(Step::Op(self.engine.hand_out(OpKind::Flush)));
                }
                self.finish(asked)
            }
            End::Switching => unreachable!("handled before"),
        }
    }

    /// Until when the guest is held at the most, if it is.
    fn held_until(&self) -> Option<Duration> {
        match self.phase {
            Phase::Attaching { since, .. }
            | Phase::InSync(End::Closing { since, .. } | End::Quiet { since, .. }) => {
                since.checked_add(self.hold_max)
            }
            _ => None,
        }
    }

    /// The guest is held, both disks are equal and flushed.
    fn finish(&mut self, asked: Asked) -> Turn {
        if asked.cancel.is_some() {
            // A soft cancel: the target is a copy of this instant, and the guest stays where it is. It
            // goes on before the end is told.
            return self.conclude(None);
        }
        if !self.job.hold_switch() {
            // Cancelled or paused since we asked: no switch is handed out after that was accepted.
            return Turn::Again;
        }
        let end = std::mem::replace(&mut self.phase, Phase::InSync(End::Switching));
        let Phase::InSync(End::Quiet { guard, since, .. }) = end else {
            unreachable!("called in this phase only");
        };
        Turn::Step(Step::Switch(Switch::new(self.job.clone(), since, guard)))
    }

    /// The next operation of the copy machinery.
    fn next_op(&mut self, now: Duration, copying: Copying) -> Option<Op> {
        let budget = match copying {
            Copying::Unlimited => Budget::Claim,
            Copying::No => Budget::Free,
            Copying::Claimed | Copying::Limited if self.rate.free_at(now) > now => Budget::Free,
            Copying::Claimed => Budget::Copy,
            Copying::Limited => Budget::Claim,
        };
        let bitmap = self.bitmap.as_ref()?;
        let op = self.engine.next(&mut bitmap.lock(), budget)?;
        self.rate.account(self.engine.cost(op.kind()));
        Some(op)
    }

    /// What to wait for when nothing can be handed out.
    fn wait(&mut self, now: Duration, waker: &Waker, copying: Copying) -> Turn {
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before copying");
        let has_work = self.engine.planned() > 0 || !bitmap.lock().is_clean();
        let free_at = self.rate.free_at(now);
        let until = match copying {
            Copying::No | Copying::Claimed => Some(self.batch_until),
            Copying::Limited if has_work && free_at > now => Some(free_at),
            Copying::Limited | Copying::Unlimited if self.engine.has_free_worker() => {
                // First armed, then looked once more: a guest write that came since the last look
                // would wake nobody. What is in flight, or waits to be tried again, keeps nobody from
                // that.
                bitmap.wake_at_write(waker);
                if let Some(op) = self.next_op(now, copying) {
                    return Turn::Step(Step::Op(op));
                }
                if matches!(self.phase, Phase::InSync(End::Open)) {
                    // The next guest write wakes us; those that follow it are left alone for a while.
                    self.batch_until = now.saturating_add(BATCH);
                }
                None
            }
            Copying::Limited | Copying::Unlimited => None,
        };
        let times = [until, self.next_retry(now), self.held_until()];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    fn range_done(&mut self, now: Duration, kind: OpKind, range: ByteRange) {
        self.backoff.reset();
        if matches!(self.phase, Phase::Scanning { .. }) {
            return;
        }
        self.done_bytes = self.done_bytes.saturating_add(range.len());
        // Zeroes go much faster, and say nothing of how long data takes.
        if let OpKind::Copy(_) = kind {
            self.pace.add(now, range.len());
        }
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

    fn failed(&mut self, now: Duration, side: Side, kind: OpKind, error: std::io::Error) {
        let claimed = kind.range().filter(|_| kind.writes_target());
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

    /// A job that does not get on does not hold the guest. What it was about to do starts anew.
    fn let_guest_go(&mut self) {
        match &mut self.phase {
            Phase::Attaching { .. } => self.phase = Phase::Created,
            Phase::InSync(
                end @ (End::Flushing | End::Flushed | End::Closing { .. } | End::Quiet { .. }),
            ) => *end = End::Open,
            _ => {}
        }
    }

    fn begin_ending(&mut self, now: Duration, cancel: Option<Cancel>) {
        if let Some(bitmap) = &self.bitmap {
            self.engine.give_up_planned(&mut bitmap.lock());
        }
        if cancel == Some(Cancel::Force) {
            let grace = self.job.cancel_grace();
            self.grace_until = grace.map(|grace| now.saturating_add(grace));
        }
        self.phase = Phase::Ending {
            has_cancelled: false,
            was_scanned: matches!(self.phase, Phase::Copying { .. } | Phase::InSync(_)),
        };
    }

    /// Waits for what is in flight, and is over.
    fn end(&mut self, now: Duration, cancel: Option<Cancel>) -> Turn {
        if self.engine.is_idle() {
            return self.conclude(Some(0));
        }
        let Phase::Ending { has_cancelled, .. } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        if cancel == Some(Cancel::Force) {
            if !std::mem::replace(has_cancelled, true) {
                if self.grace_until.is_none() {
                    let grace = self.job.cancel_grace();
                    self.grace_until = grace.map(|grace| now.saturating_add(grace));
                }
                return Turn::Step(Step::Op(self.engine.hand_out(OpKind::CancelInFlight)));
            }
            if self.grace_until.is_some_and(|until| now >= until) {
                let abandoned = self.engine.unsettled();
                return self.conclude(Some(abandoned));
            }
        }
        let times = [self.grace_until, self.settle_at()];
        Turn::Step(Step::Wait {
            until: times.into_iter().flatten().min(),
        })
    }

    fn conclude(&mut self, abandoned: Option<usize>) -> Turn {
        self.release();
        let result = self.job.conclude(abandoned);
        Turn::Step(Step::Done(result))
    }

    /// Gives back everything that is held, the guest first.
    fn release(&mut self) {
        self.publish();
        if cfg!(debug_assertions) {
            self.left_at_end = self.left_dirty();
        }
        // A guest that was held goes on with this.
        self.phase = Phase::Concluded;
        self.clean = None;
        self.bitmap = None;
        self.claim = None;
        let _ = self.engine.lose_running();
    }

    /// Whether nothing is dirty and nothing in flight.
    fn is_in_step(&self) -> bool {
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before copying");
        bitmap.lock().is_clean()
            && (self.engine.has_no_claims() || is_broken(Sabotage::TrustCleanBitmap))
    }

    /// Bytes that are dirty or in flight.
    fn left(&self) -> u64 {
        self.dirty_bytes()
            .saturating_add(self.engine.claimed_bytes())
    }

    fn dirty_bytes(&self) -> u64 {
        let bitmap = self.bitmap.as_ref();
        bitmap.map_or(0, |bitmap| bitmap.lock().dirty_bytes_in_len())
    }

    fn publish(&self) {
        self.publish_with(self.dirty_bytes());
    }

    /// Tells how far the job is, for those who ask its handle.
    fn publish_with(&self, dirty_bytes: u64) {
        let claimed_bytes = match self.phase {
            Phase::Concluded => return,
            // The zeroes of the scan are no progress.
            Phase::Scanning { .. } => 0,
            _ => self.engine.claimed_bytes(),
        };
        let left = dirty_bytes.saturating_add(claimed_bytes);
        let progress = Progress {
            current: self.done_bytes,
            total: self.done_bytes.saturating_add(left),
        };
        self.job.publish(progress, !self.engine.is_idle());
    }

    /// What the target may lack, from the moment on that the scan is over: what is dirty or claimed.
    /// For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn left_dirty(&self) -> Option<HBitmap> {
        match &self.phase {
            Phase::Created
            | Phase::Attaching { .. }
            | Phase::Scanning { .. }
            | Phase::Ending {
                was_scanned: false, ..
            } => None,
            Phase::Concluded => self.left_at_end.clone(),
            Phase::Copying { .. } | Phase::InSync(_) | Phase::Ending { .. } => {
                let mut left = HBitmap::clone(&*self.bitmap.as_ref()?.lock());
                self.engine.add_claimed(&mut left);
                Some(left)
            }
        }
    }

    /// Whether everything that must always hold does. For tests.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        self.engine.check_invariants();
        if let Some(bitmap) = &self.bitmap {
            bitmap.lock().check_invariants();
        }
    }
}

/// What the copy machinery may hand out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copying {
    /// Only what is planned already and costs nothing.
    No,
    /// What is claimed already, as the speed limit allows.
    Claimed,
    /// What the speed limit allows.
    Limited,
    /// Everything: the guest waits.
    Unlimited,
}

/// A machine that is dropped ends its job: with success if the switch was used, else with
/// [`JobError::Dropped`].
impl Drop for Mirror {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Concluded) {
            return;
        }
        self.release();
        self.job.machine_dropped();
    }
}
