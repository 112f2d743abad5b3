//! The private region of a device: what lies where, byte by byte. `docs/src/formats/pool-device.md` is the specification.
//!
//! ```text
//!   0        4K            64K            128K                                          data_start
//!   ├─ label ┼── reserved ──┼ activity log ┼── slot 0 ──┼── slot 1 ──┼ … ─┼ copy of label ┼── data …
//! ```
//!
//! The [`label`] says whose device it is and never changes but when features are turned on. A [`slot`] holds the whole
//! [`configuration`] of the pool; the two are written in turn by [`store`](crate::store). The activity log is another's.
//! Everything is little-endian and checked by CRC-32C; everything read is hostile until [`check`] has seen it.

pub mod check;
pub mod configuration;
pub mod label;
#[cfg(test)]
mod round_trip;
pub mod slot;
mod wire;

pub use check::CheckError;
pub use configuration::{DecodeError, decode, encode};
pub use label::{Label, LabelError};

use crate::model::BLOCK;

/// Smallest device in bytes.
pub const MIN_DEVICE: u64 = 4 << 20;
/// Where the activity log begins.
pub const LOG_OFFSET: u64 = 64 << 10;
/// Length of the activity log.
pub const LOG_SIZE: u64 = 64 << 10;
/// Where the first slot begins.
pub const SLOTS_OFFSET: u64 = LOG_OFFSET + LOG_SIZE;

const MAX_PRIVATE: u64 = 16 << 20;
const MIN_PRIVATE: u64 = 512 << 10;
const PRIVATE_STEP: u64 = 64 << 10;

/// Length of the private region of a device of `size` bytes: a 64th of it in steps of 64 KiB, at least 512 KiB, at most
/// 16 MiB, which every device of at least 1 GiB has. None if the device is smaller than [`MIN_DEVICE`].
pub fn private_size(size: u64) -> Option<u64> {
    let share = size / 64 / PRIVATE_STEP * PRIVATE_STEP;
    (size >= MIN_DEVICE).then(|| share.clamp(MIN_PRIVATE, MAX_PRIVATE))
}

/// Length of a slot in a private region of `private` bytes.
pub fn slot_size(private: u64) -> u64 {
    private.saturating_sub(SLOTS_OFFSET + BLOCK) / 2 / BLOCK * BLOCK
}

/// CRC-32C (Castagnoli, as iSCSI) of the pieces, one after the other.
pub(crate) fn crc32c(pieces: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for piece in pieces {
        digest.update(piece);
    }
    // The upper half of a 32-bit checksum is zero.
    u32::try_from(digest.finalize() & 0xffff_ffff).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, from the definition.
    fn slow(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc: u32, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
            })
        })
    }

    #[test]
    fn the_checksum_gives_the_known_answers() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[b"1234", b"", b"56789"]), 0xe306_9283);
        assert_eq!(crc32c(&[&[0; 32]]), 0x8a91_36aa, "RFC 3720, B.4");
        assert_eq!(crc32c(&[]), 0);
    }

    #[test]
    fn every_length_gives_what_the_definition_gives() {
        let bytes: Vec<u8> = (0..5000_u32)
            .map(|index| (index * 167 / 8).to_le_bytes()[0])
            .collect();
        for length in (0..300).chain([511, 512, 1023, 4095, 4096, 5000]) {
            assert_eq!(
                crc32c(&[&bytes[..length]]),
                slow(&bytes[..length]),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn private_regions_are_as_documented() {
        assert_eq!(private_size(MIN_DEVICE - 1), None);
        assert_eq!(private_size(MIN_DEVICE), Some(512 << 10));
        assert_eq!(private_size(64 << 20), Some(1 << 20));
        assert_eq!(private_size((1 << 30) - 1), Some((16 << 20) - (64 << 10)));
        assert_eq!(private_size(1 << 30), Some(16 << 20));
        assert_eq!(private_size(u64::MAX), Some(16 << 20));
        assert_eq!(slot_size(512 << 10), 188 << 10);
        assert_eq!(slot_size(16 << 20), 8124 << 10);
    }
}
