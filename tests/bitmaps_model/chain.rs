//! A chain of backups by bitmaps, against its model.

use super::*;
use blockjob::{HBitmap, TransactionError};

const DISKS: usize = 2;
const LEN: u64 = 40 * 512 + 100;

/// The bytes of both disks.
type Images = [Vec<u8>; DISKS];

struct Chain {
    rng: Rng,
    nodes: [Node; DISKS],
    disks: Images,
    /// What the backup medium has, as of the last backup that succeeded.
    backup: Images,
    /// What the disks were when each day of the chain began, oldest first, and its bitmaps' name. The last
    /// records.
    days: Vec<(String, Images)>,
    made: usize,
    /// How often a backup has failed, and how often it was restored and compared.
    failed: usize,
    restored: usize,
}

fn run(list: Transaction) -> Result<(), TransactionError> {
    let prepared = list.prepare().try_prepared();
    prepared
        .expect("no write is in flight")
        .map(Prepared::commit)
}

/// Copies what is dirty, but no more than so many runs. Whether that was all.
fn copy(dirty: &HBitmap, from: &[u8], to: &mut [u8], runs_max: usize) -> bool {
    let mut runs = dirty.runs();
    for run in runs.by_ref().take(runs_max) {
        let bytes = run.start() as usize..run.end() as usize;
        to[bytes.clone()].copy_from_slice(&from[bytes]);
    }
    runs.next().is_none()
}

impl Chain {
    fn new(seed: u64) -> Self {
        let disks: Images = std::array::from_fn(|_| vec![0; LEN as usize]);
        let mut chain = Self {
            rng: Rng::new(seed),
            nodes: std::array::from_fn(|_| Node::new(LEN)),
            backup: disks.clone(),
            disks,
            days: Vec::new(),
            made: 0,
            failed: 0,
            restored: 0,
        };
        // The bitmaps are there before the full backup is: else what is written between is lost.
        let day = chain.next_day(false).expect("nothing hinders it");
        chain.backup = chain.disks.clone();
        chain.days.push(day);
        chain
    }

    fn options(&mut self) -> BitmapOptions {
        let mut options = BitmapOptions::default();
        options.granularity = Some(granularity(self.rng.pick(&[512, 1024, 4096])));
        options
    }

    fn write(&mut self) {
        for _ in 0..self.rng.below(12) {
            let disk = self.rng.below(DISKS as u64) as usize;
            let start = self.rng.below(LEN);
            let end = LEN.min(start + self.rng.between(1, 1500));
            let begin = self.nodes[disk].begin_write((start..end).into());
            let ticket = begin.go().expect("nobody holds the node");
            let byte = self.rng.next() as u8;
            // One that fails may have landed in part.
            let landed = self.rng.between(start, end);
            self.disks[disk][start as usize..landed as usize].fill(byte);
            if self.rng.one_in(5) {
                drop(ticket);
            } else {
                self.disks[disk][start as usize..end as usize].fill(byte);
                ticket.finish(());
            }
        }
    }

    /// At one instant on all disks: the next bitmaps record, those before do not. Or not at all.
    fn next_day(&mut self, may_fail: bool) -> Option<(String, Images)> {
        self.made += 1;
        let name = format!("day{}", self.made);
        let last = self.days.last().map(|day| day.0.clone());
        let mut acts = Vec::new();
        for disk in 0..DISKS {
            let options = self.options();
            acts.push((disk, None, options));
            acts.extend(last.clone().map(|last| (disk, Some(last), options)));
        }
        if self.rng.one_in(2) {
            acts.reverse();
        }
        let abort_at = match may_fail && self.rng.one_in(4) {
            true => self.rng.below(acts.len() as u64 + 1) as usize,
            false => usize::MAX,
        };
        let mut list = Transaction::new();
        for (index, (disk, before, options)) in acts.iter().enumerate() {
            if index == abort_at {
                list.abort();
            }
            match before {
                None => list.add(&self.nodes[*disk], &name, *options),
                Some(before) => list.disable(&self.nodes[*disk], before),
            };
        }
        if abort_at == acts.len() {
            list.abort();
        }
        let is_given_up = may_fail && self.rng.one_in(6);
        let prepared = list.prepare().try_prepared().expect("nobody writes");
        match prepared {
            Ok(prepared) if !is_given_up => prepared.commit(),
            _ => {
                self.failed += 1;
                return None;
            }
        }
        Some((name, self.disks.clone()))
    }

    /// What was written since that day began, until the last one did.
    fn since(&mut self, first: usize, disk: usize) -> HBitmap {
        let node = &self.nodes[disk];
        let bitmaps = node.bitmaps();
        let names = self.days[first..self.days.len() - 1].iter();
        let sources: Vec<_> = names.map(|day| (node, &*day.0)).collect();
        let mut fine = BitmapOptions::default();
        fine.granularity = Some(granularity(512));
        bitmaps.add_disabled("since", fine).unwrap();
        bitmaps.merge("since", &sources).unwrap();
        let frozen = bitmaps.freeze("since").unwrap();
        let copy = (*frozen).clone();
        drop(frozen);
        bitmaps.remove("since").unwrap();
        copy
    }

