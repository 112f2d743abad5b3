//! A machine as its guest sees it by the expanded API, when the manager has its disks: what the guest may ask for is done here, to the pool and
//! to the disks that the machine has of it; what only its process can do, attach and detach, its process is asked for.

use std::sync::{Arc, Weak};

use api::storage::JobStatus;
use api::{
    DeviceId, DiskConfig, DiskStatus, EventKind, EventLog, Problem, ProblemKind, StorageAnswer,
    StorageRequest, VmName,
};
use expanded_target::{JobListener, Owner};
use storage_manager::HostedPool;

use crate::disks::{MachineDoor, Shared};

/// A machine whose SCSI disks are of one pool.
pub(crate) struct Principal {
    vm: VmName,
    service: Weak<Shared>,
    pool_name: String,
    pool: Arc<HostedPool>,
    events: Arc<EventLog>,
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
        }
    }

    fn service(&self) -> Result<Arc<Shared>, Problem> {
        self.service.upgrade().ok_or_else(crate::places::closing)
    }

    /// Whose its jobs are.
    fn owner(&self) -> String {
        storage_manager::owner_of_machine(&self.vm)
    }

    fn door(&self) -> Result<Arc<dyn MachineDoor>, Problem> {
        let door = self.service()?.machines().cloned();
        door.ok_or_else(|| {
            let text =
                "attaching and detaching disks is not what a guest can have of the manager of its disks";
            Problem::new(ProblemKind::Conflict, text).remedy("ask the administrator of the machine")
        })
    }
}

impl Owner for Principal {
    fn disks(&self) -> Vec<DiskStatus> {
        self.service()
            .map(|service| service.disks_of(&self.vm, &self.pool_name))
            .unwrap_or_default()
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        let disk = DiskConfig {
            pool: Some(self.pool_name.clone()),
            ..disk
        };
        self.door()?.attach_disk(&self.vm, &disk)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.door()?.detach(&self.vm, id)
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool.execute_for(&self.owner(), request)
    }

    fn jobs(&self) -> Result<Vec<JobStatus>, Problem> {
        self.pool.jobs_of(&self.owner())
    }

    fn on_job_end(&self, listener: JobListener) {
        self.pool.on_job_end(&self.owner(), listener);
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
