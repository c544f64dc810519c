//! Working on the bitmaps of several nodes at once, and merging, which does.

use super::entry::{Intent, unshared};
use super::{BitmapError, Bitmaps, List};
use crate::bitmap::HBitmap;
use crate::node::{Inner, Node};
use crate::sabotage::{Sabotage, is_broken};
use crate::sync::{Arc, MutexGuard};

/// The lists of several nodes, locked in the one order that there is, each once, and drained.
pub(crate) struct Locked<'a> {
    nodes: Vec<(&'a Node, MutexGuard<'a, List>)>,
}

impl<'a> Locked<'a> {
    pub(crate) fn new(nodes: impl IntoIterator<Item = &'a Node>) -> Self {
        let mut nodes: Vec<_> = nodes.into_iter().collect();
        if !is_broken(Sabotage::LockAsNamed) {
            nodes.sort_by_key(|node| number(node));
        }
        nodes.dedup_by_key(|node| number(node));
        let lock = |node: &'a Node| (node, node.inner().lock_drained());
        Self {
            nodes: nodes.into_iter().map(lock).collect(),
        }
    }

    fn index_of(&self, node: &Node) -> usize {
        let found = self.nodes.iter().position(|known| is_same(known.0, node));
        found.expect("all nodes were named when they were locked")
    }

    /// The list of a node that was named.
    pub(in crate::node) fn list(&mut self, node: &Node) -> &mut List {
        let index = self.index_of(node);
        &mut self.nodes[index].1
    }

    fn peek(&self, node: &Node) -> &List {
        &self.nodes[self.index_of(node)].1
    }

    /// Whether all sources can be merged into the target.
    pub(super) fn check_merge(
        &self,
        target: (&Node, &str),
        sources: &[(&Node, &str)],
    ) -> Result<(), BitmapError> {
        let named = self.peek(target.0).find(target.1)?;
        named.check_idle(Intent::Change)?;
        let len = named.map()?.len();
        if sources.is_empty() {
            let name = target.1.to_owned();
            return Err(BitmapError::NoSources { name });
        }
        for (node, name) in sources {
            let source = self.peek(node).find(name)?.idle_map()?;
            if source.len() != len {
                return Err(BitmapError::SizeMismatch {
                    name: (*name).to_owned(),
                    len: source.len(),
                    expected: len,
                });
            }
        }
        Ok(())
    }

    /// Merges what [`check_merge`](Self::check_merge) has looked at.
    pub(super) fn merge(&mut self, target: (&Node, &str), sources: &[(&Node, &str)]) {
        for source in sources {
            let _ = self.merge_one(target, *source);
        }
    }

    fn merge_one(
        &mut self,
        target: (&Node, &str),
        source: (&Node, &str),
    ) -> Result<(), BitmapError> {
        let at = [self.index_of(target.0), self.index_of(source.0)];
        if at[0] != at[1] {
            let [into, from] = self
                .nodes
                .get_disjoint_mut(at)
                .expect("they are two nodes, both locked");
            let (_, into) = into.1.find_mut(target.1)?;
            let into = unshared(into.idle(Intent::Change)?.map);
            return union(into, from.1.find(source.1)?.idle_map()?);
        }
        let list = &mut *self.nodes[at[0]].1;
        let at = [list.position(target.1)?, list.position(source.1)?];
        let Ok([into, from]) = list.entries.get_disjoint_mut(at) else {
            return Ok(());
        };
        match (into.named_mut(), from.named()) {
            (Some(into), Some(from)) => {
                union(unshared(into.idle(Intent::Change)?.map), from.idle_map()?)
            }
            _ => unreachable!("both were found by their names"),
        }
    }
}

fn union(into: &mut HBitmap, from: &HBitmap) -> Result<(), BitmapError> {
    into.merge_from(from).expect("lengths were compared");
    Ok(())
}

