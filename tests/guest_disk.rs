//! The disk of a guest whose path is async, on a device that goes on with requests whose futures are
//! gone. Nothing here wakes: each future is polled when something has changed.
#![allow(
    clippy::disallowed_types,
    reason = "a test may use the standard library's lock"
)]

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use blockjob::io::{
    AlignedBuf, BlockDevice, BufResult, BufferPool, CopiesTo, GuestDisk, HeapPool, ReadAt, WriteAt,
};
use blockjob::{
    BitmapOptions, BitmapStorage, ByteRange, Content, CopyMode, Extent, Granularity, JobBitmap,
    Limits, Mirror, MirrorOptions, Node, OnError, OpKind, Outcome, QuiesceGuard, RangeLimits, Step,
    Unmap,
};

const LEN: u64 = 1 << 20;
const GRANULE: u64 = 4096;

/// A disk in memory that can keep requests back. Like a ring or a thread pool it lands them in the end,
/// whether somebody waits for the answer or not.
struct Device {
    limits: Limits,
    state: Mutex<State>,
}

struct State {
    bytes: Vec<u8>,
    /// Whether requests are kept back from now on.
    holds: bool,
    /// Requests kept back, in the order in which they came.
    held: Vec<Request>,
    next_id: u64,
    /// What the requests that are answered from now on come to.
    fails: Option<io::ErrorKind>,
    /// How long the buffers are that come back, if not as long as those that were given.
    gives_back: Option<usize>,
    flushes: usize,
}

struct Request {
    id: u64,
    offset: u64,
    data: Vec<u8>,
}

impl State {
    fn apply(&mut self, request: &Request) {
        let start = request.offset as usize;
        self.bytes[start..start + request.data.len()].copy_from_slice(&request.data);
    }
}

