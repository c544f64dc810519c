//! Disks of several layers: the chain above a base copied in one step, and committed into the base. From seeds, with
//! a guest that writes, writes zeroes and discards meanwhile, also so that the base shows again; with devices that
//! fail; with drivers and machines that are dropped, and cancels. It is judged by the promises:
//!
//! 1. The guest reads what it was told to be written, through whatever layers, at all times and however it ends.
//! 2. Nothing is written where no layer above the base ever held something, nor past the end of the disk.
//! 3. At the switch, and at the end after a soft cancel, the target is what the guest reads.
//!
//! `BLOCKJOB_SEED` is the first seed and `BLOCKJOB_SEEDS` how many are run.

#[cfg(debug_assertions)]
#[path = "../sim/sabotage.rs"]
mod breaking;
#[path = "../sim/rng.rs"]
mod rng;
#[path = "../sim/seeds.rs"]
mod seeds;

use std::task::Waker;
use std::time::Duration;

use blockjob::{
    Begin, ByteRange, Cancel, Change, CommitOptions, Content, CopyMode, Extent, Granularity, Job,
    JobError, JobOptionsError, Limits, Mirror, MirrorError, MirrorOptions, MirrorSync, Node,
    OnError, Op, OpKind, Outcome, OwnedTicket, RangeLimits, Side, Status, Step, VerbError,
};

use crate::machine::bytes;
use rng::Rng;
use seeds::run_seeds;

const BLOCK: u64 = 512;

/// What a layer holds of a block.
#[derive(Clone)]
enum Piece {
    Data(Vec<u8>),
    Zero,
    Discarded,
}

/// What is written to.
#[derive(Clone, Copy, PartialEq)]
enum Onto {
    /// The base itself: a commit.
    Base,
    /// A disk that lies on the base: a mirror of the chain above it.
    Overlay,
}

struct Chain {
    node: Node,
    /// As long as the disk, or longer.
    base: Vec<u8>,
    /// Above it, lowest first, block by block. The guest writes to the last.
    layers: Vec<Vec<Option<Piece>>>,
    /// The layers from here on are those that are copied.
    from: usize,
    onto: Onto,
    overlay: Vec<Option<u8>>,
    /// Blocks that were ever held by one of these.
    was_held: Vec<bool>,
    /// What the guest reads; `None` where that may be anything.
    told: Vec<Option<u8>>,
    unit: u64,
    rng: Rng,
}

struct Out {
    op: Op,
    data: Option<Vec<u8>>,
}

struct Writing {
    ticket: OwnedTicket,
    range: ByteRange,
    byte: u8,
    has_landed: bool,
}

impl Chain {
    fn new(mut rng: Rng, onto: Onto, base_more: u64) -> Self {
        let blocks = rng.between(4, 16);
        let short = if base_more == 0 {
            rng.pick(&[0, 0, 100])
        } else {
            0
        };
        let len = blocks * BLOCK - short;
        let base = (0..len + base_more)
            .map(|at| (at / 100) as u8 | 1)
            .collect();
        let count = rng.between(1, 3) as usize;
        let layers: Vec<Vec<Option<Piece>>> = (0..count)
            .map(|_| (0..blocks).map(|_| piece(&mut rng)).collect())
            .collect();
        let from = match onto {
            Onto::Base => 0,
            Onto::Overlay => rng.below(count as u64) as usize,
        };
        let mut chain = Self {
            node: Node::new(len),
            base,
            from,
            was_held: vec![false; blocks as usize],
            layers,
            onto,
            overlay: vec![None; len as usize],
            told: Vec::new(),
            unit: 0,
            rng,
        };
        chain.note_held();
        chain.told = (0..len).map(|at| chain.read(at, 0)).collect();
        chain
    }

    fn len(&self) -> u64 {
        self.node.len()
    }

    fn note_held(&mut self) {
        for block in 0..self.was_held.len() {
            self.was_held[block] |= self.is_in_top(block);
        }
    }

