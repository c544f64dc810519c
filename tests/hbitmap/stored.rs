//! The stored form: against a second implementation of the format, and against everything that can happen
//! to a file.

use std::io::{self, Read};
use std::sync::Arc;

use blockjob::HBitmap;
use blockjob::bitmap::CreateError;
use blockjob::bitmap::stored::{
    self, DecodeError, Decoder, Encoder, Header, Label, ReadError, Stored,
};
use proptest::prelude::*;

#[cfg(feature = "serde")]
use crate::model::Op;
use crate::model::{Kind, Subject, scenarios};
use crate::twin::*;

/// Enough for every map here.
const MEMORY_MAX: u64 = 1 << 20;

const LABEL: Label = Label {
    identity: *b"0123456789abcdef",
    generation: 0x1122_3344_5566_7788,
};

// --- The format once more ----------------------------------------------------------------------

/// A file as it is described, which need not make sense.
#[derive(Clone, Debug)]
struct File {
    exponent: u8,
    flags: u8,
    len: u64,
    label: Label,
    count: u64,
    /// Bytes of all records, if it is not what they have.
    records_len: Option<u64>,
    records: Vec<Record>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    kind: [u8; 4],
    chunks: u32,
    bits: Vec<u8>,
}

const CLEAN: u8 = 1;
const DIRTY: u8 = 2;
const BITS: u8 = 3;

impl File {
    /// What the file of a map should be.
    fn of(twin: &Twin, label: Label) -> Self {
        let words = twin.words();
        let mut records: Vec<Record> = Vec::new();
        for chunk in words.chunks(64) {
            let is_whole = chunk.len() == 64;
            let kind = match chunk {
                _ if chunk.iter().all(|word| *word == 0) => CLEAN,
                _ if chunk.iter().all(|word| *word == !0) && is_whole => DIRTY,
                _ => BITS,
            };
            let bytes = chunk.iter().flat_map(|word| word.to_le_bytes());
            let bits: Vec<u8> = bytes.filter(|_| kind == BITS).collect();
            match records.last_mut() {
                Some(last) if last.kind[0] == kind && !(kind == BITS && last.chunks == 64) => {
                    last.chunks += 1;
                    last.bits.extend(bits);
                }
                _ => records.push(Record {
                    kind: [kind, 0, 0, 0],
                    chunks: 1,
                    bits,
                }),
            }
        }
        Self {
            exponent: twin.granularity.exponent(),
            flags: 0,
            len: twin.len,
            label,
            count: twin.dirty.iter().filter(|dirty| **dirty).count() as u64,
            records_len: None,
            records,
        }
    }

    /// The bytes, with CRCs that are right.
    fn bytes(&self) -> Vec<u8> {
        let lens = self
            .records
            .iter()
            .map(|record| 12 + record.bits.len() as u64);
        let records_len = self.records_len.unwrap_or(lens.sum());
        let head = |flags: u8| {
            let mut head = b"BJHBITMP\x01\x00".to_vec();
            head.extend([self.exponent, flags]);
            let mut rest = self.len.to_le_bytes().to_vec();
            rest.extend(self.label.identity);
            rest.extend(self.label.generation.to_le_bytes());
            rest.extend(self.count.to_le_bytes());
            rest.extend(records_len.to_le_bytes());
            (head, rest)
        };
        let (head_0, rest) = head(0);
        let mut covered = [head_0, rest].concat();
        let (head, rest) = head(self.flags);
        let crc = crc32fast::hash(&[&head[..], &rest].concat());
        let mut bytes = [&head[..], &crc.to_le_bytes(), &rest].concat();
        for Record { kind, chunks, bits } in &self.records {
            let record = [&kind[..], &chunks.to_le_bytes(), bits].concat();
            covered.extend(&record);
            bytes.extend(&record);
            bytes.extend(crc32fast::hash(&covered).to_le_bytes());
        }
        bytes
    }
}

fn decode(bytes: &[u8]) -> Result<HBitmap, DecodeError> {
    stored::decode(bytes, MEMORY_MAX).map(|stored| {
        stored.bitmap.check_invariants();
        stored.bitmap
    })
}

