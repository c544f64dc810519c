//! From the end of a write to the bitmaps: the logs that writes are recorded in, and draining them.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use super::Inner;
use super::bitmaps::List;
use super::growing::GrowingLog;
use crate::log::DirtyLogError;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::MutexGuard;
use crate::units::{ByteRange, Granularity};

/// The finest granularity that a node records in: 512 bytes.
pub(super) const LOG_EXPONENT_MIN: u8 = 9;
/// The coarsest granularity that a node records in: 2 GiB.
pub(super) const LOG_EXPONENT_MAX: u8 = 31;
pub(super) const LOGS: usize = (LOG_EXPONENT_MAX - LOG_EXPONENT_MIN) as usize + 1;

impl Inner {
    /// Bytes of the disk. They change under the lock of the bitmaps, while the node is quiesced.
    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    pub(super) fn set_len(&self, len: u64) {
        self.len.store(len, Ordering::Release);
    }

    /// The bitmaps, with everything in those that record that was written until now.
    pub(super) fn lock_drained(&self) -> MutexGuard<'_, List> {
        let mut list = self.list.lock();
        self.drain_into(&mut list);
        list
    }

    /// Sees to it that writes are recorded finely enough for one more bitmap of that granularity. The
    /// node must be quiesced and drained: what is in a log now was written before. On error nothing has
    /// changed.
    pub(super) fn record_in(
        &self,
        list: &mut List,
        granularity: Granularity,
    ) -> Result<(), DirtyLogError> {
        let known = list.finest().filter(|_| !is_broken(Sabotage::LogAsNewest));
        let finest = known.map_or(granularity, |known| known.min(granularity));
        let log = usize::from(finest.exponent() - LOG_EXPONENT_MIN);
        self.log_or_new(list, log, finest)?;
        self.write_to(list, Some(log));
        Ok(())
    }

    /// Spares guest writes the log if no bitmap records any more.
    pub(super) fn stop_if_unused(&self, list: &mut List) {
        if list.finest().is_none() && !is_broken(Sabotage::RecordOn) {
            self.write_to(list, None);
        }
    }

    /// Has writes recorded in a log that there is, or in none. To go to another the node must be quiesced
    /// and drained.
    pub(super) fn write_to(&self, list: &mut List, recording: Option<usize>) {
        list.recording = recording;
        self.gate.record_in(recording);
    }

    /// Undoes what has changed where writes are recorded: to the log of `before`, unless somebody else has begun to
    /// record meanwhile and that one does not do for him. The node must be quiesced and drained.
    pub(super) fn go_back_to(&self, list: &mut List, before: Option<usize>) {
        let Some(finest) = list.finest() else {
            return self.write_to(list, None);
        };
        let coarsest = usize::from(finest.exponent() - LOG_EXPONENT_MIN);
        let does = |log: &usize| *log <= coarsest && self.covers(*log);
        if is_broken(Sabotage::RollBackLog) {
            return self.write_to(list, before);
        }
        // What is written to now is fine enough for all who record now. What was before is for all who did
        // then: if it does not do for one that came since, the other is finer than both.
        let log = before.filter(does).or(list.recording.filter(does));
        assert!(log.is_some(), "who records has seen to it that it can");
        self.write_to(list, log);
    }

    /// Whether a log is as long as the disk: the length may have changed since it was used.
    fn covers(&self, log: usize) -> bool {
        let log = self.logs[log].get();
        log.is_some_and(|log| log.covers(self.len()))
    }

    fn log_or_new(
        &self,
        list: &mut List,
        log: usize,
        granularity: Granularity,
    ) -> Result<(), DirtyLogError> {
        if let Some(known) = self.logs[log].get() {
            // The disk may have grown since it was used.
            return known.grow_to(self.len());
        }
        let made = Box::new(GrowingLog::new(self.len(), granularity)?);
        // Under the lock of the bitmaps, so nobody was faster.
        assert!(self.logs[log].set(made).is_ok(), "one log per granularity");
        list.logs.push(log);
        Ok(())
    }

    /// Records a write that has settled. Not inlined: callers have the short way of a node without a
    /// job in their own code, and no more.
    #[inline(never)]
    pub(super) fn record(&self, log: u8, range: ByteRange) {
        if let Some(log) = self.logs[usize::from(log)].get() {
            // The log goes on past the end of the disk.
            log.mark(range.intersection((0..self.len()).into()));
        }
    }

    /// Moves what was recorded into the bitmaps that record. With none of them it is thrown away.
    fn drain_into(&self, list: &mut List) {
        if !self.has_recorded_in(list) {
            return;
        }
        list.found = list.found.wrapping_add(1);
        let (logs, mut recorders) = list.logs_and_recorders();
        if is_broken(Sabotage::DrainIntoFirst) {
            recorders.truncate(1);
        }
        // A write that began before the last change of logs may still be inside only if recording
        // stopped since: then nobody is owed its mark. So the current log is all there is.
        for log in logs.iter().filter_map(|&log| self.logs[log].get()) {
            log.drain_into(&mut recorders);
        }
    }

    fn has_recorded_in(&self, list: &List) -> bool {
        let mut logs = list.logs.iter().filter_map(|&log| self.logs[log].get());
        logs.any(|log| !log.is_clean())
    }

    pub(super) fn has_recorded(&self) -> bool {
        self.logs
            .iter()
            .filter_map(OnceLock::get)
            .any(|log| !log.is_clean())
    }

    /// Panics unless guest writes are recorded as the list says. For tests.
    pub(super) fn check_recording(&self, list: &List) {
        assert_eq!(
            self.gate.recorded_in(),
            list.recording,
            "3: the log that writes go to"
        );
    }
}
