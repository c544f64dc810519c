//! Breaks each invariant on purpose: the simulation must notice, within so many seeds.

use blockjob::sabotage::Sabotage;

use crate::chain::run_chain;
use crate::sim::sabotage::{expect_panics, is_stall, unnoticed};
use crate::{Report, run, run_active, run_verify, run_verify_zeroes, run_zeroes};

/// What is broken, and the number of seeds within which it must be noticed: several times the number
/// that it took when this was written.
const BROKEN: &[(Sabotage, u64)] = &[
    (Sabotage::ClearAfterCopy, 100),
    (Sabotage::ClearAfterLook, 100),
    (Sabotage::ClaimTwice, 100),
    (Sabotage::WidenAfterCheck, 3000),
    (Sabotage::ForgetFailed, 200),
    (Sabotage::DoNotSettle, 2000),
    (Sabotage::ForgetPlanned, 400),
    (Sabotage::TrustCleanBitmap, 50),
    (Sabotage::AttachWithoutQuiesce, 1500),
    (Sabotage::CopyWhileScanning, 1500),
    (Sabotage::ReadyWithoutFlush, 50),
    (Sabotage::SwitchWithoutRecheck, 100),
    (Sabotage::SwitchWithoutFlush, 100),
    (Sabotage::CopyAfterSwitch, 500),
    (Sabotage::RecordAtBegin, 200),
    (Sabotage::ForgetDropped, 100),
    (Sabotage::DoNotWaitForWriters, 400),
    (Sabotage::ForgetClaimed, 200),
    (Sabotage::KeepWritesOfJob, 200),
    (Sabotage::InstantAtEnd, 400),
    (Sabotage::CleanAfterFailure, 400),
    (Sabotage::ForgetInFlight, 400),
];

/// The same, with writes that go to the target as well.
const BROKEN_WHEN_ACTIVE: &[(Sabotage, u64)] = &[
    (Sabotage::WriteOverClaims, 100),
    (Sabotage::ClaimOverWrites, 400),
    (Sabotage::EndClaimEarly, 1000),
    (Sabotage::WriteIntoDirty, 200),
    (Sabotage::ForgetFailedSource, 200),
    (Sabotage::ForgetFailedTarget, 200),
    (Sabotage::ForgetActiveWrites, 600),
];

/// The same, with what is compared.
const BROKEN_IN_DOUBT: &[(Sabotage, u64)] = &[
    (Sabotage::ForgetDoubt, 400),
    (Sabotage::TellRaces, 1500),
    (Sabotage::TellOnly, 200),
    (Sabotage::KeepSuspicion, 2000),
    (Sabotage::ReadyInDoubt, 100),
];

/// The same, where zeroes are written to what is compared.
const BROKEN_IN_DOUBT_OF_ZEROES: &[(Sabotage, u64)] = &[(Sabotage::TrustDoubtful, 2000)];

/// The same, with many zeroes.
const BROKEN_WITH_ZEROES: &[(Sabotage, u64)] = &[
    (Sabotage::KeepZeroes, 100),
    (Sabotage::KeepZeroesOfFailed, 500),
    (Sabotage::TrustZeroesAtOnce, 200),
    (Sabotage::IgnoreActiveWrites, 200),
];

/// The same, by chains of processes.
const BROKEN_IN_CHAINS: &[(Sabotage, u64)] = &[
    (Sabotage::CheckpointForgetsClaims, 400),
    (Sabotage::ResumeAnyDisk, 200),
    (Sabotage::ResumeAnyGeneration, 400),
];

#[test]
fn every_broken_invariant_is_noticed() {
    expect_panics();
    let all = [
        (BROKEN, run as fn(u64) -> Report),
        (BROKEN_WHEN_ACTIVE, run_active),
        (BROKEN_IN_CHAINS, run_chain),
        (BROKEN_WITH_ZEROES, run_zeroes),
        (BROKEN_IN_DOUBT, run_verify),
        (BROKEN_IN_DOUBT_OF_ZEROES, run_verify_zeroes),
    ];
    let missed = all.map(|(broken, run)| unnoticed(broken, run, |_, how| !is_stall(how)));
    let missed = missed.concat();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
