//! A small host for tests: a pool on two files, and the service of its disks behind a real management socket. It has no machines.
#![allow(dead_code, reason = "not every test needs everything")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::file::FileOperation;
use api::storage::{LayoutKind, NewDevice, Operation, ReadPolicy, Shape};
use api::virtual_disk::{DiskOperation, TransferRequest};
use api::{
    ATTACHMENT_PROTOCOL, AdapterConfig, AdapterRequest, AttachRequest, Attachment, Condition, DeviceId,
    DiskChange, DiskConfig, DiskLimits, EventKind, EventLog, Host, HostStatus, MachineDefinition,
    MachineStatus, Metrics, Problem, ProblemKind, StorageAnswer, StorageRequest, TracePage, Transfer,
    UnitNews, UnitOrder, VmName,
};
use block_io::WorkerOptions;
use host_manager::DiskService;
use management::{ClientError, Server, ServerHandle, blocking};
use storage_manager::{Flow, Force, HostedPool, Notice};
use storage_virtualizer::vhost_user::front_end::{
    FrontEndKind, FrontEndOptions, LinkEvents, VhostUserDevice, dial,
};
use vhost_user_load::front_end::{FrontEnd, Greeting, Options};

/// The name of the pool.
pub(crate) const POOL: &str = "tank";
/// Long enough for anything that is to happen.
pub(crate) const SOON: Duration = Duration::from_secs(15);

fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

