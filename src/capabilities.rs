//! What this build can do, for those who decide at run time what to offer.

use crate::backup::Backup;
use crate::job::JobKind;
use crate::mirror::Mirror;

/// What this build can do.
///
/// # Examples
///
/// ```
/// use blockjob::{Verb, capabilities};
///
/// let mirror = capabilities().jobs.iter().find(|kind| kind.name == "mirror").unwrap();
/// assert!(mirror.verbs.contains(&Verb::Complete));
/// assert!(mirror.options.contains(&"granularity"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The types of jobs that can be made.
    pub jobs: &'static [JobKind],
}

/// What this build can do. It is the same at each call.
#[must_use]
pub fn capabilities() -> Capabilities {
    const JOBS: &[JobKind] = &[Mirror::KIND, Mirror::COMMIT, Backup::KIND];
    Capabilities { jobs: JOBS }
}
