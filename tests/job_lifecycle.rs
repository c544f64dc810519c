//! The life of a job, verb by verb and event by event, on a mirror that is driven by hand.
//!
//! Statuses *waiting* and *aborting* are never at rest: a job without a group goes on to *pending* or
//! *concluded* within the same call, under one lock. No verb can meet them, so they have no row in the
//! table here; their place in the order of events is checked instead.

#[path = "support/machine.rs"]
mod machine;

use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use blockjob::{
    Begin, Cancel, Change, ErrorAction, Event, IoStatus, Job, JobError, JobOptionsError, Limits,
    Mirror, MirrorError, MirrorOptions, MirrorSync, Node, OnError, OpKind, Outcome, Side, Status,
    Verb, VerbError,
};

use machine::{KIB, MIB, MS, Machine, Rest, ask, is_final, named, options};

const LEN: u64 = 64 * KIB;

/// What is to come of a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ok,
    NotAllowed,
    AlreadyPaused,
    NotPaused,
}

/// Answers the question of what the source holds: from then on copies are out.
fn take_copies(machine: &mut Machine) {
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all();
    assert!(machine.find(OpKind::writes_target).is_some());
}

/// A job in that status, at rest.
fn machine_in(status: Status) -> Machine {
    let mut options = options();
    options.job.auto_dismiss = status == Status::Null;
    options.job.auto_finalize = status != Status::Pending;
    let mut machine = Machine::new(LEN, options);
    match status {
        Status::Created => {}
        Status::Running => {
            machine.job.start().unwrap();
            let _ = machine.take_all();
            assert!(!machine.out.is_empty());
        }
        Status::Paused => {
            machine.job.start().unwrap();
            machine.job.pause().unwrap();
            let _ = machine.drive();
        }
        _ => {
            machine.job.start().unwrap();
            let _ = machine.drive();
            match status {
                Status::Standby => {
                    machine.job.pause().unwrap();
                    let _ = machine.drive();
                }
                Status::Pending => {
                    machine.job.complete().unwrap();
                    let _ = machine.drive();
                }
                Status::Concluded | Status::Null => {
                    machine.job.complete().unwrap();
                    machine.drive().switch().commit();
                    machine.drive().done().unwrap();
                }
                _ => {}
            }
        }
    }
    assert_eq!(machine.job.query().status, status);
    machine.events();
    machine.events.clear();
    machine
}

#[test]
fn every_verb_in_every_status() {
    use Answer::{AlreadyPaused, NotAllowed as No, NotPaused, Ok};
    let verbs = [
        Verb::Start,
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Change,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];
    assert_eq!(verbs, Verb::ALL);
    let table = [
        (Status::Created, [Ok, Ok, Ok, NotPaused, Ok, Ok, No, No, No]),
        (Status::Running, [No, Ok, Ok, NotPaused, Ok, Ok, No, No, No]),
        (
            Status::Paused,
            [No, Ok, AlreadyPaused, Ok, Ok, Ok, No, No, No],
        ),
        (Status::Ready, [No, Ok, Ok, NotPaused, Ok, Ok, Ok, No, No]),
        (
            Status::Standby,
            [No, Ok, AlreadyPaused, Ok, Ok, Ok, Ok, No, No],
        ),
        (Status::Pending, [No, Ok, No, No, No, No, No, Ok, No]),
        (Status::Concluded, [No, No, No, No, No, No, No, No, Ok]),
        (Status::Null, [No; 9]),
    ];
    for (status, row) in table {
        for (verb, expected) in verbs.into_iter().zip(row) {
            check_cell(status, verb, expected);
        }
    }
}

fn check_cell(status: Status, verb: Verb, expected: Answer) {
    let mut machine = machine_in(status);
    let before = format!("{:?}", machine.job.query());
    let result = ask(&machine.job, verb);
    let cell = format!("{verb} while {status}");
    let after = format!("{:?}", machine.job.query());
    match expected {
        Answer::Ok => {
            result.unwrap_or_else(|error| panic!("{cell}: {error}"));
            assert_ne!(before, after, "{cell} shows");
        }
        Answer::NotAllowed => {
            let error = result.expect_err(&cell);
            assert_eq!(
                error,
                VerbError::NotAllowed {
                    id: "m0".to_owned(),
                    verb,
                    status
                }
            );
            let text = error.to_string();
            for word in ["m0".to_owned(), verb.to_string(), status.to_string()] {
                assert!(text.contains(&word), "{cell}: {text:?} names {word}");
            }
        }
        Answer::AlreadyPaused => assert_eq!(result, Err(VerbError::AlreadyPaused), "{cell}"),
        Answer::NotPaused => assert_eq!(result, Err(VerbError::NotPaused), "{cell}"),
    }
    if expected != Answer::Ok {
        assert_eq!(before, after, "{cell} was refused and changes nothing");
        assert_eq!(machine.new_names(), [""; 0], "{cell}");
    }
    if matches!(machine.job.query().status, Status::Concluded | Status::Null) {
        // One that was never started is over with the cancel, and tells no end.
        let was_cancelled = (status, verb) == (Status::Created, Verb::Cancel);
        assert!(was_cancelled || status >= Status::Concluded, "{cell}");
        assert!(!machine.events().iter().any(is_final), "{cell}");
        return;
    }
    // Whatever was asked, it can be cancelled, and ends once.
    if let Err(error) = machine.job.cancel(Cancel::Force) {
        panic!("{cell}, then cancel: {error}");
    }
    machine.drive().done().unwrap_err();
    let finals = machine.events().iter().filter(|event| is_final(event));
    let was_started = status != Status::Created || verb == Verb::Start;
    assert_eq!(finals.count(), usize::from(was_started), "{cell}");
}

#[test]
fn start_is_refused_after_a_cancel() {
    let machine = machine_in(Status::Created);
    machine.job.cancel(Cancel::Soft).unwrap();
    let error = machine.job.start().unwrap_err();
    assert!(matches!(
        error,
        VerbError::NotAllowed {
            verb: Verb::Start,
            ..
        }
    ));
}

