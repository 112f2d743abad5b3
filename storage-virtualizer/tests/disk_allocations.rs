//! A virtual disk costs nothing beside its file: the same futures, and reads and writes allocate nothing in steady state, however long
//! the chain is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod counting;

use std::rc::Rc;
use std::sync::atomic::Ordering;

use block_io::{
    AlignedBuffer, BlockDevice, Durability, HostDevice, OpenOptions, Worker, WorkerClock, WorkerOptions,
};
use counting::{ALLOCATIONS, COUNTS};
use filesys::{Access, FileSystem, FormatOptions, GivenVolume};
use storage_virtualizer::disk::{DiskOptions, Disks, NewDisk, NewSnapshot};

fn volume(number: u8) -> GivenVolume<HostDevice> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(32 << 20).unwrap();
    GivenVolume {
        uuid: [number; 16],
        name: format!("v{number}"),
        class: String::new(),
        device: Rc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap()),
    }
}

#[test]
fn a_disk_is_its_file_and_nothing_more() {
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    worker.run(|| async {
        let format = FormatOptions {
            uuid: [7; 16],
            seed: 7,
            journal_blocks: None,
            grow_to: 0,
        };
        let made = FileSystem::format(
            volume(0),
            vec![volume(1)],
            &format,
            filesys::OpenOptions::default(),
            WorkerClock::new(),
        );
        let fs = Box::pin(made).await.unwrap();
        let disks = Disks::new(fs.clone());
        let new = NewDisk {
            size: 4 << 20,
            ..NewDisk::default()
        };
        disks.create("/a.dsk", &new).await.unwrap();
        disks.create("/b.dsk", &new).await.unwrap();
        let disk = disks.open("/a.dsk", DiskOptions::default()).await.unwrap();
        let file = fs.open_file("/b.dsk", Access::Write).await.unwrap();
        let buffer = AlignedBuffer::new(4096);
        // SAFETY: the buffer outlives all requests, which are awaited or never polled.
        let memory = [unsafe { buffer.io(0, 4096) }];
        let size = |of_disk: usize, of_file: usize| assert_eq!(of_disk, of_file, "bytes of a future");
        size(
            size_of_val(&disk.read(0, &memory)),
            size_of_val(&file.read(0, &memory)),
        );
        size(
            size_of_val(&disk.write(0, &memory, Durability::Volatile)),
            size_of_val(&file.write(0, &memory, Durability::Volatile)),
        );
        size(size_of_val(&disk.flush()), size_of_val(&file.flush()));

        // Data in all layers of a chain.
        for layer in 0..8_u64 {
            disk.write(layer * 65536, &memory, Durability::Volatile)
                .await
                .unwrap();
            let snapshot = NewSnapshot {
                name: format!("s{layer}"),
                ..NewSnapshot::default()
            };
            disks.snapshot(&["/a.dsk"], &snapshot).await.unwrap();
        }
        let of_disk = allocations(&disk).await;
        let of_file = allocations(&file).await;
        assert_eq!(of_disk, of_file, "allocations of reads, writes and flushes");
        // A flush is the file system's business.
        assert_eq!(of_disk[..2], [0; 2], "allocations of reads and writes");
        drop((disk, file));
        fs.close().await.unwrap();
    });
}

/// Allocations of 1600 reads, as many writes, and 200 flushes, when all of these have been done before.
async fn allocations<D: BlockDevice>(disk: &D) -> [u64; 3] {
    let buffer = AlignedBuffer::new(4096);
    // SAFETY: the buffer outlives all requests, which are awaited.
    let memory = [unsafe { buffer.io(0, 4096) }];
    let mut counted = [0; 3];
    for measured in [false, true] {
        for (kind, count) in counted.iter_mut().enumerate() {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            COUNTS.set(measured);
            for _ in 0..200 {
                for cluster in 0..8 {
                    let offset = cluster * 65536;
                    match kind {
                        0 => disk.read(offset, &memory).await.unwrap(),
                        1 => disk.write(offset, &memory, Durability::Volatile).await.unwrap(),
                        _ => {}
                    }
                }
                if kind == 2 {
                    disk.flush().await.unwrap();
                }
            }
            COUNTS.set(false);
            *count = ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
    }
    counted
}
