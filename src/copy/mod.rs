//! What all copying jobs share: the operations they ask for, what is known of the devices, and the
//! machinery that plans what to copy next.
//!
//! This layer sees ranges, ids, outcomes and time, never a byte of data.

mod buffer;
mod claims;
mod doubts;
mod engine;
mod limits;
mod shape;
mod zeroes;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::ByteRange;

pub(crate) use buffer::Buffer;
pub(crate) use engine::{Budget, CopyBy, Done, Engine, Urgent};
pub(crate) use limits::Ends;
pub use limits::{Limits, LimitsError, RangeLimits};
pub(crate) use shape::Shape;
pub use shape::ShapeError;
pub(crate) use zeroes::Zeroes;

/// The devices of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Where is read.
    Source,
    /// Where is written.
    Target,
    /// Where a backup keeps for a while what the guest is about to overwrite, if it has such a place.
    Buffer,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Target => "target",
            Side::Buffer => "buffer",
        })
    }
}

/// Whether a range that is to read as zeroes may lose its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unmap {
    /// The storage may be given back.
    Allowed,
    /// The storage stays, or is made.
    Forbidden,
}

/// What is to be done with data that turns out to be nothing but zeroes.
///
/// # Examples
///
/// A mirror with [`detect_zeroes`](crate::MirrorOptions::detect_zeroes), by hand. The source says that all of it
/// is data, and most of it is zeroes.
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use blockjob::{Content, Extent, IfZero, Limits, Mirror, MirrorOptions, Node, OpKind, Outcome, RangeLimits};
/// use blockjob::{Status, Step};
///
/// let mut source = vec![0u8; 256 << 10];
/// source[70_000] = 1;
/// let mut target = vec![9u8; 256 << 10];
/// let mut limits = Limits::new(256 << 10);
/// limits.write_zeroes = Some(RangeLimits { align: 4096, max: 1 << 30 });
/// let mut options = MirrorOptions::default();
/// options.detect_zeroes = true;
/// options.chunk_max = 64 << 10;
/// let mut mirror = Mirror::new(&Node::new(256 << 10), Limits::new(256 << 10), limits, options)?;
/// mirror.job().start()?;
///
/// let (mut written, mut zeroed) = (0, 0);
/// while let Step::Op(op) = mirror.poll(Duration::ZERO, Waker::noop()) {
///     let outcome = match op.kind() {
///         OpKind::CopyDetecting(range, if_zero) => {
///             let bytes = range.start() as usize..range.end() as usize;
///             let data = &source[bytes.clone()];
///             if data.iter().all(|&byte| byte == 0) {
///                 if let IfZero::Write(_) = if_zero {
///                     target[bytes].fill(0); // without any data on the way
///                     zeroed += range.len();
///                 }
///                 Outcome::Zeroes
///             } else {
///                 target[bytes].copy_from_slice(data);
///                 written += range.len();
///                 Outcome::Done
///             }
///         }
///         OpKind::Status(range) => Outcome::Status(Extent::data(range.len())),
///         OpKind::Flush | OpKind::Settle => Outcome::Done, // the target is memory
///         kind => unreachable!("{kind:?}"),
///     };
///     mirror.op_done(Duration::ZERO, op, outcome);
/// }
/// assert_eq!(mirror.job().query().status, Status::Ready);
/// assert_eq!((written, zeroed), (64 << 10, 192 << 10));
/// assert!(target == source);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IfZero {
    /// Make the target read as zeroes, as [`OpKind::Zero`] does.
    Write(Unmap),
    /// Nothing: the target reads as zeroes there already.
    Leave,
}

/// How a target is compared with the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompareBy {
    /// Both are read: the target by [`read_back`](crate::io::WriteAt::read_back).
    Reading,
    /// The target is given what the source holds, and finds out by itself:
    /// [`compare_at`](crate::io::WriteAt::compare_at). So a target that is far away, and whose host can make
    /// hashes, sends these instead of its data.
    Device,
}