    fn is_in_top(&self, block: usize) -> bool {
        self.layers[self.from..]
            .iter()
            .any(|layer| layer[block].is_some())
    }

    /// What is read there, from this many layers below the topmost on; `None` if that may be anything.
    fn read(&self, at: u64, skipped: usize) -> Option<u8> {
        let shown = &self.layers[..self.layers.len() - skipped];
        let (block, inner) = ((at / BLOCK) as usize, (at % BLOCK) as usize);
        match shown.iter().rev().find_map(|layer| layer[block].as_ref()) {
            Some(Piece::Data(data)) => Some(data[inner]),
            Some(Piece::Zero) => Some(0),
            Some(Piece::Discarded) => None,
            None => Some(self.base[at as usize]),
        }
    }

    fn read_target(&self, at: u64) -> Option<u8> {
        match self.onto {
            Onto::Base => Some(self.base[at as usize]),
            Onto::Overlay => {
                let below = || self.read(at, self.layers.len() - self.from);
                self.overlay[at as usize].or_else(below)
            }
        }
    }

    fn write_target(&mut self, range: ByteRange, data: impl Fn(usize) -> u8) {
        for (index, at) in bytes(range).enumerate() {
            match self.onto {
                Onto::Base => self.base[at] = data(index),
                Onto::Overlay => self.overlay[at] = Some(data(index)),
            }
        }
    }

    fn status(&self, range: ByteRange) -> Extent {
        let of = |block: usize| {
            let piece = self
                .layers
                .iter()
                .rev()
                .find_map(|layer| layer[block].as_ref());
            let content = match piece {
                None | Some(Piece::Data(_)) => Content::Data,
                Some(Piece::Zero) => Content::Zero,
                Some(Piece::Discarded) => Content::Undefined,
            };
            (content, self.is_in_top(block))
        };
        let first = (range.start() / BLOCK) as usize;
        let mut end = first + 1;
        while end < self.was_held.len() && of(end) == of(first) {
            end += 1;
        }
        let (content, in_top) = of(first);
        Extent {
            len: end as u64 * BLOCK - range.start(),
            content,
            in_top,
        }
    }

    /// What the guest writes is in the topmost layer.
    fn land(&mut self, range: ByteRange, byte: u8) {
        let end = range.end().div_ceil(BLOCK);
        for block in range.start() / BLOCK..end {
            let at = block * BLOCK..(block + 1) * BLOCK;
            let old = at.clone().map(|at| match at < self.len() {
                true => self.read(at, 0).unwrap_or(0xdd),
                false => 0,
            });
            let mut data: Vec<u8> = old.collect();
            for at in at.start.max(range.start())..at.end.min(range.end()) {
                data[(at % BLOCK) as usize] = byte;
            }
            self.layers.last_mut().unwrap()[block as usize] = Some(Piece::Data(data));
        }
        self.note_held();
    }

    /// The guest writes zeroes to whole blocks, or discards them: then a layer below may show again.
    fn clear(&mut self, range: ByteRange) {
        let kind = self.rng.below(3);
        let piece = match kind {
            0 => Some(Piece::Zero),
            1 => Some(Piece::Discarded),
            _ => None,
        };
        for block in range.start() / BLOCK..range.end().div_ceil(BLOCK) {
            self.layers.last_mut().unwrap()[block as usize] = piece.clone();
        }
        for at in bytes(range) {
            self.told[at] = (kind == 0).then_some(0);
        }
        self.note_held();
    }

    fn check(&self) {
        for (at, told) in self.told.iter().enumerate() {
            if let Some(told) = told {
                assert_eq!(
                    self.read(at as u64, 0),
                    Some(*told),
                    "1: the guest reads {at}"
                );
            }
        }
        let end = self.len() as usize;
        let rest = self.base[end..].iter().enumerate();
        for (index, byte) in rest {
            assert_eq!(
                *byte,
                ((end + index) / 100) as u8 | 1,
                "2: past the end of the disk"
            );
        }
    }