#[test]
fn a_name_starts_with_a_letter() {
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    let make = |id: &str| {
        let mut options = MirrorOptions::default();
        options.job.id = Some(id.to_owned());
        Mirror::new(&node, limits, limits, options)
    };
    for bad in [
        "", "1a", "-a", ".a", "_a", "a b", "a/b", "é", "aé", "a\n", "a:0", " a",
    ] {
        let error = make(bad).unwrap_err();
        assert_eq!(
            error,
            MirrorError::Job(JobOptionsError::BadId(bad.to_owned()))
        );
        assert!(error.to_string().contains(&format!("{bad:?}")));
    }
    for good in ["a", "Z", "a1", "disk0-to_disk1.mirror", "a-", "A.", "b_"] {
        // Made and dropped: the refused ones have left nothing behind, nor do these.
        let mirror = make(good).unwrap();
        assert_eq!(mirror.job().query().id.as_deref(), Some(good));
    }
}

#[test]
fn a_job_without_a_name_tells_nothing_and_is_never_stopped_by_an_error() {
    for policy in [OnError::Stop, OnError::Enospc, OnError::Auto] {
        for is_source in [true, false] {
            let mut options = MirrorOptions::default();
            if is_source {
                options.job.on_source_error = policy;
            } else {
                options.job.on_target_error = policy;
            }
            let (node, limits) = (Node::new(LEN), Limits::new(LEN));
            let error = Mirror::new(&node, limits, limits, options).unwrap_err();
            assert_eq!(error, MirrorError::Job(JobOptionsError::NobodyResumes));
        }
    }

    let mut machine = Machine::started(LEN, MirrorOptions::default());
    let before = format!("{:?}", machine.job.query());
    for policy in [OnError::Stop, OnError::Enospc, OnError::Auto] {
        let changes = [
            Change {
                on_source_error: Some(OnError::Ignore),
                on_target_error: Some(policy),
                ..Change::default()
            },
            Change {
                on_source_error: Some(policy),
                on_target_error: Some(OnError::Ignore),
                ..Change::default()
            },
        ];
        for change in changes {
            let error = machine.job.change(change).unwrap_err();
            assert_eq!(error, VerbError::Options(JobOptionsError::NobodyResumes));
        }
    }
    assert_eq!(format!("{:?}", machine.job.query()), before);
    let error = machine.job.complete().unwrap_err();
    assert!(error.to_string().contains("(internal)"), "{error}");

    // The refused changes were refused as a whole: errors are still reported.
    take_copies(&mut machine);
    machine.fail(0, Side::Target, ErrorKind::StorageFull);
    machine.answer_all();
    machine.drive().done().unwrap_err();
    assert_eq!(machine.names(), [""; 0], "it tells no events");
}

/// Drives a job to its end the way `act` says once it rests, and what was told on the way.
fn story(options: MirrorOptions, mut act: impl FnMut(&mut Machine, usize)) -> Vec<String> {
    let mut machine = Machine::started(LEN, options);
    for turn in 0..100 {
        match machine.drive() {
            Rest::Wait(_) => act(&mut machine, turn),
            Rest::Switch(switch) => switch.commit(),
            Rest::SwitchBack(_) => unreachable!("it is in no group"),
            Rest::Done(_) => return machine.names(),
        }
    }
    panic!("no end: {:?}", machine.names());
}

const SUCCESS: &str = "created running ready READY waiting pending COMPLETED concluded null";

#[test]
fn the_order_of_events_on_success() {
    let told = story(options(), |machine, _| machine.job.complete().unwrap());
    assert_eq!(told.join(" "), SUCCESS);
}

#[test]
fn the_order_of_events_with_manual_finalize_and_dismiss() {
    let mut options = options();
    options.job.auto_finalize = false;
    options.job.auto_dismiss = false;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.drive().wait();
    machine.job.complete().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(
        machine.new_names().join(" "),
        "created running ready READY waiting pending PENDING"
    );
    assert!(
        !machine.is_guest_held(),
        "the guest is not stalled meanwhile"
    );
    machine.job.finalize().unwrap();
    assert_eq!(machine.job.finalize(), Err(VerbError::Finalizing));
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    assert_eq!(machine.new_names().join(" "), "COMPLETED concluded");
    machine.job.dismiss().unwrap();
    assert_eq!(machine.new_names().join(" "), "null");
}

#[test]
fn the_order_of_events_on_failure() {
    let mut machine = Machine::started(LEN, options());
    take_copies(&mut machine);
    machine.fail(0, Side::Source, ErrorKind::Other);
    let error = machine.drive().done().unwrap_err();
    assert!(matches!(
        error,
        JobError::Io {
            side: Side::Source,
            ..
        }
    ));
    assert_eq!(
        machine.names().join(" "),
        "created running ERROR aborting COMPLETED with an error concluded null"
    );
}

#[test]
fn the_order_of_events_on_a_cancel_by_force() {
    for is_ready in [false, true] {
        let mut machine = Machine::started(LEN, options());
        if is_ready {
            let _ = machine.drive();
        } else {
            let _ = machine.take_all();
        }
        machine.job.cancel(Cancel::Force).unwrap();
        machine.drive().done().unwrap_err();
        let ready = if is_ready { "ready READY " } else { "" };
        assert_eq!(
            machine.names().join(" "),
            format!("created running {ready}aborting CANCELLED concluded null")
        );
    }
}

#[test]
fn the_order_of_events_on_a_soft_cancel() {
    let told = story(options(), |machine, _| {
        machine.job.cancel(Cancel::Soft).unwrap();
    });
    assert_eq!(told.join(" "), SUCCESS, "ready: an orderly end");

    let mut machine = Machine::started(LEN, options());
    let _ = machine.take_all();
    machine.job.cancel(Cancel::Soft).unwrap();
    assert_eq!(machine.job.query().cancel, Some(Cancel::Force));
    machine.drive().done().unwrap_err();
    assert_eq!(
        machine.names().join(" "),
        "created running aborting CANCELLED concluded null",
        "not ready: as by force"
    );
}

#[test]
fn a_cancel_before_the_start_has_no_final_event_and_no_rest() {
    let mut options = options();
    options.job.auto_dismiss = false;
    let mut machine = Machine::new(LEN, options);
    machine.job.cancel(Cancel::Force).unwrap();
    machine.drive().done().unwrap_err();
    assert_eq!(machine.names().join(" "), "created aborting concluded null");
    assert_eq!(machine.asked.len(), 0, "nothing was done");
}

#[test]
fn a_job_that_is_over_keeps_no_waker() {
    let mut cancelled = Machine::new(LEN, options());
    cancelled.job.cancel(Cancel::Force).unwrap();
    let mut failed = Machine::started(LEN, options());
    let _ = failed.drive().wait();
    failed.job.cancel(Cancel::Force).unwrap();
    for machine in [&mut cancelled, &mut failed] {
        for _ in 0..2 {
            assert!(machine.take_all().done().is_err());
        }
        // What drives a job may own a handle of it: one would keep the other for ever.
        assert_eq!(Arc::strong_count(&machine.woken), 2, "those of the test");
    }
}

