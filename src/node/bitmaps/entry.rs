//! One bitmap of a node: what it holds, and who has it.
//!
//! The types say what cannot be: a bitmap of a job has no flags and no name, what is frozen or claimed
//! does not record, only what is claimed has a successor, and that is no bitmap that could be named.

use std::fmt;
use std::sync::Arc;

use super::error::BitmapError;
use super::{BitmapInfo, SnapshotOf, copy_of};
use crate::bitmap::{Changes, HBitmap};
use crate::log::DirtyWord;
use crate::node::growing::Record;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// A bitmap in the list of its node.
pub(in crate::node) struct Entry {
    /// Never used twice on a node. Creation goes by ascending ids.
    pub(in crate::node) id: u64,
    pub(in crate::node) body: Body,
}

pub(in crate::node) enum Body {
    /// Of a job: without a name, recording for as long as it exists.
    Job(HBitmap),
    Named(Named),
}

/// A bitmap with a name.
pub(in crate::node) struct Named {
    pub(super) name: String,
    /// If it is persistent: what is said of its stored copy.
    pub(super) stored: Option<Stored>,
    pub(super) content: Content,
}

/// What is said of a stored copy.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stored {
    /// The storage cannot be written to.
    pub(super) is_readonly: bool,
    /// It is left alone when bitmaps are stored: somebody else has the bitmap now. So it is while it is held, too.
    pub(super) is_handed_over: bool,
}

pub(super) enum Content {
    /// The stored copy was not closed, so what it says is worth nothing, and is not kept.
    Inconsistent {
        len: u64,
        granularity: Granularity,
        /// An open transaction is about to remove it, or the disk's length to change.
        held: Option<BusyWith>,
    },
    Known {
        /// Shared only while the bitmap is frozen, which is when nobody changes it.
        map: Arc<HBitmap>,
        usage: Usage,
    },
}

/// Who has a bitmap, and so who records.
pub(super) enum Usage {
    /// Nobody: any verb may be asked.
    Idle { is_enabled: bool },
    /// An operation, which lets it record or not as before.
    Held {
        is_enabled: bool,
        by: BusyWith,
        /// Which chunks guest writes have changed, if somebody wants to know.
        changes: Option<Box<Changes>>,
    },
    /// Those who read it, without the lock.
    Frozen,
    /// An operation to which its bits belong. What is written meanwhile goes to the successor.
    Claimed(Successor),
    /// It comes from another host, and its bits are not here yet: the map has only what was written since
    /// the guest runs here.
    Arriving { is_enabled: bool },
}

/// Where guest writes to a node are recorded.
pub(in crate::node) enum Recorder<'a> {
    Plain(&'a mut HBitmap),
    /// With a note of the chunks that it changes.
    Tracked(&'a mut HBitmap, &'a mut Changes),
}

impl Record for Recorder<'_> {
    fn set_word(&mut self, granularity: Granularity, word: DirtyWord) {
        match self {
            Recorder::Plain(map) => map.set_word(granularity, word),
            Recorder::Tracked(map, changes) => changes.set_word(map, granularity, word),
        }
    }
}

impl Recorder<'_> {
    /// A write within the disk.
    pub(super) fn record(&mut self, range: ByteRange) {
        match self {
            Recorder::Plain(map) => {
                map.set(range).expect("within the disk");
            }
            Recorder::Tracked(map, changes) => changes.set(map, range),
        }
    }
}

/// What records in the place of a claimed bitmap, in the same granules.
pub(super) struct Successor {
    pub(super) map: HBitmap,
    pub(super) is_enabled: bool,
    /// Who has the bitmap when the claim ends: the open transaction that it was claimed in.
    pub(super) then: Option<BusyWith>,
}

/// Which operation has a bitmap to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BusyWith {
    /// A [`BitmapClaim`](crate::BitmapClaim), of a job as a rule.
    Job,
    /// A [`FrozenBitmap`](crate::FrozenBitmap), of an export as a rule.
    Reader,
    /// A [`BitmapHold`](crate::BitmapHold), of a migration as a rule.
    Holder,
    /// A [migration](crate::BitmapHold) that brings it here and has not done so yet.
    Migration,
    /// A transaction that is neither committed nor rolled back.
    Transaction,
    /// A change of the disk's length that is neither committed nor given up.
    Resize,
}

impl fmt::Display for BusyWith {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BusyWith::Job => "a job",
            BusyWith::Reader => "a reader",
            BusyWith::Holder => "a holder",
            BusyWith::Migration => "a migration that brings it",
            BusyWith::Transaction => "an open transaction",
            BusyWith::Resize => "a change of the disk's length",
        })
    }
}

/// What a verb is about to do, and so what hinders it beside an operation in possession.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// Change bits or the name: not what is read-only.
    Change,
    /// Read it, or switch recording.
    Use,
}

/// A bitmap that nobody has, for a verb to work on.
pub(super) struct Idle<'a> {
    pub(super) map: &'a mut Arc<HBitmap>,
    pub(super) usage: &'a mut Usage,
}

