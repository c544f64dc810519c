//! What there is to know of a job at one moment.

use crate::job::{Cancel, IoStatus, JobError, JobGroup, OnError, Status, Verification};
use crate::mirror::MirrorInfo;

/// How far a job is, in bytes.
///
/// Before it is ready, equal numbers do not mean that it is done: wait for [`Event::Ready`](crate::Event::Ready).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Done. Never falls.
    pub current: u64,
    /// Done and known to be left. Never below `current`; may move both ways.
    pub total: u64,
}

/// Everything there is to know of a job at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct JobInfo {
    /// Its name, if it has one.
    pub id: Option<String>,
    /// The jobs that end together with it, if it was made as one of several.
    pub group: Option<JobGroup>,
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
    /// How many [`Hold`](crate::Hold)s there are.
    pub holds: usize,
    /// What it does when the source fails.
    pub on_source_error: OnError,
    /// What it does when the target fails.
    pub on_target_error: OnError,
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
    /// What only mirrors have, but for an active commit.
    pub mirror: Option<MirrorInfo>,
    /// Of a mirror: what came of the [verification](crate::Job::verify) that runs, or of the last one.
    pub verification: Option<Verification>,
    /// What it failed with. `None` in [`Status::Concluded`] means success.
    pub error: Option<JobError>,
}
