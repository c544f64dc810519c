//! Holding single writes back until what they would overwrite was saved.
//!
//! ```text
//!                    a bit of its clusters is up?
//!  guest ─▶ gate ───no──▶ write
//!             └─────yes─▶ wait ──▶ the job saves the clusters, and takes their bits down ──▶ gate
//! ```
//!
//! Invariants:
//!
//! 1. Bits go up only while the node is quiesced, before the first write can see them, and all at once.
//!    Later they only go down. So a write that found its bits down needs not look again.
//! 2. A write looks at the bits after the gate has counted it, and is not inside while it waits: who waits
//!    for a job does not keep the node from being quiesced.
//! 3. A write that waits is put down under the lock and looks at the bits once more under it. Who takes
//!    bits down does so under the lock, and wakes afterwards.
//! 4. Nobody waits for a job that is gone: with its [`WriteHold`] all bits count as down. Nor is it remembered
//!    who waited: when a write comes by again only after the next job has begun, that is told of it.
//! 5. A hold that has ended changes nothing any more, however late others let go of it: the bits may be those
//!    of the next job.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::task::Waker;

use super::gate::{GateRule, WaiterId};
use super::ticket::NotSaved;
use super::{Inner, Node, QuiesceGuard};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::units::{ByteRange, Granularity};

/// The smallest cluster that writes are held back by: 4 KiB.
const CLUSTER_EXPONENT_MIN: u8 = 12;
/// The largest: 2 GiB.
const CLUSTER_EXPONENT_MAX: u8 = 31;
const MAPS: usize = (CLUSTER_EXPONENT_MAX - CLUSTER_EXPONENT_MIN) as usize + 1;

/// The bits by which writes are held back, one place per cluster size, filled when it is first needed. A
/// map stays for the life of the node, so that writes look at it without a lock.
pub(super) struct HoldMaps([OnceLock<Box<HoldMap>>; MAPS]);

struct HoldMap {
    granularity: Granularity,
    words: Box<[AtomicU64]>,
    /// A longer one, for a disk that has grown since. It is at least twice as long, so there are few.
    next: OnceLock<Box<HoldMap>>,
}

/// Who waits, and who works for them.
#[derive(Default)]
pub(super) struct Held {
    writers: BTreeMap<WaiterId, HeldWriter>,
    /// Those the job has not been told of, in the order in which they came. None of them but who waits.
    news: BTreeMap<u64, WaiterId>,
    next_news: u64,
    /// Wakes who drives the job.
    job: Option<Waker>,
    /// How many holds there were.
    count: u64,
    /// Which of them it is that holds writes back.
    current: Option<u64>,
}

struct HeldWriter {
    range: ByteRange,
    waker: Option<Waker>,
    /// Where it is in the news.
    news: u64,
    /// What the job has decided, if it has given up.
    refused: Option<NotSaved>,
}

/// A guest write that waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WaitingWrite {
    pub(crate) id: WaiterId,
    pub(crate) range: ByteRange,
}

/// That a job holds writes back. All of them go on when it [ends](Self::end), or is dropped.
pub(crate) struct WriteHold {
    node: Arc<Inner>,
    /// Which of the holds of the node.
    id: u64,
    /// Which of the maps.
    index: usize,
}

impl Default for HoldMaps {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl HoldMaps {
    /// Whether a bit of `range` is up.
    pub(super) fn holds(&self, index: usize, range: ByteRange) -> bool {
        self.0[index].get().is_some_and(|map| map.last().any(range))
    }

