//! A naive twin of nodes with bitmaps: sets of granules, and every rule written down once more, plainly.

use std::collections::BTreeSet;
use std::ops::Range;

use blockjob::{
    BitmapError, BitmapInfo, BitmapOptions, BusyWith, CannotPersist, ClaimFor, Granularity, Grown,
    HBitmap,
};

/// The granules that are dirty.
pub(crate) type Dirty = BTreeSet<u64>;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Twin {
    pub(crate) disks: Vec<Disk>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Disk {
    pub(crate) len: u64,
    /// How many bitmaps the storage takes, if there is any.
    pub(crate) storage: Option<usize>,
    pub(crate) bitmaps: Vec<Bitmap>,
    /// What jobs record, by the number of their bitmap: in what granules, and what is dirty.
    pub(crate) jobs: Vec<(u64, u64, Dirty)>,
    /// Names that open transactions may give back.
    pub(crate) promised: Vec<String>,
    /// How many bitmaps there ever were.
    made: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bitmap {
    /// No other of the disk ever has it.
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) granule: u64,
    pub(crate) dirty: Dirty,
    pub(crate) is_enabled: bool,
    pub(crate) is_persistent: bool,
    pub(crate) is_readonly: bool,
    pub(crate) is_skipped: bool,
    pub(crate) is_inconsistent: bool,
    pub(crate) held: Option<BusyWith>,
    /// What a successor has, and whether it records.
    pub(crate) successor: Option<(Dirty, bool)>,
    /// Whether an open transaction is to remove it.
    pub(crate) is_leaving: bool,
}

/// What it takes to undo an open transaction.
pub(crate) struct Opened {
    /// Bitmaps by disk and number, and what they were, if they were there.
    changed: Vec<(usize, u64, Option<Bitmap>)>,
    renamed: Vec<At>,
}

/// A bitmap by its disk and its name.
pub(crate) type At = (usize, String);

/// What may be asked as a verb and as an act of a transaction.
#[derive(Clone, Debug)]
pub(crate) enum Verb {
    Add(At, BitmapOptions, bool),
    Remove(At),
    Clear(At),
    Enable(At),
    Disable(At),
    Merge(At, Vec<At>),
    Rename(At, String),
}

impl Verb {
    /// The disks that it names.
    pub(crate) fn disks(&self) -> Vec<usize> {
        match self {
            Verb::Add((disk, _), ..)
            | Verb::Remove((disk, _))
            | Verb::Clear((disk, _))
            | Verb::Enable((disk, _))
            | Verb::Disable((disk, _))
            | Verb::Rename((disk, _), _) => vec![*disk],
            Verb::Merge((disk, _), sources) => {
                let sources = sources.iter().map(|source| source.0);
                sources.chain([*disk]).collect()
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Checks {
    /// In use, read-only, inconsistent.
    All,
    /// In use, inconsistent.
    NotReadonly,
    /// In use, read-only.
    NotInconsistent,
}

type Answer<T = ()> = Result<T, BitmapError>;

impl Twin {
    pub(crate) fn new(lens: &[u64]) -> Self {
        let disk = |len: &u64| Disk {
            len: *len,
            storage: None,
            bitmaps: Vec::new(),
            jobs: Vec::new(),
            promised: Vec::new(),
            made: 0,
        };
        Self {
            disks: lens.iter().map(disk).collect(),
        }
    }

    pub(crate) fn ask(&mut self, verb: &Verb) -> Answer {
        match verb {
            Verb::Add((disk, name), options, is_enabled) => {
                self.disks[*disk].add(name, options, *is_enabled)
            }
            Verb::Remove((disk, name)) => {
                let disk = &mut self.disks[*disk];
                disk.find(name)?.check(Checks::NotInconsistent)?;
                disk.bitmaps.retain(|bitmap| bitmap.name != *name);
                Ok(())
            }
            Verb::Clear(at) => {
                let bitmap = self.find(at)?;
                bitmap.check(Checks::All)?;
                bitmap.dirty.clear();
                Ok(())
            }
            Verb::Enable(at) => self.switch(at, true),
            Verb::Disable(at) => self.switch(at, false),
            Verb::Merge(target, sources) => self.merge(target, sources),
            Verb::Rename((disk, name), new_name) => self.disks[*disk].rename(name, new_name),
        }
    }

    pub(crate) fn find(&mut self, (disk, name): &At) -> Answer<&mut Bitmap> {
        self.disks[*disk].find(name)
    }

    fn switch(&mut self, at: &At, is_enabled: bool) -> Answer {
        let bitmap = self.find(at)?;
        bitmap.check(Checks::NotReadonly)?;
        bitmap.is_enabled = is_enabled;
        Ok(())
    }

    fn merge(&mut self, target: &At, sources: &[At]) -> Answer {
        let len = self.disks[target.0].len;
        self.find(target)?.check(Checks::All)?;
        if sources.is_empty() {
            let name = target.1.clone();
            return Err(BitmapError::NoSources { name });
        }
        let mut bytes: Vec<Range<u64>> = Vec::new();
        for source in sources {
            let source_len = self.disks[source.0].len;
            let bitmap = self.find(source)?;
            bitmap.check(Checks::NotReadonly)?;
            if source_len != len {
                return Err(BitmapError::SizeMismatch {
                    name: source.1.clone(),
                    len: source_len,
                    expected: len,
                });
            }
            let of = |granule: &u64| granule * bitmap.granule..(granule + 1) * bitmap.granule;
            bytes.extend(bitmap.dirty.iter().map(of));
        }
        let bitmap = self.find(target)?;
        for range in bytes {
            set(
                &mut bitmap.dirty,
                bitmap.granule,
                range.start..range.end.min(len),
            );
        }
        Ok(())
    }

    pub(crate) fn claim(&mut self, at: &At, claim: ClaimFor) -> Answer {
        let bitmap = self.find(at)?;
        bitmap.check(match claim {
            ClaimFor::Change => Checks::All,
            ClaimFor::Reading => Checks::NotReadonly,
        })?;
        bitmap.held = Some(BusyWith::Job);
        bitmap.successor = Some((Dirty::new(), bitmap.is_enabled));
        bitmap.is_enabled = false;
        Ok(())
    }

    pub(crate) fn end_claim(&mut self, at: &At, is_success: bool) {
        let bitmap = self.find(at).unwrap();
        let (dirty, is_enabled) = bitmap.successor.take().unwrap();
        if is_success {
            bitmap.dirty = dirty;
        } else {
            bitmap.dirty.extend(dirty);
        }
        bitmap.is_enabled = is_enabled;
        bitmap.held = None;
    }

    pub(crate) fn freeze(&mut self, at: &At) -> Answer<Dirty> {
        let bitmap = self.find(at)?;
        bitmap.check(Checks::NotReadonly)?;
        if bitmap.is_enabled {
            let name = at.1.clone();
            return Err(BitmapError::Recording { name });
        }
        bitmap.held = Some(BusyWith::Reader);
        Ok(bitmap.dirty.clone())
    }

    pub(crate) fn hold(&mut self, at: &At) -> Answer {
        let bitmap = self.find(at)?;
        bitmap.check(Checks::All)?;
        bitmap.held = Some(BusyWith::Holder);
        Ok(())
    }

    pub(crate) fn mark_readonly(&mut self, at: &At, is_readonly: bool) -> Answer {
        let bitmap = self.find(at)?;
        if let Some(with @ (BusyWith::Transaction | BusyWith::Resize)) = bitmap.held {
            let name = at.1.clone();
            return Err(BitmapError::Busy { name, with });
        }
        if !bitmap.is_persistent {
            let name = at.1.clone();
            return Err(BitmapError::NotPersistent { name });
        }
        bitmap.is_readonly = is_readonly;
        Ok(())
    }

    /// A job records from now on, in a bitmap of that number.
    pub(crate) fn track(&mut self, disk: usize, granule: u64) -> u64 {
        let disk = &mut self.disks[disk];
        disk.made += 1;
        disk.jobs.push((disk.made, granule, Dirty::new()));
        disk.made
    }

    /// A guest write has settled.
    pub(crate) fn record(&mut self, disk: usize, range: Range<u64>) {
        let disk = &mut self.disks[disk];
        let range = range.start..range.end.min(disk.len);
        for bitmap in &mut disk.bitmaps {
            if let Some((dirty, true)) = &mut bitmap.successor {
                set(dirty, bitmap.granule, range.clone());
            }
            if bitmap.is_enabled {
                set(&mut bitmap.dirty, bitmap.granule, range.clone());
            }
        }
        for (_, granule, dirty) in &mut disk.jobs {
            set(dirty, *granule, range.clone());
        }
    }

    /// A transaction was prepared that has touched those. What it will take to undo it.
    pub(crate) fn open(&mut self, before: Twin, touched: &[At], renamed: Vec<At>) -> Opened {
        for at in touched {
            self.find(at).unwrap().held = Some(BusyWith::Transaction);
        }
        for (disk, name) in &renamed {
            self.disks[*disk].promised.push(name.clone());
        }
        let before = before.disks.into_iter().map(|disk| disk.bitmaps);
        let mut changed = Vec::new();
        for (index, (disk, before)) in self.disks.iter().zip(before).enumerate() {
            for bitmap in &disk.bitmaps {
                let was = before.iter().find(|was| was.id == bitmap.id);
                if was != Some(bitmap) {
                    changed.push((index, bitmap.id, was.cloned()));
                }
            }
        }
        Opened { changed, renamed }
    }

    /// It is committed, or undone.
    pub(crate) fn close(&mut self, opened: Opened, is_committed: bool) {
        for (disk, name) in opened.renamed {
            let promised = &mut self.disks[disk].promised;
            let index = promised.iter().position(|known| *known == name);
            promised.remove(index.unwrap());
        }
        for (disk, id, was) in opened.changed {
            let bitmaps = &mut self.disks[disk].bitmaps;
            let index = bitmaps.iter().position(|bitmap| bitmap.id == id).unwrap();
            let bitmap = &mut bitmaps[index];
            match was {
                _ if is_committed && bitmap.is_leaving => drop(bitmaps.remove(index)),
                _ if is_committed => bitmap.held = None,
                // Others may have taken it back from where it was handed over to.
                Some(was) => {
                    *bitmap = Bitmap {
                        is_skipped: bitmap.is_skipped,
                        ..was
                    }
                }
                None => drop(bitmaps.remove(index)),
            }
        }
    }

    /// An act of a transaction that is open.
    pub(crate) fn act(&mut self, verb: &Verb, touched: &mut Vec<At>) -> Answer {
        if let Verb::Remove(at) = verb {
            let bitmap = self.find(at)?;
            bitmap.check(Checks::NotInconsistent)?;
            bitmap.held = Some(BusyWith::Transaction);
            bitmap.is_leaving = true;
            return Ok(());
        }
        self.ask(verb)?;
        match verb {
            Verb::Rename((disk, old), new) => {
                for at in touched.iter_mut().filter(|at| *at == &(*disk, old.clone())) {
                    at.1.clone_from(new);
                }
                touched.push((*disk, new.clone()));
            }
            Verb::Add(at, ..)
            | Verb::Clear(at)
            | Verb::Enable(at)
            | Verb::Disable(at)
            | Verb::Merge(at, _)
            | Verb::Remove(at) => touched.push(at.clone()),
        }
        Ok(())
    }
}

impl Disk {
    fn find(&mut self, name: &str) -> Answer<&mut Bitmap> {
        let found = self.bitmaps.iter_mut().find(|bitmap| bitmap.name == name);
        let name = name.to_owned();
        found.ok_or(BitmapError::NotFound { name })
    }

    fn check_name(&self, name: &str, is_persistent: bool, others: usize) -> Answer {
        if is_persistent {
            let why = match self.storage {
                None => Some(CannotPersist::NoStorage),
                Some(max) if others >= max => Some(CannotPersist::TooMany { max }),
                // What storage says of a name comes before what the node says.
                Some(_) => (name.len() > 1023).then_some(CannotPersist::NameTooLong { max: 1023 }),
            };
            if let Some(why) = why {
                let name = name.to_owned();
                return Err(BitmapError::CannotPersist { name, why });
            }
        }
        self.check_free(name)?;
        if name.len() > 1023 {
            let bytes = name.len();
            return Err(BitmapError::NameTooLong { bytes });
        }
        Ok(())
    }

    /// Whether nobody has that name, nor may get it back.
    pub(crate) fn check_free(&self, name: &str) -> Answer {
        let name = name.to_owned();
        if self.bitmaps.iter().any(|bitmap| bitmap.name == name) {
            return Err(BitmapError::NameExists { name });
        }
        if self.promised.contains(&name) {
            let with = BusyWith::Transaction;
            return Err(BitmapError::Busy { name, with });
        }
        Ok(())
    }

    pub(crate) fn push(&mut self, bitmap: Bitmap) {
        self.made += 1;
        let id = self.made;
        self.bitmaps.push(Bitmap { id, ..bitmap });
    }

    /// Whether it may have another length: operations hinder it before read-only bitmaps do.
    pub(crate) fn check_resize(&self) -> Answer {
        if !self.jobs.is_empty() {
            let with = BusyWith::Job;
            return Err(BitmapError::NodeBusy { with });
        }
        for bitmap in &self.bitmaps {
            bitmap.check_use()?;
        }
        let checked = self
            .bitmaps
            .iter()
            .map(|bitmap| bitmap.check(Checks::NotInconsistent));
        checked.collect()
    }

    pub(crate) fn resize(&mut self, len: u64, grown: Grown) {
        let old_len = std::mem::replace(&mut self.len, len);
        for bitmap in &mut self.bitmaps {
            bitmap
                .dirty
                .retain(|granule| granule * bitmap.granule < len);
            if bitmap.is_enabled && grown == Grown::Dirty {
                set(&mut bitmap.dirty, bitmap.granule, old_len..len);
            }
        }
    }

    fn persistent(&self) -> usize {
        let persistent = self.bitmaps.iter().filter(|bitmap| bitmap.is_persistent);
        persistent.count()
    }

    fn add(&mut self, name: &str, options: &BitmapOptions, is_enabled: bool) -> Answer {
        if name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        let granularity = options.granularity();
        if !(512..=1 << 31).contains(&granularity.bytes()) {
            return Err(BitmapError::BadGranularity(granularity));
        }
        self.check_name(name, options.persistent, self.persistent())?;
        let mut bitmap = Bitmap::new(name, granularity.bytes());
        bitmap.is_enabled = is_enabled;
        bitmap.is_persistent = options.persistent;
        self.push(bitmap);
        Ok(())
    }

    fn rename(&mut self, name: &str, new_name: &str) -> Answer {
        if new_name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        let bitmap = self.find(name)?;
        bitmap.check(Checks::All)?;
        let is_persistent = bitmap.is_persistent;
        let others = self.persistent() - usize::from(is_persistent);
        self.check_name(new_name, is_persistent, others)?;
        new_name.clone_into(&mut self.find(name)?.name);
        Ok(())
    }
}

impl Bitmap {
    pub(crate) fn new(name: &str, granule: u64) -> Self {
        Self {
            id: 0,
            name: name.to_owned(),
            granule,
            dirty: Dirty::new(),
            is_enabled: false,
            is_persistent: false,
            is_readonly: false,
            is_skipped: false,
            is_inconsistent: false,
            held: None,
            successor: None,
            is_leaving: false,
        }
    }

    fn check(&self, checks: Checks) -> Answer {
        let name = || self.name.clone();
        if let Some(with) = self.held {
            return Err(BitmapError::Busy { name: name(), with });
        }
        if checks != Checks::NotReadonly && self.is_readonly {
            return Err(BitmapError::ReadOnly { name: name() });
        }
        if checks != Checks::NotInconsistent && self.is_inconsistent {
            return Err(BitmapError::Inconsistent { name: name() });
        }
        Ok(())
    }

    /// That nobody has it.
    fn check_use(&self) -> Answer {
        match self.held {
            Some(with) => Err(BitmapError::Busy {
                name: self.name.clone(),
                with,
            }),
            None => Ok(()),
        }
    }

    /// Whether it would be stored now.
    pub(crate) fn will_be_stored(&self) -> bool {
        let is_left_out = self.is_skipped || self.held == Some(BusyWith::Holder);
        self.is_persistent && !is_left_out && !self.is_readonly && !self.is_inconsistent
    }

    /// Compares with what a query tells.
    pub(crate) fn assert_is(&self, info: &BitmapInfo, len: u64) {
        let successor = self.successor.as_ref();
        assert_eq!(self.name, info.name);
        assert_eq!(len, info.len);
        assert_eq!(self.granule, info.granularity.bytes());
        assert_eq!(
            self.dirty.len() as u64 * self.granule,
            info.dirty_bytes,
            "{info:?}"
        );
        assert_eq!(
            successor.map(|(dirty, _)| dirty.len() as u64 * self.granule),
            info.successor_dirty_bytes,
            "{info:?}"
        );
        let is_recording = self.is_enabled || successor.is_some_and(|(_, is_enabled)| *is_enabled);
        assert_eq!(is_recording, info.is_recording, "{info:?}");
        assert_eq!(self.held, info.busy_with, "{info:?}");
        assert_eq!(self.held.is_some(), info.is_busy());
        assert_eq!(self.is_persistent, info.is_persistent, "{info:?}");
        assert_eq!(self.is_readonly, info.is_readonly, "{info:?}");
        assert_eq!(self.is_inconsistent, info.is_inconsistent, "{info:?}");
    }
}

/// Rounds outward.
fn set(dirty: &mut Dirty, granule: u64, range: Range<u64>) {
    if range.start < range.end {
        dirty.extend(range.start / granule..=(range.end - 1) / granule);
    }
}

/// What is dirty in a real one.
pub(crate) fn granules(bits: &HBitmap) -> Dirty {
    let granule = bits.granularity().bytes();
    bits.iter().map(|start| start / granule).collect()
}

pub(crate) fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}
