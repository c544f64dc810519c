//! What the gate costs a guest write: `begin_write` and `finish`, with no write in between.
//!
//! ```text
//! gate/limit/…      the two atomic operations that any gate of this kind needs, and nothing else
//! gate/nothing/…    nothing attached
//! gate/dirty/…      tracking, and the granule is dirty already
//! gate/clean/…      tracking, and the granule is clean: neighbours, and each in a word of its own
//! gate/bitmaps/N/…  as dirty, with N named bitmaps that record: what is between two rows of a path and a
//!                   number of threads is what a bitmap more costs
//! gate/backup/saved/…   a backup holds writes back, and all is on its target: what is between this and
//!                       `nothing` is what a write costs more
//! gate/backup/beside/…  the same, and what other areas hold is not on the target yet
//! gate/mirror/…     a mirror is in step, on a thread of its own, and woken by the writes
//!        …/node/N   N threads through one `Node`
//!        …/queue/N  N threads, each through its own `GuestQueue`
//! ```
//!
//! The time of a row is that of one write on each of the N threads: threads that do not slow each
//! other down leave it as it is for one, and the throughput grows by N.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time and brings the threads"
)]

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{
    Backup, BackupOptions, Begin, BitmapOptions, ByteRange, Content, Extent, Granularity,
    JobBitmap, Limits, Mirror, MirrorOptions, MirrorSync, Node, OpKind, Outcome, Status, Step, Way,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use in_step::{StopOnDrop, keep_in_step, wait_until_ready};

#[path = "support/in_step.rs"]
mod in_step;

/// Granules of the disk.
const GRANULES: u64 = 1 << 20;
const GRANULE: u64 = 1 << 16;
const THREADS: [usize; 3] = [1, 2, 4];

/// How a thread comes to the gate.
#[derive(Clone, Copy)]
enum Path {
    /// All threads share the node's own lane.
    Node,
    /// Each has a queue.
    Queue,
}

impl Path {
    const ALL: [Self; 2] = [Self::Node, Self::Queue];

    fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Queue => "queue",
        }
    }

    /// `ops` writes of one thread, where `place` says. `start` is waited for once all is set up.
    fn write(
        self,
        node: &Node,
        start: &Barrier,
        ops: u64,
        place: impl Fn(u64) -> ByteRange,
    ) -> (Instant, Instant) {
        match self {
            Self::Node => timed(start, || {
                (0..ops).for_each(|op| pass(node.begin_write(black_box(place(op)))));
            }),
            Self::Queue => {
                let queue = node.queue();
                timed(start, || {
                    (0..ops).for_each(|op| pass(queue.begin_write(black_box(place(op)))));
                })
            }
        }
    }
}

/// The write itself is left out.
#[inline(always)]
fn pass<L: Way>(begin: Begin<L>) {
    begin.go().expect("nobody holds the node").finish(());
}

fn timed(start: &Barrier, work: impl FnOnce()) -> (Instant, Instant) {
    start.wait();
    let began = Instant::now();
    work();
    (began, Instant::now())
}

