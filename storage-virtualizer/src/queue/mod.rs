//! A virtqueue served: what all our virtio devices have in common.
//!
//! `server` takes chains out of the ring and puts answers in, [`Service`] says what the chains mean, [`Gate`] is where requests
//! wait that a disk's `controls` hold back, [`Control`] is how a device talks to its servers, [`QueueStatistics`] counts,
//! [`recorder`] keeps the last requests.

mod control;
mod gate;
mod log_limit;
pub mod recorder;
mod server;
mod statistics;

use std::sync::Arc;
use std::time::Duration;

use block_io::WorkerHandle;
use virtio_core::{ActiveQueue, DeviceEvents, GuestMemory};

pub(crate) use control::{Control, Done, Outcome, Waiting};
pub(crate) use gate::{Admission, Gate};
pub(crate) use server::ServerLink;
pub use statistics::{Counters, LATENCY_CLASSES, QueueStatistics, RequestCounts};

use crate::chain::Buffers;
use crate::disk_handle::DiskHandleError;
use crate::inflight::InflightQueue;

/// What the chains of a queue mean. Lives on the queue's worker.
pub(crate) trait Service: 'static {
    /// Does what a chain asks for and writes the answer into it. Returns how many bytes of its memory the device may have
    /// written, or nothing if the chain is not to be answered: then whoever serves the queue next finds it.
    ///
    /// The chain was taken at `begin` ([`block_io::moment_nanos`]).
    ///
    /// # Errors
    /// The driver broke the rules: why.
    fn serve(
        &self,
        server: &ServerLink,
        buffers: &mut Buffers,
        begin: u64,
    ) -> impl Future<Output = Result<Option<u32>, String>>;

    /// Whether chains that wait in [`Self::serve`] for something else than the disk can go on.
    fn can_release(&self, server: &ServerLink) -> bool;

    /// Has the chains that wait look again; all of them if the server is [stopping](ServerLink::stopping).
    fn release(&self, server: &ServerLink);

    /// For how long the worker looks for further chains before it sleeps.
    fn longest_spin(&self) -> Duration {
        Duration::ZERO
    }
}

/// A queue that is to be served.
pub(crate) struct QueueStart {
    pub(crate) memory: GuestMemory,
    /// Nobody puts other pages there until the queue's server has ended: the worker [holds](block_io::HeldMemory) it.
    pub(crate) memory_stays: bool,
    pub(crate) features: u64,
    pub(crate) queue: ActiveQueue,
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// Where to note what is in flight.
    pub(crate) inflight: Option<InflightQueue>,
    /// Chains that were taken before, and not answered: they come first.
    pub(crate) unanswered: Vec<u16>,
}

impl QueueStart {
    /// Has the queue served by `worker` with what `service` makes there.
    pub(crate) fn serve<S: Service>(
        self,
        worker: &WorkerHandle,
        statistics: &Arc<QueueStatistics>,
        service: impl FnOnce() -> Result<S, DiskHandleError> + Send + 'static,
    ) -> Arc<Control> {
        let control = Arc::<Control>::default();
        let done = Done(Arc::clone(&control));
        let statistics = Arc::clone(statistics);
        worker.spawn(move || server::serve(self, statistics, done, service));
        control
    }
}
