//! What a machine may have from its manager.
//!
//! Each machine has a socket of its own, `RUNTIME/vms/NAME/manager.sock`, and who comes through it is that machine, whatever he says. He may use
//! the disks that its definition named when it was started, and those that an administrator has attached through the manager since; and ask for what is
//! done with these. He may do nothing to the pool, to other disks, to machines. What is allowed is noted beside the socket, for the next manager.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::file::FileOperation;
use api::virtual_disk::{DiskOperation, TransferRequest};
use api::{
    AdapterRequest, AttachRequest, Attachment, Condition, DeviceId, DiskChange, DiskConfig, DiskLimits,
    EventLog, Host, HostStatus, MachineDefinition, MachineStatus, Metrics, Problem, ProblemKind,
    StorageAnswer, StorageRequest, TracePage, Transfer, VmName,
};
use serde::{Deserialize, Serialize};

/// A disk of a pool that a machine may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct OwnDisk {
    /// None: that of the only pool.
    pool: Option<String>,
    file: String,
    read_only: bool,
}

impl OwnDisk {
    fn of(disk: &DiskConfig) -> Option<Self> {
        Some(Self {
            pool: disk.pool.clone(),
            file: disk.file.clone()?,
            read_only: disk.read_only,
        })
    }

    /// Whether it is in a pool, by the names that the pools have: where there is one only, its name may be left out.
    fn is_in(&self, pool: Option<&str>, storage: &dyn Storage) -> bool {
        storage.pool_name(self.pool.as_deref()) == storage.pool_name(pool)
    }
}

/// Of `/web1.dsk@noon`, the disk.
fn disk_of(path: &str) -> &str {
    path.split_once('@').map_or(path, |(disk, _)| disk)
}

/// The disks that a machine may use.
#[derive(Debug)]
pub(crate) struct Rights {
    /// Where they are noted.
    path: PathBuf,
    disks: Mutex<Vec<OwnDisk>>,
}

impl Rights {
    /// Those that were noted at `path`.
    pub(crate) fn noted(path: &Path) -> Self {
        let text = fs::read(path).unwrap_or_default();
        Self {
            path: path.to_owned(),
            disks: Mutex::new(serde_json::from_slice(&text).unwrap_or_default()),
        }
    }

    fn disks(&self) -> MutexGuard<'_, Vec<OwnDisk>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of a machine that is started.
    pub(crate) fn begin(&self, disks: &[DiskConfig]) -> io::Result<()> {
        let mut own = self.disks();
        *own = disks.iter().filter_map(OwnDisk::of).collect();
        self.note(&own)
    }

    /// One more, which is attached.
    pub(crate) fn allow(&self, disk: &DiskConfig) -> io::Result<()> {
        let Some(disk) = OwnDisk::of(disk) else {
            return Ok(());
        };
        let mut own = self.disks();
        if !own.contains(&disk) {
            own.push(disk);
        }
        self.note(&own)
    }

    fn note(&self, disks: &[OwnDisk]) -> io::Result<()> {
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec(disks)?)?;
        fs::rename(&new, &self.path)
    }

    /// Whether it may use a disk of a pool. What the disk's own description says of a pool counts for nothing.
    fn may_use(&self, storage: &dyn Storage, pool: Option<&str>, disk: &DiskConfig) -> bool {
        let allows = |own: &OwnDisk| {
            own.is_in(pool, storage)
                && Some(&own.file) == disk.file.as_ref()
                && (disk.read_only || !own.read_only)
        };
        self.disks().iter().any(allows)
    }

    /// Whether all that `paths` names belongs to own disks; to `change` them, they must be its to write.
    fn has(&self, storage: &dyn Storage, pool: Option<&str>, paths: &[&str], change: bool) -> bool {
        let disks = self.disks();
        let is_own = |path: &&str| {
            let mut disks = disks.iter();
            disks.any(|own| {
                own.is_in(pool, storage) && disk_of(&own.file) == disk_of(path) && !(change && own.read_only)
            })
        };
        !paths.is_empty() && paths.iter().all(is_own)
    }

    fn may_ask(&self, storage: &dyn Storage, pool: Option<&str>, request: &StorageRequest) -> bool {
        match request {
            StorageRequest::Status => true,
            // For backups; who made a pin is not known.
            StorageRequest::Disk(DiskOperation::Unpin { .. }) => true,
            StorageRequest::Disk(operation) => {
                self.has(storage, pool, &paths_of(operation), !operation.only_reads())
            }
            StorageRequest::File(FileOperation::Stat { path } | FileOperation::Extents { path }) => {
                self.has(storage, pool, &[path], false)
            }
            StorageRequest::File(_)
            | StorageRequest::Load { .. }
            | StorageRequest::Pool(_)
            | StorageRequest::Begin(_) => false,
        }
    }

    fn may_move(&self, storage: &dyn Storage, pool: Option<&str>, request: &TransferRequest) -> bool {
        match request {
            TransferRequest::Export(export) => self.has(storage, pool, &[&export.path], false),
            TransferRequest::Read(read) => self.has(storage, pool, &[&read.path], false),
            TransferRequest::Import(_) | TransferRequest::Copy(_) => false,
        }
    }
}

