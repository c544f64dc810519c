//! What benches that copy files share: the files, plain loops, a device without threads, QEMU's storage
//! daemon, and rows of results.

use std::fs::{File, OpenOptions};
use std::future::{Future, poll_fn};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, ReadAt, WriteAt};
use blockjob::{
    ByteRange, Event, Extent, Limits, Mirror, MirrorOptions, MirrorSync, Node, RangeLimits, Unmap,
};
use rustix::time::{ClockId, clock_gettime};

use crate::support::clock::{TimerClock, block_on};
use crate::support::file::{self, KnownData};

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;

pub(crate) const MIB: u64 = 1 << 20;
const GRANULE: u64 = 64 << 10;
/// The longest that any of them may take for one copy.
const PATIENCE: Duration = Duration::from_secs(300);

/// What one copy took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

/// The two files, gone when this is.
pub(crate) struct Files {
    folder: PathBuf,
    pub(crate) len: u64,
}

impl Files {
    pub(crate) fn new(len: u64) -> Result<Self> {
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() {
            shm.to_owned()
        } else {
            std::env::temp_dir()
        };
        let folder = parent.join(format!("blockjob-peers-{}-{len}", std::process::id()));
        std::fs::create_dir(&folder)?;
        Ok(Self { folder, len })
    }

    /// Both of them full of data, and different.
    pub(crate) fn fill(&self) -> Result<()> {
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        let mut chunk = vec![0; MIB as usize];
        let (source, target) = (self.create("source")?, self.create("target")?);
        for start in (0..self.len).step_by(MIB as usize) {
            for bytes in chunk.chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            source.write_all_at(&chunk, start)?;
            chunk.fill(0xa5);
            target.write_all_at(&chunk, start)?;
        }
        Ok(())
    }

    pub(crate) fn create(&self, name: &str) -> Result<File> {
        let file = File::create_new(self.path(name))?;
        file.set_len(self.len)?;
        Ok(file)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn source(&self) -> Result<File> {
        let path = self.path("source");
        Ok(OpenOptions::new().read(true).write(true).open(path)?)
    }

    pub(crate) fn target(&self) -> Result<File> {
        let path = self.path("target");
        Ok(OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Makes each granule of the target differ from the source.
    pub(crate) fn spoil(&self) -> Result<()> {
        let (source, target) = (self.source()?, self.target()?);
        let mut byte = [0];
        for at in (0..self.len).step_by(GRANULE as usize) {
            source.read_exact_at(&mut byte, at)?;
            target.write_all_at(&[!byte[0]], at)?;
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let (source, target) = (self.source()?, self.target()?);
        let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        for at in (0..self.len).step_by(MIB as usize) {
            source.read_exact_at(&mut left, at)?;
            target.read_exact_at(&mut right, at)?;
            if left != right {
                return Err(format!("the copy differs from its source near {at}").into());
            }
        }
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Reads and writes on `threads` threads, each taking the next piece that nobody has.
pub(crate) fn bare(files: &Files, threads: usize) -> Result<Cost> {
    let (source, target) = (files.source()?, files.target()?);
    let next = AtomicU64::new(0);
    let copy = || -> io::Result<()> {
        let mut buf = vec![0; MIB as usize];
        loop {
            let at = next.fetch_add(MIB, Ordering::Relaxed);
            if at >= files.len {
                return Ok(());
            }
            source.read_exact_at(&mut buf, at)?;
            target.write_all_at(&buf, at)?;
        }
    };
    let (began, cpu) = (Instant::now(), own_cpu());
    if threads == 1 {
        copy()?;
    } else {
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(copy)).collect();
            running
                .into_iter()
                .try_for_each(|thread| thread.join().expect("no panic"))
        })?;
    }
    Ok(Cost {
        wall: began.elapsed(),
        cpu: own_cpu() - cpu,
    })
}

/// A file whose requests are done by whoever polls them.
pub(crate) struct InPlace(File, Limits, KnownData);

impl InPlace {
    pub(crate) fn new(file: File) -> Result<Self> {
        let mut limits = Limits::new(file.metadata()?.len());
        limits.write_zeroes = Some(RangeLimits {
            align: 1,
            max: 1 << 30,
        });
        limits.cheap_zeroes = true;
        limits.discard = limits.write_zeroes;
        Ok(Self(file, limits, KnownData::default()))
    }
}

impl BlockDevice for InPlace {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.1
    }
}

impl ReadAt for InPlace {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        (self.0.read_exact_at(buf.as_mut(), offset), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        match self.2.recall(range) {
            Some(extent) => Ok(extent),
            None => self.2.ask(&self.0, range),
        }
    }
}

impl WriteAt for InPlace {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        (self.0.write_all_at(buf.as_ref(), offset), buf)
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        file::write_zeroes(&self.0, range, unmap)
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        file::punch_hole(&self.0, range)
    }

    async fn flush(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    async fn settle(&self) {}
}

/// What a mirror took until it was ready, and how long the guest was held for the switch.
pub(crate) struct Mirrored {
    pub(crate) cost: Cost,
    pub(crate) held: Duration,
}

/// Mirrors one device to the other. Once ready, waits for `linger` and switches.
pub(crate) fn mirror<S, T>(
    node: &Node,
    source: S,
    target: T,
    sync: MirrorSync,
    linger: Duration,
) -> Result<Mirrored>
where
    S: ReadAt<Buf = AlignedBuf>,
    T: WriteAt<Buf = AlignedBuf>,
{
    let mut options = MirrorOptions::default();
    options.job.id = Some("peers".to_owned());
    options.sync = sync;
    let clock = TimerClock::new();
    let (began, cpu) = (Instant::now(), own_cpu());
    let mut mirror = Mirror::new(node, source.limits(), target.limits(), options)?;
    let driver = Driver::new(source, target, &clock);
    let job = mirror.job().clone();
    job.start()?;
    let mut cost = None;
    let mut held = Duration::ZERO;
    loop {
        let mut run = pin!(driver.run(&mut mirror));
        let mut wait = None;
        let mut patience = pin!(clock.sleep_until(clock.now() + PATIENCE));
        let driven = block_on(poll_fn(|cx| {
            if patience.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err("the mirror does not come to its end"));
            }
            while let Poll::Ready(event) = job.poll_event(cx.waker()) {
                if matches!(event, Event::Ready { .. }) {
                    cost = Some(Cost {
                        wall: began.elapsed(),
                        cpu: own_cpu() - cpu,
                    });
                    wait = Some(Box::pin(clock.sleep_until(clock.now() + linger)));
                }
            }
            if let Some(sleep) = &mut wait {
                if sleep.as_mut().poll(cx).is_ready() {
                    wait = None;
                    job.complete().expect("it is ready");
                }
            }
            run.as_mut().poll(cx).map(Ok)
        }));
        match driven? {
            Driven::Switch(switch) => {
                let since = switch.held_since();
                switch.commit();
                held = clock.now() - since;
            }
            Driven::SwitchBack(_) => unreachable!("this job is in no group"),
            Driven::Done(result) => {
                result?;
                let cost = cost.ok_or("it was never ready")?;
                return Ok(Mirrored { cost, held });
            }
        }
    }
}

