//! The mirror under a guest's writes, faults, delays, dropped drivers, pauses and cancels, in a
//! deterministic world. It is judged by its promises:
//!
//! 1. At the switch, and at the end of a soft cancel, the target equals the source wherever content is
//!    defined, and is flushed; no guest write is in flight.
//! 2. The guest's data is what the guest was told, on whatever disk it is.
//! 3. No two writes of the job to the target overlap in time, and each keeps to the device's limits.
//! 4. Once the scan is over, and also after any failure, whatever differs is dirty or claimed.
//! 5. The job ends when it should; its events come in a legal order, with one end.
//! 6. A job that says it stands still has nothing in flight.
//! 7. A named bitmap that the job goes by has at its end exactly what its mode says, and whatever differs is
//!    dirty in it.
//! 8. A job that goes on from a checkpoint, with nothing left of the process before but the bytes, the disks and
//!    the stored bitmap of what has changed since, keeps all of that, too.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run. A failure prints the seed and
//! the command that runs it again.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may read the clock, to tell how fast it was"
)]

#[path = "mirror_sim/chain.rs"]
mod chain;
#[path = "mirror_sim/driving.rs"]
mod driving;
#[path = "mirror_sim/judge.rs"]
mod judge;
#[path = "mirror_sim/plan.rs"]
mod plan;
#[path = "mirror_sim/planted.rs"]
mod planted;
#[cfg(debug_assertions)]
#[path = "mirror_sim/sabotage.rs"]
mod sabotage;
mod sim;

use std::collections::BTreeSet;

use blockjob::{
    BitmapMode, Cancel, Change, CompareBy, CopyMode, Event, Granularity, HBitmap, Hold, Job,
    JobError, Limits, Mirror, MirrorOptions, MirrorSync, Node, OnError, Status, Switch,
    TargetHolds,
};

use chain::run_chain;
use driving::drive;
use plan::{AFTER, Asking, Plan};
use planted::Planted;
use sim::content::{fill_copied, fill_source, fill_target};
use sim::disk::{BLOCK, Disk, Faults, Latency};
use sim::guest::Guests;
use sim::rng::Rng;
use sim::seeds::run_seeds;
use sim::world::{Happening, SOURCE, Shared, TARGET, World};

/// More steps than any job should need, also beside a guest that never stops before the peace.
const STEPS_MAX: u64 = 4_000_000;
/// From this time on nothing fails and nobody disturbs the job any more.
const PEACE: u64 = 400_000;

/// What a run came to.
#[derive(Debug, Default)]
struct Report {
    steps: u64,
    switched: bool,
    failed: bool,
    cancelled: bool,
    was_ready: bool,
    writes: u64,
    drops: u64,
    waited: bool,
    paused: bool,
    overlapped: usize,
    /// How the job with a bitmap ended.
    bitmap: Option<(BitmapMode, bool)>,
    resumed: u64,
    refused: u64,
    /// Writes that went to the target as well.
    copied: u64,
    /// Verifications that have come to their end, and blocks that were found to differ.
    verified: u64,
    found: u64,
    was_synced: bool,
}

struct Sim {
    plan: Plan,
    planted: Planted,
    world: Shared,
    node: Node,
    job: Job,
    guests: Guests,
    holds: Vec<Hold>,
    events: Vec<Event>,
    declined: u64,
    /// What was asked for by time, later than the plan.
    later: Vec<Asking>,
    is_over: bool,
    report: Report,
    /// Whether it goes on from a checkpoint.
    is_resumed: bool,
    /// Whether its bitmap has all that the target lacks, since it is over.
    is_told_all: bool,
    /// What is stored: the checkpoints, and to which generation belongs what was written since.
    checkpoints: Vec<Vec<u8>>,
    generation: u64,
}

enum Signal {
    GoOn,
    DropDriver,
    Checkpoint,
    Die,
    Plant,
}

impl Sim {
    fn ask_later(&mut self, micros: u64, ask: Asking) {
        self.later.push(ask);
        let index = self.plan.asks.len() + self.later.len() - 1;
        self.world
            .borrow_mut()
            .after(micros, Happening::User(index));
    }

