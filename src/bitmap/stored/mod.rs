//! A bitmap as a file of its own, or a value in a store: it says what it is, and tells when it is not whole.
//!
//! ```text
//!            ┌────────┬────────────┬─────────────────────────────┬────────────┬─────────────────┐
//! file       │ header │ 7 × clean  │ 2 × bits, 1024 bytes        │ 9 × dirty  │ 1 × bits, 24 B  │
//!            └────────┴────────────┴─────────────────────────────┴────────────┴─────────────────┘
//! CRC-32          ▲─────────────▲──────────────────────────────▲────────────▲─────────────────▲
//!              header     … and this record       … and all up to here
//!
//! chunks                0 … 6          7    8                      9 … 17          18
//! ```
//!
//! # Format, version 1
//!
//! Integers are little-endian, CRCs are CRC-32 as in Ethernet. A *chunk* is 4096 granules, 512 bytes; the last
//! one has whole words of 8 bytes for what is left. A map of no bytes has none.
//!
//! | header | bytes | |
//! |---|---|---|
//! | 0 | 8 | `BJHBITMP` |
//! | 8 | 2 | version, 1 |
//! | 10 | 1 | granularity, as the exponent of two: 0 to 63 |
//! | 11 | 1 | flags: 1 in use, all others 0 |
//! | 12 | 4 | CRC of the other 60 bytes |
//! | 16 | 8 | length of the disk in bytes |
//! | 24 | 16 | identity: whatever the caller tells bitmaps and disks apart by |
//! | 40 | 8 | generation: whatever the caller tells an old copy from a new one by |
//! | 48 | 8 | number of dirty granules |
//! | 56 | 8 | bytes of all records together |
//!
//! Records follow each other and cover the chunks from the first to the last, each once.
//!
//! | record | bytes | |
//! |---|---|---|
//! | 0 | 1 | kind: 1 clean, 2 dirty, 3 bits |
//! | 1 | 3 | 0 |
//! | 4 | 4 | number of chunks, at least 1; of kind 3 at most 64 |
//! | 8 | *n* | of kind 3 the granules of its chunks, as in a [part](HBitmap::serialize_part); else nothing |
//! | 8 + *n* | 4 | CRC of the header without its own CRC and with flags 0, and then of all records up to here without their CRCs |
//!
//! # What holds
//!
//! 1. The file ends where the header says: what is cut off is missed, and what follows is not read.
//! 2. Any damage is an error: of the header, of a record, a record that is missing, doubled, in another
//!    place, or of another bitmap or generation, as each CRC covers all that came before. Only the in-use mark
//!    is free of that, so that it can be set [in place](Header::to_bytes).
//! 3. Nothing is believed before it is checked, and no more memory is asked for than the caller has allowed:
//!    the header is checked before any, and the bits take theirs only when one of them is 1.
//! 4. A bitmap that is marked as in use is refused: somebody meant to go on recording in it and never stored
//!    it again, so granules may be missing.
//! 5. The same bitmap gives the same bytes, on every machine.

use std::io::{self, Read, Write};

use super::{CreateError, HBitmap};
use crate::units::Granularity;

mod decode;
mod encode;
#[cfg(feature = "serde")]
mod serde_impl;

pub use decode::Decoder;
pub use encode::Encoder;
#[cfg(feature = "serde")]
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
pub use serde_impl::{DESERIALIZE_MEMORY_MAX, Within};

/// What a file begins with.
const MAGIC: [u8; 8] = *b"BJHBITMP";
/// The only version there is.
const VERSION: u16 = 1;
/// The in-use mark among the flags.
const IN_USE: u8 = 1;
/// Words of a chunk but the last: those of a pair of the summary.
const CHUNK_WORDS: usize = 64;
/// Most chunks of a record of bits.
const BITS_MAX: usize = 64;
/// Bytes of a record before the bits, and after them.
const RECORD: (usize, usize) = (8, 4);

/// What a record says of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Clean = 1,
    Dirty = 2,
    Bits = 3,
}

/// What the caller knows a stored bitmap by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Label {
    /// Tells bitmaps and disks apart: a UUID, or what else fits.
    pub identity: [u8; 16],
    /// Tells an old copy from a new one.
    pub generation: u64,
}

/// What a stored bitmap says of itself before its bits come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    label: Label,
    len: u64,
    granularity: Granularity,
    count: u64,
    is_in_use: bool,
    /// Bytes of all records.
    records_len: u64,
}

/// A bitmap that was stored, and what it was stored with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What it said of itself.
    pub header: Header,
    /// The bitmap.
    pub bitmap: HBitmap,
}

