//! A pool that serves disks while people do things with them.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api::file::FileOperation;
use api::storage::Operation;
use api::virtual_disk::{DiskAnswer, DiskMode, DiskOperation, VirtualDiskStatus};
use api::{ProblemKind, StorageAnswer, StorageRequest};
use block_io::{AlignedBuffer, BlockDevice, Durability, WorkerOptions};
use common::{go_on, pool};
use storage_manager::{DiskOptions, HostedDisk, HostedPool, disk_mode};
use storage_virtualizer::DiskHandle;

const DISK: &str = "/vm/root.dsk";

fn open(devices: &[String]) -> HostedPool {
    HostedPool::open("test", devices.to_vec(), WorkerOptions::default()).unwrap()
}

fn with_disk(devices: &[String]) {
    let directory = api::file::FileOperation::MakeDirectory {
        path: "/vm".into(),
        parents: false,
        attributes: Default::default(),
    };
    storage_manager::execute_file(devices.to_vec(), directory, &mut go_on).unwrap();
    let create = DiskOperation::Create {
        path: DISK.into(),
        size: 1 << 20,
        thick: false,
        target: None,
        checksums: None,
    };
    storage_manager::execute_disk(devices.to_vec(), create, &mut go_on).unwrap();
}

fn options(mode: DiskMode, read_only: bool) -> DiskOptions {
    DiskOptions {
        mode: disk_mode(mode),
        read_only,
        ..DiskOptions::default()
    }
}

/// Writes a byte all over the first block of a disk, as a queue server would.
fn write(pool: &HostedPool, disk: &HostedDisk, byte: u8) {
    let handle = disk.handle().clone();
    on_worker(pool, move || async move {
        let disk = handle.local().unwrap();
        let mut buffer = AlignedBuffer::new(4096);
        buffer.as_mut_slice().fill(byte);
        // SAFETY: the buffer outlives the request, which is awaited.
        let memory = [unsafe { buffer.io(0, 4096) }];
        disk.write(0, &memory, Durability::Volatile).await.unwrap();
        disk.flush().await.unwrap();
        0
    });
}

fn read(pool: &HostedPool, disk: &HostedDisk) -> u8 {
    let handle = disk.handle().clone();
    on_worker(pool, move || async move {
        let disk = handle.local().unwrap();
        let buffer = AlignedBuffer::new(4096);
        // SAFETY: as above.
        let memory = [unsafe { buffer.io(0, 4096) }];
        disk.read(0, &memory).await.unwrap();
        buffer.as_slice()[0]
    })
}

fn on_worker<M, F>(pool: &HostedPool, make: M) -> u8
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = u8> + 'static,
{
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        sender.send(make().await).unwrap();
    });
    receiver.recv().unwrap()
}

fn status(pool: &HostedPool) -> VirtualDiskStatus {
    let request = StorageRequest::Disk(DiskOperation::Status { path: DISK.into() });
    match pool.execute(request).unwrap() {
        StorageAnswer::Disk(outcome) => match outcome.answer {
            DiskAnswer::Status(status) => *status,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn snapshot(pool: &HostedPool, name: &str) {
    let request = DiskOperation::Snapshot {
        paths: vec![DISK.into()],
        name: name.into(),
        description: String::new(),
    };
    pool.execute(StorageRequest::Disk(request)).unwrap();
}

#[test]
fn a_disk_in_use_is_snapshotted_resized_and_closed_with_its_guard() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    with_disk(&devices);
    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    let refused = pool
        .disk(DISK, options(DiskMode::Persistent, false))
        .err()
        .unwrap();
    assert_eq!(refused.kind, ProblemKind::Conflict, "{refused}");
    write(&pool, &disk, 1);
    snapshot(&pool, "monday");
    write(&pool, &disk, 2);
    let old = pool
        .disk("/vm/root.dsk@monday", options(DiskMode::Persistent, true))
        .unwrap();
    assert_eq!((read(&pool, &disk), read(&pool, &old)), (2, 1));
    drop(old.into_guard());

    let told = Arc::new(AtomicU64::new(0));
    let (tell, handle) = (Arc::clone(&told), disk.handle().clone());
    disk.on_resize(move || tell.store(handle.geometry().size, Ordering::SeqCst));
    let resize = DiskOperation::Resize {
        path: DISK.into(),
        size: 2 << 20,
        force: false,
    };
    pool.execute(StorageRequest::Disk(resize)).unwrap();
    assert_eq!(told.load(Ordering::SeqCst), 2 << 20, "the guest is told");

    let resize = Operation::ResizeVolume {
        name: "data".into(),
        size: 8 << 20,
        shrink: true,
    };
    let refused = pool.execute(StorageRequest::Pool(resize)).unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Conflict, "{refused}");
    let files = |pool: &HostedPool| match pool.execute(StorageRequest::Status).unwrap() {
        StorageAnswer::Status(status) => {
            assert_eq!(status.volumes.len(), 2);
            status.files.unwrap().volumes[0].size
        }
        other => panic!("{other:?}"),
    };
    let before = files(&pool);
    let grow = Operation::ResizeVolume {
        name: "data".into(),
        size: 24 << 20,
        shrink: false,
    };
    pool.execute(StorageRequest::Pool(grow)).unwrap();
    assert_eq!(
        (before, files(&pool)),
        (16 << 20, 24 << 20),
        "the files have it at once"
    );
    write(&pool, &disk, 2);

    drop(disk.into_guard());
    pool.close().unwrap();
    let refused = pool.execute(StorageRequest::Status).unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Stopping, "{refused}");

    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    assert_eq!((read(&pool, &disk), disk.size()), (2, 2 << 20));
    assert_eq!(status(&pool).disk.snapshots, 1);
    drop(disk.into_guard());
    pool.close().unwrap();
}

