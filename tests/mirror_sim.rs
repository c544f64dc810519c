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

mod sim;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockjob::bitmap::stored::{self, Label};
use blockjob::driver::{Driven, Driver};
use blockjob::queue::{Answer, Next, Queue, Work};
use blockjob::{
    Adaptive, BitmapMode, BitmapState, ByteRange, Cancel, Change, ChangedSince, Checkpoint,
    CheckpointId, CompareBy, CopyMode, Event, Extent, Granularity, HBitmap, Hold, Job, JobError,
    Limits, Mirror, MirrorError, MirrorOptions, MirrorSync, Node, OnError, OpKind, Outcome,
    RangeLimits, Resume, ResumeError, Side, SnapshotOf, Status, Step, Switch, TargetHolds, Unmap,
    Verified,
};

use sim::content::{fill_copied, fill_source, fill_target, is_equal};
use sim::crew::Several;
use sim::disk::{Ask, BLOCK, Disk, Faults, Latency, Owner, SimDevice, VecPool, result_of};
use sim::guest::Guests;
use sim::rng::Rng;
use sim::world::{Flag, Happening, SOURCE, Shared, SimClock, TARGET, World};

/// More steps than any job should need, also beside a guest that never stops before the peace.
const STEPS_MAX: u64 = 4_000_000;
/// From this time on nothing fails and nobody disturbs the job any more.
const PEACE: u64 = 400_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    Pause,
    Resume,
    Hold,
    Release,
    Speed(u64),
    Policy(OnError),
    Mode(CopyMode),
    Complete,
    SoftCancel,
    ForceCancel,
    DropDriver,
    /// Have the job say what it has still to do.
    Checkpoint,
    /// The process ends.
    Die,
    /// Something damages the target, and the job is asked to look.
    Plant,
    /// After [`PEACE`]: whatever keeps the job from its end is taken away.
    MakePeace,
}

/// What one seed has decided.
#[derive(Debug)]
struct Plan {
    options: MirrorOptions,
    source: Limits,
    target: Limits,
    threads: usize,
    asks: Vec<(u64, Asking)>,
    uses_queue: bool,
    /// How often the caller drops the switch before it is taken.
    declines: u64,
    /// How the end is asked for once the job is ready.
    end: Asking,
    ready_for: u64,
    may_fail: bool,
    /// What is dirty at first in the bitmap that the job goes by.
    bits: Option<HBitmap>,
    /// Whether checkpoints are stored, and so what was written since.
    stores: bool,
    /// Whether the guest writes zeroes often, to a target for which they are not cheap and fail often.
    zeroes_often: bool,
    /// Whether requests of the source take long now and then, those of the guest among them.
    stalls: bool,
}

/// The bitmap that a job goes by is called so.
const BITMAP: &str = "the job's";
/// Has what was dirty at first, and all that was written.
const ALL: &str = "all writes";
/// Has what was written since the end of the job.
const AFTER: &str = "writes since the end";
/// Has what was written since the last checkpoint.
const SINCE: &str = "since the checkpoint";

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

fn limits(rng: &mut Rng, len: u64, align: u64) -> Limits {
    let mut limits = Limits::new(len);
    limits.request_align = align as u32;
    limits.max_transfer = rng.pick(&[4096, 16 << 10, 64 << 10, 1 << 30]).max(align) as u32;
    limits
}

