//! Where a job is in its life, where it may go from there, and what may be asked of it.
//!
//! ```text
//! created ──▶ running ◀──▶ paused
//!    │           │
//!    │           ▼
//!    │         ready ◀──▶ standby
//!    │           │
//!    │           ▼
//!    │        waiting ──▶ pending ──▶ concluded ──▶ null
//!    │           │           │           ▲
//!    └───────────┴───────────┴▶ aborting ┘
//! ```
//!
//! (Running goes straight to waiting, too, and running and ready to aborting.) Both tables are data, and
//! every change of status goes through the one function that looks it up.

use std::fmt;

use Status::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
};

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// It exists and was not started.
    Created,
    /// It works.
    Running,
    /// Stopped on request before it was ready. No operation is in flight, and none will be issued.
    Paused,
    /// In step with the guest; waits to be completed or cancelled.
    Ready,
    /// Stopped on request after it was ready. No operation is in flight, and none will be issued.
    Standby,
    /// Its own work is done; others of its group are not.
    Waiting,
    /// All of its group are done; finalization is outstanding.
    Pending,
    /// Failed or cancelled; what it held is being given back.
    Aborting,
    /// Over. Its result can be read until it is dismissed.
    Concluded,
    /// Dismissed.
    Null,
}

/// What may be asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// Begin to work.
    Start,
    /// End without finishing.
    Cancel,
    /// Stop working for a while.
    Pause,
    /// Go on working.
    Resume,
    /// Change the speed limit.
    SetSpeed,
    /// Change options that can be changed while it runs.
    Change,
    /// Come to an end, now that it is ready.
    Complete,
    /// Do what was left for last.
    Finalize,
    /// Forget a job that is over.
    Dismiss,
}

impl Status {
    /// All of them, in the order of a life.
    pub const ALL: [Status; 10] = [
        Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
    ];

    /// Whether a job may go from here to `next`. Aborting twice is no step.
    #[must_use]
    pub fn may_become(self, next: Status) -> bool {
        let allowed: &[Status] = match self {
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Concluded, Aborting],
            Aborting => &[Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        allowed.contains(&next)
    }

    /// Whether `verb` may be asked of a job in this status. It may be refused for other reasons.
    #[must_use]
    pub fn allows(self, verb: Verb) -> bool {
        let allowed: &[Status] = match verb {
            Verb::Start => &[Created],
            Verb::Cancel => &[Created, Running, Paused, Ready, Standby, Waiting, Pending],
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                &[Created, Running, Paused, Ready, Standby]
            }
            Verb::Complete => &[Ready, Standby],
            Verb::Finalize => &[Pending],
            Verb::Dismiss => &[Concluded],
        };
        allowed.contains(&self)
    }

    /// Whether the job is in step with the guest and waits for its end.
    #[must_use]
    pub fn is_ready(self) -> bool {
        matches!(self, Ready | Standby)
    }

    /// Whether the job's own work is over.
    #[must_use]
    pub fn is_completed(self) -> bool {
        matches!(self, Waiting | Pending | Aborting | Concluded | Null)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        })
    }
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 9] = [
        Verb::Start,
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Change,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Start => "start",
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Change => "change",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        })
    }
}
