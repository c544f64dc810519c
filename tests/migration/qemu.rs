//! Bitmaps that migrate to and from a real QEMU, judged by its own digests.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use blockjob::migration::{
    ArrivalState, Framing, IncomingOptions, Mode, Next, OutgoingOptions, SkipRam, StreamKind,
};
use blockjob::{BitmapMigration, Node};
use serde_json::{Value, json};

use crate::support::qemu::Scratch;
use crate::truth::{Truth, bits_of, digest, migration_of, quiesce};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a test has to do without QEMU. It says so, and in CI it fails.
fn is_missing(test: &str) -> bool {
    let version = Command::new(PROGRAM).arg("--version").output();
    if version.is_ok() {
        return false;
    }
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: {PROGRAM} not found");
    assert!(
        std::env::var_os("CI").is_none_or(|value| value != "true"),
        "{test}: {PROGRAM} must be there in CI"
    );
    true
}

/// A machine without anything but disks.
struct Qemu {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Qemu {
    fn start(disks: &[(String, u64)]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args([
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-qmp",
            "stdio",
        ]);
        for (name, size) in disks {
            let disk = json!({"driver": "null-co", "node-name": name, "size": size});
            command.args(["-blockdev", &disk.to_string()]);
        }
        Self::run(command)
    }

    fn incoming(disks: &[(String, u64)]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args([
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            "stdio",
        ]);
        command.args(["-incoming", "defer"]);
        for (name, size) in disks {
            let disk = json!({"driver": "null-co", "node-name": name, "size": size});
            command.args(["-blockdev", &disk.to_string()]);
        }
        Self::run(command)
    }

    fn run(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it is there");
        let to = child.stdin.take().expect("it is piped");
        let from = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut qemu = Self { child, to, from };
        assert!(qemu.line()["QMP"].is_object());
        qemu.ask("qmp_capabilities", json!({}));
        qemu
    }

    fn line(&mut self) -> Value {
        loop {
            let mut line = String::new();
            let len = self.from.read_line(&mut line).expect("a line");
            assert!(len > 0, "QEMU has ended");
            // What `qemu-io` has to say comes in between.
            if line.starts_with('{') {
                return serde_json::from_str(&line).expect("JSON");
            }
        }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let question = json!({"execute": command, "arguments": arguments});
        writeln!(self.to, "{question}").expect("QEMU listens");
        loop {
            let answer = self.line();
            if answer.get("event").is_none() {
                assert!(answer.get("error").is_none(), "{command}: {answer}");
                return answer["return"].clone();
            }
        }
    }

    fn digest(&mut self, node: &str, name: &str) -> String {
        let arguments = json!({"node": node, "name": name});
        let told = self.ask("x-debug-block-dirty-bitmap-sha256", arguments);
        told["sha256"].as_str().expect("a digest").to_owned()
    }

    /// What it says of its bitmaps.
    fn bitmaps(&mut self) -> Vec<(String, Value)> {
        let nodes = self.ask("query-named-block-nodes", json!({"flat": true}));
        let mut all = Vec::new();
        for node in nodes.as_array().expect("a list") {
            let name = node["node-name"].as_str().expect("a name");
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                all.push((name.to_owned(), bitmap.clone()));
            }
        }
        all
    }