    /// A map for `len` bytes. One at a time asks.
    fn of(&self, len: u64, granularity: Granularity) -> Result<&HoldMap, HoldError> {
        let index = usize::from(granularity.exponent() - CLUSTER_EXPONENT_MIN);
        let Some(first) = self.0[index].get() else {
            let made = Box::new(HoldMap::new(len, granularity)?);
            return Ok(self.0[index].get_or_init(|| made));
        };
        let last = first.last();
        let bits = last.words.len() as u64 * 64;
        if bits >= granularity.granules_in(len) {
            return Ok(last);
        }
        let twice = bits.saturating_mul(2).saturating_mul(granularity.bytes());
        let made = HoldMap::new(len.max(twice), granularity);
        let made = Box::new(made.or_else(|_| HoldMap::new(len, granularity))?);
        Ok(last.next.get_or_init(|| made))
    }
}

impl HoldMap {
    fn new(len: u64, granularity: Granularity) -> Result<Self, HoldError> {
        let count = granularity.granules_in(len).div_ceil(64);
        let mut words = Vec::new();
        usize::try_from(count)
            .ok()
            .and_then(|count| words.try_reserve_exact(count).ok())
            .ok_or(HoldError::OutOfMemory)?;
        words.resize_with(count as usize, || AtomicU64::new(0));
        Ok(Self {
            granularity,
            words: words.into(),
            next: OnceLock::new(),
        })
    }

    fn last(&self) -> &Self {
        let mut last = self;
        while let Some(next) = last.next.get() {
            last = next;
        }
        last
    }

    #[inline]
    fn any(&self, range: ByteRange) -> bool {
        self.words_of(range)
            .any(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// The words that `range` touches, and their bits in it. Past the end there are none.
    #[inline]
    fn words_of(&self, range: ByteRange) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let granules = self.granularity.outward(range);
        let first = granules.start;
        let end = granules.end.min(self.words.len() as u64 * 64);
        let words = match first < end {
            true => (first / 64) as usize..end.div_ceil(64) as usize,
            false => 0..0,
        };
        words.map(move |index| {
            let start = index as u64 * 64;
            let from = first.saturating_sub(start);
            let to = (end - start).min(64);
            (
                &self.words[index],
                (u64::MAX << from) & (u64::MAX >> (64 - to)),
            )
        })
    }
}

/// Why writes cannot be held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HoldError {
    OutOfMemory,
}

impl Held {
    /// Writes are held back from now on; by what.
    pub(super) fn begin(&mut self) -> u64 {
        self.count += 1;
        self.current = Some(self.count);
        self.count
    }

    /// Whether that is what holds writes back.
    pub(super) fn is_by(&self, id: u64) -> bool {
        self.current == Some(id)
    }

    /// They are not any more. All who wait are forgotten: one that comes by only when the next job holds writes
    /// back must be told to that. Gives back the waker to drop, and those to call, outside of the lock.
    pub(super) fn end(&mut self) -> (Option<Waker>, Vec<Waker>) {
        self.current = None;
        self.news.clear();
        let writers = std::mem::take(&mut self.writers).into_values();
        let wakers = writers.filter_map(|writer| writer.waker).collect();
        (self.job.take(), wakers)
    }

    /// Puts down that a write waits. Gives back the wakers to call and to drop, outside of the lock.
    pub(super) fn wait(
        &mut self,
        id: WaiterId,
        range: ByteRange,
        waker: Option<&Waker>,
    ) -> [Option<Waker>; 2] {
        let mut job = None;
        let writer = self.writers.entry(id).or_insert_with(|| {
            let news = self.next_news;
            self.next_news += 1;
            self.news.insert(news, id);
            job = self.job.clone();
            HeldWriter {
                range,
                waker: None,
                news,
                refused: None,
            }
        });
        let unused = match (waker, &writer.waker) {
            (Some(waker), Some(known)) if known.will_wake(waker) => None,
            (Some(waker), _) => writer.waker.replace(waker.clone()),
            (None, _) => None,
        };
        [job, unused]
    }

    /// What the job has decided of a write.
    pub(super) fn refused(&self, id: WaiterId) -> Option<NotSaved> {
        self.writers.get(&id)?.refused
    }

    /// It does not wait any more. Gives back a waker to drop outside of the lock.
    #[must_use]
    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Waker> {
        let writer = self.writers.remove(&id)?;
        self.news.remove(&writer.news);
        writer.waker
    }

