//! Real files, on a disk file system and in memory, with both engines.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_io::{
    AlignedBuffer, BlockDevice, Cache, Durability, EngineKind, HostDevice, IoCause, OpenError, OpenOptions,
    Worker, WorkerOptions, ZeroMode,
};
use tempfile::{NamedTempFile, TempDir};

const SIZE: u64 = 8 << 20;

fn worker(engine: EngineKind) -> Worker {
    Worker::start(
        "test",
        WorkerOptions {
            engine: Some(engine),
            ..Default::default()
        },
    )
    .unwrap()
}

/// Places with different file systems: what `/tmp` is, and memory.
fn places() -> Vec<PathBuf> {
    [std::env::temp_dir(), "/dev/shm".into()]
        .into_iter()
        .filter(|place| place.is_dir())
        .collect()
}

fn file_of(place: &Path, size: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(place).unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

/// Runs `test` on every engine, place and cache mode, with an empty device.
fn everywhere<F>(test: impl Fn(Arc<HostDevice>) -> F + Clone + Send + 'static)
where
    F: Future<Output = ()> + 'static,
{
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        let worker = worker(engine);
        for place in places() {
            for cache in [Cache::Direct, Cache::Buffered] {
                let file = file_of(&place, SIZE);
                let options = OpenOptions {
                    cache,
                    ..Default::default()
                };
                let device = Arc::new(HostDevice::open(file.path(), &options).unwrap());
                let test = test.clone();
                worker.run(move || test(device));
            }
        }
    }
}

/// Writes `data` at `offset` from memory that begins `shift` bytes after an aligned address.
async fn write(device: &HostDevice, offset: u64, data: &[u8], shift: usize) {
    let mut buffer = AlignedBuffer::new(data.len() + shift);
    buffer.as_mut_slice()[shift..].copy_from_slice(data);
    // SAFETY: the buffer lives until the write has ended.
    let piece = unsafe { buffer.io(shift, data.len()) };
    device
        .write(offset, &[piece], Durability::Volatile)
        .await
        .unwrap();
}

async fn read(device: &HostDevice, offset: u64, length: usize, shift: usize) -> Vec<u8> {
    let buffer = AlignedBuffer::new(length + shift);
    // SAFETY: the buffer lives until the read has ended.
    let piece = unsafe { buffer.io(shift, length) };
    device.read(offset, &[piece]).await.unwrap();
    buffer.as_slice()[shift..].to_vec()
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index / 7) as u8 ^ seed).collect()
}

#[test]
fn what_was_written_is_read_back_whatever_the_alignment() {
    everywhere(|device| async move {
        for (number, (offset, length, shift)) in [
            (0, 4096, 0),
            (512, 512, 0),
            (1536, 8192, 512),
            (4096, 65536, 3),
            (SIZE - 1024, 1024, 1),
            (0, 3 << 20, 8),
        ]
        .into_iter()
        .enumerate()
        {
            let data = pattern(length, number as u8);
            write(&device, offset, &data, shift).await;
            assert_eq!(read(&device, offset, length, 0).await, data);
            assert_eq!(read(&device, offset, length, 5).await, data);
        }
        device.flush().await.unwrap();
    });
}

#[test]
fn a_scatter_list_of_many_pieces_moves_in_order() {
    everywhere(|device| async move {
        const PIECES: usize = 1500;
        let data = pattern(PIECES * 512, 9);
        let mut source = AlignedBuffer::new(PIECES * 1024);
        for (piece, bytes) in data.chunks(512).enumerate() {
            source.as_mut_slice()[piece * 1024..][..512].copy_from_slice(bytes);
        }
        // SAFETY: the buffer lives until the write has ended.
        let pieces: Vec<_> = (0..PIECES)
            .map(|piece| unsafe { source.io(piece * 1024, 512) })
            .collect();
        device.write(1024, &pieces, Durability::Durable).await.unwrap();
        assert_eq!(read(&device, 1024, data.len(), 0).await, data);
        let target = AlignedBuffer::new(PIECES * 1024);
        // SAFETY: the buffer lives until the read has ended.
        let pieces: Vec<_> = (0..PIECES)
            .map(|piece| unsafe { target.io(piece * 1024, 512) })
            .collect();
        device.read(1024, &pieces).await.unwrap();
        assert_eq!(target.as_slice(), source.as_slice());
    });
}

