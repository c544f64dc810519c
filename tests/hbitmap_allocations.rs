//! What takes memory, and how much.
//!
//! In a file of its own because it brings its own allocator, which counts per thread.

use blockjob::bitmap::stored::{self, DecodeError, Decoder, Label};
use blockjob::bitmap::{CreateError, TrackedBitmap};
use blockjob::{Granularity, HBitmap};

/// 2^24 granules.
const LEN: u64 = 1 << 40;

fn map() -> HBitmap {
    HBitmap::new(LEN, Granularity::DEFAULT).unwrap()
}

/// Times that memory was asked for, and the most bytes held at once.
fn taken<T>(work: impl FnOnce() -> T) -> (u64, u64) {
    let counted = allocation_counter::measure(|| drop(work()));
    (counted.count_total, counted.bytes_max)
}

#[test]
fn memory_is_taken_when_a_granule_gets_dirty() {
    check_first_granule();
    #[cfg(debug_assertions)]
    {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        break_on_this_thread(Some(Sabotage::TakeMemoryAtOnce));
        let found = std::panic::catch_unwind(check_first_granule);
        break_on_this_thread(None);
        assert!(found.is_err(), "goes unnoticed");
    }
}

fn check_first_granule() {
    assert_eq!(taken(map), (0, 0));
    let mut map = map();
    assert_eq!(taken(|| map.reset(0..LEN)), (0, 0));
    let all = taken(|| map.set_at(LEN / 2));
    assert!(all.1 >= LEN >> 19, "{all:?}");
    assert_eq!(taken(|| (map.set(0..LEN / 3), map.reset_all())), (0, 0));
    assert_eq!(taken(|| map.clone()), (0, 0), "a clean one has none");
}

#[test]
fn what_is_clean_is_loaded_without_memory() {
    let mut map = map();
    let all = vec![0; 2 << 20];
    let zeroes = vec![0; 1 << 20];
    let nothing = taken(|| {
        assert_eq!(map.deserialize_part(0..LEN / 2, &zeroes), Ok(false));
        assert_eq!(map.deserialize_part(0..LEN, &all), Ok(false));
        assert_eq!(map.deserialize_zeroes(0..LEN), Ok(false));
        assert_eq!(map.import_words(77, &[0; 100]), Ok(false));
        assert_eq!(map.deserialize_ones(0..0), Ok(false));
        assert_eq!(map.truncate(LEN + 1), Ok(()));
        assert_eq!(map.truncate(LEN), Ok(()));
    });
    assert_eq!(nothing, (0, 0));
    let all = taken(|| {
        assert_eq!(map.import_words(77, &[1]), Ok(true));
    });
    assert!(all.1 >= LEN >> 19, "{all:?}");
}

/// Memory for words that is given back comes again when zeroes are asked for, and is written as a whole then. So
/// what a map needs is known before it is asked for.
#[test]
fn what_is_loaded_takes_memory_once() {
    const PAGE: usize = 512;
    let all_taken = |work: &dyn Fn() -> HBitmap| {
        let mut made = None;
        let counted = allocation_counter::measure(|| made = Some(work()));
        (counted.bytes_total, made.unwrap())
    };
    let once = all_taken(&|| {
        let mut map = map();
        map.reserve().unwrap();
        map
    });
    let mixed = vec![0x5a; (LEN >> 22) as usize];
    let but_for = |pages: &[usize], word: u64| {
        let mut words = mixed.clone();
        for page in pages {
            words[page * PAGE..][..PAGE].fill(word);
        }
        words
    };
    let last = mixed.len() / PAGE - 1;
    let mut first_granule = vec![0; mixed.len()];
    first_granule[0] = 1;
    let loaded = [
        mixed.clone(),
        first_granule,
        but_for(&[0], 0),
        but_for(&[0], !0),
        but_for(&[1], 0),
        but_for(&[last / 2, last], !0),
        but_for(&[last], 0),
    ];
    for (case, words) in loaded.iter().enumerate() {
        let load = || HBitmap::from_words(LEN, Granularity::DEFAULT, words).unwrap();
        let (taken, map) = all_taken(&load);
        assert_eq!(taken, once.0, "case {case}");
        let mut held = vec![0; words.len()];
        map.export_words(0, &mut held).unwrap();
        assert_eq!(held, *words, "case {case}");
    }
}

