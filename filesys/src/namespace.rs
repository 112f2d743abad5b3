//! Names: directories and files are made, found, moved, deleted.

mod resize;
mod rules;

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file::{Access, File};
use crate::file_core::{Chain, FileCore, Kept};
use crate::inode::{Attributes, Flags, Inode, Kind};
use crate::open::FileSystem;
use crate::record::{LARGEST, Record};
use crate::state::{Damage, ROOT, read_name};
use crate::tree::node::FANOUT;
use crate::units::{CLUSTER, FileId, MAX_NAME};

use rules::check_depth;
pub(crate) use rules::check_size;

/// A file that is to be made.
#[derive(Debug, Clone, Default)]
pub struct NewFile {
    /// Bytes; a multiple of 512.
    pub size: u64,
    /// Attributes; those of the directory if there are none.
    pub attributes: Option<Attributes>,
    /// Seconds since 1970.
    pub now: u64,
}

/// What an entry of a directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: FileId,
    /// What it is.
    pub kind: Kind,
}

/// What is known of a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its number.
    pub id: FileId,
    /// What it is.
    pub kind: Kind,
    /// Bytes of a file, entries of a directory.
    pub size: u64,
    /// Bytes of volumes that it has, without its parents.
    pub allocated: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// What was decided for it.
    pub attributes: Attributes,
    /// By which those outside know it ([`FileSystem::set_identity`]).
    pub identity: Option<[u8; 16]>,
    /// It takes no writes.
    pub frozen: bool,
    /// The file that answers for what this one does not have.
    pub parent: Option<FileId>,
    /// How many files have this one as parent.
    pub children: u32,
    /// It is being absorbed by its child.
    pub absorbed: bool,
}

/// Children of one file, at most: there are not more files than that. Only in a damaged file system there are more.
const MOST_CHILDREN: usize = 16 << 20;

/// The parts of a path. It begins with `/`.
fn components(path: &str) -> Result<Vec<&str>, FsError> {
    let bad = |problem| FsError::Path {
        path: path.to_owned(),
        problem,
    };
    let rest = path
        .strip_prefix('/')
        .ok_or_else(|| bad("a path begins with /"))?;
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    for part in &parts {
        if part.len() > MAX_NAME {
            return Err(bad("a name has at most 255 bytes"));
        }
        if matches!(*part, "." | "..") {
            return Err(bad("a path has no . and no .."));
        }
        if part.contains(|character: char| character.is_control()) {
            return Err(bad("a name has no control characters"));
        }
    }
    Ok(parts)
}

