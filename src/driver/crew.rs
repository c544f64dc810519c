//! One job, and several tasks that drive it.
//!
//! ```text
//!            ┌────────────────────────────────────────────────────────────┐
//!            ▼                                                            │
//!  looks: machine.poll ─Op─▶ rings, and works on it ──▶ op_done           │
//!            │                                                            │
//!            └─Wait─▶ sits down with its waker ◀─ring─ the machine, or another that has found something
//!                     gets up at that time, or when a request of its own is answered
//! ```
//!
//! A device that does its work when it is polled copies with as many processors as there are tasks on threads
//! of their own, and nothing is handed from one thread to another.
//!
//! Invariants:
//!
//! 1. Who sits down has looked since the last ring, or is the one that was woken for it. So what happens is
//!    never left unseen while somebody is there to see it.
//! 2. Who leaves rings: it may have been woken for something that it did not look at, and nobody waits for
//!    the time that it was waiting for. Who only saves for a guest was never woken for the others: when it leaves,
//!    or waits with something done, it looks in their place, and rings if it has found something.
//! 3. Who leaves with operations that are not done, or not begun, says of each that it is lost. What others do
//!    stays in flight. When the last one leaves, all is lost. When only such are left that save for guests,
//!    nobody drives the job: it holds no guest then, or they might wait for themselves.
//! 4. The time that the machine is told never falls, although each looks at the clock for itself.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;

use super::bell::Bell;
use super::{Clock, Driven, Driver, SaveArea};
use crate::backup::Backup;
use crate::copy::Op;
use crate::io::{BlockDevice, BufferPool, ReadAt, WriteAt};
use crate::job::JobError;
use crate::machine::{Machine, Step};
use crate::sabotage::{Sabotage, is_broken};

/// A job that several tasks drive at once, each of which does what it takes.
///
/// # Examples
///
/// A backup by two threads, with devices that block. Each of them reads and writes, so twice as much is copied.
///
/// ```
/// # use std::sync::Mutex;
/// # use std::time::Duration;
/// # use blockjob::driver::{Clock, Driver};
/// # use blockjob::io::{AlignedBuf, BlockDevice, BufResult, ReadAt, WriteAt};
/// # use blockjob::{Backup, BackupOptions, ByteRange, Content, Extent, Limits, Node, Unmap};
/// # struct Memory(Mutex<Vec<u8>>);
/// # impl BlockDevice for Memory {
/// #     type Buf = AlignedBuf;
/// #     fn limits(&self) -> Limits {
/// #         Limits::new(self.0.lock().unwrap().len() as u64)
/// #     }
/// # }
/// # impl ReadAt for Memory {
/// #     async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
/// #         let at = offset as usize..offset as usize + buf.as_ref().len();
/// #         buf.as_mut().copy_from_slice(&self.0.lock().unwrap()[at]);
/// #         (Ok(()), buf)
/// #     }
/// #     async fn block_status(&self, range: ByteRange) -> std::io::Result<Extent> {
/// #         Ok(Extent { len: range.len(), content: Content::Data, in_top: true })
/// #     }
/// # }
/// # impl WriteAt for Memory {
/// #     async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
/// #         let at = offset as usize..offset as usize + buf.as_ref().len();
/// #         self.0.lock().unwrap()[at].copy_from_slice(buf.as_ref());
/// #         (Ok(()), buf)
/// #     }
/// #     async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> std::io::Result<()> {
/// #         Err(std::io::ErrorKind::Unsupported.into())
/// #     }
/// #     async fn discard(&self, _: ByteRange) -> std::io::Result<()> {
/// #         Err(std::io::ErrorKind::Unsupported.into())
/// #     }
/// #     async fn flush(&self) -> std::io::Result<()> {
/// #         Ok(())
/// #     }
/// #     async fn settle(&self) {}
/// # }
/// # struct NoTime;
/// # impl Clock for NoTime {
/// #     fn now(&self) -> Duration {
/// #         Duration::ZERO
/// #     }
/// #     async fn sleep_until(&self, _: Duration) {
/// #         std::future::pending().await
/// #     }
/// # }
/// # fn block_on<F: Future>(future: F) -> F::Output {
/// #     tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
/// # }
/// let (source, target) = (Memory(Mutex::new(vec![1; 1 << 22])), Memory(Mutex::new(vec![0; 1 << 22])));
/// let node = Node::new(1 << 22);
/// let mut backup = Backup::new(&node, source.limits(), target.limits(), BackupOptions::default())?;
/// backup.job().start()?;
/// let driver = Driver::new(&source, &target, NoTime);
///
/// let crew = driver.crew(&mut backup);
/// std::thread::scope(|scope| {
///     scope.spawn(|| block_on(crew.run_backup()));
///     block_on(crew.run_backup())
/// })?;
/// assert_eq!(*target.0.lock().unwrap(), vec![1; 1 << 22]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Crew<'a, M: Machine, D> {
    pub(super) driver: &'a D,
    pub(super) state: Mutex<State<'a, M>>,
    pub(super) bell: Arc<Bell>,
    /// What the machine gets: it rings the bell.
    pub(super) waker: Waker,
    /// Whether the target was told to give up what it has: it gets nothing more.
    gives_up: AtomicBool,
}

