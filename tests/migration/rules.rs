//! Rules of the contract that the plain course does not come to, each by itself.

use std::time::Duration;

use blockjob::migration::{
    ArrivalState, Fault, Framing, IncomingOptions, MigratingNode, Mode, Next, OutgoingEvent,
    OutgoingOptions, SetupError, StreamKind, Unusable,
};
use blockjob::{
    BitmapMigration, BitmapOptions, BitmapState, BusyWith, ClaimFor, Granularity, Grown, HBitmap,
    IncomingError, IncomingMigration, Node, OutgoingError, OutgoingMigration, Transaction,
};

use crate::cases::{
    LEN, answer, bitmap, disk, forged, frames, id, is_stored, mapping, migrate, native, one, pull,
    start, stop, write,
};
use crate::truth::{Truth, add, bits_of, quiesce};

fn outgoing(node: &Node) -> OutgoingMigration {
    one(node).outgoing(OutgoingOptions::default()).unwrap()
}

fn incoming(node: &Node) -> IncomingMigration {
    one(node).incoming(IncomingOptions::default())
}

fn refused(migration: &BitmapMigration) -> SetupError {
    migration.outgoing(OutgoingOptions::default()).unwrap_err()
}

/// BM-10: that nothing was selected is not remembered.
#[test]
fn a_migration_of_nothing_does_not_hinder_the_next() {
    let (from, to) = (Node::new(LEN), Node::new(LEN));
    let (here, there) = (one(&from), one(&to));
    assert_eq!(migrate(&here, &[&from], &there, &[&to]).len(), 0);
    add(&from, &bitmap("a", true, false)).unwrap();
    assert_eq!(migrate(&here, &[&from], &there, &[&to]).len(), 1);
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}

/// BM-11: the list is that of the set-up.
#[test]
fn what_is_made_after_the_set_up_stays() {
    let (from, to) = (disk(&[bitmap("a", true, false)]), Node::new(LEN));
    let mut outgoing = outgoing(&from);
    add(&from, &bitmap("late", true, false)).unwrap();
    stop(&mut outgoing, &from);
    let mut incoming = incoming(&to);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    outgoing.finish().unwrap();
    assert_eq!(to.bitmaps().query_all().len(), 1);
    from.bitmaps().remove("late").unwrap();
}

/// BM-12: that a node has no name is looked at before the mapping.
#[test]
fn a_node_without_a_name_is_refused_whatever_is_mapped() {
    let from = disk(&[bitmap("a", true, false)]);
    let nameless = BitmapMigration::new().with_node("", &from);
    for entries in [vec![], vec![("d", "d", &[("a", "a", None)][..])]] {
        let migration = nameless.clone().with_mapping(mapping(&entries));
        let bitmap = "a".to_owned();
        assert_eq!(refused(&migration), SetupError::NodeUnnamed { bitmap });
    }
}

/// BM-13: in use, read-only, inconsistent, and then its name.
#[test]
fn of_several_hindrances_the_first_is_told() {
    let long = "n".repeat(256);
    let (node, bitmap) = (Node::new(LEN), id("d", &long));
    let mut state = BitmapState::new(&long, HBitmap::new(LEN, Granularity::DEFAULT).unwrap());
    state.is_in_use = true;
    let bitmaps = node.bitmaps();
    bitmaps
        .import_state(&quiesce(&node), vec![state.clone()])
        .unwrap();
    bitmaps.mark_readonly(&quiesce(&node), &long).unwrap();
    let readonly = SetupError::ReadOnly {
        bitmap: bitmap.clone(),
    };
    assert_eq!(refused(&one(&node)), readonly);
    bitmaps.mark_writable(&long).unwrap();
    let inconsistent = SetupError::Inconsistent {
        bitmap: bitmap.clone(),
    };
    assert_eq!(refused(&one(&node)), inconsistent);
    bitmaps.remove(&long).unwrap();
    state.is_in_use = false;
    bitmaps.import_state(&quiesce(&node), vec![state]).unwrap();
    bitmaps.mark_readonly(&quiesce(&node), &long).unwrap();
    let claim = bitmaps.claim(&long, ClaimFor::Reading).unwrap();
    let with = BusyWith::Job;
    let busy = SetupError::Busy {
        bitmap: bitmap.clone(),
        with,
    };
    assert_eq!(refused(&one(&node)), busy);
    drop(claim);
    assert_eq!(refused(&one(&node)), readonly);
    bitmaps.mark_writable(&long).unwrap();
    assert_eq!(refused(&one(&node)), SetupError::NameTooLong { bitmap });
}

