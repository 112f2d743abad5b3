//! Layers are made, and what a crash has left is settled.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};
use filesys::{File, FileId, FsError, Snapshot};

use super::DiskMode;
use super::descriptor::{Descriptor, Pending, Purpose};
use super::disks::{Disks, Entry};
use super::error::DiskError;
use super::name::DiskPath;
use super::store;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    pub(super) async fn store(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        now: u64,
    ) -> Result<(), DiskError> {
        Box::pin(store::store(self.files(), path, descriptor, now)).await
    }

    /// How the disk is; what a crash has left is taken account of, and not changed.
    pub(super) async fn look(&self, path: &DiskPath, entry: &Entry<V, C>) -> Result<Descriptor, DiskError> {
        let mut descriptor = Box::pin(store::load(self.files(), path)).await?;
        if descriptor.deleted {
            return Err(DiskError::Deleted {
                disk: path.to_string(),
            });
        }
        Box::pin(self.resolve(path, entry, &mut descriptor, false)).await?;
        descriptor.redo = descriptor.redo.filter(|redo| !redo.discarded);
        Ok(descriptor)
    }

    /// What a crash has left undecided is decided, but for what is in the redo layer of a disk that `goes_on`. Whether that changed
    /// anything.
    async fn resolve(
        &self,
        path: &DiskPath,
        entry: &Entry<V, C>,
        descriptor: &mut Descriptor,
        goes_on: bool,
    ) -> Result<bool, DiskError> {
        let mut changed = false;
        if let Some(pending) = &descriptor.pending {
            match self.files().stat(&path.layer(pending.layer)).await {
                Ok(stat) if stat.parent == Some(pending.parent) => {
                    block_io::cover!("disk: a layer was made before a crash, and is there");
                    descriptor.made(stat.id);
                }
                Ok(_) | Err(FsError::NotFound { .. }) => {
                    block_io::cover!("disk: a layer was not made before a crash");
                    descriptor.pending = None;
                }
                Err(error) => return Err(error.into()),
            }
            changed = true;
        }
        if let Some(redo) = &mut descriptor.redo
            && redo.mode == DiskMode::Nonpersistent
            && !redo.discarded
            && !goes_on
            && !entry.is_live()
        {
            redo.discarded = true;
            changed = true;
        }
        // Their files went, and the crash came before their entries did.
        let mut gone = Vec::new();
        for mark in &descriptor.snapshots {
            if !self.is_linked(mark.file).await? {
                block_io::cover!("disk: a snapshot was deleted before a crash");
                gone.push(mark.file);
            }
        }
        changed |= !gone.is_empty();
        descriptor.snapshots.retain(|mark| !gone.contains(&mark.file));
        Ok(changed)
    }

    /// Finishes what was begun: descriptor and files are as they should be afterwards. It is the caller's turn.
    pub(super) async fn settle(
        &self,
        path: &DiskPath,
        entry: &Entry<V, C>,
        now: u64,
    ) -> Result<Descriptor, DiskError> {
        Box::pin(self.settle_but(path, entry, now, false)).await
    }

    /// As [`Self::settle`]; a disk that `goes_on` keeps what is in its redo layer.
    pub(super) async fn settle_but(
        &self,
        path: &DiskPath,
        entry: &Entry<V, C>,
        now: u64,
        goes_on: bool,
    ) -> Result<Descriptor, DiskError> {
        let mut descriptor = Box::pin(store::load(self.files(), path)).await?;
        if descriptor.deleted {
            block_io::cover!("disk: a deletion goes on");
            Box::pin(self.delete_all(path, &descriptor)).await?;
            // There may be another one of that name.
            descriptor = Box::pin(store::load(self.files(), path)).await?;
        }
        if Box::pin(self.resolve(path, entry, &mut descriptor, goes_on)).await? {
            Box::pin(self.store(path, &mut descriptor, now)).await?;
        }
        Box::pin(self.tidy(path, &mut descriptor, now)).await?;
        Ok(descriptor)
    }

    /// Deletes what is not needed.
    pub(super) async fn tidy(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        now: u64,
    ) -> Result<(), DiskError> {
        let mut changed = false;
        if let Some(redo) = descriptor.redo.filter(|redo| redo.discarded) {
            Box::pin(self.delete_layer(redo.file)).await?;
            Box::pin(self.thaw(path, descriptor.head)).await?;
            descriptor.redo = None;
            changed = true;
        }
        let mut left = Vec::new();
        for file in descriptor.doomed.clone() {
            if !Box::pin(self.delete_doomed(path, file)).await? {
                left.push(file);
            }
        }
        if left != descriptor.doomed {
            descriptor.doomed = left;
            changed = true;
        }
        match changed {
            true => Box::pin(self.store(path, descriptor, now)).await,
            false => Ok(()),
        }
    }

    /// Deletes a layer that is not needed. False if it is still there: it is in use, or the first one, which has the disk's name and goes by
    /// a merge. A merge that ends meanwhile makes another one the first.
    async fn delete_doomed(&self, path: &DiskPath, file: FileId) -> Result<bool, DiskError> {
        loop {
            if self.files().stat_of(file).await?.is_none() {
                return Ok(true);
            }
            if self.files().stat(path.as_str()).await?.id == file {
                return Ok(false);
            }
            let Some(name) = self.files().path_of(file).await? else {
                return Ok(true);
            };
            if name == path.as_str() {
                return Ok(false);
            }
            match Box::pin(self.files().delete(&name)).await {
                Ok(()) => return Ok(true),
                Err(FsError::Busy { .. }) => return Ok(false),
                Err(FsError::NotFound { .. }) => {
                    block_io::cover!("disk: a layer that goes has got another name");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn is_linked(&self, file: FileId) -> Result<bool, DiskError> {
        Ok(match self.files().stat_of(file).await? {
            Some(_) => self.files().path_of(file).await?.is_some(),
            None => false,
        })
    }

    /// Deletes a layer, if it is there. Those above it keep what they need.
    pub(super) async fn delete_layer(&self, file: FileId) -> Result<(), DiskError> {
        if self.files().stat_of(file).await?.is_none() {
            return Ok(());
        }
        match self.files().path_of(file).await? {
            Some(path) => match Box::pin(self.delete_file(&path)).await {
                Ok(()) | Err(FsError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            },
            None => Ok(()),
        }
    }

    /// Deletes a file. It may be in the way of the file system, which merges what is left of snapshots that were deleted: then that ends first.
    pub(super) async fn delete_file(&self, path: &str) -> Result<(), FsError> {
        match Box::pin(self.files().delete(path)).await {
            Err(FsError::Busy { .. }) => {
                block_io::cover!("disk: a deletion waits for a merge");
                self.files().settled().await;
                Box::pin(self.files().delete(path)).await
            }
            deleted => deleted,
        }
    }

    /// A head that was frozen for a layer that is gone can be written again.
    async fn thaw(&self, path: &DiskPath, head: FileId) -> Result<(), DiskError> {
        let stat = self.files().stat_of(head).await?;
        if stat.is_some_and(|stat| stat.frozen && stat.children == 0) {
            let name = self.layer_path(path, head).await?;
            Box::pin(self.files().set_frozen(&name, false)).await?;
        }
        Ok(())
    }

    /// Sees that the head can be written: if others depend on it, it gets a layer that is the head from then on.
    pub(super) async fn make_writable(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        now: u64,
    ) -> Result<(), DiskError> {
        if descriptor.redo.is_some() {
            return Ok(());
        }
        let head = descriptor.head;
        let stat = self.files().stat_of(head).await?;
        match stat.is_some_and(|stat| stat.frozen && stat.children > 0) {
            true => {
                Box::pin(self.make_layer(path, descriptor, head, Purpose::Head, None, now)).await?;
                Box::pin(self.tidy(path, descriptor, now)).await
            }
            false => Ok(()),
        }
    }

    /// Puts a layer on another one, and says what it is for. `live` is the file through which that is written now.
    pub(super) async fn make_layer(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        parent: FileId,
        purpose: Purpose,
        live: Option<&Rc<File<V, C>>>,
        now: u64,
    ) -> Result<(), DiskError> {
        Box::pin(self.announce(path, descriptor, parent, purpose, now)).await?;
        let number = descriptor.pending.as_ref().map_or(0, |pending| pending.layer);
        let made = Box::pin(self.make_file(path, parent, &path.layer(number), live, now)).await;
        match made {
            Ok(layer) => {
                descriptor.made(layer);
                Box::pin(self.store(path, descriptor, now)).await
            }
            Err(error) => {
                Box::pin(self.call_off(path, descriptor, now)).await;
                Err(error)
            }
        }
    }

    /// First step: what is going to happen is durable.
    pub(super) async fn announce(
        &self,
        path: &DiskPath,
        descriptor: &mut Descriptor,
        parent: FileId,
        purpose: Purpose,
        now: u64,
    ) -> Result<(), DiskError> {
        descriptor.pending = Some(Pending {
            layer: descriptor.next_layer,
            parent,
            purpose,
        });
        descriptor.next_layer = descriptor.next_layer.checked_add(1).unwrap_or(1);
        Box::pin(self.store(path, descriptor, now)).await
    }

    /// It did not happen. If that cannot be written, whoever looks next sees it.
    pub(super) async fn call_off(&self, path: &DiskPath, descriptor: &mut Descriptor, now: u64) {
        descriptor.pending = None;
        if let Err(error) = Box::pin(self.store(path, descriptor, now)).await {
            tracing::warn!(disk = %path, "the descriptor still speaks of a layer that was not made: {error}");
        }
    }

    async fn make_file(
        &self,
        path: &DiskPath,
        parent: FileId,
        layer: &str,
        live: Option<&Rc<File<V, C>>>,
        now: u64,
    ) -> Result<FileId, DiskError> {
        let mut tries = 0;
        loop {
            let frozen = self
                .files()
                .stat_of(parent)
                .await?
                .is_some_and(|stat| stat.frozen);
            let name = self.layer_path(path, parent).await?;
            let made = match frozen {
                true => Box::pin(self.files().clone_file(&name, layer, now)).await,
                false => {
                    let snapshot = Snapshot {
                        path: &name,
                        layer,
                        handle: live.map(Rc::as_ref),
                    };
                    let ids = Box::pin(self.files().snapshot(&[snapshot], now)).await;
                    ids.map(|ids| ids.first().copied().unwrap_or(parent))
                }
            };
            match made {
                // A merge that ended just now gave it another name.
                Err(FsError::NotFound { .. }) if tries < 8 => tries += 1,
                made => return Ok(made?),
            }
        }
    }
}
