//! Virtual disks of an open pool, and the operations of people on them.

use std::rc::Rc;

use api::file::AttributeChanges;
use api::storage::PoolStatus;
use api::virtual_disk::{
    ChangedRange, DiskAnswer, DiskOperation, DiskOutcome, SnapshotStatus, VirtualDiskStatus,
};
use api::{Problem, ProblemKind};
use block_io::WorkerClock;
use filesys::{Kind, RangeKind};
use storage_virtualizer::disk::{self, DiskError, DiskOptions, DiskPath, NewDisk, NewSnapshot};

use crate::conversation::{Flow, Notice, Reporter, on_worker};
use crate::device::DevicePaths;
use crate::disks_view as view;
use crate::file_view;
use crate::files::{Part, limit_of, page, walk};
use crate::moment;
use crate::move_disk;
use crate::offline;
use crate::places;
use crate::problem::{of_disks, of_files};
use crate::random;
use crate::storage::{Access, Storage, Volume, now};

/// All disks of an open pool.
pub type Disks = disk::Disks<Volume, WorkerClock>;
/// A disk that is open.
pub type VirtualDisk = disk::VirtualDisk<Volume, WorkerClock>;

/// Ranges that are asked for at once.
const RANGES: usize = 4096;

impl Storage {
    /// All its disks: snapshots, commits and the like of disks that are in use or not.
    ///
    /// # Errors
    /// The pool has no file system.
    pub fn disks(&self) -> Result<&Disks, Problem> {
        self.files()?;
        self.disks
            .as_ref()
            .ok_or_else(|| Problem::new(ProblemKind::Conflict, "the pool has no file system"))
    }

    /// Opens a disk, or a snapshot of one (`/vm/root.dsk@monday`). It is closed by [`Self::close_disk`].
    ///
    /// # Errors
    /// There is none, or it cannot be used in this way now.
    pub async fn disk(&self, path: &str, options: DiskOptions) -> Result<Rc<VirtualDisk>, Problem> {
        let options = DiskOptions {
            now: now(),
            ..options
        };
        let opened = Box::pin(self.disks()?.open(path, options)).await;
        opened.map(Rc::new).map_err(|error| of_disks(&error))
    }

    /// Power-off of a disk: what its mode wants done with what was written is done.
    ///
    /// # Errors
    /// Somebody else still has it, or something could not be written.
    pub async fn close_disk(&self, disk: Rc<VirtualDisk>) -> Result<(), Problem> {
        let closed = Box::pin(self.disks()?.close(disk, now())).await;
        closed.map_err(|error| of_disks(&error))
    }

    /// Closes a disk with which somebody goes on later, and does nothing that its mode wants done at power-off.
    ///
    /// # Errors
    /// As [`Self::close_disk`].
    pub async fn leave_disk(&self, disk: Rc<VirtualDisk>) -> Result<(), Problem> {
        let left = Box::pin(self.disks()?.leave(disk)).await;
        left.map_err(|error| of_disks(&error))
    }

    /// The paths of all disks in a directory and in those below it.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub async fn disk_paths(&self, directory: &str) -> Result<Vec<String>, Problem> {
        let all = walk(self.files()?, directory).await?;
        let disks = all.into_iter().filter(|found| found.kind == Kind::File);
        let disks = disks.filter(|found| DiskPath::new(&found.path).is_ok());
        Ok(disks.map(|found| found.path).collect())
    }
}

