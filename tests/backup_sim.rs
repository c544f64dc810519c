//! Backups under guests' writes, faults, delays, dropped drivers and machines, pauses and cancels, in a
//! deterministic world: one disk, or up to three that begin at one instant. They are judged by their promises:
//!
//! 1. Whatever is copied is what the source held at the instant, also after a failure. After a success all
//!    that was wanted is there, and flushed; of what was not wanted nothing is written.
//! 2. The guest's data is what the guest was told.
//! 3. At any time what the machine takes for missing is what a model takes for missing, and at the end the
//!    bitmap holds exactly what its mode says.
//! 4. While somebody drives the job no guest write waits longer than its deadline.
//! 5. Jobs end when they should, all of a group in the same way; events come in a legal order, with one end.
//! 6. A job that says it stands still has nothing in flight but what guests wait for.
//! 7. What failed with mode *always* is completed by the next backup, which copies the rest and nothing else.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run. A failure prints the seed and
//! the command that runs it again.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may read the clock, to tell how fast it was"
)]

#[path = "backup_sim/judge.rs"]
mod judge;
#[path = "backup_sim/member.rs"]
mod member;
#[path = "backup_sim/plan.rs"]
mod plan;
#[cfg(debug_assertions)]
#[path = "backup_sim/sabotage.rs"]
mod sabotage;
mod sim;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::driver::Driven;
use blockjob::{
    Backup, BackupOptions, BackupSync, BitmapMode, BitmapOptions, ByteRange, Cancel, Change,
    Content, Event, Extent, Granularity, Hold, Job, JobError, JobGroup, Limits, MirrorSync, Node,
    OnCbwError, OnError, OpKind, Outcome, Prepared, Preparing, RangeLimits, SnapshotOf, Status,
    Step, Transaction,
};

use judge::check_answer;
use plan::{disturbances, faults};
use sim::chain::Chain;
use sim::content::{fill_source, fill_target};
use sim::disk::{Ask, BLOCK, Block, Disk, Faults, Latency, Owner};
use sim::driving::Driving;
use sim::events::check_events;
use sim::guest::Guests;
use sim::rng::Rng;
use sim::seeds::run_seeds;
use sim::world::{Flag, Happening, JobAnswer, Loss, SOURCE, Shared, TARGET, World};

const KIB: u64 = 1 << 10;
/// More steps than any run should need.
const STEPS_MAX: u64 = 4_000_000;
/// From this time on nothing fails and nobody disturbs the jobs any more.
const PEACE: u64 = 300_000;
/// Threads of one guest, at most.
const THREADS_MAX: usize = 4;
/// What the world knows the chains by, from here on.
const CHAINS: usize = 1_000;
const NAME: &str = "daily";
/// The bitmap that a transaction makes beside.
const MADE: &str = "made";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    Start,
    /// Starts all by a transaction.
    Prepare,
    Commit,
    /// Drops the transaction.
    Abort,
    /// Has the bitmap record no more.
    Disable,
    Pause,
    Resume,
    Hold,
    Release,
    Speed(u64),
    Policy(OnError),
    Cancel,
    Finalize,
    DropDriver,
    Drive,
    DropMachine,
    /// After [`PEACE`]: whatever keeps the jobs from their end is taken away.
    MakePeace,
}

/// What is decided of one disk and its backup.
#[derive(Debug)]
struct MemberPlan {
    options: BackupOptions,
    source: Limits,
    target: Limits,
    granularity: u64,
    threads: usize,
    uses_queue: bool,
}

#[derive(Debug, Default)]
struct Report {
    steps: u64,
    writes: u64,
    refused: u64,
    succeeded: usize,
    failed: usize,
    too_slow: usize,
    cancelled: usize,
    dropped: bool,
    drops: u64,
    aborts: u64,
    held: bool,
    paused: bool,
    held_while_paused: bool,
    is_together: bool,
    resumed: usize,
    overlapped: usize,
}

/// The source at the instant that is backed up.
struct Instant {
    bytes: Vec<u8>,
    blocks: Vec<Block>,
    /// By cluster: whether it must be copied.
    must: Vec<bool>,
    /// By cluster: whether it may be.
    may: Vec<bool>,
}

