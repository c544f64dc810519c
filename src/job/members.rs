//! The members of a group, and how each step of one changes the others. What must hold is said in
//! [`group`](super::group).

use std::sync::Arc;

use parking_lot::MutexGuard;

use crate::job::after::After;
use crate::job::stage::{Stage, Vote};
use crate::job::state::State;
use crate::job::{Cancel, Event, JobError, Shared, Status, Verb, VerbError};
use crate::node::QuiesceGuard;
use crate::sabotage::{Sabotage, is_broken};

/// The members of a group, under its lock.
#[derive(Default)]
pub(super) struct Members {
    /// In the order in which they joined. Who is over has left.
    jobs: Vec<Arc<Shared>>,
    /// Whether one has begun to end.
    is_ending: bool,
}

impl Members {
    /// `false` if it is too late for that.
    #[must_use]
    pub(super) fn join(&mut self, job: &Arc<Shared>) -> bool {
        if self.is_ending && !is_broken(Sabotage::JoinLate) {
            return false;
        }
        self.jobs.push(Arc::clone(job));
        true
    }

    /// The work of `job` is done. If it was the last one, all are pending.
    pub(super) fn done(&mut self, job: &Shared, after: &mut After) {
        self.is_ending = true;
        let mut state = job.lock();
        // Nobody could take it back any more.
        state.drop_user_pause();
        state.go_to(Status::Waiting);
        after.listen(&mut state);
        drop(state);
        let are_all = self.all(|state| state.status == Status::Waiting);
        if !are_all && !is_broken(Sabotage::PendingAlone) {
            return;
        }
        let is_auto =
            self.all(|state| state.options.auto_finalize) || is_broken(Sabotage::FinalizeUntold);
        for mut state in self.states() {
            if state.status != Status::Waiting {
                continue;
            }
            state.go_to(Status::Pending);
            if !state.options.auto_finalize {
                state.tell(Event::Pending);
            }
            state.is_finalizing = is_auto;
            after.wake(&mut state);
        }
    }

    /// All mirrors are asked to complete, or none.
    pub(super) fn complete(&mut self, after: &mut After) -> Result<(), VerbError> {
        self.check_mirrors(|state| match (state.cancel, state.is_completing) {
            (Some(_), _) => Err(VerbError::CannotComplete),
            (None, true) => Ok(()),
            (None, false) if state.status.is_ready() => Ok(()),
            (None, false) => Err(state.not_allowed(Verb::Complete)),
        })?;
        for mut state in self.mirrors() {
            state.is_completing = true;
            after.wake(&mut state);
        }
        Ok(())
    }

    /// All mirrors are cancelled softly, or none.
    pub(super) fn cancel_softly(&mut self, after: &mut After) -> Result<(), VerbError> {
        self.check_mirrors(|state| match state.stage.is_decided() {
            true => Err(VerbError::Finalizing),
            false if state.status.is_ready() => Ok(()),
            false => Err(state.not_allowed(Verb::Cancel)),
        })?;
        for mut state in self.mirrors() {
            state.cancel_softly();
            after.wake(&mut state);
        }
        Ok(())
    }

    /// All are cancelled by force, unless the end cannot be stopped.
    pub(super) fn cancel_unless_decided(&mut self, after: &mut After) -> Result<(), VerbError> {
        if !self.all(|state| !state.stage.is_decided()) {
            return Err(VerbError::Finalizing);
        }
        if !self.jobs.is_empty() {
            self.cancel(after);
        }
        Ok(())
    }

    fn check_mirrors(
        &self,
        check: impl Fn(&State) -> Result<(), VerbError>,
    ) -> Result<(), VerbError> {
        match is_broken(Sabotage::AskOneByOne) {
            true => Ok(()),
            false => self.mirrors().try_for_each(|state| check(&state)),
        }
    }

