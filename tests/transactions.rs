//! Transactions: what fails at every place of a list, who is held and for how long, jobs, and writers that
//! must not see a half of it.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test brings the threads"
)]

#[path = "support/machine.rs"]
mod machine;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use blockjob::{
    ActionError, ActionKind, Backup, BackupOptions, BackupSync, Begin, BitmapError, BitmapInfo,
    BitmapMode, BitmapOptions, BitmapState, BitmapStorage, BusyWith, Cancel, ClaimFor, Granularity,
    HBitmap, Job, Limits, Mirror, MirrorOptions, Node, Prepared, QuiesceGuard, SnapshotOf, Status,
    Transaction, TransactionError, VerbError,
};

const LEN: u64 = 1 << 20;
const G: u64 = 1 << 16;

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn write(node: &Node, at: u64) {
    let begin = node.begin_write((at..at + 1).into());
    begin.go().expect("nobody holds the node").finish(());
}

fn is_held(node: &Node) -> bool {
    match node.begin_write((0..1).into()) {
        Begin::Go(ticket) => {
            ticket.cancel();
            false
        }
        Begin::Wait(_) => true,
        Begin::Refused(_) => panic!("no bitmap is read-only"),
    }
}

/// Of a transaction when no write is in flight.
fn prepare(transaction: Transaction) -> Result<Prepared, TransactionError> {
    let prepared = transaction.prepare().try_prepared();
    prepared.expect("no write is in flight")
}

fn run(transaction: Transaction) -> Result<(), TransactionError> {
    prepare(transaction).map(Prepared::commit)
}

fn options(granule: u64) -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.granularity = Some(Granularity::from_bytes(granule).unwrap());
    options
}

fn names(node: &Node) -> Vec<String> {
    let infos = node.bitmaps().query_all().into_iter();
    infos.map(|info| info.name).collect()
}

fn dirty(node: &Node, name: &str) -> Vec<u64> {
    let bits = node.bitmaps().snapshot(name, SnapshotOf::Bitmap).unwrap();
    bits.iter().map(|start| start / G).collect()
}

/// Everything that can be seen of the bitmaps of nodes.
fn picture(nodes: &[Node]) -> Vec<(BitmapInfo, HBitmap)> {
    let mut seen = Vec::new();
    for node in nodes {
        node.bitmaps().check_invariants();
        for info in node.bitmaps().query_all() {
            let bits = node
                .bitmaps()
                .snapshot(&info.name, SnapshotOf::WithSuccessor);
            seen.push((info, bits.unwrap()));
        }
    }
    seen
}

/// Two nodes, each with `on`, which records, `off`, which does not, and `held`, which records and is in
/// use. `on` has something that a log still holds.
fn two_nodes() -> ([Node; 2], Vec<blockjob::BitmapHold>) {
    let nodes = [Node::new(LEN), Node::new(LEN)];
    let mut holds = Vec::new();
    for node in &nodes {
        let guard = quiesced(node);
        node.bitmaps().add(&guard, "on", options(G)).unwrap();
        node.bitmaps().add(&guard, "off", options(G)).unwrap();
        node.bitmaps().add(&guard, "held", options(4096)).unwrap();
        drop(guard);
        write(node, 3 * G);
        node.bitmaps().disable("off").unwrap();
        write(node, 5 * G);
        holds.push(node.bitmaps().hold("held").unwrap());
    }
    (nodes, holds)
}

/// A kind of act, and how one of it is put on a list.
type Act = (ActionKind, fn(&mut Transaction, &Node, &Node));

const GOOD: &[Act] = &[
    (ActionKind::Add, |list, node, _| {
        list.add(node, "new", options(512));
    }),
    (ActionKind::Add, |list, node, _| {
        list.add_disabled(node, "idle", options(G));
    }),
    (ActionKind::Disable, |list, node, _| {
        list.disable(node, "on");
    }),
    (ActionKind::Enable, |list, node, _| {
        list.enable(node, "off");
    }),
    (ActionKind::Merge, |list, node, other| {
        list.merge(node, "off", &[(node, "on"), (other, "on")]);
    }),
    (ActionKind::Clear, |list, node, _| {
        list.clear(node, "on");
    }),
    (ActionKind::Rename, |list, node, _| {
        list.rename(node, "on", "renamed");
    }),
    (ActionKind::Remove, |list, node, _| {
        list.remove(node, "off");
    }),
];

const BAD: &[Act] = &[
    (ActionKind::Add, |list, node, _| {
        list.add(node, "held", options(G));
    }),
    (ActionKind::Add, |list, node, _| {
        list.add_disabled(node, "", options(G));
    }),
    (ActionKind::Disable, |list, node, _| {
        list.disable(node, "held");
    }),
    (ActionKind::Enable, |list, node, _| {
        list.enable(node, "held");
    }),
    (ActionKind::Enable, |list, node, _| {
        list.enable(node, "nobody");
    }),
    (ActionKind::Merge, |list, node, other| {
        list.merge(node, "held", &[(other, "on")]);
    }),
    (ActionKind::Merge, |list, node, other| {
        list.merge(other, "held", &[(node, "held")]);
    }),
    (ActionKind::Clear, |list, node, _| {
        list.clear(node, "held");
    }),
    (ActionKind::Rename, |list, node, _| {
        list.rename(node, "nobody", "somebody");
    }),
    (ActionKind::Remove, |list, node, _| {
        list.remove(node, "held");
    }),
    (ActionKind::Start, |list, node, _| {
        // Its machine is gone.
        list.start(&job(node));
    }),
    (ActionKind::Abort, |list, _, _| {
        list.abort();
    }),
];

fn job(node: &Node) -> Job {
    let limits = Limits::new(node.len());
    let mirror = Mirror::new(node, limits, limits, MirrorOptions::default()).unwrap();
    mirror.job().clone()
}

fn push_good(list: &mut Transaction, nodes: &[Node; 2], index: usize) {
    let (node, other) = (&nodes[index % 2], &nodes[(index + 1) % 2]);
    // Each kind on each node, in turn.
    GOOD[index / 2].1(list, node, other);
}

