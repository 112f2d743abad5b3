//! The label: whose device this is, and where its parts lie. 4 KiB at offset 0, and a copy at the end of the private region.

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{LOG_OFFSET, LOG_SIZE, MIN_DEVICE, SLOTS_OFFSET, crc32c, private_size, slot_size};
use crate::model::{BLOCK, MAX_NAME, Uuid};

/// Length of a label.
pub const LABEL_SIZE: usize = 4096;
/// First bytes of a label.
pub const MAGIC: [u8; 8] = *b"SMSVMMPD";
/// The version that this program reads and writes.
const VERSION: u32 = 1;

/// Features that change what the media hold: who does not know one must not open the pool. Bit number and name.
const INCOMPATIBLE: &[(u32, &str)] = &[];
/// Features that a reader may ignore, but no writer.
const READ_ONLY_COMPATIBLE: &[(u32, &str)] = &[];

#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLabel {
    magic: [u8; 8],
    version: U32,
    /// Of the 4096 bytes with this field zero.
    crc: U32,
    incompatible: U64,
    read_only_compatible: U64,
    compatible: U64,
    device: U128,
    pool: U128,
    size: U64,
    data_start: U64,
    log_offset: U64,
    log_size: U64,
    slots_offset: U64,
    slot_size: U64,
    block: U32,
    name_length: U16,
    reserved: [u8; 2],
    name: [u8; 256],
    rest: [u8; 3712],
}

const _: () = {
    assert!(size_of::<RawLabel>() == LABEL_SIZE);
    assert!(std::mem::offset_of!(RawLabel, incompatible) == 16);
    assert!(std::mem::offset_of!(RawLabel, device) == 40);
    assert!(std::mem::offset_of!(RawLabel, size) == 72);
    assert!(std::mem::offset_of!(RawLabel, slots_offset) == 104);
    assert!(std::mem::offset_of!(RawLabel, block) == 120);
    assert!(std::mem::offset_of!(RawLabel, name) == 128);
};

/// What a label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Identity of the device.
    pub device: Uuid,
    /// Identity of the pool.
    pub pool: Uuid,
    /// Name of the pool when the device was labelled, for people.
    pub pool_name: String,
    /// Size of the device in bytes when it was labelled.
    pub size: u64,
    /// Logical block size in bytes when it was labelled.
    pub block: u32,
    /// Length of the private region.
    pub data_start: u64,
    /// Where the activity log begins.
    pub log_offset: u64,
    /// Length of the activity log in bytes.
    pub log_size: u64,
    /// Where slot 0 begins; slot 1 follows it.
    pub slots_offset: u64,
    /// Length of a slot in bytes.
    pub slot_size: u64,
}

/// Why a block is no label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Something else lies there.
    #[error("there is no label of a pool")]
    Absent,
    /// It was one.
    #[error("the label is damaged: its checksum is wrong")]
    Damaged,
    /// A later version of this program wrote it.
    #[error("the label has format version {0}, and this program knows {VERSION}: use a newer one")]
    Version(u32),
    /// It uses features that this program does not know.
    #[error(
        "the label demands {kind} feature bits {bits:#x}, which this program does not know: use a newer one"
    )]
    Features {
        /// Incompatible or read-only-compatible.
        kind: &'static str,
        /// Those that are not known.
        bits: u64,
    },
    /// Its checksum is right, but it makes no sense.
    #[error("the label is nonsense: {0}")]
    Nonsense(&'static str),
    /// The device is smaller than the label says.
    #[error("the device has {actual} bytes and had {labelled} when it was labelled: it was truncated")]
    Truncated {
        /// Bytes that the label says.
        labelled: u64,
        /// Bytes that it has.
        actual: u64,
    },
}

fn unknown(bits: u64, known: &[(u32, &str)]) -> u64 {
    known.iter().fold(bits, |bits, (bit, _)| bits & !(1 << bit))
}

