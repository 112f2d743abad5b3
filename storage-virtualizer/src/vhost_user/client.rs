//! The conversation with a server, as a front-end has it: questions with answers, and orders that are confirmed if the server
//! can confirm them. Waits at most as long as the socket's time-out says.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::SendFlags;

use super::message::{Body, Header, MessageError, protocol_feature, request};
use super::socket::{Received, SocketError, receive, send};

/// The server cannot be talked to any more, or does not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection ended.
    #[error("it closed the connection instead of answering {}", request::name(*.request))]
    Closed {
        /// What was asked or told.
        request: u32,
    },
    /// It says nothing.
    #[error("it does not answer {}", request::name(*.request))]
    Silent {
        /// What was asked or told.
        request: u32,
    },
    /// The connection does not work.
    #[error("{} cannot be sent or answered", request::name(*.request))]
    Socket {
        /// What was asked or told.
        request: u32,
        /// Why.
        source: SocketError,
    },
    /// It answers something else.
    #[error("it answered {} by message {found}", request::name(*.request))]
    Unexpected {
        /// What was asked or told.
        request: u32,
        /// Number of the message that came.
        found: u32,
    },
    /// It does not obey.
    #[error("it refused {}", request::name(*.request))]
    Refused {
        /// What it was told.
        request: u32,
    },
    /// The answer has not the shape of its kind.
    #[error(transparent)]
    Answer(#[from] MessageError),
}

impl ClientError {
    /// What a socket's error means when `request` was sent.
    pub fn from_socket(request: u32, error: SocketError) -> Self {
        match error {
            SocketError::Closed => Self::Closed { request },
            SocketError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => Self::Silent { request },
            SocketError::Io(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Self::Closed { request }
            }
            source => Self::Socket { request, source },
        }
    }
}

/// A server that is connected.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    protocol: u64,
}

impl Client {
    /// The server at the other end of `socket`, which has time-outs.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, protocol: 0 }
    }

    /// The connection, to notice that the server has gone.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether all bits of `feature`, one of [`protocol_feature`], were agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol & feature == feature
    }

    /// Agrees on those of `wanted` that the server has.
    ///
    /// # Errors
    /// As everywhere here: the server cannot be talked to, or refuses.
    pub fn agree(&mut self, wanted: u64) -> Result<(), ClientError> {
        let offered = self.ask_number(request::GET_PROTOCOL_FEATURES)?;
        // Whether this message itself is confirmed is nowhere written.
        self.protocol = 0;
        self.tell(
            request::SET_PROTOCOL_FEATURES,
            &(offered & wanted).to_le_bytes(),
            &[],
        )?;
        self.protocol = offered & wanted;
        Ok(())
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// The server cannot be talked to.
    pub fn ask_number(&self, request: u32) -> Result<u64, ClientError> {
        let answer = self.ask(request, &[])?;
        Ok(Body::new(request, &answer.body).number()?)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The server cannot be talked to.
    pub fn ask(&self, request: u32, body: &[u8]) -> Result<Received, ClientError> {
        self.send(request, body, &[], false)?;
        self.answer(request)
    }

    /// Tells, and waits until the server has obeyed, if it can say so.
    ///
    /// # Errors
    /// The server cannot be talked to, or refuses.
    pub fn tell(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let confirmed = self.has(protocol_feature::REPLY_ACK);
        self.send(request, body, fds, confirmed)?;
        if confirmed {
            let answer = self.answer(request)?;
            if Body::new(request, &answer.body).number()? != 0 {
                return Err(ClientError::Refused { request });
            }
        }
        Ok(())
    }

    /// Sends a message, and leaves the answer for [`Self::answer`].
    ///
    /// # Errors
    /// The server cannot be talked to.
    pub fn send(
        &self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        needs_reply: bool,
    ) -> Result<(), ClientError> {
        let header = Header {
            request,
            is_reply: false,
            needs_reply,
            size: 0,
        };
        send(&self.socket, header, body, fds, SendFlags::empty())
            .map_err(|error| ClientError::from_socket(request, error.into()))
    }

    /// Waits for the answer to `request`.
    ///
    /// # Errors
    /// The server cannot be talked to.
    pub fn answer(&self, request: u32) -> Result<Received, ClientError> {
        let answer = receive(&self.socket).map_err(|error| ClientError::from_socket(request, error))?;
        if answer.header.request != request || !answer.header.is_reply {
            let found = answer.header.request;
            return Err(ClientError::Unexpected { request, found });
        }
        Ok(answer)
    }
}
