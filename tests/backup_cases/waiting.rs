//! Guest writes that wait until what they overwrite is saved.

use super::*;

#[test]
fn a_guest_goes_on_when_its_clusters_are_on_the_target_and_not_before() {
    let mut hand = Hand::started(single(options(BackupSync::Full)));
    let _ = hand.take_all();
    let count = Arc::new(Count::default());
    let mut pending = hand.wait_with(CLUSTER - 1..2 * CLUSTER + 1);
    assert!(hand.woken.take() > 0, "the job is told at once");
    assert!(
        pending
            .poll_begin(&Waker::from(Arc::clone(&count)))
            .is_pending()
    );
    let t0 = hand.source.clone();
    for index in [0, 1, 2] {
        assert!(
            pending.try_begin().is_none(),
            "cluster {index} is not saved"
        );
        let _ = hand.take_all();
        hand.look();
        let copy = hand.find(index * CLUSTER);
        hand.answer(copy);
    }
    assert!(count.take() > 0);
    let ticket = pending.try_begin().expect("all of it is saved").unwrap();
    hand.lands(ticket.range(), 0x66);
    ticket.finish(());
    hand.drive().done().unwrap();
    assert_eq!(hand.target, t0);
}

#[test]
fn a_guest_that_waits_for_a_background_copy_that_fails_has_its_own_try() {
    for policy in [OnError::Ignore, OnError::Stop] {
        for on_cbw_error in [OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite] {
            let mut options = options(BackupSync::Full);
            options.job.on_target_error = policy;
            options.on_cbw_error = on_cbw_error;
            let mut hand = Hand::started(options);
            let _ = hand.take_all();
            hand.look();
            let mut pending = hand.wait_with(0..1);
            let _ = hand.take_all();
            hand.fail(hand.find(0), Side::Target, ErrorKind::Other);
            let _ = hand.take_all();
            assert!(
                hand.is_out(0),
                "it is tried at once, without a delay: {:?}",
                hand.kinds()
            );
            let t0 = hand.source.clone();
            while pending
                .try_begin()
                .is_none_or(|begun| begun.map(|t| t.cancel()).is_err())
            {
                let at = hand.find(0);
                hand.answer(at);
                let _ = hand.take_all();
            }
            hand.write(0..1, 0x55);
            let _ = hand.job.resume();
            hand.drive().done().unwrap();
            assert_eq!(hand.target, t0);
        }
    }
}

#[test]
fn what_a_guest_waits_for_is_copied_beside_all_limits() {
    limits_do_not_hold_up_guests();
    #[cfg(debug_assertions)]
    {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        break_on_this_thread(Some(Sabotage::LimitUrgent));
        let is_noticed = std::panic::catch_unwind(limits_do_not_hold_up_guests).is_err();
        break_on_this_thread(None);
        std::panic::set_hook(hook);
        assert!(is_noticed, "a guest that waits for a worker is not noticed");
    }
}

fn limits_do_not_hold_up_guests() {
    let mut options = single(options(BackupSync::Full));
    options.job.speed = 1;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    // The one worker has the one buffer, and the speed is used up for hours.
    assert!(matches!(hand.kinds()[..], [OpKind::Copy(_)]));
    let mut pending: Vec<Pending> = [1, 2, 3].map(|index| hand.wait_with(cluster(index))).into();
    let _ = hand.take_all();
    hand.look();
    for index in [1, 2, 3] {
        assert!(
            hand.is_out(index * CLUSTER),
            "cluster {index}: {:?}",
            hand.kinds()
        );
        hand.answer(hand.find(index * CLUSTER));
    }
    for pending in &mut pending {
        pending.try_begin().expect("it is saved").unwrap().cancel();
    }
    assert_eq!(hand.now, Duration::ZERO);
    assert!(hand.is_out(0), "the background still has its own");
}

