//! The machine of a job, and what drives it: requests and completions, or tasks that come and go.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockjob::driver::{Clock, Crew, Driven, Driver};
use blockjob::queue::{Answer, Next, Queue, Request, Work};
use blockjob::{Backup, ByteRange, JobError, Machine, Mirror, Side};

use super::crew::Several;
use super::disk::{Ask, Owner, SimDevice, VecPool, result_of};
use super::rng::Rng;
use super::world::{Flag, Happening, Shared, SimClock, World};

/// The most tasks that drive one job.
const CREW_MAX: u64 = 3;
/// A task is dropped once in so many times that they are polled: seldom or often. Not twice at the same time, or those
/// that take its place might come to nothing for ever.
const DROPS: [u64; 3] = [40, 40, 6];

/// How often a device that yields does so for one request, at most.
const YIELDS_MAX: u64 = 10;

/// A machine, and what drives it over two disks of the world.
pub(crate) struct Driving<M: InWorld> {
    /// The disk of its source. That of its target is the next one.
    source: usize,
    /// Whether it is worth polling.
    pub(crate) flag: Arc<Flag>,
    way: Way<M>,
}

enum Way<M: InWorld> {
    Queue(Box<Requests<M>>),
    Tasks(Tasks<M>),
    /// It is over, or was dropped.
    Gone,
}

/// A machine driven by requests.
struct Requests<M: Machine> {
    queue: Queue<VecPool, M>,
    /// (disk, request of the world) → request of the queue
    ids: BTreeMap<(usize, u64), u64>,
    settling: Vec<u64>,
    timer: u64,
}

/// A machine driven by tasks.
struct Tasks<M> {
    /// Where it is while nobody drives it.
    home: Home<M>,
    /// What one of them was handed.
    handed: Rc<RefCell<Option<Driven>>>,
    running: Option<Running>,
}

type Home<M> = Rc<RefCell<Option<M>>>;
type Running = Pin<Box<dyn Future<Output = Result<(), JobError>>>>;
type SimDriver = Driver<SimDevice, SimDevice, VecPool, SimClock>;

/// A machine that a task among others can drive here.
pub(crate) trait InWorld: Machine + Sized + 'static {
    /// What the task with that number does.
    fn drive(
        crew: &Crew<'_, Self, SimDriver>,
        clock: &SimClock,
        index: usize,
    ) -> impl Future<Output = Driven>;
}

impl InWorld for Mirror {
    async fn drive(crew: &Crew<'_, Self, SimDriver>, _: &SimClock, _: usize) -> Driven {
        crew.run().await
    }
}

impl InWorld for Backup {
    async fn drive(crew: &Crew<'_, Self, SimDriver>, clock: &SimClock, index: usize) -> Driven {
        if index < 2 {
            return crew.run().await;
        }
        // One that only saves, for any guest, and comes back each time.
        loop {
            let until = clock.now() + Duration::from_micros(30);
            crew.save_for(clock.sleep_until(until)).await;
        }
    }
}

impl<M: InWorld> Driving<M> {
    pub(crate) fn new(machine: M, source: usize, uses_queue: bool) -> Self {
        let way = match uses_queue {
            true => Way::Queue(Box::new(Requests {
                queue: Queue::new(machine, VecPool),
                ids: BTreeMap::new(),
                settling: Vec::new(),
                timer: u64::MAX,
            })),
            false => Way::Tasks(Tasks {
                home: Rc::new(RefCell::new(Some(machine))),
                handed: Rc::default(),
                running: None,
            }),
        };
        Self {
            source,
            flag: Flag::new(),
            way,
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.way, Way::Gone)
    }

    /// The machine is dropped with what drives it.
    pub(crate) fn drop_all(&mut self) {
        self.way = Way::Gone;
    }

    /// What drives it is dropped, and what it has in flight is lost.
    pub(crate) fn drop_driver(&mut self) {
        match &mut self.way {
            Way::Queue(requests) => {
                // The ring is torn down; what it was given goes on.
                requests.settling.clear();
                requests.queue.requests_lost();
            }
            Way::Tasks(tasks) => tasks.running = None,
            Way::Gone => {}
        }
        self.flag.clone().wake_it();
    }

    /// The machine, if no task has it just now.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&M) -> R) -> Option<R> {
        match &self.way {
            Way::Queue(requests) => Some(look(requests.queue.machine())),
            Way::Tasks(tasks) => tasks.home.borrow().as_ref().map(look),
            Way::Gone => None,
        }
    }

    /// Has it go on by a step, or as far as it can: what its caller is to take, if that is what comes.
    pub(crate) fn poll(&mut self, world: &Shared) -> Option<Driven> {
        let waker = Waker::from(Arc::clone(&self.flag));
        let handed = match &mut self.way {
            Way::Queue(requests) => requests.poll(world, self.source, &self.flag),
            Way::Tasks(tasks) => tasks.poll(world, self.source, &waker),
            Way::Gone => None,
        };
        if handed.is_some() {
            self.flag.clone().wake_it();
        }
        handed
    }

    /// A request of the queue was answered.
    pub(crate) fn answer(&mut self, world: &mut World, disk: usize, id: u64) {
        let request = world.take(disk, id);
        let Way::Queue(requests) = &mut self.way else {
            return;
        };
        let result = result_of(&request);
        let answer = match request.ask {
            Ask::Read => Answer::Transfer(result, request.buf),
            Ask::Write(buf) => Answer::Transfer(result, buf),
            Ask::Status => Answer::Status(result.map(|()| request.extent.unwrap())),
            Ask::Zero | Ask::Discard | Ask::Flush => Answer::Plain(result),
        };
        let id = requests.ids.remove(&(disk, id));
        let id = id.expect("it was submitted");
        requests.queue.completed(world.time(), id, answer);
        self.flag.clone().wake_it();
    }

    /// Tells the queue that the target has settled, if it has, or what has come of it instead.
    pub(crate) fn settle(
        &mut self,
        world: &mut World,
        mut outcome: impl FnMut(&mut World) -> io::Result<()>,
    ) {
        let Way::Queue(requests) = &mut self.way else {
            return;
        };
        let mut out = world.disks[self.source + 1].requests.values();
        if !out.all(|request| matches!(request.owner, Owner::Guest(_))) {
            return;
        }
        for id in requests.settling.drain(..) {
            let answer = Answer::Plain(outcome(world));
            requests.queue.completed(world.time(), id, answer);
            self.flag.clone().wake_it();
        }
    }
}

