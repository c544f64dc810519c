//! A disk in memory whose requests take their time, land in two halves, in any order, also when nobody
//! waits for them any more, and fail when the plan says so.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blockjob::io::{BlockDevice, BufResult, BufferPool, ReadAt, WriteAt};
use blockjob::{ByteRange, Content, Extent, Limits, Unmap};

use super::world::{Happening, JobAnswer, Loss, Shared, World};

/// What is known per block of the medium.
pub(crate) const BLOCK: u64 = 512;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub content: Content,
    pub in_top: bool,
}

/// How often requests of each kind fail: one in so many, never for 0.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    pub read: u64,
    pub write: u64,
    pub zero: u64,
    pub flush: u64,
    pub status: u64,
    pub is_no_space: bool,
    /// Whether the requests of guests never fail.
    pub spares_guests: bool,
    /// Micros after which nothing fails any more.
    pub until: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub low: u64,
    pub high: u64,
    /// One in so many takes a hundred times as long.
    pub stall: u64,
}

pub(crate) struct Disk {
    pub limits: Limits,
    pub bytes: Vec<u8>,
    pub blocks: Vec<Block>,
    pub latency: Latency,
    pub faults: Faults,
    /// For a target that fills clusters: those that have storage.
    pub allocated: Vec<bool>,
    pub requests: BTreeMap<u64, Request>,
    next_id: u64,
    settling: Vec<Waker>,
    /// Writes by the job that were answered.
    pub written: u64,
    /// How many of them the last good flush covers.
    pub flushed: u64,
    pub good_flushes: u64,
    /// No job writes here any more: the guest does.
    pub is_guests: bool,
    /// What guests write here is the second half of active writes: it counts as the job's.
    pub is_copied_to: bool,
    pub writes_in_flight_max: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Future,
    /// Its future was dropped.
    Nobody,
    Guest(usize),
    Queue,
}

#[derive(Debug)]
pub(crate) enum Ask {
    Read,
    Write(Vec<u8>),
    Zero,
    Discard,
    Flush,
    Status,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub owner: Owner,
    pub range: ByteRange,
    pub ask: Ask,
    pub is_answered: bool,
    pub error: Option<io::ErrorKind>,
    /// How much of a failing write lands.
    lands: u64,
    /// What was read.
    pub buf: Vec<u8>,
    pub extent: Option<Extent>,
    waker: Option<Waker>,
    flush_covers: u64,
    seed: u64,
}

impl Disk {
    pub(crate) fn new(limits: Limits, latency: Latency, faults: Faults) -> Self {
        let blocks = limits.len.div_ceil(BLOCK) as usize;
        let clusters = limits
            .cluster
            .map_or(0, |cluster| limits.len.div_ceil(cluster.into()));
        Self {
            bytes: vec![0; limits.len as usize],
            blocks: vec![
                Block {
                    content: Content::Zero,
                    in_top: false
                };
                blocks
            ],
            limits,
            latency,
            faults,
            allocated: vec![false; clusters as usize],
            requests: BTreeMap::new(),
            next_id: 0,
            settling: Vec::new(),
            written: 0,
            flushed: 0,
            good_flushes: 0,
            is_guests: false,
            is_copied_to: false,
            writes_in_flight_max: 0,
        }
    }

    pub(crate) fn blocks_of(&self, range: ByteRange) -> std::ops::Range<usize> {
        (range.start() / BLOCK) as usize..range.end().div_ceil(BLOCK) as usize
    }

    /// Nobody waits for anything any more.
    pub(super) fn end_of_process(&mut self) {
        let is_idle = self.requests.values().all(|request| request.is_answered);
        assert!(is_idle, "a request is still in flight");
        self.requests.clear();
        self.settling.clear();
    }

    /// Whether something may still change it.
    pub(crate) fn is_busy(&self) -> bool {
        self.requests.values().any(|request| !request.is_answered)
    }

    /// Blocks that lie in `range` wholly; the last one of the disk may be short.
    fn whole_blocks(&self, range: ByteRange) -> std::ops::Range<usize> {
        let end = if range.end() == self.limits.len {
            range.end().div_ceil(BLOCK)
        } else {
            range.end() / BLOCK
        };
        let start = range.start().div_ceil(BLOCK);
        start as usize..end.max(start) as usize
    }

