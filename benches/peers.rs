//! A live mirror of a file beside what else copies one, on the same files and in the same minute.
//!
//! ```text
//! cargo bench --bench peers -- [--mib N] [--runs N]
//! ```
//!
//! It makes two files of that size (1024 MiB) in `/dev/shm`, or where temporary files go, and copies one
//! to the other in each of the ways, one way after the other, that many times (5): what else the machine
//! does hits them alike. It prints medians, as the Markdown that stands in the README.
//!
//! ```text
//! bare          loops of pread and pwrite, 1 MiB each
//! in place      a mirror whose devices do their work within `poll`: one thread does everything
//! pool          a mirror over `examples/support/file.rs`, with threads for the system calls
//! ```
//!
//! The clock of a mirror, ours and the peer's, runs from the command to start it to the moment that it is
//! ready. A program that is not installed is said to be absent.
#![allow(
    missing_docs,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time and brings the threads"
)]

use std::fs::{File, OpenOptions};
use std::future::{Future, poll_fn};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, ReadAt, WriteAt};
use blockjob::{
    ByteRange, Event, Extent, GuestQueue, Limits, Mirror, MirrorOptions, MirrorSync, Node,
    RangeLimits, Unmap,
};
use rustix::time::{ClockId, clock_gettime};

#[path = "../examples/support/mod.rs"]
mod support;

use support::clock::{TimerClock, block_on};
use support::file::{self, FileDevice, KnownData};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

const MIB: u64 = 1 << 20;
const GIB: f64 = (1u64 << 30) as f64;
const GRANULE: u64 = 64 << 10;
/// The longest that any of them may take for one copy.
const PATIENCE: Duration = Duration::from_secs(300);

struct Options {
    len: u64,
    runs: usize,
    /// Length of the disk without data.
    hole: u64,
}

/// What one copy took.
#[derive(Clone, Copy, Debug)]
struct Cost {
    wall: Duration,
    cpu: Duration,
}

/// The two files, gone when this is.
struct Files {
    folder: PathBuf,
    len: u64,
}

