//! Bitmaps as they are sent and received, beside copying their bits.
//!
//! ```text
//! cargo bench --bench migration [-- FILTER]      measures
//! cargo bench --bench migration -- table         prints what was measured last, as Markdown, and what is sent
//!                                                while the guest stands still
//!
//! migration/send-DISK-FILL       a bitmap goes out, as it is lent by `next_slice`
//!     memcpy                     its serialized bits are copied, 1 MiB at a time to the same place
//! migration/receive-DISK-FILL    a bitmap comes in, 1 MiB at a time, to memory that is new
//!     memcpy                     its serialized bits are copied to memory that is new
//!
//!     qemu                       QEMU's stream
//!     native                     the native one, with its checksums and the digest at the end
//! ```
//!
//! `DISK` is 64 TiB in granules of 64 KiB, which are 128 MiB of bits, or 1 TiB in granules of 512 bytes, which are
//! 256 MiB. Of `sparse` one granule in 1,000 is dirty, of `half` every second, anywhere, of `full` all.
//! `--test` takes bitmaps of a 64th of that.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a bench measures time"
)]

use std::hint::black_box;
use std::io;
use std::time::Duration;

use blockjob::migration::{
    Framing, IncomingMigration, IncomingOptions, Mode, Next, OutgoingMigration, OutgoingOptions,
    StreamKind,
};
use blockjob::{
    BitmapMigration, BitmapOptions, BitmapStorage, ClaimFor, Granularity, HBitmap, Node,
};
use criterion::{BatchSize, Criterion, SamplingMode, Throughput};

#[path = "support/random.rs"]
mod random;
#[path = "support/table.rs"]
mod table;

use random::random;

const PIECE: usize = 1 << 20;
const STREAMS: [(&str, StreamKind); 2] = [
    ("qemu", StreamKind::Qemu(Framing::Bare)),
    ("native", StreamKind::Native { session: [1; 16] }),
];

#[derive(Clone, Copy, Debug)]
enum Fill {
    Sparse,
    Half,
    Full,
}

struct Disk {
    name: &'static str,
    len: u64,
    granularity: Granularity,
}

fn disks() -> [Disk; 2] {
    let is_test = table::is_test();
    let shift = if is_test { 6 } else { 0 };
    let disk = |name, len: u64, granularity| Disk {
        name,
        len: len >> shift,
        granularity: Granularity::from_bytes(granularity).expect("a power of two"),
    };
    [
        disk("64TiB", 64 << 40, 64 << 10),
        disk("1TiB", 1 << 40, 512),
    ]
}

impl Disk {
    fn bits(&self, fill: Fill) -> HBitmap {
        let mut map = HBitmap::new(self.len, self.granularity).expect("it is not too large");
        let words = (map.granules() / 64) as usize;
        match fill {
            Fill::Full => drop(map.set_all()),
            Fill::Half => {
                let mut random = random(1);
                let words: Vec<u64> = (0..words).map(|_| random()).collect();
                map.import_words(0, &words).expect("as many as there are");
            }
            Fill::Sparse => {
                let mut random = random(2);
                for _ in 0..words * 64 / 1000 {
                    let offset = random() % map.granules() * self.granularity.bytes();
                    map.set_at(offset).expect("it is not past the end");
                }
            }
        }
        map
    }

    /// A node with a bitmap of these bits.
    fn node(&self, bits: &HBitmap) -> Node {
        let node = Node::new(self.len);
        node.bitmaps().set_storage(Some(BitmapStorage::default()));
        let mut options = BitmapOptions::default();
        options.granularity = Some(self.granularity);
        node.bitmaps()
            .add_disabled("a", options)
            .expect("there is memory");
        let claim = node
            .bitmaps()
            .claim("a", ClaimFor::Change)
            .expect("it was just made");
        claim
            .lock()
            .expect("it can be written")
            .copy_from(bits)
            .expect("it is as long");
        drop(claim);
        node
    }
}

fn of(node: &Node) -> BitmapMigration {
    BitmapMigration::new().with_node("d", node)
}

fn stop(outgoing: &mut OutgoingMigration, node: &Node) {
    let guard = node.quiesce().try_guard().expect("no write is in flight");
    outgoing.stop(&[&guard]).expect("the guest ran");
}

/// A source whose guest stands still.
fn source(node: &Node, stream: StreamKind) -> OutgoingMigration {
    let mut options = OutgoingOptions::default();
    options.stream = stream;
    let mut outgoing = of(node).outgoing(options).expect("it is idle");
    stop(&mut outgoing, node);
    outgoing
}

fn send(outgoing: &mut OutgoingMigration, mut to: impl FnMut(&[u8])) {
    while let (Next::Bytes(_), bytes) = outgoing.next_slice(Duration::ZERO).expect("nobody writes")
    {
        to(bytes);
    }
}

