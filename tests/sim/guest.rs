//! Guest threads that write, zero and discard through the gate, and what they were told.

use std::sync::Arc;
use std::task::{Poll, Waker};

use blockjob::{
    Begin, ByteRange, Content, GuestQueue, Lane, Node, OwnedTicket, PendingWrite, TargetWrite,
};

use super::disk::{Ask, BLOCK, Owner};
use super::world::{Flag, Happening, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write(u64),
    Zero,
    Discard,
}

enum State {
    Idle,
    Waiting(PendingWrite<Arc<Lane>>, Kind),
    Writing {
        ticket: OwnedTicket,
        kind: Kind,
        disk: usize,
    },
    /// The write is on the source, and goes to the target.
    Copying {
        write: TargetWrite<Arc<Lane>>,
        range: ByteRange,
        disk: usize,
    },
}

struct Thread {
    /// Some threads have a queue of their own, others share the node's.
    queue: Option<GuestQueue>,
    state: State,
    flag: Arc<Flag>,
}

pub(crate) struct Guests {
    node: Node,
    threads: Vec<Thread>,
    /// What the first thread is called in the world.
    base: usize,
    /// What the disk holds, by all that was answered.
    pub model: Vec<u8>,
    /// Blocks whose content is undefined.
    pub undefined: Vec<bool>,
    /// Blocks that a write in flight touches.
    busy: Vec<bool>,
    /// The disk that the guest is on.
    pub current: usize,
    /// No new writes from then on.
    pub until: u64,
    pub pause: (u64, u64),
    pub len_max: u64,
    pub discards: bool,
    /// Of eight writes so many are of zeroes.
    pub zeroes: u64,
    pub writes: u64,
    /// Writes that were refused: nothing is changed by one.
    pub refused: u64,
    /// The target that active writes go to as well.
    pub copies_to: Option<usize>,
    /// How many have.
    pub copied: u64,
    /// Everything that was recorded, in order, until somebody takes it.
    pub recorded: Vec<ByteRange>,
}

impl Guests {
    /// So many threads of a guest on the disk `source`. The world knows them from `base` on.
    pub(crate) fn new(
        node: &Node,
        world: &mut World,
        source: usize,
        base: usize,
        threads: usize,
    ) -> Self {
        let disk = &world.disks[source];
        let undefined = disk
            .blocks
            .iter()
            .map(|block| block.content == Content::Undefined);
        let undefined: Vec<bool> = undefined.collect();
        let model = disk.bytes.clone();
        let threads = (0..threads)
            .map(|index| Thread {
                queue: (index % 2 == 0).then(|| node.queue()),
                state: State::Idle,
                flag: Flag::new(),
            })
            .collect();
        Self {
            node: node.clone(),
            threads,
            busy: vec![false; undefined.len()],
            model,
            undefined,
            base,
            current: source,
            until: 0,
            pause: (0, 100),
            len_max: 4096,
            discards: true,
            zeroes: 1,
            writes: 0,
            refused: 0,
            copies_to: None,
            copied: 0,
            recorded: Vec::new(),
        }
    }

    pub(crate) fn start(&self, world: &mut World) {
        for index in 0..self.threads.len() {
            let delay = world.rng.between(self.pause.0, self.pause.1);
            world.after(delay, Happening::Guest(self.base + index));
        }
    }

    /// Keeps these threads from a block, which others write to.
    pub(crate) fn reserve(&mut self, block: usize) {
        self.busy[block] = true;
    }

    /// A thread makes its next write.
    pub(crate) fn act(&mut self, world: &mut World, thread: usize) {
        let index = thread - self.base;
        if world.now >= self.until || self.model.is_empty() {
            return;
        }
        let len = self.model.len() as u64;
        let start = world.rng.below(len);
        let most = self.len_max.min(len - start);
        let mut range = ByteRange::at(start, world.rng.between(1, most)).expect("in range");
        if world.rng.one_in(2) {
            // Most guests write whole blocks.
            let end = range.end().next_multiple_of(BLOCK).min(len);
            range = (range.start() / BLOCK * BLOCK..end).into();
        }
        let disk = &world.disks[self.current];
        let mut blocks = disk.blocks_of(range);
        if self.copies_to.is_some() && blocks.any(|block| self.undefined[block]) {
            // What surrounds a write is defined thereafter, here, and an active write says nothing of it.
            let end = range.end().next_multiple_of(BLOCK).min(len);
            range = (range.start() / BLOCK * BLOCK..end).into();
        }
        if disk.blocks_of(range).any(|block| self.busy[block]) {
            let delay = world.rng.between(self.pause.0, self.pause.1);
            world.after(delay + 1, Happening::Guest(thread));
            return;
        }
        for block in world.disks[self.current].blocks_of(range) {
            self.busy[block] = true;
        }
        let kind = match world.rng.below(8) {
            1 if self.discards => Kind::Discard,
            below if below < self.zeroes => Kind::Zero,
            _ => Kind::Write(world.rng.next()),
        };
        let thread = &mut self.threads[index];
        let begin = match &thread.queue {
            Some(queue) => queue.begin_write_owned(range),
            None => self.node.begin_write_owned(range),
        };
        match begin {
            Begin::Go(ticket) if world.rng.one_in(50) => {
                // Let in, and then not issued.
                ticket.cancel();
                self.idle(world, index, range);
            }
            Begin::Go(ticket) => self.write(world, index, ticket, kind),
            Begin::Wait(pending) => {
                thread.flag = Flag::new();
                thread.state = State::Waiting(pending, kind);
            }
            Begin::Refused(_) => self.refuse(world, index, range),
        }
    }

