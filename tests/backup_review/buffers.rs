//! A local buffer for what guests are about to overwrite.

use super::*;

#[test]
fn what_is_saved_is_cut_as_all_three_devices_take_it() {
    let len = 32 * CLUSTER;
    for side in [Side::Source, Side::Target, Side::Buffer] {
        let mut rig = Rig::started(len, |parts| {
            let mut place = buffer(len);
            let limits = match side {
                Side::Source => &mut parts.source,
                Side::Target => &mut parts.target,
                Side::Buffer => &mut place.limits,
            };
            limits.max_transfer = 2 * CLUSTER as u32;
            parts.options.buffer = Some(place);
            parts.options.workers = 1;
        });
        rig.until();
        let _guest = rig.write((16 * CLUSTER..32 * CLUSTER).into());
        rig.done().unwrap();
        for kind in &rig.asked {
            let (OpKind::Save(range) | OpKind::CopySaved(range)) = kind else {
                continue;
            };
            assert!(range.len() <= 2 * CLUSTER, "{side}: {kind:?}");
        }
        let is_saved = |kind: &OpKind| matches!(kind, OpKind::CopySaved(_));
        assert!(rig.asked.iter().any(is_saved));
    }
}

#[test]
fn what_is_saved_fits_the_smallest_buffer_size_also_behind_a_hole() {
    let len = 64 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        parts.target.write_zeroes = all_discards();
        parts.options.buffer = Some(buffer(len));
        parts.options.buf_size = 1;
        parts.options.workers = 1;
    });
    let mut guest = None;
    for turn in 0..6 {
        let _ = rig.rest();
        if turn == 5 {
            guest = Some(rig.write((40 * CLUSTER..56 * CLUSTER).into()));
            let _ = rig.rest();
            rig.answer(|kind| matches!(kind, OpKind::Save(_)), None);
        }
        let is_status = |kind| matches!(kind, OpKind::Status(_));
        let hole = Extent {
            len,
            content: Content::Zero,
            in_top: true,
        };
        rig.answer(is_status, Some(Outcome::Status(hole)));
        let _ = rig.answer_all(|kind| matches!(kind, OpKind::Zero(..) | OpKind::Save(_)));
    }
    rig.done().unwrap();
    drop(guest);
}

#[test]
fn a_buffer_is_refused_if_a_cluster_does_not_fit_the_devices() {
    let len = 4 * CLUSTER;
    let mut parts = parts(len);
    parts.target.max_transfer = 4096;
    parts.options.buffer = Some(buffer(len));
    let error = Backup::new(&Node::new(len), parts.source, parts.target, parts.options);
    let unfit = BackupError::BufferUnfit {
        cluster: CLUSTER,
        align: 1,
        max_transfer: 4096,
    };
    assert_eq!(error.err(), Some(unfit));
}

#[test]
fn every_write_that_finds_the_buffer_full_is_refused_at_once() {
    let len = 16 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        let mut place = buffer(len);
        place.bytes_max = CLUSTER;
        place.on_full = OnBufferFull::Break;
        parts.options.buffer = Some(place);
        parts.options.on_cbw_error = OnCbwError::BreakGuestWrite;
        parts.options.workers = 1;
        parts.options.chunk_max = CLUSTER;
    });
    rig.until();
    let mut first = rig.write(cluster(10));
    let is_save = |kind: OpKind| matches!(kind, OpKind::Save(_));
    let _ = rig.rest();
    rig.answer(is_save, None);
    assert!(matches!(first.try_begin(), Some(Ok(_))));
    let mut late: Vec<_> = (11..14).map(|index| rig.write(cluster(index))).collect();
    rig.until();
    for pending in &mut late {
        assert_eq!(not_saved(pending), Some(NotSaved::Full));
    }
}

