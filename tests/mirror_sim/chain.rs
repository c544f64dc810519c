//! One process after another, each of which goes on from a checkpoint of the one before.

use std::task::Waker;
use std::time::Duration;

use blockjob::bitmap::stored::{self, Label};
use blockjob::{
    ChangedSince, Checkpoint, CheckpointId, Extent, Limits, Mirror, MirrorError, MirrorOptions,
    Node, OpKind, Outcome, Resume, ResumeError, Step, TargetHolds,
};

use crate::driving::drive;
use crate::plan::{Asking, Plan, SINCE};
use crate::sim::disk::Disk;
use crate::sim::rng::Rng;
use crate::{GuestLoad, PEACE, Report, Sim, begin, mode_rng, other_rng};

/// The disks, as they are known to those who store checkpoints.
fn id_of(generation: u64) -> CheckpointId {
    CheckpointId {
        source: [1; 16],
        target: [2; 16],
        generation,
    }
}

/// One process after another, until the job succeeds.
pub(crate) fn run_chain(seed: u64) -> Report {
    let mut rng = other_rng(seed);
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.add_bitmap(&mut rng);
        plan.die_at(&mut rng);
        plan.add_mode(&mut mode_rng(seed));
        plan.add_zeroes(&mut Rng::new(seed ^ 0x0_2e20));
        plan.add_verify(&mut Rng::new(seed ^ 0x0e_21f7));
    });
    drive(&mut sim, mirror);
    while !(sim.report.switched || sim.checkpoints.is_empty()) && sim.report.resumed < 4 {
        sim.finish();
        let mirror;
        (sim, mirror) = next_process(sim, &mut rng);
        drive(&mut sim, mirror);
    }
    sim.finish();
    sim.report
}

/// The process is gone. The next one finds the disks, and what was stored.
fn next_process(mut sim: Sim, rng: &mut Rng) -> (Sim, Mirror) {
    while sim.world.borrow().disks.iter().any(Disk::is_busy) {
        let _ = sim.step();
    }
    // What is stored when the guest has stopped. Of the job's own bitmap nothing is used.
    let guard = sim
        .node
        .quiesce()
        .try_guard()
        .expect("the guest has stopped");
    let export = sim.node.bitmaps().export_state(&guard).unwrap();
    let since = export
        .to_store
        .into_iter()
        .find(|state| state.name == SINCE);
    let label = Label {
        identity: [1; 16],
        generation: sim.generation,
    };
    let since = stored::encode(&since.unwrap().bits, label);
    drop(guard);
    let Sim {
        plan,
        world,
        checkpoints,
        mut report,
        planted,
        ..
    } = sim;
    world.borrow_mut().end_of_process();

    let mut plan = plan;
    plan.options.target_holds = TargetHolds::Anything;
    let since = stored::decode(&since, 1 << 20).unwrap();
    let generation = since.header.label().generation;
    plan.go_by(rng, since.bitmap);
    plan.asks = vec![(PEACE, Asking::MakePeace)];
    plan.die_at(rng);
    if plan.target.compare.is_some() && rng.one_in(2) {
        plan.asks.push((10 + rng.below(5_000), Asking::Plant));
    }
    let node = Node::new(plan.source.len);
    plan.bitmaps(&node);
    // Some files are older, and one is of another target.
    let mut files = vec![
        checkpoints.last().unwrap().clone(),
        of_another_target(&plan, generation),
    ];
    if checkpoints.len() > 1 {
        let older = rng.below(checkpoints.len() as u64 - 1) as usize;
        files.push(checkpoints[older].clone());
    }
    let resumed = loop {
        let file = files.swap_remove(rng.below(files.len() as u64) as usize);
        let resume = Resume {
            checkpoint: Checkpoint::decode(&file, 1 << 20).unwrap(),
            id: id_of(generation),
            changed: ChangedSince::InBitmap,
        };
        let (options, source, target) = (plan.options.clone(), plan.source, plan.target);
        match Mirror::resume(&node, source, target, options, resume) {
            Ok(mirror) => break mirror,
            Err(MirrorError::Resume(
                ResumeError::OtherTarget | ResumeError::OtherGeneration { .. },
            )) => report.refused += 1,
            Err(error) => panic!("{error}: {plan:?}"),
        }
    };
    report.resumed += 1;
    report.bitmap = None;
    let until = world.borrow().now + rng.pick(&[0, 2_000, 20_000]);
    let load = GuestLoad {
        pause: (20, 1_000),
        len_max: 4096,
        until,
    };
    let mut sim = Sim::new(world, node, resumed.job().clone(), plan, load);
    sim.report = report;
    sim.planted.stale = planted.since.clone();
    sim.planted.since = planted.since;
    sim.planted.granularity = resumed.granularity().bytes();
    sim.is_resumed = true;
    sim.checkpoints = checkpoints;
    sim.generation = generation;
    sim.start(rng.pick(&[0, 50, 500]));
    (sim, resumed)
}

/// What a mirror of the same disk to another target has left: nothing.
fn of_another_target(plan: &Plan, generation: u64) -> Vec<u8> {
    let node = Node::new(plan.source.len);
    let mut options = MirrorOptions::default();
    options.sync = plan.options.sync;
    let limits = Limits::new(plan.source.len);
    let mut mirror = Mirror::new(&node, limits, limits, options).unwrap();
    mirror.job().start().unwrap();
    let now = Duration::ZERO;
    while let Step::Op(op) = mirror.poll(now, Waker::noop()) {
        let outcome = match op.kind() {
            OpKind::Status(range) => Outcome::Status(Extent::data(range.len())),
            _ => Outcome::Done,
        };
        mirror.op_done(now, op, outcome);
    }
    let mut id = id_of(generation);
    id.target = [3; 16];
    mirror.checkpoint(id).expect("it has begun")
}

impl Sim {
    /// The caller stores what is left, and has what is written from now on recorded.
    pub(crate) fn take_checkpoint(&mut self, mirror: &Mirror) {
        let id = id_of(self.generation + 1);
        // If there is none yet, the one before is still right.
        if !self.plan.stores || mirror.checkpoint(id).is_none() {
            return;
        }
        // First this, or what settles in between would be in neither.
        self.node.bitmaps().clear(SINCE).unwrap();
        self.checkpoints.push(mirror.checkpoint(id).unwrap());
        self.generation += 1;
        let untold = self.planted.damaged.union(&self.planted.stale);
        self.planted.since = untold.copied().collect();
    }
}
