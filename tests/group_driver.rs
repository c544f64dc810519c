//! Two disks of a machine, moved together by two drivers on a runtime with threads, while the guest orders
//! its writes across them.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests need a clock, threads and the standard library's lock"
)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Duration, Instant};

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, GuestDisk, ReadAt, WriteAt};
use blockjob::{
    ByteRange, Cancel, Content, Extent, Job, JobError, JobGroup, Jobs, Limits, Mirror,
    MirrorOptions, MirrorSync, Node, OpKind, Outcome, Status, Step, Unmap,
};

const LEN: u64 = 1 << 20;
/// Where the guest notes how far it is.
const MARK: u64 = 512 << 10;

/// Bytes in memory. A request lands some time after it was made.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    latency: Duration,
}

impl Memory {
    fn new(byte: u8) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![byte; LEN as usize]),
            latency: Duration::from_micros(200),
        })
    }

    fn mark(&self) -> u64 {
        let bytes = self.bytes.lock().unwrap();
        u64::from_le_bytes(bytes[MARK as usize..][..8].try_into().unwrap())
    }
}

impl BlockDevice for Memory {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        Limits::new(LEN)
    }
}

impl ReadAt for Memory {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        tokio::time::sleep(self.latency).await;
        let at = offset as usize..offset as usize + buf.as_ref().len();
        buf.as_mut()
            .copy_from_slice(&self.bytes.lock().unwrap()[at]);
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent {
            len: range.len(),
            content: Content::Data,
            in_top: true,
        })
    }
}

impl WriteAt for Memory {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        tokio::time::sleep(self.latency).await;
        let at = offset as usize..offset as usize + buf.as_ref().len();
        self.bytes.lock().unwrap()[at].copy_from_slice(buf.as_ref());
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Its work is done within `poll`: a future that is dropped has stopped.
    async fn settle(&self) {}
}

#[derive(Clone, Copy)]
struct TokioClock(Instant);

impl Clock for TokioClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        tokio::time::sleep_until((self.0 + at).into()).await;
    }
}

struct Disk {
    guest: Arc<GuestDisk<Memory>>,
    source: Arc<Memory>,
    target: Arc<Memory>,
    job: Job,
    mirror: Option<Mirror>,
}

/// Two disks with jobs of one group, both started.
fn disks(jobs: &Jobs) -> [Disk; 2] {
    let group = JobGroup::new();
    ["disk0", "disk1"].map(|id| {
        let node = Node::new(LEN);
        let (source, target) = (Memory::new(1), Memory::new(0));
        let mut options = MirrorOptions::default();
        options.job.id = Some(id.to_owned());
        options.job.group = Some(group.clone());
        options.job.jobs = Some(jobs.clone());
        let mirror = Mirror::new(&node, source.limits(), target.limits(), options).unwrap();
        let job = mirror.job().clone();
        job.start().unwrap();
        Disk {
            guest: Arc::new(GuestDisk::new(node, Arc::clone(&source))),
            source,
            target,
            job,
            mirror: Some(mirror),
        }
    })
}

async fn write(disk: &GuestDisk<Memory>, offset: u64, bytes: &[u8]) {
    let mut buf = AlignedBuf::new(bytes.len(), 1).unwrap();
    buf.as_mut().copy_from_slice(bytes);
    disk.write_at(offset, buf).await.0.unwrap();
}

/// Notes each number on the first disk, then on the second, until it is told to stop; the last number.
async fn guest(disks: [Arc<GuestDisk<Memory>>; 2], must_stop: Arc<AtomicBool>) -> u64 {
    for number in 1u64.. {
        for disk in &disks {
            write(disk, MARK, &number.to_le_bytes()).await;
            write(disk, number * 4096 % MARK, &[number as u8; 3000]).await;
        }
        if must_stop.load(Ordering::SeqCst) {
            return number;
        }
        // A rest now and then, so that the disks can come into step.
        if number % 4 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    unreachable!("it counts for long");
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what} never comes"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What the task that drives one disk does with its first switch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Commit,
    Drop,
}