#[test]
fn a_paused_job_passes_through_its_working_status_before_it_aborts() {
    for (status, passed) in [(Status::Paused, "running"), (Status::Standby, "ready")] {
        let mut machine = machine_in(status);
        machine.job.cancel(Cancel::Force).unwrap();
        machine.drive().done().unwrap_err();
        assert_eq!(
            machine.new_names().join(" "),
            format!("{passed} aborting CANCELLED concluded")
        );
    }
}

#[test]
fn a_declined_switch_leaves_the_job_ready_and_it_completes_later() {
    let mut machine = Machine::ready(LEN, options());
    machine.new_names();
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    assert!(machine.is_guest_held());
    drop(switch);
    assert!(
        !machine.is_guest_held(),
        "the guest goes on with the source"
    );
    machine.guest_write(0..100, 9);
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(!machine.job.query().is_completing, "the wish is withdrawn");
    assert!(machine.is_equal(), "and the target is kept in step");
    assert_eq!(machine.new_names(), [""; 0]);
    machine.job.complete().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    assert_eq!(
        machine.new_names().join(" "),
        "waiting pending COMPLETED concluded null"
    );
}

#[test]
fn ready_is_told_with_equal_numbers_and_so_is_success() {
    let mut machine = Machine::ready(3 * LEN + 5, options());
    machine.guest_write(0..1, 9);
    machine.job.complete().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    let (mut ready, mut completed) = (0, 0);
    for event in machine.events() {
        match event {
            Event::Ready { progress, speed } => {
                assert_eq!((progress.current, *speed), (3 * LEN + 5, 0));
                assert_eq!(progress.current, progress.total);
                ready += 1;
            }
            Event::Completed {
                progress, error, ..
            } => {
                assert!(error.is_none());
                assert_eq!(progress.current, progress.total);
                completed += 1;
            }
            _ => {}
        }
    }
    assert_eq!((ready, completed), (1, 1));
}

/// Takes events as they are told, from within the waker, and looks around at the last one.
struct Listener {
    job: OnceLock<Job>,
    node: Node,
    finals: AtomicUsize,
    /// Whether the last event came while the node was not free yet.
    too_early: AtomicUsize,
}

impl Listener {
    fn listen(self: &Arc<Self>) {
        let job = self.job.get().expect("set before the start");
        while let Poll::Ready(event) = job.poll_event(&Waker::from(Arc::clone(self))) {
            if !is_final(&event) {
                continue;
            }
            self.finals.fetch_add(1, Ordering::SeqCst);
            let limits = Limits::new(LEN);
            let is_taken = Mirror::new(&self.node, limits, limits, options()).is_err();
            let is_held = matches!(self.node.begin_write((0..1).into()), Begin::Wait(_));
            if is_taken || is_held {
                self.too_early.fetch_add(1, Ordering::SeqCst);
            }
            // Verbs may be asked from within.
            let _ = job.cancel(Cancel::Force);
            let _ = job.query();
        }
    }
}

impl Wake for Listener {
    fn wake(self: Arc<Self>) {
        self.listen();
    }
}

fn listened(act: impl FnOnce(&mut Machine)) {
    let mut machine = Machine::new(LEN, options());
    let listener = Arc::new(Listener {
        job: OnceLock::new(),
        node: machine.node.clone(),
        finals: AtomicUsize::new(0),
        too_early: AtomicUsize::new(0),
    });
    assert!(listener.job.set(machine.job.clone()).is_ok());
    listener.listen();
    machine.job.start().unwrap();
    act(&mut machine);
    assert_eq!(listener.finals.load(Ordering::SeqCst), 1, "one last event");
    assert_eq!(
        listener.too_early.load(Ordering::SeqCst),
        0,
        "node, bitmap and guest are free when it is told"
    );
    assert!(
        Machine::of(
            machine.node.clone(),
            Mirror::new(
                &machine.node,
                Limits::new(LEN),
                Limits::new(LEN),
                MirrorOptions::default()
            )
            .expect("the node is free"),
            Limits::new(LEN),
        )
        .job
        .query()
        .id
        .is_none()
    );
}

#[test]
fn the_last_event_comes_when_everything_is_released() {
    listened(|machine| {
        let _ = machine.drive().wait();
        machine.job.complete().unwrap();
        machine.drive().switch().commit();
        machine.drive().done().unwrap();
    });
    listened(|machine| {
        let _ = machine.drive().wait();
        machine.job.cancel(Cancel::Soft).unwrap();
        machine.drive().done().unwrap();
    });
    listened(|machine| {
        let _ = machine.take_all();
        machine.job.cancel(Cancel::Force).unwrap();
        machine.drive().done().unwrap_err();
    });
    listened(|machine| {
        take_copies(machine);
        machine.fail(0, Side::Target, ErrorKind::Other);
        machine.drive().done().unwrap_err();
    });
    listened(|machine| {
        let _ = machine.take_all();
        machine.drop_mirror();
    });
}

#[test]
fn pauses_are_counted_by_who_asked() {
    let mut machine = Machine::started(LEN, options());
    let _ = machine.take_all();
    machine.job.pause().unwrap();
    let first = machine.job.hold();
    let second = machine.job.hold();
    assert_eq!(machine.job.pause(), Err(VerbError::AlreadyPaused));
    let info = machine.job.query();
    assert!(info.is_paused && info.is_user_paused && info.holds == 2);
    assert_eq!(info.status, Status::Running, "something is in flight");
    assert!(info.is_busy);

    let before = machine.asked.len();
    machine.answer(0);
    machine.answer_all();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Paused);
    assert!(!machine.job.query().is_busy);
    assert_eq!(machine.asked.len(), before, "nothing new goes out");

    machine.job.resume().unwrap();
    assert_eq!(machine.job.resume(), Err(VerbError::NotPaused));
    assert!(machine.job.query().is_paused, "others still hold it");
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Paused);
    drop(first);
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Paused);
    machine.woken.take();
    drop(second);
    assert!(machine.woken.take() > 0, "the machine is woken");
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Ready);
    assert!(machine.is_equal());
}

#[test]
fn a_pause_withdrawn_in_time_is_never_seen() {
    let mut machine = Machine::started(LEN, options());
    let _ = machine.take_all();
    machine.new_names();
    machine.job.pause().unwrap();
    let _ = machine.take_all();
    machine.job.resume().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.new_names().join(" "), "ready READY");
}

