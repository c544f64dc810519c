//! What a job tells of itself.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use crate::copy::{OpKind, Side};
use crate::job::{ErrorAction, JobError, Progress, Status};
use crate::mirror::Convergence;
use crate::units::{ByteRange, Granularity};

/// Errors nobody has taken yet, of which the oldest are forgotten.
const ERRORS_MAX: usize = 64;
/// Differences nobody has taken yet; more are merged.
const DIFFERENCES_MAX: usize = 64;

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
    /// The target was found to differ from the source, and no guest write is the reason. It is dirty by now, and
    /// copied as anything else.
    Differs(Difference),
    /// The comparing of the whole disk has come to its end.
    Verified(Verification),
    /// Something was asked for that is done otherwise.
    Warning(Warning),
    /// The guest was held for as long as it [may be](crate::MirrorOptions::hold_max), for the instant at which the job
    /// starts or ends, and a write of its own, a device, or another job of the group did not get on. It writes again, and
    /// all is tried anew, as often as need be: of several times in a row the first is told.
    HeldInVain,
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

/// What was found to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// From the first to the last granule. Neighbours in a row that nobody took are one. Should more than 64 wait
    /// to be taken, the last one is made to cover what comes behind it, too, and what lies between.
    pub range: ByteRange,
    /// Bytes of the granules in it that differ.
    pub bytes: u64,
}

/// How far the comparing of a whole disk is, and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// Whether it goes on, or how it has ended.
    pub state: Verified,
    /// Bytes that were compared. What was dirty anyway was not.
    pub compared: u64,
    /// Bytes of the granules that differ, without what a guest write had to do with.
    pub differing: u64,
}

/// Where the comparing of a whole disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verified {
    /// It goes on.
    Running,
    /// All was compared, or copied meanwhile.
    Whole,
    /// The job has come to its end before. Some was not compared; what was found and not told yet was copied all the
    /// same, if the job has succeeded.
    Cut,
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
    differences: usize,
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
        if let Event::Differs(difference) = &event {
            if self.merge_difference(difference) {
                return;
            }
            self.differences += 1;
        }
        self.events.push_back(event);
    }

    pub(super) fn pop(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        self.errors -= usize::from(matches!(event, Event::Error(_)));
        self.differences -= usize::from(matches!(event, Event::Differs(_)));
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

    /// Nothing is forgotten, but where too much waits it is told less exactly.
    fn merge_difference(&mut self, new: &Difference) -> bool {
        let is_full = self.differences >= DIFFERENCES_MAX;
        let last = match is_full {
            true => self
                .events
                .iter_mut()
                .rfind(|event| matches!(event, Event::Differs(_))),
            false => self.events.back_mut(),
        };
        let Some(Event::Differs(last)) = last else {
            return false;
        };
        let (old, range) = (last.range, new.range);
        if !is_full && old.end() != range.start() {
            return false;
        }
        let (start, end) = (old.start().min(range.start()), old.end().max(range.end()));
        last.range = (start..end).into();
        last.bytes = last.bytes.saturating_add(new.bytes);
        true
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
