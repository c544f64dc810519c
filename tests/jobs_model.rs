//! Jobs of a group against what must hold of them: every verb in every status, and every trouble at every
//! step of their common end.

#![allow(clippy::disallowed_methods, reason = "a test brings the threads")]

#[path = "support/machine.rs"]
mod machine;
#[allow(dead_code, reason = "what else the simulations draw")]
#[path = "sim/rng.rs"]
mod rng;
#[path = "support/together.rs"]
mod together;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockjob::{
    Cancel, ErrorAction, Event, Hold, IoStatus, JobError, OnError, Side, Status, Verb, VerbError,
};

use machine::{KIB, MS, Machine, Rest, ask, options};
use rng::Rng;
use together::{On, Together};

const LEN: u64 = 16 * KIB;

// Every verb in every status

/// What is to come of a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ok,
    No,
    AlreadyPaused,
    NotPaused,
}

/// What is to become of the other member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Untouched,
    Cancelled,
    Finalizing,
}

/// Two members, the first one in that status, at rest.
fn first_in(status: Status) -> Together {
    let mut all = Together::new(2, LEN, |_, options| {
        options.job.auto_finalize = status != Status::Pending;
        options.job.auto_dismiss = status == Status::Null;
    });
    let [first, second] = &mut all.members[..] else {
        unreachable!("two were made");
    };
    second.machine.job.start().unwrap();
    let _ = second.machine.drive().wait();
    let job = first.machine.job.clone();
    if status != Status::Created {
        job.start().unwrap();
    }
    match status {
        Status::Created => {}
        Status::Running => {
            let _ = first.machine.take_all();
        }
        Status::Paused => {
            job.pause().unwrap();
            let _ = first.machine.drive();
        }
        Status::Ready => {
            let _ = first.machine.drive();
        }
        Status::Standby => {
            let _ = first.machine.drive();
            job.pause().unwrap();
            let _ = first.machine.drive();
        }
        Status::Waiting => {
            let _ = first.machine.drive();
            job.complete().unwrap();
            all.run();
        }
        Status::Pending => {
            let _ = first.machine.drive();
            all.complete();
            all.run();
        }
        Status::Concluded | Status::Null => {
            let _ = first.machine.drive();
            all.complete();
            all.run();
            all.commit();
            all.run();
        }
        Status::Aborting => unreachable!("no job rests there: it is over in the same step"),
    }
    assert_eq!(all.info(0).status, status);
    all
}

#[test]
fn every_verb_in_every_status_of_a_member() {
    use Answer::{AlreadyPaused, No, NotPaused, Ok};
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
        (Status::Waiting, [No, Ok, No, No, No, No, No, No, No]),
        (Status::Pending, [No, Ok, No, No, No, No, No, Ok, No]),
        (Status::Concluded, [No, No, No, No, No, No, No, No, Ok]),
        (Status::Null, [No; 9]),
    ];
    for (status, row) in table {
        for (verb, expected) in Verb::ALL.into_iter().zip(row) {
            check_cell(status, verb, expected);
        }
    }
}

