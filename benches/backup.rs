//! A backup beside the mirror of the same data, plain loops, and QEMU's `blockdev-backup`.
//!
//! ```text
//! cargo bench --bench backup -- [--mib N] [--runs N] [full|incremental|engine|guest]...
//! ```
//!
//! ```text
//! full          all of a disk, in memory and on tmpfs: a mirror until it is ready, a backup to its end
//! incremental   1 % of a sparse disk of 64 GiB, scattered clusters of 64 KiB, by a bitmap
//! engine        what a cluster costs with devices that move nothing, and a write to a saved one
//! guest         how long guest writes take while a backup runs to a target of 40 MiB/s, 50 times slower
//!               than memory: a device that does one write after the other, in the order in which they come
//! ```
//!
//! Each way is gone one after the other, that many times (5): what else the machine does hits them alike.
//! It prints medians, as the Markdown that stands in the README. A program that is not installed is said to
//! be absent.
#![allow(
    missing_docs,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time and brings the threads"
)]

use std::cell::RefCell;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

use blockjob::driver::Driver;
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, FrozenDisk, ReadAt, WriteAt};
use blockjob::{
    Backup, BackupBuffer, BackupOptions, BackupSync, Begin, BitmapMode, BitmapOptions, ByteRange,
    Cancel, Content, Extent, Limits, MirrorSync, Node, OpKind, Outcome, Step, Unmap,
};

#[path = "support/copying.rs"]
#[allow(dead_code, reason = "not all of it is used by all")]
mod copying;
#[path = "support/guest.rs"]
#[allow(dead_code, reason = "not all of it is used by all")]
mod guest;
#[path = "support/random.rs"]
mod random;
#[path = "../examples/support/mod.rs"]
mod support;

use copying::{
    Cost, Daemon, Files, InPlace, MIB, Result, Row, Spread, bare, is_installed, mirror, own_cpu,
    run_all,
};
use guest::{Load, NbdGuest, Sample, Slow, beside, cells};
use random::random;
use support::clock::{TimerClock, block_on};
use support::file::FileDevice;

const GIB: f64 = (1u64 << 30) as f64;
const CLUSTER: u64 = 64 << 10;
/// The smallest clusters.
const SMALL: u64 = 4 << 10;
const DAEMON: &str = "qemu-storage-daemon";
/// The bitmap of the incremental backups.
const DAILY: &str = "daily";

struct Options {
    len: u64,
    runs: usize,
    /// Length of the sparse disk.
    sparse: u64,
    /// Clusters for the engine, and writes.
    clusters: u64,
    /// Of the disk that a guest writes to.
    guest_len: u64,
    /// Bytes in a second that its slow target takes.
    slow: u64,
    /// Which parts, all if none is named.
    parts: Vec<String>,
}

fn back_up<S, T>(node: &Node, source: S, target: T, options: BackupOptions) -> Result<Cost>
where
    S: ReadAt<Buf = AlignedBuf>,
    T: WriteAt<Buf = AlignedBuf>,
{
    let clock = TimerClock::new();
    let (began, cpu) = (Instant::now(), own_cpu());
    let mut backup = Backup::new(node, source.limits(), target.limits(), options)?;
    let driver = Driver::new(source, target, &clock);
    backup.job().start()?;
    block_on(driver.run_backup(&mut backup))?;
    Ok(Cost {
        wall: began.elapsed(),
        cpu: own_cpu() - cpu,
    })
}

/// As [`back_up`], by so many threads that each do what they take.
fn back_up_by<S, T>(
    threads: usize,
    node: &Node,
    source: S,
    target: T,
    options: BackupOptions,
) -> Result<Cost>
where
    S: ReadAt<Buf = AlignedBuf> + Sync,
    T: WriteAt<Buf = AlignedBuf> + Sync,
{
    let clock = TimerClock::new();
    let (began, cpu) = (Instant::now(), own_cpu());
    let mut backup = Backup::new(node, source.limits(), target.limits(), options)?;
    let driver = Driver::new(source, target, &clock);
    backup.job().start()?;
    let crew = driver.crew(&mut backup);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| block_on(crew.run_backup()));
        }
        block_on(crew.run_backup())
    })?;
    Ok(Cost {
        wall: began.elapsed(),
        cpu: own_cpu() - cpu,
    })
}

