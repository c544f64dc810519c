//! Front door.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod log;
mod sync;
mod units;

#[cfg(loom)]
#[doc(hidden)]
pub use crate::log::Rule;
pub use crate::log::{DirtyLog, DirtyLogError, DirtyWord};
pub use crate::units::{ByteRange, Granularity};
