//! The manager of jobs: names, the list, and the shutdown, in every status.

#![allow(
    clippy::disallowed_types,
    reason = "a test may use the standard library's lock"
)]

#[path = "support/machine.rs"]
mod machine;
#[path = "support/together.rs"]
mod together;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use blockjob::{
    BackupOptions, Cancel, CommitOptions, JobError, JobKind, JobOptions, JobOptionsError, Jobs,
    Limits, Mirror, MirrorError, MirrorOptions, Node, OnError, OpKind, Status, Verb, VerbError,
    capabilities,
};

use machine::{Count, KIB, MS, Machine, Rest, options};
use together::{Together, is_cancelled};

const LEN: u64 = 64 * KIB;

fn options_of(jobs: &Jobs, id: &str) -> MirrorOptions {
    let mut options = options();
    options.job.id = Some(id.to_owned());
    options.job.jobs = Some(jobs.clone());
    options
}

fn make(jobs: &Jobs, id: &str) -> Result<Mirror, MirrorError> {
    let limits = Limits::new(LEN);
    Mirror::new(&Node::new(LEN), limits, limits, options_of(jobs, id))
}

fn in_use(id: &str) -> MirrorError {
    MirrorError::Job(JobOptionsError::IdInUse(id.to_owned()))
}

fn ids(jobs: &Jobs) -> Vec<String> {
    let infos = jobs.query().into_iter();
    infos.map(|info| info.id.expect("only those")).collect()
}

// Names and the list

#[test]
fn a_name_is_taken_until_its_job_is_dismissed() {
    let jobs = Jobs::new();
    let mut first = Machine::new(LEN, {
        let mut options = options_of(&jobs, "a");
        options.job.auto_dismiss = false;
        options
    });
    assert_eq!(make(&jobs, "a").unwrap_err(), in_use("a"));
    assert!(in_use("a").to_string().contains("\"a\""));
    first.job.start().unwrap();
    let _ = first.drive();
    first.job.cancel(Cancel::Soft).unwrap();
    first.drive().done().unwrap();
    assert_eq!(make(&jobs, "a").unwrap_err(), in_use("a"), "it is over");
    drop(first);
    assert_eq!(ids(&jobs), ["a"], "also when its machine is gone");
    let job = jobs.get("a").expect("it is listed");
    assert_eq!(job.query().status, Status::Concluded);
    job.dismiss().unwrap();
    assert!(jobs.get("a").is_none() && jobs.query().is_empty());
    let again = make(&jobs, "a").expect("it is free");
    // Another manager has names of its own.
    let other = Jobs::new();
    let elsewhere = make(&other, "a").expect("it is free there");
    assert_eq!((ids(&jobs), ids(&other)), (ids(&other), ids(&jobs)));
    drop((again, elsewhere));
}

#[test]
fn jobs_are_told_in_the_order_in_which_they_were_made() {
    let jobs = Jobs::new();
    assert!(jobs.query().is_empty());
    let names = ["z", "b", "a", "q"];
    let mut mirrors: Vec<Mirror> = names.iter().map(|id| make(&jobs, id).unwrap()).collect();
    assert_eq!(ids(&jobs), names);
    let job = mirrors[1].job().clone();
    job.start().unwrap();
    job.set_speed(77).unwrap();
    let info = &jobs.query()[1];
    assert_eq!((info.status, info.speed), (Status::Running, 77));
    // A job that is gone leaves; one of its name comes last.
    drop(mirrors.remove(1));
    assert_eq!(ids(&jobs), ["z", "a", "q"]);
    mirrors.push(make(&jobs, "b").unwrap());
    assert_eq!(ids(&jobs), ["z", "a", "q", "b"]);
}

