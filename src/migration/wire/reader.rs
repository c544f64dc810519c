//! Reading QEMU's stream: bytes of any number go in, records come out.
//!
//! ```text
//!            ┌─────────────── Whole ────────────────┐
//!  header ─▶ between parts ─▶ body ─▶ footer ─▶ between parts ─▶ … ─▶ the end
//!                │              │ a record, the last of which ends it
//!                │              └ of another section: whoever knows it finds its end
//!                └ commands and packages are passed over
//! ```
//!
//! 1. What comes out, and where an error is said to be, does not depend on how the bytes were cut.
//! 2. No more is kept than one record, or what whoever knows another section has asked for: 64 KiB at most.

use std::fmt;

use super::super::error::{Fault, StreamError};
use super::qemu::{self, Parsed, Record};
use super::sections::{
    BodyPart, Cut, ForeignSection, ForeignSections, Framing, Item, NAME, SECTION_END, SECTION_FULL,
    SECTION_VERSION, Stop,
};
use crate::sabotage::{Sabotage, is_broken};

/// Most bytes that a foreign section may want at once, and that an item between bodies has.
const NEEDS_MAX: usize = 64 << 10;
/// Most sections of a stream.
const SECTIONS_MAX: usize = 4096;

/// Reads records out of QEMU's stream, with what is [around](Framing) them. It knows no nodes: to load bitmaps
/// there is [`IncomingMigration`](crate::IncomingMigration).
///
/// # Examples
///
/// ```
/// use blockjob::migration::{Framing, RecordBody, RecordReader, StreamError};
///
/// let stream = b"\x1c\x05disk0\x08backup-0\x00\x01\x00\x00\x01\x01";
/// let mut started = 0;
/// let mut reader = RecordReader::new(Framing::Bare);
/// for byte in stream {
///     reader.feed(&[*byte], &mut |record| {
///         if let RecordBody::Start { granularity, .. } = record.body {
///             assert_eq!((record.bitmap, granularity), (Some(&b"backup-0"[..]), 65536));
///             started += 1;
///         }
///         Ok::<(), StreamError>(())
///     })?;
/// }
/// assert_eq!(started, 1);
/// reader.finish()?;
/// # Ok::<(), StreamError>(())
/// ```
pub struct RecordReader {
    framing: Framing,
    has_footers: bool,
    foreign: Option<Box<dyn ForeignSections + Send>>,
    place: Place,
    sections: Vec<Section>,
    /// What was fed and not read yet: less than what is needed.
    kept: Vec<u8>,
    needed: usize,
    /// Bytes of the stream before the first of `kept`.
    at: u64,
}

/// Where in the stream the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Header,
    Between {
        is_first: bool,
    },
    /// In a part with bitmaps, if there are parts.
    Body {
        part: Option<Part>,
        /// Whether a record of it was read.
        is_begun: bool,
    },
    Foreign(Part),
    Footer(Part),
    Skip(u64),
    /// As many names are passed over.
    Names(u32),
    Done,
}

/// A part of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    section: usize,
    kind: u8,
}

#[derive(Clone, Debug)]
struct Section {
    id: u32,
    name: Vec<u8>,
    instance: u32,
    version: u32,
}

impl Section {
    /// Whether it is the one with dirty bitmaps, of which there is one instance.
    fn is_ours(&self) -> bool {
        self.name == NAME.as_bytes() && self.instance == 0
    }
}

