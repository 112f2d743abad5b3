//! virtio-scsi: a SCSI host adapter with its targets (virtio 1.2 §5.6).
//!
//! The adapter is a transport: it takes commands out of its queues, finds the logical unit, has [`crate::scsi`] do the command,
//! and tells what came of it. Logical units come and go while a driver runs, which is told by events.
//!
//! ```text
//!   request queues ─► service: Request → unit, tasks ─► scsi::execute ─► the unit's disk, past its gate
//!   control queue  ─► control: task management ──► tasks of all queues
//!   event queue    ◄─ events ◄── adapter: units added, removed, resized
//! ```

mod adapter;
mod config;
mod control;
mod events;
mod request;
mod service;
mod tasks;

use std::fmt;
use std::sync::Arc;

use block_io::WorkerHandle;
use virtio_core::{Activation, ActiveQueue, DeviceError, VirtioDevice, device_type, read_config_bytes};

pub use adapter::{FoundUnit, RemovedUnit, ScsiGroup, relative_port};
pub use config::feature as scsi_feature;

use crate::controls::DiskControls;
use crate::disk_handle::DiskHandle;
use crate::queue::{Control, Counters, QueueStart, QueueStatistics, Waiting};
use crate::scsi::{TargetError, TransportId, Unit};
use adapter::{Adapter, UnitDisk};
use control::ControlService;
use events::EventService;
use service::CommandService;

/// The most request queues of an adapter.
pub const MAX_QUEUES: u16 = 64;
/// The most entries of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Queues before the request queues: control, events.
const FIRST_REQUEST_QUEUE: u16 = 2;

/// What an adapter is like, beside its units.
#[derive(Debug, Clone)]
pub struct VirtioScsiOptions {
    /// The driver's port, as it appears in persistent reservations.
    pub initiator: TransportId,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries of each queue at most, a power of two from 4 to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// The highest target that there may be; a driver looks at all of them.
    pub last_target: u8,
}

/// An adapter cannot be made as asked for.
#[derive(Debug, thiserror::Error)]
pub enum VirtioScsiError {
    /// The number of queues is impossible.
    #[error("a SCSI adapter has 1 to {MAX_QUEUES} queues, not {queues}")]
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
    #[error("a SCSI adapter needs at least one worker")]
    NoWorker,
}

/// A logical unit cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddUnitError {
    /// The driver would not look there.
    #[error("target {target} is beyond the adapter's last one, {last}")]
    NoSuchTarget {
        /// What was asked for.
        target: u8,
        /// The last one.
        last: u8,
    },
    /// There is nothing to add it to.
    #[error("there is no SCSI adapter")]
    NoAdapter,
    /// The LUN.
    #[error(transparent)]
    Lun(#[from] TargetError),
}

/// A virtio-scsi device.
pub struct VirtioScsi<H> {
    adapter: Arc<Adapter<H>>,
    workers: Vec<WorkerHandle>,
    queue_sizes: Vec<u16>,
    last_target: u8,
    /// The servers of this activation and of earlier ones that have not ended.
    servers: Vec<Arc<Control>>,
}

/// Management of a virtio-scsi device, while the device itself belongs to its transport.
pub struct VirtioScsiHandle<H> {
    adapter: Arc<Adapter<H>>,
    last_target: u8,
}

impl<H> Clone for VirtioScsiHandle<H> {
    fn clone(&self) -> Self {
        Self {
            adapter: Arc::clone(&self.adapter),
            last_target: self.last_target,
        }
    }
}

impl<H> fmt::Debug for VirtioScsiHandle<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("VirtioScsiHandle").finish_non_exhaustive()
    }
}

