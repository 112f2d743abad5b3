//! What a file system knows of a file beside its content.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use backup::RawText;
use backup::plan::{MAX_XATTRS, Time, Xattr};
use rustix::fs::{Mode, OFlags, Stat, XattrFlags, fstat, getxattr, listxattr, openat, removexattr, setxattr};
use rustix::io::Errno;

/// A name of a folder, held fast: whatever it is, symbolic links too. It can be asked, not read.
#[derive(Debug)]
pub(crate) struct Held(OwnedFd);

impl Held {
    /// Holds a name of a folder.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn open(folder: impl AsFd, name: &[u8]) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(openat(folder, name, flags, Mode::empty())?))
    }

    /// What is held.
    pub(crate) fn of(held: OwnedFd) -> Self {
        Self(held)
    }

    pub(crate) fn stat(&self) -> io::Result<Stat> {
        Ok(fstat(&self.0)?)
    }

    /// What a symbolic link says.
    pub(crate) fn link(&self) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.0, "", Vec::new())?.into_bytes())
    }

    /// The same file by a name of the kernel's that leads to just this one, also if it is a symbolic link.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// Its extended attributes, access control lists and security labels too, in order of their names.
    ///
    /// # Errors
    /// The system's, or there are more than a backup takes.
    pub(crate) fn xattrs(&self) -> io::Result<Vec<Xattr>> {
        let path = self.path();
        // As much as the kernel ever tells.
        let mut names = vec![0; 1 << 16];
        let length = match listxattr(&path, &mut names[..]) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        if length == 0 {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        let mut total = 0;
        let mut value = vec![0; 1 << 16];
        for name in names[..length]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            let length = match getxattr(&path, name, &mut value[..]) {
                Ok(length) => length,
                // It names what only the running system has.
                Err(Errno::NODATA | Errno::NOTSUP) => continue,
                Err(error) => return Err(error.into()),
            };
            total += name.len() + length;
            if total > MAX_XATTRS {
                return Err(io::Error::other(
                    "it has more extended attributes than a backup takes",
                ));
            }
            found.push(Xattr {
                name: RawText(name.to_vec()),
                value: RawText(value[..length].to_vec()),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Gives it an extended attribute.
    pub(crate) fn set_xattr(&self, xattr: &Xattr) -> io::Result<()> {
        Ok(setxattr(
            self.path(),
            xattr.name.bytes(),
            xattr.value.bytes(),
            XattrFlags::empty(),
        )?)
    }

    /// Takes the access control lists from it that it has from the folder in which it was made.
    pub(crate) fn drop_inherited_lists(&self) -> io::Result<()> {
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            match removexattr(self.path(), name) {
                Ok(()) | Err(Errno::NODATA | Errno::NOTSUP | Errno::ACCESS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives it permissions: not for a symbolic link, which has none.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::chmod(
            self.path(),
            Mode::from_raw_mode(mode & 0o7777),
        )?)
    }

    /// Gives it to somebody.
    pub(crate) fn set_owner(&self, uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        Ok(rustix::fs::chownat(
            &self.0,
            "",
            Some(uid),
            Some(gid),
            rustix::fs::AtFlags::EMPTY_PATH,
        )?)
    }
}

/// The time at which content was changed last.
pub(crate) fn modified(stat: &Stat) -> Time {
    Time {
        seconds: stat.st_mtime,
        nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0).min(999_999_999),
    }
}

/// Reads as much as there is, up to the buffer's size.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_is_held_and_not_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        let open = File::open(folder.path()).unwrap();
        let held = Held::open(&open, b"link").unwrap();
        assert_eq!(held.stat().unwrap().st_mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(held.link().unwrap(), b"/etc/passwd");
        held.xattrs().unwrap();
    }
}
