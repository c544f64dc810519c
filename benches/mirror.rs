//! What a mirror costs the guest, by copy mode, beside QEMU's `blockdev-mirror` in the same modes.
//!
//! ```text
//! cargo bench --bench mirror -- [--mib N] [cost|guest|ready]...
//! ```
//!
//! ```text
//! cost          a write of 4 KiB to a disk in memory, and in write-blocking mode to a target in memory as well:
//!               what the gate adds to the copying of the bytes
//! guest         how long guest writes take until the mirror is ready, and from then on, with a target of
//!               40 MiB/s: a device that does one write after the other, in the order in which they come. The
//!               guest writes 4 KiB anywhere, with a rest of 4 ms after each: less than can be copied
//! ready         when it is ready, and how many bytes were sent until then, with a rest of 1 ms, on the first
//!               half of the disk: each write makes 64 KiB dirty, so that is more than can be copied
//! ```
//!
//! A mirror that is not ready in time (10 s) is cancelled. The disks of each that is ready are compared. The
//! guest of the storage daemon writes through an NBD export of it. A program that is not installed is said to be
//! absent.
#![allow(
    missing_docs,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time and brings the threads"
)]

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{
    Adaptive, BitmapOptions, ByteRange, CopyMode, GuestQueue, Job, Limits, Mirror, MirrorOptions,
    MirrorSync, Node,
};

#[path = "support/copying.rs"]
#[allow(dead_code, reason = "not all of it is used by all")]
mod copying;
#[path = "support/guest.rs"]
#[allow(dead_code, reason = "not all of it is used by all")]
mod guest;
#[path = "support/in_step.rs"]
mod in_step;
#[path = "support/random.rs"]
mod random;
#[path = "../examples/support/mod.rs"]
mod support;

use copying::{Daemon, Files, InPlace, MIB, Moment, Result, Spread, is_installed, run_mirror};
use guest::{BLOCK, Load, NbdGuest, Sample, Slow, beside, cells};
use in_step::{StopOnDrop, keep_in_step, wait_until_ready};
use support::clock::{TimerClock, block_on};

const DAEMON: &str = "qemu-storage-daemon";
/// A mirror that is not ready by then will never be.
const PATIENCE: Duration = Duration::from_secs(10);

struct Options {
    len: u64,
    /// Bytes in a second that the target takes.
    slow: u64,
    /// For a mirror to be ready.
    patience: Duration,
    /// How long it is watched from then on, and a guest without a mirror.
    linger: Duration,
    /// How often each way to write in memory is gone.
    rounds: usize,
    /// Which parts, all if none is named.
    parts: Vec<String>,
}

/// Writes in a row, in memory.
const WRITES: u64 = 1000;
/// They go to the first so many bytes, which stay in a cache.
const AREA: usize = 1 << 20;

/// A disk in memory and the target of its mirror, if it has one.
struct Memory {
    node: Node,
    queue: GuestQueue,
    source: Vec<u8>,
    target: Vec<u8>,
}

impl Memory {
    fn new() -> Self {
        let node = Node::new(64 * MIB);
        Self {
            queue: node.queue(),
            node,
            source: vec![0; AREA],
            target: vec![0; AREA],
        }
    }

    fn with_bitmap() -> Result<Self> {
        let disk = Self::new();
        let guard = disk.node.quiesce().try_guard().ok().ok_or("it is idle")?;
        let bitmaps = disk.node.bitmaps();
        bitmaps.add(&guard, "daily", BitmapOptions::default())?;
        drop(guard);
        Ok(disk)
    }

    /// A mirror of it that copies nothing but what is written from now on.
    fn mirror(&self, mode: CopyMode) -> Result<Mirror> {
        let limits = Limits::new(self.node.len());
        let mut options = MirrorOptions::default();
        options.job.id = Some("bench".to_owned());
        options.sync = MirrorSync::None;
        options.copy_mode = mode;
        Ok(Mirror::new(&self.node, limits, limits, options)?)
    }

    /// Nanoseconds per write, without anything that could tell of it.
    fn write_bare(&mut self, goes_on: bool, block: &[u8]) -> f64 {
        per_write(|at| {
            copy_to(&mut self.source, at, block);
            if goes_on {
                copy_to(&mut self.target, at, block);
            }
        })
    }

