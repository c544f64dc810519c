//! Backs up two disks of a guest that writes all the while: in full, then what has changed since, day by
//! day; and proves that each day can be restored, byte by byte.
//!
//! ```text
//! cargo run --release --example incremental_backup
//!
//!  day 0   full            ──▶ layer 0          every day: one instant for both disks, by one transaction,
//!  day 1   incremental     ──▶ layer 1          and one group: both are backed up, or neither counts
//!  day 2   the target of one disk is full       ──▶ as if it had not been tried
//!          once more       ──▶ layer 2
//!  day 3   mode always, and the target is full  ──▶ layer 3 has a part of it, which is kept
//!          once more       ──▶ layer 4 has the rest, and what was written since
//! ```
//!
//! A *layer* is a file with holes and the map of what it holds, stored beside it. To restore, all layers are
//! laid over each other from the lowest on. The proof:
//!
//! 1. While the guests are held for the instant, what they know of their disks is noted. Each restored image
//!    is compared with that, every byte of it.
//! 2. One guest thread writes a number to one disk, and then to the other. In no pair of images is the second
//!    disk ahead of the first.
//! 3. Two more bitmaps, made at the instant, know what was to be copied and what was written since. After each
//!    attempt the bitmap of the disk holds what its mode says, granule by granule; only what was in flight
//!    when a backup failed may be dirty beside that. A layer that is complete holds what was to be copied, no
//!    more and no less.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock"
)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockjob::bitmap::stored::{self, Label};
use blockjob::driver::Driver;
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, WriteAt};
use blockjob::{
    Backup, BackupOptions, BackupSync, Begin, BitmapMode, BitmapOptions, ByteRange, Granularity,
    HBitmap, Job, JobError, JobGroup, Limits, Node, Side, SnapshotOf, Transaction, Unmap,
};
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use support::clock::{TimerClock, block_on};
use support::file::FileDevice;
use support::guest::{
    self, BLOCK, Change, Current, Disk, Guest, GuestReport, NOBODY, Stamp, apply,
};
use support::temp::TempFolder;

/// No multiple of anything.
const LEN: u64 = (48 << 20) + 1001;
const DISKS: usize = 2;
const NAMES: [&str; DISKS] = ["system", "data"];
/// The disk whose target runs out of space.
const UNLUCKY: usize = 1;
/// Guest threads on each disk.
const GUESTS: u32 = 2;
/// Bytes copied in a second in the background, so that guests meet what is not copied yet.
const SPEED: u64 = 96 << 20;
/// How long the guests have between two backups.
const DAY: Duration = Duration::from_millis(150);
/// The bitmap that the backups go by.
const DAILY: &str = "daily";
/// What was to be copied, and what was written since: for the proof alone.
const BEFORE: &str = "before";
const SINCE: &str = "since";

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let machine = Machine::new()?;
    let report = thread::scope(|scope| {
        let stopped = StopOnDrop(&machine.stop);
        let mut guests = Vec::new();
        for disk in &machine.disks {
            for index in 0..GUESTS {
                let guest = disk.guest(index, &machine.stop);
                guests.push(scope.spawn(move || guest.run()));
            }
        }
        let ledger = scope.spawn(|| machine.keep_ledger());
        let told = machine.all_days();
        drop(stopped);
        let mut report = GuestReport::default();
        for guest in guests {
            report = report.add(guest.join().expect("a guest does not panic")?);
        }
        report = report.add(ledger.join().expect("it does not panic")?);
        told.map(|()| report)
    })?;
    println!(
        "OK: every image is the disk as it was at its instant, under {} guest writes, of which {} waited; \
         the slowest took {:.2?}",
        report.changes, report.waited, report.longest
    );
    Ok(())
}

/// A small VMM.
struct Machine {
    disks: [VmDisk; DISKS],
    clock: TimerClock,
    folder: TempFolder,
    /// The guests are to end.
    stop: AtomicBool,
}

struct VmDisk {
    name: &'static str,
    node: Node,
    disk: Arc<Disk>,
    current: Current,
}

