//! Memory of an open pool with a volume of 1 TiB, on sparse files.
//!
//! ```text
//! cargo bench -p volume-manager --bench memory -- [DIRECTORY]
//! ```
//! Counts live bytes of the allocator: all of the pool and its devices, without the worker and its ring, which any number of
//! volumes share. Three moments: open; after 20,000 writes at random places, which fill the logs; and open again without one of the
//! devices, after as many writes, so that the bitmap of what it misses is there and in use.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench fails by panicking")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a bench"
)]

use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block_io::{
    AlignedBuffer, BlockDevice, Durability, HostDevice, OpenOptions as HostOptions, Worker, WorkerClock,
    WorkerOptions,
};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes, Layout, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions, Pool, Volume};

const VOLUME: u64 = 1 << 40;
const WRITES: u64 = 20_000;

static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: MemoryLayout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: MemoryLayout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: MemoryLayout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size, Ordering::Relaxed);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let place = std::env::args()
        .skip(1)
        .find(|argument| argument != "--bench")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    println!("MiB live, volume of 1 TiB | open | written | one device missing, written");
    for layout in [
        Layout::Concat,
        Layout::Stripe { columns: 4 },
        Layout::Mirror { legs: 2 },
        Layout::StripeMirror { columns: 2, legs: 2 },
        Layout::Raid5 { columns: 5 },
        Layout::Raid6 { columns: 6 },
    ] {
        let directory = tempfile::tempdir_in(&place).unwrap();
        let path = directory.path().to_owned();
        let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
        let (open, written, degraded) = worker.run(move || async move { measure(&path, layout).await });
        let degraded = degraded.map_or_else(|| "-".into(), |live| format!("{live:.2}"));
        println!("{layout:25} | {open:.2} | {written:.2} | {degraded}");
    }
}

fn options(number: u128) -> OpenOptions {
    OpenOptions {
        incarnation: Uuid(number),
        pool: None,
        force: Force::No,
        limits: Limits::default(),
        jobs_wait: false,
    }
}

fn live_since(before: usize) -> f64 {
    LIVE.load(Ordering::Relaxed).saturating_sub(before) as f64 / f64::from(1 << 20)
}

fn device(path: &Path) -> Rc<HostDevice> {
    Rc::new(HostDevice::open(path, &HostOptions::default()).unwrap())
}

/// MiB of the pool when it is open, after writes, and after writes without one device.
async fn measure(directory: &Path, layout: Layout) -> (f64, f64, Option<f64>) {
    let data = u64::from(layout.columns() - layout.parity());
    // One more, so that there is a majority without one.
    let count = layout.columns() * layout.legs() + 1;
    let paths: Vec<PathBuf> = (0..count)
        .map(|index| directory.join(format!("d{index}")))
        .collect();
    create(&paths, layout, VOLUME / data + (256 << 20)).await;
    let before = LIVE.load(Ordering::Relaxed);
    let pool = open(&paths, 2).await;
    let after_open = live_since(before);
    write(&pool.volume("v").unwrap()).await;
    let written = live_since(before);
    let gone = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
    pool.clone().close().await.unwrap();
    if layout.tolerates() == 0 {
        return (after_open, written, None);
    }
    let there: Vec<PathBuf> = (0..count)
        .zip(paths)
        .filter(|(index, _)| *index != gone.0)
        .map(|(_, path)| path)
        .collect();
    drop(pool);
    let before = LIVE.load(Ordering::Relaxed);
    let pool = open(&there, 3).await;
    write(&pool.volume("v").unwrap()).await;
    (after_open, written, Some(live_since(before)))
}

async fn create(paths: &[PathBuf], layout: Layout, size: u64) {
    let devices = paths.iter().enumerate().map(|(index, path)| {
        std::fs::File::create(path).unwrap().set_len(size).unwrap();
        NewDevice {
            name: path.display().to_string(),
            device: device(path),
            uuid: Uuid(1000 + index as u128),
            class: String::new(),
            enclosure: String::new(),
            spare: false,
        }
    });
    let pool = Pool::create(
        "bench",
        Uuid(7),
        devices.collect(),
        &options(1),
        WorkerClock::new(),
    )
    .await
    .unwrap();
    let volume = NewVolume {
        name: "v".into(),
        uuid: Uuid(77),
        size: VOLUME,
        attributes: Attributes {
            layout,
            stripe_unit: 64 << 10,
            class: String::new(),
            devices: Vec::new(),
        },
        block: 512,
        read_policy: volume_manager::model::ReadPolicy::Balanced,
        region: 0,
    };
    drop(pool.create_volume(volume).await.unwrap());
    pool.close().await.unwrap();
}

async fn open(paths: &[PathBuf], number: u128) -> Pool<HostDevice, WorkerClock> {
    let devices = paths
        .iter()
        .map(|path| (path.display().to_string(), device(path)));
    Pool::open(devices.collect(), &options(number), WorkerClock::new())
        .await
        .unwrap()
}

async fn write(volume: &Volume<HostDevice, WorkerClock>) {
    let buffer = AlignedBuffer::new(4096);
    // SAFETY: the buffer outlives the writes, which are awaited.
    let memory = [unsafe { buffer.io(0, 4096) }];
    let mut random = 1_u64;
    for _ in 0..WRITES {
        random = random
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let offset = (random >> 20) % (VOLUME / 4096) * 4096;
        volume.write(offset, &memory, Durability::Volatile).await.unwrap();
    }
}
