//! SCSI disks of machines: an adapter and its units over the connections that a machine's process has to the manager. The machines are
//! front-ends without a guest.
#![allow(clippy::unwrap_used)]

#[path = "../../../storage-virtualizer/tests/driver/mod.rs"]
mod driver;
mod guest;
mod host;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::storage::{JobState, LayoutKind};
use api::virtual_disk::{DiskMode, DiskOperation};
use api::{
    AdapterConfig, DeviceId, DeviceState, DiskBus, DiskConfig, DiskLimits, DiskStatus, EventKind,
    ExpandedPolicy, Problem, ProblemKind, QueueSize, Right, StorageRequest, TraceOperation, UnitNews,
    UnitOrder, VmName,
};
use driver::scsi::{Answer, DATA, Initiator, TEST_UNIT_READY, lun, read, told, write};
use driver::{activate, readable, writable};
use expanded_api::{Answer as Answered, Request};
use host::{Manager, Unit, disk, make_pool};
use host_manager::MachineDoor;
use storage_virtualizer::vhost_user::front_end::VhostUserDevice;
use storage_virtualizer::virtio_scsi::scsi_feature;
use virtio_core::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use virtio_core::{GuestMemory, feature};

const ROOT: &str = "/root.dsk";
const OTHER: &str = "/other.dsk";
const SIZE: u64 = 16 << 20;
const FEATURES: u64 = feature::VERSION_1
    | feature::RING_EVENT_IDX
    | feature::RING_INDIRECT_DESC
    | scsi_feature::HOTPLUG
    | scsi_feature::CHANGE;
fn adapter(policy: ExpandedPolicy) -> AdapterConfig {
    AdapterConfig {
        queues: 1,
        queue_size: QueueSize::try_from(64_u64).unwrap(),
        targets: 1,
        expanded_api: policy,
    }
}

/// As the machine asks for it, when it has chosen the place.
fn unit(id: &str, file: &str, number: u16) -> DiskConfig {
    DiskConfig {
        bus: DiskBus::VirtioScsi,
        target: Some(0),
        lun: Some(number),
        ..disk(id, file)
    }
}

fn shared_memory() -> GuestMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 << 20).unwrap();
    let mapped = Some(FileOffset::new(file, 0));
    Arc::new(GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 16 << 20, mapped)]).unwrap())
}

/// A machine with SCSI disks, and its driver.
struct Machine {
    units: Vec<Unit>,
    driver: Initiator,
    device: VhostUserDevice,
}

impl Machine {
    fn new(manager: &Manager, vm: &str, disks: &[DiskConfig], adapter: &AdapterConfig) -> Self {
        let units: Vec<Unit> = disks
            .iter()
            .map(|disk| manager.unit(vm, disk, adapter).unwrap())
            .collect();
        let mut device = manager
            .adapter(vm, u32::try_from(disks.len()).unwrap(), adapter)
            .unwrap();
        let memory = shared_memory();
        let mut driver = Initiator::new(&memory);
        let queues = [&driver.control, &driver.event, &driver.requests];
        let queues = (0..).zip(queues).map(|(index, queue)| queue.active(index));
        activate(&mut device, &memory, FEATURES, queues.collect());
        for buffer in 0..4 {
            driver.offer_event(buffer);
        }
        Self {
            units,
            driver,
            device,
        }
    }

    fn write(&mut self, number: u16, byte: u8) {
        self.driver.put(DATA, &[byte; 4096]);
        let written = self
            .driver
            .command(lun(0, number), &write(0, 8), Some(readable(DATA, 4096)));
        assert_eq!(written, Answer::good());
    }

    fn read(&mut self, number: u16) -> u8 {
        let answer = self
            .driver
            .command(lun(0, number), &read(0, 8), Some(writable(DATA, 4096)));
        assert_eq!(answer, Answer::good());
        let mut bytes = [0; 4096];
        self.driver.get(DATA, &mut bytes);
        bytes[4095]
    }

    fn settle(&mut self, number: u16) {
        guest::settle(&mut self.driver, number);
    }

    fn ask(&mut self, number: u16, tag: u32, request: &Request) -> Result<Answered, Problem> {
        guest::ask(&mut self.driver, number, tag, request)
    }

