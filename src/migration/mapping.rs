//! Names that stand in the stream in place of those of this host.

use std::fmt::{self, Write as _};

/// The longest node name that a mapping takes, in bytes.
const NODE_NAME_MAX: usize = 31;
/// The longest alias, in bytes: its length has one byte in the stream.
pub(super) const ALIAS_MAX: usize = 255;
/// The longest bitmap name, in bytes.
const BITMAP_NAME_MAX: usize = 1023;

/// What a node is called in the stream, and which of its bitmaps are in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAlias {
    /// Name of the node on this host.
    pub node: String,
    /// Its name in the stream.
    pub alias: String,
    /// Those of its bitmaps that are mapped; the others stay out.
    pub bitmaps: Vec<BitmapAlias>,
}

/// What a bitmap is called in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapAlias {
    /// Name of the bitmap on this host.
    pub name: String,
    /// Its name in the stream.
    pub alias: String,
    /// Whether it is persistent at the other end (on the source) or here (on the destination). `None`: as it
    /// was.
    pub persistent: Option<bool>,
}

impl BitmapAlias {
    /// A bitmap that goes by another name, as persistent as it is.
    #[must_use]
    pub fn new(name: impl Into<String>, alias: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            alias: alias.into(),
            persistent: None,
        }
    }
}

/// Names of this host, and the aliases by which nodes and bitmaps go in the stream.
///
/// Both ends may have one, or one of them, or none: what counts is that the names in the stream are those that
/// the destination looks for. With a mapping only what is in it migrates, so an empty one is not the same as
/// none.
///
/// # Examples
///
/// ```
/// use blockjob::migration::{BitmapAlias, BitmapMapping, MappingError, NodeAlias};
///
/// let node = |node: &str, alias: &str| NodeAlias {
///     node: node.into(),
///     alias: alias.into(),
///     bitmaps: vec![BitmapAlias::new("daily", "d")],
/// };
/// BitmapMapping::new(vec![node("disk0", "a"), node("disk1", "b")])?;
/// let twice = BitmapMapping::new(vec![node("disk0", "a"), node("disk1", "a")]);
/// assert!(matches!(twice, Err(MappingError::NodeAliasTwice { .. })));
/// # Ok::<(), MappingError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapMapping {
    nodes: Vec<NodeAlias>,
}

/// Why a mapping is none. One variant for each rule, in the order in which an entry is looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// A node has no name.
    #[error("the node with the alias {alias:?} has an empty name")]
    NodeNameEmpty {
        /// The entry.
        alias: String,
    },
    /// A node's name is longer than 31 bytes.
    #[error("node name {node:?} is longer than 31 bytes")]
    NodeNameTooLong {
        /// The entry.
        node: String,
    },
    /// A node's name has a NUL.
    #[error("node name {node:?} has a NUL")]
    NodeNameNul {
        /// The entry.
        node: String,
    },
    /// A node has no alias.
    #[error("node {node:?} has an empty alias")]
    NodeAliasEmpty {
        /// The entry.
        node: String,
    },
    /// A node's alias is longer than 255 bytes.
    #[error("the alias of node {node:?} is longer than 255 bytes")]
    NodeAliasTooLong {
        /// The entry.
        node: String,
    },
    /// A node's alias is something else than a letter and then letters, digits, `-`, `.` and `_`.
    #[error(
        "the alias {alias:?} of node {node:?} is malformed: letters, digits, - . _, a letter first"
    )]
    NodeAliasMalformed {
        /// The entry.
        node: String,
        /// What it should be called.
        alias: String,
    },
    /// A node is mapped twice.
    #[error("node {node:?} is mapped twice")]
    NodeTwice {
        /// The entry.
        node: String,
    },
    /// Two nodes have one alias.
    #[error("the alias {alias:?} of node {node:?} is that of another node")]
    NodeAliasTwice {
        /// The later entry.
        node: String,
        /// The alias.
        alias: String,
    },
    /// A bitmap has no name.
    #[error("a bitmap of node {node:?} has an empty name")]
    BitmapNameEmpty {
        /// Its node.
        node: String,
    },
    /// A bitmap's name is longer than 1023 bytes.
    #[error("a bitmap name of node {node:?} is longer than 1023 bytes")]
    BitmapNameTooLong {
        /// Its node.
        node: String,
    },
    /// A bitmap's name has a NUL.
    #[error("the name of bitmap {bitmap:?} of node {node:?} has a NUL")]
    BitmapNameNul {
        /// Its node.
        node: String,
        /// The entry.
        bitmap: String,
    },
    /// A bitmap has no alias. The other end could not read that.
    #[error("bitmap {bitmap:?} of node {node:?} has an empty alias")]
    BitmapAliasEmpty {
        /// Its node.
        node: String,
        /// The entry.
        bitmap: String,
    },
    /// A bitmap's alias is longer than 255 bytes.
    #[error("the alias of bitmap {bitmap:?} of node {node:?} is longer than 255 bytes")]
    BitmapAliasTooLong {
        /// Its node.
        node: String,
        /// The entry.
        bitmap: String,
    },
    /// A bitmap's alias has a NUL.
    #[error("the alias of bitmap {bitmap:?} of node {node:?} has a NUL")]
    BitmapAliasNul {
        /// Its node.
        node: String,
        /// The entry.
        bitmap: String,
    },
    /// A bitmap is mapped twice.
    #[error("bitmap {bitmap:?} of node {node:?} is mapped twice")]
    BitmapTwice {
        /// Its node.
        node: String,
        /// The entry.
        bitmap: String,
    },
    /// Two bitmaps of a node have one alias.
    #[error("the alias {alias:?} of bitmap {bitmap:?} of node {node:?} is that of another bitmap")]
    BitmapAliasTwice {
        /// Its node.
        node: String,
        /// The later entry.
        bitmap: String,
        /// The alias.
        alias: String,
    },
}