#[test]
fn whatever_fails_at_whatever_place_all_is_as_before() {
    for (kind, bad) in BAD {
        for place in 0..=GOOD.len() * 2 {
            let (nodes, _holds) = two_nodes();
            let mut list = Transaction::new();
            for index in 0..GOOD.len() * 2 {
                if index == place {
                    bad(&mut list, &nodes[0], &nodes[1]);
                }
                push_good(&mut list, &nodes, index);
            }
            if place == GOOD.len() * 2 {
                bad(&mut list, &nodes[0], &nodes[1]);
            }
            let (reference, _reference_holds) = two_nodes();
            let error = run(list).unwrap_err();
            assert_eq!((error.index, error.kind), (place, *kind), "{error}");
            assert_eq!(picture(&nodes), picture(&reference), "{error}");
            assert!(!nodes.iter().any(is_held), "{error}");
            // What records goes on, each in its granules.
            for pair in [&nodes, &reference] {
                pair.iter().for_each(|node| write(node, 9 * G));
            }
            assert_eq!(picture(&nodes), picture(&reference), "{error}");
        }
    }
}

#[test]
fn what_is_prepared_and_dropped_is_as_before_at_every_length() {
    for length in 0..=GOOD.len() * 2 {
        let (nodes, _holds) = two_nodes();
        let (reference, _reference_holds) = two_nodes();
        let mut list = Transaction::new();
        (0..length).for_each(|index| push_good(&mut list, &nodes, index));
        let prepared = prepare(list).unwrap();
        assert_eq!(is_held(&nodes[0]), length > 0);
        drop(prepared);
        assert_eq!(picture(&nodes), picture(&reference), "{length} acts");
        assert!(!nodes.iter().any(is_held));
    }
}

#[test]
fn what_is_committed_is_done() {
    let (nodes, _holds) = two_nodes();
    let mut list = Transaction::new();
    (0..GOOD.len() * 2).for_each(|index| push_good(&mut list, &nodes, index));
    run(list).unwrap();
    for node in &nodes {
        node.bitmaps().check_invariants();
        assert_eq!(names(node), ["renamed", "held", "new", "idle"]);
        assert!(dirty(node, "renamed").is_empty());
        write(node, 0);
        let recording = |name| node.bitmaps().query(name).unwrap().is_recording;
        assert!(recording("new") && recording("held"));
        assert!(!recording("renamed") && !recording("idle"));
        assert_eq!(node.bitmaps().query("new").unwrap().dirty_bytes, 512);
    }
}

#[test]
fn each_act_sees_what_those_before_it_did() {
    let node = Node::new(LEN);
    let mut list = Transaction::new();
    list.add(&node, "a", options(G))
        .add_disabled(&node, "b", options(G));
    run(list).unwrap();
    write(&node, 0);
    let mut list = Transaction::new();
    list.add_disabled(&node, "sum", options(G))
        .merge(&node, "sum", &[(&node, "a")])
        .clear(&node, "a")
        .merge(&node, "b", &[(&node, "a")])
        .rename(&node, "sum", "total")
        .enable(&node, "total")
        .disable(&node, "a");
    run(list).unwrap();
    assert_eq!(
        (dirty(&node, "total"), dirty(&node, "b")),
        (vec![0], vec![])
    );
    write(&node, G);
    assert_eq!(
        (dirty(&node, "total"), dirty(&node, "a")),
        (vec![0, 1], vec![])
    );
}

#[test]
fn what_is_about_to_go_is_in_use() {
    let (nodes, _holds) = two_nodes();
    let node = &nodes[0];
    let in_use = |then: for<'a> fn(&'a mut Transaction, &Node) -> &'a mut Transaction| {
        let mut list = Transaction::new();
        list.remove(node, "on");
        then(&mut list, node);
        let error = run(list).unwrap_err();
        assert_eq!(error.index, 1);
        error.why
    };
    let name = || "on".to_owned();
    let with = BusyWith::Transaction;
    let busy = ActionError::from(BitmapError::Busy { name: name(), with });
    assert_eq!(in_use(|list, node| list.clear(node, "on")), busy);
    assert_eq!(in_use(|list, node| list.remove(node, "on")), busy);
    assert_eq!(in_use(|list, node| list.enable(node, "on")), busy);
    let source = in_use(|list, node| list.merge(node, "off", &[(node, "on")]));
    assert_eq!(source, busy);
    let taken = in_use(|list, node| list.add(node, "on", options(G)));
    assert_eq!(taken, BitmapError::NameExists { name: name() }.into());
}

#[test]
fn what_a_list_has_touched_nobody_else_has_until_it_is_decided() {
    let (nodes, _holds) = two_nodes();
    let node = &nodes[0];
    let mut list = Transaction::new();
    list.clear(node, "on")
        .remove(node, "off")
        .add(node, "new", options(G));
    let prepared = prepare(list).unwrap();
    let bitmaps = node.bitmaps();
    for name in ["on", "off", "new"] {
        let with = BusyWith::Transaction;
        let busy = |answer| {
            let name = name.to_owned();
            assert_eq!(answer, Err(BitmapError::Busy { name, with }));
        };
        busy(bitmaps.clear(name));
        busy(bitmaps.remove(name));
        busy(bitmaps.disable(name));
        busy(bitmaps.merge(name, &[(&nodes[1], "on")]));
        busy(bitmaps.hold(name).map(drop));
        assert_eq!(bitmaps.query(name).unwrap().busy_with, Some(with));
    }
    let mut other = Transaction::new();
    other.clear(node, "on");
    let error = run(other).unwrap_err();
    assert!(matches!(
        error.why,
        ActionError::Bitmap(BitmapError::Busy { .. })
    ));
    prepared.commit();
    assert_eq!(names(node), ["on", "held", "new"]);
    node.bitmaps().clear("on").unwrap();
}

