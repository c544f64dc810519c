//! Backups by the async driver, over devices in memory: each way by which data goes, and a job that reads the
//! frozen view of another.

#[cfg(debug_assertions)]
#[path = "backup_driver/crew.rs"]
mod crew;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{
    AlignedBuf, BlockDevice, BufResult, DynReadAt, DynWriteAt, FrozenDisk, GuestDisk, ReadAt,
    WriteAt,
};
use blockjob::{
    Backup, BackupBuffer, BackupError, BackupOptions, BackupSync, BitmapOptions, ByteRange, Cancel,
    CompareBy, Content, Extent, JobError, JobGroup, Limits, Mirror, MirrorOptions, MirrorSync,
    Node, RangeLimits, Side, Status, Unmap, Verified,
};

const LEN: u64 = 40 * (64 << 10) + 5_000;

/// Bytes in memory, and what was asked of them. Each request is over when it returns, after a few turns of
/// others.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    limits: Limits,
    compressed: Mutex<Vec<ByteRange>>,
    discarded: Mutex<Vec<ByteRange>>,
    read: Mutex<Vec<ByteRange>>,
    /// Where it fetches from, and how often that works.
    source: Option<(Arc<Memory>, AtomicUsize)>,
}

impl Memory {
    fn new(seed: u8) -> Self {
        let byte = |at: u64| (at / 997) as u8 ^ (at % 251) as u8 ^ seed;
        let mut limits = Limits::new(LEN);
        limits.discard = Some(RangeLimits {
            align: 1,
            max: 1 << 30,
        });
        Self {
            bytes: Mutex::new((0..LEN).map(byte).collect()),
            limits,
            compressed: Mutex::default(),
            discarded: Mutex::default(),
            read: Mutex::default(),
            source: None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    fn put(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        self.bytes.lock()[at..at + data.len()].copy_from_slice(data);
    }
}

async fn some_turns() {
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }
}

impl BlockDevice for Memory {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl ReadAt for Memory {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        some_turns().await;
        let len = buf.as_ref().len();
        let at = offset as usize..offset as usize + len;
        buf.as_mut().copy_from_slice(&self.bytes.lock()[at]);
        let range = ByteRange::at(offset, len as u64).unwrap();
        self.read.lock().push(range);
        some_turns().await;
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent {
            len: range.len(),
            content: Content::Data,
            in_top: true,
        })
    }

    fn discard_read(&self, range: ByteRange) {
        self.discarded.lock().push(range);
    }
}

impl WriteAt for Memory {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        some_turns().await;
        self.put(offset, buf.as_ref());
        (Ok(()), buf)
    }

    async fn read_back(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.read_at(offset, buf).await
    }

    async fn write_compressed_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let range = ByteRange::at(offset, buf.as_ref().len() as u64).unwrap();
        self.compressed.lock().push(range);
        self.write_at(offset, buf).await
    }

    async fn copy_from_source(&self, range: ByteRange) -> io::Result<()> {
        let (source, left) = self.source.as_ref().expect("it is offered");
        some_turns().await;
        if left.load(Ordering::Relaxed) == 0 {
            // Half of it is there.
            self.put(range.start(), &vec![0xee; range.len() as usize / 2]);
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        left.fetch_sub(1, Ordering::Relaxed);
        let at = range.start() as usize..range.end() as usize;
        self.put(range.start(), &source.bytes()[at]);
        Ok(())
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        unreachable!("not offered")
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.put(range.start(), &vec![0xdd; range.len() as usize]);
        self.discarded.lock().push(range);
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

#[derive(Clone, Copy)]
struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    async fn sleep_until(&self, _: Duration) {
        std::future::pending::<()>().await;
    }
}

/// A millisecond later each time that somebody looks.
#[derive(Default)]
struct Ticking(AtomicUsize);

impl Clock for Ticking {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, Ordering::Relaxed) as u64)
    }

    async fn sleep_until(&self, at: Duration) {
        while self.now() < at {
            tokio::task::yield_now().await;
        }
    }
}

