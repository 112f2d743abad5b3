//! Opening a file or block device of the host: what it is, how it wants to be used, and that nobody else uses it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::buffer::AlignedBuffer;
use crate::device::Geometry;

use super::lock;

/// Whether the host's page cache stands between the device and its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Go to the device directly (O_DIRECT) where its file system can; else like `Buffered`.
    #[default]
    Direct,
    /// Use the page cache. A completed write is in the host's memory until the next flush.
    Buffered,
}

/// How to open a [`super::HostDevice`].
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Page cache or not.
    pub cache: Cache,
    /// Take a lock, shared if read-only and else exclusive, so that no two processes use a device by mistake.
    pub lock: bool,
    /// Pass discards on, which makes image files sparse. Otherwise they are ignored.
    pub discard: bool,
    /// Reads and writes of a file in memory (tmpfs) are done by the worker's own thread: io_uring would hand each to a thread of
    /// the kernel, which costs more than the copy. The thread's system call filter must allow preadv2 and pwritev2.
    pub memory_at_once: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: Cache::Direct,
            lock: true,
            discard: true,
            memory_at_once: false,
        }
    }
}

/// A device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path, or the caller may not open it.
    #[error("cannot open {path}")]
    Open {
        /// The path.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It is there and may not be written.
    #[error("cannot open {path} for writing; let this user write to it, or open it read-only")]
    NotWritable {
        /// The path.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("{path} is neither a regular file nor a block device")]
    WrongKind {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("{path} is in use{}: stop that first, or open it read-only there and here", describe(.holder))]
    InUse {
        /// The path.
        path: PathBuf,
        /// Who, where that can be found.
        holder: Option<String>,
    },
    /// Its size or alignment cannot be found out.
    #[error("cannot examine {path}")]
    Examine {
        /// The path.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

fn describe(holder: &Option<String>) -> String {
    holder
        .as_ref()
        .map(|holder| format!(" by {holder}"))
        .unwrap_or_default()
}

/// What kind of thing is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    RegularFile,
    BlockDevice,
}

/// What O_DIRECT demands of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses of memory.
    pub(super) memory: u32,
    /// Of offsets, and of the lengths of all pieces.
    pub(super) offset: u32,
}

impl Alignment {
    /// Through the page cache everything goes.
    pub(super) const NONE: Self = Self { memory: 1, offset: 1 };
}

/// An open, locked and examined file.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) kind: Kind,
    pub(super) alignment: Alignment,
    pub(super) geometry: Geometry,
}

/// How often, and how long apart, a device that is in use is tried: the kernel lets go of one a moment after its last user
/// closed it or was killed, when its requests have ended and its ring is gone (some 35 ms).
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// How often one is tried that no process has any more: on a busy machine, the kernel takes seconds to end the ring of a killed process.
const ORPHAN_TRIES: u32 = 3000;

/// The unit in which guests see image files, whatever the host's file system prefers: images hold partition tables that
/// count in it.
pub(super) const SECTOR: u32 = 512;

pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Opened, OpenError> {
    let open_error = |source| OpenError::Open {
        path: path.to_owned(),
        source,
    };
    let examine_error = |source| OpenError::Examine {
        path: path.to_owned(),
        source,
    };
    // Look before opening: opening a pipe or a tape drive would do something.
    let kind = kind_of(path, &std::fs::metadata(path).map_err(open_error)?)?;
    let direct = options.cache == Cache::Direct;
    let (mut file, mut direct) = match open_patiently(path, options, kind, direct) {
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            (open_file(path, options, kind, false), false)
        }
        file => (file, direct),
    };
    if let Err(error) = &file
        && kind == Kind::BlockDevice
        && error.raw_os_error() == Some(libc::EBUSY)
    {
        return Err(OpenError::InUse {
            path: path.to_owned(),
            holder: lock::block_device_holder(path),
        });
    }
    let mut opened = file.map_err(|source| match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !options.read_only => OpenError::NotWritable {
            path: path.to_owned(),
            source,
        },
        _ => open_error(source),
    })?;
    let metadata = opened.metadata().map_err(examine_error)?;
    if kind_of(path, &metadata)? != kind {
        return Err(OpenError::WrongKind {
            path: path.to_owned(),
        });
    }
    if options.lock && !lock_patiently(&opened, options.read_only, &metadata).map_err(examine_error)? {
        return Err(OpenError::InUse {
            path: path.to_owned(),
            holder: lock::holder(&metadata),
        });
    }
    let mut alignment = Alignment::NONE;
    if direct {
        match probe_alignment(&opened, kind).map_err(examine_error)? {
            Some(found) if metadata.len() % u64::from(found.offset) == 0 || kind == Kind::BlockDevice => {
                alignment = found
            }
            // The last block cannot be written without making the file longer.
            _ => {
                direct = false;
                file = open_file(path, options, kind, false);
                opened = file.map_err(open_error)?;
                if options.lock
                    && !lock_patiently(&opened, options.read_only, &metadata).map_err(examine_error)?
                {
                    return Err(OpenError::InUse {
                        path: path.to_owned(),
                        holder: lock::holder(&metadata),
                    });
                }
            }
        }
    }
    if !direct && options.cache == Cache::Direct {
        tracing::info!(path = %path.display(), "no O_DIRECT here: the host's page cache is used");
    }
    let geometry = geometry(&opened, kind, alignment, options).map_err(examine_error)?;
    Ok(Opened {
        file: opened,
        kind,
        alignment,
        geometry,
    })
}

fn kind_of(path: &Path, metadata: &std::fs::Metadata) -> Result<Kind, OpenError> {
    let file_type = metadata.file_type();
    if file_type.is_file() {
        Ok(Kind::RegularFile)
    } else if file_type.is_block_device() {
        Ok(Kind::BlockDevice)
    } else {
        Err(OpenError::WrongKind {
            path: path.to_owned(),
        })
    }
}

fn lock_patiently(file: &File, shared: bool, metadata: &std::fs::Metadata) -> io::Result<bool> {
    let mut patience = Patience::default();
    loop {
        let locked = lock::try_lock(file, shared)?;
        if locked || patience.is_over(|| lock::holder(metadata)) {
            return Ok(locked);
        }
    }
}

fn open_patiently(path: &Path, options: &OpenOptions, kind: Kind, direct: bool) -> io::Result<File> {
    let mut patience = Patience::default();
    loop {
        let opened = open_file(path, options, kind, direct);
        let busy = matches!(&opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY));
        if !busy || patience.is_over(|| lock::block_device_holder(path)) {
            return opened;
        }
    }
}

/// How long one that is in use is tried for: shortly if somebody has it, longer if nobody has any more, so that it is only the kernel
/// that has not let go of a dead process's files yet.
#[derive(Default)]
struct Patience {
    tries: u32,
}

impl Patience {
    /// Waits, unless it is over.
    fn is_over(&mut self, holder: impl Fn() -> Option<String>) -> bool {
        self.tries += 1;
        let enough = match self.tries {
            ..BUSY_TRIES => false,
            ORPHAN_TRIES.. => true,
            _ => self.tries.is_multiple_of(BUSY_TRIES) && holder().is_some(),
        };
        if !enough {
            std::thread::sleep(BUSY_PAUSE);
        }
        enough
    }
}

fn open_file(path: &Path, options: &OpenOptions, kind: Kind, direct: bool) -> io::Result<File> {
    let mut flags = libc::O_CLOEXEC;
    if direct {
        flags |= libc::O_DIRECT;
    }
    // The kernel lets one holder in, and none while a file system is mounted from it.
    if kind == Kind::BlockDevice && options.lock && !options.read_only {
        flags |= libc::O_EXCL;
    }
    let open = |flags| {
        File::options()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(path)
    };
    // Reads need not look whether the time of the last one is to be noted. Only the file's owner may ask for that.
    match open(flags | libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(flags),
        opened => opened,
    }
}

