//! Named bitmaps case by case: names and limits, recording, claims, what several read, what is stored.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test brings the threads"
)]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of ranges is what is recorded"
)]

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blockjob::bitmap::Status;
use blockjob::{
    Begin, BitmapError, BitmapOptions, BitmapState, BitmapStorage, BusyWith, ByteRange,
    CannotPersist, ClaimFor, FrozenBitmap, Granularity, HBitmap, Node, QuiesceGuard, SnapshotOf,
    WriteRefused,
};

const KIB: u64 = 1 << 10;
const LEN: u64 = 1 << 20;
const G: u64 = 64 * KIB;

fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}

fn of_granularity(bytes: u64) -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.granularity = Some(granularity(bytes));
    options
}

fn persistent() -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.persistent = true;
    options
}

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

/// A node with recording bitmaps of these names.
fn node_with(names: &[&str]) -> Node {
    let node = Node::new(LEN);
    let guard = quiesced(&node);
    for name in names {
        let bitmaps = node.bitmaps();
        bitmaps.add(&guard, name, BitmapOptions::default()).unwrap();
    }
    drop(guard);
    node
}

fn write(node: &Node, range: impl Into<ByteRange>) {
    node.begin_write(range.into())
        .go()
        .expect("the node is open")
        .finish(());
}

fn runs(node: &Node, name: &str) -> Vec<ByteRange> {
    node.bitmaps()
        .runs(name, 0..node.len(), usize::MAX)
        .unwrap()
        .runs
}

fn ranges<const N: usize>(ranges: [std::ops::Range<u64>; N]) -> Vec<ByteRange> {
    ranges.map(ByteRange::from).to_vec()
}

/// Runs what would hang if locks were taken in the wrong order.
fn in_time(scenario: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let thread = thread::spawn(move || {
        scenario();
        done.send(()).unwrap();
    });
    let in_time = is_done.recv_timeout(Duration::from_secs(60));
    assert_ne!(in_time, Err(mpsc::RecvTimeoutError::Timeout), "it hangs");
    thread.join().unwrap();
}

mod making {
    use super::*;

    #[test]
    fn names_have_1_to_1023_bytes() {
        let node = Node::new(LEN);
        let bitmaps = node.bitmaps();
        let add = |name: &str| bitmaps.add_disabled(name, BitmapOptions::default());
        assert_eq!(add(""), Err(BitmapError::NameEmpty));
        assert_eq!(add("x"), Ok(()));
        assert_eq!(add(&"x".repeat(1023)), Ok(()));
        assert_eq!(
            add(&"x".repeat(1024)),
            Err(BitmapError::NameTooLong { bytes: 1024 })
        );
        // Bytes count, not characters.
        assert_eq!(add(&"ä".repeat(511)), Ok(()));
        assert_eq!(
            add(&"ä".repeat(512)),
            Err(BitmapError::NameTooLong { bytes: 1024 })
        );
        // And bytes are compared.
        assert_eq!(add("X"), Ok(()));
        assert_eq!(bitmaps.rename("X", ""), Err(BitmapError::NameEmpty));
        let long = bitmaps.rename("X", &"x".repeat(1024));
        assert_eq!(long, Err(BitmapError::NameTooLong { bytes: 1024 }));
        let own = bitmaps.rename("X", "X");
        assert_eq!(
            own,
            Err(BitmapError::NameExists {
                name: "X".to_owned()
            })
        );
    }

    #[test]
    fn a_name_is_one_bitmap_on_each_node() {
        let (one, other) = (node_with(&["a"]), node_with(&["a"]));
        write(&one, 0..1);
        assert_eq!(runs(&one, "a"), ranges([0..G]));
        assert_eq!(runs(&other, "a"), []);
        one.bitmaps().remove("a").unwrap();
        assert!(other.bitmaps().query("a").is_ok());
    }

    #[test]
    fn granularities_are_512_bytes_to_2_gib() {
        let node = Node::new(LEN);
        for bytes in [1, 256, 1 << 32, 1 << 63] {
            let refused = node.bitmaps().add_disabled("a", of_granularity(bytes));
            assert_eq!(
                refused,
                Err(BitmapError::BadGranularity(granularity(bytes)))
            );
        }
        for bytes in [512, 1 << 31] {
            node.bitmaps()
                .add_disabled("a", of_granularity(bytes))
                .unwrap();
            assert_eq!(
                node.bitmaps().query("a").unwrap().granularity.bytes(),
                bytes
            );
            node.bitmaps().remove("a").unwrap();
        }
    }

    #[test]
    fn the_default_granularity_is_that_of_clusters_within_bounds() {
        for (cluster, expected) in [
            (None, 64 * KIB),
            (Some(0), 64 * KIB),
            (Some(512), 4 * KIB),
            (Some(4 * KIB), 4 * KIB),
            (Some(24 * KIB), 16 * KIB),
            (Some(63 * KIB), 32 * KIB),
            (Some(64 * KIB), 64 * KIB),
            (Some(3 << 20), 64 * KIB),
            (Some(u64::MAX), 64 * KIB),
        ] {
            let mut options = BitmapOptions::default();
            options.cluster = cluster;
            assert_eq!(options.granularity().bytes(), expected, "{cluster:?}");
            // What is asked for is not bounded by that.
            options.granularity = Some(granularity(1 << 20));
            assert_eq!(options.granularity().bytes(), 1 << 20);
        }
    }

