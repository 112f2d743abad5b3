//! The volumes of the file system: they join, grow, are emptied, and leave, while files are in use.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::Need;
use crate::error::{FsError, Refusal};
use crate::inode::MAX_CLASS;
use crate::open::{FileSystem, GivenVolume};
use crate::record::{LARGEST, Record, VolumeRecord};
use crate::state::State;
use crate::units::{CLUSTER, MAX_CLUSTERS, MAX_NAME, SUB_CLUSTER, VolumeIndex};
use crate::volume::VolumeCore;

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStat {
    /// Its number in the file system.
    pub index: VolumeIndex,
    /// Its identity.
    pub uuid: [u8; 16],
    /// Its name.
    pub name: String,
    /// Its storage class; empty for none.
    pub class: String,
    /// Bytes that files can have.
    pub size: u64,
    /// Bytes that no file has.
    pub free: u64,
    /// It gets nothing new.
    pub draining: bool,
    /// A flush failed: it takes no more writes until the file system is opened again.
    pub failed: bool,
}

/// What is known of the metadata volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataStat {
    /// Bytes of the volume that the file system uses.
    pub size: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes of the journal.
    pub journal: u64,
    /// Bytes of it that the next opening would read.
    pub journal_used: u64,
    /// Pages in memory that a checkpoint would write, at most.
    pub dirty_pages: u64,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// The volumes with data, in order of their numbers.
    pub fn volumes(&self) -> Vec<VolumeStat> {
        let volumes = self.core().state.volumes.borrow();
        volumes.values().map(|volume| stat_of(volume)).collect()
    }

    /// Tells the volume manager what of a data volume is in use, so that copies of it leave out the rest. To be taken back
    /// ([`volume_manager::Volume::set_usage`] with none) before the file system is closed or dropped.
    pub fn usage_of_volume(&self, uuid: [u8; 16]) -> Option<Rc<dyn volume_manager::Usage>> {
        let volumes = self.core().state.volumes.borrow();
        let volume = volumes.values().find(|volume| volume.record().uuid == uuid)?;
        Some(Rc::clone(volume) as Rc<dyn volume_manager::Usage>)
    }

    /// The metadata volume.
    pub fn metadata(&self) -> MetadataStat {
        let core = self.core();
        MetadataStat {
            size: core.superblock.borrow().layout.size_blocks * SUB_CLUSTER,
            free: core.space.free_count() * SUB_CLUSTER,
            journal: core.journal.capacity() * SUB_CLUSTER,
            journal_used: core.journal.used_blocks() * SUB_CLUSTER,
            dirty_pages: core.state.pages.dirtied(),
        }
    }

    /// A volume joins. What it held is lost.
    ///
    /// # Errors
    /// It is one already, is too small, or there are too many.
    pub async fn add_volume(&self, volume: GivenVolume<V>) -> Result<VolumeIndex, FsError> {
        let core = self.core();
        let given = core
            .state
            .given
            .borrow_mut()
            .insert(volume.uuid, Rc::clone(&volume.device));
        let added = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let record = core.volume_record(&volume)?;
                let index = record.index;
                Ok((vec![Record::Volume(record)], index))
            })
            .await;
        match added {
            Ok((group, index)) => {
                core.commit(group).await?;
                Ok(index)
            }
            Err(error) => {
                let mut devices = core.state.given.borrow_mut();
                match given {
                    Some(device) => devices.insert(volume.uuid, device),
                    None => devices.remove(&volume.uuid),
                };
                Err(error)
            }
        }
    }

    /// Takes note of a volume's present size, if it has grown; and gives it a name and a class.
    ///
    /// # Errors
    /// There is no such volume, it has become smaller, or a text is too long.
    pub async fn update_volume(
        &self,
        uuid: [u8; 16],
        name: &str,
        class: &str,
    ) -> Result<VolumeStat, FsError> {
        if name.len() > MAX_NAME || class.len() > MAX_CLASS {
            return Err(FsError::State {
                object: format!("volume {name}"),
                problem: "its name or its class is too long".into(),
            });
        }
        let index = self.change_volume(uuid, |volume, record| {
            let clusters = (volume.device.size() / CLUSTER).min(MAX_CLUSTERS - 1);
            if clusters < record.clusters {
                return Err(FsError::State {
                    object: format!("volume {}", record.name),
                    problem: "has become smaller than what the file system uses of it".into(),
                });
            }
            record.clusters = clusters;
            name.clone_into(&mut record.name);
            class.clone_into(&mut record.class);
            Ok(())
        });
        let index = index.await?;
        Ok(stat_of(&*self.core().state.volume(index)?))
    }

    /// Lets a volume get nothing new, so that it can be emptied with [`Self::relocate`]; or ends that.
    ///
    /// # Errors
    /// There is no such volume.
    pub async fn set_draining(&self, uuid: [u8; 16], draining: bool) -> Result<(), FsError> {
        self.change_volume(uuid, |_, record| {
            record.draining = draining;
            Ok(())
        })
        .await
        .map(|_| ())
    }

    /// An empty volume leaves: afterwards it may be gone for ever.
    ///
    /// # Errors
    /// There is no such volume, or files have clusters on it.
    pub async fn remove_volume(&self, uuid: [u8; 16]) -> Result<(), FsError> {
        let core = self.core();
        let (group, ()) = core
            .transact(LARGEST, Need::Freeing, |state| {
                let volume = find(state, uuid)?;
                let used = volume.clusters().saturating_sub(volume.free());
                if used > 0 || volume.available() < volume.free() {
                    return Err(FsError::Busy {
                        object: format!("volume {}", volume.record().name),
                        problem: format!(
                            "files have {} bytes on it: let it drain and relocate them first",
                            used * CLUSTER
                        ),
                    }
                    .into());
                }
                Ok((vec![Record::NoVolume { volume: volume.index }], ()))
            })
            .await?;
        core.commit(group).await?;
        // The journal may speak of it still, and then it would be asked for when it is replayed.
        core.checkpoint_now().await?;
        core.state.given.borrow_mut().remove(&uuid);
        Ok(())
    }

    async fn change_volume(
        &self,
        uuid: [u8; 16],
        change: impl Fn(&VolumeCore<V>, &mut VolumeRecord) -> Result<(), FsError>,
    ) -> Result<VolumeIndex, FsError> {
        let core = self.core();
        let (group, index) = core
            .transact(LARGEST, Need::Ordinary, |state| {
                let volume = find(state, uuid)?;
                let mut record = volume.record();
                change(&volume, &mut record)?;
                Ok((vec![Record::Volume(record)], volume.index))
            })
            .await?;
        core.commit(group).await?;
        Ok(index)
    }
}

fn find<V: BlockDevice>(state: &State<V>, uuid: [u8; 16]) -> Result<Rc<VolumeCore<V>>, Refusal> {
    let volumes = state.volumes.borrow();
    let found = volumes
        .values()
        .find(|volume| volume.record().uuid == uuid)
        .map(Rc::clone);
    found.ok_or_else(|| {
        FsError::State {
            object: "the file system".into(),
            problem: "has no such volume".into(),
        }
        .into()
    })
}

fn stat_of<V>(volume: &VolumeCore<V>) -> VolumeStat {
    let record = volume.record();
    VolumeStat {
        index: record.index,
        uuid: record.uuid,
        name: record.name,
        class: record.class,
        size: record.clusters * CLUSTER,
        free: volume.free() * CLUSTER,
        draining: record.draining,
        failed: volume.failed.get(),
    }
}
