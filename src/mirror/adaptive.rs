//! Whether a mirror gains on its guest, and whether the guest's writes are to go to the target at once for that.
//!
//! Time is cut into windows. At the end of each it is known how much was copied and how much got dirty in it.
//!
//! ```text
//!              outpaced for two windows
//!  background ─────────────────────────▶ write-blocking
//!       ▲                                    │ │
//!       │  the guest writes far less than    │ │
//!       ├──────── could be copied ───────────┘ │
//!       │  the target takes too long for it    │
//!       └──── for a while, and then again ─────┘
//! ```
//!
//! 1. It goes over in each direction only after a stay in the other mode, the longer the more often it has gone.
//! 2. Where it may exceed what a write may cost, that doubles each time that it was too little. So the guest's
//!    writes are not kept from the target for ever, and the job gets ready wherever it would be if they never were.

use std::time::Duration;

/// When an [adaptive](crate::CopyMode::Adaptive) mirror goes from one mode to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Adaptive {
    /// For how long it watches before it decides; at least 1 ms. Default 1 s.
    pub window: Duration,
    /// What a write may cost the guest beside that to the source, on average over a window. If it costs more, writes
    /// are usual ones again for some windows. No single write waits more than twice as long for what the job
    /// is copying: it goes on, and is copied later. Default 10 ms.
    pub latency_max: Duration,
    /// Whether the average may become twice as much each time that the job, having gone back for it, is outpaced again.
    /// Otherwise a guest that writes more than can be copied may keep the job from being ready for ever.
    /// Default yes.
    pub may_exceed: bool,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(1),
            latency_max: Duration::from_millis(10),
            may_exceed: true,
        }
    }
}

/// Whether a mirror gains on its guest, by what was seen in the last window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Convergence {
    /// Bytes per second that were copied of what was dirty.
    pub copy_rate: u64,
    /// Bytes per second that got dirty.
    pub dirty_rate: u64,
    /// When nothing will be left if both go on like this; `None` if never.
    pub ready_in: Option<Duration>,
}

/// The shortest window.
const WINDOW_MIN: Duration = Duration::from_millis(1);
/// The window of those who only watch.
const WINDOW: Duration = Duration::from_secs(1);
/// Windows in which the job must be outpaced before it does something about that.
const OUTPACED: u32 = 2;
/// Windows after which it does so in any case, whatever is still under way.
const OUTPACED_MAX: u32 = 16;
/// Windows to stay in a mode, at first.
const STAY: u32 = 2;
/// The longest stay.
const STAY_MAX: u32 = 32;
/// Windows in which active writes must be too expensive before the job does something about that.
const EXPENSIVE: u32 = 2;
/// How often what may be under way is halved, at most.
const NARROW_MAX: u32 = 10;
/// The same, for a guest whose writes are active from the start.
const NARROW_FIRST: u32 = 5;
/// How often what a write may cost is doubled, at most.
const STRAIN_MAX: u32 = 20;

/// What a job has done so far, and what it is at.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    /// Bytes copied in the background.
    pub(super) copied: u64,
    /// Bytes that are left.
    pub(super) left: u64,
    /// Bytes that active writes have brought to the target.
    pub(super) written: u64,
    /// How many of those writes there were.
    pub(super) writes: u64,
    /// How many are at the target just now, or wait for what the job is copying.
    pub(super) waiting: u64,
    /// The most that the job has under way in the background, if nothing narrows it.
    pub(super) in_flight_max: u64,
    /// Whether it has no more under way than it is to have.
    pub(super) is_narrow: bool,
}

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    Nothing,
    /// Only write-blocking helps, or a guest that writes less.
    Outpaced(Convergence),
    /// Writes are active from now on, or not.
    Active(bool),
}

/// What is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watching {
    /// Nothing.
    Only,
    /// All writes are active, and need not wait longer than they must.
    Blocking,
    /// Whether they are to be.
    Adaptive(Adaptive),
}

