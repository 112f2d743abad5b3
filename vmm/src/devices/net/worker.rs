//! The thread that serves one pair of queues.
//!
//! ```text
//!            kick rx ──┐      ┌──────────── one pass ────────────┐
//!            kick tx ──┤      │ control queue                    │
//!       kick control ──┼epoll─► send:    tx queue ──► port       ├─► at most one interrupt per queue
//!      port readable ──┤      │ receive: port    ──► rx queue    │
//!      port writable ──┤      └──────────────────────────────────┘
//!               stop ──┘        work left? poll and go on, else sleep
//! ```
//!
//! A pass is bounded, so that neither direction starves the other and a stop is heard. Nothing is polled that cannot be
//! served: without buffers of the guest the port is not watched for packets, and only a port that is full is watched for
//! room. So an idle card does not wake, and a stuck one does not spin.
//!
//! Doorbells are watched edge-triggered: each write of the driver wakes once, and their counters are never read.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_core::{ActiveQueue, DeviceError, DeviceEvents, GuestMemory};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::backend::NetBackend;
use super::control::{self, NetConfig, REQUEST_SIZE};
use super::port::{Closed, Port, Received, Sent};
use super::protocol::{HEADER_SIZE, MAX_PACKET, MIN_FRAME};
use super::receive::ReceiveQueue;
use super::statistics::Counters;
use crate::devices::guest_buffers::{ChainError, Direction, GuestBuffers};
use crate::devices::used_ring::Interrupts;

/// Packets received in one pass before the other direction gets its turn.
const RECEIVE_BUDGET: usize = 64;

/// What woke the worker, as the user data of epoll events.
mod token {
    pub(super) const STOP: u64 = 0;
    pub(super) const RECEIVE_KICK: u64 = 1;
    pub(super) const SEND_KICK: u64 = 2;
    pub(super) const CONTROL_KICK: u64 = 3;
    pub(super) const PORT: u64 = 4;
}

/// Why a queue pair is not served any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    /// The ring or its doorbell.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A chain in it.
    #[error("virtqueue {queue}: {source}")]
    Chain {
        /// Number of the queue.
        queue: u16,
        /// What is wrong.
        source: ChainError,
    },
}

/// What all workers of a card share with the device.
pub(super) struct Shared {
    pub(super) backend: Arc<NetBackend>,
    pub(super) config: NetConfig,
    pub(super) counters: Counters,
}

/// All that a worker gets.
pub(super) struct WorkerSetup {
    pub(super) shared: Arc<Shared>,
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    pub(super) pair: usize,
    pub(super) receive: ActiveQueue,
    pub(super) send: ActiveQueue,
    pub(super) control: Option<ActiveQueue>,
    /// Readable when the worker has to end; shared by all workers of the card.
    pub(super) stop: Arc<EventFd>,
    pub(super) events: Arc<dyn DeviceEvents>,
}

/// Body of the worker's thread.
pub(super) fn run(setup: WorkerSetup) {
    let events = Arc::clone(&setup.events);
    let stop = Arc::clone(&setup.stop);
    if let Err(error) = Worker::new(setup).and_then(|mut worker| worker.serve_until_stopped()) {
        events.needs_reset(&format!("network card: {error}"));
        // The card stops as a whole. The counter cannot overflow: each worker writes once.
        let _ = stop.write(1);
    }
}

/// Serves the queues without a thread, in `passes` passes or until there is nothing to do.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn run_passes(setup: WorkerSetup, passes: usize) -> Result<(), WorkerError> {
    let mut worker = Worker::new(setup)?;
    let shared = Arc::clone(&worker.shared);
    let Some(mut port) = shared.backend.port(worker.pair) else {
        return Ok(());
    };
    for _ in 0..passes {
        worker.pass(&mut port)?;
        if !worker.has_work() {
            break;
        }
    }
    Ok(())
}

