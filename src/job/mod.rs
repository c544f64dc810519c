//! The life of every job: its status, what may be asked of it, how far it is, what it tells.
//!
//! A job has two ends. The *machine* (a [`Mirror`](crate::Mirror)) does the work and is owned by whoever
//! drives it. The [`Job`] is a handle for everybody else: cheap to clone, usable from any thread.
//! What is asked of the handle is noted down and the machine woken; no verb waits for anything.
//!
//! Jobs may end together, as members of a [`JobGroup`]; what holds then is said in its module. One
//! without a group is alone in one of its own.
//!
//! Invariants:
//!
//! 1. Every change of status is a step of the table in [`Status::may_become`] and one event.
//! 2. Only the machine changes the status, but for *start* and *dismiss*, which concern no work, the step
//!    of a whole group to *pending*, and the end of a job that was never started.
//! 3. A verb that is refused changes nothing.
//! 4. No event is handed out, and no waker called, cloned or dropped under a lock: the receiver may
//!    ask for anything.
//! 5. Exactly one of [`Event::Completed`] and [`Event::Cancelled`] is told of a job that was started,
//!    after everything it held is released.
//! 6. A job succeeds by a commit only, which is decided under the lock that every cancel takes: one that
//!    was accepted is never followed by success, unless it was soft.

mod after;
mod bitmap_mode;
mod error;
mod event;
mod group;
mod info;
mod kind;
mod machine;
mod members;
mod options;
mod policy;
mod registry;
mod speed;
mod stage;
mod start;
mod state;
mod status;

use std::fmt;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};

use parking_lot::{Mutex, MutexGuard};

use crate::mirror::CopyMode;

use after::After;
pub use bitmap_mode::BitmapMode;
pub use error::{JobError, VerbError};
pub use event::{Difference, ErrorEvent, Event, Verification, Verified, Warning};
pub use group::JobGroup;
pub use info::{JobInfo, Progress};
pub use kind::JobKind;
pub(crate) use machine::Asked;
use members::Members;
use options::check_somebody_resumes;
pub use options::{JobOptions, JobOptionsError};
pub(crate) use policy::{Backoff, is_no_space};
pub use policy::{ErrorAction, IoStatus, OnError};
use registry::Registry;
pub use registry::{Jobs, Shutdown};
pub(crate) use speed::RateLimit;
pub(crate) use stage::{Stage, Vote};
pub(crate) use start::{AtStart, Beginning, Begun, Start, StartError};
use state::State;
pub use status::{Status, Verb};

/// How a job is to be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cancel {
    /// If it is ready: come to the end, and succeed, but do not switch. Else as
    /// [`Force`](Self::Force).
    Soft,
    /// Stop as soon as possible. What the target holds is undefined.
    Force,
}

/// Options that can be changed while a job runs; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What to do when the source fails.
    pub on_source_error: Option<OnError>,
    /// What to do when the target fails.
    pub on_target_error: Option<OnError>,
    /// How what the guest writes comes to the target of a mirror. It counts for each write from its beginning: those
    /// under way go on as they have begun.
    pub copy_mode: Option<CopyMode>,
}

/// A handle to a job: what its users ask of it, and what they learn.
///
/// # Examples
///
/// ```
/// use blockjob::{Limits, Mirror, MirrorOptions, Node, Status, VerbError};
///
/// let node = Node::new(1 << 20);
/// let limits = Limits::new(1 << 20);
/// let mirror = Mirror::new(&node, limits, limits, MirrorOptions::default())?;
/// let job = mirror.job().clone();
/// assert_eq!(job.query().status, Status::Created);
/// assert!(matches!(job.complete(), Err(VerbError::NotAllowed { .. })));
/// job.start()?;
/// assert_eq!(job.query().status, Status::Running);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Job {
    shared: Arc<Shared>,
}

/// What all handles of a job share.
struct Shared {
    /// Those that end together with it, itself among them.
    group: JobGroup,
    /// Whether that group is its own.
    is_alone: bool,
    /// Told when it is over.
    registry: Weak<Registry>,
    /// What is to be done at the instant at which it starts, if that matters.
    at_start: Option<Arc<dyn AtStart>>,
    state: Mutex<State>,
}

