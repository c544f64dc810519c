//! A destination on a host where much else happens, and at the end of a stream that is anything but smooth.

use std::sync::atomic::{AtomicBool, Ordering};

use blockjob::migration::{Fault, IncomingOptions, StreamError};
use blockjob::{Grown, IncomingError, Node};

use crate::cases::one;
use crate::truth::quiesce;

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
