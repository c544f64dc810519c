//! Marks against drains, in every interleaving and with every stale load the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_log`
//!
//! Under loom a word of the log has two bits and a row two words, so 32 granules are three levels:
//!
//! ```text
//! level 2                        0───────────1                          a bit for each row below
//! level 1                     0─1 2─3     4─5 6─7                       two rows of two words
//! leaf           0─1 2─3  4─5 6─7  8─9 10─11  …      28─29 30─31        one bit per granule
//! ```
//!
//! What is judged is the promise a mirror lives by. Guests write data and mark; a drain's owner copies
//! the data of what it was handed; after everybody is done a last drain hands out the rest. Then the
//! copy equals the data, or something was lost. Each invariant of the log is also broken on purpose, in
//! a scenario that passes when it is kept.
#![cfg(loom)]

use std::collections::BTreeSet;
use std::ops::Range;

use blockjob::{ByteRange, DirtyLog, Granularity, Rule};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// A disk with a byte per granule, each written by one guest thread.
struct Disk {
    log: DirtyLog,
    data: Vec<AtomicU64>,
}

impl Disk {
    fn new(granules: u64, broken: Option<Rule>) -> Arc<Self> {
        let log = DirtyLog::new(granules, Granularity::from_bytes(1).unwrap()).unwrap();
        Arc::new(Self {
            log: match broken {
                Some(rule) => log.breaking(rule),
                None => log,
            },
            data: (0..granules).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// What a guest does: writes its own byte, then marks `range`, in which that byte lies.
    fn write(&self, byte: u64, range: ByteRange) {
        self.data[byte as usize].store(1, Relaxed);
        self.log.mark(range);
    }

    fn drain(&self) -> BTreeSet<u64> {
        let mut granules = BTreeSet::new();
        self.log
            .drain(|word| granules.extend(word.runs().flatten()));
        granules
    }

    /// What a mirror does: drains, then reads. Pairs of granule and the data found there, for those
    /// that were handed out.
    fn copy(&self) -> Vec<(u64, u64)> {
        let read = |granule: u64| (granule, self.data[granule as usize].load(Relaxed));
        self.drain().into_iter().map(read).collect()
    }
}

/// Every schedule with at most three switches away from a thread that could have gone on, unless
/// `LOOM_MAX_PREEMPTIONS` says otherwise. The broken logs below are found out with two; four take
/// minutes.
fn explore(scenario: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(3));
    model.check(scenario);
}

/// One granule.
fn at(granule: u64) -> ByteRange {
    (granule..granule + 1).into()
}

/// Guests write a byte and mark a range while a mirror copies once. `marked` was marked before.
fn mirror(
    granules: u64,
    marked: &'static [u64],
    guests: &'static [(u64, Range<u64>)],
    broken: Option<Rule>,
) {
    explore(move || {
        let disk = Disk::new(granules, broken);
        for &granule in marked {
            disk.log.mark(at(granule));
        }
        let guests: Vec<_> = guests
            .iter()
            .map(|(byte, range)| {
                let disk = disk.clone();
                thread::spawn(move || disk.write(*byte, range.clone().into()))
            })
            .collect();
        let mut copied = disk.copy();
        for guest in guests {
            guest.join().unwrap();
        }
        copied.extend(disk.copy());

        let mut target = vec![0; granules as usize];
        for (granule, data) in copied {
            target[granule as usize] = data;
        }
        let source: Vec<_> = disk.data.iter().map(|byte| byte.load(Relaxed)).collect();
        assert_eq!(target, source, "lost a write");
        assert!(disk.log.is_clean(), "lost a write");
        if broken.is_none() {
            disk.log.check_invariants();
        }
    });
}

/// A guest's mark of a granule that another one is just marking: when it has returned, the next drain
/// must find it.
fn mark_then_drain(broken: Option<Rule>) {
    explore(move || {
        let disk = Disk::new(8, broken);
        let other = {
            let disk = disk.clone();
            thread::spawn(move || disk.log.mark(at(0)))
        };
        disk.log.mark(at(0));
        let is_clean = disk.log.is_clean();
        let drained = disk.drain();
        assert!(drained.contains(&0) && !is_clean, "lost a mark");
        other.join().unwrap();
    });
}

#[test]
fn two_guests_mark_the_same_granule() {
    // Each has its own byte; both ranges have both.
    mirror(4, &[], &[(0, 0..2), (1, 0..2)], None);
}

#[test]
fn two_guests_mark_the_same_word() {
    mirror(4, &[], &[(0, 0..1), (1, 1..2)], None);
}

#[test]
fn two_guests_mark_sibling_words() {
    mirror(4, &[], &[(0, 0..1), (2, 2..3)], None);
}

#[test]
fn two_guests_mark_sibling_rows() {
    mirror(8, &[], &[(1, 1..2), (6, 6..7)], None);
}

#[test]
fn two_guests_mark_far_apart_on_three_levels() {
    mirror(32, &[], &[(0, 0..1), (30, 30..31)], None);
}

#[test]
fn two_guests_mark_what_is_marked() {
    mirror(4, &[0, 1], &[(0, 0..2), (1, 0..2)], None);
}

#[test]
fn a_guest_marks_what_is_marked_on_three_levels() {
    mirror(32, &[21], &[(21, 21..22)], None);
}

#[test]
fn a_guest_marks_words_that_are_marked() {
    mirror(4, &[0, 1, 2, 3], &[(1, 0..4)], None);
}

#[test]
fn two_guests_mark_beside_what_is_marked() {
    mirror(4, &[0, 2], &[(1, 1..2), (3, 3..4)], None);
}

#[test]
fn a_guest_marks_the_whole_disk() {
    mirror(8, &[], &[(3, 0..8)], None);
}

#[test]
fn two_guests_mark_in_a_log_of_one_word() {
    mirror(2, &[0], &[(0, 0..1), (1, 1..2)], None);
}

#[test]
fn a_mark_is_found_by_the_drain_after_it() {
    mark_then_drain(None);
}

#[test]
fn each_mark_goes_to_one_of_two_drains() {
    explore(|| {
        let disk = Disk::new(8, None);
        for granule in [0, 3, 4] {
            disk.log.mark(at(granule));
        }
        let other = {
            let disk = disk.clone();
            thread::spawn(move || disk.drain())
        };
        let mine = disk.drain();
        let theirs = other.join().unwrap();
        assert!(mine.is_disjoint(&theirs));
        assert_eq!(&mine | &theirs, BTreeSet::from([0, 3, 4]));
    });
}

#[test]
fn a_mark_survives_two_drains() {
    explore(|| {
        let disk = Disk::new(4, None);
        disk.log.mark(at(1));
        let mirrors = [(); 2].map(|()| {
            let disk = disk.clone();
            thread::spawn(move || disk.copy())
        });
        disk.write(0, at(0));
        let mut copies = Vec::new();
        for mirror in mirrors {
            copies.extend(mirror.join().unwrap());
        }
        copies.extend(disk.copy());
        copies.sort_unstable();
        assert_eq!(copies, [(0, 1), (1, 0)], "each once, and what was written");
        disk.log.check_invariants();
    });
}

/// Every invariant broken, in their order.
mod sabotage {
    use super::*;

    #[test]
    #[should_panic(expected = "lost a write")]
    fn no_fence_before_the_first_load() {
        mirror(4, &[0], &[(0, 0..1)], Some(Rule::FenceBeforeLook));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn no_fence_before_the_first_load_of_several_words() {
        mirror(4, &[0, 1, 2, 3], &[(1, 0..4)], Some(Rule::FenceBeforeLook));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn summary_set_before_the_leaf() {
        mirror(4, &[], &[(0, 0..1)], Some(Rule::LeafFirst));
    }

    #[test]
    #[should_panic(expected = "lost a mark")]
    fn summary_skipped_when_the_leaf_was_set() {
        mark_then_drain(Some(Rule::EveryLevel));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn summary_cleared_after_the_leaf() {
        mirror(4, &[0], &[(1, 1..2)], Some(Rule::ClearedFirst));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn words_read_and_then_written() {
        mirror(4, &[], &[(0, 0..1), (1, 1..2)], Some(Rule::ChangedAtOnce));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn nothing_is_in_one_order() {
        mirror(4, &[0], &[(1, 1..2)], Some(Rule::OneOrder));
    }

    #[test]
    #[should_panic(expected = "lost a write")]
    fn no_fence_after_the_drain() {
        mirror(4, &[0], &[(0, 0..1)], Some(Rule::FenceAfterDrain));
    }

    /// The scenarios above, with everything kept.
    #[test]
    fn nothing_is_lost_when_every_rule_is_kept() {
        mirror(4, &[], &[(0, 0..1)], None);
        mirror(4, &[0], &[(0, 0..1)], None);
        mirror(4, &[], &[(0, 0..1), (1, 1..2)], None);
        mirror(4, &[0], &[(1, 1..2)], None);
        mirror(4, &[0, 1, 2, 3], &[(1, 0..4)], None);
        mark_then_drain(None);
    }
}

// --- Waiting for a mark --------------------------------------------------------------------------

/// A waker that counts how often it was called.
struct Called(std::sync::atomic::AtomicU64);

impl std::task::Wake for Called {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A consumer that finds the log clean waits, while guests mark. In the end it was told, or was not told
/// that there was nothing.
fn a_mark_wakes(ranges: &'static [Range<u64>], broken: Option<Rule>) {
    let mut model = loom::model::Builder::new();
    // With the drain, the wake-up and two guests there are too many schedules for more.
    model.preemption_bound = model.preemption_bound.or(Some(2));
    model.check(move || {
        let disk = Disk::new(4, broken);
        let called = std::sync::Arc::new(Called(std::sync::atomic::AtomicU64::new(0)));
        let waker = std::task::Waker::from(std::sync::Arc::clone(&called));
        let guests: Vec<_> = ranges
            .iter()
            .map(|range| {
                let disk = Arc::clone(&disk);
                thread::spawn(move || disk.write(range.start, range.clone().into()))
            })
            .collect();
        disk.drain();
        let is_waiting = disk.log.poll_dirty(&waker).is_pending();
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        let was_called = called.0.load(std::sync::atomic::Ordering::Relaxed) > 0;
        assert!(
            !is_waiting || was_called || disk.log.is_clean(),
            "waits for ever although there is something to drain"
        );
    });
}

#[test]
fn a_mark_wakes_who_waits() {
    a_mark_wakes(&[3..4], None);
}

#[test]
fn a_mark_of_several_words_wakes() {
    a_mark_wakes(&[0..4], None);
}

#[test]
fn one_of_two_marks_of_one_word_wakes() {
    a_mark_wakes(&[2..3, 3..4], None);
}

#[test]
fn one_of_two_marks_of_one_granule_wakes() {
    a_mark_wakes(&[1..2, 1..2], None);
}

#[test]
#[should_panic(expected = "waits for ever")]
fn who_does_not_look_after_arming_may_wait_for_ever() {
    a_mark_wakes(&[3..4], Some(Rule::LookAfterArming));
}
