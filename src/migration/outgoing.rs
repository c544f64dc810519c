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

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::error::{Fault, OutgoingError, SetupError, StreamError};
use super::event::{OutgoingBitmap, OutgoingEvent};
use super::mapping::BitmapId;
use super::setup::Selected;
use super::wire::native::{self, Digest, FrameBody, Session, StartFrame};
use super::wire::qemu;
use super::wire::sections::Framing;
use super::wire::writer::{PartKind, Writer};
use super::wire::{CHUNK, Shape};
use super::{BitmapMigration, MigratingNode, StreamKind};
use crate::bitmap::HBitmap;
use crate::job::RateLimit;
use crate::node::{BitmapHold, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// Below so many serialized bytes in all nothing is sent live.
const LIVE_MIN: u64 = 1 << 20;
/// Chunks that are made under one hold of the node's lock, and that a part has before the guest stands still or
/// after it runs elsewhere.
const BATCH: usize = 16;
/// Frames of the native stream that may be on their way: 1 GiB of bits, of which what was sent is noted in 32
/// bytes each.
const WINDOW: usize = 1 << 20;

/// When bits are sent. The table of the [module](super) says more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// All while the guest stands still.
    #[default]
    PreCopy,
    /// All after it has started at the other end.
    PostCopy,
    /// All while it runs here, and what changed last while it stands still.
    Live,
    /// All while it runs here, and what changed last after it has started at the other end.
    Hybrid,
}

impl Mode {
    fn is_live(self) -> bool {
        matches!(self, Mode::Live | Mode::Hybrid)
    }

    /// Whether what is left at the stop waits until the guest runs at the other end.
    fn is_deferred(self) -> bool {
        matches!(self, Mode::PostCopy | Mode::Hybrid)
    }
}

/// How a source sends.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OutgoingOptions {
    /// Which stream is made. Default QEMU's, [`Bare`](Framing::Bare).
    pub stream: StreamKind,
    /// When bits are sent. Default [`PreCopy`](Mode::PreCopy).
    pub mode: Mode,
    /// Number of the section in QEMU's stream. Default 2, as in QEMU's own when only bitmaps are sent.
    pub section: u32,
    /// Bytes per second while a guest runs; 0, the default, for no limit. While none does there is no limit.
    pub speed: u64,
}

impl Default for OutgoingOptions {
    fn default() -> Self {
        Self {
            stream: StreamKind::Qemu(Framing::Bare),
            mode: Mode::PreCopy,
            section: 2,
            speed: 0,
        }
    }
}

/// What a source wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// As many bytes are to be sent.
    Bytes(usize),
    /// The rate limit lets nothing more be sent before that time.
    Until(Duration),
    /// Nothing is to be sent as things are: the guest may stand still any time, or start at the other end, or
    /// write and so change a chunk.
    Idle,
    /// Nothing more is sent before the other end has answered.
    Answer,
    /// All was sent, and in a native stream its arrival was confirmed.
    Done,
}

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
    /// Whose turn it is.
    turn: usize,
    /// What was made and not taken yet.
    ready: Vec<u8>,
    taken: usize,
    rate: RateLimit,
    bytes: u64,
    bytes_stopped: u64,
    events: VecDeque<OutgoingEvent>,
}

/// One bitmap.
struct Sending {
    id: BitmapId,
    node: usize,
    wire: (String, String),
    shape: Shape,
    is_enabled: bool,
    is_persistent: bool,
    hold: Option<BitmapHold>,
    walk: Walk,
    is_announced: bool,
    is_complete: bool,
    /// What of the node's writes was known when the guest stood still.
    writes_found: u64,
    sent: u64,
}

/// Which chunks are to be sent.
enum Walk {
    /// Those from here on; `None` when all were.
    Once(Option<u64>),
    /// Those that have changed, looked for from here on.
    Changes {
        from: u64,
        /// A disk without a byte has no chunk that could change, and one that must be sent.
        owes_empty: bool,
    },
}

enum Wire {
    Qemu(Writer),
    Native(Box<Native>),
}

/// The state of a native stream.
struct Native {
    session: Session,
    /// Number of the next frame.
    number: u64,
    /// What was sent and not confirmed, the last of which has the number before `number`.
    unconfirmed: VecDeque<Sent>,
    /// Whether this connection has begun.
    has_greeted: bool,
    /// After a connection broke: whether the other end has not yet said what it has.
    is_waiting: bool,
    has_ended: bool,
    /// Bytes of an answer that is not whole.
    kept: Vec<u8>,
    /// Bytes of answers before those.
    heard: u64,
}

