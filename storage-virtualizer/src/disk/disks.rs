//! All disks of a file system: who has which open.
//!
//! | the disk is open | may be opened for writing | for reading | its snapshots for reading |
//! |---|---|---|---|
//! | not at all | yes | yes | yes |
//! | for writing | no | no | yes |
//! | for reading | no | yes | yes |

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use block_io::{BlockDevice, Clock};
use filesys::{Access, File, FileId, FileSystem, FsError};

use super::descriptor::{Descriptor, Purpose};
use super::error::DiskError;
use super::name::DiskPath;
use super::turn::Turn;
use super::virtual_disk::{Hooks, VirtualDisk};
use super::{DiskMode, DiskOptions, PowerOff};

/// What is known of a disk while this process has to do with it.
pub(super) struct Entry<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    /// Whose turn it is to change the descriptor.
    pub(super) turn: Turn,
    /// Who writes to the disk.
    pub(super) writer: RefCell<Weak<File<V, C>>>,
    readers: Cell<u32>,
    /// Of snapshots.
    snapshot_readers: RefCell<BTreeMap<String, u32>>,
    pub(super) resized: Hooks,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Entry<V, C> {
    fn new() -> Self {
        Self {
            turn: Turn::default(),
            writer: RefCell::new(Weak::new()),
            readers: Cell::new(0),
            snapshot_readers: RefCell::default(),
            resized: RefCell::default(),
        }
    }

    /// The file through which the disk is written.
    pub(super) fn live(&self) -> Option<Rc<File<V, C>>> {
        self.writer.borrow().upgrade()
    }

    pub(super) fn is_live(&self) -> bool {
        self.writer.borrow().strong_count() > 0
    }

    pub(super) fn has_readers(&self, snapshot: &str) -> bool {
        self.snapshot_readers.borrow().contains_key(snapshot)
    }

    /// Whether anybody has to do with the disk or a snapshot of it.
    pub(super) fn check_unused(&self, path: &DiskPath) -> Result<(), DiskError> {
        self.check_unused_but_snapshots(path)?;
        match self.snapshot_readers.borrow().is_empty() {
            true => Ok(()),
            false => Err(DiskError::InUse {
                object: path.to_string(),
                problem: "somebody reads a snapshot of it",
            }),
        }
    }

    /// As [`Self::check_unused`], but for who reads snapshots.
    pub(super) fn check_unused_but_snapshots(&self, path: &DiskPath) -> Result<(), DiskError> {
        self.check_unwritten(path)?;
        match self.readers.get() {
            0 => Ok(()),
            _ => Err(DiskError::InUse {
                object: path.to_string(),
                problem: "somebody reads it",
            }),
        }
    }

    pub(super) fn check_unwritten(&self, path: &DiskPath) -> Result<(), DiskError> {
        match self.is_live() {
            false => Ok(()),
            true => Err(DiskError::InUse {
                object: path.to_string(),
                problem: "it is open for writing",
            }),
        }
    }

    /// A handle is gone.
    pub(super) fn left(&self, snapshot: Option<&str>, read_only: bool) {
        match snapshot {
            Some(snapshot) => {
                let mut readers = self.snapshot_readers.borrow_mut();
                let left = readers.get_mut(snapshot).map(|count| {
                    *count -= 1;
                    *count
                });
                if left == Some(0) {
                    readers.remove(snapshot);
                }
            }
            None if read_only => self.readers.set(self.readers.get().saturating_sub(1)),
            None => self.resized.borrow_mut().clear(),
        }
    }
}

pub(super) struct Inner<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    pub(super) files: FileSystem<V, C>,
    entries: RefCell<BTreeMap<DiskPath, Rc<Entry<V, C>>>>,
}

