//! Several tasks that drive one backup, and guests that save for themselves.

#![allow(clippy::disallowed_methods, reason = "these tests bring the threads")]

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use blockjob::Job;
use blockjob::sabotage::{Sabotage, break_on_this_thread};

use super::*;

const CLUSTER: u64 = 64 << 10;

/// A waker that notes that it was called.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A future that is polled by hand.
struct Task<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + 'a>>,
    flag: Arc<Flag>,
}

impl<'a, T> Task<'a, T> {
    fn new(future: impl Future<Output = T> + 'a) -> Self {
        let flag = Arc::new(Flag::default());
        flag.clone().wake();
        Self {
            future: Box::pin(future),
            flag,
        }
    }

    /// If it was woken.
    fn poll(&mut self) -> Poll<T> {
        if !self.flag.0.swap(false, Ordering::SeqCst) {
            return Poll::Pending;
        }
        let waker = Waker::from(Arc::clone(&self.flag));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }

    /// As often as it is woken.
    fn poll_on(&mut self) -> Option<T> {
        while self.flag.0.load(Ordering::SeqCst) {
            if let Poll::Ready(output) = self.poll() {
                return Some(output);
            }
        }
        None
    }
}

/// A disk whose reads are over when they are let.
struct Gated {
    memory: Memory,
    let_through: Mutex<BTreeSet<u64>>,
    waiting: Mutex<Vec<(u64, Waker)>>,
    /// Where also a question waits, as if it were a read one byte further on.
    asked_slowly: Mutex<Option<u64>>,
    /// Where the next read panics.
    panics_at: Mutex<Option<u64>>,
}

impl Gated {
    fn new(seed: u8) -> Self {
        Self {
            memory: Memory::new(seed),
            let_through: Mutex::default(),
            waiting: Mutex::default(),
            asked_slowly: Mutex::default(),
            panics_at: Mutex::default(),
        }
    }

    fn let_through(&self, offset: u64) {
        self.let_through.lock().insert(offset);
        let mut waiting = self.waiting.lock();
        waiting.retain(|(at, waker)| {
            if *at == offset {
                waker.wake_by_ref();
            }
            *at != offset
        });
    }

    async fn wait_at(&self, offset: u64) {
        std::future::poll_fn(|cx| {
            if self.let_through.lock().contains(&offset) {
                return Poll::Ready(());
            }
            self.waiting.lock().push((offset, cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    fn has_waiting(&self, offset: u64) -> bool {
        self.waiting.lock().iter().any(|(at, _)| *at == offset)
    }
}

impl BlockDevice for Gated {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.memory.limits
    }
}

impl ReadAt for Gated {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.wait_at(offset).await;
        let panics = self.panics_at.lock().take_if(|at| *at == offset);
        assert!(panics.is_none(), "a device that is broken");
        let at = offset as usize..offset as usize + buf.as_ref().len();
        buf.as_mut().copy_from_slice(&self.memory.bytes.lock()[at]);
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let is_slow = *self.asked_slowly.lock() == Some(range.start());
        if is_slow {
            self.wait_at(range.start() + 1).await;
        }
        Ok(Extent::data(range.len()))
    }
}

/// Bytes in memory. Each request is over when it was polled once.
struct AtOnce(Mutex<Vec<u8>>);

impl BlockDevice for AtOnce {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        Limits::new(self.0.lock().len() as u64)
    }
}

impl ReadAt for AtOnce {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let at = offset as usize..offset as usize + buf.as_ref().len();
        buf.as_mut().copy_from_slice(&self.0.lock()[at]);
        (Ok(()), buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range.len()))
    }
}

impl WriteAt for AtOnce {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        let at = offset as usize..offset as usize + buf.as_ref().len();
        self.0.lock()[at].copy_from_slice(buf.as_ref());
        (Ok(()), buf)
    }

    async fn write_zeroes(&self, _: ByteRange, _: Unmap) -> io::Result<()> {
        unreachable!("not offered")
    }

    async fn discard(&self, _: ByteRange) -> io::Result<()> {
        unreachable!("not offered")
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle(&self) {}
}

