//! Guest writes that wait until what they overwrite is saved.
//!
//! ```text
//! comes ──▶ waits ──▶ its clusters are saved, ahead of everything else ──▶ goes on
//!             │
//!             ├─ copying them fails ──┐   break-guest-write: it fails, and the backup goes on
//!             └─ its time is over ────┤
//!                                     └   break-snapshot: it goes on, and the backup fails
//! ```
//!
//! Of a longer copy that is planned for the background already, only the clusters are saved that the guest touches:
//! the rest would have it wait for longer, and be charged to the speed limit at once. That rest stays planned.
//!
//! A copy that was begun in the background and fails says nothing to a guest that came later: what that waits
//! for is tried for itself. Nor does one that was begun for a guest break anything when that does not wait any
//! more: it is as if it had been begun in the background.

use std::task::Waker;
use std::time::Duration;

use crate::backup::{Armed, Backup, BackupSync, OnBufferFull, OnCbwError, Phase};
use crate::copy::{Buffer, Op, OpKind, Side, Urgent};
use crate::job::{JobError, is_no_space};
use crate::node::{NotSaved, WaitingWrite, WriteHold};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// A guest write that the machine knows of.
pub(super) struct Waiting {
    write: WaitingWrite,
    /// Where the first cluster starts that it may still wait for: so that one that writes to a large area is not
    /// looked through from its start each time.
    from: u64,
    /// When it has waited long enough.
    deadline: Option<Duration>,
}

impl Backup {
    /// The next operation that a guest waits for.
    pub(super) fn serve_guests(&mut self, now: Duration, waker: &Waker) -> Option<Op> {
        let armed = self.armed.as_mut()?;
        let hold = armed.hold.as_ref()?;
        for write in hold.news(waker) {
            let timeout = self.options.cbw_timeout;
            let deadline = timeout.and_then(|timeout| now.checked_add(timeout));
            let from = write.range.start();
            self.waiting.push(Waiting {
                write,
                from,
                deadline,
            });
            self.look_again = true;
        }
        let buffer = self.engine.buffer_mut();
        self.look_again |= buffer.is_some_and(|buffer| buffer.try_again(now));
        if self.waiting.is_empty() || !self.look_again {
            return None;
        }
        let granularity = armed.dirty.granularity();
        self.waiting.retain_mut(|waiting| {
            let end = waiting.write.range.end();
            while waiting.from < end {
                let next = granularity
                    .align_down(waiting.from)
                    .saturating_add(granularity.bytes());
                if hold.holds((waiting.from..next.min(end)).into()) {
                    return hold.is_waiting(waiting.write.id);
                }
                waiting.from = next;
            }
            false
        });
        let len = armed.dirty.len();
        let mut full = None;
        for waiting in &self.waiting {
            let start = granularity.align_down(waiting.from);
            let end = granularity.align_up(waiting.write.range.end()).min(len);
            let range = (start..end).into();
            let has_buffer = self.engine.buffer().is_some();
            let op = match self.engine.next_of_buffer(&armed.dirty, range) {
                Urgent::Op(op) => Some(op),
                Urgent::Wait => None,
                Urgent::NoRoom(why)
                    if has_buffer && self.options.on_full == OnBufferFull::Break =>
                {
                    if self.options.on_cbw_error == OnCbwError::BreakGuestWrite {
                        hold.refuse(waiting.write.id, why);
                        continue;
                    }
                    full = Some((waiting.write, why));
                    break;
                }
                Urgent::NoRoom(_) => self.engine.next_urgent(&mut armed.dirty, range),
            };
            if let Some(op) = op {
                if let (true, Some(hold)) = (is_broken(Sabotage::ReleaseInFlight), &armed.hold) {
                    hold.release((start..end).into());
                }
                self.rate.account(self.engine.cost(op.kind()));
                if op.kind().writes_target() {
                    self.pace
                        .begin(op.id(), now, self.engine.background_bytes());
                }
                return Some(op);
            }
        }
        if let Some((write, why)) = full {
            self.give_up(now, write, why);
            return None;
        }
        self.look_again = false;
        None
    }