impl Plan {
    fn new(rng: &mut Rng) -> Self {
        let len = match rng.below(16) {
            0 => 0,
            1 => rng.between(1, 1025),
            2..=5 => rng.between(1, 64 << 10),
            _ => rng.between(1, 128) * BLOCK,
        };
        let source_align = rng.pick(&[1, 1, 512, 4096]);
        let source = limits(rng, len, source_align);
        let target_align = rng.pick(&[1, 512, 512, 4096]);
        let mut target = limits(rng, len, target_align);
        if !rng.one_in(4) {
            let align = rng.pick(&[1, 512, 2048, 4096]);
            let max = rng.pick(&[4096, 10_000, 1 << 40]).max(u64::from(align));
            target.write_zeroes = Some(RangeLimits { align, max });
            target.cheap_zeroes = !rng.one_in(3);
        }
        if rng.one_in(2) {
            let align = rng.pick(&[1, 512, 4096]);
            let max = rng.pick(&[4096, 1 << 40]);
            target.discard = Some(RangeLimits { align, max });
        }
        if rng.one_in(3) {
            let cluster = rng.pick(&[2048u32, 4096, 16 << 10]);
            target.cluster = Some(cluster);
            target.fills_clusters = rng.one_in(2);
            target.max_transfer = target.max_transfer.max(cluster);
        }
        let mut source = source;
        source.max_transfer = source.max_transfer.max(16 << 10);

        let mut options = MirrorOptions::default();
        options.job.id = Some("sim".to_owned());
        options.sync = match rng.below(4) {
            0 => MirrorSync::Top,
            1 => MirrorSync::None,
            _ => MirrorSync::Full,
        };
        options.granularity = Granularity::from_bytes(rng.pick(&[512, 512, 1024, 4096, 8192]));
        options.workers = rng.pick(&[1, 2, 3, 8, 16]);
        options.chunk_max = rng.pick(&[512, 1000, 4096, 16 << 10, 1 << 20]);
        options.buf_size = rng.pick(&[1, 4096, 32 << 10, 1 << 20]);
        options.unmap = rng.pick(&[Unmap::Allowed, Unmap::Allowed, Unmap::Forbidden]);
        options.job.auto_finalize = !rng.one_in(5);
        options.job.auto_dismiss = rng.one_in(2);
        let policies = [
            OnError::Report,
            OnError::Ignore,
            OnError::Stop,
            OnError::Enospc,
        ];
        options.job.on_source_error = rng.pick(&policies);
        options.job.on_target_error = rng.pick(&policies);
        if rng.one_in(6) {
            options.job.speed = rng.between(100_000, 10_000_000);
        }
        if rng.one_in(4) {
            let grace = Duration::from_micros(rng.below(2000));
            options.job.cancel_grace = Some(grace);
        }

        let mut asks = vec![(PEACE, Asking::MakePeace)];
        let horizon = rng.pick(&[1_000, 5_000, 20_000]);
        for _ in 0..rng.pick(&[0, 0, 2, 6]) {
            let at = rng.below(horizon);
            let ask = match rng.below(7) {
                0 | 1 => Asking::Pause,
                2 => Asking::Hold,
                3 => Asking::Speed(rng.pick(&[0, 1_000_000, 50_000_000])),
                4 => Asking::Policy(rng.pick(&policies)),
                _ => Asking::DropDriver,
            };
            asks.push((at, ask));
            match ask {
                Asking::Pause => asks.push((at + rng.below(horizon), Asking::Resume)),
                Asking::Hold => asks.push((at + rng.below(horizon), Asking::Release)),
                _ => {}
            }
        }
        if rng.one_in(8) {
            let cancel = rng.pick(&[Asking::SoftCancel, Asking::ForceCancel]);
            asks.push((rng.below(horizon), cancel));
        }
        if options.sync == MirrorSync::None {
            // Recording must start at the very first moment, for that is what the target is made from.
            asks.iter_mut().for_each(|(at, _)| *at += 10);
        }
        Self {
            options,
            source,
            target,
            threads: rng.below(5) as usize,
            asks,
            uses_queue: rng.one_in(2),
            declines: rng.pick(&[0, 0, 0, 1, 2]),
            end: rng.pick(&[
                Asking::Complete,
                Asking::Complete,
                Asking::Complete,
                Asking::SoftCancel,
                Asking::ForceCancel,
            ]),
            ready_for: rng.pick(&[0, 100, 3_000, 30_000]),
            may_fail: false,
            bits: None,
            stores: false,
            zeroes_often: false,
            stalls: false,
        }
    }

    /// Has the job go by a bitmap, now and then.
    fn add_bitmap(&mut self, rng: &mut Rng) {
        if self.options.sync == MirrorSync::None || !rng.one_in(3) {
            return;
        }
        let granularity = Granularity::from_bytes(rng.pick(&[512, 1024, 4096, 16 << 10]));
        let mut bits = HBitmap::new(self.source.len, granularity.unwrap()).unwrap();
        let len = self.source.len;
        for _ in 0..rng.pick(&[0, 1, 3, 10]) {
            if let Some(start) = len.checked_sub(1).map(|last| rng.between(0, last)) {
                let end = start + rng.between(1, (len - start).min(10_000));
                bits.set(start..end).unwrap();
            }
        }
        self.go_by(rng, bits);
    }

    /// Has writes go to the target at once, now and then, or for a while.
    fn add_mode(&mut self, rng: &mut Rng) {
        if rng.one_in(2) {
            return;
        }
        let mut adaptive = Adaptive::default();
        adaptive.window = Duration::from_micros(rng.pick(&[1_000, 5_000]));
        adaptive.latency_max = Duration::from_micros(rng.pick(&[10, 200, 5_000]));
        adaptive.may_exceed = rng.one_in(2);
        let modes = [
            CopyMode::Background,
            CopyMode::WriteBlocking,
            CopyMode::Adaptive(adaptive),
        ];
        self.options.copy_mode = rng.pick(&modes);
        let horizon = rng.pick(&[500, 3_000, 20_000]);
        for _ in 0..rng.pick(&[0, 1, 1, 4]) {
            let ask = Asking::Mode(rng.pick(&modes));
            self.asks.push((10 + rng.below(horizon), ask));
        }
    }

