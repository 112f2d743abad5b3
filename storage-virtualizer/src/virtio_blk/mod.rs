//! virtio-blk: a disk as Linux and everything else expects it in a virtual machine (virtio 1.2 §5.2).
//!
//! `crate::queue` takes chains out of a queue; `service` counts them and has them wait if they must, `request` says what they
//! ask for, `execute` has the disk do it, `config` is what the driver sees before all that.

mod config;
mod execute;
mod request;
mod service;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use block_io::WorkerHandle;
use virtio_core::{Activation, DeviceError, DeviceEvents, VirtioDevice, device_type, read_config_bytes};

pub use config::feature as blk_feature;
pub use execute::{Context, ID_LENGTH, execute, status_of};
pub use request::{Decoded, Range, Ranges, Request, Status, Unanswerable, decode, kind};

use crate::controls::DiskControls;
use crate::disk_handle::DiskHandle;
use crate::queue::{Control, Counters, Gate, QueueStart, QueueStatistics, Waiting};
use service::{BlkService, Settings};

/// The unit in which virtio-blk counts, whatever the block size (§5.2.4).
pub const SECTOR: u64 = 512;
/// The most entries of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The most queues of a disk: as many as a VM has CPUs.
pub const MAX_QUEUES: u16 = 64;

/// What fits of a name as a serial number.
pub fn fitting_serial(name: &str) -> String {
    let mut serial = String::new();
    for character in name.chars() {
        if serial.len() + character.len_utf8() > ID_LENGTH {
            break;
        }
        serial.push(character);
    }
    serial
}

/// What a virtio-blk device is like, beside its disk.
#[derive(Debug, Clone)]
pub struct VirtioBlkOptions {
    /// Identifier that the guest sees (`/dev/disk/by-id/virtio-…`); at most 20 bytes.
    pub serial: String,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries of each queue at most, a power of two from 4 to [`MAX_QUEUE_SIZE`]. Also limits the segments of a request.
    pub queue_size: u16,
    /// What can be set while the disk is in use; shared by all devices that show the disk.
    pub controls: Arc<DiskControls>,
}

impl Default for VirtioBlkOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            controls: Arc::default(),
        }
    }
}

/// A virtio-blk device cannot be made as asked for.
#[derive(Debug, thiserror::Error)]
pub enum VirtioBlkError {
    /// The serial does not fit.
    #[error("disk serial {serial:?} has {} bytes, at most {ID_LENGTH} fit", .serial.len())]
    Serial {
        /// The serial.
        serial: String,
    },
    /// The number of queues is impossible.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {queues}")]
    Queues {
        /// What was asked for.
        queues: u16,
    },
    /// The queue size is impossible.
    #[error("a queue has a power of two from 4 to {MAX_QUEUE_SIZE} entries, not {queue_size}")]
    QueueSize {
        /// What was asked for.
        queue_size: u16,
    },
    /// There is nobody to serve the queues.
    #[error("a disk needs at least one worker")]
    NoWorker,
}

/// A virtio-blk device on `disk`.
pub struct VirtioBlk<H> {
    shared: Arc<SharedState<H>>,
    workers: Vec<WorkerHandle>,
    queue_sizes: Vec<u16>,
    /// The servers of this activation and of earlier ones that have not ended.
    servers: Vec<Arc<Control>>,
}

/// What the device shares with its handles.
struct SharedState<H> {
    disk: H,
    settings: Arc<Settings>,
    controls: Arc<DiskControls>,
    statistics: Vec<Arc<QueueStatistics>>,
    /// The transport, while the device is active.
    events: Mutex<Option<Arc<dyn DeviceEvents>>>,
}

/// Management of a virtio-blk device, while the device itself belongs to its transport.
pub struct VirtioBlkHandle<H>(Arc<SharedState<H>>);

impl<H> Clone for VirtioBlkHandle<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H> fmt::Debug for VirtioBlkHandle<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtioBlkHandle")
            .field("settings", &self.0.settings)
            .finish_non_exhaustive()
    }
}

impl<H> VirtioBlkHandle<H> {
    /// The disk.
    pub fn disk(&self) -> &H {
        &self.0.disk
    }

    /// Tells the guest that the disk's size has changed; the disk itself knows already.
    pub fn size_changed(&self) {
        let events = self
            .0
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(events) = events {
            events.config_changed();
        }
    }

    /// What the queues have done, one entry for each.
    pub fn counters(&self) -> Vec<Counters> {
        self.0
            .statistics
            .iter()
            .map(|statistics| statistics.counters())
            .collect()
    }
}

impl<H> fmt::Debug for VirtioBlk<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtioBlk")
            .field("settings", &self.shared.settings)
            .field("queue_sizes", &self.queue_sizes)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

