//! Groups of two and three mirrors, in the same deterministic world, with guests that order their writes
//! across disks; members that fail, are cancelled, paused, held, dropped; switches that are dropped, late, or
//! committed when it is too late. It is judged by the promises:
//!
//! 1. When a switch is handed out every guest of the group is held, no write of any is in flight, each target
//!    equals its source and is flushed; and so it stays until all are committed or one is dropped.
//! 2. No target holds a write without those that the guest made sure of before it, on whatever disk.
//! 3. All members succeed, or none does. Then each guest is on its target, or each on its source; but those of
//!    soft cancels, which stay.
//! 4. Who fails keeps its error, the others are cancelled. Nothing fails by itself.
//! 5. What the guest was told is on the disk it is on, through switches forth and back.
//! 6. Nothing is written to a target that a guest is on. What differs is known to differ.
//! 7. A transaction that starts them holds the guests of all at one instant, and leaves no trace when it is undone.
//!    What is asked of the group is asked of all, or of none.
//! 8. The group ends when it should, its events come in a legal order, and no node stays held.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run. A failure prints the seed and
//! the command that runs it again.

mod sim;

use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::driver::Driven;
use blockjob::{
    Cancel, Event, Granularity, Hold, Job, JobError, JobGroup, Jobs, Limits, Mirror, MirrorOptions,
    MirrorSync, Node, OnError, Prepared, Preparing, RangeLimits, Status, Switch, SwitchBack,
    Transaction, VerbError,
};

use sim::chain::Chain;
use sim::content::{fill_source, fill_target, is_equal};
use sim::disk::{BLOCK, Disk, Faults, Latency};
use sim::driving::Driving;
use sim::events::check_events;
use sim::guest::Guests;
use sim::rng::Rng;
use sim::seeds::run_seeds;
use sim::world::{Flag, Happening, SOURCE, Shared, TARGET, World};

/// More steps than any group should need.
const STEPS_MAX: u64 = 4_000_000;
/// From this time on nothing fails and nobody disturbs the jobs any more.
const PEACE: u64 = 200_000;
/// Threads of one guest, at most.
const THREADS_MAX: usize = 8;
/// The first of the threads that write to several disks.
const CHAINS: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    Start,
    /// Starts all by a transaction.
    Prepare,
    Commit,
    /// Drops the transaction.
    Abort,
    Pause,
    Resume,
    Hold,
    Release,
    Complete,
    /// Has all come to their end as their plans say, or none.
    EndAll,
    SoftCancel,
    ForceCancel,
    Finalize,
    DropDriver,
    Drive,
    DropMachine,
    /// Commits the switch that is out, or drops it.
    Decide,
    PointBack,
    Shutdown,
    /// After [`PEACE`]: whatever keeps the jobs from their end is taken away.
    MakePeace,
}

/// What is decided of one member.
#[derive(Debug)]
struct MemberPlan {
    options: MirrorOptions,
    source: Limits,
    target: Limits,
    threads: usize,
    /// Else tasks drive it that come and go.
    uses_queue: bool,
    start: u64,
    end: Asking,
    ready_for: u64,
}

#[derive(Debug, Default)]
struct Report {
    steps: u64,
    writes: u64,
    succeeded: bool,
    switched: bool,
    soft: usize,
    mixed: bool,
    declines: u64,
    backs: u64,
    let_go: bool,
    failed: bool,
    cancelled: bool,
    dropped: bool,
    drops: u64,
    waited: bool,
    started_together: bool,
    aborts: u64,
    ended_together: bool,
}

/// How far the transaction is that starts them.
enum Open {
    Preparing(Preparing, Arc<Flag>),
    Prepared(Prepared),
}

struct Member {
    plan: MemberPlan,
    job: Job,
    driving: Driving<Mirror>,
    switch: Option<Switch>,
    back: Option<SwitchBack>,
    /// Whether its machine was dropped after its switch was committed: nobody can point it back.
    is_unguided: bool,
    /// Whether somebody drives it: not before it is started, and not for a while after its driver was
    /// dropped.
    is_driven: bool,
    result: Option<Result<(), JobError>>,
    events: Vec<Event>,
    holds: Vec<Hold>,
}

struct Sim {
    world: Shared,
    nodes: Vec<Node>,
    members: Vec<Member>,
    guests: Vec<Guests>,
    chains: Vec<Chain>,
    jobs: Jobs,
    asks: Vec<(usize, Asking)>,
    decline_one_in: u64,
    may_fail: bool,
    was_cancelled: bool,
    is_shut_down: bool,
    /// Whether a round is on: a switch was handed out, and none was dropped.
    is_round_on: bool,
    /// Whether somebody has told them to finalize.
    was_told: bool,
    open: Option<Open>,
    /// Whether the end is asked of the group, not of each.
    ends_together: bool,
    report: Report,
}

