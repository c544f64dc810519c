//! Bitmaps that outlive the process.

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
