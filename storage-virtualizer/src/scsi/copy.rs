//! EXTENDED COPY(LID1), block to block within one unit, and what became of it (SPC-4 §6.4, §6.17, §6.18, §6.24).
//!
//! A unit has its own disk and no other: descriptors of other units are told to be out of reach, which is what an initiator gets
//! from any target that cannot see the other one, and then it copies itself.

use block_io::{AlignedBuffer, BlockDevice, Durability};

use super::Check;
use super::block::Blocks;
use super::dispatch::Call;
use super::sense::{Code, Key, Sense};
use super::transfer::{Moved, length32, number, put, take};

const HEADER: usize = 16;
/// An identification descriptor of a logical unit, and its length.
const IDENTIFICATION: u8 = 0xe4;
const UNIT_DESCRIPTOR: usize = 32;
/// A segment descriptor from blocks to blocks, and its length.
const BLOCK_TO_BLOCK: u8 = 0x02;
const SEGMENT_DESCRIPTOR: usize = 28;

const MAX_UNITS: usize = 16;
const MAX_SEGMENTS: usize = 64;
/// Bytes of one segment.
const MAX_SEGMENT_LENGTH: u32 = 32 << 20;
/// So much is copied at a time.
const CHUNK: u64 = 1 << 20;
/// Copies whose end is remembered.
pub(super) const REMEMBERED: usize = 16;

/// What became of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    nexus: u64,
    list: u8,
    failed: bool,
    segments: u16,
}

/// A segment to copy.
struct Segment {
    from: Blocks,
    to: Blocks,
}

fn wrong(at: usize, bit: Option<u8>) -> Sense {
    Sense::in_parameters(u16::try_from(at).unwrap_or(u16::MAX), bit)
}

fn size(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// EXTENDED COPY(LID1). Done when it is answered.
pub(super) async fn extended_copy<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let length = number::u32(call.cdb, 10);
    if length == 0 {
        return Ok(Moved::NOTHING);
    }
    if size(length) < HEADER {
        return Err(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into());
    }
    let list = take(call.command, length.into())?;
    let segments = parse(call, &list)?;
    call.check_writable()?;
    let mut done = 0;
    let mut outcome = Ok(());
    for segment in &segments {
        outcome = copy(call, segment).await;
        if outcome.is_err() {
            break;
        }
        done += 1;
    }
    call.unit.with(|state| {
        if state.copies.len() == REMEMBERED {
            state.copies.pop_front();
        }
        state.copies.push_back(Ended {
            nexus: call.nexus.number(),
            list: list[0],
            failed: outcome.is_err(),
            segments: done,
        });
    });
    outcome?;
    Ok(Moved::all(length.into()))
}

/// The segments, all of which are possible.
fn parse<D: BlockDevice>(call: &Call<'_, D>, list: &[u8]) -> Check<Vec<Segment>> {
    let units = usize::from(number::u16(list, 2));
    let segments = size(number::u32(list, 8));
    if number::u32(list, 12) != 0 {
        // There are no inline data.
        return Err(wrong(12, None).into());
    }
    if !units.is_multiple_of(UNIT_DESCRIPTOR) {
        return Err(wrong(2, None).into());
    }
    if units / UNIT_DESCRIPTOR > MAX_UNITS {
        return Err(Sense::illegal(Code::TOO_MANY_TARGET_DESCRIPTORS).into());
    }
    let end = HEADER.checked_add(units).and_then(|at| at.checked_add(segments));
    if end != Some(list.len()) {
        return Err(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into());
    }
    let (units, segments) = list[HEADER..].split_at(units);
    let mut own = Vec::new();
    for (index, unit) in units.chunks_exact(UNIT_DESCRIPTOR).enumerate() {
        if unit[0] != IDENTIFICATION {
            return Err(Sense::illegal(Code::UNSUPPORTED_TARGET_DESCRIPTOR).into());
        }
        let block = number::u24(unit, 29);
        let is_own = is_own(call, unit);
        if is_own && block != 0 && block != call.disk.geometry().logical_block {
            return Err(wrong(HEADER + index * UNIT_DESCRIPTOR + 29, None).into());
        }
        own.push(is_own);
    }
    let at_segments = HEADER + units.len();
    let mut result = Vec::new();
    let mut at = 0;
    while at < segments.len() {
        let segment = &segments[at..];
        if segment[0] != BLOCK_TO_BLOCK {
            return Err(Sense::illegal(Code::UNSUPPORTED_SEGMENT_DESCRIPTOR).into());
        }
        if segment.len() < SEGMENT_DESCRIPTOR {
            return Err(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into());
        }
        if usize::from(number::u16(segment, 2)) != SEGMENT_DESCRIPTOR - 4 {
            return Err(wrong(at_segments + at + 2, None).into());
        }
        if result.len() == MAX_SEGMENTS {
            return Err(Sense::illegal(Code::TOO_MANY_SEGMENT_DESCRIPTORS).into());
        }
        for index in [4, 6] {
            match own.get(usize::from(number::u16(segment, index))) {
                None => return Err(wrong(at_segments + at + index, None).into()),
                Some(false) => {
                    return Err(Sense::new(Key::CopyAborted, Code::COPY_TARGET_NOT_REACHABLE).into());
                }
                Some(true) => {}
            }
        }
        let count = u64::from(number::u16(segment, 10));
        let from = call.checked(number::u64(segment, 12), count)?;
        let to = call.checked(number::u64(segment, 20), count)?;
        if from.length() > u64::from(MAX_SEGMENT_LENGTH) {
            return Err(wrong(at_segments + at + 10, None).into());
        }
        result.push(Segment { from, to });
        at += SEGMENT_DESCRIPTOR;
    }
    Ok(result)
}

