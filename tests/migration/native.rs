//! A native stream on a line that is anything but smooth.

use std::time::Duration;

use blockjob::migration::{Mode, Next};
use blockjob::{
    BitmapMigration, ByteRange, Granularity, HBitmap, IncomingError, IncomingMigration, Node,
    OutgoingError, OutgoingMigration,
};

use crate::cases::{bitmap, disk, native, write};
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
