//! Bitmaps that are read while nobody may change them.

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
