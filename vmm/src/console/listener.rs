//! A Unix socket on which clients of a console connect.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ConsoleError;

/// Clients that wait to be accepted.
const BACKLOG: i32 = 8;
/// When no client can be accepted (too many open files), nobody is for so long.
const PAUSE: Duration = Duration::from_secs(1);

/// The listening socket.
pub(super) struct Listener {
    socket: OwnedFd,
    polled: bool,
    paused_until: Option<Instant>,
}

/// The socket's file; removed when dropped, if it is still ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket that was left behind there, with nobody listening, is replaced.
    pub(super) fn bind(path: &Path) -> Result<(Self, SocketFile), ConsoleError> {
        let failed = |action| {
            move |source: Errno| ConsoleError::Path {
                action,
                path: path.to_owned(),
                source: source.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(|_| ConsoleError::PathTooLong(path.to_owned()))?;
        remove_stale(path)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed("make the socket"))?;
        // Before it has a name: the console is the guest's keyboard, and nobody else's business.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("restrict the socket"))?;
        rustix::net::bind(&socket, &address).map_err(failed("bind the socket"))?;
        let file = SocketFile::new(path).map_err(|source| ConsoleError::Path {
            action: "find the socket",
            path: path.to_owned(),
            source,
        })?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on the socket"))?;
        Ok((
            Self {
                socket,
                polled: false,
                paused_until: None,
            },
            file,
        ))
    }

    /// Takes all clients that wait.
    pub(super) fn accept(&mut self, name: &str) -> Vec<OwnedFd> {
        let mut clients = Vec::new();
        for _ in 0..BACKLOG {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(client) => clients.push(client),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    tracing::warn!(console = name, %errno, "cannot accept a client, will try again");
                    self.paused_until = Some(Instant::now() + PAUSE);
                    break;
                }
            }
        }
        clients
    }

    /// Polls the socket under the number `data`, unless it pauses. Returns when the pause ends.
    pub(super) fn settle(&mut self, data: u32, now: Instant, ops: &mut EventOps<'_>) -> Option<Instant> {
        self.paused_until = self.paused_until.filter(|until| *until > now);
        let wanted = self.paused_until.is_none();
        if wanted != self.polled {
            let events = Events::with_data(&self.socket.as_raw_fd(), data, EventSet::IN);
            let result = if wanted {
                ops.add(events)
            } else {
                ops.remove(events)
            };
            match result {
                Ok(()) => self.polled = wanted,
                Err(error) => tracing::error!(%error, "cannot poll a console's socket"),
            }
        }
        self.paused_until
    }
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(Self {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|now| (now.dev(), now.ino()) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "a console's socket stays behind");
        }
    }
}

/// Removes a socket at `path` on which nobody listens.
fn remove_stale(path: &Path) -> Result<(), ConsoleError> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ConsoleError::Exists {
            path: path.to_owned(),
            kind: "socket",
        });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| ConsoleError::Path {
                action: "remove the old socket",
                path: path.to_owned(),
                source,
            })
        }
        Err(source) => Err(ConsoleError::Path {
            action: "look at the old socket",
            path: path.to_owned(),
            source,
        }),
        Ok(_) => Err(ConsoleError::InUse(path.to_owned())),
    }
}
