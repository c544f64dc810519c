//! The same disks and the same mirror on one thread, with futures that are not `Send`, and on a
//! runtime with many, with futures that are.
//!
//! ```text
//! cargo run --example local_executor
//! ```
//!
//! The library asks no future to be `Send`. Whether that of a driver is follows from the devices: here
//! memory behind an `Rc`, then behind an `Arc`.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has a clock"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, GuestDisk, ReadAt, WriteAt};
use blockjob::{
    ByteRange, Content, Event, Extent, Job, Limits, Mirror, MirrorOptions, Node, RangeLimits, Unmap,
};
use futures_util::future::join;
use parking_lot::Mutex;
use tokio::task::{JoinHandle, LocalSet, spawn_local, yield_now};
use tokio::time::Instant;

/// No multiple of anything.
const LEN: usize = (8 << 20) + 1001;
const BLOCK: usize = 4096;
/// Guest tasks; each owns every so-manieth block.
const GUESTS: usize = 4;

fn main() -> Result<(), Failure> {
    let local = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    let writes = LocalSet::new().block_on(&local, async {
        let vm = Vm::new(Rc::new(RefCell::new(vec![1; LEN])));
        let guests = (0..GUESTS)
            .map(|index| spawn_local(vm.clone().guest(index)))
            .collect();
        vm.clone()
            .mirror(Rc::new(RefCell::new(vec![2; LEN])))
            .await?;
        vm.check(guests).await
    })?;
    println!("one thread, not Send: equal at the switch, and after {writes} writes");

    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()?;
    let writes = threads.block_on(async {
        let vm = Vm::new(Arc::new(Mutex::new(vec![1; LEN])));
        let guests = (0..GUESTS)
            .map(|index| tokio::spawn(vm.clone().guest(index)))
            .collect();
        let target = Arc::new(Mutex::new(vec![2; LEN]));
        // This compiles only if all of it is `Send`: machine, driver and guest's disk.
        tokio::spawn(vm.clone().mirror(target)).await??;
        vm.check(guests).await
    })?;
    println!("two threads, Send: equal at the switch, and after {writes} writes");
    println!("OK: the same mirror ran on one thread and on many, and no write was lost");
    Ok(())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A guest and its disk.
struct Vm<S> {
    source: S,
    disk: Arc<GuestDisk<Memory<S>>>,
    stop: Arc<AtomicBool>,
}

/// What a guest task wrote last to each of its blocks, and how often it wrote.
struct Written {
    last: BTreeMap<usize, u8>,
    writes: u64,
}

impl<S: Storage> Vm<S> {
    #[allow(
        clippy::arc_with_non_send_sync,
        reason = "the disk is on one thread or on many, as its storage is"
    )]
    fn new(source: S) -> Self {
        let device = Arc::new(Memory(source.clone()));
        Self {
            source,
            disk: Arc::new(GuestDisk::new(Node::new(LEN as u64), device)),
            stop: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Brings the guest over to `target`.
    async fn mirror(self, target: S) -> Result<(), Failure> {
        #[allow(clippy::arc_with_non_send_sync, reason = "as above")]
        let target = Arc::new(Memory(target));
        let source = self.disk.device();
        let mut options = MirrorOptions::default();
        options.job.id = Some("local".to_owned());
        let mut mirror = Mirror::new(self.disk.node(), source.limits(), target.limits(), options)?;
        let job = mirror.job().clone();
        job.start()?;
        let driver = Driver::new(source, Arc::clone(&target), TokioClock(Instant::now()));
        let drive = async {
            loop {
                match driver.run(&mut mirror).await {
                    Driven::Done(result) => return Ok(result?),
                    Driven::SwitchBack(_) => unreachable!("this job is in no group"),
                    Driven::Switch(switch) => {
                        let target_now = target.0.with(|bytes| bytes.clone());
                        let is_equal = self.source.with(|bytes| *bytes == target_now);
                        assert!(is_equal, "the disks differ at the switch");
                        let replaced = self.disk.replace(switch.guard(), Arc::clone(&target));
                        replaced.map_err(|_| "the guard is of another node")?;
                        switch.commit();
                    }
                }
            }
        };
        let (result, ()) = join(drive, complete_when_ready(&job)).await;
        result
    }

    /// Writes, zeroes and discards until it is told to stop.
    async fn guest(self, index: usize) -> Result<Written, Failure> {
        let mut written = Written {
            last: BTreeMap::new(),
            writes: 0,
        };
        while !self.stop.load(Ordering::Relaxed) {
            written.writes += 1;
            // A step that is odd and no multiple of the number of blocks goes everywhere in time.
            let turn = written.writes as usize * 617 % (LEN / BLOCK / GUESTS);
            let block = turn * GUESTS + index;
            let start = (block * BLOCK) as u64;
            let range = (start..start + BLOCK as u64).into();
            let byte = match written.writes % 8 {
                0 => {
                    self.disk.write_zeroes(range, Unmap::Allowed).await?;
                    0
                }
                1 => {
                    self.disk.discard(range).await?;
                    0
                }
                _ => {
                    let byte = (written.writes % 251) as u8;
                    let mut buf = AlignedBuf::new(BLOCK, 1)?;
                    buf.as_mut().fill(byte);
                    self.disk.write_at(start, buf).await.0?;
                    byte
                }
            };
            written.last.insert(block, byte);
            if written.writes.is_multiple_of(8) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        Ok(written)
    }

    /// Lets the guest write to its new disk for a moment, and compares that disk with what it knows.
    async fn check(
        self,
        guests: Vec<JoinHandle<Result<Written, Failure>>>,
    ) -> Result<u64, Failure> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.stop.store(true, Ordering::Relaxed);
        let mut expected = vec![1; LEN];
        let mut writes = 0;
        for guest in guests {
            let written = guest.await??;
            writes += written.writes;
            for (block, byte) in written.last {
                expected[block * BLOCK..][..BLOCK].fill(byte);
            }
        }
        let is_kept = self.disk.device().0.with(|bytes| *bytes == expected);
        assert!(is_kept, "the new disk does not hold what was written");
        let has_moved = self.source.with(|bytes| *bytes != expected);
        assert!(has_moved, "the old disk was written to after the switch");
        Ok(writes)
    }
}

impl<S: Clone> Clone for Vm<S> {
    fn clone(&self) -> Self {
        Self {
            source: self.source.clone(),
            disk: Arc::clone(&self.disk),
            stop: Arc::clone(&self.stop),
        }
    }
}

/// Lets the guest write for a while once the job is ready, then asks for its end.
async fn complete_when_ready(job: &Job) {
    loop {
        match poll_fn(|cx| job.poll_event(cx.waker())).await {
            Event::Ready { .. } => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let asked = job.complete();
                asked.expect("it is ready, and nobody else asks anything of it");
            }
            Event::Completed { .. } | Event::Cancelled { .. } => return,
            _ => {}
        }
    }
}

