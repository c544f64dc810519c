//! What a mirror has still to do, as bytes from which another goes on, in another process as a rule.
//!
//! # Format, version 1
//!
//! Integers are little-endian, the CRC is CRC-32 as in Ethernet.
//!
//! | | bytes | |
//! |---|---|---|
//! | 0 | 8 | `BJMIRROR` |
//! | 8 | 2 | version, 1 |
//! | 10 | 1 | what was copied at first: 1 full, 2 top, 3 none |
//! | 11 | 1 | phase: 1 scanning, 2 copying, 3 ready |
//! | 12 | 4 | CRC of the other 36 bytes, and of the 64 bytes that follow them |
//! | 16 | 16 | identity of the target |
//! | 32 | 8 | up to where the source was scanned; its length if that is over, or not needed |
//! | 40 | | a [stored bitmap](crate::bitmap::stored) of what is left, with the identity of the source and the generation |
//!
//! The CRC covers the header of the stored bitmap, and that those of its records: so no part is taken for one
//! of another checkpoint. Nothing is believed, and no memory asked for, before it is checked.

use crate::bitmap::HBitmap;
use crate::bitmap::stored::{self, DecodeError, Header, Label};
use crate::mirror::MirrorSync;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::Granularity;

/// What a checkpoint begins with.
const MAGIC: [u8; 8] = *b"BJMIRROR";
/// The only version there is.
const VERSION: u16 = 1;
/// Bytes before the stored bitmap.
const HEADER: usize = 40;

/// What the caller knows the disks of a mirror by, and their state. It must stay the same from one process to
/// the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CheckpointId {
    /// Tells the source from other disks: a UUID, or what else fits. With [sync top](crate::MirrorSync::Top) above a
    /// base of the caller's choice, the base is part of it: above another base it is another source.
    pub source: [u8; 16],
    /// Tells the target from other disks.
    pub target: [u8; 16],
    /// Tells this checkpoint, and the bitmap of what has changed since, from older ones.
    pub generation: u64,
}

/// How far a mirror was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CheckpointPhase {
    /// It was asking what the source holds.
    Scanning,
    /// It had not been ready.
    Copying,
    /// It had been ready.
    Ready,
}

/// What a mirror had still to do when [`Mirror::checkpoint`](crate::Mirror::checkpoint) was asked.
///
/// # Examples
///
/// See [`Mirror::resume`](crate::Mirror::resume).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub(super) id: CheckpointId,
    pub(super) sync: MirrorSync,
    pub(super) phase: CheckpointPhase,
    /// Where the scan goes on; the length if there is nothing to scan.
    pub(super) scanned: u64,
    pub(super) left: HBitmap,
}

/// What [`Mirror::resume`](crate::Mirror::resume) goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// What was to be done.
    pub checkpoint: Checkpoint,
    /// What the caller knows of the disks that it is resumed with.
    pub id: CheckpointId,
    /// What has become of the source since.
    pub changed: ChangedSince,
}

/// What has become of the source since a checkpoint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangedSince {
    /// All that was written to it is dirty in [the bitmap of the options](crate::MirrorOptions::bitmap).
    InBitmap,
    /// Nothing was written to it, and no write was in flight.
    Nothing,
}

/// Why bytes are not a checkpoint, or not one to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// They begin otherwise.
    #[error("this is not a checkpoint of a mirror")]
    NotACheckpoint,
    /// They are of a version that is not known here.
    #[error("checkpoints of version {found} are not known")]
    Version {
        /// The version they say they are.
        found: u16,
    },
    /// They end before the bitmap.
    #[error("the checkpoint is cut off")]
    Truncated,
    /// The header is not what was written.
    #[error("the header of the checkpoint is damaged")]
    Damaged,
    /// The header is undamaged and says what cannot be.
    #[error("the header of the checkpoint says what cannot be")]
    Invalid,
    /// The bitmap of what is left is damaged, or too large.
    #[error("what the checkpoint says is left: {0}")]
    Bitmap(#[from] DecodeError),
}

/// Why a checkpoint is not one that could be gone on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// It is of another source.
    #[error("the checkpoint is of another source")]
    OtherSource,
    /// It is of another target.
    #[error("the checkpoint is of another target")]
    OtherTarget,
    /// It is older or newer than what the caller has.
    #[error("the checkpoint is of generation {found}, not {expected}")]
    OtherGeneration {
        /// What the caller expects.
        expected: u64,
        /// What the checkpoint says.
        found: u64,
    },
    /// The disk had another length.
    #[error("the disk had {found} bytes, and has {expected} now")]
    OtherLength {
        /// Length of the node in bytes.
        expected: u64,
        /// Length in the checkpoint, in bytes.
        found: u64,
    },
    /// Another [sync mode](crate::MirrorOptions::sync) is asked for.
    #[error("the mirror was one with sync mode {found:?}, not {asked:?}")]
    OtherSync {
        /// What is asked for.
        asked: MirrorSync,
        /// What the checkpoint says.
        found: MirrorSync,
    },
    /// What has changed since is said to be in a bitmap, and none is named.
    #[error("a bitmap is needed that tells what has changed since the checkpoint")]
    BitmapNeeded,
}

