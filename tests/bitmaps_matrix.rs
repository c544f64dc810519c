//! Every verb on a bitmap in every state: what is told, and that nothing has changed if it is refused.
//!
//! The states are made by what makes them in life. What is expected comes from three sets of checks, in one
//! order: in use, read-only, inconsistent.

use std::any::Any;

use blockjob::{
    BitmapError, BitmapInfo, BitmapOptions, BitmapState, BitmapStorage, BusyWith, ClaimFor,
    Granularity, Grown, HBitmap, Limits, Mirror, MirrorError, MirrorOptions, Node, Prepared,
    QuiesceGuard, SnapshotOf, TrackError, Transaction,
};

const LEN: u64 = (1 << 20) + 512;
const G: u64 = 1 << 16;
const X: &str = "x";
const Y: &str = "y";

/// Who has the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nobody,
    Claim,
    ClaimForReading,
    Freeze,
    Hold,
    Transaction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    held: Held,
    is_enabled: bool,
    is_readonly: bool,
    is_inconsistent: bool,
}

impl State {
    /// Each that there can be.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for is_readonly in [false, true] {
            for held in [
                Held::Nobody,
                Held::Claim,
                Held::ClaimForReading,
                Held::Freeze,
                Held::Hold,
                Held::Transaction,
            ] {
                for is_enabled in [false, true] {
                    if held == Held::Freeze && is_enabled {
                        continue;
                    }
                    all.push(Self {
                        held,
                        is_enabled,
                        is_readonly,
                        is_inconsistent: false,
                    });
                }
            }
            for held in [Held::Nobody, Held::Transaction] {
                // A transaction can only be about to remove it, which it cannot be if it is read-only.
                if held == Held::Nobody || !is_readonly {
                    all.push(Self {
                        held,
                        is_enabled: false,
                        is_readonly,
                        is_inconsistent: true,
                    });
                }
            }
        }
        all
    }

    fn busy_with(self) -> Option<BusyWith> {
        match self.held {
            Held::Nobody => None,
            Held::Claim | Held::ClaimForReading => Some(BusyWith::Job),
            Held::Freeze => Some(BusyWith::Reader),
            Held::Hold => Some(BusyWith::Holder),
            Held::Transaction => Some(BusyWith::Transaction),
        }
    }

    /// What `checks`, of all three, say of it.
    fn refuses(self, checks: &[Check]) -> Option<BitmapError> {
        let name = || X.to_owned();
        let looks_at = |check| checks.contains(&check);
        if let (true, Some(with)) = (looks_at(Check::Busy), self.busy_with()) {
            return Some(BitmapError::Busy { name: name(), with });
        }
        if looks_at(Check::ReadOnly) && self.is_readonly {
            return Some(BitmapError::ReadOnly { name: name() });
        }
        if looks_at(Check::Inconsistent) && self.is_inconsistent {
            return Some(BitmapError::Inconsistent { name: name() });
        }
        None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Busy,
    ReadOnly,
    Inconsistent,
}

const CHANGE: &[Check] = &[Check::Busy, Check::ReadOnly, Check::Inconsistent];
const USE: &[Check] = &[Check::Busy, Check::Inconsistent];
const REMOVE: &[Check] = &[Check::Busy, Check::ReadOnly];
const READ: &[Check] = &[Check::Inconsistent];
const LOOK: &[Check] = &[];

/// A node with a bitmap `x` in a state, and an idle `y`; another node with a `y`.
struct World {
    node: Node,
    other: Node,
    /// Keeps `x` in its state.
    owner: Option<Box<dyn Any>>,
}

