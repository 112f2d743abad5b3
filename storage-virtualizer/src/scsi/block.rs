//! Commands that read, write and flush blocks.

use std::borrow::Cow;
use std::sync::atomic::Ordering;

use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf, IoError, Operation, list};

use super::dispatch::Call;
use super::flight::Writing;
use super::sense::{Code, Key, Sense};
use super::transfer::{Moved, first, number};
use super::unit::mode_bit;
use super::{Check, Command, Nexus, Outcome, Unit, total};

const FUA: u8 = 0x08;

/// A READ or WRITE (10) or (16) that asks for nothing special.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plain {
    writes: bool,
    durability: Durability,
    lba: u64,
    blocks: u32,
}

impl Plain {
    /// What `cdb` asks for, if it is one.
    pub(super) fn of(cdb: &[u8]) -> Option<Self> {
        let (lba, blocks) = match *cdb.first()? {
            0x28 | 0x2a => {
                let cdb = cdb.first_chunk::<10>()?;
                (cdb[9] == 0).then_some(())?;
                (number::u32(cdb, 2).into(), number::u16(cdb, 7).into())
            }
            0x88 | 0x8a => {
                let cdb = cdb.first_chunk::<16>()?;
                (cdb[15] == 0).then_some(())?;
                (number::u64(cdb, 2), number::u32(cdb, 10))
            }
            _ => return None,
        };
        let writes = cdb[0] & 0x02 != 0;
        // FUA of a read is another thing: it wants the medium, not the cache.
        let durability = match cdb[1] {
            0x00 | 0x10 => Durability::Volatile,
            0x08 | 0x18 if writes => Durability::Durable,
            _ => return None,
        };
        Some(Self {
            writes,
            durability,
            lba,
            blocks,
        })
    }
}

/// Does it, if nothing is special about the unit or the buffers either.
pub(super) async fn execute_plain<D: BlockDevice>(
    disk: &D,
    unit: &Unit,
    nexus: &Nexus,
    command: &Command<'_>,
    plain: Plain,
) -> Option<Outcome> {
    let special = nexus.mask() | mode_bit::ALL;
    let geometry = disk.geometry();
    let block = u64::from(geometry.logical_block);
    let length = u64::from(plain.blocks) * block;
    let offset = plain.lba.checked_mul(block)?;
    if offset.checked_add(length)? > geometry.size || length == 0 {
        return None;
    }
    let outcome = if plain.writes {
        if total(command.data_out) != length {
            return None;
        }
        let writing = Writing::begin(unit);
        if unit.word() & special != 0 {
            return None;
        }
        let outcome = disk.write(offset, command.data_out, plain.durability).await;
        if outcome.is_ok() {
            writing.succeed(length);
        }
        outcome
    } else {
        if total(command.data_in) != length || unit.word() & special != 0 {
            return None;
        }
        let outcome = disk.read(offset, command.data_in).await;
        if outcome.is_ok() {
            unit.flight.count_read(length);
        }
        outcome
    };
    Some(match outcome {
        Ok(()) => Outcome::good(Moved::all(length)),
        Err(error) => failed(unit, &error, geometry.logical_block),
    })
}

#[cold]
fn failed(unit: &Unit, error: &IoError, block: u32) -> Outcome {
    Outcome::failed(unit, of_disk(unit, error, block))
}

#[cold]
fn of_disk(unit: &Unit, error: &IoError, block: u32) -> Sense {
    let counter = match error.operation() {
        Operation::Read => &unit.counters.read_errors,
        _ => &unit.counters.write_errors,
    };
    counter.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(
        unit = unit.options().identity.serial,
        error = block_io::error_chain(error),
        "a SCSI command failed on the disk"
    );
    Sense::of(error, block)
}

/// Blocks that a command means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    pub(super) lba: u64,
    pub(super) count: u64,
    /// Bytes of a block.
    pub(super) block: u64,
}

impl Blocks {
    pub(super) fn offset(self) -> u64 {
        self.lba * self.block
    }

    pub(super) fn length(self) -> u64 {
        self.count * self.block
    }
}

/// Start and number of blocks as the CDB has them, by its group: (6), (10), (12), (16).
pub(super) fn addressed(cdb: &[u8]) -> (u64, u64) {
    match cdb.first().map_or(0, |opcode| opcode >> 5) {
        0 => {
            let count = cdb.get(4).copied().unwrap_or(0);
            // In these, 0 is 256.
            let count = if count == 0 { 256 } else { u64::from(count) };
            (u64::from(number::u24(cdb, 1) & 0x1f_ffff), count)
        }
        1 | 2 => (number::u32(cdb, 2).into(), number::u16(cdb, 7).into()),
        5 => (number::u32(cdb, 2).into(), number::u32(cdb, 6).into()),
        _ => (number::u64(cdb, 2), number::u32(cdb, 10).into()),
    }
}

