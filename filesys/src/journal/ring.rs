//! The ring and its blocks: what identifies a block, encoded and decoded.
//!
//! Positions count blocks as if the journal were endless; the block at position `p` lies in block `p mod length` of the ring.
//! So a block that is left from an older lap has another position and is never taken for a new one.

use crate::checksum::crc32c;
use crate::meta_io::{BLOCK, MOST, put, take, take_u64};
use crate::superblock::Region;
use crate::superblock::layout::{MAX_JOURNAL, MIN_JOURNAL};

/// Bytes of a block before its part of the group.
pub(super) const HEADER: usize = 64;
/// Bytes of a group in one block.
pub(super) const PAYLOAD: usize = BLOCK - HEADER;
/// Most blocks of a group.
pub(super) const MOST_BLOCKS: u64 = 16383;

const MAGIC: [u8; 8] = *b"SMSFSJRN";
const CHECKSUM: usize = 8;
/// Where the checksum's cover begins.
const COVERED: usize = 12;

/// Where a group begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Position {
    /// Its number; the first group of a file system has number 1.
    pub(crate) group: u64,
    /// The position of its first block, counted as if the ring were endless.
    pub(crate) block: u64,
    /// Checksum of the last block of the group before; of the first group, any number.
    pub(crate) previous: u32,
}

/// Where the ring lies and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ring {
    /// Its blocks on the metadata volume.
    pub(crate) region: Region,
    /// The UUID of the file system.
    pub(crate) uuid: [u8; 16],
}

impl Ring {
    /// Whether all positions in it can be computed from `from` on.
    pub(super) fn is_possible(&self, from: &Position) -> bool {
        (MIN_JOURNAL..=MAX_JOURNAL).contains(&self.region.blocks)
            && self.region.first < MOST
            && from.block < MOST
            && (1..MOST).contains(&from.group)
    }

    /// The block of the ring at a position.
    pub(super) fn index(&self, position: u64) -> u64 {
        position.checked_rem(self.region.blocks).unwrap_or(0)
    }

    /// The block of the volume at a position.
    pub(super) fn place(&self, position: u64) -> u64 {
        self.region.first.saturating_add(self.index(position))
    }

    /// Most blocks of a group.
    pub(super) fn most_blocks(&self) -> u64 {
        self.region.blocks.min(MOST_BLOCKS)
    }
}

/// Blocks for so many bytes of a group.
pub(super) fn blocks_for(bytes: usize) -> u64 {
    bytes.div_ceil(PAYLOAD) as u64
}

/// What a block says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Writable opening in which it was written.
    pub(super) incarnation: u64,
    pub(super) group: u64,
    pub(super) position: u64,
    /// Its number within the group, and how many the group has.
    pub(super) index: u16,
    pub(super) count: u16,
    /// Bytes of the group in it.
    pub(super) used: u16,
    /// Checksum of the last block of the group before.
    pub(super) previous: u32,
}

/// Writes a block, which is zeroed but for its payload; returns its checksum.
pub(super) fn encode(header: &Header, uuid: [u8; 16], block: &mut [u8]) -> u32 {
    put(block, 0, &MAGIC);
    put(block, 12, &header.previous.to_le_bytes());
    put(block, 16, &uuid);
    put(block, 32, &header.incarnation.to_le_bytes());
    put(block, 40, &header.group.to_le_bytes());
    put(block, 48, &header.position.to_le_bytes());
    put(block, 56, &header.index.to_le_bytes());
    put(block, 58, &header.count.to_le_bytes());
    put(block, 60, &header.used.to_le_bytes());
    let checksum = block.get(COVERED..).map_or(0, crc32c);
    put(block, CHECKSUM, &checksum.to_le_bytes());
    checksum
}

/// Header and checksum of a block, if it is a whole one of this file system and can be at `position`.
pub(super) fn decode(block: &[u8], ring: &Ring) -> Option<(Header, u32)> {
    if block.len() != BLOCK || !block.starts_with(&MAGIC) {
        return None;
    }
    let checksum = u32::from_le_bytes(take(block, CHECKSUM));
    if block.get(COVERED..).map(crc32c) != Some(checksum) {
        block_io::cover!("journal: a torn or damaged block");
        return None;
    }
    if take(block, 16) != ring.uuid {
        block_io::cover!("journal: a block of another file system");
        return None;
    }
    let short = |at| u16::from_le_bytes(take(block, at));
    let header = Header {
        incarnation: take_u64(block, 32),
        group: take_u64(block, 40),
        position: take_u64(block, 48),
        index: short(56),
        count: short(58),
        used: short(60),
        previous: u32::from_le_bytes(take(block, 12)),
    };
    header.is_possible(ring).then_some((header, checksum))
}

impl Header {
    fn is_possible(&self, ring: &Ring) -> bool {
        let last = self.index.checked_add(1) == Some(self.count);
        let used = usize::from(self.used);
        self.index < self.count
            && u64::from(self.count) <= ring.most_blocks()
            && (used == PAYLOAD || (last && (1..PAYLOAD).contains(&used)))
            && self.position >= u64::from(self.index)
            && [self.incarnation, self.group, self.position]
                .iter()
                .all(|counter| *counter < MOST)
    }
}
