//! Regular files and block devices of the host.

mod extents;
mod identity;
pub(crate) mod lock;
mod open;
mod range_lock;
pub(crate) mod shm;
mod transfer;
mod zero;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::SeekFrom;

use crate::buffer::{IoBuf, list};
use crate::device::{Allocation, BlockDevice, Durability, Geometry, ZeroMode};
use crate::error::{IoCause, IoError, Operation};
use crate::worker::{Call, FileNumber, Request};

pub use open::{Cache, OpenError, OpenOptions};

use open::{Alignment, Kind, Opened};
use range_lock::RangeLock;

/// A regular file or a block device of the host, open as a disk.
///
/// Can be shared by workers. Requests are made by tasks of a [`crate::Worker`].
#[derive(Debug)]
pub struct HostDevice {
    /// Dropped before the file.
    number: FileNumber,
    file: File,
    name: Arc<str>,
    kind: Kind,
    alignment: Alignment,
    geometry: Geometry,
    /// See [`OpenOptions::memory_at_once`].
    at_once: bool,
    size: AtomicU64,
    discard: bool,
    /// See [`IoCause::EarlierFlushFailed`].
    flush_failed: AtomicBool,
    /// What the file system turned out to be unable to do.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    /// It was found to be shorter than it should be: what is missing may be anything, and whoever makes it longer again makes zeroes of it.
    truncated: AtomicBool,
    /// Writes in flight, where writes may be read-modify-writes.
    writes: RangeLock,
}

impl HostDevice {
    /// Opens the file or block device at `path`.
    ///
    /// # Errors
    /// It does not exist, is of another kind, may not be opened, or is in use.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let Opened {
            file,
            kind,
            alignment,
            geometry,
        } = open::open(path, options)?;
        Ok(Self {
            at_once: options.memory_at_once && kind == Kind::RegularFile && is_in_memory(&file),
            number: FileNumber::new(),
            file,
            name: path.to_string_lossy().into(),
            kind,
            alignment,
            size: AtomicU64::new(geometry.size),
            geometry,
            discard: options.discard,
            flush_failed: AtomicBool::new(false),
            truncated: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            writes: RangeLock::default(),
        })
    }

    /// The path that it was opened with, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What no other device of this host has, if it says: the World Wide Name or serial number of a disk, file system and
    /// inode of a file.
    pub fn identity(&self) -> Option<String> {
        identity::identity(&self.file.metadata().ok()?)
    }

    /// It will be written to here and there: has the host's file system give space to a regular file that has none yet in pieces of this many bytes,
    /// a multiple of its block, if it can. More of it is taken then than is written.
    pub fn prefer_extents(&self, bytes: u32) {
        if self.kind == Kind::RegularFile {
            extents::prefer(&self.file, bytes);
        }
    }

    /// Whether requests go past the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.alignment != Alignment::NONE
    }

    /// Looks at the size again, after the file or device was grown or shrunk; returns it in bytes.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn refresh_size(&self) -> io::Result<u64> {
        let size = open::size(&self.file, self.kind)?;
        let size = size - size % u64::from(self.geometry.logical_block);
        let before = self.size.swap(size, Ordering::AcqRel);
        if size < before {
            // What it was to be shorter for, it is.
            self.truncated.store(false, Ordering::Relaxed);
        }
        Ok(size)
    }

    /// Whether a flush failed, so that flushes and durable writes are refused.
    pub fn flush_has_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Relaxed)
    }

    /// Whether the file has become shorter than the device, but for its last sector.
    fn is_truncated(&self) -> bool {
        let size = self.size.load(Ordering::Relaxed);
        // The one way to ask that every sandbox allows. Nothing uses the file's position.
        let end = || rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0));
        self.kind == Kind::RegularFile && end().is_ok_and(|end| end + u64::from(open::SECTOR) <= size)
    }

    /// Whether it was found to be shorter than it should be, so that all requests are refused.
    pub fn is_known_to_be_truncated(&self) -> bool {
        self.truncated.load(Ordering::Relaxed)
    }

    /// Notes that it has become shorter: from now on nothing is done with it.
    fn note_truncation(&self) -> IoCause {
        self.truncated.store(true, Ordering::Relaxed);
        IoCause::Truncated
    }

    /// An administrator knows of the failed flush, or of the lost end, and wants to go on.
    pub fn acknowledge_flush_failure(&self) {
        self.flush_failed.store(false, Ordering::Relaxed);
        self.truncated.store(false, Ordering::Relaxed);
    }

    /// Whether zeroes of regular files are made by the file system, without writing them, as far as is known.
    pub fn zeroes_fast(&self) -> bool {
        self.kind == Kind::RegularFile && self.discard && !self.no_punch.load(Ordering::Relaxed)
    }

    /// The first byte of a regular file from `offset` on that has space, rounded down to the logical block; `None` if all that
    /// follows is a hole. Asks the file system, and so may block where it has to read its maps.
    ///
    /// # Errors
    /// A block device, or a file system that does not tell.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let block = u64::from(self.geometry.logical_block);
        match self.seek(SeekFrom::Data(offset)) {
            Ok(data) => Ok(Some((data - data % block).max(offset))),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The first byte of a regular file from `offset` on that has none, rounded up to the logical block; the end of the file
    /// has none.
    ///
    /// # Errors
    /// As for [`Self::next_data`].
    pub fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let block = u64::from(self.geometry.logical_block);
        let hole = self.seek(SeekFrom::Hole(offset))?;
        Ok(hole.next_multiple_of(block))
    }

    /// The position of the file is of no use to anybody else: all requests name theirs.
    fn seek(&self, to: SeekFrom) -> rustix::io::Result<u64> {
        if self.kind != Kind::RegularFile {
            return Err(rustix::io::Errno::OPNOTSUPP);
        }
        rustix::fs::seek(&self.file, to)
    }

    fn error(&self, operation: Operation, offset: u64, length: u64, cause: impl Into<IoCause>) -> IoError {
        IoError::new(&self.name, operation, offset, length, cause)
    }

    /// Refuses what no device does; cheap.
    #[inline]
    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let size = self.size.load(Ordering::Relaxed);
        let block = self.geometry.logical_block;
        let cause = if offset.checked_add(length).is_none_or(|end| end > size) {
            IoCause::OutOfRange { size }
        } else if (offset | length) & u64::from(block - 1) != 0 {
            IoCause::Misaligned { block }
        } else if self.geometry.read_only && operation != Operation::Read {
            IoCause::ReadOnly
        } else if self.truncated.load(Ordering::Relaxed) {
            IoCause::Truncated
        } else if operation != Operation::Read
            && offset + length + u64::from(open::SECTOR) > size
            && self.is_truncated()
        {
            // It would make the file as long as it was, and nobody would notice any more: zeroes would be read for what is lost.
            self.note_truncation()
        } else {
            return Ok(());
        };
        Err(self.error(operation, offset, length, cause))
    }

    fn request(&self, call: Call) -> Request {
        Request {
            file: self.file.as_raw_fd(),
            number: Some(self.number.get()),
            call,
        }
    }
}

