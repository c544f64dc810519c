//! [`DirtyLog`] beside what else remembers where a guest wrote: marks by several threads at once, and
//! taking out what was marked.
//!
//! ```text
//! cargo bench --bench log [-- FILTER]      measures
//! cargo bench --bench log -- table         prints what was measured last, as Markdown
//!
//! log/mark-clean-N    N threads mark granules anywhere, nearly all of which are clean
//! log/mark-dirty-N    the same where every second granule is dirty, and those are marked
//! log/drain-random    one granule in 100 is dirty, anywhere
//! log/drain-runs      as many in runs of 1,000
//!
//!     blockjob        the log
//!     mutex           a bitmap behind a lock, the way of QEMU
//!     flat            an atomic word for 64 granules, looked at and then written; it has no fence, so that
//!                     data in memory may be read as it was before a write that was marked
//!     flat_fenced     the same with the fence that the log has
//!     limit           flat words that are drained by a load and a store each, so that nobody may mark meanwhile:
//!                     what a drain takes that loses nothing only while the guest stands still
//! ```
//!
//! All on 1 TiB at 64 KiB. The time of a mark is that of the whole, from the first thread's start to the
//! last one's end, by the marks of all: where threads do not slow each other down it falls as they become
//! more, until there are more of them than processors. Each thread takes places of its own from a list that
//! was made before, and the time of reading it is in that of all.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time and brings the threads"
)]

use std::fmt;
use std::hint::black_box;
use std::io;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{ByteRange, DirtyLog, Granularity, HBitmap};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use multiversion::multiversion;
use parking_lot::Mutex;

#[path = "support/random.rs"]
mod random;
#[path = "support/table.rs"]
mod table;

use random::random;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Bytes of a granule.
const GRANULE: u64 = 1 << 16;

/// How many granules there are. When each body is only to be run once, fewer do.
fn granules() -> u64 {
    if table::is_test() { 1 << 16 } else { 1 << 24 }
}

/// Marks on a clean map after which it is cleaned again: one granule in 64 is dirty then.
fn marks() -> usize {
    granules() as usize / 64
}

/// What several threads mark and one empties.
trait Marked: Sync {
    const NAME: &'static str;

    fn new() -> Self;
    fn mark(&self, granule: u64);
    /// Takes everything out, and says how many granules it was.
    fn drain(&self) -> u64;
}

fn bytes(granule: u64) -> ByteRange {
    (granule * GRANULE..(granule + 1) * GRANULE).into()
}

impl Marked for DirtyLog {
    const NAME: &'static str = "blockjob";

    fn new() -> Self {
        DirtyLog::new(granules() * GRANULE, Granularity::DEFAULT).expect("it is small enough")
    }

    #[inline]
    fn mark(&self, granule: u64) {
        DirtyLog::mark(self, bytes(granule));
    }

    fn drain(&self) -> u64 {
        let mut count = 0;
        DirtyLog::drain(self, |word| count += u64::from(word.bits.count_ones()));
        count
    }
}

impl Marked for Mutex<HBitmap> {
    const NAME: &'static str = "mutex";

    fn new() -> Self {
        let map = HBitmap::new(granules() * GRANULE, Granularity::DEFAULT);
        Mutex::new(map.expect("it is small enough"))
    }

    #[inline]
    fn mark(&self, granule: u64) {
        let is_new = self.lock().set_at(granule * GRANULE);
        black_box(is_new.expect("in bounds"));
    }

    fn drain(&self) -> u64 {
        let mut map = self.lock();
        let bytes: u64 = map.runs().map(ByteRange::len).sum();
        map.reset_all();
        bytes / GRANULE
    }
}

/// A word for 64 granules and nothing above. `FENCED` if data is not to be overtaken by its mark.
struct Flat<const FENCED: bool>(Vec<AtomicU64>);

impl<const FENCED: bool> Marked for Flat<FENCED> {
    const NAME: &'static str = if FENCED { "flat_fenced" } else { "flat" };