    #[test]
    fn the_first_that_hinders_is_told() {
        let node = node_with(&["a"]);
        let other = Node::new(LEN);
        let (guard, wrong) = (quiesced(&node), quiesced(&other));
        let mut bad = persistent();
        bad.granularity = Some(granularity(1));
        let long = "x".repeat(1024);
        let add = |guard, name, options| node.bitmaps().add(guard, name, options).unwrap_err();
        assert_eq!(add(&wrong, "", bad), BitmapError::NameEmpty);
        assert_eq!(add(&wrong, "a", bad), BitmapError::OtherNode);
        assert_eq!(
            add(&guard, "a", bad),
            BitmapError::BadGranularity(granularity(1))
        );
        let why = CannotPersist::NoStorage;
        let name = "a".to_owned();
        assert_eq!(
            add(&guard, "a", persistent()),
            BitmapError::CannotPersist { name, why }
        );
        let name = "a".to_owned();
        let transient = BitmapOptions::default();
        assert_eq!(
            add(&guard, "a", transient),
            BitmapError::NameExists { name }
        );
        assert_eq!(
            add(&guard, &long, transient),
            BitmapError::NameTooLong { bytes: 1024 }
        );
        assert_eq!(node.bitmaps().query_all().len(), 1);
    }

    #[test]
    fn what_is_too_large_is_refused_before_memory_is_asked_for() {
        // 2^41 granules, and one more.
        let node = Node::new((1 << 50) + 512);
        let refused = node.bitmaps().add_disabled("a", of_granularity(512));
        let (len, granularity) = ((1 << 50) + 512, granularity(512));
        assert_eq!(refused, Err(BitmapError::TooLarge { len, granularity }));
        node.bitmaps()
            .add_disabled("a", of_granularity(1 << 31))
            .unwrap();

        let node = Node::new(1 << 63);
        let refused = node.bitmaps().add_disabled("a", of_granularity(1 << 31));
        assert!(matches!(refused, Err(BitmapError::TooLarge { .. })));
        let guard = quiesced(&node);
        let refused = node.bitmaps().add(&guard, "a", of_granularity(1 << 31));
        assert!(matches!(refused, Err(BitmapError::TooLarge { .. })));
        assert!(node.bitmaps().query_all().is_empty());
        drop(guard);
        write(&node, 0..512);
    }

    #[test]
    fn storage_is_asked_before_the_name_is_looked_at() {
        let node = Node::new(LEN);
        let mut storage = BitmapStorage::default();
        storage.bitmaps_max = 1;
        storage.name_bytes_max = 3;
        storage.granularity_min = granularity(4 * KIB);
        node.bitmaps().set_storage(Some(storage));
        let add = |name: &str, options| node.bitmaps().add_disabled(name, options);
        let cannot = |name: &str, why| {
            let name = name.to_owned();
            Err(BitmapError::CannotPersist { name, why })
        };
        let long = cannot("long", CannotPersist::NameTooLong { max: 3 });
        assert_eq!(add("long", persistent()), long);
        let mut fine = of_granularity(512);
        fine.persistent = true;
        let too_fine = CannotPersist::TooFine {
            min: granularity(4 * KIB),
        };
        assert_eq!(add("a", fine), cannot("a", too_fine));
        assert_eq!(add("a", persistent()), Ok(()));
        let many = cannot("a", CannotPersist::TooMany { max: 1 });
        assert_eq!(
            add("a", persistent()),
            many,
            "and not that the name is taken"
        );
        assert_eq!(
            node.bitmaps().rename("a", "long"),
            long,
            "nor under another name"
        );
        assert_eq!(
            node.bitmaps().rename("a", "b"),
            Ok(()),
            "it takes its own place"
        );
        assert_eq!(
            add("long", BitmapOptions::default()),
            Ok(()),
            "that is not stored"
        );
        assert_eq!(node.bitmaps().query_all().len(), 2);
    }

    #[test]
    fn the_order_is_that_of_creation() {
        let node = node_with(&["c", "a", "b"]);
        let names = || {
            let infos = node.bitmaps().query_all().into_iter();
            Vec::from_iter(infos.map(|info| info.name))
        };
        node.bitmaps().rename("a", "z").unwrap();
        assert_eq!(names(), ["c", "z", "b"]);
        node.bitmaps()
            .claim("c", ClaimFor::Change)
            .unwrap()
            .abdicate();
        assert_eq!(names(), ["c", "z", "b"]);
        node.bitmaps().remove("c").unwrap();
        node.bitmaps()
            .add_disabled("c", BitmapOptions::default())
            .unwrap();
        assert_eq!(names(), ["z", "b", "c"]);
    }
}

mod recording {
    use super::*;

    #[test]
    fn bitmaps_of_jobs_are_found_by_nobody() {
        let node = Node::new(LEN);
        let job = node.track(&quiesced(&node), Granularity::DEFAULT).unwrap();
        assert!(node.bitmaps().query_all().is_empty());
        node.bitmaps()
            .add(&quiesced(&node), "a", of_granularity(512))
            .unwrap();
        write(&node, 0..1);
        assert_eq!(job.lock().dirty_bytes(), G);
        assert_eq!(runs(&node, "a"), ranges([0..512]));
        drop(job);
        write(&node, 1024..1025);
        assert_eq!(runs(&node, "a"), ranges([0..512, 1024..1536]));
        node.bitmaps().check_invariants();
    }

