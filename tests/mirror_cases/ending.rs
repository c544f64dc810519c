//! How a mirror comes to its end, and whom it wakes and holds until then.

use std::task::{Poll, Waker};
use std::time::Duration;

use blockjob::{Begin, Cancel, Event, OpKind, Status};

use crate::machine::{KIB, MS, Machine, Rest, is_final, options};
use crate::{LEN, complete, single};

// Convergence

#[test]
fn ready_is_reached_while_the_guest_writes_now_and_then() {
    let mut options = single();
    options.workers = 2;
    let mut machine = Machine::started(LEN, options);
    for turn in 0..1000u64 {
        let _ = machine.take_all();
        if machine.job.query().status == Status::Ready {
            let _ = machine.drive().wait();
            assert!(machine.is_equal());
            return;
        }
        if turn % 7 == 0 {
            machine.guest_write((turn * 577) % LEN..(turn * 577) % LEN + 1, turn as u8);
        }
        machine.answer(0);
        machine.now += MS;
    }
    panic!("not ready: {:?}", machine.job.query());
}

#[test]
fn complete_comes_to_an_end_while_the_guest_never_ceases_to_write() {
    let mut machine = Machine::ready(LEN, single());
    machine.guest_write(0..1, 0xfe);
    machine.now += 100 * MS;
    let _ = machine.drive().wait();
    machine.job.complete().unwrap();
    // A copy ends during each flush, so there is always something that was not flushed yet.
    for turn in 0..1000u64 {
        if machine.is_guest_held() {
            machine.drive().switch().commit();
            machine.drive().done().unwrap();
            assert!(machine.is_equal());
            return;
        }
        machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
        machine.now += MS;
        let _ = machine.take_all();
        // What was handed out last is answered first, and a flush takes three times as long.
        while let Some(index) = machine.find(|kind| kind != OpKind::Flush) {
            machine.answer(index);
            let _ = machine.take_all();
        }
        if turn % 3 == 2 {
            machine.answer_all();
        }
    }
    panic!("no end: {:?}", machine.job.query());
}

#[test]
fn the_guest_is_not_held_while_more_is_left_than_can_be_copied_in_time() {
    // 4 KiB per 10 ms are seen, so 20 ms are good for 8 KiB.
    let mut options = single();
    options.workers = 1;
    options.downtime_max = 20 * MS;
    let mut machine = Machine::started(LEN, options);
    while machine.job.query().status != Status::Ready {
        let rest = machine.take_all();
        if machine.out.is_empty() {
            let _ = rest.wait();
            machine.now += 10 * MS;
        }
        while !machine.out.is_empty() {
            if matches!(machine.kinds()[0], OpKind::Copy(_)) {
                machine.now += 10 * MS;
            }
            machine.answer(0);
        }
    }
    machine.guest_write(0..LEN, 1);
    machine.job.complete().unwrap();
    let switch = loop {
        let left = LEN - (machine.copied - LEN);
        let rest = machine.take_all();
        if machine.is_guest_held() {
            assert!(left <= 8 * KIB, "held with {left} bytes left");
            break match rest {
                Rest::Switch(switch) => switch,
                _ => machine.drive().switch(),
            };
        }
        machine.now += 10 * MS;
        machine.answer(0);
    };
    switch.commit();
    machine.drive().done().unwrap();
    assert!(machine.is_equal());
}

// The end

#[test]
fn the_matrix_of_cancels() {
    for how in [Cancel::Soft, Cancel::Force] {
        for is_ready in [false, true] {
            let mut machine = Machine::started(LEN, options());
            if is_ready {
                let _ = machine.drive().wait();
                machine.guest_write(0..5000, 0x31);
            } else {
                let _ = machine.take_all();
            }
            machine.job.cancel(how).unwrap();
            let result = machine.drive().done();
            let is_orderly = is_ready && how == Cancel::Soft;
            assert_eq!(result.is_ok(), is_orderly);
            assert!(!machine.is_guest_held());
            if is_orderly {
                assert!(machine.is_equal() && !machine.is_unflushed);
            }
            let last = machine.events().iter().find(|event| is_final(event));
            let is_cancelled = matches!(last, Some(Event::Cancelled { .. }));
            assert_eq!(is_cancelled, !is_orderly);
            // The guest goes on, and nobody records it.
            machine.guest_write(0..1, 1);
        }
    }
}

