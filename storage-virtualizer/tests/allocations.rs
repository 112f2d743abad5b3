//! In steady state a request allocates nothing: an allocator that counts.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod counting;
mod driver;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use counting::{ALLOCATIONS, COUNTS};
use driver::{Driver, activate, memory, readable, reset_and_wait, writable};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, blk_feature, kind};
use virtio_core::feature;
use virtio_core::vm_memory::{Bytes, GuestAddress};

#[test]
fn a_warm_queue_serves_reads_writes_and_flushes_without_allocating() {
    const DEPTH: u16 = 16;
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let disk = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    let mut device =
        VirtioBlk::new(disk, &VirtioBlkOptions::default(), vec![worker.handle().clone()]).unwrap();
    let memory = memory(4 << 20);
    let mut driver = Driver::new(&memory, 0x1000, 128, true);
    activate(
        &mut device,
        &memory,
        feature::RING_EVENT_IDX | blk_feature::FLUSH,
        vec![driver.active(0)],
    );
    let mut round = |number: u32| {
        for slot in 0..DEPTH {
            let (header, data) = (
                0x10_0000 + u64::from(slot) * 16,
                0x20_0000 + u64::from(slot) * 16384,
            );
            let (kind, pieces) = match (u32::from(slot) + number) % 8 {
                0 => (kind::FLUSH, vec![]),
                1..4 => (kind::OUT, vec![readable(data, 4096), readable(data + 8192, 512)]),
                _ => (kind::IN, vec![writable(data, 4096), writable(data + 8192, 4096)]),
            };
            memory.write_obj(kind, GuestAddress(header)).unwrap();
            memory
                .write_obj(u64::from(slot) * 32, GuestAddress(header + 8))
                .unwrap();
            let mut chain = vec![readable(header, 16)];
            chain.extend(pieces);
            chain.push(writable(0x11_0000 + u64::from(slot), 1));
            driver.store_chain(slot * 4, &chain);
            driver.add(slot * 4);
        }
        driver.publish();
        driver.kick();
        for _ in 0..DEPTH {
            driver.wait_used();
        }
    };
    for number in 0..50 {
        round(number);
    }
    worker.run(|| async { COUNTS.set(true) });
    for number in 0..500 {
        round(number);
    }
    let counted = ALLOCATIONS.load(Ordering::Relaxed);
    worker.run(|| async { COUNTS.set(false) });
    // What the two orders to the worker cost is theirs.
    assert!(counted <= 4, "{counted} allocations in 8000 requests");
    assert_eq!(device.handle().counters()[0].counts.errors, 0);
    reset_and_wait(&mut device);
}
