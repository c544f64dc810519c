//! The gate: every guest write passes it, and it can be closed.
//!
//! ```text
//!            begun += 1                                finished += 1
//!  guest ───▶ barrier ───▶ closed? ──no──▶ write ─────▶ barrier ──▶ closed or armed? ──no──▶ done
//!                             │ yes                                      │ yes
//!                             ▼                                          ▼
//!                   undo, wait for a waker                     wake who waits for it
//! ```
//!
//! Invariants:
//!
//! 1. A write that was let in is counted in `begun` of exactly one lane before it may start, and in
//!    `finished` of the same lane after everything it had to record is recorded. One that had to wait
//!    is counted apart: the plain store of a queue's `begun` is for one thread at a time, and a write
//!    that waits is polled on any.
//! 2. Whoever closes the gate raises the flag first and looks at the counters afterwards; a writer
//!    counts itself first and looks at the flag afterwards. Between the two steps both have a full
//!    barrier. So either the writer sees the flag, or the closer sees the writer.
//! 3. A lane whose two counters were equal once while the gate was closed stays quiet until it opens:
//!    a newcomer sees the flag and takes back its count without having written.
//! 4. A writer that leaves looks at the flags after it has counted itself out, for the same reason:
//!    either it sees that somebody waits and wakes him, or he saw the counter.
//! 5. A write that some job holds back is not inside; what holds it back is in [`hold`](super::hold).
//! 6. No waker is called or dropped under the lock: it is foreign code. One may be the last to know a
//!    task, which then goes with all it owns, tickets and guards of this gate among it.
//!
//! Counting is per lane, that is per guest queue, each on its own cache lines, so that queues do not
//! slow each other down. Only [`Gate::close`], waiting and waking take the lock.

use std::collections::BTreeMap;
use std::task::Waker;

use super::active::{Actives, InTheWay};
use super::hold::{Held, HoldMaps};
use super::ticket::NotSaved;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::{Arc, Mutex};
use crate::units::ByteRange;

/// The gate is closed: writers wait.
const CLOSED: u64 = 1;
/// Somebody wants to be woken by the next write that leaves.
const ARMED: u64 = 2;
/// Writes are refused: a bitmap could not record them.
const REFUSED: u64 = 4;
/// Writes are active ones.
const ACTIVE: u64 = 8;
/// In the byte from this bit on: which log writes are recorded in, plus one; 0 for none.
const LOG_SHIFT: u32 = 8;
/// In the byte from this bit on: by which map writes are held back, plus one; 0 for none.
const HOLD_SHIFT: u32 = 16;
const HOLD: u64 = 0xff << HOLD_SHIFT;

/// Two cache lines, because adjacent lines are fetched in pairs.
#[repr(align(128))]
struct Padded<T>(T);

/// How many writes of one lane were let in, and how many of them have left.
pub(super) struct Counter {
    begun: AtomicU64,
    /// Writes, beside those in `begun`, that had to wait first. They begin on whatever thread polls
    /// them, while the queue they came through may be in use on another.
    begun_late: AtomicU64,
    finished: AtomicU64,
    /// Whether several threads begin writes on this lane at the same time.
    shared: bool,
    rules: Rules,
}

impl Counter {
    #[inline]
    fn enter(&self) {
        if self.shared {
            // On its own a barrier: `SeqCst` here and in the load of the flags that follows.
            self.begun.fetch_add(1, Ordering::SeqCst);
            // Loom takes `SeqCst` accesses for `AcqRel` and must be told.
            #[cfg(loom)]
            self.rules.fence_for(GateRule::BarrierAfterCount);
        } else {
            // One thread at a time begins here, so a load and a store do what an atomic add does, and
            // the barrier is all that it costs.
            let begun = self.begun.load(Ordering::Relaxed);
            self.begun.store(begun + 1, Ordering::Relaxed);
            self.rules.fence_for(GateRule::BarrierAfterCount);
        }
    }

