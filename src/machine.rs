//! What the machines of all jobs have in common, for what drives them.

use std::task::Waker;
use std::time::Duration;

use crate::copy::{Op, Outcome};
use crate::job::JobError;
use crate::mirror::{Switch, SwitchBack};

/// What the machine wants next.
#[derive(Debug)]
#[must_use]
pub enum Step {
    /// Do this, and report it with `op_done`. There may be more to do at once: ask again.
    Op(Op),
    /// Nothing to do until an operation is reported, the waker is called, or that time has come.
    Wait {
        /// Time at which to ask again, even if nothing happened.
        until: Option<Duration>,
    },
    /// Switch now, or drop it. Only of a [`Mirror`](crate::Mirror).
    Switch(Switch),
    /// A switch that was committed has no effect, for the group's was declined: point the guest back.
    /// Only of a [`Mirror`](crate::Mirror) in a
    /// [group](crate::JobGroup).
    SwitchBack(SwitchBack),
    /// The job is over.
    Done(Result<(), JobError>),
}

/// The machine of a job: [`Mirror`](crate::Mirror) or [`Backup`](crate::Backup), which say what each method
/// does. It is not for others to implement.
pub trait Machine: sealed::Sealed {
    /// What to do next.
    fn poll(&mut self, now: Duration, waker: &Waker) -> Step;

    /// Takes back an operation.
    fn op_done(&mut self, now: Duration, op: Op, outcome: Outcome);

    /// An operation is lost, and others go on.
    fn op_lost(&mut self, op: Op);

    /// Everything handed out and not reported is lost, and nobody drives the job any more.
    fn ops_lost(&mut self);

    /// Nobody drives the job any more, but what was handed out goes on.
    fn let_go(&mut self);
}

pub(crate) mod sealed {
    use crate::copy::Limits;

    pub trait Sealed {
        /// A driver begins with devices of these limits. The job fails if they are others than it was made for.
        fn is_driven_over(&mut self, source: &Limits, target: &Limits);
    }
}
