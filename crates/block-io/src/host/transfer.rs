//! Moving bytes: straight from and to the caller's memory where the device allows it, else through a bounce buffer.

use crate::buffer::{AlignedBuffer, IoBuf, list};
use crate::device::Durability;
use crate::error::{IoCause, IoError, Operation};
use crate::worker::{self, Call};

use super::HostDevice;
use super::open::SECTOR;
use super::range_lock::{Extent, Held};

/// The most pieces of memory that one system call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;
/// Size of bounce buffers; longer requests take several turns.
const BOUNCE: u64 = 1 << 20;

impl HostDevice {
    /// Has the kernel do `call`: bytes moved, or the reason why not.
    #[inline]
    pub(super) async fn call(&self, call: Call) -> Result<u32, IoCause> {
        let request = self.request(call);
        let result = match call {
            Call::Read { .. } | Call::Write { .. } if self.at_once => worker::execute_at_once(&request),
            _ => worker::Operation::new(request).await,
        };
        match result {
            Some(result) => u32::try_from(result)
                .map_err(|_| IoCause::Os(std::io::Error::from_raw_os_error(result.wrapping_neg()))),
            None => Err(IoCause::NotOnWorker),
        }
    }

    /// Whether the kernel can use the caller's memory and offset as they are.
    #[inline]
    pub(super) fn suits(&self, offset: u64, buffers: &[IoBuf]) -> bool {
        let in_file = u64::from(self.alignment.offset - 1);
        let in_memory = u64::from(self.alignment.memory - 1);
        let mut bits = offset & in_file;
        for buffer in buffers {
            bits |= (buffer.len() as u64 & in_file) | (buffer.address().addr() as u64 & in_memory);
        }
        bits == 0
    }

    /// Whether the file's blocks are larger than what callers may write.
    pub(super) fn has_sub_blocks(&self) -> bool {
        self.alignment.offset > self.geometry.logical_block
    }

    #[inline]
    pub(super) async fn read_aligned(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
    ) -> Result<(), IoError> {
        let done = match self.call(read_call(offset, buffers)).await {
            Ok(done) if u64::from(done) == length => return Ok(()),
            Ok(done) => u64::from(done),
            Err(cause) => return Err(self.error(Operation::Read, offset, length, cause)),
        };
        Box::pin(self.read_rest(offset, buffers, length, done)).await
    }

    /// Goes on after `done` bytes.
    async fn read_rest(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
        mut done: u64,
    ) -> Result<(), IoError> {
        let failed = |cause| self.error(Operation::Read, offset, length, cause);
        let mut end_of_file = !self.may_continue(done, buffers);
        while done < length && !end_of_file {
            let rest = list::after(buffers, done);
            let now = u64::from(self.call(read_call(offset + done, &rest)).await.map_err(failed)?);
            done += now;
            end_of_file = now == 0 || !self.may_continue(done, buffers);
        }
        if done < length {
            // Only a file's last sector may be incomplete.
            let size = self.size.load(std::sync::atomic::Ordering::Relaxed);
            if offset + done <= size.saturating_sub(u64::from(SECTOR)) {
                return Err(failed(self.note_truncation()));
            }
            list::zero_from(buffers, done);
        }
        Ok(())
    }

    /// Whether a transfer can go on after `done` bytes: O_DIRECT ends within a block only at the end of the file. A list
    /// of more pieces than the kernel takes ends between two pieces.
    fn may_continue(&self, done: u64, buffers: &[IoBuf]) -> bool {
        done != 0 && done.is_multiple_of(u64::from(self.alignment.offset)) && !buffers.is_empty()
    }

    #[inline]
    pub(super) async fn write_aligned(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
        durability: Durability,
    ) -> Result<(), IoError> {
        match self.call(write_call(offset, buffers, durability)).await {
            Ok(done) if u64::from(done) == length => Ok(()),
            Ok(done) => Box::pin(self.write_rest(offset, buffers, length, durability, u64::from(done))).await,
            Err(cause) => Err(self.write_error(offset, length, durability, cause)),
        }
    }

    async fn write_rest(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
        durability: Durability,
        mut done: u64,
    ) -> Result<(), IoError> {
        let mut now = done;
        while done < length {
            // A part of a block, or nothing at all: O_DIRECT cannot go on there.
            if now == 0 || !done.is_multiple_of(u64::from(self.alignment.offset)) {
                return Err(self.write_error(offset, length, durability, IoCause::NoProgress));
            }
            let rest = list::after(buffers, done);
            now = match self.call(write_call(offset + done, &rest, durability)).await {
                Ok(now) => u64::from(now),
                Err(cause) => return Err(self.write_error(offset, length, durability, cause)),
            };
            done += now;
        }
        Ok(())
    }

