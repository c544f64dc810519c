//! Jobs that end together, case by case: who waits for whom, who is held, who goes back, and in what order
//! it is told.

#![allow(
    clippy::disallowed_types,
    reason = "a test may use the standard library's lock"
)]

#[path = "support/machine.rs"]
mod machine;
#[path = "support/together.rs"]
mod together;

use std::io::ErrorKind;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use blockjob::{
    Cancel, Event, Job, JobError, JobGroup, JobOptionsError, Limits, Mirror, MirrorError, Node,
    OnError, OpKind, Side, Status, VerbError,
};

use machine::{KIB, MS, Machine, Rest, options};
use together::{On, Together, is_cancelled};

const LEN: u64 = 64 * KIB;

fn two() -> Together {
    Together::ready(2, LEN, |_, _| {})
}

/// Both asked to complete, and their switches out.
fn two_switches() -> Together {
    let mut all = two();
    all.complete();
    all.run();
    assert!(all.members.iter().all(|member| member.switch.is_some()));
    assert_eq!(all.held(), [true; 2]);
    all
}

// Waiting for each other

#[test]
fn who_is_done_waits_in_step_and_nobody_is_held() {
    let mut all = Together::ready(3, LEN, |_, _| {});
    for index in [1, 0] {
        all.members[index].machine.job.complete().unwrap();
        all.run();
    }
    assert_eq!(
        all.statuses(),
        [Status::Waiting, Status::Waiting, Status::Ready]
    );
    assert_eq!(all.held(), [false; 3]);
    // They stay in step meanwhile.
    all.members[0].machine.guest_write(0..5000, 9);
    all.run_for(100 * MS);
    assert!(all.members[0].machine.is_equal());

    all.members[2].machine.job.complete().unwrap();
    all.run();
    all.assert_statuses(Status::Pending);
    assert_eq!(all.held(), [true; 3]);
    all.commit();
    all.run();
    all.assert_all_or_none();
    assert_eq!(all.members[0].guest, On::Target);
    all.assert_statuses(Status::Null);
}

#[test]
fn a_member_that_was_not_started_holds_up_the_others() {
    let mut all = Together::new(2, LEN, |_, _| {});
    all.members[0].machine.job.start().unwrap();
    all.run();
    all.members[0].machine.job.complete().unwrap();
    all.run();
    assert_eq!(all.statuses(), [Status::Waiting, Status::Created]);
    assert_eq!(all.held(), [false; 2]);
    all.members[1].machine.job.start().unwrap();
    all.run();
    all.members[1].machine.job.complete().unwrap();
    all.run();
    all.commit();
    all.run();
    all.assert_all_or_none();
}

#[test]
fn one_that_waits_to_be_told_holds_all_and_one_finalize_on_any_is_enough() {
    for manual in 0..3 {
        for finalized in 0..3 {
            let mut all = Together::ready(3, LEN, |index, options| {
                options.job.auto_finalize = index != manual;
                options.job.auto_dismiss = false;
            });
            all.complete();
            all.run();
            all.assert_statuses(Status::Pending);
            assert_eq!(all.held(), [false; 3], "guests are not stalled meanwhile");
            all.members[1].machine.guest_write(0..1, 5);
            all.run_for(100 * MS);
            assert!(all.members[1].machine.is_equal());

            all.members[finalized].machine.job.finalize().unwrap();
            for member in &all.members {
                let again = member.machine.job.finalize();
                assert_eq!(again, Err(VerbError::Finalizing));
                assert!(member.machine.job.query().is_finalizing);
            }
            all.run();
            all.commit();
            all.run();
            all.assert_all_or_none();
            for (index, member) in all.members.iter_mut().enumerate() {
                let pending = if index == manual { "PENDING " } else { "" };
                let expected = format!(
                    "created running ready READY waiting pending {pending}COMPLETED concluded"
                );
                assert_eq!(member.machine.names().join(" "), expected);
            }
        }
    }
}

#[test]
fn nobody_is_pending_before_all_are_done() {
    let mut all = Together::ready(2, LEN, |_, options| options.job.auto_finalize = false);
    all.members[0].machine.job.complete().unwrap();
    all.run();
    let told = all.members[0].machine.new_names().join(" ");
    assert_eq!(told, "created running ready READY waiting");
    all.members[1].machine.job.complete().unwrap();
    all.run();
    assert_eq!(
        all.members[0].machine.new_names().join(" "),
        "pending PENDING"
    );
    let told = all.members[1].machine.new_names().join(" ");
    assert_eq!(told, "created running ready READY waiting pending PENDING");
}

