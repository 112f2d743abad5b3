//! The guest's side of a virtqueue, for tests and benches: what a driver does, and what it must not do.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "test support"
)]

pub mod fickle;
pub mod scsi;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_core::virtio_queue::{Queue, QueueT};
use virtio_core::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use virtio_core::{Activation, ActiveQueue, DeviceEvents, GuestMemory, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Everything takes at most this long, or hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the transport was told.
#[derive(Default)]
pub struct Events {
    pub config_changes: AtomicU32,
    pub reset_reasons: Mutex<Vec<String>>,
}

impl DeviceEvents for Events {
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::Relaxed);
    }

    fn needs_reset(&self, reason: &str) {
        self.reset_reasons.lock().unwrap().push(reason.to_owned());
    }
}

impl Events {
    /// Waits until the device gave up, and says why.
    pub fn wait_for_reset_reason(&self) -> String {
        let start = Instant::now();
        loop {
            if let Some(reason) = self.reset_reasons.lock().unwrap().first() {
                return reason.clone();
            }
            assert!(start.elapsed() < PATIENCE, "the device did not ask for a reset");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn memory(size: usize) -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

/// A descriptor that the device reads.
pub fn readable(address: u64, length: usize) -> Descriptor {
    Descriptor {
        address,
        length: length as u32,
        flags: 0,
        next: 0,
    }
}

/// A descriptor that the device writes.
pub fn writable(address: u64, length: usize) -> Descriptor {
    Descriptor {
        flags: WRITE,
        ..readable(address, length)
    }
}

/// One virtqueue at `base`: descriptor table, available ring, used ring.
pub struct Driver {
    pub memory: GuestMemory,
    pub size: u16,
    pub base: u64,
    pub event_index: bool,
    available: u16,
    used: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Driver {
    pub fn new(memory: &GuestMemory, base: u64, size: u16, event_index: bool) -> Self {
        let driver = Self {
            memory: Arc::clone(memory),
            size,
            base,
            event_index,
            available: 0,
            used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        };
        memory
            .write_slice(&vec![0; Self::bytes(size)], GuestAddress(base))
            .unwrap();
        driver
    }

    /// Memory that a queue needs.
    pub fn bytes(size: u16) -> usize {
        usize::from(size) * (16 + 2 + 8) + 64
    }

    pub fn available_ring(&self) -> u64 {
        self.base + u64::from(self.size) * 16
    }

    pub fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    pub fn active(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        let set = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = set(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = set(self.available_ring());
        queue.set_avail_ring_address(low, high);
        let (low, high) = set(self.used_ring());
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.event_index);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue {
            index,
            queue,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        }
    }

    pub fn store(&self, table: u64, index: u16, descriptor: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(table + u64::from(index) * 16))
            .unwrap();
    }

    /// Stores a chain in consecutive descriptors from `first` on.
    pub fn store_chain(&self, first: u16, chain: &[Descriptor]) {
        self.store_chain_in(self.base, first, chain);
    }

    pub fn store_chain_in(&self, table: u64, first: u16, chain: &[Descriptor]) {
        for (place, descriptor) in (first..).zip(chain) {
            let last = usize::from(place - first) + 1 == chain.len();
            let flags = descriptor.flags | if last { 0 } else { NEXT };
            self.store(
                table,
                place,
                Descriptor {
                    flags,
                    next: place + 1,
                    ..*descriptor
                },
            );
        }
    }

    /// Puts `head` into the available ring without telling anybody.
    pub fn add(&mut self, head: u16) {
        let place = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.available = self.available.wrapping_add(1);
    }

    pub fn publish(&self) {
        self.memory
            .store(
                self.available,
                GuestAddress(self.available_ring() + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    pub fn publish_index(&self, index: u16) {
        self.memory
            .store(index, GuestAddress(self.available_ring() + 2), Ordering::SeqCst)
            .unwrap();
    }

    /// Rings the doorbell.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Whether the device wants its doorbell rung for what was published since `old`.
    pub fn needs_kick(&self, old: u16) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.event_index {
            let place = self.used_ring() + 4 + 8 * u64::from(self.size);
            let event: u16 = self.memory.load(GuestAddress(place), Ordering::SeqCst).unwrap();
            self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old)
        } else {
            let flags: u16 = self
                .memory
                .load(GuestAddress(self.used_ring()), Ordering::SeqCst)
                .unwrap();
            flags & 1 == 0
        }
    }

    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// Adds one chain and rings the doorbell.
    pub fn submit(&mut self, first: u16, chain: &[Descriptor]) {
        self.store_chain(first, chain);
        self.add(first);
        self.publish();
        self.kick();
    }

    pub fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst)
            .unwrap()
    }

    /// The next used element, if there is one: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let place = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        let element: [u32; 2] = self.memory.read_obj(GuestAddress(place)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((element[0] as u16, element[1]))
    }

    /// Asks for an interrupt with the next used element.
    pub fn enable_interrupt(&self) {
        let place = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.memory
            .store(self.used, GuestAddress(place), Ordering::SeqCst)
            .unwrap();
    }

    /// Waits for the interrupt, then takes the next used element.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            self.enable_interrupt();
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "the device does not answer");
            self.wait_for_interrupt(PATIENCE);
        }
    }

    /// Whether an interrupt came within `time`.
    pub fn wait_for_interrupt(&self, time: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.call.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, alive during the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, time.as_millis() as i32) };
        ready == 1 && self.call.read().is_ok()
    }
}

pub fn activate(
    device: &mut dyn VirtioDevice,
    memory: &GuestMemory,
    features: u64,
    queues: Vec<ActiveQueue>,
) -> Arc<Events> {
    let events = Arc::new(Events::default());
    let activation = Activation {
        memory_stays: false,
        memory: Arc::clone(memory),
        features,
        queues,
        events: Arc::clone(&events) as Arc<dyn DeviceEvents>,
    };
    device.activate(activation).unwrap();
    events
}

pub fn reset_and_wait(device: &mut dyn VirtioDevice) {
    device.reset();
    let start = Instant::now();
    while !device.is_idle() {
        assert!(start.elapsed() < PATIENCE, "the device does not become idle");
        std::thread::sleep(Duration::from_millis(1));
    }
}
