//! Incremental backups made by another program: it asks which extents have changed, reads them from a
//! snapshot of the disk, and says whether it succeeded. A guest writes all the while.
//!
//! ```text
//! cargo run --example external_backup
//!
//!  day0   ├─ records ─┤ checkpoint ─────────────────────────────────────────────
//!  day1               ├─ records ─┤ read by the backup, which fails ─┐
//!  day2               │           ├─ records ─────────────── merged ─┴▶ day1 records again
//!  day2'              │                                              ├─ records ─ …
//!                snapshot 1   snapshot 2                        snapshot 2'
//! ```
//!
//! From one day to the next is one transaction: a bitmap is added, the one before disabled, and while the
//! guest waits the snapshot is made. So a bitmap has exactly what differs between two snapshots. Each
//! image that is restored from a full backup and what was copied since is compared with the snapshot, byte
//! by byte.
#![allow(
    clippy::disallowed_methods,
    reason = "this is the caller's side, which has threads"
)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::fs::{self, File};
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockjob::{
    Begin, BitmapOptions, BusyWith, FrozenBitmap, GuestQueue, Node, SnapshotOf, Transaction,
};

use support::clock::block_on;
use support::temp::TempFolder;

/// No multiple of anything.
const LEN: u64 = (16 << 20) + 1001;
const BLOCK: u64 = 4096;
const GUESTS: u64 = 2;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let folder = TempFolder::new("external-backup")?;
    let backup = Backup::new(folder)?;
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    thread::scope(|scope| {
        let guests: Vec<_> = (0..GUESTS)
            .map(|index| {
                let queue = backup.node.queue();
                let (disk, stop, writes) = (&backup.disk, &stop, &writes);
                scope.spawn(move || guest(index, queue, disk, stop, writes))
            })
            .collect();
        let stopped = StopOnDrop(&stop);
        let told = backup.make_all(&|| wait_for(&writes));
        drop(stopped);
        for guest in guests {
            guest.join().expect("a guest does not panic")?;
        }
        told
    })?;
    println!(
        "OK: every image equals its snapshot, under {} guest writes",
        writes.into_inner()
    );
    Ok(())
}

/// A disk of a guest, and the backups of it.
struct Backup {
    node: Node,
    disk: File,
    folder: TempFolder,
}

/// The disk as it was at one instant, and the name of the bitmap that records what changes after it.
struct Snapshot {
    path: PathBuf,
    since: String,
}