    fn wait_until_migrated(&mut self) {
        let started = Instant::now();
        loop {
            let info = self.ask("query-migrate", json!({}));
            match info["status"].as_str() {
                Some("completed") => return,
                Some("failed") => panic!("{info}"),
                _ => assert!(started.elapsed() < PATIENCE, "{info}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn load(name: &str) -> Truth {
    let path = format!("{}/tests/fixtures/{name}.json", env!("CARGO_MANIFEST_DIR"));
    Truth::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn sizes(nodes: &[(String, Node)]) -> Vec<(String, u64)> {
    nodes
        .iter()
        .map(|(name, node)| (name.clone(), node.len()))
        .collect()
}

/// Has QEMU load a stream, and compares what it then has.
fn check_loaded(truth: &Truth, path: &Path) {
    let mut qemu = Qemu::incoming(&sizes(&truth.nodes()));
    let uri = format!("exec:cat {}", path.display());
    qemu.ask("migrate-incoming", json!({"uri": uri}));
    qemu.wait_until_migrated();
    let came = qemu.bitmaps();
    assert_eq!(came.len(), truth.bitmaps.len());
    for bitmap in &truth.bitmaps {
        let is_it = |(node, known): &&(String, Value)| {
            *node == bitmap.node && known["name"] == bitmap.name.as_str()
        };
        let (_, known) = came.iter().find(is_it).expect("it came");
        assert_eq!(known["granularity"], bitmap.granularity.bytes());
        assert_eq!(known["busy"], false, "{known}");
        assert_eq!(known["persistent"], bitmap.persistent, "{known}");
        assert_eq!(
            qemu.digest(&bitmap.node, &bitmap.name),
            bitmap.sha256,
            "{}",
            bitmap.name
        );
    }
}

#[test]
fn qemu_loads_streams_that_were_made_here() {
    if is_missing("qemu_loads_streams_that_were_made_here") {
        return;
    }
    let scratch = Scratch::new();
    for name in [
        "bitmap-basic",
        "bitmap-multi",
        "bitmap-nodes",
        "bitmap-tails",
        "bitmap-names",
        "bitmap-alias",
        "bitmap-multichunk",
        "bitmap-empty-full",
    ] {
        let truth = load(name);
        let (source, nodes) = truth.source().unwrap();
        // All at the end, and all that can be while the guest runs.
        for mode in [Mode::PreCopy, Mode::Live] {
            let path = scratch.path("stream");
            std::fs::write(&path, whole(&source, &nodes, mode)).unwrap();
            check_loaded(&truth, &path);
            for (_, node) in &nodes {
                node.bitmaps().take_back();
            }
        }
    }
}

/// A whole stream of those bitmaps.
fn whole(source: &BitmapMigration, nodes: &[(String, Node)], mode: Mode) -> Vec<u8> {
    let mut options = OutgoingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    options.mode = mode;
    let mut outgoing = source.outgoing(options).unwrap();
    let (mut bytes, mut piece) = (Vec::new(), [0; 5000]);
    let mut pull = |outgoing: &mut blockjob::OutgoingMigration| {
        while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap() {
            bytes.extend(&piece[..len]);
        }
    };
    pull(&mut outgoing);
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    outgoing.stop(&guards.iter().collect::<Vec<_>>()).unwrap();
    pull(&mut outgoing);
    outgoing.finish().unwrap();
    bytes
}

/// A bitmap that is large enough to be sent live, with chunks that come twice.
#[test]
fn qemu_loads_a_stream_that_was_sent_live() {
    if is_missing("qemu_loads_a_stream_that_was_sent_live") {
        return;
    }
    let scratch = Scratch::new();
    let mut truth = load("bitmap-basic");
    let bitmap = &mut truth.bitmaps[0];
    bitmap.size = 4 << 30;
    bitmap.granularity = blockjob::Granularity::from_bytes(512).unwrap();
    bitmap.dirty = (0..100)
        .map(|at| ((at * 40) << 20..((at * 40) << 20) + 4096).into())
        .collect();
    let (source, nodes) = truth.source().unwrap();
    let node = &nodes[0].1;
    let mut options = OutgoingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    options.mode = Mode::Live;
    let mut outgoing = source.outgoing(options).unwrap();
    let (mut bytes, mut piece) = (Vec::new(), [0; 5000]);
    for round in 0..4 {
        while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut piece).unwrap() {
            bytes.extend(&piece[..len]);
        }
        if round == 3 {
            break;
        }
        for at in 0..5 {
            let at = ((round * 3 + at) * 100) << 20;
            let ticket = node
                .begin_write((at + 512..at + 1024 + round * 4096).into())
                .go();
            ticket.expect("nobody quiesces it").finish(());
        }
        if round == 2 {
            outgoing.stop(&[&quiesce(node)]).unwrap();
        }
    }
    assert!(bytes.len() > 20 << 10);
    outgoing.finish().unwrap();
    truth.bitmaps[0].sha256 = digest(&bits_of(node, &truth.bitmaps[0].name));
    let path = scratch.path("stream");
    std::fs::write(&path, bytes).unwrap();
    check_loaded(&truth, &path);
}

#[test]
fn what_qemu_sends_is_loaded() {
    if is_missing("what_qemu_sends_is_loaded") {
        return;
    }
    let scratch = Scratch::new();
    let disks = [
        ("d0".to_owned(), 200 << 20),
        ("d1".to_owned(), (40 << 20) + 512),
    ];
    let mut qemu = Qemu::start(&disks);
    let bitmaps = [
        ("d0", "fine", 512, true),
        ("d0", "coarse", 65536, true),
        ("d0", "off", 4096, false),
        ("d1", "only", 4096, true),
    ];
    for (node, name, granularity, _) in bitmaps {
        let arguments = json!({"node": node, "name": name, "granularity": granularity});
        qemu.ask("block-dirty-bitmap-add", arguments);
    }
    for (node, range) in [
        ("d0", "0 64k"),
        ("d0", "100M 3M"),
        ("d1", "39M 1M"),
        ("d1", "40M 512"),
    ] {
        let line = format!("qemu-io {node} \"write {range}\"");
        let told = qemu.ask("human-monitor-command", json!({"command-line": line}));
        assert!(
            told.as_str().is_some_and(|told| !told.contains("rror")),
            "{told}"
        );
    }
    qemu.ask(
        "block-dirty-bitmap-disable",
        json!({"node": "d0", "name": "off"}),
    );
    let digests = bitmaps.map(|(node, name, ..)| qemu.digest(node, name));
    let capability = json!([{"capability": "dirty-bitmaps", "state": true}]);
    qemu.ask(
        "migrate-set-capabilities",
        json!({"capabilities": capability}),
    );
    let path = scratch.path("stream");
    qemu.ask(
        "migrate",
        json!({"uri": format!("exec:cat > {}", path.display())}),
    );
    qemu.wait_until_migrated();
    drop(qemu);

    let nodes: Vec<_> = disks
        .iter()
        .map(|(name, size)| (name.clone(), Node::new(*size)))
        .collect();
    let mut options = IncomingOptions::default();
    options.stream = StreamKind::Qemu(Framing::Whole);
    options.foreign = Some(Box::new(SkipRam::new(4096)));
    let mut incoming = migration_of(&nodes).incoming(options);
    for piece in std::fs::read(&path).unwrap().chunks(1000) {
        incoming.feed(piece).unwrap();
    }
    incoming.finish().unwrap();
    let guards: Vec<_> = nodes.iter().map(|(_, node)| quiesce(node)).collect();
    incoming
        .guest_starts(&guards.iter().collect::<Vec<_>>())
        .unwrap();
    assert_eq!(incoming.bitmaps().len(), bitmaps.len());
    assert!(
        incoming
            .bitmaps()
            .iter()
            .all(|came| came.state == ArrivalState::Active)
    );
    for ((node, name, granularity, enabled), sha256) in bitmaps.into_iter().zip(digests) {
        let (_, node) = nodes.iter().find(|(known, _)| known == node).unwrap();
        let bits = bits_of(node, name);
        assert_eq!(bits.granularity().bytes(), granularity);
        assert!(!bits.is_clean());
        assert_eq!(digest(&bits), sha256, "{name}");
        assert_eq!(node.bitmaps().query(name).unwrap().is_recording, enabled);
    }
}

/// The guest runs, and is written to, while the bits are still to come.
#[test]
fn qemu_runs_its_guest_before_the_bits_come() {
    if is_missing("qemu_runs_its_guest_before_the_bits_come") {
        return;
    }
    let scratch = Scratch::new();
    let mut truth = load("bitmap-postcopy");
    let bitmap = truth
        .bitmaps
        .iter_mut()
        .find(|bitmap| bitmap.name == "a")
        .unwrap();
    bitmap.persistent = true;
    for (mode, is_large) in [(Mode::PostCopy, false), (Mode::Hybrid, true)] {
        if is_large {
            // Enough to be sent live.
            for bitmap in &mut truth.bitmaps {
                bitmap.size = 4 << 30;
            }
        }
        let (source, nodes) = truth.source().unwrap();
        let node = &nodes[0].1;
        let mut options = OutgoingOptions::default();
        options.stream = StreamKind::Qemu(Framing::Whole);
        options.mode = mode;
        let mut outgoing = source.outgoing(options).unwrap();
        assert_eq!(outgoing.mode(), mode);
        let mut qemu = Qemu::incoming(&sizes(&nodes));
        let capability = json!([{"capability": "dirty-bitmaps", "state": true}]);
        qemu.ask(
            "migrate-set-capabilities",
            json!({"capabilities": capability}),
        );
        let path = scratch.path("fifo");
        let _ = std::fs::remove_file(&path);
        let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo");
        assert!(made.success());
        qemu.ask(
            "migrate-incoming",
            json!({"uri": format!("exec:cat {}", path.display())}),
        );
        let mut to = std::fs::File::create(&path).unwrap();
        let mut send = |outgoing: &mut blockjob::OutgoingMigration, most: usize| {
            for _ in 0..most {
                let (Next::Bytes(_), bytes) = outgoing.next_slice(Duration::ZERO).unwrap() else {
                    break;
                };
                to.write_all(bytes).unwrap();
            }
        };
        send(&mut outgoing, usize::MAX);
        let ticket = node.begin_write((50 << 20..(50 << 20) + 512).into()).go();
        ticket.expect("nobody quiesces it").finish(());
        outgoing.stop(&[&quiesce(node)]).unwrap();
        send(&mut outgoing, usize::MAX);
        assert_eq!(outgoing.bytes_sent_stopped(), 0);
        outgoing.guest_started().unwrap();
        // The package, and one part.
        outgoing.set_part_chunks(1);
        send(&mut outgoing, 1);
        let started = Instant::now();
        while qemu.ask("query-status", json!({}))["status"] != "running" {
            assert!(started.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(10));
        }
        // The first has one chunk, which is there, or is being taken in beside the guest.
        let mut busy = || {
            let bitmaps = qemu.bitmaps();
            let busy = bitmaps.iter().filter(|(_, bitmap)| bitmap["busy"] == true);
            busy.count()
        };
        while busy() > 2 {
            assert!(started.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(busy(), 2, "the other bits are still to come");
        let line = "qemu-io d0 \"write 70M 512\"";
        qemu.ask("human-monitor-command", json!({"command-line": line}));
        send(&mut outgoing, usize::MAX);
        outgoing.finish().unwrap();
        drop(to);
        qemu.wait_until_migrated();
        assert_eq!(qemu.bitmaps().len(), truth.bitmaps.len());
        for bitmap in &truth.bitmaps {
            let mut bits = bits_of(node, &bitmap.name);
            if bitmap.enabled {
                bits.set_at(70 << 20).unwrap();
            }
            assert_eq!(
                qemu.digest("d0", &bitmap.name),
                digest(&bits),
                "{}",
                bitmap.name
            );
        }
        assert!(
            qemu.bitmaps()
                .iter()
                .all(|(_, bitmap)| bitmap["busy"] == false)
        );
    }
}
