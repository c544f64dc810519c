//! Lets other programs read a disk as it was at one instant, over NBD, while its guest writes on; and proves
//! that each of them got that, byte by byte.
//!
//! ```text
//! cargo run --release --example fleecing_nbd
//!
//!  guests ──▶ disk ──what they overwrite──▶ fleecing file
//!              └──────────┬────────────────────┘
//!                    frozen view ──▶ NBD server ──▶ qemu-img, and a client of its own     (pull)
//!                         └────────▶ a second backup ──▶ slow target                      (push)
//! ```
//!
//! One transaction is the instant: the next bitmap begins, the last one stops and is exported, the backup
//! starts. While the guests are held for it, what they know of their disk is noted. What is pulled and what
//! is pushed is compared with that, and the extents that clients are told with the runs of the bitmap.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock"
)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockjob::driver::Driver;
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, FrozenDisk, ReadAt, WriteAt};
use blockjob::{
    Backup, BackupOptions, BackupSync, BitmapOptions, ByteRange, Cancel, Content, FrozenBitmap,
    JobError, Limits, Node, Transaction, Unmap,
};
use indicatif::{ProgressBar, ProgressStyle};

use support::clock::{TimerClock, block_on};
use support::file::FileDevice;
use support::guest::{self, BLOCK, Current, Disk, Guest, GuestReport, Stamp};
use support::temp::TempFolder;

/// Whole sectors, as qemu-img wants them, and no multiple of anything else.
const LEN: u64 = (32 << 20) + 1536;
const GUESTS: u32 = 2;
const LAST: &str = "checkpoint-0";
const NEXT: &str = "checkpoint-1";
const ALLOCATION: &str = "base:allocation";
const DIRTY: &str = "qemu:dirty-bitmap:checkpoint-0";
/// No guest write waits longer.
const LATENCY_MAX: Duration = Duration::from_secs(5);

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;
type Frozen<'a> = FrozenDisk<&'a FileDevice, &'a FileDevice>;

fn main() -> Result<()> {
    let folder = TempFolder::new("fleecing-nbd")?;
    let file = new_file(&folder.path().join("disk"))?;
    let stamps = guest::make_image(&file, LEN, 5)?;
    let device = FileDevice::new(file, 2)?;
    let disk = Arc::new(Disk { device, stamps });
    let current = Current::new(Arc::clone(&disk));
    let node = Node::new(LEN);
    let mut list = Transaction::new();
    list.add(&node, LAST, BitmapOptions::default());
    block_on(list.run())?;
    let stop = AtomicBool::new(false);
    let report = thread::scope(|scope| -> Result<GuestReport> {
        let stopped = StopOnDrop(&stop);
        let guests: Vec<_> = (0..GUESTS)
            .map(|index| Guest {
                index,
                guests: GUESTS,
                queue: node.queue(),
                current: &current,
                stop: &stop,
                len: LEN,
            })
            .map(|guest| scope.spawn(move || guest.run()))
            .collect();
        thread::sleep(Duration::from_millis(300));
        let told = fleece(&folder, &node, &disk);
        drop(stopped);
        let mut report = GuestReport::default();
        for guest in guests {
            report = report.add(guest.join().expect("a guest does not panic")?);
        }
        told.map(|()| report)
    })?;
    assert!(report.longest < LATENCY_MAX, "{:?}", report.longest);
    assert!(report.waited > 0, "nothing was overwritten meanwhile");
    println!(
        "OK: all was read as it was at the instant, under {} guest writes, of which {} waited; the slowest \
         took {:.2?}",
        report.changes, report.waited, report.longest
    );
    Ok(())
}

