//! All metadata, as the records so far have made them.
//!
//! [`State`] is changed by [`State::apply`] alone, when something happens and when the journal is replayed, so what a replay makes is what
//! there was. Nothing here waits: a look into a page that is not in memory gives [`Stop::Missing`], and who asked loads it and asks
//! again. [`State::prepare`] looks at everything that `apply` will need, so that a transaction of several records is made wholly or
//! not at all.
//!
//! ```text
//!   object table ──┬─ inodes       table: number → inode
//!                  ├─ volumes      table: number → volume
//!                  ├─ orphans      table: files that are being made, deleted, absorbed, or wait for it
//!                  ├─ pins         table
//!                  ├─ a directory  table: name → number
//!                  ├─ a file       map
//!                  └─ a volume's   bitmap, checksums
//! ```

mod apply;
mod layers;
mod mend;
mod sorted;
mod space;

pub(crate) use apply::{clusters_of, entries_of};
pub(crate) use layers::absorb_copies;
pub(crate) use sorted::Sorted;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::BlockDevice;
use smallvec::SmallVec;

use crate::entry::Entry;
use crate::error::FsError;
use crate::failed_volume::Added;
use crate::file_core::FileCore;
use crate::hash::siphash;
use crate::inode::{Inode, Kind};
use crate::record::{PinRecord, VolumeRecord};
use crate::tree::codec::Kind as TreeKind;
use crate::tree::node::{Body, FANOUT, Missing, Pages, Root};
use crate::tree::radix::{Look, Tree};
use crate::tree::table::Table;
use crate::units::{CLUSTER, FileId, Location, MAX_ID, VolumeIndex};
use crate::volume::VolumeCore;
use crate::wire::{Malformed, Reader, Writer};

/// Objects with a fixed number.
pub(crate) const INODES: u64 = 1;
pub(crate) const VOLUMES: u64 = 2;
pub(crate) const ORPHANS: u64 = 3;
pub(crate) const PINS: u64 = 4;
/// The root directory.
pub(crate) const ROOT: FileId = FileId(16);
/// The first number that is given to something new.
const FIRST: u64 = 17;

/// Metadata contradict each other, or are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {problem}")]
pub struct Damage {
    /// What is damaged.
    pub object: String,
    /// How.
    pub problem: String,
}

impl Damage {
    pub(crate) fn new(object: impl ToString, problem: impl ToString) -> Self {
        Self {
            object: object.to_string(),
            problem: problem.to_string(),
        }
    }
}

/// Why something could not be done at once.
#[derive(Debug, Clone)]
pub(crate) enum Stop {
    /// A page is not in memory.
    Missing(Missing),
    /// It cannot be done.
    Damaged(Damage),
}

impl Stop {
    /// What it means where all was looked at before, so that nothing can be missing.
    pub(crate) fn left_out(self) -> FsError {
        match self {
            Self::Damaged(damage) => damage.into(),
            Self::Missing(missing) => {
                let problem = format!("block {} is missing after it was loaded", missing.ptr.block);
                Damage::new("the metadata volume", problem).into()
            }
        }
    }
}

impl From<Missing> for Stop {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

impl From<Damage> for Stop {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

/// What applying records leads to beside the state itself.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Runs of clusters that no map has any more.
    pub(crate) freed: Vec<(Location, u64)>,
    /// There may be something to do in the background: files to reap or to absorb.
    pub(crate) orphans: bool,
    /// Something that ancestors of other files have is elsewhere now.
    pub(crate) moved: bool,
    /// What the records made valid, in their order; only if it is asked for.
    pub(crate) added: SmallVec<[Added; 1]>,
    notes_added: bool,
}

impl Effects {
    /// Of records that are not in the journal yet: what they make valid is noted, as it may have to be taken back.
    pub(crate) fn of_new() -> Self {
        Self {
            notes_added: true,
            ..Self::default()
        }
    }

    /// An entry of a file's map changes by the record whose notes begin at `begin`.
    fn note(&mut self, begin: usize, file: FileId, cluster: u64, old: Entry, new: Entry) {
        let cluster = u32::try_from(cluster).unwrap_or(u32::MAX);
        let Some(added) = Added::of(file, cluster, old, new) else {
            return;
        };
        let last = self.added.get_mut(begin..).and_then(<[Added]>::last_mut);
        if !last.is_some_and(|last| last.take(&added)) {
            self.added.push(added);
        }
    }

    /// The map of a file changes.
    fn map_changes(&mut self, file: &FileCore) {
        if file.inode.borrow().children > 0 {
            file.moves.set(file.moves.get() + 1);
            self.moved = true;
        }
    }

