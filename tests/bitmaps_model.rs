//! Named bitmaps and transactions against a naive twin: random verbs on several disks, with guest writes
//! before, between and across them. Every answer is compared, and after each step everything that can be
//! seen.
//!
//! `BITMAPS_SEED=n cargo test --test bitmaps_model` replays one seed, `BITMAPS_SEEDS=n` runs so many.
#![allow(
    clippy::disallowed_methods,
    reason = "a test brings the panics' boundary"
)]

#[allow(dead_code, reason = "what else the simulation draws")]
#[path = "sim/rng.rs"]
mod rng;
mod twin;

use blockjob::{
    ActionError, Begin, BitmapClaim, BitmapError, BitmapHold, BitmapOptions, BitmapState,
    BitmapStorage, ClaimFor, FrozenBitmap, Grown, JobBitmap, Node, OwnedTicket, Prepared,
    QuiesceGuard, SnapshotOf, Transaction,
};
use rng::Rng;
use twin::{At, Dirty, Opened, Twin, Verb, granularity, granules};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const GRANULES: [u64; 4] = [512, 1024, 4096, 1 << 16];
/// Two of a length, so that they can be merged; word boundaries; nothing at all.
const LENS: [u64; 4] = [64 * 512 * 3 + 100, 64 * 512 * 3 + 100, 65 * 512, 0];
const STEPS: usize = 150;

/// What somebody has of a bitmap.
enum Handle {
    Claim(At, BitmapClaim, ClaimFor),
    Frozen(At, Vec<FrozenBitmap>, Dirty),
    Hold(At, BitmapHold),
    /// A bitmap of a job, and its number in the twin.
    Job(usize, JobBitmap, u64),
    /// A transaction that is not decided, and on which disks.
    Open(Vec<usize>, Prepared, Opened),
    /// A write in flight.
    Ticket(usize, std::ops::Range<u64>, OwnedTicket),
}

