//! Acts on the bitmaps of several disks, and starts of jobs, at one instant or not at all.
//!
//! ```text
//!  prepare: every disk named is quiesced ──▶ acts, in their order ──▶ Prepared ──▶ commit
//!             guests wait                       │ one fails              │
//!                                               ▼                        ▼ dropped
//!                                        all is undone ◀─────────────────┘
//! ```
//!
//! This layer knows nodes and jobs. Invariants:
//!
//! 1. Every disk named is quiesced from before the first act until after the commit or the last undoing.
//!    So no write sees a part of it, on no disk, and nothing is recorded in between.
//! 2. The acts are done in their order, and each sees what those before it did. After the first that fails
//!    none is tried.
//! 3. Each notes what it has changed, and one that fails has changed nothing. Undoing goes from the last to
//!    the first and puts back exactly that: bits, recording, names, the order of bitmaps. What others have
//!    done meanwhile stays: what they record is recorded.
//! 4. What cannot be undone is left for the commit, which cannot fail: a bitmap goes, a job starts.
//! 5. What was touched is in use until the end: nobody else changes it in between. Names that may have to be
//!    given back are, too.
//! 6. No lock is held while it is open.

mod action;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::bitmap::HBitmap;
use crate::job::Job;
use crate::node::{BitmapOptions, Journal, Locked, Node, Quiesce, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};

use action::{Action, Named};
pub use action::{ActionError, ActionKind};

/// A list of acts that are done together: all of them or none, on all disks at one instant.
///
/// # Examples
///
/// From one incremental backup to the next, on two disks at the same instant:
///
/// ```
/// use blockjob::{BitmapOptions, Node, Transaction};
///
/// let disks = [Node::new(1 << 30), Node::new(1 << 40)];
/// let mut first = Transaction::new();
/// for disk in &disks {
///     first.add(disk, "monday", BitmapOptions::default());
/// }
/// # futures_util::FutureExt::now_or_never(async {
/// first.run().await?;
/// # Ok::<(), blockjob::TransactionError>(())
/// # }).unwrap()?;
///
/// let mut next = Transaction::new();
/// for disk in &disks {
///     next.disable(disk, "monday").add(disk, "tuesday", BitmapOptions::default());
/// }
/// let prepared = next.prepare().try_prepared().expect("no write is in flight")?;
/// // Both guests wait: this is the moment for what must be of the same instant.
/// prepared.commit();
/// assert!(!disks[1].bitmaps().query("monday").unwrap().is_recording);
/// # Ok::<(), blockjob::TransactionError>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "nothing is done before it is run"]
pub struct Transaction {
    actions: Vec<Action>,
}

/// Which act of a transaction failed, and why. All is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("action {index} of the transaction, {kind}: {why}")]
#[non_exhaustive]
pub struct TransactionError {
    /// Its place in the list, from 0 on.
    pub index: usize,
    /// What kind of act it is.
    pub kind: ActionKind,
    /// What hindered it.
    #[source]
    pub why: ActionError,
}

/// Waits until no guest write is in flight on any disk named, and does the acts.
///
/// Guests wait from the call of [`Transaction::prepare`] on. Await it, or ask with
/// [`poll_prepared`](Self::poll_prepared) or [`try_prepared`](Self::try_prepared).
///
/// # Cancel safety
///
/// Dropping it lets all guests go on, and nothing has been done. So whoever must not wait for long for a
/// write that hangs gives up by dropping it.
#[must_use = "nothing is done, and the guests go on, when this is dropped"]
pub struct Preparing {
    actions: Vec<Action>,
    /// Maps that acts may take, made before the guests had to wait.
    spares: Vec<Option<HBitmap>>,
    nodes: Vec<Node>,
    held: Vec<Held>,
}

/// A disk on its way to being quiesced.
enum Held {
    Waiting(Quiesce),
    Quiet(QuiesceGuard),
    /// Handed on.
    Gone,
}

/// All acts are done, the guests wait, and nothing is decided: [`commit`](Self::commit) it, or drop it, and
/// all is as before.
#[must_use = "all is undone when this is dropped"]
pub struct Prepared {
    /// `None` once it is decided.
    open: Option<Open>,
}

struct Open {
    journal: Journal,
    jobs: Vec<Job>,
    nodes: Vec<Node>,
    guards: Vec<QuiesceGuard>,
}

impl Transaction {
    /// An empty list, which succeeds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Then makes a clean bitmap that records. Errors are those of [`Bitmaps::add`](crate::Bitmaps::add).
    pub fn add(&mut self, node: &Node, name: &str, options: BitmapOptions) -> &mut Self {
        self.push(Action::Add {
            to: Named::new(node, name),
            options,
            is_enabled: true,
        })
    }

    /// Then makes a clean bitmap that does not record. Errors are those of
    /// [`Bitmaps::add_disabled`](crate::Bitmaps::add_disabled).
    pub fn add_disabled(&mut self, node: &Node, name: &str, options: BitmapOptions) -> &mut Self {
        self.push(Action::Add {
            to: Named::new(node, name),
            options,
            is_enabled: false,
        })
    }

