//! What a machine whose disks are in pools of the host's manager says to that manager: its side of the management socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::virtual_disk::{DiskAnswer, DiskOperation, TransferRequest, VirtualDiskStatus};
use api::{
    ATTACHMENT_PROTOCOL, AdapterConfig, AdapterRequest, AttachRequest, Attachment, DeviceId, DiskChange,
    DiskConfig, DiskLimits, Problem, ProblemKind, StorageAnswer, StorageRequest, TracePage, Transfer, VmName,
};
use block_io::error_chain;
use management::{ClientError, blocking};
use serde::{Deserialize, Serialize};
use storage_virtualizer::vhost_user::front_end::Dialled;
use vmm::config::VmConfig;
use vmm::machine::{Ask, ManagerDisks};

/// Longest time until a disk is open: another process may have to let it go first, and a manager that was just started may still be opening its
/// pools.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);
/// The same for a machine that goes on: it asks again and again, and its own end waits for the answer.
const AGAIN_LIMIT: Duration = Duration::from_secs(10);
/// Longest time for an answer that nothing has to be waited for.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest time for what is done with a pool: jobs are waited for.
const STORAGE_LIMIT: Duration = Duration::from_secs(24 * 3600 + 60);

/// A machine's requests to the manager.
#[derive(Debug)]
pub(crate) struct ManagedDisks {
    vm: VmName,
    storage: String,
    /// What its SCSI disks are on, and what its guest may. It is not the sandboxed process that says that.
    adapter: AdapterConfig,
    memory_stays: bool,
}

impl ManagedDisks {
    /// For a machine with this configuration. What it is asked about its pool goes to the one that its disks name, if they agree; else to
    /// the only one of the manager.
    pub(crate) fn new(config: &VmConfig) -> Self {
        let mut pools: Vec<_> = config
            .disks
            .iter()
            .filter_map(|disk| disk.pool.as_deref())
            .collect();
        pools.dedup();
        Self {
            vm: config.name.clone(),
            adapter: adapter_of(config),
            memory_stays: config.memory.ram(true).stays(),
            storage: match pools.as_slice() {
                [pool] => storage_of(Some(pool)),
                _ => storage_of(None),
            },
        }
    }
}

/// The adapter of the SCSI disks that the manager serves.
fn adapter_of(config: &VmConfig) -> AdapterConfig {
    let scsi = config.scsi.clone().unwrap_or_default();
    let (queues, queue_size, targets) = scsi.for_disks(&config.disks);
    AdapterConfig {
        queues,
        queue_size,
        targets,
        expanded_api: config.expanded_api.clone(),
    }
}

/// Where things are done with a pool.
fn storage_of(pool: Option<&str>) -> String {
    match pool {
        Some(pool) => format!("/v1/pools/{pool}/storage"),
        None => "/v1/storage".to_owned(),
    }
}

/// Asks the manager at `socket` how the disk at `file` is, or that of which it is a snapshot.
///
/// # Errors
/// The manager does not answer, or there is no such disk.
pub(crate) fn look(socket: &Path, disk: &DiskConfig, file: &str) -> Result<VirtualDiskStatus, Problem> {
    let unreachable = |error: io::Error| Problem::new(ProblemKind::Host, error.to_string());
    let connection = UnixStream::connect(socket).map_err(unreachable)?;
    let path = file.split_once('@').map_or(file, |(disk, _)| disk).to_owned();
    let request = StorageRequest::Disk(DiskOperation::Status { path });
    let storage = storage_of(disk.pool.as_deref());
    if let StorageAnswer::Disk(outcome) = execute(&connection, &storage, &request)?
        && let DiskAnswer::Status(status) = outcome.answer
    {
        return Ok(*status);
    }
    let text = "the manager's answer is not what was asked for";
    Err(Problem::new(ProblemKind::Host, text))
}

fn execute(connection: &UnixStream, path: &str, request: &StorageRequest) -> Result<StorageAnswer, Problem> {
    blocking::ask(connection, "POST", path, request, STORAGE_LIMIT).map_err(problem)
}

