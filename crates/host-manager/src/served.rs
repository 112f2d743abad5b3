//! The pools, and the disks in them, for administrators and for machines.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use api::virtual_disk::TransferRequest;
use api::{
    AdapterConfig, AdapterRequest, AttachRequest, Attachment, DeviceId, DiskChange, DiskConfig, DiskLimits,
    DiskStatus, EventLog, Problem, ProblemKind, Removal, StorageAnswer, StorageRequest, TracePage, Transfer,
    VmName,
};
use management::{ClientError, blocking};
use serde::Serialize;
use serde::de::DeserializeOwned;
use storage_manager::HostedPool;

use crate::disks::{DiskService, MachineDoor};
use crate::door::Storage;
use crate::machines::Machines;

/// How long a machine's process may take to attach a disk: it asks this manager for it.
const ATTACH: Duration = Duration::from_secs(60);

pub(crate) struct Pool {
    pub(crate) name: String,
    pub(crate) hosted: Arc<HostedPool>,
}

/// The pools, and the disks in them.
pub(crate) struct Served {
    pub(crate) pools: Vec<Pool>,
    pub(crate) disks: DiskService,
    machines: OnceLock<Weak<Machines>>,
}

impl Served {
    pub(crate) fn new(pools: Vec<Pool>, events: &Arc<EventLog>) -> Self {
        Self {
            pools,
            disks: DiskService::new(Arc::clone(events)),
            machines: OnceLock::new(),
        }
    }

    /// Guests may ask for what their machines' definitions say from now on. To be called once.
    pub(crate) fn reach(&self, machines: &Arc<Machines>) {
        let machines = Arc::downgrade(machines);
        self.disks
            .reach_machines(Arc::new(Processes(Weak::clone(&machines))));
        // The first one counts.
        let _ = self.machines.set(machines);
    }

    /// What a guest may is what the definition of its machine says, whatever its process says.
    fn set_policy(&self, vm: &VmName, adapter: &mut AdapterConfig) {
        let machines = self.machines.get().and_then(Weak::upgrade);
        if let Some(policy) = machines.and_then(|machines| machines.policy(vm)) {
            adapter.expanded_api = policy;
        }
    }

    pub(crate) fn pool(&self, name: Option<&str>) -> Result<&Pool, Problem> {
        let names = || {
            let names: Vec<&str> = self.pools.iter().map(|pool| pool.name.as_str()).collect();
            names.join(", ")
        };
        match (name, self.pools.as_slice()) {
            (None, [only]) => Ok(only),
            (None, []) => {
                let problem = Problem::new(ProblemKind::NotFound, "this manager has no pool");
                Err(problem.remedy("name its devices under [[pool]] in host.toml"))
            }
            (None, _) => {
                let problem = Problem::new(ProblemKind::Invalid, "it is not said which pool is meant");
                Err(problem.remedy(format!("say it by --pool; there are {}", names())))
            }
            (Some(name), pools) => pools.iter().find(|pool| pool.name == name).ok_or_else(|| {
                let problem = Problem::new(ProblemKind::NotFound, "there is no such pool").about(name);
                problem.remedy(format!("there are: {}", names()))
            }),
        }
    }
}

impl Storage for Served {
    fn pool_name(&self, pool: Option<&str>) -> Option<String> {
        Some(self.pool(pool).ok()?.name.clone())
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool(pool)?.hosted.execute(request)
    }

    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem> {
        self.pool(pool)?.hosted.transfer(request)
    }

    fn attach(&self, mut request: AttachRequest) -> Result<Transfer, Problem> {
        if let Some(adapter) = &mut request.adapter {
            self.set_policy(&request.vm, adapter);
        }
        let pool = self.pool(request.pool.as_deref())?;
        self.disks.attach(&pool.name, &pool.hosted, request)
    }

    fn change(&self, vm: &VmName, device: &DeviceId, change: &DiskChange) -> Result<Attachment, Problem> {
        self.disks.change(vm, device, change)
    }

    fn attach_adapter(&self, mut request: AdapterRequest) -> Result<Transfer, Problem> {
        self.set_policy(&request.vm, &mut request.adapter);
        let pool = self.pool(request.pool.as_deref())?;
        self.disks.attach_adapter(&pool.name, &pool.hosted, &request)
    }

    fn trace(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem> {
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
}

/// The way to the processes of machines that this manager runs: their management sockets.
struct Processes(Weak<Machines>);

impl Processes {
    fn machines(&self) -> Result<Arc<Machines>, Problem> {
        let ends = || Problem::new(ProblemKind::Conflict, "the manager is about to end");
        self.0.upgrade().ok_or_else(ends)
    }

    fn ask<T: DeserializeOwned>(
        &self,
        vm: &VmName,
        (method, path): (&str, &str),
        body: &impl Serialize,
    ) -> Result<T, Problem> {
        let unreachable = |error: &dyn std::error::Error| {
            let text = format!("its process cannot be asked: {}", block_io::error_chain(error));
            Problem::new(ProblemKind::Host, text).about(vm)
        };
        let stream =
            UnixStream::connect(self.machines()?.socket(vm)?).map_err(|error| unreachable(&error))?;
        blocking::ask(&stream, method, path, body, ATTACH).map_err(|error| match error {
            ClientError::Problem(problem) => *problem,
            error => unreachable(&error),
        })
    }
}

impl MachineDoor for Processes {
    fn attach_disk(&self, vm: &VmName, disk: &DiskConfig) -> Result<DiskStatus, Problem> {
        // Its process will ask for it, at its own socket.
        self.machines()?.allow_disk(vm, disk)?;
        self.ask(vm, ("POST", "/v1/vm/disks"), disk)
    }

    fn detach(&self, vm: &VmName, device: &DeviceId) -> Result<(), Problem> {
        let path = format!("/v1/vm/disks/{device}");
        self.ask::<Removal>(vm, ("DELETE", &path), &()).map(drop)
    }
}
