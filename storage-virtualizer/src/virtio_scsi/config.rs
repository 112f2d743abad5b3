//! What a virtio-scsi adapter offers and shows in its configuration space (virtio 1.2 §5.6.3, §5.6.4).

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_core::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC};

use super::events::EVENT_LENGTH;
use crate::scsi::MAX_LUNS;

/// Feature bits of virtio 1.2 §5.6.3.
pub mod feature {
    /// The driver is told of logical units that come and go.
    pub const HOTPLUG: u64 = 1 << 1;
    /// The driver is told of logical units whose parameters change.
    pub const CHANGE: u64 = 1 << 2;
}

/// What the driver sees before it says otherwise (§5.6.4): room for sense data, and for a CDB, in bytes.
const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;
/// The longest CDB that a driver may ask for: no standard has a longer one.
pub(super) const MAX_CDB_SIZE: usize = 260;
/// The most room for sense data that a driver may ask for (SPC-4 §4.5).
pub(super) const MAX_SENSE_SIZE: usize = 252;
const SENSE_SIZE_OFFSET: u64 = 20;
const CDB_SIZE_OFFSET: u64 = 24;
/// Largest transfer of one command, in blocks of 512 bytes: 32 MiB.
const MAX_SECTORS: u32 = 0xffff;
/// Commands of one logical unit that a driver should have in flight at most.
const COMMANDS_PER_UNIT: u32 = 128;

/// What the adapter offers, but for the bit that the transport adds.
pub(super) const FEATURES: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | feature::HOTPLUG | feature::CHANGE;

/// The fields that a driver may change.
#[derive(Debug)]
pub(super) struct Sizes {
    sense: AtomicU32,
    cdb: AtomicU32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            sense: AtomicU32::new(SENSE_SIZE),
            cdb: AtomicU32::new(CDB_SIZE),
        }
    }
}

impl Sizes {
    /// Room for sense data in a response.
    pub(super) fn sense(&self) -> usize {
        self.sense.load(Ordering::Relaxed) as usize
    }

    /// Room for the CDB in a request.
    pub(super) fn cdb(&self) -> usize {
        self.cdb.load(Ordering::Relaxed) as usize
    }

    /// The device was reset.
    pub(super) fn reset(&self) {
        self.sense.store(SENSE_SIZE, Ordering::Relaxed);
        self.cdb.store(CDB_SIZE, Ordering::Relaxed);
    }

    /// The driver writes to the configuration space. What cannot be is not taken, as it reads back.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            SENSE_SIZE_OFFSET if value as usize <= MAX_SENSE_SIZE => {
                self.sense.store(value, Ordering::Relaxed)
            }
            CDB_SIZE_OFFSET if (1..=MAX_CDB_SIZE).contains(&(value as usize)) => {
                self.cdb.store(value, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// The configuration space of an adapter with so many request queues, and targets up to `last_target`.
    pub(super) fn space(&self, queues: u16, queue_size: u16, last_target: u8) -> [u8; 36] {
        let mut space = [0; 36];
        let mut put =
            |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &u32::from(queues).to_le_bytes());
        // Segments of data come beside a request and a response.
        put(4, &u32::from(queue_size).saturating_sub(2).max(1).to_le_bytes());
        put(8, &MAX_SECTORS.to_le_bytes());
        put(12, &COMMANDS_PER_UNIT.to_le_bytes());
        put(16, &EVENT_LENGTH.to_le_bytes());
        put(20, &self.sense.load(Ordering::Relaxed).to_le_bytes());
        put(24, &self.cdb.load(Ordering::Relaxed).to_le_bytes());
        // One channel, 0.
        put(30, &u16::from(last_target).to_le_bytes());
        put(32, &u32::from(MAX_LUNS - 1).to_le_bytes());
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_has_the_layout_of_the_specification() {
        let sizes = Sizes::default();
        let space = sizes.space(3, 256, 7);
        let at = |offset: usize| u32::from_le_bytes(space[offset..offset + 4].try_into().unwrap());
        let words = [0, 4, 8, 12, 16, 20, 24, 28, 32].map(at);
        assert_eq!(words, [3, 254, 0xffff, 128, 16, 96, 32, 7 << 16, 16383]);
    }

    #[test]
    fn a_driver_sets_the_sizes_that_can_be() {
        let sizes = Sizes::default();
        sizes.write(20, &18u32.to_le_bytes());
        sizes.write(24, &16u32.to_le_bytes());
        assert_eq!((sizes.sense(), sizes.cdb()), (18, 16));
        sizes.write(20, &253u32.to_le_bytes());
        sizes.write(24, &0u32.to_le_bytes());
        sizes.write(24, &261u32.to_le_bytes());
        sizes.write(0, &5u32.to_le_bytes());
        sizes.write(20, &[1]);
        assert_eq!((sizes.sense(), sizes.cdb()), (18, 16));
        sizes.reset();
        assert_eq!((sizes.sense(), sizes.cdb()), (96, 32));
    }
}