impl Device {
    fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            state: Mutex::new(State {
                bytes: vec![0; limits.len as usize],
                holds: false,
                held: Vec::new(),
                next_id: 0,
                fails: None,
                gives_back: None,
                flushes: 0,
            }),
        })
    }

    fn plain() -> Arc<Self> {
        Self::new(Limits::new(LEN))
    }

    fn hold(&self) {
        self.state.lock().unwrap().holds = true;
    }

    /// Lands what was kept back, and keeps nothing back any more.
    fn land(&self) {
        let mut state = self.state.lock().unwrap();
        state.holds = false;
        for request in std::mem::take(&mut state.held) {
            state.apply(&request);
        }
    }

    fn fail(&self, kind: io::ErrorKind) {
        self.state.lock().unwrap().fails = Some(kind);
    }

    fn byte(&self, offset: u64) -> u8 {
        self.state.lock().unwrap().bytes[offset as usize]
    }

    async fn submit(&self, offset: u64, data: Vec<u8>) -> io::Result<()> {
        let id = {
            let mut state = self.state.lock().unwrap();
            state.next_id += 1;
            let id = state.next_id;
            let request = Request { id, offset, data };
            match state.holds {
                true => state.held.push(request),
                false => state.apply(&request),
            }
            id
        };
        poll_fn(|_| {
            let state = self.state.lock().unwrap();
            if state.held.iter().any(|request| request.id == id) {
                return Poll::Pending;
            }
            Poll::Ready(state.fails.map_or(Ok(()), |kind| Err(kind.into())))
        })
        .await
    }

    fn check(&self, buf: &[u8]) -> io::Result<()> {
        if buf.as_ptr().align_offset(self.limits.mem_align as usize) != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl BlockDevice for Device {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl ReadAt for Device {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let checked = self.check(buf.as_ref());
        let end = offset as usize + buf.as_ref().len();
        buf.as_mut()
            .copy_from_slice(&self.state.lock().unwrap().bytes[offset as usize..end]);
        (checked, buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent {
            len: range.len(),
            content: Content::Data,
            in_top: true,
        })
    }
}

impl WriteAt for Device {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        if let Err(error) = self.check(buf.as_ref()) {
            return (Err(error), buf);
        }
        let result = self.submit(offset, buf.as_ref().to_vec()).await;
        let other = self.state.lock().unwrap().gives_back;
        let other = other.map(|len| AlignedBuf::new(len, 1).unwrap());
        (result, other.unwrap_or(buf))
    }

    async fn write_zeroes(&self, range: ByteRange, _unmap: Unmap) -> io::Result<()> {
        self.submit(range.start(), vec![0; range.len() as usize])
            .await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.submit(range.start(), vec![0xdd; range.len() as usize])
            .await
    }

    async fn flush(&self) -> io::Result<()> {
        self.state.lock().unwrap().flushes += 1;
        Ok(())
    }

    async fn settle(&self) {
        poll_fn(|_| match self.state.lock().unwrap().held.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

/// A disk, and what is recorded of it.
fn recorded(device: &Arc<Device>) -> (GuestDisk<Device>, JobBitmap) {
    let node = Node::new(LEN);
    let granularity = Granularity::from_bytes(GRANULE).unwrap();
    let bitmap = node.track(&quiesced(&node), granularity).unwrap();
    (GuestDisk::new(node, Arc::clone(device)), bitmap)
}

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn is_busy(disk: &GuestDisk<Device>) -> bool {
    disk.node().quiesce().try_guard().is_err()
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// The answer of a future that has nothing to wait for.
fn now<F: Future>(future: F) -> F::Output {
    match poll(pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

/// A granule full of `byte`.
fn full_of(byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(GRANULE as usize, 1).unwrap();
    buf.as_mut().fill(byte);
    buf
}

fn granule(index: u64) -> ByteRange {
    (index * GRANULE..(index + 1) * GRANULE).into()
}

fn dirty(bitmap: &JobBitmap) -> Vec<ByteRange> {
    bitmap.lock().runs().collect()
}

/// Drops a write of granule 0 when the device has it.
fn abandon(disk: &GuestDisk<Device>) {
    let mut write = Box::pin(disk.write_at(0, full_of(1)));
    assert!(poll(write.as_mut()).is_pending());
}

#[test]
fn writes_zeroes_and_discards_are_passed_on_and_recorded() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    let (result, buf) = now(disk.write_at(0, full_of(7)));
    result.unwrap();
    assert_eq!(buf.as_ref(), full_of(7).as_ref(), "the buffer comes back");
    assert_eq!(device.byte(0), 7);
    assert_eq!(dirty(&bitmap), [granule(0)]);

    now(disk.write_zeroes(granule(0), Unmap::Allowed)).unwrap();
    assert_eq!(device.byte(0), 0);
    now(disk.discard(granule(2))).unwrap();
    assert_eq!(device.byte(2 * GRANULE), 0xdd);
    assert_eq!(dirty(&bitmap), [granule(0), granule(2)]);

    let (result, buf) = now(disk.read_at(2 * GRANULE, full_of(0)));
    result.unwrap();
    assert_eq!(buf.as_ref()[0], 0xdd);
    assert_eq!(disk.limits(), device.limits());
    assert!(!is_busy(&disk));
}

#[test]
fn a_failed_write_is_recorded_and_its_error_handed_on() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    device.fail(io::ErrorKind::StorageFull);
    let (result, _buf) = now(disk.write_at(GRANULE, full_of(1)));
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(dirty(&bitmap), [granule(1)]);
    assert!(!is_busy(&disk));
}

#[test]
fn a_write_past_the_last_offset_is_refused_with_its_buffer() {
    let (disk, bitmap) = recorded(&Device::plain());
    let (result, buf) = now(disk.write_at(u64::MAX, full_of(5)));
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(buf.as_ref()[0], 5);
    assert!(bitmap.lock().is_clean());
}

#[test]
fn a_read_only_bitmap_has_writes_fail_before_the_device_sees_them() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    let bitmaps = disk.node().bitmaps();
    bitmaps.set_storage(Some(BitmapStorage::default()));
    let mut options = BitmapOptions::default();
    options.persistent = true;
    bitmaps.add_disabled("stored", options).unwrap();
    bitmaps
        .mark_readonly(&quiesced(disk.node()), "stored")
        .unwrap();
    let (result, buf) = now(disk.write_at(0, full_of(7)));
    assert_eq!(buf.as_ref()[0], 7);
    let results = [
        result,
        now(disk.write_zeroes(granule(1), Unmap::Forbidden)),
        now(disk.discard(granule(2))),
    ];
    for result in results {
        let kind = result.unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::PermissionDenied);
    }
    now(disk.flush()).unwrap();
    assert_eq!(device.byte(0), 0);
    assert!(bitmap.lock().is_clean());
    bitmaps.mark_writable("stored").unwrap();
    now(disk.write_at(0, full_of(7))).0.unwrap();
    assert_eq!(device.byte(0), 7);
    assert_eq!(dirty(&bitmap), [granule(0)]);
}

#[test]
fn a_write_dropped_half_way_is_in_flight_until_the_next_one_has_settled_it() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    device.hold();
    abandon(&disk);
    assert!(is_busy(&disk));

    let mut next = pin!(disk.write_at(GRANULE, full_of(2)));
    assert!(poll(next.as_mut()).is_pending());
    assert!(is_busy(&disk), "the device has not settled");
    device.land();
    assert!(is_busy(&disk), "nobody knows that it has");
    assert!(poll(next).is_ready());
    assert!(!is_busy(&disk));
    assert_eq!(dirty(&bitmap), [ByteRange::from(0..2 * GRANULE)]);
    assert_eq!((device.byte(0), device.byte(GRANULE)), (1, 2));
}

#[test]
fn a_write_dropped_half_way_is_settled_on_demand() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    device.hold();
    abandon(&disk);
    let mut settle = pin!(disk.settle());
    assert!(poll(settle.as_mut()).is_pending());
    device.land();
    assert!(poll(settle).is_ready());
    assert!(!is_busy(&disk));
    assert_eq!(dirty(&bitmap), [granule(0)]);
}

