//! The life of every job: its status, what may be asked of it, how far it is, what it tells.
//!
//! A job has two ends. The *machine* (a [`Mirror`](crate::Mirror)) does the work and is owned by whoever
//! drives it. The [`Job`] is a handle for everybody else: cheap to clone, usable from any thread.
//! What is asked of the handle is noted down and the machine woken; no verb waits for anything.
//!
//! Invariants:
//!
//! 1. Every change of status is a step of the table in [`Status::may_become`] and one event.
//! 2. Only the machine changes the status, but for *start* and *dismiss*, which concern no work.
//! 3. A verb that is refused changes nothing.
//! 4. No event is handed out, and no waker called, cloned or dropped under the lock: the receiver may
//!    ask for anything.
//! 5. Exactly one of [`Event::Completed`] and [`Event::Cancelled`] is told of a job that was started,
//!    after everything it held is released.

mod event;
mod policy;
mod speed;
mod status;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use crate::copy::{OpKind, Side};

use event::EventQueue;
pub use event::{ErrorEvent, Event};
pub(crate) use policy::{Backoff, is_no_space};
pub use policy::{ErrorAction, IoStatus, OnError};
pub(crate) use speed::RateLimit;
pub use status::{Status, Verb};

/// What a job is made with, whatever its type.
///
/// # Examples
///
/// ```
/// use blockjob::{JobOptions, OnError};
///
/// let mut options = JobOptions::default();
/// options.id = Some("disk0-to-disk1".to_owned());
/// options.speed = 100 << 20; // 100 MiB per second
/// options.on_target_error = OnError::Enospc;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobOptions {
    /// A name for people and logs: a letter, then letters, digits, `-`, `.` and `_`. A job without one
    /// is internal: it tells no events, and may not be stopped by an error, for nobody would resume
    /// it. Default none.
    pub id: Option<String>,
    /// The most to copy, in bytes per second; 0 for no limit. Default 0.
    pub speed: u64,
    /// What to do when the source fails.
    pub on_source_error: OnError,
    /// What to do when the target fails.
    pub on_target_error: OnError,
    /// Whether the job goes to its end once it may. Else it waits, in step, for
    /// [`finalize`](Job::finalize). Default yes.
    pub auto_finalize: bool,
    /// Whether the job is forgotten once it is over. Else it waits for [`dismiss`](Job::dismiss).
    /// Default yes.
    pub auto_dismiss: bool,
    /// How long a job that is cancelled by force waits for operations in flight, before it ends without
    /// them. What was abandoned may still reach the target: let it settle before it is used for anything
    /// else. Default for ever.
    pub cancel_grace: Option<Duration>,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self {
            id: None,
            speed: 0,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            auto_finalize: true,
            auto_dismiss: true,
            cancel_grace: None,
        }
    }
}

/// What is wrong with [`JobOptions`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobOptionsError {
    /// A name that is none.
    #[error("{0:?} is no job id: it must be a letter, then letters, digits, '-', '.' and '_'")]
    BadId(String),
    /// An internal job that an error would stop.
    #[error("a job without an id must not be stopped by an error: nobody would resume it")]
    NobodyResumes,
}

/// How a job is to be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cancel {
    /// If it is ready: come to the end, and succeed, but do not switch. Else as
    /// [`Force`](Self::Force).
    Soft,
    /// Stop as soon as possible. What the target holds is undefined.
    Force,
}

/// Why a job did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A device failed, and the policy was to fail with it.
    #[error("{side} failed: {operation:?}: {error}")]
    Io {
        /// The device.
        side: Side,
        /// What was tried.
        operation: OpKind,
        /// How it failed.
        #[source]
        error: Arc<io::Error>,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled {
        /// Operations that had not ended within the time of grace.
        abandoned: usize,
    },
    /// What did the work was dropped before it had come to an end.
    #[error("the job was dropped before its end")]
    Dropped,
    /// The guest's writes could not be recorded.
    #[error(transparent)]
    Track(#[from] Arc<crate::node::TrackError>),
}

/// Why a verb was refused. Nothing has changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerbError {
    /// Not in this status.
    #[error("job {id}: {verb} is not allowed while it is {status}")]
    NotAllowed {
        /// The job's name, or `(internal)`.
        id: String,
        /// What was asked.
        verb: Verb,
        /// Where the job is.
        status: Status,
    },
    /// The user has paused it already.
    #[error("the job is paused already")]
    AlreadyPaused,
    /// The user has not paused it.
    #[error("the job was not paused by its user")]
    NotPaused,
    /// It was cancelled and will not complete.
    #[error("the job was cancelled and cannot be completed")]
    CannotComplete,
    /// Its end has begun and cannot be stopped.
    #[error("the job is being finalized")]
    Finalizing,
    /// An internal job that an error would stop.
    #[error(transparent)]
    Options(#[from] JobOptionsError),
}

/// How far a job is, in bytes.
///
/// Before it is ready, equal numbers do not mean that it is done: wait for [`Event::Ready`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Done. Never falls.
    pub current: u64,
    /// Done and known to be left. Never below `current`; may move both ways.
    pub total: u64,
}

