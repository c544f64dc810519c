//! The destination: bitmaps that are put together, and become the nodes'.
//!
//! ```text
//!             bits           all of them
//! started ─▶ loading ─────▶ whole ─────────── guest starts ──▶ active: the node's
//!                │            └ does not record: early, the node's, until the guest starts
//!                └ guest starts: the node records beside it; then whole is active at once
//!  any but active ── the stream ends, fails, is cancelled ──▶ dropped
//! ```
//!
//! 1. The bits of a bitmap are in the hands of the loader until there are all of them (BM-2). The node has its name,
//!    in use, and what was written since the guest runs.
//! 2. What is loaded replaces, within the part that it is of. What the guest wrote is added at the end and never
//!    replaced (BM-1).
//! 3. A bitmap is whole when each of its parts came at least once, and it was said to be.
//! 4. What is wrong is found before anything is changed for it, and before memory is taken.

use std::collections::VecDeque;

use super::MigratingNode;
use super::error::{Fault, GuestStartError, IncomingError, Unusable};
use super::event::{ArrivalState, IncomingBitmap, IncomingEvent};
use super::mapping::{BitmapId, BitmapMapping};
use super::wire::Shape;
use crate::bitmap::HBitmap;
use crate::node::{BitmapArrival, BitmapError, BitmapOptions, QuiesceGuard, Released};
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// What a receiver allows, whatever the stream says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowed {
    pub(super) bitmaps: usize,
    pub(super) memory: u64,
}

/// What a bitmap begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begins {
    pub(super) granularity: u64,
    pub(super) is_enabled: bool,
    pub(super) is_persistent: bool,
}

/// Bits of a part.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bits<'a> {
    Zeroes,
    Ones,
    /// As many bytes as the part has, or more: padding.
    Bytes(&'a [u8]),
}

/// What is wrong, and with what.
pub(super) enum Refusal {
    Stream(Fault),
    Bitmaps(Unusable),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Refusal::Stream(fault)
    }
}

impl From<Unusable> for Refusal {
    fn from(unusable: Unusable) -> Self {
        Refusal::Bitmaps(unusable)
    }
}

/// All bitmaps of a stream, on the side that they come to.
pub(super) struct Loader {
    nodes: Vec<MigratingNode>,
    mapping: Option<BitmapMapping>,
    allowed: Allowed,
    /// In the order in which they began.
    bitmaps: Vec<Arriving>,
    /// Serialized bytes of all.
    memory: u64,
    has_guest: bool,
    /// What ended it, other than its end.
    ended: Option<IncomingError>,
    pub(super) events: VecDeque<IncomingEvent>,
}

struct Arriving {
    id: BitmapId,
    node: usize,
    /// Its name in the stream.
    alias: String,
    shape: Shape,
    is_enabled: bool,
    is_persistent: bool,
    stage: Stage,
    /// Serialized bytes that came, with those that came again.
    received: u64,
}

/// How far a bitmap is.
enum Stage {
    Loading {
        arrival: BitmapArrival,
        bits: HBitmap,
        /// Which words of the bits came: a granule is a word.
        came: HBitmap,
    },
    Whole(BitmapArrival),
    Early(Released),
    Active,
    Dropped,
}

impl Loader {
    pub(super) fn new(
        nodes: Vec<MigratingNode>,
        mapping: Option<BitmapMapping>,
        allowed: Allowed,
    ) -> Self {
        Self {
            nodes,
            mapping,
            allowed,
            bitmaps: Vec::new(),
            memory: 0,
            has_guest: false,
            ended: None,
            events: VecDeque::new(),
        }
    }

    /// Whether bitmaps still matter.
    pub(super) fn is_loading(&self) -> bool {
        self.ended.is_none()
    }

    /// What ended it, other than its end.
    pub(super) fn ended(&self) -> Option<&IncomingError> {
        self.ended.as_ref()
    }

    /// The node that a name in the stream stands for.
    pub(super) fn node_of(&self, alias: &[u8]) -> Result<usize, Unusable> {
        let unknown = || Unusable::UnknownNode {
            alias: String::from_utf8_lossy(alias).into_owned(),
        };
        let text = std::str::from_utf8(alias).map_err(|_| unknown())?;
        let by_name = |name: &str| self.nodes.iter().position(|node| node.name == name);
        let found = match &self.mapping {
            Some(mapping) => mapping
                .of_alias(text)
                .and_then(|entry| by_name(&entry.node)),
            None => self
                .nodes
                .iter()
                .position(|node| node.device() == Some(text))
                .or_else(|| by_name(text)),
        };
        found.ok_or_else(unknown)
    }

