//! Commands on the space behind blocks: WRITE SAME, UNMAP, GET LBA STATUS.

use block_io::{AlignedBuffer, Allocation, BlockDevice, Durability, ZeroMode, list};

use super::block::{Blocks, addressed};
use super::dispatch::Call;
use super::inquiry::{MAX_RANGE_BLOCKS, MAX_UNMAP_DESCRIPTORS};
use super::sense::{Code, Sense};
use super::transfer::{Moved, length32, number, put, take};
use super::unit::Provisioning;
use super::{Check, total};

/// So much is written at a time.
const CHUNK: u64 = 256 << 10;
/// Bytes of a block descriptor of UNMAP, and of its header.
const UNMAP_DESCRIPTOR: usize = 16;
const UNMAP_HEADER: usize = 8;
/// The most descriptors in an answer to GET LBA STATUS.
const MAX_STATUS_DESCRIPTORS: u64 = 1024;

/// WRITE SAME(10) and (16) (SBC-4 §5.49, §5.50).
pub(super) async fn write_same<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let flags = call.cdb[1];
    let (anchor, unmap, without_data) = (flags & 0x10 != 0, flags & 0x08 != 0, flags & 0x01 != 0);
    let (lba, count) = addressed(call.cdb);
    let count_at = if call.cdb[0] == 0x41 { 7 } else { 10 };
    if anchor {
        return Err(Sense::in_cdb(1, Some(4)).into());
    }
    if unmap && call.unit.options().provisioning == Provisioning::Full {
        return Err(Sense::in_cdb(1, Some(3)).into());
    }
    if count == 0 || count > u64::from(MAX_RANGE_BLOCKS) {
        return Err(Sense::in_cdb(count_at, None).into());
    }
    let blocks = call.checked(lba, count)?;
    call.check_writable()?;
    let size = usize::try_from(blocks.block).unwrap_or(usize::MAX);
    let mut pattern = vec![0; size];
    let wanted = if without_data { 0 } else { blocks.block };
    if !without_data {
        if total(call.command.data_out) < wanted {
            return Err(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into());
        }
        list::gather(call.command.data_out, 0, &mut pattern);
    }
    if pattern.iter().all(|byte| *byte == 0) {
        let mode = if unmap {
            ZeroMode::MayUnmap
        } else {
            ZeroMode::KeepAllocated
        };
        zero(call, blocks, mode).await?;
    } else {
        write_pattern(call, blocks, &pattern).await?;
    }
    Ok(Moved::all(wanted))
}

async fn zero<D: BlockDevice>(call: &Call<'_, D>, blocks: Blocks, mode: ZeroMode) -> Check<()> {
    let write = call.disk.write_zeroes(blocks.offset(), blocks.length(), mode);
    call.writing(blocks.offset(), blocks.length(), write).await?;
    make_durable(call).await
}

/// Where there is no write cache for initiators, what has no durable form of its own is flushed.
async fn make_durable<D: BlockDevice>(call: &Call<'_, D>) -> Check<()> {
    if call.write_through() {
        call.disk.flush().await.map_err(|error| call.failure(&error))?;
    }
    Ok(())
}

async fn write_pattern<D: BlockDevice>(call: &Call<'_, D>, blocks: Blocks, pattern: &[u8]) -> Check<()> {
    let chunk = (CHUNK - CHUNK % blocks.block)
        .max(blocks.block)
        .min(blocks.length());
    let mut buffer = AlignedBuffer::new(usize::try_from(chunk).unwrap_or(usize::MAX));
    for block in buffer.as_mut_slice().chunks_exact_mut(pattern.len()) {
        block.copy_from_slice(pattern);
    }
    let durability = if call.write_through() {
        Durability::Durable
    } else {
        Durability::Volatile
    };
    // One write, as others see it.
    let write = async {
        let mut at = 0;
        while at < blocks.length() {
            let now = chunk.min(blocks.length() - at);
            // SAFETY: the buffer lives until the write has ended, and nobody changes it.
            let pieces = [unsafe { buffer.io(0, usize::try_from(now).unwrap_or(usize::MAX)) }];
            call.disk.write(blocks.offset() + at, &pieces, durability).await?;
            at += now;
        }
        Ok(())
    };
    call.writing(blocks.offset(), blocks.length(), write).await
}

