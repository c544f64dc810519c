//! What a job is made with, and what can be wrong with that.

use std::time::Duration;

use crate::job::{JobGroup, Jobs, OnError};

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
    /// A name for people and logs: a letter, then letters, digits, `-`, `.` and `_`. No other job of the
    /// same [manager](Self::jobs) may have it. A job without one is internal: it tells no events, and may not be stopped by an error, for nobody would resume
    /// it. Default none.
    pub id: Option<String>,
    /// The manager that knows it from now on. Keep a handle: when the last one is dropped the job is cancelled by
    /// force. Default none.
    pub jobs: Option<Jobs>,
    /// The jobs that end together with it: all with success, or none. Default none.
    pub group: Option<JobGroup>,
    /// The most to copy, in bytes per second; 0 for no limit. Default 0.
    pub speed: u64,
    /// What to do when the source fails.
    pub on_source_error: OnError,
    /// What to do when the target fails.
    pub on_target_error: OnError,
    /// Whether the job goes to its end once it may. Else it waits, in step, for
    /// [`finalize`](crate::Job::finalize), and its whole group with it. Default yes.
    pub auto_finalize: bool,
    /// Whether the job is forgotten once it is over. Else it waits for [`dismiss`](crate::Job::dismiss). Forgotten,
    /// its [status](crate::Job::query) is [null](crate::Status::Null), and never seen to be
    /// [concluded](crate::Status::Concluded); the events tell both. Default yes.
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
            jobs: None,
            group: None,
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
    /// The job has one policy for both devices, and was given two.
    #[error("a commit has one error policy for both devices")]
    TwoPolicies,
    /// Another job of the same manager has that name. One that is over has it until it is dismissed.
    #[error("there is a job {0:?} already")]
    IdInUse(String),
    /// The manager is being shut down.
    #[error("all jobs are being shut down")]
    ShuttingDown,
    /// A member of the group has begun to end.
    #[error("a job of the group has begun to end")]
    GroupEnding,
}

impl JobOptions {
    pub(super) fn check(&self) -> Result<(), JobOptionsError> {
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

pub(super) fn check_somebody_resumes(policies: [OnError; 2]) -> Result<(), JobOptionsError> {
    let stops = policies
        .iter()
        .any(|policy| matches!(policy, OnError::Stop | OnError::Enospc | OnError::Auto));
    if stops {
        Err(JobOptionsError::NobodyResumes)
    } else {
        Ok(())
    }
}