    pub(super) fn node(&self, index: usize) -> &MigratingNode {
        &self.nodes[index]
    }

    /// The name here that a name in the stream stands for, and what is said of its being persistent.
    fn bitmap_of(&self, node: usize, alias: &[u8]) -> Result<(String, Option<bool>), Unusable> {
        let lossy = || String::from_utf8_lossy(alias).into_owned();
        let Ok(text) = std::str::from_utf8(alias) else {
            return Err(Unusable::BadName { alias: lossy() });
        };
        if text.contains('\0') {
            return Err(Unusable::BadName { alias: lossy() });
        }
        let Some(mapping) = &self.mapping else {
            return Ok((text.to_owned(), None));
        };
        let name = &self.nodes[node].name;
        let entry = mapping.of_node(name);
        let found = entry.and_then(|entry| entry.bitmaps.iter().find(|known| known.alias == text));
        match found {
            Some(known) => Ok((known.name.clone(), known.persistent)),
            None => Err(Unusable::UnknownBitmap {
                node: name.clone(),
                alias: lossy(),
            }),
        }
    }

    /// The bitmap of that name in the stream, which must have begun.
    pub(super) fn find(&self, node: usize, alias: &[u8]) -> Result<usize, Refusal> {
        let is_it = |known: &Arriving| known.node == node && known.alias.as_bytes() == alias;
        if let Some(index) = self.bitmaps.iter().position(is_it) {
            return Ok(index);
        }
        let (bitmap, _) = self.bitmap_of(node, alias)?;
        let node = &self.nodes[node];
        if node.node.bitmaps().query(&bitmap).is_ok() {
            let bitmap = id(&node.name, &bitmap);
            return Err(Fault::NotStarted { bitmap }.into());
        }
        Err(Refusal::Bitmaps(Unusable::UnknownBitmap {
            node: node.name.clone(),
            alias: String::from_utf8_lossy(alias).into_owned(),
        }))
    }

    /// A bitmap begins.
    pub(super) fn start(
        &mut self,
        node: usize,
        alias: &[u8],
        begins: Begins,
    ) -> Result<usize, Refusal> {
        let bytes = begins.granularity;
        let granularity = Granularity::from_bytes(bytes)
            .filter(|_| (512..=1 << 31).contains(&bytes))
            .ok_or(Fault::Granularity { bytes })?;
        let (name, persistent) = self.bitmap_of(node, alias)?;
        let place = &self.nodes[node];
        let bitmap = id(&place.name, &name);
        // By the disk: it may have no name, or several.
        let is_known = |known: &Arriving| {
            known.id.bitmap == name && self.nodes[known.node].node.is(&place.node)
        };
        if is_broken(Sabotage::ReplaceLocal) {
            let _ = place.node.bitmaps().remove(&name);
        }
        if self.bitmaps.iter().any(is_known) || place.node.bitmaps().query(&name).is_ok() {
            return Err(Fault::Exists { bitmap }.into());
        }
        if self.has_guest && begins.is_enabled {
            return Err(Fault::StartsLate { bitmap }.into());
        }
        let shape = Shape {
            len: place.node.len(),
            granularity,
        };
        let memory = self.memory.saturating_add(shape.bytes());
        if self.bitmaps.len() >= self.allowed.bitmaps {
            return Err(Fault::Limit {
                what: "their number",
            }
            .into());
        }
        if memory > self.allowed.memory && !is_broken(Sabotage::IgnoreLimits) {
            return Err(Fault::Limit { what: "memory" }.into());
        }
        let is_persistent = persistent.unwrap_or(begins.is_persistent);
        let options = BitmapOptions {
            granularity: Some(granularity),
            persistent: is_persistent,
            ..BitmapOptions::default()
        };
        let make = || {
            let bits = map(shape.len, granularity)?;
            let words = Granularity::from_exponent(granularity.exponent() + 6);
            let came = map(shape.len, words.expect("it is at most 31"))?;
            let arrival = place.node.bitmaps().receive(&name, shape.len, &options)?;
            Ok(Stage::Loading {
                arrival,
                bits,
                came,
            })
        };
        let stage = make().map_err(|error| Fault::Make {
            bitmap: bitmap.clone(),
            error,
        })?;
        let alias = String::from_utf8_lossy(alias).into_owned();
        self.memory = memory;
        self.events
            .push_back(IncomingEvent::Started(bitmap.clone()));
        self.bitmaps.push(Arriving {
            id: bitmap,
            node,
            alias,
            shape,
            is_enabled: begins.is_enabled,
            is_persistent,
            stage,
            received: 0,
        });
        Ok(self.bitmaps.len() - 1)
    }