/// What one attempt to back up a disk has left.
struct Outcome {
    result: Result<(), JobError>,
    /// What the guest knew of its disk at the instant.
    stamps: Vec<Stamp>,
    /// Where the layer is, and the granules that it holds.
    layer: PathBuf,
    held: HBitmap,
    /// What was to be copied.
    before: HBitmap,
}

impl Outcome {
    fn is_complete(&self) -> bool {
        self.result.is_ok()
    }
}

/// What is copied of each disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    Incremental(BitmapMode),
}

impl Machine {
    fn new() -> Result<Self> {
        let folder = TempFolder::new("incremental-backup")?;
        let make = |name: &'static str| -> io::Result<VmDisk> {
            let file = new_file(&folder.path().join(name))?;
            let stamps = guest::make_image(&file, LEN, u64::from(name.as_bytes()[0]))?;
            let device = FileDevice::new(file, 2)?;
            let disk = Arc::new(Disk { device, stamps });
            Ok(VmDisk {
                name,
                node: Node::new(LEN),
                current: Current::new(Arc::clone(&disk)),
                disk,
            })
        };
        let [first, second] = NAMES.map(make);
        Ok(Self {
            disks: [first?, second?],
            clock: TimerClock::new(),
            folder,
            stop: AtomicBool::new(false),
        })
    }

    fn all_days(&self) -> Result<()> {
        let incremental = Kind::Incremental(BitmapMode::OnSuccess);
        let mut chain = [Vec::new(), Vec::new()];
        let full = self.back_up("day 0", Kind::Full, None)?;
        self.add_to(&mut chain, full)?;
        thread::sleep(DAY);

        let first = self.back_up("day 1", incremental, None)?;
        self.add_to(&mut chain, first)?;
        thread::sleep(DAY);

        // The target of one disk runs full. The backup of the other does not count either.
        let failed = self.back_up("day 2", incremental, Some(self.third_of_dirty()?))?;
        assert_full(&failed[UNLUCKY]);
        assert!(
            failed.iter().all(|outcome| !outcome.is_complete()),
            "of a group none succeeds if one fails"
        );
        println!("  the target is full: all that was dirty is dirty again");
        for outcome in &failed {
            std::fs::remove_file(&outcome.layer)?;
        }
        thread::sleep(DAY);
        let second = self.back_up("day 2 again", incremental, None)?;
        self.add_to(&mut chain, second)?;
        thread::sleep(DAY);

        // Full again, but what is copied by then is kept.
        let always = Kind::Incremental(BitmapMode::Always);
        let part = self.back_up("day 3", always, Some(self.third_of_dirty()?))?;
        assert_full(&part[UNLUCKY]);
        println!("  the target is full: what it has is kept, the rest is dirty");
        for (chain, outcome) in chain.iter_mut().zip(&part) {
            chain.push(outcome.layer.clone());
        }
        let rest = self.back_up("day 3 again", always, None)?;
        let (all, rest_bytes) = (
            &part[UNLUCKY].before,
            rest[UNLUCKY].held.dirty_bytes_in_len(),
        );
        println!(
            "  {} of {} are copied again, or were written since",
            BinaryBytes(rest_bytes),
            BinaryBytes(all.dirty_bytes_in_len()),
        );
        let mut kept = all.clone();
        kept.subtract(&rest[UNLUCKY].held)?;
        assert!(!kept.is_clean(), "nothing of what was copied counts");
        self.add_to(&mut chain, rest)
    }

    /// A third of what is dirty on the unlucky disk.
    fn third_of_dirty(&self) -> Result<u64> {
        let node = &self.disks[UNLUCKY].node;
        Ok(node.bitmaps().query(DAILY)?.dirty_bytes / 3)
    }

    /// Backs up both disks as they are now. `room` is what the target of the unlucky one has space for.
    fn back_up(&self, title: &str, kind: Kind, room: Option<u64>) -> Result<[Outcome; DISKS]> {
        let group = JobGroup::new();
        let mut layers = Vec::new();
        let mut backups = Vec::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let name = format!("{}-{}", disk.name, title.replace(' ', "-"));
            let room = room.filter(|_| index == UNLUCKY).unwrap_or(u64::MAX);
            let layer = Layer::new(self.folder.path().join(&name), room)?;
            let mut options = kind.options();
            options.job.id = Some(name);
            options.job.group = Some(group.clone());
            options.job.speed = SPEED;
            let source = disk.disk.device.limits();
            backups.push(Backup::new(&disk.node, source, layer.limits(), options)?);
            layers.push(layer);
        }
        let jobs: Vec<_> = backups.iter().map(|backup| backup.job().clone()).collect();

        // One instant for both disks: what is written later is in neither backup.
        let mut list = Transaction::new();
        for (disk, job) in self.disks.iter().zip(&jobs) {
            if kind == Kind::Full {
                list.add(&disk.node, DAILY, BitmapOptions::default());
            }
            list.add_disabled(&disk.node, BEFORE, BitmapOptions::default());
            list.merge(&disk.node, BEFORE, &[(&disk.node, DAILY)]);
            list.add(&disk.node, SINCE, BitmapOptions::default());
            list.start(job);
        }
        let prepared = block_on(list.prepare())?;
        let stamps = [0, 1].map(|disk| self.disks[disk].stamps());
        prepared.commit();

        let results = self.run(title, &mut backups, &layers);
        let mut outcomes = Vec::new();
        let ends = results.into_iter().zip(layers);
        for ((disk, stamps), (result, layer)) in self.disks.iter().zip(stamps).zip(ends) {
            let (layer, held) = layer.close()?;
            outcomes.push(Outcome {
                result,
                stamps,
                layer,
                held,
                before: disk.take(BEFORE)?,
            });
        }
        self.check_bitmaps(kind, &outcomes)?;
        Ok(outcomes.try_into().ok().expect("one for each disk"))
    }

    /// Drives all jobs to their end, each on a thread, and shows how far they are.
    fn run(
        &self,
        title: &str,
        backups: &mut [Backup],
        layers: &[Layer],
    ) -> Vec<Result<(), JobError>> {
        let jobs: Vec<_> = backups.iter().map(|backup| backup.job().clone()).collect();
        thread::scope(|scope| {
            let running: Vec<_> = backups
                .iter_mut()
                .zip(layers)
                .zip(&self.disks)
                .map(|((backup, layer), disk)| {
                    let driver = Driver::new(&disk.disk.device, layer, &self.clock);
                    scope.spawn(move || block_on(driver.run_backup(backup)))
                })
                .collect();
            let bar = progress_bar(title);
            while !running.iter().all(|thread| thread.is_finished()) {
                show(&bar, &jobs);
                thread::sleep(Duration::from_millis(20));
            }
            show(&bar, &jobs);
            bar.finish_and_clear();
            println!("{title}: {} copied", BinaryBytes(bar.position()));
            let results = running.into_iter().map(|thread| thread.join());
            results
                .map(|result| result.expect("a driver does not panic"))
                .collect()
        })
    }

    /// Proof 3: what becomes of the bitmaps, and what the layers hold.
    fn check_bitmaps(&self, kind: Kind, outcomes: &[Outcome]) -> Result<()> {
        let mut list = Transaction::new();
        const NOW: &str = "now";
        for disk in &self.disks {
            list.disable(&disk.node, SINCE);
            list.add_disabled(&disk.node, NOW, BitmapOptions::default());
            list.merge(&disk.node, NOW, &[(&disk.node, DAILY)]);
        }
        block_on(list.run())?;
        for (disk, outcome) in self.disks.iter().zip(outcomes) {
            let (now, since) = (disk.take(NOW)?, disk.take(SINCE)?);
            let mut all = outcome.before.clone();
            if kind == Kind::Full {
                all.set_all();
            }
            let mut left = all.clone();
            left.subtract(&outcome.held)?;
            let mut beyond = outcome.held.clone();
            beyond.subtract(&all)?;
            assert!(
                beyond.is_clean(),
                "nothing is copied that was not asked for"
            );
            let mut expected = match (kind, outcome.is_complete()) {
                (_, true) => {
                    assert!(left.is_clean(), "all that was asked for is copied");
                    left
                }
                (kind, false) if kind.may_keep_part() => left,
                (_, false) => all,
            };
            expected.merge_from(&since)?;
            let mut missing = expected.clone();
            missing.subtract(&now)?;
            assert!(missing.is_clean(), "{}: something is forgotten", disk.name);
            let mut beyond = now;
            beyond.subtract(&expected)?;
            if !kind.may_keep_part() || outcome.is_complete() {
                assert!(beyond.is_clean(), "{}: too much is dirty", disk.name);
            }
            // What was in flight when it failed may have come there too late, and counts as missing.
            beyond.subtract(&outcome.held)?;
            assert!(beyond.is_clean(), "{}: what was clean is dirty", disk.name);
        }
        Ok(())
    }

    /// The backups have succeeded: they are the next layer of each chain, and the chains are what the disks
    /// were at their instant.
    fn add_to(&self, chains: &mut [Vec<PathBuf>; DISKS], outcomes: [Outcome; DISKS]) -> Result<()> {
        let mut counts = [0; DISKS];
        for (index, (outcome, chain)) in outcomes.into_iter().zip(chains).enumerate() {
            outcome.result?;
            chain.push(outcome.layer);
            let restored = self.folder.path().join("restored");
            restore(chain, &restored)?;
            check_image(&restored, &outcome.stamps)?;
            std::fs::remove_file(restored)?;
            counts[index] = outcome.stamps[0].count();
        }
        let [first, second] = counts;
        assert!(
            first == second || first == second + 1,
            "the images are not of the same instant: {first} and {second}"
        );
        Ok(())
    }

    /// Writes a number to one disk, and when that is there, to the other.
    fn keep_ledger(&self) -> io::Result<GuestReport> {
        let queues = [0, 1].map(|disk| self.disks[disk].node.queue());
        let mut report = GuestReport::default();
        let mut buf = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            report.changes += 1;
            let change = Change::Write(Stamp::new(NOBODY, report.changes));
            for (queue, disk) in queues.iter().zip(&self.disks) {
                let ticket = match queue.begin_write(guest::nobodys()) {
                    Begin::Go(ticket) => ticket,
                    Begin::Wait(mut pending) => {
                        report.waited += 1;
                        block_on(poll_fn(|cx| pending.poll_begin(cx.waker())))?
                    }
                    Begin::Refused(refused) => return Err(refused.into()),
                };
                apply(ticket, &disk.current, change, &mut buf)?;
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(report)
    }
}

