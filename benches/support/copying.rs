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
    ByteRange, Cancel, Event, Extent, Limits, Mirror, MirrorOptions, MirrorSync, Node, RangeLimits,
    Unmap,
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

    pub(crate) fn write_now(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
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
        (self.write_now(offset, buf.as_ref()), buf)
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
    options.sync = sync;
    let clock = TimerClock::new();
    let (began, cpu) = (Instant::now(), own_cpu());
    let mut cost = None;
    let held = run_mirror(
        node,
        (source, target, &clock),
        options,
        (PATIENCE, linger),
        |moment| {
            if moment == Moment::Ready {
                cost = Some(Cost {
                    wall: began.elapsed(),
                    cpu: own_cpu() - cpu,
                });
            }
            Ok(())
        },
    )?;
    let (Some(cost), Some(held)) = (cost, held) else {
        return Err("the mirror does not come to its end".into());
    };
    Ok(Mirrored { cost, held })
}

/// Where a mirror is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Ready.
    Ready,
    /// About to be told to end.
    Ending,
    /// The guest is held, and both disks are equal.
    Held,
}

/// Mirrors one device to the other, and tells where it is. If it is not ready within the first of `times` it is
/// cancelled; otherwise it waits for the second and switches, and says how long the guest was held for that.
pub(crate) fn run_mirror<S, T>(
    node: &Node,
    (source, target, clock): (S, T, &TimerClock),
    mut options: MirrorOptions,
    (patience, linger): (Duration, Duration),
    mut tell: impl FnMut(Moment) -> Result<()>,
) -> Result<Option<Duration>>
where
    S: ReadAt<Buf = AlignedBuf>,
    T: WriteAt<Buf = AlignedBuf>,
{
    options.job.id = Some("peers".to_owned());
    let mut mirror = Mirror::new(node, source.limits(), target.limits(), options)?;
    let driver = Driver::new(source, target, clock);
    let job = mirror.job().clone();
    job.start()?;
    let mut held = Duration::ZERO;
    let mut is_ready = false;
    let mut given_up = None;
    loop {
        let mut run = pin!(driver.run(&mut mirror));
        let mut wait = None;
        if !is_ready {
            wait = Some(Box::pin(clock.sleep_until(clock.now() + patience)));
        }
        let mut most = pin!(clock.sleep_until(clock.now() + patience + linger + PATIENCE));
        let driven = block_on(poll_fn(|cx| {
            if most.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err("the mirror does not come to its end".into()));
            }
            while let Poll::Ready(event) = job.poll_event(cx.waker()) {
                if matches!(event, Event::Ready { .. }) && given_up.is_none() {
                    is_ready = true;
                    tell(Moment::Ready)?;
                    wait = Some(Box::pin(clock.sleep_until(clock.now() + linger)));
                }
            }
            if let Some(sleep) = &mut wait
                && sleep.as_mut().poll(cx).is_ready()
            {
                wait = None;
                tell(Moment::Ending)?;
                match is_ready {
                    true => job.complete()?,
                    false => given_up = Some(job.cancel(Cancel::Force)?),
                }
            }
            run.as_mut().poll(cx).map(Ok::<_, Error>)
        }));
        match driven? {
            Driven::Switch(switch) => {
                let since = switch.held_since();
                tell(Moment::Held)?;
                switch.commit();
                held = clock.now() - since;
            }
            Driven::SwitchBack(_) => unreachable!("this job is in no group"),
            // Cancelled.
            Driven::Done(_) if given_up.is_some() => return Ok(None),
            Driven::Done(result) => {
                result?;
                return Ok(Some(held));
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
        let line = format!("{{\"execute\": {command}}}\n");
        lines.get_mut().write_all(line.as_bytes())?;
        Ok(())
    }

    pub(crate) fn run(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        match self.wait_for_within("\"return\"", PATIENCE)? {
            true => Ok(()),
            false => Err(format!("no answer to {command}").into()),
        }
    }

    /// Puts a node `slow-target` before the target, which takes that many bytes in a second.
    pub(crate) fn slow_down(&mut self, rate: u64) -> Result<()> {
        self.run(&format!(
            r#""object-add", "arguments": {{"qom-type": "throttle-group", "id": "slow", "limits": {{"bps-write": {rate}}}}}"#
        ))?;
        self.run(
            r#""blockdev-add", "arguments": {"driver": "throttle", "node-name": "slow-target", "throttle-group": "slow", "file": "target"}"#,
        )
    }

    /// Reads up to a line that has this in it.
    pub(crate) fn wait_for(&mut self, what: &str) -> Result<()> {
        match self.wait_for_within(what, PATIENCE)? {
            true => Ok(()),
            false => Err(format!("{what} does not come").into()),
        }
    }

    /// Whether a line that has this in it comes within that time. If not, nothing more is to be read.
    pub(crate) fn wait_for_within(&mut self, what: &str, time: Duration) -> Result<bool> {
        let lines = self.lines.as_mut().ok_or("not connected")?;
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            lines.get_mut().set_read_timeout(Some(left))?;
            let mut line = String::new();
            match lines.read_line(&mut line) {
                Ok(0) => return Err("the storage daemon is gone".into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            if line.contains("\"error\"") || line.contains("BLOCK_JOB_ERROR") {
                return Err(line.into());
            }
            if line.contains(what) {
                return Ok(true);
            }
        }
    }

    /// Bytes that it has given to files, in all.
    pub(crate) fn written(&self) -> Result<u64> {
        let counts = std::fs::read_to_string(format!("/proc/{}/io", self.child.id()))?;
        let count = counts.lines().find_map(|line| line.strip_prefix("wchar: "));
        Ok(count.ok_or("no count")?.parse()?)
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