    /// Bits of `range`, which is in sectors or in bytes, and so may end past the last byte.
    pub(super) fn bits(
        &mut self,
        index: usize,
        range: ByteRange,
        bits_of: Bits<'_>,
    ) -> Result<(), Refusal> {
        let Arriving {
            id, shape, stage, ..
        } = &mut self.bitmaps[index];
        let Stage::Loading { bits, came, .. } = stage else {
            let bitmap = id.clone();
            return Err(Fault::AfterComplete { bitmap }.into());
        };
        check_part(*shape, range)?;
        let range = range.intersection((0..shape.len).into());
        let len = shape.bytes_of(range);
        let loaded = match bits_of {
            Bits::Zeroes if is_broken(Sabotage::AddLoaded) => Ok(false),
            Bits::Zeroes => bits.deserialize_zeroes(range),
            Bits::Ones => bits.deserialize_ones(range),
            Bits::Bytes(bytes) => {
                let found = bytes.len() as u64;
                if found < len || found > len.next_multiple_of(32) {
                    let expected = len;
                    return Err(Unusable::BufferLength { expected, found }.into());
                }
                bits.deserialize_part(range, &bytes[..len as usize])
            }
        };
        loaded.expect("it was looked at, and has its memory");
        came.set(range).expect("it does not pass the end");
        self.bitmaps[index].received += len;
        Ok(())
    }

    /// It was said that all bits came; `is_right` looks at them.
    pub(super) fn complete(
        &mut self,
        index: usize,
        is_right: impl FnOnce(&HBitmap) -> bool,
    ) -> Result<(), Refusal> {
        let has_guest = self.has_guest;
        let known = &mut self.bitmaps[index];
        let bitmap = known.id.clone();
        let Stage::Loading { bits, came, .. } = &known.stage else {
            // It was said before, and is still true.
            return Ok(());
        };
        let missing = came.next_clean(0..known.shape.len);
        if let (Some(from), false) = (missing, is_broken(Sabotage::CompleteWithGaps)) {
            return Err(Fault::Missing { bitmap, from }.into());
        }
        if !is_right(bits) {
            return Err(Fault::Digest { bitmap }.into());
        }
        let stage = std::mem::replace(&mut known.stage, Stage::Dropped);
        let Stage::Loading {
            mut arrival, bits, ..
        } = stage
        else {
            unreachable!("it was looked at")
        };
        arrival.deliver(bits);
        known.stage = if has_guest {
            arrival.release();
            Stage::Active
        } else if known.is_enabled {
            Stage::Whole(arrival)
        } else {
            arrival.release_early().map_or(Stage::Dropped, Stage::Early)
        };
        self.events.push_back(IncomingEvent::Complete(bitmap));
        Ok(())
    }

    /// The guest starts here, with the next write.
    pub(super) fn guest_starts(&mut self, guards: &[&QuiesceGuard]) -> Result<(), GuestStartError> {
        if self.has_guest {
            return Ok(());
        }
        let guard_of = |node: &MigratingNode| {
            let mut found = guards.iter().filter(|guard| guard.is_of(&node.node));
            found.next().ok_or_else(|| GuestStartError::NotQuiesced {
                node: node.name.clone(),
            })
        };
        let recording = self.bitmaps.iter().filter_map(|known| match &known.stage {
            Stage::Loading { arrival, .. } | Stage::Whole(arrival) if known.is_enabled => {
                Some((known.node, arrival))
            }
            _ => None,
        });
        let recording: Vec<_> = recording.collect();
        for (node, _) in &recording {
            guard_of(&self.nodes[*node])?;
        }
        for (node, arrival) in recording {
            arrival.record(guard_of(&self.nodes[node])?)?;
        }
        self.has_guest = true;
        self.events.push_back(IncomingEvent::GuestStarted);
        for known in &mut self.bitmaps {
            known.stage = match std::mem::replace(&mut known.stage, Stage::Dropped) {
                Stage::Whole(mut arrival) => {
                    arrival.release();
                    Stage::Active
                }
                Stage::Early(_) => Stage::Active,
                stage @ (Stage::Loading { .. } | Stage::Active | Stage::Dropped) => stage,
            };
        }
        Ok(())
    }

