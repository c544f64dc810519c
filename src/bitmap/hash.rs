//! The digest by which bitmaps are compared across machines.
//!
//! 1. It is the SHA-256 of the words in little-endian order, 8 bytes each, of which there is at least one: a
//!    map of no bytes gives that of 8 zero bytes. Bits past the last granule go in as 0. So it is the same on
//!    all machines, and what QEMU reports of a bitmap on a little-endian machine of 64 bits.
//! 2. Neither length nor granularity goes in, and no trace of how the map came to be what it is.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::HBitmap;
use super::serial::write_le;
use super::words::Span;

/// Words handed to the digest at a time.
const CHUNK: usize = 512;

impl HBitmap {
    /// SHA-256 of the granules. Equal for maps of equal length and granularity exactly if they are equal.
    ///
    /// Reads what is neither clean nor dirty far and wide, but the digest itself is fed every byte: it takes
    /// seconds for each GiB of bits.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new(1 << 20, Granularity::DEFAULT)?;
    /// let clean = map.digest();
    /// map.set(0..1)?;
    /// assert_ne!(map.digest(), clean);
    /// map.reset_all();
    /// assert_eq!(map.digest(), clean);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    #[cfg_attr(docsrs, doc(cfg(feature = "sha2")))]
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        let mut bytes = [0; CHUNK * 8];
        if self.word_count() == 0 {
            digest.update([0; 8]);
        }
        for span in self.spans(0..self.word_count()) {
            match span {
                Span::Clean(_) => bytes.fill(0),
                Span::Dirty(_) => bytes.fill(0xff),
                Span::Words(words) => {
                    for words in words.chunks(CHUNK) {
                        let bytes = &mut bytes[..words.len() * 8];
                        write_le(words, bytes);
                        digest.update(bytes);
                    }
                    continue;
                }
            }
            let mut left = span.len();
            while left > 0 {
                let words = left.min(CHUNK);
                digest.update(&bytes[..words * 8]);
                left -= words;
            }
        }
        digest.finalize().into()
    }

    /// [`digest`](Self::digest) as 64 lower-case hexadecimal digits, as QEMU tells it.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let map = HBitmap::new(4 << 20, Granularity::DEFAULT)?;
    /// let expected = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc";
    /// assert_eq!(map.digest_hex(), expected, "64 granules, all clean");
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    #[must_use]
    #[cfg_attr(docsrs, doc(cfg(feature = "sha2")))]
    pub fn digest_hex(&self) -> String {
        let mut hex = String::with_capacity(64);
        for byte in self.digest() {
            write!(hex, "{byte:02x}").expect("a string takes what is written to it");
        }
        hex
    }
}
