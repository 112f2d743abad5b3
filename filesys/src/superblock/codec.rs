//! The bytes of a copy: 512, then zeroes to the end of the block. `docs/src/formats/filesys-journal.md` has the table.

use block_io::cover;

use super::choose::Found;
use super::layout::{COPIES, Layout, Region, copy_place};
use super::{Features, Root, Superblock, counters_are_possible};
use crate::checksum::crc32c;
use crate::journal::Position;
use crate::meta_io::{put, take, take_u64};
use crate::meta_space::SpaceState;

/// Bytes that count. A power cut leaves a sector whole, so they are old or new.
pub(super) const BODY: usize = 512;
/// The format's version.
pub(crate) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"SMSFSSUP";
const CHECKSUM: usize = 8;
const COPY: usize = 12;
/// Where the checksum's cover begins.
const COVERED: usize = 16;
const CLEAN: u32 = 1;
const HAS_TAIL: u32 = 2;

/// Writes copy number `copy` into a zeroed block.
pub(super) fn encode(superblock: &Superblock, copy: usize, block: &mut [u8]) {
    let Superblock {
        features,
        layout,
        replay,
        ..
    } = superblock;
    let flag = |is_so, bit| if is_so { bit } else { 0 };
    let flags = flag(superblock.clean, CLEAN) | flag(superblock.has_tail, HAS_TAIL);
    put(block, 0, &MAGIC);
    put(
        block,
        COPY,
        &u16::try_from(copy).unwrap_or(u16::MAX).to_le_bytes(),
    );
    put(block, 16, &VERSION.to_le_bytes());
    put(block, 20, &flags.to_le_bytes());
    put(block, 24, &features.incompatible.to_le_bytes());
    put(block, 32, &features.read_only_compatible.to_le_bytes());
    put(block, 40, &features.compatible.to_le_bytes());
    put(block, 48, &superblock.uuid);
    put(block, 64, &superblock.sequence.to_le_bytes());
    put(block, 72, &superblock.incarnation.to_le_bytes());
    put(block, 80, &layout.size_blocks.to_le_bytes());
    for (at, region) in [
        (88, layout.journal),
        (104, layout.bitmaps[0]),
        (120, layout.bitmaps[1]),
    ] {
        put(block, at, &region.first.to_le_bytes());
        put(block, at + 8, &region.blocks.to_le_bytes());
    }
    put(block, 136, &replay.group.to_le_bytes());
    put(block, 144, &replay.block.to_le_bytes());
    put(block, 152, &replay.previous.to_le_bytes());
    put(block, 156, &superblock.space.checksum.to_le_bytes());
    put(block, 160, &superblock.space.number.to_le_bytes());
    put(block, 168, &superblock.root.slot);
    put(block, 184, &[superblock.root.level]);
    put(block, 192, &superblock.next_object.to_le_bytes());
    put(block, 200, &superblock.name_hash_seed.to_le_bytes());
    put(block, 208, &superblock.unbroken.to_le_bytes());
    let checksum = block.get(COVERED..BODY).map_or(0, crc32c);
    put(block, CHECKSUM, &checksum.to_le_bytes());
}

/// What a block at `place` is as copy number `copy`.
pub(super) fn decode(block: &[u8], copy: usize, place: u64) -> Found {
    let Some(body) = block.first_chunk::<BODY>() else {
        return Found::NoMagic;
    };
    if !body.starts_with(&MAGIC) {
        return Found::NoMagic;
    }
    if crc32c(&body[COVERED..]) != u32::from_le_bytes(take(body, CHECKSUM)) {
        cover!("superblock: a damaged copy");
        return Found::Damaged("does not match its checksum");
    }
    let version = u32::from_le_bytes(take(body, 16));
    if version != VERSION {
        return Found::Foreign(version);
    }
    let superblock = fields(body);
    if !counters_are_possible(&superblock) || superblock.layout.check().is_err() {
        return Found::Damaged("has impossible values");
    }
    let number = usize::from(u16::from_le_bytes(take(body, COPY)));
    if number != copy || copy >= COPIES || copy_place(copy, superblock.layout.size_blocks) != place {
        cover!("superblock: a copy in another's place");
        return Found::Damaged("belongs to another place");
    }
    let mut identical = *body;
    put(&mut identical, COPY, &[0; 4]);
    Found::Valid(Box::new(superblock), Box::new(identical))
}

fn fields(body: &[u8]) -> Superblock {
    let region = |at| Region {
        first: take_u64(body, at),
        blocks: take_u64(body, at + 8),
    };
    let [level] = take(body, 184);
    let flags = u32::from_le_bytes(take(body, 20));
    Superblock {
        features: Features {
            incompatible: take_u64(body, 24),
            read_only_compatible: take_u64(body, 32),
            compatible: take_u64(body, 40),
        },
        uuid: take(body, 48),
        sequence: take_u64(body, 64),
        incarnation: take_u64(body, 72),
        layout: Layout {
            size_blocks: take_u64(body, 80),
            journal: region(88),
            bitmaps: [region(104), region(120)],
        },
        replay: Position {
            group: take_u64(body, 136),
            block: take_u64(body, 144),
            previous: u32::from_le_bytes(take(body, 152)),
        },
        space: SpaceState {
            number: take_u64(body, 160),
            checksum: u32::from_le_bytes(take(body, 156)),
        },
        root: Root {
            slot: take(body, 168),
            level,
        },
        next_object: take_u64(body, 192),
        name_hash_seed: take_u64(body, 200),
        clean: flags & CLEAN != 0,
        has_tail: flags & HAS_TAIL != 0,
        unbroken: take_u64(body, 208),
    }
}