#[test]
fn a_job_that_cannot_be_made_leaves_no_trace() {
    let jobs = Jobs::new();
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    let taken = Mirror::new(&node, limits, limits, options_of(&jobs, "a")).unwrap();
    let all = Together::new(1, LEN, |_, _| {});
    let mut refused = options_of(&jobs, "b");
    refused.job.group = Some(all.group.clone());
    // The node is taken.
    let error = Mirror::new(&node, limits, limits, refused.clone()).unwrap_err();
    assert_eq!(error, MirrorError::NodeBusy);
    // The name is.
    refused.job.id = Some("a".to_owned());
    let other = Node::new(LEN);
    let error = Mirror::new(&other, limits, limits, refused.clone()).unwrap_err();
    assert_eq!(error, in_use("a"));
    // It is none.
    refused.job.id = Some("1".to_owned());
    Mirror::new(&other, limits, limits, refused.clone()).unwrap_err();
    assert_eq!(ids(&jobs), ["a"]);
    assert!(
        all.info(0).cancel.is_none(),
        "its group has not heard of it"
    );
    // The group is ending.
    all.members[0].machine.job.cancel(Cancel::Force).unwrap();
    refused.job.id = Some("b".to_owned());
    let error = Mirror::new(&other, limits, limits, refused).unwrap_err();
    assert_eq!(error, MirrorError::Job(JobOptionsError::GroupEnding));
    assert_eq!(ids(&jobs), ["a"]);
    drop(taken);
    Mirror::new(&other, limits, limits, options_of(&jobs, "b")).expect("node and name are free");
}

#[test]
fn a_job_without_a_name_is_not_told_of() {
    let jobs = Jobs::new();
    let mut options = MirrorOptions::default();
    options.job.jobs = Some(jobs.clone());
    let one = Machine::new(LEN, options.clone());
    let other = Machine::new(LEN, options);
    assert!(jobs.query().is_empty() && jobs.get("").is_none());
    // It is shut down all the same.
    one.job.start().unwrap();
    assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
    assert_eq!(one.job.query().cancel, Some(Cancel::Force));
    assert_eq!(other.job.query().status, Status::Null, "it was not started");
    drop(one);
    assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
}

#[test]
fn a_query_tells_how_a_job_was_made_and_what_was_asked_of_it() {
    let jobs = Jobs::new();
    let all = Together::new(2, LEN, |index, options| {
        options.job.jobs = Some(jobs.clone());
        options.job.on_source_error = OnError::Stop;
        options.job.on_target_error = [OnError::Ignore, OnError::Enospc][index];
        options.job.auto_dismiss = false;
    });
    let infos = jobs.query();
    for (index, info) in infos.iter().enumerate() {
        assert_eq!(info.id, Some(format!("m{index}")));
        assert_eq!(info.kind, "mirror");
        assert_eq!(info.group, Some(all.group.clone()));
        assert_eq!(info.on_source_error, OnError::Stop);
        assert_eq!(
            info.on_target_error,
            [OnError::Ignore, OnError::Enospc][index]
        );
        assert!(info.auto_finalize && !info.auto_dismiss);
        assert!(info.cancel.is_none() && !info.is_finalizing && !info.is_paused);
    }
    let job = jobs.get("m1").unwrap();
    let _hold = job.hold();
    job.start().unwrap();
    job.pause().unwrap();
    let info = &jobs.query()[1];
    assert!(info.is_paused && info.is_user_paused && info.holds == 1);
    job.cancel(Cancel::Force).unwrap();
    assert_eq!(jobs.query()[0].cancel, Some(Cancel::Force));
}

// Shutdown

/// A managed job in that status, and what must still be done before nothing is left of it.
fn machine_in(jobs: &Jobs, status: Status) -> Machine {
    let mut options = options_of(jobs, "m");
    options.job.auto_dismiss = status == Status::Null;
    options.job.auto_finalize = status != Status::Pending;
    let mut machine = Machine::new(LEN, options);
    if status == Status::Created {
        return machine;
    }
    machine.job.start().unwrap();
    match status {
        Status::Running => drop(machine.take_all()),
        Status::Paused => {
            machine.job.pause().unwrap();
            drop(machine.drive());
        }
        _ => {
            drop(machine.drive());
            match status {
                Status::Standby => {
                    machine.job.pause().unwrap();
                    drop(machine.drive());
                }
                Status::Pending => {
                    machine.job.complete().unwrap();
                    drop(machine.drive());
                }
                Status::Concluded | Status::Null => {
                    machine.job.cancel(Cancel::Soft).unwrap();
                    machine.drive().done().unwrap();
                }
                _ => {}
            }
        }
    }
    assert_eq!(machine.job.query().status, status);
    machine
}