    #[test]
    fn what_was_written_before_a_verb_is_in_it_and_what_comes_later_is_not() {
        let node = node_with(&["a"]);
        write(&node, 0..1);
        node.bitmaps().disable("a").unwrap();
        write(&node, G..G + 1);
        assert_eq!(runs(&node, "a"), ranges([0..G]));
        node.bitmaps().enable(&quiesced(&node), "a").unwrap();
        write(&node, 2 * G..2 * G + 1);
        node.bitmaps().clear("a").unwrap();
        assert_eq!(runs(&node, "a"), []);
        write(&node, 3 * G..3 * G + 1);
        assert_eq!(
            runs(&node, "a"),
            ranges([3 * G..4 * G]),
            "it goes on recording"
        );
    }

    #[test]
    fn a_write_in_flight_across_a_switch_is_recorded_by_who_records_when_it_settles() {
        let node = node_with(&["a", "b"]);
        let ticket = node.begin_write((0..1).into()).go().unwrap();
        node.bitmaps().disable("a").unwrap();
        let claim = node.bitmaps().claim("b", ClaimFor::Change).unwrap();
        ticket.finish(());
        assert_eq!(runs(&node, "a"), []);
        let claimed = claim.snapshot(SnapshotOf::Bitmap).unwrap();
        assert!(claimed.is_clean(), "it settled when the successor recorded");
        assert_eq!(
            node.bitmaps().query("b").unwrap().successor_dirty_bytes,
            Some(G)
        );
    }

    #[test]
    fn a_write_in_flight_when_the_last_recorder_went_is_in_none_that_comes() {
        let node = node_with(&["a"]);
        let ticket = node.begin_write((0..1).into()).go().unwrap();
        node.bitmaps().disable("a").unwrap();
        assert!(node.quiesce().try_guard().is_err());
        ticket.finish(());
        node.bitmaps().enable(&quiesced(&node), "a").unwrap();
        assert_eq!(runs(&node, "a"), [], "it was not enabled when that settled");
    }

    #[test]
    fn enabling_and_disabling_twice_is_no_error() {
        let node = node_with(&["a"]);
        node.bitmaps().enable(&quiesced(&node), "a").unwrap();
        node.bitmaps().disable("a").unwrap();
        node.bitmaps().disable("a").unwrap();
        let wrong = quiesced(&Node::new(LEN));
        let refused = node.bitmaps().enable(&wrong, "a");
        assert_eq!(refused, Err(BitmapError::OtherNode));
        assert!(!node.bitmaps().query("a").unwrap().is_recording);
    }

    #[test]
    fn runs_come_in_pages() {
        let node = node_with(&["a"]);
        for granule in [1, 2, 5, 7, 15] {
            write(&node, granule * G..granule * G + 1);
        }
        let page = |start: u64, end: u64, max| {
            let page = node.bitmaps().runs("a", start..end, max).unwrap();
            (page.runs, page.next)
        };
        let all = ranges([G..3 * G, 5 * G..6 * G, 7 * G..8 * G, 15 * G..16 * G]);
        assert_eq!(page(0, u64::MAX, usize::MAX), (all.clone(), None));
        assert_eq!(page(0, LEN, 4), (all.clone(), None), "there is no more");
        assert_eq!(page(0, LEN, 2), (all[..2].to_vec(), Some(6 * G)));
        assert_eq!(page(6 * G, LEN, 2), (all[2..].to_vec(), None));
        assert_eq!(
            page(0, 6 * G, 2),
            (all[..2].to_vec(), None),
            "not within the range"
        );
        assert_eq!(page(0, LEN, 0), (vec![], Some(0)));
        assert_eq!(page(8 * G, 9 * G, 0), (vec![], None));
        let cut = ranges([G + 7..3 * G, 5 * G..5 * G + 9]);
        assert_eq!(page(G + 7, 5 * G + 9, 9), (cut, None));
        assert_eq!(page(LEN, LEN, 9), (vec![], None));
        let past = node.bitmaps().runs("a", LEN + 1..LEN + 2, 1);
        let error = BitmapError::OutOfRange {
            offset: LEN + 1,
            len: LEN,
        };
        assert_eq!(past, Err(error));
    }

    #[test]
    fn a_partial_granule_counts_in_full() {
        let node = Node::new(LEN + 1);
        let bitmaps = node.bitmaps();
        bitmaps
            .add(&quiesced(&node), "a", BitmapOptions::default())
            .unwrap();
        write(&node, LEN..u64::MAX);
        assert_eq!(node.bitmaps().query("a").unwrap().dirty_bytes, G);
        assert_eq!(runs(&node, "a"), ranges([LEN..LEN + 1]));
    }
}

mod merging {
    use super::*;

