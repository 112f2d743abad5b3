//! Commands that read blocks and compare them, or change them depending on what they hold.

use std::sync::atomic::Ordering;

use block_io::{AlignedBuffer, BlockDevice, Durability, list};

use super::Check;
use super::block::Blocks;
use super::dispatch::Call;
use super::sense::{Code, Key, Sense};
use super::total;
use super::transfer::{Moved, number, part};

/// So much is compared at a time.
const CHUNK: u64 = 256 << 10;

/// What blocks are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Against {
    /// Nothing: they can be read.
    Nothing,
    /// The data from the initiator, block by block.
    Data,
    /// One block of data from the initiator, each of them.
    OneBlock,
}

/// VERIFY(10), (12), (16) (SBC-4 §5.35).
pub(super) async fn verify<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let blocks = call.blocks()?;
    let against = match (call.cdb[1] >> 1) & 3 {
        0 => Against::Nothing,
        1 => Against::Data,
        3 => Against::OneBlock,
        _ => return Err(Sense::in_cdb(1, Some(2)).into()),
    };
    let wanted = match against {
        Against::Nothing => 0,
        Against::Data => blocks.length(),
        Against::OneBlock if blocks.count == 0 => 0,
        Against::OneBlock => blocks.block,
    };
    compare(call, blocks, against).await?;
    call.unit
        .counters
        .verified
        .fetch_add(blocks.length(), Ordering::Relaxed);
    Ok(Moved {
        wanted,
        moved: wanted.min(total(call.command.data_out)),
    })
}

/// WRITE AND VERIFY(10), (12), (16) (SBC-4 §5.43): what is compared has been on the medium.
pub(super) async fn write_and_verify<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let blocks = call.blocks()?;
    let against = match (call.cdb[1] >> 1) & 3 {
        0 => Against::Nothing,
        1 => Against::Data,
        _ => return Err(Sense::in_cdb(1, Some(2)).into()),
    };
    call.check_writable()?;
    let moved = call.write_data(blocks, Durability::Durable).await?;
    let written = Blocks {
        count: moved.moved / blocks.block,
        ..blocks
    };
    compare(call, written, against).await?;
    call.unit
        .counters
        .verified
        .fetch_add(written.length(), Ordering::Relaxed);
    Ok(moved)
}

/// Reads the blocks and compares them with what came of the data: what did not come is not compared.
async fn compare<D: BlockDevice>(call: &Call<'_, D>, blocks: Blocks, against: Against) -> Check<()> {
    let length = match against {
        Against::Data => {
            let given = total(call.command.data_out);
            blocks.length().min(given - given % blocks.block)
        }
        Against::OneBlock if total(call.command.data_out) < blocks.block => 0,
        Against::Nothing | Against::OneBlock => blocks.length(),
    };
    let chunk = (CHUNK - CHUNK % blocks.block).max(blocks.block).min(length);
    let (mut read, mut data) = (buffer(chunk), vec![0; size(chunk)]);
    if against == Against::OneBlock && length > 0 {
        for block in data.chunks_exact_mut(size(blocks.block)) {
            list::gather(call.command.data_out, 0, block);
        }
    }
    let mut at = 0;
    while at < length {
        let now = chunk.min(length - at);
        read_into(call, blocks.offset() + at, &mut read, now).await?;
        if against == Against::Data {
            list::gather(call.command.data_out, at, &mut data[..size(now)]);
        }
        if against != Against::Nothing
            && let Some(differs) = difference(&read.as_slice()[..size(now)], &data)
        {
            let offset = match against {
                Against::OneBlock => differs % blocks.block,
                _ => at + differs,
            };
            return Err(miscompare(offset).into());
        }
        at += now;
    }
    Ok(())
}

fn miscompare(offset: u64) -> Sense {
    Sense::new(Key::Miscompare, Code::MISCOMPARE_DURING_VERIFY).with_information(offset)
}

fn difference(found: &[u8], expected: &[u8]) -> Option<u64> {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b)?;
    u64::try_from(differs).ok()
}

fn size(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

fn buffer(length: u64) -> AlignedBuffer {
    AlignedBuffer::new(size(length))
}

async fn read_into<D: BlockDevice>(
    call: &Call<'_, D>,
    offset: u64,
    buffer: &mut AlignedBuffer,
    length: u64,
) -> Check<()> {
    // SAFETY: the buffer is borrowed until the read has ended, and nobody looks at it before.
    let pieces = [unsafe { buffer.io(0, size(length)) }];
    let outcome = call.disk.read(offset, &pieces).await;
    outcome.map_err(|error| call.failure(&error))
}

/// COMPARE AND WRITE (SBC-4 §5.3): the data are what is expected, and then what is written if that is there.
pub(super) async fn compare_and_write<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    // Byte 13 can say no more than is possible.
    let blocks = call.checked(number::u64(call.cdb, 2), call.cdb[13].into())?;
    call.check_writable()?;
    let length = blocks.length();
    if length == 0 {
        return Ok(Moved::NOTHING);
    }
    if total(call.command.data_out) < 2 * length {
        // Half of it cannot be done.
        return Err(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into());
    }
    let claim = call.unit.claim(blocks.offset()..blocks.offset() + length).await;
    let (mut found, mut expected) = (buffer(length), vec![0; size(length)]);
    read_into(call, blocks.offset(), &mut found, length).await?;
    list::gather(call.command.data_out, 0, &mut expected);
    if let Some(differs) = difference(found.as_slice(), &expected) {
        return Err(miscompare(differs).into());
    }
    let data = part(call.command.data_out, length, length);
    let outcome = call.disk.write(blocks.offset(), &data, call.durability()).await;
    outcome.map_err(|error| call.failure(&error))?;
    call.unit.count_written(length);
    drop(claim);
    Ok(Moved::all(2 * length))
}

/// ORWRITE(16) (SBC-4 §5.10): bits of the data are set in the blocks.
pub(super) async fn or_write<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let blocks = call.blocks()?;
    call.check_writable()?;
    let given = total(call.command.data_out);
    let length = blocks.length().min(given - given % blocks.block);
    let claim = call.unit.claim(blocks.offset()..blocks.offset() + length).await;
    let chunk = (CHUNK - CHUNK % blocks.block).max(blocks.block).min(length);
    let (mut found, mut data) = (buffer(chunk), vec![0; size(chunk)]);
    let mut at = 0;
    while at < length {
        let now = chunk.min(length - at);
        read_into(call, blocks.offset() + at, &mut found, now).await?;
        list::gather(call.command.data_out, at, &mut data[..size(now)]);
        let bytes = found.as_mut_slice().iter_mut().zip(&data);
        bytes.for_each(|(byte, more)| *byte |= more);
        // SAFETY: the buffer lives until the write has ended, and nobody changes it.
        let pieces = [unsafe { found.io(0, size(now)) }];
        let outcome = call
            .disk
            .write(blocks.offset() + at, &pieces, call.durability())
            .await;
        outcome.map_err(|error| call.failure(&error))?;
        at += now;
    }
    call.unit.count_written(length);
    drop(claim);
    Ok(Moved {
        wanted: blocks.length(),
        moved: length,
    })
}