#[test]
fn a_shutdown_in_every_status() {
    for status in Status::ALL {
        if matches!(status, Status::Waiting | Status::Aborting) {
            // The first is for groups, below; no job rests in the other.
            continue;
        }
        let jobs = Jobs::new();
        let mut machine = machine_in(&jobs, status);
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let polled = jobs.poll_shutdown(&waker);
        let is_gone = matches!(status, Status::Created | Status::Concluded | Status::Null);
        assert_eq!(polled.is_ready(), is_gone, "{status}");
        let error = make(&jobs, "n").unwrap_err();
        let expected = MirrorError::Job(JobOptionsError::ShuttingDown);
        assert_eq!(error, expected, "{status}");
        if !is_gone {
            assert_eq!(machine.job.query().cancel, Some(Cancel::Force));
            machine.drive().done().unwrap_err();
            assert!(count.take() > 0, "{status}: who waits is woken");
            assert!(jobs.poll_shutdown(&waker).is_ready(), "{status}");
        }
        assert_eq!(machine.job.query().status, Status::Null, "{status}");
        assert!(jobs.query().is_empty());
        let names = machine.names();
        assert!(names.join(" ").ends_with("concluded null"), "{names:?}");
        make(&jobs, "n").expect_err("for good");
    }
}

#[test]
fn a_shutdown_as_a_future() {
    let jobs = Jobs::new();
    let mut machine = machine_in(&jobs, Status::Running);
    let shutdown = jobs.shutdown();
    assert_eq!(
        machine.job.query().cancel,
        Some(Cancel::Force),
        "it begins with the call"
    );
    make(&jobs, "n").unwrap_err();
    let mut shutdown = pin!(shutdown);
    let counts = [Arc::new(Count::default()), Arc::new(Count::default())];
    let wakers = counts.clone().map(Waker::from);
    let mut poll = |waker: &Waker| shutdown.as_mut().poll(&mut Context::from_waker(waker));
    assert!(poll(&wakers[0]).is_pending());
    // Another waits, too, and gives up.
    {
        let mut other = pin!(jobs.shutdown());
        let polled = other.as_mut().poll(&mut Context::from_waker(&wakers[1]));
        assert!(polled.is_pending());
    }
    machine.drive().done().unwrap_err();
    assert_eq!((counts[0].take(), counts[1].take()), (1, 0));
    assert_eq!(poll(&wakers[0]), Poll::Ready(()));
    // With nothing left it is ready at once, and so without a job at all.
    for jobs in [jobs, Jobs::new()] {
        let polled = pin!(jobs.shutdown()).poll(&mut Context::from_waker(&wakers[0]));
        assert_eq!(polled, Poll::Ready(()));
    }
}

#[test]
fn a_shutdown_waits_for_a_dead_target_no_longer_than_the_grace() {
    for has_failed in [false, true] {
        let jobs = Jobs::new();
        let mut options = options_of(&jobs, "m");
        options.job.cancel_grace = Some(500 * MS);
        options.chunk_max = 4 * KIB;
        let mut machine = Machine::started(LEN, options);
        let _ = machine.take_all();
        machine.answer(0);
        let _ = machine.take_all();
        if has_failed {
            // It was about to end by itself, and hangs.
            let error = std::io::ErrorKind::Other;
            machine.fail(0, blockjob::Side::Target, error);
            assert_eq!(machine.take_all().wait(), None);
        }
        assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
        let until = machine.take_all().wait().expect("the grace");
        assert_eq!(until, machine.now + 500 * MS);
        machine.now = until - MS;
        assert!(machine.take_all().wait().is_some());
        assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
        machine.now = until;
        let error = machine.take_all().done().unwrap_err();
        match has_failed {
            true => assert!(matches!(error, JobError::Io { .. })),
            false => assert!(matches!(error, JobError::Cancelled { abandoned } if abandoned > 0)),
        }
        assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
        let given_up = machine
            .asked
            .iter()
            .filter(|kind| **kind == OpKind::CancelInFlight);
        assert_eq!(given_up.count(), 1);
    }
}

#[test]
fn a_shutdown_while_a_switch_is_out_waits_for_it() {
    for commits in [false, true] {
        let jobs = Jobs::new();
        let mut machine = Machine::ready(LEN, options_of(&jobs, "m"));
        machine.job.complete().unwrap();
        let switch = machine.drive().switch();
        assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
        assert!(machine.is_guest_held());
        assert!(machine.job.query().cancel.is_none());
        match commits {
            true => switch.commit(),
            false => drop(switch),
        }
        assert!(!machine.is_guest_held());
        let result = machine.drive().done();
        assert_eq!(result.is_ok(), commits);
        assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
    }
}

