//! A device of an open pool: what is in flight, what is not flushed yet, and what it has done.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoCause, IoError, Operation, ZeroMode};

use super::counters::Counters;
use super::list;
use crate::model::DeviceId;

/// A device that is in use.
pub(crate) struct Disk<D> {
    pub(crate) id: DeviceId,
    /// For people, and for the errors of volumes.
    pub(crate) name: Arc<str>,
    /// None if it is not there.
    io: Option<Rc<D>>,
    /// Cleared for ever by the first failure: whoever returns is a new `Disk`.
    alive: Cell<bool>,
    in_flight: Cell<u32>,
    /// Number of volatile writes that have ended, and of those that a flush covers.
    written: Cell<u64>,
    flushed: Cell<u64>,
    pub(crate) counters: Counters,
    /// How long something was in flight, up to when nothing was, and since when something is.
    busy: Cell<Duration>,
    busy_since: Cell<Duration>,
}

fn buffer_length(block: u64) -> usize {
    usize::try_from(block).unwrap_or(usize::MAX)
}

struct InFlight<'a, D>(&'a Disk<D>);

impl<D> Drop for InFlight<'_, D> {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

impl<D: BlockDevice> Disk<D> {
    pub(crate) fn new(id: DeviceId, name: &str, io: Option<Rc<D>>) -> Self {
        Self {
            id,
            name: name.into(),
            alive: Cell::new(io.is_some()),
            io,
            in_flight: Cell::new(0),
            // What a process before this one has written may be in the device's cache still: it was killed, and the power has stayed.
            written: Cell::new(1),
            flushed: Cell::new(0),
            counters: Counters::default(),
            busy: Cell::new(Duration::ZERO),
            busy_since: Cell::new(Duration::ZERO),
        }
    }

    /// The device itself, for what keeps metadata on it; none if it is not there.
    pub(crate) fn io(&self) -> Option<&Rc<D>> {
        self.io.as_ref()
    }

    fn there(&self, operation: Operation, offset: u64, length: u64) -> Result<&D, IoError> {
        self.io
            .as_deref()
            .ok_or_else(|| self.gone(operation, offset, length))
    }

    /// The error of a device that is not in service.
    #[cold]
    pub(crate) fn gone(&self, operation: Operation, offset: u64, length: u64) -> IoError {
        let reason = io::Error::from_raw_os_error(libc::ENODEV);
        IoError::new(&self.name, operation, offset, length, reason)
    }

    /// Whether redundancy still counts on it.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// Takes it out of service.
    pub(crate) fn kill(&self) {
        self.alive.set(false);
    }

    /// Requests that have not ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// How long something was in flight so far.
    pub(crate) fn busy(&self, now: Duration) -> Duration {
        let present = match self.in_flight.get() {
            0 => Duration::ZERO,
            _ => now.saturating_sub(self.busy_since.get()),
        };
        self.busy.get() + present
    }

    fn begin(&self, now: Duration) -> InFlight<'_, D> {
        if self.in_flight.get() == 0 {
            self.busy_since.set(now);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        InFlight(self)
    }

    fn ended<T>(
        &self,
        clock: &impl Clock,
        since: Duration,
        operation: Operation,
        length: u64,
        result: &Result<T, IoError>,
    ) {
        let now = clock.moment();
        if self.in_flight.get() == 1 {
            self.busy.set(self.busy(now));
            self.busy_since.set(now);
        }
        self.counters
            .count(operation, length, now.saturating_sub(since), result.is_ok());
    }

    fn volatile(&self, durability: Durability) {
        if durability == Durability::Volatile {
            self.written.set(self.written.get() + 1);
        }
    }

    pub(crate) async fn read(
        &self,
        clock: &impl Clock,
        offset: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let since = clock.moment();
        let _flight = self.begin(since);
        let result = self
            .there(Operation::Read, offset, list::length(buffers))?
            .read(offset, buffers)
            .await;
        self.ended(clock, since, Operation::Read, list::length(buffers), &result);
        result
    }

    /// Whether its last block is not there any more. Costs a read, which counts for nothing.
    pub(crate) async fn has_shrunk(&self) -> bool {
        let Some(io) = &self.io else { return false };
        let geometry = io.geometry();
        let block = u64::from(geometry.logical_block);
        let Some(last) = geometry.size.checked_sub(block) else {
            return false;
        };
        let buffer = AlignedBuffer::new(buffer_length(block));
        // SAFETY: the buffer lives until the read has ended, and is not touched meanwhile.
        let piece = [unsafe { buffer.io(0, buffer_length(block)) }];
        let read = io.read(last - last % block, &piece).await;
        read.is_err_and(|error| matches!(error.cause(), IoCause::Truncated))
    }

    pub(crate) async fn write(
        &self,
        clock: &impl Clock,
        offset: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), IoError> {
        let since = clock.moment();
        let _flight = self.begin(since);
        let result = self
            .there(Operation::Write, offset, list::length(buffers))?
            .write(offset, buffers, durability)
            .await;
        self.volatile(durability);
        self.ended(clock, since, Operation::Write, list::length(buffers), &result);
        result
    }

    pub(crate) async fn zero(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<(), IoError> {
        let since = clock.moment();
        let _flight = self.begin(since);
        let result = self
            .there(Operation::WriteZeroes, offset, length)?
            .write_zeroes(offset, length, mode)
            .await;
        self.volatile(Durability::Volatile);
        self.ended(clock, since, Operation::WriteZeroes, length, &result);
        result
    }

    pub(crate) async fn discard(&self, clock: &impl Clock, offset: u64, length: u64) -> Result<(), IoError> {
        let since = clock.moment();
        let _flight = self.begin(since);
        let result = self
            .there(Operation::Discard, offset, length)?
            .discard(offset, length)
            .await;
        self.volatile(Durability::Volatile);
        self.ended(clock, since, Operation::Discard, length, &result);
        result
    }

    /// Makes durable what has ended. Nothing is asked of the device if nothing was written since its last flush.
    pub(crate) async fn flush(&self, clock: &impl Clock) -> Result<(), IoError> {
        let covers = self.written.get();
        if self.flushed.get() >= covers {
            return Ok(());
        }
        let since = clock.moment();
        let _flight = self.begin(since);
        let result = self.there(Operation::Flush, 0, 0)?.flush().await;
        self.ended(clock, since, Operation::Flush, 0, &result);
        if result.is_ok() {
            self.flushed.set(self.flushed.get().max(covers));
        }
        result
    }
}
