//! What lies on a device before it becomes ours: nothing is destroyed unasked.

use std::fmt;

use block_io::{BlockDevice, IoError};

use super::MediaError;
use super::media::read_labels;
use crate::bytes;
use crate::model::{BLOCK, Uuid};

/// What a device carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Nothing that is known; it may be data all the same.
    Blank,
    /// A label of ours.
    Pool {
        /// Identity of the pool.
        pool: Uuid,
        /// Its name.
        name: String,
    },
    /// A damaged label of ours, or one of another version.
    BadLabel,
    /// A partition table: `MBR` or `GPT`.
    PartitionTable(&'static str),
    /// A file system, or a part of another volume manager.
    Known(&'static str),
}

impl fmt::Display for Content {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => write!(formatter, "nothing known"),
            Self::Pool { pool, name } => write!(formatter, "the label of pool {name:?} ({pool})"),
            Self::BadLabel => write!(formatter, "a damaged label of a pool, or one of another version"),
            Self::PartitionTable(kind) => write!(formatter, "a partition table ({kind})"),
            Self::Known(kind) => write!(formatter, "{kind}"),
        }
    }
}

/// Bytes from the start that hold all signatures.
const LENGTH: u64 = 72 << 10;

/// Signatures: offset, bytes, what it is.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"XFSB", "an XFS file system"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0x1_0040, b"_BHRfS_M", "a Btrfs file system"),
    (0, b"LUKS\xba\xbe", "a LUKS container"),
    (0, b"SKUL\xba\xbe", "a LUKS container"),
    (0x200, b"LABELONE", "an LVM physical volume"),
    (0, b"LABELONE", "an LVM physical volume"),
    (0x400, b"LABELONE", "an LVM physical volume"),
    (0x600, b"LABELONE", "an LVM physical volume"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (0xff6, b"SWAP-SPACE", "swap space"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (0x36, b"FAT1", "a FAT file system"),
    (0x52, b"FAT32   ", "a FAT file system"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"QFI\xfb", "a qcow2 image"),
];

/// What `device` carries. Reads only.
///
/// # Errors
/// The device fails.
pub async fn inspect<D: BlockDevice>(device: &D) -> Result<Content, IoError> {
    match read_labels(device).await {
        Ok((label, _)) => {
            let (pool, name) = (label.pool, label.pool_name);
            return Ok(Content::Pool { pool, name });
        }
        Err(MediaError::Io(error)) => return Err(error),
        Err(MediaError::Label(crate::format::LabelError::Absent)) => {}
        Err(_) => return Ok(Content::BadLabel),
    }
    let length = device.size().min(LENGTH) / BLOCK * BLOCK;
    let start = bytes::read(device, 0, usize::try_from(length).unwrap_or(0)).await?;
    Ok(recognise(start.as_slice()))
}

/// The pool that `device` is of, and its identity; none if it has no good label. Reads only.
///
/// # Errors
/// The device fails.
pub async fn identity<D: BlockDevice>(device: &D) -> Result<Option<(Uuid, Uuid)>, IoError> {
    match read_labels(device).await {
        Ok((label, _)) => Ok(Some((label.pool, label.device))),
        Err(MediaError::Io(error)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// What the first bytes of a device say.
fn recognise(start: &[u8]) -> Content {
    let has = |offset: usize, bytes: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(bytes));
    if has(512, b"EFI PART") || has(4096, b"EFI PART") {
        return Content::PartitionTable("GPT");
    }
    if let Some((.., kind)) = SIGNATURES.iter().find(|(offset, bytes, _)| has(*offset, bytes)) {
        return Content::Known(kind);
    }
    if has(510, b"\x55\xaa") {
        return Content::PartitionTable("MBR");
    }
    Content::Blank
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_is_recognised() {
        assert_eq!(recognise(&[0; 73728]), Content::Blank);
        assert_eq!(recognise(&[]), Content::Blank);
        for (offset, bytes, kind) in SIGNATURES {
            let mut start = vec![0; 73728];
            start[*offset..offset + bytes.len()].copy_from_slice(bytes);
            // Boot sectors of file systems have the mark of an MBR as well.
            start[510..512].copy_from_slice(b"\x55\xaa");
            assert_eq!(recognise(&start), Content::Known(kind));
        }
    }

    #[test]
    fn partition_tables_are_recognised() {
        let mut start = vec![0; 73728];
        start[510..512].copy_from_slice(b"\x55\xaa");
        assert_eq!(recognise(&start), Content::PartitionTable("MBR"));
        start[4096..4104].copy_from_slice(b"EFI PART");
        assert_eq!(recognise(&start), Content::PartitionTable("GPT"));
    }
}
