//! Looking at data: the only place that does, for the driver and the queue.

use crate::units::ByteRange;

/// How much is looked at before it is asked whether to go on.
const STRIDE: usize = 256;

/// Whether all bytes are 0.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let mut strides = bytes.chunks_exact(STRIDE);
    strides.all(|stride| any_bit(stride) == 0)
        && bytes
            .chunks_exact(STRIDE)
            .remainder()
            .iter()
            .all(|&b| b == 0)
}

/// In what pieces differences are told.
const PIECE: u64 = 512;

/// What differs of two pieces of disks that start at `offset` and are as long as each other, in multiples of
/// [`PIECE`] bytes, or to the end.
pub(crate) fn differing(one: &[u8], other: &[u8], offset: u64) -> Vec<ByteRange> {
    assert_eq!(one.len(), other.len(), "both were read whole");
    let mut found: Vec<ByteRange> = Vec::new();
    if one == other {
        return found;
    }
    let mut tell = |range: ByteRange| match found.last_mut() {
        Some(last) if last.end() == range.start() => *last = (last.start()..range.end()).into(),
        _ => found.push(range),
    };
    let end = offset + one.len() as u64;
    let mut start = offset;
    while start < end {
        let next = (start - start % PIECE).saturating_add(PIECE).min(end);
        let bytes = (start - offset) as usize..(next - offset) as usize;
        if one[bytes.clone()] != other[bytes] {
            tell((start..next).into());
        }
        start = next;
    }
    found
}

/// All bits of a stride, word by word and without a branch, so that it is done with vectors.
fn any_bit(stride: &[u8]) -> u64 {
    let words = stride.chunks_exact(8);
    words.fold(0, |bits, word| {
        bits | u64::from_ne_bytes(word.try_into().expect("eight bytes"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_piece_by_piece_and_joined() {
        let one = vec![0u8; 3000];
        assert_eq!(differing(&one, &one, 100), []);
        let mut other = one.clone();
        // The disk's pieces begin at multiples of 512, which are 412 and 924 here.
        other[411] = 1;
        other[412] = 1;
        other[924 + 512] = 1;
        other[2999] = 1;
        let expected: [ByteRange; 3] =
            [(100..1024).into(), (1536..2048).into(), (3072..3100).into()];
        assert_eq!(differing(&one, &other, 100), expected);
    }

    #[test]
    fn each_byte_counts() {
        for len in [0, 1, 7, 8, 9, 255, 256, 257, 511, 512, 1000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
