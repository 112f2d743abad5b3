//! Disks are made, measured, made larger, looked at, deleted.

use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};
use filesys::{Attributes, FileId, FsError, NewFile, Range, Stat};

use super::DiskMode;
use super::descriptor::Descriptor;
use super::disks::{Disks, no_snapshot};
use super::error::DiskError;
use super::name::DiskPath;
use super::store;

/// A disk that is to be made.
#[derive(Debug, Clone, Default)]
pub struct NewDisk {
    /// Bytes; a multiple of 512.
    pub size: u64,
    /// Attributes; those of the directory if there are none.
    pub attributes: Option<Attributes>,
    /// What initiators shall know it by; if nothing, it gets that when it is opened for writing.
    pub identity: Option<[u8; 16]>,
    /// Seconds since 1970.
    pub now: u64,
}

/// A snapshot of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotState {
    /// Its name.
    pub name: String,
    /// What people want to know of it.
    pub description: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The snapshot before it.
    pub parent: Option<String>,
    /// Bytes of the disk at that time.
    pub size: u64,
    /// Bytes of volumes that its own layer has.
    pub allocated: u64,
    /// Its layer.
    pub file: FileId,
    /// Somebody reads it.
    pub in_use: bool,
}

/// A redo layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedoState {
    /// What it is for.
    pub mode: DiskMode,
    /// The layer that has what the disk is without it.
    pub below: FileId,
    /// Bytes of volumes that it has.
    pub allocated: u64,
}