    /// Then forgets a bitmap. For the acts after it, it is in use, and its name is taken. Errors are those
    /// of [`Bitmaps::remove`](crate::Bitmaps::remove).
    pub fn remove(&mut self, node: &Node, name: &str) -> &mut Self {
        self.push(Action::Remove(Named::new(node, name)))
    }

    /// Then makes everything clean. Errors are those of [`Bitmaps::clear`](crate::Bitmaps::clear), and want
    /// of memory.
    pub fn clear(&mut self, node: &Node, name: &str) -> &mut Self {
        self.push(Action::Clear(Named::new(node, name)))
    }

    /// Then starts to record. Errors are those of [`Bitmaps::enable`](crate::Bitmaps::enable).
    pub fn enable(&mut self, node: &Node, name: &str) -> &mut Self {
        self.push(Action::Enable(Named::new(node, name)))
    }

    /// Then stops recording. Errors are those of [`Bitmaps::disable`](crate::Bitmaps::disable).
    pub fn disable(&mut self, node: &Node, name: &str) -> &mut Self {
        self.push(Action::Disable(Named::new(node, name)))
    }

    /// Then merges bitmaps, of any nodes, into one. Errors are those of
    /// [`Bitmaps::merge`](crate::Bitmaps::merge), and want of memory.
    pub fn merge(&mut self, node: &Node, target: &str, sources: &[(&Node, &str)]) -> &mut Self {
        let sources = sources.iter().map(|(node, name)| Named::new(node, name));
        self.push(Action::Merge {
            target: Named::new(node, target),
            sources: sources.collect(),
        })
    }

    /// Then gives a bitmap another name. Errors are those of [`Bitmaps::rename`](crate::Bitmaps::rename).
    pub fn rename(&mut self, node: &Node, name: &str, new_name: &str) -> &mut Self {
        self.push(Action::Rename {
            from: Named::new(node, name),
            to: new_name.to_owned(),
        })
    }

    /// Then starts a job, at one instant with all that are started by the list. For a [`Backup`](crate::Backup)
    /// that is the instant that is backed up; for a [`Mirror`](crate::Mirror) the one from which on it records, and
    /// at which the bits of its bitmap are taken. Errors of the bitmap are those of
    /// [`Bitmaps::claim`](crate::Bitmaps::claim).
    /// That it may be started is looked at in its turn; it does start with the commit, while all guests wait,
    /// unless somebody has cancelled it by then. One that somebody has started by then begins at this instant,
    /// too.
    ///
    /// # Examples
    ///
    /// Two disks are mirrored from one instant on, and bitmaps have what was written since then.
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Limits, Mirror, MirrorOptions, Node, Status, Transaction};
    ///
    /// let (disks, limits) = ([Node::new(1 << 20), Node::new(1 << 20)], Limits::new(1 << 20));
    /// let mirrors = [0, 1].map(|index| {
    ///     Mirror::new(&disks[index], limits, limits, MirrorOptions::default()).expect("good options")
    /// });
    /// let mut list = Transaction::new();
    /// for (disk, mirror) in disks.iter().zip(&mirrors) {
    ///     list.add(disk, "since", BitmapOptions::default()).start(mirror.job());
    /// }
    /// let mut vain = list.clone();
    /// vain.abort();
    /// assert!(vain.prepare().try_prepared().expect("no write is in flight").is_err());
    /// assert_eq!(mirrors[0].job().query().status, Status::Created, "as if it had never been tried");
    ///
    /// list.prepare().try_prepared().expect("no write is in flight")?.commit();
    /// assert!(mirrors.iter().all(|mirror| mirror.job().query().status == Status::Running));
    /// # Ok::<(), blockjob::TransactionError>(())
    /// ```
    pub fn start(&mut self, job: &Job) -> &mut Self {
        self.push(Action::Start(job.clone()))
    }

    /// Then fails, so that all is undone: to try what becomes of a list that fails.
    pub fn abort(&mut self) -> &mut Self {
        self.push(Action::Abort)
    }

    fn push(&mut self, action: Action) -> &mut Self {
        self.actions.push(action);
        self
    }

    /// Holds the guests of all disks named, waits for their writes in flight, and does the acts.
    pub fn prepare(self) -> Preparing {
        let spares = self.actions.iter().map(Action::spare).collect();
        let mut nodes: Vec<Node> = Vec::new();
        for node in self.actions.iter().flat_map(Action::nodes) {
            if !nodes.iter().any(|known| known.is(node)) {
                nodes.push(node.clone());
            }
        }
        let held = nodes.iter().map(|node| Held::Waiting(node.quiesce()));
        Preparing {
            held: held.collect(),
            actions: self.actions,
            spares,
            nodes,
        }
    }

    /// Does all of it.
    ///
    /// # Errors
    ///
    /// That of the first act that fails. All is as before then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before it is ready lets all guests go on, and nothing has been done.
    pub async fn run(self) -> Result<(), TransactionError> {
        self.prepare().await?.commit();
        Ok(())
    }
}

