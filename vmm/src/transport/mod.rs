//! virtio over PCI (virtio 1.2 §4.1): carries a [`VirtioDevice`] as a PCI function.
//!
//! ```text
//!   BAR 0   0x00000  common configuration: features, status, queues   (§4.1.4.3)
//!           0x01000  ISR status                                       (§4.1.4.5)
//!           0x02000  device-specific configuration                    (§4.1.4.6)
//!           0x03000  doorbells, 4 bytes per queue                     (§4.1.4.4)   ─► ioeventfd, no exit to user space
//!           0x08000  MSI-X table     0x10000  pending bits
//! ```
//!
//! The driver's steps are checked, not trusted (§3.1.1, §4.1.4.3.2):
//!
//! | the driver ...                                | the transport ...                                       |
//! |-----------------------------------------------|---------------------------------------------------------|
//! | acknowledges features that were not offered   | does not accept FEATURES_OK                             |
//! | changes a queue that is enabled or running    | ignores it                                              |
//! | sets DRIVER_OK with a queue outside of memory | sets DEVICE_NEEDS_RESET, the device is not activated    |
//! | sets status to 0                              | stops the device; status reads 0 when it really stands  |
//! | clears single status bits                     | ignores it                                              |
//!
//! A device that finds its ring broken says so through [`DeviceEvents::needs_reset`]; the guest sees DEVICE_NEEDS_RESET and
//! may reset the device. Neither ends the VM.

mod registers;

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_core::virtio_queue::{Queue, QueueState, QueueT};
use virtio_core::{Activation, ActiveQueue, DeviceEvents, GuestMemory, VirtioDevice, device_type, feature};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::eventfds;
use crate::pci::{BarKind, ConfigSpace, Identity, Msix, NO_VECTOR, PciFunction};
use crate::platform::GuestLines;
use crate::vm::{KvmError, Vm};

/// Bytes of BAR 0.
pub const BAR_SIZE: u64 = 0x2_0000;

/// Places in BAR 0.
mod place {
    pub(super) const COMMON: u64 = 0;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const NOTIFY_END: u64 = 0x8000;
    pub(super) const MSIX_TABLE: u64 = 0x8000;
    pub(super) const MSIX_PENDING: u64 = 0x1_0000;
    pub(super) const END: u64 = super::BAR_SIZE;
}

/// Bytes between the doorbells of two queues.
const DOORBELL_STRIDE: u64 = 4;

/// Device status bits (§2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
}

/// ISR status bit: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What the machine wants to know of a device's life.
pub trait TransportEvents: Send + Sync {
    /// The guest's driver set DRIVER_OK and the device runs.
    fn activated(&self);
    /// The device stopped because the driver broke the rules.
    fn needs_reset(&self, reason: &str);
}

/// State that queue workers touch: atomics and an eventfd, so that a worker never waits for a vCPU or the reverse.
struct Shared {
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    /// Counts activations, so that a late report of a device's earlier life is ignored.
    life: AtomicU64,
    config_interrupt: EventFd,
    events: Arc<dyn TransportEvents>,
}

impl Shared {
    fn interrupt_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        // The eventfd is non-blocking: it can only fail when an interrupt is pending 2^64 times over.
        let _ = self.config_interrupt.write(1);
    }

    fn set_needs_reset(&self, reason: &str) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET == 0 {
            if before & status::DRIVER_OK != 0 {
                self.interrupt_config();
            }
            self.events.needs_reset(reason);
        }
    }
}

/// A device's way to its transport during one life.
struct Life {
    shared: Arc<Shared>,
    number: u64,
}

impl Life {
    fn is_over(&self) -> bool {
        self.shared.life.load(Ordering::SeqCst) != self.number
    }
}

impl DeviceEvents for Life {
    fn config_changed(&self) {
        if !self.is_over() {
            self.shared.generation.fetch_add(1, Ordering::SeqCst);
            self.shared.interrupt_config();
        }
    }

    fn needs_reset(&self, reason: &str) {
        if !self.is_over() {
            self.shared.set_needs_reset(reason);
        }
    }
}

/// A queue as the driver configures it.
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
    kick: EventFd,
    call: EventFd,
}

