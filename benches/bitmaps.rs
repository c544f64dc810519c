//! What named bitmaps of a disk of 1 TiB in granules of 64 KiB cost: guest writes that are recorded in them,
//! verbs, and how long guests are held by a transaction.
//!
//! ```text
//! writes                       a table: a write of each of four threads, recorded by so many bitmaps
//!        dirty                 in granules that are dirty already
//!        anywhere              in any granules; nobody looks at the bitmaps
//!        looked at             the same, and all bitmaps are looked at after each 10,000 writes of a thread
//! bitmaps/add_merge_remove/…   a clean bitmap is made, another merged into it, and it goes
//! bitmaps/claim_reclaim/…      a bitmap is claimed and given back, with nothing written meanwhile
//! bitmaps/held/switch          on four disks: add one, disable another, and two more acts; guests wait
//! bitmaps/held/merge/…         the same with ten merges into bitmaps that have something
//!              …/full          all of it is dirty
//!              …/mixed         each word of 64 granules has clean and dirty ones
//! ```
//!
//! The table is not criterion's: each round measures all numbers of bitmaps one after the other, and ratios are
//! those within a round, so that a machine that is slow for a while is so for all. `cargo bench --bench bitmaps
//! -- writes` prints it alone.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time"
)]

#[path = "support/random.rs"]
mod random;

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{BitmapOptions, ClaimFor, Granularity, Node, Transaction};
use criterion::Criterion;

use random::random;

const LEN: u64 = 1 << 40;
const GRANULE: u64 = 1 << 16;

/// How many bitmaps record.
const COUNTS: [usize; 4] = [0, 1, 4, 16];
/// What all ratios are of: one that records.
const BASE: usize = 1;
const THREADS: u64 = 4;

/// Where guests write, and who looks.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    Dirty,
    Anywhere,
    LookedAt,
}

impl Load {
    /// Nanoseconds of one write, with those of all threads at the same time.
    fn measure(self, node: &Node, ops: u64, seed: u64) -> f64 {
        let start = Barrier::new(THREADS as usize);
        let thread = |index: u64| {
            let queue = node.queue();
            let mut random = random(seed * THREADS + index);
            start.wait();
            let began = Instant::now();
            for op in 0..ops {
                let granule = match self {
                    Self::Dirty => index,
                    Self::Anywhere | Self::LookedAt => random() % (LEN / GRANULE),
                };
                let at = granule * GRANULE;
                let begin = queue.begin_write((at..at + 4096).into());
                begin.go().expect("nobody holds it").finish(());
                if self == Self::LookedAt && op % 10_000 == 0 {
                    let _ = node.bitmaps().query_all();
                }
            }
            (began, Instant::now())
        };
        let thread = &thread;
        let times: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..THREADS)
                .map(|index| scope.spawn(move || thread(index)))
                .collect();
            let joined = running.into_iter().map(|running| running.join());
            joined.map(|times| times.expect("no panic")).collect()
        });
        let began = times.iter().map(|time| time.0).min();
        let ended = times.iter().map(|time| time.1).max();
        let wall = ended.expect("some") - began.expect("some");
        wall.as_nanos() as f64 / (ops * THREADS) as f64
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints what a guest write costs by the number of bitmaps.
fn writes(rounds: u64, ops: u64) {
    let nodes = COUNTS.map(|count| {
        let names: Vec<_> = (0..count).map(|index| index.to_string()).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let node = Fill::None.node(&names);
        assert_eq!(node.bitmaps().query_all().len(), count);
        node
    });
    println!("| bitmaps that record | dirty | anywhere | looked at |");
    println!("|---:|---:|---:|---:|");
    let mut cells = COUNTS.map(|count| vec![count.to_string()]);
    for load in [Load::Dirty, Load::Anywhere, Load::LookedAt] {
        let mut times = COUNTS.map(|_| Vec::new());
        for round in 0..=rounds {
            for (node, times) in nodes.iter().zip(&mut times) {
                let time = load.measure(node, ops, round);
                // The first one warms up.
                if round > 0 {
                    times.push(time);
                }
            }
        }
        let base = times[BASE].clone();
        for (cells, times) in cells.iter_mut().zip(times) {
            let ratios = times.iter().zip(&base).map(|(time, base)| time / base);
            let ratio = median(ratios.collect());
            cells.push(format!("{:.1} ns, {ratio:.2}", median(times)));
        }
    }
    for cells in cells {
        println!("| {} |", cells.join(" | "));
    }
    println!();
}

