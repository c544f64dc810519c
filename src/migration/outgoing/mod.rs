//! The source of a migration: bytes come out, and bitmaps stay as they are until the other end has them.
//!
//! ```text
//!             announced                guest stands still            guest runs there
//!  SetUp ────────────────▶ Running ───────────────────▶ Stopped ─────────────────────▶ Away
//!                            │ live: chunks               │ pre-copy, live: chunks      │ chunks
//!                            ▼                            ▼                             ▼
//!                           idle                        all sent ──── finish: handed over
//! ```
//!
//! Each bitmap is sent once from its first chunk to its last, or, where it can change or be lost on the way, by
//! the chunks that are noted as changed: all of them at first.
mod making;
mod native;
mod options;
mod sending;

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::error::{OutgoingError, SetupError};
use super::event::{OutgoingBitmap, OutgoingEvent};
use super::wire::writer::Writer;
use super::{BitmapMigration, MigratingNode, StreamKind};
use crate::job::RateLimit;
use crate::node::QuiesceGuard;
use crate::sabotage::{Sabotage, is_broken};

use native::Native;
pub use options::{Mode, Next, OutgoingOptions};
use sending::Sending;

/// Below so many serialized bytes in all nothing is sent live.
const LIVE_MIN: u64 = 1 << 20;

/// Chunks of a part at most: it is made as a whole.
const PART_CHUNKS_MAX: u32 = 1024;

/// The source of a migration of dirty bitmaps.
///
/// Made by [`BitmapMigration::outgoing`]. [`next_bytes`](Self::next_bytes) gives what is to be sent;
/// [`stop`](Self::stop) and [`guest_started`](Self::guest_started) are told; [`finish`](Self::finish) hands the
/// bitmaps over. Until then they record and are in use here, and dropping this frees them as if nothing had been
/// sent, unless the guest was said to run elsewhere: then what is here is stale, and is left out of exports.
///
/// # Examples
///
/// See [`IncomingMigration`](crate::IncomingMigration).
#[must_use = "the bitmaps are free again when this is dropped"]
pub struct OutgoingMigration {
    nodes: Vec<MigratingNode>,
    bitmaps: Vec<Sending>,
    mode: Mode,
    wire: Wire,
    phase: Phase,
    /// Whether it was told that all bitmaps are announced.
    is_set_up: bool,
    /// Whose turn it is.
    turn: usize,
    /// What was made and not taken yet.
    ready: Vec<u8>,
    taken: usize,
    rate: RateLimit,
    part_chunks: usize,
    completes_last: bool,
    bytes: u64,
    bytes_stopped: u64,
    events: VecDeque<OutgoingEvent>,
}

