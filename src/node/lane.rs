//! Where writes are counted: on the node's own lane, or on that of a guest queue.

use std::fmt;
use std::marker::PhantomData;

use super::gate::{Entry, GateRule, LaneCounter};
use super::{Begin, Inner};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;
use crate::units::ByteRange;

/// Where the writes of one queue are counted. It has no methods of its own.
pub struct Lane {
    pub(super) counter: LaneCounter,
    pub(super) node: Arc<Inner>,
}

/// The way into a [`Node`](crate::Node) of one guest queue, which has its own cache lines to count its writes on.
///
/// Two queues do not slow each other down. A queue may move between threads but is used by one at a
/// time; its tickets may finish, and its writes that wait may begin, on any thread.
pub struct GuestQueue {
    lane: Arc<Lane>,
    _used_by_one_thread: PhantomData<std::cell::Cell<()>>,
}

impl Lane {
    pub(super) fn of(node: Arc<Inner>, shared: bool) -> Arc<Self> {
        Arc::new(Self {
            counter: node.gate.add_lane(shared),
            node,
        })
    }

    /// Counts out a write that was not issued.
    pub(super) fn give_back(&self, range: ByteRange, entry: Entry) {
        if entry.is_active() {
            self.node.gate.actives.end(range);
        }
        self.node.gate.leave(&self.counter);
    }

    /// Records a write and counts it out.
    #[inline]
    pub(super) fn settle(&self, range: ByteRange, entry: Entry) {
        let leaves_early = !self.node.gate.rules.keeps(GateRule::RecordThenLeave);
        if leaves_early {
            self.node.gate.leave(&self.counter);
        }
        if let Some(log) = entry.log().filter(|_| !is_broken(Sabotage::RecordAtBegin)) {
            self.node.record(log, range);
        }
        if entry.is_active() {
            self.node.gate.actives.end(range);
        }
        if !leaves_early {
            self.node.gate.leave(&self.counter);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.node.gate.remove_lane(&self.counter);
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").finish_non_exhaustive()
    }
}

impl GuestQueue {
    pub(super) fn new(lane: Arc<Lane>) -> Self {
        Self {
            lane,
            _used_by_one_thread: PhantomData,
        }
    }

    /// As [`Node::begin_write`](crate::Node::begin_write).
    #[inline]
    pub fn begin_write(&self, range: ByteRange) -> Begin<&Lane> {
        Begin::new(&self.lane, range)
    }

    /// As [`Node::begin_write_owned`](crate::Node::begin_write_owned).
    pub fn begin_write_owned(&self, range: ByteRange) -> Begin<Arc<Lane>> {
        Begin::new(Arc::clone(&self.lane), range)
    }
}

impl fmt::Debug for GuestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestQueue").finish_non_exhaustive()
    }
}