#[test]
fn a_settle_dropped_half_way_has_settled_nothing() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    device.hold();
    abandon(&disk);
    let mut settle = Box::pin(disk.settle());
    assert!(poll(settle.as_mut()).is_pending());
    drop(settle);
    assert!(is_busy(&disk));
    assert!(bitmap.lock().is_clean());
    device.land();
    now(disk.settle());
    assert!(!is_busy(&disk));
    assert_eq!(dirty(&bitmap), [granule(0)]);
}

#[test]
fn zeroes_and_discards_dropped_half_way_are_in_flight_too() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    device.hold();
    assert!(poll(pin!(disk.write_zeroes(granule(0), Unmap::Allowed))).is_pending());
    assert!(is_busy(&disk));
    device.land();
    now(disk.settle());
    device.hold();
    assert!(poll(pin!(disk.discard(granule(2)))).is_pending());
    assert!(is_busy(&disk));
    device.land();
    now(disk.settle());
    assert!(!is_busy(&disk));
    assert_eq!(dirty(&bitmap), [0, 2].map(granule));
}

#[test]
fn a_write_that_waits_for_the_guard_settles_the_abandoned_one_first() {
    let device = Device::plain();
    let (disk, _bitmap) = recorded(&device);
    device.hold();
    abandon(&disk);
    let mut quiesce = pin!(disk.node().quiesce());
    assert!(poll(quiesce.as_mut()).is_pending());
    let mut next = pin!(disk.write_at(0, full_of(2)));
    device.land();
    // It settles the abandoned one although it has to wait itself.
    assert!(poll(next.as_mut()).is_pending());
    let Poll::Ready(guard) = poll(quiesce) else {
        panic!("nothing is in flight");
    };
    assert_eq!(device.byte(0), 1);
    drop(guard);
    assert!(poll(next).is_ready());
    assert_eq!(device.byte(0), 2);
}