impl<D: BlockDevice> Call<'_, D> {
    /// The blocks that the command means, all of which exist.
    pub(super) fn blocks(&self) -> Check<Blocks> {
        let (lba, count) = addressed(self.cdb);
        self.checked(lba, count)
    }

    /// `count` blocks from `lba` on, all of which exist.
    pub(super) fn checked(&self, lba: u64, count: u64) -> Check<Blocks> {
        let geometry = self.disk.geometry();
        let block = u64::from(geometry.logical_block);
        match lba.checked_add(count) {
            Some(end) if end <= geometry.size / block => Ok(Blocks { lba, count, block }),
            _ => Err(Sense::illegal(Code::LBA_OUT_OF_RANGE).into()),
        }
    }

    pub(super) fn failure(&self, error: &IoError) -> super::Fail {
        of_disk(self.unit, error, self.disk.geometry().logical_block).into()
    }

    /// Refuses what changes a disk that may not be changed.
    pub(super) fn check_writable(&self) -> Check<()> {
        let code = if self.disk.geometry().read_only || self.unit.options().read_only {
            Code::WRITE_PROTECTED
        } else if self.unit.word() & mode_bit::WRITE_PROTECTED != 0 {
            Code::SOFTWARE_WRITE_PROTECTED
        } else {
            return Ok(());
        };
        Err(Sense::new(Key::DataProtect, code).into())
    }

    /// Whether there is no write cache for initiators.
    pub(super) fn write_through(&self) -> bool {
        self.unit.word() & mode_bit::WRITE_THROUGH != 0
    }

    /// How durable the command's writes are.
    pub(super) fn durability(&self) -> Durability {
        let six = self.cdb.first().is_some_and(|opcode| *opcode < 0x20);
        let forced = !six && self.cdb.get(1).is_some_and(|byte| byte & FUA != 0);
        if forced || self.write_through() {
            Durability::Durable
        } else {
            Durability::Volatile
        }
    }

    /// Runs `write` on `length` bytes from `offset` on, when nobody has claimed any of them.
    pub(super) async fn writing<T>(
        &self,
        offset: u64,
        length: u64,
        write: impl Future<Output = Result<T, IoError>>,
    ) -> Check<T> {
        let writing = Writing::begin(self.unit);
        if self.unit.word() & mode_bit::CLAIMED == 0 {
            let result = write.await.map_err(|error| self.failure(&error))?;
            writing.succeed(length);
            return Ok(result);
        }
        drop(writing);
        let noted = self.unit.note_write(offset..offset.saturating_add(length)).await;
        let result = write.await.map_err(|error| self.failure(&error))?;
        self.unit.count_written(length);
        drop(noted);
        Ok(result)
    }

    /// Writes the first `length` bytes of the data, or what there is of them in whole blocks.
    pub(super) async fn write_data(&self, blocks: Blocks, durability: Durability) -> Check<Moved> {
        let wanted = blocks.length();
        let given = total(self.command.data_out);
        let length = if given >= wanted {
            wanted
        } else {
            given - given % blocks.block
        };
        if length > 0 {
            let data: Cow<'_, [IoBuf]> = first(self.command.data_out, length);
            let write = self.disk.write(blocks.offset(), &data, durability);
            self.writing(blocks.offset(), length, write).await?;
        }
        Ok(Moved {
            wanted,
            moved: length,
        })
    }
}

/// READ (SBC-4 §5.13).
pub(super) async fn read<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let blocks = call.blocks()?;
    if call.cdb[0] >= 0x20 && call.cdb[1] & FUA != 0 {
        // What is read must be on the medium.
        call.disk.flush().await.map_err(|error| call.failure(&error))?;
    }
    let wanted = blocks.length();
    let moved = wanted.min(total(call.command.data_in));
    let rest = moved % blocks.block;
    let whole = moved - rest;
    if whole > 0 {
        let data = first(call.command.data_in, whole);
        let outcome = call.disk.read(blocks.offset(), &data).await;
        outcome.map_err(|error| call.failure(&error))?;
    }
    if rest > 0 {
        let last = AlignedBuffer::new(usize::try_from(blocks.block).unwrap_or(0));
        // SAFETY: the buffer lives until the read has ended, and nobody looks at it before.
        let pieces = [unsafe { last.io(0, usize::MAX) }];
        let outcome = call.disk.read(blocks.offset() + whole, &pieces).await;
        outcome.map_err(|error| call.failure(&error))?;
        let rest = usize::try_from(rest).unwrap_or(0);
        list::scatter(call.command.data_in, whole, &last.as_slice()[..rest]);
    }
    call.unit.flight.count_read(moved);
    Ok(Moved { wanted, moved })
}

/// WRITE (SBC-4 §5.42).
pub(super) async fn write<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let blocks = call.blocks()?;
    call.check_writable()?;
    call.write_data(blocks, call.durability()).await
}

/// SYNCHRONIZE CACHE (SBC-4 §5.29). All of the cache is flushed, whatever the range; IMMED is answered when it is done, which
/// the standard leaves to the device.
pub(super) async fn synchronize_cache<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    call.blocks()?;
    call.disk.flush().await.map_err(|error| call.failure(&error))?;
    let done = &call.unit.counters.synchronizations;
    done.fetch_add(1, Ordering::Relaxed);
    Ok(Moved::NOTHING)
}

/// PRE-FETCH (SBC-4 §5.11). There is no cache of which a part could be asked for, so GOOD says that the blocks did not fit.
pub(super) fn pre_fetch<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    call.blocks()?;
    Ok(Moved::NOTHING)
}