impl Preparing {
    /// What came of it if no guest write is in flight any more; else this again, with the guests still
    /// waiting.
    ///
    /// # Errors
    ///
    /// `self`, if a write is still in flight on one of the disks. Inside, the error of the first act that
    /// fails; all is as before then.
    pub fn try_prepared(mut self) -> Result<Result<Prepared, TransactionError>, Self> {
        match self.poll_prepared(None) {
            Poll::Ready(result) => Ok(result),
            Poll::Pending => Err(self),
        }
    }

    /// The same; if a write is in flight the waker, if one is given, is called when it is worth asking
    /// again. Not to be called again once it was ready.
    ///
    /// # Errors
    ///
    /// The error of the first act that fails. All is as before then.
    ///
    /// # Panics
    ///
    /// If it was ready before.
    pub fn poll_prepared(
        &mut self,
        waker: Option<&Waker>,
    ) -> Poll<Result<Prepared, TransactionError>> {
        let mut is_quiet = true;
        for held in &mut self.held {
            match held {
                Held::Waiting(quiesce) => match quiesce.poll_guard(waker) {
                    Poll::Ready(guard) => *held = Held::Quiet(guard),
                    Poll::Pending => is_quiet = false,
                },
                Held::Quiet(_) => {}
                Held::Gone => panic!("it was ready before"),
            }
        }
        if !is_quiet {
            return Poll::Pending;
        }
        let guards = self.held.iter_mut();
        let guards = guards.map(|held| match std::mem::replace(held, Held::Gone) {
            Held::Quiet(guard) => guard,
            Held::Waiting(_) | Held::Gone => unreachable!("all are quiet"),
        });
        let guards = guards.collect();
        Poll::Ready(self.apply(guards))
    }

    fn apply(&mut self, guards: Vec<QuiesceGuard>) -> Result<Prepared, TransactionError> {
        let nodes = std::mem::take(&mut self.nodes);
        let spares = std::mem::take(&mut self.spares);
        let mut locked = Locked::new(&nodes);
        let mut journal = Journal::new(&mut locked, &nodes);
        let mut jobs = Vec::new();
        let mut failed = None;
        for ((index, action), spare) in self.actions.iter().enumerate().zip(spares) {
            let applied = action.apply(&mut locked, &mut journal, &mut jobs, spare, &guards);
            if let Err(why) = applied {
                let kind = action.kind();
                failed = Some(TransactionError { index, kind, why });
                if !is_broken(Sabotage::GoOnAfterFailure) {
                    break;
                }
            }
        }
        if let Some(error) = failed {
            disarm(&jobs, &mut locked);
            if !is_broken(Sabotage::KeepHalf) {
                journal.roll_back(&mut locked);
            }
            drop(locked);
            jobs.iter().for_each(Job::wake_machine);
            return Err(error);
        }
        if !is_broken(Sabotage::DoNotHold) {
            journal.hold(&mut locked);
        }
        drop(locked);
        let is_let_go = is_broken(Sabotage::LetGoBeforeCommit);
        Ok(Prepared {
            open: Some(Open {
                journal,
                jobs,
                nodes,
                guards: if is_let_go { Vec::new() } else { guards },
            }),
        })
    }
}

impl Future for Preparing {
    type Output = Result<Prepared, TransactionError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_prepared(Some(cx.waker()))
    }
}

impl fmt::Debug for Preparing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Preparing")
            .field("actions", &self.actions)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// It is decided. Removed bitmaps go, jobs start, and then the guests go on.
    pub fn commit(mut self) {
        let Some(open) = self.open.take() else {
            return;
        };
        let unused = open.journal.commit(&mut Locked::new(&open.nodes));
        for job in open.jobs {
            // Somebody may have started or cancelled it since it was looked at. Either is as if it had
            // been asked a moment later: one that runs has begun at this instant, like all the others.
            if let Some(start) = job.at_start() {
                start.commit();
            }
            if job.start().is_err() && job.is_over() {
                disarm(std::slice::from_ref(&job), &mut Locked::new(&open.nodes));
            }
            job.wake_machine();
        }
        drop(open.guards);
        // Giving back memory takes time, and the guests need not wait for it.
        drop(unused);
    }

    /// The guard of a disk that was named, for what else must happen at this instant.
    #[must_use]
    pub fn guard(&self, node: &Node) -> Option<&QuiesceGuard> {
        let guards = &self.open.as_ref()?.guards;
        guards.iter().find(|guard| guard.is_of(node))
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            let mut locked = Locked::new(&open.nodes);
            disarm(&open.jobs, &mut locked);
            open.journal.roll_back(&mut locked);
            drop(locked);
            open.jobs.iter().for_each(Job::wake_machine);
            drop(open.guards);
        }
    }
}

/// Undoes what jobs have done at the instant at which they were to start.
fn disarm(jobs: &[Job], locked: &mut Locked<'_>) {
    for start in jobs.iter().filter_map(Job::at_start) {
        start.disarm(locked);
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").finish_non_exhaustive()
    }
}