#[test]
fn a_write_that_waited_for_the_guard_goes_to_the_new_device() {
    let (old, new) = (Device::plain(), Device::plain());
    let (disk, bitmap) = recorded(&old);
    let guard = quiesced(disk.node());
    let mut write = pin!(disk.write_at(0, full_of(3)));
    assert!(poll(write.as_mut()).is_pending());
    let replaced = disk
        .replace(&guard, Arc::clone(&new))
        .ok()
        .expect("its guard");
    assert!(Arc::ptr_eq(&replaced, &old) && Arc::ptr_eq(&disk.device(), &new));
    assert!(poll(write.as_mut()).is_pending());
    drop(guard);
    assert!(poll(write).is_ready());
    assert_eq!((old.byte(0), new.byte(0)), (0, 3));
    assert_eq!(dirty(&bitmap), [granule(0)]);
}

#[test]
fn a_write_dropped_while_it_waits_for_the_guard_is_nowhere() {
    let device = Device::plain();
    let (disk, bitmap) = recorded(&device);
    let guard = quiesced(disk.node());
    let mut write = Box::pin(disk.write_at(0, full_of(3)));
    assert!(poll(write.as_mut()).is_pending());
    drop(write);
    drop(guard);
    assert!(!is_busy(&disk));
    assert!(bitmap.lock().is_clean());
    assert_eq!(device.byte(0), 0);
}

#[test]
fn reads_and_flushes_do_not_wait_for_the_guard() {
    let device = Device::plain();
    let (disk, _bitmap) = recorded(&device);
    let _guard = quiesced(disk.node());
    now(disk.read_at(0, full_of(9))).0.unwrap();
    now(disk.flush()).unwrap();
    assert_eq!(device.state.lock().unwrap().flushes, 1);
}

#[test]
fn the_guard_of_another_node_replaces_nothing() {
    let (old, new) = (Device::plain(), Device::plain());
    let (disk, _bitmap) = recorded(&old);
    let other = Node::new(LEN);
    let refused = disk
        .replace(&quiesced(&other), Arc::clone(&new))
        .err()
        .expect("its guard says nothing about this disk");
    assert!(Arc::ptr_eq(&refused, &new));
    assert!(Arc::ptr_eq(&disk.device(), &old));
}

#[test]
fn buffers_of_a_pool_are_as_the_device_wants_them() {
    let mut limits = Limits::new(LEN);
    limits.mem_align = 4096;
    let device = Device::new(limits);
    let (disk, _bitmap) = recorded(&device);
    let pool = HeapPool::new(disk.limits().mem_align as usize);
    for round in 0..4_u8 {
        let lens = [512, 4096, 100, 65536, 1, 4097];
        let mut bufs = lens.map(|len| pool.take(len).unwrap());
        bufs.rotate_left(usize::from(round));
        for (place, mut buf) in bufs.into_iter().enumerate() {
            let offset = place as u64 * 65536;
            buf.as_mut().fill(round + 1);
            let address = buf.as_ref().as_ptr();
            let (result, buf) = now(disk.write_at(offset, buf));
            result.unwrap();
            let (result, buf) = now(disk.read_at(offset, buf));
            result.unwrap();
            assert_eq!(buf.as_ref().as_ptr(), address);
            assert!(buf.as_ref().iter().all(|byte| *byte == round + 1));
            pool.put(buf);
        }
    }
    // The device does look: a pool for another alignment has a buffer that it refuses.
    let loose = HeapPool::new(1);
    let bufs = [(); 4].map(|()| loose.take(100).unwrap());
    let refused = |buf| now(disk.write_at(0, buf)).0.is_err();
    assert!(bufs.into_iter().any(refused));
}

// Beside a write-blocking mirror

/// A pool that has buffers, or none; or those that are too long by so many bytes.
#[derive(Clone, Default)]
struct Pool(Arc<AtomicBool>, Arc<AtomicUsize>);

impl BufferPool for Pool {
    type Buf = AlignedBuf;

    fn take(&self, len: usize) -> io::Result<AlignedBuf> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::OutOfMemory.into()),
            false => AlignedBuf::new(len + self.1.load(Ordering::Relaxed), 1),
        }
    }

    fn put(&self, _buf: AlignedBuf) {}
}

/// A disk of a guest, and a mirror that is ready.
struct Mirrored {
    disk: GuestDisk<Device, CopiesTo<Device, Pool>>,
    source: Arc<Device>,
    target: Arc<Device>,
    pool: Pool,
    mirror: Mirror,
    now: Duration,
}

