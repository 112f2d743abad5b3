//! Virtual disks of a pool: what can be asked of them and what they answer.
//!
//! The path of a disk begins with `/` and ends with `.dsk`; a snapshot of it is `/vm/root.dsk@monday`. All sizes and offsets are numbers of
//! bytes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{FileAttributes, Target};
use crate::storage::{JobStatus, PoolEvent};

/// What becomes of what is written to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// It stays.
    #[default]
    Persistent,
    /// It goes to a redo layer, until somebody commits or discards it: at power-off, or by command.
    Undoable,
    /// It goes to a redo layer that is discarded at power-off, or at the next opening if there was a crash.
    Nonpersistent,
    /// It goes to a redo layer, which stays until it is committed or discarded by command.
    Append,
}

impl DiskMode {
    /// As in vm.toml.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Persistent => "persistent",
            Self::Undoable => "undoable",
            Self::Nonpersistent => "nonpersistent",
            Self::Append => "append",
        }
    }
}

/// Something that a person wants done with the disks of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "operation")]
pub enum DiskOperation {
    /// Make a disk that reads as zeroes.
    Create {
        /// Its path.
        path: String,
        /// Its size.
        size: u64,
        /// Allocate space for all of it.
        #[serde(default)]
        thick: bool,
        /// Where its data shall be.
        #[serde(default)]
        target: Option<Target>,
        /// Its data have checksums.
        #[serde(default)]
        checksums: Option<bool>,
    },
    /// All disks in a directory and in those below it.
    List {
        /// The directory.
        path: String,
        /// At most so many, 1 to 1000, in the order of their paths; all if none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u32>,
        /// Only those whose paths come after this one: `next` of an earlier answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// The snapshots of a disk, in the order in which they were made.
    ListSnapshots {
        /// The disk.
        path: String,
        /// At most so many, 1 to 1000; all if none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u32>,
        /// Only those made after this one: `next` of an earlier answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// What is known of a disk.
    Status {
        /// Its path.
        path: String,
    },
    /// Delete a disk with its snapshots.
    Delete {
        /// Its path.
        path: String,
    },
    /// Change the size of a disk.
    Resize {
        /// Its path.
        path: String,
        /// The new size.
        size: u64,
        /// What lies behind a smaller size may be lost.
        #[serde(default)]
        force: bool,
    },
    /// Keep the present state of disks, all at one moment.
    Snapshot {
        /// The disks.
        paths: Vec<String>,
        /// What it is called.
        name: String,
        /// What people want to know of it.
        #[serde(default)]
        description: String,
    },
    /// Give a snapshot another name or description.
    DescribeSnapshot {
        /// The snapshot: `/vm/root.dsk@monday`.
        path: String,
        /// Another name.
        #[serde(default)]
        name: Option<String>,
        /// Another description.
        #[serde(default)]
        description: Option<String>,
    },
    /// Make a disk what it was.
    Revert {
        /// The snapshot: `/vm/root.dsk@monday`.
        path: String,
    },
    /// Delete a snapshot; the disk and other snapshots keep what they need.
    DeleteSnapshot {
        /// The snapshot: `/vm/root.dsk@monday`.
        path: String,
    },
    /// Make a disk with the content of a disk or a snapshot. Nothing is copied.
    Clone {
        /// The disk or snapshot.
        path: String,
        /// The new disk.
        to: String,
    },
    /// What was written to the redo layer stays.
    Commit {
        /// The disk.
        path: String,
    },
    /// What was written to the redo layer goes.
    Discard {
        /// The disk.
        path: String,
    },
    /// Make the chain of a disk as short as its snapshots allow.
    Merge {
        /// The disk.
        path: String,
    },
    /// Move the data of a disk, those of its snapshots too, to where they shall be from now on. Answers with the job that does it, which
    /// goes on in the next process that has the pool open if this one ends.
    Move {
        /// The disk.
        path: String,
        /// Where.
        to: Target,
    },
    /// Which blocks differ from what they were.
    Changed {
        /// The disk.
        path: String,
        /// Since this snapshot was made.
        since: String,
        /// Until this one was made; until now if none.
        #[serde(default)]
        until: Option<String>,
    },
    /// Where a range of a snapshot is on devices, for who reads them by itself.
    Places {
        /// The snapshot: `/vm/root.dsk@monday`.
        path: String,
        /// First byte.
        offset: u64,
        /// Bytes, at most [`MAX_PLACES`].
        length: u64,
        /// The configuration identifier that is known already: if it is still the same, nothing else is told.
        #[serde(default)]
        unless: Option<String>,
    },
    /// Keep the data of a snapshot, and of the files on which it is built, from being freed, merged or moved by the file system, for a
    /// time. The snapshot may be deleted: then its name goes at once, and its data when the pin ends. Volumes may still be moved.
    Pin {
        /// The snapshot: `/vm/root.dsk@monday`.
        path: String,
        /// For so many seconds, at most [`MAX_PIN`].
        seconds: u64,
        /// The pin that this one replaces.
        #[serde(default)]
        replaces: Option<u64>,
    },
    /// End a pin.
    Unpin {
        /// Its number.
        pin: u64,
    },
}

/// The longest range that [`DiskOperation::Places`] is for, in bytes.
pub const MAX_PLACES: u64 = 256 << 20;
/// The longest time of a pin in seconds.
pub const MAX_PIN: u64 = 3600;

impl DiskOperation {
    /// Whether it changes nothing.
    pub fn only_reads(&self) -> bool {
        matches!(
            self,
            Self::List { .. }
                | Self::ListSnapshots { .. }
                | Self::Status { .. }
                | Self::Changed { .. }
                | Self::Places { .. }
        )
    }

    /// At most how many entries of a list are wanted.
    pub fn limit(&self) -> Option<u32> {
        match self {
            Self::List { limit, .. } | Self::ListSnapshots { limit, .. } => *limit,
            _ => None,
        }
    }
}

/// A disk in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VirtualDisk {
    /// Its path.
    pub path: String,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes of volumes that it has, with all its snapshots.
    pub allocated: u64,
    /// How many snapshots it has.
    pub snapshots: usize,
    /// The mode of its redo layer: writes of which it is not decided whether they stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redo: Option<DiskMode>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A snapshot of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotStatus {
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
    /// Bytes of volumes that were written between the snapshot before it and this one.
    pub allocated: u64,
}

/// What is known of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VirtualDiskStatus {
    /// In short.
    #[serde(flatten)]
    pub disk: VirtualDisk,
    /// Seconds since 1970.
    pub created: u64,
    /// What was decided for it.
    pub attributes: FileAttributes,
    /// Files through which it is read.
    pub layers: usize,
    /// Bytes of volumes that its redo layer has.
    pub redo_allocated: u64,
    /// The snapshot on which its present state is built.
    pub based_on: Option<String>,
    /// In the order in which they were made.
    pub snapshot_list: Vec<SnapshotStatus>,
    /// Layers that are still to be merged.
    pub unmerged: usize,
}