#[test]
fn what_a_nonpersistent_disk_was_given_goes_at_power_off() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    with_disk(&devices);
    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    write(&pool, &disk, 1);
    drop(disk.into_guard());
    // The guard's work is not waited for by who opens the disk next.
    let disk = loop {
        match pool.disk(DISK, options(DiskMode::Nonpersistent, false)) {
            Ok(disk) => break disk,
            Err(problem) => assert_eq!(problem.kind, ProblemKind::Conflict, "{problem}"),
        }
    };
    write(&pool, &disk, 2);
    assert_eq!(read(&pool, &disk), 2);
    drop(disk.into_guard());
    pool.close().unwrap();

    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    assert_eq!(read(&pool, &disk), 1);
    drop(disk.into_guard());
    pool.close().unwrap();
}

#[test]
fn who_waits_for_a_job_does_not_keep_the_pool_from_being_closed() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    with_disk(&devices);
    let pool = Arc::new(open(&devices));
    // At this rate it takes days.
    let scrub = Operation::Scrub {
        volume: None,
        throttle: 100,
    };
    let waits = std::thread::spawn({
        let (pool, scrub) = (Arc::clone(&pool), scrub.clone());
        move || pool.execute(StorageRequest::Pool(scrub))
    });
    let jobs = |pool: &HostedPool| match pool.execute(StorageRequest::Status).unwrap() {
        StorageAnswer::Status(status) => status.jobs,
        other => panic!("{other:?}"),
    };
    while !jobs(&pool).iter().any(api::storage::JobStatus::is_live) {
        std::thread::yield_now();
    }
    // Who does not wait for it has its number at once.
    match pool.execute(StorageRequest::Begin(scrub)) {
        Ok(StorageAnswer::Pool(outcome)) => assert!(outcome.interrupted && outcome.jobs.len() == 1),
        Ok(other) => panic!("{other:?}"),
        // There is one already.
        Err(problem) => assert_eq!(problem.kind, ProblemKind::Conflict, "{problem}"),
    }
    pool.close().unwrap();
    match waits.join().unwrap() {
        Ok(StorageAnswer::Pool(outcome)) => assert!(outcome.interrupted),
        other => panic!("{other:?}"),
    }
}

fn ask(pool: &HostedPool, operation: DiskOperation) -> Result<DiskAnswer, api::Problem> {
    match pool.execute(StorageRequest::Disk(operation))? {
        StorageAnswer::Disk(outcome) => Ok(outcome.answer),
        other => panic!("{other:?}"),
    }
}

#[test]
fn lists_of_files_disks_and_snapshots_come_in_pages() {
    let folder = tempfile::tempdir().unwrap();
    let devices = common::pool(folder.path());
    with_disk(&devices);
    let pool = open(&devices);
    for number in 0..4 {
        let path = format!("/more/{number}.dsk");
        let create = DiskOperation::Create {
            path,
            size: 1 << 20,
            thick: false,
            target: None,
            checksums: None,
        };
        if number == 0 {
            let make = FileOperation::MakeDirectory {
                path: "/more".into(),
                parents: true,
                attributes: Default::default(),
            };
            pool.execute(StorageRequest::File(make)).unwrap();
        }
        ask(&pool, create).unwrap();
        snapshot(&pool, &format!("s{number}"));
    }
    let path = || "/".to_owned();
    let (limit, after) = (None, None);
    for mut request in [
        StorageRequest::File(FileOperation::List {
            path: path(),
            recursive: true,
            limit,
            after: after.clone(),
        }),
        StorageRequest::Disk(DiskOperation::List {
            path: path(),
            limit,
            after: after.clone(),
        }),
        StorageRequest::Disk(DiskOperation::ListSnapshots {
            path: DISK.into(),
            limit,
            after,
        }),
    ] {
        let whole = pool.execute(request.clone()).unwrap();
        assert!(request.begin_pages(2) && !request.begin_pages(3));
        let mut pages = pool.execute(request.clone()).unwrap();
        let mut count = 1;
        while let Some(after) = pages.take_next() {
            request.go_on_after(after);
            pages.append(pool.execute(request.clone()).unwrap());
            count += 1;
        }
        assert!(count > 2);
        assert_eq!(pages, whole);
    }
    let wrong = DiskOperation::ListSnapshots {
        path: DISK.into(),
        limit: Some(1001),
        after: None,
    };
    assert_eq!(ask(&pool, wrong).unwrap_err().kind, ProblemKind::Invalid);
    let gone = DiskOperation::ListSnapshots {
        path: DISK.into(),
        limit: None,
        after: Some("never".into()),
    };
    assert_eq!(ask(&pool, gone).unwrap_err().kind, ProblemKind::NotFound);
    pool.close().unwrap();
}

