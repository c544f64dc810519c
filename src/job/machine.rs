//! What the machine does with its job.

use std::io;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::MutexGuard;

use crate::copy::{OpKind, Side};
use crate::job::policy::is_no_space;
use crate::job::state::{State, SwitchState, wake};
use crate::job::{
    Cancel, ErrorAction, ErrorEvent, Event, IoStatus, Job, JobError, Progress, Status, Verb,
};

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
    pub(super) fn change_from_outside(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        change(&mut state);
        let wakers = state.wakers();
        drop(state);
        wake(wakers);
    }
}