impl<H: DiskHandle> VirtioScsiHandle<H> {
    /// Adds the logical unit `lun` of `target`: `unit` on `disk`, which obeys `controls`. A driver that is there is told; `found` is
    /// called when a driver sends something to the unit for the first time, and again after each reset of the adapter.
    ///
    /// # Errors
    /// It cannot have this place.
    pub fn add(
        &self,
        (target, lun): (u8, u16),
        unit: Arc<Unit>,
        disk: H,
        controls: Arc<DiskControls>,
        found: Option<FoundUnit>,
    ) -> Result<(), AddUnitError> {
        let last = self.last_target;
        if target > last {
            return Err(AddUnitError::NoSuchTarget { target, last });
        }
        let disk = UnitDisk::new(disk, controls, found);
        Ok(self.adapter.add(target, lun, unit, disk)?)
    }

    /// Tells a driver that a unit is going to be removed, while the unit still answers: so the driver can write what it still has to.
    /// False if no driver listens to events, or there is no such unit.
    pub fn announce_removal(&self, target: u8, lun: u16) -> bool {
        self.adapter.announce_removal(target, lun)
    }

    /// Removes a logical unit; commands that are in flight end. A driver that is there is told, unless it
    /// [was](Self::announce_removal). None if there is no such unit.
    pub fn remove(&self, target: u8, lun: u16) -> Option<RemovedUnit> {
        let unit = self.adapter.remove(target, lun)?;
        Some(RemovedUnit(Box::new(move || unit.strong_count() == 0)))
    }

    /// Whether a driver has sent something to a unit since the adapter was reset.
    pub fn is_found(&self, target: u8, lun: u16) -> bool {
        self.adapter.is_found(target, lun)
    }

    /// Bytes of a unit's disk; none if there is no such unit.
    pub fn size(&self, target: u8, lun: u16) -> Option<u64> {
        let unit = self.adapter.lun(target, lun)?;
        Some(unit.handle.disk().geometry().size)
    }

    /// Tells a driver that the size of a unit's disk has changed; the disk itself knows already.
    pub fn size_changed(&self, target: u8, lun: u16) {
        self.adapter.size_changed(target, lun);
    }

    /// What the request queues have done, one entry for each.
    pub fn counters(&self) -> Vec<Counters> {
        let statistics = self.adapter.statistics.iter();
        statistics.map(|statistics| statistics.counters()).collect()
    }
}

impl<H> fmt::Debug for VirtioScsi<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtioScsi")
            .field("queue_sizes", &self.queue_sizes)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

impl<H: DiskHandle> VirtioScsi<H> {
    /// An adapter without logical units, whose queues are served by `workers`: request queue n by worker n modulo their
    /// number.
    ///
    /// # Errors
    /// An option is impossible.
    pub fn new(options: &VirtioScsiOptions, workers: Vec<WorkerHandle>) -> Result<Self, VirtioScsiError> {
        Self::new_in(options, workers, None)
    }

    /// The same, for one of several adapters that share units.
    pub(crate) fn new_in(
        options: &VirtioScsiOptions,
        workers: Vec<WorkerHandle>,
        group: Option<&ScsiGroup<H>>,
    ) -> Result<Self, VirtioScsiError> {
        let VirtioScsiOptions {
            initiator,
            queues,
            queue_size,
            last_target,
        } = options;
        if !(1..=MAX_QUEUES).contains(queues) {
            return Err(VirtioScsiError::Queues { queues: *queues });
        }
        if !queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(queue_size) {
            return Err(VirtioScsiError::QueueSize {
                queue_size: *queue_size,
            });
        }
        if workers.is_empty() {
            return Err(VirtioScsiError::NoWorker);
        }
        let adapter = Arc::new(Adapter::new(initiator.clone(), *queues, group.cloned()));
        if let Some(group) = group {
            group.join(&adapter);
        }
        Ok(Self {
            adapter,
            workers,
            queue_sizes: vec![*queue_size; usize::from(*queues + FIRST_REQUEST_QUEUE)],
            last_target: *last_target,
            servers: Vec::new(),
        })
    }

