//! Both ends and what they owe to the nodes, case by case.

use std::time::Duration;

use blockjob::migration::{
    ArrivalState, BitmapAlias, BitmapId, BitmapMapping, Fault, GuestStartError, IncomingBitmap,
    IncomingMigration, IncomingOptions, MappingError, MigratingNode, Mode, Next, NodeAlias,
    OutgoingEvent, OutgoingMigration, OutgoingOptions, SetupError, StreamKind,
};
use blockjob::{
    BitmapError, BitmapMigration, BitmapOptions, BitmapState, BitmapStorage, BusyWith, ByteRange,
    ClaimFor, Granularity, HBitmap, IncomingError, Node, OutgoingError,
};

use crate::truth::{TrueBitmap, add, bits_of, quiesce};

pub(crate) const LEN: u64 = 100 << 20;

pub(crate) fn bitmap(name: &str, enabled: bool, persistent: bool) -> TrueBitmap {
    TrueBitmap {
        node: String::new(),
        name: name.into(),
        size: LEN,
        granularity: Granularity::DEFAULT,
        enabled,
        persistent,
        sha256: String::new(),
        dirty: vec![(1 << 20..3 << 20).into()],
    }
}

pub(crate) fn disk(bitmaps: &[TrueBitmap]) -> Node {
    let node = Node::new(bitmaps.first().map_or(LEN, |bitmap| bitmap.size));
    for bitmap in bitmaps {
        add(&node, bitmap).unwrap();
    }
    node
}

pub(crate) fn write(node: &Node, at: u64) {
    let ticket = node.begin_write((at..at + 1).into()).go();
    ticket.expect("nobody quiesces it").finish(());
}

pub(crate) fn pull(outgoing: &mut OutgoingMigration) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap() {
        bytes.extend(&piece[..len]);
    }
    bytes
}

pub(crate) fn stop(outgoing: &mut OutgoingMigration, node: &Node) {
    outgoing.stop(&[&quiesce(node)]).unwrap();
}

pub(crate) fn start(incoming: &mut IncomingMigration, node: &Node) {
    incoming.guest_starts(&[&quiesce(node)]).unwrap();
}

/// Everything from one host to the other, with the guest standing still.
pub(crate) fn migrate(
    source: &BitmapMigration,
    from: &[&Node],
    target: &BitmapMigration,
    to: &[&Node],
) -> Vec<IncomingBitmap> {
    let mut outgoing = source.outgoing(OutgoingOptions::default()).unwrap();
    let guards: Vec<_> = from.iter().map(|node| quiesce(node)).collect();
    outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
    let mut incoming = target.incoming(IncomingOptions::default());
    incoming.feed(&pull(&mut outgoing)).unwrap();
    if incoming.finish().is_ok() {
        let guards: Vec<_> = to.iter().map(|node| quiesce(node)).collect();
        incoming
            .guest_starts(&guards.iter().collect::<Vec<_>>())
            .unwrap();
    }
    outgoing.finish().unwrap();
    incoming.bitmaps()
}

pub(crate) fn one(node: &Node) -> BitmapMigration {
    BitmapMigration::new().with_node("d", node)
}

pub(crate) fn id(node: &str, bitmap: &str) -> BitmapId {
    BitmapId {
        node: node.into(),
        bitmap: bitmap.into(),
    }
}

#[test]
fn what_cannot_be_sent_is_said_and_nothing_is_taken() {
    let long = "n".repeat(256);
    let state = |name: &str, is_in_use| {
        let mut state = BitmapState::new(name, HBitmap::new(LEN, Granularity::DEFAULT).unwrap());
        state.is_in_use = is_in_use;
        state
    };
    // Each beside a sound bitmap that is looked at before and one after.
    let try_out = |name: &str, spoil: &dyn Fn(&Node)| {
        let node = disk(&[bitmap("first", true, true)]);
        spoil(&node);
        add(&node, &bitmap("last", true, true)).unwrap();
        let before = node.bitmaps().query_all();
        let error = BitmapMigration::new()
            .with_node(name, &node)
            .outgoing(OutgoingOptions::default());
        let error = error.unwrap_err();
        assert_eq!(node.bitmaps().query_all(), before, "{error}");
        for info in before
            .iter()
            .filter(|info| info.name != "first" && info.is_inconsistent)
        {
            node.bitmaps().remove(&info.name).unwrap();
        }
        if before.iter().all(|info| !info.is_busy()) {
            let export = node.bitmaps().export_state(&quiesce(&node)).unwrap();
            assert!(export.to_store.len() >= 2, "{error}: left out of exports");
        }
        error
    };
    let nothing = |_: &Node| {};
    assert_eq!(
        try_out("", &nothing),
        SetupError::NodeUnnamed {
            bitmap: "last".into()
        }
    );
    let found = try_out("#block1", &nothing);
    assert_eq!(
        found,
        SetupError::NodeAutoNamed {
            bitmap: id("#block1", "last")
        }
    );
    assert_eq!(
        try_out(&long, &nothing),
        SetupError::NodeName { node: long.clone() }
    );
    let found = try_out("d", &|node| {
        drop(node.bitmaps().add_disabled(&long, BitmapOptions::default()));
    });
    assert_eq!(
        found,
        SetupError::NameTooLong {
            bitmap: id("d", &long)
        }
    );
    let found = try_out("d", &|node| {
        drop(
            node.bitmaps()
                .add_disabled("a\0b", BitmapOptions::default()),
        );
    });
    assert_eq!(
        found,
        SetupError::NameNul {
            bitmap: id("d", "a\0b")
        }
    );
    let found = try_out("d", &|node| {
        node.bitmaps()
            .import_state(&quiesce(node), vec![state("x", true)])
            .unwrap();
    });
    assert_eq!(
        found,
        SetupError::Inconsistent {
            bitmap: id("d", "x")
        }
    );
    let found = try_out("d", &|node| {
        node.bitmaps()
            .import_state(&quiesce(node), vec![state("x", false)])
            .unwrap();
        node.bitmaps().mark_readonly(&quiesce(node), "x").unwrap();
    });
    assert_eq!(
        found,
        SetupError::ReadOnly {
            bitmap: id("d", "x")
        }
    );
    let found = try_out("d", &|node| {
        add(node, &bitmap("x", false, false)).unwrap();
        std::mem::forget(node.bitmaps().claim("x", ClaimFor::Reading).unwrap());
    });
    let with = BusyWith::Job;
    assert_eq!(
        found,
        SetupError::Busy {
            bitmap: id("d", "x"),
            with
        }
    );
    // Two disks with one name in the stream.
    let nodes = [
        disk(&[bitmap("a", true, false)]),
        disk(&[bitmap("b", true, false)]),
    ];
    let mut attached = MigratingNode::new("x", &nodes[0]);
    attached.device = Some("d".into());
    let twice = BitmapMigration::new()
        .with(attached)
        .with_node("d", &nodes[1]);
    let error = twice.outgoing(OutgoingOptions::default()).unwrap_err();
    assert_eq!(error, SetupError::NodeTwice { alias: "d".into() });
    assert!(nodes.iter().all(|node| {
        node.bitmaps()
            .query_all()
            .iter()
            .all(|info| !info.is_busy())
    }));
    // Nodes without bitmaps need no name, and those of jobs have none.
    let node = Node::new(LEN);
    let _job = node.track(&quiesce(&node), Granularity::DEFAULT).unwrap();
    let mut nothing = BitmapMigration::new()
        .with_node("", &node)
        .outgoing(OutgoingOptions::default())
        .unwrap();
    stop(&mut nothing, &node);
    assert_eq!(pull(&mut nothing), [1, 1]);
    nothing.finish().unwrap();
}

