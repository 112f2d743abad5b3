//! Deliberate damage, for the tests of the check. Nothing else calls this.

use block_io::{BlockDevice, Clock};

use crate::core::Core;
use crate::entry::Entry;
use crate::error::FsError;
use crate::inode::{Flags, Inode, Kind};
use crate::open::FileSystem;
use crate::record::{NameMend, Record};
use crate::state::{Effects, State, write_name};
use crate::tree::node::{Body, Child};
use crate::units::{FileId, Location, VolumeIndex};

/// A way to damage the metadata.
#[derive(Debug, Clone)]
#[doc(hidden)]
pub enum Harm {
    Allocated(FileId, u64),
    Size(FileId, u64),
    Dying(FileId, bool),
    Unlinked(FileId, bool),
    Absorbed(FileId, bool),
    GivesName(FileId, bool),
    Frozen(FileId, bool),
    /// First child, and how many.
    Children(FileId, Option<FileId>, u32),
    /// Parent, next and previous sibling.
    Links(FileId, Option<FileId>, Option<FileId>, Option<FileId>),
    Place(FileId, FileId, String),
    Orphan(FileId, bool),
    /// Directory, name, number, whether it is said to be a directory, and whether it is there.
    Name(FileId, String, FileId, bool, bool),
    /// As above, under a wrong hash.
    Misplaced(FileId, String, FileId),
    Bit(VolumeIndex, u64, bool),
    /// File, cluster of it, cluster of a volume.
    Entry(FileId, u64, VolumeIndex, u64),
    /// An object of a number that nobody has.
    Object(u64),
    NoObject(u64),
    /// The map of the second file becomes that of the first, page for page.
    SameMap(FileId, FileId),
    /// The block becomes marked in the metadata bitmap.
    Leak(u64),
    /// The root page of an object becomes unmarked.
    Unmark(u64),
    /// The count kept for the root page of an object.
    Count(u64, u16),
    /// Numbers begin here again.
    NextId(u64),
    /// An orphan pin or one of a file that is not frozen.
    Pin(u64, FileId),
    /// The inode goes, all else stays.
    NoInode(FileId),
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Damages the metadata in memory; the next checkpoint makes that durable.
    #[doc(hidden)]
    pub async fn harm(&self, harm: &Harm) -> Result<(), FsError> {
        let core = self.core();
        core.look(|state| Ok(core.harm(state, harm)?)).await
    }

    /// The block with the root page of an object, and the bytes of the page behind it that a test may change.
    #[doc(hidden)]
    pub fn block_of(&self, object: u64) -> Option<u64> {
        match self.core().state.object(object).ok()??.child {
            Child::Media(ptr) => Some(ptr.block),
            Child::Loaded(node) => Some(node.ptr.get()?.block),
            Child::Empty | Child::Run(_) => None,
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    fn harm(&self, state: &State<V>, harm: &Harm) -> Result<(), crate::state::Stop> {
        let inode = |id: FileId, change: &dyn Fn(&mut Inode)| {
            state.file(id)?.change(|inode| change(inode));
            Ok(())
        };
        let flag = |id, flag, value| inode(id, &|inode| inode.flags.set(flag, value));
        let apply = |record: Record| {
            state.prepare(&record)?;
            state.apply(&record, &mut Effects::default())
        };
        match harm.clone() {
            Harm::Allocated(id, clusters) => inode(id, &|inode| inode.allocated = clusters),
            Harm::Size(id, size) => inode(id, &|inode| inode.size = size),
            Harm::Dying(id, value) => flag(id, Flags::DYING, value),
            Harm::Unlinked(id, value) => flag(id, Flags::UNLINKED, value),
            Harm::Absorbed(id, value) => flag(id, Flags::ABSORBED, value),
            Harm::GivesName(id, value) => flag(id, Flags::GIVES_NAME, value),
            Harm::Frozen(id, value) => flag(id, Flags::FROZEN, value),
            Harm::Children(id, first, children) => inode(id, &|inode| {
                inode.first_child = first;
                inode.children = children;
            }),
            Harm::Links(id, parent, next, previous) => inode(id, &|inode| {
                inode.parent = parent;
                inode.next_sibling = next;
                inode.previous_sibling = previous;
            }),
            Harm::Place(id, directory, name) => inode(id, &|inode| {
                inode.directory = directory;
                inode.name.clone_from(&name);
            }),
            Harm::Orphan(file, present) => apply(Record::MendOrphan { file, present }),
            Harm::Name(directory, name, id, is_directory, present) => {
                let kind = if is_directory { Kind::Directory } else { Kind::File };
                apply(Record::MendName(NameMend {
                    directory,
                    key: state.name_key(&name),
                    data: write_name(id, kind, &name),
                    present,
                }))
            }
            Harm::Misplaced(directory, name, id) => apply(Record::MendName(NameMend {
                directory,
                key: !state.name_key(&name),
                data: write_name(id, Kind::File, &name),
                present: true,
            })),
            Harm::Bit(volume, first, used) => apply(Record::MendBits {
                volume,
                first,
                count: 1,
                used,
            }),
            Harm::Entry(id, cluster, volume, at) => {
                let file = state.file(id)?;
                let place = Location { volume, cluster: at };
                let slot = usize::try_from(cluster % 256).unwrap_or(0);
                if let Some(map) = file.map() {
                    map.change(&state.pages, cluster, |body| {
                        if let Body::Map(entries) = body {
                            entries.set(slot, Entry::at(place).with_subs(u16::MAX, 0));
                        }
                    })?;
                }
                file.dirty.set(true);
                Ok(())
            }
            Harm::Object(id) => {
                let root = crate::tree::radix::Tree::new(crate::tree::codec::Kind::Map).to_root();
                Ok(state.set_object(id, Some(root))?)
            }
            Harm::NoObject(id) => Ok(state.set_object(id, None)?),
            Harm::SameMap(from, to) => {
                let root = state.object(from.0)?;
                state.objects.look(to.0)?;
                state.files.borrow_mut().remove(&to);
                Ok(state.set_object(to.0, root)?)
            }
            Harm::Leak(block) => {
                self.space.mark_used(block);
                Ok(())
            }
            Harm::Unmark(object) => {
                if let Some(root) = state.object(object)?
                    && let Child::Media(ptr) = root.child
                {
                    let freed = self.space.free(&[ptr.block]);
                    debug_assert!(freed.is_ok());
                }
                Ok(())
            }
            Harm::Count(object, count) => {
                let root = state.object(object)?;
                if let Some(mut root) = root
                    && let Child::Media(ptr) = &mut root.child
                {
                    ptr.aux = count;
                    let volume = state.volumes.borrow().values().find_map(|volume| {
                        (volume.record().bitmap == object).then(|| std::rc::Rc::clone(volume))
                    });
                    if let Some(volume) = volume {
                        volume.bitmap.replace(&state.pages, 0, 0, root.child)?;
                    }
                }
                Ok(())
            }
            Harm::NextId(id) => {
                state.set_next_id(id);
                Ok(())
            }
            Harm::Pin(pin, file) => apply(Record::Pin(crate::record::PinRecord { pin, file, until: 0 })),
            Harm::NoInode(id) => {
                state.inodes.ensure(crate::state::inode_key(id))?;
                state
                    .inodes
                    .remove(&state.pages, crate::state::inode_key(id), |_| true)?;
                state.files.borrow_mut().remove(&id);
                Ok(())
            }
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Does now what is done in the background otherwise.
    #[doc(hidden)]
    pub async fn settle(&self) -> Result<(), FsError> {
        self.core().settle_orphans().await
    }
}
