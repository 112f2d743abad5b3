//! Memory that outlives the process, and is gone when the host has lost its own.
//!
//! What a process answers to somebody who goes on without it has to be found by its successor, but not after a power cut: nobody is there
//! any more then to whom it was answered. A file in a file system in memory (tmpfs) is just that. Writing to it costs a copy: no system call, no
//! flush. The kernel keeps what was stored however the process ends.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::geteuid;

use crate::host::shm;

/// Memory that outlives the process, as [`LastingFile`]; the simulator has its own.
pub trait LastingMemory: fmt::Debug {
    /// Bytes, all zero at first.
    fn size(&self) -> usize;

    /// Fills `target` from `offset` on. What lies beyond the end reads as zero.
    fn read(&self, offset: usize, target: &mut [u8]);

    /// Stores `source` at `offset`. When this returns, it outlives the process; a process that dies meanwhile has stored any part of it. Eight bytes
    /// at a multiple of eight are stored as a whole. What lies beyond the end is not stored.
    fn write(&self, offset: usize, source: &[u8]);

    /// Nothing of it is needed any more: it reads as zero from now on, and takes no memory.
    fn clear(&self);
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
    /// The file of this name and user, with room for `size` bytes; if there is none, it is made if `make` says so, else there is none. Nobody else may
    /// read or write it.
    ///
    /// # Errors
    /// `/dev/shm` is not in memory, the file or its folder is somebody else's, or there is no room for it.
    pub fn open(name: &str, size: usize, make: bool) -> io::Result<Option<Self>> {
        Self::open_at(&shm::folder(Path::new(shm::PLACE))?.join(name), size, make)
    }

    fn open_at(path: &Path, size: usize, make: bool) -> io::Result<Option<Self>> {
        let file = match shm::open(path, make) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !make => return Ok(None),
            opened => opened?,
        };
        check(&file)?;
        // Pages that are there already are never missing later, when storing to them could not fail but by a signal.
        fallocate(&file, FallocateFlags::empty(), 0, size as u64)?;
        // SAFETY: a new mapping, of pages that the file has.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
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
    let problem = if !metadata.is_file() {
        "it is no file"
    } else if metadata.uid() != geteuid().as_raw() {
        "it belongs to another user"
    } else if metadata.mode() & 0o077 != 0 {
        "others may read or write it"
    } else if fstatfs(file)?.f_type != TMPFS {
        "it is not in a file system in memory (tmpfs)"
    } else {
        return Ok(());
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

    fn clear(&self) {
        // The empty file stays: a process that is confined, as a machine's is, may not remove it.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, hole, 0, self.size as u64).is_err() {
            let (start, length) = self.part(0, self.size);
            // SAFETY: `length` bytes are within the mapping, which nothing else overlaps.
            unsafe { std::ptr::write_bytes(start.as_ptr(), 0, length) };
        }
    }
}

impl Drop for LastingFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and ends with us.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.size) };
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
        assert!(LastingFile::open_at(&path, 8192, false).unwrap().is_none());
        let memory = LastingFile::open_at(&path, 8192, true).unwrap().unwrap();
        assert_eq!(read(&memory, 100), [0; 8]);
        memory.write(99, b"odd");
        memory.write(4096, b"eight by");
        memory.write(8190, b"beyond");
        memory.write(9000, b"far");
        drop(memory);
        let memory = LastingFile::open_at(&path, 8192, false).unwrap().unwrap();
        assert_eq!((memory.size(), &read(&memory, 99)), (8192, b"odd"));
        assert_eq!(&read(&memory, 4096), b"eight by");
        assert_eq!(&read(&memory, 8190), b"be\0\0");
        assert_eq!(&read(&memory, 9000), b"\0");
        memory.clear();
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0);
        assert_eq!((&read(&memory, 99), read(&memory, 4096)), (b"\0\0\0", [0; 8]));
        drop(memory);
        let memory = LastingFile::open_at(&path, 8192, true).unwrap().unwrap();
        assert_eq!(read(&memory, 99), [0; 3]);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_others_can_reach_is_not_used() {
        let path = path("others");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = LastingFile::open_at(&path, 4096, true).unwrap_err();
        assert!(error.to_string().contains("others may"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(LastingFile::open_at(&path, 4096, true).is_err());
        std::fs::remove_file(&path).unwrap();
        let disk = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let error = LastingFile::open_at(disk.path(), 4096, true).unwrap_err();
        assert!(error.to_string().contains("in memory"), "{error}");
    }
}
