//! In steady state a SCSI read or write allocates nothing: an allocator that counts.

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
use storage_virtualizer::scsi::{Identity, TransportId, Unit, UnitOptions};
use storage_virtualizer::virtio_scsi::{VirtioScsi, VirtioScsiOptions};
use storage_virtualizer::{Either, PinnedDisk};
use virtio_core::feature;
use virtio_core::vm_memory::{Bytes, GuestAddress};

/// As a machine's adapter has it: an image, or a disk of a pool.
type Mixed = Either<Arc<HostDevice>, PinnedDisk<HostDevice>>;

const REQUESTS: u64 = 0x10_0000;
const ANSWERS: u64 = 0x11_0000;
const STRIDE: u64 = 128;
const DATA: u64 = 0x20_0000;

#[test]
fn a_warm_queue_serves_reads_and_writes_without_allocating() {
    const DEPTH: u16 = 16;
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let disk = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    let options = VirtioScsiOptions {
        initiator: TransportId::sas(1),
        queues: 1,
        queue_size: 128,
        last_target: 0,
    };
    let mut device = VirtioScsi::new(&options, vec![worker.handle().clone()]).unwrap();
    let unit = Unit::new(UnitOptions::new(Identity::from_name("disk", "disk")));
    device
        .handle()
        .add((0, 0), Arc::new(unit), Mixed::First(disk), Arc::default(), None)
        .unwrap();
    let memory = memory(4 << 20);
    let control = Driver::new(&memory, 0x8000, 16, true);
    let mut driver = Driver::new(&memory, 0x1000, 128, true);
    let queues = vec![control.active(0), driver.active(2)];
    activate(&mut device, &memory, feature::RING_EVENT_IDX, queues);
    let mut round = |number: u32| {
        for slot in 0..DEPTH {
            let far = u64::from(slot) * STRIDE;
            let data = DATA + u64::from(slot) * 16384;
            let writes = (u32::from(slot) + number).is_multiple_of(3);
            // Eight blocks, in two pieces. FUA now and then.
            let fua = if writes && slot == 5 { 8 } else { 0 };
            let cdb = [
                if writes { 0x2a } else { 0x28 },
                fua,
                0,
                0,
                0,
                slot as u8 * 8,
                0,
                0,
                8,
                0,
            ];
            memory
                .write_slice(&[1, 0, 0x40, 0, 0, 0, 0, 0], GuestAddress(REQUESTS + far))
                .unwrap();
            memory
                .write_slice(&cdb, GuestAddress(REQUESTS + far + 19))
                .unwrap();
            let (request, answer) = (readable(REQUESTS + far, 51), writable(ANSWERS + far, 108));
            let chain = if writes {
                [request, readable(data, 3584), readable(data + 8192, 512), answer]
            } else {
                [request, answer, writable(data, 3584), writable(data + 8192, 512)]
            };
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
    for slot in 0..DEPTH {
        let mut answer = [0xff; 8];
        let at = ANSWERS + u64::from(slot) * STRIDE + 4;
        memory.read_slice(&mut answer, GuestAddress(at)).unwrap();
        assert_eq!(answer, [0; 8]);
    }
    let counters = device.handle().counters()[0].counts;
    assert_eq!(counters.errors, 0);
    // But for the first command, which was told that power came on.
    assert_eq!(counters.reads + counters.writes, 550 * 16 - 1);
    reset_and_wait(&mut device);
}
