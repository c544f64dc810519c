//! A disk that changes its length, case by case.
#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of ranges is what is recorded"
)]

use blockjob::{
    BitmapError, BitmapOptions, BusyWith, ByteRange, ClaimFor, Granularity, Grown, Limits, Mirror,
    MirrorOptions, Node, QuiesceGuard, SnapshotOf,
};

const G: u64 = 1 << 16;
const LEN: u64 = 4 * G + 512;

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn node() -> Node {
    let node = Node::new(LEN);
    let bitmaps = node.bitmaps();
    bitmaps
        .add(&quiesced(&node), "on", BitmapOptions::default())
        .unwrap();
    bitmaps
        .add_disabled("off", BitmapOptions::default())
        .unwrap();
    node
}

fn resize(node: &Node, len: u64, grown: Grown) -> Result<(), BitmapError> {
    let guard = quiesced(node);
    node.resize(&guard, len, grown)?.commit();
    node.bitmaps().check_invariants();
    Ok(())
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

#[test]
fn what_a_disk_gains_is_dirty_where_writes_are_recorded() {
    let node = node();
    resize(&node, 8 * G, Grown::Dirty).unwrap();
    // The granule that the old end cut is dirty as a whole.
    assert_eq!(runs(&node, "on"), ranges([4 * G..8 * G]));
    assert_eq!(runs(&node, "off"), []);
    node.bitmaps().clear("on").unwrap();
    resize(&node, 9 * G, Grown::Clean).unwrap();
    assert_eq!(runs(&node, "on"), []);
}

#[test]
fn what_a_disk_loses_and_gains_again_is_dirty() {
    let node = node();
    write(&node, 0..1);
    write(&node, 3 * G..LEN);
    node.bitmaps().merge("off", &[(&node, "on")]).unwrap();
    resize(&node, 3 * G + 100, Grown::Dirty).unwrap();
    assert_eq!(runs(&node, "on"), ranges([0..G, 3 * G..3 * G + 100]));
    resize(&node, G, Grown::Dirty).unwrap();
    assert_eq!(runs(&node, "on"), ranges([0..G]));
    resize(&node, LEN, Grown::Dirty).unwrap();
    assert_eq!(runs(&node, "on"), ranges([0..LEN]));
    assert_eq!(
        runs(&node, "off"),
        ranges([0..G]),
        "that one does not record"
    );
}

#[test]
fn writes_are_recorded_wherever_the_disk_has_grown_to() {
    let node = node();
    let fine = BitmapOptions::default();
    let mut lens = vec![LEN];
    for len in [LEN + 1, 5 * G, 9 * G, 40 * G, 41 * G, 7, 300 * G] {
        resize(&node, len, Grown::Clean).unwrap();
        lens.push(len);
        // Before each end that there was, on it and across it.
        for end in lens.iter().filter(|end| **end < len) {
            for start in [end.saturating_sub(1), *end] {
                node.bitmaps().clear("on").unwrap();
                write(&node, start..start + 1);
                let granule = start / G * G;
                let expected = ranges([granule..(granule + G).min(len)]);
                assert_eq!(runs(&node, "on"), expected, "{start} of {len}");
            }
        }
        write(&node, 0..u64::MAX);
        assert_eq!(runs(&node, "on"), ranges([0..len]));
        node.bitmaps().clear("on").unwrap();
        write(&node, len..u64::MAX);
        assert_eq!(runs(&node, "on"), [], "past the end of {len}");
    }
    // A log of another granularity, made before or after, covers it as well.
    node.bitmaps().add(&quiesced(&node), "fine", fine).unwrap();
    write(&node, 300 * G - 1..300 * G);
    assert_eq!(runs(&node, "fine"), ranges([299 * G..300 * G]));
}

#[test]
fn a_log_that_was_not_in_use_follows_when_it_is_used_again() {
    let node = node();
    node.bitmaps().disable("on").unwrap();
    resize(&node, 20 * G, Grown::Dirty).unwrap();
    assert_eq!(runs(&node, "on"), [], "it did not record");
    node.bitmaps().enable(&quiesced(&node), "on").unwrap();
    write(&node, 19 * G..20 * G);
    assert_eq!(runs(&node, "on"), ranges([19 * G..20 * G]));
}

#[test]
fn without_bitmaps_a_disk_may_have_any_length() {
    let node = Node::new(0);
    for len in [u64::MAX, 0, LEN] {
        resize(&node, len, Grown::Dirty).unwrap();
        assert_eq!(node.len(), len);
    }
    let tracked = node.track(&quiesced(&node), Granularity::DEFAULT).unwrap();
    write(&node, 0..LEN);
    assert_eq!(tracked.lock().dirty_bytes_in_len(), LEN);
}

#[test]
fn what_is_refused_changes_nothing() {
    let node = node();
    write(&node, G..G + 1);
    let before = node.bitmaps().query_all();
    let refused = |len: u64, error: BitmapError| {
        assert_eq!(resize(&node, len, Grown::Dirty), Err(error));
        let other = node.bitmaps().query_all();
        assert_eq!((node.len(), other.len()), (LEN, before.len()));
        assert_eq!(runs(&node, "on"), ranges([G..2 * G]));
        node.bitmaps().check_invariants();
    };
    let other = Node::new(LEN);
    let wrong = quiesced(&other);
    let error = node.resize(&wrong, G, Grown::Dirty).unwrap_err();
    assert_eq!(error, BitmapError::OtherNode);

    let granularity = Granularity::DEFAULT;
    refused(
        1 << 63,
        BitmapError::TooLarge {
            len: 1 << 63,
            granularity,
        },
    );
    let many = (1 << 57) + 1;
    refused(
        many,
        BitmapError::TooLarge {
            len: many,
            granularity,
        },
    );

    let with = BusyWith::Job;
    let job = node.track(&quiesced(&node), granularity).unwrap();
    refused(0, BitmapError::NodeBusy { with });
    drop(job);
    let limits = Limits::new(LEN);
    let mirror = Mirror::new(&node, limits, limits, MirrorOptions::default()).unwrap();
    refused(0, BitmapError::NodeBusy { with });
    drop(mirror);
    let name = "off".to_owned();
    let claim = node.bitmaps().claim("off", ClaimFor::Reading).unwrap();
    refused(0, BitmapError::Busy { name, with });
    drop(claim);
    assert_eq!(node.bitmaps().query_all(), before);
    resize(&node, 0, Grown::Dirty).unwrap();
    assert_eq!(runs(&node, "on"), []);
}

#[test]
fn one_that_is_dropped_was_never_there() {
    let node = node();
    write(&node, 4 * G..LEN);
    let before = node.bitmaps().query_all();
    for len in [0, 2 * G, LEN, 100 * G] {
        let guard = quiesced(&node);
        let resize = node.resize(&guard, len, Grown::Dirty).unwrap();
        assert_eq!(resize.len(), len);
        assert_eq!(node.len(), LEN);
        assert!(node.bitmaps().query("on").unwrap().is_busy());
        drop(resize);
        drop(guard);
        assert_eq!(node.bitmaps().query_all(), before);
        write(&node, LEN..200 * G);
        assert_eq!(
            node.bitmaps().query_all(),
            before,
            "the log ends with the disk"
        );
    }
}

/// A backup, a disk that shrinks and grows, and an incremental backup: it restores what the disk is.
#[test]
fn an_incremental_backup_across_a_change_of_length_restores_the_disk() {
    let node = node();
    let mut disk = vec![1u8; LEN as usize];
    let mut backup = disk.clone();
    let change = |node: &Node, disk: &mut Vec<u8>, at: usize| {
        disk[at] = disk[at].wrapping_add(1);
        write(node, at as u64..at as u64 + 1);
    };
    change(&node, &mut disk, 4 * G as usize);
    for len in [2 * G + 7, LEN + G] {
        let guard = quiesced(&node);
        let resize = node.resize(&guard, len, Grown::Dirty).unwrap();
        disk.resize(len as usize, 0);
        resize.commit();
    }
    change(&node, &mut disk, 5);
    let changed = node.bitmaps().snapshot("on", SnapshotOf::Bitmap).unwrap();
    backup.resize(disk.len(), 0xee);
    for run in changed.runs() {
        let bytes = run.start() as usize..run.end() as usize;
        backup[bytes.clone()].copy_from_slice(&disk[bytes]);
    }
    assert!(backup == disk);
}
