//! The Unix socket: private from its first moment, never stolen from a living owner, gone with its owner.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process serves it.
    #[error("somebody listens on {} already; end that machine first or set management.socket to another path", .0.display())]
    Busy(PathBuf),
    /// Something else is there.
    #[error("{} exists and is not a socket; remove it or set management.socket to another path", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot {action} the management socket {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

/// A listening socket and its file, which goes away with it.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) listener: UnixListener,
    file: SocketFile,
}

/// The name of a socket in the file system, as long as it is ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Listening {
    /// Listens on `path`; a file that a dead process left is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let system = |action| {
            move |source| SocketError::System {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        // Two processes that find the same dead socket must not both replace it.
        let folder = fs::File::open(folder).map_err(system("find the folder of"))?;
        rustix::fs::flock(&folder, FlockOperation::LockExclusive)
            .map_err(|error| system("lock the folder of")(error.into()))?;

        let listener = match listen(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_dead(path)?;
                listen(path)
            }
            other => other,
        };
        let listener = listener.map_err(system("create"))?;
        let metadata = fs::symlink_metadata(path).map_err(system("examine"))?;
        let file = SocketFile {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        Ok(Self { listener, file })
    }

    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the management socket cannot be removed");
        }
    }
}

/// A listening socket that nobody else can use, not even for a moment.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket, less the umask (unix(7) is silent, net/unix/af_unix.c is not).
    rustix::fs::fchmod(socket.as_fd(), Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 32)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket on which nobody listens.
fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let system = |action| {
        move |source| SocketError::System {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let metadata = fs::symlink_metadata(path).map_err(system("examine"))?;
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that has ended");
            fs::remove_file(path).map_err(system("replace"))
        }
        // Also where its owner is too busy to accept, or we may not connect: it is somebody's.
        _ => Err(SocketError::Busy(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_private_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listening = Listening::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(Listening::bind(&path), Err(SocketError::Busy(_))));
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listening = Listening::bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(listening);
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listening::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_another_took_over_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = Listening::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = Listening::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
