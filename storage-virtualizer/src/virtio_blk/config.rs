//! What a virtio-blk device offers and shows in its configuration space (virtio 1.2 §5.2.3, §5.2.4).

use block_io::Geometry;
use virtio_core::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC};

use super::SECTOR;

/// Feature bits of virtio 1.2 §5.2.3.
pub mod feature {
    /// There is a largest size of a segment.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// There is a largest number of segments in a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Cylinders, heads and sectors are shown.
    pub const GEOMETRY: u64 = 1 << 4;
    /// The device takes no writes.
    pub const RO: u64 = 1 << 5;
    /// The logical block size is shown.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The device has a cache and a command to flush it.
    pub const FLUSH: u64 = 1 << 9;
    /// Physical block size and best sizes are shown.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver may switch the cache between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// There are several queues.
    pub const MQ: u64 = 1 << 12;
    /// There is a discard command.
    pub const DISCARD: u64 = 1 << 13;
    /// There is a write zeroes command.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of the `writeback` field.
pub(super) const WRITEBACK_OFFSET: u64 = 32;
/// The most ranges in one discard or write zeroes command.
pub(super) const MAX_RANGES: u32 = 16;
/// The longest range in one of these, in sectors: 2 GiB, so that one command does not keep a disk busy for ever.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// What the device offers, but for the bit that the transport adds.
pub(super) fn features(geometry: &Geometry, queues: u16) -> u64 {
    let mut features = RING_INDIRECT_DESC
        | RING_EVENT_IDX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE;
    if queues > 1 {
        features |= feature::MQ;
    }
    if geometry.read_only {
        features |= feature::RO;
    } else {
        features |= feature::WRITE_ZEROES;
        if geometry.discard_granularity != 0 {
            features |= feature::DISCARD;
        }
    }
    features
}

/// The configuration space.
pub(super) fn space(geometry: &Geometry, queues: u16, queue_size: u16, writeback: bool) -> [u8; 60] {
    let block = geometry.logical_block;
    let mut space = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &(geometry.size / SECTOR).to_le_bytes());
    put(12, &seg_max(queue_size).to_le_bytes());
    put(20, &block.to_le_bytes());
    // Block sizes are powers of two.
    let exponent = geometry.physical_block.max(block).ilog2() - block.ilog2();
    put(24, &[u8::try_from(exponent).unwrap_or(0), 0]);
    put(
        26,
        &u16::try_from(geometry.physical_block / block)
            .unwrap_or(1)
            .to_le_bytes(),
    );
    put(28, &(geometry.optimal_io / block).to_le_bytes());
    put(32, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    let granularity = u64::from(geometry.discard_granularity).max(u64::from(block)) / SECTOR;
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &u32::try_from(granularity).unwrap_or(1).to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    // Zeroed space may be given back.
    put(56, &[1]);
    space
}

/// Segments of data in a request, which come beside a header and a status byte.
fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size).saturating_sub(2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            size: 3 << 30,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 1 << 20,
            discard_granularity: 4096,
            read_only: false,
        }
    }

    #[test]
    fn the_space_has_the_layout_of_the_specification() {
        let space = space(&geometry(), 4, 256, true);
        let u32_at = |offset: usize| u32::from_le_bytes(space[offset..offset + 4].try_into().unwrap());
        assert_eq!(
            u64::from_le_bytes(space[..8].try_into().unwrap()),
            (3 << 30) / 512
        );
        assert_eq!(u32_at(12), 254);
        assert_eq!(u32_at(20), 512);
        assert_eq!(space[24..28], [3, 0, 8, 0]);
        assert_eq!(u32_at(28), 2048);
        assert_eq!(space[32..36], [1, 0, 4, 0]);
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 16, 8));
        assert_eq!((u32_at(48), u32_at(52), u32_at(56)), (1 << 22, 16, 1));
    }

    #[test]
    fn a_read_only_disk_offers_no_commands_that_write() {
        let geometry = Geometry {
            read_only: true,
            ..geometry()
        };
        let features = features(&geometry, 1);
        assert_ne!(features & feature::RO, 0);
        assert_eq!(
            features & (feature::DISCARD | feature::WRITE_ZEROES | feature::MQ),
            0
        );
    }
}
