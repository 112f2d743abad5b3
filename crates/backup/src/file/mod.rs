//! Files of archives and disks at the speed of what is below: past the page cache, and while something else is done.
//!
//! ```text
//!   ahead    ◄── a thread reads the next pieces while checksums of this one are computed
//!   behind   ──► a thread writes the last piece while the next one is made
//!   memory   buffers that devices take, used again
//! ```
//! Past the page cache, as archives are larger than that and are not looked at soon: going through it would cost a copy of all, and what
//! others have in it. Where a file system knows no other way, through it.

mod ahead;
mod behind;
mod memory;

pub(crate) use ahead::ReadAhead;
pub use behind::WriteBehind;
pub(crate) use memory::{Buffer, Buffers};

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// `O_DIRECT` of Linux on x86-64 (asm-generic/fcntl.h).
const O_DIRECT: i32 = 0o40000;
/// Offsets, lengths and memory of requests past the page cache are multiples of this, which is enough for every device.
pub(crate) const ALIGN: usize = 4096;

/// Opens a file past the page cache. None if its file system has no such thing.
///
/// # Errors
/// It cannot be opened at all.
pub(crate) fn open_direct(path: &Path, options: &mut OpenOptions) -> io::Result<Option<File>> {
    match options.custom_flags(O_DIRECT).open(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        opened => opened.map(Some),
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In steps that the compiler makes wide ones.
    bytes
        .chunks(256)
        .all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        let mut bytes = vec![0; 4096 + 7];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for place in [0, 255, 256, 4095, 4102] {
            bytes[place] = 1;
            assert!(!is_zero(&bytes), "{place}");
            bytes[place] = 0;
        }
    }
}
