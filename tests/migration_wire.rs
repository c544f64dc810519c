//! The stream of bitmaps: read and made byte for byte as QEMU does, cut anywhere, and with anything wrong in it.
//!
//! `BLOCKJOB_SEED` is the first seed of what is random here, and `BLOCKJOB_SEEDS` how many are run.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may read the clock, to be over in time"
)]

#[path = "migration/cases.rs"]
mod cases;
#[path = "migration/driving.rs"]
mod driving;
#[path = "migration/hostile.rs"]
mod hostile;
#[path = "migration/incoming.rs"]
mod incoming;
#[path = "migration/native.rs"]
mod native;
#[path = "migration/odd.rs"]
mod odd;
#[path = "sim/rng.rs"]
#[allow(dead_code, reason = "not everybody needs all of it")]
mod rng;
#[path = "migration/rules.rs"]
mod rules;
#[path = "migration/truth.rs"]
mod truth;

use std::time::Duration;

use blockjob::migration::{
    ArrivalState, Framing, IncomingMigration, IncomingOptions, Mode, Next, OutgoingOptions,
    RecordBody, RecordReader, SkipRam, StreamError, StreamKind,
};
use blockjob::{BitmapMigration, Node};

use rng::Rng;
use truth::{Truth, bits_of, digest, quiesce};

const FIXTURES: &[&str] = &[
    "bitmap-basic",
    "bitmap-multi",
    "bitmap-nodes",
    "bitmap-tails",
    "bitmap-names",
    "bitmap-alias",
    "bitmap-multichunk",
    "bitmap-empty-full",
    "bitmap-postcopy",
];

struct Fixture {
    name: &'static str,
    truth: Truth,
    stream: Vec<u8>,
}