/// By what those watch of whose guest all writes are active.
const BLOCKING: Adaptive = Adaptive {
    window: Duration::from_millis(100),
    latency_max: Duration::from_millis(10),
    may_exceed: false,
};

#[derive(Debug, Default)]
pub(super) struct Watch {
    /// When the window began, and how things were then.
    began: Option<(Duration, Sample)>,
    /// When the last sample was taken.
    last: Duration,
    last_waiting: u64,
    /// Sum of the times that writes have waited in this window.
    waited: Duration,
    /// The most that was copied in the background per second, of late.
    best_rate: u64,
    outpaced: u32,
    /// Windows since it went over to this mode.
    stayed: u32,
    /// Windows to stay in it.
    stay: u32,
    /// How often active writes were too expensive.
    strain: u32,
    /// How often what may be under way to the target is halved.
    narrow: u32,
    /// Windows in a row in which active writes were too expensive.
    expensive: u32,
    is_active: bool,
    seen: Option<Convergence>,
}

impl Watch {
    /// What was seen in the last window that is over.
    pub(super) fn seen(&self) -> Option<Convergence> {
        self.seen
    }

    /// Whether the writes of an adaptive mirror are to be active.
    pub(super) fn is_active(&self) -> bool {
        self.is_active
    }

    /// What a write may cost the guest on average.
    fn allowed(&self, adaptive: Adaptive) -> Duration {
        adaptive
            .latency_max
            .saturating_mul(match adaptive.may_exceed {
                true => 1 << self.strain.min(STRAIN_MAX),
                false => 1,
            })
    }

    /// How long a write may wait for what the job is copying.
    pub(super) fn wait_max(&self, adaptive: Adaptive) -> Duration {
        self.allowed(adaptive).saturating_mul(2)
    }

    /// How often what may be under way to the target is to be halved.
    pub(super) fn narrow(&self) -> u32 {
        self.narrow
    }

