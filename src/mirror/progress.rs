//! How far a mirror is: computed from what is dirty and claimed, never stored.

use crate::job::Progress;
use crate::mirror::{Mirror, Phase};
use crate::sabotage::{Sabotage, is_broken};

impl Mirror {
    /// Whether nothing is dirty and nothing in flight.
    pub(super) fn is_in_step(&self) -> bool {
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before copying");
        let may_lack = self.engine.may_lack_doubtful() && !is_broken(Sabotage::ReadyInDoubt);
        bitmap.lock().is_clean()
            && !may_lack
            && (self.engine.has_no_claims() || is_broken(Sabotage::TrustCleanBitmap))
    }

    /// Bytes that are dirty or in flight.
    pub(super) fn left(&self) -> u64 {
        self.dirty_bytes()
            .saturating_add(self.engine.claimed_bytes())
    }

    /// The same without what is only being compared.
    pub(super) fn left_to_copy(&self) -> u64 {
        self.left() - self.engine.comparing_bytes()
    }

    pub(super) fn dirty_bytes(&self) -> u64 {
        let bitmap = self.bitmap.as_ref();
        bitmap.map_or(0, |bitmap| bitmap.lock().dirty_bytes_in_len())
    }

    pub(super) fn publish(&self) {
        self.publish_with(self.dirty_bytes());
    }

    /// Tells how far the job is, for those who ask its handle.
    pub(super) fn publish_with(&self, dirty_bytes: u64) {
        let claimed_bytes = match self.phase {
            Phase::Concluded => return,
            // The zeroes of the scan are no progress.
            Phase::Scanning { .. } => 0,
            _ => self.engine.claimed_bytes(),
        };
        self.tell_verification();
        let left = dirty_bytes.saturating_add(claimed_bytes);
        let left = left.saturating_add(self.engine.doubtful_bytes());
        let progress = Progress {
            current: self.done_bytes,
            total: self.done_bytes.saturating_add(left),
        };
        self.job.publish(progress, !self.engine.is_idle());
    }

    /// Whether everything that must always hold does. For tests.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        self.engine.check_invariants();
        if let Some(bitmap) = &self.bitmap {
            bitmap.lock().check_invariants();
        }
    }
}
