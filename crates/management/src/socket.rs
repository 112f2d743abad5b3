//! The Unix socket: private from its first moment, never stolen from a living owner, gone with its owner.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use block_io::{SocketFile, UnixSocketError, listen_unix};

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

impl Listening {
    /// Listens on `path`; a file that a dead process left is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let (listener, file) = listen_unix(path).map_err(|error| match error {
            UnixSocketError::Busy => SocketError::Busy(path.to_owned()),
            UnixSocketError::NotASocket => SocketError::NotASocket(path.to_owned()),
            UnixSocketError::System { action, source } => SocketError::System {
                action,
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self { listener, file })
    }

    /// Makes a user the socket's owner, who may connect then.
    pub(crate) fn give_to(&self, user: u32) -> io::Result<()> {
        self.file.give_to(user)
    }

    /// Lets all users of the host connect; who they are is known then.
    pub(crate) fn let_all_connect(&self) -> io::Result<()> {
        self.file.let_all_connect()
    }

    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

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
