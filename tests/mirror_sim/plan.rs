//! What one seed has decided.

use std::time::Duration;

use blockjob::{
    Adaptive, BitmapMode, BitmapState, CompareBy, CopyMode, Granularity, HBitmap, Limits,
    MirrorOptions, MirrorSync, Node, OnError, RangeLimits, TargetHolds, Unmap,
};

use crate::PEACE;
use crate::sim::disk::{BLOCK, Faults};
use crate::sim::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asking {
    Pause,
    Resume,
    Hold,
    Release,
    Speed(u64),
    Policy(OnError),
    Mode(CopyMode),
    Complete,
    SoftCancel,
    ForceCancel,
    DropDriver,
    /// Have the job say what it has still to do.
    Checkpoint,
    /// The process ends.
    Die,
    /// Something damages the target, and the job is asked to look.
    Plant,
    /// After [`PEACE`]: whatever keeps the job from its end is taken away.
    MakePeace,
}

/// What one seed has decided.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) options: MirrorOptions,
    pub(crate) source: Limits,
    pub(crate) target: Limits,
    pub(crate) threads: usize,
    pub(crate) asks: Vec<(u64, Asking)>,
    pub(crate) uses_queue: bool,
    /// How often the caller drops the switch before it is taken.
    pub(crate) declines: u64,
    /// How the end is asked for once the job is ready.
    pub(crate) end: Asking,
    pub(crate) ready_for: u64,
    pub(crate) may_fail: bool,
    /// What is dirty at first in the bitmap that the job goes by.
    pub(crate) bits: Option<HBitmap>,
    /// Whether checkpoints are stored, and so what was written since.
    pub(crate) stores: bool,
    /// Whether the guest writes zeroes often, to a target for which they are not cheap and fail often.
    pub(crate) zeroes_often: bool,
    /// Whether requests of the source take long now and then, those of the guest among them.
    pub(crate) stalls: bool,
}

/// The bitmap that a job goes by is called so.
pub(crate) const BITMAP: &str = "the job's";

/// Has what was dirty at first, and all that was written.
pub(crate) const ALL: &str = "all writes";

/// Has what was written since the end of the job.
pub(crate) const AFTER: &str = "writes since the end";

/// Has what was written since the last checkpoint.
pub(crate) const SINCE: &str = "since the checkpoint";

fn limits(rng: &mut Rng, len: u64, align: u64) -> Limits {
    let mut limits = Limits::new(len);
    limits.request_align = align as u32;
    limits.max_transfer = rng.pick(&[4096, 16 << 10, 64 << 10, 1 << 30]).max(align) as u32;
    limits
}

impl Plan {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let len = match rng.below(16) {
            0 => 0,
            1 => rng.between(1, 1025),
            2..=5 => rng.between(1, 64 << 10),
            _ => rng.between(1, 128) * BLOCK,
        };
        let source_align = rng.pick(&[1, 1, 512, 4096]);
        let source = limits(rng, len, source_align);
        let target_align = rng.pick(&[1, 512, 512, 4096]);
        let mut target = limits(rng, len, target_align);
        if !rng.one_in(4) {
            let align = rng.pick(&[1, 512, 2048, 4096]);
            let max = rng.pick(&[4096, 10_000, 1 << 40]).max(u64::from(align));
            target.write_zeroes = Some(RangeLimits { align, max });
            target.cheap_zeroes = !rng.one_in(3);
        }
        if rng.one_in(2) {
            let align = rng.pick(&[1, 512, 4096]);
            let max = rng.pick(&[4096, 1 << 40]);
            target.discard = Some(RangeLimits { align, max });
        }
        if rng.one_in(3) {
            let cluster = rng.pick(&[2048u32, 4096, 16 << 10]);
            target.cluster = Some(cluster);
            target.fills_clusters = rng.one_in(2);
            target.max_transfer = target.max_transfer.max(cluster);
        }
        let mut source = source;
        source.max_transfer = source.max_transfer.max(16 << 10);