/// Directory and name of something that is to have a name.
struct Spot<'a> {
    directory: Rc<FileCore>,
    name: &'a str,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// The file or directory at a path.
    pub(crate) fn find(&self, path: &str) -> Result<Rc<FileCore>, Refusal> {
        let mut at = self.state.file(ROOT)?;
        for part in components(path)? {
            if at.names().is_none() {
                return Err(FsError::NotDirectory {
                    path: path.to_owned(),
                }
                .into());
            }
            let id = self.state.lookup(&at, part)?;
            let id = id.ok_or_else(|| FsError::NotFound {
                path: path.to_owned(),
            })?;
            at = self.state.file(id)?;
        }
        Ok(at)
    }

    /// As [`Self::find`], a file.
    pub(crate) fn find_regular(&self, path: &str) -> Result<Rc<FileCore>, Refusal> {
        let file = self.find(path)?;
        if file.map().is_none() {
            return Err(FsError::IsDirectory {
                path: path.to_owned(),
            }
            .into());
        }
        Ok(file)
    }

    /// Where something new would get its name, which must be free.
    fn spot<'a>(&self, path: &'a str) -> Result<Spot<'a>, Refusal> {
        let parts = components(path)?;
        let Some((name, above)) = parts.split_last() else {
            return Err(FsError::Exists {
                path: path.to_owned(),
            }
            .into());
        };
        let directory = self.find(&format!("/{}", above.join("/")))?;
        if directory.names().is_none() {
            return Err(FsError::NotDirectory {
                path: path.to_owned(),
            }
            .into());
        }
        if self.state.lookup(&directory, name)?.is_some() {
            return Err(FsError::Exists {
                path: path.to_owned(),
            }
            .into());
        }
        Ok(Spot { directory, name })
    }

    /// The inode of something new at a path, with a number of its own.
    pub(crate) fn new_inode(
        &self,
        path: &str,
        id: FileId,
        kind: Kind,
        attributes: Option<&Attributes>,
    ) -> Result<Inode, Refusal> {
        let spot = self.spot(path)?;
        let mut inode = Inode::new(id, kind, spot.directory.id, spot.name);
        inode.attributes = match attributes {
            Some(attributes) => attributes.clone(),
            None => spot.directory.inode.borrow().attributes.clone(),
        };
        if kind == Kind::File {
            inode.home = self.home_for(&inode.attributes.target)?;
        }
        Ok(inode)
    }

    /// A thick file gets its space, then its name. Until then it is kept from being taken for one that is dying.
    async fn fill_and_link(&self, path: &str, id: FileId, size: u64) -> Result<u64, FsError> {
        let file = self.look(|state| Ok(state.file(id)?)).await?;
        let _kept = Kept::new(&file);
        self.fill(&file, 0, size).await?;
        let (group, ()) = self
            .transact(LARGEST, Need::Ordinary, |_| {
                let spot = self.spot(path)?;
                Ok((
                    vec![Record::Link {
                        file: id,
                        directory: spot.directory.id,
                        name: spot.name.to_owned(),
                    }],
                    (),
                ))
            })
            .await?;
        Ok(group)
    }

    /// Space for clusters `from..` of a file, of which nobody writes to any meanwhile. Those that have places keep them, and what is in
    /// them.
    async fn fill(&self, file: &Rc<FileCore>, from: u64, size: u64) -> Result<(), FsError> {
        let clusters = size.div_ceil(CLUSTER);
        let mut at = from;
        while at < clusters {
            let end = (at + FANOUT as u64).min(clusters);
            let ticket = self.admit(LARGEST.max(40 * FANOUT), Need::Ordinary).await?;
            let mut places = self.places(file);
            let mut records: Vec<Record> = Vec::new();
            for cluster in at..end {
                let index = u32::try_from(cluster).unwrap_or(u32::MAX);
                let old = self
                    .look(|_| file.map().map_or(Ok(Entry::HOLE), |map| Ok(map.entry(cluster)?)))
                    .await?;
                let location = self.place_loaded(file, &mut places, index, false).await?;
                // Without a parent, what is neither valid nor zero reads as zeroes as well.
                let zero = if file.parent().is_some() {
                    old.zero()
                } else {
                    !old.valid()
                };
                let base = if old.location().is_some() {
                    old
                } else {
                    Entry::at(location)
                };
                let new = base.with_kept(true).with_subs(old.valid(), zero);
                Record::push_map(&mut records, file.id, index, new, false);
            }
            let (group, ()) = self
                .transact_admitted(&ticket, |_| Ok((records.clone(), ())))
                .await?;
            file.group.set(file.group.get().max(group));
            places.mapped();
            at = end;
        }
        Ok(())
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Makes a directory.
    ///
    /// # Errors
    /// The name is taken or impossible, or its directory does not exist.
    pub async fn make_directory(
        &self,
        path: &str,
        attributes: Option<Attributes>,
        now: u64,
    ) -> Result<FileId, FsError> {
        let core = self.core();
        let id = FileId(core.state.new_id()?);
        let (group, ()) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let mut inode = core.new_inode(path, id, Kind::Directory, attributes.as_ref())?;
                inode.created = now;
                Ok((
                    vec![Record::Create {
                        inode: Box::new(inode),
                    }],
                    (),
                ))
            })
            .await?;
        core.commit(group).await?;
        Ok(id)
    }

    /// Makes a file that reads as zeroes.
    ///
    /// # Errors
    /// The name is taken or impossible, its directory does not exist, the size is impossible, or there is no space for a thick one.
    pub async fn create(&self, path: &str, new: &NewFile) -> Result<FileId, FsError> {
        let core = self.core();
        check_size(path, new.size)?;
        let id = FileId(core.state.new_id()?);
        let (group, thick) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let mut inode = core.new_inode(path, id, Kind::File, new.attributes.as_ref())?;
                inode.size = new.size;
                inode.created = new.now;
                let thick = inode.attributes.thick;
                // Without a name until all of it is there: after a crash it goes.
                inode.flags.set(Flags::DYING, thick);
                Ok((
                    vec![Record::Create {
                        inode: Box::new(inode),
                    }],
                    thick,
                ))
            })
            .await?;
        if !thick {
            core.commit(group).await?;
            return Ok(id);
        }
        let linked = core.fill_and_link(path, id, new.size).await;
        if linked.is_err() {
            core.housekeeping.set(true);
            core.changed.notify();
        }
        core.commit(linked?).await?;
        Ok(id)
    }

    /// Deletes a file or an empty directory. A file that others have as parent loses its name, and goes when they need it no more.
    ///
    /// # Errors
    /// There is none, it is open, pinned, or not empty.
    pub async fn delete(&self, path: &str) -> Result<(), FsError> {
        let core = self.core();
        let (group, ()) = core
            .transact(LARGEST, Need::Freeing, |_| {
                let file = core.find(path)?;
                core.check_unused(path, &file)?;
                if file.id == ROOT {
                    return Err(FsError::State {
                        object: "/".into(),
                        problem: "the root directory cannot be deleted".into(),
                    }
                    .into());
                }
                core.check_absorbs_nothing(path, &file)?;
                if file.names().is_some() && file.inode.borrow().size > 0 {
                    return Err(FsError::NotEmpty {
                        path: path.to_owned(),
                    }
                    .into());
                }
                Ok((vec![Record::Unlink { file: file.id }], ()))
            })
            .await?;
        core.commit(group).await
    }

    /// Gives a file or directory another name, in another directory if need be.
    ///
    /// # Errors
    /// There is none, the new name is taken or impossible, or a directory is to go into itself.
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), FsError> {
        let core = self.core();
        let (group, ()) = core
            .transact(LARGEST, Need::Freeing, |_| {
                let file = core.find(from)?;
                let spot = core.spot(to)?;
                core.check_not_above(from, &file, &spot.directory)?;
                if file.id == ROOT || file.inode.borrow().flags.has(Flags::ABSORBED) {
                    return Err(FsError::Busy {
                        object: from.to_owned(),
                        problem: "it cannot be moved now".into(),
                    }
                    .into());
                }
                Ok((
                    vec![Record::Link {
                        file: file.id,
                        directory: spot.directory.id,
                        name: spot.name.to_owned(),
                    }],
                    (),
                ))
            })
            .await?;
        core.commit(group).await
    }

    /// What is in a directory, in order of names.
    ///
    /// # Errors
    /// There is none, or metadata cannot be read.
    pub async fn list(&self, path: &str) -> Result<Vec<DirectoryEntry>, FsError> {
        let core = self.core();
        let directory = core.look(|_| core.find(path)).await?;
        let Some(names) = directory.names() else {
            return Err(FsError::NotDirectory {
                path: path.to_owned(),
            });
        };
        let mut entries = Vec::new();
        let mut from = Some(0);
        while let Some(key) = from {
            let (items, next) = core.look(|_| Ok(names.scan(key)?)).await?;
            for item in items {
                let (id, name) =
                    read_name(&item.data).map_err(|error| crate::state::Damage::new(path, error))?;
                entries.push(DirectoryEntry {
                    name: name.to_owned(),
                    id,
                    kind: if item.data.get(8) == Some(&2) {
                        Kind::Directory
                    } else {
                        Kind::File
                    },
                });
            }
            from = next;
        }
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// What is known of a file or directory.
    ///
    /// # Errors
    /// There is none.
    pub async fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let file = self.core().look(|_| self.core().find(path)).await?;
        Ok(stat_of(&file))
    }

    /// The files whose parent a file is, those without a name, too.
    ///
    /// # Errors
    /// There is no such file, or metadata are damaged.
    pub async fn children_of(&self, id: FileId) -> Result<Vec<FileId>, FsError> {
        let core = self.core();
        let mut children = Vec::new();
        let mut next = core
            .look(|state| Ok(state.file(id)?.inode.borrow().first_child))
            .await?;
        while let Some(child) = next {
            children.push(child);
            if children.len() >= MOST_CHILDREN {
                return Err(Damage::new(id, "has children without end").into());
            }
            next = core
                .look(|state| Ok(state.file(child)?.inode.borrow().next_sibling))
                .await?;
        }
        Ok(children)
    }

    /// The path of a file; none if it has no name any more.
    ///
    /// # Errors
    /// There is no such file.
    pub async fn path_of(&self, id: FileId) -> Result<Option<String>, FsError> {
        let core = self.core();
        core.look(|state| {
            let mut names = Vec::new();
            let mut at = state.file(id)?;
            if !at.inode.borrow().is_linked() {
                return Ok(None);
            }
            while at.id != ROOT {
                let (name, directory) = {
                    let inode = at.inode.borrow();
                    (inode.name.clone(), inode.directory)
                };
                names.push(name);
                check_depth(&at, names.len())?;
                at = state.file(directory)?;
            }
            names.reverse();
            Ok(Some(format!("/{}", names.join("/"))))
        })
        .await
    }

    /// As [`Self::stat`], of a file or directory whose number is known; none if it is gone.
    ///
    /// # Errors
    /// Metadata cannot be read.
    pub async fn stat_of(&self, id: FileId) -> Result<Option<Stat>, FsError> {
        let found = self.core().look(|state| Ok(state.find_file(id)?)).await?;
        Ok(found.map(|file| stat_of(&file)))
    }

    /// Changes what was decided for a file, or for what is made in a directory later.
    ///
    /// # Errors
    /// There is none, or the target does not exist.
    pub async fn set_attributes(&self, path: &str, attributes: Attributes) -> Result<(), FsError> {
        let core = self.core();
        core.home_for(&attributes.target)?;
        let (group, ()) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let file = core.find(path)?;
                Ok((
                    vec![Record::Attributes {
                        file: file.id,
                        attributes: attributes.clone(),
                    }],
                    (),
                ))
            })
            .await?;
        core.commit(group).await
    }

    /// Says by which identifier those outside know a file, whatever its name becomes. A layer that takes over the file's name when it
    /// absorbs it takes over the identifier; other layers and clones have none. Durable afterwards.
    ///
    /// # Errors
    /// There is no such file.
    pub async fn set_identity(&self, path: &str, identity: [u8; 16]) -> Result<(), FsError> {
        let core = self.core();
        let (group, ()) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let file = core.find_regular(path)?.id;
                Ok((vec![Record::Identity { file, identity }], ()))
            })
            .await?;
        core.commit(group).await
    }

    /// Opens a file.
    ///
    /// # Errors
    /// There is none; it is frozen, or somebody else writes to it, and it is to be written.
    pub async fn open_file(&self, path: &str, access: Access) -> Result<File<V, C>, FsError> {
        let core = self.core();
        let chain: Chain = core
            .look(|_| {
                let file = core.find_regular(path)?;
                let (frozen, absorbed) = {
                    let inode = file.inode.borrow();
                    (inode.is_frozen(), inode.flags.has(Flags::ABSORBED))
                };
                if absorbed {
                    return Err(FsError::Busy {
                        object: path.to_owned(),
                        problem: "it is being merged".into(),
                    }
                    .into());
                }
                if access == Access::Write {
                    core.check()?;
                    if frozen {
                        return Err(FsError::Frozen {
                            file: path.to_owned(),
                        }
                        .into());
                    }
                    if file.writers.get() > 0 {
                        return Err(FsError::Busy {
                            object: path.to_owned(),
                            problem: "it is open for writing already".into(),
                        }
                        .into());
                    }
                }
                Ok(core.chain(file.id)?)
            })
            .await?;
        Ok(File::new(Rc::clone(core), path, access, chain))
    }
}

pub(crate) fn stat_of(file: &FileCore) -> Stat {
    let inode = file.inode.borrow();
    Stat {
        id: inode.id,
        kind: inode.kind,
        size: inode.size,
        allocated: inode.allocated * CLUSTER,
        created: inode.created,
        attributes: inode.attributes.clone(),
        identity: inode.identity,
        frozen: inode.is_frozen(),
        parent: inode.parent,
        children: inode.children,
        absorbed: inode.flags.has(Flags::ABSORBED),
    }
}
