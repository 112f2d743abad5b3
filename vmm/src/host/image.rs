//! Images that were cut off: what lies on a disk needs more bytes than the disk has.
//!
//! A guest would find out much later, by errors far inside of its file system. Only well-known structures at fixed places
//! are looked at, and only to compare sizes: how the image is used never depends on what a guest wrote into it.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What lies on a disk that is too small for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutOff {
    /// What was recognised: "an ext4 file system", ...
    pub contents: &'static str,
    /// Bytes that it needs.
    pub needed: u64,
    /// Bytes that the disk has.
    pub size: u64,
}

/// As far as the structures lie that are looked at: to the end of btrfs's first superblock.
const HEAD: usize = 68 << 10;

/// Whether the disk at `path`, a file or block device, is too small for what lies on it.
///
/// # Errors
/// The disk cannot be read.
pub fn find_cut_off(path: &Path) -> io::Result<Option<CutOff>> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let mut head = Vec::new();
    file.take(u64::try_from(HEAD).unwrap_or(0))
        .read_to_end(&mut head)?;
    Ok(contents(&head)
        .filter(|(_, needed)| *needed > size)
        .map(|(contents, needed)| CutOff {
            contents,
            needed,
            size,
        }))
}

/// What starts with `head`, and how many bytes it needs.
fn contents(head: &[u8]) -> Option<(&'static str, u64)> {
    gpt(head)
        .or_else(|| xfs(head))
        .or_else(|| ext(head))
        .or_else(|| btrfs(head))
}

/// A GUID partition table names the sector of its copy at the end (UEFI 2.10 §5.3.2).
fn gpt(head: &[u8]) -> Option<(&'static str, u64)> {
    if bytes::<8>(head, 512)? != *b"EFI PART" {
        return None;
    }
    let last = u64::from_le_bytes(bytes(head, 512 + 32)?);
    Some(("a GUID partition table", last.checked_add(1)?.checked_mul(512)?))
}

/// XFS: big-endian block size and number of blocks.
fn xfs(head: &[u8]) -> Option<(&'static str, u64)> {
    if bytes::<4>(head, 0)? != *b"XFSB" {
        return None;
    }
    let block = u32::from_be_bytes(bytes(head, 4)?);
    let blocks = u64::from_be_bytes(bytes(head, 8)?);
    Some(("an XFS file system", blocks.checked_mul(u64::from(block))?))
}

/// ext2, ext3, ext4: superblock at 1024.
fn ext(head: &[u8]) -> Option<(&'static str, u64)> {
    const SUPERBLOCK: usize = 1024;
    const INCOMPAT_64BIT: u32 = 0x80;
    if bytes::<2>(head, SUPERBLOCK + 56)? != [0x53, 0xef] {
        return None;
    }
    let log_block = u32::from_le_bytes(bytes(head, SUPERBLOCK + 24)?);
    if log_block > 6 {
        return None;
    }
    let low = u32::from_le_bytes(bytes(head, SUPERBLOCK + 4)?);
    let wide = u32::from_le_bytes(bytes(head, SUPERBLOCK + 96)?) & INCOMPAT_64BIT != 0;
    let high = if wide {
        u32::from_le_bytes(bytes(head, SUPERBLOCK + 336)?)
    } else {
        0
    };
    let blocks = u64::from(high) << 32 | u64::from(low);
    Some(("an ext4 file system", blocks.checked_mul(1024 << log_block)?))
}

/// btrfs: superblock at 64 KiB, with the size of this device in it.
fn btrfs(head: &[u8]) -> Option<(&'static str, u64)> {
    const SUPERBLOCK: usize = 64 << 10;
    if bytes::<8>(head, SUPERBLOCK + 0x40)? != *b"_BHRfS_M" {
        return None;
    }
    Some((
        "a btrfs file system",
        u64::from_le_bytes(bytes(head, SUPERBLOCK + 0xd1)?),
    ))
}

fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in parts {
            head[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn well_known_contents_tell_their_size() {
        let mib = 1 << 20;
        let gpt = head(&[(512, b"EFI PART"), (544, &4095_u64.to_le_bytes())]);
        assert_eq!(contents(&gpt), Some(("a GUID partition table", 2 * mib)));
        let xfs = head(&[
            (0, b"XFSB"),
            (4, &4096_u32.to_be_bytes()),
            (8, &512_u64.to_be_bytes()),
        ]);
        assert_eq!(contents(&xfs), Some(("an XFS file system", 2 * mib)));
        let ext = head(&[
            (1028, &512_u32.to_le_bytes()),
            (1048, &2_u32.to_le_bytes()),
            (1080, &[0x53, 0xef]),
        ]);
        assert_eq!(contents(&ext), Some(("an ext4 file system", 2 * mib)));
        let btrfs = head(&[
            ((64 << 10) + 0x40, b"_BHRfS_M"),
            ((64 << 10) + 0xd1, &(2 * mib).to_le_bytes()),
        ]);
        assert_eq!(contents(&btrfs), Some(("a btrfs file system", 2 * mib)));
        assert_eq!(contents(&head(&[])), None);
    }

    #[test]
    fn numbers_that_make_no_sense_and_short_images_are_no_contents() {
        let huge = u64::MAX.to_le_bytes();
        assert_eq!(contents(&head(&[(512, b"EFI PART"), (544, &huge)])), None);
        assert_eq!(contents(&head(&[(0, b"XFSB"), (4, &[0xff; 12])])), None);
        assert_eq!(
            contents(&head(&[(1048, &7_u32.to_le_bytes()), (1080, &[0x53, 0xef])])),
            None
        );
        for length in [0, 1, 511, 513, 1080, 1081, 70 << 10] {
            assert_eq!(contents(&vec![0; length]), None);
        }
    }

    #[test]
    fn a_disk_that_ends_too_early_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let parts = head(&[
            (1028, &512_u32.to_le_bytes()),
            (1048, &2_u32.to_le_bytes()),
            (1080, &[0x53, 0xef]),
        ]);
        std::fs::write(file.path(), parts).unwrap();
        let found = find_cut_off(file.path()).unwrap().unwrap();
        assert_eq!((found.needed, found.size), (2 << 20, 68 << 10));
        file.as_file().set_len(2 << 20).unwrap();
        assert_eq!(find_cut_off(file.path()).unwrap(), None);
        assert!(find_cut_off(Path::new("/nowhere")).is_err());
    }
}
