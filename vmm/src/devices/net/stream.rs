//! Frames over a stream socket: each is preceded by its length as four bytes, most significant first.
//!
//! `passt` speaks this, and so does QEMU (`-netdev stream`). A stream has no frame borders, so both directions have a
//! buffer: small frames are gathered and sent with one system call, received ones are split out of what one call brought.
//! Whatever the socket took of a frame, the rest of it comes first when the socket is writable again, also for another
//! run of the guest: the buffers belong to the connection, not to an activation of the device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::port::{Closed, Received, Sent};
use super::protocol::{HEADER_SIZE, MAX_FRAME, MIN_FRAME};
use crate::devices::guest_buffers::GuestBuffers;

/// Bytes of a frame's length.
const PREFIX: usize = 4;
/// Room for the largest frame, or for a batch of smaller ones.
const BUFFER_SIZE: usize = (PREFIX + MAX_FRAME).next_multiple_of(4096);
/// Frames from this size on are sent straight from guest memory: then the copy costs more than the system call.
const DIRECT_SIZE: usize = 8192;

/// One end of a connection that carries frames.
pub(super) struct StreamPort {
    socket: UnixStream,
    incoming: Buffer,
    outgoing: Buffer,
}

/// Bytes on their way, of which the first `start` have gone already.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
        }
    }

    fn pending(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Takes the first `count` bytes away.
    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Moves what is pending to the front and makes sure that the buffer can grow to [`BUFFER_SIZE`] in place.
    fn make_room(&mut self) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes
            .reserve_exact(BUFFER_SIZE.saturating_sub(self.bytes.len()));
    }
}

impl StreamPort {
    /// A port on a connected stream socket, which is made non-blocking.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            incoming: Buffer::new(),
            outgoing: Buffer::new(),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next frame out of the connection; see [`super::port::Port::receive`].
    pub(super) fn receive(
        &mut self,
        buffers: &GuestBuffers,
        overflow: &mut Vec<u8>,
    ) -> Result<Received, Closed> {
        let Some(length) = self.next_frame()? else {
            return Ok(Received::Nothing);
        };
        let frame = &self.incoming.pending()[PREFIX..PREFIX + length];
        overflow.clear();
        // No offloads: the virtio header is all zeroes, and where even it does not fit the overflow takes its rest.
        let header = [0; HEADER_SIZE];
        let header_fits = buffers.copy_from(0, &header);
        overflow.extend_from_slice(&header[header_fits..]);
        let fits = buffers.copy_from(HEADER_SIZE, frame);
        overflow.extend_from_slice(&frame[fits..]);
        self.incoming.consume(PREFIX + length);
        Ok(Received::Packet(HEADER_SIZE + length))
    }

    /// The length of the frame at the front of `incoming`, complete; reads more as long as it is not.
    fn next_frame(&mut self) -> Result<Option<usize>, Closed> {
        loop {
            if let Some(prefix) = self.incoming.pending().first_chunk::<PREFIX>() {
                let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
                if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
                    return Err(Closed(format!("it announced a frame of {length} bytes")));
                }
                if self.incoming.pending().len() >= PREFIX + length {
                    return Ok(Some(length));
                }
            }
            self.incoming.make_room();
            match rustix::net::recv(
                &self.socket,
                spare_capacity(&mut self.incoming.bytes),
                RecvFlags::DONTWAIT,
            ) {
                Ok((0, _)) => return Err(Closed("it closed the connection".into())),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(Closed(error.to_string())),
            }
        }
    }

    /// Sends one packet, virtio header first; see [`super::port::Port::send`].
    pub(super) fn send(&mut self, packet: &GuestBuffers) -> Result<Sent, Closed> {
        let length = packet.len().saturating_sub(HEADER_SIZE);
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            return Ok(Sent::Dropped);
        }
        let Ok(prefix) = u32::try_from(length).map(u32::to_be_bytes) else {
            return Ok(Sent::Dropped);
        };
        if self.outgoing.bytes.len() + PREFIX + length > BUFFER_SIZE && !self.flush()? {
            // What the flush left may be short enough.
            self.outgoing.make_room();
            if self.outgoing.bytes.len() + PREFIX + length > BUFFER_SIZE {
                return Ok(Sent::Blocked);
            }
        }
        if length >= DIRECT_SIZE && self.flush()? {
            return self.send_direct(packet, prefix, length);
        }
        self.outgoing
            .bytes
            .reserve_exact(BUFFER_SIZE.saturating_sub(self.outgoing.bytes.len()));
        self.outgoing.bytes.extend_from_slice(&prefix);
        packet.append_to(HEADER_SIZE, &mut self.outgoing.bytes);
        Ok(Sent::Taken)
    }

    /// Sends a large frame without a copy; what the socket does not take is kept.
    fn send_direct(
        &mut self,
        packet: &GuestBuffers,
        prefix: [u8; PREFIX],
        length: usize,
    ) -> Result<Sent, Closed> {
        let taken = loop {
            match packet.send(self.socket.as_fd(), &prefix, HEADER_SIZE) {
                Ok(taken) => break taken,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Blocked),
                Err(error) => return Err(Closed(error.to_string())),
            }
        };
        if taken < PREFIX + length {
            self.outgoing.make_room();
            let prefix_left = prefix.get(taken..).unwrap_or_default();
            self.outgoing.bytes.extend_from_slice(prefix_left);
            packet.append_to(
                HEADER_SIZE + taken.saturating_sub(PREFIX),
                &mut self.outgoing.bytes,
            );
        }
        Ok(Sent::Taken)
    }

    /// Sends what is gathered. Whether all of it went.
    pub(super) fn flush(&mut self) -> Result<bool, Closed> {
        while !self.outgoing.pending().is_empty() {
            match rustix::net::send(
                &self.socket,
                self.outgoing.pending(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(count) => self.outgoing.consume(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(Closed(error.to_string())),
            }
        }
        Ok(true)
    }
}
