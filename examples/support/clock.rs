//! Time and an executor for one future, without a runtime.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use blockjob::driver::Clock;
use parking_lot::{Condvar, Mutex};

/// Runs a future on this thread, which sleeps while there is nothing to do.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
        // A wake-up that came since the poll makes this return at once.
        thread::park();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// The time since this was made, and sleeping by a thread of its own, so that any executor will do.
#[derive(Debug)]
pub(crate) struct TimerClock {
    alarms: Arc<Alarms>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Alarms {
    start: Instant,
    state: Mutex<State>,
    has_changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Who is to be woken when; the number tells apart those at the same time.
    by_time: BTreeMap<(Duration, u64), Waker>,
    next_id: u64,
    is_closing: bool,
}

impl TimerClock {
    pub(crate) fn new() -> Self {
        let alarms = Arc::new(Alarms {
            start: Instant::now(),
            state: Mutex::new(State::default()),
            has_changed: Condvar::new(),
        });
        let thread = thread::spawn({
            let alarms = Arc::clone(&alarms);
            move || alarms.ring()
        });
        Self {
            alarms,
            thread: Some(thread),
        }
    }
}

impl Clock for TimerClock {
    fn now(&self) -> Duration {
        self.alarms.start.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        let mut alarm = Alarm {
            alarms: &self.alarms,
            key: None,
        };
        poll_fn(|cx| {
            if self.now() >= at {
                return Poll::Ready(());
            }
            alarm.set(at, cx.waker());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for TimerClock {
    fn drop(&mut self) {
        self.alarms.state.lock().is_closing = true;
        self.alarms.has_changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Alarms {
    fn ring(&self) {
        let mut state = self.state.lock();
        while !state.is_closing {
            let now = self.start.elapsed();
            match state.by_time.first_key_value() {
                None => self.has_changed.wait(&mut state),
                Some((&(at, _), _)) if at > now => {
                    self.has_changed.wait_for(&mut state, at - now);
                }
                Some(_) => {
                    let later = state.by_time.split_off(&(now, u64::MAX));
                    let due = std::mem::replace(&mut state.by_time, later);
                    drop(state);
                    due.into_values().for_each(Waker::wake);
                    state = self.state.lock();
                }
            }
        }
    }
}

/// One sleeper's place; given up when it is dropped.
struct Alarm<'a> {
    alarms: &'a Alarms,
    key: Option<(Duration, u64)>,
}

impl Alarm<'_> {
    fn set(&mut self, at: Duration, waker: &Waker) {
        let mut state = self.alarms.state.lock();
        let key = *self.key.get_or_insert_with(|| {
            state.next_id += 1;
            (at, state.next_id)
        });
        state.by_time.insert(key, waker.clone());
        drop(state);
        self.alarms.has_changed.notify_one();
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.alarms.state.lock().by_time.remove(key);
        }
    }
}
