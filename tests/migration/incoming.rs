//! A destination on a host where much else happens.

use std::sync::atomic::{AtomicBool, Ordering};

use blockjob::migration::{Fault, IncomingOptions, MigratingNode, StreamError};
use blockjob::{BitmapMigration, Grown, IncomingError, Node};

use crate::cases::{LEN, bitmap, disk, migrate, one, pull, stop, write};
use crate::truth::{bits_of, quiesce};

/// Disks change between the look at their length and the making of a bitmap.
#[test]
fn a_bitmap_that_begins_is_as_long_as_its_disk_is_then() {
    let to = Node::new(1 << 20);
    let stops = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let resizer = scope.spawn(|| {
            let mut len = 1 << 20;
            while !stops.load(Ordering::Relaxed) {
                let guard = quiesce(&to);
                len = (1 << 30) + (1 << 20) - len;
                if let Ok(resize) = to.resize(&guard, len, Grown::Clean) {
                    resize.commit();
                }
            }
        });
        // Some thousands of beginnings, of which some come upon a disk that is just changing.
        let (mut is_right, mut begun) = (true, 0);
        while begun < 5_000 && is_right {
            let mut incoming = one(&to).incoming(IncomingOptions::default());
            match incoming.feed(b"\x1c\x01d\x01a\0\0\x02\0\x01") {
                // Its length does not change any more.
                Ok(_) => is_right = incoming.bitmaps()[0].bytes == to.len() / 512 / 8,
                Err(IncomingError::Stream(StreamError {
                    why: Fault::Make { .. },
                    ..
                })) => {}
                Err(error) => panic!("{error}"),
            }
            begun += 1;
        }
        stops.store(true, Ordering::Relaxed);
        resizer.join().unwrap();
        assert!(is_right);
    });
}

#[test]
fn disks_without_a_name_are_told_apart_by_their_devices() {
    let (mut source, mut target) = (BitmapMigration::new(), BitmapMigration::new());
    let (mut from, mut to) = (vec![], vec![]);
    for index in 0..2 {
        let mut bitmap = bitmap("a", true, false);
        bitmap.dirty = vec![(index << 20..3 << 20).into()];
        from.push(disk(&[bitmap]));
        to.push(Node::new(LEN));
        let place = |node| {
            let mut place = MigratingNode::new("", node);
            place.device = Some(format!("virtio{index}"));
            place
        };
        source = source.with(place(from.last().unwrap()));
        target = target.with(place(to.last().unwrap()));
    }
    let [from, to] = [&from, &to].map(|nodes| nodes.iter().collect::<Vec<_>>());
    migrate(&source, &from, &target, &to);
    for (from, to) in from.iter().zip(to) {
        assert_eq!(bits_of(from, "a"), bits_of(to, "a"));
    }
}

/// A bitmap is one, under whatever name its disk goes.
#[test]
fn a_bitmap_of_a_disk_with_two_names_begins_once() {
    let to = Node::new(LEN);
    let target = one(&to).with_node("e", &to);
    let mut incoming = target.incoming(IncomingOptions::default());
    let whole = b"\x1c\x01d\x01a\0\x01\0\0\0\x42\0\0\0\0\0\0\0\0\0\x03\x20\0\x20";
    incoming.feed(whole).unwrap();
    // It is free as soon as it is whole, and may be gone before the guest starts.
    to.bitmaps().remove("a").unwrap();
    let error = incoming.feed(b"\x1c\x01e\x01a\0\x01\0\0\0").unwrap_err();
    assert!(matches!(
        error,
        IncomingError::Stream(StreamError {
            why: Fault::Exists { .. },
            ..
        })
    ));
}

/// Its storage cannot be written to, and then it does not come.
#[test]
fn a_bitmap_that_is_gone_refuses_no_writes() {
    for (is_enabled, is_whole) in [(true, false), (true, true), (false, true)] {
        let (from, to) = (disk(&[bitmap("a", is_enabled, true)]), Node::new(LEN));
        let mut outgoing = one(&from).outgoing(Default::default()).unwrap();
        let mut incoming = one(&to).incoming(IncomingOptions::default());
        incoming.feed(&pull(&mut outgoing)).unwrap();
        if is_whole {
            stop(&mut outgoing, &from);
            incoming.feed(&pull(&mut outgoing)).unwrap();
        }
        to.bitmaps().mark_readonly(&quiesce(&to), "a").unwrap();
        assert!(to.begin_write((0..1).into()).go().is_none());
        incoming.cancel();
        assert!(to.bitmaps().query("a").is_err());
        write(&to, 0);
    }
}

#[test]
fn a_stream_of_which_nothing_more_is_understood_is_not_read_on_for_others() {
    for is_dropped in [false, true] {
        let mut incoming = one(&Node::new(LEN)).incoming(IncomingOptions::default());
        if is_dropped {
            // A name that nobody has.
            assert_eq!(incoming.feed(b"\x08\x01x"), Ok(3));
        } else {
            incoming.cancel();
        }
        // It is read for the sake of others.
        assert_eq!(incoming.feed(b"\x01\x08"), Ok(2));
        let error = incoming.feed(&[0]).unwrap_err();
        assert!(matches!(error, IncomingError::Stream(_)), "{error}");
        assert_eq!(incoming.feed(&[1]), Err(IncomingError::Over));
        let expected = |error| match error {
            IncomingError::Dropped(_) => is_dropped,
            IncomingError::Cancelled => !is_dropped,
            _ => false,
        };
        assert!(incoming.finish().is_err_and(expected));
    }
}
