//! Sockets that clients connect to: Unix sockets in the file system, and TCP.

use std::fmt;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::{Stream, ready, retry};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

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
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
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
                    file: None,
                })
            }
            ListenAddress::Unix(path) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                // Two processes that find the same dead socket must not both replace it.
                let folder = fs::File::open(folder.unwrap_or(Path::new("."))).map_err(failed)?;
                rustix::fs::flock(&folder, FlockOperation::LockExclusive)
                    .map_err(|error| failed(error.into()))?;
                remove_dead(path, address)?;
                let socket = bind_unix(path).map_err(failed)?;
                let file = fs::symlink_metadata(path).map_err(failed)?;
                Ok(Self {
                    socket,
                    address: address.clone(),
                    file: Some((file.dev(), file.ino())),
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

impl Drop for Listener {
    fn drop(&mut self) {
        let (ListenAddress::Unix(path), Some(ours)) = (&self.address, self.file) else {
            return;
        };
        let there = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
        if there.is_ok_and(|there| there == ours)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file gets the mode of the unbound socket, less the umask.
    rustix::fs::fchmod(socket.as_fd(), Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Removes a socket on which nobody listens.
fn remove_dead(path: &Path, address: &ListenAddress) -> Result<(), ListenError> {
    let failed = |source| ListenError::System {
        address: address.clone(),
        source,
    };
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !file.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that has ended");
            fs::remove_file(path).map_err(failed)
        }
        // Also where its owner is too busy, or we may not connect: it is somebody's.
        _ => Err(ListenError::Busy(address.clone())),
    }
}

#[cfg(test)]
mod tests {
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