struct Worker {
    shared: Arc<Shared>,
    memory: GuestMemory,
    features: u64,
    pair: usize,
    events: Arc<dyn DeviceEvents>,
    epoll: Epoll,
    receive: ReceiveQueue,
    send: SendQueue,
    control: Option<ControlQueue>,
    port: PortState,
}

struct SendQueue {
    queue: ActiveQueue,
    interrupts: Interrupts,
    packet: GuestBuffers,
    /// There may be packets in the queue.
    pending: bool,
    /// The port is full.
    blocked: bool,
}

struct ControlQueue {
    queue: ActiveQueue,
    interrupts: Interrupts,
    request: GuestBuffers,
    answer: GuestBuffers,
    pending: bool,
}

struct PortState {
    /// There may be packets to receive.
    readable: bool,
    closed: bool,
    /// What epoll watches it for.
    watched: EventSet,
}

impl Worker {
    fn new(setup: WorkerSetup) -> Result<Self, WorkerError> {
        let WorkerSetup {
            shared,
            memory,
            features,
            pair,
            receive,
            send,
            control,
            stop,
            events,
        } = setup;
        let epoll = Epoll::new().map_err(|source| host("make an epoll instance", source))?;
        let watch = |fd, events, token| {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
                .map_err(|source| host("watch a doorbell", source))
        };
        let doorbell = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(stop.as_raw_fd(), EventSet::IN, token::STOP)?;
        watch(receive.kick.as_raw_fd(), doorbell, token::RECEIVE_KICK)?;
        watch(send.kick.as_raw_fd(), doorbell, token::SEND_KICK)?;
        if let Some(control) = &control {
            watch(control.kick.as_raw_fd(), doorbell, token::CONTROL_KICK)?;
        }
        let buffers = || GuestBuffers::new(Arc::clone(&memory));
        Ok(Self {
            receive: ReceiveQueue::new(receive, &memory, features, shared.backend.mtu()),
            send: SendQueue {
                interrupts: Interrupts::new(&send),
                packet: buffers(),
                pending: true,
                blocked: false,
                queue: send,
            },
            control: control.map(|queue| ControlQueue {
                interrupts: Interrupts::new(&queue),
                request: buffers(),
                answer: buffers(),
                pending: true,
                queue,
            }),
            port: PortState {
                readable: true,
                closed: false,
                watched: EventSet::empty(),
            },
            shared,
            memory,
            features,
            pair,
            events,
            epoll,
        })
    }

    fn serve_until_stopped(&mut self) -> Result<(), WorkerError> {
        let shared = Arc::clone(&self.shared);
        let Some(mut port) = shared.backend.port(self.pair) else {
            return Ok(());
        };
        // Watched for nothing at first: `watch_port` says for what.
        self.epoll
            .ctl(
                ControlOperation::Add,
                port.fd().as_raw_fd(),
                EpollEvent::new(EventSet::EDGE_TRIGGERED, token::PORT),
            )
            .map_err(|source| host("watch the port", source))?;
        let mut events = [EpollEvent::default(); 8];
        loop {
            self.pass(&mut port)?;
            self.watch_port(&port)?;
            let timeout = if self.has_work() { 0 } else { -1 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
                Err(source) => return Err(host("wait for events", source)),
            };
            for event in &events[..count] {
                match event.data() {
                    token::STOP => return Ok(()),
                    token::RECEIVE_KICK => self.receive.starved = false,
                    token::SEND_KICK => self.send.pending = true,
                    token::CONTROL_KICK => {
                        if let Some(control) = &mut self.control {
                            control.pending = true;
                        }
                    }
                    _ => self.port_event(event.event_set()),
                }
            }
        }
    }

    /// Serves each direction once.
    fn pass(&mut self, port: &mut Port) -> Result<(), WorkerError> {
        if let Some(control) = self.control.as_mut().filter(|control| control.pending) {
            serve_control(control, &self.memory, self.features, &self.shared)?;
        }
        if self.send.pending && !self.send.blocked {
            self.send_packets(port)?;
        }
        if self.port.readable && !self.receive.starved && !self.port.closed {
            self.receive_packets(port)?;
        }
        Ok(())
    }