/// Writes all over the disk until the job is over.
async fn guest(disk: &GuestDisk<Memory>, job: &blockjob::Job) -> u64 {
    let mut writes = 0;
    while !matches!(job.query().status, Status::Concluded | Status::Null) {
        let offset = writes * 77_777 % (LEN - 5_000);
        let mut buf = AlignedBuf::new(5_000, 1).unwrap();
        buf.as_mut().fill(writes as u8);
        disk.write_at(offset, buf).await.0.unwrap();
        writes += 1;
        tokio::task::yield_now().await;
    }
    writes
}

fn options(change: impl FnOnce(&mut BackupOptions)) -> BackupOptions {
    let mut options = BackupOptions::default();
    options.chunk_max = 128 << 10;
    options.workers = 3;
    change(&mut options);
    options
}

/// A backup under a guest's writes, judged.
async fn backed_up(source: Memory, target: Arc<Memory>, options: BackupOptions) -> Backup {
    let source = Arc::new(source);
    let disk = GuestDisk::new(Node::new(LEN), Arc::clone(&source));
    let instant = source.bytes();
    let limits = (source.limits(), target.limits());
    let mut backup = Backup::new(disk.node(), limits.0, limits.1, options).unwrap();
    let job = backup.job().clone();
    job.start().unwrap();
    let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), NoTime);
    let (result, writes) = tokio::join!(driver.run_backup(&mut backup), guest(&disk, &job));
    result.unwrap();
    assert!(writes > 10);
    assert!(target.bytes() == instant && source.bytes() != instant);
    backup
}

#[tokio::test]
async fn compressed_data_goes_cluster_by_cluster() {
    let mut target = Memory::new(9);
    let refused = |target: &Memory, options| {
        Backup::new(&Node::new(LEN), Limits::new(LEN), target.limits(), options).unwrap_err()
    };
    let compressing = options(|options| options.compress = true);
    let error = refused(&target, compressing.clone());
    assert_eq!(error, BackupError::CannotCompress);
    target.limits.compresses = true;
    let both = options(|options| (options.compress, options.offload) = (true, true));
    assert_eq!(refused(&target, both), BackupError::CompressOffloaded);

    let target = Arc::new(target);
    backed_up(Memory::new(1), Arc::clone(&target), compressing).await;
    let compressed = target.compressed.lock();
    assert_eq!(compressed.iter().map(|range| range.len()).sum::<u64>(), LEN);
    assert!(compressed.iter().all(|range| range.len() <= 64 << 10));
}

#[tokio::test]
async fn what_the_target_cannot_fetch_is_read_and_written() {
    for works in [0, 1, 7, usize::MAX] {
        let source = Arc::new(Memory::new(1));
        let mut target = Memory::new(9);
        target.limits.copies_from_source = true;
        target.source = Some((Arc::clone(&source), AtomicUsize::new(works)));
        let target = Arc::new(target);
        // Without a guest: it would write to another copy of the source.
        let offloading = options(|options| options.offload = true);
        let node = Node::new(LEN);
        let limits = (source.limits(), target.limits());
        let mut backup = Backup::new(&node, limits.0, limits.1, offloading).unwrap();
        backup.job().start().unwrap();
        let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), NoTime);
        driver.run_backup(&mut backup).await.unwrap();
        assert!(target.bytes() == source.bytes());
        assert_eq!(source.read.lock().is_empty(), works > 100);
    }
}