impl Fixture {
    fn load(name: &'static str) -> Self {
        let path = |ext| format!("{}/tests/fixtures/{name}.{ext}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path("json")).unwrap();
        Self {
            name,
            truth: Truth::parse(&text).unwrap(),
            stream: std::fs::read(path("stream")).unwrap(),
        }
    }

    fn all() -> Vec<Self> {
        FIXTURES.iter().map(|name| Self::load(name)).collect()
    }

    /// The bodies one after the other.
    fn bare(&self) -> Vec<u8> {
        let bodies = self.truth.bodies();
        let bytes = bodies.iter().map(|(_, body)| &self.stream[body.clone()]);
        bytes.collect::<Vec<_>>().concat()
    }

    /// The first body and the last, and no part in between.
    fn start_and_end(&self) -> Vec<u8> {
        let bodies = self.truth.bodies();
        let wanted = bodies.iter().filter(|(kind, _)| kind != "part");
        wanted
            .map(|(_, body)| &self.stream[body.clone()])
            .collect::<Vec<_>>()
            .concat()
    }
}

fn options(framing: Framing) -> IncomingOptions {
    let mut options = IncomingOptions::default();
    options.stream = StreamKind::Qemu(framing);
    options.foreign = Some(Box::new(SkipRam::new(4096)));
    options
}

/// Starts the guest with all nodes quiesced.
fn start_guest(incoming: &mut IncomingMigration, nodes: &[(String, Node)]) {
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    incoming
        .guest_starts(&guards.iter().collect::<Vec<_>>())
        .unwrap();
}

/// Everything that a source sends when the guest stands still from the start.
fn sent(
    migration: &BitmapMigration,
    nodes: &[(String, Node)],
    options: OutgoingOptions,
) -> Vec<u8> {
    let mut outgoing = migration.outgoing(options).unwrap();
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
    let mut bytes = Vec::new();
    let mut piece = [0; 1000];
    while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap() {
        bytes.extend(&piece[..len]);
    }
    outgoing.finish().unwrap();
    bytes
}

#[test]
pub(crate) fn every_fixture_is_read_as_what_it_was() {
    for fixture in Fixture::all() {
        for (framing, bytes) in [
            (Framing::Whole, fixture.stream.clone()),
            (Framing::Bare, fixture.bare()),
        ] {
            for piece in [1, 7, 1 << 20] {
                let (target, nodes) = fixture.truth.target();
                let mut incoming = target.incoming(options(framing));
                let mut used = 0;
                for piece in bytes.chunks(piece) {
                    used += incoming.feed(piece).unwrap();
                }
                assert_eq!(
                    incoming.is_done(),
                    framing == Framing::Whole,
                    "{}",
                    fixture.name
                );
                assert!(used <= bytes.len() && (framing == Framing::Whole || used == bytes.len()));
                incoming.finish().unwrap();
                start_guest(&mut incoming, &nodes);
                check(&fixture, &incoming, &nodes);
            }
        }
    }
}

fn check(fixture: &Fixture, incoming: &IncomingMigration, nodes: &[(String, Node)]) {
    let came = incoming.bitmaps();
    assert_eq!(came.len(), fixture.truth.bitmaps.len(), "{}", fixture.name);
    for (came, bitmap) in came.iter().zip(&fixture.truth.bitmaps) {
        assert_eq!(came.state, ArrivalState::Active);
        assert_eq!(
            (&came.id.node, &came.id.bitmap),
            (&bitmap.node, &bitmap.name)
        );
        let (_, node) = nodes.iter().find(|(name, _)| *name == bitmap.node).unwrap();
        node.bitmaps().check_invariants();
        let info = node.bitmaps().query(&bitmap.name).unwrap();
        assert_eq!(info.is_recording, bitmap.enabled, "{}", came.id);
        assert_eq!(info.is_persistent, bitmap.persistent, "{}", came.id);
        assert_eq!(info.granularity, bitmap.granularity);
        assert!(!info.is_busy());
        let bits = bits_of(node, &bitmap.name);
        assert_eq!(digest(&bits), bitmap.sha256, "{}", came.id);
        assert!(bits.runs().eq(bitmap.dirty.iter().copied()), "{}", came.id);
    }
}

#[test]
fn every_fixture_is_made_byte_for_byte() {
    for fixture in Fixture::all() {
        if fixture.name == "bitmap-postcopy" {
            continue;
        }
        let (source, nodes) = fixture.truth.source().unwrap();
        let bytes = sent(&source, &nodes, OutgoingOptions::default());
        assert!(bytes == fixture.start_and_end(), "{}", fixture.name);
        // With what is around them in the file.
        let mut options = OutgoingOptions::default();
        options.stream = StreamKind::Qemu(Framing::Sections);
        options.section = fixture.truth.section().unwrap();
        let bytes = sent(&source, &nodes, options);
        let sections = fixture.truth.json["dirty_bitmap_sections"]
            .as_array()
            .unwrap();
        let wanted = sections.iter().filter(|section| section["type"] != "part");
        let wanted = wanted.map(|section| {
            let start = section["offset"].as_u64().unwrap() as usize;
            &fixture.stream[start..start + section["length"].as_u64().unwrap() as usize]
        });
        assert!(
            bytes == wanted.collect::<Vec<_>>().concat(),
            "{}",
            fixture.name
        );
    }
}

/// The parts of post-copy, each with as many chunks as the speed let through there.
#[test]
fn the_post_copy_fixture_is_made_part_by_part() {
    let fixture = Fixture::load("bitmap-postcopy");
    let (source, nodes) = fixture.truth.source().unwrap();
    let mut options = OutgoingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Sections);
    options.section = fixture.truth.section().unwrap();
    options.mode = Mode::PostCopy;
    options.completes_last = true;
    let mut outgoing = source.outgoing(options).unwrap();
    let sections = fixture.truth.json["dirty_bitmap_sections"]
        .as_array()
        .unwrap();
    let mut parts = Vec::new();
    for section in sections {
        // Of a part without anything there are as many as the machine had time for.
        if section["type"] == "part" && section["body_length"] == 1 {
            continue;
        }
        let place = |name: &str| section[name].as_u64().unwrap() as usize;
        let bytes = &fixture.stream[place("offset")..][..place("length")];
        parts.push((
            &section["type"],
            bytes,
            &fixture.stream[place("body_offset")..][..place("body_length")],
        ));
    }
    assert_eq!(parts.len(), 7);
    for (kind, expected, body) in parts {
        if *kind == "part" {
            let mut chunks = 0;
            let mut reader = RecordReader::new(Framing::Bare);
            reader
                .feed(body, &mut |record| {
                    chunks += u32::from(matches!(record.body, RecordBody::Bits { .. }));
                    Ok::<(), StreamError>(())
                })
                .unwrap();
            outgoing.set_part_chunks(chunks);
        }
        assert!(outgoing.is_between_parts());
        let (_, made) = outgoing.next_slice(Duration::ZERO).unwrap();
        assert!(made == expected, "{kind}");
        assert!(outgoing.is_between_parts());
        if *kind == "start" {
            let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
            outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
            outgoing.guest_started().unwrap();
        }
    }
    outgoing.finish().unwrap();
    assert_eq!(outgoing.bytes_sent_stopped(), 0);
}