impl RecordReader {
    /// A reader at the first byte of a stream. Sections have footers, and there is nobody who knows any other
    /// section.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        Self {
            framing,
            has_footers: true,
            foreign: None,
            place: match framing {
                Framing::Bare => Place::Body {
                    part: None,
                    is_begun: false,
                },
                Framing::Sections => Place::Between { is_first: false },
                Framing::Whole => Place::Header,
            },
            sections: Vec::new(),
            kept: Vec::new(),
            needed: 0,
            at: 0,
        }
    }

    /// For a stream whose sections have no footers, or have.
    #[must_use]
    pub fn with_footers(mut self, has_footers: bool) -> Self {
        self.has_footers = has_footers;
        self
    }

    /// With somebody who knows other sections.
    #[must_use]
    pub fn with_foreign(mut self, foreign: Option<Box<dyn ForeignSections + Send>>) -> Self {
        self.foreign = foreign;
        self
    }

    /// Reads on, and gives each record to `sink`. Says how many of the bytes were read: all of them, unless
    /// [the stream is over](Self::is_done) before.
    ///
    /// # Errors
    ///
    /// A [`StreamError`], or what `sink` has said. Nothing is to be fed after it.
    pub fn feed<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&Record<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        self.feed_until(bytes, false, sink)
    }

    /// As [`feed`](Self::feed), and stops after the last record of a part. For who has a stream of his own
    /// around the parts.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn feed_part<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&Record<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        self.feed_until(bytes, true, sink)
    }

    /// Whether the last record of a part was read, and none of the next; so also before the first.
    #[must_use]
    pub fn is_between_parts(&self) -> bool {
        let is_inside = matches!(
            self.place,
            Place::Body { is_begun: true, .. }
                | Place::Foreign(_)
                | Place::Footer(_)
                | Place::Skip(_)
                | Place::Names(_)
        );
        self.kept.is_empty() && !is_inside
    }

    /// Whether nothing about bitmaps can follow.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.place == Place::Done
    }

    /// Nothing more of the stream is of interest.
    pub(crate) fn stop(&mut self) {
        self.kept = Vec::new();
        self.place = Place::Done;
    }

    /// Bytes of the stream up to the record, or other item, that is not read to its end.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.at
    }

    /// That nothing more comes.
    ///
    /// # Errors
    ///
    /// [`Truncated`](Fault::Truncated) amid a part, or if a whole stream has not come to its end.
    pub fn finish(&self) -> Result<(), StreamError> {
        let is_whole = match self.framing {
            Framing::Bare | Framing::Sections => self.is_between_parts(),
            Framing::Whole => self.is_done(),
        };
        if is_whole {
            return Ok(());
        }
        Err(StreamError {
            at: self.at + self.kept.len() as u64,
            why: Fault::Truncated,
        })
    }

    fn feed_until<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        stops_after_part: bool,
        sink: &mut impl FnMut(&Record<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut rest = bytes;
        loop {
            if self.is_done() {
                break;
            }
            let (used, is_kept) = if self.kept.is_empty() {
                if rest.is_empty() {
                    break;
                }
                (self.read(rest, sink)?, false)
            } else {
                let missing = self.needed.saturating_sub(self.kept.len());
                let (more, after) = rest.split_at(missing.min(rest.len()));
                self.kept.extend(more);
                rest = after;
                if self.kept.len() < self.needed {
                    break;
                }
                let kept = std::mem::take(&mut self.kept);
                let used = self.read(&kept, sink)?;
                self.kept = kept;
                (used, true)
            };
            match used {
                Read::Used { bytes, ends_part } => {
                    self.at += bytes as u64;
                    if is_kept {
                        self.kept.drain(..bytes);
                        self.needed = 1;
                    } else {
                        rest = &rest[bytes..];
                    }
                    if ends_part && stops_after_part {
                        break;
                    }
                }
                Read::Needs(needed) => {
                    self.needed = needed;
                    if !is_kept {
                        self.kept.extend(rest);
                        rest = &[];
                    }
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Reads one item that `bytes` begin with.
    fn read<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&Record<'_>) -> Result<(), E>,
    ) -> Result<Read, E> {
        let here = if is_broken(Sabotage::ForgetPlace) {
            0
        } else {
            self.at
        };
        let wrong = |at: usize, why| StreamError {
            at: here + at as u64,
            why,
        };
        let read = match self.place {
            Place::Body { part, .. } => match qemu::parse(bytes) {
                Ok(Parsed::Record(record, used)) => {
                    sink(&Record {
                        at: self.at,
                        ..record
                    })?;
                    self.place = match (record.is_last, part) {
                        (true, Some(part)) => self.after_body(part),
                        (true, None) => Place::Body {
                            part,
                            is_begun: false,
                        },
                        (false, _) => Place::Body {
                            part,
                            is_begun: true,
                        },
                    };
                    return Ok(Read::Used {
                        bytes: used,
                        ends_part: record.is_last,
                    });
                }
                Ok(Parsed::Needs(needed)) => return Ok(Read::Needs(needed)),
                Err((at, why)) => return Err(wrong(at, why.into()).into()),
            },
            Place::Skip(left) => {
                let skipped = (left.min(bytes.len() as u64)) as usize;
                self.skip(left - skipped as u64);
                return Ok(Read::used(skipped));
            }
            Place::Foreign(part) => self.foreign(part, bytes),
            Place::Header | Place::Between { .. } | Place::Footer(_) | Place::Names(_) => {
                self.outside(bytes)
            }
            Place::Done => Ok(0),
        };
        match read {
            Ok(used) => Ok(Read::used(used)),
            Err(Stop::Needs(needed)) if needed <= NEEDS_MAX || is_broken(Sabotage::KeepAll) => {
                Ok(Read::Needs(needed))
            }
            Err(Stop::Needs(_)) => Err(wrong(0, Fault::TooMuch).into()),
            Err(Stop::Wrong(at, why)) => Err(wrong(at, why).into()),
        }
    }

    fn outside(&mut self, bytes: &[u8]) -> Result<usize, Stop> {
        let mut cut = Cut { bytes, at: 0 };
        match self.place {
            Place::Header => {
                cut.header()?;
                self.place = Place::Between { is_first: true };
            }
            Place::Footer(part) => {
                cut.footer(self.sections[part.section].id)?;
                self.place = after_part(part, &self.sections);
            }
            Place::Between { is_first } => match cut.item(is_first)? {
                Item::Skip(left) => self.skip(left),
                Item::Names(left) => self.skip_names(left),
                Item::EndOfFile => self.place = Place::Done,
                Item::Part { kind, id, named } => self.begin_part(kind, id, named)?,
            },
            Place::Names(left) => {
                cut.name()?;
                self.skip_names(left - 1);
            }
            Place::Body { .. } | Place::Foreign(_) | Place::Skip(_) | Place::Done => {}
        }
        Ok(cut.at)
    }

    fn skip_names(&mut self, left: u32) {
        self.place = match left {
            0 => Place::Between { is_first: false },
            left => Place::Names(left),
        };
    }

    fn skip(&mut self, left: u64) {
        self.place = match left {
            0 => Place::Between { is_first: false },
            left => Place::Skip(left),
        };
    }

    fn begin_part(
        &mut self,
        kind: u8,
        id: u32,
        named: Option<(Vec<u8>, u32, u32)>,
    ) -> Result<(), Stop> {
        let known = self.sections.iter().position(|section| section.id == id);
        let section = match (named, known) {
            (Some((name, instance, version)), None) => {
                if self.sections.len() >= SECTIONS_MAX {
                    return Err(Stop::Wrong(0, Fault::TooMuch));
                }
                let at = 6 + name.len() + 4;
                if name == NAME.as_bytes() && version != SECTION_VERSION {
                    return Err(Stop::Wrong(at, Fault::SectionVersion { version }));
                }
                self.sections.push(Section {
                    id,
                    name,
                    instance,
                    version,
                });
                self.sections.len() - 1
            }
            (Some(_), Some(_)) => return Err(Stop::Wrong(1, Fault::SectionTwice { id })),
            (None, Some(known)) => known,
            (None, None) => return Err(Stop::Wrong(1, Fault::SectionUnknown { id })),
        };
        let part = Part { section, kind };
        self.place = if self.sections[section].is_ours() {
            Place::Body {
                part: Some(part),
                is_begun: true,
            }
        } else {
            Place::Foreign(part)
        };
        Ok(())
    }

    fn foreign(&mut self, part: Part, bytes: &[u8]) -> Result<usize, Stop> {
        let Section {
            name,
            instance,
            version,
            ..
        } = &self.sections[part.section];
        let section = ForeignSection {
            name,
            instance: *instance,
            version: *version,
            is_full: part.kind == SECTION_FULL,
        };
        // No more than could be kept, so that it does not depend on the pieces what comes of it.
        let bytes = if is_broken(Sabotage::KeepAll) {
            bytes
        } else {
            &bytes[..bytes.len().min(NEEDS_MAX)]
        };
        let text = String::from_utf8_lossy(name).into_owned();
        let opaque = |name| Err(Stop::Wrong(0, Fault::ForeignSection { name }));
        let Some(foreign) = &mut self.foreign else {
            return opaque(text);
        };
        let malformed = |why| {
            let name = text.clone();
            Err(Stop::Wrong(0, Fault::ForeignMalformed { name, why }))
        };
        match foreign.body(&section, bytes) {
            Ok(BodyPart::More(used)) if (1..=bytes.len()).contains(&used) => Ok(used),
            Ok(BodyPart::End(used)) if used <= bytes.len() => {
                self.place = self.after_body(part);
                Ok(used)
            }
            Ok(BodyPart::Needs(needed)) if needed > bytes.len() => Err(Stop::Needs(needed)),
            Ok(BodyPart::More(_) | BodyPart::End(_) | BodyPart::Needs(_)) => {
                malformed("whoever knows it has taken more bytes than there are".into())
            }
            Ok(BodyPart::Opaque) => opaque(text),
            Err(why) => malformed(why),
        }
    }

    fn after_body(&self, part: Part) -> Place {
        if self.has_footers {
            Place::Footer(part)
        } else {
            after_part(part, &self.sections)
        }
    }
}

/// What follows a part.
fn after_part(part: Part, sections: &[Section]) -> Place {
    if sections[part.section].is_ours() && part.kind == SECTION_END {
        return Place::Done;
    }
    Place::Between { is_first: false }
}

impl fmt::Debug for RecordReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordReader")
            .field("framing", &self.framing)
            .field("place", &self.place)
            .field("position", &self.at)
            .finish_non_exhaustive()
    }
}

enum Read {
    Used { bytes: usize, ends_part: bool },
    Needs(usize),
}

impl Read {
    fn used(bytes: usize) -> Self {
        Self::Used {
            bytes,
            ends_part: false,
        }
    }
}
