//! All bitmaps of a node, as they lie under its lock.

use super::entry::{Body, Content, Entry, Intent, Named, Recorder, Stored, Usage};
use super::error::{BitmapError, CannotPersist};
use super::options::{BitmapOptions, BitmapStorage};
use super::{BusyWith, NAME_BYTES_MAX, is_recordable};
use crate::bitmap::HBitmap;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::{ByteRange, Granularity};

/// What a node's lock protects.
#[derive(Default)]
pub(in crate::node) struct List {
    /// In the order in which they were made, and so by ascending id.
    pub(super) entries: Vec<Entry>,
    next_id: u64,
    /// What persistent bitmaps are kept in.
    pub(super) storage: Option<BitmapStorage>,
    /// Names that no bitmap has, and that an open transaction may have to give back. One may be in twice.
    promised: Vec<String>,
    /// The log that writes are recorded in, if any.
    pub(in crate::node) recording: Option<usize>,
    /// The logs there are, so that draining does not look for them in every place.
    pub(in crate::node) logs: Vec<usize>,
    /// How often something was found in the logs: it differs when something was written.
    pub(in crate::node) found: u64,
    /// The job or the resize that has taken the disk.
    pub(in crate::node) taken: Option<BusyWith>,
}

/// A bitmap that may be made. Whether its name is free was not looked at yet.
pub(super) struct Plan<'a> {
    pub(super) name: &'a str,
    pub(super) granularity: Granularity,
    pub(super) is_persistent: bool,
}

impl<'a> Plan<'a> {
    /// What can be said without looking at the node.
    pub(super) fn new(name: &'a str, options: &BitmapOptions) -> Result<Self, BitmapError> {
        let granularity = options.granularity();
        if name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        if !is_recordable(granularity) {
            return Err(BitmapError::BadGranularity(granularity));
        }
        Ok(Self {
            name,
            granularity,
            is_persistent: options.persistent,
        })
    }
}

