//! What is copied, in what pieces and in what order.

use std::io::ErrorKind;

use blockjob::{Content, Granularity, Limits, MirrorSync, OpKind, RangeLimits, Side, Status};

use crate::machine::{KIB, MIB, MS, Machine, options};
use crate::{LEN, complete, is_status, single, zeroing};

// Zero areas

#[test]
fn what_is_not_aligned_to_the_target_goes_as_data() {
    for align in [4 * KIB, 16 * KIB] {
        let target = zeroing(LEN, align as u32, false);
        let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
        machine.lay(3 * KIB..60 * KIB + 512, Content::Zero, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        assert!(machine.is_equal());
        let mut zeroed = 0;
        for kind in &machine.asked {
            if let OpKind::Zero(range, _) = kind {
                assert_eq!((range.start() % align, range.end() % align), (0, 0));
                zeroed += range.len();
            }
        }
        let inner = 60 * KIB / align * align - (3 * KIB).next_multiple_of(align);
        assert_eq!(zeroed, inner);
    }
}

#[test]
fn what_is_undefined_is_discarded_or_made_zero() {
    for can_discard in [true, false] {
        let mut target = zeroing(LEN, 4096, false);
        if can_discard {
            target.discard = Some(RangeLimits {
                align: 8192,
                max: 1 << 30,
            });
        }
        let mut machine = Machine::with_limits(Limits::new(LEN), target, options());
        machine.lay(4 * KIB..LEN / 2, Content::Undefined, true);
        machine.job.start().unwrap();
        let _ = machine.drive().wait();
        let discards = machine
            .asked
            .iter()
            .filter(|kind| matches!(kind, OpKind::Discard(_)))
            .count();
        assert_eq!(discards > 0, can_discard);
        assert_eq!(machine.target[..4096], machine.source[..4096]);
        assert_eq!(machine.target[32768..], machine.source[32768..]);
        // A guest write there is copied like any other.
        machine.guest_write(9 * KIB..10 * KIB, 0x66);
        complete(&mut machine);
        assert_eq!(machine.target[9216..10240], machine.source[9216..10240]);
    }
}

#[test]
fn a_look_that_fails_is_taken_for_data() {
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, false), options());
    machine.lay(0..LEN, Content::Zero, true);
    machine.fault = Some(Box::new(|_, kind| {
        is_status(kind).then_some((Side::Source, ErrorKind::Other))
    }));
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(machine.copied, LEN);
    assert!(!machine.names().contains(&"ERROR".to_owned()));
}

// Order of clearing, looking, reading, writing

#[test]
fn a_guest_write_after_the_read_is_copied_again() {
    let mut machine = Machine::started(LEN, single());
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let copy = machine.find_copy(0);
    machine.read(copy);
    machine.guest_write(10..20, 0xfe);
    let _ = machine.take_all();
    assert_eq!(
        machine
            .kinds()
            .iter()
            .filter(
                |kind| kind.writes_target() && kind.range().is_some_and(|range| range.contains(0))
            )
            .count(),
        1,
        "not while the first copy is out"
    );
    machine.answer(copy);
    assert_ne!(machine.target[10], 0xfe, "what was read is older");
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
    assert_eq!(machine.copied, LEN + 4096);
}

#[test]
fn a_guest_write_between_look_and_copy_is_copied() {
    // What read as zeroes when it was looked at is written before the zeroes are.
    let mut machine = Machine::with_limits(Limits::new(LEN), zeroing(LEN, 1, false), single());
    machine.lay(0..LEN, Content::Zero, true);
    machine.job.start().unwrap();
    let _ = machine.take_all();
    machine.answer(0);
    machine.guest_write(0..512, 0x12);
    let _ = machine.drive().wait();
    assert!(machine.is_equal());
}

#[test]
fn a_range_is_never_written_twice_at_the_same_time() {
    // The harness compares all that is out; here a range is dirtied again and again meanwhile.
    let mut machine = Machine::started(LEN, single());
    for turn in 0..200u64 {
        let _ = machine.take_all();
        machine.guest_write((turn * 4096) % LEN..(turn * 4096) % LEN + 1, turn as u8);
        if !machine.out.is_empty() {
            let last = machine.out.len() - 1;
            machine.answer(last);
        }
    }
    complete(&mut machine);
    assert!(machine.is_equal());
}

// Clusters

