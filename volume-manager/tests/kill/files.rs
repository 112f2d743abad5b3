//! The pool on files in a directory.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenError, OpenOptions as HostOptions, WorkerClock};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes, Layout, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions, Pool};

use crate::blocks::{SECTOR, SECTORS};

pub(crate) type FilePool = Pool<HostDevice, WorkerClock>;

pub(crate) const FILES: usize = 5;
const FILE: u64 = 64 << 20;
/// Small, so that writes reach over several.
pub(crate) const UNIT: u64 = 16 << 10;

fn path(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("d{index}"))
}

fn options(incarnation: u64) -> OpenOptions {
    OpenOptions {
        incarnation: Uuid(incarnation.into()),
        pool: None,
        force: Force::No,
        limits: Limits::default(),
        jobs_wait: false,
    }
}

/// Opens a file whose last user may be dying still: the kernel keeps the lock until the last request on it has ended.
fn device(path: &Path) -> HostDevice {
    let begun = Instant::now();
    loop {
        match HostDevice::open(path, &HostOptions::default()) {
            Err(OpenError::InUse { .. }) if begun.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result.unwrap(),
        }
    }
}

pub(crate) fn attributes(layout: Layout) -> Attributes {
    Attributes {
        layout,
        stripe_unit: UNIT,
        class: String::new(),
        devices: Vec::new(),
    }
}

pub(crate) async fn create(directory: &Path, layout: Layout) {
    let devices = (0..FILES).map(|index| {
        let path = path(directory, index);
        std::fs::File::create(&path).unwrap().set_len(FILE).unwrap();
        NewDevice {
            name: path.display().to_string(),
            device: Rc::new(device(&path)),
            uuid: Uuid(1000 + index as u128),
            class: String::new(),
            enclosure: String::new(),
            spare: false,
        }
    });
    let (devices, options) = (devices.collect(), options(1));
    let pool: FilePool = Pool::create("tank", Uuid(7), devices, &options, WorkerClock::new())
        .await
        .unwrap();
    let volume = NewVolume {
        name: "v".into(),
        uuid: Uuid(77),
        size: SECTORS * SECTOR as u64,
        attributes: attributes(layout),
        block: 512,
        read_policy: volume_manager::model::ReadPolicy::Balanced,
        region: 64 << 10,
    };
    drop(pool.create_volume(volume).await.unwrap());
    pool.close().await.unwrap();
}

/// Opens the pool without the file number `missing`.
pub(crate) async fn open(directory: &Path, incarnation: u64, missing: Option<usize>) -> FilePool {
    let there = (0..FILES).filter(|index| Some(*index) != missing);
    let devices = there.map(|index| {
        let path = path(directory, index);
        (path.display().to_string(), Rc::new(device(&path)))
    });
    Pool::open(devices.collect(), &options(incarnation), WorkerClock::new())
        .await
        .unwrap_or_else(|error| panic!("the pool does not open: {error}"))
}