#[tokio::test]
async fn a_buffer_is_filled_and_emptied() {
    let (source, target, buffer) = (
        Arc::new(Memory::new(1)),
        Arc::new(Memory::new(9)),
        Arc::new(Memory::new(5)),
    );
    let instant = source.bytes();
    let disk = GuestDisk::new(Node::new(LEN), Arc::clone(&source));
    let buffered = options(|options| options.buffer = Some(BackupBuffer::new(buffer.limits())));
    let limits = (source.limits(), target.limits());
    let mut backup = Backup::new(disk.node(), limits.0, limits.1, buffered).unwrap();
    let job = backup.job().clone();
    job.start().unwrap();
    let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), NoTime);
    let driver = driver.with_buffer(Arc::clone(&buffer));
    let (result, _) = tokio::join!(driver.run_backup(&mut backup), guest(&disk, &job));
    result.unwrap();
    assert!(target.bytes() == instant && source.bytes() != instant);
    let (left, peak) = backup.buffer_bytes();
    assert!(left == 0 && peak >= 64 << 10, "{left} of {peak}");
    assert!(!buffer.discarded.lock().is_empty());
}

#[tokio::test]
async fn a_buffer_that_cannot_discard_does_not_keep_the_backup_from_its_end() {
    let [source, target, buffer] = [1, 9, 5].map(|seed| Arc::new(Memory::new(seed)));
    let instant = source.bytes();
    let disk = GuestDisk::new(Node::new(LEN), Arc::clone(&source));
    let mut limits = buffer.limits();
    limits.discard = None;
    let buffered = options(|options| options.buffer = Some(BackupBuffer::new(limits)));
    let limits = (source.limits(), target.limits());
    let mut backup = Backup::new(disk.node(), limits.0, limits.1, buffered).unwrap();
    let job = backup.job().clone();
    job.start().unwrap();
    let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), NoTime);
    let driver = driver.with_buffer(Arc::clone(&buffer));
    let both = async { tokio::join!(driver.run_backup(&mut backup), guest(&disk, &job)).0 };
    let patience = Duration::from_secs(60);
    let result = tokio::time::timeout(patience, both).await;
    result.expect("it comes to an end").unwrap();
    assert!(target.bytes() == instant && source.bytes() != instant);
    let (left, peak) = backup.buffer_bytes();
    assert!(
        left > 0 && left == peak,
        "its space is never given back: {left} of {peak}"
    );
    assert!(buffer.discarded.lock().is_empty());
}

#[tokio::test]
async fn the_source_is_told_what_was_copied() {
    let source = Memory::new(1);
    let target = Arc::new(Memory::new(9));
    let telling = options(|options| options.discard_source = true);
    let source = Arc::new(source);
    let node = Node::new(LEN);
    let limits = (source.limits(), target.limits());
    let mut backup = Backup::new(&node, limits.0, limits.1, telling).unwrap();
    backup.job().start().unwrap();
    // Through the object-safe twins, which must pass it on.
    let any_source: Box<dyn DynReadAt<AlignedBuf>> = Box::new(Arc::clone(&source));
    let any_target: Box<dyn DynWriteAt<AlignedBuf>> = Box::new(Arc::clone(&target));
    let driver = Driver::new(any_source, any_target, NoTime);
    driver.run_backup(&mut backup).await.unwrap();
    let told = source.discarded.lock();
    assert_eq!(told.iter().map(|range| range.len()).sum::<u64>(), LEN);
}

