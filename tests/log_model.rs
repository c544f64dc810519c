//! The log against a set of granules, and against threads that mark while it is drained.
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use blockjob::{ByteRange, DirtyLog, DirtyLogError, Granularity, HBitmap};
use proptest::prelude::*;

/// Numbers of granules around which a level begins or a word or a row is full.
const GRANULES: [u64; 18] = [
    1, 63, 64, 65, 128, 511, 512, 513, 1000, 4096, 8192, 32_767, 32_768, 32_769, 33_280, 262_144,
    262_145, 300_000,
];

fn log(len: u64, exponent: u8) -> DirtyLog {
    DirtyLog::new(len, Granularity::from_exponent(exponent).unwrap()).unwrap()
}

fn drain(log: &DirtyLog) -> BTreeSet<u64> {
    let mut granules = BTreeSet::new();
    let mut next = 0;
    log.drain(|word| {
        assert!(word.first_granule >= next && word.first_granule % 64 == 0);
        assert_ne!(word.bits, 0);
        next = word.first_granule + 64;
        granules.extend(word.runs().flatten());
    });
    granules
}

/// The granules of `ranges`, which must ascend, not touch, and end at granules or the end of the disk.
fn granules_of(log: &DirtyLog, ranges: &[ByteRange]) -> BTreeSet<u64> {
    let bytes = log.granularity().bytes();
    for pair in ranges.windows(2) {
        assert!(pair[0].end() < pair[1].start(), "{pair:?}");
    }
    for range in ranges {
        assert!(!range.is_empty() && range.start() % bytes == 0);
        assert!(range.end() % bytes == 0 && range.end() <= log.len() || range.end() == log.len());
    }
    ranges
        .iter()
        .flat_map(|range| range.start() / bytes..range.end().div_ceil(bytes))
        .collect()
}

#[derive(Clone, Debug)]
enum Step {
    Mark(ByteRange),
    Drain,
    DrainRanges,
    /// Drains into a sink that panics at its n-th call.
    DrainAndPanic(usize),
    DrainRangesAndPanic(usize),
}

/// A disk and what happens to it. Most ranges are short or lie around word boundaries, some are long,
/// some reach past the end.
fn story() -> impl Strategy<Value = (u64, u8, Vec<Step>)> {
    (prop::sample::select(&GRANULES[..]), 0..20u8, 0..3u64).prop_flat_map(|(granules, g, cut)| {
        let len = (granules << g) - cut.min((1 << g) - 1);
        let offset = prop_oneof![
            0..len + 10,
            (0..=granules / 64, 0..3u64).prop_map(move |(word, off)| ((word * 64) << g) + off),
            len.saturating_sub(5)..len + 10,
        ];
        let length = prop_oneof![
            6 => 0..=3u64 << g,
            3 => 0..=200u64 << g,
            1 => 0..=len,
            1 => Just(u64::MAX >> 1),
        ];
        let mark = (offset, length).prop_map(|(at, len)| Step::Mark((at..at + len).into()));
        let step = prop_oneof![
            8 => mark,
            1 => Just(Step::Drain),
            1 => Just(Step::DrainRanges),
            1 => (0..4usize).prop_map(Step::DrainAndPanic),
            1 => (0..4usize).prop_map(Step::DrainRangesAndPanic),
        ];
        (Just(len), Just(g), prop::collection::vec(step, 1..40))
    })
}

proptest! {
    #[test]
    fn a_log_hands_out_what_was_marked((len, exponent, steps) in story()) {
        let log = log(len, exponent);
        let mut model = BTreeSet::new();
        for step in steps {
            match step {
                Step::Mark(range) => {
                    log.mark(range);
                    let end = range.end().min(len);
                    if range.start() < end {
                        model.extend(range.start() >> exponent..=(end - 1) >> exponent);
                    }
                }
                Step::Drain => {
                    prop_assert_eq!(drain(&log), std::mem::take(&mut model));
                }
                Step::DrainRanges => {
                    let mut ranges = Vec::new();
                    log.drain_ranges(|range| ranges.push(range));
                    prop_assert_eq!(granules_of(&log, &ranges), std::mem::take(&mut model));
                }
                Step::DrainAndPanic(calls) => {
                    let mut words = Vec::new();
                    panics_after(calls, |go_on| log.drain(|word| {
                        go_on();
                        words.push(word);
                    }));
                    for granule in words.into_iter().flat_map(|word| word.runs().flatten()) {
                        prop_assert!(model.remove(&granule));
                    }
                }
                Step::DrainRangesAndPanic(calls) => {
                    let mut ranges = Vec::new();
                    panics_after(calls, |go_on| log.drain_ranges(|range| {
                        go_on();
                        ranges.push(range);
                    }));
                    let handed_out = granules_of(&log, &ranges);
                    log.check_invariants();
                    let left = drain(&log);
                    prop_assert_eq!(&handed_out | &left, std::mem::take(&mut model));
                    // The word at which it panicked may come again as a whole.
                    let twice: BTreeSet<_> = (&handed_out & &left).iter().map(|g| g / 64).collect();
                    prop_assert!(twice.len() <= 1, "words {twice:?}");
                }
            }
            log.check_invariants();
            prop_assert_eq!(log.is_clean(), model.is_empty());
        }
    }
}