#[test]
fn a_map_that_has_memory_asks_for_none() {
    let mut map = map();
    map.reserve().unwrap();
    let part = vec![0x5a; 1 << 21];
    let mut out = vec![0; 1 << 21];
    let nothing = taken(|| {
        assert_eq!(map.deserialize_part(0..LEN, &part), Ok(true));
        map.serialize_part(0..LEN, &mut out).unwrap();
        assert_eq!(map.deserialize_ones(0..LEN), Ok(true));
        assert_eq!(map.deserialize_zeroes(0..LEN), Ok(true));
    });
    assert_eq!(nothing, (0, 0));
    assert_eq!(out, part);
}

#[test]
fn a_tracked_map_that_has_memory_asks_for_none() {
    let mut map = TrackedBitmap::new(map(), 1024);
    map.reserve().unwrap();
    let part = vec![0x5a; 1 << 21];
    let mut other = self::map();
    other.set(LEN / 3..LEN / 2).unwrap();
    let nothing = taken(|| {
        map.deserialize_part(0..LEN, &part).unwrap();
        map.set(5..LEN / 2).unwrap();
        map.reset(0..LEN / 2).unwrap();
        map.merge_from(&other).unwrap();
        map.subtract(&other).unwrap();
        map.retain(&other).unwrap();
        map.copy_from(&other).unwrap();
        map.clear_changes(0..LEN).unwrap();
    });
    assert_eq!(nothing, (0, 0));
}

#[test]
fn a_tracked_map_that_stays_clean_asks_for_none() {
    let mut map = TrackedBitmap::new(map(), 1024);
    let all = vec![0; 2 << 20];
    let words = vec![0; 1 << 18];
    let nothing = taken(|| {
        assert_eq!(map.deserialize_ones(0..0), Ok(false));
        assert_eq!(map.deserialize_zeroes(0..LEN), Ok(false));
        assert_eq!(map.deserialize_part(0..LEN, &all), Ok(false));
        assert_eq!(map.import_words(0, &words), Ok(false));
        assert_eq!(map.import_words(5, &[]), Ok(false));
    });
    assert_eq!(nothing, (0, 0));
}

#[test]
fn storing_takes_a_buffer_and_no_copy_of_the_map() {
    let mut map = map();
    for start in (0..LEN).step_by(3 << 16) {
        map.set_at(start).unwrap();
    }
    let (_, most) = taken(|| stored::write(&map, Label::default(), &mut std::io::sink()).unwrap());
    assert!(most < 100 << 10, "{most} bytes");
    let bytes = stored::encode(&map, Label::default());
    let (_, most) = taken(|| stored::read(&mut &bytes[..], 4 << 20).unwrap());
    assert!(
        (2 << 20..(2 << 20) + (200 << 10)).contains(&most),
        "{most} bytes"
    );
}

/// What a header asks for is refused before it is asked for, and what was not dirty is never asked for.
#[test]
fn a_lie_takes_no_memory() {
    let mut map = map();
    let clean = stored::encode(&map, Label::default());
    map.set_all();
    let dirty = stored::encode(&map, Label::default());
    for bytes in [&clean, &dirty] {
        let refused = taken(|| {
            let error = stored::decode(bytes, 1 << 20).unwrap_err();
            assert!(matches!(error, DecodeError::TooLarge { .. }));
        });
        assert_eq!(refused, (0, 0));
    }
    let nothing = taken(|| {
        let mut decoder = Decoder::new(4 << 20);
        decoder.feed(&clean).unwrap();
        assert!(decoder.finish().unwrap().bitmap.is_clean());
    });
    assert_eq!(nothing, (0, 0));
}

#[test]
fn memory_is_taken_once_and_after_all_checks() {
    let len = HBitmap::LEN_MAX + 1;
    let nothing = taken(|| {
        let error = HBitmap::from_words(len, Granularity::DEFAULT, &[1]).unwrap_err();
        assert_eq!(error, CreateError::TooLong { len }.into());
        assert!(HBitmap::from_words(LEN, Granularity::DEFAULT, &[1]).is_err());
    });
    assert_eq!(nothing, (0, 0));
}