/// The bitmaps that there are, by node and name.
fn present(nodes: &[(String, Node)]) -> usize {
    nodes
        .iter()
        .map(|(_, node)| node.bitmaps().query_all().len())
        .sum()
}

#[test]
fn a_stream_that_ends_anywhere_leaves_nothing_and_one_that_was_cut_anywhere_all() {
    for fixture in Fixture::all() {
        let bytes = fixture.bare();
        // The long ones are cut at fewer places, among them those around every record.
        let step = if bytes.len() > 4000 { 7 } else { 1 };
        for cut in (0..bytes.len()).filter(|cut| cut % step == 0 || cut % 1061 < 64) {
            let (target, nodes) = fixture.truth.target();
            let mut incoming = target.incoming(options(Framing::Bare));
            incoming.feed(&bytes[..cut]).unwrap();
            for (_, node) in &nodes {
                for info in node.bitmaps().query_all() {
                    let is_whole = incoming.bitmaps().iter().any(|came| {
                        came.id.bitmap == info.name && came.state == ArrivalState::Whole
                    });
                    assert!(info.is_busy() || is_whole, "{} at {cut}", fixture.name);
                }
            }
            let is_all =
                incoming.is_complete() && incoming.bitmaps().len() == fixture.truth.bitmaps.len();
            if incoming.finish().is_err() {
                assert_eq!(present(&nodes), 0, "{} ends at {cut}", fixture.name);
            } else {
                assert!(is_all || present(&nodes) == 0, "{} at {cut}", fixture.name);
            }

            let mut incoming = target.incoming(options(Framing::Bare));
            drop(incoming.finish());
            drop(incoming);
            let mut incoming = target.incoming(options(Framing::Bare));
            incoming.feed(&bytes[..cut]).unwrap();
            incoming.feed(&bytes[cut..]).unwrap();
            incoming.finish().unwrap();
            if cut % 16 == 0 {
                start_guest(&mut incoming, &nodes);
                check(&fixture, &incoming, &nodes);
            }
        }
    }
}

/// What a stream came to on a host with a bitmap of its own, which nothing may touch.
fn survive(fixture: &Fixture, framing: Framing, bytes: &[u8], piece: usize) -> bool {
    let (target, nodes) = fixture.truth.target();
    for (_, node) in &nodes {
        node.bitmaps()
            .add_disabled("of this host", blockjob::BitmapOptions::default())
            .unwrap();
        truth::set(node, "of this host", &[(0..1).into()]).unwrap();
    }
    let mut incoming = target.incoming(options(framing));
    let fed = bytes
        .chunks(piece.max(1))
        .try_for_each(|bytes| incoming.feed(bytes).map(drop));
    let is_sound = fed.and_then(|()| incoming.finish()).is_ok();
    start_guest(&mut incoming, &nodes);
    drop(incoming);
    for (name, node) in &nodes {
        node.bitmaps().check_invariants();
        assert_eq!(
            bits_of(node, "of this host").count(),
            1.min(node.len()),
            "{name}"
        );
        for info in node.bitmaps().query_all() {
            assert!(!info.is_busy(), "{name}");
        }
    }
    assert!(is_sound || present(&nodes) == nodes.len());
    is_sound
}