    /// Threads that wait at the gate and were woken try again.
    pub(crate) fn wake(&mut self, world: &mut World) {
        for index in 0..self.threads.len() {
            let thread = &mut self.threads[index];
            let State::Waiting(pending, kind) = &mut thread.state else {
                continue;
            };
            if !thread.flag.take() {
                continue;
            }
            let (kind, range) = (*kind, pending.range());
            let waker = Waker::from(Arc::clone(&thread.flag));
            match pending.poll_begin(&waker) {
                Poll::Ready(Ok(ticket)) => self.write(world, index, ticket, kind),
                Poll::Ready(Err(_)) => self.refuse(world, index, range),
                Poll::Pending => {}
            }
        }
    }

    fn refuse(&mut self, world: &mut World, index: usize, range: ByteRange) {
        self.refused += 1;
        self.idle(world, index, range);
    }

    fn write(&mut self, world: &mut World, index: usize, ticket: OwnedTicket, kind: Kind) {
        let range = ticket.range();
        let ask = match kind {
            Kind::Write(stamp) => Ask::Write(pattern(stamp, range.len())),
            Kind::Zero => Ask::Zero,
            Kind::Discard => Ask::Discard,
        };
        // The disk is chosen after the gate let the write in.
        let disk = self.current;
        world.submit(disk, Owner::Guest(self.base + index), range, ask);
        self.threads[index].state = State::Writing { ticket, kind, disk };
    }

    /// A write was answered.
    pub(crate) fn answered(&mut self, world: &mut World, thread: usize, id: u64) {
        let index = thread - self.base;
        let state = std::mem::replace(&mut self.threads[index].state, State::Idle);
        let (ticket, kind, disk) = match state {
            State::Writing { ticket, kind, disk } => (ticket, kind, disk),
            State::Copying { write, range, disk } => {
                let request = world.take(disk, id);
                assert_eq!(request.range, write.range());
                match world.rng.one_in(10) {
                    // The VMM has lost the answer.
                    true => drop(write),
                    false => write.finish(error_of(request.error)),
                }
                self.copied += 1;
                return self.idle(world, index, range);
            }
            State::Idle | State::Waiting(..) => panic!("nothing was in flight"),
        };
        let request = world.take(disk, id);
        let range = request.range;
        let medium = &world.disks[disk];
        let at = range.start() as usize..range.end() as usize;
        if request.error.is_none() {
            match kind {
                Kind::Write(stamp) => self.expect(medium, range, &pattern(stamp, range.len())),
                Kind::Zero => self.expect(medium, range, &vec![0; at.len()]),
                Kind::Discard => {}
            }
        }
        // What a failed write has left behind, and what surrounds it, is what the disk says.
        for block in medium.blocks_of(range) {
            let was_undefined = self.undefined[block];
            self.undefined[block] = medium.blocks[block].content == Content::Undefined;
            let whole = ByteRange::from(block as u64 * BLOCK..(block as u64 + 1) * BLOCK);
            let whole = whole.intersection((0..self.model.len() as u64).into());
            let part = if was_undefined {
                whole
            } else {
                whole.intersection(range)
            };
            let part = part.start() as usize..part.end() as usize;
            self.model[part.clone()].copy_from_slice(&medium.bytes[part]);
        }
        self.writes += 1;
        self.recorded.push(range);
        if let (true, Some(target)) = (ticket.is_active(), self.copies_to)
            && !world.rng.one_in(20)
        {
            return self.copy(world, index, ticket, kind, target, request.error);
        }
        if world.rng.one_in(10) {
            // The VMM gives up on the request, which has settled.
            drop(ticket);
        } else {
            let told = ticket.finish(request.error);
            assert_eq!(told, request.error, "the result is handed through");
        }
        self.idle(world, index, range);
    }

