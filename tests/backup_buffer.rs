//! A backup with a buffer, in a small world of its own: devices that answer in any order, a guest that writes
//! all the while, requests that fail, drivers that are dropped with requests in flight.
//!
//! A block is 16 KiB and its content one number, so that a step costs next to nothing. Judged by:
//!
//! 1. After success the target holds what the source held at the instant.
//! 2. The guest's data is on the source.
//! 3. Nothing is left in the buffer then.
//! 4. With room in the buffer a guest never waits for the target.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run.

mod sim;

use std::task::Waker;
use std::time::Duration;

use blockjob::sabotage::Sabotage;
use blockjob::{
    Backup, BackupBuffer, BackupOptions, Begin, ByteRange, Content, Extent, Limits, Node, OnError,
    Op, OpKind, Outcome, OwnedTicket, PendingWrite, RangeLimits, Side, Step,
};

use sim::rng::Rng;

const BLOCK: u64 = 16 << 10;
const CLUSTER: u64 = 64 << 10;

type Disk = Vec<u64>;

/// One request of the job, half-way or not begun.
struct Flight {
    op: Option<Op>,
    kind: OpKind,
    data: Option<Vec<u64>>,
}

struct World {
    rng: Rng,
    len: u64,
    bytes_max: u64,
    source: Disk,
    buffer: Disk,
    target: Disk,
    backup: Backup,
    node: Node,
    now: Duration,
    flights: Vec<Flight>,
    /// Requests whose driver was dropped.
    zombies: Vec<Flight>,
    waiting: Vec<PendingWrite<std::sync::Arc<blockjob::Lane>>>,
    writing: Vec<OwnedTicket>,
    version: u64,
    /// Whether the target answers.
    has_target: bool,
    fails: bool,
}