    fn events(&mut self, number: u16) -> Vec<(String, Option<String>)> {
        guest::events(&mut self.driver, number)
    }

    /// Ends as a machine ends.
    fn end(self) {
        let Self {
            mut units,
            mut device,
            ..
        } = self;
        driver::reset_and_wait(&mut device);
        drop(device);
        for unit in &mut units {
            unit.order(UnitOrder::End);
            unit.is_closed();
        }
    }
}

fn with_manager(story: impl FnOnce(Manager)) {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT, OTHER]);
    story(Manager::start(folder.path(), &devices));
}

fn usual() -> AdapterConfig {
    adapter(ExpandedPolicy::default())
}

#[test]
fn disks_of_a_machine_are_units_of_its_adapter_and_come_and_go() {
    with_manager(|manager| {
        let mut machine = Machine::new(&manager, "web1", &[unit("root", ROOT, 0)], &usual());
        assert_eq!(machine.units[0].news(), UnitNews::Size(SIZE));
        machine.settle(0);
        assert_eq!(machine.units[0].news(), UnitNews::Found);
        machine.write(0, 7);
        // Of a machine that has it nobody else has it.
        let refused = manager
            .unit("web2", &unit("root", ROOT, 0), &usual())
            .err()
            .unwrap();
        assert!(refused.detail.contains("in use by machine `web1`"), "{refused}");

        // One more comes, and its guest is told.
        let mut late = DiskConfig {
            read_only: true,
            ..unit("late", OTHER, 5)
        };
        late.serial = Some("eleven".parse().unwrap());
        let mut later = manager.unit("web1", &late, &usual()).unwrap();
        assert_eq!(machine.driver.event(), (1, told(0, 5), 1));
        machine.settle(5);
        let serial = [0x12, 1, 0x80, 0, 64, 0];
        let answer = machine
            .driver
            .command(lun(0, 5), &serial, Some(writable(DATA, 64)));
        assert_eq!(answer.status, driver::scsi::GOOD);
        let mut page = [0; 64];
        machine.driver.get(DATA, &mut page);
        assert_eq!(&page[4..10], b"eleven");
        let answer = machine
            .driver
            .command(lun(0, 5), &write(0, 8), Some(readable(DATA, 4096)));
        assert_eq!(answer.sense.unwrap().0, 7, "DATA PROTECT: {answer:?}");
        manager.wait_for(2);

        let resize = DiskOperation::Resize {
            path: ROOT.into(),
            size: 2 * SIZE,
            force: false,
        };
        manager.pool().execute(StorageRequest::Disk(resize)).unwrap();
        assert_eq!(machine.driver.event(), (3, told(0, 0), 0x092a));
        assert_eq!(machine.units[0].news(), UnitNews::Size(2 * SIZE));

        // It goes again: the guest is told, the connection is closed, and others can have it.
        later.order(UnitOrder::Detach);
        assert_eq!(machine.driver.event(), (1, told(0, 5), 2));
        later.is_closed();
        manager.wait_for(1);
        let gone = machine.driver.command(lun(0, 5), &TEST_UNIT_READY, None);
        assert_ne!(gone, Answer::good());
        let other = Machine::new(&manager, "web2", &[unit("root", OTHER, 0)], &usual());
        machine.end();
        manager.wait_for(1);
        drop(manager.machine("web3", &disk("root", ROOT)));
        drop(other);
        manager.stop();
    });
}

