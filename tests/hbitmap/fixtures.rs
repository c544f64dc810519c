//! Bitmaps that QEMU made: what it sent, stored and reported is what is sent, stored and reported here.

use std::collections::BTreeMap;

use blockjob::HBitmap;
use blockjob::bitmap::Status;
use serde_json::Value;

use crate::twin::*;

fn read(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn truth(name: &str) -> Value {
    serde_json::from_slice(&read(&format!("{name}.json"))).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

/// What QEMU says of a bitmap is so.
fn assert_true(map: &HBitmap, truth: &Value) {
    map.check_invariants();
    let ranges = list(&truth["dirty_ranges"]).iter();
    let ranges = ranges.map(|range| number(&range[0])..number(&range[0]) + number(&range[1]));
    assert!(runs(map).into_iter().eq(ranges), "ranges of {truth}");
    if let Some(bytes) = truth.get("dirty_bytes_as_reported") {
        assert_eq!(map.dirty_bytes(), number(bytes));
    }
    #[cfg(feature = "sha2")]
    assert_eq!(map.digest_hex(), truth["sha256"].as_str().unwrap());
}

/// A bitmap made of what QEMU says of it.
fn map_of_truth(truth: &Value, len: u64) -> HBitmap {
    let exponent = number(&truth["granularity"]).ilog2() as u8;
    let mut map = map(len, exponent);
    for range in list(&truth["dirty_ranges"]) {
        map.set(number(&range[0])..number(&range[0]) + number(&range[1]))
            .unwrap();
    }
    map
}

// --- Migration streams -------------------------------------------------------------------------

/// Bytes that are taken from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    /// A big-endian number.
    fn number(&mut self, len: usize) -> u64 {
        let bytes = self.take(len).iter();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn name(&mut self) -> String {
        let len = self.number(1) as usize;
        String::from_utf8(self.take(len).to_vec()).unwrap()
    }
}

/// A run of bits as it was sent; without bytes if all are zero.
struct Bits<'a> {
    start: u64,
    len: u64,
    buffer: Option<&'a [u8]>,
}

/// The bits of every bitmap of a stream, by the names of node and bitmap.
fn bits_of<'a>(stream: &'a [u8], truth: &Value) -> BTreeMap<(String, String), Vec<Bits<'a>>> {
    let mut bitmaps: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut current = (String::new(), String::new());
    for section in list(&truth["dirty_bitmap_sections"]) {
        let start = number(&section["body_offset"]) as usize;
        let len = number(&section["body_length"]) as usize;
        let mut body = Bytes(&stream[start..start + len]);
        while !body.0.is_empty() {
            let flags = body.number(1);
            let has = |flag: u64| flags & flag != 0;
            if has(0x08) {
                current.0 = body.name();
            }
            if has(0x04) {
                current.1 = body.name();
            }
            if has(0x10) {
                body.take(5);
                bitmaps.insert(current.clone(), Vec::new());
            } else if has(0x40) {
                let start = body.number(8) * 512;
                let len = body.number(4) * 512;
                let buffer = (!has(0x02)).then(|| {
                    let len = body.number(8) as usize;
                    body.take(len)
                });
                let bits = Bits { start, len, buffer };
                bitmaps.get_mut(&current).expect("it began").push(bits);
            }
        }
    }
    bitmaps
}

/// Loads what was sent in any order, and makes the same bytes of what QEMU said was dirty.
fn check_stream(name: &str) {
    let truth = truth(name);
    let stream = read(&format!("{name}.stream"));
    let sent = bits_of(&stream, &truth);
    let bitmaps = list(&truth["bitmaps_in_wire_order"]);
    assert_eq!(sent.len(), bitmaps.len());
    for bitmap in bitmaps {
        let text = |key: &str| bitmap[key].as_str().unwrap().to_owned();
        let bits = &sent[&(text("wire_node"), text("wire_name"))];
        let expected = map_of_truth(bitmap, number(&bitmap["size"]));
        assert_eq!(expected.granules(), number(&bitmap["nbits"]));
        assert_true(&expected, bitmap);

        let new = || map(expected.len(), expected.granularity().exponent());
        let mut loaded = [new(), new(), new()];
        let _ = loaded[2].set_all();
        for at in 0..bits.len() {
            load(&mut loaded[0], &bits[at]);
            load(&mut loaded[1], &bits[bits.len() - 1 - at]);
            load(&mut loaded[2], &bits[(at * 7 + 3) % bits.len()]);
        }
        assert_true(&loaded[0], bitmap);
        assert_true(&loaded[1], bitmap);
        if !bits.len().is_multiple_of(7) {
            assert_true(&loaded[2], bitmap);
        }

        for Bits { start, len, buffer } in bits {
            let range = *start..start + len;
            let mut part = vec![0x55; expected.serialized_len(range.clone()).unwrap()];
            expected.serialize_part(range.clone(), &mut part).unwrap();
            match buffer {
                Some(buffer) => {
                    let (bits, padding) = buffer.split_at(part.len());
                    assert_eq!(part, bits, "{range:?}");
                    assert!(padding.len() < 32 && padding.iter().all(|byte| *byte == 0));
                }
                None => assert!(!expected.any_dirty_in(range)),
            }
        }
    }
}