/// A guest never waits for the slow target of the second job, only for the first one's.
#[tokio::test]
async fn a_job_can_read_the_frozen_view_of_another() {
    let (source, fleece, target) = (
        Arc::new(Memory::new(1)),
        Arc::new(Memory::new(5)),
        Arc::new(Memory::new(9)),
    );
    let instant = source.bytes();
    let disk = GuestDisk::new(Node::new(LEN), Arc::clone(&source));
    let fleecing = options(|options| {
        (options.sync, options.view) = (BackupSync::None, true);
    });
    let limits = (source.limits(), fleece.limits());
    let mut first = Backup::new(disk.node(), limits.0, limits.1, fleecing).unwrap();
    let view = first.view().unwrap();
    let frozen = FrozenDisk::new(view.clone(), Arc::clone(&source), Arc::clone(&fleece));
    let first_job = first.job().clone();
    let early = frozen.read_at(0, AlignedBuf::new(512, 1).unwrap()).await.0;
    assert!(early.unwrap_err().to_string().contains("has not begun"));
    first_job.start().unwrap();
    let first_driver = Driver::new(Arc::clone(&source), Arc::clone(&fleece), NoTime);

    let view_node = Node::new(LEN);
    let telling = options(|options| options.discard_source = true);
    let mut second = Backup::new(&view_node, frozen.limits(), target.limits(), telling).unwrap();
    let second_job = second.job().clone();
    let second_driver = Driver::new(&frozen, Arc::clone(&target), NoTime);
    let reading = async {
        while view.accessible().is_err() {
            tokio::task::yield_now().await;
        }
        // The guest is ahead of the reader in places, and behind it in others.
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
        second_job.start().unwrap();
        second_driver.run_backup(&mut second).await.unwrap();
        // All was given up, so nobody can read it any more.
        assert!(view.accessible().unwrap().is_clean());
        let late = frozen.read_at(0, AlignedBuf::new(512, 1).unwrap()).await.0;
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        first_job.cancel(Cancel::Force).unwrap();
    };
    let (result, (), writes) = tokio::join!(
        first_driver.run_backup(&mut first),
        reading,
        guest(&disk, &first_job)
    );
    assert!(matches!(result, Err(JobError::Cancelled { .. })));
    assert!(writes > 10 && source.bytes() != instant);
    assert!(
        target.bytes() == instant,
        "the copy is later than the instant"
    );
    assert!(view.begin_read((0..512).into()).is_err());
    let read = fleece.read.lock().len();
    assert!(read > 0, "nothing was saved");
}

/// A backup is compared with the frozen view while the guest writes on: what differs is told, and mended.
#[tokio::test]
async fn a_backup_is_verified_against_the_frozen_view() {
    let (source, fleece) = (Arc::new(Memory::new(1)), Arc::new(Memory::new(5)));
    let instant = source.bytes();
    let mut backup = Memory::new(1); // holds the same
    backup.limits.compare = Some(CompareBy::Reading);
    backup.put(100_000, &[0; 300]);
    backup.put(1_500_000, &[0; 1]);
    let backup = Arc::new(backup);

    let disk = GuestDisk::new(Node::new(LEN), Arc::clone(&source));
    let fleecing = options(|options| {
        (options.sync, options.view) = (BackupSync::None, true);
    });
    let limits = (source.limits(), fleece.limits());
    let mut first = Backup::new(disk.node(), limits.0, limits.1, fleecing).unwrap();
    let view = first.view().unwrap();
    let frozen = FrozenDisk::new(view.clone(), Arc::clone(&source), Arc::clone(&fleece));
    let first_job = first.job().clone();
    first_job.start().unwrap();
    let first_driver = Driver::new(Arc::clone(&source), Arc::clone(&fleece), NoTime);

    // A mirror of nothing, on a node of its own: nobody writes to the frozen disk.
    let mut options = MirrorOptions::default();
    options.sync = MirrorSync::None;
    let node = Node::new(LEN);
    let limits = (frozen.limits(), backup.limits());
    let mut mirror = Mirror::new(&node, limits.0, limits.1, options).unwrap();
    let job = mirror.job().clone();
    let driver = Driver::new(&frozen, Arc::clone(&backup), Ticking::default());
    let verifying = async {
        while view.accessible().is_err() {
            tokio::task::yield_now().await;
        }
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
        job.start().unwrap();
        let asking = async {
            while job.query().status != Status::Ready {
                tokio::task::yield_now().await;
            }
            job.verify().unwrap();
            loop {
                match job.query().verification {
                    Some(found) if found.state == Verified::Whole => break,
                    _ => tokio::task::yield_now().await,
                }
            }
            job.cancel(Cancel::Soft).unwrap();
        };
        let (driven, ()) = tokio::join!(driver.run(&mut mirror), asking);
        assert!(matches!(driven, Driven::Done(Ok(()))));
        first_job.cancel(Cancel::Force).unwrap();
    };
    let (_, (), writes) = tokio::join!(
        first_driver.run_backup(&mut first),
        verifying,
        guest(&disk, &first_job)
    );
    assert!(writes > 10 && source.bytes() != instant);
    let found = job.query().verification.unwrap();
    assert_eq!((found.compared, found.differing), (LEN, 2 * (64 << 10)));
    let differing = mirror.differing().unwrap();
    assert!(differing.iter().eq([65536, 1_441_792]), "{differing:?}");
    assert!(backup.bytes() == instant, "it is mended");
}

