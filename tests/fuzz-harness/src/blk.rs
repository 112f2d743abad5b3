//! virtio-blk requests as a driver makes them, and what must come of them.

use arbitrary::Unstructured;
use block_io::Geometry;
use storage_virtualizer::virtio_blk::{Status, kind};
use virtio_core::GuestMemory;
use virtio_core::vm_memory::{Bytes, GuestAddress};

use crate::disk::place;
use crate::ring::{Arena, Piece, Ring};

/// What the guest reads as the disk's identifier.
pub(crate) const ID: &[u8; 20] = b"smsvmm-fuzz\0\0\0\0\0\0\0\0\0";

/// Sizes and abilities of a disk.
pub(crate) fn geometry(input: &mut Unstructured<'_>) -> arbitrary::Result<Geometry> {
    let logical_block = *input.choose(&[512, 512, 512, 4096])?;
    Ok(Geometry {
        size: u64::from(logical_block) * input.int_in_range(1..=16_u64)?,
        logical_block,
        physical_block: 4096,
        optimal_io: 0,
        discard_granularity: if input.arbitrary()? { 4096 } else { 0 },
        read_only: input.ratio(1, 8)?,
    })
}

/// A request in guest memory.
pub(crate) struct Planned {
    /// Its buffers, first the readable ones.
    pub(crate) pieces: Vec<Piece>,
    /// Nothing of it is missing.
    pub(crate) is_whole: bool,
    kind: u32,
    sector: u64,
    /// What follows the header.
    body: Vec<u8>,
    /// Bytes for the device to write, without the status.
    room: usize,
}

/// Makes a request and puts its readable part into guest memory.
pub(crate) fn plan(
    input: &mut Unstructured<'_>,
    ring: &Ring,
    arena: &mut Arena,
    geometry: &Geometry,
) -> arbitrary::Result<Planned> {
    let kinds = [
        kind::IN,
        kind::OUT,
        kind::IN,
        kind::OUT,
        kind::FLUSH,
        kind::GET_ID,
        kind::DISCARD,
        kind::WRITE_ZEROES,
    ];
    let kind = if input.ratio(1, 32)? {
        input.arbitrary()?
    } else {
        *input.choose(&kinds)?
    };
    let sectors = geometry.size / 512;
    let sector = if input.ratio(1, 16)? {
        input.arbitrary()?
    } else {
        input.int_in_range(0..=sectors)?
    };
    let block = geometry.logical_block as usize;
    let data = match input.int_in_range(0..=15_u8)? {
        0 => input.int_in_range(0..=2048)?,
        1 => 0,
        _ => block * input.int_in_range(1..=2)?,
    };
    let (mut body, mut room) = (Vec::new(), 0);
    match kind {
        kind::IN => room = data,
        kind::OUT => {
            body = vec![input.arbitrary()?; data];
            body.iter_mut()
                .zip(0_usize..)
                .for_each(|(byte, at)| *byte ^= (at / 64) as u8);
        }
        kind::GET_ID => {
            room = if input.ratio(3, 4)? {
                ID.len()
            } else {
                input.int_in_range(0..=64)?
            }
        }
        kind::DISCARD | kind::WRITE_ZEROES => {
            for _ in 0..input.int_in_range(0..=17)? {
                range(input, sectors, geometry, &mut body)?;
            }
            if input.ratio(1, 16)? {
                body.push(0);
            }
        }
        _ => {}
    }
    let mut readable = Vec::new();
    readable.extend(kind.to_le_bytes());
    readable.extend([0; 4]);
    readable.extend(sector.to_le_bytes());
    readable.extend(&body);
    let (mut readable_length, mut writable_length) = (readable.len(), room + 1);
    if input.ratio(1, 64)? {
        readable_length = input.int_in_range(0..=16)?;
    }
    if input.ratio(1, 64)? {
        writable_length = 0;
    }
    let mut pieces = Vec::new();
    arena.cut(input, readable_length, false, &mut pieces)?;
    ring.fill(&pieces, &readable);
    let of_readable: usize = pieces.iter().map(|piece| piece.length as usize).sum();
    let first_writable = pieces.len();
    arena.cut(input, writable_length, true, &mut pieces)?;
    let of_writable: usize = pieces[first_writable..]
        .iter()
        .map(|piece| piece.length as usize)
        .sum();
    Ok(Planned {
        is_whole: of_readable == readable.len() && of_writable == room + 1,
        pieces,
        kind,
        sector,
        body,
        room,
    })
}

