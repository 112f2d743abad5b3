//! A Unix socket that carries messages with descriptors beside them; both sides of vhost-user use it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::message::{HEADER, Header, MAX_FDS, MessageError};

/// Talking over the socket failed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other side has gone.
    #[error("the other side closed the connection")]
    Closed,
    /// The operating system's answer.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// What came is not a message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message has.
    #[error("more than {MAX_FDS} descriptors came with a message")]
    TooManyDescriptors,
}

/// A message that came.
#[derive(Debug)]
pub struct Received {
    /// Its header.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// What came beside it, closed on exec.
    pub fds: Vec<OwnedFd>,
}

/// Waits for a message.
///
/// # Errors
/// The connection ended, or what came is not a message.
pub fn receive(socket: &UnixStream) -> Result<Received, SocketError> {
    let mut bytes = [0; HEADER];
    let mut fds = Vec::new();
    let mut filled = 0;
    while filled < HEADER {
        filled += receive_some(socket, &mut bytes[filled..], &mut fds)?;
    }
    let header = Header::decode(bytes)?;
    let mut body = vec![0; header.size as usize];
    let mut filled = 0;
    while filled < body.len() {
        filled += receive_some(socket, &mut body[filled..], &mut fds)?;
    }
    Ok(Received { header, body, fds })
}

fn receive_some(socket: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, SocketError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let answer = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            answer => break answer.map_err(io::Error::from)?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if fds.len() > MAX_FDS {
        return Err(SocketError::TooManyDescriptors);
    }
    if answer.bytes == 0 {
        return Err(SocketError::Closed);
    }
    Ok(answer.bytes)
}

/// Sends a message.
///
/// # Errors
/// The connection ended, or with `flags` that do not wait, would have to wait.
pub fn send(
    socket: impl AsFd,
    header: Header,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let header = Header {
        size: u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        ..header
    };
    let bytes = [&header.encode(), body].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut sent = 0;
    while sent < bytes.len() {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match sendmsg(
            &socket,
            &[IoSlice::new(&bytes[sent..])],
            &mut control,
            flags | SendFlags::NOSIGNAL,
        ) {
            Ok(count) => sent += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
