//! What each record changes.

use std::rc::Rc;

use block_io::BlockDevice;

use super::{Damage, Effects, Missing, State, Stop, inode_key, write_name};
use crate::entry::Entry;
use crate::file_core::FileCore;
use crate::inode::{Flags, Inode};
use crate::record::{PinRecord, Record, VolumeRecord};
use crate::tree::codec::Kind as TreeKind;
use crate::tree::leaf::MapLeaf;
use crate::tree::node::{Body, Child, FANOUT};
use crate::tree::radix::{Look, Tree};
use crate::units::{FileId, MAX_FILE, SUB_CLUSTER, SUBS, SubMask, VolumeIndex};
use crate::volume::VolumeCore;
use crate::wire::Writer;

/// Clusters of a page of a map.
const PAGE: u64 = FANOUT as u64;
/// Clusters of the largest file.
const MAX_CLUSTERS: u64 = MAX_FILE / crate::units::CLUSTER;

impl<V: BlockDevice> State<V> {
    /// Looks at everything that [`Self::apply`] needs for this record.
    pub(crate) fn prepare(&self, record: &Record) -> Result<(), Stop> {
        match record {
            Record::Map {
                file,
                first,
                count,
                entry,
                ..
            } => self.prepare_map(*file, u64::from(*first), u64::from(*count), *entry),
            Record::Clear {
                file, first, count, ..
            } => {
                let file = self.file(*file)?;
                let end = first.saturating_add(*count).div_ceil(SUBS.into());
                self.prepare_free(&file, first / u64::from(SUBS), end)
            }
            Record::Create { inode } => self.prepare_create(inode),
            Record::Unlink { file } => self.prepare_unlink(*file),
            Record::Link {
                file,
                directory,
                name,
            } => {
                self.prepare_name(*directory, name)?;
                if let Some(file) = self.find_file(*file)? {
                    self.prepare_unname(&file)?;
                    self.orphans.ensure(inode_key(file.id))?;
                }
                Ok(())
            }
            Record::Attributes { file, .. }
            | Record::Identity { file, .. }
            | Record::Resize { file, .. }
            | Record::Freeze { file, .. } => self.file(*file).map(|_| ()),
            Record::Absorb { parent, .. } => {
                self.file(*parent)?;
                Ok(self.orphans.ensure(inode_key(*parent))?)
            }
            Record::AbsorbChild { parent, first } => {
                let (parent, child) = self.absorption(*parent)?;
                for map in [parent.map(), child.map()].into_iter().flatten() {
                    map.look_above(u64::from(*first), 0)?;
                }
                Ok(())
            }
            Record::AbsorbLeaf { parent, first, .. } => self.prepare_absorb_leaf(*parent, u64::from(*first)),
            Record::Absorbed { parent, .. } => self.prepare_absorbed(*parent),
            Record::Reap { file, first, count } => {
                let file = self.file(*file)?;
                let first = u64::from(*first);
                self.prepare_free(&file, first, first + u64::from(*count))
            }
            Record::Reaped { file } => {
                self.file(*file)?;
                self.orphans.ensure(inode_key(*file))?;
                self.prepare_forget(*file)
            }
            Record::Volume(volume) => {
                self.volume_table.ensure(volume.index.0.into())?;
                match self.volumes.borrow().get(&volume.index) {
                    Some(known) => Ok(known.count_free()?),
                    None => Ok(self.device_of(volume).map(|_| ())?),
                }
            }
            Record::NoVolume { volume } => {
                let record = self.volume(*volume)?.record();
                self.volume_table.ensure(volume.0.into())?;
                self.objects.look(record.bitmap)?;
                self.objects.look(record.sums)?;
                Ok(self.volume(*volume)?.sums.ensure_inner()?)
            }
            Record::MendInode { .. }
            | Record::MendOrphan { .. }
            | Record::MendName(_)
            | Record::MendBits { .. }
            | Record::MendObject { .. } => self.prepare_mend(record),
            Record::Pin(PinRecord { pin, .. }) | Record::Unpin { pin } => Ok(self.pin_table.ensure(*pin)?),
            Record::Unchecked { volume, page } => {
                let volume = self.volume(*volume)?;
                // Only a replay looks into the page.
                if !self.replaying.get() {
                    return Ok(());
                }
                volume.sums.look(u64::from(*page) << TreeKind::Sums.leaf_bits())?;
                Ok(())
            }
        }
    }