fn check_cell(status: Status, verb: Verb, expected: Answer) {
    let mut all = first_in(status);
    let cell = format!("{verb} while {status}");
    let show = |all: &Together, index| format!("{:?}", all.info(index));
    let (before, other_before) = (show(&all, 0), show(&all, 1));
    let result = ask(&all.members[0].machine.job, verb);
    let (after, other_after) = (show(&all, 0), show(&all, 1));
    match expected {
        Answer::Ok => {
            result.unwrap_or_else(|error| panic!("{cell}: {error}"));
            assert_ne!(before, after, "{cell} shows");
        }
        Answer::No => {
            let id = "m0".to_owned();
            assert_eq!(
                result,
                Err(VerbError::NotAllowed { id, verb, status }),
                "{cell}"
            );
        }
        Answer::AlreadyPaused => assert_eq!(result, Err(VerbError::AlreadyPaused), "{cell}"),
        Answer::NotPaused => assert_eq!(result, Err(VerbError::NotPaused), "{cell}"),
    }
    let other = match (expected, verb) {
        (Answer::Ok, Verb::Cancel) => Other::Cancelled,
        (Answer::Ok, Verb::Finalize) => Other::Finalizing,
        _ => Other::Untouched,
    };
    if expected != Answer::Ok {
        assert_eq!(before, after, "{cell} was refused and changes nothing");
    }
    let info = all.info(1);
    match other {
        Other::Untouched => assert_eq!(other_before, other_after, "{cell}"),
        Other::Cancelled => assert_eq!(info.cancel, Some(Cancel::Force), "{cell}"),
        Other::Finalizing => assert!(info.is_finalizing && info.cancel.is_none(), "{cell}"),
    }
    // Whatever was asked, all can be cancelled, and end once.
    if !matches!(status, Status::Concluded | Status::Null) {
        let _ = all.members[1].machine.job.cancel(Cancel::Force);
        for member in &mut all.members {
            member.machine.answer_all();
            member.machine.woken.wake_once();
        }
        all.run();
        all.assert_all_or_none();
    }
    for member in &mut all.members {
        assert!(member.machine.job.query().status >= Status::Concluded);
        member.assert_good_events();
    }
}

#[test]
fn a_soft_cancel_is_soft_where_the_member_is_ready_and_by_force_elsewhere() {
    for status in Status::ALL {
        if status == Status::Aborting {
            continue;
        }
        let all = first_in(status);
        let result = all.members[0].machine.job.cancel(Cancel::Soft);
        let (own, other) = (all.info(0).cancel, all.info(1).cancel);
        match status {
            Status::Ready | Status::Standby => {
                assert_eq!((own, other), (Some(Cancel::Soft), None), "{status}");
            }
            Status::Concluded | Status::Null => {
                result.unwrap_err();
                assert_eq!((own, other), (None, None));
            }
            _ => {
                let force = Some(Cancel::Force);
                assert_eq!((own, other), (force, force), "{status}");
            }
        }
    }
}

// Every trouble at every step

/// What befalls one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    Cancel(Cancel),
    Pause,
    Hold,
    /// The next operation that is answered fails, and the policy is to report it.
    Fail,
    /// The next operation that is answered fails, and is tried again.
    FailOnce,
    DropMachine,
    LoseOperations,
    /// If the switch is out: it is dropped.
    Decline,
    GuestWrite,
}

const TROUBLES: [Trouble; 11] = [
    Trouble::Nothing,
    Trouble::Cancel(Cancel::Soft),
    Trouble::Cancel(Cancel::Force),
    Trouble::Pause,
    Trouble::Hold,
    Trouble::Fail,
    Trouble::FailOnce,
    Trouble::DropMachine,
    Trouble::LoseOperations,
    Trouble::Decline,
    Trouble::GuestWrite,
];

/// What came of a play.
#[derive(Debug, Default, PartialEq, Eq)]
struct Played {
    steps: usize,
    succeeded: bool,
    /// Whether the trouble could befall.
    was_hit: bool,
    backs: usize,
}

/// A group's whole life in single steps: each is one question to one machine, one answer, or one commit.
struct Play {
    all: Together,
    trouble: Trouble,
    victim: usize,
    hold: Option<Hold>,
    hit_at: Option<usize>,
    /// Whether the next operation of the victim fails.
    fails: bool,
    was_declined: bool,
    /// Guests whose machine was dropped with its switch committed: nobody can point them back.
    is_unguided: bool,
}

