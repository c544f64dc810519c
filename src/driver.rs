//! Runs a machine over the caller's devices and clock. Decides nothing.

mod bell;
mod crew;
mod saver;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::backup::Backup;
use crate::bytes::{differing, is_zero};
use crate::copy::{CompareBy, IfZero, OpKind, Outcome, Side};
use crate::io::{AlignedBuf, BlockDevice, BufferPool, HeapPool, ReadAt, WriteAt, WrongLength};
use crate::job::JobError;
use crate::mirror::{Mirror, Switch, SwitchBack};
use crate::units::ByteRange;

pub use crew::Crew;

/// The caller's time: the library reads no clock.
///
/// All drivers of one machine, at the same time or one after another, must count from the same moment. The machine
/// keeps times: with a clock that begins anew its speed limit and timeouts stand still until that has caught up.
pub trait Clock {
    /// Time since any fixed moment. Never falls.
    fn now(&self) -> Duration;

    /// Ready at `at`, or later.
    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()>;
}

impl<C: Clock + ?Sized> Clock for &C {
    fn now(&self) -> Duration {
        (**self).now()
    }

    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()> {
        (**self).sleep_until(at)
    }
}

/// Two devices, a pool of buffers and a clock: all that a job needs to run.
///
/// Memory: at most [`buf_size`](crate::MirrorOptions::buf_size) bytes in buffers, and one future per
/// operation in flight.
///
/// # Examples
///
/// See `examples/live_mirror.rs` for the whole of it, and `examples/local_executor.rs` for devices
/// whose futures are not `Send`.
#[derive(Debug)]
pub struct Driver<S, T, P, C, B = NoBuffer> {
    source: S,
    target: T,
    buffer: B,
    pool: P,
    clock: C,
}

/// A place for what a backup saves before the guest overwrites it: any device that can be read and written, or
/// [`NoBuffer`].
pub trait SaveArea<Buf>: sealed::Sealed<Buf> {}

/// There is none: whoever asks for it is told so by an error.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBuffer;

impl<Buf> SaveArea<Buf> for NoBuffer {}

impl<D: ReadAt + WriteAt> SaveArea<D::Buf> for D {}

mod sealed {
    use std::io;

    use crate::io::{BufResult, ReadAt, WriteAt};
    use crate::units::ByteRange;

    pub trait Sealed<Buf> {
        fn read_at(&self, offset: u64, buf: Buf) -> impl Future<Output = BufResult<Buf>>;
        fn write_at(&self, offset: u64, buf: Buf) -> impl Future<Output = BufResult<Buf>>;
        fn discard(&self, range: ByteRange) -> impl Future<Output = io::Result<()>>;
        fn settle(&self) -> impl Future<Output = ()>;
    }

    impl<Buf> Sealed<Buf> for super::NoBuffer {
        async fn read_at(&self, _: u64, buf: Buf) -> BufResult<Buf> {
            (Err(io::ErrorKind::Unsupported.into()), buf)
        }

        async fn write_at(&self, _: u64, buf: Buf) -> BufResult<Buf> {
            (Err(io::ErrorKind::Unsupported.into()), buf)
        }

        async fn discard(&self, _: ByteRange) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        async fn settle(&self) {}
    }

    impl<D: ReadAt + WriteAt> Sealed<D::Buf> for D {
        fn read_at(&self, offset: u64, buf: D::Buf) -> impl Future<Output = BufResult<D::Buf>> {
            ReadAt::read_at(self, offset, buf)
        }

        fn write_at(&self, offset: u64, buf: D::Buf) -> impl Future<Output = BufResult<D::Buf>> {
            WriteAt::write_at(self, offset, buf)
        }

        fn discard(&self, range: ByteRange) -> impl Future<Output = io::Result<()>> {
            WriteAt::discard(self, range)
        }

        fn settle(&self) -> impl Future<Output = ()> {
            WriteAt::settle(self)
        }
    }
}

