//! What `virtio-queue` does not offer for used rings: several entries that become visible at once, and the driver's wish
//! for no interrupts where the event index is not negotiated.
//!
//! A packet that fills several mergeable buffers must appear in the used ring as a whole: a driver that sees its first
//! buffer also takes the rest (virtio 1.2 §5.1.6.4). `Queue::add_used` moves the ring's index with every entry, so that a
//! polling driver could look in between.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_core::{ActiveQueue, DeviceError};
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes before the entries of an available or used ring: flags and index.
const RING_HEADER: u64 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2 §2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Gives several chains, as (head, written bytes), back to the driver, who sees all or none. Does not interrupt.
pub(crate) fn add_used_together(
    queue: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    used: &[(u16, u32)],
) -> Result<(), DeviceError> {
    let Some(((last_head, last_written), earlier)) = used.split_last() else {
        return Ok(());
    };
    let size = queue.queue.size();
    let mut next = Wrapping(queue.queue.next_used());
    for (head, written) in earlier {
        if *head >= size {
            return Err(queue.error(Error::InvalidDescriptorIndex));
        }
        let entry = RING_HEADER + 8 * u64::from(next.0 % size);
        queue
            .queue
            .used_ring()
            .checked_add(entry)
            .ok_or(Error::AddressOverflow)
            .and_then(|address| {
                memory
                    .write_obj(
                        (u64::from(*head) | u64::from(*written) << 32).to_le(),
                        GuestAddress(address),
                    )
                    .map_err(Error::GuestMemory)
            })
            .map_err(|source| queue.error(source))?;
        next += Wrapping(1);
    }
    // `add_used` writes the last entry and then publishes the index, which covers the earlier ones.
    queue.queue.set_next_used(next.0);
    queue.add_used(memory, *last_head, *last_written)
}

/// Decides when to interrupt the driver about one queue.
#[derive(Debug)]
pub(crate) struct Interrupts {
    /// The used index when the driver was last considered.
    considered: Wrapping<u16>,
}

impl Interrupts {
    /// For a queue about which nothing was signalled yet.
    pub(crate) fn new(queue: &ActiveQueue) -> Self {
        Self {
            considered: Wrapping(queue.queue.next_used()),
        }
    }

    /// Interrupts the driver if chains were given back since the last call and it wants to know (virtio 1.2 §2.7.7). To be
    /// called once per batch.
    pub(crate) fn notify(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), DeviceError> {
        let old = self.considered;
        let new = Wrapping(queue.queue.next_used());
        self.considered = new;
        if old == new {
            return Ok(());
        }
        // The driver writes its wish and then looks at the used index; we publish the index and then look at its wish.
        fence(Ordering::SeqCst);
        let wanted = if queue.queue.event_idx_enabled() {
            let offset = RING_HEADER + 2 * u64::from(queue.queue.size());
            let used_event = Wrapping(read_avail(queue, memory, offset)?);
            new - used_event - Wrapping(1) < new - old
        } else {
            read_avail(queue, memory, 0)? & NO_INTERRUPT == 0
        };
        if wanted {
            queue.call.write(1).map_err(|source| DeviceError::Host {
                action: format!("signal the interrupt of virtqueue {}", queue.index),
                source,
            })?;
        }
        Ok(())
    }
}

/// Reads a field of the available ring.
fn read_avail(queue: &ActiveQueue, memory: &GuestMemoryMmap, offset: u64) -> Result<u16, DeviceError> {
    queue
        .queue
        .avail_ring()
        .checked_add(offset)
        .ok_or(Error::AddressOverflow)
        .and_then(|address| {
            memory
                .load::<u16>(GuestAddress(address), Ordering::Relaxed)
                .map_err(Error::GuestMemory)
        })
        .map(u16::from_le)
        .map_err(|source| queue.error(source))
}
