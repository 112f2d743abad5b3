//! One connection as its tasks share it: replies on their way, requests that are not answered yet, and how it ends.
//!
//! ```text
//!   reader ──admit──► Permit ──► request's task ──► Reply with the permit ──► queue ──► writer ──► sent: permit returned
//!     ▲                                                                                              │
//!     └──────────────────────────────── waits while there are too many ◄─────────────────────────────┘
//! ```
//!
//! A request counts, with its memory, until its reply was sent. So a client that does not read its replies is not served
//! further, and costs no more than it may.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use block_io::Stream;

use super::reply::Reply;
use super::transport::Transport;
use crate::queue::QueueStatistics;
use crate::sockets::input::Source;
use crate::sockets::slot::{keep, wake};

/// Replies that are sent with one system call.
const BATCH: usize = 64;

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    /// Requests that are not answered.
    pub(super) requests: u32,
    /// Bytes of their data.
    pub(super) memory: usize,
    /// How long a client may take to accept anything of a reply.
    pub(super) stall: Duration,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) transport: Transport,
    /// No other connection of the server ever has it.
    pub(super) number: u64,
    pub(super) peer: String,
    pub(super) since: SystemTime,
    /// The number of the export that the client has chosen.
    pub(super) export: Cell<Option<usize>>,
    /// What the client has asked for.
    pub(super) statistics: QueueStatistics,
    allowance: Allowance,
    queue: RefCell<VecDeque<Reply>>,
    /// Bytes of the queue's first reply that are sent.
    sent: Cell<usize>,
    requests: Cell<u32>,
    memory: Cell<usize>,
    /// The transport failed, or was ended: nothing is sent any more.
    broken: Cell<bool>,
    stopping: Cell<bool>,
    lingering: Cell<bool>,
    /// Nothing more will be put into the queue.
    finished: Cell<bool>,
    deadline: Cell<Option<Instant>>,
    /// Who waits for replies to send.
    writer: RefCell<Option<Waker>>,
    /// Who waits for fewer requests.
    room: RefCell<Option<Waker>>,
    /// Who waits for the client, and wants to know when this ends.
    alarm: RefCell<Option<Waker>>,
    /// Who looks at deadlines.
    janitor: Rc<RefCell<Option<Waker>>>,
}

/// The right to have a request in flight.
#[derive(Debug)]
pub(super) struct Permit {
    link: Rc<Link>,
    memory: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let link = &self.link;
        link.requests.set(link.requests.get() - 1);
        link.memory.set(link.memory.get() - self.memory);
        wake(&link.room);
    }
}

impl Source for Link {
    async fn readable(&self) -> io::Result<bool> {
        self.readable().await
    }

    fn try_read(&self, targets: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.transport.try_read(targets)
    }

    fn short_reads_are_last(&self) -> bool {
        self.transport.short_reads_are_last()
    }
}