/// One of each kind of record, and more than one of some; the last chunk is partial.
fn sample() -> Twin {
    let mut twin = Twin::new((L2 * 9 + 100) * 16 - 3, 4);
    for granules in [
        L2 + 5..L2 + 9,
        3 * L2..6 * L2,
        6 * L2 + 1..7 * L2,
        9 * L2 + 80..9 * L2 + 100,
    ] {
        twin.set(granules.start * 16..(granules.end * 16).min(twin.len));
    }
    twin
}

// --- What is written ---------------------------------------------------------------------------

#[test]
fn a_file_is_these_bytes() {
    let map = map_of(100 << 16, 16, &[0..1, 99 << 16..100 << 16]);
    let label = Label {
        identity: [0xee; 16],
        generation: 5,
    };
    let expected = [
        &b"BJHBITMP"[..],
        // Version, granularity, flags and CRC.
        &[1, 0, 16, 0, 0x86, 0x88, 0x8a, 0x7a],
        // 6,553,600 bytes.
        &[0, 0, 0x64, 0, 0, 0, 0, 0],
        &[0xee; 16],
        &[5, 0, 0, 0, 0, 0, 0, 0],
        // Two granules, 28 bytes of records.
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &[28, 0, 0, 0, 0, 0, 0, 0],
        // Bits of one chunk, which is as short as the map, and the CRC of all.
        &[3, 0, 0, 0, 1, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 8, 0, 0, 0],
        &[0xcd, 0xeb, 0xc8, 0x32],
    ];
    let bytes = stored::encode(&map, label);
    assert_eq!(bytes, expected.concat(), "{bytes:02x?}");
    assert_eq!(stored::decode(&bytes, MEMORY_MAX).unwrap().bitmap, map);
}

