//! Making the bytes, record by record.

use std::borrow::Borrow;
use std::ops::Range;

use super::{BITS_MAX, CHUNK_WORDS, Header, Kind, Label, RECORD};
use crate::bitmap::HBitmap;
use crate::bitmap::summary::{Class, Pair};

/// Hands out the bytes of a stored bitmap, as many at a time as the caller has room for.
///
/// `M` is the bitmap, or what gives it: a reference, an `Arc`. It must be the same one all the time. Holds
/// one record, 32 KiB at most.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use blockjob::bitmap::stored::{Decoder, Encoder, Label};
/// use blockjob::{Granularity, HBitmap};
///
/// let mut map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// map.set(0..1)?;
/// let map = Arc::new(map);
/// let mut encoder = Encoder::new(Arc::clone(&map), Label::default());
/// let mut decoder = Decoder::new(4 << 20);
/// let mut block = [0; 100];
/// loop {
///     let len = encoder.next_bytes(&mut block);
///     if len == 0 {
///         break;
///     }
///     decoder.feed(&block[..len])?;
/// }
/// assert_eq!(decoder.finish()?.bitmap, *map);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Encoder<M> {
    map: M,
    header: Header,
    /// Covers all records made so far.
    crc: crc32fast::Hasher,
    /// The first chunk that is in no record yet.
    next: usize,
    /// What is being handed out: the header, then one record after the other.
    bytes: Vec<u8>,
    /// Bytes of it that were handed out.
    taken: usize,
}

impl<M: Borrow<HBitmap>> Encoder<M> {
    /// Encodes `map`, stored with `label`.
    ///
    /// Looks at the summaries of the map to learn how long it will get.
    #[must_use]
    pub fn new(map: M, label: Label) -> Self {
        let header = header_of(map.borrow(), label);
        Self {
            map,
            header,
            crc: header.seed(),
            next: 0,
            bytes: header.to_bytes().to_vec(),
            taken: 0,
        }
    }

    /// What the bytes begin with; also tells how many there are.
    #[must_use]
    pub const fn header(&self) -> Header {
        self.header
    }

    /// Writes the bytes that come next, as many as fit, and says how many those are. None are left when that
    /// is 0, unless there was no room.
    pub fn next_bytes(&mut self, out: &mut [u8]) -> usize {
        let mut len = 0;
        while len < out.len() {
            if self.taken == self.bytes.len() && !self.make_record() {
                break;
            }
            let from = &self.bytes[self.taken..];
            let to = &mut out[len..];
            let both = from.len().min(to.len());
            to[..both].copy_from_slice(&from[..both]);
            self.taken += both;
            len += both;
        }
        len
    }

    /// Makes the record that comes next, if there is one.
    fn make_record(&mut self) -> bool {
        let map = self.map.borrow();
        let Some((kind, end)) = run_at(map, self.next) else {
            return false;
        };
        let words = match kind {
            Kind::Bits => words_of(map, self.next, end),
            Kind::Clean | Kind::Dirty => 0..0,
        };
        self.bytes.clear();
        self.bytes
            .reserve_exact(RECORD.0 + words.len() * 8 + RECORD.1);
        self.bytes.extend([kind as u8, 0, 0, 0]);
        // A map has 2^29 chunks at most.
        let chunks = (end - self.next) as u32;
        self.bytes.extend(chunks.to_le_bytes());
        self.bytes.resize(RECORD.0 + words.len() * 8, 0);
        map.write_words(words, &mut self.bytes[RECORD.0..]);
        self.crc.update(&self.bytes);
        self.bytes.extend(self.crc.clone().finalize().to_le_bytes());
        self.next = end;
        self.taken = 0;
        true
    }
}

/// The header of a map that is stored.
fn header_of(map: &HBitmap, label: Label) -> Header {
    let mut records_len = 0;
    let mut next = 0;
    while let Some((kind, end)) = run_at(map, next) {
        records_len += (RECORD.0 + RECORD.1) as u64;
        if kind == Kind::Bits {
            records_len += words_of(map, next, end).len() as u64 * 8;
        }
        next = end;
    }
    Header {
        label,
        len: map.len,
        granularity: map.granularity,
        count: map.count,
        is_in_use: false,
        records_len,
    }
}

/// Words of some chunks.
fn words_of(map: &HBitmap, first: usize, end: usize) -> Range<usize> {
    first * CHUNK_WORDS..map.word_count().min(end * CHUNK_WORDS)
}

/// What the record is that begins with a chunk, and where it ends; nothing, if there is no such chunk.
fn run_at(map: &HBitmap, first: usize) -> Option<(Kind, usize)> {
    let chunks = map.word_count().div_ceil(CHUNK_WORDS);
    let class = |chunk| map.summary.block(chunk).map_or(Class::Empty, Pair::class);
    if first >= chunks {
        return None;
    }
    let chunk_of = |word: usize| word / CHUNK_WORDS;
    let word = first * CHUNK_WORDS;
    let (kind, end) = match class(first) {
        Class::Empty => (Kind::Clean, map.summary.next_any(word).map(chunk_of)),
        Class::Full => (Kind::Dirty, map.summary.next_lacking(word).map(chunk_of)),
        Class::Mixed => {
            let mut chunks = first + 1..first + BITS_MAX;
            (
                Kind::Bits,
                chunks
                    .find(|chunk| class(*chunk) != Class::Mixed)
                    .or(Some(chunks.end)),
            )
        }
    };
    Some((kind, end.unwrap_or(chunks).min(chunks)))
}