/// Keeps a job from working, as a pause does, but not one that its user can end: for those who must
/// have its devices to themselves for a moment. Dropping it lets the job go on.
#[must_use = "the job goes on when this is dropped"]
pub struct Hold {
    job: Job,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Job {
    /// A job that has joined its group and its manager. If that fails there is no trace of it.
    pub(crate) fn new(
        kind: &'static str,
        mut options: JobOptions,
        at_start: Option<Arc<dyn AtStart>>,
    ) -> Result<Self, JobOptionsError> {
        options.check()?;
        // Jobs must not keep the manager that ends them when nobody has it any more.
        let (jobs, group) = (options.jobs.take(), options.group.take());
        let mut state = State::new(kind, options);
        state.tell(Event::Status(Status::Created));
        let shared = Arc::new(Shared {
            is_alone: group.is_none(),
            group: group.unwrap_or_default(),
            registry: jobs.as_ref().map(Jobs::registry).unwrap_or_default(),
            at_start,
            state: Mutex::new(state),
        });
        let join = || match shared.group.lock().join(&shared) {
            true => Ok(()),
            false => Err(JobOptionsError::GroupEnding),
        };
        match &jobs {
            Some(jobs) => jobs.add(&shared, join)?,
            None => join()?,
        }
        Ok(Self { shared })
    }

    /// Begins to work.
    ///
    /// # Errors
    ///
    /// If it was started or cancelled before.
    pub fn start(&self) -> Result<(), VerbError> {
        self.ask(Verb::Start, |state| {
            if state.cancel.is_some() {
                return Err(state.not_allowed(Verb::Start));
            }
            state.was_started = true;
            state.go_to(Status::Running);
            Ok(())
        })
    }

    /// Stops working once nothing is in flight. May be asked before the job is started.
    ///
    /// # Errors
    ///
    /// [`VerbError::AlreadyPaused`], or if the job is past working.
    pub fn pause(&self) -> Result<(), VerbError> {
        self.ask(Verb::Pause, |state| {
            if state.is_user_paused {
                return Err(VerbError::AlreadyPaused);
            }
            state.is_user_paused = true;
            Ok(())
        })
    }

    /// Takes back the user's pause, or that of an error. Others who hold the job still do.
    ///
    /// # Errors
    ///
    /// [`VerbError::NotPaused`], or if the job is past working.
    pub fn resume(&self) -> Result<(), VerbError> {
        self.ask(Verb::Resume, |state| {
            if !state.is_user_paused {
                return Err(VerbError::NotPaused);
            }
            state.drop_user_pause();
            state.retry_now = true;
            Ok(())
        })
    }

    /// Sets the speed limit in bytes per second; 0 for no limit. It counts at once.
    ///
    /// # Errors
    ///
    /// If the job is past working.
    pub fn set_speed(&self, speed: u64) -> Result<(), VerbError> {
        self.ask(Verb::SetSpeed, |state| {
            state.options.speed = speed;
            Ok(())
        })
    }

    /// Changes options of a running job, all or none.
    ///
    /// # Errors
    ///
    /// If an internal job would be stopped by errors, the job is past working, is none of the kind that has the
    /// option, or is one with a single policy for both devices and would have two.
    pub fn change(&self, change: Change) -> Result<(), VerbError> {
        self.ask(Verb::Change, |state| {
            let source = change
                .on_source_error
                .unwrap_or(state.options.on_source_error);
            let target = change
                .on_target_error
                .unwrap_or(state.options.on_target_error);
            if state.options.id.is_none() {
                check_somebody_resumes([source, target])?;
            }
            if state.has_one_policy() && source != target {
                return Err(JobOptionsError::TwoPolicies.into());
            }
            match (&mut state.mirror, change.copy_mode) {
                (Some(mirror), Some(mode)) => mirror.copy_mode = mode,
                (None, Some(_)) => return Err(VerbError::NoSuchOption("copy_mode")),
                (_, None) => {}
            }
            state.options.on_source_error = source;
            state.options.on_target_error = target;
            state.retry_now = true;
            Ok(())
        })
    }

    /// Asks a job that is ready to come to its end with a switch. Asking again has no effect. While it
    /// stands by this is remembered until it is resumed.
    ///
    /// # Errors
    ///
    /// [`VerbError::CannotComplete`] if it was cancelled, or if it is not ready.
    pub fn complete(&self) -> Result<(), VerbError> {
        self.ask(Verb::Complete, |state| {
            if state.cancel.is_some() {
                return Err(VerbError::CannotComplete);
            }
            state.is_completing = true;
            Ok(())
        })
    }

    /// Has a mirror that is ready compare its target with the source, all of it, while the guest writes and the job
    /// copies what that changes. What differs is copied, and told by [`Event::Differs`]; the end by
    /// [`Event::Verified`]. Status and everything else stays as it is. Asked while it runs, this has no effect;
    /// asked again later, all is compared anew.
    ///
    /// Comparing gets what workers, buffers and [speed](Self::set_speed) copying leaves to it. To tell what differs
    /// from what the guest is just writing the guest is held for the time of its writes under way, at most ten times
    /// a second and only while something differs. [`complete`](Self::complete) and [`cancel`](Self::cancel) wait for
    /// none of this: they cut it short. Whoever wants to know first waits for the event.
    ///
    /// # Errors
    ///
    /// [`VerbError::CannotVerify`] if it is not a mirror whose target can be [compared](crate::Limits::compare), or
    /// is not ready, or is coming to its end.
    ///
    /// # Examples
    ///
    /// A mirror by hand. Something has damaged its target.
    ///
    /// ```
    /// use std::task::Waker;
    /// use std::time::Duration;
    /// use blockjob::{CompareBy, Extent, Limits, Mirror, MirrorOptions, Node, OpKind, Outcome, Step, Verified};
    ///
    /// fn drive(mirror: &mut Mirror, source: &[u8], target: &mut [u8]) {
    ///     while let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
    ///         let outcome = match op.kind() {
    ///             OpKind::Copy(range) => {
    ///                 let bytes = range.start() as usize..range.end() as usize;
    ///                 target[bytes.clone()].copy_from_slice(&source[bytes]);
    ///                 Outcome::Done
    ///             }
    ///             OpKind::Compare(range, CompareBy::Reading) => {
    ///                 let bytes = range.start() as usize..range.end() as usize;
    ///                 let mut differs = bytes.filter(|&at| source[at] != target[at]);
    ///                 let first = differs.next().map(|at| at as u64);
    ///                 Outcome::Compared(first.map(|at| (at..range.end()).into()).into_iter().collect())
    ///             }
    ///             OpKind::Status(range) => Outcome::Status(Extent::data(range.len())),
    ///             OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
    ///             kind => unreachable!("{kind:?}"),
    ///         };
    ///         mirror.op_done(Duration::ZERO, op, outcome);
    ///     }
    /// }
    ///
    /// let (source, mut target) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
    /// let mut limits = Limits::new(1 << 20);
    /// limits.compare = Some(CompareBy::Reading);
    /// let mut options = MirrorOptions::default();
    /// options.chunk_max = 64 << 10;
    /// let mut mirror = Mirror::new(&Node::new(1 << 20), limits, limits, options)?;
    /// let job = mirror.job().clone();
    /// job.start()?;
    /// drive(&mut mirror, &source, &mut target);
    /// assert!(source == target);
    ///
    /// target[300_000] = 9;
    /// job.verify()?;
    /// drive(&mut mirror, &source, &mut target);
    /// let found = job.query().verification.expect("it has come to its end");
    /// assert_eq!((found.state, found.compared, found.differing), (Verified::Whole, 1 << 20, 65536));
    /// assert!(mirror.differing().unwrap().is_dirty(300_000)?);
    /// assert!(source == target);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify(&self) -> Result<(), VerbError> {
        self.together(|_, after| {
            let mut state = self.shared.lock();
            let is_ending = state.cancel.is_some() || state.is_completing;
            if !state.can_verify || !state.status.is_ready() || is_ending {
                return Err(VerbError::CannotVerify);
            }
            state.wants_verify = true;
            after.wake(&mut state);
            Ok(())
        })
    }

