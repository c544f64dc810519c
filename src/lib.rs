//! Live mirror and point-in-time backup of a disk under guest writes, and the dirty bitmaps under them, for
//! virtual machine monitors to link.
//!
//! A VMM that migrates a machine, or moves a disk, must copy the disk while the guest keeps writing to
//! it, and switch to the copy at an instant at which both are equal. One that backs a machine up must copy
//! what its disks held at one instant, and next time only what has changed. One dirty bit lost on the way is
//! a disk silently corrupted. This crate does that part, and leaves everything else to the VMM: it opens no
//! file, starts no thread, reads no clock, makes no system call and knows no runtime. The caller brings
//! the devices, the time and the guest's writes; the crate decides what is copied, when, and in what
//! order, so that no write is lost.
//!
//! ```text
//!  guest ──▶ Node: the gate that every guest write passes ──▶ the VMM's own write to the source
//!             │ records what was written, without a lock
//!             ▼
//!  Mirror ─▶ Step::Op(copy 64 KiB at 4 MiB) ──▶ Driver, or Queue, or your own loop ──▶ source, target
//!     ▲                                              │
//!     └────────────── op_done ◀──────────────────────┘
//!     │
//!     └─▶ Step::Switch: the guest is held, both disks are equal and flushed. Commit, or drop it.
//!
//!  Backup ─▶ the same operations; the gate makes a guest write wait until what it overwrites is saved
//! ```
//!
//! # Layers
//!
//! Each knows only those below it, and those below are of use without it.
//!
//! | layer | what | |
//! |---|---|---|
//! | 3 | [`driver`] | an async loop over a machine and the caller's devices ([`io`]) and clock; decides nothing. By one task, or by [several](driver::Crew) |
//! | | [`queue`] | the same for completion queues, without any future |
//! | 2 | [`Transaction`] | bitmaps of several disks changed, and jobs started, at one instant or not at all |
//! | | [`Mirror`] | what to do next, as a machine without I/O: events in, operations out, time as an argument |
//! | | [`Backup`] | the same, for a copy of the disk as it was at one instant |
//! | | [`FrozenView`] | that instant, for others to read while the guest writes on |
//! | | [`BitmapMigration`] | dirty bitmaps that follow a machine to another host, over QEMU's stream or the crate's own ([`migration`]) |
//! | | [`Job`] | the life of a job: status, verbs, progress, events, error policies |
//! | | [`JobGroup`] | jobs that end together, at one instant or not at all |
//! | | [`Jobs`] | all jobs of a VMM: unique names, one list, one shutdown |
//! | 1 | [`Node`] | one disk: the gate for guest writes, and the bitmaps that record them |
//! | | [`Bitmaps`] | its named dirty bitmaps: for incremental backups, by jobs or by other programs |
//! | 0 | [`HBitmap`] | a hierarchical bitmap, as a plain value ([`bitmap`] has its rules) |
//! | | [`DirtyLog`] | marking by many threads without a lock, drained into bitmaps |
//! | | [`ByteRange`], [`Granularity`] | bytes and granules, and all rounding between them |
//!
//! # Example
//!
//! A disk of 1 MiB in memory, mirrored while a guest writes, with the async driver. `examples/` has the
//! same on real files, over completion queues, and on several runtimes.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//! use blockjob::driver::{Clock, Driven, Driver};
//! use blockjob::io::{AlignedBuf, BlockDevice, BufResult, GuestDisk, ReadAt, WriteAt};
//! use blockjob::{ByteRange, Content, Extent, Limits, Mirror, MirrorOptions, Node, Status, Unmap};
//!
//! /// Bytes in memory. Each request is over when it returns.
//! struct Memory(Mutex<Vec<u8>>);
//!
//! impl BlockDevice for Memory {
//!     type Buf = AlignedBuf;
//!     fn limits(&self) -> Limits {
//!         Limits::new(self.0.lock().unwrap().len() as u64)
//!     }
//! }
//!
//! impl ReadAt for Memory {
//!     async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
//!         let at = offset as usize..offset as usize + buf.as_ref().len();
//!         buf.as_mut().copy_from_slice(&self.0.lock().unwrap()[at]);
//!         (Ok(()), buf)
//!     }
//!     async fn block_status(&self, range: ByteRange) -> std::io::Result<Extent> {
//!         Ok(Extent { len: range.len(), content: Content::Data, in_top: true })
//!     }
//! }
//!
//! impl WriteAt for Memory {
//!     async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
//!         let at = offset as usize..offset as usize + buf.as_ref().len();
//!         self.0.lock().unwrap()[at].copy_from_slice(buf.as_ref());
//!         (Ok(()), buf)
//!     }
//!     // `limits` offers neither of these two.
//!     async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> std::io::Result<()> {
//!         Err(std::io::ErrorKind::Unsupported.into())
//!     }
//!     async fn discard(&self, _: ByteRange) -> std::io::Result<()> {
//!         Err(std::io::ErrorKind::Unsupported.into())
//!     }
//!     async fn flush(&self) -> std::io::Result<()> {
//!         Ok(())
//!     }
//!     async fn settle(&self) {}
//! }
//!
//! struct NoTime;
//! impl Clock for NoTime {
//!     fn now(&self) -> Duration {
//!         Duration::ZERO
//!     }
//!     async fn sleep_until(&self, _: Duration) {
//!         std::future::pending().await
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::new(1 << 20);
//! let source = Arc::new(Memory(Mutex::new(vec![1; 1 << 20])));
//! let target = Arc::new(Memory(Mutex::new(vec![0; 1 << 20])));
//! let disk = GuestDisk::new(node.clone(), Arc::clone(&source));
//!
//! let mut mirror = Mirror::new(&node, source.limits(), target.limits(), MirrorOptions::default())?;
//! let job = mirror.job().clone();
//! job.start()?;
//! let driver = Driver::new(Arc::clone(&source), Arc::clone(&target), NoTime);
//!
//! let guest = async {
//!     let mut buf = AlignedBuf::new(5000, 1).unwrap();
//!     buf.as_mut().fill(2);
//!     disk.write_at(70_000, buf).await.0.unwrap();
//!     while job.query().status != Status::Ready {
//!         tokio::task::yield_now().await;
//!     }
//!     job.complete().unwrap();
//! };
//! let (driven, ()) = tokio::join!(driver.run(&mut mirror), guest);
//! let Driven::Switch(switch) = driven else { panic!("the job ended before its time") };
//!
//! // The guest is held: exchange the device under it.
//! assert!(*source.0.lock().unwrap() == *target.0.lock().unwrap());
//! disk.replace(switch.guard(), Arc::clone(&target)).ok().expect("it is this node's guard");
//! switch.commit();
//! assert!(matches!(driver.run(&mut mirror).await, Driven::Done(Ok(()))));
//! # Ok(())
//! # }
//! ```
//!
//! # What a VMM must see to
//!
//! 1. Every write, write-zeroes and discard of the guest passes the node's gate, and its ticket is
//!    finished after the device has settled it and before the guest is told.
//! 2. The device that a write goes to is chosen after the gate has let it in: a write that waited for a
//!    switch goes to the new disk.
//! 3. A write that has to wait does not begin until it is let in: a backup may have to save first what is there.
//! 4. Nobody else writes to the target, and neither disk changes its length, while the job lives.
//! 5. A guest whose switch was committed goes back when [`Step::SwitchBack`] says so. Only a job of a group
//!    ever does.
//! 6. In [write-blocking mode](CopyMode::WriteBlocking) whoever issues the guest's writes issues them to the target,
//!    too, and with the same data. Who does not loses nothing but the mode.
//! 7. [`WriteAt::settle`](io::WriteAt::settle) is true: nothing requested before it can change the device
//!    after it.
//!
//! # Memory
//!
//! A mirror holds at most [`buf_size`](MirrorOptions::buf_size) bytes of data in buffers (16 MiB unless
//! told otherwise), a record of about 100 bytes per operation planned or in flight, and two bits per
//! granule: its bitmap and the node's log. That is 4 MiB for 1 TiB at 64 KiB, of which pages never
//! touched cost nothing. For a target to which zeroes are not cheap a third bit says what of it is known to read
//! as zeroes, and where the target can be compared a fourth what of it is to be. In write-blocking mode the node has a
//! record of some 50 bytes for each guest write under way.
//!
//! A backup holds as much, with a bit per cluster more by which guests are held back. That one stays with the
//! node, so that a guest write looks at it without a lock. For guests that wait it may take 64 chunks beside
//! its buffers.
//!
//! # Glossary
//!
//! | word | meaning |
//! |---|---|
//! | granularity | how many bytes one bit stands for; a *granule* is such a piece of the disk |
//! | dirty | written to, or not known to be on the target |
//! | claim | a range that a job is working on; no two overlap |
//! | in flight | handed to a device and not answered |
//! | settled | can no longer change the device, whether it succeeded or not |
//! | extent | a run of bytes of which the same is known: data, zeroes, or undefined |
//! | in top, allocated | held by the topmost layer of a disk that has several, or by any above a base |
//! | base, commit | a layer that others lie on; bringing into it what they hold |
//! | cluster | the unit in which an image hands out storage |
//! | sync mode | what a job copies: everything, the top layer, nothing but new writes, or by a bitmap |
//! | instant, T0 | the moment as of which a backup is: guests are held for it |
//! | copy-before-write | what a guest is about to overwrite is saved first |
//! | frozen view, fleecing | the disk as it was at the instant, read by others |
//! | full, incremental, differential | all of the disk; what has changed since the last backup; since a fixed one |
//! | ready, in step | there was a moment with nothing left to copy; guest writes keep being copied |
//! | active write, write-blocking | a guest write that goes to the target as well, before the guest is told |
//! | actively synced | source and target differ only where active writes are under way |
//! | outpaced | the guest writes more than can be copied |
//! | doubtful | believed to be equal, and to be compared; verification, resync |
//! | quiesce | hold new guest writes and wait for those in flight |
//! | switch | the instant at which the guest's disk becomes the target |
//! | group | jobs that all succeed at one instant, or of which none does |
//! | soft cancel | end at such an instant without switching: the target is a copy of it |
//! | drain | move what the log has recorded into the bitmaps |
//! | recording, enabled | guest writes make granules of the bitmap dirty |
//! | busy, in use | an operation has the bitmap to itself: no verb may use or change it |
//! | successor | an anonymous bitmap that records in the place of one whose bits belong to an operation |
//! | abdicate, reclaim | the successor takes the place of the bitmap; both become one again |
//! | checkpoint | a bitmap that does not record any more: what was written from one instant to another; of a mirror: what it has still to do, as bytes |
//! | persistent | saved with the image |
//! | part, chunk | serialized bits of a piece of the disk; a chunk has 1 KiB of them, which is 8192 granules |
//! | alias | what a node or bitmap is called in a stream of bitmaps, if not by its name |
//! | pre-copy, live, post-copy | bits are sent while the guest stands still, before that, after it has started elsewhere |
//! | hand over | the other host has a bitmap, so that it is stale here and not stored |
//! | inconsistent | its stored copy was not closed, so that nobody knows what is dirty |
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backup;
pub mod bitmap;
mod bytes;
mod capabilities;
mod copy;
pub mod driver;
pub mod io;
mod job;
mod log;
mod machine;
mod memory;
pub mod migration;
mod mirror;
mod node;
pub mod queue;
#[doc(hidden)]
pub mod sabotage;
mod sync;
mod transaction;
mod units;