fn play(count: usize, trouble: Trouble, victim: usize, at: usize) -> Played {
    let all = Together::new(count, LEN, |index, options| {
        options.job.auto_finalize = index != 1;
        options.chunk_max = 4 * KIB;
        options.job.on_target_error = match trouble {
            Trouble::FailOnce => OnError::Ignore,
            _ => OnError::Report,
        };
        options.job.on_source_error = options.job.on_target_error;
    });
    let mut play = Play {
        all,
        trouble,
        victim,
        hold: None,
        hit_at: None,
        fails: false,
        was_declined: false,
        is_unguided: false,
    };
    let mut step = 0;
    while !play.is_over() {
        assert!(
            step < 20_000,
            "{trouble:?} of {victim} at {at}: no end, {:?}",
            play.all.statuses()
        );
        let index = step % count;
        if step == at {
            play.hit(step);
        }
        play.soothe(step);
        play.step(index, step);
        play.check();
        step += 1;
    }
    play.check_end(step)
}

impl Play {
    fn is_over(&self) -> bool {
        self.all
            .members
            .iter()
            .all(|member| member.result.is_some() || !member.machine.has_mirror())
            && self
                .all
                .members
                .iter()
                .all(|member| member.switch.is_none())
    }

    fn hit(&mut self, step: usize) {
        let member = &mut self.all.members[self.victim];
        let job = member.machine.job.clone();
        let was_hit = match self.trouble {
            Trouble::Nothing => false,
            Trouble::Cancel(how) => job.cancel(how).is_ok(),
            Trouble::Pause => job.pause().is_ok(),
            Trouble::Hold => {
                self.hold = Some(job.hold());
                true
            }
            Trouble::Fail | Trouble::FailOnce => {
                self.fails = true;
                true
            }
            Trouble::DropMachine => {
                self.is_unguided = member.guest == On::Target && member.result.is_none();
                member.machine.drop_mirror();
                member.machine.out.clear();
                true
            }
            Trouble::LoseOperations => {
                member.machine.out.clear();
                if member.result.is_none() {
                    member.machine.mirror().ops_lost();
                }
                true
            }
            Trouble::Decline => {
                self.was_declined = member.switch.take().is_some();
                self.was_declined
            }
            Trouble::GuestWrite => {
                let may_write = !member.machine.is_guest_held() && member.guest == On::Source;
                if may_write {
                    member.machine.guest_write(100..5000, 0x5a);
                }
                may_write
            }
        };
        self.hit_at = was_hit.then_some(step);
    }

    /// What keeps a job from its end is taken away a while later.
    fn soothe(&mut self, step: usize) {
        if self.hit_at.is_some_and(|at| step == at + 40) {
            self.hold = None;
            let _ = self.all.members[self.victim].machine.job.resume();
        }
    }

    fn step(&mut self, index: usize, step: usize) {
        let count = self.all.members.len();
        let round = step / count;
        // Those who wait for something that never comes let time pass.
        for member in &mut self.all.members {
            member.machine.now += MS;
        }
        let member = &mut self.all.members[index];
        let job = member.machine.job.clone();
        let status = job.query().status;
        let may_write = member.guest == On::Source && !member.machine.is_guest_held();
        if round % 7 == 3 && round < 70 && may_write && status < Status::Aborting {
            member.machine.guest_write(0..5000, round as u8);
        }
        match status {
            // One after the other, each after a while.
            Status::Created if round == 3 * index => drop(job.start()),
            Status::Ready if round > 20 + 5 * index => drop(job.complete()),
            Status::Pending if round > 60 => drop(job.finalize()),
            _ => {}
        }
        if member.result.is_some() || !member.machine.has_mirror() {
            member.commit();
            return;
        }
        if round.is_multiple_of(3) && member.switch.is_some() {
            member.commit();
            return;
        }
        if round.is_multiple_of(2) && !member.machine.out.is_empty() {
            if index == self.victim && std::mem::take(&mut self.fails) {
                let side = match member.machine.out[0].kind().writes_target() {
                    true => Side::Target,
                    false => Side::Source,
                };
                member.machine.fail(0, side, ErrorKind::Other);
            } else {
                member.machine.answer(0);
            }
            return;
        }
        match member.machine.poll() {
            None | Some(Rest::Wait(_)) => {}
            Some(rest) => member.take(rest),
        }
    }

