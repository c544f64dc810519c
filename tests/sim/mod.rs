//! A deterministic world: virtual time, disks that delay, reorder, tear and fail, and a guest that
//! writes all the while. One seed decides everything.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod chain;
pub(crate) mod content;
pub(crate) mod crew;
pub(crate) mod disk;
pub(crate) mod driving;
pub(crate) mod events;
pub(crate) mod guest;
pub(crate) mod rng;
#[cfg(debug_assertions)]
pub(crate) mod sabotage;
pub(crate) mod seeds;
pub(crate) mod world;
