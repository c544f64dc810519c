//! Front door.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod units;

pub use crate::units::{ByteRange, Granularity};