fn disk_of(member: usize, side: usize) -> usize {
    2 * member + side
}

impl MemberPlan {
    fn new(rng: &mut Rng, index: usize, group: &JobGroup, jobs: &Jobs) -> Self {
        // Room for the blocks that are written in order.
        let len = rng.between(8, 96) * BLOCK;
        let limits = |rng: &mut Rng| {
            let mut limits = Limits::new(len);
            limits.request_align = rng.pick(&[1, 512]);
            limits.max_transfer = rng.pick(&[16 << 10, 1 << 30]);
            limits
        };
        let (source, mut target) = (limits(rng), limits(rng));
        if rng.one_in(2) {
            target.write_zeroes = Some(RangeLimits {
                align: 512,
                max: 1 << 30,
            });
            target.cheap_zeroes = rng.one_in(2);
        }
        let mut options = MirrorOptions::default();
        options.job.id = Some(format!("m{index}"));
        options.job.group = Some(group.clone());
        options.job.jobs = Some(jobs.clone());
        options.sync = rng.pick(&[MirrorSync::Full, MirrorSync::Full, MirrorSync::Top]);
        options.granularity = Granularity::from_bytes(rng.pick(&[512, 1024, 4096]));
        options.workers = rng.pick(&[1, 2, 8]);
        options.chunk_max = rng.pick(&[512, 4096, 1 << 20]);
        options.job.auto_finalize = !rng.one_in(4);
        options.job.auto_dismiss = rng.one_in(2);
        let policies = [OnError::Report, OnError::Ignore, OnError::Stop];
        options.job.on_source_error = rng.pick(&policies);
        options.job.on_target_error = rng.pick(&policies);
        if rng.one_in(3) {
            options.hold_max = Duration::from_micros(rng.pick(&[1_000, 3_000, 20_000]));
        }
        Self {
            options,
            source,
            target,
            threads: rng.below(4) as usize,
            uses_queue: rng.one_in(2),
            start: rng.pick(&[0, 0, 500, 5_000]),
            end: Asking::Complete,
            ready_for: rng.pick(&[0, 0, 300, 3_000, 20_000]),
        }
    }
}

impl Member {
    fn new(plan: MemberPlan, node: &Node, source: usize) -> Self {
        let mirror = Mirror::new(node, plan.source, plan.target, plan.options.clone())
            .unwrap_or_else(|error| panic!("{error}: {plan:?}"));
        Self {
            job: mirror.job().clone(),
            driving: Driving::new(mirror, source, plan.uses_queue),
            switch: None,
            back: None,
            is_unguided: false,
            is_driven: false,
            result: None,
            events: Vec::new(),
            holds: Vec::new(),
            plan,
        }
    }

    fn is_over(&self) -> bool {
        let is_out = self.switch.is_some() || self.back.is_some();
        // One that is not driven is over when its handle says so.
        !is_out && (self.driving.is_gone() || self.job.query().status >= Status::Concluded)
    }

    fn is_soft(&self) -> bool {
        self.job.query().cancel == Some(Cancel::Soft)
    }
}

impl Sim {
    fn ask_later(&mut self, micros: u64, member: usize, ask: Asking) {
        self.asks.push((member, ask));
        let index = self.asks.len() - 1;
        self.world
            .borrow_mut()
            .after(micros, Happening::User(index));
    }

    fn random(&self, end: u64) -> u64 {
        self.world.borrow_mut().rng.below(end)
    }

    /// The disk that each guest is on.
    fn current(&self) -> Vec<usize> {
        self.guests.iter().map(|guests| guests.current).collect()
    }

    /// Has each machine that was woken hand out all it has to hand out.
    fn pump(&mut self) {
        self.poll_transaction();
        let next = |sim: &Self| {
            sim.members
                .iter()
                .position(|member| member.is_driven && member.driving.flag.take())
        };
        while let Some(index) = next(self) {
            self.ask_machine(index);
        }
        self.check_together();
    }

    fn poll_transaction(&mut self) {
        let Some(Open::Preparing(preparing, flag)) = &mut self.open else {
            return;
        };
        if !flag.take() {
            return;
        }
        let waker = Waker::from(Arc::clone(flag));
        let Poll::Ready(result) = preparing.poll_prepared(Some(&waker)) else {
            return;
        };
        self.open = None;
        let Ok(prepared) = result else {
            // One of them was cancelled, or started by somebody. The others are started by themselves.
            for index in 0..self.members.len() {
                self.ask_later(100, index, Asking::Start);
            }
            return;
        };
        self.open = Some(Open::Prepared(prepared));
        for index in 0..self.members.len() {
            self.check_held(index);
        }
        let is_aborted = self.world.borrow_mut().rng.one_in(3);
        let is_peace = self.world.borrow().now > PEACE;
        let ask = match is_aborted && !is_peace {
            true => Asking::Abort,
            false => Asking::Commit,
        };
        let delay = self.random(300);
        self.ask_later(delay, 0, ask);
    }

