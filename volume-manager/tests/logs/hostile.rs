//! Whatever lies on the media, with checksums that are right, is answered: no panic, no overflow, and nothing out of nothing.

use proptest::prelude::*;
use volume_manager::logs::{activity, bitmap, parity};
use volume_manager::model::Uuid;

const POOL: Uuid = Uuid(1);
const IDENTITY: parity::Identity = parity::Identity {
    volume: POOL,
    section: 0,
};

fn sum(bytes: &mut [u8], at: usize, covered: usize) {
    let sum = crc_fast::crc32_iscsi(&bytes[covered..]);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..40_u64,
        Just(u64::MAX),
        Just(u64::MAX / 2),
        Just(1 << 62),
        any::<u64>()
    ]
}

proptest! {
    #[test]
    fn rings_of_activity_logs(
        fields in prop::collection::vec((0..8_usize, number(), prop::collection::vec(any::<u8>(), 64)), 0..8)
    ) {
        let mut ring = vec![0; 65536];
        for (slot, sequence, bytes) in &fields {
            let block = &mut ring[slot * 8192..][..8192];
            block[..8].copy_from_slice(b"SMSVACTL");
            block[12..16].copy_from_slice(&1_u32.to_le_bytes());
            block[16..24].copy_from_slice(&sequence.to_le_bytes());
            block[32..48].copy_from_slice(&POOL.0.to_le_bytes());
            block[64..128].copy_from_slice(bytes);
            sum(block, 8, 12);
        }
        let found = activity::parse_ring(&ring, POOL);
        let possible = fields.iter().any(|(_, sequence, _)| *sequence < 1 << 62);
        prop_assert!(found.is_none() || possible);
        prop_assert!(activity::parse_ring(&ring, Uuid(2)).is_none());
    }

    #[test]
    fn rings_of_parity_logs(
        headers in prop::collection::vec(
            (0..20_usize, number(), number(), 0..40_000_u32, 0..300_u32, any::<[u8; 32]>()),
            0..12
        )
    ) {
        let mut ring = vec![0; 20 * 4096];
        for (slot, sequence, tail, payload, pieces, bytes) in &headers {
            let block = &mut ring[slot * 4096..][..4096];
            block[..8].copy_from_slice(b"SMSVPLOG");
            block[12..16].copy_from_slice(&1_u32.to_le_bytes());
            block[16..24].copy_from_slice(&sequence.to_le_bytes());
            block[24..32].copy_from_slice(&tail.to_le_bytes());
            block[32..48].copy_from_slice(&POOL.0.to_le_bytes());
            block[64..68].copy_from_slice(&payload.to_le_bytes());
            block[72..76].copy_from_slice(&pieces.to_le_bytes());
            block[96..128].copy_from_slice(bytes);
            // A piece that is as long as the payload, so that some are consistent.
            block[100..104].copy_from_slice(&payload.to_le_bytes());
            sum(block, 8, 12);
        }
        let found = parity::parse_ring(&ring, IDENTITY);
        prop_assert!(found.is_none() || !headers.is_empty());
    }

    #[test]
    fn copies_of_bitmaps(
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        large: bool,
        regions in 0..100_000_u32,
        generation in number(),
        valid: bool
    ) {
        let mut bytes = bytes;
        if valid && bytes.len() >= 512 {
            bytes[4..8].fill(0);
            bytes[8..16].copy_from_slice(&generation.to_le_bytes());
            sum(&mut bytes[..512], 0, 4);
        }
        let words = u64::from(regions).next_multiple_of(64);
        prop_assert!(bitmap::parse_copy(&bytes, large, regions, generation) <= words);
    }
}