/// BM-15 and BM-20: with a mapping devices play no part, neither in the order nor in the names.
#[test]
fn devices_play_no_part_in_a_mapping() {
    let nodes = [
        disk(&[bitmap("a", true, false)]),
        disk(&[bitmap("b", true, false)]),
    ];
    let mut attached = MigratingNode::new("d1", &nodes[1]);
    attached.device = Some("drive".into());
    let host = BitmapMigration::new()
        .with_node("d0", &nodes[0])
        .with(attached);
    let names = |migration: &BitmapMigration| {
        let mut outgoing = migration.outgoing(OutgoingOptions::default()).unwrap();
        let ids: Vec<_> = outgoing.bitmaps().into_iter().map(|one| one.id).collect();
        (ids, pull(&mut outgoing))
    };
    let (ids, bytes) = names(&host);
    assert_eq!(ids, [id("d1", "b"), id("d0", "a")]);
    assert!(bytes.starts_with(b"\x1c\x05drive\x01b"));
    let mapped = host.clone().with_mapping(mapping(&[
        ("drive", "x", &[("b", "b", None)]),
        ("d0", "y", &[("a", "a", None)]),
        ("d1", "z", &[("b", "b", None)]),
    ]));
    let (ids, bytes) = names(&mapped);
    assert_eq!(ids, [id("d0", "a"), id("d1", "b")]);
    assert!(bytes.starts_with(b"\x1c\x01y\x01a"));
    // On the destination the name is that of a device first, and of a node else; and of an alias only.
    let come = |host: &BitmapMigration, name: &str| {
        let stream = [
            b"\x1c".as_slice(),
            &[name.len() as u8],
            name.as_bytes(),
            b"\x01n\0\x01\0\0\x01\x01",
        ]
        .concat();
        let mut incoming = host.incoming(IncomingOptions::default());
        incoming.feed(&stream).unwrap();
        incoming.bitmaps().first().map(|came| came.id.node.clone())
    };
    let mut d0 = MigratingNode::new("d0", &nodes[0]);
    d0.device = Some("d1".into());
    let crossed = BitmapMigration::new().with(d0).with_node("d1", &nodes[1]);
    assert_eq!(come(&crossed, "d1").unwrap(), "d0");
    assert_eq!(come(&crossed, "d0").unwrap(), "d0");
    let mapped = host.with_mapping(mapping(&[("d1", "z", &[("n", "n", None)])]));
    assert_eq!(come(&mapped, "z").unwrap(), "d1");
    assert_eq!(come(&mapped, "drive"), None);
    assert_eq!(come(&mapped, "d1"), None);
}

