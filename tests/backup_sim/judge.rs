//! Whether the promises are kept.

use super::*;

impl Sim {
    /// Nobody waits for a job longer than his deadline, while it is driven.
    pub(crate) fn check_waits(&mut self) {
        let now = self.world.borrow().now;
        let is_open = self.open.is_some();
        for (index, member) in self.members.iter_mut().enumerate() {
            let is_due = !is_open && member.is_driven && member.instant.is_some();
            let status = member.job.query().status;
            let timeout = member.plan.options.cbw_timeout;
            let timeout = timeout.map(|timeout| timeout.as_micros() as u64);
            let waiting = self.guests[index].waiting();
            for (since, waiting) in member.waits.iter_mut().zip(waiting) {
                check_wait(since, is_due && waiting.is_some(), now, timeout);
                self.report.held |= is_due && waiting.is_some();
                self.report.held_while_paused |= since.is_some() && status == Status::Paused;
            }
            let is_over = status >= Status::Concluded;
            let is_held = member.waits.iter().any(Option::is_some);
            assert!(
                !(is_over && is_held),
                "a guest waits for a job that is over"
            );
        }
        for (chain, since) in self.chains.iter().zip(&mut self.chain_waits) {
            let member = chain.waits_for().map(|(member, _)| &self.members[member]);
            let is_due = !is_open
                && member.is_some_and(|member| member.is_driven && member.instant.is_some());
            let timeout = member.and_then(|member| member.plan.options.cbw_timeout);
            check_wait(
                since,
                is_due,
                now,
                timeout.map(|timeout| timeout.as_micros() as u64),
            );
        }
    }

    pub(crate) fn check_models(&mut self) {
        for index in 0..self.members.len() {
            self.check_stillness(index);
            self.check_left(index);
        }
    }

    /// A job that stands still has nothing in flight but what guests wait for, or waited for.
    pub(crate) fn check_stillness(&mut self, index: usize) {
        let member = &self.members[index];
        let last = member
            .events
            .iter()
            .rfind(|event| matches!(event, Event::Status(_)));
        if !matches!(last, Some(Event::Status(Status::Paused))) {
            return;
        }
        self.report.paused = true;
        if member.plan.threads > 0 || !self.chains.is_empty() {
            return;
        }
        let world = self.world.borrow();
        for side in [SOURCE, TARGET] {
            for request in world.disks[disk_of(index, side)].requests.values() {
                let is_jobs = !matches!(request.owner, Owner::Guest(_));
                assert!(
                    !is_jobs || request.is_answered || !request.ask.writes(),
                    "{request:?} is in flight while the job stands still"
                );
            }
        }
    }

    /// Whether what was done beside the starts is done or undone with them.
    pub(crate) fn check_made(&self, is_there: bool) {
        let made = self.nodes[0].bitmaps().query(MADE);
        assert_eq!(made.is_ok(), is_there, "a transaction did one half");
    }

    /// What the machine takes for missing is what the model does.
    pub(crate) fn check_left(&self, index: usize) {
        let member = &self.members[index];
        let Some(instant) = &member.instant else {
            return;
        };
        if matches!(self.open, Some(Open::Prepared(_))) {
            let is_writing = self.guests[index].is_writing();
            assert!(!is_writing, "a guest writes before it is decided");
            return;
        }
        member.driving.with(|backup| {
            backup.check_invariants();
            let Some(left) = backup.left_dirty() else {
                return;
            };
            for cluster in 0..member.clusters() {
                let range = cluster_at(cluster, member.cluster, member.len());
                let (is_left, is_missing) = (left.any_dirty_in(range), member.is_missing(cluster));
                let must = instant.must[cluster] && is_missing;
                let may = instant.may[cluster] && (is_missing || member.again[cluster]);
                assert!(
                    !must || is_left,
                    "{range} is not on the target and nobody knows"
                );
                assert!(!is_left || may, "{range} is on the target and nobody knows");
            }
        });
        self.check_landed(index);
    }

    /// Whatever has come to the target is of the instant.
    pub(crate) fn check_landed(&self, index: usize) {
        let member = &self.members[index];
        let Some(instant) = &member.instant else {
            return;
        };
        let world = self.world.borrow();
        let target = &world.disks[disk_of(index, TARGET)];
        let is_ending = member.is_ending();
        let is_late = |block: usize| {
            let range = cluster_at(block, BLOCK, member.len());
            let mut out = target.requests.values();
            is_ending && out.any(|request| request.ask.writes() && request.range.overlaps(range))
        };
        for block in 0..member.landed.len() {
            if member.landed[block] && !is_late(block) {
                let is_same = is_of(instant, target, block);
                assert!(
                    is_same,
                    "block {block} of {index} is not that of the instant"
                );
            }
        }
    }