fn fleece(folder: &TempFolder, node: &Node, disk: &Disk) -> Result<()> {
    let saved = FileDevice::new(new_file(&folder.path().join("fleece"))?, 2)?;
    let mut options = BackupOptions::default();
    (options.sync, options.view) = (BackupSync::None, true);
    let mut backup = Backup::new(node, disk.device.limits(), saved.limits(), options)?;
    let (job, view) = (backup.job().clone(), backup.view().expect("asked for"));

    let mut list = Transaction::new();
    list.add(node, NEXT, BitmapOptions::default());
    list.disable(node, LAST);
    list.start(&job);
    let prepared = block_on(list.prepare())?;
    let blocks = 0..LEN.div_ceil(BLOCK);
    let stamps: Vec<_> = blocks.map(|block| disk.stamps.of(block)).collect();
    prepared.commit();

    let clock = TimerClock::new();
    let driver = Driver::new(&disk.device, &saved, &clock);
    let result = thread::scope(|scope| -> Result<_> {
        let running = scope.spawn(move || block_on(driver.run_backup(&mut backup)));
        let work = || -> Result<()> {
            while view.accessible().is_err() {
                if running.is_finished() {
                    return Err("the backup ended before it could be read".into());
                }
                thread::sleep(Duration::from_millis(1));
            }
            let frozen = FrozenDisk::new(view.clone(), &disk.device, &saved);
            let bitmap = node.bitmaps().freeze(LAST)?;
            pull(folder, &frozen, &bitmap, &stamps)?;
            push(folder, &frozen, &stamps, &clock)?;
            assert!(view.accessible()?.is_clean(), "all was given up");
            Ok(())
        };
        let told = work();
        // It may have failed, which its result tells.
        let _ = job.cancel(Cancel::Force);
        let result = running.join().expect("a driver does not panic");
        told.map(|()| result)
    })?;
    assert!(
        matches!(result, Err(JobError::Cancelled { .. })),
        "{result:?}"
    );
    // The pull has succeeded: only what is written since counts for the next one.
    node.bitmaps().remove(LAST)?;
    Ok(())
}

/// Serves the view, and has clients read all of it.
fn pull(
    folder: &TempFolder,
    frozen: &Frozen<'_>,
    bitmap: &FrozenBitmap,
    stamps: &[Stamp],
) -> Result<()> {
    let socket = folder.path().join("nbd");
    let listener = UnixListener::bind(&socket)?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let is_over = &is_over;
        scope.spawn(move || {
            for stream in listener.incoming() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { return };
                scope.spawn(move || {
                    let mut server = Server::new(stream, frozen, bitmap);
                    if let Err(error) = server.serve() {
                        println!("a client is gone: {error}");
                    }
                });
            }
        });
        let told = own_client(&socket, bitmap, stamps)
            .and_then(|()| qemu_img(folder, &socket, bitmap, stamps))
            .and_then(|()| nbdinfo(&socket));
        is_over.store(true, Ordering::Relaxed);
        // So that the server looks.
        let _ = UnixStream::connect(&socket);
        told
    })
}

/// Copies the view to a slow target, giving back what is copied.
fn push(
    folder: &TempFolder,
    frozen: &Frozen<'_>,
    stamps: &[Stamp],
    clock: &TimerClock,
) -> Result<()> {
    let path = folder.path().join("pushed");
    let target = Slow(FileDevice::new(new_file(&path)?, 2)?);
    let mut options = BackupOptions::default();
    options.discard_source = true;
    // Nobody writes to this one.
    let node = Node::new(LEN);
    let mut backup = Backup::new(&node, frozen.limits(), target.limits(), options)?;
    let job = backup.job().clone();
    job.start()?;
    let driver = Driver::new(frozen, &target, clock);
    let style =
        ProgressStyle::with_template("push [{bar:30}] {binary_bytes}/{binary_total_bytes}")?;
    let bar = ProgressBar::new(LEN).with_style(style);
    thread::scope(|scope| {
        let running = scope.spawn(move || block_on(driver.run_backup(&mut backup)));
        while !running.is_finished() {
            bar.set_position(job.query().progress.current);
            thread::sleep(Duration::from_millis(20));
        }
        running.join().expect("a driver does not panic")
    })?;
    bar.finish_and_clear();
    check_image(&path, stamps)?;
    println!("push: the slow target is the disk at the instant");
    Ok(())
}