    fn check(&self) {
        let members = &self.all.members;
        let infos: Vec<_> = members.iter().map(|m| m.machine.job.query()).collect();
        let is_pending = |status| matches!(status, Status::Pending);
        let is_early = |status: Status| !status.is_completed();
        if infos.iter().any(|info| is_pending(info.status)) {
            assert!(
                !infos.iter().any(|info| is_early(info.status)),
                "pending before all are done: {:?}",
                self.all.statuses()
            );
        }
        // From the first switch to the last vote all are held.
        let is_out = members.iter().any(|m| m.switch.is_some());
        let round_goes_on = infos
            .iter()
            .all(|info| info.is_finalizing && info.cancel != Some(Cancel::Force));
        if is_out && round_goes_on && !self.was_declined && self.hit_at.is_none() {
            assert!(self.all.held().iter().all(|&held| held));
        }
    }

    fn check_end(mut self, steps: usize) -> Played {
        let what = format!("{:?} of {} at {:?}", self.trouble, self.victim, self.hit_at);
        let infos: Vec<_> = (0..self.all.members.len())
            .map(|index| self.all.info(index))
            .collect();
        let succeeded = infos[0].error.is_none();
        for (index, info) in infos.iter().enumerate() {
            assert_eq!(info.error.is_none(), succeeded, "{what}: {infos:?}");
            assert_eq!(info.status, Status::Null, "{what}");
            let member = &mut self.all.members[index];
            member.assert_good_events();
            assert!(!member.machine.is_guest_held(), "{what}: {index} is held");
            // The trigger keeps its own error, the others were cancelled.
            if let Some(error) = &info.error {
                let is_trigger = index == self.victim;
                let is_expected = match (is_trigger, self.trouble) {
                    (true, Trouble::Fail) => matches!(error, JobError::Io { .. }),
                    (true, Trouble::DropMachine) => matches!(error, JobError::Dropped),
                    _ => matches!(error, JobError::Cancelled { .. }),
                };
                assert!(is_expected, "{what}: {index} ended with {error}");
            }
            let is_soft = info.cancel == Some(Cancel::Soft);
            let expected = match succeeded && !is_soft {
                true => On::Target,
                false => On::Source,
            };
            let is_unguided = self.is_unguided && index == self.victim;
            assert!(
                member.guest == expected || is_unguided,
                "{what}: the guest of {index} is on its {:?}",
                member.guest
            );
            if succeeded {
                assert!(member.machine.is_equal(), "{what}");
            }
        }
        Played {
            steps,
            succeeded,
            was_hit: self.hit_at.is_some(),
            backs: self.all.members.iter().map(|member| member.backs).sum(),
        }
    }
}

#[test]
fn every_trouble_at_every_step_ends_all_or_none() {
    for count in [1, 2, 3, 4] {
        let undisturbed = play(count, Trouble::Nothing, 0, 0);
        assert!(undisturbed.succeeded);
        let mut backs = 0;
        for trouble in TROUBLES {
            let (mut hits, mut successes) = (0, 0);
            for victim in (0..count).step_by(1.max(count - 1)) {
                // With many it is the same all over again.
                for at in (0..undisturbed.steps).step_by(if count > 3 { 4 } else { 1 }) {
                    let played = play(count, trouble, victim, at);
                    backs += played.backs;
                    hits += usize::from(played.was_hit);
                    successes += usize::from(played.was_hit && played.succeeded);
                }
            }
            println!("{count} members, {trouble:?}: {hits} hits, {successes} successes");
            match trouble {
                Trouble::Nothing => assert_eq!(hits, 0),
                Trouble::Cancel(Cancel::Force) => {
                    assert_eq!(successes, 0, "accepted, then success");
                }
                Trouble::Pause
                | Trouble::Hold
                | Trouble::FailOnce
                | Trouble::LoseOperations
                | Trouble::Decline
                | Trouble::GuestWrite => assert!(hits > 0 && hits == successes, "{trouble:?}"),
                // Soft while ready succeeds; a machine may be dropped after the vote; and after the last
                // operation nothing is left to fail.
                Trouble::Cancel(Cancel::Soft) | Trouble::DropMachine | Trouble::Fail => {
                    assert!(successes > 0 && successes < hits, "{trouble:?}");
                }
            }
        }
        assert_eq!(backs > 0, count > 1, "who goes back");
    }
}