/// The disks of a file system. Copies are the same.
pub struct Disks<V: BlockDevice + 'static, C: Clock + Clone + 'static>(pub(super) Rc<Inner<V, C>>);

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Clone for Disks<V, C> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    /// The disks of a file system. There is one of these for a file system that is open, so that all know of each other.
    pub fn new(files: FileSystem<V, C>) -> Self {
        Self(Rc::new(Inner {
            files,
            entries: RefCell::default(),
        }))
    }

    pub(super) fn files(&self) -> &FileSystem<V, C> {
        &self.0.files
    }

    pub(super) fn entry(&self, path: &DiskPath) -> Rc<Entry<V, C>> {
        let mut entries = self.0.entries.borrow_mut();
        if let Some(entry) = entries.get(path) {
            return Rc::clone(entry);
        }
        // Nobody has to do with those any more.
        entries.retain(|_, entry| Rc::strong_count(entry) > 1);
        let entry = Rc::new(Entry::new());
        entries.insert(path.clone(), Rc::clone(&entry));
        entry
    }

    /// Opens a disk, or, with `/vm/root.dsk@monday`, a snapshot of one, which must be read-only.
    ///
    /// # Errors
    /// There is none, it is in use, or its mode does not go with a redo layer that there is.
    pub async fn open(&self, path: &str, options: DiskOptions) -> Result<VirtualDisk<V, C>, DiskError> {
        let (path, snapshot) = DiskPath::with_snapshot(path)?;
        let entry = self.entry(&path);
        let turn = entry.turn.take().await;
        let mut reservations = Vec::new();
        let file = match &snapshot {
            Some(_) if !options.read_only => {
                return Err(DiskError::State {
                    disk: path.to_string(),
                    problem: "a snapshot can only be read: open it read-only, or clone it to a new disk"
                        .into(),
                });
            }
            Some(snapshot) => {
                let descriptor = Box::pin(self.look(&path, &entry)).await?;
                let mark = descriptor.snapshot(snapshot);
                let mark = mark.ok_or_else(|| no_snapshot(&path, snapshot))?;
                Box::pin(self.open_layer(&path, mark.file, Access::Read)).await?
            }
            None if options.read_only => {
                entry.check_unwritten(&path)?;
                let descriptor = Box::pin(self.look(&path, &entry)).await?;
                let file = Box::pin(self.open_layer(&path, descriptor.top(), Access::Read)).await?;
                reservations = descriptor.reservations;
                file
            }
            None => {
                entry.check_unwritten(&path)?;
                if entry.readers.get() > 0 {
                    return Err(DiskError::InUse {
                        object: path.to_string(),
                        problem: "somebody reads it, who must not see it change",
                    });
                }
                let settled = self.settle_but(&path, &entry, options.now, options.goes_on);
                let mut descriptor = Box::pin(settled).await?;
                Box::pin(self.prepare(&path, &mut descriptor, options)).await?;
                let file = Box::pin(self.open_layer(&path, descriptor.top(), Access::Write)).await?;
                reservations = descriptor.reservations;
                file
            }
        };
        let new = options.identity.filter(|_| !options.read_only);
        let identity = Box::pin(self.identify(&path, new)).await?;
        drop(turn);
        let file = Rc::new(file);
        match &snapshot {
            Some(snapshot) => {
                *entry
                    .snapshot_readers
                    .borrow_mut()
                    .entry(snapshot.clone())
                    .or_default() += 1;
            }
            None if options.read_only => entry.readers.set(entry.readers.get() + 1),
            None => *entry.writer.borrow_mut() = Rc::downgrade(&file),
        }
        Ok(VirtualDisk {
            file,
            entry,
            path,
            snapshot,
            options,
            identity,
            reservations,
        })
    }

    /// Sees that the top layer is one that the mode wants.
    async fn prepare(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        options: DiskOptions,
    ) -> Result<(), DiskError> {
        match (options.mode, &mut descriptor.redo) {
            (DiskMode::Persistent, None) => Box::pin(self.make_writable(path, descriptor, options.now)).await,
            (DiskMode::Nonpersistent, Some(redo))
                if options.goes_on && redo.mode == DiskMode::Nonpersistent =>
            {
                Ok(())
            }
            (DiskMode::Persistent | DiskMode::Nonpersistent, Some(_)) => Err(DiskError::Undecided {
                disk: path.to_string(),
            }),
            (mode, Some(redo)) => {
                if redo.mode != mode {
                    redo.mode = mode;
                    Box::pin(self.store(path, descriptor, options.now)).await?;
                }
                Ok(())
            }
            (_, None) if options.goes_on => Err(DiskError::State {
                disk: path.to_string(),
                problem: "whoever goes on with it wrote to a redo layer, which was committed or discarded meanwhile"
                    .into(),
            }),
            (mode, None) => {
                let head = descriptor.head;
                let stat = self.files().stat_of(head).await?;
                // A layer would take no notice of that.
                if stat.is_some_and(|stat| stat.frozen && stat.children == 0) {
                    return Err(FsError::Frozen {
                        file: path.to_string(),
                    }
                    .into());
                }
                Box::pin(self.make_layer(path, descriptor, head, Purpose::Redo { mode }, None, options.now))
                    .await
            }
        }
    }

    /// Power-off: what was written is made durable, and what the disk's mode wants done is done.
    ///
    /// # Errors
    /// Somebody else still uses it, or something could not be written. The disk is closed all the same, but in the first case.
    pub async fn close(&self, disk: Rc<VirtualDisk<V, C>>, now: u64) -> Result<(), DiskError> {
        let disk = Rc::into_inner(disk).ok_or_else(still_in_use)?;
        if disk.options.read_only {
            return Ok(());
        }
        let (path, mode, decision) = (disk.path.clone(), disk.options.mode, disk.options.power_off);
        let flushed = match mode {
            // Nobody will read it.
            DiskMode::Nonpersistent => Ok(()),
            _ => disk.file.flush().await,
        };
        drop(disk);
        let ended = match (mode, decision) {
            (DiskMode::Undoable, PowerOff::Commit) if flushed.is_ok() => {
                Box::pin(self.commit(path.as_str(), now)).await
            }
            (DiskMode::Undoable, PowerOff::Discard) => Box::pin(self.discard(path.as_str(), now)).await,
            (DiskMode::Nonpersistent, _) => {
                let entry = self.entry(&path);
                let turn = entry.turn.take().await;
                let settled = Box::pin(self.settle(&path, &entry, now)).await;
                drop(turn);
                settled.map(drop)
            }
            _ => Ok(()),
        };
        flushed?;
        ended
    }

    /// Closes a disk that somebody goes on with later, who believes that it is open: what was written is made durable, and nothing is
    /// done that its mode wants done at power-off. [`DiskOptions::goes_on`] opens it again. Until then an operation that changes the disk
    /// discards what was written to a nonpersistent one, as after a crash.
    ///
    /// # Errors
    /// As [`Self::close`].
    pub async fn leave(&self, disk: Rc<VirtualDisk<V, C>>) -> Result<(), DiskError> {
        let disk = Rc::into_inner(disk).ok_or_else(still_in_use)?;
        match disk.options.read_only {
            true => Ok(()),
            false => Ok(disk.file.flush().await?),
        }
    }

    pub(super) async fn open_layer(
        &self,
        path: &DiskPath,
        layer: FileId,
        access: Access,
    ) -> Result<File<V, C>, DiskError> {
        let mut tries = 0;
        loop {
            let name = self.layer_path(path, layer).await?;
            match Box::pin(self.files().open_file(&name, access)).await {
                // A merge that ended just now gave it another name.
                Err(FsError::NotFound { .. }) if tries < 8 => tries += 1,
                opened => return Ok(opened?),
            }
        }
    }

    /// The present path of a layer.
    pub(super) async fn layer_path(&self, path: &DiskPath, layer: FileId) -> Result<String, DiskError> {
        let found = match self.files().stat_of(layer).await? {
            Some(_) => self.files().path_of(layer).await?,
            None => None,
        };
        found.ok_or_else(|| DiskError::State {
            disk: path.to_string(),
            problem: format!("a layer of it, {layer}, was deleted; what remains are the files beside it"),
        })
    }
}

fn still_in_use() -> DiskError {
    DiskError::State {
        disk: "a disk".into(),
        problem: "it is still in use, and cannot be closed".into(),
    }
}

pub(super) fn no_snapshot(path: &DiskPath, snapshot: &str) -> DiskError {
    DiskError::NoSnapshot {
        disk: path.to_string(),
        snapshot: snapshot.to_owned(),
    }
}
