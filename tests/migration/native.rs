//! A native stream on a line that is anything but smooth, and one that says anything.

use std::time::Duration;

use blockjob::migration::{Fault, Mode, Next, StreamError};
use blockjob::{
    BitmapMigration, ByteRange, Granularity, HBitmap, IncomingError, IncomingMigration, Node,
    OutgoingError, OutgoingMigration, SnapshotOf,
};

use crate::cases::{LEN, bitmap, disk, native, write};
use crate::rng::Rng;
use crate::truth::{bits_of, quiesce};

/// Both ends of a native stream, and what is on its way between them.
struct Line {
    outgoing: OutgoingMigration,
    incoming: IncomingMigration,
    forth: Vec<u8>,
    back: Vec<u8>,
}

impl Line {
    fn reconnect(&mut self) {
        self.forth.clear();
        self.back.clear();
        self.outgoing.reconnect().unwrap();
        self.incoming.reconnect().unwrap();
    }

    /// Something of what is to be sent, or of what is on its way, goes on.
    fn go_on(&mut self, rng: &mut Rng) -> bool {
        let mut piece = vec![0; rng.pick(&[1, 19, 100, 5000, 60_000])];
        let is_done = match self.outgoing.next_bytes(Duration::ZERO, &mut piece) {
            Ok(Next::Bytes(len)) => {
                self.forth.extend(&piece[..len]);
                false
            }
            Ok(next) => next == Next::Done,
            Err(error) => panic!("{error}"),
        };
        let len = rng.below(self.forth.len() as u64 + 1) as usize;
        let coming: Vec<u8> = self.forth.drain(..len).collect();
        match self.incoming.feed(&coming) {
            Ok(_) => {}
            Err(IncomingError::Broken(_)) => {
                self.reconnect();
                return false;
            }
            Err(error) => panic!("{error}"),
        }
        let len = self.incoming.next_bytes(&mut piece);
        self.back.extend(&piece[..len]);
        let len = rng.below(self.back.len() as u64 + 1) as usize;
        let coming: Vec<u8> = self.back.drain(..len).collect();
        match self.outgoing.feed(&coming) {
            Ok(()) => is_done,
            Err(OutgoingError::Answer(_)) => {
                self.reconnect();
                false
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// What is on its way comes twice, in another order, damaged, or not at all.
    fn damage(&mut self, rng: &mut Rng) {
        let line = if rng.one_in(2) {
            &mut self.forth
        } else {
            &mut self.back
        };
        // As a rule at the ends of frames: those are whole, and only come when they should not.
        let mut ends = vec![0];
        while let Some(len) = line.get(ends[ends.len() - 1] + 4..) {
            let Some(len) = len.first_chunk().map(|len| u32::from_le_bytes(*len)) else {
                break;
            };
            let end = ends[ends.len() - 1] + len as usize + 20;
            if end > line.len() {
                break;
            }
            ends.push(end);
        }
        let mut cut = || match rng.one_in(4) {
            false => ends[rng.below(ends.len() as u64) as usize],
            true => rng.below(line.len() as u64 + 1) as usize,
        };
        let (a, b) = (cut(), cut());
        let (a, b) = (a.min(b), a.max(b));
        match rng.below(4) {
            0 => drop(line.drain(a..b)),
            1 => {
                let again = line[a..b].to_vec();
                line.splice(b..b, again);
            }
            2 => {
                let first = line.drain(a..b).collect::<Vec<_>>();
                line.extend(first);
            }
            _ => {
                if let Some(byte) = line.get_mut(a) {
                    *byte ^= 1 << rng.below(8);
                }
            }
        }
    }
}

/// Where writes go at random, near the ends of words and disks too.
fn write_somewhere(nodes: &[Node], rng: &mut Rng) -> (usize, ByteRange) {
    let index = rng.below(nodes.len() as u64) as usize;
    let len = nodes[index].len();
    let at = match rng.below(3) {
        0 => rng.below(len),
        1 => rng.below(64) * 512,
        _ => len - 1 - rng.below(1 << 20),
    };
    write(&nodes[index], at);
    (index, (at..at + 1).into())
}

/// A native stream of several disks that breaks, and on which frames come twice or in another order, while guests
/// write.
#[test]
pub(crate) fn several_disks_come_over_a_line_that_does_what_it_wants() {
    let first = crate::env("BLOCKJOB_SEED").unwrap_or(0);
    let count = crate::env("BLOCKJOB_SEEDS").unwrap_or(40);
    for seed in first..first + count {
        for mode in [Mode::PreCopy, Mode::Live, Mode::PostCopy, Mode::Hybrid] {
            println!("seed {seed} {mode:?}");
            bring(&mut Rng::new(seed), mode);
        }
    }
}

fn bring(rng: &mut Rng, mode: Mode) {
    // 1 MiB of bits, so that some are sent live.
    let mut fine = bitmap("a", true, false);
    (fine.size, fine.granularity) = (4 << 30, Granularity::from_bytes(512).unwrap());
    fine.size += 1000;
    let mut disabled = bitmap("b", false, true);
    disabled.size = fine.size;
    let names = [(0, "a"), (0, "b"), (1, "a"), (1, "c")];
    let from = [
        disk(&[fine, disabled]),
        disk(&[bitmap("a", true, false), bitmap("c", true, true)]),
    ];
    let to = [Node::new(from[0].len()), Node::new(from[1].len())];
    let of = |nodes: &[Node; 2]| {
        BitmapMigration::new()
            .with_node("d", &nodes[0])
            .with_node("e", &nodes[1])
    };
    let (mut options, incoming) = native();
    options.mode = mode;
    options.completes_last = rng.one_in(2);
    let mut line = Line {
        outgoing: of(&from).outgoing(options).unwrap(),
        incoming: of(&to).incoming(incoming),
        forth: vec![],
        back: vec![],
    };
    let is_deferred = matches!(mode, Mode::PostCopy | Mode::Hybrid);
    let (stops_at, breaks) = (rng.below(200), rng.between(5, 60));
    let (mut is_stopped, mut has_started) = (false, false);
    let mut truth: Vec<HBitmap> = vec![];
    for step in 0.. {
        assert!(step < 200_000, "it does not come to an end");
        let is_done = line.go_on(rng);
        if is_done && has_started {
            break;
        }
        if rng.one_in(breaks) {
            line.damage(rng);
        }
        if rng.one_in(2 * breaks) {
            line.reconnect();
        }
        if !is_stopped && rng.one_in(3) {
            write_somewhere(&from, rng);
        }
        if !is_stopped && step >= stops_at {
            is_stopped = true;
            let guards = [quiesce(&from[0]), quiesce(&from[1])];
            line.outgoing.stop(&[&guards[0], &guards[1]]).unwrap();
            truth = names.map(|(node, name)| bits_of(&from[node], name)).into();
        }
        let has_begun = line.incoming.bitmaps().len() == names.len();
        let may_start = has_begun && (is_deferred || rng.one_in(50));
        if is_stopped && !has_started && may_start {
            has_started = true;
            line.outgoing.guest_started().unwrap();
            let guards = [quiesce(&to[0]), quiesce(&to[1])];
            let guards = [&guards[0], &guards[1]];
            line.incoming.guest_starts(&guards).unwrap();
        }
        if has_started && rng.one_in(3) {
            let (written, range) = write_somewhere(&to, rng);
            for ((node, name), bits) in names.iter().zip(&mut truth) {
                if *node == written && *name != "b" {
                    bits.set(range).unwrap();
                }
            }
        }
    }
    line.incoming.finish().unwrap();
    line.outgoing.finish().unwrap();
    for ((node, name), bits) in names.iter().zip(truth) {
        assert_eq!(bits_of(&to[*node], name), bits, "{node} {name}");
    }
}

/// Frames of a native stream that are whole, numbered and sealed, and say anything.
#[test]
pub(crate) fn frames_may_say_anything() {
    let first = crate::env("BLOCKJOB_SEED").unwrap_or(0);
    let count = crate::env("BLOCKJOB_SEEDS").unwrap_or(3000);
    let mut whole = 0;
    for seed in first..first + count {
        let outcome = std::panic::catch_unwind(|| Teller::new(seed).run());
        whole += outcome.unwrap_or_else(|panic| {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic)
        });
    }
    // Else it is all refused at once, and nothing is tested.
    assert!(count < 3000 || whole > count / 10, "{whole} of {count}");
}

/// Makes such frames, and knows what of them is to be taken.
struct Teller {
    rng: Rng,
    nodes: [Node; 2],
    local: HBitmap,
    incoming: IncomingMigration,
    number: u64,
    /// Whether something wrong was told.
    is_over: bool,
    /// Of each bitmap that began its node, name and bits, and whether it is whole.
    begun: Vec<(usize, String, HBitmap, bool)>,
    /// Which of those have all their bits, at the latest.
    covered: Vec<usize>,
}

impl Teller {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let lens = [0, 1, 5000, 64 << 16, (64 << 16) + 1, LEN, LEN + 700];
        let mut local = bitmap("local", false, false);
        local.size = rng.pick(&lens);
        let nodes = [disk(&[local]), Node::new(rng.pick(&lens))];
        let target = BitmapMigration::new().with_node("d", &nodes[0]);
        Self {
            local: bits_of(&nodes[0], "local"),
            incoming: target.with_node("e", &nodes[1]).incoming(native().1),
            rng,
            nodes,
            number: 0,
            is_over: false,
            begun: vec![],
            covered: vec![],
        }
    }

    /// Whether to say something wrong: not so often that nothing is ever right.
    fn errs(&mut self) -> bool {
        self.rng.one_in(60)
    }

    /// Whether all that began has come, and something has.
    fn run(mut self) -> u64 {
        let hello = [&b"BLKJBMIG\x01\0\0\0"[..], &[9; 16]].concat();
        self.tell(1, &hello).unwrap();
        self.number = 0;
        for _ in 0..self.rng.below(40) {
            let told = match self.rng.below(8) {
                0 | 1 => self.start(),
                2 => self.complete_one(),
                _ => self.bits(),
            };
            self.check();
            if told.is_err() {
                assert_eq!(self.incoming.feed(&[0]), Err(IncomingError::Over));
                self.is_over = true;
                break;
            }
        }
        if self.rng.one_in(2) {
            self.tell_all();
        }
        let whole = self.begun.iter().filter(|(.., whole)| *whole).count() as u64;
        let all = self.begun.len() as u32;
        let has_ended = self.tell(5, &all.to_le_bytes()).is_ok();
        let is_whole = self.incoming.finish().is_ok();
        assert_eq!(is_whole, has_ended && whole == u64::from(all));
        if is_whole {
            let guards = self.nodes.each_ref().map(quiesce);
            self.incoming.guest_starts(&guards.each_ref()).unwrap();
        }
        drop(self.incoming);
        for (node, name, bits, _) in &self.begun {
            let bitmaps = self.nodes[*node].bitmaps();
            assert_eq!(bitmaps.query(name).is_ok(), is_whole);
            assert!(!is_whole || bits_of(&self.nodes[*node], name) == *bits);
        }
        assert_eq!(bits_of(&self.nodes[0], "local"), self.local);
        u64::from(is_whole && all > 0)
    }

    /// Nothing is seen of what is not whole.
    fn check(&self) {
        let names = self.incoming.bitmaps();
        for (told, (node, name, bits, is_whole)) in names.iter().zip(&self.begun) {
            assert_eq!(&told.id.bitmap, name);
            let bitmaps = self.nodes[*node].bitmaps();
            let seen = bitmaps.snapshot(name, SnapshotOf::Bitmap);
            if let Ok(seen) = seen {
                assert!(*is_whole && !told.is_enabled && seen == *bits);
            }
        }
    }

    fn tell(&mut self, kind: u8, payload: &[u8]) -> Result<usize, IncomingError> {
        let mut frame = vec![kind, 0, 0, 0];
        frame.extend((payload.len() as u32).to_le_bytes());
        frame.extend(self.number.to_le_bytes());
        frame.extend(payload);
        let crc = crc32fast::hash(&frame);
        frame.extend(crc.to_le_bytes());
        self.number += 1;
        let told = self.incoming.feed(&frame);
        // What no frame can say breaks the connection, which goes on with another. Not here.
        if matches!(told, Err(IncomingError::Broken(_))) {
            self.incoming.cancel();
        }
        told
    }

    fn start(&mut self) -> Result<usize, IncomingError> {
        let node = self.rng.below(2) as usize;
        let name = self.rng.pick(&["a", "b", "c", "local"]);
        let known = |(other, known, ..): &(usize, String, HBitmap, bool)| {
            (*other, &known[..]) == (node, name)
        };
        let is_known = self.begun.iter().any(known) || (node, name) == (0, "local");
        if is_known && !self.errs() {
            return Ok(0);
        }
        let index = self.begun.len() as u32 + u32::from(self.errs());
        let len = self.nodes[node].len() + u64::from(self.errs());
        let exponent = match self.errs() {
            true => self.rng.pick(&[0, 8, 32, 63, 64, 255]),
            false => self.rng.pick(&[9, 12, 16, 17, 20, 31]),
        };
        let flags = self.rng.below(4) as u8;
        let mut payload = index.to_le_bytes().to_vec();
        payload.extend(len.to_le_bytes());
        payload.extend([exponent, flags, 0, 0]);
        payload.extend([0; 24]);
        for name in [["d", "e"][node], name] {
            payload.push(name.len() as u8);
            payload.extend(name.as_bytes());
        }
        let is_right = index == self.begun.len() as u32
            && len == self.nodes[node].len()
            && (9..=31).contains(&exponent)
            && !is_known;
        let told = self.tell(2, &payload);
        assert_eq!(told.is_ok(), is_right);
        if is_right {
            let granularity = Granularity::from_exponent(exponent).unwrap();
            let bits = HBitmap::new(len, granularity).unwrap();
            self.begun.push((node, name.into(), bits, false));
        }
        told
    }

    /// One of those that began, or none.
    fn pick(&mut self) -> Option<usize> {
        let all = self.begun.len() as u64;
        match self.errs() {
            true => Some(self.rng.below(all + 2) as usize),
            false => (all > 0).then(|| self.rng.below(all) as usize),
        }
    }

    fn bits(&mut self) -> Result<usize, IncomingError> {
        let Some(index) = self.pick() else {
            return Ok(0);
        };
        let errs = self.errs();
        let Some((_, _, bits, is_whole)) = self.begun.get(index) else {
            return self.bits_of_range(index, (0..0).into(), None);
        };
        let (is_whole, len, align) = (*is_whole, bits.len(), 64 * bits.granularity().bytes());
        if is_whole && !errs {
            return Ok(0);
        }
        let rng = &mut self.rng;
        // Ends of words as a rule, and of the disk.
        let mut ends = || match rng.below(6) {
            0 if errs => rng.pick(&[1, len / 2, u64::MAX, u64::MAX - 511, 1 << 63]),
            0 | 1 => len,
            2 => len.next_multiple_of(512),
            _ => rng.below(len / align + 1) * align,
        };
        let (a, b) = (ends(), ends());
        let range: ByteRange = match rng.below(3) {
            0 => (0..len).into(),
            _ if errs => (a.min(b)..a.max(b)).into(),
            _ => (a / align * align..b).into(),
        };
        self.bits_of_range(index, range, Some((len, align, is_whole)))
    }

    fn bits_of_range(
        &mut self,
        index: usize,
        range: ByteRange,
        shape: Option<(u64, u64, bool)>,
    ) -> Result<usize, IncomingError> {
        let mut form = self.rng.below(3) as u8;
        let mut data = vec![];
        let mut is_right = shape.is_some();
        if let Some((len, align, is_whole)) = shape {
            // A part of no bytes is one anywhere.
            let is_part = range.is_empty()
                || range.start().is_multiple_of(align)
                    && range.end() <= len.next_multiple_of(512)
                    && (range.end().is_multiple_of(align) || {
                        let granule = align / 64;
                        (range.end() - 1) / granule == (len - 1) / granule
                    });
            is_right = is_part && !is_whole;
            let granules = range
                .intersection((0..len).into())
                .len()
                .div_ceil(align / 64);
            let bytes = granules.div_ceil(64) * 8;
            if form == 2 && bytes <= 1024 {
                let padding = match self.errs() {
                    true => 40,
                    false => bytes.next_multiple_of(32) - bytes,
                };
                data = (0..bytes + padding)
                    .map(|_| self.rng.next() as u8)
                    .collect();
                is_right &= bytes + padding <= bytes.next_multiple_of(32);
            } else {
                form %= 2;
            }
        }
        let mut payload = (index as u32).to_le_bytes().to_vec();
        payload.extend([form, 0, 0, 0]);
        payload.extend(range.start().to_le_bytes());
        payload.extend(range.len().to_le_bytes());
        payload.extend(&data);
        let told = self.tell(3, &payload);
        assert_eq!(told.is_ok(), is_right, "{told:?}");
        if told.is_ok() && shape.is_some_and(|(len, ..)| range.contains_range((0..len).into())) {
            self.covered.push(index);
        }
        if told.is_ok() && !range.is_empty() {
            let bits = &mut self.begun[index].2;
            let granule = bits.granularity().bytes();
            let all = range.intersection((0..bits.len()).into());
            for (index, at) in (all.start()..all.end())
                .step_by(granule as usize)
                .enumerate()
            {
                let one = at..(at + granule).min(all.end());
                let is_dirty = match form {
                    0 => false,
                    1 => true,
                    _ => data[index / 8] >> (index % 8) & 1 != 0,
                };
                let changed = match is_dirty {
                    true => bits.set(one),
                    false => bits.reset(one.start..one.start + granule.min(bits.len() - one.start)),
                };
                changed.unwrap();
            }
        }
        told
    }

    /// What is left, so that all bitmaps are whole unless there was an error.
    fn tell_all(&mut self) {
        for index in 0..self.begun.len() {
            let (_, _, bits, is_whole) = &self.begun[index];
            let (len, align) = (bits.len(), 64 * bits.granularity().bytes());
            if *is_whole || self.is_over {
                continue;
            }
            let all = (0..len).into();
            let told = self.bits_of_range(index, all, Some((len, align, false)));
            self.is_over = told.and_then(|_| self.complete(index)).is_err();
        }
    }

    fn complete_one(&mut self) -> Result<usize, IncomingError> {
        match self.pick() {
            Some(index) if self.covered.contains(&index) || self.errs() => self.complete(index),
            _ => Ok(0),
        }
    }

    fn complete(&mut self, index: usize) -> Result<usize, IncomingError> {
        let mut payload = (index as u32).to_le_bytes().to_vec();
        let Some((_, _, bits, _)) = self.begun.get(index) else {
            payload.extend([0; 13]);
            let told = self.tell(4, &payload);
            assert!(told.is_err());
            return told;
        };
        let mut bytes = vec![0; bits.serialized_len(0..bits.len()).unwrap()];
        bits.serialize_part(0..bits.len(), &mut bytes).unwrap();
        payload.extend(bits.count().to_le_bytes());
        payload.extend(crc32fast::hash(&bytes).to_le_bytes());
        payload.push(0);
        let told = self.tell(4, &payload);
        match &told {
            Ok(_) => self.begun[index].3 = true,
            Err(IncomingError::Stream(StreamError {
                why: Fault::Missing { .. },
                ..
            })) => {}
            Err(error) => panic!("{error}"),
        }
        told
    }
}