#[test]
fn what_was_saved_is_compressed_as_well() {
    let len = 8 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        parts.options.buffer = Some(buffer(len));
        parts.options.compress = true;
        parts.target.compresses = true;
        parts.options.workers = 1;
    });
    rig.until();
    let _guest = rig.write((4 * CLUSTER..8 * CLUSTER).into());
    rig.done().unwrap();
    let is_saved = |kind: &OpKind| matches!(kind, OpKind::CopySavedCompressed(_));
    assert!(rig.asked.iter().any(is_saved));
    let is_plain = |kind: &OpKind| matches!(kind, OpKind::Copy(_) | OpKind::CopySaved(_));
    assert!(!rig.asked.iter().any(is_plain), "{:?}", rig.asked);
}

#[test]
fn a_write_to_a_large_area_is_not_looked_through_again_for_each_piece() {
    let len = 16 << 30;
    let mut rig = Rig::started(len, |parts| {
        parts.options.buffer = Some(buffer(len));
        parts.options.cbw_timeout = None;
    });
    rig.until();
    let mut guest = rig.write((0..len).into());
    rig.backup.job().pause().unwrap();
    let (all_done, is_done) = mpsc::channel();
    let watchdog = std::thread::spawn(move || is_done.recv_timeout(10 * SECOND));
    let mut saved = 0;
    loop {
        match rig.backup.poll(rig.now, Waker::noop()) {
            Step::Op(op) => {
                if let OpKind::Save(range) = op.kind() {
                    saved += range.len();
                }
                rig.backup.op_done(rig.now, op, Outcome::Done);
            }
            Step::Wait { .. } => break,
            step => panic!("waits, but {step:?}"),
        }
        // It takes a part of a second; minutes, were all of it looked through each time.
        assert!(!watchdog.is_finished(), "after {saved} bytes");
    }
    assert!(
        matches!(guest.try_begin(), Some(Ok(_))),
        "{saved} bytes are saved"
    );
    all_done.send(()).unwrap();
    watchdog.join().unwrap().unwrap();
}

#[test]
fn a_buffer_is_asked_to_discard_only_what_it_can() {
    let len = 16 * CLUSTER;
    let is_discard = |kind: &OpKind| matches!(kind, OpKind::DiscardSaved(_));
    for (align, max, pieces) in [(1, CLUSTER, 8), (2 * CLUSTER as u32, u64::MAX, 0)] {
        let mut rig = Rig::started(len, |parts| {
            let mut place = buffer(len);
            place.limits.discard = Some(RangeLimits { align, max });
            parts.options.buffer = Some(place);
            parts.options.workers = 1;
        });
        rig.until();
        let _guest = rig.write((8 * CLUSTER..16 * CLUSTER).into());
        rig.done().unwrap();
        let discards: Vec<_> = rig.asked.iter().copied().filter(is_discard).collect();
        assert_eq!(discards.len(), pieces, "{discards:?}");
    }
}

#[test]
fn what_was_lost_on_its_way_to_the_buffer_is_not_left_there() {
    let len = 16 * CLUSTER;
    for is_lost in [true, false] {
        let mut rig = Rig::started(len, |parts| {
            parts.options.buffer = Some(buffer(len));
        });
        rig.until();
        let guest = rig.write(cluster(12));
        let _ = rig.rest();
        let is_save = |kind: OpKind| kind == OpKind::Save(cluster(12));
        if is_lost {
            assert!(rig.has_out(is_save));
            rig.out.clear();
            rig.backup.ops_lost();
            // It may still land, so it is waited for before the last is discarded.
            let is_settle = |kind: OpKind| kind == OpKind::SettleSaved;
            let step = rig.answer_all(|kind| !is_settle(kind));
            assert!(matches!(step, Step::Wait { .. }), "{step:?}");
            rig.answer(is_settle, failed(Side::Buffer));
            rig.now = rig.until().expect("it is asked again");
            let step = rig.answer_all(|kind| !is_settle(kind));
            assert!(matches!(step, Step::Wait { .. }), "{step:?}");
            rig.answer(is_settle, None);
        } else {
            rig.answer(is_save, failed(Side::Buffer));
        }
        drop(guest);
        rig.done().unwrap();
        let discard = OpKind::DiscardSaved(cluster(12));
        assert!(rig.asked.contains(&discard), "{:?}", rig.asked);
        assert_eq!(rig.backup.buffer_bytes().0, 0);
    }
}