impl VmDisk {
    fn guest<'a>(&'a self, index: u32, stop: &'a AtomicBool) -> Guest<'a> {
        Guest {
            index,
            guests: GUESTS,
            queue: self.node.queue(),
            current: &self.current,
            stop,
            len: LEN,
        }
    }

    /// What the guest knows of each block, the odd one at the end included. Exact while it is held.
    fn stamps(&self) -> Vec<Stamp> {
        let blocks = 0..LEN.div_ceil(BLOCK);
        blocks.map(|block| self.disk.stamps.of(block)).collect()
    }

    /// The bits of a bitmap, which is removed.
    fn take(&self, name: &str) -> Result<HBitmap> {
        let bits = self.node.bitmaps().snapshot(name, SnapshotOf::Bitmap)?;
        self.node.bitmaps().remove(name)?;
        Ok(bits)
    }
}

impl Kind {
    /// Whether what was copied counts, though not all was.
    fn may_keep_part(self) -> bool {
        self == Kind::Incremental(BitmapMode::Always)
    }

    fn options(self) -> BackupOptions {
        let mut options = BackupOptions::default();
        let Kind::Incremental(mode) = self else {
            return options;
        };
        options.sync = BackupSync::Bitmap;
        options.bitmap = Some(DAILY.to_owned());
        options.bitmap_mode = Some(mode);
        options
    }
}

