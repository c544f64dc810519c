//! A bitmap as a value of other formats: the bytes of its stored form, with an empty label.

use std::fmt;

use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Decoder, HBitmap, Label, Stored, encode};

/// Most bytes of memory that a bitmap may take which is deserialized without saying how many it may:
/// enough for 124 TiB at 64 KiB. [`Within`] allows another number.
pub const DESERIALIZE_MEMORY_MAX: u64 = 256 << 20;

/// Deserializes a bitmap that may take so many bytes of memory: see [`read`](super::read).
///
/// # Examples
///
/// ```
/// use blockjob::bitmap::stored::Within;
/// use blockjob::{Granularity, HBitmap};
/// use serde::de::DeserializeSeed;
///
/// let mut map = HBitmap::new(1 << 40, Granularity::DEFAULT)?;
/// map.set(0..1 << 39)?;
/// let json = serde_json::to_string(&map)?;
///
/// let seed = |max| Within(max).deserialize(&mut serde_json::Deserializer::from_str(&json));
/// assert_eq!(seed(4 << 20)?, map);
/// assert!(seed(1 << 20).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Within(pub u64);

/// As the bytes of its [stored form](super), with an empty label. So versions, lengths and damage are told
/// as there.
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
impl Serialize for HBitmap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&encode(self, Label::default()))
    }
}

/// Takes up to [`DESERIALIZE_MEMORY_MAX`] bytes of memory.
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
impl<'de> Deserialize<'de> for HBitmap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Within(DESERIALIZE_MEMORY_MAX).deserialize(deserializer)
    }
}

impl<'de> DeserializeSeed<'de> for Within {
    type Value = HBitmap;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<HBitmap, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl<'de> Visitor<'de> for Within {
    type Value = HBitmap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of a stored bitmap")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<HBitmap, E> {
        let stored = super::decode(bytes, self.0).map_err(E::custom)?;
        Ok(stored.bitmap)
    }

    /// Formats without bytes have a list of numbers.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<HBitmap, A::Error> {
        let mut decoder = Decoder::new(self.0);
        while let Some(byte) = list.next_element::<u8>()? {
            if decoder.feed(&[byte]).map_err(A::Error::custom)? == 0 {
                return Err(A::Error::custom("bytes follow the stored bitmap"));
            }
        }
        let Stored { bitmap, .. } = decoder.finish().map_err(A::Error::custom)?;
        Ok(bitmap)
    }
}
