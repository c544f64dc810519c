//! A dirty bitmap that follows a machine to another host, so that the next backup is incremental.
//!
//! ```text
//! cargo run --release --example migrate_bitmap                                    the demo
//! cargo run --release --example migrate_bitmap -- inspect FILE [--json] [--size NODE=BYTES]...
//! cargo run --release --example migrate_bitmap -- make TRUTH.json FILE
//!
//!  host A   full backup, then guest writes ─┐                    one disk, on storage that both have
//!            bitmap: live, over a socket    │ stop
//!  host B                                   └─▶ guest writes; what was left of the bitmap comes, and both
//!                                               are one: an incremental backup copies exactly what has
//!                                               changed since the full one on host A
//! ```
//!
//! The demo is run over QEMU's stream and over the native one, which loses its connection on the way.
//!
//! `inspect` tells which bitmaps a stream of QEMU holds: a whole migration file, or the bare bodies of the section
//! `dirty-bitmap`. A stream does not tell how long the disks are; what is not given by `--size` is taken from
//! where the bits end. With `--json` each bitmap is a line with `node`, `name`, `granularity`, `enabled`,
//! `persistent`, `dirty_bytes`, `sha256` and `dirty_ranges`. `make` writes the smallest whole stream that
//! `qemu-system-* -incoming` loads, from a truth file like those in `tests/fixtures`. A bad stream gives one line
//! that says what is wrong at which byte, and a failure. One without bitmaps is not bad: that is said in one line
//! on the standard error, and nothing is printed. Where a machine's devices have their state the bitmaps of QEMU's
//! streams have come, and nothing is read from there on.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock"
)]

#[path = "support/mod.rs"]
mod support;
#[path = "../tests/migration/truth.rs"]
mod truth;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs::{self, File};
use std::future::{Future, poll_fn};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::driver::Driver;
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, WriteAt};
use blockjob::migration::driver::{self, ReadStream, Sent, WriteStream};
use blockjob::migration::{
    BodyPart, Fault, ForeignSection, ForeignSections, Framing, IncomingMigration, IncomingOptions,
    Mode, Next, OutgoingMigration, OutgoingOptions, RecordBody, RecordReader, SkipRam, StreamError,
    StreamKind,
};
use blockjob::{
    Backup, BackupOptions, BackupSync, Begin, BitmapMigration, BitmapOptions, ByteRange,
    Granularity, IncomingError, Limits, Node, SnapshotOf, Unmap,
};
use serde_json::json;