impl Mirrored {
    fn new(limits: Limits) -> Self {
        let (source, target) = (Device::plain(), Device::new(limits));
        let node = Node::new(LEN);
        let pool = Pool::default();
        let disk = GuestDisk::with_pool(node.clone(), Arc::clone(&source), pool.clone());
        disk.copy_to(Some(Arc::clone(&target)));
        let mut options = MirrorOptions::default();
        options.copy_mode = CopyMode::WriteBlocking;
        options.granularity = Granularity::from_bytes(GRANULE);
        options.job.on_target_error = OnError::Ignore;
        let mirror = Mirror::new(&node, source.limits(), limits, options).unwrap();
        mirror.job().start().unwrap();
        let mut new = Self {
            disk,
            source,
            target,
            pool,
            mirror,
            now: Duration::ZERO,
        };
        new.copy_all();
        new
    }

    /// Copies until nothing is left. How much was copied.
    fn copy_all(&mut self) -> u64 {
        let mut copied = 0;
        // What was written of late may wait for more.
        self.now += Duration::from_secs(1);
        loop {
            let Step::Op(op) = self.mirror.poll(self.now, Waker::noop()) else {
                return copied;
            };
            let outcome = match op.kind() {
                OpKind::Status(range) => Outcome::Status(Extent {
                    len: range.len(),
                    content: Content::Data,
                    in_top: true,
                }),
                OpKind::Copy(range) => {
                    copied += range.len();
                    let bytes = range.start() as usize..range.end() as usize;
                    let data = self.source.state.lock().unwrap().bytes[bytes.clone()].to_vec();
                    self.target.state.lock().unwrap().bytes[bytes].copy_from_slice(&data);
                    Outcome::Done
                }
                _ => Outcome::Done,
            };
            self.mirror.op_done(self.now, op, outcome);
        }
    }

    fn is_equal(&self) -> bool {
        let source = self.source.state.lock().unwrap();
        source.bytes == self.target.state.lock().unwrap().bytes
    }

    /// Granules that the target may lack.
    fn left(&self) -> Vec<ByteRange> {
        self.mirror.left_dirty().unwrap().runs().collect()
    }
}

#[test]
fn an_active_write_is_on_both_devices_when_the_guest_is_told() {
    let mut mirrored = Mirrored::new(Limits::new(LEN));
    let (result, buf) = now(mirrored.disk.write_at(GRANULE, full_of(5)));
    result.unwrap();
    assert_eq!(buf.as_ref(), full_of(5).as_ref());
    assert!(mirrored.is_equal() && mirrored.left().is_empty());
    assert_eq!(mirrored.target.byte(GRANULE), 5);
    // This target takes no zeroes; what is discarded is copied in any case.
    now(mirrored.disk.write_zeroes(granule(1), Unmap::Allowed)).unwrap();
    assert_eq!(mirrored.left(), [granule(1)]);
    now(mirrored.disk.discard(granule(3))).unwrap();
    assert_eq!(mirrored.left(), [granule(1), granule(3)]);
    assert_eq!(mirrored.copy_all(), 2 * GRANULE);
    assert!(mirrored.is_equal());

    let mut limits = Limits::new(LEN);
    limits.write_zeroes = Some(RangeLimits {
        align: 512,
        max: GRANULE,
    });
    let mut mirrored = Mirrored::new(limits);
    now(mirrored.disk.write_at(0, full_of(5))).0.unwrap();
    now(mirrored.disk.write_zeroes((0..1024).into(), Unmap::Allowed)).unwrap();
    assert!(mirrored.is_equal() && mirrored.left().is_empty());
    for range in [1..GRANULE, 0..2 * GRANULE] {
        let write = mirrored.disk.write_zeroes(range.into(), Unmap::Allowed);
        now(write).unwrap();
        assert!(!mirrored.left().is_empty(), "it cannot be asked for");
        mirrored.copy_all();
        assert!(mirrored.is_equal());
    }
}

