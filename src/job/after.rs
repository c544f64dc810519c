//! What is left to do when a change is made and its locks are released.

use std::sync::Arc;
use std::task::Waker;

use crate::job::Shared;
use crate::job::registry::Registry;
use crate::job::state::State;
use crate::node::QuiesceGuard;

/// What is to be done when all locks are released, for it is foreign code.
#[derive(Default)]
pub(super) struct After {
    /// Guests that go on.
    pub(super) guards: Vec<QuiesceGuard>,
    wake: Vec<Waker>,
    /// Only dropped: that is foreign code, too.
    pub(super) drop: Vec<Waker>,
    pub(super) left: Vec<Arc<Shared>>,
    pub(super) over: Vec<Arc<Registry>>,
}

impl After {
    /// The machine, and who waits for events, are to be woken.
    pub(super) fn wake(&mut self, state: &mut State) {
        self.wake.extend(state.driver.take());
        self.listen(state);
    }

    /// Who waits for events is to be woken, if there is one.
    pub(super) fn listen(&mut self, state: &mut State) {
        self.wake.extend(state.events.take_waker());
    }

    /// No lock may be held.
    pub(super) fn run(self) {
        // Guests first: they have waited longest.
        drop((self.guards, self.drop, self.left));
        self.wake.into_iter().for_each(Waker::wake);
        self.over.iter().for_each(|registry| registry.job_over());
    }
}
