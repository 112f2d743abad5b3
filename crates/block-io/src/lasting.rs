//! Memory that outlives the process, and is gone when the host has lost its own.
//!
//! What a process answers to somebody who goes on without it has to be found by its successor, but not after a power cut: nobody is there
//! any more then to whom it was answered. A file in a file system in memory (tmpfs) is just that. Writing to it costs a copy: no system call, no
//! flush. The kernel keeps what was stored however the process ends.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Memory that outlives the process, as [`LastingFile`]; the simulator has its own.
pub trait LastingMemory: fmt::Debug {
    /// Bytes, all zero at first.
    fn size(&self) -> usize;

    /// Fills `target` from `offset` on. What lies beyond the end reads as zero.
    fn read(&self, offset: usize, target: &mut [u8]);

    /// Stores `source` at `offset`. When this returns, it outlives the process; a process that dies meanwhile has stored any part of it. Eight bytes
    /// at a multiple of eight are stored as a whole. What lies beyond the end is not stored.
    fn write(&self, offset: usize, source: &[u8]);

    /// What is stored from `offset` on is not needed any more: it reads as it was, or as zero.
    fn forget(&self, offset: usize);
}

/// A file in a file system in memory, mapped.
pub struct LastingFile {
    file: File,
    path: PathBuf,
    start: NonNull<u8>,
    size: usize,
}

impl fmt::Debug for LastingFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("LastingFile")
            .field("path", &self.path)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// `f_type` of tmpfs (statfs(2)).
const TMPFS: i64 = 0x0102_1994;

impl LastingFile {
    /// The file at `path` with room for `size` bytes; if there is none, it is made if `make` says so, else there is none. It belongs to this user, and
    /// nobody else may read or write it.
    ///
    /// # Errors
    /// The folder is not in a file system in memory, the file is somebody else's or no file, or there is no room for it.
    pub fn open(path: &Path, size: usize, make: bool) -> io::Result<Option<Self>> {
        let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW | if make { libc::O_CREAT } else { 0 };
        let name = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: `name` ends with a zero and lives during the call.
        let opened = unsafe { libc::open(name.as_ptr(), flags, 0o600) };
        if opened < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::NotFound if !make => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(opened) };
        check(&file)?;
        let length = libc::off_t::try_from(size).map_err(io::Error::other)?;
        // Pages that are there already are never missing later, when storing to them could not fail but by a signal.
        // SAFETY: no memory is passed.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping, of pages that the file has.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Some(Self {
            file,
            path: path.to_owned(),
            start,
            size,
        }))
    }

    /// The part of `offset..offset + length` that is there.
    fn part(&self, offset: usize, length: usize) -> (NonNull<u8>, usize) {
        let offset = offset.min(self.size);
        // SAFETY: within the mapping, or at its end.
        (unsafe { self.start.add(offset) }, length.min(self.size - offset))
    }
}

/// Whether the file is ours alone, and in memory.
fn check(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    // SAFETY: always succeeds.
    let user = unsafe { libc::geteuid() };
    let problem = if !metadata.is_file() {
        "it is no file"
    } else if metadata.uid() != user {
        "it belongs to another user"
    } else if metadata.mode() & 0o077 != 0 {
        "others may read or write it"
    } else {
        // SAFETY: all zeroes are a valid `statfs`.
        let mut system: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: `system` is a valid place for the answer.
        if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut system) } != 0 {
            return Err(io::Error::last_os_error());
        }
        #[allow(clippy::useless_conversion, reason = "its type differs between systems")]
        if i64::from(system.f_type) == TMPFS {
            return Ok(());
        }
        "it is not in a file system in memory (tmpfs)"
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, problem))
}

impl LastingMemory for LastingFile {
    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, offset: usize, target: &mut [u8]) {
        let (from, length) = self.part(offset, target.len());
        let (there, beyond) = target.split_at_mut(length);
        // SAFETY: `length` bytes are within the mapping, which nothing else overlaps.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), there.as_mut_ptr(), length) };
        beyond.fill(0);
    }

    fn write(&self, offset: usize, source: &[u8]) {
        let (to, length) = self.part(offset, source.len());
        if let (8, true, Ok(word)) = (length, offset.is_multiple_of(8), source.try_into()) {
            // SAFETY: eight bytes within the mapping, whose start is that of a page.
            unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(word)) };
            return;
        }
        // SAFETY: `length` bytes are within the mapping, which nothing else overlaps.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), to.as_ptr(), length) };
    }

    fn forget(&self, offset: usize) {
        let (Ok(from), Ok(length)) = (
            libc::off_t::try_from(offset),
            libc::off_t::try_from(self.size.saturating_sub(offset)),
        ) else {
            return;
        };
        if length == 0 {
            return;
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed. If it fails, some memory stays in use, which harms nobody.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, from, length) };
    }
}

impl Drop for LastingFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and ends with us.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn path(name: &str) -> PathBuf {
        PathBuf::from(format!("/dev/shm/smsvmm-test-{}-{name}", std::process::id()))
    }

    fn read<const N: usize>(memory: &LastingFile, offset: usize) -> [u8; N] {
        let mut bytes = [0xee; N];
        memory.read(offset, &mut bytes);
        bytes
    }

    #[test]
    fn what_is_stored_is_there_when_it_is_opened_again() {
        let path = path("again");
        assert!(LastingFile::open(&path, 8192, false).unwrap().is_none());
        let memory = LastingFile::open(&path, 8192, true).unwrap().unwrap();
        assert_eq!(read(&memory, 100), [0; 8]);
        memory.write(99, b"odd");
        memory.write(4096, b"eight by");
        memory.write(8190, b"beyond");
        memory.write(9000, b"far");
        drop(memory);
        let memory = LastingFile::open(&path, 8192, false).unwrap().unwrap();
        assert_eq!((memory.size(), &read(&memory, 99)), (8192, b"odd"));
        assert_eq!(&read(&memory, 4096), b"eight by");
        assert_eq!(&read(&memory, 8190), b"be\0\0");
        assert_eq!(&read(&memory, 9000), b"\0");
        memory.forget(4096);
        assert_eq!((&read(&memory, 99), read(&memory, 4096)), (b"odd", [0; 8]));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_others_can_reach_is_not_used() {
        let path = path("others");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = LastingFile::open(&path, 4096, true).unwrap_err();
        assert!(error.to_string().contains("others may"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(LastingFile::open(&path, 4096, true).is_err());
        std::fs::remove_file(&path).unwrap();
        let disk = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let error = LastingFile::open(disk.path(), 4096, true).unwrap_err();
        assert!(error.to_string().contains("in memory"), "{error}");
    }
}
