//! Guests that write to a disk, and know what it must hold.
//!
//! Each has a part of the disk to itself and one write in flight, so that it knows the content of its
//! part at every moment. Together they keep several writes in flight, in all parts of the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockjob::ByteRange;
use blockjob::io::{AlignedBuf, GuestDisk, Unmap, WriteAt};
use tokio::task::JoinHandle;

use super::nbd::Nbd;

const SECTOR: u64 = 512;
/// The longest write of data.
const WRITE_MAX: u64 = 128 << 10;
/// The longest write of zeroes, and the longest discard.
const RANGE_MAX: u64 = 512 << 10;

/// Writes in a row, on the average. Then comes a pause: a job is ready at a moment at which nothing is
/// dirty, and guests that never rest may never leave it one.
const BURST: u64 = 8;
const PAUSE_MILLIS: u64 = 100;

/// How guests get to their disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// The library passes the gate for them.
    Disk,
    /// They pass the gate themselves and write to the device as it is then. What is let in after the
    /// stop was asked for is given up: not one write comes after the switch.
    Gate,
}

/// All guests of a disk.
pub(crate) struct Guests {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<Memory>>,
}

struct Shared {
    disk: Arc<GuestDisk<Nbd>>,
    path: Path,
    must_stop: AtomicBool,
    writes: AtomicU64,
}

/// What a part of the disk must hold.
struct Memory {
    part: ByteRange,
    bytes: Vec<u8>,
    /// By sector: `false` once a discard has left the content open.
    is_known: Vec<bool>,
}

/// One thing to do.
#[derive(Debug)]
enum Deed {
    Write(u64, Vec<u8>),
    Zero(ByteRange, Unmap),
    Discard(ByteRange),
}

/// Numbers that look random and follow from the seed (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

impl Guests {
    /// `count` guests start to write to a disk whose content is `content`.
    pub(crate) fn start(
        disk: &Arc<GuestDisk<Nbd>>,
        content: &[u8],
        path: Path,
        count: u64,
        seed: u64,
    ) -> Self {
        let shared = Arc::new(Shared {
            disk: Arc::clone(disk),
            path,
            must_stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        });
        let len = content.len() as u64;
        let cut = |guest: u64| match guest {
            guest if guest == count => len,
            guest => len / count * guest / SECTOR * SECTOR,
        };
        let tasks = (0..count)
            .map(|guest| {
                let part = ByteRange::from(cut(guest)..cut(guest + 1));
                let bytes = content[part.start() as usize..part.end() as usize].to_vec();
                let memory = Memory {
                    part,
                    is_known: vec![true; bytes.len().div_ceil(SECTOR as usize)],
                    bytes,
                };
                let shared = Arc::clone(&shared);
                tokio::spawn(live(shared, memory, Random::new(seed ^ (guest << 32))))
            })
            .collect();
        Self { shared, tasks }
    }