/// Why bytes are not a stored bitmap, or not one to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// They begin otherwise.
    #[error("this is not a stored bitmap")]
    NotABitmap,
    /// They are of a version that is not known here.
    #[error("stored bitmaps of version {found} are not known")]
    Version {
        /// The version they say they are.
        found: u16,
    },
    /// The header is not what was written.
    #[error("the header of a stored bitmap is damaged")]
    HeaderDamaged,
    /// The header is undamaged and says what cannot be.
    #[error("the header of a stored bitmap says what cannot be")]
    HeaderInvalid,
    /// It was marked as in use and never stored again.
    #[error("the stored bitmap is in use, or was when its user came to an end")]
    InUse,
    /// The bitmap needs more memory than it is allowed to.
    #[error("the stored bitmap needs {needed} bytes of memory, and may have {memory_max}")]
    TooLarge {
        /// Bytes it needs as soon as a granule is dirty.
        needed: u64,
        /// Bytes it may have.
        memory_max: u64,
    },
    /// There can be no such bitmap, or there is no memory for it.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// What came before is not what was written.
    #[error("the stored bitmap is damaged before byte {offset}")]
    Damaged {
        /// Where the record ends that was found out, from the beginning of the file.
        offset: u64,
    },
    /// There is no such record, or it does not belong here. It is damaged, or was never right.
    #[error("the stored bitmap has no valid record at byte {offset}")]
    RecordInvalid {
        /// Where it begins, from the beginning of the file.
        offset: u64,
    },
    /// All records are right, and the bitmap is not the one that the header tells of.
    #[error("the stored bitmap has {found} dirty granules instead of {expected}")]
    Count {
        /// What the header says.
        expected: u64,
        /// What was found.
        found: u64,
    },
    /// The bytes end before the bitmap does.
    #[error("the stored bitmap ends {missing} bytes too early")]
    Truncated {
        /// At least so many are missing.
        missing: u64,
    },
    /// The bytes go on when the bitmap has ended.
    #[error("{bytes} bytes follow the stored bitmap")]
    Trailing {
        /// Bytes that are too many.
        bytes: u64,
    },
}

/// Why a stored bitmap could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The bytes did not come.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The bytes are wrong.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl Header {
    /// Bytes of a header.
    pub const LEN: usize = 64;

    /// What the bitmap was stored with.
    #[must_use]
    pub const fn label(&self) -> Label {
        self.label
    }

    /// See [`HBitmap::len`].
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "it is that of the disk, as for the bitmap"
    )]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// See [`HBitmap::granularity`].
    #[must_use]
    pub const fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// See [`HBitmap::count`].
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether somebody goes on recording in the bitmap, or meant to.
    #[must_use]
    pub const fn is_in_use(&self) -> bool {
        self.is_in_use
    }

    /// Bytes of header and records.
    #[must_use]
    pub const fn total_len(&self) -> u64 {
        Self::LEN as u64 + self.records_len
    }

    /// The same, marked as in use.
    #[must_use]
    pub const fn in_use(self) -> Self {
        Self {
            is_in_use: true,
            ..self
        }
    }

    /// The header as it is stored.
    ///
    /// # Examples
    ///
    /// Mark a stored bitmap before recording in it goes on, and store it again when that is over. What was
    /// not is known for it:
    ///
    /// ```
    /// use blockjob::bitmap::stored::{self, DecodeError, Header, Label};
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
    /// let mut file = stored::encode(&map, Label::default());
    ///
    /// let header = stored::decode(&file, 4 << 20)?.header;
    /// file[..Header::LEN].copy_from_slice(&header.in_use().to_bytes());
    /// // … and flush it, before the guest writes.
    /// assert_eq!(stored::decode(&file, 4 << 20), Err(DecodeError::InUse));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = self.granularity.exponent();
        bytes[11] = if self.is_in_use { IN_USE } else { 0 };
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.label.identity);
        bytes[40..48].copy_from_slice(&self.label.generation.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.count.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.records_len.to_le_bytes());
        let crc = header_crc(&bytes).finalize();
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header: all that [`decode`](fn@decode) would check before it asks for memory, but for whether the bitmap
    /// is in use and how large it may be.
    ///
    /// # Errors
    ///
    /// [`NotABitmap`](DecodeError::NotABitmap), [`Version`](DecodeError::Version),
    /// [`HeaderDamaged`](DecodeError::HeaderDamaged), [`HeaderInvalid`](DecodeError::HeaderInvalid),
    /// [`Create`](DecodeError::Create).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::stored::{self, Header, Label};
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let label = Label { identity: *b"disk of machine7", generation: 12 };
    /// let file = stored::encode(&HBitmap::new(1 << 40, Granularity::DEFAULT)?, label);
    /// let header = Header::from_bytes(file.first_chunk().unwrap())?;
    /// assert_eq!(header.label(), label);
    /// assert_eq!(header.total_len(), file.len() as u64);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        if bytes[..8] != MAGIC {
            return Err(DecodeError::NotABitmap);
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != VERSION {
            return Err(DecodeError::Version { found });
        }
        if bytes[12..16] != header_crc(bytes).finalize().to_le_bytes() {
            return Err(DecodeError::HeaderDamaged);
        }
        let number = |at: usize| {
            let bytes = bytes[at..].first_chunk();
            u64::from_le_bytes(*bytes.expect("no number is at the end of a header"))
        };
        let granularity = Granularity::from_exponent(bytes[10]);
        let header = Self {
            label: Label {
                identity: *bytes[24..].first_chunk().expect("40 bytes follow"),
                generation: number(40),
            },
            len: number(16),
            granularity: granularity.ok_or(DecodeError::HeaderInvalid)?,
            count: number(48),
            is_in_use: bytes[11] == IN_USE,
            records_len: number(56),
        };
        let granules = HBitmap::new(header.len, header.granularity)?.granules();
        let chunks = granules.div_ceil(64 * CHUNK_WORDS as u64);
        // The shortest is a single record, the longest has one for each chunk.
        let record = (RECORD.0 + RECORD.1) as u64;
        let shortest = if chunks == 0 { 0 } else { record };
        let longest = chunks * (record + 8 * CHUNK_WORDS as u64);
        let is_possible = bytes[11] & !IN_USE == 0
            && header.count <= granules
            && (shortest..=longest).contains(&header.records_len);
        is_possible
            .then_some(header)
            .ok_or(DecodeError::HeaderInvalid)
    }

    /// What the CRCs of the records begin with.
    fn seed(&self) -> crc32fast::Hasher {
        let header = Self {
            is_in_use: false,
            ..*self
        };
        header_crc(&header.to_bytes())
    }
}