#[test]
fn a_pause_before_the_start_keeps_it_from_working() {
    let mut machine = Machine::new(LEN, options());
    machine.job.pause().unwrap();
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.new_names().join(" "), "created running paused");
    assert!(machine.asked.is_empty(), "no work was done");
    assert!(!machine.is_guest_held());
    machine.job.resume().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.new_names().join(" "), "running ready READY");
}

#[test]
fn a_hold_before_the_start_keeps_it_from_working() {
    let mut machine = Machine::new(LEN, options());
    let hold = machine.job.hold();
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.asked.is_empty());
    drop(hold);
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn a_pause_left_over_at_the_end_is_dropped() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    machine.job.pause().unwrap();
    switch.commit();
    machine.drive().done().unwrap();
    assert!(!machine.job.query().is_paused);
    assert!(!machine.job.query().is_user_paused);

    // The same for one that fails with a pause asked for in between.
    let mut machine = Machine::started(LEN, options());
    take_copies(&mut machine);
    machine.job.pause().unwrap();
    machine.fail(0, Side::Target, ErrorKind::Other);
    machine.answer_all();
    machine.drive().done().unwrap_err();
    assert!(!machine.job.query().is_paused);
}

#[test]
fn a_hold_keeps_a_soft_cancelled_job_still_but_not_one_cancelled_by_force() {
    let mut machine = Machine::ready(LEN, options());
    let _hold = machine.job.hold();
    let _ = machine.drive().wait();
    machine.job.cancel(Cancel::Soft).unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Standby);
    machine.job.cancel(Cancel::Force).unwrap();
    machine.drive().done().unwrap_err();
}

#[test]
fn complete_in_standby_is_remembered() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.pause().unwrap();
    let _ = machine.drive().wait();
    machine.guest_write(0..512, 3);
    machine.job.complete().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Standby);
    machine.job.resume().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    assert!(machine.is_equal());
}

#[test]
fn complete_twice_is_harmless_also_while_the_switch_is_out() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    machine.job.complete().unwrap();
    let _ = machine.drive().wait();
    switch.commit();
    machine.drive().done().unwrap();
    assert!(matches!(
        machine.job.complete(),
        Err(VerbError::NotAllowed { .. })
    ));
}

#[test]
fn complete_is_refused_after_a_cancel() {
    let machine = Machine::ready(LEN, options());
    machine.job.cancel(Cancel::Soft).unwrap();
    assert_eq!(machine.job.complete(), Err(VerbError::CannotComplete));
}

#[test]
fn a_soft_cancel_is_raised_to_force_and_never_lowered() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.cancel(Cancel::Soft).unwrap();
    machine.job.cancel(Cancel::Force).unwrap();
    machine.job.cancel(Cancel::Soft).unwrap();
    assert_eq!(machine.job.query().cancel, Some(Cancel::Force));
    let error = machine.drive().done().unwrap_err();
    assert!(matches!(error, JobError::Cancelled { abandoned: 0 }));
}

#[test]
fn a_soft_cancel_takes_the_wish_to_switch_back() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    machine.job.cancel(Cancel::Soft).unwrap();
    machine.guest_write(0..4096, 3);
    machine.drive().done().unwrap();
    assert!(machine.is_equal() && !machine.is_guest_held());
}

#[test]
fn nothing_stops_a_job_whose_switch_is_out() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    let before = format!("{:?}", machine.job.query());
    assert!(machine.job.query().is_finalizing);
    for how in [Cancel::Soft, Cancel::Force] {
        assert_eq!(machine.job.cancel(how), Err(VerbError::Finalizing));
    }
    assert_eq!(format!("{:?}", machine.job.query()), before);
    switch.commit();
    // Neither does a cancel between the switch and the next look at the machine.
    assert_eq!(
        machine.job.cancel(Cancel::Force),
        Err(VerbError::Finalizing)
    );
    machine.drive().done().unwrap();
}

#[test]
fn a_job_whose_switch_was_declined_can_be_cancelled_at_once() {
    for how in [Cancel::Soft, Cancel::Force] {
        let mut machine = Machine::ready(LEN, options());
        machine.job.complete().unwrap();
        drop(machine.drive().switch());
        assert!(!machine.job.query().is_finalizing);
        machine.job.cancel(how).unwrap();
        let result = machine.drive().done();
        assert_eq!(result.is_ok(), how == Cancel::Soft);
        assert!(!machine.is_guest_held());
    }
}

#[test]
fn a_pending_job_is_cancelled_by_any_cancel() {
    for how in [Cancel::Soft, Cancel::Force] {
        let mut machine = machine_in(Status::Pending);
        machine.job.cancel(how).unwrap();
        assert_eq!(machine.job.finalize(), Err(VerbError::Finalizing));
        let error = machine.drive().done().unwrap_err();
        assert!(matches!(error, JobError::Cancelled { .. }));
        assert_eq!(
            machine.new_names().join(" "),
            "aborting CANCELLED concluded"
        );
    }
}

#[test]
fn a_switch_declined_while_pending_waits_for_finalize_again() {
    let mut machine = machine_in(Status::Pending);
    machine.job.finalize().unwrap();
    drop(machine.drive().switch());
    machine.guest_write(0..512, 7);
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Pending);
    assert!(machine.is_equal());
    machine.job.finalize().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
    assert_eq!(machine.new_names().join(" "), "COMPLETED concluded");
}

#[test]
fn a_soft_cancel_with_manual_finalize_ends_without_a_switch() {
    let mut options = options();
    options.job.auto_finalize = false;
    let mut machine = Machine::ready(LEN, options);
    machine.job.cancel(Cancel::Soft).unwrap();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Pending);
    machine.guest_write(512..1024, 7);
    machine.job.finalize().unwrap();
    machine.drive().done().unwrap();
    assert!(machine.is_equal());
}

/// A job with one failed target write under `policy`.
fn failed_once(policy: OnError, kind: ErrorKind) -> Machine {
    let mut options = options();
    options.job.on_target_error = policy;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let copy = machine.find_copy(0);
    machine.fail(copy, Side::Target, kind);
    machine
}

