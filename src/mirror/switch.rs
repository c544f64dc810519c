//! The instant at which the guest may go over to the target, as a value.

use std::fmt;
use std::time::Duration;

use crate::job::{Job, SwitchState};
use crate::node::QuiesceGuard;

/// The instant at which source and target are equal, for as long as this lives.
///
/// The guest is held: no write of its is in flight, and none begins. Both disks are equal, and the target
/// is flushed. Point the guest's path to the target, its reads too, which pass no gate, then
/// [`commit`](Self::commit). If that does not
/// work out, drop this: the guest goes on with the source, the job stays in step with it, and may be
/// completed again. Nothing is lost either way.
#[must_use = "dropping the switch declines it"]
pub struct Switch {
    job: Job,
    held_since: Duration,
    /// Opens the node's gate when it is dropped, after everything else here.
    guard: QuiesceGuard,
    is_committed: bool,
}

impl Switch {
    /// The job must have noted that the switch is out.
    pub(super) fn new(job: Job, held_since: Duration, guard: QuiesceGuard) -> Self {
        Self {
            job,
            held_since,
            guard,
            is_committed: false,
        }
    }

    /// The guest's disk is the target now. The guest goes on, and the job is over with success once it is
    /// polled.
    pub fn commit(mut self) {
        self.is_committed = true;
    }

    /// When the guest was held, by the clock of [`Mirror::poll`](crate::Mirror::poll).
    #[must_use]
    pub fn held_since(&self) -> Duration {
        self.held_since
    }

    /// The guard that holds the guest, for those who exchange a device under it.
    pub fn guard(&self) -> &QuiesceGuard {
        &self.guard
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Before the guest goes on: nothing may be copied to a target that the guest writes to.
        self.job.set_switch(if self.is_committed {
            SwitchState::Committed
        } else {
            SwitchState::Declined
        });
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch")
            .field("held_since", &self.held_since)
            .finish_non_exhaustive()
    }
}
