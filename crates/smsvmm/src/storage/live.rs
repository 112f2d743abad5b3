//! The pool of a machine that runs: asked through the machine's management socket.

use api::{StorageAnswer, StorageRequest};
use management::{Client, ClientError};

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
    let Some(socket) = select::socket(which)? else {
        return Ok(None);
    };
    match Client::new(&socket)?.storage(&request()) {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Connect { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The answer is not one to what was asked.
pub(crate) fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("the machine answered something else than it was asked; is it of this version?")
}