    /// Whether those who only watch need take a sample.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        self.began
            .is_none_or(|(began, _)| now.saturating_sub(began) >= WINDOW)
    }

    /// When the window ends.
    pub(super) fn window_end(&self, adaptive: Adaptive) -> Option<Duration> {
        let (began, _) = self.began?;
        began.checked_add(adaptive.window.max(WINDOW_MIN))
    }

    /// Takes note of how things are now.
    pub(super) fn sample(&mut self, now: Duration, sample: Sample, watching: Watching) -> News {
        let adaptive = match watching {
            Watching::Only => None,
            Watching::Blocking => Some(BLOCKING),
            Watching::Adaptive(adaptive) => Some(adaptive),
        };
        let Some((began, before)) = self.began else {
            self.begin(now, sample);
            if watching == Watching::Blocking {
                // Room for the first writes, until it is known what they cost.
                self.narrow = NARROW_FIRST;
            }
            return News::Nothing;
        };
        let spent = now.saturating_sub(self.last);
        let writers = u32::try_from(self.last_waiting).unwrap_or(u32::MAX);
        self.waited = self.waited.saturating_add(spent.saturating_mul(writers));
        (self.last, self.last_waiting) = (now, sample.waiting);
        let window = adaptive.map_or(WINDOW, |adaptive| adaptive.window.max(WINDOW_MIN));
        let elapsed = now.saturating_sub(began);
        if elapsed < window {
            return News::Nothing;
        }
        let seen = see(before, sample, elapsed);
        self.seen = Some(seen);
        if before.left > 0 && sample.left > 0 {
            // Else it was not all that could have been copied.
            self.best_rate = seen.copy_rate.max(self.best_rate - self.best_rate / 4);
        }
        let writes = sample.writes - before.writes;
        let cost = self.waited / u32::try_from(writes.max(1)).unwrap_or(u32::MAX);
        let write_rate = rate(sample.written - before.written, elapsed);
        self.stayed = self.stayed.saturating_add(1);
        let is_outpaced = sample.left > 0 && seen.ready_in.is_none();
        // One window of another kind says little.
        self.outpaced = match is_outpaced {
            true => self.outpaced.saturating_add(1),
            false if sample.left == 0 => 0,
            false => self.outpaced.saturating_sub(1),
        };
        self.begin(now, sample);
        let Some(adaptive) = adaptive else {
            (self.is_active, self.narrow) = (false, 0);
            return News::Nothing;
        };
        if watching == Watching::Blocking {
            self.is_active = true;
            self.make_room(cost, adaptive.latency_max, seen);
            return News::Nothing;
        }
        let may_go = self.stayed >= self.stay.max(STAY);
        if !self.is_active {
            // What is under way is what the first active writes will have to wait for.
            let estimated = |narrow: u32| (sample.in_flight_max >> narrow).saturating_mul(1000);
            let allowed = u64::try_from(adaptive.latency_max.as_millis()).unwrap_or(u64::MAX);
            let is_wide = |&narrow: &u32| estimated(narrow) / self.best_rate.max(1) > allowed;
            self.narrow = match self.outpaced {
                0 => 0,
                _ if seen.copy_rate < self.best_rate / 2 => self.narrow.saturating_sub(1),
                _ => (self.narrow..NARROW_MAX)
                    .find(|narrow| !is_wide(narrow))
                    .unwrap_or(NARROW_MAX),
            };
            if !may_go {
                return News::Nothing;
            }
            let has_made_room = sample.is_narrow || self.outpaced >= OUTPACED_MAX;
            if self.outpaced < OUTPACED || !has_made_room {
                return News::Nothing;
            }
            self.go_over();
            return News::Outpaced(seen);
        }
        let allowed = self.allowed(adaptive);
        self.make_room(cost, allowed, seen);
        self.expensive = if cost > allowed {
            self.expensive.saturating_add(1)
        } else {
            0
        };
        if may_go && self.expensive >= EXPENSIVE {
            self.strain += 1;
            self.go_over();
            return News::Active(false);
        }
        // What the guest writes, and what fails of that, is what would be left without active writes.
        let would_be_dirty = write_rate.saturating_add(seen.dirty_rate);
        if may_go && sample.left == 0 && would_be_dirty < self.best_rate / 2 {
            self.go_over();
            return News::Active(false);
        }
        News::Nothing
    }

    /// An active write waits at the target for what is under way before it. Where less of that does not help, it
    /// only costs time.
    fn make_room(&mut self, cost: Duration, allowed: Duration, seen: Convergence) {
        let is_slower = seen.copy_rate < self.best_rate / 2;
        self.narrow = match cost > allowed / 2 {
            true if !is_slower => (self.narrow + 1).min(NARROW_MAX),
            true => self.narrow.saturating_sub(1),
            false if cost < allowed / 8 => self.narrow.saturating_sub(1),
            false => self.narrow,
        };
    }

    fn begin(&mut self, now: Duration, sample: Sample) {
        self.began = Some((now, sample));
        self.last = now;
        self.last_waiting = sample.waiting;
        self.waited = Duration::ZERO;
    }

    fn go_over(&mut self) {
        self.is_active = !self.is_active;
        self.stay = self.stay.saturating_mul(2).clamp(STAY, STAY_MAX);
        self.stayed = 0;
        self.outpaced = 0;
        self.expensive = 0;
    }
}

fn see(before: Sample, after: Sample, elapsed: Duration) -> Convergence {
    let copied = after.copied - before.copied;
    // Active writes take away from what is left, too: then it seems that nothing got dirty.
    let dirtied = after
        .left
        .saturating_add(copied)
        .saturating_sub(before.left);
    let (copy_rate, dirty_rate) = (rate(copied, elapsed), rate(dirtied, elapsed));
    // A tenth is lost in the noise.
    let gain = (copy_rate - copy_rate / 10).saturating_sub(dirty_rate);
    let ready_in = match (after.left, gain) {
        (0, _) => Some(Duration::ZERO),
        (_, 0) => None,
        (left, gain) => {
            let seconds = left as f64 / gain as f64;
            Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
        }
    };
    Convergence {
        copy_rate,
        dirty_rate,
        ready_in,
    }
}

