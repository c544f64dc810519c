//! What becomes of the bitmap that a job goes by.

use crate::node::ClaimFor;

/// What becomes, at the end of a job, of the named bitmap that it goes by.
///
/// While the job runs the bitmap is in use, and what the guest writes is recorded beside it. What is left in
/// it at the end is told by each type of job that has such a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BitmapMode {
    /// The bitmap keeps all that was dirty, whatever happens: for differences to one and the same copy.
    Never,
    /// What was copied is clean if the job succeeds, else the bitmap keeps all: for a chain of increments.
    OnSuccess,
    /// What was copied is clean, also if the job fails: another goes on with the rest.
    Always,
}

impl BitmapMode {
    /// What a bitmap is claimed for by a job that goes by it.
    pub(crate) fn claim_for(self) -> ClaimFor {
        match self {
            BitmapMode::Never => ClaimFor::Reading,
            BitmapMode::OnSuccess | BitmapMode::Always => ClaimFor::Change,
        }
    }
}
