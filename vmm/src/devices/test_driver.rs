//! A driver for tests of devices: memory, rings and doorbells as a guest would use them.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::EventManager;
use virtio_core::{Activation, ActiveQueue, DeviceEvents, GuestMemory, VirtioDevice, feature};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::event_loop::{EventLoop, Subscriber};

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Guest memory has two regions with a hole between them.
pub(crate) const MEMORY_SIZE: usize = 32 << 20;
/// Where the second begins.
pub(crate) const HIGH_MEMORY: u64 = 1 << 32;
/// Buffers of tests start here; the rings lie below.
pub(crate) const BUFFERS: u64 = 4 << 20;

const QUEUE_SPACING: u64 = 0x2_0000;
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x1_8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What the device told its transport.
#[derive(Default)]
pub(crate) struct Events {
    pub(crate) config_changes: AtomicUsize,
    reasons: Mutex<Vec<String>>,
}

impl DeviceEvents for Events {
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, reason: &str) {
        self.reasons.lock().unwrap().push(reason.to_owned());
    }
}

impl Events {
    /// Why the device needs a reset, if it does.
    pub(crate) fn reset_reason(&self) -> Option<String> {
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        reasons.first().cloned()
    }
}

/// A piece of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(address: u64, length: usize) -> Piece {
    Piece {
        address,
        length: u32::try_from(length).unwrap(),
        writable: false,
    }
}

pub(crate) fn writable(address: u64, length: usize) -> Piece {
    Piece {
        writable: true,
        ..readable(address, length)
    }
}

/// A chain that the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) written: u32,
}

/// The driver's side of one queue.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    base: u64,
    pub(crate) size: u16,
    event_idx: bool,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    avail: u16,
    next_descriptor: u16,
    seen: u16,
}

impl DriverQueue {
    fn new(memory: &GuestMemory, index: u16, size: u16, event_idx: bool) -> Self {
        let queue = Self {
            memory: Arc::clone(memory),
            base: u64::from(index) * QUEUE_SPACING + 0x1000,
            size,
            event_idx,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            next_descriptor: 0,
            seen: 0,
        };
        // A used ring may not bring back what an earlier life of the device left.
        memory
            .write_slice(&[0; 0x1_0000], GuestAddress(queue.base + AVAIL))
            .unwrap();
        queue
    }

    fn active(&self, index: u16, max_size: u16) -> ActiveQueue {
        let mut queue = Queue::new(max_size).unwrap();
        queue.set_size(self.size);
        queue.set_event_idx(self.event_idx);
        let half = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(half(self.base), Some(0));
        queue.set_avail_ring_address(half(self.base + AVAIL), Some(0));
        queue.set_used_ring_address(half(self.base + USED), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue {
            index,
            queue,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        }
    }

    /// Writes one descriptor as it is.
    pub(crate) fn store(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(self.base + 16 * u64::from(index)))
            .unwrap();
    }

