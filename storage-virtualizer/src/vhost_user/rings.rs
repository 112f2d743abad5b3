//! The virtqueues of a front-end: what it has said of each, and which are served.
//!
//! ```text
//!               kick fd                   enabled, memory, size, addresses
//!   stopped ───────────────► started ────────────────────────────────────────► served by queue::server
//!      ▲                                                                          │
//!      └────────────── GET_VRING_BASE, reset, the front-end has gone ◄─────────────┘
//! ```
//! What changes under a queue that is served (memory, features, kick) stops it for a moment; it goes on where it was.

use std::sync::Arc;

use virtio_core::virtio_queue::{Queue, QueueT};
use virtio_core::vm_memory::MmapRegion;
use virtio_core::{ActiveQueue, DeviceEvents, GuestMemory, feature};
use vmm_sys_util::eventfd::EventFd;

use super::device::ServedDevice;
use super::memory::Memory;
use super::message::RingAddresses;
use super::sigbus::Guard;
use crate::inflight::{InflightError, InflightQueue, continues, forget};
use crate::queue::{Control, Outcome, QueueStart, Waiting};
use crate::virtio_blk::MAX_QUEUE_SIZE;

/// A queue cannot be served as the front-end set it up.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    /// A ring is not in the memory that the front-end shared.
    #[error("the rings of queue {0} are not in shared memory")]
    Addresses(u16),
    /// virtio-queue does not like it.
    #[error("the rings of queue {0} do not fit into memory or overlap")]
    Invalid(u16),
    /// The record of what is in flight.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// An eventfd.
    #[error("cannot make an eventfd")]
    Event(#[source] std::io::Error),
}

/// The record of what is in flight, for all queues.
pub(super) struct InflightRecord {
    /// Before the mapping, as it goes first.
    pub(super) _guard: Guard,
    pub(super) memory: Arc<MmapRegion>,
    pub(super) queues: u16,
    pub(super) entries: u16,
}

impl InflightRecord {
    /// Whether nothing that was answered before can be missing on disks of this number; it is noted for the next server.
    pub(super) fn continues(&self, continuity: u64) -> bool {
        continues(&self.memory, self.queues, self.entries, continuity)
    }

    /// Nothing is in flight any more: the device was reset.
    pub(super) fn forget(&self, continuity: u64) {
        forget(&self.memory);
        self.continues(continuity);
    }
}

/// One queue.
#[derive(Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// The next entry of the available ring.
    pub(super) base: u16,
    /// Set while the queue is started.
    pub(super) kick: Option<EventFd>,
    pub(super) call: Option<EventFd>,
    pub(super) enabled: bool,
    /// Taken and not answered when it was stopped.
    unanswered: Vec<u16>,
    server: Option<Arc<Control>>,
}

impl Ring {
    /// The front-end says where the queue goes on.
    pub(super) fn set_base(&mut self, base: u16) {
        self.base = base;
        self.unanswered.clear();
    }

    /// Interrupts by another eventfd.
    pub(super) fn set_call(&mut self, call: Option<EventFd>) -> Result<(), RingError> {
        if let Some(server) = &self.server {
            server.set_call(clone_or_new(call.as_ref())?);
        }
        self.call = call;
        Ok(())
    }

    fn is_due(&self) -> bool {
        self.server.is_none() && self.enabled && self.kick.is_some() && self.size != 0
    }
}

/// All queues.
pub(super) struct Rings {
    pub(super) rings: Vec<Ring>,
    pub(super) inflight: Option<InflightRecord>,
    /// See [`QueueStart::memory_stays`].
    memory_stays: bool,
}

impl Rings {
    pub(super) fn new(count: usize, memory_stays: bool) -> Self {
        Self {
            rings: (0..count).map(|_| Ring::default()).collect(),
            inflight: None,
            memory_stays,
        }
    }

    /// Whether the kernel is to hold the front-end's memory.
    pub(super) fn wants_memory_held(&self) -> bool {
        self.memory_stays
    }

    /// As they were at the beginning.
    pub(super) fn fresh(&self) -> Self {
        Self::new(self.rings.len(), self.memory_stays)
    }

    /// What becomes of requests that wait when the front-end has a queue stopped: whoever can be told by the record that they
    /// were not answered repeats them.
    pub(super) fn waiting(&self) -> Waiting {
        if self.inflight.is_some() {
            Waiting::Abandon
        } else {
            Waiting::Finish
        }
    }

