//! A request that is allowed is done: by the operations that people have, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use api::file::{AttributeChanges, FileAnswer, FileOperation, Target};
use api::storage::{JobState, JobStatus, Operation, PoolStatus, Shape};
use api::virtual_disk::{DiskAnswer, DiskOperation, VirtualDiskStatus};
use api::{
    DiskBus, DiskConfig, DiskStatus, ExpandedPolicy, Problem, ProblemKind, StorageAnswer, StorageRequest,
};
use expanded_api::{Answer, AttachedDisk, Image, ImageDisk, Request, split_snapshot};

use crate::Owner;
use crate::allow::Own;
use crate::look::serial;

/// Between two looks at a job that is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// What a request is done with.
pub(crate) struct Doer<'a> {
    pub(crate) vm: &'a dyn Owner,
    pub(crate) policy: &'a ExpandedPolicy,
    /// Taken by who begins a job, so that the quota holds.
    pub(crate) begins: &'a Mutex<()>,
    /// Whether who waits is to give up.
    pub(crate) gives_up: &'a AtomicBool,
}

pub(crate) fn unexpected() -> Problem {
    Problem::new(
        ProblemKind::Host,
        "the pool gave another answer than was asked for",
    )
}

pub(crate) fn conflict(text: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Conflict, text)
}