#[test]
fn every_byte_may_be_wrong() {
    let mut counts = [0; 2];
    for fixture in Fixture::all() {
        let bytes = fixture.bare();
        let step = if bytes.len() > 4000 { 5 } else { 1 };
        for at in (0..bytes.len()).filter(|at| *at < 400 || at % step == 0 || at % 1061 < 40) {
            for wrong in [0x01, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= wrong;
                counts[usize::from(survive(&fixture, Framing::Bare, &bytes, bytes.len()))] += 1;
            }
        }
    }
    println!("{} were refused, {} were taken", counts[0], counts[1]);
    assert!(counts.iter().all(|&count| count > 1000));
}

fn env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Anything may come: fixtures with bytes changed, left out, put in and repeated, cut anywhere. For about
/// three seconds, or as many seeds as are asked for.
#[test]
fn nothing_that_comes_does_harm() {
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let seeds = env("BLOCKJOB_SEEDS");
    println!("seeds from {first}");
    let fixtures = Fixture::all();
    let started = std::time::Instant::now();
    let mut seed = first;
    let mut taken = 0;
    while seeds.map_or(started.elapsed() < Duration::from_secs(3), |count| {
        seed - first < count
    }) {
        let outcome = std::panic::catch_unwind(|| fuzz(&fixtures, seed));
        taken += u64::from(outcome.unwrap_or_else(|panic| {
            eprintln!(
                "seed {seed} failed; again with:\n  \
                 BLOCKJOB_SEED={seed} BLOCKJOB_SEEDS=1 cargo test --test migration_wire nothing_that_comes"
            );
            std::panic::resume_unwind(panic)
        }));
        seed += 1;
    }
    println!("{} streams, of which {taken} were taken", seed - first);
}

