//! The network card: virtio-net (virtio 1.2 §5.1) on a tap interface of the host or on user-mode networking.
//!
//! ```text
//!   Net (VirtioDevice) ── activate ──► worker thread per queue pair ──► Port ──► tap queue | passt's socket
//!        │                                 │                             ▲
//!        └────── Arc<NetBackend> ──────────┴───── owns the ports ────────┘
//! ```
//!
//! [`NetBackend`] is opened once, when the VM's configuration is checked, and outlives reboots; [`Net`] is the device that
//! the guest sees. A new kind of backend is a variant of `port::Port` (how packets go) and of the backend's kind (what it
//! can do).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use api::MacAddress;
use virtio_core::{Activation, ActiveQueue, DeviceError, VirtioDevice, device_type, feature as ring};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use backend::{NetBackend, NetError};
pub use launcher::{Launcher, ManagerDoor, Sockets};
pub use passt::PasstOptions;
pub use statistics::NetStatistics;

use control::NetConfig;
use protocol::feature;
use statistics::Counters;
use worker::{Shared, WorkerSetup};

mod backend;
mod control;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzz;
mod launcher;
mod passt;
mod port;
mod protocol;
mod receive;
mod statistics;
mod stream;
mod tap;
mod worker;

/// Descriptors in the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The smallest MTU that the device may tell (§5.1.4.1).
const MIN_MTU: u16 = 68;

/// Called first in every thread that a device starts: the place for a seccomp filter or a CPU binding.
/// A thread that it fails in does not run, and the device stops.
pub type ThreadSetup = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the guest sees of its card.
pub struct NetOptions {
    /// For messages and thread names, for example `net0`.
    pub name: String,
    /// The card's address.
    pub mac: MacAddress,
    /// The largest packet of the network, if not 1500 and not what the backend knows.
    pub mtu: Option<u16>,
    /// Descriptors in each of the packet queues, a power of two.
    pub queue_size: u16,
    /// Offer checksum and segmentation offloads, if the backend has them.
    pub offload: bool,
    /// Runs first in every queue thread.
    pub thread_setup: Option<ThreadSetup>,
}

impl NetOptions {
    /// As configured for a card of the virtual machine `machine`.
    pub fn from_config(config: &api::NetConfig, machine: &str) -> Self {
        Self {
            name: config.id.as_str().to_owned(),
            mac: config.mac_or_derived(machine),
            mtu: config.mtu,
            queue_size: config.queue_size.get(),
            offload: config.offload,
            thread_setup: None,
        }
    }
}

/// A network card.
pub struct Net {
    name: String,
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: Vec<u16>,
    thread_setup: Option<ThreadSetup>,
    workers: Vec<JoinHandle<()>>,
    stop: Option<Arc<EventFd>>,
}

impl fmt::Debug for Net {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Net")
            .field("name", &self.name)
            .field("backend", &self.shared.backend)
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}

