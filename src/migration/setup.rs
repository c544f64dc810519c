//! Which bitmaps are sent, and what they are called in the stream.
//!
//! ```text
//! nodes ─▶ with a device first ─▶ the newest bitmap first ─▶ skip what is not mapped ─▶ look at all ─▶ hold all
//! ```

use super::error::SetupError;
use super::mapping::{ALIAS_MAX, BitmapId};
use super::wire::Shape;
use super::{BitmapMigration, MigratingNode};
use crate::node::{BitmapError, BitmapHold, BitmapInfo};
use crate::sabotage::{Sabotage, is_broken};

/// A bitmap that is sent.
pub(super) struct Selected {
    pub(super) id: BitmapId,
    pub(super) hold: BitmapHold,
    /// Which of the nodes.
    pub(super) node: usize,
    /// What node and bitmap are called in the stream.
    pub(super) wire: (String, String),
    pub(super) shape: Shape,
    pub(super) is_enabled: bool,
    /// As the other end is told.
    pub(super) is_persistent: bool,
}

struct Candidate {
    id: BitmapId,
    node: usize,
    wire: (String, String),
    info: BitmapInfo,
    /// What the mapping says of it.
    persistent: Option<bool>,
}

impl BitmapMigration {
    /// All bitmaps that are to be sent, kept from every verb and out of exports; or none of them.
    pub(super) fn select(&self) -> Result<Vec<Selected>, SetupError> {
        let candidates = self.candidates()?;
        if !is_broken(Sabotage::HoldBeforeCheck) {
            candidates.iter().try_for_each(check)?;
        }
        let mut selected = Vec::new();
        for candidate in candidates {
            let bitmaps = self.nodes[candidate.node].node.bitmaps();
            let held = bitmaps.hold(&candidate.id.bitmap);
            let hold = match held {
                Ok(hold) => hold,
                Err(error) => {
                    if is_broken(Sabotage::HoldBeforeCheck) {
                        std::mem::forget(selected);
                    }
                    return Err(refused(candidate.id, error));
                }
            };
            let Candidate {
                id,
                node,
                wire,
                persistent,
                ..
            } = candidate;
            // As it is now that nobody can change it.
            let info = hold.info();
            let (len, granularity) = (info.len, info.granularity);
            selected.push(Selected {
                id,
                hold,
                node,
                wire,
                shape: Shape { len, granularity },
                is_enabled: info.is_recording,
                is_persistent: persistent.unwrap_or(info.is_persistent),
            });
        }
        Ok(selected)
    }

    /// Named bitmaps that are not left out, in the order in which they are sent. Each once, and no two nodes
    /// with one name.
    fn candidates(&self) -> Result<Vec<Candidate>, SetupError> {
        let mut candidates = Vec::new();
        let mut aliases: Vec<String> = Vec::new();
        for index in self.order() {
            let node = &self.nodes[index];
            let infos = node.node.bitmaps().query_all();
            let Some(first) = infos.last() else {
                continue;
            };
            let Some((alias, entry)) = self.alias_of(node, &first.name)? else {
                continue;
            };
            for info in infos.into_iter().rev() {
                let mapped = entry.map(|entry| {
                    let mut bitmaps = entry.bitmaps.iter();
                    bitmaps.find(|bitmap| bitmap.name == info.name)
                });
                let (name, persistent) = match mapped {
                    None => (info.name.clone(), None),
                    Some(None) => continue,
                    Some(Some(bitmap)) => (bitmap.alias.clone(), bitmap.persistent),
                };
                candidates.push(Candidate {
                    id: BitmapId {
                        node: node.name.clone(),
                        bitmap: info.name.clone(),
                    },
                    node: index,
                    wire: (alias.clone(), name),
                    persistent,
                    info,
                });
            }
            if aliases.contains(&alias) {
                return Err(SetupError::NodeTwice { alias });
            }
            aliases.push(alias);
        }
        Ok(candidates)
    }

    /// Nodes of devices before the others, unless there is a mapping, in which devices play no part. Each disk
    /// once.
    fn order(&self) -> Vec<usize> {
        let all = 0..self.nodes.len();
        let has_device =
            |&index: &usize| self.mapping.is_none() && self.nodes[index].device().is_some();
        let (mut order, others): (Vec<_>, Vec<_>) = all.partition(has_device);
        order.extend(others);
        let mut once: Vec<usize> = Vec::new();
        for index in order {
            let is_it = |&other: &usize| self.nodes[other].node.is(&self.nodes[index].node);
            if !once.iter().any(is_it) {
                once.push(index);
            }
        }
        once
    }

    /// What a node that has bitmaps is called in the stream, and its entry if there is a mapping. `None` if it
    /// is not in it.
    fn alias_of(
        &self,
        node: &MigratingNode,
        bitmap: &str,
    ) -> Result<Option<(String, Option<&super::NodeAlias>)>, SetupError> {
        let own = node.device().unwrap_or(&node.name);
        if own.is_empty() {
            let bitmap = bitmap.to_owned();
            return Err(SetupError::NodeUnnamed { bitmap });
        }
        let (alias, entry) = match &self.mapping {
            None => (own.to_owned(), None),
            Some(mapping) => match mapping.of_node(&node.name) {
                None => return Ok(None),
                Some(entry) => (entry.alias.clone(), Some(entry)),
            },
        };
        if alias.starts_with('#') {
            let (node, bitmap) = (node.name.clone(), bitmap.to_owned());
            let bitmap = BitmapId { node, bitmap };
            return Err(SetupError::NodeAutoNamed { bitmap });
        }
        if alias.len() > ALIAS_MAX || alias.contains('\0') {
            let node = alias;
            return Err(SetupError::NodeName { node });
        }
        Ok(Some((alias, entry)))
    }
}

fn check(candidate: &Candidate) -> Result<(), SetupError> {
    let Candidate { info, wire, id, .. } = candidate;
    let bitmap = id.clone();
    if let Some(with) = info.busy_with {
        return Err(SetupError::Busy { bitmap, with });
    }
    if info.is_readonly {
        return Err(SetupError::ReadOnly { bitmap });
    }
    if info.is_inconsistent {
        return Err(SetupError::Inconsistent { bitmap });
    }
    if wire.1.len() > ALIAS_MAX {
        return Err(SetupError::NameTooLong { bitmap });
    }
    if wire.1.contains('\0') {
        return Err(SetupError::NameNul { bitmap });
    }
    Ok(())
}

/// What has changed since it was looked at.
fn refused(bitmap: BitmapId, error: BitmapError) -> SetupError {
    match error {
        BitmapError::Busy { with, .. } => SetupError::Busy { bitmap, with },
        BitmapError::ReadOnly { .. } => SetupError::ReadOnly { bitmap },
        BitmapError::Inconsistent { .. } => SetupError::Inconsistent { bitmap },
        error => SetupError::Bitmap { bitmap, error },
    }
}
