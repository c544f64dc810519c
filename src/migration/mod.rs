//! Dirty bitmaps that follow a machine to another host.
//!
//! A machine is migrated, its disks are copied or shared, and the next backup is to be incremental as if
//! nothing had happened. So what the bitmaps know has to come along, without a lost bit, whatever is written
//! on either side meanwhile. One end is an [`OutgoingMigration`], the other an [`IncomingMigration`]; both are
//! made by a [`BitmapMigration`], which knows the nodes and their names. Neither reads or writes anything: they
//! take and give bytes. [`driver`] has the loop over streams of the caller's.
//!
//! # The story of a stream
//!
//! ```text
//!  source                                                            destination
//!  guest runs    │ START node, bitmap, granularity, flags          ─▶│ the name is in use, nothing is seen of it
//!                │ BITS … (live and hybrid: all, then what changed) ─▶│ loaded beside the node
//!  guest stops ══╪═══════════════════════════════════════════════════╪═
//!                │ BITS … (pre-copy and live: all, or what changed)  ─▶│
//!                │ COMPLETE                                         ─▶│ whole
//!  ══════════════╪═══════════════════════════════════════════════════╪═ guest starts: it is the node's, and records
//!                │ BITS … (post-copy and hybrid)                    ─▶│ loaded beside it, while the guest's
//!                │ COMPLETE                                         ─▶│ writes are recorded; then both are one
//! ```
//!
//! | mode | while the guest runs there | while it stands still | after it has started here |
//! |---|---|---|---|
//! | [`PreCopy`](Mode::PreCopy) | nothing | all bits | |
//! | [`Live`](Mode::Live) | all, then what has changed | what changed last | |
//! | [`PostCopy`](Mode::PostCopy) | nothing | nothing | all bits |
//! | [`Hybrid`](Mode::Hybrid) | all, then what has changed | nothing | what changed last |
//!
//! Below 1 MiB of bits in all nothing is sent live: it is not worth the trouble.
//!
//! # State machines
//!
//! ```text
//! source         setup ─▶ live ─ stop ─▶ stopped ─ guest_started ─▶ (post-copy) ─▶ sent ─ finish ─▶ handed over
//!                  │        └ what changed is sent again │                           │
//!                  └─────────────────┴───────────────────┴── error, cancel, drop ────┴▶ this host's again; if the
//!                                                                                      guest runs there: stale
//! destination    loading ─▶ whole ─ guest starts ─▶ active          any but active ─ error, cancel, drop ─▶ gone
//! ```
//!
//! # Invariants
//!
//! 1. No dirty bit is lost: in the end a bitmap that records has what it had when the guest stopped, and what
//!    was written since it started; one that does not has the former (BM-1).
//! 2. A bitmap on the destination is in use, and nothing is seen of it, until it has all its bits. If they do
//!    not come it is gone (BM-2).
//! 3. A migration that fails or is cancelled before the guest runs elsewhere leaves the source as if it had not
//!    been: bitmaps recorded all the time, and are free, and stored as before (BM-3). From then on they are
//!    stale, and left out of exports until they are [taken back](crate::Bitmaps::take_back).
//! 4. All bitmaps are looked at before the first is taken. If one cannot be sent, none is.
//! 5. Whether a chunk has changed is cleared before it is read, under one lock. So what is written meanwhile is
//!    sent again.
//! 6. Once the guest is said to stand still, a write is an error: it may be in nothing that was sent.
//! 7. What comes in is looked at before it changes anything, or takes memory. What a stream can say wrong is an
//!    error, never a panic, and changes no bitmap that did not come with it.
//! 8. Native stream: a chunk counts as sent when its arrival was confirmed. If the connection breaks, those
//!    that were not are sent again, as they are then.
//!
//! # Two streams
//!
//! [QEMU's](StreamKind::Qemu) section `dirty-bitmap`, byte for byte as QEMU 10.0.2 writes it and as much of what
//! it reads as has one meaning. It knows neither the length of the disk nor a checksum, and nothing comes back.
//! [Native](StreamKind::Native), between two ends of this crate: each frame is numbered and has a CRC-32, disks
//! are compared by length, identity and generation, contents by a digest, and a stream that broke is taken up
//! where it was.

