//! The queue through which the guest gets packets.
//!
//! Receive buffers are taken from the queue before their packet is there ("armed"), as many as the largest packet may need,
//! so that the kernel writes a packet right where the guest wants it. What a packet leaves stays armed for the next.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use virtio_core::{ActiveQueue, GuestMemory};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::protocol::{HEADER_SIZE, MAX_PACKET, NUM_BUFFERS_OFFSET, feature};
use super::statistics::Counters;
use super::worker::{WorkerError, chain_error, disable_kicks, enable_kicks, next_chain};
use crate::devices::guest_buffers::{ChainError, Direction, Extent, GuestBuffers};
use crate::devices::used_ring::{Interrupts, add_used_together};

/// Pieces of armed buffers from which on no more are armed; one more chain then still fits into one `readv`.
const ARMED_SEGMENTS: usize = 512;

/// A chain of receive buffers that waits for a packet.
#[derive(Clone, Copy)]
struct Armed {
    head: u16,
    extent: Extent,
}

/// The queue, and the buffers that were taken out of it.
pub(super) struct ReceiveQueue {
    pub(super) queue: ActiveQueue,
    pub(super) interrupts: Interrupts,
    /// Chains whose buffers are in `buffers`, in order.
    armed: VecDeque<Armed>,
    pub(super) buffers: GuestBuffers,
    /// What of a packet did not fit into `buffers`.
    pub(super) overflow: Vec<u8>,
    /// Length of a packet that is partly in `buffers`, the rest in `overflow`, and needs more buffers.
    pub(super) held: Option<usize>,
    /// Armed buffers to have before receiving, in bytes.
    enough: usize,
    mergeable: bool,
    /// The driver takes packets without checksum.
    checksums: bool,
    /// The driver has provided no buffers; its doorbell will ring.
    pub(super) starved: bool,
    /// Used entries of the packet at hand.
    used: Vec<(u16, u32)>,
}

impl ReceiveQueue {
    /// Of a driver that agreed on `features`, on a network whose packets have up to `mtu` bytes (1500 if it does not say).
    pub(super) fn new(queue: ActiveQueue, memory: &GuestMemory, features: u64, mtu: Option<u16>) -> Self {
        Self {
            interrupts: Interrupts::new(&queue),
            armed: VecDeque::new(),
            buffers: GuestBuffers::new(Arc::clone(memory)),
            overflow: Vec::with_capacity(MAX_PACKET),
            held: None,
            enough: enough(features, mtu),
            mergeable: features & feature::MRG_RXBUF != 0,
            checksums: features & feature::GUEST_CSUM != 0,
            starved: false,
            used: Vec::new(),
            queue,
        }
    }

    /// Arms buffers until there are enough, or more where a packet is held. Whether there are any to work with; if not, the
    /// doorbell is on.
    pub(super) fn arm(&mut self, memory: &GuestMemoryMmap, starved: &AtomicU64) -> Result<bool, WorkerError> {
        loop {
            disable_kicks(&mut self.queue, memory)?;
            while self.wants_more() {
                let Some(chain) = next_chain(&mut self.queue, memory)? else {
                    break;
                };
                let head = chain.head_index();
                let extent = self
                    .buffers
                    .append(chain, Direction::ToGuest)
                    .map_err(chain_error(&self.queue))?;
                if extent.bytes == 0 {
                    return Err(chain_error(&self.queue)(ChainError::Unusable));
                }
                self.armed.push_back(Armed { head, extent });
            }
            let usable = match self.held {
                Some(length) => self.buffers.len() >= length || !self.wants_more(),
                None => self.buffers.len() > 0,
            };
            if usable {
                return Ok(true);
            }
            if !enable_kicks(&mut self.queue, memory)? {
                self.starved = true;
                Counters::add(starved, 1);
                return Ok(false);
            }
        }
    }

    fn wants_more(&self) -> bool {
        let enough = self.held.unwrap_or(self.enough);
        self.buffers.len() < enough
            && (self.mergeable || self.armed.is_empty())
            && self.armed.len() < usize::from(self.queue.queue.size())
            && self.buffers.segments() < ARMED_SEGMENTS
    }

    /// Gives the packet of `length` bytes, which is in `buffers` and `overflow`, to the driver. Whether that was done;
    /// otherwise the packet is held until there are more buffers, or dropped because there never will be enough.
    pub(super) fn deliver(&mut self, length: usize, memory: &GuestMemoryMmap) -> Result<bool, WorkerError> {
        let in_buffers = length.saturating_sub(self.overflow.len());
        if length > self.buffers.len() {
            if self.wants_more_for(length) {
                self.held = Some(length);
            }
            return Ok(false);
        }
        if !self.overflow.is_empty() {
            self.buffers.copy_from(in_buffers, &self.overflow);
            self.overflow.clear();
        }
        self.used.clear();
        let mut left = length;
        let mut released = Extent::default();
        while left > 0 {
            let Some(armed) = self.armed.pop_front() else {
                break;
            };
            let written = armed.extent.bytes.min(left);
            left -= written;
            released.segments += armed.extent.segments;
            released.bytes += armed.extent.bytes;
            self.used
                .push((armed.head, u32::try_from(written).unwrap_or(u32::MAX)));
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.buffers.copy_from(NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        if !self.checksums {
            // The kernel marks packets whose checksum it knows to be good, also for drivers that do not expect that.
            self.buffers.copy_from(0, &[0]);
        }
        self.buffers.release_front(released);
        add_used_together(&mut self.queue, memory, &self.used)?;
        Ok(true)
    }

    /// Whether buffers for a packet of `length` bytes may still come.
    fn wants_more_for(&self, length: usize) -> bool {
        self.mergeable
            && length <= MAX_PACKET
            && self.armed.len() < usize::from(self.queue.queue.size())
            && self.buffers.segments() < ARMED_SEGMENTS
    }
}

/// How many bytes of receive buffers hold any packet that this driver may get.
fn enough(features: u64, mtu: Option<u16>) -> usize {
    if features & feature::GUEST_SEGMENTATION != 0 {
        MAX_PACKET
    } else {
        HEADER_SIZE + 18 + usize::from(mtu.unwrap_or(1500))
    }
}