    fn check_copied(&self) {
        for (at, told) in self.told.iter().enumerate() {
            if let Some(told) = told {
                assert_eq!(
                    self.read_target(at as u64),
                    Some(*told),
                    "3: the target at {at}"
                );
            }
        }
    }

    fn check_op(&self, kind: OpKind) {
        let Some(range) = kind.range().filter(|_| kind.writes_target()) else {
            return;
        };
        // A plain mirror may copy what the base shows, too: what is written twice is nobody's loss.
        let mut at = range.start() / self.unit * self.unit;
        while at < range.end() && self.onto == Onto::Base {
            let blocks = at / BLOCK..(at + self.unit).min(self.len()).div_ceil(BLOCK);
            let was_held = |block: u64| self.was_held[block as usize];
            assert!(
                blocks.clone().any(was_held),
                "2: {kind:?} where the base shows"
            );
            at += self.unit;
        }
    }

    /// Does an operation, or the first half of it.
    fn advance(&mut self, out: &mut Out, fails: bool) -> Option<Outcome> {
        let failed = |side| {
            Some(Outcome::Failed {
                side,
                error: std::io::ErrorKind::Other.into(),
            })
        };
        match out.op.kind() {
            OpKind::Copy(range) => {
                let Some(data) = &out.data else {
                    if fails {
                        return failed(Side::Source);
                    }
                    let read = bytes(range).map(|at| self.read(at as u64, 0).unwrap_or(0xee));
                    out.data = Some(read.collect());
                    return None;
                };
                // One that fails may have landed in part.
                let part = if fails { range.len() / 2 } else { range.len() };
                let landed = range.split_at(range.start() + part).0;
                self.write_target(landed, |index| data[index]);
                if fails {
                    return failed(Side::Target);
                }
            }
            OpKind::Zero(..) | OpKind::Discard(_) if fails => return failed(Side::Target),
            OpKind::Zero(range, _) => self.write_target(range, |_| 0),
            OpKind::Discard(range) => {
                let noise = self.rng.next() as u8;
                self.write_target(range, |index| noise ^ index as u8);
            }
            OpKind::Status(_) if fails => return failed(Side::Source),
            OpKind::Status(range) => return Some(Outcome::Status(self.status(range))),
            OpKind::Flush if fails => return failed(Side::Target),
            _ => {}
        }
        Some(Outcome::Done)
    }
}

