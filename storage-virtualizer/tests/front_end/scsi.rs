//! A SCSI adapter that another process serves: a guest has all its disks, and goes on when the server was another one meanwhile.

use std::sync::Arc;

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use storage_virtualizer::scsi::{Identity, TransportId, Unit, UnitOptions};
use storage_virtualizer::vhost_user::VhostUserScsiServer;
use storage_virtualizer::vhost_user::front_end::FrontEndKind;
use storage_virtualizer::virtio_scsi::{ScsiGroup, VirtioScsiOptions, scsi_feature};
use virtio_core::{VirtioDevice, device_type, feature};

use crate::driver::scsi::{Answer, GOOD, Initiator, TEST_UNIT_READY, lun, read, told, write};
use crate::driver::{activate, readable, reset_and_wait, writable};
use crate::place::{Place, open_as, shared_memory};

const FEATURES: u64 = feature::VERSION_1
    | feature::RING_EVENT_IDX
    | feature::RING_INDIRECT_DESC
    | scsi_feature::HOTPLUG
    | scsi_feature::CHANGE;
/// Where data are in the memory of the driver.
const DATA: u64 = 0x30_0000;

fn serve(place: &Place, worker: &Worker) -> VhostUserScsiServer<Arc<HostDevice>> {
    let options = VirtioScsiOptions {
        initiator: TransportId::sas(1),
        queues: 2,
        queue_size: 128,
        last_target: 0,
    };
    let disk = Arc::new(HostDevice::open(place.image(), &OpenOptions::default()).unwrap());
    let unit = Arc::new(Unit::new(UnitOptions::new(Identity::from_name("disk", "disk"))));
    let workers = vec![worker.handle().clone()];
    VhostUserScsiServer::start(
        &place.socket(),
        &options,
        workers,
        &ScsiGroup::default(),
        false,
        None,
        |adapter| adapter.add((0, 0), unit, disk, Arc::default(), None),
    )
    .unwrap()
}

#[test]
fn a_guest_has_the_disks_of_an_adapter_and_keeps_them_over_a_change_of_servers_and_a_reset() {
    let place = Place::new();
    let worker = Worker::start("io", WorkerOptions::default()).unwrap();
    let server = serve(&place, &worker);
    assert!(
        open_as(FrontEndKind::Scsi, &place.socket(), 3, 64).is_err(),
        "it has two queues"
    );
    let (mut device, observer) = open_as(FrontEndKind::Scsi, &place.socket(), 1, 64).unwrap();
    assert_eq!(device.device_type(), device_type::SCSI);
    assert_eq!(device.queue_max_sizes(), [64, 64, 64]);
    let mut config = [0; 36];
    device.read_config(0, &mut config);
    assert_eq!(
        config[..8],
        [1, 0, 0, 0, 62, 0, 0, 0],
        "one queue, segments that fit"
    );
    let wanted = FEATURES & !feature::VERSION_1;
    assert_eq!(device.features() & wanted, wanted);

    let memory = shared_memory();
    let mut driver = Initiator::new(&memory);
    let active = |driver: &Initiator| {
        let queues = [&driver.control, &driver.event, &driver.requests];
        (0..)
            .zip(queues)
            .map(|(index, queue)| queue.active(index))
            .collect()
    };
    activate(&mut device, &memory, FEATURES, active(&driver));
    driver.greet(lun(0, 0));
    for buffer in 0..2 {
        driver.offer_event(buffer);
    }
    driver.put(DATA, &[0xab; 4096]);
    let written = driver.command(lun(0, 0), &write(8, 8), Some(readable(DATA, 4096)));
    assert_eq!(written, Answer::good());

    // Another server, which has all to learn anew.
    drop(server);
    observer.wait_for("closed");
    driver.begin(0, lun(0, 0), &TEST_UNIT_READY, None);
    let server = serve(&place, &worker);
    observer.wait_for("back");
    assert_eq!(driver.end().1.sense, Some((6, 0x29, 0)));
    driver.put(DATA, &[0; 4096]);
    let answer = driver.command(lun(0, 0), &read(8, 8), Some(writable(DATA, 4096)));
    assert_eq!((answer.status, answer.residual), (GOOD, 0));
    let mut back = [0; 4096];
    driver.get(DATA, &mut back);
    assert!(back == [0xab; 4096]);
    // Buffers for events were taken over.
    server.handle().remove(0, 0).unwrap();
    assert_eq!(driver.event(), (1, told(0, 0), 2));

    reset_and_wait(&mut device);
    let mut driver = Initiator::new(&memory);
    activate(&mut device, &memory, FEATURES, active(&driver));
    let answer = driver.command(lun(0, 0), &TEST_UNIT_READY, None);
    assert_eq!(answer.response, 3, "BAD TARGET: no unit is left");
}
