//! A guest that orders its writes across disks: what it writes to one disk it writes to the next only when
//! that was answered, as a database does with its log and its data.
//!
//! ```text
//! disk 2   1 ───────────────▶ 2 ──────────────▶ 3
//! disk 0     └▶ 1 ───────────┘└▶ 2 ────────────┘
//! disk 1          └▶ 1 ──────┘     └▶ 2 ───────┘
//! ```
//!
//! So at any instant with no write in flight the numbers never rise along the chain, and the last is at most
//! one behind the first.

use std::sync::Arc;
use std::task::{Poll, Waker};

use blockjob::{Begin, ByteRange, Lane, Node, OwnedTicket, PendingWrite};

use super::disk::{Ask, BLOCK, Disk, Owner};
use super::world::{Flag, Happening, World};

pub(crate) struct Chain {
    /// What the world knows it by.
    thread: usize,
    /// The block of each disk that it writes to.
    block: u64,
    /// The members it writes to, in order.
    order: Vec<usize>,
    /// Where in the order it is, and the number it writes there.
    at: usize,
    number: u64,
    /// By member: the last number that was answered.
    answered: Vec<u64>,
    state: State,
    flag: Arc<Flag>,
    pub until: u64,
    pub pause: u64,
    pub writes: u64,
    /// Writes that were refused, and are tried again.
    pub refused: u64,
    /// Everything that was recorded, with its member, until somebody takes it.
    pub recorded: Vec<(usize, ByteRange)>,
}

enum State {
    Idle,
    Waiting(PendingWrite<Arc<Lane>>),
    Writing(OwnedTicket, usize),
}

impl Chain {
    /// Numbers start at 1: that is what the block holds on every source.
    pub(crate) fn new(thread: usize, block: u64, order: Vec<usize>, disks: &mut [Disk]) -> Self {
        for &member in &order {
            let source = &mut disks[2 * member];
            let at = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
            source.bytes[at].copy_from_slice(&pattern(1));
            source.blocks[block as usize].content = blockjob::Content::Data;
            source.blocks[block as usize].in_top = true;
        }
        Self {
            thread,
            block,
            at: 0,
            number: 2,
            answered: vec![1; disks.len() / 2],
            order,
            state: State::Idle,
            flag: Flag::new(),
            until: 0,
            pause: 50,
            writes: 0,
            refused: 0,
            recorded: Vec::new(),
        }
    }

    pub(crate) fn start(&self, world: &mut World) {
        let delay = world.rng.below(self.pause + 1);
        world.after(delay, Happening::Guest(self.thread));
    }

    /// The member that it writes to now.
    fn member(&self) -> usize {
        self.order[self.at]
    }

    fn range(&self) -> ByteRange {
        (self.block * BLOCK..(self.block + 1) * BLOCK).into()
    }

    pub(crate) fn act(&mut self, world: &mut World, nodes: &[Node], disks: &[usize]) {
        if world.now >= self.until {
            return;
        }
        let member = self.member();
        match nodes[member].begin_write_owned(self.range()) {
            Begin::Go(ticket) => self.write(world, ticket, disks[member]),
            Begin::Wait(pending) => {
                self.flag = Flag::new();
                self.state = State::Waiting(pending);
            }
            Begin::Refused(_) => self.refuse(world),
        }
    }

    /// If it waits at the gate and was woken it tries again.
    pub(crate) fn wake(&mut self, world: &mut World, disks: &[usize]) {
        let member = self.member();
        let State::Waiting(pending) = &mut self.state else {
            return;
        };
        if !self.flag.take() {
            return;
        }
        let waker = Waker::from(Arc::clone(&self.flag));
        match pending.poll_begin(&waker) {
            Poll::Ready(Ok(ticket)) => self.write(world, ticket, disks[member]),
            Poll::Ready(Err(_)) => self.refuse(world),
            Poll::Pending => {}
        }
    }

    /// It tries the same again later.
    fn refuse(&mut self, world: &mut World) {
        self.refused += 1;
        self.state = State::Idle;
        world.after(self.pause + 1, Happening::Guest(self.thread));
    }

    fn write(&mut self, world: &mut World, ticket: OwnedTicket, disk: usize) {
        let data = pattern(self.number).to_vec();
        let owner = Owner::Guest(self.thread);
        world.submit(disk, owner, self.range(), Ask::Write(data));
        self.state = State::Writing(ticket, disk);
    }

    pub(crate) fn answered(&mut self, world: &mut World, id: u64) {
        let State::Writing(ticket, disk) = std::mem::replace(&mut self.state, State::Idle) else {
            panic!("nothing was in flight");
        };
        let request = world.take(disk, id);
        assert!(request.error.is_none(), "these writes do not fail");
        ticket.finish(());
        let member = self.member();
        self.recorded.push((member, self.range()));
        self.answered[member] = self.number;
        self.writes += 1;
        self.at += 1;
        if self.at == self.order.len() {
            self.at = 0;
            self.number += 1;
        }
        let delay = world.rng.below(self.pause + 1);
        world.after(delay, Happening::Guest(self.thread));
    }

    /// Whether a write of its to that member is in flight.
    pub(crate) fn is_writing_to(&self, member: usize) -> bool {
        matches!(self.state, State::Writing(..)) && self.member() == member
    }

    pub(crate) fn is_busy(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting(_))
    }

    /// The member and the range that it waits to write to.
    pub(crate) fn waits_for(&self) -> Option<(usize, ByteRange)> {
        self.is_waiting().then(|| (self.member(), self.range()))
    }

    /// Whether it waits, was woken and has not tried again.
    pub(crate) fn is_woken(&self) -> bool {
        self.is_waiting() && self.flag.is_up()
    }

    /// What was answered is on the disk that the guest is on.
    pub(crate) fn check_kept(&self, world: &World, disks: &[usize]) {
        for &member in &self.order {
            if self.is_writing_to(member) {
                continue;
            }
            assert_eq!(
                self.number_on(&world.disks[disks[member]]),
                Some(self.answered[member]),
                "what was answered of member {member} is lost"
            );
        }
    }

    /// The disks of these members, as they are now, could have been so at one instant.
    pub(crate) fn check_order(&self, world: &World, members: &[usize]) {
        let on = |member: usize| self.number_on(&world.disks[2 * member + 1]);
        let numbers: Vec<(usize, Option<u64>)> = self
            .order
            .iter()
            .filter(|member| members.contains(member))
            .map(|&member| (member, on(member)))
            .collect();
        for (_, number) in &numbers {
            assert!(number.is_some(), "torn on a target: {numbers:?}");
        }
        for pair in numbers.windows(2) {
            assert!(
                pair[0].1 >= pair[1].1,
                "a later write is there, an earlier one is not: {numbers:?}"
            );
        }
        if let (Some(first), Some(last)) = (numbers.first(), numbers.last()) {
            assert!(
                first.1.map(|first| first - 1) <= last.1,
                "an earlier write is there, one before it is not: {numbers:?}"
            );
        }
    }

    /// `None` if the block holds two halves.
    fn number_on(&self, disk: &Disk) -> Option<u64> {
        let at = self.range().start() as usize;
        let block = &disk.bytes[at..at + BLOCK as usize];
        let number = u64::from_le_bytes(block[..8].try_into().expect("eight bytes"));
        (*block == pattern(number)).then_some(number)
    }
}

fn pattern(number: u64) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    for bytes in block.chunks_exact_mut(8) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    block
}
