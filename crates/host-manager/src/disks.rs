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

    /// What happens is told to these.
    pub fn events(&self) -> &EventLog {
        &self.events
    }
}