/// Options that can be changed while a job runs; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What to do when the source fails.
    pub on_source_error: Option<OnError>,
    /// What to do when the target fails.
    pub on_target_error: Option<OnError>,
}

/// Everything there is to know of a job at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct JobInfo {
    /// Its name, if it has one.
    pub id: Option<String>,
    /// What kind of job it is.
    pub kind: &'static str,
    /// Where it is in its life.
    pub status: Status,
    /// How far it is.
    pub progress: Progress,
    /// Bytes per second, 0 for no limit.
    pub speed: u64,
    /// Whether an operation is in flight.
    pub is_busy: bool,
    /// Whether it is to stand still, for any reason: true before the status says so.
    pub is_paused: bool,
    /// Whether its user, or an error on his behalf, has paused it.
    pub is_user_paused: bool,
    /// How many [`Hold`]s there are.
    pub holds: usize,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// Whether, and how, it was cancelled.
    pub cancel: Option<Cancel>,
    /// Whether it was asked to complete.
    pub is_completing: bool,
    /// Whether it was told to finalize, or its switch is out; with the switch out nothing stops it.
    pub is_finalizing: bool,
    /// As it was made.
    pub auto_finalize: bool,
    /// As it was made.
    pub auto_dismiss: bool,
    /// What it failed with. `None` in [`Status::Concluded`] means success.
    pub error: Option<JobError>,
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
    shared: Arc<Mutex<State>>,
}

/// Keeps a job from working, as a pause does, but not one that its user can end: for those who must
/// have its devices to themselves for a moment. Dropping it lets the job go on.
#[must_use = "the job goes on when this is dropped"]
pub struct Hold {
    job: Job,
}

/// What has become of the switch that was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SwitchState {
    /// None is out.
    None,
    /// The caller has it.
    Held,
    /// The caller has switched.
    Committed,
    /// The caller has dropped it.
    Declined,
}

impl SwitchState {
    /// Whether the job can no longer be kept from its end.
    fn is_decided(self) -> bool {
        match self {
            SwitchState::Held | SwitchState::Committed => true,
            SwitchState::None | SwitchState::Declined => false,
        }
    }
}

/// What the machine must know of what was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) status: Status,
    pub(crate) is_paused: bool,
    pub(crate) cancel: Option<Cancel>,
    pub(crate) is_completing: bool,
    pub(crate) is_finalizing: bool,
    pub(crate) auto_finalize: bool,
    pub(crate) speed: u64,
    pub(crate) switch: SwitchState,
    pub(crate) has_failed: bool,
    /// Whether delayed tries are to be made at once: the user has resumed or cancelled the job, or
    /// changed a policy. Stays until [`Job::retries_made`], for the job may be held meanwhile.
    pub(crate) retry_now: bool,
}

struct State {
    kind: &'static str,
    options: JobOptions,
    status: Status,
    was_started: bool,
    is_user_paused: bool,
    holds: usize,
    io_status: IoStatus,
    cancel: Option<Cancel>,
    is_completing: bool,
    is_finalizing: bool,
    retry_now: bool,
    switch: SwitchState,
    /// Whether the machine was dropped while the switch was out.
    is_machine_gone: bool,
    is_busy: bool,
    progress: Progress,
    /// The first fatal error.
    error: Option<JobError>,
    events: EventQueue,
    /// Wakes who drives the machine.
    driver: Option<Waker>,
}

impl JobOptions {
    fn check(&self) -> Result<(), JobOptionsError> {
        let Some(id) = &self.id else {
            return check_somebody_resumes([self.on_source_error, self.on_target_error]);
        };
        let mut chars = id.chars();
        let is_good = chars
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if is_good {
            Ok(())
        } else {
            Err(JobOptionsError::BadId(id.clone()))
        }
    }
}

