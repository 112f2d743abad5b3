//! The pool of a machine that runs: asked through the machine's management socket.

use std::os::unix::net::UnixStream;

use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use management::{Client, ClientError, Target};
use storage_manager::{Line, PoolAt};

use super::arguments::Which;
use super::select;

/// Asks the machine that has the pool open. None if there is none: then the pool may be opened here.
///
/// # Errors
/// The configuration cannot be read; the machine refuses, or fails.
pub(crate) fn ask(
    which: &Which,
    request: impl FnOnce() -> StorageRequest,
) -> anyhow::Result<Option<StorageAnswer>> {
    let Some(target) = select::target(which)? else {
        return Ok(None);
    };
    match Client::new(target)?.storage(&request()) {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Connect { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the pool is: a machine that has it open is asked to move data.
///
/// # Errors
/// The configuration cannot be read.
pub(crate) fn pool(which: &Which) -> anyhow::Result<PoolAt> {
    let answers = |target: &Target| match target {
        Target::Socket(socket) | Target::Manager(socket, _) => UnixStream::connect(socket).is_ok(),
        // Its devices are not here.
        Target::Remote(_) => true,
    };
    let Some(target) = select::target(which)?.filter(answers) else {
        return Ok(PoolAt::Devices(select::devices(which)?));
    };
    let client = Client::new(target)?;
    Ok(PoolAt::Machine(Box::new(move |request| {
        match client.transfer(request) {
            Ok((early, stream)) => Ok(Line { early, stream }),
            Err(ClientError::Problem(problem)) => Err(*problem),
            Err(error) => Err(Problem::new(
                ProblemKind::Host,
                format!("{:#}", anyhow::Error::new(error)),
            )),
        }
    })))
}

/// The answer is not one to what was asked.
pub(crate) fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("the machine answered something else than it was asked; is it of this version?")
}
