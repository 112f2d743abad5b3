//! The console of virtio (virtio 1.2 §5.3), with one port.
//!
//! ```text
//!   guest ──send queue──► [VMM's event loop] ──write()──► ConsoleHandle ──► terminal, socket, file
//!   guest ◄─receive queue──────────────────────push()─── ConsoleHandle ◄── keystrokes
//! ```
//!
//! The event loop serves both queues. Output never blocks: when the console is congested the guest's chains stay in the
//! queue until it says `output_ready`. Input is never buffered here: what does not fit into the guest's buffers stays with
//! the console, and when the driver brings buffers the console is asked for more.
//!
//! Locks: the console's input lock is taken before `Core`'s, its output lock after. So `input_ready` and `set_input` are
//! called without a lock of ours, `write` may be called with it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_core::{
    Activation, ActiveQueue, DeviceError, DeviceEvents, GuestMemory, VirtioDevice, device_type, feature,
    read_config_bytes,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::event_loop::{EventLoop, Registration};
use super::guest_buffers::{Direction, GuestBuffers};
use super::used_ring::Interrupts;
use crate::console::{ConsoleHandle, ConsoleInput, Pressure};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const SEND: u16 = 1;
/// The most bytes of output in one go before others on the event loop get their turn.
const MAX_BATCH: usize = 64 << 10;
/// The most chains that are filled with input in one go.
const MAX_CHAINS: usize = 256;
/// Output passes through a piece of our memory of this size.
const CHUNK: usize = 4096;

/// `VIRTIO_CONSOLE_F_SIZE`: the configuration says how large the screen is.
const FEATURE_SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: characters can be written through the configuration.
const FEATURE_EMERGENCY_WRITE: u64 = 1 << 2;
/// Where in the configuration such a character is written.
const EMERGENCY_WRITE_OFFSET: u64 = 8;

/// The size of a console's screen, which may change while the guest runs.
#[derive(Default)]
pub struct ScreenSize {
    state: Mutex<Screen>,
}

#[derive(Default)]
struct Screen {
    columns: u16,
    rows: u16,
    /// Of the active device.
    events: Option<Arc<dyn DeviceEvents>>,
}

impl fmt::Debug for ScreenSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let screen = self.lock();
        write!(formatter, "ScreenSize({} x {})", screen.columns, screen.rows)
    }
}

impl ScreenSize {
    /// A screen of that many columns and rows.
    pub fn new(columns: u16, rows: u16) -> Self {
        let size = Self::default();
        size.set(columns, rows);
        size
    }

