//! What a machine whose disks are in pools of the host's manager says to that manager: its side of the management socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::virtual_disk::{DiskAnswer, DiskOperation, TransferRequest, VirtualDiskStatus};
use api::{
    AttachRequest, Attachment, DeviceId, DiskChange, DiskConfig, Problem, ProblemKind, StorageAnswer,
    StorageRequest, Transfer, VmName,
};
use block_io::error_chain;
use management::{ClientError, blocking};
use vmm::config::VmConfig;
use vmm::machine::ManagerDisks;

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
            storage: match pools.as_slice() {
                [pool] => storage_of(Some(pool)),
                _ => storage_of(None),
            },
        }
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

impl ManagerDisks for ManagedDisks {
    fn attach(&self, connection: &UnixStream, disk: &DiskConfig, goes_on: bool) -> Result<(), Problem> {
        let request = AttachRequest {
            vm: self.vm.clone(),
            pool: disk.pool.clone(),
            disk: disk.clone(),
            goes_on,
        };
        let limit = if goes_on { AGAIN_LIMIT } else { ATTACH_LIMIT };
        blocking::attach(connection, &request, limit).map_err(problem)
    }

    fn change(&self, connection: &UnixStream, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem> {
        let path = format!("/v1/attachments/{}/{disk}", self.vm);
        let changed = blocking::ask::<Attachment>(connection, "PATCH", &path, change, LIMIT);
        changed.map(drop).map_err(problem)
    }

    fn execute(&self, connection: &UnixStream, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        execute(connection, &self.storage, &request)
    }

    fn transfer(&self, connection: UnixStream, request: TransferRequest) -> Result<Transfer, Problem> {
        let path = format!("{}/transfer", self.storage);
        blocking::transfer(&connection, &path, &request, LIMIT).map_err(problem)?;
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