/// BM-20 to BM-24: what QEMU made of a mapping, from the names on its own side.
#[test]
fn a_mapping_makes_what_it_made_there() {
    let path = |ext| {
        format!(
            "{}/tests/fixtures/bitmap-alias.{ext}",
            env!("CARGO_MANIFEST_DIR")
        )
    };
    let truth = Truth::parse(&std::fs::read_to_string(path("json")).unwrap()).unwrap();
    let stream = std::fs::read(path("stream")).unwrap();
    let text = |json: &serde_json::Value| json.as_str().unwrap().to_owned();
    let mut host = BitmapMigration::new();
    let mut guards = Vec::new();
    for json in truth.json["nodes"].as_array().unwrap() {
        let node = Node::new(json["size"].as_u64().unwrap());
        node.bitmaps()
            .set_storage(Some(blockjob::BitmapStorage::default()));
        let known = truth.json["bitmaps_in_wire_order"].as_array().unwrap();
        for (json, wire) in known
            .iter()
            .zip(&truth.bitmaps)
            .rev()
            .filter(|(one, _)| one["node"] == json["node"])
        {
            let mut own = wire.clone();
            own.name = text(&json["name"]);
            own.persistent = json["persistent"].as_bool().unwrap();
            add(&node, &own).unwrap();
        }
        for left_out in truth.json["bitmaps_not_migrated"].as_array().unwrap() {
            if left_out[0] == json["node"] {
                node.bitmaps()
                    .add_disabled(&text(&left_out[1]), BitmapOptions::default())
                    .unwrap();
            }
        }
        guards.push(quiesce(&node));
        host = host.with_node(text(&json["node"]), &node);
    }
    let entries = truth.json["block_bitmap_mapping"].as_array().unwrap();
    let nodes = entries.iter().map(|entry| blockjob::migration::NodeAlias {
        node: text(&entry["node-name"]),
        alias: text(&entry["alias"]),
        bitmaps: entry["bitmaps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| {
                let mut alias =
                    blockjob::migration::BitmapAlias::new(text(&one["name"]), text(&one["alias"]));
                alias.persistent = one["transform"]["persistent"].as_bool();
                alias
            })
            .collect(),
    });
    host.set_mapping(Some(
        blockjob::migration::BitmapMapping::new(nodes.collect()).unwrap(),
    ));
    let mut outgoing = host.outgoing(OutgoingOptions::default()).unwrap();
    outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
    let bodies = truth.bodies();
    let expected = bodies.iter().filter(|(kind, _)| kind != "part");
    let expected: Vec<_> = expected.map(|(_, body)| &stream[body.clone()]).collect();
    assert!(pull(&mut outgoing) == expected.concat());
}

/// BM-23: before the guest has started what is complete goes too, and after that it stays.
#[test]
fn an_unknown_name_drops_what_is_not_handed_over() {
    let from = disk(&[bitmap("off", false, false), bitmap("on", true, false)]);
    let mut outgoing = outgoing(&from);
    let begin = pull(&mut outgoing);
    stop(&mut outgoing, &from);
    let mut end = pull(&mut outgoing);
    end.truncate(end.len() - 1);
    for has_guest in [false, true] {
        let to = Node::new(LEN);
        let mut incoming = incoming(&to);
        incoming.feed(&begin).unwrap();
        if has_guest {
            start(&mut incoming, &to);
        }
        incoming.feed(&end).unwrap();
        assert!(!to.bitmaps().query("off").unwrap().is_busy());
        // A bitmap of a disk that is not here, with bits.
        incoming
            .feed(b"\x1c\x02no\x01x\0\x01\0\0\x01\x42\0\0\0\0\0\0\0\0\0\0\0\x01\x20\x01")
            .unwrap();
        let left = to.bitmaps().query_all().len();
        assert_eq!(left, if has_guest { 2 } else { 0 });
        let alias = "no".to_owned();
        let dropped = IncomingError::Dropped(Unusable::UnknownNode { alias });
        assert_eq!(incoming.finish(), Err(dropped));
        if has_guest {
            assert_eq!(bits_of(&to, "on"), bits_of(&from, "on"));
        }
    }
}

