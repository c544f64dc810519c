//! The program that looks into streams tells what QEMU told, and says of any other stream what it is.
#![allow(missing_docs, reason = "a test")]
#![cfg(unix)]

#[path = "cli/program.rs"]
mod program;
#[path = "../examples/support/mod.rs"]
mod support;
#[path = "migration/truth.rs"]
mod truth;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

use program::example;
use support::temp::TempFolder;
use truth::Truth;

fn migrate_bitmap(args: &[&str]) -> Output {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| example("migrate_bitmap"));
    Command::new(program).args(args).output().unwrap()
}

/// What is captured, and what QEMU said of it.
fn fixture(name: &str) -> (String, Vec<u8>, String) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let path = folder.join(name).with_extension("stream");
    let truth = std::fs::read_to_string(path.with_extension("json")).unwrap();
    let stream = std::fs::read(&path).unwrap();
    (path.into_os_string().into_string().unwrap(), stream, truth)
}

const STREAMS: [&str; 9] = [
    "bitmap-alias",
    "bitmap-basic",
    "bitmap-empty-full",
    "bitmap-multi",
    "bitmap-multichunk",
    "bitmap-names",
    "bitmap-nodes",
    "bitmap-postcopy",
    "bitmap-tails",
];

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// That each bitmap is told as QEMU told it.
fn check(told: &str, truth: &Truth, name: &str) {
    let told: Vec<Value> = told
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(told.len(), truth.bitmaps.len(), "{name}");
    for (told, bitmap) in told.iter().zip(&truth.bitmaps) {
        assert_eq!(told["node"], bitmap.node, "{name}");
        assert_eq!(told["name"], bitmap.name, "{name}");
        assert_eq!(told["granularity"], bitmap.granularity.bytes(), "{name}");
        assert_eq!(told["enabled"], bitmap.enabled, "{name}");
        assert_eq!(told["persistent"], bitmap.persistent, "{name}");
        assert_eq!(told["sha256"], bitmap.sha256, "{name}");
        let ranges: Vec<_> = bitmap.dirty.iter().map(|r| (r.start(), r.len())).collect();
        assert_eq!(told["dirty_ranges"], serde_json::json!(ranges), "{name}");
        // Whole granules, as QEMU counts.
        let dirty = reported(truth, &bitmap.node, &bitmap.name);
        assert_eq!(told["dirty_bytes"], *dirty, "{name}");
    }
}

fn reported<'a>(truth: &'a Truth, node: &str, name: &str) -> &'a Value {
    let bitmaps = truth.json["bitmaps_in_wire_order"].as_array().unwrap();
    let is_it = |bitmap: &&Value| bitmap["wire_node"] == node && bitmap["wire_name"] == name;
    &bitmaps.iter().find(is_it).unwrap()["dirty_bytes_as_reported"]
}

#[test]
fn every_stream_of_qemu_is_told_as_qemu_told_it() {
    for name in STREAMS {
        let (path, _, text_of_truth) = fixture(name);
        let truth = Truth::parse(&text_of_truth).unwrap();
        let mut args = vec!["inspect".to_owned(), path, "--json".to_owned()];
        for bitmap in &truth.bitmaps {
            args.push(format!("--size={}={}", bitmap.node, bitmap.size));
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let output = migrate_bitmap(&args);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        check(text(&output.stdout), &truth, name);
    }
}

#[test]
fn what_is_made_of_a_truth_file_is_told_as_it_says() {
    let folder = TempFolder::new("migrate-bitmap-cli").unwrap();
    let made = folder.path().join("made").into_os_string();
    let made = made.into_string().unwrap();
    for name in STREAMS {
        let (path, _, text_of_truth) = fixture(name);
        let truth = path.replace(".stream", ".json");
        let output = migrate_bitmap(&["make", &truth, &made]);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let truth = Truth::parse(&text_of_truth).unwrap();
        let sizes: Vec<_> = truth
            .bitmaps
            .iter()
            .map(|bitmap| format!("--size={}={}", bitmap.node, bitmap.size))
            .collect();
        let mut args = vec!["inspect", &made, "--json"];
        args.extend(sizes.iter().map(String::as_str));
        check(text(&migrate_bitmap(&args).stdout), &truth, name);
    }
}

/// A machine with memory and devices, and no bitmap: its stream is sound.
#[test]
fn a_stream_without_bitmaps_is_no_error() {
    let (path, stream, truth) = fixture("ram-tiny");
    for json in [&[][..], &["--json"]] {
        let output = migrate_bitmap(&[&["inspect", &path], json].concat());
        assert!(output.status.success());
        assert_eq!(text(&output.stdout), "");
        let told = text(&output.stderr);
        assert_eq!(told.lines().count(), 1, "{told}");
        let truth: Value = serde_json::from_str(&truth).unwrap();
        let section = truth["device_state_offset"].as_u64().unwrap() as usize;
        // Type, number, name, instance and version stand before the state.
        let device = section + 1 + 4 + 1 + usize::from(stream[section + 5]) + 4 + 4;
        assert!(
            told.starts_with(&format!("no bitmaps before byte {device}, ")),
            "{told}"
        );
    }
    // One that is over, and a bare body.
    let folder = TempFolder::new("migrate-bitmap-cli").unwrap();
    let file = folder.path().join("none").into_os_string();
    let file = file.into_string().unwrap();
    for stream in [&b"QEVM\0\0\0\x03\x07\0\0\0\0\0"[..], b"\x01"] {
        std::fs::write(&file, stream).unwrap();
        let output = migrate_bitmap(&["inspect", &file]);
        assert!(output.status.success());
        assert!(text(&output.stderr).starts_with("no bitmaps: "));
    }
}

#[test]
fn a_bad_stream_gives_one_line_with_the_byte_and_a_failure() {
    let folder = TempFolder::new("migrate-bitmap-cli").unwrap();
    let file = folder.path().join("bad").into_os_string();
    let file = file.into_string().unwrap();
    let (_, sound, _) = fixture("bitmap-basic");
    let mut version = sound.clone();
    version[7] = 4;
    let cut = sound[..100].to_vec();
    // A section that goes on, in front of the bitmaps: they may come after it.
    let live = b"QEVM\0\0\0\x03\x07\0\0\0\0\x01\0\0\0\x05\x04vfio\0\0\0\0\0\0\0\x01?".to_vec();
    for (stream, at) in [
        (vec![], 0),
        // Without a header it is taken for a bare body.
        (b"not a stream".to_vec(), 12),
        (version, 4),
        (cut, 100),
        (live, 31),
    ] {
        std::fs::write(&file, &stream).unwrap();
        for json in [&[][..], &["--json"]] {
            let output = migrate_bitmap(&[&["inspect", &file], json].concat());
            assert!(!output.status.success());
            assert_eq!(text(&output.stdout), "");
            let told = text(&output.stderr);
            assert_eq!(told.lines().count(), 1, "{told}");
            assert!(told.contains(&format!("at byte {at}: ")), "{told}");
        }
    }
}
