//! What can go wrong.

use std::sync::Arc;

use block_io::IoError;

/// Why the journal takes nothing, or did not make a group durable.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum JournalError {
    #[error(
        "group {group} cannot be written to the journal, so nothing more is: open the file system again when the metadata volume works"
    )]
    Write {
        group: u64,
        #[source]
        source: Arc<IoError>,
    },
    #[error(
        "what group {group} of the journal relies on cannot be made durable, so nothing more is written: open the file system again when its volumes work"
    )]
    Prepare {
        group: u64,
        #[source]
        source: Arc<IoError>,
    },
    #[error(
        "{bytes} bytes do not fit into a group of the journal, which takes {most}: make the operation smaller"
    )]
    TooLarge { bytes: usize, most: usize },
    #[error("the journal has no room for {bytes} bytes: they were appended without a ticket")]
    Full { bytes: usize },
    #[error("the journal was stopped: the file system is being closed")]
    Stopped,
    #[error("the journal has reached its last group number")]
    Exhausted,
}

/// Why the journal cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError<E> {
    #[error("the journal cannot be read")]
    Device(#[source] Arc<IoError>),
    #[error(
        "group {group} of the journal, at block {block} of the metadata volume, is damaged: later groups are there, so it had been durable; restore the volume's redundancy or a backup"
    )]
    Damaged { group: u64, block: u64 },
    #[error(
        "block {block} of the metadata volume holds a journal block of incarnation {incarnation}, but the superblock knows only {limit}: the superblock is too old; restore the volume's redundancy or a backup"
    )]
    Newer {
        block: u64,
        incarnation: u64,
        limit: u64,
    },
    #[error("the superblock's journal position or region is impossible")]
    Impossible,
    #[error("group {group} of the journal cannot be applied")]
    Apply {
        group: u64,
        #[source]
        source: E,
    },
}
