//! Snapshots: of one disk or of several at one instant; reverts; clones.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};
use filesys::{File, FileId, FsError, Snapshot};

use super::DiskMode;
use super::descriptor::{Descriptor, MAX_SNAPSHOTS, Purpose};
use super::disks::{Disks, Entry, no_snapshot};
use super::error::DiskError;
use super::name::{DiskPath, check_description, check_snapshot};

/// A snapshot that is to be made.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshot {
    /// Its name; unique for each disk.
    pub name: String,
    /// What people want to know of it.
    pub description: String,
    /// Seconds since 1970.
    pub now: u64,
}

/// A disk of a group.
struct Member<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    path: DiskPath,
    entry: Rc<Entry<V, C>>,
    descriptor: Descriptor,
    live: Option<Rc<File<V, C>>>,
    /// Of the layer that is frozen, and of the one that is made.
    names: (String, String),
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    /// Keeps the present state of some disks, all at one moment, and all or none. They may be in use: requests that have ended are in it,
    /// those that begin later are not, and nobody waits longer than for the requests that are under way.
    ///
    /// # Errors
    /// There is no such disk, the name is taken or impossible, a disk is nonpersistent.
    pub async fn snapshot(&self, paths: &[&str], new: &NewSnapshot) -> Result<(), DiskError> {
        check_snapshot(&new.name)?;
        check_description(&new.name, &new.description)?;
        let mut disks = paths
            .iter()
            .map(|path| DiskPath::new(path))
            .collect::<Result<Vec<_>, _>>()?;
        // In one order, so that two groups do not wait in a circle.
        disks.sort();
        disks.dedup();
        let entries: Vec<_> = disks.iter().map(|disk| self.entry(disk)).collect();
        let mut turns = Vec::with_capacity(entries.len());
        for entry in &entries {
            turns.push(entry.turn.take().await);
        }
        let mut members = Vec::with_capacity(disks.len());
        for (path, entry) in disks.into_iter().zip(&entries) {
            members.push(Box::pin(self.join(path, entry, new)).await?);
        }
        Box::pin(self.snapshot_members(&mut members, new)).await
    }

    /// Sees that a disk can be in the group.
    async fn join(
        &self,
        path: DiskPath,
        entry: &Rc<Entry<V, C>>,
        new: &NewSnapshot,
    ) -> Result<Member<V, C>, DiskError> {
        let mut descriptor = Box::pin(self.settle(&path, entry, new.now)).await?;
        if descriptor.snapshot(&new.name).is_some() {
            return Err(DiskError::SnapshotExists {
                disk: path.to_string(),
                snapshot: new.name.clone(),
            });
        }
        let problem = if descriptor.snapshots.len() >= MAX_SNAPSHOTS {
            "it has 256 snapshots, which is the most: delete some first"
        } else if descriptor
            .redo
            .is_some_and(|redo| redo.mode == DiskMode::Nonpersistent)
        {
            "it is nonpersistent: what is written is going to be discarded, and snapshots of that are not kept"
        } else {
            Box::pin(self.make_writable(&path, &mut descriptor, new.now)).await?;
            return Ok(Member {
                live: entry.live(),
                entry: Rc::clone(entry),
                names: Default::default(),
                path,
                descriptor,
            });
        };
        Err(DiskError::State {
            disk: path.to_string(),
            problem: problem.into(),
        })
    }

    async fn snapshot_members(
        &self,
        members: &mut [Member<V, C>],
        new: &NewSnapshot,
    ) -> Result<(), DiskError> {
        let mut announced = 0;
        let made = loop {
            let Some(member) = members.get_mut(announced) else {
                break Box::pin(self.freeze(members, new.now)).await;
            };
            let purpose = Purpose::Snapshot {
                created: new.now,
                name: new.name.clone(),
                description: new.description.clone(),
            };
            let top = member.descriptor.top();
            let told =
                Box::pin(self.announce(&member.path, &mut member.descriptor, top, purpose, new.now)).await;
            announced += 1;
            if let Err(error) = told {
                break Err(error);
            }
        };
        match made {
            Ok(layers) => {
                for (member, layer) in members.iter_mut().zip(layers) {
                    member.descriptor.made(layer);
                    Box::pin(self.store(&member.path, &mut member.descriptor, new.now)).await?;
                }
                Ok(())
            }
            Err(error) => {
                for member in members.iter_mut().take(announced) {
                    Box::pin(self.call_off(&member.path, &mut member.descriptor, new.now)).await;
                }
                Err(error)
            }
        }
    }

    /// Second step: one transaction for all.
    async fn freeze(&self, members: &mut [Member<V, C>], now: u64) -> Result<Vec<FileId>, DiskError> {
        let mut tries = 0;
        loop {
            for member in members.iter_mut() {
                let frozen = self.layer_path(&member.path, member.descriptor.top()).await?;
                let pending = member.descriptor.pending.as_ref();
                let layer = member.path.layer(pending.map_or(0, |pending| pending.layer));
                member.names = (frozen, layer);
                // It may have been closed meanwhile.
                member.live = member.entry.live();
            }
            let snapshots: Vec<_> = members
                .iter()
                .map(|member| Snapshot {
                    path: &member.names.0,
                    layer: &member.names.1,
                    handle: member.live.as_deref(),
                })
                .collect();
            match Box::pin(self.files().snapshot(&snapshots, now)).await {
                // A merge that ended just now gave a layer another name.
                Err(FsError::NotFound { .. }) if tries < 8 => tries += 1,
                made => return Ok(made?),
            }
        }
    }

    /// The disk becomes what it was. What was written since goes, unless another snapshot has it.
    ///
    /// # Errors
    /// There is no such snapshot, the disk is open for writing, or has an undecided redo layer.
    pub async fn revert(&self, path: &str, snapshot: &str, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        entry.check_unused_but_snapshots(&path)?;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        if descriptor.redo.is_some() {
            return Err(DiskError::Undecided {
                disk: path.to_string(),
            });
        }
        let mark = descriptor.snapshot(snapshot);
        let file = mark.ok_or_else(|| no_snapshot(&path, snapshot))?.file;
        Box::pin(self.make_layer(&path, &mut descriptor, file, Purpose::Head, None, now)).await?;
        Box::pin(self.tidy(&path, &mut descriptor, now)).await
    }

    /// A snapshot is needed no more. Its space is given back in the background.
    ///
    /// # Errors
    /// There is none, or somebody reads it.
    pub async fn delete_snapshot(&self, path: &str, snapshot: &str, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        if entry.has_readers(snapshot) {
            return Err(DiskError::InUse {
                object: format!("{path}@{snapshot}"),
                problem: "somebody reads it",
            });
        }
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        let mark = descriptor.snapshot(snapshot);
        let file = mark.ok_or_else(|| no_snapshot(&path, snapshot))?.file;
        descriptor.snapshots.retain(|mark| mark.name != snapshot);
        descriptor.let_go(file);
        Box::pin(self.store(&path, &mut descriptor, now)).await?;
        Box::pin(self.tidy(&path, &mut descriptor, now)).await
    }

    /// Another name, or another description, for a snapshot.
    ///
    /// # Errors
    /// There is none, somebody reads it, or the name is taken or impossible.
    pub async fn describe_snapshot(
        &self,
        path: &str,
        snapshot: &str,
        new: &NewSnapshot,
    ) -> Result<(), DiskError> {
        check_snapshot(&new.name)?;
        check_description(&new.name, &new.description)?;
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let mut descriptor = Box::pin(self.settle(&path, &entry, new.now)).await?;
        if new.name != snapshot {
            if entry.has_readers(snapshot) {
                return Err(DiskError::InUse {
                    object: format!("{path}@{snapshot}"),
                    problem: "somebody reads it by that name",
                });
            }
            if descriptor.snapshot(&new.name).is_some() {
                return Err(DiskError::SnapshotExists {
                    disk: path.to_string(),
                    snapshot: new.name.clone(),
                });
            }
        }
        let mark = descriptor.snapshots.iter_mut().find(|mark| mark.name == snapshot);
        let mark = mark.ok_or_else(|| no_snapshot(&path, snapshot))?;
        mark.name.clone_from(&new.name);
        mark.description.clone_from(&new.description);
        Box::pin(self.store(&path, &mut descriptor, new.now)).await
    }

    /// Makes another disk that is as a snapshot is, or as the disk is now. Nothing is copied.
    ///
    /// # Errors
    /// There is none, the new name is taken or impossible, or the disk has an undecided redo layer and no snapshot is named.
    pub async fn clone_disk(
        &self,
        path: &str,
        snapshot: Option<&str>,
        new: &str,
        now: u64,
    ) -> Result<(), DiskError> {
        let (path, new) = (DiskPath::new(path)?, DiskPath::new(new)?);
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        self.check_new(&new).await?;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        let file = match snapshot {
            Some(snapshot) => {
                let mark = descriptor.snapshot(snapshot);
                mark.ok_or_else(|| no_snapshot(&path, snapshot))?.file
            }
            None if descriptor.redo.is_some() => {
                return Err(DiskError::Undecided {
                    disk: path.to_string(),
                });
            }
            None => {
                let head = descriptor.head;
                let frozen = self.files().stat_of(head).await?.is_some_and(|stat| stat.frozen);
                if !frozen {
                    let live = entry.live();
                    Box::pin(self.make_layer(
                        &path,
                        &mut descriptor,
                        head,
                        Purpose::Head,
                        live.as_ref(),
                        now,
                    ))
                    .await?;
                }
                head
            }
        };
        let frozen = self.layer_path(&path, file).await?;
        Box::pin(self.files().clone_file(&frozen, new.as_str(), now)).await?;
        Box::pin(self.tidy(&path, &mut descriptor, now)).await
    }
}
