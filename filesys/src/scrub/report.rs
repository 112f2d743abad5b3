//! What a scrub is asked for, and what it tells.

use std::time::Duration;

use crate::units::FileId;

/// How a scrub is made.
#[derive(Debug, Clone, Copy)]
pub struct ScrubOptions {
    /// Where it goes on; the default is the beginning.
    pub from: ScrubPosition,
    /// Data of files with checksums whose checksums are not known, because a crash was shortly after they were written, get them anew.
    pub fill: bool,
    /// All copies are verified, not only the one that is read first.
    pub copies: bool,
    /// Findings that are listed; all are counted.
    pub most_findings: usize,
}

impl Default for ScrubOptions {
    fn default() -> Self {
        Self {
            from: ScrubPosition::default(),
            fill: true,
            copies: true,
            most_findings: 1000,
        }
    }
}

/// What is verified one after the other. What is stored comes first: only when all of it is right does parity that does not fit tell that
/// parity is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum ScrubPhase {
    /// Metadata as they are stored.
    #[default]
    Metadata,
    /// Data as they are stored.
    Data,
    /// Other copies of metadata.
    MetadataCopies,
    /// Other copies of data.
    DataCopies,
    /// All is done.
    Done,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ScrubPosition {
    /// What is being verified.
    pub phase: ScrubPhase,
    /// The file, or the object of metadata.
    pub object: u64,
    /// The byte in the file, or the page of the object.
    pub offset: u64,
}

/// Something that could not be repaired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScrubFinding {
    /// No copy of these data has their checksum.
    Data {
        /// The file.
        file: FileId,
        /// Its name.
        name: String,
        /// Byte offset of 4 KiB in it.
        offset: u64,
    },
    /// Data cannot be read.
    Unreadable {
        /// The file.
        file: FileId,
        /// Byte offset in it.
        offset: u64,
        /// Why.
        problem: String,
    },
    /// No copy of a block of metadata is what was written.
    Metadata {
        /// Its number on the metadata volume.
        block: u64,
        /// What it belongs to.
        what: String,
    },
}

/// What a scrub has done so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScrubReport {
    /// Where to go on.
    pub position: ScrubPosition,
    /// Bytes of data that were verified, each copy counted.
    pub data: u64,
    /// Blocks of metadata that were verified, each copy counted.
    pub blocks: u64,
    /// Sub-clusters of data that were repaired.
    pub repaired: u64,
    /// Blocks of metadata that were repaired.
    pub blocks_repaired: u64,
    /// Sub-clusters whose checksum was not known, and is now.
    pub filled: u64,
    /// Bytes of other copies that could not be read, so it is not known whether they are right: a device is missing, or could not read
    /// them and had them written anew.
    pub unread: u64,
    /// Sub-clusters and blocks that could not be repaired.
    pub lost: u64,
    /// What these are; the first of them.
    pub findings: Vec<ScrubFinding>,
}

impl ScrubReport {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.repaired + self.blocks_repaired + self.lost == 0
    }
}

/// What a scrub shall do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Go on.
    Go,
    /// Wait first.
    Wait(Duration),
    /// End here; [`ScrubReport::position`] tells where to go on later.
    Stop,
}