impl<M: Machine> Requests<M> {
    fn poll(&mut self, world: &Shared, source: usize, flag: &Arc<Flag>) -> Option<Driven> {
        let now = world.borrow().time();
        let waker = Waker::from(Arc::clone(flag));
        match self.queue.next(now, &waker) {
            Next::Submit(request) => {
                flag.clone().wake_it();
                self.submit(&mut world.borrow_mut(), source, request);
                None
            }
            Next::Wait { until } => {
                if let Some(at) = until {
                    let mut world = world.borrow_mut();
                    let micros = at.saturating_sub(now).as_nanos().div_ceil(1000) as u64;
                    // One timer per time, or they breed.
                    let at = world.now.saturating_add(micros);
                    if std::mem::replace(&mut self.timer, at) != at {
                        world.after(micros, Happening::Wake(waker));
                    }
                }
                None
            }
            Next::Switch(switch) => Some(Driven::Switch(switch)),
            Next::SwitchBack(back) => Some(Driven::SwitchBack(back)),
            Next::Done(result) => Some(Driven::Done(result)),
        }
    }

    fn submit(&mut self, world: &mut World, source: usize, request: Request<Vec<u8>>) {
        let disk = match request.side {
            Side::Source => source,
            Side::Target | Side::Buffer => source + 1,
        };
        let at = |offset, buf: &Vec<u8>| ByteRange::at(offset, buf.len() as u64).unwrap();
        let (range, ask) = match request.work {
            Work::Read { offset, buf } => (at(offset, &buf), Ask::Read),
            Work::Write { offset, buf } => (at(offset, &buf), Ask::Write(buf)),
            Work::Status(range) => (range, Ask::Status),
            Work::WriteZeroes(range, _) => (range, Ask::Zero),
            Work::Discard(range) => (range, Ask::Discard),
            Work::Flush => ((0..0).into(), Ask::Flush),
            Work::Settle => return self.settling.push(request.id),
            Work::WriteCompressed { .. } | Work::CopyFromSource(_) | Work::Compare { .. } => {
                unreachable!("not offered")
            }
            Work::CancelInFlight => {
                let done = Answer::Plain(Ok(()));
                return self.queue.completed(world.time(), request.id, done);
            }
        };
        let id = world.submit(disk, Owner::Queue, range, ask);
        self.ids.insert((disk, id), request.id);
    }
}

impl<M: InWorld> Tasks<M> {
    fn poll(&mut self, world: &Shared, source: usize, waker: &Waker) -> Option<Driven> {
        let start = || run(world, source, &self.home, &self.handed);
        let running = self.running.get_or_insert_with(start);
        match running.as_mut().poll(&mut Context::from_waker(waker)) {
            Poll::Ready(result) => {
                self.running = None;
                Some(Driven::Done(result))
            }
            Poll::Pending => self.handed.take(),
        }
    }
}

/// Gives the machine back to its place when those who drive it are dropped.
struct Lent<M> {
    machine: Option<M>,
    home: Home<M>,
}

impl<M> Drop for Lent<M> {
    fn drop(&mut self) {
        *self.home.borrow_mut() = self.machine.take();
    }
}

/// Several tasks over the devices. What one of them is handed is put where it is looked for, and they go on.
fn run<M: InWorld>(
    world: &Shared,
    source: usize,
    home: &Home<M>,
    handed: &Rc<RefCell<Option<Driven>>>,
) -> Running {
    let mut rng = Rng::new(world.borrow_mut().rng.next());
    // Where several requests do, a task waits with others that it has taken and not begun with.
    let yields = rng.pick(&[0, 0, YIELDS_MAX]);
    let one_in = rng.pick(&DROPS);
    let device = |disk| SimDevice {
        world: Rc::clone(world),
        disk,
        yields,
    };
    let clock = || SimClock(Rc::clone(world));
    let driver = Driver::with_pool(device(source), device(source + 1), VecPool, clock());
    let clock = clock();
    let mut lent = Lent {
        machine: home.borrow_mut().take(),
        home: Rc::clone(home),
    };
    let handed = Rc::clone(handed);
    Box::pin(async move {
        let machine = lent.machine.as_mut().expect("nobody else drives it");
        let (crew, clock) = (&driver.crew(machine), &clock);
        // One of them is as good as none.
        let count = rng.between(1, CREW_MAX) as usize;
        let start = |index| M::drive(crew, clock, index);
        let mut last = None;
        let drops = |rng: &mut Rng| {
            let (now, peace) = (clock.0.borrow().now, clock.0.borrow().peace);
            let is_due = now < peace && last != Some(now) && rng.one_in(one_in);
            last = if is_due { Some(now) } else { last };
            is_due
        };
        let mut several = pin!(Several::new(count, drops, rng, start));
        poll_fn(|cx| match several.as_mut().poll(cx) {
            Poll::Ready(Driven::Done(result)) => Poll::Ready(result),
            Poll::Ready(driven) => {
                *handed.borrow_mut() = Some(driven);
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        })
        .await
    })
}
