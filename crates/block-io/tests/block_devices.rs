//! Block devices, made of files by the loop driver. Needs root and loop devices; says so where it has none.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block_io::{
    AlignedBuffer, BlockDevice, Durability, EngineKind, HostDevice, IoCause, OpenError, OpenOptions, Worker,
    WorkerOptions, ZeroMode,
};
use tempfile::{NamedTempFile, TempDir};

const SIZE: u64 = 32 << 20;

struct LoopDevice {
    path: PathBuf,
    _file: NamedTempFile,
}

impl LoopDevice {
    fn new(sector: u32) -> Option<Self> {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let output = Command::new("losetup")
            .args([
                "--find",
                "--show",
                "--direct-io=on",
                "--sector-size",
                &sector.to_string(),
            ])
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Self { path, _file: file })
            }
            refused => {
                eprintln!("skipped: this machine gives us no loop device ({refused:?})");
                None
            }
        }
    }
}

/// A mounted file system.
struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(detached.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn open(path: &Path) -> Result<HostDevice, OpenError> {
    HostDevice::open(path, &OpenOptions::default())
}

fn workers() -> [Worker; 2] {
    [EngineKind::Uring, EngineKind::Threads].map(|engine| {
        Worker::start(
            "test",
            WorkerOptions {
                engine: Some(engine),
                ..Default::default()
            },
        )
        .unwrap()
    })
}

async fn write(device: &HostDevice, offset: u64, data: &[u8]) {
    let mut buffer = AlignedBuffer::new(data.len());
    buffer.as_mut_slice().copy_from_slice(data);
    // SAFETY: the buffer lives until the write has ended.
    let piece = [unsafe { buffer.io(0, data.len()) }];
    device.write(offset, &piece, Durability::Durable).await.unwrap();
}

async fn read(device: &HostDevice, offset: u64, length: usize, shift: usize) -> Vec<u8> {
    let buffer = AlignedBuffer::new(length + shift);
    // SAFETY: the buffer lives until the read has ended.
    let piece = [unsafe { buffer.io(shift, length) }];
    device.read(offset, &piece).await.unwrap();
    buffer.as_slice()[shift..].to_vec()
}

#[test]
fn a_block_device_reads_writes_zeroes_and_discards() {
    for sector in [512, 4096] {
        let Some(loop_device) = LoopDevice::new(sector) else {
            return;
        };
        for worker in workers() {
            let device = Arc::new(open(&loop_device.path).unwrap());
            let geometry = device.geometry();
            assert_eq!((geometry.size, geometry.logical_block), (SIZE, sector));
            worker.run(move || async move {
                let data: Vec<u8> = (0..1_u32 << 20).map(|index| (index / 11) as u8 | 1).collect();
                write(&device, 8192, &data).await;
                assert_eq!(read(&device, 8192, data.len(), 0).await, data);
                assert_eq!(read(&device, 8192, data.len(), 3).await, data);
                for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
                    device.write_zeroes(8192, 65536, mode).await.unwrap();
                    assert!(read(&device, 8192, 65536, 0).await.iter().all(|byte| *byte == 0));
                    write(&device, 8192, &data[..65536]).await;
                }
                device.discard(1 << 20, 1 << 20).await.unwrap();
                assert_eq!(read(&device, 8192, 65536, 0).await, data[..65536]);
                device.flush().await.unwrap();
                if sector == 4096 {
                    let buffer = AlignedBuffer::new(512);
                    // SAFETY: the buffer lives until the read has ended.
                    let piece = [unsafe { buffer.io(0, 512) }];
                    let error = device.read(512, &piece).await.unwrap_err();
                    assert!(matches!(error.cause(), IoCause::Misaligned { block: 4096 }));
                }
            });
        }
    }
}

#[test]
fn a_block_device_has_one_writer() {
    let Some(loop_device) = LoopDevice::new(512) else {
        return;
    };
    let writer = open(&loop_device.path).unwrap();
    let error = open(&loop_device.path).unwrap_err();
    let OpenError::InUse { holder, .. } = &error else {
        panic!("{error}")
    };
    assert!(
        holder
            .as_ref()
            .unwrap()
            .contains(&format!("pid {}", std::process::id())),
        "{error}"
    );
    drop(writer);
    open(&loop_device.path).unwrap();
}

#[test]
fn guests_write_sectors_to_a_file_on_a_disk_of_4096_byte_blocks() {
    let Some(loop_device) = LoopDevice::new(4096) else {
        return;
    };
    let directory = TempDir::new().unwrap();
    let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    if !run(Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&loop_device.path))
        || !run(Command::new("mount").arg(&loop_device.path).arg(directory.path()))
    {
        eprintln!("skipped: cannot make and mount a file system here");
        return;
    }
    let _mount = Mount(directory.path());
    let path = directory.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for worker in workers() {
        let device = Arc::new(open(&path).unwrap());
        assert!(device.is_direct());
        assert_eq!(device.geometry().logical_block, 512);
        assert_eq!(device.geometry().physical_block, 4096);
        worker.run(move || async move {
            write(&device, 0, &[1; 16384]).await;
            write(&device, 512, &[2; 512]).await;
            write(&device, 3584, &[3; 1024]).await;
            let bytes = read(&device, 0, 16384, 1).await;
            let mut expected = vec![1; 16384];
            expected[512..1024].fill(2);
            expected[3584..4608].fill(3);
            assert_eq!(bytes, expected);
        });
    }
    // The file system is in use by a mount: the device cannot be opened, and the message says which.
    let error = open(&loop_device.path).unwrap_err();
    let holder = directory.path().display().to_string();
    assert!(error.to_string().contains(&holder), "{error}");
}