#[test]
fn a_part_of_what_is_dirty_is_left_to_the_mirror() {
    let mut mirrored = Mirrored::new(Limits::new(LEN));
    mirrored.target.fail(io::ErrorKind::Other);
    now(mirrored.disk.write_at(0, full_of(1))).0.unwrap();
    mirrored.target.state.lock().unwrap().fails = None;
    assert_eq!(mirrored.left(), [granule(0)]);
    now(mirrored.disk.write_at(100, full_of(2))).0.unwrap();
    assert_eq!(mirrored.left(), [granule(0)]);
    assert_eq!(mirrored.target.byte(GRANULE), 2);
    assert_eq!(mirrored.target.byte(GRANULE + 100), 0);
    assert_eq!(mirrored.target.byte(100), 1);
    mirrored.copy_all();
    assert!(mirrored.is_equal());
}

#[test]
fn without_a_buffer_or_a_target_the_mirror_copies_later() {
    let mut mirrored = Mirrored::new(Limits::new(LEN));
    mirrored.pool.0.store(true, Ordering::Relaxed);
    now(mirrored.disk.write_at(0, full_of(1))).0.unwrap();
    assert_eq!(mirrored.left(), [granule(0)]);
    mirrored.pool.0.store(false, Ordering::Relaxed);
    mirrored.disk.copy_to(None);
    now(mirrored.disk.write_at(GRANULE, full_of(2))).0.unwrap();
    now(mirrored.disk.write_zeroes(granule(2), Unmap::Allowed)).unwrap();
    assert_eq!(mirrored.left(), [ByteRange::from(0..3 * GRANULE)]);
    mirrored.copy_all();
    assert!(mirrored.is_equal());
    let mut limits = Limits::new(LEN);
    limits.max_transfer = 1024;
    let mut mirrored = Mirrored::new(limits);
    now(mirrored.disk.write_at(0, full_of(1))).0.unwrap();
    assert_eq!(mirrored.left(), [granule(0)], "too much at once");
    mirrored.copy_all();
    assert!(mirrored.is_equal());
}

/// The copy of what is written goes from the disk to the target, and with it, what the disk made of it.
#[test]
fn what_the_disk_gives_back_in_another_length_is_copied_later() {
    for len in [0, 1, GRANULE as usize - 1, GRANULE as usize + 1] {
        let mut mirrored = Mirrored::new(Limits::new(LEN));
        mirrored.source.state.lock().unwrap().gives_back = Some(len);
        now(mirrored.disk.write_at(0, full_of(1))).0.unwrap();
        assert_eq!(mirrored.left(), [granule(0)], "{len}");
        // The target is to get only a part of it, for the rest is dirty.
        now(mirrored.disk.write_at(100, full_of(2))).0.unwrap();
        assert_eq!(mirrored.left(), [ByteRange::from(0..2 * GRANULE)], "{len}");
        mirrored.copy_all();
        assert!(mirrored.is_equal());
    }
}

#[test]
fn what_the_pool_gives_in_another_length_is_no_buffer() {
    let mut mirrored = Mirrored::new(Limits::new(LEN));
    mirrored.pool.1.store(1, Ordering::Relaxed);
    now(mirrored.disk.write_at(0, full_of(1))).0.unwrap();
    assert_eq!(mirrored.left(), [granule(0)]);
    mirrored.copy_all();
    assert!(mirrored.is_equal());
}

#[test]
fn an_active_write_dropped_half_way_is_settled_and_copied_later() {
    for at_target in [false, true] {
        let mut mirrored = Mirrored::new(Limits::new(LEN));
        let held = match at_target {
            false => Arc::clone(&mirrored.source),
            true => Arc::clone(&mirrored.target),
        };
        held.hold();
        let mut write = Box::pin(mirrored.disk.write_at(0, full_of(1)));
        assert!(poll(write.as_mut()).is_pending());
        drop(write);
        assert_eq!(mirrored.copy_all(), 0, "it may still land");
        assert_eq!(mirrored.left(), [granule(0)]);
        let mut next = Box::pin(mirrored.disk.write_at(0, full_of(2)));
        assert!(poll(next.as_mut()).is_pending());
        held.land();
        assert!(poll(next.as_mut()).is_ready());
        drop(next);
        mirrored.copy_all();
        assert!(mirrored.is_equal() && mirrored.left().is_empty());
        assert_eq!(mirrored.target.byte(0), 2);
    }
}

