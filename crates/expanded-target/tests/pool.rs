//! The expanded API on a real pool: what a guest asks for is there, and what it may not is not.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use api::file::Target;
use api::storage::{JobState, LayoutKind, Operation};
use api::virtual_disk::DiskOperation;
use api::{ExpandedPolicy, ProblemKind, Right, StorageRequest};
use block_io::{AlignedBuffer, BlockDevice, Durability, WorkerOptions};
use common::{FakeVm, Guest, make_pool};
use expanded_api::{Answer, Extent, GuestDisk, Request};
use storage_manager::{DiskOptions, HostedDisk, HostedPool};
use storage_virtualizer::DiskHandle;

/// A pool on three files, with two volumes.
fn pool(folder: &Path) -> HostedPool {
    let volumes = [
        ("safe", LayoutKind::Mirror, 16 << 20),
        ("fast", LayoutKind::Concat, 16 << 20),
    ];
    let paths = make_pool(folder, 96 << 20, &volumes);
    HostedPool::open("test", paths, WorkerOptions::default()).unwrap()
}

/// Writes the first block of a disk, as a queue server would.
fn write(pool: &HostedPool, disk: &HostedDisk) {
    write_at(pool, disk, 0);
}

fn write_at(pool: &HostedPool, disk: &HostedDisk, offset: u64) {
    let handle = disk.handle().clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        let disk = handle.local().unwrap();
        let mut buffer = AlignedBuffer::new(4096);
        buffer.as_mut_slice().fill(7);
        // SAFETY: the buffer outlives the request, which is awaited.
        let memory = [unsafe { buffer.io(0, 4096) }];
        disk.write(offset, &memory, Durability::Volatile).await.unwrap();
        disk.flush().await.unwrap();
        sender.send(()).unwrap();
    });
    receiver.recv().unwrap();
}

fn create(disk: &str, attach: bool) -> Request {
    Request::CreateDisk {
        disk: disk.into(),
        size: 1 << 20,
        thick: true,
        target: Some(Target::Volume("safe".into())),
        checksums: None,
        attach,
    }
}

fn disks(guest: &Guest) -> Vec<GuestDisk> {
    match guest.ask(&Request::ListDisks {}).unwrap() {
        Answer::Disks(disks) => disks,
        other => panic!("{other:?}"),
    }
}

fn configuration(guest: &Guest, disk: &str) -> String {
    match guest
        .ask(&Request::ConfigurationId { disk: disk.into() })
        .unwrap()
    {
        Answer::ConfigurationId(text) => text,
        other => panic!("{other:?}"),
    }
}

fn extents(guest: &Guest, disk: &str) -> Vec<Extent> {
    match guest.ask(&Request::Extents { disk: disk.into() }).unwrap() {
        Answer::Extents(extents) => extents,
        other => panic!("{other:?}"),
    }
}

