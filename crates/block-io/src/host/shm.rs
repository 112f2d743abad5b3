//! A folder of this user in memory of the host: for what processes of one user tell each other, and what must not outlive the host's uptime.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Which every Linux has (shm_overview(7)), and no service hides from others.
pub(crate) const PLACE: &str = "/dev/shm";

/// The folder in `place`, which belongs to this user alone; it is made if there is none.
///
/// # Errors
/// It belongs to somebody else, or cannot be made.
pub(crate) fn folder(place: &Path) -> io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let folder = place.join(format!("smsvmm-{user}"));
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let metadata = std::fs::symlink_metadata(&folder)?;
    if !metadata.is_dir() || metadata.uid() != user {
        let problem = format!("{} belongs to somebody else", folder.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(folder)
}

/// Opens a file for reading and writing; if there is none, it is made if `make` says so.
pub(crate) fn open(path: &Path, make: bool) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(make)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
}
