//! What is odd and may happen all the same: both ends used in ways that no test of the plain course comes to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockjob::migration::{
    BodyPart, Fault, ForeignSection, ForeignSections, Framing, IncomingEvent, IncomingOptions,
    MigratingNode, Mode, Next, OutgoingEvent, OutgoingOptions, Record, RecordReader, SetupError,
    StreamError, StreamKind,
};
use blockjob::{
    BitmapMigration, BitmapOptions, BitmapState, BitmapStorage, Granularity, Grown, HBitmap,
    IncomingError, Node, OutgoingError,
};

use crate::cases::{LEN, bitmap, disk, id, large, one, pull, start, stop, write};
use crate::truth::{add, bits_of, quiesce};

/// Two bitmaps, one of which changes faster than it is sent.
#[test]
fn a_busy_bitmap_does_not_keep_another_from_being_sent_live() {
    let from = large(1 << 20, "quiet");
    let mut busy = bitmap("busy", true, false);
    (busy.size, busy.dirty) = (from.len(), vec![]);
    busy.granularity = Granularity::from_bytes(512).unwrap();
    add(&from, &busy).unwrap();
    let mut options = OutgoingOptions::default();
    options.mode = Mode::Live;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let chunks = from.len() / (4 << 20);
    for round in 0..chunks {
        // More chunks change than a batch has, near the start of the disk.
        for chunk in 0..40 {
            write(&from, (chunk * (4 << 20)) + round * 512);
        }
        outgoing.next_slice(Duration::ZERO).map(drop).unwrap();
    }
    let quiet = outgoing.bitmaps().pop().unwrap();
    assert_eq!(quiet.id, id("d", "quiet"));
    // It changes as much, as both record: what is not of those 40 chunks has gone out.
    assert!(quiet.bytes_left <= 40 * 1024, "{quiet:?}");
}

#[test]
fn what_is_left_is_told_in_bytes_of_the_bitmap_however_coarse_it_is() {
    for exponent in [27, 28, 31] {
        let mut coarse = bitmap("a", true, false);
        coarse.granularity = Granularity::from_exponent(exponent).unwrap();
        // 2 MiB of bits.
        coarse.size = (16 << 20) << exponent;
        coarse.dirty = vec![];
        let from = disk(&[coarse]);
        let mut options = OutgoingOptions::default();
        options.mode = Mode::Live;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        assert_eq!(outgoing.bytes_left(), 2 << 20);
        pull(&mut outgoing);
        assert_eq!(outgoing.bytes_left(), 0);
        write(&from, 0);
        let before = outgoing.bitmaps()[0].bytes_sent;
        let left = outgoing.bytes_left();
        pull(&mut outgoing);
        assert_eq!(
            outgoing.bitmaps()[0].bytes_sent - before,
            left,
            "{exponent}"
        );
    }
}

#[test]
fn what_happened_is_told_also_when_the_guest_stands_still_from_the_start() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    stop(&mut outgoing, &from);
    pull(&mut outgoing);
    outgoing.finish().unwrap();
    let events: Vec<_> = std::iter::from_fn(|| outgoing.poll_event()).collect();
    let expected = [
        OutgoingEvent::Stopped,
        OutgoingEvent::SetUp,
        OutgoingEvent::Complete(id("d", "a")),
        OutgoingEvent::Sent,
        OutgoingEvent::HandedOver,
    ];
    assert_eq!(events, expected);
}

#[test]
fn a_device_without_a_name_is_none() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut node = MigratingNode::new("d", &from);
    node.device = Some(String::new());
    let mut outgoing = BitmapMigration::new()
        .with(node)
        .outgoing(OutgoingOptions::default())
        .unwrap();
    assert!(pull(&mut outgoing).starts_with(b"\x1c\x01d\x01a"));
}

/// What is in use on storage is what came: the image was not closed, as its bitmaps went over the wire.
#[test]
fn a_stored_copy_that_is_in_use_does_not_stand_in_the_way_of_what_came() {
    for is_whole in [false, true] {
        let (from, to) = (disk(&[bitmap("a", true, true)]), Node::new(LEN));
        let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
        let mut incoming = one(&to).incoming(IncomingOptions::default());
        incoming.feed(&pull(&mut outgoing)).unwrap();
        stop(&mut outgoing, &from);
        if is_whole {
            incoming.feed(&pull(&mut outgoing)).unwrap();
        }
        let stored = |name: &str, is_in_use| {
            let mut state =
                BitmapState::new(name, HBitmap::new(LEN, Granularity::DEFAULT).unwrap());
            state.is_in_use = is_in_use;
            state
        };
        let states = vec![stored("a", true), stored("other", true)];
        to.bitmaps().import_state(&quiesce(&to), states).unwrap();
        assert!(to.bitmaps().query("other").unwrap().is_inconsistent);
        // One that was closed is another bitmap.
        let error = to
            .bitmaps()
            .import_state(&quiesce(&to), vec![stored("a", false)]);
        assert!(error.is_err());
        if !is_whole {
            incoming.feed(&pull(&mut outgoing)).unwrap();
        }
        incoming.finish().unwrap();
        start(&mut incoming, &to);
        outgoing.finish().unwrap();
        assert!(!to.bitmaps().query("a").unwrap().is_inconsistent);
        assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
    }
}

