//! The mirror with the guest, its user and its driver on threads of their own: what was asked, and what
//! was written, at any moment has its effect.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests need real threads and real time"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use blockjob::{
    Begin, Cancel, Content, Extent, Granularity, JobError, Limits, Mirror, MirrorOptions,
    MirrorSync, Node, OpKind, Outcome, Status, Step,
};

const GRANULE: u64 = 4096;

/// Unparks a thread.
struct Unpark(Thread, AtomicBool);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.1.store(true, Ordering::SeqCst);
        self.0.unpark();
    }
}

fn outcome(kind: OpKind) -> Outcome {
    match kind {
        OpKind::Status(range) => Outcome::Status(Extent {
            len: range.len(),
            content: Content::Data,
            in_top: true,
        }),
        _ => Outcome::Done,
    }
}

fn options() -> MirrorOptions {
    let mut options = MirrorOptions::default();
    options.granularity = Granularity::from_bytes(GRANULE);
    options.sync = MirrorSync::None;
    options
}

/// A write that settles just when the job has found nothing to do wakes it all the same. The disk is
/// numbers: how often each granule was written, and what the copy has seen.
#[test]
fn a_guest_write_at_any_moment_is_copied() {
    let node = Node::new(GRANULE);
    let limits = Limits::new(GRANULE);
    let mut mirror = Mirror::new(&node, limits, limits, options()).unwrap();
    let job = mirror.job().clone();
    job.start().unwrap();
    let source = AtomicU64::new(0);
    let target = AtomicU64::new(0);
    let is_stuck = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let waker = Arc::new(Unpark(std::thread::current(), AtomicBool::new(false)));
            // The time of the job runs fast, so that nothing is batched.
            let mut now = Duration::ZERO;
            loop {
                now += Duration::from_secs(1);
                match mirror.poll(now, &Waker::from(Arc::clone(&waker))) {
                    Step::Op(op) => {
                        if let OpKind::Copy(_) = op.kind() {
                            target.store(source.load(Ordering::SeqCst), Ordering::SeqCst);
                        }
                        let outcome = outcome(op.kind());
                        mirror.op_done(now, op, outcome);
                    }
                    Step::Wait { .. } => {
                        while !waker.1.swap(false, Ordering::SeqCst) {
                            std::thread::park();
                        }
                    }
                    Step::Switch(_) => unreachable!("nobody completes it"),
                    Step::SwitchBack(_) => unreachable!("it is in no group"),
                    Step::Done(_) => return,
                }
            }
        });
        while job.query().status != Status::Ready {
            std::thread::yield_now();
        }
        let until = Instant::now() + Duration::from_secs(2);
        let mut value = 0;
        while Instant::now() < until && !is_stuck.load(Ordering::SeqCst) {
            value += 1;
            let ticket = loop {
                if let Begin::Go(ticket) = node.begin_write((0..1).into()) {
                    break ticket;
                }
                std::hint::spin_loop();
            };
            source.store(value, Ordering::SeqCst);
            ticket.finish(());
            let asked = Instant::now();
            while target.load(Ordering::SeqCst) != value {
                if asked.elapsed() > Duration::from_secs(10) {
                    is_stuck.store(true, Ordering::SeqCst);
                    break;
                }
                std::hint::spin_loop();
            }
        }
        job.cancel(Cancel::Force).unwrap();
    });
    assert!(
        !is_stuck.load(Ordering::SeqCst),
        "write {} woke nobody",
        source.load(Ordering::SeqCst)
    );
}

/// A cancel that was accepted is never followed by a switch, and one that was refused never undoes one.
#[test]
fn a_cancel_is_either_accepted_or_too_late() {
    let limits = Limits::new(GRANULE);
    let (mut accepted, mut refused) = (0, 0);
    let until = Instant::now() + Duration::from_secs(2);
    let mut round = 0u64;
    while Instant::now() < until {
        round += 1;
        let how = [Cancel::Soft, Cancel::Force][(round % 2) as usize];
        let node = Node::new(GRANULE);
        let mut mirror = Mirror::new(&node, limits, limits, options()).unwrap();
        let job = mirror.job().clone();
        job.start().unwrap();
        let now = Duration::ZERO;
        while job.query().status != Status::Ready {
            if let Step::Op(op) = mirror.poll(now, Waker::noop()) {
                let outcome = outcome(op.kind());
                mirror.op_done(now, op, outcome);
            }
        }
        let go = AtomicBool::new(false);
        let (was_accepted, switched, result) = std::thread::scope(|scope| {
            let canceller = scope.spawn(|| {
                while !go.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                for _ in 0..round % 64 {
                    std::hint::spin_loop();
                }
                job.cancel(how).is_ok()
            });
            job.complete().unwrap();
            go.store(true, Ordering::SeqCst);
            let mut switched = false;
            let result = loop {
                match mirror.poll(now, Waker::noop()) {
                    Step::Op(op) => {
                        let outcome = outcome(op.kind());
                        mirror.op_done(now, op, outcome);
                    }
                    Step::Wait { .. } => {}
                    Step::Switch(switch) => {
                        switched = true;
                        switch.commit();
                    }
                    Step::SwitchBack(_) => unreachable!("it is in no group"),
                    Step::Done(result) => break result,
                }
            };
            (canceller.join().unwrap(), switched, result)
        });
        assert_ne!(was_accepted, switched, "round {round}, {how:?}: {result:?}");
        match (was_accepted, how) {
            (true, Cancel::Force) => {
                assert!(matches!(result, Err(JobError::Cancelled { .. })));
            }
            (true, Cancel::Soft) | (false, _) => assert!(result.is_ok(), "{result:?}"),
        }
        if was_accepted {
            accepted += 1;
        } else {
            refused += 1;
        }
    }
    println!("{accepted} accepted, {refused} refused");
}
