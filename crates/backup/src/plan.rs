//! The plan: what an agent tells a mover of what is to be backed up.
//!
//! A plan has a beginning ([`Plan`]), then entries in an order in which each folder comes before what is in it, and an end. It names places on
//! the *virtual* disks of a frozen image only: where these are on devices the mover asks the storage manager itself.

use serde::{Deserialize, Serialize};

use crate::raw_text::RawText;

/// Longest path in bytes.
pub const MAX_PATH: usize = 4096;
/// Longest part of a path in bytes.
pub const MAX_NAME: usize = 255;
/// Most entries of a plan.
pub const MAX_ENTRIES: u64 = 16_000_000;
/// Most entries in one message.
pub const MAX_BATCH: usize = 4096;
/// Most extents in one message.
pub const MAX_EXTENTS: usize = 16_384;
/// Most extents of one entry.
pub const MAX_EXTENTS_OF_ENTRY: u64 = 16 << 20;
/// Largest file or disk in bytes.
pub const MAX_SIZE: u64 = 1 << 60;
/// Most disks of a frozen image.
pub const MAX_DISKS: usize = 256;
/// Most sources.
pub const MAX_SOURCES: usize = 1024;
/// Most bytes of the extended attributes of an entry, names and values.
pub const MAX_XATTRS: usize = 256 << 10;

/// The beginning of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Plan {
    /// What the backup is called: 1 to 128 of `a`-`z`, `A`-`Z`, `0`-`9`, `.`, `_`, `-`, `+`, and no `.` or `-` at the beginning.
    pub name: String,
    /// The backup on which it is built: what has not changed since stays there. A full backup if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What the agent's machine calls itself.
    #[serde(default)]
    pub host: String,
    /// What people want to know of it.
    #[serde(default)]
    pub description: String,
    /// When the image was frozen.
    pub frozen: Time,
    /// The frozen image. [`Place::disk`] counts from 0 in it.
    pub disks: Vec<ImageDisk>,
    /// What was to be backed up, as a person said it.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// A backup of this name was begun and not finished: go on with it. Everything else here must be the same.
    #[serde(default)]
    pub resume: bool,
}

/// A disk of the frozen image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImageDisk {
    /// Its path in the pool: `/web1/data.dsk`.
    pub disk: String,
    /// The name of its snapshot, which does not change.
    pub snapshot: String,
    /// The configuration identifier that `freeze-image` told, for the record.
    #[serde(default)]
    pub configuration: String,
}

/// Something that was to be backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Source {
    /// A path in the guest, or a disk.
    pub path: RawText,
    /// The type of the file system, if it is on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_system: Option<String>,
    /// Its identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

/// A moment: seconds since 1970 and nanoseconds in the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Time {
    /// Seconds since 1970; before it they are negative.
    pub seconds: i64,
    /// 0 to 999,999,999.
    #[serde(default)]
    pub nanoseconds: u32,
}

/// A file, a folder, or whatever else has a name; or a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Entry {
    /// Its path without the first `/`, in its one spelling: no empty parts, no `.` and `..`, no NUL. The root folder itself is the empty
    /// path.
    pub path: RawText,
    /// Permissions: the low 12 bits of `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When its content was changed last.
    pub modified: Time,
    /// When it was read last, if that is to be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accessed: Option<Time>,
    /// Extended attributes, access control lists too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<Xattr>,
    /// What it is.
    pub kind: Kind,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Xattr {
    /// `user.comment`.
    pub name: RawText,
    /// Its bytes.
    pub value: RawText,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    tag = "is",
    deny_unknown_fields
)]
pub enum Kind {
    /// A folder.
    Directory {},
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where they are.
        content: Content,
    },
    /// A symbolic link.
    Symlink {
        /// What it says.
        target: RawText,
    },
    /// Another name of an earlier entry that is no folder.
    HardLink {
        /// The path of that entry.
        to: RawText,
    },
    /// A named pipe.
    Fifo {},
    /// A character device.
    CharacterDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A whole disk of the frozen image, as it is. The mover finds its size and what of it has data. The path is what it is called in
    /// lists: `disks/root.dsk`.
    Disk {
        /// Which, counted from 0 in [`Plan::disks`].
        disk: u32,
        /// Its size as the guest knows it: the mover refuses the plan if it is another one.
        size: u64,
    },
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    tag = "from",
    deny_unknown_fields
)]
pub enum Content {
    /// On disks of the frozen image. What is in no extent is a hole.
    Extents {
        /// In ascending order of their offsets, without overlaps, within the size of the file.
        extents: Vec<Extent>,
        /// More follow in [`crate::message::Request::Extents`]. [`crate::client::Client::entry`] sees to that.
        #[serde(default)]
        more: bool,
    },
    /// The agent sends them, for what has no place of its own on a disk: inline, encrypted, compressed.
    Stream {},
}

/// A run of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Extent {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes, at least 1. They need not be whole blocks: the last ones of a file end with it.
    pub length: u64,
    /// The disk, counted from 0 in [`Plan::disks`], and the first byte on it, not on a partition. None for what is allocated and was never
    /// written (`FIEMAP_EXTENT_UNWRITTEN`): it reads as zeroes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Place>,
}

/// A place on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Place {
    /// The disk, counted from 0 in [`Plan::disks`].
    pub disk: u32,
    /// First byte on the disk.
    pub start: u64,
}

impl Entry {
    /// Bytes of its content; 0 if it has none.
    pub fn size(&self) -> u64 {
        match &self.kind {
            Kind::File { size, .. } | Kind::Disk { size, .. } => *size,
            _ => 0,
        }
    }

    /// Whether the agent sends its content.
    pub fn is_streamed(&self) -> bool {
        matches!(
            &self.kind,
            Kind::File {
                content: Content::Stream {},
                ..
            }
        )
    }

    /// Whether extents follow in messages of their own.
    pub fn has_more(&self) -> bool {
        matches!(
            &self.kind,
            Kind::File {
                content: Content::Extents { more: true, .. },
                ..
            }
        )
    }
}
