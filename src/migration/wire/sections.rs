//! What stands around the bodies of sections in a whole stream, and the bodies of others.

use super::super::error::Fault;

pub(super) const MAGIC: [u8; 4] = *b"QEVM";
pub(super) const VERSION: u32 = 3;
pub(super) const CONFIGURATION: u8 = 0x07;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
pub(super) const SECTION_FULL: u8 = 0x04;
pub(super) const COMMAND: u8 = 0x08;
/// Bits may come after the guest has started.
pub(super) const ADVISE: u16 = 3;
/// They are listened for.
pub(super) const LISTEN: u16 = 4;
/// The guest runs.
pub(super) const RUN: u16 = 5;
pub(super) const PACKAGED: u16 = 7;
pub(super) const FOOTER: u8 = 0x7e;
pub(super) const END_OF_FILE: u8 = 0x00;
pub(super) const DESCRIPTION: u8 = 0x06;

/// Name of the section with dirty bitmaps.
pub(super) const NAME: &str = "dirty-bitmap";
/// Its only version.
pub(super) const SECTION_VERSION: u32 = 1;

/// What is around the records of QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Framing {
    /// Nothing: the bodies of the parts one after the other, each with its end mark. For who has a stream of
    /// his own around them.
    Bare,
    /// Sections with headers and footers, of the `dirty-bitmap` section and others, but not what stands before
    /// and after them.
    Sections,
    /// A whole file or stream, from the header on. One that is made brings bitmaps and no guest: the destination's
    /// devices stay as they are. Where bits come after the guest has moved, it says when that is, as QEMU's
    /// post-copy does: advise at the start, and a package that has the destination run.
    Whole,
}

/// A section of a stream that is not about bitmaps, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignSection<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Which of several of that name.
    pub instance: u32,
    /// The version of its content.
    pub version: u32,
    /// Whether it is whole in one part: the state of a device.
    pub is_full: bool,
}

/// What was found in the body of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BodyPart {
    /// As many bytes, at least one, belong to it, and it goes on.
    More(usize),
    /// As many bytes belong to it, and it ends there.
    End(usize),
    /// As many bytes, more than there are and 65536 at most, are needed to go on. They count as read, also those
    /// that turn out to be past the end of the part; so who shares the stream asks for none of those.
    Needs(usize),
    /// Nobody can tell where it ends. That ends the stream with
    /// [`ForeignSection`](Fault::ForeignSection), unless its bitmaps have come by then.
    Opaque,
}

/// Finds the end of what is not about bitmaps: bodies of sections have no length.
pub trait ForeignSections {
    /// Looks at the next bytes of a part's body, of which there may be more than are its own. It is called
    /// again with those that it did not take.
    ///
    /// # Errors
    ///
    /// A text that says what is wrong with them. The stream cannot be read on.
    fn body(&mut self, section: &ForeignSection<'_>, bytes: &[u8]) -> Result<BodyPart, String>;
}

/// Steps over the memory of a machine: the section `ram` as QEMU 10.0.2 writes it with neither compression,
/// deltas, huge pages nor `mapped-ram`. All others are opaque.
///
/// # Examples
///
/// ```
/// use blockjob::migration::{Framing, IncomingOptions, SkipRam, StreamKind};
///
/// let mut options = IncomingOptions::default();
/// options.stream = StreamKind::Qemu(Framing::Whole);
/// options.foreign = Some(Box::new(SkipRam::new(4096)));
/// ```
#[derive(Clone, Debug)]
pub struct SkipRam {
    /// Bytes of a page.
    page: u64,
    /// What is left to list of the blocks of memory.
    blocks: Option<u64>,
}

impl SkipRam {
    /// For machines with pages of so many bytes: 4096 on x86. Rounded **up** to a power of two, 4096 at least and
    /// 32768 at most.
    #[must_use]
    pub fn new(page: u64) -> Self {
        Self {
            page: page.clamp(4096, 1 << 15).next_power_of_two(),
            blocks: None,
        }
    }

    fn record(&mut self, bytes: &[u8]) -> Result<BodyPart, String> {
        const ZERO: u64 = 0x02;
        const SIZES: u64 = 0x04;
        const PAGE: u64 = 0x08;
        const END: u64 = 0x10;
        const SAME_BLOCK: u64 = 0x20;
        let Some(word) = be64(bytes, 0) else {
            return Ok(BodyPart::Needs(8));
        };
        let (flags, address) = (word & (self.page - 1), word & !(self.page - 1));
        match flags & !SAME_BLOCK {
            END => Ok(BodyPart::End(8)),
            SIZES => {
                self.blocks = (address > 0).then_some(address);
                Ok(BodyPart::More(8))
            }
            ZERO | PAGE => {
                let name = match (flags & SAME_BLOCK, bytes.get(8)) {
                    (0, None) => return Ok(BodyPart::Needs(9)),
                    (0, Some(&len)) => 1 + usize::from(len),
                    _ => 0,
                };
                let data = if flags & ZERO != 0 {
                    1
                } else {
                    self.page as usize
                };
                Ok(whole(8 + name + data, bytes))
            }
            _ => Err(format!(
                "memory records with flags {flags:#x} are not known"
            )),
        }
    }

