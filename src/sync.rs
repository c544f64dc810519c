//! What threads meet through: the types of `std` and `parking_lot`, or loom's doubles of them.
//!
//! Loom explores the interleavings only of what is taken from here. What is taken from `std` directly
//! never lets another thread go first.

#[allow(unused_imports, reason = "one list for all who share something")]
pub(crate) use real::{Arc, Mutex, MutexGuard, atomic};

#[cfg(not(loom))]
mod real {
    pub(crate) use parking_lot::{Mutex, MutexGuard};
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic;
}

#[cfg(loom)]
#[allow(
    dead_code,
    reason = "doubles have what is needed somewhere, not only what is needed now"
)]
mod real {
    pub(crate) use loom::sync::{Arc, MutexGuard};
    use std::sync::PoisonError;

    /// Loom's mutex in the shape of `parking_lot`'s, which has no poison.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            // A panic ends the model, and must not meet a second one in a destructor.
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    pub(crate) mod atomic {
        use loom::sync::atomic::AtomicU64 as Word;
        pub(crate) use loom::sync::atomic::{Ordering, fence};

        /// Loom's atomic, with all its accesses made visible to loom's search.
        ///
        /// To find what to try in another order, loom (0.7) remembers one access of each atomic, the
        /// last. So the load of a thread hides an earlier load of another one from the
        /// read-modify-write that follows: of "load, and set the bit if it is clear", which is what
        /// a dirty log is made of, most orders are never tried. Before every access, hence, a second
        /// atomic is stored to. Stores are compared with all others, and as nobody loads it, it
        /// orders no memory.
        #[derive(Debug)]
        pub(crate) struct AtomicU64 {
            word: Word,
            accessed: Word,
        }

        impl AtomicU64 {
            pub(crate) fn new(value: u64) -> Self {
                Self {
                    word: Word::new(value),
                    accessed: Word::new(0),
                }
            }

            pub(crate) fn load(&self, order: Ordering) -> u64 {
                self.access().load(order)
            }

            pub(crate) fn store(&self, value: u64, order: Ordering) {
                self.access().store(value, order);
            }

            pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
                self.access().swap(value, order)
            }

            pub(crate) fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
                self.access().fetch_or(value, order)
            }

            pub(crate) fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
                self.access().fetch_and(value, order)
            }

            pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
                self.access().fetch_add(value, order)
            }

            pub(crate) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
                self.access().fetch_sub(value, order)
            }

            fn access(&self) -> &Word {
                self.accessed.store(0, Ordering::Relaxed);
                &self.word
            }
        }
    }
}