#[test]
fn a_guest_goes_on_with_its_disks_under_the_next_manager() {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT, OTHER]);
    let mut manager = Manager::start(folder.path(), &devices);
    let fleeting = DiskConfig {
        mode: DiskMode::Nonpersistent,
        ..unit("data", OTHER, 1)
    };
    let disks = [unit("root", ROOT, 0), fleeting];
    let mut machine = Machine::new(&manager, "web1", &disks, &usual());
    (0..2).for_each(|number| machine.settle(number));
    machine.write(0, 3);
    machine.write(1, 4);
    for _ in 0..2 {
        manager.stop();
        // It is asked while nobody is there.
        machine.driver.begin(0, lun(0, 0), &TEST_UNIT_READY, None);
        manager = Manager::start(folder.path(), &devices);
        manager.goes_on = true;
        // The adapter's queues wait for all disks.
        let mut units = vec![manager.unit("web1", &disks[0], &usual()).unwrap()];
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(machine.driver.requests.take_used(), None);
        units.push(manager.unit("web1", &disks[1], &usual()).unwrap());
        machine.units = units;
        // Another server knows nothing of this initiator.
        assert_eq!(machine.driver.end().1.sense.unwrap().0, 6);
        (0..2).for_each(|number| machine.settle(number));
        assert_eq!((machine.read(0), machine.read(1)), (3, 4));
    }
    manager.goes_on = false;
    machine.end();
    // It has ended in order: what was not to last is gone.
    let mut machine = Machine::new(&manager, "web1", &disks, &usual());
    (0..2).for_each(|number| machine.settle(number));
    assert_eq!((machine.read(0), machine.read(1)), (3, 0));
    // A process that dies is followed at once by the next.
    machine.write(0, 9);
    drop(machine);
    let mut machine = Machine::new(&manager, "web1", &disks, &usual());
    machine.settle(0);
    assert_eq!(machine.read(0), 9);
    manager.stop();
}

#[test]
fn what_an_adapter_cannot_be_is_refused() {
    with_manager(|manager| {
        let no_disks = manager.adapter("web1", 1, &usual()).err().unwrap();
        assert!(no_disks.detail.contains("only 0 of them"), "{no_disks}");
        let machine = Machine::new(&manager, "web1", &[unit("root", ROOT, 0)], &usual());
        let again = manager.adapter("web1", 1, &usual()).err().unwrap();
        assert!(again.detail.contains("in use by another process"), "{again}");
        let place = manager
            .unit("web1", &unit("data", OTHER, 0), &usual())
            .err()
            .unwrap();
        assert_eq!(place.kind, ProblemKind::Conflict, "{place}");
        let nowhere = DiskConfig {
            lun: None,
            ..unit("data", OTHER, 0)
        };
        let nowhere = manager.unit("web1", &nowhere, &usual()).err().unwrap();
        assert_eq!(nowhere.object.as_deref(), Some("lun"), "{nowhere}");
        let many = AdapterConfig {
            queues: 200,
            ..usual()
        };
        let many = manager
            .unit("web1", &unit("data", OTHER, 1), &many)
            .err()
            .unwrap();
        assert_eq!(many.object.as_deref(), Some("adapter"), "{many}");
        // Nonsense costs the one who says it his disk.
        let mut silly = manager.unit("web2", &unit("data", OTHER, 1), &usual()).unwrap();
        silly.0.write_all(b"x").unwrap();
        silly.is_closed();
        manager.wait_for(1);
        drop(machine);
        manager.stop();
    });
}

#[test]
fn disks_share_limits_and_their_requests_are_recorded() {
    with_manager(|manager| {
        let limits = DiskLimits {
            iops: Some(20),
            iops_burst: Some(1),
            ..DiskLimits::default()
        };
        let disks = [("a", ROOT), ("b", OTHER)].map(|(id, file)| DiskConfig {
            limit_group: Some("bulk".parse().unwrap()),
            ..disk(id, file)
        });
        let fronts = disks
            .clone()
            .map(|disk| manager.machine_in("web1", &disk, limits));
        let mut queues = fronts.each_ref().map(|front| front.queues().unwrap().remove(0));
        let mut time = |requests: u32| {
            let begin = Instant::now();
            for number in 0..requests {
                let queue = &mut queues[number as usize % 2];
                queue.submit(0, 0, 0, 4096, true);
                queue.notify().unwrap();
                while queue.take_used().unwrap().is_none() {
                    assert!(queue.wait(host::SOON).unwrap());
                }
            }
            begin.elapsed()
        };
        assert!(time(8) > Duration::from_millis(250), "20 of both in a second");
        let (vm, bulk): (VmName, DeviceId) = ("web1".parse().unwrap(), "bulk".parse().unwrap());
        let free = DiskLimits {
            iops: Some(0),
            ..DiskLimits::default()
        };
        let now = manager.disks().change_group(&vm, &bulk, &free).unwrap();
        assert_eq!(now.iops, None);
        assert!(time(40) < Duration::from_secs(1));
        let page = manager.disks().trace(&vm, &"a".parse().unwrap(), "").unwrap();
        assert_eq!(page.records.len(), 24);
        assert!(
            page.records
                .iter()
                .all(|record| record.operation == TraceOperation::Read)
        );
        let none = manager.disks().trace(&vm, &"c".parse().unwrap(), "").unwrap_err();
        assert_eq!(none.kind, ProblemKind::NotFound);
        drop(fronts);
        manager.wait_for(0);
        let gone = manager.disks().change_group(&vm, &bulk, &free).unwrap_err();
        assert_eq!(gone.kind, ProblemKind::NotFound);
        manager.stop();
    });
}