/// Opens the pool and its file system, does `operation`, and closes them.
///
/// # Errors
/// They cannot be opened, or the operation is refused or fails.
pub fn execute_disk(
    paths: DevicePaths,
    operation: DiskOperation,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<DiskOutcome, Problem> {
    on_worker(notify, |reporter| async move {
        let access = match operation.only_reads() {
            true => Access::Read,
            false => Access::Write,
        };
        let storage = Storage::open(&paths, access).await?;
        let limit = operation.limit();
        let done = Box::pin(perform(&storage, operation, &reporter)).await;
        let (answer, events) = storage.end(done).await?;
        Ok(DiskOutcome {
            next: answer.next(limit),
            answer,
            events,
        })
    })
}

/// How a pool and some of its disks are; it is opened once, and only read.
///
/// # Errors
/// It cannot be opened. What is wrong with a disk stands in its place.
pub fn look_at_disks(
    paths: DevicePaths,
    disks: Vec<String>,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<(PoolStatus, Vec<Result<VirtualDiskStatus, Problem>>), Problem> {
    on_worker(notify, |_| async move {
        let storage = Storage::open(&paths, Access::Read).await?;
        let pool = offline::status_of(&storage);
        let mut found = Vec::new();
        for path in &disks {
            found.push(Box::pin(status(&storage, path)).await);
        }
        storage.end(Ok(())).await?;
        Ok((pool, found))
    })
}

async fn status(storage: &Storage, path: &str) -> Result<VirtualDiskStatus, Problem> {
    let state = Box::pin(storage.disks()?.status(path)).await.map_err(failed)?;
    Ok(view::status(storage.files()?, &state))
}

async fn perform(
    storage: &Storage,
    operation: DiskOperation,
    reporter: &Reporter<DiskOutcome>,
) -> Result<DiskAnswer, Problem> {
    if let DiskOperation::Move { path, to } = &operation {
        let moved = Box::pin(move_disk::at_once(storage, path, to, reporter)).await?;
        return Ok(DiskAnswer::Job(Box::new(moved)));
    }
    let shortened = shortens(&operation);
    let answer = Box::pin(storage.perform_disk(operation)).await?;
    let Some(path) = shortened else {
        return Ok(answer);
    };
    // What is not needed any more goes now, as nobody else will have the pool open in a moment.
    settle(storage, reporter).await?;
    // What the file system merges by itself may be in the way of the first try.
    for _ in 0..2 {
        let merged = match Box::pin(storage.merge_disk(&path)).await {
            Ok(merged) => merged,
            // It was deleted.
            Err(problem) if problem.kind == ProblemKind::NotFound => true,
            Err(problem) => return Err(problem),
        };
        settle(storage, reporter).await?;
        if merged {
            break;
        }
    }
    Ok(answer)
}

/// Waits for what the file system does in the background, unless the caller has had enough: it goes on when the pool is opened next.
async fn settle<T>(storage: &Storage, reporter: &Reporter<T>) -> Result<(), Problem> {
    if !reporter.stopped() {
        storage.files()?.settled().await;
    }
    Ok(())
}

/// The disk that may have layers more than it needs after an operation.
pub(crate) fn shortens(operation: &DiskOperation) -> Option<String> {
    let path = match operation {
        DiskOperation::Resize { path, .. }
        | DiskOperation::Revert { path }
        | DiskOperation::DeleteSnapshot { path }
        | DiskOperation::Delete { path }
        | DiskOperation::Commit { path }
        | DiskOperation::Discard { path }
        | DiskOperation::Merge { path } => path,
        _ => return None,
    };
    DiskPath::with_snapshot(path)
        .ok()
        .map(|(disk, _)| disk.to_string())
}

impl Storage {
    /// Does an operation on disks of an open pool, whether they are in use or not. None takes long but a merge; after a commit, and
    /// after the deletion of a snapshot, [`Self::merge_disk`] makes the chain short again, when there is time for that.
    ///
    /// # Errors
    /// It is refused or fails.
    pub async fn perform_disk(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        Box::pin(perform_one(self, operation)).await
    }

    /// Makes the chain of a disk as short as its snapshots allow, while it is used. Tells whether nothing is left to do.
    ///
    /// # Errors
    /// There is no such disk, or a volume failed: then it can be called again.
    pub async fn merge_disk(&self, path: &str) -> Result<bool, Problem> {
        self.merge_disk_while(path, |_, _| true).await
    }

    /// As [`Self::merge_disk`], as long as `go_on` wants it; it is told how many bytes of the present layer have gone, and of how many.
    pub(crate) async fn merge_disk_while(
        &self,
        path: &str,
        go_on: impl FnMut(u64, u64) -> bool,
    ) -> Result<bool, Problem> {
        let merged = self.disks()?.merge_while(path, now(), go_on);
        Box::pin(merged).await.map_err(failed)
    }
}

async fn perform_one(storage: &Storage, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
    let disks = storage.disks()?;
    let now = now();
    match operation {
        DiskOperation::List { path, limit, after } => {
            Box::pin(list(storage, &path, (limit, after.as_deref()))).await
        }
        DiskOperation::ListSnapshots { path, limit, after } => {
            let snapshots = Box::pin(status(storage, &path)).await?.snapshot_list;
            snapshot_page(snapshots, (limit, after.as_deref())).map(DiskAnswer::Snapshots)
        }
        DiskOperation::Status { path } => {
            let status = Box::pin(status(storage, &path)).await?;
            Ok(DiskAnswer::Status(Box::new(status)))
        }
        DiskOperation::Changed { path, since, until } => {
            let ranges = Box::pin(changed(disks, &path, &since, until.as_deref())).await?;
            Ok(DiskAnswer::Changed(ranges))
        }
        DiskOperation::Places {
            path,
            offset,
            length,
            unless,
        } => {
            let places = Box::pin(places::places(storage, &path, offset, length, unless)).await?;
            Ok(DiskAnswer::Places(Box::new(places)))
        }
        DiskOperation::Pin {
            path,
            seconds,
            replaces,
        } => {
            let pin = Box::pin(places::pin(storage, &path, seconds, replaces)).await?;
            Ok(DiskAnswer::Pinned(pin))
        }
        DiskOperation::Unpin { pin } => Box::pin(places::unpin(storage, pin)).await,
        DiskOperation::Create {
            path,
            size,
            thick,
            target,
            checksums,
        } => {
            let changes = AttributeChanges {
                target,
                thick: thick.then_some(true),
                checksums,
                ..AttributeChanges::default()
            };
            let attributes = attributes_at(storage, &path, &changes).await?;
            let new = NewDisk {
                size,
                attributes,
                identity: Some(random::uuid()?.0.to_be_bytes()),
                now,
            };
            done(Box::pin(disks.create(&path, &new)).await)
        }
        DiskOperation::Resize { path, size, force } => {
            done(Box::pin(disks.resize(&path, size, force, now)).await)
        }
        DiskOperation::Snapshot {
            paths,
            name,
            description,
        } => {
            moment::check_name(&name)?;
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            let new = NewSnapshot {
                name,
                description,
                now,
            };
            done(Box::pin(disks.snapshot(&paths, &new)).await)
        }
        DiskOperation::DescribeSnapshot {
            path,
            name,
            description,
        } => {
            name.as_deref().map_or(Ok(()), moment::check_name)?;
            let (disk, snapshot) = snapshot_of(&path)?;
            done(Box::pin(describe(disks, &disk, snapshot, name, description)).await)
        }
        DiskOperation::Revert { path } => {
            let (disk, snapshot) = snapshot_of(&path)?;
            done(Box::pin(disks.revert(disk.as_str(), &snapshot, now)).await)
        }
        DiskOperation::DeleteSnapshot { path } => {
            let (disk, snapshot) = snapshot_of(&path)?;
            done(Box::pin(disks.delete_snapshot(disk.as_str(), &snapshot, now)).await)
        }
        DiskOperation::Clone { path, to } => {
            let (disk, snapshot) = DiskPath::with_snapshot(&path).map_err(failed)?;
            let cloned = disks.clone_disk(disk.as_str(), snapshot.as_deref(), &to, now);
            done(Box::pin(cloned).await)
        }
        DiskOperation::Commit { path } => done(Box::pin(disks.commit(&path, now)).await),
        DiskOperation::Discard { path } => done(Box::pin(disks.discard(&path, now)).await),
        DiskOperation::Merge { path } => done(Box::pin(disks.merge(&path, now)).await.map(drop)),
        DiskOperation::Move { path, .. } => {
            let text = "a disk is moved by who has the pool open for longer than this";
            Err(Problem::new(ProblemKind::Conflict, text).about(path))
        }
        DiskOperation::Delete { path } => done(Box::pin(disks.delete(&path, now)).await),
    }
}

pub(crate) fn failed(error: DiskError) -> Problem {
    of_disks(&error)
}

fn done(result: Result<(), DiskError>) -> Result<DiskAnswer, Problem> {
    result.map(|()| DiskAnswer::Done).map_err(failed)
}

/// What a new disk gets where it is made, with changes; none if nothing is changed.
pub(crate) async fn attributes_at(
    storage: &Storage,
    path: &str,
    changes: &AttributeChanges,
) -> Result<Option<filesys::Attributes>, Problem> {
    if changes.is_empty() {
        return Ok(None);
    }
    let path = DiskPath::new(path).map_err(failed)?;
    let directory = match path.as_str().rsplit_once('/') {
        None | Some(("", _)) => "/",
        Some((directory, _)) => directory,
    };
    let files = storage.files()?;
    let stat = files.stat(directory).await.map_err(|error| of_files(&error))?;
    file_view::changed(files, stat.attributes, changes).map(Some)
}

pub(crate) fn snapshot_of(path: &str) -> Result<(DiskPath, String), Problem> {
    let (disk, snapshot) = DiskPath::with_snapshot(path).map_err(failed)?;
    match snapshot {
        Some(snapshot) => Ok((disk, snapshot)),
        None => Err(
            Problem::new(ProblemKind::Invalid, format!("{path} names no snapshot"))
                .about(path)
                .remedy(format!(
                    "give it as {disk}@NAME; `smsvmm disk status {disk}` shows them"
                )),
        ),
    }
}

async fn describe(
    disks: &Disks,
    disk: &DiskPath,
    snapshot: String,
    name: Option<String>,
    description: Option<String>,
) -> Result<(), DiskError> {
    let state = Box::pin(disks.status(disk.as_str())).await?;
    let old = state.snapshots.into_iter().find(|known| known.name == snapshot);
    let Some(old) = old else {
        return Err(DiskError::NoSnapshot {
            disk: disk.to_string(),
            snapshot,
        });
    };
    let new = NewSnapshot {
        name: name.unwrap_or(old.name),
        description: description.unwrap_or(old.description),
        now: now(),
    };
    Box::pin(disks.describe_snapshot(disk.as_str(), &snapshot, &new)).await
}

/// Those of a disk's snapshots that are wanted.
fn snapshot_page(
    mut all: Vec<SnapshotStatus>,
    (limit, after): Part<'_>,
) -> Result<Vec<SnapshotStatus>, Problem> {
    let limit = limit_of(limit)?;
    if let Some(after) = after {
        let last = all.iter().position(|snapshot| snapshot.name == after);
        let last = last.ok_or_else(|| {
            Problem::new(ProblemKind::NotFound, "the disk has no such snapshot any more")
                .about(after)
                .remedy("list them from the beginning")
        })?;
        all.drain(..=last);
    }
    all.truncate(limit);
    Ok(all)
}

async fn list(storage: &Storage, directory: &str, part: Part<'_>) -> Result<DiskAnswer, Problem> {
    let disks = storage.disks()?;
    let mut list = Vec::new();
    for path in page(storage.disk_paths(directory).await?, part)? {
        match Box::pin(disks.status(&path)).await {
            Ok(state) => list.push(view::disk(&state)),
            Err(error) => list.push(view::broken(path, &error)),
        }
    }
    Ok(DiskAnswer::Disks(list))
}

async fn changed(
    disks: &Disks,
    path: &str,
    since: &str,
    until: Option<&str>,
) -> Result<Vec<ChangedRange>, Problem> {
    let mut ranges: Vec<ChangedRange> = Vec::new();
    let mut from = Some(0);
    while let Some(start) = from {
        let found = Box::pin(disks.changed(path, since, until, start, RANGES)).await;
        let (found, next) = found.map_err(failed)?;
        ranges.extend(found.into_iter().map(|range| ChangedRange {
            offset: range.offset,
            length: range.length,
            zero: range.kind == RangeKind::Zero,
        }));
        from = next;
    }
    Ok(ranges)
}