/// BM-32: a guest that starts too early there, as it was to be sent before, still gets all.
#[test]
fn a_guest_that_starts_amid_the_last_phase_gets_all_the_same() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (from, to) = (
            disk(&[bitmap("a", true, false), bitmap("b", false, false)]),
            Node::new(LEN),
        );
        let mut options = OutgoingOptions::default();
        options.mode = mode;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let mut incoming = incoming(&to);
        incoming.feed(&pull(&mut outgoing)).unwrap();
        stop(&mut outgoing, &from);
        let mut piece = [0; 20];
        if let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap() {
            incoming.feed(&piece[..len]).unwrap();
        }
        outgoing.guest_started().unwrap();
        start(&mut incoming, &to);
        write(&to, 70 << 20);
        incoming.feed(&pull(&mut outgoing)).unwrap();
        incoming.finish().unwrap();
        outgoing.finish().unwrap();
        let mut expected = bits_of(&from, "a");
        expected.set_at(70 << 20).unwrap();
        assert_eq!(bits_of(&to, "a"), expected);
        assert_eq!(bits_of(&to, "b"), bits_of(&from, "b"));
    }
}

/// BM-31: also when it runs elsewhere already; then what is here is stale.
#[test]
fn a_write_here_after_the_guest_has_moved_fails_the_migration() {
    let from = disk(&[bitmap("a", true, true)]);
    let mut options = OutgoingOptions::default();
    options.mode = Mode::PostCopy;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    pull(&mut outgoing);
    stop(&mut outgoing, &from);
    outgoing.guest_started().unwrap();
    write(&from, 9);
    let error = outgoing
        .next_bytes(Duration::ZERO, &mut [0; 9])
        .unwrap_err();
    assert_eq!(error, OutgoingError::GuestWrote { node: "d".into() });
    assert!(!from.bitmaps().query("a").unwrap().is_busy());
    assert!(!is_stored(&from, "a"));
}

/// BM-34: pieces are 8192 granules, ascend, and end with the disk; a clean map has no data.
#[test]
fn chunks_cover_the_disk_in_order() {
    for granules in [1, 8191, 8192, 8193, 16_384, 16_385] {
        for tail in [0, 512] {
            let mut truth = bitmap("a", true, false);
            truth.granularity = Granularity::from_bytes(4096).unwrap();
            (truth.size, truth.dirty) = (granules * 4096 - tail, vec![]);
            let (len, from) = (truth.size, disk(&[truth]));
            let mut outgoing = outgoing(&from);
            pull(&mut outgoing);
            stop(&mut outgoing, &from);
            let bytes = pull(&mut outgoing);
            let mut at = 0;
            let mut reader = blockjob::migration::RecordReader::new(Framing::Bare);
            reader
                .feed(&bytes, &mut |record| {
                    if let blockjob::migration::RecordBody::Bits {
                        first_sector,
                        sectors,
                        bits,
                    } = record.body
                    {
                        assert_eq!((first_sector * 512, bits), (at, None));
                        let chunk = (len - at).min(8192 * 4096);
                        assert_eq!(u64::from(sectors) * 512, chunk);
                        at += chunk;
                    }
                    Ok::<(), blockjob::migration::StreamError>(())
                })
                .unwrap();
            assert_eq!(at, len);
        }
    }
}

/// BM-63: whoever is closed early has nothing partial and nothing stale to store.
#[test]
fn either_end_may_be_closed_early() {
    let (from, to) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
    to.bitmaps()
        .set_storage(Some(blockjob::BitmapStorage::default()));
    let mut options = OutgoingOptions::default();
    options.mode = Mode::PostCopy;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let mut incoming = incoming(&to);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    stop(&mut outgoing, &from);
    outgoing.guest_started().unwrap();
    start(&mut incoming, &to);
    write(&to, 0);
    // The destination: what is arriving is left as it is on storage, which is in use.
    let export = to.bitmaps().export_state(&quiesce(&to)).unwrap();
    assert_eq!(
        (export.to_store.len(), &export.to_keep[..]),
        (0, &["a".to_owned()][..])
    );
    // The source: the same, when it is closed amid the migration and when it has ended.
    for _ in 0..2 {
        let export = from.bitmaps().export_state(&quiesce(&from)).unwrap();
        assert_eq!(
            (export.to_store.len(), &export.to_keep[..]),
            (0, &["a".to_owned()][..])
        );
        outgoing.cancel();
    }
    // The destination runs on without it.
    assert!(incoming.finish().is_err());
    assert!(to.bitmaps().query_all().is_empty());
    write(&to, 1);
}