/// What others began to record while a list was open goes on being recorded when it is undone, whatever the
/// list had done to the log.
#[test]
fn what_others_began_to_record_meanwhile_is_recorded_after_an_undoing() {
    // Nothing, something coarse or something fine records before; the list adds, disables, or does both.
    for (before, list_granule, other_granule) in [
        (None, 512, G),
        (None, G, 512),
        (Some(G), 512, 4096),
        (Some(G), G, 512),
        (Some(512), G, G),
    ] {
        for is_disabling in [false, true] {
            let node = Node::new(LEN);
            let mut list = Transaction::new();
            if let Some(granule) = before {
                let guard = quiesced(&node);
                node.bitmaps().add(&guard, "a", options(granule)).unwrap();
                if is_disabling {
                    list.disable(&node, "a");
                }
            }
            list.add(&node, "vain", options(list_granule));
            let prepared = prepare(list).unwrap();
            let guard = prepared.guard(&node).unwrap();
            let granule = options(other_granule);
            node.bitmaps().add(guard, "other", granule).unwrap();
            let job = node.track(guard, granule.granularity()).unwrap();
            drop(prepared);
            node.bitmaps().check_invariants();
            write(&node, G);
            assert_eq!(job.lock().dirty_bytes(), other_granule);
            let mut seen = vec!["other"];
            seen.extend(before.map(|_| "a"));
            for name in seen {
                let bits = node.bitmaps().snapshot(name, SnapshotOf::Bitmap).unwrap();
                assert_eq!(bits.iter().collect::<Vec<_>>(), [G], "{name}");
            }
        }
    }
}

#[test]
fn two_lists_that_are_open_on_one_disk_are_undone_in_any_order() {
    for is_first_undone in [true, false] {
        let node = Node::new(LEN);
        let add = |name: &str, granule| {
            let mut list = Transaction::new();
            list.add(&node, name, options(granule));
            prepare(list).unwrap()
        };
        let (first, second) = (add("first", G), add("second", 512));
        let (kept, undone) = match is_first_undone {
            true => (second, first),
            false => (first, second),
        };
        drop(undone);
        kept.commit();
        node.bitmaps().check_invariants();
        write(&node, 0);
        let infos = node.bitmaps().query_all();
        let [info] = &infos[..] else {
            panic!("one was undone: {infos:?}")
        };
        assert_eq!(info.dirty_bytes, info.granularity.bytes());
    }
}

#[test]
fn nobody_records_for_nobody_after_an_undoing() {
    let node = Node::new(LEN);
    node.bitmaps()
        .add(&quiesced(&node), "a", options(G))
        .unwrap();
    let mut list = Transaction::new();
    list.add_disabled(&node, "vain", options(G));
    let prepared = prepare(list).unwrap();
    node.bitmaps().remove("a").unwrap();
    drop(prepared);
    node.bitmaps().check_invariants();
}

/// A list that is open may have to give back the names that it took away.
#[test]
fn a_name_that_an_open_list_may_give_back_is_given_to_nobody() {
    let (nodes, _holds) = two_nodes();
    let node = &nodes[0];
    let bitmaps = node.bitmaps();
    let name = "on".to_owned();
    let with = BusyWith::Transaction;
    let in_use = BitmapError::Busy { name, with };
    for is_undone in [true, false] {
        let mut list = Transaction::new();
        // Its own acts may use it.
        list.rename(node, "on", "x")
            .add(node, "on", options(G))
            .rename(node, "on", "y")
            .rename(node, "x", "z");
        let prepared = prepare(list).unwrap();
        let add = bitmaps.add_disabled("on", options(G));
        assert_eq!(add, Err(in_use.clone()));
        assert_eq!(bitmaps.rename("off", "on"), Err(in_use.clone()));
        let state = BitmapState::new("on", HBitmap::new(LEN, Granularity::DEFAULT).unwrap());
        let guard = prepared.guard(node).unwrap();
        let import = bitmaps.import_state(guard, vec![state]);
        assert_eq!(import, Err(in_use.clone()));
        let mut other = Transaction::new();
        other.rename(node, "off", "on");
        assert_eq!(run(other).unwrap_err().why, in_use.clone().into());
        nodes[1]
            .bitmaps()
            .rename("on", "elsewhere")
            .expect("the name is free on another disk");
        nodes[1].bitmaps().rename("elsewhere", "on").unwrap();
        // Passed through, but no name that was before.
        bitmaps.add_disabled("q", options(G)).unwrap();
        bitmaps.remove("q").unwrap();
        if is_undone {
            drop(prepared);
            assert_eq!(names(node), ["on", "off", "held"]);
        } else {
            prepared.commit();
            assert_eq!(names(node), ["z", "off", "held", "y"]);
            bitmaps.add_disabled("on", options(G)).unwrap();
            bitmaps.add_disabled("x", options(G)).unwrap();
        }
        bitmaps.check_invariants();
    }
}

#[test]
fn an_empty_list_succeeds() {
    run(Transaction::new()).unwrap();
}

mod held {
    use super::*;

    #[derive(Default)]
    struct Alarm(AtomicUsize);

    impl Wake for Alarm {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn all_guests_wait_until_the_last_write_in_flight_has_settled() {
        let (nodes, _holds) = two_nodes();
        let third = Node::new(LEN);
        let tickets = nodes.each_ref().map(|node| {
            let begin = node.begin_write_owned((0..1).into());
            begin.go().expect("nobody holds it")
        });
        let mut list = Transaction::new();
        // The second is named as a source only.
        list.clear(&nodes[0], "on")
            .merge(&nodes[0], "on", &[(&nodes[1], "on")]);
        let mut preparing = pin!(list.prepare());
        let alarm = Arc::new(Alarm::default());
        let waker = Waker::from(Arc::clone(&alarm));
        let mut cx = Context::from_waker(&waker);
        assert!(preparing.as_mut().poll(&mut cx).is_pending());
        assert!(nodes.iter().all(is_held));
        assert!(!is_held(&third), "it was not named");
        let [first, last] = tickets;
        first.finish(());
        assert!(alarm.0.swap(0, Ordering::SeqCst) > 0);
        assert!(preparing.as_mut().poll(&mut cx).is_pending());
        last.finish(());
        assert!(alarm.0.swap(0, Ordering::SeqCst) > 0);
        let Poll::Ready(prepared) = preparing.as_mut().poll(&mut cx) else {
            panic!("all have settled");
        };
        let prepared = prepared.unwrap();
        assert!(nodes.iter().all(is_held));
        assert!(prepared.guard(&nodes[0]).unwrap().is_of(&nodes[0]));
        assert!(prepared.guard(&third).is_none());
        prepared.commit();
        assert!(!nodes.iter().any(is_held));
        assert_eq!(dirty(&nodes[0], "on"), [0, 3, 5], "what the other has");
    }

