//! `[scsi]`: the machine's SCSI adapter, on which all its SCSI disks sit.

use api::{DiskConfig, InvalidValue, MAX_TARGETS, QueueSize};
use serde::{Deserialize, Serialize};

/// The adapter. It is there from the beginning if `[scsi]` stands in vm.toml or there is a SCSI disk, else when the first SCSI disk is
/// attached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ScsiConfig {
    /// Request queues, 1 to 16; by default the greatest number that a SCSI disk has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u8>,
    /// Requests that fit in a queue; by default the greatest number that a SCSI disk has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<QueueSize>,
    /// Targets, 1 to 255: the guest looks at all of them when it starts. By default 8, or as many as the disks need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<u8>,
}

impl ScsiConfig {
    /// Targets if nothing else is said.
    const TARGETS: u8 = 8;

    /// Checks what the types alone cannot.
    pub(super) fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        if self
            .queues
            .is_some_and(|queues| !(1..=DiskConfig::MAX_QUEUES).contains(&queues))
        {
            let text = format!("use 1 to {} queues", DiskConfig::MAX_QUEUES);
            return Err(("queues", InvalidValue::new(text)));
        }
        if self.targets.is_some_and(|targets| targets == 0) {
            let text = format!("an adapter has 1 to {MAX_TARGETS} targets");
            return Err(("targets", InvalidValue::new(text)));
        }
        Ok(())
    }

    /// Request queues and their size, and targets, of an adapter that begins with `disks`.
    pub fn for_disks(&self, disks: &[DiskConfig]) -> (u8, QueueSize, u8) {
        let disks = || disks.iter().filter(|disk| disk.is_unit());
        let queues = disks().map(|disk| disk.queues).max();
        let size = disks().map(|disk| disk.queue_size).max_by_key(|size| size.get());
        let last = disks()
            .flat_map(DiskConfig::places)
            .map(|(target, _)| target)
            .max();
        let needed = last.unwrap_or(0).saturating_add(1);
        (
            self.queues.or(queues).unwrap_or(1),
            self.queue_size.or(size).unwrap_or_default(),
            self.targets.unwrap_or(Self::TARGETS.max(needed)),
        )
    }
}