    /// One step of the world.
    fn step(&mut self) -> Signal {
        let happening = self.world.borrow_mut().step();
        let Some(happening) = happening else {
            panic!(
                "stalled: nothing will happen any more; {:?}",
                self.job.query()
            );
        };
        let steps = self.world.borrow().steps;
        assert!(steps < STEPS_MAX, "stalled: {:?}", self.job.query());
        let mut signal = Signal::GoOn;
        match happening {
            Happening::Touch {
                disk,
                request,
                half,
            } => {
                self.world.borrow_mut().touch(disk, request, half);
            }
            Happening::Answer { disk, request } => self.world.borrow_mut().answer(disk, request),
            Happening::Wake(waker) => waker.wake(),
            Happening::Guest(index) => self.guests.act(&mut self.world.borrow_mut(), index),
            Happening::User(index) => signal = self.ask(index),
        }
        let answers = std::mem::take(&mut self.world.borrow_mut().guest_answers);
        for (guest, request) in answers {
            self.guests
                .answered(&mut self.world.borrow_mut(), guest, request);
        }
        self.guests.wake(&mut self.world.borrow_mut());
        self.report.waited |= self.guests.is_waiting();
        self.take_events();
        self.check_stillness();
        signal
    }

    fn ask(&mut self, index: usize) -> Signal {
        let planned = self.plan.asks.get(index).map(|&(_, ask)| ask);
        let ask = planned.unwrap_or_else(|| self.later[index - self.plan.asks.len()]);
        match ask {
            Asking::Pause => drop(self.job.pause()),
            Asking::Resume => drop(self.job.resume()),
            Asking::Hold => self.holds.push(self.job.hold()),
            Asking::Release => drop(self.holds.pop()),
            Asking::Speed(speed) => drop(self.job.set_speed(speed)),
            Asking::Policy(policy) => drop(self.job.change(Change {
                on_source_error: Some(policy),
                on_target_error: Some(policy),
                ..Change::default()
            })),
            Asking::Mode(mode) => drop(self.job.change(Change {
                copy_mode: Some(mode),
                ..Change::default()
            })),
            Asking::Complete => {
                let status = self.job.query().status;
                let _ = self.job.complete();
                let _ = self.job.finalize();
                if !status.is_completed() && status != Status::Ready {
                    // Not now: it stands by, perhaps.
                    self.ask_later(500, Asking::Complete);
                }
            }
            Asking::SoftCancel => drop(self.job.cancel(Cancel::Soft)),
            Asking::ForceCancel => drop(self.job.cancel(Cancel::Force)),
            Asking::DropDriver => return Signal::DropDriver,
            Asking::Checkpoint => return Signal::Checkpoint,
            Asking::Die => return Signal::Die,
            Asking::Plant if self.report.was_ready => return Signal::Plant,
            Asking::Plant if !self.is_over => self.ask_later(700, Asking::Plant),
            Asking::Plant => {}
            Asking::MakePeace => {
                self.holds.clear();
                self.guests.until = self.guests.until.min(PEACE + 20_000);
                let _ = self.job.resume();
                let _ = self.job.set_speed(0);
                let _ = self.job.finalize();
                if !self.is_over {
                    self.ask_later(5_000, Asking::MakePeace);
                }
            }
        }
        Signal::GoOn
    }

    fn take_events(&mut self) {
        while let Some(event) = self.job.next_event() {
            if let Event::Ready { progress, .. } = &event {
                assert_eq!(
                    progress.current, progress.total,
                    "ready with something left"
                );
                let flushes = self.world.borrow().disks[TARGET].good_flushes;
                assert!(flushes > 0, "ready without a flush");
                self.report.was_ready = true;
                let (after, ask) = (self.plan.ready_for, self.plan.end);
                self.ask_later(after, ask);
            }
            if matches!(event, Event::Pending) {
                let after = self.plan.ready_for;
                self.ask_later(after, Asking::Complete);
            }
            match &event {
                Event::Ready { .. } => assert!(
                    !self.is_verifying() || !self.is_older(),
                    "ready before all was compared"
                ),
                Event::Differs(difference) => self.differs(difference.range),
                Event::Verified(verification) => self.verified(verification.state),
                _ => {}
            }
            if let Event::Error(error) = &event {
                assert!(self.plan.may_fail, "an error out of nowhere: {error:?}");
            }
            self.events.push(event);
        }
    }

