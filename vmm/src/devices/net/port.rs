//! One queue pair's way to the host's network.

use std::os::fd::BorrowedFd;

use super::stream::StreamPort;
use super::tap::TapPort;
use crate::devices::guest_buffers::GuestBuffers;

/// A way for packets, each preceded by a virtio header. Never blocks.
pub(super) enum Port {
    /// A queue of a tap interface.
    Tap(TapPort),
    /// A stream socket.
    Stream(StreamPort),
}

/// What a port had for the guest.
pub(super) enum Received {
    /// A packet of that many bytes, virtio header included.
    Packet(usize),
    /// Nothing until the port becomes readable.
    Nothing,
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// The port has it; it may be on the way only after [`Port::flush`].
    Taken,
    /// The host does not want it; it is lost, as packets may be.
    Dropped,
    /// To be sent again when the port is writable.
    Blocked,
}

/// The port is of no use any more, for this reason.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed(pub(super) String);

impl Port {
    /// What to wait for with epoll.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(port) => port.fd(),
            Self::Stream(port) => port.fd(),
        }
    }

    /// Takes the next packet, if there is one, into `buffers`, and what does not fit into `overflow`, which has to have room
    /// for [`super::protocol::MAX_PACKET`] bytes.
    pub(super) fn receive(
        &mut self,
        buffers: &mut GuestBuffers,
        overflow: &mut Vec<u8>,
    ) -> Result<Received, Closed> {
        match self {
            Self::Tap(port) => port.receive(buffers, overflow),
            Self::Stream(port) => port.receive(buffers, overflow),
        }
    }

    /// Sends one packet.
    pub(super) fn send(&mut self, packet: &GuestBuffers) -> Result<Sent, Closed> {
        match self {
            Self::Tap(port) => port.send(packet),
            Self::Stream(port) => port.send(packet),
        }
    }

    /// Sends what is gathered. Whether all of it went; if not, to be called again when the port is writable.
    pub(super) fn flush(&mut self) -> Result<bool, Closed> {
        match self {
            Self::Tap(_) => Ok(true),
            Self::Stream(port) => port.flush(),
        }
    }
}
