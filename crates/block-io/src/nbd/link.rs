//! What the requests of a device, the tasks of its connection and its connector share: the table of requests, and the state
//! of the connection.
//!
//! ```text
//!            connector: connects, repeats unflushed writes            socket lost
//!   Lost ───────────────────────────────────────────────────► Up ─────────────────► Lost
//!    │ ▲                                                       ▲
//!    │ └──────────── a new outage ◄────────────────────────────┤
//!    └─► Down: the patience is used up, requests fail at once ─┘ connector: the server is back
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, Shutdown, send, shutdown};

use crate::buffer::IoBuf;
use crate::device::{Geometry, ZeroMode};
use crate::error::IoCause;
use crate::unflushed::Unflushed;

use super::handshake::Export;
use super::proto::{Command, FLAG_FUA, FLAG_NO_HOLE, Head, can, errno};
use super::ranges::Ranges;
use super::{NbdError, NbdOptions};

/// The part of a device that outlives the futures of its requests.
pub(super) struct Link {
    pub(super) name: Arc<str>,
    pub(super) address: super::NbdAddress,
    pub(super) options: NbdOptions,
    /// As it was at the first connection; the size is in `size`.
    pub(super) geometry: Geometry,
    pub(super) size: AtomicU64,
    /// The longest read or write that the server takes.
    pub(super) largest: u32,
    /// See [`IoCause::EarlierFlushFailed`].
    pub(super) flush_failed: AtomicBool,
    state: Mutex<State>,
    /// Rung when the connector has something to do.
    pub(super) bell: Condvar,
}

/// The two descriptors of a connection: one for each direction, as each can be waited for once at a time.
pub(super) struct Socket {
    pub(super) incoming: OwnedFd,
    pub(super) outgoing: OwnedFd,
}

pub(super) enum Phase {
    Lost,
    Up(Arc<Socket>),
    Down,
    Closed,
}

pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) export: Export,
    /// Counts connections, so that tasks of an old one know that they are.
    pub(super) generation: u64,
    /// Whether tasks serve the connection.
    pub(super) driven: bool,
    pub(super) requests: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// To be sent, the first of them perhaps in part.
    pub(super) queue: VecDeque<u32>,
    pub(super) sent: usize,
    serial: u32,
    pub(super) writer: Option<Waker>,
    pub(super) unflushed: Unflushed,
    /// When the connection was lost, if nothing was answered since.
    pub(super) outage: Option<Instant>,
    /// Something was sent on this connection, and nothing answered yet.
    pub(super) unproven: bool,
    pub(super) last_answer: Instant,
    /// The connector sleeps until the bell rings.
    pub(super) asleep: bool,
    pub(super) cause: Arc<NbdError>,
    /// A flush is under way because `unflushed` reached its limit.
    pub(super) trimming: bool,
    /// Writes are kept until they are flushed, and not only counted.
    remembers: bool,
    /// A request must fail, so that the owner, who remembers, learns that there is a new connection.
    pub(super) owes_failure: bool,
}

/// A request from its submission until its future has taken the result.
pub(super) struct Entry {
    pub(super) command: Command,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) buffers: Buffers,
    /// Upper half of the cookie; changes with every attempt.
    pub(super) serial: u32,
    /// Completely, on this connection.
    pub(super) sent: bool,
    /// Submitted, or put into the queue of a new connection.
    pub(super) since: Instant,
    /// What of a read has arrived.
    pub(super) received: Ranges,
    /// The error of an earlier chunk.
    pub(super) failed: Option<u32>,
    /// For a flush: what it covers.
    pub(super) mark: u64,
    pub(super) outcome: Option<Result<(), IoCause>>,
    pub(super) waker: Option<Waker>,
    /// Its future is gone; the entry waits for the answer.
    pub(super) abandoned: bool,
}

/// The caller's list. It lives as long as the future of the request, which takes its entry out of the table, or marks it
/// as abandoned, when it is dropped.
#[derive(Clone, Copy)]
pub(super) struct Buffers {
    list: *const IoBuf,
    count: usize,
}

// SAFETY: the memory may be accessed from every thread (`IoBuf` is raw for that), and the list is not changed while the
// request is in the table.
unsafe impl Send for Buffers {}

impl Buffers {
    pub(super) const NONE: Self = Self {
        list: std::ptr::null(),
        count: 0,
    };

    pub(super) fn new(list: &[IoBuf]) -> Self {
        Self {
            list: list.as_ptr(),
            count: list.len(),
        }
    }

    /// The list, which must not be used after the lock of the table is released.
    pub(super) fn list(&self) -> &[IoBuf] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: see the type: an entry with buffers in the table has a living future, which borrows the list.
        unsafe { std::slice::from_raw_parts(self.list, self.count) }
    }
}