/// All that a machine asks its manager for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Attach {
        disk: Box<DiskConfig>,
        limits: Option<DiskLimits>,
        goes_on: bool,
    },
    Adapter {
        pool: Option<String>,
        disks: u32,
    },
    Change {
        disk: DeviceId,
        change: DiskChange,
    },
    ChangeGroup {
        group: DeviceId,
        change: DiskLimits,
    },
    Trace {
        disk: DeviceId,
        after: String,
    },
    Storage(StorageRequest),
    Transfer(TransferRequest),
}

fn asked(ask: Ask<'_>, request: &Request) -> Result<Dialled, Problem> {
    let text = serde_json::to_string(request);
    ask(&text.map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))?)
}

impl ManagerDisks for ManagedDisks {
    fn say(&self, request: &str) -> io::Result<Vec<u8>> {
        let words = match serde_json::from_str(request)? {
            Request::Attach {
                disk,
                limits,
                goes_on,
            } => {
                let request = AttachRequest {
                    vm: self.vm.clone(),
                    pool: disk.pool.clone(),
                    adapter: disk.is_unit().then(|| self.adapter.clone()),
                    disk: *disk,
                    group_limits: limits,
                    goes_on,
                    memory_stays: self.memory_stays,
                };
                let protocol = Some(ATTACHMENT_PROTOCOL);
                blocking::request("POST", blocking::ATTACHMENTS, &request, protocol)
            }
            Request::Adapter { pool, disks } => {
                let request = AdapterRequest {
                    vm: self.vm.clone(),
                    pool,
                    adapter: self.adapter.clone(),
                    disks,
                    memory_stays: self.memory_stays,
                };
                let protocol = Some(ATTACHMENT_PROTOCOL);
                blocking::request("POST", blocking::SCSI_ADAPTERS, &request, protocol)
            }
            Request::ChangeGroup { group, change } => {
                let path = format!("{}/{}/limit-groups/{group}", blocking::ATTACHMENTS, self.vm);
                blocking::request("PATCH", &path, &change, None)
            }
            Request::Trace { disk, after } => {
                // A place in a trace is numbers and commas.
                if !after.bytes().all(|byte| byte.is_ascii_digit() || byte == b',') {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                let path = format!("{}/{}/{disk}/trace?after={after}", blocking::ATTACHMENTS, self.vm);
                blocking::request("GET", &path, &(), None)
            }
            Request::Change { disk, change } => {
                let path = format!("{}/{}/{disk}", blocking::ATTACHMENTS, self.vm);
                blocking::request("PATCH", &path, &change, None)
            }
            Request::Storage(request) => blocking::request("POST", &self.storage, &request, None),
            Request::Transfer(request) => {
                let path = format!("{}/transfer", self.storage);
                blocking::request("POST", &path, &request, Some(blocking::TRANSFER_PROTOCOL))
            }
        };
        words.map_err(io::Error::other)
    }

    fn attach(
        &self,
        ask: Ask<'_>,
        disk: &DiskConfig,
        limits: Option<DiskLimits>,
        goes_on: bool,
    ) -> Result<Dialled, Problem> {
        let request = Request::Attach {
            disk: Box::new(disk.clone()),
            limits,
            goes_on,
        };
        let dialled = asked(ask, &request)?;
        let limit = if goes_on { AGAIN_LIMIT } else { ATTACH_LIMIT };
        blocking::upgraded(&dialled.socket, limit).map_err(problem)?;
        Ok(dialled)
    }

    fn attach_adapter(&self, ask: Ask<'_>, pool: Option<String>, disks: u32) -> Result<Dialled, Problem> {
        let dialled = asked(ask, &Request::Adapter { pool, disks })?;
        blocking::upgraded(&dialled.socket, AGAIN_LIMIT).map_err(problem)?;
        Ok(dialled)
    }

    fn trace(&self, ask: Ask<'_>, disk: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        let request = Request::Trace {
            disk: disk.clone(),
            after: after.to_owned(),
        };
        let dialled = asked(ask, &request)?;
        blocking::answer(&dialled.socket, LIMIT).map_err(problem)
    }

    fn change_group(&self, ask: Ask<'_>, group: &DeviceId, change: &DiskLimits) -> Result<(), Problem> {
        let request = Request::ChangeGroup {
            group: group.clone(),
            change: *change,
        };
        let dialled = asked(ask, &request)?;
        let changed = blocking::answer::<DiskLimits>(&dialled.socket, LIMIT);
        changed.map(drop).map_err(problem)
    }