// Pauses of all kinds

/// What a job must say of its pauses: one of its user, who may be an error, and any number of others.
struct Pauses {
    machine: Machine,
    is_user_paused: bool,
    io_status: IoStatus,
    holds: Vec<Hold>,
    seen_still: usize,
}

impl Pauses {
    fn new(rng: &mut Rng) -> Self {
        let mut options = options();
        options.chunk_max = 4 * KIB;
        options.job.on_target_error = OnError::Stop;
        options.job.auto_finalize = rng.one_in(2);
        let machine = Machine::started(LEN, options);
        Self {
            machine,
            is_user_paused: false,
            io_status: IoStatus::Ok,
            holds: Vec::new(),
            seen_still: 0,
        }
    }

    fn is_paused(&self) -> bool {
        self.is_user_paused || !self.holds.is_empty()
    }

    fn resumed(&mut self) {
        self.is_user_paused = false;
        self.io_status = IoStatus::Ok;
    }

    fn step(&mut self, rng: &mut Rng) {
        let job = self.machine.job.clone();
        let may_pause = job.query().status.allows(Verb::Pause);
        match rng.below(20) {
            0 => {
                let expected = match (may_pause, self.is_user_paused) {
                    (false, _) => None,
                    (true, true) => Some(Err(VerbError::AlreadyPaused)),
                    (true, false) => Some(Ok(())),
                };
                let answer = job.pause();
                match expected {
                    Some(expected) => assert_eq!(answer, expected),
                    None => assert!(matches!(answer, Err(VerbError::NotAllowed { .. }))),
                }
                self.is_user_paused |= answer.is_ok();
            }
            1 | 2 => {
                let answer = job.resume();
                assert_eq!(answer.is_ok(), may_pause && self.is_user_paused);
                if answer.is_ok() {
                    self.resumed();
                }
            }
            3 => self.holds.push(job.hold()),
            4 | 5 => drop(self.holds.pop()),
            6 if !self.machine.is_guest_held() => {
                let at = rng.below(LEN / 512) * 512;
                self.machine.guest_write(at..at + 512, rng.next() as u8);
            }
            7 if rng.one_in(4) => {
                if let Some(index) = self.machine.find(|kind| kind.writes_target()) {
                    let is_full = rng.one_in(2);
                    let kind = match is_full {
                        true => ErrorKind::StorageFull,
                        false => ErrorKind::Other,
                    };
                    self.machine.fail(index, Side::Target, kind);
                    self.is_user_paused |= may_pause;
                    if may_pause && self.io_status == IoStatus::Ok {
                        self.io_status = match is_full {
                            true => IoStatus::NoSpace,
                            false => IoStatus::Failed,
                        };
                    }
                }
            }
            8..14 if !self.machine.out.is_empty() => {
                let index = rng.below(self.machine.out.len() as u64) as usize;
                self.machine.answer(index);
            }
            14 => drop(job.complete()),
            _ => self.ask(),
        }
        self.check();
    }

