//! Files of a pool: what can be asked of them and what they answer.
//!
//! Paths begin with `/`. All sizes and offsets are numbers of bytes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::storage::PoolEvent;

/// The name of the volume that holds the file system's metadata.
pub const META_VOLUME: &str = "fs-meta";

/// Something that a person wants done with the files of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "operation")]
pub enum FileOperation {
    /// Make a file system: a volume for metadata, and all others for data, whose content is lost.
    Format {
        /// Bytes of the metadata volume; by the pool's size if none.
        #[serde(default)]
        meta_size: Option<u64>,
        /// Copies of the metadata; as many as there are devices, at most 3, if none.
        #[serde(default)]
        meta_copies: Option<u32>,
        /// What the volumes carry, even a file system of this kind, may be destroyed.
        #[serde(default)]
        force: bool,
    },
    /// What is in a directory.
    List {
        /// The directory, or a file.
        path: String,
        /// What is in its directories, too.
        #[serde(default)]
        recursive: bool,
        /// At most so many, 1 to 1000, in the order of their paths; all if none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u32>,
        /// Only those whose paths come after this one: `next` of an earlier answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// Make a directory.
    MakeDirectory {
        /// Its path.
        path: String,
        /// Make those above it, too, and do not mind if it is there.
        #[serde(default)]
        parents: bool,
        /// For what is made in it.
        #[serde(default, deserialize_with = "crate::object")]
        attributes: AttributeChanges,
    },
    /// Give a file or directory another name.
    Move {
        /// The present path.
        from: String,
        /// The new one; if it is a directory, into that.
        to: String,
    },
    /// Delete a file or directory.
    Delete {
        /// Its path.
        path: String,
        /// With all that is in it.
        #[serde(default)]
        recursive: bool,
    },
    /// What is known of a file or directory.
    Stat {
        /// Its path.
        path: String,
    },
    /// Change what is decided for a file, or for what is made in a directory later.
    SetAttributes {
        /// Its path.
        path: String,
        /// What changes.
        #[serde(deserialize_with = "crate::object")]
        attributes: AttributeChanges,
    },
    /// Where the data of a file are.
    Extents {
        /// Its path, or that of a snapshot of a disk: `/vm/root.dsk@monday`.
        path: String,
    },
    /// Put the data of files in order, each on its volume.
    Defragment {
        /// A file, or a directory with all that is in it.
        path: String,
    },
    /// Move the data of files to where their attributes want them.
    Relocate {
        /// A file, or a directory with all that is in it.
        path: String,
        /// Where they shall be from now on.
        #[serde(default)]
        to: Option<Target>,
    },
    /// Empty a volume: it gets nothing new, and what files have on it moves to others.
    Drain {
        /// Its name.
        volume: String,
        /// Not any more: it is used as the others.
        #[serde(default)]
        end: bool,
    },
    /// Read all metadata and see that they agree.
    Check {
        /// Repair what can be repaired without loss.
        #[serde(default)]
        repair: bool,
    },
    /// Read everything that has a checksum, and repair it from other copies.
    Scrub,
    /// Freeze a file, and make a layer that is written instead.
    Snapshot {
        /// The file.
        path: String,
        /// The layer.
        layer: String,
    },
    /// A layer takes over what its parent has, and the parent goes.
    Merge {
        /// The layer.
        layer: String,
        /// The layer gets the parent's name.
        #[serde(default)]
        into_parent_name: bool,
    },
    /// Make a file whose content is that of a frozen one.
    Clone {
        /// The frozen file.
        frozen: String,
        /// The new file.
        path: String,
    },
    /// Change the size of a file.
    Resize {
        /// Its path.
        path: String,
        /// The new size.
        size: u64,
        /// What lies behind a smaller size may be lost.
        #[serde(default)]
        shrink: bool,
    },
}

impl FileOperation {
    /// Whether it changes nothing.
    pub fn only_reads(&self) -> bool {
        matches!(
            self,
            Self::List { .. } | Self::Stat { .. } | Self::Extents { .. } | Self::Check { repair: false }
        )
    }