    pub(crate) fn check_end(&mut self) {
        let infos: Vec<_> = self.members.iter().map(|m| m.job.query()).collect();
        let mut own_errors = 0;
        for (index, info) in infos.iter().enumerate() {
            assert!(info.status >= Status::Concluded, "{info:?}");
            let is_good = info.error.is_none();
            if self.is_group {
                assert_eq!(is_good, infos[0].error.is_none(), "{}", self.describe());
            }
            let member = &self.members[index];
            match &info.error {
                None => {
                    assert_eq!(info.progress.current, info.progress.total);
                    self.report.succeeded += 1;
                }
                Some(JobError::Cancelled { abandoned }) => {
                    assert_eq!(info.cancel, Some(Cancel::Force));
                    let has_grace = member.plan.options.job.cancel_grace.is_some();
                    assert!(*abandoned == 0 || has_grace);
                    self.report.cancelled += 1;
                }
                Some(error) => {
                    let options = &member.plan.options;
                    let is_expected = match error {
                        JobError::Dropped => self.was_dropped,
                        JobError::NotSaved { .. } => {
                            options.cbw_timeout.is_some()
                                && options.on_cbw_error == OnCbwError::BreakSnapshot
                        }
                        _ => self.may_fail,
                    };
                    assert!(is_expected, "{index} failed without a reason: {error}");
                    own_errors += 1;
                    self.report.failed += usize::from(matches!(error, JobError::Io { .. }));
                    self.report.too_slow += usize::from(matches!(error, JobError::NotSaved { .. }));
                }
            }
            let is_auto_dismissed = member.plan.options.job.auto_dismiss;
            check_told(&member.events, is_good, is_auto_dismissed);
        }
        let all_good = infos.iter().all(|info| info.error.is_none());
        assert!(
            all_good || own_errors > 0 || self.was_cancelled,
            "undone without a reason: {}",
            self.describe()
        );
        let good: Vec<usize> = (0..infos.len())
            .filter(|&index| infos[index].error.is_none())
            .collect();
        if self.report.is_together {
            let is_whole = |&member: &usize| {
                let member = &self.members[member];
                !member.plan.goes_by_bitmap() || member.is_recording
            };
            let whole: Vec<usize> = good.iter().copied().filter(is_whole).collect();
            for chain in &self.chains {
                chain.check_order(&self.world.borrow(), &whole);
            }
        }
    }

    /// What is on the target, and in the bitmap.
    pub(crate) fn check_outcome(&self, index: usize) {
        let member = &self.members[index];
        let is_good = member.job.query().error.is_none();
        self.check_landed(index);
        if let (true, Some(instant)) = (is_good, &member.instant) {
            let world = self.world.borrow();
            let target = &world.disks[disk_of(index, TARGET)];
            assert_eq!(target.written, target.flushed, "{index} is not flushed");
            let is_image = !member.plan.goes_by_bitmap() || member.is_recording;
            for block in 0..target.blocks.len() {
                let cluster = block * BLOCK as usize / member.cluster as usize;
                if is_image || instant.must[cluster] {
                    let is_same = is_of(instant, target, block);
                    assert!(
                        is_same,
                        "block {block} of {index} is not that of the instant"
                    );
                }
            }
        }
        let Some(mode) = member.plan.mode() else {
            return;
        };
        let has_run = member.has_run() && member.instant.is_some();
        let mut expected = member.since.clone();
        let mut at_most = None;
        let mut add = |bits: &[bool]| {
            for (expected, &bit) in expected.iter_mut().zip(bits) {
                *expected |= bit;
            }
        };
        match (mode, is_good) {
            _ if !has_run => add(&member.before),
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => add(&member.before),
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {}
            (BitmapMode::Always, false) => {
                let instant = member.instant.as_ref().expect("it has run");
                let world = self.world.borrow();
                let target = &world.disks[disk_of(index, TARGET)];
                let is_flushed = target.written == target.flushed;
                let bits = |wanted: &[bool], again: &[bool], is_flushed| match is_flushed {
                    true => self.missing(index, wanted, again),
                    false => self.granules(index, |cluster| wanted[cluster]),
                };
                add(&bits(&instant.must, &[], is_flushed));
                let mut most = member.since.clone();
                let is_known = is_flushed && !member.has_lost_flush;
                let may = bits(&instant.may, &member.again, is_known);
                for (most, bit) in most.iter_mut().zip(may) {
                    *most |= bit;
                }
                at_most = Some(most);
            }
        }
        let bitmaps = self.nodes[index].bitmaps();
        let info = bitmaps.query(NAME).expect("it is there");
        assert_eq!(info.busy_with, None);
        assert_eq!(info.is_recording, member.is_recording);
        let bits = bitmaps.snapshot(NAME, SnapshotOf::Bitmap).expect("memory");
        let at_most = at_most.as_ref().unwrap_or(&expected);
        for granule in 0..expected.len() {
            let range = cluster_at(granule, member.plan.granularity, member.len());
            let is_dirty = bits.any_dirty_in(range);
            let what = format!("{range} after {:?}, {mode:?}", member.job.query().error);
            assert!(
                is_dirty || !expected[granule],
                "bitmap of {index} lacks {what}"
            );
            assert!(
                !is_dirty || at_most[granule],
                "bitmap of {index} has also {what}"
            );
        }
    }