impl Doer<'_> {
    /// Does it.
    pub(crate) fn perform(&self, request: Request) -> Result<Answer, Problem> {
        let only_done = |_| Answer::Done;
        match request {
            // Told without asking anybody.
            Request::Describe {} => Err(unexpected()),
            Request::ListDisks {} => self.list_disks().map(Answer::Disks),
            Request::ListVolumes {} => self.list_volumes().map(Answer::Volumes),
            Request::DiskStatus { disk } => {
                let (disk, _) = split_snapshot(&disk);
                self.status(disk).map(|status| Answer::Disk(Box::new(status)))
            }
            Request::CreateDisk {
                disk,
                size,
                thick,
                target,
                checksums,
                attach,
            } => {
                self.make_room_for(size, 1)?;
                self.make_folder_of(&disk)?;
                self.disk(DiskOperation::Create {
                    path: disk.clone(),
                    size,
                    thick,
                    target,
                    checksums,
                })?;
                self.hand_out(disk, attach)
            }
            Request::CloneDisk { source, disk, attach } => {
                let size = self.size_of(&source)?;
                self.make_room_for(size, 1)?;
                self.make_folder_of(&disk)?;
                self.disk(DiskOperation::Clone {
                    path: source,
                    to: disk.clone(),
                })?;
                self.hand_out(disk, attach)
            }
            Request::AttachDisk { disk, read_only } => self.attach(&disk, read_only).map(Answer::Attached),
            Request::DetachDisk { disk } => self.detach(&disk),
            Request::DeleteDisk { disk } => self.disk(DiskOperation::Delete { path: disk }).map(only_done),
            Request::ResizeDisk { disk, size } => self.resize(disk, size),
            Request::Snapshot {
                disks,
                name,
                description,
            } => self.snapshot(disks, name, description).map(|_| Answer::Done),
            Request::DeleteSnapshot { snapshot } => {
                let operation = DiskOperation::DeleteSnapshot { path: snapshot };
                self.disk(operation).map(only_done)
            }
            Request::Revert { snapshot } => {
                self.disk(DiskOperation::Revert { path: snapshot }).map(only_done)
            }
            Request::Commit { disk } => self.disk(DiskOperation::Commit { path: disk }).map(only_done),
            Request::Discard { disk } => self.disk(DiskOperation::Discard { path: disk }).map(only_done),
            Request::SetAttributes { disk, attributes } => {
                let changes = AttributeChanges {
                    checksums: attributes.checksums,
                    exempt_from_migration: attributes.exempt_from_migration,
                    ..AttributeChanges::default()
                };
                for layer in self.layers(&disk)? {
                    self.file(FileOperation::SetAttributes {
                        path: layer.path,
                        attributes: changes.clone(),
                    })?;
                }
                Ok(Answer::Done)
            }
            Request::MoveDisk { disk, to, background } => self.move_disk(disk, to, background),
            Request::MoveVolume {
                volume,
                from,
                to,
                throttle,
            } => self.begin(Operation::MoveVolume {
                name: volume,
                from,
                to,
                throttle,
            }),
            Request::SetLayout {
                ref volume, throttle, ..
            } => {
                let shape = self.shaped(volume, request.shape().ok_or_else(unexpected)?)?;
                let name = volume.clone();
                self.begin(Operation::SetLayout {
                    name,
                    shape,
                    throttle,
                })
            }
            Request::ListJobs {} => self.vm.jobs().map(Answer::Jobs),
            Request::JobStatus { job } => self.own_job(job).map(|job| Answer::Jobs(vec![job])),
            Request::CancelJob { job } => {
                if !self.own_job(job)?.is_live() {
                    let text = format!("job {job} has ended");
                    return Err(conflict(text).about(format!("job {job}")));
                }
                self.pool(StorageRequest::Begin(Operation::CancelJob { job }))?;
                self.own_job(job).map(|job| Answer::Jobs(vec![job]))
            }
            Request::FreezeImage { disks, name } => self.freeze(disks, name).map(Answer::Image),
            Request::ReleaseImage { disks, name } => {
                for disk in disks {
                    let path = format!("{disk}@{name}");
                    match self.disk(DiskOperation::DeleteSnapshot { path }) {
                        // It was released before, in part.
                        Err(problem) if problem.kind == ProblemKind::NotFound => {}
                        other => drop(other?),
                    }
                }
                Ok(Answer::Done)
            }
            Request::Extents { disk } => self.extents(&disk).map(Answer::Extents),
            Request::ConfigurationId { disk } => self.configuration(&disk).map(Answer::ConfigurationId),
            Request::Changed { disk, since, until } => {
                match self.disk(DiskOperation::Changed {
                    path: disk,
                    since,
                    until,
                })? {
                    DiskAnswer::Changed(ranges) => Ok(Answer::Changed(ranges)),
                    _ => Err(unexpected()),
                }
            }
            Request::ReplicationStatus {} => Ok(Answer::NotConfigured("replication".to_owned())),
            Request::HsmStatus {} => Ok(Answer::NotConfigured("migration to cheaper storage".to_owned())),
        }
    }

    /// The disks of the pool that the machine has.
    pub(crate) fn own(&self) -> Vec<Own> {
        let disks = self.vm.disks();
        disks.iter().filter_map(|disk| Own::of(&disk.config)).collect()
    }

    pub(crate) fn disk(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        match self.vm.storage(StorageRequest::Disk(operation))? {
            StorageAnswer::Disk(outcome) => Ok(outcome.answer),
            _ => Err(unexpected()),
        }
    }

    pub(crate) fn file(&self, operation: FileOperation) -> Result<FileAnswer, Problem> {
        match self.vm.storage(StorageRequest::File(operation))? {
            StorageAnswer::File(outcome) => Ok(outcome.answer),
            _ => Err(unexpected()),
        }
    }

    fn pool(&self, request: StorageRequest) -> Result<PoolStatus, Problem> {
        match self.vm.storage(request)? {
            StorageAnswer::Status(status) => Ok(*status),
            StorageAnswer::Pool(outcome) => Ok(outcome.pool),
            _ => Err(unexpected()),
        }
    }

    pub(crate) fn pool_status(&self) -> Result<PoolStatus, Problem> {
        self.pool(StorageRequest::Status)
    }

    pub(crate) fn status(&self, disk: &str) -> Result<VirtualDiskStatus, Problem> {
        match self.disk(DiskOperation::Status {
            path: disk.to_owned(),
        })? {
            DiskAnswer::Status(status) => Ok(*status),
            _ => Err(unexpected()),
        }
    }

    /// Bytes of a disk, or of a snapshot of one.
    fn size_of(&self, path: &str) -> Result<u64, Problem> {
        let (disk, snapshot) = split_snapshot(path);
        let status = self.status(disk)?;
        let Some(snapshot) = snapshot else {
            return Ok(status.disk.size);
        };
        let known = status.snapshot_list.iter().find(|known| known.name == snapshot);
        known.map(|known| known.size).ok_or_else(|| {
            Problem::new(
                ProblemKind::NotFound,
                format!("{disk} has no snapshot {snapshot}"),
            )
            .about(path)
        })
    }

    /// Sees that the quotas allow disks with so many bytes more.
    fn make_room_for(&self, bytes: u64, disks: usize) -> Result<(), Problem> {
        let named = self.named()?;
        let exhausted = |text: String| Err(Problem::new(ProblemKind::Exhausted, text));
        let most = usize::try_from(self.policy.max_disks).unwrap_or(usize::MAX);
        if named.len() + disks > most {
            return exhausted(format!(
                "this guest may have {most} disks, and has {}",
                named.len()
            ));
        }
        if let Some(most) = self.policy.max_bytes {
            let used: u64 = named.iter().fold(0, |sum, (_, size)| sum.saturating_add(*size));
            if used.saturating_add(bytes) > most.bytes() {
                let used = api::ByteSize::from_bytes(used);
                return exhausted(format!(
                    "this guest may have disks of {most} together, and has {used}"
                ));
            }
        }
        Ok(())
    }

    /// Makes the folder that the policy names by `/web1/*`, with the first disk in it. Others are the administrator's affair: a guest that could
    /// make any number of folders would have no quota.
    fn make_folder_of(&self, disk: &str) -> Result<(), Problem> {
        let (folder, _) = disk.rsplit_once('/').unwrap_or_default();
        let is_named = |pattern: &String| pattern.strip_suffix("/*") == Some(folder);
        if folder.is_empty() || !self.policy.objects.iter().any(is_named) {
            return Ok(());
        }
        let operation = FileOperation::MakeDirectory {
            path: folder.to_owned(),
            parents: true,
            attributes: AttributeChanges::default(),
        };
        self.file(operation).map(drop)
    }

    /// Attaches a new disk, if that was wanted. One that cannot be attached goes again.
    fn hand_out(&self, disk: String, attach: bool) -> Result<Answer, Problem> {
        if !attach {
            return Ok(Answer::Done);
        }
        match self.attach(&disk, false) {
            Ok(attached) => Ok(Answer::Attached(attached)),
            Err(problem) => {
                // What matters is why it cannot be attached.
                let _ = self.disk(DiskOperation::Delete { path: disk });
                Err(problem)
            }
        }
    }

    fn attached(&self, path: &str) -> Option<DiskStatus> {
        let (disk, snapshot) = split_snapshot(path);
        let mut disks = self.vm.disks().into_iter();
        disks.find(|status| {
            Own::of(&status.config).is_some_and(|own| own.path == disk && own.snapshot.as_deref() == snapshot)
        })
    }

    fn attach(&self, path: &str, read_only: bool) -> Result<AttachedDisk, Problem> {
        if let Some(status) = self.attached(path) {
            let text = format!("this guest has {path} already, as {}", status.config.id);
            return Err(conflict(text).about(path));
        }
        let config = DiskConfig {
            image: None,
            file: Some(path.to_owned()),
            bus: DiskBus::VirtioScsi,
            read_only: read_only || split_snapshot(path).1.is_some(),
            ..DiskConfig::new("")
        };
        let status = self.vm.attach_disk(config)?;
        Ok(AttachedDisk {
            path: path.to_owned(),
            serial: serial(&status.config),
            size: status.size.bytes(),
            id: status.config.id,
        })
    }

    fn detach(&self, path: &str) -> Result<Answer, Problem> {
        let Some(status) = self.attached(path) else {
            let text = format!("this guest does not have {path}");
            return Err(Problem::new(ProblemKind::NotFound, text).about(path));
        };
        self.vm.detach(&status.config.id)?;
        Ok(Answer::Done)
    }

    fn resize(&self, path: String, size: u64) -> Result<Answer, Problem> {
        let present = self.size_of(&path)?;
        if size < present {
            let text = format!("{path} has {present} bytes, and a guest cannot make a disk smaller");
            return Err(conflict(text).about(path));
        }
        self.make_room_for(size - present, 0)?;
        let force = false;
        self.disk(DiskOperation::Resize { path, size, force })?;
        Ok(Answer::Done)
    }

    /// Makes it; the disks of which it is.
    fn snapshot(
        &self,
        disks: Vec<String>,
        name: String,
        description: String,
    ) -> Result<Vec<String>, Problem> {
        let disks = match disks.is_empty() {
            false => disks,
            true => {
                let own = self.own().into_iter().filter(|own| own.writable);
                own.map(|own| own.path).collect()
            }
        };
        if disks.is_empty() {
            return Err(conflict("this guest has no disk of a pool that it can write"));
        }
        let most = usize::try_from(self.policy.max_snapshots).unwrap_or(usize::MAX);
        for disk in &disks {
            let present = self.status(disk)?.snapshot_list.len();
            if present >= most {
                let text =
                    format!("a disk of this guest may have {most} snapshots, and {disk} has {present}");
                return Err(Problem::new(ProblemKind::Exhausted, text)
                    .about(disk)
                    .remedy("delete one"));
            }
        }
        self.disk(DiskOperation::Snapshot {
            paths: disks.clone(),
            name,
            description,
        })?;
        Ok(disks)
    }

    /// Has a disk moved; answers with the job, or with what it came to.
    fn move_disk(&self, path: String, to: Target, background: bool) -> Result<Answer, Problem> {
        let begun = self.begin_job(|| match self.disk(DiskOperation::Move { path, to })? {
            DiskAnswer::Job(job) => Ok(vec![*job]),
            _ => Err(unexpected()),
        })?;
        let mut job = match begun.as_slice() {
            _ if background => return Ok(Answer::Jobs(begun)),
            [job] => job.clone(),
            _ => return Err(unexpected()),
        };
        while job.is_live() {
            if self.gives_up.load(Ordering::Relaxed) {
                let text = format!(
                    "job {}, {}, goes on when the pool is open again",
                    job.id, job.what
                );
                return Err(Problem::new(ProblemKind::Stopping, text));
            }
            std::thread::sleep(LOOK);
            job = self.own_job(job.id)?;
        }
        match (job.state, job.moved) {
            (JobState::Done, Some(moved)) => Ok(Answer::Moved(moved)),
            (JobState::Cancelled, _) => {
                let text = format!(
                    "job {} was cancelled: new data go where the disk was to be moved, and so did what was moved; the rest is where it was",
                    job.id
                );
                Err(conflict(text).remedy("the same again moves the rest"))
            }
            (_, _) => {
                let reason = job.reason.unwrap_or_else(|| "it could not be moved".to_owned());
                Err(Problem::new(ProblemKind::Host, reason))
            }
        }
    }

    /// The shape of a volume that a guest changes: what the administrator has said of its storage class stays, and of its devices, unless
    /// the guest names some, which it may.
    fn shaped(&self, name: &str, mut shape: Shape) -> Result<Shape, Problem> {
        let volumes = self.pool_status()?.volumes;
        let Some(volume) = volumes.into_iter().find(|volume| volume.name == name) else {
            return Err(
                Problem::new(ProblemKind::NotFound, format!("the pool has no volume {name}")).about(name),
            );
        };
        shape.class = volume.shape.class;
        if shape.devices.is_empty() {
            shape.devices = volume.shape.devices;
        }
        Ok(shape)
    }

    /// Begins jobs, if the quota allows it.
    fn begin_job(
        &self,
        begin: impl FnOnce() -> Result<Vec<JobStatus>, Problem>,
    ) -> Result<Vec<JobStatus>, Problem> {
        let _begins = self.begins.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = self.vm.jobs()?;
        // Merges come of themselves, after what it may do at any time.
        let counts = |job: &&JobStatus| job.is_live() && job.kind != "merge";
        let live = jobs.iter().filter(counts).count();
        let most = usize::try_from(self.policy.max_jobs).unwrap_or(usize::MAX);
        if live >= most {
            let text = format!("this guest may have {most} jobs at once, and has {live}");
            return Err(Problem::new(ProblemKind::Exhausted, text).remedy("wait for one, or cancel it"));
        }
        begin()
    }

    /// Begins a job of the pool.
    fn begin(&self, operation: Operation) -> Result<Answer, Problem> {
        let begun = self.begin_job(|| match self.vm.storage(StorageRequest::Begin(operation))? {
            StorageAnswer::Pool(outcome) => Ok(outcome.jobs),
            _ => Err(unexpected()),
        });
        begun.map(Answer::Jobs)
    }

    fn own_job(&self, number: u32) -> Result<JobStatus, Problem> {
        let mut jobs = self.vm.jobs()?.into_iter();
        jobs.find(|job| job.id == number).ok_or_else(|| {
            let text = format!("this guest has begun no job {number}, or so long ago that it is forgotten");
            Problem::new(ProblemKind::NotFound, text).about(format!("job {number}"))
        })
    }

    fn freeze(&self, disks: Vec<String>, name: String) -> Result<Image, Problem> {
        let frozen = self.snapshot(disks, name.clone(), "frozen image".to_owned())?;
        let mut disks = Vec::new();
        for disk in frozen {
            disks.push(ImageDisk {
                snapshot: format!("{disk}@{name}"),
                configuration: self.configuration(&disk)?,
                disk,
            });
        }
        Ok(Image { name, disks })
    }
}