/// A backup that is started, with copies of one cluster.
fn started(
    node: &Node,
    source: &impl ReadAt,
    target: &impl WriteAt,
    change: impl FnOnce(&mut BackupOptions),
) -> Backup {
    let options = options(|options| {
        options.chunk_max = CLUSTER;
        change(options);
    });
    let backup = Backup::new(node, source.limits(), target.limits(), options).unwrap();
    backup.job().start().unwrap();
    backup
}

/// A disk whose reads wait, and an empty target.
fn gated() -> (Gated, AtOnce) {
    (Gated::new(1), AtOnce(Mutex::new(vec![0; LEN as usize])))
}

/// A clock by which a job is cancelled when somebody is about to wait.
struct CancelsLate(Mutex<Option<Job>>);

impl Clock for CancelsLate {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    async fn sleep_until(&self, _: Duration) {
        let job = self.0.lock().take();
        if let Some(job) = job {
            job.cancel(Cancel::Force).unwrap();
        }
        std::future::pending::<()>().await;
    }
}

/// Whether a job ends that is cancelled after its driver has looked, and before that waits.
fn is_cancel_heard() -> bool {
    let node = Node::new(LEN);
    let [source, target] = [1, 0].map(|byte| AtOnce(Mutex::new(vec![byte; LEN as usize])));
    // So slow that it waits after the first cluster.
    let mut backup = started(&node, &source, &target, |options| options.job.speed = 1);
    let clock = CancelsLate(Mutex::new(Some(backup.job().clone())));
    let driver = Driver::new(source, target, &clock);
    let mut run = Task::new(driver.run_backup(&mut backup));
    let ended = run.poll_on();
    assert!(clock.0.lock().is_none(), "it was about to wait");
    ended.is_some()
}

#[test]
fn what_happens_between_looking_and_waiting_is_seen() {
    assert!(is_cancel_heard());
    break_on_this_thread(Some(Sabotage::DoNotHearBell));
    let is_heard = is_cancel_heard();
    break_on_this_thread(None);
    assert!(!is_heard);
}

/// Whether a job ends of which a guest has saved the last cluster while nobody else had anything to do.
fn is_end_seen() -> bool {
    let node = Node::new(LEN);
    let (source, target) = gated();
    let instant = source.memory.bytes();
    let last = LEN / CLUSTER * CLUSTER;
    let mut backup = started(&node, &source, &target, |_| {});
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let mut run = Task::new(crew.run_backup());
    assert!(run.poll().is_pending());
    let queue = node.queue();
    let write = async { queue.begin_write((last..last + 1).into()).await };
    let mut guest = Task::new(crew.save_for(write));
    assert!(guest.poll().is_pending());
    assert!(source.has_waiting(last), "the guest copies it");
    for index in 0..last / CLUSTER {
        source.let_through(index * CLUSTER);
        let _ = run.poll();
    }
    // Also what it was told of the guest.
    while run.flag.0.load(Ordering::SeqCst) {
        assert!(run.poll().is_pending(), "the last cluster is missing");
    }
    source.let_through(last);
    let Poll::Ready(ticket) = guest.poll() else {
        panic!("it is saved");
    };
    ticket.unwrap().finish(());
    let polled = run.poll();
    if let Poll::Ready(result) = &polled {
        result.as_ref().unwrap();
        assert!(*target.0.lock() == instant);
    }
    polled.is_ready()
}

#[test]
fn a_guest_that_saves_the_last_cluster_has_the_job_end() {
    assert!(is_end_seen());
    break_on_this_thread(Some(Sabotage::SaveInSilence));
    let is_seen = is_end_seen();
    break_on_this_thread(None);
    assert!(!is_seen);
}

#[test]
fn a_guest_that_gives_up_leaves_what_it_was_saving_to_the_others() {
    let node = Node::new(LEN);
    let (source, target) = gated();
    let instant = source.memory.bytes();
    let mut backup = started(&node, &source, &target, |_| {});
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let mut run = Task::new(crew.run_backup());
    assert!(run.poll().is_pending());
    let queue = node.queue();
    let last = LEN / CLUSTER * CLUSTER;
    let write = async { queue.begin_write((last..last + 1).into()).await };
    let mut guest = Task::new(crew.save_for(write));
    assert!(guest.poll().is_pending());
    assert!(source.has_waiting(last));
    drop(guest);
    let polled = (0..=last / CLUSTER).find_map(|index| {
        source.let_through(index * CLUSTER);
        run.poll_on()
    });
    polled.expect("it is over").unwrap();
    assert!(*target.0.lock() == instant);
}

