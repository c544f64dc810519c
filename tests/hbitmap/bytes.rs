//! Parts as bytes and words, and back.

use std::ops::Range;

use blockjob::HBitmap;
use blockjob::bitmap::{CreateError, LoadError, PartError, WordsError};
use proptest::prelude::*;

use crate::model::{Kind, Op, Subject, scenarios};
use crate::twin::*;

/// The bytes of some words, bit by bit as the format has it.
fn naive_bytes(twin: &Twin, words: Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; words.len() * 8];
    for (granule, dirty) in twin.dirty.iter().enumerate() {
        if *dirty && words.contains(&(granule / 64)) {
            let at = granule - words.start * 64;
            bytes[at / 8] |= 1 << (at % 8);
        }
    }
    bytes
}

/// The part of a range; what was in the buffer must not matter.
fn part_of(map: &HBitmap, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0xa5; map.serialized_len(range.clone()).unwrap()];
    map.serialize_part(range, &mut bytes).unwrap();
    bytes
}

/// Parts of so many words each, from the beginning to the end.
fn parts(map: &HBitmap, words: u64) -> Vec<Range<u64>> {
    let chunk = map.coverage(words * 8);
    let count = map.len().div_ceil(chunk);
    let start = |part: u64| part * chunk;
    (0..count)
        .map(|part| start(part)..map.len().min(start(part).saturating_add(chunk)))
        .collect()
}

// --- Sizes and places --------------------------------------------------------------------------

#[test]
fn serialize_align_is_64_granules() {
    for exponent in 0..=57 {
        let map = map(1000, exponent);
        assert_eq!(map.part_align(), Some(64 << exponent));
        assert_eq!(map.coverage(7), 0);
        assert_eq!(map.coverage(8), 64 << exponent);
        assert_eq!(map.coverage(15), 64 << exponent);
    }
    assert_eq!(map(1000, 16).coverage(1024), 8192 << 16);
    assert_eq!(map(1000, 57).coverage(16), u64::MAX);
    assert_eq!(map(1000, 0).coverage(u64::MAX), u64::MAX);
}

#[test]
fn too_coarse_maps_have_no_parts() {
    for exponent in 58..=63 {
        let mut map = map_of(HBitmap::LEN_MAX, exponent, &[5..6]);
        let error = PartError::TooCoarse {
            granularity: granularity(exponent),
        };
        assert_eq!(map.part_align(), None);
        assert_eq!((map.coverage(0), map.coverage(8)), (0, u64::MAX));
        assert_eq!(map.serialized_len(0..map.len()), Err(error));
        assert_eq!(map.serialize_part(0..0, &mut []), Err(error));
        let error = LoadError::Part(error);
        assert_eq!(map.deserialize_zeroes(0..map.len()), Err(error));
        assert_eq!(map.deserialize_ones(0..map.len()), Err(error));
        assert_eq!(map.deserialize_part(0..map.len(), &[0; 8]), Err(error));
        // Words need no offsets.
        let mut words = [0];
        map.export_words(0, &mut words).unwrap();
        assert_eq!(words, [1]);
        assert_eq!(map.import_words(0, &[0]), Ok(true));
        assert!(map.is_clean());
    }
}

#[test]
fn parts_begin_and_end_with_words_or_with_the_map() {
    for exponent in [0, 1, 4, 16] {
        let granule = 1u64 << exponent;
        let len = (200 << exponent) - granule / 2;
        let map = map_of(len, exponent, &[0..len]);
        let align = map.part_align().unwrap();
        let part = |range: Range<u64>| map.serialized_len(range);
        assert_eq!(part(0..align), Ok(8));
        assert_eq!(part(align..3 * align), Ok(16));
        assert_eq!(part(0..len), Ok(32));
        assert_eq!(part(3 * align..len), Ok(8));
        // Anywhere in the last granule is the end.
        assert_eq!(part(3 * align..200 << exponent), Ok(8));
        assert_eq!(part(0..(199 << exponent) + 1), Ok(32));
        for at in [0, 1, align, len, u64::MAX] {
            assert_eq!(part(at..at), Ok(0), "an empty part");
        }

        let unaligned = |range: Range<u64>| {
            let range = range.into();
            assert_eq!(
                map.serialized_len(range),
                Err(PartError::Unaligned { range, align })
            );
        };
        unaligned(1..align);
        unaligned(0..1);
        unaligned(granule * 32..align * 2);
        unaligned(0..align + 1);
        unaligned(0..199 << exponent);
        unaligned(align - 1..len);
        let outside = |range: Range<u64>| {
            let range = range.into();
            assert_eq!(
                map.serialized_len(range),
                Err(PartError::OutOfBounds { range, len })
            );
        };
        outside(0..(200 << exponent) + 1);
        outside(0..4 * align);
        outside(4 * align..5 * align);
        outside(0..u64::MAX);
        outside(u64::MAX - 1..u64::MAX);
        outside(len + align..len + align + 1);
    }
}