#[test]
fn zeroes_read_as_zero_and_leave_the_neighbours_alone() {
    everywhere(|device| async move {
        let data = pattern(1 << 20, 3);
        for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
            write(&device, 0, &data, 0).await;
            device.write_zeroes(512, 300 * 1024, mode).await.unwrap();
            let after = read(&device, 0, data.len(), 0).await;
            assert_eq!(after[..512], data[..512]);
            assert!(after[512..][..300 * 1024].iter().all(|byte| *byte == 0));
            assert_eq!(after[512 + 300 * 1024..], data[512 + 300 * 1024..]);
        }
        device.discard(65536, 65536).await.unwrap();
    });
}

#[test]
fn impossible_requests_fail_and_say_why() {
    everywhere(|device| async move {
        let buffer = AlignedBuffer::new(4096);
        // SAFETY: the buffer lives until the requests have ended.
        let (piece, odd) = unsafe { (buffer.io(0, 4096), buffer.io(0, 100)) };
        let error = device.read(SIZE, &[piece]).await.unwrap_err();
        assert!(
            matches!(error.cause(), IoCause::OutOfRange { size: SIZE }),
            "{error:?}"
        );
        let error = device
            .write(u64::MAX - 511, &[piece], Durability::Volatile)
            .await
            .unwrap_err();
        assert!(matches!(error.cause(), IoCause::OutOfRange { .. }), "{error:?}");
        let error = device.read(0, &[odd]).await.unwrap_err();
        assert!(
            matches!(error.cause(), IoCause::Misaligned { block: 512 }),
            "{error:?}"
        );
        let error = device.discard(0, u64::MAX).await.unwrap_err();
        assert!(matches!(error.cause(), IoCause::OutOfRange { .. }), "{error:?}");
        device.read(0, &[]).await.unwrap();
    });
}

#[test]
fn the_missing_end_of_the_last_sector_reads_as_zero() {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        let worker = worker(engine);
        for place in places() {
            let file = file_of(&place, 0);
            file.as_file().write_all_at(&[7; 1000], 0).unwrap();
            let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
            assert_eq!(device.size(), 1024);
            let read = worker.run(move || async move { read(&device, 0, 1024, 0).await });
            assert_eq!(read[..1000], [7; 1000]);
            assert_eq!(read[1000..], [0; 24]);
        }
    }
}

#[test]
fn a_file_truncated_while_in_use_is_an_error_and_not_zeroes() {
    let worker = worker(EngineKind::Uring);
    let file = file_of(&std::env::temp_dir(), 65536);
    let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    file.as_file().set_len(4096).unwrap();
    worker.run(move || async move {
        let buffer = AlignedBuffer::new(8192);
        // SAFETY: the buffer lives until the read has ended.
        let piece = unsafe { buffer.io(0, 8192) };
        let error = device.read(0, &[piece]).await.unwrap_err();
        assert!(matches!(error.cause(), IoCause::Truncated), "{error:?}");
    });
}

#[test]
fn a_file_truncated_while_in_use_is_not_made_as_long_as_it_was() {
    let worker = worker(EngineKind::Uring);
    let file = file_of(&std::env::temp_dir(), 65536);
    let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    file.as_file().set_len(8192).unwrap();
    let kept = Arc::clone(&device);
    worker.run(move || async move {
        let buffer = AlignedBuffer::new(8192);
        // SAFETY: the buffer lives until the last request has ended.
        let piece = || [unsafe { buffer.io(0, 8192) }];
        // What is there can be used as long as nobody knows.
        device.read(0, &piece()).await.unwrap();
        assert!(!device.is_known_to_be_truncated());
        let truncated = |error: block_io::IoError| matches!(error.cause(), IoCause::Truncated);
        let end = 65536 - 8192;
        assert!(truncated(
            device
                .write(end, &piece(), Durability::Volatile)
                .await
                .unwrap_err()
        ));
        // From then on nothing is done with it.
        assert!(truncated(device.read(0, &piece()).await.unwrap_err()));
        assert!(truncated(
            device.write(0, &piece(), Durability::Volatile).await.unwrap_err()
        ));
        assert!(truncated(device.discard(0, 4096).await.unwrap_err()));
    });
    assert_eq!(file.as_file().metadata().unwrap().len(), 8192);
    // Whoever wants it to be shorter says so.
    assert_eq!(kept.refresh_size().unwrap(), 8192);
    assert!(!kept.is_known_to_be_truncated());
}

