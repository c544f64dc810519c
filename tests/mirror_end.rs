//! The end of a mirror comes, whatever the guest does meanwhile.

use std::task::Waker;
use std::time::Duration;

use blockjob::{
    Begin, Content, Extent, Limits, Mirror, MirrorOptions, MirrorSync, Node, Op, OpKind, Outcome,
    Status, Step,
};

const LEN: u64 = 1 << 20;

fn outcome(op: &Op) -> Outcome {
    match op.kind() {
        OpKind::Status(range) => Outcome::Status(Extent {
            len: range.len(),
            content: Content::Data,
            in_top: true,
        }),
        _ => Outcome::Done,
    }
}

/// A guest that is held does not write.
fn write(node: &Node) {
    if let Begin::Go(ticket) = node.begin_write((0..4096).into()) {
        ticket.finish(());
    }
}

/// Each flush takes long enough for one write of the guest to be copied meanwhile, so there is always
/// something that the last flush does not cover.
#[test]
fn a_guest_that_writes_during_every_flush_does_not_put_off_the_switch() {
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    let mut options = MirrorOptions::default();
    options.sync = MirrorSync::None;
    let mut mirror = Mirror::new(&node, limits, limits, options).unwrap();
    let job = mirror.job().clone();
    job.start().unwrap();

    let mut out: Vec<Op> = Vec::new();
    let mut has_written = false;
    let (mut flushes, mut writes) = (0, 0);
    for step in 0.. {
        assert!(flushes < 100, "it flushes again and again");
        let now = Duration::from_millis(step);
        match mirror.poll(now, Waker::noop()) {
            Step::Op(op) => out.push(op),
            // In step: written to, and in step again.
            Step::Wait { .. } if out.is_empty() && writes == 0 => {
                writes += 1;
                write(&node);
            }
            Step::Wait { until: None } if out.is_empty() => job.complete().unwrap(),
            Step::Wait { .. } if out.is_empty() => {}
            Step::Wait { .. } => {
                let copy = out.iter().position(|op| op.kind() != OpKind::Flush);
                let is_ready = job.query().status == Status::Ready;
                if copy.is_none() && is_ready && !has_written {
                    has_written = true;
                    write(&node);
                    continue;
                }
                let op = out.remove(copy.unwrap_or(0));
                if op.kind() == OpKind::Flush {
                    has_written = false;
                    flushes += 1;
                }
                let outcome = outcome(&op);
                mirror.op_done(now, op, outcome);
            }
            Step::Switch(switch) => switch.commit(),
            Step::SwitchBack(_) => unreachable!("it is in no group"),
            Step::Done(result) => {
                result.unwrap();
                return;
            }
        }
    }
}