struct World {
    rng: Rng,
    nodes: Vec<Node>,
    twin: Twin,
    handles: Vec<Handle>,
    asked: usize,
    done: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            nodes: LENS.iter().map(|len| Node::new(*len)).collect(),
            twin: Twin::new(&LENS),
            handles: Vec::new(),
            asked: 0,
            done: 0,
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            self.step();
            // Looking drains the log, and the verb that comes next is to do that itself.
            if self.rng.below(2) == 0 {
                self.compare();
            }
        }
        while !self.handles.is_empty() {
            self.end_one();
            self.compare();
        }
        for node in &self.nodes {
            drop(quiesced(node).expect("nothing is in flight"));
        }
    }

    fn len(&self, disk: usize) -> u64 {
        self.twin.disks[disk].len
    }

    fn step(&mut self) {
        match self.rng.below(22) {
            0..5 => self.write(),
            5..11 => self.ask(),
            11 => self.claim(),
            12 => self.freeze(),
            13 => self.hold(),
            14 => self.mark(),
            15 => self.store(),
            16..18 => self.end_one(),
            18 => self.resize(),
            19 => self.track(),
            _ => self.transaction(),
        }
    }

    fn disk(&mut self) -> usize {
        // Mostly those that can be merged.
        match self.rng.below(10) {
            0 => 3,
            1 => 2,
            other => (other % 2) as usize,
        }
    }

    fn name(&mut self) -> String {
        match self.rng.below(60) {
            0 => String::new(),
            1 => "x".repeat(1023),
            2 => "x".repeat(1024),
            other => NAMES[(other % 4) as usize].to_owned(),
        }
    }

    /// A bitmap, as a rule one that there is.
    fn at(&mut self) -> At {
        let disk = self.disk();
        let bitmaps = &self.twin.disks[disk].bitmaps;
        if bitmaps.is_empty() || self.rng.below(10) == 0 {
            return (disk, self.name());
        }
        let index = self.rng.below(bitmaps.len() as u64) as usize;
        (disk, bitmaps[index].name.clone())
    }

    /// A name for a new bitmap, now and then one that somebody may get back.
    fn new_at(&mut self) -> At {
        let disks = self.twin.disks.iter().enumerate();
        let mut promised = disks.flat_map(|(index, disk)| Some((index, disk.promised.last()?)));
        if let Some((disk, name)) = promised.next().filter(|_| self.rng.below(2) == 0) {
            return (disk, name.clone());
        }
        let name = self.name();
        (self.disk(), name)
    }

    fn options(&mut self) -> BitmapOptions {
        let mut options = BitmapOptions::default();
        options.persistent = self.rng.below(2) == 0;
        options.granularity = match self.rng.below(30) {
            0 => Some(granularity(256)),
            1 => Some(granularity(1 << 32)),
            2 => Some(granularity(1 << 31)),
            other => Some(granularity(GRANULES[(other % 4) as usize])),
        };
        options
    }

    fn verb(&mut self) -> Verb {
        match self.rng.below(13) {
            0..3 => {
                let at = self.new_at();
                let options = self.options();
                Verb::Add(at, options, self.rng.below(3) > 0)
            }
            3 => Verb::Remove(self.at()),
            4 => Verb::Clear(self.at()),
            5..7 => Verb::Enable(self.at()),
            7..9 => Verb::Disable(self.at()),
            9..11 => {
                let sources = self.rng.below(4);
                let target = self.at();
                Verb::Merge(target, (0..sources).map(|_| self.at()).collect())
            }
            _ => Verb::Rename(self.at(), self.name()),
        }
    }

    /// A write that settles at once, or later.
    fn write(&mut self) {
        let disk = self.disk();
        let disk_len = self.len(disk);
        let start = self.rng.below(disk_len + 2000);
        let len = match self.rng.below(10) {
            0 => 0,
            1 => self.rng.below(disk_len + 1),
            _ => self.rng.below(3000),
        };
        let range = start..start + len;
        let begin = self.nodes[disk].begin_write_owned(range.clone().into());
        let is_readonly = self.twin.disks[disk].bitmaps.iter().any(|b| b.is_readonly);
        if self.is_open_on(disk) {
            assert!(matches!(begin, Begin::Wait(_)), "the guest is held");
            return;
        }
        let Some(ticket) = begin.go() else {
            assert!(is_readonly, "nobody holds the node");
            return;
        };
        assert!(!is_readonly, "a write was let in that must not be recorded");
        match self.rng.below(8) {
            0 => ticket.cancel(),
            1 => {
                drop(ticket);
                self.twin.record(disk, range);
            }
            2 | 3 => self.handles.push(Handle::Ticket(disk, range, ticket)),
            _ => {
                ticket.finish(());
                self.twin.record(disk, range);
            }
        }
    }

    /// Whether a transaction holds the guest.
    fn is_open_on(&self, disk: usize) -> bool {
        let is =
            |handle: &Handle| matches!(handle, Handle::Open(disks, ..) if disks.contains(&disk));
        self.handles.iter().any(is)
    }

    fn track(&mut self) {
        let disk = self.disk();
        let granule = GRANULES[self.rng.below(4) as usize];
        if let Some(guard) = quiesced(&self.nodes[disk]) {
            let job = self.nodes[disk].track(&guard, granularity(granule));
            let number = self.twin.track(disk, granule);
            self.handles.push(Handle::Job(disk, job.unwrap(), number));
        }
    }

    fn ask(&mut self) {
        let verb = self.verb();
        let Some(answer) = ask(&self.nodes, &verb) else {
            return; // It wants a quiet node.
        };
        self.asked += 1;
        self.done += usize::from(answer.is_ok());
        assert_eq!(answer, self.twin.ask(&verb), "{verb:?}");
    }

    fn claim(&mut self) {
        let at = self.at();
        let claim = if self.rng.below(3) == 0 {
            ClaimFor::Reading
        } else {
            ClaimFor::Change
        };
        let expected = self.twin.claim(&at, claim);
        let claimed = self.nodes[at.0].bitmaps().claim(&at.1, claim);
        assert_eq!(claimed.as_ref().err(), expected.as_ref().err());
        self.handles.extend(
            claimed
                .ok()
                .map(|claimed| Handle::Claim(at, claimed, claim)),
        );
    }

    fn freeze(&mut self) {
        let at = self.at();
        let expected = self.twin.freeze(&at);
        let frozen = self.nodes[at.0].bitmaps().freeze(&at.1);
        assert_eq!(frozen.as_ref().err(), expected.as_ref().err());
        if let (Ok(frozen), Ok(dirty)) = (frozen, expected) {
            self.handles.push(Handle::Frozen(at, vec![frozen], dirty));
        }
    }

    fn hold(&mut self) {
        if self.rng.below(4) == 0 {
            let disk = self.disk();
            self.nodes[disk].bitmaps().take_back();
            for bitmap in &mut self.twin.disks[disk].bitmaps {
                bitmap.is_skipped = false;
            }
            return;
        }
        let at = self.at();
        let expected = self.twin.hold(&at);
        let hold = self.nodes[at.0].bitmaps().hold(&at.1);
        assert_eq!(hold.as_ref().err(), expected.as_ref().err());
        if let Ok(hold) = hold {
            self.handles.push(Handle::Hold(at, hold));
        }
    }

    fn mark(&mut self) {
        let at = self.at();
        if self.rng.below(3) > 0 {
            let answer = self.nodes[at.0].bitmaps().mark_writable(&at.1);
            assert_eq!(answer, self.twin.mark_readonly(&at, false));
        } else if let Some(guard) = quiesced(&self.nodes[at.0]) {
            let answer = self.nodes[at.0].bitmaps().mark_readonly(&guard, &at.1);
            assert_eq!(answer, self.twin.mark_readonly(&at, true));
        }
    }

    /// Changes the storage, or closes it and opens it again on another node.
    fn store(&mut self) {
        let disk = self.disk();
        if self.rng.below(2) == 0 {
            let max = (self.rng.below(4) > 0).then(|| self.rng.below(4) as usize);
            self.twin.disks[disk].storage = max;
            self.nodes[disk].bitmaps().set_storage(max.map(|max| {
                let mut storage = BitmapStorage::default();
                storage.bitmaps_max = max;
                storage
            }));
            return;
        }
        let Some(guard) = quiesced(&self.nodes[disk]) else {
            return;
        };
        let len = self.len(disk);
        let twin = &mut self.twin.disks[disk];
        let bitmaps = self.nodes[disk].bitmaps();
        let export = match bitmaps.export_state(&guard) {
            Ok(export) => export,
            Err(error) => {
                let busy = twin.bitmaps.iter().find_map(|bitmap| {
                    let with = bitmap.held.filter(|_| bitmap.will_be_stored())?;
                    let name = bitmap.name.clone();
                    Some(BitmapError::Busy { name, with })
                });
                assert_eq!(Some(error), busy);
                return;
            }
        };
        let (stored, kept): (Vec<_>, Vec<_>) = twin
            .bitmaps
            .iter()
            .filter(|bitmap| bitmap.is_persistent)
            .partition(|bitmap| bitmap.will_be_stored());
        assert!(export.to_keep.iter().eq(kept.iter().map(|kept| &kept.name)));
        assert_eq!(export.to_store.len(), stored.len());
        for (state, expected) in export.to_store.iter().zip(stored) {
            assert_eq!(state.name, expected.name);
            assert_eq!(state.is_enabled, expected.is_enabled);
            assert_eq!(granules(&state.bits), expected.dirty);
        }
        // The image is opened elsewhere, and after a crash what was in use is not trusted.
        let mut states = export.to_store;
        for state in &mut states {
            state.is_in_use = self.rng.below(2) == 0;
        }
        let other = Node::new(len);
        let other_guard = quiesced(&other).expect("nobody writes");
        other
            .bitmaps()
            .import_state(&other_guard, states.clone())
            .unwrap();
        other.bitmaps().check_invariants();
        for (info, state) in other.bitmaps().query_all().iter().zip(&states) {
            assert_eq!(info.is_inconsistent, state.is_in_use);
            assert_eq!(info.is_recording, state.is_enabled && !state.is_in_use);
        }
        // Some come back to this node under names that may be taken.
        if let Some(mut state) = states.pop() {
            state.name = NAMES[self.rng.below(4) as usize].to_owned();
            let answer = bitmaps.import_state(&guard, vec![state.clone()]);
            let expected = twin.check_free(&state.name);
            // What was in use and is here came another way: it stays as it is.
            if state.is_in_use && matches!(expected, Err(BitmapError::NameExists { .. })) {
                assert_eq!(answer, Ok(()));
                return;
            }
            assert_eq!(answer, expected);
            if expected.is_err() {
                return;
            }
            let BitmapState { name, bits, .. } = &state;
            let mut bitmap = twin::Bitmap::new(name, bits.granularity().bytes());
            bitmap.is_persistent = true;
            bitmap.is_inconsistent = state.is_in_use;
            if !state.is_in_use {
                bitmap.is_enabled = state.is_enabled;
                bitmap.dirty = granules(bits);
            }
            twin.push(bitmap);
        }
    }

    /// One of those who have something does something with it, or lets go.
    fn end_one(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        let index = self.rng.below(self.handles.len() as u64) as usize;
        self.end(index);
    }

    fn end(&mut self, index: usize) {
        match self.handles.swap_remove(index) {
            Handle::Ticket(disk, range, ticket) => {
                if self.rng.below(2) == 0 {
                    ticket.finish(Err::<(), _>("it failed")).unwrap_err();
                } else {
                    drop(ticket);
                }
                self.twin.record(disk, range);
            }
            Handle::Claim(at, claim, claimed_for) => self.end_claim(at, claim, claimed_for),
            Handle::Job(disk, job, number) => {
                drop(job);
                let jobs = &mut self.twin.disks[disk].jobs;
                jobs.retain(|(known, ..)| *known != number);
            }
            Handle::Open(_, prepared, opened) => {
                let is_committed = self.rng.below(2) == 0;
                if is_committed {
                    prepared.commit();
                    self.done += 1;
                } else {
                    drop(prepared);
                }
                self.twin.close(opened, is_committed);
            }
            Handle::Frozen(at, mut handles, dirty) => {
                assert_eq!(granules(&handles[0]), dirty);
                if self.rng.below(3) == 0 {
                    handles.push(handles[0].clone());
                } else {
                    handles.pop();
                }
                if handles.is_empty() {
                    self.twin.find(&at).unwrap().held = None;
                } else {
                    self.handles.push(Handle::Frozen(at, handles, dirty));
                }
            }
            Handle::Hold(at, hold) => {
                let is_handed_over = self.rng.below(2) == 0;
                let bitmap = self.twin.find(&at).unwrap();
                bitmap.held = None;
                assert_eq!(granules(&hold.snapshot().unwrap()), bitmap.dirty);
                if is_handed_over {
                    hold.hand_over();
                    bitmap.is_skipped = bitmap.is_persistent;
                } else {
                    drop(hold);
                }
            }
        }
    }

    fn resize(&mut self) {
        let disk = self.disk();
        let Some(guard) = quiesced(&self.nodes[disk]) else {
            return;
        };
        let len = match self.rng.below(4) {
            0 => LENS[disk],
            1 => self.rng.below(5000),
            _ => self.rng.below(200_000),
        };
        let grown = if self.rng.below(3) == 0 {
            Grown::Clean
        } else {
            Grown::Dirty
        };
        let expected = self.twin.disks[disk].check_resize();
        let resize = self.nodes[disk].resize(&guard, len, grown);
        assert_eq!(resize.as_ref().err(), expected.as_ref().err());
        let Ok(resize) = resize else {
            return;
        };
        if self.rng.below(4) == 0 {
            drop(resize);
        } else {
            resize.commit();
            self.twin.disks[disk].resize(len, grown);
        }
    }

    fn end_claim(&mut self, at: At, claim: BitmapClaim, claimed_for: ClaimFor) {
        let len = self.len(at.0);
        let bitmap = self.twin.find(&at).unwrap();
        let keeps_bits = claimed_for == ClaimFor::Reading || bitmap.is_readonly;
        match self.rng.below(6) {
            0 | 1 => {
                claim.abdicate();
                self.twin.end_claim(&at, !keeps_bits);
            }
            2 => {
                claim.reclaim();
                self.twin.end_claim(&at, false);
            }
            3 => {
                drop(claim);
                self.twin.end_claim(&at, false);
            }
            4 => {
                if let Some(guard) = quiesced(&self.nodes[at.0]) {
                    claim.enable_successor(&guard).unwrap();
                    bitmap.successor.as_mut().unwrap().1 = true;
                }
                self.handles.push(Handle::Claim(at, claim, claimed_for));
            }
            _ => {
                match claim.lock() {
                    Err(error) => {
                        let name = at.1.clone();
                        assert_eq!(error, BitmapError::ReadOnly { name });
                        assert!(keeps_bits);
                    }
                    Ok(mut bits) => {
                        assert!(!keeps_bits);
                        let start = self.rng.below(len / bitmap.granule + 1);
                        let bytes = start * bitmap.granule..(start + 1) * bitmap.granule;
                        if bytes.end <= len && bits.reset(bytes.into()).unwrap() {
                            bitmap.dirty.remove(&start);
                        }
                    }
                }
                self.handles.push(Handle::Claim(at, claim, claimed_for));
            }
        }
    }

    fn transaction(&mut self) {
        let verbs = self.rng.below(6);
        let abort_at = self.rng.below(12);
        let mut transaction = Transaction::new();
        let mut acts = Vec::new();
        for index in 0..verbs {
            if index == abort_at {
                transaction.abort();
                acts.push(None);
            }
            let verb = self.verb();
            push(&mut transaction, &self.nodes, &verb);
            acts.push(Some(verb));
        }
        let Ok(result) = transaction.prepare().try_prepared() else {
            return; // A write is in flight.
        };
        let before = self.twin.clone();
        let mut touched = Vec::new();
        let mut disks = Vec::new();
        let mut renamed = Vec::new();
        for act in acts.iter().flatten() {
            disks.extend(act.disks());
            if let Verb::Rename(at, _) = act {
                renamed.push(at.clone());
            }
        }
        let expected = acts.iter().enumerate().try_for_each(|(index, act)| {
            let act = act.as_ref().ok_or((index, ActionError::Aborted))?;
            let answer = self.twin.act(act, &mut touched);
            answer.map_err(|error| (index, ActionError::from(error)))
        });
        match (result, expected) {
            (Err(error), Err(expected)) => {
                assert_eq!((error.index, error.why), expected, "{acts:?}");
                self.twin = before;
            }
            (Ok(prepared), Ok(())) => {
                let opened = self.twin.open(before, &touched, renamed);
                self.compare();
                self.while_open(&acts, &prepared);
                self.handles.push(Handle::Open(disks, prepared, opened));
                // Or it stays open, and others do what they like.
                if self.rng.below(2) == 0 {
                    let last = self.handles.len() - 1;
                    self.end(last);
                }
            }
            (result, expected) => {
                panic!("{acts:?} came to {result:?} and not to {expected:?}")
            }
        }
    }

    /// Others may ask what they like: what the transaction has touched they cannot have.
    fn while_open(&mut self, acts: &[Option<Verb>], prepared: &Prepared) {
        for verb in acts.iter().flatten() {
            let (Verb::Clear(at) | Verb::Enable(at) | Verb::Disable(at)) = verb else {
                continue;
            };
            assert!(prepared.guard(&self.nodes[at.0]).is_some());
            let begin = self.nodes[at.0].begin_write((0..1).into());
            assert!(begin.go().is_none(), "the guest is held");
            if let Some(bitmap) = self.twin.disks[at.0]
                .bitmaps
                .iter()
                .find(|b| b.name == at.1)
                && bitmap.held.is_some()
            {
                let answer = ask(&self.nodes, &Verb::Disable(at.clone()));
                assert!(matches!(answer, Some(Err(BitmapError::Busy { .. }))));
            }
        }
    }

    fn compare(&mut self) {
        for handle in &self.handles {
            if let Handle::Job(disk, job, number) = handle {
                let jobs = self.twin.disks[*disk].jobs.iter();
                let expected = jobs.filter(|(known, ..)| known == number);
                let expected = expected.map(|(.., dirty)| dirty);
                assert!(expected.eq([&granules(&job.lock())]), "{job:?}");
            }
        }
        for (node, disk) in self.nodes.iter().zip(&self.twin.disks) {
            let bitmaps = node.bitmaps();
            bitmaps.check_invariants();
            let infos = bitmaps.query_all();
            assert_eq!(infos.len(), disk.bitmaps.len());
            for (info, bitmap) in infos.iter().zip(&disk.bitmaps) {
                bitmap.assert_is(info, disk.len);
                assert_eq!(bitmaps.query(&info.name).as_ref(), Ok(info));
                if bitmap.is_inconsistent {
                    continue;
                }
                let bits = bitmaps.snapshot(&info.name, SnapshotOf::Bitmap).unwrap();
                assert_eq!(granules(&bits), bitmap.dirty, "{info:?}");
                let both = bitmaps
                    .snapshot(&info.name, SnapshotOf::WithSuccessor)
                    .unwrap();
                let mut expected = bitmap.dirty.clone();
                expected.extend(bitmap.successor.iter().flat_map(|(dirty, _)| dirty));
                assert_eq!(granules(&both), expected, "{info:?}");
            }
        }
    }
}

