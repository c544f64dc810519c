//! Bitmaps that migrate under guests which write on both sides, with delays, loss, wrong bytes, cancels and
//! dropped ends, in a deterministic world. It is judged by three promises, for every bitmap:
//!
//! 1. In the end it has what it had when the guest stopped, and what was written since it started, to the bit.
//! 2. On the destination it is in use until it has all its bits; if it does not get them it is gone.
//! 3. On the source it is as if never migrated when the guest did not move, and left out of exports when it did.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run. A failure prints the seed and
//! the command that runs it again.

#[cfg(debug_assertions)]
#[path = "sim/sabotage.rs"]
mod breaking;
#[path = "sim/rng.rs"]
mod rng;
#[path = "sim/seeds.rs"]
mod seeds;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use blockjob::migration::{
    ArrivalState, Framing, IncomingMigration, IncomingOptions, MigratingNode, Mode, Next,
    OutgoingMigration, OutgoingOptions, SetupError, StreamKind,
};
use blockjob::{
    BitmapClaim, BitmapMigration, BitmapOptions, BitmapStorage, ByteRange, ClaimFor, Granularity,
    IncomingError, Node, OutgoingError, OwnedTicket, QuiesceGuard, SnapshotOf,
};

use rng::Rng;
use seeds::run_seeds;

const STEPS: u64 = 100_000;

/// A disk at both ends, and what its bitmaps should have.
struct Disk {
    len: u64,
    source: Node,
    target: Node,
    bitmaps: Vec<Model>,
}

struct Model {
    name: String,
    granularity: Granularity,
    enabled: bool,
    persistent: bool,
    /// Dirty granules on the source.
    there: BTreeSet<u64>,
    /// Granules written since the guest runs on the destination.
    here: BTreeSet<u64>,
}

impl Model {
    fn granules(&self, range: ByteRange, len: u64) -> impl Iterator<Item = u64> + use<> {
        let exponent = self.granularity.exponent();
        let range = range.intersection((0..len).into());
        let end = if range.is_empty() {
            range.start() >> exponent
        } else {
            ((range.end() - 1) >> exponent) + 1
        };
        range.start() >> exponent..end
    }
}

/// What a run came to.
#[derive(Debug, Default)]
struct Report {
    moved: bool,
    failed_before: bool,
    failed_after: bool,
    refused: bool,
    violated: bool,
    live: bool,
    resumed: u64,
    writes: [u64; 2],
    bytes: u64,
}

struct Sim {
    rng: Rng,
    disks: Vec<Disk>,
    outgoing: Option<OutgoingMigration>,
    incoming: Option<IncomingMigration>,
    is_native: bool,
    mode: Mode,
    /// Bytes on their way.
    forth: VecDeque<u8>,
    back: VecDeque<u8>,
    in_flight: Vec<(usize, ByteRange, OwnedTicket)>,
    now: Duration,
    has_stopped: bool,
    has_started: bool,
    /// The destination has read its stream to the end.
    has_arrived: bool,
    has_violated: bool,
    /// The disks are not equally long: it must not succeed.
    must_fail: bool,
    report: Report,
}