/// Makes a pool with a mirrored volume in `folder`, and in it disks of these names, 16 MiB each; its devices.
pub(crate) fn make_pool(folder: &Path, disks: &[&str]) -> Vec<String> {
    let paths: Vec<String> = (0..2)
        .map(|number| {
            let path = folder.join(format!("d{number}.img"));
            File::create(&path).unwrap().set_len(256 << 20).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let devices = paths.iter().map(|path| NewDevice {
        path: path.clone(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    });
    storage_manager::create(POOL, devices.collect(), &mut go_on).unwrap();
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(paths.clone(), format, &mut go_on).unwrap();
    let volume = Operation::CreateVolume {
        name: "data".into(),
        size: 96 << 20,
        block: 4096,
        shape: Shape {
            layout: LayoutKind::Mirror,
            columns: 0,
            copies: 0,
            stripe_unit: 0,
            class: String::new(),
            devices: Vec::new(),
        },
        read_policy: ReadPolicy::default(),
        raw: false,
    };
    storage_manager::execute(paths.clone(), Force::No, volume, &mut go_on).unwrap();
    for disk in disks {
        let create = DiskOperation::Create {
            path: (*disk).into(),
            size: 16 << 20,
            thick: false,
            target: None,
            checksums: None,
        };
        storage_manager::execute_disk(paths.clone(), create, &mut go_on).unwrap();
    }
    paths
}

/// What the management server asks.
struct Front {
    pool: Arc<HostedPool>,
    disks: DiskService,
}

fn no_machines<T>() -> Result<T, Problem> {
    Err(Problem::new(ProblemKind::NotFound, "this host has no machines"))
}

impl Front {
    fn has(&self, pool: Option<&str>) -> Result<(), Problem> {
        match pool {
            None | Some(POOL) => Ok(()),
            Some(other) => Err(Problem::new(
                ProblemKind::NotFound,
                format!("there is no pool `{other}`"),
            )),
        }
    }
}

impl Host for Front {
    fn status(&self) -> HostStatus {
        HostStatus {
            name: "test".into(),
            version: String::new(),
            pid: std::process::id(),
            uptime_seconds: 0,
            pools: Vec::new(),
            machines: Vec::new(),
            attachments: self.disks.list(),
            last_event: self.events().last(),
            notes: Vec::new(),
        }
    }

    fn machines(&self) -> Vec<MachineStatus> {
        Vec::new()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.disks.list()
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.has(pool)?;
        self.pool.execute(request)
    }

    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem> {
        self.has(pool)?;
        self.pool.transfer(request)
    }

    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem> {
        self.has(request.pool.as_deref())?;
        self.disks.attach(POOL, &self.pool, request)
    }

    fn attach_adapter(&self, request: AdapterRequest) -> Result<Transfer, Problem> {
        self.has(request.pool.as_deref())?;
        self.disks.attach_adapter(POOL, &self.pool, &request)
    }

    fn trace_attachment(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        self.disks.trace(vm, device, after)
    }

    fn change_group(
        &self,
        vm: &VmName,
        group: &DeviceId,
        change: &DiskLimits,
    ) -> Result<DiskLimits, Problem> {
        self.disks.change_group(vm, group, change)
    }

    fn change_attachment(
        &self,
        vm: &VmName,
        device: &DeviceId,
        change: &DiskChange,
    ) -> Result<Attachment, Problem> {
        self.disks.change(vm, device, change)
    }

    fn define(&self, _: &VmName, _: MachineDefinition, _: &Condition) -> Result<MachineStatus, Problem> {
        no_machines()
    }

    fn machine(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        no_machines()
    }

    fn start(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        no_machines()
    }

    fn shut_down(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        no_machines()
    }

    fn stop(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        no_machines()
    }

    fn delete(&self, _: &VmName, _: &Condition) -> Result<(), Problem> {
        no_machines()
    }

    fn machine_socket(&self, _: &VmName) -> Result<PathBuf, Problem> {
        no_machines()
    }

    fn allow_disk(&self, _: &VmName, _: &DiskConfig) -> Result<(), Problem> {
        no_machines()
    }

    fn metrics(&self) -> Metrics {
        Metrics::default()
    }

    fn events(&self) -> &EventLog {
        self.disks.events()
    }
}

/// The connection of a SCSI disk.
pub(crate) struct Unit(pub(crate) UnixStream);

impl Unit {
    pub(crate) fn news(&mut self) -> UnitNews {
        let mut bytes = [0; UnitNews::LENGTH];
        self.0.set_read_timeout(Some(SOON)).unwrap();
        self.0.read_exact(&mut bytes).unwrap();
        UnitNews::decode(bytes).unwrap()
    }

    pub(crate) fn order(&mut self, order: UnitOrder) {
        self.0.write_all(&[order.encode()]).unwrap();
    }

    /// Waits until the manager has closed it.
    pub(crate) fn is_closed(&mut self) {
        self.0.set_read_timeout(Some(SOON)).unwrap();
        let mut rest = Vec::new();
        // It may be reset instead of being closed.
        if let Err(error) = self.0.read_to_end(&mut rest) {
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }
}

/// Does not care whether the manager is there.
pub(crate) struct Deaf;

impl LinkEvents for Deaf {
    fn lost(&self, _: &str) {}
    fn back(&self) {}
}

/// A manager that runs.
pub(crate) struct Manager {
    /// Machines say that they go on.
    pub(crate) goes_on: bool,
    front: Arc<Front>,
    socket: PathBuf,
    server: ServerHandle,
}

impl Manager {
    /// Opens the pool and listens at `host.sock` in `folder`.
    pub(crate) fn start(folder: &Path, devices: &[String]) -> Self {
        let pool = HostedPool::open("io-pool", devices.to_vec(), WorkerOptions::default()).unwrap();
        let front = Arc::new(Front {
            pool: Arc::new(pool),
            disks: DiskService::new(Arc::new(EventLog::new())),
        });
        let socket = folder.join("host.sock");
        let host = Arc::clone(&front) as Arc<dyn Host>;
        let server = Server::bind(&socket).unwrap().start_host(host).unwrap();
        Self {
            goes_on: false,
            front,
            socket,
            server,
        }
    }

    /// Ends it as a manager ends: machines wait.
    pub(crate) fn stop(self) {
        drop(self.server);
        self.front.disks.close();
        self.front.pool.close().unwrap();
    }

    pub(crate) fn disks(&self) -> &DiskService {
        &self.front.disks
    }

    pub(crate) fn pool(&self) -> &HostedPool {
        &self.front.pool
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new connection that is the attachment of a disk.
    pub(crate) fn attach(&self, vm: &str, disk: &DiskConfig) -> Result<UnixStream, Problem> {
        let stream = UnixStream::connect(&self.socket).unwrap();
        match blocking::attach(&stream, &request(vm, disk, false), SOON) {
            Ok(()) => Ok(stream),
            Err(ClientError::Problem(problem)) => Err(*problem),
            Err(error) => panic!("{error}"),
        }
    }

    /// The connection of a machine's SCSI disk.
    pub(crate) fn unit(&self, vm: &str, disk: &DiskConfig, adapter: &AdapterConfig) -> Result<Unit, Problem> {
        unit_at(&self.socket, vm, disk, adapter, self.goes_on)
    }

    /// A machine as far as a disk is concerned that shares `limits` with others.
    pub(crate) fn machine_in(&self, vm: &str, disk: &DiskConfig, limits: DiskLimits) -> FrontEnd {
        self.machine_that_asks(AttachRequest {
            group_limits: Some(limits),
            ..request(vm, disk, false)
        })
    }

    /// A machine as far as a disk is concerned that asks for it in these words.
    pub(crate) fn machine_that_asks(&self, asked: AttachRequest) -> FrontEnd {
        let options = self.options(asked.vm.as_str(), &asked.disk);
        let greeting = Greeting(Arc::new(move |stream: &UnixStream| {
            Ok(blocking::attach(stream, &asked, SOON)?)
        }));
        FrontEnd::connect(&Options {
            greeting: Some(greeting),
            ..options
        })
        .unwrap()
    }

    /// Has the queues of a machine's SCSI adapter served.
    pub(crate) fn adapter(
        &self,
        vm: &str,
        disks: u32,
        adapter: &AdapterConfig,
    ) -> Result<VhostUserDevice, Problem> {
        let asked = AdapterRequest {
            vm: vm.parse().unwrap(),
            pool: None,
            adapter: adapter.clone(),
            disks,
            memory_stays: false,
        };
        let words =
            blocking::request("POST", "/v1/scsi-adapters", &asked, Some(ATTACHMENT_PROTOCOL)).unwrap();
        let (socket, refusal) = (self.socket.clone(), Arc::new(Mutex::new(None)));
        let refused = Arc::clone(&refusal);
        let dial = Arc::new(move || {
            let dialled = dial(&socket)?;
            (&dialled.socket).write_all(&words)?;
            blocking::upgraded(&dialled.socket, SOON).map_err(|error| {
                let text = error.to_string();
                if let ClientError::Problem(problem) = error {
                    *refused.lock().unwrap() = Some(*problem);
                }
                io::Error::other(text)
            })?;
            Ok(dialled)
        });
        let options = FrontEndOptions {
            kind: FrontEndKind::Scsi,
            name: vm.to_owned(),
            queues: adapter.queues.into(),
            queue_size: adapter.queue_size.get(),
            on_start: None,
            observer: Arc::new(Deaf),
        };
        VhostUserDevice::open(dial, options).map_err(|error| {
            refusal
                .lock()
                .unwrap()
                .take()
                .unwrap_or_else(|| panic!("{error:?}"))
        })
    }

    /// A machine, as far as its disk is concerned.
    pub(crate) fn machine(&self, vm: &str, disk: &DiskConfig) -> FrontEnd {
        FrontEnd::connect(&self.options(vm, disk)).unwrap()
    }

    pub(crate) fn options(&self, vm: &str, disk: &DiskConfig) -> Options {
        let (vm, disk, queues) = (vm.to_owned(), disk.clone(), disk.queues.into());
        let had = AtomicBool::new(false);
        Options {
            socket: self.socket.clone(),
            queues,
            queue_size: 128,
            block_size: 4096,
            segment: None,
            inflight: true,
            patience: Duration::from_secs(5),
            greeting: Some(Greeting(Arc::new(move |stream| {
                let goes_on = had.load(Ordering::Relaxed);
                blocking::attach(stream, &request(&vm, &disk, goes_on), SOON)?;
                had.store(true, Ordering::Relaxed);
                Ok(())
            }))),
        }
    }

    /// Waits until the machines use as many disks.
    pub(crate) fn wait_for(&self, attachments: usize) {
        let begin = std::time::Instant::now();
        while self.disks().list().len() != attachments {
            assert!(begin.elapsed() < SOON, "{:?}", self.disks().list());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What happened, in short.
    pub(crate) fn happened(&self) -> Vec<String> {
        let page = self.front.events().page(0, 100);
        let short = page.events.into_iter().filter_map(|event| match event.kind {
            EventKind::DiskAttached { vm, id, file } => Some(format!("{vm} {id} has {file}")),
            EventKind::DiskDetached { vm, id, file } => Some(format!("{vm} {id} lets {file} go")),
            _ => None,
        });
        short.collect()
    }
}

pub(crate) fn request(vm: &str, disk: &DiskConfig, goes_on: bool) -> AttachRequest {
    AttachRequest {
        vm: vm.parse().unwrap(),
        pool: None,
        disk: disk.clone(),
        adapter: None,
        group_limits: None,
        goes_on,
        memory_stays: false,
    }
}

/// A disk of the pool, as vm.toml would have it.
pub(crate) fn disk(id: &str, file: &str) -> DiskConfig {
    DiskConfig {
        id: id.parse().unwrap(),
        image: None,
        file: Some(file.into()),
        ..DiskConfig::new("")
    }
}

/// Asks the manager at `socket` for a SCSI disk.
pub(crate) fn unit_at(
    socket: &Path,
    vm: &str,
    disk: &DiskConfig,
    adapter: &AdapterConfig,
    goes_on: bool,
) -> Result<Unit, Problem> {
    let asked = AttachRequest {
        adapter: Some(adapter.clone()),
        ..request(vm, disk, goes_on)
    };
    let stream = UnixStream::connect(socket).unwrap();
    match blocking::attach(&stream, &asked, SOON) {
        Ok(()) => Ok(Unit(stream)),
        Err(ClientError::Problem(problem)) => Err(*problem),
        Err(error) => panic!("{error}"),
    }
}
