//! What the file system tells its owner.

use crate::units::{FileId, VolumeIndex};

/// Something that an administrator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A volume has less than 6 % free.
    LowSpace {
        /// Which volume.
        volume: VolumeIndex,
        /// Its name.
        name: String,
        /// Bytes that are free.
        free: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// A volume has 6 % free again.
    SpaceAgain {
        /// Which volume.
        volume: VolumeIndex,
        /// Its name.
        name: String,
    },
    /// A flush of a volume failed: it takes no more writes until the file system is opened again. What was written to it since the flush
    /// before may be lost; who flushes files on it is told.
    VolumeFailed {
        /// Which volume.
        volume: VolumeIndex,
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// Whoever had it open before answered before the journal was durable, has not closed it, and the tail of its journal is not there: what was answered and
    /// not flushed may be missing, as after a power cut.
    TailMissing,
    /// The file system takes no changes any more.
    Failed {
        /// Why.
        reason: String,
    },
    /// Data were not what was written, and could not be repaired.
    Corrupt {
        /// Which file.
        file: FileId,
        /// Byte offset in it.
        offset: u64,
    },
    /// Data were not what was written, and were repaired from another copy.
    Repaired {
        /// Which file.
        file: FileId,
        /// Byte offset in it.
        offset: u64,
    },
    /// A block of metadata was not what was written, and was repaired from another copy.
    MetadataRepaired {
        /// Its number on the metadata volume.
        block: u64,
    },
    /// A block of metadata is not what was written, and no copy of it is.
    MetadataCorrupt {
        /// Its number on the metadata volume.
        block: u64,
    },
}