impl Entry {
    pub(super) fn head(&self, index: u32) -> Head {
        Head {
            command: self.command,
            flags: self.flags,
            cookie: u64::from(self.serial) << 32 | u64::from(index),
            offset: self.offset,
            length: self.length,
        }
    }

    fn is_waiting(&self) -> bool {
        self.outcome.is_none() && !self.abandoned
    }
}

impl State {
    pub(super) fn new(export: Export, socket: Socket, remembers: bool) -> Self {
        Self {
            phase: Phase::Up(Arc::new(socket)),
            export,
            generation: 0,
            driven: false,
            requests: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            sent: 0,
            serial: 0,
            writer: None,
            unflushed: Unflushed::default(),
            outage: None,
            unproven: false,
            last_answer: Instant::now(),
            asleep: false,
            cause: Arc::new(NbdError::Closed),
            trimming: false,
            remembers,
            owes_failure: false,
        }
    }

    /// Puts a request into the table and the queue.
    pub(super) fn insert(&mut self, mut entry: Entry) -> u32 {
        entry.serial = self.next_serial();
        entry.mark = self.unflushed.mark();
        let index = match self.free.pop() {
            Some(index) => {
                self.requests[index as usize] = Some(entry);
                index
            }
            None => {
                // Each has a future in memory: they do not exceed 2^32.
                let index = u32::try_from(self.requests.len()).unwrap_or_else(|_| std::process::abort());
                self.requests.push(Some(entry));
                index
            }
        };
        self.queue.push_back(index);
        index
    }

    fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<Entry> {
        let entry = self.requests.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(entry)
    }

    /// The request that an answer with `cookie` is for.
    pub(super) fn find(&mut self, cookie: u64) -> Option<(u32, &mut Entry)> {
        let index = u32::try_from(cookie & u64::from(u32::MAX)).ok()?;
        let entry = self.requests.get_mut(index as usize)?.as_mut()?;
        let known = u64::from(entry.serial) == cookie >> 32 && entry.sent && entry.outcome.is_none();
        known.then_some((index, entry))
    }

    pub(super) fn has_unanswered(&self) -> bool {
        self.requests
            .iter()
            .flatten()
            .any(|entry| entry.outcome.is_none())
    }

    /// How long the oldest request has waited for its answer.
    pub(super) fn longest_wait(&self) -> Option<Duration> {
        let unanswered = self
            .requests
            .iter()
            .flatten()
            .filter(|entry| entry.outcome.is_none());
        unanswered.map(|entry| entry.since.elapsed()).max()
    }

    /// Forgets a request whose future is gone; `false` if the connection cannot go on without its data.
    pub(super) fn abandon(&mut self, index: u32) -> bool {
        let half_sent = self.sent > 0 && self.queue.front() == Some(&index);
        let Some(Some(entry)) = self.requests.get_mut(index as usize) else {
            return true;
        };
        if entry.outcome.is_some() {
            self.remove(index);
        } else if entry.sent {
            entry.abandoned = true;
            entry.buffers = Buffers::NONE;
            entry.waker = None;
        } else {
            self.queue.retain(|queued| *queued != index);
            self.remove(index);
            return !half_sent;
        }
        true
    }

    /// Serves on a new connection.
    pub(super) fn come_up(&mut self, socket: Socket, export: Export) {
        self.phase = Phase::Up(Arc::new(socket));
        self.export = export;
        self.driven = false;
        self.last_answer = Instant::now();
        for entry in self.requests.iter_mut().flatten() {
            entry.since = self.last_answer;
        }
        self.wake_all();
    }

    /// The server has answered request `index`: `error` is the protocol's number, 0 for success.
    pub(super) fn answer(&mut self, index: u32, error: u32) {
        self.last_answer = Instant::now();
        self.unproven = false;
        self.outage = None;
        let Some(entry) = self.requests.get_mut(index as usize).and_then(Option::as_mut) else {
            return;
        };
        if entry.abandoned {
            self.remove(index);
            return;
        }
        let caches = self.export.flags & can::FLUSH != 0;
        if error == 0 && caches {
            let list = entry.buffers.list();
            let durable = entry.flags & FLAG_FUA != 0;
            match entry.command {
                Command::Write | Command::WriteZeroes if !self.remembers => self.unflushed.counted(),
                Command::Write if durable => self.unflushed.wrote_durably(entry.offset, list),
                Command::Write => self.unflushed.wrote(entry.offset, list),
                Command::WriteZeroes => {
                    let mode = match entry.flags & FLAG_NO_HOLE {
                        0 => ZeroMode::MayUnmap,
                        _ => ZeroMode::KeepAllocated,
                    };
                    self.unflushed.zeroed(entry.offset, entry.length.into(), mode);
                }
                Command::Flush => self.unflushed.flushed(entry.mark),
                Command::Read | Command::Trim | Command::Disconnect => {}
            }
        }
        let outcome = match error {
            0 => Ok(()),
            error => Err(IoCause::Os(std::io::Error::from_raw_os_error(errno(error)))),
        };
        Self::finish(entry, outcome);
    }

