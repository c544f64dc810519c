//! The way of a guest write allocates nothing.
//!
//! In a file of its own because it brings its own allocator, which counts per thread. That the way makes
//! no system call is not tested: it would take a tracer. It has none to make as long as it allocates
//! nothing and takes no lock.

use std::task::Waker;
use std::time::Duration;

use blockjob::{
    Backup, BackupOptions, Begin, BitmapOptions, Granularity, Grown, Limits, Node, Step, Way,
};

const WRITES: u64 = 1000;

/// Allocations of a thousand writes of a granule each.
fn allocations<L: Way>(mut begin: impl FnMut(blockjob::ByteRange) -> Begin<L>) -> u64 {
    let counted = allocation_counter::measure(|| {
        for write in 0..WRITES {
            let range = (write * 65536..(write + 1) * 65536).into();
            let ticket = begin(range).go().expect("nobody quiesces the node");
            ticket.finish(());
        }
    });
    counted.count_total
}

fn assert_nothing_allocated(node: &Node) {
    let queue = node.queue();
    assert_eq!(allocations(|range| node.begin_write(range)), 0);
    assert_eq!(allocations(|range| node.begin_write_owned(range)), 0);
    assert_eq!(allocations(|range| queue.begin_write(range)), 0);
    assert_eq!(allocations(|range| queue.begin_write_owned(range)), 0);
}

#[test]
fn nothing_is_allocated_with_nothing_attached() {
    assert_nothing_allocated(&Node::new(WRITES * 65536));
}

#[test]
fn nothing_is_allocated_while_writes_are_recorded() {
    let node = Node::new(WRITES * 65536);
    let guard = node.quiesce().try_guard().expect("no write is in flight");
    let bitmap = node.track(&guard, Granularity::DEFAULT).unwrap();
    drop(guard);
    assert_nothing_allocated(&node);
    assert_eq!(bitmap.lock().iter().count() as u64, WRITES);
    assert_nothing_allocated(&node);
}

#[test]
fn nothing_is_allocated_with_named_bitmaps() {
    let node = Node::new(WRITES * 65536);
    let guard = node.quiesce().try_guard().expect("no write is in flight");
    let bitmaps = node.bitmaps();
    for name in ["a", "b", "c", "d"] {
        bitmaps.add(&guard, name, BitmapOptions::default()).unwrap();
    }
    // What the disk has grown by is in a piece of the log of its own.
    let resize = node
        .resize(&guard, 2 * WRITES * 65536, Grown::Clean)
        .unwrap();
    resize.commit();
    drop(guard);
    assert_nothing_allocated(&node);
    let queue = node.queue();
    let beyond = |range: blockjob::ByteRange| {
        let start = WRITES * 65536 + range.start();
        queue.begin_write((start..start + range.len()).into())
    };
    assert_eq!(allocations(beyond), 0);
    let infos = node.bitmaps().query_all();
    assert!(infos.iter().all(|info| info.dirty_bytes == info.len));
}

/// Of guests that give up nothing is left, also if nobody asks who has come.
#[test]
fn writes_that_come_and_go_are_not_remembered() {
    let node = Node::new(1 << 20);
    let limits = Limits::new(1 << 20);
    let mut backup = Backup::new(&node, limits, limits, BackupOptions::default()).unwrap();
    backup.job().start().unwrap();
    let step = backup.poll(Duration::ZERO, Waker::noop());
    assert!(matches!(step, Step::Op(_)), "it holds writes back");
    let counted = allocation_counter::measure(|| {
        for _ in 0..WRITES {
            let begin = node.begin_write((0..512).into());
            assert!(matches!(begin, Begin::Wait(_)), "{begin:?}");
        }
    });
    assert!(counted.bytes_current < 1024, "{counted:?}");
}

#[test]
fn the_counter_counts() {
    let node = Node::new(WRITES * 65536);
    let boxed = allocation_counter::measure(|| {
        let ticket = node.begin_write((0..512).into()).go();
        drop(std::hint::black_box(Box::new(ticket)));
    });
    assert_eq!(boxed.count_total, 1);
}
