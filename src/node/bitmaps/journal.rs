//! What a transaction has done to bitmaps, so that it can be undone exactly.
//!
//! The nodes are quiesced from the first entry until the journal is closed, and what it has touched is in
//! use for everybody else once [`hold`](Journal::hold) was called, the names among it that it may have to give
//! back. So nothing is recorded and nothing of that changed in between, and what is put back is as it was.
//!
//! What it has not touched others may change meanwhile. They may even begin to record, for they can have
//! guards of their own: so the log that was written to before is gone back to only if it does for them.

use std::mem;

use super::entry::{Content, Entry, Intent, Named, Usage, unshared};
use super::list::Plan;
use super::merge::Locked;
use super::{BitmapError, BitmapOptions, BusyWith, List, copy_into, is_recordable};
use crate::bitmap::HBitmap;
use crate::node::Node;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::Granularity;

/// What was done, in the order in which it was.
pub(crate) struct Journal {
    /// Every node concerned, and the log that it recorded in before.
    nodes: Vec<(Node, Option<usize>)>,
    done: Vec<Done>,
    /// Whether others have come to see what was done.
    is_held: bool,
}

/// What one action has done.
struct Done {
    node: Node,
    id: u64,
    what: What,
}

enum What {
    Added,
    /// To be removed with the commit.
    Removed,
    /// Here are the bits as they were.
    Bits(HBitmap),
    /// Whether it recorded before.
    Enabled(bool),
    /// The name that it had before.
    Renamed(String),
}

/// What a commit leaves behind.
#[derive(Default)]
pub(crate) struct Unused {
    _entries: Vec<Entry>,
    _maps: Vec<HBitmap>,
}

impl Journal {
    /// A journal of acts on those nodes.
    pub(crate) fn new(locked: &mut Locked<'_>, nodes: &[Node]) -> Self {
        let before = |node: &Node| (node.clone(), locked.list(node).recording);
        Self {
            nodes: nodes.iter().map(before).collect(),
            done: Vec::new(),
            is_held: false,
        }
    }

    /// Adds a bitmap, in `spare` if that fits.
    pub(crate) fn add(
        &mut self,
        locked: &mut Locked<'_>,
        (node, name): (&Node, &str),
        options: &BitmapOptions,
        is_enabled: bool,
        spare: Option<HBitmap>,
    ) -> Result<(), BitmapError> {
        let plan = Plan::new(name, options)?;
        let list = locked.list(node);
        list.check_plan(&plan)?;
        let map = fit(spare, node, plan.granularity)?;
        if is_enabled {
            node.inner().start_recording(list, plan.granularity)?;
        }
        let id = list.push_named(&plan, map, is_enabled);
        self.note(node, id, What::Added);
        Ok(())
    }

    /// Nobody has the bitmap from now on, and it is gone with the commit.
    pub(crate) fn remove(
        &mut self,
        locked: &mut Locked<'_>,
        (node, name): (&Node, &str),
    ) -> Result<(), BitmapError> {
        let list = locked.list(node);
        let (id, named) = list.find_mut(name)?;
        named.check_idle(Intent::Change)?;
        if is_broken(Sabotage::RemoveAtOnce) {
            list.remove(id);
            return Ok(());
        }
        named.hold(BusyWith::Transaction);
        self.note(node, id, What::Removed);
        Ok(())
    }

    /// Makes everything clean, by a map for which `spare` may be taken.
    pub(crate) fn clear(
        &mut self,
        locked: &mut Locked<'_>,
        (node, name): (&Node, &str),
        spare: Option<HBitmap>,
    ) -> Result<(), BitmapError> {
        let (id, named) = locked.list(node).find_mut(name)?;
        let map = unshared(named.idle(Intent::Change)?.map);
        let before = mem::replace(map, fit(spare, node, map.granularity())?);
        self.note(node, id, What::Bits(before));
        Ok(())
    }

    /// Switches recording.
    pub(crate) fn set_enabled(
        &mut self,
        locked: &mut Locked<'_>,
        (node, name): (&Node, &str),
        is_enabled: bool,
    ) -> Result<(), BitmapError> {
        let list = locked.list(node);
        if is_enabled {
            let granularity = list.find(name)?.idle_map()?.granularity();
            node.inner().start_recording(list, granularity)?;
        }
        let (id, was_enabled) = list.set_enabled(name, is_enabled)?;
        node.inner().stop_if_unused(list);
        self.note(node, id, What::Enabled(was_enabled));
        Ok(())
    }