    /// The job's requests keep to what the disk has said of itself, and never overlap.
    fn check(&self, owner: Owner, range: ByteRange, ask: &Ask) {
        if matches!(owner, Owner::Guest(_)) && !self.is_copied_to {
            return;
        }
        assert!(range.end() <= self.limits.len, "a request past the end");
        let aligned = |align: u64, what: &str| {
            let at_end = range.end() == self.limits.len;
            assert!(
                range.start().is_multiple_of(align)
                    && (at_end || range.end().is_multiple_of(align)),
                "{what} {range} is not aligned to {align}"
            );
        };
        match ask {
            Ask::Read | Ask::Write(_) => {
                aligned(self.limits.request_align.into(), "transfer");
                assert!(range.len() <= self.limits.max_transfer.into(), "too long");
                assert!(!range.is_empty());
            }
            Ask::Zero => {
                let limits = self.limits.write_zeroes.expect("it can zero");
                aligned(limits.align.into(), "zeroes");
                assert!(range.len() <= limits.max, "too many zeroes");
            }
            Ask::Discard => {
                let limits = self.limits.discard.expect("it can discard");
                aligned(limits.align.into(), "discard");
                assert!(range.len() <= limits.max, "too much discarded");
            }
            Ask::Flush | Ask::Status => {}
        }
        if ask.writes() {
            assert!(!self.is_guests, "the job wrote {range} to the guest's disk");
            for other in self.requests.values() {
                assert!(
                    !(other.ask.writes() && !other.is_answered && other.range.overlaps(range)),
                    "{range} is written while {} is",
                    other.range
                );
            }
        }
    }

    /// A part of a request touches the medium.
    fn touch(&mut self, id: u64, half: u8) {
        let request = self.requests.remove(&id).expect("it was made");
        let (first, second) = request
            .range
            .split_at(request.range.start() + (request.seed % (request.range.len() + 1)));
        let part = match half {
            0 => first,
            _ => second,
        };
        let lands = ByteRange::from(request.range.start()..request.range.start() + request.lands);
        let part = match request.error {
            Some(_) => part.intersection(lands),
            None => part,
        };
        let mut request = request;
        self.apply(&mut request, part);
        self.requests.insert(id, request);
    }

    fn apply(&mut self, request: &mut Request, part: ByteRange) {
        let at = part.start() as usize..part.end() as usize;
        let offset = part.start().saturating_sub(request.range.start()) as usize;
        match &request.ask {
            _ if part.is_empty() && !matches!(request.ask, Ask::Status) => {}
            Ask::Read => {
                let len = at.len();
                request.buf[offset..offset + len].copy_from_slice(&self.bytes[at]);
                // What is undefined is something else each time.
                for index in self.blocks_of(part) {
                    if self.blocks[index].content == Content::Undefined {
                        let block =
                            ByteRange::from(index as u64 * BLOCK..(index as u64 + 1) * BLOCK)
                                .intersection(part);
                        let start = (block.start() - request.range.start()) as usize;
                        request.buf[start..start + block.len() as usize]
                            .fill(request.seed as u8 ^ 0x5a);
                    }
                }
            }
            Ask::Write(data) => {
                let data = data[offset..offset + at.len()].to_vec();
                self.fill_clusters(part);
                self.bytes[at].copy_from_slice(&data);
                for index in self.blocks_of(part) {
                    self.blocks[index] = Block {
                        content: Content::Data,
                        in_top: true,
                    };
                }
            }
            Ask::Zero => {
                self.fill_clusters(part);
                self.bytes[at].fill(0);
                let whole = self.whole_blocks(part);
                for index in self.blocks_of(part) {
                    let content = match whole.contains(&index) {
                        true => Content::Zero,
                        false if self.blocks[index].content == Content::Zero => Content::Zero,
                        false => Content::Data,
                    };
                    self.blocks[index] = Block {
                        content,
                        in_top: true,
                    };
                }
            }
            Ask::Discard => {
                for index in self.whole_blocks(part) {
                    let start = (index as u64 * BLOCK) as usize;
                    let end = (start + BLOCK as usize).min(self.bytes.len());
                    self.bytes[start..end].fill(request.seed as u8 ^ 0xa5);
                    self.blocks[index] = Block {
                        content: Content::Undefined,
                        in_top: true,
                    };
                }
            }
            Ask::Status => request.extent = Some(self.status(request.range, request.seed)),
            Ask::Flush => {}
        }
    }

    /// A write to a part of a cluster without storage fills the rest with what does not belong there.
    fn fill_clusters(&mut self, part: ByteRange) {
        if !self.limits.fills_clusters {
            return;
        }
        let size = u64::from(self.limits.cluster.expect("a size of clusters"));
        for index in part.start() / size..part.end().div_ceil(size) {
            if std::mem::replace(&mut self.allocated[index as usize], true) {
                continue;
            }
            let cluster = index * size..((index + 1) * size).min(self.limits.len);
            self.bytes[cluster.start as usize..cluster.end as usize].fill(0xee);
        }
    }

