//! A virtqueue as a driver uses it: split ring, one slot per request in flight.
//!
//! Each slot has fixed memory: header, status byte, an indirect table, a data buffer. So a request is three stores of
//! descriptors that never change but for its length, and one entry of the available ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_core::vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Header, status and indirect table of a slot.
const SLOT: usize = 128;
const STATUS: usize = 16;
const TABLE: usize = 32;
/// Descriptors of a request: header, data, status.
const PARTS: u16 = 3;

/// Where the parts of a queue lie in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    start: usize,
    /// Entries of the ring.
    pub entries: u16,
    block_size: usize,
}

impl Layout {
    /// A queue from `start` on.
    pub fn new(start: usize, entries: u16, block_size: u32) -> Self {
        Self {
            start: start.next_multiple_of(4096),
            entries,
            block_size: (block_size as usize).next_multiple_of(4096),
        }
    }

    /// Offset of the descriptor table.
    pub fn descriptors(&self) -> usize {
        self.start
    }

    /// Offset of the available ring.
    pub fn available(&self) -> usize {
        self.start + usize::from(self.entries) * 16
    }

    /// Offset of the used ring.
    pub fn used(&self) -> usize {
        (self.available() + 6 + usize::from(self.entries) * 2).next_multiple_of(64)
    }

    fn slots(&self) -> usize {
        (self.used() + 6 + usize::from(self.entries) * 8).next_multiple_of(4096)
    }

    fn slot(&self, slot: u16) -> usize {
        self.slots() + usize::from(slot) * SLOT
    }

    fn data(&self, slot: u16) -> usize {
        (self.slots() + usize::from(self.entries) * SLOT).next_multiple_of(4096)
            + usize::from(slot) * self.block_size
    }

    /// Offset of the first byte behind it.
    pub fn end(&self) -> usize {
        self.data(self.entries)
    }

    /// The used ring's index.
    pub fn used_index(&self, memory: &MmapRegion) -> u16 {
        memory
            .as_volatile_slice()
            .load(self.used() + 2, Ordering::Acquire)
            .unwrap_or(0)
    }
}

/// The driver's side of a virtqueue. Used by one thread.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<MmapRegion>,
    layout: Layout,
    kick: EventFd,
    call: EventFd,
    event_index: bool,
    indirect: bool,
    available: u16,
    /// The available index when the server was last told.
    told: u16,
    used: u16,
}

impl Queue {
    pub(crate) fn new(
        memory: Arc<MmapRegion>,
        layout: Layout,
        kick: EventFd,
        call: EventFd,
        event_index: bool,
        indirect: bool,
    ) -> Self {
        Self {
            memory,
            layout,
            kick,
            call,
            event_index,
            indirect,
            available: 0,
            told: 0,
            used: 0,
        }
    }

    /// Requests that fit.
    pub fn slots(&self) -> u16 {
        if self.indirect {
            self.layout.entries
        } else {
            self.layout.entries / PARTS
        }
    }

    /// The data of a slot.
    pub fn data(&self, slot: u16, length: usize) -> Result<VolatileSlice<'_>> {
        let slice = self.memory.as_volatile_slice();
        slice
            .subslice(self.layout.data(slot), length)
            .map_err(|error| anyhow::anyhow!("slot {slot} has no {length} bytes: {error}"))
    }

    /// The answer to a slot's request.
    pub fn status(&self, slot: u16) -> u8 {
        self.load(self.layout.slot(slot) + STATUS)
    }

    /// Makes a request available; [`Self::notify`] tells of it.
    pub fn submit(&mut self, slot: u16, kind: u32, sector: u64, length: u32, device_writes: bool) {
        let layout = self.layout;
        let place = layout.slot(slot);
        self.store(place, kind);
        self.store(place + 4, 0_u32);
        self.store(place + 8, sector);
        self.store(place + STATUS, 0xff_u8);
        let head = if self.indirect { slot } else { slot * PARTS };
        let (table, first) = if self.indirect {
            self.descriptor(
                layout.descriptors(),
                head,
                place + TABLE,
                u32::from(PARTS) * 16,
                INDIRECT,
                0,
            );
            (place + TABLE, 0)
        } else {
            (layout.descriptors(), head)
        };
        self.descriptor(table, first, place, 16, NEXT, first + 1);
        let mut last = first + 1;
        if length > 0 {
            let flags = NEXT | if device_writes { WRITE } else { 0 };
            self.descriptor(table, last, layout.data(slot), length, flags, last + 1);
            last += 1;
        }
        self.descriptor(table, last, place + STATUS, 1, WRITE, 0);
        if self.indirect && length == 0 {
            self.store(layout.descriptors() + usize::from(head) * 16 + 8, 32_u32);
        }
        let entry = layout.available() + 4 + usize::from(self.available % layout.entries) * 2;
        self.store(entry, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the server what was submitted, and rings if it wants that.
    ///
    /// # Errors
    /// The eventfd is broken.
    pub fn notify(&mut self) -> Result<()> {
        let layout = self.layout;
        if self.available == self.told {
            return Ok(());
        }
        self.memory
            .as_volatile_slice()
            .store(self.available, layout.available() + 2, Ordering::Release)?;
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.available);
        self.told = new;
        let wanted = if self.event_index {
            let event: u16 = self.load(layout.used() + 4 + usize::from(layout.entries) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load::<u16>(layout.used()) & 1 == 0
        };
        if wanted {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// The slot of the next answer, if there is one.
    ///
    /// # Errors
    /// The server answered what was not asked.
    pub fn take_used(&mut self) -> Result<Option<u16>> {
        let layout = self.layout;
        if layout.used_index(&self.memory) == self.used {
            return Ok(None);
        }
        let entry = layout.used() + 4 + usize::from(self.used % layout.entries) * 8;
        let head: u32 = self.load(entry);
        self.used = self.used.wrapping_add(1);
        let slot = if self.indirect {
            head
        } else {
            head / u32::from(PARTS)
        };
        ensure!(
            slot < u32::from(self.slots()),
            "the server answered chain {head}, which there is not"
        );
        Ok(Some(u16::try_from(slot)?))
    }

    /// Waits for an answer; says whether there may be one.
    ///
    /// # Errors
    /// The eventfd is broken.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let layout = self.layout;
        // An interrupt for the next answer.
        self.store(
            layout.available() + 4 + usize::from(layout.entries) * 2,
            self.used,
        );
        fence(Ordering::SeqCst);
        if layout.used_index(&self.memory) != self.used {
            return Ok(true);
        }
        let limit = Timespec::try_from(timeout)?;
        let call = crate::front_end::borrow(&self.call);
        let mut fds = [PollFd::from_borrowed_fd(call, PollFlags::IN)];
        if poll(&mut fds, Some(&limit))? == 0 {
            return Ok(layout.used_index(&self.memory) != self.used);
        }
        // The server may have taken away what makes this block; another may have read it: both do not matter.
        let _ = self.call.read();
        Ok(true)
    }

    fn descriptor(&self, table: usize, index: u16, address: usize, length: u32, flags: u16, next: u16) {
        let place = table + usize::from(index) * 16;
        self.store(place, address as u64);
        self.store(place + 8, length);
        self.store(place + 12, flags);
        self.store(place + 14, next);
    }

    fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        self.memory
            .as_volatile_slice()
            .load(offset, Ordering::Relaxed)
            .unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        let stored = self
            .memory
            .as_volatile_slice()
            .store(value, offset, Ordering::Relaxed);
        debug_assert!(stored.is_ok(), "a queue lies within its memory");
    }
}
