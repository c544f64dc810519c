//! Jobs that end together: all with success and at one instant, or none.
//!
//! ```text
//! each member    ready ──▶ waiting ──▶ pending ──▶ guest held ──▶ switch ──▶ over
//! goes on when     it is done    all are    all are near  all are     all have
//!                                (and told)               prepared    committed
//!                                           ▲                │           │
//!                                           └────────────────┴───────────┘
//!                                     one lets its guest go, or drops its switch: all do
//! ```
//!
//! A member is a job of any type. It is *done* when its own work is; a mirror stays in step all the
//! while. It is *near* when it could hold its guest now, and *prepared* when everything that can fail is
//! behind it and it holds still. A member without a switch votes for the commit as soon as all are
//! prepared, one with a switch when its caller has [committed](crate::Switch::commit) it. A job without a
//! group is one of a group of its own.
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
//! 6. A machine withdraws its stage before it lets its guest go. Then every other member lets go, too.
//! 7. Nobody joins after the first member has begun to end.
//! 8. What is asked of the group is asked of all its members, under its lock, or of none.
//!
//! Locks: that of the [manager](crate::Jobs), then that of a group, then that of one of its jobs; never
//! two of a kind. What every operation needs is behind the lock of its job alone. Foreign code (wakers,
//! guards whose guests go on) is called when all are released: see [`after`](super::after).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::job::after::After;
use crate::job::members::Members;
use crate::job::{Cancel, VerbError};

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
/// #                     // Only because there are no bytes. A copy is reported when the target has it.
/// #                     OpKind::Copy(_) | OpKind::Flush | OpKind::Settle => Outcome::Done,
/// #                     kind => unreachable!("{kind:?}"),
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
/// let (Step::Switch(other), Step::Switch(one)) = (run(second), run(first)) else { panic!() };
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

    /// Asks all mirrors of the group to come to their end with a switch, or none of them. Members of other types
    /// end by themselves. Asking again has no effect.
    ///
    /// # Errors
    ///
    /// If one of them is not ready, or was cancelled. Then nothing was asked of any.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Cancel, JobGroup, Limits, Mirror, MirrorOptions, Node, Status, VerbError};
    ///
    /// let (node, group, limits) = (Node::new(1 << 20), JobGroup::new(), Limits::new(1 << 20));
    /// let mut options = MirrorOptions::default();
    /// options.job.group = Some(group.clone());
    /// let mirror = Mirror::new(&node, limits, limits, options)?;
    /// mirror.job().start()?;
    ///
    /// // It is not ready yet: neither a switch nor a copy of one instant can be had.
    /// assert!(matches!(group.complete(), Err(VerbError::NotAllowed { .. })));
    /// assert!(matches!(group.cancel(Cancel::Soft), Err(VerbError::NotAllowed { .. })));
    /// assert_eq!(mirror.job().query().cancel, None, "a soft cancel of the job alone would be one by force");
    /// group.cancel(Cancel::Force)?;
    /// assert_eq!(mirror.job().query().cancel, Some(Cancel::Force));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn complete(&self) -> Result<(), VerbError> {
        self.ask(Members::complete)
    }

    /// Cancels all members, or none of them.
    ///
    /// Softly: the mirrors come to their end together, none switches, and their targets are copies of one instant,
    /// at which all guests are held. Other than [`Job::cancel`](crate::Job::cancel) this is never one by force
    /// instead. Members of other types end by themselves, with success.
    ///
    /// # Errors
    ///
    /// Softly, if a mirror is not ready; by force, [`VerbError::Finalizing`] once the end cannot be stopped.
    /// Then nothing was asked of any.
    ///
    /// # Examples
    ///
    /// See [`complete`](Self::complete).
    pub fn cancel(&self, how: Cancel) -> Result<(), VerbError> {
        self.ask(|members, after| match how {
            Cancel::Soft => members.cancel_softly(after),
            Cancel::Force => members.cancel_unless_decided(after),
        })
    }

    fn ask(
        &self,
        act: impl FnOnce(&mut Members, &mut After) -> Result<(), VerbError>,
    ) -> Result<(), VerbError> {
        let mut after = After::default();
        let result = act(&mut self.lock(), &mut after);
        after.run();
        result
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
