//! The volumes that are measured.

use std::cell::RefCell;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block_io::{
    AlignedBuffer, BlockDevice, Durability, HostDevice, OpenOptions as HostOptions, Worker, WorkerClock,
    WorkerOptions,
};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes, Layout, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions, Pool, Volume};

pub(crate) type FileVolume = Volume<HostDevice, WorkerClock>;

/// Bytes of each file that hold data of volumes; so all subjects put the same load on a file.
const DATA: u64 = 256 << 20;
/// For labels, configurations and logs.
const REST: u64 = 64 << 20;

pub(crate) struct Subject {
    pub(crate) name: &'static str,
    layout: Layout,
    /// By hand: so many volumes, and every request goes to all.
    volumes: u64,
    /// The first file is not there.
    degraded: bool,
    pub(crate) writes_only: bool,
}

const fn subject(name: &'static str, layout: Layout) -> Subject {
    Subject {
        name,
        layout,
        volumes: 1,
        degraded: false,
        writes_only: false,
    }
}

pub(crate) const SUBJECTS: &[Subject] = &[
    subject("concat", Layout::Concat),
    subject("stripe of 4", Layout::Stripe { columns: 4 }),
    subject("mirror of 2", Layout::Mirror { legs: 2 }),
    Subject {
        volumes: 2,
        writes_only: true,
        ..subject("twice", Layout::Concat)
    },
    subject("raid5 4+1", Layout::Raid5 { columns: 5 }),
    Subject {
        degraded: true,
        ..subject("raid5 4+1, one out", Layout::Raid5 { columns: 5 })
    },
];

/// Bytes of a column in a row.
const UNIT: usize = 64 << 10;

impl Subject {
    /// To so many files goes a request of so many bytes, as one request each.
    pub(crate) fn pieces(&self, block: usize) -> u32 {
        match self.layout {
            Layout::Stripe { columns } if block >= UNIT * columns as usize => columns,
            _ => 1,
        }
    }
}

thread_local! {
    /// The worker's volumes.
    pub(crate) static VOLUMES: RefCell<Vec<FileVolume>> = const { RefCell::new(Vec::new()) };
}

/// A subject that is ready.
pub(crate) struct Open {
    pub(crate) worker: Worker,
    /// Bytes of (each of) its volumes.
    pub(crate) size: u64,
    /// The files that it lies on, and the range of them that holds data.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) start: u64,
    pub(crate) length: u64,
}

fn options() -> OpenOptions {
    OpenOptions {
        incarnation: Uuid(u128::from(std::process::id()) << 64 | u128::from(rand())),
        pool: None,
        force: Force::No,
        limits: Limits::default(),
        jobs_wait: false,
    }
}

fn rand() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.subsec_nanos())
}

fn device(path: &Path) -> Rc<HostDevice> {
    Rc::new(HostDevice::open(path, &HostOptions::default()).unwrap())
}

/// Makes a subject's pool on new files, or on block devices.
pub(crate) fn open(place: &dyn Fn(u64) -> PathBuf, subject: &Subject) -> Open {
    let layout = subject.layout;
    let count = u64::from(layout.columns() * layout.legs()) * subject.volumes;
    let files: Vec<PathBuf> = (0..count).map(place).collect();
    let is_device = |file: &Path| {
        file.metadata()
            .is_ok_and(|found| found.file_type().is_block_device())
    };
    for file in files.iter().filter(|file| !is_device(file)) {
        let _ = std::fs::remove_file(file);
        std::fs::File::create(file).unwrap().set_len(DATA + REST).unwrap();
    }
    let size = DATA * u64::from(layout.columns() - layout.parity());
    let (volumes, degraded) = (subject.volumes, subject.degraded);
    let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
    let paths = files.clone();
    let (start, end) = worker.run(move || async move {
        let devices = paths.iter().enumerate().map(|(index, path)| NewDevice {
            name: path.display().to_string(),
            device: device(path),
            uuid: Uuid(1000 + index as u128),
            class: String::new(),
            enclosure: String::new(),
            spare: false,
        });
        let devices: Vec<_> = devices.collect();
        let blocks = devices.iter().map(|new| new.device.geometry().logical_block);
        let block = blocks.max().unwrap();
        let mut pool = Pool::create("bench", Uuid(7), devices, &options(), WorkerClock::new())
            .await
            .unwrap();
        for number in 0..volumes {
            let volume = pool
                .create_volume(new_volume(number, layout, size, block))
                .await
                .unwrap();
            fill(&volume).await;
        }
        let config = pool.configuration();
        let sections = config.volumes.iter().flat_map(|volume| &volume.sections);
        let members = sections
            .flat_map(|section| &section.columns)
            .flat_map(|column| &column.members);
        let extents: Vec<_> = members.flat_map(|member| &member.extents).collect();
        let start = extents.iter().map(|extent| extent.start).max().unwrap();
        let end = extents
            .iter()
            .map(|extent| extent.start + extent.length)
            .min()
            .unwrap();
        if degraded {
            pool.close().await.unwrap();
            let there = paths
                .iter()
                .skip(1)
                .map(|path| (path.display().to_string(), device(path)));
            pool = Pool::open(there.collect(), &options(), WorkerClock::new())
                .await
                .unwrap();
        }
        let all = (0..volumes).map(|number| pool.volume(&format!("v{number}")).unwrap());
        VOLUMES.set(all.collect());
        (start, end)
    });
    Open {
        worker,
        size,
        files: files.into_iter().skip(usize::from(degraded)).collect(),
        start,
        length: end - start,
    }
}

fn new_volume(number: u64, layout: Layout, size: u64, block: u32) -> NewVolume {
    NewVolume {
        name: format!("v{number}"),
        uuid: Uuid(77 + u128::from(number)),
        size,
        attributes: Attributes {
            layout,
            stripe_unit: UNIT as u64,
            class: String::new(),
            devices: Vec::new(),
        },
        block,
        read_policy: volume_manager::model::ReadPolicy::Balanced,
        region: 0,
    }
}

/// Files without holes, as nobody measures how a file system allocates.
async fn fill(volume: &FileVolume) {
    const PIECE: u64 = 4 << 20;
    let mut buffer = AlignedBuffer::new(PIECE as usize);
    buffer.as_mut_slice().fill(1);
    for offset in (0..volume.size()).step_by(PIECE as usize) {
        let length = PIECE.min(volume.size() - offset);
        // SAFETY: the buffer outlives the write, which is awaited.
        let memory = [unsafe { buffer.io(0, length as usize) }];
        volume.write(offset, &memory, Durability::Volatile).await.unwrap();
    }
    volume.flush().await.unwrap();
}