    /// The same through the gate. All of them go on to the target, or none.
    fn write(&mut self, goes_on: bool, block: &[u8]) -> Result<f64> {
        let mut active = 0;
        let nanos = per_write(|at| {
            let range = ByteRange::from(at as u64..(at + BLOCK) as u64);
            let ticket = self.queue.begin_write(black_box(range)).go();
            let ticket = ticket.expect("nobody holds the node, and nobody else writes");
            copy_to(&mut self.source, at, block);
            if let Some(write) = ticket.source_written(true) {
                let part = write.range();
                let part_of_block = part.start() as usize - at..part.end() as usize - at;
                copy_to(
                    &mut self.target,
                    part.start() as usize,
                    &block[part_of_block],
                );
                write.finish(Ok(()));
                active += 1;
            }
        });
        match active == if goes_on { WRITES } else { 0 } {
            true => Ok(nanos),
            false => Err(format!("{active} of {WRITES} writes went on to the target").into()),
        }
    }
}

fn copy_to(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(black_box(bytes));
    black_box(disk);
}

/// Block after block, in leaps, as often as the area has blocks or oftener.
fn per_write(mut write: impl FnMut(usize)) -> f64 {
    let began = Instant::now();
    for index in 0..WRITES as usize {
        write(index * 7919 * BLOCK % AREA);
    }
    began.elapsed().as_secs_f64() * 1e9 / WRITES as f64
}

fn is_in_step(job: &Job) -> bool {
    let progress = job.query().progress;
    progress.current == progress.total
}

fn cost(options: &Options) -> Result<()> {
    let [mut bare, mut alone, mut background, mut blocking] = [(); 4].map(|()| Memory::new());
    let mut recorded = Memory::with_bitmap()?;
    let mirrors = [
        background.mirror(CopyMode::Background)?,
        blocking.mirror(CopyMode::WriteBlocking)?,
        recorded.mirror(CopyMode::WriteBlocking)?,
    ];
    let jobs = mirrors.each_ref().map(|mirror| mirror.job().clone());
    let mut times: [Vec<f64>; 6] = Default::default();
    let stop = AtomicBool::new(false);
    let (stop, times_ref) = (&stop, &mut times);
    thread::scope(|scope| -> Result<()> {
        let _stop = StopOnDrop(stop);
        for mirror in mirrors {
            mirror.job().start()?;
            scope.spawn(move || keep_in_step(mirror, stop));
        }
        jobs.iter().for_each(wait_until_ready);
        for round in 0..options.rounds {
            let block = [round as u8; BLOCK];
            let nanos = [
                bare.write_bare(false, &block),
                alone.write(false, &block)?,
                background.write(false, &block)?,
                bare.write_bare(true, &block),
                blocking.write(true, &block)?,
                recorded.write(true, &block)?,
            ];
            for (times, nanos) in times_ref.iter_mut().zip(nanos) {
                times.push(nanos);
            }
            // What the one in background has to copy does not run beside the next round.
            let began = Instant::now();
            while !is_in_step(&jobs[0]) && began.elapsed() < PATIENCE {
                thread::yield_now();
            }
        }
        Ok(())
    })?;
    let is_copied = |disk: &Memory| disk.source == disk.target;
    if !(is_copied(&blocking) && is_copied(&recorded)) {
        return Err("the target in memory differs".into());
    }

    println!("| a write of 4 KiB, disks in memory | ns | least to most | added |");
    println!("|---|---|---|---|");
    let of = times.map(|times| Spread::of(times.into_iter()));
    let rows = [
        ("bytes to the source", None),
        ("blockjob, no mirror", Some(0)),
        ("background, in step", Some(0)),
        ("bytes to the source, then to the target", None),
        ("write-blocking, in step", Some(3)),
        ("write-blocking, beside a bitmap that records", Some(3)),
    ];
    for (of_row, (name, without)) in of.iter().zip(rows) {
        let added = without.map(|row: usize| format!("{:.0}", of_row.median - of[row].median));
        println!(
            "| {name} | {:.0} | {:.0} to {:.0} | {} |",
            of_row.median,
            of_row.least,
            of_row.most,
            added.unwrap_or_default(),
        );
    }
    println!();
    Ok(())
}

/// What a guest has felt of a mirror.
#[derive(Default)]
struct Course {
    samples: Vec<Sample>,
    began: Option<Instant>,
    ready: Option<Instant>,
    /// It was told to end.
    ended: Option<Instant>,
    /// Bytes sent to the target until it was ready, or told to end.
    sent: u64,
}

impl Course {
    /// Writes that began before it was ready, and those that did later; without those that had not ended when it
    /// was told to end.
    fn halves(&self) -> (Vec<Sample>, Vec<Sample>) {
        let has_ended = |sample: &&Sample| {
            self.ended
                .is_none_or(|ended| sample.began + sample.took < ended)
        };
        let seen = self.samples.iter().filter(has_ended).copied();
        seen.partition(|sample| self.ready.is_none_or(|ready| sample.began < ready))
    }
}