        let mut options = MirrorOptions::default();
        options.job.id = Some("sim".to_owned());
        options.sync = match rng.below(4) {
            0 => MirrorSync::Top,
            1 => MirrorSync::None,
            _ => MirrorSync::Full,
        };
        options.granularity = Granularity::from_bytes(rng.pick(&[512, 512, 1024, 4096, 8192]));
        options.workers = rng.pick(&[1, 2, 3, 8, 16]);
        options.chunk_max = rng.pick(&[512, 1000, 4096, 16 << 10, 1 << 20]);
        options.buf_size = rng.pick(&[1, 4096, 32 << 10, 1 << 20]);
        options.unmap = rng.pick(&[Unmap::Allowed, Unmap::Allowed, Unmap::Forbidden]);
        options.job.auto_finalize = !rng.one_in(5);
        options.job.auto_dismiss = rng.one_in(2);
        let policies = [
            OnError::Report,
            OnError::Ignore,
            OnError::Stop,
            OnError::Enospc,
        ];
        options.job.on_source_error = rng.pick(&policies);
        options.job.on_target_error = rng.pick(&policies);
        if rng.one_in(6) {
            options.job.speed = rng.between(100_000, 10_000_000);
        }
        if rng.one_in(4) {
            let grace = Duration::from_micros(rng.below(2000));
            options.job.cancel_grace = Some(grace);
        }

        let mut asks = vec![(PEACE, Asking::MakePeace)];
        let horizon = rng.pick(&[1_000, 5_000, 20_000]);
        for _ in 0..rng.pick(&[0, 0, 2, 6]) {
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
        if rng.one_in(8) {
            let cancel = rng.pick(&[Asking::SoftCancel, Asking::ForceCancel]);
            asks.push((rng.below(horizon), cancel));
        }
        if options.sync == MirrorSync::None {
            // Recording must start at the very first moment, for that is what the target is made from.
            asks.iter_mut().for_each(|(at, _)| *at += 10);
        }
        Self {
            options,
            source,
            target,
            threads: rng.below(5) as usize,
            asks,
            uses_queue: rng.one_in(2),
            declines: rng.pick(&[0, 0, 0, 1, 2]),
            end: rng.pick(&[
                Asking::Complete,
                Asking::Complete,
                Asking::Complete,
                Asking::SoftCancel,
                Asking::ForceCancel,
            ]),
            ready_for: rng.pick(&[0, 100, 3_000, 30_000]),
            may_fail: false,
            bits: None,
            stores: false,
            zeroes_often: false,
            stalls: false,
        }
    }

    /// Has the job go by a bitmap, now and then.
    pub(crate) fn add_bitmap(&mut self, rng: &mut Rng) {
        if self.options.sync == MirrorSync::None || !rng.one_in(3) {
            return;
        }
        let granularity = Granularity::from_bytes(rng.pick(&[512, 1024, 4096, 16 << 10]));
        let mut bits = HBitmap::new(self.source.len, granularity.unwrap()).unwrap();
        let len = self.source.len;
        for _ in 0..rng.pick(&[0, 1, 3, 10]) {
            if let Some(start) = len.checked_sub(1).map(|last| rng.between(0, last)) {
                let end = start + rng.between(1, (len - start).min(10_000));
                bits.set(start..end).unwrap();
            }
        }
        self.go_by(rng, bits);
    }

    /// Has writes go to the target at once, now and then, or for a while.
    pub(crate) fn add_mode(&mut self, rng: &mut Rng) {
        if rng.one_in(2) {
            return;
        }
        let mut adaptive = Adaptive::default();
        adaptive.window = Duration::from_micros(rng.pick(&[1_000, 5_000]));
        adaptive.latency_max = Duration::from_micros(rng.pick(&[10, 200, 5_000]));
        adaptive.may_exceed = rng.one_in(2);
        let modes = [
            CopyMode::Background,
            CopyMode::WriteBlocking,
            CopyMode::Adaptive(adaptive),
        ];
        self.options.copy_mode = rng.pick(&modes);
        let horizon = rng.pick(&[500, 3_000, 20_000]);
        for _ in 0..rng.pick(&[0, 1, 1, 4]) {
            let ask = Asking::Mode(rng.pick(&modes));
            self.asks.push((10 + rng.below(horizon), ask));
        }
    }

