//! One record of QEMU's `dirty-bitmap` section: bytes to a value and back.
//!
//! ```text
//! flags                1 byte, or 2 or 4 if the first has 0x80
//! node name            if 0x08: a length of 1 to 255, and as many bytes
//! bitmap name          if 0x04: the same
//! START     0x10       granularity be32, flags u8
//! BITS      0x40       first sector be64, sectors be32; without 0x02: length be64, and as many bytes
//! COMPLETE  0x20       nothing more
//! 0x01                 the last record of the section's part
//! ```
//!
//! 1. Nothing is asked for, nor waited for, because a record says so, but for names of 255 bytes and a buffer of
//!    [`BUFFER_MAX`].
//! 2. What is read does not depend on how the bytes were cut.

use super::{SECTOR, Shape};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

const END: u8 = 0x01;
const ZEROES: u8 = 0x02;
const BITMAP_NAME: u8 = 0x04;
const NODE_NAME: u8 = 0x08;
const START: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const LONGER: u8 = 0x80;

pub(crate) const ENABLED: u8 = 0x01;
pub(crate) const PERSISTENT: u8 = 0x02;
/// Once the same as [`PERSISTENT`], and without any meaning for long.
const AUTOLOAD: u8 = 0x04;

/// The longest buffer of a record.
pub(crate) const BUFFER_MAX: u64 = 10 << 10;

/// What serialized bits are padded to.
const PADDING: usize = 32;

/// A record of the `dirty-bitmap` section, as it stands in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record<'a> {
    /// Bytes of the stream before it.
    pub at: u64,
    /// Name of the node, if it is told. Otherwise it is that of the record before.
    pub node: Option<&'a [u8]>,
    /// Name of the bitmap, the same.
    pub bitmap: Option<&'a [u8]>,
    /// What the record is about.
    pub body: RecordBody<'a>,
    /// Whether it is the last of its part.
    pub is_last: bool,
}

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordBody<'a> {
    /// Nothing but the names, if any.
    Nothing,
    /// A bitmap begins.
    Start {
        /// Bytes per bit, whatever they are.
        granularity: u32,
        /// Whether it is to record.
        is_enabled: bool,
        /// Whether it is to be saved with the image.
        is_persistent: bool,
    },
    /// Bits of a part of the disk.
    Bits {
        /// Where the part begins, in sectors of 512 bytes.
        first_sector: u64,
        /// Sectors of the part.
        sectors: u32,
        /// The serialized bits, perhaps padded; `None` if all are clean.
        bits: Option<&'a [u8]>,
    },
    /// The bitmap has all its bits.
    Complete,
}

/// What is wrong with a record, whatever it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A flag that has no meaning.
    #[error("flags of {bytes} bytes with bits that have no meaning")]
    Flags {
        /// Bytes of the flags.
        bytes: usize,
    },
    /// A name without a byte.
    #[error("an empty name")]
    NameEmpty,
    /// A bitmap flag that has no meaning.
    #[error("bitmap flags {flags:#04x} have bits that have no meaning")]
    BitmapFlags {
        /// As they stand there.
        flags: u8,
    },
    /// A longer buffer than any chunk has.
    #[error("a buffer of {len} bytes, of which more than 10240 are not taken")]
    BufferTooLong {
        /// As it stands there.
        len: u64,
    },
}

/// What came of looking at bytes.
pub(crate) enum Parsed<'a> {
    Record(Record<'a>, usize),
    /// As many bytes are needed at least, counted from the first of the record.
    Needs(usize),
}

/// The rest of a record that is being read.
struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// So many bytes are needed.
struct Short(usize);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Short> {
        let end = self.at + len;
        let taken = self.bytes.get(self.at..end).ok_or(Short(end))?;
        self.at = end;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("as many were taken"))
    }
}

enum Stop {
    Short(usize),
    /// Where, and what.
    Wrong(usize, RecordError),
}

impl From<Short> for Stop {
    fn from(Short(needed): Short) -> Self {
        Stop::Short(needed)
    }
}

/// Reads the record that `bytes` begin with. An error comes with its place in them.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed<'_>, (usize, RecordError)> {
    let mut rest = Rest { bytes, at: 0 };
    match record(&mut rest) {
        Ok(record) => Ok(Parsed::Record(record, rest.at)),
        Err(Stop::Short(needed)) => Ok(Parsed::Needs(needed)),
        Err(Stop::Wrong(at, error)) => Err((at, error)),
    }
}