#[test]
fn a_stream_that_ends_amid_what_is_passed_over_is_cut_off() {
    // A command of 100 bytes, of which 10 are there.
    let stream = [&[8, 0, 3, 0, 100][..], &[0; 10]].concat();
    for piece in [1, 100] {
        let mut reader = RecordReader::new(Framing::Sections);
        for bytes in stream.chunks(piece) {
            let used = reader
                .feed(bytes, &mut |_| Ok::<(), StreamError>(()))
                .unwrap();
            assert_eq!(used, bytes.len());
        }
        assert!(!reader.is_between_parts());
        let error = reader.finish().unwrap_err();
        assert_eq!((error.at, error.why), (15, Fault::Truncated));
    }
}

#[test]
fn a_list_of_names_is_passed_over_name_by_name() {
    let mut reader = RecordReader::new(Framing::Whole);
    let mut feed = |bytes: &[u8]| {
        reader
            .feed(bytes, &mut |_| Ok::<(), StreamError>(()))
            .unwrap();
        reader.position()
    };
    let mut fed = feed(b"QEVM\0\0\0\x03\x07\0\0\0\0");
    let head = [
        b"\x05\x1aconfiguration/capabilities\0\0\0\x01".as_slice(),
        &60_000u32.to_be_bytes(),
    ];
    let head = head.concat();
    fed += head.len() as u64;
    assert_eq!(feed(&head), fed);
    for name in 0..60_000 {
        // A length, and as many bytes. Nothing of a name that is over is kept, to be looked at again.
        let name = if name % 100 == 0 {
            &b"\x03abc"[..]
        } else {
            b"\0"
        };
        fed += name.len() as u64;
        assert_eq!(feed(name), fed);
    }
}

#[test]
fn a_section_of_another_instance_is_not_ours() {
    let body = b"\x1c\x01d\x01b\0\x01\0\0\x01\x42\0\0\0\0\0\0\0\0\0\x03\x20\0\x20\x01";
    let stream = |instance: u32| {
        let head = [
            &b"\x01\0\0\0\x07\x0cdirty-bitmap"[..],
            &instance.to_be_bytes(),
            &[0, 0, 0, 1],
        ];
        [&head.concat()[..], body, b"\x7e\0\0\0\x07"].concat()
    };
    let feed = |instance| {
        let mut options = IncomingOptions::default();
        options.stream = StreamKind::Qemu(Framing::Sections);
        let mut incoming = one(&Node::new(LEN)).incoming(options);
        incoming
            .feed(&stream(instance))
            .and_then(|_| incoming.finish())
    };
    feed(0).unwrap();
    assert!(feed(1).is_err());
}

/// Whoever knows a section looks further than it goes.
#[test]
fn what_was_needed_past_the_end_of_a_section_is_read_on() {
    struct FarSighted;
    impl ForeignSections for FarSighted {
        fn body(&mut self, _: &ForeignSection<'_>, bytes: &[u8]) -> Result<BodyPart, String> {
            Ok(match bytes.len() {
                60.. => BodyPart::End(1),
                _ => BodyPart::Needs(60),
            })
        }
    }
    let stream = [
        &b"\x04\0\0\0\x09\x01x\0\0\0\0\0\0\0\x01#\x7e\0\0\0\x09"[..],
        b"\x01\0\0\0\x07\x0cdirty-bitmap\0\0\0\0\0\0\0\x01\x01\x7e\0\0\0\x07",
        b"\x03\0\0\0\x07\x01\x7e\0\0\0\x07",
    ]
    .concat();
    let others = [0xff; 30];
    let bytes = [&stream[..], &others].concat();
    for first in 0..stream.len() {
        let foreign: Option<Box<dyn ForeignSections + Send>> = Some(Box::new(FarSighted));
        let mut reader = RecordReader::new(Framing::Sections).with_foreign(foreign);
        let mut sink = |_: &Record<'_>| Ok::<(), StreamError>(());
        let mut used = reader.feed(&bytes[..first], &mut sink).unwrap();
        assert_eq!(used, first);
        used += reader.feed(&bytes[first..], &mut sink).unwrap();
        assert!(reader.is_done());
        // It is known where the bitmaps end. The section begins its body with the 16th byte.
        assert_eq!(reader.position(), stream.len() as u64);
        assert_eq!(used, if first > 15 { 15 + 60 } else { stream.len() });
    }
}

