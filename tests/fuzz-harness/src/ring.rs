//! The driver's side of virtqueues: rings, buffers, chains, and the ways to get them wrong.
//!
//! ```text
//!   0x1000  rings, 0x800 bytes per queue: descriptors, available ring at +0x200, used ring at +0x300
//!   0x3000  tables of indirect descriptors
//!   0x4000  buffers, and all of the high region
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Unstructured;
use virtio_core::virtio_queue::{Queue, QueueT};
use virtio_core::vm_memory::{Bytes, GuestAddress};
use virtio_core::{ActiveQueue, GuestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::{HIGH_SIZE, HIGH_START, LOW_SIZE};

const RINGS: u64 = 0x1000;
const RING_SPACING: u64 = 0x800;
const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x300;
const TABLES: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

/// Descriptors in the largest ring.
pub(crate) const MAX_SIZE: u16 = 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

impl Piece {
    /// Bytes that the device may write.
    pub(crate) fn room(&self) -> u32 {
        if self.writable { self.length } else { 0 }
    }
}

/// Gives out guest memory for buffers and tables, each byte once until it is reset.
pub(crate) struct Arena {
    low: u64,
    high: u64,
    tables: u64,
}

impl Arena {
    pub(crate) fn new() -> Self {
        Self {
            low: BUFFERS,
            high: HIGH_START,
            tables: TABLES,
        }
    }

    /// `length` bytes somewhere, if there are any left.
    fn take(&mut self, input: &mut Unstructured<'_>, length: u64) -> arbitrary::Result<Option<u64>> {
        let gap = if input.ratio(1, 4)? {
            0
        } else {
            input.int_in_range(0..=15)?
        };
        let (next, end) = if input.ratio(1, 4)? {
            (&mut self.high, HIGH_START + HIGH_SIZE)
        } else {
            (&mut self.low, LOW_SIZE)
        };
        let start = *next + gap;
        if start + length > end {
            return Ok(None);
        }
        *next = start + length;
        Ok(Some(start))
    }

    /// Cuts `length` bytes into buffers; fewer than asked for when memory is used up.
    pub(crate) fn cut(
        &mut self,
        input: &mut Unstructured<'_>,
        length: usize,
        writable: bool,
        pieces: &mut Vec<Piece>,
    ) -> arbitrary::Result<()> {
        let mut left = length as u64;
        while left > 0 {
            let length = if input.ratio(2, 3)? {
                left
            } else {
                input.int_in_range(1..=left)?
            };
            let Some(address) = self.take(input, length)? else {
                return Ok(());
            };
            pieces.push(Piece {
                address,
                length: length as u32,
                writable,
            });
            left -= length;
        }
        Ok(())
    }

    fn table(&mut self, entries: u64) -> Option<u64> {
        let start = self.tables;
        self.tables += 16 * entries;
        (self.tables <= BUFFERS).then_some(start)
    }
}

/// One virtqueue as its driver sees it.
pub(crate) struct Ring {
    memory: GuestMemory,
    base: u64,
    pub(crate) size: u16,
    pub(crate) event_index: bool,
    next: u16,
    available: u16,
    used: u16,
    pub(crate) kick: EventFd,
    call: EventFd,
}

impl Ring {
    /// The empty ring of queue `index`.
    pub(crate) fn new(memory: &GuestMemory, index: u16, size: u16, event_index: bool) -> Self {
        assert!(index < 4 && size <= MAX_SIZE);
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let ring = Self {
            memory: Arc::clone(memory),
            base: RINGS + RING_SPACING * u64::from(index),
            size,
            event_index,
            next: 0,
            available: 0,
            used: 0,
            kick: event(),
            call: event(),
        };
        // What a device's earlier life left there.
        ring.write(ring.base, &[0; RING_SPACING as usize]);
        ring
    }

    /// The device's side.
    pub(crate) fn active(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        let low = |address: u64| Some(address as u32);
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.base + AVAILABLE), Some(0));
        queue.set_used_ring_address(low(self.base + USED), Some(0));
        queue.set_event_idx(self.event_index);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue {
            index,
            queue,
            kick: self.kick.try_clone().expect("an eventfd"),
            call: self.call.try_clone().expect("an eventfd"),
        }
    }

    /// Where the descriptors are.
    pub(crate) fn table(&self) -> u64 {
        self.base
    }

    /// The used ring and the index of the available ring: addresses and lengths.
    pub(crate) fn moving_parts(&self) -> [(u64, u64); 2] {
        [
            (self.base + USED, 6 + 8 * u64::from(self.size)),
            (self.base + AVAILABLE + 2, 2),
        ]
    }

    fn store(&self, table: u64, index: u16, piece: &Piece, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&piece.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&piece.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Puts `bytes` into the readable pieces of a chain.
    pub(crate) fn fill(&self, pieces: &[Piece], mut bytes: &[u8]) {
        for piece in pieces.iter().filter(|piece| !piece.writable) {
            let (now, later) = bytes.split_at(bytes.len().min(piece.length as usize));
            self.write(piece.address, now);
            bytes = later;
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("rings are in memory");
    }

    /// Stores a chain; its head, or nothing if it does not fit into what is left of the ring.
    pub(crate) fn store_chain(&mut self, arena: &mut Arena, pieces: &[Piece], indirect: bool) -> Option<u16> {
        let count = u16::try_from(pieces.len()).ok()?;
        let needed = if indirect { 1 } else { count };
        if count == 0 || count > self.size || self.next + needed > self.size {
            return None;
        }
        let head = self.next;
        let table = if indirect {
            arena.table(count.into())?
        } else {
            self.base + 16 * u64::from(head)
        };
        let first = if indirect { 0 } else { head };
        for (place, piece) in (0..).zip(pieces) {
            let link = if place + 1 < count { NEXT } else { 0 };
            let flags = if piece.writable { WRITE } else { 0 } | link;
            self.store(table, place, piece, flags, first + place + 1);
        }
        if indirect {
            let piece = Piece {
                address: table,
                length: 16 * u32::from(count),
                writable: false,
            };
            self.store(self.base, head, &piece, INDIRECT, 0);
        }
        self.next += needed;
        Some(head)
    }

    /// Spoils a descriptor of the ring or an indirect table, or what the driver says of its chains.
    pub(crate) fn spoil(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let table = if input.ratio(1, 3)? { TABLES } else { self.base };
        let index = input.int_in_range(0..=self.next.saturating_sub(1))?;
        let place = table + 16 * u64::from(index);
        match input.int_in_range(0..=6_u8)? {
            0 => {
                let edges = [
                    LOW_SIZE - 1,
                    LOW_SIZE,
                    HIGH_START - 1,
                    HIGH_START + HIGH_SIZE - 1,
                    u64::MAX,
                    u64::MAX - 15,
                ];
                let address = if input.arbitrary()? {
                    *input.choose(&edges)?
                } else {
                    input.arbitrary()?
                };
                self.write(place, &address.to_le_bytes());
            }
            1 => {
                let edges = [0_u32, 1, 15, 17, 0x7fff_ffff, 0x8000_0000, u32::MAX];
                let length = if input.arbitrary()? {
                    *input.choose(&edges)?
                } else {
                    input.arbitrary()?
                };
                self.write(place + 8, &length.to_le_bytes());
            }
            2 => self.write(place + 12, &input.int_in_range(0..=7_u16)?.to_le_bytes()),
            3 => {
                // A chain that goes on: back to itself, into another one, or out of the table.
                let next = if input.ratio(3, 4)? {
                    input.int_in_range(0..=self.size)?
                } else {
                    input.arbitrary()?
                };
                self.write(place + 12, &(input.int_in_range(0..=3_u16)? | NEXT).to_le_bytes());
                self.write(place + 14, &next.to_le_bytes());
            }
            4 => self.make_available(if input.ratio(3, 4)? {
                index
            } else {
                input.arbitrary()?
            }),
            5 => self.available = self.available.wrapping_add(input.arbitrary()?),
            _ => {
                // Into the available ring or the used ring, but for the index by which the device is waited for.
                let offset = AVAILABLE + input.int_in_range(0..=0x3ff)?;
                if !(USED + 2..USED + 4).contains(&offset) {
                    self.write(self.base + offset, &[input.arbitrary()?]);
                }
            }
        }
        Ok(())
    }

    /// Puts a chain into the available ring; the device sees it at the next [`Self::publish`].
    pub(crate) fn make_available(&mut self, head: u16) {
        let place = self.base + AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
        self.write(place, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the device what is available.
    pub(crate) fn publish(&self) {
        self.memory
            .store(
                self.available.to_le(),
                GuestAddress(self.base + AVAILABLE + 2),
                Ordering::SeqCst,
            )
            .expect("rings are in memory");
    }

    /// Asks for an interrupt, or for none.
    pub(crate) fn ask_for_interrupt(&self, flags: u16, used_event: u16) {
        self.write(self.base + AVAILABLE, &flags.to_le_bytes());
        let place = self.base + AVAILABLE + 4 + 2 * u64::from(self.size);
        self.write(place, &used_event.to_le_bytes());
    }

    pub(crate) fn ring_doorbell(&self) {
        self.kick.write(1).expect("an eventfd");
    }

    /// The next chain that the device gave back: head and written bytes.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let place = self.base + USED + 4 + 8 * u64::from(self.used % self.size);
        let mut element = [0; 8];
        self.memory
            .read_slice(&mut element, GuestAddress(place))
            .expect("rings are in memory");
        self.used = self.used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = element;
        Some((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])))
    }

    fn used_index(&self) -> u16 {
        let index = self
            .memory
            .load(GuestAddress(self.base + USED + 2), Ordering::SeqCst);
        u16::from_le(index.expect("rings are in memory"))
    }

    /// Whether the device has used as many chains as it was shown.
    pub(crate) fn is_used_up(&self) -> bool {
        self.used_index() == self.available
    }

    /// All descriptors are free again.
    pub(crate) fn recycle(&mut self) {
        self.next = 0;
    }
}