/// Where a job is when the driver has nothing more to do for now.
#[derive(Debug)]
#[must_use]
pub enum Driven {
    /// Source and target are equal and the guest is held: switch, then run the job on to its end.
    Switch(Switch),
    /// A switch that was committed has no effect, for the group's was declined: point the guest back, then
    /// run the job on. Never without a [group](crate::JobGroup).
    SwitchBack(SwitchBack),
    /// The job is over.
    Done(Result<(), JobError>),
}

impl Driven {
    fn of_backup(self) -> Result<(), JobError> {
        match self {
            Driven::Done(result) => result,
            Driven::Switch(_) | Driven::SwitchBack(_) => unreachable!("a backup never switches"),
        }
    }
}

impl<S, T, C> Driver<S, T, HeapPool, C>
where
    S: BlockDevice<Buf = AlignedBuf>,
    T: BlockDevice<Buf = AlignedBuf>,
{
    /// A driver with buffers on the heap, aligned as both devices want them.
    pub fn new(source: S, target: T, clock: C) -> Self {
        let align = source.limits().mem_align.max(target.limits().mem_align);
        Self {
            source,
            target,
            buffer: NoBuffer,
            pool: HeapPool::new(align as usize),
            clock,
        }
    }
}

impl<S, T, P, C> Driver<S, T, P, C>
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
    C: Clock,
{
    /// A driver with the caller's own buffers.
    pub fn with_pool(source: S, target: T, pool: P, clock: C) -> Self {
        Self {
            source,
            target,
            buffer: NoBuffer,
            pool,
            clock,
        }
    }
}

impl<S, T, P, C> Driver<S, T, P, C> {
    /// With a device to save in what guests are about to overwrite, for a backup that was made with
    /// [`BackupOptions::buffer`](crate::BackupOptions::buffer). The buffers of the pool must suit it, too.
    pub fn with_buffer<B>(self, buffer: B) -> Driver<S, T, P, C, B> {
        Driver {
            source: self.source,
            target: self.target,
            buffer,
            pool: self.pool,
            clock: self.clock,
        }
    }
}

