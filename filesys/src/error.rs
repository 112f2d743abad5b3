//! Why something could not be done with the file system.

use std::io;
use std::sync::Arc;

use block_io::{IoError, Operation};

use crate::state::{Damage, Stop};
use crate::units::FileId;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// There is nothing of this name.
    #[error("{path}: no such file or directory")]
    NotFound {
        /// The path.
        path: String,
    },
    /// The name is taken.
    #[error("{path} exists already")]
    Exists {
        /// The path.
        path: String,
    },
    /// A file where a directory is needed.
    #[error("{path} is not a directory")]
    NotDirectory {
        /// The path.
        path: String,
    },
    /// A directory where a file is needed.
    #[error("{path} is a directory")]
    IsDirectory {
        /// The path.
        path: String,
    },
    /// A directory that is to be deleted has entries.
    #[error("{path} is not empty: delete or move what is in it first")]
    NotEmpty {
        /// The path.
        path: String,
    },
    /// A name that cannot be one.
    #[error("{path}: {problem}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file is in use in a way that excludes this.
    #[error("{object} is in use: {problem}")]
    Busy {
        /// What is in use.
        object: String,
        /// How, and what to do.
        problem: String,
    },
    /// The file takes no writes.
    #[error("{file} is frozen: other files depend on its content, or it was frozen by request")]
    Frozen {
        /// Its name or number.
        file: String,
    },
    /// It cannot be done in the present state; the text says what to do.
    #[error("{object}: {problem}")]
    State {
        /// What it is about.
        object: String,
        /// Why, and what to do.
        problem: String,
    },
    /// There is no space.
    #[error("no space left on {what}: {remedy}")]
    NoSpace {
        /// A volume, a storage class, all volumes, or the metadata volume.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The file system was opened read-only.
    #[error("the file system is open read-only")]
    ReadOnly,
    /// Something that must not fail has failed before: nothing is changed any more.
    #[error(
        "the file system takes no changes since an earlier failure ({reason}): check the devices, then open it again"
    )]
    Failed {
        /// What has failed.
        reason: String,
    },
    /// Metadata are damaged.
    #[error("the file system is damaged: {0}; run `smsvmm file check`")]
    Damaged(#[from] Damage),
    /// Data are not what was written.
    #[error("{file}: data at offset {offset} are not what was written: their checksum differs")]
    Checksum {
        /// Which file.
        file: FileId,
        /// Byte offset in it.
        offset: u64,
    },
    /// What is on the volumes is no file system, or one that this version cannot open.
    #[error("{0}")]
    Open(String),
    /// A volume failed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl FsError {
    /// As an error of a disk request.
    pub(crate) fn into_io(
        self,
        device: &Arc<str>,
        operation: Operation,
        offset: u64,
        length: u64,
    ) -> IoError {
        let kind = match self {
            Self::Io(error) => return error,
            Self::NoSpace { .. } => io::ErrorKind::StorageFull,
            Self::Frozen { .. } | Self::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            Self::Checksum { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        IoError::new(device, operation, offset, length, io::Error::new(kind, self))
    }
}

/// Why a plan could not be made.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// A page is missing, or there is damage.
    Stop(Stop),
    /// It is not allowed.
    Error(FsError),
}

impl<T: Into<Stop>> From<T> for Refusal {
    fn from(stop: T) -> Self {
        Self::Stop(stop.into())
    }
}

impl From<FsError> for Refusal {
    fn from(error: FsError) -> Self {
        Self::Error(error)
    }
}
