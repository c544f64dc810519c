//! Guest writes that go to a mirror's target as well, before the guest is told: active writes.
//!
//! ```text
//!               claimed by the job, or by another active write?
//!  guest ─▶ gate ──no──▶ claim ─▶ source ─▶ make clean what it covers ─▶ target ─▶ record ─▶ end of the claim
//!             └────yes─▶ wait ──▶ gate
//! ```
//!
//! Invariants:
//!
//! 1. From before its data is fixed on the source until it is on the target, an active write overlaps nothing
//!    that the job has claimed, and no other active write. Both sides look for what is in their way and claim
//!    in one step, under one lock.
//! 2. Who waits has no claim. So a write waits for what is under way only. The job, for a range that writes
//!    would never leave to it, wishes for it: those that come later wait until it has had its turn. So do those that
//!    overlap a write which [so many](OVERTAKES_MAX) have overtaken. A write that the job has given way to waits for
//!    no wish and no other that waits, and the job claims nothing of it before.
//! 3. What a write covers of a dirty granule without covering all of it does not go to the target: other bytes
//!    of the granule are missing there, too, and it stays dirty. What it covers whole gets clean before it is
//!    written to the target.
//! 4. Whatever goes wrong, on the source or on the target, or is not told, the write is recorded as if it had
//!    never gone to the target, and that before its claim ends.
//! 5. One that has gone well is recorded in all bitmaps but the job's.
//! 6. Whether a write is active is decided once, when it is let in. When the job is over, no part of a write goes
//!    to the target any more.
//! 7. Nobody waits for a job that is gone, or that nobody drives: those that wait go on as usual writes. Nor does
//!    the job wait for a write that has given up.
//! 8. A usual write sees no claims, so it may overlap an active one, and be recorded before that goes to the target
//!    with older data. An active write beside which a usual one may be under way makes nothing clean.

use std::collections::BTreeMap;
use std::io;
use std::task::Waker;
use std::time::Duration;

use super::gate::WaiterId;
use super::job_bitmap::JobBitmap;
use super::ranges::RangeSet;
use super::{Inner, Node};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::{Arc, Mutex, MutexGuard};
use crate::units::ByteRange;

/// Errors of the target that nobody has asked for yet, at most: what failed is dirty in any case.
const ERRORS_MAX: usize = 64;

/// A write that waits and that so many have overtaken has its turn before any other that comes later.
const OVERTAKES_MAX: u32 = 16;

/// The active writes of a node, and what they must not meet.
#[derive(Default)]
pub(super) struct Actives(Mutex<State>);

#[derive(Default)]
struct State {
    /// Whose target the writes go to.
    job: Option<ActiveJob>,
    /// Whether those that are let in now are active ones.
    is_on: bool,
    /// Active writes that were let in. They do not overlap.
    writes: RangeSet,
    /// How many those are.
    count: u64,
    /// Those of them that usual writes may overlap.
    mixed: RangeSet,
    /// Whether usual writes may be under way.
    is_mixed: bool,
    /// How many of them are at the target.
    at_target: u64,
    /// What the job has claimed.
    claimed: RangeSet,
    /// What the job would like to claim.
    wish: Option<ByteRange>,
    waiting: BTreeMap<WaiterId, Waiting>,
    told: Told,
    /// What of the target was written to since the job has asked last, if it wants to know.
    written: Option<HBitmap>,
    /// Wakes who drives the job.
    driver: Option<Waker>,
    /// To be called once the job has let go of all locks.
    to_wake: Vec<Waker>,
}

#[derive(Clone, Copy)]
struct ActiveJob {
    /// Its bitmap.
    bitmap: u64,
    /// What is written to the target is aligned to this.
    align: u64,
}

struct Waiting {
    range: ByteRange,
    waker: Option<Waker>,
    /// Since when the job has known of it.
    since: Option<Duration>,
    /// How many that overlap it have come later and were let in before.
    overtaken: u32,
    /// The job has given way to it.
    is_next: bool,
    /// It is not to wait any more, and is no active write.
    goes_alone: bool,
}

/// What the job is to be told of what has happened since it asked last.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Errors of the target.
    pub(crate) errors: Vec<(ByteRange, io::Error)>,
    /// Bytes that active writes have brought to the target.
    pub(crate) copied_bytes: u64,
    /// Active writes that have come to the target's end, one way or the other.
    pub(crate) count: u64,
    /// Whether the target was written to.
    pub(crate) has_written: bool,
}

/// That guest writes to a node may be active ones. It is the job's; with it goes what they wait for.
pub(crate) struct ActiveWrites {
    node: Arc<Inner>,
}

