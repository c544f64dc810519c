//! One disk and its backup: how it is driven, and what the model knows of it.

use super::*;

/// Gives the machine back to its place when the driver is dropped.
struct PutBack {
    slot: Slot,
    backup: Option<Backup>,
}

impl Drop for PutBack {
    fn drop(&mut self) {
        *self.slot.borrow_mut() = self.backup.take();
    }
}

pub(crate) fn drive(world: &Shared, member: usize, slot: &Slot, crew: usize) -> Driving {
    let device = |side| SimDevice {
        world: Rc::clone(world),
        disk: disk_of(member, side),
    };
    let driver = Driver::with_pool(
        device(SOURCE),
        device(TARGET),
        VecPool,
        SimClock(Rc::clone(world)),
    );
    let backup = slot.borrow_mut().take();
    let mut put_back = PutBack {
        slot: Rc::clone(slot),
        backup,
    };
    let rng = Rng::new(world.borrow_mut().rng.next());
    let clock = SimClock(Rc::clone(world));
    Box::pin(async move {
        let backup = put_back.backup.as_mut().expect("nobody else drives it");
        if crew == 1 {
            return driver.run_backup(backup).await;
        }
        let all = &driver.crew(backup);
        let clock = &clock;
        let start = |index| async move {
            if index < 2 {
                return all.run_backup().await;
            }
            // One that only saves, for any guest, and comes back each time.
            loop {
                let until = clock.now() + Duration::from_micros(30);
                all.save_for(clock.sleep_until(until)).await;
            }
        };
        Several::new(crew, 40, rng, start).await
    })
}

impl Member {
    pub(crate) fn new(plan: MemberPlan, node: &Node) -> Self {
        let backup = Backup::new(node, plan.source, plan.target, plan.options.clone())
            .unwrap_or_else(|error| panic!("{error}: {plan:?}"));
        let len = plan.source.len;
        let granules = len.div_ceil(plan.granularity) as usize;
        Self {
            job: backup.job().clone(),
            cluster: backup.cluster_size(),
            machine: match plan.uses_queue {
                true => Machine::Queue(Box::new(Queue::new(backup, VecPool))),
                false => Machine::Future {
                    slot: Rc::new(RefCell::new(Some(backup))),
                    driving: None,
                },
            },
            flag: Flag::new(),
            ids: BTreeMap::new(),
            lost: BTreeSet::new(),
            settling: Vec::new(),
            timer: u64::MAX,
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

    /// The machine, if nobody else has it just now.
    pub(crate) fn with_backup<R>(&self, look: impl FnOnce(&Backup) -> R) -> Option<R> {
        match &self.machine {
            Machine::Queue(queue) => Some(look(queue.machine())),
            Machine::Future { slot, .. } => slot.borrow().as_ref().map(look),
            Machine::Gone => None,
        }
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

    pub(crate) fn submit(&mut self, member: usize, world: &mut World, request: Request<Vec<u8>>) {
        let Machine::Queue(queue) = &mut self.machine else {
            unreachable!("it has asked");
        };
        let side = match request.side {
            Side::Source => SOURCE,
            Side::Target | Side::Buffer => TARGET,
        };
        let none = ByteRange::from(0..0);
        let (range, ask) = match request.work {
            Work::Read { offset, buf } => {
                (ByteRange::at(offset, buf.len() as u64).unwrap(), Ask::Read)
            }
            Work::Write { offset, buf } => (
                ByteRange::at(offset, buf.len() as u64).unwrap(),
                Ask::Write(buf),
            ),
            Work::Status(range) => (range, Ask::Status),
            Work::WriteZeroes(range, _) => (range, Ask::Zero),
            Work::Discard(range) => (range, Ask::Discard),
            Work::Flush => (none, Ask::Flush),
            Work::Settle => return self.settling.push(request.id),
            Work::WriteCompressed { .. } | Work::CopyFromSource(_) | Work::Compare { .. } => {
                unreachable!("not offered")
            }
            Work::CancelInFlight => {
                let now = world.time();
                return queue.completed(now, request.id, Answer::Plain(Ok(())));
            }
        };
        let disk = disk_of(member, side);
        let id = world.submit(disk, Owner::Queue, range, ask);
        self.ids.insert((disk, id), request.id);
    }

    pub(crate) fn answer(&mut self, world: &mut World, disk: usize, id: u64) {
        let request = world.take(disk, id);
        let result = result_of(&request);
        let answer = match request.ask {
            Ask::Read => Answer::Transfer(result, request.buf),
            Ask::Write(buf) => Answer::Transfer(result, buf),
            Ask::Status => Answer::Status(result.map(|()| request.extent.unwrap())),
            Ask::Zero | Ask::Discard | Ask::Flush => Answer::Plain(result),
        };
        let id = self.ids.remove(&(disk, id)).expect("it was submitted");
        if let Machine::Queue(queue) = &mut self.machine {
            queue.completed(world.time(), id, answer);
            self.flag.clone().wake_it();
        }
    }

    pub(crate) fn settle(&mut self, member: usize, world: &World) {
        let is_settled = world.disks[disk_of(member, TARGET)]
            .requests
            .values()
            .all(|request| matches!(request.owner, Owner::Guest(_)));
        if !is_settled {
            return;
        }
        for id in std::mem::take(&mut self.settling) {
            if let Machine::Queue(queue) = &mut self.machine {
                queue.completed(world.time(), id, Answer::Plain(Ok(())));
                self.flag.clone().wake_it();
            }
        }
    }

    /// What is out is lost: the machine will not hear of it, and has to do it again.
    pub(crate) fn lose(&mut self, member: usize, world: &World) {
        self.settling.clear();
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
