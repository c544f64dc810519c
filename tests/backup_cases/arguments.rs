//! What options and devices go together.

use super::*;

#[test]
fn every_combination_of_sync_bitmap_and_mode_is_right_or_has_its_own_error() {
    use BackupSync::{Bitmap, Full, Incremental, None as Nothing, Top};
    use BitmapMode::{Always, Never, OnSuccess};
    let node = Node::new(LEN);
    let limits = Limits::new(LEN);
    for sync in [Full, Top, Nothing, Bitmap, Incremental] {
        for has_bitmap in [false, true] {
            for mode in [None, Some(Never), Some(OnSuccess), Some(Always)] {
                let expected = match (sync, has_bitmap, mode) {
                    (Bitmap | Incremental, false, _) => Err(BackupError::BitmapNeeded),
                    (_, false, Some(_)) => Err(BackupError::ModeWithoutBitmap),
                    (Full | Top | Nothing, false, None) => Ok(()),
                    (Nothing, true, _) => Err(BackupError::NoneWithBitmap),
                    (Incremental, true, None | Some(OnSuccess)) => Ok(()),
                    (Incremental, true, Some(mode)) => Err(BackupError::NotIncremental(mode)),
                    (Full | Top | Bitmap, true, None) => Err(BackupError::ModeNeeded),
                    (Full | Top, true, Some(Never)) => Err(BackupError::NoEffect),
                    (Full | Top | Bitmap, true, Some(_)) => Ok(()),
                };
                let mut options = options(sync);
                options.bitmap = has_bitmap.then(|| NAME.to_owned());
                options.bitmap_mode = mode;
                let made = Backup::new(&node, limits, limits, options).map(drop);
                assert_eq!(made, expected, "{sync:?}, {has_bitmap}, {mode:?}");
            }
        }
    }
}

#[test]
fn the_cluster_is_the_largest_that_anybody_wants() {
    let node = Node::new(16 * MIB);
    let size = |cluster: Option<u32>, align: u32, wish: u64| {
        let mut limits = Limits::new(node.len());
        (limits.cluster, limits.request_align) = (cluster, align);
        let mut options = options(BackupSync::Full);
        options.min_cluster_size = wish;
        options.chunk_max = 4 * MIB;
        let source = Limits::new(node.len());
        Backup::new(&node, source, limits, options).map(|backup| backup.cluster_size())
    };
    for cluster in [None, Some(512), Some(64 << 10)] {
        assert_eq!(size(cluster, 1, 0), Ok(64 * KIB), "{cluster:?}");
        assert_eq!(size(cluster, 1, 64 * KIB), Ok(64 * KIB));
        assert_eq!(size(cluster, 1, 2 * MIB), Ok(2 * MIB));
    }
    for cluster in [None, Some(512), Some(4 << 10)] {
        assert_eq!(size(cluster, 1, 4 * KIB), Ok(4 * KIB), "{cluster:?}");
    }
    assert_eq!(size(Some(64 << 10), 1, 4 * KIB), Ok(64 * KIB));
    assert_eq!(size(Some(1 << 20), 1, 0), Ok(MIB));
    assert_eq!(size(Some(1 << 20), 1, 64 * KIB), Ok(MIB));
    assert_eq!(
        size(None, 128 << 10, 0),
        Ok(128 * KIB),
        "nothing shorter can be copied"
    );
    for wish in [1, 3, 2 * KIB, 65 * KIB, 4 << 30, u64::MAX] {
        assert_eq!(size(None, 1, wish), Err(BackupError::ClusterSize(wish)));
    }
    let too_short = BackupError::ChunkTooShort {
        chunk_max: 4 * MIB,
        cluster: 8 * MIB,
    };
    assert_eq!(size(None, 1, 8 * MIB), Err(too_short));
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_done() {
    let node = Node::new(LEN);
    let good = Limits::new(LEN);
    let try_with = |change: &dyn Fn(&mut Limits, &mut Limits, &mut BackupOptions)| {
        let (mut source, mut target, mut options) = (good, good, options(BackupSync::Full));
        change(&mut source, &mut target, &mut options);
        Backup::new(&node, source, target, options).map(drop)
    };
    let lengths = |source_len, target| BackupError::Lengths {
        node: LEN,
        source_len,
        target,
    };
    assert_eq!(
        try_with(&|source, _, _| source.len += 1),
        Err(lengths(LEN + 1, LEN))
    );
    assert_eq!(
        try_with(&|_, target, _| target.len -= 1),
        Err(lengths(LEN, LEN - 1))
    );
    assert!(matches!(
        try_with(&|source, _, _| source.len = u64::MAX),
        Err(BackupError::Limits {
            side: Side::Source,
            ..
        })
    ));
    assert_eq!(
        try_with(&|source, target, _| (source.identity, target.identity) = (Some(7), Some(7))),
        Err(BackupError::SameStorage)
    );
    for workers in [0, 1025, usize::MAX] {
        assert_eq!(
            try_with(&|_, _, o| o.workers = workers),
            Err(BackupError::Workers(workers))
        );
    }
    assert_eq!(
        try_with(&|_, _, o| o.buf_size = 0),
        Err(BackupError::Zero("buf_size"))
    );
    assert!(matches!(
        try_with(&|_, _, o| o.chunk_max = CLUSTER - 1),
        Err(BackupError::ChunkTooShort { .. })
    ));
    let other = Hand::on(&node, options(BackupSync::Full));
    assert_eq!(try_with(&|_, _, _| ()), Err(BackupError::NodeBusy));
    drop(other);
    assert_eq!(try_with(&|_, _, _| ()), Ok(()));
}

#[test]
fn a_bitmap_that_cannot_be_had_fails_the_job_when_it_starts() {
    let mut hand = Hand::started(with_bitmap(BackupSync::Bitmap, BitmapMode::Always));
    let result = hand.drive().done();
    let Err(JobError::Bitmap(error)) = result else {
        panic!("there is none, but {result:?}");
    };
    assert!(
        matches!(&*error, BitmapError::NotFound { name } if name == NAME),
        "{error:?}"
    );
    hand.write(0..LEN, 1);

    let node = Node::new(LEN);
    add_bitmap(&node, CLUSTER);
    let claim = node.bitmaps().claim(NAME, ClaimFor::Reading).unwrap();
    let mut hand = Hand::on(
        &node,
        with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess),
    );
    hand.job.start().unwrap();
    assert!(matches!(hand.drive().done(), Err(JobError::Bitmap(_))));
    drop(claim);
    assert!(!is_busy(&node));
}
