//! A running virtual machine as an administrator sees it: its state, and what can be done to it.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::event::EventLog;
use crate::virtual_disk::TransferRequest;
use crate::{
    ByteSize, DebugDump, DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, DiskTrace, Metrics,
    NetConfig, NetStatus, Problem, ProblemKind, StorageAnswer, StorageRequest, TracePage, VmName,
};

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The vCPUs have not run yet.
    Starting,
    /// The vCPUs run.
    Running,
    /// The vCPUs stand still until resumed.
    Paused,
    /// The machine is on its way to its end.
    Stopping,
}

impl fmt::Display for VmState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        })
    }
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reboot, and the configuration says that this ends the machine.
    Reboot,
    /// The guest crashed.
    Crash {
        /// How it was seen, for example `triple fault` or `kernel panic`.
        cause: String,
    },
    /// Stopped hard: by the administrator, a second signal, or because the guest ignored the power button for too long.
    Stopped {
        /// Which of these.
        cause: String,
    },
}

impl fmt::Display for ExitReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => formatter.write_str("the guest powered off"),
            Self::Reboot => formatter.write_str("the guest asked for a reboot"),
            Self::Crash { cause } => write!(formatter, "the guest crashed: {cause}"),
            Self::Stopped { cause } => write!(formatter, "stopped: {cause}"),
        }
    }
}

/// A machine of a host: an item of the answer of `GET /v1/vms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MachineEntry {
    /// The machine's name.
    pub name: String,
    /// Where it is in its life; none if it does not answer.
    pub state: Option<VmState>,
    /// Why it does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The answer of `GET /v1/vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VmStatus {
    /// The machine's name.
    pub name: VmName,
    /// Where it is in its life.
    pub state: VmState,
    /// Process that runs it.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_seconds: u64,
    /// How often it was reset since.
    pub resets: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Size of the guest's memory.
    pub memory: ByteSize,
    /// Its disks in the order of attachment.
    pub disks: Vec<DiskStatus>,
    /// Its network cards in the order of attachment.
    pub nets: Vec<NetStatus>,
    /// Limits that disks share.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limit_groups: BTreeMap<DeviceId, DiskLimits>,
    /// Number of the newest event.
    pub last_event: u64,
}

/// Serves one connection until the data are moved, on a thread that may block.
pub type Transfer = Box<dyn FnOnce(UnixStream) + Send>;

/// What can be done to a running machine. The machine in `vmm` implements it; the management server and the signal handler
/// call it, from any thread.
///
/// Methods return when the machine has taken the request over. They may block for milliseconds, not for the guest.
pub trait Vm: Send + Sync {
    /// How it is.
    fn status(&self) -> VmStatus;

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// [`ProblemKind::Stopping`](crate::ProblemKind::Stopping), or [`ProblemKind::Conflict`](crate::ProblemKind::Conflict)
    /// while the machine is paused.
    fn power_button(&self) -> Result<(), Problem>;

    /// Ends the machine at once, as if its cable were pulled; `cause` goes into [`ExitReason::Stopped`]. Stopping a
    /// machine that is stopping succeeds.
    ///
    /// # Errors
    /// The machine does not answer.
    fn stop(&self, cause: &str) -> Result<(), Problem>;

    /// Resets the machine, as if its reset button were pressed.
    ///
    /// # Errors
    /// [`ProblemKind::Stopping`](crate::ProblemKind::Stopping).
    fn reset(&self) -> Result<(), Problem>;

    /// Stops all vCPUs. Pausing a paused machine succeeds.
    ///
    /// # Errors
    /// [`ProblemKind::Stopping`](crate::ProblemKind::Stopping).
    fn pause(&self) -> Result<(), Problem>;

    /// Lets the vCPUs run on, and disks that stopped because of an error try again. Resuming a running machine succeeds.
    ///
    /// # Errors
    /// [`ProblemKind::Stopping`](crate::ProblemKind::Stopping).
    fn resume(&self) -> Result<(), Problem>;

    /// Adds a disk; paths are absolute, an unassigned identifier gets the first free one.
    ///
    /// # Errors
    /// The identifier is taken, the image cannot be opened, no slot is free.
    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem>;

