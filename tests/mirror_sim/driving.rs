//! The job driven by futures, and by requests and completions.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockjob::driver::{Driven, Driver};
use blockjob::queue::{Answer, Next, Queue, Work};
use blockjob::{ByteRange, Mirror, Side};

use crate::sim::crew::Several;
use crate::sim::disk::{Ask, Owner, SimDevice, VecPool, result_of};
use crate::sim::rng::Rng;
use crate::sim::world::{Flag, Happening, SOURCE, SimClock, TARGET};
use crate::{Signal, Sim};

pub(crate) fn drive(sim: &mut Sim, mirror: Mirror) {
    if sim.plan.uses_queue {
        run_queue(sim, mirror);
    } else {
        run_futures(sim, mirror);
    }
}

/// Drives the job with futures, which are dropped now and then.
fn run_futures(sim: &mut Sim, mut mirror: Mirror) {
    let device = |disk| SimDevice {
        world: Rc::clone(&sim.world),
        disk,
        yields: 0,
    };
    let driver = Driver::with_pool(
        device(SOURCE),
        device(TARGET),
        VecPool,
        SimClock(Rc::clone(&sim.world)),
    );
    loop {
        let mut signal = Signal::GoOn;
        let (members, rng) = {
            let rng = &mut sim.world.borrow_mut().rng;
            (rng.between(1, 3) as usize, Rng::new(rng.next()))
        };
        let driven = {
            // One of them is as good as none.
            let crew = &driver.crew(&mut mirror);
            let run = Several::new(members, |rng: &mut Rng| rng.one_in(60), rng, |_| crew.run());
            let mut future = pin!(run);
            let flag = Flag::new();
            let waker = Waker::from(Arc::clone(&flag));
            loop {
                if flag.take() {
                    let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
                    if let Poll::Ready(driven) = polled {
                        break Some(driven);
                    }
                    sim.take_events();
                }
                signal = sim.step();
                if !matches!(signal, Signal::GoOn) {
                    break None;
                }
            }
        };
        sim.take_events();
        sim.check_coverage(&mirror);
        match driven {
            Some(Driven::Switch(switch)) => sim.switch(switch),
            Some(Driven::SwitchBack(_)) => unreachable!("it is in no group"),
            Some(Driven::Done(result)) => {
                let is_good = result.is_ok();
                sim.ended(result, mirror.left_dirty());
                if !is_good {
                    sim.take_checkpoint(&mirror);
                }
                return;
            }
            None => {
                sim.report.drops += 1;
                match signal {
                    Signal::Checkpoint => sim.take_checkpoint(&mirror),
                    Signal::Plant => sim.plant(&mirror),
                    Signal::Die => return sim.die(mirror),
                    Signal::GoOn | Signal::DropDriver => {}
                }
                // Nobody drives for a while.
                let steps = sim.world.borrow_mut().rng.below(50);
                for _ in 0..steps {
                    let _ = sim.step();
                }
                sim.check_coverage(&mirror);
            }
        }
    }
}

