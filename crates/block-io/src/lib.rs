//! The one block I/O interface of the storage stack, and the engines below it.
//!
//! Everything in smsvmm that reads or writes a disk does it through [`BlockDevice`]: the virtual devices above, the file
//! system and the volume manager between, the devices at the bottom. The code of those layers is plain `async fn` over
//! the trait; it knows no threads and no clocks, so that the same code runs on a [`Worker`] and in a simulator.
//!
//! ```text
//!   virtio-blk, SCSI, NBD …            async fn over BlockDevice
//!            │
//!      BlockDevice: read, write (FUA), flush, discard, write_zeroes   on scatter lists of IoBuf: no copies
//!            │
//!        Device                        one of these, from a text
//!          ├ HostDevice                a regular file or a block device: O_DIRECT, bounce, EOF, sticky flush errors
//!          ├ NbdDevice                 an export of an NBD server: outlives outages, repeats what was not flushed
//!          └ MultiPath                 several paths to one device
//!            │
//!         Worker                       one thread = one executor + one io_uring; or, where that is refused,
//!            │                         one executor + epoll + a pool of blocking threads
//!          kernel
//! ```
//!
//! # Life of a request
//!
//! 1. A task of a worker calls [`BlockDevice::read`]. The first poll of its future puts one entry into the ring's submission
//!    queue and returns `Pending`. No system call, no allocation, no lock.
//! 2. When all tasks of the worker wait for something, one `io_uring_enter` submits all entries and sleeps until there
//!    are completions. All of these wake their tasks, the tasks run, and so on.
//! 3. The kernel owns the request's memory from 1 until the completion. A future that is dropped in between waits for its
//!    completion first: see [`IoBuf`] for what the memory's owner promises.
//!
//! Devices are opened on any thread, but used only by tasks of a [`Worker`].
//!
//! With the feature `sim`, `sim` is the simulator: disks, time, scheduling, crashes and faults from a seed.

mod background;
mod buffer;
mod clock;
#[doc(hidden)]
pub mod cover;
mod device;
mod error;
mod host;
mod kinds;
mod lasting;
mod multipath;
pub mod nbd;
mod net;
#[cfg(feature = "sim")]
pub mod sim;
mod spec;
mod unflushed;
mod worker;

pub use background::{BackgroundHooks, hook_background};
pub use buffer::{AlignedBuffer, IoBuf, list};
pub use clock::{Clock, WorkerClock};
pub use device::{Allocation, BlockDevice, Durability, Geometry, ZeroMode};
pub use error::{IoCause, IoError, Operation, error_chain};
pub use host::{Cache, HostDevice, OpenError, OpenOptions};
pub use kinds::{Device, DeviceError, DeviceOptions, SinglePath};
pub use lasting::{LastingFile, LastingMemory};
pub use multipath::{DevicePath, MultiPath, MultiPathError, MultiPathOptions};
pub use nbd::{NbdAddress, NbdAddressError, NbdDevice, NbdError, NbdOptions, NbdServer};
pub use net::{
    ListenAddress, ListenError, Listener, SocketFile, Stream, UnixSocketError, listen_unix, peer_groups,
};
pub use spec::relative_to;
pub use worker::{
    EngineKind, EventSignal, EventWatch, HeldMemory, Hook, PollSource, ScratchBuffer, Worker, WorkerError,
    WorkerHandle, WorkerOptions, add_poll_source, default_helpers, helped, moment_nanos, prepare_pool,
    spawn_local, turns, wake_after_turn, yield_now,
};
