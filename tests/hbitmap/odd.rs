//! Maps of any length whose blocks are full, empty and in between in all combinations, against a plain row of words.

use std::ops::Range;

use blockjob::HBitmap;
use proptest::prelude::*;

use crate::twin::{cases, granularity, map};

/// Words of a block.
const BLOCK: usize = 64;

/// What the words of a block are.
#[derive(Clone, Debug)]
enum Block {
    Empty,
    Full,
    Mixed(u64),
    /// All words are full but that one.
    FullBut(usize, u64),
    /// All words are empty but that one.
    EmptyBut(usize, u64),
    /// Full where there is a 1.
    Uniform(u64),
}

impl Block {
    fn word(&self, at: usize) -> u64 {
        match self {
            Block::Empty => 0,
            Block::Full => !0,
            Block::Mixed(seed) => (seed ^ at as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(at as u32),
            Block::FullBut(one, word) if at == *one => *word,
            Block::FullBut(..) => !0,
            Block::EmptyBut(one, word) if at == *one => *word,
            Block::EmptyBut(..) => 0,
            Block::Uniform(full) => (full >> at & 1).wrapping_neg(),
        }
    }
}

fn blocks() -> impl Strategy<Value = Vec<Block>> {
    // Some of them are what looks alike in both halves, and is not uniform.
    let word = || {
        prop_oneof![
            any::<u64>(),
            any::<u32>().prop_map(|half| u64::from(half) << 32 | u64::from(half)),
            (0u32..64).prop_map(|bit| 1 << bit),
            (0u32..64).prop_map(|bit| !(1 << bit)),
        ]
    };
    let block = prop_oneof![
        2 => Just(Block::Empty),
        2 => Just(Block::Full),
        2 => any::<u64>().prop_map(Block::Mixed),
        2 => (0..BLOCK, word()).prop_map(|(one, word)| Block::FullBut(one, word)),
        2 => (0..BLOCK, word()).prop_map(|(one, word)| Block::EmptyBut(one, word)),
        1 => any::<u64>().prop_map(Block::Uniform),
    ];
    // Repeated, they make pages of which each has a mixed word, and such that have none.
    prop::collection::vec(block, 1..12)
}

/// Any number of granules, also such that end amid a word, a block and a page of 4 KiB.
fn counts() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 1u64..300,
        3 => 1u64..20_000,
        2 => 1u64..100_000,
        1 => (1u64..4, -70i64..70).prop_map(|(pages, by)| (pages * 32_768).saturating_add_signed(by)),
        1 => (1u64..4, -2i64..=2).prop_map(|(blocks, by)| (blocks * 4096).saturating_add_signed(by)),
    ]
}

/// The simplest map: its bits.
#[derive(Clone, Debug, PartialEq)]
struct Plain {
    granules: u64,
    words: Vec<u64>,
}

impl Plain {
    fn of(granules: u64, blocks: &[Block]) -> Self {
        let mut plain = Self {
            granules,
            words: given(granules, blocks),
        };
        plain.trim();
        plain
    }

    fn trim(&mut self) {
        self.words.resize(self.granules.div_ceil(64) as usize, 0);
        if !self.granules.is_multiple_of(64) {
            *self.words.last_mut().unwrap() &= (1 << (self.granules % 64)) - 1;
        }
    }

    fn fill(&mut self, granules: Range<u64>, value: bool) -> bool {
        let mut is_changed = false;
        for granule in granules {
            let word = &mut self.words[(granule / 64) as usize];
            let before = *word;
            *word = *word & !(1 << (granule % 64)) | u64::from(value) << (granule % 64);
            is_changed |= *word != before;
        }
        is_changed
    }

    fn is_same(&self, map: &HBitmap) {
        map.check_invariants();
        let mut words = vec![0x55; self.words.len()];
        map.export_words(0, &mut words).unwrap();
        assert_eq!(words, self.words);
    }
}

/// The words that such a map is loaded from: padding has whatever comes.
fn given(granules: u64, blocks: &[Block]) -> Vec<u64> {
    let word = |at: usize| blocks[at / BLOCK % blocks.len()].word(at % BLOCK);
    (0..granules.div_ceil(64) as usize).map(word).collect()
}

/// The same map, of whose full words none was written where that can be.
fn unwritten(plain: &Plain) -> HBitmap {
    let mut map = map(plain.granules, 0);
    let is_dirty = |granule: u64| plain.words[(granule / 64) as usize] >> (granule % 64) & 1 == 1;
    let mut at = 0;
    while at < plain.granules {
        let end = (at..plain.granules).find(|&next| is_dirty(next) != is_dirty(at));
        let end = end.unwrap_or(plain.granules);
        if is_dirty(at) {
            map.set(at..end).unwrap();
        }
        at = end;
    }
    map
}