/// The machine's process, as the manager reaches it: it asks for the disk that its guest wants.
struct Process {
    socket: std::path::PathBuf,
    units: Mutex<Vec<Unit>>,
}

impl MachineDoor for Process {
    fn attach_disk(&self, vm: &VmName, disk: &DiskConfig) -> Result<DiskStatus, Problem> {
        assert_eq!(disk.pool.as_deref(), Some(host::POOL));
        let config = DiskConfig {
            id: "new".parse().unwrap(),
            target: Some(0),
            lun: Some(3),
            ..disk.clone()
        };
        let unit = host::unit_at(&self.socket, vm.as_str(), &config, &adapter(policy()), false)?;
        self.units.lock().unwrap().push(unit);
        Ok(DiskStatus {
            config,
            state: DeviceState::Attached,
            size: api::ByteSize::from_bytes(1 << 20),
            stopped: None,
        })
    }

    fn detach(&self, _: &VmName, device: &DeviceId) -> Result<(), Problem> {
        assert_eq!(device.as_str(), "new");
        self.units.lock().unwrap()[0].order(UnitOrder::Detach);
        Ok(())
    }
}

fn policy() -> ExpandedPolicy {
    ExpandedPolicy {
        allow: vec![Right::Snapshot, Right::Create, Right::Delete],
        objects: vec!["/web1/*".into()],
        ..ExpandedPolicy::default()
    }
}

#[test]
fn a_guest_manages_its_own_disks_and_no_others() {
    with_manager(|manager| {
        manager.disks().reach_machines(Arc::new(Process {
            socket: manager.socket().to_owned(),
            units: Mutex::default(),
        }));
        let other = Machine::new(&manager, "web2", &[unit("root", OTHER, 0)], &usual());
        let mut machine = Machine::new(&manager, "web1", &[unit("root", ROOT, 0)], &adapter(policy()));
        machine.settle(0);
        let Answered::Description(known) = machine.ask(0, 1, &Request::Describe {}).unwrap() else {
            panic!("no description");
        };
        assert_eq!(known.vm.as_str(), "web1");
        assert_eq!(
            known.rights,
            [Right::Observe, Right::Snapshot, Right::Create, Right::Delete]
        );
        let Answered::Disks(disks) = machine.ask(0, 2, &Request::ListDisks {}).unwrap() else {
            panic!("no disks");
        };
        let paths: Vec<_> = disks.iter().filter_map(|disk| disk.path.as_deref()).collect();
        assert_eq!(paths, [ROOT], "not that of web2");

        let snapshot = |disks: Vec<String>| Request::Snapshot {
            disks,
            name: "noon".into(),
            description: String::new(),
        };
        machine.ask(0, 3, &snapshot(Vec::new())).unwrap();
        let refused = machine.ask(0, 4, &snapshot(vec![OTHER.into()])).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Forbidden, "{refused}");
        let create = Request::CreateDisk {
            disk: "/web1/new.dsk".into(),
            size: 1 << 20,
            thick: false,
            target: None,
            checksums: None,
            attach: true,
        };
        let Answered::Attached(new) = machine.ask(0, 5, &create).unwrap() else {
            panic!("it is not attached");
        };
        assert_eq!(new.id.as_str(), "new");
        // It is there, and the guest is told: by the adapter, and by the expanded API.
        assert_eq!(machine.driver.event(), (1, told(0, 3), 1));
        machine.settle(3);
        let log = machine.events(3);
        assert!(
            log.contains(&("device-attached".to_owned(), Some("new".to_owned())))
                && log.contains(&("device-active".to_owned(), Some("new".to_owned()))),
            "{log:?}"
        );
        machine
            .ask(
                0,
                6,
                &Request::DetachDisk {
                    disk: "/web1/new.dsk".into(),
                },
            )
            .unwrap();
        assert_eq!(machine.driver.event(), (1, told(0, 3), 2));
        let removed = ("device-removed".to_owned(), Some("new".to_owned()));
        let begin = Instant::now();
        while !machine.events(0).contains(&removed) {
            assert!(begin.elapsed() < host::SOON);
        }
        machine
            .ask(
                0,
                7,
                &Request::DeleteDisk {
                    disk: "/web1/new.dsk".into(),
                },
            )
            .unwrap();
        // The administrator sees who did it.
        let page = manager.disks().events().page(0, 100);
        let web1: VmName = "web1".parse().unwrap();
        assert!(page.events.iter().any(|event| matches!(&event.kind,
            EventKind::GuestCommand { vm: Some(vm), command, .. } if *vm == web1 && command == "create-disk")));
        assert!(page.events.iter().any(|event| matches!(&event.kind,
            EventKind::GuestCommandRefused { vm: Some(vm), command, .. } if *vm == web1 && command == "snapshot")));
        drop((other, machine));
        manager.stop();
    });
}

