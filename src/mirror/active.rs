//! Write-blocking mode: which guest writes are active ones, and what becomes of those that wait.

use std::task::Waker;
use std::time::Duration;

use crate::copy::OpKind;
use crate::job::ErrorAction;
use crate::machine::Step;
use crate::mirror::{CopyMode, Mirror, Phase};
use crate::node::ActiveWrites;
use crate::sabotage::{Sabotage, is_broken};

/// The active writes of a job.
#[derive(Debug, Default)]
pub(super) struct Active {
    /// Made when they are first wanted. It stays until the end of recording.
    pub(super) writes: Option<ActiveWrites>,
    /// Whether writes that are let in now are active ones.
    is_on: bool,
    /// Whether source and target differ only where active writes are under way.
    is_synced: bool,
}

impl Mirror {
    /// Whether the target has all that the guest was told to be written: only what it is writing just now may
    /// differ. So it is in [write-blocking](CopyMode::WriteBlocking) mode once nothing is left to copy, until
    /// something goes wrong.
    #[must_use]
    pub fn is_actively_synced(&self) -> bool {
        self.active.is_synced && self.bitmap.is_some() && self.is_in_step()
    }

    /// Hears what has become of active writes, and decides whether there are to be more.
    pub(super) fn steer_active_writes(&mut self, now: Duration, mode: CopyMode, waker: &Waker) {
        self.hear_of_active_writes(now, waker);
        let may_be = match self.phase {
            // A write after the source was asked and before the zeroes are written would be lost.
            Phase::Scanning { .. } => is_broken(Sabotage::ActiveWhileScanning),
            Phase::Copying { .. } | Phase::InSync(_) => true,
            _ => false,
        };
        let is_wanted = mode == CopyMode::WriteBlocking;
        if !(may_be && is_wanted && !self.engine.has_lost()) {
            return self.stop_active_writes();
        }
        if self.active.is_on {
            return;
        }
        if self.active.writes.is_none() {
            let bitmap = self.bitmap.as_ref().expect("recording has started");
            let align = self.engine.shape().write_align();
            let writes = ActiveWrites::new(&self.node, bitmap, align);
            self.engine.show_claims(writes.claims());
            self.active.writes = Some(writes);
        }
        if let Some(writes) = &self.active.writes {
            writes.begin();
            self.active.is_on = true;
        }
    }

    fn hear_of_active_writes(&mut self, now: Duration, waker: &Waker) {
        let Some(writes) = &self.active.writes else {
            return;
        };
        let told = writes.told(waker);
        self.done_bytes = self.done_bytes.saturating_add(told.copied_bytes);
        if told.has_written {
            self.engine.note_unflushed();
        }
        for (range, error) in told.errors {
            self.active.is_synced = false;
            // As if it had been copied: that is what is done next.
            let side = crate::copy::Side::Target;
            let action = self.job.device_failed(side, OpKind::Copy(range), error);
            let is_ending = matches!(self.phase, Phase::Ending { .. });
            if action == ErrorAction::Report && !is_ending {
                self.begin_ending(now, None);
            }
        }
    }

    /// Guest writes are usual ones from now on, also those that wait for a range.
    pub(super) fn stop_active_writes(&mut self) {
        self.active.is_synced = false;
        if !std::mem::take(&mut self.active.is_on) {
            return;
        }
        if let Some(writes) = &self.active.writes {
            writes.stop();
        }
    }

    /// To be called when nothing more can be handed out: what is claimed and does not get on is left to the
    /// writes that wait for it.
    pub(super) fn give_way(&mut self, now: Duration, step: Step) -> Step {
        if !matches!(step, Step::Wait { .. }) {
            return step;
        }
        let (Some(writes), Some(bitmap)) = (&self.active.writes, &self.bitmap) else {
            return step;
        };
        writes.drop_wish();
        for (range, _) in writes.waiting(now, None) {
            if self.engine.has_idle_claim(range) {
                writes.promise(range);
                self.engine.give_way(bitmap.lock().bitmap_mut(), range);
            }
        }
        let is_in_step = self.is_in_step();
        let active = &mut self.active;
        active.is_synced &= is_in_step;
        if active.is_on && is_in_step && !active.is_synced {
            active.is_synced = active.writes.as_ref().is_some_and(ActiveWrites::are_all);
        }
        self.job.set_actively_synced(self.active.is_synced);
        step
    }

    /// Has guests look again that may go on. No lock may be held.
    pub(super) fn wake_guests(&self) {
        if let Some(writes) = &self.active.writes {
            writes.wake();
        }
    }
}
