//! Mirrors a disk while a guest writes to it, switches the guest over, and proves that nothing was
//! lost.
//!
//! ```text
//! cargo run --release --example live_mirror                      makes its own disk and guest
//! cargo run --release --example live_mirror -- SOURCE TARGET     mirrors one file to another
//! ```
//!
//! The proof looks at every byte of both files when all is over:
//!
//! 1. The source holds what was acknowledged to the guest before the switch, block by block, and
//!    nothing that came after it.
//! 2. The target holds what was acknowledged to the guest until the end, block by block.
//! 3. Where the guest did not write after the switch, both are equal, byte by byte: they were equal
//!    at the switch. Their checksums, which are told, are equal then, too.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock"
)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::BlockDevice;
use blockjob::{
    Adaptive, Begin, Cancel, CopyMode, Event, Granularity, Job, Mirror, MirrorOptions, Node,
    Status, Switch,
};
use indicatif::{BinaryBytes as HumanBytes, ProgressBar, ProgressStyle};
use support::clock::{TimerClock, block_on};
use support::file::FileDevice;
use support::guest::{
    self, BLOCK, Change, Current, Disk, Guest, GuestReport, NOBODY, Stamp, Stamps, apply,
};
use support::temp::TempFolder;

const HELP: &str = "\
Mirrors a disk image while a guest writes to it, switches the guest over at the instant both are
equal, and proves afterwards that nothing was lost.

Usage: live_mirror [OPTIONS] [SOURCE TARGET]

Without files it makes an image of its own in a temporary folder. A TARGET that does not exist is
made; one that does must be as long as SOURCE. SOURCE is not changed unless --writers says so.

Options:
  --size BYTES         length of the image that is made            [default: 1G]
  --writers N          guest threads that write meanwhile          [default: 4; 0 with files]
  --seconds S          how long the guest writes before the switch [default: 3; 0 with files]
  --speed BYTES        most bytes to copy per second, 0: no limit  [default: 0]
  --granularity BYTES  what one bit of the dirty bitmap stands for [default: 64K]
  --workers N          copies in flight at the same time           [default: 16]
  --mode MODE          how what the guest writes is copied: background, write-blocking or
                       adaptive                                    [default: background]
  --json               print one JSON object at the end and nothing else
  --help               print this
BYTES may end in K, M or G (powers of 1024).
";

/// How long the guest writes to its new disk before everything is checked.
const AFTER_SWITCH: Duration = Duration::from_millis(500);
/// Threads that serve each file.
const THREADS: usize = 2;

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;

#[derive(Debug)]
struct Options {
    files: Option<(PathBuf, PathBuf)>,
    size: u64,
    writers: u32,
    load: Duration,
    mirror: MirrorOptions,
    json: bool,
}