    /// Changes the state.
    pub(crate) fn apply(&self, record: &Record, effects: &mut Effects) -> Result<(), Stop> {
        match record {
            Record::Map {
                file,
                first,
                count,
                entry,
                moved,
            } => {
                let file = self.file(*file)?;
                let (first, count) = (u64::from(*first), u64::from(*count));
                self.map(&file, first, count, *entry, *moved, effects)?;
                if *moved {
                    file.change(|inode| inode.placement += 1);
                }
                Ok(())
            }
            Record::Clear {
                file,
                first,
                count,
                zero,
            } => {
                let file = self.file(*file)?;
                self.clear(&file, *first, first.saturating_add(*count), *zero, effects)
            }
            Record::Create { inode } => self.create(inode, effects),
            Record::Unlink { file } => self.unlink(*file, effects),
            Record::Link {
                file,
                directory,
                name,
            } => self.link(*file, *directory, name),
            Record::Attributes { file, attributes } => {
                let file = self.file(*file)?;
                file.change(|inode| inode.attributes = attributes.clone());
                Ok(())
            }
            Record::Identity { file, identity } => {
                let file = self.file(*file)?;
                file.change(|inode| inode.identity = Some(*identity));
                Ok(())
            }
            Record::Resize { file, size } => {
                if *size > MAX_FILE {
                    return Err(Damage::new(file, "gets a size that no file has").into());
                }
                let file = self.file(*file)?;
                file.change(|inode| inode.size = *size);
                Ok(())
            }
            Record::Freeze { file, frozen } => {
                let file = self.file(*file)?;
                file.change(|inode| inode.flags.set(Flags::FROZEN, *frozen));
                Ok(())
            }
            Record::Absorb { parent, named } => {
                let parent = self.file(*parent)?;
                parent.change(|inode| {
                    inode.flags.set(Flags::ABSORBED, true);
                    inode.flags.set(Flags::GIVES_NAME, *named);
                });
                effects.orphans = true;
                self.add_orphan(parent.id)
            }
            Record::AbsorbChild { parent, first } => self.absorb_child(*parent, u64::from(*first), effects),
            Record::AbsorbLeaf { parent, first, keep } => {
                self.absorb_leaf(*parent, u64::from(*first), keep, effects)
            }
            Record::Absorbed { parent, named } => self.absorbed(*parent, *named, effects),
            Record::Reap { file, first, count } => {
                let file = self.file(*file)?;
                let first = u64::from(*first) * u64::from(SUBS);
                let end = first + u64::from(*count) * u64::from(SUBS);
                self.reap(&file, first, end, effects)
            }
            Record::Reaped { file } => self.reaped(*file),
            Record::MendInode { .. }
            | Record::MendOrphan { .. }
            | Record::MendName(_)
            | Record::MendBits { .. }
            | Record::MendObject { .. } => self.mend(record),
            Record::Volume(record) => self.put_volume(record),
            Record::NoVolume { volume } => self.drop_volume(*volume),
            Record::Pin(pin) => {
                let mut writer = Writer::default();
                pin.encode(&mut writer);
                let _one = self.pin_table.put(&self.pages, pin.pin, &writer.0, |_| true)?;
                self.pins.borrow_mut().insert(pin.pin, *pin);
                self.note_id(pin.pin);
                Ok(())
            }
            Record::Unpin { pin } => {
                self.pin_table.remove(&self.pages, *pin, |_| true)?;
                self.pins.borrow_mut().remove(pin);
                Ok(())
            }
            Record::Unchecked { volume, page } => {
                // What was computed since is known, unless memory was lost.
                if !self.replaying.get() {
                    return Ok(());
                }
                let volume = self.volume(*volume)?;
                let first = u64::from(*page) << TreeKind::Sums.leaf_bits();
                volume.sums.change(&self.pages, first, |body| {
                    if let Body::Sums(sums) = body {
                        sums.fill(0);
                    }
                })?;
                Ok(())
            }
        }
    }

    /// The map of a file.
    pub(super) fn map_of(file: &FileCore) -> Result<&Tree, Damage> {
        let damage = || Damage::new(file.id, "is taken for a file and is a directory");
        file.map().ok_or_else(damage)
    }