/// What is known of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    /// Its path.
    pub path: DiskPath,
    /// Bytes.
    pub size: u64,
    /// Bytes of volumes that its layers have, all together; without those of disks from which it was cloned.
    pub allocated: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// What was decided for it.
    pub attributes: Attributes,
    /// What initiators know it by.
    pub identity: Option<[u8; 16]>,
    /// Persistent reservations are kept for it.
    pub reserved: bool,
    /// Layers that are read, one through the other.
    pub depth: usize,
    /// Writes of which it is not decided whether they stay.
    pub redo: Option<RedoState>,
    /// The snapshot on which its present state is built.
    pub based_on: Option<String>,
    /// In the order in which they were made.
    pub snapshots: Vec<SnapshotState>,
    /// Layers that nobody needs, and that are still to be merged.
    pub unmerged: usize,
    /// Somebody writes to it.
    pub in_use: bool,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    /// Makes a disk that reads as zeroes.
    ///
    /// # Errors
    /// The name is taken or impossible, its directory does not exist, or there is no space for a thick one.
    pub async fn create(&self, path: &str, new: &NewDisk) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        self.check_new(&path).await?;
        let file = NewFile {
            size: new.size,
            attributes: new.attributes.clone(),
            now: new.now,
        };
        Box::pin(self.files().create(path.as_str(), &file)).await?;
        // After a crash in between, it gets one when it is opened.
        Box::pin(self.identify(&path, new.identity)).await.map(drop)
    }

    /// As [`Self::create`], without making it: sees that a disk can be called so.
    ///
    /// # Errors
    /// The name is taken.
    pub async fn check_free(&self, path: &DiskPath) -> Result<(), DiskError> {
        let entry = self.entry(path);
        let _turn = entry.turn.take().await;
        self.check_new(path).await
    }

    /// Sees that a disk can be called so; what one of that name may have left is deleted.
    pub(super) async fn check_new(&self, path: &DiskPath) -> Result<(), DiskError> {
        match self.files().stat(path.as_str()).await {
            Err(FsError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                return Err(FsError::Exists {
                    path: path.to_string(),
                }
                .into());
            }
        }
        match store::is_left(self.files(), path).await? {
            true => Ok(Box::pin(self.files().delete(&path.descriptor())).await?),
            false => Ok(()),
        }
    }

    /// Deletes a disk with its snapshots. Disks that were cloned from it keep what they need.
    ///
    /// # Errors
    /// There is none, or it is in use.
    pub async fn delete(&self, path: &str, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        entry.check_unused(&path)?;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        // A merge that a crash has interrupted is ended first: half of a layer cannot be deleted.
        if self.files().stat(path.as_str()).await?.absorbed
            && let Some(child) = Box::pin(self.child_of_base(&path, descriptor.top())).await?
        {
            Box::pin(self.files().absorb(&child, true)).await?;
            Box::pin(self.tidy(&path, &mut descriptor, now)).await?;
        }
        let base = self.files().stat(path.as_str()).await?.id;
        if descriptor == Descriptor::plain(base) {
            Box::pin(self.delete_file(path.as_str())).await?;
            return Ok(());
        }
        // From here on it is settled that it goes, whatever happens.
        let marks = std::mem::take(&mut descriptor.snapshots);
        let redo = descriptor.redo.take().map(|redo| redo.file);
        let layers = redo.into_iter().chain([descriptor.head]);
        let layers = layers.chain(marks.iter().rev().map(|mark| mark.file));
        for layer in layers {
            if !descriptor.doomed.contains(&layer) {
                descriptor.doomed.push(layer);
            }
        }
        // As long as there is a file of its name, somebody can go on with the deletion.
        descriptor.doomed.retain(|layer| *layer != base);
        descriptor.doomed.push(base);
        descriptor.deleted = true;
        Box::pin(self.store(&path, &mut descriptor, now)).await?;
        Box::pin(self.delete_all(&path, &descriptor)).await
    }

    /// Deletes what a descriptor lists, and the descriptor.
    pub(super) async fn delete_all(&self, path: &DiskPath, descriptor: &Descriptor) -> Result<(), DiskError> {
        for layer in &descriptor.doomed {
            Box::pin(self.delete_layer(*layer)).await?;
        }
        match Box::pin(self.files().delete(&path.descriptor())).await {
            Ok(()) | Err(FsError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Changes the size of a disk, which may be in use: who wants to know is told.
    ///
    /// # Errors
    /// It would become smaller, and `shrink` does not say that this is wanted; or the size is impossible.
    pub async fn resize(&self, path: &str, size: u64, shrink: bool, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let turn = entry.turn.take().await;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        let present = self.files().stat_of(descriptor.top()).await?;
        let present = present.map_or(0, |stat| stat.size);
        if size < present && !shrink {
            return Err(DiskError::Shrinks {
                disk: path.to_string(),
                present,
                wanted: size,
            });
        }
        Box::pin(self.make_writable(&path, &mut descriptor, now)).await?;
        let mut tries = 0;
        loop {
            let name = self.layer_path(&path, descriptor.top()).await?;
            match Box::pin(self.files().resize(&name, size)).await {
                // A merge that ended just now gave it another name.
                Err(FsError::NotFound { .. }) if tries < 8 => tries += 1,
                resized => break resized?,
            }
        }
        drop(turn);
        let tell: Vec<_> = entry.resized.borrow().clone();
        tell.iter().for_each(|tell| tell(size));
        Ok(())
    }

    /// What is known of a disk. Nothing is changed.
    ///
    /// # Errors
    /// There is none, or metadata cannot be read.
    pub async fn status(&self, path: &str) -> Result<DiskState, DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let descriptor = Box::pin(self.look(&path, &entry)).await?;
        let mut own = BTreeMap::new();
        let mut snapshots = Vec::new();
        for mark in &descriptor.snapshots {
            let stat = self.files().stat_of(mark.file).await?;
            own.insert(mark.file, stat.as_ref().map_or(0, |stat| stat.allocated));
            let parent = self.nearest(&descriptor, mark.file, false).await?;
            snapshots.push(SnapshotState {
                name: mark.name.clone(),
                description: mark.description.clone(),
                created: mark.created,
                parent,
                size: stat.as_ref().map_or(0, |stat| stat.size),
                allocated: stat.as_ref().map_or(0, |stat| stat.allocated),
                file: mark.file,
                in_use: entry.has_readers(&mark.name),
            });
        }
        let base = self.files().stat(path.as_str()).await?;
        own.insert(base.id, base.allocated);
        for file in [descriptor.head, descriptor.top()] {
            let stat = self.files().stat_of(file).await?;
            own.insert(file, stat.map_or(0, |stat| stat.allocated));
        }
        let redo = descriptor.redo.map(|redo| RedoState {
            mode: redo.mode,
            below: descriptor.head,
            allocated: own.get(&redo.file).copied().unwrap_or(0),
        });
        let top = self.files().stat_of(descriptor.top()).await?;
        Ok(DiskState {
            size: top.as_ref().map_or(0, |stat| stat.size),
            allocated: own.values().sum(),
            created: base.created,
            attributes: base.attributes,
            identity: base.identity,
            reserved: !descriptor.reservations.is_empty(),
            depth: self.depth(descriptor.top()).await?,
            redo,
            based_on: self.nearest(&descriptor, descriptor.top(), true).await?,
            snapshots,
            unmerged: descriptor.doomed.len(),
            in_use: entry.is_live(),
            path,
        })
    }

    async fn depth(&self, top: FileId) -> Result<usize, DiskError> {
        let (mut at, mut depth) = (Some(top), 0);
        while let Some(file) = at.filter(|_| depth < 10_000) {
            depth += 1;
            at = self.files().stat_of(file).await?.and_then(|stat| stat.parent);
        }
        Ok(depth)
    }

    /// The snapshot that a layer, or its parent, is, or else the next one below.
    async fn nearest(
        &self,
        descriptor: &Descriptor,
        layer: FileId,
        itself: bool,
    ) -> Result<Option<String>, DiskError> {
        let (mut at, mut own) = (Some(layer), itself);
        for _ in 0..10_000 {
            let Some(file) = at else { break };
            if own && let Some(mark) = descriptor.snapshots.iter().rfind(|mark| mark.file == file) {
                return Ok(Some(mark.name.clone()));
            }
            own = true;
            at = self.files().stat_of(file).await?.and_then(|stat| stat.parent);
        }
        Ok(None)
    }

    /// Ranges that were written or discarded since a snapshot was made, until another one was, or until now. From byte `from` on, about
    /// `most` ranges, and the byte from which to go on.
    ///
    /// # Errors
    /// There is no such snapshot, or the disk is not built on `since`.
    pub async fn changed(
        &self,
        path: &str,
        since: &str,
        until: Option<&str>,
        from: u64,
        most: usize,
    ) -> Result<(Vec<Range>, Option<u64>), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let descriptor = Box::pin(self.look(&path, &entry)).await?;
        let file_of = |name: &str| {
            let mark = descriptor.snapshot(name);
            mark.map(|mark| mark.file).ok_or_else(|| no_snapshot(&path, name))
        };
        let old = file_of(since)?;
        let new = match until {
            Some(until) => file_of(until)?,
            None => descriptor.top(),
        };
        let mut at = Some(new);
        while let Some(file) = at.filter(|file| *file != old) {
            at = self.files().stat_of(file).await?.and_then(|stat| stat.parent);
        }
        if at.is_none() {
            let what = until.map_or_else(|| "the disk".to_owned(), |until| format!("snapshot {until}"));
            return Err(DiskError::State {
                disk: path.to_string(),
                problem: format!(
                    "{what} is not built on snapshot {since}, so what changed since is not known"
                ),
            });
        }
        let old = self.layer_path(&path, old).await?;
        let new = self.layer_path(&path, new).await?;
        Ok(Box::pin(self.files().changed(&new, Some(&old), from, most)).await?)
    }

    /// The file that is a snapshot (`/vm/root.dsk@monday`), as the file system knows it: its path there, and its state.
    ///
    /// # Errors
    /// There is none, or metadata cannot be read.
    pub async fn frozen_file(&self, disk: &DiskPath, snapshot: &str) -> Result<(String, Stat), DiskError> {
        let entry = self.entry(disk);
        let _turn = entry.turn.take().await;
        let descriptor = Box::pin(self.look(disk, &entry)).await?;
        let mark = descriptor
            .snapshot(snapshot)
            .ok_or_else(|| no_snapshot(disk, snapshot))?;
        let path = self.layer_path(disk, mark.file).await?;
        let stat = self.files().stat(&path).await?;
        Ok((path, stat))
    }

    /// Ranges of a disk, or of a snapshot of it (`/vm/root.dsk@monday`), that have data or are zero by themselves; everything between
    /// reads as zeroes. As [`Self::changed`].
    ///
    /// # Errors
    /// There is none, or metadata cannot be read.
    pub async fn map(
        &self,
        path: &str,
        from: u64,
        most: usize,
    ) -> Result<(Vec<Range>, Option<u64>), DiskError> {
        let (path, snapshot) = DiskPath::with_snapshot(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let descriptor = Box::pin(self.look(&path, &entry)).await?;
        let layer = match &snapshot {
            Some(name) => {
                descriptor
                    .snapshot(name)
                    .ok_or_else(|| no_snapshot(&path, name))?
                    .file
            }
            None => descriptor.top(),
        };
        let name = self.layer_path(&path, layer).await?;
        Ok(Box::pin(self.files().map(&name, from, most)).await?)
    }
}