    /// When the first of those that wait has waited long enough, or the buffer is tried again for them.
    pub(super) fn next_for_guests(&self) -> Option<Duration> {
        let buffer = self.engine.buffer().filter(|_| !self.waiting.is_empty());
        let deadlines = self.waiting.iter().filter_map(|waiting| waiting.deadline);
        deadlines.chain(buffer.and_then(Buffer::next_try)).min()
    }

    /// The buffer has failed to take something: it is left alone for a while.
    pub(super) fn buffer_failed(&mut self, now: Duration, kind: OpKind, error: std::io::Error) {
        let why = match is_no_space(&error) {
            true => NotSaved::Full,
            false => NotSaved::Failed,
        };
        let until = self.buffer_backoff.until(now);
        if let Some(buffer) = self.engine.buffer_mut() {
            buffer.leave_alone(why, until);
        }
        // What the guest waits for goes to the target then, or breaks.
        self.job.guest_copy_failed(Side::Buffer, kind, error, false);
    }

    /// Deals with guest writes that have waited long enough; whether there were any.
    pub(super) fn is_too_late(&mut self, now: Duration) -> bool {
        let is_late = |waiting: &Waiting| waiting.deadline.is_some_and(|at| now >= at);
        if !self.waiting.iter().any(is_late) {
            return false;
        }
        let (late, rest) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(is_late);
        self.waiting = rest;
        let late: Vec<Waiting> = late;
        for Waiting { write, .. } in late {
            let hold = self.hold().expect("somebody waits for it");
            if !(hold.is_waiting(write.id) && hold.holds(write.range)) {
                continue;
            }
            if self.give_up(now, write, NotSaved::TimedOut) {
                break;
            }
        }
        true
    }

    /// What a guest write waits for is not saved in time: one of the two breaks. Whether it is the backup.
    fn give_up(&mut self, now: Duration, write: WaitingWrite, why: NotSaved) -> bool {
        match self.options.on_cbw_error {
            OnCbwError::BreakGuestWrite => {
                if let Some(hold) = self.hold() {
                    hold.refuse(write.id, why);
                }
                false
            }
            OnCbwError::BreakSnapshot => {
                let range = write.range;
                if self.is_only_read(range) {
                    if let (Some(view), Some(hold)) = (&self.view, self.hold()) {
                        view.end().into_iter().for_each(|kept| hold.release(kept));
                    }
                    return false;
                }
                self.job.fail(JobError::NotSaved { range, why });
                self.begin_ending(now, None);
                true
            }
        }
    }

    /// Whether `range` is on the target, so that guests wait only for readers, for whom the job was not made.
    fn is_only_read(&self, range: ByteRange) -> bool {
        let is_done = |armed: &Armed| {
            let clusters = self.clusters_of(range);
            self.engine.is_done(&armed.dirty, clusters)
        };
        self.view.is_some()
            && self.options.sync != BackupSync::None
            && self.armed.as_ref().is_some_and(is_done)
    }

    /// Whether a guest waits for what that works on.
    pub(super) fn is_waited_for(&self, kind: OpKind) -> bool {
        let (Some(range), Some(hold)) = (kind.range(), self.hold()) else {
            return false;
        };
        let clusters = self.whole_clusters_of(range);
        let mut writes = self.waiting.iter().map(|waiting| waiting.write);
        writes.any(|write| write.range.overlaps(clusters) && hold.is_waiting(write.id))
    }

    fn hold(&self) -> Option<&WriteHold> {
        self.armed.as_ref()?.hold.as_deref()
    }