#[test]
fn a_group_is_shut_down_whatever_the_order_and_also_members_of_another_manager() {
    for started_last in [0, 1, 2] {
        let (jobs, other) = (Jobs::new(), Jobs::new());
        let mut all = Together::new(3, LEN, |index, options| {
            let manager = if index == 2 { &other } else { &jobs };
            options.job.jobs = Some(manager.clone());
            options.job.auto_dismiss = false;
        });
        for (index, member) in all.members.iter_mut().enumerate() {
            if index != started_last {
                member.machine.job.start().unwrap();
                drop(member.machine.drive());
                member.machine.job.complete().unwrap();
                drop(member.machine.drive());
                assert_eq!(member.machine.job.query().status, Status::Waiting);
            }
        }
        let polled = jobs.poll_shutdown(Waker::noop());
        assert!(polled.is_pending());
        assert!(all.info(started_last).error.is_some(), "at once");
        all.run();
        assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
        for index in 0..3 {
            assert!(is_cancelled(&all.info(index)));
        }
        let left = usize::from(started_last != 2);
        assert_eq!(
            other.query().len(),
            left,
            "dismissed by its own manager only"
        );
    }
}

#[test]
fn a_group_with_its_switches_out_is_shut_down_when_they_are_given_back() {
    for commits in [false, true] {
        let jobs = Jobs::new();
        let mut all = Together::ready(2, LEN, |_, options| {
            options.job.jobs = Some(jobs.clone());
        });
        all.complete();
        all.run();
        all.members[0].commit();
        assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
        if commits {
            all.members[1].commit();
        } else {
            drop(all.members[1].switch.take());
        }
        all.run();
        assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
        all.assert_all_or_none();
        assert_eq!(all.info(0).error.is_none(), commits);
        assert_eq!(all.members[0].backs, usize::from(!commits));
    }
}

#[test]
fn a_shutdown_dismisses_a_job_that_ends_later() {
    let jobs = Jobs::new();
    let mut machine = machine_in(&jobs, Status::Ready);
    assert!(jobs.poll_shutdown(Waker::noop()).is_pending());
    machine.drive().done().unwrap_err();
    assert_eq!(machine.job.query().status, Status::Concluded);
    assert_eq!(ids(&jobs), ["m"]);
    assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
    assert_eq!(machine.job.query().status, Status::Null);
}

/// Asks for more from within: it would stand still under a lock.
struct Meddler {
    jobs: Mutex<Option<Jobs>>,
    calls: AtomicUsize,
}

impl Wake for Meddler {
    fn wake(self: Arc<Self>) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let jobs = self.jobs.lock().unwrap().clone();
        if let Some(jobs) = jobs {
            let _ = jobs.query();
            let _ = make(&jobs, "x");
            let _ = jobs.get("m").map(|job| job.dismiss());
            let _ = jobs.poll_shutdown(Waker::noop());
        }
    }
}

#[test]
fn the_manager_may_be_asked_from_within_wakers() {
    let jobs = Jobs::new();
    let meddler = Arc::new(Meddler {
        jobs: Mutex::new(Some(jobs.clone())),
        calls: AtomicUsize::new(0),
    });
    let waker = Waker::from(Arc::clone(&meddler));
    let mut machine = machine_in(&jobs, Status::Ready);
    while machine.job.poll_event(&waker).is_ready() {}
    assert!(jobs.poll_shutdown(&waker).is_pending());
    machine.drive().done().unwrap_err();
    assert!(meddler.calls.load(Ordering::SeqCst) > 0);
    assert!(jobs.poll_shutdown(Waker::noop()).is_ready());
    meddler.jobs.lock().unwrap().take();
}

#[test]
fn dropping_the_manager_cancels_its_jobs_and_keeps_nothing() {
    let jobs = Jobs::new();
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    let mut running = machine_in(&jobs, Status::Running);
    assert!(running.job.poll_event(&waker).is_ready());
    while running.job.poll_event(&waker).is_ready() {}
    let clone = jobs.clone();
    drop(jobs);
    assert!(running.job.query().cancel.is_none(), "a handle is left");
    drop(clone);
    assert_eq!(running.job.query().cancel, Some(Cancel::Force));
    running.drive().done().unwrap_err();
    assert!(running.names().join(" ").ends_with("CANCELLED concluded"));
    drop((running, waker));
    assert_eq!(Arc::strong_count(&count), 1, "nothing is left of the job");
}