    fn freed(&mut self, at: Location) {
        if let Some((first, count)) = self.freed.last_mut()
            && first.plus(*count) == at
        {
            *count += 1;
            return;
        }
        self.freed.push((at, 1));
    }
}

/// All metadata.
#[derive(Debug)]
pub(crate) struct State<V> {
    pub(crate) pages: Pages,
    pub(crate) objects: Tree,
    pub(crate) inodes: Table,
    volume_table: Table,
    pub(crate) orphans: Table,
    pin_table: Table,
    pub(crate) volumes: RefCell<BTreeMap<VolumeIndex, Rc<VolumeCore<V>>>>,
    pub(crate) pins: RefCell<BTreeMap<u64, PinRecord>>,
    pub(crate) files: RefCell<BTreeMap<FileId, Rc<FileCore>>>,
    next_id: Cell<u64>,
    /// Keys the hashes of names.
    pub(crate) seed: u64,
    /// Devices of volumes, by identity, as the opener gave them.
    pub(crate) given: RefCell<BTreeMap<[u8; 16], Rc<V>>>,
    /// Records are applied that were applied before.
    pub(crate) replaying: Cell<bool>,
}

/// The key of an inode in its table.
pub(crate) fn inode_key(id: FileId) -> u64 {
    id.0.swap_bytes()
}

impl<V: BlockDevice> State<V> {
    /// An empty file system.
    pub(crate) fn blank(seed: u64, given: BTreeMap<[u8; 16], Rc<V>>) -> Self {
        let state = Self::from_roots(Tree::new(TreeKind::Objects), |_| None, FIRST, seed, given);
        let root = FileCore::new(Inode::new(ROOT, Kind::Directory, ROOT, ""), None);
        root.dirty.set(true);
        state.files.borrow_mut().insert(ROOT, Rc::new(root));
        state
    }

    fn from_roots(
        objects: Tree,
        root: impl Fn(u64) -> Option<Root>,
        next_id: u64,
        seed: u64,
        given: BTreeMap<[u8; 16], Rc<V>>,
    ) -> Self {
        let table = |id| root(id).map_or_else(Table::new, Table::from_root);
        Self {
            pages: Pages::default(),
            inodes: table(INODES),
            volume_table: table(VOLUMES),
            orphans: table(ORPHANS),
            pin_table: table(PINS),
            objects,
            volumes: RefCell::default(),
            pins: RefCell::default(),
            files: RefCell::default(),
            next_id: Cell::new(next_id),
            seed,
            given: RefCell::new(given),
            replaying: Cell::new(false),
        }
    }

    /// The state of a checkpoint: with `objects`, and what [`Self::load_tables`] still has to load.
    pub(crate) fn of_checkpoint(
        objects: &Tree,
        next_id: u64,
        seed: u64,
        given: BTreeMap<[u8; 16], Rc<V>>,
    ) -> Result<Self, Stop> {
        let roots = object_roots(objects, 0)?;
        let root = |id: u64| roots.get(usize::try_from(id).ok()?)?.clone();
        Ok(Self::from_roots(
            Tree::from_root(objects.to_root()),
            root,
            next_id,
            seed,
            given,
        ))
    }

    /// Volumes and pins, which are always in memory.
    pub(crate) fn load_tables(&self) -> Result<(), Stop> {
        let mut from = Some(0);
        while let Some(key) = from {
            let (items, next) = self.volume_table.scan(key)?;
            for item in items {
                let record = read_item(&item.data, VolumeRecord::decode, "the table of volumes")?;
                self.load_volume(record)?;
            }
            from = next;
        }
        from = Some(0);
        while let Some(key) = from {
            let (items, next) = self.pin_table.scan(key)?;
            for item in items {
                let pin = read_item(&item.data, PinRecord::decode, "the table of pins")?;
                self.pins.borrow_mut().insert(pin.pin, pin);
            }
            from = next;
        }
        Ok(())
    }

    fn load_volume(&self, record: VolumeRecord) -> Result<(), Stop> {
        let known = self.volumes.borrow().get(&record.index).map(Rc::clone);
        if let Some(known) = known {
            return Ok(known.count_free_once()?);
        }
        let tree = |id, kind| -> Result<Tree, Stop> {
            match self.object(id)? {
                Some(root) if root.kind == kind => Ok(Tree::from_root(root)),
                // Taken for an empty one, everything on the volume would be free.
                _ => {
                    let problem =
                        format!("object {id}, its bitmap or its checksums, is missing or another kind");
                    Err(Damage::new(format!("volume {}", record.name), problem).into())
                }
            }
        };
        let bitmap = tree(record.bitmap, TreeKind::Bits)?;
        let sums = tree(record.sums, TreeKind::Sums)?;
        let device = self.device_of(&record)?;
        let volume = Rc::new(VolumeCore::new(record, device, bitmap, sums));
        // Kept also if pages are missing: they are loaded into these trees, and looked for in them when this is called again.
        self.volumes.borrow_mut().insert(volume.index, Rc::clone(&volume));
        Ok(volume.count_free_once()?)
    }

