//! What the machine does with its job.

use std::io;
use std::task::Waker;
use std::time::Duration;

use parking_lot::MutexGuard;

use crate::copy::{OpKind, Side};
use crate::job::after::After;
use crate::job::stage::{Stage, Vote};
use crate::job::state::State;
use crate::job::{
    Cancel, Difference, ErrorAction, Event, Job, JobError, Progress, Status, Verification, Warning,
};
use crate::mirror::{Convergence, CopyMode, MirrorInfo};
use crate::node::QuiesceGuard;
use crate::units::ByteRange;

/// What the machine must know of what was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) status: Status,
    pub(crate) is_paused: bool,
    pub(crate) cancel: Option<Cancel>,
    pub(crate) is_completing: bool,
    pub(crate) is_finalizing: bool,
    /// Whether it goes on to its end only from *pending*: it is one of a group, or waits to be told.
    pub(crate) ends_by_finalize: bool,
    pub(crate) speed: u64,
    /// Of a mirror.
    pub(crate) copy_mode: CopyMode,
    pub(crate) wants_verify: bool,
    pub(crate) stage: Stage,
    pub(crate) has_failed: bool,
    /// Whether delayed tries are to be made at once: the user has resumed or cancelled the job, or
    /// changed a policy. Stays until [`Job::retries_made`], for the job may be held meanwhile.
    pub(crate) retry_now: bool,
}

impl Job {
    /// What was asked; `waker` is called when something more is.
    pub(crate) fn asked(&self, waker: &Waker) -> Asked {
        let state = self.lock_with_driver(waker);
        Asked {
            status: state.status,
            is_paused: state.is_paused(),
            cancel: state.cancel,
            is_completing: state.is_completing,
            is_finalizing: state.is_finalizing,
            ends_by_finalize: !self.shared.is_alone || !state.options.auto_finalize,
            speed: state.options.speed,
            copy_mode: state
                .mirror
                .map_or(CopyMode::Background, |mirror| mirror.copy_mode),
            wants_verify: state.wants_verify,
            stage: state.stage,
            has_failed: state.error.is_some(),
            retry_now: state.retry_now,
        }
    }