    /// By granule: what of `wanted` is not on the target, or is to be copied again.
    pub(crate) fn missing(&self, index: usize, wanted: &[bool], again: &[bool]) -> Vec<bool> {
        let member = &self.members[index];
        self.granules(index, |cluster| {
            let is_again = again.get(cluster) == Some(&true);
            wanted[cluster] && (member.is_missing(cluster) || is_again)
        })
    }

    /// The granules of the clusters that are such.
    pub(crate) fn granules(&self, index: usize, is: impl Fn(usize) -> bool) -> Vec<bool> {
        let member = &self.members[index];
        let mut granules = vec![false; member.since.len()];
        for cluster in (0..member.clusters()).filter(|&cluster| is(cluster)) {
            let range = cluster_at(cluster, member.cluster, member.len());
            granules[units(range, member.plan.granularity)].fill(true);
        }
        granules
    }
}

/// Whether a block of the target is that of the instant, wherever that is defined.
pub(crate) fn is_of(instant: &Instant, target: &Disk, block: usize) -> bool {
    if instant.blocks[block].content == Content::Undefined {
        return true;
    }
    let range = cluster_at(block, BLOCK, target.limits.len);
    let at = range.start() as usize..range.end() as usize;
    target.blocks[block].content != Content::Undefined
        && target.bytes[at.clone()] == instant.bytes[at]
}

pub(crate) fn check_answer(member: &mut Member, answer: JobAnswer) {
    let JobAnswer {
        range,
        is_write,
        is_status,
        is_good,
        ..
    } = answer;
    if let (true, Some(instant)) = (is_write, &member.instant) {
        let clusters = units(range, member.cluster);
        let is_wanted = instant.may[clusters].iter().all(|&may| may);
        assert!(is_wanted, "{range} was written and nobody wanted it");
    }
    let is_top = member.plan.options.sync == BackupSync::Top;
    match (is_good, is_write) {
        // Once the instant is lost, what still lands may be later, also where something has landed before.
        (true, true) => member.heard_of(range, !member.is_ending()),
        (true, false) => {}
        // Not knowing what is there is no error, unless it decides what is copied.
        (false, _) if is_status && !is_top => {}
        (false, _) => member.heard_of(range, false),
    }
}

pub(crate) fn check_wait(
    since: &mut Option<u64>,
    is_waiting: bool,
    now: u64,
    timeout: Option<u64>,
) {
    if !is_waiting {
        *since = None;
        return;
    }
    let since = *since.get_or_insert(now);
    if let Some(timeout) = timeout {
        assert!(
            now - since <= timeout + 1,
            "a guest waits for longer than its deadline"
        );
    }
}

pub(crate) fn check_told(events: &[Event], is_good: bool, is_auto_dismissed: bool) {
    let told = check_events(events, is_good);
    assert!(!told.was_ready, "a backup is never ready");
    let last = match is_auto_dismissed || !told.was_started {
        true => Status::Null,
        false => Status::Concluded,
    };
    assert_eq!(told.status, Some(last));
}