    /// As [`enter`](Self::enter), for a write that waited.
    fn enter_late(&self) {
        if !self.rules.keeps(GateRule::LateApart) {
            return self.enter();
        }
        self.begun_late.fetch_add(1, Ordering::SeqCst);
        #[cfg(loom)]
        self.rules.fence_for(GateRule::BarrierAfterCount);
    }

    #[inline]
    fn leave(&self) {
        // Any thread may finish a write. `Release` for the closer, who reads what was written, and
        // `SeqCst` for the flags looked at next.
        self.finished.fetch_add(1, Ordering::SeqCst);
        #[cfg(loom)]
        self.rules.fence_for(GateRule::BarrierAfterLeave);
    }

    /// Whether nobody is inside. `finished` is read first: if it was equal to the sum of what is read
    /// later, it was equal at some moment between.
    fn is_quiet(&self) -> bool {
        if !self.rules.keeps(GateRule::FinishedFirst) {
            let begun = self.begun();
            return self.finished.load(Ordering::SeqCst) == begun;
        }
        let finished = self.finished.load(Ordering::SeqCst);
        finished == self.begun()
    }

    /// How many are inside, or a few more.
    fn inside(&self) -> u64 {
        let finished = self.finished.load(Ordering::SeqCst);
        self.begun() - finished
    }

    fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst) + self.begun_late.load(Ordering::SeqCst)
    }
}

/// Tasks that wait for the same thing, in the order in which they came.
#[derive(Default)]
struct Waiters {
    by_ticket: BTreeMap<u64, Waker>,
}

impl Waiters {
    /// Gives back the waker that is not needed any more, for the caller to drop outside of the lock.
    #[must_use]
    fn set(&mut self, id: WaiterId, waker: &Waker) -> Option<Waker> {
        match self.by_ticket.get(&id.0) {
            Some(known) if known.will_wake(waker) => None,
            _ => self.by_ticket.insert(id.0, waker.clone()),
        }
    }

    /// As [`set`](Self::set).
    #[must_use]
    fn remove(&mut self, id: WaiterId) -> Option<Waker> {
        self.by_ticket.remove(&id.0)
    }

    fn take(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.by_ticket).into_values().collect()
    }
}

/// One who may wait at the gate; unique for the life of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WaiterId(u64);

struct State {
    /// Every lane, also one whose queue is gone while a write of it is still inside.
    lanes: Vec<Arc<Padded<Counter>>>,
    /// How many hold the gate closed.
    closers: usize,
    next_waiter: u64,
    /// Guest writes held back.
    writers: Waiters,
    /// Who waits for the writes inside to leave.
    quiescers: Waiters,
    /// Who waits for a write to be recorded.
    watchers: Waiters,
    /// Guest writes that a job holds back.
    held: Held,
}

pub(super) struct Gate {
    /// Read by every write, written only by the few who close, arm or start tracking.
    flags: Padded<AtomicU64>,
    /// By what writes are held back, if the flags say so.
    pub(super) holds: HoldMaps,
    /// Those that go to a mirror's target as well.
    pub(super) actives: Actives,
    state: Mutex<State>,
    pub(super) rules: Rules,
}

/// One lane's counter, as its queue and its tickets hold it.
pub(super) struct LaneCounter(Arc<Padded<Counter>>);

/// Why a write was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turned {
    /// The gate is closed. Whether the write is refused shows when it is open again.
    Closed,
    Refused,
    /// A job must do something first.
    Held,
    /// It is an active write, and something else is under way there.
    InTheWay,
    /// A job has given up, and the write with it.
    NotSaved(NotSaved),
}

/// What a write that was let in must know when it leaves.
///
/// In one word: with a field for each a ticket would be written to memory byte by byte and read back as a whole,
/// which waits until the bytes are in the cache, at every write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry(u16);

