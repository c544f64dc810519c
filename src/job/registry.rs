//! The manager of jobs: knows all that were made with it, and ends them all.
//!
//! 1. No two jobs that exist have the same name, also not with one that is over and not dismissed.
//! 2. They are told in the order in which they were made. Jobs without a name are left out, but are shut
//!    down like the others.
//! 3. From the start of a shutdown on no job is made, and each that exists is cancelled by force.
//! 4. The manager keeps its jobs, not they it. When its last handle is dropped they are cancelled by force.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use crate::job::{Job, JobInfo, JobOptionsError, Shared, Status};
use crate::sabotage::{Sabotage, is_broken};

/// All jobs of a caller: unique names, one list, one shutdown.
///
/// A handle; clones stand for the same manager. A job is added by
/// [`JobOptions::jobs`](crate::JobOptions::jobs) when it is made, and leaves when it is dismissed, or over
/// with [`auto_dismiss`](crate::JobOptions::auto_dismiss). When the last handle is dropped, those in options
/// included, all jobs are cancelled by force, but nobody waits for them: that is what
/// [`shutdown`](Self::shutdown) does.
///
/// # Examples
///
/// ```
/// use std::task::{Poll, Waker};
/// use blockjob::{JobOptionsError, Jobs, Limits, Mirror, MirrorError, MirrorOptions, Node, Status};
///
/// let jobs = Jobs::new();
/// let node = Node::new(1 << 20);
/// let limits = Limits::new(1 << 20);
/// let mut options = MirrorOptions::default();
/// options.job.id = Some("disk0".to_owned());
/// options.job.jobs = Some(jobs.clone());
/// let mirror = Mirror::new(&node, limits, limits, options.clone())?;
///
/// let [info] = &jobs.query()[..] else { panic!() };
/// assert_eq!((info.id.as_deref(), info.status), (Some("disk0"), Status::Created));
/// jobs.get("disk0").expect("it was made").start()?;
///
/// // The name is taken until the job is dismissed.
/// let other = Node::new(1 << 20);
/// let error = Mirror::new(&other, limits, limits, options).unwrap_err();
/// assert_eq!(error, MirrorError::Job(JobOptionsError::IdInUse("disk0".to_owned())));
///
/// // Those who drive the jobs bring them to their ends meanwhile; here the machine is dropped.
/// assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
/// drop(mirror);
/// assert_eq!(jobs.poll_shutdown(Waker::noop()), Poll::Ready(()));
/// assert!(jobs.query().is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Jobs {
    handle: Arc<Handle>,
}

/// What all clones of a handle share; cancels all when the last is gone.
#[derive(Default)]
struct Handle {
    registry: Arc<Registry>,
}

#[derive(Default)]
pub(super) struct Registry {
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    /// In the order in which they were made. Those that are gone are taken out now and then.
    jobs: Vec<Arc<Shared>>,
    is_shutting_down: bool,
    next_waiter: u64,
    /// Who waits for all to be gone. Number 0 is who polls without a future.
    waiters: BTreeMap<u64, Waker>,
}

/// Waits until no job is left; made by [`Jobs::shutdown`].
///
/// # Cancel safety
///
/// Dropping it stops the waiting, not the shutdown.
#[must_use = "the shutdown goes on, but nobody waits for its end"]
pub struct Shutdown {
    registry: Arc<Registry>,
    waiter: u64,
}

impl Jobs {
    /// A manager without jobs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// All jobs that have a name, those that are over and not dismissed too, in the order in which they were
    /// made. What is told of one job is what it was at one moment; the moments of two may differ.
    #[must_use]
    pub fn query(&self) -> Vec<JobInfo> {
        let jobs = self.handle.registry.jobs();
        let infos = jobs.iter().map(Job::query);
        infos
            .filter(|info| info.id.is_some() || is_broken(Sabotage::TellInternal))
            .filter(|info| info.status != Status::Null)
            .collect()
    }