/// Disks change between the look at a bitmap and its being taken.
#[test]
fn a_bitmap_is_sent_as_it_is_when_it_is_taken() {
    let from = Node::new(1 << 20);
    let mut options = BitmapOptions::default();
    options.granularity = Granularity::from_bytes(512);
    from.bitmaps().add_disabled("a", options).unwrap();
    let stops = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let resizer = scope.spawn(|| {
            let mut len = 1 << 20;
            while !stops.load(Ordering::Relaxed) {
                let guard = quiesce(&from);
                len = (9 << 20) - len;
                if let Ok(resize) = from.resize(&guard, len, Grown::Clean) {
                    resize.commit();
                }
            }
        });
        // Some thousands of looks, of which some come upon a disk that is just changing.
        let mut is_right = true;
        for _ in 0..5_000 {
            let outgoing = match one(&from).outgoing(OutgoingOptions::default()) {
                Ok(outgoing) => outgoing,
                Err(SetupError::Busy { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            is_right &= outgoing.bitmaps()[0].bytes == from.len() / 512 / 8;
        }
        stops.store(true, Ordering::Relaxed);
        resizer.join().unwrap();
        assert!(is_right);
    });
}

/// A bitmap is removed, and another made of that name, between the look at it and its being taken.
#[test]
fn a_bitmap_is_as_persistent_as_the_one_that_is_taken() {
    let from = Node::new(1 << 20);
    from.bitmaps().set_storage(Some(BitmapStorage::default()));
    let stops = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let maker = scope.spawn(|| {
            let mut options = BitmapOptions::default();
            while !stops.load(Ordering::Relaxed) {
                options.persistent = !options.persistent;
                // It is not made while it is there, nor removed while it is sent.
                let _ = from.bitmaps().add_disabled("a", options);
                let _ = from.bitmaps().remove("a");
            }
        });
        let (mut is_right, mut looks) = (true, 0);
        while looks < 100_000 && is_right {
            looks += 1;
            let Ok(mut outgoing) = one(&from).outgoing(OutgoingOptions::default()) else {
                continue;
            };
            let bytes = pull(&mut outgoing);
            // Nothing, or a START with its flags and the end of the part.
            if let [.., flags, 1] = bytes[..] {
                let is_persistent = from.bitmaps().query("a").unwrap().is_persistent;
                is_right = is_persistent == (flags & 2 != 0);
            }
        }
        stops.store(true, Ordering::Relaxed);
        maker.join().unwrap();
        assert!(is_right);
    });
}

#[test]
fn a_flood_of_bitmaps_ends_before_it_costs_much() {
    let node = Node::new(0);
    let mut incoming = one(&node).incoming(IncomingOptions::default());
    let mut stream = Vec::new();
    for index in 0..30_000 {
        let name = format!("{index:08}");
        stream.extend(b"\x1c\x01d\x08");
        stream.extend(name.as_bytes());
        stream.extend([0, 1, 0, 0, 1]);
    }
    let error = incoming.feed(&stream).unwrap_err();
    // Each costs more than the one before. The first that is not allowed is the last that is looked at.
    let allowed = IncomingOptions::default().bitmaps_max;
    assert_eq!(allowed, 4096);
    let at = (allowed * (stream.len() / 30_000)) as u64;
    let why = Fault::Limit {
        what: "their number",
    };
    assert!(matches!(error, IncomingError::Stream(error) if error.at == at && error.why == why));
    let begun = std::iter::from_fn(|| incoming.poll_event())
        .filter(|event| matches!(event, IncomingEvent::Started(_)));
    assert_eq!(begun.count(), allowed);
    drop(incoming);
    assert!(node.bitmaps().query_all().is_empty());
}

#[test]
fn to_be_asked_for_nothing_gives_nothing() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    for _ in 0..3 {
        assert_eq!(
            outgoing.next_bytes(Duration::ZERO, &mut []),
            Ok(Next::Bytes(0))
        );
    }
    assert_eq!(outgoing.bytes_sent(), 0);
}

