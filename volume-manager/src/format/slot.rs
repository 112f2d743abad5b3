//! A slot: one whole configuration with what the store needs to know about how it was written.
//!
//! A header of 128 bytes, then the holders of its predecessors, then the configuration. One checksum covers it all, so a torn
//! slot is an invalid slot.

use zerocopy::byteorder::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::crc32c;
use crate::model::{BLOCK, DeviceId, MAX_DEVICES, Uuid};

/// First bytes of a slot.
pub const MAGIC: [u8; 8] = *b"SMSVMMPC";
/// Length of the header.
pub const HEADER_SIZE: usize = 128;
const VERSION: u32 = 1;

/// The header as it lies on the medium.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    /// Of the header with this field zero, and of what follows it.
    crc: U32,
    pool: U128,
    device: U128,
    incarnation: U128,
    epoch: U64,
    term: U64,
    claimed: U64,
    sequence: U64,
    length: U64,
    /// Numbers of 32 bits between header and configuration.
    previous: U32,
    attempt: U32,
    number: U32,
    reserved: [u8; 12],
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_SIZE);
    assert!(std::mem::offset_of!(RawHeader, pool) == 16);
    assert!(std::mem::offset_of!(RawHeader, epoch) == 64);
    assert!(std::mem::offset_of!(RawHeader, length) == 96);
};

/// What stands beside a configuration in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Identity of the pool.
    pub pool: Uuid,
    /// Identity of the device, so that a copied device is noticed.
    pub device: Uuid,
    /// Number of the device in the pool, which the configuration does not tell if the device is leaving with it.
    pub number: DeviceId,
    /// The configuration's last incarnation.
    pub incarnation: Uuid,
    /// The configuration's epoch.
    pub epoch: u64,
    /// Number of the opening under which the configuration was made.
    pub term: u64,
    /// Number of the latest opening that this device took part in: at least `term`.
    pub claimed: u64,
    /// Grows with every write of a slot of this device: the higher one is the newer.
    pub sequence: u64,
    /// Counts configurations that were tried in place of one that too few devices took.
    pub attempt: u32,
    /// The holders of each configuration that this one follows: first those of the last durable one, then those of the ones
    /// that were tried before this one. None if this one needs no other to be valid.
    pub previous: Vec<Vec<DeviceId>>,
}

/// Most predecessors.
pub const MAX_PREVIOUS: usize = 8;
const MAX_WORDS: usize = MAX_PREVIOUS * (MAX_DEVICES + 1);

/// Numbers that `previous` becomes: for each predecessor the count of its holders, and they.
fn words(previous: &[Vec<DeviceId>]) -> Vec<u32> {
    let group = |group: &Vec<DeviceId>| {
        let count = u32::try_from(group.len()).unwrap_or(u32::MAX);
        std::iter::once(count)
            .chain(group.iter().map(|id| id.0))
            .collect::<Vec<u32>>()
    };
    previous.iter().flat_map(group).collect()
}

/// The reverse of [`words`].
fn groups(mut words: &[u32]) -> Option<Vec<Vec<DeviceId>>> {
    let mut groups = Vec::new();
    while let Some((count, rest)) = words.split_first() {
        let (group, rest) = rest.split_at_checked(usize::try_from(*count).ok()?)?;
        groups.push(group.iter().copied().map(DeviceId).collect());
        words = rest;
    }
    Some(groups)
}

fn padded(words: usize, payload: usize) -> u64 {
    let bytes = HEADER_SIZE
        .saturating_add(words.saturating_mul(4))
        .saturating_add(payload);
    (bytes as u64).saturating_add(BLOCK - 1) / BLOCK * BLOCK
}

/// Bytes of a slot, a multiple of the block, whose configuration has `payload` bytes.
pub fn size(previous: &[Vec<DeviceId>], payload: usize) -> u64 {
    padded(words(previous).len(), payload)
}