#[test]
fn a_file_is_as_the_format_has_it() {
    for granules in [
        0,
        1,
        64,
        65,
        L2 - 1,
        L2,
        L2 + 1,
        L2 * 64,
        L2 * 65 + 7,
        L3,
        L3 + 1,
    ] {
        for kind in [
            Kind::Random(1),
            Kind::Sparse(2),
            Kind::Uniform(3),
            Kind::Dirty,
            Kind::Clean,
        ] {
            let mut twin = Twin::new(granules, 0);
            twin.import_words(0, &kind.words(twin.word_count()));
            let bytes = stored::encode(&map_like(&twin), LABEL);
            assert_eq!(
                bytes,
                File::of(&twin, LABEL).bytes(),
                "{granules} of {kind:?}"
            );
            assert_eq!(decode(&bytes), Ok(map_like(&twin)));
        }
    }
    let sample = sample();
    let file = File::of(&sample, LABEL);
    let kinds: Vec<_> = file
        .records
        .iter()
        .map(|record| (record.kind[0], record.chunks))
        .collect();
    let expected = [
        (CLEAN, 1),
        (BITS, 1),
        (CLEAN, 1),
        (DIRTY, 3),
        (BITS, 1),
        (CLEAN, 2),
        (BITS, 1),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(stored::encode(&map_like(&sample), LABEL), file.bytes());
}

#[test]
fn what_is_clean_or_dirty_takes_next_to_no_room() {
    let len = 64 << 40;
    assert_eq!(stored::encode(&map(len, 16), LABEL).len(), 64 + 12);
    assert_eq!(
        stored::encode(&map_of(len, 16, &[0..len]), LABEL).len(),
        64 + 12
    );
    let few = map_of(len, 16, &[0..1, len / 2..len / 2 + 1]);
    assert_eq!(stored::encode(&few, LABEL).len(), 64 + 4 * 12 + 2 * 512);
    assert_eq!(stored::encode(&map(0, 16), LABEL).len(), 64);
}

#[test]
fn the_same_map_gives_the_same_bytes() {
    let mut written = map_of(L3, 0, &[5..6, 70..L2 + 9]);
    written.set_all();
    let mut untouched = map(L3, 0);
    untouched.set_all();
    let bytes = stored::encode(&written, LABEL);
    assert_eq!(bytes, stored::encode(&untouched, LABEL));
    written.reset_all();
    assert_eq!(
        stored::encode(&written, LABEL),
        stored::encode(&map(L3, 0), LABEL)
    );
}

#[test]
fn the_header_says_what_was_stored() {
    let map = map_of(1_000_003, 9, &[0..70_000]);
    let encoder = Encoder::new(&map, LABEL);
    let bytes = stored::encode(&map, LABEL);
    let header = Header::from_bytes(bytes.first_chunk().unwrap()).unwrap();
    assert_eq!(header, encoder.header());
    assert_eq!(header.label(), LABEL);
    assert_eq!(
        (header.len(), header.granularity()),
        (map.len(), map.granularity())
    );
    assert_eq!((header.count(), header.is_in_use()), (map.count(), false));
    assert_eq!(header.total_len(), bytes.len() as u64);
    assert_eq!(header.to_bytes(), bytes[..64]);
    let marked = header.in_use();
    assert!(marked.is_in_use());
    assert_eq!(Header::from_bytes(&marked.to_bytes()), Ok(marked));
    assert_eq!(marked.label(), LABEL);
}

proptest! {
    #![proptest_config(cases(100))]

    /// However it is cut on the way out and on the way in.
    #[test]
    fn what_is_stored_and_loaded_is_the_same(
        (len, exponent, ops) in scenarios(),
        sizes in prop::collection::vec(prop_oneof![1usize..20, 500usize..600, 30_000usize..70_000], 1..6),
    ) {
        let mut map = map(len, exponent);
        for op in ops {
            map.change(&op);
        }
        let bytes = stored::encode(&map, LABEL);
        prop_assert_eq!(stored::decode(&bytes, 16 << 20).unwrap().bitmap, map.clone());

        let map = Arc::new(map);
        let mut encoder = Encoder::new(Arc::clone(&map), LABEL);
        let mut decoder = Decoder::new(16 << 20);
        let mut again: Vec<u8> = Vec::new();
        for size in sizes.into_iter().cycle() {
            let mut buf = vec![0; size];
            let len = encoder.next_bytes(&mut buf);
            prop_assert_eq!(decoder.feed(&buf[..len]), Ok(len));
            again.extend(&buf[..len]);
            prop_assert!(decoder.wanted() <= encoder.header().total_len() - again.len() as u64);
            if len < size {
                break;
            }
        }
        prop_assert_eq!(again, bytes);
        prop_assert_eq!(decoder.wanted(), 0);
        let stored = decoder.finish().unwrap();
        prop_assert_eq!(&stored.bitmap, &*map);
        prop_assert_eq!(stored.header.label(), LABEL);
    }
}

// --- What happens to files ---------------------------------------------------------------------

/// Every byte cut off, every bit flipped, anything behind it.
pub(crate) fn check_damage() {
    let map = map_like(&sample());
    let bytes = stored::encode(&map, LABEL);
    assert_eq!(decode(&bytes), Ok(map));
    for len in 0..bytes.len() {
        match decode(&bytes[..len]) {
            Err(DecodeError::Truncated { missing }) => {
                assert!(len < 64 || missing == (bytes.len() - len) as u64);
            }
            other => panic!("{len} bytes: {other:?}"),
        }
    }
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let damaged = decode(&bytes);
        assert!(damaged.is_err(), "bit {bit} flipped");
        let error = damaged.unwrap_err();
        let is_told = match bit / 8 {
            0..8 => error == DecodeError::NotABitmap,
            8..10 => matches!(error, DecodeError::Version { .. }),
            10..64 => error == DecodeError::HeaderDamaged,
            _ => matches!(
                error,
                DecodeError::Damaged { .. }
                    | DecodeError::RecordInvalid { .. }
                    | DecodeError::Truncated { .. }
            ),
        };
        assert!(is_told, "bit {bit}: {error:?}");
    }
    let trailing = [&bytes[..], &[0, 0]].concat();
    assert_eq!(decode(&trailing), Err(DecodeError::Trailing { bytes: 2 }));
}

#[test]
fn any_damage_is_found() {
    check_damage();
}

