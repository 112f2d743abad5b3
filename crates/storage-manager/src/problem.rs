//! Errors of the volume manager as problems: what, about which object, and what to do.

use std::error::Error;

use api::{Problem, ProblemKind};
use block_io::{IoCause, IoError};
use filesys::FsError;
use storage_virtualizer::disk::DiskError;
use volume_manager::PoolError;
use volume_manager::place::PlaceError;
use volume_manager::store::OpenError;

/// An error with all its causes, each said once.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = cause.source();
    }
    text
}

pub(crate) fn of_io(error: &IoError) -> Problem {
    Problem::new(ProblemKind::Host, chain(error))
        .about(error.device())
        .remedy("check the device; the kernel's log may say more")
}

/// A problem of an operation on `object`.
pub(crate) fn of_pool(object: &str, error: PoolError) -> Problem {
    let kind = match &error {
        PoolError::Open(_) => return of_open(error),
        PoolError::Io(error) => return of_io(error),
        PoolError::Name(_) | PoolError::State(_) => ProblemKind::Conflict,
        PoolError::Format(_) => ProblemKind::Invalid,
        PoolError::Unknown(_) => ProblemKind::NotFound,
        PoolError::Place(PlaceError::Shortage(_)) => ProblemKind::Exhausted,
        PoolError::Place(PlaceError::Invalid(_)) => ProblemKind::Invalid,
        PoolError::Place(_) => ProblemKind::NotFound,
        PoolError::Commit(_) | PoolError::Refused(_) | PoolError::Log(_) => ProblemKind::Host,
    };
    let remedy = match &error {
        PoolError::Unknown(what) if what.starts_with("volume") => Some("`smsvmm volume list` shows them"),
        PoolError::Unknown(what) if what.starts_with("job") => Some("`smsvmm job list` shows them"),
        PoolError::Unknown(_) => Some("`smsvmm device list` shows them"),
        PoolError::Place(PlaceError::Shortage(_)) => {
            Some("add devices, choose another size or layout, or see `smsvmm pool status`")
        }
        PoolError::Commit(_) | PoolError::Refused(_) | PoolError::Log(_) => {
            Some("check the devices, then open the pool again")
        }
        _ => None,
    };
    let problem = Problem::new(kind, chain(&error)).about(object);
    match remedy {
        Some(remedy) => problem.remedy(remedy),
        None => problem,
    }
}

fn of_open(error: PoolError) -> Problem {
    let (kind, remedy) = match &error {
        PoolError::Open(OpenError::NoMajority { .. }) => (
            ProblemKind::Conflict,
            Some("the force is `smsvmm pool import DEVICE... --force`"),
        ),
        PoolError::Open(OpenError::SplitBrain(_)) => (
            ProblemKind::Conflict,
            Some(
                "the force is `smsvmm pool import DEVICE... --prefer DEVICE`, with a device of the history to keep",
            ),
        ),
        PoolError::Open(OpenError::NoPool) => (ProblemKind::NotFound, Some("`smsvmm pool create` makes one")),
        PoolError::Open(OpenError::SeveralPools(_) | OpenError::Duplicate { .. }) => {
            (ProblemKind::Invalid, None)
        }
        _ => (ProblemKind::Host, None),
    };
    let problem = Problem::new(kind, chain(&error));
    match remedy {
        Some(remedy) => problem.remedy(remedy),
        None => problem,
    }
}