/// The CRC of a header without its own.
fn header_crc(bytes: &[u8; Header::LEN]) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..12]);
    crc.update(&bytes[16..]);
    crc
}

/// Writes a bitmap, and says how many bytes that took.
///
/// # Errors
///
/// Those of `writer`. A part may then have been written: [`read`] finds that out.
///
/// # Examples
///
/// ```
/// use blockjob::bitmap::stored::{self, Label};
/// use blockjob::{Granularity, HBitmap};
///
/// let mut map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// map.set(0..1 << 39)?;
/// let label = Label { identity: [7; 16], generation: 1 };
///
/// let mut file = Vec::new();
/// assert_eq!(stored::write(&map, label, &mut file)?, 88, "half of it is dirty, half clean");
/// let stored = stored::read(&mut &file[..], 4 << 20)?;
/// assert_eq!(stored.bitmap, map);
/// assert_eq!(stored.header.label(), label);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write(map: &HBitmap, label: Label, writer: &mut impl Write) -> io::Result<u64> {
    let mut encoder = Encoder::new(map, label);
    let mut buf = vec![0; 32 << 10];
    let mut written = 0;
    loop {
        let len = encoder.next_bytes(&mut buf);
        if len == 0 {
            return Ok(written);
        }
        writer.write_all(&buf[..len])?;
        written += len as u64;
    }
}

/// Reads a bitmap that may take `memory_max` bytes of memory, and not a byte that follows it.
///
/// A bitmap takes a bit for each granule and 1/31 more: 2.1 MB for 1 TiB at 64 KiB. Besides it a buffer of
/// 32 KiB is used.
///
/// # Errors
///
/// Those of `reader`, and all of [`DecodeError`] but [`Trailing`](DecodeError::Trailing).
pub fn read(reader: &mut impl Read, memory_max: u64) -> Result<Stored, ReadError> {
    let mut decoder = Decoder::new(memory_max);
    let mut buf = vec![0; 32 << 10];
    loop {
        let wanted = decoder.wanted().min(buf.len() as u64) as usize;
        let len = match reader.read(&mut buf[..wanted]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            answer => answer?,
        };
        // A reader could say that it has read more than there was room for.
        decoder.feed(&buf[..len.min(wanted)])?;
        if len == 0 || decoder.wanted() == 0 {
            return Ok(decoder.finish()?);
        }
    }
}

/// The stored form of a bitmap, in memory.
#[must_use]
pub fn encode(map: &HBitmap, label: Label) -> Vec<u8> {
    let mut encoder = Encoder::new(map, label);
    // It is no longer than the map's own memory and the records around it.
    let mut bytes = vec![0; encoder.header().total_len() as usize];
    let mut len = 0;
    while len < bytes.len() {
        len += encoder.next_bytes(&mut bytes[len..]);
    }
    bytes
}

/// The bitmap that `bytes` are the stored form of, and nothing else. It may take `memory_max` bytes of memory:
/// see [`read`].
///
/// # Errors
///
/// See [`DecodeError`].
///
/// # Examples
///
/// ```
/// use blockjob::bitmap::stored::{self, DecodeError, Label};
/// use blockjob::{Granularity, HBitmap};
///
/// let mut map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// map.set(0..1)?;
/// let mut bytes = stored::encode(&map, Label::default());
/// assert_eq!(stored::decode(&bytes, 4 << 20)?.bitmap, map);
/// assert!(matches!(stored::decode(&bytes, 1 << 20), Err(DecodeError::TooLarge { .. })));
///
/// bytes[100] ^= 1;
/// assert!(matches!(stored::decode(&bytes, 4 << 20), Err(DecodeError::Damaged { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn decode(bytes: &[u8], memory_max: u64) -> Result<Stored, DecodeError> {
    let mut decoder = Decoder::new(memory_max);
    let trailing = bytes.len() - decoder.feed(bytes)?;
    let stored = decoder.finish()?;
    if trailing > 0 {
        return Err(DecodeError::Trailing {
            bytes: trailing as u64,
        });
    }
    Ok(stored)
}
