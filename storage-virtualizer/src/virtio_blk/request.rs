//! What a guest asks for: from the memory of a descriptor chain to a [`Request`] (virtio 1.2 §5.2.6).
//!
//! ```text
//!   readable: header {type u32, reserved u32, sector u64}, data to write or ranges
//!   writable: data to read or the identifier, status byte
//! ```
//! How these are cut into descriptors is the driver's choice.

use block_io::IoBuf;

use super::SECTOR;
use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::chain::Buffers;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// Request types of virtio 1.2 §5.2.6.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush the cache.
    pub const FLUSH: u32 = 4;
    /// Read the identifier.
    pub const GET_ID: u32 = 8;
    /// Discard ranges.
    pub const DISCARD: u32 = 11;
    /// Zero ranges.
    pub const WRITE_ZEROES: u32 = 13;
}

/// The answer to a request, as it stands in its last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or impossible on this disk.
    IoError = 1,
    /// The device does not know such a request.
    Unsupported = 2,
}

/// A range of a discard or write zeroes command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    /// The space may be given back.
    pub unmap: bool,
}

/// The ranges of one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES as usize],
    count: usize,
}

impl Ranges {
    /// In the guest's order.
    pub fn iter(&self) -> impl Iterator<Item = &Range> {
        self.ranges[..self.count].iter()
    }
}

/// What a guest asks for. Offsets and lengths are as the guest gave them: the disk checks them.
#[derive(Debug)]
pub enum Request<'a> {
    /// Fill memory from the disk.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Where the bytes go.
        data: &'a [IoBuf],
    },
    /// Write memory to the disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// The bytes.
        data: &'a [IoBuf],
    },
    /// Make everything durable that was written.
    Flush,
    /// Tell the identifier.
    GetId {
        /// Where it goes.
        data: &'a [IoBuf],
    },
    /// Forget these ranges.
    Discard(Box<Ranges>),
    /// Zero these ranges.
    WriteZeroes(Box<Ranges>),
}

impl Request<'_> {
    /// Bytes that move between memory and disk, as a rate limit counts them; none if it does not count the request.
    pub(super) fn limited_bytes(&self) -> Option<u64> {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => {
                Some(data.iter().map(|piece| piece.len() as u64).sum())
            }
            Self::Discard(_) | Self::WriteZeroes(_) => Some(0),
            Self::Flush | Self::GetId { .. } => None,
        }
    }
}

/// A chain that has room for an answer.
#[derive(Debug)]
pub struct Decoded<'a> {
    /// Where the status goes: one byte.
    pub status: IoBuf,
    /// What is asked for, or the answer to what makes no sense.
    pub request: Result<Request<'a>, Status>,
}

/// A chain without a whole header or without a status byte: it cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request needs a header of 16 bytes and a status byte")]
pub struct Unanswerable;

/// Decodes the chain in `buffers`.
///
/// # Errors
/// It cannot even be answered.
pub fn decode(buffers: &mut Buffers) -> Result<Decoded<'_>, Unanswerable> {
    let (readable, writable) = buffers.split_mut();
    let mut header = [0; HEADER];
    let readable = take_front(readable, &mut header).ok_or(Unanswerable)?;
    let (status, writable) = take_last_byte(writable).ok_or(Unanswerable)?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let request = match u32::from_le_bytes([k0, k1, k2, k3]) {
        kind::IN => byte_offset(sector).map(|offset| Request::Read {
            offset,
            data: writable,
        }),
        kind::OUT => byte_offset(sector).map(|offset| Request::Write {
            offset,
            data: readable,
        }),
        kind::FLUSH => Ok(Request::Flush),
        kind::GET_ID => Ok(Request::GetId { data: writable }),
        kind::DISCARD => ranges(readable, false).map(|ranges| Request::Discard(Box::new(ranges))),
        kind::WRITE_ZEROES => ranges(readable, true).map(|ranges| Request::WriteZeroes(Box::new(ranges))),
        _ => Err(Status::Unsupported),
    };
    Ok(Decoded { status, request })
}

fn byte_offset(sector: u64) -> Result<u64, Status> {
    sector.checked_mul(SECTOR).ok_or(Status::IoError)
}

/// Copies the first bytes of `pieces` into `target`; returns what follows them.
fn take_front<'a>(pieces: &'a mut [IoBuf], target: &mut [u8]) -> Option<&'a [IoBuf]> {
    let mut filled = 0;
    for index in 0..pieces.len() {
        let piece = pieces[index];
        let length = piece.len().min(target.len() - filled);
        piece.copy_to_slice(&mut target[filled..filled + length]);
        filled += length;
        if filled == target.len() {
            if length == piece.len() {
                return Some(&pieces[index + 1..]);
            }
            pieces[index] = piece.slice(length, usize::MAX);
            return Some(&pieces[index..]);
        }
    }
    None
}

/// The last byte of `pieces`, and what stands before it.
fn take_last_byte(pieces: &mut [IoBuf]) -> Option<(IoBuf, &[IoBuf])> {
    let last = pieces.len().checked_sub(1)?;
    let rest = pieces[last].len().checked_sub(1)?;
    let status = pieces[last].slice(rest, 1);
    if rest == 0 {
        return Some((status, &pieces[..last]));
    }
    pieces[last] = pieces[last].slice(0, rest);
    Some((status, pieces))
}