impl Entry {
    /// The map that guest writes are recorded in, if they are.
    pub(in crate::node) fn recorder(&mut self) -> Option<Recorder<'_>> {
        match &mut self.body {
            Body::Job(map) => Some(Recorder::Plain(map)),
            Body::Named(named) => named.recorder(),
        }
    }

    /// In what granules it records, if it does.
    pub(in crate::node) fn recorded_in(&self) -> Option<Granularity> {
        match &self.body {
            Body::Job(map) => Some(map.granularity()),
            Body::Named(named) => named.is_recording().then(|| named.granularity()),
        }
    }

    pub(super) fn named(&self) -> Option<&Named> {
        match &self.body {
            Body::Job(_) => None,
            Body::Named(named) => Some(named),
        }
    }

    pub(super) fn named_mut(&mut self) -> Option<&mut Named> {
        match &mut self.body {
            Body::Job(_) => None,
            Body::Named(named) => Some(named),
        }
    }
}

impl Named {
    /// Who has it.
    pub(super) fn busy_with(&self) -> Option<BusyWith> {
        match &self.content {
            Content::Inconsistent { held, .. } => *held,
            Content::Known { usage, .. } => match usage {
                Usage::Idle { .. } => None,
                Usage::Held { by, .. } => Some(*by),
                Usage::Frozen => Some(BusyWith::Reader),
                Usage::Claimed(_) => Some(BusyWith::Job),
                Usage::Arriving { .. } => Some(BusyWith::Migration),
            },
        }
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.stored.is_some_and(|stored| stored.is_readonly)
    }

    pub(super) fn is_inconsistent(&self) -> bool {
        matches!(self.content, Content::Inconsistent { .. })
    }

    pub(super) fn is_recording(&self) -> bool {
        match &self.content {
            Content::Inconsistent { .. } => false,
            Content::Known { usage, .. } => match usage {
                Usage::Idle { is_enabled }
                | Usage::Held { is_enabled, .. }
                | Usage::Arriving { is_enabled } => *is_enabled,
                Usage::Frozen => false,
                Usage::Claimed(successor) => successor.is_enabled,
            },
        }
    }

    /// Whether it is written to storage when bitmaps are.
    pub(super) fn will_be_stored(&self) -> bool {
        self.stored
            .is_some_and(|stored| !stored.is_handed_over && !stored.is_readonly)
            && self.busy_with() != Some(BusyWith::Holder)
            && !self.is_inconsistent()
            && !self.is_arriving()
    }

    /// Whether its bits are not here yet.
    pub(super) fn is_arriving(&self) -> bool {
        let arriving = |usage: &Usage| matches!(usage, Usage::Arriving { .. });
        matches!(&self.content, Content::Known { usage, .. } if arriving(usage))
    }

    pub(super) fn granularity(&self) -> Granularity {
        match &self.content {
            Content::Inconsistent { granularity, .. } => *granularity,
            Content::Known { map, .. } => map.granularity(),
        }
    }

    pub(super) fn len(&self) -> u64 {
        match &self.content {
            Content::Inconsistent { len, .. } => *len,
            Content::Known { map, .. } => map.len(),
        }
    }

    /// The bits as they are, with nothing of a successor, whoever has them.
    pub(super) fn map(&self) -> Result<&HBitmap, BitmapError> {
        match &self.content {
            Content::Inconsistent { .. } => Err(self.inconsistent()),
            Content::Known {
                usage: Usage::Arriving { .. },
                ..
            } => Err(BitmapError::Busy {
                name: self.name.clone(),
                with: BusyWith::Migration,
            }),
            Content::Known { map, .. } => Ok(map),
        }
    }

    pub(super) fn successor(&self) -> Option<&HBitmap> {
        match &self.content {
            Content::Known {
                usage: Usage::Claimed(successor),
                ..
            } => Some(&successor.map),
            Content::Known { .. } | Content::Inconsistent { .. } => None,
        }
    }