#[test]
fn nobody_joins_after_one_has_begun_to_end() {
    type Act = fn(&mut Together);
    let acts: [(&str, Act); 6] = [
        ("done", |all| {
            all.members[0].machine.job.complete().unwrap();
            all.run();
        }),
        ("cancelled", |all| {
            all.members[0].machine.job.cancel(Cancel::Force).unwrap();
        }),
        ("failed", |all| {
            fail_a_write(&mut all.members[0].machine);
        }),
        ("dropped", |all| all.members[0].machine.drop_mirror()),
        ("switching", |all| {
            all.complete();
            all.run();
        }),
        ("over", |all| {
            all.complete();
            all.run();
            all.commit();
            all.run();
        }),
    ];
    for (what, act) in acts {
        let mut all = two();
        let node = Node::new(LEN);
        let limits = Limits::new(LEN);
        let mut options = options();
        options.job.group = Some(all.group.clone());
        drop(Mirror::new(&node, limits, limits, options.clone()));
        // That one was dropped, which is a failure: a fresh group for the rest.
        assert_eq!(all.info(0).cancel, Some(Cancel::Force), "{what}");

        all = two();
        options.job.group = Some(all.group.clone());
        act(&mut all);
        let error = Mirror::new(&node, limits, limits, options).unwrap_err();
        let expected = MirrorError::Job(JobOptionsError::GroupEnding);
        assert_eq!(error, expected, "{what}");
        drop(Mirror::new(&node, limits, limits, machine::options()).expect("the node is free"));
    }
}

#[test]
fn a_group_is_told_apart_and_shown() {
    let (one, other) = (JobGroup::new(), JobGroup::new());
    let same = one.clone();
    assert_eq!((&one, one.id()), (&same, same.id()));
    assert_ne!(one, other);
    assert_ne!(one.id(), other.id());
    let all = two();
    assert_eq!(all.info(0).group, Some(all.group.clone()));
    assert_eq!(all.info(1).group, Some(all.group));
    let alone = Machine::new(LEN, options());
    assert_eq!(alone.job.query().group, None);
}

// Failures and cancels

/// Has a write of a job in step fail.
fn fail_a_write(machine: &mut Machine) {
    machine.now += Duration::from_secs(1);
    machine.guest_write(0..4096, 0x11);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let copy = machine.find_copy(0);
    machine.fail(copy, Side::Target, ErrorKind::BrokenPipe);
}

#[test]
fn who_fails_keeps_its_error_and_the_others_are_cancelled() {
    for failing in 0..3 {
        let mut all = Together::ready(3, LEN, |_, _| {});
        fail_a_write(&mut all.members[failing].machine);
        for index in 0..3 {
            let cancel = all.info(index).cancel;
            assert_eq!(cancel.is_some(), index != failing, "at the same moment");
        }
        all.run();
        all.assert_all_or_none();
        for (index, member) in all.members.iter_mut().enumerate() {
            let info = member.machine.job.query();
            let told = member.machine.names().join(" ");
            if index == failing {
                assert!(matches!(info.error, Some(JobError::Io { .. })), "{info:?}");
                assert!(told.ends_with("ERROR aborting COMPLETED with an error concluded null"));
            } else {
                assert!(is_cancelled(&info), "{info:?}");
                assert!(told.ends_with("READY aborting CANCELLED concluded null"));
            }
        }
    }
}

#[test]
fn a_second_failure_is_noted_and_shown_in_the_last_event() {
    let mut all = two();
    for member in &mut all.members {
        let machine = &mut member.machine;
        machine.now += Duration::from_secs(1);
        machine.guest_write(0..4096, 0x11);
        let _ = machine.take_all();
        machine.answer(0);
        let _ = machine.take_all();
    }
    // The second one fails first; then the first, but it was cancelled by then.
    for index in [1, 0] {
        let machine = &mut all.members[index].machine;
        let copy = machine.find_copy(0);
        machine.fail(copy, Side::Target, ErrorKind::BrokenPipe);
    }
    all.run();
    assert!(matches!(all.info(1).error, Some(JobError::Io { .. })));
    assert!(is_cancelled(&all.info(0)));

    // With the policy to report, one that has failed is not cancelled over it.
    let info = all.info(1);
    assert_eq!(info.cancel, None, "{info:?}");
}

