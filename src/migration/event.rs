//! What both ends tell: how far each bitmap is, and what has happened to it.

use super::error::{IncomingError, OutgoingError};
use super::mapping::BitmapId;
use crate::units::Granularity;

/// Something that happened on the source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutgoingEvent {
    /// All bitmaps are announced.
    SetUp,
    /// The guest stands still.
    Stopped,
    /// The guest runs at the other end.
    GuestStarted,
    /// All of a bitmap was sent.
    Complete(BitmapId),
    /// Everything was sent.
    Sent,
    /// The connection of a native stream was taken up again, and so many chunks are to be sent again.
    Resumed {
        /// Chunks whose arrival was not confirmed.
        chunks: u64,
    },
    /// The other end has the bitmaps.
    HandedOver,
    /// It ended before.
    Failed(OutgoingError),
}

/// Something that happened on the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IncomingEvent {
    /// A bitmap is on its way.
    Started(BitmapId),
    /// All of a bitmap is here.
    Complete(BitmapId),
    /// A bitmap is gone, as not all of it came, or not before the stream failed.
    Dropped(BitmapId),
    /// The guest runs here.
    GuestStarted,
    /// Nothing more will come, for a reason other than that all came.
    Ended(IncomingError),
}

/// How far a bitmap is on the source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutgoingBitmap {
    /// Which.
    pub id: BitmapId,
    /// Serialized bytes of it.
    pub bytes: u64,
    /// Serialized bytes of chunks that were sent, with those that were sent again.
    pub bytes_sent: u64,
    /// Serialized bytes of chunks that are to be sent, as of now.
    pub bytes_left: u64,
    /// Whether it was said to be complete.
    pub is_complete: bool,
}

/// How far a bitmap is on the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IncomingBitmap {
    /// Which.
    pub id: BitmapId,
    /// How many bytes a bit stands for.
    pub granularity: Granularity,
    /// Whether it records from the start of the guest on.
    pub is_enabled: bool,
    /// Whether it is to be saved with the image.
    pub is_persistent: bool,
    /// Serialized bytes of it.
    pub bytes: u64,
    /// Serialized bytes that came, with those that came again.
    pub bytes_received: u64,
    /// How far it is.
    pub state: ArrivalState,
}

/// How far a bitmap is on the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArrivalState {
    /// Bits are missing. It is in use.
    Loading,
    /// All came, and the guest does not run yet.
    Whole,
    /// It is the node's.
    Active,
    /// It is gone.
    Dropped,
}
