//! Streams made by hand: what is taken, and what must be an error that changes nothing.

use blockjob::migration::{
    BitmapMapping, BodyPart, Fault, ForeignSection, ForeignSections, Framing, IncomingEvent,
    NodeAlias, RecordError, RecordReader, StreamError, Unusable,
};
use blockjob::{BitmapMigration, ByteRange, Granularity, IncomingError, Node};

use crate::truth::{TrueBitmap, add, bits_of};
use crate::{options, start_guest};

/// 200 granules of 64 KiB, of which 64 are 8192 sectors.
const LEN: u64 = 200 << 16;
const SECTORS: u32 = 25_600;

/// Records, one after the other.
#[derive(Clone, Default)]
pub(crate) struct Stream(Vec<u8>);

impl Stream {
    fn named(mut self, flags: u8, node: &[u8], bitmap: &[u8]) -> Self {
        self.0.push(flags | 0x0c);
        for name in [node, bitmap] {
            self.0.push(name.len() as u8);
            self.0.extend(name);
        }
        self
    }

    fn byte(mut self, byte: u8) -> Self {
        self.0.push(byte);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn start(self, bitmap: &str) -> Self {
        self.start_as(b"d", bitmap.as_bytes(), 65536, 1)
    }

    fn start_as(self, node: &[u8], bitmap: &[u8], granularity: u32, flags: u8) -> Self {
        self.named(0x10, node, bitmap)
            .bytes(&granularity.to_be_bytes())
            .byte(flags)
    }

    fn place(self, sector: u64, sectors: u32) -> Self {
        self.bytes(&sector.to_be_bytes())
            .bytes(&sectors.to_be_bytes())
    }

    fn bits(self, sector: u64, sectors: u32, bits: &[u8]) -> Self {
        self.byte(0x40)
            .place(sector, sectors)
            .bytes(&(bits.len() as u64).to_be_bytes())
            .bytes(bits)
    }

    fn zeroes(self, sector: u64, sectors: u32) -> Self {
        self.byte(0x42).place(sector, sectors)
    }

    /// All bits and the end of a bitmap, of the section and of the stream.
    fn rest(self) -> Vec<u8> {
        self.zeroes(0, SECTORS).bytes(&[0x20, 0x01]).0
    }

    fn end(self) -> Vec<u8> {
        self.byte(0x01).0
    }
}

/// A host with a disk, and a bitmap that has nothing to do with the stream.
fn host() -> (BitmapMigration, Vec<(String, Node)>) {
    let node = Node::new(LEN);
    let local = TrueBitmap {
        node: "d".into(),
        name: "local".into(),
        size: LEN,
        granularity: Granularity::DEFAULT,
        enabled: true,
        persistent: true,
        sha256: String::new(),
        dirty: vec![(65536..131_072).into()],
    };
    add(&node, &local).unwrap();
    let migration = BitmapMigration::new().with_node("d", &node);
    (migration, vec![("d".into(), node)])
}

fn check_local(node: &Node) {
    node.bitmaps().check_invariants();
    let info = node.bitmaps().query("local").unwrap();
    assert!(info.is_recording && info.is_persistent && !info.is_busy());
    let bits = bits_of(node, "local");
    assert!(bits.runs().eq([ByteRange::from(65536..131_072)]));
}

/// What comes of a stream; nothing of it is left on the node. Also when it comes byte by byte.
fn refused(framing: Framing, stream: &[u8]) -> IncomingError {
    let mut errors = [stream.len().max(1), 1].map(|piece| {
        let (target, nodes) = host();
        let mut incoming = target.incoming(options(framing));
        let fed = stream
            .chunks(piece)
            .try_for_each(|bytes| incoming.feed(bytes).map(drop));
        let error = fed.and_then(|()| incoming.finish()).unwrap_err();
        assert_eq!(incoming.finish().unwrap_err(), error, "it is told again");
        let ended = std::iter::from_fn(|| incoming.poll_event()).last();
        assert_eq!(ended, Some(IncomingEvent::Ended(error.clone())));
        let node = &nodes[0].1;
        assert_eq!(node.bitmaps().query_all().len(), 1, "{error}");
        check_local(node);
        // The guest can start all the same, and leaves nothing either.
        start_guest(&mut incoming, &nodes);
        drop(incoming);
        assert_eq!(node.bitmaps().query_all().len(), 1, "{error}");
        error
    });
    errors.reverse();
    let [one_by_one, at_once] = errors;
    assert_eq!(one_by_one, at_once);
    at_once
}

fn fault(stream: Vec<u8>) -> Fault {
    match refused(Framing::Bare, &stream) {
        IncomingError::Stream(error) => error.why,
        error => panic!("{error}"),
    }
}

fn fault_at(stream: Vec<u8>) -> u64 {
    match refused(Framing::Bare, &stream) {
        IncomingError::Stream(error) => error.at,
        error => panic!("{error}"),
    }
}

fn dropped(stream: Vec<u8>) -> Unusable {
    match refused(Framing::Bare, &stream) {
        IncomingError::Dropped(unusable) => unusable,
        error => panic!("{error}"),
    }
}

/// The bits that came of a stream which is taken.
fn taken(stream: Vec<u8>) -> Vec<ByteRange> {
    let mut results = [stream.len(), 1].map(|piece| {
        let (target, nodes) = host();
        let mut incoming = target.incoming(options(Framing::Bare));
        for bytes in stream.chunks(piece) {
            incoming.feed(bytes).unwrap();
        }
        incoming.finish().unwrap();
        start_guest(&mut incoming, &nodes);
        check_local(&nodes[0].1);
        let info = nodes[0].1.bitmaps().query("b").unwrap();
        assert!(info.is_recording && !info.is_busy());
        bits_of(&nodes[0].1, "b").runs().collect::<Vec<_>>()
    });
    results.reverse();
    let [one_by_one, at_once] = results;
    assert_eq!(one_by_one, at_once);
    at_once
}

fn stream() -> Stream {
    Stream::default()
}

#[test]
pub(crate) fn a_local_bitmap_is_never_written_to() {
    let not_started =
        |fault| matches!(fault, Fault::NotStarted { bitmap } if bitmap.bitmap == "local");
    assert!(not_started(fault(
        stream().named(0x42, b"d", b"local").place(0, SECTORS).end()
    )));
    assert!(not_started(fault(
        stream().named(0x20, b"d", b"local").end()
    )));
    assert!(not_started(fault(
        stream().start("b").named(0x20, b"d", b"local").end()
    )));
    for start in [stream().start("local"), stream().start("b").start("b")] {
        assert!(matches!(fault(start.end()), Fault::Exists { .. }));
    }
}

#[test]
pub(crate) fn a_bitmap_that_begins_wrong_is_not_made() {
    for flags in [0x08, 0x10, 0x20, 0x40, 0x80, 0xf9] {
        let found = fault(stream().start_as(b"d", b"b", 65536, flags).rest());
        assert_eq!(found, Fault::Record(RecordError::BitmapFlags { flags }));
    }
    for granularity in [0, 1, 3, 256, 513, 65537, u32::MAX, 0xc000_0000] {
        let found = fault(stream().start_as(b"d", b"b", granularity, 1).rest());
        let bytes = granularity.into();
        assert_eq!(found, Fault::Granularity { bytes });
    }
    assert_eq!(fault_at(stream().start("a").start("a").end()), 10);
    for name in [&b"a\0b"[..], b"\xff"] {
        let found = dropped(stream().start_as(b"d", name, 65536, 1).rest());
        assert!(matches!(found, Unusable::BadName { .. }));
    }
    for empty in [
        stream().named(0x10, b"", b"b"),
        stream().named(0x10, b"d", b""),
    ] {
        assert_eq!(fault(empty.rest()), Fault::Record(RecordError::NameEmpty));
    }
}

#[test]
fn names_that_nobody_has_drop_the_bitmaps_and_keep_the_stream() {
    let start = || stream().start("b");
    let found = dropped(start().start_as(b"e", b"x", 512, 0).rest());
    assert_eq!(found, Unusable::UnknownNode { alias: "e".into() });
    let found = dropped(start().named(0x42, b"d", b"x").place(0, SECTORS).end());
    assert!(matches!(found, Unusable::UnknownBitmap { alias, .. } if alias == "x"));
    for nameless in [
        vec![0x20, 1],
        stream().zeroes(0, SECTORS).end(),
        vec![0x10, 0, 1, 0, 0, 1],
    ] {
        assert_eq!(dropped(nameless), Unusable::NoBitmap);
    }
    // A node alone does not select a bitmap.
    assert_eq!(
        dropped(stream().bytes(&[0x28, 1, b'd']).end()),
        Unusable::NoBitmap
    );
    // What is wrong with the stream is told also after that.
    let unknown = stream().start_as(b"e", b"x", 512, 0);
    let found = unknown
        .clone()
        .byte(0x40)
        .place(0, 8)
        .bytes(&10_241u64.to_be_bytes())
        .end();
    let (target, nodes) = host();
    let mut incoming = target.incoming(options(Framing::Bare));
    assert!(matches!(
        incoming.feed(&found),
        Err(IncomingError::Stream(_))
    ));
    check_local(&nodes[0].1);
    // And the position in it is kept: what follows is not ours.
    let mut both = unknown.rest();
    let own = both.len();
    both.extend(b"\x02device");
    let mut incoming = target.incoming(options(Framing::Bare));
    assert_eq!(incoming.feed_part(&both).unwrap(), own);
    assert!(incoming.is_between_parts());
    let mapping = BitmapMapping::new(vec![NodeAlias {
        node: "d".into(),
        alias: "n".into(),
        bitmaps: vec![],
    }])
    .unwrap();
    let mut incoming = target
        .with_mapping(mapping)
        .incoming(options(Framing::Bare));
    incoming
        .feed(&stream().start_as(b"n", b"b", 512, 0).rest())
        .unwrap();
    let found = incoming.finish().unwrap_err();
    let IncomingError::Dropped(Unusable::UnknownBitmap { alias, .. }) = found else {
        panic!("{found}");
    };
    assert_eq!(alias, "b");
}

#[test]
pub(crate) fn bits_of_what_is_not_there_are_refused() {
    let bits = |sector, sectors| stream().start("b").zeroes(sector, sectors).rest();
    for (sector, sectors) in [(1, 8192), (8191, 1), (0, 8191), (0, 25_472), (128, 8192)] {
        let found = fault(bits(sector, sectors));
        assert!(
            matches!(found, Fault::Unaligned { align, .. } if align == 4 << 20),
            "{found}"
        );
    }
    for (sector, sectors) in [
        (0, SECTORS + 1),
        (24_576, 8192),
        (1 << 40, 1),
        (0, u32::MAX),
    ] {
        let found = fault(bits(sector, sectors));
        assert!(matches!(found, Fault::PastEnd { len: LEN, .. }), "{found}");
    }
    for sector in [1 << 63, 1 << 55, u64::MAX] {
        assert_eq!(fault(bits(sector, 8192)), Fault::SectorTooLarge { sector });
    }
    let too_long = |len: u64| {
        let head = stream().start("b").byte(0x40).place(0, SECTORS);
        head.bytes(&len.to_be_bytes()).bytes(&[0; 100]).end()
    };
    for len in [10_241, 1 << 20, 1 << 63, u64::MAX] {
        let found = fault(too_long(len));
        assert_eq!(found, Fault::Record(RecordError::BufferTooLong { len }));
    }
    // 200 granules have 32 bytes, and 72 of the last 8 words.
    for len in [0, 8, 31, 33, 40, 64, 10_240] {
        let stream = stream().start("b").bits(0, SECTORS, &vec![0; len]);
        let (expected, found) = (32, len as u64);
        assert_eq!(
            dropped(stream.rest()),
            Unusable::BufferLength { expected, found }
        );
    }
}

#[test]
pub(crate) fn a_bitmap_is_whole_when_all_its_bits_came_and_it_was_said() {
    let start = || stream().start("b");
    let missing = |stream: Stream| match fault(stream.bytes(&[0x20, 1]).0) {
        Fault::Missing { from, .. } => from,
        fault => panic!("{fault}"),
    };
    assert_eq!(missing(start()), 0);
    assert_eq!(missing(start().zeroes(0, 8192)), 4 << 20);
    assert_eq!(missing(start().zeroes(8192, SECTORS - 8192)), 0);
    assert_eq!(
        missing(start().zeroes(0, 8192).zeroes(16_384, SECTORS - 16_384)),
        4 << 20
    );
    // A disk that is shorter there by whole words of bits.
    assert_eq!(missing(start().zeroes(0, 16_384)), 8 << 20);
    let found = fault(
        start()
            .zeroes(0, SECTORS)
            .byte(0x20)
            .zeroes(0, SECTORS)
            .end(),
    );
    assert!(matches!(found, Fault::AfterComplete { .. }));
    let all = start().zeroes(0, SECTORS);
    let found = refused(Framing::Bare, &all.clone().end());
    assert!(matches!(found, IncomingError::Incomplete { .. }), "{found}");
    // One of two is missing: both are gone, as the guest has not started.
    let one = stream()
        .start("a")
        .start("b")
        .zeroes(0, SECTORS)
        .bytes(&[0x20, 1])
        .0;
    assert!(matches!(
        refused(Framing::Bare, &one),
        IncomingError::Incomplete { .. }
    ));
    // The end mark is missing, or there is more after it.
    for stream in [all.clone().byte(0x20), all.bytes(&[0x20, 0x01, 0x00])] {
        assert_eq!(fault(stream.0), Fault::Truncated);
    }
}

#[test]
pub(crate) fn what_has_one_meaning_is_taken() {
    let start = || stream().start("b");
    let first = ByteRange::from(0..65536);
    let bit = |at: usize| (0..32).map(|byte| u8::from(byte == at)).collect::<Vec<_>>();
    // In one part, and in several; with an end mark at any record; with records that say nothing.
    assert_eq!(
        taken(start().bits(0, SECTORS, &bit(0)).bytes(&[0x20, 0x01]).0),
        [first]
    );
    assert_eq!(
        taken(start().bits(0, SECTORS, &bit(0)).byte(0x21).0),
        [first]
    );
    let noise = start().bytes(&[0, 1, 0]).bits(0, SECTORS, &bit(0));
    assert_eq!(
        taken(
            noise
                .bytes(&[0x80, 0x00, 0x80, 0x80, 0, 0x20, 0x20, 0x01])
                .0
        ),
        [first]
    );
    // In pieces of a word, in any order, unpadded, again, and with sectors that are none.
    let pieces = start()
        .bits(16_384, 8192, &[0xff; 8])
        .bits(0, 8192, &[1, 0, 0, 0, 0, 0, 0, 0])
        .zeroes(8192, 8192)
        .bits(24_576, SECTORS - 24_576, &[0; 8])
        .zeroes(16_384, 8192)
        .zeroes(77, 0);
    assert_eq!(taken(pieces.bytes(&[0x20, 0x01]).0), [first]);
    // The last granule counts when it is touched. What is past it, and the padding, say nothing.
    let mut last = vec![0xff; 32];
    last[0..25].fill(0);
    assert_eq!(
        taken(start().bits(0, SECTORS - 127, &last).bytes(&[0x20, 0x01]).0),
        []
    );
    let mut padded = bit(0);
    padded.truncate(8);
    padded.resize(32, 0xee);
    let padded = start().zeroes(8192, SECTORS - 8192).bits(0, 8192, &padded);
    assert_eq!(taken(padded.bytes(&[0x20, 0x01]).0), [first]);
    // Of several kinds at once the first counts: START, COMPLETE, BITS.
    let kinds = start().zeroes(0, SECTORS).byte(0x63);
    assert_eq!(taken(kinds.0), []);
    let mut kinds = start().rest();
    kinds[0] |= 0x62;
    assert_eq!(taken(kinds), []);
}

#[test]
fn flags_of_the_future_are_not_guessed_at() {
    for flags in [
        &[0xc0, 0x20][..],
        &[0x80, 0x80, 0x01, 0x20],
        &[0x80, 0x80, 0x00, 0xa0],
    ] {
        let stream = stream().start("b").zeroes(0, SECTORS).bytes(flags).end();
        assert!(matches!(
            fault(stream),
            Fault::Record(RecordError::Flags { .. })
        ));
    }
}

#[test]
pub(crate) fn a_receiver_takes_no_more_than_it_allows() {
    let run = |bitmaps_max, bytes_max, stream: Vec<u8>| {
        let (target, nodes) = host();
        let mut options = options(Framing::Bare);
        options.bitmaps_max = bitmaps_max;
        options.bytes_max = bytes_max;
        let mut incoming = target.incoming(options);
        let fed = incoming.feed(&stream).and_then(|_| incoming.finish());
        check_local(&nodes[0].1);
        fed
    };
    let is_limit = |result: Result<(), IncomingError>| match result {
        Err(IncomingError::Stream(error)) => matches!(error.why, Fault::Limit { .. }),
        _ => false,
    };
    let one = || stream().start("a");
    let two = || one().start("b");
    let all = |stream: Stream| {
        let bits = stream.zeroes(0, SECTORS).byte(0x20);
        bits.named(0x42, b"d", b"a")
            .place(0, SECTORS)
            .bytes(&[0x20, 1])
            .0
    };
    assert_eq!(run(2, 64, all(two())), Ok(()));
    assert!(is_limit(run(1, 64, all(two()))));
    assert!(is_limit(run(2, 63, all(two()))));
    assert!(is_limit(run(0, 64, one().rest())));
    // A disk of this length has 2^41 granules of 512 bytes, which nobody has the memory for.
    let node = Node::new(1 << 50);
    let target = BitmapMigration::new().with_node("d", &node);
    let mut incoming = target.incoming(IncomingOptions::default());
    let fed = incoming.feed(&stream().start_as(b"d", b"a", 512, 1).rest());
    assert!(is_limit(fed.map(drop)));
    assert!(node.bitmaps().query_all().is_empty());
}

use blockjob::migration::IncomingOptions;

#[test]
fn a_bitmap_that_begins_after_the_guest_has_missed_writes() {
    let (target, nodes) = host();
    let mut incoming = target.incoming(options(Framing::Bare));
    start_guest(&mut incoming, &nodes);
    let error = incoming.feed(&stream().start("b").rest()).unwrap_err();
    let IncomingError::Stream(error) = error else {
        panic!("{error}");
    };
    assert!(matches!(error.why, Fault::StartsLate { .. }));
    check_local(&nodes[0].1);
    // One that does not record has missed nothing.
    let mut incoming = target.incoming(options(Framing::Bare));
    start_guest(&mut incoming, &nodes);
    incoming
        .feed(&stream().start_as(b"d", b"b", 65536, 0).rest())
        .unwrap();
    assert!(!nodes[0].1.bitmaps().query("b").unwrap().is_recording);
}

#[test]
fn what_is_around_the_records_is_looked_at() {
    let section = |version: u32| {
        let head = stream().byte(1).bytes(&7u32.to_be_bytes()).byte(12);
        head.bytes(b"dirty-bitmap").place(0, 0).0[..18 + 4]
            .iter()
            .chain(&version.to_be_bytes())
            .copied()
            .collect::<Vec<_>>()
    };
    let body = stream().start("b").rest();
    let footer = |id: u32| [&[0x7e][..], &id.to_be_bytes()].concat();
    let whole = |parts: &[&[u8]]| {
        let head: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\0";
        [&[head][..], parts].concat().concat()
    };
    let fault = |framing, bytes: &[u8]| match refused(framing, bytes) {
        IncomingError::Stream(error) => error.why,
        error => panic!("{error}"),
    };
    let sound = whole(&[&section(1), &body, &footer(7), &[0]]);
    let (target, nodes) = host();
    let mut incoming = target.incoming(options(Framing::Whole));
    incoming.feed(&sound).unwrap();
    assert!(incoming.is_done());
    incoming.finish().unwrap();
    start_guest(&mut incoming, &nodes);
    assert!(nodes[0].1.bitmaps().query("b").is_ok());

    for version in [0, 2, u32::MAX] {
        let found = fault(
            Framing::Whole,
            &whole(&[&section(version), &body, &footer(7), &[0]]),
        );
        assert_eq!(found, Fault::SectionVersion { version });
    }
    let found = fault(
        Framing::Sections,
        &[&section(1)[..], &body, &footer(8)].concat(),
    );
    assert_eq!(found, Fault::Footer);
    let found = fault(
        Framing::Sections,
        &[&section(1)[..], &body, &footer(7), &section(1)].concat(),
    );
    assert_eq!(found, Fault::SectionTwice { id: 7 });
    let found = fault(Framing::Sections, b"\x03\0\0\0\x09\x01");
    assert_eq!(found, Fault::SectionUnknown { id: 9 });
    assert_eq!(fault(Framing::Whole, b"QEVN\0\0\0\x03"), Fault::NoStream);
    assert_eq!(
        fault(Framing::Whole, b"QEVM\0\0\0\x02"),
        Fault::StreamVersion { version: 2 }
    );
    assert_eq!(
        fault(Framing::Whole, &whole(&[&[9]])),
        Fault::SectionType { byte: 9 }
    );
    assert_eq!(
        fault(Framing::Whole, &whole(&[&[5, 1, b'x', 0, 0, 0, 1]])),
        Fault::Subsection
    );
    assert_eq!(
        fault(Framing::Whole, &whole(&[&[8, 0, 7, 0, 2, 0, 0]])),
        Fault::Package
    );
    let device = b"\x04\0\0\0\x05\x03ide\0\0\0\0\0\0\0\x03x";
    let found = fault(Framing::Whole, &whole(&[device]));
    assert_eq!(found, Fault::ForeignSection { name: "ide".into() });
    // When the bitmaps are here, what follows does not matter.
    let mut incoming = target.incoming(options(Framing::Whole));
    let other = stream().start("c").rest();
    let followed = whole(&[&section(1), &other, &footer(7), device, b"whatever"]);
    incoming.feed(&followed).unwrap();
    incoming.finish().unwrap();
}

#[test]
fn no_sectors_are_none_wherever_they_are() {
    let start = || stream().start("b");
    for sector in [0, 77, 25_600, 1 << 40, (1 << 55) - 1] {
        let nothing = start()
            .zeroes(sector, 0)
            .bits(sector, 0, &[])
            .zeroes(0, SECTORS);
        assert_eq!(taken(nothing.bytes(&[0x20, 0x01]).0), [], "{sector}");
        let much = start().bits(sector, 0, &[0; 32]);
        let (expected, found) = (0, 32);
        assert_eq!(
            dropped(much.rest()),
            Unusable::BufferLength { expected, found }
        );
    }
}

#[test]
fn an_error_is_one_line_whatever_the_names_are() {
    let error = refused(
        Framing::Bare,
        &stream().start("a\nb\x1b[1m").bytes(&[0x20, 1]).0,
    );
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text}");
    assert!(text.contains("d/a\\nb\\u{1b}[1m"), "{text}");
}

