//! A Unix socket on which clients of a console connect.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

pub(super) use block_io::SocketFile;
use block_io::{UnixSocketError, listen_unix};
use event_manager::{EventOps, EventSet, Events};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, SocketFlags};

use super::ConsoleError;

/// Clients that are accepted in one go.
const AT_ONCE: usize = 8;
/// When no client can be accepted (too many open files), nobody is for so long.
const PAUSE: Duration = Duration::from_secs(1);

/// The listening socket.
pub(super) struct Listener {
    socket: UnixListener,
    polled: bool,
    paused_until: Option<Instant>,
}

impl Listener {
    /// Listens at `path`. A socket that was left behind there, with nobody listening, is replaced.
    pub(super) fn bind(path: &Path) -> Result<(Self, SocketFile), ConsoleError> {
        if SocketAddrUnix::new(path).is_err() {
            return Err(ConsoleError::PathTooLong(path.to_owned()));
        }
        // For this user only: the console is the guest's keyboard, and nobody else's business.
        let (socket, file) = listen_unix(path).map_err(|error| match error {
            UnixSocketError::Busy => ConsoleError::InUse(path.to_owned()),
            UnixSocketError::NotASocket => ConsoleError::Exists {
                path: path.to_owned(),
                kind: "socket",
            },
            UnixSocketError::System { action, source } => ConsoleError::Path {
                action,
                path: path.to_owned(),
                source,
            },
        })?;
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
        for _ in 0..AT_ONCE {
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