/// A target far away.
struct Slow(FileDevice);

impl BlockDevice for Slow {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.0.limits()
    }
}

impl WriteAt for Slow {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.0
            .call(|_| thread::sleep(Duration::from_millis(50)))
            .await;
        self.0.write_at(offset, buf).await
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        self.0.write_zeroes(range, unmap).await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.0.discard(range).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.0.flush().await
    }

    async fn settle(&self) {
        self.0.settle().await;
    }
}

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_CHUNK: u32 = 0x668e_33ef;
const ACK: u32 = 1;
const UNSUPPORTED: u32 = 1 << 31 | 1;
const INVALID: u32 = 1 << 31 | 3;
const UNKNOWN: u32 = 1 << 31 | 6;
/// With flags, read-only.
const EXPORT_FLAGS: u16 = 1 | 1 << 1;
const READ_MAX: u32 = 32 << 20;
const OPTION_MAX: u32 = 64 << 10;
const EXTENTS_MAX: usize = 131_072;
const REQ_ONE: u16 = 1 << 3;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// One connection, from a client that may send anything.
struct Server<'a> {
    stream: UnixStream,
    frozen: &'a Frozen<'a>,
    bitmap: &'a FrozenBitmap,
    is_structured: bool,
    /// Which of [`CONTEXTS`] it asked for.
    contexts: Vec<usize>,
}

const CONTEXTS: [&str; 2] = [ALLOCATION, DIRTY];

