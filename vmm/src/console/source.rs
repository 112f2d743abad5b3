//! Where keystrokes come from: a descriptor that the main loop reads when it is readable and the guest takes input.

use std::os::fd::OwnedFd;

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::escape::EscapeFilter;

/// How to read without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadMode {
    /// `read`, when the descriptor is readable or does not block.
    Read,
    /// A socket, perhaps shared with other processes: each call says that it must not wait.
    Socket,
}

/// How the main loop learns that there is something to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    /// Not at present.
    No,
    /// It polls for this.
    Polled(EventSet),
    /// The descriptor cannot be polled: it never blocks (a regular file, `/dev/null`).
    AlwaysReady,
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes.
    Some(usize),
    /// Nothing at present.
    Nothing,
    /// Nothing any more.
    End,
}

/// A source of input.
pub(super) struct Source {
    pub(super) id: u32,
    pub(super) fd: OwnedFd,
    pub(super) mode: ReadMode,
    pub(super) watch: Watch,
    /// For a terminal.
    pub(super) escape: Option<EscapeFilter>,
    /// It will give nothing more; only its end is of interest, if it is a socket.
    pub(super) ended: bool,
}

impl Source {
    pub(super) fn new(id: u32, fd: OwnedFd, mode: ReadMode) -> Self {
        Self {
            id,
            fd,
            mode,
            watch: Watch::No,
            escape: None,
            ended: false,
        }
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> Read {
        let result = match self.mode {
            ReadMode::Read => rustix::io::read(&self.fd, &mut *buffer),
            ReadMode::Socket => {
                rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)
            }
        };
        match result {
            Ok(0) => Read::End,
            Ok(count) => Read::Some(count.min(buffer.len())),
            Err(Errno::AGAIN | Errno::INTR) => Read::Nothing,
            // A pseudo-terminal without anybody at the other end, a connection that was reset.
            Err(_) => Read::End,
        }
    }
}