    /// Merges into a copy of the target, for which `spare` may be taken, and puts it in its place.
    pub(crate) fn merge(
        &mut self,
        locked: &mut Locked<'_>,
        target: (&Node, &str),
        sources: &[(&Node, &str)],
        spare: Option<HBitmap>,
    ) -> Result<(), BitmapError> {
        locked.check_merge(target, sources)?;
        let (node, name) = target;
        let (id, named) = locked.list(node).find_mut(name)?;
        let map = unshared(named.idle(Intent::Change)?.map);
        let copy = copy_into(fit(spare, node, map.granularity())?, map);
        let before = mem::replace(map, copy);
        locked.merge(target, sources);
        self.note(node, id, What::Bits(before));
        Ok(())
    }

    /// Gives a bitmap another name.
    pub(crate) fn rename(
        &mut self,
        locked: &mut Locked<'_>,
        (node, name): (&Node, &str),
        new_name: &str,
    ) -> Result<(), BitmapError> {
        let (id, before) = locked.list(node).rename(name, new_name)?;
        self.note(node, id, What::Renamed(before));
        Ok(())
    }

    fn note(&mut self, node: &Node, id: u64, what: What) {
        let node = node.clone();
        self.done.push(Done { node, id, what });
    }

    /// All that was touched is in use until the journal is closed.
    pub(crate) fn hold(&mut self, locked: &mut Locked<'_>) {
        self.is_held = true;
        for done in &self.done {
            done.named(locked).hold(BusyWith::Transaction);
            if let What::Renamed(before) = &done.what {
                locked.list(&done.node).promise(before);
            }
        }
    }

    /// Does what was left for last. Gives back the maps that are not needed any more, for the caller to
    /// drop when nobody waits.
    pub(crate) fn commit(self, locked: &mut Locked<'_>) -> Unused {
        self.let_go(locked);
        let mut unused = Unused::default();
        for Done { node, id, what } in self.done {
            match what {
                What::Removed => unused._entries.extend(locked.list(&node).remove(id)),
                What::Bits(before) => unused._maps.push(before),
                What::Added | What::Enabled(_) | What::Renamed(_) => {}
            }
        }
        for (node, _) in &self.nodes {
            node.inner().stop_if_unused(locked.list(node));
        }
        unused
    }

    /// Undoes all of it, the last first.
    pub(crate) fn roll_back(mut self, locked: &mut Locked<'_>) {
        self.let_go(locked);
        if !is_broken(Sabotage::RollBackForward) {
            self.done.reverse();
        }
        for Done { node, id, what } in self.done {
            let list = locked.list(&node);
            match what {
                What::Added => {
                    list.remove(id);
                }
                What::Removed => {}
                What::Bits(before) => *list.owned_mut(id).map_mut() = before,
                What::Enabled(is_enabled) => list.owned_mut(id).put_back(is_enabled),
                What::Renamed(before) => list.owned_mut(id).name = before,
            }
        }
        for (node, recording) in self.nodes {
            node.inner().go_back_to(locked.list(&node), recording);
        }
    }

    fn let_go(&self, locked: &mut Locked<'_>) {
        for done in &self.done {
            done.named(locked).let_go();
            if let (true, What::Renamed(before)) = (self.is_held, &done.what) {
                locked.list(&done.node).take_back_promise(before);
            }
        }
    }
}

impl Done {
    fn named<'a>(&self, locked: &'a mut Locked<'_>) -> &'a mut Named {
        let list: &mut List = locked.list(&self.node);
        list.owned_mut(self.id)
    }
}

impl Named {
    /// Records again, or not, as it did.
    fn put_back(&mut self, is_enabled: bool) {
        if let Content::Known { usage, .. } = &mut self.content {
            *usage = Usage::Idle { is_enabled };
        }
    }
}

/// A clean map for a bitmap of `node`: `spare`, if that is one.
pub(super) fn fit(
    spare: Option<HBitmap>,
    node: &Node,
    granularity: Granularity,
) -> Result<HBitmap, BitmapError> {
    match spare {
        Some(map) if (map.len(), map.granularity()) == (node.len(), granularity) => Ok(map),
        Some(_) | None => node.inner().new_map(granularity),
    }
}

impl Node {
    /// A clean map as a new bitmap of this node would have, if there is memory: made beforehand, it need
    /// not be made while the guest waits.
    pub(crate) fn spare(&self, granularity: Granularity) -> Option<HBitmap> {
        // What cannot be recorded in may be as fine as to want any amount of memory.
        is_recordable(granularity).then(|| self.inner().new_map(granularity).ok())?
    }

    /// The same, for a bitmap that there is.
    pub(crate) fn spare_for(&self, name: &str) -> Option<HBitmap> {
        let granularity = self.inner().list.lock().find(name).ok()?.granularity();
        self.spare(granularity)
    }

    /// Whether two handles stand for one disk.
    pub(crate) fn is(&self, other: &Node) -> bool {
        super::merge::is_same(self, other)
    }
}
