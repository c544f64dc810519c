//! Mirrors between disks that QEMU's own programs hold, and backups of them, judged by those programs:
//! `qemu-img compare`, `check` and `map`, and QEMU's own backup of the same disk.
//!
//! Each test has its own directory and its own servers, and leaves nothing behind. Where a program is
//! not installed the test says `SKIPPED` and passes; with `CI=true` it fails.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "tests have threads and time; the rule is for the library"
)]

#[path = "migration/qemu.rs"]
mod migration;
mod support;
#[path = "migration/truth.rs"]
mod truth;

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use blockjob::driver::{Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, GuestDisk, HeapPool, WriteAt};
use blockjob::{
    Backup, BackupOptions, BackupSync, BitmapMode, BitmapOptions, ByteRange, Cancel, ChangedSince,
    Checkpoint, CheckpointId, ErrorAction, Event, Granularity, HBitmap, Job, JobError, Mirror,
    MirrorOptions, MirrorSync, Node, OnError, Resume, Side, SnapshotOf, Status, Transaction, Unmap,
};
use serde_json::json;
use tokio::task::JoinHandle;

use support::RealTime;
use support::guest::{Guests, Path, Random};
use support::nbd::Nbd;
use support::qemu::{self, Export, Image, Scratch, StorageDaemon};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Nothing here takes nearly as long on a machine that is not stuck.
const PATIENCE: Duration = Duration::from_secs(120);

type NbdDriver = Driver<Nbd, Nbd, HeapPool, RealTime>;

/// A job that runs as a task of its own.
struct Running {
    job: Job,
    task: JoinHandle<(Driven, NbdDriver, Mirror)>,
}

impl Running {
    fn start(source: Nbd, target: Nbd, node: &Node, options: MirrorOptions) -> Self {
        let mirror =
            Mirror::new(node, source.limits(), target.limits(), options).expect("they fit");
        let job = mirror.job().clone();
        job.start().expect("it was just made");
        let driver = Driver::new(source, target, RealTime::start());
        Self {
            job,
            task: drive(driver, mirror),
        }
    }

    /// Takes events until one is as wanted. One that never comes after the end of the job is a panic.
    async fn wait_for(&self, mut is_wanted: impl FnMut(&Event) -> bool) {
        let mut last = None;
        loop {
            let event =
                tokio::time::timeout(PATIENCE, poll_fn(|cx| self.job.poll_event(cx.waker())))
                    .await
                    .unwrap_or_else(|_| panic!("nothing after {last:?}: {:?}", self.job.query()));
            if is_wanted(&event) {
                return;
            }
            assert!(
                !matches!(event, Event::Status(Status::Null)),
                "over after {last:?}"
            );
            last = Some(event);
        }
    }

    async fn wait_until_ready(&self) {
        self.wait_for(|event| matches!(event, Event::Ready { .. }))
            .await;
    }

