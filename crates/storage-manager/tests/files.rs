//! A pool with files, opened in process, as who serves disks to guests does it.
#![allow(clippy::unwrap_used)]

use std::fs::File;

use api::file::{FileOperation, WriteRequest};
use api::storage::{LayoutKind, NewDevice, Operation, Shape};
use block_io::{AlignedBuffer, BlockDevice, Durability, Worker, WorkerOptions};
use storage_manager::{Access, Flow, Force, Notice, Storage};

fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

#[test]
fn files_are_disks_for_who_opens_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<String> = (0..2)
        .map(|number| {
            let path = folder.path().join(format!("d{number}"));
            File::create(&path).unwrap().set_len(64 << 20).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let devices = paths.iter().map(|path| NewDevice {
        path: path.clone(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    });
    storage_manager::create("tank", devices.collect(), &mut go_on).unwrap();
    let volume = Operation::CreateVolume {
        name: "data".into(),
        size: 16 << 20,
        block: 4096,
        shape: Shape {
            layout: LayoutKind::Mirror,
            columns: 0,
            copies: 0,
            stripe_unit: 0,
            class: String::new(),
            devices: Vec::new(),
        },
        read_policy: api::storage::ReadPolicy::default(),
        raw: false,
    };
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(paths.clone(), format, &mut go_on).unwrap();
    storage_manager::execute(paths.clone(), Force::No, volume, &mut go_on).unwrap();
    let request = WriteRequest {
        path: "/a.dsk".into(),
        offset: None,
        size: Some(1 << 20),
        thick: false,
        expected: None,
    };
    storage_manager::write_file(paths.clone(), request, &b"hello"[..], &mut go_on).unwrap();

    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let storage = Storage::open(&paths, Access::Write).await.unwrap();
        let disk = storage.file("/a.dsk", filesys::Access::Write).await.unwrap();
        assert_eq!(disk.size(), 1 << 20);
        let buffer = AlignedBuffer::new(512);
        // SAFETY: the buffer outlives both requests, which are awaited.
        let memory = [unsafe { buffer.io(0, 512) }];
        disk.read(0, &memory).await.unwrap();
        assert_eq!(&buffer.as_slice()[..6], b"hello\0");
        disk.write(4096, &memory, Durability::Volatile).await.unwrap();
        disk.flush().await.unwrap();
        let refused = storage.file("/a.dsk", filesys::Access::Write).await.unwrap_err();
        assert!(refused.detail.contains("open for writing already"), "{refused}");
        let refused = storage.file("/none", filesys::Access::Read).await.unwrap_err();
        assert_eq!(refused.kind, api::ProblemKind::NotFound);
        drop(disk);
        storage.close().await.unwrap();
    });
}