fn record<'a>(rest: &mut Rest<'a>) -> Result<Record<'a>, Stop> {
    let flags = flags(rest)?;
    let node = if flags & NODE_NAME != 0 {
        Some(name(rest)?)
    } else {
        None
    };
    let bitmap = if flags & BITMAP_NAME != 0 {
        Some(name(rest)?)
    } else {
        None
    };
    // In this order, as QEMU looks at them.
    let body = if flags & START != 0 {
        start(rest)?
    } else if flags & COMPLETE != 0 {
        RecordBody::Complete
    } else if flags & BITS != 0 {
        bits(rest, flags)?
    } else {
        RecordBody::Nothing
    };
    Ok(Record {
        at: 0,
        node,
        bitmap,
        body,
        is_last: flags & END != 0,
    })
}

fn flags(rest: &mut Rest<'_>) -> Result<u8, Stop> {
    let wrong = |bytes| Err(Stop::Wrong(0, RecordError::Flags { bytes }));
    let [first] = rest.number()?;
    if first & LONGER == 0 {
        return Ok(first);
    }
    let [second] = rest.number()?;
    if second & LONGER == 0 {
        return if first == LONGER {
            Ok(second)
        } else {
            wrong(2)
        };
    }
    match (first, second, rest.number()?) {
        (LONGER, LONGER, [0, last]) if last & LONGER == 0 => Ok(last),
        _ => wrong(4),
    }
}

fn name<'a>(rest: &mut Rest<'a>) -> Result<&'a [u8], Stop> {
    let at = rest.at;
    match rest.number()? {
        [0] => Err(Stop::Wrong(at, RecordError::NameEmpty)),
        [len] if is_broken(Sabotage::TakeCutNames) => {
            let there = rest.bytes.len() - rest.at;
            Ok(rest.take(there.min(usize::from(len)))?)
        }
        [len] => Ok(rest.take(usize::from(len))?),
    }
}

fn start<'a>(rest: &mut Rest<'a>) -> Result<RecordBody<'a>, Stop> {
    let granularity = u32::from_be_bytes(rest.number()?);
    let at = rest.at;
    let [flags] = rest.number()?;
    if flags & !(ENABLED | PERSISTENT | AUTOLOAD) != 0 {
        return Err(Stop::Wrong(at, RecordError::BitmapFlags { flags }));
    }
    Ok(RecordBody::Start {
        granularity,
        is_enabled: flags & ENABLED != 0,
        is_persistent: flags & PERSISTENT != 0,
    })
}

fn bits<'a>(rest: &mut Rest<'a>, flags: u8) -> Result<RecordBody<'a>, Stop> {
    let first_sector = u64::from_be_bytes(rest.number()?);
    let sectors = u32::from_be_bytes(rest.number()?);
    let bits = if flags & ZEROES != 0 {
        None
    } else {
        let at = rest.at;
        let len = u64::from_be_bytes(rest.number()?);
        if len > BUFFER_MAX && !is_broken(Sabotage::TrustLength) {
            return Err(Stop::Wrong(at, RecordError::BufferTooLong { len }));
        }
        Some(rest.take(len as usize)?)
    };
    Ok(RecordBody::Bits {
        first_sector,
        sectors,
        bits,
    })
}

/// Makes records, and leaves out the names that are those of the record before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Maker {
    /// What the record before was about.
    last: Option<(Vec<u8>, Vec<u8>)>,
}

impl Maker {
    pub(crate) fn start(
        &mut self,
        names: (&str, &str),
        shape: Shape,
        flags: u8,
        out: &mut Vec<u8>,
    ) {
        self.head(START, names, out);
        // At most 2 GiB.
        out.extend((shape.granularity.bytes() as u32).to_be_bytes());
        out.push(flags);
    }