/// A disk that moves and another that is backed up end together, or neither does.
#[tokio::test]
async fn a_mirror_and_a_backup_of_one_group_end_together() {
    for is_cancelled in [false, true] {
        let memories = [1, 2, 9, 9].map(|seed| Arc::new(Memory::new(seed)));
        let [moved, kept, mirror_target, backup_target] = &memories;
        let instant = kept.bytes();
        let disk = GuestDisk::new(Node::new(LEN), Arc::clone(moved));
        let other = Node::new(LEN);
        let guard = other.quiesce().await;
        let bitmaps = other.bitmaps();
        bitmaps
            .add(&guard, "daily", BitmapOptions::default())
            .unwrap();
        drop(guard);
        let write = |at| {
            other
                .begin_write((at..at + 1).into())
                .go()
                .unwrap()
                .finish(());
        };
        write(0);

        let group = JobGroup::new();
        let mut mirror_options = MirrorOptions::default();
        mirror_options.job.group = Some(group.clone());
        let limits = moved.limits();
        let mut mirror = Mirror::new(disk.node(), limits, limits, mirror_options).unwrap();
        let incremental = options(|options| {
            options.job.group = Some(group.clone());
            options.job.auto_dismiss = false;
            options.sync = BackupSync::Incremental;
            options.bitmap = Some("daily".to_owned());
        });
        let mut backup = Backup::new(&other, limits, limits, incremental).unwrap();
        let (mirror_job, backup_job) = (mirror.job().clone(), backup.job().clone());
        mirror_job.start().unwrap();
        backup_job.start().unwrap();
        let mirrors = Driver::new(Arc::clone(moved), Arc::clone(mirror_target), NoTime);
        let backups = Driver::new(Arc::clone(kept), Arc::clone(backup_target), NoTime);

        let moving = async {
            match mirrors.run(&mut mirror).await {
                Driven::Switch(switch) => {
                    assert!(moved.bytes() == mirror_target.bytes());
                    let to = Arc::clone(mirror_target);
                    disk.replace(switch.guard(), to)
                        .ok()
                        .expect("it is its node");
                    switch.commit();
                    mirrors.run(&mut mirror).await
                }
                driven => driven,
            }
        };
        let asking = async {
            while backup_job.query().status != Status::Waiting {
                tokio::task::yield_now().await;
            }
            // Its own work is done, and it waits for the mirror: neither has succeeded yet.
            write(1 << 20);
            while mirror_job.query().status != Status::Ready {
                tokio::task::yield_now().await;
            }
            match is_cancelled {
                true => mirror_job.cancel(Cancel::Force).unwrap(),
                false => mirror_job.complete().unwrap(),
            }
        };
        let (driven, backed_up, ()) = tokio::join!(moving, backups.run_backup(&mut backup), asking);
        let Driven::Done(mirrored) = driven else {
            panic!("its switch was committed");
        };
        assert_eq!(
            (mirrored.is_err(), backed_up.is_err()),
            (is_cancelled, is_cancelled)
        );
        assert_eq!(backup_target.bytes()[..4096], instant[..4096]);
        // What came later is dirty, and after a failure what was there at the instant, too.
        let dirty = bitmaps.query("daily").unwrap().dirty_bytes;
        assert_eq!(dirty, if is_cancelled { 2 } else { 1 } * 65536);
    }
}