    /// While they come to their end, the guests of all are held or none is.
    fn check_together(&self) {
        let is_ending = self.members.iter().all(|member| {
            let info = member.job.query();
            let is_out = member.switch.is_some() || member.back.is_some();
            let is_alive = !member.driving.is_gone() && member.is_driven && !is_out;
            is_alive && info.status == Status::Pending && info.cancel != Some(Cancel::Force)
        });
        if !is_ending {
            return;
        }
        let held: Vec<bool> = self.nodes.iter().map(is_held).collect();
        assert!(
            held.iter().all(|&is_held| is_held == held[0]),
            "some guests are held and others are not: {held:?}"
        );
    }

    fn ask_machine(&mut self, index: usize) {
        let Some(driven) = self.members[index].driving.poll(&self.world) else {
            return;
        };
        match driven {
            Driven::Switch(switch) => {
                self.members[index].switch = Some(switch);
                self.is_round_on = true;
                self.check_told();
                self.check_instant();
                let delay = self.random(3_000);
                self.ask_later(delay, index, Asking::Decide);
            }
            Driven::SwitchBack(back) => {
                assert_eq!(
                    self.guests[index].current,
                    disk_of(index, TARGET),
                    "only who has gone over goes back"
                );
                self.members[index].back = Some(back);
                self.report.backs += 1;
                let delay = self.random(500);
                self.ask_later(delay, index, Asking::PointBack);
            }
            Driven::Done(result) => self.ended(index, result),
        }
    }