impl Backup {
    fn new(folder: TempFolder) -> Result<Self> {
        let disk = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join("disk"))?;
        disk.set_len(LEN)?;
        Ok(Self {
            node: Node::new(LEN),
            disk,
            folder,
        })
    }

    fn make_all(&self, let_guest_write: &dyn Fn()) -> Result<()> {
        // Day 0: a full backup. The bitmap is there from that instant on.
        let full = self.next_day(None, "day0")?;
        let restored = self.copy(&full.path, "backup")?;
        let_guest_write();

        // Day 1: what has changed since day 0.
        let first = self.next_day(Some(&full.since), "day1")?;
        let changed = self.node.bitmaps().freeze("day0")?;
        let copied = copy_extents(&changed, 0..LEN, &first.path, &restored)?;
        drop(changed);
        self.check(&restored, &first)?;
        println!("day 1: {copied} bytes copied; day0 is kept as a checkpoint");
        let_guest_write();

        // Day 2: half of it is copied, and then the backup fails.
        let lost = self.next_day(Some("day1"), "day2")?;
        let changed = self.node.bitmaps().freeze("day1")?;
        let half_done = self.copy(&restored, "half")?;
        copy_extents(&changed, 0..LEN / 2, &lost.path, &half_done)?;
        let with = Some(BusyWith::Reader);
        assert_eq!(self.node.bitmaps().query("day1")?.busy_with, with);
        let had = changed.dirty_bytes();
        drop(changed);
        fs::remove_file(half_done)?;
        let_guest_write();
        self.give_up("day1", "day2")?;
        let info = self.node.bitmaps().query("day1")?;
        assert!(
            info.is_recording && info.dirty_bytes >= had,
            "as if nothing had happened"
        );
        println!("day 2: the backup fails, and day1 records as if it had not been tried");
        let_guest_write();

        // Once more. What the failed backup has read is copied again, and what was written since.
        let second = self.next_day(Some("day1"), "day2")?;
        let changed = self.node.bitmaps().freeze("day1")?;
        let before = self.copy(&restored, "restored-of-day-1")?;
        let copied = copy_extents(&changed, 0..LEN, &second.path, &restored)?;
        drop(changed);
        self.check(&restored, &second)?;
        println!("day 2: {copied} bytes copied, among them all that the failed one had");
        let_guest_write();

        // Day 3, and then what has changed since any of the days before.
        let third = self.next_day(Some("day2"), "day3")?;
        for (since, from) in [
            (vec!["day2"], self.copy(&second.path, "since-2")?),
            (vec!["day1", "day2"], before),
            (
                vec!["day0", "day1", "day2"],
                self.copy(&full.path, "since-0")?,
            ),
        ] {
            let changed = self.changed_since(&since)?;
            let copied = copy_extents(&changed, 0..LEN, &third.path, &from)?;
            drop(changed);
            self.node.bitmaps().remove("changed")?;
            self.check(&from, &third)?;
            println!("since {}: {copied} bytes", since[0]);
        }

        // A checkpoint goes; the one before it takes over what it knew.
        let whole = self.changed_since(&["day0", "day1"])?.dirty_bytes();
        self.node.bitmaps().remove("changed")?;
        let mut list = Transaction::new();
        list.merge(&self.node, "day0", &[(&self.node, "day1")]);
        list.remove(&self.node, "day1");
        block_on(list.run())?;
        let bits = self.node.bitmaps().snapshot("day0", SnapshotOf::Bitmap)?;
        assert_eq!(bits.dirty_bytes(), whole);
        let infos = self.node.bitmaps().query_all();
        let recording = infos.iter().filter(|info| info.is_recording);
        assert!(
            recording.map(|info| &*info.name).eq(["day3"]),
            "one at a time records"
        );
        Ok(())
    }

    /// At one instant: the next bitmap records, the one before does not, and the disk is as in the snapshot.
    fn next_day(&self, before: Option<&str>, next: &str) -> Result<Snapshot> {
        let mut list = Transaction::new();
        list.add(&self.node, next, BitmapOptions::default());
        if let Some(before) = before {
            list.disable(&self.node, before);
        }
        let prepared = block_on(list.prepare())?;
        // The guest waits. Storage that makes snapshots does this in no time; here it is a copy.
        let path = self.copy(&self.folder.path().join("disk"), &format!("at-{next}"))?;
        prepared.commit();
        Ok(Snapshot {
            path,
            since: next.to_owned(),
        })
    }

    /// The backup of what `before` has has failed: it gets back what was recorded since, and records.
    fn give_up(&self, before: &str, next: &str) -> Result<()> {
        let mut list = Transaction::new();
        list.merge(&self.node, before, &[(&self.node, next)])
            .enable(&self.node, before)
            .remove(&self.node, next);
        Ok(block_on(list.run())?)
    }

    /// What has changed since a checkpoint, to be read: all bitmaps from it on, in one that does not record.
    fn changed_since(&self, names: &[&str]) -> Result<FrozenBitmap> {
        let bitmaps = self.node.bitmaps();
        bitmaps.add_disabled("changed", BitmapOptions::default())?;
        let sources: Vec<_> = names.iter().map(|name| (&self.node, *name)).collect();
        bitmaps.merge("changed", &sources)?;
        Ok(bitmaps.freeze("changed")?)
    }

    fn copy(&self, from: &PathBuf, name: &str) -> Result<PathBuf> {
        let to = self.folder.path().join(name);
        fs::copy(from, &to)?;
        Ok(to)
    }

    /// Byte by byte.
    fn check(&self, restored: &PathBuf, snapshot: &Snapshot) -> Result<()> {
        let [restored, expected] = [fs::read(restored)?, fs::read(&snapshot.path)?];
        if restored != expected {
            let at = restored.iter().zip(&expected).position(|(a, b)| a != b);
            let since = &snapshot.since;
            return Err(format!("not as it was when {since} began: byte {at:?} differs").into());
        }
        Ok(())
    }
}

/// What the program outside does: it copies the dirty extents and leaves the clean ones.
fn copy_extents(
    changed: &FrozenBitmap,
    range: Range<u64>,
    from: &PathBuf,
    to: &PathBuf,
) -> io::Result<u64> {
    let from = File::open(from)?;
    let to = File::options().write(true).open(to)?;
    let mut copied = 0;
    for extent in changed.extents(range).filter(|extent| extent.is_dirty()) {
        let range = extent.range();
        let mut bytes = vec![0; usize::try_from(range.len()).expect("it fits the memory")];
        from.read_exact_at(&mut bytes, range.start())?;
        to.write_all_at(&bytes, range.start())?;
        copied += range.len();
    }
    Ok(copied)
}

/// Stops the guests, also when something is not as it should be: nobody would wait for them else.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One thread of the guest: writes to blocks of its own.
fn guest(
    index: u64,
    queue: GuestQueue,
    disk: &File,
    stop: &AtomicBool,
    writes: &AtomicU64,
) -> io::Result<()> {
    let mut random = index + 1;
    while !stop.load(Ordering::Relaxed) {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        // Mostly the same places, as guests do.
        let blocks = LEN.div_ceil(BLOCK) / if random >> 60 == 0 { 1 } else { 8 };
        let block = (random >> 20) % (blocks / GUESTS) * GUESTS + index;
        let range = block * BLOCK..((block + 1) * BLOCK).min(LEN);
        let ticket = match queue.begin_write(range.clone().into()) {
            Begin::Go(ticket) => ticket,
            Begin::Wait(mut pending) => block_on(poll_fn(|cx| pending.poll_begin(cx.waker())))?,
            Begin::Refused(refused) => return Err(refused.into()),
        };
        let bytes = vec![(random >> 30) as u8; (range.end - range.start) as usize];
        ticket.finish(disk.write_all_at(&bytes, range.start))?;
        writes.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Until the guest has written some more.
fn wait_for(writes: &AtomicU64) {
    let until = writes.load(Ordering::Relaxed) + 200;
    while writes.load(Ordering::Relaxed) < until {
        thread::sleep(Duration::from_millis(1));
    }
}