    async fn wait_until_copied(&self, bytes: u64) {
        while self.job.query().progress.current < bytes {
            assert!(!self.task.is_finished(), "{:?}", self.job.query());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Completes a ready job; `switch` is called with the guest held.
    async fn complete(self, switch: impl FnOnce(&blockjob::Switch)) {
        self.job.complete().expect("it is ready");
        let (driven, driver, mirror) = join(self.task).await;
        let Driven::Switch(instant) = driven else {
            panic!("instead of the switch: {driven:?}");
        };
        switch(&instant);
        instant.commit();
        let (driven, ..) = join(drive(driver, mirror)).await;
        assert!(matches!(driven, Driven::Done(Ok(()))), "{driven:?}");
    }

    async fn result(self) -> Result<(), JobError> {
        match join(self.task).await.0 {
            Driven::Done(result) => result,
            Driven::Switch(_) | Driven::SwitchBack(_) => panic!("nobody asked it to complete"),
        }
    }
}

/// Drops the driver's future again and again while operations are in flight, then lets it run.
async fn drive_with_interruptions(
    driver: &NbdDriver,
    mirror: &mut Mirror,
    seed: u64,
) -> Result<Driven, tokio::time::error::Elapsed> {
    let mut random = Random::new(seed);
    for _ in 0..40 {
        let slice = Duration::from_millis(1 + random.below(15));
        if let Ok(driven) = tokio::time::timeout(slice, driver.run(mirror)).await {
            return Ok(driven);
        }
        mirror.check_invariants();
    }
    tokio::time::timeout(PATIENCE, driver.run(mirror)).await
}

/// Spawning proves that the driver's future over such devices is `Send`.
fn drive(driver: NbdDriver, mut mirror: Mirror) -> JoinHandle<(Driven, NbdDriver, Mirror)> {
    tokio::spawn(async move {
        let driven = driver.run(&mut mirror).await;
        (driven, driver, mirror)
    })
}

async fn join<T>(task: JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, task)
        .await
        .expect("it comes to an end")
        .expect("it does not panic")
}

fn options() -> MirrorOptions {
    let mut options = MirrorOptions::default();
    options.job.id = Some("interop".to_owned());
    options
}

/// A guest's disk on a connection of its own to the source.
fn guest_disk(source: &mut Export) -> Arc<GuestDisk<Nbd>> {
    let device = source.connect();
    let node = Node::new(device.limits().len);
    Arc::new(GuestDisk::new(node, Arc::new(device)))
}

/// As a qcow2 image with clusters of that size, and no backing file.
fn as_qcow2(target: Nbd, cluster: u64) -> Nbd {
    target.with_limits(|limits| {
        limits.cluster = Some(u32::try_from(cluster).expect("at most 2 MiB"));
        limits.cheap_zeroes = true;
    })
}

/// Data, zeroes that have storage, zeroes that have none, and holes, at odd places, too.
fn fill(image: &Image) {
    image.io(&[
        "write -P 0x11 0 10M",
        "write -P 0x22 12M 300k",
        "write -P 0x33 16777000 70000",
        "write -z 18M 3M",
        "write -z -u 22M 1M",
        "write -P 0x44 30M 9M",
        "discard 34M 1M",
        "write -P 0x00 40M 1M",
        "write -P 0x55 63M 1M",
    ]);
}

/// A mirror of 64 MiB under guest writes, up to the instant at which both must be equal.
async fn mirror_up_to_the_switch(name: &str, seed: u64, garbage: bool, cheap_zeroes: bool) {
    if qemu::is_missing(name) {
        return;
    }
    eprintln!("{name}: seed {seed}");
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 64 * MIB);
    fill(&source);
    let before = source.content();
    let target = scratch.create("target.qcow2", &[], 64 * MIB);
    if garbage {
        target.io(&["write -P 0xaa 0 64M"]);
    }
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let guests = Guests::start(&disk, &before, Path::Gate, 4, seed);

    let device = target.connect().with_limits(|limits| {
        limits.cluster = Some(64 << 10);
        limits.cheap_zeroes = cheap_zeroes;
    });
    let mut options = options();
    options.job.speed = 32 * MIB;
    let running = Running::start(source.connect(), device, disk.node(), options);
    guests.write_more(150).await;
    running.job.set_speed(0).expect("it is not over");
    running.wait_until_ready().await;
    guests.write_more(150).await;
    // From the switch on not one write begins, so that both images stay as they were at that instant.
    running.complete(|_| guests.ask_to_stop()).await;

