//! A guest that remembers what it wrote, so that every block of a disk can be checked afterwards.
//!
//! ```text
//!  image ──stamps──▶ ┌────────┐   copy    ┌────────┐
//!                    │ source │ ────────▶ │ target │
//!  guest ──stamps──▶ └────────┘           └────────┘ ◀──stamps── guest, after the switch
//! ```
//!
//! 1. Each block belongs to one guest thread, so the last write to it is a fact and not a race.
//! 2. What a block holds follows from its number and its *stamp*: who wrote it, and his how-manieth
//!    write that was. Two stamps never give the same bytes.
//! 3. A write goes to the disk that is current *after* the gate let it in, and is noted in that disk's
//!    stamps before its ticket is finished. So while the node is quiesced the stamps of a disk are
//!    exact, and what waited at the gate is in those of the new disk only.

use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{Begin, ByteRange, GuestQueue, Lane, Ticket, Unmap};
use parking_lot::RwLock;

use super::clock::block_on;
use super::file::{FileDevice, punch_hole, write_zeroes};

/// What is stamped.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks in a row of the same owner. Two owners share each granule of 64 KiB.
const REGION_BLOCKS: u64 = 8;
const REGION: u64 = BLOCK * REGION_BLOCKS;

/// Who wrote what an image held from the beginning.
const IMAGE_WRITER: u32 = 0xf_ffff;
/// Who writes to [`nobodys`] range.
pub(crate) const NOBODY: u32 = 0xf_fffe;

/// The last write to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(u64);

impl Stamp {
    /// Not written since the stamps were made: the block holds what it held before.
    pub(crate) const BEFORE: Stamp = Stamp(u64::MAX);
    /// Zeroed or discarded; a hole in a file reads as zeroes, too.
    pub(crate) const ZERO: Stamp = Stamp(0);

    pub(crate) fn new(writer: u32, count: u64) -> Self {
        Self((u64::from(writer) + 1) << 40 | count)
    }

    /// Which of the writer's writes it was.
    pub(crate) fn count(self) -> u64 {
        self.0 & ((1 << 40) - 1)
    }

    /// What the block then holds.
    pub(crate) fn fill(self, block: u64, bytes: &mut [u8]) {
        if self == Self::ZERO {
            bytes.fill(0);
            return;
        }
        let mut word = mix(self.0 ^ mix(block));
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&word.to_le_bytes());
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
    }
}

/// The last write to each whole block of a disk.
#[derive(Debug)]
pub(crate) struct Stamps(Vec<AtomicU64>);

impl Stamps {
    /// For a disk of `len` bytes of which nothing is known.
    pub(crate) fn new(len: u64) -> Self {
        let blocks = 0..len / BLOCK;
        Self(blocks.map(|_| AtomicU64::new(Stamp::BEFORE.0)).collect())
    }

    pub(crate) fn of(&self, block: u64) -> Stamp {
        match self.0.get(block as usize) {
            Some(stamp) => Stamp(stamp.load(Ordering::Acquire)),
            // The odd end of a disk belongs to nobody.
            None => Stamp::BEFORE,
        }
    }

    pub(crate) fn set(&self, range: ByteRange, stamp: Stamp) {
        for block in range.start() / BLOCK..range.end() / BLOCK {
            self.0[block as usize].store(stamp.0, Ordering::Release);
        }
    }
}

/// A device and what is known of its content.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) device: FileDevice,
    pub(crate) stamps: Stamps,
}

/// The disk that the guest writes to; exchanged under a quiesced node.
#[derive(Debug)]
pub(crate) struct Current {
    disk: RwLock<Arc<Disk>>,
    /// Where active writes go as well.
    target: Option<Arc<Disk>>,
}

impl Current {
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self {
            disk: RwLock::new(disk),
            target: None,
        }
    }

    /// With the target of a mirror that may have the guest write to it at once.
    pub(crate) fn copied_to(mut self, target: Arc<Disk>) -> Self {
        self.target = Some(target);
        self
    }

    pub(crate) fn disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk.read())
    }

    pub(crate) fn replace(&self, disk: Arc<Disk>) {
        *self.disk.write() = disk;
    }
}

/// What a guest wants done to its disk.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Write(Stamp),
    Zero(Unmap),
    Discard,
}

/// Does it, as a VMM would: with a ticket in hand.
pub(crate) fn apply(
    ticket: Ticket<&Lane>,
    current: &Current,
    change: Change,
    buf: &mut Vec<u8>,
) -> io::Result<()> {
    // Only now, with the ticket, is it certain that this is the disk until the ticket is finished.
    let disk = current.disk();
    let file = disk.device.file();
    let range = ticket.range();
    let (result, stamp) = match change {
        Change::Write(stamp) => (write(file, range, stamp, buf), stamp),
        Change::Zero(unmap) => (write_zeroes(file, range, unmap), Stamp::ZERO),
        Change::Discard => (punch_hole(file, range), Stamp::ZERO),
    };
    disk.stamps.set(range, stamp);
    let Some(target) = current.target.as_ref().filter(|_| ticket.is_active()) else {
        return ticket.finish(result);
    };
    // The data is in a buffer of our own: both disks are given the same.
    if let Some(write) = ticket.source_written(result.is_ok()) {
        let part = write.range();
        let file = target.device.file();
        let start = (part.start() - range.start()) as usize;
        match change {
            Change::Write(_) => {
                let data = &buf[start..start + part.len() as usize];
                write.finish(file.write_all_at(data, part.start()));
            }
            Change::Zero(unmap) => write.finish(write_zeroes(file, part, unmap)),
            // What it has left behind the mirror asks the source later.
            Change::Discard => write.skip(),
        }
    }
    result
}

