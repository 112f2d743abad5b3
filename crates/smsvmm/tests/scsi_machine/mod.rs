//! The machine at a socket of `smsvmm share vhost-user-scsi` (or `vhost-user`), without a machine.

use std::path::Path;
use std::sync::Arc;

use storage_virtualizer::vhost_user::front_end::{
    FrontEndKind, FrontEndOptions, LinkEvents, VhostUserDevice, dial,
};
use storage_virtualizer::virtio_scsi::scsi_feature;
use virtio_core::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use virtio_core::{GuestMemory, feature};

use crate::driver;
use crate::driver::scsi::Initiator;

struct Deaf;

impl LinkEvents for Deaf {
    fn lost(&self, _: &str) {}
    fn back(&self) {}
}

/// Its process, as a server at a socket sees it.
pub(crate) fn front_end(socket: &Path, kind: FrontEndKind) -> VhostUserDevice {
    let place = socket.to_owned();
    let options = FrontEndOptions {
        kind,
        name: "machine".to_owned(),
        queues: 1,
        queue_size: 64,
        on_start: None,
        observer: Arc::new(Deaf),
    };
    VhostUserDevice::open(Arc::new(move || dial(&place)), options).unwrap()
}

/// The machine at a socket: its driver, and what it must have as long.
pub(crate) fn machine(socket: &Path) -> (Initiator, VhostUserDevice) {
    let mut device = front_end(socket, FrontEndKind::Scsi);
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 << 20).unwrap();
    let mapped = Some(FileOffset::new(file, 0));
    let memory: GuestMemory =
        Arc::new(GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 16 << 20, mapped)]).unwrap());
    let driver = Initiator::new(&memory);
    let queues = [&driver.control, &driver.event, &driver.requests];
    let queues = (0..).zip(queues).map(|(index, queue)| queue.active(index));
    let features = feature::VERSION_1
        | feature::RING_EVENT_IDX
        | feature::RING_INDIRECT_DESC
        | scsi_feature::HOTPLUG
        | scsi_feature::CHANGE;
    driver::activate(&mut device, &memory, features, queues.collect());
    (driver, device)
}
