//! Files and the file system as people and programs see them.

use api::file::{
    AttributeChanges, DataVolume, FileAttributes, FileEntry, FileKind, FileSystemStatus, META_VOLUME, Target,
};
use api::storage::{PoolEvent, PoolEventKind};
use api::{Problem, ProblemKind};
use filesys::{Event, Kind, Stat, VolumeIndex};

use crate::storage::FileSystem;

pub(crate) fn file_system(files: &FileSystem) -> FileSystemStatus {
    let volumes: Vec<DataVolume> = files
        .volumes()
        .into_iter()
        .map(|volume| DataVolume {
            name: volume.name,
            class: volume.class,
            size: volume.size,
            free: volume.free,
            draining: volume.draining,
            failed: volume.failed,
        })
        .collect();
    let metadata = files.metadata();
    FileSystemStatus {
        size: volumes.iter().map(|volume| volume.size).sum(),
        free: volumes.iter().map(|volume| volume.free).sum(),
        meta_size: metadata.size,
        meta_free: metadata.free,
        journal: metadata.journal,
        volumes,
    }
}

pub(crate) fn entry(path: String, stat: &Stat) -> FileEntry {
    FileEntry {
        path,
        kind: kind(stat.kind),
        size: stat.size,
        allocated: stat.allocated,
        created: stat.created,
        frozen: stat.frozen,
        layer: stat.parent.is_some(),
    }
}

fn kind(kind: Kind) -> FileKind {
    match kind {
        Kind::File => FileKind::File,
        Kind::Directory => FileKind::Directory,
    }
}

/// The name of a volume.
pub(crate) fn volume_name(files: &FileSystem, index: VolumeIndex) -> String {
    let volumes = files.volumes();
    let found = volumes.into_iter().find(|volume| volume.index == index);
    found.map_or_else(|| index.to_string(), |volume| volume.name)
}

pub(crate) fn attributes(files: &FileSystem, given: &filesys::Attributes) -> FileAttributes {
    FileAttributes {
        target: match &given.target {
            filesys::Target::Any => Target::Any,
            filesys::Target::Volume(index) => Target::Volume(volume_name(files, *index)),
            filesys::Target::Class(class) => Target::Class(class.clone()),
        },
        thick: given.thick,
        checksums: given.checksums,
        exempt_from_migration: given.exempt_from_migration,
    }
}

/// What attributes become by changes.
pub(crate) fn changed(
    files: &FileSystem,
    old: filesys::Attributes,
    changes: &AttributeChanges,
) -> Result<filesys::Attributes, Problem> {
    Ok(filesys::Attributes {
        target: match &changes.target {
            Some(wanted) => target(files, wanted)?,
            None => old.target,
        },
        thick: changes.thick.unwrap_or(old.thick),
        checksums: changes.checksums.unwrap_or(old.checksums),
        exempt_from_migration: changes.exempt_from_migration.unwrap_or(old.exempt_from_migration),
    })
}

/// A target whose volumes there are.
fn target(files: &FileSystem, wanted: &Target) -> Result<filesys::Target, Problem> {
    let volumes = files.volumes();
    match wanted {
        Target::Any => Ok(filesys::Target::Any),
        Target::Volume(name) => {
            let found = volumes.iter().find(|volume| volume.name == *name);
            let found = found.ok_or_else(|| no_volume(files, name))?;
            Ok(filesys::Target::Volume(found.index))
        }
        Target::Class(class) if volumes.iter().any(|volume| volume.class == *class) => {
            Ok(filesys::Target::Class(class.clone()))
        }
        Target::Class(class) => Err(Problem::new(
            ProblemKind::NotFound,
            format!("the file system has no volume of class {class}"),
        )
        .about(class)
        .remedy("`smsvmm volume create NAME --class` makes one")),
    }
}

pub(crate) fn no_volume(files: &FileSystem, name: &str) -> Problem {
    let names: Vec<String> = files.volumes().into_iter().map(|volume| volume.name).collect();
    let detail = match name {
        META_VOLUME => format!("volume {META_VOLUME} is for metadata, not for files"),
        _ => format!("the file system has no volume {name}"),
    };
    Problem::new(ProblemKind::NotFound, detail)
        .about(name)
        .remedy(match names.is_empty() {
            true => "`smsvmm volume create` makes one".to_owned(),
            false => format!("it has {}", names.join(", ")),
        })
}

pub(crate) fn event(event: &Event) -> Option<PoolEvent> {
    let (kind, text) = match event {
        Event::LowSpace { name, free, size, .. } => (
            PoolEventKind::LowSpace,
            format!(
                "volume {name} has only {} of {} MiB free: grow it, add one, or delete files",
                free >> 20,
                size >> 20
            ),
        ),
        Event::SpaceAgain { name, .. } => (
            PoolEventKind::SpaceAgain,
            format!("volume {name} has enough space again"),
        ),
        Event::VolumeFailed { name, reason, .. } => (
            PoolEventKind::VolumeFailed,
            format!(
                "volume {name} takes no more writes until the pool is opened again, and what was written to it since its last flush may be \
                 lost: check its devices ({reason})"
            ),
        ),
        Event::TailMissing => (
            PoolEventKind::UnflushedMissing,
            "the pool had not been closed, and what was answered and not flushed then is not in this user's /dev/shm of this host, as after a power cut: \
             guests and clients that were not started anew since may miss writes; have their file systems checked"
                .to_owned(),
        ),
        Event::Failed { reason } => (
            PoolEventKind::FilesFailed,
            format!("the file system takes no changes any more: {reason}"),
        ),
        Event::Corrupt { file, offset } => (
            PoolEventKind::Corrupt,
            format!("{file}: data at offset {offset} are not what was written, and there is no good copy"),
        ),
        Event::Repaired { file, offset } => (
            PoolEventKind::Repaired,
            format!("{file}: data at offset {offset} were not what was written, and were repaired"),
        ),
        Event::MetadataRepaired { block } => (
            PoolEventKind::Repaired,
            format!("block {block} of volume {META_VOLUME} was not what was written, and was repaired"),
        ),
        Event::MetadataCorrupt { block } => (
            PoolEventKind::Corrupt,
            format!(
                "block {block} of volume {META_VOLUME} is not what was written, and there is no good copy: `smsvmm file check` tells \
                 what it means"
            ),
        ),
        _ => return None,
    };
    Some(PoolEvent { kind, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_of_metadata_is_told_as_that_of_data_is() {
        for (told, kind) in [
            (Event::MetadataRepaired { block: 7 }, PoolEventKind::Repaired),
            (Event::MetadataCorrupt { block: 7 }, PoolEventKind::Corrupt),
        ] {
            let told = event(&told).unwrap();
            assert!(told.kind == kind && told.text.contains("block 7"), "{told:?}");
        }
    }
}