impl QueueSetup {
    fn reset(&mut self) {
        (self.size, self.enabled) = (self.max_size, false);
        (self.descriptors, self.driver_area, self.device_area) = (0, 0, 0);
        // A doorbell of the old life must not ring in the new one.
        eventfds::drain(&self.kick);
    }

    /// The queue for the device.
    fn build(&self, event_index: bool, memory: &GuestMemory) -> Option<Queue> {
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_index,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver_area,
            used_ring: self.device_area,
        })
        .ok()?;
        queue.is_valid(&**memory).then_some(queue)
    }
}

struct Inner {
    config: ConfigSpace,
    msix: Msix,
    msix_capability: usize,
    window_capability: usize,
    device: Box<dyn VirtioDevice>,
    queues: Vec<QueueSetup>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    active: bool,
    /// The driver asked for a reset, and requests are still in flight.
    resetting: bool,
    /// BAR address at which the doorbells are connected.
    doorbells: Option<u64>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    vm: Arc<Vm>,
    memory: GuestMemory,
    memory_stays: bool,
    shared: Arc<Shared>,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("VirtioPci")
            .field("status", &self.shared.status)
            .finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Makes a function of `device`, with BAR 0 at `address` (a multiple of [`BAR_SIZE`]). For `memory_stays` see [`Activation`].
    ///
    /// # Errors
    /// No eventfd or interrupt route can be had. The device is lost then; devices are made anew from their back ends.
    pub fn new(
        vm: Arc<Vm>,
        memory: GuestMemory,
        memory_stays: bool,
        device: Box<dyn VirtioDevice>,
        address: u64,
        events: Arc<dyn TransportEvents>,
    ) -> Result<Self, TransportError> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(TransportError::EventFd);
        let mut queues = Vec::new();
        let mut sources = Vec::new();
        for &max_size in device.queue_max_sizes() {
            let (kick, call) = (event()?, event()?);
            sources.push(call.try_clone().map_err(TransportError::EventFd)?);
            queues.push(QueueSetup {
                max_size,
                size: max_size,
                enabled: false,
                descriptors: 0,
                driver_area: 0,
                device_area: 0,
                kick,
                call,
            });
        }
        let config_interrupt = event()?;
        sources.push(config_interrupt.try_clone().map_err(TransportError::EventFd)?);
        let msix = Msix::new(vm.clone(), sources)?;

        let kind = device.device_type();
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            // §4.1.2: 0x1040 plus the device type.
            device: u16::try_from(0x1040 + kind).unwrap_or(0x1040),
            class: class_of(kind),
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(BarKind::Memory64, BAR_SIZE, address);
        #[allow(clippy::cast_possible_truncation, reason = "places in a BAR of 128 KiB")]
        let msix_capability = config.add_capability(
            0x11,
            &msix.capability(place::MSIX_TABLE as u32, place::MSIX_PENDING as u32),
            &Msix::CAPABILITY_WRITABLE,
        );
        let window_capability = registers::add_capabilities(&mut config);

