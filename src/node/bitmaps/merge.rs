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
    /// as they are, and so does it whether the target records. The target may be among them.
    ///
    /// It merges word by word where granularities are equal. Guest writes do not wait for it, on any
    /// node.
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
    /// A backup has failed, and `monday` is to cover again all that was written since the one before:
    ///
    /// ```
    /// use blockjob::{BitmapOptions, Node};
    ///
    /// let node = Node::new(1 << 30);
    /// let bitmaps = node.bitmaps();
    /// bitmaps.add_disabled("monday", BitmapOptions::default())?;
    /// bitmaps.add_disabled("tuesday", BitmapOptions::default())?;
    /// bitmaps.merge("monday", &[(&node, "tuesday")])?;
    /// bitmaps.remove("tuesday")?;
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