#[test]
fn each_bitmap_is_sent_once_and_in_one_order() {
    let nodes = [
        disk(&[bitmap("a", true, false), bitmap("b", true, false)]),
        disk(&[bitmap("c", true, false)]),
    ];
    let mut attached = MigratingNode::new("y", &nodes[1]);
    attached.device = Some("drive".into());
    let mut again = MigratingNode::new("z", &nodes[1]);
    again.device = Some("other".into());
    let migration = BitmapMigration::new()
        .with_node("x", &nodes[0])
        .with(attached)
        .with(again);
    let outgoing = migration.outgoing(OutgoingOptions::default()).unwrap();
    let order: Vec<_> = outgoing
        .bitmaps()
        .into_iter()
        .map(|bitmap| bitmap.id)
        .collect();
    assert_eq!(order, [id("y", "c"), id("x", "b"), id("x", "a")]);
}

#[test]
fn a_mapping_breaks_one_rule_at_a_time() {
    let bitmaps = |bitmaps: &[(&str, &str)]| {
        let alias = |(name, alias): &(&str, &str)| BitmapAlias::new(*name, *alias);
        bitmaps.iter().map(alias).collect::<Vec<_>>()
    };
    let node = |node: &str, alias: &str, bitmaps| NodeAlias {
        node: node.into(),
        alias: alias.into(),
        bitmaps,
    };
    let of = |name: &str, alias: &str| {
        let entry = node(name, alias, vec![]);
        BitmapMapping::new(vec![node("ok", "ok", vec![]), entry]).map(drop)
    };
    let within =
        |names: &[(&str, &str)]| BitmapMapping::new(vec![node("d", "d", bitmaps(names))]).map(drop);
    let n = |len: usize| "n".repeat(len);
    let (name, long) = ("x".to_owned(), n(256));
    for fits in [
        of(&n(31), &n(255)),
        of("any name", "a-._9"),
        within(&[(&n(1023), &n(255))]),
    ] {
        assert_eq!(fits, Ok(()));
    }
    assert_eq!(within(&[("a", "b"), ("b", "a")]), Ok(()));
    assert_eq!(
        of("", "x"),
        Err(MappingError::NodeNameEmpty {
            alias: name.clone()
        })
    );
    assert_eq!(
        of(&n(32), "x"),
        Err(MappingError::NodeNameTooLong { node: n(32) })
    );
    assert!(matches!(
        of("a\0", "x"),
        Err(MappingError::NodeNameNul { .. })
    ));
    assert_eq!(
        of("x", ""),
        Err(MappingError::NodeAliasEmpty { node: name.clone() })
    );
    assert_eq!(
        of("x", &long),
        Err(MappingError::NodeAliasTooLong { node: name })
    );
    for alias in ["1a", "-a", "a b", "a\0", "ä", "a/b"] {
        assert!(matches!(
            of("x", alias),
            Err(MappingError::NodeAliasMalformed { .. })
        ));
    }
    // Doubled names are told before doubled aliases.
    assert_eq!(
        of("ok", "ok"),
        Err(MappingError::NodeTwice { node: "ok".into() })
    );
    assert!(matches!(
        of("x", "ok"),
        Err(MappingError::NodeAliasTwice { .. })
    ));
    assert!(matches!(
        within(&[("", "a")]),
        Err(MappingError::BitmapNameEmpty { .. })
    ));
    assert!(matches!(
        within(&[(&n(1024), "a")]),
        Err(MappingError::BitmapNameTooLong { .. })
    ));
    assert!(matches!(
        within(&[("a\0", "a")]),
        Err(MappingError::BitmapNameNul { .. })
    ));
    assert!(matches!(
        within(&[("a", "")]),
        Err(MappingError::BitmapAliasEmpty { .. })
    ));
    assert!(matches!(
        within(&[("a", &long)]),
        Err(MappingError::BitmapAliasTooLong { .. })
    ));
    assert!(matches!(
        within(&[("a", "\0")]),
        Err(MappingError::BitmapAliasNul { .. })
    ));
    assert!(matches!(
        within(&[("a", "a"), ("a", "a")]),
        Err(MappingError::BitmapTwice { .. })
    ));
    assert!(matches!(
        within(&[("a", "a"), ("b", "a")]),
        Err(MappingError::BitmapAliasTwice { .. })
    ));
}

