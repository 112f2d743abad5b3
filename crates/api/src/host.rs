//! A host as an administrator sees it: its pools, its machines, the disks that it serves, and what can be done to them.

use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::event::EventLog;
use crate::storage::Health;
use crate::virtual_disk::TransferRequest;
use crate::{
    ByteSize, Condition, DeviceId, DiskChange, DiskConfig, DiskLimits, ExpandedPolicy, Metrics, Problem,
    QueueSize, StorageAnswer, StorageRequest, TracePage, Transfer, VmName,
};

/// The answer of `GET /v1/host`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct HostStatus {
    /// The host's name.
    pub name: String,
    /// The manager's version.
    pub version: String,
    /// The manager's process.
    pub pid: u32,
    /// Seconds since the manager was started.
    pub uptime_seconds: u64,
    /// The pools that it has open.
    pub pools: Vec<PoolEntry>,
    /// The machines that are defined.
    pub machines: Vec<MachineStatus>,
    /// The disks of pools that are in use.
    pub attachments: Vec<Attachment>,
    /// Number of the newest event.
    pub last_event: u64,
    /// What the manager cannot do on this host, for people: keep machines apart by users, for example.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A pool of a host, in short: an item of the answer of `GET /v1/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PoolEntry {
    /// Its name.
    pub name: String,
    /// The worst of its volumes' and devices' states.
    pub state: Health,
    /// What its devices can hold, in bytes.
    pub size: u64,
    /// What of that is taken, in bytes.
    pub used: u64,
    /// Jobs that have not ended.
    pub jobs: u32,
}

/// When the manager starts a machine again that has ended by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays as it is.
    Never,
    /// When its guest crashed, or its process failed.
    #[default]
    OnFailure,
    /// Also when its guest powered off.
    Always,
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Never => "never",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        })
    }
}

/// A machine that is to be known to the manager: the body of `PUT /v1/vms/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MachineDefinition {
    /// The text of its vm.toml.
    pub config: String,
    /// The folder of the host from which relative paths in it are taken; without it there may be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// It is started when the manager is.
    #[serde(default)]
    pub autostart: bool,
    /// When it is started again.
    #[serde(default)]
    pub restart: RestartPolicy,
}

/// Where a machine of a manager is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// It has no process.
    Stopped,
    /// Its process does not answer yet.
    Starting,
    /// Its process runs.
    Running,
    /// It was asked to end.
    Stopping,
    /// It failed, and is started again in a while.
    Waiting,
    /// It failed, and stays so.
    Failed,
}

impl fmt::Display for MachineState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Waiting => "waiting",
            Self::Failed => "failed",
        })
    }
}

/// A machine of a manager: the answer of `GET /v1/vms/NAME`, an item of that of `GET /v1/vms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MachineStatus {
    /// Its name.
    pub name: VmName,
    /// Where it is in its life.
    pub state: MachineState,
    /// Its process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The user as whom its process runs; the manager's own if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    /// The control group of its process, if it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_group: Option<PathBuf>,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Size of the guest's memory.
    pub memory: ByteSize,
    /// It is started when the manager is.
    pub autostart: bool,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// Names the definition, whatever the machine does: another one after each change. Without quotation marks it is the `ETag`.
    #[serde(default)]
    pub revision: String,
    /// How often that was done since somebody last started it.
    pub restarts: u32,
    /// How it ended last, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<String>,
    /// Its vm.toml, as the manager has it.
    pub config: PathBuf,
    /// Where its process writes what it has to say.
    pub log: PathBuf,
    /// The socket of its serial console, if it leads to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
}

/// A disk that a machine's process wants to use: the body of `POST /v1/attachments`, whose connection is upgraded to
/// [`ATTACHMENT_PROTOCOL`]: from then on it is a vhost-user connection, with the manager as back-end; or, of a SCSI disk, one for
/// [`UnitOrder`]s and [`UnitNews`], while the [adapter](AdapterRequest) on which the disk is has the queues. The disk is in use as long as
/// the connection lives; a front-end whose manager was started anew asks again for the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AttachRequest {
    /// The machine.
    pub vm: VmName,
    /// The pool; may be left out if there is one only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The disk: its `file`, and how it is to be used.
    pub disk: DiskConfig,
    /// Of a SCSI disk: the adapter on which it is, with the place that `disk` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// The limits of the disk's `limit-group`, which it shares with other disks of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_limits: Option<DiskLimits>,
    /// The machine has had the disk before and goes on with it, from another manager: what it has written must be there, whatever the disk's
    /// mode is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub goes_on: bool,
    /// The machine's memory was taken from the host when it started, and keeps its pages: the pool's worker may have the kernel hold it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub memory_stays: bool,
}