fn piece(rng: &mut Rng) -> Option<Piece> {
    match rng.below(8) {
        0 => Some(Piece::Data(vec![rng.next() as u8; BLOCK as usize])),
        1 => Some(Piece::Zero),
        2 => Some(Piece::Discarded),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum End {
    #[default]
    Complete,
    Soft,
    Force,
    Drop,
}

#[derive(Default)]
struct Report {
    end: End,
    wrote: bool,
    cleared: bool,
    failed: bool,
    lost: bool,
    was_longer: bool,
    succeeded: bool,
}

fn job_of(onto: Onto, chain: &mut Chain, may_fail: bool) -> Mirror {
    let len = chain.len();
    let rng = &mut chain.rng;
    let source = Limits::new(len);
    let mut target = Limits::new(chain.base.len() as u64);
    let mut ranges = || {
        rng.one_in(2).then(|| RangeLimits {
            align: rng.pick(&[1, 512]),
            max: rng.pick(&[1024, 1 << 30]),
        })
    };
    (target.write_zeroes, target.discard) = (ranges(), ranges());
    let granularity = Granularity::from_bytes(rng.pick(&[512, 1024, 4096]));
    chain.unit = granularity.unwrap().bytes();
    let (workers, chunk_max) = (rng.pick(&[1, 3, 16]), rng.pick(&[512, 4096, 1 << 20]));
    let policy = match may_fail {
        true => OnError::Ignore,
        false => OnError::Report,
    };
    let made = match onto {
        Onto::Base => {
            let mut options = CommitOptions::default();
            (options.granularity, options.workers) = (granularity, workers);
            options.chunk_max = chunk_max;
            options.job.on_source_error = policy;
            options.job.on_target_error = policy;
            Mirror::commit(&chain.node, source, target, options)
        }
        Onto::Overlay => {
            let mut options = MirrorOptions::default();
            options.sync = MirrorSync::Top;
            (options.granularity, options.workers) = (granularity, workers);
            options.chunk_max = chunk_max;
            options.job.on_source_error = policy;
            options.job.on_target_error = policy;
            target.len = len;
            Mirror::new(&chain.node, source, target, options)
        }
    };
    made.expect("good options")
}

fn run(seed: u64) -> Report {
    let mut rng = Rng::new(seed);
    let onto = rng.pick(&[Onto::Base, Onto::Base, Onto::Overlay]);
    let more = match onto {
        Onto::Base => rng.pick(&[0, 0, 700]),
        Onto::Overlay => 0,
    };
    let end = rng.pick(&[
        End::Complete,
        End::Complete,
        End::Soft,
        End::Force,
        End::Drop,
    ]);
    let (may_fail, steps) = (rng.one_in(3), rng.between(20, 250));
    let mut chain = Chain::new(rng, onto, more);
    let mut mirror = job_of(onto, &mut chain, may_fail);
    let job = mirror.job().clone();
    job.start().unwrap();
    let mut report = Report {
        end,
        was_longer: more > 0,
        ..Report::default()
    };
    let (mut out, mut lost): (Vec<Out>, Vec<Out>) = Default::default();
    let mut writing: Vec<Writing> = Vec::new();
    let mut now = Duration::ZERO;
    let early = chain.rng.below(steps);
    for step in 0.. {
        assert!(step < 20_000, "stalled: {job:?}");
        if step % 4 == 0 {
            chain.check();
            mirror.check_invariants();
        }
        let is_late = step > steps;
        if step == early && end == End::Force {
            job.cancel(Cancel::Force).unwrap();
        }
        if step == early && end == End::Drop {
            lost.append(&mut out);
            drop(mirror);
            // What is in flight comes to an end.
            for mut one in lost {
                while chain.advance(&mut one, false).is_none() {}
                chain.check();
            }
            return report;
        }
        if is_late && job.query().status == Status::Ready {
            let _ = match end {
                End::Complete => job.complete(),
                End::Soft | End::Force | End::Drop => job.cancel(Cancel::Soft),
            };
        }
        match chain.rng.below(8) {
            0 | 1 if !is_late || !writing.is_empty() => {
                guest(&mut chain, &mut writing, &mut report, is_late);
            }
            2 if !is_late && chain.rng.one_in(12) => {
                mirror.ops_lost();
                lost.append(&mut out);
                report.lost = true;
            }
            3..=5 if !out.is_empty() => {
                let index = chain.rng.below(out.len() as u64) as usize;
                let fails = may_fail && !is_late && chain.rng.one_in(6);
                let mut one = out.swap_remove(index);
                if matches!(one.op.kind(), OpKind::Settle) {
                    // Up to here what was lost may land. Half of it did.
                    for mut late in lost.drain(..).filter(|_| seed.is_multiple_of(2)) {
                        while chain.advance(&mut late, false).is_none() {}
                    }
                }
                match chain.advance(&mut one, fails) {
                    None => out.push(one),
                    Some(outcome) => {
                        report.failed |= fails;
                        mirror.op_done(now, one.op, outcome);
                    }
                }
            }
            6 if !lost.is_empty() => {
                let index = chain.rng.below(lost.len() as u64) as usize;
                let mut late = lost.swap_remove(index);
                while chain.advance(&mut late, false).is_none() {}
            }
            _ => match mirror.poll(now, Waker::noop()) {
                Step::Op(op) => {
                    chain.check_op(op.kind());
                    out.push(Out { op, data: None });
                }
                Step::Wait { .. } => now += Duration::from_millis(2),
                Step::Switch(switch) => {
                    assert!(writing.is_empty(), "a guest write is in flight");
                    chain.check_copied();
                    switch.commit();
                }
                Step::SwitchBack(_) => unreachable!("it is in no group"),
                Step::Done(result) => {
                    chain.check();
                    report.succeeded = result.is_ok();
                    match result {
                        Ok(()) => chain.check_copied(),
                        Err(error) => assert!(matches!(error, JobError::Cancelled { .. })),
                    }
                    assert_eq!(report.succeeded, end != End::Force, "{seed}");
                    return report;
                }
            },
        }
    }
    unreachable!("it ends inside")
}

/// Goes on with a write of the guest's, or begins one.
fn guest(chain: &mut Chain, writing: &mut Vec<Writing>, report: &mut Report, is_late: bool) {
    if !writing.is_empty() && (is_late || chain.rng.one_in(2)) {
        let index = chain.rng.below(writing.len() as u64) as usize;
        let write = &mut writing[index];
        if !write.has_landed {
            write.has_landed = true;
            return chain.land(write.range, write.byte);
        }
        let write = writing.swap_remove(index);
        for at in bytes(write.range) {
            chain.told[at] = Some(write.byte);
        }
        return write.ticket.finish(());
    }
    let blocks = chain.was_held.len() as u64;
    let is_clearing = chain.rng.one_in(3);
    let range = match is_clearing {
        true => {
            let start = chain.rng.below(blocks);
            let end = (start + chain.rng.between(1, 4)).min(blocks);
            start * BLOCK..(end * BLOCK).min(chain.len())
        }
        false => {
            let start = chain.rng.below(chain.len());
            start..(start + chain.rng.between(1, 1500)).min(chain.len())
        }
    };
    let range = ByteRange::from(range);
    // A write fills the rest of its blocks with what was there.
    let wide: ByteRange =
        (range.start() / BLOCK * BLOCK..range.end().div_ceil(BLOCK) * BLOCK).into();
    if writing
        .iter()
        .any(|other| wide.overlaps(wider(other.range)))
    {
        return;
    }
    let Begin::Go(ticket) = chain.node.begin_write_owned(range) else {
        return;
    };
    if is_clearing {
        chain.clear(range);
        report.cleared = true;
        return ticket.finish(());
    }
    bytes(range).for_each(|at| chain.told[at] = None);
    report.wrote = true;
    writing.push(Writing {
        ticket,
        range,
        byte: chain.rng.next() as u8,
        has_landed: false,
    });
}

fn wider(range: ByteRange) -> ByteRange {
    (range.start() / BLOCK * BLOCK..range.end().div_ceil(BLOCK) * BLOCK).into()
}

#[test]
fn chains_are_copied_and_committed_whatever_happens() {
    let test = "chains_are_copied_and_committed_whatever_happens";
    let reports = run_seeds(test, 600, 1, run);
    if reports.len() >= 600 {
        let share = |is: fn(&Report) -> bool| {
            reports.iter().filter(|report| is(report)).count() as f64 / reports.len() as f64
        };
        for end in [End::Complete, End::Soft, End::Force, End::Drop] {
            assert!(
                reports.iter().filter(|report| report.end == end).count() > 50,
                "{end:?}"
            );
        }
        assert!(share(|report| report.succeeded) > 0.4);
        assert!(share(|report| report.wrote) > 0.7);
        assert!(share(|report| report.cleared) > 0.7);
        assert!(share(|report| report.failed) > 0.1);
        assert!(share(|report| report.lost) > 0.2);
        assert!(share(|report| report.was_longer) > 0.1);
    }
}

#[cfg(debug_assertions)]
#[test]
fn every_broken_invariant_is_noticed() {
    use blockjob::sabotage::Sabotage;
    let broken = [
        (Sabotage::CommitBelow, 20),
        (Sabotage::ClearAfterLook, 100),
        (Sabotage::SwitchWithoutRecheck, 100),
    ];
    breaking::expect_panics();
    let missed = breaking::unnoticed(&broken, run, |_, _| true);
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

fn commit(
    node: u64,
    base: Limits,
    change: impl FnOnce(&mut CommitOptions),
) -> Result<Job, MirrorError> {
    let mut options = CommitOptions::default();
    change(&mut options);
    let commit = Mirror::commit(&Node::new(node), Limits::new(node), base, options)?;
    Ok(commit.job().clone())
}

#[test]
fn a_base_is_never_too_short_and_may_be_longer_where_the_disk_ends_well() {
    let len = 10 * BLOCK;
    let lengths = |base, disk| MirrorError::Lengths {
        node: disk,
        source_len: disk,
        target: base,
    };
    let short = commit(len, Limits::new(len - 1), |_| {});
    assert_eq!(
        short.unwrap_err(),
        lengths(len - 1, len),
        "it is to be grown first"
    );
    commit(len, Limits::new(len), |_| {}).unwrap();
    commit(len, Limits::new(len + 1), |_| {}).unwrap();
    commit(0, Limits::new(len), |_| {}).unwrap();
    // In the midst of the base a request ends at its alignment, and the disk does not.
    let mut base = Limits::new(2 * len);
    base.request_align = 1024;
    commit(len, base, |_| {}).unwrap();
    let bad = commit(len - BLOCK, base, |_| {});
    assert_eq!(bad.unwrap_err(), lengths(2 * len, len - BLOCK));
    base.request_align = 1;
    base.discard = Some(RangeLimits {
        align: 1024,
        max: 1 << 20,
    });
    let bad = commit(len - BLOCK, base, |_| {});
    assert_eq!(bad.unwrap_err(), lengths(2 * len, len - BLOCK));
    base.request_align = 0;
    let side = Side::Target;
    let bad = commit(len, base, |_| {}).unwrap_err();
    assert!(matches!(bad, MirrorError::Limits { side: at, .. } if at == side));
}

#[test]
fn a_commit_has_one_policy_and_copies_in_the_background() {
    let two = commit(BLOCK, Limits::new(BLOCK), |options| {
        options.job.on_target_error = OnError::Ignore;
    });
    let error = JobOptionsError::TwoPolicies;
    assert_eq!(two.unwrap_err(), MirrorError::Job(error.clone()));

    let (node, limits) = (Node::new(BLOCK), Limits::new(BLOCK));
    let mut commit = Mirror::commit(&node, limits, limits, CommitOptions::default()).unwrap();
    let job = commit.job().clone();
    let info = job.query();
    assert_eq!((info.kind, info.mirror), ("commit", None));
    let mut change = Change {
        on_source_error: Some(OnError::Ignore),
        ..Change::default()
    };
    assert_eq!(job.change(change), Err(VerbError::Options(error)));
    assert_eq!(
        job.query().on_source_error,
        OnError::Report,
        "nothing has changed"
    );
    change.on_target_error = Some(OnError::Ignore);
    job.change(change).unwrap();
    change.copy_mode = Some(CopyMode::WriteBlocking);
    assert_eq!(
        job.change(change),
        Err(VerbError::NoSuchOption("copy_mode"))
    );
    job.start().unwrap();
    while let Step::Op(op) = commit.poll(Duration::ZERO, Waker::noop()) {
        let outcome = match op.kind() {
            OpKind::Status(range) => Outcome::Status(Extent::data(range.len())),
            _ => Outcome::Done,
        };
        commit.op_done(Duration::ZERO, op, outcome);
    }
    assert_eq!(job.query().status, Status::Ready);
    let id = blockjob::CheckpointId::default();
    assert_eq!(commit.checkpoint(id), None);
}

/// Whether a layer above the base holds something is not guessed: that is an error of the source.
#[test]
fn a_source_that_cannot_tell_fails_the_commit_or_is_asked_again() {
    for policy in [OnError::Report, OnError::Ignore, OnError::Stop] {
        let (node, limits) = (Node::new(4 * BLOCK), Limits::new(4 * BLOCK));
        let mut options = CommitOptions::default();
        options.granularity = Granularity::from_bytes(BLOCK);
        options.job.id = Some("c".to_owned());
        options.job.on_source_error = policy;
        options.job.on_target_error = policy;
        let mut commit = Mirror::commit(&node, limits, limits, options).unwrap();
        let job = commit.job().clone();
        job.start().unwrap();
        let mut now = Duration::ZERO;
        let (mut asked, mut copied) = (0, 0);
        let result = loop {
            match commit.poll(now, Waker::noop()) {
                Step::Op(op) => {
                    let outcome = match op.kind() {
                        OpKind::Status(range) => {
                            asked += 1;
                            // The first is that of the scan; the second, of what was found, fails.
                            match asked {
                                2 => Outcome::Failed {
                                    side: Side::Source,
                                    error: std::io::ErrorKind::Other.into(),
                                },
                                _ => Outcome::Status(Extent::data(range.len())),
                            }
                        }
                        OpKind::Copy(range) => {
                            copied += range.len();
                            Outcome::Done
                        }
                        _ => Outcome::Done,
                    };
                    commit.op_done(now, op, outcome);
                    commit.check_invariants();
                }
                Step::Wait { until } => match job.query().status {
                    Status::Ready => job.cancel(Cancel::Soft).unwrap(),
                    Status::Paused => job.resume().unwrap(),
                    _ => now = until.expect("it is tried again"),
                },
                Step::Done(result) => break result,
                step => panic!("{step:?}"),
            }
        };
        assert_eq!(result.is_ok(), policy != OnError::Report);
        assert_eq!(
            copied,
            if result.is_ok() { 4 * BLOCK } else { 0 },
            "{policy:?}"
        );
    }
}

/// The guest's way leads through a filter with a node of its own; the target takes the place of the filter.
#[test]
fn the_target_may_take_the_place_of_a_filter_above_the_source() {
    let mut options = crate::machine::options();
    options.granularity = Granularity::from_bytes(BLOCK);
    let mut machine = crate::machine::Machine::ready(8 * BLOCK, options);
    let (guest, source) = (Node::new(8 * BLOCK), machine.node.clone());
    let range = ByteRange::from(0..BLOCK);
    // Through the filter: a write is one of both nodes.
    let above = guest.begin_write(range).go().unwrap();
    machine.guest_write(range, 1);
    above.finish(());

    // Too late, as the docs say: the write above waits below for the switch.
    machine.job.complete().unwrap();
    let switch = machine.drive_now().switch();
    let above = guest.begin_write(range).go().unwrap();
    assert!(matches!(source.begin_write(range), Begin::Wait(_)));
    assert!(guest.quiesce().try_guard().is_err());
    drop(switch);
    machine.guest_write(range, 2);
    above.finish(());

    let held = guest.quiesce().try_guard().expect("no write is in flight");
    machine.job.complete().unwrap();
    let switch = machine.drive_now().switch();
    assert!(matches!(guest.begin_write(range), Begin::Wait(_)));
    assert!(machine.is_equal());
    switch.commit();
    drop(held);
    // The filter is gone, and with it the way to the source.
    let above = guest.begin_write(range).go().unwrap();
    machine.target[bytes(range)].fill(3);
    above.finish(());
    machine.drive_now().done().unwrap();
    assert_eq!((machine.source[0], machine.target[0]), (2, 3));
    assert!(
        source.quiesce().try_guard().is_ok(),
        "nobody holds it any more"
    );
}