/// The name of a bitmap is one on its disk only.
#[test]
fn bitmaps_of_one_name_on_several_disks_are_told_apart() {
    for stream in [
        StreamKind::Qemu(Framing::Bare),
        StreamKind::Native { session: [3; 16] },
    ] {
        let names = ["d", "e", "f"];
        let mut source = BitmapMigration::new();
        let mut target = BitmapMigration::new();
        let (mut from, mut to) = (vec![], vec![]);
        for (index, name) in names.iter().enumerate() {
            let mut bitmap = bitmap("a", index != 1, false);
            bitmap.dirty = vec![(index as u64 * (1 << 20)..3 << 20).into()];
            from.push(disk(&[bitmap]));
            to.push(Node::new(LEN));
            source = source.with_node(*name, &from[index]);
            target = target.with_node(*name, &to[index]);
        }
        let mut options = OutgoingOptions::default();
        options.stream = stream;
        let mut outgoing = source.outgoing(options).unwrap();
        let guards: Vec<_> = from.iter().map(quiesce).collect();
        outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
        let mut options = IncomingOptions::default();
        options.stream = stream;
        let mut incoming = target.incoming(options);
        let mut answers = [0; 4096];
        loop {
            let bytes = pull(&mut outgoing);
            incoming.feed(&bytes).unwrap();
            let len = incoming.next_bytes(&mut answers);
            if len == 0 {
                break;
            }
            outgoing.feed(&answers[..len]).unwrap();
        }
        incoming.finish().unwrap();
        outgoing.finish().unwrap();
        let guards: Vec<_> = to.iter().map(quiesce).collect();
        incoming
            .guest_starts(&guards.iter().collect::<Vec<_>>())
            .unwrap();
        for (from, to) in from.iter().zip(&to) {
            assert_eq!(bits_of(from, "a"), bits_of(to, "a"));
        }
    }
}

#[test]
fn what_is_over_stays_so() {
    let from = disk(&[bitmap("a", true, false)]);
    let to = Node::new(LEN);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    stop(&mut outgoing, &from);
    let bytes = pull(&mut outgoing);
    outgoing.finish().unwrap();
    assert_eq!(outgoing.finish(), Err(OutgoingError::Over));
    let asked = outgoing.next_slice(Duration::ZERO).map(drop);
    assert_eq!(asked, Err(OutgoingError::Over));
    // At the other end what has arrived, and has a guest that runs, stays whatever comes then.
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    assert_eq!(incoming.feed(&bytes), Ok(bytes.len()));
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    let more = incoming.feed(&[0xff; 9]);
    assert!(matches!(more, Err(IncomingError::Stream(_))));
    assert_eq!(incoming.feed(&bytes), Err(IncomingError::Over));
    assert!(incoming.finish().is_err());
    drop(incoming);
    assert_eq!(bits_of(&from, "a"), bits_of(&to, "a"));
    // And what has ended in an error.
    let to = Node::new(LEN);
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    assert!(matches!(
        incoming.feed(&[0xff; 9]),
        Err(IncomingError::Stream(_))
    ));
    assert_eq!(incoming.feed(&bytes), Err(IncomingError::Over));
    assert!(incoming.finish().is_err());
    assert!(to.bitmaps().query("a").is_err());
}

#[test]
fn a_clock_that_goes_back_delays_and_nothing_else() {
    for speed in [1, 1000, u64::MAX] {
        let from = large(1 << 20, "a");
        let mut options = OutgoingOptions::default();
        options.mode = Mode::Live;
        options.speed = speed;
        let mut outgoing = one(&from).outgoing(options).unwrap();
        let all = outgoing.bytes_left();
        let times = [u64::MAX, 0, 5, 3, u64::MAX - 1, 1];
        let mut out = vec![0; 100];
        for micros in times.into_iter().cycle().take(1000) {
            let now = Duration::from_micros(micros);
            match outgoing.next_bytes(now, &mut out).unwrap() {
                Next::Until(until) => assert!(until > now),
                Next::Bytes(len) => assert!(len > 0),
                other => assert!(speed == u64::MAX && outgoing.bytes_left() == 0, "{other:?}"),
            }
        }
        assert!(outgoing.bytes_left() <= all);
        stop(&mut outgoing, &from);
        pull(&mut outgoing);
        outgoing.finish().unwrap();
    }
}

/// Loading and the start of the guest may be the business of two threads.
#[test]
fn both_ends_go_to_other_threads() {
    fn is_send<T: Send>() {}
    is_send::<blockjob::migration::IncomingMigration>();
    is_send::<IncomingOptions>();
    is_send::<blockjob::migration::OutgoingMigration>();
}