fn main() -> ExitCode {
    let outcome = Options::from_command_line().and_then(|options| match options {
        None => {
            print!("{HELP}");
            Ok(())
        }
        Some(options) => run(&options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("live_mirror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let Some((source, target)) = &options.files else {
        let folder = TempFolder::new("live-mirror")
            .map_err(|error| format!("cannot make a temporary folder: {error}"))?;
        let source = make_source(&folder.path().join("source"), options.size)?;
        return mirror(options, source, &folder.path().join("target"));
    };
    mirror(options, open_source(source, options.writers)?, target)
}

/// The whole of it, from two disks to the proof.
fn mirror(options: &Options, source: Disk, target: &Path) -> Result<()> {
    let len = source.device.limits().len;
    if options.writers > 0 && !guest::has_room(len, options.writers) {
        return Err(format!("{len} bytes are too few for {} writers", options.writers).into());
    }
    let (target, made) = open_target(target, len, options.writers)?;
    let node = Node::new(len);
    let mut mirror = Mirror::new(
        &node,
        source.device.limits(),
        target.device.limits(),
        options.mirror.clone(),
    )?;
    let job = mirror.job().clone();
    let granularity = mirror.granularity();
    let (source, target) = (Arc::new(source), Arc::new(target));
    let machine = Machine {
        node,
        current: Current::new(Arc::clone(&source)).copied_to(Arc::clone(&target)),
        source,
        target,
        clock: TimerClock::new(),
        stop: AtomicBool::new(false),
    };

    let start = machine.clock.now();
    let (ready, held, guests) = thread::scope(|scope| {
        let end = EndAll(&machine, &job);
        let guests: Vec<_> = (0..options.writers)
            .map(|index| {
                let guest = machine.guest(index, options.writers);
                scope.spawn(move || guest.run())
            })
            .collect();
        let copier = scope.spawn(|| machine.copy(&mut mirror, options));
        job.start()?;
        let ready = watch(&machine, &job, options, start, || {
            copier.is_finished() || guests.iter().any(|guest| guest.is_finished())
        });
        if guests.iter().any(|guest| guest.is_finished()) {
            let _ = job.cancel(Cancel::Force);
        }
        let held = join(copier);
        if held.is_ok() && options.writers > 0 {
            thread::sleep(AFTER_SWITCH);
        }
        drop(end);
        let reports = guests.into_iter().map(join).collect::<Result<Vec<_>>>();
        Ok::<_, Failure>((ready, held, reports))
    })?;
    let guests = guests.map_err(|error| format!("a write of the guest failed: {error}"))?;
    let held = held?;
    let took = machine.clock.now() - start;

    if !options.json {
        println!("checking every byte of both files");
    }
    let (rewritten, checksum) = machine.prove()?;
    made.keep();
    let summary = Summary {
        len,
        granularity,
        copied: job.query().progress.current,
        ready: ready.ok_or("the job has never been ready")?,
        took,
        held,
        guests: guests
            .into_iter()
            .fold(GuestReport::default(), GuestReport::add),
        rewritten,
        checksum,
    };
    if options.json {
        println!("{}", summary.json());
    } else {
        summary.print();
    }
    Ok(())
}

/// All that guest and copier share.
struct Machine {
    node: Node,
    current: Current,
    source: Arc<Disk>,
    target: Arc<Disk>,
    clock: TimerClock,
    /// The guest's threads are to end.
    stop: AtomicBool,
}

impl Machine {
    fn guest(&self, index: u32, guests: u32) -> Guest<'_> {
        Guest {
            index,
            guests,
            queue: self.node.queue(),
            current: &self.current,
            stop: &self.stop,
            len: self.node.len(),
        }
    }

    /// Drives the job to its end and returns how long the guest was held.
    fn copy(&self, mirror: &mut Mirror, options: &Options) -> Result<Duration> {
        let driver = Driver::new(&self.source.device, &self.target.device, &self.clock);
        let mut held = None;
        loop {
            match block_on(driver.run(mirror)) {
                Driven::Switch(switch) => held = Some(self.switch(switch, options)?),
                Driven::SwitchBack(_) => unreachable!("this job is in no group"),
                Driven::Done(Ok(())) => return Ok(held.ok_or("the job ended without a switch")?),
                Driven::Done(Err(error)) => {
                    return Err(format!("the mirror failed: {error}").into());
                }
            }
        }
    }

    /// Points the guest to the target.
    fn switch(&self, switch: Switch, options: &Options) -> Result<Duration> {
        if options.writers == 0 {
            return Ok(self.commit(switch));
        }
        // One write more, to a block that no guest thread owns, to see what becomes of one that waits.
        let Begin::Wait(mut waiting) = self.node.begin_write(guest::nobodys()) else {
            return Err("a write was let in while the guest was held".into());
        };
        let held = self.commit(switch);
        let ticket = block_on(poll_fn(|cx| waiting.poll_begin(cx.waker())))?;
        let stamp = Stamp::new(NOBODY, 1);
        apply(ticket, &self.current, Change::Write(stamp), &mut Vec::new())?;
        if self.target.stamps.of(0) != stamp || self.source.stamps.of(0) == stamp {
            return Err("a write that waited at the switch did not go to the new disk".into());
        }
        Ok(held)
    }

    fn commit(&self, switch: Switch) -> Duration {
        let since = switch.held_since();
        self.current.replace(Arc::clone(&self.target));
        switch.commit();
        self.clock.now() - since
    }

    /// Compares both files with what is known of them and with each other. Returns how many blocks the
    /// guest wrote to after the switch, and the CRC-32 that both files have of all others.
    fn prove(&self) -> Result<(u64, u32)> {
        const CHUNK: u64 = 1 << 20;
        let mut rewritten = 0;
        let mut checksums = [crc32fast::Hasher::new(), crc32fast::Hasher::new()];
        let [mut old, mut new, mut expected] = [vec![], vec![], vec![0; BLOCK as usize]];
        for start in (0..self.node.len()).step_by(CHUNK as usize) {
            let len = CHUNK.min(self.node.len() - start) as usize;
            for (disk, bytes) in [(&self.source, &mut old), (&self.target, &mut new)] {
                bytes.resize(len, 0);
                disk.device.file().read_exact_at(bytes, start)?;
            }
            let blocks = old.chunks(BLOCK as usize).zip(new.chunks(BLOCK as usize));
            for (block, (old, new)) in (start / BLOCK..).zip(blocks) {
                let mut is_stamped = |stamp: Stamp, bytes: &[u8]| {
                    stamp.fill(block, &mut expected);
                    bytes == expected
                };
                let at_switch = self.source.stamps.of(block);
                if at_switch != Stamp::BEFORE && !is_stamped(at_switch, old) {
                    return Err(lost("the source does not hold what was written", block));
                }
                let later = self.target.stamps.of(block);
                if later == Stamp::BEFORE {
                    checksums[0].update(old);
                    checksums[1].update(new);
                    if old != new {
                        return Err(lost("source and target differ", block));
                    }
                    continue;
                }
                rewritten += 1;
                if !is_stamped(later, new) {
                    return Err(lost("the target does not hold what was written", block));
                }
            }
        }
        let [source, target] = checksums.map(crc32fast::Hasher::finalize);
        if source != target {
            return Err(format!("PROOF FAILED: checksums {source:08x} and {target:08x}").into());
        }
        Ok((rewritten, source))
    }
}

fn lost(what: &str, block: u64) -> Failure {
    format!("PROOF FAILED: {what} at byte {}", block * BLOCK).into()
}

/// Ends guest and copier when it is dropped, also by a panic, so that nobody waits for them in vain.
struct EndAll<'a>(&'a Machine, &'a Job);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
        // Refused when the job is over, as it should be.
        let _ = self.1.cancel(Cancel::Force);
    }
}