#[test]
fn a_guest_waits_for_no_more_of_a_planned_copy_than_its_clusters() {
    let len = 32 * CLUSTER - 1000;
    let mut options = options(BackupSync::Full);
    options.workers = 2;
    options.chunk_max = MIB;
    options.buf_size = 2 * MIB;
    options.job.speed = 1;
    let mut hand = Hand::on(&Node::new(len), options);
    hand.job.start().unwrap();
    let _ = hand.take_all();
    hand.look();
    // All is looked at; the second half is planned, and waits for the speed limit.
    assert_eq!(hand.kinds(), [OpKind::Copy((0..MIB).into())]);
    let t0 = hand.source.clone();
    let writes = [
        // In the midst, over a boundary, at its start and at its end.
        (21 * CLUSTER + 512..21 * CLUSTER + 1024, 21..22),
        (25 * CLUSTER - 1..25 * CLUSTER + 1, 24..26),
        (16 * CLUSTER..16 * CLUSTER + 512, 16..17),
        (len - 1..len, 31..32),
        // Beside what went out before, and over it.
        (20 * CLUSTER..20 * CLUSTER + 1, 20..21),
        (23 * CLUSTER..27 * CLUSTER, 23..24),
    ];
    let mut pending = Vec::new();
    for (write, clusters) in writes {
        pending.push(hand.wait_with(write));
        let _ = hand.take_all();
        let wanted = clusters.start * CLUSTER..(clusters.end * CLUSTER).min(len);
        let copy = OpKind::Copy(wanted.into());
        assert!(hand.kinds().contains(&copy), "{copy:?}: {:?}", hand.kinds());
    }
    let urgent = hand.out.iter().filter(|out| out.op.is_urgent());
    let urgent: u64 = urgent
        .map(|out| out.op.kind().range().expect("a copy").len())
        .sum();
    assert_eq!(
        urgent,
        8 * CLUSTER - 1000,
        "and nothing beside: {:?}",
        hand.kinds()
    );
    while hand.out.len() > 1 {
        hand.answer(1);
    }
    for pending in &mut pending {
        let ticket = pending.try_begin().expect("it is saved").unwrap();
        hand.lands(ticket.range(), 0x66);
        ticket.finish(());
    }
    assert!(!hand.try_write(22 * CLUSTER..22 * CLUSTER + 1, 0x77));
    hand.drive().done().unwrap();
    assert_eq!(hand.target, t0);
    hand.copied.sort_unstable_by_key(|range| range.start());
    let mut end = 0;
    for range in &hand.copied {
        assert_eq!(range.start(), end, "each byte once: {:?}", hand.copied);
        end = range.end();
    }
    assert_eq!(end, len);
    let progress = hand.job.query().progress;
    assert_eq!((progress.current, progress.total), (len, len));
}

#[test]
fn a_burst_of_guests_comes_through_by_and_by() {
    let len = 200 * CLUSTER;
    let node = Node::new(len);
    let mut hand = Hand::on(&node, options(BackupSync::None));
    hand.job.start().unwrap();
    let _ = hand.take_all();
    let at = |index: u64| ByteRange::from(index * CLUSTER..index * CLUSTER + 1);
    let mut pending: Vec<Pending> = (0..200).map(|index| hand.wait_with(at(index))).collect();
    let _ = hand.take_all();
    assert_eq!(hand.out.len(), 64, "and no more at the same time");
    let _ = hand.drive_now().wait();
    for pending in &mut pending {
        pending.try_begin().expect("it is saved").unwrap().cancel();
    }
    assert_eq!(hand.copied.len(), 200);
}

#[test]
fn a_guest_whose_deadline_has_come_goes_on_and_the_backup_fails() {
    let mut options = options(BackupSync::Full);
    options.cbw_timeout = Some(100 * MS);
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    hand.now = 7 * MS;
    let mut pending = hand.wait_with(0..512);
    let mut other = hand.wait_with(cluster(3));
    assert_eq!(hand.take_all().wait(), Some(107 * MS));
    hand.now = 107 * MS - Duration::from_nanos(1);
    let _ = hand.take_all();
    assert!(pending.try_begin().is_none());
    hand.now = 107 * MS;
    let _ = hand.take_all();
    for pending in [&mut pending, &mut other] {
        pending
            .try_begin()
            .expect("guests go on")
            .unwrap()
            .finish(());
    }
    let result = hand.drive().done();
    let Err(JobError::NotSaved { range, why }) = result else {
        panic!("it is too slow, but {result:?}");
    };
    assert_eq!((range, why), ((0..512).into(), NotSaved::TimedOut));
}