/// A guest of this library, whose disk is mirrored.
fn ours(files: &Files, load: Load, options: &Options, how: MirrorOptions) -> Result<Course> {
    let clock = TimerClock::new();
    let target = Slow::new(files, &clock, options.slow)?;
    let source = InPlace::new(files.source()?)?;
    let node = Node::new(files.len);
    let write = our_writes(&node, files, &target)?;
    let mut course = Course::default();
    let times = (options.patience, options.linger);
    let samples = beside(load, write, || {
        course.began = Some(Instant::now());
        run_mirror(&node, (source, &target, &clock), how, times, |moment| {
            match moment {
                Moment::Ready => {
                    course.ready = Some(Instant::now());
                    course.sent = target.sent();
                }
                Moment::Ending => {
                    course.ended = Some(Instant::now());
                    if course.ready.is_none() {
                        course.sent = target.sent();
                    }
                }
                Moment::Held => files.check()?,
            }
            Ok(())
        })
        .map(drop)
    })?;
    course.samples = samples;
    Ok(course)
}

/// Writes to the source, and to the target as well when the mirror wants it.
fn our_writes<'a>(
    node: &Node,
    files: &Files,
    target: &'a Slow<'a>,
) -> Result<impl FnMut(u64, &[u8]) -> Result<()> + Send + use<'a>> {
    let (queue, disk) = (node.queue(), files.source()?);
    Ok(move |at: u64, bytes: &[u8]| {
        let range = ByteRange::from(at..at + bytes.len() as u64);
        let ticket = block_on(async { queue.begin_write(range).await })?;
        let result = disk.write_all_at(bytes, at);
        if let Some(write) = ticket.source_written(result.is_ok()) {
            let part = write.range();
            let bytes = &bytes[(part.start() - at) as usize..(part.end() - at) as usize];
            write.finish(target.write_blocking(part.start(), bytes));
        }
        Ok(result?)
    })
}