//!
//! # Limits
//!
//! - QEMU 10.0.2 as a destination aborts when after the start of its guest a record names a node. So it takes
//!   [`PostCopy`](Mode::PostCopy) and [`Hybrid`](Mode::Hybrid) of the bitmaps of one node only; those of several
//!   have to go to it by the other modes. A destination of this crate takes them.
//! - A [whole](Framing::Whole) stream that is made here has no state of devices. Who has some puts
//!   [sections](Framing::Sections) into a stream of his own.
//! - A write while the guest stands still is noticed on a node with a bitmap that records. On others it changes
//!   no bitmap.

pub mod driver;
mod error;
mod event;
mod incoming;
mod loader;
mod mapping;
mod outgoing;
mod setup;
mod wire;

use crate::node::Node;

pub use error::{
    Fault, GuestStartError, IncomingError, OutgoingError, SetupError, StreamError, Unusable,
};
pub use event::{ArrivalState, IncomingBitmap, IncomingEvent, OutgoingBitmap, OutgoingEvent};
pub use incoming::{IncomingMigration, IncomingOptions};
pub use mapping::{BitmapAlias, BitmapId, BitmapMapping, MappingError, NodeAlias};
pub use outgoing::{Mode, Next, OutgoingMigration, OutgoingOptions};
pub use wire::qemu::{Record, RecordBody, RecordError};
pub use wire::reader::RecordReader;
pub use wire::sections::{BodyPart, ForeignSection, ForeignSections, Framing, SkipRam};

/// Which stream is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamKind {
    /// QEMU's `dirty-bitmap` section.
    Qemu(Framing),
    /// That of this crate.
    Native {
        /// Tells this migration from others; the same at both ends. A random number will do.
        session: [u8; 16],
    },
}

/// A disk that takes part in a migration.
///
/// # Examples
///
/// ```
/// use blockjob::Node;
/// use blockjob::migration::MigratingNode;
///
/// let mut disk = MigratingNode::new("disk0", &Node::new(1 << 30));
/// disk.device = Some("virtio0".into());
/// assert_eq!(disk.node.len(), 1 << 30);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MigratingNode {
    /// Its name on this host. One that begins with `#` was generated and means nothing elsewhere; an empty one
    /// is none.
    pub name: String,
    /// The name of the device that it is attached to, if it has one: without a mapping that is what it is
    /// called in the stream. Default none.
    pub device: Option<String>,
    /// Tells this disk from others, the same at both ends: a UUID, or what else fits. Compared by the native
    /// stream if both ends have one. Default none.
    pub identity: Option<[u8; 16]>,
    /// Tells an old copy of it from a new one. Compared by the native stream if both ends have one. Default
    /// none.
    pub generation: Option<u64>,
    /// The disk.
    pub node: Node,
}

impl MigratingNode {
    /// The device that it is attached to. An empty name is none.
    fn device(&self) -> Option<&str> {
        self.device.as_deref().filter(|device| !device.is_empty())
    }

    /// A disk by its name.
    #[must_use]
    pub fn new(name: impl Into<String>, node: &Node) -> Self {
        Self {
            name: name.into(),
            device: None,
            identity: None,
            generation: None,
            node: node.clone(),
        }
    }
}

/// The disks of one host whose bitmaps are to go, or to come, and their names in the stream.
///
/// Nothing of it changes by a migration: it can be used for the next.
///
/// # Examples
///
/// See [`IncomingMigration`].
#[derive(Clone, Debug, Default)]
pub struct BitmapMigration {
    nodes: Vec<MigratingNode>,
    mapping: Option<BitmapMapping>,
}

impl BitmapMigration {
    /// Without any disk, and without a mapping.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more disk. Of two entries for one disk the first is sent. Two disks of one name cannot both be
    /// [sent](SetupError::NodeTwice); what comes for that name comes to the first.
    #[must_use]
    pub fn with(mut self, node: MigratingNode) -> Self {
        self.nodes.push(node);
        self
    }

    /// With one more disk that has no more than a name.
    #[must_use]
    pub fn with_node(self, name: impl Into<String>, node: &Node) -> Self {
        self.with(MigratingNode::new(name, node))
    }

    /// With a mapping. From then on only what is in it migrates.
    #[must_use]
    pub fn with_mapping(mut self, mapping: BitmapMapping) -> Self {
        self.set_mapping(Some(mapping));
        self
    }

    /// Takes another mapping, or none, for migrations that begin from now on.
    pub fn set_mapping(&mut self, mapping: Option<BitmapMapping>) {
        self.mapping = mapping;
    }
}