use support::clock::{TimerClock, block_on};
use support::file::FileDevice;
use support::temp::TempFolder;
use truth::{Truth, bits_of, digest, migration_of, quiesce};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let done = match arguments() {
        Ok(Command::Demo) => demo(),
        Ok(Command::Inspect(inspect)) => inspect.run(),
        Ok(Command::Make { truth, stream }) => make(Path::new(&truth), Path::new(&stream)),
        Err(error) => Err(error.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Command {
    Demo,
    Inspect(Inspect),
    Make { truth: String, stream: String },
}

fn arguments() -> std::result::Result<Command, lexopt::Error> {
    use lexopt::prelude::*;
    let mut args = lexopt::Parser::from_env();
    let command = match args.next()? {
        None => return Ok(Command::Demo),
        Some(Value(command)) => command.string()?,
        Some(arg) => return Err(arg.unexpected()),
    };
    let mut files = Vec::new();
    let mut inspect = Inspect::default();
    while let Some(arg) = args.next()? {
        match arg {
            Value(file) => files.push(file.string()?),
            Long("json") if command == "inspect" => inspect.is_json = true,
            Long("size") if command == "inspect" => {
                let size = args.value()?.string()?;
                let (node, bytes) = size.rsplit_once('=').ok_or("--size wants NODE=BYTES")?;
                let bytes = bytes
                    .parse()
                    .map_err(|_| format!("--size: {bytes:?} is no number"))?;
                inspect.sizes.insert(node.to_owned(), bytes);
            }
            arg => return Err(arg.unexpected()),
        }
    }
    match (&command[..], &mut files[..]) {
        ("inspect", [file]) => {
            inspect.file = std::mem::take(file);
            Ok(Command::Inspect(inspect))
        }
        ("make", [truth, stream]) => Ok(Command::Make {
            truth: std::mem::take(truth),
            stream: std::mem::take(stream),
        }),
        _ => {
            Err("usage: inspect FILE [--json] [--size NODE=BYTES]... | make TRUTH.json FILE".into())
        }
    }
}

/// What is asked of a stream.
#[derive(Default)]
struct Inspect {
    file: String,
    is_json: bool,
    /// Bytes of disks, by their names in the stream.
    sizes: BTreeMap<String, u64>,
}

impl Inspect {
    fn run(self) -> Result<()> {
        let stream = fs::read(&self.file).map_err(|error| format!("{}: {error}", self.file))?;
        if stream.is_empty() {
            return Err("the stream is bad: at byte 0: there is nothing".into());
        }
        let framing = match stream.starts_with(b"QEVM") {
            true => Framing::Whole,
            false => Framing::Bare,
        };
        let found = Found::in_stream(&stream, framing);
        if let Some(told) = found.nothing() {
            eprintln!("{told}");
            return Ok(());
        }
        let mut sizes = found.ends;
        sizes.extend(self.sizes);
        let nodes: Vec<_> = sizes
            .into_iter()
            .map(|(name, bytes)| (name, Node::new(bytes)))
            .collect();
        let mut options = IncomingOptions::default();
        options.stream = StreamKind::Qemu(framing);
        options.foreign = Some(Box::new(SkipRam::new(PAGE)));
        let mut incoming = migration_of(&nodes).incoming(options);
        incoming.feed(&stream)?;
        incoming.finish()?;
        start_guest(&mut incoming, &nodes)?;
        let mut out = io::stdout().lock();
        for came in incoming.bitmaps() {
            let node = nodes.iter().find(|(name, _)| *name == came.id.node);
            let (_, node) = node.ok_or("a bitmap came to a disk that is not there")?;
            let bits = bits_of(node, &came.id.bitmap);
            let ranges: Vec<_> = bits.runs().map(|run| (run.start(), run.len())).collect();
            if self.is_json {
                let line = json!({
                    "node": came.id.node,
                    "name": came.id.bitmap,
                    "granularity": came.granularity.bytes(),
                    "enabled": came.is_enabled,
                    "persistent": came.is_persistent,
                    "dirty_bytes": bits.dirty_bytes(),
                    "sha256": digest(&bits),
                    "dirty_ranges": ranges,
                });
                writeln!(out, "{line}")?;
                continue;
            }
            writeln!(
                out,
                "{}: granularity {}, disk of {} bytes",
                came.id,
                came.granularity,
                node.len()
            )?;
            let of = |is: bool, one, other| if is { one } else { other };
            let enabled = of(came.is_enabled, "enabled", "disabled");
            let persistent = of(came.is_persistent, ", persistent", "");
            writeln!(
                out,
                "  {enabled}{persistent}, {} bytes dirty, sha256 {}",
                bits.dirty_bytes(),
                digest(&bits)
            )?;
            for (offset, len) in ranges {
                writeln!(out, "  {offset:>16} +{len}")?;
            }
        }
        Ok(())
    }
}

/// What a look at a stream has found, before any bitmap is made.
struct Found {
    /// Where the bits of each disk end: it is as long at least.
    ends: BTreeMap<String, u64>,
    has_bitmaps: bool,
    /// What is wrong with it. That is told when it is loaded.
    error: Option<StreamError>,
    /// Whether what came last is the state of a device.
    is_device: bool,
}

impl Found {
    fn in_stream(stream: &[u8], framing: Framing) -> Self {
        let is_device = Arc::new(AtomicBool::new(false));
        let sections = Sections {
            ram: SkipRam::new(PAGE),
            is_device: Arc::clone(&is_device),
        };
        let mut reader = RecordReader::new(framing).with_foreign(Some(Box::new(sections)));
        let mut ends: BTreeMap<String, u64> = BTreeMap::new();
        let mut has_bitmaps = false;
        let mut node = String::new();
        let read = reader.feed(stream, &mut |record| {
            if let Some(name) = record.node {
                node = String::from_utf8_lossy(name).into_owned();
                ends.entry(node.clone()).or_default();
            }
            has_bitmaps |= record.body != RecordBody::Nothing;
            if let RecordBody::Bits {
                first_sector,
                sectors,
                ..
            } = record.body
            {
                let end = first_sector
                    .saturating_add(sectors.into())
                    .saturating_mul(512);
                let known = ends.entry(node.clone()).or_default();
                // No disk is longer than what a file can have.
                *known = end.max(*known).min(i64::MAX as u64);
            }
            Ok::<(), StreamError>(())
        });
        Self {
            ends,
            has_bitmaps,
            error: read.and_then(|_| reader.finish()).err(),
            is_device: is_device.load(Ordering::Relaxed),
        }
    }

    /// What is to be said of a stream that is sound as far as it was read, and has no bitmap.
    fn nothing(&self) -> Option<String> {
        if self.has_bitmaps {
            return None;
        }
        match &self.error {
            None => Some("no bitmaps: the stream ends without one".to_owned()),
            Some(StreamError {
                at,
                why: Fault::ForeignSection { name },
                ..
            }) if self.is_device => Some(format!(
                "no bitmaps before byte {at}, where the state of device {name:?} begins"
            )),
            Some(_) => None,
        }
    }
}

/// Bytes of a page of x86.
const PAGE: u64 = 4096;

/// Steps over memory, and notes what it cannot step over.
struct Sections {
    ram: SkipRam,
    is_device: Arc<AtomicBool>,
}

impl ForeignSections for Sections {
    fn body(
        &mut self,
        section: &ForeignSection<'_>,
        bytes: &[u8],
    ) -> std::result::Result<BodyPart, String> {
        self.is_device.store(section.is_full, Ordering::Relaxed);
        self.ram.body(section, bytes)
    }
}

/// Writes the smallest stream that QEMU loads.
fn make(truth: &Path, stream: &Path) -> Result<()> {
    let text =
        fs::read_to_string(truth).map_err(|error| format!("{}: {error}", truth.display()))?;
    let (source, nodes) = Truth::parse(&text)?.source()?;
    let mut options = OutgoingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    let mut outgoing = source.outgoing(options)?;
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    outgoing.stop(&guards.iter().collect::<Vec<_>>())?;
    let mut file =
        File::create(stream).map_err(|error| format!("{}: {error}", stream.display()))?;
    let mut piece = vec![0; 64 << 10];
    while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece)? {
        file.write_all(&piece[..len])?;
    }
    file.sync_all()?;
    outgoing.finish()?;
    Ok(())
}

fn start_guest(incoming: &mut IncomingMigration, nodes: &[(String, Node)]) -> Result<()> {
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    incoming.guest_starts(&guards.iter().collect::<Vec<_>>())?;
    Ok(())
}

/// Bytes of the disk, which is a hole but for what guests write. Its bitmap has 2 MiB, enough to be sent live.
const LEN: u64 = 8 << 30;
const BLOCK: u64 = 4096;
/// Nothing here takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(60);
const SESSION: [u8; 16] = *b"a demonstration.";

/// The disk, which both hosts can reach, and what was written to it.
struct Disk {
    file: File,
    /// Blocks that were written since the full backup.
    written: parking_lot::Mutex<BTreeSet<u64>>,
    writes: AtomicU64,
}

fn demo() -> Result<()> {
    let folder = TempFolder::new("migrate-bitmap")?;
    for stream in [
        StreamKind::Qemu(Framing::Bare),
        StreamKind::Native { session: SESSION },
    ] {
        let open = |name: &str| {
            let path = folder.path().join(name);
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)?;
            file.set_len(LEN)?;
            Ok::<_, io::Error>(file)
        };
        let disk = Disk {
            file: open("disk")?,
            written: parking_lot::Mutex::new(BTreeSet::new()),
            writes: AtomicU64::new(0),
        };
        let backup = open("backup")?;
        move_machine(stream, &disk, &backup)?;
    }
    println!("OK: both backups hold exactly what was written, on whichever host");
    Ok(())
}