fn load(map: &mut HBitmap, Bits { start, len, buffer }: &Bits<'_>) {
    let range = *start..start + len;
    match buffer {
        Some(buffer) => {
            let len = map.serialized_len(range.clone()).unwrap();
            map.deserialize_part(range, &buffer[..len]).unwrap();
        }
        None => {
            map.deserialize_zeroes(range).unwrap();
        }
    }
    map.check_invariants();
}

#[test]
fn streams_of_qemu_are_loaded_and_made() {
    for name in [
        "alias",
        "basic",
        "empty-full",
        "multi",
        "multichunk",
        "names",
        "nodes",
        "postcopy",
        "tails",
    ] {
        check_stream(&format!("bitmap-{name}"));
    }
}

// --- Stored in an image ------------------------------------------------------------------------

#[test]
fn bitmaps_stored_by_qemu_are_loaded() {
    let truth = truth("qcow2-bitmaps");
    let image = read("qcow2-bitmaps.qcow2");
    let cluster = number(&truth["cluster_size"]) as usize;
    // What is missing at the end of the file reads as zero.
    let read_at = |offset: usize, len: usize| {
        let rest = image.get(offset..).unwrap_or_default();
        let mut bytes = rest[..len.min(rest.len())].to_vec();
        bytes.resize(len, 0);
        bytes
    };
    let bitmaps = list(&truth["bitmaps_in_directory_order"]);
    assert_eq!(bitmaps.len(), 5);
    for bitmap in bitmaps {
        let expected = map_of_truth(bitmap, number(&bitmap["size"]));
        assert_true(&expected, bitmap);
        let mut map = map(expected.len(), expected.granularity().exponent());
        let covered = map.coverage(cluster as u64);
        let entries = number(&bitmap["table_entries"]) as usize;
        let table = read_at(number(&bitmap["table_offset"]) as usize, entries * 8);
        for (index, entry) in table.chunks(8).enumerate() {
            let start = index as u64 * covered;
            let range = start..map.len().min(start + covered);
            let entry = Bytes(entry).number(8);
            match (entry & 0x00ff_ffff_ffff_fe00, entry & 1) {
                (0, 0) => map.deserialize_zeroes(range).map(drop),
                (0, _) => map.deserialize_ones(range).map(drop),
                (offset, _) => {
                    let len = map.serialized_len(range.clone()).unwrap();
                    let bytes = read_at(offset as usize, cluster);
                    assert!(bytes[len..].iter().all(|byte| *byte == 0));
                    map.deserialize_part(range, &bytes[..len]).map(drop)
                }
            }
            .unwrap();
        }
        assert_true(&map, bitmap);
    }
}

// --- Told over NBD -----------------------------------------------------------------------------

#[test]
fn extents_are_what_qemu_tells_over_nbd() {
    let truth = truth("nbd-extents");
    let mut told = 0;
    for node in list(&truth["nodes"]) {
        for bitmap in list(&node["bitmaps"]) {
            let map = map_of_truth(bitmap, number(&node["size"]));
            assert_true(&map, bitmap);
            let context = format!("qemu:dirty-bitmap:{}", bitmap["name"].as_str().unwrap());
            for query in list(&node["queries"]) {
                let mut at = number(&query["offset"]);
                let end = at + number(&query["length"]);
                for extent in list(&query["reply"][&context]) {
                    // A reply of 32 bits may end amid an extent, and one extent may be all there is.
                    let expected = map.status(at..end.min(map.len())).unwrap();
                    let range = (at..at + number(&extent[0])).into();
                    let status = match number(&extent[1]) {
                        0 => Status::Clean(range),
                        _ => Status::Dirty(range),
                    };
                    assert_eq!(status, expected, "{query}");
                    at = range.end();
                    told += 1;
                }
                let is_one = query["req_one"].as_bool().unwrap();
                assert!(is_one || at == end.min(map.len()), "{query}");
            }
        }
    }
    assert!(told > 20);
}
