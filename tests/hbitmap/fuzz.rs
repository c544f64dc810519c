//! Everything that takes bytes or words from outside, fed with what nobody would send.
//!
//! [`one_input`] is a target for any fuzzer: it takes some bytes and makes calls of them. Here it is fed with random
//! bytes, and with files that were made and damaged, for a bounded number of seeds. `BLOCKJOB_SEED` is the first and
//! `BLOCKJOB_SEEDS` how many are run; a failure prints its seed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use blockjob::bitmap::TrackedBitmap;
use blockjob::bitmap::stored::{self, Decoder, Label};
use blockjob::{ByteRange, Granularity, HBitmap};

/// More memory than this no stored bitmap may ask for.
const MEMORY_MAX: u64 = 1 << 20;

/// What is left of an input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let [first, rest @ ..] = self.0 else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        (0..8).fold(0, |number, at| number | u64::from(self.byte()) << (at * 8))
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// Anything, or what is near a word or the end of a map.
    fn offset(&mut self, map: &HBitmap) -> u64 {
        let word = 64 << map.granularity().exponent().min(50);
        match self.byte() {
            0..40 => self.number(),
            40..80 => map
                .len()
                .wrapping_add(u64::from(self.byte()))
                .wrapping_sub(5),
            80..100 => 0,
            _ => u64::from(self.byte()) % (map.len() / word + 2) * word,
        }
    }

    fn range(&mut self, map: &HBitmap) -> ByteRange {
        let (a, b) = (self.offset(map), self.offset(map));
        (a.min(b)..a.max(b)).into()
    }
}

/// No panic, whatever the bytes, nothing has changed after an error, and what is accepted is sound.
fn one_input(bytes: &[u8]) {
    decoded_alike(bytes);
    let mut input = Input(bytes);
    let granularity = Granularity::from_exponent(input.byte() % 64).expect("below 64");
    let len = input.number() >> (input.byte() % 64);
    let Ok(map) = HBitmap::new(len, granularity) else {
        return;
    };
    // What is accepted may well take 2 TiB.
    if map.granules() > 1 << 20 {
        return;
    }
    let mut map = TrackedBitmap::new(map, u64::from(input.byte()));
    while !input.0.is_empty() {
        let before = map.clone();
        let is_changed = call(&mut map, &mut input);
        map.bitmap().check_invariants();
        map.changes().check_invariants();
        match is_changed {
            None => assert_eq!(map, before, "an error has changed something"),
            Some(is_changed) => assert_eq!(is_changed, map.bitmap() != before.bitmap()),
        }
    }
    let clean = HBitmap::new(map.bitmap().len(), granularity).expect("there is one");
    assert_eq!(map.bitmap().is_clean(), *map.bitmap() == clean);
}

/// One call with what it takes from the input; whether that has changed the map, or nothing if it was refused.
fn call(map: &mut TrackedBitmap, input: &mut Input<'_>) -> Option<bool> {
    let mut plain = map.bitmap().clone();
    let choice = input.byte() % 10;
    let range = input.range(&plain);
    let count = usize::from(input.byte());
    let (done, plain_done) = match choice {
        0 => (map.set(range).ok(), plain.set(range).ok()),
        1 => (map.reset(range).ok(), plain.reset(range).ok()),
        2 => (map.reset_inner(range).ok(), plain.reset_inner(range).ok()),
        3 | 4 => {
            let bytes = input.bytes(count);
            (
                map.deserialize_part(range, bytes).ok(),
                plain.deserialize_part(range, bytes).ok(),
            )
        }
        5 => {
            // As long as it must be.
            let len = plain.serialized_len(range).unwrap_or(count).min(1 << 16);
            let mut bytes = input.bytes(len).to_vec();
            bytes.resize(len, input.byte());
            (
                map.deserialize_part(range, &bytes).ok(),
                plain.deserialize_part(range, &bytes).ok(),
            )
        }
        6 => (
            map.deserialize_zeroes(range).ok(),
            plain.deserialize_zeroes(range).ok(),
        ),
        7 => (
            map.deserialize_ones(range).ok(),
            plain.deserialize_ones(range).ok(),
        ),
        8 => {
            let words: Vec<u64> = (0..count % 20).map(|_| input.number()).collect();
            let first = match input.byte() {
                0..20 => usize::MAX - usize::from(input.byte() % 3),
                at => usize::from(at) * plain.word_count() / 200,
            };
            (
                map.import_words(first, &words).ok(),
                plain.import_words(first, &words).ok(),
            )
        }
        _ => {
            let words: Vec<u64> = (0..count).map(|_| input.number()).collect();
            match HBitmap::from_words(plain.len(), plain.granularity(), &words) {
                Ok(other) => {
                    other.check_invariants();
                    (map.merge_from(&other).ok(), plain.merge_from(&other).ok())
                }
                Err(_) => (None, None),
            }
        }
    };
    assert_eq!(done, plain_done, "with marks and without");
    assert_eq!(map.bitmap(), &plain, "with marks and without");
    done
}