fn ranges(pieces: &[IoBuf], may_unmap: bool) -> Result<Ranges, Status> {
    let length: usize = pieces.iter().map(IoBuf::len).sum();
    let mut bytes = [0; RANGE * MAX_RANGES as usize];
    if length == 0 || !length.is_multiple_of(RANGE) || length > bytes.len() {
        return Err(Status::IoError);
    }
    let mut filled = 0;
    for piece in pieces {
        piece.copy_to_slice(&mut bytes[filled..]);
        filled += piece.len();
    }
    let mut ranges = Ranges::default();
    for range in bytes[..length].chunks_exact(RANGE) {
        let number = |at: usize| {
            range[at..at + 4]
                .iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let (sector, sectors, flags) = (number(0) | number(4) << 32, number(8), number(12));
        // Bit 0 is "unmap" and is for write zeroes only; the others are reserved (§5.2.6.2).
        if flags & !1 != 0 || (flags == 1 && !may_unmap) {
            return Err(Status::Unsupported);
        }
        if sectors > u64::from(MAX_RANGE_SECTORS) {
            return Err(Status::IoError);
        }
        ranges.ranges[ranges.count] = Range {
            offset: byte_offset(sector)?,
            length: sectors * SECTOR,
            unmap: flags == 1,
        };
        ranges.count += 1;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_core::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::chain::Table;

    const TABLE: u64 = 0x10_0000;

    /// A chain of `pieces` {address, length, written by the device}, as the device sees it.
    fn take(memory: &GuestMemoryMmap, pieces: &[(u64, usize, bool)]) -> Buffers {
        for (index, (address, length, writes)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let flags = u16::from(!last) | u16::from(*writes) << 1;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&u32::try_from(*length).unwrap().to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&u16::try_from(index + 1).unwrap().to_le_bytes());
            memory
                .write_slice(&bytes, GuestAddress(TABLE + index as u64 * 16))
                .unwrap();
        }
        let mut buffers = Buffers::default();
        let table = Table {
            address: GuestAddress(TABLE),
            size: 1024,
            indirect: false,
        };
        buffers.take_chain(table, memory, 0).unwrap();
        buffers
    }

    /// Cuts `length` bytes from `address` on into descriptors, with gaps of `gap` bytes where `cuts` say so; returns where
    /// every byte is, too.
    fn cut(
        address: u64,
        length: usize,
        cuts: &[(usize, u64)],
        writes: bool,
    ) -> (Vec<(u64, usize, bool)>, Vec<u64>) {
        let (mut pieces, mut places) = (Vec::new(), Vec::new());
        let (mut address, mut left) = (address, length);
        let mut cuts = cuts.iter().cycle();
        while left > 0 {
            let (size, gap) = cuts.next().copied().unwrap_or((length, 0));
            // The table has room for both halves of a chain: the 400th piece of each takes the rest.
            let size = if pieces.len() < 399 { size.min(left) } else { left };
            pieces.push((address, size, writes));
            places.extend(address..address + size as u64);
            address += size as u64 + gap;
            left -= size;
        }
        (pieces, places)
    }

    proptest! {
        #[test]
        fn a_request_means_the_same_however_it_is_cut(
            sectors in 0_usize..8,
            sector in any::<u32>(),
            cuts in prop::collection::vec((1_usize..600, 0_u64..3), 1..10),
            is_write in any::<bool>(),
        ) {
            let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap());
            let length = sectors * 512;
            let (to_device, from_device) = if is_write { (16 + length, 1) } else { (16, length + 1) };
            let (mut pieces, sent) = cut(0x1000, to_device, &cuts, false);
            let (written, received) = cut(0x8000, from_device, &cuts, true);
            pieces.extend(written);
            let mut header = [0; 16];
            header[0] = u8::from(is_write);
            header[8..12].copy_from_slice(&sector.to_le_bytes());
            let content: Vec<u8> = header.into_iter().chain((0..=250).cycle().take(length)).collect();
            for (byte, place) in content.iter().zip(&sent) {
                memory.write_obj(*byte, GuestAddress(*place)).unwrap();
            }

            let mut buffers = take(&memory, &pieces);
            prop_assert_eq!(buffers.writable_length() as usize, from_device);
            let decoded = decode(&mut buffers).unwrap();
            decoded.status.fill(0xab);
            match decoded.request.unwrap() {
                Request::Write { offset, data } => {
                    prop_assert!(is_write);
                    prop_assert_eq!(offset, u64::from(sector) * 512);
                    let mut all = Vec::new();
                    for piece in data {
                        let mut bytes = vec![0; piece.len()];
                        piece.copy_to_slice(&mut bytes);
                        all.extend(bytes);
                    }
                    prop_assert_eq!(&all, &content[16..]);
                }
                Request::Read { offset, data } => {
                    prop_assert!(!is_write);
                    prop_assert_eq!(offset, u64::from(sector) * 512);
                    prop_assert_eq!(data.iter().map(IoBuf::len).sum::<usize>(), length);
                    data.iter().for_each(|piece| piece.fill(0xcd));
                    for place in &received[..length] {
                        prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(*place)).unwrap(), 0xcd);
                    }
                }
                other => prop_assert!(false, "{other:?}"),
            }
            let status = received[from_device - 1];
            prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(status)).unwrap(), 0xab);
        }
    }

    #[test]
    fn empty_descriptors_do_not_matter() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let pieces = [
            (0, 0, false),
            (0x1000, 16, false),
            (0x2000, 0, true),
            (0x3000, 1, true),
            (0x4000, 0, true),
        ];
        let mut buffers = take(&memory, &pieces);
        let decoded = decode(&mut buffers).unwrap();
        assert!(matches!(
            decoded.request,
            Ok(Request::Read { offset: 0, data: [] })
        ));
    }
}
