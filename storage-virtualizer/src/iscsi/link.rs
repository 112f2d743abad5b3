//! One connection as its tasks share it: PDUs on their way out, memory that its commands may use, and how it ends.
//!
//! ```text
//!   reader ─► command's task ── memory: Permit ─► disk ─► PDUs, the last with the permit ─► queue ─► writer ─► sent: permit returned
//!     ▲                                                                                        │
//!     └─────────────────────── waits while the queue is long ◄─────────────────────────────────┘
//! ```
//!
//! Memory counts until its data were sent, so who does not take what it asked for gets nothing further and costs no more than
//! it may. Commands wait for memory in their own tasks and in their order; the reader never does, since what it would not read
//! may be the data for which a command keeps memory.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use block_io::Stream;

use super::pdu::Out;
use crate::sockets::input::Source;
use crate::sockets::slot::{keep, wake};

/// PDUs that are sent with one system call.
const BATCH: usize = 64;
/// Answers that may wait to be sent before nothing more is read.
const LONG_QUEUE: usize = 512;

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    /// Bytes of data of its commands; one command is always served.
    pub(super) memory: usize,
    /// How long an initiator may take to accept anything that waits for it.
    pub(super) stall: Duration,
}

/// Who waits for memory.
#[derive(Debug)]
struct Waiting {
    number: u64,
    waker: Waker,
}

#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    pub(super) peer: String,
    allowance: Allowance,
    queue: RefCell<VecDeque<Out>>,
    /// Bytes of the queue's first PDU that are sent.
    sent: Cell<usize>,
    memory: Cell<usize>,
    memory_queue: RefCell<VecDeque<Waiting>>,
    next_number: Cell<u64>,
    /// Nothing is sent or read any more.
    broken: Cell<bool>,
    /// What is in the queue is still sent; nothing more is read.
    ending: Cell<bool>,
    finished: Cell<bool>,
    deadline: Cell<Option<Instant>>,
    /// When something was received the last time.
    heard: Cell<Instant>,
    /// Something was read since the janitor has looked.
    fresh: Cell<bool>,
    writer: RefCell<Option<Waker>>,
    /// Who waits for a shorter queue.
    room: RefCell<Option<Waker>>,
    /// Who waits for the initiator, and wants to know when this ends.
    alarm: RefCell<Option<Waker>>,
}

/// Memory that a command may use.
#[derive(Debug)]
pub(super) struct Permit {
    link: Rc<Link>,
    memory: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let link = &self.link;
        link.memory.set(link.memory.get() - self.memory);
        link.wake_first();
    }
}

impl Source for Link {
    async fn readable(&self) -> io::Result<bool> {
        let mut ready = pin!(self.stream.readable());
        let outcome = poll_fn(|context| {
            if self.broken.get() || self.ending.get() {
                return Poll::Ready(Ok(false));
            }
            if let Poll::Ready(outcome) = ready.as_mut().poll(context) {
                return Poll::Ready(outcome.map(|()| true));
            }
            keep(&self.alarm, context.waker());
            Poll::Pending
        })
        .await;
        self.fresh.set(true);
        outcome
    }

    fn try_read(&self, targets: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if self.broken.get() || self.ending.get() {
            return Ok(0);
        }
        match targets {
            [target] => self.stream.try_read(target),
            targets => self.stream.try_read_vectored(targets),
        }
    }

    fn short_reads_are_last(&self) -> bool {
        true
    }
}

impl Link {
    pub(super) fn new(stream: Stream, peer: String, allowance: Allowance) -> Rc<Self> {
        Rc::new(Self {
            stream,
            peer,
            allowance,
            queue: RefCell::default(),
            sent: Cell::new(0),
            memory: Cell::new(0),
            memory_queue: RefCell::default(),
            next_number: Cell::new(0),
            broken: Cell::new(false),
            ending: Cell::new(false),
            finished: Cell::new(false),
            deadline: Cell::new(None),
            heard: Cell::new(Instant::now()),
            fresh: Cell::new(false),
            writer: RefCell::default(),
            room: RefCell::default(),
            alarm: RefCell::default(),
        })
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Reads nothing more; sends what is in the queue.
    pub(super) fn end(&self) {
        self.ending.set(true);
        wake(&self.alarm);
        wake(&self.room);
    }

    /// Whether nothing more is to be read.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.get() || self.broken.get()
    }

    /// Ends it now. Commands that the disk has are finished, and their answers thrown away.
    pub(super) fn kill(&self) {
        self.broken.set(true);
        self.stream.shut_down();
        let queue = std::mem::take(&mut *self.queue.borrow_mut());
        self.sent.set(0);
        drop(queue);
        wake(&self.alarm);
        wake(&self.room);
        wake(&self.writer);
        let waiting = std::mem::take(&mut *self.memory_queue.borrow_mut());
        waiting.into_iter().for_each(|waiting| waiting.waker.wake());
    }

    /// Nothing more comes into the queue: the writer ends when it is empty.
    pub(super) fn finish(&self) {
        self.finished.set(true);
        wake(&self.writer);
    }

    /// Everything is said; what is read from now on is only waited for until the initiator closes its side.
    pub(super) fn linger(&self, within: Duration) {
        self.end_writing();
        self.ending.set(false);
        self.set_deadline(Some(within));
    }