#[test]
fn stop_counts_as_the_pause_of_the_user() {
    let mut machine = failed_once(OnError::Stop, ErrorKind::Other);
    let info = machine.job.query();
    assert!(info.is_paused && info.is_user_paused);
    assert_eq!(info.io_status, IoStatus::Failed);
    assert!(info.error.is_none());
    assert_eq!(machine.job.pause(), Err(VerbError::AlreadyPaused));
    machine.answer_all();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Paused);
    machine.job.resume().unwrap();
    assert_eq!(
        machine.job.query().io_status,
        IoStatus::Ok,
        "reset before the work restarts"
    );
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(machine.job.query().status, Status::Ready);
}

/// Takes the copies of a whole disk in pieces of 4 KiB, all out at once.
fn many_copies(mut options: MirrorOptions) -> Machine {
    options.chunk_max = 4 * KIB;
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    assert_eq!(machine.out.len(), 16);
    machine
}

#[test]
fn several_errors_make_one_pause_and_the_first_one_counts() {
    let mut options = options();
    options.job.on_target_error = OnError::Stop;
    options.job.on_source_error = OnError::Stop;
    let mut machine = many_copies(options);
    machine.new_names();
    machine.fail(0, Side::Target, ErrorKind::StorageFull);
    machine.fail(0, Side::Source, ErrorKind::Other);
    machine.fail(0, Side::Target, ErrorKind::Other);
    let info = machine.job.query();
    assert_eq!(info.io_status, IoStatus::NoSpace, "the first error wins");
    assert_eq!(machine.new_names().join(" "), "ERROR ERROR ERROR");
    machine.job.resume().unwrap();
    assert_eq!(machine.job.resume(), Err(VerbError::NotPaused));
    // One that arrives after the resume pauses again.
    machine.fail(0, Side::Target, ErrorKind::Other);
    assert_eq!(machine.job.query().io_status, IoStatus::Failed);
    machine.answer_all();
    let _ = machine.drive().wait();
    assert_eq!(machine.job.query().status, Status::Paused);
    machine.job.resume().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn an_error_after_the_pause_of_the_user_is_noted_and_one_resume_is_enough() {
    let mut options = options();
    options.job.on_target_error = OnError::Stop;
    let mut machine = many_copies(options);
    machine.job.pause().unwrap();
    machine.fail(0, Side::Target, ErrorKind::Other);
    assert_eq!(machine.job.query().io_status, IoStatus::Failed);
    machine.answer_all();
    let _ = machine.drive().wait();
    machine.job.resume().unwrap();
    assert!(!machine.job.query().is_paused);
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn a_cancel_resets_the_io_status() {
    let mut machine = failed_once(OnError::Stop, ErrorKind::StorageFull);
    assert_eq!(machine.job.query().io_status, IoStatus::NoSpace);
    machine.job.cancel(Cancel::Force).unwrap();
    let info = machine.job.query();
    assert_eq!((info.io_status, info.is_paused), (IoStatus::Ok, false));
    machine.answer_all();
    let error = machine.drive().done().unwrap_err();
    assert!(
        matches!(error, JobError::Cancelled { .. }),
        "an error that has stopped it is not one of its own"
    );
}

#[test]
fn enospc_stops_for_want_of_space_and_reports_the_rest() {
    let mut machine = failed_once(OnError::Enospc, ErrorKind::StorageFull);
    assert_eq!(machine.job.query().io_status, IoStatus::NoSpace);
    machine.answer_all();
    let _ = machine.drive().wait();
    machine.job.resume().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal(), "it went on after the space was found");
    let errors: Vec<_> = machine
        .events()
        .iter()
        .filter_map(|event| match event {
            Event::Error(error) => Some((error.action, error.is_no_space, error.side)),
            _ => None,
        })
        .collect();
    assert_eq!(errors, [(ErrorAction::Stop, true, Side::Target)]);

    let mut machine = failed_once(OnError::Enospc, ErrorKind::Other);
    assert_eq!(machine.job.query().io_status, IoStatus::Ok);
    machine.answer_all();
    machine.drive().done().unwrap_err();
}

#[test]
fn the_policy_of_the_side_that_failed_applies() {
    for side in [Side::Source, Side::Target] {
        let mut options = options();
        match side {
            Side::Source => options.job.on_source_error = OnError::Ignore,
            Side::Target | Side::Buffer => options.job.on_target_error = OnError::Ignore,
        }
        for failing in [Side::Source, Side::Target] {
            let mut machine = many_copies(options.clone());
            machine.fail(0, failing, ErrorKind::Other);
            let result = machine.drive();
            assert_eq!(
                matches!(result, Rest::Done(Err(_))),
                failing != side,
                "{side} is ignored, {failing} fails"
            );
        }
    }
}

#[test]
fn the_first_of_several_errors_is_the_result_and_nothing_new_goes_out() {
    let mut machine = many_copies(options());
    machine.new_names();
    let before = machine.asked.len();
    machine.fail(0, Side::Target, ErrorKind::AddrInUse);
    machine.fail(0, Side::Source, ErrorKind::BrokenPipe);
    assert_eq!(machine.take_all().wait(), None, "the others are awaited");
    machine.answer_all();
    let error = machine.drive().done().unwrap_err();
    let JobError::Io { side, error, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((side, error.kind()), (Side::Target, ErrorKind::AddrInUse));
    assert_eq!(machine.asked.len(), before);
    assert_eq!(
        machine.new_names().join(" "),
        "ERROR ERROR aborting COMPLETED with an error concluded null"
    );
    let told = machine
        .job
        .query()
        .error
        .expect("it can be read")
        .to_string();
    assert!(told.starts_with("target failed"), "{told}");
}

/// When the machine asks again by itself, with everything that is out answered.
fn next_time(machine: &mut Machine) -> Duration {
    machine.take_all().wait().expect("a time")
}

#[test]
fn ignored_errors_are_tried_again_after_doubling_delays() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    options.granularity = blockjob::Granularity::from_bytes(LEN);
    let mut machine = Machine::started(LEN, options);
    let _ = machine.take_all();
    machine.answer(0);
    let mut delays = Vec::new();
    for _ in 0..11 {
        let _ = machine.take_all();
        if machine
            .find(|kind| matches!(kind, OpKind::Status(_)))
            .is_some()
        {
            machine.answer(0);
            let _ = machine.take_all();
        }
        machine.fail(0, Side::Target, ErrorKind::Other);
        let before = machine.now;
        let until = next_time(&mut machine);
        machine.now = until - MS;
        assert!(machine.take_all().wait().is_some(), "not before its time");
        assert!(machine.out.is_empty());
        machine.now = until;
        delays.push((until - before).as_millis());
    }
    assert_eq!(
        delays,
        [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000]
    );
    // A success resets the delay.
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    machine.guest_write(0..1, 1);
    machine.now += Duration::from_secs(1);
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    machine.fail(0, Side::Target, ErrorKind::Other);
    let before = machine.now;
    assert_eq!(next_time(&mut machine) - before, 10 * MS);
}

#[test]
fn one_bad_moment_with_many_requests_out_delays_them_all_by_the_first_delay() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = many_copies(options);
    for _ in 0..16 {
        machine.fail(0, Side::Target, ErrorKind::Other);
    }
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert!(machine.now < 100 * MS, "ready only at {:?}", machine.now);
}

