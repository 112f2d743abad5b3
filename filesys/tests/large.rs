//! Volumes that need more than one page of bitmap.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use block_io::{HostDevice, OpenOptions, Worker, WorkerClock, WorkerOptions};
use filesys::{Attributes, FileSystem, FormatOptions, GivenVolume, NewFile};

/// A page of the bitmap covers 2 GiB.
const SIZE: u64 = 5 << 30;
const USED: u64 = 3 << 30;

fn volume(folder: &Path, number: u8, size: u64) -> GivenVolume<HostDevice> {
    let path = folder.join(number.to_string());
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(size).unwrap();
    GivenVolume {
        uuid: [number; 16],
        name: format!("v{number}"),
        class: String::new(),
        device: Rc::new(HostDevice::open(&path, &OpenOptions::default()).unwrap()),
    }
}

async fn story(folder: &Path) {
    let volumes = || (volume(folder, 0, 64 << 20), vec![volume(folder, 1, SIZE)]);
    let format = FormatOptions {
        uuid: [7; 16],
        seed: 7,
        journal_blocks: None,
        grow_to: 0,
    };
    let (meta, data) = volumes();
    let options = filesys::OpenOptions::default();
    let made = FileSystem::format(meta, data, &format, options, WorkerClock::new());
    let fs = Box::pin(made).await.unwrap();
    let new = NewFile {
        size: USED,
        attributes: Some(Attributes {
            thick: true,
            ..Attributes::default()
        }),
        now: 0,
    };
    fs.create("/large", &new).await.unwrap();
    fs.checkpoint().await.unwrap();
    fs.close().await.unwrap();
    drop(fs);

    let (meta, data) = volumes();
    let options = filesys::OpenOptions::default();
    let opened = FileSystem::open(meta.device, data, options, WorkerClock::new());
    let fs = Box::pin(opened).await.unwrap();
    let free: u64 = fs.volumes().iter().map(|volume| volume.free).sum();
    assert_eq!(free, SIZE - USED);
    fs.close().await.unwrap();
}

#[test]
fn a_volume_with_several_pages_of_bitmap_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let (sender, done) = mpsc::channel();
    std::thread::spawn(move || {
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move { story(&path).await });
        sender.send(()).unwrap();
    });
    // It must not look for the same page for ever.
    done.recv_timeout(Duration::from_secs(120)).unwrap();
}
