//! What several tasks wait at: each ring wakes one of them.
//!
//! 1. A ring wakes one that waits, or has the next one that would wait look again.
//! 2. Wakers are called, cloned and dropped outside of the lock.
//! 3. Who is [quiet](Quiet) hears of a ring on its own thread, and nobody else does.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Wake, Waker};

use parking_lot::Mutex;

use crate::sabotage::{Sabotage, is_broken};

/// What the machine calls when it is worth asking it again.
#[derive(Default)]
pub(super) struct Bell {
    seats: Mutex<Seats>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Seats {
    /// Who waits; the one that came last is woken first, for its caches are warm.
    taken: Vec<(u64, Waker)>,
    /// Whether it rang when nobody waited.
    has_rung: bool,
}

impl Bell {
    /// What somebody who waits is known by.
    pub(super) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Tells it from others.
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Waits to be woken; `false` if it has rung since somebody looked.
    pub(super) fn sit_down(&self, id: u64, waker: Waker) -> bool {
        let mut seats = self.seats.lock();
        if std::mem::take(&mut seats.has_rung) && !is_broken(Sabotage::DoNotHearBell) {
            return false;
        }
        seats.taken.push((id, waker));
        true
    }

    /// Waits no more.
    pub(super) fn get_up(&self, id: u64) {
        let mut seats = self.seats.lock();
        let seat = seats.taken.iter().position(|(taken, _)| *taken == id);
        let seat = seat.map(|seat| seats.taken.remove(seat));
        drop(seats);
        drop(seat);
    }

    /// Wakes one of those who wait. If there is none, the next one that would wait looks again instead.
    pub(super) fn ring(&self) {
        if QUIET.get().0 == self.address() {
            return QUIET.set((self.address(), true));
        }
        let mut seats = self.seats.lock();
        let seat = seats.taken.pop();
        seats.has_rung |= seat.is_none();
        drop(seats);
        if let Some((_, waker)) = seat {
            waker.wake();
        }
    }

    /// Wakes one of those who wait, if there is one.
    pub(super) fn wake_one(&self) {
        let seat = self.seats.lock().taken.pop();
        if let Some((_, waker)) = seat {
            waker.wake();
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

thread_local! {
    /// The bell that is not to be rung on this thread, and whether it would have been.
    static QUIET: Cell<(usize, bool)> = const { Cell::new((0, false)) };
}

/// The bell is not rung on this thread.
pub(super) struct Quiet<'a> {
    before: (usize, bool),
    /// Set if it would have been.
    was_rung: &'a mut bool,
}

impl<'a> Quiet<'a> {
    pub(super) fn of(bell: &Arc<Bell>, was_rung: &'a mut bool) -> Self {
        let before = QUIET.replace((bell.address(), false));
        Self { before, was_rung }
    }
}

/// Also when what happens meanwhile panics.
impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        let (_, was_rung) = QUIET.replace(self.before);
        *self.was_rung |= was_rung;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn sits(bell: &Bell, id: u64) -> (bool, Arc<Count>) {
        let count = Arc::new(Count::default());
        (bell.sit_down(id, Arc::clone(&count).into()), count)
    }

    #[test]
    fn each_ring_wakes_one_or_has_the_next_look_again() {
        let bell = Bell::default();
        let (is_seated, first) = sits(&bell, bell.new_id());
        assert!(is_seated);
        let (is_seated, second) = sits(&bell, bell.new_id());
        assert!(is_seated);
        let woken = || [&first, &second].map(|count| count.0.load(Ordering::Relaxed));
        bell.ring();
        assert_eq!(woken(), [0, 1]);
        bell.get_up(1);
        bell.ring();
        assert_eq!(woken(), [1, 1]);
        // Nobody waits: that somebody is to be woken is not remembered, that it rang is.
        bell.wake_one();
        bell.ring();
        assert!(!sits(&bell, 2).0);
        assert!(sits(&bell, 2).0);
        bell.get_up(2);
        bell.ring();
        assert!(!sits(&bell, 3).0, "it is not for who has got up");
    }

    #[test]
    fn who_is_quiet_hears_it_alone() {
        let (bell, other) = (Arc::new(Bell::default()), Bell::default());
        assert!(sits(&bell, 0).0);
        let mut was_rung = false;
        {
            let _quiet = Quiet::of(&bell, &mut was_rung);
            let mut was_rung = false;
            let inner = Quiet::of(&bell, &mut was_rung);
            drop(inner);
            assert!(!was_rung);
            other.ring();
            bell.ring();
        }
        assert!(was_rung && !sits(&other, 0).0);
        let mut was_rung = false;
        drop(Quiet::of(&bell, &mut was_rung));
        assert!(!was_rung, "it is told once");
    }
}
