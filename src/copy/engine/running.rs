//! What was handed out and not reported back.
//!
//! Each operation knows its slot, so that it is found without a search, and the sums are kept rather than taken
//! each time: this is looked at several times for each cluster that is copied.

use crate::copy::{Op, OpId, OpKind};

/// What an operation is done for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// In the background: it counts as a worker, and with its buffer.
    Worker,
    /// A guest waits for it: it counts as neither.
    Urgent,
    /// Nobody waits for it: the same.
    Aside,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) id: OpId,
    pub(super) kind: OpKind,
    pub(super) rank: Rank,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Running {
    slots: Vec<Option<Out>>,
    /// Which of them are empty.
    free: Vec<u32>,
    /// How many there are of each rank.
    workers: usize,
    urgent: usize,
    aside: usize,
    /// Bytes in buffers of workers.
    buffered_bytes: u64,
    /// Bytes that are on their way to the target in the background, in buffers or without.
    moving_bytes: u64,
    /// Bytes that the source is being asked about.
    looked_at_bytes: u64,
}

impl Running {
    pub(super) fn hand_out(&mut self, kind: OpKind, rank: Rank) -> Op {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("there is a limit to each rank")
        });
        let op = Op::in_slot(kind, slot, rank == Rank::Urgent);
        let out = Out {
            id: op.id(),
            kind,
            rank,
        };
        self.slots[slot as usize] = Some(out);
        *self.count(rank) += 1;
        self.buffered_bytes += buffered_bytes(out);
        self.moving_bytes += moving_bytes(out);
        self.looked_at_bytes += looked_at_bytes(out);
        op
    }

    /// Takes it back; `None` if it is not known, or not any more.
    pub(super) fn take_back(&mut self, op: &Op) -> Option<Out> {
        let slot = self.slots.get_mut(op.slot() as usize)?;
        let out = slot.take_if(|out| out.id == op.id())?;
        self.free.push(op.slot());
        *self.count(out.rank) -= 1;
        self.buffered_bytes -= buffered_bytes(out);
        self.moving_bytes -= moving_bytes(out);
        self.looked_at_bytes -= looked_at_bytes(out);
        Some(out)
    }

    /// Takes all back, in the order in which they were handed out.
    pub(super) fn take_all(&mut self) -> Vec<Out> {
        let mut all: Vec<Out> = std::mem::take(self).slots.into_iter().flatten().collect();
        all.sort_unstable_by_key(|out| out.id);
        all
    }

    /// Takes back what waits for a device to settle.
    pub(super) fn take_settling(&mut self) -> Vec<Out> {
        let mut settling = Vec::new();
        for (number, slot) in (0..).zip(&mut self.slots) {
            let is_settling = |out: &mut Out| out.kind.settles();
            if let Some(out) = slot.take_if(is_settling) {
                self.free.push(number);
                settling.push(out);
            }
        }
        for out in &settling {
            *self.count(out.rank) -= 1;
        }
        settling
    }

    fn count(&mut self, rank: Rank) -> &mut usize {
        match rank {
            Rank::Worker => &mut self.workers,
            Rank::Urgent => &mut self.urgent,
            Rank::Aside => &mut self.aside,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Out> {
        self.slots.iter().flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.workers + self.urgent + self.aside == 0
    }

    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    pub(super) fn urgent(&self) -> usize {
        self.urgent
    }

    pub(super) fn aside(&self) -> usize {
        self.aside
    }

    pub(super) fn buffered_bytes(&self) -> u64 {
        self.buffered_bytes
    }

    pub(super) fn moving_bytes(&self) -> u64 {
        self.moving_bytes
    }

    pub(super) fn looked_at_bytes(&self) -> u64 {
        self.looked_at_bytes
    }

    /// The sums are right.
    pub(super) fn check_invariants(&self) {
        let count = |rank| self.iter().filter(|out| out.rank == rank).count();
        assert_eq!(count(Rank::Worker), self.workers);
        assert_eq!(count(Rank::Urgent), self.urgent);
        assert_eq!(count(Rank::Aside), self.aside);
        let sum = |of: fn(Out) -> u64| self.iter().map(|&out| of(out)).sum::<u64>();
        assert_eq!(sum(buffered_bytes), self.buffered_bytes);
        assert_eq!(sum(moving_bytes), self.moving_bytes);
        assert_eq!(sum(looked_at_bytes), self.looked_at_bytes);
        assert_eq!(self.free.len() + self.iter().count(), self.slots.len());
    }
}

fn buffered_bytes(out: Out) -> u64 {
    match out.rank {
        Rank::Worker | Rank::Aside => out.kind.buffered_bytes(),
        // What guests wait for has buffers of its own.
        Rank::Urgent => 0,
    }
}

fn moving_bytes(out: Out) -> u64 {
    match out.rank {
        Rank::Worker | Rank::Aside => out.kind.moving_bytes(),
        Rank::Urgent => 0,
    }
}

fn looked_at_bytes(out: Out) -> u64 {
    match out.kind {
        OpKind::Status(range) => range.len(),
        _ => 0,
    }
}
