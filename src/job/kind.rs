//! What a type of job can do, for those who decide at run time what to offer.

use crate::job::{OnError, Verb};

/// What jobs of one type are like in this build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobKind {
    /// As in [`JobInfo::kind`](crate::JobInfo::kind).
    pub name: &'static str,
    /// What may be asked of one, each in its statuses.
    pub verbs: &'static [Verb],
    /// What it may do when a device fails.
    pub policies: &'static [OnError],
    /// The names of its options, beside [those of every job](JobKind::COMMON_OPTIONS).
    pub options: &'static [&'static str],
    /// What [`Job::change`](crate::Job::change) may change.
    pub changes: &'static [&'static str],
}

impl JobKind {
    /// The names of the options that every job has: the fields of [`JobOptions`](crate::JobOptions).
    pub const COMMON_OPTIONS: &'static [&'static str] = &[
        "id",
        "jobs",
        "group",
        "speed",
        "on_source_error",
        "on_target_error",
        "auto_finalize",
        "auto_dismiss",
        "cancel_grace",
    ];
}
