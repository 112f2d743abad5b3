//! Takes the server's answers apart. Believes nothing: every answer must be one to a request that was sent, every byte must
//! lie within its request, and what is kept in memory is one buffer of fixed size.

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{RecvFlags, recv};

use crate::buffer::list;

use super::NbdError;
use super::link::{Socket, State};
use super::proto::{Command, Kind, LONGEST_HEAD, LONGEST_TEXT, Reply, u32_at, u64_at};

/// Answers and small pieces of data pass through a buffer of this size.
const BUFFER: usize = 64 << 10;
/// Data of at least this many bytes goes to where it belongs at once.
const DIRECT: u32 = 8 << 10;
/// Most pieces of memory that are filled at once.
const MOST_PIECES: usize = 64;
/// The error number for a server that is about to end.
const SHUTTING_DOWN: u32 = 108;

/// What comes next.
#[derive(Debug, Clone, Copy)]
enum Expect {
    Head,
    /// `left` bytes for byte `at` of request `index`.
    Data {
        index: u32,
        at: u32,
        left: u32,
        last: bool,
    },
    /// The rest of a chunk, but for data; `length` bytes of it all together.
    Body {
        index: u32,
        kind: Kind,
        length: u32,
        last: bool,
    },
    /// Nothing of interest.
    Skip {
        index: u32,
        left: u32,
        last: bool,
    },
}

/// Whether there was something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    Something,
    NothingYet,
}