/// From the first thread's start to the last one's end.
fn wall(threads: usize, work: impl Fn(usize, &Barrier) -> (Instant, Instant) + Sync) -> Duration {
    let start = Barrier::new(threads);
    let (start, work) = (&start, &work);
    let times: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|index| scope.spawn(move || work(index, start)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    let began = times.iter().map(|time| time.0).min();
    let ended = times.iter().map(|time| time.1).max();
    ended.expect("at least one") - began.expect("at least one")
}

fn granule(index: u64) -> ByteRange {
    let start = index % GRANULES * GRANULE;
    (start..start + 4096).into()
}

fn bench(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut measure: impl FnMut(usize, u64) -> Duration,
) {
    for threads in THREADS {
        group.throughput(Throughput::Elements(threads as u64));
        group.bench_function(BenchmarkId::new(name, threads), |bencher| {
            bencher.iter_custom(|iters| measure(threads, iters));
        });
    }
}

/// A cache line and its neighbour, as the gate has them.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

/// What no gate can do without: count in, look, count out, look; all in one order.
fn limit(group: &mut BenchmarkGroup<'_, WallTime>) {
    let flags = Line::default();
    bench(group, "limit/rmw_rmw", |threads, iters| {
        wall(threads, |_, start| {
            let (begun, finished) = (Line::default(), Line::default());
            timed(start, || {
                for _ in 0..iters {
                    black_box(&begun).0.fetch_add(1, Ordering::SeqCst);
                    black_box(flags.0.load(Ordering::SeqCst));
                    black_box(&finished).0.fetch_add(1, Ordering::SeqCst);
                    black_box(flags.0.load(Ordering::SeqCst));
                }
            })
        })
    });
    bench(group, "limit/store_fence_rmw", |threads, iters| {
        wall(threads, |_, start| {
            let (begun, finished) = (Line::default(), Line::default());
            timed(start, || {
                for op in 0..iters {
                    black_box(&begun).0.store(op, Ordering::Relaxed);
                    fence(Ordering::SeqCst);
                    black_box(flags.0.load(Ordering::SeqCst));
                    black_box(&finished).0.fetch_add(1, Ordering::SeqCst);
                    black_box(flags.0.load(Ordering::SeqCst));
                }
            })
        })
    });
}

fn nothing(group: &mut BenchmarkGroup<'_, WallTime>) {
    let node = Node::new(GRANULES * GRANULE);
    for path in Path::ALL {
        let name = format!("nothing/{}", path.name());
        bench(group, &name, |threads, iters| {
            wall(threads, |thread, start| {
                path.write(&node, start, iters, |_| granule(thread as u64))
            })
        });
    }
}

fn tracked() -> (Node, JobBitmap) {
    let node = Node::new(GRANULES * GRANULE);
    let guard = node.quiesce().try_guard().expect("nobody writes");
    let granularity = Granularity::from_bytes(GRANULE).expect("a power of two");
    let bitmap = node
        .track(&guard, granularity)
        .expect("a legal granularity");
    drop(guard);
    (node, bitmap)
}

fn dirty(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (node, _bitmap) = tracked();
    for thread in 0..4 {
        pass(node.begin_write(granule(thread)));
    }
    for path in Path::ALL {
        let name = format!("dirty/{}", path.name());
        bench(group, &name, |threads, iters| {
            wall(threads, |thread, start| {
                path.write(&node, start, iters, |_| granule(thread as u64))
            })
        });
    }
}

fn clean(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (node, bitmap) = tracked();
    // Neighbours share a word with 63 others; scattered, each write touches a cache line of its own
    // until the disk was gone through once.
    for (order, stride) in [("neighbours", 1), ("scattered", 513)] {
        for path in Path::ALL {
            let name = format!("clean/{}/{order}", path.name());
            bench(group, &name, |threads, iters| {
                let share = GRANULES / threads as u64;
                let mut total = Duration::ZERO;
                let mut left = iters;
                while left > 0 {
                    let ops = left.min(share);
                    left -= ops;
                    // Draining is not part of a write.
                    assert!(bitmap.lock().reset_all() || total.is_zero());
                    total += wall(threads, |thread, start| {
                        let first = thread as u64 * share;
                        path.write(&node, start, ops, |op| granule(first + op * stride % share))
                    });
                }
                total
            });
        }
    }
}

fn bitmaps(group: &mut BenchmarkGroup<'_, WallTime>) {
    for count in [0, 1, 4, 16] {
        let node = Node::new(GRANULES * GRANULE);
        let guard = node.quiesce().try_guard().expect("nobody writes");
        for index in 0..count {
            let name = index.to_string();
            let added = node.bitmaps().add(&guard, &name, BitmapOptions::default());
            added.expect("a new name");
        }
        drop(guard);
        for thread in 0..4 {
            pass(node.begin_write(granule(thread)));
        }
        for path in Path::ALL {
            let name = format!("bitmaps/{count}/{}", path.name());
            bench(group, &name, |threads, iters| {
                wall(threads, |thread, start| {
                    path.write(&node, start, iters, |_| granule(thread as u64))
                })
            });
        }
        assert_eq!(node.bitmaps().query_all().len(), count);
    }
}

fn mirror(group: &mut BenchmarkGroup<'_, WallTime>) {
    let node = Node::new(GRANULES * GRANULE);
    let limits = Limits::new(node.len());
    let mut options = MirrorOptions::default();
    options.sync = MirrorSync::None;
    let mirror = Mirror::new(&node, limits, limits, options).expect("legal options");
    let job = mirror.job().clone();
    job.start().expect("a new job");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| keep_in_step(mirror, &stop));
        // Also when a bench panics: the scope waits for the thread.
        let _stop = StopOnDrop(&stop);
        wait_until_ready(&job);
        for path in Path::ALL {
            let name = format!("mirror/{}", path.name());
            bench(group, &name, |threads, iters| {
                wall(threads, |thread, start| {
                    path.write(&node, start, iters, |_| granule(thread as u64))
                })
            });
        }
        assert_eq!(job.query().status, Status::Ready);
    });
}

/// A backup that holds writes back, of which the first chunk is copied, or all.
fn backup(node: &Node, is_all_copied: bool) -> Backup {
    let limits = Limits::new(node.len());
    let mut options = BackupOptions::default();
    options.job.id = Some("bench".to_owned());
    // So that it goes on to hold writes back when all is copied.
    options.job.auto_finalize = false;
    let mut backup = Backup::new(node, limits, limits, options).expect("legal options");
    backup.job().start().expect("a new job");
    loop {
        match backup.poll(Duration::ZERO, Waker::noop()) {
            Step::Op(op) => {
                let is_first = op.kind().range().is_some_and(|range| range.contains(0));
                let outcome = match op.kind() {
                    OpKind::Status(range) => Outcome::Status(Extent {
                        len: range.len(),
                        content: Content::Data,
                        in_top: true,
                    }),
                    _ => Outcome::Done,
                };
                let is_copy = matches!(op.kind(), OpKind::Copy(_));
                backup.op_done(Duration::ZERO, op, outcome);
                if is_copy && is_first && !is_all_copied {
                    return backup;
                }
            }
            Step::Wait { .. } => {
                assert_eq!(backup.job().query().status, Status::Pending);
                return backup;
            }
            step => unreachable!("nobody asks for the end: {step:?}"),
        }
    }
}

fn backups(group: &mut BenchmarkGroup<'_, WallTime>) {
    for (name, is_all_copied) in [("saved", true), ("beside", false)] {
        let node = Node::new(GRANULES * GRANULE);
        let backup = backup(&node, is_all_copied);
        let is_held = node.begin_write(granule(GRANULES / 2)).go().is_none();
        assert_eq!(is_held, !is_all_copied);
        for path in Path::ALL {
            let name = format!("backup/{name}/{}", path.name());
            bench(group, &name, |threads, iters| {
                wall(threads, |thread, start| {
                    path.write(&node, start, iters, |_| granule(thread as u64))
                })
            });
        }
        drop(backup);
    }
}

fn gate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gate");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    limit(&mut group);
    nothing(&mut group);
    dirty(&mut group);
    clean(&mut group);
    bitmaps(&mut group);
    backups(&mut group);
    mirror(&mut group);
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    gate(&mut criterion);
    criterion.final_summary();
}