    #[cold]
    fn write_error(&self, offset: u64, length: u64, durability: Durability, cause: IoCause) -> IoError {
        // A durable write includes a flush, whose error the kernel reports once.
        if durability == Durability::Durable
            && matches!(&cause, IoCause::Os(error) if error.raw_os_error() == Some(libc::EIO))
        {
            self.flush_failed
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
        self.error(Operation::Write, offset, length, cause)
    }

    /// Reads whole blocks into a buffer of our own and copies what was asked for.
    pub(super) async fn read_bounced(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
    ) -> Result<(), IoError> {
        let mut copied = 0;
        while copied < length {
            let part = (length - copied).min(BOUNCE);
            let (start, bounce) = self.bounce_for(offset + copied, part);
            self.read_block_range(start, &bounce).await?;
            let from = index_of(offset + copied - start);
            list::scatter(buffers, copied, &bounce.as_slice()[from..from + index_of(part)]);
            copied += part;
        }
        Ok(())
    }

    /// Copies the caller's data into a buffer of our own and writes whole blocks, whose other bytes are read before.
    pub(super) async fn write_bounced(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
        durability: Durability,
    ) -> Result<(), IoError> {
        let mut copied = 0;
        while copied < length {
            let part = (length - copied).min(BOUNCE);
            let (start, mut bounce) = self.bounce_for(offset + copied, part);
            let from = index_of(offset + copied - start);
            if from != 0 || bounce.as_slice().len() != index_of(part) {
                self.read_block_range(start, &bounce).await?;
            }
            list::gather(
                buffers,
                copied,
                &mut bounce.as_mut_slice()[from..from + index_of(part)],
            );
            // SAFETY: `bounce` is not touched before the write has ended, and this future, which owns it, is not leaked by
            // the contract of the caller's buffers.
            let piece = [unsafe { bounce.io(0, usize::MAX) }];
            self.write_aligned(start, &piece, bounce.as_slice().len() as u64, durability)
                .await?;
            copied += part;
        }
        Ok(())
    }

    /// Writes on a device whose blocks are larger than a sector: while a block is read, modified and written, no other
    /// write to it may come between.
    pub(super) async fn write_excluding(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        length: u64,
        durability: Durability,
    ) -> Result<(), IoError> {
        let _held = self.hold(offset, length).await;
        if self.suits(offset, buffers) {
            self.write_aligned(offset, buffers, length, durability).await
        } else {
            self.write_bounced(offset, buffers, length, durability).await
        }
    }

    /// Keeps others from what a write of the range may read, modify and write.
    pub(super) async fn hold(&self, offset: u64, length: u64) -> Held<'_> {
        let (start, end) = self.blocks_around(offset, length);
        let extent = match (start, end) == (offset, offset + length) {
            true => Extent::Whole,
            false => Extent::Part,
        };
        self.writes.hold(start, end, extent).await
    }

    /// The whole blocks that contain the range.
    pub(super) fn blocks_around(&self, offset: u64, length: u64) -> (u64, u64) {
        let block = u64::from(self.alignment.offset);
        (offset - offset % block, (offset + length).next_multiple_of(block))
    }

    fn bounce_for(&self, offset: u64, length: u64) -> (u64, AlignedBuffer) {
        let (start, end) = self.blocks_around(offset, length);
        (start, AlignedBuffer::new(index_of(end - start)))
    }

    async fn read_block_range(&self, start: u64, bounce: &AlignedBuffer) -> Result<(), IoError> {
        // SAFETY: as in `write_bounced`; the buffer's owner waits for this.
        let piece = [unsafe { bounce.io(0, usize::MAX) }];
        self.read_aligned(start, &piece, bounce.as_slice().len() as u64)
            .await
    }
}

/// Lengths of bounce buffers, which are small.
fn index_of(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

fn read_call(offset: u64, buffers: &[IoBuf]) -> Call {
    Call::Read {
        offset,
        buffers: buffers.as_ptr().cast(),
        count: count(buffers),
    }
}

fn write_call(offset: u64, buffers: &[IoBuf], durability: Durability) -> Call {
    let flags = match durability {
        Durability::Volatile => 0,
        Durability::Durable => libc::RWF_DSYNC,
    };
    Call::Write {
        offset,
        buffers: buffers.as_ptr().cast(),
        count: count(buffers),
        flags,
    }
}

fn count(buffers: &[IoBuf]) -> u32 {
    u32::try_from(buffers.len().min(MAX_PIECES)).unwrap_or(u32::MAX)
}