pub(super) struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    expect: Expect,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            expect: Expect::Head,
        }
    }

    /// Takes what the socket has, without waiting, and answers requests of `state`.
    pub(super) fn receive(&mut self, socket: &Socket, state: &mut State) -> Result<Received, NbdError> {
        let received = match self.expect {
            Expect::Data { index, at, left, .. } if self.start == self.end && left >= DIRECT => {
                self.receive_directly(socket, state, index, at, left)?
            }
            _ => self.fill(socket)?,
        };
        while received == Received::Something && self.advance(state)? {}
        Ok(received)
    }

    fn fill(&mut self, socket: &Socket) -> Result<Received, NbdError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        match recv(
            &socket.incoming,
            &mut self.buffer[self.end..],
            RecvFlags::DONTWAIT,
        ) {
            Ok((0, _)) => Err(NbdError::Closed),
            Ok((count, _)) => {
                self.end += count;
                Ok(Received::Something)
            }
            Err(error) => nothing_or(error.into()),
        }
    }

    fn receive_directly(
        &mut self,
        socket: &Socket,
        state: &State,
        index: u32,
        at: u32,
        left: u32,
    ) -> Result<Received, NbdError> {
        let entry = state.requests.get(index as usize).and_then(Option::as_ref);
        let Some(entry) = entry.filter(|entry| !entry.abandoned) else {
            return self.fill(socket);
        };
        let mut pieces = list::after(entry.buffers.list(), at.into());
        pieces.truncate(MOST_PIECES);
        let mut room = left as usize;
        for piece in &mut pieces {
            *piece = piece.slice(0, room);
            room -= piece.len();
        }
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: an `IoBuf` is an `iovec`; the memory is valid for writes, as the request's future lives while the table
        // is locked and its entry not abandoned.
        let read = unsafe { libc::readv(socket.incoming.as_raw_fd(), pieces.as_ptr().cast(), count) };
        match u32::try_from(read) {
            Ok(0) => Err(NbdError::Closed),
            Ok(read) => {
                if let Expect::Data { at, left, .. } = &mut self.expect {
                    *at += read;
                    *left -= read;
                }
                Ok(Received::Something)
            }
            Err(_) => nothing_or(io::Error::last_os_error()),
        }
    }

    /// Makes one step with what is in the buffer; `false` if more is needed.
    fn advance(&mut self, state: &mut State) -> Result<bool, NbdError> {
        let available = &self.buffer[self.start..self.end];
        match self.expect {
            Expect::Head => {
                let decoded = Reply::decode(available)
                    .map_err(|_| NbdError::Violation("an answer with a wrong magic number"))?;
                let Some((reply, length)) = decoded else {
                    debug_assert!(available.len() < LONGEST_HEAD);
                    return Ok(false);
                };
                self.start += length;
                self.head(state, reply)?;
            }
            Expect::Data {
                index, left: 0, last, ..
            }
            | Expect::Skip { index, left: 0, last } => {
                self.end_chunk(state, index, last)?;
            }
            _ if available.is_empty() => return Ok(false),
            Expect::Data {
                index,
                at,
                left,
                last,
            } => {
                let count = available.len().min(left as usize);
                if let Some(Some(entry)) = state.requests.get(index as usize) {
                    list::scatter(entry.buffers.list(), at.into(), &available[..count]);
                }
                self.start += count;
                let count = u32::try_from(count).unwrap_or(left);
                self.expect = Expect::Data {
                    index,
                    at: at + count,
                    left: left - count,
                    last,
                };
            }
            Expect::Skip { index, left, last } => {
                let count = available.len().min(left as usize);
                self.start += count;
                let count = u32::try_from(count).unwrap_or(left);
                self.expect = Expect::Skip {
                    index,
                    left: left - count,
                    last,
                };
            }
            Expect::Body {
                index,
                kind,
                length,
                last,
            } => {
                let fixed = if kind == Kind::Data { 8 } else { length };
                if available.len() < fixed as usize {
                    return Ok(false);
                }
                let body = available[..fixed as usize].to_vec();
                self.start += body.len();
                self.body(state, index, kind, &body, length, last)?;
            }
        }
        Ok(true)
    }

    fn head(&mut self, state: &mut State, reply: Reply) -> Result<(), NbdError> {
        let structured = state.export.structured;
        let unknown = NbdError::Violation("an answer to a request that was not made");
        match reply {
            Reply::Simple {
                error: SHUTTING_DOWN,
                cookie,
            } => {
                state.find(cookie).ok_or(unknown)?;
                Err(NbdError::ShuttingDown)
            }
            Reply::Simple { error, cookie } => {
                let (index, entry) = state.find(cookie).ok_or(unknown)?;
                let reads = entry.command == Command::Read;
                if reads && structured {
                    return Err(NbdError::Violation(
                        "a simple answer to a read in a structured session",
                    ));
                }
                if reads && error == 0 {
                    let left = entry.length;
                    entry.received.add(0, left);
                    self.expect = Expect::Data {
                        index,
                        at: 0,
                        left,
                        last: true,
                    };
                } else {
                    state.answer(index, error);
                }
                Ok(())
            }
            Reply::Chunk { .. } if !structured => {
                Err(NbdError::Violation("a structured answer that was not agreed on"))
            }
            Reply::Chunk {
                last,
                kind,
                cookie,
                length,
            } => {
                let (index, entry) = state.find(cookie).ok_or(unknown)?;
                let reads = entry.command == Command::Read;
                let sane = match kind {
                    Kind::Nothing => length == 0 && last,
                    Kind::Data => reads && length > 8 && length - 8 <= entry.length,
                    Kind::Hole => reads && length == 12,
                    Kind::Error => length >= 6 && length as usize <= LONGEST_TEXT + 64,
                    Kind::Unknown(_) => false,
                };
                if !sane {
                    return Err(NbdError::Violation("a chunk that has no place in the answer"));
                }
                self.expect = match kind {
                    Kind::Nothing => Expect::Skip { index, left: 0, last },
                    kind => Expect::Body {
                        index,
                        kind,
                        length,
                        last,
                    },
                };
                Ok(())
            }
        }
    }

    /// The part of a chunk before its data, or all of it.
    fn body(
        &mut self,
        state: &mut State,
        index: u32,
        kind: Kind,
        body: &[u8],
        length: u32,
        last: bool,
    ) -> Result<(), NbdError> {
        let Some(entry) = state.requests.get_mut(index as usize).and_then(Option::as_mut) else {
            return Err(NbdError::Violation("a chunk of a request that has ended"));
        };
        self.expect = Expect::Skip { index, left: 0, last };
        if kind == Kind::Error {
            let error = u32_at(body, 0).unwrap_or(0);
            if error == SHUTTING_DOWN {
                return Err(NbdError::ShuttingDown);
            }
            // An error without a number is one nevertheless.
            entry.failed.get_or_insert(if error == 0 { 5 } else { error });
            return Ok(());
        }
        let size = match kind {
            Kind::Data => length - 8,
            _ => u32_at(body, 8).unwrap_or(0),
        };
        let outside = NbdError::Violation("data outside of what was read, or twice");
        let start = u64_at(body, 0).and_then(|offset| offset.checked_sub(entry.offset));
        let Some(at) = start.and_then(|start| u32::try_from(start).ok()) else {
            return Err(outside);
        };
        match at.checked_add(size) {
            Some(end) if end <= entry.length && entry.received.add(at, end) => {}
            _ => return Err(outside),
        }
        if kind == Kind::Data {
            self.expect = Expect::Data {
                index,
                at,
                left: size,
                last,
            };
        } else {
            let mut left = size as usize;
            for piece in list::after(entry.buffers.list(), at.into()) {
                let piece = piece.slice(0, left);
                piece.fill(0);
                left -= piece.len();
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self, state: &mut State, index: u32, last: bool) -> Result<(), NbdError> {
        self.expect = Expect::Head;
        if !last {
            return Ok(());
        }
        let Some(Some(entry)) = state.requests.get(index as usize) else {
            return Err(NbdError::Violation("an answer to a request that has ended"));
        };
        let error = entry.failed.unwrap_or(0);
        if error == 0 && entry.command == Command::Read && !entry.received.cover(entry.length) {
            return Err(NbdError::Violation("an answer to a read that lacks data"));
        }
        state.answer(index, error);
        Ok(())
    }
}

fn nothing_or(error: io::Error) -> Result<Received, NbdError> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(Received::NothingYet),
        io::ErrorKind::Interrupted => Ok(Received::Something),
        _ => Err(error.into()),
    }
}