/// Writes a stamp to whole blocks of a file.
pub(crate) fn write(
    file: &File,
    range: ByteRange,
    stamp: Stamp,
    buf: &mut Vec<u8>,
) -> io::Result<()> {
    buf.resize(range.len() as usize, 0);
    let blocks = range.start() / BLOCK..;
    for (block, bytes) in blocks.zip(buf.chunks_exact_mut(BLOCK as usize)) {
        stamp.fill(block, bytes);
    }
    file.write_all_at(buf, range.start())
}

/// One thread of the guest: writes, zeroes and discards in its own regions.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    /// Which of the threads it is, from 0, and how many there are.
    pub(crate) index: u32,
    pub(crate) guests: u32,
    pub(crate) queue: GuestQueue,
    pub(crate) current: &'a Current,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) len: u64,
}

/// What a guest thread has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GuestReport {
    pub(crate) changes: u64,
    /// Those that had to wait at the gate.
    pub(crate) waited: u64,
    /// The longest that the guest had to wait for a change, gate and system call together.
    pub(crate) longest: Duration,
}

impl GuestReport {
    pub(crate) fn add(self, other: Self) -> Self {
        Self {
            changes: self.changes + other.changes,
            waited: self.waited + other.waited,
            longest: self.longest.max(other.longest),
        }
    }
}

/// Whether a disk of `len` bytes has room for that many guest threads.
pub(crate) fn has_room(len: u64, guests: u32) -> bool {
    // Each owns one of the first, busy regions.
    len / REGION / 8 > u64::from(guests)
}

/// A range that no guest thread owns.
pub(crate) fn nobodys() -> ByteRange {
    (0..BLOCK).into()
}

impl Guest<'_> {
    pub(crate) fn run(self) -> io::Result<GuestReport> {
        let mut report = GuestReport::default();
        let mut random = Random::new(u64::from(self.index));
        let mut buf = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            report.changes += 1;
            let (range, change) = self.choose(&mut random, report.changes);
            let before = Instant::now();
            let ticket = match self.queue.begin_write(range) {
                Begin::Go(ticket) => ticket,
                Begin::Wait(mut pending) => {
                    report.waited += 1;
                    block_on(poll_fn(|cx| pending.poll_begin(cx.waker())))?
                }
                Begin::Refused(refused) => return Err(refused.into()),
            };
            apply(ticket, self.current, change, &mut buf)?;
            report.longest = report.longest.max(before.elapsed());
            // Mostly one at a time, now and then a burst.
            if report.changes % 256 >= 32 {
                thread::sleep(Duration::from_micros(random.below(700) + 300));
            }
        }
        Ok(report)
    }

    fn choose(&self, random: &mut Random, count: u64) -> (ByteRange, Change) {
        let first = random.below(REGION_BLOCKS);
        let blocks = random.below(REGION_BLOCKS - first) + 1;
        let start = self.region(random) * REGION + first * BLOCK;
        let change = match random.below(10) {
            0 => Change::Zero(Unmap::Allowed),
            1 => Change::Zero(Unmap::Forbidden),
            2 => Change::Discard,
            _ => Change::Write(Stamp::new(self.index, count)),
        };
        ((start..start + blocks * BLOCK).into(), change)
    }

    /// One of its own regions; mostly in the first eighth of the disk, as guests do have busy places.
    fn region(&self, random: &mut Random) -> u64 {
        let regions = self.len / REGION;
        let busy = if random.below(8) == 0 {
            regions
        } else {
            regions / 8
        };
        let guests = u64::from(self.guests);
        // Region 0 is nobody's; the others go round.
        let turns = (busy - 1) / guests;
        1 + random.below(turns) * guests + u64::from(self.index)
    }
}

/// Fills an empty file of that length with data, zeroes and holes, and says what it wrote where.
pub(crate) fn make_image(file: &File, len: u64, seed: u64) -> io::Result<Stamps> {
    let stamps = Stamps::new(len);
    let mut random = Random::new(seed);
    let mut buf = Vec::new();
    let end = len / BLOCK * BLOCK;
    let (mut at, mut count) = (0, 0);
    while at < end {
        count += 1;
        let len = (random.below(256) + 1) * BLOCK;
        let range = (at..end.min(at + len)).into();
        let stamp = match random.below(4) {
            0 | 1 => Some(Stamp::new(IMAGE_WRITER, count)),
            2 => Some(Stamp::ZERO),
            _ => None,
        };
        if let Some(stamp) = stamp {
            write(file, range, stamp, &mut buf)?;
        }
        stamps.set(range, stamp.unwrap_or(Stamp::ZERO));
        at = range.end();
    }
    Ok(stamps)
}

/// Small numbers that are the same in every run.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// Below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % bound
    }
}

/// The finalizer of splitmix64.
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
