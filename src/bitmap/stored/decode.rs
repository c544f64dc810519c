//! Taking the bytes as they come, and believing none of them before it is checked.

use std::fmt;
use std::ops::Range;

use super::{BITS_MAX, CHUNK_WORDS, DecodeError, Header, Kind, RECORD, Stored};
use crate::bitmap::HBitmap;
use crate::bitmap::summary::memory_for;
use crate::sabotage::{Sabotage, is_broken};

/// Takes the bytes of a stored bitmap, as many at a time as the caller has. [`Encoder`](super::Encoder) has
/// an example.
pub struct Decoder {
    /// Bytes of memory that the bitmap may take.
    memory_max: u64,
    phase: Phase,
    /// Bytes that are not enough yet for the next step.
    held: [u8; CHUNK_WORDS * 8],
    /// How many those are.
    have: usize,
}

/// How far the decoder has come.
enum Phase {
    /// No header yet.
    Header,
    /// The header was right; some records may have come, or all.
    Records(Records),
    /// All is over.
    Failed(DecodeError),
}

impl Decoder {
    /// Decodes a bitmap that may take `memory_max` bytes of memory: see [`read`](super::read).
    #[must_use]
    pub const fn new(memory_max: u64) -> Self {
        Self {
            memory_max,
            phase: Phase::Header,
            held: [0; CHUNK_WORDS * 8],
            have: 0,
        }
    }

    /// What the bitmap says of itself, once its header has come and was found right.
    #[must_use]
    pub const fn header(&self) -> Option<Header> {
        match &self.phase {
            Phase::Records(records) => Some(records.header),
            Phase::Header | Phase::Failed(_) => None,
        }
    }

    /// How many bytes are still to come, at least; none, if the bitmap is complete or lost.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::bitmap::stored::{self, Decoder, Label};
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let bytes = stored::encode(&HBitmap::new(1 << 40, Granularity::DEFAULT)?, Label::default());
    /// let mut decoder = Decoder::new(4 << 20);
    /// assert_eq!(decoder.wanted(), 64, "the header");
    /// decoder.feed(&bytes[..64])?;
    /// assert_eq!(decoder.wanted(), 12, "a record of what is clean, that is all");
    /// assert_eq!(decoder.feed(&bytes[64..])?, 12);
    /// assert_eq!(decoder.wanted(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub const fn wanted(&self) -> u64 {
        let have = self.have as u64;
        match &self.phase {
            Phase::Header => Header::LEN as u64 - have,
            Phase::Records(records) => records.header.total_len() - records.offset - have,
            Phase::Failed(_) => 0,
        }
    }

    /// Takes the next bytes and says how many: fewer than all only if more follow the bitmap.
    ///
    /// # Errors
    ///
    /// See [`DecodeError`]. The bitmap is lost then, and each further call fails with the same error.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, DecodeError> {
        let mut rest = bytes;
        loop {
            let needed = match &self.phase {
                Phase::Header => Header::LEN,
                Phase::Records(records) => records.needed(),
                Phase::Failed(error) => return Err(*error),
            };
            let (given, after) = rest.split_at(rest.len().min(needed - self.have));
            self.held[self.have..][..given.len()].copy_from_slice(given);
            self.have += given.len();
            rest = after;
            if self.have < needed || needed == 0 {
                return Ok(bytes.len() - rest.len());
            }
            self.have = 0;
            if let Err(error) = self.step(needed) {
                self.phase = Phase::Failed(error);
            }
        }
    }

    /// The bitmap, which must be complete.
    ///
    /// # Errors
    ///
    /// [`Truncated`](DecodeError::Truncated) if it is not, or what it failed with.
    pub fn finish(self) -> Result<Stored, DecodeError> {
        let missing = self.wanted();
        match self.phase {
            Phase::Records(Records { header, bitmap, .. }) if missing == 0 => {
                Ok(Stored { header, bitmap })
            }
            Phase::Header | Phase::Records(_) => Err(DecodeError::Truncated { missing }),
            Phase::Failed(error) => Err(error),
        }
    }

    /// What was waited for has come.
    fn step(&mut self, needed: usize) -> Result<(), DecodeError> {
        match &mut self.phase {
            Phase::Header => {
                let header = self.held.first_chunk().expect("a header fits");
                let records = Records::new(Header::from_bytes(header)?, self.memory_max)?;
                self.phase = Phase::Records(records);
                Ok(())
            }
            Phase::Records(records) => records.step(&self.held[..needed]),
            Phase::Failed(error) => Err(*error),
        }
    }
}

/// What is known of the bitmap, not its bits.
impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("header", &self.header())
            .field("wanted", &self.wanted())
            .finish_non_exhaustive()
    }
}

