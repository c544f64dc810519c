//! Counting the ones of many words.
//!
//! ```text
//! eight rows of eight words     ones ─┬─ twos ─┬─ fours ─┬─ eights
//!   0110…  1100…  0001…  …            │        │         └─ counted: one row in place of eight
//!   1010…  0111…  1000…  …  ──▶ added place by place, and what is carried is a row of its own
//! ```
//!
//! Seven full adders for each place, which vectors of any length can be, leave an eighth of the words to be counted.
//! What is not carried waits for the next 64 words.

/// Words side by side. To each is done the same.
const LANES: usize = 8;

/// How many ones there are in blocks of 64 words.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ones {
    /// Eights of ones that were counted.
    eights: u64,
    /// What was not: ones, twos and fours.
    left: [[u64; LANES]; 3],
}

impl Ones {
    /// Adds a block, given word by word. To be done to many in a row, by code made for what processors have.
    #[inline(always)]
    pub(super) fn add(&mut self, word: impl Fn(usize) -> u64) {
        let mut carried = [0; LANES];
        let [one, two, four] = &mut self.left;
        for at in 0..LANES {
            let row = |row: usize| word(row * LANES + at);
            let (two_a, ones) = sum(one[at], row(0), row(1));
            let (two_b, ones) = sum(ones, row(2), row(3));
            let (four_a, twos) = sum(two[at], two_a, two_b);
            let (two_a, ones) = sum(ones, row(4), row(5));
            let (two_b, ones) = sum(ones, row(6), row(7));
            let (four_b, twos) = sum(twos, two_a, two_b);
            let (eights, fours) = sum(four[at], four_a, four_b);
            (one[at], two[at], four[at]) = (ones, twos, fours);
            carried[at] = eights;
        }
        self.eights += count(&carried);
    }

    /// All of them.
    #[inline(always)]
    pub(super) fn total(self) -> u64 {
        let [ones, twos, fours] = &self.left;
        self.eights * 8 + count(fours) * 4 + count(twos) * 2 + count(ones)
    }
}

#[inline(always)]
fn count(row: &[u64; LANES]) -> u64 {
    row.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Adds three bits in each place: what is carried, and what is left.
#[inline(always)]
fn sum(a: u64, b: u64, c: u64) -> (u64, u64) {
    let either = a ^ b;
    (a & b | either & c, either ^ c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ones_of_any_words_are_counted() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut ones = Ones::default();
        let mut expected = 0;
        for block in 0..200 {
            let words: [u64; 64] = std::array::from_fn(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(29) ^ 1;
                // From nothing to everything.
                match block % 5 {
                    0 => state,
                    1 => state & state.rotate_left(7) & state.rotate_left(19),
                    2 => state | state.rotate_left(7) | state.rotate_left(19),
                    3 => !0,
                    _ => 0,
                }
            });
            ones.add(|at| words[at]);
            expected += words
                .iter()
                .map(|word| u64::from(word.count_ones()))
                .sum::<u64>();
            assert_eq!(ones.total(), expected);
        }
    }
}
