//! The guest of `smsvmm run`, whose machine has a pool of its own, as the expanded API sees it.

use std::sync::Arc;

use api::storage::JobStatus;
use api::{
    DeviceId, DiskConfig, DiskStatus, EventLog, Problem, ProblemKind, StorageAnswer, StorageRequest, Vm,
    VmName,
};
use expanded_target::{JobListener, Owner};
use storage_manager::owner_of_machine;

use crate::pool::VmPool;

/// A machine, and the pool of its own if it has one.
pub(crate) struct Guest {
    vm: Arc<dyn Vm>,
    pool: Option<Arc<VmPool>>,
    /// Whose its jobs are.
    owner: String,
}

impl Guest {
    pub(crate) fn new(name: &VmName, vm: &Arc<dyn Vm>, pool: Option<&Arc<VmPool>>) -> Self {
        Self {
            vm: Arc::clone(vm),
            pool: pool.cloned(),
            owner: owner_of_machine(name),
        }
    }
}

impl Owner for Guest {
    fn disks(&self) -> Vec<DiskStatus> {
        self.vm.status().disks
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        self.vm.attach_disk(disk)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.vm.detach(id)
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        match &self.pool {
            Some(pool) => pool.hosted().execute_for(&self.owner, request),
            // It knows why not.
            None => self.vm.storage(request),
        }
    }

    fn jobs(&self) -> Result<Vec<JobStatus>, Problem> {
        match &self.pool {
            Some(pool) => pool.hosted().jobs_of(&self.owner),
            None => Err(Problem::new(
                ProblemKind::Conflict,
                "this machine has no pool in which there could be jobs",
            )),
        }
    }

    fn on_job_end(&self, listener: JobListener) {
        if let Some(pool) = &self.pool {
            pool.hosted().on_job_end(&self.owner, listener);
        }
    }

    fn events(&self) -> &EventLog {
        self.vm.events()
    }
}
