//! Which granules are dirty, and what an obvious program, which looks at one bit after the other, says
//! of them. What is measured must say the same.

use std::ops::Range;

use super::random::random;

/// How what is dirty lies in a map.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pattern {
    /// Nothing is.
    Empty,
    /// One granule in 10,000, anywhere.
    Sparse,
    /// 100 runs of 1,000 granules, anywhere.
    Clustered,
    /// Each granule or not.
    Half,
    /// Everything is.
    Full,
}

impl Pattern {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Sparse => "sparse",
            Self::Clustered => "clustered",
            Self::Half => "half",
            Self::Full => "full",
        }
    }

    /// A bit for each granule, the number of which is a multiple of 64.
    pub(crate) fn words(self, granules: u64, seed: u64) -> Vec<u64> {
        let mut random = random(seed);
        let mut words = vec![0; (granules / 64) as usize];
        match self {
            Self::Empty => {}
            Self::Sparse => (0..granules / 10_000).for_each(|_| {
                let granule = random() % granules;
                set(&mut words, granule..granule + 1);
            }),
            Self::Clustered => (0..100).for_each(|_| {
                let start = random() % (granules - 1_000);
                set(&mut words, start..start + 1_000);
            }),
            Self::Half => words.fill_with(random),
            Self::Full => words.fill(!0),
        }
        words
    }
}

pub(crate) fn set(words: &mut [u64], granules: Range<u64>) {
    granules.for_each(|granule| words[granule as usize / 64] |= 1 << (granule % 64));
}

pub(crate) fn reset(words: &mut [u64], granules: Range<u64>) {
    granules.for_each(|granule| words[granule as usize / 64] &= !(1 << (granule % 64)));
}

pub(crate) fn union(a: &[u64], b: &[u64]) -> Vec<u64> {
    let mut union = a.to_vec();
    dirty(b).for_each(|granule| set(&mut union, granule..granule + 1));
    union
}

/// The map that has a bit for 16 of those in `words`.
pub(crate) fn coarsened(words: &[u64]) -> Vec<u64> {
    let mut coarse = vec![0; words.len() / 16];
    dirty(words).for_each(|granule| set(&mut coarse, granule / 16..granule / 16 + 1));
    coarse
}

/// All granules that are dirty.
pub(crate) fn dirty(words: &[u64]) -> impl Iterator<Item = u64> {
    // The one shortcut: from a bit to the next, as the longest maps would take minutes.
    words.iter().enumerate().flat_map(|(index, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            let bit = left.trailing_zeros();
            let is_some = left != 0;
            left &= left.wrapping_sub(1);
            is_some.then_some(index as u64 * 64 + u64::from(bit))
        })
    })
}

/// What a walk over all that is dirty must come to, where positions count `unit` a granule: that of
/// the map walked over. All wraps, so that the sums of the longest maps have a value.
pub(crate) fn sum(words: &[u64], unit: u64) -> u64 {
    dirty(words).fold(0, u64::wrapping_add).wrapping_mul(unit)
}

/// All runs, in one value: how many, and the sums of where they start and of where they end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs {
    count: u64,
    starts: u64,
    ends: u64,
}

impl Runs {
    #[inline(always)]
    pub(crate) fn and(self, run: Range<u64>) -> Self {
        Self {
            count: self.count + 1,
            starts: self.starts.wrapping_add(run.start),
            ends: self.ends.wrapping_add(run.end),
        }
    }

    /// The runs that ascending positions make.
    #[inline(always)]
    pub(crate) fn joining(bits: impl Iterator<Item = u64>) -> Self {
        let mut runs = Self::default();
        for_each_run(bits, |run| runs = runs.and(run));
        runs
    }
}

#[inline(always)]
pub(crate) fn for_each_run(bits: impl Iterator<Item = u64>, take: impl FnMut(Range<u64>)) {
    let mut joiner = Joiner::new(take);
    bits.for_each(|bit| joiner.push(bit));
    joiner.end();
}

/// Makes runs of ascending positions.
pub(crate) struct Joiner<F: FnMut(Range<u64>)> {
    run: Range<u64>,
    take: F,
}

impl<F: FnMut(Range<u64>)> Joiner<F> {
    pub(crate) fn new(take: F) -> Self {
        Self { run: 0..0, take }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, bit: u64) {
        if bit != self.run.end {
            self.hand_out();
            self.run.start = bit;
        }
        self.run.end = bit + 1;
    }

    pub(crate) fn end(mut self) {
        self.hand_out();
    }

    #[inline(always)]
    fn hand_out(&mut self) {
        if !self.run.is_empty() {
            (self.take)(self.run.clone());
        }
    }
}

/// As [`sum`], of the runs.
pub(crate) fn runs(words: &[u64], unit: u64) -> Runs {
    let runs = Runs::joining(dirty(words));
    Runs {
        count: runs.count,
        starts: runs.starts.wrapping_mul(unit),
        ends: runs.ends.wrapping_mul(unit),
    }
}