/// A range of a disk that was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// It reads as zeroes now.
    pub zero: bool,
}

/// What an operation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAnswer {
    /// It is done; there is nothing to tell.
    Done,
    /// Disks, in order of their paths.
    Disks(Vec<VirtualDisk>),
    /// Snapshots, in the order in which they were made.
    Snapshots(Vec<SnapshotStatus>),
    /// One disk.
    Status(Box<VirtualDiskStatus>),
    /// Ranges, in order.
    Changed(Vec<ChangedRange>),
    /// Where a snapshot is.
    Places(Box<DiskPlaces>),
    /// A pin.
    Pinned(DiskPin),
    /// The job that does it.
    Job(Box<JobStatus>),
}

/// Where a range of a snapshot is on devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskPlaces {
    /// What distinguishes this snapshot from all others that the disk ever had, whatever they were called.
    pub identity: String,
    /// Bytes of the whole snapshot.
    pub size: u64,
    /// Changes whenever a byte of the range gets another place. None if the range cannot be read from devices as it is.
    pub configuration: Option<String>,
    /// It is the one that was known already: the rest is empty.
    pub same: bool,
    /// Why the range cannot be read from devices as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
    /// The pool's identity.
    pub pool: String,
    /// The devices that `extents` are on.
    pub devices: Vec<PlacedOn>,
    /// In order; what is not in it reads as zeroes.
    pub extents: Vec<DeviceExtent>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PlacedOn {
    /// Its number in the pool.
    pub device: u64,
    /// Its identity, as in its label.
    pub uuid: String,
}