pub use crate::backup::{
    Backup, BackupBuffer, BackupError, BackupOptions, BackupSync, FrozenRead, FrozenView,
    OnBufferFull, OnCbwError, ViewError,
};
pub use crate::bitmap::HBitmap;
pub use crate::capabilities::{Capabilities, capabilities};
pub use crate::copy::{
    CompareBy, Content, Extent, IfZero, Limits, LimitsError, Op, OpKind, Outcome, RangeLimits,
    ShapeError, Side, Unmap,
};
pub use crate::job::{
    BitmapMode, Cancel, Change, Difference, ErrorAction, ErrorEvent, Event, Hold, IoStatus, Job,
    JobError, JobGroup, JobInfo, JobKind, JobOptions, JobOptionsError, Jobs, OnError, Progress,
    Shutdown, Status, Verb, VerbError, Verification, Verified, Warning,
};
#[cfg(loom)]
#[doc(hidden)]
pub use crate::log::Rule;
pub use crate::log::{DirtyLog, DirtyLogError, DirtyWord};
pub use crate::machine::{Machine, Step};
pub use crate::migration::{
    BitmapMapping, BitmapMigration, IncomingError, IncomingMigration, MappingError, OutgoingError,
    OutgoingMigration, SetupError,
};
pub use crate::mirror::{
    Adaptive, ChangedSince, Checkpoint, CheckpointError, CheckpointId, CheckpointPhase,
    CommitOptions, Convergence, CopyMode, Mirror, MirrorError, MirrorInfo, MirrorOptions,
    MirrorSync, Resume, ResumeError, Switch, SwitchBack, TargetHolds,
};
#[cfg(loom)]
#[doc(hidden)]
pub use crate::node::GateRule;
pub use crate::node::{
    Begin, BeginFuture, BitmapClaim, BitmapError, BitmapExport, BitmapHold, BitmapInfo,
    BitmapOptions, BitmapState, BitmapStorage, Bitmaps, BusyWith, CannotPersist, ClaimFor,
    DirtyRuns, FrozenBitmap, Grown, GuestQueue, JobBitmap, JobBitmapGuard, Lane, Node, NotSaved,
    OwnedTicket, PendingWrite, Quiesce, QuiesceGuard, Resize, SnapshotOf, TargetWrite, Ticket,
    TrackError, Way, WriteRefused,
};
pub use crate::transaction::{
    ActionError, ActionKind, Prepared, Preparing, Transaction, TransactionError,
};
pub use crate::units::{ByteRange, Granularity};
