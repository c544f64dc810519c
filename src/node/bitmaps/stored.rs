//! Persistent bitmaps: what is written with an image, what comes back from it, and storage that is
//! read-only.

use super::entry::{Body, Content, Named, Stored, Usage};
use super::{BitmapError, Bitmaps, List, NAME_BYTES_MAX, copy_of, is_recordable};
use crate::bitmap::HBitmap;
use crate::node::{Inner, QuiesceGuard};
use crate::units::Granularity;

/// A persistent bitmap as it is written with the image, and read back.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapState {
    /// Its name.
    pub name: String,
    /// Whether it records from the moment on that it is imported.
    pub is_enabled: bool,
    /// Whether somebody was using the image when this was read, so that nobody knows what was written
    /// since. Never so in an export. Who has imported a bitmap from an image that he writes to sets it
    /// there, on storage and flushed, before the first write of the guest, and leaves it until the last
    /// export is stored.
    pub is_in_use: bool,
    /// What is dirty, and its length and granularity.
    pub bits: HBitmap,
}

impl BitmapState {
    /// A bitmap that does not record and was closed.
    #[must_use]
    pub fn new(name: impl Into<String>, bits: HBitmap) -> Self {
        Self {
            name: name.into(),
            is_enabled: false,
            is_in_use: false,
            bits,
        }
    }
}

/// What is to be done with the stored bitmaps of a node. What is in neither list was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapExport {
    /// To be written, in the order in which they were made.
    pub to_store: Vec<BitmapState>,
    /// Names of those whose stored copies, if there are any, stay as they are: inconsistent, read-only,
    /// or with somebody else.
    pub to_keep: Vec<String>,
}