// --- What is written ---------------------------------------------------------------------------

#[test]
fn serialize_basic_has_every_granule_at_its_place() {
    let boundaries = [
        0,
        1,
        L1 - 1,
        L1,
        L1 + 1,
        L2 - 1,
        L2,
        L2 + 1,
        L2 * 2,
        L3 / 2,
        L3 - 1,
        L3,
    ];
    for exponent in [0, 4] {
        for start in boundaries {
            for end in boundaries.into_iter().filter(|end| *end >= start) {
                let mut map = map(L3 << exponent, exponent);
                let mut twin = Twin::new(L3 << exponent, exponent);
                let range = start << exponent..end << exponent;
                map.set(range.clone()).unwrap();
                twin.set(range);
                let whole = part_of(&map, 0..map.len());
                assert_eq!(whole, naive_bytes(&twin, 0..twin.word_count()));

                let mut copy = HBitmap::new(map.len(), map.granularity()).unwrap();
                let has_changed = copy.deserialize_part(0..map.len(), &whole);
                assert_eq!(has_changed, Ok(start < end));
                assert_same(&copy, &twin);
                assert_eq!(copy, map);
            }
        }
    }
}

#[test]
fn serialize_part_puts_each_granule_into_its_part() {
    let mut map = map(L3 + 70, 0);
    let granules = [0, 1, 63, 64, L2 - 1, L2, L2 + 65, L3 - 1, L3, L3 + 69];
    for granule in granules {
        map.set_at(granule).unwrap();
    }
    for words in [1, 2, 7, 64, 65, 128] {
        let chunk = map.coverage(words * 8);
        for range in parts(&map, words) {
            let bytes = part_of(&map, range.clone());
            for granule in range.clone() {
                let at = granule - range.start;
                let bit = bytes[(at / 8) as usize] >> (at % 8) & 1;
                assert_eq!(
                    bit == 1,
                    granules.contains(&granule),
                    "{granule} of {chunk}"
                );
            }
        }
    }
}

/// Full words and full blocks that nobody has written are written as what they are.
#[test]
pub(crate) fn full_words_are_written_out() {
    for (start, end) in [
        (0, L3),
        (64, 128),
        (L2, 2 * L2),
        (1, L3 - 1),
        (100, L2 * 3 + 100),
    ] {
        let map = map_of(L3 + 9, 0, &[start..end]);
        let mut twin = Twin::new(L3 + 9, 0);
        twin.set(start..end);
        assert_eq!(
            part_of(&map, 0..map.len()),
            naive_bytes(&twin, 0..twin.word_count())
        );
        for words in [1, 64, 100] {
            let bytes: Vec<u8> = parts(&map, words)
                .into_iter()
                .flat_map(|range| part_of(&map, range))
                .collect();
            assert_eq!(bytes, naive_bytes(&twin, 0..twin.word_count()));
        }
    }
}

// --- What is loaded ----------------------------------------------------------------------------

#[test]
fn serialize_zeroes_removes_exactly_what_is_loaded_as_zeroes() {
    for exponent in [0, 4] {
        let len = (L3 << exponent) - 1;
        for words in [1, 3, 64, 1000] {
            let mut map = map_of(len, exponent, &[0..len]);
            let mut twin = Twin::new(len, exponent);
            twin.set(0..len);
            for range in parts(&map, words).into_iter().step_by(2) {
                assert_eq!(map.deserialize_zeroes(range.clone()), Ok(true));
                assert_eq!(map.deserialize_zeroes(range.clone()), Ok(false));
                twin.reset(range);
            }
            assert_same(&map, &twin);
        }
    }
}

