//! The node as a caller sees it: what a ticket does, who waits and who is woken, what is recorded and
//! where, and a stress test of all of it on real threads. What threads can do to each other in theory is
//! in `loom_gate.rs`.
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
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use blockjob::{
    Begin, ByteRange, Granularity, GuestQueue, JobBitmap, Lane, Node, OwnedTicket, PendingWrite,
    QuiesceGuard, Ticket, TrackError, Way,
};

const KIB: u64 = 1024;
const LEN: u64 = 1024 * KIB;

/// Counts how often it is woken.
#[derive(Default)]
struct Alarm(AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Alarm {
    fn new() -> (Arc<Self>, Waker) {
        let alarm = Arc::new(Self::default());
        (Arc::clone(&alarm), Waker::from(alarm))
    }

    /// How often it was woken since it was last asked.
    fn rings(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn track(node: &Node, granule: u64) -> JobBitmap {
    node.track(&quiesced(node), granularity(granule)).unwrap()
}

fn go<L: Way>(begin: Begin<L>) -> Ticket<L> {
    begin.go().expect("the node is open")
}

fn wait<L: Way>(begin: Begin<L>) -> PendingWrite<L> {
    match begin {
        Begin::Wait(pending) => pending,
        begun => panic!("the node is quiesced: {begun:?}"),
    }
}

fn write(node: &Node, range: std::ops::Range<u64>) {
    go(node.begin_write(range.into())).finish(());
}

fn dirty(bitmap: &JobBitmap) -> Vec<ByteRange> {
    bitmap.lock().runs().collect()
}

fn ranges<const N: usize>(ranges: [std::ops::Range<u64>; N]) -> Vec<ByteRange> {
    ranges.map(ByteRange::from).to_vec()
}

mod ticket {
    use super::*;

    #[test]
    fn finish_hands_the_result_through() {
        let node = Node::new(LEN);
        let begin = || go(node.begin_write((0..512).into()));
        assert_eq!(begin().finish(17), 17);
        let failed: io::Result<()> = Err(io::ErrorKind::StorageFull.into());
        let error = begin().finish(failed).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(begin().range(), (0..512).into());
    }

    #[test]
    fn whatever_the_write_came_to_it_is_recorded() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 64 * KIB);
        let begin = |granule: u64| {
            go(node.begin_write((granule * 64 * KIB..granule * 64 * KIB + 1).into()))
        };
        begin(0).finish(Ok::<_, io::Error>(())).unwrap();
        begin(2)
            .finish(Err::<(), _>(io::Error::from(io::ErrorKind::Other)))
            .unwrap_err();
        drop(begin(4));
        drop(node.begin_write((6 * 64 * KIB..6 * 64 * KIB + 1).into()));
        begin(8).cancel();
        let k = 64 * KIB;
        assert_eq!(
            dirty(&bitmap),
            ranges([0..k, 2 * k..3 * k, 4 * k..5 * k, 6 * k..7 * k])
        );
    }

    #[test]
    fn nothing_is_recorded_before_the_write_settled() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let ticket = go(node.begin_write((0..512).into()));
        assert!(bitmap.lock().is_clean());
        ticket.finish(());
        assert!(!bitmap.lock().is_clean());
    }

    #[test]
    fn each_way_to_be_done_with_it_leaves_the_node() {
        let node = Node::new(LEN);
        let begin = || go(node.begin_write_owned((0..512).into()));
        let ends: [fn(OwnedTicket); 3] = [|t| t.finish(()), |t| t.cancel(), drop];
        for end in ends {
            let ticket = begin();
            let quiesce = node.quiesce().try_guard().expect_err("one is in flight");
            end(ticket);
            drop(quiesce.try_guard().expect("it has left"));
        }
    }

    #[test]
    fn a_panic_between_records() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let writer = node.clone();
        let panicked = thread::spawn(move || {
            let _ticket = go(writer.begin_write((0..512).into()));
            std::panic::resume_unwind(Box::new("the VMM's own write"));
        });
        assert!(panicked.join().is_err());
        assert_eq!(dirty(&bitmap), ranges([0..512]));
        drop(quiesced(&node));
    }

    #[test]
    fn owned_tickets_finish_on_other_threads() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let queue = node.queue();
        let owned = queue.begin_write_owned((512..1024).into());
        let tickets = [go(owned), go(node.begin_write_owned((2048..2049).into()))];
        thread::scope(|scope| {
            for ticket in tickets {
                scope.spawn(|| ticket.finish(()));
            }
        });
        assert_eq!(dirty(&bitmap), ranges([512..1024, 2048..2560]));
        drop(quiesced(&node));
    }

    #[test]
    fn what_lies_past_the_end_is_clipped() {
        let node = Node::new(1000);
        let bitmap = track(&node, 512);
        for range in [1000..2000, 5000..6000, u64::MAX - 1..u64::MAX, 600..600] {
            write(&node, range);
            assert!(bitmap.lock().is_clean());
        }
        write(&node, 999..u64::MAX);
        assert_eq!(dirty(&bitmap), ranges([512..1000]));
    }

    #[test]
    fn a_disk_of_no_bytes_has_nothing_to_record() {
        let node = Node::new(0);
        let bitmap = track(&node, 512);
        write(&node, 0..512);
        assert!(bitmap.lock().is_clean());
    }
}