/// What is dirty.
#[derive(Clone, Copy)]
enum Fill {
    None,
    Full,
    Mixed,
}

impl Fill {
    const ALL: [Self; 2] = [Self::Full, Self::Mixed];

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Full => "full",
            Self::Mixed => "mixed",
        }
    }

    /// A disk with `names`, which record and have this.
    fn node(self, names: &[&str]) -> Node {
        let node = Node::new(LEN);
        let guard = node.quiesce().try_guard().expect("nobody writes");
        for name in names {
            let added = node.bitmaps().add(&guard, name, BitmapOptions::default());
            added.expect("a new name");
        }
        drop(guard);
        let write = |start: u64, end: u64| {
            let begin = node.begin_write((start..end).into());
            begin.go().expect("nobody holds it").finish(());
        };
        match self {
            Self::None => {}
            Self::Full => write(0, LEN),
            Self::Mixed => {
                for word in 0..LEN / GRANULE / 64 {
                    // Another place in each word.
                    let start = (word * 64 + word % 61) * GRANULE;
                    write(start, start + 3 * GRANULE);
                }
            }
        }
        assert_eq!(
            Granularity::DEFAULT.bytes(),
            GRANULE,
            "what bitmaps have unless told otherwise"
        );
        node
    }
}

fn verbs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmaps");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    for fill in Fill::ALL {
        let node = fill.node(&["a"]);
        let bitmaps = node.bitmaps();
        group.bench_function(format!("add_merge_remove/{}", fill.name()), |bencher| {
            bencher.iter(|| {
                bitmaps
                    .add_disabled("b", BitmapOptions::default())
                    .expect("a new name");
                bitmaps.merge("b", &[(&node, "a")]).expect("both are there");
                bitmaps.remove("b").expect("it is idle");
            });
        });
        group.bench_function(format!("claim_reclaim/{}", fill.name()), |bencher| {
            bencher.iter(|| drop(bitmaps.claim("a", ClaimFor::Change).expect("it is idle")));
        });
    }
    group.finish();
}

/// Eight acts that exchange a bitmap on four disks, and two more.
fn switch(nodes: &[Node; 4]) -> Transaction {
    let mut list = Transaction::new();
    for node in nodes {
        list.disable(node, "a")
            .add(node, "next", BitmapOptions::default());
    }
    list.clear(&nodes[0], "b").enable(&nodes[1], "b");
    list
}

/// Ten merges, half of them from another disk.
fn merges(nodes: &[Node; 4]) -> Transaction {
    let mut list = Transaction::new();
    for index in 0..10 {
        let (node, other) = (&nodes[index % 4], &nodes[(index + index / 5) % 4]);
        list.merge(node, "a", &[(other, "b")]);
    }
    list
}

/// How long guests wait: their gates are closed when `prepare` returns, and open before `commit` does.
fn run(list: Transaction) -> Duration {
    let preparing = list.prepare();
    let began = Instant::now();
    let prepared = preparing.try_prepared().expect("nobody writes");
    prepared.expect("legal acts").commit();
    began.elapsed()
}

fn held(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmaps/held");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    for fill in Fill::ALL {
        let nodes = [(); 4].map(|()| fill.node(&["a", "b"]));
        group.bench_function(format!("switch/{}", fill.name()), |bencher| {
            bencher.iter_custom(|iters| {
                let mut total = Duration::ZERO;
                for _ in 0..iters {
                    total += run(switch(&nodes));
                    for node in &nodes {
                        node.bitmaps().remove("next").expect("it is idle");
                    }
                }
                total
            });
        });
        group.bench_function(format!("merge/{}", fill.name()), |bencher| {
            bencher.iter_custom(|iters| (0..iters).map(|_| run(merges(&nodes))).sum());
        });
    }
    group.finish();
}

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let is_named = |name: &str| args.iter().any(|arg| arg == name);
    if is_named("--test") {
        writes(1, 1);
    } else if is_named("writes") {
        return writes(31, 100_000);
    } else if args.iter().all(|arg| arg.starts_with("--")) {
        writes(31, 100_000);
    }
    let mut criterion = Criterion::default().configure_from_args();
    verbs(&mut criterion);
    held(&mut criterion);
    criterion.final_summary();
}
