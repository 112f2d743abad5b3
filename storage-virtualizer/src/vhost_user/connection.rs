//! A front-end at a connection that is there already: somebody else has accepted it, and knows whose it is.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::device::ServedDevice;
use super::session::{Channel, Session};
use crate::disk_handle::DiskHandle;
use crate::virtio_blk::VirtioBlk;
use crate::virtio_scsi::VirtioScsi;

/// How a front-end has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parting {
    /// It had stopped its queues, as one does that has no use for the device any more.
    AtRest,
    /// Its queues were being served: it died, was cut off, or talked nonsense.
    InUse,
}

/// Serves `device` to the front-end at the other end of `socket`, on this thread, until it goes, `socket` is shut down by who has another
/// descriptor of it, or it says what cannot be obeyed. When this returns, what was in flight has ended, nothing of the front-end's memory is
/// used any more, and the connection is closed.
///
/// `memory_stays` says that the front-end never gives back pages of the memory that it shares, nor puts others there: the workers' rings then
/// [hold](block_io::HeldMemory) it, if all of it was taken from the host already.
pub fn serve_blk<H: DiskHandle>(socket: UnixStream, device: VirtioBlk<H>, memory_stays: bool) -> Parting {
    serve(socket, device, memory_stays)
}

/// The same with a SCSI adapter, which stays, with its units and what they know of the initiator, for the next front-end. One front-end at a
/// time: the caller sees to that.
pub fn serve_scsi<H: DiskHandle>(socket: UnixStream, adapter: &VirtioScsi<H>, memory_stays: bool) -> Parting {
    serve(socket, adapter.twin(), memory_stays)
}

fn serve<D: ServedDevice>(socket: UnixStream, device: D, memory_stays: bool) -> Parting {
    Session::new(socket, device, Arc::<Channel>::default(), memory_stays).serve()
}