fn receive(incoming: &mut IncomingMigration, bytes: &[u8]) {
    for piece in bytes.chunks(PIECE) {
        incoming.feed(piece).expect("it is sound");
    }
    incoming.finish().expect("it is whole");
}

fn measure(criterion: &mut Criterion, disk: &Disk, fill: Fill) {
    let bits = disk.bits(fill);
    let node = disk.node(&bits);
    let mut payload = vec![0; bits.serialized_len(0..disk.len).expect("it has parts")];
    bits.serialize_part(0..disk.len, &mut payload)
        .expect("it is as long");
    drop(bits);
    let mut piece = vec![0; PIECE];

    let mut group = criterion.benchmark_group(name_of("send", disk, fill));
    group
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10);
    group.throughput(Throughput::Bytes(payload.len() as u64));
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| {
            for from in payload.chunks(PIECE) {
                piece[..from.len()].copy_from_slice(from);
                black_box(&mut piece);
            }
        });
    });
    for (name, stream) in STREAMS {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut outgoing = source(&node, stream);
                send(&mut outgoing, |bytes| {
                    black_box(bytes);
                });
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group(name_of("receive", disk, fill));
    group
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10);
    group.throughput(Throughput::Bytes(payload.len() as u64));
    group.bench_function("memcpy", |bencher| {
        bencher.iter_with_large_drop(|| {
            let mut to = vec![0; payload.len()];
            for (from, to) in payload.chunks(PIECE).zip(to.chunks_mut(PIECE)) {
                to.copy_from_slice(from);
            }
            to
        });
    });
    for (name, stream) in STREAMS {
        let mut bytes = Vec::new();
        send(&mut source(&node, stream), |piece| {
            bytes.extend(piece);
        });
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || {
                    let mut options = IncomingOptions::default();
                    options.stream = stream;
                    of(&Node::new(disk.len)).incoming(options)
                },
                |mut incoming| {
                    receive(&mut incoming, &bytes);
                    incoming
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn name_of(what: &str, disk: &Disk, fill: Fill) -> String {
    let fill = match fill {
        Fill::Sparse => "sparse",
        Fill::Half => "half",
        Fill::Full => "full",
    };
    format!("migration/{what}-{}-{fill}", disk.name)
}

/// What is sent while the guest stands still, of a bitmap of so many bytes of bits. Between two rounds of sending
/// the guest has written to as many places as `writes`.
fn stopped(mode: Mode, bytes: u64, writes: usize) -> u64 {
    let granularity = Granularity::DEFAULT;
    let disk = Disk {
        name: "",
        len: bytes * 8 * granularity.bytes(),
        granularity,
    };
    let node = disk.node(&disk.bits(Fill::Half));
    let guard = node.quiesce().try_guard().expect("no write is in flight");
    node.bitmaps().enable(&guard, "a").expect("it is idle");
    drop(guard);
    let mut options = OutgoingOptions::default();
    options.mode = mode;
    let mut outgoing = of(&node).outgoing(options).expect("it is idle");
    let mut places = random(3);
    for _ in 0..5 {
        send(&mut outgoing, |_| {});
        for _ in 0..writes {
            let at = places() % disk.len;
            let ticket = node.begin_write((at..at + 1).into()).go();
            ticket.expect("nobody quiesces it").finish(());
        }
    }
    stop(&mut outgoing, &node);
    send(&mut outgoing, |_| {});
    outgoing.bytes_sent_stopped()
}

fn print_stopped() {
    println!("| bytes sent while the guest stands still | pre-copy | live | post-copy | hybrid |");
    println!("|---|---:|---:|---:|---:|");
    for (bytes, writes) in [
        (2 << 20, 10),
        (2 << 20, 100),
        (128 << 20, 10),
        (128 << 20, 100),
    ] {
        let [pre, live, post, hybrid] = [Mode::PreCopy, Mode::Live, Mode::PostCopy, Mode::Hybrid]
            .map(|mode| stopped(mode, bytes, writes));
        println!(
            "| {} MiB of bits, {writes} writes a round | {pre} | {live} | {post} | {hybrid} |",
            bytes >> 20
        );
    }
    println!();
}

fn main() -> io::Result<()> {
    let fills = [Fill::Sparse, Fill::Half, Fill::Full];
    if table::is_wanted() {
        for what in ["send", "receive"] {
            let groups: Vec<_> = disks()
                .iter()
                .flat_map(|disk| fills.map(|fill| name_of(what, disk, fill)))
                .collect();
            table::print(what, &["memcpy", "qemu", "native"], &groups)?;
        }
        print_stopped();
        return Ok(());
    }
    let mut criterion = Criterion::default().configure_from_args();
    for disk in disks() {
        for fill in fills {
            measure(&mut criterion, &disk, fill);
        }
    }
    criterion.final_summary();
    Ok(())
}