    fn step(&mut self) {
        let happening = self.world.borrow_mut().step();
        let Some(happening) = happening else {
            panic!("stalled: {}", self.describe());
        };
        let steps = self.world.borrow().steps;
        let is_late = self.world.borrow().now > 3 * PEACE;
        assert!(
            !is_late && steps < STEPS_MAX,
            "stalled: {}",
            self.describe()
        );
        let current = self.current();
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
            Happening::Guest(thread) => {
                let mut world = self.world.borrow_mut();
                match thread.checked_sub(CHAINS) {
                    Some(chain) => self.chains[chain].act(&mut world, &self.nodes, &current),
                    None => self.guests[thread / THREADS_MAX].act(&mut world, thread),
                }
            }
            Happening::User(index) => {
                let (member, ask) = self.asks[index];
                self.ask(member, ask);
            }
        }
        self.deliver();
        self.check_round();
    }

    fn describe(&self) -> String {
        let infos = self.members.iter().map(|member| member.job.query());
        format!("{:#?}", infos.collect::<Vec<_>>())
    }

    /// Hands on what was answered, and lets in who was woken at a gate.
    fn deliver(&mut self) {
        let mut world = self.world.borrow_mut();
        for (thread, request) in std::mem::take(&mut world.guest_answers) {
            match thread.checked_sub(CHAINS) {
                Some(chain) => self.chains[chain].answered(&mut world, request),
                None => self.guests[thread / THREADS_MAX].answered(&mut world, thread, request),
            }
        }
        let current: Vec<usize> = self.guests.iter().map(|guests| guests.current).collect();
        for guests in &mut self.guests {
            guests.wake(&mut world);
            self.report.waited |= guests.is_waiting();
        }
        for chain in &mut self.chains {
            chain.wake(&mut world, &current);
            self.report.waited |= chain.is_waiting();
        }
        for (disk, id) in std::mem::take(&mut world.queue_answers) {
            self.members[disk / 2].driving.answer(&mut world, disk, id);
        }
        for member in &mut self.members {
            member.driving.settle(&mut world, |_| Ok(()));
        }
        drop(world);
        for index in 0..self.members.len() {
            self.take_events(index);
        }
    }

    fn ask(&mut self, index: usize, ask: Asking) {
        let member = &mut self.members[index];
        let job = member.job.clone();
        match ask {
            Asking::Start => {
                // Nobody drives a job that will not start.
                member.is_driven |= job.start().is_ok();
            }
            Asking::Prepare => {
                let are_over = self.members.iter().all(Member::is_over);
                if self.open.is_none() && !are_over {
                    let mut list = Transaction::new();
                    for member in &self.members {
                        list.start(&member.job);
                    }
                    self.open = Some(Open::Preparing(list.prepare(), Flag::new()));
                }
            }
            Asking::Commit => {
                let Some(Open::Prepared(prepared)) = self.open.take() else {
                    return;
                };
                prepared.commit();
                for member in &mut self.members {
                    member.is_driven |= member.job.query().status != Status::Created;
                    member.driving.flag.clone().wake_it();
                }
                self.report.started_together = true;
            }
            Asking::Abort => {
                let Some(Open::Prepared(prepared)) = self.open.take() else {
                    return;
                };
                drop(prepared);
                self.report.aborts += 1;
                let delay = self.random(2_000);
                self.ask_later(delay, 0, Asking::Prepare);
            }
            Asking::EndAll => {
                let is_soft = member.plan.end == Asking::SoftCancel;
                let group = job.query().group.expect("it is in one");
                let wishes = |sim: &Self| -> Vec<_> {
                    let infos = sim.members.iter().map(|member| member.job.query());
                    infos
                        .map(|info| (info.cancel, info.is_completing))
                        .collect()
                };
                let before = wishes(self);
                let asked = match is_soft {
                    true => group.cancel(Cancel::Soft),
                    false => group.complete(),
                };
                match asked {
                    Ok(()) => self.report.ended_together = true,
                    Err(error) => assert_eq!(wishes(self), before, "refused: {error}"),
                }
            }
            Asking::Drive => {
                member.is_driven = true;
                member.driving.flag.clone().wake_it();
            }
            Asking::Pause => drop(job.pause()),
            Asking::Resume => drop(job.resume()),
            Asking::Hold => member.holds.push(job.hold()),
            Asking::Release => drop(member.holds.pop()),
            Asking::Complete => {
                let status = job.query().status;
                let _ = job.complete();
                if matches!(status, Status::Standby) {
                    self.ask_later(500, index, Asking::Complete);
                }
            }
            Asking::Finalize => self.was_told |= job.finalize().is_ok(),
            Asking::SoftCancel => {
                let was_ready = job.query().status.is_ready();
                let was_accepted = job.cancel(Cancel::Soft).is_ok();
                self.was_cancelled |= was_accepted && !was_ready;
            }
            Asking::ForceCancel => self.was_cancelled |= job.cancel(Cancel::Force).is_ok(),
            Asking::DropDriver => {
                if !member.driving.is_gone() {
                    member.driving.drop_driver();
                    self.report.drops += 1;
                    if std::mem::replace(&mut member.is_driven, false) {
                        let delay = self.random(300);
                        self.ask_later(delay, index, Asking::Drive);
                    }
                    self.check_coverage();
                }
            }
            Asking::DropMachine => {
                let is_switched = self.guests[index].current == disk_of(index, TARGET);
                member.is_unguided = is_switched && member.result.is_none();
                member.driving.drop_all();
                self.report.dropped |= member.result.is_none();
            }
            Asking::Decide => self.decide(index),
            Asking::PointBack => {
                if let Some(back) = member.back.take() {
                    self.guests[index].current = disk_of(index, SOURCE);
                    self.world.borrow_mut().disks[disk_of(index, TARGET)].is_guests = false;
                    drop(back);
                }
            }
            Asking::Shutdown => {
                // From here on nothing can be waited for but the end.
                let _ = self.jobs.poll_shutdown(Waker::noop());
                self.was_cancelled = true;
                self.is_shut_down = true;
            }
            Asking::MakePeace => {
                member.holds.clear();
                member.is_driven |= job.start().is_ok();
                let _ = job.resume();
                self.was_told |= job.finalize().is_ok();
                let until = PEACE + 10_000;
                self.guests[index].until = self.guests[index].until.min(until);
                for chain in &mut self.chains {
                    chain.until = chain.until.min(until);
                }
                if !self.members[index].is_over() {
                    self.ask_later(5_000, index, Asking::MakePeace);
                }
            }
        }
    }

    /// Points the guest over and commits, or drops the switch.
    fn decide(&mut self, index: usize) {
        let member = &mut self.members[index];
        let Some(switch) = member.switch.take() else {
            return;
        };
        let is_declined = !self.world.borrow().now.ge(&PEACE)
            && self.world.borrow_mut().rng.one_in(self.decline_one_in);
        if is_declined {
            self.is_round_on = false;
            self.report.declines += 1;
            drop(switch);
            let delay = self.random(2_000);
            let asked = self.random(self.members.len() as u64) as usize;
            self.ask_later(delay, asked, Asking::Finalize);
            return;
        }
        self.guests[index].current = disk_of(index, TARGET);
        self.world.borrow_mut().disks[disk_of(index, TARGET)].is_guests = true;
        member.is_unguided = member.driving.is_gone();
        switch.commit();
    }

    fn take_events(&mut self, index: usize) {
        while let Some(event) = self.members[index].job.next_event() {
            let plan = &self.members[index].plan;
            let (end, ready_for) = (plan.end, plan.ready_for);
            match &event {
                Event::Ready { .. } if self.ends_together => {
                    let delay = self.random(ready_for + 1);
                    self.ask_later(delay, index, Asking::EndAll);
                    // Should one of the others never be ready.
                    self.ask_later(PEACE / 2, index, end);
                }
                Event::Ready { .. } => self.ask_later(ready_for, index, end),
                Event::Status(Status::Pending) => {
                    for member in &self.members {
                        let status = member.job.query().status;
                        assert!(status.is_completed(), "pending beside one that is {status}");
                    }
                    self.ask_later(ready_for, index, Asking::Finalize);
                }
                Event::Error(error) => assert!(self.may_fail, "out of nowhere: {error:?}"),
                _ => {}
            }
            self.members[index].events.push(event);
        }
    }

    /// If one wants to be told, nothing ends before it is.
    fn check_told(&self) {
        let is_auto = |member: &Member| member.plan.options.job.auto_finalize;
        let may_end = self.was_told || self.members.iter().all(is_auto);
        assert!(may_end, "at the end, and nobody was told");
    }

    /// Every guest is held, and every target is what its source is.
    fn check_instant(&self) {
        let world = self.world.borrow();
        for index in 0..self.members.len() {
            self.check_held(index);
            self.check_copied(index, &world);
        }
        let all: Vec<usize> = (0..self.members.len()).collect();
        for chain in &self.chains {
            chain.check_order(&world, &all);
        }
    }

    fn check_held(&self, index: usize) {
        assert!(
            is_held(&self.nodes[index]),
            "the guest of {index} is not held"
        );
        let is_writing = self.guests[index].is_writing()
            || self.chains.iter().any(|chain| chain.is_writing_to(index));
        assert!(!is_writing, "a write of the guest of {index} is in flight");
    }

    fn check_copied(&self, index: usize, world: &World) {
        let pair = &world.disks[disk_of(index, SOURCE)..=disk_of(index, TARGET)];
        let target = &pair[TARGET];
        assert_eq!(target.written, target.flushed, "{index} is not flushed");
        for request in target.requests.values() {
            assert!(
                request.is_answered || !request.ask.writes(),
                "{request:?} of {index} is in flight"
            );
        }
        for block in 0..target.blocks.len() {
            assert!(is_equal(pair, block), "block {block} of {index} differs");
        }
    }

    /// Until all have voted, or one was dropped, nothing moves.
    fn check_round(&mut self) {
        if !self.is_round_on {
            return;
        }
        let infos: Vec<_> = self.members.iter().map(|m| m.job.query()).collect();
        // Whether it is decided, or undone by a driver or a machine that was dropped.
        let is_undecided = infos
            .iter()
            .all(|info| info.is_finalizing && info.error.is_none());
        let is_void = self.members.iter().any(|m| m.back.is_some())
            || infos.iter().any(|info| info.cancel == Some(Cancel::Force));
        let is_out = self.members.iter().any(|m| m.switch.is_some());
        // One that was held for too long is let go, too.
        let is_hurried = |member: &Member| member.plan.options.hold_max < Duration::from_secs(1);
        let has_dropped =
            self.report.drops > 0 || self.report.dropped || self.members.iter().any(is_hurried);
        if !is_undecided || is_void || !is_out {
            self.is_round_on = false;
            self.report.let_go |= is_void;
        } else if !has_dropped {
            for index in 0..self.members.len() {
                self.check_held(index);
            }
        }
        for info in &infos {
            if self.is_round_on && !has_dropped {
                let refused = self.members[0].job.cancel(Cancel::Force);
                assert_eq!(refused, Err(VerbError::Finalizing), "{info:?}");
            }
        }
    }

    fn check_coverage(&self) {
        for (index, member) in self.members.iter().enumerate() {
            let left = member.driving.with(|mirror| {
                mirror.check_invariants();
                mirror.left_dirty()
            });
            if self.guests[index].current != disk_of(index, SOURCE) {
                continue;
            }
            let Some(left) = left.flatten() else {
                continue;
            };
            let world = self.world.borrow();
            let pair = &world.disks[disk_of(index, SOURCE)..=disk_of(index, TARGET)];
            for block in 0..pair[SOURCE].blocks.len() {
                let start = block as u64 * BLOCK;
                let is_known =
                    self.guests[index].is_busy(block) || left.any_dirty_in(start..start + BLOCK);
                assert!(
                    is_known || is_equal(pair, block),
                    "block {block} of {index} differs and nobody knows"
                );
            }
        }
    }

    fn ended(&mut self, index: usize, result: Result<(), JobError>) {
        self.take_events(index);
        if result.is_ok() {
            self.check_told();
        }
        if result.is_ok() && self.members[index].is_soft() {
            // Its guest goes on in the next step: this is what was copied.
            self.check_copied(index, &self.world.borrow());
            self.report.soft += 1;
        }
        let member = &mut self.members[index];
        member.result = Some(result);
        member.driving.drop_all();
    }

    fn check_end(&mut self) {
        let infos: Vec<_> = self.members.iter().map(|m| m.job.query()).collect();
        let succeeded = infos[0].error.is_none();
        let mut own_errors = 0;
        for (index, info) in infos.iter().enumerate() {
            assert_eq!(info.error.is_none(), succeeded, "{}", self.describe());
            assert!(info.status >= Status::Concluded, "{info:?}");
            let member = &self.members[index];
            match &info.error {
                None => assert_eq!(info.progress.current, info.progress.total),
                Some(JobError::Cancelled { .. }) => {
                    assert_eq!(info.cancel, Some(Cancel::Force));
                }
                Some(error) => {
                    let is_expected = match error {
                        JobError::Dropped => self.report.dropped,
                        _ => self.may_fail,
                    };
                    assert!(is_expected, "{index} failed without a reason: {error}");
                    own_errors += 1;
                    self.report.failed |= matches!(error, JobError::Io { .. });
                }
            }
            let should_be = match succeeded && !member.is_soft() {
                true => TARGET,
                false => SOURCE,
            };
            assert!(
                self.guests[index].current == disk_of(index, should_be) || member.is_unguided,
                "the guest of {index} is on the wrong disk: {info:?}"
            );
            let is_auto_dismissed = member.plan.options.job.auto_dismiss;
            check_told(
                &member.events,
                succeeded,
                is_auto_dismissed,
                self.is_shut_down,
            );
        }
        assert!(
            succeeded || own_errors > 0 || self.was_cancelled,
            "undone without a reason: {}",
            self.describe()
        );
        let soft: Vec<usize> = (0..self.members.len())
            .filter(|&index| succeeded && self.members[index].is_soft())
            .collect();
        for chain in &self.chains {
            // What was copied of one instant stays as it is.
            chain.check_order(&self.world.borrow(), &soft);
        }
        self.report.mixed = !soft.is_empty() && soft.len() < self.members.len();
        self.report.succeeded = succeeded;
        self.report.switched = succeeded && soft.len() < self.members.len();
        self.report.cancelled = !succeeded && own_errors == 0;
    }

    /// The guests go on alone, and stop.
    fn wind_down(&mut self) {
        let now = self.world.borrow().now;
        let until = now + 3_000;
        for guests in &mut self.guests {
            guests.until = guests.until.min(until);
        }
        for chain in &mut self.chains {
            chain.until = chain.until.min(until);
        }
        let is_moving = |sim: &Self| {
            let guests = sim.guests.iter();
            guests.clone().any(|g| g.is_writing() || g.is_waiting())
                || sim.chains.iter().any(Chain::is_busy)
                || sim.world.borrow().now < until
        };
        // Something to come to the end by.
        self.ask_later(3_001, 0, Asking::Resume);
        while is_moving(self) {
            let is_late = self.world.borrow().now > now + 10_000_000;
            assert!(!is_late, "a guest write hangs");
            self.step();
        }
        let world = self.world.borrow();
        let current = self.current();
        for guests in &self.guests {
            guests.check(&world);
        }
        for chain in &self.chains {
            chain.check_kept(&world, &current);
        }
    }
}

