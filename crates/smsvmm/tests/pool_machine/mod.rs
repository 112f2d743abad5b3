//! A machine that is nothing but its pool.

use std::sync::Arc;

use api::virtual_disk::TransferRequest;
use api::{
    ByteSize, DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventLog, NetConfig, NetStatus,
    Problem, ProblemKind, StorageAnswer, StorageRequest, Transfer, Vm, VmState, VmStatus,
};
use storage_manager::HostedPool;

/// A machine whose guest does nothing.
pub(crate) struct Machine {
    pub(crate) pool: HostedPool,
    pub(crate) events: Arc<EventLog>,
    /// What it says of its disks.
    pub(crate) disks: Vec<DiskStatus>,
}

fn no<T>() -> Result<T, Problem> {
    Err(Problem::new(ProblemKind::Conflict, "not in this test"))
}

impl Vm for Machine {
    fn status(&self) -> VmStatus {
        VmStatus {
            name: "web1".parse().unwrap(),
            state: VmState::Running,
            pid: 1,
            uptime_seconds: 1,
            resets: 0,
            cpus: 1,
            memory: ByteSize::from_mib(1),
            disks: self.disks.clone(),
            nets: Vec::new(),
            limit_groups: Default::default(),
            last_event: 0,
        }
    }
    fn power_button(&self) -> Result<(), Problem> {
        no()
    }
    fn stop(&self, _cause: &str) -> Result<(), Problem> {
        no()
    }
    fn reset(&self) -> Result<(), Problem> {
        no()
    }
    fn pause(&self) -> Result<(), Problem> {
        no()
    }
    fn resume(&self) -> Result<(), Problem> {
        no()
    }
    fn attach_disk(&self, _disk: DiskConfig) -> Result<DiskStatus, Problem> {
        no()
    }
    fn attach_net(&self, _net: NetConfig) -> Result<NetStatus, Problem> {
        no()
    }
    fn detach(&self, _id: &DeviceId) -> Result<(), Problem> {
        no()
    }
    fn change_disk(&self, _id: &DeviceId, _change: &DiskChange) -> Result<DiskStatus, Problem> {
        no()
    }
    fn change_limits(&self, _group: &DeviceId, _change: &DiskLimits) -> Result<DiskLimits, Problem> {
        no()
    }
    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool.execute(request)
    }
    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        self.pool.transfer(request)
    }
    fn events(&self) -> &EventLog {
        &self.events
    }
}