/// Where the bytes are: on one thread, or shared by many.
trait Storage: Clone {
    fn with<R>(&self, use_bytes: impl FnOnce(&mut Vec<u8>) -> R) -> R;
}

impl Storage for Rc<RefCell<Vec<u8>>> {
    fn with<R>(&self, use_bytes: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        use_bytes(&mut self.borrow_mut())
    }
}

impl Storage for Arc<Mutex<Vec<u8>>> {
    fn with<R>(&self, use_bytes: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        use_bytes(&mut self.lock())
    }
}

/// Memory as a device. It does its work in two halves, with others in between, as a slow one would.
struct Memory<S>(S);

impl<S: Storage> Memory<S> {
    async fn in_halves(&self, range: ByteRange, mut work: impl FnMut(&mut [u8], usize)) {
        let (start, end) = (range.start() as usize, range.end() as usize);
        let middle = start + (end - start) / 2;
        for (from, to) in [(start, middle), (middle, end)] {
            self.0
                .with(|bytes| work(&mut bytes[from..to], from - start));
            yield_now().await;
        }
    }
}

impl<S: Storage> BlockDevice for Memory<S> {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        let ranges = Some(RangeLimits {
            align: 1,
            max: 1 << 20,
        });
        let mut limits = Limits::new(self.0.with(|bytes| bytes.len()) as u64);
        limits.write_zeroes = ranges;
        limits.discard = ranges;
        limits
    }
}

impl<S: Storage> ReadAt for Memory<S> {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let range = ByteRange::at(offset, buf.as_ref().len() as u64).expect("within the disk");
        self.in_halves(range, |bytes, at| {
            buf.as_mut()[at..][..bytes.len()].copy_from_slice(bytes);
        })
        .await;
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

impl<S: Storage> WriteAt for Memory<S> {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let range = ByteRange::at(offset, buf.as_ref().len() as u64).expect("within the disk");
        self.in_halves(range, |bytes, at| {
            bytes.copy_from_slice(&buf.as_ref()[at..][..bytes.len()]);
        })
        .await;
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, range: ByteRange, _: Unmap) -> io::Result<()> {
        self.in_halves(range, |bytes, _| bytes.fill(0)).await;
        Ok(())
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, Unmap::Allowed).await
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {
        // All work is done within a poll: a future that was dropped has stopped.
    }
}

/// The runtime's time.
struct TokioClock(Instant);

impl Clock for TokioClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        tokio::time::sleep_until(self.0 + at).await;
    }
}