/// The SCSI adapter of a machine whose disks a manager serves, and what the guest may ask of storage management by them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AdapterConfig {
    /// Request queues.
    pub queues: u8,
    /// Requests that fit in each.
    pub queue_size: QueueSize,
    /// Targets: the guest looks at all of them when it starts.
    pub targets: u8,
    /// `[expanded-api]` of the machine.
    #[serde(default)]
    pub expanded_api: ExpandedPolicy,
}

/// The queues of a machine's SCSI adapter are to be served: the body of `POST /v1/scsi-adapters`, whose connection is upgraded to
/// [`ATTACHMENT_PROTOCOL`] and speaks vhost-user-scsi then. The machine's SCSI disks, each an [`AttachRequest`], come first: a guest that
/// goes on shall find all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AdapterRequest {
    /// The machine.
    pub vm: VmName,
    /// The pool of its SCSI disks; may be left out if there is one only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// What it is like.
    pub adapter: AdapterConfig,
    /// So many disks must be on it.
    pub disks: u32,
    /// As in an [`AttachRequest`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub memory_stays: bool,
}

/// What a machine says of a SCSI disk at its connection: one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitOrder {
    /// The guest is to let it go; then the manager closes the connection.
    Detach,
    /// The guest does not use it any more.
    End,
}

impl UnitOrder {
    /// As it is sent.
    pub const fn encode(self) -> u8 {
        match self {
            Self::Detach => b'd',
            Self::End => b'e',
        }
    }

    /// None: it means nothing.
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            b'd' => Some(Self::Detach),
            b'e' => Some(Self::End),
            _ => None,
        }
    }
}

/// What the manager says of a SCSI disk at its connection: eight bytes of what, eight of how much, the least significant first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitNews {
    /// It has so many bytes: said first of all, and after each change.
    Size(u64),
    /// The guest has sent something to it, for the first time since the adapter was reset.
    Found,
}

impl UnitNews {
    /// Bytes of each.
    pub const LENGTH: usize = 16;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let (what, value) = match self {
            Self::Size(size) => (1_u64, size),
            Self::Found => (2, 0),
        };
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&what.to_le_bytes());
        bytes[8..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// None: it means nothing.
    pub fn decode(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        let (what, value) = bytes.split_at(8);
        let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        match (number(what)?, number(value)?) {
            (1, size) => Some(Self::Size(size)),
            (2, _) => Some(Self::Found),
            _ => None,
        }
    }
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_false(value: &bool) -> bool {
    !*value
}

/// What the connection of an attachment is upgraded to.
pub const ATTACHMENT_PROTOCOL: &str = "smsvmm-vhost-user";

/// What the connection of a console is upgraded to.
pub const CONSOLE_PROTOCOL: &str = "smsvmm-console";

/// A wish for a machine's console: the body of `POST /v1/vms/NAME/console`, whose connection is upgraded to [`CONSOLE_PROTOCOL`]: from then
/// on it carries what the guest shows, and what is typed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ConsoleRequest {
    /// Only look on: what is typed goes nowhere.
    #[serde(default)]
    pub read_only: bool,
}

/// A disk of a pool that is in use: an item of the answer of `GET /v1/attachments`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Attachment {
    /// By which machine.
    pub vm: VmName,
    /// The disk's name in the machine.
    pub device: DeviceId,
    /// The pool.
    pub pool: String,
    /// The disk's path in it.
    pub file: String,
    /// The guest cannot write.
    pub read_only: bool,
}

/// What can be done to a host. The manager implements it; its management server calls it, from any thread.
///
/// Methods that may take long say so; the others return within milliseconds.
pub trait Host: Send + Sync {
    /// How it is.
    fn status(&self) -> HostStatus;

