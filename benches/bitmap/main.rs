//! [`HBitmap`] beside the maps that one would take otherwise, and beside a flat one that is as fast as
//! a loop over words can be.
//!
//! ```text
//! cargo bench --bench bitmap [-- FILTER]      measures
//! cargo bench --bench bitmap -- table         prints what was measured last, as Markdown
//! ```
//!
//! After `-- --test` each body runs once, on maps of 4 GiB.
//!
//! The groups are `bitmap/SIZE/WORKLOAD`, the functions are named after the crates; `limit` is the flat
//! one. A granule has 64 KiB. Where a workload is of many equal calls, the throughput is in calls, and
//! where a walk is over bits or runs in those, so that a table can tell the time of one.
//!
//! ```text
//! set-1-clean      one granule, anywhere, in a map that was clean; 16 and 1024 of them in one call
//! set-1-dirty      the same where half of the granules are dirty
//! set-1-hot        eight granules, again and again
//! …-cold           the same where no map is in the caches
//! reset-1-full     one granule, anywhere, in a map that was full
//! bits-…, runs-…   walks over a map
//! merge-…          a map into another that has as much in other places
//! merge-into-empty a full map into an empty one
//! merge-finer      64 KiB into 1 MiB, both with half of the granules dirty
//! serialize-half   to bytes and from them; for the flat maps that is a copy, ours counts what it reads
//! clone-half, equal-half
//! new              an empty map
//! ```
//!
//! The sizes are disks of 16 GiB, 1 TiB and 64 TiB. A map of the last takes 128 MiB, and a cell up to a gigabyte. There
//! `hibitset` ends, and where much is dirty the others take half a minute a cell, and tell no more than on 1 TiB: of those
//! rows only ours and the limit are measured.
//!
//! Before a cell is measured, its result is compared with that of a program which looks at one bit after
//! the other. What must be made anew for each pass, because the pass changes it, is made and dropped off
//! the clock. It is copied, and so in the caches as far as it fits, but for the rows that end in `cold`.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time"
)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use bitvec::vec::BitVec;
use blockjob::HBitmap;
use criterion::{Criterion, SamplingMode};
use croaring::Bitmap;
use fixedbitset::FixedBitSet;
use hibitset::BitSet;
use roaring::RoaringBitmap;

use self::limit::Flat;
use self::maps::Pattern::{self, Clustered, Empty, Full, Half, Sparse};
use self::measure::{Calls, Group};
use self::peers::{Peer, Stored};

mod limit;
mod maps;
mod measure;
mod peers;
#[path = "../support/random.rs"]
mod random;
#[path = "../support/table.rs"]
mod table;

struct Size {
    name: &'static str,
    granules: u64,
    workloads: &'static [Workload],
}

impl Size {
    /// How many granules are measured. When each body is only to be run once, fewer do.
    fn granules(&self) -> u64 {
        if table::is_test() {
            self.granules.min(1 << 16)
        } else {
            self.granules
        }
    }
}

/// More granules than this are measured of fewer maps, and in fewer passes.
const HUGE: u64 = 1 << 24;

const SIZES: [Size; 3] = [
    Size {
        name: "16GiB",
        granules: 1 << 18,
        workloads: &WORKLOADS,
    },
    Size {
        name: "1TiB",
        granules: 1 << 24,
        workloads: &WORKLOADS,
    },
    Size {
        name: "64TiB",
        granules: 1 << 30,
        workloads: &WORKLOADS,
    },
];

const WORKLOADS: [Workload; 33] = [
    Workload::Set(Empty, ONE),
    Workload::Set(Half, ONE),
    Workload::SetHot,
    Workload::Set(Empty, SOME),
    Workload::Set(Half, SOME),
    Workload::Set(Empty, MANY),
    Workload::Set(Half, MANY),
    Workload::Reset(ONE),
    Workload::Reset(SOME),
    Workload::Reset(MANY),
    Workload::Set(Empty, ONE.cold()),
    Workload::Set(Half, ONE.cold()),
    Workload::Set(Empty, MANY.cold()),
    Workload::Reset(MANY.cold()),
    Workload::Bits(Sparse),
    Workload::Bits(Clustered),
    Workload::Bits(Half),
    Workload::Bits(Full),
    Workload::Runs(Sparse),
    Workload::Runs(Clustered),
    Workload::Runs(Half),
    Workload::Runs(Full),
    Workload::Merge(Sparse),
    Workload::Merge(Clustered),
    Workload::Merge(Half),
    Workload::Merge(Full),
    Workload::MergeIntoEmpty,
    Workload::MergeFiner,
    Workload::Serialize,
    Workload::Deserialize,
    Workload::Clone,
    Workload::Equal,
    Workload::New,
];

