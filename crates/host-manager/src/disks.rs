//! Disks of pools for the processes of machines.

use std::sync::Arc;

use api::EventLog;

/// All disks that are in use.
pub struct DiskService {
    events: Arc<EventLog>,
}

impl DiskService {
    /// None yet; what happens is told to `events`.
    pub fn new(events: Arc<EventLog>) -> Self {
        Self { events }
    }

    pub fn attach(
        &self,
        _pool_name: &str,
        _pool: &Arc<storage_manager::HostedPool>,
        _request: api::AttachRequest,
    ) -> Result<api::Transfer, api::Problem> {
        Err(api::Problem::new(api::ProblemKind::Conflict, "later"))
    }
    pub fn list(&self) -> Vec<api::Attachment> {
        Vec::new()
    }
    pub fn change(
        &self,
        _vm: &api::VmName,
        _device: &api::DeviceId,
        _change: &api::DiskChange,
    ) -> Result<api::Attachment, api::Problem> {
        Err(api::Problem::new(api::ProblemKind::NotFound, "later"))
    }
    pub fn close(&self) {}

    /// What happens is told to these.
    pub fn events(&self) -> &EventLog {
        &self.events
    }
}