impl Label {
    /// The label of a device of `size` bytes; none if that is less than [`MIN_DEVICE`].
    pub fn new(device: Uuid, pool: Uuid, pool_name: &str, size: u64, block: u32) -> Option<Self> {
        let data_start = private_size(size)?;
        Some(Self {
            device,
            pool,
            pool_name: pool_name.to_owned(),
            size,
            block,
            data_start,
            log_offset: LOG_OFFSET,
            log_size: LOG_SIZE,
            slots_offset: SLOTS_OFFSET,
            slot_size: slot_size(data_start),
        })
    }

    /// Where the copy lies.
    pub fn copy_offset(&self) -> u64 {
        self.data_start.saturating_sub(BLOCK)
    }

    /// Where slot 0 or 1 begins.
    pub fn slot_offset(&self, slot: usize) -> u64 {
        self.slots_offset + if slot == 0 { 0 } else { self.slot_size }
    }

    /// The block to be written.
    pub fn encode(&self) -> [u8; LABEL_SIZE] {
        let mut name = [0; 256];
        let bytes = self.pool_name.as_bytes();
        // Cut like this a name is no longer UTF-8 perhaps; `check` lets no such name come here.
        let length = bytes.len().min(MAX_NAME);
        name[..length].copy_from_slice(&bytes[..length]);
        let mut raw = RawLabel {
            magic: MAGIC,
            version: VERSION.into(),
            crc: 0.into(),
            incompatible: 0.into(),
            read_only_compatible: 0.into(),
            compatible: 0.into(),
            device: self.device.0.into(),
            pool: self.pool.0.into(),
            size: self.size.into(),
            data_start: self.data_start.into(),
            log_offset: self.log_offset.into(),
            log_size: self.log_size.into(),
            slots_offset: self.slots_offset.into(),
            slot_size: self.slot_size.into(),
            block: self.block.into(),
            name_length: u16::try_from(length).unwrap_or_default().into(),
            reserved: [0; 2],
            name,
            rest: [0; 3712],
        };
        raw.crc = crc32c(&[raw.as_bytes()]).into();
        let mut block = [0; LABEL_SIZE];
        block.copy_from_slice(raw.as_bytes());
        block
    }

    /// What a block of a device of `actual` bytes says.
    ///
    /// # Errors
    /// It is no label, or none for this program.
    pub fn decode(block: &[u8], actual: u64) -> Result<Self, LabelError> {
        let Ok((raw, _)) = RawLabel::ref_from_prefix(block) else {
            return Err(LabelError::Absent);
        };
        if raw.magic != MAGIC {
            return Err(LabelError::Absent);
        }
        let mut zeroed = raw.clone();
        zeroed.crc = 0.into();
        if crc32c(&[zeroed.as_bytes()]) != raw.crc.get() {
            return Err(LabelError::Damaged);
        }
        if raw.version.get() != VERSION {
            return Err(LabelError::Version(raw.version.get()));
        }
        let words = [
            ("incompatible", raw.incompatible.get(), INCOMPATIBLE),
            (
                "read-only-compatible",
                raw.read_only_compatible.get(),
                READ_ONLY_COMPATIBLE,
            ),
        ];
        for (kind, bits, known) in words {
            match unknown(bits, known) {
                0 => {}
                bits => return Err(LabelError::Features { kind, bits }),
            }
        }
        let name = raw.name.get(..raw.name_length.get().into());
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let label = Self {
            device: Uuid(raw.device.get()),
            pool: Uuid(raw.pool.get()),
            pool_name: name
                .ok_or(LabelError::Nonsense("the pool's name is no text"))?
                .to_owned(),
            size: raw.size.get(),
            block: raw.block.get(),
            data_start: raw.data_start.get(),
            log_offset: raw.log_offset.get(),
            log_size: raw.log_size.get(),
            slots_offset: raw.slots_offset.get(),
            slot_size: raw.slot_size.get(),
        };
        label.check()?;
        if label.size > actual {
            let labelled = label.size;
            return Err(LabelError::Truncated { labelled, actual });
        }
        Ok(label)
    }

