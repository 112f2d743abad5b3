//! Entry points for fuzzing: everything that a hostile driver can put into the queues of these devices.
//!
//! The input becomes the rings, descriptors and buffers of all queues of a device, and for the network card also what its
//! peer sends. The devices' own code serves the queues, on the calling thread, so that a finding repeats. Whatever the
//! input: no panic, no hang, no memory touched that is not the guest's, and no more answers than requests.

use std::sync::Arc;

use virtio_core::{ActiveQueue, DeviceEvents, GuestMemory};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use super::net::fuzz::fuzz_net;
pub use super::rng::fuzz_rng;
pub use super::virtio_console::fuzz_console;

const QUEUE_SIZE: u16 = 32;
/// Rings of queue `n` lie at `n * SPACING`.
const SPACING: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Guest memory: two regions with a gap.
const REGION: usize = 0x4_0000;
const HIGH: u64 = 0x8_0000;
/// Where what is left of the input goes.
const CONTENT: u64 = 0x4000;

/// Bytes of the input, zero beyond its end.
pub(super) struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    pub(super) fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (now, later) = self.0.split_at(count);
        bytes[..count].copy_from_slice(now);
        self.0 = later;
        bytes
    }

    pub(super) fn rest(&self) -> &'d [u8] {
        self.0
    }
}

struct Silent;

impl DeviceEvents for Silent {
    fn config_changed(&self) {}
    fn needs_reset(&self, _: &str) {}
}

/// A guest whose driver means no good.
pub(super) struct Guest {
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    pub(super) events: Arc<dyn DeviceEvents>,
    /// Chains that each queue offers.
    offered: Vec<u16>,
    /// The device may be made to write into the rings, so that they prove nothing.
    rings_writable: bool,
}

impl Guest {
    /// Reads features (8 bytes), options (1), and for each of `queues` queues its chains and descriptors out of `input`.
    #[expect(clippy::unwrap_used, reason = "the host's resources, not the input")]
    pub(super) fn new(input: &mut Input<'_>, queues: u16) -> (Self, Vec<ActiveQueue>) {
        let regions = [(GuestAddress(0), REGION), (GuestAddress(HIGH), REGION)];
        let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let features = u64::from_le_bytes(input.bytes());
        let [options] = input.bytes();
        let mut guest = Self {
            memory,
            features,
            events: Arc::new(Silent),
            offered: Vec::new(),
            rings_writable: false,
        };
        let queues = (0..queues)
            .map(|index| guest.queue(input, index, options))
            .collect();
        let content = input.rest();
        let content = &content[..content.len().min(REGION / 2)];
        guest.memory.write_slice(content, GuestAddress(CONTENT)).unwrap();
        (guest, queues)
    }

    #[expect(clippy::unwrap_used, reason = "the host's resources, not the input")]
    fn queue(&mut self, input: &mut Input<'_>, index: u16, options: u8) -> ActiveQueue {
        let base = u64::from(index) * SPACING;
        let [chains, descriptors] = input.bytes();
        // At times more than the queue has, which is against the rules.
        let chains = u16::from(chains) % (QUEUE_SIZE + 2);
        for place in 0..u64::from(QUEUE_SIZE) {
            let [head] = input.bytes();
            let head = u16::from(head) % (QUEUE_SIZE + u16::from(options & 4 != 0));
            let place = base + AVAILABLE + 4 + 2 * place;
            self.memory.write_obj(head, GuestAddress(place)).unwrap();
        }
        self.memory
            .write_obj(chains, GuestAddress(base + AVAILABLE + 2))
            .unwrap();
        for place in 0..u64::from(descriptors).min(u64::from(QUEUE_SIZE)) {
            let mut descriptor: [u8; 16] = input.bytes();
            if options & 1 != 0 {
                // Mostly valid addresses, lengths and links reach deeper.
                descriptor[2] &= 0x0b;
                descriptor[3..8].fill(0);
                descriptor[9] &= 0x3f;
                descriptor[10..12].fill(0);
                descriptor[12] &= 7;
                descriptor[13] = 0;
                descriptor[14] %= 32;
                descriptor[15] = 0;
            }
            let address = u64::from_le_bytes(std::array::from_fn(|at| descriptor[at]));
            let (writable, indirect) = (descriptor[12] & 2 != 0, descriptor[12] & 4 != 0);
            self.rings_writable |= indirect || (writable && address < CONTENT);
            self.memory
                .write_slice(&descriptor, GuestAddress(base + 16 * place))
                .unwrap();
        }
        self.offered.push(chains);
        let address = |offset: u64| u32::try_from(base + offset).ok();
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(address(0), Some(0));
        queue.set_avail_ring_address(address(AVAILABLE), Some(0));
        queue.set_used_ring_address(address(USED), Some(0));
        queue.set_event_idx(options & 2 != 0);
        queue.set_ready(true);
        ActiveQueue {
            index,
            queue,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// No queue may have more answers than requests.
    #[expect(clippy::unwrap_used, reason = "the rings are in memory")]
    pub(super) fn check(&self) {
        if self.rings_writable {
            return;
        }
        for (base, offered) in (0..).step_by(0x1000).zip(&self.offered) {
            let used: u16 = self.memory.read_obj(GuestAddress(base + USED + 2)).unwrap();
            assert!(used <= *offered, "{used} answers to {offered} chains");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    /// Input with rings that hold sensible chains for the most part, for `queues` queues, and frames as content.
    pub(crate) fn mostly_valid(queues: usize) -> impl Strategy<Value = Vec<u8>> {
        let descriptor = (
            prop_oneof![40 => 0x4000_u32..0x3_a000, 10 => 0x8_0000_u32..0xb_a000, 1 => any::<u32>()],
            prop_oneof![1 => 0_u32..20, 10 => 20_u32..2000, 4 => 0_u32..16_000],
            // Eight: as this queue wants it, and the last one of its chain.
            prop_oneof![30 => Just(8_u16), 3 => 0_u16..4, 1 => 4_u16..8],
            0_u16..32,
        );
        let queue = (
            0_u8..34,
            prop::collection::vec(0_u8..32, 32),
            prop::collection::vec(descriptor, 32),
        );
        let frames = prop::collection::vec((14_usize..3000, any::<u8>()), 0..20);
        (
            any::<u64>(),
            any::<u8>(),
            prop::collection::vec(queue, queues),
            frames,
        )
            .prop_map(|(features, options, queues, frames)| {
                let mut data = features.to_le_bytes().to_vec();
                data.push(options | 1);
                for (number, (chains, heads, descriptors)) in queues.into_iter().enumerate() {
                    let natural = if number == 0 { 2 } else { 0 };
                    data.extend([chains, 32]);
                    data.extend(heads);
                    for (address, length, flags, next) in descriptors {
                        data.extend(u64::from(address).to_le_bytes());
                        data.extend(length.to_le_bytes());
                        let flags = if flags == 8 { natural } else { flags };
                        data.extend(flags.to_le_bytes());
                        data.extend(next.to_le_bytes());
                    }
                }
                for (length, byte) in frames {
                    data.extend(u32::try_from(length).unwrap().to_be_bytes());
                    data.extend(vec![byte; length]);
                }
                data
            })
    }
}