    /// Cancels the job. May be asked again; soft may be raised to force, never lowered.
    ///
    /// A soft cancel of a job that is not ready is one by force. A pause of the user is taken back, so
    /// that the job can end. With one that is cancelled by force its whole [group](JobGroup) is. A job that was
    /// never started is over at once; any other ends, and lets guests that it holds go, when its machine is driven next
    /// or dropped.
    ///
    /// # Errors
    ///
    /// [`VerbError::Finalizing`] once its end cannot be stopped, or if it is over.
    pub fn cancel(&self, how: Cancel) -> Result<(), VerbError> {
        self.together(|members, after| {
            let mut state = self.shared.lock();
            if !state.status.allows(Verb::Cancel) {
                return Err(state.not_allowed(Verb::Cancel));
            }
            if state.stage.is_decided() {
                return Err(VerbError::Finalizing);
            }
            if how == Cancel::Soft && state.status.is_ready() {
                state.cancel_softly();
                after.wake(&mut state);
                return Ok(());
            }
            drop(state);
            members.cancel(after);
            Ok(())
        })
    }

    /// Lets a job that is pending come to its end, and with it its whole [group](JobGroup).
    ///
    /// # Errors
    ///
    /// [`VerbError::Finalizing`] if this was asked already, or if the job is not pending.
    pub fn finalize(&self) -> Result<(), VerbError> {
        self.together(|members, after| {
            let state = self.shared.lock();
            if !state.status.allows(Verb::Finalize) {
                return Err(state.not_allowed(Verb::Finalize));
            }
            if state.is_finalizing || state.cancel == Some(Cancel::Force) {
                return Err(VerbError::Finalizing);
            }
            drop(state);
            members.finalize(after);
            Ok(())
        })
    }