enum Wire {
    Qemu(Writer),
    Native(Box<Native>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest runs, and bitmaps are announced.
    SetUp,
    /// The guest runs.
    Running,
    /// It stands still.
    Stopped,
    /// It runs at the other end.
    Away,
    /// Nothing is sent any more, and the bitmaps are free.
    Over,
}

impl BitmapMigration {
    /// A source for the bitmaps of the nodes: those that there are now, in use from now on.
    ///
    /// # Errors
    ///
    /// See [`SetupError`]. Nothing has changed then.
    pub fn outgoing(&self, options: OutgoingOptions) -> Result<OutgoingMigration, SetupError> {
        let selected = self.select()?;
        let total: u64 = selected.iter().map(|one| one.shape.bytes()).sum();
        let is_live = options.mode.is_live() && total >= LIVE_MIN;
        let mode = match options.mode {
            Mode::Live if !is_live => Mode::PreCopy,
            Mode::Hybrid if !is_live => Mode::PostCopy,
            mode => mode,
        };
        let is_native = matches!(options.stream, StreamKind::Native { .. });
        let sending = |one| Sending::new(one, is_live || is_native);
        Ok(OutgoingMigration {
            nodes: self.nodes.clone(),
            bitmaps: selected
                .into_iter()
                .map(sending)
                .collect::<Result<_, _>>()?,
            mode,
            wire: match options.stream {
                StreamKind::Qemu(framing) => {
                    Wire::Qemu(Writer::new(framing, options.section, mode.is_deferred()))
                }
                StreamKind::Native { session } => Wire::Native(Box::new(Native::new(session))),
            },
            phase: Phase::SetUp,
            is_set_up: false,
            turn: 0,
            ready: Vec::new(),
            taken: 0,
            rate: RateLimit::new(options.speed),
            part_chunks: part_chunks(options.part_chunks),
            completes_last: options.completes_last,
            bytes: 0,
            bytes_stopped: 0,
            events: VecDeque::new(),
        })
    }
}

impl OutgoingMigration {
    /// Writes what is to be sent next to `out`, as much as fits, or says what is to be waited for. `now` is a
    /// time since any fixed moment, and matters only if the speed is limited.
    ///
    /// # Errors
    ///
    /// [`GuestWrote`](OutgoingError::GuestWrote): the guest was said to stand still, and wrote. The migration has
    /// failed then. [`Over`](OutgoingError::Over) afterwards. [`Lost`](OutgoingError::Lost) after the
    /// [driver](super::driver::send) has lost bytes of a native stream, until it has another connection.
    pub fn next_bytes(&mut self, now: Duration, out: &mut [u8]) -> Result<Next, OutgoingError> {
        if let Some(next) = self.make_ready(now)? {
            return Ok(next);
        }
        let len = out.len().min(self.ready.len() - self.taken);
        out[..len].copy_from_slice(&self.ready[self.taken..][..len]);
        self.take(len);
        Ok(Next::Bytes(len))
    }

    /// As [`next_bytes`](Self::next_bytes), and lends the bytes instead of copying them: some tens of KiB, or as
    /// much as [`part_chunks`](OutgoingOptions::part_chunks) make. They count as sent.
    ///
    /// # Errors
    ///
    /// The same.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::migration::OutgoingOptions;
    /// use blockjob::{BitmapMigration, BitmapOptions, Node};
    /// use std::io::Write;
    /// use std::time::Duration;
    ///
    /// let node = Node::new(1 << 30);
    /// node.bitmaps().add_disabled("daily", BitmapOptions::default())?;
    /// let migration = BitmapMigration::new().with_node("disk0", &node);
    /// let mut outgoing = migration.outgoing(OutgoingOptions::default())?;
    /// let mut file = Vec::new();
    /// while let (_, bytes @ [_, ..]) = outgoing.next_slice(Duration::ZERO)? {
    ///     file.write_all(bytes)?;
    /// }
    /// assert_eq!(file, b"\x1c\x05disk0\x05daily\0\x01\0\0\0\x01");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn next_slice(&mut self, now: Duration) -> Result<(Next, &[u8]), OutgoingError> {
        if let Some(next) = self.make_ready(now)? {
            return Ok((next, &[]));
        }
        let from = self.taken;
        let len = self.ready.len() - from;
        self.take(len);
        Ok((Next::Bytes(len), &self.ready[from..]))
    }

    /// Sees to it that there is something to give out, or says what is to be waited for.
    fn make_ready(&mut self, now: Duration) -> Result<Option<Next>, OutgoingError> {
        if self.phase == Phase::Over {
            return Err(OutgoingError::Over);
        }
        if matches!(&self.wire, Wire::Native(native) if native.is_lost) {
            return Err(OutgoingError::Lost);
        }
        if self.taken < self.ready.len() {
            return Ok(None);
        }
        let is_limited = self.phase != Phase::Stopped;
        let free_at = self.rate.free_at(now);
        if is_limited && free_at > now && self.has_work() {
            return Ok(Some(Next::Until(free_at)));
        }
        self.ready.clear();
        self.taken = 0;
        if let Err(error) = self.fill() {
            self.fail(error.clone());
            return Err(error);
        }
        let len = self.ready.len() as u64;
        self.rate.account(if is_limited { len } else { 0 });
        Ok((len == 0).then(|| self.wanted()))
    }