fn move_machine(stream: StreamKind, disk: &Disk, backup: &File) -> Result<()> {
    let (here, there) = (Node::new(LEN), Node::new(LEN));
    // Something was written before the full backup, which begins the bitmap.
    for block in 0..200 {
        disk.file
            .write_all_at(&[7; BLOCK as usize], block * 31 * BLOCK)?;
        backup.write_all_at(&[7; BLOCK as usize], block * 31 * BLOCK)?;
    }
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(512);
    here.bitmaps().add(&quiesce(&here), "daily", options)?;

    let (one, other) = UnixStream::pair()?;
    let (is_stopping_here, is_stopping_there) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let guest = scope.spawn(|| guest(1, &here, disk, &is_stopping_here));
        let host = scope.spawn(|| host_b(stream, other, &there, disk, &is_stopping_there));
        let told = host_a(stream, one, &here, disk, || {
            is_stopping_here.store(true, Ordering::Release);
            guest.join().expect("a guest does not panic")
        });
        is_stopping_here.store(true, Ordering::Release);
        let received = host.join().expect("a host does not panic");
        match (told, received) {
            (Err(told), Err(received)) => {
                Err(format!("{received}; at the other end: {told}").into())
            }
            (told, received) => told.and(received),
        }
    })?;
    incremental_backup(stream, &there, disk, backup)
}