/// A target: a file with holes, and the map of what was written to it.
struct Layer {
    device: FileDevice,
    path: PathBuf,
    state: Mutex<LayerState>,
}

struct LayerState {
    held: HBitmap,
    /// Bytes of data that there is space for.
    room: u64,
}

impl Layer {
    fn new(path: PathBuf, room: u64) -> Result<Self> {
        let device = FileDevice::new(new_file(&path)?, 2)?;
        let held = HBitmap::new(LEN, Granularity::DEFAULT)?;
        Ok(Self {
            device,
            path,
            state: Mutex::new(LayerState { held, room }),
        })
    }

    /// Whether there was space for `len` bytes more, which is then taken.
    fn has_room(&self, len: u64) -> bool {
        let room = &mut self.state.lock().room;
        let rest = room.checked_sub(len);
        *room = rest.unwrap_or(*room);
        rest.is_some()
    }

    fn note(&self, range: ByteRange, result: io::Result<()>) -> io::Result<()> {
        result?;
        let known = self.state.lock().held.set(range);
        known.map(drop).map_err(io::Error::other)
    }

    /// Stores the map, too.
    fn close(self) -> Result<(PathBuf, HBitmap)> {
        let held = self.state.into_inner().held;
        stored::write(
            &held,
            Label::default(),
            &mut File::create_new(map_of(&self.path))?,
        )?;
        Ok((self.path, held))
    }
}

