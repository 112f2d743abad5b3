//! Memory that rings hold. A process of its own, as what is held is counted for the process.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test fails by panicking; the memory is the test's own"
)]

use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block_io::{
    BlockDevice, Durability, EngineKind, HeldMemory, HostDevice, IoBuf, OpenOptions, Worker, WorkerOptions,
    helped, spawn_local, yield_now,
};

/// More than one piece of 128 MiB.
const LENGTH: usize = 130 << 20;
const PIECE: usize = 128 << 20;
/// Of a request.
const BLOCK: usize = 4096;

#[derive(Clone, Copy)]
struct Mapping(*mut u8);

// SAFETY: addresses; the test decides who uses them when.
unsafe impl Send for Mapping {}

impl Mapping {
    /// At `address`, in place of what is there, or wherever there is room.
    fn new(address: *mut u8) -> Self {
        let fixed = if address.is_null() { 0 } else { libc::MAP_FIXED };
        let address = unsafe {
            libc::mmap(
                address.cast(),
                LENGTH,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self(address.cast())
    }

    fn fill(self, place: usize, byte: u8, length: usize) {
        assert!(place + length <= LENGTH);
        unsafe { self.0.add(place).write_bytes(byte, length) };
    }

    fn bytes(self, place: usize, length: usize) -> Vec<u8> {
        assert!(place + length <= LENGTH);
        unsafe { std::slice::from_raw_parts(self.0.add(place), length) }.to_vec()
    }

    fn io(self, place: usize, length: usize) -> [IoBuf; 1] {
        assert!(place + length <= LENGTH);
        [unsafe { IoBuf::new(self.0.add(place), length) }]
    }

    fn hold(self) -> HeldMemory {
        unsafe { HeldMemory::new([(self.0, LENGTH)]) }
    }
}

/// One test at a time: what is held is counted for the process.
static ALONE: Mutex<()> = Mutex::new(());

/// KiB that the kernel holds for this process.
fn held() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn until(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "{} KiB are held",
            held()
        );
        yield_now().await;
    }
}

/// Blocks at the beginning of the memory, across two pieces, and at its end.
const PLACES: [usize; 3] = [8 * BLOCK, PIECE - BLOCK / 2, LENGTH - BLOCK];

/// Writes `byte` from all places, and reads it back to others.
async fn round(device: &HostDevice, mapping: Mapping, byte: u8) {
    for (number, place) in (0..).zip(PLACES) {
        mapping.fill(place, byte + number, BLOCK);
        let offset = u64::from(number) * 4096;
        let from = mapping.io(place, BLOCK);
        device.write(offset, &from, Durability::Volatile).await.unwrap();
        mapping.fill(place, 0, BLOCK);
        device.read(offset, &from).await.unwrap();
        assert_eq!(
            mapping.bytes(place, BLOCK),
            [byte + number; BLOCK],
            "place {place:#x}"
        );
    }
}

/// Many writes at once, so that helpers take some, from blocks 64 on.
async fn many(device: Arc<HostDevice>, mapping: Mapping, byte: u8) {
    let left = Rc::new(AtomicUsize::new(64));
    mapping.fill(64 * BLOCK, byte, 64 * BLOCK);
    for number in 0..64_usize {
        let (device, left) = (Arc::clone(&device), Rc::clone(&left));
        let task = async move {
            for _ in 0..20 {
                let from = mapping.io((64 + number) * BLOCK, BLOCK);
                let offset = (64 + number as u64) * 4096;
                device.write(offset, &from, Durability::Volatile).await.unwrap();
            }
            left.fetch_sub(1, Ordering::Relaxed);
        };
        assert!(spawn_local(task).is_ok());
    }
    until(|| left.load(Ordering::Relaxed) == 0).await;
}

#[test]
fn requests_reach_the_pages_of_the_present() {
    let _alone = ALONE.lock();
    for (engine, helpers) in [
        (EngineKind::Uring, 0),
        (EngineKind::Uring, 1),
        (EngineKind::Threads, 0),
    ] {
        let options = WorkerOptions {
            engine: Some(engine),
            helpers,
            ..WorkerOptions::default()
        };
        let worker = match Worker::start("test", options) {
            Ok(worker) => worker,
            Err(error) => {
                eprintln!("skipped: {error}");
                continue;
            }
        };
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = folder.path().join("image");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let device = Arc::new(HostDevice::open(&image, &OpenOptions::default()).unwrap());
        let rings = if engine == EngineKind::Uring {
            1 + helpers
        } else {
            0
        };
        let all = rings * LENGTH / 1024;

        worker.run(move || async move {
            let mapping = Mapping::new(ptr::null_mut());
            assert_eq!(held(), 0);
            round(&device, mapping, 10).await;

            let first = mapping.hold();
            until(|| held() == all).await;
            round(&device, mapping, 20).await;
            // Another queue of the same guest.
            let second = mapping.hold();
            drop(first);
            assert_eq!(held(), all);
            round(&device, mapping, 30).await;
            many(Arc::clone(&device), mapping, 40).await;
            assert_eq!(helped().unwrap() > 0, helpers > 0);
            drop(second);
            // By the end of the last, by helpers, too. A kernel may give the pages back later, as it does when the worker ends.
            until(|| held() == 0).await;

            // Other pages at the same addresses: a ring that still had the old ones would write these.
            let mapping = Mapping::new(mapping.0);
            round(&device, mapping, 50).await;
            many(Arc::clone(&device), mapping, 60).await;
            let third = mapping.hold();
            until(|| held() == all).await;
            round(&device, mapping, 70).await;
            many(Arc::clone(&device), mapping, 80).await;
            drop(third);
            until(|| held() == 0).await;
            unsafe { libc::munmap(mapping.0.cast(), LENGTH) };
        });
        let written = std::fs::read(&image).unwrap();
        assert_eq!(written[64 * BLOCK..128 * BLOCK], [80; 64 * BLOCK]);
    }
}

#[test]
fn a_worker_that_ends_lets_go() {
    let _alone = ALONE.lock();
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    let mapping = Mapping::new(ptr::null_mut());
    let (ready, wait) = std::sync::mpsc::channel();
    worker.spawn(move || async move {
        let _held = mapping.hold();
        ready.send(()).unwrap();
        std::future::pending::<()>().await;
    });
    wait.recv_timeout(Duration::from_secs(10)).unwrap();
    drop(worker);
    let begin = Instant::now();
    while held() != 0 {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "{} KiB are held",
            held()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    unsafe { libc::munmap(mapping.0.cast(), LENGTH) };
}