/// A guest, until it is stopped.
fn guest(seed: u64, node: &Node, disk: &Disk, is_stopping: &AtomicBool) -> Result<()> {
    let queue = node.queue();
    let mut random = seed;
    while !is_stopping.load(Ordering::Acquire) {
        random = random
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(1_442_695_040_888_963_407);
        let block = (random >> 33) % (LEN / BLOCK);
        let at = block * BLOCK;
        let ticket = match queue.begin_write((at..at + BLOCK).into()) {
            Begin::Go(ticket) => ticket,
            Begin::Wait(mut pending) => block_on(poll_fn(|cx| pending.poll_begin(cx.waker())))?,
            Begin::Refused(refused) => return Err(refused.into()),
        };
        disk.written.lock().insert(block);
        let bytes = [(random >> 25) as u8; BLOCK as usize];
        ticket.finish(disk.file.write_all_at(&bytes, at))?;
        disk.writes.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Waits until some guest has written so often again.
fn wait_for_writes(disk: &Disk, more: u64) -> Result<()> {
    let started = Instant::now();
    let before = disk.writes.load(Ordering::Relaxed);
    while disk.writes.load(Ordering::Relaxed) < before + more {
        if started.elapsed() > PATIENCE {
            return Err("the guest does not write".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Sends the bitmap while its guest writes, stops it, and sends the rest.
fn host_a(
    stream: StreamKind,
    socket: UnixStream,
    node: &Node,
    disk: &Disk,
    stop_guest: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let clock = TimerClock::new();
    let mut options = OutgoingOptions::default();
    options.stream = stream;
    options.mode = Mode::Hybrid;
    let migration = BitmapMigration::new().with_node("disk0", node);
    let mut outgoing = migration.outgoing(options)?;
    let mut channel = Channel::new(socket)?;
    if matches!(stream, StreamKind::Native { .. }) {
        // The connection breaks: some of the first bytes do not arrive, and the other end says which.
        let mut piece = vec![0; 60_000];
        for is_last in [false, false, true] {
            let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece)? else {
                return Err("there is nothing to send".into());
            };
            channel.send(&piece[..if is_last { len.div_ceil(2) } else { len }])?;
        }
        channel.send(&[])?;
        outgoing.reconnect()?;
        let resumed = answer_until(
            &mut outgoing,
            &mut channel,
            |sent| sent != Sent::Answer,
            &clock,
        )?;
        assert_eq!(resumed, Sent::Idle, "all that there is live");
    }
    let started = Instant::now();
    while disk.writes.load(Ordering::Relaxed) < 500 {
        if started.elapsed() > PATIENCE {
            return Err("the guest does not write".into());
        }
        answer_until(
            &mut outgoing,
            &mut channel,
            |sent| sent == Sent::Idle,
            &clock,
        )
        .map(drop)?;
        thread::sleep(Duration::from_millis(1));
    }
    stop_guest()?;
    outgoing.stop(&[&quiesce(node)])?;
    let left = outgoing.bytes_left();
    // Nothing is to be sent while the guest stands still.
    assert_eq!(
        block_on(driver::send(&mut outgoing, &mut channel, &clock))?,
        Sent::Idle
    );
    assert_eq!(outgoing.bytes_sent_stopped(), 0);
    outgoing.guest_started()?;
    channel.send(&[])?;
    wait_for_writes(disk, 200)?;
    answer_until(
        &mut outgoing,
        &mut channel,
        |sent| sent == Sent::Done,
        &clock,
    )
    .map(drop)?;
    // The native stream says itself that it is over, and host B has hung up by now.
    if !matches!(stream, StreamKind::Native { .. }) {
        channel.send(&[])?;
    }
    outgoing.finish()?;
    println!(
        "{}: {} bytes sent; {left} bytes of bits were left when the guest stopped, and none sent while it stood still",
        name_of(stream),
        outgoing.bytes_sent()
    );
    Ok(())
}

/// Sends, and listens to what is answered, until it comes to what is wanted.
fn answer_until(
    outgoing: &mut OutgoingMigration,
    channel: &mut Channel,
    is_wanted: impl Fn(Sent) -> bool,
    clock: &TimerClock,
) -> Result<Sent> {
    loop {
        let sent = block_on(driver::send(outgoing, channel, clock))?;
        if is_wanted(sent) {
            return Ok(sent);
        }
        let more = block_on(driver::answers(outgoing, channel))?;
        if !more {
            return Err("the other host is gone".into());
        }
    }
}

/// Receives the bitmap, lets the guest run as soon as it may, and goes on receiving while it writes.
fn host_b(
    stream: StreamKind,
    socket: UnixStream,
    node: &Node,
    disk: &Disk,
    is_stopping: &AtomicBool,
) -> Result<()> {
    let migration = BitmapMigration::new().with_node("disk0", node);
    let mut options = IncomingOptions::default();
    options.stream = stream;
    let mut incoming = migration.incoming(options);
    let mut channel = Channel::new(socket.try_clone()?)?;
    let mut back = Answers(socket);
    let is_native = matches!(stream, StreamKind::Native { .. });
    let mut receive = |incoming: &mut IncomingMigration| {
        block_on(driver::receive(incoming, &mut channel, &mut back, |_| {
            false
        }))
    };
    if is_native {
        receive(&mut incoming)?;
        incoming.reconnect()?;
    }
    receive(&mut incoming)?;
    // Nothing of the bitmap can be had before it is whole.
    assert!(node.bitmaps().query("daily")?.is_busy());
    assert!(
        node.bitmaps()
            .snapshot("daily", SnapshotOf::WithSuccessor)
            .is_err()
    );
    incoming.guest_starts(&[&quiesce(node)])?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| guest(2, node, disk, is_stopping));
        let received = receive(&mut incoming);
        let waited = wait_for_writes(disk, 200);
        is_stopping.store(true, Ordering::Release);
        guest.join().expect("a guest does not panic")?;
        received?;
        waited?;
        Ok::<(), Box<dyn Error + Send + Sync>>(())
    })?;
    match incoming.finish() {
        Ok(()) => Ok(()),
        Err(IncomingError::Incomplete { bitmap }) => Err(format!("{bitmap} did not come").into()),
        Err(error) => Err(error.into()),
    }
}

fn name_of(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Native { .. } => "native stream",
        _ => "QEMU's stream",
    }
}

/// An incremental backup on the host that the machine has come to, by the bitmap that came with it.
fn incremental_backup(stream: StreamKind, node: &Node, disk: &Disk, backup: &File) -> Result<()> {
    let info = node.bitmaps().query("daily")?;
    assert!(info.is_recording && !info.is_busy());
    let written = disk.written.lock();
    // The bitmap has what was written since the full backup, on whichever host, and nothing else.
    let blocks: BTreeSet<u64> = bits_of(node, "daily")
        .runs()
        .inspect(|run| assert_eq!((run.start() % BLOCK, run.len() % BLOCK), (0, 0)))
        .flat_map(|run| run.start() / BLOCK..run.end() / BLOCK)
        .collect();
    assert!(blocks == *written, "exactly what has changed is dirty");

    let source = FileDevice::new(disk.file.try_clone()?, 2)?;
    let target = Recorded {
        device: FileDevice::new(backup.try_clone()?, 2)?,
        clusters: parking_lot::Mutex::new(BTreeSet::new()),
    };
    let mut options = BackupOptions::default();
    options.sync = BackupSync::Incremental;
    options.bitmap = Some("daily".to_owned());
    let mut job = Backup::new(node, source.limits(), target.limits(), options)?;
    assert_eq!(job.cluster_size(), CLUSTER);
    job.job().start()?;
    let driver = Driver::new(&source, &target, TimerClock::new());
    block_on(driver.run_backup(&mut job))?;

    let expected: BTreeSet<u64> = written
        .iter()
        .map(|block| block * BLOCK / CLUSTER)
        .collect();
    let copied = target.clusters.lock();
    assert!(*copied == expected, "exactly what has changed is copied");
    assert_eq!(node.bitmaps().query("daily")?.dirty_bytes, 0);
    let (mut here, mut there) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
    for block in written
        .iter()
        .copied()
        .chain((0..200).map(|block| block * 31))
    {
        disk.file.read_exact_at(&mut here, block * BLOCK)?;
        backup.read_exact_at(&mut there, block * BLOCK)?;
        assert!(here == there, "block {block} of the backup");
    }
    println!(
        "{}: {} clusters copied, those of {} blocks in {} guest writes",
        name_of(stream),
        copied.len(),
        written.len(),
        disk.writes.load(Ordering::Relaxed)
    );
    Ok(())
}

/// The least that a backup copies.
const CLUSTER: u64 = 64 << 10;

/// The target of a backup, which notes what is written to it.
struct Recorded {
    device: FileDevice,
    clusters: parking_lot::Mutex<BTreeSet<u64>>,
}

impl Recorded {
    fn note(&self, range: ByteRange) {
        let clusters = range.start() / CLUSTER..range.end().div_ceil(CLUSTER);
        self.clusters.lock().extend(clusters);
    }
}

impl BlockDevice for Recorded {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.device.limits()
    }
}