/// Whether the file system of `file` has no medium.
fn is_in_memory(file: &File) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
    const KINDS: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    rustix::fs::fstatfs(file).is_ok_and(|found| {
        KINDS
            .iter()
            .any(|kind| i128::from(*kind) == i128::from(found.f_type))
    })
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        lock::unlock(&self.file);
    }
}

impl BlockDevice for HostDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::Acquire),
            ..self.geometry
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.check(Operation::Read, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        if self.suits(offset, buffers) {
            self.read_aligned(offset, buffers, length).await
        } else {
            Box::pin(self.read_bounced(offset, buffers, length)).await
        }
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.check(Operation::Write, offset, length)?;
        if durability == Durability::Durable && self.flush_has_failed() {
            return Err(self.error(Operation::Write, offset, length, IoCause::EarlierFlushFailed));
        }
        if length == 0 {
            return Ok(());
        }
        let suits = self.suits(offset, buffers);
        let sub_blocks = self.has_sub_blocks();
        let counted = match suits && sub_blocks {
            true => self.writes.begin_whole(),
            false => None,
        };
        if counted.is_some() || (suits && !sub_blocks) {
            self.write_aligned(offset, buffers, length, durability).await
        } else if sub_blocks {
            Box::pin(self.write_excluding(offset, buffers, length, durability)).await
        } else {
            Box::pin(self.write_bounced(offset, buffers, length, durability)).await
        }
    }

    async fn flush(&self) -> Result<(), IoError> {
        if self.geometry.read_only {
            return Ok(());
        }
        if self.flush_has_failed() {
            return Err(self.error(Operation::Flush, 0, 0, IoCause::EarlierFlushFailed));
        }
        let flushed = match self.call(Call::Sync).await {
            // A write behind the new end has made the file longer again, and what was cut off is zeroes: no read would notice.
            Ok(_) if self.is_truncated() => Err(self.note_truncation()),
            flushed => flushed,
        };
        match flushed {
            Ok(_) => Ok(()),
            Err(cause) => {
                self.flush_failed.store(true, Ordering::Relaxed);
                Err(self.error(Operation::Flush, 0, 0, cause))
            }
        }
    }

    /// Asks the file system, and so may block where it has to read its maps.
    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        let whole = (Allocation::Data, length);
        Ok(match self.next_data(offset) {
            Ok(Some(data)) if data > offset => (Allocation::Hole, length.min(data - offset)),
            Ok(None) => (Allocation::Hole, length),
            Ok(Some(_)) => match self.next_hole(offset) {
                Ok(hole) if hole > offset => (Allocation::Data, length.min(hole - offset)),
                _ => whole,
            },
            // A block device, or a file system that does not tell.
            Err(_) => whole,
        })
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.check(Operation::Discard, offset, length)?;
        if self.discard && length != 0 {
            self.discard_range(offset, length).await
        } else {
            Ok(())
        }
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.check(Operation::WriteZeroes, offset, length)?;
        if length == 0 {
            Ok(())
        } else {
            Box::pin(self.zero_range(offset, length, mode)).await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::worker::{Worker, WorkerOptions, spawn_local};

    fn device(size: u64) -> (tempfile::NamedTempFile, HostDevice) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let device = HostDevice::open(file.path(), &OpenOptions::default()).unwrap();
        (file, device)
    }

    async fn write(device: &HostDevice, offset: u64, length: usize, value: u8) {
        let mut buffer = AlignedBuffer::new(length);
        buffer.as_mut_slice().fill(value);
        // SAFETY: the buffer lives until the write has ended.
        let piece = [unsafe { buffer.io(0, length) }];
        device.write(offset, &piece, Durability::Volatile).await.unwrap();
    }

    async fn read(device: &HostDevice, offset: u64, length: usize) -> Vec<u8> {
        let buffer = AlignedBuffer::new(length);
        // SAFETY: the buffer lives until the read has ended.
        let piece = [unsafe { buffer.io(0, length) }];
        device.read(offset, &piece).await.unwrap();
        buffer.as_slice().to_vec()
    }

    #[test]
    fn concurrent_writes_of_sectors_in_one_large_block_all_arrive() {
        let (_file, mut device) = device(1 << 20);
        // As if the file system could only write whole 4 KiB blocks.
        device.alignment = Alignment {
            memory: 4096,
            offset: 4096,
        };
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        let bytes = worker.run(move || async move {
            let device = Rc::new(device);
            for round in 0..50_u8 {
                for sector in 0..16 {
                    let device = Rc::clone(&device);
                    let write = async move {
                        write(&device, sector * 512, 512, round + u8::try_from(sector).unwrap()).await
                    };
                    assert!(spawn_local(write).is_ok());
                }
            }
            // Reads wait for nobody: let the writes end.
            while Rc::strong_count(&device) > 1 {
                device.flush().await.unwrap();
            }
            write(&device, 1536, 1024, 200).await;
            device.write_zeroes(4096, 512, ZeroMode::MayUnmap).await.unwrap();
            read(&device, 0, 8192).await
        });
        let mut expected: Vec<u8> = (0..16).flat_map(|sector| [49 + sector; 512]).collect();
        expected[1536..2560].fill(200);
        expected[4096..4608].fill(0);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_failed_flush_fails_all_later_ones_until_it_is_acknowledged() {
        let (_file, device) = device(1 << 20);
        // A file system that loses a write is hard to come by: this is what `flush` does then.
        device.flush_failed.store(true, Ordering::Relaxed);
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            assert!(matches!(
                device.flush().await.unwrap_err().cause(),
                IoCause::EarlierFlushFailed
            ));
            let error = device.write(0, &[], Durability::Durable).await.unwrap_err();
            assert!(matches!(error.cause(), IoCause::EarlierFlushFailed));
            write(&device, 0, 512, 1).await;
            device.acknowledge_flush_failure();
            device.flush().await.unwrap();
        });
    }

    #[test]
    fn what_the_file_system_cannot_do_is_done_otherwise() {
        let (_file, device) = device(1 << 20);
        device.no_punch.store(true, Ordering::Relaxed);
        device.no_zero_range.store(true, Ordering::Relaxed);
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            write(&device, 0, 1 << 20, 5).await;
            device.discard(0, 4096).await.unwrap();
            device
                .write_zeroes(512, (1 << 20) - 1024, ZeroMode::MayUnmap)
                .await
                .unwrap();
            let bytes = read(&device, 0, 1 << 20).await;
            assert_eq!(bytes[..512], [5; 512]);
            assert!(bytes[512..(1 << 20) - 512].iter().all(|byte| *byte == 0));
            assert_eq!(bytes[(1 << 20) - 512..], [5; 512]);
        });
    }

    #[test]
    fn a_file_in_memory_is_read_and_written_at_once() {
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
            return eprintln!("skipped: there is no /dev/shm");
        };
        file.as_file().set_len(1 << 20).unwrap();
        let options = OpenOptions {
            memory_at_once: true,
            ..OpenOptions::default()
        };
        let device = HostDevice::open(file.path(), &options).unwrap();
        if !device.at_once {
            return eprintln!("skipped: /dev/shm is not in memory");
        }
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            write(&device, 4096, 8192, 9).await;
            assert_eq!(read(&device, 8192, 8192).await, [[9; 4096], [0; 4096]].concat());
            device.flush().await.unwrap();
            let buffer = AlignedBuffer::new(4096);
            // SAFETY: the buffer lives until the read has ended.
            let piece = [unsafe { buffer.io(0, 4096) }];
            assert!(device.read(1 << 20, &piece).await.is_err());
        });
    }

    #[test]
    fn a_request_is_small() {
        let (_file, device) = device(4096);
        assert!(
            size_of_val(&device.read(0, &[])) <= 256,
            "{}",
            size_of_val(&device.read(0, &[]))
        );
        let write = device.write(0, &[], Durability::Volatile);
        assert!(size_of_val(&write) <= 256, "{}", size_of_val(&write));
    }
}