/// The same map, of whose full words all are written: they were mixed once.
fn written(plain: &Plain) -> HBitmap {
    let mut map = unwritten(plain);
    for (at, _) in plain
        .words
        .iter()
        .enumerate()
        .filter(|(_, word)| **word == !0)
    {
        map.reset(at as u64 * 64 + 7..at as u64 * 64 + 8).unwrap();
        map.set(at as u64 * 64 + 7..at as u64 * 64 + 8).unwrap();
    }
    map
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn whole_maps_of_any_length_are_loaded_cloned_compared_and_combined(
        granules in counts(),
        (blocks, others) in (blocks(), blocks()),
        (at, cut) in (any::<u64>(), any::<u64>()),
    ) {
        let (plain, other) = (Plain::of(granules, &blocks), Plain::of(granules, &others));
        let words = given(granules, &blocks);
        let loaded = HBitmap::from_words(granules, granularity(0), &words).unwrap();
        let mut parsed = map(granules, 0);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let is_changed = parsed.deserialize_part(0..granules, &bytes).unwrap();
        prop_assert_eq!(is_changed, plain.words.iter().any(|word| *word != 0));
        let used = || [unwritten(&other), written(&other), map(granules, 0)];
        let part = (at % (words.len() as u64 + 1)) as usize..words.len();
        let part = part.start..part.end - (cut % (part.len() as u64 + 1)) as usize;
        for mut used in used() {
            let mut words_after = vec![0; words.len()];
            used.export_words(0, &mut words_after).unwrap();
            words_after[part.clone()].copy_from_slice(&words[part.clone()]);
            let mut after = Plain { granules, words: words_after };
            after.trim();
            let is_changed = used != unwritten(&after);
            prop_assert_eq!(used.import_words(part.start, &words[part.clone()]), Ok(is_changed));
            after.is_same(&used);
        }
        let alike = [loaded, parsed, unwritten(&plain), written(&plain)];
        for one in &alike {
            plain.is_same(one);
            plain.is_same(&one.clone());
            for mut used in used() {
                used.clone_from(one);
                plain.is_same(&used);
                prop_assert_eq!(&used, one);
            }
            for other in &alike {
                prop_assert_eq!(one, other);
            }
            // One granule makes a difference, and is gone again.
            let at = at % granules;
            let is_dirty = one.is_dirty(at).unwrap();
            let mut changed = one.clone();
            let flip = |map: &mut HBitmap, dirty: bool| match dirty {
                true => map.set(at..at + 1).unwrap(),
                false => map.reset(at..at + 1).unwrap(),
            };
            prop_assert!(flip(&mut changed, !is_dirty));
            changed.check_invariants();
            prop_assert_ne!(&changed, one);
            prop_assert_ne!(one, &changed);
            prop_assert!(flip(&mut changed, is_dirty));
            prop_assert_eq!(&changed, one);

            for mut combined in used() {
                let before = combined.clone();
                let mut united = Plain { words: vec![0; plain.words.len()], ..plain };
                before.export_words(0, &mut united.words).unwrap();
                for (word, more) in united.words.iter_mut().zip(&plain.words) {
                    *word |= more;
                }
                prop_assert_eq!(combined.merge_from(one), Ok(before != unwritten(&united)));
                united.is_same(&combined);
                for (word, less) in united.words.iter_mut().zip(&plain.words) {
                    *word &= !less;
                }
                combined.subtract(one).unwrap();
                united.is_same(&combined);
            }

            let mut shortened = one.clone();
            let mut plain = plain.clone();
            for len in [cut % granules, granules, granules + cut % 5000] {
                shortened.truncate(len).unwrap();
                plain.granules = len;
                plain.trim();
                plain.is_same(&shortened);
                plain.is_same(&shortened.clone());
            }
        }
    }
}

/// Up to so many granules at once, which mostly begin near the end of a word, a block or the map.
fn short_runs(granules: u64) -> impl Strategy<Value = Range<u64>> {
    let near = (
        prop_oneof![
            2 => (0..granules.div_ceil(64)).prop_map(|word| word * 64),
            2 => (0..granules.div_ceil(4096)).prop_map(|block| block * 4096),
            1 => Just(granules),
        ],
        -66i64..66,
    );
    let near = near.prop_map(|(at, by)| at.saturating_add_signed(by));
    let start = prop_oneof![4 => near, 1 => 0..granules];
    let len = prop_oneof![6 => 0u64..=66, 1 => Just(4096), 1 => 0u64..9000];
    (start, len).prop_map(move |(start, len)| {
        let start = start.min(granules);
        start..(start + len).min(granules)
    })
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn short_runs_in_maps_of_any_length_are_set_and_reset(
        (blocks, is_written, granules, steps) in (blocks(), any::<bool>(), 1u64..13_000)
            .prop_flat_map(|(blocks, is_written, granules)| {
                let step = (any::<bool>(), short_runs(granules));
                let steps = prop::collection::vec(step, 1..60);
                (Just(blocks), Just(is_written), Just(granules), steps)
            }),
    ) {
        let mut plain = Plain::of(granules, &blocks);
        let mut map = match is_written {
            true => written(&plain),
            false => unwritten(&plain),
        };
        for (dirty, run) in steps {
            let has_changed = match dirty {
                true => map.set(run.clone()).unwrap(),
                false => map.reset(run.clone()).unwrap(),
            };
            prop_assert_eq!(has_changed, plain.fill(run.clone(), dirty), "{} {:?}", dirty, run);
            plain.is_same(&map);
        }
        prop_assert_eq!(&map, &unwritten(&plain));
    }
}