    fn status(&self, range: ByteRange, seed: u64) -> Extent {
        let mut blocks = self.blocks_of(range);
        let first = self.blocks[blocks.next().expect("not empty")];
        // Sometimes the disk does not look closely, or not far.
        let content = match seed % 8 {
            0 if first.content == Content::Zero => Content::Data,
            _ => first.content,
        };
        let most = match seed / 8 % 4 {
            0 => 1 + (seed / 32 % 4) as usize,
            _ => usize::MAX,
        };
        let mut len = BLOCK - range.start() % BLOCK;
        let others = blocks.take_while(|&index| {
            let block = self.blocks[index];
            block.content == first.content && block.in_top == first.in_top
        });
        len += BLOCK * others.count().min(most - 1) as u64;
        if seed.is_multiple_of(61) {
            // It does not know.
            len = 0;
        }
        Extent {
            len,
            content,
            in_top: first.in_top,
        }
    }
}

impl Ask {
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Ask::Write(_) | Ask::Zero | Ask::Discard)
    }
}

impl World {
    /// Makes a request of a disk.
    pub(crate) fn submit(&mut self, disk: usize, owner: Owner, range: ByteRange, ask: Ask) -> u64 {
        let seed = self.rng.next();
        self.disks[disk].check(owner, range, &ask);
        let latency = self.disks[disk].latency;
        let mut delay = self.rng.between(latency.low, latency.high);
        if self.rng.one_in(latency.stall) {
            delay *= 100;
        }
        let faults = self.disks[disk].faults;
        let rate = match ask {
            Ask::Read => faults.read,
            Ask::Write(_) => faults.write,
            Ask::Zero | Ask::Discard => faults.zero,
            Ask::Flush => faults.flush,
            Ask::Status => faults.status,
        };
        let is_spared = faults.spares_guests && matches!(owner, Owner::Guest(_));
        let fails = !is_spared && self.now < faults.until && self.rng.one_in(rate);
        let error = fails.then_some(match faults.is_no_space {
            true => io::ErrorKind::StorageFull,
            false => io::ErrorKind::Other,
        });
        let lands = self.rng.between(0, range.len());
        for half in 0..2 {
            let at = self.rng.between(0, delay);
            if half == 0 || range.len() > 1 {
                let request = self.disks[disk].next_id;
                self.after(
                    at,
                    Happening::Touch {
                        disk,
                        request,
                        half,
                    },
                );
            }
        }
        let target = &mut self.disks[disk];
        let id = target.next_id;
        target.next_id += 1;
        let buf = match ask {
            Ask::Read => vec![0xcc; range.len() as usize],
            _ => Vec::new(),
        };
        target.requests.insert(
            id,
            Request {
                owner,
                range,
                flush_covers: target.written,
                ask,
                is_answered: false,
                error,
                lands,
                buf,
                extent: None,
                waker: None,
                // The split must not fall where a length of one leaves the first half empty.
                seed: if range.len() == 1 { seed | 1 } else { seed },
            },
        );
        let in_flight = target
            .requests
            .values()
            .filter(|request| request.ask.writes() && !request.is_answered)
            .count();
        target.writes_in_flight_max = target.writes_in_flight_max.max(in_flight);
        // After all of it has touched the medium.
        self.after(delay + 1, Happening::Answer { disk, request: id });
        id
    }

    pub(crate) fn touch(&mut self, disk: usize, request: u64, half: u8) {
        self.disks[disk].touch(request, half);
    }

    /// Answers a request. What has not touched the medium yet does so first.
    pub(crate) fn answer(&mut self, disk: usize, id: u64) {
        let target = &mut self.disks[disk];
        let request = target.requests.get_mut(&id).expect("it was made");
        request.is_answered = true;
        let waker = request.waker.take();
        let owner = request.owner;
        if !matches!(owner, Owner::Guest(_)) || target.is_copied_to {
            if request.ask.writes() {
                target.written += 1;
            }
            if matches!(request.ask, Ask::Flush) && request.error.is_none() {
                target.flushed = target.flushed.max(request.flush_covers);
                target.good_flushes += 1;
            }
        }
        if let (Some(answers), Owner::Future | Owner::Queue) = (&mut self.job_answers, owner) {
            answers.push(JobAnswer {
                disk,
                request: id,
                range: request.range,
                is_write: request.ask.writes(),
                is_status: matches!(request.ask, Ask::Status),
                is_good: request.error.is_none(),
            });
        }
        match owner {
            Owner::Guest(guest) => self.guest_answers.push((guest, id)),
            Owner::Queue => self.queue_answers.push((disk, id)),
            Owner::Future => waker.into_iter().for_each(Waker::wake),
            Owner::Nobody => {
                self.disks[disk].requests.remove(&id);
            }
        }
        for waker in std::mem::take(&mut self.disks[disk].settling) {
            waker.wake();
        }
    }