/// A member may have operations that it has not begun with: a device that yields has it come back to them later.
#[test]
fn what_a_member_has_not_begun_with_is_left_to_the_others_too() {
    let node = Node::new(LEN);
    let (source, target) = (Memory::new(1), Memory::new(2));
    let mut backup = started(&node, &source, &target, |_| {});
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let mut first = Task::new(crew.run_backup());
    let mut second = Task::new(crew.run_backup());
    assert!(first.poll().is_pending());
    assert!(second.poll().is_pending());
    drop(first);
    let result = second.poll_on();
    result.expect("it waits for ever").unwrap();
    assert!(target.bytes() == source.bytes());
}

/// With the last one that drives it the guest is let go, though another waits to save something.
#[test]
fn a_guest_that_saves_is_not_held_when_nobody_drives() {
    let node = Node::new(LEN);
    let (source, target) = (Memory::new(1), Memory::new(2));
    let mut backup = started(&node, &source, &target, |_| {});
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let queue = node.queue();
    let begin = || async { queue.begin_write((0..1).into()).await.unwrap() };
    let Poll::Ready(under_way) = Task::new(begin()).poll() else {
        panic!("nobody holds it");
    };
    let mut run = Task::new(crew.run_backup());
    assert!(run.poll().is_pending());
    let mut guest = Task::new(crew.save_for(begin()));
    assert!(guest.poll().is_pending(), "it is held for the instant");
    drop(run);
    let Poll::Ready(ticket) = guest.poll() else {
        panic!("nobody makes the instant");
    };
    ticket.finish(());

    // Nor is it held by one that was about to save something, and leaves.
    let mut other = Task::new(crew.save_for(std::future::pending::<()>()));
    assert!(other.poll().is_pending());
    let mut leaves = Task::new(crew.save_for(std::future::pending::<()>()));
    assert!(leaves.poll().is_pending());
    drop(leaves);
    let Poll::Ready(ticket) = Task::new(begin()).poll() else {
        panic!("nobody drives the job");
    };
    ticket.finish(());
    under_way.finish(());
    drop(other);
    let result = Task::new(crew.run_backup()).poll_on();
    result.expect("it waits for nothing").unwrap();
    assert!(target.bytes() == source.bytes());
}

/// Whether another goes on with what a guest has begun for others, when that has all it needs and waits only for
/// what is still in flight.
fn is_work_for_others_seen() -> bool {
    let node = Node::new(LEN);
    let (source, target) = gated();
    let mut backup = started(&node, &source, &target, |options| options.workers = 1);
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let mut run = Task::new(crew.run_backup());
    assert!(run.poll_on().is_none());
    let queue = &node.queue();
    let [asked, read, own] = [38, 39, 40].map(|cluster| cluster * CLUSTER);
    let begin = |at: u64| async move { queue.begin_write((at..at + 1).into()).await.unwrap() };
    *source.asked_slowly.lock() = Some(asked);
    let mut others = [Task::new(begin(asked)), Task::new(begin(read))];
    assert!(others.iter_mut().all(|other| other.poll().is_pending()));
    let mut guest = Task::new(crew.save_for(begin(own)));
    assert!(guest.poll_on().is_none());
    assert!(source.has_waiting(read) && source.has_waiting(own));
    assert!(run.poll_on().is_none());
    assert!(!source.has_waiting(asked));
    source.let_through(own);
    assert!(guest.poll_on().is_none(), "it is at something for others");
    assert!(run.poll_on().is_none());
    source.let_through(asked + 1);
    assert!(guest.poll_on().is_none());
    assert!(run.poll_on().is_none());
    let is_seen = source.has_waiting(asked);
    if !is_seen {
        return false;
    }
    source.let_through(read);
    source.let_through(asked);
    guest.poll_on().expect("all is done").finish(());
    assert!(run.poll_on().is_none());
    for other in &mut others {
        other.poll_on().expect("it is saved").finish(());
    }
    true
}