    /// Writes that have succeeded so far. A guest whose write fails panics.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Waits until that many more writes have succeeded.
    pub(crate) async fn write_more(&self, writes: u64) {
        let end = self.writes() + writes;
        while self.writes() < end {
            let has_died = self.tasks.iter().any(JoinHandle::is_finished);
            assert!(!has_died, "a guest has died");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// No write begins any more from here on, but those that are waiting by the way of
    /// [`Path::Disk`].
    pub(crate) fn ask_to_stop(&self) {
        self.shared.must_stop.store(true, Ordering::SeqCst);
    }

    /// Stops them and tells what the disk must hold.
    pub(crate) async fn stop(self) -> Promise {
        self.ask_to_stop();
        let mut promise = Promise(Vec::new());
        for task in self.tasks {
            promise.0.push(task.await.expect("no write has failed"));
        }
        promise
    }
}

/// What the disk must hold, by what the guests were told.
pub(crate) struct Promise(Vec<Memory>);

impl Promise {
    pub(crate) fn assert_kept(&self, content: &[u8]) {
        for memory in &self.0 {
            let start = memory.part.start() as usize;
            let sectors = memory.bytes.chunks(SECTOR as usize).enumerate();
            for (sector, wanted) in sectors.filter(|&(sector, _)| memory.is_known[sector]) {
                let at = start + sector * SECTOR as usize;
                assert!(
                    content[at..at + wanted.len()] == *wanted,
                    "the sector at {at:#x} is not what the guest has written"
                );
            }
        }
    }
}

async fn live(shared: Arc<Shared>, mut memory: Memory, mut random: Random) -> Memory {
    while !shared.must_stop.load(Ordering::SeqCst) {
        let deed = memory.draw(&mut random);
        match shared.path {
            Path::Disk => deed.perform(&*shared.disk).await,
            Path::Gate => {
                let node = shared.disk.node();
                let ticket = node
                    .begin_write(deed.range())
                    .await
                    .expect("no bitmap is read-only");
                if shared.must_stop.load(Ordering::SeqCst) {
                    ticket.cancel();
                    break;
                }
                let device = shared.disk.device();
                ticket.finish(deed.perform(&*device).await)
            }
        }
        .unwrap_or_else(|error| panic!("a guest's write fails: {error}"));
        memory.note(deed);
        shared.writes.fetch_add(1, Ordering::Relaxed);
        if random.below(BURST) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(PAUSE_MILLIS))).await;
        }
    }
    memory
}

impl Memory {
    fn draw(&self, random: &mut Random) -> Deed {
        let kind = random.below(10);
        let len_max = if kind < 7 { WRITE_MAX } else { RANGE_MAX };
        // One write in four starts and ends anywhere, the others at sectors.
        let align = if random.below(4) == 0 { 1 } else { SECTOR };
        let start = self.part.start() + random.below(self.part.len()) / align * align;
        let len = (1 + random.below(len_max)).next_multiple_of(align);
        let range = ByteRange::from(start..(start + len).min(self.part.end()));
        match kind {
            0..7 => {
                let mut bytes = vec![0; range.len() as usize];
                for bytes in bytes.chunks_mut(8) {
                    bytes.copy_from_slice(&random.next().to_le_bytes()[..bytes.len()]);
                }
                Deed::Write(start, bytes)
            }
            7 => Deed::Zero(range, Unmap::Allowed),
            8 => Deed::Zero(range, Unmap::Forbidden),
            _ => Deed::Discard(range),
        }
    }

    fn note(&mut self, deed: Deed) {
        let range = deed.range();
        let place = |offset: u64| (offset - self.part.start()) as usize;
        let bytes = place(range.start())..place(range.end());
        match deed {
            Deed::Write(_, data) => self.bytes[bytes.clone()].copy_from_slice(&data),
            Deed::Zero(..) => self.bytes[bytes.clone()].fill(0),
            Deed::Discard(_) => {
                let outward = bytes.start / 512..bytes.end.div_ceil(512);
                self.is_known[outward].fill(false);
                return;
            }
        }
        // A sector that is open becomes known again only when all of it is written.
        let end = match bytes.end {
            end if end == self.bytes.len() => self.is_known.len(),
            end => end / 512,
        };
        let inward = bytes.start.div_ceil(512)..end;
        if !inward.is_empty() {
            self.is_known[inward].fill(true);
        }
    }
}

impl Deed {
    fn range(&self) -> ByteRange {
        match self {
            Deed::Write(start, bytes) => (*start..*start + bytes.len() as u64).into(),
            Deed::Zero(range, _) | Deed::Discard(range) => *range,
        }
    }

    async fn perform(&self, disk: &impl WriteAt<Buf = AlignedBuf>) -> std::io::Result<()> {
        match self {
            Deed::Write(start, bytes) => {
                let mut buf = AlignedBuf::new(bytes.len(), 1)?;
                buf.as_mut().copy_from_slice(bytes);
                disk.write_at(*start, buf).await.0
            }
            Deed::Zero(range, unmap) => disk.write_zeroes(*range, *unmap).await,
            Deed::Discard(range) => disk.discard(*range).await,
        }
    }
}
