//! Looking at data: the only place that does, for the driver and the queue.

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