    let writes = guests.writes();
    let promise = guests.stop().await;
    disk.device().flush().await.expect("a flush of the source");
    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    source.check();
    target.check();
    promise.assert_kept(&target.content());
    eprintln!("{name}: identical after {writes} guest writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_switch_both_images_are_identical() {
    mirror_up_to_the_switch("at_the_switch_both_images_are_identical", 1, false, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_target_held_before_does_not_matter() {
    let name = "what_the_target_held_before_does_not_matter";
    mirror_up_to_the_switch(name, 2, true, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_overwritten_without_cheap_zeroes_too() {
    let name = "garbage_is_overwritten_without_cheap_zeroes_too";
    mirror_up_to_the_switch(name, 3, true, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_is_dropped_again_and_again_loses_nothing() {
    let name = "a_driver_that_is_dropped_again_and_again_loses_nothing";
    if qemu::is_missing(name) {
        return;
    }
    let seed = 10;
    eprintln!("{name}: seed {seed}");
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 64 * MIB);
    fill(&source);
    let before = source.content();
    let target = scratch.create("target.qcow2", &[], 64 * MIB);
    target.io(&["write -P 0xaa 0 64M"]);
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let guests = Guests::start(&disk, &before, Path::Gate, 4, seed);

    let (from, to) = (source.connect(), as_qcow2(target.connect(), 64 * KIB));
    let mut mirror =
        Mirror::new(disk.node(), from.limits(), to.limits(), options()).expect("they fit");
    let job = mirror.job().clone();
    job.start().expect("it was just made");
    let driver = Driver::new(from, to, RealTime::start());
    let completer = tokio::spawn(async move {
        while job.query().status != Status::Ready {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        job.complete().expect("it is ready");
    });
    let driven = drive_with_interruptions(&driver, &mut mirror, seed).await;
    let Ok(Driven::Switch(switch)) = driven else {
        panic!("instead of the switch: {driven:?}");
    };
    guests.ask_to_stop();
    switch.commit();
    assert!(matches!(
        driver.run(&mut mirror).await,
        Driven::Done(Ok(()))
    ));
    completer.await.expect("it was ready");
    let promise = guests.stop().await;
    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    target.check();
    promise.assert_kept(&target.content());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_switch_the_guest_goes_on_with_the_target_only() {
    let name = "after_the_switch_the_guest_goes_on_with_the_target_only";
    if qemu::is_missing(name) {
        return;
    }
    let seed = 4;
    eprintln!("{name}: seed {seed}");
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 64 * MIB);
    fill(&source);
    let before = source.content();
    let target = scratch.create("target.qcow2", &[], 64 * MIB);
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let guests = Guests::start(&disk, &before, Path::Disk, 4, seed);

    let to = as_qcow2(target.connect(), 64 * KIB);
    let running = Running::start(source.connect(), to, disk.node(), options());
    running.wait_until_ready().await;
    guests.write_more(200).await;
    let other = Arc::new(target.connect());
    let mut old = None;
    running
        .complete(|switch| {
            let replaced = disk.replace(switch.guard(), other);
            old = Some(replaced.expect("the guard is that of this node"));
        })
        .await;
    // Nobody has the old device any more: a write to it could not even be made.
    let old = Arc::into_inner(old.expect("it was switched"));
    drop(old.expect("no write is in flight on it"));
    let source = source.shut_down();
    let content_at_switch = source.content();

    guests.write_more(200).await;
    let promise = guests.stop().await;
    disk.flush().await.expect("a flush of the target");
    let target = target.shut_down();
    target.check();
    promise.assert_kept(&target.content());
    assert!(
        source.content() == content_at_switch && target.content() != content_at_switch,
        "only the target is written after the switch"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_soft_cancel_leaves_a_copy_and_the_guest_where_it_is() {
    let name = "a_soft_cancel_leaves_a_copy_and_the_guest_where_it_is";
    if qemu::is_missing(name) {
        return;
    }
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 64 * MIB);
    fill(&source);
    let target = scratch.create("target.qcow2", &[], 64 * MIB);
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let to = as_qcow2(target.connect(), 64 * KIB);
    let running = Running::start(source.connect(), to, disk.node(), options());
    running.wait_until_ready().await;
    running.job.cancel(Cancel::Soft).expect("it is ready");
    running.result().await.expect("a soft cancel is a success");

    let target = target.shut_down();
    let copied = target.content();
    let mut buf = AlignedBuf::new(4096, 1).expect("there is memory");
    buf.as_mut().fill(0x77);
    let (written, _) = disk.write_at(MIB, buf).await;
    written.expect("the guest is on the source still");
    let source = source.shut_down();
    let mut wanted = copied;
    wanted[MIB as usize..][..4096].fill(0x77);
    assert!(source.content() == wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_topmost_layer_is_copied_onto_an_overlay() {
    let name = "only_the_topmost_layer_is_copied_onto_an_overlay";
    if qemu::is_missing(name) {
        return;
    }
    let scratch = Scratch::new();
    let base = scratch.create("base.qcow2", &[], 32 * MIB);
    base.io(&["write -P 0xb0 0 16M", "write -P 0xb1 20M 4M"]);
    let base_path = base.path.to_str().expect("our own name").to_owned();
    let overlay = ["-b", base_path.as_str(), "-F", "qcow2"];
    let source = scratch.create("source.qcow2", &overlay, 32 * MIB);
    source.io(&[
        "write -P 0x71 1M 1M",
        // A part of a cluster, the rest of which is filled from the base.
        "write -P 0x72 4100k 3k",
        // Zeroes that hide what the base holds, and zeroes where it holds nothing.
        "write -z 6M 192k",
        "write -z 18M 128k",
        "write -P 0x73 21M 64k",
        "write -P 0x74 33488896 65536",
    ]);
    let target = scratch.create("target.qcow2", &overlay, 32 * MIB);
    let expected = source.map();

    let (mut source, mut target) = (source.export(&["-A"]), target.export(&[]));
    let from = source.connect();
    assert!(from.tells_depth(), "qemu-nbd -A tells the allocation depth");
    let node = Node::new(from.limits().len);
    let mut options = options();
    options.sync = MirrorSync::Top;
    let to = as_qcow2(target.connect(), 64 * KIB);
    let running = Running::start(from, to, &node, options);
    running.wait_until_ready().await;
    running.complete(|_| ()).await;

    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    target.check();
    let (expected, found) = (tops(&expected), tops(&target.map()));
    let has_data = |at: u64| found.iter().any(|&(start, end)| (start..end).contains(&at));
    assert!(has_data(MIB) && has_data(6 * MIB), "{found:x?}");
    for (start, end) in &found {
        assert!(
            expected.iter().any(|run| run.0 <= *start && *end <= run.1),
            "the target's own layer holds {start:#x}..{end:#x}, the source's only {expected:x?}"
        );
    }
}

/// A mirror that is slow enough to be interrupted, under guest writes.
struct Interrupted {
    source: Export,
    target: Export,
    guests: Guests,
    running: Running,
    _scratch: Scratch,
}

impl Interrupted {
    async fn start(seed: u64, on_target_error: OnError) -> Self {
        let scratch = Scratch::new();
        let source = scratch.create("source.qcow2", &[], 64 * MIB);
        fill(&source);
        let before = source.content();
        let target = scratch.create("target.qcow2", &[], 64 * MIB);
        let (mut source, mut target) = (source.export(&[]), target.export(&[]));
        let disk = guest_disk(&mut source);
        let guests = Guests::start(&disk, &before, Path::Disk, 4, seed);
        let mut options = options();
        options.job.speed = 8 * MIB;
        options.job.on_target_error = on_target_error;
        let to = target.connect();
        let running = Running::start(source.connect(), to, disk.node(), options);
        running.wait_until_copied(2 * MIB).await;
        assert_eq!(running.job.query().status, Status::Running);
        Self {
            source,
            target,
            guests,
            running,
            _scratch: scratch,
        }
    }
}

/// The guest has not noticed anything: each of its writes is on the source.
async fn assert_guest_unharmed(guests: Guests, source: Export) {
    guests.write_more(100).await;
    let promise = guests.stop().await;
    let source = source.shut_down();
    source.check();
    promise.assert_kept(&source.content());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_fails_the_job_and_not_the_guest() {
    let name = "a_target_that_dies_fails_the_job_and_not_the_guest";
    if qemu::is_missing(name) {
        return;
    }
    eprintln!("{name}: seed 5");
    let it = Interrupted::start(5, OnError::Report).await;
    it.target.kill();
    let result = it.running.result().await;
    assert!(
        matches!(
            result,
            Err(JobError::Io {
                side: Side::Target,
                ..
            })
        ),
        "{result:?}"
    );
    assert_guest_unharmed(it.guests, it.source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_stops_the_job_and_not_the_guest() {
    let name = "a_target_that_dies_stops_the_job_and_not_the_guest";
    if qemu::is_missing(name) {
        return;
    }
    eprintln!("{name}: seed 6");
    let it = Interrupted::start(6, OnError::Stop).await;
    it.target.kill();
    let job = &it.running.job;
    it.running
        .wait_for(|event| match event {
            Event::Error(error) => {
                assert_eq!(
                    (error.side, error.action),
                    (Side::Target, ErrorAction::Stop)
                );
                true
            }
            _ => false,
        })
        .await;
    it.running
        .wait_for(|event| matches!(event, Event::Status(Status::Paused)))
        .await;
    it.guests.write_more(100).await;
    // The target is dead still: the job stops again, and nothing is lost by that either.
    job.resume().expect("the error has paused it");
    it.running
        .wait_for(|event| matches!(event, Event::Error(_)))
        .await;
    it.running
        .wait_for(|event| matches!(event, Event::Status(Status::Paused)))
        .await;
    assert!(job.query().is_user_paused);
    it.guests.write_more(100).await;

    job.cancel(Cancel::Force).expect("it is paused");
    let result = it.running.result().await;
    assert!(
        matches!(result, Err(JobError::Cancelled { abandoned: 0 })),
        "{result:?}"
    );
    assert_guest_unharmed(it.guests, it.source).await;
}

/// The server of the target is killed in the midst of it. Another process, so to speak, goes on from what is stored:
/// the checkpoint, and the bitmap of what was written since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_whose_target_was_killed_goes_on_with_the_rest() {
    let name = "a_mirror_whose_target_was_killed_goes_on_with_the_rest";
    if qemu::is_missing(name) {
        return;
    }
    eprintln!("{name}: seed 7");
    let id = CheckpointId {
        source: [1; 16],
        target: [2; 16],
        generation: 1,
    };
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 64 * MIB);
    fill(&source);
    let before = source.content();
    let image = scratch.create("target.qcow2", &[], 64 * MIB);
    let (mut source, mut target) = (source.export(&[]), image.export(&[]));
    let disk = guest_disk(&mut source);
    let node = disk.node();
    let guard = node.quiesce().try_guard().expect("nobody writes yet");
    let bitmaps = node.bitmaps();
    bitmaps
        .add(&guard, "since", BitmapOptions::default())
        .expect("it is new");
    drop(guard);
    let guests = Guests::start(&disk, &before, Path::Disk, 1, 7);

    let mut slow = options();
    slow.job.speed = 16 * MIB;
    let (from, to) = (source.connect(), target.connect());
    let mut mirror = Mirror::new(node, from.limits(), to.limits(), slow).expect("they fit");
    let job = mirror.job().clone();
    job.start().expect("it is new");
    let driver = Driver::new(from, to, RealTime::start());
    while job.query().progress.current < 8 * MIB {
        let slice = Duration::from_millis(20);
        let ended = tokio::time::timeout(slice, driver.run(&mut mirror)).await;
        assert!(ended.is_err(), "{:?}", job.query());
    }
    // What is confirmed counts once it is durable: first the bitmap, then the checkpoint, then a flush.
    bitmaps.clear("since").expect("nobody has it");
    let stored = mirror.checkpoint(id).expect("it has begun");
    target.connect().flush().await.expect("it lives");
    let first = Running {
        job: job.clone(),
        task: drive(driver, mirror),
    };
    guests.write_more(20).await;
    first.wait_until_copied(12 * MIB).await;
    target.kill();
    let result = first.result().await;
    assert!(matches!(result, Err(JobError::Io { .. })), "{result:?}");
    guests.write_more(20).await;
    guests.ask_to_stop();
    // The last of them settle.
    let guard = node.quiesce().await;
    let checkpoint = Checkpoint::decode(&stored, 1 << 20).expect("it is our own");
    let since = bitmaps
        .snapshot("since", SnapshotOf::Bitmap)
        .expect("it is idle");
    let left =
        HBitmap::union(checkpoint.left(), &since, since.granularity()).expect("they are as long");
    drop(guard);
    let confirmed = 64 * MIB - checkpoint.left().dirty_bytes_in_len();
    assert!(confirmed > 0 && left.dirty_bytes_in_len() < 64 * MIB);

    image.mend_leaks();
    let mut target = image.export(&[]);
    let (from, to) = (source.connect(), target.connect());
    let mut options = options();
    options.bitmap = Some("since".to_owned());
    options.bitmap_mode = Some(BitmapMode::OnSuccess);
    let resume = Resume {
        checkpoint,
        id,
        changed: ChangedSince::InBitmap,
    };
    let mirror = Mirror::resume(node, from.limits(), to.limits(), options, resume);
    let mirror = mirror.expect("it is of these disks");
    let job = mirror.job().clone();
    job.start().expect("it is new");
    let driver = Driver::new(from, to, RealTime::start());
    let task = drive(driver, mirror);
    let second = Running { job, task };
    second.wait_until_ready().await;
    let sent = second.job.query().progress.current;
    assert_eq!(sent, left.dirty_bytes_in_len(), "what is left, and no more");
    second.complete(|_| ()).await;

    let promise = guests.stop().await;
    disk.device().flush().await.expect("a flush of the source");
    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    target.check();
    promise.assert_kept(&target.content());
    eprintln!("{name}: {confirmed} bytes were confirmed, {sent} sent after that");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_by_force_does_not_wait_for_a_target_that_stands_still() {
    let name = "a_cancel_by_force_does_not_wait_for_a_target_that_stands_still";
    if qemu::is_missing(name) {
        return;
    }
    eprintln!("{name}: seed 7");
    let it = Interrupted::start(7, OnError::Report).await;
    it.target.freeze();
    it.guests.write_more(100).await;
    assert!(!it.running.task.is_finished());
    it.running.job.cancel(Cancel::Force).expect("it runs");
    let result = it.running.result().await;
    // Not abandoned: giving up the connection has ended them.
    assert!(
        matches!(result, Err(JobError::Cancelled { abandoned: 0 })),
        "{result:?}"
    );
    it.target.kill();
    assert_guest_unharmed(it.guests, it.source).await;
}

/// A mirror with a granularity of 64 KiB, under guest writes, of disks of any length.
async fn mirror_of_odd_disks(name: &str, seed: u64, source: Image, target: Image, cluster: u64) {
    eprintln!("{name}: seed {seed}");
    source.io(&["write -P 0x61 0 300001", "write -P 0x62 700000 200000"]);
    target.io(&["write -P 0xaa 100000 800000"]);
    let before = source.content();
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let len = disk.node().len();
    assert_ne!(len % (64 * KIB), 0);
    let mut content = before;
    content.resize(usize::try_from(len).expect("small"), 0);
    let guests = Guests::start(&disk, &content, Path::Gate, 3, seed);
    let mut options = options();
    options.granularity = Granularity::from_bytes(64 * KIB);
    let to = as_qcow2(target.connect(), cluster);
    let running = Running::start(source.connect(), to, disk.node(), options);
    running.wait_until_ready().await;
    guests.write_more(300).await;
    running.complete(|_| guests.ask_to_stop()).await;
    let promise = guests.stop().await;
    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    let mut content = target.content();
    content.resize(usize::try_from(len).expect("small"), 0);
    promise.assert_kept(&content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_longer_than_granules_and_a_length_that_fits_neither() {
    let name = "clusters_longer_than_granules_and_a_length_that_fits_neither";
    if qemu::is_missing(name) {
        return;
    }
    let scratch = Scratch::new();
    let len = 10 * MIB + 512;
    let source = scratch.create("source.qcow2", &[], len);
    let target = scratch.create("target.qcow2", &["-o", "cluster_size=2M"], len);
    mirror_of_odd_disks(name, 8, source, target.clone(), 2 * MIB).await;
    target.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raw_image_of_odd_length() {
    let name = "a_raw_image_of_odd_length";
    if qemu::is_missing(name) {
        return;
    }
    let scratch = Scratch::new();
    let source = scratch.create_raw("source.raw", 1_000_003);
    let target = scratch.create_raw("target.raw", 1_000_003);
    // qemu-nbd gives the length in whole sectors.
    mirror_of_odd_disks(name, 9, source, target, 4 * KIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sparse_disk_of_a_tebibyte_stays_sparse() {
    let name = "a_sparse_disk_of_a_tebibyte_stays_sparse";
    if qemu::is_missing(name) {
        return;
    }
    let scratch = Scratch::new();
    let source = scratch.create("source.qcow2", &[], 1 << 40);
    source.io(&[
        "write -P 0x01 0 64k",
        "write -P 0x02 512G 64k",
        "write -P 0x03 1099511562240 64k",
    ]);
    let target = scratch.create("target.qcow2", &[], 1 << 40);
    let (mut source, mut target) = (source.export(&[]), target.export(&[]));
    let disk = guest_disk(&mut source);
    let to = as_qcow2(target.connect(), 64 * KIB);
    let running = Running::start(source.connect(), to, disk.node(), options());
    running.wait_until_ready().await;
    // One more, so that the job has something to find in a terabyte that is in step.
    let mut buf = AlignedBuf::new(5000, 1).expect("there is memory");
    buf.as_mut().fill(0x04);
    let (written, _) = disk.write_at(700 << 30, buf).await;
    written.expect("the source is there");
    running.complete(|_| ()).await;

    let (source, target) = (source.shut_down(), target.shut_down());
    source.assert_same_content(&target);
    target.io(&[
        "read -P 0x01 0 64k",
        "read -P 0x02 512G 64k",
        "read -P 0x03 1099511562240 64k",
        "read -P 0x04 700G 5000",
    ]);
    let storage = qemu::storage(&target.path);
    eprintln!("{name}: the target takes {} KiB", storage / KIB);
    assert!(storage < 10 * MIB, "the target takes {storage} bytes");
}

/// A disk of that length, backed up as often, with so many deeds of the guest during each backup, and as many
/// after it.
const CHAIN_LEN: u64 = 16 * MIB;
const BACKUPS: usize = 4;
const DEEDS: usize = 30;

/// One thing that a guest does to its disk.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Write(ByteRange, u8),
    Zero(ByteRange),
    Discard(ByteRange),
}

impl Deed {
    /// Mostly in one part of the disk, so that a good deal of it stays clean. A discard is a hint, and QEMU
    /// takes none while a backup runs: then there are none.
    fn draw(random: &mut Random, during: During) -> Self {
        let part = match random.below(4) {
            0 => CHAIN_LEN,
            _ => CHAIN_LEN / 8,
        };
        let start = random.below(part / 512) * 512;
        let len = (1 + random.below(200)) * 512;
        let range = ByteRange::from(start..(start + len).min(CHAIN_LEN));
        match random.below(8) {
            0 | 1 => Deed::Zero(range),
            // Of whole clusters: what becomes of a part of one is the image's affair.
            2 if during == During::Rest => {
                let start = range.start() / (64 * KIB) * (64 * KIB);
                Deed::Discard((start..start + 128 * KIB).into())
            }
            _ => Deed::Write(range, 1 + random.below(255) as u8),
        }
    }

    async fn perform(self, disk: &impl WriteAt<Buf = AlignedBuf>) {
        let result = match self {
            Deed::Write(range, byte) => {
                let mut buf = AlignedBuf::new(range.len() as usize, 1).expect("there is memory");
                buf.as_mut().fill(byte);
                disk.write_at(range.start(), buf).await.0
            }
            // Always sent: of those that may unmap, our client keeps what changes nothing to itself.
            Deed::Zero(range) => disk.write_zeroes(range, Unmap::Forbidden).await,
            Deed::Discard(range) => disk.discard(range).await,
        };
        result.unwrap_or_else(|error| panic!("{self:?}: {error}"));
    }

    fn note(self, content: &mut [u8]) {
        let (range, byte) = match self {
            Deed::Write(range, byte) => (range, byte),
            Deed::Zero(range) | Deed::Discard(range) => (range, 0),
        };
        content[range.start() as usize..range.end() as usize].fill(byte);
    }
}

/// When a guest does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum During {
    Backup,
    Rest,
}

/// What a guest does during a backup, and then.
struct Deeds {
    during: Vec<Deed>,
    after: Vec<Deed>,
}

impl Deeds {
    fn draw(random: &mut Random) -> Self {
        let mut draw = |during| (0..DEEDS).map(|_| Deed::draw(random, during)).collect();
        Self {
            during: draw(During::Backup),
            after: draw(During::Rest),
        }
    }
}

async fn perform(deeds: &[Deed], disk: &impl WriteAt<Buf = AlignedBuf>) {
    for deed in deeds {
        deed.perform(disk).await;
    }
}

/// The runs that the topmost layer holds, by where they start and end.
fn tops(map: &[qemu::Mapped]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for part in map.iter().filter(|part| part.in_top) {
        match runs.last_mut() {
            Some((_, end)) if *end == part.start => *end += part.len,
            _ => runs.push((part.start, part.start + part.len)),
        }
    }
    runs
}

/// What a chain of images came to: each with what was dirty, in bytes, when it was made.
type Chain = Vec<(Image, u64)>;

/// A new image on top of the last one.
fn next_image(scratch: &Scratch, name: &str, below: Option<&Image>) -> Image {
    let path = below.map(|below| below.path.to_str().expect("our own name").to_owned());
    let options = path.iter().flat_map(|path| ["-b", path, "-F", "qcow2"]);
    let options: Vec<_> = options.collect();
    scratch.create(name, &options, CHAIN_LEN)
}

fn chain_source(scratch: &Scratch, name: &str) -> Image {
    let source = scratch.create(name, &[], CHAIN_LEN);
    source.io(&[
        "write -P 0x11 0 5M",
        "write -P 0x22 6M 300k",
        "write -z 7M 1M",
        "write -P 0x33 9M 4000k",
    ]);
    source
}

/// Backups by this library: the first in full, then what has changed. The third is tried in vain before.
async fn chain_of_ours(scratch: &Scratch, trace: &[Deeds]) -> Chain {
    let mut source = chain_source(scratch, "our-source.qcow2").export(&[]);
    let disk = guest_disk(&mut source);
    let node = disk.node();
    let mut chain = Chain::new();
    for (index, deeds) in trace.iter().enumerate() {
        if index == 2 {
            let lost = next_image(scratch, "lost.qcow2", chain.last().map(|last| &last.0));
            let before = node
                .bitmaps()
                .query("daily")
                .expect("it is there")
                .dirty_bytes;
            let result = fail_half_way(&mut source, node, lost).await;
            let is_targets = |error: &JobError| match error {
                JobError::Io { side, .. } => *side == Side::Target,
                _ => false,
            };
            assert!(result.as_ref().is_err_and(is_targets), "{result:?}");
            let after = node
                .bitmaps()
                .query("daily")
                .expect("it is there")
                .dirty_bytes;
            assert_eq!(
                after, before,
                "a backup that fails leaves the bitmap as it was"
            );
        }
        let name = format!("our-{index}.qcow2");
        let image = next_image(scratch, &name, chain.last().map(|last| &last.0));
        let mut target = image.export(&[]);
        let from = source.connect();
        let to = as_qcow2(target.connect(), 64 * KIB);
        let mut options = BackupOptions::default();
        options.job.speed = 16 * MIB;
        let mut list = Transaction::new();
        let mut dirty = CHAIN_LEN;
        if index == 0 {
            list.add(node, "daily", BitmapOptions::default());
        } else {
            options.sync = BackupSync::Incremental;
            options.bitmap = Some("daily".to_owned());
            dirty = node
                .bitmaps()
                .query("daily")
                .expect("it is there")
                .dirty_bytes;
        }
        let backup = Backup::new(node, from.limits(), to.limits(), options).expect("they fit");
        let job = backup.job().clone();
        list.start(&job);
        list.run().await.expect("nothing stands against it");
        let task = drive_backup(Driver::new(from, to, RealTime::start()), backup);
        perform(&deeds.during, &*disk).await;
        // Refused if it has succeeded by now.
        let _ = job.set_speed(0);
        join(task).await.expect("both disks are well");
        perform(&deeds.after, &*disk).await;
        chain.push((target.shut_down(), dirty));
    }
    chain
}

fn drive_backup(driver: NbdDriver, mut backup: Backup) -> JoinHandle<Result<(), JobError>> {
    tokio::spawn(async move { driver.run_backup(&mut backup).await })
}

/// An incremental backup whose target dies.
async fn fail_half_way(source: &mut Export, node: &Node, image: Image) -> Result<(), JobError> {
    let mut target = image.export(&[]);
    let (from, to) = (source.connect(), as_qcow2(target.connect(), 64 * KIB));
    let mut options = BackupOptions::default();
    options.sync = BackupSync::Incremental;
    options.bitmap = Some("daily".to_owned());
    options.job.speed = MIB;
    options.chunk_max = 64 * KIB;
    let backup = Backup::new(node, from.limits(), to.limits(), options).expect("they fit");
    let job = backup.job().clone();
    job.start().expect("it was just made");
    let task = drive_backup(Driver::new(from, to, RealTime::start()), backup);
    while job.query().progress.current < 128 * KIB {
        assert!(!task.is_finished(), "{:?}", job.query());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    target.kill();
    // Refused if it has failed by now.
    let _ = job.set_speed(0);
    join(task).await
}

/// The same by QEMU: its own bitmap, its own job.
async fn chain_of_qemus(scratch: &Scratch, trace: &[Deeds]) -> Chain {
    let source = chain_source(scratch, "its-source.qcow2");
    let mut daemon = StorageDaemon::serve(scratch, &source);
    let disk = daemon.connect();
    let mut chain = Chain::new();
    for (index, deeds) in trace.iter().enumerate() {
        let name = format!("its-{index}.qcow2");
        let image = next_image(scratch, &name, chain.last().map(|last| &last.0));
        daemon.open("target", &image);
        let mut job = json!({
            "job-id": "job", "device": "source", "target": "target", "speed": 16 * MIB,
        });
        let dirty = if index == 0 {
            job["sync"] = json!("full");
            let bitmap = json!({"node": "source", "name": "daily", "granularity": 64 * KIB});
            let actions = json!([
                {"type": "block-dirty-bitmap-add", "data": bitmap},
                {"type": "blockdev-backup", "data": job},
            ]);
            daemon.run("transaction", json!({"actions": actions}));
            CHAIN_LEN
        } else {
            let dirty = daemon.dirty_bytes();
            job["sync"] = json!("incremental");
            job["bitmap"] = json!("daily");
            daemon.run("blockdev-backup", job);
            dirty
        };
        perform(&deeds.during, &disk).await;
        daemon.wait_for_job();
        perform(&deeds.after, &disk).await;
        daemon.run("blockdev-del", json!({"node-name": "target"}));
        chain.push((image, dirty));
    }
    disk.flush().await.expect("it is well");
    daemon.shut_down();
    chain
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_incremental_backups_is_what_qemu_makes_of_the_same_writes() {
    let name = "a_chain_of_incremental_backups_is_what_qemu_makes_of_the_same_writes";
    if qemu::is_missing(name) {
        return;
    }
    let seed = 11;
    eprintln!("{name}: seed {seed}");
    let mut random = Random::new(seed);
    let trace: Vec<_> = (0..BACKUPS).map(|_| Deeds::draw(&mut random)).collect();
    let scratch = Scratch::new();
    let mut content = chain_source(&scratch, "before.qcow2").content();
    let ours = chain_of_ours(&scratch, &trace).await;
    let its = chain_of_qemus(&scratch, &trace).await;
    for (index, deeds) in trace.iter().enumerate() {
        let ((our, our_dirty), (its, its_dirty)) = (&ours[index], &its[index]);
        assert!(
            our.content() == content,
            "backup {index} is not of its instant"
        );
        our.assert_same_content(its);
        our.check();
        eprintln!("backup {index}: {our_dirty} bytes dirty");
        assert_eq!(our_dirty, its_dirty, "backup {index}: the bitmaps differ");
        if index > 0 {
            let (our, its) = (tops(&our.map()), tops(&its.map()));
            assert!(!our.is_empty(), "increment {index} holds nothing");
            // Zeroes on zeroes our client keeps to itself, QEMU's job writes them.
            let has = |runs: &[(u64, u64)], at| runs.iter().any(|run| (run.0..run.1).contains(&at));
            for at in (0..CHAIN_LEN).step_by(64 << 10) {
                let (has_ours, has_its) = (has(&our, at), has(&its, at));
                let mut bytes = content[at as usize..][..64 << 10].iter();
                let is_same = has_ours == has_its || (has_its && bytes.all(|&byte| byte == 0));
                assert!(
                    is_same,
                    "increment {index} differs at {at}: {our:?}, {its:?}"
                );
            }
        }
        let is_small = index == 0 || *our_dirty < CHAIN_LEN / 2;
        assert!(is_small, "backup {index} could as well be a full one");
        let all = deeds.during.iter().chain(&deeds.after);
        all.for_each(|deed| deed.note(&mut content));
    }
}