/// Records that are whole, each for itself, and not where they belong.
#[test]
fn records_belong_to_their_file_and_place() {
    let twin = sample();
    let file = File::of(&twin, LABEL).bytes();
    let other_label = Label {
        generation: LABEL.generation + 1,
        ..LABEL
    };
    let other = File::of(&twin, other_label).bytes();
    assert_eq!(file.len(), other.len());
    let mixed = [&file[..64], &other[64..]].concat();
    assert!(matches!(decode(&mixed), Err(DecodeError::Damaged { .. })));
    let half = file.len() / 2;
    assert!(decode(&[&file[..half], &other[half..]].concat()).is_err());

    // Two records of bits of one length that follow each other, and are exchanged.
    let mut twin = Twin::new(L2 * 128, 0);
    twin.import_words(0, &Kind::Random(3).words(64 * 128));
    let map = map_like(&twin);
    let bytes = stored::encode(&map, LABEL);
    let record = 12 + 64 * 512;
    assert_eq!(bytes.len(), 64 + 2 * record);
    let (first, second) = bytes[64..].split_at(record);
    assert!(decode(&[&bytes[..64], second, first].concat()).is_err());
    assert!(decode(&[&bytes[..64], first, first].concat()).is_err());
    assert_eq!(decode(&bytes), Ok(map));
}

#[test]
fn a_bitmap_in_use_is_refused() {
    check_in_use();
}

pub(crate) fn check_in_use() {
    let map = map_like(&sample());
    let mut bytes = stored::encode(&map, LABEL);
    let header = Header::from_bytes(bytes.first_chunk().unwrap()).unwrap();
    bytes[..64].copy_from_slice(&header.in_use().to_bytes());
    assert_eq!(decode(&bytes), Err(DecodeError::InUse));
    // The mark is all that is different: taken away again, the file is good.
    bytes[..64].copy_from_slice(&header.to_bytes());
    assert_eq!(decode(&bytes), Ok(map));
}

/// Headers that are undamaged and lie.
#[test]
fn headers_that_lie_are_refused() {
    let file = File::of(&sample(), LABEL);
    let refused = |change: &dyn Fn(&mut File)| {
        let mut file = file.clone();
        change(&mut file);
        decode(&file.bytes()).expect_err("it lies")
    };
    let invalid = DecodeError::HeaderInvalid;
    assert_eq!(refused(&|file| file.exponent = 64), invalid);
    assert_eq!(refused(&|file| file.flags = 2), invalid);
    assert_eq!(refused(&|file| file.flags = 0x81), invalid);
    assert_eq!(refused(&|file| file.count = L2 * 9 + 101), invalid);
    assert_eq!(refused(&|file| file.records_len = Some(0)), invalid);
    assert_eq!(refused(&|file| file.records_len = Some(u64::MAX)), invalid);
    let longest = 10 * (12 + 512);
    assert_eq!(
        refused(&|file| file.records_len = Some(longest + 1)),
        invalid
    );
    let truncated = |error| {
        matches!(
            error,
            DecodeError::Truncated { .. } | DecodeError::RecordInvalid { .. }
        )
    };
    assert!(truncated(refused(&|file| file.records_len = Some(longest))));
    let len = 1 << 63;
    assert_eq!(
        refused(&|file| file.len = len),
        CreateError::TooLong { len }.into()
    );
    let granules = HBitmap::GRANULES_MAX + 1;
    let error = CreateError::TooManyGranules { granules };
    assert_eq!(refused(&|file| file.len = granules << 4), error.into());
    let found = file.count;
    let count = |expected| DecodeError::Count { expected, found };
    assert_eq!(refused(&|file| file.count += 1), count(found + 1));
    assert_eq!(refused(&|file| file.count = 0), count(0));
    // A map of no bytes has no records.
    let empty = File::of(&Twin::new(0, 4), LABEL);
    assert_eq!(decode(&empty.bytes()), Ok(map(0, 4)));
    let mut lying = empty;
    lying.records = vec![Record {
        kind: [CLEAN, 0, 0, 0],
        chunks: 1,
        bits: vec![],
    }];
    assert_eq!(decode(&lying.bytes()), Err(invalid));
}