struct Member {
    plan: MemberPlan,
    job: Job,
    driving: Driving<Backup>,
    cluster: u64,
    /// Requests by disk of which nobody waits for the answer any more.
    lost: BTreeSet<(usize, u64)>,
    is_driven: bool,
    events: Vec<Event>,
    holds: Vec<Hold>,
    instant: Option<Instant>,
    /// By block: whether it has come to the target, and nothing else was heard of it since.
    landed: Vec<bool>,
    /// Whether a flush was dropped: nobody knows whether what was written before is durable.
    has_lost_flush: bool,
    /// By cluster: whether a part of it has failed or was lost. Then all of it is copied again, and is
    /// missing until that is over, also where it is on the target already. The same where it was copied in parts: one
    /// of them may have been given up before any device was asked, which the model does not see.
    again: Vec<bool>,
    /// By granule of the bitmap: written before the instant, and since.
    before: Vec<bool>,
    since: Vec<bool>,
    is_recording: bool,
    /// Since when each thread waits for the job.
    waits: Vec<Option<u64>>,
}

enum Open {
    Preparing(Preparing, Arc<Flag>),
    Prepared(Prepared),
}

struct Sim {
    world: Shared,
    nodes: Vec<Node>,
    members: Vec<Member>,
    guests: Vec<Guests>,
    chains: Vec<Chain>,
    chain_waits: Vec<Option<u64>>,
    asks: Vec<(usize, Asking)>,
    by_transaction: bool,
    is_group: bool,
    aborts_one_in: u64,
    open: Option<Open>,
    may_fail: bool,
    was_cancelled: bool,
    was_dropped: bool,
    report: Report,
}

fn disk_of(member: usize, side: usize) -> usize {
    2 * member + side
}

/// The cluster at `index` of a disk of `len` bytes.
fn cluster_at(index: usize, cluster: u64, len: u64) -> ByteRange {
    let start = index as u64 * cluster;
    (start..(start + cluster).min(len)).into()
}