fn blocks(range: ByteRange) -> std::ops::Range<usize> {
    (range.start() / BLOCK) as usize..range.end().div_ceil(BLOCK) as usize
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let len = rng.between(1, 24) * CLUSTER + rng.below(4) * BLOCK;
        let node = Node::new(len);
        let mut buffer = BackupBuffer::new({
            let mut limits = Limits::new(len);
            limits.discard = Some(RangeLimits {
                align: 1,
                max: u64::MAX,
            });
            limits
        });
        if rng.one_in(2) {
            buffer.bytes_max = rng.between(1, 6) * CLUSTER;
        }
        let mut options = BackupOptions::default();
        options.job.id = Some("backup".to_owned());
        options.job.on_source_error = OnError::Ignore;
        options.job.on_target_error = OnError::Ignore;
        options.on_cbw_error = blockjob::OnCbwError::BreakGuestWrite;
        options.cbw_timeout = None;
        options.workers = rng.between(1, 4) as usize;
        options.chunk_max = rng.pick(&[CLUSTER, 4 * CLUSTER]);
        options.buffer = Some(buffer);
        let backup = Backup::new(&node, Limits::new(len), Limits::new(len), options).unwrap();
        backup.job().start().unwrap();
        let disk = |start: u64| {
            (0..len.div_ceil(BLOCK))
                .map(|block| start + block)
                .collect()
        };
        Self {
            len,
            bytes_max: buffer.bytes_max,
            source: disk(1_000),
            buffer: disk(7_000_000),
            target: disk(9_000_000),
            backup,
            node,
            now: Duration::ZERO,
            flights: Vec::new(),
            zombies: Vec::new(),
            waiting: Vec::new(),
            writing: Vec::new(),
            version: 1_000_000,
            has_target: true,
            fails: rng.one_in(2),
            rng,
        }
    }

    /// Does one half of a request; the whole of it is done when this says what came of it.
    fn advance(&mut self, flight: &mut Flight) -> Option<Outcome> {
        let failed = |side| {
            Some(Outcome::Failed {
                side,
                error: std::io::ErrorKind::Other.into(),
            })
        };
        let fails = self.fails && self.rng.one_in(12);
        let (from, to, range) = match flight.kind {
            OpKind::Copy(range) => (Side::Source, Side::Target, range),
            OpKind::Save(range) => (Side::Source, Side::Buffer, range),
            OpKind::CopySaved(range) => (Side::Buffer, Side::Target, range),
            OpKind::DiscardSaved(range) => {
                self.buffer[blocks(range)].fill(0);
                return Some(Outcome::Done);
            }
            OpKind::Status(range) => {
                return Some(Outcome::Status(Extent {
                    len: range.len(),
                    content: Content::Data,
                    in_top: true,
                }));
            }
            OpKind::Flush if !self.has_target => return None,
            OpKind::Flush if fails => return failed(Side::Target),
            OpKind::Flush | OpKind::CancelInFlight => return Some(Outcome::Done),
            OpKind::Settle => {
                let is_settled = !self
                    .zombies
                    .iter()
                    .any(|zombie| zombie.kind.writes_target());
                return is_settled.then_some(Outcome::Done);
            }
            OpKind::Zero(..) | OpKind::Discard(_) => unreachable!("not offered"),
        };
        match flight.data.take() {
            None if fails => failed(from),
            None => {
                let disk = match from {
                    Side::Source => &self.source,
                    Side::Buffer | Side::Target => &self.buffer,
                };
                flight.data = Some(disk[blocks(range)].to_vec());
                None
            }
            data if to == Side::Target && !self.has_target => {
                flight.data = data;
                None
            }
            Some(_) if fails => failed(to),
            Some(data) => {
                let disk = match to {
                    Side::Buffer => &mut self.buffer,
                    Side::Target | Side::Source => &mut self.target,
                };
                disk[blocks(range)].copy_from_slice(&data);
                Some(Outcome::Done)
            }
        }
    }

    fn poll(&mut self) -> Option<Result<(), blockjob::JobError>> {
        loop {
            match self.backup.poll(self.now, Waker::noop()) {
                Step::Op(op) => self.flights.push(Flight {
                    kind: op.kind(),
                    op: Some(op),
                    data: None,
                }),
                Step::Wait { until } => {
                    if let (true, Some(until)) = (self.flights.is_empty(), until) {
                        self.now = self.now.max(until);
                    }
                    return None;
                }
                Step::Done(result) => return Some(result),
                Step::Switch(_) | Step::SwitchBack(_) => unreachable!("it is a backup"),
            }
        }
    }

    fn guest_begins(&mut self) {
        let start = self.rng.below(self.len);
        let len = self.rng.between(1, 3 * CLUSTER).min(self.len - start);
        match self.node.begin_write_owned((start..start + len).into()) {
            Begin::Go(ticket) => self.writing.push(ticket),
            Begin::Wait(pending) => self.waiting.push(pending),
            Begin::Refused(_) => unreachable!("it was not asked before"),
        }
    }

    fn guest_goes_on(&mut self) {
        for mut pending in std::mem::take(&mut self.waiting) {
            match pending.try_begin() {
                Some(Ok(ticket)) => self.writing.push(ticket),
                // Its copy has failed: it may be tried again.
                Some(Err(_)) => {}
                None => self.waiting.push(pending),
            }
        }
        if self.rng.one_in(2) {
            return;
        }
        for ticket in std::mem::take(&mut self.writing) {
            self.version += 1;
            self.source[blocks(ticket.range())].fill(self.version);
            ticket.finish(());
        }
    }

    /// All that can go on does.
    fn job_goes_on(&mut self) {
        let _ = self.poll();
        for mut flight in std::mem::take(&mut self.flights) {
            match self.advance(&mut flight) {
                None => self.flights.push(flight),
                Some(outcome) => {
                    let op = flight.op.take().expect("its driver is there");
                    self.backup.op_done(self.now, op, outcome);
                }
            }
        }
    }

    fn step(&mut self) -> Option<Result<(), blockjob::JobError>> {
        match self.rng.below(10) {
            0 | 1 => {
                if let Some(result) = self.poll() {
                    return Some(result);
                }
            }
            2 | 3 if self.waiting.len() + self.writing.len() < 8 => self.guest_begins(),
            4 => self.guest_goes_on(),
            5 if self.fails && self.rng.one_in(60) => {
                for mut flight in std::mem::take(&mut self.flights) {
                    flight.op = None;
                    self.zombies.push(flight);
                }
                self.backup.ops_lost();
            }
            6 if !self.zombies.is_empty() => {
                let index = self.rng.below(self.zombies.len() as u64) as usize;
                let mut zombie = self.zombies.swap_remove(index);
                // A read that nobody waits for is not followed by a write.
                if zombie.data.is_some() && self.advance(&mut zombie).is_none() {
                    self.zombies.push(zombie);
                }
            }
            _ if !self.flights.is_empty() => {
                let index = self.rng.below(self.flights.len() as u64) as usize;
                let mut flight = self.flights.swap_remove(index);
                match self.advance(&mut flight) {
                    None => self.flights.push(flight),
                    Some(outcome) => {
                        let op = flight.op.take().expect("its driver is there");
                        self.backup.op_done(self.now, op, outcome);
                        self.backup.check_invariants();
                    }
                }
            }
            _ => {}
        }
        None
    }

    /// Runs to the end; what is wrong with it, if anything.
    fn run(mut self) -> Result<u64, String> {
        // The instant: nobody has written yet.
        let _ = self.poll();
        let instant = self.source.clone();
        let mut steps = 0;
        let result = loop {
            if steps > 100_000 {
                return Err("the job does not end".to_owned());
            }
            steps += 1;
            if let Some(result) = self.step() {
                break result;
            }
        };
        result.map_err(|error| error.to_string())?;
        if self.target != instant {
            return Err("the target is not as the source was".to_owned());
        }
        let (left, peak) = self.backup.buffer_bytes();
        if left > 0 {
            return Err(format!("{left} bytes are left in the buffer"));
        }
        self.guest_goes_on();
        match self.waiting.is_empty() {
            true => Ok(peak),
            false => Err("the guest waits for a job that is over".to_owned()),
        }
    }
}