    /// Puts a chain into descriptors, which are used round about, and makes it available without a doorbell.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (number, piece) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let last = number + 1 == pieces.len();
            let flags = if piece.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.store(index, piece.address, piece.length, flags, self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// The same through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        for (number, piece) in (0_u16..).zip(pieces) {
            let last = usize::from(number) + 1 == pieces.len();
            let flags = if piece.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&piece.address.to_le_bytes());
            bytes[8..12].copy_from_slice(&piece.length.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(number + 1).to_le_bytes());
            self.memory
                .write_slice(&bytes, GuestAddress(table + 16 * u64::from(number)))
                .unwrap();
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        self.store(
            head,
            table,
            u32::try_from(16 * pieces.len()).unwrap(),
            INDIRECT,
            0,
        );
        self.publish(head);
        head
    }

    /// Makes the chain that starts at `head` available.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.memory
            .write_obj(head.to_le(), GuestAddress(self.base + AVAIL + 4 + 2 * slot))
            .unwrap();
        self.set_avail_index(self.avail.wrapping_add(1));
    }

    /// Sets the available index, sensible or not.
    pub(crate) fn set_avail_index(&mut self, index: u16) {
        self.avail = index;
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.base + AVAIL + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    /// Rings the doorbell.
    pub(crate) fn ring(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that the device gave back, if there is one.
    pub(crate) fn try_used(&mut self) -> Option<Used> {
        let used = GuestAddress(self.base + USED + 2);
        let index = u16::from_le(self.memory.load(used, Ordering::SeqCst).unwrap());
        if index == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.size);
        let entry: u64 = self
            .memory
            .read_obj(GuestAddress(self.base + USED + 4 + 8 * slot))
            .unwrap();
        let entry = u64::from_le(entry);
        self.seen = self.seen.wrapping_add(1);
        if self.event_idx {
            // Interrupt again with the next entry.
            let used_event = GuestAddress(self.base + AVAIL + 4 + 2 * u64::from(self.size));
            self.memory
                .store(self.seen.to_le(), used_event, Ordering::SeqCst)
                .unwrap();
        }
        Some(Used {
            head: u16::try_from(entry & 0xffff_ffff).unwrap(),
            written: u32::try_from(entry >> 32).unwrap(),
        })
    }

    /// Waits for the next chain that the device gives back, as a driver that sleeps until interrupted.
    pub(crate) fn used(&mut self) -> Used {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.try_used() {
                return used;
            }
            assert!(
                wait_readable(&self.call, deadline.saturating_duration_since(Instant::now())),
                "no interrupt"
            );
            let _ = self.call.read();
        }
    }

    /// How many interrupts came since this was asked last.
    pub(crate) fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

/// Whether `fd` becomes readable in time.
pub(crate) fn wait_readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let mut polled = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which lives until the call returns.
    unsafe { libc::poll(&raw mut polled, 1, i32::try_from(timeout.as_millis()).unwrap()) == 1 }
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A guest with one device.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) events: Arc<Events>,
}

impl Driver {
    /// Activates `device` with all its queues and those of its features that are in `wanted`.
    pub(crate) fn new(device: &mut dyn VirtioDevice, wanted: u64) -> Self {
        let regions = [
            (GuestAddress(0), MEMORY_SIZE / 2),
            (GuestAddress(HIGH_MEMORY), MEMORY_SIZE / 2),
        ];
        let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let mut driver = Self {
            memory,
            queues: Vec::new(),
            events: Arc::default(),
        };
        driver.activate(device, wanted);
        driver
    }

    /// Activates the device anew, with empty rings.
    pub(crate) fn activate(&mut self, device: &mut dyn VirtioDevice, wanted: u64) {
        let features = device.features() & wanted | feature::VERSION_1;
        let event_idx = features & feature::RING_EVENT_IDX != 0;
        self.events = Arc::default();
        self.queues = (0..)
            .zip(device.queue_max_sizes())
            .map(|(index, size)| DriverQueue::new(&self.memory, index, *size, event_idx))
            .collect();
        let queues = (0..)
            .zip(&self.queues)
            .map(|(index, queue)| queue.active(index, queue.size))
            .collect();
        device
            .activate(Activation {
                memory_stays: false,
                memory: Arc::clone(&self.memory),
                features,
                queues,
                events: Arc::clone(&self.events) as Arc<dyn DeviceEvents>,
            })
            .unwrap();
    }

    /// Resets the device and waits until it stands still.
    pub(crate) fn reset(device: &mut dyn VirtioDevice) {
        device.reset();
        eventually("the end of a reset", || device.is_idle());
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn reset_reason(&self) -> String {
        eventually("a needed reset", || self.events.reset_reason().is_some());
        self.events.reset_reason().unwrap()
    }
}

/// An event loop on a thread of its own.
pub(crate) struct TestLoop {
    handle: EventLoop,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TestLoop {
    pub(crate) fn new() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut manager = EventManager::<Subscriber>::new().unwrap();
            sender.send(manager.remote_endpoint()).unwrap();
            while !stopping.load(Ordering::SeqCst) {
                manager.run().unwrap();
            }
        });
        Self {
            handle: receiver.recv().unwrap(),
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn handle(&self) -> EventLoop {
        self.handle.clone()
    }
}

impl Drop for TestLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.handle.kick().unwrap();
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || std::thread::panicking());
    }
}