#[derive(Clone, Copy, Debug)]
enum Sent {
    Start(usize),
    Chunk(usize, ByteRange),
    Complete(usize),
    End,
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
                StreamKind::Qemu(framing) => Wire::Qemu(Writer::new(framing, options.section)),
                StreamKind::Native { session } => Wire::Native(Box::new(Native::new(session))),
            },
            phase: Phase::SetUp,
            turn: 0,
            ready: Vec::new(),
            taken: 0,
            rate: RateLimit::new(options.speed),
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
    /// failed then. [`Over`](OutgoingError::Over) afterwards.
    pub fn next_bytes(&mut self, now: Duration, out: &mut [u8]) -> Result<Next, OutgoingError> {
        if let Some(next) = self.make_ready(now)? {
            return Ok(next);
        }
        let len = out.len().min(self.ready.len() - self.taken);
        out[..len].copy_from_slice(&self.ready[self.taken..][..len]);
        self.take(len);
        Ok(Next::Bytes(len))
    }

    /// As [`next_bytes`](Self::next_bytes), and lends the bytes instead of copying them: some tens of KiB at most.
    /// They count as sent.
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

    /// What comes back from the other end of a native stream.
    ///
    /// # Errors
    ///
    /// [`Answer`](OutgoingError::Answer): the connection is of no use any more. The migration goes on with
    /// another, see [`reconnect`](Self::reconnect). [`PeerForgot`](OutgoingError::PeerForgot),
    /// [`OutOfOrder`](OutgoingError::OutOfOrder) if the stream is QEMU's, [`Over`](OutgoingError::Over).
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), OutgoingError> {
        if self.phase == Phase::Over {
            return Err(OutgoingError::Over);
        }
        let mut rest = bytes;
        loop {
            let Wire::Native(native) = &mut self.wire else {
                return Err(OutgoingError::OutOfOrder { what: "an answer" });
            };
            // Answers are short: whatever comes is kept until it is one.
            let more = rest.len().min(64);
            native.kept.extend(&rest[..more]);
            rest = &rest[more..];
            loop {
                let Wire::Native(native) = &mut self.wire else {
                    unreachable!("it was looked at")
                };
                let (answer, used) = match native.answer()? {
                    Some(answer) => answer,
                    None => break,
                };
                native.kept.drain(..used);
                native.heard += used as u64;
                self.hear(answer)?;
            }
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// A native stream goes on over another connection, from its first byte. What was not confirmed is sent
    /// again, once the other end has said what it has.
    ///
    /// # Errors
    ///
    /// [`OutOfOrder`](OutgoingError::OutOfOrder) if the stream is QEMU's, [`Over`](OutgoingError::Over).
    pub fn reconnect(&mut self) -> Result<(), OutgoingError> {
        if self.phase == Phase::Over {
            return Err(OutgoingError::Over);
        }
        let Wire::Native(native) = &mut self.wire else {
            return Err(OutgoingError::OutOfOrder {
                what: "a connection",
            });
        };
        native.has_greeted = false;
        native.is_waiting = true;
        native.kept.clear();
        native.heard = 0;
        self.ready.clear();
        self.taken = 0;
        Ok(())
    }

    fn hear(&mut self, answer: Answer) -> Result<(), OutgoingError> {
        let Wire::Native(native) = &mut self.wire else {
            unreachable!("only a native stream is answered")
        };
        let confirmed = native.number - native.unconfirmed.len() as u64;
        let wrong = |native: &Native, found| {
            let why = Fault::Sequence {
                expected: native.number,
                found,
            };
            Err(StreamError {
                at: native.heard,
                why,
            }
            .into())
        };
        match answer {
            Answer::Ack(next) => {
                if next > native.number {
                    return wrong(native, next);
                }
                // An answer may come late, but not while the other end is asked what it has.
                if next > confirmed && !native.is_waiting {
                    native.unconfirmed.drain(..(next - confirmed) as usize);
                }
                Ok(())
            }
            Answer::Resume(next) => {
                if next > native.number || !native.is_waiting {
                    return wrong(native, next);
                }
                if next < confirmed {
                    if next != 0 {
                        return wrong(native, next);
                    }
                    return self.start_over();
                }
                native.unconfirmed.drain(..(next - confirmed) as usize);
                let lost = std::mem::take(&mut native.unconfirmed);
                native.number = next;
                native.is_waiting = false;
                self.send_again(lost);
                Ok(())
            }
        }
    }

    /// What was sent and did not arrive is to be sent.
    fn send_again(&mut self, lost: VecDeque<Sent>) {
        let mut chunks = 0;
        for sent in lost {
            if is_broken(Sabotage::ForgetUnconfirmed) && matches!(sent, Sent::Chunk(..)) {
                continue;
            }
            match sent {
                Sent::Start(bitmap) => self.bitmaps[bitmap].is_announced = false,
                Sent::Chunk(bitmap, range) => {
                    chunks += 1;
                    self.bitmaps[bitmap].mark(range);
                }
                Sent::Complete(bitmap) => self.bitmaps[bitmap].is_complete = false,
                Sent::End => self.native_mut().has_ended = false,
            }
        }
        self.events.push_back(OutgoingEvent::Resumed { chunks });
    }

    /// The other end knows nothing of what it had.
    fn start_over(&mut self) -> Result<(), OutgoingError> {
        if self.phase == Phase::Away {
            // Its bitmaps were to record since the guest has started.
            self.fail(OutgoingError::PeerForgot);
            return Err(OutgoingError::PeerForgot);
        }
        let native = self.native_mut();
        native.unconfirmed.clear();
        native.number = 0;
        native.is_waiting = false;
        native.has_ended = false;
        let mut chunks = 0;
        for one in &mut self.bitmaps {
            one.is_announced = false;
            one.is_complete = false;
            one.mark((0..one.shape.len).into());
            chunks += one.shape.len.div_ceil(one.shape.tracked_chunk()).max(1);
        }
        self.events.push_back(OutgoingEvent::Resumed { chunks });
        Ok(())
    }

    fn native_mut(&mut self) -> &mut Native {
        match &mut self.wire {
            Wire::Native(native) => native,
            Wire::Qemu(_) => unreachable!("only a native stream is taken up again"),
        }
    }

    /// Whether the bits of the bitmaps may be sent as things are.
    fn may_send_bits(&self) -> bool {
        match self.phase {
            Phase::SetUp | Phase::Over => false,
            Phase::Running => self.mode.is_live(),
            Phase::Stopped => !self.mode.is_deferred(),
            Phase::Away => true,
        }
    }

    /// Whether everything was made that is to be sent.
    fn is_sent(&self) -> bool {
        let is_last = matches!(self.phase, Phase::Stopped | Phase::Away) && self.may_send_bits();
        let has_ended = match &self.wire {
            Wire::Qemu(writer) => writer.has_ended(),
            Wire::Native(native) => native.has_ended,
        };
        is_last && has_ended && self.bitmaps.iter().all(|one| one.is_complete)
    }

    fn has_work(&self) -> bool {
        let announces = self.bitmaps.iter().any(|one| !one.is_announced);
        let sends = self
            .bitmaps
            .iter()
            .any(|one| one.left() > 0 || !one.is_complete);
        announces || (self.may_send_bits() && sends && !self.is_sent())
    }

    /// Makes what comes next, if something does.
    fn fill(&mut self) -> Result<(), OutgoingError> {
        if let Wire::Native(native) = &mut self.wire {
            if !native.has_greeted && !native.is_waiting {
                native.has_greeted = true;
                native::hello(native.number, &native.session, &mut self.ready);
            }
            if native.is_waiting || native.is_full() {
                return Ok(());
            }
        }
        self.announce();
        // What is announced is given out before bits are made: they may be those of another phase.
        if !self.ready.is_empty() || self.is_sent() {
            return Ok(());
        }
        if matches!(self.phase, Phase::Stopped | Phase::Away) {
            self.check_writes()?;
        }
        if !self.may_send_bits() {
            return Ok(());
        }
        match self.phase {
            Phase::Running => {
                self.chunks(PartKind::Part, false);
                self.close();
            }
            Phase::Away if self.mode.is_deferred() => {
                if self.chunks(PartKind::Part, true) {
                    self.close();
                } else {
                    self.end();
                }
            }
            Phase::Stopped | Phase::Away => {
                if !self.chunks(PartKind::End, false) {
                    for bitmap in 0..self.bitmaps.len() {
                        self.complete(bitmap, PartKind::End);
                    }
                    self.end();
                }
            }
            Phase::SetUp | Phase::Over => {}
        }
        Ok(())
    }

    /// Says which bitmaps come, those of which that was not said.
    fn announce(&mut self) {
        if self.phase == Phase::SetUp {
            self.phase = Phase::Running;
            self.events.push_back(OutgoingEvent::SetUp);
            if let Wire::Qemu(writer) = &mut self.wire {
                writer.open(PartKind::Start, &mut self.ready);
            }
        }
        if let Wire::Qemu(writer) = &mut self.wire {
            if !writer.has_started() {
                writer.open(PartKind::Start, &mut self.ready);
            }
        }
        for (index, one) in self.bitmaps.iter_mut().enumerate() {
            if one.is_announced {
                continue;
            }
            one.is_announced = true;
            let enabled = if one.is_enabled { qemu::ENABLED } else { 0 };
            let persistent = if one.is_persistent {
                qemu::PERSISTENT
            } else {
                0
            };
            match &mut self.wire {
                Wire::Qemu(writer) => {
                    let flags = enabled | persistent;
                    writer
                        .maker
                        .start(one.wire(), one.shape, flags, &mut self.ready);
                }
                Wire::Native(native) => {
                    let node = &self.nodes[one.node];
                    let start = StartFrame {
                        bitmap: index as u32,
                        names: (one.wire.0.as_bytes(), one.wire.1.as_bytes()),
                        identity: node.identity,
                        generation: node.generation,
                        len: one.shape.len,
                        granularity: one.shape.granularity.bytes(),
                        is_enabled: one.is_enabled,
                        is_persistent: one.is_persistent,
                    };
                    native::make_start(native.number, &start, &mut self.ready);
                    native.note(Sent::Start(index));
                }
            }
        }
        if let Wire::Qemu(writer) = &mut self.wire {
            if writer.is_open_as(PartKind::Start) {
                writer.close(&mut self.ready);
            }
        }
    }

    /// Makes chunks of the bitmap whose turn it is, and says whether there were any left. A bitmap that has all
    /// its chunks out is said to be complete at once if that is wanted.
    fn chunks(&mut self, kind: PartKind, completes: bool) -> bool {
        let mut made = 0;
        let all = self.bitmaps.len();
        for step in 0..all {
            let index = (self.turn + step) % all;
            let one = &mut self.bitmaps[index];
            if one.is_complete {
                continue;
            }
            let mut held = one.hold.as_ref().expect("it is not over").lock();
            while made < BATCH {
                let Some(range) = one.walk.next(one.shape, held.changes()) else {
                    break;
                };
                held.clear_changes(range);
                let bytes = one.shape.bytes_of(range);
                one.sent += bytes;
                made += 1;
                let wire = (&one.wire.0[..], &one.wire.1[..]);
                make_chunk(
                    &mut self.wire,
                    (index, wire),
                    held.map(),
                    range,
                    kind,
                    &mut self.ready,
                );
            }
            let is_left = one.walk.peek(one.shape, held.changes()).is_some();
            drop(held);
            if completes && !is_left {
                self.complete(index, kind);
                made += 1;
            }
            if made >= BATCH {
                self.turn = index;
                return true;
            }
        }
        made > 0
    }

    /// Says that a bitmap has all its bits.
    fn complete(&mut self, index: usize, kind: PartKind) {
        let one = &mut self.bitmaps[index];
        if one.is_complete {
            return;
        }
        one.is_complete = true;
        match &mut self.wire {
            Wire::Qemu(writer) => {
                writer.open(kind, &mut self.ready);
                writer.maker.complete(one.wire(), &mut self.ready);
            }
            Wire::Native(native) => {
                let digest = Digest::of(one.hold().lock().map());
                native::complete(native.number, index as u32, &digest, &mut self.ready);
                native.note(Sent::Complete(index));
            }
        }
        self.events
            .push_back(OutgoingEvent::Complete(one.id.clone()));
    }

    fn close(&mut self) {
        if let Wire::Qemu(writer) = &mut self.wire {
            writer.close(&mut self.ready);
        }
    }

    /// Ends the stream.
    fn end(&mut self) {
        match &mut self.wire {
            Wire::Qemu(writer) => {
                writer.open(PartKind::End, &mut self.ready);
                writer.close(&mut self.ready);
            }
            Wire::Native(native) => {
                native::end(native.number, self.bitmaps.len() as u32, &mut self.ready);
                native.note(Sent::End);
                native.has_ended = true;
            }
        }
        self.events.push_back(OutgoingEvent::Sent);
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

fn make_chunk(
    wire: &mut Wire,
    (index, names): (usize, (&str, &str)),
    map: &HBitmap,
    range: ByteRange,
    kind: PartKind,
    out: &mut Vec<u8>,
) {
    match wire {
        Wire::Qemu(writer) => {
            writer.open(kind, out);
            writer.maker.bits(names, map, range, out);
        }
        Wire::Native(native) => {
            native::bits(native.number, index as u32, map, range, out);
            native.note(Sent::Chunk(index, range));
        }
    }
}

impl Sending {
    fn new(selected: Selected, is_tracked: bool) -> Result<Self, SetupError> {
        let Selected {
            id,
            hold,
            node,
            wire,
            shape,
            is_enabled,
            is_persistent,
        } = selected;
        let walk = if is_tracked {
            let chunk = shape.tracked_chunk() / shape.align() * 8;
            hold.track_changes(chunk)
                .map_err(|error| SetupError::Bitmap {
                    bitmap: id.clone(),
                    error,
                })?;
            Walk::Changes {
                from: 0,
                owes_empty: shape.len == 0,
            }
        } else {
            Walk::Once(Some(0))
        };
        Ok(Self {
            id,
            node,
            wire,
            shape,
            is_enabled,
            is_persistent,
            hold: Some(hold),
            walk,
            is_announced: false,
            is_complete: false,
            writes_found: 0,
            sent: 0,
        })
    }

    fn wire(&self) -> (&str, &str) {
        (&self.wire.0, &self.wire.1)
    }

    fn hold(&self) -> &BitmapHold {
        self.hold.as_ref().expect("it is not over")
    }

    /// Serialized bytes that are to be sent.
    fn left(&self) -> u64 {
        match (&self.walk, &self.hold) {
            (_, None) | (Walk::Once(None), _) => 0,
            (Walk::Once(Some(from)), _) => self.shape.bytes_of((*from..self.shape.len).into()),
            (Walk::Changes { .. }, Some(hold)) => {
                let held = hold.lock();
                let changed = held.changes().map_or(0, HBitmap::count);
                changed.saturating_mul(CHUNK).min(self.shape.bytes())
            }
        }
    }

    /// What is to be sent again.
    fn mark(&mut self, range: ByteRange) {
        if let Walk::Changes { owes_empty, .. } = &mut self.walk {
            *owes_empty |= self.shape.len == 0;
            if let Some(hold) = &self.hold {
                hold.lock().mark_changed(range);
            }
        }
    }
}

impl Walk {
    /// The chunk that comes next, and none after it yet.
    fn peek(&self, shape: Shape, changes: Option<&HBitmap>) -> Option<ByteRange> {
        match *self {
            Walk::Once(from) => Some(shape.chunk_at(from?, shape.chunk())),
            Walk::Changes {
                owes_empty: true, ..
            } => Some((0..0).into()),
            Walk::Changes { from, .. } => {
                let changes = changes?;
                let found = changes.next_dirty(from..shape.len);
                let start = found.or_else(|| changes.next_dirty(0..from))?;
                let start = changes.granularity().align_down(start);
                Some(shape.chunk_at(start, shape.tracked_chunk()))
            }
        }
    }

    fn next(&mut self, shape: Shape, changes: Option<&HBitmap>) -> Option<ByteRange> {
        let range = self.peek(shape, changes)?;
        match self {
            Walk::Once(from) => *from = (range.end() < shape.len).then_some(range.end()),
            Walk::Changes { from, owes_empty } => {
                *from = range.end();
                *owes_empty = false;
            }
        }
        Some(range)
    }
}

/// What the other end has said.
enum Answer {
    Ack(u64),
    Resume(u64),
}

impl Native {
    fn new(session: Session) -> Self {
        Self {
            session,
            number: 0,
            unconfirmed: VecDeque::new(),
            has_greeted: false,
            is_waiting: false,
            has_ended: false,
            kept: Vec::new(),
            heard: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.unconfirmed.len() >= WINDOW
    }

    fn note(&mut self, sent: Sent) {
        self.unconfirmed.push_back(sent);
        self.number += 1;
    }

    /// The first answer of what was heard, and how many bytes it has.
    fn answer(&self) -> Result<Option<(Answer, usize)>, OutgoingError> {
        let at = self.heard;
        let (frame, used) = match native::parse(&self.kept) {
            Ok(native::Parsed::Frame(frame, used)) => (frame, used),
            Ok(native::Parsed::Needs(_)) => return Ok(None),
            Err((within, why)) => {
                let at = at + within as u64;
                return Err(StreamError { at, why }.into());
            }
        };
        let (answer, session) = match frame.body {
            FrameBody::Ack { session } => (Answer::Ack(frame.number), session),
            FrameBody::Resume { session } => (Answer::Resume(frame.number), session),
            FrameBody::Hello { .. }
            | FrameBody::Start(_)
            | FrameBody::Bits { .. }
            | FrameBody::Complete { .. }
            | FrameBody::End { .. } => {
                let why = Fault::Frame { kind: self.kept[0] };
                return Err(StreamError { at, why }.into());
            }
        };
        if session != self.session {
            let why = Fault::Session;
            return Err(StreamError { at, why }.into());
        }
        Ok(Some((answer, used)))
    }
}