#[test]
fn other_areas_go_on_while_one_waits_to_be_tried_again() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = many_copies(options);
    machine.fail(0, Side::Target, ErrorKind::Other);
    machine.answer_all();
    assert_eq!(machine.take_all().wait(), Some(10 * MS));
    assert_eq!(machine.target[4096..], machine.source[4096..]);
    assert_ne!(machine.target[..4096], machine.source[..4096]);
    assert_eq!(
        machine.job.query().status,
        Status::Running,
        "not ready with something left out"
    );
}

/// A ready job with a range that waits for long to be tried again.
fn parked_in_ready(cancel_grace: Option<Duration>) -> Machine {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    options.job.cancel_grace = cancel_grace;
    let mut machine = Machine::ready(LEN, options);
    machine.now += Duration::from_secs(1);
    machine.guest_write(0..1, 0xfe);
    machine.fault = Some(Box::new(|_, kind| {
        matches!(kind, OpKind::Copy(_)).then_some((Side::Target, ErrorKind::Other))
    }));
    let end = machine.now + Duration::from_secs(4);
    let until = machine.drive_until(end).wait().expect("a time");
    assert!(until > machine.now + Duration::from_secs(1), "{until:?}");
    machine.fault = None;
    machine
}

#[test]
fn a_guest_write_elsewhere_is_copied_while_a_failed_range_waits() {
    let mut machine = parked_in_ready(None);
    let until = machine.now + 100 * MS;
    machine.woken.take();
    machine.guest_write(LEN - 1..LEN, 0x77);
    assert!(machine.woken.take() > 0, "the write wakes the job");
    let _ = machine.drive_until(until);
    assert_eq!(machine.target[LEN as usize - 1], 0x77);
    assert_ne!(machine.target[0], machine.source[0]);
}

#[test]
fn a_delay_ends_with_a_resume_a_change_of_policy_and_a_soft_cancel() {
    type Act = fn(&mut Machine);
    let acts: [(&str, Act); 5] = [
        ("resume", |machine| {
            machine.job.pause().unwrap();
            let _ = machine.take_all();
            machine.job.resume().unwrap();
        }),
        ("resume while held", |machine| {
            let hold = machine.job.hold();
            machine.job.pause().unwrap();
            let _ = machine.take_all();
            machine.job.resume().unwrap();
            let _ = machine.take_all();
            drop(hold);
        }),
        ("change", |machine| {
            machine.job.change(Change::default()).unwrap();
        }),
        ("change while completing", |machine| {
            machine.job.complete().unwrap();
            machine.job.change(Change::default()).unwrap();
        }),
        ("soft cancel", |machine| {
            machine.job.cancel(Cancel::Soft).unwrap();
        }),
    ];
    for (what, act) in acts {
        let mut machine = parked_in_ready(None);
        let soon = machine.now + 10 * MS;
        act(&mut machine);
        let _ = machine.drive_until(soon);
        assert!(machine.is_equal(), "{what}");
    }
}

#[test]
fn a_range_that_waits_to_be_tried_again_is_counted_once() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = many_copies(options);
    machine.fail(0, Side::Target, ErrorKind::Other);
    let progress = machine.job.query().progress;
    assert_eq!((progress.current, progress.total), (0, LEN));
    machine.answer_all();
    let progress = machine.job.query().progress;
    assert_eq!((progress.current, progress.total), (LEN - 4 * KIB, LEN));
}

#[test]
fn error_events_are_merged_and_bounded() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    options.job.on_source_error = OnError::Ignore;
    let mut machine = many_copies(options);
    machine.new_names();
    for _ in 0..16 {
        machine.fail(0, Side::Target, ErrorKind::Other);
    }
    let events = machine.events();
    let [Event::Error(error)] = events else {
        panic!("one event: {events:?}");
    };
    assert_eq!(
        (error.count, error.action, error.side),
        (16, ErrorAction::Ignore, Side::Target)
    );
    let OpKind::Copy(range) = error.operation else {
        panic!("{error:?}");
    };
    assert_eq!(range.start(), LEN - 4 * KIB, "the last one is told");
    machine.events.clear();

    // Of different kinds they are not merged, but the oldest are forgotten in the end.
    for round in 0..1000 {
        machine.now += Duration::from_secs(10);
        let _ = machine.take_all();
        while let Some(look) = machine.find(|kind| matches!(kind, OpKind::Status(_))) {
            machine.answer(look);
            let _ = machine.take_all();
        }
        let side = [Side::Source, Side::Target][round % 2];
        machine.fail(0, side, ErrorKind::Other);
    }
    machine.job.cancel(Cancel::Force).unwrap();
    machine.answer_all();
    machine.drive().done().unwrap_err();
    let names = machine.new_names();
    let errors = names.iter().filter(|name| *name == "ERROR").count();
    assert_eq!(errors, 64);
    assert_eq!(
        names[errors..].join(" "),
        "aborting CANCELLED concluded null",
        "what is no error is never dropped"
    );
}

#[test]
fn errors_with_different_actions_are_not_merged() {
    let mut options = options();
    options.job.on_target_error = OnError::Ignore;
    let mut machine = many_copies(options);
    machine.new_names();
    machine.fail(0, Side::Target, ErrorKind::Other);
    machine
        .job
        .change(Change {
            on_source_error: None,
            on_target_error: Some(OnError::Stop),
            ..Change::default()
        })
        .unwrap();
    machine.fail(0, Side::Target, ErrorKind::Other);
    machine.fail(0, Side::Target, ErrorKind::StorageFull);
    assert_eq!(machine.new_names().len(), 3);
}

#[test]
fn what_failed_is_dirty_again_when_the_error_is_told() {
    for policy in [OnError::Report, OnError::Ignore, OnError::Stop] {
        let machine = &mut failed_once(policy, ErrorKind::Other);
        let left = machine.mirror().left_dirty().expect("past the scan");
        assert_eq!(left.next_dirty(0..1), Some(0), "{policy:?}");
    }
}

