//! A map as it looks at another granularity, word by word.
//!
//! ```text
//! fine, 64 granules a word    0100 0000 1111 …     every four of them share one coarse granule
//! rounded outward             1    0    1    …     dirty if one of the four is
//! rounded inward              0    0    1    …     dirty if all four are
//!
//! coarse                      1    0    …
//! as fine                     1111 0000 …          nothing is rounded
//! ```

use std::ops::Range;

use multiversion::multiversion;

use super::HBitmap;
use super::iter::GranuleRuns;
use super::word::{ones, word_of};
use crate::log::DirtyWord;
use crate::units::{ByteRange, Granularity};

/// What becomes of a coarse granule that is dirty in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounding {
    /// It is dirty.
    Outward,
    /// It is clean.
    Inward,
}

/// So few words of a block are taken one by one.
const FEW: u32 = 16;

/// Some dirty granules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Some of one word.
    Word(usize, u64),
    /// A run.
    Run(Range<u64>),
}

impl HBitmap {
    /// What is dirty, as granules of another granularity. Every granule comes once, in ascending order.
    pub(super) fn rescaled(
        &self,
        granularity: Granularity,
        rounding: Rounding,
        piece: impl FnMut(Piece),
    ) {
        let (ours, theirs) = (self.granularity.exponent(), granularity.exponent());
        let is_coarser = theirs > ours;
        match (is_coarser, theirs.abs_diff(ours)) {
            (true, shift @ 1..=5) => self.as_coarser(u32::from(shift), rounding, piece),
            (true, shift) => self.as_coarser_runs(shift, rounding, piece),
            (false, 0) => self.as_finer::<0>(granularity, piece),
            (false, 1) => self.as_finer::<1>(granularity, piece),
            (false, 2) => self.as_finer::<2>(granularity, piece),
            (false, 3) => self.as_finer::<3>(granularity, piece),
            (false, 4) => self.as_finer::<4>(granularity, piece),
            (false, 5) => self.as_finer::<5>(granularity, piece),
            (false, shift) => self.as_finer_runs(shift, granularity, piece),
        }
    }

    /// Makes dirty what a log of some granularity has marked, and that is as long. Rounds **outward** if we
    /// are coarser.
    pub(crate) fn set_word(&mut self, granularity: Granularity, word: DirtyWord) {
        let (ours, theirs) = (self.granularity.exponent(), granularity.exponent());
        let at = word_of(word.first_granule);
        let bits = word.bits << (word.first_granule % 64);
        match ours.checked_sub(theirs) {
            _ if bits == 0 => {}
            Some(0) => drop(self.set_in_word(at, bits)),
            Some(shift @ 1..=5) => {
                let shift = u32::from(shift);
                let bits = gather_word(bits, shift, Rounding::Outward);
                let part = at as u32 % (1 << shift);
                self.set_in_word(at >> shift, bits << (part * (64 >> shift)));
            }
            // We are much coarser, or finer: then a bit of theirs is a run of ours.
            _ => {
                for run in word.runs() {
                    let end = granularity.start_of(run.end).min(self.len);
                    let run = ByteRange::from(granularity.start_of(run.start)..end);
                    self.set_run(self.granularity.outward(run));
                }
            }
        }
    }

    /// As granules that `2^shift` of ours share, 2 to 32.
    fn as_coarser(&self, shift: u32, rounding: Rounding, mut piece: impl FnMut(Piece)) {
        // Words of theirs that one block of ours becomes.
        let per_block = 64 >> shift;
        let (last, past_end) = self.last_word();
        let mut gathered = [0; 32];
        for (block, pair) in self.summary.blocks_from(0) {
            if pair.any().count_ones() < FEW {
                for at in ones(pair.any()) {
                    let mut bits = self.word_of_block(block, pair, at);
                    let at = block * 64 + at;
                    if rounding == Rounding::Inward && at == last {
                        bits |= past_end;
                    }
                    let bits =
                        gather_word(bits, shift, rounding) << (at % (1 << shift) * per_block);
                    // Rounded inward, a word may have nothing to tell of.
                    if bits != 0 {
                        piece(Piece::Word(at >> shift, bits));
                    }
                }
                continue;
            }
            let mut words = [0; 64];
            self.copy_block(block, &mut words);
            // A partial last granule of theirs is covered by those of ours that there are.
            if rounding == Rounding::Inward && block == last / 64 {
                words[last % 64] |= past_end;
            }
            gather_block(&words, shift, rounding, &mut gathered);
            for (at, bits) in gathered[..per_block].iter_mut().enumerate() {
                if *bits != 0 {
                    piece(Piece::Word(block * per_block + at, *bits));
                }
            }
        }
    }

    /// As granules of which `2^SHIFT` make one of ours.
    fn as_finer<const SHIFT: u32>(&self, granularity: Granularity, mut piece: impl FnMut(Piece)) {
        let granules = granularity.granules_in(self.len);
        for (at, bits) in self.dirty_words() {
            for part in 0..1 << SHIFT {
                let to = (at << SHIFT) + part;
                let mut bits = spread::<SHIFT>(bits >> (part as u32 * (64 >> SHIFT)));
                // Our last granule may have fewer of theirs.
                if let left @ 0..=63 = granules.saturating_sub(to as u64 * 64) {
                    bits &= low(left as u32);
                }
                if bits != 0 {
                    piece(Piece::Word(to, bits));
                }
            }
        }
    }

    /// As granules of which 64 or more make one of ours.
    fn as_finer_runs(&self, shift: u8, granularity: Granularity, mut piece: impl FnMut(Piece)) {
        let granules = granularity.granules_in(self.len);
        for run in GranuleRuns::new(self, 0..self.granules()) {
            let end = granules.min(run.end << shift);
            piece(Piece::Run(run.start << shift..end));
        }
    }

