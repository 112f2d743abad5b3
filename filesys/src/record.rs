//! Every change of the file system's metadata is one of these records, and is made by [`State::apply`](crate::state): when it happens, and
//! again when the journal is replayed after a crash. `docs/src/formats/filesys.md` has the bytes.

use std::ops::DerefMut;

use crate::entry::Entry;
use crate::inode::{Attributes, Inode, MAX_CLASS};
use crate::tree::node::FANOUT;
use crate::tree::table::MAX_DATA;
use crate::units::{FileId, MAX_ID, MAX_NAME, MAX_VOLUMES, VolumeIndex};
use crate::wire::{Malformed, Reader, Writer};

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeRecord {
    pub(crate) index: VolumeIndex,
    pub(crate) uuid: [u8; 16],
    pub(crate) name: String,
    pub(crate) class: String,
    pub(crate) clusters: u64,
    /// Object with its bitmap.
    pub(crate) bitmap: u64,
    /// Object with its checksums.
    pub(crate) sums: u64,
    /// Gets nothing new; is being emptied.
    pub(crate) draining: bool,
}

/// A time-limited promise that the blocks of a frozen file stay where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PinRecord {
    pub(crate) pin: u64,
    pub(crate) file: FileId,
    /// Seconds since 1970.
    pub(crate) until: u64,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// Entries `first..first + count` of a file become the run that begins with `entry`. Moved: the content is what it was, elsewhere.
    Map {
        file: FileId,
        first: u32,
        count: u32,
        entry: Entry,
        moved: bool,
    },
    /// Sub-clusters lose their content. Zero: a parent must not show through.
    Clear {
        file: FileId,
        first: u64,
        count: u64,
        zero: bool,
    },
    /// A file or directory appears; under a parent, which freezes, if it has one. Without a name it is an orphan that is being made.
    Create { inode: Box<Inode> },
    /// A name goes. A directory goes with it, a file dies, or waits for its children.
    Unlink { file: FileId },
    /// A file or directory gets this name; an orphan that was being made becomes a file.
    Link {
        file: FileId,
        directory: FileId,
        name: String,
    },
    /// Attributes change.
    Attributes { file: FileId, attributes: Attributes },
    /// A file is known by this from now on.
    Identity { file: FileId, identity: [u8; 16] },
    /// The size changes; what lies behind it was cleared before.
    Resize { file: FileId, size: u64 },
    /// Takes no writes any more, or takes them again.
    Freeze { file: FileId, frozen: bool },
    /// The only child of this file begins to absorb it. Named: the child will get its name.
    Absorb { parent: FileId, named: bool },
    /// The leaf with cluster `first`, where the absorbing file has nothing, becomes the absorbing file's as it is.
    AbsorbChild { parent: FileId, first: u32 },
    /// A leaf with cluster `first`: for entries whose bit is set the parent's place is kept, else the absorbing file's if it has one.
    AbsorbLeaf {
        parent: FileId,
        first: u32,
        keep: [u8; 32],
    },
    /// The parent is absorbed and gone. Named: the absorbing file gets the name that the parent had.
    Absorbed { parent: FileId, named: bool },
    /// Entries of a dying file are freed.
    Reap { file: FileId, first: u32, count: u32 },
    /// A dying file is gone.
    Reaped { file: FileId },
    /// A volume appears or changes.
    Volume(VolumeRecord),
    /// A volume without data is gone.
    NoVolume { volume: VolumeIndex },
    /// A pin appears or changes.
    Pin(PinRecord),
    /// A pin is gone.
    Unpin { pin: u64 },
    /// Checksums of this page of a volume are not to be trusted if there is a crash.
    Unchecked { volume: VolumeIndex, page: u32 },
    /// Repair: an inode becomes this one.
    MendInode { inode: Box<Inode> },
    /// Repair: a file is among the orphans, or not.
    MendOrphan { file: FileId, present: bool },
    /// Repair: an item of a directory appears or goes.
    MendName(NameMend),
    /// Repair: clusters are marked in the bitmap of a volume, or not.
    MendBits {
        volume: VolumeIndex,
        first: u64,
        count: u32,
        used: bool,
    },
    /// Repair: an object goes.
    MendObject { object: u64 },
}