    /// Has zeroes looked for, or known, now and then.
    fn add_zeroes(&mut self, rng: &mut Rng) {
        self.options.detect_zeroes = rng.one_in(3);
        if rng.one_in(3) {
            self.zero_often();
        }
        let starts_anew = self.options.sync == MirrorSync::Full && self.bits.is_none();
        if starts_anew && rng.one_in(3) {
            self.options.target_holds = TargetHolds::Zeroes;
        }
    }

    /// Has the target damaged and compared, or be an older copy, now and then.
    fn add_verify(&mut self, rng: &mut Rng) {
        if rng.one_in(2) {
            return;
        }
        self.target.compare = Some(CompareBy::Reading);
        let starts_anew = self.options.sync == MirrorSync::Full && self.bits.is_none();
        if starts_anew && rng.one_in(3) {
            self.options.target_holds = TargetHolds::OlderCopy;
        }
        let horizon = rng.pick(&[1_000, 20_000]);
        for _ in 0..rng.below(3) {
            self.asks.push((10 + rng.below(horizon), Asking::Plant));
        }
    }

    fn zero_often(&mut self) {
        self.zeroes_often = true;
        let any = RangeLimits {
            align: 512,
            max: 1 << 40,
        };
        self.target.write_zeroes.get_or_insert(any);
        self.target.cheap_zeroes = false;
    }

    /// Has checkpoints taken, and the process end at some time.
    fn die_at(&mut self, rng: &mut Rng) {
        self.stores = true;
        let horizon = rng.pick(&[500, 3_000, 20_000]);
        for _ in 0..rng.below(4) {
            self.asks
                .push((10 + rng.below(horizon), Asking::Checkpoint));
        }
        if !rng.one_in(3) {
            self.asks.push((10 + rng.below(2 * horizon), Asking::Die));
        }
    }

    fn go_by(&mut self, rng: &mut Rng, bits: HBitmap) {
        self.options.bitmap = Some(BITMAP.to_owned());
        self.options.bitmap_mode =
            Some(rng.pick(&[BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always]));
        self.bits = Some(bits);
    }

    /// The bitmaps of a new process: the job's, if it goes by one, and those by which that one is judged.
    fn bitmaps(&self, node: &Node) {
        let mut states = Vec::new();
        if self.stores {
            let granularity = Granularity::from_bytes(1024).unwrap();
            let clean = || HBitmap::new(self.source.len, granularity).unwrap();
            // Until there is a newer checkpoint, what was written since the old one stays known.
            let since = self.bits.clone().unwrap_or_else(clean);
            states.push(BitmapState::new(SINCE, since));
        }
        for name in [BITMAP, ALL, AFTER] {
            let bits = self.bits.clone();
            states.extend(bits.map(|bits| BitmapState::new(name, bits)));
        }
        states.iter_mut().for_each(|state| state.is_enabled = true);
        let guard = node.quiesce().try_guard().expect("nobody writes yet");
        node.bitmaps().import_state(&guard, states).unwrap();
    }

    fn faults(&mut self, rng: &mut Rng) -> [Faults; 2] {
        let none = Faults::default();
        if !rng.one_in(2) {
            return [none; 2];
        }
        let mut one = |is_source: bool| Faults {
            read: if is_source { rng.pick(&[0, 5, 50]) } else { 0 },
            write: rng.pick(&[0, 5, 50]),
            zero: rng.pick(&[0, 5, 50]),
            flush: rng.pick(&[0, 0, 2, 5]),
            status: rng.pick(&[0, 0, 5]),
            is_no_space: rng.one_in(2),
            spares_guests: false,
            until: PEACE / 2,
        };
        self.may_fail = true;
        [one(true), one(false)]
    }
}