/// Bits past the end are dropped on every way in. Otherwise they would be found and counted, and come
/// alive when the map grows.
#[test]
pub(crate) fn padding_is_dropped_however_it_comes() {
    for granules in [1, 63, 65, 100, L2 - 1, L2 + 1, L2 + 100, L3 + 1] {
        let ones = vec![0xff; (granules.div_ceil(64) * 8) as usize];
        let words = vec![!0; granules.div_ceil(64) as usize];
        type Way = fn(&mut HBitmap, &[u8], &[u64]) -> bool;
        let ways: [Way; 4] = [
            |map, ones, _| map.deserialize_part(0..map.len(), ones).unwrap(),
            |map, _, _| map.deserialize_ones(0..map.len()).unwrap(),
            |map, _, words| map.import_words(0, words).unwrap(),
            |map, _, words| {
                *map = HBitmap::from_words(map.len(), map.granularity(), words).unwrap();
                true
            },
        ];
        for load in ways {
            for mut map in [map(granules, 0), map_of(granules, 0, &[0..1])] {
                load(&mut map, &ones, &words);
                map.check_invariants();
                assert_eq!(map.count(), granules);
                assert!(map.iter().eq(0..granules));
                assert_eq!(map, map_of(granules, 0, &[0..granules]));
                let mut last = [0; 1];
                map.export_words(words.len() - 1, &mut last).unwrap();
                assert_eq!(u64::from(last[0].count_ones()), (granules - 1) % 64 + 1);

                map.truncate(granules + 64).unwrap();
                assert_eq!(map.count(), granules, "nothing comes alive");
                assert_eq!(map.reset(0..granules), Ok(true));
                assert!(map.is_clean() && map.iter().next().is_none());
                map.check_invariants();
            }
        }
    }
}

#[test]
fn a_map_of_no_bytes_has_an_empty_part() {
    for exponent in [0, 16, 57] {
        let mut map = map(0, exponent);
        assert_eq!(map.serialized_len(0..0), Ok(0));
        assert_eq!(map.serialize_part(0..0, &mut []), Ok(()));
        assert_eq!(map.deserialize_part(0..0, &[]), Ok(false));
        assert_eq!(map.deserialize_zeroes(0..0), Ok(false));
        assert_eq!(map.deserialize_ones(0..0), Ok(false));
        assert!(map.deserialize_ones(0..1).is_err());
        assert_eq!(map.word_count(), 0);
        assert_eq!(map.import_words(0, &[]), Ok(false));
        assert!(map.import_words(0, &[0]).is_err());
        assert_eq!(
            HBitmap::from_words(0, map.granularity(), &[]),
            Ok(map.clone())
        );
        assert_same(&map, &Twin::new(0, exponent));
    }
}

/// What was loaded can be asked about at once, part after part.
#[test]
pub(crate) fn a_map_is_sound_after_every_part() {
    let mut twin = Twin::new(L3 + 77, 0);
    let mut map = map(L3 + 77, 0);
    let bytes = Kind::Uniform(7).words(twin.word_count());
    for range in [0..64, 4000..4097, 64..65, 65..300, 0..64, 3000..3500] {
        let words = &bytes[range.clone()];
        let part: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        map.deserialize_part(twin.bytes_of_words(range.clone()), &part)
            .unwrap();
        twin.import_words(range.start, words);
        assert_same(&map, &twin);
        for start in [0, 64, L2, L3 - 5, L3 + 70] {
            assert_same_answers(&map, &twin, start..map.len(), 1000);
        }
    }
}