mod waiting {
    use super::*;

    #[test]
    fn a_write_waits_for_the_guard_and_is_woken() {
        let node = Node::new(LEN);
        let queue = node.queue();
        type BeginBy = fn(&Node, &GuestQueue) -> Begin<Arc<Lane>>;
        let ways: [BeginBy; 2] = [
            |node, _| node.begin_write_owned((0..512).into()),
            |_, queue| queue.begin_write_owned((0..512).into()),
        ];
        for begin in ways {
            let guard = quiesced(&node);
            let mut pending = wait(begin(&node, &queue));
            let (alarm, waker) = Alarm::new();
            assert!(pending.try_begin().is_none());
            assert!(pending.poll_begin(&waker).is_pending());
            assert_eq!(alarm.rings(), 0);
            drop(guard);
            assert_eq!(alarm.rings(), 1);
            let Poll::Ready(Ok(ticket)) = pending.poll_begin(&waker) else {
                panic!("the node is open");
            };
            ticket.finish(());
            assert_eq!(alarm.rings(), 0);
        }
        drop(quiesced(&node));
    }

    #[test]
    fn the_waker_of_the_last_poll_counts() {
        let node = Node::new(LEN);
        let guard = quiesced(&node);
        let mut pending = wait(node.begin_write((0..512).into()));
        let ((first, first_waker), (last, last_waker)) = (Alarm::new(), Alarm::new());
        assert!(pending.poll_begin(&first_waker).is_pending());
        assert!(pending.poll_begin(&last_waker).is_pending());
        drop(guard);
        assert_eq!((first.rings(), last.rings()), (0, 1));
    }

    #[test]
    fn all_who_wait_are_woken() {
        let node = Node::new(LEN);
        let guard = quiesced(&node);
        let mut pending: Vec<_> = (0..5)
            .map(|_| wait(node.begin_write((0..512).into())))
            .collect();
        let alarms: Vec<_> = pending
            .iter_mut()
            .map(|pending| {
                let (alarm, waker) = Alarm::new();
                assert!(pending.poll_begin(&waker).is_pending());
                alarm
            })
            .collect();
        drop(pending.remove(2));
        drop(guard);
        let rings: Vec<_> = alarms.iter().map(|alarm| alarm.rings()).collect();
        assert_eq!(rings, [1, 1, 0, 1, 1], "who gave up is not woken");
    }