    fn new() -> Self {
        Self((0..granules() / 64).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    fn mark(&self, granule: u64) {
        if FENCED {
            fence(Ordering::SeqCst);
        }
        let word = &self.0[(granule / 64) as usize];
        let bit = 1 << (granule % 64);
        if word.load(Ordering::Acquire) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    fn drain(&self) -> u64 {
        let words = self.0.iter();
        let dirty = words.filter(|word| word.load(Ordering::Acquire) != 0);
        let bits = dirty.map(|word| word.swap(0, Ordering::AcqRel));
        let count = bits.map(|bits| u64::from(bits.count_ones())).sum();
        if FENCED {
            fence(Ordering::SeqCst);
        }
        count
    }
}

/// [`Flat`], drained by loads and stores: it loses what is marked meanwhile.
struct Limit(Flat<false>);

impl Marked for Limit {
    const NAME: &'static str = "limit";

    fn new() -> Self {
        Self(Flat::new())
    }

    fn mark(&self, granule: u64) {
        self.0.mark(granule);
    }

    fn drain(&self) -> u64 {
        take_all(&self.0.0)
    }
}

#[multiversion(targets("x86_64+popcnt"))]
fn take_all(words: &[AtomicU64]) -> u64 {
    // To write what is 0 already is cheaper than to guess whether it is.
    let take = |word: &AtomicU64| {
        let bits = word.load(Ordering::Relaxed);
        word.store(0, Ordering::Relaxed);
        u64::from(bits.count_ones())
    };
    words.iter().map(take).sum()
}

/// Granules anywhere, a list for each of so many threads.
fn lists(threads: usize) -> Vec<Vec<u64>> {
    let list = |seed| {
        let mut random = random(seed);
        (0..marks()).map(|_| random() % granules()).collect()
    };
    (0..threads as u64).map(list).collect()
}

/// Marks so many of each list, on a thread each. From the first one's start to the last one's end.
fn mark<M: Marked>(map: &M, lists: &[Vec<u64>], marks: u64) -> Duration {
    let start = &Barrier::new(lists.len());
    let work = move |list: &[u64]| {
        start.wait();
        let began = Instant::now();
        let mut left = marks as usize;
        while left > 0 {
            let now = left.min(list.len());
            list[..now].iter().for_each(|granule| map.mark(*granule));
            left -= now;
        }
        (began, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let running = lists.iter().map(|list| scope.spawn(move || work(list)));
        let running: Vec<_> = running.collect();
        let ended = running.into_iter().map(|thread| thread.join());
        ended.map(|times| times.expect("no panic")).collect()
    });
    let began = times.iter().map(|time| time.0).min();
    let ended = times.iter().map(|time| time.1).max();
    ended.expect("at least one") - began.expect("at least one")
}

/// How many granules are in the lists, each counted once.
fn distinct(lists: &[Vec<u64>]) -> u64 {
    let mut is_dirty = vec![false; granules() as usize];
    let granules = lists.iter().flatten();
    granules.for_each(|granule| is_dirty[*granule as usize] = true);
    is_dirty.iter().filter(|is_dirty| **is_dirty).count() as u64
}

fn mark_clean<M: Marked>(group: &mut Group<'_>, threads: usize) {
    let lists = lists(threads);
    let share = (marks() / threads) as u64;
    let mut map = None;
    group.throughput(Throughput::Elements(threads as u64));
    group.bench_function(M::NAME, |bencher| {
        let map = map.get_or_insert_with(|| {
            let map = M::new();
            mark(&map, &lists, marks() as u64);
            assert_eq!(map.drain(), distinct(&lists), "{}", M::NAME);
            map
        });
        bencher.iter_custom(|iters| {
            let mut total = Duration::ZERO;
            let mut left = iters;
            while left > 0 {
                let marks = left.min(share);
                total += mark(map, &lists, marks);
                assert!(map.drain() > 0);
                left -= marks;
            }
            total
        });
    });
}

fn mark_dirty<M: Marked>(group: &mut Group<'_>, threads: usize) {
    let mut lists = lists(threads);
    lists
        .iter_mut()
        .flatten()
        .for_each(|granule| *granule &= !1);
    let mut map = None;
    group.throughput(Throughput::Elements(threads as u64));
    group.bench_function(M::NAME, |bencher| {
        let map = map.get_or_insert_with(|| {
            let map = M::new();
            let mark_half = || {
                let granules = (0..granules()).step_by(2);
                granules.for_each(|granule| map.mark(granule));
            };
            mark_half();
            mark(&map, &lists, marks() as u64);
            assert_eq!(map.drain(), granules() / 2, "{}", M::NAME);
            mark_half();
            map
        });
        bencher.iter_custom(|iters| mark(map, &lists, iters));
    });
}

fn drain<M: Marked>(group: &mut Group<'_>, granules: &[u64]) {
    let expected = distinct(&[granules.to_vec()]);
    let map = M::new();
    group.throughput(Throughput::Elements(expected));
    group.bench_function(M::NAME, |bencher| {
        bencher.iter_custom(|iters| {
            let mut total = Duration::ZERO;
            for _ in 0..iters {
                granules.iter().for_each(|granule| map.mark(*granule));
                let start = Instant::now();
                let count = map.drain();
                total += start.elapsed();
                assert_eq!(count, expected, "{}", M::NAME);
            }
            total
        });
    });
}

#[derive(Clone, Copy)]
enum Workload {
    MarkClean(usize),
    MarkDirty(usize),
    DrainRandom,
    DrainRuns,
}

const WORKLOADS: [Workload; 8] = [
    Workload::MarkClean(1),
    Workload::MarkClean(2),
    Workload::MarkClean(4),
    Workload::MarkDirty(1),
    Workload::MarkDirty(2),
    Workload::MarkDirty(4),
    Workload::DrainRandom,
    Workload::DrainRuns,
];

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MarkClean(threads) => write!(f, "mark-clean-{threads}"),
            Self::MarkDirty(threads) => write!(f, "mark-dirty-{threads}"),
            Self::DrainRandom => f.write_str("drain-random"),
            Self::DrainRuns => f.write_str("drain-runs"),
        }
    }
}

