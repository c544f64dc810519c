//! Virtual time and what happens in it.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use blockjob::ByteRange;
use blockjob::driver::Clock;

use super::disk::Disk;
use super::rng::Rng;

pub(crate) const SOURCE: usize = 0;
pub(crate) const TARGET: usize = 1;

/// Something that happens at a time.
pub(crate) enum Happening {
    /// A part of a request touches the medium.
    Touch { disk: usize, request: u64, half: u8 },
    /// A request is answered.
    Answer { disk: usize, request: u64 },
    /// Somebody wanted to be woken.
    Wake(Waker),
    /// A guest thread goes on.
    Guest(usize),
    /// Somebody asks something of the job; an index into the plan.
    User(usize),
}

pub(crate) struct World {
    pub now: u64,
    /// From this time on no task is dropped any more.
    pub peace: u64,
    pub steps: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64, u64)>>,
    happenings: std::collections::BTreeMap<u64, Happening>,
    pub rng: Rng,
    /// Each source is followed by its target.
    pub disks: Vec<Disk>,
    /// What guests whose requests were answered are to be told: (guest, request).
    pub guest_answers: Vec<(usize, u64)>,
    /// The same for a driver without futures: (disk, request).
    pub queue_answers: Vec<(usize, u64)>,
    /// What became of the requests of jobs that are still waited for, if somebody asks for it.
    pub job_answers: Option<Vec<JobAnswer>>,
    /// Requests of jobs that were dropped, and on which disk, for who asks for it.
    pub job_losses: Vec<(usize, Loss)>,
}

/// A request of a job that was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JobAnswer {
    pub disk: usize,
    pub request: u64,
    pub range: ByteRange,
    pub is_write: bool,
    pub is_status: bool,
    pub is_good: bool,
}

/// What a request that was dropped was about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loss {
    /// This was being read or written.
    Range(ByteRange),
    /// What was written before is perhaps durable, and nobody will know.
    Flush,
}

pub(crate) type Shared = Rc<RefCell<World>>;

impl World {
    pub(crate) fn new(rng: Rng, disks: Vec<Disk>, peace: u64) -> Shared {
        Rc::new(RefCell::new(Self {
            now: 0,
            peace,
            steps: 0,
            order: 0,
            queue: BinaryHeap::new(),
            happenings: std::collections::BTreeMap::new(),
            rng,
            disks,
            guest_answers: Vec::new(),
            queue_answers: Vec::new(),
            job_answers: None,
            job_losses: Vec::new(),
        }))
    }

    /// Microseconds from now. What happens at the same time happens in random order.
    pub(crate) fn after(&mut self, micros: u64, happening: Happening) {
        let id = self.order;
        self.order += 1;
        let tie = self.rng.next();
        self.queue.push(Reverse((self.now + micros, tie, id)));
        self.happenings.insert(id, happening);
    }

    /// Goes on to what happens next.
    pub(crate) fn step(&mut self) -> Option<Happening> {
        let Reverse((at, _, id)) = self.queue.pop()?;
        self.now = at;
        self.steps += 1;
        self.happenings.remove(&id)
    }

    /// The process is gone, and what it has asked of the disks is over: nothing but they is left.
    pub(crate) fn end_of_process(&mut self) {
        self.queue.clear();
        self.happenings.clear();
        self.guest_answers.clear();
        self.queue_answers.clear();
        self.disks.iter_mut().for_each(Disk::end_of_process);
    }

    pub(crate) fn time(&self) -> Duration {
        Duration::from_micros(self.now)
    }
}

/// A waker that notes that it was called.
#[derive(Default)]
pub(crate) struct Flag(AtomicBool);

impl Flag {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    pub(crate) fn wake_it(self: Arc<Self>) {
        self.wake();
    }

    pub(crate) fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub(crate) struct SimClock(pub Shared);

impl Clock for SimClock {
    fn now(&self) -> Duration {
        self.0.borrow().time()
    }

    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()> {
        Sleep {
            world: Rc::clone(&self.0),
            at,
            is_set: false,
        }
    }
}

struct Sleep {
    world: Shared,
    at: Duration,
    is_set: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut world = self.world.borrow_mut();
        let now = world.time();
        if now >= self.at {
            return Poll::Ready(());
        }
        if !self.is_set {
            // Rounded up, or it would wake too early for ever.
            let micros = (self.at - now).as_nanos().div_ceil(1000) as u64;
            world.after(micros, Happening::Wake(cx.waker().clone()));
            drop(world);
            self.is_set = true;
        }
        Poll::Pending
    }
}