    /// Whether the front-end has not stopped them.
    pub(super) fn are_served(&self) -> bool {
        self.rings.iter().any(|ring| ring.server.is_some())
    }

    /// Stops one queue; waits until nothing of it is in flight.
    pub(super) fn stop(&mut self, index: usize, waiting: Waiting) {
        self.stop_some(index..index + 1, waiting);
    }

    /// Stops all queues; waits until nothing is in flight.
    pub(super) fn stop_all(&mut self, waiting: Waiting) {
        self.stop_some(0..self.rings.len(), waiting);
    }

    fn stop_some(&mut self, range: std::ops::Range<usize>, waiting: Waiting) {
        let Some(rings) = self.rings.get_mut(range) else {
            return;
        };
        for server in rings.iter().filter_map(|ring| ring.server.as_ref()) {
            server.stop(waiting);
        }
        for ring in rings {
            if let Some(server) = ring.server.take() {
                let Outcome {
                    next_avail,
                    abandoned,
                } = server.wait();
                ring.base = next_avail;
                ring.unanswered = abandoned;
            }
        }
    }

    /// Has all queues served that can be.
    pub(super) fn start_due<D: ServedDevice>(
        &mut self,
        device: &D,
        memory: &Memory,
        guest: Option<&GuestMemory>,
        features: u64,
        events: &Arc<dyn DeviceEvents>,
    ) -> Result<(), RingError> {
        let Some(guest) = guest else { return Ok(()) };
        let memory_stays = self.memory_stays && memory.is_all_there();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let (true, Some(addresses), Some(kick)) = (ring.is_due(), ring.addresses, &ring.kick) else {
                continue;
            };
            // There are at most as many as a device has.
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            let mut queue = build(index, ring.size, addresses, memory, guest, features)?;
            // The driver's view of what was answered counts; ours may be that of another process.
            let used = queue
                .used_idx(&**guest, std::sync::atomic::Ordering::Acquire)
                .map_err(|_| RingError::Invalid(index))?
                .0;
            let (mut base, mut unanswered) = (ring.base, ring.unanswered.clone());
            let inflight = match &self.inflight {
                Some(record) if index < record.queues => {
                    let memory = Arc::clone(&record.memory);
                    let queue = InflightQueue::open(memory, index, record.entries, ring.size)?;
                    let recovered = queue.recover(used);
                    (base, unanswered) = (recovered.next_avail, recovered.unanswered);
                    Some(queue)
                }
                _ => None,
            };
            queue.set_next_avail(base);
            queue.set_next_used(used);
            let start = QueueStart {
                memory: Arc::clone(guest),
                memory_stays,
                features,
                queue: ActiveQueue {
                    index,
                    queue,
                    kick: kick.try_clone().map_err(RingError::Event)?,
                    call: clone_or_new(ring.call.as_ref())?,
                },
                events: Arc::clone(events),
                inflight,
                unanswered,
            };
            ring.server = device.serve(start);
        }
        Ok(())
    }
}

/// Without a call the driver polls: nobody reads the eventfd.
fn clone_or_new(call: Option<&EventFd>) -> Result<EventFd, RingError> {
    match call {
        Some(call) => call.try_clone(),
        None => EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK),
    }
    .map_err(RingError::Event)
}

fn build(
    index: u16,
    size: u16,
    addresses: RingAddresses,
    memory: &Memory,
    guest: &GuestMemory,
    features: u64,
) -> Result<Queue, RingError> {
    let invalid = |_| RingError::Invalid(index);
    let translate = |user| memory.translate(user).ok_or(RingError::Addresses(index));
    let mut queue = Queue::new(MAX_QUEUE_SIZE).map_err(invalid)?;
    queue.set_size(size);
    if queue.size() != size {
        return Err(RingError::Invalid(index));
    }
    queue
        .try_set_desc_table_address(translate(addresses.descriptors)?)
        .map_err(invalid)?;
    queue
        .try_set_avail_ring_address(translate(addresses.available)?)
        .map_err(invalid)?;
    queue
        .try_set_used_ring_address(translate(addresses.used)?)
        .map_err(invalid)?;
    queue.set_event_idx(features & feature::RING_EVENT_IDX != 0);
    queue.set_ready(true);
    if queue.is_valid(&**guest) {
        Ok(queue)
    } else {
        Err(RingError::Invalid(index))
    }
}
