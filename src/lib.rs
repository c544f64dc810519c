//! Front door.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod bitmap;
mod log;
mod sync;
mod units;

pub use crate::bitmap::HBitmap;
#[cfg(loom)]
#[doc(hidden)]
pub use crate::log::Rule;
pub use crate::log::{DirtyLog, DirtyLogError, DirtyWord};
pub use crate::units::{ByteRange, Granularity};