fn quiesced(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

fn write(node: &Node, at: u64) {
    let begin = node.begin_write((at..at + 1).into());
    begin.go().expect("nobody holds the node").finish(());
}

fn persistent() -> BitmapOptions {
    let mut options = BitmapOptions::default();
    options.persistent = true;
    options
}

impl World {
    fn new(state: State) -> Self {
        let (node, other) = (Node::new(LEN), Node::new(LEN));
        let bitmaps = node.bitmaps();
        bitmaps.set_storage(Some(BitmapStorage::default()));
        let guard = quiesced(&node);
        if state.is_inconsistent {
            let bits = HBitmap::new(LEN, Granularity::DEFAULT).unwrap();
            let mut stored = BitmapState::new(X, bits);
            stored.is_in_use = true;
            bitmaps.import_state(&guard, vec![stored]).unwrap();
        } else {
            bitmaps.add(&guard, X, persistent()).unwrap();
        }
        bitmaps.add(&guard, Y, persistent()).unwrap();
        other
            .bitmaps()
            .add(&quiesced(&other), Y, persistent())
            .unwrap_err();
        other
            .bitmaps()
            .add(&quiesced(&other), Y, BitmapOptions::default())
            .unwrap();
        drop(guard);
        write(&node, 70_000);
        write(&other, 500_000);
        if !state.is_enabled && !state.is_inconsistent {
            bitmaps.disable(X).unwrap();
        }
        // Afterwards those who may still put things back would not let it.
        let is_open = state.held == Held::Transaction;
        if state.is_readonly && is_open {
            bitmaps.mark_readonly(&quiesced(&node), X).unwrap();
        }
        let owner: Option<Box<dyn Any>> = match state.held {
            Held::Nobody => None,
            Held::Claim => Some(Box::new(bitmaps.claim(X, ClaimFor::Change).unwrap())),
            Held::ClaimForReading => Some(Box::new(bitmaps.claim(X, ClaimFor::Reading).unwrap())),
            Held::Freeze => Some(Box::new(bitmaps.freeze(X).unwrap())),
            Held::Hold => Some(Box::new(bitmaps.hold(X).unwrap())),
            Held::Transaction => Some(Box::new(touch(&node, state))),
        };
        // What is written while it is in use.
        if let Some(ticket) = node.begin_write((700_000..700_001).into()).go() {
            ticket.finish(());
        }
        if state.is_readonly && !is_open {
            bitmaps.mark_readonly(&quiesced(&node), X).unwrap();
        }
        let world = Self { node, other, owner };
        let info = world.node.bitmaps().query(X).unwrap();
        assert_eq!(info.busy_with, state.busy_with());
        assert_eq!(info.is_recording, state.is_enabled);
        assert_eq!(info.is_readonly, state.is_readonly);
        assert_eq!(info.is_inconsistent, state.is_inconsistent);
        world
    }

    /// Everything that can be seen of the bitmaps.
    fn picture(&self) -> Vec<(BitmapInfo, [Option<HBitmap>; 2])> {
        let of = |node: &Node| {
            let bitmaps = node.bitmaps();
            bitmaps.check_invariants();
            let infos = bitmaps.query_all().into_iter();
            Vec::from_iter(infos.map(|info| {
                let bits = [SnapshotOf::Bitmap, SnapshotOf::WithSuccessor]
                    .map(|of| bitmaps.snapshot(&info.name, of).ok());
                (info, bits)
            }))
        };
        [of(&self.node), of(&self.other)].concat()
    }
}

/// Has a transaction touch `x` and leaves it open.
fn touch(node: &Node, state: State) -> Prepared {
    let mut list = Transaction::new();
    if state.is_inconsistent {
        list.remove(node, X);
    } else if state.is_enabled {
        list.enable(node, X);
    } else {
        list.disable(node, X);
    }
    let prepared = list.prepare().try_prepared();
    prepared.expect("no write is in flight").unwrap()
}

type Ask = fn(&World) -> Result<(), BitmapError>;

/// What is asked, what is looked at, and what it is.
const VERBS: &[(&str, &[Check], Ask)] = &[
    ("remove", REMOVE, |world| world.node.bitmaps().remove(X)),
    ("clear", CHANGE, |world| world.node.bitmaps().clear(X)),
    ("enable", USE, |world| {
        world.node.bitmaps().enable(&quiesced(&world.node), X)
    }),
    ("disable", USE, |world| world.node.bitmaps().disable(X)),
    ("merge into", CHANGE, |world| {
        world.node.bitmaps().merge(X, &[(&world.node, Y)])
    }),
    ("merge another node's into", CHANGE, |world| {
        world.node.bitmaps().merge(X, &[(&world.other, Y)])
    }),
    ("merge from", USE, |world| {
        world.node.bitmaps().merge(Y, &[(&world.node, X)])
    }),
    ("merge last from", USE, |world| {
        let sources = [(&world.other, Y), (&world.node, X)];
        world.node.bitmaps().merge(Y, &sources)
    }),
    ("merge into another node's", USE, |world| {
        let sources = [(&world.node, Y), (&world.node, X)];
        world.other.bitmaps().merge(Y, &sources)
    }),
    ("rename", CHANGE, |world| {
        world.node.bitmaps().rename(X, "z")
    }),
    ("query", LOOK, |world| {
        world.node.bitmaps().query(X).map(drop)
    }),
    ("runs", READ, |world| {
        world.node.bitmaps().runs(X, 0..LEN, 10).map(drop)
    }),
    ("snapshot", READ, |world| {
        let bitmaps = world.node.bitmaps();
        bitmaps.snapshot(X, SnapshotOf::WithSuccessor).map(drop)
    }),
    ("claim for change", CHANGE, |world| {
        world.node.bitmaps().claim(X, ClaimFor::Change).map(drop)
    }),
    ("claim for reading", USE, |world| {
        world.node.bitmaps().claim(X, ClaimFor::Reading).map(drop)
    }),
    ("resize", REMOVE, |world| {
        let guard = quiesced(&world.node);
        let resize = world.node.resize(&guard, LEN + 1, Grown::Dirty)?;
        resize.commit();
        Ok(())
    }),
    ("hold", CHANGE, |world| {
        world.node.bitmaps().hold(X).map(drop)
    }),
];

/// Asks, and looks whether all is as before if it was refused.
fn check(state: State, verb: &str, expected: Option<BitmapError>, ask: Ask) {
    let world = World::new(state);
    let before = world.picture();
    let answer = ask(&world);
    assert_eq!(answer.clone().err(), expected, "{verb} on {state:?}");
    if answer.is_err() {
        assert_eq!(world.picture(), before, "{verb} on {state:?}");
    }
    for bitmaps in [world.node.bitmaps(), world.other.bitmaps()] {
        bitmaps.check_invariants();
    }
    // Whatever was asked, its owner still has it, and can end that.
    let World { node, owner, .. } = world;
    drop(owner);
    node.bitmaps().check_invariants();
    if let Ok(info) = node.bitmaps().query(X) {
        assert_eq!(info.busy_with, None, "{verb} on {state:?}");
    }
}

#[test]
fn every_verb_in_every_state() {
    for state in State::all() {
        for (verb, checks, ask) in VERBS {
            check(state, verb, state.refuses(checks), *ask);
        }
    }
}

#[test]
fn a_name_that_is_taken_is_taken_in_every_state() {
    let taken: &[(&str, Ask)] = &[
        ("add", |world| {
            let bitmaps = world.node.bitmaps();
            bitmaps.add(&quiesced(&world.node), X, BitmapOptions::default())
        }),
        ("add disabled", |world| {
            world.node.bitmaps().add_disabled(X, persistent())
        }),
        ("rename to it", |world| world.node.bitmaps().rename(Y, X)),
        ("import", |world| {
            let bits = HBitmap::new(LEN, Granularity::DEFAULT).unwrap();
            let states = vec![
                BitmapState::new("new", bits.clone()),
                BitmapState::new(X, bits),
            ];
            let bitmaps = world.node.bitmaps();
            bitmaps.import_state(&quiesced(&world.node), states)
        }),
    ];
    for state in State::all() {
        for (verb, ask) in taken {
            let name = X.to_owned();
            check(state, verb, Some(BitmapError::NameExists { name }), *ask);
        }
    }
}

#[test]
fn freezing_wants_a_bitmap_that_does_not_record() {
    for state in State::all() {
        let recording = || {
            let name = X.to_owned();
            state.is_enabled.then_some(BitmapError::Recording { name })
        };
        let expected = state.refuses(USE).or_else(recording);
        check(state, "freeze", expected, |world| {
            world.node.bitmaps().freeze(X).map(drop)
        });
    }
}

#[test]
fn what_would_be_stored_must_not_be_in_use() {
    for state in State::all() {
        let is_kept = state.is_readonly || state.is_inconsistent || state.held == Held::Hold;
        let expected = if is_kept {
            None
        } else {
            state.refuses(&[Check::Busy])
        };
        check(state, "export", expected, |world| {
            let guard = quiesced(&world.node);
            world.node.bitmaps().export_state(&guard).map(drop)
        });
        if is_kept || state.busy_with().is_none() {
            let world = World::new(state);
            let export = world.node.bitmaps().export_state(&quiesced(&world.node));
            let export = export.unwrap();
            let names = |states: &[BitmapState]| {
                Vec::from_iter(states.iter().map(|state| state.name.clone()))
            };
            let (stored, kept) = if is_kept {
                (vec![Y], vec![X])
            } else {
                (vec![X, Y], vec![])
            };
            assert_eq!(names(&export.to_store), stored, "{state:?}");
            assert_eq!(export.to_keep, kept, "{state:?}");
        }
    }
}

/// With another length in the making every bitmap of the disk is in use, and none can be made.
#[test]
fn while_the_disk_is_resized_nothing_else_is_done() {
    for is_committed in [false, true] {
        let world = World::new(State::all()[1]);
        let before = world.picture();
        let guard = quiesced(&world.node);
        let resize = world.node.resize(&guard, LEN + G, Grown::Dirty).unwrap();
        let with = BusyWith::Resize;
        let bitmaps = world.node.bitmaps();
        for (verb, checks, ask) in VERBS {
            match ask(&world) {
                Ok(()) => assert!(!checks.contains(&Check::Busy), "{verb}"),
                Err(BitmapError::Busy { with: found, .. }) => assert_eq!(found, with, "{verb}"),
                // Of another resize.
                Err(error) => assert_eq!(error, BitmapError::NodeBusy { with }, "{verb}"),
            }
        }
        let busy = BitmapError::NodeBusy { with };
        let transient = BitmapOptions::default();
        assert_eq!(bitmaps.add(&guard, "z", transient), Err(busy.clone()));
        assert_eq!(bitmaps.add_disabled("z", transient), Err(busy.clone()));
        let bits = HBitmap::new(LEN, Granularity::DEFAULT).unwrap();
        let states = vec![BitmapState::new("z", bits)];
        assert_eq!(bitmaps.import_state(&guard, states), Err(busy.clone()));
        let mut list = Transaction::new();
        list.add(&world.node, "z", transient);
        let error = list.prepare().try_prepared().unwrap().unwrap_err();
        assert_eq!(error.why, busy.into());
        let tracked = world.node.track(&guard, Granularity::DEFAULT);
        assert_eq!(tracked.unwrap_err(), TrackError::Resized);
        let limits = Limits::new(LEN);
        let mirror = Mirror::new(&world.node, limits, limits, MirrorOptions::default());
        assert!(matches!(mirror, Err(MirrorError::NodeBusy)));
        if is_committed {
            resize.commit();
            assert_eq!(world.node.len(), LEN + G);
        } else {
            drop(resize);
            assert_eq!(world.picture(), before);
        }
        bitmaps.check_invariants();
        bitmaps.clear(X).unwrap();
    }
}

#[test]
fn an_owner_changes_bits_that_are_not_read_only() {
    for is_readonly in [false, true] {
        let world = World::new(State {
            held: Held::Nobody,
            is_enabled: true,
            is_readonly: false,
            is_inconsistent: false,
        });
        let bitmaps = world.node.bitmaps();
        let claim = bitmaps.claim(X, ClaimFor::Change).unwrap();
        if is_readonly {
            bitmaps.mark_readonly(&quiesced(&world.node), X).unwrap();
            let refused = claim.lock().unwrap_err();
            assert_eq!(refused, BitmapError::ReadOnly { name: X.to_owned() });
        } else {
            claim.lock().unwrap().reset_all();
        }
        let bits = claim.snapshot(SnapshotOf::Bitmap).unwrap();
        assert_eq!(bits.is_clean(), !is_readonly);
    }
}

/// Whoever has it, and only of one that knows anything. Two that have the same are the same.
#[cfg(feature = "sha2")]
#[test]
fn a_digest_is_told_in_every_state() {
    for state in State::all() {
        let world = World::new(state);
        let before = world.picture();
        let bitmaps = world.node.bitmaps();
        let mut info = bitmaps.query_with_digest(X).unwrap();
        assert_eq!(world.picture(), before);
        let bits = bitmaps.snapshot(X, SnapshotOf::Bitmap);
        let expected = bits.ok().map(|bits| bits.digest());
        assert_eq!(info.digest, expected, "{state:?}");
        assert_eq!(expected.is_none(), state.is_inconsistent);
        info.digest = None;
        assert_eq!(bitmaps.query(X), Ok(info));
        // What it is called does not go in.
        if state == State::all()[0] {
            bitmaps.rename(X, "z").unwrap();
            assert_eq!(bitmaps.query_with_digest("z").unwrap().digest, expected);
            bitmaps.clear("z").unwrap();
            assert_ne!(bitmaps.query_with_digest("z").unwrap().digest, expected);
        }
    }
    let node = Node::new(LEN);
    let missing = node.bitmaps().query_with_digest(X);
    let name = X.to_owned();
    assert_eq!(missing, Err(BitmapError::NotFound { name }));
}

#[test]
fn nothing_is_told_of_what_is_not_there() {
    let state = State::all()[0];
    let missing = BitmapError::NotFound {
        name: "nobody".to_owned(),
    };
    let verbs: &[(&str, Ask)] = &[
        ("remove", |world| world.node.bitmaps().remove("nobody")),
        ("clear", |world| world.node.bitmaps().clear("nobody")),
        ("enable", |world| {
            world
                .node
                .bitmaps()
                .enable(&quiesced(&world.node), "nobody")
        }),
        ("disable", |world| world.node.bitmaps().disable("nobody")),
        ("merge into", |world| {
            world.node.bitmaps().merge("nobody", &[(&world.node, Y)])
        }),
        ("merge nothing into", |world| {
            world.node.bitmaps().merge("nobody", &[])
        }),
        ("merge from", |world| {
            let sources = [(&world.node, Y), (&world.node, "nobody")];
            world.node.bitmaps().merge(X, &sources)
        }),
        ("rename", |world| world.node.bitmaps().rename("nobody", "z")),
        ("query", |world| {
            world.node.bitmaps().query("nobody").map(drop)
        }),
        ("runs", |world| {
            world.node.bitmaps().runs("nobody", 0..LEN, 1).map(drop)
        }),
        ("snapshot", |world| {
            let bitmaps = world.node.bitmaps();
            bitmaps.snapshot("nobody", SnapshotOf::Bitmap).map(drop)
        }),
        ("freeze", |world| {
            world.node.bitmaps().freeze("nobody").map(drop)
        }),
        ("claim", |world| {
            let bitmaps = world.node.bitmaps();
            bitmaps.claim("nobody", ClaimFor::Change).map(drop)
        }),
        ("hold", |world| {
            world.node.bitmaps().hold("nobody").map(drop)
        }),
        ("mark read-only", |world| {
            let bitmaps = world.node.bitmaps();
            bitmaps.mark_readonly(&quiesced(&world.node), "nobody")
        }),
        ("mark writable", |world| {
            world.node.bitmaps().mark_writable("nobody")
        }),
    ];
    for (verb, ask) in verbs {
        check(state, verb, Some(missing.clone()), *ask);
    }
}