#[test]
fn a_cancel_by_force_is_one_of_all() {
    for index in 0..2 {
        let mut all = two();
        all.members[index]
            .machine
            .job
            .cancel(Cancel::Force)
            .unwrap();
        all.run();
        all.assert_all_or_none();
        for member in &mut all.members {
            assert!(is_cancelled(&member.machine.job.query()));
            let told = member.machine.names().join(" ");
            assert!(told.ends_with("ready READY aborting CANCELLED concluded null"));
        }
    }
}

#[test]
fn a_member_that_was_never_started_is_over_at_once_though_nobody_drives_it() {
    type Trigger = fn(&mut Together);
    let triggers: [(&str, Trigger); 4] = [
        ("cancel", |all| {
            all.members[0].machine.job.cancel(Cancel::Force).unwrap();
        }),
        ("cancel of its own", |all| {
            all.members[1].machine.job.cancel(Cancel::Soft).unwrap();
        }),
        ("failure", |all| fail_a_write(&mut all.members[0].machine)),
        ("drop", |all| all.members[0].machine.drop_mirror()),
    ];
    for (what, trigger) in triggers {
        let mut all = Together::new(2, LEN, |_, options| options.job.auto_dismiss = false);
        all.members[0].machine.job.start().unwrap();
        all.run();
        trigger(&mut all);
        let told = all.members[1].machine.names().join(" ");
        assert_eq!(told, "created aborting concluded null", "{what}");
        assert!(matches!(
            all.members[1].machine.job.start(),
            Err(VerbError::NotAllowed { .. })
        ));
        all.members[0].machine.woken.wake_once();
        all.run();
        // Who drives it later hears of it, and the node is free then.
        let result = all.members[1].machine.drive().done();
        assert!(matches!(result, Err(JobError::Cancelled { abandoned: 0 })));
        let limits = Limits::new(LEN);
        let node = &all.members[1].machine.node;
        Mirror::new(node, limits, limits, options()).expect("the node is free");
        assert_eq!(all.info(0).status, Status::Concluded, "{what}");
    }
}

#[test]
fn a_soft_cancel_of_one_that_waits_or_is_pending_undoes_all() {
    for is_pending in [false, true] {
        let mut all = Together::ready(2, LEN, |_, options| options.job.auto_finalize = false);
        all.members[0].machine.job.complete().unwrap();
        if is_pending {
            all.members[1].machine.job.complete().unwrap();
        }
        all.run();
        all.members[0].machine.job.cancel(Cancel::Soft).unwrap();
        assert_eq!(all.info(1).cancel, Some(Cancel::Force));
        all.run();
        all.assert_all_or_none();
        assert!(is_cancelled(&all.info(0)) && is_cancelled(&all.info(1)));
    }
}

#[test]
fn a_group_of_soft_cancels_copies_one_instant_and_nobody_switches() {
    let mut all = two();
    all.members[0].machine.job.cancel(Cancel::Soft).unwrap();
    all.run();
    assert_eq!(all.statuses(), [Status::Waiting, Status::Ready]);
    all.members[0].machine.guest_write(0..512, 1);
    all.members[1].machine.guest_write(0..512, 1);
    all.members[1].machine.job.cancel(Cancel::Soft).unwrap();
    all.run();
    for member in &all.members {
        assert_eq!(member.result.as_ref().map(Result::is_ok), Some(true));
        assert!(member.machine.is_equal() && member.votes == 0);
    }
}

#[test]
fn what_is_asked_of_a_group_is_asked_of_all_or_none() {
    for is_soft in [true, false] {
        let ask = |all: &Together| match is_soft {
            true => all.group.cancel(Cancel::Soft),
            false => all.group.complete(),
        };
        let mut all = Together::new(3, LEN, |_, _| {});
        for member in &mut all.members[..2] {
            member.machine.job.start().unwrap();
            let _ = member.machine.drive().wait();
        }
        // The first two are ready; a soft cancel of the third alone would be one by force.
        assert!(matches!(ask(&all), Err(VerbError::NotAllowed { .. })));
        for index in 0..3 {
            assert!(all.info(index).cancel.is_none() && !all.info(index).is_completing);
        }
        all.members[2].machine.job.start().unwrap();
        let _ = all.members[2].machine.drive().wait();
        // One of them is paused: it stands by, and is ready all the same.
        all.members[1].machine.job.pause().unwrap();
        all.run();
        ask(&all).unwrap();
        ask(&all).expect("asking again has no effect");
        let expected = is_soft.then_some(Cancel::Soft);
        assert!((0..3).all(|index| all.info(index).cancel == expected));
        if !is_soft {
            all.members[1].machine.job.resume().unwrap();
        }
        all.run();
        all.commit();
        all.run();
        for member in &all.members {
            assert_eq!(member.result.as_ref().map(Result::is_ok), Some(true));
            assert_eq!(member.guest == On::Source, is_soft);
            assert!(member.machine.is_equal());
        }
        all.group
            .cancel(Cancel::Force)
            .expect("nobody is in it any more");
    }
}

