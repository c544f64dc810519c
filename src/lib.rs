//! Front door.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod bitmap;
mod copy;
pub mod driver;
pub mod io;
mod job;
mod log;
mod mirror;
mod node;
pub mod queue;
#[doc(hidden)]
pub mod sabotage;
mod sync;
mod units;

pub use crate::bitmap::HBitmap;
pub use crate::copy::{
    Content, Extent, Limits, LimitsError, Op, OpKind, Outcome, RangeLimits, ShapeError, Side, Unmap,
};
pub use crate::job::{
    Cancel, Change, ErrorAction, ErrorEvent, Event, Hold, IoStatus, Job, JobError, JobInfo,
    JobOptions, JobOptionsError, OnError, Progress, Status, Verb, VerbError,
};
#[cfg(loom)]
#[doc(hidden)]
pub use crate::log::Rule;
pub use crate::log::{DirtyLog, DirtyLogError, DirtyWord};
pub use crate::mirror::{Mirror, MirrorError, MirrorOptions, MirrorSync, Step, Switch};
#[cfg(loom)]
#[doc(hidden)]
pub use crate::node::GateRule;
pub use crate::node::{
    Begin, BeginFuture, GuestQueue, JobBitmap, JobBitmapGuard, Lane, Node, OwnedTicket,
    PendingWrite, Quiesce, QuiesceGuard, Ticket, TrackError, Way,
};
pub use crate::units::{ByteRange, Granularity};