fn quiesced(node: &Node) -> Option<QuiesceGuard> {
    node.quiesce().try_guard().ok()
}

/// What the real ones say. None if a guard is wanted and cannot be had.
fn ask(nodes: &[Node], verb: &Verb) -> Option<Result<(), BitmapError>> {
    let of = |at: &At| nodes[at.0].bitmaps();
    Some(match verb {
        Verb::Add(at, options, true) => of(at).add(&quiesced(&nodes[at.0])?, &at.1, *options),
        Verb::Add(at, options, false) => of(at).add_disabled(&at.1, *options),
        Verb::Remove(at) => of(at).remove(&at.1),
        Verb::Clear(at) => of(at).clear(&at.1),
        Verb::Enable(at) => of(at).enable(&quiesced(&nodes[at.0])?, &at.1),
        Verb::Disable(at) => of(at).disable(&at.1),
        Verb::Merge(at, sources) => of(at).merge(&at.1, &refs(nodes, sources)),
        Verb::Rename(at, name) => of(at).rename(&at.1, name),
    })
}

fn refs<'a>(nodes: &'a [Node], ats: &'a [At]) -> Vec<(&'a Node, &'a str)> {
    ats.iter().map(|at| (&nodes[at.0], &*at.1)).collect()
}

fn push(transaction: &mut Transaction, nodes: &[Node], verb: &Verb) {
    match verb {
        Verb::Add(at, options, true) => transaction.add(&nodes[at.0], &at.1, *options),
        Verb::Add(at, options, false) => transaction.add_disabled(&nodes[at.0], &at.1, *options),
        Verb::Remove(at) => transaction.remove(&nodes[at.0], &at.1),
        Verb::Clear(at) => transaction.clear(&nodes[at.0], &at.1),
        Verb::Enable(at) => transaction.enable(&nodes[at.0], &at.1),
        Verb::Disable(at) => transaction.disable(&nodes[at.0], &at.1),
        Verb::Merge(at, sources) => transaction.merge(&nodes[at.0], &at.1, &refs(nodes, sources)),
        Verb::Rename(at, name) => transaction.rename(&nodes[at.0], &at.1, name),
    };
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn random_verbs_on_several_disks_do_what_a_naive_twin_does() {
    let seeds = match number("BITMAPS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BITMAPS_SEEDS").unwrap_or(1000),
    };
    let (mut asked, mut done) = (0, 0);
    for seed in seeds.clone() {
        let mut world = World::new(seed);
        let run = std::panic::AssertUnwindSafe(|| world.run());
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("BITMAPS_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
        asked += world.asked;
        done += world.done;
    }
    if seeds.count() > 100 {
        assert!(done * 5 > asked, "{done} of {asked} verbs did something");
    }
}

/// Each rule broken on purpose, and noticed within so many seeds.
#[cfg(debug_assertions)]
#[test]
fn what_is_broken_is_noticed() {
    use blockjob::sabotage::{Sabotage, break_on_this_thread};

    const BROKEN: &[(Sabotage, u64)] = &[
        (Sabotage::VerbWithoutDrain, 500),
        (Sabotage::LogAsNewest, 500),
        (Sabotage::DrainIntoFirst, 500),
        (Sabotage::SameNameTwice, 500),
        (Sabotage::RecordOn, 500),
        (Sabotage::ReadonlyFirst, 2000),
        (Sabotage::ResizeInUse, 500),
        (Sabotage::GoOnAfterFailure, 500),
        (Sabotage::FreezeWithoutHolding, 500),
        (Sabotage::MergeOneByOne, 500),
        (Sabotage::EndDisabled, 500),
        (Sabotage::ReclaimForgetsSuccessor, 500),
        (Sabotage::LetInReadonly, 2000),
        (Sabotage::LogStaysShort, 500),
        (Sabotage::GrowClean, 500),
        (Sabotage::LetGoBeforeCommit, 500),
        (Sabotage::KeepHalf, 500),
        (Sabotage::RollBackForward, 500),
        (Sabotage::RollBackLog, 1000),
        (Sabotage::RemoveAtOnce, 500),
        (Sabotage::DoNotHold, 500),
        (Sabotage::GiveAwayName, 2000),
    ];
    let noticed: Vec<_> = BROKEN
        .iter()
        .map(|(sabotage, seeds)| {
            break_on_this_thread(Some(*sabotage));
            let found = (0..*seeds).find(|seed| {
                let mut world = World::new(*seed);
                let run = std::panic::AssertUnwindSafe(|| world.run());
                let is_noticed = std::panic::catch_unwind(run).is_err();
                // What is left of it may be in any state, and is not to panic once more.
                std::mem::forget(world);
                is_noticed
            });
            break_on_this_thread(None);
            (sabotage, found)
        })
        .collect();
    for (sabotage, found) in noticed {
        println!("{sabotage:?}: seed {found:?}");
        assert!(found.is_some(), "{sabotage:?} was not noticed");
    }
}

/// Backups of two disks, by other programs and by a job, of which some fail at any point: what is restored is
/// always what the disks were at the instant of the backup.
#[path = "bitmaps_model/chain.rs"]
mod chain;