/// What an operation works on; nothing, if that is not disks that there are, and only these.
fn paths_of(operation: &DiskOperation) -> Vec<&str> {
    match operation {
        DiskOperation::Snapshot { paths, .. } => paths.iter().map(String::as_str).collect(),
        DiskOperation::Status { path }
        | DiskOperation::ListSnapshots { path, .. }
        | DiskOperation::Resize { path, .. }
        | DiskOperation::DescribeSnapshot { path, .. }
        | DiskOperation::Revert { path }
        | DiskOperation::DeleteSnapshot { path }
        | DiskOperation::Commit { path }
        | DiskOperation::Discard { path }
        | DiskOperation::Merge { path }
        | DiskOperation::Changed { path, .. }
        | DiskOperation::Pin { path, .. }
        | DiskOperation::Places { path, .. } => vec![path],
        _ => Vec::new(),
    }
}

/// Who serves disks, and does things with pools: as the methods of [`Host`].
pub trait Storage: Send + Sync {
    /// The name of a pool that is named, or of the only one; none if there is none such.
    fn pool_name(&self, pool: Option<&str>) -> Option<String>;

    /// See [`Host::storage`].
    ///
    /// # Errors
    /// As there.
    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// See [`Host::transfer`].
    ///
    /// # Errors
    /// As there.
    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem>;

    /// See [`Host::attach`].
    ///
    /// # Errors
    /// As there.
    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem>;

    /// See [`Host::change_attachment`].
    ///
    /// # Errors
    /// As there.
    fn change(&self, vm: &VmName, device: &DeviceId, change: &DiskChange) -> Result<Attachment, Problem>;

    /// See [`Host::attach_adapter`].
    ///
    /// # Errors
    /// As there.
    fn attach_adapter(&self, request: AdapterRequest) -> Result<Transfer, Problem>;

    /// See [`Host::trace_attachment`].
    ///
    /// # Errors
    /// As there.
    fn trace(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem>;

    /// See [`Host::change_group`].
    ///
    /// # Errors
    /// As there.
    fn change_group(&self, vm: &VmName, group: &DeviceId, change: &DiskLimits)
    -> Result<DiskLimits, Problem>;
}

/// The manager, as one machine sees it.
pub(crate) struct Door {
    vm: VmName,
    rights: Arc<Rights>,
    storage: Arc<dyn Storage>,
    /// None.
    events: EventLog,
}

impl Door {
    pub(crate) fn new(vm: &VmName, rights: Arc<Rights>, storage: Arc<dyn Storage>) -> Self {
        Self {
            vm: vm.clone(),
            rights,
            storage,
            events: EventLog::new(),
        }
    }

    fn is(&self, vm: &VmName) -> Result<(), Problem> {
        match *vm == self.vm {
            true => Ok(()),
            false => Err(forbidden(format!("machine {} may not speak for {vm}", self.vm))),
        }
    }
}

fn forbidden(text: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Forbidden, text)
}

fn not_for_machines<T>() -> Result<T, Problem> {
    let problem = forbidden("a machine may not ask for that at its manager");
    Err(problem.remedy("administrators have a socket of their own: management.socket of host.toml"))
}

impl Host for Door {
    fn status(&self) -> HostStatus {
        HostStatus {
            name: String::new(),
            version: String::new(),
            pid: std::process::id(),
            uptime_seconds: 0,
            pools: Vec::new(),
            machines: Vec::new(),
            attachments: Vec::new(),
            last_event: 0,
            notes: Vec::new(),
        }
    }

