//! Sockets that clients connect to: Unix sockets in the file system, and TCP.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::net::{SocketFlags, sockopt};

use super::unix::{SocketFile, UnixSocketError, listen_unix};
use super::{Stream, ready, retry};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// An address and a port of this host; with port 0 the kernel chooses one.
    Tcp(SocketAddr),
    /// A socket in the file system, for this user only (mode 0600).
    Unix(PathBuf),
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(formatter),
            Self::Unix(path) => path.display().fmt(formatter),
        }
    }
}

/// A server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("cannot listen on {0}: another process does, stop it or choose another socket")]
    Busy(ListenAddress),
    /// There is a file that is no socket.
    #[error("cannot listen on {}: it is a file and no socket, remove it or choose another name", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refuses.
    #[error("cannot listen on {address}")]
    System {
        /// The address.
        address: ListenAddress,
        /// Its answer.
        source: io::Error,
    },
}

/// A socket that accepts connections. A Unix socket's file goes with it, unless another one has its place.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: ListenAddress,
    _file: Option<SocketFile>,
}

impl Listener {
    /// Listens on `address`. A Unix socket whose server has ended is replaced.
    ///
    /// # Errors
    /// Somebody else listens there, or the system refuses.
    pub fn bind(address: &ListenAddress) -> Result<Self, ListenError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::Busy(address.clone()),
            _ => ListenError::System {
                address: address.clone(),
                source,
            },
        };
        match address {
            ListenAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let actual = listener.local_addr().map_err(failed)?;
                Ok(Self {
                    socket: listener.into(),
                    address: ListenAddress::Tcp(actual),
                    _file: None,
                })
            }
            ListenAddress::Unix(path) => {
                let (listener, file) = listen_unix(path).map_err(|error| match error {
                    UnixSocketError::Busy => ListenError::Busy(address.clone()),
                    UnixSocketError::NotASocket => ListenError::NotASocket(path.clone()),
                    UnixSocketError::System { source, .. } => failed(source),
                })?;
                Ok(Self {
                    socket: listener.into(),
                    address: address.clone(),
                    _file: Some(file),
                })
            }
        }
    }

    /// Where it listens: the port is the actual one.
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Waits for the next connection. Says who it is, for messages.
    ///
    /// # Errors
    /// That connection is gone already, or the host has no descriptor left: the next call may succeed, after a pause.
    pub async fn accept(&self) -> io::Result<(Stream, String)> {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let accepted = retry(|| rustix::net::acceptfrom_with(&self.socket, flags));
            match accepted {
                Ok((socket, peer)) => {
                    let tcp = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                    let peer = match tcp {
                        Some(peer) => {
                            sockopt::set_tcp_nodelay(&socket, true)?;
                            // A peer whose machine is gone is noticed some day.
                            sockopt::set_socket_keepalive(&socket, true)?;
                            peer.to_string()
                        }
                        None => match sockopt::socket_peercred(&socket) {
                            Ok(peer) => format!("process {}", peer.pid.as_raw_nonzero()),
                            Err(_) => "a local process".to_owned(),
                        },
                    };
                    return Ok((Stream::new(socket)?, peer));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready(&self.socket, libc::POLLIN).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_socket_is_private_is_not_taken_from_the_living_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let address = ListenAddress::Unix(path.clone());
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&address), Err(ListenError::Busy(_))));
        drop(listener);
        assert!(!path.exists());
        // A dead one is replaced, and what is no socket is left alone.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Listener::bind(&address).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&address),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_port_is_chosen_and_is_not_shared() {
        let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let ListenAddress::Tcp(actual) = listener.address() else {
            panic!("no TCP")
        };
        assert_ne!(actual.port(), 0);
        assert!(matches!(
            Listener::bind(listener.address()),
            Err(ListenError::Busy(_))
        ));
    }
}
