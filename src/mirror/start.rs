//! How a mirror starts: records what the guest writes, and asks what the source holds.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::copy::{Content, Extent, OpKind};
use crate::job::{AtStart, Begun};
use crate::machine::Step;
use crate::mirror::copying::Copying;
use crate::mirror::{Mirror, MirrorSync, Phase, TargetHolds, Turn};
use crate::node::{Locked, Node, QuiesceGuard};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// How much of the source is asked about at once while it is scanned.
const SCAN_MAX: u64 = 8 << 30;
/// How many zero writes are planned at once while the source is scanned.
const SCAN_ZEROES: u64 = 64;

impl Mirror {
    /// Starts to record, with the guest held for that moment.
    pub(super) fn attach(&mut self, now: Duration, waker: &Waker) -> Turn {
        if is_broken(Sabotage::AttachWithoutQuiesce) {
            let other = Node::new(0).quiesce().try_guard();
            return self.begin(&other.expect("nobody writes to it"));
        }
        let until = self.held_until();
        let Phase::Attaching { quiesce, .. } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        let Poll::Ready(guard) = Pin::new(quiesce).poll(&mut Context::from_waker(waker)) else {
            if until.is_some_and(|until| now >= until) {
                // A guest write hangs. Others go on, and it is tried again later.
                self.let_guest_go();
                self.held_in_vain(now);
                return Turn::Again;
            }
            return Turn::Step(Step::Wait { until });
        };
        self.begin(&guard)
    }

    /// No guest write is in flight.
    fn begin(&mut self, guard: &QuiesceGuard) -> Turn {
        self.was_held_in_vain = false;
        let spare = self.start.spare();
        let armed = self.start.arm(&mut Locked::new([&self.node]), guard, spare);
        self.phase = Phase::Created;
        match armed {
            // Somebody else may have begun it at this instant, and may undo it.
            Ok(Begun::Here) => self.start.commit(),
            Ok(Begun::Before) => {}
            Err(error) => self.job.fail(error.into()),
        }
        Turn::Again
    }

    /// Goes on with what was begun at the instant of the start, once nobody may undo it.
    pub(super) fn take_begun(&mut self) {
        if self.bitmap.is_some() {
            return;
        }
        let Some(armed) = self.start.take() else {
            return;
        };
        self.bitmap = Some(armed.bitmap);
        if let Some(by) = &mut self.by {
            by.claim = armed.claim;
            by.wanted = armed.wanted;
        }
        // A quiesce of our own goes with the phase.
        self.phase = self.first_look();
    }

    fn first_look(&mut self) -> Phase {
        let shape = self.engine.shape();
        let is_known = self.by.is_some() || self.resumed.is_some();
        match self.sync {
            // Of sync top it is known only where the scan of a checkpoint was.
            MirrorSync::Top if self.resumed == Some(shape.len) => Phase::Copying { flush: None },
            MirrorSync::Top => Phase::Scanning {
                next: self.resumed.unwrap_or(0),
                asked: None,
            },
            MirrorSync::Full if is_known => Phase::Copying { flush: None },
            MirrorSync::Full if self.target_holds == TargetHolds::OlderCopy => {
                self.begin_to_compare(true);
                Phase::Copying { flush: None }
            }
            MirrorSync::None => Phase::Copying { flush: None },
            // The target can be made zero for next to nothing where the source is, or is zero already.
            MirrorSync::Full
                if self.target_holds == TargetHolds::Zeroes
                    || (shape.cheap_zeroes && shape.scan_zeroes().is_some()) =>
            {
                Phase::Scanning {
                    next: 0,
                    asked: None,
                }
            }
            // The zeroes must be written anyway: the copying does that on its way.
            MirrorSync::Full => {
                if let Some(bitmap) = &self.bitmap {
                    bitmap.lock().set_all();
                }
                Phase::Copying { flush: None }
            }
        }
    }

    /// Asks what the source holds, and zeroes the target on the way.
    pub(super) fn scan(&mut self, now: Duration) -> Turn {
        let copying = match is_broken(Sabotage::CopyWhileScanning) {
            true => Copying::Unlimited,
            false => Copying::No,
        };
        if let Some(op) = self.next_op(now, copying) {
            return Turn::Step(Step::Op(op));
        }
        let retry = self.next_retry(now);
        let Phase::Scanning { next, asked } = &mut self.phase else {
            unreachable!("called in this phase only");
        };
        let len = self.engine.shape().len;
        let wanted = self.by.as_ref().and_then(|by| by.wanted.as_ref());
        if let (None, Some(wanted)) = (*asked, wanted) {
            *next = wanted.next_dirty(*next..len).unwrap_or(len);
        }
        if *next < len {
            if asked.is_some() || self.engine.planned() > 0 {
                return Turn::Step(Step::Wait { until: None });
            }
            if retry.is_some() {
                return Turn::Step(Step::Wait { until: retry });
            }
            let end = next.saturating_add(SCAN_MAX).min(len);
            let op = self.engine.hand_out(OpKind::Status((*next..end).into()));
            *asked = Some(op.id());
            return Turn::Step(Step::Op(op));
        }
        if self.engine.has_no_claims() {
            self.phase = Phase::Copying { flush: None };
            if let Some(by) = &mut self.by {
                by.wanted = None;
            }
            return Turn::Again;
        }
        Turn::Step(Step::Wait { until: retry })
    }

    /// The source has told what is at the start of what is left to scan.
    pub(super) fn scanned(&mut self, range: ByteRange, extent: Extent) {
        let Phase::Scanning { next, asked } = &mut self.phase else {
            return;
        };
        *asked = None;
        let extent = extent.or_data(range);
        let mut area = range.split_at(range.start().saturating_add(extent.len)).0;
        let is_zero = extent.content != Content::Data;
        if is_zero && self.sync == MirrorSync::Full {
            let (is_known, same) = self.engine.zeroes_at(area);
            area = same;
            if is_known {
                *next = area.end();
                return;
            }
        }
        let shape = self.engine.shape();
        let most = shape
            .scan_zeroes()
            .map_or(0, |(_, max)| max.saturating_mul(SCAN_ZEROES));
        let zeroed = match self.sync {
            MirrorSync::Top if !extent.in_top && !is_broken(Sabotage::CommitBelow) => {
                *next = area.end();
                return;
            }
            MirrorSync::Full if is_zero => shape.zeroable(area),
            MirrorSync::Full | MirrorSync::Top | MirrorSync::None => None,
        };
        if let Some(zeroed) = zeroed {
            // The rest is asked for again when these are written.
            let end = zeroed.end().min(zeroed.start().saturating_add(most));
            area = area
                .split_at(if end < zeroed.end() { end } else { area.end() })
                .0;
        }
        *next = area.end();
        let zeroed = zeroed.map(|zeroed| zeroed.intersection(area));
        let bitmap = self
            .bitmap
            .as_ref()
            .expect("recording started before the scan");
        let mut dirty = bitmap.lock();
        match zeroed {
            Some(zeroed) => {
                for edge in [area.start()..zeroed.start(), zeroed.end()..area.end()] {
                    dirty.set(edge.into()).expect("within the disk");
                }
                drop(dirty);
                self.engine.plan_zeroes(zeroed);
            }
            None => {
                let wanted = self.by.as_ref().and_then(|by| by.wanted.as_ref());
                let Some(wanted) = wanted else {
                    dirty.set(area).expect("within the disk");
                    return;
                };
                for run in wanted.runs_in(area, u64::MAX) {
                    dirty.set(run).expect("within the disk");
                }
            }
        }
    }
}
