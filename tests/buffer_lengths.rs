//! Devices that give back another buffer than they were given. That one is shorter or longer says that not all was
//! read that was asked for: the read has failed, and nothing of it is used.
#![allow(
    clippy::disallowed_types,
    reason = "a test may use the standard library's lock"
)]

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{BlockDevice, BufResult, BufferPool, FrozenDisk, ReadAt, WriteAt, WrongLength};
use blockjob::queue::{Answer, Next, Queue, Request, Work};
use blockjob::{
    Backup, BackupBuffer, BackupOptions, BackupSync, Begin, ByteRange, Cancel, CompareBy, Extent,
    JobError, Limits, Machine, Mirror, MirrorOptions, MirrorSync, Node, OnCbwError, OnError,
    OpKind, RangeLimits, Side, Status, Step, Unmap, Verified,
};
use futures_util::FutureExt;

const CLUSTER: u64 = 64 << 10;
const LEN: u64 = 8 * CLUSTER;

/// What lies at the place of the read that goes wrong.
const ODD: ByteRange = ByteRange::at(3 * CLUSTER, CLUSTER).unwrap();

/// The length of a buffer that comes back in place of one of [`CLUSTER`] bytes.
const LENGTHS: [usize; 4] = [0, 1, CLUSTER as usize - 1, CLUSTER as usize + 1];

/// Bytes in memory. So many reads of [`ODD`], of all that there are, give back a buffer of another length.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    limits: Limits,
    odd: Mutex<(usize, usize)>,
    /// What was written or made zero.
    written: Mutex<Vec<ByteRange>>,
}

impl Memory {
    fn new(byte: u8) -> Self {
        let mut limits = Limits::new(LEN);
        limits.discard = Some(RangeLimits {
            align: 1,
            max: 1 << 30,
        });
        Self {
            bytes: Mutex::new(vec![byte; LEN as usize]),
            limits,
            odd: Mutex::default(),
            written: Mutex::default(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn odd(&self, times: usize, len: usize) {
        *self.odd.lock().unwrap() = (times, len);
    }

    fn read(&self, offset: u64, mut buf: Vec<u8>) -> Vec<u8> {
        let range = ByteRange::at(offset, buf.len() as u64).unwrap();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[bytes(range)]);
        let (times, len) = &mut *self.odd.lock().unwrap();
        if range == ODD && *times > 0 {
            *times -= 1;
            buf.resize(*len, 0);
        }
        buf
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let range = ByteRange::at(offset, data.len() as u64).unwrap();
        self.bytes.lock().unwrap()[bytes(range)].copy_from_slice(data);
        self.written.lock().unwrap().push(range);
    }

    /// Whether all that was written are whole clusters.
    fn has_whole_clusters(&self) -> bool {
        let written = self.written.lock().unwrap();
        written.iter().all(|range| range.len() % CLUSTER == 0)
    }
}

fn bytes(range: ByteRange) -> std::ops::Range<usize> {
    range.start() as usize..range.end() as usize
}

impl BlockDevice for Memory {
    type Buf = Vec<u8>;

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl ReadAt for Memory {
    async fn read_at(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        (Ok(()), self.read(offset, buf))
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range.len()))
    }
}

impl WriteAt for Memory {
    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        self.write(offset, &buf);
        (Ok(()), buf)
    }

    async fn write_compressed_at(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        self.write_at(offset, buf).await
    }

    async fn read_back(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        self.read_at(offset, buf).await
    }

    async fn compare_at(&self, offset: u64, buf: Vec<u8>) -> (io::Result<Vec<ByteRange>>, Vec<u8>) {
        (Ok(self.compare(offset, &buf)), buf)
    }