    /// Whether another pass would do something.
    fn has_work(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.pending)
            || (self.send.pending && !self.send.blocked)
            || (self.port.readable && !self.receive.starved && !self.port.closed)
    }

    fn port_event(&mut self, events: EventSet) {
        if events.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP) {
            self.port.readable = true;
        }
        if events.intersects(EventSet::OUT | EventSet::ERROR | EventSet::HANG_UP) && self.send.blocked {
            self.send.blocked = false;
            self.send.pending = true;
        }
    }

    /// Watches the port for what can be served. A change also brings what is already the case.
    fn watch_port(&mut self, port: &Port) -> Result<(), WorkerError> {
        if self.port.closed {
            return Ok(());
        }
        let mut wanted = EventSet::EDGE_TRIGGERED;
        if !self.receive.starved {
            wanted |= EventSet::IN;
        }
        if self.send.blocked {
            wanted |= EventSet::OUT;
        }
        if wanted != self.port.watched {
            self.epoll
                .ctl(
                    ControlOperation::Modify,
                    port.fd().as_raw_fd(),
                    EpollEvent::new(wanted, token::PORT),
                )
                .map_err(|source| host("watch the port", source))?;
            self.port.watched = wanted;
        }
        Ok(())
    }

    /// The port is of no use any more: the guest sees its link go down, and what it sends is dropped.
    fn close_port(&mut self, port: &Port, reason: &Closed) {
        self.port.closed = true;
        self.send.blocked = false;
        // Fails only if it is not watched.
        let _ = self.epoll.ctl(
            ControlOperation::Delete,
            port.fd().as_raw_fd(),
            EpollEvent::default(),
        );
        self.shared.backend.set_closed(&reason.0);
        self.events.config_changed();
    }

    /// Sends what the driver queued, at most a queue's worth.
    fn send_packets(&mut self, port: &mut Port) -> Result<(), WorkerError> {
        let memory = Arc::clone(&self.memory);
        let mut budget = self.send.queue.queue.size();
        disable_kicks(&mut self.send.queue, &memory)?;
        'queue: loop {
            while let Some(chain) = next_chain(&mut self.send.queue, &memory)? {
                if budget == 0 {
                    self.send.queue.queue.go_to_previous_position();
                    break 'queue;
                }
                budget -= 1;
                let head = chain.head_index();
                match self.send_chain(chain, port)? {
                    Sent::Blocked => {
                        self.send.queue.queue.go_to_previous_position();
                        self.send.blocked = true;
                        break 'queue;
                    }
                    Sent::Taken | Sent::Dropped => self.send.queue.add_used(&memory, head, 0)?,
                }
            }
            if !enable_kicks(&mut self.send.queue, &memory)? {
                self.send.pending = false;
                break;
            }
        }
        if !self.port.closed {
            match port.flush() {
                Ok(flushed) => self.send.blocked |= !flushed,
                Err(reason) => self.close_port(port, &reason),
            }
        }
        if self.send.blocked {
            Counters::add(&self.shared.counters.send_blocked, 1);
        }
        self.send.interrupts.notify(&mut self.send.queue, &memory)?;
        Ok(())
    }

    fn send_chain(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        port: &mut Port,
    ) -> Result<Sent, WorkerError> {
        let packet = &mut self.send.packet;
        packet.clear();
        packet
            .append(chain, Direction::FromGuest)
            .map_err(chain_error(&self.send.queue))?;
        let sensible = (HEADER_SIZE + MIN_FRAME..=MAX_PACKET).contains(&packet.len());
        let sent = if self.port.closed || !sensible {
            Sent::Dropped
        } else {
            match port.send(packet) {
                Ok(sent) => sent,
                Err(reason) => {
                    self.close_port(port, &reason);
                    Sent::Dropped
                }
            }
        };
        let counters = &self.shared.counters;
        match sent {
            Sent::Taken => {
                Counters::add(&counters.sent_packets, 1);
                Counters::add(&counters.sent_bytes, self.send.packet.len() - HEADER_SIZE);
            }
            Sent::Dropped => Counters::add(&counters.sent_dropped, 1),
            Sent::Blocked => {}
        }
        Ok(sent)
    }

    /// Receives packets, at most [`RECEIVE_BUDGET`].
    fn receive_packets(&mut self, port: &mut Port) -> Result<(), WorkerError> {
        let memory = Arc::clone(&self.memory);
        let counters = &self.shared.counters;
        let mut closed = None;
        for _ in 0..RECEIVE_BUDGET {
            let receive = &mut self.receive;
            if !receive.arm(&memory, &counters.receive_starved)? {
                break;
            }
            let length = match receive.held.take() {
                Some(length) => length,
                None => match port.receive(&mut receive.buffers, &mut receive.overflow) {
                    Ok(Received::Packet(length)) => length,
                    Ok(Received::Nothing) => {
                        self.port.readable = false;
                        break;
                    }
                    Err(reason) => {
                        closed = Some(reason);
                        break;
                    }
                },
            };
            if receive.deliver(length, &memory)? {
                Counters::add(&counters.received_packets, 1);
                Counters::add(&counters.received_bytes, length.saturating_sub(HEADER_SIZE));
            } else if receive.held.is_none() {
                Counters::add(&counters.received_dropped, 1);
            }
        }
        self.receive.interrupts.notify(&mut self.receive.queue, &memory)?;
        if let Some(reason) = closed {
            self.close_port(port, &reason);
        }
        Ok(())
    }
}

