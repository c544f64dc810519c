//! A backup with a buffer, or with a frozen view that is read, in a small world of its own: devices that answer
//! in any order, a guest that writes all the while, requests that fail, drivers that are dropped with requests
//! in flight.
//!
//! A block is 16 KiB and its content one number, so that a step costs next to nothing. Judged by:
//!
//! 1. After success the target holds what the source held at the instant.
//! 2. The guest's data is on the source.
//! 3. Nothing is left in the buffer then.
//! 4. What is read of the view is what the source held at the instant, or an error, and an error only where
//!    something was given up or the backup has failed.
//! 5. With room in the buffer a guest never waits for the target.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run.

mod sim;

use std::task::Waker;
use std::time::Duration;

use blockjob::sabotage::Sabotage;
use blockjob::{
    Backup, BackupBuffer, BackupOptions, BackupSync, Begin, ByteRange, Cancel, Content, Extent,
    FrozenRead, Limits, Node, OnCbwError, OnError, Op, OpKind, Outcome, OwnedTicket, PendingWrite,
    RangeLimits, Side, Step, ViewError,
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

/// A read of the view.
struct Reader {
    read: FrozenRead,
    range: ByteRange,
    data: Vec<u64>,
}

/// What beside the target there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Buffer,
    View,
}

struct World {
    rng: Rng,
    readers: Vec<Reader>,
    given_up: Vec<bool>,
    instant: Disk,
    /// Reads that have succeeded.
    has_read: u64,
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
    fn new(seed: u64, place: Place) -> Self {
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
        options.on_cbw_error = OnCbwError::BreakGuestWrite;
        options.cbw_timeout = None;
        options.workers = rng.between(1, 4) as usize;
        options.chunk_max = rng.pick(&[CLUSTER, 4 * CLUSTER]);
        let mut target = Limits::new(len);
        match place {
            Place::Buffer => options.buffer = Some(buffer),
            Place::View => {
                options.view = true;
                if rng.one_in(2) {
                    options.sync = BackupSync::None;
                    target.discard = buffer.limits.discard;
                }
                if rng.one_in(3) {
                    options.on_cbw_error = OnCbwError::BreakSnapshot;
                }
            }
        }
        let backup = Backup::new(&node, Limits::new(len), target, options).unwrap();
        backup.job().start().unwrap();
        let disk = |start: u64| {
            (0..len.div_ceil(BLOCK))
                .map(|block| start + block)
                .collect()
        };
        Self {
            len,
            readers: Vec::new(),
            given_up: vec![false; len.div_ceil(CLUSTER) as usize],
            instant: Vec::new(),
            has_read: 0,
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
            OpKind::GiveUp(range) => {
                self.target[blocks(range)].fill(0);
                return Some(Outcome::Done);
            }
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
            OpKind::CopyCompressed(_)
            | OpKind::CopySavedCompressed(_)
            | OpKind::CopyDetecting(..)
            | OpKind::Compare(..)
            | OpKind::CopyOffloaded(_)
            | OpKind::Zero(..)
            | OpKind::Discard(_)
            | OpKind::DiscardSource(_) => {
                unreachable!("not offered")
            }
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

    fn reader_begins(&mut self) {
        let Some(view) = self.backup.view() else {
            return;
        };
        let start = self.rng.below(self.len) / BLOCK * BLOCK;
        let len = self.rng.between(1, 3 * CLUSTER).min(self.len - start);
        let range = ByteRange::from(start..start + len);
        let clusters = (start / CLUSTER) as usize..range.end().div_ceil(CLUSTER) as usize;
        if self.rng.one_in(8) {
            match view.give_up(range) {
                Ok(given_up) => {
                    let first = given_up.start().div_ceil(CLUSTER) as usize;
                    let end = given_up.end().div_ceil(CLUSTER) as usize;
                    self.given_up[first..end.max(first)].fill(true);
                }
                Err(ViewError::NotForReaders | ViewError::Over) => {}
                Err(error) => panic!("{error}"),
            }
            return;
        }
        match view.begin_read(range) {
            Ok(read) => self.readers.push(Reader {
                read,
                range,
                data: Vec::new(),
            }),
            Err(ViewError::NoAccess(_)) => assert!(self.given_up[clusters].contains(&true)),
            Err(ViewError::Over) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Reads one more block, or is done.
    fn reader_goes_on(&mut self) -> Result<(), String> {
        if self.readers.is_empty() {
            return Ok(());
        }
        let index = self.rng.below(self.readers.len() as u64) as usize;
        let mut reader = self.readers.swap_remove(index);
        let block = reader.range.start() / BLOCK + reader.data.len() as u64;
        if block * BLOCK < reader.range.end() {
            let mut pieces = reader.read.pieces().iter();
            let piece = pieces.find(|(piece, _)| piece.contains(block * BLOCK));
            let disk = match piece.expect("all of the range").1 {
                Side::Source => &self.source,
                Side::Target | Side::Buffer => &self.target,
            };
            reader.data.push(disk[block as usize]);
            self.readers.push(reader);
            return Ok(());
        }
        if reader.read.finish().is_ok() {
            self.has_read += 1;
            if reader.data != self.instant[blocks(reader.range)] {
                return Err(format!("{:?} is not what it was", reader.range));
            }
        }
        Ok(())
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
        match self.rng.below(12) {
            10 if self.readers.len() < 4 => self.reader_begins(),
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
        self.instant.clone_from(&instant);
        let has_view = self.backup.view().is_some();
        let mut steps = 0;
        let result = loop {
            if steps > 100_000 {
                return Err("the job does not end".to_owned());
            }
            steps += 1;
            if has_view && steps == 3_000 {
                let _ = self.backup.job().cancel(Cancel::Force);
            }
            self.reader_goes_on()?;
            if let Some(result) = self.step() {
                break result;
            }
        };
        if result.is_err() && has_view {
            while !self.readers.is_empty() {
                self.guest_goes_on();
                self.reader_goes_on()?;
            }
            self.guest_goes_on();
            return match self.waiting.is_empty() {
                true => Ok(self.has_read),
                false => Err("the guest waits for a job that is over".to_owned()),
            };
        }
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
    for place in [Place::Buffer, Place::View] {
        let mut used = 0;
        for seed in first..first + seeds {
            let came_to = World::new(seed, place).run();
            let came_to = came_to.unwrap_or_else(|wrong| panic!("{place:?}, seed {seed}: {wrong}"));
            used += u64::from(came_to > 0);
        }
        let is_much = used > seeds / 4;
        assert!(
            seeds < 100 || is_much,
            "{place:?} was used in {used} of {seeds}"
        );
    }
}

#[test]
fn with_room_in_the_buffer_a_guest_never_waits_for_the_target() {
    let mut waited = 0;
    for seed in 1..300 {
        let mut world = World::new(seed, Place::Buffer);
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
    for (place, sabotage) in [
        (Place::Buffer, Sabotage::SaveUnwanted),
        (Place::Buffer, Sabotage::CopyOverwritten),
        (Place::Buffer, Sabotage::TrustOvertaken),
        (Place::Buffer, Sabotage::ReleaseInFlight),
        (Place::View, Sabotage::ReleaseWhileRead),
        (Place::View, Sabotage::TrustBrokenView),
        (Place::View, Sabotage::ReleaseInFlight),
    ] {
        blockjob::sabotage::break_on_this_thread(Some(sabotage));
        let noticed = (1..2_000).find(|&seed| {
            std::panic::catch_unwind(|| World::new(seed, place).run().is_err()).unwrap_or(true)
        });
        blockjob::sabotage::break_on_this_thread(None);
        assert!(noticed.is_some(), "{sabotage:?} was not noticed");
    }
}