    #[test]
    fn granules_of_the_target_are_dirty_that_a_source_touches() {
        let node = Node::new(LEN);
        let guard = quiesced(&node);
        node.bitmaps()
            .add(&guard, "fine", of_granularity(512))
            .unwrap();
        node.bitmaps()
            .add_disabled("coarse", of_granularity(G))
            .unwrap();
        node.bitmaps()
            .add_disabled("back", of_granularity(512))
            .unwrap();
        drop(guard);
        write(&node, G - 1..G + 1);
        let bitmaps = node.bitmaps();
        bitmaps.merge("coarse", &[(&node, "fine")]).unwrap();
        assert_eq!(runs(&node, "coarse"), ranges([0..2 * G]));
        bitmaps.merge("back", &[(&node, "coarse")]).unwrap();
        assert_eq!(runs(&node, "back"), ranges([0..2 * G]));
        assert_eq!(
            runs(&node, "fine"),
            ranges([G - 512..G + 512]),
            "it is as it was"
        );
        assert!(!bitmaps.query("back").unwrap().is_recording);
        bitmaps
            .merge("fine", &[(&node, "fine"), (&node, "fine")])
            .unwrap();
        assert_eq!(runs(&node, "fine"), ranges([G - 512..G + 512]));
    }

    #[test]
    fn nothing_is_merged_if_one_source_is_bad() {
        let node = node_with(&["target", "good"]);
        let longer = Node::new(LEN + 1);
        longer
            .bitmaps()
            .add_disabled("a", BitmapOptions::default())
            .unwrap();
        write(&node, 0..1);
        node.bitmaps().clear("target").unwrap();
        let merge = |sources: &[(&Node, &str)]| node.bitmaps().merge("target", sources);
        let name = "target".to_owned();
        assert_eq!(merge(&[]), Err(BitmapError::NoSources { name }));
        let mismatch = BitmapError::SizeMismatch {
            name: "a".to_owned(),
            len: LEN + 1,
            expected: LEN,
        };
        assert_eq!(merge(&[(&node, "good"), (&longer, "a")]), Err(mismatch));
        assert_eq!(runs(&node, "target"), []);
        merge(&[(&node, "good")]).unwrap();
        assert_eq!(runs(&node, "target"), ranges([0..G]));
    }