#[test]
fn a_guest_write_that_waits_at_the_gate_lands_on_the_new_disk_only() {
    let mut machine = Machine::ready(LEN, options());
    machine.job.complete().unwrap();
    let switch = machine.drive().switch();
    let node = machine.node.clone();
    let Begin::Wait(mut pending) = node.begin_write((0..1).into()) else {
        panic!("the guest is held");
    };
    assert!(pending.try_begin().is_none());
    assert!(pending.poll_begin(&machine.waker()).is_pending());
    machine.woken.take();
    let old = machine.source.clone();
    assert!(machine.is_equal());
    switch.commit();
    assert!(machine.woken.take() > 0, "who waits is woken");
    let Poll::Ready(Ok(ticket)) = pending.poll_begin(Waker::noop()) else {
        panic!("the guest goes on");
    };
    machine.target[0] = 0xf1;
    ticket.finish(());
    let count = machine.asked.len();
    machine.drive().done().unwrap();
    assert_eq!(machine.asked.len(), count, "nothing is copied over it");
    assert_eq!((machine.target[0], machine.source), (0xf1, old));
}

#[test]
fn a_guest_write_before_the_last_look_is_on_the_target_at_the_switch() {
    let mut machine = Machine::ready(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..4096).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.take_all();
    machine.answer_all();
    let _ = machine.take_all().wait();
    assert!(machine.is_guest_held(), "it waits for the write");
    let _ = machine.take_all().wait();
    machine.guest_lands(0..4096, 0x61);
    machine.woken.take();
    ticket.finish(());
    assert!(machine.woken.take() > 0);
    let switch = machine.drive().switch();
    assert!(machine.is_equal());
    switch.commit();
    machine.drive().done().unwrap();
}

#[test]
fn a_switch_that_is_dropped_leaves_the_guest_on_the_source() {
    let mut machine = Machine::ready(LEN, options());
    for round in 0..3 {
        machine.job.complete().unwrap();
        let switch = machine.drive().switch();
        assert!(machine.is_guest_held() && machine.is_equal());
        machine.woken.take();
        drop(switch);
        assert!(machine.woken.take() > 0, "the machine goes on");
        machine.guest_write(round * 100..round * 100 + 50, round as u8 + 100);
        let _ = machine.drive().wait();
        assert_eq!(machine.job.query().status, Status::Ready);
        assert!(machine.is_equal());
    }
    complete(&mut machine);
}

#[test]
fn a_pause_lets_a_held_guest_go() {
    let mut machine = Machine::ready(LEN, options());
    let node = machine.node.clone();
    let ticket = node.begin_write((0..1).into()).go().unwrap();
    machine.job.complete().unwrap();
    let _ = machine.drive_now();
    assert!(machine.is_guest_held());
    machine.job.pause().unwrap();
    let _ = machine.drive();
    assert!(!machine.is_guest_held());
    assert_eq!(machine.job.query().status, Status::Standby);
    ticket.finish(());
    machine.job.resume().unwrap();
    machine.drive().switch().commit();
    machine.drive().done().unwrap();
}

// Waking and batching

#[test]
fn a_guest_write_wakes_the_job_and_those_that_follow_are_batched() {
    let mut options = single();
    options.job.auto_finalize = false;
    for is_pending in [false, true] {
        let mut machine = Machine::ready(LEN, options.clone());
        if is_pending {
            machine.job.complete().unwrap();
            let _ = machine.drive().wait();
            assert_eq!(machine.job.query().status, Status::Pending);
        }
        machine.now += Duration::from_secs(1);
        let start = machine.now;
        let mut wakes = 0;
        machine.woken.take();
        // A write each 100 µs for 100 ms, with the machine asked whenever it wants to be.
        let mut due = None;
        for turn in 0..1000u64 {
            machine.now = start + Duration::from_micros(turn * 100);
            machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
            if machine.woken.take() > 0 || due.is_some_and(|due| due <= machine.now) {
                wakes += 1;
                let now = machine.now;
                due = machine.drive_until(now).wait();
            }
        }
        assert!((5..=21).contains(&wakes), "{wakes} wake-ups in 100 ms");
        let _ = machine.drive().wait();
        assert!(machine.is_equal());
    }
}

#[test]
fn a_job_with_nothing_to_do_sleeps_until_it_is_woken() {
    let mut machine = Machine::ready(LEN, options());
    machine.now += Duration::from_secs(10);
    assert_eq!(machine.take_all().wait(), None);
    assert_eq!(machine.woken.take(), 0);
    machine.now += Duration::from_secs(10);
    machine.guest_write(0..1, 5);
    assert!(machine.woken.take() > 0);
}