    /// At most how many entries of a list are wanted.
    pub fn limit(&self) -> Option<u32> {
        match self {
            Self::List { limit, .. } => *limit,
            _ => None,
        }
    }
}

/// Bytes that are to be written to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct WriteRequest {
    /// The file; it is made if it is not there.
    pub path: String,
    /// Where to begin. The rest of the file stays as it is; without an offset, the file becomes what is written.
    #[serde(default)]
    pub offset: Option<u64>,
    /// Size of the file afterwards; by what is written if none.
    #[serde(default)]
    pub size: Option<u64>,
    /// A new file gets space for all of it.
    #[serde(default)]
    pub thick: bool,
    /// So much will come, as far as is known.
    #[serde(default)]
    pub expected: Option<u64>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Written {
    /// The file.
    pub path: String,
    /// It was made.
    pub made: bool,
    /// Bytes that came.
    pub bytes: u64,
    /// Bytes of them that were zeroes, for which nothing was written.
    pub zeroes: u64,
    /// Size of the file.
    pub size: u64,
    /// Bytes of volumes that it has.
    pub allocated: u64,
    /// What happened meanwhile.
    pub events: Vec<PoolEvent>,
}

/// Bytes that are to be read from a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReadRequest {
    /// The file.
    pub path: String,
    /// Where to begin.
    #[serde(default)]
    pub offset: u64,
    /// How much; all the rest if none.
    #[serde(default)]
    pub length: Option<u64>,
}

/// Where data shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// On any volume.
    #[default]
    Any,
    /// On this volume and no other.
    Volume(String),
    /// On volumes of this storage class.
    Class(String),
}

/// Attributes that change; those that are none stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AttributeChanges {
    /// Where data shall be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Space is allocated for all of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thick: Option<bool>,
    /// Data have checksums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksums: Option<bool>,
    /// Never migrated to cheaper storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt_from_migration: Option<bool>,
    /// The file takes no writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<bool>,
}

impl AttributeChanges {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is decided for a file, or for what is made in a directory later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileAttributes {
    /// Where data shall be.
    pub target: Target,
    /// Space is allocated for all of a file when it is made.
    pub thick: bool,
    /// Data have checksums, which reads verify.
    pub checksums: bool,
    /// Never migrated to cheaper storage.
    pub exempt_from_migration: bool,
}

/// What an entry of a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// A file.
    File,
    /// A directory.
    Directory,
}

/// A file or directory in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileEntry {
    /// Its path.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes of a file, entries of a directory.
    pub size: u64,
    /// Bytes of volumes that it has, without its parents.
    pub allocated: u64,
    /// Seconds since 1970 when it was made.
    pub created: u64,
    /// It takes no writes.
    pub frozen: bool,
    /// It has a parent, which answers for what it does not have.
    pub layer: bool,
}

/// A file or directory with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileStatus {
    /// In short.
    #[serde(flatten)]
    pub entry: FileEntry,
    /// Its number.
    pub id: u64,
    /// What is decided for it.
    pub attributes: FileAttributes,
    /// The file that answers for what it does not have: its path, or its number if it has lost its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The files whose parent it is.
    pub children: Vec<String>,
    /// It is being absorbed by its child.
    pub absorbed: bool,
    /// Bytes that its deletion would give back.
    pub exclusive: u64,
    /// Bytes that its children need as well.
    pub shared: u64,
    /// What it has on which volume.
    pub volumes: Vec<VolumeShare>,
}

/// What a file has on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeShare {
    /// The volume's name.
    pub volume: String,
    /// Bytes.
    pub bytes: u64,
}

/// A run of a file's bytes on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileExtent {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The file that has it: itself, or an ancestor.
    pub layer: String,
    /// The volume's name.
    pub volume: String,
    /// First byte on the volume.
    pub start: u64,
}

/// What came of data being moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Moved {
    /// Files that were looked at.
    pub files: u64,
    /// Bytes that were moved.
    pub moved: u64,
    /// Bytes that had to stay because there was no space for them elsewhere.
    pub stayed: u64,
}

/// How bad something is that a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Space is lost, or a number is wrong.
    Minor,
    /// Metadata contradict each other: going on may damage data.
    Major,
    /// Something is damaged or lost already.
    Loss,
}

