//! What a parity log looks like on media: pure functions of bytes. The tables are in the module above.

use block_io::cover;
use zerocopy::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::Identity;
use crate::checksum::crc32c;

/// Bytes of a block of the ring.
pub(super) const BLOCK: usize = 4096;
/// Most pieces of a record.
pub const MAX_PIECES: usize = 192;
const BITMAP: usize = 928;
/// Most payload blocks of a record: one bit for each must fit into the header.
pub(super) const MAX_PAYLOAD_BLOCKS: usize = BITMAP * 8;
const MAGIC: [u8; 8] = *b"SMSVPLOG";
const VERSION: u32 = 1;
const COVERED: usize = 12;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    checksum: U32,
    version: U32,
    sequence: U64,
    tail: U64,
    volume: U128,
    section: U64,
    row: U64,
    payload: U32,
    payload_checksum: U32,
    pieces: U32,
    reserved: [u8; 20],
    places: [Place; MAX_PIECES],
    escaped: [u8; BITMAP],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy)]
#[repr(C)]
struct Place {
    column: U32,
    length: U32,
    offset: U64,
}

const _: () = assert!(size_of::<Header>() == BLOCK);
const _: () = assert!(size_of::<Place>() == 16);

/// New content of a part of a column's unit in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Which column.
    pub column: u32,
    /// First byte within the column's unit of the row.
    pub offset: u64,
    /// The new content.
    pub data: &'a [u8],
}

/// A valid header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) sequence: u64,
    pub(super) tail: u64,
    pub(super) row: u64,
    /// With the header.
    pub(super) blocks: u64,
    payload: usize,
    payload_checksum: u32,
    /// Column, offset, length.
    places: Vec<(u32, u64, usize)>,
    escaped: Vec<u8>,
}

/// Blocks of a record with so many bytes of payload.
pub(super) fn blocks(payload: usize) -> usize {
    1 + payload.div_ceil(BLOCK)
}

