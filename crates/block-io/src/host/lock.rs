//! Locks on open files, and who holds them.
//!
//! The lock is an "open file description" lock (fcntl(2)) over the whole file: it works on NFS, it meets the locks that
//! QEMU takes on its images, and the kernel drops it with the last descriptor, however the process ends.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Gives the lock back. Closing the file does so, too, but only when the kernel has forgotten the last request on it, a
/// moment after that has ended.
pub(crate) fn unlock(file: &File) {
    // What cannot be unlocked was never locked.
    let _ = set_lock(file, libc::F_UNLCK);
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes are a valid `flock`: from the start, to the end however far it moves, no process.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    // SAFETY: `lock` lives during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Locks all of `file`, for readers or for one writer; `false` if somebody holds a lock that excludes this one.
pub(crate) fn try_lock(file: &File, shared: bool) -> io::Result<bool> {
    let Err(error) = set_lock(file, if shared { libc::F_RDLCK } else { libc::F_WRLCK }) else {
        return Ok(true);
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        // A file system without locks (9p, some FUSE): nobody can hold one either.
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            tracing::warn!(%error, "the file system has no locks: nothing stops a second user of this file");
            Ok(true)
        }
        _ => Err(error),
    }
}

/// The process that holds a lock on the file of `metadata`, as `name (pid 123)`, if we are allowed to see it.
///
/// The kernel does not say who holds an open file description lock, so this looks which process has the file open with a
/// lock.
pub(crate) fn holder(metadata: &Metadata) -> Option<String> {
    find_process(|process, descriptor| {
        let open = fs::metadata(process.join("fd").join(descriptor)).ok()?;
        if (open.dev(), open.ino()) != (metadata.dev(), metadata.ino()) {
            return None;
        }
        let information = fs::read_to_string(process.join("fdinfo").join(descriptor)).ok()?;
        information.contains("lock:").then_some(())
    })
}

/// The process that has the block device at `path` open, or its mount point.
pub(super) fn block_device_holder(path: &Path) -> Option<String> {
    let number = fs::metadata(path).ok()?.rdev();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let wanted = format!("{}:{}", libc::major(number), libc::minor(number));
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.nth(2) == Some(&wanted)).then(|| fields.nth(1)).flatten()
    });
    if let Some(mount) = mount {
        return Some(format!("the file system mounted on {mount}"));
    }
    let above = fs::read_dir(format!("/sys/dev/block/{wanted}/holders")).ok();
    if let Some(above) = above.and_then(|mut entries| entries.next()?.ok()) {
        return Some(format!(
            "the block device {} that is built on it",
            above.file_name().to_string_lossy()
        ));
    }
    // The kernel does not say who opened it exclusively. Our own kind takes a lock, too; whoever writes is more likely than
    // one who only looks.
    let open_as = |matches: &dyn Fn(&str) -> bool| {
        find_process(|process, descriptor| {
            let open = fs::metadata(process.join("fd").join(descriptor)).ok()?;
            if open.rdev() != number || !open.file_type().is_block_device() {
                return None;
            }
            let information = fs::read_to_string(process.join("fdinfo").join(descriptor)).ok()?;
            (matches(&information) && !is_passing(&name_of(process))).then_some(())
        })
    };
    open_as(&|information| information.contains("lock:"))
        .or_else(|| open_as(&is_open_for_writing))
        .or_else(|| open_as(&|_| true))
}

/// Whether a process of this name is one that looks at a device whenever somebody has written to it, and soon lets it go: udev, which reads
/// it and has the kernel look for partitions, for which the kernel holds it alone for a moment.
fn is_passing(name: &str) -> bool {
    matches!(name, "(udev-worker)" | "systemd-udevd" | "udevd" | "blkid")
}

fn name_of(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    name.trim().to_owned()
}

/// Whether the flags in a descriptor's `fdinfo` are those of a writer.
fn is_open_for_writing(information: &str) -> bool {
    information
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// The first process with a descriptor for which `matches` holds.
fn find_process(matches: impl Fn(&Path, &str) -> Option<()>) -> Option<String> {
    processes().into_iter().find_map(|process| {
        fs::read_dir(process.join("fd"))
            .ok()?
            .flatten()
            .find_map(|descriptor| matches(&process, descriptor.file_name().to_str()?))?;
        let pid = process.file_name()?.to_str()?.to_owned();
        Some(format!("{} (pid {pid})", name_of(&process)))
    })
}

/// The folders of all processes in `/proc`; of this one alone, where a sandbox shows nothing else.
fn processes() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return vec![PathBuf::from(format!("/proc/{}", std::process::id()))];
    };
    let is_process = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_process)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_looks_at_every_device_is_no_holder() {
        assert!(is_passing("(udev-worker)"));
        assert!(!is_passing("qemu-system-x86"));
        assert!(!is_passing(&name_of(Path::new("/proc/self"))));
    }

    #[test]
    fn writers_are_told_from_those_who_look() {
        assert!(is_open_for_writing("pos:\t0\nflags:\t02140002\nmnt_id:\t30\n"));
        assert!(is_open_for_writing("flags:\t0100001\n"));
        assert!(!is_open_for_writing("pos:\t0\nflags:\t0100000\n"));
        assert!(!is_open_for_writing("pos:\t0\n"));
    }
}
