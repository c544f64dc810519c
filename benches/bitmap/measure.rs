//! The ways of measuring. In each of them the maps are made once it is known that they are wanted, and
//! what comes out of a pass is compared with what an obvious program makes of the same bits.

use std::fmt::Debug;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{Bencher, BenchmarkGroup, Throughput};

use super::maps::{self, Pattern};
use super::peers::Peer;
use super::random;

pub(crate) type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Calls of one pass, which must leave a map about as it was.
#[derive(Clone, Copy)]
pub(crate) struct Calls {
    /// Granules of each.
    pub(crate) len: u64,
    /// Granules that the map has for each call.
    pub(crate) of: u64,
    /// Whether something else has had the caches before.
    is_cold: bool,
}

impl Calls {
    pub(crate) const fn new(len: u64, of: u64) -> Self {
        let is_cold = false;
        Self { len, of, is_cold }
    }

    pub(crate) const fn cold(self) -> Self {
        Self {
            is_cold: true,
            ..self
        }
    }

    pub(crate) fn suffix(self) -> &'static str {
        if self.is_cold { "-cold" } else { "" }
    }
}

/// Words of what the caches are filled with where they shall be cold: 32 MiB.
const ELSEWHERE: usize = 4 << 20;

/// Places that come round again after so many, too late for a branch predictor to know them.
const PLACES: usize = 1 << 18;

/// Calls anywhere in a map. Every pass begins with the same map, and takes other places.
pub(crate) fn calls<P: Peer>(
    group: &mut Group<'_>,
    granules: u64,
    pattern: Pattern,
    calls: Calls,
    naive: fn(&mut [u64], Range<u64>),
    call: impl Fn(&mut P, Range<u64>) -> bool,
) {
    let count = PLACES.min((granules / calls.of) as usize);
    let pass = |map: &mut P, places: &[u64]| {
        let mut changes = 0;
        for start in places {
            changes += u64::from(call(map, *start..start + calls.len));
        }
        changes
    };
    let set_up = || {
        let mut random = random::random(2);
        let places: Vec<u64> = (0..PLACES)
            .map(|_| random() % (granules - calls.len + 1))
            .collect();

        let mut words = pattern.words(granules, 1);
        let before = P::from_words(&words);
        let mut map = before.clone();
        pass(&mut map, &places[..count]);
        for start in &places[..count] {
            naive(&mut words, *start..start + calls.len);
        }
        check(&map, &words);
        let elsewhere = vec![1_u64; if calls.is_cold { ELSEWHERE } else { 0 }];
        (before, map, places, elsewhere, 0)
    };
    group.throughput(Throughput::Elements(count as u64));
    bench::<P, _>(group, set_up, |bencher, state| {
        let (before, map, places, elsewhere, next) = state;
        bencher.iter_custom(|iters| {
            sum(iters, || {
                map.restore(before);
                black_box(elsewhere.iter().sum::<u64>());
                *next = (*next + count) % (places.len() - count + 1);
                timed(|| pass(black_box(map), &places[*next..*next + count]))
            })
        });
    });
}

/// Granules that are dirty after the first round, again and again.
pub(crate) fn hot<P: Peer>(group: &mut Group<'_>, granules: u64) {
    const ROUNDS: u64 = 512;
    let mut random = random::random(3);
    let places: Vec<u64> = (0..8).map(|_| random() % granules).collect();
    let pass = |map: &mut P| {
        let mut changes = 0;
        for _ in 0..ROUNDS {
            for place in black_box(&places) {
                changes += u64::from(map.set(*place));
            }
        }
        changes
    };
    let set_up = || {
        let mut map = P::new(granules);
        let mut words = Pattern::Empty.words(granules, 0);
        pass(&mut map);
        for place in &places {
            maps::set(&mut words, *place..place + 1);
        }
        check(&map, &words);
        map
    };
    group.throughput(Throughput::Elements(ROUNDS * places.len() as u64));
    bench::<P, _>(group, set_up, |bencher, map| {
        bencher.iter(|| pass(black_box(map)));
    });
}

/// Looks at all of a map that does not change.
pub(crate) fn walk<P: Peer, A: Debug + PartialEq>(
    group: &mut Group<'_>,
    words: impl Fn() -> Vec<u64>,
    walk: fn(&P) -> A,
    naive: fn(&[u64], u64) -> A,
) {
    let set_up = || {
        let words = words();
        let map = P::from_words(&words);
        assert_eq!(walk(&map), naive(&words, map.unit()), "{}", P::NAME);
        map
    };
    bench::<P, _>(group, set_up, |bencher, map| {
        bencher.iter(|| walk(black_box(map)));
    });
}

/// Compares two maps that are equal.
pub(crate) fn equal<P: Peer>(group: &mut Group<'_>, words: &[u64]) {
    let set_up = || {
        let (map, twin) = (P::from_words(words), P::from_words(words));
        let mut other = words.to_vec();
        *other.last_mut().expect("a word") ^= 1 << 63;
        assert!(map == twin, "{}", P::NAME);
        assert!(map != P::from_words(&other), "{}", P::NAME);
        (map, twin)
    };
    bench::<P, _>(group, set_up, |bencher, (map, twin)| {
        bencher.iter(|| black_box(&*map) == black_box(&*twin));
    });
}

/// Two maps become one. `make` gives both, and what comes out.
pub(crate) fn merge<P: Peer>(
    group: &mut Group<'_>,
    copies: usize,
    make: impl Fn() -> (P, P, Vec<u64>),
    merge: fn(&mut P, &P) -> bool,
) {
    let set_up = || {
        let (into, from, words) = make();
        let mut merged = into.clone();
        merge(&mut merged, &from);
        check(&merged, &words);
        (vec![merged; copies], into, from)
    };
    group.throughput(Throughput::Elements(copies as u64));
    bench::<P, _>(group, set_up, |bencher, (merged, into, from)| {
        bencher.iter_custom(|iters| {
            sum(iters, || {
                merged.iter_mut().for_each(|map| map.restore(into));
                timed(|| {
                    let merged = black_box(&mut *merged).iter_mut();
                    merged.fold(false, |any, map| any | merge(map, black_box(from)))
                })
            })
        });
    });
}

/// Makes something of `state`, to be dropped off the clock.
pub(crate) fn make<P: Peer, S, T>(
    group: &mut Group<'_>,
    set_up: impl Fn() -> S,
    make: impl Fn(&mut S) -> T,
) {
    bench::<P, _>(group, set_up, |bencher, state| {
        bencher.iter_custom(|iters| {
            sum(iters, || {
                let start = Instant::now();
                let made = black_box(make(black_box(state)));
                let time = start.elapsed();
                drop(made);
                time
            })
        });
    });
}

/// The two maps that a walk sees alike.
pub(crate) fn check<P: Peer>(map: &P, words: &[u64]) {
    let unit = map.unit();
    assert_eq!(map.sum_bits(), maps::sum(words, unit), "{}", P::NAME);
    assert_eq!(map.runs(), maps::runs(words, unit), "{}", P::NAME);
}

fn bench<P: Peer, S>(
    group: &mut Group<'_>,
    set_up: impl Fn() -> S,
    mut measure: impl FnMut(&mut Bencher<'_>, &mut S),
) {
    let mut state = None;
    group.bench_function(P::NAME, |bencher| {
        measure(bencher, state.get_or_insert_with(&set_up));
    });
}

fn sum(iters: u64, pass: impl FnMut() -> Duration) -> Duration {
    std::iter::repeat_with(pass).take(iters as usize).sum()
}

fn timed<T>(pass: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(pass());
    start.elapsed()
}