    /// Takes the switch, or drops it.
    fn switch(&mut self, switch: Switch) {
        self.check_switch();
        // For a while the guest is held and nothing may move.
        let steps = self.world.borrow_mut().rng.below(20);
        for _ in 0..steps {
            if self.world.borrow().now > PEACE * 2 {
                break;
            }
            let _ = self.step();
        }
        self.check_switch();
        assert!(matches!(
            self.job.cancel(Cancel::Force),
            Err(blockjob::VerbError::Finalizing)
        ));
        if self.declined < self.plan.declines {
            self.declined += 1;
            drop(switch);
            let delay = self.world.borrow_mut().rng.below(3_000);
            self.ask_later(delay, Asking::Complete);
            return;
        }
        self.mend();
        self.guests.current = TARGET;
        {
            let target = &mut self.world.borrow_mut().disks[TARGET];
            target.is_guests = true;
            target.is_copied_to = false;
            // The overlay has its real base from here on.
            target.limits.fills_clusters = false;
        }
        if self.plan.bits.is_some() {
            self.node.bitmaps().clear(AFTER).unwrap();
        }
        switch.commit();
        self.report.switched = true;
        let steps = self.world.borrow_mut().rng.below(200);
        for _ in 0..steps {
            // The guest goes on before the job is polled again.
            let _ = self.step();
        }
    }

    /// The process has ended with the job in its midst; what was requested of the disks goes on.
    fn died(&mut self, left: Option<HBitmap>) {
        self.is_over = true;
        self.take_events();
        self.check_bitmap(false, left.as_ref());
    }

    fn ended(&mut self, result: Result<(), JobError>, left: Option<HBitmap>) {
        self.is_over = true;
        self.take_events();
        let info = self.job.query();
        match &result {
            Ok(()) => {
                if !self.report.switched {
                    assert_eq!(info.cancel, Some(Cancel::Soft), "it ends by itself");
                    self.check_switch();
                }
                assert_eq!(info.progress.current, info.progress.total);
            }
            Err(JobError::Cancelled { abandoned }) => {
                assert_eq!(info.cancel, Some(Cancel::Force));
                let may_abandon = self.plan.options.job.cancel_grace.is_some();
                assert!(
                    may_abandon || *abandoned <= self.plan.threads,
                    "active writes only"
                );
                self.report.cancelled = true;
            }
            Err(error) => {
                assert!(self.plan.may_fail, "failed without a fault: {error}");
                self.report.failed = true;
            }
        }
        assert!(
            !self.report.switched || result.is_ok(),
            "failed after the switch: {result:?}"
        );
        self.check_told(result.is_ok());
        self.check_bitmap(result.is_ok(), left.as_ref());
    }

    /// The guest goes on alone, and stops.
    fn wind_down(&mut self) {
        let now = self.world.borrow().now;
        self.guests.until = self.guests.until.min(now + 2_000);
        while self.guests.is_writing()
            || self.guests.is_waiting()
            || self.world.borrow().now < self.guests.until
        {
            let happening_left = self.world.borrow().now < now + 10_000_000;
            assert!(happening_left, "a guest write hangs");
            let _ = self.step();
        }
        self.guests.check(&self.world.borrow());
        self.check_bitmap_later();
    }
}

/// A seed's own numbers for what came later than the rest: so that does not change what the rest is.
fn other_rng(seed: u64) -> Rng {
    Rng::new(seed ^ 0x5eed_0b17_3a95)
}

fn mode_rng(seed: u64) -> Rng {
    Rng::new(seed ^ 0xac71_7e0d)
}

fn run(seed: u64) -> Report {
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.add_bitmap(&mut other_rng(seed));
        plan.add_mode(&mut mode_rng(seed));
        plan.add_zeroes(&mut Rng::new(seed ^ 0x0_2e20));
        plan.add_verify(&mut Rng::new(seed ^ 0x0e_21f7));
    });
    drive(&mut sim, mirror);
    sim.finish();
    sim.report
}

/// A target that is compared, either at the start or when something has damaged it, and time for that.
fn run_verify(seed: u64) -> Report {
    let mut rng = Rng::new(seed ^ 0x0e_21f7);
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.add_mode(&mut mode_rng(seed));
        plan.target.compare = Some(CompareBy::Reading);
        plan.threads = rng.below(5) as usize;
        plan.ready_for = 30_000;
        plan.options.job.speed = 0;
        plan.stalls = rng.one_in(2);
        if rng.one_in(3) {
            plan.options.sync = MirrorSync::Full;
            plan.options.target_holds = TargetHolds::OlderCopy;
        }
        for _ in 0..rng.between(1, 4) {
            plan.asks.push((10 + rng.below(20_000), Asking::Plant));
        }
        if rng.one_in(3) {
            plan.zero_often();
            plan.options.detect_zeroes = rng.one_in(2);
        }
    });
    drive(&mut sim, mirror);
    sim.finish();
    sim.report
}

