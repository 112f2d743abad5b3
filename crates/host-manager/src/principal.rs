//! A machine as its guest sees it by the expanded API, when the manager has its disks: what the guest may ask for is done here, to the pool and
//! to the disks that the machine has of it; what only its process can do, attach and detach, its process is asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use api::virtual_disk::TransferRequest;
use api::{
    ByteSize, DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventKind, EventLog, NetConfig,
    NetStatus, Problem, ProblemKind, StorageAnswer, StorageRequest, Transfer, Vm, VmName, VmState, VmStatus,
};
use storage_manager::HostedPool;

use crate::disks::{MachineDoor, Shared};

/// A machine whose SCSI disks are of one pool.
pub(crate) struct Principal {
    vm: VmName,
    service: Weak<Shared>,
    pool_name: String,
    pool: Arc<HostedPool>,
    events: Arc<EventLog>,
    begin: Instant,
}

impl Principal {
    /// What happens to its disks is told in `events`.
    pub(crate) fn new(
        service: &Arc<Shared>,
        vm: &VmName,
        (pool_name, pool): (&str, &Arc<HostedPool>),
        events: &Arc<EventLog>,
    ) -> Self {
        Self {
            vm: vm.clone(),
            service: Arc::downgrade(service),
            pool_name: pool_name.to_owned(),
            pool: Arc::clone(pool),
            events: Arc::clone(events),
            begin: Instant::now(),
        }
    }

    fn service(&self) -> Result<Arc<Shared>, Problem> {
        self.service.upgrade().ok_or_else(crate::places::closing)
    }

    fn door(&self) -> Result<Arc<dyn MachineDoor>, Problem> {
        let door = self.service()?.machines().cloned();
        door.ok_or_else(|| elsewhere("attaching and detaching disks"))
    }
}

/// It is no matter of disks.
fn elsewhere(what: &str) -> Problem {
    Problem::new(
        ProblemKind::Conflict,
        format!("{what} is not what a guest can have of the manager of its disks"),
    )
    .remedy("ask the administrator of the machine")
}

impl Vm for Principal {
    fn status(&self) -> VmStatus {
        let disks = self
            .service()
            .map(|service| service.disks_of(&self.vm, &self.pool_name));
        VmStatus {
            name: self.vm.clone(),
            state: VmState::Running,
            pid: std::process::id(),
            uptime_seconds: self.begin.elapsed().as_secs(),
            resets: 0,
            cpus: 0,
            memory: ByteSize::from_bytes(0),
            disks: disks.unwrap_or_default(),
            nets: Vec::new(),
            limit_groups: BTreeMap::new(),
            last_event: self.events.last(),
        }
    }

    fn power_button(&self) -> Result<(), Problem> {
        Err(elsewhere("the power button"))
    }

    fn stop(&self, _: &str) -> Result<(), Problem> {
        Err(elsewhere("the machine's end"))
    }

    fn reset(&self) -> Result<(), Problem> {
        Err(elsewhere("a reset"))
    }

    fn pause(&self) -> Result<(), Problem> {
        Err(elsewhere("a pause"))
    }

    fn resume(&self) -> Result<(), Problem> {
        Err(elsewhere("a pause's end"))
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        let disk = DiskConfig {
            pool: Some(self.pool_name.clone()),
            ..disk
        };
        self.door()?.attach_disk(&self.vm, &disk)
    }

    fn attach_net(&self, _: NetConfig) -> Result<NetStatus, Problem> {
        Err(elsewhere("a network"))
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.door()?.detach(&self.vm, id)
    }

    fn change_disk(&self, _: &DeviceId, _: &DiskChange) -> Result<DiskStatus, Problem> {
        Err(elsewhere("a change of limits"))
    }

    fn change_limits(&self, _: &DeviceId, _: &DiskLimits) -> Result<DiskLimits, Problem> {
        Err(elsewhere("a change of limits"))
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool.execute(request)
    }

    fn transfer(&self, _: TransferRequest) -> Result<Transfer, Problem> {
        Err(elsewhere("an image"))
    }

    fn record(&self, kind: EventKind) {
        // The administrator looks there, and wants to know whose guest it was.
        if let Ok(service) = self.service() {
            service.events().record(kind.clone().of_machine(&self.vm));
        }
        self.events.record(kind);
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
