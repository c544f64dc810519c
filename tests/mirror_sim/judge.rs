//! What must hold in every step, at the switch and at the end.

use blockjob::{BitmapMode, Event, HBitmap, Mirror, SnapshotOf, Status};

use crate::Sim;
use crate::plan::{AFTER, ALL, BITMAP};
use crate::sim::content::is_equal;
use crate::sim::disk::{BLOCK, Owner};
use crate::sim::events::check_events;
use crate::sim::world::{SOURCE, TARGET};

impl Sim {
    /// A job that says it stands still has nothing in flight.
    pub(crate) fn check_stillness(&mut self) {
        let Some(Event::Status(Status::Paused | Status::Standby)) = self
            .events
            .iter()
            .rfind(|event| matches!(event, Event::Status(_)))
        else {
            return;
        };
        self.report.paused = true;
        let world = self.world.borrow();
        for disk in &world.disks {
            for request in disk.requests.values() {
                let is_jobs = !matches!(request.owner, Owner::Guest(_));
                assert!(
                    !is_jobs || request.is_answered || !request.ask.writes(),
                    "{request:?} is in flight while the job stands still"
                );
            }
        }
    }

    /// The disks are equal, the target is flushed, and the guest is held.
    pub(crate) fn check_switch(&self) {
        self.guests.check(&self.world.borrow());
        assert!(
            !self.guests.is_writing(),
            "a guest write is in flight at the switch"
        );
        let world = self.world.borrow();
        let target = &world.disks[TARGET];
        assert_eq!(
            target.written, target.flushed,
            "writes to the target are not flushed"
        );
        for request in target.requests.values() {
            assert!(
                request.is_answered || !request.ask.writes(),
                "{request:?} is in flight at the switch"
            );
        }
        for block in 0..target.blocks.len() {
            assert!(
                is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs at the switch"
            );
        }
    }

    /// Whatever differs is known to differ.
    pub(crate) fn check_coverage(&mut self, mirror: &Mirror) {
        mirror.check_invariants();
        if self.guests.current != SOURCE {
            return;
        }
        let is_synced = mirror.is_actively_synced();
        self.report.was_synced |= is_synced;
        assert!(
            !(is_synced && self.guests.is_writing_alone()),
            "a write is in flight that the target will not have"
        );
        let Some(left) = mirror.left_dirty() else {
            return;
        };
        let world = self.world.borrow();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let start = block as u64 * BLOCK;
            let is_busy = self.guests.is_busy(block);
            let is_known = is_busy || left.any_dirty_in(start..start + BLOCK);
            assert!(
                is_known || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs and nobody knows: {left:?}"
            );
            assert!(
                !is_synced || is_busy || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs of a target that is synced"
            );
        }
    }

    pub(crate) fn bits_of(&self, name: &str) -> HBitmap {
        let bits = self.node.bitmaps().snapshot(name, SnapshotOf::Bitmap);
        bits.expect("nobody has it any more")
    }

    /// The bitmap has what its mode says. `left` is what the target may lack, if that is known, at the very
    /// moment of the end.
    pub(crate) fn check_bitmap(&mut self, is_good: bool, left: Option<&HBitmap>) {
        let Some(mode) = self.plan.options.bitmap_mode else {
            return;
        };
        self.report.bitmap = Some((mode, is_good));
        let bits = self.bits_of(BITMAP);
        if is_good && !self.report.switched {
            // Nobody has written since the instant of which the target is a copy.
            self.node.bitmaps().clear(AFTER).unwrap();
        }
        let expected = match (mode, is_good) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => Some(self.bits_of(ALL)),
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => Some(self.bits_of(AFTER)),
            (BitmapMode::Always, false) => left.cloned(),
        };
        if let Some(expected) = expected {
            let is_exact = bits == expected || bits.granularity() != expected.granularity();
            assert!(
                is_exact,
                "the bitmap with {mode:?} has {bits:?} after {is_good}, and not {expected:?}"
            );
        }
        // After a failure the other modes are about what is in the bitmap. The target may lack more: what was
        // left by a checkpoint, and what was written along with what is dirty to fill a cluster.
        self.is_told_all = is_good
            || match mode {
                BitmapMode::Never | BitmapMode::OnSuccess => {
                    let is_damaged = self.report.found > 0;
                    !self.is_resumed && !self.plan.target.fills_clusters && !is_damaged
                }
                BitmapMode::Always => !self.is_resumed || left.is_some(),
            };
        if self.is_told_all {
            self.check_known(&bits);
        }
    }

    /// Whatever differs is dirty.
    pub(crate) fn check_known(&self, bits: &HBitmap) {
        let world = self.world.borrow();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let start = block as u64 * BLOCK;
            let is_known = self.guests.is_busy(block) || bits.any_dirty_in(start..start + BLOCK);
            assert!(
                is_known || is_equal(&world.disks, block) || self.is_damaged(block),
                "block {block} differs and is clean in the bitmap: {bits:?}"
            );
        }
    }

    /// The same, when all is over and the guest has gone on for a while.
    pub(crate) fn check_bitmap_later(&self) {
        let Some((mode, is_good)) = self.report.bitmap else {
            return;
        };
        let bits = self.bits_of(BITMAP);
        match (mode, is_good) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => {
                assert!(bits == self.bits_of(ALL), "{mode:?}, {is_good}, later");
            }
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {
                assert!(bits == self.bits_of(AFTER), "{mode:?}, later");
            }
            (BitmapMode::Always, false) => {}
        }
        if self.is_told_all {
            self.check_known(&bits);
        }
    }

    pub(crate) fn check_told(&self, is_good: bool) {
        let told = check_events(&self.events, is_good);
        let last = match self.plan.options.job.auto_dismiss || !told.was_started {
            true => Status::Null,
            false => Status::Concluded,
        };
        assert_eq!(told.status, Some(last));
    }
}
