//! The way of a guest write allocates nothing.
//!
//! In a file of its own because it brings its own allocator, which counts per thread. That the way makes
//! no system call is not tested: it would take a tracer. It has none to make as long as it allocates
//! nothing and takes no lock.

use blockjob::{Begin, Granularity, Node, Way};

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
fn the_counter_counts() {
    let node = Node::new(WRITES * 65536);
    let boxed = allocation_counter::measure(|| {
        let ticket = node.begin_write((0..512).into()).go();
        drop(std::hint::black_box(Box::new(ticket)));
    });
    assert_eq!(boxed.count_total, 1);
}