impl<S, T, P, C, B> Driver<S, T, P, C, B>
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
    C: Clock,
    B: SaveArea<S::Buf>,
{
    /// Runs the job until it is over, or wants to switch. Call it again after a switch, whether it was
    /// committed or dropped. Jobs of one [group](crate::JobGroup) wait for each other: run them at the same
    /// time. Another driver that runs it on must have a [clock](Clock) that counts from the same moment.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped at any await. Machine, node and bitmaps stay sound: what was in
    /// flight is dirty again once the target has [settled](WriteAt::settle), which the next run sees to,
    /// and a guest that was held goes on. The job can be run on, by this driver or another over the same
    /// devices, or cancelled.
    pub async fn run(&self, mirror: &mut Mirror) -> Driven {
        self.crew(mirror).run().await
    }

    /// Runs a backup until it is over. Backups that were started by one transaction, or are of one
    /// [group](crate::JobGroup), are run at the same time.
    ///
    /// # Errors
    ///
    /// Why the backup did not succeed.
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run). Guest writes that wait for something to be saved do so until the job is run on,
    /// or dropped.
    pub async fn run_backup(&self, backup: &mut Backup) -> Result<(), JobError> {
        self.crew(backup).run_backup().await
    }

    async fn perform(&self, kind: OpKind, gives_up: &AtomicBool) -> Outcome {
        match kind {
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::Save(range)
            | OpKind::CopySaved(range)
            | OpKind::CopySavedCompressed(range) => self.copy(kind, range, gives_up).await,
            OpKind::CopyOffloaded(range) => {
                done(Side::Target, self.target.copy_from_source(range).await)
            }
            OpKind::GiveUp(range) => done(Side::Target, self.target.discard(range).await),
            OpKind::DiscardSource(range) => {
                self.source.discard_read(range);
                Outcome::Done
            }
            OpKind::DiscardSaved(range) => done(Side::Buffer, self.buffer.discard(range).await),
            OpKind::Zero(range, unmap) => {
                done(Side::Target, self.target.write_zeroes(range, unmap).await)
            }
            OpKind::Discard(range) => done(Side::Target, self.target.discard(range).await),
            OpKind::Flush => done(Side::Target, self.target.flush().await),
            OpKind::Settle => {
                self.target.settle().await;
                Outcome::Done
            }
            OpKind::SettleSaved => {
                self.buffer.settle().await;
                Outcome::Done
            }
            OpKind::CancelInFlight => {
                gives_up.store(true, Ordering::Relaxed);
                self.target.cancel_in_flight();
                Outcome::Done
            }
            OpKind::Compare(range, by) => self.compare(range, by).await,
            OpKind::Status(range) => match self.source.block_status(range).await {
                Ok(extent) => Outcome::Status(extent),
                Err(error) => Outcome::Failed {
                    side: Side::Source,
                    error,
                },
            },
        }
    }

    async fn compare(&self, range: ByteRange, by: CompareBy) -> Outcome {
        let len = usize::try_from(range.len()).expect("no longer than a buffer");
        let taken = match by {
            CompareBy::Reading => self.pool.take(len).map(Some),
            CompareBy::Device => Ok(None),
        };
        let second = match taken {
            Ok(second) => second,
            Err(error) => return done(Side::Target, Err(error)),
        };
        let buf = match self.pool.take(len) {
            Ok(buf) => buf,
            Err(error) => {
                second.into_iter().for_each(|second| self.pool.put(second));
                return done(Side::Target, Err(error));
            }
        };
        let (read, buf) = self.source.read_at(range.start(), buf).await;
        let read = WrongLength::check(read, &buf, range);
        if read.is_err() {
            second.into_iter().for_each(|second| self.pool.put(second));
            self.pool.put(buf);
            return done(Side::Source, read);
        }
        let compared = match second {
            Some(second) => {
                let (read, second) = self.target.read_back(range.start(), second).await;
                let read = WrongLength::check(read, &second, range);
                let compared =
                    read.map(|()| differing(buf.as_ref(), second.as_ref(), range.start()));
                self.pool.put(second);
                self.pool.put(buf);
                compared
            }
            None => {
                let (compared, buf) = self.target.compare_at(range.start(), buf).await;
                self.pool.put(buf);
                compared
            }
        };
        match compared {
            Ok(differing) => Outcome::Compared(differing),
            Err(error) => done(Side::Target, Err(error)),
        }
    }

    async fn copy(&self, kind: OpKind, range: ByteRange, gives_up: &AtomicBool) -> Outcome {
        let [from, to] = kind.sides();
        let len = usize::try_from(range.len()).expect("a copy is no longer than a buffer");
        let buf = match self.pool.take(len) {
            Ok(buf) => buf,
            Err(error) => return done(to, Err(error)),
        };
        let (read, buf) = match from {
            Side::Buffer => self.buffer.read_at(range.start(), buf).await,
            Side::Source | Side::Target => self.source.read_at(range.start(), buf).await,
        };
        let read = WrongLength::check(read, &buf, range);
        if read.is_err() {
            self.pool.put(buf);
            return done(from, read);
        }
        if gives_up.load(Ordering::Relaxed) {
            // The target was told to give up what it has: it gets nothing more.
            self.pool.put(buf);
            return done(to, Err(std::io::ErrorKind::Interrupted.into()));
        }
        if let OpKind::CopyDetecting(_, if_zero) = kind
            && is_zero(buf.as_ref())
        {
            self.pool.put(buf);
            return match if_zero {
                IfZero::Leave => Outcome::Zeroes,
                IfZero::Write(unmap) => match self.target.write_zeroes(range, unmap).await {
                    Ok(()) => Outcome::Zeroes,
                    Err(error) => done(to, Err(error)),
                },
            };
        }
        let (written, buf) = match (to, kind) {
            (Side::Buffer, _) => self.buffer.write_at(range.start(), buf).await,
            (_, OpKind::CopyCompressed(_) | OpKind::CopySavedCompressed(_)) => {
                self.target.write_compressed_at(range.start(), buf).await
            }
            (Side::Source | Side::Target, _) => self.target.write_at(range.start(), buf).await,
        };
        self.pool.put(buf);
        done(to, written)
    }
}

fn done(side: Side, result: std::io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed { side, error },
    }
}
