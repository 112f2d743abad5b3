//! Memory that rings hold. A process of its own, as what is held is counted for the process.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test fails by panicking; the memory is the test's own"
)]

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
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
        Self::map(address, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed, -1)
    }

    fn map(address: *mut u8, flags: libc::c_int, file: libc::c_int) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let address = unsafe { libc::mmap(address.cast(), LENGTH, protection, flags, file, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        Self(address.cast())
    }

    /// Pages of the usual size.
    fn small() -> Self {
        Self::new(ptr::null_mut()).advised(libc::MADV_NOHUGEPAGE)
    }

    /// Huge pages, if there are any.
    fn huge() -> Self {
        Self::new(ptr::null_mut()).advised(libc::MADV_HUGEPAGE)
    }

    /// Of a file in memory, as guests have it whose disks another process serves.
    fn shared() -> Self {
        let file = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
        let length = LENGTH.try_into().unwrap();
        assert_eq!(unsafe { libc::ftruncate(file, length) }, 0);
        let mapping = Self::map(ptr::null_mut(), libc::MAP_SHARED, file);
        unsafe { libc::close(file) };
        mapping
    }

    fn advised(self, advice: libc::c_int) -> Self {
        // A kernel without huge pages takes no advice about them.
        let _ = unsafe { libc::madvise(self.0.cast(), LENGTH, advice) };
        self
    }

    fn unmap(self) {
        assert_eq!(unsafe { libc::munmap(self.0.cast(), LENGTH) }, 0);
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

    fn list(self, segments: &[Segment]) -> Vec<IoBuf> {
        let io = |(place, length): &Segment| self.io(*place, *length);
        segments.iter().flat_map(io).collect()
    }

    fn hold(self) -> HeldMemory {
        unsafe { HeldMemory::new([(self.0, LENGTH)]) }
    }
}

/// Place and length in the memory.
type Segment = (usize, usize);

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
    let places = PLACES
        .into_iter()
        .flat_map(|place| [(place, BLOCK), (place, BLOCK / 2)]);
    for (number, (place, first)) in (0..).zip(places) {
        mapping.fill(place, byte + number, BLOCK);
        let offset = u64::from(number) * 4096;
        let from = match first {
            BLOCK => mapping.list(&[(place, BLOCK)]),
            _ => mapping.list(&[(place, first), (place + first, BLOCK - first)]),
        };
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
                let place = (64 + number) * BLOCK;
                let from = match number % 2 {
                    0 => mapping.list(&[(place, BLOCK)]),
                    _ => mapping.list(&[(place, 512), (place + 512, BLOCK - 512)]),
                };
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
        let Some(worker) = start(WorkerOptions {
            engine: Some(engine),
            helpers,
            ..WorkerOptions::default()
        }) else {
            continue;
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
            mapping.unmap();
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
    mapping.unmap();
}

/// Numbers that look random.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 8).unwrap() % limit
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = (0..length.div_ceil(8)).flat_map(|_| {
            self.below(1);
            self.0.to_le_bytes()
        });
        words.take(length).collect()
    }

    /// Segments of `total` bytes in all, each a multiple of `unit` long and somewhere in an area of its own.
    fn segments(&mut self, areas: Range<usize>, total: usize, unit: usize) -> Vec<Segment> {
        let mut taken = HashSet::new();
        let mut segments = Vec::new();
        let mut left = total;
        while left > 0 {
            let area = areas.start + self.below(areas.len());
            if !taken.insert(area) {
                continue;
            }
            let length = ((1 + self.below(AREA / 2 / unit)) * unit).min(left);
            let start = self.below((AREA - length) / unit) * unit;
            segments.push((area * AREA + start, length));
            left -= length;
        }
        segments
    }
}

/// Segments do not overlap: each lies in its own.
const AREA: usize = 64 << 10;
/// Areas of the first piece, and all.
const FIRST: Range<usize> = 0..PIECE / AREA;
const ALL: Range<usize> = 0..LENGTH / AREA;
/// Bytes of the device that `lists` uses.
const LISTS: usize = 8 << 20;

