//! SCSI adapters at sockets, with front-ends that behave: several initiators share units, come back, and reset their adapters.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod driver;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use driver::fickle::Fickle;
use driver::scsi::*;
use driver::{Driver, PATIENCE, readable};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::controls::{DiskControls, ErrorPolicy};
use storage_virtualizer::scsi::{Identity, TransportId, Unit, UnitOptions};
use storage_virtualizer::vhost_user::VhostUserScsiServer;
use storage_virtualizer::vhost_user::client::Client;
use storage_virtualizer::vhost_user::message::{
    self, Body, F_PROTOCOL_FEATURES, InflightArea, Region, RingAddresses, protocol_feature, request,
};
use storage_virtualizer::virtio_scsi::{ScsiGroup, VirtioScsiOptions, scsi_feature};
use virtio_core::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use virtio_core::{GuestMemory, feature};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 16 << 20;
const USER_BASE: u64 = 0x7f00_0000_0000;
const CONFLICT: u8 = 0x18;
const ABORT_TASK_SET: u32 = 1;
const UNIT_RESET: u32 = 5;
const DISK: [u8; 8] = [1, 0, 0x40, 0, 0, 0, 0, 0];

/// Units that several adapters of one process show.
struct Place<H: DiskHandle> {
    folder: tempfile::TempDir,
    group: ScsiGroup<H>,
    unit: Arc<Unit>,
    disk: H,
    controls: Arc<DiskControls>,
    worker: Worker,
}

impl<H: DiskHandle> Place<H> {
    fn new(disk: H) -> Self {
        let unit = Unit::new(UnitOptions::new(Identity::from_name("disk", "disk")));
        Self {
            folder: tempfile::tempdir().unwrap(),
            group: ScsiGroup::default(),
            unit: Arc::new(unit),
            disk,
            controls: Arc::default(),
            worker: Worker::start("scsi-test", WorkerOptions::default()).unwrap(),
        }
    }

    fn serve(&self, name: &str) -> VhostUserScsiServer<H> {
        let options = VirtioScsiOptions {
            initiator: TransportId::sas(u64::from(name.as_bytes()[0])),
            queues: 1,
            queue_size: 64,
            last_target: 0,
        };
        let (unit, controls) = (Arc::clone(&self.unit), Arc::clone(&self.controls));
        let disk = self.disk.clone();
        let workers = vec![self.worker.handle().clone()];
        let path = self.folder.path().join(name);
        VhostUserScsiServer::start(&path, &options, workers, &self.group, false, None, |adapter| {
            adapter.add((0, 0), unit, disk, controls, None)
        })
        .unwrap()
    }

    fn connect(&self, name: &str) -> FrontEnd {
        FrontEnd::connect(&self.folder.path().join(name))
    }
}

fn on_image() -> Place<Arc<HostDevice>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let disk = HostDevice::open(file.path(), &OpenOptions::default()).unwrap();
    Place::new(Arc::new(disk))
}

/// On a disk that fails from the beginning, and stops when it does.
fn stopped() -> Place<Arc<Fickle>> {
    let place = Place::new(Arc::<Fickle>::default());
    place.controls.set_error_policy(ErrorPolicy::Stop);
    place.disk.fails.store(true, Ordering::SeqCst);
    place
}

/// A guest's memory and queues, and the server that serves them.
struct FrontEnd {
    client: Client,
    driver: Initiator,
    memory: File,
    inflight: Option<(InflightArea, OwnedFd)>,
    socket: std::path::PathBuf,
}

