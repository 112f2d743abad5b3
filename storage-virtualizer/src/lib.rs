//! Virtual devices on virtual disks.
//!
//! A guest's driver puts requests into virtqueues; this crate takes them out, turns them into operations on a
//! [`block_io::BlockDevice`], and puts the answers back. It knows neither PCI nor KVM nor vhost-user: whoever has guest
//! memory, virtqueues and eventfds can have a disk served (`virtio_core::Activation`); [`vhost_user`] gets these from other
//! processes.
//!
//! ```text
//!   virtqueue ─► queue, chain: descriptors → pieces of memory ─► virtio_blk::request: what is asked for
//!                                                              │
//!             status byte, used ring ◄── one place ◄── virtio_blk::execute: operations on the disk
//!                                                              │
//!                                       disk: virtual disks of the pool: chains of files, modes, snapshots
//! ```

pub mod chain;
pub mod controls;
pub mod disk;
mod disk_handle;
mod either;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod inflight;
pub mod iscsi;
#[cfg(any(test, feature = "fuzzing"))]
mod memory_disk;
pub mod nbd;
mod queue;
pub mod scsi;
mod sockets;
pub mod vhost_user;
pub mod virtio_blk;
pub mod virtio_scsi;

pub use disk_handle::{DiskHandle, DiskHandleError, PinnedDisk};
pub use either::Either;
pub use queue::recorder;
pub use queue::{Counters, LATENCY_CLASSES, QueueStatistics, RequestCounts};