/// What O_DIRECT on `file` demands; `None` if it does not work after all.
fn probe_alignment(file: &File, kind: Kind) -> io::Result<Option<Alignment>> {
    if let Some(reported) = reported_alignment(file) {
        return Ok(reported);
    }
    // Before kernel 6.1: try.
    let blocks = match kind {
        Kind::BlockDevice => vec![block_device_number(file, BLKSSZGET)?],
        Kind::RegularFile => vec![512, 1024, 2048, 4096],
    };
    let buffer = AlignedBuffer::new(8192);
    for offset in blocks {
        for memory in [512, offset.max(512), 4096] {
            // SAFETY: it is accessed by the system call only.
            let piece = unsafe { buffer.io(memory as usize % 4096, offset as usize) };
            // SAFETY: the memory is valid for writes of its length.
            let read = unsafe { libc::pread(file.as_raw_fd(), piece.address().cast(), piece.len(), 0) };
            if read >= 0 {
                return Ok(Some(Alignment { memory, offset }));
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
    }
    Ok(None)
}

/// What the kernel says (since 6.1, where the file system knows): outer `None` if it does not say, inner `None` if there
/// is no O_DIRECT.
fn reported_alignment(file: &File) -> Option<Option<Alignment>> {
    // SAFETY: all zeroes are a valid `statx`.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path and a structure to be filled, both alive during the call.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut status,
        )
    };
    if result < 0 || status.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    if status.stx_dio_offset_align == 0 {
        return Some(None);
    }
    let usable = |align: u32| align.is_power_of_two() && align <= 4096;
    if !usable(status.stx_dio_offset_align) || !usable(status.stx_dio_mem_align) {
        return Some(None);
    }
    Some(Some(Alignment {
        memory: status.stx_dio_mem_align,
        offset: status.stx_dio_offset_align,
    }))
}

fn geometry(file: &File, kind: Kind, alignment: Alignment, options: &OpenOptions) -> io::Result<Geometry> {
    let size = size(file, kind)?;
    let metadata = file.metadata()?;
    Ok(match kind {
        Kind::RegularFile => {
            let preferred = u32::try_from(metadata.blksize()).unwrap_or(SECTOR);
            let preferred = if preferred.is_power_of_two() {
                preferred.clamp(SECTOR, 4096)
            } else {
                SECTOR
            };
            Geometry {
                size,
                logical_block: SECTOR,
                physical_block: preferred.max(alignment.offset),
                optimal_io: 0,
                discard_granularity: if options.discard && !options.read_only {
                    preferred
                } else {
                    0
                },
                read_only: options.read_only,
            }
        }
        Kind::BlockDevice => {
            let logical_block = block_device_number(file, BLKSSZGET)?.max(SECTOR);
            let physical_block = block_device_number(file, BLKPBSZGET)?.max(logical_block);
            Geometry {
                size: size - size % u64::from(logical_block),
                logical_block,
                physical_block,
                optimal_io: block_device_number(file, BLKIOOPT)?,
                discard_granularity: if options.discard && !options.read_only {
                    physical_block
                } else {
                    0
                },
                read_only: options.read_only,
            }
        }
    })
}

/// The size in bytes that `file` has now, a multiple of the sector: what is missing in a file's last sector reads as zero.
pub(super) fn size(file: &File, kind: Kind) -> io::Result<u64> {
    match kind {
        Kind::RegularFile => {
            let length = file.metadata()?.len();
            // File lengths end at i64::MAX, far from overflow.
            Ok(length.next_multiple_of(u64::from(SECTOR)))
        }
        Kind::BlockDevice => {
            let mut size: u64 = 0;
            // SAFETY: the kernel writes a u64.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(size)
            }
        }
    }
}

/// linux/fs.h.
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

fn block_device_number(file: &File, what: libc::c_ulong) -> io::Result<u32> {
    let mut number: u32 = 0;
    // SAFETY: the kernel writes an int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), what, &raw mut number) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(number)
    }
}
