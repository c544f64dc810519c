//! The instant at which the guest may go over to the target, as a value.

use std::fmt;
use std::time::Duration;

use crate::job::Job;
use crate::node::QuiesceGuard;

/// The instant at which source and target are equal, for as long as this lives.
///
/// The guest is held: no write of its is in flight, and none begins. Both disks are equal, and the target
/// is flushed. Point the guest's path to the target, its reads too, which pass no gate, then
/// [`commit`](Self::commit). If that does not work out, point it back and drop this: the guest goes on with
/// the source, the job stays in step with it, and may be completed again. Nothing is lost either way.
///
/// They are equal if the target held before what the job was told that it does. If not, by a
/// [bitmap](crate::MirrorOptions::bitmap) that did not record all that was written, or
/// [`target_holds`](crate::MirrorOptions::target_holds) that was not true, too little was copied, and no error
/// says so; [`verify`](Job::verify) does.
///
/// # What is exchanged
///
/// That is the caller's: the crate knows the node, whose guest it holds, and neither paths nor graphs. As a rule the
/// source's place is taken by the target; it may as well be that of a filter above the source, or of any object that
/// reads the same, or something may be put between. What guests reach in other ways than through this node is not
/// held by it. If such a way has a node of its own, quiesce that *before* the job is told to
/// [complete](crate::Job::complete), and let go after the commit: a write on its way from there to here would wait
/// here for the switch, and that node would never be quiet. If what was to be exchanged is not there any more, drop
/// the switch.
///
/// A filter with a node above the source, which the target takes the place of:
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Limits, Mirror, MirrorOptions, MirrorSync, Node, OpKind, Outcome, Step};
///
/// let (guest, source) = (Node::new(1 << 20), Node::new(1 << 20));
/// let mut path = "guest, filter, source";
/// let limits = Limits::new(1 << 20);
/// let mut options = MirrorOptions::default();
/// options.sync = MirrorSync::None; // nothing is to be copied here
/// let mut mirror = Mirror::new(&source, limits, limits, options)?;
/// mirror.job().start()?;
/// let mut next = |mirror: &mut Mirror| loop {
///     match mirror.poll(Duration::ZERO, Waker::noop()) {
///         Step::Op(op) => {
///             assert!(matches!(op.kind(), OpKind::Flush | OpKind::Settle), "nothing was written");
///             mirror.op_done(Duration::ZERO, op, Outcome::Done);
///         }
///         step => break step,
///     }
/// };
/// assert!(matches!(next(&mut mirror), Step::Wait { .. }));
///
/// let above = guest.quiesce().try_guard().expect("no write is in flight");
/// mirror.job().complete()?;
/// let Step::Switch(switch) = next(&mut mirror) else { panic!("both are quiet") };
/// assert!(guest.begin_write((0..1).into()).go().is_none());
/// path = "guest, target"; // the filter goes
/// switch.commit();
/// drop(above);
/// assert!(guest.begin_write((0..1).into()).go().is_some() && path == "guest, target");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # In a group
///
/// Each member of a [`JobGroup`](crate::JobGroup) hands out its own switch, while the guests of all are
/// held.
///
/// 1. It takes effect when all are committed. Until then every guest stays held, those whose switches
///    are committed, too.
/// 2. If one is dropped instead, all are declined. Every job stays in step and pending; ask any of them to
///    [`finalize`](crate::Job::finalize) to try again.
/// 3. If a driver or a machine is dropped before it has handed out its switch, the others are void, too. With
///    the driver it is tried again when the machine is driven; with the machine the group fails. They are
///    void, and it is tried again, also when one that is committed was held for
///    [`hold_max`](crate::MirrorOptions::hold_max) and the others are not committed yet.
/// 4. Each switch that was committed is answered by its own machine: by [`Step::Done`](crate::Step::Done) with
///    success, or by [`Step::SwitchBack`](crate::Step::SwitchBack), with the guest still held, to point it back
///    to the source. A switch that is void already is answered in the same way.
/// 5. A machine that is dropped with its switch out, or committed, cannot answer. Its job succeeds if all are
///    committed; else it fails, and its guest goes on where its path leads.
#[must_use = "dropping the switch declines it"]
pub struct Switch {
    job: Job,
    held_since: Duration,
    /// Opens the node's gate when it is dropped. `None` only while this is.
    guard: Option<QuiesceGuard>,
}

/// The guest whose switch was committed must go back, for that of another member of its group was not.
///
/// The guest is held, and has been since before the switch was handed out. Point its path back to the source,
/// then drop this: it goes on, and so does the job, which stays in step with it.
#[must_use = "the guest's path must be pointed back before this is dropped"]
pub struct SwitchBack {
    job: Job,
    /// Opens the node's gate when it is dropped, after the job was told.
    guard: QuiesceGuard,
}

impl Switch {
    /// The job must have noted that the switch is out.
    pub(super) fn new(job: Job, held_since: Duration, guard: QuiesceGuard) -> Self {
        Self {
            job,
            held_since,
            guard: Some(guard),
        }
    }

    /// The guest's disk is the target now. The guest goes on, and the job is over with success once it is
    /// polled.
    ///
    /// In a group that is so when all members have committed: see [above](Self#in-a-group).
    pub fn commit(mut self) {
        if let Some(guard) = self.guard.take() {
            self.job.vote(guard);
        }
    }

    /// When the guest was held, by the clock of [`Mirror::poll`](crate::Mirror::poll).
    #[must_use]
    pub fn held_since(&self) -> Duration {
        self.held_since
    }

    /// The guard that holds the guest, for those who exchange a device under it.
    pub fn guard(&self) -> &QuiesceGuard {
        self.guard.as_ref().expect("taken when this is gone only")
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Noted before the guest goes on: nothing may be copied to a target that the guest writes to.
        if let Some(guard) = self.guard.take() {
            self.job.decline(guard);
        }
    }
}

impl SwitchBack {
    /// The job must have noted that it is out.
    pub(super) fn new(job: Job, guard: QuiesceGuard) -> Self {
        Self { job, guard }
    }

    /// The guard that holds the guest, for those who exchange a device under it.
    pub fn guard(&self) -> &QuiesceGuard {
        &self.guard
    }
}

impl Drop for SwitchBack {
    fn drop(&mut self) {
        self.job.pointed_back();
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch")
            .field("held_since", &self.held_since)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SwitchBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchBack").finish_non_exhaustive()
    }
}