    /// Its parts follow one another.
    fn check(&self) -> Result<(), LabelError> {
        let log_end = self.log_offset.checked_add(self.log_size);
        let slots_end = self
            .slot_size
            .checked_mul(2)
            .and_then(|both| both.checked_add(self.slots_offset));
        let copy_end = slots_end.and_then(|end| end.checked_add(BLOCK));
        let aligned = [
            self.data_start,
            self.log_offset,
            self.log_size,
            self.slots_offset,
            self.slot_size,
        ];
        if self.size < MIN_DEVICE || self.data_start >= self.size {
            return Err(LabelError::Nonsense("there is no room for data"));
        }
        if aligned.iter().any(|value| !value.is_multiple_of(BLOCK))
            || self.slot_size == 0
            || self.log_size == 0
        {
            return Err(LabelError::Nonsense("its parts are not aligned"));
        }
        if self.log_offset < BLOCK
            || log_end.is_none_or(|end| end > self.slots_offset)
            || copy_end.is_none_or(|end| end > self.data_start)
            || self.data_start > 1 << 30
        {
            return Err(LabelError::Nonsense("its parts overlap"));
        }
        if !self.block.is_power_of_two() || !(512..=4096).contains(&self.block) {
            return Err(LabelError::Nonsense("the block size is none"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> Label {
        Label::new(Uuid(1), Uuid(2), "tank", 8 << 20, 512).unwrap()
    }

    #[test]
    fn a_label_is_read_as_it_was_written() {
        let block = label().encode();
        assert_eq!(Label::decode(&block, 8 << 20), Ok(label()));
        assert_eq!(
            Label::decode(&block, 9 << 20),
            Ok(label()),
            "the device has grown"
        );
        assert_eq!(block[40], 1, "little-endian");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let block = label().encode();
        for bit in 0..LABEL_SIZE * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            let expected = if bit < 64 {
                LabelError::Absent
            } else {
                LabelError::Damaged
            };
            assert_eq!(Label::decode(&flipped, 8 << 20), Err(expected), "bit {bit}");
        }
    }

    /// A label with valid checksum and eight other bytes at `offset`.
    fn changed(offset: usize, value: u64) -> Result<Label, LabelError> {
        let mut block = label().encode();
        block[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        block[12..16].fill(0);
        let crc = crc32c(&[&block]);
        block[12..16].copy_from_slice(&crc.to_le_bytes());
        Label::decode(&block, 8 << 20)
    }

    #[test]
    fn unknown_features_and_versions_are_refused_by_name() {
        let kind = "incompatible";
        assert_eq!(changed(16, 8), Err(LabelError::Features { kind, bits: 8 }));
        let kind = "read-only-compatible";
        assert_eq!(
            changed(24, 1 << 63),
            Err(LabelError::Features { kind, bits: 1 << 63 })
        );
        assert_eq!(changed(32, u64::MAX), Ok(label()), "compatible ones are ignored");
        assert_eq!(changed(8, 2), Err(LabelError::Version(2)));
    }

    #[test]
    fn nonsense_with_a_right_checksum_is_refused() {
        for offset in [72, 80, 88, 96, 104, 112] {
            for value in [0, 1, 100, 1 << 62, u64::MAX, u64::MAX - 4095] {
                assert!(changed(offset, value).is_err(), "{value} at {offset}");
            }
        }
        assert!(changed(120, 3).is_err(), "block size");
        assert!(changed(124, 257).is_err(), "length of the name");
        let truncated = LabelError::Truncated {
            labelled: 16 << 20,
            actual: 8 << 20,
        };
        assert_eq!(changed(72, 16 << 20), Err(truncated));
    }
}