fn fuzz(fixtures: &[Fixture], seed: u64) -> bool {
    let mut rng = Rng::new(seed);
    if rng.one_in(4) {
        return fuzz_native(&mut rng);
    }
    let fixture = &fixtures[rng.below(fixtures.len() as u64) as usize];
    let is_whole = rng.one_in(2);
    let (framing, mut bytes) = if is_whole {
        (Framing::Whole, fixture.stream.clone())
    } else {
        (Framing::Bare, fixture.bare())
    };
    for _ in 0..rng.between(1, 4) {
        let len = bytes.len() as u64;
        // What is not payload is more worth to be wrong.
        let at = if rng.one_in(2) {
            rng.below(len.min(500))
        } else {
            rng.below(len)
        } as usize;
        match rng.below(5) {
            0 => bytes[at] = rng.next() as u8,
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => drop(bytes.drain(at..(at + rng.below(40) as usize).min(bytes.len()))),
            3 => {
                let from = rng.below(len) as usize;
                let piece = bytes[from..(from + rng.below(200) as usize).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => bytes.truncate(at),
        }
        if bytes.is_empty() {
            break;
        }
    }
    let piece = [1, 3, 100, 5000, 1 << 20][rng.below(5) as usize];
    survive(fixture, framing, &bytes, piece)
}

/// A native stream with frames changed, left out, repeated and in another order, all of them with the checksum
/// and the number that they should have.
fn fuzz_native(rng: &mut Rng) -> bool {
    let bitmaps = [
        cases::bitmap("a", true, true),
        cases::bitmap("b", false, false),
    ];
    let from = cases::disk(&bitmaps);
    let mut outgoing = cases::one(&from).outgoing(cases::native().0).unwrap();
    cases::stop(&mut outgoing, &from);
    let mut frames = cases::frames(&cases::pull(&mut outgoing));
    for _ in 0..rng.between(1, 3) {
        let at = rng.below(frames.len() as u64) as usize;
        match rng.below(4) {
            0 => {
                let other = rng.below(frames.len() as u64) as usize;
                frames.swap(at, other);
            }
            1 => drop(frames.remove(at)),
            2 => frames.insert(at, frames[at].clone()),
            _ => {
                frames[at] = cases::forged(frames[at].clone(), |frame| {
                    // The kind, or something of the payload.
                    let len = frame.len() as u64;
                    let at = if len == 16 || rng.one_in(8) {
                        0
                    } else {
                        rng.between(16, len - 1)
                    };
                    match rng.below(4) {
                        0 => frame[at as usize] = rng.next() as u8,
                        1 => frame[at as usize] ^= 1 << rng.below(8),
                        2 => frame.truncate(16.max(at as usize)),
                        _ => frame.extend([0, 1, 0xff].iter().cycle().take(rng.below(40) as usize)),
                    }
                });
            }
        }
        if frames.is_empty() {
            return false;
        }
    }
    let mut number = 0u64;
    for frame in &mut frames {
        *frame = cases::forged(frame.clone(), |frame| {
            frame[8..16].copy_from_slice(&number.to_le_bytes());
        });
        number += u64::from(frame[0] != 1);
    }
    let to = Node::new(cases::LEN);
    truth::add(&to, &cases::bitmap("of this host", true, true)).unwrap();
    let local = bits_of(&to, "of this host");
    let mut incoming = cases::one(&to).incoming(cases::native().1);
    let has_guest = rng.one_in(2);
    let starts_at = rng.below(frames.len() as u64) as usize;
    let mut fed = Ok(0);
    for (index, frame) in frames.iter().enumerate() {
        if has_guest && index == starts_at {
            cases::start(&mut incoming, &to);
        }
        let (one, other) = frame.split_at(rng.below(frame.len() as u64) as usize);
        for piece in [one, other] {
            fed = fed.and_then(|_| incoming.feed(piece));
        }
        let mut answer = [0; 100];
        let _ = incoming.next_bytes(&mut answer);
    }
    let is_taken = fed.and_then(|_| incoming.finish()).is_ok();
    drop(incoming);
    to.bitmaps().check_invariants();
    assert_eq!(bits_of(&to, "of this host"), local);
    for info in to.bitmaps().query_all() {
        // What is there is whole: the digest was compared.
        assert!(!info.is_busy());
        let sent = bits_of(&from, bitmaps[0].name.as_str());
        assert!(info.name == "of this host" || bits_of(&to, &info.name) == sent);
    }
    is_taken
}

/// Breaks each invariant of what reads a stream on purpose: the test of it must notice.
#[cfg(debug_assertions)]
mod sabotage {
    use super::{cases, hostile, native};
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    const BROKEN: &[(Sabotage, fn())] = &[
        (
            Sabotage::ReplaceLocal,
            hostile::a_local_bitmap_is_never_written_to,
        ),
        (
            Sabotage::IgnoreLimits,
            hostile::a_receiver_takes_no_more_than_it_allows,
        ),
        (Sabotage::AddLoaded, hostile::what_has_one_meaning_is_taken),
        (Sabotage::AddLoaded, native::frames_may_say_anything),
        (
            Sabotage::CompleteWithGaps,
            hostile::a_bitmap_is_whole_when_all_its_bits_came_and_it_was_said,
        ),
        (
            Sabotage::TrustLength,
            hostile::bits_of_what_is_not_there_are_refused,
        ),
        (
            Sabotage::TakeCutNames,
            super::every_fixture_is_read_as_what_it_was,
        ),
        (
            Sabotage::ForgetPlace,
            hostile::whoever_knows_a_section_is_not_given_all_memory,
        ),
        (
            Sabotage::KeepAll,
            hostile::whoever_knows_a_section_is_not_given_all_memory,
        ),
        (Sabotage::IgnoreNumbers, cases::native_frames_are_checked),
        (
            Sabotage::IgnoreNumbers,
            native::several_disks_come_over_a_line_that_does_what_it_wants,
        ),
        (
            Sabotage::ForgetUnconfirmed,
            native::several_disks_come_over_a_line_that_does_what_it_wants,
        ),
        (Sabotage::TrustFrameLength, cases::native_frames_are_checked),
    ];

    #[test]
    fn every_broken_invariant_is_noticed() {
        // Panics are what is wanted here.
        let hook = std::panic::take_hook();
        let here = std::thread::current().id();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() != here {
                hook(info);
            }
        }));
        let mut missed = Vec::new();
        for &(sabotage, test) in BROKEN {
            break_on_this_thread(Some(sabotage));
            let noticed = std::panic::catch_unwind(test).is_err();
            break_on_this_thread(None);
            if !noticed {
                missed.push(sabotage);
            }
        }
        drop(std::panic::take_hook());
        assert!(missed.is_empty(), "not noticed: {missed:?}");
    }
}