#[test]
fn a_guest_whose_deadline_has_come_is_refused_and_may_try_again() {
    let mut options = options(BackupSync::Full);
    options.cbw_timeout = Some(100 * MS);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    hand.look();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.now = 100 * MS;
    let _ = hand.take_all();
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::TimedOut
    );
    let error = io::Error::from(WriteRefused::NotSaved(NotSaved::TimedOut));
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    // The copy goes on by itself, and once it is there the guest need not wait.
    let mut again = hand.wait_with(0..512);
    assert_eq!(
        hand.take_all().wait(),
        Some(200 * MS),
        "with a deadline of its own"
    );
    hand.answer(hand.find(0));
    again.try_begin().expect("it is saved").unwrap().cancel();
    hand.write(0..512, 0x88);
    hand.drive().done().unwrap();
    assert_eq!(hand.target, t0);
}

#[test]
fn a_guest_for_which_copying_fails_is_refused_and_may_try_again() {
    let mut options = options(BackupSync::None);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.look();
    hand.fail(hand.find(0), Side::Target, ErrorKind::Other);
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::Failed
    );
    assert_eq!(hand.drive_now().wait(), None, "nobody waits any more");
    assert_eq!(hand.job.query().status, Status::Running);
    assert_eq!(hand.errors(), 1);
    let mut again = hand.wait_with(0..512);
    let _ = hand.drive_now();
    again.try_begin().expect("it is saved").unwrap().cancel();
    hand.write(0..512, 0x77);
    assert_eq!(hand.target[bytes(cluster(0))], t0[bytes(cluster(0))]);
}

#[test]
fn a_guest_that_waits_for_one_part_of_a_cluster_is_refused_when_another_part_fails() {
    let node = Node::new(LEN);
    let mut target = Limits::new(LEN);
    target.max_transfer = 16 << 10;
    let mut options = options(BackupSync::None);
    options.on_cbw_error = OnCbwError::BreakGuestWrite;
    options.cbw_timeout = None;
    let mut hand = Hand::with_limits(&node, Limits::new(LEN), target, options);
    hand.job.start().unwrap();
    let _ = hand.take_all();
    let mut pending = hand.wait_with(0..512);
    // The last quarter can never be written: it must not be tried for ever.
    hand.fault = Some(Box::new(|_, kind| match kind {
        OpKind::Copy(range) if range.contains(48 * KIB) => Some((Side::Target, ErrorKind::Other)),
        _ => None,
    }));
    let _ = hand.drive_now().wait();
    assert_eq!(
        not_saved(pending.poll_begin(Waker::noop())),
        NotSaved::Failed
    );
}

#[test]
fn a_guest_for_which_copying_fails_goes_on_and_the_backup_fails() {
    for policy in [OnError::Ignore, OnError::Stop, OnError::Report] {
        let mut options = options(BackupSync::None);
        options.job.on_source_error = policy;
        let mut hand = Hand::started(options);
        let _ = hand.take_all();
        let mut pending = hand.wait_with(0..512);
        let _ = hand.take_all();
        hand.look();
        hand.fail(hand.find(0), Side::Source, ErrorKind::Other);
        let _ = hand.take_all();
        pending
            .try_begin()
            .expect("the guest goes on")
            .unwrap()
            .finish(());
        assert!(
            is_failed(&hand.drive().done(), Side::Source),
            "whatever {policy:?}"
        );
    }
}

