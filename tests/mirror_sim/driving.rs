//! The job driven by tasks, and by requests and completions.

use blockjob::Mirror;
use blockjob::driver::Driven;

use crate::sim::driving::Driving;
use crate::sim::world::SOURCE;
use crate::{Signal, Sim};

/// Drives the job to its end. Now and then nobody does for a while.
pub(crate) fn drive(sim: &mut Sim, mirror: Mirror) {
    let mut driving = Driving::new(mirror, SOURCE, sim.plan.uses_queue);
    loop {
        while driving.flag.take() {
            let driven = driving.poll(&sim.world);
            sim.take_events();
            match driven {
                None => {}
                Some(Driven::Switch(switch)) => {
                    // Those who drive it may be gone before they hear of the switch.
                    if sim.world.borrow_mut().rng.one_in(2) {
                        driving.drop_driver();
                    }
                    sim.look_at(&driving);
                    sim.switch(switch);
                }
                Some(Driven::SwitchBack(_)) => unreachable!("it is in no group"),
                Some(Driven::Done(result)) => {
                    sim.look_at(&driving);
                    let is_good = result.is_ok();
                    let left = driving.with(Mirror::left_dirty);
                    sim.ended(result, left.expect("nobody drives it any more"));
                    if !is_good {
                        driving.with(|mirror| sim.take_checkpoint(mirror));
                    }
                    return;
                }
            }
        }
        let signal = sim.step();
        sim.answer(&mut driving);
        if let Signal::GoOn = signal {
            if sim.world.borrow().steps.is_multiple_of(8) {
                sim.look_at(&driving);
            }
            continue;
        }
        // Tasks that drive it have the machine to themselves.
        let is_dropped = matches!(signal, Signal::DropDriver) || driving.with(|_| ()).is_none();
        if is_dropped {
            driving.drop_driver();
            sim.report.drops += 1;
        }
        match signal {
            Signal::Checkpoint => drop(driving.with(|mirror| sim.take_checkpoint(mirror))),
            Signal::Plant => drop(driving.with(|mirror| sim.plant(mirror))),
            Signal::Die => {
                let left = driving.with(Mirror::left_dirty);
                driving.drop_all();
                return sim.died(left.expect("nobody drives it any more"));
            }
            Signal::GoOn | Signal::DropDriver => {}
        }
        if is_dropped {
            // Nobody drives for a while.
            let steps = sim.world.borrow_mut().rng.below(50);
            for _ in 0..steps {
                let _ = sim.step();
                sim.answer(&mut driving);
            }
        }
        sim.look_at(&driving);
        driving.flag.clone().wake_it();
    }
}

impl Sim {
    fn look_at(&mut self, driving: &Driving<Mirror>) {
        driving.with(|mirror| self.check_coverage(mirror));
    }

    /// Hands on what was answered.
    fn answer(&mut self, driving: &mut Driving<Mirror>) {
        let mut world = self.world.borrow_mut();
        for (disk, id) in std::mem::take(&mut world.queue_answers) {
            driving.answer(&mut world, disk, id);
        }
        let may_fail = self.plan.may_fail;
        driving.settle(&mut world, |world| match may_fail && world.rng.one_in(3) {
            true => Err(std::io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        });
    }
}
