//! Several machines of one group, driven by hand, with the guest of each pointed to where its caller was
//! told to point it.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::time::Duration;

use blockjob::{
    Cancel, Event, JobError, JobGroup, JobInfo, MirrorOptions, Status, Switch, SwitchBack,
};

use crate::machine::{Machine, Rest, is_final, options};

/// The disk that a guest is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    Source,
    Target,
}

pub(crate) struct Together {
    pub(crate) group: JobGroup,
    pub(crate) members: Vec<Member>,
}

pub(crate) struct Member {
    pub(crate) machine: Machine,
    /// Handed out, and neither committed nor dropped.
    pub(crate) switch: Option<Switch>,
    pub(crate) guest: On,
    pub(crate) result: Option<Result<(), JobError>>,
    pub(crate) backs: usize,
    pub(crate) votes: usize,
    /// When it wants to be asked again.
    pub(crate) until: Option<Duration>,
}

impl Together {
    /// Jobs `m0`, `m1` and so on, with options changed by `change`.
    pub(crate) fn new(count: usize, len: u64, change: impl Fn(usize, &mut MirrorOptions)) -> Self {
        let group = JobGroup::new();
        let members = (0..count).map(|index| {
            let mut options = options();
            options.job.id = Some(format!("m{index}"));
            options.job.group = Some(group.clone());
            change(index, &mut options);
            Member::new(Machine::new(len, options))
        });
        Self {
            members: members.collect(),
            group,
        }
    }

    /// The same, all in step.
    pub(crate) fn ready(
        count: usize,
        len: u64,
        change: impl Fn(usize, &mut MirrorOptions),
    ) -> Self {
        let mut all = Self::new(count, len, change);
        for member in &mut all.members {
            member.machine.job.start().unwrap();
            let _ = member.machine.drive().wait();
        }
        all.assert_statuses(Status::Ready);
        all
    }

    pub(crate) fn complete(&self) {
        for member in &self.members {
            member.machine.job.complete().unwrap();
        }
    }

    /// Drives all until none gets on, without any time passing. Switches are kept, a guest that is to go
    /// back is pointed back.
    pub(crate) fn run(&mut self) {
        loop {
            let mut gets_on = false;
            for member in &mut self.members {
                gets_on |= member.run();
            }
            if !gets_on {
                return;
            }
        }
    }

    /// As [`run`](Self::run), and lets time pass, but not past the bound of a hold.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.members[0].machine.now + time;
        loop {
            self.run();
            let times = self.members.iter().filter_map(|member| member.until);
            let Some(next) = times.min().filter(|&next| next <= end) else {
                break;
            };
            for member in &mut self.members {
                member.machine.now = next;
                member.machine.woken.wake_once();
            }
        }
        for member in &mut self.members {
            member.machine.now = end;
            member.machine.woken.wake_once();
        }
        self.run();
    }

    /// Drives two machines until the first one hands out its switch, and not the other any more. Who has
    /// it, and who does not.
    pub(crate) fn run_to_first_switch(&mut self) -> (usize, usize) {
        for turn in 0..100 {
            let index = turn % 2;
            self.members[index].run_alone();
            if self.members[index].switch.is_some() {
                return (index, 1 - index);
            }
        }
        panic!("no switch: {:?}", self.statuses());
    }

    /// Points the guest of each to its target and commits.
    pub(crate) fn commit(&mut self) {
        for member in &mut self.members {
            member.commit();
        }
    }

    pub(crate) fn info(&self, index: usize) -> JobInfo {
        self.members[index].machine.job.query()
    }

    pub(crate) fn statuses(&self) -> Vec<Status> {
        let infos = self.members.iter().map(|member| member.machine.job.query());
        infos.map(|info| info.status).collect()
    }

    pub(crate) fn assert_statuses(&self, status: Status) {
        assert!(
            self.statuses().iter().all(|&other| other == status),
            "{:?}, not all {status}",
            self.statuses()
        );
    }

    pub(crate) fn held(&self) -> Vec<bool> {
        let members = self.members.iter();
        members
            .map(|member| member.machine.is_guest_held())
            .collect()
    }

    /// All members succeeded with their guests on the targets, or none did and all are on the sources.
    pub(crate) fn assert_all_or_none(&self) {
        let results = self.members.iter().map(|member| {
            let result = member.result.as_ref().expect("it is over");
            (result.is_ok(), member.guest == On::Target)
        });
        let results: Vec<(bool, bool)> = results.collect();
        assert!(
            results.iter().all(|&result| result == results[0]),
            "(succeeded, switched): {results:?}"
        );
        assert_eq!(results[0].0, results[0].1, "{results:?}");
    }
}

