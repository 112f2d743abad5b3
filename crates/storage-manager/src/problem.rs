//! Errors of the volume manager as problems: what, about which object, and what to do.

use std::error::Error;

use api::{Problem, ProblemKind};
use block_io::IoError;
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