/// The units of `size` bytes that `range` touches.
fn units(range: ByteRange, size: u64) -> std::ops::Range<usize> {
    if range.is_empty() {
        return 0..0;
    }
    (range.start() / size) as usize..range.end().div_ceil(size) as usize
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

    fn describe(&self) -> String {
        let infos = self.members.iter().map(|member| member.job.query());
        format!("{:#?}", infos.collect::<Vec<_>>())
    }

    fn step(&mut self) {
        let happening = self.world.borrow_mut().step();
        let Some(happening) = happening else {
            panic!("stalled: {}", self.describe());
        };
        let (steps, now) = (self.world.borrow().steps, self.world.borrow().now);
        let is_late = now > 20 * PEACE;
        assert!(
            !is_late && steps < STEPS_MAX,
            "stalled at {now}, {steps} steps: {}",
            self.describe()
        );
        let current: Vec<usize> = (0..self.members.len())
            .map(|m| disk_of(m, SOURCE))
            .collect();
        match happening {
            Happening::Touch {
                disk,
                request,
                half,
            } => self.world.borrow_mut().touch(disk, request, half),
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
        self.settle_down();
        self.check_waits();
        if steps % 8 == 0 {
            self.check_models();
        }
    }

    /// Everybody who can go on does, without time going by.
    fn settle_down(&mut self) {
        loop {
            self.deliver();
            self.poll_transaction();
            self.pump();
            let is_woken = self.guests.iter().any(Guests::is_woken)
                || self.chains.iter().any(Chain::is_woken)
                || !self.world.borrow().guest_answers.is_empty()
                || !self.world.borrow().queue_answers.is_empty();
            if !is_woken {
                break;
            }
        }
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
        let current: Vec<usize> = (0..self.members.len())
            .map(|m| disk_of(m, SOURCE))
            .collect();
        for (guests, member) in self.guests.iter_mut().zip(&mut self.members) {
            for range in std::mem::take(&mut guests.recorded) {
                member.record(range);
            }
            guests.wake(&mut world);
        }
        for chain in &mut self.chains {
            for (member, range) in std::mem::take(&mut chain.recorded) {
                self.members[member].record(range);
            }
            chain.wake(&mut world, &current);
        }
        let answers = world.job_answers.as_mut().map(std::mem::take);
        for answer in answers.unwrap_or_default() {
            let member = &mut self.members[answer.disk / 2];
            if !member.lost.contains(&(answer.disk, answer.request)) {
                check_answer(member, answer);
            }
        }
        for (disk, id) in std::mem::take(&mut world.queue_answers) {
            self.members[disk / 2].driving.answer(&mut world, disk, id);
        }
        for member in &mut self.members {
            member.driving.settle(&mut world, |_| Ok(()));
        }
    }

    /// Has each machine that was woken do all it has to do.
    fn pump(&mut self) {
        let next = |sim: &Self| {
            let mut members = sim.members.iter();
            members.position(|member| member.is_driven && member.driving.flag.take())
        };
        while let Some(index) = next(self) {
            let driven = self.members[index].driving.poll(&self.world);
            self.hear_of_losses();
            let is_over = match driven {
                None => false,
                Some(Driven::Done(_)) => true,
                Some(Driven::Switch(_) | Driven::SwitchBack(_)) => {
                    unreachable!("a backup never switches")
                }
            };
            self.look_for_instant(index);
            if is_over {
                // A flush that hangs is not waited for for ever.
                let member = &mut self.members[index];
                member.lose(index, &self.world.borrow());
                member.driving.drop_all();
            }
            self.take_events(index);
        }
    }

    /// What tasks that are gone had in flight is lost.
    fn hear_of_losses(&mut self) {
        let losses = std::mem::take(&mut self.world.borrow_mut().job_losses);
        for (disk, loss) in losses {
            let member = &mut self.members[disk / 2];
            match loss {
                Loss::Range(range) => member.heard_of(range, false),
                Loss::Flush => member.has_lost_flush = true,
            }
        }
    }

    /// Whether the machine has just made the instant by itself: then it is now.
    fn look_for_instant(&mut self, index: usize) {
        let member = &mut self.members[index];
        if member.instant.is_some() {
            return;
        }
        let info = member.job.query();
        let bitmaps = self.nodes[index].bitmaps();
        let is_claimed = bitmaps.query(NAME).is_ok_and(|info| info.is_busy());
        let is_armed = member.driving.with(|backup| backup.left_dirty().is_some());
        let has_begun = info.progress.total > 0
            || is_claimed
            || is_armed == Some(true)
            || matches!(info.status, Status::Waiting | Status::Pending)
            || (info.status >= Status::Concluded && info.error.is_none());
        if has_begun {
            assert!(
                !self.guests[index].is_writing(),
                "a write is in flight at the instant"
            );
            member.begin(&self.world.borrow().disks[disk_of(index, SOURCE)]);
        }
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
            // One of them was cancelled, or it was to fail. They are started by themselves.
            self.check_made(false);
            self.by_transaction = false;
            for index in 0..self.members.len() {
                self.ask_later(100, index, Asking::Start);
            }
            return;
        };
        self.open = Some(Open::Prepared(prepared));
        for (index, member) in self.members.iter_mut().enumerate() {
            assert!(
                !self.guests[index].is_writing(),
                "a write is in flight at the instant"
            );
            member.begin(&self.world.borrow().disks[disk_of(index, SOURCE)]);
        }
        let is_aborted = self.world.borrow_mut().rng.one_in(self.aborts_one_in);
        let is_peace = self.world.borrow().now > PEACE;
        let ask = match is_aborted && !is_peace {
            true => Asking::Abort,
            false => Asking::Commit,
        };
        let delay = self.random(300);
        self.ask_later(delay, 0, ask);
    }

    fn ask(&mut self, index: usize, ask: Asking) {
        let job = self.members[index].job.clone();
        match ask {
            Asking::Start => {
                if self.open.is_none() {
                    let _ = job.start();
                }
            }
            Asking::Prepare => {
                if self.open.is_none() {
                    let mut list = Transaction::new();
                    list.add(&self.nodes[0], MADE, BitmapOptions::default());
                    for member in &self.members {
                        list.start(&member.job);
                    }
                    if self.aborts_one_in > 0 && self.random(4) == 0 {
                        list.abort();
                    }
                    self.open = Some(Open::Preparing(list.prepare(), Flag::new()));
                }
            }
            Asking::Commit => {
                let Some(Open::Prepared(prepared)) = self.open.take() else {
                    unreachable!("nobody else ends it");
                };
                prepared.commit();
                self.check_made(true);
                self.report.is_together |= self.members.len() > 1;
            }
            Asking::Abort => {
                let Some(Open::Prepared(prepared)) = self.open.take() else {
                    unreachable!("nobody else ends it");
                };
                drop(prepared);
                self.check_made(false);
                self.report.aborts += 1;
                for member in &mut self.members {
                    member.forget_instant();
                }
                let delay = self.random(2_000);
                self.ask_later(delay, 0, Asking::Prepare);
            }
            Asking::Disable => {
                let bitmaps = self.nodes[index].bitmaps();
                if bitmaps.disable(NAME).is_ok() {
                    self.members[index].is_recording = false;
                }
            }
            Asking::Pause => drop(job.pause()),
            Asking::Resume => drop(job.resume()),
            Asking::Hold => self.members[index].holds.push(job.hold()),
            Asking::Release => drop(self.members[index].holds.pop()),
            Asking::Speed(speed) => drop(job.set_speed(speed)),
            Asking::Policy(policy) => drop(job.change(Change {
                on_source_error: Some(policy),
                on_target_error: Some(policy),
                ..Change::default()
            })),
            Asking::Cancel => self.was_cancelled |= job.cancel(Cancel::Force).is_ok(),
            Asking::Finalize => drop(job.finalize()),
            Asking::DropDriver => self.drop_driver(index),
            Asking::Drive => {
                self.members[index].is_driven = true;
                self.members[index].driving.flag.clone().wake_it();
            }
            Asking::DropMachine => {
                let member = &mut self.members[index];
                let was_over = member.is_over();
                member.lose(index, &self.world.borrow());
                member.driving.drop_all();
                self.hear_of_losses();
                self.was_dropped |= !was_over;
                self.report.dropped |= !was_over;
                self.take_events(index);
            }
            Asking::MakePeace => self.make_peace(index),
        }
    }

    fn drop_driver(&mut self, index: usize) {
        let member = &mut self.members[index];
        if member.is_over() {
            return;
        }
        member.lose(index, &self.world.borrow());
        member.driving.drop_driver();
        self.hear_of_losses();
        self.report.drops += 1;
        if std::mem::replace(&mut self.members[index].is_driven, false) {
            let delay = self.random(300);
            self.ask_later(delay, index, Asking::Drive);
        }
    }

    fn make_peace(&mut self, index: usize) {
        let member = &mut self.members[index];
        member.holds.clear();
        let job = member.job.clone();
        let _ = job.resume();
        let _ = job.set_speed(0);
        let _ = job.finalize();
        if member.plan.options.sync == BackupSync::None && member.has_run() {
            self.was_cancelled |= job.cancel(Cancel::Force).is_ok();
        }
        if self.open.is_none() && job.query().status == Status::Created {
            let _ = job.start();
        }
        let until = PEACE + 5_000;
        self.guests[index].until = self.guests[index].until.min(until);
        for chain in &mut self.chains {
            chain.until = chain.until.min(until);
        }
        if !self.members[index].is_over() {
            self.ask_later(5_000, index, Asking::MakePeace);
        }
    }

    fn take_events(&mut self, index: usize) {
        while let Some(event) = self.members[index].job.next_event() {
            match &event {
                Event::Status(Status::Pending) => {
                    for member in &self.members {
                        let status = member.job.query().status;
                        let is_done = !self.is_group || status.is_completed();
                        assert!(is_done, "pending beside one that is {status}");
                    }
                    let after = self.random(3_000);
                    self.ask_later(after, index, Asking::Finalize);
                }
                Event::Error(error) => assert!(self.may_fail, "out of nowhere: {error:?}"),
                _ => {}
            }
            self.members[index].events.push(event);
        }
    }

    /// The guests go on alone, and stop.
    fn wind_down(&mut self) {
        let now = self.world.borrow().now;
        let until = now + 2_000;
        for guests in &mut self.guests {
            guests.until = guests.until.min(until);
        }
        for chain in &mut self.chains {
            chain.until = chain.until.min(until);
        }
        let is_moving = |sim: &Self| {
            let mut guests = sim.guests.iter();
            guests.any(|guests| guests.is_writing() || guests.is_waiting())
                || sim.chains.iter().any(Chain::is_busy)
                || sim.world.borrow().now < until
                || sim.world.borrow().disks.iter().any(|disk| {
                    // What was abandoned may still land.
                    disk.requests.values().any(|request| !request.is_answered)
                })
        };
        while is_moving(self) {
            assert!(
                self.world.borrow().now < now + 10_000_000,
                "a guest write hangs"
            );
            let mut world = self.world.borrow_mut();
            // So that the world does not run out of things.
            world.after(1_000, Happening::Wake(Waker::noop().clone()));
            drop(world);
            self.step();
        }
        let world = self.world.borrow();
        let disks: Vec<usize> = (0..self.members.len())
            .map(|m| disk_of(m, SOURCE))
            .collect();
        for guests in &self.guests {
            guests.check(&world);
        }
        for chain in &self.chains {
            chain.check_kept(&world, &disks);
        }
    }

    /// The next backup completes the image, and copies what is left and nothing else.
    fn resume(&mut self, index: usize) {
        let member = &self.members[index];
        let is_good = member.job.query().error.is_none();
        let has_run = member.has_run() && member.instant.is_some();
        let has_image = has_run || member.plan.goes_by_bitmap();
        let is_always = member.plan.mode() == Some(BitmapMode::Always);
        if is_good || !is_always || !has_image || !member.is_recording {
            return;
        }
        self.report.resumed += 1;
        let bits = self.nodes[index]
            .bitmaps()
            .snapshot(NAME, SnapshotOf::Bitmap);
        let bits = bits.expect("memory");
        let mut options = BackupOptions::default();
        options.sync = BackupSync::Incremental;
        options.bitmap = Some(NAME.to_owned());
        let limits = Limits::new(member.len());
        let mut backup = Backup::new(&self.nodes[index], limits, limits, options)
            .expect("the first one is over");
        let cluster = backup.cluster_size();
        backup.job().start().expect("it is new");
        let mut world = self.world.borrow_mut();
        let now = world.time();
        let disks = &mut world.disks[disk_of(index, SOURCE)..=disk_of(index, TARGET)];
        let [source, target] = disks else {
            unreachable!("a pair");
        };
        let mut copied = vec![false; member.len().div_ceil(cluster) as usize];
        loop {
            match backup.poll(now, Waker::noop()) {
                Step::Op(op) => {
                    let outcome = match op.kind() {
                        OpKind::Copy(range) => {
                            let at = range.start() as usize..range.end() as usize;
                            target.bytes[at.clone()].copy_from_slice(&source.bytes[at]);
                            for block in units(range, BLOCK) {
                                target.blocks[block].content = Content::Data;
                            }
                            copied[units(range, cluster)].fill(true);
                            Outcome::Done
                        }
                        OpKind::Status(range) => Outcome::Status(Extent {
                            len: range.len(),
                            content: Content::Data,
                            in_top: true,
                        }),
                        _ => Outcome::Done,
                    };
                    backup.op_done(now, op, outcome);
                }
                Step::Done(result) => break result.expect("nothing fails"),
                step => panic!("everything is done at once, but {step:?}"),
            }
        }
        for (unit, &is_copied) in copied.iter().enumerate() {
            let range = cluster_at(unit, cluster, member.len());
            assert_eq!(is_copied, bits.any_dirty_in(range), "{range} of the rest");
        }
        for block in 0..source.blocks.len() {
            let range = cluster_at(block, BLOCK, member.len());
            let at = range.start() as usize..range.end() as usize;
            let is_same = source.blocks[block].content == Content::Undefined
                || source.bytes[at.clone()] == target.bytes[at];
            assert!(is_same, "block {block} of {index} is not in the image");
        }
    }
}