    /// Has zeroes looked for, or known, now and then.
    pub(crate) fn add_zeroes(&mut self, rng: &mut Rng) {
        self.options.detect_zeroes = rng.one_in(3);
        if rng.one_in(3) {
            self.zero_often();
        }
        let starts_anew = self.options.sync == MirrorSync::Full && self.bits.is_none();
        if starts_anew && rng.one_in(3) {
            self.options.target_holds = TargetHolds::Zeroes;
        }
    }

    /// Has the target damaged and compared, or be an older copy, now and then.
    pub(crate) fn add_verify(&mut self, rng: &mut Rng) {
        if rng.one_in(2) {
            return;
        }
        self.target.compare = Some(CompareBy::Reading);
        let starts_anew = self.options.sync == MirrorSync::Full && self.bits.is_none();
        if starts_anew && rng.one_in(3) {
            self.options.target_holds = TargetHolds::OlderCopy;
        }
        let horizon = rng.pick(&[1_000, 20_000]);
        for _ in 0..rng.below(3) {
            self.asks.push((10 + rng.below(horizon), Asking::Plant));
        }
    }

    pub(crate) fn zero_often(&mut self) {
        self.zeroes_often = true;
        let any = RangeLimits {
            align: 512,
            max: 1 << 40,
        };
        self.target.write_zeroes.get_or_insert(any);
        self.target.cheap_zeroes = false;
    }

    /// Has checkpoints taken, and the process end at some time.
    pub(crate) fn die_at(&mut self, rng: &mut Rng) {
        self.stores = true;
        let horizon = rng.pick(&[500, 3_000, 20_000]);
        for _ in 0..rng.below(4) {
            self.asks
                .push((10 + rng.below(horizon), Asking::Checkpoint));
        }
        if !rng.one_in(3) {
            self.asks.push((10 + rng.below(2 * horizon), Asking::Die));
        }
    }

    pub(crate) fn go_by(&mut self, rng: &mut Rng, bits: HBitmap) {
        self.options.bitmap = Some(BITMAP.to_owned());
        self.options.bitmap_mode =
            Some(rng.pick(&[BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always]));
        self.bits = Some(bits);
    }

    /// The bitmaps of a new process: the job's, if it goes by one, and those by which that one is judged.
    pub(crate) fn bitmaps(&self, node: &Node) {
        let mut states = Vec::new();
        if self.stores {
            let granularity = Granularity::from_bytes(1024).unwrap();
            let clean = || HBitmap::new(self.source.len, granularity).unwrap();
            // Until there is a newer checkpoint, what was written since the old one stays known.
            let since = self.bits.clone().unwrap_or_else(clean);
            states.push(BitmapState::new(SINCE, since));
        }
        for name in [BITMAP, ALL, AFTER] {
            let bits = self.bits.clone();
            states.extend(bits.map(|bits| BitmapState::new(name, bits)));
        }
        states.iter_mut().for_each(|state| state.is_enabled = true);
        let guard = node.quiesce().try_guard().expect("nobody writes yet");
        node.bitmaps().import_state(&guard, states).unwrap();
    }

    pub(crate) fn faults(&mut self, rng: &mut Rng) -> [Faults; 2] {
        let none = Faults::default();
        if !rng.one_in(2) {
            return [none; 2];
        }
        let mut one = |is_source: bool| Faults {
            read: if is_source { rng.pick(&[0, 5, 50]) } else { 0 },
            write: rng.pick(&[0, 5, 50]),
            zero: rng.pick(&[0, 5, 50]),
            flush: rng.pick(&[0, 0, 2, 5]),
            status: rng.pick(&[0, 0, 5]),
            is_no_space: rng.one_in(2),
            spares_guests: false,
            until: PEACE / 2,
        };
        self.may_fail = true;
        [one(true), one(false)]
    }
}
