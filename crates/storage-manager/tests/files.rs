//! A pool with files, opened in process, as who serves disks to guests does it.
#![allow(clippy::unwrap_used)]

mod common;

use api::file::WriteRequest;
use block_io::{AlignedBuffer, BlockDevice, Durability, Worker, WorkerOptions};
use common::{go_on, pool};
use storage_manager::{Access, Storage};

#[test]
fn files_are_disks_for_who_opens_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    let paths = pool(folder.path());
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