/// What is known of the content of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes to be read.
    Data,
    /// Reads as zeroes.
    Zero,
    /// Was discarded, and its content is undefined: each read may give something else.
    Undefined,
}

/// The answer to "what is at the start of this range, and how far does it go on like that?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the start of the range asked for. What goes past the end of that range is ignored; 0
    /// says that nothing is known, and all of the range is taken for data.
    pub len: u64,
    /// What reading gives there, through all layers of the disk.
    pub content: Content,
    /// Whether the topmost layer holds it; or, if only the chain [above a base](crate::MirrorSync::Top) is copied,
    /// any layer above that. For a disk of one layer: `true`.
    pub in_top: bool,
}

impl Extent {
    /// `len` bytes to be read.
    #[must_use]
    pub fn data(len: u64) -> Self {
        Self {
            len,
            content: Content::Data,
            in_top: true,
        }
    }

    /// As it is, unless it says nothing: then all of the range asked for is data.
    pub(crate) fn or_data(self, range: ByteRange) -> Self {
        if self.len == 0 {
            Self::data(range.len())
        } else {
            self
        }
    }
}

/// A thing to do, handed out by a job and handed back to it.
///
/// It is not `Clone`: each is done once and reported once.
#[derive(Debug)]
#[must_use = "an operation that is not reported back holds up its job"]
pub struct Op {
    id: OpId,
    /// Where it is kept by who has handed it out.
    slot: u32,
    is_urgent: bool,
    kind: OpKind,
}

/// What an [`Op`] wants done. Ranges never go past the end of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read the range from the source and write it to the target.
    Copy(ByteRange),
    /// Read the range from the source. If all bytes are 0, do that and report [`Outcome::Zeroes`]; else write
    /// it to the target. Either is legal for the target: the range is one for zeroes, too.
    CopyDetecting(ByteRange, IfZero),
    /// As [`Copy`](Self::Copy), compressed.
    CopyCompressed(ByteRange),
    /// Have the target copy the range from the source by itself.
    CopyOffloaded(ByteRange),
    /// Make the range of the target read as zeroes.
    Zero(ByteRange, Unmap),
    /// Discard the range of the target.
    Discard(ByteRange),
    /// Read the range from the source and write it to the buffer.
    Save(ByteRange),
    /// Read the range from the buffer and write it to the target.
    CopySaved(ByteRange),
    /// As [`CopySaved`](Self::CopySaved), compressed.
    CopySavedCompressed(ByteRange),
    /// Discard the range of the target: nobody will read it.
    GiveUp(ByteRange),
    /// Tell the source that the range will not be read any more, and may be discarded.
    DiscardSource(ByteRange),
    /// Discard the range of the buffer.
    DiscardSaved(ByteRange),
    /// Read the range from the source, and tell what of it the target does not hold: [`Outcome::Compared`].
    Compare(ByteRange, CompareBy),
    /// Tell what the source has at the start of the range.
    Status(ByteRange),
    /// Make durable what was written to the target.
    Flush,
    /// Wait until no earlier request to the target, also one nobody waits for any more, can change it.
    Settle,
    /// The same of the buffer.
    SettleSaved,
    /// Have the target give up requests that it cannot finish soon, if it can. Waits for nothing.
    CancelInFlight,
}

/// What came of an [`Op`].
#[derive(Debug)]
pub enum Outcome {
    /// All that the operation asks for is done, on the whole range: the device has it. The job believes it: what
    /// is reported so and was not done is missing from the target, and nobody is told.
    Done,
    /// [`OpKind::CopyDetecting`] has read nothing but zeroes, and the target reads so, too.
    Zeroes,
    /// The answer to [`OpKind::Status`].
    Status(Extent),
    /// The answer to [`OpKind::Compare`]: what differs, as finely as it is known. None: all is equal. What lies
    /// outside of the range is ignored.
    Compared(Vec<ByteRange>),
    /// It failed, or was done in part.
    Failed {
        /// The device that failed. For a copy: the one that was read, or the one that was written.
        side: Side,
        /// How.
        error: io::Error,
    },
}