#[test]
fn a_group_is_cancelled_by_force_until_its_end_is_decided() {
    let mut all = two_switches();
    assert_eq!(all.group.cancel(Cancel::Force), Err(VerbError::Finalizing));
    assert_eq!(all.group.cancel(Cancel::Soft), Err(VerbError::Finalizing));
    assert!((0..2).all(|index| all.info(index).cancel.is_none()));
    all.commit();
    all.run();
    all.assert_all_or_none();

    let mut all = two();
    all.group.complete().unwrap();
    let late = all.group.cancel(Cancel::Soft);
    late.expect("it is raised, as a soft cancel of a job that completes is");
    assert_eq!(all.group.complete(), Err(VerbError::CannotComplete));
    all.group.cancel(Cancel::Force).unwrap();
    all.run();
    all.assert_all_or_none();
    assert!(is_cancelled(&all.info(0)) && is_cancelled(&all.info(1)));

    let empty = JobGroup::new();
    empty.cancel(Cancel::Force).unwrap();
    let mut options = options();
    options.job.group = Some(empty);
    let limits = Limits::new(LEN);
    Mirror::new(&Node::new(LEN), limits, limits, options).expect("nothing has begun to end");
}

#[test]
fn a_soft_cancelled_member_commits_with_one_that_switches() {
    let mut all = two();
    all.members[0].machine.job.cancel(Cancel::Soft).unwrap();
    all.members[1].machine.job.complete().unwrap();
    all.run();
    assert!(all.members[0].switch.is_none() && all.members[1].switch.is_some());
    assert_eq!(all.held(), [true; 2], "both, until it is decided");
    for member in &all.members {
        let refused = member.machine.job.cancel(Cancel::Force);
        assert_eq!(refused, Err(VerbError::Finalizing));
    }
    all.commit();
    all.run();
    assert_eq!(all.held(), [false; 2]);
    let guests = all.members.iter().map(|member| member.guest);
    assert_eq!(guests.collect::<Vec<_>>(), [On::Source, On::Target]);
    for member in &all.members {
        assert_eq!(member.result.as_ref().map(Result::is_ok), Some(true));
        assert!(member.machine.is_equal());
    }
}

#[test]
fn a_declined_switch_lets_a_soft_cancelled_member_go_on_too() {
    let mut all = two();
    all.members[0].machine.job.cancel(Cancel::Soft).unwrap();
    all.members[1].machine.job.complete().unwrap();
    all.run();
    drop(all.members[1].switch.take());
    all.run();
    assert_eq!(all.held(), [false; 2]);
    all.assert_statuses(Status::Pending);
    all.members[0].machine.guest_write(0..512, 77);
    all.members[1].machine.job.finalize().unwrap();
    all.run();
    all.commit();
    all.run();
    assert!(all.members.iter().all(|member| member.machine.is_equal()));
}

// One instant

#[test]
fn guests_are_held_together_and_only_when_all_could_be() {
    let mut all = Together::ready(2, LEN, |_, options| options.job.auto_finalize = false);
    all.complete();
    all.run();
    all.assert_statuses(Status::Pending);
    // One has more to copy than it may hold its guest for: nothing was seen to be copied lately.
    for member in &mut all.members {
        member.machine.now += Duration::from_secs(3600);
    }
    all.members[1].machine.guest_write(0..LEN, 1);
    all.members[0].machine.job.finalize().unwrap();
    let _ = all.members[1].machine.take_all();
    // It could, and waits for the other one.
    all.members[0].run_alone();
    assert_eq!(all.held(), [false; 2]);
    all.members[1].machine.woken.wake_once();
    all.run();
    assert_eq!(all.held(), [true; 2]);
    all.commit();
    all.run();
    all.assert_all_or_none();
}

/// One whose guest is held and one write of it hangs; the other is prepared.
fn one_hangs() -> (Together, blockjob::OwnedTicket) {
    let mut all = two();
    all.members[0].machine.job.complete().unwrap();
    all.members[1].machine.job.complete().unwrap();
    let node = all.members[1].machine.node.clone();
    let hanging = node.begin_write_owned((0..1).into()).go().unwrap();
    all.run();
    assert_eq!(all.held(), [true; 2]);
    assert!(all.members.iter().all(|member| member.switch.is_none()));
    (all, hanging)
}