impl BitmapMapping {
    /// A mapping of those nodes.
    ///
    /// Whether there are such nodes and bitmaps is not looked at.
    ///
    /// # Errors
    ///
    /// See [`MappingError`]: the first entry that breaks a rule.
    pub fn new(nodes: Vec<NodeAlias>) -> Result<Self, MappingError> {
        for (index, entry) in nodes.iter().enumerate() {
            check_node(entry)?;
            let (node, before) = (&entry.node, &nodes[..index]);
            if before.iter().any(|other| other.node == *node) {
                let node = node.clone();
                return Err(MappingError::NodeTwice { node });
            }
            if before.iter().any(|other| other.alias == entry.alias) {
                let (node, alias) = (node.clone(), entry.alias.clone());
                return Err(MappingError::NodeAliasTwice { node, alias });
            }
            check_bitmaps(entry)?;
        }
        Ok(Self { nodes })
    }

    /// The entries, in their order.
    #[must_use]
    pub fn nodes(&self) -> &[NodeAlias] {
        &self.nodes
    }

    /// The entry of a node of this host.
    pub(super) fn of_node(&self, node: &str) -> Option<&NodeAlias> {
        self.nodes.iter().find(|entry| entry.node == node)
    }

    /// The entry of a name in the stream.
    pub(super) fn of_alias(&self, alias: &str) -> Option<&NodeAlias> {
        self.nodes.iter().find(|entry| entry.alias == alias)
    }
}

fn check_node(entry: &NodeAlias) -> Result<(), MappingError> {
    let (node, alias) = (entry.node.clone(), entry.alias.clone());
    if node.is_empty() {
        return Err(MappingError::NodeNameEmpty { alias });
    }
    if node.len() > NODE_NAME_MAX {
        return Err(MappingError::NodeNameTooLong { node });
    }
    if node.contains('\0') {
        return Err(MappingError::NodeNameNul { node });
    }
    if alias.is_empty() {
        return Err(MappingError::NodeAliasEmpty { node });
    }
    if alias.len() > ALIAS_MAX {
        return Err(MappingError::NodeAliasTooLong { node });
    }
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if !alias.as_bytes()[0].is_ascii_alphabetic() || !alias.bytes().all(is_legal) {
        return Err(MappingError::NodeAliasMalformed { node, alias });
    }
    Ok(())
}

fn check_bitmaps(entry: &NodeAlias) -> Result<(), MappingError> {
    for (index, mapped) in entry.bitmaps.iter().enumerate() {
        let node = entry.node.clone();
        let (bitmap, alias) = (mapped.name.clone(), mapped.alias.clone());
        if bitmap.is_empty() {
            return Err(MappingError::BitmapNameEmpty { node });
        }
        if bitmap.len() > BITMAP_NAME_MAX {
            return Err(MappingError::BitmapNameTooLong { node });
        }
        if bitmap.contains('\0') {
            return Err(MappingError::BitmapNameNul { node, bitmap });
        }
        if alias.is_empty() {
            return Err(MappingError::BitmapAliasEmpty { node, bitmap });
        }
        if alias.len() > ALIAS_MAX {
            return Err(MappingError::BitmapAliasTooLong { node, bitmap });
        }
        if alias.contains('\0') {
            return Err(MappingError::BitmapAliasNul { node, bitmap });
        }
        let before = &entry.bitmaps[..index];
        if before.iter().any(|other| other.name == bitmap) {
            return Err(MappingError::BitmapTwice { node, bitmap });
        }
        if before.iter().any(|other| other.alias == alias) {
            return Err(MappingError::BitmapAliasTwice {
                node,
                bitmap,
                alias,
            });
        }
    }
    Ok(())
}

/// A bitmap by its names on this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitmapId {
    /// Name of the node.
    pub node: String,
    /// Name of the bitmap.
    pub bitmap: String,
}

/// `disk0/daily`. Names may be those of a stream: what would end the line, or move the cursor, is escaped.
impl fmt::Display for BitmapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = |name: &str| {
            name.chars().try_for_each(|char| match char.is_control() {
                true => write!(f, "{}", char.escape_default()),
                false => f.write_char(char),
            })
        };
        name(&self.node)?;
        name("/")?;
        name(&self.bitmap)
    }
}
