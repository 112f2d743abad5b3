//! A virtqueue as a driver uses it: split ring, one slot per request in flight.
//!
//! Each slot has fixed memory: header, status byte, an indirect table, a data buffer. So a request is three stores of
//! descriptors (more if its data shall be in several segments) that never change but for its length, and one entry of the available ring.

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
/// Header, status and indirect table of a slot: a multiple of this.
const SLOT: usize = 128;
const STATUS: usize = 16;
const TABLE: usize = 32;
/// Bytes of data buffers: a server may hold all memory, and is not measured at that.
const MOST_DATA: usize = 16 << 20;
/// Bytes of a descriptor.
const DESCRIPTOR: u16 = 16;
/// Descriptors of a request beside those of its data: header, status.
const FRAME: u16 = 2;

/// Where the parts of a queue lie in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    start: usize,
    /// Entries of the ring.
    pub entries: u16,
    block_size: usize,
    /// Bytes of a segment of a request's data.
    segment: u32,
    /// Descriptors of the longest request.
    parts: u16,
    /// Requests that there is memory for.
    requests: u16,
}

impl Layout {
    /// A queue from `start` on, for data in segments of so many bytes.
    ///
    /// # Errors
    /// A request has more segments than the queue has entries.
    pub fn new(start: usize, entries: u16, block_size: u32, segment: u32) -> Result<Self> {
        let segments = block_size.div_ceil(segment.max(1)).max(1);
        let parts = segments.saturating_add(FRAME.into());
        ensure!(
            parts <= entries.into(),
            "requests of {segments} segments need a queue of {} entries: --queue-size",
            parts.next_power_of_two()
        );
        let block_size = (block_size as usize).next_multiple_of(4096).max(4096);
        let requests = u16::try_from((MOST_DATA / block_size).max(1)).unwrap_or(u16::MAX);
        Ok(Self {
            start: start.next_multiple_of(4096),
            entries,
            block_size,
            segment,
            parts: u16::try_from(parts)?,
            requests: requests.min(entries),
        })
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
        self.slots() + usize::from(slot) * self.slot_size()
    }

    fn slot_size(&self) -> usize {
        (TABLE + usize::from(self.parts * DESCRIPTOR)).next_multiple_of(SLOT)
    }

    fn data(&self, slot: u16) -> usize {
        (self.slots() + usize::from(self.requests) * self.slot_size()).next_multiple_of(4096)
            + usize::from(slot) * self.block_size
    }

    /// Addresses and lengths of a request's data. The last segment comes first, so that none follows the one before and both are one.
    fn segments(self, slot: u16, length: u32) -> impl DoubleEndedIterator<Item = (usize, u32)> {
        let data = self.data(slot);
        (0..length.div_ceil(self.segment)).rev().map(move |number| {
            let offset = number * self.segment;
            (data + offset as usize, self.segment.min(length - offset))
        })
    }

    /// Offset of the first byte behind it.
    pub fn end(&self) -> usize {
        self.data(self.requests)
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
            self.layout.requests
        } else {
            self.layout.requests.min(self.layout.entries / self.layout.parts)
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
        let (head, table, first) = match self.indirect {
            true => (slot, place + TABLE, 0),
            false => (slot * layout.parts, layout.descriptors(), slot * layout.parts),
        };
        self.descriptor(table, first, place, 16, NEXT, first + 1);
        let mut last = first + 1;
        let flags = NEXT | if device_writes { WRITE } else { 0 };
        for (address, length) in layout.segments(slot, length) {
            self.descriptor(table, last, address, length, flags, last + 1);
            last += 1;
        }
        self.descriptor(table, last, place + STATUS, 1, WRITE, 0);
        if self.indirect {
            let length = u32::from((last + 1) * DESCRIPTOR);
            self.descriptor(layout.descriptors(), head, table, length, INDIRECT, 0);
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
            head / u32::from(layout.parts)
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
        let place = table + usize::from(index * DESCRIPTOR);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_the_data_and_none_follows_the_one_before() {
        let layout = Layout::new(0, 8, 16 << 10, 3072).unwrap();
        assert_eq!(layout.parts, 8);
        let data = layout.data(1);
        assert!(layout.slot(1) + TABLE + 8 * 16 <= layout.slot(2) && layout.slot(8) <= layout.data(0));
        let found: Vec<_> = layout.segments(1, 7000).collect();
        assert_eq!(found, [(data + 6144, 856), (data + 3072, 3072), (data, 3072)]);
        assert_eq!(layout.segments(1, 0).count(), 0);
        let whole = Layout::new(0, 4, 4096, 4096).unwrap();
        assert!(whole.segments(3, 4096).eq([(whole.data(3), 4096)]));
        assert!(Layout::new(0, 8, 16 << 10, 2048).is_err());
    }
}