    #[test]
    fn who_gives_up_lets_all_guests_go_on() {
        let (nodes, _holds) = two_nodes();
        let ticket = nodes[1].begin_write((0..1).into()).go().unwrap();
        let before = picture(&nodes);
        let mut list = Transaction::new();
        list.clear(&nodes[0], "on").clear(&nodes[1], "on");
        let preparing = list.prepare().try_prepared();
        let preparing = preparing.expect_err("a write is in flight");
        assert!(nodes.iter().all(is_held));
        drop(preparing);
        assert!(!nodes.iter().any(is_held));
        ticket.cancel();
        assert_eq!(picture(&nodes), before);
    }

    #[test]
    fn what_was_recorded_before_is_in_it_and_rolled_back_with_it() {
        let node = Node::new(LEN);
        node.bitmaps()
            .add(&quiesced(&node), "a", options(G))
            .unwrap();
        write(&node, 0); // The log has it, and no bitmap yet.
        let mut list = Transaction::new();
        list.clear(&node, "a")
            .add(&node, "fine", options(512))
            .abort();
        run(list).unwrap_err();
        assert_eq!(dirty(&node, "a"), [0]);
        write(&node, G);
        let mut list = Transaction::new();
        list.clear(&node, "a").disable(&node, "a");
        drop(prepare(list).unwrap());
        assert_eq!(dirty(&node, "a"), [0, 1]);
        write(&node, 2 * G);
        assert_eq!(dirty(&node, "a"), [0, 1, 2], "it records again");
        node.bitmaps().check_invariants();
    }

    #[test]
    fn a_refused_enable_does_not_disable() {
        // What records although it is in use goes on recording when a list wants to enable it.
        let (nodes, holds) = two_nodes();
        let mut list = Transaction::new();
        list.enable(&nodes[0], "held");
        run(list).unwrap_err();
        drop(holds);
        assert!(nodes[0].bitmaps().query("held").unwrap().is_recording);
    }

    #[test]
    fn what_was_left_out_of_exports_stays_so_when_its_removal_is_undone() {
        let node = Node::new(LEN);
        node.bitmaps().set_storage(Some(BitmapStorage::default()));
        let mut persistent = options(G);
        persistent.persistent = true;
        node.bitmaps().add_disabled("a", persistent).unwrap();
        node.bitmaps().hold("a").unwrap().hand_over();
        let mut list = Transaction::new();
        list.remove(&node, "a");
        drop(prepare(list).unwrap());
        let export = node.bitmaps().export_state(&quiesced(&node)).unwrap();
        assert_eq!(export.to_keep, ["a"]);
    }
}

mod jobs {
    use super::*;

    /// A machine whose job is to be started.
    fn mirror(node: &Node) -> Mirror {
        let limits = Limits::new(node.len());
        Mirror::new(node, limits, limits, MirrorOptions::default()).unwrap()
    }

    fn status(mirror: &Mirror) -> Status {
        mirror.job().query().status
    }

    #[test]
    fn they_start_together_with_what_else_is_on_the_list() {
        let nodes = [Node::new(LEN), Node::new(LEN)];
        let mirrors = nodes.each_ref().map(mirror);
        let list = |is_aborted: bool| {
            let mut list = Transaction::new();
            for (node, mirror) in nodes.iter().zip(&mirrors) {
                list.add(node, "since", options(G)).start(mirror.job());
            }
            if is_aborted {
                list.abort();
            }
            list
        };
        assert_eq!(run(list(true)).unwrap_err().index, 4);
        let prepared = prepare(list(false)).unwrap();
        assert!(
            mirrors
                .iter()
                .all(|mirror| status(mirror) == Status::Created)
        );
        drop(prepared);
        assert!(
            mirrors
                .iter()
                .all(|mirror| status(mirror) == Status::Created)
        );
        run(list(false)).unwrap();
        assert!(
            mirrors
                .iter()
                .all(|mirror| status(mirror) == Status::Running)
        );
        assert_eq!(nodes.each_ref().map(|node| names(node).len()), [1, 1]);
    }

    /// The machine of a backup that a list is to start goes while the list is open, and gives back the bitmap: it
    /// stays with the list, which may have to undo what it did to it before.
    #[test]
    fn a_bitmap_that_a_dropped_backup_gives_back_stays_with_the_open_list() {
        for is_new in [true, false] {
            for is_committed in [true, false] {
                let node = Node::new(LEN);
                if !is_new {
                    let guard = quiesced(&node);
                    node.bitmaps().add(&guard, "a", options(G)).unwrap();
                    drop(guard);
                    write(&node, G);
                }
                let mut backup_options = BackupOptions::default();
                backup_options.sync = BackupSync::Bitmap;
                backup_options.bitmap = Some("a".to_owned());
                backup_options.bitmap_mode = Some(BitmapMode::OnSuccess);
                let limits = Limits::new(LEN);
                let backup = Backup::new(&node, limits, limits, backup_options).unwrap();
                let mut list = Transaction::new();
                if is_new {
                    list.add(&node, "a", options(G));
                } else {
                    list.clear(&node, "a");
                }
                list.start(backup.job());
                let prepared = prepare(list).unwrap();
                drop(backup);
                let with = BusyWith::Transaction;
                let name = "a".to_owned();
                let busy = Err(BitmapError::Busy { name, with });
                assert_eq!(node.bitmaps().remove("a"), busy);
                assert_eq!(node.bitmaps().disable("a"), busy);
                if is_committed {
                    prepared.commit();
                } else {
                    drop(prepared);
                }
                node.bitmaps().check_invariants();
                let infos = node.bitmaps().query_all();
                let is_there = is_committed || !is_new;
                assert_eq!(infos.len(), usize::from(is_there));
                if is_there {
                    assert!(infos[0].is_recording && !infos[0].is_busy());
                    let expected = if is_committed { vec![] } else { vec![1] };
                    assert_eq!(dirty(&node, "a"), expected);
                    node.bitmaps().remove("a").unwrap();
                }
            }
        }
    }