/// An item of a directory as it is, whatever it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NameMend {
    pub(crate) directory: FileId,
    pub(crate) key: u64,
    pub(crate) data: Vec<u8>,
    pub(crate) present: bool,
}

const MAP: u8 = 1;
const CLEAR: u8 = 2;
const CREATE: u8 = 3;
const UNLINK: u8 = 4;
const LINK: u8 = 5;
const ATTRIBUTES: u8 = 6;
const RESIZE: u8 = 7;
const FREEZE: u8 = 8;
const ABSORB: u8 = 9;
const ABSORB_CHILD: u8 = 10;
const ABSORB_LEAF: u8 = 11;
const ABSORBED: u8 = 12;
const REAP: u8 = 13;
const REAPED: u8 = 14;
const VOLUME: u8 = 15;
const NO_VOLUME: u8 = 16;
const PIN: u8 = 17;
const UNPIN: u8 = 18;
const UNCHECKED: u8 = 19;
/// The commonest one: one cluster, not moved.
const ONE: u8 = 20;

const ABSORB_NAMED: u8 = 21;
const IDENTITY: u8 = 22;
const MEND_INODE: u8 = 32;
const MEND_ORPHAN: u8 = 33;
const MEND_NAME: u8 = 34;
const MEND_BITS: u8 = 35;
const MEND_OBJECT: u8 = 36;

/// Clusters that one record changes, at most.
const MOST_CLUSTERS: u32 = 1 << 16;
/// Sub-clusters that one record clears, at most.
const MOST_SUBS: u64 = 1 << 20;

/// Bytes of the largest record.
pub(crate) const LARGEST: usize = 1400;
/// Bytes of [`Record::Unchecked`].
pub(crate) const UNCHECKED_BYTES: usize = 8;
/// Bytes of [`Record::Map`].
pub(crate) const MAP_BYTES: usize = 34;

impl VolumeRecord {
    pub(crate) fn encode(&self, to: &mut Writer) {
        to.u16(self.index.0);
        to.bytes(&self.uuid);
        to.text(&self.name);
        to.text(&self.class);
        to.u64(self.clusters);
        to.u64(self.bitmap);
        to.u64(self.sums);
        to.u8(self.draining.into());
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let record = Self {
            index: VolumeIndex(from.u16()?),
            uuid: from.array()?,
            name: from.text(MAX_NAME)?.to_owned(),
            class: from.text(MAX_CLASS)?.to_owned(),
            clusters: from.u64()?,
            bitmap: from.u64()?,
            sums: from.u64()?,
            draining: flag(from)?,
        };
        if record.clusters >= crate::units::MAX_CLUSTERS {
            return Err(Malformed("a volume larger than can be"));
        }
        let objects = [record.bitmap, record.sums];
        if usize::from(record.index.0) >= MAX_VOLUMES
            || record.bitmap == record.sums
            || objects.iter().any(|object| *object >= MAX_ID)
        {
            return Err(Malformed("a volume with impossible numbers"));
        }
        Ok(record)
    }
}

impl PinRecord {
    pub(crate) fn encode(&self, to: &mut Writer) {
        to.u64(self.pin);
        to.u64(self.file.0);
        to.u64(self.until);
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            pin: id(from)?,
            file: FileId(id(from)?),
            until: from.u64()?,
        })
    }
}

fn id(from: &mut Reader<'_>) -> Result<u64, Malformed> {
    Some(from.u64()?)
        .filter(|id| *id < MAX_ID)
        .ok_or(Malformed("a number that is too large"))
}

/// A count that a record can have, so that no record takes long.
fn at_most<T: PartialOrd>(count: T, most: T) -> Result<T, Malformed> {
    Some(count)
        .filter(|count| *count <= most)
        .ok_or(Malformed("a record that is larger than can be"))
}

fn flag(from: &mut Reader<'_>) -> Result<bool, Malformed> {
    match from.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed("a flag is neither 0 nor 1")),
    }
}

fn entry(from: &mut Reader<'_>) -> Result<Entry, Malformed> {
    let (place, subs) = (from.u64()?, from.u32()?);
    Entry::from_parts(place, subs).ok_or(Malformed("a map entry is none"))
}