    /// The bits of a chunk of `map`.
    pub(crate) fn bits(
        &mut self,
        names: (&str, &str),
        map: &HBitmap,
        range: ByteRange,
        out: &mut Vec<u8>,
    ) {
        let part = map.part_of(range).expect("it is a chunk");
        let is_clean = part.is_clean();
        self.head(if is_clean { BITS | ZEROES } else { BITS }, names, out);
        // In one piece: a chunk is so short that each would cost a good part of copying it.
        let padded = part.len().next_multiple_of(PADDING);
        let mut place = [0; 20];
        place[..8].copy_from_slice(&(range.start() / SECTOR).to_be_bytes());
        // Chunks are no longer than 32 bits count.
        place[8..12].copy_from_slice(&(range.len().div_ceil(SECTOR) as u32).to_be_bytes());
        place[12..].copy_from_slice(&(padded as u64).to_be_bytes());
        if is_clean {
            out.extend_from_slice(&place[..12]);
            return;
        }
        out.reserve(place.len() + padded);
        out.extend_from_slice(&place);
        part.append_to(out);
        let padding = padded - part.len();
        if padding > 0 {
            out.extend_from_slice(&[0; PADDING][..padding]);
        }
    }

    pub(crate) fn complete(&mut self, names: (&str, &str), out: &mut Vec<u8>) {
        self.head(COMPLETE, names, out);
    }

    pub(crate) fn end(out: &mut Vec<u8>) {
        out.push(END);
    }

    fn head(&mut self, flags: u8, (node, bitmap): (&str, &str), out: &mut Vec<u8>) {
        let (node, bitmap) = (node.as_bytes(), bitmap.as_bytes());
        let (is_node, is_bitmap) = match &self.last {
            None => (false, false),
            Some(last) => (last.0 == node, last.0 == node && last.1 == bitmap),
        };
        let told = if is_node { 0 } else { NODE_NAME } | if is_bitmap { 0 } else { BITMAP_NAME };
        out.push(flags | told);
        for (name, is_told) in [(node, !is_node), (bitmap, !is_bitmap)] {
            if is_told {
                // Names have been looked at: 1 to 255 bytes.
                out.push(name.len() as u8);
                out.extend(name);
            }
        }
        if told != 0 {
            self.last = Some((node.to_vec(), bitmap.to_vec()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Granularity;

    fn flags_of(bytes: &[u8]) -> Result<Option<(RecordBody<'_>, bool)>, RecordError> {
        match parse(bytes) {
            Ok(Parsed::Record(record, _)) => Ok(Some((record.body, record.is_last))),
            Ok(Parsed::Needs(_)) => Ok(None),
            Err((_, error)) => Err(error),
        }
    }

    #[test]
    fn longer_flags_are_taken_while_the_extra_bits_are_zero() {
        for bytes in [&[0x21][..], &[0x80, 0x21], &[0x80, 0x80, 0, 0x21]] {
            assert_eq!(flags_of(bytes), Ok(Some((RecordBody::Complete, true))));
        }
        for bytes in [&[0xbf, 0x21][..], &[0x81, 0x21]] {
            assert_eq!(flags_of(bytes), Err(RecordError::Flags { bytes: 2 }));
        }
        for bytes in [
            [0xff, 0xff, 0x7f, 0x21],
            [0x80, 0x81, 0, 0x21],
            [0x80, 0x80, 1, 0x21],
            [0x80, 0x80, 0, 0xa1],
        ] {
            assert_eq!(flags_of(&bytes), Err(RecordError::Flags { bytes: 4 }));
        }
        assert_eq!(flags_of(&[0x80, 0x80, 0]), Ok(None));
    }

    #[test]
    fn a_record_is_read_from_its_bytes_and_not_from_fewer() {
        let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT).unwrap();
        map.set(0..1).unwrap();
        let shape = Shape {
            len: 1 << 20,
            granularity: Granularity::DEFAULT,
        };
        let mut maker = Maker::default();
        let mut bytes = Vec::new();
        maker.start(("disk0", "daily"), shape, ENABLED, &mut bytes);
        let first = bytes.len();
        assert_eq!(bytes, b"\x1c\x05disk0\x05daily\x00\x01\x00\x00\x01");
        maker.bits(("disk0", "daily"), &map, (0..1 << 20).into(), &mut bytes);
        for (from, to) in [(0, first), (first, bytes.len())] {
            for end in from..to {
                let needed = match parse(&bytes[from..end]) {
                    Ok(Parsed::Needs(needed)) => needed,
                    _ => panic!("{end} of {to} bytes are no record"),
                };
                assert!(needed > end - from && needed <= to - from);
            }
            assert!(
                matches!(parse(&bytes[from..]), Ok(Parsed::Record(_, used)) if used == to - from)
            );
        }
    }
}