/// One range of a discard or write zeroes request, mostly a possible one.
fn range(
    input: &mut Unstructured<'_>,
    sectors: u64,
    geometry: &Geometry,
    body: &mut Vec<u8>,
) -> arbitrary::Result<()> {
    let per_block = u64::from(geometry.logical_block / 512);
    let (mut sector, mut count) = (input.int_in_range(0..=sectors)?, input.int_in_range(0..=4_u32)?);
    let mut flags = u32::from(input.ratio(1, 4)?);
    sector -= sector % per_block;
    count *= per_block as u32;
    if input.ratio(1, 32)? {
        match input.int_in_range(0..=2_u8)? {
            0 => sector = input.arbitrary()?,
            1 => count = input.arbitrary()?,
            _ => flags = input.arbitrary()?,
        }
    }
    body.extend(sector.to_le_bytes());
    body.extend(count.to_le_bytes());
    body.extend(flags.to_le_bytes());
    Ok(())
}

impl Planned {
    /// What the device wrote: data, and the status byte.
    pub(crate) fn answer(&self, memory: &GuestMemory) -> (Vec<u8>, u8) {
        let mut bytes = Vec::new();
        for piece in self.pieces.iter().filter(|piece| piece.writable) {
            let start = bytes.len();
            bytes.resize(start + piece.length as usize, 0);
            memory
                .read_slice(&mut bytes[start..], GuestAddress(piece.address))
                .expect("the arena is in memory");
        }
        let status = bytes.pop().expect("whole requests have a status byte");
        (bytes, status)
    }

    /// What a disk with this content answers, by the specification: the status, and the first data where they are defined. The content
    /// becomes what it is afterwards.
    pub(crate) fn expected(&self, geometry: &Geometry, content: &mut [u8]) -> (Status, Option<Vec<u8>>) {
        let bytes = |length: usize, writes| {
            let offset = self.sector.checked_mul(512)?;
            place(geometry, offset, length as u64, writes).ok()
        };
        match self.kind {
            kind::IN => match bytes(self.room, false) {
                Some(place) => (Status::Ok, Some(content[place].to_vec())),
                None => (Status::IoError, None),
            },
            kind::OUT => match bytes(self.body.len(), true) {
                Some(place) => {
                    content[place].copy_from_slice(&self.body);
                    (Status::Ok, Some(Vec::new()))
                }
                None => (Status::IoError, None),
            },
            kind::FLUSH => (Status::Ok, Some(Vec::new())),
            // What follows the identifier in a longer buffer is left as it is.
            kind::GET_ID => (Status::Ok, Some(ID[..self.room.min(ID.len())].to_vec())),
            kind::DISCARD | kind::WRITE_ZEROES => (self.expected_of_ranges(geometry, content), None),
            _ => (Status::Unsupported, None),
        }
    }

    fn expected_of_ranges(&self, geometry: &Geometry, content: &mut [u8]) -> Status {
        let zeroes = self.kind == kind::WRITE_ZEROES;
        let count = self.body.len() / 16;
        if !self.body.len().is_multiple_of(16) || !(1..=16).contains(&count) {
            return Status::IoError;
        }
        let mut ranges = Vec::new();
        for range in self.body.chunks(16) {
            let sector = u64::from_le_bytes(range[..8].try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(range[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(range[12..].try_into().expect("four bytes"));
            if flags > 1 || (flags == 1 && !zeroes) {
                return Status::Unsupported;
            }
            match sector.checked_mul(512) {
                Some(offset) if sectors <= 1 << 22 => ranges.push((offset, u64::from(sectors) * 512)),
                _ => return Status::IoError,
            }
        }
        for (offset, length) in ranges {
            match place(geometry, offset, length, true) {
                Ok(place) if zeroes => content[place].fill(0),
                Ok(_) => {}
                Err(_) => return Status::IoError,
            }
        }
        Status::Ok
    }
}