    #[test]
    fn a_pending_write_dropped_was_never_there() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let guard = quiesced(&node);
        drop(node.begin_write((0..512).into()));
        drop(guard);
        assert!(bitmap.lock().is_clean());
        drop(quiesced(&node));
    }

    #[test]
    fn a_future_dropped_with_its_ticket_records_nothing() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        drop(node.begin_write((0..512).into()).into_future());
        assert!(bitmap.lock().is_clean());
        drop(quiesced(&node));
    }

    #[test]
    fn awaiting_is_polling() {
        let node = Node::new(LEN);
        let guard = quiesced(&node);
        let (alarm, waker) = Alarm::new();
        let mut cx = Context::from_waker(&waker);
        let mut begin = pin!(node.begin_write((0..512).into()).into_future());
        assert!(begin.as_mut().poll(&mut cx).is_pending());
        drop(guard);
        assert_eq!(alarm.rings(), 1);
        let Poll::Ready(Ok(ticket)) = begin.poll(&mut cx) else {
            panic!("the node is open");
        };
        ticket.finish(());
    }

    /// A waker of an executor whose tasks own what they wait with: when it is the last to know the
    /// task, dropping it drops all of that, and the node is entered again.
    struct LastToKnow {
        node: Node,
        ticket: Option<OwnedTicket>,
    }

    impl Wake for LastToKnow {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for LastToKnow {
        fn drop(&mut self) {
            drop(self.ticket.take());
            drop(self.node.quiesce());
        }
    }

    /// Runs what would hang if it took a lock twice.
    fn in_time(scenario: impl FnOnce() + Send + 'static) {
        let (done, is_done) = mpsc::channel();
        let thread = thread::spawn(move || {
            scenario();
            done.send(()).unwrap();
        });
        is_done
            .recv_timeout(Duration::from_secs(20))
            .expect("a lock is taken twice");
        thread.join().unwrap();
    }

    fn last_to_know(node: &Node, ticket: Option<OwnedTicket>) -> Waker {
        let node = node.clone();
        Waker::from(Arc::new(LastToKnow { node, ticket }))
    }

    #[test]
    fn wakers_are_dropped_outside_of_the_lock() {
        in_time(|| {
            let node = Node::new(LEN);
            let bitmap = track(&node, 512);
            let guard = quiesced(&node);
            let mut pending = wait(node.begin_write((0..512).into()));
            assert!(pending.poll_begin(&last_to_know(&node, None)).is_pending());
            assert!(pending.poll_begin(Waker::noop()).is_pending());
            assert!(pending.poll_begin(&last_to_know(&node, None)).is_pending());
            drop(pending);
            drop(guard);

            for _ in 0..2 {
                assert!(bitmap.poll_dirty(&last_to_know(&node, None)).is_pending());
            }
            drop(bitmap);

            let ticket = go(node.begin_write((0..512).into()));
            let mut quiesce = node.quiesce();
            for _ in 0..2 {
                let waker = last_to_know(&node, None);
                assert!(quiesce.poll_guard(Some(&waker)).is_pending());
            }
            drop(quiesce);
            ticket.finish(());
            drop(quiesced(&node));
        });
    }

    #[test]
    fn a_waker_that_holds_the_last_ticket_may_be_dropped() {
        in_time(|| {
            let node = Node::new(LEN);
            let ticket = go(node.begin_write_owned((0..512).into()));
            let mut quiesce = node.quiesce();
            let waker = last_to_know(&node, Some(ticket));
            assert!(quiesce.poll_guard(Some(&waker)).is_pending());
            drop(waker);
            assert!(quiesce.poll_guard(Some(Waker::noop())).is_pending());
            assert!(quiesce.poll_guard(None).is_ready());
        });
    }
}

mod quiesce {
    use super::*;

    #[test]
    fn the_guard_is_given_when_the_last_write_has_left() {
        let node = Node::new(LEN);
        let queue = node.queue();
        let tickets = [
            go(node.begin_write_owned((0..512).into())),
            go(queue.begin_write_owned((0..512).into())),
        ];
        let (alarm, waker) = Alarm::new();
        let mut quiesce = node.quiesce();
        assert!(quiesce.poll_guard(Some(&waker)).is_pending());
        let [first, last] = tickets;
        first.finish(());
        assert_eq!(alarm.rings(), 1);
        assert!(quiesce.poll_guard(Some(&waker)).is_pending());
        last.finish(());
        assert_eq!(alarm.rings(), 1);
        assert!(quiesce.poll_guard(Some(&waker)).is_ready());
    }

    #[test]
    fn the_gate_is_closed_from_the_call_on() {
        let node = Node::new(LEN);
        let ticket = go(node.begin_write((0..512).into()));
        let quiesce = node.quiesce();
        let _pending = wait(node.begin_write((0..512).into()));
        ticket.finish(());
        drop(quiesce);
    }

    #[test]
    fn the_node_opens_when_the_last_has_let_go() {
        let node = Node::new(LEN);
        let (alarm, waker) = Alarm::new();
        let outer = quiesced(&node);
        let mut pending = wait(node.begin_write((0..512).into()));
        assert!(pending.poll_begin(&waker).is_pending());
        let inner = quiesced(&node);
        let waiting = node.quiesce();
        drop(outer);
        drop(waiting);
        assert_eq!(alarm.rings(), 0);
        assert!(pending.try_begin().is_none());
        drop(inner);
        assert_eq!(alarm.rings(), 1);
        pending
            .try_begin()
            .expect("the node is open")
            .unwrap()
            .finish(());
    }