/// The bytes copied in `time`, with the time advanced to where the machine wants it.
fn copied_in(machine: &mut Machine, time: Duration) -> u64 {
    let before = machine.copied;
    let end = machine.now + time;
    while machine.now < end {
        let rest = machine.drive_until(end);
        match rest {
            Rest::Wait(Some(_)) => machine.now = end,
            rest => panic!("it copies on: {rest:?}"),
        }
    }
    machine.copied - before
}

fn limited(len: u64, speed: u64) -> Machine {
    let mut options = options();
    options.job.speed = speed;
    options.chunk_max = 64 * KIB;
    Machine::started(len, options)
}

#[test]
fn the_speed_limit_holds_over_many_slices() {
    let mut machine = limited(64 * MIB, 4 * MIB);
    let copied = copied_in(&mut machine, Duration::from_secs(10));
    let expected = 40 * MIB;
    assert!(
        copied.abs_diff(expected) < expected / 50,
        "{copied} bytes in 10 s"
    );
}

#[test]
fn a_limit_comes_and_goes_while_the_job_runs() {
    let mut machine = limited(64 * MIB, MIB);
    let copied = copied_in(&mut machine, Duration::from_secs(4));
    assert!(copied.abs_diff(4 * MIB) < MIB / 4, "{copied}");

    // Raised: the sleep is cut short and the debt carried as time.
    machine.woken.take();
    machine.job.set_speed(16 * MIB).unwrap();
    assert!(machine.woken.take() > 0, "a raise wakes the job");
    assert_eq!(machine.job.query().speed, 16 * MIB);
    let copied = copied_in(&mut machine, Duration::from_secs(2));
    assert!(copied.abs_diff(32 * MIB) < 3 * MIB, "{copied}");

    // Lowered to next to nothing: it owes one slice at most.
    machine.job.set_speed(KIB).unwrap();
    let until = machine.drive_until(machine.now).wait().expect("a time");
    assert!(until <= machine.now + 100 * MS, "{until:?}");

    // Taken away: no time passes any more.
    machine.job.set_speed(0).unwrap();
    let before = machine.now;
    assert!(machine.drive_until(before).wait().is_none());
    assert!(machine.is_equal());
    assert_eq!(machine.now, before);
}

#[test]
fn a_limit_set_before_the_start_and_during_a_pause_counts() {
    let mut machine = Machine::new(16 * MIB, options());
    machine.job.set_speed(MIB).unwrap();
    machine.job.start().unwrap();
    let copied = copied_in(&mut machine, Duration::from_secs(3));
    assert!(copied.abs_diff(3 * MIB) <= 2 * MIB, "{copied}");
    machine.job.pause().unwrap();
    let _ = machine.drive();
    machine.job.set_speed(0).unwrap();
    machine.job.resume().unwrap();
    let before = machine.now;
    assert!(machine.drive_until(before).wait().is_none());
    assert!(machine.is_equal());
}

#[test]
fn the_end_of_time_is_no_reason_to_panic() {
    let mut machine = limited(MIB, 1);
    machine.now = Duration::MAX;
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all();
    machine.job.set_speed(5).unwrap();
    let _ = machine.take_all();
    machine.job.cancel(Cancel::Force).unwrap();
    machine.answer_all();
    machine.drive().done().unwrap_err();
}

#[test]
fn an_empty_disk_is_ready_at_once_with_nothing_done() {
    for sync in [MirrorSync::Full, MirrorSync::Top, MirrorSync::None] {
        let mut options = options();
        options.sync = sync;
        let mut machine = Machine::started(0, options);
        let _ = machine.drive().wait();
        let ready = machine.events().iter().find_map(|event| match event {
            Event::Ready { progress, .. } => Some(*progress),
            _ => None,
        });
        let progress = ready.expect("ready");
        assert_eq!((progress.current, progress.total), (0, 0));
        machine.job.complete().unwrap();
        machine.drive().switch().commit();
        machine.drive().done().unwrap();
    }
}

#[test]
fn a_target_is_told_once_more_to_give_up_if_that_was_lost() {
    for are_all_lost in [false, true] {
        let mut machine = many_copies(options());
        machine.job.cancel(Cancel::Force).unwrap();
        let _ = machine.take_all();
        let is_cancel = |kind| kind == OpKind::CancelInFlight;
        let index = machine.find(is_cancel).expect("it is told");
        let lost = machine.out.remove(index).op;
        if are_all_lost {
            machine.out.clear();
            machine.mirror().ops_lost();
        } else {
            machine.mirror().op_lost(lost);
        }
        let _ = machine.take_all();
        assert!(machine.find(is_cancel).is_some(), "{:?}", machine.kinds());
        assert!(machine.drive().done().is_err());
    }
}

#[test]
fn operations_that_are_never_answered_are_abandoned_after_the_time_of_grace() {
    let mut options = options();
    options.job.cancel_grace = Some(500 * MS);
    let mut machine = many_copies(options);
    machine.now = Duration::from_secs(7);
    machine.job.cancel(Cancel::Force).unwrap();
    assert_eq!(machine.take_all().wait(), Some(machine.now + 500 * MS));
    let given_up = |machine: &Machine| {
        machine
            .asked
            .iter()
            .filter(|kind| **kind == OpKind::CancelInFlight)
            .count()
    };
    assert_eq!(given_up(&machine), 1);
    // Asking for it again changes nothing.
    machine.job.cancel(Cancel::Force).unwrap();
    let _ = machine.take_all().wait();
    assert_eq!(given_up(&machine), 1, "handed out once");
    let index = machine
        .find(|kind| kind == OpKind::CancelInFlight)
        .expect("it is out");
    machine.answer(index);
    machine.now += 499 * MS;
    assert!(machine.take_all().wait().is_some());
    assert!(!machine.is_guest_held());
    machine.now += MS;
    let error = machine.take_all().done().unwrap_err();
    assert!(
        matches!(error, JobError::Cancelled { abandoned: 16 }),
        "{error:?}"
    );
    assert_eq!(machine.new_names().pop().as_deref(), Some("null"));

    // The node is free, and recording has ended: what comes late touches neither.
    let other = Mirror::new(
        &machine.node,
        Limits::new(LEN),
        Limits::new(LEN),
        MirrorOptions::default(),
    )
    .expect("the node is free");
    let before = format!("{:?}", machine.job.query());
    let outcomes = [
        Outcome::Done,
        Outcome::Failed {
            side: Side::Target,
            error: machine::error(ErrorKind::Other),
        },
    ];
    for outcome in outcomes {
        let out = machine.out.remove(0);
        machine.report(out.op, outcome);
    }
    machine.answer_all();
    machine.mirror().ops_lost();
    assert_eq!(format!("{:?}", machine.job.query()), before);
    assert_eq!(machine.new_names(), [""; 0]);
    machine.take_all().done().unwrap_err();
    drop(other);
}