impl List {
    /// Puts in a bitmap that was made for this node, and says under which id.
    pub(in crate::node) fn push(&mut self, body: Body) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.entries.push(Entry { id, body });
        id
    }

    pub(in crate::node) fn remove(&mut self, id: u64) -> Option<Entry> {
        let index = self.index_of(id)?;
        Some(self.entries.remove(index))
    }

    fn index_of(&self, id: u64) -> Option<usize> {
        self.entries
            .binary_search_by_key(&id, |entry| entry.id)
            .ok()
    }

    /// The bitmap of a job, which is there until its owner removes it.
    pub(in crate::node) fn job_map(&self, id: u64) -> &HBitmap {
        let index = self.index_of(id).expect("its owner has it");
        match &self.entries[index].body {
            Body::Job(map) => map,
            Body::Named(named) => named.map().expect("an owner has no inconsistent bitmap"),
        }
    }

    /// As [`job_map`](Self::job_map).
    pub(in crate::node) fn job_map_mut(&mut self, id: u64) -> &mut HBitmap {
        let index = self.index_of(id).expect("its owner has it");
        match &mut self.entries[index].body {
            Body::Job(map) => map,
            Body::Named(named) => named.map_mut(),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Named> {
        self.entries.iter().filter_map(Entry::named)
    }

    pub(super) fn find(&self, name: &str) -> Result<&Named, BitmapError> {
        let found = self.entries().find(|named| named.name == name);
        found.ok_or_else(|| BitmapError::not_found(name))
    }

    /// Where in `entries` the bitmap of that name is.
    pub(super) fn position(&self, name: &str) -> Result<usize, BitmapError> {
        let is_it = |entry: &Entry| entry.named().is_some_and(|named| named.name == name);
        let found = self.entries.iter().position(is_it);
        found.ok_or_else(|| BitmapError::not_found(name))
    }

    /// The bitmap of that name, and its id.
    pub(super) fn find_mut(&mut self, name: &str) -> Result<(u64, &mut Named), BitmapError> {
        self.entries
            .iter_mut()
            .filter_map(|entry| {
                let id = entry.id;
                entry.named_mut().map(|named| (id, named))
            })
            .find(|(_, named)| named.name == name)
            .ok_or_else(|| BitmapError::not_found(name))
    }

    /// The bitmap of that id, for an operation that has it: nobody else removes it.
    pub(super) fn owned_mut(&mut self, id: u64) -> &mut Named {
        let index = self.index_of(id).expect("its owner has it");
        let entry = &mut self.entries[index];
        entry.named_mut().expect("it has a name")
    }

    /// As [`owned_mut`](Self::owned_mut).
    pub(super) fn owned(&self, id: u64) -> &Named {
        let index = self.index_of(id).expect("its owner has it");
        self.entries[index].named().expect("it has a name")
    }

    /// The logs there are, and the bitmaps that they are drained into.
    pub(in crate::node) fn logs_and_recorders(&mut self) -> (&[usize], Vec<Recorder<'_>>) {
        let recorders = self.entries.iter_mut().filter_map(Entry::recorder);
        (&self.logs, recorders.collect())
    }

    /// Whether a bitmap records that is not that one.
    pub(in crate::node) fn records_beside(&self, job: Option<u64>) -> bool {
        let mut others = self.entries.iter().filter(|entry| Some(entry.id) != job);
        others.any(|entry| entry.recorded_in().is_some())
    }

    /// Records a write, in whatever records but in that one.
    pub(in crate::node) fn record_beside(&mut self, job: Option<u64>, range: ByteRange) {
        self.found = self.found.wrapping_add(1);
        let others = self
            .entries
            .iter_mut()
            .filter(|entry| Some(entry.id) != job);
        for mut recorder in others.filter_map(Entry::recorder) {
            recorder.record(range);
        }
    }

    /// The finest granularity of those that record.
    pub(in crate::node) fn finest(&self) -> Option<Granularity> {
        self.entries.iter().filter_map(Entry::recorded_in).min()
    }

    /// Whether the name may be given to a bitmap: storage, then other bitmaps, then the name itself.
    pub(super) fn check_new_name(
        &self,
        name: &str,
        granularity: Granularity,
        is_persistent: bool,
        others: usize,
    ) -> Result<(), BitmapError> {
        if is_persistent {
            let checked = match &self.storage {
                None => Err(CannotPersist::NoStorage),
                Some(storage) => storage.check(name, granularity, others),
            };
            checked.map_err(|why| BitmapError::CannotPersist {
                name: name.to_owned(),
                why,
            })?;
        }
        self.check_name_is_free(name)?;
        if name.len() > NAME_BYTES_MAX {
            let bytes = name.len();
            return Err(BitmapError::NameTooLong { bytes });
        }
        Ok(())
    }

    /// Whether nobody has that name, nor may get it back.
    pub(super) fn check_name_is_free(&self, name: &str) -> Result<(), BitmapError> {
        let name = name.to_owned();
        if self.find(&name).is_ok() && !is_broken(Sabotage::SameNameTwice) {
            return Err(BitmapError::NameExists { name });
        }
        if self.promised.contains(&name) && !is_broken(Sabotage::GiveAwayName) {
            let with = BusyWith::Transaction;
            return Err(BitmapError::Busy { name, with });
        }
        Ok(())
    }

    /// Keeps a name for an open transaction that may have to give it back.
    pub(super) fn promise(&mut self, name: &str) {
        self.promised.push(name.to_owned());
    }

    /// It is decided: the name is free, or given back.
    pub(super) fn take_back_promise(&mut self, name: &str) {
        if let Some(index) = self.promised.iter().position(|known| known == name) {
            self.promised.swap_remove(index);
        }
    }

    /// Whether a bitmap may be made; that there is memory for it comes up when it is.
    pub(super) fn check_plan(&self, plan: &Plan<'_>) -> Result<(), BitmapError> {
        let others = self.persistent();
        self.check_new_name(plan.name, plan.granularity, plan.is_persistent, others)?;
        self.check_not_resizing()
    }

    /// How many bitmaps storage has to keep.
    fn persistent(&self) -> usize {
        self.entries()
            .filter(|named| named.stored.is_some())
            .count()
    }

    /// Puts in a bitmap by a plan that was checked.
    pub(super) fn push_named(&mut self, plan: &Plan<'_>, map: HBitmap, is_enabled: bool) -> u64 {
        self.push(Body::Named(Named {
            name: plan.name.to_owned(),
            stored: plan.is_persistent.then(Stored::default),
            content: Content::Known {
                map: map.into(),
                usage: Usage::Idle { is_enabled },
            },
        }))
    }

    /// Switches recording, which must be possible in the node's log, and says what it was before.
    pub(super) fn set_enabled(
        &mut self,
        name: &str,
        is_enabled: bool,
    ) -> Result<(u64, bool), BitmapError> {
        let (id, named) = self.find_mut(name)?;
        let usage = named.idle(Intent::Use)?.usage;
        let was_enabled = usage.is_enabled();
        *usage = Usage::Idle { is_enabled };
        Ok((id, was_enabled))
    }

    /// Gives a bitmap another name, and says which it had before.
    pub(super) fn rename(
        &mut self,
        name: &str,
        new_name: &str,
    ) -> Result<(u64, String), BitmapError> {
        if new_name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        let (id, named) = self.find_mut(name)?;
        named.idle(Intent::Change)?;
        let (granularity, is_persistent) = (named.granularity(), named.stored.is_some());
        // It takes the place of its own stored copy.
        let others = self.persistent().saturating_sub(1);
        self.check_new_name(new_name, granularity, is_persistent, others)?;
        let old = std::mem::replace(&mut self.owned_mut(id).name, new_name.to_owned());
        Ok((id, old))
    }

    /// Panics unless what the module says of one bitmap and of all holds. For tests.
    pub(super) fn check_invariants(&self, len: u64) {
        let ids = self.entries.iter().map(|entry| entry.id);
        assert!(ids.is_sorted_by(|a, b| a < b), "2: order of creation");
        for named in self.entries() {
            named.check_invariants(len);
            let same = self.entries().filter(|other| other.name == named.name);
            assert_eq!(same.count(), 1, "2: {:?} is not the only one", named.name);
        }
        let finest = self.finest();
        assert_eq!(
            self.recording.is_some(),
            finest.is_some(),
            "3: the node records if a bitmap does"
        );
        if let (Some(log), Some(finest)) = (self.recording, finest) {
            let exponent = log as u64 + u64::from(crate::node::record::LOG_EXPONENT_MIN);
            assert!(
                exponent <= u64::from(finest.exponent()),
                "3: the log is as fine as the finest that records"
            );
        }
    }
}

impl Named {
    pub(super) fn map_mut(&mut self) -> &mut HBitmap {
        match &mut self.content {
            Content::Known { map, .. } => super::entry::unshared(map),
            Content::Inconsistent { .. } => unreachable!("nobody owns an inconsistent bitmap"),
        }
    }

    fn check_invariants(&self, len: u64) {
        let name = &self.name;
        assert!((1..=NAME_BYTES_MAX).contains(&name.len()), "2: a name");
        assert!(
            is_recordable(self.granularity()),
            "2: granularity of {name:?}"
        );
        assert_eq!(self.len(), len, "2: length of {name:?}");
        if self.is_inconsistent() {
            assert!(
                self.stored.is_some(),
                "4: {name:?} is inconsistent, not stored"
            );
            assert!(
                !self.is_recording(),
                "4: {name:?} is inconsistent, and records"
            );
            return;
        }
        let Content::Known { map, usage } = &self.content else {
            return;
        };
        map.check_invariants();
        if let Usage::Held {
            changes: Some(changes),
            ..
        } = usage
        {
            changes.chunks().check_invariants();
            assert_eq!(changes.chunks().len(), len, "4: changes of {name:?}");
        }
        if let Some(successor) = self.successor() {
            successor.check_invariants();
            assert_eq!(successor.len(), map.len(), "4: successor of {name:?}");
            assert_eq!(
                successor.granularity(),
                map.granularity(),
                "4: successor of {name:?}"
            );
        }
    }
}
