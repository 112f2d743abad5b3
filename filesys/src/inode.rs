//! What the file system knows of a file or directory beside its content.
//!
//! # Chains
//! A file may have a *parent*: where its map has a hole, the parent is asked. A file that is a parent is frozen. The children of a parent
//! are a list through the inodes: `first_child`, then `next_sibling`.
//!
//! ```text
//!   base.dsk ◄── monday.redo ◄── head.redo          frozen, frozen, written
//!                     ▲
//!                     └───────── clone.redo         a parent may have several children
//! ```
//!
//! A parent that is deleted while it has children loses its name and waits ([`Flags::UNLINKED`]) until one child is left, which then
//! absorbs it.

use crate::meta_io::MOST;
use crate::units::{CLUSTER, FileId, MAX_FILE, MAX_ID, MAX_NAME, VolumeIndex};
use crate::wire::{Malformed, Reader, Writer};

/// The longest name of a storage class.
pub(crate) const MAX_CLASS: usize = 64;

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File,
    /// A directory.
    Directory,
}

/// Where the data of a file shall lie.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Target {
    /// On any volume: the one with the most free space when the file is made.
    #[default]
    Any,
    /// On this volume and no other.
    Volume(VolumeIndex),
    /// On volumes of this storage class.
    Class(String),
}

/// What an administrator decides for a file, or for all that is made in a directory later.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Where the data shall lie.
    pub target: Target,
    /// Space for all of the file is allocated when it is made.
    pub thick: bool,
    /// Data have checksums, which reads verify.
    pub checksums: bool,
    /// Never migrated to cheaper storage.
    pub exempt_from_migration: bool,
}

/// States of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Flags(u16);

impl Flags {
    /// Takes no writes: it is a parent, or was frozen by request.
    pub(crate) const FROZEN: Self = Self(1);
    /// Has no name; it waits for its children to be few enough.
    pub(crate) const UNLINKED: Self = Self(2);
    /// Is being deleted.
    pub(crate) const DYING: Self = Self(4);
    /// Is being absorbed by its only child.
    pub(crate) const ABSORBED: Self = Self(8);
    /// The child that absorbs it gets its name.
    pub(crate) const GIVES_NAME: Self = Self(16);
    const KNOWN: u16 = 31;

    pub(crate) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(crate) fn set(&mut self, flag: Self, value: bool) {
        if value {
            self.0 |= flag.0;
        } else {
            self.0 &= !flag.0;
        }
    }
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) id: FileId,
    pub(crate) kind: Kind,
    pub(crate) flags: Flags,
    /// The directory that it is in; meaningless without a name.
    pub(crate) directory: FileId,
    pub(crate) name: String,
    /// Bytes; of a directory, how many entries.
    pub(crate) size: u64,
    /// Seconds since 1970, as told by who made it.
    pub(crate) created: u64,
    /// The volume on which it began.
    pub(crate) home: VolumeIndex,
    pub(crate) attributes: Attributes,
    /// By which those outside know the file: see [`crate::FileSystem::set_identity`].
    pub(crate) identity: Option<[u8; 16]>,
    pub(crate) parent: Option<FileId>,
    pub(crate) first_child: Option<FileId>,
    pub(crate) next_sibling: Option<FileId>,
    pub(crate) previous_sibling: Option<FileId>,
    pub(crate) children: u32,
    /// Grows whenever something of it that had a place gets another one or loses it.
    pub(crate) placement: u64,
    /// Clusters that its map has places for.
    pub(crate) allocated: u64,
}

/// Most children of a parent.
const MOST_CHILDREN: u32 = u32::MAX / 2;

/// Beside the flags: the inode ends with its identity.
const HAS_IDENTITY: u16 = 32;
const FILE: u8 = 1;
const DIRECTORY: u8 = 2;
const THICK: u8 = 1;
const CHECKSUMS: u8 = 2;
const EXEMPT: u8 = 4;

