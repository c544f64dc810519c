//! All that is known of a job, as it lies under its lock.

use std::task::Waker;

use crate::job::event::EventQueue;
use crate::job::{
    Cancel, Event, IoStatus, JobError, JobOptions, Progress, Status, Verb, VerbError,
};

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
    pub(super) fn is_decided(self) -> bool {
        match self {
            SwitchState::Held | SwitchState::Committed => true,
            SwitchState::None | SwitchState::Declined => false,
        }
    }
}

pub(super) struct State {
    pub(super) kind: &'static str,
    pub(super) options: JobOptions,
    pub(super) status: Status,
    pub(super) was_started: bool,
    pub(super) is_user_paused: bool,
    pub(super) holds: usize,
    pub(super) io_status: IoStatus,
    pub(super) cancel: Option<Cancel>,
    pub(super) is_completing: bool,
    pub(super) is_finalizing: bool,
    pub(super) retry_now: bool,
    pub(super) switch: SwitchState,
    /// Whether the machine was dropped while the switch was out.
    pub(super) is_machine_gone: bool,
    pub(super) is_busy: bool,
    pub(super) progress: Progress,
    /// The first fatal error.
    pub(super) error: Option<JobError>,
    pub(super) events: EventQueue,
    /// Wakes who drives the machine.
    pub(super) driver: Option<Waker>,
}

impl State {
    pub(super) fn is_paused(&self) -> bool {
        self.is_user_paused || self.holds > 0
    }

    pub(super) fn drop_user_pause(&mut self) {
        self.is_user_paused = false;
        self.io_status = IoStatus::Ok;
    }

    pub(super) fn go_to(&mut self, next: Status) {
        assert!(
            self.status.may_become(next),
            "a job never goes from {} to {next}",
            self.status
        );
        self.status = next;
        self.tell(Event::Status(next));
    }

    pub(super) fn tell(&mut self, event: Event) {
        if self.options.id.is_some() {
            self.events.push(event);
        }
    }

    pub(super) fn end_dropped(&mut self) {
        self.error.get_or_insert(JobError::Dropped);
        drop(self.conclude(None));
    }

    /// Success if there was no error and it was not cancelled by force.
    pub(super) fn conclude(&mut self, abandoned: Option<usize>) -> Result<(), JobError> {
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

    pub(super) fn not_allowed(&self, verb: Verb) -> VerbError {
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
    pub(super) fn wakers(&mut self) -> [Option<Waker>; 2] {
        [self.driver.take(), self.events.take_waker()]
    }
}

pub(super) fn wake(wakers: [Option<Waker>; 2]) {
    wakers.into_iter().flatten().for_each(Waker::wake);
}
