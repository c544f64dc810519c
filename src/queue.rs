//! Runs a machine over completion queues, without any future: requests come out, completions go in.
//!
//! ```text
//!  loop {
//!      queue.next(now, &waker) ──▶ Submit(request)  put it on the ring of its side
//!                              ──▶ Wait             reap completions; wait for the ring, the waker, or
//!                                                   until that time
//!      queue.completed(now, id, answer) ◀── per completion
//!  }
//! ```
//!
//! It decides nothing: it only turns one copy into a read and a write. Nothing here blocks or makes a
//! system call. The waker may write to an eventfd that the ring's thread polls anyway.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::task::Waker;
use std::time::Duration;

use crate::bytes::{differing, is_zero};
use crate::copy::{CompareBy, Extent, IfZero, Op, OpKind, Outcome, Side, Unmap};
use crate::io::{BufferPool, WrongLength};
use crate::job::JobError;
use crate::machine::{Machine, Step};
use crate::mirror::{Mirror, Switch, SwitchBack};
use crate::units::ByteRange;

/// A machine, and the requests of it that are out.
///
/// # Examples
///
/// `examples/completion_queue.rs` is the whole loop over a submit/poll back end.
pub struct Queue<P: BufferPool, M: Machine = Mirror> {
    machine: M,
    pool: P,
    /// Requests out, by id.
    out: BTreeMap<u64, Out<P::Buf>>,
    /// Second halves of copies, to be submitted before anything new.
    halves: VecDeque<Request<P::Buf>>,
    next_id: u64,
    /// Whether the target was told to give up what it has: it gets nothing more.
    gives_up: bool,
}

/// What comes next.
#[derive(Debug)]
#[must_use]
pub enum Next<B> {
    /// Submit this, and report it with [`Queue::completed`]. There may be more at once: ask again.
    Submit(Request<B>),
    /// Nothing to submit until a completion is reported, the waker is called, or that time has come.
    Wait {
        /// Time at which to ask again, even if nothing happened.
        until: Option<Duration>,
    },
    /// Switch now, or drop it.
    Switch(Switch),
    /// A switch that was committed has no effect, for the group's was declined: point the guest back.
    /// Never without a [group](crate::JobGroup).
    SwitchBack(SwitchBack),
    /// The job is over.
    Done(Result<(), JobError>),
}

/// One request to one device.
#[derive(Debug)]
#[must_use = "a request that is not completed holds up its job"]
pub struct Request<B> {
    /// To be given back with the completion; fits a ring's user data. Unique in this queue.
    pub id: u64,
    /// The device.
    pub side: Side,
    /// What is to be done.
    pub work: Work<B>,
}

/// What a [`Request`] wants done.
#[derive(Debug)]
pub enum Work<B> {
    /// Fill the buffer with the bytes from `offset` on.
    Read {
        /// Where to read.
        offset: u64,
        /// What to fill.
        buf: B,
    },
    /// Write the buffer from `offset` on.
    Write {
        /// Where to write.
        offset: u64,
        /// What to write.
        buf: B,
    },
    /// Write the buffer from `offset` on, compressed.
    WriteCompressed {
        /// Where to write.
        offset: u64,
        /// What to write.
        buf: B,
    },
    /// Tell what, from `offset` on, does not hold the bytes of the buffer: [`Answer::Compared`]. Only if
    /// [`Limits::compare`](crate::Limits::compare) says [`CompareBy::Device`].
    Compare {
        /// Where to look.
        offset: u64,
        /// What should be there.
        buf: B,
    },
    /// Copy the range from the source, by a way that only the devices know.
    CopyFromSource(ByteRange),
    /// Tell what is at the start of the range: [`Answer::Status`].
    Status(ByteRange),
    /// Make the range read as zeroes.
    WriteZeroes(ByteRange, Unmap),
    /// Discard the range.
    Discard(ByteRange),
    /// Make durable what was written.
    Flush,
    /// Complete when no earlier request can still change the device.
    Settle,
    /// Give up requests that cannot be finished soon, if that is possible.
    CancelInFlight,
}