/// The same, with much that is zero on both disks, where the guest writes zeroes once more.
#[cfg(debug_assertions)]
fn run_verify_zeroes(seed: u64) -> Report {
    let mut rng = Rng::new(seed ^ 0x0e_21f8);
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.target.compare = Some(CompareBy::Reading);
        plan.zero_often();
        plan.threads = 4;
        plan.ready_for = 30_000;
        plan.options.job.speed = 0;
        plan.options.sync = MirrorSync::Full;
        for _ in 0..4 {
            plan.asks.push((10 + rng.below(20_000), Asking::Plant));
        }
    });
    drive(&mut sim, mirror);
    sim.finish();
    sim.report
}

/// A guest that writes all the time, and whose writes go to the target as well, at least for a while.
fn run_active(seed: u64) -> Report {
    let mut rng = mode_rng(seed);
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.threads = 4;
        plan.options.granularity = Granularity::from_bytes(rng.pick(&[512, 4096, 8192]));
        plan.options.copy_mode = CopyMode::WriteBlocking;
        if rng.one_in(3) {
            plan.options.copy_mode = CopyMode::Background;
            let from = 10 + rng.below(2_000);
            plan.asks
                .push((from, Asking::Mode(CopyMode::WriteBlocking)));
        }
    });
    drive(&mut sim, mirror);
    sim.finish();
    sim.report
}

/// With many zeroes, to a target that fails often.
#[cfg(debug_assertions)]
fn run_zeroes(seed: u64) -> Report {
    let (mut sim, mirror) = begin(seed, |plan| {
        plan.zero_often();
        plan.options.sync = MirrorSync::Full;
        plan.options.job.on_target_error = OnError::Ignore;
        plan.add_mode(&mut mode_rng(seed));
        plan.may_fail = true;
    });
    drive(&mut sim, mirror);
    sim.finish();
    sim.report
}

/// How a guest writes.
struct GuestLoad {
    pause: (u64, u64),
    len_max: u64,
    until: u64,
}

fn begin(seed: u64, change: impl FnOnce(&mut Plan)) -> (Sim, Mirror) {
    let mut rng = Rng::new(seed);
    let mut plan = Plan::new(&mut rng);
    let faults = plan.faults(&mut rng);
    let mut latency = || Latency {
        low: rng.pick(&[0, 1, 10]),
        high: rng.pick(&[10, 50, 500]),
        stall: rng.pick(&[0, 0, 20]),
    };
    let latencies = [latency(), latency()];
    let mut source = Disk::new(plan.source, latencies[SOURCE], faults[SOURCE]);
    let mut target = Disk::new(plan.target, latencies[TARGET], faults[TARGET]);
    fill_source(&mut source, &mut rng);
    fill_target(&source, &mut target, plan.options.sync);
    change(&mut plan);
    target.limits = plan.target;
    if plan.stalls {
        source.latency.stall = 6;
    }
    if plan.zeroes_often && plan.may_fail {
        target.faults.zero = 4;
        target.faults.write = 4;
        target.faults.until = PEACE / 2;
    }
    if plan.options.target_holds == TargetHolds::Zeroes {
        target.bytes.fill(0);
    }
    let mut older = BTreeSet::new();
    if plan.options.target_holds == TargetHolds::OlderCopy {
        let mut rng = Rng::new(seed ^ 0x01de);
        target.bytes.copy_from_slice(&source.bytes);
        for block in 0..source.blocks.len() {
            target.blocks[block].content = blockjob::Content::Data;
            if rng.one_in(8) && source.blocks[block].content != blockjob::Content::Undefined {
                let start = block * BLOCK as usize;
                let end = (start + BLOCK as usize).min(source.bytes.len());
                // No byte of the source is the same.
                target.bytes[start..end]
                    .iter_mut()
                    .for_each(|byte| *byte ^= 0x80);
                older.insert(block);
            }
        }
    }
    if let Some(bits) = &plan.bits {
        fill_copied(&source, &mut target, bits);
    }
    let node = Node::new(plan.source.len);
    plan.bitmaps(&node);
    let mirror = Mirror::new(&node, plan.source, plan.target, plan.options.clone())
        .unwrap_or_else(|error| panic!("{error}: {plan:?}"));
    let load = GuestLoad {
        pause: (rng.pick(&[0, 20, 200]), rng.pick(&[200, 1_000, 5_000])),
        len_max: rng.pick(&[512, 4096, 20_000]),
        // Some guests never stop before the peace.
        until: rng.pick(&[2_000, 20_000, 100_000, PEACE]),
    };
    // What an older copy lacks is what it lacks at the moment that recording starts.
    let is_older = plan.options.target_holds == TargetHolds::OlderCopy;
    let starts_early = plan.options.sync != MirrorSync::None && !is_older;
    let start_at = if starts_early {
        rng.pick(&[0, 50, 500])
    } else {
        0
    };
    let world = World::new(rng, vec![source, target], PEACE);
    world.borrow_mut().disks[TARGET].is_copied_to = true;
    let mut sim = Sim::new(world, node, mirror.job().clone(), plan, load);
    sim.planted.older = older;
    sim.planted.granularity = mirror.granularity().bytes();
    sim.start(start_at);
    (sim, mirror)
}

