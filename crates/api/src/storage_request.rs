//! What can be asked of a pool that is in use: by the management socket of who has it open.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{FileAnswer, FileOperation, FileOutcome};
use crate::storage::{Operation, Outcome, PoolLoad, PoolStatus};
use crate::virtual_disk::{DiskAnswer, DiskOperation, DiskOutcome};

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

impl StorageRequest {
    /// Whether it changes nothing, so that it may be asked as often as one likes.
    pub fn only_reads(&self) -> bool {
        match self {
            Self::Status | Self::Load { .. } => true,
            Self::Pool(operation) | Self::Begin(operation) => matches!(operation, Operation::WaitJob { .. }),
            Self::File(operation) => operation.only_reads(),
            Self::Disk(operation) => operation.only_reads(),
        }
    }
}

/// Most entries of a page of a list.
pub const MAX_PAGE: u32 = 1000;

/// Whether a page is full, so that there may be another.
pub(crate) fn is_full(count: usize, limit: Option<u32>) -> bool {
    limit.is_some_and(|limit| count >= limit as usize)
}

impl StorageRequest {
    /// The part of a list that this asks for.
    fn part(&mut self) -> Option<(&mut Option<u32>, &mut Option<String>)> {
        match self {
            Self::File(FileOperation::List { limit, after, .. })
            | Self::Disk(
                DiskOperation::List { limit, after, .. } | DiskOperation::ListSnapshots { limit, after, .. },
            ) => Some((limit, after)),
            _ => None,
        }
    }

    /// Asks for pages of `page` entries, if it asks for a whole list, and says whether it does.
    pub fn begin_pages(&mut self, page: u32) -> bool {
        match self.part() {
            Some((limit @ None, _)) => {
                *limit = Some(page);
                true
            }
            _ => false,
        }
    }

    /// Asks for the page after an entry.
    pub fn go_on_after(&mut self, entry: String) {
        if let Some((_, after)) = self.part() {
            *after = Some(entry);
        }
    }
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

impl StorageAnswer {
    /// Where a list goes on; afterwards it does not say so any more.
    pub fn take_next(&mut self) -> Option<String> {
        match self {
            Self::File(outcome) => outcome.next.take(),
            Self::Disk(outcome) => outcome.next.take(),
            _ => None,
        }
    }

    /// Puts the next page of a list behind this one.
    pub fn append(&mut self, page: Self) {
        match (self, page) {
            (Self::File(whole), Self::File(page)) => {
                if let (FileAnswer::Entries(all), FileAnswer::Entries(more)) =
                    (&mut whole.answer, page.answer)
                {
                    all.extend(more);
                }
                whole.events.extend(page.events);
                whole.next = page.next;
            }
            (Self::Disk(whole), Self::Disk(page)) => {
                match (&mut whole.answer, page.answer) {
                    (DiskAnswer::Disks(all), DiskAnswer::Disks(more)) => all.extend(more),
                    (DiskAnswer::Snapshots(all), DiskAnswer::Snapshots(more)) => all.extend(more),
                    _ => {}
                }
                whole.events.extend(page.events);
                whole.next = page.next;
            }
            _ => {}
        }
    }
}