    fn recorder(&mut self) -> Option<Recorder<'_>> {
        if !self.is_recording() {
            return None;
        }
        match &mut self.content {
            Content::Inconsistent { .. } => None,
            Content::Known { map, usage } => match usage {
                Usage::Held {
                    changes: Some(changes),
                    ..
                } => Some(Recorder::Tracked(unshared(map), changes)),
                Usage::Idle { .. } | Usage::Held { .. } | Usage::Arriving { .. } => {
                    Some(Recorder::Plain(unshared(map)))
                }
                Usage::Claimed(successor) => Some(Recorder::Plain(&mut successor.map)),
                Usage::Frozen => None,
            },
        }
    }

    /// All that a verb needs, unless something hinders it. The one place where that is looked at, and so
    /// the one order.
    pub(super) fn idle(&mut self, intent: Intent) -> Result<Idle<'_>, BitmapError> {
        self.check_idle(intent)?;
        let Self { name, content, .. } = self;
        match content {
            Content::Known { map, usage } => Ok(Idle { map, usage }),
            Content::Inconsistent { .. } => Err(BitmapError::Inconsistent { name: name.clone() }),
        }
    }

    /// What hinders both those who want the bits and those who remove them.
    pub(super) fn check_idle(&self, intent: Intent) -> Result<(), BitmapError> {
        let is_hindered = intent == Intent::Change && self.is_readonly();
        if is_hindered && is_broken(Sabotage::ReadonlyFirst) {
            return Err(self.readonly());
        }
        if let Some(with) = self.busy_with() {
            let name = self.name.clone();
            return Err(BitmapError::Busy { name, with });
        }
        if is_hindered {
            return Err(self.readonly());
        }
        Ok(())
    }

    /// The same, for those who only look.
    pub(super) fn idle_map(&self) -> Result<&HBitmap, BitmapError> {
        self.check_idle(Intent::Use)?;
        self.map()
    }

    pub(super) fn readonly(&self) -> BitmapError {
        let name = self.name.clone();
        BitmapError::ReadOnly { name }
    }

    fn inconsistent(&self) -> BitmapError {
        let name = self.name.clone();
        BitmapError::Inconsistent { name }
    }

    /// Gives it to an operation that leaves its recording as it is.
    pub(super) fn hold(&mut self, by: BusyWith) {
        match &mut self.content {
            Content::Inconsistent { held, .. } => *held = Some(by),
            // What is claimed is in use already, and must not be free when that ends.
            Content::Known {
                usage: Usage::Claimed(successor),
                ..
            } => successor.then = Some(by),
            Content::Known { usage, .. } => {
                let is_enabled = usage.is_enabled();
                *usage = Usage::Held {
                    is_enabled,
                    by,
                    changes: None,
                };
            }
        }
    }

    /// Takes it back from such an operation.
    pub(super) fn let_go(&mut self) {
        match &mut self.content {
            Content::Inconsistent { held, .. } => *held = None,
            Content::Known { usage, .. } => match usage {
                Usage::Held { is_enabled, .. } => {
                    let is_enabled = *is_enabled;
                    *usage = Usage::Idle { is_enabled };
                }
                Usage::Claimed(successor) => successor.then = None,
                Usage::Idle { .. } | Usage::Frozen | Usage::Arriving { .. } => {}
            },
        }
    }

    /// Whether its flags may be changed: not while somebody may still put things back as they were.
    pub(super) fn check_not_open(&self) -> Result<(), BitmapError> {
        match self.busy_with() {
            Some(with @ (BusyWith::Transaction | BusyWith::Resize)) => {
                let name = self.name.clone();
                Err(BitmapError::Busy { name, with })
            }
            Some(BusyWith::Job | BusyWith::Reader | BusyWith::Holder | BusyWith::Migration)
            | None => Ok(()),
        }
    }

    /// Nobody reads it any more.
    pub(super) fn thaw(&mut self) {
        if let Content::Known { usage, .. } = &mut self.content {
            *usage = Usage::Idle { is_enabled: false };
        }
    }

    /// Leaves it out of exports from now on, or does not. What is not persistent is never in.
    pub(super) fn hand_over(&mut self, is_handed_over: bool) {
        if let Some(stored) = &mut self.stored {
            stored.is_handed_over = is_handed_over;
        }
    }

    /// A copy of it, with its successor or without.
    pub(super) fn snapshot(&self, of: SnapshotOf) -> Result<HBitmap, BitmapError> {
        let mut copy = copy_of(self.map()?)?;
        if let (SnapshotOf::WithSuccessor, Some(successor)) = (of, self.successor()) {
            copy.merge_from(successor).expect("it is as long");
        }
        Ok(copy)
    }

    pub(super) fn info(&self) -> BitmapInfo {
        let dirty_bytes = |map: &HBitmap| map.dirty_bytes();
        BitmapInfo {
            name: self.name.clone(),
            len: self.len(),
            granularity: self.granularity(),
            dirty_bytes: self.map().map_or(0, dirty_bytes),
            successor_dirty_bytes: self.successor().map(dirty_bytes),
            is_recording: self.is_recording(),
            busy_with: self.busy_with(),
            is_persistent: self.stored.is_some(),
            is_readonly: self.is_readonly(),
            is_inconsistent: self.is_inconsistent(),
            #[cfg(feature = "sha2")]
            digest: None,
        }
    }
}

impl Usage {
    /// Whether the bitmap itself, and not its successor, records.
    pub(super) fn is_enabled(&self) -> bool {
        match self {
            Usage::Idle { is_enabled } | Usage::Held { is_enabled, .. } => *is_enabled,
            Usage::Frozen | Usage::Claimed(_) | Usage::Arriving { .. } => false,
        }
    }
}

/// A map that nobody reads without the lock.
pub(super) fn unshared(map: &mut Arc<HBitmap>) -> &mut HBitmap {
    Arc::get_mut(map).expect("a bitmap is shared only while it is frozen")
}