/// The records that follow a header.
struct Records {
    header: Header,
    /// What has come of it.
    bitmap: HBitmap,
    /// Covers the header and all records so far.
    crc: crc32fast::Hasher,
    /// Where the next bytes are in the file.
    offset: u64,
    /// The first chunk of which nothing has come.
    next: usize,
    /// The place in a record.
    at: At,
}

/// A place in a record.
#[derive(Clone, Copy)]
enum At {
    /// Before it.
    Head,
    /// Before the bits of a chunk; so many of its chunks are left.
    Bits { left: usize },
    /// Before its CRC.
    Check,
    /// After the last.
    End,
}

impl Records {
    fn new(header: Header, memory_max: u64) -> Result<Self, DecodeError> {
        if header.is_in_use && !is_broken(Sabotage::TrustInUse) {
            return Err(DecodeError::InUse);
        }
        let bitmap = HBitmap::new(header.len, header.granularity)?;
        let needed = memory_for(bitmap.granules());
        if needed > memory_max && !is_broken(Sabotage::TrustHeader) {
            return Err(DecodeError::TooLarge { needed, memory_max });
        }
        let mut records = Self {
            header,
            bitmap,
            crc: header.seed(),
            offset: Header::LEN as u64,
            next: 0,
            at: At::End,
        };
        records.at = records.next_record()?;
        Ok(records)
    }

    /// Bytes that the next step takes.
    fn needed(&self) -> usize {
        match self.at {
            At::Head => RECORD.0,
            At::Bits { .. } => self.words_of(1).len() * 8,
            At::Check => RECORD.1,
            At::End => 0,
        }
    }

    /// Takes what was needed.
    fn step(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        self.offset += bytes.len() as u64;
        self.at = match self.at {
            At::Head => {
                self.crc.update(bytes);
                self.begin_record(bytes)?
            }
            At::Bits { left } => {
                self.crc.update(bytes);
                let first = self.words_of(1).start;
                self.bitmap
                    .replace_words::<[u8; 8]>(first, bytemuck::cast_slice(bytes))?;
                self.next += 1;
                match left - 1 {
                    0 => At::Check,
                    left => At::Bits { left },
                }
            }
            At::Check => {
                if bytes != self.crc.clone().finalize().to_le_bytes()
                    && !is_broken(Sabotage::IgnoreCrc)
                {
                    let offset = self.offset;
                    return Err(DecodeError::Damaged { offset });
                }
                self.next_record()?
            }
            At::End => At::End,
        };
        Ok(())
    }

    /// A record begins.
    fn begin_record(&mut self, head: &[u8]) -> Result<At, DecodeError> {
        let invalid = DecodeError::RecordInvalid {
            offset: self.offset - head.len() as u64,
        };
        let count = head[4..].first_chunk().expect("a head has 8 bytes");
        let chunks = u32::from_le_bytes(*count) as usize;
        let kind = match head[..4] {
            [1, 0, 0, 0] => Kind::Clean,
            [2, 0, 0, 0] => Kind::Dirty,
            [3, 0, 0, 0] if chunks <= BITS_MAX => Kind::Bits,
            _ => return Err(invalid),
        };
        if chunks == 0 || chunks > self.chunks_left() {
            return Err(invalid);
        }
        let words = self.words_of(chunks);
        let bits = if kind == Kind::Bits {
            words.len() * 8
        } else {
            0
        };
        if ((bits + RECORD.1) as u64) > self.left() {
            return Err(invalid);
        }
        match kind {
            Kind::Clean => {}
            Kind::Dirty => {
                self.bitmap.reserve()?;
                let granules = self.bitmap.granules_of(&words);
                self.bitmap.set_run(granules);
            }
            Kind::Bits => return Ok(At::Bits { left: chunks }),
        }
        self.next += chunks;
        Ok(At::Check)
    }

    /// What comes after a record, or after the header.
    fn next_record(&self) -> Result<At, DecodeError> {
        let (expected, found) = (self.header.count, self.bitmap.count);
        let is_over = self.chunks_left() == 0;
        if is_over && self.left() == 0 {
            return match expected == found || is_broken(Sabotage::IgnoreCount) {
                true => Ok(At::End),
                false => Err(DecodeError::Count { expected, found }),
            };
        }
        if is_over || self.left() < (RECORD.0 + RECORD.1) as u64 {
            let offset = self.offset;
            return Err(DecodeError::RecordInvalid { offset });
        }
        Ok(At::Head)
    }

    /// Bytes of the file that are still to come.
    fn left(&self) -> u64 {
        self.header.total_len() - self.offset
    }

    /// Chunks of which nothing has come.
    fn chunks_left(&self) -> usize {
        self.bitmap.word_count().div_ceil(CHUNK_WORDS) - self.next
    }

    /// Words of the next chunks.
    fn words_of(&self, chunks: usize) -> Range<usize> {
        let end = (self.next + chunks) * CHUNK_WORDS;
        self.next * CHUNK_WORDS..end.min(self.bitmap.word_count())
    }
}