proptest! {
    #![proptest_config(cases(150))]

    /// Any chunks in any order, some of them twice, on top of anything: the same map with the same bytes.
    #[test]
    fn what_is_serialized_and_loaded_is_the_same(
        (len, exponent, ops) in scenarios(),
        before in prop::collection::vec((0u64..300_000, 0u64..9000), 0..4),
        words in prop::sample::select(vec![1u64, 2, 3, 16, 63, 64, 65, 128, 5000]),
        order in any::<u64>(),
    ) {
        let mut map = map(len, exponent);
        for op in ops {
            if !matches!(op, Op::Truncate(..)) {
                map.change(&op);
            }
        }
        let before = before.into_iter().map(|(start, granules)| {
            let start = (start << exponent).min(len);
            start..(start + (granules << exponent)).min(len)
        });
        let mut copy = map_of(len, exponent, &before.collect::<Vec<_>>());
        let mut parts = parts(&map, words);
        parts.extend(parts.clone().into_iter().step_by(3));
        parts.sort_by_key(|part| (part.start ^ order).wrapping_mul(order | 1));
        for (at, part) in parts.into_iter().enumerate() {
            let bytes = part_of(&map, part.clone());
            let was_same = part_of(&copy, part.clone()) == bytes;
            let changed = if !map.any_dirty_in(part.clone()) && at % 2 == 0 {
                copy.deserialize_zeroes(part)
            } else if map.all_dirty_in(part.clone()) && at % 2 == 0 {
                copy.deserialize_ones(part)
            } else {
                copy.deserialize_part(part, &bytes)
            };
            prop_assert_eq!(changed, Ok(!was_same));
            copy.check_invariants();
        }
        prop_assert_eq!(&copy, &map);
        #[cfg(feature = "sha2")]
        prop_assert_eq!(copy.digest(), map.digest());
    }

    /// Whatever comes in: no panic, and an error leaves everything as it was.
    #[test]
    fn hostile_parts_change_nothing(
        (len, exponent, ops) in scenarios(),
        tries in prop::collection::vec((any::<u64>(), any::<u64>(), 0u32..64, 0usize..40, any::<u8>()), 1..30),
    ) {
        let mut map = map(len, exponent);
        for op in ops.iter().take(3) {
            map.change(op);
        }
        for (start, end, shift, bytes, fill) in tries {
            // Few of them are right: large numbers, multiples of a word, and what is near the map.
            let align = map.part_align().unwrap();
            let (start, end) = (start >> shift, end >> (shift / 2));
            let aligned = |at: u64| at % (map.len() / align + 2) * align;
            for range in [start..end, aligned(start)..aligned(end), aligned(start)..map.len()] {
                let before = map.clone();
                let bytes = vec![fill; bytes];
                let mut out = bytes.clone();
                let expected = map.serialized_len(range.clone());
                let fits = expected == Ok(bytes.len());
                prop_assert_eq!(map.serialize_part(range.clone(), &mut out).is_ok(), fits);
                prop_assert!(fits || out == bytes);
                let loaded = map.deserialize_part(range.clone(), &bytes);
                prop_assert_eq!(loaded.is_ok(), fits);
                prop_assert_eq!(loaded == Ok(true), map != before);
                for loaded in [map.clone().deserialize_zeroes(range.clone()), map.clone().deserialize_ones(range)] {
                    prop_assert_eq!(loaded.is_ok(), expected.is_ok());
                }
                map.check_invariants();
            }
        }
    }
}

#[test]
fn a_wrong_length_is_told() {
    let mut map = map_of(200, 0, &[10..190]);
    let before = map.clone();
    for found in [0, 1, 8, 31, 33, 40] {
        let error = PartError::Length {
            expected: 32,
            found,
        };
        let mut out = vec![0x77; found];
        assert_eq!(map.serialize_part(0..200, &mut out), Err(error));
        assert_eq!(out, vec![0x77; found]);
        assert_eq!(
            map.deserialize_part(0..200, &out),
            Err(LoadError::Part(error))
        );
    }
    assert_eq!(map, before);
}

// --- Words -------------------------------------------------------------------------------------

#[test]
fn words_are_those_of_the_map_wherever_they_begin() {
    for granules in [1, 64, 65, L2, L2 + 1, 5000, L3 + 1] {
        for kind in [
            Kind::Random(1),
            Kind::Sparse(2),
            Kind::Uniform(3),
            Kind::Dirty,
            Kind::Clean,
        ] {
            let mut twin = Twin::new(granules, 0);
            twin.import_words(0, &kind.words(twin.word_count()));
            let words = twin.words();
            let map = HBitmap::from_words(granules, granularity(0), &words).unwrap();
            assert_same(&map, &twin);
            let count = words.len();
            let edges = [0, 1, 62, 63, 64, 65, 129, count / 2, count - 1, count];
            for first in edges.into_iter().filter(|first| *first <= count) {
                for end in edges
                    .into_iter()
                    .filter(|end| (first..=count).contains(end))
                {
                    let mut out = vec![0x1234; end - first];
                    map.export_words(first, &mut out).unwrap();
                    assert_eq!(out, words[first..end], "{first}..{end} of {kind:?}");
                }
            }
        }
    }
}

#[test]
fn words_that_are_not_there_are_refused() {
    let mut map = map_of(1000, 0, &[3..700]);
    let before = map.clone();
    assert_eq!(map.word_count(), 16);
    for (first, count) in [
        (0, 17),
        (16, 1),
        (17, 0),
        (usize::MAX, 0),
        (usize::MAX, 2),
        (1, 16),
    ] {
        let error = WordsError::OutOfBounds {
            first,
            count,
            expected: 16,
        };
        let mut words = vec![7; count];
        assert_eq!(map.export_words(first, &mut words), Err(error));
        assert_eq!(words, vec![7; count]);
        assert_eq!(map.import_words(first, &words), Err(error));
    }
    for count in [0, 15, 17] {
        let error = WordsError::OutOfBounds {
            first: 0,
            count,
            expected: 16,
        };
        let words = vec![0; count];
        assert_eq!(
            HBitmap::from_words(1000, granularity(0), &words),
            Err(error)
        );
    }
    let len = HBitmap::LEN_MAX + 1;
    let error = WordsError::Create(CreateError::TooLong { len });
    assert_eq!(HBitmap::from_words(len, granularity(0), &[]), Err(error));
    assert_eq!(map, before);
}