/// Whether the descriptor names this unit by one of its designators.
fn is_own<D>(call: &Call<'_, D>, descriptor: &[u8]) -> bool {
    let identity = &call.unit.options().identity;
    let length = usize::from(descriptor[7]).min(20);
    let designator = &descriptor[8..8 + length];
    match descriptor[5] & 0x3f {
        0x03 => *designator == identity.naa(),
        0x0a => designator.get(2..) == Some(&identity.uuid),
        _ => false,
    }
}

/// Copies a segment. The destination is claimed, so that others see one write; where both overlap, it is as if all had been
/// read before.
async fn copy<D: BlockDevice>(call: &Call<'_, D>, segment: &Segment) -> Check<()> {
    let Segment { from, to } = segment;
    let length = from.length();
    let claim = call.unit.claim(to.offset()..to.offset() + length).await;
    let chunk = (CHUNK - CHUNK % from.block).min(length);
    let buffer = AlignedBuffer::new(usize::try_from(chunk).unwrap_or(usize::MAX));
    let backwards = from.lba < to.lba;
    let mut done = 0;
    while done < length {
        let now = chunk.min(length - done);
        let at = if backwards { length - done - now } else { done };
        // SAFETY: the buffer lives until the requests have ended, and nobody looks at it.
        let pieces = [unsafe { buffer.io(0, usize::try_from(now).unwrap_or(usize::MAX)) }];
        let outcome = async {
            call.disk.read(from.offset() + at, &pieces).await?;
            let durability = if call.write_through() {
                Durability::Durable
            } else {
                Durability::Volatile
            };
            call.disk.write(to.offset() + at, &pieces, durability).await
        };
        outcome.await.map_err(|error| call.failure(&error))?;
        done += now;
    }
    drop(claim);
    Ok(())
}

/// RECEIVE COPY RESULTS: what became of a copy, and what can be copied.
pub(super) fn receive_results<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let allocation = number::u32(call.cdb, 10).into();
    if call.cdb[1] & 0x1f == 3 {
        return Ok(put(call.command, &operating_parameters(call), allocation));
    }
    let (nexus, list) = (call.nexus.number(), call.cdb[2]);
    let ended = call.unit.with(|state| {
        let mut copies = state.copies.iter().rev();
        copies
            .find(|ended| ended.nexus == nexus && ended.list == list)
            .copied()
    });
    let Some(ended) = ended else {
        return Err(Sense::in_cdb(2, None).into());
    };
    let mut data = vec![0, 0, 0, 8, if ended.failed { 2 } else { 1 }];
    data.extend(ended.segments.to_be_bytes());
    data.resize(12, 0);
    Ok(put(call.command, &data, allocation))
}

fn operating_parameters<D: BlockDevice>(call: &Call<'_, D>) -> Vec<u8> {
    let mut data = vec![0; 44];
    data[4] = 1;
    let short = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes();
    data[8..10].copy_from_slice(&short(MAX_UNITS));
    data[10..12].copy_from_slice(&short(MAX_SEGMENTS));
    let lists = MAX_UNITS * UNIT_DESCRIPTOR + MAX_SEGMENTS * SEGMENT_DESCRIPTOR;
    data[12..16].copy_from_slice(&length32(lists));
    data[16..20].copy_from_slice(&MAX_SEGMENT_LENGTH.to_be_bytes());
    data[34..36].copy_from_slice(&short(usize::from(u8::MAX)));
    data[36] = u8::MAX;
    data[37] = u8::try_from(call.disk.geometry().logical_block.ilog2()).unwrap_or(0);
    let types = [BLOCK_TO_BLOCK, IDENTIFICATION];
    data[43] = u8::try_from(types.len()).unwrap_or(0);
    data.extend(types);
    let length = length32(data.len() - 4);
    data[..4].copy_from_slice(&length);
    data
}