    /// The second half of an active write, if there is one.
    fn copy(
        &mut self,
        world: &mut World,
        index: usize,
        ticket: OwnedTicket,
        kind: Kind,
        disk: usize,
        error: Option<std::io::ErrorKind>,
    ) {
        let range = ticket.range();
        let Some(write) = ticket.source_written(error.is_none()) else {
            return self.idle(world, index, range);
        };
        let part = write.range();
        let start = (part.start() - range.start()) as usize;
        let limits = world.disks[disk].limits;
        let takes_zeroes = limits.write_zeroes.is_some_and(|zeroes| {
            let align = u64::from(zeroes.align);
            let ends_well = part.end() % align == 0 || part.end() == limits.len;
            part.start() % align == 0 && ends_well && part.len() <= zeroes.max
        });
        let ask = match kind {
            Kind::Write(stamp) if part.len() <= limits.max_transfer.into() => {
                let data = pattern(stamp, range.len());
                Ask::Write(data[start..start + part.len() as usize].to_vec())
            }
            Kind::Zero if takes_zeroes => Ask::Zero,
            Kind::Write(_) | Kind::Zero | Kind::Discard => {
                write.skip();
                return self.idle(world, index, range);
            }
        };
        world.submit(disk, Owner::Guest(self.base + index), part, ask);
        self.threads[index].state = State::Copying { write, range, disk };
    }

    fn expect(&self, medium: &super::disk::Disk, range: ByteRange, data: &[u8]) {
        let at = range.start() as usize..range.end() as usize;
        assert!(
            medium.bytes[at] == *data,
            "the guest was told that {range} is written, and it is not"
        );
    }

    fn idle(&mut self, world: &mut World, index: usize, range: ByteRange) {
        for block in world.disks[self.current].blocks_of(range) {
            self.busy[block] = false;
        }
        self.threads[index].state = State::Idle;
        let delay = world.rng.between(self.pause.0, self.pause.1);
        world.after(delay, Happening::Guest(self.base + index));
    }

    /// Whether a write is in flight that was let in.
    pub(crate) fn is_writing(&self) -> bool {
        self.threads
            .iter()
            .any(|thread| matches!(thread.state, State::Writing { .. } | State::Copying { .. }))
    }

    /// Whether a write is in flight that is not to go to the target as well.
    pub(crate) fn is_writing_alone(&self) -> bool {
        self.threads.iter().any(|thread| match &thread.state {
            State::Writing { ticket, .. } => !ticket.is_active(),
            State::Idle | State::Waiting(..) | State::Copying { .. } => false,
        })
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.threads
            .iter()
            .any(|thread| matches!(thread.state, State::Waiting(..)))
    }

    /// What each thread waits to write, if it waits.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = Option<ByteRange>> {
        self.threads.iter().map(|thread| match &thread.state {
            State::Waiting(pending, _) => Some(pending.range()),
            State::Idle | State::Writing { .. } | State::Copying { .. } => None,
        })
    }

    /// Whether one that waits was woken and has not tried again.
    pub(crate) fn is_woken(&self) -> bool {
        self.threads
            .iter()
            .any(|thread| matches!(thread.state, State::Waiting(..)) && thread.flag.is_up())
    }

    /// Whether a write in flight, or waiting, touches a block.
    pub(crate) fn is_busy(&self, block: usize) -> bool {
        self.busy[block]
    }

    /// The disk holds what the guest was told, wherever nothing is in flight.
    pub(crate) fn check(&self, world: &World) {
        let disk = &world.disks[self.current];
        for block in 0..self.busy.len() {
            if self.busy[block] || self.undefined[block] {
                continue;
            }
            let start = block * BLOCK as usize;
            let end = (start + BLOCK as usize).min(self.model.len());
            assert!(
                disk.bytes[start..end] == self.model[start..end],
                "the guest's data at {start} of disk {} is not what it was told",
                self.current
            );
        }
    }
}

fn error_of(error: Option<std::io::ErrorKind>) -> std::io::Result<()> {
    error.map_or(Ok(()), |kind| Err(kind.into()))
}

fn pattern(stamp: u64, len: u64) -> Vec<u8> {
    let bytes = (stamp | 0x0101_0101_0101_0101).to_le_bytes();
    bytes.into_iter().cycle().take(len as usize).collect()
}