impl Sim {
    fn new(world: Shared, node: Node, job: Job, plan: Plan, load: GuestLoad) -> Self {
        let mut guests = Guests::new(&node, &mut world.borrow_mut(), SOURCE, 0, plan.threads);
        guests.pause = load.pause;
        guests.len_max = load.len_max;
        guests.until = load.until;
        guests.copies_to = Some(TARGET);
        if plan.zeroes_often {
            guests.zeroes = 5;
        }
        Self {
            plan,
            world,
            node,
            job,
            guests,
            holds: Vec::new(),
            events: Vec::new(),
            declined: 0,
            later: Vec::new(),
            is_over: false,
            report: Report::default(),
            planted: Planted::default(),
            is_resumed: false,
            is_told_all: false,
            checkpoints: Vec::new(),
            generation: 0,
        }
    }

    /// The guest writes from now on, and the job starts somewhat later.
    fn start(&mut self, micros: u64) {
        let now = self.world.borrow().now;
        self.guests.start(&mut self.world.borrow_mut());
        for (index, &(at, _)) in self.plan.asks.iter().enumerate() {
            let mut world = self.world.borrow_mut();
            world.after(micros + at, Happening::User(index));
        }
        while self.world.borrow().now < now + micros {
            let _ = self.step();
        }
        let _ = self.job.start();
    }

    /// All is over: the guest goes on for a while, and nobody holds anything.
    fn finish(&mut self) {
        self.wind_down();
        let world = self.world.borrow();
        self.report.steps = world.steps;
        self.report.writes += self.guests.writes;
        self.report.copied += self.guests.copied;
        self.report.overlapped = world.disks[TARGET].writes_in_flight_max;
        assert!(
            self.node.quiesce().try_guard().is_ok(),
            "somebody still holds the node"
        );
    }
}

#[test]
fn every_seed_keeps_the_promises() {
    let started = std::time::Instant::now();
    let test = "every_seed_keeps_the_promises";
    let reports = run_seeds(test, 4_000, 1, run);
    let seconds = started.elapsed().as_secs_f64();

    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    let steps: u64 = reports.iter().map(|report| report.steps).sum();
    println!(
        "{steps} steps, {:.0} per second; {} guest writes; {} ready, {} switched, {} cancelled, \
         {} failed, {} with dropped drivers, {} with guests held, {} paused, {} with writes in parallel, \
         {} synced, {} active writes",
        steps as f64 / seconds,
        reports.iter().map(|report| report.writes).sum::<u64>(),
        count_of(|r| r.was_ready),
        count_of(|r| r.switched),
        count_of(|r| r.cancelled),
        count_of(|r| r.failed),
        count_of(|r| r.drops > 0),
        count_of(|r| r.waited),
        count_of(|r| r.paused),
        count_of(|r| r.overlapped > 1),
        count_of(|r| r.was_synced),
        reports.iter().map(|report| report.copied).sum::<u64>(),
    );
    if reports.len() >= 1_000 {
        // A simulation that never comes to a place shows nothing about it.
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.switched) > 0.2);
        assert!(share(|r| r.failed) > 0.05);
        assert!(share(|r| r.cancelled) > 0.05);
        assert!(share(|r| r.drops > 0) > 0.05);
        assert!(share(|r| r.waited) > 0.02);
        assert!(share(|r| r.paused) > 0.05);
        assert!(share(|r| r.overlapped > 1) > 0.2);
        assert!(share(|r| r.copied > 0) > 0.05);
        assert!(share(|r| r.was_synced) > 0.04);
        for mode in MODES {
            for is_good in [false, true] {
                let end = Some((mode, is_good));
                let ended = reports.iter().filter(|report| report.bitmap == end).count();
                assert!(ended * 100 > reports.len(), "{mode:?}, {is_good}: {ended}");
            }
        }
    }
}