fn is_held(node: &Node) -> bool {
    match node.begin_write((0..1).into()).go() {
        Some(ticket) => {
            ticket.cancel();
            false
        }
        None => true,
    }
}

fn check_told(events: &[Event], is_good: bool, is_auto_dismissed: bool, is_shut_down: bool) {
    let told = check_events(events, is_good);
    let is_dismissed = is_auto_dismissed || !told.was_started;
    match told.status {
        Some(Status::Null) => assert!(is_dismissed || is_shut_down),
        Some(Status::Concluded) => assert!(!is_dismissed),
        status => panic!("it ends {status:?}"),
    }
}

fn run(seed: u64) -> Report {
    let mut rng = Rng::new(seed);
    let count = rng.between(2, 3) as usize;
    let (group, jobs) = (JobGroup::new(), Jobs::new());
    let mut plans: Vec<MemberPlan> = (0..count)
        .map(|index| MemberPlan::new(&mut rng, index, &group, &jobs))
        .collect();
    for plan in &mut plans {
        if rng.one_in(3) {
            plan.end = Asking::SoftCancel;
        }
    }
    if rng.one_in(4) {
        plans
            .iter_mut()
            .for_each(|plan| plan.end = Asking::SoftCancel);
    }
    let may_fail = rng.one_in(3);
    let mut disks = Vec::new();
    for plan in &plans {
        let mut latency = || Latency {
            low: rng.pick(&[0, 1, 10]),
            high: rng.pick(&[10, 50, 300]),
            stall: rng.pick(&[0, 0, 20]),
        };
        let latencies = [latency(), latency()];
        let faults = match may_fail {
            true => [
                Faults {
                    read: rng.pick(&[0, 30, 200]),
                    until: PEACE / 2,
                    ..Faults::default()
                },
                Faults {
                    write: rng.pick(&[0, 30, 200]),
                    zero: rng.pick(&[0, 30]),
                    flush: rng.pick(&[0, 3, 10]),
                    is_no_space: rng.one_in(2),
                    spares_guests: true,
                    until: PEACE / 2,
                    ..Faults::default()
                },
            ],
            false => [Faults::default(); 2],
        };
        let mut source = Disk::new(plan.source, latencies[SOURCE], faults[SOURCE]);
        fill_source(&mut source, &mut rng);
        disks.push(source);
        disks.push(Disk::new(plan.target, latencies[TARGET], faults[TARGET]));
    }
    let chains = rng.between(1, 3);
    let mut chains: Vec<Chain> = (0..chains)
        .map(|index| {
            let mut order: Vec<usize> = (0..count).collect();
            let turn = rng.below(count as u64) as usize;
            order.rotate_left(turn);
            if rng.one_in(2) {
                order.reverse();
            }
            Chain::new(CHAINS + index as usize, index, order, &mut disks)
        })
        .collect();
    for (index, plan) in plans.iter().enumerate() {
        let (sources, targets) = disks.split_at_mut(disk_of(index, TARGET));
        let source = sources.last().expect("it has one");
        fill_target(source, &mut targets[0], plan.options.sync);
    }
    let load = (
        rng.pick(&[0, 20, 200]),
        rng.pick(&[300, 2_000]),
        rng.pick(&[5_000, 30_000, PEACE]),
    );
    for chain in &mut chains {
        chain.until = load.2;
        chain.pause = rng.pick(&[5, 50, 400]);
    }
    let mut asks: Vec<(u64, usize, Asking)> = Vec::new();
    for index in 0..plans.len() {
        asks.push((PEACE, index, Asking::MakePeace));
    }
    let horizon = rng.pick(&[2_000, 10_000, 30_000]);
    for _ in 0..rng.pick(&[0, 0, 3, 8]) {
        let member = rng.below(count as u64) as usize;
        let at = rng.below(horizon);
        let (ask, undo) = match rng.below(5) {
            0 => (Asking::Pause, Some(Asking::Resume)),
            1 | 2 => (Asking::Hold, Some(Asking::Release)),
            _ => (Asking::DropDriver, None),
        };
        asks.push((at, member, ask));
        if let Some(undo) = undo {
            asks.push((at + rng.below(horizon), member, undo));
        }
    }
    if rng.one_in(5) {
        let member = rng.below(count as u64) as usize;
        let ask = rng.pick(&[
            Asking::ForceCancel,
            Asking::ForceCancel,
            Asking::SoftCancel,
            Asking::DropMachine,
            Asking::DropMachine,
            Asking::Shutdown,
        ]);
        asks.push((rng.below(2 * horizon), member, ask));
    }
    let decline_one_in = rng.pick(&[0, 3, 3, 6]);
    let (starts_together, ends_together) = (rng.one_in(3), rng.one_in(4));
    if ends_together {
        let end = plans[0].end;
        plans.iter_mut().for_each(|plan| plan.end = end);
    }
    for (index, plan) in plans.iter().enumerate() {
        match starts_together {
            true if index == 0 => asks.push((plan.start, 0, Asking::Prepare)),
            true => {}
            false => asks.push((plan.start, index, Asking::Start)),
        }
    }
    let world = World::new(rng, disks, PEACE);
    let nodes: Vec<Node> = plans
        .iter()
        .map(|plan| Node::new(plan.source.len))
        .collect();
    let mut guests = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        let mut world = world.borrow_mut();
        let (source, base) = (disk_of(index, SOURCE), index * THREADS_MAX);
        let mut own = Guests::new(&nodes[index], &mut world, source, base, plan.threads);
        (own.pause.0, own.pause.1, own.until) = load;
        (0..chains.len()).for_each(|block| own.reserve(block));
        own.start(&mut world);
        guests.push(own);
    }
    chains
        .iter()
        .for_each(|chain| chain.start(&mut world.borrow_mut()));
    let members = plans
        .into_iter()
        .zip(&nodes)
        .enumerate()
        .map(|(index, (plan, node))| Member::new(plan, node, disk_of(index, SOURCE)))
        .collect();
    let mut sim = Sim {
        world,
        nodes,
        members,
        guests,
        chains,
        jobs,
        asks: Vec::new(),
        decline_one_in,
        may_fail,
        was_cancelled: false,
        is_shut_down: false,
        is_round_on: false,
        was_told: false,
        open: None,
        ends_together,
        report: Report::default(),
    };
    for (at, member, ask) in asks {
        sim.ask_later(at, member, ask);
    }
    let mut turn = 0u64;
    while !sim.members.iter().all(Member::is_over) {
        sim.pump();
        sim.step();
        turn += 1;
        if turn.is_multiple_of(16) {
            sim.check_coverage();
        }
    }
    // They may all have been cancelled before it was decided.
    sim.open = None;
    sim.deliver();
    sim.check_end();
    sim.wind_down();
    for node in &sim.nodes {
        let is_free = node.quiesce().try_guard().is_ok();
        assert!(is_free, "somebody still holds a node");
    }
    assert!(
        sim.jobs.poll_shutdown(Waker::noop()).is_ready(),
        "a job is left"
    );
    sim.report.steps = sim.world.borrow().steps;
    sim.report.writes = sim.chains.iter().map(|chain| chain.writes).sum();
    sim.report
}