const ONE: Calls = Calls::new(1, 1 << 8);
const SOME: Calls = Calls::new(16, 1 << 10);
const MANY: Calls = Calls::new(1024, 1 << 14);

#[derive(Clone, Copy)]
enum Workload {
    Set(Pattern, Calls),
    SetHot,
    Reset(Calls),
    Bits(Pattern),
    Runs(Pattern),
    Merge(Pattern),
    MergeIntoEmpty,
    MergeFiner,
    Serialize,
    Deserialize,
    New,
    Clone,
    Equal,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(Empty, calls) => write!(f, "set-{}-clean{}", calls.len, calls.suffix()),
            Self::Set(_, calls) => write!(f, "set-{}-dirty{}", calls.len, calls.suffix()),
            Self::SetHot => f.write_str("set-1-hot"),
            Self::Reset(calls) => write!(f, "reset-{}-full{}", calls.len, calls.suffix()),
            Self::Bits(pattern) => write!(f, "bits-{}", pattern.name()),
            Self::Runs(pattern) => write!(f, "runs-{}", pattern.name()),
            Self::Merge(pattern) => write!(f, "merge-{}", pattern.name()),
            Self::MergeIntoEmpty => f.write_str("merge-into-empty"),
            Self::MergeFiner => f.write_str("merge-finer"),
            Self::Serialize => f.write_str("serialize-half"),
            Self::Deserialize => f.write_str("deserialize-half"),
            Self::New => f.write_str("new"),
            Self::Clone => f.write_str("clone-half"),
            Self::Equal => f.write_str("equal-half"),
        }
    }
}

impl Workload {
    /// Time on the clock. What is made anew for each pass takes longer than the pass, and is not on it.
    fn measurement_time(self) -> Duration {
        Duration::from_millis(match self {
            Self::SetHot | Self::Bits(_) | Self::Runs(_) | Self::Equal => 300,
            _ => 50,
        })
    }

    fn run(self, group: &mut Group<'_>, granules: u64) {
        self.run_for::<HBitmap>(group, granules);
        self.run_for::<Flat>(group, granules);
        self.run_stored::<HBitmap>(group, granules);
        self.run_stored::<Flat>(group, granules);
        if granules > HUGE && self.is_long() {
            return;
        }
        self.run_for::<BitSet>(group, granules);
        self.run_for::<RoaringBitmap>(group, granules);
        self.run_for::<Bitmap>(group, granules);
        self.run_for::<FixedBitSet>(group, granules);
        self.run_for::<BitVec<u64>>(group, granules);

        self.run_stored::<RoaringBitmap>(group, granules);
        self.run_stored::<Bitmap>(group, granules);
        self.run_stored::<FixedBitSet>(group, granules);
        self.run_stored::<BitVec<u64>>(group, granules);
    }

    /// Whether much is dirty.
    fn is_long(self) -> bool {
        match self {
            Self::Set(Half | Full, _) | Self::Reset(_) => true,
            Self::Bits(pattern) | Self::Runs(pattern) | Self::Merge(pattern) => {
                matches!(pattern, Half | Full)
            }
            Self::MergeIntoEmpty | Self::MergeFiner => true,
            Self::Serialize | Self::Deserialize | Self::Clone | Self::Equal => true,
            Self::Set(..) | Self::SetHot | Self::New => false,
        }
    }