impl Net {
    /// A card on `backend`, which may serve one card at a time.
    ///
    /// # Errors
    /// The MTU is too small.
    pub fn new(backend: Arc<NetBackend>, options: NetOptions) -> Result<Self, NetError> {
        let mtu = options.mtu.or(backend.mtu());
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Options(format!(
                "the MTU is {mtu}, it must be at least {MIN_MTU}"
            )));
        }
        backend.serves(&options.name);
        let pairs = backend.queue_pairs();
        let mut queue_sizes = vec![options.queue_size; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let max_pairs = u16::try_from(pairs).unwrap_or(NetBackend::MAX_QUEUE_PAIRS);
        Ok(Self {
            features: offered_features(&backend, mtu, options.offload),
            queue_sizes,
            shared: Arc::new(Shared {
                config: NetConfig::new(options.mac, max_pairs, mtu),
                counters: Counters::default(),
                backend,
            }),
            name: options.name,
            thread_setup: options.thread_setup,
            workers: Vec::new(),
            stop: None,
        })
    }

    /// What the card counted since it was made. The handle goes on to work when the device is in a transport's hands.
    pub fn statistics(&self) -> impl Fn() -> NetStatistics + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.counters.snapshot()
    }

    /// As [`Self::statistics`], by a handle that keeps nothing of the card open; none when the card is gone.
    pub fn statistics_while_there(&self) -> impl Fn() -> Option<NetStatistics> + Send + Sync + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || Some(shared.upgrade()?.counters.snapshot())
    }

    /// Ends all workers and waits for it: they never sleep in anything but their epoll.
    fn stop_workers(&mut self) {
        self.reset();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!(device = self.name, "a queue thread panicked");
            }
        }
    }

    fn spawn(&mut self, setup: WorkerSetup) -> Result<(), DeviceError> {
        let thread_setup = self.thread_setup.clone();
        let worker = thread::Builder::new()
            .name(format!("{}-q{}", self.name, setup.pair))
            .spawn(
                move || match thread_setup.map_or(Ok(()), |thread_setup| thread_setup()) {
                    Ok(()) => worker::run(setup),
                    Err(error) => setup
                        .events
                        .needs_reset(&format!("network card: a queue thread cannot be set up: {error}")),
                },
            )
            .map_err(|source| DeviceError::Host {
                action: format!("start a queue thread of {}", self.name),
                source,
            })?;
        self.workers.push(worker);
        Ok(())
    }

    fn start(&mut self, activation: Activation, stop: &Arc<EventFd>) -> Result<(), DeviceError> {
        let has = |bits| activation.features & bits == bits;
        let (features, enabled) = (activation.features, activation.queues.len());
        let max_pairs = if has(feature::MQ) {
            self.shared.backend.queue_pairs()
        } else {
            1
        };
        let mut queues: Vec<Option<ActiveQueue>> = Vec::new();
        queues.resize_with(self.queue_sizes.len(), || None);
        for mut queue in activation.queues {
            queue.queue.set_event_idx(features & ring::RING_EVENT_IDX != 0);
            if let Some(place) = queues.get_mut(usize::from(queue.index)) {
                *place = Some(queue);
            }
        }
        // The control queue follows the pairs that the driver may use, not those that the device has (§5.1.2).
        let mut control = if has(feature::CTRL_VQ) {
            queues.get_mut(2 * max_pairs).and_then(Option::take)
        } else {
            None
        };
        for pair in 0..max_pairs {
            let (Some(receive), Some(send)) = (queues[2 * pair].take(), queues[2 * pair + 1].take()) else {
                if pair == 0 {
                    return Err(DeviceError::MissingQueues { enabled, needed: 2 });
                }
                continue;
            };
            self.spawn(WorkerSetup {
                shared: Arc::clone(&self.shared),
                memory: Arc::clone(&activation.memory),
                features,
                pair,
                receive,
                send,
                control: control.take(),
                stop: Arc::clone(stop),
                events: Arc::clone(&activation.events),
            })?;
        }
        Ok(())
    }
}

/// Features of a card on `backend`.
fn offered_features(backend: &NetBackend, mtu: Option<u16>, offload: bool) -> u64 {
    let mut features = ring::RING_INDIRECT_DESC
        | ring::RING_EVENT_IDX
        | feature::MAC
        | feature::STATUS
        | feature::MRG_RXBUF
        | feature::CTRL_VQ
        | feature::CTRL_RX
        | feature::CTRL_RX_EXTRA
        | feature::CTRL_MAC_ADDR;
    if mtu.is_some() {
        features |= feature::MTU;
    }
    let unwanted = if offload { 0 } else { feature::OFFLOADS };
    features | (backend.features() & !unwanted)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared
            .config
            .read(self.shared.backend.link_up(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // A driver of virtio 1.x sets its address through the control queue (§5.1.4).
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.stop_workers();
        let failed = |action: &str| {
            let action = format!("{action} of {}", self.shared.backend.name());
            move |source| DeviceError::Host { action, source }
        };
        let backend = &self.shared.backend;
        backend.set_active_pairs(1).map_err(failed("set the queues"))?;
        backend
            .set_offloads(activation.features)
            .map_err(failed("set the offloads"))?;
        let stop =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("make a stop event for the workers"))?;
        let stop = Arc::new(stop);
        self.stop = Some(Arc::clone(&stop));
        self.start(activation, &stop).inspect_err(|_| self.stop_workers())
    }

    fn reset(&mut self) {
        if let Some(stop) = self.stop.take()
            && let Err(error) = stop.write(1)
        {
            tracing::error!(device = self.name, %error, "the queue threads cannot be told to stop");
        }
    }

    fn is_idle(&mut self) -> bool {
        if !self.workers.iter().all(JoinHandle::is_finished) {
            return false;
        }
        // Waits for none: all have ended.
        self.stop_workers();
        true
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop_workers();
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod host_tests;

#[cfg(test)]
mod passt_tests;
