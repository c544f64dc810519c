//! Truth files: what QEMU said of the bitmaps that it sent, and hosts that have the same.
//!
//! Used by tests and by `examples/migrate_bitmap.rs`.
#![allow(dead_code, reason = "not everybody needs all of it")]

use std::fmt::Write as _;
use std::ops::Range;

use blockjob::migration::{BitmapMigration, MigratingNode};
use blockjob::{
    BitmapOptions, BitmapStorage, ByteRange, ClaimFor, Granularity, HBitmap, Node, QuiesceGuard,
    SnapshotOf,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What a truth file says.
pub(crate) struct Truth {
    pub(crate) json: Value,
    /// In the order of the stream.
    pub(crate) bitmaps: Vec<TrueBitmap>,
}

/// A bitmap as the stream has it.
#[derive(Clone, Debug)]
pub(crate) struct TrueBitmap {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) granularity: Granularity,
    pub(crate) enabled: bool,
    pub(crate) persistent: bool,
    pub(crate) sha256: String,
    pub(crate) dirty: Vec<ByteRange>,
}

impl Truth {
    /// # Errors
    ///
    /// A text that says what is missing.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let bitmaps = json["bitmaps_in_wire_order"].as_array();
        let bitmaps = bitmaps.ok_or("there is no list \"bitmaps_in_wire_order\"")?;
        let bitmaps = bitmaps
            .iter()
            .map(|bitmap| bitmap_of(bitmap).ok_or(format!("this is no bitmap: {bitmap}")))
            .collect::<Result<_, _>>()?;
        Ok(Self { json, bitmaps })
    }

    /// Where the bodies of the section are in the stream, and of which kind each is.
    pub(crate) fn bodies(&self) -> Vec<(String, Range<usize>)> {
        let body = |section: &Value| {
            let start = section["body_offset"].as_u64()? as usize;
            let len = section["body_length"].as_u64()? as usize;
            Some((section["type"].as_str()?.to_owned(), start..start + len))
        };
        let sections = self.json["dirty_bitmap_sections"].as_array();
        sections.map_or(Vec::new(), |all| all.iter().filter_map(body).collect())
    }

    /// The number of the section.
    pub(crate) fn section(&self) -> Option<u32> {
        u32::try_from(self.json["section_id"].as_u64()?).ok()
    }

    /// The nodes, by their names in the stream and in its order.
    pub(crate) fn nodes(&self) -> Vec<(String, Node)> {
        let mut nodes: Vec<(String, Node)> = Vec::new();
        for bitmap in &self.bitmaps {
            if !nodes.iter().any(|(name, _)| *name == bitmap.node) {
                nodes.push((bitmap.node.clone(), Node::new(bitmap.size)));
            }
        }
        nodes
    }

    /// A host that has what was sent, under the names of the stream.
    ///
    /// # Errors
    ///
    /// If a bitmap cannot be made.
    pub(crate) fn source(&self) -> Result<(BitmapMigration, Vec<(String, Node)>), String> {
        let nodes = self.nodes();
        let mut migration = BitmapMigration::new();
        for (name, node) in &nodes {
            // The newest comes first in the stream.
            for bitmap in self
                .bitmaps
                .iter()
                .rev()
                .filter(|bitmap| bitmap.node == *name)
            {
                add(node, bitmap).map_err(|error| error.to_string())?;
            }
            migration = migration.with(MigratingNode::new(name, node));
        }
        Ok((migration, nodes))
    }

    /// A host with the same disks and without bitmaps.
    pub(crate) fn target(&self) -> (BitmapMigration, Vec<(String, Node)>) {
        let nodes = self.nodes();
        (migration_of(&nodes), nodes)
    }
}

fn bitmap_of(json: &Value) -> Option<TrueBitmap> {
    let range = |range: &Value| ByteRange::at(range[0].as_u64()?, range[1].as_u64()?);
    let flags = json["wire_flags"].as_u64()?;
    Some(TrueBitmap {
        node: json["wire_node"].as_str()?.to_owned(),
        name: json["wire_name"].as_str()?.to_owned(),
        size: json["size"].as_u64()?,
        granularity: Granularity::from_bytes(json["granularity"].as_u64()?)?,
        enabled: flags & 1 != 0,
        persistent: flags & 2 != 0,
        sha256: json["sha256"].as_str().unwrap_or_default().to_owned(),
        dirty: json["dirty_ranges"]
            .as_array()?
            .iter()
            .map(range)
            .collect::<Option<_>>()?,
    })
}

/// A migration of nodes that have no more than a name.
pub(crate) fn migration_of(nodes: &[(String, Node)]) -> BitmapMigration {
    let add =
        |migration: BitmapMigration, (name, node): &(String, Node)| migration.with_node(name, node);
    nodes.iter().fold(BitmapMigration::new(), add)
}

/// Makes a bitmap with those bits.
pub(crate) fn add(node: &Node, bitmap: &TrueBitmap) -> Result<(), blockjob::BitmapError> {
    let bitmaps = node.bitmaps();
    let mut options = BitmapOptions::default();
    options.granularity = Some(bitmap.granularity);
    options.persistent = bitmap.persistent;
    bitmaps.set_storage(Some(BitmapStorage::default()));
    bitmaps.add_disabled(&bitmap.name, options)?;
    set(node, &bitmap.name, &bitmap.dirty)?;
    if bitmap.enabled {
        bitmaps.enable(&quiesce(node), &bitmap.name)?;
    }
    Ok(())
}

/// Makes ranges dirty in a bitmap that nobody has.
pub(crate) fn set(
    node: &Node,
    name: &str,
    dirty: &[ByteRange],
) -> Result<(), blockjob::BitmapError> {
    let claim = node.bitmaps().claim(name, ClaimFor::Change)?;
    let mut bits = claim.lock()?;
    for range in dirty {
        bits.set(range.intersection((0..bits.len()).into()))
            .expect("it does not pass the end");
    }
    drop(bits);
    claim.reclaim();
    Ok(())
}

/// No write is in flight.
pub(crate) fn quiesce(node: &Node) -> QuiesceGuard {
    node.quiesce().try_guard().expect("no write is in flight")
}

/// A copy of the bits.
pub(crate) fn bits_of(node: &Node, name: &str) -> HBitmap {
    let bits = node.bitmaps().snapshot(name, SnapshotOf::Bitmap);
    bits.expect("it is there")
}

/// The SHA-256 by which QEMU compares bitmaps.
pub(crate) fn digest(map: &HBitmap) -> String {
    let mut bytes = vec![
        0;
        map.serialized_len(0..map.len())
            .expect("it has parts")
            .max(8)
    ];
    if map.len() > 0 {
        map.serialize_part(0..map.len(), &mut bytes)
            .expect("it is as long");
    }
    let mut hex = String::new();
    for byte in Sha256::digest(&bytes) {
        write!(hex, "{byte:02x}").expect("a string takes what is written to it");
    }
    hex
}
