//! One disk and its backup, and what the model knows of it.

use super::*;

impl Member {
    pub(crate) fn new(plan: MemberPlan, node: &Node, source: usize) -> Self {
        let backup = Backup::new(node, plan.source, plan.target, plan.options.clone())
            .unwrap_or_else(|error| panic!("{error}: {plan:?}"));
        let len = plan.source.len;
        let granules = len.div_ceil(plan.granularity) as usize;
        Self {
            job: backup.job().clone(),
            cluster: backup.cluster_size(),
            driving: Driving::new(backup, source, plan.uses_queue),
            lost: BTreeSet::new(),
            is_driven: true,
            events: Vec::new(),
            holds: Vec::new(),
            instant: None,
            landed: vec![false; len.div_ceil(BLOCK) as usize],
            again: Vec::new(),
            before: vec![false; granules],
            since: vec![false; granules],
            is_recording: plan.options.bitmap.is_some(),
            waits: vec![None; plan.threads],
            has_lost_flush: false,
            plan,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.plan.source.len
    }

    pub(crate) fn clusters(&self) -> usize {
        self.len().div_ceil(self.cluster) as usize
    }

    pub(crate) fn is_over(&self) -> bool {
        self.job.query().status >= Status::Concluded
    }

    pub(crate) fn has_run(&self) -> bool {
        let is_running = |event: &Event| matches!(event, Event::Status(Status::Running));
        self.events.iter().any(is_running)
    }

    pub(crate) fn is_ending(&self) -> bool {
        let info = self.job.query();
        info.error.is_some() || info.cancel.is_some()
    }

    /// What the target may lack, by the model.
    pub(crate) fn is_missing(&self, cluster: usize) -> bool {
        let range = cluster_at(cluster, self.cluster, self.len());
        !self.landed[units(range, BLOCK)]
            .iter()
            .all(|&landed| landed)
    }

    /// The machine has been told what became of something.
    pub(crate) fn heard_of(&mut self, range: ByteRange, is_good: bool) {
        if is_good {
            for cluster in units(range, self.cluster) {
                let whole = cluster_at(cluster, self.cluster, self.len());
                if let Some(again) = self.again.get_mut(cluster) {
                    *again |= !range.contains_range(whole);
                }
            }
            return self.landed[units(range, BLOCK)].fill(true);
        }
        for cluster in units(range, self.cluster) {
            let whole = cluster_at(cluster, self.cluster, self.len());
            self.landed[units(whole, BLOCK)].fill(false);
            if let Some(again) = self.again.get_mut(cluster) {
                *again = true;
            }
        }
    }

    pub(crate) fn record(&mut self, range: ByteRange) {
        if self.plan.options.bitmap.is_none() || !self.is_recording {
            return;
        }
        let granules = units(range, self.plan.granularity);
        match &self.instant {
            None => self.before[granules].fill(true),
            Some(_) => self.since[granules].fill(true),
        }
    }

    /// Nothing has come of the instant.
    pub(crate) fn forget_instant(&mut self) {
        self.instant = None;
        for (before, since) in self.before.iter_mut().zip(&mut self.since) {
            *before |= std::mem::replace(since, false);
        }
    }

    /// What the source holds now is what is to be backed up.
    pub(crate) fn begin(&mut self, source: &Disk) {
        let (len, cluster) = (self.len(), self.cluster);
        let clusters = self.clusters();
        let by_bitmap = |index: usize| {
            let range = cluster_at(index, cluster, len);
            let granules = units(range, self.plan.granularity);
            self.before[granules].iter().any(|&dirty| dirty)
        };
        let in_top = |index: usize| {
            let range = cluster_at(index, cluster, len);
            source.blocks[units(range, BLOCK)]
                .iter()
                .any(|block| block.in_top)
        };
        let all = |_: usize| true;
        let of = |wanted: &dyn Fn(usize) -> bool| (0..clusters).map(wanted).collect();
        let (must, may) = match self.plan.options.sync {
            BackupSync::Bitmap | BackupSync::Incremental => (of(&by_bitmap), of(&by_bitmap)),
            BackupSync::Top => (of(&in_top), of(&all)),
            BackupSync::Full | BackupSync::None => (of(&all), of(&all)),
        };
        self.landed.fill(false);
        self.again = vec![false; clusters];
        self.instant = Some(Instant {
            bytes: source.bytes.clone(),
            blocks: source.blocks.clone(),
            must,
            may,
        });
    }

    /// What is out is lost: the machine will not hear of it, and has to do it again.
    pub(crate) fn lose(&mut self, member: usize, world: &World) {
        for side in [SOURCE, TARGET] {
            let disk = disk_of(member, side);
            for (&id, request) in &world.disks[disk].requests {
                let is_known = !self.lost.contains(&(disk, id));
                // Requests of futures are lost when those are dropped.
                if request.owner == Owner::Queue && is_known && !request.is_answered {
                    self.lost.insert((disk, id));
                    match request.ask {
                        Ask::Status => {}
                        Ask::Flush => self.has_lost_flush = true,
                        _ => self.heard_of(request.range, false),
                    }
                }
            }
        }
    }
}
