//! What a guest may see of its disks: where their data are, what else there is.

use std::collections::BTreeSet;

use api::file::{FileAnswer, FileEntry, FileKind, FileOperation, FileStatus, Target};
use api::virtual_disk::{DiskAnswer, DiskOperation};
use api::{DiskConfig, Problem, ProblemKind};
use expanded_api::{Extent, GuestDisk, GuestVolume, split_snapshot};
use storage_virtualizer::disk::is_layer_of;
use storage_virtualizer::virtio_blk::fitting_serial;

use crate::allow::Own;
use crate::perform::{Doer, conflict, unexpected};

/// Most disks that are looked at because the policy names them.
const MAX_LISTED: usize = 256;

impl Doer<'_> {
    /// The files of a disk: its first layer and those that came with snapshots.
    pub(crate) fn layers(&self, disk: &str) -> Result<Vec<FileEntry>, Problem> {
        let (folder, _) = disk.rsplit_once('/').unwrap_or_default();
        let path = if folder.is_empty() { "/" } else { folder };
        let answer = self.file(FileOperation::List {
            path: path.to_owned(),
            recursive: false,
            limit: None,
            after: None,
        })?;
        let FileAnswer::Entries(entries) = answer else {
            return Err(unexpected());
        };
        let layers: Vec<FileEntry> = entries
            .into_iter()
            .filter(|entry| entry.kind == FileKind::File && is_layer_of(disk, &entry.path))
            .collect();
        if layers.is_empty() {
            return Err(Problem::new(ProblemKind::NotFound, format!("there is no {disk}")).about(disk));
        }
        Ok(layers)
    }

    pub(crate) fn volumes_of(&self, disk: &str) -> Result<BTreeSet<String>, Problem> {
        let mut volumes = BTreeSet::new();
        for layer in self.layers(disk)? {
            let status = match self.file(FileOperation::Stat { path: layer.path }) {
                Ok(FileAnswer::Status(status)) => status,
                Ok(_) => return Err(unexpected()),
                // Layers that nobody needs go by themselves.
                Err(problem) if problem.kind == ProblemKind::NotFound => continue,
                Err(problem) => return Err(problem),
            };
            let FileStatus { volumes: shares, .. } = *status;
            volumes.extend(
                shares
                    .into_iter()
                    .filter(|share| share.bytes > 0)
                    .map(|share| share.volume),
            );
        }
        if volumes.is_empty()
            && let Target::Volume(volume) = self.status(disk)?.attributes.target
        {
            // Nothing has been written yet: where it will be.
            volumes.insert(volume);
        }
        Ok(volumes)
    }

    /// The paths of disks that the policy names.
    pub(crate) fn named(&self) -> Result<Vec<(String, u64)>, Problem> {
        let mut found: Vec<(String, u64)> = Vec::new();
        for pattern in &self.policy.objects {
            let folder = pattern.rsplit_once('/').map_or("", |(folder, _)| folder);
            let path = if folder.is_empty() { "/" } else { folder };
            let disks = match self.disk(DiskOperation::List {
                path: path.to_owned(),
                limit: None,
                after: None,
            }) {
                Ok(DiskAnswer::Disks(disks)) => disks,
                Ok(_) => return Err(unexpected()),
                // The folder is made with the first disk.
                Err(problem) if problem.kind == ProblemKind::NotFound => continue,
                Err(problem) => return Err(problem),
            };
            found.extend(
                disks
                    .into_iter()
                    .filter(|disk| self.policy.has_object(&disk.path))
                    .map(|disk| (disk.path, disk.size)),
            );
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    pub(crate) fn list_disks(&self) -> Result<Vec<GuestDisk>, Problem> {
        let attached = self.vm.disks();
        let mut found = Vec::new();
        for status in &attached {
            let own = Own::of(&status.config);
            let known = own.as_ref().map(|own| self.status(&own.path)).transpose()?;
            let volumes = own.as_ref().map(|own| self.volumes_of(&own.path)).transpose()?;
            let whole = own.as_ref().is_some_and(|own| own.snapshot.is_none());
            found.push(GuestDisk {
                path: status.config.file.clone(),
                id: Some(status.config.id.clone()),
                serial: Some(serial(&status.config)),
                size: status.size.bytes(),
                allocated: known.as_ref().map_or(0, |known| known.disk.allocated),
                read_only: own.is_none_or(|own| !own.writable) && status.config.file.is_some()
                    || status.config.read_only,
                volumes: volumes.unwrap_or_default().into_iter().collect(),
                snapshots: known
                    .filter(|_| whole)
                    .map_or_else(Vec::new, |known| known.snapshot_list),
            });
        }
        // A machine without a pool has disks as well.
        if self.pool_status().is_err() {
            return Ok(found);
        }
        for (path, _) in self.named()?.into_iter().take(MAX_LISTED) {
            if found.iter().any(|disk| disk.path.as_ref() == Some(&path)) {
                continue;
            }
            let known = self.status(&path)?;
            found.push(GuestDisk {
                volumes: self.volumes_of(&path)?.into_iter().collect(),
                path: Some(path),
                id: None,
                serial: None,
                size: known.disk.size,
                allocated: known.disk.allocated,
                read_only: false,
                snapshots: known.snapshot_list,
            });
        }
        Ok(found)
    }

    pub(crate) fn list_volumes(&self) -> Result<Vec<GuestVolume>, Problem> {
        let mut behind = BTreeSet::new();
        for own in self.own() {
            behind.extend(self.volumes_of(&own.path)?);
        }
        let pool = self.pool_status()?;
        let files = pool.files.map(|files| files.volumes).unwrap_or_default();
        let volumes = pool.volumes.into_iter();
        let volumes =
            volumes.filter(|volume| behind.contains(&volume.name) || self.policy.has_volume(&volume.name));
        Ok(volumes
            .map(|mut volume| {
                volume.shape.devices.clear();
                let file = files.iter().find(|known| known.name == volume.name);
                GuestVolume {
                    yours: self.policy.has_volume(&volume.name),
                    name: volume.name,
                    state: volume.state,
                    size: volume.size,
                    free: file.map(|known| known.free),
                    shape: volume.shape,
                    tolerates: volume.tolerates,
                }
            })
            .collect())
    }

    /// The file with the present data of a disk, or what names the one with those of a snapshot.
    fn file_of(&self, disk: &str) -> Result<String, Problem> {
        if split_snapshot(disk).1.is_some() {
            return Ok(disk.to_owned());
        }
        // All layers but the one that is written are frozen.
        let mut head = self.layers(disk)?.into_iter().filter(|layer| !layer.frozen);
        match (head.next(), head.next()) {
            (Some(head), None) => Ok(head.path),
            _ => Err(conflict(format!("{disk} is being changed; try again")).about(disk)),
        }
    }

    /// Where the present data of a disk are, or those of a snapshot of one.
    pub(crate) fn extents(&self, disk: &str) -> Result<Vec<Extent>, Problem> {
        let path = self.file_of(disk)?;
        let FileAnswer::Extents(extents) = self.file(FileOperation::Extents { path })? else {
            return Err(unexpected());
        };
        Ok(extents
            .into_iter()
            .map(|extent| Extent {
                offset: extent.offset,
                length: extent.length,
                volume: extent.volume,
                start: extent.start,
            })
            .collect())
    }

    /// Differs when data of the disk, or snapshot, may lie elsewhere: made of where they are on volumes, and of the pool's epoch, which grows with
    /// everything that is changed of volumes and devices.
    pub(crate) fn configuration(&self, disk: &str) -> Result<String, Problem> {
        let epoch = self.pool_status()?.epoch;
        // FNV-1a: it is only compared with itself.
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes {
                sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        for extent in self.extents(disk)? {
            for number in [extent.offset, extent.length, extent.start] {
                add(&number.to_be_bytes());
            }
            add(extent.volume.as_bytes());
            add(&[0]);
        }
        Ok(format!("{sum:016x}-{epoch}"))
    }
}

/// As the machine gives it.
pub(crate) fn serial(config: &DiskConfig) -> String {
    let serial = config.serial.as_ref();
    fitting_serial(serial.map_or_else(|| config.id.as_str(), |serial| serial.as_str()))
}