#[test]
fn a_switch_waits_until_all_guests_are_quiet() {
    let (mut all, hanging) = one_hangs();
    all.members[1].machine.guest_lands(0..1, 3);
    hanging.finish(());
    all.run();
    assert!(all.members.iter().all(|member| member.switch.is_some()));
    all.commit();
    all.run();
    all.assert_all_or_none();
}

#[test]
fn when_one_lets_its_guest_go_all_do() {
    type Act = fn(&mut Together);
    let acts: [(&str, Act); 5] = [
        ("a hold", |all| {
            let hold = all.members[1].machine.job.hold();
            all.run();
            assert_eq!(all.held(), [false; 2]);
            drop(hold);
        }),
        ("a hold of the one that was prepared", |all| {
            let hold = all.members[0].machine.job.hold();
            all.run();
            assert_eq!(all.held(), [false; 2]);
            drop(hold);
        }),
        ("a driver dropped", |all| {
            all.members[0].machine.mirror().ops_lost();
            assert!(!all.members[0].machine.is_guest_held(), "at once");
            all.members[1].run_alone();
            assert_eq!(all.held(), [false; 2]);
            all.members[0].machine.woken.wake_once();
        }),
        ("the bound", |all| {
            all.run_for(Duration::from_secs(5));
            assert_eq!(all.held(), [false; 2]);
            all.run_for(Duration::from_secs(5));
        }),
        ("an error", |all| {
            // Of the last copy, with the guest held.
            let machine = &mut all.members[1].machine;
            machine.fault = Some(Box::new(|_, kind| {
                kind.writes_target()
                    .then_some((Side::Target, ErrorKind::Other))
            }));
            machine.guest_lands(0..1, 3);
        }),
    ];
    for (what, act) in acts {
        let mut all = Together::ready(2, LEN, |_, options| {
            options.job.on_target_error = OnError::Ignore;
        });
        all.complete();
        let node = all.members[1].machine.node.clone();
        let hanging = node.begin_write_owned((0..1).into()).go().unwrap();
        all.run();
        assert_eq!(all.held(), [true; 2], "{what}");
        act(&mut all);
        hanging.finish(());
        if what == "an error" {
            all.run();
            assert_eq!(all.held(), [false; 2], "{what}");
            all.members[1].machine.fault = None;
            all.run_for(Duration::from_secs(1));
        }
        all.run();
        all.assert_statuses(Status::Pending);
        assert!(
            all.members.iter().all(|member| member.switch.is_some()),
            "{what}: it is tried again"
        );
        all.commit();
        all.run();
        all.assert_all_or_none();
    }
}

#[test]
fn guests_are_held_until_all_switches_are_committed() {
    let mut all = two_switches();
    all.members[0].commit();
    all.run();
    assert_eq!(all.held(), [true; 2], "also the one that has voted");
    for member in &all.members {
        for how in [Cancel::Soft, Cancel::Force] {
            let refused = member.machine.job.cancel(how);
            assert_eq!(refused, Err(VerbError::Finalizing));
        }
        assert!(member.machine.job.query().is_finalizing);
        assert!(member.result.is_none());
    }
    all.members[1].commit();
    assert_eq!(all.held(), [false; 2]);
    // Neither does a cancel between the commit and the next look at a machine.
    let refused = all.members[0].machine.job.cancel(Cancel::Force);
    assert_eq!(refused, Err(VerbError::Finalizing));
    all.run();
    all.assert_all_or_none();
}

#[test]
fn when_one_switch_is_dropped_all_guests_go_back() {
    for dropped in 0..3 {
        let mut all = Together::ready(3, LEN, |_, _| {});
        all.complete();
        all.run();
        // One has voted, one is dropped, one is out.
        let (voted, out) = ((dropped + 1) % 3, (dropped + 2) % 3);
        all.members[voted].commit();
        drop(all.members[dropped].switch.take());
        assert!(!all.members[dropped].machine.is_guest_held());
        assert!(
            all.members[voted].machine.is_guest_held(),
            "it goes back first"
        );
        all.run();
        assert_eq!(all.members[voted].backs, 1);
        assert!(!all.members[voted].machine.is_guest_held());
        assert!(all.members[out].machine.is_guest_held(), "by the switch");
        // One that comes too late is answered in the same way.
        all.members[out].commit();
        all.run();
        assert_eq!(all.members[out].backs, 1);
        assert_eq!(all.held(), [false; 3]);
        all.assert_statuses(Status::Pending);

        for member in &mut all.members {
            assert_eq!(member.guest, On::Source);
            let info = member.machine.job.query();
            assert!(!info.is_finalizing && !info.is_completing, "{info:?}");
            member.machine.guest_write(0..100, 0x21);
        }
        all.run_for(100 * MS);
        assert!(all.members.iter().all(|member| member.machine.is_equal()));
        // And again.
        all.members[out].machine.job.finalize().unwrap();
        all.run();
        all.commit();
        all.run();
        all.assert_all_or_none();
        assert_eq!(all.members[0].guest, On::Target);
        for member in &mut all.members {
            member.assert_good_events();
        }
    }
}