    /// All machines, in the order of their names.
    fn machines(&self) -> Vec<MachineStatus>;

    /// The disks of pools that are in use.
    fn attachments(&self) -> Vec<Attachment>;

    /// Does something with a pool, by its name (none: the only one), and the disks in it, while machines use them. Blocks until it is
    /// done.
    ///
    /// # Errors
    /// There is no such pool, or the request is refused or fails.
    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// What moves data between a pool and who is at the other end of a connection.
    ///
    /// # Errors
    /// There is no such pool, or the request is impossible.
    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem>;

    /// Opens a disk for a machine's process; what is returned serves it at a connection, until that ends. May wait some seconds for
    /// another one to let the disk go.
    ///
    /// # Errors
    /// There is no such disk, it is in use, or it cannot be used as is wanted.
    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem>;

    /// Serves the queues of a machine's SCSI adapter, as [`Self::attach`] serves a disk. May wait some seconds for another process of the
    /// machine to end.
    ///
    /// # Errors
    /// Not all of its disks are there, or another process has it.
    fn attach_adapter(&self, request: AdapterRequest) -> Result<Transfer, Problem>;

    /// The last requests of a disk in use that ended after `after` ([`TracePage::next`], or empty).
    ///
    /// # Errors
    /// There is no such disk in use, or `after` is nothing of the kind.
    fn trace_attachment(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem>;

    /// Changes limits that disks of a machine share: each that is given, 0 takes one away. Returns what holds now.
    ///
    /// # Errors
    /// The machine uses no disk with these, or the change is impossible.
    fn change_group(&self, vm: &VmName, group: &DeviceId, change: &DiskLimits)
    -> Result<DiskLimits, Problem>;

    /// Changes what can be changed of a disk while a guest uses it.
    ///
    /// # Errors
    /// There is no such disk in use, or the change is impossible.
    fn change_attachment(
        &self,
        vm: &VmName,
        device: &DeviceId,
        change: &DiskChange,
    ) -> Result<Attachment, Problem>;

    /// Defines a machine, or changes its definition, which counts when it is started next.
    ///
    /// # Errors
    /// The definition is wrong; the message says where. Or it cannot be stored; or `condition`, on the machine's
    /// [revision](MachineStatus::revision), does not hold.
    fn define(
        &self,
        name: &VmName,
        definition: MachineDefinition,
        condition: &Condition,
    ) -> Result<MachineStatus, Problem>;

    /// How a machine is.
    ///
    /// # Errors
    /// There is none of this name.
    fn machine(&self, name: &VmName) -> Result<MachineStatus, Problem>;

    /// Starts a machine. Starting one that runs succeeds.
    ///
    /// # Errors
    /// There is none of this name, or the host refuses.
    fn start(&self, name: &VmName) -> Result<MachineStatus, Problem>;

    /// Asks a machine's guest to shut down; after its power.shutdown-timeout it is stopped hard. It is not started again.
    ///
    /// # Errors
    /// There is none of this name.
    fn shut_down(&self, name: &VmName) -> Result<MachineStatus, Problem>;

    /// Stops a machine hard, also one whose process does not answer. It is not started again.
    ///
    /// # Errors
    /// There is none of this name.
    fn stop(&self, name: &VmName) -> Result<MachineStatus, Problem>;

    /// Forgets a machine that is stopped. Its disks stay.
    ///
    /// # Errors
    /// There is none of this name, or it runs, or `condition` does not hold.
    fn delete(&self, name: &VmName, condition: &Condition) -> Result<(), Problem>;

    /// The management socket of a machine.
    ///
    /// # Errors
    /// There is none of this name, or it does not run.
    fn machine_socket(&self, name: &VmName) -> Result<PathBuf, Problem>;

    /// Lets a machine that runs use a disk that its definition does not name, because an administrator attaches it. Any that is no disk of a
    /// pool is none of the host's affairs.
    ///
    /// # Errors
    /// There is none of this name, or it does not run.
    fn allow_disk(&self, name: &VmName, disk: &DiskConfig) -> Result<(), Problem>;

    /// All numbers, for those who draw curves.
    fn metrics(&self) -> Metrics;

    /// What happened so far and will happen.
    fn events(&self) -> &EventLog;
}
