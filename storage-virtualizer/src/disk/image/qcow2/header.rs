//! The header of a qcow2 image (QEMU's docs/interop/qcow2.rst, "Header"). All numbers are big-endian.

use crate::disk::image::ImageError;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header of version 2.
const VERSION_2: usize = 72;
const VERSION_2_LENGTH: u32 = 72;
/// Bytes of the smallest header of version 3.
const VERSION_3: usize = 104;
/// The same, as a header has it.
pub(super) const VERSION_3_LENGTH: u32 = 104;
/// Entries of the first table, at most: 32 MiB, as QEMU has it.
const MAX_L1: u64 = (32 << 20) / 8;
/// The longest name of a backing file.
const MAX_BACKING: u32 = 1023;

/// Incompatible features.
mod feature {
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(super) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
    /// The reference counts may be wrong: they are not looked at here.
    pub(super) const DIRTY: u64 = 1;
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// Raw deflate.
    Zlib,
    Zstd,
}

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) compression: Compression,
    /// Entries of second tables have a bitmap of sub-clusters.
    pub(super) extended_l2: bool,
    /// Where the name of the backing file is, and how long.
    pub(super) backing: Option<(u64, u32)>,
    /// Where extensions begin.
    pub(super) length: u32,
}

fn format(text: impl Into<String>) -> ImageError {
    ImageError::Format(text.into())
}

fn damaged(text: impl Into<String>) -> ImageError {
    ImageError::Damaged(text.into())
}

fn unsupported(text: impl Into<String>) -> ImageError {
    ImageError::Unsupported(text.into())
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(word.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(word.try_into().ok()?))
}

impl Header {
    /// From the first bytes of an image.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(format("it is not a qcow2 image: it does not begin like one"));
        }
        let short = || damaged("its header ends too early: it is truncated");
        let word = |at| u32_at(bytes, at).ok_or_else(short);
        let long = |at| u64_at(bytes, at).ok_or_else(short);
        let version = word(4)?;
        if !matches!(version, 2 | 3) {
            return Err(unsupported(format!(
                "it is a qcow2 image of version {version}; versions 2 and 3 can be read"
            )));
        }
        let (features, length) = match version {
            2 => (0, VERSION_2_LENGTH),
            _ => (long(72)?, word(100)?),
        };
        let known_length = if version == 2 { VERSION_2 } else { VERSION_3 };
        if bytes.len() < known_length {
            return Err(short());
        }
        if version == 3 && !(VERSION_3_LENGTH..=64 << 10).contains(&length) {
            return Err(damaged(format!("its header has {length} bytes, which cannot be")));
        }
        let compression = match features & feature::COMPRESSION_TYPE {
            0 => 0,
            _ => *bytes.get(VERSION_3).ok_or_else(short)?,
        };
        check_features(features, word(32)?)?;
        let header = Self {
            version,
            size: long(24)?,
            cluster_bits: word(20)?,
            l1_entries: word(36)?.into(),
            l1_offset: long(40)?,
            compression: match compression {
                0 => Compression::Zlib,
                1 => Compression::Zstd,
                other => {
                    return Err(unsupported(format!(
                        "its clusters are compressed in a way that is not known ({other}); zlib and zstd are"
                    )));
                }
            },
            extended_l2: features & feature::EXTENDED_L2 != 0,
            backing: match (long(8)?, word(16)?) {
                (0, _) | (_, 0) => None,
                (_, length) if length > MAX_BACKING => {
                    return Err(damaged(format!(
                        "the name of its backing file has {length} bytes, which cannot be"
                    )));
                }
                found => Some(found),
            },
            length,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), ImageError> {
        let least = if self.extended_l2 { 14 } else { 9 };
        if !(least..=21).contains(&self.cluster_bits) {
            return Err(damaged(format!(
                "its clusters have 2^{} bytes, which cannot be",
                self.cluster_bits
            )));
        }
        if self.size > filesys::MAX_FILE {
            return Err(unsupported(format!(
                "its disk has {} bytes, and a disk here has at most {}",
                self.size,
                filesys::MAX_FILE
            )));
        }
        if self.l1_entries > MAX_L1 {
            return Err(damaged(format!(
                "its first table has {} entries, which cannot be",
                self.l1_entries
            )));
        }
        if self.size.div_ceil(self.cluster() * self.l2_entries()) > self.l1_entries {
            return Err(damaged("its first table is too small for its size"));
        }
        if !self.l1_offset.is_multiple_of(self.cluster()) {
            return Err(damaged("its first table does not begin with a cluster"));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an entry of a second table.
    pub(super) fn l2_entry(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of a second table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry()
    }
}

fn check_features(features: u64, encryption: u32) -> Result<(), ImageError> {
    if encryption != 0 {
        return Err(unsupported(
            "it is encrypted: decrypt it first with `qemu-img convert`, which asks for the key",
        ));
    }
    if features & feature::EXTERNAL_DATA != 0 {
        return Err(unsupported(
            "its data are in another file: put them into one image first with `qemu-img convert`",
        ));
    }
    if features & feature::CORRUPT != 0 {
        return Err(damaged(
            "it is marked as corrupt: repair it first with `qemu-img check -r all`",
        ));
    }
    match features & !feature::KNOWN {
        0 => Ok(()),
        unknown => Err(unsupported(format!(
            "it uses features that are not known here (bits {unknown:#x}): convert it first with `qemu-img convert`"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 GiB, 64 KiB clusters.
    fn plain() -> Vec<u8> {
        let mut bytes = vec![0; VERSION_3];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        bytes[39] = 2;
        bytes[40..48].copy_from_slice(&0x3_0000_u64.to_be_bytes());
        bytes[99] = 4;
        bytes[103] = 104;
        bytes
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        assert_eq!(Header::parse(&plain()).unwrap().size, 1 << 30);
        let cases: &[(usize, u8, &str)] = &[
            (0, b'q', "not a qcow2 image"),
            (7, 4, "version 4"),
            (23, 8, "2^8 bytes"),
            (23, 22, "2^22 bytes"),
            (24, 1, "at most"),
            (35, 1, "encrypted"),
            (39, 1, "too small for its size"),
            (36, 255, "entries, which cannot be"),
            (47, 1, "does not begin with a cluster"),
            (79, 2, "marked as corrupt"),
            (79, 4, "in another file"),
            (79, 8, "truncated"),
            (79, 32, "not known here"),
            (103, 1, "header has 1 bytes"),
        ];
        for (place, value, words) in cases {
            let mut bytes = plain();
            bytes[*place] = *value;
            let error = Header::parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(words), "{place}: {error}");
        }
        for length in 0..VERSION_3 {
            Header::parse(&plain()[..length]).unwrap_err();
        }
    }
}