/// Something that a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CheckFinding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// A repair mends it.
    pub repairable: bool,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// What was wrong, before anything was repaired.
    pub findings: Vec<CheckFinding>,
    /// So much more was wrong.
    pub unlisted: u64,
    /// A repair was wanted: [`Self::left`] says what is still wrong.
    pub repair: bool,
    /// Changes that the repair made.
    pub repaired: u64,
    /// What is still wrong after the repair.
    pub left: Vec<CheckFinding>,
    /// Files that were looked at.
    pub files: u64,
    /// Directories that were looked at.
    pub directories: u64,
    /// Bytes of metadata that were read.
    pub metadata: u64,
    /// Bytes of volumes that files have.
    pub allocated: u64,
}

impl CheckReport {
    /// Whether nothing is wrong, or nothing any more.
    pub fn is_well(&self) -> bool {
        let left = if self.repair { &self.left } else { &self.findings };
        left.is_empty() && self.unlisted == 0
    }
}

/// Something that a scrub could not repair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubFinding {
    /// The file, or the volume with metadata.
    pub object: String,
    /// First byte of it.
    pub offset: u64,
    /// What is wrong.
    pub problem: String,
}

/// What a scrub of files has done, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileScrub {
    /// Data that were verified, each copy counted.
    pub data: u64,
    /// Metadata that were verified, each copy counted.
    pub metadata: u64,
    /// Data that were repaired.
    pub repaired: u64,
    /// Metadata that were repaired.
    pub metadata_repaired: u64,
    /// Data whose checksum was not known, and is now.
    pub filled: u64,
    /// Other copies that could not be read, because a device is missing or fails: it is not known whether they are right.
    #[serde(default)]
    pub unread: u64,
    /// What could not be repaired.
    pub lost: u64,
    /// What that is; the first of it.
    pub findings: Vec<ScrubFinding>,
    /// It was not broken off.
    pub whole: bool,
}

/// A volume as the file system uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DataVolume {
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
    /// It takes no writes until the pool is opened again.
    pub failed: bool,
}

/// How a file system is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileSystemStatus {
    /// Bytes that files can have.
    pub size: u64,
    /// Bytes that no file has.
    pub free: u64,
    /// Bytes of the metadata volume.
    pub meta_size: u64,
    /// Bytes of it that are free.
    pub meta_free: u64,
    /// Bytes of the journal.
    pub journal: u64,
    /// The volumes with data.
    pub volumes: Vec<DataVolume>,
}

/// What an operation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileAnswer {
    /// It is done; there is nothing to tell.
    Done,
    /// Files and directories, in order of their paths.
    Entries(Vec<FileEntry>),
    /// One file or directory.
    Status(Box<FileStatus>),
    /// Where the data of a file are, in order of the file.
    Extents(Vec<FileExtent>),
    /// What was moved.
    Moved(Moved),
    /// What was found.
    Checked(CheckReport),
    /// What a scrub has found and done.
    Scrubbed(FileScrub),
    /// The file system.
    FileSystem(FileSystemStatus),
}

/// What came of an operation on files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FileOutcome {
    /// Its answer.
    pub answer: FileAnswer,
    /// What happened meanwhile.
    pub events: Vec<PoolEvent>,
    /// It was broken off; done again, it goes on.
    pub interrupted: bool,
    /// Of a list, where there may be more: the `after` that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl FileAnswer {
    /// Where a list goes on of which at most `limit` entries were wanted.
    pub fn next(&self, limit: Option<u32>) -> Option<String> {
        match self {
            Self::Entries(entries) => {
                let last = entries.last().filter(|_| crate::is_full(entries.len(), limit))?;
                Some(last.path.clone())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_needs_only_what_matters() {
        let text =
            r#"{"operation": "set-attributes", "path": "/a", "attributes": {"target": {"volume": "v"}}}"#;
        let operation: FileOperation = serde_json::from_str(text).unwrap();
        let FileOperation::SetAttributes { path, attributes } = operation else {
            panic!("{operation:?}")
        };
        assert_eq!(path, "/a");
        assert_eq!(attributes.target, Some(Target::Volume("v".into())));
        assert_eq!(attributes.thick, None);
    }

    #[test]
    fn what_only_reads_is_told_from_what_changes() {
        assert!(FileOperation::Check { repair: false }.only_reads());
        assert!(!FileOperation::Check { repair: true }.only_reads());
    }
}