    /// One entry of the list of blocks.
    fn block(&mut self, left: u64, bytes: &[u8]) -> Result<BodyPart, String> {
        let Some(&name) = bytes.first() else {
            return Ok(BodyPart::Needs(1));
        };
        let at = 1 + usize::from(name);
        let Some(len) = be64(bytes, at) else {
            return Ok(BodyPart::Needs(at + 8));
        };
        let Some(left) = left.checked_sub(len) else {
            return Err("the blocks of memory are larger than all memory".into());
        };
        self.blocks = (left > 0).then_some(left);
        Ok(BodyPart::More(at + 8))
    }
}

impl ForeignSections for SkipRam {
    fn body(&mut self, section: &ForeignSection<'_>, bytes: &[u8]) -> Result<BodyPart, String> {
        if section.name != b"ram" {
            return Ok(BodyPart::Opaque);
        }
        match self.blocks {
            Some(left) => self.block(left, bytes),
            None => self.record(bytes),
        }
    }
}

fn whole(len: usize, bytes: &[u8]) -> BodyPart {
    if bytes.len() < len {
        BodyPart::Needs(len)
    } else {
        BodyPart::More(len)
    }
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_be_bytes(bytes.try_into().expect("8 bytes")))
}

/// What comes next outside of bodies.
pub(super) enum Item {
    /// As many bytes belong to it that are not looked at.
    Skip(u64),
    /// As many names follow that are not looked at.
    Names(u32),
    Part {
        kind: u8,
        id: u32,
        /// If it is the first.
        named: Option<(Vec<u8>, u32, u32)>,
    },
    EndOfFile,
}

/// Too few bytes, or what is wrong at which of them.
pub(super) enum Stop {
    Needs(usize),
    Wrong(usize, Fault),
}

/// Reads what is outside of bodies, from the first byte of an item on.
pub(super) struct Cut<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl Cut<'_> {
    pub(super) fn take(&mut self, len: usize) -> Result<&[u8], Stop> {
        let from = self.at;
        let taken = self.bytes.get(from..from + len);
        self.at += len;
        taken.ok_or(Stop::Needs(from + len))
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn be16(&mut self) -> Result<u16, Stop> {
        let bytes = self.take(2)?.try_into().expect("2 bytes");
        Ok(u16::from_be_bytes(bytes))
    }

    pub(super) fn be32(&mut self) -> Result<u32, Stop> {
        let bytes = self.take(4)?.try_into().expect("4 bytes");
        Ok(u32::from_be_bytes(bytes))
    }

    pub(super) fn name(&mut self) -> Result<Vec<u8>, Stop> {
        let len = usize::from(self.u8()?);
        Ok(self.take(len)?.to_vec())
    }

    /// The header of a file.
    pub(super) fn header(&mut self) -> Result<(), Stop> {
        if self.take(4)? != MAGIC {
            return Err(Stop::Wrong(0, Fault::NoStream));
        }
        match self.be32()? {
            VERSION => Ok(()),
            version => Err(Stop::Wrong(4, Fault::StreamVersion { version })),
        }
    }

    /// What stands between bodies.
    pub(super) fn item(&mut self, is_first: bool) -> Result<Item, Stop> {
        match self.u8()? {
            CONFIGURATION if is_first => {
                let len = self.be32()?;
                Ok(Item::Skip(len.into()))
            }
            SUBSECTION => self.subsection(),
            kind @ (SECTION_START | SECTION_FULL) => {
                let id = self.be32()?;
                let named = Some((self.name()?, self.be32()?, self.be32()?));
                Ok(Item::Part { kind, id, named })
            }
            kind @ (SECTION_PART | SECTION_END) => {
                let (id, named) = (self.be32()?, None);
                Ok(Item::Part { kind, id, named })
            }
            COMMAND => {
                let (command, len) = (self.be16()?, self.be16()?);
                if command != PACKAGED {
                    return Ok(Item::Skip(len.into()));
                }
                if len != 4 {
                    return Err(Stop::Wrong(3, Fault::Package));
                }
                // What is in the package is about devices.
                Ok(Item::Skip(self.be32()?.into()))
            }
            END_OF_FILE => Ok(Item::EndOfFile),
            byte => Err(Stop::Wrong(0, Fault::SectionType { byte })),
        }
    }

    /// What may follow the name of the machine.
    fn subsection(&mut self) -> Result<Item, Stop> {
        let name = self.name()?;
        self.be32()?;
        match &name[..] {
            b"configuration/target-page-bits" => Ok(Item::Skip(4)),
            b"configuration/uuid" => Ok(Item::Skip(16)),
            b"configuration/capabilities" => Ok(Item::Names(self.be32()?)),
            _ => Err(Stop::Wrong(1, Fault::Subsection)),
        }
    }

    /// What ends a part.
    pub(super) fn footer(&mut self, id: u32) -> Result<(), Stop> {
        if self.u8()? != FOOTER || self.be32()? != id {
            return Err(Stop::Wrong(0, Fault::Footer));
        }
        Ok(())
    }
}
