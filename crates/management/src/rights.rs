//! Which role a request needs: one table.

use access::Role;
use api::StorageRequest;
use api::storage::Operation;
use api::virtual_disk::DiskOperation;
use hyper::Method;

/// Which kind of request it is, by its method and its path behind the machine's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its body is a [`StorageRequest`], which decides.
    Storage,
    /// Its body is a [`TransferRequest`](api::virtual_disk::TransferRequest).
    Transfer,
    /// Method and path decide.
    Path,
}

impl Kind {
    pub(crate) fn of(method: &Method, path: &[&str]) -> Self {
        match (method, path) {
            (&Method::POST, ["storage"] | ["pools", _, "storage"]) => Self::Storage,
            (&Method::POST, ["storage", "transfer"] | ["pools", _, "storage", "transfer"]) => Self::Transfer,
            _ => Self::Path,
        }
    }
}

/// What a request to a machine is, as far as rights are concerned.
#[derive(Debug)]
pub(crate) enum Asked<'a> {
    /// Anything but the following two, by method and path behind the machine's name.
    Path(&'a Method, &'a [&'a str]),
    /// `POST storage`.
    Storage(&'a StorageRequest),
    /// `POST storage/transfer`.
    Transfer,
}

impl Asked<'_> {
    /// The least role that may do it.
    pub(crate) fn needs(&self) -> Role {
        match self {
            Self::Path(method, path) => match (*method, *path) {
                (&Method::GET | &Method::HEAD | &Method::OPTIONS, _) => Role::Viewer,
                (&Method::PUT, ["vm", _]) => Role::Operator,
                // To look on, too: it shows what the guest's administrator sees.
                (&Method::POST, ["console"] | ["vms", _, "console"]) => Role::Operator,
                (&Method::PATCH, ["vm", "disks" | "limit-groups", _]) => Role::Operator,
                (&Method::PUT, ["vms", _, "start" | "shutdown" | "stop"]) => Role::Operator,
                (&Method::PATCH, ["attachments", _, _] | ["attachments", _, "limit-groups", _]) => {
                    Role::Operator
                }
                // Devices are made of files and interfaces of the host.
                _ => Role::Administrator,
            },
            Self::Storage(request) => storage(request),
            // They have the content of disks.
            Self::Transfer => Role::Operator,
        }
    }

    /// The request to a pool that it is.
    pub(crate) fn storage(&self) -> Option<&StorageRequest> {
        match self {
            Self::Storage(request) => Some(request),
            Self::Path(..) | Self::Transfer => None,
        }
    }

    /// Whether nothing changes.
    pub(crate) fn only_reads(&self) -> bool {
        self.needs() == Role::Viewer
    }
}

fn storage(request: &StorageRequest) -> Role {
    match request {
        StorageRequest::Status | StorageRequest::Load { .. } => Role::Viewer,
        StorageRequest::File(operation) if operation.only_reads() => Role::Viewer,
        StorageRequest::Disk(operation) if operation.only_reads() => Role::Viewer,
        StorageRequest::Disk(DiskOperation::Delete { .. }) => Role::Administrator,
        StorageRequest::Disk(_) => Role::Operator,
        StorageRequest::Pool(operation) | StorageRequest::Begin(operation) => match operation {
            Operation::WaitJob { .. } => Role::Viewer,
            Operation::PauseJob { .. }
            | Operation::ResumeJob { .. }
            | Operation::ThrottleJob { .. }
            | Operation::SetJobPriority { .. } => Role::Operator,
            _ => Role::Administrator,
        },
        StorageRequest::File(_) => Role::Administrator,
    }
}

#[cfg(test)]
mod tests {
    use api::file::FileOperation;

    use super::*;

    #[test]
    fn looking_is_for_viewers_using_for_operators_the_rest_for_administrators() {
        let path = |method: Method, path: &[&str]| Asked::Path(&method, path).needs();
        assert_eq!(path(Method::GET, &["vm"]), Role::Viewer);
        assert_eq!(path(Method::GET, &["events"]), Role::Viewer);
        assert_eq!(path(Method::GET, &["vm", "disks", "d", "trace"]), Role::Viewer);
        assert_eq!(path(Method::GET, &["vm", "debug"]), Role::Viewer);
        assert_eq!(path(Method::PUT, &["vm", "stop"]), Role::Operator);
        assert_eq!(path(Method::PATCH, &["vm", "disks", "d"]), Role::Operator);
        assert_eq!(path(Method::POST, &["vm", "disks"]), Role::Administrator);
        assert_eq!(path(Method::PUT, &["vms", "web1", "start"]), Role::Operator);
        assert_eq!(path(Method::POST, &["vms", "web1", "console"]), Role::Operator);
        assert_eq!(path(Method::POST, &["console"]), Role::Operator);
        assert_eq!(path(Method::PUT, &["vms", "web1"]), Role::Administrator);
        assert_eq!(path(Method::DELETE, &["vms", "web1"]), Role::Administrator);
        assert_eq!(path(Method::DELETE, &["vm", "nets", "n"]), Role::Administrator);
        assert_eq!(path(Method::POST, &["something", "new"]), Role::Administrator);
        let storage = |request| Asked::Storage(&request).needs();
        assert_eq!(storage(StorageRequest::Status), Role::Viewer);
        assert_eq!(storage(StorageRequest::Load { window_ms: 0 }), Role::Viewer);
        let throttle = Operation::ThrottleJob { job: 1, throttle: 0 };
        assert_eq!(storage(StorageRequest::Pool(throttle)), Role::Operator);
        let priority = api::storage::JobPriority::High;
        let prefer = Operation::SetJobPriority { job: 1, priority };
        assert_eq!(storage(StorageRequest::Pool(prefer)), Role::Operator);
        let snapshot = DiskOperation::Snapshot {
            paths: vec!["/a.dsk".into()],
            name: "one".into(),
            description: String::new(),
        };
        assert_eq!(storage(StorageRequest::Disk(snapshot)), Role::Operator);
        let delete = DiskOperation::Delete {
            path: "/a.dsk".into(),
        };
        assert_eq!(storage(StorageRequest::Disk(delete)), Role::Administrator);
        let check = |repair| StorageRequest::File(FileOperation::Check { repair });
        assert_eq!(storage(check(false)), Role::Viewer);
        assert_eq!(storage(check(true)), Role::Administrator);
        assert_eq!(
            storage(StorageRequest::Begin(Operation::Settle)),
            Role::Administrator
        );
    }
}
