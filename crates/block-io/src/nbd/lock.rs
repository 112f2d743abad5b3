//! One user of an export at a time, as far as one host can see: the protocol has no locks.
//!
//! Each address has a file in a folder of this user in `/dev/shm`, and the file is locked as image files are. So two processes of one user do not use one address by mistake; other users, other
//! hosts and other names of the same server are not noticed. The files are empty and stay.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::host::{lock, shm};

use super::{NbdAddress, NbdError, NbdServer};

/// Given back when it is dropped.
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        lock::unlock(&self.0);
    }
}

/// Locks `address`, for readers or for one writer. None where there is no place for the lock, which is logged.
///
/// # Errors
/// Another process has it.
pub(super) fn take(address: &NbdAddress, shared: bool) -> Result<Option<Lock>, NbdError> {
    match try_take(Path::new(shm::PLACE), address, shared) {
        Ok(Ok(lock)) => Ok(Some(lock)),
        Ok(Err(holder)) => Err(NbdError::InUse { holder }),
        Err(error) => {
            tracing::warn!(device = %address, %error, "no lock can be had: nothing stops a second user of this export");
            Ok(None)
        }
    }
}

/// The lock, or who has it.
fn try_take(place: &Path, address: &NbdAddress, shared: bool) -> io::Result<Result<Lock, Option<String>>> {
    let name = format!("nbd-{:016x}", hash(&key(address)));
    let file = shm::open(&shm::folder(place)?.join(name), true)?;
    if lock::try_lock(&file, shared)? {
        return Ok(Ok(Lock(file)));
    }
    Ok(Err(lock::holder(&file.metadata()?)))
}

/// The same for all ways to write an address.
fn key(address: &NbdAddress) -> String {
    match &address.server {
        NbdServer::Tcp { host, port } => {
            format!("{}:{port}/{}", host.to_ascii_lowercase(), address.export)
        }
        NbdServer::Unix(path) => {
            // The socket's folder: the socket is made anew with each start of the server.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = std::fs::canonicalize(folder.unwrap_or(Path::new("."))).unwrap_or_default();
            let name = path.file_name().unwrap_or_default();
            format!("{}\n{}", folder.join(name).display(), address.export)
        }
    }
}

/// FNV-1a: the same in all versions of this program.
fn hash(text: &str) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325;
    text.bytes().fold(start, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_an_export_and_a_writer_has_it_alone() {
        let place = tempfile::tempdir().unwrap();
        let take = |text: &str, shared| try_take(place.path(), &text.parse().unwrap(), shared).unwrap();
        let one = take("nbd://host/a", true).ok().unwrap();
        let other = take("nbd://HOST:10809/a", true).ok().unwrap();
        let holder = take("nbd://host/a", false).err().unwrap();
        let pid = format!("(pid {})", std::process::id());
        assert!(holder.unwrap().ends_with(&pid));
        take("nbd://host/b", false).ok().unwrap();
        drop((one, other));
        let writer = take("nbd://host/a", false).ok().unwrap();
        assert!(take("nbd://host/a", true).is_err());
        drop(writer);
        take("nbd://host/a", true).ok().unwrap();
    }

    #[test]
    fn a_socket_has_one_lock_whatever_it_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let same = folder.path().join("same");
        std::os::unix::fs::symlink(folder.path(), &same).unwrap();
        let key = |folder: &Path, export| {
            key(&NbdAddress {
                server: NbdServer::Unix(folder.join("socket")),
                export: String::from(export),
            })
        };
        assert_eq!(key(folder.path(), "a"), key(&same, "a"));
        assert_ne!(key(folder.path(), "a"), key(folder.path(), "b"));
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_used() {
        let place = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        std::os::unix::fs::symlink("/", place.path().join(format!("smsvmm-{user}"))).unwrap();
        assert!(try_take(place.path(), &"nbd://host/a".parse().unwrap(), false).is_err());
    }
}