fn places(path: &str, length: u64, unless: Option<&str>) -> DiskOperation {
    DiskOperation::Places {
        path: path.into(),
        offset: 0,
        length,
        unless: unless.map(str::to_owned),
    }
}

#[test]
fn where_a_snapshot_lies_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    with_disk(&devices);
    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    write(&pool, &disk, 7);
    snapshot(&pool, "s");
    let path = "/vm/root.dsk@s";
    let look = |unless: Option<&str>| match ask(&pool, places(path, 1 << 20, unless)).unwrap() {
        DiskAnswer::Places(places) => *places,
        other => panic!("{other:?}"),
    };
    let found = look(None);
    assert_eq!(
        (found.size, found.extents.len(), found.devices.len()),
        (1 << 20, 1, 1)
    );
    let extent = found.extents[0];
    assert_eq!((extent.offset, extent.length), (0, 4096));
    // It is there: anybody can read it from the device.
    let number = usize::try_from(extent.device).unwrap();
    let start = usize::try_from(extent.start).unwrap();
    assert!(std::fs::read(&devices[number]).unwrap()[start..start + 4096] == [7; 4096]);
    // Writes to the disk do not change that.
    write(&pool, &disk, 8);
    let again = look(found.configuration.as_deref());
    assert!(again.same && again.extents.is_empty() && again.identity == found.identity);
    assert!(!look(Some("0")).same);

    let kind = |operation| ask(&pool, operation).unwrap_err().kind;
    assert_eq!(kind(places(DISK, 4096, None)), ProblemKind::Invalid);
    assert_eq!(kind(places("/vm/root.dsk@t", 4096, None)), ProblemKind::NotFound);
    assert_eq!(kind(places(path, u64::MAX, None)), ProblemKind::TooLarge);
    // Of the same name, and another one.
    let delete = DiskOperation::DeleteSnapshot { path: path.into() };
    ask(&pool, delete).unwrap();
    snapshot(&pool, "s");
    assert_ne!(look(None).identity, found.identity);
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn what_a_pin_holds_goes_when_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    with_disk(&devices);
    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    for (byte, name) in [(1, "long"), (2, "short")] {
        write(&pool, &disk, byte);
        snapshot(&pool, name);
    }
    write(&pool, &disk, 3);
    let pin = |name: &str, seconds| {
        let pin = DiskOperation::Pin {
            path: format!("/vm/root.dsk@{name}"),
            seconds,
            replaces: None,
        };
        match ask(&pool, pin)? {
            DiskAnswer::Pinned(pin) => Ok::<_, api::Problem>(pin.pin),
            other => panic!("{other:?}"),
        }
    };
    for seconds in [0, 3601, u64::MAX] {
        assert_eq!(pin("long", seconds).unwrap_err().kind, ProblemKind::Invalid);
    }
    let long = pin("long", 3600).unwrap();
    let bytes = match ask(&pool, places("/vm/root.dsk@long", 4096, None)).unwrap() {
        DiskAnswer::Places(places) => places.extents[0],
        other => panic!("{other:?}"),
    };
    pin("short", 1).unwrap();
    let delete = |pool: &HostedPool, name: &str| {
        let path = format!("/vm/root.dsk@{name}");
        ask(pool, DiskOperation::DeleteSnapshot { path }).unwrap();
    };
    delete(&pool, "short");
    delete(&pool, "long");
    let settled = |pool: &HostedPool, layers: usize| {
        let begun = std::time::Instant::now();
        while status(pool).layers != layers {
            assert!(
                begun.elapsed() < std::time::Duration::from_secs(60),
                "{:?}",
                status(pool)
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    // The time of one is over, the other one survives whoever made it, and what it holds is where it was.
    settled(&pool, 2);
    drop(disk);
    pool.close().unwrap();
    let pool = open(&devices);
    let disk = pool.disk(DISK, options(DiskMode::Persistent, false)).unwrap();
    let device = &devices[usize::try_from(bytes.device).unwrap()];
    let start = usize::try_from(bytes.start).unwrap();
    assert!(std::fs::read(device).unwrap()[start..start + 4096] == [1; 4096]);
    assert_eq!(status(&pool).layers, 2);
    for _ in 0..2 {
        ask(&pool, DiskOperation::Unpin { pin: long }).unwrap();
    }
    settled(&pool, 1);
    assert_eq!(read(&pool, &disk), 3);
    drop(disk);
    pool.close().unwrap();
}
