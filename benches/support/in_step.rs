//! A mirror in step, on a thread of its own, between devices that move nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use blockjob::{Job, Mirror, Outcome, Status, Step};

/// Wakes a parked thread.
struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a mirror between devices that do nothing, until `stop`.
pub(crate) fn keep_in_step(mut mirror: Mirror, stop: &AtomicBool) {
    let began = Instant::now();
    let waker = Waker::from(std::sync::Arc::new(Unpark(thread::current())));
    while !stop.load(Ordering::Relaxed) {
        match mirror.poll(began.elapsed(), &waker) {
            Step::Op(op) => mirror.op_done(began.elapsed(), op, Outcome::Done),
            Step::Wait { until: None } => thread::park_timeout(Duration::from_millis(100)),
            Step::Wait { until: Some(at) } => {
                thread::park_timeout(at.saturating_sub(began.elapsed()));
            }
            Step::Switch(_) | Step::SwitchBack(_) | Step::Done(_) => {
                unreachable!("nobody asks for the end")
            }
        }
    }
}

/// Ends it, also when a bench panics: the scope waits for the thread.
pub(crate) struct StopOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for the moment from which on the mirror is in step.
pub(crate) fn wait_until_ready(job: &Job) {
    while job.query().status != Status::Ready {
        thread::yield_now();
    }
}