/// Name, alias, and whether it is to be persistent.
pub(crate) type Mapped<'a> = (&'a str, &'a str, Option<bool>);

pub(crate) fn mapping(entries: &[(&str, &str, &[Mapped<'_>])]) -> BitmapMapping {
    let nodes = entries.iter().map(|(node, alias, bitmaps)| NodeAlias {
        node: (*node).into(),
        alias: (*alias).into(),
        bitmaps: bitmaps
            .iter()
            .map(|(name, alias, persistent)| {
                let mut alias = BitmapAlias::new(*name, *alias);
                alias.persistent = *persistent;
                alias
            })
            .collect(),
    });
    BitmapMapping::new(nodes.collect()).unwrap()
}

#[test]
fn aliases_on_either_side_or_both_come_to_the_same() {
    // What the source calls s0/a and s1/b is called t1/x and t0/y there: swapped crosswise.
    let s = |alias: [&str; 2], names: [&str; 2]| {
        mapping(&[
            ("s0", alias[0], &[("a", names[0], None)]),
            ("s1", alias[1], &[("b", names[1], None)]),
        ])
    };
    let t = |alias: [&str; 2], names: [&str; 2]| {
        mapping(&[
            ("t1", alias[0], &[("x", names[0], None)]),
            ("t0", alias[1], &[("y", names[1], None)]),
        ])
    };
    for (source, target) in [
        (Some(s(["t1", "t0"], ["x", "y"])), None),
        (None, Some(t(["s0", "s1"], ["a", "b"]))),
        (
            Some(s(["n1", "n2"], ["m", "m"])),
            Some(t(["n1", "n2"], ["m", "m"])),
        ),
    ] {
        let from = [
            disk(&[bitmap("a", true, false), bitmap("unmapped", true, false)]),
            disk(&[bitmap("b", false, false)]),
        ];
        if source.is_none() {
            from[0].bitmaps().remove("unmapped").unwrap();
        }
        let to = [Node::new(LEN), Node::new(LEN)];
        let mut here = BitmapMigration::new()
            .with_node("s0", &from[0])
            .with_node("s1", &from[1]);
        here.set_mapping(source);
        let mut there = BitmapMigration::new()
            .with_node("t0", &to[0])
            .with_node("t1", &to[1]);
        there.set_mapping(target);
        let came = migrate(&here, &[&from[0], &from[1]], &there, &[&to[0], &to[1]]);
        assert_eq!(came.len(), 2);
        assert!(to[1].bitmaps().query("x").unwrap().is_recording);
        assert!(!to[0].bitmaps().query("y").unwrap().is_recording);
    }
    // A name that is too long for the stream goes under an alias.
    let long = "n".repeat(1023);
    let (from, to) = (disk(&[bitmap(&long, true, false)]), Node::new(LEN));
    let both = mapping(&[("d", "d", &[(&long, "short", None)])]);
    let here = one(&from).with_mapping(both.clone());
    migrate(&here, &[&from], &one(&to).with_mapping(both), &[&to]);
    assert_eq!(bits_of(&to, &long), bits_of(&from, &long));
}

#[test]
fn what_is_not_mapped_stays_and_no_mapping_is_not_an_empty_one() {
    let from = disk(&[bitmap("a", true, true), bitmap("busy", false, false)]);
    let claim = from.bitmaps().claim("busy", ClaimFor::Reading).unwrap();
    for (entries, count) in [
        (vec![], 0),
        (vec![("d", "d", &[][..])], 0),
        (vec![("d", "d", &[("a", "a", None)][..])], 1),
    ] {
        let to = Node::new(LEN);
        let here = one(&from).with_mapping(mapping(&entries));
        let came = migrate(&here, &[&from], &one(&to), &[&to]);
        assert_eq!(came.len(), count);
        from.bitmaps().take_back();
    }
    drop(claim);
    // An auto-generated name does not matter if it is not sent.
    let auto = BitmapMigration::new().with_node("#block7", &from);
    let empty = auto.clone().with_mapping(mapping(&[]));
    assert!(empty.outgoing(OutgoingOptions::default()).is_ok());
    let aliased = auto.with_mapping(mapping(&[("#block7", "d", &[("a", "a", None)])]));
    assert!(aliased.outgoing(OutgoingOptions::default()).is_ok());
}

#[test]
fn persistence_is_changed_by_either_side_and_the_destination_has_the_last_word() {
    for was in [false, true] {
        for source in [None, Some(false), Some(true)] {
            for target in [None, Some(false), Some(true)] {
                let (from, to) = (disk(&[bitmap("a", true, was)]), Node::new(LEN));
                let here = one(&from).with_mapping(mapping(&[("d", "d", &[("a", "a", source)])]));
                let there = one(&to).with_mapping(mapping(&[("d", "d", &[("a", "a", target)])]));
                migrate(&here, &[&from], &there, &[&to]);
                let expected = target.or(source).unwrap_or(was);
                // Without any storage, too.
                assert_eq!(to.bitmaps().query("a").unwrap().is_persistent, expected);
                assert_eq!(from.bitmaps().query("a").unwrap().is_persistent, was);
            }
        }
    }
}

/// Whether a bitmap would be stored.
pub(crate) fn is_stored(node: &Node, name: &str) -> bool {
    let export = node.bitmaps().export_state(&quiesce(node)).unwrap();
    export.to_store.iter().any(|state| state.name == name)
}

#[test]
fn bitmaps_are_in_use_on_both_sides_until_they_have_moved() {
    let (from, to) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    incoming.feed(&pull(&mut outgoing)).unwrap();
    let refuses = |node: &Node| {
        let bitmaps = node.bitmaps();
        let is_busy =
            |result: Result<(), BitmapError>| matches!(result, Err(BitmapError::Busy { .. }));
        assert!(is_busy(bitmaps.remove("a")) && is_busy(bitmaps.clear("a")));
        assert!(is_busy(bitmaps.disable("a")) && is_busy(bitmaps.enable(&quiesce(node), "a")));
        assert!(is_busy(bitmaps.rename("a", "b")));
        assert!(is_busy(bitmaps.freeze("a").map(drop)));
        assert!(is_busy(bitmaps.claim("a", ClaimFor::Reading).map(drop)));
        assert!(is_busy(bitmaps.hold("a").map(drop)));
        assert!(is_busy(bitmaps.merge("a", &[(node, "a")])));
        let error = one(node).outgoing(OutgoingOptions::default()).unwrap_err();
        assert!(matches!(error, SetupError::Busy { .. }));
        assert!(!is_stored(node, "a"));
    };
    refuses(&from);
    refuses(&to);
    // Nothing of what is arriving can be seen.
    assert!(
        to.bitmaps()
            .snapshot("a", blockjob::SnapshotOf::WithSuccessor)
            .is_err()
    );
    assert!(to.bitmaps().runs("a", 0..LEN, 1).is_err());
    assert_eq!(to.bitmaps().query("a").unwrap().dirty_bytes, 0);
    // Recording goes on.
    write(&from, 50 << 20);
    assert_eq!(
        from.bitmaps().query("a").unwrap().dirty_bytes,
        (2 << 20) + 65536
    );
    stop(&mut outgoing, &from);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    refuses(&from);
    incoming.finish().unwrap();
    refuses(&to);
    start(&mut incoming, &to);
    outgoing.finish().unwrap();
    assert!(is_stored(&to, "a"));
    // Here it is free, and left out until it is taken back.
    assert!(!is_stored(&from, "a"));
    assert!(!from.bitmaps().query("a").unwrap().is_busy());
    from.bitmaps().take_back();
    assert!(is_stored(&from, "a"));
    assert!(matches!(
        outgoing.next_bytes(Duration::ZERO, &mut [0; 9]),
        Err(OutgoingError::Over)
    ));
}

#[test]
fn given_up_before_the_guest_has_moved_nothing_has_happened() {
    for steps in 0..4 {
        for is_dropped in [false, true] {
            let from = disk(&[bitmap("a", true, true), bitmap("b", false, false)]);
            let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
            if steps > 0 {
                pull(&mut outgoing);
                write(&from, 0);
            }
            if steps > 1 {
                stop(&mut outgoing, &from);
            }
            if steps > 2 {
                pull(&mut outgoing);
            }
            if !is_dropped {
                outgoing.cancel();
                assert!(is_stored(&from, "a"));
            }
            drop(outgoing);
            assert!(is_stored(&from, "a") && from.bitmaps().query("a").unwrap().is_recording);
            assert!(
                from.bitmaps()
                    .query_all()
                    .iter()
                    .all(|info| !info.is_busy())
            );
            assert!(!from.bitmaps().query("b").unwrap().is_recording);
            // The next attempt sends the same.
            let to = Node::new(LEN);
            migrate(&one(&from), &[&from], &one(&to), &[&to]);
            assert!(to.bitmaps().query("a").unwrap().is_persistent);
            assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
        }
    }
    // Once it has moved the bitmaps here are stale.
    let from = disk(&[bitmap("a", true, true)]);
    let mut options = OutgoingOptions::default();
    options.mode = Mode::PostCopy;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let order = OutgoingError::OutOfOrder {
        what: "the guest's start",
    };
    assert_eq!(outgoing.guest_started(), Err(order));
    assert!(matches!(
        outgoing.finish(),
        Err(OutgoingError::OutOfOrder { .. })
    ));
    stop(&mut outgoing, &from);
    assert!(matches!(
        outgoing.stop(&[&quiesce(&from)]),
        Err(OutgoingError::OutOfOrder { .. })
    ));
    outgoing.guest_started().unwrap();
    drop(outgoing);
    assert!(!from.bitmaps().query("a").unwrap().is_busy());
    assert!(!is_stored(&from, "a"));
}

#[test]
fn a_write_while_the_guest_stands_still_fails_the_migration() {
    for at in [0, 2 << 20] {
        // Where it is clean and where it is dirty.
        for steps in 0..3 {
            let from = disk(&[bitmap("a", true, true)]);
            let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
            pull(&mut outgoing);
            write(&from, 5 << 20);
            stop(&mut outgoing, &from);
            let mut piece = [0; 10];
            if steps > 0 {
                let next = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap();
                assert_eq!(next, Next::Bytes(10));
            }
            if steps > 1 {
                pull(&mut outgoing);
            }
            write(&from, at);
            let node = "d".to_owned();
            let found = loop {
                match outgoing.next_bytes(Duration::ZERO, &mut piece) {
                    Ok(Next::Bytes(_)) => {}
                    Ok(_) => break outgoing.finish().unwrap_err(),
                    Err(error) => break error,
                }
            };
            assert_eq!(found, OutgoingError::GuestWrote { node });
            let events: Vec<_> = std::iter::from_fn(|| outgoing.poll_event()).collect();
            assert_eq!(events.last(), Some(&OutgoingEvent::Failed(found)));
            assert!(is_stored(&from, "a"));
            assert!(from.bitmaps().query("a").unwrap().is_recording);
        }
    }
    let from = disk(&[bitmap("a", true, true)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    let other = Node::new(1);
    let error = outgoing.stop(&[&quiesce(&other)]).unwrap_err();
    assert_eq!(error, OutgoingError::NotQuiesced { node: "d".into() });
    stop(&mut outgoing, &from);
}

/// The table of what arrives when, each row for a bitmap that records and one that does not.
#[test]
fn arrival_and_the_start_of_the_guest_in_any_order() {
    for enabled in [true, false] {
        let from = disk(&[bitmap("a", enabled, false)]);
        let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
        let begin = pull(&mut outgoing);
        stop(&mut outgoing, &from);
        let end = pull(&mut outgoing);
        let busy = |to: &Node| to.bitmaps().query("a").map(|info| info.busy_with);
        let setup = || {
            let to = Node::new(LEN);
            let mut incoming = one(&to).incoming(IncomingOptions::default());
            incoming.feed(&begin).unwrap();
            assert_eq!(busy(&to), Ok(Some(BusyWith::Migration)));
            assert!(!to.bitmaps().query("a").unwrap().is_recording);
            (to, incoming)
        };
        let has_all = |to: &Node, and: &[u64]| {
            let mut expected = bits_of(&from, "a");
            for at in and.iter().filter(|_| enabled) {
                expected.set_at(*at).unwrap();
            }
            assert_eq!(bits_of(to, "a"), expected);
            let info = to.bitmaps().query("a").unwrap();
            assert_eq!((info.is_recording, info.is_busy()), (enabled, false));
        };
        // COMPLETE, guest start.
        let (to, mut incoming) = setup();
        incoming.feed(&end).unwrap();
        incoming.finish().unwrap();
        assert_eq!(busy(&to), Ok(enabled.then_some(BusyWith::Migration)));
        start(&mut incoming, &to);
        write(&to, 9 << 20);
        drop(incoming);
        has_all(&to, &[9 << 20]);
        // Guest start, COMPLETE.
        let (to, mut incoming) = setup();
        start(&mut incoming, &to);
        write(&to, 9 << 20);
        write(&to, 2 << 20);
        assert_eq!(to.bitmaps().query("a").unwrap().is_recording, enabled);
        assert_eq!(busy(&to), Ok(Some(BusyWith::Migration)));
        incoming.feed(&end).unwrap();
        assert_eq!(incoming.bitmaps()[0].state, ArrivalState::Active);
        write(&to, 10 << 20);
        incoming.finish().unwrap();
        has_all(&to, &[9 << 20, 10 << 20]);
        // Guest start, failure.
        let (to, mut incoming) = setup();
        start(&mut incoming, &to);
        write(&to, 9 << 20);
        incoming.cancel();
        assert!(busy(&to).is_err());
        to.bitmaps().check_invariants();
        // Others may have the rest of the stream.
        assert_eq!(incoming.feed_part(&end), Ok(end.len()));
        assert_eq!(incoming.finish(), Err(IncomingError::Cancelled));
        // COMPLETE, failure before guest start.
        for is_dropped in [false, true] {
            let (to, mut incoming) = setup();
            incoming.feed(&end).unwrap();
            if !is_dropped {
                incoming.cancel();
                assert!(busy(&to).is_err());
            }
            drop(incoming);
            assert!(busy(&to).is_err());
        }
    }
}

#[test]
fn a_bitmap_that_came_and_is_in_use_already_is_kept() {
    let from = disk(&[bitmap("a", false, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    stop(&mut outgoing, &from);
    let to = Node::new(LEN);
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    incoming.feed(&pull(&mut outgoing)).unwrap();
    let frozen = to.bitmaps().freeze("a").unwrap();
    drop(incoming);
    assert_eq!(frozen.dirty_bytes(), 2 << 20);
    drop(frozen);
    to.bitmaps().remove("a").unwrap();
}

#[test]
fn the_guest_starts_with_all_its_disks_quiesced() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    let to = Node::new(LEN);
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    incoming.feed(&pull(&mut outgoing)).unwrap();
    let error = incoming.guest_starts(&[&quiesce(&from)]).unwrap_err();
    assert_eq!(error, GuestStartError::NotQuiesced { node: "d".into() });
    start(&mut incoming, &to);
}

#[test]
fn what_is_complete_stays_when_the_stream_breaks_after_the_guest_has_started() {
    let names = ["a", "b", "c", "d", "e"];
    let from = disk(&names.map(|name| bitmap(name, true, false)));
    let mut options = OutgoingOptions::default();
    options.mode = Mode::PostCopy;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let to = Node::new(LEN);
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    incoming.feed(&pull(&mut outgoing)).unwrap();
    stop(&mut outgoing, &from);
    assert!(pull(&mut outgoing).is_empty());
    assert_eq!(outgoing.bytes_sent_stopped(), 0);
    start(&mut incoming, &to);
    outgoing.guest_started().unwrap();
    let bytes = pull(&mut outgoing);
    for byte in bytes.chunks(1) {
        incoming.feed(byte).unwrap();
        let done = incoming
            .bitmaps()
            .iter()
            .filter(|came| came.state == ArrivalState::Active)
            .count();
        if done == 3 {
            break;
        }
    }
    write(&to, 9 << 20);
    assert!(incoming.finish().is_err());
    to.bitmaps().check_invariants();
    // The newest come first.
    for (name, is_there) in names.iter().zip([false, false, true, true, true]) {
        let info = to.bitmaps().query(name);
        assert_eq!(info.is_ok(), is_there, "{name}");
        if is_there {
            let mut expected = bits_of(&from, name);
            expected.set_at(9 << 20).unwrap();
            assert_eq!(bits_of(&to, name), expected);
        }
    }
}

/// A disk whose bitmap has so many serialized bytes, all of them changed by a seed.
pub(crate) fn large(bytes: u64, name: &str) -> Node {
    let len = bytes * 8 * 512;
    let mut truth = bitmap(name, true, false);
    truth.size = len;
    truth.granularity = Granularity::from_bytes(512).unwrap();
    truth.dirty = (0..len / (1 << 20))
        .map(|mib| (mib << 20..(mib << 20) + 512).into())
        .collect();
    disk(&[truth])
}

#[test]
fn below_one_mib_nothing_is_sent_live() {
    for (bytes, mode, is_live) in [
        ((1 << 20) - 8, Mode::Live, false),
        (1 << 20, Mode::Live, true),
        ((1 << 20) - 8, Mode::Hybrid, false),
        (1 << 20, Mode::Hybrid, true),
    ] {
        let from = large(bytes, "a");
        let mut options = OutgoingOptions::default();
        options.mode = mode;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let live = pull(&mut outgoing);
        assert_eq!(live.len() > 1 << 16, is_live);
        assert_eq!(outgoing.mode() == mode, is_live);
        assert_eq!(outgoing.bytes_left() == 0, is_live);
    }
}

#[test]
fn what_is_sent_while_the_guest_stands_still() {
    let mut stopped = Vec::new();
    for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Live, Mode::Hybrid] {
        let (from, bytes) = (large(2 << 20, "a"), 2u64 << 20);
        let to = Node::new(from.len());
        let mut options = OutgoingOptions::default();
        options.mode = mode;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let mut incoming = one(&to).incoming(IncomingOptions::default());
        let feed = |outgoing: &mut OutgoingMigration, incoming: &mut IncomingMigration| {
            let bytes = pull(outgoing);
            incoming.feed(&bytes).unwrap();
            bytes.len() as u64
        };
        let first = feed(&mut outgoing, &mut incoming);
        assert_eq!(first > bytes, matches!(mode, Mode::Live | Mode::Hybrid));
        // Three chunks change, one of them twice; a write where it is dirty changes nothing.
        for at in [512, 1024, 4 << 20, (9 << 20) + 512] {
            write(&from, at);
        }
        write(&from, 64 << 20);
        if first > bytes {
            assert_eq!(outgoing.bytes_left(), 2 * 1024, "of 4 MiB of the disk each");
        }
        stop(&mut outgoing, &from);
        feed(&mut outgoing, &mut incoming);
        stopped.push(outgoing.bytes_sent_stopped());
        if matches!(mode, Mode::PostCopy | Mode::Hybrid) {
            start(&mut incoming, &to);
            outgoing.guest_started().unwrap();
            write(&to, 100 << 20);
            feed(&mut outgoing, &mut incoming);
            incoming.finish().unwrap();
        } else {
            incoming.finish().unwrap();
            start(&mut incoming, &to);
            write(&to, 100 << 20);
        }
        outgoing.finish().unwrap();
        let mut expected = bits_of(&from, "a");
        expected.set_at(100 << 20).unwrap();
        assert_eq!(bits_of(&to, "a"), expected, "{mode:?}");
    }
    let [pre, post, live, hybrid] = stopped[..] else {
        panic!("{stopped:?}");
    };
    println!(
        "while the guest stands still: pre-copy {pre}, post-copy {post}, live {live}, hybrid {hybrid} bytes"
    );
    assert!(pre > 2 << 20);
    assert_eq!((post, hybrid), (0, 0));
    assert!((2 * 1024..4 * 1024).contains(&live), "{live}");
}

#[test]
fn the_rate_limit_holds_while_a_guest_runs() {
    let from = large(2 << 20, "a");
    let mut options = OutgoingOptions::default();
    options.mode = Mode::Live;
    options.speed = 1 << 20;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let (mut now, mut piece) = (Duration::from_secs(1), [0; 4096]);
    let sent = |outgoing: &mut OutgoingMigration, now: &mut Duration, piece: &mut [u8]| loop {
        match outgoing.next_bytes(*now, piece).unwrap() {
            Next::Bytes(_) => {}
            Next::Until(until) => {
                assert!(until > *now);
                *now = until;
            }
            Next::Idle | Next::Done => break outgoing.bytes_sent(),
            Next::Answer => unreachable!("nobody answers"),
        }
    };
    let bytes = sent(&mut outgoing, &mut now, &mut piece);
    let seconds = (now - Duration::from_secs(1)).as_secs_f64();
    let rate = bytes as f64 / seconds / f64::from(1 << 20);
    assert!((0.8..1.3).contains(&rate), "{bytes} bytes in {seconds} s");
    // While no guest runs there is no limit.
    stop(&mut outgoing, &from);
    let before = now;
    sent(&mut outgoing, &mut now, &mut piece);
    assert_eq!(now, before);
}

#[test]
fn disks_that_are_empty_or_have_coarse_granules_or_many() {
    let kinds = [
        StreamKind::Qemu(blockjob::migration::Framing::Bare),
        StreamKind::Native { session: [7; 16] },
    ];
    for stream in kinds {
        for (len, exponent, dirty) in [
            (0, 16, vec![]),
            (1, 9, vec![(0..1).into()]),
            (
                1 << 50,
                31,
                vec![
                    ((1 << 49) + 5..(1 << 49) + 6).into(),
                    ((1 << 50) - 1..1 << 50).into(),
                ],
            ),
            (
                (1 << 50) - 511,
                28,
                vec![(0..1).into(), ((1 << 50) - 512..(1 << 50) - 511).into()],
            ),
            (1 << 45, 27, vec![(0..1 << 44).into()]),
            (513, 9, vec![(512..513).into()]),
            (64 * 512 + 1, 9, vec![(64 * 512..64 * 512 + 1).into()]),
        ] {
            let dirty: Vec<ByteRange> = dirty;
            let mut truth = bitmap("a", true, false);
            truth.size = len;
            truth.granularity = Granularity::from_exponent(exponent).unwrap();
            truth.dirty = dirty;
            let (from, to) = (disk(&[truth]), Node::new(len));
            let mut options = OutgoingOptions::default();
            options.stream = stream;
            let mut outgoing = one(&from).outgoing(options).unwrap();
            stop(&mut outgoing, &from);
            let mut options = IncomingOptions::default();
            options.stream = stream;
            let mut incoming = one(&to).incoming(options);
            incoming.feed(&pull(&mut outgoing)).unwrap();
            incoming.finish().unwrap();
            answer(&mut outgoing, &mut incoming);
            start(&mut incoming, &to);
            outgoing.finish().unwrap();
            assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"), "{len} {exponent}");
        }
    }
}

/// What the destination has to say comes to the source.
pub(crate) fn answer(outgoing: &mut OutgoingMigration, incoming: &mut IncomingMigration) {
    let mut piece = [0; 50];
    loop {
        match incoming.next_bytes(&mut piece) {
            0 => return,
            len => outgoing.feed(&piece[..len]).unwrap(),
        }
    }
}

pub(crate) fn native() -> (OutgoingOptions, IncomingOptions) {
    let stream = StreamKind::Native { session: [9; 16] };
    let (mut outgoing, mut incoming) = (OutgoingOptions::default(), IncomingOptions::default());
    outgoing.stream = stream;
    incoming.stream = stream;
    (outgoing, incoming)
}

#[test]
fn native_sends_again_only_what_was_not_confirmed() {
    let from = large(2 << 20, "a");
    let to = Node::new(from.len());
    let (mut options, incoming) = native();
    options.mode = Mode::Live;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let mut incoming = one(&to).incoming(incoming);
    let bytes = pull(&mut outgoing);
    // The connection breaks in the middle of a frame; some of what came was confirmed, some not.
    let (a, b) = (bytes.len() / 2, bytes.len() / 2 + 50_001);
    incoming.feed(&bytes[..a]).unwrap();
    answer(&mut outgoing, &mut incoming);
    incoming.feed(&bytes[a..b]).unwrap();
    outgoing.reconnect().unwrap();
    assert_eq!(
        outgoing.next_bytes(Duration::ZERO, &mut [0; 100]),
        Ok(Next::Answer)
    );
    incoming.reconnect().unwrap();
    answer(&mut outgoing, &mut incoming);
    let resumed = std::iter::from_fn(|| outgoing.poll_event()).last();
    let Some(OutgoingEvent::Resumed { chunks }) = resumed else {
        panic!("{resumed:?}");
    };
    let lost = (bytes.len() - b) as u64 / (1024 + 44);
    assert!((lost..=lost + 40).contains(&chunks), "{chunks} of {lost}");
    let again = pull(&mut outgoing);
    assert!(again.len() < bytes.len() / 2);
    incoming.feed(&again).unwrap();
    stop(&mut outgoing, &from);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    // Confirmed is not yet known to the source.
    assert!(matches!(
        outgoing.finish(),
        Err(OutgoingError::OutOfOrder { .. })
    ));
    answer(&mut outgoing, &mut incoming);
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    outgoing.finish().unwrap();
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}

#[test]
fn native_starts_over_with_a_destination_that_has_lost_everything() {
    let (from, to) = (disk(&[bitmap("a", true, false)]), Node::new(LEN));
    for has_moved in [false, true] {
        let (mut options, incoming) = native();
        options.mode = Mode::PostCopy;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let mut lost = one(&to).incoming(incoming);
        stop(&mut outgoing, &from);
        lost.feed(&pull(&mut outgoing)).unwrap();
        answer(&mut outgoing, &mut lost);
        if has_moved {
            outgoing.guest_started().unwrap();
        }
        drop(lost);
        outgoing.reconnect().unwrap();
        let mut incoming = one(&to).incoming(native().1);
        incoming.reconnect().unwrap();
        let mut piece = [0; 100];
        let len = incoming.next_bytes(&mut piece);
        let heard = outgoing.feed(&piece[..len]);
        if has_moved {
            assert_eq!(heard, Err(OutgoingError::PeerForgot));
            continue;
        }
        heard.unwrap();
        incoming.feed(&pull(&mut outgoing)).unwrap();
        outgoing.guest_started().unwrap();
        start(&mut incoming, &to);
        incoming.feed(&pull(&mut outgoing)).unwrap();
        answer(&mut outgoing, &mut incoming);
        incoming.finish().unwrap();
        outgoing.finish().unwrap();
        assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
        to.bitmaps().remove("a").unwrap();
        from.bitmaps().take_back();
    }
}

/// The frames of a native stream.
pub(crate) fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let len = 20 + u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(len);
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

/// The same frame with another payload, as somebody would make it who knows how.
pub(crate) fn forged(mut frame: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    frame.truncate(frame.len() - 4);
    change(&mut frame);
    let len = frame.len() as u32 - 16;
    frame[4..8].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&frame);
    frame.extend(crc.to_le_bytes());
    frame
}

#[test]
pub(crate) fn native_frames_are_checked() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(native().0).unwrap();
    stop(&mut outgoing, &from);
    let frames = frames(&pull(&mut outgoing));
    // HELLO, START, one chunk, COMPLETE, END.
    assert_eq!(
        frames.iter().map(|frame| frame[0]).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    let fed = |frames: &[Vec<u8>]| {
        let results = [1, 1 << 20].map(|piece| {
            let to = Node::new(LEN);
            let mut incoming = one(&to).incoming(native().1);
            let bytes = frames.concat();
            let fed = bytes
                .chunks(piece)
                .try_for_each(|bytes| incoming.feed(bytes).map(drop));
            let result = fed.and_then(|()| incoming.finish());
            assert!(
                result.is_ok()
                    || incoming.bitmaps().is_empty()
                    || to.bitmaps().query("a").is_err()
                    || to.bitmaps().query("a").unwrap().is_busy()
            );
            drop(incoming);
            assert!(to.bitmaps().query_all().is_empty());
            result
        });
        assert_eq!(results[0], results[1]);
        results[0].clone()
    };
    let broken = |result: Result<(), IncomingError>| match result {
        Err(IncomingError::Broken(error)) => error.why,
        result => panic!("{result:?}"),
    };
    let fault = |result: Result<(), IncomingError>| match result {
        Err(IncomingError::Stream(error)) => error.why,
        result => panic!("{result:?}"),
    };
    let with = |index: usize, frame: Vec<u8>| {
        let mut frames = frames.clone();
        frames[index] = frame;
        fed(&frames)
    };
    assert_eq!(fed(&frames), Ok(()));
    // Every byte that may be wrong is noticed.
    for index in 0..frames.len() {
        for at in 0..frames[index].len() {
            let mut wrong = frames.clone();
            wrong[index][at] ^= 0x40;
            assert!(fed(&wrong).is_err(), "byte {at} of frame {index}");
        }
    }
    // A frame is missing, comes twice, or in another order.
    let sequence = |order: &[usize]| {
        fed(&order
            .iter()
            .map(|&at| frames[at].clone())
            .collect::<Vec<_>>())
    };
    for order in [&[0, 1, 3, 4][..], &[0, 1, 2, 2, 3, 4], &[0, 2, 1, 3, 4]] {
        assert!(matches!(broken(sequence(order)), Fault::Sequence { .. }));
    }
    assert_eq!(broken(sequence(&[1, 2, 3, 4])), Fault::Frame { kind: 2 });
    assert_eq!(fault(sequence(&[0, 1, 2, 3])), Fault::Truncated);
    let mut long = frames[2].clone();
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(broken(with(2, long)), Fault::FrameLength { len: u32::MAX });
    let other = forged(frames[0].clone(), |frame| frame[30] ^= 1);
    assert_eq!(broken(with(0, other)), Fault::Session);
    let version = forged(frames[0].clone(), |frame| frame[24] ^= 2);
    assert_eq!(broken(with(0, version)), Fault::FrameField);
    // A length that is not that of the disk here.
    let shorter = forged(frames[1].clone(), |frame| {
        frame[20..28].copy_from_slice(&(LEN - 512).to_le_bytes());
    });
    let length = Fault::Length {
        node: "d".into(),
        here: LEN,
        there: LEN - 512,
    };
    assert_eq!(fault(with(1, shorter)), length);
    // Content that is not what was sent, in a frame that looks sound.
    let content = forged(frames[2].clone(), |frame| *frame.last_mut().unwrap() = 0);
    assert_eq!(with(2, content), Ok(()), "that byte is 0 already");
    let content = forged(frames[2].clone(), |frame| frame[60] ^= 1);
    assert!(matches!(fault(with(2, content)), Fault::Digest { .. }));
    // No COMPLETE without all chunks, and no bits of what did not begin.
    let none = forged(frames[2].clone(), |frame| frame[16] = 1);
    assert_eq!(fault(with(2, none)), Fault::FrameField);
    let empty = forged(frames[2].clone(), |frame| {
        frame[32..40].fill(0);
        frame.truncate(40);
        frame[20] = 0;
    });
    assert!(matches!(fault(with(2, empty)), Fault::Missing { .. }));
}

#[test]
fn native_compares_disks() {
    let run = |here: (Option<[u8; 16]>, Option<u64>), there: (Option<[u8; 16]>, Option<u64>)| {
        let (from, to) = (disk(&[bitmap("a", true, false)]), Node::new(LEN));
        let ends = [(&from, here), (&to, there)].map(|(node, (identity, generation))| {
            let mut node = MigratingNode::new("d", node);
            node.identity = identity;
            node.generation = generation;
            BitmapMigration::new().with(node)
        });
        let mut outgoing = ends[0].outgoing(native().0).unwrap();
        stop(&mut outgoing, &from);
        let mut incoming = ends[1].incoming(native().1);
        match incoming.feed(&pull(&mut outgoing)) {
            Ok(_) => None,
            Err(IncomingError::Stream(error)) => Some(error.why),
            Err(error) => panic!("{error}"),
        }
    };
    let (a, b) = (Some([1; 16]), Some([2; 16]));
    assert_eq!(run((a, Some(1)), (a, Some(1))), None);
    assert_eq!(run((a, Some(1)), (None, None)), None);
    assert_eq!(run((None, None), (a, Some(1))), None);
    let node = "d".to_owned();
    assert_eq!(
        run((a, Some(1)), (b, Some(1))),
        Some(Fault::Identity { node: node.clone() })
    );
    assert_eq!(
        run((a, Some(1)), (a, Some(2))),
        Some(Fault::Generation { node })
    );
}

#[test]
fn native_leaves_out_what_is_uniform() {
    let mut truth = bitmap("a", true, false);
    truth.size = 1 << 33;
    truth.granularity = Granularity::from_bytes(512).unwrap();
    truth.dirty = vec![(0..1 << 32).into()];
    let from = disk(&[truth]);
    let mut outgoing = one(&from).outgoing(native().0).unwrap();
    stop(&mut outgoing, &from);
    let bytes = pull(&mut outgoing);
    // 2 MiB of bits: half are ones, half are zeroes.
    assert!(bytes.len() < 100_000, "{}", bytes.len());
    let to = Node::new(1 << 33);
    let mut incoming = one(&to).incoming(native().1);
    incoming.feed(&bytes).unwrap();
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}

#[test]
fn storage_takes_part_when_it_can() {
    let (from, to) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
    to.bitmaps().set_storage(Some(BitmapStorage::default()));
    migrate(&one(&from), &[&from], &one(&to), &[&to]);
    assert!(is_stored(&to, "a"));
}