#[test]
fn every_seed_keeps_the_promises() {
    let reports = run_seeds("every_seed_keeps_the_promises", 1_000, 1, run);

    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    println!(
        "{} steps; {} ordered writes; {} succeeded, {} switched, {} mixed, {} all soft, {} declined, \
         {} went back, {} failed, {} cancelled, {} with machines dropped, {} with drivers dropped, \
         {} with guests held, {} started together, {} in vain at first, {} asked together",
        reports.iter().map(|report| report.steps).sum::<u64>(),
        reports.iter().map(|report| report.writes).sum::<u64>(),
        count_of(|r| r.succeeded),
        count_of(|r| r.switched),
        count_of(|r| r.mixed),
        count_of(|r| r.succeeded && !r.switched),
        count_of(|r| r.declines > 0),
        count_of(|r| r.backs > 0),
        count_of(|r| r.failed),
        count_of(|r| r.cancelled),
        count_of(|r| r.dropped),
        count_of(|r| r.drops > 0),
        count_of(|r| r.waited),
        count_of(|r| r.started_together),
        count_of(|r| r.aborts > 0),
        count_of(|r| r.ended_together),
    );
    if reports.len() >= 1_000 {
        // A simulation that never comes to a place shows nothing about it.
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.switched) > 0.2);
        assert!(share(|r| r.mixed) > 0.1);
        assert!(share(|r| r.succeeded && !r.switched) > 0.1);
        assert!(share(|r| r.declines > 0) > 0.05);
        assert!(share(|r| r.backs > 0) > 0.02);
        assert!(share(|r| r.failed) > 0.02);
        assert!(share(|r| r.cancelled) > 0.02);
        assert!(share(|r| r.dropped) > 0.02);
        assert!(share(|r| r.drops > 0) > 0.1);
        assert!(share(|r| r.waited) > 0.1);
        assert!(share(|r| r.started_together) > 0.2);
        assert!(share(|r| r.aborts > 0) > 0.05);
        assert!(share(|r| r.ended_together) > 0.1);
    }
}