    fn change(&self, ask: Ask<'_>, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem> {
        let request = Request::Change {
            disk: disk.clone(),
            change: *change,
        };
        let dialled = asked(ask, &request)?;
        let changed = blocking::answer::<Attachment>(&dialled.socket, LIMIT);
        changed.map(drop).map_err(problem)
    }

    fn execute(&self, ask: Ask<'_>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        let dialled = asked(ask, &Request::Storage(request))?;
        blocking::answer(&dialled.socket, STORAGE_LIMIT).map_err(problem)
    }

    fn transfer(&self, ask: Ask<'_>, request: TransferRequest) -> Result<Transfer, Problem> {
        let connection = asked(ask, &Request::Transfer(request))?.socket;
        blocking::upgraded(&connection, LIMIT).map_err(problem)?;
        Ok(Box::new(move |client| blocking::relay(&client, &connection)))
    }
}

/// What a failed request means to who asked the machine for something.
fn problem(error: ClientError) -> Problem {
    match error {
        ClientError::Problem(problem) => *problem,
        ClientError::Timeout(limit) => {
            let text = format!("the manager gave no answer within {} seconds", limit.as_secs());
            Problem::new(ProblemKind::Timeout, text)
        }
        error => {
            let text = format!("the manager cannot be asked: {}", error_chain(&error));
            Problem::new(ProblemKind::Host, text)
                .remedy("see whether `smsvmm serve` runs, and is of this version")
        }
    }
}

#[cfg(test)]
mod tests {
    use api::virtual_disk::CopyRequest;

    use super::*;

    fn disks() -> ManagedDisks {
        ManagedDisks {
            vm: "web1".parse().unwrap(),
            storage: storage_of(Some("tank")),
            adapter: AdapterConfig {
                queues: 1,
                queue_size: api::QueueSize::default(),
                targets: 8,
                expanded_api: api::ExpandedPolicy::default(),
            },
            memory_stays: false,
        }
    }

    /// The first line of what is said for a request that a method has made.
    fn said(make: impl FnOnce(&ManagedDisks, Ask<'_>)) -> String {
        let disks = disks();
        let words = std::cell::RefCell::new(String::new());
        make(&disks, &|request| {
            let bytes = disks.say(request).unwrap();
            *words.borrow_mut() = String::from_utf8(bytes).unwrap();
            Err(Problem::new(ProblemKind::Host, "nobody is asked"))
        });
        let words = words.into_inner();
        words.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn what_a_machine_needs_is_said_and_nothing_else() {
        let disk = DiskConfig::new("");
        let (device, change) = ("root".parse().unwrap(), DiskChange::default());
        let copy = TransferRequest::Copy(CopyRequest {
            path: "/a.dsk".into(),
            to: "/b.dsk".into(),
            thick: false,
            verify: false,
        });
        assert_eq!(
            said(|disks, ask| drop(disks.attach(ask, &disk, None, true))),
            "POST /v1/attachments HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.attach_adapter(ask, None, 1))),
            "POST /v1/scsi-adapters HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.trace(ask, &device, "1,2"))),
            "GET /v1/attachments/web1/root/trace?after=1,2 HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.change_group(ask, &device, &DiskLimits::default()))),
            "PATCH /v1/attachments/web1/limit-groups/root HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.change(ask, &device, &change))),
            "PATCH /v1/attachments/web1/root HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.execute(ask, StorageRequest::Status))),
            "POST /v1/pools/tank/storage HTTP/1.1"
        );
        assert_eq!(
            said(|disks, ask| drop(disks.transfer(ask, copy))),
            "POST /v1/pools/tank/storage/transfer HTTP/1.1"
        );
        for bad in [
            "",
            "GET /v1/host HTTP/1.1",
            "{\"change\":{\"disk\":\"a/../..\",\"change\":{}}}",
            "{\"change\":{\"disk\":\"a HTTP/1.1\\r\\nx: y\",\"change\":{}}}",
            "{\"define\":{}}",
            "{\"trace\":{\"disk\":\"root\",\"after\":\"1 HTTP/1.1\\r\\nx: y\"}}",
            "{\"adapter\":{\"disks\":1,\"adapter\":{}}}",
        ] {
            assert!(disks().say(bad).is_err(), "{bad}");
        }
    }
}
