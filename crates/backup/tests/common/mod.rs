//! A pool on four files, open as a machine has it open, with disks on volumes of several layouts; a mover; an agent's plan.
#![allow(dead_code, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use access::{Token, TokenHash};
use api::file::{AttributeChanges, FileOperation, Target};
use api::storage::{LayoutKind, NewDevice, Operation, ReadPolicy, Shape};
use api::virtual_disk::{DiskAnswer, DiskOperation, ImportRequest, ReadRanges};
use api::{Problem, StorageAnswer, StorageRequest};
use backup::client::{Client, ClientError, Stream, Tls, connect};
use backup::mover::{Limits, Mover, MoverConfig, Pool, Principal};
use backup::plan::{Content, Entry, Extent, ImageDisk, Kind, Place, Plan, Time};
use block_io::{AlignedBuffer, BlockDevice, Durability, WorkerOptions};
use storage_manager::{DiskOptions, Flow, Force, HostedDisk, HostedPool, Line, Notice, PoolAt};
use storage_virtualizer::DiskHandle;

pub(crate) const SIZE: u64 = 6 << 20;
pub(crate) const KINDS: [&str; 4] = ["stripe", "mirror", "raid5", "concat"];

pub(crate) fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

/// What does not compress, and is the same in each run.
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

pub(crate) fn volume(devices: &[String], name: &str) {
    let (layout, columns, copies) = match name {
        "stripe" => (LayoutKind::Stripe, 3, 0),
        "mirror" => (LayoutKind::Mirror, 0, 2),
        "raid5" => (LayoutKind::Raid5, 3, 0),
        _ => (LayoutKind::Concat, 0, 0),
    };
    let volume = Operation::CreateVolume {
        name: name.into(),
        size: 24 << 20,
        block: 4096,
        shape: Shape {
            layout,
            columns,
            copies,
            stripe_unit: 0,
            class: String::new(),
            devices: Vec::new(),
        },
        read_policy: ReadPolicy::default(),
        raw: false,
    };
    storage_manager::execute(devices.to_vec(), Force::No, volume, &mut go_on).unwrap();
}

pub(crate) fn hosted(devices: &[String]) -> HostedPool {
    HostedPool::open("test", devices.to_vec(), WorkerOptions::default()).unwrap()
}

pub(crate) struct Setup {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) devices: Vec<String>,
    pub(crate) pool: Arc<HostedPool>,
    /// What was on each disk when it was made.
    pub(crate) content: BTreeMap<&'static str, Vec<u8>>,
    pub(crate) token: String,
    hash: TokenHash,
}