/// Records that are undamaged and lie.
#[test]
pub(crate) fn records_that_lie_are_refused() {
    let file = File::of(&sample(), LABEL);
    let refused = |change: &dyn Fn(&mut Vec<Record>)| {
        let mut file = file.clone();
        // What the header says of them shall not be what is found.
        change(&mut file.records);
        decode(&file.bytes()).expect_err("it lies")
    };
    let at = |offset| DecodeError::RecordInvalid { offset };
    assert_eq!(refused(&|records| records[0].kind[0] = 0), at(64));
    assert_eq!(refused(&|records| records[0].kind[0] = 4), at(64));
    assert_eq!(refused(&|records| records[0].kind[2] = 1), at(64));
    assert_eq!(refused(&|records| records[0].chunks = 0), at(64));
    assert_eq!(refused(&|records| records[0].chunks = 11), at(64));
    assert_eq!(refused(&|records| records[0].chunks = u32::MAX), at(64));
    assert_eq!(refused(&|records| records[1].chunks = 65), at(76));
    assert_eq!(refused(&|records| records[1].chunks = 0), at(76));
    // A chunk too many, one too few, and some after the last.
    assert!(matches!(
        refused(&|records| records[2].chunks = 2),
        DecodeError::RecordInvalid { .. }
    ));
    assert!(matches!(
        refused(&|records| drop(records.remove(2))),
        DecodeError::RecordInvalid { .. }
    ));
    assert!(matches!(
        refused(&|records| drop(records.pop())),
        DecodeError::RecordInvalid { .. }
    ));
    let again = |records: &mut Vec<Record>| records.push(records[0].clone());
    assert!(matches!(refused(&again), DecodeError::RecordInvalid { .. }));
    // What was dirty is said to be clean, and the other way round.
    assert!(matches!(
        refused(&|records| records[3].kind[0] = CLEAN),
        DecodeError::Count { .. }
    ));
    assert!(matches!(
        refused(&|records| records[5].kind[0] = DIRTY),
        DecodeError::Count { .. }
    ));
}

/// Not what is written here, and still what the format allows.
#[test]
fn other_ways_to_cut_records_are_read() {
    let twin = sample();
    let mut file = File::of(&twin, LABEL);
    let last = file.records.len() - 1;
    let three = file.records[3].clone();
    file.records[3].chunks = 1;
    file.records.insert(4, Record { chunks: 2, ..three });
    file.records[1] = Record {
        kind: [BITS, 0, 0, 0],
        chunks: 1,
        bits: file.records[1].bits.clone(),
    };
    file.records[0] = Record {
        kind: [BITS, 0, 0, 0],
        chunks: 1,
        bits: vec![0; 512],
    };
    assert_eq!(decode(&file.bytes()), Ok(map_like(&twin)));
    // Bits past the last granule are dropped, as from a part.
    let bits = &mut file.records[last + 1].bits;
    assert_eq!(bits.len(), 16);
    *bits.last_mut().unwrap() |= 0xf0;
    assert_eq!(decode(&file.bytes()), Ok(map_like(&twin)));

    // A last chunk that is partial may be dirty as a whole.
    let full = File {
        records: vec![Record {
            kind: [DIRTY, 0, 0, 0],
            chunks: 2,
            bits: vec![],
        }],
        count: L2 + 70,
        ..File::of(&Twin::new(L2 + 70, 0), LABEL)
    };
    assert_eq!(decode(&full.bytes()), Ok(map_of(L2 + 70, 0, &[0..L2 + 70])));
}