impl Workload {
    fn run<M: Marked>(self, group: &mut Group<'_>) {
        let mut random = random(7);
        match self {
            Self::MarkClean(threads) => mark_clean::<M>(group, threads),
            Self::MarkDirty(threads) => mark_dirty::<M>(group, threads),
            Self::DrainRandom => {
                let granules: Vec<_> = (0..granules() / 100)
                    .map(|_| random() % granules())
                    .collect();
                drain::<M>(group, &granules);
            }
            Self::DrainRuns => {
                let starts = (0..granules() / 100 / 1000).map(|_| random() % (granules() - 1000));
                let granules: Vec<_> = starts.flat_map(|start| start..start + 1000).collect();
                drain::<M>(group, &granules);
            }
        }
    }
}

fn measure(criterion: &mut Criterion) {
    for workload in WORKLOADS {
        let mut group = criterion.benchmark_group(format!("log/{workload}"));
        group
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_millis(400))
            .sampling_mode(SamplingMode::Flat)
            .sample_size(15)
            .nresamples(2000);
        workload.run::<DirtyLog>(&mut group);
        workload.run::<Flat<true>>(&mut group);
        workload.run::<Flat<false>>(&mut group);
        if let Workload::DrainRandom | Workload::DrainRuns = workload {
            workload.run::<Limit>(&mut group);
        }
        workload.run::<Mutex<HBitmap>>(&mut group);
        group.finish();
    }
}

fn main() -> io::Result<()> {
    if table::is_wanted() {
        let functions = [
            DirtyLog::NAME,
            <Flat<true>>::NAME,
            <Flat<false>>::NAME,
            Limit::NAME,
            <Mutex<HBitmap>>::NAME,
        ];
        let groups = WORKLOADS.map(|workload| format!("log/{workload}"));
        return table::print("log", &functions, &groups);
    }
    let mut criterion = Criterion::default().configure_from_args();
    measure(&mut criterion);
    criterion.final_summary();
    Ok(())
}
