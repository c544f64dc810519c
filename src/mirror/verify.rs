//! Comparing the target with the source while the guest writes: all of it once more, or because nobody knows any
//! more what of an older copy is not right.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::bitmap::HBitmap;
use crate::copy::Op;
use crate::job::{Asked, Verification, Verified};
use crate::mirror::{Mirror, Phase};
use crate::node::{JobBitmap, JobBitmapGuard, Quiesce};
use crate::sabotage::{Sabotage, is_broken};

/// The guest is held at most this often to tell what differs from what it is just writing.
const CONFIRM_EVERY: Duration = Duration::from_millis(100);

/// What is compared, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Verify {
    /// Of the one that runs, or of the last one.
    result: Option<Verification>,
    /// What all of them have compared, in bytes.
    compared: u64,
    /// What was told to differ.
    differing: Option<HBitmap>,
    /// The guest's writes under way are to settle.
    confirming: Option<(Quiesce, Duration)>,
    /// When that is due next, unless nothing else is left to do.
    confirm_at: Duration,
    /// Not before then in any case: a guest write hangs.
    not_before: Duration,
}

impl Verify {
    pub(super) fn is_running(&self) -> bool {
        self.result
            .is_some_and(|result| result.state == Verified::Running)
    }

    /// Bytes that were compared, and not copied.
    pub(super) fn compared(&self) -> u64 {
        self.compared
    }

    /// The guest goes on.
    pub(super) fn let_guest_go(&mut self) {
        self.confirming = None;
    }
}

impl Mirror {
    /// The granules that were found to differ by the [verification](crate::Job::verify) that runs, or by the last
    /// one; with [`TargetHolds::OlderCopy`](crate::TargetHolds::OlderCopy) by the comparing at the start. What the
    /// guest has written to meanwhile is not among them. `None` if there was none.
    #[must_use]
    pub fn differing(&self) -> Option<&HBitmap> {
        self.verify.differing.as_ref()
    }

    /// Begins to compare everything. `is_lacking` says that the target may lack any of it.
    pub(super) fn begin_to_compare(&mut self, is_lacking: bool) {
        let shape = self.engine.shape();
        let differing = HBitmap::new(shape.len, shape.granularity);
        self.verify.differing = Some(differing.expect("there are others like it"));
        self.verify.result = Some(Verification {
            state: Verified::Running,
            compared: 0,
            differing: 0,
        });
        self.engine.doubt_all(is_lacking);
        self.tell_verification();
    }

    /// What was asked for is begun.
    pub(super) fn verify_if_asked(&mut self, asked: &Asked) {
        if asked.wants_verify {
            self.job.verify_begun();
            if !self.verify.is_running() {
                self.begin_to_compare(false);
            }
        }
    }

    /// When it is time to look again.
    pub(super) fn confirm_until(&self) -> Option<Duration> {
        match &self.verify.confirming {
            Some((_, since)) => since.checked_add(self.hold_max),
            None if self.verify.is_running() && self.engine.has_suspects() => {
                Some(self.confirm_at())
            }
            None => None,
        }
    }

    fn confirm_at(&self) -> Duration {
        match self.engine.has_only_suspects() {
            true => self.verify.not_before,
            false => self.verify.confirm_at.max(self.verify.not_before),
        }
    }

    /// The next thing to do for the comparing, when nothing dirty is left that could be claimed.
    pub(super) fn next_compare(&mut self, now: Duration) -> Option<Op> {
        if !self.verify.is_running() || now < self.retry_at {
            return None;
        }
        let bitmap = self.bitmap.as_ref()?;
        let op = self.engine.next_compare(&bitmap.lock())?;
        self.rate.account(self.engine.cost(op.kind()));
        Some(op)
    }

    pub(super) fn compared(&mut self, bytes: u64) {
        self.backoff.reset();
        self.done_bytes = self.done_bytes.saturating_add(bytes);
        self.verify.compared = self.verify.compared.saturating_add(bytes);
        if let Some(result) = &mut self.verify.result {
            result.compared = result.compared.saturating_add(bytes);
        }
    }

    /// Tells what differs, once it is certain that no guest write is the reason; and the end, once nothing is
    /// left.
    pub(super) fn confirm(&mut self, now: Duration, waker: &Waker) {
        if !self.verify.is_running() {
            return;
        }
        if self.engine.has_suspects() {
            if self.verify.confirming.is_none() && now >= self.confirm_at() {
                self.verify.confirming = Some((self.node.quiesce(), now));
            }
        } else {
            self.verify.confirming = None;
        }
        if let Some((quiesce, since)) = &mut self.verify.confirming {
            match Pin::new(quiesce).poll(&mut Context::from_waker(waker)) {
                Poll::Ready(guard) => {
                    self.tell_differing();
                    drop(guard);
                    self.verify.confirming = None;
                    self.verify.confirm_at = now.saturating_add(CONFIRM_EVERY);
                    // What could not be told yet waits for something else to end.
                    self.verify.not_before = now.saturating_add(Duration::from_millis(1));
                }
                Poll::Pending if now >= since.saturating_add(self.hold_max) => {
                    // A guest write hangs. Others go on.
                    self.verify.confirming = None;
                    self.verify.not_before = now.saturating_add(self.hold_max);
                }
                Poll::Pending if is_broken(Sabotage::TellRaces) => self.tell_differing(),
                Poll::Pending => {}
            }
        }
        if !self.engine.has_doubts() {
            self.end_verification(Verified::Whole);
        }
    }

    /// The guest is held, with none of its writes under way.
    fn tell_differing(&mut self) {
        let bitmap = self.bitmap.as_ref().expect("recording has started");
        let differing = self.engine.confirm(bitmap.lock().bitmap_mut());
        for range in differing {
            if let Some(map) = &mut self.verify.differing {
                map.set(range).expect("within the disk");
            }
            if let Some(result) = &mut self.verify.result {
                result.differing = result.differing.saturating_add(range.len());
            }
            self.job.tell_differs(range);
        }
    }

    /// The job comes to its end. What was not compared stays so.
    pub(super) fn cut_verification(&mut self) {
        if !self.verify.is_running() {
            return;
        }
        let mut dirty = self.bitmap.as_ref().map(JobBitmap::lock);
        if let Some(dirty) = dirty.as_mut().map(JobBitmapGuard::bitmap_mut) {
            self.engine.stop_comparing(dirty);
        }
        drop(dirty);
        self.verify.let_guest_go();
        self.end_verification(Verified::Cut);
    }

    /// The job will not succeed, or is over: nobody is told any more.
    pub(super) fn forget_verification(&mut self) {
        if !self.verify.is_running() {
            return;
        }
        self.verify.let_guest_go();
        if let Some(result) = &mut self.verify.result {
            result.state = Verified::Cut;
        }
        self.tell_verification();
    }

    fn end_verification(&mut self, state: Verified) {
        if state == Verified::Whole {
            self.engine.end_doubts();
        }
        if let Some(result) = &mut self.verify.result {
            result.state = state;
            let result = *result;
            self.job.tell_verified(result);
        }
    }

    /// For those who ask the job's handle.
    pub(super) fn tell_verification(&self) {
        if let Some(result) = self.verify.result {
            self.job.set_verification(result);
        }
    }

    /// Whether the target may lack something because it was not compared yet.
    pub(super) fn is_in_doubt(&self) -> bool {
        let is_starting = matches!(self.phase, Phase::Copying { .. });
        is_starting && self.verify.is_running() && !is_broken(Sabotage::ReadyInDoubt)
    }
}