proptest! {
    #![proptest_config(cases(400))]

    /// Files whose CRCs are right and of which nothing else has to be: no panic, and what is taken is sound.
    #[test]
    fn honest_liars_do_no_harm(
        (len, exponent) in (prop_oneof![0u64..200_000, any::<u64>()], 0u8..70),
        (flags, count) in (0u8..3, prop_oneof![Just(None), any::<u64>().prop_map(Some)]),
        records_len in prop_oneof![4 => Just(None), 1 => (0u64..100_000).prop_map(Some)],
        records in prop::collection::vec((0u8..5, 0u32..70, 0usize..8), 0..20),
    ) {
        let records: Vec<_> = records
            .into_iter()
            .map(|(kind, chunks, short)| Record {
                kind: [kind, 0, 0, 0],
                chunks,
                bits: match kind {
                    BITS => vec![0x5a; (chunks as usize * 512).saturating_sub(short * 8)],
                    _ => vec![],
                },
            })
            .collect();
        let mut file = File { exponent, flags, len, label: LABEL, count: 0, records_len, records };
        file.count = count.unwrap_or(0);
        let found = match decode(&file.bytes()) {
            Err(DecodeError::Count { found, .. }) if count.is_none() => found,
            _ => return Ok(()),
        };
        file.count = found;
        let map = decode(&file.bytes()).unwrap();
        prop_assert_eq!((map.len(), map.count()), (len, found));
    }

    /// Any bytes, and those of a file that was damaged in several places.
    #[test]
    fn any_bytes_do_no_harm(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        prop_assert!(decode(&noise).is_err());
        let file = stored::encode(&map_like(&sample()), LABEL);
        prop_assert!(decode(&[&file[..64], &noise].concat()).is_err());
        let mut damaged = file.clone();
        for (at, byte) in damage {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        prop_assert_eq!(decode(&damaged).is_ok(), damaged == file);
        let cut = cut.index(file.len());
        prop_assert!(decode(&[&file[..cut], &file[cut + 1..]].concat()).is_err());
        prop_assert!(decode(&[&file[..cut], &[0x55], &file[cut..]].concat()).is_err());
    }
}

// --- Readers and writers -----------------------------------------------------------------------

/// Gives one byte at a time, and now and then none for no reason.
struct Drops<'a> {
    bytes: &'a [u8],
    reads: usize,
}

impl Read for Drops<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reads += 1;
        if self.reads.is_multiple_of(3) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = buf.len().min(1);
        self.bytes.read(&mut buf[..len])
    }
}

#[test]
fn a_reader_is_read_to_the_end_of_the_bitmap() {
    let map = map_like(&sample());
    let mut bytes = Vec::new();
    let written = stored::write(&map, LABEL, &mut bytes).unwrap();
    assert_eq!(written, bytes.len() as u64);
    assert_eq!(bytes, stored::encode(&map, LABEL));
    bytes.extend(b"and so on");
    let mut reader = &bytes[..];
    let Stored { header, bitmap } = stored::read(&mut reader, MEMORY_MAX).unwrap();
    assert_eq!((header.label(), bitmap), (LABEL, map.clone()));
    assert_eq!(reader, b"and so on");
    let mut drops = Drops {
        bytes: &bytes,
        reads: 0,
    };
    assert_eq!(stored::read(&mut drops, MEMORY_MAX).unwrap().bitmap, map);
    assert_eq!(drops.bytes, b"and so on");

    for len in [0, 1, 63, 64, 65, written as usize - 1] {
        let error = stored::read(&mut &bytes[..len], MEMORY_MAX).unwrap_err();
        assert!(
            matches!(error, ReadError::Decode(DecodeError::Truncated { .. })),
            "{len}: {error}"
        );
    }
    let mut no_reader = io::empty().chain(Broken);
    assert!(matches!(
        stored::read(&mut no_reader, MEMORY_MAX),
        Err(ReadError::Io(_))
    ));
    assert!(
        stored::write(&map, LABEL, &mut &mut [0; 100][..]).is_err(),
        "it is full"
    );
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other("broken"))
    }
}

/// Once it has failed it stays so, and says why.
#[test]
fn a_decoder_that_failed_stays_failed() {
    let mut bytes = stored::encode(&map_like(&sample()), LABEL);
    bytes[100] ^= 1;
    let mut decoder = Decoder::new(MEMORY_MAX);
    assert_eq!(decoder.feed(&bytes[..64]), Ok(64));
    assert!(decoder.header().is_some());
    let error = decoder.feed(&bytes[64..]).unwrap_err();
    assert!(matches!(error, DecodeError::Damaged { .. }));
    assert_eq!(decoder.feed(&[]), Err(error));
    assert_eq!(decoder.feed(&bytes), Err(error));
    assert_eq!((decoder.header(), decoder.wanted()), (None, 0));
    assert_eq!(decoder.finish(), Err(error));
}

#[test]
fn more_memory_than_allowed_is_not_asked_for() {
    check_memory();
}

