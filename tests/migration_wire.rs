//! The stream of bitmaps: read and made byte for byte as QEMU does, cut anywhere, and with anything wrong in it.
//!
//! `BLOCKJOB_SEED` is the first seed of what is random here, and `BLOCKJOB_SEEDS` how many are run.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may read the clock, to be over in time"
)]

#[path = "migration/truth.rs"]
mod truth;

use std::time::Duration;

use blockjob::migration::{
    ArrivalState, Framing, IncomingMigration, IncomingOptions, Next, OutgoingOptions, SkipRam,
    StreamKind,
};
use blockjob::{BitmapMigration, Node};

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
fn every_fixture_is_read_as_what_it_was() {
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