#[test]
fn nothing_goes_on_before_a_guest_is_pointed_back() {
    for is_cancelled in [false, true] {
        let mut all = two_switches();
        all.members[0].votes += 1;
        all.members[0].guest = On::Target;
        all.members[0].switch.take().unwrap().commit();
        drop(all.members[1].switch.take());
        let back = all.members[0].machine.drive_now().back();
        // It is asked for again, or cancelled, while the caller is at it.
        if is_cancelled {
            all.members[0].machine.job.cancel(Cancel::Force).unwrap();
        } else {
            all.members[1].machine.job.finalize().unwrap();
        }
        all.run();
        assert_eq!(all.held(), [true, false]);
        assert!(all.members[0].result.is_none() && all.members[0].switch.is_none());
        all.members[0].take(Rest::SwitchBack(back));
        assert_eq!(all.members[0].guest, On::Source);
        all.run();
        if !is_cancelled {
            all.commit();
            all.run();
        }
        all.assert_all_or_none();
        assert_eq!(all.members[0].guest == On::Target, !is_cancelled);
    }
}

#[test]
fn a_void_switch_that_is_dropped_declines_nothing_more() {
    let mut all = two_switches();
    drop(all.members[0].switch.take());
    all.members[0].machine.job.finalize().unwrap();
    drop(all.members[1].switch.take());
    all.run();
    assert!(
        all.members.iter().all(|member| member.switch.is_some()),
        "it was asked for again in between"
    );
    all.commit();
    all.run();
    all.assert_all_or_none();
}

#[test]
fn a_cancel_after_a_declined_switch_waits_for_the_other_switch() {
    for commits in [false, true] {
        let mut all = two_switches();
        drop(all.members[0].switch.take());
        all.members[0].machine.job.cancel(Cancel::Force).unwrap();
        all.run();
        assert!(all.members[0].result.is_some());
        assert!(all.members[1].result.is_none(), "its caller has the switch");
        assert_eq!(all.held(), [false, true]);
        if commits {
            all.members[1].commit();
        } else {
            drop(all.members[1].switch.take());
        }
        all.run();
        assert_eq!(all.members[1].backs, usize::from(commits));
        all.assert_all_or_none();
        assert_eq!(all.members[1].guest, On::Source);
    }
}

#[test]
fn a_driver_that_is_dropped_before_it_hands_out_its_switch_makes_the_others_void() {
    for commits_before in [false, true] {
        let mut all = two();
        all.complete();
        let (holder, other) = all.run_to_first_switch();
        assert_eq!(all.held(), [true; 2]);
        if commits_before {
            all.members[holder].commit();
        }
        all.members[other].machine.mirror().ops_lost();
        assert!(!all.members[other].machine.is_guest_held());
        all.members[holder].commit();
        assert!(all.members[holder].machine.is_guest_held());
        all.members[holder].run_alone();
        assert_eq!((all.members[holder].backs, all.held()), (1, vec![false; 2]));

        // The wish stays.
        all.members[other].machine.woken.wake_once();
        all.run();
        all.commit();
        all.run();
        all.assert_all_or_none();
        assert_eq!(all.members[holder].guest, On::Target);
    }
}