/// Unique in the process, so that an operation handed to the wrong job is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct OpId(u64);

impl Op {
    pub(crate) fn new(kind: OpKind) -> Self {
        Self::in_slot(kind, u32::MAX, false)
    }

    pub(crate) fn in_slot(kind: OpKind, slot: u32, is_urgent: bool) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: OpId(NEXT.fetch_add(1, Ordering::Relaxed)),
            slot,
            is_urgent,
            kind,
        }
    }

    /// Whether a guest waits for it: it is to go before what others are to do.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.is_urgent
    }

    /// What is to be done.
    #[must_use]
    pub fn kind(&self) -> OpKind {
        self.kind
    }

    pub(crate) fn id(&self) -> OpId {
        self.id
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }
}

impl OpKind {
    /// The range that is worked on, if there is one.
    #[must_use]
    pub fn range(self) -> Option<ByteRange> {
        match self {
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::CopyOffloaded(range)
            | OpKind::Zero(range, _)
            | OpKind::Discard(range)
            | OpKind::Save(range)
            | OpKind::CopySaved(range)
            | OpKind::CopySavedCompressed(range)
            | OpKind::DiscardSaved(range)
            | OpKind::GiveUp(range)
            | OpKind::DiscardSource(range)
            | OpKind::Compare(range, _)
            | OpKind::Status(range) => Some(range),
            OpKind::Flush | OpKind::Settle | OpKind::SettleSaved | OpKind::CancelInFlight => None,
        }
    }

    /// Whether it waits until a device has settled.
    pub(crate) fn settles(self) -> bool {
        matches!(self, OpKind::Settle | OpKind::SettleSaved)
    }

    /// What it reads, and what it writes or asks.
    pub(crate) fn sides(self) -> [Side; 2] {
        match self {
            OpKind::Copy(_)
            | OpKind::CopyDetecting(..)
            | OpKind::CopyCompressed(_)
            | OpKind::Compare(..) => [Side::Source, Side::Target],
            OpKind::Save(_) => [Side::Source, Side::Buffer],
            OpKind::CopySaved(_) | OpKind::CopySavedCompressed(_) => [Side::Buffer, Side::Target],
            OpKind::DiscardSaved(_) | OpKind::SettleSaved => [Side::Buffer; 2],
            OpKind::Status(_) | OpKind::DiscardSource(_) => [Side::Source; 2],
            OpKind::CopyOffloaded(_)
            | OpKind::Zero(..)
            | OpKind::Discard(_)
            | OpKind::GiveUp(_)
            | OpKind::Flush
            | OpKind::Settle
            | OpKind::CancelInFlight => [Side::Target; 2],
        }
    }

    /// Whether it may change the target.
    #[must_use]
    pub fn writes_target(self) -> bool {
        matches!(
            self,
            OpKind::Copy(_)
                | OpKind::CopyDetecting(..)
                | OpKind::CopyCompressed(_)
                | OpKind::CopyOffloaded(_)
                | OpKind::Zero(..)
                | OpKind::Discard(_)
                | OpKind::CopySaved(_)
                | OpKind::CopySavedCompressed(_)
        )
    }

    /// Bytes that it brings to the target, in a buffer or without.
    pub(crate) fn moving_bytes(self) -> u64 {
        match self {
            OpKind::CopyOffloaded(range) => range.len(),
            _ => self.buffered_bytes(),
        }
    }

    /// Bytes that are held in a buffer while it runs.
    pub(crate) fn buffered_bytes(self) -> u64 {
        match self {
            OpKind::Copy(range)
            | OpKind::CopyDetecting(range, _)
            | OpKind::CopyCompressed(range)
            | OpKind::CopySaved(range)
            | OpKind::CopySavedCompressed(range) => range.len(),
            OpKind::Compare(range, CompareBy::Reading) => range.len().saturating_mul(2),
            OpKind::Compare(range, CompareBy::Device) => range.len(),
            // What guests wait for has buffers of its own.
            _ => 0,
        }
    }
}
