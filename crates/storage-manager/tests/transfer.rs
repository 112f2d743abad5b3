//! Images that come into a pool and go out of it while its disks are in use.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::file::{FileAnswer, FileOperation};
use api::storage::LayoutKind;
use api::virtual_disk::{
    CopyRequest, DiskAnswer, DiskMode, DiskOperation, ExportRequest, ImageFormat, ImportRequest,
    TransferRequest, Transferred, VirtualDiskStatus,
};
use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use block_io::{AlignedBuffer, BlockDevice, Durability, Worker, WorkerOptions};
use common::go_on;
use storage_manager::{
    Access, DiskOptions, Flow, HostedDisk, HostedPool, Line, Notice, PoolAt, Storage, disk_mode,
};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::disk::NewSnapshot;

const DISK: &str = "/root.dsk";
const SIZE: u64 = 8 << 20;
const BLOCK: usize = 4096;
/// Blocks that the guest writes, one after the other, over and over.
const BLOCKS: u64 = 700;

/// A pool with a disk, open as a machine has it open.
struct Setup {
    folder: tempfile::TempDir,
    devices: Vec<String>,
    pool: Arc<HostedPool>,
}

fn hosted(devices: &[String]) -> Arc<HostedPool> {
    Arc::new(HostedPool::open("test", devices.to_vec(), WorkerOptions::default()).unwrap())
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let devices = common::pool(folder.path());
        common::volume(&devices, "more", LayoutKind::Concat, 32 << 20);
        let create = DiskOperation::Create {
            path: DISK.into(),
            size: SIZE,
            thick: false,
            target: None,
            checksums: None,
        };
        storage_manager::execute_disk(devices.clone(), create, &mut go_on).unwrap();
        let pool = hosted(&devices);
        Self {
            folder,
            devices,
            pool,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn open(&self, mode: DiskMode) -> HostedDisk {
        let options = DiskOptions {
            mode: disk_mode(mode),
            ..DiskOptions::default()
        };
        self.pool.disk(DISK, options).unwrap()
    }

    /// What the management socket does, between two processes.
    fn machine(&self) -> PoolAt {
        let pool = Arc::clone(&self.pool);
        PoolAt::Machine(Box::new(move |request| {
            let (stream, _) = serve(&pool, request)?;
            let early = Vec::new();
            Ok(Line { early, stream })
        }))
    }

    fn import(&self, image: &str, path: &str) -> Result<Transferred, Problem> {
        storage_manager::import_disk(self.machine(), self.importing(image, path), &mut go_on)
    }

    fn importing(&self, image: &str, path: &str) -> ImportRequest {
        ImportRequest {
            image: self.text(image),
            format: None,
            backing: false,
            path: path.into(),
            size: None,
            thick: false,
            verify: true,
        }
    }

    fn exporting(&self, path: &str, image: &str) -> ExportRequest {
        ExportRequest {
            path: path.into(),
            image: self.text(image),
            format: match image.ends_with("qcow2") {
                true => ImageFormat::Qcow2,
                false => ImageFormat::Raw,
            },
            force: false,
            verify: true,
        }
    }

    fn export(&self, path: &str, image: &str) -> Result<Transferred, Problem> {
        storage_manager::export_disk(self.machine(), self.exporting(path, image), &mut go_on)
    }

    fn execute(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        match self.pool.execute(StorageRequest::Disk(operation))? {
            StorageAnswer::Disk(outcome) => Ok(outcome.answer),
            other => panic!("{other:?}"),
        }
    }

    fn status(&self, path: &str) -> Result<VirtualDiskStatus, Problem> {
        match self.execute(DiskOperation::Status { path: path.into() })? {
            DiskAnswer::Status(status) => Ok(*status),
            other => panic!("{other:?}"),
        }
    }

    /// The names of all files of the pool.
    fn files(&self) -> Vec<String> {
        let list = FileOperation::List {
            path: "/".into(),
            recursive: false,
            limit: None,
            after: None,
        };
        match self.pool.execute(StorageRequest::File(list)).unwrap() {
            StorageAnswer::File(outcome) => match outcome.answer {
                FileAnswer::Entries(entries) => entries.into_iter().map(|entry| entry.path).collect(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    /// The disk has the one layer that it needs, and nobody's snapshots, in the end.
    fn is_as_before(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.status(DISK).unwrap();
            assert_eq!(status.snapshot_list, []);
            if status.layers == 1 && status.unmerged == 0 {
                return;
            }
            assert!(Instant::now() < end, "{status:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn serve(pool: &HostedPool, request: &TransferRequest) -> Result<(UnixStream, JoinHandle<()>), Problem> {
    let transfer = pool.transfer(request.clone())?;
    let (here, there) = UnixStream::pair().unwrap();
    Ok((here, std::thread::spawn(move || transfer(there))))
}

/// A guest that writes numbers, each to the next block, until it is told to end.
struct Guest {
    end: Arc<AtomicBool>,
    wrote: Receiver<u64>,
}

impl Guest {
    fn start(setup: &Setup, disk: &HostedDisk) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (sender, wrote) = mpsc::channel();
        let (handle, told) = (disk.handle().clone(), Arc::clone(&end));
        setup.pool.worker().spawn(move || async move {
            let disk = handle.local().unwrap();
            let mut buffer = AlignedBuffer::new(BLOCK);
            let mut number: u64 = 0;
            while !told.load(Ordering::Relaxed) {
                number += 1;
                for chunk in buffer.as_mut_slice().chunks_exact_mut(8) {
                    chunk.copy_from_slice(&number.to_le_bytes());
                }
                // SAFETY: the buffer outlives the request, which is awaited.
                let memory = [unsafe { buffer.io(0, BLOCK) }];
                let place = number % BLOCKS * BLOCK as u64;
                disk.write(place, &memory, Durability::Volatile).await.unwrap();
                sender.send(number).unwrap();
            }
        });
        Self { end, wrote }
    }

    /// The last number that was written by now.
    fn now(&self) -> u64 {
        self.wrote.try_iter().last().unwrap_or(0)
    }

    /// Waits for so many more.
    fn wait(&self, count: usize) {
        assert_eq!(self.wrote.iter().take(count).count(), count);
    }

    fn end(self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        self.wrote.iter().last().unwrap_or(0)
    }
}

/// The last number of the one moment whose content this is.
fn moment(content: &[u8]) -> u64 {
    let numbers: Vec<u64> = content
        .chunks_exact(BLOCK)
        .map(|block| {
            let number = u64::from_le_bytes(block[..8].try_into().unwrap());
            assert!(block.chunks_exact(8).all(|chunk| chunk == number.to_le_bytes()));
            number
        })
        .collect();
    let last = numbers.iter().copied().max().unwrap();
    for (place, number) in (0u64..).zip(&numbers) {
        let expected = (last.saturating_sub(BLOCKS - 1)..=last)
            .rev()
            .find(|number| *number > 0 && number % BLOCKS == place);
        assert_eq!(*number, expected.unwrap_or(0), "block {place} of moment {last}");
    }
    last
}

fn noise(setup: &Setup, name: &str, size: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9;
    let mut content = vec![0; size];
    for (index, byte) in content.iter_mut().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Some of it is zeroes.
        *byte = if index >> 18 & 1 == 1 {
            0
        } else {
            state.to_le_bytes()[7]
        };
    }
    fs::write(setup.path(name), &content).unwrap();
    content
}

/// QEMU's tool says that a raw and a qcow2 image are the same.
fn identical(setup: &Setup, raw: &str, qcow2: &str) {
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "qcow2", raw, qcow2])
        .current_dir(setup.folder.path())
        .output();
    match compared {
        Ok(compared) => assert!(compared.status.success(), "{compared:?}"),
        Err(error) if std::env::var_os("CI").is_some() => panic!("qemu-img (package qemu-utils): {error}"),
        Err(_) => println!("qemu-img is not here (package qemu-utils): not compared with it"),
    }
}

#[test]
fn an_image_becomes_a_disk_while_another_disk_is_written() {
    let setup = Setup::new();
    let disk = setup.open(DiskMode::Persistent);
    let guest = Guest::start(&setup, &disk);
    let content = noise(&setup, "in.raw", (5 << 20) + 512);
    let done = setup.import("in.raw", "/new.dsk").unwrap();
    assert!(done.verified && done.size == content.len() as u64, "{done:?}");
    assert!(done.data > 2 << 20 && done.data < 4 << 20, "{done:?}");
    assert_eq!(done.format, Some(ImageFormat::Raw));
    // There is a disk of that name now, which a guest can use.
    let refused = setup.import("in.raw", "/new.dsk").unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Conflict, "{refused}");
    let new = setup.pool.disk("/new.dsk", DiskOptions::default()).unwrap();
    for image in ["out.raw", "out.qcow2"] {
        let done = setup.export("/new.dsk", image).unwrap();
        assert!(done.verified, "{done:?}");
    }
    assert!(fs::read(setup.path("out.raw")).unwrap() == content);
    identical(&setup, "in.raw", "out.qcow2");
    drop(new);
    // And what QEMU's format makes of it comes back.
    setup.import("out.qcow2", "/again.dsk").unwrap();
    setup.export("/again.dsk", "again.raw").unwrap();
    assert!(fs::read(setup.path("again.raw")).unwrap() == content);
    guest.end();
    drop(disk);
    setup.pool.close().unwrap();
}

#[test]
fn a_disk_in_use_goes_out_as_it_was_at_one_moment() {
    let setup = Setup::new();
    for mode in [DiskMode::Persistent, DiskMode::Undoable] {
        let disk = setup.open(mode);
        let guest = Guest::start(&setup, &disk);
        guest.wait(1000);
        let before = guest.now();
        let done = setup.export(DISK, "out.raw").unwrap();
        assert_eq!((done.path.as_str(), done.size, done.verified), (DISK, SIZE, true));
        let found = moment(&fs::read(setup.path("out.raw")).unwrap());
        let after = guest.now();
        assert!((before..after).contains(&found), "{before} {found} {after}");

        let copy = CopyRequest {
            path: DISK.into(),
            to: "/copy.dsk".into(),
            thick: false,
            verify: true,
        };
        let done = storage_manager::copy_disk(setup.machine(), copy, &mut go_on).unwrap();
        assert!(done.verified, "{done:?}");
        setup.export("/copy.dsk", "copy.raw").unwrap();
        let found = moment(&fs::read(setup.path("copy.raw")).unwrap());
        assert!((after..guest.now()).contains(&found));

        let last = guest.end();
        setup.export(DISK, "last.raw").unwrap();
        assert_eq!(moment(&fs::read(setup.path("last.raw")).unwrap()), last);
        if mode == DiskMode::Persistent {
            setup.is_as_before();
        }
        assert_eq!(setup.status(DISK).unwrap().snapshot_list, []);
        for image in ["out.raw", "copy.raw", "last.raw"] {
            fs::remove_file(setup.path(image)).unwrap();
        }
        setup
            .execute(DiskOperation::Delete {
                path: "/copy.dsk".into(),
            })
            .unwrap();
        drop(disk);
    }
    setup.pool.close().unwrap();
}

#[test]
fn what_is_thrown_away_at_power_off_has_no_moments() {
    let setup = Setup::new();
    let disk = setup.open(DiskMode::Nonpersistent);
    let refused = setup.export(DISK, "out.raw").unwrap_err();
    assert!(refused.detail.contains("nonpersistent"), "{refused}");
    assert!(!setup.path("out.raw").exists());
    drop(disk);
    setup.pool.close().unwrap();
}

/// Stops at the first sign of progress of `what`.
fn stop_at(what: &'static str) -> impl FnMut(Notice<'_>) -> Flow {
    let mut stopped = false;
    move |notice| {
        stopped |= matches!(notice, Notice::Work(work) if work.what.starts_with(what));
        match stopped {
            true => Flow::Stop,
            false => Flow::GoOn,
        }
    }
}

#[test]
fn what_is_broken_off_leaves_nothing() {
    let setup = Setup::new();
    let disk = setup.open(DiskMode::Persistent);
    let guest = Guest::start(&setup, &disk);
    guest.wait(700);
    noise(&setup, "in.raw", 16 << 20);
    // The last one never comes, so that breaking off happens before anything is told, or not at all.
    let mut broken_off = 0;
    for what in ["import", "verify"] {
        let request = setup.importing("in.raw", "/new.dsk");
        match storage_manager::import_disk(setup.machine(), request, &mut stop_at(what)) {
            Ok(_) => setup
                .execute(DiskOperation::Delete {
                    path: "/new.dsk".into(),
                })
                .map(drop)
                .unwrap(),
            Err(problem) => {
                assert_eq!(problem.kind, ProblemKind::Stopping, "{problem}");
                assert!(problem.detail.contains("nothing"), "{problem}");
                broken_off += 1;
            }
        }
        assert_eq!(setup.files(), [DISK]);
    }
    let mut at_once = |_: Notice<'_>| Flow::Stop;
    let export = setup.exporting(DISK, "out.raw");
    match storage_manager::export_disk(setup.machine(), export, &mut at_once) {
        Ok(_) => fs::remove_file(setup.path("out.raw")).unwrap(),
        Err(problem) => {
            assert_eq!(problem.kind, ProblemKind::Stopping, "{problem}");
            broken_off += 1;
        }
    }
    assert!(broken_off > 0);
    let left: Vec<_> = fs::read_dir(setup.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("out") || name.contains("part"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    setup.is_as_before();
    guest.end();
    drop(disk);
    setup.pool.close().unwrap();
}

/// The side of a client that is not ours.
fn import_by_hand(setup: &Setup) -> (UnixStream, JoinHandle<()>) {
    let request = ImportRequest {
        size: Some(1 << 20),
        ..setup.importing("by-hand", "/new.dsk")
    };
    serve(&setup.pool, &TransferRequest::Import(request)).unwrap()
}

/// A frame as docs and `live/frame.rs` have it.
fn frame(kind: u8, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [
        &[kind, 0, 0, 0][..],
        &length.to_le_bytes(),
        &offset.to_le_bytes(),
        bytes,
    ]
    .concat()
}

#[test]
fn a_client_that_sends_rubbish_or_goes_away_harms_nobody() {
    let setup = Setup::new();
    let piece = frame(1, 4096, &[7; 4096]);
    let cases: Vec<Vec<u8>> = vec![
        vec![],
        vec![0xff; 100],
        b"GET / HTTP/1.1\r\n\r\n".repeat(10),
        piece[..100].to_vec(),
        // Twice, backwards, behind the end, askew, too long.
        [piece.clone(), piece.clone()].concat(),
        [piece.clone(), frame(1, 0, &[7; 4096])].concat(),
        frame(1, 1 << 20, &[7; 512]),
        frame(1, u64::MAX - 511, &[7; 512]),
        frame(1, 100, &[7; 512]),
        frame(1, 0, &vec![7; (1 << 20) + 512]),
        // What only the other side may say.
        [piece.clone(), frame(2, 5, &[])].concat(),
        [piece.clone(), frame(5, 0, b"null")].concat(),
        [piece, frame(6, 0, b"no problem")].concat(),
    ];
    for bytes in cases {
        let (mut stream, thread) = import_by_hand(&setup);
        // It may have been thrown out before the end.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut said = Vec::new();
        // What it did not read makes an error of the end.
        let _ = stream.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(
            said.contains("broken off") || said.contains("other side"),
            "{said}"
        );
        thread.join().unwrap();
        assert_eq!(setup.files(), [DISK]);
    }
    // One that is whole is as good as ours.
    let (mut stream, thread) = import_by_hand(&setup);
    let mut data = frame(1, 4096, &[7; 4096]);
    data.extend(frame(3, 0, &[]));
    // It compares nothing, and says that all is the same.
    data.extend(frame(3, 0, &[]));
    stream.write_all(&data).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    thread.join().unwrap();
    assert_eq!(setup.files(), ["/new.dsk", DISK]);
    setup.pool.close().unwrap();
}

#[test]
fn a_machine_that_ends_breaks_off_what_is_under_way() {
    let setup = Setup::new();
    let disk = setup.open(DiskMode::Persistent);
    let guest = Guest::start(&setup, &disk);
    guest.wait(700);
    let (mut import, import_thread) = import_by_hand(&setup);
    import.write_all(&frame(1, 4096, &[7; 4096])).unwrap();
    // Nobody reads this one.
    let export = TransferRequest::Export(setup.exporting(DISK, "out.raw"));
    let (mut export, export_thread) = serve(&setup.pool, &export).unwrap();
    let mut first = [0; 16];
    export.read_exact(&mut first).unwrap();
    guest.end();
    drop(disk);
    setup.pool.close().unwrap();
    for (stream, thread) in [(&mut import, import_thread), (&mut export, export_thread)] {
        let mut said = Vec::new();
        stream.read_to_end(&mut said).unwrap();
        assert!(String::from_utf8_lossy(&said).contains("broken off"));
        thread.join().unwrap();
    }
    // Whoever comes too late is let go.
    let (mut late, thread) = import_by_hand(&setup);
    assert_eq!(late.read_to_end(&mut Vec::new()).unwrap(), 0);
    thread.join().unwrap();
    let Setup { folder, devices, .. } = setup;
    let setup = Setup {
        pool: hosted(&devices),
        folder,
        devices,
    };
    let files = setup.files();
    assert!(!files.iter().any(|file| file.contains("new")), "{files:?}");
    assert_eq!(setup.status(DISK).unwrap().snapshot_list, []);
    setup.pool.close().unwrap();
}

#[test]
fn what_does_not_fit_is_told_and_leaves_nothing() {
    let setup = Setup::new();
    noise(&setup, "in.raw", 120 << 20);
    let refused = setup.import("in.raw", "/new.dsk").unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Exhausted, "{refused}");
    assert_eq!(setup.files(), [DISK]);
    let refused = setup.export("/none.dsk", "out.raw").unwrap_err();
    assert_eq!(refused.kind, ProblemKind::NotFound, "{refused}");
    let refused = setup.export("/none", "out.raw").unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Invalid, "{refused}");
    assert!(!setup.path("out.raw").exists());
    setup.pool.close().unwrap();
}

#[test]
fn moments_that_a_crash_has_left_go_and_people_cannot_make_any() {
    let setup = Setup::new();
    setup.pool.close().unwrap();
    let devices = setup.devices.clone();
    let worker = Worker::start("crash", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let storage = Storage::open(&devices, Access::Write).await.unwrap();
        for name in [".moment-0", "monday", ".moment-7"] {
            let new = NewSnapshot {
                name: name.into(),
                ..NewSnapshot::default()
            };
            storage.disks().unwrap().snapshot(&[DISK], &new).await.unwrap();
        }
        storage.close().await.unwrap();
    });
    let Setup { folder, devices, .. } = setup;
    let setup = Setup {
        pool: hosted(&devices),
        folder,
        devices,
    };
    let names = || -> Vec<String> {
        let list = setup.status(DISK).unwrap().snapshot_list;
        list.into_iter().map(|snapshot| snapshot.name).collect()
    };
    assert_eq!(names().len(), 3);
    let disk = setup.open(DiskMode::Persistent);
    assert_eq!(names(), ["monday"]);
    let snapshot = DiskOperation::Snapshot {
        paths: vec![DISK.into()],
        name: ".moment-1".into(),
        description: String::new(),
    };
    let rename = DiskOperation::DescribeSnapshot {
        path: format!("{DISK}@monday"),
        name: Some(".moment-1".into()),
        description: None,
    };
    for operation in [snapshot, rename] {
        let refused = setup.execute(operation).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Invalid, "{refused}");
    }
    setup.export(DISK, "out.raw").unwrap();
    assert_eq!(names(), ["monday"]);
    drop(disk);
    setup.pool.close().unwrap();
}
