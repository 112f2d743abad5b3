//! Reads and writes of our own memory, for metadata.

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError};

/// Reads `length` bytes at `offset`.
///
/// # Errors
/// The device's.
pub(crate) async fn read(
    device: &impl BlockDevice,
    offset: u64,
    length: usize,
) -> Result<AlignedBuffer, IoError> {
    let buffer = AlignedBuffer::new(length);
    // SAFETY: the buffer belongs to this future and is declared before the request, so it outlives the request even when the
    // future is dropped half-way; nothing else uses it meanwhile.
    let io = [unsafe { buffer.io(0, length) }];
    device.read(offset, &io).await?;
    Ok(buffer)
}

/// Writes the whole of `buffer` at `offset`.
///
/// # Errors
/// The device's.
pub(crate) async fn write(
    device: &impl BlockDevice,
    offset: u64,
    buffer: &AlignedBuffer,
    durability: Durability,
) -> Result<(), IoError> {
    write_start(device, offset, buffer, buffer.as_slice().len(), durability).await
}

/// Writes the first `length` bytes of `buffer` at `offset`.
///
/// # Errors
/// The device's.
pub(crate) async fn write_start(
    device: &impl BlockDevice,
    offset: u64,
    buffer: &AlignedBuffer,
    length: usize,
    durability: Durability,
) -> Result<(), IoError> {
    // SAFETY: the request only reads the buffer, which the caller's borrow keeps alive and unchanged until this future, which
    // drives the request, has ended or is dropped.
    let io = [unsafe { buffer.io(0, length) }];
    device.write(offset, &io, durability).await
}
