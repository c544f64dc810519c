//! What a small VMM would bring along: a disk image file as a device, a clock, an executor.
//!
//! Examples, tests and benches include this with `#[path]`; each uses the part it needs.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the caller's side, which has threads and a clock; and not all of it is used by all"
)]

pub(crate) mod clock;
pub(crate) mod file;
pub(crate) mod guest;
pub(crate) mod temp;