fn quiesce(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn disk(rng: &mut Rng, is_large: bool) -> Disk {
    let len = match rng.below(8) {
        0 => 0,
        1 => rng.between(1, 5000),
        // A bitmap of 1 MiB and more in the finest granules.
        _ if is_large => (4 << 30) + rng.between(0, 1 << 24),
        _ => rng.between(1, 40 << 20),
    };
    let (source, target) = (Node::new(len), Node::new(len));
    for node in [&source, &target] {
        node.bitmaps().set_storage(Some(BitmapStorage::default()));
    }
    let options = BitmapOptions::default();
    target
        .bitmaps()
        .add(&quiesce(&target), "local", options)
        .unwrap();
    let count = rng.between(0, 3);
    let mut bitmaps = Vec::new();
    for index in 0..count {
        let exponent = if is_large && index == 0 {
            9
        } else {
            rng.between(9, 20) as u8
        };
        let granularity = Granularity::from_exponent(exponent).unwrap();
        let mut model = Model {
            name: format!("b{index}"),
            granularity,
            enabled: !rng.one_in(4),
            persistent: rng.one_in(2),
            there: BTreeSet::new(),
            here: BTreeSet::new(),
        };
        let mut options = BitmapOptions::default();
        options.granularity = Some(granularity);
        options.persistent = model.persistent;
        source.bitmaps().add_disabled(&model.name, options).unwrap();
        let claim = source
            .bitmaps()
            .claim(&model.name, ClaimFor::Change)
            .unwrap();
        for _ in 0..rng.below(6) {
            let range = range(rng, len);
            claim.lock().unwrap().set(range).unwrap();
            model.there.extend(model.granules(range, len));
        }
        drop(claim);
        if model.enabled {
            source
                .bitmaps()
                .enable(&quiesce(&source), &model.name)
                .unwrap();
        }
        bitmaps.push(model);
    }
    Disk {
        len,
        source,
        target,
        bitmaps,
    }
}

fn range(rng: &mut Rng, len: u64) -> ByteRange {
    if len == 0 {
        return (0..0).into();
    }
    // Not so far apart that no two fall into one chunk.
    let far = 1 << rng.between(8, 33);
    let at = rng.below(len.min(far));
    (at..(at + rng.between(1, 40_000)).min(len)).into()
}

/// Runs a seed.
fn run(seed: u64) -> Report {
    let mut rng = Rng::new(seed);
    let is_large = rng.one_in(4);
    let disks: Vec<_> = (0..rng.between(1, 3))
        .map(|_| disk(&mut rng, is_large))
        .collect();
    let is_native = rng.one_in(2);
    let mode = rng.pick(&[Mode::PreCopy, Mode::PostCopy, Mode::Live, Mode::Hybrid]);
    let stream = if is_native {
        StreamKind::Native { session: [5; 16] }
    } else {
        StreamKind::Qemu(rng.pick(&[Framing::Bare, Framing::Sections, Framing::Whole]))
    };
    let mut sim = Sim {
        rng,
        disks,
        outgoing: None,
        incoming: None,
        is_native,
        mode,
        forth: VecDeque::new(),
        back: VecDeque::new(),
        in_flight: Vec::new(),
        now: Duration::ZERO,
        has_stopped: false,
        has_started: false,
        has_arrived: false,
        has_violated: false,
        must_fail: false,
        report: Report::default(),
    };
    sim.begin(stream);
    if sim.outgoing.is_some() {
        sim.drive();
        sim.check_end();
    }
    sim.report
}

impl Sim {
    fn ends(&self) -> [BitmapMigration; 2] {
        let mut ends = [BitmapMigration::new(), BitmapMigration::new()];
        for (index, disk) in self.disks.iter().enumerate() {
            let nodes = [&disk.source, &disk.target];
            for (end, node) in ends.iter_mut().zip(nodes) {
                let node = MigratingNode::new(format!("disk{index}"), node);
                *end = std::mem::take(end).with(node);
            }
        }
        ends
    }

    fn begin(&mut self, stream: StreamKind) {
        // Now and then somebody has a bitmap, and then none is taken.
        let claim = self.claim_one();
        // Or a disk there is longer, so that its bits cannot all come.
        if self.rng.one_in(20) {
            self.lengthen_target();
        }
        let [source, target] = self.ends();
        let mut options = OutgoingOptions::default();
        options.stream = stream;
        options.mode = self.mode;
        options.speed = self.rng.pick(&[0, 0, 1 << 20, 100 << 20]);
        options.part_chunks = self.rng.pick(&[1, 16, 50]);
        options.completes_last = self.rng.one_in(2);
        match (source.outgoing(options), claim) {
            (Ok(outgoing), None) => {
                self.mode = outgoing.mode();
                self.outgoing = Some(outgoing);
            }
            (Err(SetupError::Busy { .. }), Some(claim)) => {
                drop(claim);
                self.report.refused = true;
                self.check_source(false);
                return;
            }
            (outgoing, _) => panic!("{:?}", outgoing.map(drop)),
        }
        let mut options = IncomingOptions::default();
        options.stream = stream;
        self.incoming = Some(target.incoming(options));
    }

    fn claim_one(&mut self) -> Option<BitmapClaim> {
        if !self.rng.one_in(12) {
            return None;
        }
        let disk = self
            .disks
            .iter()
            .rev()
            .find(|disk| !disk.bitmaps.is_empty())?;
        let claim = disk
            .source
            .bitmaps()
            .claim(&disk.bitmaps[0].name, ClaimFor::Reading);
        Some(claim.unwrap())
    }

    fn lengthen_target(&mut self) {
        for disk in &mut self.disks {
            if disk
                .bitmaps
                .iter()
                .any(|bitmap| disk.len % (64 << bitmap.granularity.exponent()) == 0)
            {
                // The bits that there are end at a word.
                let longer = disk.len + (64 << 20);
                disk.target = Node::new(longer);
                let options = BitmapOptions::default();
                let target = &disk.target;
                target
                    .bitmaps()
                    .add(&quiesce(target), "local", options)
                    .unwrap();
                self.must_fail = true;
            }
        }
    }

    fn drive(&mut self) {
        for step in 0..STEPS {
            let is_calm = step > 3000;
            match self.rng.below(40) {
                0..=5 => self.write_source(),
                6..=9 => self.write_target(),
                10..=19 => self.pull(),
                20..=29 => self.deliver(),
                30..=32 => self.answer(),
                33 if step > 20 => self.stop(),
                34 => self.start(),
                35 if !is_calm && self.rng.one_in(15) => self.break_connection(),
                36 if !is_calm && self.rng.one_in(if self.has_started { 15 } else { 60 }) => {
                    self.give_up();
                }
                37 if !is_calm && self.rng.one_in(20) => self.violate(),
                38 if !is_calm && self.rng.one_in(20) => self.spoil(),
                39 => self.disturb(),
                _ => {}
            }
            self.check_target();
            if self.outgoing.is_some() && self.incoming.is_some() && self.is_over() {
                self.finish();
            }
            if self.outgoing.is_none() || self.incoming.is_none() {
                return;
            }
        }
        panic!("stalled: {:?}", self.outgoing);
    }

    fn write_source(&mut self) {
        // What is in flight settles before the guest stands still, in any order.
        if !self.in_flight.is_empty() && self.rng.one_in(2) {
            self.settle_one();
            return;
        }
        if self.has_stopped {
            return;
        }
        let index = self.rng.below(self.disks.len() as u64) as usize;
        let range = range(&mut self.rng, self.disks[index].len);
        let begin = self.disks[index].source.begin_write_owned(range);
        self.in_flight
            .push((index, range, begin.go().expect("nobody quiesces it")));
    }

    fn settle_one(&mut self) {
        let at = self.rng.below(self.in_flight.len() as u64) as usize;
        let (index, range, ticket) = self.in_flight.swap_remove(at);
        ticket.finish(());
        self.report.writes[0] += 1;
        let Disk { len, bitmaps, .. } = &mut self.disks[index];
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.there.extend(bitmap.granules(range, *len));
        }
    }

    fn write_target(&mut self) {
        if !self.has_started {
            return;
        }
        let index = self.rng.below(self.disks.len() as u64) as usize;
        let Disk {
            len,
            target,
            bitmaps,
            ..
        } = &mut self.disks[index];
        let range = range(&mut self.rng, *len);
        target
            .begin_write(range)
            .go()
            .expect("nobody quiesces it")
            .finish(());
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.here.extend(bitmap.granules(range, *len));
        }
        self.report.writes[1] += 1;
    }

    fn pull(&mut self) {
        let Some(outgoing) = &mut self.outgoing else {
            return;
        };
        let mut piece = vec![0; self.rng.pick(&[1, 100, 5000, 100_000, 1 << 20])];
        for _ in 0..self.rng.between(1, 40) {
            if !self.has_stopped && outgoing.bitmaps().iter().any(|one| one.bytes_sent > 0) {
                self.report.live = true;
            }
            match outgoing.next_bytes(self.now, &mut piece) {
                Ok(Next::Bytes(len)) => {
                    self.forth.extend(&piece[..len]);
                    self.report.bytes += len as u64;
                }
                Ok(Next::Until(until)) => self.now = until,
                Ok(Next::Idle | Next::Answer | Next::Done) => return,
                Err(error) => return self.outgoing_failed(error),
            }
        }
    }

    fn outgoing_failed(&mut self, error: OutgoingError) {
        assert!(self.has_violated, "{error}");
        assert!(matches!(error, OutgoingError::GuestWrote { .. }), "{error}");
        self.report.violated = true;
        self.end();
    }

    fn deliver(&mut self) {
        let Some(incoming) = &mut self.incoming else {
            return;
        };
        let len = self
            .rng
            .pick(&[1, 50, 3000, 100_000, 1 << 22])
            .min(self.forth.len());
        let bytes: Vec<u8> = self.forth.drain(..len).collect();
        match incoming.feed(&bytes) {
            Ok(_) => {}
            Err(IncomingError::Broken(_)) if self.is_native => self.reconnect(),
            Err(error) => {
                assert!(self.must_fail, "{error}");
                self.end();
            }
        }
    }

    fn answer(&mut self) {
        let (Some(outgoing), Some(incoming)) = (&mut self.outgoing, &mut self.incoming) else {
            return;
        };
        let mut piece = [0; 40];
        let len = incoming.next_bytes(&mut piece);
        self.back.extend(&piece[..len]);
        let len = self.rng.pick(&[0, 1, 10, 100]).min(self.back.len());
        let bytes: Vec<u8> = self.back.drain(..len).collect();
        if self.is_native {
            match outgoing.feed(&bytes) {
                Ok(()) => {}
                Err(OutgoingError::Answer(_)) => self.reconnect(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The guest stands still when nothing of it is in flight.
    fn stop(&mut self) {
        let patience = if matches!(self.mode, Mode::Live | Mode::Hybrid) {
            20
        } else {
            4
        };
        if self.has_stopped || !self.rng.one_in(patience) {
            return;
        }
        while !self.in_flight.is_empty() {
            self.settle_one();
        }
        let guards: Vec<_> = self
            .disks
            .iter()
            .map(|disk| quiesce(&disk.source))
            .collect();
        let guards: Vec<_> = guards.iter().collect();
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.stop(&guards).unwrap();
        }
        self.has_stopped = true;
    }

    /// The guest starts on the destination, when it is there that it may.
    fn start(&mut self) {
        let (Some(outgoing), Some(incoming)) = (&mut self.outgoing, &mut self.incoming) else {
            return;
        };
        if !self.has_stopped || self.has_started {
            return;
        }
        let is_deferred = matches!(self.mode, Mode::PostCopy | Mode::Hybrid);
        let expected: usize = self.disks.iter().map(|disk| disk.bitmaps.len()).sum();
        let may = if is_deferred {
            incoming.bitmaps().len() == expected
        } else {
            self.has_arrived
        };
        if !may {
            if !is_deferred {
                self.arrive();
            }
            return;
        }
        if self.has_violated {
            let error = outgoing.guest_started().unwrap_err();
            return self.outgoing_failed(error);
        }
        outgoing.guest_started().unwrap();
        let guards: Vec<_> = self
            .disks
            .iter()
            .map(|disk| quiesce(&disk.target))
            .collect();
        incoming
            .guest_starts(&guards.iter().collect::<Vec<_>>())
            .unwrap();
        self.has_started = true;
    }

    /// Whether the destination has all, and has said so.
    fn arrive(&mut self) {
        let (Some(outgoing), Some(incoming)) = (&mut self.outgoing, &mut self.incoming) else {
            return;
        };
        if self.has_arrived || !self.forth.is_empty() {
            return;
        }
        match outgoing.next_bytes(self.now, &mut []) {
            Ok(Next::Done) => {}
            Ok(_) => return,
            Err(error) => return self.outgoing_failed(error),
        }
        match incoming.finish() {
            Ok(()) => self.has_arrived = true,
            Err(error) => {
                assert!(self.must_fail, "{error}");
                self.end();
            }
        }
    }

    fn is_over(&mut self) -> bool {
        self.arrive();
        self.has_arrived && self.has_started
    }

    fn finish(&mut self) {
        let outgoing = self.outgoing.as_mut().expect("nobody has ended it");
        if let Err(error) = outgoing.finish() {
            return self.outgoing_failed(error);
        }
        assert!(
            !self.has_violated,
            "a write while the guest was to stand still went unnoticed"
        );
        assert!(!self.must_fail, "disks of different lengths went unnoticed");
        self.report.moved = true;
        self.outgoing = None;
        self.incoming = None;
    }

    /// What is on its way is lost.
    fn break_connection(&mut self) {
        if !self.is_native {
            let incoming = self.incoming.as_mut().expect("nobody has ended it");
            if !self.has_arrived && incoming.finish().is_ok() && !self.report.moved {
                // It broke between two parts: bitmaps that began must not be taken for whole.
                assert!(
                    incoming
                        .bitmaps()
                        .iter()
                        .all(|came| came.state != ArrivalState::Loading)
                );
            }
            return self.end();
        }
        self.reconnect();
    }

    fn reconnect(&mut self) {
        let (Some(outgoing), Some(incoming)) = (&mut self.outgoing, &mut self.incoming) else {
            return;
        };
        if self.has_arrived {
            return;
        }
        self.forth.clear();
        self.back.clear();
        outgoing.reconnect().unwrap();
        incoming.reconnect().unwrap();
        self.report.resumed += 1;
    }

    /// A byte is not what was sent, in either direction.
    fn spoil(&mut self) {
        let bytes = if self.rng.one_in(3) {
            &mut self.back
        } else {
            &mut self.forth
        };
        if self.is_native && !bytes.is_empty() {
            let at = self.rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << self.rng.below(8);
        }
    }

    fn give_up(&mut self) {
        match self.rng.below(4) {
            0 => self
                .outgoing
                .as_mut()
                .expect("nobody has ended it")
                .cancel(),
            1 => self
                .incoming
                .as_mut()
                .expect("nobody has ended it")
                .cancel(),
            _ => {}
        }
        self.end();
    }

    /// Both ends are gone, whichever was first.
    fn end(&mut self) {
        if self.rng.one_in(2) {
            self.outgoing = None;
            self.check_target();
        }
        self.incoming = None;
        self.outgoing = None;
        if self.has_started {
            self.report.failed_after = true;
        } else {
            self.report.failed_before = true;
        }
    }

    /// The guest writes although it was said to stand still.
    fn violate(&mut self) {
        let recording = |disk: &&Disk| disk.bitmaps.iter().any(|bitmap| bitmap.enabled);
        if !self.has_stopped || self.has_started || !self.rng.one_in(2) {
            return;
        }
        let Some(index) = self
            .disks
            .iter()
            .position(|disk| recording(&disk) && disk.len > 0)
        else {
            return;
        };
        let range = ByteRange::from(0..1);
        let Disk {
            source,
            bitmaps,
            len,
            ..
        } = &mut self.disks[index];
        source
            .begin_write(range)
            .go()
            .expect("nobody quiesces it")
            .finish(());
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.there.extend(bitmap.granules(range, *len));
        }
        self.has_violated = true;
    }

    /// Somebody wants a bitmap that is on its way.
    fn disturb(&mut self) {
        for disk in &self.disks {
            for bitmap in &disk.bitmaps {
                assert!(
                    disk.source.bitmaps().clear(&bitmap.name).is_err(),
                    "it was sent in part"
                );
            }
        }
    }

    /// Promise 2, at any time.
    fn check_target(&mut self) {
        let Some(incoming) = &self.incoming else {
            return;
        };
        for came in incoming.bitmaps() {
            let index: usize = came.id.node["disk".len()..].parse().unwrap();
            let info = self.disks[index].target.bitmaps().query(&came.id.bitmap);
            match came.state {
                ArrivalState::Loading => {
                    let is_busy = info.is_ok_and(|info| info.is_busy());
                    assert!(is_busy, "{} can be had, and is not whole", came.id);
                }
                ArrivalState::Whole | ArrivalState::Active => assert!(info.is_ok()),
                ArrivalState::Dropped => assert!(info.is_err(), "{} stays", came.id),
                _ => unreachable!("there are no others"),
            }
        }
    }

    fn check_end(&mut self) {
        while !self.in_flight.is_empty() {
            self.settle_one();
        }
        for _ in 0..self.rng.below(3) {
            self.write_target();
        }
        self.check_source(self.has_started);
        for disk in &self.disks {
            let bitmaps = disk.target.bitmaps();
            bitmaps.check_invariants();
            assert!(
                bitmaps
                    .query("local")
                    .is_ok_and(|info| info.is_recording && !info.is_busy())
            );
            for bitmap in &disk.bitmaps {
                let Ok(info) = bitmaps.query(&bitmap.name) else {
                    assert!(!self.report.moved, "{} is gone", bitmap.name);
                    continue;
                };
                assert!(
                    self.has_started,
                    "{} stays, and the guest did not move",
                    bitmap.name
                );
                assert!(!info.is_busy());
                assert_eq!(info.is_recording, bitmap.enabled);
                assert_eq!(info.is_persistent, bitmap.persistent);
                let expected: BTreeSet<u64> = bitmap.there.union(&bitmap.here).copied().collect();
                check_bits(&disk.target, bitmap, &expected, "on the destination");
            }
        }
    }

    /// Promise 3, when it is over.
    fn check_source(&self, is_stale: bool) {
        for disk in &self.disks {
            let bitmaps = disk.source.bitmaps();
            bitmaps.check_invariants();
            let export = bitmaps.export_state(&quiesce(&disk.source));
            let export = export.expect("no bitmap is in use any more");
            for bitmap in &disk.bitmaps {
                let info = bitmaps.query(&bitmap.name).unwrap();
                assert!(!info.is_busy(), "{} is in use", bitmap.name);
                assert_eq!(info.is_recording, bitmap.enabled);
                assert_eq!(info.is_persistent, bitmap.persistent);
                let is_stored = export
                    .to_store
                    .iter()
                    .any(|state| state.name == bitmap.name);
                assert_eq!(
                    is_stored,
                    bitmap.persistent && !is_stale,
                    "{} is stored",
                    bitmap.name
                );
                check_bits(&disk.source, bitmap, &bitmap.there, "on the source");
            }
        }
    }
}

fn check_bits(node: &Node, bitmap: &Model, expected: &BTreeSet<u64>, end: &str) {
    let bits = node
        .bitmaps()
        .snapshot(&bitmap.name, SnapshotOf::Bitmap)
        .unwrap();
    let exponent = bitmap.granularity.exponent();
    let mut runs = BTreeSet::new();
    for run in bits.runs() {
        runs.extend(bitmap.granules(run, node.len()));
    }
    assert_eq!(bits.granularity().exponent(), exponent);
    let lost: Vec<_> = expected.difference(&runs).take(3).collect();
    let more: Vec<_> = runs.difference(expected).take(3).collect();
    assert!(
        lost.is_empty(),
        "{} {end} has lost granules {lost:?}",
        bitmap.name
    );
    assert!(
        more.is_empty(),
        "{} {end} has granules {more:?} that nobody wrote",
        bitmap.name
    );
}

#[test]
fn every_seed_keeps_the_promises() {
    let reports = run_seeds("every_seed_keeps_the_promises", 1_500, 1, run);

    let count_of = |what: fn(&Report) -> bool| reports.iter().filter(|&r| what(r)).count();
    let sum = |what: fn(&Report) -> u64| reports.iter().map(what).sum::<u64>();
    println!(
        "{} moved, {} failed before the guest did, {} after, {} refused, {} with a write that must not be, {} \
         sent live; {} connections taken up again; {} and {} guest writes, {} bytes",
        count_of(|r| r.moved),
        count_of(|r| r.failed_before),
        count_of(|r| r.failed_after),
        count_of(|r| r.refused),
        count_of(|r| r.violated),
        count_of(|r| r.live),
        sum(|r| r.resumed),
        sum(|r| r.writes[0]),
        sum(|r| r.writes[1]),
        sum(|r| r.bytes),
    );
    if reports.len() >= 500 {
        // A simulation that never comes to a place shows nothing about it.
        let share = |what: fn(&Report) -> bool| count_of(what) as f64 / reports.len() as f64;
        assert!(share(|r| r.moved) > 0.4);
        assert!(share(|r| r.failed_before) > 0.05);
        assert!(share(|r| r.failed_after) > 0.01);
        assert!(share(|r| r.refused) > 0.02);
        assert!(share(|r| r.violated) > 0.01);
        assert!(share(|r| r.live) > 0.02);
        assert!(share(|r| r.resumed > 0) > 0.05);
    }
}

/// Breaks each invariant on purpose: the simulation must notice, within so many seeds.
#[cfg(debug_assertions)]
mod sabotage {
    use super::breaking::{expect_panics, unnoticed};
    use super::run;
    use blockjob::sabotage::Sabotage;

    /// What is broken, and the number of seeds within which it must be noticed: several times the number
    /// that it took when this was written.
    const BROKEN: &[(Sabotage, u64)] = &[
        (Sabotage::ForgetRecorded, 500),
        (Sabotage::ArriveIdle, 50),
        (Sabotage::KeepPartial, 200),
        (Sabotage::StartUnrecorded, 50),
        (Sabotage::DeliverOverWrites, 200),
        (Sabotage::CompleteWithGaps, 1000),
        (Sabotage::HoldBeforeCheck, 200),
        (Sabotage::CancelHandsOver, 200),
        (Sabotage::IgnoreWrites, 500),
        (Sabotage::ClearAfterRead, 500),
        (Sabotage::ForgetUnconfirmed, 200),
    ];

    #[test]
    fn every_broken_invariant_is_noticed() {
        expect_panics();
        let missed = unnoticed(BROKEN, run, |_, _| true);
        assert!(missed.is_empty(), "not noticed: {missed:?}");
    }
}