    fn wakers_in(&mut self, range: ByteRange) -> Vec<Waker> {
        let touched = self.writers.values_mut();
        let touched = touched.filter(|writer| writer.range.overlaps(range));
        touched.filter_map(|writer| writer.waker.take()).collect()
    }
}

impl WriteHold {
    /// Holds back from now on every write that touches a dirty granule of `clusters`, a bitmap for this
    /// node with granules of 4 KiB to 2 GiB.
    ///
    /// On error nothing is held back.
    pub(crate) fn new(
        node: &Node,
        guard: &QuiesceGuard,
        clusters: &HBitmap,
    ) -> Result<Self, HoldError> {
        assert!(guard.is_of(node), "a job quiesces its own node");
        let node = Arc::clone(node.inner());
        let granularity = clusters.granularity();
        let map = node.gate.holds.of(clusters.len(), granularity)?;
        for word in &map.words {
            word.store(0, Ordering::Relaxed);
        }
        for run in clusters.runs() {
            for (word, mask) in map.words_of(run) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
        let index = usize::from(granularity.exponent() - CLUSTER_EXPONENT_MIN);
        let id = node.gate.hold_back(index);
        Ok(Self { node, id, index })
    }

    /// Lets writes pass in all clusters of `range`, which is made of whole ones.
    pub(crate) fn release(&self, range: ByteRange) {
        let Some(map) = self.node.gate.holds.0[self.index].get() else {
            return;
        };
        let is_in_order = self.node.gate.rules.keeps(GateRule::ReleaseThenWake);
        // Also who writes past the end of the disk, in its last cluster.
        let end = map.granularity.align_up(range.end());
        let woken = (range.start()..end).into();
        let take_down = || {
            for (word, mask) in map.last().words_of(range) {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        };
        let wakers = self.node.gate.with_held(|held| {
            if !held.is_by(self.id) && !is_broken(Sabotage::LetGoLate) {
                return Vec::new();
            }
            if is_in_order {
                take_down();
            }
            held.wakers_in(woken)
        });
        wakers.into_iter().for_each(Waker::wake);
        if !is_in_order {
            take_down();
        }
    }

    /// All writes go on. Others may have this still: it does nothing any more.
    pub(crate) fn end(&self) {
        if is_broken(Sabotage::HoldForEver) {
            return;
        }
        if let Some((job, wakers)) = self.node.gate.let_go(self.id) {
            drop(job);
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Whether a write to `range` would have to wait.
    pub(crate) fn holds(&self, range: ByteRange) -> bool {
        self.node.gate.holds.holds(self.index, range)
    }

    /// The writes that came since this was asked last. `waker` is called when another comes.
    pub(crate) fn news(&self, waker: &Waker) -> Vec<WaitingWrite> {
        let (news, unused) = self.node.gate.with_held(|held| {
            let unused = match &held.job {
                Some(known) if known.will_wake(waker) => None,
                _ => held.job.replace(waker.clone()),
            };
            if held.news.is_empty() {
                return (Vec::new(), unused);
            }
            let news = std::mem::take(&mut held.news);
            let news = news.into_values().filter_map(|id| {
                let range = held.writers.get(&id)?.range;
                Some(WaitingWrite { id, range })
            });
            (news.collect(), unused)
        });
        drop(unused);
        news
    }

    /// Has who drives the job look again.
    pub(crate) fn wake_job(&self) {
        let job = self.node.gate.with_held(|held| held.job.clone());
        if let Some(job) = job {
            job.wake();
        }
    }

    /// Whether somebody waits still for that write.
    pub(crate) fn is_waiting(&self, id: WaiterId) -> bool {
        self.node.gate.with_held(|held| {
            let writer = held.writers.get(&id);
            writer.is_some_and(|writer| writer.refused.is_none())
        })
    }

    /// The guest is told that its write fails. Nothing was written.
    pub(crate) fn refuse(&self, id: WaiterId, why: NotSaved) {
        let waker = self.node.gate.with_held(|held| {
            let writer = held.writers.get_mut(&id)?;
            writer.refused = Some(why);
            writer.waker.take()
        });
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for WriteHold {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for WriteHold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteHold").finish_non_exhaustive()
    }
}
