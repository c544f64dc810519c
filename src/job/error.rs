//! Why a job did not succeed, and why a verb was refused.

use std::io;
use std::sync::Arc;

use crate::copy::{OpKind, Side};
use crate::job::{JobOptionsError, StartError, Status, Verb};
use crate::node::NotSaved;
use crate::units::ByteRange;

/// Why a job did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A device failed, and the policy was to fail with it; or it failed at what a guest write waited for, and a backup
    /// is to [fail then](crate::OnCbwError), which no policy of errors changes.
    #[error("{side} failed: {operation:?}: {error}")]
    Io {
        /// The device.
        side: Side,
        /// What was tried.
        operation: OpKind,
        /// How it failed.
        #[source]
        error: Arc<io::Error>,
    },
    /// A driver was run whose device is not the one that the job was made for, as far as their
    /// [limits](crate::io::BlockDevice::limits) tell. Nothing was asked of it.
    #[error("the driver's {side} is not the device that the job was made for")]
    WrongDevice {
        /// Which of them.
        side: Side,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled {
        /// Operations that had not ended within [the time of grace](crate::JobOptions::cancel_grace); and the guest's
        /// [active writes](crate::CopyMode::WriteBlocking) that were at the target, for which no job waits. They may
        /// still reach it.
        abandoned: usize,
    },
    /// What did the work was dropped before it had come to an end.
    #[error("the job was dropped before its end")]
    Dropped,
    /// What a guest write was to overwrite could not be saved in time. The guest went on, and with it the
    /// instant that was to be backed up was lost.
    #[error("a guest write to {range} went on before what it overwrites was saved: {why}")]
    NotSaved {
        /// What the guest write covers.
        range: ByteRange,
        /// Why it was not.
        why: NotSaved,
    },
    /// The bitmap that the job was to go by could not be had, or there was no memory for another.
    #[error(transparent)]
    Bitmap(#[from] Arc<crate::node::BitmapError>),
    /// The guest's writes could not be recorded.
    #[error(transparent)]
    Track(#[from] Arc<crate::node::TrackError>),
}

impl From<StartError> for JobError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Bitmap(error) => JobError::Bitmap(Arc::new(error)),
            StartError::Track(error) => JobError::Track(Arc::new(error)),
        }
    }
}

/// Why a verb was refused. Nothing has changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerbError {
    /// Not in this status.
    #[error("job {id}: {verb} is not allowed while it is {status}")]
    NotAllowed {
        /// The job's name, or `(internal)`.
        id: String,
        /// What was asked.
        verb: Verb,
        /// Where the job is.
        status: Status,
    },
    /// The user has paused it already.
    #[error("the job is paused already")]
    AlreadyPaused,
    /// The user has not paused it.
    #[error("the job was not paused by its user")]
    NotPaused,
    /// It was cancelled and will not complete.
    #[error("the job was cancelled and cannot be completed")]
    CannotComplete,
    /// Its end has begun and cannot be stopped.
    #[error("the job is being finalized")]
    Finalizing,
    /// Only a mirror that is ready, and whose end was not asked for, can be verified, if its target can be compared.
    #[error("the job is not a mirror in step whose target can be compared")]
    CannotVerify,
    /// Jobs of this kind do not have that option.
    #[error("jobs of this kind have no option {0}")]
    NoSuchOption(&'static str),
    /// An internal job that an error would stop.
    #[error(transparent)]
    Options(#[from] JobOptionsError),
}
