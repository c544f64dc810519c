//! Adding, removing, naming and looking at bitmaps.

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
