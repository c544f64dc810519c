//! All that is known of a job, as it lies under its lock.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use crate::copy::{OpKind, Side};
use crate::job::event::EventQueue;
use crate::job::policy::is_no_space;
use crate::job::stage::Stage;
use crate::job::{
    Cancel, ErrorAction, ErrorEvent, Event, IoStatus, JobError, JobOptions, Progress, Status, Verb,
    VerbError, Verification,
};
use crate::mirror::MirrorInfo;
use crate::node::QuiesceGuard;

pub(super) struct State {
    pub(super) kind: &'static str,
    pub(super) options: JobOptions,
    /// Whether it may be asked to complete.
    pub(super) has_switch: bool,
    /// What only mirrors have, but for an active commit.
    pub(super) mirror: Option<MirrorInfo>,
    /// Whether the target of a mirror can be compared.
    pub(super) can_verify: bool,
    pub(super) wants_verify: bool,
    pub(super) verification: Option<Verification>,
    pub(super) status: Status,
    pub(super) was_started: bool,
    pub(super) is_user_paused: bool,
    pub(super) holds: usize,
    pub(super) io_status: IoStatus,
    pub(super) cancel: Option<Cancel>,
    pub(super) is_completing: bool,
    pub(super) is_finalizing: bool,
    pub(super) retry_now: bool,
    pub(super) stage: Stage,
    /// Holds the guest of a switch that was committed, until all of the group are.
    pub(super) guard: Option<QuiesceGuard>,
    /// Whether it is to be cancelled by force should its switch be dropped.
    pub(super) is_doomed: bool,
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
    pub(super) fn new(kind: &'static str, options: JobOptions) -> Self {
        Self {
            kind,
            options,
            has_switch: false,
            mirror: None,
            can_verify: false,
            wants_verify: false,
            verification: None,
            status: Status::Created,
            was_started: false,
            is_user_paused: false,
            holds: 0,
            io_status: IoStatus::Ok,
            cancel: None,
            is_completing: false,
            is_finalizing: false,
            retry_now: false,
            stage: Stage::None,
            guard: None,
            is_doomed: false,
            is_machine_gone: false,
            is_busy: false,
            progress: Progress::default(),
            error: None,
            events: EventQueue::default(),
            driver: None,
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_user_paused || self.holds > 0
    }

    /// Whether what it does when a device fails is the same for both: it is an active commit.
    pub(super) fn has_one_policy(&self) -> bool {
        self.has_switch && self.mirror.is_none()
    }

    pub(super) fn drop_user_pause(&mut self) {
        self.is_user_paused = false;
        self.io_status = IoStatus::Ok;
    }

    /// It ends with success and without a switch. Nothing keeps it from that.
    pub(super) fn cancel_softly(&mut self) {
        self.cancel = self.cancel.max(Some(Cancel::Soft));
        self.drop_user_pause();
        self.retry_now = true;
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

    /// Whether it may be told that it is to commit, if the others of its group may.
    pub(super) fn is_prepared(&self) -> bool {
        let is_prepared = matches!(self.stage, Stage::Prepared(_));
        is_prepared && self.cancel != Some(Cancel::Force) && !self.is_paused()
    }

    pub(super) fn is_named(&self, id: &str) -> bool {
        self.status != Status::Null && self.options.id.as_deref() == Some(id)
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.status, Status::Concluded | Status::Null)
    }

    /// The result of a job that is over.
    pub(super) fn result(&self) -> Option<Result<(), JobError>> {
        self.is_over()
            .then(|| self.error.clone().map_or(Ok(()), Err))
    }

    /// A device failed: tells it, and does what the policy says.
    pub(super) fn device_failed(
        &mut self,
        side: Side,
        operation: OpKind,
        error: io::Error,
    ) -> ErrorAction {
        let policy = match side {
            // Reading is what fails for good: writing to a buffer has other ways out.
            Side::Source | Side::Buffer => self.options.on_source_error,
            Side::Target => self.options.on_target_error,
        };
        let mut action = policy.action(&error);
        if action == ErrorAction::Stop && !self.status.allows(Verb::Resume) {
            // Nobody could resume it. It is tried again instead; cancelling ends that.
            action = ErrorAction::Ignore;
        }
        if self.cancel == Some(Cancel::Force) {
            // It ends anyway, and what is given up on the way is no news.
            return ErrorAction::Ignore;
        }
        self.note_failure(side, operation, error, action);
        action
    }

    /// A device failed, and that is done about it.
    pub(super) fn note_failure(
        &mut self,
        side: Side,
        operation: OpKind,
        error: io::Error,
        action: ErrorAction,
    ) {
        if self.cancel == Some(Cancel::Force) {
            return;
        }
        let error = Arc::new(error);
        let is_no_space = is_no_space(&error);
        self.tell(Event::Error(ErrorEvent {
            side,
            operation,
            action,
            is_no_space,
            error: Arc::clone(&error),
            count: 1,
        }));
        match action {
            ErrorAction::Report => {
                self.error.get_or_insert(JobError::Io {
                    side,
                    operation,
                    error,
                });
            }
            ErrorAction::Stop => {
                self.is_user_paused = true;
                if self.io_status == IoStatus::Ok {
                    self.io_status = if is_no_space {
                        IoStatus::NoSpace
                    } else {
                        IoStatus::Failed
                    };
                }
            }
            ErrorAction::Ignore => {}
        }
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
        assert!(
            self.error.is_some() || self.stage == Stage::Committed,
            "a job succeeds by a commit"
        );
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
}
