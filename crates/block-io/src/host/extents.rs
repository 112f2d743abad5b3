//! How much space at a time a file system gives to a sparse file.
//!
//! A pool writes first to places here and there. Each such write makes the host's file system find space, write that down, and do it in a thread of its own,
//! as it may block. XFS can be told to take more at a time than is written (xfs(5), "extent size hint"; QEMU does so with images that it makes):
//! most first writes find space then that is the file's already.

use std::fs::File;
use std::os::fd::AsRawFd;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_extent_size: u32,
    padding: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::c_ulong = 0x401c_5820;
/// The file has an extent size hint.
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// Has the file system give space to `file` in pieces of `bytes`, if it can do that, the file has no space yet, and nobody has said how much it is to be.
pub(super) fn prefer(file: &File, bytes: u32) {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel fills a structure of this layout, which lives.
    let known = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) } == 0;
    if !known || attributes.extents > 0 || attributes.flags & FS_XFLAG_EXTSIZE != 0 {
        return;
    }
    attributes.flags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: the kernel reads a structure of this layout, which lives.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) };
    // Others than XFS refuse it, and it is a wish only.
    if set == 0 {
        tracing::debug!(bytes, "space of the file comes in larger pieces");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_kernel() {
        assert_eq!(size_of::<Attributes>(), 0x1c);
    }

    #[test]
    fn a_file_system_that_cannot_do_it_is_left_alone() {
        for place in ["/dev/shm", env!("CARGO_MANIFEST_DIR")] {
            let file = tempfile::NamedTempFile::new_in(place).unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            prefer(file.as_file(), 128 << 10);
            let mut bytes = vec![0; 1 << 20];
            std::io::Read::read_exact(&mut file.reopen().unwrap(), &mut bytes).unwrap();
        }
    }
}