impl Attributes {
    pub(crate) fn encode(&self, to: &mut Writer) {
        let flags = [
            (self.thick, THICK),
            (self.checksums, CHECKSUMS),
            (self.exempt_from_migration, EXEMPT),
        ];
        to.u8(flags.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum());
        match &self.target {
            Target::Any => to.u8(0),
            Target::Volume(volume) => {
                to.u8(1);
                to.u16(volume.0);
            }
            Target::Class(class) => {
                to.u8(2);
                to.text(class);
            }
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let flags = from.u8()?;
        if flags & !(THICK | CHECKSUMS | EXEMPT) != 0 {
            return Err(Malformed("attributes that are not known"));
        }
        let target = match from.u8()? {
            0 => Target::Any,
            1 => Target::Volume(VolumeIndex(from.u16()?)),
            2 => Target::Class(from.text(MAX_CLASS)?.to_owned()),
            _ => return Err(Malformed("a target that is not known")),
        };
        Ok(Self {
            target,
            thick: flags & THICK != 0,
            checksums: flags & CHECKSUMS != 0,
            exempt_from_migration: flags & EXEMPT != 0,
        })
    }
}

impl Inode {
    /// A new file or directory.
    pub(crate) fn new(id: FileId, kind: Kind, directory: FileId, name: &str) -> Self {
        Self {
            id,
            kind,
            flags: Flags::default(),
            directory,
            name: name.to_owned(),
            size: 0,
            created: 0,
            home: VolumeIndex(0),
            attributes: Attributes::default(),
            identity: None,
            parent: None,
            first_child: None,
            next_sibling: None,
            previous_sibling: None,
            children: 0,
            placement: 0,
            allocated: 0,
        }
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.flags.has(Flags::FROZEN)
    }

    /// Whether it can be found by a name.
    pub(crate) fn is_linked(&self) -> bool {
        !self.flags.has(Flags::UNLINKED) && !self.flags.has(Flags::DYING)
    }

    pub(crate) fn encode(&self, to: &mut Writer) {
        to.u64(self.id.0);
        to.u8(match self.kind {
            Kind::File => FILE,
            Kind::Directory => DIRECTORY,
        });
        to.u16(self.flags.0 | if self.identity.is_some() { HAS_IDENTITY } else { 0 });
        to.u64(self.directory.0);
        to.text(&self.name);
        to.u64(self.size);
        to.u64(self.created);
        to.u16(self.home.0);
        self.attributes.encode(to);
        for link in [
            self.parent,
            self.first_child,
            self.next_sibling,
            self.previous_sibling,
        ] {
            to.maybe(link.map(|id| id.0));
        }
        to.u32(self.children);
        to.u64(self.placement);
        to.u64(self.allocated);
        if let Some(identity) = &self.identity {
            to.bytes(identity);
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = FileId(from.u64()?);
        let kind = match from.u8()? {
            FILE => Kind::File,
            DIRECTORY => Kind::Directory,
            _ => return Err(Malformed("an inode of an unknown kind")),
        };
        let bits = from.u16()?;
        let has_identity = bits & HAS_IDENTITY != 0;
        let flags = Flags(bits & !HAS_IDENTITY);
        if flags.0 & !Flags::KNOWN != 0 {
            return Err(Malformed("an inode in an unknown state"));
        }
        let mut inode = Self {
            id,
            kind,
            flags,
            directory: FileId(from.u64()?),
            name: from.text(MAX_NAME)?.to_owned(),
            size: from.u64()?,
            created: from.u64()?,
            home: VolumeIndex(from.u16()?),
            attributes: Attributes::decode(from)?,
            identity: None,
            parent: from.maybe()?.map(FileId),
            first_child: from.maybe()?.map(FileId),
            next_sibling: from.maybe()?.map(FileId),
            previous_sibling: from.maybe()?.map(FileId),
            children: from.u32()?,
            placement: from.u64()?,
            allocated: from.u64()?,
        };
        if has_identity {
            inode.identity = Some(from.array()?);
        }
        inode.is_possible().map(|()| inode)
    }

    /// Bounds of numbers, so that counting on from them never overflows.
    fn is_possible(&self) -> Result<(), Malformed> {
        let links = [
            self.parent,
            self.first_child,
            self.next_sibling,
            self.previous_sibling,
        ];
        let ids = links.into_iter().flatten().chain([self.id, self.directory]);
        if ids.into_iter().any(|id| id.0 >= MAX_ID) {
            return Err(Malformed("an inode with a number that is too large"));
        }
        let too_large = match self.kind {
            Kind::File => self.size > MAX_FILE || !self.size.is_multiple_of(512),
            Kind::Directory => self.size >= MAX_ID,
        };
        if too_large || self.allocated > MAX_FILE / CLUSTER {
            return Err(Malformed("an inode of a size that cannot be"));
        }
        if self.placement >= MOST || self.children > MOST_CHILDREN {
            return Err(Malformed("an inode with counts that cannot be"));
        }
        Ok(())
    }

    /// The inode as an item of the table of inodes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        self.encode(&mut writer);
        writer.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let inode = Self::decode(&mut reader)?;
        if !reader.is_empty() {
            return Err(Malformed("an inode with bytes left over"));
        }
        Ok(inode)
    }
}