/// The three ways to read a stored bitmap say the same.
fn decoded_alike(bytes: &[u8]) {
    let at_once = stored::decode(bytes, MEMORY_MAX);
    let read = stored::read(&mut &bytes[..], MEMORY_MAX);
    let mut decoder = Decoder::new(MEMORY_MAX);
    let step = 1 + bytes.len() % 37;
    let mut is_fed = true;
    for piece in bytes.chunks(step) {
        is_fed &= decoder.feed(piece).is_ok();
    }
    let in_pieces = decoder.finish();
    if let Ok(stored) = &at_once {
        stored.bitmap.check_invariants();
        let in_pieces = in_pieces.expect("it is whole");
        assert!(is_fed && in_pieces.bitmap == stored.bitmap);
        assert_eq!(read.expect("it is whole").bitmap, stored.bitmap);
    } else if !bytes.is_empty() {
        assert!(in_pieces.is_err() || !is_fed, "taken in pieces only");
    }
}

/// Numbers that look random (splitmix64).
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// Random bytes, some of which begin as sensible ones do, or a file that was stored and then damaged, or not.
fn input(seed: u64) -> Vec<u8> {
    let mut random = random(seed);
    let mut bytes: Vec<u8> = (0..random() % 400).map(|_| random() as u8).collect();
    if seed.is_multiple_of(3) {
        // A length that comes to some thousand granules of 64 bytes or so.
        let start = [6, 0x77, random() as u8, 0, 0, 0, 0, 0, 0, 0, 8];
        bytes.splice(0..0, start);
        return bytes;
    }
    if seed % 3 == 1 {
        return bytes;
    }
    let len = random() >> (random() % 20 + 40);
    let granularity = Granularity::from_exponent((random() % 8) as u8).expect("below 64");
    let mut map = HBitmap::new(len, granularity).expect("it is short");
    for _ in 0..random() % 20 {
        let start = random() % (len + 1);
        let end = start + random() % (len - start + 1).min(1 << (random() % 24));
        map.set(start..end).expect("it is in the map");
    }
    let mut file = stored::encode(&map, Label::default());
    match random() % 4 {
        0 => {}
        1 => file.truncate((random() % (file.len() as u64 + 1)) as usize),
        _ => {
            for _ in 0..1 + random() % 3 {
                let at = (random() % file.len() as u64) as usize;
                file[at] ^= 1 << (random() % 8);
            }
        }
    }
    file
}

/// Enough of them to find out what is broken.
#[cfg(debug_assertions)]
pub(crate) fn some_inputs() {
    (0..300).for_each(|seed| one_input(&input(seed)));
}

#[test]
fn no_input_does_harm() {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let first = number("BLOCKJOB_SEED").unwrap_or(0);
    let count = number("BLOCKJOB_SEEDS").unwrap_or(5_000);
    println!("BLOCKJOB_SEED={first} BLOCKJOB_SEEDS={count}");
    for seed in first..first + count {
        let input = input(seed);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| one_input(&input))) {
            eprintln!(
                "seed {seed} failed; again with:\n  \
                 BLOCKJOB_SEED={seed} BLOCKJOB_SEEDS=1 cargo test --test hbitmap no_input_does_harm"
            );
            resume_unwind(panic);
        }
    }
}