/// Runs `drain` with a function that panics at its call after `calls` others.
fn panics_after(calls: usize, drain: impl FnOnce(&dyn Fn())) {
    let left = AtomicUsize::new(calls);
    let go_on = || {
        if left.load(Relaxed) == 0 {
            std::panic::resume_unwind(Box::new("as the test wants it"));
        }
        left.fetch_sub(1, Relaxed);
    };
    let _ = catch_unwind(AssertUnwindSafe(|| drain(&go_on)));
}

#[test]
fn limits_are_checked_before_anything_is_allocated() {
    let g = |exponent| Granularity::from_exponent(exponent).unwrap();
    let too_long = DirtyLogError::TooLong { len: 1 << 63 };
    assert_eq!(DirtyLog::new(1 << 63, g(63)).unwrap_err(), too_long);
    let granules = (1 << 41) + 1;
    assert_eq!(
        DirtyLog::new((1 << 51) + 1, g(10)).unwrap_err(),
        DirtyLogError::TooManyGranules { granules },
    );
    assert_eq!(log((1 << 63) - 1, 63).len(), (1 << 63) - 1);
}

#[test]
fn a_disk_without_bytes_stays_clean() {
    let log = log(0, 16);
    log.mark((0..u64::MAX).into());
    assert!(log.is_clean() && log.is_empty());
    log.drain_ranges(|range| panic!("{range}"));
    log.check_invariants();
}

#[test]
fn marks_are_clipped_to_the_disk() {
    for exponent in [0, 1, 9, 16, 61, 62, 63] {
        let len = ((1 << 63) - 1).min((100 << exponent.min(50)) + 1);
        let log = log(len, exponent);
        for outside in [len..len, len..u64::MAX, u64::MAX - 1..u64::MAX] {
            log.mark(outside.into());
            assert!(log.is_clean());
        }
        log.mark((len - 1..u64::MAX).into());
        let last = (len - 1) >> exponent;
        let mut ranges = Vec::new();
        log.drain_ranges(|range| ranges.push(range));
        assert_eq!(ranges, [ByteRange::from(last << exponent..len)]);
        log.mark((0..u64::MAX).into());
        log.drain_ranges(|range| assert_eq!(range, (0..len).into()));
        log.check_invariants();
    }
}

