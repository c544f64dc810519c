//! The program that users run first says clearly what is wrong, leaves the source alone, and tells
//! scripts what it did.
#![allow(missing_docs, reason = "a test")]
#![cfg(target_os = "linux")]

#[path = "cli/program.rs"]
mod program;
#[path = "../examples/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use program::example;
use support::temp::TempFolder;

const LEN: usize = (1 << 20) + 700;

/// The program.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| example("live_mirror"))
}

fn live_mirror(args: &[&str]) -> Output {
    Command::new(program()).args(args).output().unwrap()
}

/// Two files with different content, and their folder.
struct Files {
    folder: TempFolder,
    source: String,
    target: String,
    content: Vec<u8>,
}

impl Files {
    fn new() -> Self {
        let folder = TempFolder::new("live-mirror-cli").unwrap();
        let [source, target] = ["source", "target"].map(|name| folder.path().join(name));
        let mut content: Vec<u8> = (0..LEN).map(|index| (index / 600 % 251) as u8).collect();
        content[64 << 10..512 << 10].fill(0);
        std::fs::write(&source, &content).unwrap();
        std::fs::write(&target, vec![0xaa; LEN]).unwrap();
        Self {
            source: source.into_os_string().into_string().unwrap(),
            target: target.into_os_string().into_string().unwrap(),
            folder,
            content,
        }
    }