    /// Bytes that were given out may not have been sent.
    pub(super) fn lose(&mut self) {
        match &mut self.wire {
            Wire::Native(native) => native.is_lost = true,
            Wire::Qemu(_) => self.fail(OutgoingError::Lost),
        }
    }

    /// So many more bytes were given out.
    fn take(&mut self, len: usize) {
        self.taken += len;
        self.bytes += len as u64;
        if self.phase == Phase::Stopped {
            self.bytes_stopped += len as u64;
        }
    }

    /// What is to be waited for when there is nothing to send.
    fn wanted(&self) -> Next {
        match &self.wire {
            Wire::Native(native) if native.is_waiting => Next::Answer,
            Wire::Native(native) if native.is_full() => Next::Answer,
            Wire::Native(native) if self.is_sent() && !native.unconfirmed.is_empty() => {
                Next::Answer
            }
            Wire::Qemu(_) | Wire::Native(_) if self.is_sent() => Next::Done,
            Wire::Qemu(_) | Wire::Native(_) => Next::Idle,
        }
    }

    /// The guest stands still: no write is in flight, and none will begin until the migration has ended. Every
    /// node with bitmaps must be quiesced at this moment.
    ///
    /// The guards may go afterwards, but a write then is an error: it would be in nothing that was sent. (Writes
    /// to a node whose bitmaps all do not record go unnoticed, and change none of them.)
    ///
    /// # Errors
    ///
    /// [`NotQuiesced`](OutgoingError::NotQuiesced), [`OutOfOrder`](OutgoingError::OutOfOrder) if it was told before,
    /// [`Over`](OutgoingError::Over). Nothing has changed then.
    pub fn stop(&mut self, guards: &[&QuiesceGuard]) -> Result<(), OutgoingError> {
        match self.phase {
            Phase::SetUp | Phase::Running => {}
            Phase::Stopped | Phase::Away => {
                return Err(OutgoingError::OutOfOrder { what: "a stop" });
            }
            Phase::Over => return Err(OutgoingError::Over),
        }
        for one in &self.bitmaps {
            let node = &self.nodes[one.node];
            if !guards.iter().any(|guard| guard.is_of(&node.node)) {
                let node = node.name.clone();
                return Err(OutgoingError::NotQuiesced { node });
            }
        }
        for one in &mut self.bitmaps {
            let found = one.hold().lock().writes_found();
            one.writes_found = found;
        }
        self.phase = Phase::Stopped;
        self.events.push_back(OutgoingEvent::Stopped);
        Ok(())
    }

    /// The guest starts at the other end, or is about to. From now on what is here is stale, whatever becomes of
    /// the migration.
    ///
    /// # Errors
    ///
    /// [`OutOfOrder`](OutgoingError::OutOfOrder) before the [`stop`](Self::stop) or if it was told before,
    /// [`GuestWrote`](OutgoingError::GuestWrote), [`Over`](OutgoingError::Over).
    pub fn guest_started(&mut self) -> Result<(), OutgoingError> {
        match self.phase {
            Phase::Stopped => {}
            Phase::SetUp | Phase::Running | Phase::Away => {
                let what = "the guest's start";
                return Err(OutgoingError::OutOfOrder { what });
            }
            Phase::Over => return Err(OutgoingError::Over),
        }
        self.check_writes()?;
        self.phase = Phase::Away;
        self.events.push_back(OutgoingEvent::GuestStarted);
        Ok(())
    }

    /// The other end has the bitmaps. They are free here, and left out of exports until they are
    /// [taken back](crate::Bitmaps::take_back).
    ///
    /// # Errors
    ///
    /// [`OutOfOrder`](OutgoingError::OutOfOrder) while there is something to send, or to be confirmed; then nothing
    /// has changed. [`GuestWrote`](OutgoingError::GuestWrote), [`Over`](OutgoingError::Over).
    pub fn finish(&mut self) -> Result<(), OutgoingError> {
        if self.phase == Phase::Over {
            return Err(OutgoingError::Over);
        }
        if self.taken < self.ready.len() || self.wanted() != Next::Done {
            return Err(OutgoingError::OutOfOrder { what: "the end" });
        }
        self.check_writes()?;
        self.let_go(true);
        self.events.push_back(OutgoingEvent::HandedOver);
        Ok(())
    }

