//! Each invariant broken on purpose: a run must notice.

use super::*;
use blockjob::sabotage::Sabotage;

use super::sim::sabotage::{expect_panics, is_stall, unnoticed};

/// What is broken, and the number of seeds within which it must be noticed: several times the number
/// that it took when this was written.
///
/// Of the copying machinery, what is not here cannot harm a backup: nobody makes dirty again what it has
/// claimed, its claims are never widened, and it does not go by a clean bitmap. `LimitUrgent` loses only
/// time. A case of its own notices it, and what is too rare here: `SkipTorn`, `SettledBefore`, and of the crew
/// `DoNotHearBell` and `SaveInSilence`.
const BROKEN: &[(Sabotage, u64)] = &[
    (Sabotage::HoldBeforeContent, 20),
    (Sabotage::ReleaseInFlight, 50),
    (Sabotage::ReleaseFailed, 100),
    (Sabotage::CleanAfterFailure, 100),
    (Sabotage::ForgetInFlight, 1500),
    (Sabotage::TrustUnflushed, 4000),
    (Sabotage::EndWithoutFlush, 50),
    (Sabotage::LetGoWhilePaused, 200),
    (Sabotage::HoldForEver, 50),
    (Sabotage::ClaimTwice, 200),
    (Sabotage::ForgetFailed, 100),
    (Sabotage::DoNotSettle, 100),
    (Sabotage::ForgetPlanned, 1500),
    (Sabotage::LeaveInSilence, 1000),
    (Sabotage::ForgetLostWork, 100),
    (Sabotage::ForgetUnbegun, 1500),
    (Sabotage::RecordAtBegin, 200),
    (Sabotage::ForgetDropped, 50),
    (Sabotage::DoNotWaitForWriters, 50),
    (Sabotage::ReclaimForgetsSuccessor, 50),
    (Sabotage::EndDisabled, 20),
    (Sabotage::OthersGoOn, 400),
    (Sabotage::LetGoBeforeCommit, 400),
    (Sabotage::KeepHalf, 400),
];

/// Those by which somebody waits for ever: that a run stalls is how it shows.
const STALLING: &[Sabotage] = &[
    Sabotage::HoldForEver,
    Sabotage::LeaveInSilence,
    Sabotage::ForgetLostWork,
    Sabotage::ForgetUnbegun,
];

#[test]
fn every_broken_invariant_is_noticed() {
    expect_panics();
    let missed = unnoticed(BROKEN, run, |sabotage, how| {
        STALLING.contains(&sabotage) || !is_stall(how)
    });
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