fn wait(guest: &Guest, answer: Answer) -> JobState {
    let Answer::Jobs(jobs) = answer else {
        panic!("{answer:?}")
    };
    let job = jobs.first().unwrap().id;
    loop {
        match guest.ask(&Request::JobStatus { job }).unwrap() {
            Answer::Jobs(jobs) if jobs[0].state == JobState::Running => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Answer::Jobs(jobs) => return jobs[0].state,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guest_makes_snapshots_moves_and_reshapes_what_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Arc::new(pool(folder.path()));
    let other = DiskOperation::Create {
        path: "/other.dsk".into(),
        size: 1 << 20,
        thick: false,
        target: None,
        checksums: None,
    };
    pool.execute(StorageRequest::Disk(other)).unwrap();
    let vm = FakeVm::on(&pool);
    let policy = ExpandedPolicy {
        allow: Right::ALL.to_vec(),
        objects: vec!["/vm1/*".into()],
        volumes: vec!["safe".into(), "fast".into()],
        max_snapshots: 2,
        rate: 1000,
        ..ExpandedPolicy::default()
    };
    let guest = Guest::new(vm.clone(), policy);
    assert_eq!(disks(&guest), []);

    // Its folder is made with its first disk.
    let attached = guest.ask(&create("/vm1/a.dsk", true)).unwrap();
    assert!(matches!(&attached, Answer::Attached(disk) if disk.path == "/vm1/a.dsk"));
    let a = "/vm1/a.dsk";
    let open = pool.disk(a, DiskOptions::default()).unwrap();
    write(&pool, &open);
    assert_eq!(
        guest.ask(&create(a, true)).unwrap_err().kind,
        ProblemKind::Conflict
    );
    assert_eq!(guest.ask(&create("/vm1/b.dsk", false)).unwrap(), Answer::Done);
    // No others.
    assert_eq!(
        guest.ask(&create("/vm1/deep/c.dsk", false)).unwrap_err().kind,
        ProblemKind::NotFound
    );
    let seen = disks(&guest);
    assert_eq!(seen.len(), 2);
    assert_eq!(
        (seen[0].path.as_deref(), seen[0].volumes.as_slice()),
        (Some(a), &["safe".to_owned()][..])
    );
    assert!(seen[0].id.is_some() && seen[1].id.is_none());

    let snapshot = |name: &str| Request::Snapshot {
        disks: Vec::new(),
        name: name.into(),
        description: String::new(),
    };
    guest.ask(&snapshot("monday")).unwrap();
    let frozen = Request::FreezeImage {
        disks: vec![a.into(), "/vm1/b.dsk".into()],
        name: "image".into(),
    };
    let Answer::Image(image) = guest.ask(&frozen).unwrap() else {
        panic!()
    };
    assert_eq!(image.disks[1].snapshot, "/vm1/b.dsk@image");
    assert_eq!(image.disks[0].configuration, configuration(&guest, a));
    assert_eq!(
        guest.ask(&snapshot("third")).unwrap_err().kind,
        ProblemKind::Exhausted
    );
    let changed = Request::Changed {
        disk: a.into(),
        since: "image".into(),
        until: None,
    };
    assert_eq!(guest.ask(&changed).unwrap(), Answer::Changed(Vec::new()));
    guest
        .ask(&Request::CloneDisk {
            source: "/vm1/b.dsk@image".into(),
            disk: "/vm1/c.dsk".into(),
            attach: false,
        })
        .unwrap();
    assert_eq!(disks(&guest).len(), 3);
    // What is written now is not in the images: where these are stays the same.
    let then = (extents(&guest, a), configuration(&guest, a));
    let image = format!("{a}@image");
    write_at(&pool, &open, 64 << 10);
    assert_eq!((extents(&guest, &image), configuration(&guest, &image)), then);
    assert_ne!(extents(&guest, a), then.0);
    let none = Request::Extents {
        disk: format!("{a}@none"),
    };
    assert_eq!(guest.ask(&none).unwrap_err().kind, ProblemKind::NotFound);
    // In use.
    let revert = Request::Revert {
        snapshot: format!("{a}@monday"),
    };
    assert_eq!(guest.ask(&revert).unwrap_err().kind, ProblemKind::Conflict);
    let release = Request::ReleaseImage {
        disks: vec![a.into(), "/vm1/b.dsk".into()],
        name: "image".into(),
    };
    guest.ask(&release).unwrap();
    guest.ask(&release).unwrap();

    // To another volume, which gets another layout.
    let before = configuration(&guest, a);
    let moved = Request::MoveDisk {
        disk: a.into(),
        to: Target::Volume("fast".into()),
        background: false,
    };
    assert!(matches!(guest.ask(&moved).unwrap(), Answer::Moved(moved) if moved.stayed == 0));
    assert_eq!(disks(&guest)[0].volumes, ["fast"]);
    let between = configuration(&guest, a);
    assert_ne!(between, before);
    let reshape = Request::SetLayout {
        volume: "fast".into(),
        layout: LayoutKind::Mirror,
        columns: 0,
        copies: 2,
        stripe_unit: 0,
        devices: Vec::new(),
        throttle: 0,
    };
    let begun = guest.ask(&reshape).unwrap();
    assert_eq!(wait(&guest, begun), JobState::Done);
    assert_ne!(configuration(&guest, a), between);
    let Answer::Volumes(volumes) = guest.ask(&Request::ListVolumes {}).unwrap() else {
        panic!()
    };
    let fast = volumes.iter().find(|volume| volume.name == "fast").unwrap();
    assert_eq!(
        (fast.shape.layout, fast.shape.copies, fast.yours),
        (LayoutKind::Mirror, 2, true)
    );
    assert!(
        volumes
            .iter()
            .all(|volume| volume.name != "fs-meta" && volume.shape.devices.is_empty())
    );
    // Others' jobs are none of its business.
    let foreign = StorageRequest::Begin(Operation::Scrub {
        volume: None,
        throttle: 0,
    });
    pool.execute(foreign).unwrap();
    let Answer::Jobs(jobs) = guest.ask(&Request::ListJobs {}).unwrap() else {
        panic!()
    };
    assert!(jobs.iter().all(|job| job.kind != "scrub"), "{jobs:?}");
    assert_eq!(
        guest.ask(&Request::CancelJob { job: 1000 }).unwrap_err().kind,
        ProblemKind::NotFound
    );

    // Larger, never smaller; gone when nobody has it any more.
    let resize = |size| Request::ResizeDisk { disk: a.into(), size };
    guest.ask(&resize(2 << 20)).unwrap();
    assert_eq!(
        guest.ask(&resize(1 << 20)).unwrap_err().kind,
        ProblemKind::Conflict
    );
    let delete = Request::DeleteDisk { disk: a.into() };
    assert_eq!(guest.ask(&delete).unwrap_err().kind, ProblemKind::Conflict);
    guest.ask(&Request::DetachDisk { disk: a.into() }).unwrap();
    drop(open);
    // It is closed in the background.
    let deleted = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        guest.ask(&delete).is_ok()
    });
    assert!(deleted && disks(&guest).len() == 2);
    // Whatever it did, what is not its own is as it was.
    let untouched = pool.execute(StorageRequest::Disk(DiskOperation::Status {
        path: "/other.dsk".into(),
    }));
    assert!(untouched.is_ok());
    drop(guest);
    pool.close().unwrap();
}