    /// Gives up. The bitmaps are free, as if nothing had been sent; if the guest was said to run elsewhere they
    /// are stale, and left out of exports.
    pub fn cancel(&mut self) {
        let is_stale = self.phase == Phase::Away || is_broken(Sabotage::CancelHandsOver);
        self.let_go(is_stale);
    }

    /// Takes another speed, in bytes per second; 0 for no limit.
    pub fn set_speed(&mut self, now: Duration, speed: u64) {
        self.rate.set_speed(now, speed);
    }

    /// Has the parts that begin from now on have so many [chunks](OutgoingOptions::part_chunks).
    pub fn set_part_chunks(&mut self, chunks: u32) {
        self.part_chunks = part_chunks(chunks);
    }

    /// Whether everything was given out that was made, and no part of QEMU's section is open: where others may put
    /// sections of their own. A native stream has no parts, and is always so between two frames.
    #[must_use]
    pub fn is_between_parts(&self) -> bool {
        let is_open = matches!(&self.wire, Wire::Qemu(writer) if writer.is_open());
        self.taken == self.ready.len() && !is_open
    }

    /// When bits are sent; of the modes that were asked for the one that it has become, as nothing is sent live
    /// below 1 MiB.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Serialized bytes that are to be sent, as of now: what adds to the time that the guest stands still if it
    /// does so now, unless they are sent after that.
    #[must_use]
    pub fn bytes_left(&self) -> u64 {
        self.bitmaps.iter().map(Sending::left).sum()
    }

    /// Bytes that were given out, all that is around the bits included.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.bytes
    }

    /// Those of them that were given out while the guest stood still at both ends.
    #[must_use]
    pub fn bytes_sent_stopped(&self) -> u64 {
        self.bytes_stopped
    }

    /// All bitmaps, in the order in which they are sent, and how far each is.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<OutgoingBitmap> {
        let told = self.bitmaps.iter().map(|one| OutgoingBitmap {
            id: one.id.clone(),
            bytes: one.shape.bytes(),
            bytes_sent: one.sent,
            bytes_left: one.left(),
            is_complete: one.is_complete,
        });
        told.collect()
    }

    /// What happened next, if something did that was not told yet.
    pub fn poll_event(&mut self) -> Option<OutgoingEvent> {
        self.events.pop_front()
    }

    /// Whether nothing was written since the guest stands still.
    fn check_writes(&mut self) -> Result<(), OutgoingError> {
        if !matches!(self.phase, Phase::Stopped | Phase::Away) || is_broken(Sabotage::IgnoreWrites)
        {
            return Ok(());
        }
        let has_written = |one: &&Sending| one.hold().lock().writes_found() != one.writes_found;
        let Some(one) = self.bitmaps.iter().find(has_written) else {
            return Ok(());
        };
        let node = self.nodes[one.node].name.clone();
        let error = OutgoingError::GuestWrote { node };
        self.fail(error.clone());
        Err(error)
    }

    fn fail(&mut self, error: OutgoingError) {
        if self.phase != Phase::Over {
            self.cancel();
            self.events.push_back(OutgoingEvent::Failed(error));
        }
    }

    fn let_go(&mut self, is_handed_over: bool) {
        self.phase = Phase::Over;
        for one in &mut self.bitmaps {
            if let (Some(hold), true) = (one.hold.take(), is_handed_over) {
                hold.hand_over();
            }
        }
    }
}

/// What is taken for a number of chunks.
fn part_chunks(chunks: u32) -> usize {
    chunks.clamp(1, PART_CHUNKS_MAX) as usize
}

impl Drop for OutgoingMigration {
    fn drop(&mut self) {
        if self.phase != Phase::Over {
            self.cancel();
        }
    }
}

impl fmt::Debug for OutgoingMigration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutgoingMigration")
            .field("mode", &self.mode)
            .field("phase", &self.phase)
            .field("bytes_sent", &self.bytes)
            .finish_non_exhaustive()
    }
}
