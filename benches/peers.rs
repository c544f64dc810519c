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

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{ByteRange, GuestQueue, MirrorSync, Node};

#[path = "../examples/support/mod.rs"]
mod support;

#[path = "support/copying.rs"]
#[allow(dead_code, reason = "not all of it is used by all")]
mod copying;

use copying::{
    Cost, Daemon, Files, InPlace, MIB, Result, Row, Spread, bare, cpu_of, is_installed, mirror,
    run_all,
};
use support::clock::block_on;
use support::file::FileDevice;

const GIB: f64 = (1u64 << 30) as f64;

struct Options {
    len: u64,
    runs: usize,
    /// Length of the disk without data.
    hole: u64,
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
