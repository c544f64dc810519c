//! What was written in part, or may still be.

use super::*;
use blockjob::sabotage::{Sabotage, break_on_this_thread};

/// The source says first that it knows only of a part of a cluster, so all of it is copied; then that none of it
/// is in the top layer. What the copy has left on the target hides what is below.
fn is_torn_cluster_copied() -> bool {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.sync = BackupSync::Top;
        parts.options.job.on_target_error = OnError::Ignore;
        parts.options.workers = 1;
    });
    let below = |len| {
        Some(Outcome::Status(Extent {
            len,
            content: Content::Data,
            in_top: false,
        }))
    };
    let is_status = |kind| matches!(kind, OpKind::Status(_));
    rig.until();
    rig.answer(is_status, below(4096));
    rig.until();
    let copied = rig.answer(|kind| matches!(kind, OpKind::Copy(_)), failed(Side::Target));
    assert_eq!(copied, OpKind::Copy(cluster(0)));
    loop {
        match rig.rest() {
            Step::Done(result) => {
                result.unwrap();
                break;
            }
            Step::Wait { until } => rig.now = until.unwrap_or(rig.now),
            step => panic!("{step:?}"),
        }
        while rig.has_out(is_status) {
            rig.answer(is_status, below(4 * CLUSTER));
            let _ = rig.rest();
        }
        let _ = rig.answer_all(|kind| !is_status(kind));
    }
    let is_copy = |kind: &&OpKind| matches!(kind, OpKind::Copy(_));
    let copies: Vec<_> = rig.asked.iter().filter(is_copy).collect();
    let is_first = |copy: &&OpKind| **copy == OpKind::Copy(cluster(0));
    assert!(copies.iter().all(is_first), "{copies:?}");
    copies.len() == 2
}

#[test]
fn what_was_torn_is_copied_although_it_is_not_in_the_top_layer() {
    assert!(is_torn_cluster_copied());
    break_on_this_thread(Some(Sabotage::SkipTorn));
    let is_copied = is_torn_cluster_copied();
    break_on_this_thread(None);
    assert!(!is_copied);
}

/// As above, but the target fetches the data itself, and fails amid it. Then the source cannot be read.
#[test]
fn what_an_offloaded_copy_has_torn_is_copied_although_it_is_not_in_the_top_layer() {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.sync = BackupSync::Top;
        parts.options.job.on_source_error = OnError::Ignore;
        parts.options.workers = 1;
        parts.options.offload = true;
        parts.target.copies_from_source = true;
    });
    let below = |len| {
        Some(Outcome::Status(Extent {
            len,
            content: Content::Data,
            in_top: false,
        }))
    };
    let is_status = |kind| matches!(kind, OpKind::Status(_));
    let is_copy = |kind| matches!(kind, OpKind::Copy(_));
    rig.until();
    rig.answer(is_status, below(4096));
    rig.until();
    let is_offloaded = |kind| kind == OpKind::CopyOffloaded(cluster(0));
    rig.answer(is_offloaded, failed(Side::Target));
    rig.until();
    rig.answer(is_copy, failed(Side::Source));
    loop {
        match rig.rest() {
            Step::Done(result) => {
                result.unwrap();
                break;
            }
            Step::Wait { until } => rig.now = until.unwrap_or(rig.now),
            step => panic!("{step:?}"),
        }
        while rig.has_out(is_status) {
            rig.answer(is_status, below(4 * CLUSTER));
            let _ = rig.rest();
        }
        let _ = rig.answer_all(|kind| !is_status(kind));
    }
    let copies: Vec<_> = rig.asked.iter().filter(|&&kind| is_copy(kind)).collect();
    assert_eq!(copies, [&OpKind::Copy(cluster(0)); 2]);
}

/// One operation is lost, and the target asked to settle; then another. Whether the second is left alone until
/// the target has been asked once more.
fn is_second_waited_for() -> bool {
    let mut rig = Rig::started(4 * CLUSTER, |parts| {
        parts.options.chunk_max = CLUSTER;
        parts.options.workers = 4;
    });
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    let is_copy = |index| move |kind| kind == OpKind::Copy(cluster(index));
    let is_settle = |kind| kind == OpKind::Settle;
    let lose = |rig: &mut Rig, index| {
        let lost = rig.out.iter().position(|op| is_copy(index)(op.kind()));
        let op = rig.out.remove(lost.expect("it is out"));
        rig.backup.op_lost(op);
    };
    lose(&mut rig, 0);
    rig.until();
    assert!(rig.has_out(is_settle));
    lose(&mut rig, 1);
    // What was asked first is answered: that was before the second was lost.
    rig.answer(is_settle, None);
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    let is_waited_for = !rig.has_out(is_copy(1));
    if is_waited_for {
        rig.answer(is_settle, None);
    }
    rig.done().unwrap();
    let copies = |index| {
        rig.asked
            .iter()
            .filter(|&&kind| is_copy(index)(kind))
            .count()
    };
    assert_eq!([0, 1, 2, 3].map(copies), [2, 2, 1, 1]);
    is_waited_for
}

#[test]
fn a_settling_that_was_begun_before_does_not_cover_what_is_lost_after() {
    assert!(is_second_waited_for());
    break_on_this_thread(Some(Sabotage::SettledBefore));
    let is_waited_for = is_second_waited_for();
    break_on_this_thread(None);
    assert!(!is_waited_for);
}