    fn finish(entry: &mut Entry, outcome: Result<(), IoCause>) {
        entry.outcome = Some(outcome);
        if let Some(waker) = entry.waker.take() {
            waker.wake();
        }
    }

    /// The error of requests that cannot be made.
    pub(super) fn connection_lost(&self) -> IoCause {
        IoCause::ConnectionLost {
            source: Arc::clone(&self.cause) as Arc<_>,
        }
    }

    /// Ends all requests with the reason of the outage.
    pub(super) fn fail_all(&mut self) {
        self.fail(|_| true);
    }

    fn fail(&mut self, which: impl Fn(&Entry) -> bool) {
        for index in 0..self.requests.len() {
            let cause = self.connection_lost();
            if let Some(entry) = &mut self.requests[index]
                && entry.is_waiting()
                && which(entry)
            {
                Self::finish(entry, Err(cause));
                self.queue.retain(|queued| *queued as usize != index);
            }
        }
    }

    /// Prepares all requests that are not answered to be sent on the next connection.
    fn requeue(&mut self) {
        self.queue.clear();
        self.sent = 0;
        for index in 0..self.requests.len() {
            let serial = self.next_serial();
            let Some(entry) = &mut self.requests[index] else {
                continue;
            };
            let Ok(number) = u32::try_from(index) else {
                continue;
            };
            if entry.abandoned {
                self.remove(number);
            } else if entry.outcome.is_none() {
                entry.serial = serial;
                entry.sent = false;
                entry.received = Ranges::default();
                entry.failed = None;
                self.queue.push_back(number);
            }
        }
    }

    /// Wakes everyone that waits, so that one of them serves the connection.
    pub(super) fn wake_all(&mut self) {
        for entry in self.requests.iter_mut().flatten() {
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
        }
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }
}

impl Link {
    pub(super) fn new(
        address: super::NbdAddress,
        options: NbdOptions,
        geometry: Geometry,
        largest: u32,
        export: Export,
        socket: Socket,
    ) -> Self {
        let remembers = options.unflushed_limit > 0;
        Self {
            largest,
            name: address.to_string().into(),
            address,
            options,
            geometry,
            size: AtomicU64::new(geometry.size),
            flush_failed: AtomicBool::new(false),
            state: Mutex::new(State::new(export, socket, remembers)),
            bell: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of `generation` is of no use any more. Requests wait for the next one; after a violation of the
    /// protocol those that were sent fail at once: a server that talks rubbish once will do so again.
    pub(super) fn lose(&self, state: &mut State, generation: u64, cause: NbdError) {
        if state.generation != generation {
            return;
        }
        let Phase::Up(socket) = &state.phase else { return };
        // It may be closed already by the other side.
        let _ = shutdown(&socket.incoming, Shutdown::Both);
        tracing::warn!(device = %self.name, reason = %cause, "the connection is lost");
        let rubbish = matches!(cause, NbdError::Violation(_));
        state.cause = Arc::new(cause);
        state.phase = Phase::Lost;
        state.generation += 1;
        state.driven = false;
        if state.outage.is_none() || !state.unproven {
            state.outage = Some(Instant::now());
        }
        state.unproven = false;
        if !state.remembers {
            state.owes_failure |= state.unflushed.is_dirty() && !state.has_unanswered();
            state.unflushed.clear();
            state.fail_all();
        } else if rubbish {
            state.fail(|entry| entry.sent);
        }
        state.requeue();
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
        self.ring(state);
    }

    /// The device is not used any more: says goodbye to the server, if nothing else is being said.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        if let Phase::Up(socket) = &state.phase {
            if state.sent == 0 {
                let head = Head {
                    command: Command::Disconnect,
                    flags: 0,
                    cookie: 0,
                    offset: 0,
                    length: 0,
                };
                // A courtesy, which a full socket need not take.
                let _ = send(
                    &socket.outgoing,
                    &head.encode(),
                    SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
                );
            }
            let _ = shutdown(&socket.incoming, Shutdown::Both);
        }
        state.phase = Phase::Closed;
        state.generation += 1;
        state.wake_all();
        self.ring(&mut state);
    }

    /// Has the connector look at the state.
    pub(super) fn ring(&self, state: &mut State) {
        state.asleep = false;
        self.bell.notify_all();
    }

    /// How long the server may be silent while it has requests.
    pub(super) fn silence(&self) -> Duration {
        self.options.silence
    }
}
