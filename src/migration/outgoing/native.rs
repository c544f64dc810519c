//! What a source of a native stream knows of the other end: what has arrived there, and what is sent again.

use std::collections::VecDeque;

use super::super::error::{Fault, OutgoingError, StreamError};
use super::super::event::OutgoingEvent;
use super::super::wire::native::{self, FrameBody, Session};
use super::{OutgoingMigration, Phase, Wire};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// Frames of the native stream that may be on their way: 1 GiB of bits, of which what was sent is noted in 32
/// bytes each.
const WINDOW: usize = 1 << 20;

/// The state of a native stream.
pub(super) struct Native {
    pub(super) session: Session,
    /// Number of the next frame.
    pub(super) number: u64,
    /// What was sent and not confirmed, the last of which has the number before `number`.
    pub(super) unconfirmed: VecDeque<Sent>,
    /// Whether this connection has begun.
    pub(super) has_greeted: bool,
    /// After a connection broke: whether the other end has not yet said what it has.
    pub(super) is_waiting: bool,
    /// Whether bytes of this connection may not have been sent.
    pub(super) is_lost: bool,
    pub(super) has_ended: bool,
    /// Bytes of an answer that is not whole.
    pub(super) kept: Vec<u8>,
    /// Bytes of answers before those.
    pub(super) heard: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Sent {
    Start(usize),
    Chunk(usize, ByteRange),
    Complete(usize),
    End,
}

impl OutgoingMigration {
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
        native.is_lost = false;
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
}

/// What the other end has said.
enum Answer {
    Ack(u64),
    Resume(u64),
}

impl Native {
    pub(super) fn new(session: Session) -> Self {
        Self {
            session,
            number: 0,
            unconfirmed: VecDeque::new(),
            has_greeted: false,
            is_waiting: false,
            is_lost: false,
            has_ended: false,
            kept: Vec::new(),
            heard: 0,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.unconfirmed.len() >= WINDOW
    }

    pub(super) fn note(&mut self, sent: Sent) {
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