impl BlockDevice for Layer {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.device.limits()
    }
}

impl WriteAt for Layer {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let len = buf.as_ref().len() as u64;
        if !self.has_room(len) {
            return (Err(io::ErrorKind::StorageFull.into()), buf);
        }
        let (result, buf) = self.device.write_at(offset, buf).await;
        (self.note((offset..offset + len).into(), result), buf)
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        let result = self.device.write_zeroes(range, unmap).await;
        self.note(range, result)
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        // What is read there may be anything afterwards, and so also what the layers below hold.
        self.device.discard(range).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.device.flush().await
    }

    async fn settle(&self) {
        self.device.settle().await;
    }
}

/// Lays the layers over each other, the last one on top.
fn restore(chain: &[PathBuf], to: &Path) -> Result<()> {
    let image = new_file(to)?;
    let mut bytes = Vec::new();
    for path in chain {
        let layer = File::open(path)?;
        let map = stored::read(&mut File::open(map_of(path))?, 1 << 20)?.bitmap;
        for run in map.runs_in(0..LEN, 1 << 20) {
            bytes.resize((run.end().min(LEN) - run.start()) as usize, 0);
            layer.read_exact_at(&mut bytes, run.start())?;
            image.write_all_at(&bytes, run.start())?;
        }
    }
    Ok(())
}

/// Proof 1: the image is what the guest knew of its disk.
fn check_image(path: &Path, stamps: &[Stamp]) -> Result<()> {
    let image = File::open(path)?;
    assert_eq!(image.metadata()?.len(), LEN);
    let [mut found, mut expected] = [vec![0; BLOCK as usize], vec![0; BLOCK as usize]];
    for (block, stamp) in (0..).zip(stamps) {
        let at = block * BLOCK;
        let len = (LEN - at).min(BLOCK) as usize;
        match *stamp {
            // The odd end, which the guest never touches.
            Stamp::BEFORE => expected.fill(0),
            stamp => stamp.fill(block, &mut expected),
        }
        image.read_exact_at(&mut found[..len], at)?;
        if found[..len] != expected[..len] {
            let name = path.display();
            return Err(format!("PROOF FAILED: {name} is not as the disk was, at {at}").into());
        }
    }
    Ok(())
}

fn assert_full(outcome: &Outcome) {
    let error = outcome
        .result
        .as_ref()
        .expect_err("there is no room for all");
    let JobError::Io {
        side: Side::Target,
        error,
        ..
    } = error
    else {
        panic!("instead of a full target: {error}");
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path)?;
    file.set_len(LEN)?;
    Ok(file)
}

fn map_of(path: &Path) -> PathBuf {
    path.with_extension("map")
}

fn show(bar: &ProgressBar, jobs: &[Job]) {
    let of_all = jobs.iter().map(|job| job.query().progress);
    let (current, total) = of_all.fold((0, 0), |(current, total), of| {
        (current + of.current, total + of.total)
    });
    bar.set_length(total);
    bar.set_position(current);
}

fn progress_bar(title: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:12} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
    )
    .expect("the template is as the bar wants it");
    ProgressBar::new(0)
        .with_style(style)
        .with_prefix(title.to_owned())
}

/// Stops the guests, also when something is not as it should be: nobody would wait for them else.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
