//! Images of disks outside of the pool: raw ones, and QEMU's.
//!
//! What is here blocks: it runs on a thread of its own, never on a worker. Everything in an image may be hostile.
//!
//! | module | what |
//! |---|---|
//! | [`qcow2`] | QEMU's format |
//! | `raw` | the bytes of a disk, one after the other; holes are skipped |

pub mod qcow2;
mod raw;

use std::io;
use std::ops::Range;

pub use raw::{Raw, RawWriter};

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It is not one of that format.
    #[error("{0}")]
    Format(String),
    /// It is damaged.
    #[error("the image is damaged: {0}")]
    Damaged(String),
    /// It uses what this version does not know or does not do.
    #[error("{0}")]
    Unsupported(String),
    /// The file cannot be read or written.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl ImageError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// A disk in an image.
pub trait Image: Send {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// The first range at or behind `from` that may be other than zeroes.
    ///
    /// # Errors
    /// The image is damaged, or cannot be read.
    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImageError>;

    /// Reads a range, which lies within the disk.
    ///
    /// # Errors
    /// The image is damaged, or cannot be read.
    fn read(&mut self, offset: u64, target: &mut [u8]) -> Result<(), ImageError>;
}

/// An image that is being made. What is not written reads as zeroes.
pub trait ImageWriter: Send {
    /// Writes a range. Offsets ascend, and no byte is written twice.
    ///
    /// # Errors
    /// The image cannot be written.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError>;

    /// Makes it whole and durable.
    ///
    /// # Errors
    /// The image cannot be written.
    fn finish(&mut self) -> Result<(), ImageError>;
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Where a range of a disk differs from an image: the first byte. Between `from` and `offset` the disk reads as zeroes.
///
/// # Errors
/// The image is damaged, or cannot be read.
pub fn difference(
    image: &mut dyn Image,
    from: u64,
    offset: u64,
    bytes: &[u8],
) -> Result<Option<u64>, ImageError> {
    if let Some(at) = first_non_zero(image, from, offset)? {
        return Ok(Some(at));
    }
    let mut found = vec![0; bytes.len()];
    let inside = image.size().saturating_sub(offset);
    let length = usize::try_from(inside).unwrap_or(usize::MAX).min(bytes.len());
    if let Some(part) = found.get_mut(..length) {
        image.read(offset, part)?;
    }
    let differ = found.iter().zip(bytes).position(|(one, other)| one != other);
    Ok(differ.map(|at| offset + at as u64))
}

/// The first byte in a range of an image that is not zero.
///
/// # Errors
/// The image is damaged, or cannot be read.
pub fn first_non_zero(image: &mut dyn Image, from: u64, to: u64) -> Result<Option<u64>, ImageError> {
    const STEP: u64 = 1 << 20;
    let mut at = from;
    while at < to {
        let Some(data) = image.next_data(at)?.filter(|data| data.start < to) else {
            break;
        };
        let mut start = data.start.max(at);
        let end = data.end.min(to);
        while start < end {
            let stop = (start + STEP).min(end);
            let mut bytes = vec![0; usize::try_from(stop - start).unwrap_or(0)];
            image.read(start, &mut bytes)?;
            if let Some(found) = bytes.iter().position(|byte| *byte != 0) {
                return Ok(Some(start + found as u64));
            }
            start = stop;
        }
        at = end.max(at + 1);
    }
    Ok(None)
}