/// A backup with an empty buffer that all writes fall into, and nothing that is copied in the background.
fn with_empty_buffer(on_full: OnBufferFull) -> Rig {
    let len = 16 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        let mut place = buffer(len);
        place.on_full = on_full;
        parts.options.buffer = Some(place);
        parts.options.on_cbw_error = OnCbwError::BreakGuestWrite;
        parts.options.workers = 1;
        parts.options.chunk_max = CLUSTER;
    });
    rig.until();
    rig
}

#[test]
fn a_buffer_that_fails_is_told_of_as_such_and_tried_again_later() {
    let mut rig = with_empty_buffer(OnBufferFull::Break);
    let is_save = |kind: OpKind| matches!(kind, OpKind::Save(_));
    let mut first = rig.write(cluster(12));
    let _ = rig.rest();
    rig.answer(is_save, failed(Side::Buffer));
    rig.until();
    assert_eq!(not_saved(&mut first), Some(NotSaved::Failed), "not full");
    let mut events = std::iter::from_fn(|| rig.backup.job().next_event());
    assert!(events.any(|event| matches!(event, Event::Error(error) if error.side == Side::Buffer)));
    let mut second = rig.write(cluster(13));
    rig.until();
    assert_eq!(not_saved(&mut second), Some(NotSaved::Failed));
    rig.now += SECOND;
    let mut third = rig.write(cluster(14));
    let _ = rig.rest();
    rig.answer(|kind| kind == OpKind::Save(cluster(14)), None);
    assert!(matches!(third.try_begin(), Some(Ok(_))));
}

#[test]
fn a_guest_that_waits_for_a_hanging_target_is_saved_once_the_buffer_has_recovered() {
    for kind in [std::io::ErrorKind::Other, std::io::ErrorKind::StorageFull] {
        let mut rig = with_empty_buffer(OnBufferFull::Wait);
        let mut guest = rig.write(cluster(12));
        let _ = rig.rest();
        let is_save = |kind: OpKind| matches!(kind, OpKind::Save(_));
        let (side, error) = (Side::Buffer, kind.into());
        rig.answer(is_save, Some(Outcome::Failed { side, error }));
        let again = rig.until().expect("not for ever");
        assert!(!rig.has_out(is_save), "at once");
        assert!(again < SECOND, "before the guest is given up");
        rig.now = again;
        rig.until();
        rig.answer(is_save, None);
        assert!(matches!(guest.try_begin(), Some(Ok(_))), "{kind:?}");
    }
}

#[test]
fn a_buffer_without_room_for_a_cluster_is_refused() {
    let len = 4 * CLUSTER;
    for bytes_max in [0, CLUSTER - 1] {
        let mut parts = parts(len);
        let mut place = buffer(len);
        place.bytes_max = bytes_max;
        parts.options.buffer = Some(place);
        let error = Backup::new(&Node::new(len), parts.source, parts.target, parts.options);
        let cluster = CLUSTER;
        let too_small = BackupError::BufferTooSmall { bytes_max, cluster };
        assert_eq!(error.err(), Some(too_small));
    }
}

#[test]
fn what_is_in_the_buffer_goes_before_what_is_planned() {
    let len = 64 * CLUSTER;
    let mut rig = Rig::started(len, |parts| {
        parts.options.buffer = Some(buffer(len));
        parts.options.workers = 4;
        parts.options.chunk_max = CLUSTER;
    });
    rig.until();
    // Each answer plans four copies.
    let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
    let _guest = rig.write(cluster(50));
    let _ = rig.rest();
    rig.answer(|kind| kind == OpKind::Save(cluster(50)), None);
    rig.answer(|kind| matches!(kind, OpKind::Copy(_)), None);
    rig.until();
    assert!(rig.has_out(|kind| kind == OpKind::CopySaved(cluster(50))));
    rig.done().unwrap();
}
