//! A host that does nothing and remembers what it was asked.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};

use api::virtual_disk::TransferRequest;
use api::{
    AttachRequest, Attachment, AttachmentMetrics, Condition, DeviceId, DiskChange, DiskConfig, EventLog,
    Host, HostStatus, MachineDefinition, MachineState, MachineStatus, Metrics, Problem, ProblemKind,
    RestartPolicy, StorageAnswer, StorageRequest, Transfer, VmName,
};

/// It knows one machine, `db1`.
pub(crate) struct FakeHost {
    pub(crate) calls: Mutex<Vec<String>>,
    events: EventLog,
    socket: PathBuf,
    /// Requests that last wait as long as somebody writes here.
    pub(crate) hold: RwLock<()>,
}

impl FakeHost {
    /// The socket of `db1` is `socket`.
    pub(crate) fn new(socket: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            calls: Mutex::default(),
            events: EventLog::new(),
            socket,
            hold: RwLock::default(),
        })
    }

    fn done(&self, what: &str, name: &VmName) -> Result<MachineStatus, Problem> {
        if name.as_str() != "db1" {
            return Err(Problem::new(ProblemKind::NotFound, "there is no such machine").about(name));
        }
        self.calls.lock().unwrap().push(format!("{what} {name}"));
        Ok(MachineStatus {
            name: name.clone(),
            state: MachineState::Running,
            pid: Some(7),
            user: None,
            control_group: None,
            cpus: 1,
            memory: api::ByteSize::from_mib(64),
            autostart: true,
            restart: RestartPolicy::OnFailure,
            revision: "1f".into(),
            restarts: 0,
            last_end: None,
            config: "/state/vms/db1/vm.toml".into(),
            log: "/state/vms/db1/log".into(),
            console: None,
        })
    }

    fn storage_of(&self, pool: Option<&str>) -> Problem {
        self.calls.lock().unwrap().push(format!("storage {pool:?}"));
        Problem::new(ProblemKind::Conflict, "the pool is not for this")
    }
}

impl Host for FakeHost {
    fn status(&self) -> HostStatus {
        HostStatus {
            name: "host1".into(),
            version: "1".into(),
            pid: 1,
            uptime_seconds: 1,
            pools: Vec::new(),
            machines: vec![self.done("look at", &"db1".parse().unwrap()).unwrap()],
            attachments: Vec::new(),
            last_event: self.events.last(),
            notes: Vec::new(),
        }
    }

    fn machines(&self) -> Vec<MachineStatus> {
        self.status().machines
    }

    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        if request != StorageRequest::Status {
            drop(self.hold.read().unwrap());
        }
        Err(self.storage_of(pool))
    }

    fn transfer(&self, pool: Option<&str>, _request: TransferRequest) -> Result<Transfer, Problem> {
        Err(self.storage_of(pool))
    }

    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem> {
        self.calls.lock().unwrap().push(format!("attach {}", request.vm));
        Ok(Box::new(|mut line| {
            use std::io::Write;
            // The test sees it.
            let _ = line.write_all(b"vhost-user");
        }))
    }

    fn change_attachment(
        &self,
        _vm: &VmName,
        device: &DeviceId,
        _change: &DiskChange,
    ) -> Result<Attachment, Problem> {
        Err(Problem::new(ProblemKind::NotFound, "it is not in use").about(device))
    }

    fn define(
        &self,
        name: &VmName,
        _definition: MachineDefinition,
        condition: &Condition,
    ) -> Result<MachineStatus, Problem> {
        condition.check((name.as_str() == "db1").then_some("1f"))?;
        self.done("define", name)
    }

    fn machine(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.done("show", name)
    }

    fn start(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.done("start", name)
    }

    fn shut_down(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.done("shut down", name)
    }

    fn stop(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.done("stop", name)
    }

    fn delete(&self, name: &VmName, condition: &Condition) -> Result<(), Problem> {
        condition.check(Some("1f"))?;
        self.done("delete", name).map(drop)
    }

    fn machine_socket(&self, name: &VmName) -> Result<PathBuf, Problem> {
        self.done("find", name).map(|_| self.socket.clone())
    }

    fn allow_disk(&self, name: &VmName, _: &DiskConfig) -> Result<(), Problem> {
        self.done("allow a disk to", name).map(drop)
    }

    fn metrics(&self) -> Metrics {
        let attachment = Attachment {
            vm: "db1".parse().unwrap(),
            device: "disk0".parse().unwrap(),
            pool: "tank".into(),
            file: "/vm/db1.dsk".into(),
            read_only: false,
        };
        Metrics {
            host: Some(self.status()),
            attachments: vec![AttachmentMetrics {
                attachment,
                reads: 1,
                read_bytes: 512,
                writes: 2,
                written_bytes: 1024,
                flushes: 3,
                others: 4,
                errors: 5,
            }],
            ..Metrics::default()
        }
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