/// What came of a [`Request`].
#[derive(Debug)]
pub enum Answer<B> {
    /// A read or a write, with its buffer. A read with which one of another length comes back has failed, with
    /// [`WrongLength`].
    Transfer(io::Result<()>, B),
    /// [`Work::Compare`]: what differs, in ranges of the disk, and the buffer.
    Compared(io::Result<Vec<ByteRange>>, B),
    /// [`Work::Status`].
    Status(io::Result<Extent>),
    /// Anything else.
    Plain(io::Result<()>),
}

/// What a request that is out belongs to.
struct Out<B> {
    op: Op,
    step: OutStep<B>,
}

enum OutStep<B> {
    Read,
    /// The target is read, to be compared with this.
    ReadBack(B),
    /// The target compares.
    Compare,
    Write,
    /// What was read is zeroes, and is written as such.
    Zeroes,
    Other,
}

impl<P: BufferPool, M: Machine> Queue<P, M>
where
    P::Buf: AsRef<[u8]>,
{
    /// Runs `machine` with buffers from `pool`.
    pub fn new(machine: M, pool: P) -> Self {
        Self {
            machine,
            pool,
            out: BTreeMap::new(),
            halves: VecDeque::new(),
            next_id: 0,
            gives_up: false,
        }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// The machine back; what is out is lost, as with [`requests_lost`](Self::requests_lost).
    #[must_use]
    pub fn into_machine(mut self) -> M {
        self.requests_lost();
        self.machine
    }

    /// How many requests are out.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.out.len() - self.halves.len()
    }

    /// What to do next. As [`Mirror::poll`] and [`Backup::poll`](crate::Backup::poll).
    pub fn next(&mut self, now: Duration, waker: &Waker) -> Next<P::Buf> {
        if let Some(request) = self.halves.pop_front() {
            return Next::Submit(request);
        }
        loop {
            match self.machine.poll(now, waker) {
                Step::Op(op) => {
                    if let Some(request) = self.request(now, op) {
                        return Next::Submit(request);
                    }
                }
                Step::Wait { until } => return Next::Wait { until },
                Step::Switch(switch) => return Next::Switch(switch),
                Step::SwitchBack(back) => return Next::SwitchBack(back),
                Step::Done(result) => return Next::Done(result),
            }
        }
    }

    /// Reports a request. One that is not known, because it was lost, is ignored; its buffer goes back
    /// to the pool.
    pub fn completed(&mut self, now: Duration, id: u64, answer: Answer<P::Buf>) {
        let Some(Out { op, step }) = self.out.remove(&id) else {
            if let Answer::Transfer(_, buf) | Answer::Compared(_, buf) = answer {
                self.pool.put(buf);
            }
            return;
        };
        let answer = match (&step, answer, op.kind().range()) {
            (OutStep::Read | OutStep::ReadBack(_), Answer::Transfer(read, buf), Some(range)) => {
                Answer::Transfer(WrongLength::check(read, &buf, range), buf)
            }
            (_, answer, _) => answer,
        };
        let [from, to] = op.kind().sides();
        let failed = |error| Outcome::Failed { side: to, error };
        let outcome = match (step, answer) {
            (OutStep::Read, Answer::Transfer(Ok(()), buf)) if self.gives_up => {
                self.pool.put(buf);
                failed(io::ErrorKind::Interrupted.into())
            }
            (OutStep::Read, Answer::Transfer(Ok(()), buf)) => {
                match op.kind() {
                    OpKind::Compare(range, by) => self.compare(now, op, range, by, buf),
                    OpKind::CopyDetecting(range, if_zero) if is_zero(buf.as_ref()) => {
                        self.pool.put(buf);
                        match if_zero {
                            IfZero::Leave => self.machine.op_done(now, op, Outcome::Zeroes),
                            IfZero::Write(unmap) => {
                                let work = Work::WriteZeroes(range, unmap);
                                let request = self.put_out(op, OutStep::Zeroes, to, work);
                                self.halves.push_back(request);
                            }
                        }
                    }
                    _ => self.second_half(op, buf),
                }
                return;
            }
            (OutStep::Read, Answer::Transfer(Err(error), buf)) => {
                self.pool.put(buf);
                Outcome::Failed { side: from, error }
            }
            (OutStep::ReadBack(source), Answer::Transfer(result, target)) => {
                let start = op.kind().range().map_or(0, ByteRange::start);
                let compared = result.map(|()| differing(source.as_ref(), target.as_ref(), start));
                self.pool.put(source);
                self.pool.put(target);
                compared.map_or_else(failed, Outcome::Compared)
            }
            (OutStep::ReadBack(source), answer) => {
                self.pool.put(source);
                if let Answer::Compared(_, buf) = answer {
                    self.pool.put(buf);
                }
                failed(mismatch())
            }
            (OutStep::Compare, Answer::Compared(result, buf)) => {
                self.pool.put(buf);
                result.map_or_else(failed, Outcome::Compared)
            }
            (_, Answer::Compared(_, buf)) => {
                self.pool.put(buf);
                failed(mismatch())
            }
            (OutStep::Write, Answer::Transfer(result, buf)) => {
                self.pool.put(buf);
                result.map_or_else(failed, |()| Outcome::Done)
            }
            (OutStep::Zeroes, Answer::Plain(Ok(()))) => Outcome::Zeroes,
            (OutStep::Zeroes, Answer::Plain(Err(error))) => failed(error),
            (OutStep::Other, Answer::Status(Ok(extent))) => Outcome::Status(extent),
            (OutStep::Other, Answer::Plain(Ok(()))) => Outcome::Done,
            (OutStep::Other, Answer::Status(Err(error)) | Answer::Plain(Err(error))) => {
                failed(error)
            }
            (OutStep::Other | OutStep::Zeroes | OutStep::Compare, Answer::Transfer(_, buf)) => {
                self.pool.put(buf);
                failed(mismatch())
            }
            (
                OutStep::Read | OutStep::Write | OutStep::Compare,
                Answer::Status(_) | Answer::Plain(_),
            )
            | (OutStep::Zeroes, Answer::Status(_)) => failed(mismatch()),
        };
        self.machine.op_done(now, op, outcome);
    }

    /// Says that all requests that are out are lost, because the back end was torn down. As
    /// [`Mirror::ops_lost`].
    pub fn requests_lost(&mut self) {
        for out in std::mem::take(&mut self.out).into_values() {
            if let OutStep::ReadBack(buf) = out.step {
                self.pool.put(buf);
            }
        }
        for half in self.halves.drain(..) {
            if let Work::Write { buf, .. }
            | Work::WriteCompressed { buf, .. }
            | Work::Read { buf, .. }
            | Work::Compare { buf, .. } = half.work
            {
                self.pool.put(buf);
            }
        }
        self.machine.ops_lost();
    }

    fn request(&mut self, now: Duration, op: Op) -> Option<Request<P::Buf>> {
        let [from, to] = op.kind().sides();
        let (side, work) = match op.kind() {
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::Compare(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::Save(range)
            | OpKind::CopySaved(range)
            | OpKind::CopySavedCompressed(range) => {
                let len = usize::try_from(range.len()).expect("a copy is no longer than a buffer");
                match self.pool.take(len) {
                    Ok(buf) => {
                        let offset = range.start();
                        (from, Work::Read { offset, buf })
                    }
                    Err(error) => {
                        let side = to;
                        self.machine
                            .op_done(now, op, Outcome::Failed { side, error });
                        return None;
                    }
                }
            }
            OpKind::CopyOffloaded(range) => (Side::Target, Work::CopyFromSource(range)),
            OpKind::Status(range) => (Side::Source, Work::Status(range)),
            OpKind::Zero(range, unmap) => (Side::Target, Work::WriteZeroes(range, unmap)),
            OpKind::Discard(range) => (Side::Target, Work::Discard(range)),
            OpKind::GiveUp(range) => (Side::Target, Work::Discard(range)),
            OpKind::DiscardSource(range) => (Side::Source, Work::Discard(range)),
            OpKind::DiscardSaved(range) => (Side::Buffer, Work::Discard(range)),
            OpKind::Flush => (Side::Target, Work::Flush),
            OpKind::Settle => (Side::Target, Work::Settle),
            OpKind::SettleSaved => (Side::Buffer, Work::Settle),
            OpKind::CancelInFlight => {
                self.give_up(now);
                (Side::Target, Work::CancelInFlight)
            }
        };
        let step = match work {
            Work::Read { .. } => OutStep::Read,
            _ => OutStep::Other,
        };
        Some(self.put_out(op, step, side, work))
    }

    /// What is read and not yet written stays that way.
    fn give_up(&mut self, now: Duration) {
        self.gives_up = true;
        for half in std::mem::take(&mut self.halves) {
            let error = Err(io::ErrorKind::Interrupted.into());
            let answer = match half.work {
                Work::Write { buf, .. }
                | Work::WriteCompressed { buf, .. }
                | Work::Read { buf, .. } => Answer::Transfer(error, buf),
                Work::Compare { buf, .. } => {
                    Answer::Compared(Err(io::ErrorKind::Interrupted.into()), buf)
                }
                _ => Answer::Plain(error),
            };
            self.completed(now, half.id, answer);
        }
    }

    /// The source was read: now the target is asked what it holds.
    fn compare(&mut self, now: Duration, op: Op, range: ByteRange, by: CompareBy, buf: P::Buf) {
        let offset = range.start();
        let request = match by {
            CompareBy::Device => {
                let work = Work::Compare { offset, buf };
                self.put_out(op, OutStep::Compare, Side::Target, work)
            }
            CompareBy::Reading => {
                let len = usize::try_from(range.len()).expect("no longer than a buffer");
                let second = match self.pool.take(len) {
                    Ok(second) => second,
                    Err(error) => {
                        self.pool.put(buf);
                        let side = Side::Target;
                        self.machine
                            .op_done(now, op, Outcome::Failed { side, error });
                        return;
                    }
                };
                let work = Work::Read {
                    offset,
                    buf: second,
                };
                self.put_out(op, OutStep::ReadBack(buf), Side::Target, work)
            }
        };
        self.halves.push_back(request);
    }

    fn second_half(&mut self, op: Op, buf: P::Buf) {
        let range = op.kind().range().expect("a copy has a range");
        let offset = range.start();
        let [_, to] = op.kind().sides();
        let write = match op.kind() {
            OpKind::CopyCompressed(_) | OpKind::CopySavedCompressed(_) => {
                Work::WriteCompressed { offset, buf }
            }
            _ => Work::Write { offset, buf },
        };
        let request = self.put_out(op, OutStep::Write, to, write);
        self.halves.push_back(request);
    }

    fn put_out(
        &mut self,
        op: Op,
        step: OutStep<P::Buf>,
        side: Side,
        work: Work<P::Buf>,
    ) -> Request<P::Buf> {
        let id = self.next_id;
        self.next_id += 1;
        self.out.insert(id, Out { op, step });
        Request { id, side, work }
    }
}

fn mismatch() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "the answer does not belong to the request",
    )
}

impl<P: BufferPool, M: Machine + fmt::Debug> fmt::Debug for Queue<P, M>
where
    P::Buf: AsRef<[u8]>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("machine", &self.machine)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