/// The side of the job's own claims, for what keeps them.
#[derive(Clone)]
pub(crate) struct ActiveClaims {
    node: Arc<Inner>,
}

/// Under the lock: nobody claims anything meanwhile.
pub(crate) struct ActiveLock<'a> {
    state: MutexGuard<'a, State>,
}

/// What stands in the way of an active write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InTheWay;

impl Waiting {
    /// Whether it came before a write to `range` that overlaps it, and that has waited if it has an `id`.
    fn is_before(&self, its_id: WaiterId, range: ByteRange, id: Option<WaiterId>) -> bool {
        id.is_none_or(|id| its_id < id) && self.range.overlaps(range)
    }
}

impl State {
    /// Whether a write must wait, that waits already if it has an `id`.
    fn is_in_the_way(&self, range: ByteRange, id: Option<WaiterId>) -> bool {
        let known = id.and_then(|id| self.waiting.get(&id));
        let is_next = known.is_some_and(|known| known.is_next);
        let is_claimed = self.claimed.first_in(range).is_some();
        let is_wished = self.wish.is_some_and(|wish| wish.overlaps(range));
        (is_claimed && !is_broken(Sabotage::WriteOverClaims))
            || (!is_next && (is_wished || self.waits_behind(range, id)))
            || (self.writes.first_in(range).is_some() && !is_broken(Sabotage::OverlapActives))
    }

    /// Whether another that came before and overlaps `range` is not to be overtaken any more.
    fn waits_behind(&self, range: ByteRange, id: Option<WaiterId>) -> bool {
        let mut others = self.waiting.iter();
        others.any(|(&other, waiting)| {
            let is_enough = waiting.overtaken >= OVERTAKES_MAX && !waiting.goes_alone;
            is_enough && waiting.is_before(other, range, id)
        }) && !is_broken(Sabotage::OvertakeForEver)
    }

    /// A write is let in before others that came before it.
    fn overtake(&mut self, range: ByteRange, id: Option<WaiterId>) {
        for (&other, waiting) in &mut self.waiting {
            if waiting.is_before(other, range, id) {
                waiting.overtaken = waiting.overtaken.saturating_add(1);
            }
        }
    }

    fn wakers_in(&mut self, range: ByteRange) -> Vec<Waker> {
        let touched = self.waiting.values_mut();
        let touched = touched.filter(|waiting| waiting.range.overlaps(range));
        touched.filter_map(|waiting| waiting.waker.take()).collect()
    }

    /// Those who wait in `range` are to look again, when the job has let go of its locks.
    fn wake_later(&mut self, range: ByteRange) {
        let wakers = self.wakers_in(range);
        self.to_wake.extend(wakers);
    }

    fn set_wish(&mut self, wish: Option<ByteRange>) {
        if let Some(before) = std::mem::replace(&mut self.wish, wish)
            && self.wish != Some(before)
        {
            self.wake_later(before);
        }
    }

    /// Usual writes may be let in from now on, everywhere.
    fn mix(&mut self) {
        self.is_mixed = true;
        self.mixed = self.writes.clone();
    }

    /// A usual write is let in.
    fn mix_in(&mut self, range: ByteRange) {
        self.is_mixed = true;
        let beside = self.writes.iter().filter(|write| write.overlaps(range));
        for write in beside.collect::<Vec<_>>() {
            self.mixed.insert(write);
        }
    }

    /// All who wait go on as usual writes.
    fn let_go(&mut self) {
        self.set_wish(None);
        for waiting in self.waiting.values_mut() {
            waiting.goes_alone = true;
            self.to_wake.extend(waiting.waker.take());
        }
    }
}