#[test]
fn one_that_has_voted_does_not_wait_for_the_others_longer_than_for_anything() {
    for is_soft in [false, true] {
        let mut all = Together::ready(2, LEN, |_, options| options.hold_max = 300 * MS);
        if is_soft {
            all.members[0].machine.job.cancel(Cancel::Soft).unwrap();
            all.members[1].machine.job.complete().unwrap();
        } else {
            all.complete();
        }
        all.run();
        all.members[0].commit();
        all.run_for(299 * MS);
        assert_eq!(all.held(), [true; 2]);
        all.run_for(MS);
        assert_eq!(all.members[0].backs, usize::from(!is_soft));
        assert_eq!(all.held(), [false, true], "the other is its caller's");
        all.members[1].commit();
        all.run();
        assert_eq!((all.members[1].backs, all.held()), (1, vec![false; 2]));
        // Tried again after as long a time.
        all.run_for(299 * MS);
        assert_eq!(all.held(), [false; 2]);
        all.run_for(MS);
        assert!(all.members[1].switch.is_some());
        all.commit();
        all.run();
        for member in &all.members {
            assert!(member.result.as_ref().is_some_and(Result::is_ok));
        }
    }
}

// Dropped machines

#[test]
fn dropping_a_machine_fails_its_group() {
    let mut all = two();
    all.members[1].machine.drop_mirror();
    assert!(matches!(all.info(1).error, Some(JobError::Dropped)));
    all.run();
    assert!(is_cancelled(&all.info(0)));
}

#[test]
fn a_machine_dropped_with_its_switch_out_leaves_the_end_to_the_switches() {
    // All are committed: success.
    let mut all = two_switches();
    all.members[1].machine.drop_mirror();
    assert_eq!(all.held(), [true; 2]);
    all.commit();
    assert_eq!(all.held(), [false; 2]);
    all.run();
    assert_eq!(all.info(1).status, Status::Null);
    assert!(all.info(1).error.is_none() && all.info(0).error.is_none());

    // Its own is dropped: it fails, and the other goes back.
    let mut all = two_switches();
    all.members[0].commit();
    all.members[1].machine.drop_mirror();
    drop(all.members[1].switch.take());
    assert!(matches!(all.info(1).error, Some(JobError::Dropped)));
    all.run();
    assert_eq!(all.members[0].backs, 1);
    assert!(is_cancelled(&all.info(0)));
    assert_eq!(all.held(), [false; 2]);

    // The other's is dropped while its own is out, then committed in vain.
    for commits in [false, true] {
        let mut all = two_switches();
        all.members[1].machine.drop_mirror();
        drop(all.members[0].switch.take());
        assert_eq!(all.held(), [false, true]);
        if commits {
            all.members[1].commit();
        } else {
            drop(all.members[1].switch.take());
        }
        assert!(matches!(all.info(1).error, Some(JobError::Dropped)));
        all.run();
        assert_eq!(all.held(), [false; 2]);
        assert!(is_cancelled(&all.info(0)));
    }
}

#[test]
fn a_machine_dropped_after_its_vote_leaves_the_end_to_the_others() {
    let mut all = two_switches();
    all.members[0].commit();
    all.members[0].machine.drop_mirror();
    assert_eq!(all.held(), [true; 2]);
    all.members[1].commit();
    assert_eq!(all.held(), [false; 2]);
    all.run();
    assert!(all.info(0).error.is_none() && all.info(1).error.is_none());

    let mut all = two_switches();
    all.members[0].commit();
    all.members[0].machine.drop_mirror();
    drop(all.members[1].switch.take());
    all.run();
    // Nobody is left to point the first one back; it is not held for ever.
    assert_eq!(all.held(), [false; 2]);
    assert!(matches!(all.info(0).error, Some(JobError::Dropped)));
    assert!(is_cancelled(&all.info(1)));
}

#[test]
fn a_machine_dropped_with_its_switch_granted_makes_the_others_void() {
    let mut all = two();
    all.complete();
    let (holder, other) = all.run_to_first_switch();
    all.members[holder].commit();
    all.members[other].machine.drop_mirror();
    all.run();
    assert_eq!(all.members[holder].backs, 1);
    assert_eq!(all.held(), [false; 2]);
    assert!(matches!(all.info(other).error, Some(JobError::Dropped)));
    assert!(is_cancelled(&all.info(holder)));
}

#[test]
fn a_machine_dropped_instead_of_pointing_back_holds_nobody() {
    let mut all = two_switches();
    all.members[0].commit();
    drop(all.members[1].switch.take());
    assert!(all.members[0].machine.is_guest_held());
    all.members[0].machine.drop_mirror();
    assert_eq!(all.held(), [false; 2]);
    all.run();
    assert!(matches!(all.info(0).error, Some(JobError::Dropped)));
    assert!(is_cancelled(&all.info(1)));
}

// No foreign code under a lock

/// Asks everything of all jobs whenever it is woken: it would stand still under a lock.
struct Meddler {
    jobs: OnceLock<Vec<Job>>,
    told: Mutex<Vec<(usize, Event)>>,
}

