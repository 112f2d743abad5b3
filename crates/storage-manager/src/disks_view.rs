//! Virtual disks as people and programs see them.

use api::virtual_disk::{DiskMode, SnapshotStatus, VirtualDisk, VirtualDiskStatus};
use storage_virtualizer::disk::{self, DiskError, DiskState};

use crate::file_view;
use crate::problem::of_disks;
use crate::storage::FileSystem;

/// A mode, as the disks know it.
pub fn disk_mode(mode: DiskMode) -> disk::DiskMode {
    match mode {
        DiskMode::Persistent => disk::DiskMode::Persistent,
        DiskMode::Undoable => disk::DiskMode::Undoable,
        DiskMode::Nonpersistent => disk::DiskMode::Nonpersistent,
        DiskMode::Append => disk::DiskMode::Append,
    }
}

fn mode(mode: disk::DiskMode) -> DiskMode {
    match mode {
        disk::DiskMode::Persistent => DiskMode::Persistent,
        disk::DiskMode::Undoable => DiskMode::Undoable,
        disk::DiskMode::Nonpersistent => DiskMode::Nonpersistent,
        disk::DiskMode::Append => DiskMode::Append,
    }
}

pub(crate) fn disk(state: &DiskState) -> VirtualDisk {
    VirtualDisk {
        path: state.path.to_string(),
        size: state.size,
        allocated: state.allocated,
        snapshots: state.snapshots.len(),
        redo: state.redo.map(|redo| mode(redo.mode)),
        problem: None,
    }
}

/// A disk of which nothing is known but that there is one.
pub(crate) fn broken(path: String, error: &DiskError) -> VirtualDisk {
    VirtualDisk {
        path,
        size: 0,
        allocated: 0,
        snapshots: 0,
        redo: None,
        problem: Some(of_disks(error).to_string()),
    }
}

pub(crate) fn status(files: &FileSystem, state: &DiskState) -> VirtualDiskStatus {
    let snapshots = state.snapshots.iter().map(|snapshot| SnapshotStatus {
        name: snapshot.name.clone(),
        description: snapshot.description.clone(),
        created: snapshot.created,
        parent: snapshot.parent.clone(),
        size: snapshot.size,
        allocated: snapshot.allocated,
    });
    VirtualDiskStatus {
        disk: disk(state),
        created: state.created,
        attributes: file_view::attributes(files, &state.attributes),
        layers: state.depth,
        redo_allocated: state.redo.map_or(0, |redo| redo.allocated),
        based_on: state.based_on.clone(),
        snapshot_list: snapshots.collect(),
        unmerged: state.unmerged,
    }
}
