//! What a source is asked to do, and what it asks for.

use std::time::Duration;

use super::super::StreamKind;
use super::super::wire::sections::Framing;

/// When bits are sent. The table of the [module](crate::migration) says more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// All while the guest stands still.
    #[default]
    PreCopy,
    /// All after it has started at the other end.
    PostCopy,
    /// All while it runs here, and what changed last while it stands still.
    Live,
    /// All while it runs here, and what changed last after it has started at the other end.
    Hybrid,
}

impl Mode {
    pub(super) fn is_live(self) -> bool {
        matches!(self, Mode::Live | Mode::Hybrid)
    }

    /// Whether what is left at the stop waits until the guest runs at the other end.
    pub(super) fn is_deferred(self) -> bool {
        matches!(self, Mode::PostCopy | Mode::Hybrid)
    }
}

/// How a source sends.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OutgoingOptions {
    /// Which stream is made. Default QEMU's, [`Bare`](Framing::Bare).
    pub stream: StreamKind,
    /// When bits are sent. Default [`PreCopy`](Mode::PreCopy).
    pub mode: Mode,
    /// Number of the section in QEMU's stream. Default 2, as in QEMU's own when only bitmaps are sent.
    pub section: u32,
    /// Bytes per second while a guest runs; 0, the default, for no limit. While none does there is no limit.
    pub speed: u64,
    /// Chunks of 1 KiB of bits that a part of QEMU's section has while a guest runs on either side: for so long
    /// other sections of the stream wait. From 1 to 1024, others are taken for the nearest. Default 16.
    pub part_chunks: u32,
    /// Whether bitmaps that are sent after the guest has moved are said to be complete when all have their bits,
    /// as QEMU does it. Default no: each is as soon as it has, and can be used at the other end.
    pub completes_last: bool,
}

impl Default for OutgoingOptions {
    fn default() -> Self {
        Self {
            stream: StreamKind::Qemu(Framing::Bare),
            mode: Mode::PreCopy,
            section: 2,
            speed: 0,
            part_chunks: 16,
            completes_last: false,
        }
    }
}

/// What a source wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// As many bytes are to be sent.
    Bytes(usize),
    /// The rate limit lets nothing more be sent before that time.
    Until(Duration),
    /// Nothing is to be sent as things are: the guest may stand still any time, or start at the other end, or
    /// write and so change a chunk.
    Idle,
    /// Nothing more is sent before the other end has answered.
    Answer,
    /// All was sent, and in a native stream its arrival was confirmed.
    Done,
}
