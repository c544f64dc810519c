//! Write-blocking mode: which guest writes are active ones, and what becomes of those that wait.

use std::task::Waker;
use std::time::Duration;

use crate::copy::OpKind;
use crate::job::ErrorAction;
use crate::machine::Step;
use crate::mirror::adaptive::{Adaptive, News, Sample, Watch, Watching};
use crate::mirror::{CopyMode, End, Mirror, MirrorInfo, Phase};
use crate::node::ActiveWrites;
use crate::sabotage::{Sabotage, is_broken};

/// What is looked at again is looked at no sooner than this.
const TICK: Duration = Duration::from_micros(1);

/// The active writes of a job.
#[derive(Debug, Default)]
pub(super) struct Active {
    /// Made when they are first wanted. It stays until the end of recording.
    pub(super) writes: Option<ActiveWrites>,
    /// Whether writes that are let in now are active ones.
    is_on: bool,
    /// Whether source and target differ only where active writes are under way.
    is_synced: bool,
    /// Bytes that active writes have brought to the target, and how many writes were there.
    written: u64,
    count: u64,
    /// How many were at the target when the job ended.
    pub(super) left_at_target: u64,
    watch: Watch,
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
        self.watch(now, mode);
        let may_be = match self.phase {
            // A write after the source was asked and before the zeroes are written would be lost.
            Phase::Scanning { .. } => is_broken(Sabotage::ActiveWhileScanning),
            // While the guest is held there are none to begin, and after the switch they are written to the target
            // in any case.
            Phase::Copying { .. } | Phase::InSync(End::Open | End::Flushing | End::Flushed) => true,
            _ => false,
        };
        let background_max = match self.active.watch.narrow() {
            0 => u64::MAX,
            _ if mode == CopyMode::Background => u64::MAX,
            times => self.engine.in_flight_max() >> times.min(63),
        };
        self.engine.limit_background(background_max);
        let is_wanted = match mode {
            CopyMode::Background => false,
            CopyMode::WriteBlocking => true,
            CopyMode::Adaptive(_) => self.active.watch.is_active(),
        };
        if !(may_be && is_wanted && !self.engine.has_lost()) {
            return self.stop_active_writes();
        }
        if let (true, Some(writes)) = (self.active.is_on, &self.active.writes) {
            return writes.look_for_others();
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
        self.active.written = self.active.written.saturating_add(told.copied_bytes);
        self.active.count = self.active.count.saturating_add(told.count);
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

    /// Looks whether the job gains on the guest.
    fn watch(&mut self, now: Duration, mode: CopyMode) {
        if !matches!(self.phase, Phase::Copying { .. } | Phase::InSync(_)) {
            return;
        }
        let watching = match mode {
            CopyMode::Background if !self.active.watch.is_due(now) => return,
            CopyMode::Background => Watching::Only,
            CopyMode::WriteBlocking => Watching::Blocking,
            CopyMode::Adaptive(adaptive) => Watching::Adaptive(adaptive),
        };
        let writes = self.active.writes.as_ref();
        let sample = Sample {
            copied: self.done_bytes - self.active.written - self.verify.compared(),
            left: self.left_to_copy(),
            written: self.active.written,
            writes: self.active.count,
            waiting: writes.map_or(0, ActiveWrites::waits),
            in_flight_max: self.engine.in_flight_max(),
            is_narrow: self.engine.is_narrow(),
        };
        if let News::Outpaced(convergence) = self.active.watch.sample(now, sample, watching) {
            self.job.outpaced(convergence);
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
    /// writes that wait for it. Says what to wait for.
    pub(super) fn give_way(&mut self, now: Duration, mode: CopyMode, step: Step) -> Step {
        let Step::Wait { until } = step else {
            return step;
        };
        let adaptive = adaptive_of(mode);
        let waits_until = self.serve_waiting(
            now,
            adaptive.map(|adaptive| self.active.watch.wait_max(adaptive)),
        );
        if self.bitmap.is_some() {
            let is_in_step = self.is_in_step();
            let active = &mut self.active;
            active.is_synced &= is_in_step;
            if active.is_on && is_in_step && !active.is_synced {
                active.is_synced = active.writes.as_ref().is_some_and(ActiveWrites::are_all);
            }
        }
        self.job.tell_of_mirror(MirrorInfo {
            copy_mode: mode,
            is_write_blocking: self.active.is_on,
            is_actively_synced: self.active.is_synced,
            convergence: self.active.watch.seen(),
        });
        // While nothing is left there is nothing to decide: a guest write wakes us.
        let has_work = matches!(self.phase, Phase::Copying { .. } | Phase::InSync(_));
        let watched = adaptive.filter(|_| has_work && self.left_to_copy() > 0);
        let window_end = watched.and_then(|adaptive| self.active.watch.window_end(adaptive));
        let window_end = window_end.map(|end| end.max(now.saturating_add(TICK)));
        let times = [until, waits_until, window_end];
        Step::Wait {
            until: times.into_iter().flatten().min(),
        }
    }

    /// Gives way to writes that wait for what does not get on. Those that have waited for `most` go on as usual ones.
    /// Says when the next has.
    fn serve_waiting(&mut self, now: Duration, most: Option<Duration>) -> Option<Duration> {
        let (Some(writes), Some(bitmap)) = (&self.active.writes, &self.bitmap) else {
            return None;
        };
        writes.drop_wish();
        let known_at = most.and_then(|most| now.checked_sub(most));
        let mut due: Option<Duration> = None;
        for (range, since) in writes.waiting(now, known_at) {
            let its = most.and_then(|most| since.checked_add(most));
            due = due.into_iter().chain(its).min();
            if self.engine.has_idle_claim(range) {
                writes.promise(range);
                self.engine.give_way(bitmap.lock().bitmap_mut(), range);
            }
        }
        due.map(|due| due.max(now.saturating_add(TICK)))
    }

    /// Has guests look again that may go on. No lock may be held.
    pub(super) fn wake_guests(&self) {
        if let Some(writes) = &self.active.writes {
            writes.wake();
        }
    }
}

fn adaptive_of(mode: CopyMode) -> Option<Adaptive> {
    match mode {
        CopyMode::Adaptive(adaptive) => Some(adaptive),
        CopyMode::Background | CopyMode::WriteBlocking => None,
    }
}
