//! What threads meet through: the standard library's types, or loom's doubles of them.
//!
//! Only code that takes its atomics, fences and locks from here is seen by the loom tests; what is
//! taken from `std` directly never changes thread there.

#[cfg(not(loom))]
mod real {
    pub(crate) use parking_lot::{Mutex, MutexGuard};
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic;
}

#[cfg(loom)]
mod real {
    pub(crate) use loom::sync::MutexGuard;
    pub(crate) use loom::sync::atomic;
    pub(crate) use loom::sync::{Arc, MutexGuard};

    /// Loom's mutex in the shape of `parking_lot`'s: no poison.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    #[allow(dead_code, reason = "the double is there for whoever needs a lock")]
    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("a panic ends the model")
        }
    }
}

#[allow(unused_imports, reason = "one list for all who share something")]
pub(crate) use real::{Arc, Mutex, MutexGuard, atomic};
