//! The activity log of a device: which regions of volumes may differ between members after a crash.
//!
//! A ring of eight transactions. Each is self-contained: it names *all* regions that are hot, so recovery takes the newest
//! valid one and needs no other. A transaction that a crash has torn is recognised by its checksum, and the one before it
//! counts; that is right, as writes to a region begin only after a transaction that names it is durable. A write that fails is
//! repeated in the same place, so failures never use up the good transactions.
//!
//! The ring is 64 KiB in the private region of the device. Numbers are little-endian.
//!
//! | offset | size | transaction (8 KiB, at `slot * 8192`) |
//! |---:|---:|---|
//! | 0 | 8 | magic `SMSVACTL` |
//! | 8 | 4 | CRC-32C of bytes 12 to 8191 |
//! | 12 | 4 | format version, 1 |
//! | 16 | 8 | sequence: the greatest is the newest; all logs of a pool share one count |
//! | 24 | 8 | reserved, zero |
//! | 32 | 16 | UUID of the pool |
//! | 48 | 16 | reserved, zero |
//! | 64 | 8128 | 1016 entries |
//!
//! | offset | size | entry |
//! |---:|---:|---|
//! | 0 | 4 | number of the volume; 0xffffffff in an empty entry |
//! | 4 | 4 | index of the region; 0xffffffff in an empty entry |

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError, cover};
use zerocopy::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::LogError;
use crate::bytes;
use crate::checksum::crc32c;
use crate::model::{DeviceId, Uuid, VolumeId};

/// Bytes of the ring.
pub const RING: u64 = 65536;
/// Bytes of a transaction.
const TRANSACTION: usize = 8192;
const SLOTS: u64 = RING / TRANSACTION as u64;
/// Entries of a transaction.
pub(super) const ENTRIES: usize = 1016;
const MAGIC: [u8; 8] = *b"SMSVACTL";
const VERSION: u32 = 1;
/// Where the checksum's cover begins.
const COVERED: usize = 12;

/// A region of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// Which volume.
    pub volume: VolumeId,
    /// Its number in the volume.
    pub index: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Block {
    magic: [u8; 8],
    checksum: U32,
    version: U32,
    sequence: U64,
    reserved: U64,
    pool: U128,
    reserved_too: U128,
    entries: [Entry; ENTRIES],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy, PartialEq)]
#[repr(C)]
struct Entry {
    volume: U32,
    region: U32,
}

const EMPTY: Entry = Entry {
    volume: U32::MAX_VALUE,
    region: U32::MAX_VALUE,
};

const _: () = assert!(size_of::<Block>() == TRANSACTION);
const _: () = assert!(size_of::<Entry>() == 8);

/// What a log said when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// The greater, the newer, also among the logs of a pool.
    pub sequence: u64,
    /// The regions that were hot, in order.
    pub regions: Vec<Region>,
}

/// The log of one device.
#[derive(Debug)]
pub struct ActivityLog<D> {
    id: DeviceId,
    device: Rc<D>,
    offset: u64,
    pool: Uuid,
    /// Where the next transaction goes.
    slot: Cell<u64>,
    /// Not there while a write uses it.
    buffer: RefCell<Option<AlignedBuffer>>,
    opened: Transaction,
}

impl<D: BlockDevice + 'static> ActivityLog<D> {
    /// Makes an empty log in the [`RING`] bytes at `offset` of the device; what was there is never read again.
    ///
    /// # Errors
    /// The device's.
    pub async fn format(id: DeviceId, device: Rc<D>, offset: u64, pool: Uuid) -> Result<Self, LogError> {
        let failed = |source| failure(id, source);
        let mut ring = AlignedBuffer::new(bytes_of_ring());
        encode(&mut ring.as_mut_slice()[..TRANSACTION], pool, 0, &[]);
        bytes::write(&*device, offset, &ring, Durability::Volatile)
            .await
            .map_err(failed)?;
        device.flush().await.map_err(failed)?;
        let opened = Transaction {
            sequence: 0,
            regions: Vec::new(),
        };
        Ok(Self::at(id, device, offset, pool, 1, opened))
    }

    /// Finds the newest transaction in the [`RING`] bytes at `offset` of the device.
    ///
    /// # Errors
    /// The ring cannot be read, or holds no valid transaction of this pool.
    pub async fn open(id: DeviceId, device: Rc<D>, offset: u64, pool: Uuid) -> Result<Self, LogError> {
        let ring = bytes::read(&*device, offset, bytes_of_ring())
            .await
            .map_err(|source| failure(id, source))?;
        let (slot, newest) = newest(ring.as_slice(), pool).ok_or(LogError::NoTransaction { device: id })?;
        Ok(Self::at(id, device, offset, pool, (slot + 1) % SLOTS, newest))
    }

    fn at(id: DeviceId, device: Rc<D>, offset: u64, pool: Uuid, slot: u64, opened: Transaction) -> Self {
        Self {
            id,
            device,
            offset,
            pool,
            slot: Cell::new(slot),
            buffer: RefCell::new(None),
            opened,
        }
    }

    /// The device that it is on.
    pub fn device(&self) -> DeviceId {
        self.id
    }

    /// What it said when it was opened.
    pub fn opened(&self) -> &Transaction {
        &self.opened
    }

    /// Makes a transaction durable. Not while another is being written. After a failure, or when dropped before its end, the
    /// next one goes to the same place.
    pub(super) async fn write(&self, sequence: u64, entries: &[u64]) -> Result<(), LogError> {
        let mut buffer = self
            .buffer
            .take()
            .unwrap_or_else(|| AlignedBuffer::new(TRANSACTION));
        encode(buffer.as_mut_slice(), self.pool, sequence, entries);
        let slot = self.slot.get();
        let at = self.offset + slot * TRANSACTION as u64;
        let written = bytes::write(&*self.device, at, &buffer, Durability::Durable).await;
        self.buffer.replace(Some(buffer));
        written.map_err(|source| failure(self.id, source))?;
        self.slot.set((slot + 1) % SLOTS);
        Ok(())
    }
}

