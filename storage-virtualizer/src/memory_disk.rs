//! A disk in memory, for tests: it answers at once, or fails or waits as it is told to, and counts.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use block_io::{
    Allocation, BlockDevice, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode, list,
};

/// Bytes of which the disk knows together whether they are stored.
const GRANULE: u64 = 4096;

/// What is told to the disk.
#[derive(Default)]
struct Script {
    /// Such requests fail, with this number of an error.
    failing: Option<(Operation, i32)>,
    /// Such requests wait.
    held: Option<Operation>,
    waiting: Vec<Waker>,
}

struct Content {
    bytes: Vec<u8>,
    /// For each granule, whether it is stored.
    stored: Vec<bool>,
}

/// The disk.
pub(crate) struct MemoryDisk {
    name: Arc<str>,
    geometry: Geometry,
    content: Mutex<Content>,
    script: Mutex<Script>,
    flushes: AtomicU64,
    durable: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryDisk {
    /// `size` zero bytes in blocks of `logical_block`; discards have granules of 4 KiB.
    pub(crate) fn new(size: u64, logical_block: u32) -> Self {
        Self::with_geometry(Geometry {
            size,
            logical_block,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        })
    }

    /// A disk that is like this.
    pub(crate) fn with_geometry(geometry: Geometry) -> Self {
        let length = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            name: "memory".into(),
            geometry,
            content: Mutex::new(Content {
                bytes: vec![0; length(geometry.size)],
                stored: vec![false; length(geometry.size.div_ceil(GRANULE))],
            }),
            script: Mutex::default(),
            flushes: AtomicU64::new(0),
            durable: AtomicU64::new(0),
        }
    }

    fn with<R>(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, IoError> {
        let error = |cause: IoCause| Err(IoError::new(&self.name, operation, offset, length, cause));
        let failing = lock(&self.script).failing;
        if let Some((_, number)) = failing.filter(|failing| failing.0 == operation) {
            return error(std::io::Error::from_raw_os_error(number).into());
        }
        let size = self.geometry.size;
        let block = self.geometry.logical_block;
        let mut content = lock(&self.content);
        let range = offset
            .checked_add(length)
            .and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
        if self.geometry.read_only && operation != Operation::Read {
            return error(IoCause::ReadOnly);
        }
        if !(offset | length).is_multiple_of(block.into()) {
            return error(IoCause::Misaligned { block });
        }
        match range.and_then(|range| content.bytes.get_mut(range)) {
            Some(bytes) => Ok(change(bytes)),
            None => error(IoCause::OutOfRange { size }),
        }
    }

    /// Granules of a range are stored now; or not, if they lie in it wholly.
    fn store(&self, offset: u64, length: u64, stored: bool) {
        let end = offset + length;
        let (first, last) = if stored {
            (offset / GRANULE, end.div_ceil(GRANULE))
        } else {
            (offset.div_ceil(GRANULE), end / GRANULE)
        };
        for granule in (first..last).filter_map(|granule| usize::try_from(granule).ok()) {
            lock(&self.content).stored[granule] = stored;
        }
    }

    async fn admit(&self, operation: Operation) {
        poll_fn(|context| {
            let mut script = lock(&self.script);
            if script.held == Some(operation) {
                script.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }
}

#[cfg(test)]
impl MemoryDisk {
    /// What the disk holds.
    pub(crate) fn content(&self) -> Vec<u8> {
        lock(&self.content).bytes.clone()
    }

    /// Has such requests fail, or none.
    pub(crate) fn fail(&self, failing: Option<(Operation, i32)>) {
        lock(&self.script).failing = failing;
    }

    /// Has such requests wait, or none.
    pub(crate) fn hold(&self, held: Option<Operation>) {
        let mut script = lock(&self.script);
        script.held = held;
        script.waiting.drain(..).for_each(Waker::wake);
    }

    /// Flushes so far.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Durable writes so far.
    pub(crate) fn durable_writes(&self) -> u64 {
        self.durable.load(Ordering::Relaxed)
    }
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.admit(Operation::Read).await;
        let length = list::total_length(buffers);
        self.with(Operation::Read, offset, length, |bytes| {
            list::scatter(buffers, 0, bytes);
        })
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        self.admit(Operation::Write).await;
        let length = list::total_length(buffers);
        self.with(Operation::Write, offset, length, |bytes| {
            list::gather(buffers, 0, bytes);
        })?;
        self.store(offset, length, true);
        if durability == Durability::Durable {
            self.durable.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.admit(Operation::Flush).await;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        match lock(&self.script).failing {
            Some((Operation::Flush, number)) => {
                let cause = std::io::Error::from_raw_os_error(number);
                Err(IoError::new(&self.name, Operation::Flush, 0, 0, cause))
            }
            _ => Ok(()),
        }
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.admit(Operation::Discard).await;
        self.with(Operation::Discard, offset, length, |_| ())?;
        self.store(offset, length, false);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.admit(Operation::WriteZeroes).await;
        self.with(Operation::WriteZeroes, offset, length, |bytes| bytes.fill(0))?;
        self.store(offset, length, mode == ZeroMode::KeepAllocated);
        Ok(())
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        self.with(Operation::Read, offset, length, |_| ())?;
        let content = lock(&self.content);
        let at = |granule: u64| content.stored[usize::try_from(granule).unwrap_or(usize::MAX)];
        let first = offset / GRANULE;
        let last = (offset + length).div_ceil(GRANULE);
        let end = (first..last)
            .find(|granule| at(*granule) != at(first))
            .unwrap_or(last);
        let kind = if at(first) {
            Allocation::Data
        } else {
            Allocation::Hole
        };
        Ok((kind, length.min(end * GRANULE - offset)))
    }
}
