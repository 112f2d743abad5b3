//! A disk moves to other volumes while it is used: all its layers, as one job, which the next process goes on with if this one ends.
//!
//! First all layers are told where their data shall be: from then on new data go there, whatever becomes of the job. Then what lies elsewhere is
//! moved, layer by layer. Where it was broken off can be seen from where the data are: a move that is begun again passes over what is in its place.

use std::rc::Rc;

use api::file::{AttributeChanges, FileOutcome, Moved, Target};
use api::storage::JobStatus;
use api::virtual_disk::DiskOutcome;
use api::{Problem, ProblemKind};
use block_io::spawn_local;
use filesys::{FileId, FsError, Kind, Relocation};
use storage_virtualizer::disk::{DiskPath, is_layer_of};

use crate::conversation::Reporter;
use crate::disks::failed;
use crate::files::{self, move_files};
use crate::hosted::Open;
use crate::problem::of_files;
use crate::storage::{FileSystem, Storage};

/// The kind of such jobs.
pub(crate) const KIND: &str = "move-disk";

/// In words, for the list of jobs.
pub(crate) fn what(disk: &str, to: &Target) -> String {
    match to {
        Target::Any => format!("move {disk} to any volume"),
        Target::Volume(volume) => format!("move {disk} to volume {volume}"),
        Target::Class(class) => format!("move {disk} to volumes of class {class}"),
    }
}

/// The disk that is meant, in its one spelling.
fn disk_of(path: &str) -> Result<String, Problem> {
    match DiskPath::with_snapshot(path).map_err(failed)? {
        (disk, None) => Ok(disk.to_string()),
        (disk, Some(_)) => {
            let text = format!("{path} names a snapshot, and a disk is moved with all of them");
            let problem = Problem::new(ProblemKind::Invalid, text).about(path);
            Err(problem.remedy(format!("move {disk}")))
        }
    }
}

/// The files of a disk: its first layer and those that came with snapshots.
async fn layers(files: &FileSystem, disk: &str) -> Result<Vec<(FileId, String)>, Problem> {
    let (folder, _) = disk.rsplit_once('/').unwrap_or_default();
    let entries = files.list(if folder.is_empty() { "/" } else { folder });
    let entries = entries.await.map_err(|error| of_files(&error))?.into_iter();
    let files = entries.filter(|entry| entry.kind == Kind::File);
    Ok(files
        .map(|entry| (entry.id, format!("{folder}/{}", entry.name)))
        .filter(|(_, path)| is_layer_of(disk, path))
        .collect())
}

/// Says of all layers where their data shall be. Nothing is changed if there is no such disk or no such place.
async fn retarget(storage: &Storage, disk: &str, to: &Target) -> Result<(), Problem> {
    // What is no disk is told as of all disks.
    Box::pin(storage.disks()?.status(disk)).await.map_err(failed)?;
    let files = storage.files()?;
    let changes = AttributeChanges {
        target: Some(to.clone()),
        ..AttributeChanges::default()
    };
    for (_, path) in layers(files, disk).await? {
        match files::set_attributes(files, &path, &changes).await {
            // Layers that nobody needs go by themselves.
            Err(problem) if problem.kind == ProblemKind::NotFound && path != disk => {}
            other => other?,
        }
    }
    Ok(())
}

async fn move_layers<T>(files: &FileSystem, disk: &str, reporter: &Reporter<T>) -> Result<Moved, Problem> {
    let layers = layers(files, disk).await?;
    if layers.is_empty() {
        let path = disk.to_owned();
        return Err(of_files(&FsError::NotFound { path }));
    }
    Box::pin(move_files(files, "move", layers, Relocation::ToTarget, reporter)).await
}

/// Begins to move a disk for `owner`; the job that does it.
pub(crate) async fn begin(
    open: &Rc<Open>,
    owner: &str,
    path: &str,
    to: &Target,
) -> Result<JobStatus, Problem> {
    let disk = disk_of(path)?;
    open.owners.has_room()?;
    see_that_nobody_moves(open, &disk)?;
    retarget(&open.storage, &disk, to).await?;
    // Somebody else may have begun meanwhile.
    see_that_nobody_moves(open, &disk)?;
    let doing = open.works.begin(KIND, what(&disk, to));
    let status = doing.status();
    open.owners.note(owner, &status, Some(disk.clone()));
    open.owners.save().await;
    let reporter = Reporter::until(&open.stopping).listed(Some(doing));
    run(open, reporter, status.id, disk);
    Ok(status)
}

fn see_that_nobody_moves(open: &Open, disk: &str) -> Result<(), Problem> {
    match open.owners.that_moves(disk) {
        None => Ok(()),
        Some(job) => {
            let text = format!("{disk} is being moved already, by job {job}");
            Err(Problem::new(ProblemKind::Conflict, text)
                .about(disk)
                .remedy("wait for that job, or cancel it"))
        }
    }
}

/// Goes on with what another process has begun.
pub(crate) fn go_on(open: &Rc<Open>, status: &JobStatus, disk: String) {
    let doing = open.works.go_on(status);
    let reporter = Reporter::until(&open.stopping).listed(Some(doing));
    run(open, reporter, status.id, disk);
}

/// Moves it in the background.
fn run(open: &Rc<Open>, reporter: Reporter<FileOutcome>, job: u32, disk: String) {
    let open = Rc::clone(open);
    let spawned = spawn_local(async move {
        let moved = match open.storage.files() {
            Ok(files) => move_layers(files, &disk, &reporter).await,
            Err(problem) => Err(problem),
        };
        if let Ok(moved) = &moved {
            reporter.moved(*moved);
        }
        if let Err(problem) = &moved {
            tracing::warn!(disk, job, %problem, "a disk could not be moved");
        }
        // The end of the process is not that of the job.
        let goes_on = reporter.stopped() && !reporter.cancelled();
        reporter.ended(&moved);
        if let (false, Ok(status)) = (goes_on, open.works.status(job)) {
            open.owners.ended(&status).await;
        }
    });
    // This is a worker.
    drop(spawned);
}

/// Moves a disk of a pool that is open for this alone; the job as it would have been.
pub(crate) async fn at_once(
    storage: &Storage,
    path: &str,
    to: &Target,
    reporter: &Reporter<DiskOutcome>,
) -> Result<JobStatus, Problem> {
    let disk = disk_of(path)?;
    retarget(storage, &disk, to).await?;
    let doing = crate::works::Works::default().begin(KIND, what(&disk, to));
    let moved = move_layers(storage.files()?, &disk, reporter).await?;
    doing.moved(moved);
    let mut status = doing.status();
    status.state = match reporter.stopped() {
        true => api::storage::JobState::Cancelled,
        false => api::storage::JobState::Done,
    };
    Ok(status)
}