#[test]
fn runs_meet_across_words_and_levels() {
    let log = log(64 * 64 * 64, 0);
    for range in [
        63..65,
        4000..4096,
        4096..4097,
        4098..4099,
        32_767..32_768,
        32_768..32_770,
        262_143..262_144,
    ] {
        log.mark(range.into());
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    log.drain_ranges(|range| ranges.push(range.into()));
    let expected = [
        63..65,
        4000..4097,
        4098..4099,
        32_767..32_770,
        262_143..262_144,
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn a_sink_may_mark() {
    let log = log(10_000, 0);
    log.mark((70..71).into());
    log.drain(|_| log.mark((3..9000).into()));
    let rest = drain(&log);
    assert!(
        rest.contains(&3) && rest.contains(&70),
        "both are behind the drain"
    );
}

/// The promise that a mirror lives by, with real threads: after the last drain, a copy that was made
/// granule by granule as they were drained equals what the guests wrote. Each guest has its own copy of
/// the disk, which it writes with plain stores, as memory is written.
#[test]
fn nothing_is_lost_while_threads_mark_and_drain() {
    const GRANULES: usize = 5000;
    const GUESTS: usize = 3;
    const WRITES: u64 = 20_000;

    let log = log(GRANULES as u64, 0);
    let disk = || (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
    let sources: [Vec<AtomicU64>; GUESTS] = std::array::from_fn(|_| disk());
    let guests_left = AtomicUsize::new(GUESTS);
    let mut targets = [(); GUESTS].map(|()| vec![0; GRANULES]);
    let mut copy = || {
        let mut ranges = Vec::new();
        log.drain_ranges(|range| ranges.push(range.start() as usize..range.end() as usize));
        for range in ranges {
            for (target, source) in targets.iter_mut().zip(&sources) {
                for granule in range.clone() {
                    target[granule] = source[granule].load(Relaxed);
                }
            }
        }
    };

    std::thread::scope(|threads| {
        for (source, seed) in sources.iter().zip(1..) {
            let (log, guests_left) = (&log, &guests_left);
            threads.spawn(move || {
                let mut random: u64 = seed;
                for write in 1..=WRITES {
                    // Marsaglia's xorshift.
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Half of the writes meet in a few granules.
                    let width = if random & 1 == 0 { 16 } else { GRANULES };
                    let start = (random >> 32) as usize % width;
                    let count = 1 << (random >> 8 & 7);
                    let end = (start + count).min(GRANULES);
                    for granule in &source[start..end] {
                        granule.store(write, Relaxed);
                    }
                    log.mark((start as u64..end as u64).into());
                }
                guests_left.fetch_sub(1, Relaxed);
            });
        }
        while guests_left.load(Relaxed) > 0 {
            copy();
        }
    });
    copy();

    let written = sources.map(|source| source.into_iter().map(AtomicU64::into_inner).collect());
    let written: [Vec<u64>; GUESTS] = written;
    assert!(targets == written, "lost a write");
    assert!(log.is_clean());
    log.check_invariants();
}

// --- Draining into bitmaps -----------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Every bitmap gets what it would have got from the marks themselves, but for what the log has
    /// rounded.
    #[test]
    fn bitmaps_of_any_granularity_get_what_was_marked(
        len in 0u64..2_000_000,
        exponent in 4u8..14,
        marks in proptest::collection::vec((0u64..2_100_000, 0u64..70_000), 0..20),
        exponents in proptest::collection::vec(4u8..=22, 1..5),
    ) {
        let log = DirtyLog::new(len, Granularity::from_exponent(exponent).unwrap()).unwrap();
        let map = |exponent: &u8| {
            HBitmap::new(len, Granularity::from_exponent(*exponent).unwrap()).unwrap()
        };
        let mut drained: Vec<_> = exponents.iter().map(map).collect();
        let mut expected = drained.clone();
        for (start, len) in marks {
            let range = ByteRange::at(start, len).unwrap();
            log.mark(range);
            // As the log rounds it, and cut to the disk.
            let granule = log.granularity().bytes();
            let rounded = range.start() / granule * granule..range.end().div_ceil(granule) * granule;
            let rounded = ByteRange::from(rounded).intersection((0..log.len()).into());
            if range.is_empty() || range.start() >= log.len() {
                continue;
            }
            for map in &mut expected {
                map.set(rounded).unwrap();
            }
        }
        log.drain_into(&mut drained.iter_mut().collect::<Vec<_>>()).unwrap();
        prop_assert!(log.is_clean());
        prop_assert_eq!(&drained, &expected);
        drained.iter().for_each(HBitmap::check_invariants);
    }
}

#[test]
fn a_bitmap_of_another_length_keeps_the_log_as_it_is() {
    let log = DirtyLog::new(1 << 20, Granularity::DEFAULT).unwrap();
    log.mark((0..1).into());
    let mut good = HBitmap::new(1 << 20, Granularity::DEFAULT).unwrap();
    let mut bad = HBitmap::new(1 << 21, Granularity::DEFAULT).unwrap();
    log.drain_into(&mut [&mut good, &mut bad]).unwrap_err();
    assert!(good.is_clean() && !log.is_clean());
}

/// A waker that counts how often it was called.
struct Called(AtomicU64);

impl std::task::Wake for Called {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn who_waits_is_woken_by_what_a_panicking_drain_gives_back() {
    for (name, len) in [("one level", 1 << 20), ("three levels", 1 << 36)] {
        let called = Arc::new(Called(AtomicU64::new(0)));
        let waker = std::task::Waker::from(Arc::clone(&called));
        let log = log(len, 16);
        let drains: [&dyn Fn(); 2] = [
            &|| {
                log.drain(|_| {
                    assert!(log.poll_dirty(&waker).is_pending());
                    std::panic::resume_unwind(Box::new("as the test wants it"));
                });
            },
            // Given back is also what was kept to be joined.
            &|| {
                log.drain_ranges(|_| {
                    assert!(log.poll_dirty(&waker).is_pending());
                    std::panic::resume_unwind(Box::new("as the test wants it"));
                });
            },
        ];
        for drain in drains {
            log.mark((0..1).into());
            called.0.store(0, Relaxed);
            catch_unwind(AssertUnwindSafe(drain)).unwrap_err();
            assert!(!log.is_clean(), "{name}: it was given back");
            log.mark((0..1).into());
            assert_eq!(called.0.load(Relaxed), 1, "{name}: nobody told who waits");
        }
    }
}

#[test]
fn who_waits_is_woken_by_the_first_mark_and_not_again() {
    let called = Arc::new(Called(AtomicU64::new(0)));
    let waker = std::task::Waker::from(Arc::clone(&called));
    let calls = || called.0.load(Relaxed);
    let log = DirtyLog::new(1 << 30, Granularity::DEFAULT).unwrap();

    assert!(log.poll_dirty(&waker).is_pending());
    log.mark((0..0).into());
    assert_eq!(calls(), 0, "nothing was marked");
    log.mark((0..1).into());
    log.mark((1 << 20..1 << 21).into());
    assert_eq!(calls(), 1);
    assert!(log.poll_dirty(&waker).is_ready());
    log.drain(|_| {});
    assert!(
        log.poll_dirty(std::task::Waker::noop()).is_pending(),
        "the last waker counts"
    );
    log.mark((0..1).into());
    assert_eq!(calls(), 1);
    assert_eq!(
        Arc::strong_count(&called),
        2,
        "no waker is kept that was replaced or called"
    );
}