#[test]
fn the_target_is_as_the_source_was() {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let first = number("BLOCKJOB_SEED").unwrap_or(1);
    let seeds = number("BLOCKJOB_SEEDS").unwrap_or(3_000);
    println!("BLOCKJOB_SEED={first} BLOCKJOB_SEEDS={seeds}");
    let mut used = 0;
    for seed in first..first + seeds {
        let peak = World::new(seed).run();
        used += u64::from(peak.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}")) > 0);
    }
    assert!(
        seeds < 100 || used > seeds / 2,
        "the buffer was used in {used} of {seeds}"
    );
}

#[test]
fn with_room_in_the_buffer_a_guest_never_waits_for_the_target() {
    let mut waited = 0;
    for seed in 1..300 {
        let mut world = World::new(seed);
        (world.fails, world.has_target) = (false, false);
        let has_room = world.bytes_max == u64::MAX;
        // As much as it wants is in flight, and stays there.
        for _ in 0..50 {
            world.job_goes_on();
        }
        let whole = ByteRange::from(0..world.len);
        let Begin::Wait(mut pending) = world.node.begin_write_owned(whole) else {
            panic!("seed {seed}: nothing is on the target");
        };
        let is_in = (0..500).any(|_| {
            world.job_goes_on();
            pending.try_begin().is_some()
        });
        assert!(is_in || !has_room, "seed {seed}: it waits for the target");
        waited += u64::from(!is_in);
    }
    assert!(waited > 10, "a buffer that is full is no help");
}

#[test]
#[cfg(debug_assertions)]
fn the_simulation_notices_when_an_invariant_is_broken() {
    for sabotage in [
        Sabotage::SaveUnwanted,
        Sabotage::CopyOverwritten,
        Sabotage::TrustOvertaken,
        Sabotage::ReleaseInFlight,
    ] {
        blockjob::sabotage::break_on_this_thread(Some(sabotage));
        let noticed = (1..2_000).find(|&seed| {
            std::panic::catch_unwind(|| World::new(seed).run().is_err()).unwrap_or(true)
        });
        blockjob::sabotage::break_on_this_thread(None);
        assert!(noticed.is_some(), "{sabotage:?} was not noticed");
    }
}