#[test]
#[cfg(feature = "bitvec")]
fn bits_are_all_granules_and_no_more() {
    for granules in [0, 1, 64, 100, L2 + 1, L3 + 5] {
        let mut map = map(granules, 0);
        assert_eq!(
            (map.bits().len() as u64, map.bits().count_ones()),
            (granules, 0)
        );
        map.set_all();
        assert!(map.bits().all());
        assert_eq!(map.bits().count_ones() as u64, granules);
        map.check_invariants();
        if granules > 70 {
            map.reset(3..70).unwrap();
            assert!(
                map.bits()
                    .iter_ones()
                    .eq((0..3).chain(70..granules as usize))
            );
            map.check_invariants();
        }
    }
}

// --- Memory ------------------------------------------------------------------------------------

/// What is refused is an error before anything has changed. For what is clean nothing is asked.
#[test]
#[cfg(target_pointer_width = "64")]
fn loading_takes_memory_when_it_must_and_may_be_refused() {
    let len = HBitmap::GRANULES_MAX;
    let mut map = map(len, 0);
    if map.reserve().is_ok() {
        eprintln!("SKIPPED: this machine grants memory that it does not have");
        return;
    }
    assert_eq!(map.deserialize_part(8192..16_384, &[0; 1024]), Ok(false));
    assert_eq!(map.deserialize_zeroes(0..len), Ok(false));
    assert_eq!(map.import_words(1 << 30, &[0; 100]), Ok(false));
    assert_eq!(map.deserialize_ones(77..77), Ok(false));
    let refused = CreateError::OutOfMemory { granules: len };
    let error = LoadError::Create(refused);
    let mut bytes = [0; 1024];
    bytes[1000] = 1;
    assert_eq!(map.deserialize_part(8192..16_384, &bytes), Err(error));
    assert_eq!(map.deserialize_ones(0..64), Err(error));
    assert_eq!(
        map.import_words(5, &[0, 1]),
        Err(WordsError::Create(refused))
    );
    assert!(map.is_clean());
    map.check_invariants();
}

// --- Digest ------------------------------------------------------------------------------------

#[cfg(feature = "sha2")]
mod digest {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn is_that_of_the_bytes_and_of_one_word_at_least() {
        for granules in [0, 1, 64, 65, L2 - 1, L2, L2 * 9 + 64 * 700, L3 + 1] {
            for kind in [
                Kind::Random(1),
                Kind::Sparse(2),
                Kind::Uniform(3),
                Kind::Dirty,
                Kind::Clean,
            ] {
                let mut twin = Twin::new(granules, 0);
                twin.import_words(0, &kind.words(twin.word_count()));
                let mut bytes = naive_bytes(&twin, 0..twin.word_count());
                bytes.resize(bytes.len().max(8), 0);
                let map = map_like(&twin);
                assert_eq!(map.digest()[..], Sha256::digest(&bytes)[..]);
                let hex: String = map
                    .digest()
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                assert_eq!(map.digest_hex(), hex);
            }
        }
    }

    #[test]
    fn is_what_qemu_says() {
        let few = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc";
        for granules in [0, 1, 63, 64] {
            assert_eq!(map(granules, 0).digest_hex(), few);
        }
        let more = "374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb";
        assert_eq!(map(128 << 16, 16).digest_hex(), more);
        let len = 16 << 20;
        let map = map_of(len, 12, &[12_288..32_768, len - 1..len]);
        let dirty = "d1561f1f26d5ade186475efe4848d34f0d672812492f0251447ebc7a56f5abba";
        assert_eq!(map.digest_hex(), dirty);
    }

    #[test]
    fn differs_for_every_granule_and_not_for_how_it_came_about() {
        let clean = map(1000, 4);
        let mut used = map_of(1000, 4, &[0..1000]);
        used.reset_all();
        assert_eq!(used.digest(), clean.digest(), "used or not");
        let mut seen = vec![clean.digest()];
        for start in (0..1000).step_by(16) {
            let digest = map_of(1000, 4, &[start..start + 1]).digest();
            assert!(!seen.contains(&digest));
            seen.push(digest);
        }
    }
}
