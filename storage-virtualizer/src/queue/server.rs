//! Serves one virtqueue, on a block-io worker.
//!
//! One task waits for the doorbell and takes what is in the ring, [a batch](BATCH) in each turn of the worker. Every chain is handed to a *slot*: a task
//! with its own scratch memory that takes the chain's buffers, has the [`Service`] do what they ask for, and puts the answer
//! into the used ring. Slots are made when so many requests are in flight for the first time, and then reused: in steady
//! state a request allocates nothing.
//!
//! ```text
//!   kick ─► server task: take heads     ──► slot tasks: chain → service … ─► used ring
//!                ▲                                                               │
//!                └───── woken by the first of a batch, interrupts once at its end ◄┘
//! ```
//!
//! The doorbell is on only while the worker sleeps ([`PollSource`]). Slots run before the server task is
//! woken again, so a batch of completions costs one interrupt, and that travels with the next submission to the ring.
//!
//! A driver that breaks the rules stops the queue: no chain is taken any more, what is in flight ends, and the transport
//! is told (`DeviceEvents::needs_reset`).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Duration;

use block_io::{EventSignal, EventWatch, HeldMemory, IoError, PollSource, add_poll_source, spawn_local};
use virtio_core::virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtio_core::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use virtio_core::{ActiveQueue, DeviceEvents, GuestMemory, feature};

use super::control::{Control, Done, Outcome, Waiting};
use super::log_limit::LogLimit;
use super::statistics::QueueStatistics;
use super::{QueueStart, Service};
use crate::chain::{Buffers, Table};
use crate::disk_handle::DiskHandleError;
use crate::inflight::InflightQueue;

/// Chains that are taken in one turn of the worker, half of what drivers often have in flight at most: the driver hears of the first answers and
/// has new requests ready while the kernel is busy with the others. Measured: `docs/src/performance.md`.
const BATCH: usize = 16;

/// What the requests of a queue may know of their server.
#[derive(Default)]
pub(crate) struct ServerLink {
    control: Arc<Control>,
    /// The server's task.
    waker: RefCell<Option<Waker>>,
    log_limit: RefCell<LogLimit>,
    index: u16,
}

impl ServerLink {
    /// Whether the server ends, and what becomes of requests that have not gone to the disk.
    pub(crate) fn stopping(&self) -> Option<Waiting> {
        self.control.stopping()
    }

    /// Has the server's task look around.
    pub(crate) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// What [`Self::wake`] wakes, for other threads.
    pub(crate) fn waker(&self) -> Option<Waker> {
        self.waker.borrow().clone()
    }

    /// Tells the host's administrator of a disk's failure, not too often.
    #[cold]
    pub(crate) fn log(&self, error: &IoError) {
        if self.log_limit.borrow_mut().admits() {
            let cause = error.cause();
            tracing::warn!(%error, %cause, queue = self.index, "a guest's request failed");
        }
    }
}

struct Server<S> {
    link: ServerLink,
    service: S,
    /// Before the memory, as it goes first.
    _held: Option<HeldMemory>,
    memory: GuestMemory,
    table: Table,
    queue: RefCell<Queue>,
    signal: RefCell<EventSignal>,
    events: Arc<dyn DeviceEvents>,
    statistics: Arc<QueueStatistics>,
    inflight: Option<InflightQueue>,
    /// Slots that wait for a chain.
    idle: RefCell<Vec<Rc<Slot>>>,
    /// Heads that are in flight, one bit each.
    heads: RefCell<Box<[u64]>>,
    in_flight: Cell<u32>,
    /// There is something in the used ring that the driver was not told of.
    completed: Cell<bool>,
    /// The driver broke the rules.
    broken: Cell<bool>,
    /// Chains were taken since the driver was last asked to ring.
    doorbell_off: Cell<bool>,
    /// There are chains, says the ring's index.
    announced: Cell<bool>,
    /// The worker's turn in which chains were taken last, and how many more may be taken in it.
    room: Cell<(Option<u64>, usize)>,
    /// When this turn of the worker is over, chains are taken.
    goes_on: Cell<Option<u64>>,
    abandoned: RefCell<Vec<u16>>,
    /// When chains were taken last, by [`Self::clock`].
    taken_at: Cell<u64>,
    answered_at: Cell<u64>,
    /// Dropped last, when no slot is left and guest memory was let go.
    _done: Done,
}

/// The mailbox of a slot.
#[derive(Default)]
struct Slot {
    order: Cell<Option<Order>>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy)]
enum Order {
    Serve(u16),
    End,
}