/// What was asked to be copied by a bitmap that stays as it is.
fn by_bitmap() -> BackupOptions {
    let mut options = BackupOptions::default();
    options.sync = BackupSync::Bitmap;
    options.bitmap = Some(DAILY.to_owned());
    options.bitmap_mode = Some(BitmapMode::Never);
    options
}

/// A disk in memory, whose requests are done by whoever polls them.
struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn new(len: u64, byte: u8) -> Self {
        Self(RefCell::new(vec![byte; len as usize]))
    }
}

impl BlockDevice for Memory {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        Limits::new(self.0.borrow().len() as u64)
    }
}

impl ReadAt for Memory {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let bytes = offset as usize..offset as usize + buf.as_ref().len();
        buf.as_mut().copy_from_slice(&self.0.borrow()[bytes]);
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(data(range))
    }
}

impl WriteAt for Memory {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let bytes = offset as usize..offset as usize + buf.as_ref().len();
        self.0.borrow_mut()[bytes].copy_from_slice(buf.as_ref());
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

fn data(range: ByteRange) -> Extent {
    Extent {
        len: range.len(),
        content: Content::Data,
        in_top: true,
    }
}

fn blockdev_backup(files: &Files) -> Result<Cost> {
    let mut daemon = Daemon::start(files)?;
    let cost = backup_by(&mut daemon, r#""sync": "full""#)?;
    daemon.send("\"quit\"")?;
    daemon.child.wait()?;
    Ok(cost)
}

/// A backup from `source` to `target` of the daemon, to its end.
fn backup_by(daemon: &mut Daemon, arguments: &str) -> Result<Cost> {
    let cpu = daemon.cpu()?;
    let began = Instant::now();
    daemon.send(&format!(
        r#""blockdev-backup", "arguments": {{"job-id": "job", "device": "source", "target": "target", {arguments}}}"#
    ))?;
    daemon.wait_for("\"BLOCK_JOB_COMPLETED\"")?;
    Ok(Cost {
        wall: began.elapsed(),
        cpu: daemon.cpu()? - cpu,
    })
}

fn full(options: &Options) -> Result<()> {
    let gib = options.len as f64 / GIB;
    let throughput = |rows: &[Row<'_>]| {
        for row in rows {
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
    };
    let files = Files::new(options.len)?;
    {
        let (source, target) = (Memory::new(options.len, 1), Memory::new(options.len, 2));
        let node = Node::new(options.len);
        let mut rows = [
            Row::new("memory, a mirror", || {
                Ok(mirror(&node, &source, &target, MirrorSync::Full, Duration::ZERO)?.cost)
            }),
            Row::new("memory, a backup", || {
                back_up(&node, &source, &target, BackupOptions::default())
            }),
        ];
        run_all(&mut rows, options.runs, &files, false)?;
        println!(
            "| {} MiB, all data | GiB/s | slowest to fastest | CPU s per GiB |",
            options.len / MIB
        );
        println!("|---|---|---|---|");
        throughput(&rows);
        drop(rows);
        if *source.0.borrow() != *target.0.borrow() {
            return Err("the copy in memory differs".into());
        }
    }

    files.fill()?;
    let node = Node::new(options.len);
    let pool = |threads| -> Result<_> {
        Ok((
            FileDevice::new(files.source()?, threads)?,
            FileDevice::new(files.target()?, threads)?,
        ))
    };
    let in_place = || -> Result<_> {
        Ok((
            InPlace::new(files.source()?)?,
            InPlace::new(files.target()?)?,
        ))
    };
    let sync = MirrorSync::Full;
    let mut rows = [
        Row::new("tmpfs, bare loop, 1 thread", || bare(&files, 1)),
        Row::new("tmpfs, bare loop, 2 threads", || bare(&files, 2)),
        Row::new("tmpfs, a mirror, on the driver's thread", || {
            let (source, target) = in_place()?;
            Ok(mirror(&node, source, target, sync, Duration::ZERO)?.cost)
        }),
        Row::new("tmpfs, a backup, on the driver's thread", || {
            let (source, target) = in_place()?;
            back_up(&node, source, target, BackupOptions::default())
        }),
        Row::new("tmpfs, a backup, by two threads, each in place", || {
            let (source, target) = in_place()?;
            back_up_by(2, &node, source, target, BackupOptions::default())
        }),
        Row::new("tmpfs, a mirror, 1 + 1 I/O threads", || {
            let (source, target) = pool(1)?;
            Ok(mirror(&node, source, target, sync, Duration::ZERO)?.cost)
        }),
        Row::new("tmpfs, a backup, 1 + 1 I/O threads", || {
            let (source, target) = pool(1)?;
            back_up(&node, source, target, BackupOptions::default())
        }),
        Row::new("tmpfs, a backup, 2 + 2 I/O threads", || {
            let (source, target) = pool(2)?;
            back_up(&node, source, target, BackupOptions::default())
        }),
        Row::of_program(DAEMON, "tmpfs, QEMU `blockdev-backup`", || {
            blockdev_backup(&files)
        }),
    ];
    run_all(&mut rows, options.runs, &files, true)?;
    throughput(&rows);
    println!();
    Ok(())
}

/// A sparse disk with data in 1 % of its clusters, and where they are.
fn scattered(len: u64) -> Result<(Files, Vec<u64>)> {
    let files = Files::new(len)?;
    let (source, target) = (files.create("source")?, files.create("target")?);
    let mut next = random(1);
    // One in each hundred, not always the same.
    let clusters: Vec<_> = (0..len / CLUSTER / 100)
        .map(|hundred| (hundred * 100 + next() % 100) * CLUSTER)
        .collect();
    let mut bytes = vec![0; CLUSTER as usize];
    for &at in &clusters {
        bytes.fill(1 + (next() % 255) as u8);
        source.write_all_at(&bytes, at)?;
        target.write_all_at(&[0; CLUSTER as usize], at)?;
    }
    Ok((files, clusters))
}

/// Reads and writes of one cluster each, by that many threads.
fn bare_clusters(files: &Files, clusters: &[u64], threads: usize) -> Result<Cost> {
    let (source, target) = (files.source()?, files.target()?);
    let next = AtomicU64::new(0);
    let copy = || -> io::Result<()> {
        let mut buf = vec![0; CLUSTER as usize];
        while let Some(&at) = clusters.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            source.read_exact_at(&mut buf, at)?;
            target.write_all_at(&buf, at)?;
        }
        Ok(())
    };
    let (began, cpu) = (Instant::now(), own_cpu());
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(copy)).collect();
        copy()?;
        others
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    Ok(Cost {
        wall: began.elapsed(),
        cpu: own_cpu() - cpu,
    })
}

/// A node whose bitmap has these clusters.
fn recorded(len: u64, clusters: &[u64]) -> Result<Node> {
    let node = Node::new(len);
    let guard = node.quiesce().try_guard().ok().ok_or("it is idle")?;
    node.bitmaps()
        .add(&guard, DAILY, BitmapOptions::default())?;
    drop(guard);
    for &at in clusters {
        let Begin::Go(ticket) = node.begin_write((at..at + CLUSTER).into()) else {
            return Err("a write is held back".into());
        };
        ticket.finish(true);
    }
    Ok(node)
}

fn check_clusters(files: &Files, clusters: &[u64]) -> Result<()> {
    let (source, target) = (files.source()?, files.target()?);
    let [mut left, mut right] = [(); 2].map(|()| vec![0; CLUSTER as usize]);
    for &at in clusters {
        source.read_exact_at(&mut left, at)?;
        target.read_exact_at(&mut right, at)?;
        if left != right {
            return Err(format!("the backup differs from its disk at {at}").into());
        }
        // The next one is to do it again.
        target.write_all_at(&[!right[0]], at)?;
    }
    Ok(())
}

fn incremental(options: &Options) -> Result<()> {
    let (files, clusters) = scattered(options.sparse)?;
    let (files, clusters) = (&files, &clusters[..]);
    let node = recorded(files.len, clusters)?;
    let mut daemon = None;
    if is_installed(DAEMON) {
        let mut started = Daemon::start(files)?;
        let bitmap = r#""node": "source", "name": "daily", "granularity": 65536"#;
        started.run(&format!(
            r#""block-dirty-bitmap-add", "arguments": {{{bitmap}}}"#
        ))?;
        let mut guest = NbdGuest::connect(&mut started, files)?;
        let mut bytes = vec![0; CLUSTER as usize];
        let disk = files.source()?;
        for &at in clusters {
            disk.read_exact_at(&mut bytes, at)?;
            guest.write(at, &bytes)?;
        }
        daemon = Some(started);
    }
    let is_there = daemon.is_some();
    let checked = |cost: Result<Cost>| -> Result<Cost> {
        let cost = cost?;
        check_clusters(files, clusters)?;
        Ok(cost)
    };
    let mut rows = [
        Row::new("bare `pread`/`pwrite`, 1 thread", || {
            checked(bare_clusters(files, clusters, 1))
        }),
        Row::new("bare `pread`/`pwrite`, 2 threads", || {
            checked(bare_clusters(files, clusters, 2))
        }),
        Row::new("blockjob, on the driver's thread", || {
            let source = InPlace::new(files.source()?)?;
            let target = InPlace::new(files.target()?)?;
            checked(back_up(&node, source, target, by_bitmap()))
        }),
        Row::new("blockjob, by two threads, each in place", || {
            let source = InPlace::new(files.source()?)?;
            let target = InPlace::new(files.target()?)?;
            checked(back_up_by(2, &node, source, target, by_bitmap()))
        }),
        Row::new("blockjob, 1 + 1 I/O threads", || {
            let source = FileDevice::new(files.source()?, 1)?;
            let target = FileDevice::new(files.target()?, 1)?;
            checked(back_up(&node, source, target, by_bitmap()))
        }),
        Row::new("blockjob, 2 + 2 I/O threads", || {
            let source = FileDevice::new(files.source()?, 2)?;
            let target = FileDevice::new(files.target()?, 2)?;
            checked(back_up(&node, source, target, by_bitmap()))
        }),
        Row::of_program(
            if is_there { DAEMON } else { "" },
            "QEMU `blockdev-backup`",
            || {
                let daemon = daemon.as_mut().expect("it is installed");
                let arguments = r#""sync": "bitmap", "bitmap": "daily", "bitmap-mode": "never""#;
                checked(backup_by(daemon, arguments))
            },
        ),
    ];
    run_all(&mut rows, options.runs, files, false)?;
    println!(
        "| {} clusters, 1 % of {} GiB | µs per cluster | fastest to slowest | CPU µs |",
        clusters.len(),
        options.sparse >> 30
    );
    println!("|---|---|---|---|");
    let of_one = |seconds: f64| seconds * 1e6 / clusters.len() as f64;
    for row in &rows {
        if row.costs.is_empty() {
            println!("| {} | absent | | |", row.name);
            continue;
        }
        let (wall, cpu) = (row.wall(), row.cpu());
        println!(
            "| {} | {:.1} | {:.1} to {:.1} | {:.1} |",
            row.name,
            of_one(wall.median),
            of_one(wall.least),
            of_one(wall.most),
            of_one(cpu.median),
        );
    }
    println!();
    Ok(())
}

/// Drives a backup over devices that move nothing, as many operations out as it likes. What `is_kept` says
/// so of is not done, and then the backup does not end.
fn run_machine(backup: &mut Backup, is_kept: impl Fn(OpKind) -> bool) -> Result<()> {
    let (mut out, mut kept) = (Vec::new(), Vec::new());
    loop {
        match backup.poll(Duration::ZERO, Waker::noop()) {
            Step::Op(op) if is_kept(op.kind()) => kept.push(op),
            Step::Op(op) => out.push(op),
            Step::Wait { .. } if out.is_empty() && kept.is_empty() => {
                return Err("it stands still".into());
            }
            Step::Wait { .. } if out.is_empty() => return Ok(()),
            Step::Wait { .. } => {
                for op in out.drain(..) {
                    let outcome = match op.kind() {
                        OpKind::Status(range) => Outcome::Status(data(range)),
                        _ => Outcome::Done,
                    };
                    backup.op_done(Duration::ZERO, op, outcome);
                }
            }
            Step::Done(result) => return Ok(result?),
            Step::Switch(_) | Step::SwitchBack(_) => unreachable!("a backup never switches"),
        }
    }
}

/// Every second cluster is dirty, so that each is claimed, asked about and copied on its own.
fn engine(options: &Options) -> Result<()> {
    let clusters = options.clusters;
    let len = clusters * 2 * CLUSTER;
    let starts: Vec<_> = (0..clusters).map(|index| index * 2 * CLUSTER).collect();
    let node = recorded(len, &starts)?;
    let limits = Limits::new(len);
    // One thread does all of it.
    let of_one = |since: Duration| (own_cpu() - since).as_secs_f64() * 1e9 / clusters as f64;
    let mut copied = Vec::new();
    let mut passed = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..options.runs {
        let mut backup = Backup::new(&node, limits, limits, by_bitmap())?;
        backup.job().start()?;
        let began = own_cpu();
        run_machine(&mut backup, |_| false)?;
        copied.push(of_one(began));
        drop(backup);

        // All but the last cluster are saved; then it stands.
        let write_all = |node: &Node| -> Result<f64> {
            let queue = node.queue();
            let began = own_cpu();
            for &at in &starts[..starts.len() - 1] {
                let Begin::Go(ticket) = queue.begin_write((at..at + 4096).into()) else {
                    return Err("a write to what is saved is held back".into());
                };
                ticket.finish(true);
            }
            Ok(of_one(began))
        };
        let alone = Node::new(len);
        passed[0].push(write_all(&alone)?);
        passed[1].push(write_all(&node)?);
        let mut backup = Backup::new(&node, limits, limits, by_bitmap())?;
        backup.job().start()?;
        let last = starts[starts.len() - 1];
        run_machine(&mut backup, |kind| {
            kind.range().is_some_and(|range| range.contains(last))
        })?;
        passed[2].push(write_all(&node)?);
    }
    println!("| devices that move nothing, {clusters} single clusters | CPU ns | least to most |");
    println!("|---|---|---|");
    let row = |name: &str, values: Vec<f64>| {
        let of = Spread::of(values.into_iter());
        println!(
            "| {name} | {:.1} | {:.1} to {:.1} |",
            of.median, of.least, of.most
        );
    };
    row("plan, claim, ask about, copy, release a cluster", copied);
    let [alone, recorded, saved] = passed;
    row("a guest write, nothing attached", alone);
    row("recorded, on granules that are dirty", recorded);
    row("the same during a backup, on saved clusters", saved);
    println!();
    Ok(())
}

/// A guest of this library, and what runs beside it.
fn our_guest(files: &Files, work: impl FnOnce(&Node) -> Result<()>) -> Result<Vec<Sample>> {
    let node = Node::new(files.len);
    let (queue, disk) = (node.queue(), files.source()?);
    let write = move |at: u64, bytes: &[u8]| -> Result<()> {
        let range = ByteRange::from(at..at + bytes.len() as u64);
        let ticket = block_on(async { queue.begin_write(range).await })?;
        Ok(ticket.finish(disk.write_all_at(bytes, at))?)
    };
    beside(every(files.len), write, || work(&node))
}

/// A load on all of the disk, with a rest of 1 ms after each write.
fn every(len: u64) -> Load {
    Load {
        len,
        rest: Duration::from_millis(1),
    }
}

/// A guest of the storage daemon, with a backup to a slow target beside it, or none.
fn its_guest(files: &Files, rate: u64, with_backup: bool, alone: Duration) -> Result<Vec<Sample>> {
    let mut daemon = Daemon::start(files)?;
    let mut guest = NbdGuest::connect(&mut daemon, files)?;
    daemon.slow_down(rate)?;
    beside(
        every(files.len),
        |at, bytes| guest.write(at, bytes),
        || {
            if !with_backup {
                thread::sleep(alone);
                return Ok(());
            }
            daemon.send(
                r#""blockdev-backup", "arguments": {"job-id": "job", "device": "source", "target": "slow-target", "sync": "full"}"#,
            )?;
            daemon.wait_for("\"BLOCK_JOB_COMPLETED\"")
        },
    )
}

/// What a buffer is.
enum Place {
    /// The driver's own thread reads and writes it.
    InPlace,
    /// A thread does.
    Thread,
}

/// A push to a slow target, with a buffer.
fn buffered<B>(files: &Files, node: &Node, buffer: B, rate: u64, chunk_max: u64) -> Result<()>
where
    B: ReadAt<Buf = AlignedBuf> + WriteAt,
{
    let clock = TimerClock::new();
    let target = Slow::new(files, &clock, rate)?;
    let source = InPlace::new(files.source()?)?;
    let mut backup = BackupOptions::default();
    backup.chunk_max = chunk_max;
    backup.buffer = Some(BackupBuffer::new(buffer.limits()));
    let mut backup = Backup::new(node, source.limits(), target.limits(), backup)?;
    let driver = Driver::new(source, target, &clock).with_buffer(buffer);
    backup.job().start()?;
    Ok(block_on(driver.run_backup(&mut backup))?)
}

/// A guest that copies each cluster to another file before it first writes to it, and nothing else.
fn bare_guest(files: &Files, place: &str, cluster: u64, alone: Duration) -> Result<Vec<Sample>> {
    let (disk, place) = (files.source()?, files.create(place)?);
    let mut is_saved = vec![false; files.len.div_ceil(cluster) as usize];
    let mut buf = vec![0; cluster as usize];
    let write = move |at: u64, bytes: &[u8]| -> Result<()> {
        if !std::mem::replace(&mut is_saved[(at / cluster) as usize], true) {
            let start = at / cluster * cluster;
            disk.read_exact_at(&mut buf, start)?;
            place.write_all_at(&buf, start)?;
        }
        Ok(disk.write_all_at(bytes, at)?)
    };
    beside(every(files.len), write, || {
        thread::sleep(alone);
        Ok(())
    })
}

/// The same as [`buffered`], where the guest's own thread saves what it is about to overwrite.
fn saving_guest(files: &Files, place: &str, rate: u64, cluster: u64) -> Result<Vec<Sample>> {
    let node = Node::new(files.len);
    let (queue, disk) = (node.queue(), files.source()?);
    let clock = TimerClock::new();
    let target = Slow::new(files, &clock, rate)?;
    let source = InPlace::new(files.source()?)?;
    let buffer = InPlace::new(files.create(place)?)?;
    let mut backup = BackupOptions::default();
    backup.buffer = Some(BackupBuffer::new(buffer.limits()));
    backup.min_cluster_size = cluster;
    let mut backup = Backup::new(&node, source.limits(), target.limits(), backup)?;
    let driver = Driver::new(source, target, &clock).with_buffer(buffer);
    backup.job().start()?;
    let crew = &driver.crew(&mut backup);
    let write = move |at: u64, bytes: &[u8]| -> Result<()> {
        let range = ByteRange::from(at..at + bytes.len() as u64);
        let ticket = block_on(crew.save_for(async { queue.begin_write(range).await }))?;
        Ok(ticket.finish(disk.write_all_at(bytes, at))?)
    };
    beside(every(files.len), write, || Ok(block_on(crew.run_backup())?))
}

/// A frozen view, of which another job on another thread makes a copy on the slow target.
fn fleece(files: &Files, node: &Node, rate: u64) -> Result<()> {
    let place = files.create("fleece")?;
    let clock = TimerClock::new();
    let (source, target) = (
        InPlace::new(files.source()?)?,
        InPlace::new(place.try_clone()?)?,
    );
    let mut options = BackupOptions::default();
    options.sync = BackupSync::None;
    options.view = true;
    let mut frozen = Backup::new(node, source.limits(), target.limits(), options)?;
    let (job, view) = (frozen.job().clone(), frozen.view().expect("asked for"));
    job.start()?;
    thread::scope(|scope| {
        let keeper = scope.spawn(|| {
            let driver = Driver::new(source, target, &clock);
            // It ends with a cancel.
            let _ = block_on(driver.run_backup(&mut frozen));
        });
        let push = || {
            while view.begin_read((0..1).into()).is_err() {
                thread::yield_now();
            }
            let (source, place) = (InPlace::new(files.source()?)?, InPlace::new(place)?);
            let disk = FrozenDisk::new(view, source, place);
            let clock = TimerClock::new();
            let target = Slow::new(files, &clock, rate)?;
            let mut options = BackupOptions::default();
            options.discard_source = true;
            back_up(&Node::new(files.len), disk, target, options).map(drop)
        };
        let pushed = push();
        job.cancel(Cancel::Force)?;
        keeper.join().expect("no panic");
        pushed
    })
}

fn guest_writes(options: &Options) -> Result<()> {
    let files = Files::new(options.guest_len)?;
    files.fill()?;
    let rate = options.slow;
    let alone = Duration::from_secs_f64(options.guest_len as f64 / rate as f64);
    println!(
        "| guest writes of 4 KiB, target at {:.0} MiB/s | p50 µs | p99 µs | max ms | writes |",
        rate as f64 / MIB as f64
    );
    println!("|---|---|---|---|---|");
    let row = |name: &str, samples: Vec<Sample>| println!("| {name} | {} |", cells(&samples));
    row(
        "blockjob, no backup",
        our_guest(&files, |_| {
            thread::sleep(alone);
            Ok(())
        })?,
    );
    row(
        "bare, each cluster is copied before it is written to",
        bare_guest(&files, "bare", CLUSTER, alone)?,
    );
    row(
        "bare, the same with clusters of 4 KiB",
        bare_guest(&files, "bare2", SMALL, alone)?,
    );
    let push = |workers: usize, chunk_max: u64| {
        our_guest(&files, |node| {
            let clock = TimerClock::new();
            let target = Slow::new(&files, &clock, rate)?;
            let mut backup = BackupOptions::default();
            backup.workers = workers;
            backup.chunk_max = chunk_max;
            back_up(node, InPlace::new(files.source()?)?, target, backup).map(drop)
        })
    };
    let push_with = |name: &str, buffer: Place, chunk_max: u64| {
        our_guest(&files, |node| {
            let file = files.create(name)?;
            match buffer {
                Place::InPlace => buffered(&files, node, InPlace::new(file)?, rate, chunk_max),
                Place::Thread => buffered(&files, node, FileDevice::new(file, 1)?, rate, chunk_max),
            }
        })
    };
    row("blockjob, push", push(16, MIB)?);
    row("blockjob, push, 1 worker, 64 KiB", push(1, CLUSTER)?);
    row(
        "blockjob, push with buffer, on an I/O thread",
        push_with("buffer", Place::Thread, MIB)?,
    );
    row(
        "blockjob, push with buffer",
        push_with("buffer2", Place::InPlace, MIB)?,
    );
    row(
        "blockjob, push with buffer, the guest's thread saves",
        saving_guest(&files, "buffer4", rate, CLUSTER)?,
    );
    row(
        "the same, clusters of 4 KiB",
        saving_guest(&files, "buffer5", rate, SMALL)?,
    );
    row(
        "blockjob, push with buffer, copies of 64 KiB",
        push_with("buffer3", Place::InPlace, CLUSTER)?,
    );
    row(
        "blockjob, frozen view, pushed by another job",
        our_guest(&files, |node| fleece(&files, node, rate))?,
    );
    if is_installed(DAEMON) {
        row(
            "QEMU, no backup, over NBD",
            its_guest(&files, rate, false, alone)?,
        );
        row(
            "QEMU `blockdev-backup`, over NBD",
            its_guest(&files, rate, true, alone)?,
        );
    } else {
        println!("| QEMU | absent | | | |");
    }
    println!();
    Ok(())
}

fn options() -> Result<Options> {
    use lexopt::{Arg, ValueExt};
    let mut options = Options {
        len: 1 << 30,
        runs: 5,
        sparse: 64 << 30,
        clusters: 1 << 17,
        guest_len: 256 * MIB,
        slow: 40 * MIB,
        parts: Vec::new(),
    };
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("mib") => options.len = args.value()?.parse::<u64>()?.clamp(1, 2048) * MIB,
            Arg::Long("runs") => options.runs = args.value()?.parse::<usize>()?.max(1),
            Arg::Long("test") => {
                options.len = 32 * MIB;
                options.runs = 1;
                options.sparse = 1 << 30;
                options.clusters = 1000;
                options.guest_len = 8 * MIB;
                options.slow = 64 * MIB;
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
        let parts: [(&str, Part); 4] = [
            ("full", full),
            ("incremental", incremental),
            ("engine", engine),
            ("guest", guest_writes),
        ];
        let is_wanted = |name: &str| options.parts.iter().any(|part| part == name);
        parts
            .iter()
            .filter(|(name, _)| options.parts.is_empty() || is_wanted(name))
            .try_for_each(|(_, part)| part(&options))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("backup: {error}");
            ExitCode::FAILURE
        }
    }
}
