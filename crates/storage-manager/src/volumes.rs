//! Volumes of a pool that join its file system, grow in it, and leave it.
//!
//! A volume is in the file system before anything can be on it, and out of it before it is deleted: after a crash between the two, it
//! is a volume of the pool that the file system does not use, and the command can be given again.

use api::file::META_VOLUME;
use api::storage::Operation;
use api::{Problem, ProblemKind};
use block_io::BlockDevice;
use filesys::VolumeStat;

use crate::problem::of_files;
use crate::storage::Storage;

/// Sees that the file system allows an operation on the pool, and has it prepare itself.
pub(crate) async fn before(storage: &mut Storage, operation: &Operation) -> Result<(), Problem> {
    match operation {
        Operation::CreateVolume { name, raw, .. } => {
            if name == META_VOLUME {
                return Err(reserved("is made by `smsvmm file format`, and by nothing else"));
            }
            match raw {
                true => Ok(()),
                false => storage.open_files().await.map_err(|problem| {
                    let remedy = "or use --raw, which makes a volume that the file system does not use";
                    problem.remedy(remedy)
                }),
            }
        }
        Operation::ResizeVolume { name, size, .. } => resize(storage, name, *size).await,
        Operation::DeleteVolume { name } => delete(storage, name).await,
        Operation::SetLayout { .. } => storage.open_files().await,
        _ => {
            // With the files open, the pool knows what of its volumes is in use. It gets on without.
            if let Err(problem) = storage.open_files().await {
                tracing::warn!("the file system is not open meanwhile: {problem}");
            }
            Ok(())
        }
    }
}

/// Tells the file system what was done.
pub(crate) async fn after(storage: &mut Storage, operation: &Operation) -> Result<(), Problem> {
    match operation {
        Operation::DeleteVolume { .. } => storage.open_files().await,
        Operation::ResizeVolume { name, .. } if name == META_VOLUME && storage.files().is_ok() => {
            // It takes notice when it is opened.
            storage.end_files().await?;
            storage.open_files().await
        }
        _ => tell(storage, operation).await,
    }
}

/// Refuses what cannot be done while files are in use, and has the file system prepare itself for the rest.
pub(crate) async fn before_in_use(storage: &Storage, operation: &Operation) -> Result<(), Problem> {
    let in_use = |text: String, name: &str| {
        let problem = Problem::new(ProblemKind::Conflict, text).about(name);
        Err(problem.remedy("end who serves them first"))
    };
    match operation {
        Operation::DeleteVolume { name } if name == META_VOLUME => Err(reserved(
            "holds the metadata of all files, and the pool serves disks",
        )),
        Operation::DeleteVolume { name } => match known(storage, name)? {
            Some(known) => {
                see_that_no_job_changes(storage, name)?;
                leave(storage, name, &known).await
            }
            None => Ok(()),
        },
        Operation::CreateVolume { name, .. } if name == META_VOLUME => {
            Err(reserved("is made by `smsvmm file format`, and by nothing else"))
        }
        Operation::ResizeVolume { name, .. } if name == META_VOLUME => in_use(
            format!("volume {name} cannot be resized while the pool serves disks"),
            name,
        ),
        Operation::ResizeVolume { name, size, .. } => may_resize(storage, name, *size),
        _ => Ok(()),
    }
}

/// Tells an open file system what was done, where it stays open.
pub(crate) async fn tell(storage: &Storage, operation: &Operation) -> Result<(), Problem> {
    if storage.files().is_err() {
        return Ok(());
    }
    match operation {
        Operation::CreateVolume { name, raw: false, .. } => {
            let volume = storage.given(name)?;
            let uuid = volume.uuid;
            storage.cover(&volume);
            let added = storage.files()?.add_volume(volume).await;
            if let Err(error) = added {
                storage.uncover(uuid);
                // Nothing is on it. If it stays, nobody uses it.
                let _ = storage.pool.delete_volume(name).await;
                return Err(of_files(&error));
            }
            storage.tell_usage(true)
        }
        Operation::ResizeVolume { .. } | Operation::SetLayout { .. } => refresh(storage).await,
        _ => Ok(()),
    }
}

