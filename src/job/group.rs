//! Jobs that end together: all with success and at one instant, or none.
//!
//! ```text
//! member   ready ─ done ─▶ waiting ┐ all                  finalize ┌ near ┐ all         ┌ prepared ┐ all    ┌ switch ┐ all
//! member   ready ──── done ──▶ waiting ├─▶ pending ─────────────▶ │ near ├──▶ guests   │ prepared ├──▶     │ switch ├──▶ committed
//! member   running ─ done ───▶ waiting ┘                           └ near ┘    held     └ prepared ┘        └ switch ┘
//!                                          ▲                          ▲          │            │                  │
//!                                          │                          └──────────┴────────────┘                  │
//!                                          │                    one has to let its guest go: all do              │
//!                                          └───────────────────────── one switch is dropped: all are declined ───┘
//! ```
//!
//! A member is a job of any type. It is *done* when its own work is; a mirror stays in step all the
//! while. It is *near* when it could hold its guest now, and *prepared* when everything that can fail is
//! behind it. A member without a switch votes for the commit as soon as all are prepared, one with a
//! switch when its caller has [committed](crate::Switch::commit) it. A job without a group is one of a
//! group of its own.
//!
//! Invariants:
//!
//! 1. All members end with success, or none does. The decision is made once, when the last vote is in,
//!    under the group's lock. Until then any failure or cancel by force undoes all; after it nothing does.
//! 2. A member that fails, or is cancelled by force, has all others cancelled by force, under the same
//!    lock. It keeps its own error. One that was never started is over at once, for nobody need be driving
//!    it.
//! 3. No member is finalized before all are done, and if one wants to be told, not before one is.
//! 4. Guests are held only once all members could hold theirs. A switch is handed out only while all are
//!    prepared at the same time: every guest is held, every target equal and flushed.
//! 5. From the first switch to the last vote every guest stays held. They go on when all have voted, or,
//!    if the round is over before, each with its source; whose switch was committed by then, only after
//!    its caller was handed [`SwitchBack`](crate::SwitchBack).
//! 6. A machine withdraws its stage before it lets its guest go. If that ends the round, every other
//!    member lets go, too.
//! 7. Nobody joins after the first member has begun to end.
//!
//! Locks: that of the [manager](crate::Jobs), then that of a group, then that of one of its jobs; never
//! two of a kind. What every operation needs is behind the lock of its job alone. Foreign code (wakers,
//! guards whose guests go on) is called when all are released: see [`After`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use parking_lot::{Mutex, MutexGuard};

use crate::job::registry::Registry;
use crate::job::stage::{Stage, Vote};
use crate::job::state::State;
use crate::job::{Cancel, Event, JobError, Shared, Status};
use crate::node::QuiesceGuard;
use crate::sabotage::{Sabotage, is_broken};