pub(crate) fn check_memory() {
    let map = map_of(1 << 30, 9, &[0..1 << 30]);
    let bytes = stored::encode(&map, LABEL);
    // A bit for each of 2^21 granules, and a pair of 16 bytes for every 4096, 64 times that, ….
    let needed = (1 << 18) + (512 + 8 + 1) * 16;
    let memory_max = needed - 1;
    let error = DecodeError::TooLarge { needed, memory_max };
    let mut decoder = Decoder::new(memory_max);
    assert_eq!(
        decoder.feed(&bytes[..64]),
        Err(error),
        "before its bits come"
    );
    assert_eq!(stored::decode(&bytes, needed).unwrap().bitmap, map);
}

// --- In other formats --------------------------------------------------------------------------

#[cfg(feature = "serde")]
mod serde_form {
    use super::*;
    use blockjob::bitmap::stored::{DESERIALIZE_MEMORY_MAX, Within};
    use serde::de::DeserializeSeed;

    proptest! {
        #![proptest_config(cases(40))]

        #[test]
        fn what_goes_out_comes_in((len, exponent, ops) in scenarios()) {
            let mut map = map(len, exponent);
            for op in ops.iter().filter(|op| !matches!(op, Op::Ask(..))).take(5) {
                map.change(op);
            }
            let bytes = postcard::to_allocvec(&map).unwrap();
            let back: HBitmap = postcard::from_bytes(&bytes).unwrap();
            back.check_invariants();
            prop_assert_eq!(&back, &map);
            let json = serde_json::to_vec(&map).unwrap();
            let back: HBitmap = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(&back, &map);
        }

        #[test]
        fn any_bytes_do_no_harm(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            flip in any::<prop::sample::Index>(),
        ) {
            prop_assert!(postcard::from_bytes::<HBitmap>(&noise).is_err());
            prop_assert!(serde_json::from_slice::<HBitmap>(&noise).is_err());
            let list = serde_json::to_vec(&noise).unwrap();
            prop_assert!(serde_json::from_slice::<HBitmap>(&list).is_err());
            let mut bytes = postcard::to_allocvec(&map_like(&sample())).unwrap();
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(postcard::from_bytes::<HBitmap>(&bytes).is_err());
        }
    }

    #[test]
    fn it_is_the_stored_form_without_a_label() {
        let map = map_like(&sample());
        let stored = stored::encode(&map, Label::default());
        assert_eq!(
            serde_json::to_value(&map).unwrap(),
            serde_json::json!(stored)
        );
    }

    #[test]
    fn lists_that_are_too_short_or_too_long_are_refused() {
        let stored = stored::encode(&map_like(&sample()), Label::default());
        let json = |bytes: &[u8]| {
            let list = serde_json::to_vec(bytes).unwrap();
            serde_json::from_slice::<HBitmap>(&list).map_err(|error| error.to_string())
        };
        assert!(json(&stored).is_ok());
        let short = json(&stored[..100]).unwrap_err();
        assert!(short.contains("too early"), "{short}");
        let long = json(&[&stored[..], &[0]].concat()).unwrap_err();
        assert!(long.contains("follow"), "{long}");
        let none = serde_json::from_str::<HBitmap>("{}")
            .unwrap_err()
            .to_string();
        assert!(none.contains("the bytes of a stored bitmap"), "{none}");
    }

    /// A few bytes can tell of a map of any size. It is made only if that was allowed.
    #[test]
    fn a_few_bytes_do_not_take_all_memory() {
        let len = 1u64 << 47;
        let file = stored::encode(&map(len, 12), Label::default());
        assert_eq!(file.len(), 76);
        let error = stored::decode(&file, DESERIALIZE_MEMORY_MAX).unwrap_err();
        assert!(matches!(error, DecodeError::TooLarge { .. }));
        let list = serde_json::to_vec(&file).unwrap();
        assert!(serde_json::from_slice::<HBitmap>(&list).is_err());
        let mut list = serde_json::Deserializer::from_slice(&list);
        assert_eq!(
            Within(8 << 30).deserialize(&mut list).unwrap(),
            map(len, 12)
        );
    }
}