        let shared = Arc::new(Shared {
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            life: AtomicU64::new(0),
            config_interrupt,
            events,
        });
        let inner = Inner {
            config,
            msix,
            msix_capability,
            window_capability,
            device,
            queues,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            active: false,
            resetting: false,
            doorbells: None,
        };
        Ok(VirtioPci {
            vm,
            memory,
            memory_stays,
            shared,
            inner: Mutex::new(inner),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to stop the device and takes its doorbells away, as a machine that goes down or a removal does: the function must
    /// not be reachable for the guest any more. See [`Self::is_idle`].
    pub fn stop(&self) {
        let inner = &mut *self.lock();
        self.begin_reset(inner);
        place_doorbells(&self.vm, inner, None);
    }

    /// Whether the device touches guest memory no more.
    pub fn is_idle(&self) -> bool {
        self.finish_reset(&mut self.lock())
    }

    /// Takes the device out, to put it into another machine. The device must be stopped and idle.
    pub fn into_device(self) -> Box<dyn VirtioDevice> {
        self.inner
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .device
    }

    /// Calls `change` with the device, for example to resize a disk.
    pub fn with_device<R>(&self, change: impl FnOnce(&mut dyn VirtioDevice) -> R) -> R {
        change(&mut *self.lock().device)
    }

    /// The features offered to the driver.
    fn offered(inner: &Inner) -> u64 {
        inner.device.features() | feature::VERSION_1
    }

    /// What the driver reads as device status.
    fn status(&self, inner: &mut Inner) -> u8 {
        self.finish_reset(inner);
        self.shared.status.load(Ordering::SeqCst)
    }

    fn write_status(&self, inner: &mut Inner, value: u8) {
        if value == 0 {
            self.begin_reset(inner);
            return;
        }
        if !self.finish_reset(inner) {
            return;
        }
        let old = self.shared.status.load(Ordering::SeqCst);
        let mut new = value & !old & !status::NEEDS_RESET;
        if new & status::FEATURES_OK != 0 && !self.features_are_fine(inner) {
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        let state = self.shared.status.fetch_or(new, Ordering::SeqCst) | new;
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        if new & status::DRIVER_OK != 0 && state & (ready | status::FAILED) == ready {
            self.activate(inner);
        } else if new & status::DRIVER_OK != 0 {
            self.shared
                .set_needs_reset("the driver set DRIVER_OK before it had agreed on features");
        }
    }

    fn features_are_fine(&self, inner: &Inner) -> bool {
        inner.driver_features & !Self::offered(inner) == 0 && inner.driver_features & feature::VERSION_1 != 0
    }

    fn activate(&self, inner: &mut Inner) {
        if let Err(reason) = self.try_activate(inner) {
            static LINES: GuestLines = GuestLines::new();
            if let Some(suppressed) = LINES.allow() {
                tracing::warn!(reason, suppressed, "a virtio device cannot be activated");
            }
            self.shared.set_needs_reset(&reason);
        } else {
            self.shared.events.activated();
        }
    }

    fn try_activate(&self, inner: &mut Inner) -> Result<(), String> {
        let event_index = inner.driver_features & feature::RING_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, setup) in (0..).zip(&inner.queues).filter(|(_, setup)| setup.enabled) {
            let queue = setup
                .build(event_index, &self.memory)
                .ok_or_else(|| format!("the rings of virtqueue {index} are not in guest memory"))?;
            let clone = |event: &EventFd| event.try_clone().map_err(|error| error.to_string());
            queues.push(ActiveQueue {
                index,
                queue,
                kick: clone(&setup.kick)?,
                call: clone(&setup.call)?,
            });
        }
        let number = self.shared.life.fetch_add(1, Ordering::SeqCst) + 1;
        let activation = Activation {
            memory: self.memory.clone(),
            memory_stays: self.memory_stays,
            features: inner.driver_features,
            queues,
            events: Arc::new(Life {
                shared: self.shared.clone(),
                number,
            }),
        };
        // Set before: a device that fails half-way is stopped by the reset as well.
        inner.active = true;
        inner
            .device
            .activate(activation)
            .map_err(|error| error.to_string())
    }

    fn begin_reset(&self, inner: &mut Inner) {
        self.shared.life.fetch_add(1, Ordering::SeqCst);
        if inner.active {
            inner.device.reset();
            (inner.active, inner.resetting) = (false, true);
        }
        if !inner.resetting {
            self.clear(inner);
        } else {
            self.finish_reset(inner);
        }
    }

    /// Ends a reset if the device stands still. True: no reset is going on.
    fn finish_reset(&self, inner: &mut Inner) -> bool {
        if inner.resetting && inner.device.is_idle() {
            inner.resetting = false;
            self.clear(inner);
        }
        !inner.resetting
    }

    fn clear(&self, inner: &mut Inner) {
        inner.msix.unassign_all();
        for queue in &mut inner.queues {
            queue.reset();
        }
        (inner.device_feature_select, inner.driver_feature_select) = (0, 0);
        (inner.driver_features, inner.queue_select) = (0, 0);
        self.shared.isr.store(0, Ordering::SeqCst);
        self.shared.status.store(0, Ordering::SeqCst);
    }

    fn read_bar(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            place::COMMON..place::ISR => self.read_common(inner, offset, data),
            place::ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.shared.isr.swap(0, Ordering::SeqCst);
                }
            }
            place::DEVICE..place::NOTIFY => inner.device.read_config(offset - place::DEVICE, data),
            place::MSIX_TABLE..place::MSIX_PENDING => {
                inner.msix.read_table(
                    usize::try_from(offset - place::MSIX_TABLE).unwrap_or(usize::MAX),
                    data,
                );
            }
            place::MSIX_PENDING..place::END => {
                inner.msix.read_pending(
                    usize::try_from(offset - place::MSIX_PENDING).unwrap_or(usize::MAX),
                    data,
                );
            }
            _ => {}
        }
    }

    fn write_bar(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match offset {
            place::COMMON..place::ISR => self.write_common(inner, offset, data),
            place::DEVICE..place::NOTIFY => inner.device.write_config(offset - place::DEVICE, data),
            place::NOTIFY..place::NOTIFY_END => {
                // Only while the doorbell is not connected to KVM, or through the configuration window.
                let queue = usize::try_from((offset - place::NOTIFY) / DOORBELL_STRIDE).unwrap_or(usize::MAX);
                if let Some(queue) = inner.queues.get(queue) {
                    eventfds::signal(&queue.kick);
                }
            }
            place::MSIX_TABLE..place::MSIX_PENDING => {
                inner.msix.write_table(
                    usize::try_from(offset - place::MSIX_TABLE).unwrap_or(usize::MAX),
                    data,
                );
            }
            _ => {}
        }
    }
}