#[test]
fn a_guest_that_gives_up_is_forgotten() {
    let mut options = options(BackupSync::None);
    options.cbw_timeout = Some(100 * MS);
    let mut hand = Hand::started(options);
    let _ = hand.take_all();
    let pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    drop(pending);
    hand.now = 200 * MS;
    let _ = hand.drive_now().wait();
    assert_eq!(hand.job.query().status, Status::Running, "nobody was late");
}

#[test]
fn a_guest_let_go_by_one_backup_is_known_to_the_next() {
    let node = Node::new(LEN);
    let mut first = Hand::on(&node, options(BackupSync::None));
    first.job.start().unwrap();
    let _ = first.take_all();
    let mut pending = first.wait_with(0..512);
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    assert!(pending.poll_begin(&waker).is_pending());
    first.backup = None;
    assert!(count.take() > 0);
    // Before it comes by again another backup has begun.
    let mut second = Hand::on(&node, options(BackupSync::None));
    second.job.start().unwrap();
    let _ = second.take_all();
    second.woken.take();
    assert!(pending.poll_begin(&waker).is_pending());
    assert!(second.woken.take() > 0, "it is told");
    let _ = second.drive_now();
    assert!(count.take() > 0);
    pending
        .try_begin()
        .expect("it is saved")
        .unwrap()
        .finish(());
}

#[test]
fn a_driver_that_is_dropped_keeps_guests_waiting_until_another_comes() {
    let mut hand = Hand::started(options(BackupSync::Full));
    let _ = hand.take_all();
    hand.look();
    let t0 = hand.source.clone();
    let mut pending = hand.wait_with(0..512);
    let _ = hand.take_all();
    hand.out.clear();
    hand.backup().ops_lost();
    assert!(pending.try_begin().is_none());
    let _ = hand.take_all();
    assert_eq!(
        hand.kinds(),
        [OpKind::Settle],
        "the lost copy may still land"
    );
    assert!(!hand.is_out(0));
    hand.drive().done().unwrap();
    pending.try_begin().expect("it is saved").unwrap().cancel();
    assert_eq!(hand.target, t0);
}

#[test]
fn writes_of_any_length_and_place_are_dealt_with() {
    let mut hand = Hand::started(options(BackupSync::None));
    let _ = hand.take_all();
    hand.write(0..0, 1);
    hand.write(CLUSTER..CLUSTER, 1);
    hand.write(LEN..LEN, 1);
    // What is past the end of the disk touches no cluster, though it is in the reach of the last one.
    hand.write(4 * CLUSTER..5 * CLUSTER, 1);
    hand.write(u64::MAX - 1..u64::MAX, 1);
    let t0 = hand.source.clone();
    for range in [LEN - 1..LEN + 1, 0..u64::MAX, LEN - 1..LEN, 0..LEN] {
        let mut pending = hand.wait_with(range.clone());
        assert!(pending.try_begin().is_none());
        if range == (0..LEN) {
            let _ = hand.drive_now();
            pending.try_begin().expect("it is saved").unwrap().cancel();
        }
    }
    assert_eq!(hand.target, t0);
    hand.write(0..u64::MAX, 1);
}

#[test]
fn disks_of_odd_lengths_are_copied_to_the_last_byte() {
    for len in [
        0,
        1,
        CLUSTER - 1,
        CLUSTER,
        CLUSTER + 1,
        64 * CLUSTER - 1,
        64 * CLUSTER + 1,
    ] {
        for sync in [BackupSync::Full, BackupSync::Top] {
            let mut hand = Hand::on(&Node::new(len), options(sync));
            hand.job.start().unwrap();
            hand.drive().done().unwrap();
            assert_eq!(hand.target, hand.source);
            assert_eq!(hand.job.query().progress.total, len);
        }
    }
}

#[test]
fn a_clean_bitmap_is_a_backup_of_nothing() {
    let mut hand = Hand::begun(with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess), &[]);
    hand.drive().done().unwrap();
    assert_eq!(hand.copied, []);
    hand.write(0..LEN, 1);
}
