//! What can be asked of a pool that is in use: by the management socket of who has it open.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{FileOperation, FileOutcome};
use crate::storage::{Operation, Outcome, PoolLoad, PoolStatus};
use crate::virtual_disk::{DiskOperation, DiskOutcome};

/// The longest window of a [`StorageRequest::Load`].
pub const MAX_LOAD_WINDOW_MS: u32 = 60_000;

/// A request; the body of `POST /v1/storage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "to", content = "request")]
pub enum StorageRequest {
    /// How the pool is.
    Status,
    /// What its devices and volumes have to do.
    Load {
        /// For so many milliseconds from now, at most [`MAX_LOAD_WINDOW_MS`]; 0 for all the time since the pool was opened, at once.
        window_ms: u32,
    },
    /// Something to be done with devices, volumes, jobs.
    Pool(Operation),
    /// As [`Self::Pool`], but the answer does not wait for the jobs that are begun by it.
    Begin(Operation),
    /// Something to be done with files.
    File(FileOperation),
    /// Something to be done with virtual disks.
    Disk(DiskOperation),
}

/// The answer to a [`StorageRequest`] of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "from", content = "answer")]
pub enum StorageAnswer {
    /// How the pool is.
    Status(Box<PoolStatus>),
    /// What its devices and volumes had to do.
    Load(Box<PoolLoad>),
    /// What came of an operation.
    Pool(Box<Outcome>),
    /// What came of an operation on files.
    File(Box<FileOutcome>),
    /// What came of an operation on disks.
    Disk(Box<DiskOutcome>),
}