/// BM-70: a chunk that changes after it was read, and before its bytes have gone out, is sent again.
#[test]
fn a_chunk_that_changes_while_it_waits_to_be_sent_is_sent_again() {
    let (from, to) = (
        crate::cases::large(1 << 20, "a"),
        Node::new((8 * 512) << 20),
    );
    let mut options = OutgoingOptions::default();
    options.mode = Mode::Live;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let mut incoming = incoming(&to);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    for round in 1..20 {
        write(&from, round * 512);
        // One byte of the chunk is out, and then it changes.
        let mut byte = [0];
        assert_eq!(
            outgoing.next_bytes(Duration::ZERO, &mut byte),
            Ok(Next::Bytes(1))
        );
        incoming.feed(&byte).unwrap();
        write(&from, (40 + round) * 512);
        assert_eq!(outgoing.bytes_left(), 1024);
        incoming.feed(&pull(&mut outgoing)).unwrap();
        assert_eq!(outgoing.bytes_left(), 0);
    }
    stop(&mut outgoing, &from);
    incoming.feed(&pull(&mut outgoing)).unwrap();
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    outgoing.finish().unwrap();
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}

/// Two at once, of different bitmaps of one disk, to different places.
#[test]
fn two_migrations_of_one_disk_do_not_disturb_each_other() {
    let from = disk(&[bitmap("a", true, true), bitmap("b", true, true)]);
    let only = |name: &str| one(&from).with_mapping(mapping(&[("d", "d", &[(name, name, None)])]));
    let to = [Node::new(LEN), Node::new(LEN)];
    let [mut one_way, mut other] =
        ["a", "b"].map(|name| only(name).outgoing(OutgoingOptions::default()).unwrap());
    let mut come = [incoming(&to[0]), incoming(&to[1])];
    come[0].feed(&pull(&mut one_way)).unwrap();
    come[1].feed(&pull(&mut other)).unwrap();
    write(&from, 8 << 20);
    stop(&mut one_way, &from);
    come[0].feed(&pull(&mut one_way)).unwrap();
    come[0].finish().unwrap();
    one_way.finish().unwrap();
    start(&mut come[0], &to[0]);
    // The other is given up: its bitmap is as before, that which has gone is not.
    drop(other);
    assert!(!is_stored(&from, "a") && is_stored(&from, "b"));
    assert_eq!(bits_of(&to[0], "a"), bits_of(&from, "a"));
    drop(come);
    assert!(to[0].bitmaps().query("a").is_ok());
    assert!(to[1].bitmaps().query_all().is_empty());
    // Both to one name of one disk: the second is refused, and leaves the first alone.
    let (again, third) = (disk(&[bitmap("b", true, false)]), Node::new(LEN));
    let mut first = incoming(&third);
    let mut outgoing = outgoing(&again);
    let begin = pull(&mut outgoing);
    first.feed(&begin).unwrap();
    let mut second = incoming(&third);
    let error = second.feed(&begin).unwrap_err();
    assert!(
        matches!(error, IncomingError::Stream(error) if matches!(error.why, Fault::Exists { .. }))
    );
    drop(second);
    stop(&mut outgoing, &again);
    first.feed(&pull(&mut outgoing)).unwrap();
    first.finish().unwrap();
    start(&mut first, &third);
    assert_eq!(bits_of(&third, "b"), bits_of(&again, "b"));
}