impl Checkpoint {
    /// Reads a checkpoint, of which what is left may take `memory_max` bytes of memory: a bit for each granule
    /// and 1/31 more, 2.1 MB for 1 TiB at 64 KiB.
    ///
    /// # Errors
    ///
    /// See [`CheckpointError`].
    pub fn decode(bytes: &[u8], memory_max: u64) -> Result<Self, CheckpointError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(CheckpointError::NotACheckpoint);
        }
        let (header, rest) = bytes
            .split_first_chunk::<HEADER>()
            .ok_or(CheckpointError::Truncated)?;
        let found = u16::from_le_bytes([header[8], header[9]]);
        if found != VERSION {
            return Err(CheckpointError::Version { found });
        }
        let bitmap = rest
            .first_chunk::<{ Header::LEN }>()
            .ok_or(CheckpointError::Truncated)?;
        if header[12..16] != crc(header, bitmap).to_le_bytes() {
            return Err(CheckpointError::Damaged);
        }
        let sync = match header[10] {
            1 => MirrorSync::Full,
            2 => MirrorSync::Top,
            3 => MirrorSync::None,
            _ => return Err(CheckpointError::Invalid),
        };
        let phase = match header[11] {
            1 => CheckpointPhase::Scanning,
            2 => CheckpointPhase::Copying,
            3 => CheckpointPhase::Ready,
            _ => return Err(CheckpointError::Invalid),
        };
        let scanned = header[32..].first_chunk().expect("8 bytes are left");
        let scanned = u64::from_le_bytes(*scanned);
        let len = Header::from_bytes(bitmap)?.len();
        let needs_scan = sync == MirrorSync::Top && phase == CheckpointPhase::Scanning;
        if scanned > len || (scanned < len && !needs_scan) {
            return Err(CheckpointError::Invalid);
        }
        let stored = stored::decode(rest, memory_max)?;
        let Label {
            identity: source,
            generation,
        } = stored.header.label();
        let target = header[16..].first_chunk().expect("24 bytes are left");
        Ok(Self {
            id: CheckpointId {
                source,
                target: *target,
                generation,
            },
            sync,
            phase,
            scanned,
            left: stored.bitmap,
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let label = Label {
            identity: self.id.source,
            generation: self.id.generation,
        };
        let stored = stored::encode(&self.left, label);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..10].copy_from_slice(&VERSION.to_le_bytes());
        header[10] = match self.sync {
            MirrorSync::Full => 1,
            MirrorSync::Top => 2,
            MirrorSync::None => 3,
        };
        header[11] = match self.phase {
            CheckpointPhase::Scanning => 1,
            CheckpointPhase::Copying => 2,
            CheckpointPhase::Ready => 3,
        };
        header[16..32].copy_from_slice(&self.id.target);
        header[32..40].copy_from_slice(&self.scanned.to_le_bytes());
        let bitmap = stored.first_chunk().expect("it has a header");
        let crc = crc(&header, bitmap);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        let mut bytes = Vec::with_capacity(HEADER + stored.len());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&stored);
        bytes
    }

    /// The disks and the generation it was taken of.
    #[must_use]
    pub fn id(&self) -> CheckpointId {
        self.id
    }

    /// What the mirror was to copy at first.
    #[must_use]
    pub fn sync(&self) -> MirrorSync {
        self.sync
    }

    /// How far it was.
    #[must_use]
    pub fn phase(&self) -> CheckpointPhase {
        self.phase
    }

    /// Length of the disk in bytes.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "it is that of the disk, as for the bitmap"
    )]
    pub fn len(&self) -> u64 {
        self.left.len()
    }

    /// What dirty data was tracked in.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.left.granularity()
    }

    /// What was not known to be on the target, without what was still to be found by the scan.
    #[must_use]
    pub fn left(&self) -> &HBitmap {
        &self.left
    }
}

impl Resume {
    /// Whether it is of these disks.
    pub(super) fn check(&self, node_len: u64, sync: MirrorSync) -> Result<(), ResumeError> {
        let (expected, found) = (self.id, self.checkpoint.id);
        let is_checked = !is_broken(Sabotage::ResumeAnyDisk);
        if expected.source != found.source && is_checked {
            return Err(ResumeError::OtherSource);
        }
        if expected.target != found.target && is_checked {
            return Err(ResumeError::OtherTarget);
        }
        let is_same = expected.generation == found.generation;
        if !is_same && !is_broken(Sabotage::ResumeAnyGeneration) {
            return Err(ResumeError::OtherGeneration {
                expected: expected.generation,
                found: found.generation,
            });
        }
        if self.checkpoint.len() != node_len {
            return Err(ResumeError::OtherLength {
                expected: node_len,
                found: self.checkpoint.len(),
            });
        }
        if self.checkpoint.sync != sync {
            return Err(ResumeError::OtherSync {
                asked: sync,
                found: self.checkpoint.sync,
            });
        }
        Ok(())
    }
}

/// The CRC of the header without its own, and of that of the bitmap.
fn crc(header: &[u8; HEADER], bitmap: &[u8; Header::LEN]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..12]);
    crc.update(&header[16..]);
    crc.update(bitmap);
    crc.finalize()
}
