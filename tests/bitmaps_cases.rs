//! Named bitmaps case by case: names and limits, recording, claims, what several read, what is stored.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test brings the threads"
)]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of ranges is what is recorded"
)]

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blockjob::bitmap::Status;
use blockjob::{
    Begin, BitmapError, BitmapOptions, BitmapState, BitmapStorage, BusyWith, ByteRange,
    CannotPersist, ClaimFor, FrozenBitmap, Granularity, HBitmap, Node, QuiesceGuard, SnapshotOf,
    WriteRefused,
};

const KIB: u64 = 1 << 10;
const LEN: u64 = 1 << 20;
const G: u64 = 64 * KIB;

fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}

fn of_granularity(bytes: u64) -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.granularity = Some(granularity(bytes));
    options
}

fn persistent() -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.persistent = true;
    options
}

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

/// A node with recording bitmaps of these names.
fn node_with(names: &[&str]) -> Node {
    let node = Node::new(LEN);
    let guard = quiesced(&node);
    for name in names {
        let bitmaps = node.bitmaps();
        bitmaps.add(&guard, name, BitmapOptions::default()).unwrap();
    }
    drop(guard);
    node
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

/// Runs what would hang if locks were taken in the wrong order.
fn in_time(scenario: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let thread = thread::spawn(move || {
        scenario();
        done.send(()).unwrap();
    });
    let in_time = is_done.recv_timeout(Duration::from_secs(60));
    assert_ne!(in_time, Err(mpsc::RecvTimeoutError::Timeout), "it hangs");
    thread.join().unwrap();
}

#[path = "bitmaps_cases/making.rs"]
mod making;

#[path = "bitmaps_cases/recording.rs"]
mod recording;

#[path = "bitmaps_cases/merging.rs"]
mod merging;

#[path = "bitmaps_cases/claims.rs"]
mod claims;

#[path = "bitmaps_cases/frozen.rs"]
mod frozen;

#[path = "bitmaps_cases/stored.rs"]
mod stored;

/// Whatever a caller passes, he gets an answer.
#[path = "bitmaps_cases/extremes.rs"]
mod extremes;