/// What one host has received it can send on, and back, and the first source takes it again.
#[test]
fn a_bitmap_goes_there_and_back() {
    let (here, there) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
    there
        .bitmaps()
        .set_storage(Some(blockjob::BitmapStorage::default()));
    migrate(&one(&here), &[&here], &one(&there), &[&there]);
    write(&there, 60 << 20);
    here.bitmaps().remove("a").unwrap();
    migrate(&one(&there), &[&there], &one(&here), &[&here]);
    let mut expected = bits_of(&there, "a");
    assert_eq!(bits_of(&here, "a"), expected);
    assert!(is_stored(&here, "a") && !is_stored(&there, "a"));
    write(&here, 61 << 20);
    expected.set_at(61 << 20).unwrap();
    assert_eq!(bits_of(&here, "a"), expected);
}

/// What happens to the disk of the destination meanwhile, or was under way there.
#[test]
fn a_disk_with_bitmaps_on_their_way_is_not_changed_behind_them() {
    let from = disk(&[bitmap("on", true, false), bitmap("off", false, false)]);
    let mut outgoing = outgoing(&from);
    let begin = pull(&mut outgoing);
    stop(&mut outgoing, &from);
    let end = pull(&mut outgoing);
    let to = Node::new(LEN);
    let guard = quiesce(&to);
    let resize = to.resize(&guard, LEN * 2, Grown::Dirty).unwrap();
    let mut early = incoming(&to);
    let error = early.feed(&begin).unwrap_err();
    assert!(
        matches!(error, IncomingError::Stream(error) if matches!(error.why, Fault::Make { .. }))
    );
    drop((early, resize));
    drop(guard);
    assert!(to.bitmaps().query_all().is_empty());
    let mut incoming = incoming(&to);
    incoming.feed(&begin).unwrap();
    let guard = quiesce(&to);
    assert!(to.resize(&guard, LEN * 2, Grown::Dirty).is_err());
    drop(guard);
    let mut transaction = Transaction::new();
    transaction.remove(&to, "on");
    let tried = transaction.prepare().try_prepared();
    assert!(matches!(tried, Ok(Err(_))), "it is in use");
    incoming.feed(&end).unwrap();
    // The one that does not record is whole, and can be had: renamed, and the disk of another length but for
    // the one that is still on its way.
    assert_eq!(incoming.bitmaps()[0].state, ArrivalState::Whole);
    to.bitmaps().rename("off", "renamed").unwrap();
    drop(incoming);
    assert!(to.bitmaps().query_all().is_empty(), "it goes by any name");
}

/// Answers of the other end that are cut, mutilated, doubled, or nonsense.
#[test]
fn native_answers_are_checked() {
    let (from, to) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
    let mut source = one(&from).outgoing(native().0).unwrap();
    let mut incoming = one(&to).incoming(native().1);
    stop(&mut source, &from);
    incoming.feed(&pull(&mut source)).unwrap();
    let mut ack = [0; 100];
    let len = incoming.next_bytes(&mut ack);
    let ack = ack[..len].to_vec();
    assert_eq!(frames(&ack).len(), 1);
    for at in 0..ack.len() {
        let mut wrong = ack.clone();
        wrong[at] ^= 0x20;
        match source.feed(&wrong) {
            // A longer frame than this is waited for, and never comes.
            Ok(()) => panic!("byte {at}"),
            Err(OutgoingError::Answer(_)) => source.reconnect().unwrap(),
            Err(error) => panic!("{error}"),
        }
        incoming.reconnect().unwrap();
        answer(&mut source, &mut incoming);
        let told = std::iter::from_fn(|| source.poll_event()).last();
        assert_eq!(told, Some(OutgoingEvent::Resumed { chunks: 0 }));
        incoming.feed(&pull(&mut source)).unwrap();
    }
    // More than was ever sent, and a RESUME that nobody has asked for.
    let above = forged(ack.clone(), |frame| frame[8] += 1);
    assert!(
        matches!(source.feed(&above), Err(OutgoingError::Answer(error)) if matches!(error.why, Fault::Sequence { .. }))
    );
    let unasked = forged(ack.clone(), |frame| frame[0] = 0x82);
    assert!(matches!(
        source.feed(&unasked),
        Err(OutgoingError::Answer(_))
    ));
    // A frame that is none of an answer.
    for kind in [1, 2, 3, 4, 5, 0x80, 0xff] {
        let wrong = forged(ack.clone(), |frame| frame[0] = kind);
        assert!(
            matches!(source.feed(&wrong), Err(OutgoingError::Answer(_))),
            "{kind}"
        );
        source.reconnect().unwrap();
        incoming.reconnect().unwrap();
        answer(&mut source, &mut incoming);
        incoming.feed(&pull(&mut source)).unwrap();
    }
    // It may say again what it has said.
    source.feed(&[ack.clone(), ack].concat()).unwrap();
    assert_eq!(
        source.next_bytes(Duration::ZERO, &mut [0; 9]),
        Ok(Next::Done)
    );
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    source.finish().unwrap();
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}