const MODES: [BitmapMode; 3] = [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always];

#[test]
fn every_seed_of_active_writes_keeps_the_promises() {
    let test = "every_seed_of_active_writes_keeps_the_promises";
    let reports = run_seeds(test, 800, 4, run_active);
    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    let writes: u64 = reports.iter().map(|report| report.copied).sum();
    println!(
        "{writes} active writes; {} synced, {} switched, {} failed, {} with dropped drivers",
        count_of(|r| r.was_synced),
        count_of(|r| r.switched),
        count_of(|r| r.failed),
        count_of(|r| r.drops > 0),
    );
    if reports.len() >= 800 {
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.copied > 10) > 0.12);
        assert!(share(|r| r.was_synced) > 0.15);
    }
}

#[test]
fn every_chain_of_processes_keeps_the_promises() {
    let test = "every_chain_of_processes_keeps_the_promises";
    let reports = run_seeds(test, 1_000, 4, run_chain);
    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    println!(
        "{} resumed, {} more than once; {} switched after that; {} with checkpoints that were refused; \
         {} that have found damage",
        count_of(|r| r.resumed > 0),
        count_of(|r| r.resumed > 1),
        count_of(|r| r.resumed > 0 && r.switched),
        count_of(|r| r.refused > 0),
        count_of(|r| r.resumed > 0 && r.found > 0),
    );
    if reports.len() >= 1_000 {
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.resumed > 0) > 0.2);
        assert!(share(|r| r.resumed > 1) > 0.05);
        assert!(share(|r| r.resumed > 0 && r.switched) > 0.1);
        assert!(share(|r| r.refused > 0) > 0.1);
        assert!(share(|r| r.resumed > 0 && r.found > 0) > 0.01);
    }
}

#[test]
fn every_seed_finds_what_differs() {
    let test = "every_seed_finds_what_differs";
    let reports = run_seeds(test, 1_000, 4, run_verify);
    let sum = |what: fn(&Report) -> u64| reports.iter().map(what).sum::<u64>();
    println!(
        "{} verifications, {} blocks found to differ; {} switched",
        sum(|r| r.verified),
        sum(|r| r.found),
        sum(|r| u64::from(r.switched)),
    );
    if reports.len() >= 1_000 {
        let count = reports.len() as u64;
        assert!(sum(|r| r.verified) > count / 2 && sum(|r| r.found) > count);
    }
}

/// Both ways of driving look at the data, and neither mistakes any for zeroes.
#[test]
fn zero_data_goes_as_zeroes_by_futures_and_by_requests() {
    for uses_queue in [false, true] {
        let (mut sim, mirror) = begin(12, |plan| {
            plan.target = Limits::new(plan.source.len);
            plan.zero_often();
            plan.threads = 0;
            plan.asks = vec![(PEACE, Asking::MakePeace)];
            plan.end = Asking::Complete;
            plan.may_fail = false;
            plan.uses_queue = uses_queue;
            plan.options = MirrorOptions::default();
            plan.options.job.id = Some("sim".to_owned());
            plan.options.granularity = Granularity::from_bytes(4096);
            plan.options.chunk_max = 4096;
            plan.options.detect_zeroes = true;
        });
        {
            let mut world = sim.world.borrow_mut();
            for disk in &mut world.disks {
                disk.faults = Faults::default();
            }
            let source = &mut world.disks[SOURCE];
            source.bytes.fill(0);
            for block in &mut source.blocks {
                block.content = blockjob::Content::Data;
            }
            source.bytes[5000] = 1;
            sim.guests.model = source.bytes.clone();
            sim.guests.undefined.fill(false);
        }
        drive(&mut sim, mirror);
        sim.finish();
        let world = sim.world.borrow();
        let target = &world.disks[TARGET];
        let is_zero = |block: usize| target.blocks[block].content == blockjob::Content::Zero;
        assert!(target.blocks.len() > 16);
        for granule in 0..target.blocks.len() / 8 {
            // In the midst of a block a request may land in two parts.
            let zeroed = (8 * granule..8 * granule + 8).filter(|&block| is_zero(block));
            let expected = if granule == 1 { 0..=0 } else { 7..=8 };
            let zeroed = zeroed.count();
            assert!(
                expected.contains(&zeroed),
                "granule {granule}: {zeroed}, queue: {uses_queue}"
            );
        }
        assert_eq!(target.bytes[5000], 1);
    }
}