    #[test]
    fn a_quiesce_given_up_opens_the_node_and_is_not_woken() {
        let node = Node::new(LEN);
        let ticket = go(node.begin_write((0..512).into()));
        let ((closer, closer_waker), (writer, writer_waker)) = (Alarm::new(), Alarm::new());
        let mut quiesce = node.quiesce();
        assert!(quiesce.poll_guard(Some(&closer_waker)).is_pending());
        let mut pending = wait(node.begin_write((0..512).into()));
        assert!(pending.poll_begin(&writer_waker).is_pending());
        drop(quiesce);
        assert_eq!(writer.rings(), 1);
        // The write that was turned away may have woken it.
        closer.rings();
        ticket.finish(());
        assert_eq!(closer.rings(), 0);
    }

    #[test]
    fn two_wait_for_the_same_write() {
        let node = Node::new(LEN);
        let ticket = go(node.begin_write((0..512).into()));
        let mut waiting = [(); 2].map(|()| (node.quiesce(), Alarm::new()));
        for (quiesce, (_, waker)) in &mut waiting {
            assert!(quiesce.poll_guard(Some(waker)).is_pending());
        }
        ticket.finish(());
        for (quiesce, (alarm, waker)) in &mut waiting {
            assert_eq!(alarm.rings(), 1);
            assert!(
                Pin::new(quiesce)
                    .poll(&mut Context::from_waker(waker))
                    .is_ready()
            );
        }
        drop(waiting);
        write(&node, 0..512);
    }

    #[test]
    fn a_write_of_a_queue_that_is_gone_is_waited_for() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let queue = node.queue();
        let ticket = go(queue.begin_write_owned((0..512).into()));
        drop(queue);
        let quiesce = node.quiesce().try_guard().expect_err("one is in flight");
        ticket.finish(());
        let guard = quiesce.try_guard().expect("it has left");
        assert_eq!(dirty(&bitmap), ranges([0..512]));
        drop(guard);
    }

    #[test]
    fn a_forgotten_ticket_of_a_queue_that_is_gone_keeps_the_node_for_ever() {
        let node = Node::new(LEN);
        let queue = node.queue();
        std::mem::forget(go(queue.begin_write((0..512).into())));
        drop(queue);
        assert!(
            node.quiesce().try_guard().is_err(),
            "it may still be written"
        );
    }

    #[test]
    fn clones_are_the_same_node_and_others_are_not() {
        let (node, other) = (Node::new(LEN), Node::new(LEN));
        let clone = node.clone();
        let guard = quiesced(&node);
        assert!(guard.is_of(&node) && guard.is_of(&clone));
        assert!(!guard.is_of(&other));
        drop(node);
        let _pending = wait(clone.begin_write((0..512).into()));
        go(other.begin_write((0..512).into())).finish(());
    }
}

mod recording {
    use super::*;

    #[test]
    fn the_guard_of_another_node_is_refused() {
        let (node, other) = (Node::new(LEN), Node::new(LEN));
        let guard = quiesced(&other);
        let refused = node.track(&guard, Granularity::DEFAULT).unwrap_err();
        assert_eq!(refused, TrackError::OtherNode);
    }

    #[test]
    fn granularities_are_512_bytes_to_2_gib() {
        let node = Node::new(LEN);
        let guard = quiesced(&node);
        for refused in [1, 256, 1 << 32, 1 << 63].map(granularity) {
            let error = node.track(&guard, refused).unwrap_err();
            assert_eq!(error, TrackError::Granularity(refused));
        }
        for taken in [512, 1 << 31].map(granularity) {
            let bitmap = node.track(&guard, taken).unwrap();
            assert_eq!(bitmap.lock().granularity(), taken);
        }
    }

    #[test]
    fn a_disk_too_long_is_refused_and_nothing_has_changed() {
        let node = Node::new(u64::MAX);
        let guard = quiesced(&node);
        assert!(node.track(&guard, granularity(1 << 31)).is_err());
        drop(guard);
        write(&node, 0..512);
        drop(quiesced(&node));
    }

    #[test]
    fn each_bitmap_has_its_own_granularity_and_content() {
        let node = Node::new(LEN);
        let coarse = track(&node, 64 * KIB);
        write(&node, 0..1);
        let fine = track(&node, 4 * KIB);
        assert_eq!(dirty(&coarse), ranges([0..64 * KIB]));
        assert!(fine.lock().is_clean(), "it was written before");

        write(&node, 100 * KIB..101 * KIB);
        assert_eq!(dirty(&coarse), ranges([0..128 * KIB]));
        assert_eq!(dirty(&fine), ranges([100 * KIB..104 * KIB]));

        coarse.lock().reset_all();
        assert_eq!(dirty(&fine), ranges([100 * KIB..104 * KIB]));
        drop(coarse);
        write(&node, 0..1);
        assert_eq!(dirty(&fine), ranges([0..4 * KIB, 100 * KIB..104 * KIB]));
    }

