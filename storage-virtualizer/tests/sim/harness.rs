//! Requests as a guest makes them: 4 KiB, all of one number. A crash may tear them, between sectors.

use block_io::sim::Failure;
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf, IoError};

/// What one request covers.
pub(crate) const BLOCK: u64 = 4096;

/// The numbers of the sectors of a block.
pub(crate) type Block = [u64; 8];

/// All of one number.
pub(crate) fn whole(stamp: u64) -> Block {
    [stamp; 8]
}

pub(crate) fn failed(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text.as_str().into()
}

fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: all callers keep the buffer until the request has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

pub(crate) async fn put<D: BlockDevice>(
    disk: &D,
    place: u64,
    stamp: u64,
    durability: Durability,
) -> Result<(), IoError> {
    let mut buffer = AlignedBuffer::new(4096);
    for word in buffer.as_mut_slice().chunks_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
    disk.write(place * BLOCK, &memory(&buffer), durability).await
}

/// The numbers at a place: one for each sector.
pub(crate) async fn get<D: BlockDevice>(disk: &D, place: u64) -> Result<Block, Failure> {
    let buffer = AlignedBuffer::new(4096);
    disk.read(place * BLOCK, &memory(&buffer)).await.map_err(failed)?;
    let mut block = whole(0);
    for (number, sector) in block.iter_mut().zip(buffer.as_slice().chunks(512)) {
        let mut words = sector
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        *number = words.next().unwrap_or(0);
        if !words.all(|word| word == *number) {
            return Err(format!("a sector of place {place} is torn").as_str().into());
        }
    }
    Ok(block)
}
