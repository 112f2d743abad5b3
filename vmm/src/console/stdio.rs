//! Standard input and output, and files, as consoles.
//!
//! Standard descriptors are shared with other processes (the shell, the rest of a pipeline), so they must not be made
//! non-blocking: that is a property of the open file description, and would make those processes fail. A terminal or pipe
//! is opened once more through `/proc/self/fd` instead, which gives a description of our own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use super::ConsoleError;
use super::peer::WriteMode;
use super::source::ReadMode;

/// A way to write to `fd` without waiting.
pub(super) fn writer(fd: BorrowedFd<'_>) -> Result<(OwnedFd, WriteMode), ConsoleError> {
    let mode = match kind(fd)? {
        FileType::RegularFile | FileType::BlockDevice => WriteMode::File,
        FileType::Socket => WriteMode::Socket,
        _ => match reopen(fd, OFlags::WRONLY) {
            Some(own) => return Ok((own, WriteMode::NonBlocking)),
            None => WriteMode::Shared,
        },
    };
    Ok((duplicate(fd)?, mode))
}

/// A way to read from `fd` when it is readable.
pub(super) fn reader(fd: BorrowedFd<'_>) -> Result<(OwnedFd, ReadMode), ConsoleError> {
    match kind(fd)? {
        FileType::Socket => Ok((duplicate(fd)?, ReadMode::Socket)),
        // The position in a file is shared on purpose: whoever reads on after us goes on there.
        FileType::RegularFile | FileType::BlockDevice => Ok((duplicate(fd)?, ReadMode::Read)),
        _ => match reopen(fd, OFlags::RDONLY) {
            Some(own) => Ok((own, ReadMode::Read)),
            None => Ok((duplicate(fd)?, ReadMode::Read)),
        },
    }
}

/// Opens `path` for appending.
pub(super) fn open_file(path: &Path) -> Result<(OwnedFd, WriteMode), ConsoleError> {
    let failed = |source: rustix::io::Errno| ConsoleError::Path {
        action: "open the file",
        path: path.to_owned(),
        source: source.into(),
    };
    // Non-blocking does nothing to a regular file, and keeps a pipe or a device from making us wait.
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let mode = match kind(file.as_fd())? {
        FileType::RegularFile | FileType::BlockDevice => WriteMode::File,
        _ => WriteMode::NonBlocking,
    };
    Ok((file, mode))
}

fn kind(fd: BorrowedFd<'_>) -> Result<FileType, ConsoleError> {
    let status = rustix::fs::fstat(fd).map_err(|errno| ConsoleError::System {
        action: "look at a standard descriptor",
        source: errno.into(),
    })?;
    Ok(FileType::from_raw_mode(status.st_mode))
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, ConsoleError> {
    fd.try_clone_to_owned().map_err(|source| ConsoleError::System {
        action: "duplicate a standard descriptor",
        source,
    })
}

/// A non-blocking description of our own for what `fd` refers to. Not possible for a terminal of another user (after `su`),
/// or without `/proc`.
fn reopen(fd: BorrowedFd<'_>, access: OFlags) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}