/// A native stream that breaks after any byte, in either direction, goes on with nothing lost or doubled.
#[test]
fn native_is_taken_up_wherever_it_broke() {
    let from = disk(&[bitmap("a", true, true), bitmap("b", false, false)]);
    let total = {
        let mut outgoing = one(&from).outgoing(native().0).unwrap();
        stop(&mut outgoing, &from);
        pull(&mut outgoing).len()
    };
    for cut in 0..=total {
        for back in [0, 1, 35, 100] {
            let to = Node::new(LEN);
            let mut outgoing = one(&from).outgoing(native().0).unwrap();
            let mut incoming = one(&to).incoming(native().1);
            stop(&mut outgoing, &from);
            let bytes = pull(&mut outgoing);
            incoming.feed(&bytes[..cut]).unwrap();
            let mut heard = [0; 100];
            let len = incoming.next_bytes(&mut heard).min(back);
            outgoing.feed(&heard[..len]).unwrap();
            outgoing.reconnect().unwrap();
            incoming.reconnect().unwrap();
            answer(&mut outgoing, &mut incoming);
            let again = pull(&mut outgoing);
            // HELLO, and what had not come as a whole.
            assert!(again.len() <= total - cut + 48 + 1068 + 20, "{cut}");
            incoming.feed(&again).unwrap();
            answer(&mut outgoing, &mut incoming);
            incoming.finish().unwrap();
            start(&mut incoming, &to);
            outgoing.finish().unwrap();
            for name in ["a", "b"] {
                assert_eq!(bits_of(&to, name), bits_of(&from, name), "{cut}");
            }
            from.bitmaps().take_back();
        }
    }
}

/// What makes a whole stream one of post-copy, byte for byte, and that it is read here.
#[test]
fn a_whole_stream_of_post_copy_has_the_guest_run_before_the_bits() {
    let (from, to) = (disk(&[bitmap("a", true, false)]), Node::new(LEN));
    let mut options = OutgoingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    options.mode = Mode::PostCopy;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let begin = pull(&mut outgoing);
    let expected =
        b"QEVM\0\0\0\x03\x07\0\0\0\0\x08\0\x03\0\0\x01\0\0\0\x02\x0cdirty-bitmap\0\0\0\0\0\0\0\x01\
        \x1c\x01d\x01a\0\x01\0\0\x01\x01\x7e\0\0\0\x02";
    assert_eq!(begin, expected);
    stop(&mut outgoing, &from);
    assert!(pull(&mut outgoing).is_empty());
    outgoing.guest_started().unwrap();
    let end = pull(&mut outgoing);
    let package = b"\x08\0\x07\0\x04\0\0\0\x0a\x08\0\x04\0\0\x08\0\x05\0\0\x02\0\0\0\x02\x40";
    assert!(end.starts_with(package));
    assert!(end.ends_with(b"\x20\x01\x7e\0\0\0\x02\x03\0\0\0\x02\x01\x7e\0\0\0\x02\0"));
    let mut options = IncomingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    let mut incoming = one(&to).incoming(options);
    for byte in begin.chunks(1) {
        incoming.feed(byte).unwrap();
    }
    start(&mut incoming, &to);
    write(&to, 80 << 20);
    for byte in end.chunks(1) {
        incoming.feed(byte).unwrap();
    }
    incoming.finish().unwrap();
    let mut expected = bits_of(&from, "a");
    expected.set_at(80 << 20).unwrap();
    assert_eq!(bits_of(&to, "a"), expected);
}