/// Wants as much as it is told to.
struct Wants(usize);

impl ForeignSections for Wants {
    fn body(&mut self, _: &ForeignSection<'_>, bytes: &[u8]) -> Result<BodyPart, String> {
        Ok(if bytes.len() < self.0 {
            BodyPart::Needs(self.0)
        } else {
            BodyPart::End(self.0)
        })
    }
}

#[test]
pub(crate) fn whoever_knows_a_section_is_not_given_all_memory() {
    for (wanted, is_taken) in [
        (1, true),
        (65_536, true),
        (65_537, false),
        (usize::MAX, false),
    ] {
        let head = b"\x01\0\0\0\x07\x03ram\0\0\0\0\0\0\0\x01";
        let mut reader =
            RecordReader::new(Framing::Sections).with_foreign(Some(Box::new(Wants(wanted))));
        let mut fed = Ok(0);
        for piece in [&head[..], &vec![7; 70_000]] {
            fed = fed.and_then(|_| reader.feed(piece, &mut |_| Ok::<(), StreamError>(())));
        }
        // What is behind a body that was taken is no footer.
        let at = if is_taken {
            head.len() + wanted
        } else {
            head.len()
        };
        let why = if is_taken {
            Fault::Footer
        } else {
            Fault::TooMuch
        };
        let error = fed.unwrap_err();
        assert_eq!((error.at, error.why), (at as u64, why));
    }
}