    /// The stream is over: whether all came.
    pub(super) fn check_complete(&self) -> Result<(), IncomingError> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        let loading = |known: &&Arriving| matches!(known.stage, Stage::Loading { .. });
        match self.bitmaps.iter().find(loading) {
            Some(known) => Err(IncomingError::Incomplete {
                bitmap: known.id.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Whether nothing more is to come for any bitmap that began.
    pub(super) fn is_complete(&self) -> bool {
        self.check_complete().is_ok()
    }

    /// Everything that is not the node's yet is gone.
    pub(super) fn end(&mut self, why: IncomingError) {
        if self.ended.is_some() {
            return;
        }
        for known in &mut self.bitmaps {
            let (stage, is_gone) = match std::mem::replace(&mut known.stage, Stage::Dropped) {
                Stage::Active => (Stage::Active, false),
                // Somebody has it; it is whole.
                Stage::Early(released) => match released.take_away() {
                    true => (Stage::Dropped, true),
                    false => (Stage::Active, false),
                },
                Stage::Loading { .. } | Stage::Whole(_) => (Stage::Dropped, true),
                Stage::Dropped => (Stage::Dropped, false),
            };
            known.stage = stage;
            if is_gone {
                let bitmap = known.id.clone();
                self.events.push_back(IncomingEvent::Dropped(bitmap));
            }
        }
        self.events.push_back(IncomingEvent::Ended(why.clone()));
        self.ended = Some(why);
    }

    pub(super) fn bitmaps(&self) -> Vec<IncomingBitmap> {
        let told = self.bitmaps.iter().map(|known| IncomingBitmap {
            id: known.id.clone(),
            granularity: known.shape.granularity,
            is_enabled: known.is_enabled,
            is_persistent: known.is_persistent,
            bytes: known.shape.bytes(),
            bytes_received: known.received,
            state: match known.stage {
                Stage::Loading { .. } => ArrivalState::Loading,
                Stage::Whole(_) | Stage::Early(_) => ArrivalState::Whole,
                Stage::Active => ArrivalState::Active,
                Stage::Dropped => ArrivalState::Dropped,
            },
        });
        told.collect()
    }

    /// How many bitmaps began.
    pub(super) fn count(&self) -> usize {
        self.bitmaps.len()
    }

    /// Whether some began, and all of those are complete.
    pub(super) fn has_all(&self) -> bool {
        !self.bitmaps.is_empty() && self.is_complete()
    }
}

/// What came as a whole is the node's only when the guest starts.
impl Drop for Loader {
    fn drop(&mut self) {
        self.end(IncomingError::Cancelled);
    }
}

fn id(node: &str, bitmap: &str) -> BitmapId {
    BitmapId {
        node: node.to_owned(),
        bitmap: bitmap.to_owned(),
    }
}

/// A clean map with its memory.
fn map(len: u64, granularity: Granularity) -> Result<HBitmap, BitmapError> {
    let make = || {
        let mut map = HBitmap::new(len, granularity)?;
        map.reserve()?;
        Ok(map)
    };
    make().map_err(|error| BitmapError::create(error, len, granularity))
}

/// Whether a bitmap has such a part.
fn check_part(shape: Shape, range: ByteRange) -> Result<(), Fault> {
    if range.is_empty() {
        return Ok(());
    }
    let (start, end) = (range.start(), range.end());
    if end > shape.end() {
        let len = shape.len;
        return Err(Fault::PastEnd { end, len });
    }
    let align = shape.align();
    let granularity = shape.granularity;
    let is_last = granularity.granule_of(end - 1) + 1 == granularity.granules_in(shape.len);
    if start % align != 0 || (end % align != 0 && !is_last) {
        return Err(Fault::Unaligned { start, end, align });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_disk_has_a_last_part() {
        let (len, granularity) = (u64::MAX, Granularity::from_exponent(31).unwrap());
        let shape = Shape { len, granularity };
        let from = len & !(shape.align() - 1);
        assert_eq!(check_part(shape, (from..len).into()), Ok(()));
    }
}