#[test]
fn who_waits_for_a_write_that_is_dropped_settles_it() {
    for at_target in [false, true] {
        let mirrored = Mirrored::new(Limits::new(LEN));
        let held = match at_target {
            false => &mirrored.source,
            true => &mirrored.target,
        };
        held.hold();
        let mut write = Box::pin(mirrored.disk.write_at(0, full_of(1)));
        assert!(poll(write.as_mut()).is_pending());
        let mut next = pin!(mirrored.disk.write_at(0, full_of(2)));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        assert!(next.as_mut().poll(&mut cx).is_pending());
        drop(write);
        assert!(woken.0.load(Ordering::Relaxed), "nobody else would");
        held.land();
        let Poll::Ready((result, _)) = next.poll(&mut cx) else {
            panic!("it waits for ever");
        };
        result.unwrap();
        assert_eq!((mirrored.source.byte(0), mirrored.target.byte(0)), (2, 2));
    }
}

/// Memory that its guest may change while it is written from.
struct Changing {
    /// Which of the two it holds.
    is_second: Arc<AtomicBool>,
    data: [Vec<u8>; 2],
}

impl Changing {
    fn new(data: [Vec<u8>; 2]) -> Self {
        let is_second = Arc::default();
        Self { is_second, data }
    }

    fn which(&self) -> usize {
        usize::from(self.is_second.load(Ordering::Relaxed))
    }
}

impl AsRef<[u8]> for Changing {
    fn as_ref(&self) -> &[u8] {
        &self.data[self.which()]
    }
}

impl AsMut<[u8]> for Changing {
    fn as_mut(&mut self) -> &mut [u8] {
        let which = self.which();
        &mut self.data[which]
    }
}

/// A device that takes such memory.
struct OfChanging(Arc<Device>);

impl BlockDevice for OfChanging {
    type Buf = Changing;

    fn limits(&self) -> Limits {
        self.0.limits
    }
}

impl WriteAt for OfChanging {
    async fn write_at(&self, offset: u64, buf: Changing) -> BufResult<Changing> {
        (self.0.submit(offset, buf.as_ref().to_vec()).await, buf)
    }

    async fn write_zeroes(&self, _range: ByteRange, _unmap: Unmap) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {
        self.0.settle().await;
    }
}

struct ChangingPool;

impl BufferPool for ChangingPool {
    type Buf = Changing;

    fn take(&self, len: usize) -> io::Result<Changing> {
        Ok(Changing::new([vec![0; len], vec![0; len]]))
    }

    fn put(&self, _buf: Changing) {}
}

#[test]
fn both_devices_get_the_same_though_the_guest_changes_its_memory_meanwhile() {
    let mirrored = Mirrored::new(Limits::new(LEN));
    let node = mirrored.disk.node().clone();
    let device = Arc::new(OfChanging(Arc::clone(&mirrored.source)));
    let disk = GuestDisk::with_pool(node, device, ChangingPool);
    disk.copy_to(Some(Arc::new(OfChanging(Arc::clone(&mirrored.target)))));
    mirrored.source.hold();
    let len = GRANULE as usize;
    let memory = Changing::new([vec![1; len], vec![2; len]]);
    let is_second = Arc::clone(&memory.is_second);
    let mut write = pin!(disk.write_at(0, memory));
    assert!(poll(write.as_mut()).is_pending());
    is_second.store(true, Ordering::Relaxed);
    mirrored.source.land();
    let Poll::Ready((result, memory)) = poll(write) else {
        panic!("both have it");
    };
    result.unwrap();
    assert_eq!(memory.as_ref()[0], 2, "its own memory comes back");
    assert_eq!((mirrored.source.byte(0), mirrored.target.byte(0)), (1, 1));
    assert!(mirrored.left().is_empty());
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}
