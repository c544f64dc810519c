//! One frame of the native stream: bytes to a value and back. All numbers are little-endian.
//!
//! ```text
//! kind u8, 0 0 0, length of the payload u32, number u64, payload, CRC-32 of all before it
//!
//! to the destination                                                        to the source
//! HELLO     "BLKJBMIG", version u32, session                                ACK     session: all frames below
//! START     bitmap u32, names, identity, generation, length, …                      that number have arrived
//! BITS      bitmap u32, form u8, 0 0 0, first byte u64, bytes u64, bits     RESUME  session: go on with that
//! COMPLETE  bitmap u32, dirty granules u64, CRC-32, perhaps SHA-256                 number
//! END       bitmaps u32
//! ```
//!
//! 1. Frames are numbered from 0, each one more than the one before, over all connections. HELLO begins a
//!    connection and has the number of the frame that follows.
//! 2. No frame is waited for, nor memory taken, that is longer than its kind can be.

use super::super::error::Fault;
use super::Shape;
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

const MAGIC: [u8; 8] = *b"BLKJBMIG";
const VERSION: u32 = 1;

const HELLO: u8 = 0x01;
const START: u8 = 0x02;
const BITS: u8 = 0x03;
const COMPLETE: u8 = 0x04;
const END: u8 = 0x05;
const ACK: u8 = 0x81;
const RESUME: u8 = 0x82;

const HEADER: usize = 16;
const CRC: usize = 4;

const ZEROES: u8 = 0;
const ONES: u8 = 1;
const BYTES: u8 = 2;

const ENABLED: u8 = 1;
const PERSISTENT: u8 = 2;

pub(crate) type Session = [u8; 16];

/// A frame, and its number.
pub(crate) struct Frame<'a> {
    pub(crate) number: u64,
    pub(crate) body: FrameBody<'a>,
}

pub(crate) enum FrameBody<'a> {
    Hello {
        session: Session,
    },
    Start(StartFrame<'a>),
    Bits {
        bitmap: u32,
        range: ByteRange,
        form: Form<'a>,
    },
    Complete {
        bitmap: u32,
        digest: Digest,
    },
    End {
        bitmaps: u32,
    },
    Ack {
        session: Session,
    },
    Resume {
        session: Session,
    },
}

/// What a bitmap begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StartFrame<'a> {
    pub(crate) bitmap: u32,
    pub(crate) names: (&'a [u8], &'a [u8]),
    pub(crate) identity: Option<[u8; 16]>,
    pub(crate) generation: Option<u64>,
    pub(crate) len: u64,
    pub(crate) granularity: u64,
    pub(crate) is_enabled: bool,
    pub(crate) is_persistent: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Form<'a> {
    Zeroes,
    Ones,
    Bytes(&'a [u8]),
}

/// What both ends compare when a bitmap is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    dirty: u64,
    crc: u32,
    /// If the sender can.
    sha: Option<[u8; 32]>,
}

impl Digest {
    /// Reads all of the map.
    pub(crate) fn of(map: &HBitmap) -> Self {
        let shape = Shape {
            len: map.len(),
            granularity: map.granularity(),
        };
        let mut crc = crc32fast::Hasher::new();
        let mut bytes = [0; 4096];
        let piece = 512 * shape.align();
        let mut at = 0;
        while at < map.len() {
            let range = shape.chunk_at(at, piece);
            let bytes = &mut bytes[..shape.bytes_of(range) as usize];
            map.serialize_part(range, bytes).expect("it is a part");
            crc.update(bytes);
            at = range.end();
        }
        Self {
            dirty: map.count(),
            crc: crc.finalize(),
            #[cfg(feature = "sha2")]
            sha: Some(map.digest()),
            #[cfg(not(feature = "sha2"))]
            sha: None,
        }
    }

    /// Whether it is that of the map, as far as both can tell.
    pub(crate) fn is_of(&self, map: &HBitmap) -> bool {
        let ours = Self::of(map);
        let is_same = (self.dirty, self.crc) == (ours.dirty, ours.crc);
        is_same
            && self
                .sha
                .is_none_or(|sha| ours.sha.is_none_or(|ours| ours == sha))
    }
}

pub(crate) enum Parsed<'a> {
    Frame(Frame<'a>, usize),
    Needs(usize),
}

/// Reads the frame that `bytes` begin with. An error comes with its place in them.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed<'_>, (usize, Fault)> {
    let Some(header) = bytes.get(..HEADER) else {
        return Ok(Parsed::Needs(HEADER));
    };
    let kind = header[0];
    let len = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
    let bounds = match kind {
        HELLO => 28..=28,
        START => 44..=40 + 2 * 256,
        BITS => 24..=24 + super::CHUNK as u32,
        COMPLETE => 17..=49,
        END => 4..=4,
        ACK | RESUME => 16..=16,
        kind => return Err((0, Fault::Frame { kind })),
    };
    let is_trusted = is_broken(Sabotage::TrustFrameLength);
    if !(bounds.contains(&len) || is_trusted) || header[1..4] != [0; 3] {
        return Err((4, Fault::FrameLength { len }));
    }
    let end = HEADER + len as usize;
    let Some(crc) = bytes.get(end..end + CRC) else {
        return Ok(Parsed::Needs(end + CRC));
    };
    if crc32fast::hash(&bytes[..end]) != u32::from_le_bytes(crc.try_into().expect("4 bytes")) {
        return Err((0, Fault::Checksum));
    }
    let number = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
    let mut fields = Fields(&bytes[HEADER..end]);
    let body = body(kind, &mut fields)
        .filter(|_| fields.0.is_empty())
        .ok_or((HEADER, Fault::FrameField))?;
    Ok(Parsed::Frame(Frame { number, body }, end + CRC))
}