    /// Adds a network card; an unassigned identifier gets the first free one, a missing address a derived one.
    ///
    /// # Errors
    /// The identifier, address or tap is taken, the backend cannot be opened, no slot is free.
    fn attach_net(&self, net: NetConfig) -> Result<NetStatus, Problem>;

    /// Asks the guest to let a device go. The end is told by [`DeviceRemoved`](crate::EventKind::DeviceRemoved) or
    /// [`DeviceRemoveRefused`](crate::EventKind::DeviceRemoveRefused). Asking again presses the attention button again.
    ///
    /// # Errors
    /// There is no such device.
    fn detach(&self, id: &DeviceId) -> Result<(), Problem>;

    /// Changes what can be changed of a disk while the guest uses it.
    ///
    /// # Errors
    /// There is no such disk, or the change is impossible.
    fn change_disk(&self, id: &DeviceId, change: &DiskChange) -> Result<DiskStatus, Problem>;

    /// Changes the limits that disks share: each that is given, 0 takes one away. Returns what holds now.
    ///
    /// # Errors
    /// There is no such group, or the change is impossible.
    fn change_limits(&self, group: &DeviceId, change: &DiskLimits) -> Result<DiskLimits, Problem>;

    /// Does something with the machine's pool and the disks in it, while the guest uses them. Blocks until it is done.
    ///
    /// # Errors
    /// The machine has no pool, or the request is refused or fails.
    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// What moves data between the machine's pool and who is at the other end of a connection, while the guest uses its disks.
    ///
    /// # Errors
    /// The machine has no pool, or the request is impossible. What is found out later is told over the connection.
    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem>;

    /// Its numbers, those of the pool that it has open included.
    fn metrics(&self) -> Metrics {
        let pool = match self.storage(StorageRequest::Status) {
            Ok(StorageAnswer::Status(pool)) => Some(*pool),
            // It has none, or it cannot be looked at: that has no numbers.
            _ => None,
        };
        Metrics {
            vm: Some(self.status()),
            pools: pool.into_iter().collect(),
            ..Metrics::default()
        }
    }

    /// The last requests of a disk that ended after `after`, which is [`TracePage::next`] of an earlier answer, or empty.
    ///
    /// # Errors
    /// There is no such disk, nobody records what it does, or `after` is nothing of the kind.
    fn trace(&self, id: &DeviceId, _after: &str) -> Result<TracePage, Problem> {
        let problem = Problem::new(ProblemKind::Conflict, "no record is kept of this disk's requests");
        Err(problem.about(id))
    }

    /// What it can tell of itself now.
    fn dump(&self) -> DebugDump {
        let metrics = self.metrics();
        let vm = metrics.vm.unwrap_or_else(|| self.status());
        let disks = vm.disks.iter().map(|disk| {
            let id = disk.config.id.clone();
            let (records, problem) = match self.trace(&id, "") {
                Ok(page) => (page.records, None),
                Err(problem) => (Vec::new(), Some(problem.to_string())),
            };
            DiskTrace { id, records, problem }
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        DebugDump {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            time_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            disks: disks.collect(),
            events: self.events().page(0, EventLog::CAPACITY).events,
            queues: metrics.queues,
            nets: metrics.nets,
            pools: metrics.pools,
            vm,
        }
    }

    /// What happened so far and will happen.
    fn events(&self) -> &EventLog;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceState, NetBackend};

    #[test]
    fn a_status_survives_json() {
        let status = VmStatus {
            name: "web1".parse().unwrap(),
            state: VmState::Running,
            pid: 7,
            uptime_seconds: 60,
            resets: 0,
            cpus: 2,
            memory: ByteSize::from_mib(512),
            disks: vec![DiskStatus {
                config: DiskConfig::new("/images/root.raw"),
                state: DeviceState::Removing,
                size: ByteSize::from_mib(64),
                stopped: None,
            }],
            nets: vec![NetStatus {
                config: NetConfig::new(NetBackend::User),
                state: DeviceState::Attached,
            }],
            limit_groups: BTreeMap::from([("bulk".parse().unwrap(), DiskLimits::default())]),
            last_event: 3,
        };
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<VmStatus>(&json).unwrap(), status);
    }
}
