//! A disk at a socket: vhost-user-blk.

use std::fmt;
use std::io;
use std::path::Path;

use block_io::WorkerHandle;

use super::VhostUserError;
use super::listener::{Export, FrontEndState, Listener, ThreadHook};
use crate::disk_handle::DiskHandle;
use crate::queue::Counters;
use crate::virtio_blk::{VirtioBlk, VirtioBlkHandle, VirtioBlkOptions};

/// How a disk is shown to front-ends.
#[derive(Debug, Clone)]
pub struct VhostUserOptions {
    /// The device. Its queue size is what a driver is told of segments; a front-end may have queues of up to
    /// [`crate::virtio_blk::MAX_QUEUE_SIZE`] entries in any case.
    pub device: VirtioBlkOptions,
    /// The most front-ends at a time. More than one is for disks that are read only, or for guests that know of each other.
    pub front_ends: usize,
    /// Front-ends never give back pages of the memory that they share, nor put others there (no balloon, no free page reporting): the workers'
    /// rings [hold](block_io::HeldMemory) it, if all of it was taken from the host already.
    pub memory_stays: bool,
    /// Confines the threads that speak with front-ends.
    pub confine: Option<ThreadHook>,
}

impl Default for VhostUserOptions {
    fn default() -> Self {
        Self {
            device: VirtioBlkOptions {
                // What QEMU's own devices say, which every driver takes.
                queue_size: 128,
                ..VirtioBlkOptions::default()
            },
            front_ends: 1,
            memory_stays: false,
            confine: None,
        }
    }
}

struct BlkExport<H> {
    disk: H,
    options: VirtioBlkOptions,
    workers: Vec<WorkerHandle>,
    memory_stays: bool,
}

impl<H: DiskHandle> Export for BlkExport<H> {
    type Device = VirtioBlk<H>;
    type Handle = VirtioBlkHandle<H>;

    fn device(&self) -> io::Result<(Self::Device, Self::Handle)> {
        let device = VirtioBlk::new(self.disk.clone(), &self.options, self.workers.clone())
            .map_err(io::Error::other)?;
        let handle = device.handle();
        Ok((device, handle))
    }

    fn memory_stays(&self) -> bool {
        self.memory_stays
    }

    fn counters(handle: &Self::Handle) -> Vec<Counters> {
        handle.counters()
    }
}

/// A disk that is served at a socket. Dropping it is [`Self::stop`].
pub struct VhostUserServer<H: DiskHandle>(Listener<BlkExport<H>>);

impl<H: DiskHandle> fmt::Debug for VhostUserServer<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VhostUserServer")
            .field("path", &self.0.path())
            .field("options", &self.0.export().options)
            .finish_non_exhaustive()
    }
}

impl<H: DiskHandle> VhostUserServer<H> {
    /// Listens at `path` and serves `disk` to whoever connects; queue n is served by worker n modulo their number. The socket
    /// is for its owner only.
    ///
    /// # Errors
    /// Someone else is there, the options are impossible, or the host has nothing left.
    pub fn start(
        path: &Path,
        disk: H,
        options: VhostUserOptions,
        workers: Vec<WorkerHandle>,
    ) -> Result<Self, VhostUserError> {
        // What is wrong with the options is said here, not to a front-end.
        VirtioBlk::new(disk.clone(), &options.device, workers.clone())?;
        let export = BlkExport {
            disk,
            options: options.device,
            workers,
            memory_stays: options.memory_stays,
        };
        let listener = Listener::start(path, export, options.front_ends, options.confine)?;
        Ok(Self(listener))
    }

    /// Takes no further front-ends, ends what is in flight, closes all connections, and returns when no memory of a front-end
    /// is used any more. A front-end that reconnects to another server finds all its requests answered.
    pub fn stop(self) {
        drop(self);
    }

    /// Tells the front-ends that the disk's size has changed; the disk itself knows already.
    pub fn size_changed(&self) {
        self.0.config_changed();
    }

    /// Who is connected.
    pub fn clients(&self) -> Vec<FrontEndState> {
        self.0.clients()
    }

    /// Closes the connection of a front-end, and returns when what it had in flight has ended. It may connect again. False if there is none
    /// of this number.
    pub fn disconnect(&self, number: u64) -> bool {
        self.0.disconnect(number)
    }

    /// How many front-ends are connected.
    pub fn front_ends(&self) -> usize {
        self.0.front_ends()
    }

    /// What all front-ends have done, now and in the past.
    pub fn counters(&self) -> Counters {
        self.0.counters()
    }
}