    fn run_for<P: Peer>(self, group: &mut Group<'_>, granules: u64) {
        if granules > P::GRANULES_MAX {
            return;
        }
        let words = |pattern: Pattern| move || pattern.words(granules, 1);
        let both = |into: Vec<u64>, from: Vec<u64>| {
            (
                P::from_words(&into),
                P::from_words(&from),
                maps::union(&into, &from),
            )
        };
        // A pass over a short map would take no longer than a look at the clock.
        let copies = ((1 << 21) / granules).max(1) as usize;
        match self {
            Self::Set(pattern, calls) if calls.len == 1 => {
                let set = |map: &mut P, one: Range<u64>| map.set(one.start);
                measure::calls(group, granules, pattern, calls, maps::set, set);
            }
            Self::Set(pattern, calls) => {
                measure::calls(group, granules, pattern, calls, maps::set, P::set_range);
            }
            Self::SetHot => measure::hot::<P>(group, granules),
            Self::Reset(calls) if calls.len == 1 => {
                let reset = |map: &mut P, one: Range<u64>| map.reset(one.start);
                measure::calls(group, granules, Full, calls, maps::reset, reset);
            }
            Self::Reset(calls) => {
                measure::calls(group, granules, Full, calls, maps::reset, P::reset_range);
            }
            Self::Bits(pattern) => {
                measure::walk::<P, _>(group, words(pattern), P::sum_bits, maps::sum);
            }
            Self::Runs(pattern) => {
                measure::walk::<P, _>(group, words(pattern), P::runs, maps::runs);
            }
            Self::Merge(pattern) => {
                let make = || both(pattern.words(granules, 1), pattern.words(granules, 2));
                measure::merge::<P>(group, copies, make, P::merge);
            }
            Self::MergeIntoEmpty => {
                let make = || both(Empty.words(granules, 0), Full.words(granules, 0));
                measure::merge::<P>(group, copies, make, P::merge);
            }
            Self::MergeFiner => {
                let make = || {
                    let coarse = Half.words(granules / 16, 1);
                    let fine = Half.words(granules, 2);
                    let union = maps::union(&coarse, &maps::coarsened(&fine));
                    (P::coarse_from_words(&coarse), P::from_words(&fine), union)
                };
                measure::merge::<P>(group, copies, make, P::merge_finer);
            }
            Self::New => measure::make::<P, _, _>(group, || {}, |()| P::new(granules)),
            Self::Clone => {
                let set_up = || P::from_words(&Half.words(granules, 1));
                measure::make::<P, _, _>(group, set_up, |map| map.clone());
            }
            Self::Equal => measure::equal::<P>(group, &Half.words(granules, 1)),
            Self::Serialize | Self::Deserialize => {}
        }
    }

    fn run_stored<P: Stored>(self, group: &mut Group<'_>, granules: u64) {
        let set_up = || {
            let words = Half.words(granules, 1);
            let map = P::from_words(&words);
            let mut bytes = Vec::new();
            map.store(&mut bytes);
            measure::check(&P::load(&bytes), &words);
            (map, bytes)
        };
        match self {
            Self::Serialize => measure::make::<P, _, _>(group, set_up, |(map, bytes)| {
                map.store(bytes);
            }),
            Self::Deserialize => {
                measure::make::<P, _, _>(group, set_up, |(_, bytes)| P::load(bytes));
            }
            _ => {}
        }
    }
}

fn main() -> io::Result<()> {
    if table::is_wanted() {
        return print_tables();
    }
    let mut criterion = Criterion::default().configure_from_args();
    for size in SIZES {
        for workload in size.workloads {
            let mut group = criterion.benchmark_group(format!("bitmap/{}/{workload}", size.name));
            group
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(workload.measurement_time())
                .sampling_mode(SamplingMode::Flat)
                .sample_size(if size.granules() > HUGE { 10 } else { 15 })
                .nresamples(2000);
            workload.run(&mut group, size.granules());
            group.finish();
        }
    }
    criterion.final_summary();
    Ok(())
}

fn print_tables() -> io::Result<()> {
    let functions = [
        HBitmap::NAME,
        Flat::NAME,
        BitSet::NAME,
        RoaringBitmap::NAME,
        Bitmap::NAME,
        FixedBitSet::NAME,
        <BitVec<u64>>::NAME,
    ];
    for size in SIZES {
        let groups = size.workloads.iter();
        let groups = groups.map(|workload| format!("bitmap/{}/{workload}", size.name));
        table::print(size.name, &functions, &groups.collect::<Vec<_>>())?;
    }
    Ok(())
}