    /// The job of that name, unless there is none.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Job> {
        let jobs = self.handle.registry.jobs();
        jobs.into_iter().find(|job| job.shared.lock().is_named(id))
    }

    /// Cancels all jobs by force, and waits until none is left. From this call on no job can be made with
    /// this manager.
    ///
    /// Who drives the machines must go on, or drop them: they do what is left to do. Each waits for
    /// operations in flight as long as its [`cancel_grace`](crate::JobOptions::cancel_grace) says. A
    /// [`Switch`](crate::Switch) that is out is to be committed or dropped, as ever. Jobs that are over
    /// are dismissed.
    pub fn shutdown(&self) -> Shutdown {
        let registry = Arc::clone(&self.handle.registry);
        let mut list = registry.list.lock();
        list.next_waiter += 1;
        let waiter = list.next_waiter;
        drop(list);
        registry.shut_down();
        Shutdown { registry, waiter }
    }

    /// As [`shutdown`](Self::shutdown), for those without futures: ready when no job is left. If one is,
    /// `waker` is called when it is worth asking again; that of the last call counts.
    pub fn poll_shutdown(&self, waker: &Waker) -> Poll<()> {
        self.handle.registry.shut_down();
        self.handle.registry.poll_empty(0, waker)
    }

    pub(super) fn registry(&self) -> Weak<Registry> {
        Arc::downgrade(&self.handle.registry)
    }

    /// Adds a new job, if `join` succeeds.
    pub(super) fn add(
        &self,
        job: &Arc<Shared>,
        join: impl FnOnce() -> Result<(), JobOptionsError>,
    ) -> Result<(), JobOptionsError> {
        let mut list = self.handle.registry.list.lock();
        let gone = list.take_gone();
        let result = list.add(job, join);
        drop(list);
        drop(gone);
        result
    }
}

impl List {
    fn add(
        &mut self,
        job: &Arc<Shared>,
        join: impl FnOnce() -> Result<(), JobOptionsError>,
    ) -> Result<(), JobOptionsError> {
        if self.is_shutting_down && !is_broken(Sabotage::MakeInShutdown) {
            return Err(JobOptionsError::ShuttingDown);
        }
        let id = job.lock().options.id.clone();
        if let Some(id) = id {
            let is_taken = self.jobs.iter().any(|other| other.lock().is_named(&id));
            if is_taken && !is_broken(Sabotage::NameTwice) {
                return Err(JobOptionsError::IdInUse(id));
            }
        }
        join()?;
        self.jobs.push(Arc::clone(job));
        Ok(())
    }

    /// Those that are gone, to be dropped when the lock is released.
    #[must_use]
    fn take_gone(&mut self) -> Vec<Arc<Shared>> {
        let (gone, jobs) = mem::take(&mut self.jobs)
            .into_iter()
            .partition(|job| job.lock().status == Status::Null);
        self.jobs = jobs;
        gone
    }
}

impl Registry {
    fn jobs(&self) -> Vec<Job> {
        let list = self.list.lock();
        let shared = list.jobs.iter().map(Arc::clone);
        shared.map(|shared| Job { shared }).collect()
    }

    /// Refuses new jobs and cancels all there are, unless that was done.
    fn shut_down(&self) {
        let was_shutting_down = mem::replace(&mut self.list.lock().is_shutting_down, true);
        if !was_shutting_down && !is_broken(Sabotage::ShutDownNobody) {
            self.jobs().iter().for_each(Job::cancel_by_force);
        }
    }

    /// A job is over.
    pub(super) fn job_over(&self) {
        let waiters = mem::take(&mut self.list.lock().waiters);
        waiters.into_values().for_each(Waker::wake);
    }

    /// Whether no job is left. Dismisses those that are over.
    fn poll_empty(&self, waiter: u64, waker: &Waker) -> Poll<()> {
        let waker = waker.clone();
        let before = self.list.lock().waiters.insert(waiter, waker);
        drop(before);
        for job in self.jobs() {
            // Refused if it is not over.
            let _ = job.dismiss();
        }
        let mut list = self.list.lock();
        let gone = list.take_gone();
        let is_empty = list.jobs.is_empty();
        let unused = is_empty.then(|| list.waiters.remove(&waiter));
        drop(list);
        drop((gone, unused));
        match is_empty {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !is_broken(Sabotage::OutliveManager) {
            self.registry.shut_down();
        }
    }
}

impl Future for Shutdown {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.registry.poll_empty(self.waiter, cx.waker())
    }
}

impl Drop for Shutdown {
    fn drop(&mut self) {
        let unused = self.registry.list.lock().waiters.remove(&self.waiter);
        drop(unused);
    }
}

/// The same manager.
impl PartialEq for Jobs {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }
}

impl Eq for Jobs {}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shutdown").finish_non_exhaustive()
    }
}