impl Header {
    /// The start of a slot, to be followed by the configuration.
    pub fn encode(&self, configuration: &[u8]) -> Vec<u8> {
        let words = words(&self.previous);
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            crc: 0.into(),
            pool: self.pool.0.into(),
            device: self.device.0.into(),
            incarnation: self.incarnation.0.into(),
            epoch: self.epoch.into(),
            term: self.term.into(),
            claimed: self.claimed.into(),
            sequence: self.sequence.into(),
            length: (configuration.len() as u64).into(),
            previous: u32::try_from(words.len()).unwrap_or(u32::MAX).into(),
            attempt: self.attempt.into(),
            number: self.number.0.into(),
            reserved: [0; 12],
        };
        let previous: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        raw.crc = crc32c(&[raw.as_bytes(), &previous, configuration]).into();
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(&previous);
        bytes
    }

    /// Bytes of the slot that must be read to decode it; none if there is nothing of ours that fits into `slot_size`.
    pub fn needed(start: &[u8], slot_size: u64) -> Option<u64> {
        let (raw, _) = RawHeader::ref_from_prefix(start).ok()?;
        let previous = usize::try_from(raw.previous.get()).ok()?;
        if raw.magic != MAGIC || previous > MAX_WORDS {
            return None;
        }
        let needed = padded(previous, usize::try_from(raw.length.get()).ok()?);
        (needed <= slot_size).then_some(needed)
    }

    /// Header and configuration of a slot; none if it is not valid. The version is for the caller to refuse.
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (raw, rest) = RawHeader::ref_from_prefix(bytes).ok()?;
        let count = usize::try_from(raw.previous.get()).ok()?;
        if raw.magic != MAGIC || raw.version.get() != VERSION || count > MAX_WORDS {
            return None;
        }
        let (previous, rest) = rest.split_at_checked(count * 4)?;
        let configuration = rest.get(..usize::try_from(raw.length.get()).ok()?)?;
        let mut zeroed = raw.clone();
        zeroed.crc = 0.into();
        if crc32c(&[zeroed.as_bytes(), previous, configuration]) != raw.crc.get() {
            return None;
        }
        let word = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_le_bytes);
        let words: Vec<u32> = previous.chunks_exact(4).filter_map(word).collect();
        let header = Self {
            pool: Uuid(raw.pool.get()),
            device: Uuid(raw.device.get()),
            incarnation: Uuid(raw.incarnation.get()),
            epoch: raw.epoch.get(),
            term: raw.term.get(),
            claimed: raw.claimed.get(),
            sequence: raw.sequence.get(),
            attempt: raw.attempt.get(),
            number: DeviceId(raw.number.get()),
            previous: groups(&words)?,
        };
        Some((header, configuration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> (Header, Vec<u8>) {
        let header = Header {
            pool: Uuid(1),
            device: Uuid(2),
            incarnation: Uuid(3),
            epoch: 4,
            term: 5,
            claimed: 6,
            sequence: 7,
            attempt: 10,
            number: DeviceId(11),
            previous: vec![vec![DeviceId(8), DeviceId(9)], vec![], vec![DeviceId(8)]],
        };
        let mut bytes = header.encode(b"configuration");
        bytes.extend_from_slice(b"configuration");
        (header, bytes)
    }

    #[test]
    fn a_slot_is_read_as_it_was_written() {
        let (header, mut bytes) = slot();
        bytes.resize(4096, 0xee);
        assert_eq!(Header::needed(&bytes, 4096), Some(4096));
        assert_eq!(Header::decode(&bytes), Some((header, &b"configuration"[..])));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let (_, bytes) = slot();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&flipped), None, "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert_eq!(Header::decode(&bytes[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_length_beyond_the_slot_is_not_read() {
        let (_, bytes) = slot();
        for length in [4097_u64, u64::MAX, u64::MAX - 200] {
            let mut long = bytes.clone();
            long[96..104].copy_from_slice(&length.to_le_bytes());
            assert_eq!(Header::needed(&long, 4096), None);
            assert_eq!(Header::decode(&long), None);
        }
    }
}
