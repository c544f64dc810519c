//! What is to happen, drawn from a seed.

use super::*;

impl MemberPlan {
    pub(crate) fn new(
        rng: &mut Rng,
        index: usize,
        group: Option<&JobGroup>,
        is_alone: bool,
    ) -> Self {
        let wish = rng.pick(&[0, 0, 0, 0, 128 * KIB, 4 * KIB, 16 * KIB]);
        let cluster = wish.max(64 * KIB);
        let least = if is_alone { 0 } else { 8 * BLOCK };
        let len = match rng.below(12) {
            0 => least,
            1 => least + 1,
            2 => cluster + rng.between(0, 2) - 1,
            3 => rng.between(3, 8) * cluster + rng.between(0, 2) - 1,
            4..=6 => rng.between(least.max(1), 600 * KIB),
            _ => rng.between(1, 8) * cluster,
        };
        let limits = |rng: &mut Rng| {
            let mut limits = Limits::new(len);
            limits.request_align = rng.pick(&[1, 512, 4096]);
            if rng.one_in(30) {
                limits.request_align = 128 << 10;
            }
            let most = rng.pick(&[16 << 10, 64 << 10, 100 << 10, 1 << 30, 1 << 30]);
            limits.max_transfer = limits.request_align.max(most);
            limits
        };
        let (mut source, mut target) = (limits(rng), limits(rng));
        let align = source.request_align.max(target.request_align);
        source.max_transfer = source.max_transfer.max(align);
        target.max_transfer = target.max_transfer.max(align);
        if !rng.one_in(3) {
            let align = rng.pick(&[1, 512, 4096]);
            let max = rng.pick(&[20 << 10, 1 << 40]);
            target.write_zeroes = Some(RangeLimits { align, max });
            target.cheap_zeroes = rng.one_in(2);
        }
        if rng.one_in(2) {
            let align = rng.pick(&[1, 512, 4096]);
            target.discard = Some(RangeLimits {
                align,
                max: 1 << 40,
            });
        }
        if rng.one_in(3) {
            target.cluster = Some(rng.pick(&[4096, 64 << 10, 128 << 10]));
            target.fills_clusters = rng.one_in(2);
        }
        let mut options = BackupOptions::default();
        options.job.id = Some(format!("b{index}"));
        options.job.group = group.cloned();
        let modes = [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always];
        options.sync = match rng.below(8) {
            0 if group.is_none() => BackupSync::None,
            1 | 2 => BackupSync::Full,
            3 => BackupSync::Top,
            4 => BackupSync::Incremental,
            _ => BackupSync::Bitmap,
        };
        options.bitmap_mode = match options.sync {
            BackupSync::Bitmap => Some(rng.pick(&modes)),
            BackupSync::Full | BackupSync::Top if rng.one_in(2) => Some(rng.pick(&modes[1..])),
            BackupSync::Incremental if rng.one_in(2) => Some(BitmapMode::OnSuccess),
            _ => None,
        };
        if options.bitmap_mode.is_some() || options.sync == BackupSync::Incremental {
            options.bitmap = Some(NAME.to_owned());
        }
        options.workers = rng.pick(&[1, 2, 8, 16]);
        options.chunk_max = rng.pick(&[128 * KIB, 200 * KIB, 1 << 20]);
        options.buf_size = rng.pick(&[1, 64 * KIB, 300 * KIB, 1 << 20]);
        options.min_cluster_size = wish;
        options.on_cbw_error = rng.pick(&[OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite]);
        options.cbw_timeout = rng
            .pick(&[None, None, Some(300), Some(3_000), Some(1_000_000)])
            .map(Duration::from_micros);
        options.hold_max = Duration::from_micros(rng.pick(&[1_000, 5_000_000]));
        options.job.auto_finalize = !rng.one_in(4);
        options.job.auto_dismiss = rng.one_in(2);
        let policies = [
            OnError::Report,
            OnError::Ignore,
            OnError::Stop,
            OnError::Enospc,
        ];
        options.job.on_source_error = rng.pick(&policies);
        options.job.on_target_error = rng.pick(&policies);
        if rng.one_in(4) {
            options.job.speed = rng.between(500_000, 50_000_000);
        }
        if rng.one_in(4) {
            let grace = Duration::from_micros(rng.below(2000));
            options.job.cancel_grace = Some(grace);
        }
        Self {
            options,
            source,
            target,
            granularity: rng.pick(&[512, 4 * KIB, 64 * KIB, 64 * KIB, 256 * KIB]),
            threads: rng.below(THREADS_MAX as u64 + 1) as usize,
            uses_queue: rng.one_in(2),
        }
    }

    pub(crate) fn mode(&self) -> Option<BitmapMode> {
        match self.options.sync {
            BackupSync::Incremental => Some(BitmapMode::OnSuccess),
            _ => self.options.bitmap_mode,
        }
    }

    pub(crate) fn goes_by_bitmap(&self) -> bool {
        matches!(
            self.options.sync,
            BackupSync::Bitmap | BackupSync::Incremental
        )
    }
}

/// What else happens to a member, by time.
pub(crate) fn disturbances(rng: &mut Rng, plan: &MemberPlan) -> Vec<(u64, Asking)> {
    let mut asks = vec![(PEACE, Asking::MakePeace)];
    let horizon = rng.pick(&[1_000, 5_000, 20_000]);
    let policies = [OnError::Report, OnError::Ignore, OnError::Stop];
    for _ in 0..rng.pick(&[0, 0, 2, 5]) {
        let at = rng.below(horizon);
        let ask = match rng.below(7) {
            0 | 1 => Asking::Pause,
            2 => Asking::Hold,
            3 => Asking::Speed(rng.pick(&[0, 1_000_000, 50_000_000])),
            4 => Asking::Policy(rng.pick(&policies)),
            _ => Asking::DropDriver,
        };
        asks.push((at, ask));
        match ask {
            Asking::Pause => asks.push((at + rng.below(horizon), Asking::Resume)),
            Asking::Hold => asks.push((at + rng.below(horizon), Asking::Release)),
            _ => {}
        }
    }
    if rng.one_in(10) || plan.options.sync == BackupSync::None {
        asks.push((rng.below(horizon), Asking::Cancel));
    }
    if rng.one_in(25) {
        asks.push((rng.below(horizon), Asking::DropMachine));
    }
    if rng.one_in(12) && plan.options.bitmap.is_some() {
        asks.push((rng.below(3_000), Asking::Disable));
    }
    asks
}

pub(crate) fn faults(rng: &mut Rng, is_source: bool) -> Faults {
    Faults {
        read: if is_source { rng.pick(&[0, 5, 50]) } else { 0 },
        write: if is_source { 0 } else { rng.pick(&[0, 5, 50]) },
        zero: if is_source { 0 } else { rng.pick(&[0, 5, 50]) },
        flush: rng.pick(&[0, 0, 2, 5]),
        status: rng.pick(&[0, 0, 5]),
        is_no_space: rng.one_in(2),
        spares_guests: true,
        until: PEACE / 2,
    }
}