    #[test]
    fn what_cannot_start_is_told() {
        let node = Node::new(LEN);
        let mirror = mirror(&node);
        let start = |times: usize| {
            let mut list = Transaction::new();
            list.add(&node, "a", options(G));
            for _ in 0..times {
                list.start(mirror.job());
            }
            list
        };
        let error = run(start(2)).unwrap_err();
        assert_eq!((error.index, error.kind), (2, ActionKind::Start));
        assert_eq!(error.why, ActionError::StartedBefore);
        mirror.job().start().unwrap();
        let error = run(start(1)).unwrap_err();
        assert!(matches!(
            error.why,
            ActionError::Job(VerbError::NotAllowed { .. })
        ));
        assert_eq!(error.to_string().matches("action 1").count(), 1, "{error}");
        assert!(names(&node).is_empty());
    }

    #[test]
    fn one_that_is_cancelled_meanwhile_does_not_start() {
        let node = Node::new(LEN);
        let mirror = mirror(&node);
        let mut list = Transaction::new();
        list.start(mirror.job()).add(&node, "a", options(G));
        let prepared = prepare(list).unwrap();
        mirror.job().cancel(Cancel::Force).unwrap();
        prepared.commit();
        assert_ne!(status(&mirror), Status::Running);
        assert_eq!(names(&node), ["a"]);
    }
}

/// Mirrors that a list starts: from when on they record, and what is left of them when all is undone.
mod mirrors {
    use super::*;
    use blockjob::{
        ByteRange, ChangedSince, Checkpoint, CheckpointId, JobError, MirrorSync, OpKind, Resume,
    };

    use crate::machine::{Machine, Rest};

    /// A mirror of what is written from its start on, in granules of 64 KiB.
    fn new_writes(node: &Node) -> Machine {
        let mut options = MirrorOptions::default();
        options.sync = MirrorSync::None;
        machine(node, options)
    }

    /// A mirror by the bitmap `on`.
    fn by_bitmap(node: &Node, sync: MirrorSync, mode: BitmapMode) -> Machine {
        let mut options = MirrorOptions::default();
        options.sync = sync;
        options.bitmap = Some("on".to_owned());
        options.bitmap_mode = Some(mode);
        machine(node, options)
    }

    fn machine(node: &Node, options: MirrorOptions) -> Machine {
        let limits = Limits::new(node.len());
        let mirror = Mirror::new(node, limits, limits, options).unwrap();
        Machine::of(node.clone(), mirror, limits)
    }

    fn status(machine: &Machine) -> Status {
        machine.job.query().status
    }

    /// The granules that were copied.
    fn copied(machine: &Machine) -> Vec<u64> {
        let mut granules = Vec::new();
        for kind in &machine.asked {
            if let OpKind::Copy(range) = kind {
                granules.extend(range.start() / G..range.end().div_ceil(G));
            }
        }
        granules.sort_unstable();
        granules
    }

    fn drive(machine: &mut Machine) {
        let _ = machine.drive_now().wait();
        assert_eq!(status(machine), Status::Ready);
    }

    /// The disk's guest is not held, but where something else has the bitmaps all is as it was.
    fn assert_untouched(nodes: &[Node; 2], before: &[(BitmapInfo, HBitmap)]) {
        assert!(!nodes.iter().any(is_held));
        assert_eq!(picture(nodes), before);
    }

    #[test]
    fn they_record_from_one_instant_on_beside_all_else_of_the_list() {
        let (nodes, _holds) = two_nodes();
        let third = Node::new(LEN);
        let mut mirrors = nodes.each_ref().map(new_writes);
        let limits = Limits::new(LEN);
        let mut whole = BackupOptions::default();
        whole.sync = BackupSync::Full;
        let backup = Backup::new(&third, limits, limits, whole).unwrap();
        // Still in flight when the list is prepared: it belongs to what was before.
        let late = nodes[1].begin_write((0..1).into()).go().unwrap();
        mirrors[1].guest_lands(0..1, 7);
        let mut list = Transaction::new();
        list.start(&mirrors[0].job)
            .add(&nodes[1], "since", options(G))
            .start(&mirrors[1].job)
            .start(backup.job())
            .add(&nodes[0], "since", options(512));
        let preparing = list.prepare().try_prepared();
        let preparing = preparing.expect_err("a write is in flight");
        assert!(nodes.iter().all(is_held) && is_held(&third));
        late.finish(());
        let prepared = preparing.try_prepared().expect("it has settled").unwrap();
        assert!(nodes.iter().all(is_held), "until it is decided");
        prepared.commit();
        // Nobody has come by to drive them yet.
        for (index, machine) in mirrors.iter_mut().enumerate() {
            assert_eq!(status(machine), Status::Running);
            let at = (4 + index as u64) * G;
            machine.guest_write(at..at + 1, 1);
        }
        assert!(is_held_back(&third), "the backup has to save it first");
        for (index, machine) in mirrors.iter_mut().enumerate() {
            drive(machine);
            assert_eq!(
                copied(machine),
                [4 + index as u64],
                "what was written since"
            );
            assert_eq!(dirty(&nodes[index], "since"), copied(machine));
        }
    }