/// Writes a record into `target`, which has as many blocks as it needs.
pub(super) fn encode(
    target: &mut [u8],
    identity: Identity,
    sequence: u64,
    tail: u64,
    row: u64,
    pieces: &[Piece<'_>],
) {
    let (head, payload) = target.split_at_mut(BLOCK);
    let mut end = 0;
    for piece in pieces {
        payload[end..end + piece.data.len()].copy_from_slice(piece.data);
        end += piece.data.len();
    }
    payload[end..].fill(0);
    let Ok(header) = Header::mut_from_bytes(head) else {
        return;
    };
    header.zero();
    header.magic = MAGIC;
    header.version = VERSION.into();
    header.sequence = sequence.into();
    header.tail = tail.into();
    header.volume = identity.volume.0.into();
    header.section = identity.section.into();
    header.row = row.into();
    header.payload = small(end).into();
    header.pieces = small(pieces.len()).into();
    for (place, piece) in header.places.iter_mut().zip(pieces) {
        place.column = piece.column.into();
        place.length = small(piece.data.len()).into();
        place.offset = piece.offset.into();
    }
    for (index, block) in payload.chunks_exact_mut(BLOCK).enumerate() {
        if block.starts_with(&MAGIC) {
            cover!("parity log: a payload that looks like a header");
            block[..MAGIC.len()].fill(0);
            header.escaped[index / 8] |= 1 << (index % 8);
        }
    }
    header.payload_checksum = crc32c(payload).into();
    header.checksum = crc32c(&header.as_bytes()[COVERED..]).into();
}

/// Callers have compared with the greatest record.
fn small(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The header in block `slot` of a ring of `ring` blocks, if it is a valid one of this section.
pub(super) fn decode_header(block: &[u8], identity: Identity, slot: u64, ring: u64) -> Option<Found> {
    let header = Header::ref_from_bytes(block).ok()?;
    if header.magic != MAGIC {
        return None;
    }
    if crc32c(block.get(COVERED..)?) != header.checksum.get() {
        cover!("parity log: torn header refused");
        return None;
    }
    let ours = header.version.get() == VERSION
        && header.volume.get() == identity.volume.0
        && header.section.get() == identity.section;
    let sequence = header.sequence.get();
    let placed = sequence.checked_rem(ring)? == slot && sequence < 1 << 62 && header.tail.get() <= sequence;
    let payload = usize::try_from(header.payload.get()).ok()?;
    let size = blocks(payload) as u64;
    let pieces = usize::try_from(header.pieces.get()).ok()?;
    if !ours || !placed || size - 1 > MAX_PAYLOAD_BLOCKS as u64 || slot + size > ring {
        return None;
    }
    let mut total = 0_usize;
    let mut places = Vec::with_capacity(pieces.min(MAX_PIECES));
    for place in header.places.get(..pieces)? {
        let length = usize::try_from(place.length.get()).ok()?;
        total = total.checked_add(length)?;
        place.offset.get().checked_add(length as u64)?;
        places.push((place.column.get(), place.offset.get(), length));
    }
    (total == payload).then(|| Found {
        sequence,
        tail: header.tail.get(),
        row: header.row.get(),
        blocks: size,
        payload,
        payload_checksum: header.payload_checksum.get(),
        places,
        escaped: header.escaped.to_vec(),
    })
}

impl Found {
    /// Bytes of payload on media.
    pub(super) fn padded(&self) -> usize {
        self.payload.next_multiple_of(BLOCK)
    }

    /// Whether it only moves the tail.
    pub(super) fn is_checkpoint(&self) -> bool {
        self.places.is_empty()
    }

    /// The pieces in a payload as it was read, if that is whole.
    pub(super) fn pieces<'a>(&self, payload: &'a mut [u8]) -> Option<Vec<Piece<'a>>> {
        if payload.len() != self.padded() || crc32c(payload) != self.payload_checksum {
            cover!("parity log: torn payload refused");
            return None;
        }
        for (index, block) in payload.chunks_exact_mut(BLOCK).enumerate() {
            if self.escaped.get(index / 8)? & (1 << (index % 8)) != 0 {
                block[..MAGIC.len()].copy_from_slice(&MAGIC);
            }
        }
        let mut rest: &[u8] = payload;
        let mut pieces = Vec::with_capacity(self.places.len());
        for (column, offset, length) in &self.places {
            let (data, after) = rest.split_at_checked(*length)?;
            rest = after;
            pieces.push(Piece {
                column: *column,
                offset: *offset,
                data,
            });
        }
        Some(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Uuid;

    const IDENTITY: Identity = Identity {
        volume: Uuid(7),
        section: 2,
    };

    fn record(sequence: u64, pieces: &[Piece<'_>]) -> Vec<u8> {
        let payload = pieces.iter().map(|piece| piece.data.len()).sum();
        let mut record = vec![0xee; blocks(payload) * BLOCK];
        encode(&mut record, IDENTITY, sequence, 3, 9, pieces);
        record
    }

    #[test]
    fn a_record_comes_back_even_if_its_payload_looks_like_one() {
        let inner = record(40, &[]);
        let first = [1; 512];
        let pieces = [
            Piece {
                column: 1,
                offset: 4096,
                data: &inner,
            },
            Piece {
                column: 3,
                offset: 512,
                data: &first,
            },
        ];
        let mut record = record(21, &pieces);
        assert_eq!(record.len(), 3 * BLOCK);
        let (header, payload) = record.split_at_mut(BLOCK);
        let found = decode_header(header, IDENTITY, 1, 20).unwrap();
        assert_eq!(
            (found.sequence, found.tail, found.row, found.blocks),
            (21, 3, 9, 3)
        );
        assert!(decode_header(&payload[..BLOCK], IDENTITY, 0, 20).is_none());
        assert_eq!(found.pieces(payload).unwrap(), pieces);
        payload[5000] ^= 1;
        assert!(found.pieces(payload).is_none());
    }

    #[test]
    fn a_header_counts_only_in_its_place_of_its_ring_and_section() {
        let record = record(21, &[]);
        assert!(decode_header(&record, IDENTITY, 1, 20).is_some());
        assert!(decode_header(&record, IDENTITY, 2, 20).is_none());
        assert!(decode_header(&record, IDENTITY, 1, 0).is_none());
        let other = Identity {
            section: 3,
            ..IDENTITY
        };
        assert!(decode_header(&record, other, 1, 20).is_none());
        assert!(decode_header(&record[..100], IDENTITY, 1, 20).is_none());
    }
}
