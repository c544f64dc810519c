//! QEMU's own programs, run as programs.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::nbd::Nbd;

/// How long a program may take to come up, or to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a test has to do without the programs it needs. It says so, and in CI it fails.
pub(crate) fn is_missing(test: &str) -> bool {
    let missing = ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"]
        .into_iter()
        .find(|program| {
            let version = Command::new(program).arg("--version").output();
            version.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        });
    let Some(program) = missing else {
        return false;
    };
    // Past the harness, which keeps what a passing test prints to itself.
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: {program} not found");
    assert!(
        std::env::var_os("CI").is_none_or(|value| value != "true"),
        "{test}: {program} must be there in CI"
    );
    true
}

/// A directory of one test, removed with all that is in it.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "blockjob-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).expect("a directory of that name is nobody else's");
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new image. `options` go to `qemu-img create`.
    pub(crate) fn create(&self, name: &str, options: &[&str], len: u64) -> Image {
        let image = Image {
            path: self.path(name),
            format: "qcow2",
        };
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", image.format]);
        run(command.args(options).arg(&image.path).arg(len.to_string()));
        image
    }

    /// A new raw image, which is a hole.
    pub(crate) fn create_raw(&self, name: &str, len: u64) -> Image {
        let image = Image {
            path: self.path(name),
            format: "raw",
        };
        let file = File::create_new(&image.path).expect("a new file in our own directory");
        file.set_len(len).expect("room for a hole");
        image
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A disk image that nobody has open.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    format: &'static str,
}

/// A part of an image, as `qemu-img map` tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Whether the topmost layer holds it.
    pub(crate) in_top: bool,
}

impl Image {
    /// Runs `qemu-io` commands on it, one after the other.
    pub(crate) fn io(&self, commands: &[&str]) {
        let mut command = Command::new("qemu-io");
        command.args(["-f", self.format]);
        for one in commands {
            command.args(["-c", one]);
        }
        let told = run(command.arg(&self.path));
        // It exits with 0 when a pattern is not found.
        assert!(!told.contains("failed"), "{commands:?}: {told}");
    }

    /// QEMU's verdict on whether a guest sees the same on both.
    pub(crate) fn assert_same_content(&self, other: &Image) {
        let mut command = Command::new("qemu-img");
        command.args(["compare", "-f", self.format, "-F", other.format]);
        let told = run(command.args([&self.path, &other.path]));
        assert!(told.contains("identical"), "{told}");
    }

    /// QEMU's verdict on its tables.
    pub(crate) fn check(&self) {
        run(Command::new("qemu-img")
            .args(["check", "-q", "-f", self.format])
            .arg(&self.path));
    }

    /// Gives back what a server that was killed had reserved, and not used yet.
    pub(crate) fn mend_leaks(&self) {
        // It exits with 0 if there was nothing, too, and otherwise only if something is wrong still.
        run(Command::new("qemu-img")
            .args(["check", "-q", "-r", "leaks", "-f", self.format])
            .arg(&self.path));
    }

    /// All that a guest sees.
    pub(crate) fn content(&self) -> Vec<u8> {
        let raw = self.path.with_extension("content");
        run(Command::new("qemu-img")
            .args(["convert", "-f", self.format, "-O", "raw"])
            .args([&self.path, &raw]));
        let content = fs::read(&raw).expect("written just now");
        fs::remove_file(&raw).expect("it is our own");
        content
    }

    pub(crate) fn map(&self) -> Vec<Mapped> {
        let mut command = Command::new("qemu-img");
        command.args(["map", "--output=json", "-f", self.format]);
        let told = run(command.arg(&self.path));
        // One object a line.
        let field = |line: &str, name: &str| {
            let (_, value) = line
                .split_once(&format!("\"{name}\": "))
                .unwrap_or_else(|| {
                    panic!("no {name} in {line}");
                });
            value
                .split([',', '}'])
                .next()
                .expect("there is always a first part")
                .to_owned()
        };
        let number = |line: &str, name: &str| field(line, name).parse::<u64>().expect("a number");
        let lines = told.lines().filter(|line| line.contains("\"start\""));
        lines
            .map(|line| Mapped {
                start: number(line, "start"),
                len: number(line, "length"),
                in_top: number(line, "depth") == 0 && field(line, "present") == "true",
            })
            .collect()
    }

    /// Lets `qemu-nbd` serve it.
    pub(crate) fn export(&self, options: &[&str]) -> Export {
        let socket = self.path.with_extension("sock");
        let log = self.path.with_extension("log");
        let stderr = File::create(&log).expect("a new file in our own directory");
        // It leaves by itself with its last client: should this process be killed, nothing stays.
        let child = Command::new("qemu-nbd")
            .args(["-f", self.format, "--shared=8", "--cache=writeback"])
            .args(["--discard=unmap", "--detect-zeroes=off"])
            .args(options)
            .arg("--socket")
            .args([&socket, &self.path])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("it was found");
        Export {
            image: self.clone(),
            child,
            socket,
            log,
        }
    }
}