/// Drives the job with requests and completions.
fn run_queue(sim: &mut Sim, mirror: Mirror) {
    let mut queue = Queue::new(mirror, VecPool);
    let flag = Flag::new();
    let waker = Waker::from(Arc::clone(&flag));
    // (disk, request of the world) → request of the queue
    let ids: RefCell<std::collections::BTreeMap<(usize, u64), u64>> = RefCell::default();
    let mut settling: Vec<u64> = Vec::new();
    let mut timer = u64::MAX;
    loop {
        while flag.take() {
            let now = sim.world.borrow().time();
            match queue.next(now, &waker) {
                Next::Submit(request) => {
                    flag.clone().wake_it();
                    let disk = match request.side {
                        Side::Source => SOURCE,
                        Side::Target | Side::Buffer => TARGET,
                    };
                    let none = ByteRange::from(0..0);
                    let (range, ask) = match request.work {
                        Work::Read { offset, buf } => {
                            (ByteRange::at(offset, buf.len() as u64).unwrap(), Ask::Read)
                        }
                        Work::Write { offset, buf } => (
                            ByteRange::at(offset, buf.len() as u64).unwrap(),
                            Ask::Write(buf),
                        ),
                        Work::Status(range) => (range, Ask::Status),
                        Work::WriteZeroes(range, _) => (range, Ask::Zero),
                        Work::Discard(range) => (range, Ask::Discard),
                        Work::Flush => (none, Ask::Flush),
                        Work::Settle => {
                            settling.push(request.id);
                            continue;
                        }
                        Work::WriteCompressed { .. }
                        | Work::Compare { .. }
                        | Work::CopyFromSource(_) => {
                            unreachable!("not offered")
                        }
                        Work::CancelInFlight => {
                            queue.completed(now, request.id, Answer::Plain(Ok(())));
                            continue;
                        }
                    };
                    let mut world = sim.world.borrow_mut();
                    let id = world.submit(disk, Owner::Queue, range, ask);
                    ids.borrow_mut().insert((disk, id), request.id);
                }
                Next::Wait { until: None } => {}
                Next::Wait { until: Some(at) } => {
                    let mut world = sim.world.borrow_mut();
                    let micros = at.saturating_sub(now).as_nanos().div_ceil(1000) as u64;
                    // One timer per time, or they breed.
                    if std::mem::replace(&mut timer, world.now + micros) != world.now + micros {
                        world.after(micros, Happening::Wake(waker.clone()));
                    }
                }
                Next::Switch(switch) => {
                    sim.take_events();
                    sim.check_coverage(queue.machine());
                    sim.switch(switch);
                    flag.clone().wake_it();
                }
                Next::SwitchBack(_) => unreachable!("it is in no group"),
                Next::Done(result) => {
                    sim.take_events();
                    sim.check_coverage(queue.machine());
                    let is_good = result.is_ok();
                    sim.ended(result, queue.machine().left_dirty());
                    if !is_good {
                        sim.take_checkpoint(queue.machine());
                    }
                    return;
                }
            }
        }
        let signal = sim.step();
        let answers = std::mem::take(&mut sim.world.borrow_mut().queue_answers);
        let now = sim.world.borrow().time();
        for (disk, id) in answers {
            let request = sim.world.borrow_mut().take(disk, id);
            let result = result_of(&request);
            let answer = match request.ask {
                Ask::Read => Answer::Transfer(result, request.buf),
                Ask::Write(buf) => Answer::Transfer(result, buf),
                Ask::Status => Answer::Status(result.map(|()| request.extent.unwrap())),
                Ask::Zero | Ask::Discard | Ask::Flush => Answer::Plain(result),
            };
            let id = ids
                .borrow_mut()
                .remove(&(disk, id))
                .expect("it was submitted");
            queue.completed(now, id, answer);
            flag.clone().wake_it();
        }
        let is_settled = sim.world.borrow().disks[TARGET]
            .requests
            .values()
            .all(|request| matches!(request.owner, Owner::Guest(_)));
        if is_settled {
            for id in settling.drain(..) {
                let fails = sim.plan.may_fail && sim.world.borrow_mut().rng.one_in(3);
                let result = match fails {
                    true => Err(std::io::ErrorKind::TimedOut.into()),
                    false => Ok(()),
                };
                queue.completed(now, id, Answer::Plain(result));
                flag.clone().wake_it();
            }
        }
        match signal {
            Signal::Checkpoint => sim.take_checkpoint(queue.machine()),
            Signal::Plant => {
                sim.plant(queue.machine());
                flag.clone().wake_it();
            }
            Signal::Die => {
                let left = queue.machine().left_dirty();
                drop(queue);
                return sim.died(left);
            }
            Signal::GoOn | Signal::DropDriver => {}
        }
        if let Signal::DropDriver = signal {
            // The ring is torn down; what it was given goes on.
            settling.clear();
            queue.requests_lost();
            sim.report.drops += 1;
            flag.clone().wake_it();
        }
        let steps = sim.world.borrow().steps;
        if steps % 8 == 0 {
            sim.check_coverage(queue.machine());
        }
    }
}