    fn mirrors(&self) -> impl Iterator<Item = MutexGuard<'_, State>> {
        self.states().filter(|state| state.has_switch)
    }

    /// All are told to finalize.
    pub(super) fn finalize(&mut self, after: &mut After) {
        for mut state in self.states() {
            state.is_finalizing = true;
            after.wake(&mut state);
        }
    }

    /// `job` could hold its guest now. If all could, all do.
    pub(super) fn near(&mut self, job: &Shared, after: &mut After) {
        let mut state = job.lock();
        if state.stage == Stage::None {
            state.stage = Stage::Near;
        }
        drop(state);
        let is_alone = is_broken(Sabotage::HoldAlone);
        if !is_alone && !self.all(|state| state.stage == Stage::Near) {
            return;
        }
        for mut state in self.states() {
            if is_alone && state.stage != Stage::Near {
                continue;
            }
            state.stage = Stage::Closing;
            after.wake(&mut state);
        }
    }

    /// Everything of `job` that can fail is done, and it holds still. If that is so of all, and none is to
    /// be cancelled or to pause, the switches are granted. May be told again.
    ///
    /// All that is asked of members is noted under the group's lock, so that what was accepted before has
    /// its effect, and what comes later is refused.
    /// Whether they are.
    pub(super) fn prepared(&mut self, job: &Shared, vote: Vote, after: &mut After) -> bool {
        let mut state = job.lock();
        if state.stage == Stage::Closing {
            state.stage = Stage::Prepared(vote);
        }
        let is_alone = is_broken(Sabotage::SwitchAlone) && state.is_prepared();
        if is_alone {
            state.stage = granted(vote, state.cancel);
        }
        drop(state);
        if is_alone || !self.all(State::is_prepared) {
            return is_alone;
        }
        for mut state in self.states() {
            if let Stage::Prepared(vote) = state.stage {
                state.stage = granted(vote, state.cancel);
            }
            after.wake(&mut state);
        }
        self.commit_if_all_voted(after);
        true
    }

    /// The caller of `job` has committed its switch. Its guest stays held until all have.
    pub(super) fn vote(&mut self, job: &Arc<Shared>, guard: QuiesceGuard, after: &mut After) {
        let mut state = job.lock();
        if state.stage == Stage::Stale {
            // Too late.
            state.stage = Stage::Back;
            after.wake(&mut state);
            if state.is_machine_gone {
                // Nobody can be told.
                after.guards.push(guard);
                drop(state);
                self.dropped(job, after);
                return;
            }
            state.guard = Some(guard);
            return;
        }
        state.stage = Stage::Voted;
        if is_broken(Sabotage::ReleaseEarly) {
            after.guards.push(guard);
        } else {
            state.guard = Some(guard);
        }
        if is_broken(Sabotage::CommitAlone) {
            state.stage = Stage::Committed;
            after.guards.extend(state.guard.take());
            after.wake(&mut state);
        }
        drop(state);
        self.commit_if_all_voted(after);
    }

    /// The point of no return.
    fn commit_if_all_voted(&mut self, after: &mut After) {
        if !self.all(|state| state.stage == Stage::Voted) {
            return;
        }
        for job in self.jobs.clone() {
            let mut state = job.lock();
            state.stage = Stage::Committed;
            after.guards.extend(state.guard.take());
            after.wake(&mut state);
            let is_machine_gone = state.is_machine_gone;
            drop(state);
            if is_machine_gone {
                let _ = self.conclude(&job, None, after);
            }
        }
    }

    /// The caller of `job` has dropped its switch: all are declined.
    pub(super) fn decline(&mut self, job: &Arc<Shared>, guard: QuiesceGuard, after: &mut After) {
        let mut state = job.lock();
        let was_stale = state.stage == Stage::Stale;
        let is_machine_gone = state.is_machine_gone;
        state.stage = Stage::None;
        after.guards.push(guard);
        after.wake(&mut state);
        drop(state);
        if !was_stale {
            for mut state in self.states() {
                // The wish is withdrawn; they stay in step.
                state.is_completing = false;
                state.is_finalizing = false;
            }
            self.end_round(after);
        }
        if is_machine_gone {
            self.dropped(job, after);
        }
    }

    /// The machine of `job` is about to let its guest go.
    pub(super) fn let_go(&mut self, job: &Shared, after: &mut After) {
        let mut state = job.lock();
        match state.stage {
            Stage::Prepared(_) if is_broken(Sabotage::LetGoSilently) => {}
            Stage::Near => state.stage = Stage::None,
            Stage::Closing | Stage::Prepared(_) | Stage::Granted => {
                state.stage = Stage::None;
                drop(state);
                if !is_broken(Sabotage::KeepHolding) {
                    self.end_round(after);
                }
            }
            // With a switch the guest is not the machine's to let go.
            Stage::Voted if state.guard.is_none() => {
                state.stage = Stage::None;
                drop(state);
                self.end_round(after);
            }
            Stage::Voted
            | Stage::None
            | Stage::Held
            | Stage::Committed
            | Stage::Stale
            | Stage::Back => {}
        }
    }

    /// `job` has waited too long for the votes of the others.
    pub(super) fn give_up(&mut self, job: &Shared, after: &mut After) {
        if job.lock().stage == Stage::Voted {
            self.end_round(after);
        }
    }

    /// One cannot be held any longer: none is.
    fn end_round(&mut self, after: &mut After) {
        let mut is_doomed = false;
        for job in self.jobs.clone() {
            let mut state = job.lock();
            state.stage = state.stage.after_round(state.guard.is_some());
            is_doomed |= state.is_doomed;
            after.wake(&mut state);
            let is_lost = state.stage == Stage::Back && state.is_machine_gone;
            drop(state);
            if is_lost {
                // Nobody can be told to point the guest back.
                self.dropped(&job, after);
            }
        }
        if is_doomed {
            self.cancel(after);
        }
    }

    /// Cancels all by force. One whose switch is out is cancelled should that be dropped.
    pub(super) fn cancel(&mut self, after: &mut After) {
        self.is_ending = true;
        for job in self.jobs.clone() {
            self.cancel_one(&job, after);
        }
    }

    /// `job` has failed: the others are cancelled by force.
    pub(super) fn fail(&mut self, job: &Arc<Shared>, after: &mut After) {
        self.is_ending = true;
        let mut state = job.lock();
        state.stage = state.stage.after_cancel();
        drop(state);
        if is_broken(Sabotage::OthersGoOn) {
            return;
        }
        for other in self.jobs.clone() {
            if !Arc::ptr_eq(&other, job) {
                self.cancel_one(&other, after);
            }
        }
    }

    fn cancel_one(&mut self, job: &Arc<Shared>, after: &mut After) {
        let mut state = job.lock();
        if state.stage.is_decided() {
            state.is_doomed = true;
            return;
        }
        state.cancel = Some(Cancel::Force);
        state.drop_user_pause();
        state.retry_now = true;
        state.stage = state.stage.after_cancel();
        after.wake(&mut state);
        let was_started = state.was_started;
        drop(state);
        if !was_started && !is_broken(Sabotage::LeaveCreated) {
            // There is no work to stop, and maybe nobody who would be told.
            let _ = self.conclude(job, None, after);
        }
    }

    /// The machine of `job` is dropped and has released everything.
    pub(super) fn machine_dropped(&mut self, job: &Arc<Shared>, after: &mut After) {
        self.let_go(job, after);
        let mut state = job.lock();
        if state.is_over() {
            return;
        }
        match state.stage {
            // Whoever holds the switch, or the others, decide how it ends.
            Stage::Held | Stage::Stale | Stage::Voted => state.is_machine_gone = true,
            Stage::Committed => {
                drop(state);
                let _ = self.conclude(job, None, after);
            }
            Stage::None
            | Stage::Near
            | Stage::Closing
            | Stage::Prepared(_)
            | Stage::Granted
            | Stage::Back => {
                drop(state);
                self.dropped(job, after);
            }
        }
    }

    /// Nobody is left to bring `job` to its end.
    fn dropped(&mut self, job: &Arc<Shared>, after: &mut After) {
        let mut state = job.lock();
        after.guards.extend(state.guard.take());
        state.error.get_or_insert(JobError::Dropped);
        drop(state);
        self.fail(job, after);
        let _ = self.conclude(job, None, after);
    }

    /// The last steps of a job that has released everything it held.
    pub(super) fn conclude(
        &mut self,
        job: &Arc<Shared>,
        abandoned: Option<usize>,
        after: &mut After,
    ) -> Result<(), JobError> {
        let mut state = job.lock();
        if let Some(result) = state.result() {
            return result;
        }
        let result = state.conclude(abandoned);
        after.drop.extend(state.driver.take());
        after.listen(&mut state);
        drop(state);
        after.over.extend(job.registry.upgrade());
        let index = self.jobs.iter().position(|other| Arc::ptr_eq(other, job));
        after
            .left
            .extend(index.map(|index| self.jobs.remove(index)));
        result
    }

    /// The members' states, each locked when it is its turn.
    fn states(&self) -> impl Iterator<Item = MutexGuard<'_, State>> {
        self.jobs.iter().map(|job| job.lock())
    }

    fn all(&self, is: impl Fn(&State) -> bool) -> bool {
        self.states().all(|state| is(&state))
    }
}

fn granted(vote: Vote, cancel: Option<Cancel>) -> Stage {
    match (vote, cancel) {
        (Vote::BySwitch, None) => Stage::Granted,
        // Also one that was cancelled softly since its machine looked: it ends without a switch.
        (Vote::BySwitch, Some(_)) | (Vote::AtOnce, _) => Stage::Voted,
    }
}