/// What differs on the target, and is to be found.
#[derive(Default)]
struct Planted {
    /// Blocks that nobody knows of, but a verification that has not come to its end.
    damaged: BTreeSet<usize>,
    /// Those of them that were there before the last verification that was cut short, and may be mended.
    stale: BTreeSet<usize>,
    /// What was damaged and not told when the last checkpoint was taken, and what was damaged since: that does not
    /// know of it.
    since: BTreeSet<usize>,
    /// Blocks of an older copy that differ.
    older: BTreeSet<usize>,
    /// What was told, in bytes.
    told: Vec<ByteRange>,
    /// How much the guest had written when it was planted.
    recorded: usize,
    granularity: u64,
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

/// The disks, as they are known to those who store checkpoints.
fn id_of(generation: u64) -> CheckpointId {
    CheckpointId {
        source: [1; 16],
        target: [2; 16],
        generation,
    }
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

    fn is_older(&self) -> bool {
        self.plan.options.target_holds == TargetHolds::OlderCopy
    }

    fn is_verifying(&self) -> bool {
        let result = self.job.query().verification;
        result.is_some_and(|result| result.state == Verified::Running)
    }

    /// Something damages the target where the job believes that all is well, and it is asked to look.
    fn plant(&mut self, mirror: &Mirror) {
        let is_ready = self.job.query().status == Status::Ready;
        let Some(left) = mirror.left_dirty().filter(|_| is_ready) else {
            return;
        };
        if self.guests.current != SOURCE || self.is_verifying() || self.job.verify().is_err() {
            return;
        }
        let mut world = self.world.borrow_mut();
        self.planted.recorded = self.guests.recorded.len();
        self.planted.granularity = mirror.granularity().bytes();
        let damaged = std::mem::take(&mut self.planted.damaged);
        self.planted.stale.extend(damaged);
        for _ in 0..world.rng.between(1, 4) {
            let blocks = world.disks[TARGET].blocks.len() as u64;
            if blocks == 0 {
                break;
            }
            let block = world.rng.below(blocks) as usize;
            let start = block as u64 * BLOCK;
            // What is written along with what is dirty would mend it unseen.
            let unit = self.unit_of(block);
            let mut others = unit.start() / BLOCK..(unit.end() / BLOCK).min(blocks);
            let is_known =
                others.any(|block| self.guests.is_busy(block as usize)) || left.any_dirty_in(unit);
            let is_undefined =
                world.disks[SOURCE].blocks[block].content == blockjob::Content::Undefined;
            if is_known || is_undefined || self.planted.stale.contains(&block) {
                continue;
            }
            let end = (start + BLOCK).min(world.disks[TARGET].limits.len);
            let at = start as usize..end as usize;
            // No byte is the right one.
            let wrong = world.disks[SOURCE].bytes[at.clone()].iter();
            let wrong: Vec<u8> = wrong.map(|byte| byte ^ 0x55).collect();
            let target = &mut world.disks[TARGET];
            target.bytes[at].copy_from_slice(&wrong);
            target.blocks[block].content = blockjob::Content::Data;
            self.planted.damaged.insert(block);
            self.planted.since.insert(block);
        }
    }

    fn granule_of(&self, block: usize) -> ByteRange {
        let start = block as u64 * BLOCK;
        let start = start - start % self.planted.granularity;
        (start..start + self.planted.granularity.max(BLOCK)).into()
    }

    /// What is copied at once with a block, if the guest writes to it.
    fn unit_of(&self, block: usize) -> ByteRange {
        let target = &self.plan.target;
        let cluster = target.cluster.filter(|_| target.fills_clusters);
        let unit = self
            .planted
            .granularity
            .max(self.plan.source.request_align.into())
            .max(target.request_align.into())
            .max(cluster.map_or(BLOCK, u64::from));
        let start = block as u64 * BLOCK;
        let start = start - start % unit;
        (start..start + unit).into()
    }

    /// Whether a block may have been damaged without anybody's knowing.
    fn is_damaged(&self, block: usize) -> bool {
        self.planted.damaged.contains(&block) || self.planted.stale.contains(&block)
    }

    /// It is told to differ: so it does at this moment, and no guest write has to do with it.
    fn differs(&mut self, range: ByteRange) {
        let world = self.world.borrow();
        let granularity = self.planted.granularity;
        let mut start = range.start();
        assert_eq!(start % granularity, 0);
        while start < range.end() {
            let granule = ByteRange::from(start..start + granularity);
            let is_right = (start / BLOCK..granule.end().div_ceil(BLOCK)).any(|block| {
                let block = block as usize;
                let blocks = &world.disks[SOURCE].blocks;
                let is_undefined = blocks
                    .get(block)
                    .is_some_and(|block| block.content == blockjob::Content::Undefined);
                let is_planted = self.is_damaged(block) || self.planted.older.contains(&block);
                is_undefined || (is_planted && !is_equal(&world.disks, block))
            });
            assert!(is_right, "{granule} is told to differ and does not");
            start = granule.end();
        }
        drop(world);
        self.planted.told.push(range);
    }

    /// All was compared: all that was planted is found, but for what the guest has written to.
    fn verified(&mut self, state: Verified) {
        let recorded = &self.guests.recorded[self.planted.recorded..];
        match state {
            Verified::Running => panic!("that is no end"),
            Verified::Cut => {
                let damaged = std::mem::take(&mut self.planted.damaged);
                self.planted.stale.extend(damaged);
            }
            Verified::Whole => {
                for &block in self.planted.damaged.iter().chain(&self.planted.older) {
                    let granule = self.granule_of(block);
                    let is_told = self.planted.told.iter().any(|told| told.overlaps(granule));
                    let written = self.unit_of(block);
                    let blocks = written.start() / BLOCK..written.end() / BLOCK;
                    let is_written = recorded.iter().any(|range| range.overlaps(written))
                        || blocks.clone().any(|block| {
                            let blocks = self.world.borrow().disks[SOURCE].blocks.len();
                            (block as usize) < blocks && self.guests.is_busy(block as usize)
                        });
                    assert!(
                        is_told || is_written,
                        "block {block} was damaged and nobody has told"
                    );
                    self.report.found += u64::from(is_told);
                }
                self.planted.damaged.clear();
                self.planted.stale.clear();
                self.report.verified += 1;
            }
        }
        self.planted.older.clear();
        self.planted.told.clear();
    }

    /// A job that says it stands still has nothing in flight.
    fn check_stillness(&mut self) {
        let Some(Event::Status(Status::Paused | Status::Standby)) = self
            .events
            .iter()
            .rfind(|event| matches!(event, Event::Status(_)))
        else {
            return;
        };
        self.report.paused = true;
        let world = self.world.borrow();
        for disk in &world.disks {
            for request in disk.requests.values() {
                let is_jobs = !matches!(request.owner, Owner::Guest(_));
                assert!(
                    !is_jobs || request.is_answered || !request.ask.writes(),
                    "{request:?} is in flight while the job stands still"
                );
            }
        }
    }

    /// The disks are equal, the target is flushed, and the guest is held.
    fn check_switch(&self) {
        self.guests.check(&self.world.borrow());
        assert!(
            !self.guests.is_writing(),
            "a guest write is in flight at the switch"
        );
        let world = self.world.borrow();
        let target = &world.disks[TARGET];
        assert_eq!(
            target.written, target.flushed,
            "writes to the target are not flushed"
        );
        for request in target.requests.values() {
            assert!(
                request.is_answered || !request.ask.writes(),
                "{request:?} is in flight at the switch"
            );
        }
        for block in 0..target.blocks.len() {
            assert!(
                is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs at the switch"
            );
        }
    }

    /// Whatever differs is known to differ.
    fn check_coverage(&mut self, mirror: &Mirror) {
        mirror.check_invariants();
        if self.guests.current != SOURCE {
            return;
        }
        let is_synced = mirror.is_actively_synced();
        self.report.was_synced |= is_synced;
        assert!(
            !(is_synced && self.guests.is_writing_alone()),
            "a write is in flight that the target will not have"
        );
        let Some(left) = mirror.left_dirty() else {
            return;
        };
        let world = self.world.borrow();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let start = block as u64 * BLOCK;
            let is_busy = self.guests.is_busy(block);
            let is_known = is_busy || left.any_dirty_in(start..start + BLOCK);
            assert!(
                is_known || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs and nobody knows: {left:?}"
            );
            assert!(
                !is_synced || is_busy || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs of a target that is synced"
            );
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

    /// What is damaged still is not the job's fault, nor the guest's.
    fn mend(&mut self) {
        let mut world = self.world.borrow_mut();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let is_defined =
                world.disks[SOURCE].blocks[block].content != blockjob::Content::Undefined;
            if self.is_damaged(block) && is_defined {
                let start = block * BLOCK as usize;
                let end = (start + BLOCK as usize).min(world.disks[SOURCE].bytes.len());
                let bytes = world.disks[SOURCE].bytes[start..end].to_vec();
                world.disks[TARGET].bytes[start..end].copy_from_slice(&bytes);
            }
        }
    }

    fn bits_of(&self, name: &str) -> HBitmap {
        let bits = self.node.bitmaps().snapshot(name, SnapshotOf::Bitmap);
        bits.expect("nobody has it any more")
    }

    /// The bitmap has what its mode says. `left` is what the target may lack, if that is known, at the very
    /// moment of the end.
    fn check_bitmap(&mut self, is_good: bool, left: Option<&HBitmap>) {
        let Some(mode) = self.plan.options.bitmap_mode else {
            return;
        };
        self.report.bitmap = Some((mode, is_good));
        let bits = self.bits_of(BITMAP);
        if is_good && !self.report.switched {
            // Nobody has written since the instant of which the target is a copy.
            self.node.bitmaps().clear(AFTER).unwrap();
        }
        let expected = match (mode, is_good) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => Some(self.bits_of(ALL)),
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => Some(self.bits_of(AFTER)),
            (BitmapMode::Always, false) => left.cloned(),
        };
        if let Some(expected) = expected {
            let is_exact = bits == expected || bits.granularity() != expected.granularity();
            assert!(
                is_exact,
                "the bitmap with {mode:?} has {bits:?} after {is_good}, and not {expected:?}"
            );
        }
        // After a failure the other modes are about what is in the bitmap. The target may lack more: what was
        // left by a checkpoint, and what was written along with what is dirty to fill a cluster.
        self.is_told_all = is_good
            || match mode {
                BitmapMode::Never | BitmapMode::OnSuccess => {
                    let is_damaged = self.report.found > 0;
                    !self.is_resumed && !self.plan.target.fills_clusters && !is_damaged
                }
                BitmapMode::Always => !self.is_resumed || left.is_some(),
            };
        if self.is_told_all {
            self.check_known(&bits);
        }
    }