impl Link {
    pub(super) fn new(
        stream: Stream,
        (number, peer): (u64, String),
        allowance: Allowance,
        janitor: Rc<RefCell<Option<Waker>>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            transport: Transport::new(stream),
            number,
            peer,
            since: SystemTime::now(),
            export: Cell::new(None),
            statistics: QueueStatistics::default(),
            allowance,
            queue: RefCell::default(),
            sent: Cell::new(0),
            requests: Cell::new(0),
            memory: Cell::new(0),
            broken: Cell::new(false),
            stopping: Cell::new(false),
            lingering: Cell::new(false),
            finished: Cell::new(false),
            deadline: Cell::new(None),
            writer: RefCell::default(),
            room: RefCell::default(),
            alarm: RefCell::default(),
            janitor,
        })
    }

    /// Whether the client has chosen this export.
    pub(super) fn uses(&self, export: usize) -> bool {
        self.export.get() == Some(export)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Whether a stop has nothing left to wait for here.
    fn has_stopped(&self) -> bool {
        self.stopping.get() && self.requests.get() == 0 && !self.lingering.get()
    }

    /// Everything is said; what is read from now on is only waited for until the client closes its side.
    pub(super) fn linger(&self, within: Duration) {
        self.lingering.set(true);
        self.set_deadline(Some(within));
    }

    /// Ends it when all that is in flight is answered.
    pub(super) fn stop(&self) {
        self.stopping.set(true);
        wake(&self.alarm);
        wake(&self.room);
    }

    /// Ends it now. Requests that the disk has are finished, and their replies thrown away.
    pub(super) fn kill(&self) {
        self.broken.set(true);
        self.transport.shut_down();
        self.discard_replies();
        wake(&self.alarm);
        wake(&self.room);
        wake(&self.writer);
    }

    /// Throws away what is not sent.
    pub(super) fn discard_replies(&self) {
        let replies = std::mem::take(&mut *self.queue.borrow_mut());
        self.sent.set(0);
        drop(replies);
    }

    /// Nothing more comes into the queue: the writer ends.
    pub(super) fn finish(&self) {
        self.finished.set(true);
        wake(&self.writer);
    }

    /// By when something must have happened; the janitor ends the connection else.
    pub(super) fn set_deadline(&self, within: Option<Duration>) {
        self.deadline.set(within.map(|within| Instant::now() + within));
        if within.is_some() {
            wake(&self.janitor);
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    /// Waits until there is room for a request with `memory` bytes of data. `None`: the connection is broken.
    pub(super) async fn admit(self: &Rc<Self>, memory: usize) -> Option<Permit> {
        poll_fn(|context| {
            if self.broken.get() {
                return Poll::Ready(None);
            }
            let used = self.memory.get();
            let fits = used == 0 || used + memory <= self.allowance.memory;
            if !fits || self.requests.get() >= self.allowance.requests {
                keep(&self.room, context.waker());
                return Poll::Pending;
            }
            self.requests.set(self.requests.get() + 1);
            self.memory.set(used + memory);
            Poll::Ready(Some(Permit {
                link: Rc::clone(self),
                memory,
            }))
        })
        .await
    }

    /// Waits until everything is answered.
    pub(super) async fn drained(&self) {
        poll_fn(|context| {
            if self.requests.get() == 0 {
                return Poll::Ready(());
            }
            keep(&self.room, context.waker());
            Poll::Pending
        })
        .await;
    }

    /// Waits until the client has sent something. `false`: do not read, this is the end.
    pub(super) async fn readable(&self) -> io::Result<bool> {
        let mut ready = pin!(self.transport.readable());
        poll_fn(|context| {
            if self.broken.get() || self.has_stopped() {
                return Poll::Ready(Ok(false));
            }
            if let Poll::Ready(outcome) = ready.as_mut().poll(context) {
                return Poll::Ready(outcome.map(|()| true));
            }
            keep(&self.alarm, context.waker());
            if self.stopping.get() {
                keep(&self.room, context.waker());
            }
            Poll::Pending
        })
        .await
    }

    /// Puts `reply` on its way.
    pub(super) fn reply(&self, reply: Reply) {
        if self.broken.get() {
            return;
        }
        self.queue.borrow_mut().push_back(reply);
        wake(&self.writer);
    }

    /// Sends `bytes`; for the handshake, before there is a writer.
    pub(super) async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.transport.try_write(&[IoSlice::new(bytes)]) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.transport.writable().await?,
                Err(error) => return Err(error),
            }
        }
        self.flush().await
    }

    async fn flush(&self) -> io::Result<()> {
        loop {
            match self.transport.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.transport.writable().await?,
                outcome => return outcome,
            }
        }
    }

    /// Sends replies until the connection is finished or broken.
    pub(super) async fn write(&self) {
        loop {
            let over = poll_fn(|context| {
                if self.broken.get() {
                    return Poll::Ready(true);
                }
                if !self.queue.borrow().is_empty() {
                    return Poll::Ready(false);
                }
                if self.finished.get() {
                    return Poll::Ready(true);
                }
                keep(&self.writer, context.waker());
                Poll::Pending
            })
            .await;
            if over {
                return;
            }
            if let Err(error) = self.write_some().await {
                tracing::debug!(peer = self.peer, %error, "a client does not take its replies");
                self.kill();
                return;
            }
        }
    }

    async fn write_some(&self) -> io::Result<()> {
        let mut outcome = self.try_write();
        if outcome.is_ok() && self.queue.borrow().is_empty() {
            outcome = self.transport.try_flush();
        }
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
        self.set_deadline(Some(self.allowance.stall));
        self.transport.writable().await?;
        self.set_deadline(None);
        // What TLS keeps is not seen in the queue.
        match self.transport.try_flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            Err(_) if self.queue.borrow().is_empty() => Box::pin(self.flush()).await,
            _ => Ok(()),
        }
    }

    fn try_write(&self) -> io::Result<()> {
        let queue = self.queue.borrow();
        let mut pieces = [IoSlice::new(&[]); 2 * BATCH];
        let mut skip = self.sent.get();
        let mut count = 0;
        for piece in queue.iter().take(BATCH).flat_map(Reply::pieces) {
            let here = skip.min(piece.len());
            skip -= here;
            if here < piece.len() {
                pieces[count] = IoSlice::new(&piece[here..]);
                count += 1;
            }
        }
        let written = self.transport.try_write(&pieces[..count])?;
        drop(queue);
        self.account(written);
        Ok(())
    }

    /// The transport took `count` bytes: replies that are complete are done with.
    fn account(&self, count: usize) {
        let mut sent = self.sent.get() + count;
        loop {
            let mut queue = self.queue.borrow_mut();
            let length = match queue.front() {
                Some(reply) => reply.pieces().iter().map(|piece| piece.len()).sum::<usize>(),
                None => break,
            };
            if sent < length {
                break;
            }
            sent -= length;
            let done = queue.pop_front();
            drop(queue);
            // Its permit wakes whoever waits for room.
            drop(done);
        }
        self.sent.set(sent);
    }
}