    fn is_held_back(node: &Node) -> bool {
        matches!(node.begin_write((0..1).into()), Begin::Wait(_))
    }

    #[test]
    fn the_bits_of_the_bitmap_are_those_of_the_instant() {
        for sync in [MirrorSync::Full, MirrorSync::Top] {
            for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
                let (nodes, _holds) = two_nodes();
                let mut mirrors = nodes.each_ref().map(|node| by_bitmap(node, sync, mode));
                let mut list = Transaction::new();
                // An earlier act changes it.
                list.clear(&nodes[0], "on")
                    .start(&mirrors[0].job)
                    .start(&mirrors[1].job);
                run(list).unwrap();
                for machine in &mut mirrors {
                    machine.guest_write(7 * G..7 * G + 1, 1);
                    drive(machine);
                }
                assert_eq!(copied(&mirrors[0]), [7]);
                assert_eq!(copied(&mirrors[1]), [3, 5, 7]);
                for machine in &mut mirrors {
                    machine.job.cancel(Cancel::Soft).unwrap();
                    machine.drive_now().done().unwrap();
                }
                let expected: [&[u64]; 2] = match mode {
                    BitmapMode::Never => [&[7], &[3, 5, 7]],
                    BitmapMode::OnSuccess | BitmapMode::Always => [&[], &[]],
                };
                assert_eq!(nodes.each_ref().map(|node| dirty(node, "on")), expected);
            }
        }
    }

    #[test]
    fn what_fails_leaves_no_recording_and_no_claim() {
        for is_dropped in [false, true] {
            let (nodes, _holds) = two_nodes();
            let before = picture(&nodes);
            let mut mirrors = [
                by_bitmap(&nodes[0], MirrorSync::Full, BitmapMode::Always),
                new_writes(&nodes[1]),
            ];
            let list = |is_vain: bool| {
                let mut list = Transaction::new();
                list.start(&mirrors[0].job)
                    .add(&nodes[1], "new", options(512))
                    .start(&mirrors[1].job);
                if is_vain {
                    list.abort();
                }
                list
            };
            if is_dropped {
                drop(prepare(list(false)).unwrap());
            } else {
                assert_eq!(run(list(true)).unwrap_err().index, 3);
            }
            assert_untouched(&nodes, &before);
            for machine in &mut mirrors {
                assert_eq!(status(machine), Status::Created);
                let _ = machine.drive_now().wait();
                assert!(machine.asked.is_empty());
            }
            // Neither is recorded by anybody but the bitmaps there are.
            nodes.iter().for_each(|node| write(node, 9 * G));
            // They begin as if it had never been tried, one by itself, and one with another list.
            mirrors[0].job.start().unwrap();
            let mut list = Transaction::new();
            list.start(&mirrors[1].job);
            run(list).unwrap();
            mirrors[1].guest_write(11 * G..11 * G + 1, 1);
            mirrors.iter_mut().for_each(drive);
            assert_eq!(copied(&mirrors[0]), [3, 5, 9]);
            assert_eq!(copied(&mirrors[1]), [11]);
        }
    }

    #[test]
    fn one_that_cannot_have_its_bitmap_does_not_begin() {
        let (nodes, _holds) = two_nodes();
        let mut mirrors = [
            new_writes(&nodes[0]),
            by_bitmap(&nodes[1], MirrorSync::Full, BitmapMode::OnSuccess),
        ];
        let taken = nodes[1].bitmaps().hold("on").unwrap();
        let before = picture(&nodes);
        let mut list = Transaction::new();
        list.start(&mirrors[0].job).start(&mirrors[1].job);
        let error = run(list.clone()).unwrap_err();
        assert_eq!((error.index, error.kind), (1, ActionKind::Start));
        let is_busy = matches!(error.why, ActionError::Bitmap(BitmapError::Busy { .. }));
        assert!(is_busy, "{error}");
        assert_untouched(&nodes, &before);
        drop(taken);
        run(list).unwrap();
        mirrors.iter_mut().for_each(drive);
        assert_eq!(copied(&mirrors[1]), [3, 5]);
    }

    /// Somebody else starts the job while it is not decided whether the list does.
    #[test]
    fn what_may_still_be_undone_is_not_worked_with() {
        for is_committed in [true, false] {
            let (nodes, _holds) = two_nodes();
            let mut machine = by_bitmap(&nodes[0], MirrorSync::Full, BitmapMode::OnSuccess);
            let mut list = Transaction::new();
            list.clear(&nodes[0], "on").start(&machine.job);
            let prepared = prepare(list).unwrap();
            machine.job.start().unwrap();
            let _ = machine.drive_now().wait();
            assert!(machine.asked.is_empty(), "it waits for the list");
            machine.woken.take();
            match is_committed {
                true => prepared.commit(),
                false => drop(prepared),
            }
            assert!(machine.woken.take() > 0);
            machine.guest_write(7 * G..7 * G + 1, 1);
            drive(&mut machine);
            match is_committed {
                true => assert_eq!(copied(&machine), [7]),
                false => assert_eq!(copied(&machine), [3, 5, 7]),
            }
        }
    }