    fn prepare_create(&self, inode: &Inode) -> Result<(), Stop> {
        if inode.flags.has(Flags::DYING) {
            self.orphans.ensure(inode_key(inode.id))?;
        } else {
            self.prepare_name(inode.directory, &inode.name)?;
        }
        if let Some(parent) = inode.parent {
            let parent = self.file(parent)?;
            let first = parent.inode.borrow().first_child;
            if let Some(first) = first {
                self.file(first)?;
            }
        }
        Ok(())
    }

    fn create(&self, inode: &Inode, effects: &mut Effects) -> Result<(), Stop> {
        self.note_id(inode.id.0);
        if self.find_file(inode.id)?.is_some() {
            return Err(Damage::new(inode.id, "is made a second time").into());
        }
        let file = Rc::new(FileCore::new(inode.clone(), None));
        file.dirty.set(true);
        file.change(|inode| {
            inode.next_sibling = None;
            inode.previous_sibling = None;
            inode.first_child = None;
            inode.children = 0;
        });
        if let Some(parent) = inode.parent {
            let parent = self.file(parent)?;
            parent.change(|inode| inode.flags.set(Flags::FROZEN, true));
            self.adopt(&parent, &file)?;
        }
        self.files.borrow_mut().insert(inode.id, Rc::clone(&file));
        if inode.flags.has(Flags::DYING) {
            effects.orphans = true;
            self.add_orphan(inode.id)
        } else {
            self.name(&file, inode.directory, &inode.name)
        }
    }

    fn link(&self, id: FileId, directory: FileId, name: &str) -> Result<(), Stop> {
        let file = self.file(id)?;
        let linked = file.inode.borrow().is_linked();
        if linked {
            self.unname(&file)?;
        } else {
            file.change(|inode| {
                inode.flags.set(Flags::DYING, false);
                inode.flags.set(Flags::UNLINKED, false);
            });
            self.remove_orphan(id)?;
        }
        self.name(&file, directory, name)
    }

    fn prepare_name(&self, directory: FileId, name: &str) -> Result<(), Stop> {
        if let Some(directory) = self.find_file(directory)?
            && let Some(names) = directory.names()
        {
            names.ensure(self.name_key(name))?;
        }
        Ok(())
    }

    pub(super) fn prepare_unname(&self, file: &FileCore) -> Result<(), Stop> {
        let (directory, name) = {
            let inode = file.inode.borrow();
            (inode.directory, inode.name.clone())
        };
        self.prepare_name(directory, &name)
    }

    /// Gives a file a name in a directory.
    pub(super) fn name(&self, file: &FileCore, directory: FileId, name: &str) -> Result<(), Stop> {
        let home = self.file(directory)?;
        if self.lookup(&home, name)?.is_some() {
            return Err(Damage::new(directory, format!("gets a second entry {name}")).into());
        }
        let kind = file.inode.borrow().kind;
        if let Some(names) = home.names() {
            let put = names.put(
                &self.pages,
                self.name_key(name),
                &write_name(file.id, kind, name),
                |_| false,
            )?;
            if put.is_err() {
                return Err(Damage::new(directory, "has too many names with one hash").into());
            }
        }
        home.change(|inode| inode.size += 1);
        file.change(|inode| {
            inode.directory = directory;
            name.clone_into(&mut inode.name);
        });
        Ok(())
    }

    /// Takes a file's name.
    pub(super) fn unname(&self, file: &FileCore) -> Result<(), Stop> {
        let (directory, name) = {
            let inode = file.inode.borrow();
            (inode.directory, inode.name.clone())
        };
        let home = self.file(directory)?;
        let removed = match home.names() {
            Some(names) => names.remove(&self.pages, self.name_key(&name), |data| {
                super::is_name(data, &name)
            })?,
            None => false,
        };
        if !removed {
            return Err(Damage::new(file.id, "is not in its directory").into());
        }
        home.change(|inode| inode.size = inode.size.saturating_sub(1));
        Ok(())
    }

    pub(super) fn add_orphan(&self, id: FileId) -> Result<(), Stop> {
        let _one = self.orphans.put(&self.pages, inode_key(id), &[], |_| true)?;
        Ok(())
    }

    pub(super) fn remove_orphan(&self, id: FileId) -> Result<(), Stop> {
        self.orphans.remove(&self.pages, inode_key(id), |_| true)?;
        Ok(())
    }