impl<'a> Server<'a> {
    fn new(stream: UnixStream, frozen: &'a Frozen<'a>, bitmap: &'a FrozenBitmap) -> Self {
        Self {
            stream,
            frozen,
            bitmap,
            is_structured: false,
            contexts: Vec::new(),
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut hello = [MAGIC.to_be_bytes(), MAGIC_OPTION.to_be_bytes()].concat();
        hello.extend(3_u16.to_be_bytes());
        self.stream.write_all(&hello)?;
        let _client_flags = u32::from_be_bytes(self.take()?);
        while !self.option()? {}
        while self.request()? {}
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        take(&mut self.stream)
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = MAGIC_OPTION_REPLY.to_be_bytes().to_vec();
        for word in [option, kind, data.len() as u32] {
            reply.extend(word.to_be_bytes());
        }
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    /// Whether requests follow.
    fn option(&mut self) -> io::Result<bool> {
        if u64::from_be_bytes(self.take()?) != MAGIC_OPTION {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?);
        if len > OPTION_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        match option {
            2 => {
                self.answer(option, ACK, &[])?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            3 => self.answer(option, 2, &0_u32.to_be_bytes())?,
            6 | 7 => match text(&mut &data[..]) {
                Some([]) => {
                    let mut export = 0_u16.to_be_bytes().to_vec();
                    export.extend(LEN.to_be_bytes());
                    export.extend(EXPORT_FLAGS.to_be_bytes());
                    self.answer(option, 3, &export)?;
                    let mut sizes = 3_u16.to_be_bytes().to_vec();
                    for size in [1, 4096, READ_MAX] {
                        sizes.extend(size.to_be_bytes());
                    }
                    self.answer(option, 3, &sizes)?;
                }
                Some(_) => return self.answer(option, UNKNOWN, &[]).map(|()| false),
                None => return self.answer(option, INVALID, &[]).map(|()| false),
            },
            8 => self.is_structured = true,
            9 | 10 => match wanted(&data, option == 9) {
                Some(contexts) if self.is_structured => {
                    for &context in &contexts {
                        let mut reply = (context as u32).to_be_bytes().to_vec();
                        reply.extend(CONTEXTS[context].as_bytes());
                        self.answer(option, 4, &reply)?;
                    }
                    if option == 10 {
                        self.contexts = contexts;
                    }
                }
                _ => return self.answer(option, INVALID, &[]).map(|()| false),
            },
            _ => return self.answer(option, UNSUPPORTED, &[]).map(|()| false),
        }
        self.answer(option, ACK, &[])?;
        Ok(option == 7)
    }

    /// Whether another may follow.
    fn request(&mut self) -> io::Result<bool> {
        if u32::from_be_bytes(self.take()?) != MAGIC_REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let flags = u16::from_be_bytes(self.take()?);
        let command = u16::from_be_bytes(self.take()?);
        let cookie = self.take::<8>()?;
        let offset = u64::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?);
        let range = ByteRange::at(offset, len.into())
            .filter(|range| !range.is_empty() && range.end() <= LEN);
        match (command, range) {
            (2, _) => return Ok(false),
            (0, Some(range)) if len <= READ_MAX => match self.read(range) {
                Ok(buf) if self.is_structured => {
                    let data = [&offset.to_be_bytes(), buf.as_ref()].concat();
                    self.chunk(1, 1, cookie, &data)?;
                }
                Ok(buf) => {
                    self.simple(0, cookie)?;
                    self.stream.write_all(buf.as_ref())?;
                }
                Err(_) => self.fail(EIO, cookie)?,
            },
            (7, Some(range)) if !self.contexts.is_empty() => {
                self.block_status(range, flags & REQ_ONE != 0, cookie)?;
            }
            (1, _) => {
                io::copy(&mut (&self.stream).take(len.into()), &mut io::sink())?;
                self.fail(EPERM, cookie)?;
            }
            (4 | 6, _) => self.fail(EPERM, cookie)?,
            _ => self.fail(EINVAL, cookie)?,
        }
        Ok(true)
    }

    fn read(&self, range: ByteRange) -> io::Result<AlignedBuf> {
        let align = self.frozen.limits().mem_align as usize;
        let buf = AlignedBuf::new(range.len() as usize, align).map_err(io::Error::other)?;
        let (result, buf) = block_on(self.frozen.read_at(range.start(), buf));
        result.map(|()| buf)
    }

    fn block_status(&mut self, range: ByteRange, one: bool, cookie: [u8; 8]) -> io::Result<()> {
        let most = if one { 1 } else { EXTENTS_MAX };
        let mut chunks = Vec::new();
        for &context in &self.contexts {
            let extents = match CONTEXTS[context] {
                DIRTY => Ok(dirty(self.bitmap, range)),
                _ => self.allocation(range),
            };
            let Ok(extents) = extents else {
                return self.fail(EIO, cookie);
            };
            let mut data = (context as u32).to_be_bytes().to_vec();
            for (len, flags) in extents.into_iter().take(most) {
                data.extend((len as u32).to_be_bytes());
                data.extend(flags.to_be_bytes());
            }
            chunks.push(data);
        }
        let last = chunks.len() - 1;
        for (index, data) in chunks.iter().enumerate() {
            self.chunk((index == last).into(), 5, cookie, data)?;
        }
        Ok(())
    }

    fn allocation(&self, range: ByteRange) -> io::Result<Vec<(u64, u32)>> {
        let mut extents: Vec<(u64, u32)> = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            let rest = ByteRange::from(at..range.end());
            let extent = block_on(self.frozen.block_status(rest))?;
            let len = match extent.len {
                0 => rest.len(),
                len => len.min(rest.len()),
            };
            let flags = if extent.content == Content::Zero {
                3
            } else {
                0
            };
            match extents.last_mut() {
                Some((known, of)) if *of == flags => *known += len,
                _ => extents.push((len, flags)),
            }
            at += len;
        }
        Ok(extents)
    }

    fn chunk(&mut self, flags: u16, kind: u16, cookie: [u8; 8], data: &[u8]) -> io::Result<()> {
        let mut reply = MAGIC_CHUNK.to_be_bytes().to_vec();
        reply.extend(flags.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend(cookie);
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    fn simple(&mut self, error: u32, cookie: [u8; 8]) -> io::Result<()> {
        let words = [MAGIC_SIMPLE.to_be_bytes(), error.to_be_bytes()].concat();
        self.stream.write_all(&[&words[..], &cookie].concat())
    }

    fn fail(&mut self, error: u32, cookie: [u8; 8]) -> io::Result<()> {
        if !self.is_structured {
            return self.simple(error, cookie);
        }
        let data = [&error.to_be_bytes()[..], &[0, 0]].concat();
        self.chunk(1, 1 << 15 | 1, cookie, &data)
    }
}

/// What clients are to be told of the bitmap: lengths, and 1 for dirty.
fn dirty(bitmap: &FrozenBitmap, range: ByteRange) -> Vec<(u64, u32)> {
    let extents = bitmap.extents(range);
    extents
        .map(|run| {
            (
                run.range().len(),
                matches!(run, blockjob::bitmap::Status::Dirty(_)).into(),
            )
        })
        .collect()
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A string behind its length.
fn text<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    *data = rest;
    Some(text)
}

/// The contexts that a client names, or lists by a namespace, or by nothing.
fn wanted(mut data: &[u8], is_list: bool) -> Option<Vec<usize>> {
    text(&mut data).filter(|name| name.is_empty())?;
    let (count, mut data) = data.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count);
    let mut is_wanted = [is_list && count == 0; 2];
    for _ in 0..count {
        let query = text(&mut data)?;
        for (is_wanted, name) in is_wanted.iter_mut().zip(CONTEXTS) {
            let is_space = is_list && query.ends_with(b":") && name.as_bytes().starts_with(query);
            *is_wanted |= is_space || query == name.as_bytes();
        }
    }
    Some((0..2).filter(|&index| is_wanted[index]).collect())
}

/// Reads all of the export and both contexts by hand.
fn own_client(socket: &Path, bitmap: &FrozenBitmap, stamps: &[Stamp]) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let _hello: [u8; 18] = take(&mut stream)?;
    stream.write_all(&3_u32.to_be_bytes())?;
    let mut meta = [0_u32.to_be_bytes(), 2_u32.to_be_bytes()].concat();
    for name in CONTEXTS {
        meta.extend((name.len() as u32).to_be_bytes());
        meta.extend(name.as_bytes());
    }
    for (option, data) in [(8_u32, &[][..]), (10, &meta), (7, &[0; 6])] {
        let mut bytes = MAGIC_OPTION.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        stream.write_all(&bytes)?;
        loop {
            let head: [u8; 20] = take(&mut stream)?;
            let [kind, len] = [12, 16].map(|at| word(&head, at));
            let mut reply = vec![0; len as usize];
            stream.read_exact(&mut reply)?;
            match kind {
                ACK => break,
                kind if kind >> 31 == 1 => return Err(format!("refused: {kind:#x}").into()),
                _ => {}
            }
        }
    }
    let mut ask = |command: u16, range: ByteRange| -> Result<Vec<Vec<u8>>> {
        let mut bytes = MAGIC_REQUEST.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(range.start().to_be_bytes());
        bytes.extend(range.start().to_be_bytes());
        bytes.extend((range.len() as u32).to_be_bytes());
        stream.write_all(&bytes)?;
        let mut chunks = Vec::new();
        loop {
            let head: [u8; 20] = take(&mut stream)?;
            if head[6] & 0x80 != 0 {
                return Err(format!("request {command} failed").into());
            }
            let mut data = vec![0; word(&head, 16) as usize];
            stream.read_exact(&mut data)?;
            chunks.push(data);
            if head[5] & 1 != 0 {
                return Ok(chunks);
            }
        }
    };
    let mut image = Vec::new();
    for start in (0..LEN).step_by(1 << 20) {
        let range = (start..LEN.min(start + (1 << 20))).into();
        image.extend_from_slice(&ask(0, range)?[0][8..]);
    }
    check_bytes(&image, stamps, "the client's copy")?;
    for chunk in ask(7, (0..LEN).into())? {
        let extents: Vec<_> = chunk[4..]
            .chunks_exact(8)
            .map(|extent| (u64::from(word(extent, 0)), word(extent, 4)))
            .collect();
        assert_eq!(extents.iter().map(|(len, _)| len).sum::<u64>(), LEN);
        if word(&chunk, 0) == 1 {
            assert_eq!(extents, dirty(bitmap, (0..LEN).into()));
            continue;
        }
        let mut at = 0;
        for (len, flags) in extents {
            let part = &image[at as usize..(at + len) as usize];
            assert!(flags != 3 || part.iter().all(|byte| *byte == 0));
            at += len;
        }
    }
    // Goodbye.
    let mut bytes = MAGIC_REQUEST.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, 2]);
    bytes.resize(28, 0);
    stream.write_all(&bytes)?;
    println!("own client: the disk at the instant, and the runs of its bitmap");
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn qemu_img(
    folder: &TempFolder,
    socket: &Path,
    bitmap: &FrozenBitmap,
    stamps: &[Stamp],
) -> Result<()> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        if std::env::var_os("CI").is_some_and(|value| value == "true") {
            return Err("there is no qemu-img, which CI has to have".into());
        }
        println!("NOT JUDGED BY QEMU: there is no qemu-img here");
        return Ok(());
    }
    let image = format!(
        "driver=nbd,server.type=unix,server.path={}",
        socket.display()
    );
    let pulled = folder.path().join("pulled");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "--image-opts", "-O", "raw", &image]);
    run(convert.arg(&pulled))?;
    check_image(&pulled, stamps)?;
    println!("qemu-img convert: the disk at the instant");

    let image = format!("{image},x-dirty-bitmap={DIRTY}");
    let mut map = Command::new("qemu-img");
    let map = run(map.args(["map", "--output=json", "--image-opts", &image]))?;
    let mut found = Vec::new();
    for entry in map.split('{').skip(1) {
        let field = |name: &str| {
            let rest = entry.split_once(&format!("\"{name}\": "))?.1;
            rest.split([',', '}']).next()
        };
        let len: u64 = field("length").ok_or("no length")?.parse()?;
        // What is dirty is shown as if it were a hole.
        found.push((len, u32::from(field("data") == Some("false"))));
    }
    assert_eq!(found, dirty(bitmap, (0..LEN).into()));
    println!("qemu-img map: the {} runs of the bitmap", found.len());
    Ok(())
}