/// The thread's result; its panic goes on here.
fn join<T, E: Into<Failure>>(thread: thread::ScopedJoinHandle<'_, Result<T, E>>) -> Result<T> {
    match thread.join() {
        Ok(result) => result.map_err(Into::into),
        Err(panic) => resume_unwind(panic),
    }
}

/// When the job was ready.
struct Ready {
    after: Duration,
    copied: u64,
}

/// Shows how far the job is until it is over, and asks for its end once it is ready and the guest has
/// written for long enough.
fn watch(
    machine: &Machine,
    job: &Job,
    options: &Options,
    start: Duration,
    is_over: impl Fn() -> bool,
) -> Option<Ready> {
    let bar = progress_bar(options);
    let mut ready = None;
    loop {
        // Asked first: what was told before the end is still to be taken after it.
        let is_last = is_over();
        while let Some(event) = job.next_event() {
            let Event::Ready { progress, .. } = event else {
                continue;
            };
            let after = machine.clock.now() - start;
            if !options.json {
                bar.suspend(|| {
                    println!("ready after {after:.2?}: guest writes keep being copied");
                });
            }
            ready = Some(Ready {
                after,
                copied: progress.current,
            });
        }
        if is_last {
            break;
        }
        let info = job.query();
        bar.set_prefix(info.status.to_string());
        bar.set_length(info.progress.total);
        bar.set_position(info.progress.current);
        let left = info.progress.total - info.progress.current;
        bar.set_message(format!("{} left", HumanBytes(left)));
        if info.status == Status::Ready && machine.clock.now() - start >= options.load {
            // Refused only if it is over by now, as is seen soon.
            let _ = job.complete();
        }
        thread::sleep(Duration::from_millis(20));
    }
    bar.finish_and_clear();
    ready
}