impl Bitmaps<'_> {
    /// All persistent bitmaps, to be stored when the image is closed.
    ///
    /// The guard makes it exact: no write is in flight. What is written after it is dropped the export does
    /// not have. If the guest goes on, [`is_in_use`](BitmapState::is_in_use) must stay set on storage, as it is from
    /// the [import](Self::import_state) on: else the export is believed after a crash. It is stored as it is once
    /// the guest writes no more.
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard; [`Busy`](BitmapError::Busy) of the first bitmap
    /// that would be stored and is in use; [`OutOfMemory`](BitmapError::OutOfMemory).
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{BitmapOptions, BitmapStorage, Node};
    ///
    /// let node = Node::new(1 << 20);
    /// node.bitmaps().set_storage(Some(BitmapStorage::default()));
    /// let mut options = BitmapOptions::default();
    /// options.persistent = true;
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// node.bitmaps().add(&guard, "daily", options)?;
    /// let export = node.bitmaps().export_state(&guard)?;
    /// assert!(export.to_store[0].is_enabled);
    ///
    /// // Later, when the image is opened again, before the first write of the guest:
    /// let node = Node::new(1 << 20);
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// let mut in_use = export.to_store.clone();
    /// in_use.iter_mut().for_each(|state| state.is_in_use = true);
    /// node.bitmaps().import_state(&guard, export.to_store)?;
    /// // ... write `in_use` to the image, and flush that ...
    /// drop(guard); // only now may the guest write
    /// assert!(node.bitmaps().query("daily")?.is_recording);
    ///
    /// // If the process crashes, `in_use` is what is found, and its bits are not believed:
    /// let node = Node::new(1 << 20);
    /// let guard = node.quiesce().try_guard().expect("no write is in flight");
    /// node.bitmaps().import_state(&guard, in_use)?;
    /// assert!(node.bitmaps().query("daily")?.is_inconsistent);
    /// # Ok::<(), blockjob::BitmapError>(())
    /// ```
    pub fn export_state(&self, guard: &QuiesceGuard) -> Result<BitmapExport, BitmapError> {
        self.check_guard(guard)?;
        let list = self.inner().lock_drained();
        let mut export = BitmapExport::default();
        for named in list.entries().filter(|named| named.stored.is_some()) {
            if !named.will_be_stored() {
                export.to_keep.push(named.name.clone());
                continue;
            }
            let bits = copy_of(named.idle_map()?)?;
            export.to_store.push(BitmapState {
                is_enabled: named.is_recording(),
                ..BitmapState::new(named.name.clone(), bits)
            });
        }
        Ok(export)
    }

    /// Makes the bitmaps that came with an image, all or none. Those that were in use become
    /// inconsistent, but for those that the node has: they came another way, by a migration as a rule, and the
    /// image was not closed for that. They stay as they are.
    ///
    /// Before the first write of the guest: what was written earlier they do not have. If the image is written
    /// to, all of them must be on storage with [`is_in_use`](BitmapState::is_in_use) set, and flushed, before the
    /// guard is dropped. Otherwise, after a crash, the old bits are believed, and what was written since is copied
    /// by no backup. The example of [`export_state`](Self::export_state) shows it.
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard; of the bitmaps, in their order,
    /// [`NameEmpty`](BitmapError::NameEmpty), [`BadGranularity`](BitmapError::BadGranularity),
    /// [`NameExists`](BitmapError::NameExists), [`Busy`](BitmapError::Busy) of a name that an open transaction
    /// may give back, [`NameTooLong`](BitmapError::NameTooLong), [`SizeMismatch`](BitmapError::SizeMismatch); [`NodeBusy`](BitmapError::NodeBusy) while the disk is
    /// being resized; [`TooLarge`](BitmapError::TooLarge) and
    /// [`OutOfMemory`](BitmapError::OutOfMemory) of the log.
    pub fn import_state(
        &self,
        guard: &QuiesceGuard,
        mut states: Vec<BitmapState>,
    ) -> Result<(), BitmapError> {
        self.check_guard(guard)?;
        let mut list = self.inner().lock_drained();
        states.retain(|state| !state.is_in_use || list.find(&state.name).is_err());
        let mut finest: Option<Granularity> = None;
        for (index, state) in states.iter().enumerate() {
            let BitmapState { name, bits, .. } = state;
            let (len, granularity) = (bits.len(), bits.granularity());
            if name.is_empty() {
                return Err(BitmapError::NameEmpty);
            }
            if !is_recordable(granularity) {
                return Err(BitmapError::BadGranularity(granularity));
            }
            let is_twice = states[..index].iter().any(|other| other.name == *name);
            if is_twice {
                let name = name.clone();
                return Err(BitmapError::NameExists { name });
            }
            list.check_name_is_free(name)?;
            if name.len() > NAME_BYTES_MAX {
                let bytes = name.len();
                return Err(BitmapError::NameTooLong { bytes });
            }
            if len != self.node.len() {
                return Err(BitmapError::SizeMismatch {
                    name: name.clone(),
                    len,
                    expected: self.node.len(),
                });
            }
            if state.is_enabled && !state.is_in_use {
                finest = Some(finest.map_or(granularity, |finest| finest.min(granularity)));
            }
        }
        list.check_not_resizing()?;
        for BitmapState { bits, .. } in &mut states {
            let (len, granularity) = (bits.len(), bits.granularity());
            bits.reserve()
                .map_err(|error| BitmapError::create(error, len, granularity))?;
        }
        if let Some(finest) = finest {
            self.inner().start_recording(&mut list, finest)?;
        }
        for state in states {
            let content = if state.is_in_use {
                Content::Inconsistent {
                    len: state.bits.len(),
                    granularity: state.bits.granularity(),
                    held: None,
                }
            } else {
                Content::Known {
                    map: state.bits.into(),
                    usage: Usage::Idle {
                        is_enabled: state.is_enabled,
                    },
                }
            };
            list.push(Body::Named(Named {
                name: state.name,
                stored: Some(Stored::default()),
                content,
            }));
        }
        Ok(())
    }

    /// The storage that keeps a persistent bitmap cannot be written to. Until it is
    /// [writable](Self::mark_writable) again its bits do not change, and since a write could not be
    /// recorded, the node refuses every [write](crate::Node::begin_write).
    ///
    /// The guard sees to it that none is in flight that was let in before.
    ///
    /// # Errors
    ///
    /// [`OtherNode`](BitmapError::OtherNode) of the guard, [`NotFound`](BitmapError::NotFound),
    /// [`NotPersistent`](BitmapError::NotPersistent), and [`Busy`](BitmapError::Busy) with an open
    /// transaction or a resize only.
    pub fn mark_readonly(&self, guard: &QuiesceGuard, name: &str) -> Result<(), BitmapError> {
        self.check_guard(guard)?;
        self.set_readonly(name, true)
    }

    /// The storage of a bitmap can be written to again.
    ///
    /// # Errors
    ///
    /// [`NotFound`](BitmapError::NotFound), [`NotPersistent`](BitmapError::NotPersistent), and
    /// [`Busy`](BitmapError::Busy) with an open transaction or a resize only.
    pub fn mark_writable(&self, name: &str) -> Result<(), BitmapError> {
        self.set_readonly(name, false)
    }

    fn set_readonly(&self, name: &str, is_readonly: bool) -> Result<(), BitmapError> {
        let mut list = self.inner().lock_drained();
        let (_, named) = list.find_mut(name)?;
        named.check_not_open()?;
        let Some(stored) = &mut named.stored else {
            let name = name.to_owned();
            return Err(BitmapError::NotPersistent { name });
        };
        stored.is_readonly = is_readonly;
        self.inner().refuse_if_readonly(&list);
        Ok(())
    }
}

impl Inner {
    /// Has writes refused while a bitmap is read-only, and let in again when none is. For who has marked one, and
    /// who removes one that may be.
    pub(super) fn refuse_if_readonly(&self, list: &List) {
        self.gate
            .refuse_writes(list.entries().any(Named::is_readonly));
    }
}
