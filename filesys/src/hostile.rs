//! The parsers of everything on media, for the fuzz targets in `tests/fuzz-harness`. Nothing else calls this.

use crate::inode::Inode;
use crate::journal;
use crate::meta_space;
use crate::record::{PinRecord, Record, VolumeRecord};
use crate::state::read_name;
use crate::superblock;
use crate::tree::codec::{self, Kind, PAGE};
use crate::tree::node::Ptr;
use crate::wire::{Reader, Writer};

/// What there is on media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub enum Structure {
    /// A copy of the superblock: a block.
    Superblock,
    /// A page of the metadata bitmap: a block.
    Bitmap,
    /// A block of the journal.
    Journal,
    /// Records of a group.
    Records,
    /// A page of a tree: kind 1 to 5, level.
    Page(u8, u8),
    /// The slot of an object.
    Root,
    /// An inode.
    Inode,
    /// A volume.
    Volume,
    /// A pin.
    Pin,
    /// A name in a directory.
    Name,
}

/// Parses bytes as a structure; checksums are computed before. What is taken is written again and must be the same.
///
/// # Panics
/// What was parsed is not what is written again.
#[doc(hidden)]
pub fn parse(structure: Structure, bytes: &[u8]) -> bool {
    let mut writer = Writer::default();
    match structure {
        Structure::Superblock => superblock::survives(bytes),
        Structure::Bitmap => meta_space::survives(bytes),
        Structure::Journal => journal::survives(bytes),
        Structure::Records => {
            let mut reader = Reader(bytes);
            let mut any = false;
            while !reader.is_empty() {
                let Ok(record) = Record::decode(&mut reader) else {
                    return any;
                };
                writer.0.clear();
                record.encode(&mut writer);
                assert_eq!(Record::decode(&mut Reader(&writer.0)), Ok(record));
                any = true;
            }
            any
        }
        Structure::Page(kind, level) => page(kind, level, bytes),
        Structure::Root => {
            let Some(slot) = bytes.first_chunk::<16>() else {
                return false;
            };
            match codec::decode_root(slot) {
                Ok(Some(root)) => {
                    assert_eq!(codec::encode_root(&root), *slot);
                    true
                }
                Ok(None) | Err(_) => false,
            }
        }
        Structure::Inode => match Inode::from_bytes(bytes) {
            Ok(inode) => {
                assert_eq!(Inode::from_bytes(&inode.to_bytes()), Ok(inode));
                true
            }
            Err(_) => false,
        },
        Structure::Volume => match VolumeRecord::decode(&mut Reader(bytes)) {
            Ok(volume) => {
                volume.encode(&mut writer);
                assert_eq!(VolumeRecord::decode(&mut Reader(&writer.0)), Ok(volume));
                true
            }
            Err(_) => false,
        },
        Structure::Pin => match PinRecord::decode(&mut Reader(bytes)) {
            Ok(pin) => {
                pin.encode(&mut writer);
                assert_eq!(bytes.get(..24), Some(&*writer.0));
                true
            }
            Err(_) => false,
        },
        Structure::Name => read_name(bytes).is_ok(),
    }
}

fn page(kind: u8, level: u8, bytes: &[u8]) -> bool {
    let Some(kind) = [Kind::Map, Kind::Bits, Kind::Sums, Kind::Table, Kind::Objects]
        .into_iter()
        .nth(usize::from(kind.wrapping_sub(1)))
    else {
        return false;
    };
    let mut bytes = bytes.to_vec();
    bytes.resize(PAGE, 0);
    let ptr = Ptr {
        block: 1,
        crc: crate::checksum::crc32c(&bytes),
        aux: 0,
        level,
    };
    let Ok(node) = codec::decode(ptr, kind, &bytes) else {
        return false;
    };
    let mut again = vec![0; PAGE];
    codec::encode(&node, &mut again);
    let ptr = Ptr {
        crc: crate::checksum::crc32c(&again),
        ..ptr
    };
    let twice = codec::decode(ptr, kind, &again);
    assert!(
        twice.is_ok(),
        "a page that was read is written as one that is not"
    );
    true
}