    /// The next operation that gives space back: on the source what was copied, on the target what readers do
    /// not need.
    pub(super) fn give_back(&mut self) -> Option<Op> {
        if !self.engine.has_room_aside() {
            return None;
        }
        if let Some(range) = self.is_read.pop() {
            return Some(self.engine.hand_out_aside(OpKind::DiscardSource(range)));
        }
        let (view, armed) = (self.view.as_ref()?, self.armed.as_mut()?);
        self.given_up.append(&mut view.take_given_up());
        for range in std::mem::take(&mut self.given_up) {
            if !self.engine.forget(&mut armed.dirty, range) {
                self.given_up.push(range);
                continue;
            }
            view.saved(range);
            if let Some((align, _)) = self.engine.discard_limits() {
                let whole = self.engine.shape().whole_blocks(range, align);
                self.unneeded.extend((!whole.is_empty()).then_some(whole));
            }
        }
        let (align, max) = self.engine.discard_limits()?;
        let range = self.unneeded.pop()?;
        let max = (max & !(align - 1)).max(align);
        let (piece, rest) = range.split_at(range.start().saturating_add(max));
        if !rest.is_empty() {
            self.unneeded.push(rest);
        }
        Some(self.engine.hand_out_aside(OpKind::GiveUp(piece)))
    }

    /// Copying what a guest waits for has failed; it is dirty again, and not claimed.
    pub(super) fn guest_copy_failed(
        &mut self,
        now: Duration,
        side: Side,
        kind: OpKind,
        error: std::io::Error,
    ) {
        let range = kind.range().expect("a copy has a range");
        let clusters = self.whole_clusters_of(range);
        let is_fatal = self.options.on_cbw_error == OnCbwError::BreakSnapshot;
        let hold = self.armed.as_ref().and_then(|armed| armed.hold.as_ref());
        let hold = hold.expect("it was copied for a guest");
        if is_broken(Sabotage::ReleaseFailed) {
            return hold.release(range);
        }
        if !is_fatal {
            for Waiting { write, .. } in &self.waiting {
                // Also who waits for another part of the cluster: none of it is saved.
                if write.range.overlaps(clusters) {
                    hold.refuse(write.id, NotSaved::Failed);
                }
            }
        }
        self.job.guest_copy_failed(side, kind, error, is_fatal);
        if is_fatal && !matches!(self.phase, Phase::Ending { .. }) {
            self.begin_ending(now, None);
        }
    }

    /// `range` is on the target. Was it still on its way when guests were let go, then it may hold what they
    /// have written since, and counts as missing. A bitmap that does not record would not know of it.
    pub(super) fn forget_late(&mut self, range: ByteRange) {
        if let (Phase::Ending { .. }, Some(armed)) = (&self.phase, &mut self.armed) {
            armed.dirty.set(range).expect("within the disk");
        }
    }

    /// `range` is on the target, or was found not to be wanted: guests may overwrite its clusters, if nothing
    /// else of them is left.
    pub(super) fn saved(&mut self, range: ByteRange) {
        let Some(armed) = &self.armed else {
            return;
        };
        let Some(hold) = &armed.hold else {
            return;
        };
        let release = |range| match &self.view {
            Some(view) if view.saved(range) => {}
            _ => hold.release(range),
        };
        let granularity = armed.dirty.granularity();
        let mut rest = self.clusters_of(range);
        if rest == range {
            // The usual: whole clusters, which were claimed as one.
            return release(range);
        }
        while !rest.is_empty() {
            let (cluster, behind) = rest.split_at(rest.start() + granularity.bytes());
            if self.engine.is_done(&armed.dirty, cluster) {
                release(cluster);
            }
            rest = behind;
        }
    }
    /// As [`clusters_of`](Self::clusters_of), with what there is of the last cluster past the end of the disk: who
    /// writes there waits for it, too.
    fn whole_clusters_of(&self, range: ByteRange) -> ByteRange {
        let granularity = self.engine.shape().granularity;
        let end = granularity.align_up(range.end());
        (granularity.align_down(range.start())..end).into()
    }

    /// All clusters that `range` touches.
    fn clusters_of(&self, range: ByteRange) -> ByteRange {
        let shape = self.engine.shape();
        shape.widen(range, shape.granularity.bytes())
    }
}
