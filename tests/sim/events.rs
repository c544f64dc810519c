//! The order in which a job tells of itself.

use blockjob::{Event, Status};

/// What came of all the events of a job.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// The last status.
    pub status: Option<Status>,
    pub was_started: bool,
    pub was_ready: bool,
}

/// Each status may follow the one before; being ready is told once at most, and the end exactly once if it was started:
/// completed without an error if it `is_good`, else with one, or cancelled.
pub(crate) fn check_events(events: &[Event], is_good: bool) -> Told {
    let mut status = None;
    let (mut ends, mut readies, mut was_started) = (0, 0, false);
    for event in events {
        match event {
            Event::Status(next) => {
                let is_legal = match status {
                    None => *next == Status::Created,
                    Some(status) => Status::may_become(status, *next),
                };
                assert!(is_legal, "{status:?} → {next:?}");
                status = Some(*next);
                was_started |= *next == Status::Running;
            }
            Event::Ready { .. } => readies += 1,
            Event::Completed { error, .. } => {
                assert_eq!(error.is_none(), is_good);
                ends += 1;
            }
            Event::Cancelled { .. } => {
                assert!(!is_good);
                ends += 1;
            }
            _ => {}
        }
    }
    assert_eq!(ends, usize::from(was_started), "exactly one end is told");
    assert!(readies <= 1, "ready is told once");
    Told {
        status,
        was_started,
        was_ready: readies > 0,
    }
}
