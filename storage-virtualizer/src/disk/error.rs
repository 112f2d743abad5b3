//! Why something could not be done with a disk.

use block_io::IoError;
use filesys::FsError;

/// Why something could not be done with a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A name that cannot be one.
    #[error("{name}: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There is no such disk.
    #[error("there is no disk {disk}")]
    NoDisk {
        /// The disk's path.
        disk: String,
    },
    /// Its deletion was interrupted.
    #[error("{disk} is being deleted: delete it again, which ends that")]
    Deleted {
        /// The disk's path.
        disk: String,
    },
    /// There is no such snapshot.
    #[error("{disk} has no snapshot {snapshot}")]
    NoSnapshot {
        /// The disk's path.
        disk: String,
        /// The name.
        snapshot: String,
    },
    /// The disk has a snapshot of this name.
    #[error("{disk} has a snapshot {snapshot} already")]
    SnapshotExists {
        /// The disk's path.
        disk: String,
        /// The name.
        snapshot: String,
    },
    /// The disk, or a snapshot of it, is in use in a way that excludes this.
    #[error("{object} is in use: {problem}")]
    InUse {
        /// The disk's path.
        object: String,
        /// How.
        problem: &'static str,
    },
    /// There are writes of which nobody has decided whether they stay.
    #[error("{disk} has writes in a redo layer: commit them or discard them first")]
    Undecided {
        /// The disk's path.
        disk: String,
    },
    /// There is nothing to decide.
    #[error("{disk} has no redo layer: there is nothing to commit or to discard")]
    Decided {
        /// The disk's path.
        disk: String,
    },
    /// It cannot be done in the present state.
    #[error("{disk}: {problem}")]
    State {
        /// The disk's path.
        disk: String,
        /// Why, and what to do.
        problem: String,
    },
    /// The new size is smaller.
    #[error("{disk} has {present} bytes; with {wanted} it would lose what lies behind them")]
    Shrinks {
        /// The disk's path.
        disk: String,
        /// Its size.
        present: u64,
        /// The size that is wanted.
        wanted: u64,
    },
    /// The descriptor is damaged, or of another disk.
    #[error("{path} does not describe {disk}: {problem}")]
    Descriptor {
        /// The descriptor's path.
        path: String,
        /// The disk's path.
        disk: String,
        /// What is wrong.
        problem: String,
    },
    /// The file system refused or failed.
    #[error(transparent)]
    Files(#[from] FsError),
    /// A request failed.
    #[error(transparent)]
    Io(#[from] IoError),
}
