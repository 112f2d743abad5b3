//! Whose disks they are that commands come on: of a machine no more is needed than this, and who stands for one need not be one.

use api::storage::JobStatus;
use api::{DeviceId, DiskConfig, DiskStatus, EventKind, EventLog, Problem, StorageAnswer, StorageRequest};

/// Told of a job that has ended, as long as it answers that it wants to be; it does not block.
pub type JobListener = Box<dyn Fn(&JobStatus) -> bool + Send>;

/// A machine, or who stands for it: its disks, and the pool in which they are.
pub trait Owner: Send + Sync {
    /// The disks that its guest has.
    fn disks(&self) -> Vec<DiskStatus>;

    /// See [`api::Vm::attach_disk`].
    ///
    /// # Errors
    /// As there.
    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem>;

    /// See [`api::Vm::detach`].
    ///
    /// # Errors
    /// As there.
    fn detach(&self, id: &DeviceId) -> Result<(), Problem>;

    /// See [`api::Vm::storage`]; jobs that begin are its guest's.
    ///
    /// # Errors
    /// As there.
    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// The jobs that its guest has begun, in the order in which they began, however often the process that serves it was started meanwhile: all
    /// that go on, and the last ones that have ended.
    ///
    /// # Errors
    /// There is no pool.
    fn jobs(&self) -> Result<Vec<JobStatus>, Problem>;

    /// `listener` is told when a job of its guest ends.
    fn on_job_end(&self, listener: JobListener);

    /// Notes what its guest did, or was refused.
    fn record(&self, kind: EventKind) {
        self.events().record(kind);
    }

    /// What happened so far and will happen, which its guest is told.
    fn events(&self) -> &EventLog;
}
