//! Bits of 64-bit words: which word holds a bit, which mask covers a run of bits.
//!
//! ```text
//! run 60..200        word 0             word 1        word 2             word 3
//!                    ............████   ███████████   ███████████████   ████............
//!                    head: bits 60..64  body: whole words               tail: bits 192..200
//! ```

use std::ops::Range;

/// Bits in a word.
const BITS: u64 = u64::BITS as u64;

/// Granules of a block, which are those of 64 words.
pub(super) const BLOCK: u64 = 64 * BITS;

/// Words in a row that share a page of memory, or two.
pub(super) const PAGE: usize = 512;

/// Index of the word that holds bit `index`.
#[inline]
pub(super) const fn word_of(index: u64) -> usize {
    // A bitmap of more words than a `usize` counts is refused when it is created.
    (index / BITS) as usize
}

/// Bit `index` within its word.
#[inline]
pub(super) const fn bit(index: u64) -> u64 {
    1 << (index % BITS)
}

/// Bit `index` and all above it in its word.
#[inline]
pub(super) const fn bits_from(index: u64) -> u64 {
    !0 << (index % BITS)
}

/// Bit `index` and all below it in its word.
#[inline]
pub(super) const fn bits_to(index: u64) -> u64 {
    !0 >> (BITS - 1 - index % BITS)
}

/// Index of the lowest bit of `bits`, which are bits of word `word` and must not be 0.
#[inline]
pub(super) const fn lowest(word: usize, bits: u64) -> u64 {
    word as u64 * BITS + bits.trailing_zeros() as u64
}

/// Words that hold `bits` bits. There is always one, so that no search has to ask whether there is.
pub(super) const fn words_for(bits: u64) -> u64 {
    let words = bits.div_ceil(BITS);
    if words == 0 { 1 } else { words }
}

/// Makes words of one block 0. If they all are, they are not written: their memory may never have been touched.
#[inline]
pub(super) fn clear(words: &mut [u64]) {
    if words.iter().fold(0, |any, word| any | word) != 0 {
        words.fill(0);
    }
}

/// Which bits of `word` are 1, ascending.
#[inline]
pub(super) fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = word.trailing_zeros() as usize;
        let is_some = word != 0;
        word &= word.wrapping_sub(1);
        is_some.then_some(lowest)
    })
}

/// A run of bits, cut at the word boundaries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// First word and which of its bits are in the run.
    pub(super) head: (usize, u64),
    /// Words between the first and the last, with all their bits.
    pub(super) body: Range<usize>,
    /// Last word and which of its bits are in the run and not in `head`: no bit if both are one word.
    pub(super) tail: (usize, u64),
}

impl Cut {
    /// Cuts `run`, which must not be empty.
    #[inline]
    pub(super) const fn of(run: &Range<u64>) -> Self {
        let (first, last) = (word_of(run.start), word_of(run.end - 1));
        let (head, tail) = (bits_from(run.start), bits_to(run.end - 1));
        if first == last {
            return Self {
                head: (first, head & tail),
                body: last..last,
                tail: (last, 0),
            };
        }
        Self {
            head: (first, head),
            body: first + 1..last,
            tail: (last, tail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_meet_at_their_bit() {
        for index in [0, 1, 31, 62, 63, 64, 127, 1 << 40] {
            assert_eq!(bits_from(index) & bits_to(index), bit(index));
            assert_eq!(bits_from(index) | bits_to(index), !0);
            assert_eq!(lowest(word_of(index), bit(index)), index);
        }
    }

    #[test]
    fn a_cut_has_every_bit_of_the_run_once() {
        for start in 0..200 {
            for end in start + 1..=200 {
                let cut = Cut::of(&(start..end));
                let mut words = [0u64; 4];
                words[cut.head.0] += cut.head.1;
                words[cut.tail.0] += cut.tail.1;
                words[cut.body].iter_mut().for_each(|word| *word += !0);
                let found = (0..256).filter(|index| words[word_of(*index)] & bit(*index) != 0);
                assert!(found.eq(start..end), "{start}..{end}");
            }
        }
    }

    #[test]
    fn there_is_always_a_word() {
        assert_eq!([0, 1, 64, 65].map(words_for), [1, 1, 1, 2]);
    }
}