fn run(seed: u64) -> Report {
    let mut rng = Rng::new(seed);
    let count = rng.pick(&[1, 1, 1, 2, 3]);
    let group = (count > 1 && rng.one_in(2)).then(JobGroup::new);
    let plans: Vec<MemberPlan> = (0..count)
        .map(|index| MemberPlan::new(&mut rng, index, group.as_ref(), count == 1))
        .collect();
    if std::env::var_os("BLOCKJOB_VERBOSE").is_some() {
        eprintln!("{plans:#?}");
    }
    let may_fail = rng.one_in(2);
    let mut disks = Vec::new();
    let latency = |rng: &mut Rng| Latency {
        low: rng.pick(&[0, 1, 10]),
        high: rng.pick(&[10, 50, 500]),
        stall: rng.pick(&[0, 0, 0, 20]),
    };
    for plan in &plans {
        let faults = match may_fail {
            true => [faults(&mut rng, true), faults(&mut rng, false)],
            false => [Faults::default(); 2],
        };
        let mut source = Disk::new(plan.source, latency(&mut rng), faults[SOURCE]);
        let target = Disk::new(plan.target, latency(&mut rng), faults[TARGET]);
        fill_source(&mut source, &mut rng);
        disks.push(source);
        disks.push(target);
    }
    let mut chains = Vec::new();
    if count > 1 {
        for index in 0..rng.below(3) as usize {
            let mut order: Vec<usize> = (0..count).collect();
            let by = rng.below(count as u64) as usize;
            order.rotate_left(by);
            let block = index as u64;
            chains.push(Chain::new(CHAINS + index, block, order, &mut disks));
        }
    }
    let nodes: Vec<Node> = plans
        .iter()
        .map(|plan| Node::new(plan.source.len))
        .collect();
    for (index, plan) in plans.iter().enumerate() {
        let sync = match plan.options.sync {
            BackupSync::Bitmap | BackupSync::Incremental => MirrorSync::None,
            BackupSync::Top => MirrorSync::Top,
            BackupSync::Full | BackupSync::None => MirrorSync::Full,
        };
        let (sources, targets) = disks.split_at_mut(disk_of(index, TARGET));
        fill_target(&sources[disk_of(index, SOURCE)], &mut targets[0], sync);
        if plan.options.bitmap.is_some() {
            let mut options = BitmapOptions::default();
            options.granularity = Granularity::from_bytes(plan.granularity);
            let guard = nodes[index]
                .quiesce()
                .try_guard()
                .expect("nobody writes yet");
            let added = nodes[index].bitmaps().add(&guard, NAME, options);
            added.expect("a new name");
        }
    }
    let asks: Vec<(usize, u64, Asking)> = plans
        .iter()
        .enumerate()
        .flat_map(|(index, plan)| {
            let asks = disturbances(&mut rng, plan).into_iter();
            asks.map(move |(at, ask)| (index, at, ask))
                .collect::<Vec<_>>()
        })
        .collect();
    let by_transaction = rng.one_in(2);
    let start_at = rng.pick(&[0, 500, 3_000]);
    let aborts_one_in = rng.pick(&[0, 0, 3]);
    let loads: Vec<_> = plans
        .iter()
        .map(|_| {
            let pause = (rng.pick(&[0, 20, 200]), rng.pick(&[200, 1_000, 5_000]));
            let len_max = rng.pick(&[512, 4096, 20_000, 100_000]);
            (pause, len_max, rng.pick(&[2_000, 10_000, 40_000]))
        })
        .collect();
    let starts: Vec<u64> = plans.iter().map(|_| rng.below(1_000)).collect();
    let world = World::new(rng, disks, PEACE);
    world.borrow_mut().job_answers = Some(Vec::new());
    let members: Vec<Member> = plans
        .into_iter()
        .zip(&nodes)
        .enumerate()
        .map(|(index, (plan, node))| Member::new(plan, node, disk_of(index, SOURCE)))
        .collect();
    let mut guests = Vec::new();
    for (index, (pause, len_max, until)) in loads.into_iter().enumerate() {
        let mut world = world.borrow_mut();
        let threads = members[index].plan.threads;
        let disk = disk_of(index, SOURCE);
        let mut some = Guests::new(
            &nodes[index],
            &mut world,
            disk,
            index * THREADS_MAX,
            threads,
        );
        (some.pause, some.len_max, some.until) = (pause, len_max, until);
        for block in 0..chains.len() {
            some.reserve(block);
        }
        some.start(&mut world);
        guests.push(some);
    }
    for chain in &mut chains {
        chain.until = 20_000;
        chain.start(&mut world.borrow_mut());
    }
    let mut sim = Sim {
        world,
        nodes,
        members,
        guests,
        chain_waits: vec![None; chains.len()],
        chains,
        asks: Vec::new(),
        by_transaction,
        is_group: group.is_some(),
        aborts_one_in,
        open: None,
        may_fail,
        was_cancelled: false,
        was_dropped: false,
        report: Report::default(),
    };
    for (member, at, ask) in asks {
        sim.ask_later(start_at + at, member, ask);
    }
    match by_transaction {
        true => sim.ask_later(start_at, 0, Asking::Prepare),
        false => {
            for (index, at) in starts.into_iter().enumerate() {
                sim.ask_later(start_at + at, index, Asking::Start);
            }
        }
    }
    while !sim.members.iter().all(Member::is_over) || sim.open.is_some() {
        sim.step();
    }
    sim.check_models();
    sim.wind_down();
    for index in 0..sim.members.len() {
        sim.take_events(index);
    }
    sim.check_end();
    for index in 0..sim.members.len() {
        sim.check_outcome(index);
        sim.members[index].driving.drop_all();
        sim.resume(index);
        let guard = sim.nodes[index].quiesce().try_guard();
        assert!(guard.is_ok(), "somebody still holds a node");
    }
    let world = sim.world.borrow();
    sim.report.steps = world.steps;
    sim.report.writes = sim.guests.iter().map(|guests| guests.writes).sum();
    sim.report.refused = sim.guests.iter().map(|guests| guests.refused).sum();
    let targets = world.disks.iter().skip(1).step_by(2);
    let most = targets.map(|disk| disk.writes_in_flight_max).max();
    sim.report.overlapped = most.expect("a target");
    sim.report
}

