//! The mirror, case by case, driven by hand: orders of events in which mirrors have lost data, stood
//! still, or gone on when they must not.

#[path = "mirror_cases/active.rs"]
mod active;
#[path = "mirror_cases/active_review.rs"]
mod active_review;
#[path = "mirror_cases/adaptive.rs"]
mod adaptive;
#[path = "mirror_cases/bitmaps.rs"]
mod bitmaps;
#[path = "mirror_cases/copying.rs"]
mod copying;
#[path = "mirror_cases/ending.rs"]
mod ending;
#[path = "mirror_cases/errors.rs"]
mod errors;
#[path = "mirror_cases/layers.rs"]
mod layers;
#[path = "support/machine.rs"]
mod machine;
#[path = "mirror_cases/start.rs"]
mod start;
#[path = "mirror_cases/verify.rs"]
mod verify;
#[path = "mirror_cases/zeroes.rs"]
mod zeroes;

use blockjob::{Limits, MirrorOptions, OpKind, RangeLimits};

use machine::{KIB, MS, Machine, options};

const LEN: u64 = 64 * KIB;

fn is_status(kind: OpKind) -> bool {
    matches!(kind, OpKind::Status(_))
}

/// A target that makes zeroes and discards.
fn zeroing(len: u64, align: u32, is_cheap: bool) -> Limits {
    let mut limits = Limits::new(len);
    limits.write_zeroes = Some(RangeLimits {
        align,
        max: 1 << 30,
    });
    limits.cheap_zeroes = is_cheap;
    limits
}

/// Granules of 4 KiB, copied one by one.
fn single() -> MirrorOptions {
    let mut options = options();
    options.chunk_max = 4 * KIB;
    options
}

/// Drives a job that is ready, or will be, to its end by a switch.
fn complete(machine: &mut Machine) {
    let _ = machine.drive().wait();
    machine.job.complete().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
}