/// A problem of the file system.
pub(crate) fn of_files(error: &FsError) -> Problem {
    let (kind, object, remedy) = match error {
        FsError::NotFound { path } => (
            ProblemKind::NotFound,
            Some(path),
            Some("`smsvmm file list -r /` shows what there is"),
        ),
        FsError::Exists { path } => (
            ProblemKind::Conflict,
            Some(path),
            Some("take another name, or move or delete it first"),
        ),
        FsError::NotDirectory { path } | FsError::IsDirectory { path } | FsError::Path { path, .. } => {
            (ProblemKind::Invalid, Some(path), None)
        }
        FsError::NotEmpty { path } => (
            ProblemKind::Conflict,
            Some(path),
            Some("or use --recursive, which deletes all of it"),
        ),
        FsError::Frozen { file } => (
            ProblemKind::Conflict,
            Some(file),
            Some(
                "write to a layer of it (`smsvmm file clone FROZEN PATH`), or see `smsvmm file stat` for who depends on it",
            ),
        ),
        FsError::Busy { object, .. } | FsError::State { object, .. } => {
            (ProblemKind::Conflict, Some(object), None)
        }
        FsError::NoSpace { what, .. } => (
            ProblemKind::Exhausted,
            Some(what),
            Some("`smsvmm volume list` shows what is free"),
        ),
        FsError::ReadOnly => (ProblemKind::Conflict, None, None),
        FsError::Io(error) => return of_file_io(error),
        _ => (ProblemKind::Host, None, None),
    };
    let mut problem = Problem::new(kind, chain(error));
    if let Some(object) = object {
        problem = problem.about(object);
    }
    match remedy {
        Some(remedy) => problem.remedy(remedy),
        None => problem,
    }
}

/// A problem of a virtual disk.
pub(crate) fn of_disks(error: &DiskError) -> Problem {
    let (kind, object, remedy) = match error {
        DiskError::Files(FsError::NotFound { path }) => (ProblemKind::NotFound, path.clone(), String::new()),
        DiskError::Files(error) => return of_files(error),
        DiskError::Io(error) => return of_file_io(error),
        DiskError::Name { name, .. } => (ProblemKind::Invalid, name.clone(), String::new()),
        DiskError::NoDisk { disk } => (
            ProblemKind::NotFound,
            disk.clone(),
            "`smsvmm disk list` shows what there is".to_owned(),
        ),
        DiskError::NoSnapshot { disk, .. } => (
            ProblemKind::NotFound,
            disk.clone(),
            format!("`smsvmm disk status {disk}` shows them"),
        ),
        DiskError::SnapshotExists { disk, snapshot } => (
            ProblemKind::Conflict,
            disk.clone(),
            format!("take another name, or delete it with `smsvmm disk delete {disk}@{snapshot}`"),
        ),
        DiskError::Undecided { disk } => (
            ProblemKind::Conflict,
            disk.clone(),
            format!("`smsvmm disk commit {disk}` keeps them, `smsvmm disk discard {disk}` throws them away"),
        ),
        DiskError::Shrinks { disk, .. } => (
            ProblemKind::Conflict,
            disk.clone(),
            "make what is in it smaller first, then use --force".to_owned(),
        ),
        DiskError::Descriptor { path, .. } => (ProblemKind::Host, path.clone(), String::new()),
        DiskError::InUse { object, .. } => (ProblemKind::Conflict, object.clone(), String::new()),
        DiskError::Deleted { disk } | DiskError::Decided { disk } | DiskError::State { disk, .. } => {
            (ProblemKind::Conflict, disk.clone(), String::new())
        }
        _ => return Problem::new(ProblemKind::Host, chain(error)),
    };
    let problem = Problem::new(kind, chain(error)).about(object);
    match remedy.is_empty() {
        true => problem,
        false => problem.remedy(remedy),
    }
}

/// A request to a file, or to a volume under it, that failed. The reason may be the file system's.
pub(crate) fn of_file_io(error: &IoError) -> Problem {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(reason) = cause {
        // An error within an error of the operating system's kind is not among the causes.
        let inner = match reason.downcast_ref::<IoCause>() {
            Some(IoCause::Os(error)) => error.get_ref(),
            _ => None,
        };
        if let Some(reason) = inner.and_then(|inner| inner.downcast_ref::<FsError>()) {
            let mut problem = of_files(reason);
            problem.detail = format!("{}: {}", error.device(), problem.detail);
            return problem;
        }
        cause = reason.source();
    }
    of_io(error)
}