    #[test]
    fn a_coarse_bitmap_keeps_what_it_has_when_a_fine_one_comes_and_goes() {
        let node = Node::new(LEN);
        let coarse = track(&node, 64 * KIB);
        write(&node, 0..1);
        let fine = track(&node, 512);
        write(&node, 128 * KIB..128 * KIB + 1);
        drop(fine);
        write(&node, 256 * KIB..256 * KIB + 1);
        let third = track(&node, 64 * KIB);
        write(&node, 384 * KIB..384 * KIB + 1);
        let k = 64 * KIB;
        assert_eq!(dirty(&third), ranges([6 * k..7 * k]));
        assert_eq!(
            dirty(&coarse),
            ranges([0..k, 2 * k..3 * k, 4 * k..5 * k, 6 * k..7 * k])
        );
    }

    #[test]
    fn a_finer_bitmap_attached_finds_each_write_of_its_own() {
        let node = Node::new(LEN);
        let mut bitmaps = Vec::new();
        for (index, exponent) in (9..20).rev().enumerate() {
            bitmaps.push(track(&node, 1 << exponent));
            write(&node, index as u64 * 700..index as u64 * 700 + 1);
        }
        for (index, bitmap) in bitmaps.iter().enumerate() {
            let bitmap = bitmap.lock();
            let granule = bitmap.granularity().bytes();
            let expected: std::collections::BTreeSet<_> = (index as u64..11)
                .map(|write| write * 700 / granule * granule)
                .collect();
            let found: Vec<_> = bitmap.iter().collect();
            assert_eq!(found, Vec::from_iter(expected), "at {granule}");
        }
    }

    #[test]
    fn recording_stops_with_the_last_bitmap_and_the_next_begins_clean() {
        let node = Node::new(LEN);
        let first = track(&node, 512);
        write(&node, 0..512);
        let late = go(node.begin_write((1024..1536).into()));
        drop(first);
        write(&node, 2048..2560);
        late.finish(());
        let next = track(&node, 512);
        assert!(next.lock().is_clean());
        assert!(next.poll_dirty(Waker::noop()).is_pending());
        write(&node, 4096..4608);
        assert_eq!(dirty(&next), ranges([4096..4608]));
    }

    #[test]
    fn a_write_that_was_inside_when_the_last_bitmap_went_marks_no_other_log() {
        let node = Node::new(LEN);
        let first = track(&node, 64 * KIB);
        let late = go(node.begin_write((0..512).into()));
        drop(first);
        late.finish(());
        let next = track(&node, 512);
        assert!(next.lock().is_clean());
    }

    #[test]
    fn who_watches_is_woken_once_by_a_write() {
        let node = Node::new(LEN);
        let bitmap = track(&node, 512);
        let (alarm, waker) = Alarm::new();
        assert!(bitmap.poll_dirty(&waker).is_pending());
        let ticket = go(node.begin_write((0..512).into()));
        assert_eq!(alarm.rings(), 0);
        ticket.finish(());
        assert_eq!(alarm.rings(), 1);
        assert!(bitmap.poll_dirty(&waker).is_ready());
        write(&node, 512..1024);
        assert_eq!(alarm.rings(), 0, "nobody asked again");
        bitmap.lock().reset_all();
        assert!(bitmap.poll_dirty(&waker).is_pending());
        drop(bitmap);
        write(&node, 512..1024);
        assert_eq!(alarm.rings(), 0, "who watched is gone");
    }

    #[test]
    fn all_who_watch_are_woken_and_each_has_the_write() {
        let node = Node::new(LEN);
        let watched = [512, 4 * KIB].map(|granule| (track(&node, granule), Alarm::new()));
        for (bitmap, (_, waker)) in &watched {
            assert!(bitmap.poll_dirty(waker).is_pending());
        }
        write(&node, 0..1);
        for (bitmap, (alarm, waker)) in &watched {
            assert_eq!(alarm.rings(), 1);
            // The first to look moves the marks into the bitmap of the other, too.
            assert!(!bitmap.lock().is_clean());
            assert!(bitmap.poll_dirty(waker).is_ready());
        }
    }