/// A run of a snapshot's bytes on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceExtent {
    /// First byte of the snapshot.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The device's number in the pool.
    pub device: u64,
    /// First byte on the device, from its very beginning.
    pub start: u64,
}

/// A pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskPin {
    /// Its number.
    pub pin: u64,
    /// When it ends, in seconds since 1970.
    pub until: u64,
}

/// What came of an operation on disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskOutcome {
    /// Its answer.
    pub answer: DiskAnswer,
    /// What happened meanwhile.
    pub events: Vec<PoolEvent>,
    /// Of a list, where there may be more: the `after` that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl DiskAnswer {
    /// Where a list goes on of which at most `limit` entries were wanted.
    pub fn next(&self, limit: Option<u32>) -> Option<String> {
        let (count, last) = match self {
            Self::Disks(disks) => (disks.len(), &disks.last()?.path),
            Self::Snapshots(snapshots) => (snapshots.len(), &snapshots.last()?.name),
            _ => return None,
        };
        crate::is_full(count, limit).then(|| last.clone())
    }
}

/// What an image outside of the pool is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// The bytes of the disk, one after the other.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl ImageFormat {
    /// As the command line has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An image that is to become a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImportRequest {
    /// The image, a file or a block device of the host.
    pub image: String,
    /// What it is; looked at if none.
    #[serde(default)]
    pub format: Option<ImageFormat>,
    /// Images on which it is built are read as well.
    #[serde(default)]
    pub backing: bool,
    /// The new disk.
    pub path: String,
    /// Its size, if it shall be larger than the image.
    #[serde(default)]
    pub size: Option<u64>,
    /// Allocate space for all of it.
    #[serde(default)]
    pub thick: bool,
    /// Read it again afterwards, and compare.
    #[serde(default)]
    pub verify: bool,
}

/// A disk that is to become an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ExportRequest {
    /// The disk or snapshot.
    pub path: String,
    /// The image.
    pub image: String,
    /// What it shall be.
    pub format: ImageFormat,
    /// If there is a file of that name, it is replaced.
    #[serde(default)]
    pub force: bool,
    /// Read it again afterwards, and compare.
    #[serde(default)]
    pub verify: bool,
}

/// A disk that is to be copied, with all its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CopyRequest {
    /// The disk or snapshot.
    pub path: String,
    /// The new disk.
    pub to: String,
    /// Allocate space for all of it.
    #[serde(default)]
    pub thick: bool,
    /// Read it again afterwards, and compare.
    #[serde(default)]
    pub verify: bool,
}

/// Data that are to go into a pool, out of it, or from one disk to another, while its disks are in use; the body of
/// `POST /v1/storage/transfer`. What the image is called, and what it is, matters only to who asks: that one has it open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "transfer")]
pub enum TransferRequest {
    /// An image comes in; its size must be given.
    Import(ImportRequest),
    /// A disk goes out.
    Export(ExportRequest),
    /// A disk is copied.
    Copy(CopyRequest),
    /// Ranges of a disk or snapshot go out, in the order of the request.
    Read(ReadRanges),
}

/// Ranges of a disk or snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReadRanges {
    /// The disk or snapshot.
    pub path: String,
    /// Offsets and numbers of bytes, in whole sectors of 512; in ascending order, none on another one.
    pub ranges: Vec<(u64, u64)>,
}

/// What was imported, exported or copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Transferred {
    /// The disk.
    pub path: String,
    /// What the image is; none for a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that were data.
    pub data: u64,
    /// It was read again, and is the same.
    pub verified: bool,
    /// What happened meanwhile.
    pub events: Vec<PoolEvent>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_needs_only_what_matters() {
        let text = r#"{"operation": "create", "path": "/a.dsk", "size": 4096}"#;
        let operation: DiskOperation = serde_json::from_str(text).unwrap();
        assert!(matches!(operation, DiskOperation::Create { thick: false, .. }));
        assert!(!operation.only_reads());
        let mode: DiskMode = serde_json::from_str("\"nonpersistent\"").unwrap();
        assert_eq!((mode, mode.name()), (DiskMode::Nonpersistent, "nonpersistent"));
    }
}