#[test]
fn without_a_time_of_grace_a_cancelled_job_waits() {
    let mut machine = many_copies(options());
    machine.job.cancel(Cancel::Force).unwrap();
    assert_eq!(machine.take_all().wait(), None);
    machine.now += Duration::from_secs(1 << 30);
    assert_eq!(machine.take_all().wait(), None);
    machine.answer_all();
    let error = machine.take_all().done().unwrap_err();
    assert!(matches!(error, JobError::Cancelled { abandoned: 0 }));
}

#[test]
fn a_job_that_fails_and_hangs_can_be_cancelled() {
    let mut options = options();
    options.job.cancel_grace = Some(MS);
    let mut machine = many_copies(options);
    machine.fail(0, Side::Target, ErrorKind::Other);
    assert_eq!(machine.take_all().wait(), None);
    machine.now += 10 * MS;
    machine.job.cancel(Cancel::Force).unwrap();
    assert_eq!(machine.take_all().wait(), Some(machine.now + MS));
    machine.now += MS;
    let error = machine.take_all().done().unwrap_err();
    assert!(matches!(error, JobError::Io { .. }), "its own error stays");
    let Some(Event::Cancelled {
        error: Some(JobError::Io { .. }),
        ..
    }) = machine.events().iter().find(|event| is_final(event))
    else {
        panic!("the last event tells the error, too: {:?}", machine.events);
    };
}

#[test]
fn after_a_cancel_by_force_errors_change_nothing() {
    let mut options = options();
    options.job.on_target_error = OnError::Stop;
    let mut machine = many_copies(options);
    machine.job.cancel(Cancel::Force).unwrap();
    let _ = machine.take_all();
    machine.fail(0, Side::Target, ErrorKind::Other);
    assert!(!machine.job.query().is_paused);
    assert_eq!(machine.job.query().io_status, IoStatus::Ok);
    machine.answer_all();
    let error = machine.drive().done().unwrap_err();
    assert!(matches!(error, JobError::Cancelled { .. }));
}

#[test]
fn a_cancel_before_the_first_look_waits_for_nothing() {
    // A guest write that never settles keeps the job from recording; the guest is held meanwhile.
    let mut machine = Machine::new(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..512).into()).go().expect("open");
    machine.job.start().unwrap();
    let _ = machine.take_all().wait();
    assert!(machine.is_guest_held());
    machine.job.cancel(Cancel::Force).unwrap();
    machine.take_all().done().unwrap_err();
    assert!(!machine.is_guest_held());
    ticket.finish(());
}

#[test]
fn dropping_the_machine_ends_the_job() {
    for how in ["created", "attaching", "copying", "ready", "quiet"] {
        let mut machine = Machine::new(LEN, options());
        let node = machine.node.clone();
        let mut ticket = None;
        match how {
            "created" => {}
            "attaching" => {
                ticket = node.begin_write((0..1).into()).go();
                machine.job.start().unwrap();
                let _ = machine.take_all();
                assert!(machine.is_guest_held());
            }
            "copying" => {
                machine.job.start().unwrap();
                let _ = machine.take_all();
            }
            "ready" => {
                machine.job.start().unwrap();
                let _ = machine.drive();
            }
            _ => {
                machine.job.start().unwrap();
                let _ = machine.drive();
                ticket = node.begin_write((0..1).into()).go();
                machine.job.complete().unwrap();
                let _ = machine.drive_now();
                assert!(machine.is_guest_held());
            }
        }
        machine.drop_mirror();
        assert!(!machine.is_guest_held(), "{how}");
        let info = machine.job.query();
        assert_eq!(info.status, Status::Null);
        assert!(matches!(info.error, Some(JobError::Dropped)), "{how}");
        let names = machine.names();
        let expected = match how {
            "created" => "aborting concluded null",
            _ => "aborting COMPLETED with an error concluded null",
        };
        assert!(names.join(" ").ends_with(expected), "{how}: {names:?}");
        let limits = Limits::new(LEN);
        assert!(Mirror::new(&node, limits, limits, options()).is_ok());
        drop(ticket);
    }
}

#[test]
fn dropping_the_machine_after_the_switch_was_used_is_a_success() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    machine.drive().switch().commit();
    machine.drop_mirror();
    assert!(
        machine.job.query().error.is_none(),
        "the guest has switched"
    );
    assert!(
        machine
            .names()
            .join(" ")
            .ends_with("waiting pending COMPLETED concluded null")
    );
}

#[test]
fn dropping_the_machine_while_the_switch_is_out_leaves_the_guest_to_the_switch() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    machine.drop_mirror();
    assert!(machine.is_guest_held());
    drop(switch);
    assert!(!machine.is_guest_held());
    assert_eq!(machine.job.query().status, Status::Null);
}

#[test]
fn query_tells_what_was_asked_and_how_it_was_made() {
    let mut options = options();
    options.job = named();
    options.job.speed = 12345;
    options.job.auto_finalize = false;
    options.job.auto_dismiss = false;
    let mut machine = Machine::new(LEN, options);
    let info = machine.job.query();
    assert_eq!(info.id.as_deref(), Some("m0"));
    assert_eq!(info.kind, "mirror");
    assert_eq!(info.speed, 12345);
    assert!(!info.auto_finalize && !info.auto_dismiss);
    assert!(!info.is_busy && !info.is_paused && !info.is_completing && !info.is_finalizing);
    assert!(info.error.is_none() && info.cancel.is_none() && info.holds == 0);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    assert!(machine.job.query().is_busy);
    machine.job.set_speed(0).unwrap();
    let _ = machine.drive();
    machine.job.complete().unwrap();
    assert!(machine.job.query().is_completing);
    let _ = machine.drive();
    machine.job.cancel(Cancel::Force).unwrap();
    machine.drive().done().unwrap_err();
    let info = machine.job.query();
    assert_eq!(info.status, Status::Concluded);
    assert!(matches!(info.error, Some(JobError::Cancelled { .. })));
}