impl<S: BlockDevice, T: BlockDevice, P, C, B> Driver<S, T, P, C, B> {
    /// A job that is to be driven by several tasks. It fails if it was made for other devices, as far as their
    /// [limits](BlockDevice::limits) tell.
    pub fn crew<'a, M: Machine>(&'a self, machine: &'a mut M) -> Crew<'a, M, Self> {
        machine.is_driven_over(&self.source.limits(), &self.target.limits());
        let bell = Arc::new(Bell::default());
        Crew {
            driver: self,
            state: Mutex::new(State {
                machine,
                now: Duration::ZERO,
                drivers: 0,
                savers: 0,
                found: None,
                until: None,
            }),
            waker: Waker::from(Arc::clone(&bell)),
            bell,
            gives_up: AtomicBool::new(false),
        }
    }
}

impl<M, S, T, P, C, B> Crew<'_, M, Driver<S, T, P, C, B>>
where
    M: Machine,
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
    C: Clock,
    B: SaveArea<S::Buf>,
{
    /// Drives the job until it is over, or wants to switch: as [`Driver::run`], beside others that do the same.
    ///
    /// All are told when it is over, but only one gets a switch. That one runs it on afterwards; the others wait
    /// meanwhile.
    ///
    /// Wakers are called, and the clock is asked, by whoever of them happens to work. They must not poll one of
    /// these futures at once.
    ///
    /// It yields whenever an operation has ended, so that devices which do their work when they are polled keep
    /// others on the same thread waiting for no longer than one of them takes.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped at any await: what it had in flight is dirty again once the target has
    /// [settled](WriteAt::settle), which another sees to, or the next run. With the last of them nobody drives the
    /// job any more, as with [`Driver::run`].
    pub async fn run(&self) -> Driven {
        let member = Member::join(self, false);
        let mut running = FuturesUnordered::new();
        let mut urgent = FuturesUnordered::new();
        let mut sleep = None;
        poll_fn(|cx| {
            member.gets_up();
            loop {
                while let Poll::Ready(Some(())) = urgent.poll_next_unpin(cx) {}
                // One at a time: a device may do its work when it is polled, and a guest that came meanwhile is
                // not to wait for all of them.
                let is_done = matches!(running.poll_next_unpin(cx), Poll::Ready(Some(())));
                let mut has_urgent = false;
                match self.look() {
                    Step::Op(op) => {
                        has_urgent = op.is_urgent();
                        match has_urgent {
                            true => urgent.push(self.work_on(op)),
                            false => running.push(self.work_on(op)),
                        }
                        // There may be more, and others have nothing to do.
                        self.bell.wake_one();
                    }
                    Step::Wait { .. } if is_done => {}
                    Step::Switch(switch) => return Poll::Ready(Driven::Switch(switch)),
                    Step::SwitchBack(back) => return Poll::Ready(Driven::SwitchBack(back)),
                    Step::Done(result) => return Poll::Ready(Driven::Done(result)),
                    Step::Wait { until } => {
                        if let Some(at) = until {
                            let sleep_until = |at| self.driver.clock.sleep_until(at);
                            let (known, future) =
                                sleep.get_or_insert_with(|| (at, Box::pin(sleep_until(at))));
                            if *known != at {
                                *known = at;
                                future.set(sleep_until(at));
                            }
                            if future.as_mut().poll(cx).is_ready() {
                                sleep = None;
                                continue;
                            }
                        }
                        if member.sits_down(cx) {
                            return Poll::Pending;
                        }
                    }
                }
                // Others on this thread have their turn: guests among them, and timers.
                if is_done && !has_urgent {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    fn look(&self) -> Step {
        let now = self.driver.clock.now();
        let mut state = self.state.lock();
        let now = state.see(now);
        let step = match state.found.take() {
            Some(found) => found,
            None => state.machine.poll(now, &self.waker),
        };
        if let Step::Wait { until } = step {
            state.until = until;
        }
        step
    }

    /// It is lost from here on if that is dropped, whether it was begun or not.
    pub(super) fn work_on(&self, op: Op) -> impl Future<Output = ()> {
        let kind = op.kind();
        let mut work = Work {
            crew: self,
            op: Some(op),
            is_begun: false,
        };
        async move {
            work.is_begun = true;
            let outcome = self.driver.perform(kind, &self.gives_up).await;
            let now = self.driver.clock.now();
            let mut state = self.state.lock();
            let now = state.see(now);
            let op = work.op.take().expect("it is done once");
            state.machine.op_done(now, op, outcome);
        }
    }
}

impl<S, T, P, C, B> Crew<'_, Backup, Driver<S, T, P, C, B>>
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
    C: Clock,
    B: SaveArea<S::Buf>,
{
    /// As [`run`](Self::run), of a backup, which never switches.
    ///
    /// # Errors
    ///
    /// Why the backup did not succeed.
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run).
    pub async fn run_backup(&self) -> Result<(), JobError> {
        self.run().await.of_backup()
    }
}

impl<M: Machine, D> fmt::Debug for Crew<'_, M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").finish_non_exhaustive()
    }
}

pub(super) struct State<'a, M: Machine> {
    pub(super) machine: &'a mut M,
    /// The latest that anybody has seen.
    now: Duration,
    /// How many drive it.
    drivers: usize,
    /// How many do no more than to save for a guest.
    savers: usize,
    /// What a saver has found, for who drives the job.
    found: Option<Step>,
    /// Until when who has looked last waits.
    until: Option<Duration>,
}

impl<M: Machine> State<'_, M> {
    /// What time it is, when somebody has seen that.
    pub(super) fn see(&mut self, now: Duration) -> Duration {
        self.now = self.now.max(now);
        self.now
    }

    /// Looks for others, if there are any: whether there is something that they are to know.
    pub(super) fn finds_something(&mut self, waker: &Waker) -> bool {
        if self.drivers == 0 {
            return false;
        }
        if self.found.is_none() {
            match self.machine.poll(self.now, waker) {
                Step::Wait { until: None } => return false,
                Step::Wait { until: Some(at) } => {
                    return self.until.is_none_or(|until| at < until);
                }
                step => self.found = Some(step),
            }
        }
        true
    }

    fn count(&mut self, saves: bool) -> &mut usize {
        match saves {
            true => &mut self.savers,
            false => &mut self.drivers,
        }
    }

    /// Somebody leaves. With the last one everything in flight is lost.
    fn leave(&mut self, saves: bool) {
        *self.count(saves) -= 1;
        if self.drivers + self.savers == 0 {
            self.found = None;
            self.machine.ops_lost();
        } else if self.drivers == 0 {
            self.machine.let_go();
        }
    }
}

