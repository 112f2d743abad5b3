//! Descriptors that this process got from the one that started it.

use std::io;
use std::os::fd::RawFd;

/// The first descriptor after input, output and errors.
const FIRST: u32 = 3;

/// Sees to it that programs started from here (passt) inherit nothing but what is given to them on purpose: marks all open
/// descriptors from 3 on close-on-exec, except `keep`. To be called first of all, before other threads exist.
///
/// # Errors
/// The kernel refuses to mark one.
pub fn close_on_exec(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = FIRST;
    for kept in keep.into_iter().filter(|kept| *kept >= FIRST) {
        if kept > first {
            mark(first, kept - 1)?;
        }
        first = kept + 1;
    }
    mark(first, u32::MAX)
}

fn mark(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: only changes a flag of descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Before Linux 5.9, or 5.11 for the flag.
        Some(libc::ENOSYS | libc::EINVAL) => mark_one_by_one(first, last),
        _ => Err(error),
    }
}

fn mark_one_by_one(first: u32, last: u32) -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if (first..=last).contains(&number)
            && let Ok(fd) = RawFd::try_from(number)
        {
            // SAFETY: only changes a flag. Fails for the descriptor of this very folder, which is closed by then or has the
            // flag already.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn inheritable() -> OwnedFd {
        // SAFETY: a plain call, and a new descriptor that nobody else has.
        unsafe { OwnedFd::from_raw_fd(libc::dup(0)) }
    }

    fn is_inherited(fd: &OwnedFd) -> bool {
        // SAFETY: only reads a flag.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) & libc::FD_CLOEXEC == 0 }
    }

    #[test]
    fn what_was_inherited_is_not_passed_on_unless_it_is_kept() {
        let (stray, kept, other) = (inheritable(), inheritable(), inheritable());
        assert!(is_inherited(&stray) && is_inherited(&kept) && is_inherited(&other));

        close_on_exec(&[kept.as_raw_fd(), 0]).unwrap();

        assert!(!is_inherited(&stray) && is_inherited(&kept) && !is_inherited(&other));
        mark_one_by_one(3, u32::MAX).unwrap();
        assert!(!is_inherited(&kept));
    }
}