impl Actives {
    /// Claims the range of a write, as far as it lies within the disk. `false` if it goes as a usual one. With a
    /// `waiter` it is put down who waits if it must, and whom to wake.
    pub(super) fn claim(
        &self,
        range: ByteRange,
        waiter: Option<(WaiterId, Option<&Waker>)>,
    ) -> Result<bool, InTheWay> {
        let mut state = self.0.lock();
        let id = waiter.map(|(id, _)| id);
        let known = id.and_then(|id| state.waiting.get(&id));
        let is_usual = known.is_some_and(|known| known.goes_alone);
        let mut wakers = Vec::new();
        let mut unused = None;
        let result = if !state.is_on || range.is_empty() {
            Ok(false)
        } else if is_usual {
            state.mix_in(range);
            Ok(false)
        } else if state.is_in_the_way(range, id) {
            Err(InTheWay)
        } else {
            state.overtake(range, id);
            state.writes.insert(range);
            if state.is_mixed {
                state.mixed.insert(range);
            }
            state.count += 1;
            Ok(true)
        };
        match (result, waiter) {
            (Err(InTheWay), Some((id, waker))) => {
                let mut is_new = false;
                let waiting = state.waiting.entry(id).or_insert_with(|| {
                    is_new = true;
                    Waiting {
                        range,
                        waker: None,
                        since: None,
                        overtaken: 0,
                        is_next: false,
                        goes_alone: false,
                    }
                });
                let is_known = |known: &Waker| waker.is_some_and(|waker| known.will_wake(waker));
                if !waiting.waker.as_ref().is_some_and(is_known)
                    && let Some(waker) = waker
                {
                    unused = waiting.waker.replace(waker.clone());
                }
                if is_new {
                    wakers.extend(state.driver.clone());
                }
            }
            (Ok(_), Some((id, _))) => {
                let removed = state.waiting.remove(&id);
                // As a usual write it is in nobody's way.
                if let (Ok(false), Some(waiting)) = (result, &removed) {
                    wakers = state.wakers_in(waiting.range);
                }
                unused = removed.and_then(|waiting| waiting.waker);
            }
            (_, None) => {}
        }
        drop(state);
        drop(unused);
        wakers.into_iter().for_each(Waker::wake);
        result
    }

