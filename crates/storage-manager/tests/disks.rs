//! Virtual disks of an open pool, as who serves them to guests has them.
#![allow(clippy::unwrap_used)]

mod common;

use std::cell::Cell;
use std::rc::Rc;

use api::ProblemKind;
use api::virtual_disk::{DiskAnswer, DiskOperation, ExportRequest, ImageFormat};
use block_io::{AlignedBuffer, BlockDevice, Durability, Worker, WorkerOptions};
use common::go_on;
use storage_manager::{Access, DiskMode, DiskOptions, PoolAt, Storage, VirtualDisk};

/// A pool with two disks, and the paths of its devices.
fn pool(folder: &tempfile::TempDir) -> Vec<String> {
    let paths = common::pool(folder.path());
    for path in ["/root.dsk", "/data.dsk"] {
        let create = DiskOperation::Create {
            path: path.into(),
            size: 1 << 20,
            thick: false,
            target: None,
            checksums: None,
        };
        storage_manager::execute_disk(paths.clone(), create, &mut go_on).unwrap();
    }
    paths
}

async fn put(disk: &VirtualDisk, value: u8) {
    let mut buffer = AlignedBuffer::new(4096);
    buffer.as_mut_slice().fill(value);
    // SAFETY: the buffer outlives the request, which is awaited.
    let memory = [unsafe { buffer.io(0, 4096) }];
    disk.write(8192, &memory, Durability::Volatile).await.unwrap();
    disk.flush().await.unwrap();
}

async fn get(disk: &VirtualDisk) -> u8 {
    let buffer = AlignedBuffer::new(4096);
    // SAFETY: the buffer outlives the request, which is awaited.
    let memory = [unsafe { buffer.io(0, 4096) }];
    disk.read(8192, &memory).await.unwrap();
    buffer.as_slice()[0]
}

fn reading() -> DiskOptions {
    DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    }
}

#[test]
fn disks_in_use_are_kept_together_grow_and_are_committed() {
    let folder = tempfile::tempdir().unwrap();
    let paths = pool(&folder);
    let devices = paths.clone();
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let storage = Storage::open(&devices, Access::Write).await.unwrap();
        assert_eq!(storage.disk_paths("/").await.unwrap(), ["/data.dsk", "/root.dsk"]);
        let root = storage.disk("/root.dsk", DiskOptions::default()).await.unwrap();
        let append = DiskOptions {
            mode: DiskMode::Append,
            ..DiskOptions::default()
        };
        let data = storage.disk("/data.dsk", append).await.unwrap();
        let refused = storage
            .disk("/root.dsk", DiskOptions::default())
            .await
            .unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Conflict);
        let size = Rc::new(Cell::new(0));
        let seen = Rc::clone(&size);
        root.on_resize(move |new| seen.set(new));

        put(&root, 1).await;
        put(&data, 2).await;
        let snapshot = DiskOperation::Snapshot {
            paths: vec!["/root.dsk".into(), "/data.dsk".into()],
            name: "both".into(),
            description: "of a running machine".into(),
        };
        storage.perform_disk(snapshot).await.unwrap();
        put(&root, 3).await;
        put(&data, 4).await;
        for (path, old) in [("/root.dsk@both", 1), ("/data.dsk@both", 2)] {
            let snapshot = storage.disk(path, reading()).await.unwrap();
            let again = storage.disk(path, reading()).await.unwrap();
            assert_eq!((get(&snapshot).await, get(&again).await), (old, old));
        }
        let grow = DiskOperation::Resize {
            path: "/root.dsk".into(),
            size: 2 << 20,
            force: false,
        };
        storage.perform_disk(grow).await.unwrap();
        assert_eq!((size.get(), root.size()), (2 << 20, 2 << 20));
        let commit = DiskOperation::Commit {
            path: "/data.dsk".into(),
        };
        storage.perform_disk(commit).await.unwrap();
        for path in ["/root.dsk", "/data.dsk"] {
            let delete = DiskOperation::DeleteSnapshot {
                path: format!("{path}@both"),
            };
            storage.perform_disk(delete).await.unwrap();
        }
        storage.files().unwrap().settled().await;
        // Broken off, it is done from where it was, and nobody notices anything.
        let disks = storage.disks().unwrap();
        let broken_off = disks.merge_while("/root.dsk", 0, |done, all| {
            assert_eq!((done, all), (1 << 20, 1 << 20));
            false
        });
        assert!(!Box::pin(broken_off).await.unwrap());
        assert_eq!(get(&root).await, 3);
        assert!(storage.merge_disk("/data.dsk").await.unwrap());
        assert!(storage.merge_disk("/root.dsk").await.unwrap());
        assert_eq!((get(&root).await, get(&data).await), (3, 4));
        let still = Rc::clone(&root);
        let refused = storage.close_disk(root).await.unwrap_err();
        assert!(refused.detail.contains("still in use"), "{refused}");
        storage.close_disk(still).await.unwrap();
        storage.close_disk(data).await.unwrap();
        storage.close().await.unwrap();
    });
    let status = DiskOperation::Status {
        path: "/data.dsk".into(),
    };
    let found = storage_manager::execute_disk(paths.clone(), status, &mut go_on).unwrap();
    let DiskAnswer::Status(found) = found.answer else {
        panic!("{found:?}")
    };
    assert_eq!((found.disk.snapshots, found.unmerged), (0, 0));
    assert_eq!(found.disk.redo, Some(api::virtual_disk::DiskMode::Append));
}

#[test]
fn an_image_is_exported_while_others_look_at_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    let paths = pool(&folder);
    let image = folder.path().join("out.qcow2").to_str().unwrap().to_owned();
    let devices = paths.clone();
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    let storage = worker.run(move || async move {
        let storage = Storage::open(&devices, Access::Read).await.unwrap();
        let disk = storage.disk("/root.dsk", reading()).await.unwrap();
        let refused = storage
            .disk("/data.dsk", DiskOptions::default())
            .await
            .unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Conflict, "{refused}");
        assert_eq!(get(&disk).await, 0);
        // Nothing is to be written, so nothing has to be closed.
        true
    });
    assert!(storage);
    let export = ExportRequest {
        path: "/root.dsk".into(),
        image,
        format: ImageFormat::Qcow2,
        force: false,
        verify: true,
    };
    let done = storage_manager::export_disk(PoolAt::Devices(paths), export, &mut go_on).unwrap();
    assert!(done.verified && done.size == 1 << 20);
}
