//! Whether a mirror gains on its guest: the three modes beside each other, over a target of a given speed and a
//! guest of a given appetite, in virtual time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::{
    Adaptive, Begin, CopyMode, Event, Granularity, Lane, MirrorOptions, OpKind, Outcome,
    PendingWrite, TargetWrite, Ticket,
};

use crate::machine::{Count, KIB, MIB, Machine, Rest, options};

const LEN: u64 = 32 * MIB;
/// Until then a job is ready or will never be.
const END: Duration = Duration::from_secs(30);
/// What a write to the source takes.
const SOURCE_TIME: Duration = Duration::from_micros(100);

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    /// Bytes per second that the target takes.
    target_rate: u64,
    /// Writes per second, of so many bytes, on the first half of the disk; a thread for each, which waits for its
    /// own.
    writes: u64,
    write_len: u64,
}

const LOADS: [Load; 4] = [
    Load {
        name: "a guest that writes little",
        target_rate: 16 * MIB,
        writes: 20,
        write_len: 4 * KIB,
    },
    Load {
        name: "small writes, each of which makes 64 KiB dirty",
        target_rate: 16 * MIB,
        writes: 500,
        write_len: 4 * KIB,
    },
    Load {
        name: "long writes, half of what the target takes",
        target_rate: 16 * MIB,
        writes: 8,
        write_len: MIB,
    },
    Load {
        name: "a slow target",
        target_rate: 4 * MIB,
        writes: 150,
        write_len: 8 * KIB,
    },
];

/// What a guest has felt, and when the job was ready.
#[derive(Debug, Default)]
struct Felt {
    ready_at: Option<Duration>,
    writes: u64,
    /// Beside what the writes to the source have taken.
    added: Duration,
    added_max: Duration,
    went_over: u64,
    outpaced: u64,
}

enum Guest {
    Idle,
    Waiting(PendingWrite<Arc<Lane>>, Duration),
    AtSource(Ticket<Arc<Lane>>, Duration),
    AtTarget(TargetWrite<Arc<Lane>>, Duration),
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Copied(usize),
    /// The guest's write is where it went.
    Landed,
    /// The guest may write again.
    Guest,
    Wake,
}

