//! Front door.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod bitmap;
mod units;

pub use crate::bitmap::HBitmap;
pub use crate::units::{ByteRange, Granularity};
