//! Telling the one who waits that there is something to drain, at the price of one load while nobody does.

use std::task::Waker;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering, fence};

/// Who waits for the next mark, if anybody.
pub(super) struct WakeUp {
    /// 1 while there is a waker. What marks look at.
    is_armed: AtomicU64,
    waker: Mutex<Option<Waker>>,
}

impl WakeUp {
    pub(super) fn new() -> Self {
        Self {
            is_armed: AtomicU64::new(0),
            waker: Mutex::new(None),
        }
    }

    /// Has `waker` called at the next mark, in place of the one before. Whoever arms looks for marks
    /// afterwards: those that came before are told to nobody.
    pub(super) fn arm(&self, waker: &Waker) {
        // Wakers are cloned and dropped outside of the lock: that is code of theirs.
        let waker = waker.clone();
        let mut slot = self.waker.lock();
        let before = slot.replace(waker);
        self.is_armed.store(1, Ordering::Relaxed);
        drop(slot);
        drop(before);
        fence(Ordering::SeqCst);
    }

    /// Forgets the waker.
    pub(super) fn disarm(&self) {
        let mut slot = self.waker.lock();
        let waker = slot.take();
        self.is_armed.store(0, Ordering::Relaxed);
        drop(slot);
        drop(waker);
    }

    /// A bit was set, and all above it.
    #[inline]
    pub(super) fn marked(&self) {
        // What set the bit is sequentially consistent, which is all that is needed. Loom knows that of
        // fences only.
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        if self.is_armed.load(Ordering::SeqCst) != 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        let mut slot = self.waker.lock();
        let waker = slot.take();
        self.is_armed.store(0, Ordering::Relaxed);
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