    /// An incremental backup of all disks, which may fail on any.
    fn back_up(&mut self) {
        let Some(next) = self.next_day(true) else {
            return;
        };
        let now = next.1.clone();
        self.days.push(next);
        let mut copied = self.backup.clone();
        let before = self.days.len() - 2;
        let mut is_whole = true;
        for disk in 0..DISKS {
            let runs_max = match self.rng.one_in(3) {
                true => self.rng.below(4) as usize,
                false => usize::MAX,
            };
            let changed = self.since(before, disk);
            self.write();
            is_whole &= copy(&changed, &now[disk], &mut copied[disk], runs_max);
        }
        if is_whole {
            assert!(copied == now, "it is restored as it was");
            self.restored += 1;
            self.backup = copied;
            self.check_all_checkpoints(&now);
            return;
        }
        // As if nothing had happened.
        self.failed += 1;
        self.write();
        let (next, _) = self.days.pop().unwrap();
        let (last, _) = self.days.last().unwrap();
        let mut list = Transaction::new();
        for node in &self.nodes {
            list.merge(node, last, &[(node, &next)])
                .enable(node, last)
                .remove(node, &next);
        }
        run(list).unwrap();
    }

    /// From each checkpoint on, everything that has changed since is known.
    fn check_all_checkpoints(&mut self, now: &Images) {
        for first in 0..self.days.len() - 1 {
            for (disk, now) in now.iter().enumerate() {
                let mut restored = self.days[first].1[disk].clone();
                copy(&self.since(first, disk), now, &mut restored, usize::MAX);
                assert!(restored == *now, "since {}", self.days[first].0);
            }
        }
    }

    /// A checkpoint goes: the one before it takes over what it knew. The oldest just goes.
    fn drop_checkpoint(&mut self) {
        if self.days.len() < 2 {
            return;
        }
        let index = self.rng.below(self.days.len() as u64 - 1) as usize;
        let (name, _) = self.days.remove(index);
        let mut list = Transaction::new();
        for node in &self.nodes {
            if index > 0 {
                list.merge(node, &self.days[index - 1].0, &[(node, &name)]);
            }
            list.remove(node, &name);
        }
        run(list).unwrap();
    }

    /// What a backup job does with the bitmap that records: on success the successor takes its place, and on
    /// failure both are one again. Of all disks or of none.
    fn push(&mut self) {
        let last = self.days.last().unwrap().0.clone();
        let guards = self.nodes.each_ref().map(|node| quiesced(node).unwrap());
        let claim = |node: &Node| node.bitmaps().claim(&last, ClaimFor::Change).unwrap();
        let claims = self.nodes.each_ref().map(claim);
        drop(guards);
        let now = self.disks.clone();
        let mut copied = self.days.last().unwrap().1.clone();
        let mut is_whole = true;
        for (disk, claim) in claims.iter().enumerate() {
            self.write();
            let changed = claim.snapshot(SnapshotOf::Bitmap).unwrap();
            let runs_max = match self.rng.one_in(3) {
                true => self.rng.below(4) as usize,
                false => usize::MAX,
            };
            is_whole &= copy(&changed, &now[disk], &mut copied[disk], runs_max);
        }
        if is_whole {
            assert!(copied == now, "since the last one");
            claims.into_iter().for_each(BitmapClaim::abdicate);
            self.restored += 1;
            // Those who go by older checkpoints would miss what it had.
            while self.days.len() > 1 {
                let (name, _) = self.days.remove(0);
                for node in &self.nodes {
                    node.bitmaps().remove(&name).unwrap();
                }
            }
            self.days[0].1 = now.clone();
            self.backup = now;
        } else {
            self.failed += 1;
            drop(claims);
        }
    }

    fn run(&mut self) {
        for _ in 0..25 {
            self.write();
            match self.rng.below(6) {
                0..3 => self.back_up(),
                3 => self.drop_checkpoint(),
                _ => self.push(),
            }
            for node in &self.nodes {
                let bitmaps = node.bitmaps();
                bitmaps.check_invariants();
                let infos = bitmaps.query_all();
                let names = infos.iter().map(|info| &info.name);
                assert!(names.eq(self.days.iter().map(|day| &day.0)));
                let recording = infos.iter().filter(|info| info.is_recording);
                assert_eq!(recording.count(), 1, "exactly one records");
            }
        }
    }
}

#[test]
fn whatever_fails_each_backup_is_what_the_disks_were() {
    let (mut failed, mut restored) = (0, 0);
    for seed in 0..number("BITMAPS_SEEDS").unwrap_or(300) {
        let mut chain = Chain::new(seed);
        let run = std::panic::AssertUnwindSafe(|| chain.run());
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
        failed += chain.failed;
        restored += chain.restored;
    }
    assert!(failed > 300 && restored > 300, "{failed}, {restored}");
}

#[cfg(debug_assertions)]
#[test]
fn what_is_broken_is_noticed() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    for sabotage in [
        Sabotage::ReclaimForgetsSuccessor,
        Sabotage::KeepHalf,
        Sabotage::EndDisabled,
        Sabotage::ForgetDropped,
    ] {
        break_on_this_thread(Some(sabotage));
        let is_noticed = (0..100).any(|seed| {
            let run = move || Chain::new(seed).run();
            std::panic::catch_unwind(run).is_err()
        });
        break_on_this_thread(None);
        assert!(is_noticed, "{sabotage:?}");
    }
}