/// Has the file system take notice of what volumes are like now.
pub(crate) async fn refresh(storage: &Storage) -> Result<(), Problem> {
    let files = storage.files()?;
    let known = files.volumes();
    for volume in storage.data_volumes()? {
        let Some(known) = known.iter().find(|known| known.uuid == volume.uuid) else {
            continue;
        };
        let size = volume.device.size() / filesys::CLUSTER * filesys::CLUSTER;
        if known.size < size || known.name != volume.name || known.class != volume.class {
            let told = files
                .update_volume(volume.uuid, &volume.name, &volume.class)
                .await;
            told.map_err(|error| of_files(&error))?;
        }
    }
    Ok(())
}

fn reserved(what: &str) -> Problem {
    Problem::new(ProblemKind::Conflict, format!("volume {META_VOLUME} {what}")).about(META_VOLUME)
}

/// What the file system knows of a volume, if it uses it.
fn known(storage: &Storage, name: &str) -> Result<Option<VolumeStat>, Problem> {
    let Ok(files) = storage.files() else {
        return Ok(None);
    };
    let config = storage.pool.configuration();
    let Some(volume) = config.volumes.iter().find(|volume| volume.name == name) else {
        return Ok(None);
    };
    let uuid = volume.uuid.0.to_be_bytes();
    Ok(files.volumes().into_iter().find(|known| known.uuid == uuid))
}

async fn resize(storage: &mut Storage, name: &str, size: u64) -> Result<(), Problem> {
    storage.open_files().await?;
    if name == META_VOLUME && storage.files().is_ok() {
        return match size >= storage.meta_volume()?.size() {
            true => Ok(()),
            false => Err(reserved("cannot become smaller")),
        };
    }
    may_resize(storage, name, size)
}

/// The file system does not give up space of a volume.
fn may_resize(storage: &Storage, name: &str, size: u64) -> Result<(), Problem> {
    let Some(known) = known(storage, name)? else {
        return Ok(());
    };
    if size >= known.size {
        return Ok(());
    }
    let detail = format!("volume {name} is used by the file system, which cannot make it smaller");
    Err(Problem::new(ProblemKind::Conflict, detail)
        .about(name)
        .remedy(format!(
            "make another volume, move the files with `smsvmm file drain {name}`, then delete this one"
        )))
}

async fn delete(storage: &mut Storage, name: &str) -> Result<(), Problem> {
    if name == META_VOLUME {
        return match storage.has_meta_volume() {
            true => Err(reserved("holds the metadata of all files").remedy(
                "without it they are lost; `smsvmm file format --force` makes a new, empty file system",
            )),
            false => Ok(()),
        };
    }
    storage.open_files().await?;
    if let Some(known) = known(storage, name)? {
        leave(storage, name, &known).await?;
    }
    // Whoever has a volume open keeps it from being deleted; the file system has all of them.
    storage.end_files().await
}

/// Else it would have left the file system when it turns out that it cannot be deleted.
fn see_that_no_job_changes(storage: &Storage, name: &str) -> Result<(), Problem> {
    let config = storage.pool.configuration();
    let Some(volume) = config.volumes.iter().find(|volume| volume.name == name) else {
        return Ok(());
    };
    let mut live = config.jobs.iter().filter(|job| job.is_live());
    match live.find(|job| job.kind.concerns(volume.id)) {
        Some(job) => Err(Problem::new(
            ProblemKind::Conflict,
            format!("job {} works on volume {name}", job.id.0),
        )
        .about(name)
        .remedy(format!(
            "wait for it, or end it: `smsvmm job cancel {}`",
            job.id.0
        ))),
        None => Ok(()),
    }
}

/// A volume leaves the file system.
async fn leave(storage: &Storage, name: &str, known: &VolumeStat) -> Result<(), Problem> {
    let used = known.size.saturating_sub(known.free);
    if used > 0 {
        let used = api::ByteSize::from_bytes(used);
        let detail = format!("volume {name} cannot be deleted: files have {used} on it");
        return Err(Problem::new(ProblemKind::Conflict, detail)
            .about(name)
            .remedy(format!(
                "`smsvmm file drain {name}` moves them to other volumes, `smsvmm file relocate` single ones"
            )));
    }
    let removed = storage.files()?.remove_volume(known.uuid).await;
    removed.map_err(|error| of_files(&error))?;
    storage.uncover(known.uuid);
    // What tells the pool what is in use of a volume has the volume.
    if let Ok(volume) = storage.pool.volume(name) {
        volume.set_usage(None);
    }
    Ok(())
}