    /// Who waits has given up, or waits for something else now.
    pub(super) fn forget(&self, id: WaiterId) {
        let mut state = self.0.lock();
        let Some(removed) = state.waiting.remove(&id) else {
            return;
        };
        // Others may wait for it to have its turn.
        let mut wakers = state.wakers_in(removed.range);
        // The job has claimed nothing of what it has given way to.
        wakers.extend(state.driver.clone().filter(|_| removed.is_next));
        drop(state);
        drop(removed);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The claim of a write ends. It is recorded.
    pub(super) fn end(&self, range: ByteRange) {
        let mut state = self.0.lock();
        state.writes.remove(range);
        state.mixed.remove(range);
        state.count -= 1;
        let mut wakers = state.wakers_in(range);
        if state.wish.is_some_and(|wish| wish.overlaps(range)) {
            wakers.extend(state.driver.clone());
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether no more than the active writes are inside. With the lock held none of them comes or goes while `count`
    /// looks.
    pub(super) fn are_all(&self, count: impl FnOnce() -> u64) -> bool {
        let mut state = self.0.lock();
        let are_all = count() == state.count;
        // For those that begin from now on.
        state.is_mixed &= !(are_all && state.is_on);
        are_all
    }
}

impl Inner {
    /// What of an active write is to go to the target, now that it has settled on the source: nothing, or a
    /// range that is clean from here on.
    pub(super) fn part_for_target(&self, range: ByteRange) -> Option<ByteRange> {
        let mut list = self.lock_drained();
        let mut state = self.gate.actives.0.lock();
        let ActiveJob { bitmap, align } = state.job?;
        let dirty = list.job_map_mut(bitmap);
        let len = dirty.len();
        let granularity = dirty.granularity();
        let range = range.intersection((0..len).into());
        if range.is_empty() {
            return None;
        }
        let up = |offset: u64, align: u64| match offset.checked_next_multiple_of(align) {
            Some(up) => up.min(len),
            None => len,
        };
        let down = |offset: u64, align: u64| match offset == len {
            true => len,
            false => offset - offset % align,
        };
        let (mut start, mut end) = (range.start(), range.end());
        let is_dirty = |offset: u64| dirty.is_dirty(offset).expect("within the disk");
        let whole = (
            up(start, granularity.bytes()),
            down(end, granularity.bytes()),
        );
        if !is_broken(Sabotage::WriteIntoDirty) {
            if whole.0 > start && is_dirty(start) {
                start = whole.0;
            }
            if whole.1 < end && is_dirty(range.end() - 1) {
                end = whole.1;
            }
        }
        // What is left out of a clean granule gets dirty; of a dirty one it stays so.
        let (start, end) = (up(start, align), down(end, align));
        if start >= end {
            dirty.set(range).expect("within the disk");
            return None;
        }
        for left_out in [range.start()..start, end..range.end()] {
            dirty.set(left_out).expect("within the disk");
        }
        let part = ByteRange::from(start..end);
        // What a usual write has made dirty meanwhile may be newer than this.
        let is_mixed = state.mixed.first_in(range).is_some();
        if !is_mixed || is_broken(Sabotage::CleanBesideOthers) {
            dirty.reset_inner(part).expect("within the disk");
        }
        if is_broken(Sabotage::WriteIntoDirty) {
            let outward = granularity.align_down(start)..up(end, granularity.bytes());
            dirty.reset(outward).expect("made of granules");
        }
        if let Some(written) = &mut state.written {
            written.set(part).expect("as long as the disk");
        }
        state.at_target += 1;
        Some(part)
    }

    /// A part has come to the target, or not; without a result, or so it seems.
    pub(super) fn target_done(&self, part: ByteRange, result: Option<io::Result<()>>) {
        let mut state = self.gate.actives.0.lock();
        state.at_target -= 1;
        state.told.count += 1;
        state.told.has_written |= !is_broken(Sabotage::ForgetActiveWrites);
        let mut driver = None;
        match result {
            Some(Ok(())) => {
                state.told.copied_bytes = state.told.copied_bytes.saturating_add(part.len());
            }
            Some(Err(error)) if state.job.is_some() && state.told.errors.len() < ERRORS_MAX => {
                state.told.errors.push((part, error));
                driver = state.driver.clone();
            }
            Some(Err(_)) | None => {}
        }
        drop(state);
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    /// An active write has gone well: it is for all bitmaps that record but the job's.
    pub(super) fn record_active(&self, range: ByteRange) {
        let mut list = self.list.lock();
        let job = self.gate.actives.0.lock().job.map(|job| job.bitmap);
        if is_broken(Sabotage::RecordNoActives) || !list.records_beside(job) {
            return;
        }
        list.record_beside(job, range.intersection((0..self.len()).into()));
    }
}

impl ActiveWrites {
    /// For the job with that bitmap, whose target wants what is written to it aligned to `align`. No write is
    /// active before [`begin`](Self::begin).
    pub(crate) fn new(node: &Node, bitmap: &JobBitmap, align: u64) -> Self {
        let node = Arc::clone(node.inner());
        let bitmap = bitmap.id();
        let mut state = node.gate.actives.0.lock();
        state.job = Some(ActiveJob { bitmap, align });
        // What was under way when another job ended is none of this one's.
        state.told = Told::default();
        drop(state);
        Self { node }
    }

    /// For whoever keeps what the job claims.
    pub(crate) fn claims(&self) -> ActiveClaims {
        ActiveClaims {
            node: Arc::clone(&self.node),
        }
    }

    /// Writes that are let in from now on are active ones. Those that were let in before are not.
    pub(crate) fn begin(&self) {
        let mut state = self.lock();
        state.is_on = true;
        state.is_mixed = true;
        drop(state);
        self.node.gate.copy_actively(true);
    }

    /// They are not any more. Those that were let in before are.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.is_on = false;
        // Before usual writes are let in.
        state.mix();
        state.let_go();
        drop(state);
        self.node.gate.copy_actively(false);
    }

    /// Looks whether usual writes are under way still, if there may be any.
    pub(crate) fn look_for_others(&self) {
        if self.lock().is_mixed {
            self.node.gate.are_all_active();
        }
    }

    /// Whether every write that is under way is an active one.
    pub(crate) fn are_all(&self) -> bool {
        is_broken(Sabotage::TrustTheMode) || self.node.gate.are_all_active()
    }

    /// What has happened since this was asked last. `waker` is called when the job is to look again.
    pub(crate) fn told(&self, waker: &Waker) -> Told {
        let mut state = self.lock();
        let is_known = state
            .driver
            .as_ref()
            .is_some_and(|known| known.will_wake(waker));
        if is_known {
            return std::mem::take(&mut state.told);
        }
        drop(state);
        // Foreign code, both the making and the dropping of it.
        let waker = waker.clone();
        let mut state = self.lock();
        let unused = state.driver.replace(waker);
        let told = std::mem::take(&mut state.told);
        drop(state);
        drop(unused);
        told
    }

    /// The ranges of those that wait, and since when they are known to. Those that were known at `since_before`, or
    /// earlier, go on as usual writes.
    pub(crate) fn waiting(
        &self,
        now: Duration,
        since_before: Option<Duration>,
    ) -> Vec<(ByteRange, Duration)> {
        let mut state = self.lock();
        if state.waiting.is_empty() {
            return Vec::new();
        }
        let (mut still, mut gone) = (Vec::new(), Vec::new());
        for waiting in state.waiting.values_mut() {
            let since = *waiting.since.get_or_insert(now);
            if since_before.is_some_and(|before| since <= before) && !waiting.goes_alone {
                waiting.goes_alone = true;
                gone.push(waiting.range);
            }
            if !waiting.goes_alone {
                still.push((waiting.range, since));
            }
        }
        // It, and those that wait for it to have its turn.
        for range in gone {
            state.wake_later(range);
        }
        still
    }

    /// The job is about to give way to those who wait in `range`.
    pub(crate) fn promise(&self, range: ByteRange) {
        let mut state = self.lock();
        for waiting in state.waiting.values_mut() {
            waiting.is_next |= waiting.range.overlaps(range);
        }
    }

    /// Nobody waits for a wish that the job could have, and does not take.
    pub(crate) fn drop_wish(&self) {
        let mut state = self.lock();
        let can_have = |wish: ByteRange| state.writes.first_in(wish).is_none();
        if state.wish.is_some_and(can_have) {
            state.set_wish(None);
        }
    }

    /// They are over: no part of one goes to the target any more. How many are at the target still.
    pub(crate) fn end(self) -> u64 {
        let node = Arc::clone(&self.node);
        drop(self);
        node.gate.actives.0.lock().at_target
    }

    /// How many writes are at the target just now, or wait to be let in.
    pub(crate) fn waits(&self) -> u64 {
        let state = self.lock();
        state.at_target + state.waiting.len() as u64
    }

    /// Has all look again whom the job has let go on. It may hold no lock.
    pub(crate) fn wake(&self) {
        let wakers = std::mem::take(&mut self.lock().to_wake);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.node.gate.actives.0.lock()
    }
}

impl Drop for ActiveWrites {
    fn drop(&mut self) {
        self.stop();
        let mut state = self.lock();
        state.job = None;
        state.claimed = RangeSet::default();
        state.told = Told::default();
        let unused = state.written.take();
        let driver = state.driver.take();
        drop(state);
        drop((driver, unused));
        self.wake();
    }
}

impl ActiveClaims {
    pub(crate) fn lock(&self) -> ActiveLock<'_> {
        let state = self.node.gate.actives.0.lock();
        ActiveLock { state }
    }

    /// Adds what is on its way to the target, and may not come there.
    pub(crate) fn add_to(&self, left: &mut HBitmap) {
        let len = left.len();
        let state = self.node.gate.actives.0.lock();
        for range in state.writes.iter() {
            left.set(range.intersection((0..len).into()))
                .expect("within the disk");
        }
    }
}

impl ActiveLock<'_> {
    /// The first active write that overlaps `range`. If the job is to give way, also a write that it has given way
    /// to and that has not gone on yet.
    pub(crate) fn first_in(&self, range: ByteRange, gives_way: bool) -> Option<ByteRange> {
        if is_broken(Sabotage::ClaimOverWrites) {
            return None;
        }
        let waiting = self.state.waiting.values();
        let waiting = waiting.filter(|waiting| gives_way && waiting.is_next && !waiting.goes_alone);
        let waiting = waiting.map(|waiting| waiting.range);
        let next = waiting.filter(|waiting| waiting.overlaps(range));
        let under_way = self.state.writes.first_in(range);
        under_way
            .into_iter()
            .chain(next)
            .min_by_key(|found| found.start())
    }

    pub(crate) fn claim(&mut self, range: ByteRange) {
        self.state.claimed.insert(range);
        if self.state.wish.is_some_and(|wish| wish.overlaps(range)) {
            self.state.set_wish(None);
        }
    }

    /// Ends the claim of `range`, which may be a part of one.
    pub(crate) fn release(&mut self, range: ByteRange) {
        self.state.claimed.remove(range);
        self.state.wake_later(range);
    }

    /// From now on it is noted in that map what of the target is written to.
    pub(crate) fn note_written(&mut self, map: HBitmap) {
        self.state.written = Some(map);
    }

    /// What of the target was written to since this was asked last, or is being written to. What is written
    /// afterwards is told the next time: it does not overlap what the job has claimed now.
    pub(crate) fn take_written(&mut self) -> Vec<ByteRange> {
        let Some(map) = &mut self.state.written else {
            return Vec::new();
        };
        if map.is_clean() {
            return Vec::new();
        }
        let written = map.runs().collect();
        map.reset_all();
        written
    }

    /// What the job waits for, because writes are under way there.
    pub(crate) fn wish_for(&mut self, range: Option<ByteRange>) {
        if !is_broken(Sabotage::WishForNothing) {
            self.state.set_wish(range);
        }
    }
}

impl std::fmt::Debug for ActiveWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveWrites").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ActiveClaims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveClaims").finish_non_exhaustive()
    }
}
