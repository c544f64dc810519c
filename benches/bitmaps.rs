//! What managing named bitmaps costs: verbs on those of a disk of 1 TiB in granules of 64 KiB, and how long
//! guests are held by a transaction.
//!
//! ```text
//! bitmaps/add_merge_remove/…   a clean bitmap is made, another merged into it, and it goes
//! bitmaps/claim_reclaim/…      a bitmap is claimed and given back, with nothing written meanwhile
//! bitmaps/held/switch          on four disks: add one, disable another, and two more acts; guests wait
//! bitmaps/held/merge/…         the same with ten merges into bitmaps that have something
//!              …/full          all of it is dirty
//!              …/mixed         each word of 64 granules has clean and dirty ones
//! ```
//!
//! Guests are held from within `prepare` to the end of `commit`. What is timed is all of both, with the
//! memory that is asked for before.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time"
)]

use std::time::{Duration, Instant};

use blockjob::{BitmapOptions, ClaimFor, Granularity, Node, Transaction};
use criterion::{BatchSize, Criterion};

const LEN: u64 = 1 << 40;
const GRANULE: u64 = 1 << 16;

/// What is dirty.
#[derive(Clone, Copy)]
enum Fill {
    Full,
    Mixed,
}

impl Fill {
    const ALL: [Self; 2] = [Self::Full, Self::Mixed];

    fn name(self) -> &'static str {
        match self {
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

fn run(list: Transaction) -> Duration {
    let began = Instant::now();
    let prepared = list.prepare().try_prepared().expect("nobody writes");
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
            bencher.iter_batched(|| merges(&nodes), run, BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    verbs(&mut criterion);
    held(&mut criterion);
    criterion.final_summary();
}
