//! What can be asked of a pool that is in use: by the management socket of who has it open.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{FileOperation, FileOutcome};
use crate::storage::{Operation, Outcome, PoolStatus};
use crate::virtual_disk::{DiskOperation, DiskOutcome};

/// A request; the body of `POST /v1/storage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "to", content = "request")]
pub enum StorageRequest {
    /// How the pool is.
    Status,
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
    /// What came of an operation.
    Pool(Box<Outcome>),
    /// What came of an operation on files.
    File(Box<FileOutcome>),
    /// What came of an operation on disks.
    Disk(Box<DiskOutcome>),
}