/// Connects the doorbells for a BAR at `address`, or nowhere.
fn place_doorbells(vm: &Vm, inner: &mut Inner, address: Option<u64>) {
    // A guest that lets BARs overlap causes both.
    static LINES: GuestLines = GuestLines::new();
    if inner.doorbells == address {
        return;
    }
    let doorbell = |base: u64, index: u64| base + place::NOTIFY + index * DOORBELL_STRIDE;
    if let Some(old) = inner.doorbells.take() {
        for (index, queue) in (0..).zip(&inner.queues) {
            if let Err(error) = vm.disconnect_doorbell(&queue.kick, doorbell(old, index))
                && let Some(suppressed) = LINES.allow()
            {
                tracing::warn!(error = %error, suppressed, "a doorbell stays connected at its old address");
            }
        }
    }
    let Some(new) = address else { return };
    for (index, queue) in (0..).zip(&inner.queues) {
        if let Err(error) = vm.connect_doorbell(&queue.kick, doorbell(new, index))
            && let Some(suppressed) = LINES.allow()
        {
            // Still works: the write exits to user space, where `write_bar` rings the bell.
            tracing::warn!(error = %error, suppressed, "a doorbell cannot be connected; notifications are slow");
        }
    }
    inner.doorbells = Some(new);
}

/// PCI class of a virtio device type, as QEMU chooses them.
fn class_of(kind: u32) -> u32 {
    match kind {
        device_type::NET => 0x02_00_00,
        device_type::BLOCK | device_type::SCSI => 0x01_00_00,
        device_type::CONSOLE => 0x07_80_00,
        _ => 0xff_00_00,
    }
}

/// A device cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The process has no file descriptors left.
    #[error("cannot create an eventfd; raise the limit of open files (`ulimit -n`)")]
    EventFd(#[source] std::io::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let inner = &mut *self.lock();
        if let Some((place, length)) =
            registers::window_access(&inner.config, inner.window_capability, offset, data.len())
        {
            self.read_bar(inner, place, &mut data[..length]);
            return;
        }
        inner.config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let inner = &mut *self.lock();
        if let Some((place, length)) =
            registers::window_access(&inner.config, inner.window_capability, offset, data.len())
        {
            self.write_bar(inner, place, &data[..length]);
            return;
        }
        inner.config.write(offset, data);
        let control = inner.config.u32_at(inner.msix_capability) >> 16;
        inner.msix.set_control(u16::try_from(control).unwrap_or(0));
        let bar = inner.config.bar().map(|range| range.start);
        place_doorbells(&self.vm, inner, bar);
    }

    fn bar(&self) -> Option<Range<u64>> {
        self.lock().config.bar()
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        self.read_bar(&mut self.lock(), offset, data);
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        self.write_bar(&mut self.lock(), offset, data);
    }
}