    /// As granules that 64 or more of ours share.
    fn as_coarser_runs(&self, shift: u8, rounding: Rounding, mut piece: impl FnMut(Piece)) {
        let all = self.granules();
        let per = 1u64 << shift;
        // The last granule handed out was the one before: runs may share one.
        let mut from = 0;
        for run in GranuleRuns::new(self, 0..all) {
            let (start, end) = match rounding {
                Rounding::Outward => (run.start / per, run.end.div_ceil(per)),
                Rounding::Inward if run.end == all => (run.start.div_ceil(per), all.div_ceil(per)),
                Rounding::Inward => (run.start.div_ceil(per), run.end / per),
            };
            let start = start.max(from);
            if start < end {
                piece(Piece::Run(start..end));
                from = end;
            }
        }
    }
}

/// The lowest `count` bits, fewer than 64.
#[inline]
const fn low(count: u32) -> u64 {
    !(!0 << count)
}

/// The lowest `count` of every `every` bits.
const fn pattern(count: u32, every: u32) -> u64 {
    let mut pattern = 0;
    let mut at = 0;
    while at < 64 {
        if at % every < count {
            pattern |= 1 << at;
        }
        at += 1;
    }
    pattern
}

/// Every `2^SHIFT` bits, and no more than 32, become one: whether one of them is 1.
#[inline(always)]
fn gather<const SHIFT: u32>(bits: u64) -> u64 {
    let mut bits = bits;
    for step in 0..SHIFT {
        bits |= bits >> (1 << step);
    }
    bits &= const { pattern(1, 1 << SHIFT) };
    // The bits left are moved together: two side by side, four …
    for step in 0..6 - SHIFT {
        let together = 1 << step;
        bits |= bits >> (together * ((1 << SHIFT) - 1));
        bits &= pattern(2 * together, (2 * together) << SHIFT);
    }
    bits
}

/// What 64 words become when `2^shift` granules share one. Made several times over, for what processors
/// have.
#[multiversion(targets = "simd")]
fn gather_block(words: &[u64; 64], shift: u32, rounding: Rounding, to: &mut [u64; 32]) {
    // The shift as a constant makes a handful of instructions of what is done to each word.
    match shift {
        1 => gather_words::<1>(words, rounding, to),
        2 => gather_words::<2>(words, rounding, to),
        3 => gather_words::<3>(words, rounding, to),
        4 => gather_words::<4>(words, rounding, to),
        _ => gather_words::<5>(words, rounding, to),
    }
}

#[inline(always)]
fn gather_words<const SHIFT: u32>(words: &[u64; 64], rounding: Rounding, to: &mut [u64; 32]) {
    let mut parts = [0; 64];
    for (part, word) in parts.iter_mut().zip(words) {
        *part = rounded::<SHIFT>(*word, rounding);
    }
    for (to, parts) in to.iter_mut().zip(parts.chunks_exact(1 << SHIFT)) {
        *to = 0;
        for (at, part) in parts.iter().enumerate() {
            *to |= part << (at as u32 * (64 >> SHIFT));
        }
    }
}

/// What one word becomes.
fn gather_word(word: u64, shift: u32, rounding: Rounding) -> u64 {
    match shift {
        1 => rounded::<1>(word, rounding),
        2 => rounded::<2>(word, rounding),
        3 => rounded::<3>(word, rounding),
        4 => rounded::<4>(word, rounding),
        _ => rounded::<5>(word, rounding),
    }
}

/// Every `2^SHIFT` bits become one.
#[inline(always)]
fn rounded<const SHIFT: u32>(bits: u64, rounding: Rounding) -> u64 {
    match rounding {
        Rounding::Outward => gather::<SHIFT>(bits),
        // All are dirty if none is clean.
        Rounding::Inward => !gather::<SHIFT>(!bits) & low(64 >> SHIFT),
    }
}

/// Every one of the lowest `64 / 2^SHIFT` bits becomes `2^SHIFT` alike, no more than 32.
#[inline]
fn spread<const SHIFT: u32>(bits: u64) -> u64 {
    if SHIFT == 0 {
        return bits;
    }
    let mut bits = bits & low(64 >> SHIFT);
    for step in (0..6 - SHIFT).rev() {
        let together = 1 << step;
        bits |= bits << (together * ((1 << SHIFT) - 1));
        bits &= pattern(together, together << SHIFT);
    }
    // Each bit, from its place up to the next, becomes ones.
    (bits << (1 << SHIFT)).wrapping_sub(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_and_spreading_are_what_they_are_bit_by_bit() {
        let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200 {
            bits = bits.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(23) & bits.rotate_left(7);
            check::<1>(bits);
            check::<2>(bits);
            check::<3>(bits);
            check::<4>(bits);
            check::<5>(bits);
            assert_eq!(spread::<0>(bits), bits);
        }
    }

    fn check<const SHIFT: u32>(bits: u64) {
        let per = 1 << SHIFT;
        let has = |bit: u32| bits >> bit & 1 == 1;
        let of = |is_dirty: &dyn Fn(u32) -> bool, count: u32| {
            let dirty = (0..count).filter(|at| is_dirty(*at));
            dirty.fold(0, |all, at| all | 1 << at)
        };
        let gathered = of(
            &|granule| (0..per).any(|n| has(granule * per + n)),
            64 / per,
        );
        assert_eq!(gather::<SHIFT>(bits), gathered, "{bits:#x}");
        assert_eq!(
            spread::<SHIFT>(bits),
            of(&|at| has(at / per), 64),
            "{bits:#x}"
        );
    }
}
