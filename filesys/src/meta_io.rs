//! What the superblock, the journal and the metadata bitmap share: blocks of 4 KiB, their reads and writes, their checksum,
//! and several requests at once.

use std::ops::Range;

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError};

use crate::gate::{self, Boxed};

/// Bytes of a block of the metadata volume.
pub(crate) const BLOCK: usize = 4096;
const BLOCK_BYTES: u64 = BLOCK as u64;
/// Counters on media (sequences, groups, positions) stay below this, so that counting on from them never overflows.
pub(crate) const MOST: u64 = 1 << 62;

/// Whole blocks of a device of `size` bytes.
pub(crate) fn blocks_of(size: u64) -> u64 {
    size / BLOCK_BYTES
}

/// Puts a field at its place; one that does not fit is cut, which no caller with constant places has.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    } else {
        debug_assert!(false, "a field at {at} lies outside its block");
    }
}

/// The field at a place; zeroes outside of `bytes`, which no caller with constant places asks for.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    debug_assert!(field.is_some(), "a field at {at} lies outside its block");
    field.copied().unwrap_or([0; N])
}

/// The 64-bit number at a place.
pub(crate) fn take_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

/// Reads `count` blocks from block `first` on.
///
/// # Errors
/// The device's.
pub(crate) async fn read_blocks(
    device: &impl BlockDevice,
    first: u64,
    count: usize,
) -> Result<AlignedBuffer, IoError> {
    let length = count.saturating_mul(BLOCK);
    let buffer = AlignedBuffer::new(length);
    // SAFETY: the buffer belongs to this future and is declared before the request, so it outlives the request even when the
    // future is dropped half-way; nothing else uses it meanwhile.
    let io = [unsafe { buffer.io(0, length) }];
    device.read(first.saturating_mul(BLOCK_BYTES), &io).await?;
    Ok(buffer)
}

/// Writes the blocks `range` of `buffer` from block `first` of the device on.
///
/// # Errors
/// The device's.
pub(crate) async fn write_blocks(
    device: &impl BlockDevice,
    first: u64,
    buffer: &AlignedBuffer,
    range: Range<usize>,
    durability: Durability,
) -> Result<(), IoError> {
    let (start, length) = (
        range.start.saturating_mul(BLOCK),
        range.len().saturating_mul(BLOCK),
    );
    // SAFETY: the request only reads the buffer, which the caller's borrow keeps alive and unchanged until this future, which
    // drives the request, has ended or is dropped.
    let io = [unsafe { buffer.io(start, length) }];
    device
        .write(first.saturating_mul(BLOCK_BYTES), &io, durability)
        .await
}

/// Drives all futures until all have ended; their results in the same order.
pub(crate) async fn join_all<'a, F: Future + 'a>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let boxed = futures
        .into_iter()
        .map(|future| -> Boxed<'a, F::Output> { Box::pin(future) });
    gate::all(boxed.collect()).await
}

/// Demands that this test has reached the marks.
#[cfg(test)]
pub(crate) fn demand(marks: &[&str]) {
    let mut numbers = block_io::sim::Numbers::default();
    numbers.collect();
    let missing = numbers.missing(marks);
    assert!(missing.is_empty(), "{missing:?} were not reached");
}
