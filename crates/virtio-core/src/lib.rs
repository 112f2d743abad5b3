//! What a virtio device and the transport that carries it agree on.
//!
//! A device (virtio-blk in `storage-virtualizer`, virtio-net in `vmm`) knows nothing of PCI, MSI-X or KVM; a transport
//! (virtio over PCI in `vmm`, vhost-user in `storage-virtualizer`) knows nothing of disks or packets. Between them stands
//! this crate: plain guest memory, plain virtqueues, and two eventfds per queue.
//!
//! ```text
//!   driver ──doorbell──► kick eventfd ──► device drains the queue in one go
//!                                           │ completions, in any order
//!   driver ◄──MSI-X────── call eventfd ◄── add_used* , notify (at most one per batch)
//! ```
//!
//! In the VMM the kick is a KVM ioeventfd and the call a KVM irqfd; under vhost-user both come over the socket. Masking an
//! interrupt is the transport's business: it takes the irqfd away, and KVM delivers what has piled up when it is put back.
//!
//! # Life of a device
//!
//! ```text
//!             DRIVER_OK                     status := 0
//!   reset ──► activate() ──► running ──► reset() ──► draining ──► is_idle() == true ──► reset
//!                               │
//!                               └─ the driver breaks the rules ──► events.needs_reset(reason), the queues stop
//! ```
//!
//! Nothing in a running device changes its queues' addresses or sizes: the transport refuses such writes (virtio 1.2
//! §2.1.2, §4.1.4.3.2), so a device may keep what it was given.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use virtio_queue;
pub use vm_memory;

/// The guest's physical memory: all regions, mapped into this process. Cheap to clone.
pub type GuestMemory = Arc<GuestMemoryMmap>;

/// Feature bits of virtio 1.2 §6 that belong to queues and transport, not to one kind of device.
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: descriptors may point to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say when they want to be notified.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not a legacy device. The transport always offers and demands it.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device types of virtio 1.2 §5.
pub mod device_type {
    /// Network card (§5.1).
    pub const NET: u32 = 1;
    /// Block device (§5.2).
    pub const BLOCK: u32 = 2;
    /// Console (§5.3).
    pub const CONSOLE: u32 = 3;
    /// Entropy source (§5.4).
    pub const ENTROPY: u32 = 4;
    /// SCSI host (§5.6).
    pub const SCSI: u32 = 8;
}

/// Why a virtqueue cannot be served any more, or an activation failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver left the ring in a state that the specification forbids.
    #[error("virtqueue {index}: {source}")]
    Queue {
        /// Number of the queue within its device.
        index: u16,
        /// What virtio-queue found.
        source: virtio_queue::Error,
    },
    /// The driver activated the device without the queues that it needs.
    #[error("the driver enabled {enabled} queues, the device needs {needed}")]
    MissingQueues {
        /// Queues that the driver enabled.
        enabled: usize,
        /// Queues without which the device cannot work.
        needed: usize,
    },
    /// The host refused something that the device needs to run.
    #[error("cannot {action}")]
    Host {
        /// What was tried, for example `start the queue worker`.
        action: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

/// What a running device tells its transport outside of queue completions. Never blocks.
pub trait DeviceEvents: Send + Sync {
    /// The device's configuration space changed (a disk was resized): raise the configuration interrupt.
    fn config_changed(&self);

    /// The driver broke the protocol so badly that the device stopped: set DEVICE_NEEDS_RESET (virtio 1.2 §2.1.2).
    /// `reason` goes to the log, rate-limited.
    fn needs_reset(&self, reason: &str);
}

/// A virtqueue in use, with its doorbell and its interrupt.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Number of the queue within its device.
    pub index: u16,
    /// Addresses, size and indices; validated by the transport.
    pub queue: Queue,
    /// Readable when the driver added buffers.
    pub kick: EventFd,
    /// Written to interrupt the driver.
    pub call: EventFd,
}

impl ActiveQueue {
    /// Gives chain `head` back to the driver, `written` bytes of which the device wrote. Does not interrupt.
    ///
    /// # Errors
    /// The used ring lies outside of guest memory or `head` is not a descriptor of this queue.
    pub fn add_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queue
            .add_used(memory, head, written)
            .map_err(|source| self.error(source))
    }

    /// Interrupts the driver if it asked to be told of what was added since the last call (used_event of virtio 1.2
    /// §2.7.7). To be called once per batch.
    ///
    /// # Errors
    /// The rings lie outside of guest memory, or the eventfd cannot be written.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        if self
            .queue
            .needs_notification(memory)
            .map_err(|source| self.error(source))?
        {
            self.call.write(1).map_err(|source| DeviceError::Host {
                action: format!("signal the interrupt of virtqueue {}", self.index),
                source,
            })?;
        }
        Ok(())
    }

    /// `source` as an error of this queue.
    pub fn error(&self, source: virtio_queue::Error) -> DeviceError {
        DeviceError::Queue {
            index: self.index,
            source,
        }
    }
}

/// Everything that a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// All pages of it are there and stay where they are until the device was reset and is idle: a device may have the kernel hold them.
    pub memory_stays: bool,
    /// Features that driver and device agreed on, all 64 bits.
    pub features: u64,
    /// The queues that the driver enabled, in ascending order of index; not necessarily all that the device has.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the transport.
    pub events: Arc<dyn DeviceEvents>,
}

impl Activation {
    /// Whether driver and device agreed on all bits of `feature`.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }
}

impl std::fmt::Debug for Activation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Activation")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// A virtio device, seen from a transport. All methods are called from vCPU threads or the transport's own thread, one at a
/// time; none may wait for I/O.
pub trait VirtioDevice: Send {
    /// One of [`device_type`].
    fn device_type(&self) -> u32;

    /// The largest size of each queue, a power of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Features that the device offers, without [`feature::VERSION_1`], which the transport adds.
    fn features(&self) -> u64;

    /// Fills `data` with the device's configuration space from `offset` on; bytes beyond its end read as zero.
    /// `offset` and the length come from the guest unchecked.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the configuration space. Fields that are not writable are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: serve the queues from now on.
    ///
    /// # Errors
    /// The device cannot run; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Begins to stop: take no further requests. May return before requests in flight have ended; see [`Self::is_idle`].
    /// After it the device may be activated again. Does nothing if the device is not active.
    fn reset(&mut self);

    /// Whether everything that [`Self::reset`] began has ended, so that guest memory is not touched any more.
    fn is_idle(&mut self) -> bool;
}

/// Copies the part of `config` from `offset` on into `data`, zero beyond its end: the usual body of
/// [`VirtioDevice::read_config`].
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(available) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let length = available.len().min(data.len());
    data[..length].copy_from_slice(&available[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_config_beyond_its_end_gives_zeroes() {
        let mut data = [0xff; 4];
        read_config_bytes(&[1, 2, 3], 2, &mut data);
        assert_eq!(data, [3, 0, 0, 0]);
        read_config_bytes(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