    /// Forgets a job that is over.
    ///
    /// # Errors
    ///
    /// If it is not over.
    pub fn dismiss(&self) -> Result<(), VerbError> {
        self.ask(Verb::Dismiss, |state| {
            state.go_to(Status::Null);
            Ok(())
        })
    }

    /// Keeps the job from working until the [`Hold`] is dropped. It stands still once
    /// [`query`](Self::query) says so.
    pub fn hold(&self) -> Hold {
        self.note(|state| state.holds += 1);
        Hold { job: self.clone() }
    }

    /// Everything there is to know of it, at one moment.
    #[must_use]
    pub fn query(&self) -> JobInfo {
        let state = self.shared.lock();
        JobInfo {
            group: (!self.shared.is_alone).then(|| self.shared.group.clone()),
            id: state.options.id.clone(),
            kind: state.kind,
            status: state.status,
            progress: state.progress,
            speed: state.options.speed,
            is_busy: state.is_busy,
            is_paused: state.is_paused(),
            is_user_paused: state.is_user_paused,
            holds: state.holds,
            on_source_error: state.options.on_source_error,
            on_target_error: state.options.on_target_error,
            io_status: state.io_status,
            cancel: state.cancel,
            is_completing: state.is_completing,
            is_finalizing: state.is_finalizing || state.stage.is_decided(),
            auto_finalize: state.options.auto_finalize,
            auto_dismiss: state.options.auto_dismiss,
            mirror: state.mirror,
            verification: state.verification,
            error: state.error.clone(),
        }
    }

    /// The next event that nobody has taken. Each is taken once, by whoever asks first.
    #[must_use]
    pub fn next_event(&self) -> Option<Event> {
        self.shared.lock().events.pop()
    }

    /// As [`next_event`](Self::next_event); a job without an id tells none. If there is none, the waker is called when there is. The
    /// waker of the last call counts.
    pub fn poll_event(&self, waker: &Waker) -> Poll<Event> {
        let waker = waker.clone();
        let mut state = self.shared.lock();
        if let Some(event) = state.events.pop() {
            return Poll::Ready(event);
        }
        let before = state.events.set_waker(waker);
        drop(state);
        drop(before);
        Poll::Pending
    }

    /// Checks the table, then the verb's own conditions, and wakes who must know.
    fn ask(
        &self,
        verb: Verb,
        apply: impl FnOnce(&mut State) -> Result<(), VerbError>,
    ) -> Result<(), VerbError> {
        self.together(|_, after| {
            let mut state = self.shared.lock();
            if !state.status.allows(verb) {
                return Err(state.not_allowed(verb));
            }
            apply(&mut state)?;
            after.wake(&mut state);
            Ok(())
        })
    }

    /// Whether [`start`](Self::start) would do: what a transaction asks before it does.
    pub(crate) fn check_start(&self) -> Result<(), VerbError> {
        let state = self.shared.lock();
        if state.status.allows(Verb::Start) && state.cancel.is_none() {
            return Ok(());
        }
        Err(state.not_allowed(Verb::Start))
    }

    /// Whether it has come to its end, whatever that was.
    pub(crate) fn is_over(&self) -> bool {
        self.shared.lock().is_over()
    }

    /// What is to be done at the instant at which it starts.
    pub(crate) fn at_start(&self) -> Option<&Arc<dyn AtStart>> {
        self.shared.at_start.as_ref()
    }

    /// Has the machine look again, if somebody has started it meanwhile.
    pub(crate) fn wake_machine(&self) {
        self.note(|_| {});
    }

    /// Whether two handles stand for one job.
    pub(crate) fn is(&self, other: &Job) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// A change that comes from elsewhere: the machine must know, too.
    fn note(&self, change: impl FnOnce(&mut State)) {
        self.together(|_, after| {
            let mut state = self.shared.lock();
            change(&mut state);
            after.wake(&mut state);
        });
    }

    /// Does something under the lock of the group, where the end of all its members is decided, and then
    /// what must be done without a lock.
    fn together<R>(&self, act: impl FnOnce(&mut Members, &mut After) -> R) -> R {
        let mut after = After::default();
        let result = act(&mut self.shared.group.lock(), &mut after);
        after.run();
        result
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.job.note(|state| state.holds -= 1);
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.query().fmt(f)
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold").finish_non_exhaustive()
    }
}
