//! Disks that are given to programs of others, as an administrator sees them: what is served, who uses it, and what can be done to that.

use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{EventLog, Latencies, Problem, RequestCounts, StorageAnswer, StorageRequest};

/// How disks are given to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShareKind {
    /// Network Block Device.
    Nbd,
    /// iSCSI.
    Iscsi,
    /// vhost-user-blk.
    VhostUser,
    /// vhost-user-scsi.
    VhostUserScsi,
}

impl fmt::Display for ShareKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Nbd => "nbd",
            Self::Iscsi => "iscsi",
            Self::VhostUser => "vhost-user",
            Self::VhostUserScsi => "vhost-user-scsi",
        })
    }
}

/// The answer of `GET /v1/share`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShareStatus {
    /// How disks are given to others.
    pub kind: ShareKind,
    /// Version of smsvmm.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_seconds: u64,
    /// The pool whose disks are served; none if they are images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where it listens: addresses with their ports, paths of sockets.
    pub addresses: Vec<String>,
    /// Who may connect by TLS, of NBD; without it, whoever reaches an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ShareTls>,
    /// The targets, of iSCSI.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<ShareTarget>,
    /// What is served.
    pub disks: Vec<SharedDisk>,
    /// Who is connected.
    pub clients: Vec<ShareClient>,
}

/// What is demanded of those who connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShareTls {
    /// Nothing is served without TLS.
    pub required: bool,
    /// With TLS, clients need a certificate.
    pub client_certificates: bool,
}

/// A target of iSCSI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShareTarget {
    /// Its name.
    pub name: String,
    /// Who may log in.
    pub access: Vec<ShareAccess>,
}

/// Who may log in to a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShareAccess {
    /// The initiator's name; `*` is any that is not named.
    pub initiator: String,
    /// It proves by CHAP who it is.
    pub chap: bool,
    /// It sees these LUNs only; all, if there is no list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub luns: Option<Vec<u16>>,
}

/// A disk that is served: an item of the answer of `GET /v1/share/disks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SharedDisk {
    /// What it is called here: an NBD export's name, the path in the pool, or the name that was given to an image.
    pub name: String,
    /// The path in the pool, or the image.
    pub source: String,
    /// The target that has it, of iSCSI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Its number, of iSCSI and vhost-user-scsi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<u16>,
    /// The socket that is its own, of vhost-user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// In bytes.
    pub size: u64,
    /// Clients cannot write.
    pub read_only: bool,
    /// How many clients use it, or may: sessions that are logged in to its target, connections, front-ends.
    pub clients: u32,
    /// What clients have asked for since it is served. Of a disk of vhost-user-scsi only the clients' sums are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<RequestCounts>,
    /// How long that took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latencies: Option<Latencies>,
}

/// Who is connected: an item of the answer of `GET /v1/share/clients`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShareClient {
    /// By which it is disconnected; never another one's.
    pub id: String,
    /// Where it comes from: addresses and ports, a process, a socket.
    pub addresses: Vec<String>,
    /// The initiator's name, of iSCSI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initiator: Option<String>,
    /// The target that it is logged in to, of iSCSI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The disk that it uses, if it has chosen one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// When it came, in milliseconds since 1970 (UTC).
    pub since_ms: u64,
    /// What it has asked for; of vhost-user-scsi with its predecessors at the same socket.
    pub counts: RequestCounts,
}

/// The body of `POST /v1/share/disks`: a disk to be served. It is one of `file` and `image`, as the disks that are served already.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShareDisk {
    /// A disk of the pool, or a snapshot of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// An image or block device of the host, by its absolute path, or nbd://....
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What an image is called; by default its file name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Clients cannot write.
    #[serde(default)]
    pub read_only: bool,
    /// The target that gets it, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Its number; by default the lowest that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<u16>,
    /// The socket that is to be its own, by its absolute path, of vhost-user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// Disks that are given to programs of others, as management sees them. All methods may wait, and are called on any thread.
pub trait Share: Send + Sync {
    /// What is served, and to whom.
    ///
    /// # Errors
    /// It is about to end.
    fn status(&self) -> Result<ShareStatus, Problem>;

    /// Serves one more disk. Clients notice nothing but that it is there.
    ///
    /// # Errors
    /// There is none, it is in use, or its name or place is taken.
    fn add(&self, disk: ShareDisk) -> Result<SharedDisk, Problem>;

    /// Serves a disk no more: what is in flight is answered, and when this returns, others can use the disk.
    ///
    /// # Errors
    /// It is not served.
    fn remove(&self, name: &str) -> Result<(), Problem>;

    /// Ends the connection of a client, after what it has in flight. It may come again.
    ///
    /// # Errors
    /// There is no such client.
    fn disconnect(&self, client: &str) -> Result<(), Problem>;

    /// Begins the end of the process, as a signal does.
    ///
    /// # Errors
    /// It cannot be told.
    fn stop(&self) -> Result<(), Problem>;

    /// What has happened to the pool whose disks are served.
    fn events(&self) -> &EventLog;

    /// Does something with the pool whose disks are served.
    ///
    /// # Errors
    /// There is no pool; or the pool refuses.
    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem>;
}