/// What is left of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        Some(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.array()?))
    }

    fn name(&mut self) -> Option<&'a [u8]> {
        match self.u8()? {
            0 => None,
            len => self.take(len.into()),
        }
    }
}

fn body<'a>(kind: u8, fields: &mut Fields<'a>) -> Option<FrameBody<'a>> {
    Some(match kind {
        HELLO => {
            let (magic, version) = (fields.array::<8>()?, fields.u32()?);
            let session = fields.array()?;
            if (magic, version) != (MAGIC, VERSION) {
                return None;
            }
            FrameBody::Hello { session }
        }
        START => FrameBody::Start(start(fields)?),
        BITS => {
            let (bitmap, form) = (fields.u32()?, fields.array::<4>()?);
            let (first, bytes) = (fields.u64()?, fields.u64()?);
            let range = ByteRange::at(first, bytes)?;
            let form = match form {
                [ZEROES, 0, 0, 0] => Form::Zeroes,
                [ONES, 0, 0, 0] => Form::Ones,
                [BYTES, 0, 0, 0] => Form::Bytes(std::mem::take(&mut fields.0)),
                _ => return None,
            };
            FrameBody::Bits {
                bitmap,
                range,
                form,
            }
        }
        COMPLETE => {
            let (bitmap, dirty, crc) = (fields.u32()?, fields.u64()?, fields.u32()?);
            let sha = match fields.u8()? {
                0 => None,
                1 => Some(fields.array()?),
                _ => return None,
            };
            let digest = Digest { dirty, crc, sha };
            FrameBody::Complete { bitmap, digest }
        }
        END => FrameBody::End {
            bitmaps: fields.u32()?,
        },
        ACK => FrameBody::Ack {
            session: fields.array()?,
        },
        RESUME => FrameBody::Resume {
            session: fields.array()?,
        },
        _ => return None,
    })
}

fn start<'a>(fields: &mut Fields<'a>) -> Option<StartFrame<'a>> {
    let bitmap = fields.u32()?;
    let (len, exponent, flags) = (fields.u64()?, fields.u8()?, fields.u8()?);
    let has = fields.array::<2>()?;
    let (identity, generation) = (fields.array()?, fields.u64()?);
    let names = (fields.name()?, fields.name()?);
    if has.iter().any(|&has| has > 1) || flags & !(ENABLED | PERSISTENT) != 0 {
        return None;
    }
    Some(StartFrame {
        bitmap,
        names,
        identity: (has[0] == 1).then_some(identity),
        generation: (has[1] == 1).then_some(generation),
        len,
        granularity: Granularity::from_exponent(exponent)?.bytes(),
        is_enabled: flags & ENABLED != 0,
        is_persistent: flags & PERSISTENT != 0,
    })
}

/// Makes a frame.
fn frame(kind: u8, number: u64, out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(number.to_le_bytes());
    payload(out);
    // The longest payload is that of a chunk.
    let len = (out.len() - at - HEADER) as u32;
    out[at + 4..at + 8].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&out[at..]);
    out.extend(crc.to_le_bytes());
}

pub(crate) fn hello(number: u64, session: &Session, out: &mut Vec<u8>) {
    frame(HELLO, number, out, |out| {
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(session);
    });
}

pub(crate) fn make_start(number: u64, start: &StartFrame<'_>, out: &mut Vec<u8>) {
    frame(START, number, out, |out| {
        out.extend(start.bitmap.to_le_bytes());
        out.extend(start.len.to_le_bytes());
        let enabled = if start.is_enabled { ENABLED } else { 0 };
        let persistent = if start.is_persistent { PERSISTENT } else { 0 };
        // It is a power of two.
        out.extend([start.granularity.ilog2() as u8, enabled | persistent]);
        out.extend([start.identity.is_some(), start.generation.is_some()].map(u8::from));
        out.extend(start.identity.unwrap_or_default());
        out.extend(start.generation.unwrap_or_default().to_le_bytes());
        for name in [start.names.0, start.names.1] {
            // Names have been looked at: 1 to 255 bytes.
            out.push(name.len() as u8);
            out.extend(name);
        }
    });
}

/// The bits of a chunk of `map`.
pub(crate) fn bits(number: u64, bitmap: u32, map: &HBitmap, range: ByteRange, out: &mut Vec<u8>) {
    frame(BITS, number, out, |out| {
        let part = map.part_of(range).expect("it is a chunk");
        let form = if part.is_clean() {
            ZEROES
        } else if map.all_dirty_in(range) {
            ONES
        } else {
            BYTES
        };
        out.extend(bitmap.to_le_bytes());
        out.extend([form, 0, 0, 0]);
        out.extend(range.start().to_le_bytes());
        out.extend(range.len().to_le_bytes());
        if form == BYTES {
            part.append_to(out);
        }
    });
}

pub(crate) fn complete(number: u64, bitmap: u32, digest: &Digest, out: &mut Vec<u8>) {
    frame(COMPLETE, number, out, |out| {
        out.extend(bitmap.to_le_bytes());
        out.extend(digest.dirty.to_le_bytes());
        out.extend(digest.crc.to_le_bytes());
        out.push(digest.sha.is_some().into());
        out.extend(digest.sha.iter().flatten());
    });
}

pub(crate) fn end(number: u64, bitmaps: u32, out: &mut Vec<u8>) {
    frame(END, number, out, |out| out.extend(bitmaps.to_le_bytes()));
}

pub(crate) fn ack(number: u64, session: &Session, out: &mut Vec<u8>) {
    frame(ACK, number, out, |out| out.extend(session));
}

pub(crate) fn resume(number: u64, session: &Session, out: &mut Vec<u8>) {
    frame(RESUME, number, out, |out| out.extend(session));
}