fn nbdinfo(socket: &Path) -> Result<()> {
    if Command::new("nbdinfo").arg("--version").output().is_err() {
        println!("NOT JUDGED BY NBDINFO: there is none here");
        return Ok(());
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let size = run(Command::new("nbdinfo").args(["--size", &uri]))?;
    assert_eq!(size.trim().parse::<u64>()?, LEN);
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?}: {error}").into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn check_image(path: &Path, stamps: &[Stamp]) -> Result<()> {
    check_bytes(&std::fs::read(path)?, stamps, &path.display().to_string())
}

/// The bytes are what the guest knew of its disk.
fn check_bytes(image: &[u8], stamps: &[Stamp], name: &str) -> Result<()> {
    assert_eq!(image.len() as u64, LEN);
    let mut expected = vec![0; BLOCK as usize];
    let blocks = image.chunks(BLOCK as usize);
    for (block, (found, stamp)) in (0..).zip(blocks.zip(stamps)) {
        match *stamp {
            // The odd end, which the guest never touches.
            Stamp::BEFORE => expected.fill(0),
            stamp => stamp.fill(block, &mut expected),
        }
        if *found != expected[..found.len()] {
            let at = block * BLOCK;
            return Err(format!("PROOF FAILED: {name} is not as the disk was, at {at}").into());
        }
    }
    Ok(())
}

fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path)?;
    file.set_len(LEN)?;
    Ok(file)
}

/// Stops the guests, also when something is not as it should be: nobody would wait for them else.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