/// An operation that somebody works on. It is lost if that is dropped.
struct Work<'c, 'a, M: Machine, D> {
    crew: &'c Crew<'a, M, D>,
    op: Option<Op>,
    is_begun: bool,
}

impl<M: Machine, D> Drop for Work<'_, '_, M, D> {
    fn drop(&mut self) {
        if let Some(op) = self.op.take() {
            let is_forgotten = is_broken(Sabotage::ForgetLostWork)
                || (!self.is_begun && is_broken(Sabotage::ForgetUnbegun));
            if is_forgotten {
                return;
            }
            self.crew.state.lock().machine.op_lost(op);
        }
    }
}

/// Who drives the job, or saves for a guest.
pub(super) struct Member<'c, 'a, M: Machine, D> {
    crew: &'c Crew<'a, M, D>,
    id: u64,
    /// Whether it does no more than to save for a guest.
    saves: bool,
}

impl<'c, 'a, M: Machine, D> Member<'c, 'a, M, D> {
    pub(super) fn join(crew: &'c Crew<'a, M, D>, saves: bool) -> Self {
        *crew.state.lock().count(saves) += 1;
        let id = crew.bell.new_id();
        Self { crew, id, saves }
    }

    /// Waits to be woken; `false` if the bell has rung since somebody looked.
    fn sits_down(&self, cx: &Context<'_>) -> bool {
        self.crew.bell.sit_down(self.id, cx.waker().clone())
    }

    /// Waits no more.
    fn gets_up(&self) {
        self.crew.bell.get_up(self.id);
    }
}

impl<M: Machine, D> Drop for Member<'_, '_, M, D> {
    fn drop(&mut self) {
        if self.saves {
            return self.crew.state.lock().leave(true);
        }
        self.gets_up();
        self.crew.state.lock().leave(false);
        if !is_broken(Sabotage::LeaveInSilence) {
            self.crew.bell.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_never_falls() {
        let node = crate::Node::new(1 << 20);
        let limits = crate::Limits::new(1 << 20);
        let mut backup =
            Backup::new(&node, limits, limits, crate::BackupOptions::default()).unwrap();
        let mut state = State {
            machine: &mut backup,
            now: Duration::ZERO,
            drivers: 0,
            savers: 0,
            found: None,
            until: None,
        };
        let seen = [3, 5, 4, 6].map(|second| state.see(Duration::from_secs(second)).as_secs());
        assert_eq!(seen, [3, 5, 5, 6]);
    }
}