fn progress_bar(options: &Options) -> ProgressBar {
    if options.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{prefix:8} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} \
         eta {eta} {msg}",
    )
    .expect("the template is as the bar wants it");
    ProgressBar::new(0).with_style(style)
}

fn make_source(path: &Path, len: u64) -> Result<Disk> {
    let make = || {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path)?;
        file.set_len(len)?;
        let stamps = guest::make_image(&file, len, 1)?;
        let device = FileDevice::new(file, THREADS)?;
        Ok(Disk { device, stamps })
    };
    make().map_err(|error: io::Error| failed("make the image", path, &error))
}

fn open_source(path: &Path, writers: u32) -> Result<Disk> {
    open(
        path,
        OpenOptions::new().read(true).write(writers > 0),
        writers,
    )
    .map_err(|error| failed("open the source", path, &error))
}

/// The target, which is made if it is missing.
fn open_target(path: &Path, len: u64, writers: u32) -> Result<(Disk, MadeFile)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match open(path, &options, writers) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("open the target", path, &error)),
        Ok(disk) => return Ok((disk, MadeFile(None))),
    }
    let mut make = || {
        let file = options.create_new(true).open(path)?;
        let made = MadeFile(Some(path.to_owned()));
        file.set_len(len)?;
        let device = FileDevice::new(file, THREADS)?;
        let stamps = stamps_for(len, writers);
        Ok((Disk { device, stamps }, made))
    };
    make().map_err(|error: io::Error| failed("make the target", path, &error))
}

fn open(path: &Path, options: &OpenOptions, writers: u32) -> io::Result<Disk> {
    // Before it is opened: that of a pipe would wait for its other end.
    if !fs::metadata(path)?.is_file() {
        let kind = io::ErrorKind::InvalidInput;
        return Err(io::Error::new(kind, "not a regular file"));
    }
    let device = FileDevice::new(options.open(path)?, THREADS)?;
    let stamps = stamps_for(device.limits().len, writers);
    Ok(Disk { device, stamps })
}

/// Without a guest there is nothing to be noted.
fn stamps_for(len: u64, writers: u32) -> Stamps {
    Stamps::new(if writers > 0 { len } else { 0 })
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    format!("cannot {what} {}: {error}", path.display()).into()
}

/// A file that was made here. It goes again unless the mirror succeeds.
struct MadeFile(Option<PathBuf>);

impl MadeFile {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// What there is to tell when all is proven.
struct Summary {
    len: u64,
    granularity: Granularity,
    copied: u64,
    ready: Ready,
    took: Duration,
    held: Duration,
    guests: GuestReport,
    /// Blocks that the guest wrote to after the switch.
    rewritten: u64,
    /// Of all other blocks, on both disks.
    checksum: u32,
}

impl Summary {
    fn bytes_per_second(&self) -> u64 {
        (self.ready.copied as f64 / self.ready.after.as_secs_f64()) as u64
    }

    fn print(&self) {
        let guests = &self.guests;
        println!(
            "copied {} of data for a disk of {}: {} until ready, at {}/s",
            HumanBytes(self.copied),
            HumanBytes(self.len),
            HumanBytes(self.ready.copied),
            HumanBytes(self.bytes_per_second()),
        );
        println!("the guest was held for {:.2?} at the switch", self.held);
        if guests.changes > 0 {
            println!(
                "{} writes of the guest: {} waited at the gate, the slowest took {:.2?}; {} blocks \
                 of the new disk were written after the switch",
                guests.changes, guests.waited, guests.longest, self.rewritten,
            );
        }
        println!(
            "OK: source and target were equal at the switch (CRC-32 {:08x} on both), and no write was lost",
            self.checksum,
        );
    }

