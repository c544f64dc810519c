//! What a job tells of itself.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use crate::copy::{OpKind, Side};
use crate::job::{ErrorAction, JobError, Progress, Status};
use crate::mirror::Convergence;
use crate::units::Granularity;

/// Errors nobody has taken yet, of which the oldest are forgotten.
const ERRORS_MAX: usize = 64;

/// Something that happened to a job. The order is the same for the same inputs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// It went to another status; the first one is [`Status::Created`].
    Status(Status),
    /// The target is in step: at that moment there was nothing left to copy.
    Ready {
        /// With both numbers equal.
        progress: Progress,
        /// Bytes per second, 0 for no limit.
        speed: u64,
    },
    /// It waits to be finalized.
    Pending,
    /// A device failed. What could not be copied is dirty again by now.
    Error(ErrorEvent),
    /// Something was asked for that is done otherwise.
    Warning(Warning),
    /// The guest writes more than can be copied, so this [adaptive](crate::CopyMode::Adaptive) mirror would never be
    /// ready, or falls behind. From now on the guest's writes go to the target at once. A guest that wrote less would
    /// do as well.
    Outpaced(Convergence),
    /// It is over, by success or by an error of its own; everything it held is released.
    Completed {
        /// At the end.
        progress: Progress,
        /// Bytes per second, 0 for no limit.
        speed: u64,
        /// What it failed with; `None` for success.
        error: Option<JobError>,
    },
    /// It is over because it was cancelled by force; everything it held is released.
    Cancelled {
        /// At the end.
        progress: Progress,
        /// Bytes per second, 0 for no limit.
        speed: u64,
        /// An error of its own that came before, if there was one.
        error: Option<JobError>,
    },
}

/// What is done otherwise than it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Dirty data is tracked in the granules of the bitmap that the job goes by, or of the checkpoint, not in
    /// those asked for.
    Granularity {
        /// What was asked for.
        asked: Granularity,
        /// What is used.
        used: Granularity,
    },
}

/// An error of a device, and what is done about it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ErrorEvent {
    /// The device that failed.
    pub side: Side,
    /// What was tried, with its range.
    pub operation: OpKind,
    /// What is done about it.
    pub action: ErrorAction,
    /// Whether it was for want of space.
    pub is_no_space: bool,
    /// The error.
    pub error: Arc<std::io::Error>,
    /// How many of the same kind this stands for: errors in a row that nobody took are merged, and the
    /// last one is told.
    pub count: u64,
}

/// Events nobody has taken yet.
#[derive(Default)]
pub(super) struct EventQueue {
    events: VecDeque<Event>,
    errors: usize,
    /// Who waits for the next one.
    waker: Option<Waker>,
}

impl EventQueue {
    pub(super) fn push(&mut self, event: Event) {
        if let Event::Error(error) = &event {
            if self.merge(error) {
                return;
            }
            self.make_room_for_error();
            self.errors += 1;
        }
        self.events.push_back(event);
    }

    pub(super) fn pop(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        self.errors -= usize::from(matches!(event, Event::Error(_)));
        Some(event)
    }

    /// Returns the waker of before, to be dropped outside of any lock: that, too, is foreign code.
    #[must_use]
    pub(super) fn set_waker(&mut self, waker: Waker) -> Option<Waker> {
        self.waker.replace(waker)
    }

    /// The waker to call, outside of any lock, if there is something to take.
    pub(super) fn take_waker(&mut self) -> Option<Waker> {
        if self.events.is_empty() {
            return None;
        }
        self.waker.take()
    }

    fn merge(&mut self, new: &ErrorEvent) -> bool {
        let Some(Event::Error(last)) = self.events.back_mut() else {
            return false;
        };
        let is_same = (last.side, last.action, last.is_no_space)
            == (new.side, new.action, new.is_no_space)
            && last.error.kind() == new.error.kind();
        if is_same {
            *last = ErrorEvent {
                count: last.count.saturating_add(1),
                ..new.clone()
            };
        }
        is_same
    }

    fn make_room_for_error(&mut self) {
        if self.errors < ERRORS_MAX {
            return;
        }
        let oldest = self
            .events
            .iter()
            .position(|event| matches!(event, Event::Error(_)))
            .expect("as many as counted");
        self.events.remove(oldest);
        self.errors -= 1;
    }
}