/// The kinds of lists that a request may have, of the same number of bytes.
fn kinds(draw: &mut Draw, unit: usize) -> Vec<Vec<Segment>> {
    let total = (16 + draw.below(48)) * BLOCK;
    let mut kinds = vec![
        draw.segments(FIRST, total, unit),
        draw.segments(ALL, total, unit),
        draw.segments(PIECE / AREA..LENGTH / AREA, total, unit),
        // One segment; small ones in falling order; in no order.
        vec![(AREA, total)],
        (0..total / BLOCK)
            .map(|index| (PIECE - (index + 1) * 2 * BLOCK, BLOCK))
            .collect(),
        (0..total / BLOCK)
            .map(|index| ((index ^ 5) * 2 * BLOCK, BLOCK))
            .collect(),
    ];
    let mut crossing = draw.segments(0..64, total - BLOCK, unit);
    let across = PIECE - BLOCK / 2 / unit * unit;
    crossing.insert(draw.below(crossing.len()), (across, BLOCK));
    kinds.push(crossing);
    kinds
}

fn gather(list: &[IoBuf]) -> Vec<u8> {
    let bytes = |buffer: &IoBuf| {
        let mut bytes = vec![0; buffer.len()];
        buffer.copy_to_slice(&mut bytes);
        bytes
    };
    list.iter().flat_map(bytes).collect()
}

fn scatter(list: &[IoBuf], mut data: &[u8]) {
    for buffer in list {
        let (here, rest) = data.split_at(buffer.len());
        buffer.copy_from_slice(here);
        data = rest;
    }
}

/// Writes from all kinds of lists and reads back to all; `outside` is not held.
async fn lists(device: &HostDevice, mapping: Mapping, outside: Mapping, draw: &mut Draw) {
    for unit in [512, 4096] {
        let kinds = kinds(draw, unit);
        let total = kinds[0].iter().map(|(_, length)| length).sum();
        let mut lists: Vec<_> = kinds.iter().map(|segments| mapping.list(segments)).collect();
        // The same, but for one segment of each.
        for mut list in lists.clone() {
            let stray = draw.below(list.len());
            list[stray] = outside.io(draw.below(8) * BLOCK, list[stray].len())[0];
            lists.push(list);
        }
        for (number, from) in lists.iter().enumerate() {
            let data = draw.bytes(total);
            let offset = (draw.below((LISTS - total) / BLOCK) * BLOCK) as u64;
            let durability = [Durability::Volatile, Durability::Durable][number % 2];
            scatter(from, &data);
            device.write(offset, from, durability).await.unwrap();
            for to in &lists {
                scatter(to, &vec![0; total]);
                device.read(offset, to).await.unwrap();
                assert!(gather(to) == data, "{from:?} to {to:?}, unit {unit}");
            }
        }
    }
}

/// As many as the kernel takes at once and more, one of them empty, and at odd addresses.
async fn many_segments(device: &HostDevice, mapping: Mapping, draw: &mut Draw) {
    for count in [2, 254, 682, 683, 1024, 1025] {
        for shift in [0, 1] {
            let mut segments: Vec<_> = (0..count)
                .map(|index| (index * 2 * BLOCK + shift, BLOCK))
                .collect();
            let data = draw.bytes(count * BLOCK);
            for empty in [false, true] {
                if empty {
                    segments.insert(draw.below(count), (BLOCK, 0));
                }
                let list = mapping.list(&segments);
                scatter(&list, &data);
                device.write(0, &list, Durability::Volatile).await.unwrap();
                scatter(&list, &vec![0; data.len()]);
                device.read(0, &list).await.unwrap();
                assert!(
                    gather(&list) == data,
                    "{count} segments, {shift}, an empty one: {empty}"
                );
            }
        }
    }
}