#[test]
fn a_group_that_is_over_keeps_nothing() {
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    for commits in [false, true] {
        let jobs = Jobs::new();
        let mut all = Together::ready(2, LEN, |_, options| {
            options.job.jobs = Some(jobs.clone());
        });
        let group = all.group.clone();
        all.complete();
        all.run();
        if commits {
            all.commit();
        } else {
            all.members[0].switch = None;
            all.members[1].switch = None;
            all.members[0].machine.drop_mirror();
        }
        all.run();
        for member in &all.members {
            while member.machine.job.poll_event(&waker).is_ready() {}
        }
        drop((all, jobs));
        drop(group);
    }
    drop(waker);
    assert_eq!(Arc::strong_count(&count), 1);
}

#[test]
fn verbs_of_a_job_from_the_list_are_those_of_its_own_handle() {
    let jobs = Jobs::new();
    let mut machine = machine_in(&jobs, Status::Ready);
    let job = jobs.get("m").unwrap();
    job.complete().unwrap();
    assert!(machine.job.query().is_completing);
    let Rest::Switch(switch) = machine.drive() else {
        panic!("it completes");
    };
    assert_eq!(job.cancel(Cancel::Force), Err(VerbError::Finalizing));
    switch.commit();
    machine.drive().done().unwrap();
    job.dismiss().unwrap();
    assert!(jobs.get("m").is_none());
}

// Capabilities

/// The names of the fields that `{:?}` prints.
fn fields(debug: &str) -> Vec<String> {
    let inner = debug.split_once('{').expect("fields").1;
    let mut depth = 0;
    let mut fields = Vec::new();
    let mut word = String::new();
    for c in inner.chars() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => depth -= 1,
            ':' if depth == 0 => fields.push(std::mem::take(&mut word).trim().to_owned()),
            ',' if depth == 0 => word.clear(),
            c if depth == 0 => word.push(c),
            _ => {}
        }
    }
    fields
}

#[test]
fn the_capabilities_are_those_of_the_types() {
    let [mirror, commit, backup] = capabilities().jobs else {
        panic!("there are three types");
    };
    let names = (mirror.name, commit.name, backup.name);
    assert_eq!(names, ("mirror", "commit", "backup"));
    assert_eq!(
        (mirror.verbs, commit.verbs),
        (&Verb::ALL[..], &Verb::ALL[..])
    );
    let without_complete = Verb::ALL.iter().filter(|verb| **verb != Verb::Complete);
    assert!(backup.verbs.iter().eq(without_complete));
    let common = fields(&format!("{:?}", JobOptions::default()));
    assert_eq!(common, JobKind::COMMON_OPTIONS);
    let own = |options: String| {
        let mut own = fields(&options);
        own.retain(|name| name != "job");
        own
    };
    assert_eq!(
        own(format!("{:?}", MirrorOptions::default())),
        mirror.options
    );
    assert_eq!(
        own(format!("{:?}", CommitOptions::default())),
        commit.options
    );
    assert_eq!(
        own(format!("{:?}", BackupOptions::default())),
        backup.options
    );
    let changes = fields(&format!("{:?}", blockjob::Change::default()));
    assert_eq!(changes, mirror.changes);
    let mut of_others = changes;
    of_others.retain(|name| name != "copy_mode");
    assert_eq!(of_others, commit.changes);
    assert_eq!(of_others, backup.changes);
    for policy in mirror.policies {
        let mut options = options();
        options.job.on_source_error = *policy;
        let machine = Machine::new(LEN, options);
        assert_eq!(machine.job.query().on_source_error, *policy);
    }
    assert_eq!(mirror.policies.len(), 5);
    assert_eq!(backup.policies, mirror.policies);
    let machine = Machine::new(LEN, options());
    assert_eq!(machine.job.query().kind, mirror.name);
}

/// Breaks each invariant of the manager that can be broken: a test here must notice.
#[cfg(debug_assertions)]
#[test]
fn every_broken_invariant_is_noticed() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    let broken: [(Sabotage, fn()); 5] = [
        (
            Sabotage::NameTwice,
            a_name_is_taken_until_its_job_is_dismissed,
        ),
        (Sabotage::TellInternal, a_job_without_a_name_is_not_told_of),
        (Sabotage::ShutDownNobody, a_shutdown_in_every_status),
        (Sabotage::MakeInShutdown, a_shutdown_in_every_status),
        (
            Sabotage::OutliveManager,
            dropping_the_manager_cancels_its_jobs_and_keeps_nothing,
        ),
    ];
    for (sabotage, test) in broken {
        break_on_this_thread(Some(sabotage));
        let noticed = machine::fails(test);
        break_on_this_thread(None);
        assert!(noticed, "{sabotage:?}");
    }
}