    async fn write_zeroes(&self, range: ByteRange, _: Unmap) -> io::Result<()> {
        self.write(range.start(), &vec![0; range.len() as usize]);
        Ok(())
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

impl Memory {
    /// What of the disk does not hold these bytes, so far as they go.
    fn compare(&self, offset: u64, data: &[u8]) -> Vec<ByteRange> {
        let range = ByteRange::at(offset, data.len() as u64).unwrap();
        match self.bytes.lock().unwrap()[bytes(range)] == *data {
            true => Vec::new(),
            false => vec![range],
        }
    }
}

struct Pool;

impl BufferPool for Pool {
    type Buf = Vec<u8>;

    fn take(&self, len: usize) -> io::Result<Vec<u8>> {
        Ok(vec![0xbb; len])
    }

    fn put(&self, _: Vec<u8>) {}
}

/// Goes on to whatever time somebody waits for.
#[derive(Default)]
struct Jumping(Mutex<Duration>);

impl Clock for Jumping {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    async fn sleep_until(&self, at: Duration) {
        let mut now = self.0.lock().unwrap();
        *now = at.max(*now);
    }
}

/// The three devices of a job.
struct Devices {
    source: Memory,
    target: Memory,
    buffer: Memory,
}

impl Devices {
    fn new() -> Self {
        Self {
            source: Memory::new(7),
            target: Memory::new(9),
            buffer: Memory::new(5),
        }
    }

    fn on(&self, side: Side) -> &Memory {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
            Side::Buffer => &self.buffer,
        }
    }

    fn answer(&self, request: Request<Vec<u8>>) -> Answer<Vec<u8>> {
        let device = self.on(request.side);
        match request.work {
            Work::Read { offset, buf } => Answer::Transfer(Ok(()), device.read(offset, buf)),
            Work::Write { offset, buf } | Work::WriteCompressed { offset, buf } => {
                device.write(offset, &buf);
                Answer::Transfer(Ok(()), buf)
            }
            Work::Compare { offset, buf } => {
                Answer::Compared(Ok(device.compare(offset, &buf)), buf)
            }
            Work::Status(range) => Answer::Status(Ok(Extent::data(range.len()))),
            Work::WriteZeroes(range, _) => {
                device.write(range.start(), &vec![0; range.len() as usize]);
                Answer::Plain(Ok(()))
            }
            Work::Discard(_) | Work::Flush | Work::Settle | Work::CancelInFlight => {
                Answer::Plain(Ok(()))
            }
            Work::CopyFromSource(_) => unreachable!("not offered"),
        }
    }

    /// Runs a job by completions until it is over, or waits for something: `None`.
    fn by_queue<M: Machine>(&self, machine: M) -> (Option<Result<(), JobError>>, M) {
        let mut queue = Queue::new(machine, Pool);
        let mut now = Duration::ZERO;
        let result = loop {
            match queue.next(now, Waker::noop()) {
                Next::Submit(request) => {
                    let id = request.id;
                    queue.completed(now, id, self.answer(request));
                }
                Next::Wait { until: Some(at) } => now = at,
                Next::Wait { until: None } => break None,
                Next::Done(result) => break Some(result),
                Next::Switch(_) | Next::SwitchBack(_) => unreachable!("nobody completes it"),
            }
        };
        (result, queue.into_machine())
    }

    /// The same by futures.
    fn by_driver<M: Machine>(&self, mut machine: M) -> (Option<Result<(), JobError>>, M) {
        let clock = Jumping::default();
        let driver = Driver::with_pool(&self.source, &self.target, Pool, clock);
        let driver = driver.with_buffer(&self.buffer);
        let driven = as_often_as_woken(driver.crew(&mut machine).run());
        let result = driven.map(|driven| match driven {
            Driven::Done(result) => result,
            Driven::Switch(_) | Driven::SwitchBack(_) => unreachable!("nobody completes it"),
        });
        (result, machine)
    }

    fn run<M: Machine>(&self, way: Way, machine: M) -> (Option<Result<(), JobError>>, M) {
        match way {
            Way::Driver => self.by_driver(machine),
            Way::Queue => self.by_queue(machine),
        }
    }

    fn mirror(&self, change: impl FnOnce(&mut MirrorOptions)) -> Mirror {
        let mut options = MirrorOptions::default();
        options.job.id = Some("mirror".to_owned());
        options.chunk_max = CLUSTER;
        change(&mut options);
        let limits = [&self.source, &self.target].map(Memory::limits);
        let mirror = Mirror::new(&Node::new(LEN), limits[0], limits[1], options).unwrap();
        mirror.job().start().unwrap();
        mirror
    }

    fn backup(&self, node: &Node, change: impl FnOnce(&mut BackupOptions)) -> Backup {
        let mut options = BackupOptions::default();
        options.chunk_max = CLUSTER;
        change(&mut options);
        let limits = [&self.source, &self.target].map(Memory::limits);
        let backup = Backup::new(node, limits[0], limits[1], options).unwrap();
        backup.job().start().unwrap();
        backup
    }
}

/// A waker that notes that it was called.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What comes of a future that is polled until nobody wakes it.
fn as_often_as_woken<F: Future>(future: F) -> Option<F::Output> {
    let flag = Arc::new(Flag(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&flag));
    let mut future = pin!(future);
    while flag.0.swap(false, Ordering::Relaxed) {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
    }
    None
}

/// How a job is driven.
#[derive(Clone, Copy, Debug)]
enum Way {
    Driver,
    Queue,
}

/// Every way to drive a job, with every length.
fn cases() -> impl Iterator<Item = (Way, usize)> {
    let ways = [Way::Driver, Way::Queue];
    ways.into_iter()
        .flat_map(|way| LENGTHS.map(|len| (way, len)))
}

/// That the job has failed as if the device could not be read.
fn assert_unread(result: Option<Result<(), JobError>>, at: Side, given: usize) -> OpKind {
    let Some(Err(JobError::Io {
        side,
        operation,
        error,
    })) = result
    else {
        panic!("it fails, but {result:?}");
    };
    assert_eq!((side, error.kind()), (at, io::ErrorKind::InvalidData));
    assert_wrong_length(&error, given);
    assert_eq!(operation.range(), Some(ODD));
    operation
}

fn assert_wrong_length(error: &io::Error, given: usize) {
    let wrong = error.get_ref().and_then(|error| error.downcast_ref());
    let (asked, given) = (CLUSTER, given as u64);
    assert_eq!(wrong, Some(&WrongLength { asked, given }), "{error}");
}

#[test]
fn a_mirror_fails_with_its_source_and_knows_what_is_left() {
    for (way, len) in cases() {
        for detect_zeroes in [false, true] {
            let mut devices = Devices::new();
            devices.target.limits.write_zeroes = devices.target.limits.discard;
            devices.source.odd(1, len);
            let mirror = devices.mirror(|options| options.detect_zeroes = detect_zeroes);
            let (result, mirror) = devices.run(way, mirror);
            assert_unread(result, Side::Source, len);
            assert!(mirror.left_dirty().unwrap().all_dirty_in(ODD));
            assert!(devices.target.has_whole_clusters(), "{way:?}, {len}");
            assert_eq!(devices.target.bytes()[bytes(ODD)], [9; CLUSTER as usize]);
        }
    }
}

#[test]
fn a_mirror_that_ignores_errors_reads_again() {
    for (way, len) in cases() {
        let devices = Devices::new();
        devices.source.odd(3, len);
        let mirror = devices.mirror(|options| options.job.on_source_error = OnError::Ignore);
        let (result, mirror) = devices.run(way, mirror);
        assert!(result.is_none(), "{result:?}");
        assert_eq!(mirror.job().query().status, Status::Ready);
        assert!(devices.target.has_whole_clusters(), "{way:?}, {len}");
        assert!(devices.target.bytes() == devices.source.bytes());
    }
}

#[test]
fn a_mirror_that_stops_for_errors_goes_on_when_it_is_resumed() {
    for (way, len) in cases() {
        let devices = Devices::new();
        devices.source.odd(1, len);
        let mirror = devices.mirror(|options| options.job.on_source_error = OnError::Stop);
        let job = mirror.job().clone();
        let (result, mirror) = devices.run(way, mirror);
        assert!(result.is_none(), "{result:?}");
        assert_eq!(job.query().status, Status::Paused);
        job.resume().unwrap();
        let (result, _mirror) = devices.run(way, mirror);
        assert!(result.is_none(), "{result:?}");
        assert_eq!(job.query().status, Status::Ready);
        assert!(devices.target.bytes() == devices.source.bytes());
    }
}

#[test]
fn a_backup_fails_with_its_source() {
    for (way, len) in cases() {
        for compress in [false, true] {
            let mut devices = Devices::new();
            devices.target.limits.compresses = true;
            devices.source.odd(1, len);
            let backup = devices.backup(&Node::new(LEN), |options| options.compress = compress);
            let (result, _backup) = devices.run(way, backup);
            assert_unread(result, Side::Source, len);
            assert!(devices.target.has_whole_clusters(), "{way:?}, {len}");
        }
    }
}

/// The guest is about to overwrite it: it is read from the source into the buffer, and from there to the target.
#[test]
fn what_is_saved_for_a_guest_is_whole_or_is_copied_later() {
    for (way, len) in cases() {
        for odd in [Side::Source, Side::Buffer] {
            let devices = Devices::new();
            devices.on(odd).odd(1, len);
            let node = Node::new(LEN);
            let mut backup = devices.backup(&node, |options| {
                options.buffer = Some(BackupBuffer::new(devices.buffer.limits()));
                options.job.on_source_error = OnError::Ignore;
                options.on_cbw_error = OnCbwError::BreakGuestWrite;
                options.workers = 1;
            });
            let first = backup.poll(Duration::ZERO, Waker::noop());
            assert!(matches!(first, Step::Op(_)), "it has begun: {first:?}");
            backup.ops_lost();
            let guest = node.begin_write(ODD);
            assert!(matches!(guest, Begin::Wait(_)), "it is to be saved");
            let (result, _backup) = devices.run(way, backup);
            result.expect("it comes to its end").unwrap();
            assert_eq!(devices.on(odd).odd.lock().unwrap().0, 0, "it has been read");
            for device in [&devices.target, &devices.buffer] {
                assert!(device.has_whole_clusters(), "{way:?}, {len}, {odd}");
            }
            assert!(devices.target.bytes() == vec![7; LEN as usize]);
        }
    }
}

/// A mirror that compares an older copy, of which it is told that it differs nowhere or just there.
fn verifying(
    devices: &Devices,
    way: Way,
    len: usize,
    odd: Side,
) -> (Option<Result<(), JobError>>, Mirror) {
    let mirror = devices.mirror(|options| options.sync = MirrorSync::None);
    let job = mirror.job().clone();
    let (result, mirror) = devices.run(way, mirror);
    assert!(result.is_none(), "{result:?}");
    devices.on(odd).odd(1, len);
    job.verify().unwrap();
    devices.run(way, mirror)
}

#[test]
fn what_was_not_read_whole_was_not_compared() {
    for (way, len) in cases() {
        for by in [CompareBy::Reading, CompareBy::Device] {
            for odd in [Side::Source, Side::Target] {
                if (by, odd) == (CompareBy::Device, Side::Target) {
                    continue; // it reads nothing into a buffer of ours
                }
                let mut devices = Devices::new();
                devices.target = Memory::new(7);
                devices.target.limits.compare = Some(by);
                let (result, mirror) = verifying(&devices, way, len, odd);
                let operation = assert_unread(result, odd, len);
                assert_eq!(operation, OpKind::Compare(ODD, by));
                let found = mirror.job().query().verification.unwrap();
                assert_eq!((found.differing, found.state), (0, Verified::Cut));
                assert!(devices.target.written.lock().unwrap().is_empty());
            }
        }
    }
}

/// A view of a backup of which one cluster beside [`ODD`] is saved, so that a read of both has two pieces.
#[test]
fn a_frozen_view_is_read_whole_or_not_at_all() {
    for len in LENGTHS {
        for odd in [Side::Source, Side::Target] {
            let devices = Devices::new();
            let node = Node::new(LEN);
            let backup = devices.backup(&node, |options| {
                (options.sync, options.view) = (BackupSync::None, true);
            });
            let view = backup.view().unwrap();
            let (_, backup) = devices.by_queue(backup);
            let (saved, both) = match odd {
                Side::Target => (ODD, 2 * CLUSTER..4 * CLUSTER),
                Side::Source | Side::Buffer => {
                    ((4 * CLUSTER..5 * CLUSTER).into(), 3 * CLUSTER..5 * CLUSTER)
                }
            };
            let guest = node.begin_write(saved);
            let (_, backup) = devices.by_queue(backup);
            drop(guest);
            let frozen = FrozenDisk::with_pool(view, &devices.source, &devices.target, Pool);
            let read = |range: ByteRange| {
                let buf = vec![0; range.len() as usize];
                let read = frozen.read_at(range.start(), buf).now_or_never();
                read.expect("at once")
            };
            for range in [ODD, both.into()] {
                devices.on(odd).odd(1, len);
                let (result, buf) = read(range);
                let error = result.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                assert_wrong_length(&error, len);
                if range != ODD {
                    assert_eq!(buf.len() as u64, range.len(), "the reader's own comes back");
                }
                let (result, buf) = read(range);
                result.unwrap();
                assert!(buf == vec![7; range.len() as usize], "nothing is stuck");
            }
            backup.job().cancel(Cancel::Force).unwrap();
        }
    }
}