/// What the locks of several nodes are ordered by: the place of what all handles of one share.
fn number(node: &Node) -> usize {
    let inner: &Inner = node.inner();
    std::ptr::from_ref(inner).addr()
}

pub(super) fn is_same(a: &Node, b: &Node) -> bool {
    Arc::ptr_eq(a.inner(), b.inner())
}

impl Bitmaps<'_> {
    /// Makes dirty in a bitmap of this node what is dirty in others, which may be of other nodes. Where a
    /// source is finer, whole granules of the target get dirty. All sources are merged or none; they stay
    /// as they are, and the target may be among them. Whether the target records is as before, too: to have it
    /// record afterwards, [enable](Self::enable) it.
    ///
    /// It merges word by word where granularities are equal. Guest writes do not wait for it, on any
    /// node. So with separate verbs they get in between: a write between the merge of what recorded into what
    /// does not and the removal of the source is in neither. Where recording moves with the bits, do all in one
    /// [`Transaction`](crate::Transaction).
    ///
    /// # Errors
    ///
    /// Of the target [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`ReadOnly`](BitmapError::ReadOnly), [`Inconsistent`](BitmapError::Inconsistent);
    /// [`NoSources`](BitmapError::NoSources); of the sources, in their order,
    /// [`NotFound`](BitmapError::NotFound), [`Busy`](BitmapError::Busy),
    /// [`Inconsistent`](BitmapError::Inconsistent), [`SizeMismatch`](BitmapError::SizeMismatch).
    ///
    /// # Examples
    ///
    /// A backup has failed while `tuesday` recorded. `monday` is to cover again all that was written since the
    /// one before, and to record: at one instant it is merged into, enabled, and the other removed.
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Node, Transaction};
    ///
    /// let node = Node::new(1 << 30);
    /// let write = |at| node.begin_write((at..at + 1).into()).go().expect("nobody quiesces it").finish(());
    /// let mut list = Transaction::new();
    /// list.add(&node, "monday", BitmapOptions::default());
    /// list.prepare().try_prepared().expect("no write is in flight")?.commit();
    /// write(0);
    /// let mut list = Transaction::new();
    /// list.add(&node, "tuesday", BitmapOptions::default()).disable(&node, "monday");
    /// list.prepare().try_prepared().expect("no write is in flight")?.commit();
    /// write(1 << 20);
    ///
    /// let mut list = Transaction::new();
    /// list.merge(&node, "monday", &[(&node, "tuesday")]).enable(&node, "monday").remove(&node, "tuesday");
    /// list.prepare().try_prepared().expect("no write is in flight")?.commit();
    /// write(2 << 20);
    /// assert_eq!(node.bitmaps().query("monday").unwrap().dirty_bytes, 3 * 65536);
    /// # Ok::<(), blockjob::TransactionError>(())
    /// ```
    ///
    /// Where nothing is to record, the verb will do:
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Node};
    ///
    /// let node = Node::new(1 << 30);
    /// let bitmaps = node.bitmaps();
    /// for name in ["monday", "tuesday", "both"] {
    ///     bitmaps.add_disabled(name, BitmapOptions::default())?;
    /// }
    /// bitmaps.merge("both", &[(&node, "monday"), (&node, "tuesday")])?;
    /// assert!(!bitmaps.query("both")?.is_recording, "nor does it after the merge");
    /// # Ok::<(), blockjob::BitmapError>(())
    /// ```
    pub fn merge(&self, target: &str, sources: &[(&Node, &str)]) -> Result<(), BitmapError> {
        let target = (self.node, target);
        let nodes = std::iter::once(self.node).chain(sources.iter().map(|source| source.0));
        let mut locked = Locked::new(nodes);
        if is_broken(Sabotage::MergeOneByOne) {
            for source in sources {
                locked.merge_one(target, *source)?;
            }
        }
        locked.check_merge(target, sources)?;
        locked.merge(target, sources);
        Ok(())
    }
}