    /// Whoever goes before the machine has come by: the bitmap has what it had and what was written since.
    #[test]
    fn one_that_ends_before_it_is_driven_gives_back_its_bitmap() {
        #[derive(Clone, Copy, Debug, PartialEq)]
        enum End {
            Dropped,
            Cancelled,
        }
        for mode in [BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always] {
            for end in [End::Dropped, End::Cancelled] {
                for is_open in [true, false] {
                    let (nodes, _holds) = two_nodes();
                    let mut machine = by_bitmap(&nodes[0], MirrorSync::Full, mode);
                    let mut list = Transaction::new();
                    list.start(&machine.job);
                    let mut prepared = Some(prepare(list).unwrap());
                    let mut commit = |machine: &mut Machine| {
                        prepared.take().unwrap().commit();
                        machine.guest_write(9 * G..9 * G + 1, 1);
                    };
                    if !is_open {
                        commit(&mut machine);
                    }
                    match end {
                        End::Dropped => machine.drop_mirror(),
                        End::Cancelled => machine.job.cancel(Cancel::Force).unwrap(),
                    }
                    if is_open {
                        commit(&mut machine);
                    }
                    if end == End::Cancelled {
                        let result = machine.drive_now().done();
                        assert!(matches!(result, Err(JobError::Cancelled { .. })));
                    }
                    let what = format!("{mode:?}, {end:?}, open: {is_open}");
                    let info = nodes[0].bitmaps().query("on").unwrap();
                    assert!(info.is_recording && !info.is_busy(), "{what}");
                    assert_eq!(dirty(&nodes[0], "on"), [3, 5, 9], "{what}");
                    nodes[0].bitmaps().check_invariants();
                    Mirror::new(
                        &nodes[0],
                        Limits::new(LEN),
                        Limits::new(LEN),
                        MirrorOptions::default(),
                    )
                    .expect("the disk is free for another job");
                }
            }
        }
    }

    #[test]
    fn one_that_goes_on_from_a_checkpoint_does_so_after_an_undoing_too() {
        let id = CheckpointId {
            source: [1; 16],
            target: [2; 16],
            generation: 3,
        };
        let node = Node::new(LEN);
        let mut first = new_writes(&node);
        first.job.start().unwrap();
        drive(&mut first);
        for granule in [1, 2] {
            first.guest_write(granule * G..granule * G + 1, 1);
        }
        let bytes = first.mirror().checkpoint(id).expect("it has begun");
        drop(first);

        let (nodes, _holds) = two_nodes();
        let mut options = MirrorOptions::default();
        options.sync = MirrorSync::None;
        options.bitmap = Some("on".to_owned());
        options.bitmap_mode = Some(BitmapMode::Always);
        let resume = Resume {
            checkpoint: Checkpoint::decode(&bytes, 1 << 20).unwrap(),
            id,
            changed: ChangedSince::InBitmap,
        };
        let limits = Limits::new(LEN);
        let mirror = Mirror::resume(&nodes[0], limits, limits, options, resume).unwrap();
        let mut machine = Machine::of(nodes[0].clone(), mirror, limits);
        let mut list = Transaction::new();
        list.start(&machine.job);
        drop(prepare(list.clone()).unwrap());
        // What the bitmap had when it was tried is not what it has when it begins.
        nodes[0].bitmaps().clear("on").unwrap();
        write(&nodes[0], 6 * G);
        run(list).unwrap();
        drive(&mut machine);
        assert_eq!(copied(&machine), [1, 2, 6]);
    }

    /// A machine that wants to begin while a list has its guest held for it: one of the two does.
    #[test]
    fn the_machine_and_a_list_do_not_both_begin_it() {
        let (nodes, _holds) = two_nodes();
        let mut machine = by_bitmap(&nodes[0], MirrorSync::Full, BitmapMode::OnSuccess);
        let ticket = nodes[0].begin_write((0..1).into()).go().unwrap();
        let mut list = Transaction::new();
        list.start(&machine.job);
        let preparing = list
            .prepare()
            .try_prepared()
            .expect_err("a write is in flight");
        machine.job.start().unwrap();
        let rest = machine.drive_now();
        assert!(
            matches!(rest, Rest::Wait(Some(_))),
            "it holds the guest, too"
        );
        ticket.finish(());
        let error = preparing.try_prepared().expect("settled").unwrap_err();
        assert!(matches!(error.why, ActionError::Job(_)), "{error}");
        drive(&mut machine);
        assert_eq!(copied(&machine), [0, 3, 5]);
        let all = ByteRange::from(0..LEN);
        assert!(
            machine
                .asked
                .iter()
                .all(|op| op.range().is_none_or(|range| all.overlaps(range)))
        );
    }

    #[cfg(debug_assertions)]
    #[test]
    fn every_broken_invariant_is_noticed() {
        use blockjob::sabotage::{Sabotage, break_on_this_thread};
        let broken: [(Sabotage, fn()); 2] = [
            (
                Sabotage::KeepBegun,
                what_fails_leaves_no_recording_and_no_claim,
            ),
            (
                Sabotage::TakeUndecided,
                what_may_still_be_undone_is_not_worked_with,
            ),
        ];
        for (sabotage, test) in broken {
            break_on_this_thread(Some(sabotage));
            let is_noticed = machine::fails(test);
            break_on_this_thread(None);
            assert!(is_noticed, "{sabotage:?}");
            test();
        }
    }
}

