//! One act of a transaction.

use std::fmt;

use crate::bitmap::HBitmap;
use crate::job::{Begun, Job, StartError, VerbError};
use crate::node::{BitmapError, BitmapOptions, Journal, Locked, Node, QuiesceGuard, TrackError};

#[derive(Clone, Debug)]
pub(super) enum Action {
    Add {
        to: Named,
        options: BitmapOptions,
        is_enabled: bool,
    },
    Remove(Named),
    Clear(Named),
    Enable(Named),
    Disable(Named),
    Merge {
        target: Named,
        sources: Vec<Named>,
    },
    Rename {
        from: Named,
        to: String,
    },
    Start(Job),
    Abort,
}

/// A bitmap, whether there is one or not.
#[derive(Clone, Debug)]
pub(super) struct Named {
    node: Node,
    name: String,
}

/// What kind of act one of a [`Transaction`](crate::Transaction) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ActionKind {
    /// A new bitmap.
    Add,
    /// A bitmap goes.
    Remove,
    /// A bitmap is made clean.
    Clear,
    /// A bitmap records.
    Enable,
    /// A bitmap does not record.
    Disable,
    /// Bitmaps are merged into one.
    Merge,
    /// A bitmap gets another name.
    Rename,
    /// A job starts.
    Start,
    /// Fails.
    Abort,
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ActionKind::Add => "add",
            ActionKind::Remove => "remove",
            ActionKind::Clear => "clear",
            ActionKind::Enable => "enable",
            ActionKind::Disable => "disable",
            ActionKind::Merge => "merge",
            ActionKind::Rename => "rename",
            ActionKind::Start => "start",
            ActionKind::Abort => "abort",
        })
    }
}

/// Why an act failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ActionError {
    /// A bitmap cannot be had, or made.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// The job cannot be started.
    #[error(transparent)]
    Job(#[from] VerbError),
    /// A mirror that is to start cannot record what its guest writes.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// An earlier action of the list starts the job, or another transaction that is not decided: its instant is
    /// not that of this one.
    #[error("the job is started by an earlier action, or by another transaction")]
    StartedBefore,
    /// It is there to fail.
    #[error("aborted on request")]
    Aborted,
}

impl From<StartError> for ActionError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Bitmap(error) => ActionError::Bitmap(error),
            StartError::Track(error) => ActionError::Track(error),
        }
    }
}

impl Named {
    pub(super) fn new(node: &Node, name: &str) -> Self {
        Self {
            node: node.clone(),
            name: name.to_owned(),
        }
    }

    fn at(&self) -> (&Node, &str) {
        (&self.node, &self.name)
    }
}

impl Action {
    pub(super) fn kind(&self) -> ActionKind {
        match self {
            Action::Add { .. } => ActionKind::Add,
            Action::Remove(_) => ActionKind::Remove,
            Action::Clear(_) => ActionKind::Clear,
            Action::Enable(_) => ActionKind::Enable,
            Action::Disable(_) => ActionKind::Disable,
            Action::Merge { .. } => ActionKind::Merge,
            Action::Rename { .. } => ActionKind::Rename,
            Action::Start(_) => ActionKind::Start,
            Action::Abort => ActionKind::Abort,
        }
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &Node> {
        let job = if let Action::Start(job) = self {
            job.at_start()
        } else {
            None
        };
        let started = job.map(|start| start.node());
        let (first, rest): (_, &[Named]) = match self {
            Action::Add { to: named, .. }
            | Action::Remove(named)
            | Action::Clear(named)
            | Action::Enable(named)
            | Action::Disable(named)
            | Action::Rename { from: named, .. } => (Some(named), &[]),
            Action::Merge { target, sources } => (Some(target), sources),
            Action::Start(_) | Action::Abort => (None, &[]),
        };
        let named = first.into_iter().chain(rest).map(|named| &named.node);
        named.chain(started)
    }

    /// A map that it may need. If there is none, that comes up in its turn.
    pub(super) fn spare(&self) -> Option<HBitmap> {
        match self {
            Action::Add { to, options, .. } => to.node.spare(options.granularity()),
            Action::Clear(named) | Action::Merge { target: named, .. } => {
                named.node.spare_for(&named.name)
            }
            Action::Start(job) => job.at_start()?.spare(),
            Action::Remove(_)
            | Action::Enable(_)
            | Action::Disable(_)
            | Action::Rename { .. }
            | Action::Abort => None,
        }
    }

    pub(super) fn apply(
        &self,
        locked: &mut Locked<'_>,
        journal: &mut Journal,
        jobs: &mut Vec<Job>,
        spare: Option<HBitmap>,
        guards: &[QuiesceGuard],
    ) -> Result<(), ActionError> {
        match self {
            Action::Add {
                to,
                options,
                is_enabled,
            } => journal.add(locked, to.at(), options, *is_enabled, spare)?,
            Action::Remove(named) => journal.remove(locked, named.at())?,
            Action::Clear(named) => journal.clear(locked, named.at(), spare)?,
            Action::Enable(named) => journal.set_enabled(locked, named.at(), true)?,
            Action::Disable(named) => journal.set_enabled(locked, named.at(), false)?,
            Action::Merge { target, sources } => {
                let sources: Vec<_> = sources.iter().map(Named::at).collect();
                journal.merge(locked, target.at(), &sources, spare)?;
            }
            Action::Rename { from, to } => journal.rename(locked, from.at(), to)?,
            Action::Start(job) => {
                if jobs.iter().any(|known| known.is(job)) {
                    return Err(ActionError::StartedBefore);
                }
                job.check_start()?;
                if let Some(start) = job.at_start() {
                    let guard = guards.iter().find(|guard| guard.is_of(start.node()));
                    let guard = guard.expect("the disks of all actions are quiesced");
                    if start.arm(locked, guard, spare)? == Begun::Before {
                        return Err(ActionError::StartedBefore);
                    }
                }
                jobs.push(job.clone());
            }
            Action::Abort => return Err(ActionError::Aborted),
        }
        Ok(())
    }
}