/// BM-2 and BM-62: after the guest has started, wherever the stream ends, a bitmap is whole or gone.
#[test]
fn wherever_post_copy_breaks_a_bitmap_is_whole_or_gone() {
    let names = ["a", "b", "c"];
    let from = disk(&names.map(|name| bitmap(name, name != "b", false)));
    for completes_last in [false, true] {
        let mut options = OutgoingOptions::default();
        options.mode = Mode::PostCopy;
        options.completes_last = completes_last;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let begin = pull(&mut outgoing);
        stop(&mut outgoing, &from);
        outgoing.guest_started().unwrap();
        let end = pull(&mut outgoing);
        outgoing.finish().unwrap();
        from.bitmaps().take_back();
        let mut left = std::collections::BTreeSet::new();
        for cut in 0..=end.len() {
            let to = Node::new(LEN);
            let mut incoming = incoming(&to);
            incoming.feed(&begin).unwrap();
            start(&mut incoming, &to);
            write(&to, 90 << 20);
            incoming.feed(&end[..cut]).unwrap();
            write(&to, 91 << 20);
            let is_all = incoming.finish().is_ok();
            drop(incoming);
            to.bitmaps().check_invariants();
            let there = to.bitmaps().query_all();
            assert!(!is_all || there.len() == 3, "{cut}");
            assert!(is_all || cut < end.len());
            for info in &there {
                assert!(!info.is_busy());
                let mut expected = bits_of(&from, &info.name);
                for at in [90 << 20, 91 << 20]
                    .into_iter()
                    .filter(|_| info.name != "b")
                {
                    expected.set_at(at).unwrap();
                }
                assert_eq!(bits_of(&to, &info.name), expected, "{} at {cut}", info.name);
            }
            left.insert(there.len());
        }
        // One after the other, or all that came with the last part.
        assert!(left.len() == 4, "{left:?}");
    }
}

/// Of a native stream no more is on its way than can be noted, and what was confirmed makes room.
#[test]
fn native_waits_when_too_much_is_on_its_way() {
    // 1 GiB of bits and one chunk more, all clean: a frame each has 44 bytes.
    let chunks = (1 << 20) + 1;
    let node = Node::new(chunks * (4 << 20));
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(512);
    node.bitmaps().add_disabled("a", options).unwrap();
    let mut outgoing = one(&node).outgoing(native().0).unwrap();
    stop(&mut outgoing, &node);
    let mut sent = 0;
    let next = loop {
        match outgoing.next_slice(Duration::ZERO).unwrap() {
            (Next::Bytes(_), bytes) => sent += bytes.len() as u64,
            (next, _) => break next,
        }
    };
    assert_eq!(next, Next::Answer);
    // HELLO and START have 112 bytes. Frames are made 16 at a time.
    let frames = (sent - 112) / 44;
    assert!((chunks - 2..=chunks).contains(&frames), "{frames}");
    let left = outgoing.bytes_left();
    assert_eq!(left, (chunks - frames) * 1024);
    let mut ack = vec![0x81, 0, 0, 0, 0, 0, 0, 0];
    ack.extend(1000u64.to_le_bytes());
    ack.extend([9; 16]);
    ack.extend([0; 4]);
    outgoing.feed(&forged(ack, |_| {})).unwrap();
    let (next, _) = outgoing.next_slice(Duration::ZERO).unwrap();
    assert!(matches!(next, Next::Bytes(_)), "{next:?}");
}