    /// `a` of one node into that of the other, and the other way round, at the same time.
    fn merge_both_ways() {
        let nodes = [node_with(&["a", "b"]), node_with(&["a", "b"])];
        let [one, other] = &nodes;
        let merge = |into: &Node, from: &Node| {
            for _ in 0..2000 {
                into.bitmaps()
                    .merge("a", &[(from, "b"), (into, "b"), (from, "a")])
                    .unwrap();
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| merge(one, other));
            scope.spawn(|| merge(other, one));
            for granule in 0..16 {
                write(one, granule * G..granule * G + 1);
                write(other, granule * G..granule * G + 1);
            }
        });
        let sources = [(other, "a")];
        one.bitmaps().merge("a", &sources).unwrap();
        assert_eq!(runs(one, "a"), ranges([0..LEN]));
    }

    #[test]
    fn opposite_merges_do_not_wait_for_each_other() {
        in_time(merge_both_ways);
    }

    /// Locks taken in another order are noticed: two that merge in opposite directions stand still.
    #[cfg(debug_assertions)]
    #[test]
    fn what_is_locked_as_it_is_named_stands_still() {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        use std::sync::Arc;
        use std::sync::atomic::{AtomicU64, Ordering};

        let nodes = [node_with(&["a"]), node_with(&["a"])];
        let merges = Arc::new(AtomicU64::new(0));
        for (into, from) in [(0, 1), (1, 0)] {
            let (nodes, merges) = (nodes.clone(), Arc::clone(&merges));
            // They are never joined.
            thread::spawn(move || {
                break_on_this_thread(Some(Sabotage::LockAsNamed));
                loop {
                    nodes[into]
                        .bitmaps()
                        .merge("a", &[(&nodes[from], "a")])
                        .unwrap();
                    merges.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let stands_still = (0..60).any(|_| {
            let before = merges.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(500));
            merges.load(Ordering::Relaxed) == before
        });
        assert!(stands_still);
    }
}

mod claims {
    use super::*;

    #[test]
    fn what_is_claimed_stays_and_its_successor_records() {
        let node = node_with(&["a"]);
        write(&node, 0..1);
        let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        write(&node, G..G + 1);
        let info = node.bitmaps().query("a").unwrap();
        assert_eq!((info.dirty_bytes, info.successor_dirty_bytes), (G, Some(G)));
        assert_eq!(
            (info.busy_with, info.is_recording),
            (Some(BusyWith::Job), true)
        );
        assert_eq!(
            node.bitmaps().query_all().len(),
            1,
            "a successor has no name"
        );
        let both = node
            .bitmaps()
            .snapshot("a", SnapshotOf::WithSuccessor)
            .unwrap();
        assert_eq!(both.dirty_bytes(), 2 * G);
        assert_eq!(claim.snapshot(SnapshotOf::WithSuccessor).unwrap(), both);
        claim.abdicate();
        assert_eq!(runs(&node, "a"), ranges([G..2 * G]));
        write(&node, 2 * G..2 * G + 1);
        assert_eq!(runs(&node, "a"), ranges([G..3 * G]));
    }

    #[test]
    fn whatever_becomes_of_a_claim_the_flags_are_as_before() {
        for is_enabled in [false, true] {
            for is_success in [false, true] {
                let node = Node::new(LEN);
                node.bitmaps().set_storage(Some(BitmapStorage::default()));
                node.bitmaps()
                    .add(&quiesced(&node), "a", persistent())
                    .unwrap();
                if !is_enabled {
                    node.bitmaps().disable("a").unwrap();
                }
                node.bitmaps().hold("a").unwrap().hand_over();
                let before = node.bitmaps().query("a").unwrap();
                let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
                if is_success {
                    claim.abdicate();
                } else {
                    claim.reclaim();
                }
                assert_eq!(node.bitmaps().query("a").unwrap(), before);
                let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
                assert_eq!(export.to_keep, ["a"], "it was handed over");
            }
        }
    }

    #[test]
    fn a_successor_may_record_later_than_it_was_made() {
        let node = node_with(&["a"]);
        node.bitmaps().disable("a").unwrap();
        let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        write(&node, 0..1);
        let wrong = quiesced(&Node::new(LEN));
        assert_eq!(claim.enable_successor(&wrong), Err(BitmapError::OtherNode));
        for _ in 0..2 {
            claim.enable_successor(&quiesced(&node)).unwrap();
            assert!(node.bitmaps().query("a").unwrap().is_recording);
        }
        write(&node, G..G + 1);
        claim.reclaim();
        assert!(node.bitmaps().query("a").unwrap().is_recording);
        assert_eq!(runs(&node, "a"), ranges([G..2 * G]));
    }

    #[test]
    fn an_owner_gives_back_other_bits_than_it_took() {
        let node = node_with(&["a"]);
        write(&node, 0..4 * G);
        let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        write(&node, 8 * G..8 * G + 1);
        // A backup that keeps what it has copied: all but this is on its target.
        let mut left = HBitmap::new(LEN, granularity(2 * G)).unwrap();
        left.set(2 * G..2 * G + 1).unwrap();
        claim.lock().unwrap().copy_from(&left).unwrap();
        claim.lock().unwrap().merge_from(&left).unwrap();
        drop(claim);
        assert_eq!(runs(&node, "a"), ranges([2 * G..4 * G, 8 * G..9 * G]));
    }

    #[test]
    fn what_is_held_of_a_bitmap_outlives_the_node() {
        let node = node_with(&["a", "b", "c"]);
        node.bitmaps().disable("b").unwrap();
        write(&node, 0..1);
        let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        let frozen = node.bitmaps().freeze("b").unwrap();
        let hold = node.bitmaps().hold("c").unwrap();
        drop(node);
        assert_eq!(claim.snapshot(SnapshotOf::Bitmap).unwrap().dirty_bytes(), G);
        assert!(frozen.is_clean());
        assert_eq!(hold.snapshot().unwrap().dirty_bytes(), G);
        claim.abdicate();
        drop(frozen);
        hold.hand_over();
    }

    #[test]
    fn handles_go_to_other_threads() {
        fn is_send_and_sync<T: Send + Sync>() {}
        is_send_and_sync::<FrozenBitmap>();
        is_send_and_sync::<blockjob::BitmapClaim>();
        is_send_and_sync::<blockjob::BitmapHold>();
        is_send_and_sync::<blockjob::Bitmaps<'_>>();
        is_send_and_sync::<blockjob::Transaction>();
        is_send_and_sync::<blockjob::Preparing>();
        is_send_and_sync::<blockjob::Prepared>();
    }
}

mod frozen {
    use super::*;

    #[test]
    fn extents_cover_a_range() {
        let node = node_with(&["a"]);
        write(&node, G..2 * G);
        write(&node, LEN - 1..LEN);
        node.bitmaps().disable("a").unwrap();
        let frozen = node.bitmaps().freeze("a").unwrap();
        let extents = |range: std::ops::Range<u64>| Vec::from_iter(frozen.extents(range));
        let (dirty, clean) = (Status::Dirty, Status::Clean);
        assert_eq!(
            extents(0..u64::MAX),
            [
                clean((0..G).into()),
                dirty((G..2 * G).into()),
                clean((2 * G..LEN - G).into()),
                dirty((LEN - G..LEN).into())
            ]
        );
        assert_eq!(extents(G + 5..G + 9), [dirty((G + 5..G + 9).into())]);
        assert_eq!(extents(9..9), []);
        assert_eq!(extents(LEN..LEN + 9), []);
    }

    #[test]
    fn it_is_in_use_until_the_last_handle_is_gone() {
        let node = node_with(&["a"]);
        node.bitmaps().disable("a").unwrap();
        let first = node.bitmaps().freeze("a").unwrap();
        let second = first.clone();
        let is_busy = || node.bitmaps().query("a").unwrap().busy_with == Some(BusyWith::Reader);
        thread::spawn(move || drop(first)).join().unwrap();
        assert!(is_busy());
        assert!(
            node.bitmaps().freeze("a").is_err(),
            "handles come from the first"
        );
        drop(second);
        assert!(!is_busy());
        node.bitmaps().remove("a").unwrap();
    }

    #[test]
    fn reading_takes_no_lock() {
        in_time(|| {
            let node = node_with(&["a"]);
            let job = node.track(&quiesced(&node), Granularity::DEFAULT).unwrap();
            write(&node, 0..1);
            node.bitmaps().disable("a").unwrap();
            let frozen = node.bitmaps().freeze("a").unwrap();
            let _locked = job.lock();
            assert_eq!(frozen.next_dirty(0..LEN), Some(0));
            let other = frozen.clone();
            assert_eq!(
                other.extents(0..LEN).count(),
                frozen.extents(0..LEN).count()
            );
        });
    }
}

mod stored {
    use super::*;

    fn node_with_storage() -> Node {
        let node = Node::new(LEN);
        node.bitmaps().set_storage(Some(BitmapStorage::default()));
        node
    }

    #[test]
    fn a_read_only_bitmap_keeps_the_disk_from_being_written() {
        let node = node_with_storage();
        let queue = node.queue();
        node.bitmaps()
            .add(&quiesced(&node), "a", persistent())
            .unwrap();
        node.bitmaps()
            .add(&quiesced(&node), "b", persistent())
            .unwrap();
        let guard = quiesced(&node);
        let Begin::Wait(mut waiting) = node.begin_write((0..1).into()) else {
            panic!("the guest is held");
        };
        node.bitmaps().mark_readonly(&guard, "a").unwrap();
        node.bitmaps().mark_readonly(&guard, "b").unwrap();
        assert!(
            waiting.try_begin().is_none(),
            "it may be writable when the guest goes on"
        );
        drop(guard);
        assert_eq!(
            waiting.try_begin().unwrap().unwrap_err(),
            WriteRefused::ReadOnly
        );
        let is_refused = || {
            [
                node.begin_write((0..1).into()),
                queue.begin_write((0..1).into()),
                node.begin_write((LEN..LEN + 1).into()),
            ]
            .into_iter()
            .all(|begin| matches!(begin, Begin::Refused(WriteRefused::ReadOnly)))
        };
        assert!(is_refused());
        // Others that record do not change that, nor do those that come and go.
        node.bitmaps().disable("b").unwrap();
        drop(node.track(&quiesced(&node), Granularity::DEFAULT).unwrap());
        assert!(is_refused());
        node.bitmaps().mark_writable("a").unwrap();
        assert!(is_refused(), "the other is read-only still");
        node.bitmaps().mark_writable("b").unwrap();
        write(&node, 0..1);
        assert_eq!(runs(&node, "a"), ranges([0..G]));
        let error = io::Error::from(WriteRefused::ReadOnly);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn who_waits_goes_on_if_it_is_writable_again_when_the_guest_is() {
        let node = node_with_storage();
        node.bitmaps()
            .add(&quiesced(&node), "a", persistent())
            .unwrap();
        let guard = quiesced(&node);
        node.bitmaps().mark_readonly(&guard, "a").unwrap();
        let Begin::Wait(mut waiting) = node.begin_write((0..1).into()) else {
            panic!("the guest is held");
        };
        node.bitmaps().mark_writable("a").unwrap();
        drop(guard);
        waiting.try_begin().unwrap().unwrap().finish(());
        assert_eq!(runs(&node, "a"), ranges([0..G]));
    }

    #[test]
    fn only_what_is_stored_is_read_only() {
        let node = node_with(&["a"]);
        let guard = quiesced(&node);
        let name = "a".to_owned();
        let refused = BitmapError::NotPersistent { name };
        assert_eq!(
            node.bitmaps().mark_readonly(&guard, "a"),
            Err(refused.clone())
        );
        assert_eq!(node.bitmaps().mark_writable("a"), Err(refused));
        let wrong = quiesced(&Node::new(LEN));
        let other = node.bitmaps().mark_readonly(&wrong, "a");
        assert_eq!(other, Err(BitmapError::OtherNode));
    }

    #[test]
    fn what_is_exported_comes_back_as_it_was() {
        let node = node_with_storage();
        let guard = quiesced(&node);
        node.bitmaps().add(&guard, "on", persistent()).unwrap();
        node.bitmaps().add(&guard, "off", persistent()).unwrap();
        node.bitmaps()
            .add(&guard, "transient", BitmapOptions::default())
            .unwrap();
        drop(guard);
        write(&node, 0..1);
        node.bitmaps().disable("off").unwrap();
        write(&node, G..G + 1);
        let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
        assert!(export.to_keep.is_empty());

        let again = Node::new(LEN);
        let guard = quiesced(&again);
        again
            .bitmaps()
            .import_state(&guard, export.to_store)
            .unwrap();
        drop(guard);
        let infos = node.bitmaps().query_all();
        assert_eq!(again.bitmaps().query_all(), infos[..2]);
        for name in ["on", "off"] {
            assert_eq!(runs(&again, name), runs(&node, name));
        }
        write(&again, 4 * G..4 * G + 1);
        assert_eq!(runs(&again, "on"), ranges([0..2 * G, 4 * G..5 * G]));
        assert_eq!(runs(&again, "off"), ranges([0..G]));
    }

    #[test]
    fn what_was_in_use_knows_nothing() {
        let node = node_with_storage();
        let mut bits = HBitmap::new(LEN, granularity(4 * KIB)).unwrap();
        bits.set_all();
        let mut state = BitmapState::new("a", bits);
        (state.is_enabled, state.is_in_use) = (true, true);
        let guard = quiesced(&node);
        node.bitmaps().import_state(&guard, vec![state]).unwrap();
        drop(guard);
        let info = node.bitmaps().query("a").unwrap();
        assert!(info.is_inconsistent && info.is_persistent && !info.is_recording);
        assert_eq!((info.dirty_bytes, info.granularity.bytes()), (0, 4 * KIB));
        let error = node.bitmaps().clear("a").unwrap_err();
        assert!(error.to_string().contains("removed"), "{error}");
        let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
        assert_eq!(
            (export.to_store.len(), &*export.to_keep),
            (0, &["a".to_owned()][..])
        );
        node.bitmaps().remove("a").unwrap();
        let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
        assert!(export.to_keep.is_empty());
    }

    #[test]
    fn all_are_imported_or_none() {
        let node = node_with_storage();
        let guard = quiesced(&node);
        let state = |name: &str, len, bytes| {
            let mut state = BitmapState::new(name, HBitmap::new(len, granularity(bytes)).unwrap());
            state.is_enabled = true;
            state
        };
        let good = || state("good", LEN, G);
        let name = "good".to_owned();
        let long = "x".repeat(1024);
        for (bad, error) in [
            (state("", LEN, G), BitmapError::NameEmpty),
            (
                state("a", LEN, 256),
                BitmapError::BadGranularity(granularity(256)),
            ),
            (good(), BitmapError::NameExists { name }),
            (
                state(&long, LEN, G),
                BitmapError::NameTooLong { bytes: 1024 },
            ),
            (
                state("a", LEN + 1, G),
                BitmapError::SizeMismatch {
                    name: "a".to_owned(),
                    len: LEN + 1,
                    expected: LEN,
                },
            ),
        ] {
            let answer = node.bitmaps().import_state(&guard, vec![good(), bad]);
            assert_eq!(answer, Err(error));
            assert!(node.bitmaps().query_all().is_empty());
            node.bitmaps().check_invariants();
        }
        let wrong = quiesced(&Node::new(LEN));
        let answer = node.bitmaps().import_state(&wrong, vec![good()]);
        assert_eq!(answer, Err(BitmapError::OtherNode));
        let answer = node.bitmaps().export_state(&wrong);
        assert_eq!(answer, Err(BitmapError::OtherNode));
        node.bitmaps().import_state(&guard, vec![good()]).unwrap();
    }

    /// A second migration is tried, and meanwhile the first one has given up: when the second gives up as well,
    /// nobody else has the bitmap, and it must be stored.
    #[test]
    fn what_is_taken_back_while_it_is_held_again_is_stored_when_that_ends() {
        let node = Node::new(LEN);
        let bitmaps = node.bitmaps();
        bitmaps.set_storage(Some(BitmapStorage::default()));
        bitmaps.add_disabled("a", persistent()).unwrap();
        bitmaps.hold("a").unwrap().hand_over();
        let hold = bitmaps.hold("a").unwrap();
        bitmaps.take_back();
        let kept = || {
            let export = bitmaps.export_state(&quiesced(&node)).unwrap();
            export.to_keep
        };
        assert_eq!(kept(), ["a"], "somebody has it");
        drop(hold);
        assert_eq!(kept(), [""; 0]);
    }

    #[test]
    fn what_was_handed_over_is_left_out_until_it_is_taken_back() {
        let node = node_with_storage();
        node.bitmaps()
            .add(&quiesced(&node), "a", persistent())
            .unwrap();
        let kept = || {
            node.bitmaps()
                .export_state(&quiesced(&node))
                .unwrap()
                .to_keep
        };
        let hold = node.bitmaps().hold("a").unwrap();
        write(&node, 0..1);
        assert_eq!(
            hold.snapshot().unwrap().dirty_bytes(),
            G,
            "it records while it is held"
        );
        assert_eq!(kept(), ["a"]);
        drop(hold);
        assert!(kept().is_empty(), "the migration has failed");
        node.bitmaps().hold("a").unwrap().hand_over();
        assert_eq!(kept(), ["a"]);
        drop(node.bitmaps().hold("a").unwrap());
        assert_eq!(kept(), ["a"], "as before it was held");
        node.bitmaps().take_back();
        assert!(kept().is_empty());
        assert_eq!(node.bitmaps().query("a").unwrap().busy_with, None);
    }
}

/// Whatever a caller passes, he gets an answer.
mod extremes {
    use super::*;
    use blockjob::{Grown, Transaction};

    #[test]
    fn names_may_have_any_bytes() {
        let node = Node::new(LEN);
        let bitmaps = node.bitmaps();
        let names = ["\0", "a\0b", "a", " ", "\u{10ffff}", "\n", "../a", "日本"];
        for name in names {
            bitmaps
                .add_disabled(name, BitmapOptions::default())
                .unwrap();
        }
        bitmaps.remove("a").unwrap();
        assert!(bitmaps.query("a\0b").is_ok(), "bytes count, not a prefix");
        let long = "x".repeat(1 << 20);
        let missing = |answer: Result<(), BitmapError>| {
            assert!(matches!(answer, Err(BitmapError::NotFound { .. })));
        };
        for name in ["", "a", &long] {
            missing(bitmaps.remove(name));
            missing(bitmaps.rename(name, "b"));
            missing(bitmaps.merge("\0", &[(&node, name)]));
            missing(bitmaps.freeze(name).map(drop));
        }
        let too_long = BitmapError::NameTooLong { bytes: long.len() };
        let add = bitmaps.add_disabled(&long, BitmapOptions::default());
        assert_eq!(add, Err(too_long.clone()));
        assert_eq!(bitmaps.rename("\0", &long), Err(too_long.clone()));
        let bits = HBitmap::new(LEN, Granularity::DEFAULT).unwrap();
        let guard = quiesced(&node);
        let import = bitmaps.import_state(&guard, vec![BitmapState::new(&*long, bits)]);
        assert_eq!(import, Err(too_long.clone()));
        let mut list = Transaction::new();
        list.rename(&node, "\0", &long);
        let error = list.prepare().try_prepared().unwrap().unwrap_err();
        assert_eq!(error.why, too_long.into());
        assert_eq!(bitmaps.query_all().len(), names.len() - 1);
    }

    #[test]
    fn ranges_may_lie_anywhere() {
        let node = node_with(&["a"]);
        write(&node, LEN - 1..u64::MAX);
        write(&node, u64::MAX..u64::MAX);
        let page =
            |range: std::ops::Range<u64>, runs_max| node.bitmaps().runs("a", range, runs_max);
        let all = page(0..u64::MAX, usize::MAX).unwrap();
        assert_eq!((all.runs, all.next), (ranges([LEN - G..LEN]), None));
        let none = page(0..LEN, 0).unwrap();
        assert_eq!((none.runs, none.next), (vec![], Some(0)), "there is more");
        let past = |offset| BitmapError::OutOfRange { offset, len: LEN };
        assert_eq!(page(LEN..u64::MAX, 1).unwrap().next, None);
        assert_eq!(page(LEN + 1..u64::MAX, 1), Err(past(LEN + 1)));
        assert_eq!(page(u64::MAX..u64::MAX, 1), Err(past(u64::MAX)));
        let reversed = std::ops::Range { start: LEN, end: 0 };
        assert_eq!(page(reversed, 1).unwrap().runs, []);

        let claim = node.bitmaps().claim("a", ClaimFor::Change).unwrap();
        let mut bits = claim.lock().unwrap();
        assert!(bits.set((LEN..u64::MAX).into()).is_err());
        assert!(bits.reset((0..u64::MAX).into()).is_err());
        assert!(bits.reset_inner((u64::MAX - 1..u64::MAX).into()).is_err());
        drop(bits);
        drop(claim);
        node.bitmaps().disable("a").unwrap();
        let frozen = node.bitmaps().freeze("a").unwrap();
        assert_eq!(frozen.extents(0..u64::MAX).count(), 2);
        assert_eq!(frozen.extents(LEN..u64::MAX).count(), 0);
        assert_eq!(frozen.extents(u64::MAX..u64::MAX).count(), 0);
    }

    #[test]
    fn a_disk_of_no_bytes_has_bitmaps_like_any_other() {
        let (node, other) = (Node::new(0), Node::new(0));
        let bitmaps = node.bitmaps();
        bitmaps
            .add(&quiesced(&node), "a", of_granularity(512))
            .unwrap();
        let coarse = of_granularity(1 << 31);
        other.bitmaps().add(&quiesced(&other), "b", coarse).unwrap();
        write(&node, 0..0);
        write(&node, 0..u64::MAX);
        bitmaps.merge("a", &[(&other, "b")]).unwrap();
        bitmaps.claim("a", ClaimFor::Change).unwrap().abdicate();
        bitmaps.clear("a").unwrap();
        let info = bitmaps.query("a").unwrap();
        assert_eq!((info.len, info.dirty_bytes), (0, 0));
        assert_eq!(runs(&node, "a"), []);
        bitmaps.disable("a").unwrap();
        let frozen = bitmaps.freeze("a").unwrap();
        assert_eq!(frozen.extents(0..u64::MAX).count(), 0);
        drop(frozen);
        bitmaps.enable(&quiesced(&node), "a").unwrap();
        let mut list = Transaction::new();
        list.add(&node, "c", coarse)
            .merge(&node, "c", &[(&node, "a")])
            .remove(&node, "a");
        let prepared = list.prepare().try_prepared().unwrap();
        prepared.unwrap().commit();
        let guard = quiesced(&node);
        node.resize(&guard, 5, Grown::Dirty).unwrap().commit();
        drop(guard);
        assert_eq!(runs(&node, "c"), ranges([0..5]));
        bitmaps.check_invariants();
    }

    #[test]
    fn a_disk_too_long_for_bitmaps_has_none() {
        for len in [1 << 63, u64::MAX] {
            let node = Node::new(len);
            let bitmaps = node.bitmaps();
            for granule in [512, 1 << 31] {
                let granularity = granularity(granule);
                let too_large = BitmapError::TooLarge { len, granularity };
                let guard = quiesced(&node);
                let options = of_granularity(granule);
                assert_eq!(bitmaps.add(&guard, "a", options), Err(too_large.clone()));
                let mut list = Transaction::new();
                list.add_disabled(&node, "a", options);
                let error = list.prepare().try_prepared().unwrap().unwrap_err();
                assert_eq!(error.why, too_large.into());
            }
            write(&node, 0..len);
            assert!(bitmaps.query_all().is_empty());
            bitmaps.check_invariants();
            let guard = quiesced(&node);
            node.resize(&guard, LEN, Grown::Dirty).unwrap().commit();
            let added = bitmaps.add(&guard, "a", BitmapOptions::default());
            assert_eq!(added, Ok(()));
        }
    }
}