fn put_entry(entry: Entry, to: &mut Writer) {
    let (place, subs) = entry.to_parts();
    to.u64(place);
    to.u32(subs);
}

impl Record {
    /// Appends what becomes of one more cluster of a file: as a part of the last record, if it goes on where that ends in the same page of
    /// the map.
    pub(crate) fn push_map(
        records: &mut (impl DerefMut<Target = [Self]> + Extend<Self>),
        file: FileId,
        cluster: u32,
        new: Entry,
        moved: bool,
    ) {
        if let Some(Self::Map {
            first, count, entry, ..
        }) = records.last_mut()
            && *first + *count == cluster
            && entry.continues(new, u64::from(*count))
            && u64::from(*first) / FANOUT as u64 == u64::from(cluster) / FANOUT as u64
        {
            *count += 1;
            return;
        }
        records.extend(Some(Self::Map {
            file,
            first: cluster,
            count: 1,
            entry: new,
            moved,
        }));
    }

    /// Appends it.
    pub(crate) fn encode(&self, to: &mut Writer) {
        let mut of = |code: u8, id: &FileId| {
            to.u8(code);
            to.u64(id.0);
        };
        match self {
            Self::Map {
                file,
                first,
                count: 1,
                entry,
                moved: false,
            } => {
                of(ONE, file);
                to.u32(*first);
                put_entry(*entry, to);
            }
            Self::Map {
                file,
                first,
                count,
                entry,
                moved,
            } => {
                of(MAP, file);
                to.u32(*first);
                to.u32(*count);
                put_entry(*entry, to);
                to.u8((*moved).into());
            }
            Self::Clear {
                file,
                first,
                count,
                zero,
            } => {
                of(CLEAR, file);
                to.u64(*first);
                to.u64(*count);
                to.u8((*zero).into());
            }
            Self::Create { inode } => {
                to.u8(CREATE);
                inode.encode(to);
            }
            Self::Unlink { file } => of(UNLINK, file),
            Self::Link {
                file,
                directory,
                name,
            } => {
                of(LINK, file);
                to.u64(directory.0);
                to.text(name);
            }
            Self::Attributes { file, attributes } => {
                of(ATTRIBUTES, file);
                attributes.encode(to);
            }
            Self::Identity { file, identity } => {
                of(IDENTITY, file);
                to.bytes(identity);
            }
            Self::Resize { file, size } => {
                of(RESIZE, file);
                to.u64(*size);
            }
            Self::Freeze { file, frozen } => {
                of(FREEZE, file);
                to.u8((*frozen).into());
            }
            Self::Absorb { parent, named } => of(if *named { ABSORB_NAMED } else { ABSORB }, parent),
            Self::AbsorbChild { parent, first } => {
                of(ABSORB_CHILD, parent);
                to.u32(*first);
            }
            Self::AbsorbLeaf { parent, first, keep } => {
                of(ABSORB_LEAF, parent);
                to.u32(*first);
                to.bytes(keep);
            }
            Self::Absorbed { parent, named } => {
                of(ABSORBED, parent);
                to.u8((*named).into());
            }
            Self::Reap { file, first, count } => {
                of(REAP, file);
                to.u32(*first);
                to.u32(*count);
            }
            Self::Reaped { file } => of(REAPED, file),
            Self::Volume(volume) => {
                to.u8(VOLUME);
                volume.encode(to);
            }
            Self::NoVolume { volume } => {
                to.u8(NO_VOLUME);
                to.u16(volume.0);
            }
            Self::Pin(pin) => {
                to.u8(PIN);
                pin.encode(to);
            }
            Self::Unpin { pin } => {
                to.u8(UNPIN);
                to.u64(*pin);
            }
            Self::Unchecked { volume, page } => {
                to.u8(UNCHECKED);
                to.u16(volume.0);
                to.u32(*page);
            }
            Self::MendInode { inode } => {
                to.u8(MEND_INODE);
                inode.encode(to);
            }
            Self::MendOrphan { file, present } => {
                of(MEND_ORPHAN, file);
                to.u8((*present).into());
            }
            Self::MendName(name) => {
                of(MEND_NAME, &name.directory);
                to.u64(name.key);
                to.u16(u16::try_from(name.data.len()).unwrap_or(0));
                to.bytes(&name.data);
                to.u8(name.present.into());
            }
            Self::MendBits {
                volume,
                first,
                count,
                used,
            } => {
                to.u8(MEND_BITS);
                to.u16(volume.0);
                to.u64(*first);
                to.u32(*count);
                to.u8((*used).into());
            }
            Self::MendObject { object } => {
                to.u8(MEND_OBJECT);
                to.u64(*object);
            }
        }
    }

