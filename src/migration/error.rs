//! What can be wrong with a stream, and with what is asked of a migration.

use super::mapping::BitmapId;
use super::wire::qemu::RecordError;
use crate::node::{BitmapError, BusyWith};

/// What is wrong with a stream, and where. Nothing of it can be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {why}")]
#[non_exhaustive]
pub struct StreamError {
    /// Bytes of the stream before what is wrong: the field, or the record if it is wrong as a whole.
    pub at: u64,
    /// What it is.
    pub why: Fault,
}

/// What is wrong with a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// It ends amid a record, or before its end.
    #[error("the stream ends before its end")]
    Truncated,
    /// It does not begin as such a stream does.
    #[error("this is no migration stream")]
    NoStream,
    /// The stream has another version.
    #[error("a stream of version {version} is not known")]
    StreamVersion {
        /// As it stands there.
        version: u32,
    },
    /// The section has another version.
    #[error("bitmaps in version {version} are not known")]
    SectionVersion {
        /// As it stands there.
        version: u32,
    },
    /// What should be a section, a command or the end is none.
    #[error("{byte:#04x} begins neither a section nor a command")]
    SectionType {
        /// As it stands there.
        byte: u8,
    },
    /// A section begins again.
    #[error("section {id} begins twice")]
    SectionTwice {
        /// Its number.
        id: u32,
    },
    /// A section goes on that has not begun.
    #[error("section {id} has not begun")]
    SectionUnknown {
        /// Its number.
        id: u32,
    },
    /// A part does not end as it should.
    #[error("the part does not end with its footer")]
    Footer,
    /// A part of the configuration that nobody knows.
    #[error("a part of the configuration that is not known")]
    Subsection,
    /// A package whose length is not told in four bytes.
    #[error("a package without its length")]
    Package,
    /// The end of a section that is not about bitmaps cannot be found, and bitmaps may come after it.
    #[error("nobody knows where section {name:?} ends")]
    ForeignSection {
        /// Its name.
        name: String,
    },
    /// Whoever knows a section finds something wrong with it.
    #[error("section {name:?}: {why}")]
    ForeignMalformed {
        /// Its name.
        name: String,
        /// What he says.
        why: String,
    },
    /// There is more of something than any sensible stream has.
    #[error("more sections, or a longer item, than any sensible stream has")]
    TooMuch,
    /// A record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A bitmap begins that is there.
    #[error("bitmap {bitmap} is there already")]
    Exists {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// The granularity is not a power of two between 512 bytes and 2 GiB.
    #[error("granularity {bytes} is not a power of two between 512 B and 2 GiB")]
    Granularity {
        /// As it stands there.
        bytes: u64,
    },
    /// A bitmap is to record that begins after the guest: what was written in between is lost.
    #[error("bitmap {bitmap} begins after the guest has started")]
    StartsLate {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// More bitmaps, or more memory for them, than the receiver allows.
    #[error("the bitmaps take more than is allowed: {what}")]
    Limit {
        /// Which limit.
        what: &'static str,
    },
    /// The bitmap cannot be made.
    #[error("bitmap {bitmap} cannot be made: {error}")]
    Make {
        /// The bitmap.
        bitmap: BitmapId,
        /// Why.
        error: BitmapError,
    },
    /// Bits, or the end, of a bitmap that is there and did not begin in this stream.
    #[error("bitmap {bitmap} did not begin in this stream")]
    NotStarted {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// Bits of a bitmap that is complete.
    #[error("bits of bitmap {bitmap} after it was complete")]
    AfterComplete {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// The place of some bits is past what 64 bits count.
    #[error("sector {sector} is past the end of any disk")]
    SectorTooLarge {
        /// As it stands there.
        sector: u64,
    },
    /// Bits of what is past the end of the disk: the disks are not equally long.
    #[error("bits up to byte {end} of a disk of {len} bytes")]
    PastEnd {
        /// Where they end.
        end: u64,
        /// Bytes of the disk here.
        len: u64,
    },
    /// Bits that begin, or end, amid 64 granules.
    #[error("bits of bytes {start} to {end} do not begin and end at multiples of {align}")]
    Unaligned {
        /// Where they begin.
        start: u64,
        /// Where they end.
        end: u64,
        /// 64 granules.
        align: u64,
    },
    /// A bitmap is said to be complete, and bits are missing: not all was sent, or the disks are not equally
    /// long.
    #[error("bitmap {bitmap} ends, but its bits from byte {from} on did not come")]
    Missing {
        /// The bitmap.
        bitmap: BitmapId,
        /// The first byte of the disk of which the bits are missing.
        from: u64,
    },
    /// Native stream: a frame has another checksum than it should.
    #[error("the checksum of a frame does not match")]
    Checksum,
    /// Native stream: a frame is missing, or came twice.
    #[error("frame {found} where frame {expected} should be")]
    Sequence {
        /// The number that comes next.
        expected: u64,
        /// The one that came.
        found: u64,
    },
    /// Native stream: a frame that nobody knows, or one that should not come here.
    #[error("a frame of kind {kind} should not come here")]
    Frame {
        /// As it stands there.
        kind: u8,
    },
    /// Native stream: a frame is longer, or shorter, than its kind allows.
    #[error("a frame of {len} bytes")]
    FrameLength {
        /// As it stands there.
        len: u32,
    },
    /// Native stream: a field has a value that means nothing.
    #[error("a field of a frame has a value that means nothing")]
    FrameField,
    /// Native stream: it is that of another migration.
    #[error("the stream is that of another migration")]
    Session,
    /// Native stream: the disk there is not the disk here.
    #[error("node {node:?} is not the same disk here")]
    Identity {
        /// Its name here.
        node: String,
    },
    /// Native stream: the disk there is of another generation.
    #[error("node {node:?} has another generation here")]
    Generation {
        /// Its name here.
        node: String,
    },
    /// Native stream: the disk there has another length.
    #[error("node {node:?} has {here} bytes here and {there} bytes there")]
    Length {
        /// Its name here.
        node: String,
        /// Bytes here.
        here: u64,
        /// Bytes there.
        there: u64,
    },
    /// Native stream: the content that came is not the content that was sent.
    #[error("the content of bitmap {bitmap} is not what was sent")]
    Digest {
        /// The bitmap.
        bitmap: BitmapId,
    },
}

/// What makes the bitmaps of a stream useless while the stream itself is sound: it is read on, so that others
/// can go on with it, and all its bitmaps are dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// No node goes by that name, or none is mapped to that alias.
    #[error("there is no node for the name {alias:?}")]
    UnknownNode {
        /// As it stands in the stream; what is not UTF-8 is replaced.
        alias: String,
    },
    /// No bitmap is mapped to that alias, or none of that name began.
    #[error("there is no bitmap for the name {alias:?} of node {node:?}")]
    UnknownBitmap {
        /// The node here.
        node: String,
        /// As it stands in the stream; what is not UTF-8 is replaced.
        alias: String,
    },
    /// No bitmap can have such a name: it has a NUL, or is not UTF-8.
    #[error("{alias:?} is no name for a bitmap")]
    BadName {
        /// As it stands in the stream; what is not UTF-8 is replaced.
        alias: String,
    },
    /// A record about a bitmap, and none was named.
    #[error("a record does not say which bitmap it is about")]
    NoBitmap,
    /// The buffer does not have as many bytes as the part of the disk has bits.
    #[error("a buffer of {found} bytes for {expected} bytes of bits")]
    BufferLength {
        /// Bytes of the bits.
        expected: u64,
        /// Bytes of the buffer.
        found: u64,
    },
}

/// Why bitmaps do not arrive. None is left half-way: those of the stream are gone, but for those that were
/// complete when the guest ran, and all others are untouched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// The stream cannot be trusted.
    #[error("the stream is bad: {0}")]
    Stream(#[from] StreamError),
    /// The stream is sound, and its bitmaps cannot be had here.
    #[error("the bitmaps were dropped: {0}")]
    Dropped(Unusable),
    /// The stream is over, and a bitmap is not complete.
    #[error("the stream ended before bitmap {bitmap} was complete")]
    Incomplete {
        /// The first of those.
        bitmap: BitmapId,
    },
    /// The connection of a native stream broke. It can be
    /// [taken up](crate::IncomingMigration::reconnect) again.
    #[error("the connection broke: {0}")]
    Broken(StreamError),
    /// It was cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// It is over for an error that was told before.
    #[error("the migration has failed before")]
    Over,
}

/// Why the guest cannot start yet. That can be mended, and asked again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestStartError {
    /// A node with bitmaps that are to record is not quiesced.
    #[error("node {node:?} is not quiesced")]
    NotQuiesced {
        /// Its name.
        node: String,
    },
    /// A bitmap cannot record.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

/// Why bitmaps cannot be sent. Nothing has changed: no bitmap is in use, or left out of exports, that was not
/// so before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// A node with bitmaps has no name.
    #[error("bitmap {bitmap:?} is on a node without a name")]
    NodeUnnamed {
        /// One of its bitmaps.
        bitmap: String,
    },
    /// A node with bitmaps has a name that was made up, which the other host does not have.
    #[error("bitmap {bitmap} is on a node with a name that was generated")]
    NodeAutoNamed {
        /// One of its bitmaps.
        bitmap: BitmapId,
    },
    /// The name of a node has more than 255 bytes or a NUL.
    #[error("node {node:?} has a name that cannot be sent")]
    NodeName {
        /// The node.
        node: String,
    },
    /// Two nodes have one name in the stream.
    #[error("two nodes are called {alias:?} in the stream")]
    NodeTwice {
        /// The name.
        alias: String,
    },
    /// The name of a bitmap has more than 255 bytes. By a shorter alias it can be sent.
    #[error("the name of bitmap {bitmap} is longer than 255 bytes")]
    NameTooLong {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// The name of a bitmap has a NUL.
    #[error("the name of bitmap {bitmap} has a NUL")]
    NameNul {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// An operation has a bitmap to itself.
    #[error("bitmap {bitmap} is in use by {with}")]
    Busy {
        /// The bitmap.
        bitmap: BitmapId,
        /// The operation.
        with: BusyWith,
    },
    /// A bitmap cannot be changed.
    #[error("bitmap {bitmap} is read-only")]
    ReadOnly {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// A bitmap knows nothing.
    #[error("bitmap {bitmap} was not closed and knows nothing")]
    Inconsistent {
        /// The bitmap.
        bitmap: BitmapId,
    },
    /// It is gone, or there is no memory.
    #[error("bitmap {bitmap}: {error}")]
    Bitmap {
        /// The bitmap.
        bitmap: BitmapId,
        /// Why.
        error: BitmapError,
    },
}

/// Why sending ended. The bitmaps are this host's again, as if nothing had been sent, unless the guest runs at
/// the other end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutgoingError {
    /// The guest wrote to a disk while it was said to stand still: what was sent is not what is dirty.
    #[error("node {node:?} was written to while the guest was to stand still")]
    GuestWrote {
        /// The disk.
        node: String,
    },
    /// A node is not quiesced that must be.
    #[error("node {node:?} is not quiesced")]
    NotQuiesced {
        /// Its name.
        node: String,
    },
    /// It was asked for too early, or twice. Nothing has changed.
    #[error("{what} is not to be asked for now")]
    OutOfOrder {
        /// What was asked.
        what: &'static str,
    },
    /// What the other end says cannot be understood.
    #[error("the answer of the other end is bad: {0}")]
    Answer(#[from] StreamError),
    /// The other end has lost bitmaps that it had, and this one does not have all of them any more.
    #[error("the other end has lost what it had")]
    PeerForgot,
    /// Bytes were taken from the source and may not have been sent, so no other can follow them. A native
    /// migration can go on over [another connection](crate::OutgoingMigration::reconnect); one in QEMU's stream
    /// has ended.
    #[error("bytes of the stream were lost on their way out")]
    Lost,
    /// It is over for an error that was told before.
    #[error("the migration is over")]
    Over,
}