    /// The state, with the waker in it unless the job is over: nobody would take it out again, and with it goes
    /// what drives the job, handles of it among that. It is cloned, and the one before dropped, outside of the
    /// lock.
    fn lock_with_driver(&self, waker: &Waker) -> MutexGuard<'_, State> {
        let state = self.shared.lock();
        let known = state.driver.as_ref();
        if state.is_over() || known.is_some_and(|known| known.will_wake(waker)) {
            return state;
        }
        drop(state);
        let waker = waker.clone();
        let mut state = self.shared.lock();
        let unused = match state.is_over() {
            true => Some(waker),
            false => state.driver.replace(waker),
        };
        drop(state);
        drop(unused);
        self.shared.lock()
    }

    /// Tells that something is done otherwise than it was asked for.
    pub(crate) fn warn(&self, warning: Warning) {
        self.change_state(|state| state.tell(Event::Warning(warning)));
    }

    /// Tells that the guest was held, and is let go, with nothing gained.
    pub(crate) fn held_in_vain(&self) {
        self.change_state(|state| state.tell(Event::HeldInVain));
    }

    /// Nothing is delayed any more.
    pub(crate) fn retries_made(&self) {
        self.shared.lock().retry_now = false;
    }

    pub(crate) fn cancel_grace(&self) -> Option<Duration> {
        self.shared.lock().options.cancel_grace
    }

    /// Goes to another status.
    pub(crate) fn go_to(&self, next: Status) {
        self.change_state(|state| state.go_to(next));
    }

    /// Is in step for the first time: nothing is left to copy.
    pub(crate) fn become_ready(&self, progress: Progress) {
        self.change_state(|state| {
            state.progress = progress;
            state.go_to(Status::Ready);
            let speed = state.options.speed;
            state.tell(Event::Ready { progress, speed });
        });
    }

    /// Its own work is done. It waits for the others of its group, and to be finalized.
    pub(crate) fn done(&self) {
        self.together(|members, after| members.done(&self.shared, after));
    }

    /// It could hold its guest at once for its end: it may, when its stage is [`Stage::Closing`].
    pub(crate) fn near(&self) {
        self.together(|members, after| members.near(&self.shared, after));
    }

    /// Everything that can fail is done, and it holds still.
    /// Whether the others are, too: then its stage has changed.
    #[must_use]
    pub(crate) fn prepared(&self, vote: Vote) -> bool {
        self.together(|members, after| members.prepared(&self.shared, vote, after))
    }

    /// It is about to let its guest go. To be told before it does.
    pub(crate) fn let_go(&self) {
        self.together(|members, after| members.let_go(&self.shared, after));
    }

    /// It has voted, and cannot wait any longer for the others.
    pub(crate) fn give_up(&self) {
        self.together(|members, after| members.give_up(&self.shared, after));
    }

    /// The switch is about to be handed out; not if the group has changed its mind.
    #[must_use]
    pub(crate) fn take_switch(&self) -> bool {
        self.together(|_, _| {
            let mut state = self.shared.lock();
            let is_granted = state.stage == Stage::Granted;
            if is_granted {
                state.stage = Stage::Held;
            }
            is_granted
        })
    }

    /// The caller has committed its switch.
    pub(crate) fn vote(&self, guard: QuiesceGuard) {
        self.together(|members, after| members.vote(&self.shared, guard, after));
    }

    /// The caller has dropped its switch.
    pub(crate) fn decline(&self, guard: QuiesceGuard) {
        self.together(|members, after| members.decline(&self.shared, guard, after));
    }

    /// The guest that must be pointed back before it goes on. `None` while the caller is at it.
    pub(crate) fn take_back(&self) -> Option<QuiesceGuard> {
        self.shared.lock().guard.take()
    }

    /// The caller has pointed its guest back.
    pub(crate) fn pointed_back(&self) {
        self.note(|state| state.stage = Stage::None);
    }

    /// For sabotage: as if there had been no switch.
    pub(crate) fn forget_commit(&self) {
        self.together(|_, _| self.shared.lock().stage = Stage::None);
    }

    pub(crate) fn copy_mode(&self) -> CopyMode {
        let mirror = self.shared.lock().mirror;
        mirror.map_or(CopyMode::Background, |mirror| mirror.copy_mode)
    }

    /// It has a switch. One without a copy mode is an active commit.
    pub(crate) fn be_mirror(&self, mode: Option<CopyMode>) {
        let mut state = self.shared.lock();
        state.has_switch = true;
        state.mirror = mode.map(|copy_mode| MirrorInfo {
            copy_mode,
            ..MirrorInfo::default()
        });
    }

    /// What more is to be told of a mirror. The mode is the user's.
    pub(crate) fn tell_of_mirror(&self, info: MirrorInfo) {
        if let Some(mirror) = &mut self.shared.lock().mirror {
            let copy_mode = mirror.copy_mode;
            *mirror = MirrorInfo { copy_mode, ..info };
        }
    }

    /// Tells that a guest writes more than can be copied.
    pub(crate) fn outpaced(&self, convergence: Convergence) {
        self.change_state(|state| state.tell(Event::Outpaced(convergence)));
    }

    pub(crate) fn set_can_verify(&self, can_verify: bool) {
        self.shared.lock().can_verify = can_verify;
    }

    /// What was asked for is begun.
    pub(crate) fn verify_begun(&self) {
        self.shared.lock().wants_verify = false;
    }

    pub(crate) fn set_verification(&self, verification: Verification) {
        self.shared.lock().verification = Some(verification);
    }

    /// The verification has come to its end.
    pub(crate) fn tell_verified(&self, verification: Verification) {
        self.change_state(|state| {
            state.verification = Some(verification);
            state.tell(Event::Verified(verification));
        });
    }

    /// Something differs for good.
    pub(crate) fn tell_differs(&self, range: ByteRange) {
        let bytes = range.len();
        self.change_state(|state| state.tell(Event::Differs(Difference { range, bytes })));
    }

    pub(crate) fn publish(&self, progress: Progress, is_busy: bool) {
        let mut state = self.shared.lock();
        state.progress = progress;
        state.is_busy = is_busy;
    }

    /// A device failed: tells it, and does what the policy says to the status. What failed must be dirty
    /// again.
    pub(crate) fn device_failed(
        &self,
        side: Side,
        operation: OpKind,
        error: io::Error,
    ) -> ErrorAction {
        self.together(|members, after| {
            let mut state = self.shared.lock();
            let action = state.device_failed(side, operation, error);
            after.listen(&mut state);
            drop(state);
            if action == ErrorAction::Report {
                members.fail(&self.shared, after);
            }
            action
        })
    }

    /// A device failed at something that a guest waits for: tells it. No policy applies; the job fails
    /// with it, or goes on.
    pub(crate) fn guest_copy_failed(
        &self,
        side: Side,
        operation: OpKind,
        error: io::Error,
        is_fatal: bool,
    ) {
        self.together(|members, after| {
            let mut state = self.shared.lock();
            let action = match is_fatal {
                true => ErrorAction::Report,
                false => ErrorAction::Ignore,
            };
            state.note_failure(side, operation, error, action);
            after.listen(&mut state);
            drop(state);
            if is_fatal {
                members.fail(&self.shared, after);
            }
        });
    }

    /// Fails with an error that no policy applies to.
    pub(crate) fn fail(&self, error: JobError) {
        self.together(|members, after| {
            self.shared.lock().error.get_or_insert(error);
            members.fail(&self.shared, after);
        });
    }

    /// Fails before its devices are asked for anything, unless how it ends is decided.
    pub(crate) fn fail_for(&self, side: Side) {
        self.together(|members, after| {
            let mut state = self.shared.lock();
            if state.is_over() || state.stage.is_decided() {
                return;
            }
            state.error.get_or_insert(JobError::WrongDevice { side });
            drop(state);
            members.fail(&self.shared, after);
        });
    }

    /// The machine is dropped, and has released everything. A job whose switch is out is ended by whoever
    /// holds it.
    pub(crate) fn machine_dropped(&self) {
        self.together(|members, after| members.machine_dropped(&self.shared, after));
    }

    /// The last steps of a job that has released everything it held.
    pub(crate) fn conclude(&self, abandoned: Option<usize>) -> Result<(), JobError> {
        self.together(|members, after| members.conclude(&self.shared, abandoned, after))
    }

    /// The result of a job that is over.
    pub(crate) fn result(&self) -> Option<Result<(), JobError>> {
        self.shared.lock().result()
    }

    /// As [`cancel`](Job::cancel) by force, but one whose switch is out is cancelled should that be dropped.
    pub(super) fn cancel_by_force(&self) {
        self.together(|members, after| {
            if !self.shared.lock().is_over() {
                members.cancel(after);
            }
        });
    }

    /// A change that the machine makes itself: only those who wait for events must know.
    fn change_state(&self, change: impl FnOnce(&mut State)) {
        let mut after = After::default();
        let mut state = self.shared.lock();
        change(&mut state);
        after.listen(&mut state);
        drop(state);
        after.run();
    }
}
