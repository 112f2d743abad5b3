//! Bytes to and from a client, plain or through TLS; never waits but in `readable` and `writable`.
//!
//! TLS runs on the server's worker: rustls turns bytes into bytes and knows no sockets, so that a connection with TLS is the
//! same two tasks as one without ([decision 13](../../../docs/src/decisions/0013-nbd-tls-on-the-worker.md)).

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

use block_io::Stream;
use rustls::{ServerConfig, ServerConnection};

/// Plain bytes that rustls takes before they are sent.
const TLS_BUFFER: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct Transport {
    stream: Stream,
    tls: RefCell<Option<Box<ServerConnection>>>,
}

/// The socket as rustls wants it.
struct Socket<'a>(&'a Stream);

impl Read for Socket<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(target)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            tls: RefCell::new(None),
        }
    }

    /// From now on everything is encrypted; the client begins.
    pub(super) fn start_tls(&self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        *self.tls.borrow_mut() = Some(Box::new(tls));
        Ok(())
    }

    /// Whether a read that filled less than it could have has taken all that there was.
    pub(super) fn short_reads_are_last(&self) -> bool {
        self.tls.borrow().is_none()
    }

    /// As [`Stream::try_read_vectored`].
    pub(super) fn try_read(&self, targets: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match &mut *self.tls.borrow_mut() {
            None => match targets {
                [target] => self.stream.try_read(target),
                targets => self.stream.try_read_vectored(targets),
            },
            Some(tls) => {
                let mut count = 0;
                for target in targets {
                    let mut filled = 0;
                    while filled < target.len() {
                        match read_decrypted(&self.stream, tls, &mut target[filled..]) {
                            Ok(0) => return Ok(count),
                            Ok(read) => {
                                filled += read;
                                count += read;
                            }
                            Err(_) if count > 0 => return Ok(count),
                            Err(error) => return Err(error),
                        }
                    }
                }
                Ok(count)
            }
        }
    }

    /// As [`Stream::try_write`]. With TLS, some of it may be kept here: see [`Self::try_flush`].
    pub(super) fn try_write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut *self.tls.borrow_mut() {
            None => self.stream.try_write(pieces),
            Some(tls) => {
                write_encrypted(&self.stream, tls)?;
                let mut taken = 0;
                for piece in pieces {
                    let count = tls.writer().write(piece)?;
                    taken += count;
                    if count < piece.len() {
                        break;
                    }
                }
                match write_encrypted(&self.stream, tls) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                    _ => Ok(taken),
                }
            }
        }
    }

    /// Sends what is kept here.
    pub(super) fn try_flush(&self) -> io::Result<()> {
        match &mut *self.tls.borrow_mut() {
            None => Ok(()),
            Some(tls) => write_encrypted(&self.stream, tls),
        }
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.stream.readable().await
    }

    pub(super) async fn writable(&self) -> io::Result<()> {
        self.stream.writable().await
    }

    /// Says that nothing more comes.
    pub(super) fn end_writing(&self) {
        if let Some(tls) = &mut *self.tls.borrow_mut() {
            tls.send_close_notify();
            // The client is about to find out anyway.
            let _ = write_encrypted(&self.stream, tls);
        }
        self.stream.end_writing();
    }

    pub(super) fn shut_down(&self) {
        self.stream.shut_down();
    }
}

fn read_decrypted(stream: &Stream, tls: &mut ServerConnection, target: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(target) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
        let received = tls.read_tls(&mut Socket(stream))?;
        let processed = tls.process_new_packets();
        if tls.wants_write() {
            // An answer of the handshake, or an alert. It is short; should it not fit, it goes with the next reply.
            let _ = write_encrypted(stream, tls);
        }
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if received == 0 {
            return tls.reader().read(target);
        }
    }
}

fn write_encrypted(stream: &Stream, tls: &mut ServerConnection) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut Socket(stream))?;
    }
    Ok(())
}