#[test]
fn the_next_manager_knows_whose_jobs_are_whose() {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT, OTHER]);
    let policy = ExpandedPolicy {
        allow: vec![Right::Layout, Right::Move],
        volumes: vec!["*".into()],
        ..ExpandedPolicy::default()
    };
    let mut manager = Manager::start(folder.path(), &devices);
    let mut machine = Machine::new(
        &manager,
        "web1",
        &[unit("root", ROOT, 0)],
        &adapter(policy.clone()),
    );
    machine.settle(0);
    for block in 0..256 {
        machine.driver.put(DATA, &[9; 4096]);
        let written = machine
            .driver
            .command(lun(0, 0), &write(block * 8, 8), Some(readable(DATA, 4096)));
        assert_eq!(written, Answer::good());
    }
    let layout = Request::SetLayout {
        volume: "data".into(),
        layout: LayoutKind::Stripe,
        columns: 0,
        copies: 0,
        stripe_unit: 0,
        devices: Vec::new(),
        throttle: 4096,
    };
    let job = |answer| match answer {
        Ok(Answered::Jobs(jobs)) => jobs.into_iter().next().unwrap(),
        other => panic!("{other:?}"),
    };
    let begun = job(machine.ask(0, 1, &layout));
    drop(machine);
    manager.stop();

    manager = Manager::start(folder.path(), &devices);
    let mut other = Machine::new(
        &manager,
        "web2",
        &[unit("root", OTHER, 0)],
        &adapter(policy.clone()),
    );
    let mut machine = Machine::new(&manager, "web1", &[unit("root", ROOT, 0)], &adapter(policy));
    other.settle(0);
    machine.settle(0);
    let known = job(machine.ask(0, 1, &Request::JobStatus { job: begun.id }));
    assert_eq!(
        (known.state, known.kind.as_str()),
        (JobState::Running, "set-layout")
    );
    let ask = |number| Request::CancelJob { job: number };
    let foreign = other.ask(0, 1, &ask(begun.id)).unwrap_err();
    let unknown = other.ask(0, 2, &ask(4000)).unwrap_err();
    assert_eq!(foreign.kind, ProblemKind::NotFound, "{foreign}");
    assert_eq!(
        foreign.detail.replace(&begun.id.to_string(), "4000"),
        unknown.detail
    );
    job(machine.ask(0, 2, &ask(begun.id)));
    // The guest and the administrator are told.
    let begin = Instant::now();
    let what = format!("job {}: {}", begun.id, begun.what);
    while !machine
        .events(0)
        .contains(&("job-cancelled".to_owned(), Some(what.clone())))
    {
        assert!(begin.elapsed() < host::SOON);
    }
    let web1: VmName = "web1".parse().unwrap();
    let page = manager.disks().events().page(0, 100);
    assert!(page.events.iter().any(|event| matches!(&event.kind,
        EventKind::GuestJobEnded { vm: Some(vm), job, state: JobState::Cancelled, .. } if *vm == web1 && *job == begun.id)));
    drop((other, machine));
    manager.stop();
}