/// Drives one disk to its end; how often its guest was pointed back.
async fn drive(
    mut mirror: Mirror,
    guest: Arc<GuestDisk<Memory>>,
    source: Arc<Memory>,
    target: Arc<Memory>,
    mut first: First,
    seen: Arc<Mutex<Vec<u64>>>,
) -> (Result<(), JobError>, usize) {
    let clock = TokioClock(Instant::now());
    let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), clock);
    let mut backs = 0;
    loop {
        match driver.run(&mut mirror).await {
            Driven::Switch(switch) => {
                assert!(*source.bytes.lock().unwrap() == *target.bytes.lock().unwrap());
                if first == First::Drop {
                    first = First::Commit;
                    drop(switch);
                    continue;
                }
                guest.replace(switch.guard(), Arc::clone(&target)).unwrap();
                // While the guests are held: what the two disks hold together.
                seen.lock().unwrap().push(target.mark());
                tokio::time::sleep(Duration::from_millis(3)).await;
                switch.commit();
            }
            Driven::SwitchBack(back) => {
                guest.replace(back.guard(), Arc::clone(&source)).unwrap();
                backs += 1;
            }
            Driven::Done(result) => return (result, backs),
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

async fn move_two_disks(first: First) {
    let jobs = Jobs::new();
    let mut disks = disks(&jobs);
    let must_stop = Arc::new(AtomicBool::new(false));
    let guests = [&disks[0].guest, &disks[1].guest].map(Arc::clone);
    let guest = tokio::spawn(guest(guests.clone(), Arc::clone(&must_stop)));
    let seen = [(); 2].map(|()| Arc::new(Mutex::new(Vec::new())));
    let drivers: Vec<_> = disks
        .iter_mut()
        .zip(&seen)
        .enumerate()
        .map(|(index, (disk, seen))| {
            let first = if index == 1 { first } else { First::Commit };
            let mirror = disk.mirror.take().expect("made with one");
            tokio::spawn(drive(
                mirror,
                Arc::clone(&disk.guest),
                Arc::clone(&disk.source),
                Arc::clone(&disk.target),
                first,
                Arc::clone(seen),
            ))
        })
        .collect();
    for disk in &disks {
        let job = disk.job.clone();
        until("ready", || job.query().status == Status::Ready).await;
        job.complete().unwrap();
    }
    if first == First::Drop {
        let job = disks[0].job.clone();
        until("the decline", || {
            let info = job.query();
            info.status == Status::Pending && !info.is_finalizing
        })
        .await;
        // The guest goes on with both sources meanwhile.
        let before = disks[0].source.mark();
        until("a write", || disks[0].source.mark() > before + 2).await;
        jobs.get("disk1").unwrap().finalize().unwrap();
    }
    let mut backs = 0;
    for driver in drivers {
        let (result, went_back) = driver.await.unwrap();
        result.unwrap();
        backs += went_back;
    }
    must_stop.store(true, Ordering::SeqCst);
    let last = guest.await.unwrap();
    for disk in &disks {
        assert!(Arc::ptr_eq(&disk.guest.device(), &disk.target));
        assert_eq!(disk.target.mark(), last, "nothing is lost");
        assert!(disk.source.mark() <= last);
    }
    let seen = seen.map(|seen| *seen.lock().unwrap().last().expect("it has switched"));
    assert!(
        seen[0] == seen[1] || seen[0] == seen[1] + 1,
        "the first is written first: {seen:?}"
    );
    // At most the first one had committed when the second one dropped its own.
    assert!(backs <= usize::from(first == First::Drop));
    jobs.shutdown().await;
    assert!(jobs.query().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_disks_switch_at_one_instant() {
    move_two_disks(First::Commit).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switch_that_one_task_drops_is_tried_again_for_both() {
    for _ in 0..5 {
        move_two_disks(First::Drop).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_what_is_being_driven() {
    let jobs = Jobs::new();
    let mut disks = disks(&jobs);
    let drivers: Vec<_> = disks
        .iter_mut()
        .map(|disk| {
            tokio::spawn(drive(
                disk.mirror.take().expect("made with one"),
                Arc::clone(&disk.guest),
                Arc::clone(&disk.source),
                Arc::clone(&disk.target),
                First::Commit,
                Arc::default(),
            ))
        })
        .collect();
    jobs.shutdown().await;
    assert!(jobs.query().is_empty());
    for driver in drivers {
        let (result, _) = driver.await.unwrap();
        assert!(matches!(result, Err(JobError::Cancelled { abandoned: 0 })));
    }
}

/// A cancel of one member that was accepted is never followed by a switch of any, and one that was refused
/// never undoes one.
#[test]
fn a_cancel_of_a_member_is_either_accepted_or_too_late_for_all() {
    let outcome = |kind| match kind {
        OpKind::Status(range) => Outcome::Status(Extent {
            len: ByteRange::len(range),
            content: Content::Data,
            in_top: true,
        }),
        _ => Outcome::Done,
    };
    let (accepted, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let until = Instant::now() + Duration::from_secs(2);
    let mut round = 0u64;
    while Instant::now() < until {
        round += 1;
        let group = JobGroup::new();
        let limits = Limits::new(4096);
        let mut mirrors = [(); 2].map(|()| {
            let mut options = MirrorOptions::default();
            options.sync = MirrorSync::None;
            options.job.group = Some(group.clone());
            let mirror = Mirror::new(&Node::new(4096), limits, limits, options).unwrap();
            mirror.job().start().unwrap();
            mirror
        });
        for mirror in &mut mirrors {
            while mirror.job().query().status != Status::Ready {
                if let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
                    let outcome = outcome(op.kind());
                    mirror.op_done(Duration::ZERO, op, outcome);
                }
            }
            mirror.job().complete().unwrap();
        }
        let victim = mirrors[(round % 2) as usize].job().clone();
        let go = AtomicBool::new(false);
        let (was_accepted, ends) = std::thread::scope(|scope| {
            let canceller = scope.spawn(|| {
                while !go.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                for _ in 0..round % 512 {
                    std::hint::spin_loop();
                }
                victim.cancel(Cancel::Force).is_ok()
            });
            let drivers = mirrors.each_mut().map(|mirror| {
                scope.spawn(|| {
                    let mut switched = false;
                    loop {
                        match mirror.poll(Duration::ZERO, Waker::noop()) {
                            Step::Op(op) => {
                                let outcome = outcome(op.kind());
                                mirror.op_done(Duration::ZERO, op, outcome);
                            }
                            Step::Wait { .. } => std::thread::yield_now(),
                            Step::Switch(switch) => {
                                switched = true;
                                switch.commit();
                            }
                            Step::SwitchBack(_) => panic!("nobody declines"),
                            Step::Done(result) => return (switched, result.is_ok()),
                        }
                    }
                })
            });
            go.store(true, Ordering::SeqCst);
            let ends = drivers.map(|driver| driver.join().unwrap());
            (canceller.join().unwrap(), ends)
        });
        for end in ends {
            assert_eq!(end, (!was_accepted, !was_accepted), "round {round}");
        }
        let count = if was_accepted { &accepted } else { &refused };
        count.fetch_add(1, Ordering::Relaxed);
    }
    println!("{accepted:?} accepted, {refused:?} refused");
}