impl Files {
    fn new(len: u64) -> Result<Self> {
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
    fn fill(&self) -> Result<()> {
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

    fn create(&self, name: &str) -> Result<File> {
        let file = File::create_new(self.path(name))?;
        file.set_len(self.len)?;
        Ok(file)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn source(&self) -> Result<File> {
        let path = self.path("source");
        Ok(OpenOptions::new().read(true).write(true).open(path)?)
    }

    fn target(&self) -> Result<File> {
        let path = self.path("target");
        Ok(OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Makes each granule of the target differ from the source.
    fn spoil(&self) -> Result<()> {
        let (source, target) = (self.source()?, self.target()?);
        let mut byte = [0];
        for at in (0..self.len).step_by(GRANULE as usize) {
            source.read_exact_at(&mut byte, at)?;
            target.write_all_at(&[!byte[0]], at)?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
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

fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Reads and writes on `threads` threads, each taking the next piece that nobody has.
fn bare(files: &Files, threads: usize) -> Result<Cost> {
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
struct InPlace(File, Limits, KnownData);

impl InPlace {
    fn new(file: File) -> Result<Self> {
        let mut limits = Limits::new(file.metadata()?.len());
        limits.write_zeroes = Some(RangeLimits {
            align: 1,
            max: 1 << 30,
        });
        limits.cheap_zeroes = true;
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
struct Mirrored {
    cost: Cost,
    held: Duration,
}

/// Mirrors one device to the other. Once ready, waits for `linger` and switches.
fn mirror<S, T>(
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

fn in_place(files: &Files) -> Result<Cost> {
    let (source, target) = (
        InPlace::new(files.source()?)?,
        InPlace::new(files.target()?)?,
    );
    let node = Node::new(files.len);
    Ok(mirror(&node, source, target, MirrorSync::Full, Duration::ZERO)?.cost)
}

fn pool(files: &Files, threads: usize, sync: MirrorSync) -> Result<Cost> {
    let source = FileDevice::new(files.source()?, threads)?;
    let target = FileDevice::new(files.target()?, threads)?;
    let node = Node::new(files.len);
    Ok(mirror(&node, source, target, sync, Duration::ZERO)?.cost)
}

/// How long a guest that writes 4 KiB a thousand times a second is held for the switch.
fn held(files: &Files) -> Result<Duration> {
    let source = FileDevice::new(files.source()?, 2)?;
    let target = FileDevice::new(files.target()?, 2)?;
    let disk = files.source()?;
    let node = Node::new(files.len);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let queue = node.queue();
        let guest = scope.spawn(|| write_now_and_then(queue, &disk, files.len, &stop));
        let linger = Duration::from_millis(100);
        let mirrored = mirror(&node, &source, &target, MirrorSync::Full, linger);
        stop.store(true, Ordering::Relaxed);
        guest.join().expect("no panic")?;
        Ok(mirrored?.held)
    })
}

fn write_now_and_then(
    queue: GuestQueue,
    disk: &File,
    len: u64,
    stop: &AtomicBool,
) -> io::Result<()> {
    let block = [0x42; 4096];
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        at = (at + 4096 * 7919) % len;
        let range = ByteRange::at(at, 4096).expect("within the disk");
        let ticket = block_on(async { queue.begin_write(range).await })?;
        // After the switch this is the old disk, which nobody looks at any more.
        ticket.finish(disk.write_all_at(&block, at))?;
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether the program can be started at all.
fn is_installed(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Processor time of a process, or of the children of this one that were waited for. In steps of 10 ms.
fn cpu_of(pid: u32, of_children: bool) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let first = if of_children { 13 } else { 11 };
    let ticks: u64 = fields[first].parse::<u64>()? + fields[first + 1].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

fn qemu_img(files: &Files) -> Result<Cost> {
    let cpu = cpu_of(std::process::id(), true)?;
    let began = Instant::now();
    let status = Command::new("qemu-img")
        .args(["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"])
        .args([files.path("source"), files.path("target")])
        .status()?;
    let wall = began.elapsed();
    if !status.success() {
        return Err("qemu-img failed".into());
    }
    Ok(Cost {
        wall,
        cpu: cpu_of(std::process::id(), true)? - cpu,
    })
}

/// A storage daemon, and the socket to talk to it. Ended when dropped.
struct Daemon {
    child: Child,
    lines: Option<BufReader<UnixStream>>,
}

impl Daemon {
    fn start(files: &Files) -> Result<Self> {
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

    fn send(&mut self, command: &str) -> Result<()> {
        let lines = self.lines.as_mut().ok_or("not connected")?;
        writeln!(lines.get_mut(), r#"{{"execute": {command}}}"#)?;
        Ok(())
    }

    fn run(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        self.wait_for("\"return\"")
    }

    /// Reads up to a line that has this in it.
    fn wait_for(&mut self, what: &str) -> Result<()> {
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

    fn cpu(&self) -> Result<Duration> {
        cpu_of(self.child.id(), false)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn blockdev_mirror(files: &Files, sync: &str) -> Result<Cost> {
    let mut daemon = Daemon::start(files)?;
    let cpu = daemon.cpu()?;
    let began = Instant::now();
    daemon.send(&format!(
        r#""blockdev-mirror", "arguments": {{"job-id": "job", "device": "source", "target": "target", "sync": "{sync}"}}"#
    ))?;
    daemon.wait_for("\"BLOCK_JOB_READY\"")?;
    let cost = Cost {
        wall: began.elapsed(),
        cpu: daemon.cpu()? - cpu,
    };
    daemon.send(r#""job-complete", "arguments": {"id": "job"}"#)?;
    daemon.wait_for("\"BLOCK_JOB_COMPLETED\"")?;
    daemon.send("\"quit\"")?;
    daemon.child.wait()?;
    Ok(cost)
}

/// One row: a way to do it, and what it took so far. Without a way, the program is absent.
struct Row<'a> {
    name: &'static str,
    way: Option<Box<dyn FnMut() -> Result<Cost> + 'a>>,
    costs: Vec<Cost>,
}

impl<'a> Row<'a> {
    fn new(name: &'static str, way: impl FnMut() -> Result<Cost> + 'a) -> Self {
        Self {
            name,
            way: Some(Box::new(way)),
            costs: Vec::new(),
        }
    }

    fn of_program(
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

    fn wall(&self) -> Spread {
        Spread::of(self.costs.iter().map(|cost| cost.wall.as_secs_f64()))
    }

    fn cpu(&self) -> Spread {
        Spread::of(self.costs.iter().map(|cost| cost.cpu.as_secs_f64()))
    }
}

/// The median of what was measured, and its ends.
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
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
fn run_all(rows: &mut [Row<'_>], rounds: usize, files: &Files, is_full: bool) -> Result<()> {
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

fn throughput(options: &Options) -> Result<()> {
    let files = Files::new(options.len)?;
    files.fill()?;
    let daemon = "qemu-storage-daemon";
    let full = MirrorSync::Full;
    let mut rows = [
        Row::new("bare loop, 1 thread", || bare(&files, 1)),
        Row::new("bare loop, 2 threads", || bare(&files, 2)),
        Row::new("blockjob, in place", || in_place(&files)),
        Row::new("blockjob, 1 + 1 I/O threads", || pool(&files, 1, full)),
        Row::new("blockjob, 2 + 2 I/O threads", || pool(&files, 2, full)),
        Row::of_program("qemu-img", "qemu-img convert -n -W -m 16", || {
            qemu_img(&files)
        }),
        Row::of_program(daemon, "QEMU blockdev-mirror", || {
            blockdev_mirror(&files, "full")
        }),
    ];
    run_all(&mut rows, options.runs, &files, true)?;

    let gib = options.len as f64 / GIB;
    println!(
        "| {} MiB, all data, to READY | GiB/s | slowest to fastest | CPU s per GiB |",
        options.len / MIB
    );
    println!("|---|---|---|---|");
    for row in &rows {
        if row.costs.is_empty() {
            println!("| {} | absent | | |", row.name);
            continue;
        }
        let (wall, cpu) = (row.wall(), row.cpu());
        println!(
            "| {} | {:.2} | {:.2} to {:.2} | {:.2} |",
            row.name,
            gib / wall.median,
            gib / wall.most,
            gib / wall.least,
            cpu.median / gib,
        );
    }
    println!();

    let held = (0..options.runs)
        .map(|_| Ok(held(&files)?.as_secs_f64() * 1e3))
        .collect::<Result<Vec<_>>>()?;
    let held = Spread::of(held.into_iter());
    println!("| the guest stands still for the switch | ms | least to most |");
    println!("|---|---|---|");
    println!(
        "| blockjob | {:.2} | {:.2} to {:.2} |",
        held.median, held.least, held.most
    );
    println!();
    Ok(())
}

/// Whether the peer leaves a target sparse whose source is: else a long one would fill the memory.
fn keeps_holes() -> Result<bool> {
    if !is_installed("qemu-storage-daemon") {
        return Ok(false);
    }
    let files = Files::new(256 * MIB)?;
    files.create("source")?;
    let target = files.create("target")?;
    blockdev_mirror(&files, "full")?;
    Ok(target.metadata()?.blocks() * 512 < MIB)
}

fn holes(options: &Options) -> Result<()> {
    let is_safe = keeps_holes()?;
    let files = Files::new(options.hole)?;
    files.create("source")?;
    files.create("target")?;
    let daemon = if is_safe { "qemu-storage-daemon" } else { "" };
    let mut rows = [
        Row::new("blockjob, sync full", || pool(&files, 1, MirrorSync::Full)),
        Row::of_program(daemon, "QEMU blockdev-mirror, sync full", || {
            blockdev_mirror(&files, "full")
        }),
        Row::new("blockjob, sync none", || pool(&files, 1, MirrorSync::None)),
        Row::of_program(daemon, "QEMU blockdev-mirror, sync none", || {
            blockdev_mirror(&files, "none")
        }),
    ];
    run_all(&mut rows, options.runs, &files, false)?;
    println!(
        "| {} GiB without data, to READY | ms | fastest to slowest |",
        options.hole >> 30
    );
    println!("|---|---|---|");
    for row in &rows {
        if row.costs.is_empty() {
            println!("| {} | absent | |", row.name);
            continue;
        }
        let wall = row.wall();
        println!(
            "| {} | {:.2} | {:.2} to {:.2} |",
            row.name,
            wall.median * 1e3,
            wall.least * 1e3,
            wall.most * 1e3,
        );
    }
    Ok(())
}

fn options() -> Result<Options> {
    use lexopt::{Arg, ValueExt};
    let mut options = Options {
        len: 1 << 30,
        runs: 5,
        hole: 1 << 40,
    };
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("mib") => options.len = args.value()?.parse::<u64>()?.clamp(1, 2048) * MIB,
            Arg::Long("runs") => options.runs = args.value()?.parse::<usize>()?.max(1),
            Arg::Long("test") => {
                options.len = 64 * MIB;
                options.runs = 1;
                options.hole = 16 << 30;
            }
            // What cargo adds.
            Arg::Long("bench") => {}
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let result = options().and_then(|options| {
        throughput(&options)?;
        holes(&options)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}
