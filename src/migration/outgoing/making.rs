//! What a source sends, and in which order.

use super::super::error::OutgoingError;
use super::super::event::OutgoingEvent;
use super::super::wire::native::{self, Digest, StartFrame};
use super::super::wire::qemu;
use super::super::wire::writer::PartKind;
use super::native::Sent;
use super::{OutgoingMigration, Phase, Wire};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// Chunks that are made under one hold of the node's lock.
const BATCH: usize = 64;

impl OutgoingMigration {
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
    pub(super) fn is_sent(&self) -> bool {
        let is_last = matches!(self.phase, Phase::Stopped | Phase::Away) && self.may_send_bits();
        let has_ended = match &self.wire {
            Wire::Qemu(writer) => writer.has_ended(),
            Wire::Native(native) => native.has_ended,
        };
        is_last && has_ended && self.bitmaps.iter().all(|one| one.is_complete)
    }

    pub(super) fn has_work(&self) -> bool {
        let announces = self.bitmaps.iter().any(|one| !one.is_announced);
        let is_live = self.phase == Phase::Running;
        let sends = self
            .bitmaps
            .iter()
            .any(|one| (!is_live && !one.is_complete) || one.left() > 0);
        announces || (self.may_send_bits() && sends && !self.is_sent())
    }

    /// Makes what comes next, if something does.
    pub(super) fn fill(&mut self) -> Result<(), OutgoingError> {
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
            Phase::Running => drop(self.part(false)),
            Phase::Away if self.mode.is_deferred() => {
                self.package();
                if !self.part(!self.completes_last) {
                    self.end();
                }
            }
            Phase::Stopped | Phase::Away => {
                if self.chunks(PartKind::End, false, BATCH) == 0 {
                    self.end();
                }
            }
            Phase::SetUp | Phase::Over => {}
        }
        Ok(())
    }

    /// Makes a part of what there is to be sent, and says whether there was anything.
    fn part(&mut self, completes: bool) -> bool {
        let mut made = 0;
        while made < self.part_chunks {
            let wanted = BATCH.min(self.part_chunks - made);
            let more = self.chunks(PartKind::Part, completes, wanted);
            made += more;
            if more < wanted {
                break;
            }
        }
        self.close();
        made > 0
    }

    /// Has the guest run at the other end, once, if that is said by the stream itself.
    fn package(&mut self) {
        if let Wire::Qemu(writer) = &mut self.wire {
            writer.package(&mut self.ready);
        }
    }

    /// Says which bitmaps come, those of which that was not said.
    fn announce(&mut self) {
        if self.phase == Phase::SetUp {
            self.phase = Phase::Running;
        }
        if !self.is_set_up {
            self.is_set_up = true;
            self.events.push_back(OutgoingEvent::SetUp);
        }
        if let Wire::Qemu(writer) = &mut self.wire
            && !writer.has_started()
        {
            writer.open(PartKind::Start, &mut self.ready);
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
        if let Wire::Qemu(writer) = &mut self.wire
            && writer.is_open_as(PartKind::Start)
        {
            writer.close(&mut self.ready);
        }
    }

    /// Makes as many chunks as are wanted, or all that are left, from the bitmap on whose turn it is, and says how
    /// many. A bitmap that has all its chunks out is said to be complete at once if that is wanted, and that
    /// counts as one.
    fn chunks(&mut self, kind: PartKind, completes: bool, wanted: usize) -> usize {
        let mut made = 0;
        let all = self.bitmaps.len();
        // Each has its turn from where it was to its end, and then from its start. So one that changes faster
        // than it is sent does not keep the others waiting.
        for step in 0..2 * all {
            let index = (self.turn + step) % all;
            let one = &mut self.bitmaps[index];
            if one.is_complete {
                continue;
            }
            let mut held = one.hold.as_ref().expect("it is not over").lock();
            let (map, mut changes) = held.bits_and_changes();
            if is_broken(Sabotage::ClearAfterRead) {
                clear(changes.as_deref_mut(), one.walk.read(one.shape));
            }
            let names = (&one.wire.0[..], &one.wire.1[..]);
            fetch(map, one.walk.ahead(one.shape, wanted - made));
            while made < wanted {
                let Some(range) = one.walk.next(one.shape, changes.as_deref()) else {
                    break;
                };
                if one.walk.is_tracked() {
                    clear(changes.as_deref_mut(), range);
                    fetch(map, range);
                }
                one.sent += one.shape.bytes_of(range);
                made += 1;
                let chunk = (index, names, range);
                make_chunk(&mut self.wire, chunk, map, kind, &mut self.ready);
            }
            let is_left = one.walk.is_left(changes.as_deref());
            drop(held);
            if completes && !is_left {
                self.complete(index, kind);
                made += 1;
            }
            if made >= wanted {
                self.turn = index;
                break;
            }
        }
        made
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

    /// Says that all bitmaps are complete of which that was not said, and ends the stream.
    fn end(&mut self) {
        for bitmap in 0..self.bitmaps.len() {
            self.complete(bitmap, PartKind::End);
        }
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
}

/// The chunks of `range`, which are whole ones, are not changed any more.
fn clear(changes: Option<&mut HBitmap>, range: ByteRange) {
    if let Some(changes) = changes {
        changes.reset(range).expect("they are whole chunks");
    }
}

/// What will be read soon.
fn fetch(map: &HBitmap, range: ByteRange) {
    map.part_of(range).expect("it is whole chunks").fetch();
}

#[inline]
fn make_chunk(
    wire: &mut Wire,
    (index, names, range): (usize, (&str, &str), ByteRange),
    map: &HBitmap,
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