    fn device_of(&self, record: &VolumeRecord) -> Result<Rc<V>, Damage> {
        let damage = |problem| Damage::new(format!("volume {}", record.name), problem);
        let volumes = self.volumes.borrow();
        if volumes
            .values()
            .any(|known| known.record().uuid == record.uuid && known.index != record.index)
        {
            return Err(damage("is in the file system twice"));
        }
        let device = self.given.borrow().get(&record.uuid).map(Rc::clone);
        let device = device.ok_or_else(|| {
            damage("is part of the file system and was not given: open with all its volumes")
        })?;
        if record.clusters > device.size() / CLUSTER {
            return Err(damage(
                "is smaller than what the file system uses of it: make it as large as it was",
            ));
        }
        Ok(device)
    }

    /// The slot of an object.
    pub(crate) fn object(&self, id: u64) -> Result<Option<Root>, Missing> {
        let slot = usize::try_from(id % FANOUT as u64).unwrap_or(0);
        Ok(object_roots(&self.objects, id)?.get(slot).cloned().flatten())
    }

    /// Puts the slot of an object.
    pub(crate) fn set_object(&self, id: u64, root: Option<Root>) -> Result<(), Missing> {
        let slot = usize::try_from(id % FANOUT as u64).unwrap_or(0);
        self.objects.change(&self.pages, id, |body| {
            if let Body::Objects(roots) = body {
                roots[slot] = root;
            }
        })
    }

    /// A number for something new.
    pub(crate) fn new_id(&self) -> Result<u64, Damage> {
        let id = self.next_id.get();
        if id >= MAX_ID {
            return Err(Damage::new("the file system", "has no numbers for files left"));
        }
        self.next_id.set(id + 1);
        Ok(id)
    }

    /// For tests of the check alone.
    pub(crate) fn set_next_id(&self, id: u64) {
        self.next_id.set(id);
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.get()
    }

    fn note_id(&self, id: u64) {
        self.next_id.set(self.next_id.get().max(id.saturating_add(1)));
    }

    /// The file or directory of this number.
    pub(crate) fn file(&self, id: FileId) -> Result<Rc<FileCore>, Stop> {
        if let Some(file) = self.files.borrow().get(&id) {
            return Ok(Rc::clone(file));
        }
        let data = self.inodes.get(inode_key(id), |_| true)?;
        let data = data.ok_or_else(|| Damage::new(id, "is named, and there is no such inode"))?;
        let inode = Inode::from_bytes(&data).map_err(|error| Damage::new(id, error))?;
        if inode.id != id {
            return Err(Damage::new(id, "its inode is another file's").into());
        }
        let root = self.object(id.0)?;
        let wanted = match inode.kind {
            Kind::File => TreeKind::Map,
            Kind::Directory => TreeKind::Table,
        };
        // Taken for an empty one, what it has would be lost without a word.
        if root.as_ref().is_none_or(|root| root.kind != wanted) {
            return Err(Damage::new(id, "its map or its names are missing or another kind").into());
        }
        let file = Rc::new(FileCore::new(inode, root));
        self.files.borrow_mut().insert(id, Rc::clone(&file));
        Ok(file)
    }

    /// As [`Self::file`], if there is one.
    pub(crate) fn find_file(&self, id: FileId) -> Result<Option<Rc<FileCore>>, Stop> {
        if !self.files.borrow().contains_key(&id) && self.inodes.get(inode_key(id), |_| true)?.is_none() {
            return Ok(None);
        }
        self.file(id).map(Some)
    }

    pub(crate) fn volume(&self, index: VolumeIndex) -> Result<Rc<VolumeCore<V>>, Damage> {
        let volume = self.volumes.borrow().get(&index).map(Rc::clone);
        volume.ok_or_else(|| Damage::new(index, "is in a map, and there is no such volume"))
    }

    /// The key of a name.
    pub(crate) fn name_key(&self, name: &str) -> u64 {
        siphash([self.seed, !self.seed], name.as_bytes())
    }

