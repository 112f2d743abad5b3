//! QEMU's format, qcow2, versions 2 and 3 (QEMU's docs/interop/qcow2.rst).
//!
//! ```text
//!   header ──► L1: one entry for each L2 ──► L2: one entry for each cluster ──► cluster: data, compressed data,
//!                                                                               zeroes, or "ask the backing file"
//! ```
//!
//! | can be read | is refused, with words |
//! |---|---|
//! | versions 2 and 3; all cluster sizes; zlib and zstd; zero clusters; extended L2 entries | encryption, external data, what is marked corrupt |
//! | backing files, if that is wanted | internal snapshots are not looked at: the disk is read as it is now |
//!
//! What is written is of version 3, with clusters of 64 KiB, not compressed.

mod header;
mod reader;
mod unpack;
mod writer;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use reader::Qcow2;
pub use writer::Qcow2Writer;

/// Whether an image begins like one of these.
pub fn is_qcow2(first: &[u8]) -> bool {
    first.starts_with(&header::MAGIC)
}

/// Bytes that can be read in any order.
pub trait ReadAt: Send {
    /// How many.
    fn length(&self) -> u64;

    /// Reads a range; all of it or nothing.
    ///
    /// # Errors
    /// It ends before, or cannot be read.
    fn read_exact_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for (File, u64) {
    fn length(&self) -> u64 {
        self.1
    }

    fn read_exact_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(&self.0, target, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(target.len());
        let source = self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        target.copy_from_slice(source);
        Ok(())
    }
}

/// For the fuzz target in `tests/fuzz-harness`, nothing else: any bytes are refused, or are an image that can be read, or not everywhere.
/// Tells whether it is an image.
///
/// # Panics
/// What is told to be data cannot be.
#[doc(hidden)]
pub fn survives(bytes: &[u8]) -> bool {
    use super::Image;
    let Ok(mut image) = Qcow2::open(bytes.to_vec()) else {
        return false;
    };
    // Whatever it is, it is said in words.
    let _ = image.backing();
    let mut at = 0;
    for _ in 0..16 {
        let Ok(Some(range)) = image.next_data(at) else {
            break;
        };
        assert!(range.start >= at && range.start < range.end && range.end <= image.size());
        let length = usize::try_from(range.end - range.start)
            .unwrap_or(usize::MAX)
            .min(64 << 10);
        let _ = image.read(range.start, &mut vec![0; length]);
        at = range.end;
    }
    true
}
