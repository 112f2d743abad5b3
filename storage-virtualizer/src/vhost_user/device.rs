//! What a session needs of the device that it serves, beside what every virtio device has.

use std::sync::Arc;

use virtio_core::{DeviceEvents, VirtioDevice};

use crate::disk_handle::DiskHandle;
use crate::queue::{Control, QueueStart};
use crate::virtio_blk::VirtioBlk;
use crate::virtio_scsi::VirtioScsi;

/// A device whose queues come and go one by one, as a front-end wants it.
pub(super) trait ServedDevice: VirtioDevice + 'static {
    /// A front-end is there, which is told by `events`; again after each [reset](VirtioDevice::reset).
    fn connect(&self, events: Arc<dyn DeviceEvents>);

    /// That of its disks, which are of one pool ([`DiskHandle::continuity`]).
    fn continuity(&self) -> u64;

    /// The front-end has chosen these features. No queue is served then.
    fn negotiated(&self, features: u64);

    /// Has one queue served on its worker; nothing if the device has no such queue.
    fn serve(&self, start: QueueStart) -> Option<Arc<Control>>;

    /// The front-end has gone, and no queue is served any more.
    fn disconnect(&self);
}

impl<H: DiskHandle> ServedDevice for VirtioBlk<H> {
    fn connect(&self, events: Arc<dyn DeviceEvents>) {
        self.set_events(Some(events));
    }

    fn continuity(&self) -> u64 {
        self.handle().disk().continuity()
    }

    fn negotiated(&self, _: u64) {}

    fn serve(&self, start: QueueStart) -> Option<Arc<Control>> {
        self.serve(start)
    }

    fn disconnect(&self) {
        self.set_events(None);
    }
}

impl<H: DiskHandle> ServedDevice for VirtioScsi<H> {
    /// It tells of everything by its event queue.
    fn connect(&self, _: Arc<dyn DeviceEvents>) {}

    fn continuity(&self) -> u64 {
        self.continuity()
    }

    fn negotiated(&self, features: u64) {
        self.negotiated(features);
    }

    fn serve(&self, start: QueueStart) -> Option<Arc<Control>> {
        self.serve_one(start)
    }

    fn disconnect(&self) {
        self.disconnect();
    }
}
