//! Moves the bytes of a migration over streams of the caller's. Decides nothing.
//!
//! A stream is two small traits, [`ReadStream`] and [`WriteStream`], with buffers that go in and come back, as
//! those of [`io`](crate::io): that is what `io_uring` and completion queues need, and a dropped future loses a
//! buffer and never writes to freed memory. Over `tokio` or `futures-io` each is a few lines. No future is
//! asked to be `Send`.
//!
//! ```text
//! send     outgoing.next_bytes ─▶ write_all … until it is idle, or done    (and the clock, if the speed is limited)
//! answers  read ─▶ outgoing.feed …           receive  read ─▶ incoming.feed ─▶ answers ─▶ write_all …
//! ```
//!
//! The caller asks [`send`] again after he has told the source that the guest has stopped, or started at the
//! other end. All machines go on from where they are when a future is dropped between two calls, or while it waits
//! for the clock. What a failed or dropped write has taken from the source may not have been sent, and nothing can
//! follow it: the connection is lost. A native stream takes up another; QEMU's, which could lose a chunk that
//! way and nobody would know, has ended, and the source has [failed](OutgoingError::Lost).

use std::fmt;
use std::future::Future;
use std::io;

use super::error::{IncomingError, OutgoingError};
use super::incoming::IncomingMigration;
use super::outgoing::{Next, OutgoingMigration};
use crate::driver::Clock;

/// Bytes that are read or written at once.
const PIECE: usize = 64 << 10;
/// Bytes of an answer that are written at once.
const ANSWER: usize = 64;

/// Where bytes come from.
pub trait ReadStream {
    /// Reads at least one byte into the buffer, and says how many; 0 at the end. The buffer comes back with them;
    /// that it has fewer is an [error](io::ErrorKind::InvalidData).
    fn read(&mut self, buf: Vec<u8>) -> impl Future<Output = (io::Result<usize>, Vec<u8>)>;
}

/// Where bytes go to.
pub trait WriteStream {
    /// Writes the first `len` bytes of the buffer, all of them, which comes back.
    fn write_all(
        &mut self,
        buf: Vec<u8>,
        len: usize,
    ) -> impl Future<Output = (io::Result<()>, Vec<u8>)>;
}

/// Why bytes do not move any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriveError {
    /// The stream has failed. A native migration can go on over another.
    #[error("the stream has failed: {0}")]
    Io(#[from] io::Error),
    /// The source has ended.
    #[error(transparent)]
    Outgoing(#[from] OutgoingError),
    /// The destination has ended, or the connection broke.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
}

/// Where a source is when nothing can be sent for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// See [`Next::Idle`]: it is for the caller to stop the guest, to start it there, or to ask again when it has
    /// written.
    Idle,
    /// See [`Next::Answer`]: [`answers`] is to be asked.
    Answer,
    /// See [`Next::Done`].
    Done,
}

/// Sends what there is to be sent as things are, as fast as the stream takes it and the speed allows.
///
/// # Errors
///
/// [`Io`](DriveError::Io) of the stream, [`Outgoing`](DriveError::Outgoing) of the source.
///
/// # Cancel safety
///
/// Cancel safe while it waits for the clock. Dropped amid a write, or after a write has failed, the connection is
/// lost: [`Lost`](OutgoingError::Lost) is what every later call comes to, until a native stream has
/// [another](OutgoingMigration::reconnect).
///
/// # Examples
///
/// See `examples/migrate_bitmap.rs`, which has a guest on both sides.
pub async fn send(
    outgoing: &mut OutgoingMigration,
    stream: &mut impl WriteStream,
    clock: &impl Clock,
) -> Result<Sent, DriveError> {
    let mut buf = vec![0; PIECE];
    loop {
        match outgoing.next_bytes(clock.now(), &mut buf)? {
            Next::Bytes(len) => {
                let mut lent = Lent {
                    outgoing,
                    is_sent: false,
                };
                let (written, back) = stream.write_all(buf, len).await;
                lent.is_sent = written.is_ok();
                drop(lent);
                written?;
                buf = back;
                buf.resize(PIECE, 0);
            }
            Next::Until(until) => clock.sleep_until(until).await,
            Next::Idle => return Ok(Sent::Idle),
            Next::Answer => return Ok(Sent::Answer),
            Next::Done => return Ok(Sent::Done),
        }
    }
}

/// Bytes that are being written.
struct Lent<'a> {
    outgoing: &'a mut OutgoingMigration,
    is_sent: bool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if !self.is_sent {
            self.outgoing.lose();
        }
    }
}

/// Reads once what the destination of a native stream has answered. Says whether it can answer more. `false` is
/// the end of the stream: the other end has closed it. Do not ask again: that would be told at once for ever.
///
/// # Errors
///
/// [`Io`](DriveError::Io) of the stream, [`Outgoing`](DriveError::Outgoing) of the source.
///
/// # Cancel safety
///
/// As that of [`ReadStream::read`].
pub async fn answers(
    outgoing: &mut OutgoingMigration,
    stream: &mut impl ReadStream,
) -> Result<bool, DriveError> {
    let (read, buf) = stream.read(vec![0; 1024]).await;
    let bytes = filled(&buf, read?)?;
    outgoing.feed(bytes)?;
    Ok(!bytes.is_empty())
}

/// Loads what comes, until `is_enough` says so or the stream is over; it is asked after each piece. Says which
/// it was: `true` if there may be more. What is to be answered is written to `back` before more is read.
///
/// What was read past the end of the bitmaps is dropped. Who has others on the same stream gives the bytes to
/// [`feed`](IncomingMigration::feed) himself, which tells how many were read.
///
/// # Errors
///
/// [`Io`](DriveError::Io) of either stream, [`Incoming`](DriveError::Incoming) of the destination.
///
/// # Cancel safety
///
/// As that of [`ReadStream::read`], unless an answer is being written.
pub async fn receive(
    incoming: &mut IncomingMigration,
    stream: &mut impl ReadStream,
    back: &mut impl WriteStream,
    mut is_enough: impl FnMut(&IncomingMigration) -> bool,
) -> Result<bool, DriveError> {
    let mut buf = vec![0; PIECE];
    let mut answer = vec![0; ANSWER];
    loop {
        loop {
            let len = incoming.next_bytes(&mut answer);
            if len == 0 {
                break;
            }
            let (written, again) = back.write_all(answer, len).await;
            written?;
            answer = again;
            answer.resize(ANSWER, 0);
        }
        if incoming.is_done() || is_enough(incoming) {
            return Ok(true);
        }
        let (read, again) = stream.read(buf).await;
        let bytes = filled(&again, read?)?;
        if bytes.is_empty() {
            return Ok(false);
        }
        incoming.feed(bytes)?;
        buf = again;
        buf.resize(PIECE, 0);
    }
}

/// The bytes that were read into a buffer.
fn filled(buf: &[u8], len: usize) -> io::Result<&[u8]> {
    buf.get(..len)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A way back that nobody listens on: QEMU's stream has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWayBack;

impl WriteStream for NoWayBack {
    async fn write_all(&mut self, buf: Vec<u8>, _len: usize) -> (io::Result<()>, Vec<u8>) {
        (Err(io::ErrorKind::Unsupported.into()), buf)
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sent::Idle => "nothing to send",
            Sent::Answer => "waiting for an answer",
            Sent::Done => "all sent",
        })
    }
}
