//! Guests whose writes are timed, of this library and of QEMU's storage daemon, and a slow target.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::driver::Clock;
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, WriteAt};
use blockjob::{ByteRange, Limits, Unmap};
use parking_lot::Mutex;

use crate::copying::{Daemon, Files, InPlace, Result};
use crate::random::random;
use crate::support::clock::TimerClock;

/// Length of a guest's write.
pub(crate) const BLOCK: usize = 4096;

/// A device whose writes take as long as at a certain rate, one after the other, in the order in which they come.
pub(crate) struct Slow<'a> {
    device: InPlace,
    clock: &'a TimerClock,
    rate: u64,
    /// When it has done all it was given.
    is_free_at: Mutex<Duration>,
    /// Bytes that it was given.
    sent: AtomicU64,
}

impl<'a> Slow<'a> {
    pub(crate) fn new(files: &Files, clock: &'a TimerClock, rate: u64) -> Result<Self> {
        Ok(Self {
            device: InPlace::new(files.target()?)?,
            clock,
            rate,
            is_free_at: Mutex::default(),
            sent: AtomicU64::new(0),
        })
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// When it will have done that as well.
    fn give(&self, len: usize) -> Duration {
        self.sent.fetch_add(len as u64, Ordering::Relaxed);
        let time = Duration::from_secs_f64(len as f64 / self.rate as f64);
        let mut is_free_at = self.is_free_at.lock();
        *is_free_at = is_free_at.max(self.clock.now()) + time;
        *is_free_at
    }

    /// As `write_at`, on a thread that has nothing else to do.
    pub(crate) fn write_blocking(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let done = self.give(bytes.len());
        thread::sleep(done.saturating_sub(self.clock.now()));
        self.device.write_now(offset, bytes)
    }
}

impl BlockDevice for Slow<'_> {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.device.limits()
    }
}

impl WriteAt for Slow<'_> {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let done = self.give(buf.as_ref().len());
        self.clock.sleep_until(done).await;
        self.device.write_at(offset, buf).await
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        self.device.write_zeroes(range, unmap).await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.device.discard(range).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.device.flush().await
    }

    async fn settle(&self) {}
}

/// What a guest does: it writes blocks at random places, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// Writes go to the first so many bytes of the disk.
    pub(crate) len: u64,
    /// Between the end of a write and the next.
    pub(crate) rest: Duration,
}

/// One write.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) began: Instant,
    pub(crate) took: Duration,
}

/// A guest on a thread of its own, for as long as `work` takes.
pub(crate) fn beside(
    load: Load,
    write: impl FnMut(u64, &[u8]) -> Result<()> + Send,
    work: impl FnOnce() -> Result<()>,
) -> Result<Vec<Sample>> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| write_at_random(load, &stop, write));
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let samples = guest.join().expect("no panic");
        worked?;
        samples
    })
}

/// Writes until told to stop; how long each took.
fn write_at_random(
    load: Load,
    stop: &AtomicBool,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<Vec<Sample>> {
    let mut next = random(2);
    let mut samples = Vec::new();
    let block = [0x42; BLOCK];
    while !stop.load(Ordering::Relaxed) {
        let at = next() % (load.len / BLOCK as u64) * BLOCK as u64;
        let began = Instant::now();
        write(at, &block)?;
        samples.push(Sample {
            began,
            took: began.elapsed(),
        });
        thread::sleep(load.rest);
    }
    Ok(samples)
}

/// Median and 99th percentile in microseconds, the longest in milliseconds, and how many there are; nothing if
/// there are none.
pub(crate) fn cells(samples: &[Sample]) -> String {
    let mut times: Vec<_> = samples.iter().map(|sample| sample.took).collect();
    times.sort();
    let Some(most) = times.last() else {
        return " | | | 0".to_owned();
    };
    let of = |part: usize| times[times.len() * part / 100].as_secs_f64() * 1e6;
    format!(
        "{:.0} | {:.0} | {:.2} | {}",
        of(50),
        of(99),
        most.as_secs_f64() * 1e3,
        times.len(),
    )
}

/// A connection to a disk that the storage daemon serves, for one request at a time.
pub(crate) struct NbdGuest(UnixStream);

impl NbdGuest {
    /// Has the daemon serve its source, and connects to it.
    pub(crate) fn connect(daemon: &mut Daemon, files: &Files) -> Result<Self> {
        let path = files.path("nbd");
        let socket = path.display();
        daemon.run(&format!(
            r#""nbd-server-start", "arguments": {{"addr": {{"type": "unix", "data": {{"path": "{socket}"}}}}}}"#
        ))?;
        daemon.run(
            r#""block-export-add", "arguments": {"type": "nbd", "id": "disk", "node-name": "source", "name": "disk", "writable": true}"#,
        )?;
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if greeting[..8] != *b"NBDMAGIC" {
            return Err("this is no NBD server".into());
        }
        // Fixed newstyle, no padding; then the oldest way to choose an export.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1_u32.to_be_bytes());
        hello.extend(4_u32.to_be_bytes());
        hello.extend(b"disk");
        stream.write_all(&hello)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        if export[..8] != files.len.to_be_bytes() {
            return Err("this is another disk".into());
        }
        Ok(Self(stream))
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(1_u32.to_be_bytes());
        request.extend([7; 8]);
        request.extend(at.to_be_bytes());
        request.extend((bytes.len() as u32).to_be_bytes());
        request.extend(bytes);
        self.0.write_all(&request)?;
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        if reply[..4] != 0x6744_6698_u32.to_be_bytes() || reply[4..8] != [0; 4] {
            return Err(format!("a write of the guest failed: {reply:x?}").into());
        }
        Ok(())
    }
}