fn failure(device: DeviceId, source: IoError) -> LogError {
    LogError::Device {
        device,
        source: Arc::new(source),
    }
}

fn bytes_of_ring() -> usize {
    TRANSACTION * 8
}
const _: () = assert!(TRANSACTION as u64 * 8 == RING);

/// An entry in memory: the volume in the upper half.
pub(super) const fn pack(region: Region) -> u64 {
    (region.volume.0 as u64) << 32 | region.index as u64
}

/// The region of an entry in memory.
pub(super) fn unpack(packed: u64) -> Region {
    let [a, b, c, d, e, f, g, h] = packed.to_be_bytes();
    Region {
        volume: VolumeId(u32::from_be_bytes([a, b, c, d])),
        index: u32::from_be_bytes([e, f, g, h]),
    }
}

/// An empty entry in memory.
pub(super) const NOTHING: u64 = u64::MAX;

fn encode(target: &mut [u8], pool: Uuid, sequence: u64, entries: &[u64]) {
    let mut block = Block {
        magic: MAGIC,
        checksum: U32::ZERO,
        version: VERSION.into(),
        sequence: sequence.into(),
        reserved: U64::ZERO,
        pool: pool.0.into(),
        reserved_too: U128::ZERO,
        entries: [EMPTY; ENTRIES],
    };
    for (place, packed) in block.entries.iter_mut().zip(entries) {
        let region = unpack(*packed);
        place.volume = region.volume.0.into();
        place.region = region.index.into();
    }
    block.checksum = crc32c(&block.as_bytes()[COVERED..]).into();
    target.copy_from_slice(block.as_bytes());
}

/// The transaction in a block, if it is valid and of this pool.
fn decode(bytes: &[u8], pool: Uuid) -> Option<Transaction> {
    let block = Block::ref_from_bytes(bytes).ok()?;
    if block.magic != MAGIC {
        return None;
    }
    if crc32c(bytes.get(COVERED..)?) != block.checksum.get() {
        cover!("activity log: torn transaction refused");
        return None;
    }
    let foreign = block.pool.get() != pool.0;
    // The count never gets so far: this is damage, and counting on from there could overflow.
    if foreign || block.version.get() != VERSION || block.sequence.get() >= 1 << 62 {
        return None;
    }
    let entries = block.entries.iter().filter(|entry| **entry != EMPTY);
    let mut regions: Vec<Region> = entries
        .map(|entry| Region {
            volume: VolumeId(entry.volume.get()),
            index: entry.region.get(),
        })
        .collect();
    regions.sort_unstable();
    regions.dedup();
    Some(Transaction {
        sequence: block.sequence.get(),
        regions,
    })
}

/// Slot and content of the newest valid transaction in a ring.
fn newest(ring: &[u8], pool: Uuid) -> Option<(u64, Transaction)> {
    let transactions = ring.chunks_exact(TRANSACTION).map(|block| decode(block, pool));
    (0..)
        .zip(transactions)
        .filter_map(|(slot, transaction)| Some((slot, transaction?)))
        .max_by_key(|(_, transaction)| transaction.sequence)
}

/// What a ring of the pool with this UUID says; for the fuzzer.
#[doc(hidden)]
pub fn parse_ring(ring: &[u8], pool: Uuid) -> Option<Transaction> {
    Some(newest(ring, pool)?.1)
}