    /// Sets the size and tells the guest.
    pub fn set(&self, columns: u16, rows: u16) {
        let mut screen = self.lock();
        let changed = (screen.columns, screen.rows) != (columns, rows);
        (screen.columns, screen.rows) = (columns, rows);
        let events = screen.events.clone();
        drop(screen);
        if let Some(events) = events.filter(|_| changed) {
            events.config_changed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Screen> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A console.
pub struct VirtioConsole {
    event_loop: EventLoop,
    core: Arc<Core>,
    size: Option<Arc<ScreenSize>>,
    registration: Option<Registration>,
}

/// What the device, its place on the event loop and the console share.
struct Core {
    console: ConsoleHandle,
    /// Present while the driver uses the device. A reset takes it away, so that who comes late has nothing to touch.
    active: Mutex<Option<ActiveConsole>>,
}

struct ActiveConsole {
    memory: GuestMemory,
    events: Arc<dyn DeviceEvents>,
    receive: Channel,
    send: Channel,
    /// The chain of `send` whose output is under way, and how much of it is done.
    current: Option<(u16, usize)>,
    /// The console is to be spared until it says `output_ready`.
    congested: bool,
}

struct Channel {
    queue: ActiveQueue,
    interrupts: Interrupts,
    buffers: GuestBuffers,
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtioConsole")
            .field("console", &self.core.console)
            .field("active", &self.registration.is_some())
            .finish_non_exhaustive()
    }
}

impl VirtioConsole {
    /// A device that is served on `event_loop` and leads to `console`.
    pub fn new(event_loop: EventLoop, console: ConsoleHandle) -> Self {
        Self {
            event_loop,
            core: Arc::new(Core {
                console,
                active: Mutex::new(None),
            }),
            size: None,
            registration: None,
        }
    }

    /// The same with a screen of known size.
    #[must_use]
    pub fn with_size(mut self, size: Arc<ScreenSize>) -> Self {
        self.size = Some(size);
        self
    }

    /// Sets the events to tell of a changed size.
    fn watch_size(&self, events: Option<Arc<dyn DeviceEvents>>) {
        if let Some(size) = &self.size {
            size.lock().events = events;
        }
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        device_type::CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let size = if self.size.is_some() { FEATURE_SIZE } else { 0 };
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX | FEATURE_EMERGENCY_WRITE | size
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Columns, rows, number of ports (only with multi-port), emergency write.
        let mut bytes = [0; 12];
        if let Some(size) = &self.size {
            let screen = size.lock();
            bytes[..2].copy_from_slice(&screen.columns.to_le_bytes());
            bytes[2..4].copy_from_slice(&screen.rows.to_le_bytes());
        }
        read_config_bytes(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A character in the low byte of a word; works before DRIVER_OK too (§5.3.4).
        if offset == EMERGENCY_WRITE_OFFSET
            && let Some(character) = data.first()
        {
            self.core.console.write(&[*character]);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.reset();
        let event_idx = activation.has(feature::RING_EVENT_IDX);
        let enabled = activation.queues.len();
        let (mut receive, mut send) = (None, None);
        for mut queue in activation.queues {
            queue.queue.set_event_idx(event_idx);
            match queue.index {
                RECEIVE => receive = Some(queue),
                SEND => send = Some(queue),
                _ => {}
            }
        }
        let (Some(receive), Some(send)) = (receive, send) else {
            return Err(DeviceError::MissingQueues { enabled, needed: 2 });
        };
        let host = |action: &str| {
            let action = action.to_owned();
            move |source| DeviceError::Host { action, source }
        };
        let copy = |event: &EventFd| event.try_clone().map_err(host("copy a doorbell of the console"));
        let subscriber = ConsoleSubscriber {
            receive_kick: copy(&receive.kick)?,
            send_kick: copy(&send.kick)?,
            core: Arc::clone(&self.core),
        };
        let channel = |queue: ActiveQueue| Channel {
            interrupts: Interrupts::new(&queue),
            buffers: GuestBuffers::new(Arc::clone(&activation.memory)),
            queue,
        };
        self.watch_size(Some(Arc::clone(&activation.events)));
        *self.core.lock() = Some(ActiveConsole {
            receive: channel(receive),
            send: channel(send),
            memory: Arc::clone(&activation.memory),
            events: activation.events,
            current: None,
            congested: false,
        });
        let registration = Registration::new(&self.event_loop, Box::new(subscriber))
            .map_err(|error| std::io::Error::other(error.to_string()))
            .map_err(host("reach the event loop for the console"))
            .inspect_err(|_| self.core.stop())?;
        self.registration = Some(registration);
        let input: Arc<dyn ConsoleInput> = Arc::clone(&self.core) as Arc<dyn ConsoleInput>;
        self.core.console.set_input(Some(input));
        Ok(())
    }

    fn reset(&mut self) {
        if self.registration.take().is_some() {
            self.core.stop();
            self.core.console.set_input(None);
            self.watch_size(None);
        }
    }

    fn is_idle(&mut self) -> bool {
        self.registration.is_none()
    }
}

impl Drop for VirtioConsole {
    fn drop(&mut self) {
        self.reset();
    }
}

impl ConsoleInput for Core {
    fn push(&self, bytes: &[u8]) -> usize {
        self.with_active(|active| active.give_input(bytes)).unwrap_or(0)
    }

    fn output_ready(&self) {
        // Our own doorbell: the event loop goes on where it stopped.
        if let Some(active) = self.lock().as_mut() {
            active.congested = false;
            let _ = active.send.queue.kick.write(1);
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Option<ActiveConsole>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        *self.lock() = None;
    }

    /// Does something with the active device; stops it where the driver broke the rules.
    fn with_active<T>(&self, serve: impl FnOnce(&mut ActiveConsole) -> Result<T, String>) -> Option<T> {
        let mut place = self.lock();
        match serve(place.as_mut()?) {
            Ok(value) => Some(value),
            Err(reason) => {
                if let Some(active) = place.take() {
                    active.events.needs_reset(&format!("console: {reason}"));
                }
                None
            }
        }
    }

    /// Writes what the guest sent.
    fn serve_output(&self) {
        self.with_active(|active| active.take_output(&self.console));
    }
}

impl ActiveConsole {
    /// Puts `bytes` into the guest's buffers and returns how many. If not all, the doorbell of the receive queue is on.
    fn give_input(&mut self, bytes: &[u8]) -> Result<usize, String> {
        let mut given = 0;
        // A driver that goes on adding empty buffers does not hold us here.
        let mut chains = 0;
        while given < bytes.len() {
            if chains == MAX_CHAINS {
                let _ = self.receive.queue.kick.write(1);
                break;
            }
            chains += 1;
            let Some(head) = self.receive.next(&self.memory, Direction::ToGuest)? else {
                if self.receive.enable_kicks(&self.memory)? {
                    continue;
                }
                break;
            };
            let written = self.receive.buffers.copy_from(0, &bytes[given..]);
            given += written;
            self.receive.give_back(&self.memory, head, written)?;
        }
        self.receive.notify(&self.memory)?;
        Ok(given)
    }

    /// Gives what the guest sent to `console`, as long as it takes it; rings our own doorbell if there is more.
    fn take_output(&mut self, console: &ConsoleHandle) -> Result<(), String> {
        let mut budget = MAX_BATCH;
        let mut chunk = [0; CHUNK];
        while !self.congested {
            let Some((head, done)) = self.current else {
                match self.send.next(&self.memory, Direction::FromGuest)? {
                    Some(head) => self.current = Some((head, 0)),
                    None if self.send.enable_kicks(&self.memory)? => {}
                    None => break,
                }
                continue;
            };
            if budget == 0 {
                let _ = self.send.queue.kick.write(1);
                break;
            }
            let count = self.send.buffers.copy_to(done, &mut chunk);
            // An empty chain costs something as well.
            budget = budget.saturating_sub(count.max(64));
            if count > 0 {
                self.congested = console.write(&chunk[..count]) == Pressure::Congested;
            }
            if done + count < self.send.buffers.len() {
                self.current = Some((head, done + count));
            } else {
                self.current = None;
                self.send.give_back(&self.memory, head, 0)?;
            }
        }
        self.send.notify(&self.memory)
    }
}

impl Channel {
    /// Takes the next chain, whose buffers in `direction` are then in `buffers`.
    fn next(&mut self, memory: &GuestMemory, direction: Direction) -> Result<Option<u16>, String> {
        let chain = match self.queue.queue.iter(&**memory) {
            Ok(mut chains) => chains.next(),
            Err(source) => return Err(self.queue.error(source).to_string()),
        };
        let Some(chain) = chain else {
            return Ok(None);
        };
        let head = chain.head_index();
        self.buffers.clear();
        self.buffers
            .append(chain, direction)
            .map_err(|error| error.to_string())?;
        Ok(Some(head))
    }

    fn give_back(&mut self, memory: &GuestMemory, head: u16, written: usize) -> Result<(), String> {
        self.queue
            .add_used(memory, head, u32::try_from(written).unwrap_or(u32::MAX))
            .map_err(|error| error.to_string())
    }

    /// Asks for the doorbell. Whether there are chains already, for which it may not ring.
    fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, String> {
        self.queue
            .queue
            .enable_notification(&**memory)
            .map_err(|source| self.queue.error(source).to_string())
    }

    fn notify(&mut self, memory: &GuestMemory) -> Result<(), String> {
        self.interrupts
            .notify(&mut self.queue, memory)
            .map_err(|error| error.to_string())
    }
}

/// The place on the event loop.
struct ConsoleSubscriber {
    receive_kick: EventFd,
    send_kick: EventFd,
    core: Arc<Core>,
}

/// User data of the events.
const RECEIVE_KICK: u32 = 0;
const SEND_KICK: u32 = 1;

impl MutEventSubscriber for ConsoleSubscriber {
    fn process(&mut self, events: Events, _operations: &mut EventOps<'_>) {
        // A doorbell is readable, or we would not be here.
        if events.data() == RECEIVE_KICK {
            let _ = self.receive_kick.read();
            self.core.console.input_ready();
        } else {
            let _ = self.send_kick.read();
            self.core.serve_output();
        }
    }

    fn init(&mut self, operations: &mut EventOps<'_>) {
        for (kick, data) in [(&self.receive_kick, RECEIVE_KICK), (&self.send_kick, SEND_KICK)] {
            if let Err(error) = operations.add(Events::with_data(kick, data, EventSet::IN)) {
                tracing::error!(?error, "the console cannot watch a doorbell");
            }
        }
        // What the driver queued before DRIVER_OK rings no doorbell.
        self.core.serve_output();
    }
}

/// Runs the queues of a console made of `data`; see [`super::fuzz`]. Content of memory is at the same time what is typed.
///
/// # Panics
/// When the device misbehaves.
#[cfg(any(test, feature = "fuzzing"))]
#[expect(clippy::unwrap_used, reason = "as many queues as were asked for")]
pub fn fuzz_console(data: &[u8]) {
    let mut input = super::fuzz::Input::new(data);
    let (guest, queues) = super::fuzz::Guest::new(&mut input, 2);
    let channel = |queue: ActiveQueue| Channel {
        interrupts: Interrupts::new(&queue),
        buffers: GuestBuffers::new(Arc::clone(&guest.memory)),
        queue,
    };
    let [receive, send] = <[_; 2]>::try_from(queues).unwrap().map(channel);
    let mut console = ActiveConsole {
        memory: Arc::clone(&guest.memory),
        events: Arc::clone(&guest.events),
        receive,
        send,
        current: None,
        congested: false,
    };
    if let Ok(given) = console.give_input(input.rest()) {
        assert!(given <= input.rest().len());
    }
    for _ in 0..16 {
        if console.take_output(&ConsoleHandle::null()).is_err() {
            break;
        }
    }
    guest.check();
}

#[cfg(test)]
mod tests;