    /// Takes one.
    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let code = from.u8()?;
        let of = |from: &mut Reader<'_>| id(from).map(FileId);
        Ok(match code {
            ONE => Self::Map {
                file: of(from)?,
                first: from.u32()?,
                count: 1,
                entry: entry(from)?,
                moved: false,
            },
            MAP => Self::Map {
                file: of(from)?,
                first: from.u32()?,
                count: at_most(from.u32()?, MOST_CLUSTERS)?,
                entry: entry(from)?,
                moved: flag(from)?,
            },
            CLEAR => Self::Clear {
                file: of(from)?,
                first: from.u64()?,
                count: at_most(from.u64()?, MOST_SUBS)?,
                zero: flag(from)?,
            },
            CREATE => Self::Create {
                inode: Box::new(Inode::decode(from)?),
            },
            UNLINK => Self::Unlink { file: of(from)? },
            LINK => Self::Link {
                file: of(from)?,
                directory: of(from)?,
                name: from.text(MAX_NAME)?.to_owned(),
            },
            ATTRIBUTES => Self::Attributes {
                file: of(from)?,
                attributes: Attributes::decode(from)?,
            },
            IDENTITY => Self::Identity {
                file: of(from)?,
                identity: from.array()?,
            },
            RESIZE => Self::Resize {
                file: of(from)?,
                size: from.u64()?,
            },
            FREEZE => Self::Freeze {
                file: of(from)?,
                frozen: flag(from)?,
            },
            code @ (ABSORB | ABSORB_NAMED) => Self::Absorb {
                parent: of(from)?,
                named: code == ABSORB_NAMED,
            },
            ABSORB_CHILD => Self::AbsorbChild {
                parent: of(from)?,
                first: from.u32()?,
            },
            ABSORB_LEAF => Self::AbsorbLeaf {
                parent: of(from)?,
                first: from.u32()?,
                keep: from.array()?,
            },
            ABSORBED => Self::Absorbed {
                parent: of(from)?,
                named: flag(from)?,
            },
            REAP => Self::Reap {
                file: of(from)?,
                first: from.u32()?,
                count: at_most(from.u32()?, MOST_CLUSTERS)?,
            },
            REAPED => Self::Reaped { file: of(from)? },
            VOLUME => Self::Volume(VolumeRecord::decode(from)?),
            NO_VOLUME => Self::NoVolume {
                volume: VolumeIndex(from.u16()?),
            },
            PIN => Self::Pin(PinRecord::decode(from)?),
            UNPIN => Self::Unpin { pin: id(from)? },
            UNCHECKED => Self::Unchecked {
                volume: VolumeIndex(from.u16()?),
                page: from.u32()?,
            },
            MEND_INODE => Self::MendInode {
                inode: Box::new(Inode::decode(from)?),
            },
            MEND_ORPHAN => Self::MendOrphan {
                file: of(from)?,
                present: flag(from)?,
            },
            MEND_NAME => Self::MendName(NameMend {
                directory: of(from)?,
                key: from.u64()?,
                data: {
                    let length = usize::from(from.u16()?);
                    if length > MAX_DATA {
                        return Err(Malformed("an item that is too long"));
                    }
                    from.bytes(length)?.to_vec()
                },
                present: flag(from)?,
            }),
            MEND_BITS => Self::MendBits {
                volume: VolumeIndex(from.u16()?),
                first: from.u64()?,
                count: from.u32()?,
                used: flag(from)?,
            },
            MEND_OBJECT => Self::MendObject { object: id(from)? },
            _ => return Err(Malformed("a record of an unknown kind")),
        })
    }
}