    #[test]
    fn changes_under_the_lock_are_the_owners_own() {
        let node = Node::new(4096);
        let (one, other) = (track(&node, 512), track(&node, 512));
        let mut guard = one.lock();
        assert!(guard.set_all());
        assert!(guard.reset((0..512).into()).unwrap());
        assert!(guard.reset_inner((1000..2048).into()).unwrap());
        assert!(guard.set((0..1).into()).unwrap());
        assert!(guard.set((4096..8192).into()).is_err());
        drop(guard);
        assert_eq!(dirty(&one), ranges([0..1024, 2048..4096]));
        assert!(other.lock().is_clean());
    }
}

/// Each thread writes a disk of atomics through a queue of its own, or through the node, by tickets of
/// both kinds, and waits when it must. Meanwhile somebody closes the gate again and again, and finds:
/// no write half done, and everything recorded that differs from the last time.
#[test]
fn under_the_guard_every_difference_is_recorded() {
    const THREADS: u64 = 4;
    const GRANULES: u64 = 2048;
    const ROUNDS: usize = 300;
    const GRANULE: u64 = 512;
    let node = Node::new(GRANULES * GRANULE);
    let disk: Vec<_> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
    let bitmap = track(&node, GRANULE);
    let is_over = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let start = Barrier::new(THREADS as usize + 1);

    let write_some = |seed: u64| {
        let queue = node.queue();
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        start.wait();
        while !is_over.load(Ordering::Relaxed) {
            // A xorshift is random enough to pick a place.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let first = random % GRANULES;
            let end = (first + 1 + (random >> 32) % 3).min(GRANULES);
            let range = (first * GRANULE..end * GRANULE).into();
            let write = || {
                for granule in first..end {
                    // Odd while it is written.
                    disk[granule as usize].fetch_add(1, Ordering::Relaxed);
                }
                for granule in first..end {
                    disk[granule as usize].fetch_add(1, Ordering::Relaxed);
                }
            };
            match random >> 60 {
                0..4 => settle(node.begin_write(range), write),
                4..8 => settle(queue.begin_write_owned(range), write),
                _ => settle(queue.begin_write(range), write),
            }
            writes.fetch_add(1, Ordering::Relaxed);
        }
    };
    let read = || Vec::from_iter(disk.iter().map(|granule| granule.load(Ordering::Relaxed)));

    thread::scope(|scope| {
        for seed in 1..=THREADS {
            scope.spawn(move || write_some(seed));
        }
        // Also when an assertion fails, or the scope would wait for ever.
        let _over = Raised(&is_over);
        start.wait();
        let mut before = vec![0; GRANULES as usize];
        let mut rounds_with_writes = 0;
        for _ in 0..ROUNDS {
            thread::sleep(Duration::from_micros(500));
            let mut quiesce = pin!(node.quiesce());
            let parked = Waker::from(Arc::new(Unpark(thread::current())));
            let guard = loop {
                match quiesce.as_mut().poll(&mut Context::from_waker(&parked)) {
                    Poll::Ready(guard) => break guard,
                    Poll::Pending => thread::park_timeout(Duration::from_secs(10)),
                }
            };
            let now = read();
            let recorded: Vec<_> = bitmap.lock().iter().collect();
            bitmap.lock().reset_all();
            assert_eq!(now, read(), "a write was in flight");
            drop(guard);
            assert!(
                now.iter().all(|data| data % 2 == 0),
                "a write was in flight"
            );
            let differs = (0..GRANULES).filter(|at| now[*at as usize] != before[*at as usize]);
            let differs: Vec<_> = differs.map(|granule| granule * GRANULE).collect();
            assert_eq!(recorded, differs, "what differs is what is recorded");
            rounds_with_writes += usize::from(!differs.is_empty());
            before = now;
        }
        assert!(rounds_with_writes > ROUNDS / 4, "the guests hardly wrote");
    });
    assert!(writes.into_inner() > 1000);
    drop(quiesced(&node));
}

struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits until the write is let in, does it and says so.
fn settle<L: Way>(begin: Begin<L>, write: impl Fn()) {
    let ticket = match begin {
        Begin::Go(ticket) => ticket,
        Begin::Wait(mut pending) => {
            let waker = Waker::from(Arc::new(Unpark(thread::current())));
            loop {
                match pending.poll_begin(&waker) {
                    Poll::Ready(begun) => break begun.expect("no bitmap is read-only"),
                    Poll::Pending => thread::park_timeout(Duration::from_secs(10)),
                }
            }
        }
        Begin::Refused(refused) => panic!("{refused}"),
    };
    write();
    ticket.finish(());
}