/// Jobs that end together: all with success and at one instant, or none.
///
/// A job joins by [`JobOptions::group`](crate::JobOptions::group) when it is made. Its members may be of any
/// type. One whose own work is done waits for the others; when the last one is done all are pending and
/// are finalized, at once unless a member has
/// [`auto_finalize`](crate::JobOptions::auto_finalize) off, else when
/// [`finalize`](crate::Job::finalize) is asked of any of them. If a member fails or is cancelled, all others are
/// cancelled by force.
///
/// The guests of all members are held at the same time before the first [`Switch`](crate::Switch) is handed
/// out: what a guest has ordered across disks stays in order. All members must be driven at the same time,
/// for each waits for the others.
///
/// # Examples
///
/// Two disks of a machine, moved together; `run` is what drives one machine to a [`Step`](crate::Step) that
/// is the caller's.
///
/// ```
/// # use std::task::Waker;
/// # use std::time::Duration;
/// # use blockjob::{Content, Extent, OpKind, Outcome, Step, Switch};
/// use blockjob::{JobGroup, Limits, Mirror, MirrorOptions, Node, Status};
///
/// # /// Does all there is to do now; the disks here have no bytes.
/// # fn run(mirror: &mut Mirror) -> Step {
/// #     loop {
/// #         match mirror.poll(Duration::ZERO, Waker::noop()) {
/// #             Step::Op(op) => {
/// #                 let outcome = match op.kind() {
/// #                     OpKind::Status(range) => Outcome::Status(Extent {
/// #                         len: range.len(), content: Content::Data, in_top: true }),
/// #                     _ => Outcome::Done,
/// #                 };
/// #                 mirror.op_done(Duration::ZERO, op, outcome);
/// #             }
/// #             step => return step,
/// #         }
/// #     }
/// # }
/// let group = JobGroup::new();
/// let nodes = [Node::new(1 << 20), Node::new(1 << 20)];
/// let mut mirrors = Vec::new();
/// for node in &nodes {
///     let limits = Limits::new(1 << 20);
///     let mut options = MirrorOptions::default();
///     options.job.group = Some(group.clone());
///     let mirror = Mirror::new(node, limits, limits, options)?;
///     mirror.job().start()?;
///     mirrors.push(mirror);
/// }
/// let [first, second] = &mut mirrors[..] else { unreachable!() };
/// assert!(matches!((run(first), run(second)), (Step::Wait { .. }, Step::Wait { .. })));
///
/// first.job().complete()?;
/// run(first);
/// assert_eq!(first.job().query().status, Status::Waiting, "for the other one");
/// second.job().complete()?;
/// run(second);
/// assert_eq!(first.job().query().status, Status::Pending);
///
/// // Each hands out its switch while both guests are held. Exchange both devices, then commit both.
/// run(first);
/// run(second);
/// let (Step::Switch(one), Step::Switch(other)) = (run(first), run(second)) else { panic!() };
/// one.commit();
/// assert!(nodes[0].begin_write((0..512).into()).go().is_none(), "held until both are committed");
/// other.commit();
/// assert!(nodes[0].begin_write((0..512).into()).go().is_some());
/// assert!(matches!((run(first), run(second)), (Step::Done(Ok(())), Step::Done(Ok(())))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct JobGroup {
    shared: Arc<Group>,
}

struct Group {
    id: u64,
    members: Mutex<Members>,
}

/// The members of a group, under its lock.
#[derive(Default)]
pub(super) struct Members {
    /// In the order in which they joined. Who is over has left.
    jobs: Vec<Arc<Shared>>,
    /// Whether one has begun to end.
    is_ending: bool,
}

/// What is to be done when all locks are released, for it is foreign code.
#[derive(Default)]
pub(super) struct After {
    /// Guests that go on.
    guards: Vec<QuiesceGuard>,
    wake: Vec<Waker>,
    /// Only dropped: that is foreign code, too.
    drop: Vec<Waker>,
    left: Vec<Arc<Shared>>,
    over: Vec<Arc<Registry>>,
}

impl JobGroup {
    /// A group without members.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            shared: Arc::new(Group {
                id: NEXT.fetch_add(1, Ordering::Relaxed),
                members: Mutex::default(),
            }),
        }
    }

    /// A number that no other group of the process has.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.shared.id
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Members> {
        self.shared.members.lock()
    }
}

impl Default for JobGroup {
    fn default() -> Self {
        Self::new()
    }
}

/// The same group, not one with the same members.
impl PartialEq for JobGroup {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Eq for JobGroup {}

impl fmt::Debug for JobGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JobGroup").field(&self.id()).finish()
    }
}

impl Members {
    /// `false` if it is too late for that.
    #[must_use]
    pub(super) fn join(&mut self, job: &Arc<Shared>) -> bool {
        if self.is_ending {
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
        if !self.all(|state| state.status == Status::Waiting) {
            return;
        }
        let is_auto = self.all(|state| state.options.auto_finalize);
        for mut state in self.states() {
            state.go_to(Status::Pending);
            if !state.options.auto_finalize {
                state.tell(Event::Pending);
            }
            state.is_finalizing = is_auto;
            after.wake(&mut state);
        }
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
        if !self.all(|state| state.stage == Stage::Near) {
            return;
        }
        for mut state in self.states() {
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
            state.stage = granted(vote);
        }
        drop(state);
        if is_alone || !self.all(State::is_prepared) {
            return is_alone;
        }
        for mut state in self.states() {
            if let Stage::Prepared(vote) = state.stage {
                state.stage = granted(vote);
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

fn granted(vote: Vote) -> Stage {
    match vote {
        Vote::BySwitch => Stage::Granted,
        Vote::AtOnce => Stage::Voted,
    }
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