/// An image that `qemu-nbd` serves. Dropping it kills the server.
#[derive(Debug)]
pub(crate) struct Export {
    image: Image,
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Export {
    /// A connection of one's own.
    pub(crate) fn connect(&mut self) -> Nbd {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match Nbd::connect(&self.socket) {
                Ok(nbd) => return nbd,
                Err(error) => error,
            };
            let has_left = self.child.try_wait().expect("our own child").is_some();
            // Until it listens, there is no socket, or nobody at it.
            let may_come = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            );
            assert!(
                may_come && !has_left && Instant::now() < deadline,
                "{error}; qemu-nbd says: {}",
                fs::read_to_string(&self.log).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has the server write everything out and leave, and gives back its image.
    pub(crate) fn shut_down(mut self) -> Image {
        self.signal("-TERM");
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("our own child").is_none() {
            assert!(Instant::now() < deadline, "qemu-nbd does not leave");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.image.clone()
    }

    /// Kills the server at once.
    pub(crate) fn kill(mut self) {
        self.kill_now();
    }

    /// Has the server stand still: it takes requests, and answers none.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    /// A child that has left was not waited for, so its number is still its own.
    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        run(Command::new("kill").args([signal, &pid]));
    }

    fn kill_now(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.kill_now();
    }
}

/// A storage daemon that is told what to do. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct StorageDaemon {
    child: Child,
    lines: BufReader<UnixStream>,
    disk: PathBuf,
}

impl StorageDaemon {
    /// One that serves the image as the node `source`, also to clients.
    pub(crate) fn serve(scratch: &Scratch, source: &Image) -> Self {
        let [socket, disk] = ["qmp.sock", "disk.sock"].map(|name| scratch.path(name));
        let chardev = format!("socket,id=qmp,server=on,wait=off,path={}", socket.display());
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=qmp"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("it was found");
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            let has_left = child.try_wait().expect("our own child").is_some();
            assert!(!has_left, "qemu-storage-daemon has left");
            std::thread::sleep(Duration::from_millis(5));
        };
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("it is not zero");
        let mut daemon = Self {
            child,
            lines: BufReader::new(stream),
            disk,
        };
        daemon.line_with("QMP");
        daemon.run("qmp_capabilities", json!({}));
        daemon.open("source", source);
        let address = json!({"type": "unix", "data": {"path": daemon.disk}});
        daemon.run("nbd-server-start", json!({"addr": address}));
        let export = json!({
            "type": "nbd", "id": "disk", "node-name": "source", "name": "", "writable": true,
        });
        daemon.run("block-export-add", export);
        daemon
    }

    /// A connection to the source.
    pub(crate) fn connect(&self) -> Nbd {
        Nbd::connect(&self.disk).expect("it listens")
    }

    /// Opens an image, with all below it, as a node of that name.
    pub(crate) fn open(&mut self, name: &str, image: &Image) {
        let file = json!({"driver": "file", "filename": image.path, "discard": "unmap"});
        let node = json!({
            "driver": image.format, "node-name": name, "discard": "unmap", "file": file,
        });
        self.run("blockdev-add", node);
    }

    /// Does what is asked and gives what it answers.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.lines.get_mut(), "{request}").expect("it listens");
        let mut answer = self.line_with("return");
        answer["return"].take()
    }

    /// Waits for the end of the only job, which is to succeed.
    pub(crate) fn wait_for_job(&mut self) {
        loop {
            let line = self.line_with("event");
            match line["event"].as_str() {
                Some("BLOCK_JOB_COMPLETED") => {
                    assert!(line["data"]["error"].is_null(), "{line}");
                    return;
                }
                Some("BLOCK_JOB_ERROR" | "BLOCK_JOB_CANCELLED") => panic!("{line}"),
                _ => {}
            }
        }
    }

    /// Bytes that are dirty in the only bitmap of the source.
    pub(crate) fn dirty_bytes(&mut self) -> u64 {
        let nodes = self.run("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().expect("a list");
        let source = nodes.iter().find(|node| node["node-name"] == "source");
        let bitmap = &source.expect("it is open")["dirty-bitmaps"][0];
        bitmap["count"].as_u64().expect("it has a bitmap")
    }

    /// Has it close everything and leave.
    pub(crate) fn shut_down(mut self) {
        self.run("quit", json!({}));
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("our own child").is_none() {
            assert!(Instant::now() < deadline, "qemu-storage-daemon stays");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Reads on to an object that has such a field.
    fn line_with(&mut self, field: &str) -> Value {
        loop {
            let mut line = String::new();
            let len = self.lines.read_line(&mut line).expect("it answers in time");
            assert_ne!(len, 0, "qemu-storage-daemon has left");
            let line: Value = serde_json::from_str(&line).expect("it speaks JSON");
            assert!(line.get("error").is_none(), "{line}");
            if line.get(field).is_some() {
                return line;
            }
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of storage that a file takes.
pub(crate) fn storage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("it is there").blocks() * 512
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("it was found");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}: {told}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    told
}