impl<H> VirtioBlk<H>
where
    H: DiskHandle,
{
    /// A device on `disk` whose queues are served by `workers`: queue n by worker n modulo their number.
    ///
    /// # Errors
    /// An option is impossible.
    pub fn new(
        disk: H,
        options: &VirtioBlkOptions,
        workers: Vec<WorkerHandle>,
    ) -> Result<Self, VirtioBlkError> {
        let VirtioBlkOptions {
            serial,
            queues,
            queue_size,
            controls,
        } = options;
        if serial.len() > ID_LENGTH {
            return Err(VirtioBlkError::Serial {
                serial: serial.clone(),
            });
        }
        if !(1..=MAX_QUEUES).contains(queues) {
            return Err(VirtioBlkError::Queues { queues: *queues });
        }
        if !queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(queue_size) {
            return Err(VirtioBlkError::QueueSize {
                queue_size: *queue_size,
            });
        }
        if workers.is_empty() {
            return Err(VirtioBlkError::NoWorker);
        }
        let mut id = [0; ID_LENGTH];
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        let statistics: Vec<Arc<QueueStatistics>> = (0..*queues).map(|_| Arc::default()).collect();
        controls.set_statistics(&statistics);
        Ok(Self {
            shared: Arc::new(SharedState {
                disk,
                settings: Arc::new(Settings {
                    id,
                    write_back: AtomicBool::new(true),
                }),
                controls: Arc::clone(controls),
                statistics,
                events: Mutex::default(),
            }),
            workers,
            queue_sizes: vec![*queue_size; usize::from(*queues)],
            servers: Vec::new(),
        })
    }

    /// For management while the device runs.
    pub fn handle(&self) -> VirtioBlkHandle<H> {
        VirtioBlkHandle(Arc::clone(&self.shared))
    }

    pub(crate) fn set_events(&self, events: Option<Arc<dyn DeviceEvents>>) {
        *self.shared.events.lock().unwrap_or_else(PoisonError::into_inner) = events;
    }

    /// Has one queue served on its worker; nothing if the device has no such queue.
    pub(crate) fn serve(&self, start: QueueStart) -> Option<Arc<Control>> {
        let queue = start.queue.index;
        let index = usize::from(queue);
        let statistics = self.shared.statistics.get(index)?;
        let has = |feature| start.features & feature == feature;
        let (flush, config_wce) = (has(blk_feature::FLUSH), has(blk_feature::CONFIG_WCE));
        let outlived = start.inflight.is_some();
        let shared = Arc::clone(&self.shared);
        let worker = &self.workers[index % self.workers.len()];
        Some(start.serve(worker, statistics, move || {
            Ok(BlkService {
                disk: shared.disk.local()?,
                settings: Arc::clone(&shared.settings),
                statistics: Arc::clone(&shared.statistics[index]),
                ring: shared.controls.recorder().ring(),
                queue,
                gate: Gate::new(Arc::clone(&shared.controls)),
                flush,
                config_wce,
                outlived,
            })
        }))
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.queue_sizes.len()).unwrap_or(MAX_QUEUES)
    }
}

impl<H> VirtioDevice for VirtioBlk<H>
where
    H: DiskHandle,
{
    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        config::features(&self.shared.disk.geometry(), self.queues())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = config::space(
            &self.shared.disk.geometry(),
            self.queues(),
            self.queue_sizes[0],
            self.shared.settings.write_back.load(Ordering::Relaxed),
        );
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK_OFFSET, [value]) = (offset, data) {
            self.shared
                .settings
                .write_back
                .store(value & 1 != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.is_empty() {
            return Err(DeviceError::MissingQueues {
                enabled: 0,
                needed: 1,
            });
        }
        self.set_events(Some(Arc::clone(&activation.events)));
        for queue in activation.queues {
            let control = self.serve(QueueStart {
                memory: Arc::clone(&activation.memory),
                memory_stays: activation.memory_stays,
                features: activation.features,
                queue,
                events: Arc::clone(&activation.events),
                inflight: None,
                unanswered: Vec::new(),
            });
            // The transport has only the queues that it was told of.
            self.servers.extend(control);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.set_events(None);
        self.shared.settings.write_back.store(true, Ordering::Relaxed);
        self.servers
            .iter()
            .for_each(|server| server.stop(Waiting::Abandon));
    }

    fn is_idle(&mut self) -> bool {
        self.servers.retain(|server| !server.is_done());
        self.servers.is_empty()
    }
}

impl<H> Drop for VirtioBlk<H> {
    fn drop(&mut self) {
        self.servers
            .iter()
            .for_each(|server| server.stop(Waiting::Abandon));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_cut_between_characters() {
        assert_eq!(fitting_serial("disk.img"), "disk.img");
        assert_eq!(fitting_serial(&"ä".repeat(20)), "ä".repeat(10));
    }
}
