//! The disk of a guest whose path is async, on a device that goes on with requests whose futures are
//! gone. Nothing here wakes: each future is polled when something has changed.
#![allow(
    clippy::disallowed_types,
    reason = "a test may use the standard library's lock"
)]

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use blockjob::io::{
    AlignedBuf, BlockDevice, BufResult, BufferPool, GuestDisk, HeapPool, ReadAt, WriteAt,
};
use blockjob::{
    BitmapOptions, BitmapStorage, ByteRange, Content, Extent, Granularity, JobBitmap, Limits, Node,
    QuiesceGuard, Unmap,
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
        (self.submit(offset, buf.as_ref().to_vec()).await, buf)
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