    fn machines(&self) -> Vec<MachineStatus> {
        Vec::new()
    }

    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        if !self.rights.may_ask(&*self.storage, pool, &request) {
            let problem = forbidden("a machine may do this with its own disks only").about(&self.vm);
            return Err(problem.remedy("ask the manager itself: `smsvmm ... --config host.toml`"));
        }
        self.storage.storage(pool, request)
    }

    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem> {
        if !self.rights.may_move(&*self.storage, pool, &request) {
            let problem =
                forbidden("a machine may read its own disks, and move no other data").about(&self.vm);
            return Err(problem.remedy("ask the manager itself: `smsvmm disk ... --config host.toml`"));
        }
        self.storage.transfer(pool, request)
    }

    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem> {
        self.is(&request.vm)?;
        if !self
            .rights
            .may_use(&*self.storage, request.pool.as_deref(), &request.disk)
        {
            let problem = forbidden("this disk is not one of the machine's").about(&request.disk.id);
            return Err(problem.remedy(format!(
                "name it in its vm.toml, or attach it through the manager: `smsvmm vm attach-disk --config host.toml --vm {}`",
                self.vm
            )));
        }
        self.storage.attach(request)
    }

    fn change_attachment(
        &self,
        vm: &VmName,
        device: &DeviceId,
        change: &DiskChange,
    ) -> Result<Attachment, Problem> {
        self.is(vm)?;
        self.storage.change(vm, device, change)
    }

    fn attach_adapter(&self, request: AdapterRequest) -> Result<Transfer, Problem> {
        self.is(&request.vm)?;
        self.storage.attach_adapter(request)
    }

    fn trace_attachment(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        self.is(vm)?;
        self.storage.trace(vm, device, after)
    }

    fn change_group(
        &self,
        vm: &VmName,
        group: &DeviceId,
        change: &DiskLimits,
    ) -> Result<DiskLimits, Problem> {
        self.is(vm)?;
        self.storage.change_group(vm, group, change)
    }

    fn define(&self, _: &VmName, _: MachineDefinition, _: &Condition) -> Result<MachineStatus, Problem> {
        not_for_machines()
    }

    fn machine(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        not_for_machines()
    }

    fn start(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        not_for_machines()
    }

    fn shut_down(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        not_for_machines()
    }

    fn stop(&self, _: &VmName) -> Result<MachineStatus, Problem> {
        not_for_machines()
    }

    fn delete(&self, _: &VmName, _: &Condition) -> Result<(), Problem> {
        not_for_machines()
    }

    fn machine_socket(&self, _: &VmName) -> Result<PathBuf, Problem> {
        not_for_machines()
    }

    fn allow_disk(&self, _: &VmName, _: &DiskConfig) -> Result<(), Problem> {
        not_for_machines()
    }

    fn metrics(&self) -> Metrics {
        Metrics::default()
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}

#[cfg(test)]
mod tests {
    use api::storage::Operation;
    use api::virtual_disk::ReadRanges;

    use super::*;

    fn disk(file: &str, read_only: bool) -> DiskConfig {
        DiskConfig {
            image: None,
            file: Some(file.into()),
            read_only,
            ..DiskConfig::new("")
        }
    }

    /// So many pools: `tank`, and `other`.
    struct Named(usize);

    impl Storage for Named {
        fn pool_name(&self, pool: Option<&str>) -> Option<String> {
            let names = ["tank", "other"].get(..self.0)?;
            match pool {
                Some(pool) => names.contains(&pool).then(|| pool.to_owned()),
                None => (self.0 == 1).then(|| "tank".to_owned()),
            }
        }

        fn storage(&self, _: Option<&str>, _: StorageRequest) -> Result<StorageAnswer, Problem> {
            not_for_machines()
        }

        fn transfer(&self, _: Option<&str>, _: TransferRequest) -> Result<Transfer, Problem> {
            not_for_machines()
        }

        fn attach(&self, _: AttachRequest) -> Result<Transfer, Problem> {
            not_for_machines()
        }

        fn change(&self, _: &VmName, _: &DeviceId, _: &DiskChange) -> Result<Attachment, Problem> {
            not_for_machines()
        }

        fn attach_adapter(&self, _: AdapterRequest) -> Result<Transfer, Problem> {
            came_through()
        }

        fn trace(&self, _: &VmName, _: &DeviceId, _: &str) -> Result<TracePage, Problem> {
            came_through()
        }

        fn change_group(&self, _: &VmName, _: &DeviceId, _: &DiskLimits) -> Result<DiskLimits, Problem> {
            came_through()
        }
    }

    fn came_through<T>() -> Result<T, Problem> {
        Err(Problem::new(ProblemKind::NotFound, "there is nothing"))
    }