/// Whether the program can be started at all.
pub(crate) fn is_installed(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Processor time of a process, or of the children of this one that were waited for. In steps of 10 ms.
pub(crate) fn cpu_of(pid: u32, of_children: bool) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let first = if of_children { 13 } else { 11 };
    let ticks: u64 = fields[first].parse::<u64>()? + fields[first + 1].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// A storage daemon, and the socket to talk to it. Ended when dropped.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    lines: Option<BufReader<UnixStream>>,
}

impl Daemon {
    pub(crate) fn start(files: &Files) -> Result<Self> {
        let socket = files.path("qmp");
        let _ = std::fs::remove_file(&socket);
        let chardev = format!("socket,id=qmp,server=on,wait=off,path={}", socket.display());
        let child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=qmp"])
            .stdout(Stdio::null())
            .spawn()?;
        let mut daemon = Self { child, lines: None };
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > Duration::from_secs(20) => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        daemon.lines = Some(BufReader::new(stream));
        daemon.wait_for("\"QMP\"")?;
        daemon.run("\"qmp_capabilities\"")?;
        for name in ["source", "target"] {
            let path = files.path(name);
            let path = path.display();
            daemon.run(&format!(
                r#""blockdev-add", "arguments": {{"driver": "file", "discard": "unmap", "node-name": "{name}", "filename": "{path}"}}"#
            ))?;
        }
        Ok(daemon)
    }

    pub(crate) fn send(&mut self, command: &str) -> Result<()> {
        let lines = self.lines.as_mut().ok_or("not connected")?;
        writeln!(lines.get_mut(), r#"{{"execute": {command}}}"#)?;
        Ok(())
    }

    pub(crate) fn run(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        self.wait_for("\"return\"")
    }

    /// Reads up to a line that has this in it.
    pub(crate) fn wait_for(&mut self, what: &str) -> Result<()> {
        let lines = self.lines.as_mut().ok_or("not connected")?;
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Err("the storage daemon is gone".into());
            }
            if line.contains("\"error\"") || line.contains("BLOCK_JOB_ERROR") {
                return Err(line.into());
            }
            if line.contains(what) {
                return Ok(());
            }
        }
    }

    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu_of(self.child.id(), false)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One row: a way to do it, and what it took so far. Without a way, the program is absent.
pub(crate) struct Row<'a> {
    pub(crate) name: &'static str,
    pub(crate) way: Option<Box<dyn FnMut() -> Result<Cost> + 'a>>,
    pub(crate) costs: Vec<Cost>,
}

impl<'a> Row<'a> {
    pub(crate) fn new(name: &'static str, way: impl FnMut() -> Result<Cost> + 'a) -> Self {
        Self {
            name,
            way: Some(Box::new(way)),
            costs: Vec::new(),
        }
    }

    pub(crate) fn of_program(
        program: &str,
        name: &'static str,
        way: impl FnMut() -> Result<Cost> + 'a,
    ) -> Self {
        let mut row = Self::new(name, way);
        if !is_installed(program) {
            row.way = None;
        }
        row
    }

    pub(crate) fn wall(&self) -> Spread {
        Spread::of(self.costs.iter().map(|cost| cost.wall.as_secs_f64()))
    }

    pub(crate) fn cpu(&self) -> Spread {
        Spread::of(self.costs.iter().map(|cost| cost.cpu.as_secs_f64()))
    }
}

/// The median of what was measured, and its ends.
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }
}

/// Every way once per round.
pub(crate) fn run_all(
    rows: &mut [Row<'_>],
    rounds: usize,
    files: &Files,
    is_full: bool,
) -> Result<()> {
    for _ in 0..rounds {
        for row in &mut *rows {
            let Some(way) = &mut row.way else { continue };
            if is_full {
                files.spoil()?;
            }
            let cost = way().map_err(|error| format!("{}: {error}", row.name))?;
            row.costs.push(cost);
            if is_full {
                files.check()?;
            }
        }
    }
    Ok(())
}
