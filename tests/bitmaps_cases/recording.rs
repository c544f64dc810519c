//! What guests write, and which bitmaps record it.

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