    fn json(&self) -> String {
        let guests = &self.guests;
        format!(
            concat!(
                r#"{{"verified": true, "bytes": {}, "granularity": {}, "copied_bytes": {}, "#,
                r#""ready_bytes": {}, "ready_seconds": {:.6}, "bytes_per_second": {}, "#,
                r#""seconds": {:.6}, "held_seconds": {:.6}, "guest_writes": {}, "#,
                r#""guest_writes_waited": {}, "guest_write_seconds_max": {:.6}, "#,
                r#""blocks_written_after_switch": {}, "crc32": "{:08x}"}}"#
            ),
            self.len,
            self.granularity.bytes(),
            self.copied,
            self.ready.copied,
            self.ready.after.as_secs_f64(),
            self.bytes_per_second(),
            self.took.as_secs_f64(),
            self.held.as_secs_f64(),
            guests.changes,
            guests.waited,
            guests.longest.as_secs_f64(),
            self.rewritten,
            self.checksum,
        )
    }
}

impl Options {
    /// What was asked for; `None` if that is help.
    fn from_command_line() -> Result<Option<Self>> {
        use lexopt::prelude::*;

        let mut mirror = MirrorOptions::default();
        // A job without a name tells no events.
        mirror.job.id = Some("live-mirror".to_owned());
        let (mut size, mut writers, mut load, mut json) = (1 << 30, None, None, false);
        let mut files = Vec::new();
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                Long("size") => size = args.value()?.parse_with(parse_bytes)?,
                Long("writers") => writers = Some(args.value()?.parse()?),
                Long("seconds") => load = Some(args.value()?.parse_with(parse_seconds)?),
                Long("speed") => mirror.job.speed = args.value()?.parse_with(parse_bytes)?,
                Long("granularity") => {
                    let granularity = args.value()?.parse_with(parse_granularity)?;
                    mirror.granularity = Some(granularity);
                }
                Long("workers") => mirror.workers = args.value()?.parse()?,
                Long("mode") => mirror.copy_mode = args.value()?.parse_with(parse_mode)?,
                Long("json") => json = true,
                Long("help") | Short('h') => return Ok(None),
                Value(path) => files.push(PathBuf::from(path)),
                _ => return Err(arg.unexpected().into()),
            }
        }
        let files = match <[PathBuf; 2]>::try_from(files) {
            Ok([source, target]) => Some((source, target)),
            Err(none) if none.is_empty() => None,
            Err(_) => return Err("give a source and a target, or neither; see --help".into()),
        };
        let is_given = files.is_some();
        Ok(Some(Self {
            size,
            writers: writers.unwrap_or(if is_given { 0 } else { 4 }),
            load: load.unwrap_or(Duration::from_secs(if is_given { 0 } else { 3 })),
            mirror,
            json,
            files,
        }))
    }
}

fn parse_bytes(text: &str) -> Result<u64> {
    let (number, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = number.parse()?;
    let bytes = number.checked_mul(1 << shift);
    bytes.ok_or_else(|| "more than 64 bits".into())
}

fn parse_granularity(text: &str) -> Result<Granularity> {
    let granularity = Granularity::from_bytes(parse_bytes(text)?);
    granularity.ok_or_else(|| "not a power of two".into())
}

fn parse_mode(text: &str) -> Result<CopyMode> {
    match text {
        "background" => Ok(CopyMode::Background),
        "write-blocking" => Ok(CopyMode::WriteBlocking),
        "adaptive" => Ok(CopyMode::Adaptive(Adaptive::default())),
        _ => Err("it is background, write-blocking or adaptive".into()),
    }
}

fn parse_seconds(text: &str) -> Result<Duration> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}
