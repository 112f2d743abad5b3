//! Sockets of servers whose tasks run on a worker.
//!
//! ```text
//!   Listener::accept ──► Stream ── try_read, try_write     one system call, never waits
//!                             └─── readable, writable      a task waits; the worker's engine watches the socket
//! ```
//!
//! Bytes are moved by system calls that do not block, straight from and to where the caller wants them; the engine is asked
//! only to say when a socket is ready. So no memory is ever in the kernel's hands, a stream may be dropped at any time, and
//! io_uring and epoll serve alike. Under load a system call moves many messages, so that there are few per message.

mod listener;
mod unix;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};

use crate::worker::{Call, Operation, Request};

pub use listener::{ListenAddress, ListenError, Listener};
pub use unix::{SocketFile, UnixSocketError, listen_unix, peer_groups};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream {
    incoming: OwnedFd,
    /// The same socket: an engine watches a descriptor for one thing at a time.
    outgoing: OwnedFd,
}

impl Stream {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let outgoing = socket.try_clone()?;
        Ok(Self {
            incoming: socket,
            outgoing,
        })
    }

    /// The address of this host at which the connection ends, if it is one over TCP.
    pub fn local_address(&self) -> Option<std::net::SocketAddr> {
        let address = rustix::net::getsockname(&self.incoming).ok()?;
        address.try_into().ok()
    }

    /// Fills `target` as far as there is something; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing now; else the stream is broken.
    pub fn try_read(&self, target: &mut [u8]) -> io::Result<usize> {
        retry(|| rustix::net::recv(&self.incoming, &mut *target, RecvFlags::DONTWAIT).map(|(count, _)| count))
    }

    /// The same with several pieces of memory, one after the other.
    ///
    /// # Errors
    /// As for [`Self::try_read`].
    pub fn try_read_vectored(&self, targets: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        retry(|| rustix::io::readv(&self.incoming, &mut *targets))
    }

    /// Sends as much of `pieces`, one after the other, as goes at once.
    ///
    /// # Errors
    /// `WouldBlock` if nothing goes now; else the stream is broken.
    pub fn try_write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        retry(|| rustix::net::sendmsg(&self.outgoing, pieces, &mut SendAncillaryBuffer::default(), flags))
    }

    /// Waits until there is something to read, or the end, or an error. One task at a time.
    ///
    /// # Errors
    /// The engine cannot watch it, or this thread is not a worker.
    pub async fn readable(&self) -> io::Result<()> {
        ready(&self.incoming, libc::POLLIN | libc::POLLRDHUP).await
    }

    /// Waits until something can be sent. One task at a time.
    ///
    /// # Errors
    /// As for [`Self::readable`].
    pub async fn writable(&self) -> io::Result<()> {
        ready(&self.outgoing, libc::POLLOUT).await
    }

    /// Ends the stream in both directions: whoever waits for it is woken.
    pub fn shut_down(&self) {
        // It fails where the peer was faster.
        let _ = rustix::net::shutdown(&self.outgoing, Shutdown::Both);
    }

    /// Tells the peer that nothing more comes.
    pub fn end_writing(&self) {
        let _ = rustix::net::shutdown(&self.outgoing, Shutdown::Write);
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            outcome => return outcome.map_err(io::Error::from),
        }
    }
}

/// Waits until the kernel reports one of the poll `events`, or that the connection is gone.
pub(crate) async fn ready(socket: &impl AsFd, events: libc::c_short) -> io::Result<()> {
    let request = Request {
        number: None,
        file: socket.as_fd().as_raw_fd(),
        call: Call::Poll {
            events: u32::from(events.unsigned_abs()),
        },
    };
    match Operation::new(request).await {
        Some(result) if result >= 0 => Ok(()),
        Some(result) => Err(io::Error::from_raw_os_error(-result)),
        None => Err(io::ErrorKind::NotConnected.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::worker::{EngineKind, Worker, WorkerOptions};

    fn workers() -> [Worker; 2] {
        [EngineKind::Uring, EngineKind::Threads].map(|engine| {
            let options = WorkerOptions {
                engine: Some(engine),
                ..Default::default()
            };
            Worker::start("test", options).unwrap()
        })
    }

    #[test]
    fn a_task_waits_for_bytes_and_for_room() {
        for worker in workers() {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let peer = std::thread::spawn(move || {
                theirs.write_all(b"go").unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
                let mut all = Vec::new();
                theirs.read_to_end(&mut all).unwrap();
                all.len()
            });
            worker.run(move || async move {
                let stream = Stream::new(ours.into()).unwrap();
                let (mut one, mut two) = ([0; 1], [0; 8]);
                stream.readable().await.unwrap();
                let mut targets = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
                assert_eq!(stream.try_read_vectored(&mut targets).unwrap(), 2);
                assert_eq!((one[0], two[0]), (b'g', b'o'));
                assert_eq!(
                    stream.try_read(&mut two).unwrap_err().kind(),
                    io::ErrorKind::WouldBlock
                );
                let block = [7; 10_000];
                let (mut left, mut waits) = (4 << 20, 0);
                while left > 0 {
                    let piece = &block[..left.min(block.len())];
                    match stream.try_write(&[IoSlice::new(&piece[..1]), IoSlice::new(&piece[1..])]) {
                        Ok(count) => left -= count,
                        Err(_) => {
                            waits += 1;
                            stream.writable().await.unwrap();
                        }
                    }
                }
                assert!(waits > 0);
                stream.end_writing();
            });
            assert_eq!(peer.join().unwrap(), 4 << 20);
        }
    }
}