#[test]
fn what_a_guest_has_begun_for_others_is_gone_on_with() {
    assert!(is_work_for_others_seen());
    break_on_this_thread(Some(Sabotage::SaveInSilence));
    let is_seen = is_work_for_others_seen();
    break_on_this_thread(None);
    assert!(!is_seen);
}

/// What happens while a guest's write is begun is seen, though that panics.
#[test]
fn what_happens_before_a_guest_panics_is_seen() {
    let node = Node::new(LEN);
    let (source, target) = gated();
    let options = options(|options| options.chunk_max = CLUSTER);
    let mut backup = Backup::new(&node, source.limits(), target.limits(), options).unwrap();
    let job = backup.job().clone();
    job.start().unwrap();
    let driver = Driver::new(&source, &target, NoTime);
    let crew = driver.crew(&mut backup);
    let mut run = Task::new(crew.run_backup());
    assert!(run.poll_on().is_none());
    let write = async {
        job.set_speed(1).unwrap();
        panic!("the guest is gone");
    };
    let mut guest = Task::new(crew.save_for(write));
    let polled = catch_unwind(AssertUnwindSafe(|| guest.poll()));
    assert!(polled.is_err());
    assert!(run.flag.0.load(Ordering::SeqCst), "nobody has heard of it");
}

/// Runs a future on this thread.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Two threads drive, and two guests write: one saves for itself, one waits. Small clusters, so that they meet often.
#[test]
fn threads_that_drive_and_guests_that_save_copy_what_was() {
    let len = 16 << 20;
    for round in 0..8 {
        let byte = |at: usize| (at / 997) as u8 ^ round;
        let source = AtOnce(Mutex::new((0..len).map(byte).collect()));
        let target = AtOnce(Mutex::new(vec![0; len]));
        let instant = source.0.lock().clone();
        let node = Node::new(len as u64);
        let options = options(|options| {
            options.min_cluster_size = 4096;
            options.chunk_max = 4096 << (round % 3);
        });
        let mut backup = Backup::new(&node, source.limits(), target.limits(), options).unwrap();
        let job = backup.job().clone();
        job.start().unwrap();
        let driver = Driver::new(&source, &target, NoTime);
        let crew = &driver.crew(&mut backup);
        let guest = |seed: usize, saves: bool| {
            let (queue, source, job) = (node.queue(), &source, &job);
            move || {
                let mut writes = 0;
                while job.query().status < Status::Concluded || writes < 100 {
                    writes += 1;
                    let at = (writes * 7_919_111 + seed) % (len - 5000);
                    let range = (at as u64..at as u64 + 5000).into();
                    let write = async { queue.begin_write(range).await };
                    let ticket = match saves {
                        true => block_on(crew.save_for(write)),
                        false => block_on(write),
                    };
                    let ticket = ticket.unwrap();
                    source.0.lock()[at..at + 5000].fill(writes as u8);
                    ticket.finish(());
                }
            }
        };
        thread::scope(|scope| {
            // Before the guests: they write at once, and the instant is that of the first look.
            let other = scope.spawn(|| block_on(crew.run_backup()));
            while job.query().progress.total == 0 {
                thread::yield_now();
            }
            scope.spawn(guest(0, true));
            scope.spawn(guest(12_345, false));
            block_on(crew.run_backup()).unwrap();
            other.join().unwrap().unwrap();
        });
        assert!(*target.0.lock() == instant, "round {round}");
        assert!(*source.0.lock() != instant);
    }
}

