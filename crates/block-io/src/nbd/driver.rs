//! The two tasks that serve a connection on a worker: one sends what is in the queue, as much as possible with one system
//! call; one takes the answers. Sockets do not block, and no memory of a request is ever in the kernel's hands: the worker's
//! engine is asked only to say when a socket is ready.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::Poll;

use crate::net::ready;
use crate::worker::{spawn_local, yield_now};

use super::NbdError;
use super::link::{Link, Phase, Socket, State};
use super::proto::{Command, REQUEST};
use super::receive::{Incoming, Received};

/// Requests that are sent with one system call.
const BATCH: usize = 32;
/// Pieces of memory that are sent with one system call.
const MOST_PIECES: usize = 256;
/// Times that a socket is served before other tasks of the worker are.
const TURNS: u32 = 16;

/// Has this worker serve the connection if there is one and nobody does; `false` if this thread is not a worker.
pub(super) fn ensure(link: &Arc<Link>, state: &mut State) -> bool {
    let Phase::Up(socket) = &state.phase else {
        return true;
    };
    if state.driven {
        return true;
    }
    let generation = state.generation;
    let (reader, writer) = (Arc::clone(socket), Arc::clone(socket));
    let served = Served {
        link: Arc::clone(link),
        generation,
    };
    let sender = Arc::clone(link);
    let started = spawn_local(async move {
        let error = answers(&served.link, &reader, generation).await;
        let mut state = served.link.lock();
        served.link.lose(&mut state, generation, error);
        drop(state);
    })
    .is_ok()
        && spawn_local(async move {
            if let Err(error) = requests(&sender, &writer, generation).await {
                let mut state = sender.lock();
                sender.lose(&mut state, generation, error);
            }
        })
        .is_ok();
    state.driven = started;
    started
}

/// Exists while a worker serves the connection. When the worker stops, another one that has requests must take over; what
/// was half received went with this one.
struct Served {
    link: Arc<Link>,
    generation: u64,
}

impl Drop for Served {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        if state.generation == self.generation && state.driven {
            if state.has_unanswered() {
                self.link.lose(&mut state, self.generation, NbdError::Closed);
            } else {
                state.driven = false;
            }
        }
    }
}

/// Takes answers until the connection ends; returns why.
async fn answers(link: &Link, socket: &Socket, generation: u64) -> NbdError {
    let mut incoming = Incoming::new();
    let mut turns = 0;
    loop {
        let received = {
            let mut state = link.lock();
            if state.generation != generation {
                return NbdError::Closed;
            }
            incoming.receive(socket, &mut state)
        };
        match received {
            Ok(Received::Something) => {
                turns += 1;
                if turns == TURNS {
                    turns = 0;
                    yield_now().await;
                }
            }
            Ok(Received::NothingYet) => {
                turns = 0;
                if let Err(error) = ready(&socket.incoming, libc::POLLIN).await {
                    return error.into();
                }
            }
            Err(error) => return error,
        }
    }
}

enum Sent {
    /// The connection is an old one.
    Over,
    /// The socket takes no more.
    Full,
    Some,
}

/// Sends requests until the connection is an old one.
async fn requests(link: &Link, socket: &Socket, generation: u64) -> Result<(), NbdError> {
    let mut turns = 0;
    loop {
        let sent = poll_fn(|context| {
            let mut state = link.lock();
            if state.generation != generation {
                return Poll::Ready(Ok(Sent::Over));
            }
            if state.queue.is_empty() {
                state.writer = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(send(socket, &mut state))
        })
        .await?;
        match sent {
            Sent::Over => return Ok(()),
            Sent::Full => ready(&socket.outgoing, libc::POLLOUT).await?,
            Sent::Some => {
                turns += 1;
                if turns == TURNS {
                    turns = 0;
                    yield_now().await;
                }
            }
        }
    }
}

/// Sends as much of the queue as the socket takes at once.
fn send(socket: &Socket, state: &mut State) -> Result<Sent, NbdError> {
    let mut heads = [[0; REQUEST]; BATCH];
    let mut chosen = 0;
    for (head, index) in heads.iter_mut().zip(&state.queue) {
        if let Some(Some(entry)) = state.requests.get_mut(*index as usize) {
            *head = entry.head(*index).encode();
        }
        chosen += 1;
    }
    let mut pieces: Vec<libc::iovec> = Vec::with_capacity(2 * chosen);
    for (head, index) in heads.iter().zip(&state.queue) {
        let Some(Some(entry)) = state.requests.get(*index as usize) else {
            continue;
        };
        pieces.push(libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: REQUEST,
        });
        if entry.command == Command::Write {
            let data = entry.buffers.list().iter().filter(|piece| !piece.is_empty());
            pieces.extend(data.map(|piece| libc::iovec {
                iov_base: piece.address().cast(),
                iov_len: piece.len(),
            }));
        }
        if pieces.len() >= MOST_PIECES {
            break;
        }
    }
    let mut skip = state.sent;
    let first = pieces.iter().position(|piece| {
        let gone = piece.iov_len <= skip;
        skip -= if gone { piece.iov_len } else { 0 };
        !gone
    });
    let pieces = &mut pieces[first.unwrap_or(0)..];
    if let Some(piece) = pieces.first_mut() {
        // Within the piece: `skip` is less than its length.
        piece.iov_base = piece.iov_base.wrapping_byte_add(skip);
        piece.iov_len -= skip;
    }
    let pieces = &pieces[..pieces.len().min(MOST_PIECES)];
    match send_pieces(socket, pieces) {
        Ok(count) => {
            account(state, count);
            state.unproven = true;
            Ok(Sent::Some)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Sent::Some),
        Err(error) => Err(error.into()),
    }
}

fn send_pieces(socket: &Socket, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeroes are a valid `msghdr` without address and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pieces are heads of the caller's, and memory of requests whose futures live while the table is locked.
    let sent = unsafe { libc::sendmsg(socket.outgoing.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// The socket took `count` bytes: takes requests that are complete from the queue.
fn account(state: &mut State, count: usize) {
    state.sent += count;
    while let Some(index) = state.queue.front() {
        let length = match state.requests.get(*index as usize) {
            Some(Some(entry)) if entry.command == Command::Write => REQUEST + entry.length as usize,
            _ => REQUEST,
        };
        if state.sent < length {
            break;
        }
        state.sent -= length;
        let index = state.queue.pop_front();
        if let Some(Some(entry)) = index.and_then(|index| state.requests.get_mut(index as usize)) {
            entry.sent = true;
        }
    }
}
