//! A group on its way to the ring: a byte string of whole records, cut into blocks.

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError, cover};

use super::ring::{self, HEADER, Header, PAYLOAD, Position, Ring};
use crate::meta_io::{self, BLOCK};

/// A group that takes no more records. Its bytes never change once it has been written, so it may be written more than once.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) start: Position,
    blocks: u64,
    /// Bytes of records.
    length: usize,
    buffer: AlignedBuffer,
    /// Checksum of its last block.
    checksum: u32,
}

impl Group {
    /// Cuts `bytes`, which are not empty and fit into a group, into blocks.
    pub(super) fn new(ring: &Ring, incarnation: u64, start: Position, bytes: &[u8]) -> Self {
        let blocks = ring::blocks_for(bytes.len());
        debug_assert!((1..=ring.most_blocks()).contains(&blocks));
        let mut buffer = AlignedBuffer::new(bytes.len().div_ceil(PAYLOAD) * BLOCK);
        let count = u16::try_from(blocks).unwrap_or(u16::MAX);
        let mut checksum = 0;
        let parts = bytes.chunks(PAYLOAD).zip(buffer.as_mut_slice().chunks_mut(BLOCK));
        for (index, (part, block)) in (0_u16..).zip(parts) {
            block[HEADER..HEADER + part.len()].copy_from_slice(part);
            let header = Header {
                incarnation,
                group: start.group,
                position: start.block + u64::from(index),
                index,
                count,
                used: u16::try_from(part.len()).unwrap_or(0),
                previous: start.previous,
            };
            checksum = ring::encode(&header, ring.uuid, block);
        }
        Self {
            start,
            blocks,
            length: bytes.len(),
            buffer,
            checksum,
        }
    }

    /// Its records.
    pub(super) fn records(&self) -> Vec<u8> {
        let mut records = Vec::with_capacity(self.length);
        for block in self.buffer.as_slice().chunks(BLOCK) {
            let here = PAYLOAD.min(self.length - records.len());
            records.extend_from_slice(&block[HEADER..HEADER + here]);
        }
        records
    }

    /// Where the group after it begins.
    pub(super) fn end(&self) -> Position {
        Position {
            group: self.start.group + 1,
            block: self.start.block + self.blocks,
            previous: self.checksum,
        }
    }

    /// Makes it durable: one request, or two at once where the ring ends.
    pub(super) async fn write<V: BlockDevice>(&self, device: &V, ring: &Ring) -> Result<(), IoError> {
        let first = ring.place(self.start.block);
        let before_end = ring.region.end().saturating_sub(first).min(self.blocks);
        let all = usize::try_from(self.blocks).unwrap_or(usize::MAX);
        let cut = usize::try_from(before_end).unwrap_or(all);
        let write =
            |first, range| meta_io::write_blocks(device, first, &self.buffer, range, Durability::Durable);
        if cut == all {
            return write(first, 0..all).await;
        }
        cover!("journal: a group goes across the ring's end");
        let parts = [write(first, 0..cut), write(ring.region.first, cut..all)];
        meta_io::join_all(parts).await.into_iter().collect()
    }
}