    /// Has the machine hand out all that it has.
    fn ask(&mut self) {
        let (is_paused, before) = (self.is_paused(), self.machine.asked.len());
        let rest = self.machine.take_all();
        let status = self.machine.job.query().status;
        if is_paused {
            assert_eq!(self.machine.asked.len(), before, "asked while paused");
            assert!(matches!(rest, Rest::Wait(_)), "{rest:?}");
            assert!(!self.machine.is_guest_held());
            if self.machine.out.is_empty() && !status.is_completed() {
                assert!(matches!(status, Status::Paused | Status::Standby));
                self.seen_still += 1;
            }
        }
        if status.is_completed() {
            self.resumed();
        }
        match rest {
            // It is declined, and goes on.
            Rest::Switch(switch) => drop(switch),
            Rest::Wait(Some(until)) => self.machine.now = until,
            Rest::Wait(None) => {}
            rest => panic!("{rest:?}"),
        }
    }

    fn check(&mut self) {
        let info = self.machine.job.query();
        assert_eq!(info.is_user_paused, self.is_user_paused, "{info:?}");
        assert_eq!(info.holds, self.holds.len());
        assert_eq!(info.is_paused, self.is_paused());
        assert_eq!(info.io_status, self.io_status);
        if matches!(info.status, Status::Paused | Status::Standby) {
            assert!(self.machine.out.is_empty(), "{info:?}");
        }
    }
}

#[test]
fn pauses_of_all_kinds_are_counted() {
    let (mut seen_still, mut ready) = (0, 0);
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut pauses = Pauses::new(&mut rng);
        let run = std::panic::AssertUnwindSafe(|| {
            for _ in 0..300 {
                pauses.step(&mut rng);
            }
            // Whoever cancels it, nothing keeps it from its end but what is in flight.
            pauses.machine.job.cancel(Cancel::Force).unwrap();
            assert!(!pauses.machine.job.query().is_user_paused);
            assert!(pauses.machine.drive().done().is_err());
            seen_still += pauses.seen_still;
            let names = pauses.machine.names();
            ready += usize::from(names.iter().any(|name| name == "READY"));
        });
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    assert!(seen_still > 300 && ready > 100, "{seen_still} {ready}");
}

// Errors

#[test]
fn every_policy_on_every_error_of_either_side() {
    for policy in [
        OnError::Report,
        OnError::Ignore,
        OnError::Enospc,
        OnError::Auto,
        OnError::Stop,
    ] {
        for side in [Side::Source, Side::Target] {
            for kind in [ErrorKind::StorageFull, ErrorKind::Other] {
                for was_ready in [false, true] {
                    check_policy(policy, side, kind, was_ready);
                }
            }
        }
    }
}

fn check_policy(policy: OnError, side: Side, kind: ErrorKind, was_ready: bool) {
    let case = format!("{policy:?} of {side}, {kind}, ready before: {was_ready}");
    let mut options = options();
    // That of the other side is never asked.
    (options.job.on_source_error, options.job.on_target_error) = match side {
        Side::Source => (policy, OnError::Report),
        Side::Target | Side::Buffer => (OnError::Report, policy),
    };
    let mut machine = match was_ready {
        true => Machine::ready(LEN, options),
        false => Machine::started(LEN, options),
    };
    if was_ready {
        machine.guest_write(0..LEN, 77);
        machine.now += 100 * MS;
    }
    while machine.find(|kind| kind.writes_target()).is_none() {
        let _ = machine.take_all();
        if machine.find(|kind| kind.writes_target()).is_none() {
            machine.answer_all();
        }
    }
    machine.new_names();
    let index = machine.find(|kind| kind.writes_target()).unwrap();
    machine.fail(index, side, kind);
    machine.answer_all();

    let expected = match (policy, kind) {
        (OnError::Report, _) => ErrorAction::Report,
        (OnError::Ignore, _) => ErrorAction::Ignore,
        (OnError::Stop, _) | (OnError::Enospc | OnError::Auto, ErrorKind::StorageFull) => {
            ErrorAction::Stop
        }
        (OnError::Enospc | OnError::Auto, _) => ErrorAction::Report,
    };
    let Some(Event::Error(event)) = machine.job.next_event() else {
        panic!("{case}: it is told at once");
    };
    assert_eq!((event.side, event.action), (side, expected), "{case}");
    assert_eq!(event.is_no_space, kind == ErrorKind::StorageFull, "{case}");
    assert_eq!(event.error.kind(), kind, "{case}");
    let info = machine.job.query();
    let is_stopped = expected == ErrorAction::Stop;
    assert_eq!(info.is_user_paused, is_stopped, "{case}");
    let io_status = match (is_stopped, event.is_no_space) {
        (false, _) => IoStatus::Ok,
        (true, true) => IoStatus::NoSpace,
        (true, false) => IoStatus::Failed,
    };
    assert_eq!(info.io_status, io_status, "{case}");
    match expected {
        ErrorAction::Report => {
            let error = machine.drive().done().unwrap_err();
            assert!(
                matches!(error, JobError::Io { side: failed, .. } if failed == side),
                "{case}"
            );
            return;
        }
        ErrorAction::Stop => {
            let _ = machine.drive().wait();
            assert!(!machine.is_equal(), "{case}: nothing is tried before");
            machine.job.resume().unwrap();
            assert_eq!(machine.job.query().io_status, IoStatus::Ok, "{case}");
        }
        ErrorAction::Ignore => {}
    }
    let _ = machine.drive().wait();
    assert!(machine.is_equal(), "{case}: nothing is left out");
    assert_eq!(machine.job.query().status, Status::Ready, "{case}");
}