/// Executes what the driver put into the control queue, at most a queue's worth.
fn serve_control(
    control: &mut ControlQueue,
    memory: &GuestMemoryMmap,
    features: u64,
    shared: &Shared,
) -> Result<(), WorkerError> {
    control.pending = false;
    let mut budget = control.queue.queue.size();
    loop {
        while let Some(chain) = next_chain(&mut control.queue, memory)? {
            if budget == 0 {
                control.queue.queue.go_to_previous_position();
                control.pending = true;
                return Ok(control.interrupts.notify(&mut control.queue, memory)?);
            }
            budget -= 1;
            let head = chain.head_index();
            control.request.clear();
            control.answer.clear();
            control
                .request
                .append(chain.clone(), Direction::FromGuest)
                .map_err(chain_error(&control.queue))?;
            control
                .answer
                .append(chain, Direction::ToGuest)
                .map_err(chain_error(&control.queue))?;
            let mut request = [0; REQUEST_SIZE];
            let length = control.request.copy_to(0, &mut request);
            let answer = control::execute(&request[..length], features, &shared.config, &shared.backend);
            let written = control.answer.copy_from(0, &[answer]);
            control
                .queue
                .add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
        }
        if !enable_kicks(&mut control.queue, memory)? {
            break;
        }
    }
    Ok(control.interrupts.notify(&mut control.queue, memory)?)
}

/// The next chain that the driver queued, if there is one.
pub(super) fn next_chain<'m>(
    queue: &mut ActiveQueue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceError> {
    match queue.queue.iter(memory) {
        Ok(mut chains) => Ok(chains.next()),
        Err(source) => Err(queue.error(source)),
    }
}

/// Does without the doorbell for a while.
pub(super) fn disable_kicks(queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
    queue
        .queue
        .disable_notification(memory)
        .map_err(|source| queue.error(source))
}

/// Asks for the doorbell. Whether there are chains already, for which it may not ring.
pub(super) fn enable_kicks(queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
    queue
        .queue
        .enable_notification(memory)
        .map_err(|source| queue.error(source))
}

/// Says in which queue a chain is wrong.
pub(super) fn chain_error(queue: &ActiveQueue) -> impl FnOnce(ChainError) -> WorkerError + use<> {
    let queue = queue.index;
    move |source| WorkerError::Chain { queue, source }
}

fn host(action: &str, source: std::io::Error) -> WorkerError {
    WorkerError::Device(DeviceError::Host {
        action: action.to_owned(),
        source,
    })
}