impl Slot {
    fn give(&self, order: Order) {
        self.order.set(Some(order));
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    async fn next(&self) -> Order {
        poll_fn(|context| match self.order.take() {
            Some(order) => Poll::Ready(order),
            None => {
                let mut waker = self.waker.borrow_mut();
                if !waker.as_ref().is_some_and(|kept| kept.will_wake(context.waker())) {
                    *waker = Some(context.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}

/// Serves the queue until [`Control::stop`]; `service` is made here, on the worker.
pub(super) async fn serve<S: Service>(
    parts: QueueStart,
    statistics: Arc<QueueStatistics>,
    done: Done,
    service: impl FnOnce() -> Result<S, DiskHandleError>,
) {
    let service = match service() {
        Ok(service) => service,
        Err(error) => return parts.events.needs_reset(&error.to_string()),
    };
    let ActiveQueue {
        index,
        queue,
        kick,
        call,
    } = parts.queue;
    let control = Arc::clone(&done.0);
    let mut kick = match EventWatch::new(kick) {
        Ok(kick) => kick,
        Err(error) => {
            return parts
                .events
                .needs_reset(&format!("cannot watch the doorbell: {error}"));
        }
    };
    let server = Rc::new(Server {
        link: ServerLink {
            control: Arc::clone(&control),
            index,
            ..ServerLink::default()
        },
        service,
        _held: parts.memory_stays.then(|| hold(&parts.memory)),
        memory: parts.memory,
        table: Table {
            address: GuestAddress(queue.desc_table()),
            size: queue.size(),
            indirect: parts.features & feature::RING_INDIRECT_DESC != 0,
        },
        heads: RefCell::new(vec![0; usize::from(queue.size()).div_ceil(64)].into()),
        queue: RefCell::new(queue),
        signal: RefCell::new(EventSignal::new(call)),
        events: parts.events,
        statistics,
        inflight: parts.inflight,
        idle: RefCell::default(),
        in_flight: Cell::new(0),
        completed: Cell::new(false),
        broken: Cell::new(false),
        doorbell_off: Cell::new(false),
        announced: Cell::new(false),
        room: Cell::new((None, BATCH)),
        // What the driver added before the doorbell was watched.
        goes_on: Cell::new(Some(u64::MAX)),
        abandoned: RefCell::default(),
        taken_at: Cell::new(0),
        answered_at: Cell::new(0),
        _done: done,
    });
    add_poll_source(&(Rc::clone(&server) as Rc<dyn PollSource>));
    server.repeat(&parts.unanswered);
    loop {
        let kicked = poll_fn(|context| {
            if server.link.waker.borrow().is_none() {
                // A task's waker stays the same.
                *server.link.waker.borrow_mut() = Some(context.waker().clone());
                control.set_waker(context.waker().clone());
            }
            match kick.poll_wait(context) {
                Poll::Ready(result) => Poll::Ready(Some(result)),
                Poll::Pending if server.has_news() => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
        if server.completed.take() {
            server.interrupt();
        }
        if control.stopping().is_some() {
            break;
        }
        if control.has_new_call() {
            server.change_call();
        }
        if server.service.can_release(&server.link) {
            server.service.release(&server.link);
        }
        match kicked {
            Some(Ok(())) => server.drain(),
            Some(Err(error)) => server.fail(&format!("cannot watch the doorbell: {error}")),
            None if server.announced.get() || server.can_go_on() => server.drain(),
            None => {}
        }
    }
    server.end().await;
}

/// Has the worker hold all of the guest's memory.
fn hold(memory: &GuestMemory) -> HeldMemory {
    let parts = memory
        .iter()
        .filter_map(|region| Some((region.as_ptr(), usize::try_from(region.len()).ok()?)));
    // SAFETY: the server owns the memory, and drops this first, when nothing is in flight any more (`end`). That the pages stay is promised by
    // who started the queue.
    unsafe { HeldMemory::new(parts) }
}

impl<S: Service> Server<S> {
    /// Takes chains that are available and gives them to slots, in each turn of the worker [`BATCH`] of them. The doorbell
    /// stays off until the worker sleeps.
    fn drain(self: &Rc<Self>) {
        self.goes_on.set(None);
        let announced = self.announced.take();
        if self.broken.get() {
            return;
        }
        let room = self.room();
        match self.take_available(room) {
            Ok(0) if announced && room > 0 => self.fail("the available ring cannot be read"),
            Ok(taken) => {
                self.room.set((block_io::turns(), room - taken));
                if taken == room {
                    self.go_on_later();
                }
            }
            Err(reason) => self.fail(&reason),
        }
        self.doorbell_off.set(true);
    }

    /// How many chains may be taken in this turn of the worker. The simulation has no turns.
    fn room(&self) -> usize {
        match (block_io::turns(), self.room.get()) {
            (None, _) => usize::MAX,
            (turn, (last, left)) if turn == last => left,
            _ => BATCH,
        }
    }

    /// If there are more chains, takes them in the next turn of the worker.
    fn go_on_later(&self) {
        if self.has_more() {
            self.goes_on.set(block_io::turns());
            self.link
                .waker
                .borrow()
                .iter()
                .for_each(block_io::wake_after_turn);
        }
    }

    /// Whether the turn is over in which [`Self::go_on_later`] was called.
    fn can_go_on(&self) -> bool {
        self.goes_on.get().is_some() && self.goes_on.get() != block_io::turns()
    }

    /// Whether the driver has made chains available that were not taken. If the ring is gone, the next drain finds out.
    fn has_more(&self) -> bool {
        let queue = self.queue.borrow();
        queue
            .avail_idx(&*self.memory, Ordering::Acquire)
            .is_ok_and(|index| index.0 != queue.next_avail())
    }

    fn take_available(self: &Rc<Self>, most: usize) -> Result<usize, String> {
        self.taken_at.set(self.clock());
        let memory = &*self.memory;
        let mut queue = self.queue.borrow_mut();
        queue
            .disable_notification(memory)
            .map_err(|error| error.to_string())?;
        let mut taken = 0;
        for chain in queue.iter(memory).map_err(|error| error.to_string())?.take(most) {
            let head = chain.head_index();
            self.mark_in_flight(head)?;
            if let Some(inflight) = &self.inflight {
                inflight.begin(head);
            }
            self.idle_slot().give(Order::Serve(head));
            taken += 1;
        }
        Ok(taken)
    }

    /// Serves chains that an earlier server took and did not answer.
    fn repeat(self: &Rc<Self>, heads: &[u16]) {
        for head in heads {
            match self.mark_in_flight(*head) {
                Ok(()) => self.idle_slot().give(Order::Serve(*head)),
                Err(reason) => return self.fail(&reason),
            }
        }
    }

    /// Whether the server task has something to do, beside what the doorbell announces.
    fn has_news(&self) -> bool {
        self.completed.get()
            || self.announced.get()
            || self.can_go_on()
            || self.link.stopping().is_some()
            || self.link.control.has_new_call()
            || self.service.can_release(&self.link)
    }

    fn mark_in_flight(&self, head: u16) -> Result<(), String> {
        let mut heads = self.heads.borrow_mut();
        let bit = 1 << (head % 64);
        match heads.get_mut(usize::from(head / 64)) {
            Some(word) if head < self.table.size && *word & bit == 0 => *word |= bit,
            Some(_) if head < self.table.size => {
                return Err(format!("chain {head} was made available twice"));
            }
            _ => return Err(format!("chain {head} is not in a table of {}", self.table.size)),
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Ok(())
    }

    /// A slot that waits, or a new one.
    fn idle_slot(self: &Rc<Self>) -> Rc<Slot> {
        if let Some(slot) = self.idle.borrow_mut().pop() {
            return slot;
        }
        let slot = Rc::new(Slot::default());
        // This runs on a worker, else there were no doorbell.
        drop(spawn_local(Rc::clone(self).serve_slot(Rc::clone(&slot))));
        slot
    }

    async fn serve_slot(self: Rc<Self>, slot: Rc<Slot>) {
        let mut buffers = Buffers::default();
        while let Order::Serve(head) = slot.next().await {
            let begin = self.taken_at.get();
            match self.serve_chain(head, &mut buffers, begin).await {
                Ok(Some(written)) => {
                    self.statistics
                        .count_time(self.answered_at().saturating_sub(begin));
                    self.finish(head, written);
                }
                Ok(None) => self.abandon(head),
                Err(reason) => {
                    self.finish(head, 0);
                    self.fail(&reason);
                }
            }
            self.idle.borrow_mut().push(Rc::clone(&slot));
        }
    }

    /// Nanoseconds, as of the worker's turn.
    fn clock(&self) -> u64 {
        block_io::moment_nanos()
    }

    /// The clock of the first answer of which the driver is not told yet: those of one turn need not ask it each.
    fn answered_at(&self) -> u64 {
        if !self.completed.get() {
            self.answered_at.set(self.clock());
        }
        self.answered_at.get()
    }

    /// Has the service do what the chain asks for; returns how much of its memory the device may have written, or nothing if
    /// the chain is not to be answered.
    async fn serve_chain(&self, head: u16, buffers: &mut Buffers, begin: u64) -> Result<Option<u32>, String> {
        buffers
            .take_chain(self.table, &self.memory, head)
            .map_err(|error| error.to_string())?;
        self.service.serve(&self.link, buffers, begin).await
    }

    fn unmark(&self, head: u16) {
        if let Some(word) = self.heads.borrow_mut().get_mut(usize::from(head / 64)) {
            *word &= !(1 << (head % 64));
        }
        self.in_flight.set(self.in_flight.get() - 1);
    }

    /// Leaves a chain to whoever serves the queue next.
    fn abandon(&self, head: u16) {
        self.unmark(head);
        self.abandoned.borrow_mut().push(head);
        self.link.wake();
    }

    fn finish(&self, head: u16, written: u32) {
        self.unmark(head);
        if let Some(inflight) = &self.inflight {
            inflight.prepare_end(head);
        }
        let mut queue = self.queue.borrow_mut();
        let added = queue.add_used(&*self.memory, head, written);
        if let Some(inflight) = &self.inflight {
            inflight.end(head, queue.next_used());
        }
        drop(queue);
        if let Err(error) = added {
            self.fail(&error.to_string());
        }
        if !self.completed.replace(true) {
            self.link.wake();
        }
    }

    /// Interrupts the driver if it wants to be told of what is new in the used ring.
    fn interrupt(&self) {
        let needed = {
            let mut queue = self.queue.borrow_mut();
            match queue.needs_notification(&*self.memory) {
                // Without event index, a flag of the driver counts (virtio 1.2 §2.7.7), which the crate leaves out.
                Ok(needed) => needed && (queue.event_idx_enabled() || !self.driver_polls(&queue)),
                Err(error) => {
                    drop(queue);
                    return self.fail(&error.to_string());
                }
            }
        };
        if needed {
            self.statistics.count_interrupt();
            self.signal();
        }
    }

    fn signal(&self) {
        let signalled = self.signal.borrow().signal();
        if let Err(error) = signalled {
            self.fail(&format!("cannot signal the interrupt: {error}"));
        }
    }

    fn change_call(&self) {
        if let Some(call) = self.link.control.take_call() {
            self.signal.replace(EventSignal::new(call));
            self.signal();
        }
    }

    /// Whether VIRTQ_AVAIL_F_NO_INTERRUPT is set.
    fn driver_polls(&self, queue: &Queue) -> bool {
        let flags = self
            .memory
            .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
        flags.is_ok_and(|flags| u16::from_le(flags) & 1 != 0)
    }

    /// Stops to take chains, and says why, once.
    fn fail(&self, reason: &str) {
        // A queue that was told to stop has nobody who would reset it.
        if !self.broken.replace(true) && self.link.stopping().is_none() {
            self.events
                .needs_reset(&format!("virtqueue {}: {reason}", self.link.index));
        }
    }

    /// Waits until nothing is in flight, then ends the slots.
    async fn end(&self) {
        self.service.release(&self.link);
        poll_fn(|_| {
            if self.completed.take() {
                self.interrupt();
            }
            // Some may have begun to wait just now.
            self.service.release(&self.link);
            if self.in_flight.get() == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        self.link.control.set_outcome(self.outcome());
        for slot in self.idle.take() {
            slot.give(Order::End);
        }
    }

    /// How the queue is left. What was taken last and is not answered (all buffers for events, as a rule) counts as not taken: so whoever
    /// serves the queue next finds it, also a server that is told of the next entry only.
    fn outcome(&self) -> Outcome {
        let abandoned = self.abandoned.take();
        let queue = self.queue.borrow();
        let next_avail = queue.next_avail();
        // They are no more than the queue has entries.
        let count = u16::try_from(abandoned.len()).unwrap_or(u16::MAX);
        let first = next_avail.wrapping_sub(count);
        let entry = |number: u16| {
            let place = u64::from(first.wrapping_add(number) % queue.size());
            let address = GuestAddress(queue.avail_ring() + 4 + 2 * place);
            self.memory
                .load::<u16>(address, Ordering::Relaxed)
                .map(u16::from_le)
        };
        let mut last: Vec<u16> = (0..count).filter_map(|number| entry(number).ok()).collect();
        let mut sorted = abandoned.clone();
        last.sort_unstable();
        sorted.sort_unstable();
        if self.inflight.is_none() && last == sorted {
            return Outcome {
                next_avail: first,
                abandoned: Vec::new(),
            };
        }
        Outcome {
            next_avail,
            abandoned,
        }
    }

    /// Has the server task take chains.
    fn announce(&self) -> bool {
        self.announced.set(true);
        self.link.wake();
        true
    }

    /// Takes no chains any more.
    fn has_stopped(&self) -> bool {
        self.broken.get() || self.link.stopping().is_some()
    }
}

impl<S: Service> PollSource for Server<S> {
    fn longest_spin(&self) -> Duration {
        self.service.longest_spin()
    }

    fn poll(&self) -> bool {
        !self.has_stopped() && self.has_more() && self.announce()
    }

    fn prepare_sleep(&self) -> bool {
        if self.has_stopped() || !self.doorbell_off.get() {
            return false;
        }
        let more = self.queue.borrow_mut().enable_notification(&*self.memory);
        match more {
            Ok(false) => {
                self.doorbell_off.set(false);
                false
            }
            // An error is found again, and told, by the drain.
            Ok(true) | Err(_) => self.announce(),
        }
    }
}