#[test]
fn two_dirty_chunks_of_one_cluster_and_a_slow_first_write() {
    let len = 2 * MIB;
    let mut target = Limits::new(len);
    target.cluster = Some(MIB as u32);
    target.fills_clusters = true;
    let mut options = options();
    options.granularity = Granularity::from_bytes(64 * KIB);
    options.sync = MirrorSync::None;
    let mut machine = Machine::with_limits(Limits::new(len), target, options);
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    machine.target.fill(0);
    machine.source.fill(0);
    machine.guest_write(0..100, 1);
    machine.now += 100 * MS;
    let _ = machine.take_all();
    machine.answer(0);
    let _ = machine.take_all();
    let first = machine.find_copy(0);
    assert_eq!(
        machine.kinds()[first],
        OpKind::Copy((0..MIB).into()),
        "the first write covers the cluster"
    );
    machine.read(first);
    // Meanwhile the guest writes to another chunk of the cluster, and again to the same.
    machine.guest_write(512 * KIB..512 * KIB + 10, 2);
    machine.guest_write(0..50, 3);
    machine.now += 100 * MS;
    let _ = machine.take_all();
    assert_eq!(machine.out.len(), 1, "the cluster is taken");
    machine.answer(0);
    complete(&mut machine);
    assert!(machine.is_equal());
    let pieces: Vec<_> = machine
        .asked
        .iter()
        .filter_map(|kind| match kind {
            OpKind::Copy(range) => Some(range.len()),
            _ => None,
        })
        .collect();
    assert_eq!(
        pieces,
        [MIB, 64 * KIB, 64 * KIB],
        "later writes need not cover it"
    );
}

#[test]
fn the_last_cluster_may_be_short() {
    let len = MIB + 70_001;
    let mut target = Limits::new(len);
    target.cluster = Some(MIB as u32);
    target.fills_clusters = true;
    let mut options = options();
    options.sync = MirrorSync::None;
    let mut machine = Machine::with_limits(Limits::new(len), target, options);
    machine.target.copy_from_slice(&machine.source.clone());
    machine.job.start().unwrap();
    let _ = machine.drive().wait();
    machine.guest_write(len - 1..len, 9);
    machine.guest_write(MIB - 1..MIB, 9);
    complete(&mut machine);
    assert!(machine.is_equal());
}

// Sizes

#[test]
fn odd_sizes_are_copied_to_the_last_byte() {
    let sizes = [
        0, 1, 511, 512, 513, 4095, 4096, 4097, 65_535, 65_536, 65_537, 100_001,
    ];
    for len in sizes {
        for (source_align, target_align) in [(1, 1), (512, 4096), (4096, 1)] {
            let mut source = Limits::new(len);
            source.request_align = source_align;
            let mut target = zeroing(len, 4096, len % 2 == 0);
            target.request_align = target_align;
            let mut machine = Machine::with_limits(source, target, single());
            machine.lay(0..len / 3 / 512 * 512, Content::Zero, true);
            machine.job.start().unwrap();
            let _ = machine.drive().wait();
            assert!(machine.is_equal(), "{len}");
            if len > 0 {
                machine.guest_write(len - 1..len, 0xf0);
                machine.guest_write(0..1, 0xf0);
            }
            complete(&mut machine);
            assert!(machine.is_equal(), "{len}");
            let progress = machine.job.query().progress;
            assert_eq!(progress.current, progress.total);
            let align = u64::from(source_align.max(target_align));
            for kind in &machine.asked {
                if let OpKind::Copy(range) = kind {
                    assert_eq!(range.start() % align, 0);
                    assert!(range.end() % align == 0 || range.end() == len);
                }
            }
        }
    }
}

// Limits on what is out

#[test]
fn neither_buffers_nor_operations_go_beyond_their_limits() {
    for workers in [1, 3, 16] {
        for buf_size in [1, 4 * KIB, 20 * KIB, MIB] {
            for chunk_max in [1, 4 * KIB, 16 * KIB, 1 << 40] {
                let mut options = options();
                options.workers = workers;
                options.buf_size = buf_size;
                options.chunk_max = chunk_max;
                let mut machine = Machine::started(256 * KIB, options);
                let mut turn = 0;
                while machine.job.query().status != Status::Ready {
                    let _ = machine.take_all();
                    turn += 1;
                    let index = turn * 7 % machine.out.len();
                    machine.answer(index);
                }
                assert!(machine.is_equal());
                assert!(machine.out_max <= workers, "{} out", machine.out_max);
                let most = buf_size.max(4 * KIB);
                assert!(
                    machine.buffered_max <= most,
                    "{} bytes in buffers of {buf_size}",
                    machine.buffered_max
                );
            }
        }
    }
}
