//! A pool on one file, or the block device to which a link of that name leads, with three volumes: metadata, data, and one that stays bare.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Clock, Durability, HostDevice, OpenOptions as HostOptions, WorkerClock,
};
use filesys::{Access, Attributes, File, FileSystem, FormatOptions, GivenVolume, NewFile, OpenOptions};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes as VolumeAttributes, Layout, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions as PoolOptions, Pool, Volume};

use crate::load::Disk;

pub(crate) type FileVolume = Volume<HostDevice, WorkerClock>;
pub(crate) type Fs = FileSystem<FileVolume, WorkerClock>;
pub(crate) type FsFile = File<FileVolume, WorkerClock>;

pub(crate) const GIB: u64 = 1 << 30;
const META: u64 = 256 << 20;

/// What is measured, on the worker.
pub(crate) struct Stage {
    pub(crate) fs: Fs,
    pub(crate) bare: FileVolume,
    /// Keeps the volumes.
    _pool: Pool<HostDevice, WorkerClock>,
}

fn options() -> PoolOptions {
    PoolOptions {
        incarnation: Uuid(u128::from(std::process::id()) << 64 | 77),
        pool: None,
        force: Force::No,
        limits: Limits::default(),
        jobs_wait: false,
    }
}

fn new_volume(name: &str, number: u128, size: u64) -> NewVolume {
    NewVolume {
        name: name.into(),
        uuid: Uuid(number),
        size,
        attributes: VolumeAttributes {
            layout: Layout::Concat,
            stripe_unit: 64 << 10,
            class: String::new(),
            devices: Vec::new(),
        },
        // Of zram.
        block: 4096,
        region: 0,
        read_policy: volume_manager::model::ReadPolicy::default(),
    }
}

impl Stage {
    /// Makes all of it; the volumes' space is written once, so that nobody measures how the host allocates.
    pub(crate) async fn set(directory: &Path, name: &str, bare: u64, data: u64) -> Self {
        let path: PathBuf = directory.join(name);
        let file = std::fs::File::create(&path).unwrap();
        if file.metadata().unwrap().is_file() {
            file.set_len(META + bare + data + (64 << 20)).unwrap();
        }
        let device = NewDevice {
            name: name.into(),
            device: Rc::new(HostDevice::open(&path, &HostOptions::default()).unwrap()),
            uuid: Uuid(1000),
            class: String::new(),
            enclosure: String::new(),
            spare: false,
        };
        let pool = Pool::create("bench", Uuid(7), vec![device], &options(), WorkerClock::new())
            .await
            .unwrap();
        let meta = pool.create_volume(new_volume("meta", 1, META)).await.unwrap();
        let data = pool.create_volume(new_volume("data", 2, data)).await.unwrap();
        let bare = pool.create_volume(new_volume("bare", 3, bare)).await.unwrap();
        for volume in [&meta, &data, &bare] {
            fill(volume, volume.size()).await;
        }
        let given = |number: u8, device: FileVolume| GivenVolume {
            uuid: [number; 16],
            name: format!("v{number}"),
            class: String::new(),
            device: Rc::new(device),
        };
        let format = FormatOptions {
            uuid: [9; 16],
            seed: 77,
            journal_blocks: None,
            grow_to: 0,
        };
        let fs = FileSystem::format(
            given(1, meta),
            vec![given(2, data)],
            &format,
            OpenOptions::default(),
            WorkerClock::new(),
        )
        .await
        .unwrap();
        Self {
            fs,
            bare,
            _pool: pool,
        }
    }

    pub(crate) fn bare(&self) -> Disk {
        Disk::Volume(self.bare.clone())
    }

    /// A new file; written from end to end if it is not to be thin.
    pub(crate) async fn create(&self, path: &str, size: u64, full: bool) {
        let new = NewFile {
            size,
            attributes: Some(Attributes::default()),
            now: 0,
        };
        self.fs.create(path, &new).await.unwrap();
        if full {
            let file = self.fs.open_file(path, Access::Write).await.unwrap();
            fill(&file, size).await;
        }
    }

    pub(crate) async fn open(&self, path: &str, access: Access) -> Disk {
        Disk::File(Rc::new(self.fs.open_file(path, access).await.unwrap()))
    }

    /// A layer on a frozen file.
    pub(crate) async fn layer(&self, base: &str, path: &str) -> Disk {
        self.fs.clone_file(base, path, 0).await.unwrap();
        self.open(path, Access::Write).await
    }

    /// Deletes a file and waits for its space.
    pub(crate) async fn delete(&self, path: &str) {
        let free = self.fs.volumes()[0].free;
        let allocated = self.fs.stat(path).await.unwrap().allocated;
        self.fs.delete(path).await.unwrap();
        for _ in 0..5000 {
            self.fs.sync().await.unwrap();
            if self.fs.volumes()[0].free >= free + allocated {
                return;
            }
            WorkerClock::new().sleep(Duration::from_millis(1)).await;
        }
        panic!("the space of {path} does not come back");
    }
}

/// Writes all.
pub(crate) async fn fill<D: BlockDevice>(disk: &D, size: u64) {
    const PIECE: u64 = 4 << 20;
    let mut buffer = AlignedBuffer::new(PIECE as usize);
    buffer.as_mut_slice().fill(1);
    for offset in (0..size).step_by(PIECE as usize) {
        let length = PIECE.min(size - offset);
        // SAFETY: the buffer outlives the write, which is awaited.
        let memory = [unsafe { buffer.io(0, length as usize) }];
        disk.write(offset, &memory, Durability::Volatile).await.unwrap();
    }
    disk.flush().await.unwrap();
}