    pub(super) fn prepare_forget(&self, id: FileId) -> Result<(), Stop> {
        self.inodes.ensure(inode_key(id))?;
        self.objects.look(id.0)?;
        Ok(())
    }

    /// An inode is no more.
    pub(super) fn forget(&self, id: FileId) -> Result<(), Stop> {
        self.inodes.remove(&self.pages, inode_key(id), |_| true)?;
        self.set_object(id.0, None)?;
        if let Some(file) = self.files.borrow_mut().remove(&id) {
            file.dirty.set(false);
        }
        Ok(())
    }

    fn reaped(&self, id: FileId) -> Result<(), Stop> {
        let file = self.file(id)?;
        if !Self::map_of(&file)?.is_empty() {
            return Err(Damage::new(id, "goes with clusters").into());
        }
        self.remove_orphan(id)?;
        self.forget(id)
    }

    fn put_volume(&self, record: &VolumeRecord) -> Result<(), Stop> {
        let known = self.volumes.borrow().get(&record.index).map(Rc::clone);
        match known {
            Some(volume) => volume.set_record(record.clone())?,
            None => {
                let device = self.device_of(record)?;
                let volume = Rc::new(VolumeCore::blank(record.clone(), device));
                self.volumes.borrow_mut().insert(record.index, volume);
            }
        }
        self.note_id(record.bitmap.max(record.sums));
        let mut writer = Writer::default();
        record.encode(&mut writer);
        let _one = self
            .volume_table
            .put(&self.pages, record.index.0.into(), &writer.0, |_| true)?;
        Ok(())
    }

    fn drop_volume(&self, index: VolumeIndex) -> Result<(), Stop> {
        let volume: Rc<VolumeCore<V>> = self.volume(index)?;
        if !volume.bitmap.is_empty() {
            return Err(Damage::new(index, "goes with clusters in use").into());
        }
        let record = volume.record();
        volume.sums.drop_pages(&self.pages);
        self.set_object(record.bitmap, None)?;
        self.set_object(record.sums, None)?;
        self.volume_table.remove(&self.pages, index.0.into(), |_| true)?;
        self.volumes.borrow_mut().remove(&index);
        // What open files have written there lies elsewhere by now, and the next volume may get the number.
        for file in self.files.borrow().values() {
            file.written.borrow_mut().remove(&index);
        }
        Ok(())
    }
}

/// Sub-clusters `first..end` cut at clusters: cluster and mask.
pub(crate) fn clusters_of(first: u64, end: u64) -> impl Iterator<Item = (u64, SubMask)> {
    let subs = u64::from(SUBS);
    (first / subs..end.div_ceil(subs)).map(move |cluster| {
        let start = first.saturating_sub(cluster * subs) * SUB_CLUSTER;
        let stop = (end - cluster * subs).min(subs) * SUB_CLUSTER;
        (cluster, SubMask::inside(start, stop))
    })
}

/// The leaf with this cluster as entries; none if it has no page and is not needed.
pub(crate) fn entries_of(map: &Tree, first: u64) -> Result<[Entry; FANOUT], Missing> {
    Ok(match map.look(first)? {
        Look::Empty => [Entry::HOLE; FANOUT],
        Look::Run(entry) => std::array::from_fn(|number| entry.nth(number as u64)),
        Look::Leaf(node) => match &*node.body.borrow() {
            Body::Map(leaf) => leaf.entries(),
            _ => [Entry::HOLE; FANOUT],
        },
    })
}

pub(super) fn check_range(file: FileId, first: u64, end: u64) -> Result<(), Damage> {
    if end > MAX_CLUSTERS || first > end {
        return Err(Damage::new(file, "gets clusters behind the end of all files"));
    }
    Ok(())
}

/// Puts entries as a whole leaf: a page only if they are not uniform.
pub(super) fn leaf_child<V: BlockDevice>(state: &State<V>, entries: &[Entry; FANOUT]) -> Child {
    let first = entries[0];
    if (0_u64..)
        .zip(entries)
        .all(|(number, entry)| first.continues(*entry, number))
    {
        return if first.is_hole() {
            Child::Empty
        } else {
            Child::Run(first)
        };
    }
    Child::Loaded(state.pages.created(0, Body::Map(MapLeaf::of(entries))))
}

pub(super) const MAP_PAGE: u64 = PAGE;