impl Setup {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let devices: Vec<String> = (0..4)
            .map(|number| {
                let path = folder.path().join(format!("d{number}"));
                File::create(&path).unwrap().set_len(160 << 20).unwrap();
                path.to_str().unwrap().to_owned()
            })
            .collect();
        let new = devices.iter().map(|path| NewDevice {
            path: path.clone(),
            spare: false,
            class: String::new(),
            enclosure: String::new(),
            force: false,
        });
        storage_manager::create("tank", new.collect(), &mut go_on).unwrap();
        let format = FileOperation::Format {
            meta_size: None,
            meta_copies: None,
            force: false,
        };
        storage_manager::execute_file(devices.clone(), format, &mut go_on).unwrap();
        let mut content = BTreeMap::new();
        for (number, kind) in (1..).zip(KINDS) {
            volume(&devices, kind);
            let make = FileOperation::MakeDirectory {
                path: format!("/{kind}"),
                parents: false,
                attributes: AttributeChanges {
                    target: Some(Target::Volume(kind.into())),
                    ..AttributeChanges::default()
                },
            };
            storage_manager::execute_file(devices.clone(), make, &mut go_on).unwrap();
            let mut bytes = noise(number, SIZE as usize);
            // A hole.
            bytes[1 << 20..2 << 20].fill(0);
            let image = folder.path().join("image");
            std::fs::write(&image, &bytes).unwrap();
            let import = ImportRequest {
                image: image.to_str().unwrap().to_owned(),
                format: None,
                backing: false,
                path: format!("/{kind}/a.dsk"),
                size: None,
                thick: false,
                verify: false,
            };
            storage_manager::import_disk(PoolAt::Devices(devices.clone()), import, &mut go_on).unwrap();
            content.insert(kind, bytes);
        }
        let pool = hosted(&devices);
        let token = Token::generate().unwrap();
        let (hash, token) = (token.hash(), token.reveal().to_owned());
        Self {
            folder,
            devices,
            pool: Arc::new(pool),
            content,
            token,
            hash,
        }
    }

    pub(crate) fn open(&self, kind: &str) -> HostedDisk {
        self.pool
            .disk(&format!("/{kind}/a.dsk"), DiskOptions::default())
            .unwrap()
    }

    pub(crate) fn snapshot(&self, name: &str) {
        let paths = KINDS.map(|kind| format!("/{kind}/a.dsk")).to_vec();
        let snapshot = DiskOperation::Snapshot {
            paths,
            name: name.into(),
            description: String::new(),
        };
        disk(&self.pool, snapshot).unwrap();
    }

    pub(crate) fn config(&self, direct: bool) -> MoverConfig {
        MoverConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            store: self.folder.path().join("store"),
            tls: None,
            limits: Limits::default(),
            principals: vec![Principal {
                name: "vm".into(),
                token_sha256: self.hash.clone(),
                socket: Some("/nowhere".into()),
                devices: match direct {
                    true => self.devices.iter().map(PathBuf::from).collect(),
                    false => Vec::new(),
                },
                disks: Vec::new(),
                images: BTreeMap::new(),
            }],
        }
    }

    pub(crate) fn mover(&self, direct: bool) -> Mover {
        self.mover_with(direct, |_| {})
    }

    /// `meanwhile` is called before each question where data are, with its number.
    pub(crate) fn mover_with(&self, direct: bool, meanwhile: impl FnMut(u64) + Send + 'static) -> Mover {
        self.mover_of(self.config(direct), meanwhile)
    }

    pub(crate) fn mover_of(&self, config: MoverConfig, meanwhile: impl FnMut(u64) + Send + 'static) -> Mover {
        let pool = Arc::clone(&self.pool);
        let meanwhile: Meanwhile = Arc::new(Mutex::new(meanwhile));
        let asked = Arc::new(AtomicU64::new(0));
        let reach = move |_: &Principal| {
            Ok(Box::new(Hosted {
                pool: Arc::clone(&pool),
                meanwhile: Arc::clone(&meanwhile),
                asked: Arc::clone(&asked),
            }) as Box<dyn Pool>)
        };
        Mover::start(config, Arc::new(reach), |_| {}).unwrap()
    }

    pub(crate) fn client(&self, mover: &Mover) -> Client<Box<dyn Stream>> {
        self.client_with(mover, &self.token).unwrap()
    }

    pub(crate) fn client_with(
        &self,
        mover: &Mover,
        token: &str,
    ) -> Result<Client<Box<dyn Stream>>, ClientError> {
        let patience = Duration::from_secs(120);
        let stream = connect(&mover.address().to_string(), &Tls::default(), patience)?;
        Client::hello(stream, token, "test")
    }

    pub(crate) fn archive(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("store/vm/{name}.smsbackup"))
    }
}

type Meanwhile = Arc<Mutex<dyn FnMut(u64) + Send>>;

/// A pool of this process, as the management socket shows it to others.
struct Hosted {
    pool: Arc<HostedPool>,
    meanwhile: Meanwhile,
    asked: Arc<AtomicU64>,
}

pub(crate) fn disk(pool: &HostedPool, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
    match pool.execute(StorageRequest::Disk(operation))? {
        StorageAnswer::Disk(outcome) => Ok(outcome.answer),
        other => panic!("{other:?}"),
    }
}

impl Pool for Hosted {
    fn own_disks(&self) -> Result<Vec<String>, Problem> {
        Ok(KINDS.map(|kind| format!("/{kind}/a.dsk")).to_vec())
    }

    fn disk(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        if matches!(&operation, DiskOperation::Places { length: 1.., .. }) {
            let number = self.asked.fetch_add(1, Ordering::Relaxed);
            (self.meanwhile.lock().unwrap())(number);
        }
        disk(&self.pool, operation)
    }

    fn read(&self, ranges: ReadRanges, take: &mut (dyn FnMut(u64, &[u8]) + Send)) -> Result<(), Problem> {
        let pool = Arc::clone(&self.pool);
        let connect = Box::new(move |request: &_| {
            let transfer = pool.transfer(Clone::clone(request))?;
            let (stream, there) = UnixStream::pair().unwrap();
            std::thread::spawn(move || transfer(there));
            Ok(Line {
                early: Vec::new(),
                stream,
            })
        });
        storage_manager::read_ranges(connect, ranges, take)
    }
}

/// Has the pool do something with volumes, to its end.
pub(crate) fn operate(pool: &HostedPool, operation: Operation) {
    pool.execute(StorageRequest::Pool(operation)).unwrap();
}