/// A guest of the storage daemon, whose disk is mirrored.
fn its(files: &Files, load: Load, options: &Options, mode: &str) -> Result<Course> {
    let mut daemon = Daemon::start(files)?;
    let mut guest = NbdGuest::connect(&mut daemon, files)?;
    daemon.slow_down(options.slow)?;
    let mut course = Course::default();
    let to_source = AtomicU64::new(0);
    let write = |at: u64, bytes: &[u8]| {
        guest.write(at, bytes)?;
        to_source.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    };
    let samples = beside(load, write, || {
        let sent = |daemon: &Daemon| -> Result<u64> {
            Ok(daemon
                .written()?
                .saturating_sub(to_source.load(Ordering::Relaxed)))
        };
        let before = sent(&daemon)?;
        course.began = Some(Instant::now());
        daemon.send(&format!(
            r#""blockdev-mirror", "arguments": {{"job-id": "job", "device": "source", "target": "slow-target", "sync": "full", "copy-mode": "{mode}"}}"#
        ))?;
        let is_ready = daemon.wait_for_within("\"BLOCK_JOB_READY\"", options.patience)?;
        course.sent = sent(&daemon)?.saturating_sub(before);
        if is_ready {
            course.ready = Some(Instant::now());
            thread::sleep(options.linger);
        }
        course.ended = Some(Instant::now());
        Ok(())
    })?;
    course.samples = samples;
    if course.ready.is_some() {
        daemon.send(r#""job-complete", "arguments": {"id": "job"}"#)?;
        daemon.wait_for("\"BLOCK_JOB_COMPLETED\"")?;
        files.check()?;
    }
    Ok(course)
}

/// Every way to mirror, one after the other.
fn each_way(
    files: &Files,
    load: Load,
    options: &Options,
    mut row: impl FnMut(&str, Course),
) -> Result<()> {
    let with = |mode: CopyMode| {
        let mut how = MirrorOptions::default();
        how.copy_mode = mode;
        how
    };
    let mut narrow = with(CopyMode::WriteBlocking);
    narrow.workers = 1;
    narrow.chunk_max = 64 << 10;
    let adaptive = Adaptive::default();
    let mut hasty = adaptive;
    hasty.window = Duration::from_millis(200);
    let ways = [
        ("blockjob, background", with(CopyMode::Background)),
        ("blockjob, write-blocking", with(CopyMode::WriteBlocking)),
        ("blockjob, write-blocking, 1 worker, 64 KiB", narrow),
        ("blockjob, adaptive", with(CopyMode::Adaptive(adaptive))),
        (
            "blockjob, adaptive, windows of 0.2 s",
            with(CopyMode::Adaptive(hasty)),
        ),
    ];
    for (name, how) in ways {
        files.spoil()?;
        row(name, ours(files, load, options, how)?);
    }
    if !is_installed(DAEMON) {
        println!("| QEMU | absent |");
        return Ok(());
    }
    for mode in ["background", "write-blocking"] {
        files.spoil()?;
        row(
            &format!("QEMU, {mode}, over NBD"),
            its(files, load, options, mode)?,
        );
    }
    Ok(())
}

fn guest_writes(options: &Options) -> Result<()> {
    let files = Files::new(options.len)?;
    files.fill()?;
    let load = Load {
        len: files.len,
        rest: Duration::from_millis(4),
    };
    println!(
        "| guest writes of 4 KiB, target at {:.0} MiB/s | | p50 µs | p99 µs | max ms | writes |",
        options.slow as f64 / MIB as f64
    );
    println!("|---|---|---|---|---|---|");
    let alone = || {
        thread::sleep(options.linger);
        Ok(())
    };
    {
        let clock = TimerClock::new();
        let target = Slow::new(&files, &clock, options.slow)?;
        let node = Node::new(files.len);
        let mut write = our_writes(&node, &files, &target)?;
        let samples = beside(load, &mut write, alone)?;
        println!("| blockjob, no mirror | | {} |", cells(&samples));
        let both = |at: u64, bytes: &[u8]| {
            write(at, bytes)?;
            Ok(target.write_blocking(at, bytes)?)
        };
        let samples = beside(load, both, alone)?;
        println!(
            "| the same, and to the idle target | | {} |",
            cells(&samples)
        );
    }
    if is_installed(DAEMON) {
        let mut daemon = Daemon::start(&files)?;
        let mut guest = NbdGuest::connect(&mut daemon, &files)?;
        let samples = beside(load, |at, bytes| guest.write(at, bytes), alone)?;
        println!("| QEMU, no mirror, over NBD | | {} |", cells(&samples));
    }
    each_way(&files, load, options, |name, course| {
        let (before, after) = course.halves();
        println!("| {name} | to READY | {} |", cells(&before));
        match course.ready {
            Some(_) => println!("| | in step | {} |", cells(&after)),
            None => println!("| | never in step | | | | |"),
        }
    })?;
    println!();
    Ok(())
}

fn ready(options: &Options) -> Result<()> {
    let files = Files::new(options.len)?;
    files.fill()?;
    let load = Load {
        len: files.len / 2,
        rest: Duration::from_millis(1),
    };
    println!(
        "| {} MiB, half of it written to, target at {:.0} MiB/s | READY after s | MiB sent | p50 µs | p99 µs | max ms | writes | waited in all s |",
        options.len / MIB,
        options.slow as f64 / MIB as f64
    );
    println!("|---|---|---|---|---|---|---|---|");
    each_way(&files, load, options, |name, course| {
        let (before, _) = course.halves();
        let waited: Duration = before.iter().map(|sample| sample.took).sum();
        let time = course
            .ready
            .zip(course.began)
            .map(|(ready, began)| ready - began);
        let ready = match time {
            Some(time) => format!("{:.1}", time.as_secs_f64()),
            None => format!("never in {:.0}", options.patience.as_secs_f64()),
        };
        println!(
            "| {name} | {ready} | {:.0} | {} | {:.2} |",
            course.sent as f64 / MIB as f64,
            cells(&before),
            waited.as_secs_f64(),
        );
    })?;
    println!();
    Ok(())
}

fn options() -> Result<Options> {
    use lexopt::{Arg, ValueExt};
    let mut options = Options {
        len: 128 * MIB,
        slow: 40 * MIB,
        patience: PATIENCE,
        linger: Duration::from_secs(2),
        rounds: 1000,
        parts: Vec::new(),
    };
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("mib") => options.len = args.value()?.parse::<u64>()?.clamp(2, 512) * MIB,
            Arg::Long("test") => {
                options.len = 8 * MIB;
                options.slow = 64 * MIB;
                options.patience = Duration::from_millis(500);
                options.linger = Duration::from_millis(100);
                options.rounds = 3;
            }
            // What cargo adds.
            Arg::Long("bench") => {}
            Arg::Value(part) => options.parts.push(part.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let result = options().and_then(|options| {
        type Part = fn(&Options) -> Result<()>;
        let parts: [(&str, Part); 3] = [("cost", cost), ("guest", guest_writes), ("ready", ready)];
        let is_wanted = |name: &str| options.parts.iter().any(|part| part == name);
        parts
            .iter()
            .filter(|(name, _)| options.parts.is_empty() || is_wanted(name))
            .try_for_each(|(_, part)| part(&options))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirror: {error}");
            ExitCode::FAILURE
        }
    }
}
