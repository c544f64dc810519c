//! From the end of a write to the bitmaps: the logs that writes are recorded in, and draining them.

use std::sync::OnceLock;

use super::{Bitmaps, Inner};
use crate::log::{DirtyLog, DirtyLogError};
use crate::units::{ByteRange, Granularity};

/// The finest granularity that a node records in: 512 bytes.
pub(super) const LOG_EXPONENT_MIN: u8 = 9;
/// The coarsest granularity that a node records in: 2 GiB.
pub(super) const LOG_EXPONENT_MAX: u8 = 31;
pub(super) const LOGS: usize = (LOG_EXPONENT_MAX - LOG_EXPONENT_MIN) as usize + 1;

impl Inner {
    pub(super) fn log_or_new(
        &self,
        bitmaps: &mut Bitmaps,
        log: usize,
        granularity: Granularity,
    ) -> Result<(), DirtyLogError> {
        if self.logs[log].get().is_none() {
            let made = DirtyLog::new(self.len, granularity)?;
            // Under the lock of the bitmaps, so nobody was faster.
            assert!(self.logs[log].set(made).is_ok(), "one log per granularity");
            bitmaps.logs.push(log);
        }
        Ok(())
    }

    /// Records a write that has settled. Not inlined: callers have the short way of a node without a
    /// job in their own code, and no more.
    #[inline(never)]
    pub(super) fn record(&self, log: u8, range: ByteRange) {
        if let Some(log) = self.logs[usize::from(log)].get() {
            log.mark(range);
        }
    }

    /// Moves what was recorded into the bitmaps. With none left it is thrown away.
    pub(super) fn drain_into(&self, bitmaps: &mut Bitmaps) {
        // A write that began before the last change of logs may still be inside only if recording
        // stopped since: then nobody is owed its mark. So the current log is all there is.
        for log in bitmaps.logs.iter().filter_map(|&log| self.logs[log].get()) {
            if log.is_clean() {
                continue;
            }
            log.drain_ranges(|range| {
                for bitmap in bitmaps.by_id.values_mut() {
                    bitmap
                        .set(range)
                        .expect("the log has the length of the node, and so have its bitmaps");
                }
            });
        }
    }

    pub(super) fn has_recorded(&self) -> bool {
        self.logs
            .iter()
            .filter_map(OnceLock::get)
            .any(|log| !log.is_clean())
    }
}