#[test]
fn every_seed_keeps_the_promises() {
    let started = std::time::Instant::now();
    let reports = run_seeds("every_seed_keeps_the_promises", 1_500, 1, run);
    let seconds = started.elapsed().as_secs_f64();

    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    let steps: u64 = reports.iter().map(|report| report.steps).sum();
    println!(
        "{steps} steps, {:.0} per second; {} guest writes, {} refused; {} succeeded, {} failed, \
         {} too slow, {} cancelled, {} dropped, {} with dropped drivers, {} with guests held, {} paused, \
         {} of these with guests held, {} together, {} aborted, {} resumed, {} with writes in parallel",
        steps as f64 / seconds,
        reports.iter().map(|report| report.writes).sum::<u64>(),
        reports.iter().map(|report| report.refused).sum::<u64>(),
        count_of(|r| r.succeeded > 0),
        count_of(|r| r.failed > 0),
        count_of(|r| r.too_slow > 0),
        count_of(|r| r.cancelled > 0),
        count_of(|r| r.dropped),
        count_of(|r| r.drops > 0),
        count_of(|r| r.held),
        count_of(|r| r.paused),
        count_of(|r| r.held_while_paused),
        count_of(|r| r.is_together),
        count_of(|r| r.aborts > 0),
        count_of(|r| r.resumed > 0),
        count_of(|r| r.overlapped > 1),
    );
    if reports.len() >= 1_000 {
        // A simulation that never comes to a place shows nothing about it.
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.succeeded > 0) > 0.2);
        assert!(share(|r| r.failed > 0) > 0.05);
        assert!(share(|r| r.too_slow > 0) > 0.02);
        assert!(share(|r| r.cancelled > 0) > 0.05);
        assert!(share(|r| r.dropped) > 0.01);
        assert!(share(|r| r.drops > 0) > 0.05);
        assert!(share(|r| r.held) > 0.2);
        assert!(share(|r| r.paused) > 0.05);
        assert!(share(|r| r.held_while_paused) > 0.01);
        assert!(share(|r| r.is_together) > 0.1);
        assert!(share(|r| r.aborts > 0) > 0.02);
        assert!(share(|r| r.resumed > 0) > 0.02);
        assert!(share(|r| r.overlapped > 1) > 0.2);
    }
}