#[test]
fn a_file_truncated_while_in_use_is_noticed_by_a_flush_even_if_a_write_made_it_longer_again() {
    let worker = worker(EngineKind::Uring);
    let file = file_of(&std::env::temp_dir(), 65536);
    let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    let again = Arc::clone(&device);
    worker.run(move || async move { again.flush().await.unwrap() });
    file.as_file().set_len(0).unwrap();
    worker.run(move || async move {
        let buffer = AlignedBuffer::new(8192);
        // SAFETY: the buffer lives until the write has ended.
        let piece = unsafe { buffer.io(0, 8192) };
        device.write(8192, &[piece], Durability::Volatile).await.unwrap();
        let error = device.flush().await.unwrap_err();
        assert!(matches!(error.cause(), IoCause::Truncated), "{error:?}");
        let error = device.flush().await.unwrap_err();
        assert!(matches!(error.cause(), IoCause::EarlierFlushFailed), "{error:?}");
    });
}

#[test]
fn a_grown_file_is_seen_when_the_size_is_refreshed() {
    let file = file_of(&std::env::temp_dir(), 4096);
    let device = HostDevice::open(file.path(), &OpenOptions::default()).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    assert_eq!(device.size(), 4096);
    assert_eq!(device.refresh_size().unwrap(), 1 << 20);
    assert_eq!(device.geometry().size, 1 << 20);
}

#[test]
fn discard_makes_a_file_sparse() {
    let worker = worker(EngineKind::Uring);
    let mut file = file_of(&std::env::temp_dir(), 0);
    file.write_all(&vec![1; 1 << 20]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.as_file().sync_all().unwrap();
    let blocks = file.as_file().metadata().unwrap().blocks();
    let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    worker.run(move || async move { device.discard(0, 512 << 10).await.unwrap() });
    assert!(file.as_file().metadata().unwrap().blocks() <= blocks - 1000);
}

#[test]
fn one_writer_or_many_readers() {
    let file = file_of(&std::env::temp_dir(), 4096);
    let write = OpenOptions::default();
    let read = OpenOptions {
        read_only: true,
        ..Default::default()
    };
    let writer = HostDevice::open(file.path(), &write).unwrap();
    for options in [&write, &read] {
        let error = HostDevice::open(file.path(), options).unwrap_err();
        let OpenError::InUse { holder, .. } = &error else {
            panic!("{error}")
        };
        // This process holds it.
        assert!(
            holder
                .as_ref()
                .unwrap()
                .contains(&format!("pid {}", std::process::id())),
            "{error}"
        );
    }
    drop(writer);
    let _one = HostDevice::open(file.path(), &read).unwrap();
    let _two = HostDevice::open(file.path(), &read).unwrap();
    assert!(matches!(
        HostDevice::open(file.path(), &write),
        Err(OpenError::InUse { .. })
    ));
}

#[test]
fn a_closed_device_can_be_opened_again_at_once() {
    let worker = worker(EngineKind::Uring);
    let file = file_of(&std::env::temp_dir(), 1 << 20);
    for _ in 0..200 {
        let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
        worker.run(move || async move { write(&device, 0, &[1; 65536], 0).await });
    }
}

#[test]
fn only_files_and_block_devices_open() {
    let directory = TempDir::new().unwrap();
    let options = OpenOptions::default();
    assert!(matches!(
        HostDevice::open(directory.path(), &options),
        Err(OpenError::WrongKind { .. })
    ));
    assert!(matches!(
        HostDevice::open("/dev/null", &options),
        Err(OpenError::WrongKind { .. })
    ));
    assert!(matches!(
        HostDevice::open(directory.path().join("none"), &options),
        Err(OpenError::Open { .. })
    ));
}

#[test]
fn a_read_only_device_takes_no_writes() {
    let worker = worker(EngineKind::Uring);
    let file = file_of(&std::env::temp_dir(), 4096);
    let options = OpenOptions {
        read_only: true,
        ..Default::default()
    };
    let device = Arc::new(HostDevice::open(file.path(), &options).unwrap());
    assert!(device.geometry().read_only);
    worker.run(move || async move {
        let error = device
            .write_zeroes(0, 4096, ZeroMode::MayUnmap)
            .await
            .unwrap_err();
        assert!(matches!(error.cause(), IoCause::ReadOnly), "{error:?}");
        device.flush().await.unwrap();
    });
}
