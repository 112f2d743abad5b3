//! The pool and the file system on files in a directory.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenError, OpenOptions as HostOptions, WorkerClock};
use filesys::{FileSystem, FormatOptions, GivenVolume, NewFile, OpenOptions};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes, Layout, ReadPolicy, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, Pool, Volume};

use crate::blocks::{SECTOR, SECTORS};
use crate::names;

pub(crate) type FilePool = Pool<HostDevice, WorkerClock>;
pub(crate) type Fs = FileSystem<Volume<HostDevice, WorkerClock>, WorkerClock>;

/// Devices; each volume is on two of them.
pub(crate) const DEVICES: usize = 3;
const DEVICE: u64 = 64 << 20;
/// Virtual disks.
pub(crate) const DISKS: u64 = 3;
const META: &str = "fs-meta";
const DATA: [&str; 2] = ["one", "two"];

fn path(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("d{index}"))
}

/// The directory of a virtual disk's files.
pub(crate) fn disk(number: u64) -> String {
    format!("/disk{number}")
}

fn options(incarnation: u64) -> volume_manager::OpenOptions {
    volume_manager::OpenOptions {
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

fn small_caches() -> OpenOptions {
    OpenOptions {
        cached_pages: 256,
        dirty_pages: 256,
        // The story asks for them again itself.
        resume_merges: false,
        ..OpenOptions::default()
    }
}

fn given(pool: &FilePool, name: &str) -> GivenVolume<Volume<HostDevice, WorkerClock>> {
    let volume = pool.volume(name).unwrap();
    let config = pool.configuration();
    let model = config.volumes.iter().find(|model| model.name == name).unwrap();
    GivenVolume {
        uuid: model.uuid.0.to_be_bytes(),
        name: name.to_owned(),
        class: String::new(),
        device: Rc::new(volume),
    }
}

pub(crate) async fn create(directory: &Path) {
    let devices = (0..DEVICES).map(|index| {
        let path = path(directory, index);
        std::fs::File::create(&path).unwrap().set_len(DEVICE).unwrap();
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
    for (index, (name, size)) in [(META, 4), (DATA[0], 16), (DATA[1], 24)].into_iter().enumerate() {
        let volume = NewVolume {
            name: name.into(),
            uuid: Uuid(70 + index as u128),
            size: size << 20,
            attributes: Attributes {
                layout: Layout::Mirror { legs: 2 },
                stripe_unit: 64 << 10,
                class: String::new(),
                devices: Vec::new(),
            },
            block: 4096,
            region: 64 << 10,
            read_policy: ReadPolicy::default(),
        };
        drop(pool.create_volume(volume).await.unwrap());
    }
    let format = FormatOptions {
        uuid: [3; 16],
        seed: 5,
        journal_blocks: Some(128),
        grow_to: 0,
    };
    let data = DATA.iter().map(|name| given(&pool, name)).collect();
    let clock = WorkerClock::new();
    let made = Fs::format(given(&pool, META), data, &format, small_caches(), clock).await;
    let fs = made.unwrap();
    fs.make_directory(names::DIRECTORY, None, 1).await.unwrap();
    for number in 0..DISKS {
        fs.make_directory(&disk(number), None, 1).await.unwrap();
        let new = NewFile {
            size: SECTORS * SECTOR as u64,
            attributes: Some(filesys::Attributes {
                thick: number == 1,
                checksums: number == 2,
                ..filesys::Attributes::default()
            }),
            now: 1,
        };
        fs.create(&format!("{}/base", disk(number)), &new).await.unwrap();
    }
    fs.close().await.unwrap();
    drop(fs);
    pool.close().await.unwrap();
}

/// Opens the pool without the file number `missing`, and the file system.
pub(crate) async fn open(directory: &Path, incarnation: u64, missing: Option<usize>) -> (FilePool, Fs) {
    let there = (0..DEVICES).filter(|index| Some(*index) != missing);
    let devices = there.map(|index| {
        let path = path(directory, index);
        (path.display().to_string(), Rc::new(device(&path)))
    });
    let pool: FilePool = Pool::open(devices.collect(), &options(incarnation), WorkerClock::new())
        .await
        .unwrap_or_else(|error| panic!("the pool does not open: {error}"));
    let data = DATA.iter().map(|name| given(&pool, name)).collect();
    let meta = Rc::new(pool.volume(META).unwrap());
    let fs = Fs::open(meta, data, small_caches(), WorkerClock::new())
        .await
        .unwrap_or_else(|error| panic!("the file system does not open: {error}"));
    (pool, fs)
}

/// The file of a virtual disk that is written: the one on which nothing depends.
pub(crate) async fn head(fs: &Fs, number: u64) -> String {
    let mut heads = Vec::new();
    for entry in fs.list(&disk(number)).await.unwrap() {
        let path = format!("{}/{}", disk(number), entry.name);
        if !fs.stat(&path).await.unwrap().frozen {
            heads.push(path);
        }
    }
    match heads.as_slice() {
        [head] => head.clone(),
        other => panic!("disk {number} is written through {other:?}"),
    }
}
