//! Whose disks they are that commands come on: of a machine no more is needed than this, and who stands for one need not be one.

use std::sync::Arc;

use api::{
    DeviceId, DiskConfig, DiskStatus, EventKind, EventLog, Problem, StorageAnswer, StorageRequest, Vm,
};

/// A machine, or who stands for it: its disks, and the pool in which they are.
pub trait Owner: Send + Sync {
    /// The disks that its guest has.
    fn disks(&self) -> Vec<DiskStatus>;

    /// See [`Vm::attach_disk`].
    ///
    /// # Errors
    /// As there.
    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem>;

    /// See [`Vm::detach`].
    ///
    /// # Errors
    /// As there.
    fn detach(&self, id: &DeviceId) -> Result<(), Problem>;

    /// See [`Vm::storage`].
    ///
    /// # Errors
    /// As there.
    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// Notes what its guest did, or was refused.
    fn record(&self, kind: EventKind) {
        self.events().record(kind);
    }

    /// What happened so far and will happen, which its guest is told.
    fn events(&self) -> &EventLog;
}

impl Owner for Arc<dyn Vm> {
    fn disks(&self) -> Vec<DiskStatus> {
        self.as_ref().status().disks
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        self.as_ref().attach_disk(disk)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.as_ref().detach(id)
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.as_ref().storage(request)
    }

    fn events(&self) -> &EventLog {
        self.as_ref().events()
    }
}