    /// The number that a name of a directory stands for.
    pub(crate) fn lookup(&self, directory: &FileCore, name: &str) -> Result<Option<FileId>, Stop> {
        let Some(names) = directory.names() else {
            return Err(Damage::new(directory.id, "is taken for a directory and is a file").into());
        };
        let found = names.get(self.name_key(name), |data| is_name(data, name))?;
        match found {
            Some(data) => {
                let (id, _) = read_name(&data).map_err(|error| Damage::new(directory.id, error))?;
                Ok(Some(id))
            }
            None => Ok(None),
        }
    }

    /// Puts what files in memory know into the tables: everything that a checkpoint is to have. All of it, or nothing but a page that
    /// is missing.
    pub(crate) fn gather(&self) -> Result<(), Missing> {
        let dirty: Vec<Rc<FileCore>> = {
            let files = self.files.borrow();
            files
                .values()
                .filter(|file| file.dirty.get())
                .map(Rc::clone)
                .collect()
        };
        for file in &dirty {
            self.inodes.ensure(inode_key(file.id))?;
            self.objects.look(file.id.0)?;
        }
        self.objects.look(0)?;
        for volume in self.volumes.borrow().values() {
            let record = volume.record();
            self.objects.look(record.bitmap)?;
            self.objects.look(record.sums)?;
        }
        for file in dirty {
            let bytes = file.inode.borrow().to_bytes();
            // A key of this table has one item, so it cannot be full.
            let _one = self
                .inodes
                .put(&self.pages, inode_key(file.id), &bytes, |_| true)?;
            self.set_object(file.id.0, Some(file.to_root()))?;
            file.dirty.set(false);
        }
        for volume in self.volumes.borrow().values() {
            let record = volume.record();
            self.set_object(record.bitmap, Some(volume.bitmap.to_root()))?;
            self.set_object(record.sums, Some(volume.sums.to_root()))?;
        }
        for (id, table) in self.tables() {
            self.set_object(id, Some(table.to_root()))?;
        }
        Ok(())
    }

    /// How many pages a checkpoint that began now would write, at most: those that are dirty, and those that [`Self::gather`] makes so.
    /// Count: takes the time to look which files are dirty.
    pub(crate) fn will_be_dirty(&self, count: bool) -> u64 {
        let files = self.files.borrow();
        let dirty = if count {
            files.values().filter(|file| file.dirty.get()).count()
        } else {
            files.len()
        };
        // Of each file a leaf of the table of inodes and one of the table of objects, and what is above them: a page for each of some.
        self.pages.dirtied() + dirty as u64 * 3 + self.volumes.borrow().len() as u64
    }

    fn tables(&self) -> [(u64, &Table); 4] {
        [
            (INODES, &self.inodes),
            (VOLUMES, &self.volume_table),
            (ORPHANS, &self.orphans),
            (PINS, &self.pin_table),
        ]
    }

    /// Numbers of orphans.
    pub(crate) fn orphan_ids(&self) -> Result<Vec<FileId>, Stop> {
        let mut ids = Vec::new();
        let mut from = Some(0);
        while let Some(key) = from {
            let (items, next) = self.orphans.scan(key)?;
            ids.extend(items.iter().map(|item| FileId(item.key.swap_bytes())));
            from = next;
        }
        Ok(ids)
    }
}

/// All roots of the page of the object table with this object.
fn object_roots(objects: &Tree, id: u64) -> Result<Vec<Option<Root>>, Missing> {
    Ok(match objects.look(id)? {
        Look::Leaf(node) => match &*node.body.borrow() {
            Body::Objects(roots) => roots.to_vec(),
            _ => Vec::new(),
        },
        Look::Empty | Look::Run(_) => Vec::new(),
    })
}

fn read_item<T>(
    data: &[u8],
    decode: impl FnOnce(&mut Reader<'_>) -> Result<T, Malformed>,
    object: &str,
) -> Result<T, Damage> {
    decode(&mut Reader(data)).map_err(|error| Damage::new(object, error))
}

/// An item of a directory.
pub(crate) fn write_name(id: FileId, kind: Kind, name: &str) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.u64(id.0);
    writer.u8(match kind {
        Kind::File => 1,
        Kind::Directory => 2,
    });
    writer.bytes(name.as_bytes());
    writer.0
}

/// Number and name of an item of a directory.
pub(crate) fn read_name(data: &[u8]) -> Result<(FileId, &str), Malformed> {
    let mut reader = Reader(data);
    let id = FileId(reader.u64()?);
    reader.u8()?;
    let name = std::str::from_utf8(reader.0).map_err(|_| Malformed("a name is not UTF-8"))?;
    Ok((id, name))
}

fn is_name(data: &[u8], name: &str) -> bool {
    data.get(9..) == Some(name.as_bytes())
}