    /// Takes a request that was answered.
    pub(crate) fn take(&mut self, disk: usize, id: u64) -> Request {
        self.disks[disk]
            .requests
            .remove(&id)
            .expect("it was answered")
    }
}

/// A disk as a job sees it.
#[derive(Clone)]
pub(crate) struct SimDevice {
    pub world: Shared,
    pub disk: usize,
    /// How often a future lets others go first before it makes its request, at most.
    pub yields: u64,
}

struct Io {
    device: SimDevice,
    yields: u64,
    ask: Option<(ByteRange, Ask)>,
    /// While the request is out.
    id: Option<u64>,
}

impl Drop for Io {
    fn drop(&mut self) {
        let Some(id) = self.id else {
            return;
        };
        let mut world = self.device.world.borrow_mut();
        let requests = &mut world.disks[self.device.disk].requests;
        let request = requests.get_mut(&id).expect("it was made");
        let loss = match request.ask {
            Ask::Status => None,
            Ask::Flush => Some(Loss::Flush),
            _ => Some(Loss::Range(request.range)),
        };
        if request.is_answered {
            requests.remove(&id);
        } else {
            request.owner = Owner::Nobody;
        }
        let loss = loss.map(|loss| (self.device.disk, loss));
        world.job_losses.extend(loss);
    }
}

impl Future for Io {
    type Output = Request;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Request> {
        if self.yields > 0 {
            self.yields -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let disk = self.device.disk;
        let world = Rc::clone(&self.device.world);
        let mut world = world.borrow_mut();
        if let Some((range, ask)) = self.ask.take() {
            self.id = Some(world.submit(disk, Owner::Future, range, ask));
        }
        let id = self.id.expect("it is out");
        let request = world.disks[disk]
            .requests
            .get_mut(&id)
            .expect("it was made");
        if !request.is_answered {
            request.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.id = None;
        Poll::Ready(world.take(disk, id))
    }
}

impl SimDevice {
    fn ask(&self, range: ByteRange, ask: Ask) -> Io {
        let yields = self.world.borrow_mut().rng.between(0, self.yields);
        Io {
            device: self.clone(),
            yields,
            ask: Some((range, ask)),
            id: None,
        }
    }

    async fn plain(&self, range: ByteRange, ask: Ask) -> io::Result<()> {
        result_of(&self.ask(range, ask).await)
    }
}

pub(crate) fn result_of(request: &Request) -> io::Result<()> {
    request.error.map_or(Ok(()), |kind| Err(kind.into()))
}

impl BlockDevice for SimDevice {
    type Buf = Vec<u8>;

    fn limits(&self) -> Limits {
        self.world.borrow().disks[self.disk].limits
    }
}

impl ReadAt for SimDevice {
    async fn read_at(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        let range = ByteRange::at(offset, buf.len() as u64).expect("in range");
        let request = self.ask(range, Ask::Read).await;
        (result_of(&request), request.buf)
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let request = self.ask(range, Ask::Status).await;
        result_of(&request)?;
        Ok(request.extent.expect("it was looked at"))
    }
}

impl WriteAt for SimDevice {
    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        let range = ByteRange::at(offset, buf.len() as u64).expect("in range");
        let request = self.ask(range, Ask::Write(buf)).await;
        let result = result_of(&request);
        let Ask::Write(buf) = request.ask else {
            unreachable!("it was a write");
        };
        (result, buf)
    }

    async fn read_back(&self, offset: u64, buf: Vec<u8>) -> BufResult<Vec<u8>> {
        ReadAt::read_at(self, offset, buf).await
    }

    async fn write_zeroes(&self, range: ByteRange, _: Unmap) -> io::Result<()> {
        self.plain(range, Ask::Zero).await
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.plain(range, Ask::Discard).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.plain(ByteRange::from(0..0), Ask::Flush).await
    }

    async fn settle(&self) {
        std::future::poll_fn(|cx| {
            let mut world = self.world.borrow_mut();
            let disk = &mut world.disks[self.disk];
            let is_settled = disk
                .requests
                .values()
                .all(|request| request.is_answered || matches!(request.owner, Owner::Guest(_)));
            if is_settled {
                return Poll::Ready(());
            }
            disk.settling.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Plain vectors.
pub(crate) struct VecPool;

impl BufferPool for VecPool {
    type Buf = Vec<u8>;

    fn take(&self, len: usize) -> io::Result<Vec<u8>> {
        Ok(vec![0xdd; len])
    }

    fn put(&self, _: Vec<u8>) {}
}