    #[test]
    fn no_machine_speaks_for_another() {
        let folder = tempfile::tempdir().unwrap();
        let (web, db): (VmName, VmName) = ("web1".parse().unwrap(), "db1".parse().unwrap());
        let rights = Arc::new(Rights::noted(&folder.path().join("disks")));
        let door = Door::new(&web, rights, Arc::new(Named(1)));
        let id: DeviceId = "d0".parse().unwrap();
        let asked = |vm: &VmName| {
            let adapter = AdapterRequest {
                vm: vm.clone(),
                pool: None,
                adapter: api::AdapterConfig {
                    queues: 1,
                    queue_size: api::QueueSize::default(),
                    targets: 1,
                    expanded_api: api::ExpandedPolicy::default(),
                },
                disks: 0,
                memory_stays: false,
            };
            [
                door.attach_adapter(adapter).err(),
                door.trace_attachment(vm, &id, "").err(),
                door.change_group(vm, &id, &DiskLimits::default()).err(),
            ]
            .map(|problem| problem.map(|problem| problem.kind))
        };
        assert_eq!(asked(&web), [Some(ProblemKind::NotFound); 3], "they come through");
        assert_eq!(asked(&db), [Some(ProblemKind::Forbidden); 3]);
    }

    #[test]
    fn a_machine_has_its_own_disks_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disks");
        let rights = Rights::noted(&path);
        rights
            .begin(&[
                disk("/a.dsk", false),
                disk("/lib.dsk@base", true),
                DiskConfig::new("/i.raw"),
            ])
            .unwrap();
        assert!(
            rights.may_use(&Named(1), None, &disk("/a.dsk", false))
                && rights.may_use(&Named(1), None, &disk("/a.dsk", true))
        );
        assert!(rights.may_use(&Named(1), None, &disk("/lib.dsk@base", true)));
        for other in ["/b.dsk", "/a.dsk@x", "/lib.dsk", "/lib.dsk@base"] {
            assert!(!rights.may_use(&Named(1), None, &disk(other, false)), "{other}");
        }
        // Those that are attached are known to the next manager, too.
        rights.allow(&disk("/b.dsk", false)).unwrap();
        let rights = Rights::noted(&path);
        assert!(
            rights.may_use(&Named(1), None, &disk("/b.dsk", false))
                && !rights.may_use(&Named(1), None, &disk("/c.dsk", false))
        );
        rights
            .begin(&[DiskConfig {
                pool: Some("tank".into()),
                ..disk("/a.dsk", false)
            }])
            .unwrap();
        assert!(!rights.may_use(&Named(1), None, &disk("/b.dsk", false)));
        let of = |pools: usize, pool| rights.may_use(&Named(pools), pool, &disk("/a.dsk", false));
        assert!(of(1, None) && of(1, Some("tank")) && of(2, Some("tank")));
        assert!(!of(2, None) && !of(2, Some("other")) && !of(1, Some("other")));
        // What the disk says of its pool is not where it is opened.
        let lies = DiskConfig {
            pool: Some("tank".into()),
            ..disk("/a.dsk", false)
        };
        assert!(!rights.may_use(&Named(2), Some("other"), &lies));
    }

    #[test]
    fn what_a_machine_may_have_done() {
        let folder = tempfile::tempdir().unwrap();
        let rights = Rights::noted(&folder.path().join("disks"));
        rights
            .begin(&[disk("/a.dsk", false), disk("/lib.dsk@base", true)])
            .unwrap();
        let may = |operation| rights.may_ask(&Named(1), None, &StorageRequest::Disk(operation));
        let status = |path: &str| DiskOperation::Status { path: path.into() };
        let revert = |path: &str| DiskOperation::Revert { path: path.into() };
        let snapshot = |paths: &[&str]| DiskOperation::Snapshot {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            name: "x".into(),
            description: String::new(),
        };
        assert!(may(status("/a.dsk")) && may(status("/lib.dsk")) && !may(status("/b.dsk")));
        assert!(may(revert("/a.dsk@x")) && !may(revert("/lib.dsk@base")) && !may(revert("/b.dsk@x")));
        assert!(may(snapshot(&["/a.dsk"])) && !may(snapshot(&["/a.dsk", "/b.dsk"])) && !may(snapshot(&[])));
        assert!(!may(DiskOperation::Delete {
            path: "/a.dsk".into()
        }));
        let clone = DiskOperation::Clone {
            path: "/a.dsk".into(),
            to: "/b.dsk".into(),
        };
        assert!(!may(clone));
        assert!(rights.may_ask(&Named(1), None, &StorageRequest::Status));
        let cancel = StorageRequest::Pool(Operation::CancelJob { job: 1 });
        assert!(!rights.may_ask(&Named(1), None, &cancel));
        let stat = |path: &str| StorageRequest::File(FileOperation::Stat { path: path.into() });
        assert!(
            rights.may_ask(&Named(1), None, &stat("/a.dsk")) && !rights.may_ask(&Named(1), None, &stat("/"))
        );
        let read = |path: &str| {
            let ranges = ReadRanges {
                path: path.into(),
                ranges: Vec::new(),
            };
            rights.may_move(&Named(1), None, &TransferRequest::Read(ranges))
        };
        assert!(read("/a.dsk@x") && !read("/b.dsk@x"));
    }
}