/// What a member was at when a device panics is left to the others, whether it drives or saves for a guest.
#[test]
fn a_member_that_panics_leaves_its_work_to_the_others() {
    for saves in [false, true] {
        let node = Node::new(LEN);
        let (source, target) = gated();
        let instant = source.memory.bytes();
        let mut backup = started(&node, &source, &target, |_| {});
        let driver = Driver::new(&source, &target, NoTime);
        let crew = driver.crew(&mut backup);
        let mut first = Task::new(crew.run_backup());
        let mut second = Task::new(crew.run_backup());
        assert!(first.poll_on().is_none());
        assert!(second.poll_on().is_none());
        let queue = node.queue();
        let last = LEN / CLUSTER * CLUSTER;
        let write = async { queue.begin_write((last..last + 1).into()).await };
        let mut guest = Task::new(crew.save_for(write));
        assert!(guest.poll_on().is_none());
        let at = if saves { last } else { 0 };
        *source.panics_at.lock() = Some(at);
        source.let_through(at);
        let panicked = catch_unwind(AssertUnwindSafe(|| match saves {
            true => drop(guest.poll()),
            false => drop(first.poll()),
        }));
        assert!(panicked.is_err());
        let mut is_over = false;
        for cluster in 0..=last / CLUSTER {
            source.let_through(cluster * CLUSTER);
            if saves {
                is_over |= first.poll_on().is_some_and(|result| result.is_ok());
            } else if let Some(ticket) = guest.poll_on() {
                ticket.unwrap().cancel();
            }
            if !is_over {
                is_over = second.poll_on().is_some_and(|result| result.is_ok());
            }
        }
        assert!(is_over, "{saves}");
        assert!(*target.0.lock() == instant);
    }
}

/// Two mirrors of one group, each driven by two threads, wake each other. All come to the same end.
#[test]
fn mirrors_of_a_group_are_each_driven_by_two_threads() {
    const SHORT: usize = 256 << 10;
    for round in 0..40_u8 {
        let group = JobGroup::new();
        let disks = [1, 2].map(|seed| {
            let source = AtOnce(Mutex::new(vec![seed ^ round; SHORT]));
            (source, AtOnce(Mutex::new(vec![0; SHORT])))
        });
        let mut mirrors = disks.each_ref().map(|(source, target)| {
            let mut options = MirrorOptions::default();
            options.chunk_max = 4096;
            options.job.group = Some(group.clone());
            let node = Node::new(SHORT as u64);
            Mirror::new(&node, source.limits(), target.limits(), options).unwrap()
        });
        let jobs = mirrors.each_ref().map(|mirror| mirror.job().clone());
        for job in &jobs {
            job.start().unwrap();
        }
        let drivers = disks
            .each_ref()
            .map(|(source, target)| Driver::new(source, target, NoTime));
        let crews = drivers.iter().zip(&mut mirrors);
        let crews: Vec<_> = crews.map(|(driver, mirror)| driver.crew(mirror)).collect();
        let switches = AtomicUsize::new(0);
        thread::scope(|scope| {
            for crew in crews.iter().chain(&crews) {
                let switches = &switches;
                scope.spawn(move || {
                    loop {
                        match block_on(crew.run()) {
                            Driven::Switch(switch) => {
                                switches.fetch_add(1, Ordering::Relaxed);
                                switch.commit();
                            }
                            Driven::SwitchBack(_) => panic!("nobody declines"),
                            Driven::Done(result) => return result.unwrap(),
                        }
                    }
                });
            }
            for job in &jobs {
                while job.query().status != Status::Ready {
                    thread::yield_now();
                }
                job.complete().unwrap();
            }
        });
        assert_eq!(switches.into_inner(), 2);
        for (source, target) in &disks {
            assert!(*source.0.lock() == *target.0.lock(), "round {round}");
        }
    }
}

#[test]
fn others_on_the_thread_have_their_turn_between_two_operations() {
    let [source, target] = [1, 0].map(|byte| AtOnce(Mutex::new(vec![byte; LEN as usize])));
    let limits = Limits::new(LEN);
    let options = options(|options| options.chunk_max = CLUSTER);
    let mut backup = Backup::new(&Node::new(LEN), limits, limits, options).unwrap();
    backup.job().start().unwrap();
    let driver = Driver::new(&source, &target, NoTime);
    let mut task = Task::new(driver.run_backup(&mut backup));
    let mut copied = 0;
    let result = loop {
        assert!(task.flag.0.load(Ordering::SeqCst), "it forgets itself");
        if let Poll::Ready(result) = task.poll() {
            break result;
        }
        let now: u64 = target.0.lock().iter().map(|byte| u64::from(*byte)).sum();
        assert!(now <= copied + CLUSTER, "{} bytes at once", now - copied);
        copied = now;
    };
    result.unwrap();
    assert_eq!(copied, LEN);
}