impl Member {
    pub(crate) fn new(machine: Machine) -> Self {
        machine.woken.wake_once();
        Self {
            machine,
            switch: None,
            guest: On::Source,
            result: None,
            backs: 0,
            votes: 0,
            until: None,
        }
    }

    /// Whether it got on.
    fn run(&mut self) -> bool {
        if self.result.is_some() || !self.machine.has_mirror() || self.machine.woken.take() == 0 {
            return false;
        }
        let rest = self.machine.drive_now();
        self.take(rest);
        true
    }

    /// Drives it until it rests, whether it was woken or not, and nobody else.
    pub(crate) fn run_alone(&mut self) {
        self.machine.woken.take();
        if self.result.is_none() && self.switch.is_none() {
            let rest = self.machine.drive_now();
            self.take(rest);
        }
    }

    pub(crate) fn take(&mut self, rest: Rest) {
        self.until = None;
        match rest {
            Rest::Wait(until) => self.until = until,
            Rest::Switch(switch) => {
                assert!(self.machine.is_equal(), "handed out with something left");
                assert!(self.machine.is_guest_held());
                self.switch = Some(switch);
            }
            Rest::SwitchBack(back) => self.point_back(back),
            Rest::Done(result) => self.done(result),
        }
    }

    pub(crate) fn commit(&mut self) {
        if let Some(switch) = self.switch.take() {
            self.guest = On::Target;
            self.votes += 1;
            switch.commit();
        }
    }

    fn point_back(&mut self, back: SwitchBack) {
        assert_eq!(self.guest, On::Target, "only who has gone over goes back");
        assert!(self.machine.is_guest_held(), "until it is pointed back");
        self.guest = On::Source;
        self.backs += 1;
        drop(back);
        // There is more to do at once.
        self.machine.woken.wake_once();
    }

    fn done(&mut self, result: Result<(), JobError>) {
        self.result = Some(result);
        assert!(!self.machine.is_guest_held(), "over, and the guest is held");
    }

    /// The events are in a legal order, with one end, which tells what came of it.
    pub(crate) fn assert_good_events(&mut self) {
        let is_good = match &self.result {
            Some(result) => result.is_ok(),
            None => self.machine.job.query().error.is_none(),
        };
        let events = self.machine.events();
        let mut status = None;
        for event in events {
            if let Event::Status(next) = event {
                let is_legal = match status {
                    None => *next == Status::Created,
                    Some(status) => Status::may_become(status, *next),
                };
                assert!(is_legal, "{status:?} → {next:?}");
                status = Some(*next);
            }
        }
        let was_started = events
            .iter()
            .any(|event| matches!(event, Event::Status(Status::Running)));
        let finals: Vec<&Event> = events.iter().filter(|event| is_final(event)).collect();
        assert_eq!(finals.len(), usize::from(was_started), "{events:?}");
        for last in finals {
            match last {
                Event::Completed { error, .. } => assert_eq!(error.is_none(), is_good),
                _ => assert!(!is_good),
            }
        }
    }
}

/// Whether it was cancelled with its group, without an error of its own.
pub(crate) fn is_cancelled(info: &JobInfo) -> bool {
    info.cancel == Some(Cancel::Force) && matches!(info.error, Some(JobError::Cancelled { .. }))
}