    fn assert_source_untouched(&self) {
        assert!(std::fs::read(&self.source).unwrap() == self.content);
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// It fails as a program should: with a message for people, nothing for scripts, and no panic.
#[track_caller]
fn assert_fails(output: &Output, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(message), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn mirrors_one_file_to_another_of_the_same_length() {
    let files = Files::new();
    let output = live_mirror(&[&files.source, &files.target]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("OK: "));
    assert!(std::fs::read(&files.target).unwrap() == files.content);
    files.assert_source_untouched();
}

#[test]
fn makes_a_target_that_is_missing() {
    let files = Files::new();
    std::fs::remove_file(&files.target).unwrap();
    let output = live_mirror(&[&files.source, &files.target]);
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read(&files.target).unwrap() == files.content);
}

#[test]
fn an_empty_disk_is_mirrored_at_once() {
    let files = Files::new();
    std::fs::write(&files.source, []).unwrap();
    std::fs::write(&files.target, []).unwrap();
    let output = live_mirror(&[&files.source, &files.target]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_source_that_does_not_exist_is_named_and_no_target_is_made() {
    let files = Files::new();
    std::fs::remove_file(&files.target).unwrap();
    let output = live_mirror(&["/no/such/file", &files.target]);
    assert_fails(&output, "cannot open the source /no/such/file");
    assert_eq!(files.names(), ["source"]);
}

#[test]
fn a_target_that_cannot_be_made_is_named() {
    let files = Files::new();
    let output = live_mirror(&[&files.source, "/no/such/folder/target"]);
    assert_fails(&output, "cannot make the target /no/such/folder/target");
    let folder = files.folder.path().to_str().unwrap();
    let output = live_mirror(&[&files.source, folder]);
    assert_fails(&output, "not a regular file");
    files.assert_source_untouched();
}

#[test]
fn the_same_file_twice_is_refused_under_any_name() {
    let files = Files::new();
    let link = format!("{}.link", files.target);
    std::fs::hard_link(&files.source, &link).unwrap();
    for target in [&files.source, &link] {
        let output = live_mirror(&[&files.source, target]);
        assert_fails(&output, "source and target are the same storage");
    }
    files.assert_source_untouched();
}

#[test]
fn unequal_sizes_are_refused_with_both_and_the_target_is_left_alone() {
    let files = Files::new();
    std::fs::write(&files.target, [5; 1000]).unwrap();
    let output = live_mirror(&[&files.source, &files.target]);
    assert_fails(&output, "different sizes");
    assert_fails(&output, &LEN.to_string());
    assert_fails(&output, "1000");
    assert!(std::fs::read(&files.target).unwrap() == [5; 1000]);
}

/// A full disk cannot be had without privileges; a limit on the size of files is the same to a write,
/// but for the number of its error.
#[test]
fn a_target_that_cannot_grow_fails_the_mirror_and_not_the_source() {
    let files = Files::new();
    // A source that is a hole but for its end, which lies above the limit.
    let grown = 32 << 20;
    let mut content = vec![0; grown];
    content[grown - 5000..].fill(7);
    std::fs::write(&files.source, &content).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&files.target)
        .unwrap()
        .set_len(grown as u64)
        .unwrap();
    // In units of 512 bytes. The signal that comes with it is ignored, so that the write fails.
    let output = Command::new("sh")
        .args(["-c", r#"trap '' XFSZ; ulimit -f 2048; exec "$@""#, "sh"])
        .arg(program())
        .args([&files.source, &files.target])
        .output()
        .unwrap();
    assert_fails(&output, "target failed");
    assert_fails(&output, "File too large");
    assert!(std::fs::read(&files.source).unwrap() == content);

    // One that was made goes again.
    let made = format!("{}.made", files.target);
    let output = Command::new("sh")
        .args(["-c", r#"trap '' XFSZ; ulimit -f 2048; exec "$@""#, "sh"])
        .arg(program())
        .args([&files.source, &made])
        .output()
        .unwrap();
    assert_fails(&output, "cannot make the target");
    assert_eq!(files.names(), ["source", "target"]);
}

#[test]
fn wrong_options_are_told() {
    for (args, message) in [
        (&["--granularity", "1000"][..], "not a power of two"),
        (
            &["--granularity", "128M"],
            "granularity 128 MiB is not between",
        ),
        (
            &["--workers", "0", "--size", "64M"],
            "0 workers are not between",
        ),
        (&["--speed", "many"], "many"),
        (&["--seconds", "-1"], "seconds"),
        (&["--size", "64K"], "too few for 4 writers"),
        (&["--frobnicate"], "--frobnicate"),
        (&["only-one-file"], "a source and a target"),
    ] {
        assert_fails(&live_mirror(args), message);
    }
    let help = live_mirror(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--granularity"));
}

#[test]
fn a_guest_loses_nothing_and_the_summary_says_what_was_done() {
    let temp = TempFolder::new("live-mirror-cli").unwrap();
    let output = Command::new(program())
        .args([
            "--json",
            "--size",
            "64M",
            "--seconds",
            "1",
            "--writers",
            "3",
        ])
        .args(["--granularity", "16K", "--workers", "4", "--speed", "512M"])
        .env("TMPDIR", temp.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let fields = parse_flat_object(&stdout);
    let number = |name: &str| -> f64 { fields[name].parse().unwrap() };
    assert_eq!(fields["verified"], "true");
    assert_eq!(number("bytes"), f64::from(64 << 20));
    assert_eq!(number("granularity"), 16384.0);
    assert!(number("copied_bytes") >= number("ready_bytes"));
    assert!(number("ready_bytes") > f64::from(16 << 20));
    assert!((1.0..20.0).contains(&number("seconds")));
    assert!(number("ready_seconds") <= number("seconds"));
    // The limit, with some room for what may be ahead of it at the start.
    assert!(number("bytes_per_second") < f64::from(1 << 30));
    assert!((0.0..5.0).contains(&number("held_seconds")));
    assert!(number("guest_writes") > 100.0);
    assert!(number("guest_writes_waited") <= number("guest_writes"));
    assert!(number("guest_write_seconds_max") >= 0.0);
    assert!(number("blocks_written_after_switch") > 0.0);
    assert_eq!(fields["crc32"].trim_matches('"').len(), 8);
    assert_eq!(fields.len(), 14);
    let left = std::fs::read_dir(temp.path()).unwrap().count();
    assert_eq!(left, 0, "the temporary folder is removed");
}

#[test]
fn given_files_are_written_to_by_a_guest_only_if_asked() {
    let files = Files::new();
    let len = 16 << 20;
    std::fs::write(&files.source, vec![3; len]).unwrap();
    std::fs::write(&files.target, vec![4; len]).unwrap();
    let args = ["--writers", "2", "--seconds", "0.3"];
    let output = live_mirror(&[&args[..], &[&files.source, &files.target]].concat());
    assert!(output.status.success(), "{output:?}");
    let source = std::fs::read(&files.source).unwrap();
    assert!(source.iter().any(|&byte| byte != 3));
    assert!(source != std::fs::read(&files.target).unwrap());
}

/// The fields of an object without objects or strings in it.
fn parse_flat_object(text: &str) -> std::collections::BTreeMap<&str, &str> {
    let inner = text
        .strip_suffix("}\n")
        .and_then(|text| text.strip_prefix('{'));
    let inner = inner.expect("one object on one line");
    assert!(!inner.contains(['{', '\n', '[']));
    inner
        .split(", ")
        .map(|field| {
            let (name, value) = field.split_once(": ").expect("a name and a value");
            let name = name
                .strip_prefix('"')
                .and_then(|name| name.strip_suffix('"'));
            (name.expect("a quoted name"), value)
        })
        .collect()
}