fn check_somebody_resumes(policies: [OnError; 2]) -> Result<(), JobOptionsError> {
    let stops = policies
        .iter()
        .any(|policy| matches!(policy, OnError::Stop | OnError::Enospc));
    if stops {
        Err(JobOptionsError::NobodyResumes)
    } else {
        Ok(())
    }
}

impl Job {
    pub(crate) fn new(kind: &'static str, options: JobOptions) -> Result<Self, JobOptionsError> {
        options.check()?;
        let mut state = State {
            kind,
            options,
            status: Status::Created,
            was_started: false,
            is_user_paused: false,
            holds: 0,
            io_status: IoStatus::Ok,
            cancel: None,
            is_completing: false,
            is_finalizing: false,
            retry_now: false,
            switch: SwitchState::None,
            is_machine_gone: false,
            is_busy: false,
            progress: Progress::default(),
            error: None,
            events: EventQueue::default(),
            driver: None,
        };
        state.tell(Event::Status(Status::Created));
        Ok(Self {
            shared: Arc::new(Mutex::new(state)),
        })
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
    /// If an internal job would be stopped by errors, or the job is past working.
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

    /// Cancels the job. May be asked again; soft may be raised to force, never lowered.
    ///
    /// A soft cancel of a job that is not ready is one by force. A pause of the user is taken back, so
    /// that the job can end.
    ///
    /// # Errors
    ///
    /// [`VerbError::Finalizing`] once its end cannot be stopped, or if it is over.
    pub fn cancel(&self, how: Cancel) -> Result<(), VerbError> {
        self.ask(Verb::Cancel, |state| {
            if state.switch.is_decided() {
                return Err(VerbError::Finalizing);
            }
            let how = if state.status.is_ready() {
                how
            } else {
                Cancel::Force
            };
            state.cancel = state.cancel.max(Some(how));
            state.drop_user_pause();
            state.retry_now = true;
            Ok(())
        })
    }

    /// Lets a job that is pending come to its end.
    ///
    /// # Errors
    ///
    /// [`VerbError::Finalizing`] if this was asked already, or if the job is not pending.
    pub fn finalize(&self) -> Result<(), VerbError> {
        self.ask(Verb::Finalize, |state| {
            if state.is_finalizing || state.cancel == Some(Cancel::Force) {
                return Err(VerbError::Finalizing);
            }
            state.is_finalizing = true;
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
        self.change_from_outside(|state| state.holds += 1);
        Hold { job: self.clone() }
    }

    /// Everything there is to know of it, at one moment.
    #[must_use]
    pub fn query(&self) -> JobInfo {
        let state = self.shared.lock();
        JobInfo {
            id: state.options.id.clone(),
            kind: state.kind,
            status: state.status,
            progress: state.progress,
            speed: state.options.speed,
            is_busy: state.is_busy,
            is_paused: state.is_paused(),
            is_user_paused: state.is_user_paused,
            holds: state.holds,
            io_status: state.io_status,
            cancel: state.cancel,
            is_completing: state.is_completing,
            is_finalizing: state.is_finalizing || state.switch.is_decided(),
            auto_finalize: state.options.auto_finalize,
            auto_dismiss: state.options.auto_dismiss,
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
        let mut state = self.shared.lock();
        if !state.status.allows(verb) {
            return Err(state.not_allowed(verb));
        }
        apply(&mut state)?;
        let wakers = state.wakers();
        drop(state);
        wake(wakers);
        Ok(())
    }
}

/// What a transaction does with a job.
impl Job {
    /// Whether [`start`](Self::start) would do.
    pub(crate) fn check_start(&self) -> Result<(), VerbError> {
        let state = self.shared.lock();
        if state.status.allows(Verb::Start) && state.cancel.is_none() {
            return Ok(());
        }
        Err(state.not_allowed(Verb::Start))
    }

    /// Whether two handles stand for one job.
    pub(crate) fn is(&self, other: &Job) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

/// What the machine does with its job.
impl Job {
    /// What was asked; `waker` is called when something more is.
    pub(crate) fn asked(&self, waker: &Waker) -> Asked {
        let state = self.lock_with_driver(waker);
        Asked {
            status: state.status,
            is_paused: state.is_paused(),
            cancel: state.cancel,
            is_completing: state.is_completing,
            is_finalizing: state.is_finalizing,
            auto_finalize: state.options.auto_finalize,
            speed: state.options.speed,
            switch: state.switch,
            has_failed: state.error.is_some(),
            retry_now: state.retry_now,
        }
    }

    /// The state, with the waker in it. It is cloned, and the one before dropped, outside of the lock.
    fn lock_with_driver(&self, waker: &Waker) -> MutexGuard<'_, State> {
        let state = self.shared.lock();
        let known = state.driver.as_ref();
        if known.is_some_and(|known| known.will_wake(waker)) {
            return state;
        }
        drop(state);
        let waker = waker.clone();
        let before = self.shared.lock().driver.replace(waker);
        drop(before);
        self.shared.lock()
    }

    /// Nothing is delayed any more.
    pub(crate) fn retries_made(&self) {
        self.shared.lock().retry_now = false;
    }

    pub(crate) fn cancel_grace(&self) -> Option<Duration> {
        self.shared.lock().options.cancel_grace
    }

    /// Goes to another status.
    pub(crate) fn go_to(&self, next: Status) {
        self.change_state(|state| state.go_to(next));
    }

    /// Is in step for the first time: nothing is left to copy.
    pub(crate) fn become_ready(&self, progress: Progress) {
        self.change_state(|state| {
            state.progress = progress;
            state.go_to(Status::Ready);
            let speed = state.options.speed;
            state.tell(Event::Ready { progress, speed });
        });
    }

    /// Its own work is done, and it waits to be finalized.
    pub(crate) fn become_pending(&self) {
        self.change_state(|state| {
            state.drop_user_pause();
            state.go_to(Status::Waiting);
            state.go_to(Status::Pending);
            state.tell(Event::Pending);
        });
    }

    pub(crate) fn publish(&self, progress: Progress, is_busy: bool) {
        let mut state = self.shared.lock();
        state.progress = progress;
        state.is_busy = is_busy;
    }

    /// A device failed: tells it, and does what the policy says to the status. What failed must be dirty
    /// again.
    pub(crate) fn device_failed(
        &self,
        side: Side,
        operation: OpKind,
        error: io::Error,
    ) -> ErrorAction {
        let error = Arc::new(error);
        let mut state = self.shared.lock();
        let policy = match side {
            Side::Source => state.options.on_source_error,
            Side::Target => state.options.on_target_error,
        };
        let mut action = policy.action(&error);
        if action == ErrorAction::Stop && !state.status.allows(Verb::Resume) {
            // Nobody could resume it. It is tried again instead; cancelling ends that.
            action = ErrorAction::Ignore;
        }
        if state.cancel == Some(Cancel::Force) {
            // It ends anyway, and what is given up on the way is no news.
            return ErrorAction::Ignore;
        }
        let is_no_space = is_no_space(&error);
        state.tell(Event::Error(ErrorEvent {
            side,
            operation,
            action,
            is_no_space,
            error: Arc::clone(&error),
            count: 1,
        }));
        match action {
            ErrorAction::Report => {
                state.error.get_or_insert(JobError::Io {
                    side,
                    operation,
                    error,
                });
            }
            ErrorAction::Stop => {
                state.is_user_paused = true;
                if state.io_status == IoStatus::Ok {
                    state.io_status = if is_no_space {
                        IoStatus::NoSpace
                    } else {
                        IoStatus::Failed
                    };
                }
            }
            ErrorAction::Ignore => {}
        }
        let listener = state.events.take_waker();
        drop(state);
        wake([None, listener]);
        action
    }

    /// Fails with an error that no policy applies to.
    pub(crate) fn fail(&self, error: JobError) {
        self.shared.lock().error.get_or_insert(error);
    }

    /// From here on the switch is out, and nothing stops the job. Not if it was cancelled or paused
    /// before: both are decided under one lock, so that one that was accepted has its effect.
    pub(crate) fn hold_switch(&self) -> bool {
        let mut state = self.shared.lock();
        let may_switch = state.cancel.is_none() && !state.is_paused();
        if may_switch {
            state.switch = SwitchState::Held;
        }
        may_switch
    }

    /// The machine is dropped. A job whose switch is out is ended by whoever holds the switch.
    pub(crate) fn machine_dropped(&self) {
        self.change_state(|state| match state.switch {
            SwitchState::Held => state.is_machine_gone = true,
            SwitchState::Committed => drop(state.conclude(None)),
            SwitchState::None | SwitchState::Declined => state.end_dropped(),
        });
    }

    pub(crate) fn set_switch(&self, switch: SwitchState) {
        self.change_from_outside(|state| {
            state.switch = switch;
            if switch == SwitchState::Declined {
                // The wish is withdrawn; the job stays in step.
                state.is_completing = false;
                state.is_finalizing = false;
            }
            if state.is_machine_gone {
                match switch {
                    SwitchState::Committed => drop(state.conclude(None)),
                    SwitchState::None | SwitchState::Held | SwitchState::Declined => {
                        state.end_dropped();
                    }
                }
            }
        });
    }

    /// The last steps of a job that has released everything it held.
    pub(crate) fn conclude(&self, abandoned: Option<usize>) -> Result<(), JobError> {
        let mut state = self.shared.lock();
        let result = state.conclude(abandoned);
        let driver = state.driver.take();
        let listener = state.events.take_waker();
        drop(state);
        drop(driver);
        wake([None, listener]);
        result
    }

    /// The result of a job that is over.
    pub(crate) fn result(&self) -> Option<Result<(), JobError>> {
        let state = self.shared.lock();
        if !matches!(state.status, Status::Concluded | Status::Null) {
            return None;
        }
        Some(state.error.clone().map_or(Ok(()), Err))
    }

    /// A change that the machine makes itself: only those who wait for events must know.
    fn change_state(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        change(&mut state);
        let listener = state.events.take_waker();
        drop(state);
        wake([None, listener]);
    }

    /// A change that comes from elsewhere: the machine must know, too.
    fn change_from_outside(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        change(&mut state);
        let wakers = state.wakers();
        drop(state);
        wake(wakers);
    }
}

impl State {
    fn is_paused(&self) -> bool {
        self.is_user_paused || self.holds > 0
    }

    fn drop_user_pause(&mut self) {
        self.is_user_paused = false;
        self.io_status = IoStatus::Ok;
    }

    fn go_to(&mut self, next: Status) {
        assert!(
            self.status.may_become(next),
            "a job never goes from {} to {next}",
            self.status
        );
        self.status = next;
        self.tell(Event::Status(next));
    }

    fn tell(&mut self, event: Event) {
        if self.options.id.is_some() {
            self.events.push(event);
        }
    }

    fn end_dropped(&mut self) {
        self.error.get_or_insert(JobError::Dropped);
        drop(self.conclude(None));
    }

    /// Success if there was no error and it was not cancelled by force.
    fn conclude(&mut self, abandoned: Option<usize>) -> Result<(), JobError> {
        let was_forced = self.cancel == Some(Cancel::Force);
        let own_error = self.error.clone();
        if was_forced {
            self.error.get_or_insert(JobError::Cancelled {
                abandoned: abandoned.unwrap_or(0),
            });
        }
        self.is_busy = false;
        self.drop_user_pause();
        match self.status {
            Status::Paused => self.go_to(Status::Running),
            Status::Standby => self.go_to(Status::Ready),
            _ => {}
        }
        if self.error.is_some() {
            self.go_to(Status::Aborting);
        } else if self.status != Status::Pending {
            self.go_to(Status::Waiting);
            self.go_to(Status::Pending);
        }
        if self.error.is_none() {
            // What the guest has written since the end is not ours to copy.
            self.progress.total = self.progress.current;
        }
        let (progress, speed) = (self.progress, self.options.speed);
        if self.was_started {
            self.tell(if was_forced {
                Event::Cancelled {
                    progress,
                    speed,
                    error: own_error,
                }
            } else {
                Event::Completed {
                    progress,
                    speed,
                    error: self.error.clone(),
                }
            });
        }
        self.go_to(Status::Concluded);
        if self.options.auto_dismiss || !self.was_started {
            self.go_to(Status::Null);
        }
        self.error.clone().map_or(Ok(()), Err)
    }

    fn not_allowed(&self, verb: Verb) -> VerbError {
        VerbError::NotAllowed {
            id: self
                .options
                .id
                .clone()
                .unwrap_or_else(|| "(internal)".to_owned()),
            verb,
            status: self.status,
        }
    }

    /// Who must be told that something has changed, once the lock is released.
    fn wakers(&mut self) -> [Option<Waker>; 2] {
        [self.driver.take(), self.events.take_waker()]
    }
}

fn wake(wakers: [Option<Waker>; 2]) {
    wakers.into_iter().flatten().for_each(Waker::wake);
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.job.change_from_outside(|state| state.holds -= 1);
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
