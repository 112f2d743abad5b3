//! The units in which the file system counts, and the numbers that must not be mixed.

use std::fmt;

/// Allocation unit: bytes of a *cluster*. Files are maps of clusters to places on volumes.
pub const CLUSTER: u64 = 64 << 10;
/// Bytes of a *sub-cluster*, the unit in which a map knows what is valid. Also the size of a metadata page.
pub const SUB_CLUSTER: u64 = 4 << 10;
/// Sub-clusters of a cluster.
pub(crate) const SUBS: u32 = 16;
/// The largest file, in bytes.
pub const MAX_FILE: u64 = 64 << 40;
/// The longest name of a file or directory, in bytes of UTF-8.
pub const MAX_NAME: usize = 255;
/// The most volumes of a file system.
pub const MAX_VOLUMES: usize = 4096;
/// Clusters of a volume are numbered with 40 bits.
pub(crate) const MAX_CLUSTERS: u64 = 1 << 40;

/// Numbers of files and of other objects are below this.
pub(crate) const MAX_ID: u64 = 1 << 40;

/// Identifies a file or directory, for ever: numbers are not used again. Below 2^40.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

impl fmt::Display for FileId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "file {}", self.0)
    }
}

/// Number of a volume within the file system. It is given once and not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeIndex(pub u16);

impl fmt::Display for VolumeIndex {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "volume {}", self.0)
    }
}

/// A cluster of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Which volume.
    pub volume: VolumeIndex,
    /// Which cluster of it; below 2^40.
    pub cluster: u64,
}

impl Location {
    /// Its first byte on the volume.
    pub fn offset(self) -> u64 {
        self.cluster * CLUSTER
    }

    /// The location `count` clusters further on.
    pub(crate) fn plus(self, count: u64) -> Self {
        Self {
            volume: self.volume,
            cluster: self.cluster + count,
        }
    }
}

/// Sub-clusters of one cluster, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SubMask(pub(crate) u16);

impl SubMask {
    pub(crate) const NONE: Self = Self(0);
    #[cfg(test)]
    pub(crate) const ALL: Self = Self(u16::MAX);

    /// The sub-clusters from number `first` on, `count` of them.
    pub(crate) fn range(first: u32, count: u32) -> Self {
        debug_assert!(first + count <= SUBS);
        let ones = (1_u32 << count) - 1;
        Self(u16::try_from(ones << first).unwrap_or(u16::MAX))
    }

    /// Those that the bytes `start..end` of the cluster touch.
    pub(crate) fn touched(start: u64, end: u64) -> Self {
        let first = u32::try_from(start / SUB_CLUSTER).unwrap_or(0);
        let last = u32::try_from(end.div_ceil(SUB_CLUSTER)).unwrap_or(SUBS);
        Self::range(first, last - first)
    }

    /// Those that lie wholly within the bytes `start..end` of the cluster.
    pub(crate) fn inside(start: u64, end: u64) -> Self {
        let first = u32::try_from(start.div_ceil(SUB_CLUSTER)).unwrap_or(SUBS);
        let last = u32::try_from(end / SUB_CLUSTER).unwrap_or(0);
        if first >= last {
            return Self::NONE;
        }
        Self::range(first, last - first)
    }

    pub(crate) fn contains(self, sub: u32) -> bool {
        self.0 >> sub & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_byte_ranges() {
        assert_eq!(SubMask::touched(0, 65536), SubMask(u16::MAX));
        assert_eq!(SubMask::touched(512, 1024), SubMask(1));
        assert_eq!(SubMask::touched(4095, 4097), SubMask(3));
        assert_eq!(SubMask::inside(4095, 8191), SubMask::NONE);
        assert_eq!(SubMask::inside(4096, 12289), SubMask(0b110));
        assert_eq!(SubMask::inside(0, 65536), SubMask(u16::MAX));
    }
}