/// Whoever is given the target for the source would overwrite the guest's disk.
#[tokio::test]
async fn devices_that_are_not_those_of_the_job_are_asked_for_nothing() {
    let named = |seed, identity, len| {
        let mut device = Memory::new(seed);
        device.limits.identity = identity;
        device.limits.len = len;
        Arc::new(device)
    };
    let (source, target) = (named(1, Some(1), LEN), named(2, Some(2), LEN));
    let nameless = named(3, None, LEN);
    let limits = (source.limits(), target.limits());
    let started = |node: &Node| {
        let options = BackupOptions::default();
        let backup = Backup::new(node, limits.0, limits.1, options).unwrap();
        backup.job().start().unwrap();
        backup
    };
    let over = |(from, to): (&Arc<Memory>, &Arc<Memory>)| {
        Driver::new(Arc::clone(from), Arc::clone(to), NoTime)
    };
    for (case, devices, wrong) in [
        ("the other way round", (&target, &source), Side::Source),
        ("another", (&named(1, Some(3), LEN), &target), Side::Source),
        ("twice the source", (&source, &source), Side::Target),
        ("twice the target", (&target, &target), Side::Source),
        ("half a name", (&nameless, &source), Side::Target),
        (
            "too short",
            (&source, &named(2, None, LEN - 1)),
            Side::Target,
        ),
    ] {
        let before = [&source, &target].map(|device| device.bytes());
        let is_wrong =
            |result| matches!(result, Err(JobError::WrongDevice { side }) if side == wrong);
        let node = Node::new(LEN);
        let (job, result) = {
            let mut backup = started(&node);
            let result = over(devices).run_backup(&mut backup).await;
            (backup.job().clone(), result)
        };
        assert!(is_wrong(result.clone()), "{case}: {result:?}");
        assert_eq!(job.query().status, Status::Null, "{case}");

        let options = MirrorOptions::default();
        let mut mirror = Mirror::new(&node, limits.0, limits.1, options).unwrap();
        mirror.job().start().unwrap();
        let Driven::Done(result) = over(devices).run(&mut mirror).await else {
            panic!("{case}: it has copied nothing")
        };
        assert!(is_wrong(result.clone()), "{case}: {result:?}");
        drop(mirror);

        // Nor by the thread of a guest, with nobody else there.
        let mut backup = started(&node);
        let driver = over(devices);
        driver.crew(&mut backup).save_for(async {}).await;
        assert!(is_wrong(driver.run_backup(&mut backup).await), "{case}");
        assert!(
            [&source, &target].map(|device| device.bytes()) == before,
            "{case}"
        );
    }

    // Names that the job was not told of are no reason to fail, nor is a device that is longer now.
    for devices in [
        (&nameless, &target),
        (&source, &nameless),
        (&source, &named(9, None, LEN + 1)),
    ] {
        let mut backup = started(&Node::new(LEN));
        over(devices).run_backup(&mut backup).await.unwrap();
        assert!(devices.0.bytes() == devices.1.bytes());
    }
    // What a job has decided on is not undone.
    let mut mirror = Mirror::new(
        &Node::new(LEN),
        limits.0,
        limits.1,
        MirrorOptions::default(),
    )
    .unwrap();
    mirror.job().start().unwrap();
    let job = mirror.job().clone();
    let complete = async {
        while job.complete().is_err() {
            tokio::task::yield_now().await;
        }
    };
    let driver = over((&source, &target));
    let (driven, ()) = tokio::join!(driver.run(&mut mirror), complete);
    let Driven::Switch(switch) = driven else {
        panic!("it is to complete")
    };
    switch.commit();
    let Driven::Done(Ok(())) = over((&target, &source)).run(&mut mirror).await else {
        panic!("it has switched")
    };
}