    /// Whatever differs is dirty.
    fn check_known(&self, bits: &HBitmap) {
        let world = self.world.borrow();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let start = block as u64 * BLOCK;
            let is_known = self.guests.is_busy(block) || bits.any_dirty_in(start..start + BLOCK);
            assert!(
                is_known || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs and is clean in the bitmap: {bits:?}"
            );
        }
    }

    /// The same, when all is over and the guest has gone on for a while.
    fn check_bitmap_later(&self) {
        let Some((mode, is_good)) = self.report.bitmap else {
            return;
        };
        let bits = self.bits_of(BITMAP);
        match (mode, is_good) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => {
                assert!(bits == self.bits_of(ALL), "{mode:?}, {is_good}, later");
            }
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {
                assert!(bits == self.bits_of(AFTER), "{mode:?}, later");
            }
            (BitmapMode::Always, false) => {}
        }
        if self.is_told_all {
            self.check_known(&bits);
        }
    }

    /// The caller stores what is left, and has what is written from now on recorded.
    fn take_checkpoint(&mut self, mirror: &Mirror) {
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

    /// The process ends with the job in its midst; what was requested of the disks goes on.
    fn die(&mut self, mirror: Mirror) {
        let left = mirror.left_dirty();
        drop(mirror);
        self.died(left);
    }

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
        self.check_events(result.is_ok());
        self.check_bitmap(result.is_ok(), left.as_ref());
    }

    fn check_events(&self, is_good: bool) {
        let mut status = None;
        let (mut ends, mut readies) = (0, 0);
        for event in &self.events {
            match event {
                Event::Status(next) => {
                    let is_legal = match status {
                        None => *next == Status::Created,
                        Some(status) => Status::may_become(status, *next),
                    };
                    assert!(is_legal, "{status:?} → {next:?}");
                    status = Some(*next);
                }
                Event::Ready { .. } => readies += 1,
                Event::Completed { error, .. } => {
                    assert_eq!(error.is_none(), is_good);
                    ends += 1;
                }
                Event::Cancelled { .. } => {
                    assert!(!is_good);
                    ends += 1;
                }
                _ => {}
            }
        }
        let was_started = self
            .events
            .iter()
            .any(|event| matches!(event, Event::Status(Status::Running)));
        assert_eq!(ends, usize::from(was_started), "exactly one end is told");
        assert!(readies <= 1, "ready is told once");
        let last = match self.plan.options.job.auto_dismiss || !was_started {
            true => Status::Null,
            false => Status::Concluded,
        };
        assert_eq!(status, Some(last));
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

/// One process after another, until the job succeeds.
fn run_chain(seed: u64) -> Report {
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

fn drive(sim: &mut Sim, mirror: Mirror) {
    if sim.plan.uses_queue {
        run_queue(sim, mirror);
    } else {
        run_futures(sim, mirror);
    }
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
    let world = World::new(rng, vec![source, target]);
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

/// Drives the job with futures, which are dropped now and then.
fn run_futures(sim: &mut Sim, mut mirror: Mirror) {
    let device = |disk| SimDevice {
        world: Rc::clone(&sim.world),
        disk,
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
            let run = Several::new(members, 60, rng, |_| crew.run());
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

fn env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Runs a seed of a test and says how to run it again if it fails.
fn run_or_explain(seed: u64, run: fn(u64) -> Report, test: &str) -> Report {
    if std::env::var_os("BLOCKJOB_VERBOSE").is_some() {
        eprintln!("seed {seed}");
    }
    catch_unwind(AssertUnwindSafe(|| run(seed))).unwrap_or_else(|panic| {
        eprintln!(
            "seed {seed} failed; again with:\n  \
             BLOCKJOB_SEED={seed} BLOCKJOB_SEEDS=1 cargo test --test mirror_sim {test}"
        );
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn every_seed_keeps_the_promises() {
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let count = env("BLOCKJOB_SEEDS").unwrap_or(4_000);
    println!("seeds {first}..{}", first + count);
    let started = std::time::Instant::now();
    let test = "every_seed_keeps_the_promises";
    let run_it = |seed| run_or_explain(seed, run, test);
    let reports: Vec<Report> = (first..first + count).map(run_it).collect();
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
    if count >= 1_000 {
        // A simulation that never comes to a place shows nothing about it.
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / count as f64;
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
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let count = env("BLOCKJOB_SEEDS").map_or(800, |seeds| seeds.div_ceil(4));
    println!("seeds {first}..{}", first + count);
    let test = "every_seed_of_active_writes_keeps_the_promises";
    let run_it = |seed| run_or_explain(seed, run_active, test);
    let reports: Vec<Report> = (first..first + count).map(run_it).collect();
    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    let writes: u64 = reports.iter().map(|report| report.copied).sum();
    println!(
        "{writes} active writes; {} synced, {} switched, {} failed, {} with dropped drivers",
        count_of(|r| r.was_synced),
        count_of(|r| r.switched),
        count_of(|r| r.failed),
        count_of(|r| r.drops > 0),
    );
    if count >= 800 {
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / count as f64;
        assert!(share(|r| r.copied > 10) > 0.12);
        assert!(share(|r| r.was_synced) > 0.2);
    }
}

#[test]
fn every_chain_of_processes_keeps_the_promises() {
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let count = env("BLOCKJOB_SEEDS").map_or(1_000, |seeds| seeds.div_ceil(4));
    println!("seeds {first}..{}", first + count);
    let test = "every_chain_of_processes_keeps_the_promises";
    let run_it = |seed| run_or_explain(seed, run_chain, test);
    let reports: Vec<Report> = (first..first + count).map(run_it).collect();
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
    if count >= 1_000 {
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / count as f64;
        assert!(share(|r| r.resumed > 0) > 0.2);
        assert!(share(|r| r.resumed > 1) > 0.05);
        assert!(share(|r| r.resumed > 0 && r.switched) > 0.1);
        assert!(share(|r| r.refused > 0) > 0.1);
        assert!(share(|r| r.resumed > 0 && r.found > 0) > 0.01);
    }
}

#[test]
fn every_seed_finds_what_differs() {
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let count = env("BLOCKJOB_SEEDS").map_or(1_000, |seeds| seeds.div_ceil(4));
    println!("seeds {first}..{}", first + count);
    let test = "every_seed_finds_what_differs";
    let run_it = |seed| run_or_explain(seed, run_verify, test);
    let reports: Vec<Report> = (first..first + count).map(run_it).collect();
    let sum = |what: fn(&Report) -> u64| reports.iter().map(what).sum::<u64>();
    println!(
        "{} verifications, {} blocks found to differ; {} switched",
        sum(|r| r.verified),
        sum(|r| r.found),
        sum(|r| u64::from(r.switched)),
    );
    if count >= 1_000 {
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

/// Breaks each invariant on purpose: the simulation must notice, within so many seeds.
#[cfg(debug_assertions)]
mod sabotage {
    use super::*;
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    /// What is broken, and the number of seeds within which it must be noticed: several times the number
    /// that it took when this was written.
    const BROKEN: &[(Sabotage, u64)] = &[
        (Sabotage::ClearAfterCopy, 100),
        (Sabotage::ClearAfterLook, 100),
        (Sabotage::ClaimTwice, 100),
        (Sabotage::WidenAfterCheck, 3000),
        (Sabotage::ForgetFailed, 200),
        (Sabotage::DoNotSettle, 2000),
        (Sabotage::ForgetPlanned, 400),
        (Sabotage::TrustCleanBitmap, 50),
        (Sabotage::AttachWithoutQuiesce, 1500),
        (Sabotage::CopyWhileScanning, 1500),
        (Sabotage::ReadyWithoutFlush, 50),
        (Sabotage::SwitchWithoutRecheck, 100),
        (Sabotage::SwitchWithoutFlush, 100),
        (Sabotage::CopyAfterSwitch, 500),
        (Sabotage::RecordAtBegin, 200),
        (Sabotage::ForgetDropped, 100),
        (Sabotage::DoNotWaitForWriters, 400),
        (Sabotage::ForgetClaimed, 200),
        (Sabotage::KeepWritesOfJob, 200),
        (Sabotage::InstantAtEnd, 400),
        (Sabotage::CleanAfterFailure, 400),
        (Sabotage::ForgetInFlight, 400),
    ];

    /// The same, with writes that go to the target as well.
    const BROKEN_WHEN_ACTIVE: &[(Sabotage, u64)] = &[
        (Sabotage::WriteOverClaims, 100),
        (Sabotage::ClaimOverWrites, 400),
        (Sabotage::EndClaimEarly, 1000),
        (Sabotage::WriteIntoDirty, 200),
        (Sabotage::ForgetFailedSource, 200),
        (Sabotage::ForgetFailedTarget, 200),
        (Sabotage::ForgetActiveWrites, 600),
    ];

    /// The same, with what is compared.
    const BROKEN_IN_DOUBT: &[(Sabotage, u64)] = &[
        (Sabotage::ForgetDoubt, 400),
        (Sabotage::TellRaces, 1500),
        (Sabotage::TellOnly, 200),
        (Sabotage::KeepSuspicion, 2000),
        (Sabotage::ReadyInDoubt, 100),
    ];

    /// The same, where zeroes are written to what is compared.
    const BROKEN_IN_DOUBT_OF_ZEROES: &[(Sabotage, u64)] = &[(Sabotage::TrustDoubtful, 2000)];

    /// The same, with many zeroes.
    const BROKEN_WITH_ZEROES: &[(Sabotage, u64)] = &[
        (Sabotage::KeepZeroes, 100),
        (Sabotage::KeepZeroesOfFailed, 500),
        (Sabotage::TrustZeroesAtOnce, 200),
        (Sabotage::IgnoreActiveWrites, 200),
    ];

    /// The same, by chains of processes.
    const BROKEN_IN_CHAINS: &[(Sabotage, u64)] = &[
        (Sabotage::CheckpointForgetsClaims, 400),
        (Sabotage::ResumeAnyDisk, 200),
        (Sabotage::ResumeAnyGeneration, 400),
    ];

    fn notices(run: fn(u64) -> Report, seed: u64) -> Option<String> {
        let panic = catch_unwind(|| run(seed)).err()?;
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap_or(&"?").to_string());
        // What is broken here loses data; that it may also keep a job from its end is not the point.
        (!text.starts_with("stalled")).then_some(text)
    }

    #[test]
    fn every_broken_invariant_is_noticed() {
        // Panics are what is wanted here.
        let hook = std::panic::take_hook();
        let here = std::thread::current().id();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() != here {
                hook(info);
            }
        }));
        let mut missed = Vec::new();
        let all = BROKEN
            .iter()
            .map(|broken| (broken, run as fn(u64) -> Report));
        let chains = BROKEN_IN_CHAINS
            .iter()
            .map(|broken| (broken, run_chain as _));
        let active = BROKEN_WHEN_ACTIVE
            .iter()
            .map(|broken| (broken, run_active as _));
        let zeroes = BROKEN_WITH_ZEROES
            .iter()
            .map(|broken| (broken, run_zeroes as _));
        let doubts = BROKEN_IN_DOUBT
            .iter()
            .map(|broken| (broken, run_verify as _));
        let doubted = BROKEN_IN_DOUBT_OF_ZEROES
            .iter()
            .map(|broken| (broken, run_verify_zeroes as _));
        let all = all.chain(active).chain(chains).chain(zeroes).chain(doubts);
        let all = all.chain(doubted);
        for (&(sabotage, seeds), run) in all {
            break_on_this_thread(Some(sabotage));
            let noticed = (0..seeds).find_map(|seed| Some((seed, notices(run, seed)?)));
            break_on_this_thread(None);
            match noticed {
                Some((seed, how)) => {
                    let how: String = how.lines().next().unwrap_or("").chars().take(90).collect();
                    println!("{sabotage:?}: noticed by seed {seed}: {how}");
                }
                None => {
                    println!("{sabotage:?}: not noticed");
                    missed.push(sabotage);
                }
            }
        }
        assert!(missed.is_empty(), "not noticed: {missed:?}");
    }
}