/// A block device, made of a file; none if this machine gives us none.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(file: &Path) -> Option<Self> {
        let mut setup = Command::new("losetup");
        setup.args(["--find", "--show", "--direct-io=on"]).arg(file);
        match setup.output() {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            refused => {
                eprintln!("without a block device: {refused:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn lists_of_segments_are_read_and_written_wherever_they_lie() {
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = |name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![0; LISTS]).unwrap();
        path
    };
    let block_device = LoopDevice::new(&image("block-device"));
    let mut paths = vec![image("image")];
    paths.extend(block_device.as_ref().map(|device| device.0.clone()));
    let Some(worker) = start(WorkerOptions {
        engine: Some(EngineKind::Uring),
        ..WorkerOptions::default()
    }) else {
        return;
    };
    for (number, path) in paths.iter().enumerate() {
        let device = HostDevice::open(path, &OpenOptions::default()).unwrap();
        worker.run(move || async move {
            let draw = &mut Draw(number as u64 + 1);
            for make in [Mapping::small, Mapping::huge, Mapping::shared] {
                let (mapping, outside) = (make(), make());
                lists(&device, mapping, outside, draw).await;
                let held_here = mapping.hold();
                until(|| held() == LENGTH / 1024).await;
                lists(&device, mapping, outside, draw).await;
                many_segments(&device, mapping, draw).await;
                drop(held_here);
                until(|| held() == 0).await;
                mapping.unmap();
                outside.unmap();
            }
        });
    }
}

/// A worker; none where the machine has no such engine.
fn start(options: WorkerOptions) -> Option<Worker> {
    Worker::start("test", options)
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()
}

/// `READV_FIXED` is used from 6.16 on.
fn kernel_takes_lists() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split('.')
        .map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 16)
}

/// Where other pages come to lie at addresses that are held (which nobody may do) it shows which requests use the held ones.
#[test]
fn only_requests_whose_segments_lie_in_one_piece_use_its_pages() {
    const HELD: u8 = 1;
    const OTHER: u8 = 2;
    let _alone = ALONE.lock();
    let Some(worker) = start(WorkerOptions {
        engine: Some(EngineKind::Uring),
        ..WorkerOptions::default()
    }) else {
        return;
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, vec![0; LISTS]).unwrap();
    let device = HostDevice::open(&image, &OpenOptions::default()).unwrap();
    worker.run(move || async move {
        let mapping = Mapping::small();
        mapping.fill(0, HELD, LENGTH);
        let held_here = mapping.hold();
        until(|| held() == LENGTH / 1024).await;
        let mapping = Mapping::new(mapping.0);
        mapping.fill(0, OTHER, LENGTH);
        let lists = if kernel_takes_lists() { HELD } else { OTHER };
        let scattered = |from: usize, count: usize| -> Vec<Segment> {
            (0..count)
                .map(|index| (from + index * 2 * BLOCK, BLOCK))
                .collect()
        };
        let cases = [
            (vec![(BLOCK, BLOCK)], HELD),
            (vec![(PIECE - BLOCK, 2 * BLOCK)], OTHER),
            (scattered(BLOCK, 2), lists),
            (scattered(PIECE, 256), lists),
            (vec![(PIECE - BLOCK, BLOCK), (0, BLOCK)], lists),
            (vec![(LENGTH - BLOCK, BLOCK), (PIECE, BLOCK)], lists),
            // Three entries each in the kernel's list of pages.
            (scattered(0, 682), lists),
            (scattered(0, 683), OTHER),
            (scattered(PIECE - 2 * BLOCK, 2), OTHER),
            (vec![(0, BLOCK), (PIECE - BLOCK, 2 * BLOCK)], OTHER),
            (vec![(0, BLOCK), (2 * BLOCK, 0), (4 * BLOCK, BLOCK)], OTHER),
        ];
        for (segments, expected) in cases {
            let total = segments.iter().map(|(_, length)| length).sum();
            let list = mapping.list(&segments);
            device.write(0, &list, Durability::Volatile).await.unwrap();
            let target = Mapping::small();
            let target_list = target.io(0, total);
            device.read(0, &target_list).await.unwrap();
            assert!(
                gather(&target_list) == vec![expected; total],
                "{} segments from {:?}",
                segments.len(),
                segments[0]
            );
            target.unmap();
        }
        // One that is held, one that is not.
        let outside = Mapping::small();
        outside.fill(0, OTHER, BLOCK);
        let list = [mapping.io(0, BLOCK)[0], outside.io(0, BLOCK)[0]];
        device.write(0, &list, Durability::Volatile).await.unwrap();
        device.read(0, &outside.io(0, 2 * BLOCK)).await.unwrap();
        assert_eq!(outside.bytes(0, 2 * BLOCK), [OTHER; 2 * BLOCK]);
        drop(held_here);
        mapping.unmap();
        outside.unmap();
    });
}
