//! Entry points for fuzzing: everything that a hostile driver can put into a queue.
//!
//! The input becomes descriptors, an available ring and the memory that they point to; the device runs as in a VM, on a real
//! worker, with a disk in memory. Whatever the input: no panic, no hang, no memory touched that is not the guest's, and no
//! more answers than requests.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use block_io::{Worker, WorkerOptions};
use virtio_core::virtio_queue::{Queue, QueueT};
use virtio_core::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use virtio_core::{Activation, ActiveQueue, DeviceEvents, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::memory_disk::MemoryDisk;
use crate::virtio_blk::{VirtioBlk, VirtioBlkOptions};

const QUEUE_SIZE: u16 = 64;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const CONTENT: u64 = 0x3000;
/// What fits between `CONTENT` and the end of the first region.
const MAX_CONTENT: usize = LOW - 0x3000;
/// Guest memory: two regions with a gap.
const LOW: usize = 0x1_0000;
const HIGH: u64 = 0x2_0000;
const DISK: usize = 64 << 10;

struct Silent;

impl DeviceEvents for Silent {
    fn config_changed(&self) {}
    fn needs_reset(&self, _: &str) {}
}

/// Runs a virtio-blk device on a queue made of `data`:
/// feature bits (1 byte), options (1), number of chains (1), a head for each (1), descriptors (16 each), content of memory.
///
/// # Panics
/// When the device misbehaves, or the host has no memory or threads.
#[expect(clippy::unwrap_used, reason = "the host's resources, not the input")]
pub fn fuzz_virtio_blk(data: &[u8]) {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    let worker = WORKER.get_or_init(|| Worker::start("fuzz", WorkerOptions::default()).unwrap());
    let Some(([features, options, chains], rest)) = data.split_first_chunk() else {
        return;
    };
    let chains = usize::from(*chains)
        .min(rest.len())
        .min(usize::from(QUEUE_SIZE) * 2);
    let (heads, rest) = rest.split_at(chains);
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LOW), (GuestAddress(HIGH), LOW)]).unwrap();
    for (index, descriptor) in rest.chunks_exact(16).take(usize::from(QUEUE_SIZE)).enumerate() {
        let mut descriptor: [u8; 16] = descriptor.try_into().unwrap();
        if options & 1 != 0 {
            // Mostly valid addresses and lengths reach deeper.
            descriptor[2] &= 3;
            descriptor[3..8].fill(0);
            descriptor[10..12].fill(0);
        }
        memory
            .write_slice(&descriptor, GuestAddress(index as u64 * 16))
            .unwrap();
    }
    let content = rest.get(usize::from(QUEUE_SIZE) * 16..).unwrap_or(rest);
    let content = &content[..content.len().min(MAX_CONTENT)];
    memory.write_slice(content, GuestAddress(CONTENT)).unwrap();
    for (place, head) in heads.iter().enumerate() {
        let place = AVAILABLE + 4 + 2 * (place as u64 % u64::from(QUEUE_SIZE));
        memory
            .write_obj(u16::from(*head) % (QUEUE_SIZE + 1), GuestAddress(place))
            .unwrap();
    }
    memory
        .write_obj(u16::try_from(chains).unwrap(), GuestAddress(AVAILABLE + 2))
        .unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(0), Some(0));
    queue.set_avail_ring_address(u32::try_from(AVAILABLE).ok(), Some(0));
    queue.set_used_ring_address(u32::try_from(USED).ok(), Some(0));
    queue.set_event_idx(options & 2 != 0);
    queue.set_ready(true);
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let disk = MemoryDisk::new(DISK as u64, 512);
    let options = VirtioBlkOptions {
        queue_size: QUEUE_SIZE,
        ..Default::default()
    };
    let mut device = VirtioBlk::new(Arc::new(disk), &options, vec![worker.handle().clone()]).unwrap();
    let memory = Arc::new(memory);
    let activation = Activation {
        memory_stays: false,
        memory: Arc::clone(&memory),
        features: u64::from(*features) << 24 | u64::from(*features) << 8,
        queues: vec![ActiveQueue {
            index: 0,
            queue,
            kick,
            call,
        }],
        events: Arc::new(Silent),
    };
    device.activate(activation).unwrap();
    // What is there at the start is always served.
    device.reset();
    let start = Instant::now();
    while !device.is_idle() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "the device does not become idle"
        );
        std::thread::yield_now();
    }
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    assert!(usize::from(used) <= chains, "{used} answers to {chains} chains");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_input_breaks_the_device(data in prop::collection::vec(any::<u8>(), 0..2048)) {
            fuzz_virtio_blk(&data);
        }

        #[test]
        fn no_mostly_valid_chains_break_the_device(
            chains in prop::collection::vec((0_u8..64, 0_u8..14, any::<[u8; 3]>()), 1..20),
            descriptors in prop::collection::vec((0_u16..0x400, 0_u16..2048, 0_u16..8, 0_u16..64), 64),
        ) {
            let mut data = vec![0xff, 3, u8::try_from(chains.len()).unwrap()];
            data.extend(chains.iter().map(|chain| chain.0));
            for (page, length, flags, next) in descriptors {
                data.extend((u64::from(page) * 64).to_le_bytes());
                data.extend(u32::from(length).to_le_bytes());
                data.extend((if flags > 4 { flags & 3 } else { flags }).to_le_bytes());
                data.extend(next.to_le_bytes());
            }
            // Requests of all kinds, wherever a chain finds its header.
            for _ in 0..512 {
                for (_, kind, sector) in &chains {
                    data.extend(u32::from(*kind).to_le_bytes());
                    data.extend([0; 4]);
                    data.extend([sector[0] & 63, sector[1] & 1, 0, 0, 0, 0, 0, sector[2] & 1]);
                }
            }
            fuzz_virtio_blk(&data);
        }
    }
}