/// A guest writes to two disks while one bitmap is exchanged for the next, on both at one instant, in either
/// order, and every other time in vain. Under the guards each disk is read: what differs from the last time
/// is what the bitmap has that is put off, no more and no less.
#[test]
fn no_write_falls_between_two_bitmaps() {
    const ROUNDS: usize = 200;
    const GRANULES: usize = 512;
    let nodes = [(); 2].map(|()| Node::new(GRANULES as u64 * 512));
    let disks = nodes
        .each_ref()
        .map(|_| [(); GRANULES].map(|()| AtomicU64::new(0)));
    let is_over = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let mut first = Transaction::new();
    for node in &nodes {
        first.add(node, "0", options(512));
    }
    run(first).unwrap();

    let guest = |mut random: u64| {
        while !is_over.load(Ordering::Relaxed) {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (disk, granule) = (
                (random >> 40) as usize % 2,
                (random >> 41) as usize % GRANULES,
            );
            let at = granule as u64 * 512;
            match nodes[disk].begin_write((at..at + 1).into()) {
                Begin::Go(ticket) => {
                    disks[disk][granule].fetch_add(1, Ordering::Relaxed);
                    ticket.finish(());
                    writes.fetch_add(1, Ordering::Relaxed);
                }
                Begin::Wait(_) => thread::yield_now(),
                Begin::Refused(_) => panic!("no bitmap is read-only"),
            }
        }
    };
    let read = || {
        disks
            .each_ref()
            .map(|disk| disk.each_ref().map(|data| data.load(Ordering::Relaxed)))
    };
    let until_prepared = |list: Transaction| {
        let mut preparing = list.prepare();
        loop {
            match preparing.try_prepared() {
                Ok(prepared) => break prepared,
                Err(again) => preparing = again,
            }
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        for seed in 1..=2 {
            scope.spawn(move || guest(seed));
        }
        let _over = Raised(&is_over);
        let mut before = [[0; GRANULES]; 2];
        let mut differed = 0;
        for round in 0..ROUNDS {
            if round % 16 == 0 {
                wait_for_writes(&writes, 64);
            }
            thread::sleep(Duration::from_micros(300));
            let (old, new) = (round.to_string(), (round + 1).to_string());
            let list = || {
                let mut list = Transaction::new();
                for node in &nodes {
                    if round % 2 == 0 {
                        list.add(node, &new, options(512)).disable(node, &old);
                    } else {
                        list.disable(node, &old).add(node, &new, options(512));
                    }
                }
                list
            };
            // In vain, by an act that fails or by a change of mind.
            let mut vain = list();
            if round % 3 == 0 {
                vain.abort();
            }
            drop(until_prepared(vain));
            let prepared = until_prepared(list()).unwrap();
            let now = read();
            for (index, node) in nodes.iter().enumerate() {
                let bits = node.bitmaps().snapshot(&old, SnapshotOf::Bitmap).unwrap();
                let granules = 0..GRANULES;
                let differs = granules.filter(|at| now[index][*at] != before[index][*at]);
                let differs: Vec<_> = differs.map(|at| at as u64 * 512).collect();
                assert!(bits.iter().eq(differs.iter().copied()), "round {round}");
                differed += differs.len();
                let next = node.bitmaps().snapshot(&new, SnapshotOf::Bitmap).unwrap();
                assert!(next.is_clean());
            }
            assert_eq!(now, read(), "a guest wrote");
            prepared.commit();
            before = now;
            nodes
                .iter()
                .for_each(|node| node.bitmaps().remove(&old).unwrap());
        }
        assert!(differed > ROUNDS / 4, "the guests hardly wrote");
    });
}

/// A guest writes while a bitmap is claimed, given back, given up, merged and cleared, and nobody holds the
/// guest. What was taken out of the bitmap is kept: with what is left it is all that was written, and no more.
#[test]
fn no_write_is_lost_by_verbs_that_hold_nobody() {
    const GRANULES: u64 = 4096;
    let node = Node::new(GRANULES * 512);
    let bitmaps = node.bitmaps();
    bitmaps.add(&quiesced(&node), "a", options(512)).unwrap();
    bitmaps.add_disabled("sum", options(512)).unwrap();
    let mut kept = HBitmap::new(GRANULES * 512, Granularity::from_bytes(512).unwrap()).unwrap();
    let is_over = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let guest = |seed: u64| {
        let queue = node.queue();
        let mut written = std::collections::BTreeSet::new();
        let mut random = seed;
        while !is_over.load(Ordering::Relaxed) {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (random >> 40) % GRANULES * 512;
            let begin = queue.begin_write((at..at + 512).into());
            begin.go().expect("nobody holds the node").finish(());
            written.insert(at);
            writes.fetch_add(1, Ordering::Relaxed);
        }
        written
    };
    let mut written = thread::scope(|scope| {
        let guests = [1, 2].map(|seed| scope.spawn(move || guest(seed)));
        let over = Raised(&is_over);
        for round in 0..600 {
            if round % 32 == 0 {
                wait_for_writes(&writes, 16);
            }
            match round % 4 {
                0 | 1 => {
                    let claim = bitmaps.claim("a", ClaimFor::Change).unwrap();
                    let claimed = claim.snapshot(SnapshotOf::Bitmap).unwrap();
                    thread::yield_now();
                    assert!(claim.snapshot(SnapshotOf::Bitmap).unwrap() == claimed);
                    if round % 4 == 0 {
                        claim.abdicate();
                        kept.merge_from(&claimed).unwrap();
                    }
                }
                2 => bitmaps.merge("sum", &[(&node, "a")]).unwrap(),
                _ => bitmaps.merge("a", &[(&node, "sum")]).unwrap(),
            }
        }
        drop(over);
        guests.map(|guest| guest.join().unwrap())
    });
    for name in ["a", "sum"] {
        let bits = bitmaps.snapshot(name, SnapshotOf::Bitmap).unwrap();
        kept.merge_from(&bits).unwrap();
    }
    let [all, other] = &mut written;
    all.append(other);
    assert!(kept.iter().eq(all.iter().copied()));
}

/// Two who exchange bitmaps on the same disks at the same time, and name them in opposite orders.
#[test]
fn transactions_on_the_same_disks_do_not_wait_for_each_other() {
    const ROUNDS: usize = 500;
    let (nodes, _holds) = two_nodes();
    let merge = |into: usize, from: usize| {
        let mut done = 0;
        for _ in 0..ROUNDS {
            let mut list = Transaction::new();
            list.merge(&nodes[into], "on", &[(&nodes[from], "on")])
                .merge(&nodes[from], "off", &[(&nodes[into], "off")]);
            match run(list) {
                Ok(()) => done += 1,
                Err(error) => assert!(
                    matches!(error.why, ActionError::Bitmap(BitmapError::Busy { .. })),
                    "{error}"
                ),
            }
        }
        done
    };
    let done: usize = thread::scope(|scope| {
        let threads = [scope.spawn(|| merge(0, 1)), scope.spawn(|| merge(1, 0))];
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert!(done > 0);
    assert!(!nodes.iter().any(is_held));
}

/// Until the guests, however busy the machine is, have written so many times more.
fn wait_for_writes(writes: &AtomicU64, more: u64) {
    let until = writes.load(Ordering::Relaxed) + more;
    while writes.load(Ordering::Relaxed) < until {
        thread::yield_now();
    }
}

struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