    /// Says that nothing more comes.
    pub(super) fn end_writing(&self) {
        self.stream.end_writing();
    }

    /// Waits until everything was sent.
    pub(super) async fn flushed(&self) {
        poll_fn(|context| {
            if self.broken.get() || self.queue.borrow().is_empty() {
                return Poll::Ready(());
            }
            keep(&self.room, context.waker());
            Poll::Pending
        })
        .await;
    }

    /// By when something must have happened; the janitor ends the connection else.
    pub(super) fn set_deadline(&self, within: Option<Duration>) {
        self.deadline.set(within.map(|within| Instant::now() + within));
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    /// For how long nothing has come, as it is now; asked by the janitor only, so that the clock need not be looked at for
    /// each PDU.
    pub(super) fn silence(&self, now: Instant) -> Duration {
        if self.fresh.replace(false) {
            self.heard.set(now);
        }
        now.saturating_duration_since(self.heard.get())
    }

    /// When something was heard the last time, as the janitor knows it.
    pub(super) fn heard(&self) -> Instant {
        self.heard.get()
    }

    /// Has all who wait for memory look whether they still want it.
    pub(super) fn wake_waiting(&self) {
        for waiting in &*self.memory_queue.borrow() {
            waiting.waker.wake_by_ref();
        }
    }

    fn wake_first(&self) {
        if let Some(first) = self.memory_queue.borrow().front() {
            first.waker.wake_by_ref();
        }
    }

    fn grant(self: &Rc<Self>, memory: usize) -> Option<Permit> {
        let used = self.memory.get();
        if used > 0 && used.saturating_add(memory) > self.allowance.memory {
            return None;
        }
        self.memory.set(used + memory);
        Some(Permit {
            link: Rc::clone(self),
            memory,
        })
    }

    /// Memory at once, or not.
    pub(super) fn try_memory(self: &Rc<Self>, memory: usize) -> Option<Permit> {
        if !self.memory_queue.borrow().is_empty() {
            return None;
        }
        self.grant(memory)
    }

    /// Waits until there is memory, in the order of those who wait. `None`: the connection is broken, or `is_over`.
    pub(super) async fn memory(self: &Rc<Self>, memory: usize, is_over: impl Fn() -> bool) -> Option<Permit> {
        if let Some(permit) = self.try_memory(memory) {
            return Some(permit);
        }
        let number = self.next_number.get();
        self.next_number.set(number + 1);
        let permit = poll_fn(|context| {
            if self.broken.get() || is_over() {
                return Poll::Ready(None);
            }
            let mut queue = self.memory_queue.borrow_mut();
            let waker = context.waker().clone();
            match queue.iter_mut().find(|waiting| waiting.number == number) {
                Some(waiting) => waiting.waker = waker,
                None => queue.push_back(Waiting { number, waker }),
            }
            if queue.front().is_some_and(|first| first.number == number)
                && let Some(permit) = self.grant(memory)
            {
                return Poll::Ready(Some(permit));
            }
            Poll::Pending
        })
        .await;
        self.memory_queue
            .borrow_mut()
            .retain(|waiting| waiting.number != number);
        self.wake_first();
        permit
    }

    /// Waits until not too much is to be sent.
    pub(super) async fn room(&self) {
        poll_fn(|context| {
            if self.queue.borrow().len() < LONG_QUEUE || self.is_ending() {
                return Poll::Ready(());
            }
            keep(&self.room, context.waker());
            Poll::Pending
        })
        .await;
    }

    /// Puts a PDU on its way.
    pub(super) fn send(&self, out: Out) {
        if self.broken.get() {
            return;
        }
        self.queue.borrow_mut().push_back(out);
        wake(&self.writer);
    }

    /// Sends PDUs until the connection is finished or broken.
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
                tracing::debug!(peer = self.peer, %error, "an iSCSI initiator does not take what it is sent");
                self.kill();
                return;
            }
        }
    }

    async fn write_some(&self) -> io::Result<()> {
        match self.try_write() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
        self.set_deadline(Some(self.allowance.stall));
        self.stream.writable().await?;
        self.set_deadline(None);
        Ok(())
    }

    fn try_write(&self) -> io::Result<()> {
        let queue = self.queue.borrow();
        let mut pieces = [IoSlice::new(&[]); 3 * BATCH];
        let mut skip = self.sent.get();
        let mut count = 0;
        for piece in queue.iter().take(BATCH).flat_map(Out::pieces) {
            let here = skip.min(piece.len());
            skip -= here;
            if here < piece.len() {
                pieces[count] = IoSlice::new(&piece[here..]);
                count += 1;
            }
        }
        let written = self.stream.try_write(&pieces[..count])?;
        drop(queue);
        self.account(written);
        Ok(())
    }

    /// The socket took `count` bytes: PDUs that are complete are done with.
    fn account(&self, count: usize) {
        let mut sent = self.sent.get() + count;
        loop {
            let mut queue = self.queue.borrow_mut();
            let length = match queue.front() {
                Some(out) => out.length(),
                None => break,
            };
            if sent < length {
                break;
            }
            sent -= length;
            let done = queue.pop_front();
            let shorter = queue.len() + 1 == LONG_QUEUE || queue.is_empty();
            drop(queue);
            // Its permit wakes whoever waits for memory.
            drop(done);
            if shorter {
                wake(&self.room);
            }
        }
        self.sent.set(sent);
    }
}