fn play(load: Load, mode: CopyMode) -> Felt {
    let mut options: MirrorOptions = options();
    options.granularity = Granularity::from_bytes(64 * KIB);
    options.copy_mode = mode;
    let mut machine = Machine::started(LEN, options);
    let mut felt = Felt::default();
    let mut happenings = BinaryHeap::new();
    let mut ops = Vec::new();
    // The target does one thing after the other.
    let mut free_at = Duration::ZERO;
    let takes = |len: u64| Duration::from_secs_f64(len as f64 / load.target_rate as f64);
    let mut guest = Guest::Idle;
    let pause = Duration::from_secs_f64(1.0 / load.writes as f64);
    let mut next_write = pause;
    let mut at = 0;
    happenings.push(Reverse((pause, Happens::Guest)));
    let mut was_over = false;
    let woken = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&woken));
    while machine.now < END {
        // The job.
        loop {
            let rest = match machine.poll() {
                None => {
                    let out = machine.out.pop().unwrap();
                    match out.kind() {
                        OpKind::Copy(range) => {
                            free_at = free_at.max(machine.now) + takes(range.len());
                            happenings.push(Reverse((free_at, Happens::Copied(ops.len()))));
                            ops.push(Some(out.op));
                        }
                        kind => {
                            let outcome = machine.perform(kind, None);
                            machine.report(out.op, outcome);
                        }
                    }
                    continue;
                }
                Some(rest) => rest,
            };
            if let Rest::Wait(Some(until)) = rest {
                happenings.push(Reverse((until, Happens::Wake)));
            }
            break;
        }
        machine.woken.take();
        let info = machine.job.query().mirror.unwrap();
        felt.went_over += u64::from(info.is_write_blocking != was_over);
        was_over = info.is_write_blocking;
        let told = machine.events().iter();
        felt.outpaced += told
            .filter(|event| matches!(event, Event::Outpaced(_)))
            .count() as u64;
        machine.events.clear();
        if machine.job.query().status.is_ready() {
            felt.ready_at = Some(machine.now);
            break;
        }
        // The guest.
        let now = machine.now;
        guest = match guest {
            Guest::Idle if now >= next_write => {
                at = (at + 0x9e37_79b9_7f4a_7c15_u64 % (LEN / 2)) % (LEN / 2 - load.write_len);
                let start = at / 512 * 512;
                let range = (start..start + load.write_len).into();
                match machine.node.begin_write_owned(range) {
                    Begin::Go(ticket) => {
                        happenings.push(Reverse((now + SOURCE_TIME, Happens::Landed)));
                        Guest::AtSource(ticket, now)
                    }
                    Begin::Wait(pending) => {
                        woken.wake_once();
                        happenings.push(Reverse((now, Happens::Guest)));
                        Guest::Waiting(pending, now)
                    }
                    Begin::Refused(refused) => panic!("{refused}"),
                }
            }
            Guest::Waiting(mut pending, since) if woken.take() > 0 => {
                match pending.poll_begin(&waker) {
                    Poll::Ready(ticket) => {
                        happenings.push(Reverse((now + SOURCE_TIME, Happens::Landed)));
                        Guest::AtSource(ticket.unwrap(), since)
                    }
                    Poll::Pending => Guest::Waiting(pending, since),
                }
            }
            other => other,
        };
        if !matches!(guest, Guest::Idle) && machine.woken.take() > 0 {
            // A write that waits is told to the job at once.
            happenings.push(Reverse((now, Happens::Wake)));
        }
        let Some(Reverse((then, happening))) = happenings.pop() else {
            panic!("nothing happens any more: {:?}", machine.job.query());
        };
        machine.now = machine.now.max(then);
        let now = machine.now;
        match happening {
            Happens::Wake | Happens::Guest => {}
            Happens::Copied(index) => {
                let op = ops[index].take().expect("once");
                let outcome = machine.perform(op.kind(), None);
                assert!(matches!(outcome, Outcome::Done));
                machine.report(op, outcome);
            }
            Happens::Landed => {
                let mut done = |since: Duration| {
                    felt.writes += 1;
                    let added = (now - since).saturating_sub(SOURCE_TIME);
                    felt.added += added;
                    felt.added_max = felt.added_max.max(added);
                    next_write = (next_write + pause).max(now);
                    Guest::Idle
                };
                guest = match guest {
                    Guest::AtSource(ticket, since) => {
                        let range = ticket.range();
                        machine.guest_lands(range, felt_byte(now));
                        match ticket.source_written(true) {
                            Some(half) => {
                                free_at = free_at.max(now) + takes(half.range().len());
                                happenings.push(Reverse((free_at, Happens::Landed)));
                                Guest::AtTarget(half, since)
                            }
                            None => done(since),
                        }
                    }
                    Guest::AtTarget(half, since) => {
                        let range = crate::machine::bytes(half.range());
                        let data = machine.source[range.clone()].to_vec();
                        machine.target[range].copy_from_slice(&data);
                        half.finish(Ok(()));
                        done(since)
                    }
                    other => other,
                };
                if matches!(guest, Guest::Idle) {
                    happenings.push(Reverse((next_write, Happens::Guest)));
                }
            }
        }
    }
    felt
}

/// What was added to a write on average.
fn mean(felt: &Felt) -> Duration {
    felt.added / u32::try_from(felt.writes.max(1)).unwrap()
}

fn felt_byte(now: Duration) -> u8 {
    now.as_micros() as u8 | 1
}

#[test]
fn adaptive_is_ready_wherever_write_blocking_is_and_costs_the_guest_less() {
    let mut adaptive = Adaptive::default();
    adaptive.window = Duration::from_millis(200);
    let modes = [
        ("background", CopyMode::Background),
        ("write-blocking", CopyMode::WriteBlocking),
        ("adaptive", CopyMode::Adaptive(adaptive)),
    ];
    println!("| load | mode | ready after | added to all writes | on average | at most |");
    println!("|---|---|---|---|---|---|");
    for load in LOADS {
        let felt = modes.map(|(name, mode)| {
            let felt = play(load, mode);
            let ready = felt.ready_at.map_or("never".to_owned(), |at| {
                format!("{:.1} s", at.as_secs_f64())
            });
            let mean = mean(&felt);
            println!(
                "| {} | {name} | {ready} | {:.2} s | {:.1} ms | {:.0} ms |",
                load.name,
                felt.added.as_secs_f64(),
                mean.as_secs_f64() * 1e3,
                felt.added_max.as_secs_f64() * 1e3,
            );
            felt
        });
        let [background, blocking, adaptive] = felt;
        if blocking.ready_at.is_some() {
            assert!(adaptive.ready_at.is_some(), "{}", load.name);
            assert!(mean(&adaptive) < mean(&blocking), "{}", load.name);
        }
        if background.ready_at.is_some() {
            assert!(
                adaptive.ready_at.is_some() && adaptive.added <= blocking.added,
                "{}",
                load.name
            );
        } else {
            assert!(adaptive.outpaced > 0, "{}", load.name);
            assert!(adaptive.went_over < 8, "{}: to and fro", load.name);
        }
    }
}