impl FrontEnd {
    fn connect(socket: &std::path::Path) -> Self {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&memory, MEMORY as u64).unwrap();
        let mapped = FileOffset::new(memory.try_clone().unwrap(), 0);
        let guest: GuestMemory = Arc::new(
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(mapped))]).unwrap(),
        );
        let mut front_end = Self {
            client: dial(socket),
            driver: Initiator::new(&guest),
            memory,
            inflight: None,
            socket: socket.to_owned(),
        };
        front_end.set_up(false);
        front_end
    }

    /// As [`Self::reconnect`], once the other connection is closed.
    fn reconnect_with_a_record(&mut self) {
        let (socket, _) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut self.client, Client::new(socket)));
        self.reconnect();
    }

    /// The server has gone and another one has come.
    fn reconnect(&mut self) {
        self.client = dial(&self.socket);
        self.set_up(true);
    }

    fn tell(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.client.tell(request, body, fds).unwrap();
    }

    /// As QEMU does it; with the record of what is in flight if there is one, or there is to be.
    fn set_up(&mut self, with_inflight: bool) {
        let offered = self.client.ask_number(request::GET_FEATURES).unwrap();
        let wanted = feature::VERSION_1
            | feature::RING_EVENT_IDX
            | feature::RING_INDIRECT_DESC
            | F_PROTOCOL_FEATURES
            | scsi_feature::HOTPLUG
            | scsi_feature::CHANGE;
        assert_eq!(offered & wanted, wanted);
        let protocol = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::INFLIGHT_SHMFD;
        self.client.agree(protocol).unwrap();
        assert_eq!(self.client.ask_number(request::GET_QUEUE_NUM).unwrap(), 3);
        if with_inflight && self.inflight.is_none() {
            self.ask_for_a_record();
        }
        if let Some((area, fd)) = &self.inflight {
            self.tell(request::SET_INFLIGHT_FD, &area.encode_padded(), &[fd.as_fd()]);
        }
        self.tell(request::SET_FEATURES, &wanted.to_le_bytes(), &[]);
        let region = Region {
            guest: 0,
            size: MEMORY as u64,
            user: USER_BASE,
            offset: 0,
        };
        let table = message::memory_table(&[region]);
        self.tell(request::SET_MEM_TABLE, &table, &[self.memory.as_fd()]);
        for index in 0..3 {
            self.start_queue(index, self.queue(index).used_index());
        }
    }

    fn ask_for_a_record(&mut self) {
        let asked = InflightArea {
            size: 0,
            offset: 0,
            queues: 3,
            entries: 64,
        };
        let answer = self.client.ask(request::GET_INFLIGHT_FD, &asked.encode_padded());
        let mut answer = answer.unwrap();
        let area = Body::new(request::GET_INFLIGHT_FD, &answer.body)
            .inflight()
            .unwrap();
        self.inflight = Some((area, answer.fds.pop().unwrap()));
    }

    fn queue(&self, index: u32) -> &Driver {
        [&self.driver.control, &self.driver.event, &self.driver.requests][index as usize]
    }

    fn start_queue(&self, index: u32, base: u16) {
        let queue = self.queue(index);
        let state = |number: u32| message::ring_state(index, number);
        self.tell(request::SET_VRING_NUM, &state(queue.size.into()), &[]);
        self.tell(request::SET_VRING_BASE, &state(base.into()), &[]);
        let addresses = RingAddresses {
            descriptors: USER_BASE + queue.base,
            used: USER_BASE + queue.used_ring(),
            available: USER_BASE + queue.available_ring(),
        };
        self.tell(request::SET_VRING_ADDR, &addresses.encode(index), &[]);
        let number = u64::from(index).to_le_bytes();
        self.tell(request::SET_VRING_CALL, &number, &[borrow(&queue.call)]);
        self.tell(request::SET_VRING_KICK, &number, &[borrow(&queue.kick)]);
        self.tell(request::SET_VRING_ENABLE, &state(1), &[]);
        queue.kick();
    }

    /// Stops a queue; where it is to go on.
    fn stop_queue(&self, index: u32) -> u16 {
        let answer = self
            .client
            .ask(request::GET_VRING_BASE, &message::ring_state(index, 0));
        let answer = answer.unwrap();
        let (_, base) = Body::new(request::GET_VRING_BASE, &answer.body)
            .ring_state()
            .unwrap();
        base as u16
    }

    fn test(&mut self) -> Answer {
        self.driver.command(DISK, &TEST_UNIT_READY, None)
    }

    fn greet(&mut self) {
        self.driver.greet(DISK);
    }

    /// PERSISTENT RESERVE OUT (SPC-4 §6.16) with this service action, type, and keys.
    fn reserve(&mut self, action: u8, kind: u8, keys: [u64; 2]) -> Answer {
        let list = [&keys[0].to_be_bytes()[..], &keys[1].to_be_bytes(), &[0; 8]].concat();
        self.driver.put(DATA, &list);
        let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0];
        self.driver.command(DISK, &cdb, Some(readable(DATA, 24)))
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn dial(socket: &std::path::Path) -> Client {
    let socket = UnixStream::connect(socket).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Client::new(socket)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn each_socket_is_an_initiator_of_its_own_and_stays_it() {
    let place = on_image();
    let (_a, b_server) = (place.serve("a"), place.serve("b"));
    let (mut a, mut b) = (place.connect("a"), place.connect("b"));
    a.greet();
    b.greet();
    assert_eq!(a.reserve(0, 0, [0, 0xa]), Answer::good());
    assert_eq!(b.reserve(0, 0, [0, 0xb]), Answer::good());
    assert_eq!(b.reserve(1, 1, [0xb, 0]), Answer::good());
    let data = || Some(readable(DATA, 512));
    assert_eq!(a.driver.command(DISK, &write(0, 1), data()).status, CONFLICT);
    assert_eq!(b.driver.command(DISK, &write(0, 1), data()), Answer::good());
    // It goes without a word, and another one comes: its nexus was lost, the reservation was not.
    drop(b);
    wait_until("the front-end is gone", || !b_server.is_connected());
    assert_eq!(a.driver.command(DISK, &write(0, 1), data()).status, CONFLICT);
    let mut b = place.connect("b");
    assert_eq!(b.test().sense, Some((6, 0x29, 0x07)));
    assert_eq!(b.driver.command(DISK, &write(0, 1), data()), Answer::good());
    // An adapter is reset: nobody else notices.
    b.tell(request::RESET_DEVICE, &[], &[]);
    assert_eq!(a.test(), Answer::good());
    assert!(b_server.counters().counts.writes >= 2);
}

#[test]
fn functions_reach_the_commands_of_all_initiators_that_they_concern() {
    let place = stopped();
    let (_a, _b) = (place.serve("a"), place.serve("b"));
    let (mut a, mut b) = (place.connect("a"), place.connect("b"));
    a.greet();
    b.greet();
    b.driver.begin(0, DISK, &write(0, 1), Some(readable(DATA, 512)));
    wait_until("the disk has stopped", || place.controls.is_stopped());
    a.driver.begin(0, DISK, &write(0, 1), Some(readable(DATA, 512)));
    // Its own only.
    assert_eq!(a.driver.function(ABORT_TASK_SET, DISK, 0), OK);
    assert_eq!(a.driver.end().1.response, ABORTED);
    assert_eq!(b.driver.requests.take_used(), None);
    // Those of all.
    assert_eq!(a.driver.function(UNIT_RESET, [1, 0, 0, 0, 0, 0, 0, 0], 0), OK);
    assert_eq!(b.driver.end().1.response, ABORTED);
    for front_end in [&mut a, &mut b] {
        assert_eq!(front_end.test().sense, Some((6, 0x29, 0x03)));
    }
}

#[test]
fn units_come_and_go_and_buffers_for_events_outlive_a_pause() {
    let place = on_image();
    let server = place.serve("a");
    let mut a = place.connect("a");
    for buffer in 0..4 {
        a.driver.offer_event(buffer);
    }
    wait_until("the buffers are taken", || {
        // Then the server asks to be told of further ones.
        !a.driver.event.needs_kick(0)
    });
    let base = a.stop_queue(1);
    assert_eq!(base, 0, "no buffer was used");
    a.start_queue(1, base);
    let (adapter, unit) = (server.handle(), Identity::from_name("late", "late"));
    let unit = Arc::new(Unit::new(UnitOptions::new(unit)));
    adapter
        .add((0, 1), unit, Arc::clone(&place.disk), Arc::default(), None)
        .unwrap();
    assert_eq!(a.driver.event(), (1, told(0, 1), 1));
    a.driver.greet(lun(0, 1));
    adapter.size_changed(0, 1);
    assert_eq!(a.driver.event(), (3, told(0, 1), 0x092a));
    let answer = a.driver.command(lun(0, 1), &TEST_UNIT_READY, None);
    assert_eq!(answer.sense, Some((6, 0x2a, 0x09)));
    adapter.remove(0, 1).unwrap();
    assert_eq!(a.driver.event(), (1, told(0, 1), 2));
}

#[test]
fn what_is_answered_can_be_found_by_the_next_server_if_there_is_to_be_one() {
    let place = Place::new(Arc::<Fickle>::default());
    let _server = place.serve("a");
    let mut a = place.connect("a");
    a.greet();
    let data = || Some(readable(DATA, 512));
    assert_eq!(a.driver.command(DISK, &write(0, 1), data()), Answer::good());
    let settled = || place.disk.settled.load(Ordering::SeqCst);
    assert_eq!(settled(), 0);
    a.reconnect_with_a_record();
    a.test();
    assert_eq!(a.driver.command(DISK, &write(0, 1), data()), Answer::good());
    assert_eq!(settled(), 1);
    // With FUA it is durable anyhow.
    let mut durable = write(0, 1);
    durable[1] = 0x08;
    assert_eq!(a.driver.command(DISK, &durable, data()), Answer::good());
    assert_eq!(settled(), 1);
}

#[test]
fn what_is_in_flight_is_repeated_by_the_next_server_and_forgotten_by_a_reset() {
    let place = stopped();
    let server = place.serve("a");
    let mut a = place.connect("a");
    a.reconnect_with_a_record();
    a.greet();
    a.driver.begin(0, DISK, &write(0, 1), Some(readable(DATA, 512)));
    wait_until("the disk has stopped", || place.controls.is_stopped());
    drop(server);
    assert_eq!(a.driver.requests.take_used(), None, "it is not answered");
    let _server = place.serve("a");
    a.reconnect();
    place.disk.fails.store(false, Ordering::SeqCst);
    place.controls.resume();
    // The new server's unit is the old one: it has only lost the nexus.
    let (_, answer) = a.driver.end();
    assert!(
        answer == Answer::good() || answer.sense.is_some_and(|sense| sense.0 == 6),
        "{answer:?}"
    );

    place.disk.fails.store(true, Ordering::SeqCst);
    a.driver.begin(4, DISK, &write(0, 1), Some(readable(DATA, 512)));
    wait_until("the disk has stopped", || place.controls.is_stopped());
    a.tell(request::RESET_DEVICE, &[], &[]);
    place.disk.fails.store(false, Ordering::SeqCst);
    place.controls.resume();
    a.driver.forget();
    a.set_up(true);
    assert_eq!(a.test().sense.map(|sense| sense.0), Some(6));
    assert_eq!(a.test(), Answer::good());
}