impl WriteAt for Recorded {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.note((offset..offset + buf.as_ref().len() as u64).into());
        self.device.write_at(offset, buf).await
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        self.note(range);
        self.device.write_zeroes(range, unmap).await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.note(range);
        self.device.discard(range).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.device.flush().await
    }

    fn settle(&self) -> impl Future<Output = ()> {
        self.device.settle()
    }
}

/// A socket on which bytes go in messages: an empty one is the VMM's own, "the bitmaps have this as far as they
/// come for now".
struct Channel {
    socket: UnixStream,
    /// Bytes of the message that is being read.
    left: usize,
    is_answered: bool,
}

impl Channel {
    fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self {
            socket,
            left: 0,
            is_answered: false,
        })
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.is_answered = true;
        // No message is longer than what is sent at once.
        self.socket.write_all(&(bytes.len() as u32).to_le_bytes())?;
        self.socket.write_all(bytes)
    }
}

impl WriteStream for Channel {
    async fn write_all(&mut self, buf: Vec<u8>, len: usize) -> (io::Result<()>, Vec<u8>) {
        (self.send(&buf[..len]), buf)
    }
}

impl ReadStream for Channel {
    async fn read(&mut self, mut buf: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        // Host A hears answers as they are.
        let read = if self.is_answered {
            self.socket.read(&mut buf)
        } else {
            self.message(&mut buf)
        };
        (read, buf)
    }
}

impl Channel {
    fn message(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let mut len = [0; 4];
            self.socket.read_exact(&mut len)?;
            self.left = u32::from_le_bytes(len) as usize;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let len = buf.len().min(self.left);
        let read = self.socket.read(&mut buf[..len])?;
        self.left -= read;
        Ok(read)
    }
}

/// The way back to host A.
struct Answers(UnixStream);

impl WriteStream for Answers {
    async fn write_all(&mut self, buf: Vec<u8>, len: usize) -> (io::Result<()>, Vec<u8>) {
        (self.0.write_all(&buf[..len]), buf)
    }
}