impl Meddler {
    fn listen(self: &Arc<Self>) {
        for (index, job) in self.jobs.get().expect("set").iter().enumerate() {
            let _ = job.query();
            let _ = job.finalize();
            let _ = job.hold();
            while let Poll::Ready(event) = job.poll_event(&Waker::from(Arc::clone(self))) {
                self.told.lock().unwrap().push((index, event));
            }
        }
    }
}

impl Wake for Meddler {
    fn wake(self: Arc<Self>) {
        self.listen();
    }
}

#[test]
fn verbs_may_be_asked_from_within_wakers() {
    for is_good in [false, true] {
        let mut all = Together::new(2, LEN, |_, options| options.job.auto_finalize = false);
        let meddler = Arc::new(Meddler {
            jobs: OnceLock::new(),
            told: Mutex::default(),
        });
        let jobs = all.members.iter().map(|member| member.machine.job.clone());
        meddler.jobs.set(jobs.collect()).ok().unwrap();
        meddler.listen();
        for member in &mut all.members {
            member.machine.job.start().unwrap();
            let _ = member.machine.drive().wait();
        }
        all.complete();
        all.run();
        if is_good {
            all.commit();
        } else {
            drop(all.members[0].switch.take());
            all.members[1].machine.job.cancel(Cancel::Force).ok();
            drop(all.members[1].switch.take());
        }
        all.run();
        if !is_good {
            all.members[0].machine.job.cancel(Cancel::Force).ok();
            all.run();
        }
        all.run();
        let told = meddler.told.lock().unwrap();
        for index in 0..2 {
            let finals = told
                .iter()
                .filter(|(of, event)| *of == index && machine::is_final(event));
            assert_eq!(finals.count(), 1, "{told:?}");
        }
    }
}

#[test]
fn nothing_is_copied_while_a_switch_is_out_and_nothing_after_it() {
    let mut all = two_switches();
    let asked = |all: &Together| -> Vec<usize> {
        let members = all.members.iter();
        members.map(|member| member.machine.asked.len()).collect()
    };
    let before = asked(&all);
    all.members[0].commit();
    all.run();
    assert_eq!(asked(&all), before);
    all.members[1].commit();
    for member in &mut all.members {
        // The guest writes to its new disk.
        member.machine.guest_write(0..4096, 0x55);
    }
    all.run();
    assert_eq!(asked(&all), before);
    assert!(all.members[0].machine.asked.contains(&OpKind::Flush));
}

/// Breaks each invariant of groups on purpose: a test here must notice.
#[cfg(debug_assertions)]
mod sabotage {
    use super::*;
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    const BROKEN: &[(Sabotage, fn())] = &[
        (
            Sabotage::CommitAlone,
            guests_are_held_until_all_switches_are_committed,
        ),
        (
            Sabotage::CommitAlone,
            when_one_switch_is_dropped_all_guests_go_back,
        ),
        (
            Sabotage::OthersGoOn,
            who_fails_keeps_its_error_and_the_others_are_cancelled,
        ),
        (
            Sabotage::LeaveCreated,
            a_member_that_was_never_started_is_over_at_once_though_nobody_drives_it,
        ),
        (
            Sabotage::PendingAlone,
            who_is_done_waits_in_step_and_nobody_is_held,
        ),
        (
            Sabotage::FinalizeUntold,
            one_that_waits_to_be_told_holds_all_and_one_finalize_on_any_is_enough,
        ),
        (
            Sabotage::HoldAlone,
            guests_are_held_together_and_only_when_all_could_be,
        ),
        (Sabotage::JoinLate, nobody_joins_after_one_has_begun_to_end),
        (
            Sabotage::AskOneByOne,
            what_is_asked_of_a_group_is_asked_of_all_or_none,
        ),
        (
            Sabotage::SwitchAlone,
            a_switch_waits_until_all_guests_are_quiet,
        ),
        (
            Sabotage::ReleaseEarly,
            guests_are_held_until_all_switches_are_committed,
        ),
        (Sabotage::KeepHolding, when_one_lets_its_guest_go_all_do),
    ];

    #[test]
    fn every_broken_invariant_is_noticed() {
        let mut missed = Vec::new();
        for &(sabotage, test) in BROKEN {
            break_on_this_thread(Some(sabotage));
            let noticed = machine::fails(test);
            break_on_this_thread(None);
            if !noticed {
                missed.push(sabotage);
            }
            test();
        }
        assert!(missed.is_empty(), "not noticed: {missed:?}");
    }
}
