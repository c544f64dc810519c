//! What something has damaged on the target, and whether the job finds it.

use std::collections::BTreeSet;

use blockjob::{ByteRange, Mirror, Status, TargetHolds, Verified};

use crate::Sim;
use crate::sim::content::is_equal;
use crate::sim::disk::BLOCK;
use crate::sim::world::{SOURCE, TARGET};

/// What differs on the target, and is to be found.
#[derive(Default)]
pub(crate) struct Planted {
    /// Blocks that nobody knows of, but a verification that has not come to its end.
    pub(crate) damaged: BTreeSet<usize>,
    /// Those of them that were there before the last verification that was cut short, and may be mended.
    pub(crate) stale: BTreeSet<usize>,
    /// What was damaged and not told when the last checkpoint was taken, and what was damaged since: that does not
    /// know of it.
    pub(crate) since: BTreeSet<usize>,
    /// Blocks of an older copy that differ.
    pub(crate) older: BTreeSet<usize>,
    /// What was told, in bytes.
    pub(crate) told: Vec<ByteRange>,
    /// How much the guest had written when it was planted.
    pub(crate) recorded: usize,
    pub(crate) granularity: u64,
}

impl Sim {
    pub(crate) fn is_older(&self) -> bool {
        self.plan.options.target_holds == TargetHolds::OlderCopy
    }

    pub(crate) fn is_verifying(&self) -> bool {
        let result = self.job.query().verification;
        result.is_some_and(|result| result.state == Verified::Running)
    }

    /// Something damages the target where the job believes that all is well, and it is asked to look.
    pub(crate) fn plant(&mut self, mirror: &Mirror) {
        let is_ready = self.job.query().status == Status::Ready;
        let Some(left) = mirror.left_dirty().filter(|_| is_ready) else {
            return;
        };
        if self.guests.current != SOURCE || self.is_verifying() || self.job.verify().is_err() {
            return;
        }
        let mut world = self.world.borrow_mut();
        self.planted.recorded = self.guests.recorded.len();
        self.planted.granularity = mirror.granularity().bytes();
        let damaged = std::mem::take(&mut self.planted.damaged);
        self.planted.stale.extend(damaged);
        for _ in 0..world.rng.between(1, 4) {
            let blocks = world.disks[TARGET].blocks.len() as u64;
            if blocks == 0 {
                break;
            }
            let block = world.rng.below(blocks) as usize;
            let start = block as u64 * BLOCK;
            // What is written along with what is dirty would mend it unseen.
            let unit = self.unit_of(block);
            let mut others = unit.start() / BLOCK..(unit.end() / BLOCK).min(blocks);
            let is_known =
                others.any(|block| self.guests.is_busy(block as usize)) || left.any_dirty_in(unit);
            let is_undefined =
                world.disks[SOURCE].blocks[block].content == blockjob::Content::Undefined;
            if is_known || is_undefined || self.planted.stale.contains(&block) {
                continue;
            }
            let end = (start + BLOCK).min(world.disks[TARGET].limits.len);
            let at = start as usize..end as usize;
            // No byte is the right one.
            let wrong = world.disks[SOURCE].bytes[at.clone()].iter();
            let wrong: Vec<u8> = wrong.map(|byte| byte ^ 0x55).collect();
            let target = &mut world.disks[TARGET];
            target.bytes[at].copy_from_slice(&wrong);
            target.blocks[block].content = blockjob::Content::Data;
            self.planted.damaged.insert(block);
            self.planted.since.insert(block);
        }
    }

    pub(crate) fn granule_of(&self, block: usize) -> ByteRange {
        let start = block as u64 * BLOCK;
        let start = start - start % self.planted.granularity;
        (start..start + self.planted.granularity.max(BLOCK)).into()
    }

    /// What is copied at once with a block, if the guest writes to it.
    pub(crate) fn unit_of(&self, block: usize) -> ByteRange {
        let target = &self.plan.target;
        let cluster = target.cluster.filter(|_| target.fills_clusters);
        let unit = self
            .planted
            .granularity
            .max(self.plan.source.request_align.into())
            .max(target.request_align.into())
            .max(cluster.map_or(BLOCK, u64::from));
        let start = block as u64 * BLOCK;
        let start = start - start % unit;
        (start..start + unit).into()
    }

    /// Whether a block may have been damaged without anybody's knowing.
    pub(crate) fn is_damaged(&self, block: usize) -> bool {
        self.planted.damaged.contains(&block) || self.planted.stale.contains(&block)
    }

    /// It is told to differ: so it does at this moment, and no guest write has to do with it.
    pub(crate) fn differs(&mut self, range: ByteRange) {
        let world = self.world.borrow();
        let granularity = self.planted.granularity;
        let mut start = range.start();
        assert_eq!(start % granularity, 0);
        while start < range.end() {
            let granule = ByteRange::from(start..start + granularity);
            let is_right = (start / BLOCK..granule.end().div_ceil(BLOCK)).any(|block| {
                let block = block as usize;
                let blocks = &world.disks[SOURCE].blocks;
                let is_undefined = blocks
                    .get(block)
                    .is_some_and(|block| block.content == blockjob::Content::Undefined);
                let is_planted = self.is_damaged(block) || self.planted.older.contains(&block);
                is_undefined || (is_planted && !is_equal(&world.disks, block))
            });
            assert!(is_right, "{granule} is told to differ and does not");
            start = granule.end();
        }
        drop(world);
        self.planted.told.push(range);
    }

    /// All was compared: all that was planted is found, but for what the guest has written to.
    pub(crate) fn verified(&mut self, state: Verified) {
        let recorded = &self.guests.recorded[self.planted.recorded..];
        match state {
            Verified::Running => panic!("that is no end"),
            Verified::Cut => {
                let damaged = std::mem::take(&mut self.planted.damaged);
                self.planted.stale.extend(damaged);
            }
            Verified::Whole => {
                for &block in self.planted.damaged.iter().chain(&self.planted.older) {
                    let granule = self.granule_of(block);
                    let is_told = self.planted.told.iter().any(|told| told.overlaps(granule));
                    let written = self.unit_of(block);
                    let blocks = written.start() / BLOCK..written.end() / BLOCK;
                    let is_written = recorded.iter().any(|range| range.overlaps(written))
                        || blocks.clone().any(|block| {
                            let blocks = self.world.borrow().disks[SOURCE].blocks.len();
                            (block as usize) < blocks && self.guests.is_busy(block as usize)
                        });
                    assert!(
                        is_told || is_written,
                        "block {block} was damaged and nobody has told"
                    );
                    self.report.found += u64::from(is_told);
                }
                self.planted.damaged.clear();
                self.planted.stale.clear();
                self.report.verified += 1;
            }
        }
        self.planted.older.clear();
        self.planted.told.clear();
    }

    /// What is damaged still is not the job's fault, nor the guest's.
    pub(crate) fn mend(&mut self) {
        let mut world = self.world.borrow_mut();
        for block in 0..world.disks[SOURCE].blocks.len() {
            let is_defined =
                world.disks[SOURCE].blocks[block].content != blockjob::Content::Undefined;
            if self.is_damaged(block) && is_defined {
                let start = block * BLOCK as usize;
                let end = (start + BLOCK as usize).min(world.disks[SOURCE].bytes.len());
                let bytes = world.disks[SOURCE].bytes[start..end].to_vec();
                world.disks[TARGET].bytes[start..end].copy_from_slice(&bytes);
            }
        }
    }
}