/// Breaks each invariant of groups on purpose: the simulation must notice, within so many seeds.
#[cfg(debug_assertions)]
mod sabotage {
    use super::*;
    use blockjob::sabotage::Sabotage;

    use super::sim::sabotage::{expect_panics, is_stall, unnoticed};

    /// What is broken, and the number of seeds within which it must be noticed: several times the number
    /// that it took when this was written.
    const BROKEN: &[(Sabotage, u64)] = &[
        (Sabotage::CommitAlone, 100),
        (Sabotage::OthersGoOn, 400),
        (Sabotage::LeaveCreated, 1000),
        (Sabotage::PendingAlone, 50),
        (Sabotage::FinalizeUntold, 100),
        (Sabotage::HoldAlone, 100),
        (Sabotage::SwitchAlone, 50),
        (Sabotage::ReleaseEarly, 50),
        (Sabotage::KeepHolding, 100),
        (Sabotage::LetGoSilently, 200),
        (Sabotage::KeepBegun, 100),
        (Sabotage::LeaveInSilence, 100),
        (Sabotage::ForgetLostWork, 100),
        (Sabotage::ForgetUnbegun, 400),
    ];

    /// Those by which somebody is left behind: only that a run stalls shows it.
    const STALLING: &[Sabotage] = &[
        Sabotage::LeaveCreated,
        Sabotage::KeepBegun,
        Sabotage::LeaveInSilence,
        Sabotage::ForgetLostWork,
        Sabotage::ForgetUnbegun,
    ];

    #[test]
    fn every_broken_invariant_is_noticed() {
        expect_panics();
        let missed = unnoticed(BROKEN, run, |sabotage, how| {
            is_stall(how) == STALLING.contains(&sabotage)
        });
        assert!(missed.is_empty(), "not noticed: {missed:?}");
    }
}