/// Bytes per second.
fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MIB: u64 = 1 << 20;

    /// A job that copies so much per second beside a guest that makes so much dirty.
    struct Play {
        watch: Watch,
        now: Duration,
        sample: Sample,
        adaptive: Adaptive,
    }

    impl Play {
        fn new() -> Self {
            let sample = Sample {
                left: 1000 * MIB,
                in_flight_max: 16 * MIB,
                is_narrow: true,
                ..Sample::default()
            };
            let mut play = Self {
                watch: Watch::default(),
                now: SECOND,
                sample,
                adaptive: Adaptive::default(),
            };
            assert_eq!(play.go_on(0, 0), News::Nothing);
            play
        }

        /// A second more.
        fn go_on(&mut self, copied: u64, dirtied: u64) -> News {
            self.now += SECOND;
            self.sample.left += dirtied * MIB;
            let copied = self.sample.left.min(copied * MIB);
            self.sample.left -= copied;
            self.sample.copied += copied;
            self.watch
                .sample(self.now, self.sample, Watching::Adaptive(self.adaptive))
        }

        /// A second with so many active writes, each of which takes so long.
        fn write(&mut self, writes: u64, millis: u64) -> News {
            self.sample.waiting = writes * millis / 1000;
            self.sample.writes += writes;
            self.sample.written += writes * 4096;
            // What waits now counts for the time to come.
            self.watch.last_waiting = self.sample.waiting;
            self.go_on(20, 0)
        }
    }

    #[test]
    fn a_guest_that_is_outpaced_is_left_alone() {
        let mut play = Play::new();
        for _ in 0..10 {
            assert_eq!(play.go_on(20, 10), News::Nothing);
        }
        let seen = play.watch.seen().unwrap();
        assert_eq!((seen.copy_rate, seen.dirty_rate), (20 * MIB, 10 * MIB));
        // 900 MiB are left, and a tenth of the speed is not counted on.
        assert_eq!(seen.ready_in.unwrap().as_secs(), 112);
    }

    #[test]
    fn one_that_is_not_for_two_windows_has_its_writes_copied_at_once() {
        let mut play = Play::new();
        assert_eq!(play.go_on(20, 19), News::Nothing);
        let news = play.go_on(20, 25);
        assert!(matches!(news, News::Outpaced(seen) if seen.ready_in.is_none()));
        assert!(play.watch.is_active());
        // When its writes are few again, and nothing is left, they are usual ones.
        for _ in 0..100 {
            if play.write(10, 1) == News::Active(false) {
                break;
            }
        }
        assert!(!play.watch.is_active());
        assert_eq!(play.sample.left, 0, "not before");
    }

    #[test]
    fn writes_that_cost_too_much_are_usual_ones_for_a_while_and_may_cost_more_then() {
        let mut play = Play::new();
        let mut costs = Vec::new();
        for millis in [100, 100, 100, 100, 100, 100] {
            play.sample.left = 1000 * MIB;
            while !play.watch.is_active() {
                let _ = play.go_on(20, 30);
            }
            for _ in 0..40 {
                play.sample.left = 1000 * MIB;
                if play.write(1000, millis) == News::Active(false) {
                    costs.push(millis);
                    break;
                }
            }
        }
        assert_eq!(
            costs.len(),
            4,
            "10, 20, 40, 80 ms were too little, 160 are not"
        );
        assert!(play.watch.is_active());
    }

    #[test]
    fn unless_they_must_not() {
        let mut play = Play::new();
        play.adaptive.may_exceed = false;
        for _ in 0..8 {
            while !play.watch.is_active() {
                let _ = play.go_on(20, 30);
            }
            let mut windows = 0;
            while play.write(1000, 20) != News::Active(false) {
                play.sample.left = 1000 * MIB;
                windows += 1;
                assert!(windows <= STAY_MAX);
            }
        }
    }
}