// Queries

/// One drives a job, one asks it for all kinds of things, and one looks: what is told fits together.
#[test]
fn what_is_told_of_a_job_fits_together_under_load() {
    let (send, receive) = std::sync::mpsc::channel();
    let driven = std::thread::spawn(move || {
        let mut options = options();
        options.chunk_max = 4 * KIB;
        options.workers = 2;
        options.job.auto_dismiss = false;
        let mut machine = Machine::started(64 * LEN, options);
        send.send(machine.job.clone()).unwrap();
        loop {
            match machine.take_all() {
                Rest::Done(result) => break result,
                Rest::Switch(switch) => switch.commit(),
                Rest::SwitchBack(_) => unreachable!("it is in no group"),
                Rest::Wait(until) => {
                    machine.now = until.unwrap_or(machine.now + MS);
                    machine.answer_all();
                    std::thread::yield_now();
                }
            }
        }
    });
    let job = receive.recv().unwrap();
    let looks = Arc::new(AtomicUsize::new(0));
    let asking = std::thread::spawn({
        let (job, looks) = (job.clone(), Arc::clone(&looks));
        move || {
            let mut rng = Rng::new(1);
            for _ in 0..2000 {
                match rng.below(6) {
                    0 => drop(job.pause()),
                    1 | 2 => drop(job.resume()),
                    3 => drop(job.hold()),
                    4 => drop(job.set_speed(rng.below(2) << 40)),
                    _ => std::thread::yield_now(),
                }
            }
            let _ = job.resume();
            // However busy the machine is, it is looked at while it works.
            while !job.query().status.is_ready() || looks.load(Ordering::Relaxed) < 100 {
                std::thread::yield_now();
            }
            job.complete().unwrap();
        }
    });
    let (mut last, mut current) = (Status::Created, 0);
    loop {
        let info = job.query();
        looks.fetch_add(1, Ordering::Relaxed);
        let is_paused = info.is_user_paused || info.holds > 0;
        assert_eq!(info.is_paused, is_paused, "{info:?}");
        let progress = info.progress;
        assert!(
            progress.current >= current && progress.total >= progress.current,
            "{info:?}"
        );
        current = progress.current;
        assert!(!(last.is_ready() && info.status == Status::Running));
        if matches!(info.status, Status::Paused | Status::Standby) {
            assert!(!info.is_busy, "{info:?}");
        }
        last = info.status;
        if last == Status::Concluded {
            assert_eq!(progress.current, progress.total);
            assert!(!info.is_busy && info.error.is_none() && !info.is_paused);
            break;
        }
    }
    asking.join().unwrap();
    driven.join().unwrap().unwrap();
}