/// A guest that writes blocks of a disk until it is dropped.
pub(crate) struct Guest {
    end: Arc<AtomicBool>,
    wrote: Arc<AtomicU64>,
}

impl Guest {
    pub(crate) fn start(pool: &HostedPool, disk: &HostedDisk) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let wrote = Arc::new(AtomicU64::new(0));
        let (handle, told, counted) = (disk.handle().clone(), Arc::clone(&end), Arc::clone(&wrote));
        pool.worker().spawn(move || async move {
            let disk = handle.local().unwrap();
            let mut buffer = AlignedBuffer::new(4096);
            let mut number: u64 = 0;
            while !told.load(Ordering::Relaxed) {
                number += 1;
                buffer.as_mut_slice().copy_from_slice(&noise(number, 4096));
                // SAFETY: the buffer outlives the request, which is awaited.
                let memory = [unsafe { buffer.io(0, 4096) }];
                let place = number.wrapping_mul(7919) % (SIZE / 4096) * 4096;
                disk.write(place, &memory, Durability::Volatile).await.unwrap();
                counted.store(number, Ordering::Relaxed);
            }
        });
        Self { end, wrote }
    }

    /// So many writes were done since.
    pub(crate) fn wait(&self, count: u64) {
        let end = self.wrote.load(Ordering::Relaxed) + count;
        while self.wrote.load(Ordering::Relaxed) < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

pub(crate) fn plan(name: &str, snapshot: &str) -> Plan {
    Plan {
        name: name.into(),
        parent: None,
        host: "guest".into(),
        description: "a test".into(),
        frozen: Time {
            seconds: 1_700_000_000,
            nanoseconds: 5,
        },
        disks: KINDS
            .map(|kind| ImageDisk {
                disk: format!("/{kind}/a.dsk"),
                snapshot: snapshot.into(),
                configuration: String::new(),
            })
            .to_vec(),
        sources: Vec::new(),
        resume: false,
    }
}

pub(crate) fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o640,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        modified: Time {
            seconds: 1_600_000_000,
            nanoseconds: 123_456_789,
        },
        accessed: None,
        xattrs: Vec::new(),
        kind,
    }
}

/// A file whose extents lie here and there on a disk, with its content.
pub(crate) fn scattered(disk: u32, seed: u64, content: &[u8]) -> (Kind, Vec<u8>) {
    let mut file = vec![0; 900_000];
    let mut extents = Vec::new();
    let mut offset = 4096 * (seed % 3);
    for part in 0..12 {
        let start =
            (seed.wrapping_mul(2_654_435_761).wrapping_add(part * 511_233)) % (SIZE - 100_000) / 512 * 512;
        let length = match part % 4 {
            0 => 512,
            1 => 65_536,
            2 => 4096 + 1024,
            _ => 70_001,
        };
        let (from, to) = (start as usize, (start + length) as usize);
        file[offset as usize..(offset + length) as usize].copy_from_slice(&content[from..to]);
        extents.push(Extent {
            offset,
            length,
            at: Some(Place { disk, start }),
        });
        offset += length + 4096 * (part % 2);
    }
    extents.push(Extent {
        offset: 880_000,
        length: 5_000,
        at: None,
    });
    let kind = Kind::File {
        size: file.len() as u64,
        content: Content::Extents { extents, more: false },
    };
    (kind, file)
}

/// All bytes of a disk.
pub(crate) fn read_all(pool: &HostedPool, disk: &HostedDisk) -> Vec<u8> {
    let (handle, size) = (disk.handle().clone(), disk.size() as usize);
    let (answer, result) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        let disk = handle.local().unwrap();
        let buffer = AlignedBuffer::new(size);
        // SAFETY: the buffer outlives the request, which is awaited.
        let memory = [unsafe { buffer.io(0, size) }];
        disk.read(0, &memory).await.unwrap();
        answer.send(buffer.as_slice().to_vec()).unwrap();
    });
    result.recv().unwrap()
}

/// Writes to a disk, as its guest does.
pub(crate) fn write(pool: &HostedPool, disk: &HostedDisk, offset: u64, bytes: &[u8]) {
    let (handle, bytes) = (disk.handle().clone(), bytes.to_vec());
    let (answer, result) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        let disk = handle.local().unwrap();
        let mut buffer = AlignedBuffer::new(bytes.len());
        buffer.as_mut_slice().copy_from_slice(&bytes);
        // SAFETY: the buffer outlives the request, which is awaited.
        let memory = [unsafe { buffer.io(0, bytes.len()) }];
        disk.write(offset, &memory, Durability::Volatile).await.unwrap();
        answer.send(()).unwrap();
    });
    result.recv().unwrap();
}
