//! A page of the bitmap on the volume: 32 bytes that identify it, and the bits of 32,512 blocks.

use crate::checksum::crc32c;
use crate::meta_io::{put, take, take_u64};

use super::WORDS_PER_PAGE;

const MAGIC: [u8; 4] = *b"SMBM";
const CHECKSUM: usize = 4;
/// Where the checksum's cover begins.
const COVERED: usize = 8;
const BITS: usize = 32;

/// Writes a page into a zeroed block.
pub(super) fn encode(block: &mut [u8], index: u64, number: u64, uuid: [u8; 16], words: &[u64]) {
    debug_assert_eq!(words.len(), WORDS_PER_PAGE);
    put(block, 0, &MAGIC);
    put(block, 8, &number.to_le_bytes());
    put(block, 16, &identity(uuid).to_le_bytes());
    put(block, 24, &index.to_le_bytes());
    for (place, word) in words.iter().enumerate() {
        put(block, BITS + place * 8, &word.to_le_bytes());
    }
    let checksum = block.get(COVERED..).map_or(0, crc32c);
    put(block, CHECKSUM, &checksum.to_le_bytes());
}

/// Reads the bits of page `index` of the bitmap `number` or of one that was in its place before.
pub(super) fn decode(
    block: &[u8],
    index: u64,
    number: u64,
    uuid: [u8; 16],
) -> Result<Vec<u64>, &'static str> {
    if !block.starts_with(&MAGIC) {
        return Err("no magic number");
    }
    if block.get(COVERED..).map(crc32c) != Some(u32::from_le_bytes(take(block, CHECKSUM))) {
        return Err("wrong checksum");
    }
    if take_u64(block, 24) != index || take_u64(block, 16) != identity(uuid) {
        return Err("it belongs to another place or file system");
    }
    let written = take_u64(block, 8);
    if written > number || written % 2 != number % 2 {
        return Err("it is of another time");
    }
    let (words, _) = block.get(BITS..).unwrap_or_default().as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// The number of the bitmap with which a valid page was written.
pub(super) fn number(block: &[u8]) -> u64 {
    take_u64(block, 8)
}

/// The identity of the file system, folded into 8 bytes: its two halves, exclusive or.
fn identity(uuid: [u8; 16]) -> u64 {
    take_u64(&uuid, 0) ^ take_u64(&uuid, 8)
}