    /// For management while the device runs.
    pub fn handle(&self) -> VirtioScsiHandle<H> {
        VirtioScsiHandle {
            adapter: Arc::clone(&self.adapter),
            last_target: self.last_target,
        }
    }

    /// The same adapter again, for the next driver.
    pub(crate) fn twin(&self) -> Self {
        Self {
            adapter: Arc::clone(&self.adapter),
            workers: self.workers.clone(),
            queue_sizes: self.queue_sizes.clone(),
            last_target: self.last_target,
            servers: Vec::new(),
        }
    }

    /// That of its disks, which are of one pool.
    pub(crate) fn continuity(&self) -> u64 {
        self.adapter.continuity()
    }

    /// A driver has chosen these features.
    pub(crate) fn negotiated(&self, features: u64) {
        self.adapter.negotiated(features);
    }

    /// The driver has gone without a word.
    pub(crate) fn disconnect(&self) {
        self.adapter.reset();
    }

    /// Has one queue served on its worker; nothing if the adapter has no such queue.
    pub(crate) fn serve_one(&self, start: QueueStart) -> Option<Arc<Control>> {
        let adapter = Arc::clone(&self.adapter);
        let first = &self.workers[0];
        // Nobody asks for the counters of these.
        let uncounted = Arc::<QueueStatistics>::default();
        Some(match start.queue.index {
            0 => start.serve(first, &uncounted, move || Ok(ControlService::new(adapter))),
            1 => {
                let events = Arc::clone(&adapter.events);
                let server = start.serve(first, &uncounted, move || Ok(EventService::new(events)));
                self.adapter.serve_events(Arc::clone(&server));
                server
            }
            index => {
                let queue = usize::from(index - FIRST_REQUEST_QUEUE);
                let statistics = Arc::clone(self.adapter.statistics.get(queue)?);
                let outlived = start.inflight.is_some();
                let worker = &self.workers[queue % self.workers.len()];
                let server = start.serve(worker, &Arc::clone(&statistics), move || {
                    Ok(CommandService::new(adapter, queue, statistics, outlived))
                });
                self.adapter.serve(queue, Arc::clone(&server));
                server
            }
        })
    }

    fn stop(&self) {
        self.servers
            .iter()
            .for_each(|server| server.stop(Waiting::Abandon));
    }
}

impl<H: DiskHandle> VirtioDevice for VirtioScsi<H> {
    fn device_type(&self) -> u32 {
        device_type::SCSI
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        config::FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let queues = self.adapter.queues();
        let space = self
            .adapter
            .sizes
            .space(queues, self.queue_sizes[0], self.last_target);
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.adapter.sizes.write(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // A driver may leave out request queues, or not care for events.
        let has = |index| {
            activation
                .queues
                .iter()
                .any(|queue: &ActiveQueue| queue.index == index)
        };
        if !has(0)
            || !activation
                .queues
                .iter()
                .any(|queue| queue.index >= FIRST_REQUEST_QUEUE)
        {
            return Err(DeviceError::MissingQueues {
                enabled: activation.queues.len(),
                needed: usize::from(FIRST_REQUEST_QUEUE) + 1,
            });
        }
        self.negotiated(activation.features);
        for queue in activation.queues {
            let server = self.serve_one(QueueStart {
                memory: Arc::clone(&activation.memory),
                memory_stays: activation.memory_stays,
                features: activation.features,
                queue,
                events: Arc::clone(&activation.events),
                inflight: None,
                unanswered: Vec::new(),
            });
            // The transport has only the queues that it was told of.
            self.servers.extend(server);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.adapter.reset();
    }

    fn is_idle(&mut self) -> bool {
        self.servers.retain(|server| !server.is_done());
        self.servers.is_empty()
    }
}

impl<H> Drop for VirtioScsi<H> {
    fn drop(&mut self) {
        self.servers
            .iter()
            .for_each(|server| server.stop(Waiting::Abandon));
    }
}