impl Entry {
    /// Of the byte that says in which log a write is recorded.
    const LOG: u16 = 0xff;
    const ACTIVE: u16 = 1 << 8;

    /// As the flags of the gate say it; not an active one.
    #[inline]
    fn by(flags: u64) -> Self {
        Self((flags >> LOG_SHIFT) as u16 & Self::LOG)
    }

    #[inline]
    fn active_if(self, is_active: bool) -> Self {
        match is_active {
            true => Self(self.0 | Self::ACTIVE),
            false => self,
        }
    }

    /// The log to record the write in.
    #[inline]
    pub(super) fn log(self) -> Option<u8> {
        (self.0 as u8).checked_sub(1)
    }

    /// Whether it is an active write, and has a claim.
    #[inline]
    pub(super) fn is_active(self) -> bool {
        self.0 & Self::ACTIVE != 0
    }

    /// Recorded nowhere.
    pub(super) fn unrecorded(self) -> Self {
        Self(self.0 & !Self::LOG)
    }

    /// Without a claim.
    pub(super) fn usual(self) -> Self {
        Self(self.0 & !Self::ACTIVE)
    }
}

impl Gate {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            flags: Padded(AtomicU64::new(0)),
            holds: HoldMaps::default(),
            actives: Actives::default(),
            state: Mutex::new(State {
                lanes: Vec::new(),
                closers: 0,
                next_waiter: 0,
                writers: Waiters::default(),
                quiescers: Waiters::default(),
                watchers: Waiters::default(),
                held: Held::default(),
            }),
        }
    }

    pub(super) fn add_lane(&self, shared: bool) -> LaneCounter {
        let counter = Arc::new(Padded(Counter {
            begun: AtomicU64::new(0),
            begun_late: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            shared,
            rules: self.rules,
        }));
        self.state.lock().lanes.push(Arc::clone(&counter));
        LaneCounter(counter)
    }

    /// Forgets the lanes whose queue is gone and that are quiet. One with a write inside stays.
    pub(super) fn remove_lane(&self, lane: &LaneCounter) {
        self.state
            .lock()
            .lanes
            .retain(|known| !(Arc::ptr_eq(known, &lane.0) && known.0.is_quiet()));
    }

    pub(super) fn new_waiter(&self) -> WaiterId {
        let mut state = self.state.lock();
        state.next_waiter += 1;
        WaiterId(state.next_waiter)
    }

    /// Lets a write in, unless the gate is closed, or writes are refused, or it is held back.
    #[inline]
    pub(super) fn try_enter(&self, lane: &LaneCounter, range: ByteRange) -> Result<Entry, Turned> {
        self.enter_by(lane, range, None, Counter::enter)
    }

    #[inline]
    fn enter_by(
        &self,
        lane: &LaneCounter,
        range: ByteRange,
        waiter: Option<(WaiterId, Option<&Waker>)>,
        count: impl FnOnce(&Counter),
    ) -> Result<Entry, Turned> {
        let flags = self.look_after(GateRule::CountThenLook, || count(&lane.0.0));
        let entry = Entry::by(flags);
        if flags & (CLOSED | REFUSED | HOLD | ACTIVE) == 0 {
            return Ok(entry);
        }
        match self.turned(flags, range, waiter) {
            Ok(is_active) => Ok(entry.active_if(is_active)),
            Err(turned) => {
                if turned != Turned::Held || self.rules.keeps(GateRule::LeaveWhenHeld) {
                    self.leave(lane);
                }
                Err(turned)
            }
        }
    }

    /// Whether a write to `range`, if it is let in as the flags say it, is an active one.
    #[inline(never)]
    fn turned(
        &self,
        flags: u64,
        range: ByteRange,
        waiter: Option<(WaiterId, Option<&Waker>)>,
    ) -> Result<bool, Turned> {
        match self.hindered(flags, range) {
            Some(turned) => Err(turned),
            None if flags & ACTIVE == 0 => Ok(false),
            None => self
                .actives
                .claim(range, waiter)
                .map_err(|InTheWay| Turned::InTheWay),
        }
    }

    /// Why a write to `range` is not let in, as the flags say it.
    fn hindered(&self, flags: u64, range: ByteRange) -> Option<Turned> {
        if flags & CLOSED != 0 {
            return Some(Turned::Closed);
        }
        if flags & REFUSED != 0 {
            return Some(Turned::Refused);
        }
        let index = ((flags & HOLD) >> HOLD_SHIFT).checked_sub(1)?;
        let is_held = self.holds.holds(index as usize, range);
        is_held.then_some(Turned::Held)
    }

    /// The flags as they are after `count` was called; before, if that `rule` is broken.
    #[inline]
    fn look_after(&self, rule: GateRule, count: impl FnOnce()) -> u64 {
        let look = || self.flags.0.load(Ordering::SeqCst);
        if !self.rules.keeps(rule) {
            let flags = look();
            count();
            return flags;
        }
        count();
        look()
    }

    /// Lets a write in, or has the waker, if one is given, called when it is worth asking again. A job that
    /// holds it back is told of it, with a waker or without.
    #[cold]
    pub(super) fn enter_or_wait(
        &self,
        lane: &LaneCounter,
        id: WaiterId,
        range: ByteRange,
        waker: Option<&Waker>,
    ) -> Result<Entry, Turned> {
        // The waker goes in while the gate is known to be closed, or the write to be held, so that whoever
        // lets it go on finds it.
        let mut state = self.state.lock();
        let flags = self.flags.0.load(Ordering::SeqCst);
        let turned = match state.closers > 0 {
            true => Some(Turned::Closed),
            false => self.hindered(flags, range),
        };
        if !self.rules.keeps(GateRule::WaitWhileClosed) {
            drop(state);
            state = self.state.lock();
        }
        let refused = state.held.refused(id).map(Turned::NotSaved);
        let turned = refused.or(turned);
        let (job, unused) = match turned {
            Some(Turned::Closed) => {
                let replaced = waker.and_then(|waker| state.writers.set(id, waker));
                (None, [replaced, None])
            }
            Some(Turned::Held) => {
                let [job, replaced] = state.held.wait(id, range, waker);
                (job, [replaced, state.writers.remove(id)])
            }
            Some(Turned::InTheWay | Turned::Refused | Turned::NotSaved(_)) | None => {
                let removed = state.held.remove(id);
                (None, [removed, state.writers.remove(id)])
            }
        };
        drop(state);
        drop(unused);
        if let Some(job) = job {
            job.wake();
        }
        if let Some(turned) = turned {
            self.actives.forget(id);
            return Err(turned);
        }
        let entry = self.enter_by(lane, range, Some((id, waker)), Counter::enter_late);
        if let (Err(Turned::Closed | Turned::Held), Some(waker)) = (entry, waker) {
            // Closed again in between: the next poll registers.
            waker.wake_by_ref();
        }
        entry
    }

    pub(super) fn forget_writer(&self, id: WaiterId) {
        let mut state = self.state.lock();
        let unused = (state.writers.remove(id), state.held.remove(id));
        drop(state);
        drop(unused);
        self.actives.forget(id);
    }

    /// Whether writes that are let in from now on are active ones.
    pub(super) fn copy_actively(&self, are_active: bool) {
        let _state = self.state.lock();
        match are_active {
            true => self.flags.0.fetch_or(ACTIVE, Ordering::SeqCst),
            false => self.flags.0.fetch_and(!ACTIVE, Ordering::SeqCst),
        };
    }

    /// Whether every write that is inside is an active one. No other has come since writes are, so once it is
    /// true it stays so, but for those that are told to go as usual ones.
    pub(super) fn are_all_active(&self) -> bool {
        let state = self.state.lock();
        self.rules.fence_for(GateRule::BarrierBeforeSum);
        // `finished` of each lane is read first, so the sum is never below what is inside. An active write is
        // inside for as long as it has a claim.
        let inside = || state.lanes.iter().map(|lane| lane.0.inside()).sum();
        self.actives.are_all(inside)
    }

    /// By which of the maps writes are held back from now on. The gate is closed and quiet. Returns which of
    /// the holds of the node that is.
    pub(super) fn hold_back(&self, map: usize) -> u64 {
        let bits = (map as u64 + 1) << HOLD_SHIFT;
        let mut state = self.state.lock();
        let rest = self.flags.0.load(Ordering::Relaxed) & !HOLD;
        self.flags.0.store(rest | bits, Ordering::SeqCst);
        state.held.begin()
    }

    /// Writes are not held back any more, if it is that hold that does: as [`Held::end`].
    pub(super) fn let_go(&self, hold: u64) -> Option<(Option<Waker>, Vec<Waker>)> {
        let mut state = self.state.lock();
        if !state.held.is_by(hold) && !is_broken(Sabotage::LetGoLate) {
            return None;
        }
        let rest = self.flags.0.load(Ordering::Relaxed) & !HOLD;
        self.flags.0.store(rest, Ordering::SeqCst);
        Some(state.held.end())
    }

    /// Looks at the writes that are held back, or changes what is known of them. No waker may be called or
    /// dropped in it.
    pub(super) fn with_held<R>(&self, act: impl FnOnce(&mut Held) -> R) -> R {
        act(&mut self.state.lock().held)
    }

    /// A write that was let in has settled and is recorded.
    #[inline]
    pub(super) fn leave(&self, lane: &LaneCounter) {
        let flags = self.look_after(GateRule::LeaveThenLook, || lane.0.0.leave());
        if flags & (CLOSED | ARMED) != 0 {
            self.wake_after_leave();
        }
    }

    #[cold]
    fn wake_after_leave(&self) {
        let mut state = self.state.lock();
        let mut wakers = state.quiescers.take();
        if self.flags.0.load(Ordering::Relaxed) & ARMED != 0 {
            self.flags.0.fetch_and(!ARMED, Ordering::SeqCst);
            wakers.append(&mut state.watchers.take());
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Closes the gate. Each call wants one [`Gate::open`].
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closers += 1;
        self.flags.0.fetch_or(CLOSED, Ordering::SeqCst);
    }

    pub(super) fn open(&self) {
        let mut state = self.state.lock();
        state.closers -= 1;
        if state.closers > 0 {
            return;
        }
        self.flags.0.fetch_and(!CLOSED, Ordering::SeqCst);
        let wakers = state.writers.take();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether every write that was let in has left. To be asked with the gate closed. If not, and
    /// a waker is given, it is called when a write leaves.
    pub(super) fn is_quiet(&self, id: WaiterId, waker: Option<&Waker>) -> bool {
        let mut state = self.state.lock();
        let replaced = waker.and_then(|waker| state.quiescers.set(id, waker));
        self.rules.fence_for(GateRule::BarrierBeforeSum);
        let quiet = state.lanes.iter().all(|lane| lane.0.is_quiet())
            || is_broken(Sabotage::DoNotWaitForWriters);
        let removed = if quiet {
            state.quiescers.remove(id)
        } else {
            None
        };
        drop(state);
        drop((replaced, removed));
        quiet
    }

    pub(super) fn forget_quiescer(&self, id: WaiterId) {
        let _unused = self.state.lock().quiescers.remove(id);
    }

    /// Has `waker` called by the next recorded write. The caller must look once more, afterwards,
    /// whether something was recorded already.
    pub(super) fn arm(&self, id: WaiterId, waker: &Waker) {
        let mut state = self.state.lock();
        let replaced = state.watchers.set(id, waker);
        self.flags.0.fetch_or(ARMED, Ordering::SeqCst);
        drop(state);
        drop(replaced);
        self.rules.fence_for(GateRule::BarrierAfterArm);
    }

    pub(super) fn disarm(&self, id: WaiterId) {
        let mut state = self.state.lock();
        let removed = state.watchers.remove(id);
        if state.watchers.by_ticket.is_empty() {
            self.flags.0.fetch_and(!ARMED, Ordering::SeqCst);
        }
        drop(state);
        drop(removed);
    }

    /// Whether writes are refused from now on. For those that were let in before it is no answer: to
    /// refuse, the gate is closed and quiet.
    pub(super) fn refuse_writes(&self, are_refused: bool) {
        let _state = self.state.lock();
        if are_refused && !is_broken(Sabotage::LetInReadonly) {
            self.flags.0.fetch_or(REFUSED, Ordering::SeqCst);
        } else {
            self.flags.0.fetch_and(!REFUSED, Ordering::SeqCst);
        }
    }

    /// Which log writes are recorded in. For tests.
    pub(super) fn recorded_in(&self) -> Option<usize> {
        let log = (self.flags.0.load(Ordering::SeqCst) >> LOG_SHIFT) as u8;
        log.checked_sub(1).map(usize::from)
    }

    /// Which log writes are recorded in from now on. Going to another log while writes are inside
    /// would let one be recorded where nobody looks any more, so the gate is closed and quiet then;
    /// going to none is harmless at any time.
    pub(super) fn record_in(&self, log: Option<usize>) {
        let bits = log.map_or(0, |index| index as u64 + 1) << LOG_SHIFT;
        let _state = self.state.lock();
        let rest =
            self.flags.0.load(Ordering::Relaxed) & (CLOSED | ARMED | REFUSED | HOLD | ACTIVE);
        // Every change of the flags is made under the lock, so nothing is lost by a plain store.
        self.flags.0.store(rest | bits, Ordering::SeqCst);
    }
}

/// The invariants of the gate and of those who use it, for loom tests to break one by one.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(loom), expect(unreachable_pub, reason = "only loom tests name it"))]
#[cfg_attr(not(loom), allow(dead_code, reason = "only loom tests break some"))]
pub enum GateRule {
    /// Broken, a write is recorded after it has left.
    RecordThenLeave,
    /// Broken, a writer looks at the flags before it counts itself.
    CountThenLook,
    /// Broken, there is no barrier between the two.
    BarrierAfterCount,
    /// Broken, there is no barrier between raising the flag and looking at the counters.
    BarrierBeforeSum,
    /// Broken, writes that waited are counted with those that did not.
    LateApart,
    /// Broken, a closer looks at `begun` before `finished`.
    FinishedFirst,
    /// Broken, a writer that leaves looks at the flags before it counts itself out.
    LeaveThenLook,
    /// Broken, there is no barrier between the two.
    BarrierAfterLeave,
    /// Broken, a writer that waits has its waker put down after the gate may have been opened.
    WaitWhileClosed,
    /// Broken, a watcher looks for marks before it is armed, and not again.
    ArmThenLook,
    /// Broken, there is no barrier between the two.
    BarrierAfterArm,
    /// Broken, a write that is held back stays counted.
    LeaveWhenHeld,
    /// Broken, who is held back is woken before his bits are down.
    ReleaseThenWake,
}

/// Which of them are kept: all, unless a loom test says otherwise.
#[derive(Clone, Copy, Default)]
pub(super) struct Rules {
    #[cfg(loom)]
    pub(super) broken: Option<GateRule>,
}

impl Rules {
    #[cfg(not(loom))]
    #[inline]
    pub(super) const fn keeps(self, _rule: GateRule) -> bool {
        true
    }

    #[cfg(loom)]
    pub(super) fn keeps(self, rule: GateRule) -> bool {
        self.broken != Some(rule)
    }

    #[inline]
    fn fence_for(self, rule: GateRule) {
        if self.keeps(rule) {
            fence(Ordering::SeqCst);
        }
    }
}