/// UNMAP (SBC-4 §5.34). All descriptors are checked before any is done.
pub(super) async fn unmap<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    if call.cdb[1] & 1 != 0 {
        return Err(Sense::in_cdb(1, Some(0)).into());
    }
    let length = number::u16(call.cdb, 7);
    call.check_writable()?;
    if length == 0 {
        return Ok(Moved::NOTHING);
    }
    let parameters = take(call.command, length.into())?;
    let descriptors = parameters
        .get(UNMAP_HEADER..)
        .ok_or(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR))?;
    let told = usize::from(number::u16(&parameters, 2));
    let descriptors = descriptors.get(..told).ok_or(Sense::in_parameters(2, None))?;
    // What is left over is ignored, says the standard.
    let descriptors = descriptors.chunks_exact(UNMAP_DESCRIPTOR);
    if descriptors.len() > usize::try_from(MAX_UNMAP_DESCRIPTORS).unwrap_or(usize::MAX) {
        return Err(Sense::in_parameters(2, None).into());
    }
    let mut ranges = Vec::with_capacity(descriptors.len());
    let mut sum = 0_u64;
    for (index, descriptor) in descriptors.enumerate() {
        let (lba, count) = (number::u64(descriptor, 0), u64::from(number::u32(descriptor, 8)));
        sum += count;
        if sum > u64::from(MAX_RANGE_BLOCKS) {
            let at = UNMAP_HEADER + UNMAP_DESCRIPTOR * index + 8;
            return Err(Sense::in_parameters(u16::try_from(at).unwrap_or(u16::MAX), None).into());
        }
        ranges.push(call.checked(lba, count)?);
    }
    for blocks in ranges.into_iter().filter(|blocks| blocks.count > 0) {
        if call.unit.options().provisioning == Provisioning::ThinZeroes {
            zero(call, blocks, ZeroMode::MayUnmap).await?;
        } else {
            let discard = call.disk.discard(blocks.offset(), blocks.length());
            call.writing(blocks.offset(), blocks.length(), discard).await?;
            make_durable(call).await?;
        }
    }
    Ok(Moved::all(length.into()))
}

/// GET LBA STATUS (SBC-4 §5.6): as many descriptors as there is room for, from the block on that is asked about.
pub(super) async fn get_lba_status<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let (mut lba, allocation) = (number::u64(call.cdb, 2), u64::from(number::u32(call.cdb, 10)));
    let start = call.checked(lba, 1)?;
    let end = call.disk.geometry().size / start.block;
    let room = (allocation.saturating_sub(8) / 16).clamp(1, MAX_STATUS_DESCRIPTORS);
    let mut list: Vec<(u64, u64, u8)> = Vec::new();
    while lba < end {
        let (kind, bytes) = call
            .disk
            .allocation(lba * start.block, (end - lba) * start.block)
            .await
            .map_err(|error| call.failure(&error))?;
        // A block of which some is stored is mapped.
        let (status, count) = match kind {
            Allocation::Hole if bytes >= start.block => (1, bytes / start.block),
            Allocation::Hole => (0, 1),
            Allocation::Data | Allocation::Zeroes => (0, bytes.div_ceil(start.block).max(1)),
        };
        let count = count.min(end - lba).min(u64::from(u32::MAX));
        let full = list.len() as u64 == room;
        match list.last_mut() {
            Some((_, before, same)) if *same == status && *before + count <= u64::from(u32::MAX) => {
                *before += count;
            }
            _ if full => break,
            _ => list.push((lba, count, status)),
        }
        lba += count;
    }
    let mut data = vec![0; 8];
    for (lba, count, status) in list {
        data.extend(lba.to_be_bytes());
        data.extend(u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
        data.extend([status, 0, 0, 0]);
    }
    let length = length32(data.len() - 4);
    data[..4].copy_from_slice(&length);
    Ok(put(call.command, &data, allocation))
}
